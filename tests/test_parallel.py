"""Every way of spreading a step over ranks, against one process: loss and every gradient."""
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import assert_close, on_ranks, row, tiny_config, tiny_model

import convert
import data
import parallel
import recompute
from model import Execution, Transformer

# Documents of very uneven lengths, in rows that end at 64 tokens.
LENGTHS = [3, 40, 1, 7, 120, 2, 64, 19]
MAX_LENGTH = 64
GLOBAL_BATCH_SIZE = 4


def corpus(masked):
    """Random documents. With `masked` the first half of each is not trained, so that some shards
    of a row hold no target at all."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(97, (sum(LENGTHS),), generator=generator, dtype=torch.int32).numpy()
    offsets = np.cumsum([0, *LENGTHS])
    if masked:
        for start, end in zip(offsets, offsets[1:]):
            first_half = slice(start, (start + end) // 2 + 1)
            tokens[first_half] = ~tokens[first_half]
    targets = [(tokens[start + 1:end] >= 0).sum() for start, end in zip(offsets, offsets[1:])]
    sources = [(0, len(LENGTHS), 1.0)]
    return data.Corpus(tokens, offsets, np.array(targets), np.array(LENGTHS), sources, "random")


def rows_of(masked, loss_weight):
    return data.Rows(corpus(masked), "split", MAX_LENGTH, seed=0, loss_weight=loss_weight)


def run_model(model, batch, weights):
    return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen,
                 batch.labels, weights)


def truth(masked, loss_weight):
    """One process, no sharding, no exchange -> loss and gradients of the first step."""
    model = tiny_model()
    rows = rows_of(masked, loss_weight)
    batches = rows.step(1, GLOBAL_BATCH_SIZE, 1, 0, 1, 0, 10**9)
    step_weight = sum(batch.weights.sum() for batch in batches)
    loss = sum(run_model(model, batch, batch.weights / step_weight) for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def whole(tensor):
    """Return a parameter of all ranks."""
    return tensor.full_tensor()


def sharded_model(grid, execution, zero_stage):
    """Return a model on the meta device until FSDP2 has sharded it. Its weights are not set."""
    with torch.device("meta"):
        model = Transformer(tiny_config(), grid.sp_group, execution)
    blocks = model.block_groups()
    parallel.shard(model, blocks, grid, torch.float32, zero_stage, offload_optimizer=False)
    return model


def one_step(sp, zero_stage, replicas, masked, loss_weight, execution, expected_loss, expected):
    """Runs on every rank: the same step as truth()."""
    grid = parallel.init(replicas, sp)
    model = sharded_model(grid, execution, zero_stage)
    source = tiny_model()
    with torch.no_grad():
        for name, local, first in model.local_parameters():
            local.copy_(source.get_parameter(name)[first:first + len(local)])

    rows = rows_of(masked, loss_weight)
    batches = rows.step(1, GLOBAL_BATCH_SIZE, grid.dp, grid.dp_rank, sp, grid.sp_rank, 10**9)
    step_weight = parallel.all_sum(sum(batch.weights.sum() for batch in batches))
    loss = 0.0
    for i, batch in enumerate(batches):
        parallel.set_gradient_sync(model, zero_stage, is_last=i == len(batches) - 1)
        micro_loss = run_model(model, batch, batch.weights / step_weight)
        micro_loss.backward()
        loss += micro_loss.detach()

    assert_close(parallel.all_sum(loss), expected_loss, f"loss on rank {grid.rank}", rtol=2e-6)
    for name, p in model.named_parameters():
        largest = expected[name].abs().max().item()
        what = f"gradient of {name} on rank {grid.rank}"
        assert_close(p.grad.full_tensor(), expected[name], what, atol=2e-6 * largest)
    squares = sum(gradient.double().square().sum() for gradient in expected.values())
    assert_close(parallel.grad_norm(model.parameters()), squares.sqrt(), "gradient norm", rtol=2e-6)


OFFLOADED = Execution(recompute="all_but_attention", offload_layers=9, mlp_chunk=7)
GRIDS = [
    # ranks, sp, ZERO_STAGE, REPLICAS, masked, LOSS_WEIGHT, execution
    (1, 1, 3, 1, False, "token", Execution()),
    (2, 1, 3, 1, True, "sample", Execution()),
    (2, 2, 2, 1, True, "token", Execution(recompute="all_but_attention")),
    (2, 2, 3, 1, True, "token", Execution(recompute="pairs", offload_layers=1)),
    (4, 2, 1, 1, False, "token", Execution()),
    (4, 4, 3, 1, True, "square", Execution(recompute="all", loss_chunk=5)),
    (4, 2, 2, 2, True, "sample", OFFLOADED),
    (4, 1, 1, 2, False, "square", Execution()),
    (8, 8, 2, 1, True, "token", Execution(recompute="all_but_attention")),
]


@pytest.mark.parametrize(
    "world,sp,zero,replicas,masked,loss_weight,execution", GRIDS,
    ids=lambda value: value.recompute if isinstance(value, Execution) else str(value))
def test_gradients_equal_one_process(
        world, sp, zero, replicas, masked, loss_weight, execution, tmp_path, monkeypatch):
    monkeypatch.setattr(recompute, "PART_WORK", 1)      # as in a long row
    loss, gradients = truth(masked, loss_weight)
    on_ranks(world, one_step, sp, zero, replicas, masked, loss_weight, execution, loss, gradients,
             tmp_path=tmp_path)


# ---------------------------------------------------------------------------------- the exchange

def exchange(heads):
    """Runs on every rank, with 4 tokens of P = 4 ranks and heads of size 3."""
    group = dist.group.WORLD
    P = dist.get_world_size()
    rank = dist.get_rank()
    full = torch.arange(4 * P * heads * 3, dtype=torch.float64).view(4 * P, heads, 3)
    mine = full[4 * rank:4 * rank + 4].clone().requires_grad_()

    out = parallel.seq_to_heads(mine, group)
    copies = max(P // heads, 1)     # ranks that hold the same head
    expected = full.repeat_interleave(copies, dim=1).unflatten(1, (P, -1))[:, rank]
    assert torch.equal(out, expected), f"rank {rank} holds {out.tolist()}"
    if copies == 1:
        assert torch.equal(parallel.heads_to_seq(out, group), mine)

    # Each copy of a head brings back the gradient of the rank that used it: here its number + 1.
    (out * (rank + 1)).sum().backward()
    factors = torch.arange(1.0, P + 1, dtype=torch.float64)
    by_head = factors.repeat_interleave(heads * copies // P).view(heads, copies).sum(1)
    assert torch.equal(mine.grad, by_head[None, :, None].expand(4, heads, 3))

    two_tensors = parallel.split_heads_by_rank((mine, 2 * mine), P)
    a, b = parallel.seq_to_heads(two_tensors, group).chunk(2, dim=1)
    assert torch.equal(a, expected)
    assert torch.equal(b, 2 * expected)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_exchange_is_a_transpose(heads, tmp_path):
    on_ranks(4, exchange, heads, tmp_path=tmp_path)


def test_a_row_on_one_rank_is_not_copied():
    """Slices of whole tensors would cost backward three tensors of zeros and three copies a layer."""
    segments = parallel.segments_of_rank([0, 3, 10], None, torch.device("cpu"))
    x = torch.randn(10, 2, 4)
    parts = segments.divide(x)
    assert len(parts) == 1 and parts[0] is x
    assert segments.join(parts) is x


def reduce_scatters_of_a_model():
    """Runs on every rank."""
    grid = parallel.init(1, 1)
    model = tiny_model()
    parallel.shard(model, model.block_groups(), grid, torch.float32, 2, offload_optimizer=False)
    modules = parallel.sharded_modules(model)
    assert len(modules) > 1
    for module in modules:
        [group] = module._get_fsdp_state()._fsdp_param_groups
        assert isinstance(group._reduce_scatter_comm, parallel.ReduceScatter)


def test_fsdp_reduces_into_the_memory_of_activations(tmp_path):
    on_ranks(2, reduce_scatters_of_a_model, tmp_path=tmp_path)


def test_without_a_group_the_exchange_is_the_identity():
    x = torch.randn(3, 2, 4)
    assert parallel.seq_to_heads(x, None) is x
    assert parallel.heads_to_seq(x, None) is x


@pytest.mark.parametrize("world,replicas,sp,heads,kv_heads,message", [
    (8, 1, 8, 28, 4, "SEQUENCE_PARALLEL_SIZE 8 does not divide 28 attention heads: use 1, 2, 4"),
    (2, 1, 2, 9, 3, "does not divide 9 attention heads: use 1"),
    (8, 1, 4, 12, 6, "does not fit 6 key/value heads: use 1, 2"),
    (6, 1, 4, 8, 8, "does not divide 6 processes"),
    (8, 2, 8, 8, 8, "SEQUENCE_PARALLEL_SIZE 8 does not divide 4 processes of a replica: use 1, 2, 4"),
    (4, 3, 1, 8, 8, "REPLICAS 3 does not divide 4 processes")])
def test_sizes_that_do_not_fit_are_refused(world, replicas, sp, heads, kv_heads, message):
    with pytest.raises(ValueError, match=message):
        parallel.data_parallel_size(world, replicas, sp, heads, kv_heads)


# --------------------------------------------------------------------- local and crossing documents

# A row of 64 tokens on 4 ranks, 16 each: documents' lengths, and the tokens that are exchanged.
LAYOUTS = {
    "none crosses": ([16, 10, 6, 16, 16], [0, 0, 0, 0]),
    "one document": ([64], [16, 16, 16, 16]),
    "over one cut": ([12, 8, 12, 16, 16], [4, 4, 0, 0]),
    "over every cut, one each": ([12, 8, 8, 8, 8, 8, 12], [4, 8, 8, 4]),
    "over two cuts": ([14, 20, 14, 16], [2, 16, 2, 0]),
    "over all cuts": ([15, 40, 9], [1, 16, 16, 7]),
    "the last rank alone is local": ([48, 9, 7], [16, 16, 16, 0]),
}


def tokens_that_cross(lengths):
    """Runs on every rank."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    cpu = torch.device("cpu")
    segments = parallel.segments_of_rank(cu_seqlens, dist.group.WORLD, cpu)
    return segments.crossing_tokens


