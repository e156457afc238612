"""What only a GPU can run: attention packages, compiled halves of blocks, offloading.

All of it runs in bfloat16. The measure is the error of the plainest way against float32: another
way may err at most half as much again."""
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import generated_logits, row, tiny_model

import recompute
import train
from model import KERNELS, Execution, attention_kernel
from parallel import ReduceScatter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WIDE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 3, "vocab_size": 1000}


def relative_error(actual, expected):
    difference = actual.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


def attend(kernel_name, dtype, window):
    """Return the output and gradients of q, k, v of an attention kernel on three documents."""
    _, kernel = attention_kernel(kernel_name, "cuda", dtype)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads):
        values = torch.randn(1500, heads, 64, device="cuda", generator=generator)
        return values.bfloat16().to(dtype)

    q = random(8).requires_grad_()
    k = random(2).requires_grad_()
    v = random(2).requires_grad_()
    cu_seqlens = torch.tensor([0, 1, 700, 1500], dtype=torch.int32, device="cuda")
    out = kernel(q, k, v, cu_seqlens, 800, window)
    out.backward(random(8))
    return {"output": out.detach(), "gradient of q": q.grad, "gradient of k": k.grad,
            "gradient of v": v.grad}


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "sdpa"])
def test_attention_packages_agree(name, window):
    try:
        attention_kernel(name, "cuda", torch.bfloat16)
    except ValueError as e:
        pytest.skip(str(e))
    truth = attend("sdpa", torch.float32, window)
    plain = attend("sdpa", torch.bfloat16, window)
    found = attend(name, torch.bfloat16, window)
    for what, expected in truth.items():
        error = relative_error(found[what], expected)
        plain_error = relative_error(plain[what], expected)
        assert error < 1.5 * plain_error + 1e-4, f"{what}: error {error}, plain {plain_error}"


def attend_to_last(name, dtype, tensors, n):
    """Return the output and gradients of q, k, v for the last of documents of n tokens. The
    gradient of the output is the last of `tensors`."""
    _, kernel = attention_kernel(name, "cuda", dtype)
    *inputs, grad_out = [x.to(dtype) for x in tensors]
    inputs = [x.detach().requires_grad_() for x in inputs]
    cu_seqlens = torch.arange(0, len(grad_out) + 1, n, dtype=torch.int32, device="cuda")
    out = kernel(*inputs, cu_seqlens, n, None)
    out.backward(grad_out)
    results = [out.detach(), *[x.grad for x in inputs]]
    return {name: x[-n:] for name, x in zip(("output", "q", "k", "v"), results)}


def test_attention_beyond_32_bits():
    """The last document of a row of 2^31 elements and more, and the same alone."""
    n = 8192
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(86 * n, heads, 128, device="cuda", dtype=torch.bfloat16,
                           generator=generator) for heads in (24, 8, 8, 24)]
    assert tensors[0].numel() > 2**31
    found = attend_to_last("auto", torch.bfloat16, tensors, n)
    last = [x[-n:] for x in tensors]
    truth = attend_to_last("sdpa", torch.float32, last, n)
    plain = attend_to_last("sdpa", torch.bfloat16, last, n)
    for what, expected in truth.items():
        error = relative_error(found[what], expected)
        assert error < 1.5 * relative_error(plain[what], expected) + 1e-4, f"{what}: error {error}"


