"""Every way of spreading a step over ranks, against one process: the loss and the gradient of every parameter."""
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, on_ranks, tiny_config, tiny_model

import data
import parallel
from model import Execution, Transformer

LENGTHS = [3, 40, 1, 7, 120, 2, 64, 19]     # documents of very uneven lengths, cut at 64
PARTS, GLOBAL_BATCH_SIZE = 64, 4

class Chat:
    """Documents whose first halves are not trained, so that some shares of a row hold no target at all."""
    key, lengths, sources = "chat", LENGTHS, [(0, len(LENGTHS), 1.0)]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).numpy()

    def __init__(self, masked):
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(97, (sum(LENGTHS),), generator=generator, dtype=torch.int32).numpy()
        if masked:
            for start, end in zip(self.offsets, self.offsets[1:]):
                self.tokens[start:(start + end) // 2 + 1] = ~self.tokens[start:(start + end) // 2 + 1]
        self.targets = torch.tensor([int((self.read(i, 1, 10**9) >= 0).sum()) for i in range(len(LENGTHS))]).numpy()

    def read(self, document, start, end):
        return self.tokens[self.offsets[document] + start:min(self.offsets[document] + end, self.offsets[document + 1])]

def rows_of(masked, loss_weight):
    return data.Rows(Chat(masked), "split", PARTS, seed=0, loss_weight=loss_weight)

def truth(masked=False, loss_weight="token"):
    """One process, no sharding, no exchange: loss and gradients of the first step."""
    model, rows = tiny_model(), rows_of(masked, loss_weight)
    batches = rows.step(1, GLOBAL_BATCH_SIZE, 1, 0, 1, 0, 10**9)
    weight = sum(b.weights.sum() for b in batches)
    loss = sum(model(b.input_ids, b.position_ids, b.cu_seqlens, b.max_seqlen, b.labels, b.weights / weight)
               for b in batches)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}

def one_step(sp, zero_stage, replicas, masked, loss_weight, execution, expected_loss, expected):
    grid = parallel.init(replicas, sp)
    source, rows = tiny_model(), rows_of(masked, loss_weight)
    with torch.device("meta"):
        model = Transformer(tiny_config(), grid.sp_group, execution)
    parallel.shard(model, model.model["layers"], grid, torch.float32, zero_stage, False)
    with torch.no_grad():
        for name, local, first in model.local_parameters():
            local.copy_(source.get_parameter(name)[first:first + len(local)])
    batches = rows.step(1, GLOBAL_BATCH_SIZE, grid.dp, grid.dp_rank, sp, grid.sp_rank, 10**9)
    weight = parallel.all_sum(sum(b.weights.sum() for b in batches))
    loss = 0.0
    for i, b in enumerate(batches):
        parallel.accumulate(model, zero_stage, last=i == len(batches) - 1)
        part = model(b.input_ids, b.position_ids, b.cu_seqlens, b.max_seqlen, b.labels, b.weights / weight)
        part.backward()
        loss += part.detach()
    assert_close(parallel.all_sum(loss), expected_loss, f"loss on rank {grid.rank}", rtol=2e-6)
    for name, p in model.named_parameters():
        scale = expected[name].abs().max().item()
        assert_close(p.grad.full_tensor(), expected[name], f"gradient of {name} on rank {grid.rank}", atol=2e-6 * scale)

GRID = [  # ranks, sp, ZERO_STAGE, REPLICAS, chat rows, LOSS_WEIGHT, execution
    (1, 1, 3, 1, False, "token", Execution()), (2, 1, 3, 1, True, "sample", Execution()),
    (2, 2, 2, 1, True, "token", Execution(recompute="all_but_attention")),
    (4, 2, 1, 1, False, "token", Execution()), (4, 4, 3, 1, True, "square", Execution(recompute="all", loss_chunk=5)),
    (4, 2, 2, 2, True, "sample", Execution(recompute="all_but_attention", offload_layers=9, mlp_chunk=7)),
    (4, 1, 1, 2, False, "square", Execution()), (8, 8, 2, 1, True, "token", Execution(recompute="all_but_attention")),
]

@pytest.mark.parametrize("world,sp,zero,replicas,masked,loss_weight,execution", GRID,
                         ids=lambda v: str(v) if not isinstance(v, Execution) else v.recompute)
def test_gradients_equal_one_process(world, sp, zero, replicas, masked, loss_weight, execution, tmp_path):
    loss, gradients = truth(masked, loss_weight)
    on_ranks(world, one_step, sp, zero, replicas, masked, loss_weight, execution, loss, gradients, tmp_path=tmp_path)

