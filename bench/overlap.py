"""Measure whether it pays to overlap the all-to-all of Ulysses with attention. See LOG.md.

    torchrun --nproc_per_node 4 bench/overlap.py SHAPE=llama2-7b MAX_LENGTH=32768 \\
        SEQUENCE_PARALLEL_SIZE=4 RECOMPUTE=none MAX_STEPS=12

The heads of a rank are divided into two halves. While one half attends, the other is exchanged.
Loss and gradients are those of train.py. The report is that of bench/breakdown.py, which the same
arguments run without overlap. RECOMPUTE must be none, and every rank needs an even number of
key/value heads.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import breakdown
from model import Attention, attention_kernel, rotate
from parallel import split_heads_by_rank


class Exchange:
    """One all-to-all and its backward. Start and Finish below begin it and wait for it."""

    def __init__(self, group):
        self.group = group
        self.work = None

    def start(self, x):
        """Start to send part i of x (P, ...) to rank i. The result is valid after finish()."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self.work = dist.all_to_all_single(out, x, group=self.group, async_op=True)
        return out

    def finish(self):
        self.work.wait()
        # The work holds its tensors and they the graph, which holds this object: break the cycle.
        self.work = None


class Start(torch.autograd.Function):
    """Start the exchange in forward. Backward waits for the one that Finish has started."""

    @staticmethod
    def forward(ctx, x, exchange):
        ctx.exchange = exchange
        return exchange.start(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.exchange.finish()
        return grad, None


class Finish(torch.autograd.Function):
    """Wait for the exchange in forward. Backward starts that of the gradient."""

    @staticmethod
    def forward(ctx, x, exchange):
        ctx.exchange = exchange
        exchange.finish()
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return ctx.exchange.start(grad), None


def half_of_heads(x, P, half):
    """Of x (t, H, D), the first (half 0) or second (half 1) half of the heads of every rank."""
    x = x.unflatten(1, (P, 2, -1))                                  # (t, P, 2, H/P/2, D)
    return x[:, :, half].flatten(1, 2)                              # (t, H/2, D)


def project(self, x, cos, sin):
    """Replaces Attention.project. x (t, C) -> (2, P, t, (H/P + 2 G/P) / 2, D), the two halves."""
    q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))           # (t, H, D)
    k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))           # (t, G, D)
    v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))           # (t, G, D)
    q = rotate(q, cos, sin, self.interleaved)
    k = rotate(k, cos, sin, self.interleaved)
    halves = []
    for half in (0, 1):
        parts = [half_of_heads(tensor, self.P, half) for tensor in (q, k, v)]
        halves.append(split_heads_by_rank(parts, self.P))           # (P, t, (H/P + 2 G/P) / 2, D)
    return torch.stack(halves)


def forward(self, qkv, cu_seqlens, max_seqlen, recompute=None):
    """Replaces Attention.forward. qkv as project returns it -> (t, H*D)."""
    _, kernel = attention_kernel(self.kernel_choice, qkv.device.type, qkv.dtype)
    heads = (self.q_heads // 2, self.kv_heads // 2, self.kv_heads // 2)  # q, k, v of one half

    # Both halves leave at once. The second is under way while the first attends.
    incoming = [Exchange(self.sp_group), Exchange(self.sp_group)]
    outgoing = [Exchange(self.sp_group), Exchange(self.sp_group)]
    arriving = [Start.apply(qkv[half], incoming[half]) for half in (0, 1)]

    leaving = []
    for half in (0, 1):
        row = Finish.apply(arriving[half], incoming[half])          # (P, t, (H/P + 2 G/P) / 2, D)
        q, k, v = row.flatten(0, 1).split(heads, dim=1)             # (T, H/P/2, D), (T, G/P/2, D)
        out = kernel(q, k, v, cu_seqlens, max_seqlen, self.window)  # (T, H/P/2, D)
        out = out.unflatten(0, (self.P, -1))                        # (P, t, H/P/2, D)
        leaving.append(Start.apply(out, outgoing[half]))

    outs = [Finish.apply(leaving[half], outgoing[half]) for half in (0, 1)]
    out = torch.stack(outs, dim=2)                                  # (P, t, 2, H/P/2, D)
    return out.transpose(0, 1).flatten(1)                           # (t, H*D)


if __name__ == "__main__":
    Attention.project = project
    Attention.forward = forward
    breakdown.main(sys.argv[1:])