def wide_model(execution, dtype, **changes):
    model = tiny_model(execution=execution, **WIDE, **changes).to("cuda", dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.div_(4)
    return model


def loss_and_gradients(execution, dtype=torch.bfloat16):
    """Of the second of two forwards, since the first one compiles and fills buffers."""
    model = wide_model(execution, dtype)
    ids, positions, cu_seqlens, max_seqlen, labels = row([700, 1, 323], vocab_size=1000, masked=0.2)
    inputs = (ids.cuda(), positions.cuda(), cu_seqlens.cuda(), max_seqlen, labels.cuda())
    model(*inputs)
    loss = model(*inputs) / 1000
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


EXECUTIONS = [
    Execution(recompute="all_but_attention"),
    Execution(recompute="all"),
    Execution(compile=True),
    Execution(recompute="all_but_attention", compile=True),
    Execution(recompute="all", compile=True),
    Execution(recompute="pairs", compile=True, offload_layers=1),
    Execution(recompute="pairs", compile=True, offload_layers=1, mlp_chunk=256),
    Execution(compile=True, offload_layers=2),
    Execution(recompute="all_but_attention", compile=True, keep_layers=2, offload_layers=2),
    Execution(recompute="all_but_attention", compile=True, offload_layers=9, mlp_chunk=256,
              loss_chunk=300),
    Execution(recompute="all_but_attention", compile=True, keep_layers=1, attention="torch_varlen"),
]


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_executions_agree(execution, monkeypatch):
    monkeypatch.setattr(recompute, "PART_WORK", 2000)   # with "all", attend with 2 heads at a time
    true_loss, truth = loss_and_gradients(Execution(), torch.float32)
    plain_loss, plain = loss_and_gradients(Execution(attention="sdpa"))
    loss, gradients = loss_and_gradients(execution)
    assert abs(loss - true_loss) < 1.5 * abs(plain_loss - true_loss) + 1e-3 * true_loss
    for name, expected in truth.items():
        error = relative_error(gradients[name], expected)
        plain_error = relative_error(plain[name], expected)
        assert error < 1.5 * plain_error + 1e-3, (
            f"gradient of {name}: error {error}, plain {plain_error}")


@pytest.mark.parametrize("n_prompt", [1, 30])
@pytest.mark.parametrize("window", [None, 20])
def test_a_cache_gives_the_logits_of_the_whole_text(n_prompt, window):
    ids, positions, cu_seqlens, max_seqlen, _ = row([40], vocab_size=1000)
    inputs = (ids.cuda(), positions.cuda(), cu_seqlens, max_seqlen)
    plain = Execution(attention="sdpa")
    with torch.no_grad():
        truth = wide_model(plain, torch.float32, sliding_window=window)(*inputs)
        expected = wide_model(plain, torch.bfloat16, sliding_window=window)(*inputs)
    model = wide_model(Execution(), torch.bfloat16, sliding_window=window)
    found = generated_logits(model, ids.cuda(), n_prompt)
    error = relative_error(found, truth[n_prompt - 1:])
    plain_error = relative_error(expected[n_prompt - 1:], truth[n_prompt - 1:])
    assert error < 1.5 * plain_error + 1e-3, f"error {error}, plain {plain_error}"


def losses_and_norms(folder, name, *settings):
    """Return (4, 2): loss and gradient norm of four steps of the demo, by train.py."""
    command = [
        sys.executable, train.__file__, f"RUN_DIR={folder}/{name}", f"CACHE_DIR={folder}/cache",
        "SAVE_EVERY=-1", "MAX_STEPS=4", "MAX_LENGTH=512", "SAMPLE_PROMPTS=[]", "WARMUP_RATIO=0.0",
        "LEARNING_RATE=1e-3", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = Path(folder) / name / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])


def train_side_by_side(folder, runs):
    """runs: lists of settings. Return losses_and_norms of each. Most of their time is the start."""
    with ThreadPoolExecutor(max_workers=5) as pool:
        futures = [pool.submit(losses_and_norms, folder, f"run{i}", *settings)
                   for i, settings in enumerate(runs)]
        return [future.result() for future in futures]


SETTINGS = [
    ["OFFLOAD_OPTIMIZER=True"],
    ["RECOMPUTE=all", "ZERO_STAGE=3", "OFFLOAD_ACTIVATIONS=-1"],
    ["RECOMPUTE=pairs", "ZERO_STAGE=3", "OFFLOAD_ACTIVATIONS=1"],
    ["RECOMPUTE=none", "ZERO_STAGE=1"],
    ["RECOMPUTE=all_but_attention", "KEEP_LAYERS=3", "OFFLOAD_ACTIVATIONS=2"],
    ["COMPILE=False", "ATTENTION=torch_varlen"],
    ["OFFLOAD_ACTIVATIONS=1", "MLP_CHUNK=100", "LOSS_CHUNK=100", "KEEP_LAYERS=1"],
]


def test_reduced_gradients_use_the_memory_of_activations():
    """FSDP2 reduces on a stream of its own, whose memory the allocator keeps apart."""
    options = {"dtype": torch.float32, "device": torch.device("cuda")}
    size = (2**26,)
    torch.cuda.empty_cache()
    activation = torch.empty(size, **options)
    address = activation.data_ptr()
    del activation
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient = ReduceScatter().allocate(size, **options)
        assert gradient.data_ptr() == address
        torch.cuda._sleep(10**9)    # cycles, for which the stream is busy
    # Nor is its memory used again before the stream is done with it.
    del gradient
    following = torch.empty(size, **options)
    assert following.data_ptr() != address