def exchange(heads):
    group, P, r = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    full = torch.arange(4 * P * heads * 3, dtype=torch.float64).view(4 * P, heads, 3)
    mine = full[4 * r:4 * r + 4].clone().requires_grad_()
    out = parallel.seq_to_heads(mine, group)
    copies = max(P // heads, 1)
    expected = full.repeat_interleave(copies, dim=1).unflatten(1, (P, -1))[:, r]
    assert torch.equal(out, expected), f"rank {r} holds {out.tolist()}"
    if copies == 1:
        assert torch.equal(parallel.heads_to_seq(out, group), mine)
    (out * (r + 1)).sum().backward()  # each copy of a head brings the gradient of the rank that used it
    used = torch.arange(1.0, P + 1, dtype=torch.float64).repeat_interleave(heads * copies // P)
    assert torch.equal(mine.grad, used.view(heads, copies).sum(1)[None, :, None].expand(4, heads, 3))
    a, b = parallel.seq_to_heads(parallel.cut_heads((mine, 2 * mine), P), group).chunk(2, dim=1)
    assert torch.equal(a, expected) and torch.equal(b, 2 * expected)

@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_exchange_is_a_transpose(heads, tmp_path):
    on_ranks(4, exchange, heads, tmp_path=tmp_path)

def test_without_a_group_the_exchange_is_the_identity():
    x = torch.randn(3, 2, 4)
    assert parallel.seq_to_heads(x, None) is x and parallel.heads_to_seq(x, None) is x

@pytest.mark.parametrize("world,replicas,sp,heads,kv,message", [
    (8, 1, 8, 28, 4, "SEQUENCE_PARALLEL_SIZE 8 does not divide 28 attention heads: use 1, 2, 4"),
    (2, 1, 2, 9, 3, "does not divide 9 attention heads: use 1"),
    (8, 1, 4, 12, 6, "does not fit 6 key/value heads: use 1, 2"),
    (6, 1, 4, 8, 8, "does not divide 6 processes"), (4, 3, 1, 8, 8, "REPLICAS 3 does not divide 4 processes")])
def test_sizes_that_do_not_fit_are_refused(world, replicas, sp, heads, kv, message):
    with pytest.raises(ValueError, match=message):
        parallel.check(world, replicas, sp, heads, kv)

def fill_and_save(folder, sp, replicas):
    grid, model = sharded(sp, replicas)
    import convert
    convert.save_weights(model, folder / "source", folder / f"out-{grid.world}-{replicas}")
    dist.barrier()
    back = {n: p.full_tensor() for n, p in model.named_parameters()}
    model.init_weights(6)
    convert.load_weights(model, folder / f"out-{grid.world}-{replicas}")
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), back[name]), name

@pytest.mark.parametrize("world,sp,replicas", [(1, 1, 1), (3, 1, 1), (4, 2, 2)])
def test_weights_are_the_same_on_any_number_of_ranks(world, sp, replicas, tmp_path, hf_folder):
    import convert
    folder, _ = hf_folder(name="source")
    on_ranks(world, fill_and_save, tmp_path, sp, replicas, tmp_path=tmp_path)
    alone = Transformer(tiny_config())
    alone.init_weights(5)
    loaded = Transformer(tiny_config())
    convert.load_weights(loaded, tmp_path / f"out-{world}-{replicas}")
    for name, p in alone.named_parameters():
        assert torch.equal(p, loaded.get_parameter(name)), name

def fail_on(rank):
    if dist.get_rank() == rank:
        raise OSError("no space")
    return dist.get_rank()

def work_together():
    assert parallel.together("work", fail_on, 7) == [0, 1, 2]
    assert parallel.together("work", fail_on, 7, only=1) == [None, 1, None]
    for only in (1, None):
        with pytest.raises(RuntimeError, match="work: rank 1: OSError: no space"):
            parallel.together("work", fail_on, 1, only=only)

def test_a_failure_of_one_rank_is_everybodys(tmp_path):
    on_ranks(3, work_together, tmp_path=tmp_path)

def sharded(sp, replicas):
    grid = parallel.init(replicas, sp)
    with torch.device("meta"):
        model = Transformer(tiny_config(), grid.sp_group)
    parallel.shard(model, model.model["layers"], grid, torch.float32, 3, False)
    model.init_weights(5)
    return grid, model

def save_and_find(root):
    grid, model = sharded(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, note in ((1, "first"), (2, "second")):
        parallel.save_checkpoint(root, step, model, optimizer, {"note": note}, keep=1)
    if grid.rank == 1:  # a shared folder that this host has not seen change
        Path.glob, Path.exists = lambda *_: iter(()), lambda _: False
    parallel.save_checkpoint(root, 2, model, optimizer, {"note": "again"}, keep=1)
    if grid.rank == 1:
        Path.exists = lambda path: True
    folder, manifest = parallel.find_checkpoint(root, "auto")
    assert (folder, manifest["note"]) == (root / "step-00000002", "second")
    assert parallel.find_checkpoint(root, "never") == (None, None)

def test_published_checkpoints_and_foreign_folders_stay(tmp_path):
    """One rank decides what there is: another that saw something else would wait for ever."""
    root = tmp_path / "checkpoints"
    for name in ("step-original", "step-original.part", "step-00000001.kept"):
        (root / name).mkdir(parents=True)
    on_ranks(2, save_and_find, root, tmp_path=tmp_path)
    assert {f.name for f in root.iterdir()} == {"step-00000002", "step-original", "step-original.part",
                                                "step-00000001.kept"}

def norm_of_large_gradients(expected):
    grid = parallel.init(1, 1)
    large = torch.nn.Linear(1024, 8192, bias=False)
    parallel.shard(large, [], grid, torch.float32, 3, False)
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(8192, 1024, generator=generator)
    (large(torch.eye(1024)) * full.T).sum().backward()      # its gradient is `full` on every rank, summed
    assert_close(parallel.grad_norm(large.parameters()), expected * grid.world, f"norm on rank {grid.rank}", rtol=1e-6)

@pytest.mark.parametrize("world", [1, 2])
def test_the_norm_of_a_large_gradient(world, tmp_path):
    """torch's own float32 norm of these 8 million elements is 2e-4 too small on a CPU."""
    full = torch.randn(8192, 1024, generator=torch.Generator().manual_seed(0))
    on_ranks(world, norm_of_large_gradients, full.double().norm().item(), tmp_path=tmp_path)
