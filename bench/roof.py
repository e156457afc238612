"""The roof of a step on one GPU: its matrix products and attention kernels alone, at the rates they reach here.

    python bench/roof.py "llama3.2-3b 1 8192" "llama2-7b 4 131072" ...        shape, GPUs of the sequence, tokens

Matrix products of a block and the head run with t = T/P tokens in bfloat16, forward and both of backward; attention
with H/P heads over T tokens. Two roofs: nothing recomputed, and all but attention (q, k, v, o, gate, up once more)."""
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import torch
from run import HERE, SHAPES

from model import attention_kernel

PEAK = 989e12

def seconds(function, least=0.25):
    """Median-free and simple: warm up, then as many calls as fill `least` seconds, between two events."""
    function(), function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    calls = 1
    while True:
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        took = start.elapsed_time(end) / 1e3
        if took > least:
            return took / calls
        calls *= 4

def product(t, n, m):
    """Seconds of (t, n) @ (n, m): forward, and its two gradients."""
    x, w, y = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((t, n), (m, n), (t, m)))
    return seconds(lambda: x @ w.T), seconds(lambda: y @ w) + seconds(lambda: y.T @ x)

def roof(row):
    shape, gpus, length = row.split()
    P, T = int(gpus), int(length)
    L, C, H, G, I, V, _ = SHAPES[shape]
    D, t = 128, T // P
    name, kernel = attention_kernel("auto", "cuda", torch.bfloat16)
    sizes = [(C, H * D, 1), (C, G * D, 2), (H * D, C, 1), (C, I, 2), (I, C, 1)]
    forward = backward = again = 0.0
    for n, m, count in sizes:
        f, b = product(min(t, 32768), n, m)
        f, b = (count * s * t / min(t, 32768) for s in (f, b))
        forward, backward, again = forward + f, backward + b, again + (0 if (n, m) == (I, C) else f)
    head_f, head_b = (s * t / 8192 for s in product(8192, C, V))
    g = max(G // P, 1)
    q, k, v = (torch.randn(T, h, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (H // P, g, g))
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device="cuda")
    attend_f = seconds(lambda: kernel(q, k, v, cu_seqlens, T, None))
    out = kernel(q, k, v, cu_seqlens, T, None)
    grad = torch.randn_like(out)
    attend_b = seconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    block = C * D * (2 * H + 2 * G) + 3 * C * I
    attention = 4 * H // P * D * T * T / 2
    work = 3 * (2 * t * (L * block + C * V) + L * attention)
    time = L * (forward + backward + attend_f + attend_b) + head_f + head_b
    result = {"roof": row, "attention": name, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
              "products_tflops": 6 * t * block / (forward + backward) / 1e12,
              "attention_forward_tflops": attention / attend_f / 1e12,
              "attention_backward_tflops": 2.5 * attention / attend_b / 1e12,
              "mfu_none": work / time / PEAK, "mfu_all_but_attention": work / (time + L * again) / PEAK}
    print(f"{row}: products {result['products_tflops']:.0f}, attention {result['attention_forward_tflops']:.0f} / "
          f"{result['attention_backward_tflops']:.0f} TFLOP/s ({name}); roof {result['mfu_none']:.1%} without "
          f"recompute, {result['mfu_all_but_attention']:.1%} with", flush=True)
    for folder in filter(None, (HERE, os.environ.get("OUT"))):
        with open(Path(folder) / "roofs.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")

if __name__ == "__main__":
    for row in sys.argv[1:]:
        roof(row)