def test_saves_in_the_background(tmp_path):
    """The third and the fourth save use the memory of the first. A stale copy would train on to
    another loss."""
    # Attention's backward adds the parts of long documents in any order, and compiled kernels depend
    # on the shapes that a process has seen. Without both, a run is exact.
    exact = ["MAX_LENGTH=64", "COMPILE=False"]
    without = losses_and_norms(tmp_path, "without", *exact)
    saved = losses_and_norms(tmp_path, "saved", *exact, "SAVE_EVERY=1")
    assert torch.equal(saved, without)
    checkpoints = sorted((tmp_path / "saved" / "checkpoints").iterdir())
    assert [folder.name for folder in checkpoints] == ["step-00000003", "step-00000004"]
    resumed = losses_and_norms(tmp_path, "resumed", *exact, f"RESUME={checkpoints[0]}")
    assert torch.equal(resumed, saved[3:])


def test_training_agrees(tmp_path):
    """Through FSDP2, the optimizer and the data, whatever is recomputed, offloaded or cut: the
    error of bfloat16, and no more."""
    truth, plain, *others = train_side_by_side(tmp_path, [["DTYPE=float32"], [], *SETTINGS])
    largest_error = (plain - truth).abs().max(0).values
    allowed = 2 * largest_error + 2e-3 * truth.abs().max(0).values
    for settings, found in zip(SETTINGS, others):
        assert ((found - truth).abs() <= allowed).all(), (
            f"{settings}: {found.tolist()}, in float32 {truth.tolist()}")


def test_one_row_a_step_agrees_with_fsdp(tmp_path):
    """Then AdamW reads gradients in bfloat16, and no others are added to them."""
    runs = [["DTYPE=float32"], ["ZERO_STAGE=3"], []]
    truth, fsdp, found = train_side_by_side(
        tmp_path, [[*settings, "GLOBAL_BATCH_SIZE=1"] for settings in runs])
    largest_error = (fsdp - truth).abs().max(0).values
    assert ((found - truth).abs() <= 2 * largest_error + 2e-3 * truth.abs().max(0).values).all()


# ------------------------------------------------------------------------------- faults of real runs

# train.py, after the code that breaks something or shortens a time.
CHANGED = """
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, {repository!r})
import parallel
import train

{change}
try:
    train.override(sys.argv[1:])
    train.main()
except Exception as error:
    train.report(error)
"""

SHORT_TIMES = """
parallel.TRAINING_TIMEOUT = timedelta(seconds=10)
parallel.NCCL_PATIENCE = timedelta(seconds=20)
parallel.ROLL_CALL_SECONDS = 3.0
Path(__file__).with_name("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
"""

LITTLE_MEMORY = """
total = torch.cuda.mem_get_info()[1]
torch.cuda.set_per_process_memory_fraction(2**29 / total)
"""


def start_changed(folder, launcher, change, *settings):
    """Start train.py on the demo after `change`. Return its process, with a pipe of what it
    prints."""
    script = folder / "changed.py"
    repository = str(Path(train.__file__).parent)
    script.write_text(CHANGED.format(repository=repository, change=change))
    command = [*launcher, str(script), f"RUN_DIR={folder}/run", f"CACHE_DIR={folder}/cache",
               "SAVE_EVERY=-1", "SAMPLE_PROMPTS=[]", *settings]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(folder, n, process):
    metrics = folder / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < n:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sp", [1, 2])
def test_a_stopped_rank_is_named(tmp_path, sp):
    """Rank 0 may wait for its GPU, or on the CPU. Before, no rank is taken for stuck."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # To compile for rows of another length can take longer than the short time-outs.
    process = start_changed(tmp_path, launcher, SHORT_TIMES, f"SEQUENCE_PARALLEL_SIZE={sp}",
                            "MAX_STEPS=1000000", "MAX_LENGTH=2048", "COMPILE=False")
    wait_for_steps(tmp_path, 5, process)
    time.sleep(25)  # longer than the time-outs
    assert process.poll() is None, process.communicate()[0]
    stopped = int((tmp_path / "pid-1").read_text())
    os.kill(stopped, signal.SIGSTOP)
    printed, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "rank 1 does not answer: it is stuck or gone" in printed
    assert "rank 0 waited for others at " in printed


def test_out_of_memory_tells_what_to_take(tmp_path):
    process = start_changed(tmp_path, [sys.executable], LITTLE_MEMORY, "MAX_STEPS=2",
                            "MAX_LENGTH=65536", "MAX_POSITION_EMBEDDINGS=65536", "RECOMPUTE=none")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert printed.count("The expected peak was ") == 1
    assert "The next settings to take are SEQUENCE_PARALLEL_SIZE=1 RECOMPUTE=" in printed
