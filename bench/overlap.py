"""Does it pay to hide Ulysses' exchange behind attention? Heads in two halves, one on its way while the other attends.

    torchrun --nproc_per_node 4 bench/overlap.py SHAPE=llama2-7b SEQUENCE_PARALLEL_SIZE=4 MAX_LENGTH=32768 \\
        RECOMPUTE=none MAX_STEPS=12
    torchrun --nproc_per_node 4 bench/breakdown.py ...      the same without, to compare

Loss and gradients are those of the plain exchange. What it measured stands in LOG.md."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import breakdown
import torch
import torch.distributed as dist

from model import Attention, attention_kernel, cut_heads, rotate

def send(x, group):
    """x (P, ...): part i is on its way to rank i. -> what will arrive, and the work to wait for."""
    out = torch.empty_like(x := x.contiguous())
    return out, dist.all_to_all_single(out, x, group=group, async_op=True)

class Start(torch.autograd.Function):
    """Sends without waiting; backward waits for what Finish's backward sent."""
    @staticmethod
    def forward(ctx, x, way):
        ctx.way = way
        out, way["there"] = send(x, way["group"])
        return out

    @staticmethod
    def backward(ctx, grad):
        ctx.way.pop("back").wait()     # pop: it holds its tensors, and these the graph, and that the way
        return grad, None

class Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, way):
        ctx.way = way
        way.pop("there").wait()
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        out, ctx.way["back"] = send(grad, ctx.way["group"])
        return out, None

def project(self, x, cos, sin):
    """x (t, C) -> (2, P, t, (H/P + 2 G/P) / 2, D): of every rank's heads the first and the second half."""
    q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
    q, k = (rotate(y, cos, sin, self.interleaved) for y in (q, k))
    half = lambda y, i: y.unflatten(1, (self.P, 2, -1))[:, :, i].flatten(1, 2)
    return torch.stack([cut_heads([half(y, i) for y in (q, k, v)], self.P) for i in (0, 1)])

def forward(self, qkv, cu_seqlens, max_seqlen, keep):
    _, kernel = attention_kernel(self.choice, qkv.device.type, qkv.dtype)
    ways = [{"group": self.sp_group} for _ in range(4)]
    rows = [Start.apply(x, way) for x, way in zip(qkv, ways)]
    outs = []
    for row, there, back in zip(rows, ways[:2], ways[2:]):
        row = Finish.apply(row, there).flatten(0, 1)                                # (T, (H/P + 2 G/P) / 2, D)
        q, k, v = row.split([heads // 2 for heads in self.heads], dim=1)
        out = kernel(q, k, v, cu_seqlens, max_seqlen, self.window)                  # (T, H/P/2, D)
        outs.append(Start.apply(out.unflatten(0, (self.P, -1)), back))
    outs = [Finish.apply(out, way) for out, way in zip(outs, ways[2:])]             # (P, t, H/P/2, D)
    return torch.stack(outs, dim=2).transpose(0, 1).flatten(1)                      # (t, H*D)

if __name__ == "__main__":
    Attention.project, Attention.forward = project, forward
    breakdown.main(sys.argv[1:])