def model_on_layout(layout, changes, execution, expected_loss, expected):
    """Runs on every rank: one row with the documents of a layout."""
    lengths, crossing_tokens = LAYOUTS[layout]
    assert tokens_that_cross(lengths) == crossing_tokens
    rank = dist.get_rank()
    model = tiny_model(sp_group=dist.group.WORLD, execution=execution, **changes)
    ids, positions, cu_seqlens, max_seqlen, labels = row(lengths, masked=0.2)
    mine = slice(16 * rank, 16 * rank + 16)

    exchange = dist.all_to_all_single
    exchanges = []

    def counted(*args, **kwargs):
        exchanges.append(1)
        return exchange(*args, **kwargs)

    dist.all_to_all_single = counted
    loss = model(ids[mine], positions[mine], cu_seqlens, max_seqlen, labels[mine])
    loss.backward()
    assert (len(exchanges) == 0) == (sum(crossing_tokens) == 0), f"{len(exchanges)} exchanges"

    total = parallel.all_sum(loss.detach().clone())
    assert_close(total, expected_loss, f"loss on rank {rank}", rtol=2e-6)
    for name, p in model.named_parameters():
        largest = expected[name].abs().max().item()
        gradient = parallel.all_sum(p.grad)
        assert_close(gradient, expected[name], f"gradient of {name}", atol=3e-6 * largest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes,execution", [
    ({}, Execution()),
    ({"num_key_value_heads": 2}, Execution(recompute="all_but_attention")),
    ({"sliding_window": 5}, Execution(recompute="all_but_attention", offload_layers=9)),
    ({"num_key_value_heads": 2, "sliding_window": 5, "sliding_layers": [0], "qk_norm": True,
      "sliding_rope_theta": 50.0, "attention_multiplier": 0.3, "norm_after": True},
     Execution(recompute="all_but_attention")),
    ({"sliding_window": 5, "sliding_layers": [1], "nope_layers": [1], "norm_before": False,
      "norm_after": True, "qk_norm": True, "qk_norm_across_heads": True},
     Execution(recompute="all_but_attention", mlp_chunk=5)),
    ({"num_key_value_heads": 2, "sliding_window": 5}, Execution(recompute="all")),
], ids=["plain", "fewer key/value heads than ranks", "window, offloaded",
        "a window and its RoPE in one layer", "a window without RoPE in one layer",
        "heads in parts"])
