"""Measure the roof of a step on one GPU: its matrix products and attention kernels alone.

    python bench/roof.py "llama3.2-3b 1 8192" "llama2-7b 4 131072" ...

Each argument is a model shape, the number of GPUs P that share the sequence, and its length T. One
GPU then has the matrix products of T/P tokens and the attention of H/P heads over all T tokens.
Each kernel runs alone, back to back, in bfloat16, forward and backward.

A line of roofs.jsonl holds the rates reached and the MFU of a step that takes exactly that long.
"mfu_none" recomputes nothing; "mfu_all_but_attention" recomputes the products of q, k, v, o, gate
and up.
"""
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.run import HEAD_DIM, HERE, PEAK, SHAPES, append_line, block_parameters, parse_settings
from model import attention_kernel

# Products of more tokens are measured on this many and scaled. Their rate no longer depends on the
# number of tokens, and the logits of a long sequence would not fit in memory.
BLOCK_TOKENS = 32768
HEAD_TOKENS = 8192


class Product(NamedTuple):
    """A linear layer of a block."""
    inputs: int
    outputs: int
    count: int          # how many of this size a block has
    recomputed: bool    # with recompute, backward runs its forward once more


def random_tensor(*shape, requires_grad=False):
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": requires_grad}
    return torch.randn(*shape, **options)


def time_call(function, minimum=0.25):
    """Return the mean seconds of a call, over as many calls as take `minimum` seconds."""
    # The first calls compile, choose an algorithm and allocate memory.
    function()
    function()

    # Events measure on the GPU, so that the time to launch kernels is not included.
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    calls = 1
    while True:
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        elapsed = start.elapsed_time(end) / 1e3  # elapsed_time is in milliseconds
        if elapsed > minimum:
            return elapsed / calls
        calls *= 4


def time_product(tokens, inputs, outputs):
    """Return the seconds of a linear layer: forward, and both products of backward together."""
    x = random_tensor(tokens, inputs)
    weight = random_tensor(outputs, inputs)
    grad = random_tensor(tokens, outputs)
    forward = time_call(lambda: x @ weight.T)
    backward_input = time_call(lambda: grad @ weight)
    backward_weight = time_call(lambda: grad.T @ x)
    return forward, backward_input + backward_weight


def time_block(shape, tokens):
    """Return the seconds of a block's products: forward, backward, and what is recomputed."""
    C = shape.width
    I = shape.inner
    products = [
        Product(C, shape.heads * HEAD_DIM, 1, True),        # q
        Product(C, shape.kv_heads * HEAD_DIM, 2, True),     # k, v
        Product(shape.heads * HEAD_DIM, C, 1, True),        # o
        Product(C, I, 2, True),                             # gate, up
        Product(I, C, 1, False),                            # down; backward never reads its result
    ]
    measured_tokens = min(tokens, BLOCK_TOKENS)
    forward = 0.0
    backward = 0.0
    recomputed = 0.0
    for product in products:
        seconds = time_product(measured_tokens, product.inputs, product.outputs)
        product_forward, product_backward = seconds
        scale = product.count * tokens / measured_tokens
        forward += scale * product_forward
        backward += scale * product_backward
        if product.recomputed:
            recomputed += scale * product_forward
    return forward, backward, recomputed


def time_head(shape, tokens):
    """Return the seconds of the output head's product, forward and backward."""
    forward, backward = time_product(HEAD_TOKENS, shape.width, shape.vocabulary)
    scale = tokens / HEAD_TOKENS
    return scale * forward, scale * backward


def time_attention(kernel, heads, kv_heads, tokens):
    """Return the seconds of an attention kernel on one causal document, forward and backward."""
    q = random_tensor(tokens, heads, HEAD_DIM, requires_grad=True)
    k = random_tensor(tokens, kv_heads, HEAD_DIM, requires_grad=True)
    v = random_tensor(tokens, kv_heads, HEAD_DIM, requires_grad=True)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    forward = time_call(lambda: kernel(q, k, v, cu_seqlens, tokens, None))

    out = kernel(q, k, v, cu_seqlens, tokens, None)  # (T, heads, D)
    grad = torch.randn_like(out)
    backward = time_call(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    return forward, backward


def roof(row):
    """Measure one row and append the result to roofs.jsonl."""
    settings = parse_settings(row)
    shape = SHAPES[settings.shape]
    L = shape.layers
    P = settings.gpus
    T = settings.tokens
    t = T // P
    heads = shape.heads // P
    kv_heads = max(shape.kv_heads // P, 1)  # fewer key/value heads than ranks are replicated

    # Seconds of a step on one GPU
    kernel_name, kernel = attention_kernel("auto", "cuda", torch.bfloat16)
    block_forward, block_backward, block_recomputed = time_block(shape, t)
    head_forward, head_backward = time_head(shape, t)
    attention_forward, attention_backward = time_attention(kernel, heads, kv_heads, T)
    block_seconds = block_forward + block_backward + attention_forward + attention_backward
    step_seconds = L * block_seconds + head_forward + head_backward
    recompute_seconds = L * block_recomputed

    # Model FLOPs of a step on one GPU: 3 times forward, as every product has two in backward
    parameters = block_parameters(shape)
    head_parameters = shape.width * shape.vocabulary
    attention = 4 * heads * HEAD_DIM * T * T / 2
    step_flops = 3 * (2 * t * (L * parameters + head_parameters) + L * attention)

    # The kernel's backward does 2.5 times the work of its forward: it computes the scores again.
    result = {
        "roof": row,
        "attention": kernel_name,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "products_tflops": 6 * t * parameters / (block_forward + block_backward) / 1e12,
        "attention_forward_tflops": attention / attention_forward / 1e12,
        "attention_backward_tflops": 2.5 * attention / attention_backward / 1e12,
        "mfu_none": step_flops / step_seconds / PEAK,
        "mfu_all_but_attention": step_flops / (step_seconds + recompute_seconds) / PEAK,
    }
    append_line(HERE / "roofs.jsonl", result)
    out = os.environ.get("OUT")
    if out:
        append_line(Path(out) / "roofs.jsonl", result)
    print(describe(result), flush=True)


def describe(result):
    """Return a line for the screen."""
    return (
        f"{result['roof']}: products {result['products_tflops']:.0f},"
        f" attention {result['attention_forward_tflops']:.0f} /"
        f" {result['attention_backward_tflops']:.0f} TFLOP/s ({result['attention']});"
        f" roof {result['mfu_none']:.1%} without recompute,"
        f" {result['mfu_all_but_attention']:.1%} with"
    )


if __name__ == "__main__":
    for row in sys.argv[1:]:
        roof(row)
