"""What only a GPU can run: attention packages, compiled halves, offloading on a side stream. bfloat16 throughout, so
the yardstick is the plain way's own error against float32: a faster way may err at most half as much again."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import row, tiny_model

import train
from model import KERNELS, Execution, attention_kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
WIDE = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
            num_hidden_layers=3, vocab_size=1000)

def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()

def attend(kernel, dtype, window):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, weight = (torch.randn(1500, heads, 64, device="cuda", generator=generator).bfloat16()
                       for heads in (8, 2, 2, 8))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    cu_seqlens = torch.tensor([0, 1, 700, 1500], dtype=torch.int32, device="cuda")
    out = kernel(q, k, v, cu_seqlens, 800, window)
    out.backward(weight.to(dtype))
    return [out.detach(), q.grad, k.grad, v.grad]

@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", [k for k in KERNELS if k != "sdpa"])
def test_attention_packages_agree(name, window):
    try:
        _, kernel = attention_kernel(name, "cuda", torch.bfloat16)
    except ValueError as e:
        pytest.skip(str(e))
    truth = attend(attention_kernel("sdpa", "cuda", torch.float32)[1], torch.float32, window)
    plain = attend(attention_kernel("sdpa", "cuda", torch.bfloat16)[1], torch.bfloat16, window)
    for what, t, p, a in zip(("out", "dq", "dk", "dv"), truth, plain, attend(kernel, torch.bfloat16, window)):
        assert error(a, t) < 1.5 * error(p, t) + 1e-4, f"{what}: {error(a, t)}, plain {error(p, t)}"

def gradients(execution, dtype=torch.bfloat16):
    model = tiny_model(execution=execution, **WIDE).to("cuda", dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p / 4 if p.ndim > 1 else p)
    ids, positions, cu_seqlens, max_seqlen, labels = (
        x.cuda() if torch.is_tensor(x) else x for x in row([700, 1, 323], vocab_size=1000, masked=0.2))
    loss = [model(ids, positions, cu_seqlens, max_seqlen, labels) for _ in range(2)][1] / 1000
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}

EXECUTIONS = [Execution(recompute="all_but_attention"), Execution(recompute="all"), Execution(compile=True),
              Execution(recompute="all_but_attention", compile=True), Execution(recompute="all", compile=True),
              Execution(recompute="all_but_attention", compile=True, offload_layers=9, mlp_chunk=256, loss_chunk=300),
              Execution(recompute="all_but_attention", compile=True, keep_layers=1, attention="torch_varlen")]

@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_executions_agree(execution):
    true_loss, truth = gradients(Execution(), torch.float32)
    plain_loss, plain = gradients(Execution(attention="sdpa"))
    loss, found = gradients(execution)
    assert abs(loss - true_loss) < 1.5 * abs(plain_loss - true_loss) + 1e-3 * true_loss
    for name in truth:
        e, allowed = error(found[name], truth[name]), error(plain[name], truth[name])
        assert e < 1.5 * allowed + 1e-3, f"gradient of {name}: {e}, plain {allowed}"

def losses(folder, name, *settings):
    """Of four steps of the demo, by train.py."""
    command = [sys.executable, str(Path(train.__file__)), f"RUN_DIR={folder}/{name}", f"CACHE_DIR={folder}/cache",
               "SAVE_EVERY=-1", "MAX_STEPS=4", "MAX_LENGTH=512", "SAMPLE_PROMPTS=[]", "WARMUP_RATIO=0.0",
               "LEARNING_RATE=1e-3", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])

SETTINGS = [("OFFLOAD_OPTIMIZER=True",), ("RECOMPUTE=all", "ZERO_STAGE=3", "OFFLOAD_ACTIVATIONS=True"),
            ("RECOMPUTE=none", "ZERO_STAGE=1"), ("COMPILE=False", "ATTENTION=torch_varlen"),
            ("OFFLOAD_ACTIVATIONS=1", "MLP_CHUNK=100", "LOSS_CHUNK=100", "KEEP_LAYERS=1")]

def test_training_agrees(tmp_path):
    """Through FSDP2, the optimizer and the data, whatever is recomputed, moved or cut: bfloat16's error, no more."""
    truth, plain = losses(tmp_path, "float32", "DTYPE=float32"), losses(tmp_path, "plain")
    allowed = 2 * (plain - truth).abs().max(0).values + 2e-3 * truth.abs().max(0).values
    for i, settings in enumerate(SETTINGS):
        found = losses(tmp_path, f"run{i}", *settings)
        assert ((found - truth).abs() <= allowed).all(), f"{settings}: {found.tolist()}, float32 {truth.tolist()}"