def test_only_crossing_documents_are_exchanged(layout, changes, execution, tmp_path, monkeypatch):
    monkeypatch.setattr(recompute, "PART_WORK", 1)
    lengths, _ = LAYOUTS[layout]
    alone = tiny_model(**changes)
    ids, positions, cu_seqlens, max_seqlen, labels = row(lengths, masked=0.2)
    loss = alone(ids, positions, cu_seqlens, max_seqlen, labels)
    loss.backward()
    gradients = {name: p.grad for name, p in alone.named_parameters()}
    on_ranks(4, model_on_layout, layout, changes, execution, loss.item(), gradients,
             tmp_path=tmp_path)


# ----------------------------------------------------------------------------- norm of gradients

def large_gradient():
    return torch.randn(8192, 1024, generator=torch.Generator().manual_seed(0))


def norm_of_a_large_gradient(expected):
    """Runs on every rank: a linear layer whose gradient is large_gradient(), summed over ranks."""
    grid = parallel.init(1, 1)
    linear = torch.nn.Linear(1024, 8192, bias=False)
    parallel.shard(linear, [], grid, torch.float32, 3, False)
    out = linear(torch.eye(1024))                                               # (1024, 8192)
    (out * large_gradient().T).sum().backward()
    norm = parallel.grad_norm(linear.parameters())
    assert_close(norm, expected * grid.world, f"norm on rank {grid.rank}", rtol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_norm_of_a_large_gradient(world, tmp_path):
    """torch's own float32 norm of these 8 million elements is 2e-4 too small on a CPU."""
    expected = large_gradient().double().norm().item()
    on_ranks(world, norm_of_a_large_gradient, expected, tmp_path=tmp_path)


# ------------------------------------------------------------------------- weights on several ranks

def random_sharded_model(sp, replicas):
    grid = parallel.init(replicas, sp)
    model = sharded_model(grid, Execution(), zero_stage=3)
    model.init_weights(seed=5)
    return grid, model


def copy_a_state_twice(folder):
    """Runs on every rank: the copy of a state does not change with it, and its memory is reused."""
    grid = parallel.init(1, 1)
    model = sharded_model(grid, Execution(), zero_stage=2)
    model.init_weights(seed=5)
    saver = parallel.Saver(folder, record={})
    parameters = dict(model.named_parameters())
    state = {"model": parameters, "groups": [{"betas": (0.9, 0.95), "step": torch.tensor(1.0)}]}
    first = saver.copy_to_cpu(state)
    memory = [parallel.local_rows(x)[0].data_ptr() for x in first["model"].values()]
    assert first["groups"] == [{"betas": (0.9, 0.95), "step": torch.tensor(1.0)}]

    before = {name: whole(p).clone() for name, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1)
    assert all(torch.equal(whole(first["model"][name]), x) for name, x in before.items())
    second = saver.copy_to_cpu(state)
    assert [parallel.local_rows(x)[0].data_ptr() for x in second["model"].values()] == memory
    assert all(torch.equal(whole(second["model"][name]), x + 1) for name, x in before.items())


@pytest.mark.parametrize("world", [1, 2])
def test_a_state_is_copied_for_a_save(world, tmp_path):
    on_ranks(world, copy_a_state_twice, tmp_path / "checkpoints", tmp_path=tmp_path)


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "CONTAINER", tmp_path)
    of_host = parallel.available_memory()
    assert of_host > 2**20
    assert parallel.memory_limit() == float("inf")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 2000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert parallel.memory_limit() == float("inf")
    (tmp_path / "memory.max").write_text("5000\n")
    assert parallel.memory_limit() == 5000
    assert parallel.available_memory() == 4000


def save_and_load_weights(source, out, sp, replicas):
    """Runs on every rank."""
    _, model = random_sharded_model(sp, replicas)
    convert.save_weights(model, source, out)
    dist.barrier()
    saved = {name: p.full_tensor() for name, p in model.named_parameters()}
    model.init_weights(seed=6)
    convert.load_weights(model, out)
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), saved[name]), name


@pytest.mark.parametrize("world,sp,replicas", [(1, 1, 1), (3, 1, 1), (4, 2, 2)])
def test_weights_are_the_same_on_any_number_of_ranks(world, sp, replicas, tmp_path, hf_folder):
    source, _ = hf_folder(name="source")
    out = tmp_path / "out"
    on_ranks(world, save_and_load_weights, source, out, sp, replicas, tmp_path=tmp_path)
    expected = Transformer(tiny_config())
    expected.init_weights(seed=5)
    loaded = Transformer(tiny_config())
    convert.load_weights(loaded, out)
    for name, p in expected.named_parameters():
        assert torch.equal(p, loaded.get_parameter(name)), name


# ------------------------------------------------------------------------ failures and checkpoints

def fail_on(rank):
    if dist.get_rank() == rank:
        raise OSError("no space")
    return dist.get_rank()


def work_together():
    """Runs on every rank."""
    assert parallel.run_on_ranks("work", fail_on, 7) == [0, 1, 2]
    assert parallel.run_on_ranks("work", fail_on, 7, only=1) == [None, 1, None]
    for only in (1, None):
        with pytest.raises(RuntimeError, match="work: rank 1: OSError: no space"):
            parallel.run_on_ranks("work", fail_on, 1, only=only)


def test_a_failure_of_one_rank_is_raised_on_all(tmp_path):
    on_ranks(3, work_together, tmp_path=tmp_path)


def save_and_find(root):
    """Runs on every rank. Rank 1 does not see what is in the folder, as on a slow shared disk."""
    grid, model = random_sharded_model(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    parallel.save_checkpoint(root, 1, model, optimizer, {"note": "first"}, keep=1)
    parallel.save_checkpoint(root, 2, model, optimizer, {"note": "second"}, keep=1)

    if grid.rank == 1:
        Path.glob = lambda *_: iter(())
        Path.exists = lambda _: False
    parallel.save_checkpoint(root, 2, model, optimizer, {"note": "again"}, keep=1)
    if grid.rank == 1:
        Path.exists = lambda _: True
    folder, manifest = parallel.find_checkpoint(root, "auto")
    assert folder == root / "step-00000002"
    assert manifest["note"] == "second"
    assert parallel.find_checkpoint(root, "never") == (None, None)


def test_published_checkpoints_and_foreign_folders_stay(tmp_path):
    """One rank decides what there is: another that saw something else would wait for ever."""
    root = tmp_path / "checkpoints"
    foreign = {"step-original", "step-original.part", "step-00000001.kept"}
    for name in foreign:
        (root / name).mkdir(parents=True)
    on_ranks(2, save_and_find, root, tmp_path=tmp_path)
    assert {folder.name for folder in root.iterdir()} == {"step-00000002", *foreign}


# ------------------------------------------------------------------------------------------- SLURM

def join_as_task(variables, queue):
    """The body of a task of srun: join the other tasks, and report the grid and a sum over it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    torch.cuda.is_available = lambda: False
    world_before = parallel.world_size()
    grid = parallel.init(1, 2)
    total = parallel.all_sum(torch.tensor(grid.rank + 1.0))
    queue.put((grid.rank, world_before, grid.world, grid.sp_rank, total.item()))
    parallel.close()


def test_tasks_of_srun_join_each_other():
    """Two processes that have only the variables of SLURM."""
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    processes = []
    for rank in range(2):
        variables = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_TASKS_PER_NODE": "2",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_ID": str(os.getpid()),
        }
        processes.append(context.Process(target=join_as_task, args=(variables, queue)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    reports = sorted(queue.get() for _ in range(2))
    assert reports == [(0, 2, 2, 0, 3.0), (1, 2, 2, 1, 3.0)]


def test_more_processes_than_visible_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="8 processes on a host of 1 GPUs: .* --gpus-per-node, as"):
        parallel.init(1, 1)


def join_attempt(attempt, rank, port):
    """The body of a rank of torchrun. In the second attempt rank 1 comes later."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(attempt))
    torch.cuda.is_available = lambda: False
    time.sleep(attempt * rank)
    grid = parallel.init(1, 1)
    assert parallel.all_sum(torch.tensor(grid.rank + 1.0)).item() == 3
    parallel.close()


def test_restarted_ranks_do_not_find_the_addresses_of_earlier_ones():
    """torchrun has one store, in its own process, for all attempts."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("fork")
    for attempt in range(2):
        processes = []
        for rank in range(2):
            arguments = (attempt, rank, store.port)
            processes.append(context.Process(target=join_attempt, args=arguments))
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()
        assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("given,expected", [
    # A task of srun: the third host of uneven ones.
    ({"SLURM_PROCID": "17", "SLURM_LOCALID": "1", "SLURM_NTASKS": "20", "SLURM_NODEID": "2",
      "SLURM_TASKS_PER_NODE": "8(x2),4", "SLURM_JOB_NODELIST": "gpu[003-005],login1",
      "SLURM_JOB_ID": "123456"},
     {"RANK": "17", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
      "MASTER_ADDR": "gpu003", "MASTER_PORT": "23456"}),
    # A step on one host of a job of several, whose other hosts have other numbers of tasks.
    ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_NODEID": "0",
      "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_TASKS_PER_NODE": "2",
      "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_STEP_NODELIST": "gpu2", "SLURM_JOB_ID": "7"},
     {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
      "MASTER_ADDR": "gpu2", "MASTER_PORT": "20007"}),
    # A process of torchrun under srun.
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "9", "WORLD_SIZE": "16"},
     {"RANK": "9", "WORLD_SIZE": "16"}),
    # A job of a single task.
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}),
    ({}, {}),
])
def test_variables_of_slurm(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    parallel.adopt_slurm()
    found = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    assert found == expected


@pytest.mark.parametrize("hosts,first", [
    ("node7", "node7"), ("node7,node8", "node7"), ("gpu[003-006,9],a", "gpu003"),
    ("gpu[12,14-16]", "gpu12"), ("rack-1-gpu[2-3]", "rack-1-gpu2"),
])
def test_first_host(hosts, first):
    assert parallel.first_host(hosts) == first
