"""The rank grid, the exchange of sequence parallelism, FSDP2 and checkpoints.

Eight GPUs with REPLICAS = 1 and SEQUENCE_PARALLEL_SIZE = 4, hence dp = 2:

    rank       0  1  2  3 | 4  5  6  7
    dp_rank    0  0  0  0 | 1  1  1  1      which rows of a step: each dp group has its own
    sp_rank    0  1  2  3 | 0  1  2  3      which shard of the row

    ranks 0-3 hold one row:     [ shard 0 | shard 1 | shard 2 | shard 3 ]
    ranks 4-7 hold another:     [ shard 0 | shard 1 | shard 2 | shard 3 ]

Parameters, gradients and optimizer states are sharded over all eight ranks. With REPLICAS = 2,
ranks 0-3 and ranks 4-7 each hold one whole copy, and gradients are summed between the copies.

In this order: the grid, the exchange, FSDP2 and the sums of gradients, checkpoints; then how
processes start, and how ranks that differ, are stuck or gone are named.
"""
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import threading
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from tqdm import tqdm

from one_rank import CastWeights, runs_without_fsdp
from recompute import pin

# The name in torch 2.13, or the one before.
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# -------------------------------------------------------------------------------------------- ranks

class Grid(NamedTuple):
    """The place of this process in the rank grid."""
    rank: int
    world: int
    dp: int                 # rows that are processed at the same time, in all replicas
    dp_rank: int
    sp: int                 # ranks that share a row
    sp_rank: int
    sp_group: object        # process group of those ranks; None if sp is 1
    mesh: object            # DeviceMesh for FSDP2: (shard,) or (replicate, shard)
    device: torch.device


def sequence_parallel_sizes(world, heads, kv_heads):
    """Return the sizes that work with so many processes and heads, the smallest first."""
    sizes = []
    for p in range(1, world + 1):
        # Key/value heads are split, or replicated to exactly one a rank.
        fits_kv_heads = kv_heads % p == 0 or p % kv_heads == 0
        if heads % p == 0 and fits_kv_heads and world % p == 0:
            sizes.append(p)
    return sizes


def data_parallel_size(world, replicas, sp, heads, kv_heads):
    """Return dp: rows that are processed at the same time.

    ValueError if the sizes do not fit together, naming those that do. Needs no process group."""
    if world % replicas != 0:
        raise ValueError(
            f"REPLICAS {replicas} does not divide {world} processes: use a divisor of {world}")
    of_replica = world // replicas
    processes = f"{world} processes" if replicas == 1 else f"{of_replica} processes of a replica"
    rules = {
        f"divide {heads} attention heads": heads % sp == 0,
        f"fit {kv_heads} key/value heads": kv_heads % sp == 0 or sp % kv_heads == 0,
        f"divide {processes}": of_replica % sp == 0,
    }
    for rule, holds in rules.items():
        if not holds:
            works = [str(p) for p in sequence_parallel_sizes(of_replica, heads, kv_heads)]
            raise ValueError(f"SEQUENCE_PARALLEL_SIZE {sp} does not {rule}: use {', '.join(works)}")
    return world // sp


def init(replicas, sp, agreed=None):
    """Join the process group that torchrun or srun describes, or form one of a single process.

    agreed: a dict of what has to be equal on all ranks. ValueError names what differs. Return the
    Grid."""
    local_world = local_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_world > gpus:
            raise ValueError(f"{local_world} processes on a host of {gpus} GPUs: "
                             f"start it with torchrun --nproc_per_node {gpus}, or with srun "
                             "--gpus-per-node, as --gpus-per-task hides the other GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"

    if not dist.is_initialized():
        store = dist.HashStore()
        if "RANK" in os.environ:
            store = store_of_attempt()
        dist.init_process_group(
            backend, timeout=START_TIMEOUT, rank=int(os.environ.get("RANK", 0)),
            world_size=world_size(), store=store)
    rank = dist.get_rank()
    world = dist.get_world_size()
    # The meshes below are collectives, which hang if the ranks do not agree on their sizes.
    refuse_differences(agreed or {})

    rows_and_shards = init_device_mesh(device.type, (world // sp, sp), mesh_dim_names=("dp", "sp"))
    sp_group = rows_and_shards["sp"].get_group() if sp > 1 else None
    mesh = init_device_mesh(
        device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    if replicas == 1:
        mesh = mesh["shard"]
    return Grid(rank, world, world // sp, rank // sp, sp, rank % sp, sp_group, mesh, device)


def close():
    """Wait for all ranks, then leave the process group."""
    dist.barrier()
    dist.destroy_process_group()


def all_sum(values, group=None):
    """Sum a tensor over all ranks, or those of the group, in place. Return the same tensor."""
    dist.all_reduce(values, group=group)
    return values


def any_rank(flag):
    """Return whether `flag` is true on any rank. The exchange runs on the CPU."""
    votes = torch.tensor(int(flag))
    return all_sum(votes).item() > 0


def run_on_ranks(what, function, *args, only=None, group=None):
    """Call function(*args) on every rank, or on rank `only`. Return a list of the results of all
    ranks.

    If it fails on any rank, all raise RuntimeError, so that none waits for one that stopped.
    what: the beginning of that error's message."""
    rank = dist.get_rank()
    result = None
    error = None
    message = None
    try:
        if only is None or only == rank:
            result = function(*args)
    except (Exception, dcp.api.CheckpointException) as e:  # the latter is a BaseException
        error = e
        kind = "" if type(e) is ValueError else f"{type(e).__name__}: "
        message = f"rank {rank}: {kind}{e}"

    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, message), group=group)
    for _, failure in outcomes:
        if failure is not None:
            raise RuntimeError(f"{what}: {failure}") from error
    return [result for result, _ in outcomes]


def progress(items, description):
    """Yield the items. The first rank shows a bar meanwhile, if it writes to a terminal."""
    others = dist.is_initialized() and dist.get_rank() > 0
    hidden = True if others else None  # None: shown on a terminal only
    return tqdm(items, desc=description, disable=hidden, leave=False)


# --------------------------------------------------- the exchange of sequence parallelism (Ulysses)

class AllToAll(torch.autograd.Function):
    """Sends parts of x, along dimension 0, to all ranks: send[i] entries to rank i, in this order.

    Of the result, receive[i] entries are from rank i.

    The exchange is its own transpose: backward returns the gradients of what was received."""

    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.send = send
        ctx.receive = receive
        ctx.group = group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x, receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad_x = AllToAll.apply(grad.contiguous(), ctx.receive, ctx.send, ctx.group)
        return grad_x, None, None, None


def split_heads_by_rank(tensors, P):
    """Tensors (t, H, D), such as q, k, v -> (P, t, sum of their H/P, D): element i is for rank i.

    With fewer heads than ranks, P/H ranks get the same head, and autograd sums their gradients."""
    parts = []
    for x in tensors:
        heads = x.shape[1]
        if heads < P:
            x = x.repeat_interleave(P // heads, dim=1)                          # (t, P, D)
        parts.append(x.unflatten(1, (P, -1)).transpose(0, 1))                   # (P, t, H/P, D)
    return torch.cat(parts, dim=2)


def seq_to_heads(x, group, tokens=None):
    """x (n, H, D), all heads of this rank's n tokens -> (N, H/P, D), its heads of all N tokens.

    tokens: how many tokens each rank brings; None: all as many as this one, so that N = P n.
    x may also be what split_heads_by_rank returned. The group None is the identity."""
    if group is None:
        return x
    P = dist.get_world_size(group)
    if x.ndim == 3:
        x = split_heads_by_rank([x], P)                                         # (P, n, H/P, D)
    n = x.shape[1]
    if tokens is None:
        tokens = [n] * P
    return AllToAll.apply(x.flatten(0, 1), [n] * P, tokens, group)              # (N, H/P, D)


def heads_to_seq(x, group, tokens=None):
    """The inverse of seq_to_heads: x (N, H/P, D) -> (n, H, D)."""
    if group is None:
        return x
    P = dist.get_world_size(group)
    if tokens is None:
        tokens = [len(x) // P] * P
    n = tokens[dist.get_rank(group)]
    out = AllToAll.apply(x.contiguous(), tokens, [n] * P, group)                # (P n, H/P, D)
    out = out.view(P, n, *x.shape[1:])                                          # (P, n, H/P, D)
    return out.transpose(0, 1).flatten(1, 2)                                    # (n, H, D)


class Segments(NamedTuple):
    """The documents of a row, as the attention of one rank sees them.

    A document inside one shard of the row is local: its rank attends in it, with all heads. A
    document that crosses a border between shards is exchanged: every rank gets all of its tokens,
    for some of the heads. The tokens of a shard are, in this order:

        [ end of a crossing document | local documents | beginning of a crossing document ]

    Each of the three may be missing. A shard in the middle of a long document is all crossing.
    """
    local: slice                            # the tokens of local documents in this rank's shard
    local_cu_seqlens: torch.Tensor          # (local documents + 1,) int32 on the device, from 0
    local_max_seqlen: int
    crossing_tokens: list                   # [r]: tokens of crossing documents in shard r
    crossing_cu_seqlens: torch.Tensor       # (crossing documents + 1,), the same
    crossing_max_seqlen: int
    any_local: bool                         # on this rank
    any_crossing: bool                      # in the row
    all_crossing: bool                      # in the row, as when it is one document

    def divide(self, x):
        """x (t, ...), the tokens of this rank -> [local ones (t - n, ...), crossing ones (n, ...)].

        The first is left out if this rank has no local document, the other if no document of the
        row crosses. Backward of `split` writes the gradient once; that of a slice would first fill a
        whole tensor with zeros."""
        if not (self.any_local and self.any_crossing):
            return [x]
        lengths = (self.local.start, self.local.stop - self.local.start, len(x) - self.local.stop)
        before, local, after = x.split(lengths)
        return [local, torch.cat((before, after))]

    def join(self, parts):
        """The inverse of `divide` -> (t, ...)."""
        if len(parts) == 1:
            return parts[0]
        local, crossing = parts
        before = self.local.start
        return torch.cat((crossing[:before], local, crossing[before:]))


def copy_without_waiting(tensor, device):
    """Return the tensor on `device`. From pinned memory, a copy to a GPU does not wait for the
    GPU."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def segments_of_rank(cu_seqlens, group, device):
    """cu_seqlens (d+1,): the borders of all documents of a row -> Segments.

    cu_seqlens should be a list of ints, or a tensor on the CPU: a GPU has to be waited for."""
    if group is None:
        P = 1
        rank = 0
    else:
        P = dist.get_world_size(group)
        rank = dist.get_rank(group)
    edges = cu_seqlens.tolist() if torch.is_tensor(cu_seqlens) else cu_seqlens

    t = edges[-1] // P
    local_lengths = []          # of documents in this rank's shard
    local_start = 0
    crossing_lengths = []
    crossing_tokens = [0] * P
    for start, end in zip(edges, edges[1:]):
        first_rank = start // t
        last_rank = (end - 1) // t
        if first_rank < last_rank:
            crossing_lengths.append(end - start)
            for r in range(first_rank, last_rank + 1):
                crossing_tokens[r] += min(end, (r + 1) * t) - max(start, r * t)
        elif first_rank == rank:
            if not local_lengths:
                local_start = start - rank * t
            local_lengths.append(end - start)

    def cu_seqlens_of(lengths):
        return copy_without_waiting(torch.tensor([0, *lengths]).cumsum(0).int(), device)

    return Segments(
        local=slice(local_start, local_start + sum(local_lengths)),
        local_cu_seqlens=cu_seqlens_of(local_lengths),
        local_max_seqlen=max(local_lengths, default=0),
        crossing_tokens=crossing_tokens,
        crossing_cu_seqlens=cu_seqlens_of(crossing_lengths),
        crossing_max_seqlen=max(crossing_lengths, default=0),
        any_local=len(local_lengths) > 0,
        any_crossing=len(crossing_lengths) > 0,
        all_crossing=sum(crossing_lengths) == edges[-1])


# ------------------------------------------------------------------------------------------- FSDP2

class ReduceScatter:
    """The reduce-scatter of FSDP2's gradients, whose memory is that of the main stream.

    FSDP2 runs it on a stream of its own and would allocate the result there. The allocator keeps the
    memory of streams apart, so activations could never use the memory that gradients take later."""

    def allocate(self, size, *, dtype, device):
        """Return a tensor for the current stream, which has waited for the main one."""
        if device.type == "cpu":
            return torch.empty(size, dtype=dtype, device=device)
        with torch.cuda.stream(torch.cuda.default_stream(device)):
            tensor = torch.empty(size, dtype=dtype, device=device)
        # When it is freed, its memory is not used again before the current stream is done with it.
        tensor.record_stream(torch.cuda.current_stream(device))
        return tensor

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        return reduce_scatter_single(output_tensor, input_tensor, op, group, async_op)


def shard(model, blocks, grid, dtype, zero_stage, offload_optimizer):
    """Shard the float32 parameters over grid.mesh. Forward and backward see them whole, in `dtype`.

    blocks: lists of modules, whose weights are gathered together.
    Gradients are reduced in float32, and summed instead of averaged: the loss is already divided
    by the weights of all targets of the step. On one rank FSDP2 is used only to free weights
    between their uses (ZeRO 3, offload_optimizer), and where nothing is cast; else CastWeights."""
    if dtype != torch.float32 and runs_without_fsdp(grid.world, zero_stage, offload_optimizer):
        model.to_empty(device=grid.device)
        model.cast_weights = CastWeights(model, blocks, dtype, compiled=model.execution.compile)
        return
    # cast_forward_inputs is off because cos, sin and the weights of the targets stay in float32.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = {
        "mesh": grid.mesh,
        "mp_policy": precision,
        "offload_policy": CPUOffloadPolicy() if offload_optimizer else OffloadPolicy(),
    }
    for i, block in enumerate(blocks):
        # Backward starts with the last block, so it stays gathered under ZeRO 3, too.
        is_last = i == len(blocks) - 1
        fully_shard(block, **settings, reshard_after_forward=zero_stage == 3 and not is_last)
    fully_shard(model, **settings, reshard_after_forward=False)

    for module in sharded_modules(model):
        module.set_custom_reduce_scatter(ReduceScatter())
        if grid.world > 1:
            module.set_gradient_divide_factor(1.0)  # the default is the number of ranks
            # NCCL multiplies by the factor while it reduces, at no cost; gloo cannot.
            module.set_force_sum_reduction_for_comms(grid.device.type == "cpu")
    model.to_empty(device="cpu" if offload_optimizer else grid.device)


def cast_weights_of(model):
    """Return the CastWeights that replace FSDP2 for a model, or None."""
    return getattr(model, "cast_weights", None)


def sharded_modules(model):
    """Return the modules whose weights FSDP2 gathers."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_gradient_sync(model, zero_stage, is_last):
    """Call before the forward of each micro-batch; is_last: whether it is the last one of a step.

    Before the last one, ZeRO 1 reduces no gradients, and ZeRO 1 and 2 keep the weights gathered."""
    if cast_weights_of(model) is None:
        model.set_requires_gradient_sync(is_last or zero_stage > 1)
        model.set_reshard_after_backward(is_last or zero_stage > 2)


def free_gathered(model):
    """Free the gathered weights that a forward without a backward has left.

    model.parameters() are the shards again, which are saved and exported."""
    for module in sharded_modules(model):
        module.reshard()
    if cast_weights_of(model) is not None:
        cast_weights_of(model).free()


def grad_norm(parameters):
    """Return the norm of all gradients over all ranks, a float64 scalar on their device.

    On a CPU it is put together from the norms of rows, because there torch's float32 norm of a
    whole matrix loses digits: 2e-3 of it with 28 million elements, against 1e-7 with one row."""
    grads = [p.grad for p in parameters if p.grad is not None]
    shards = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
    if shards[0].is_cuda:
        norms = torch._foreach_norm(shards, dtype=torch.float32)                # few kernels
    else:
        norms = []
        for x in shards:
            row_norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            norms.append(row_norms.reshape(-1))
    square = torch.cat([x.reshape(-1) for x in norms]).double().square().sum()

    if hasattr(grads[0], "device_mesh"):
        mesh = grads[0].device_mesh
        shard_dim = mesh.ndim - 1  # the gradients of replicas are equal: do not sum over them
        all_sum(square, mesh.get_group(shard_dim))
    return square.sqrt()


def local_rows(parameter):
    """Return this rank's rows of a parameter as a plain tensor, and the index of the first of them.

    FSDP2 cuts dimension 0 into equal pieces, rounded up: the last ranks may hold fewer, or none."""
    if not hasattr(parameter, "device_mesh"):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    shard_dim = mesh.ndim - 1
    total = parameter.shape[0]
    piece = -(-total // mesh.shape[shard_dim])
    first = min(piece * mesh.get_local_rank(shard_dim), total)
    return parameter.to_local().detach(), first


# ------------------------------------------------------------------------------------- checkpoints

# The checksums in torch's files take as long as writing them. The manifest has hashes instead.
torch.serialization.set_crc32_options(False)

STEP = "step-" + 8 * "[0-9]"    # names of published checkpoints; nothing else is touched
CHECKPOINT_BYTES = 12           # per parameter: a float32 weight and two float32 moments
PINNED_BYTES = 2**20            # smaller tensors are not worth pinning
SAVE_TIMEOUT = timedelta(minutes=30)    # by which one rank may write its shards later than another
CLOSE_SECONDS = 120.0           # that a failed run waits for its last save
# A thread that saves needs Python's lock for each of many short calls. The main thread would keep
# it for the default of 5 ms each time, and longer while it waits to queue another kernel.
SWITCH_SECONDS = 1e-4
HASHED_BYTES = 2**24            # of a file per read while hashing, for the same reason
CONTAINER = Path("/sys/fs/cgroup")  # where Linux tells what the container of a process may use


def published(root):
    """Return the folders of all complete checkpoints, the first step first.

    OSError if they cannot be listed, of which Path.glob says nothing: they may be there."""
    root = Path(root)
    if not os.path.lexists(root):
        return []
    return sorted(root / name for name in os.listdir(root) if re.fullmatch(STEP, name))


def save_checkpoint(root, step, model, optimizer, record, keep):
    """Write root/step-00000100: every rank its shards, then a manifest of sizes, hashes, `record`.

    The folder gets its name last, by a rename, so a folder with this name is complete. A step that
    is already published stays as it is. Only the newest `keep` checkpoints stay; -1: all of them.
    RuntimeError on all ranks if any of them cannot write; earlier checkpoints are intact then."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    write_checkpoint(root, step, state, record, keep)


def write_checkpoint(root, step, state, record, keep, group=None):
    """Write and publish the checkpoint of `state`. The collectives are those of `group`."""
    folder = Path(root) / f"step-{step:08d}"
    partial = folder.with_suffix(".part")
    rank = dist.get_rank()

    def prepare():
        remove_leftovers(folder.parent)
        partial.mkdir(parents=True)

    def write():
        # A writer that copies ahead waits for all that training has queued on the GPU before it
        # writes the next tensors, even if they are in CPU memory. One of several threads does not,
        # but if one of them fails, torch says nothing and the checkpoint lacks its tensors.
        writer = dcp.FileSystemWriter(partial, per_thread_copy_ahead=0)
        dcp.save(state, storage_writer=writer, process_group=group)
        written = list(partial.glob(f"__{rank}_*"))
        if rank == 0:
            written.append(partial / ".metadata")
        return {file.name: [file.stat().st_size, file_hash(file)] for file in written}

    def publish(files_of_ranks):
        files = {}
        for files_of_rank in files_of_ranks:
            files.update(files_of_rank)
        manifest = {**record, "step": step, "files": files}
        manifest["hash"] = manifest_hash(manifest)
        # The contents must be on disk before the name that says they are complete. Each rank has
        # synchronized its shards in dcp.save.
        path = partial / "manifest.json"
        path.write_text(json.dumps(manifest, indent=1))
        fsync(path)
        fsync(partial)
        partial.rename(folder)
        fsync(folder.parent)
        if keep >= 0:
            for old in published(folder.parent)[:-keep]:
                remove_checkpoint(old)

    def attempt(function, *args):
        try:
            return function(*args)
        except (Exception, dcp.api.CheckpointException) as e:
            cause = e
            if isinstance(e, dcp.api.CheckpointException):  # the error of one rank is enough
                cause, _ = next(iter(e.failures.values()))
            free = shutil.disk_usage(folder.parent).free / 2**30
            # torch's writer of files only says that it did not come to some position.
            full = "The disk is full: " if free < 0.1 else ""
            raise OSError(
                f"{full}{cause}. {free:,.1f} GiB are free there. Earlier checkpoints are "
                "intact: free space or make the folder writable, and start again") from e

    already_published = run_on_ranks(f"looking for {folder}", folder.exists, only=0, group=group)[0]
    if already_published:
        return
    run_on_ranks(f"preparing {partial}", attempt, prepare, only=0, group=group)
    files_of_ranks = run_on_ranks(f"saving {partial}", attempt, write, group=group)
    run_on_ranks(f"publishing {folder}", attempt, publish, files_of_ranks, only=0, group=group)


def remove_checkpoint(folder):
    """Remove a checkpoint. If the process is killed meanwhile, no half of it has its name."""
    leftover = folder.with_suffix(".part")
    folder.rename(leftover)
    shutil.rmtree(leftover)


def remove_leftovers(root):
    """Remove what saves have left that did not complete. No save may be in progress."""
    for leftover in Path(root).glob(f"{STEP}.part"):
        shutil.rmtree(leftover)


class Saver:
    """Writes the checkpoints of a run in a thread, while training goes on.

    Training waits only while this rank's shards are copied to CPU memory, and for the previous
    save, if it is not complete. Where CPU memory is short, it waits for the whole save."""

    def __init__(self, root, record):
        self.root = Path(root)
        self.record = record
        self.thread = None
        self.error = None
        # The thread's collectives must not mix with those of training.
        self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.in_foreground = None   # decided by the first save
        self.step = 0               # of the last save that was begun
        self.seconds = 0.0          # that the last complete save took
        self.copies = {}            # name: tensor in CPU memory, which the next save uses again

    def check_space(self, model, keep):
        """RuntimeError on all ranks if the disk has no space for a checkpoint, and no older ones to
        remove for it. Their space counts unless keep is -1."""
        run_on_ranks("checking the space for checkpoints", self.make_space, model, keep, True, only=0)

    def make_space(self, model, keep, check_only=False):
        """Remove checkpoints, but for the newest one, if the disk has no space for another one."""
        self.root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.root)  # they may have filled the disk
        needed = CHECKPOINT_BYTES * sum(p.numel() for p in model.parameters())

        def free():
            return shutil.disk_usage(self.root).free

        removable = published(self.root)[:-1] if keep > 0 else []
        if check_only and removable:
            return
        while free() < needed and removable:
            oldest = removable.pop(0)
            print(f"WARNING: {self.root} has no space for another checkpoint: {oldest.name} is "
                  "removed.", flush=True)
            remove_checkpoint(oldest)
        if free() < needed:
            raise OSError(
                f"{self.root} has {free() / 2**30:,.1f} GiB of free space and a checkpoint takes "
                f"{needed / 2**30:,.1f} GiB, besides the one before it: free space, or set another "
                "RUN_DIR. Earlier checkpoints are intact")

    def save(self, step, model, optimizer, keep):
        """Begin to save a step, see save_checkpoint. RuntimeError if the previous save failed."""
        self.wait()
        folder = self.root / f"step-{step:08d}"
        if run_on_ranks(f"looking for {folder}", folder.exists, only=0)[0]:
            return
        run_on_ranks("making space for a checkpoint", self.make_space, model, keep, only=0)
        self.step = step
        began = time.monotonic()
        if self.in_foreground is None:
            self.in_foreground = self.memory_is_short(model)
        if self.in_foreground:
            save_checkpoint(self.root, step, model, optimizer, self.record, keep)
            self.seconds = time.monotonic() - began
            return
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = self.copy_to_cpu({"model": model_state, "optimizer": optimizer_state})
        if torch.cuda.is_available():
            torch.cuda.synchronize()

        def write():
            interval = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_SECONDS)
            try:
                write_checkpoint(self.root, step, state, self.record, keep, self.group)
                self.seconds = time.monotonic() - began
            except BaseException as e:
                self.error = e
            finally:
                sys.setswitchinterval(interval)

        self.thread = threading.Thread(target=write, daemon=True)
        self.thread.start()

    def memory_is_short(self, model):
        """Return whether the ranks of any host have no CPU memory for a copy of their states.

        What training itself pins is in use by then: it is allocated in the first step."""
        elements = sum(local_rows(p)[0].numel() for p in model.parameters())
        ranks_of_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        needed = CHECKPOINT_BYTES * elements * ranks_of_host
        is_short = any_rank(needed > available_memory())
        if is_short and dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # the terminal may be closed
                print(f"Saving in the background needs {needed / 2**30:,.1f} GiB of CPU memory, "
                      "which is not free: training waits while a checkpoint is written.",
                      flush=True)
        return is_short

    def copy_to_cpu(self, value, name=""):
        """A state, of dicts, lists and tensors -> its copy in CPU memory.

        The first copy of a tensor is pinned, and all later ones use its memory. The caller must
        synchronize with the GPU before it uses the copy."""
        if isinstance(value, dict):
            return {key: self.copy_to_cpu(x, f"{name}/{key}") for key, x in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.copy_to_cpu(x, f"{name}/{i}") for i, x in enumerate(value)]
            return type(value)(items)
        if not torch.is_tensor(value):
            return value
        rows, _ = local_rows(value)
        if name not in self.copies:
            self.copies[name] = torch.empty_like(value, device="cpu", requires_grad=False)
            if value.is_cuda and rows.nbytes >= PINNED_BYTES:
                pin(local_rows(self.copies[name])[0], owner=self.copies[name])
        copy, _ = local_rows(self.copies[name])
        copy.copy_(rows, non_blocking=True)
        return self.copies[name]

    def is_writing(self):
        """Return whether the last save is not complete yet on this rank."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self):
        """Wait until the last save is complete. RuntimeError on all ranks if it failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error

    def close(self):
        """Let the last save complete if training has failed meanwhile on this rank or another.

        The ranks that it needs may be stuck, so this waits for CLOSE_SECONDS at most."""
        if self.thread is not None:
            self.thread.join(CLOSE_SECONDS)


def memory_limit():
    """Return the bytes of CPU memory that the container of this process may use, or infinity."""
    limit = CONTAINER / "memory.max"  # a number or "max"
    if limit.exists() and limit.read_text().strip().isdigit():
        return int(limit.read_text())
    return math.inf


def available_memory():
    """Return the bytes of CPU memory of this host that can be allocated without swapping."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])  # it is in KiB
    limit = memory_limit()
    if limit < math.inf:
        for line in (CONTAINER / "memory.stat").read_text().splitlines():
            if line.startswith("anon "):  # in use, without the files that are cached
                available = min(available, limit - int(line.split()[1]))
    return available


def all_finite(model, optimizer):
    """Return whether all weights and optimizer states are finite, on all ranks."""
    tensors = [local_rows(p)[0] for p in model.parameters()]
    for state in optimizer.state.values():
        tensors += [local_rows(value)[0] for value in state.values() if torch.is_tensor(value)]
    largest = [torch.linalg.vector_norm(x, ord=torch.inf) for x in tensors if x.numel() > 0]
    finite = all(torch.isfinite(norm).item() for norm in largest)
    return not any_rank(not finite)


def manifest_hash(manifest):
    """Return a hash of a manifest, as a dict, without its own entry "hash"."""
    content = {key: value for key, value in manifest.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder, part=0, parts=1):
    """Return the manifest of a checkpoint, after comparing its files with it.

    Of several ranks, each compares every parts-th file. ValueError names what is damaged. OSError,
    such as PermissionError, if something cannot be read: it may be undamaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        files = sorted(manifest["files"].items())
        is_whole = manifest["hash"] == manifest_hash(manifest) and ".metadata" in manifest["files"]
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{folder} is not a whole checkpoint ({type(e).__name__}: {e}): "
                         "resume from another one") from e
    if not is_whole:
        raise ValueError(f"{path} is not what was written: resume from another checkpoint")

    for name, _ in files:
        if Path(name).name != name:
            raise ValueError(
                f"{path} lists {name!r}: only files of the checkpoint itself are read")

    for name, (size, expected_hash) in files[part::parts]:
        path = folder / name
        if not path.exists():
            raise ValueError(f"{path} is missing: resume from another checkpoint")
        if path.stat().st_size != size or file_hash(path) != expected_hash:
            raise ValueError(f"{path} is not what was written: resume from another checkpoint")
    return manifest


def find_checkpoint(root, resume):
    """Return (folder, manifest) of the checkpoint to resume from, or (None, None).

    resume: "never"; "auto", the newest undamaged one in `root`; or a path. Ranks compare the files
    together. RuntimeError on all ranks if the one at a path is damaged, if all in `root` are, or if
    one cannot be read. "auto" renames the damaged ones that are newer than the one it returns."""
    rank = dist.get_rank()
    world = dist.get_world_size()

    def inspect(folder):
        try:
            return read_manifest(folder, rank, world), None
        except ValueError as e:
            return None, str(e)

    if resume == "never":
        candidates = []
    elif resume == "auto":
        found = run_on_ranks(f"looking into {root}", published, root, only=0)[0]
        candidates = reversed(found)
    else:
        candidates = [Path(resume)]

    damaged = {}  # folder: what is wrong with it
    for folder in candidates:
        outcomes = run_on_ranks(f"reading {folder}", inspect, folder)
        problems = [problem for _, problem in outcomes if problem is not None]
        if not problems:
            run_on_ranks("renaming damaged checkpoints", set_aside, damaged, only=0)
            manifest, _ = outcomes[0]
            return folder, manifest
        damaged[folder] = problems[0]
    if damaged:
        listed = "\n".join(damaged.values())
        raise RuntimeError(f"RESUME {resume}: no checkpoint is undamaged:\n{listed}\n"
                           "To begin at step 1, set RUN_DIR to a new folder.")
    return None, None


def set_aside(damaged):
    """Rename the folders of a dict {folder: what is wrong}, so that nothing resumes from them."""
    for folder, problem in damaged.items():
        target = folder.with_suffix(".damaged")
        number = 1
        while target.exists():  # an earlier one of the same step
            number += 1
            target = folder.with_suffix(f".damaged-{number}")
        folder.rename(target)
        print(f"WARNING: {problem}. It is renamed to {target.name}; trying the one before it.",
              flush=True)


def load_checkpoint(folder, model, optimizers=()):
    """Fill the model, and optimizers if given, from a checkpoint of any number of ranks.

    The optimizers' hyperparameters, such as weight_decay, are not those of the checkpoint. Nothing in
    it is executed: pickles of anything but plain values are refused."""
    free_gathered(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    hyperparameters = [{name: value for name, value in group.items() if name != "params"}
                       for group in groups]
    model_state, optimizer_state = get_state_dict(model, optimizers)
    states = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        # convert.py loads in one process, and means to.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(states, storage_reader=SafeReader(folder), planner=SafePlanner())
    set_state_dict(
        model, optimizers, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, values in zip(groups, hyperparameters):
        group.update(values)


# The module and the names that the metadata of our checkpoints refers to. A pickle can have any
# function of any module called, so that a checkpoint from somebody else could do anything.
METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "bfloat16", "int64"),
    "pathlib": ("PosixPath",),
}


class MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of a checkpoint, and refuses a pickle of anything else."""

    def find_class(self, module, name):
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(
                f"the metadata refers to {module}.{name}, which no checkpoint of ours does: do not "
                "use this checkpoint")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """Reads a checkpoint without executing what its metadata holds."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = MetadataUnpickler(file).load()
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"the metadata of {self.path} refers to {info.relative_path!r}: "
                                 "only files of the checkpoint itself are read")
        return metadata


class SafePlanner(dcp.DefaultLoadPlanner):
    """Reads the values that are not tensors, such as learning rates, without executing anything."""

    def load_bytes(self, read_item, value):
        torch.load(value, weights_only=True)  # raises an error if it refers to any function
        value.seek(0)
        super().load_bytes(read_item, value)


def fsync(path):
    """Wait until a file, or the names of the files in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path):
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASHED_BYTES))
    with open(path, "rb", buffering=0) as file:
        count = file.readinto(buffer)
        while count > 0:
            digest.update(buffer[:count])
            count = file.readinto(buffer)
    return digest.hexdigest()


# ------------------------------------------------------------------------------ how processes start

def adopt_slurm():
    """Set the variables of torchrun from those of srun, for a task that has only the latter.

    A rank is a task. The first host of the job is the master, unless MASTER_ADDR names another."""
    environment = os.environ
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    n_tasks = int(environment.get("SLURM_NTASKS", 1))
    if n_tasks == 1:
        return
    # "8(x2),4": 8 tasks on each of two hosts, 4 on the third. Ranks of a host follow each other.
    tasks_of_hosts = []
    of_job = environment.get("SLURM_TASKS_PER_NODE", str(n_tasks))
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", of_job).split(","):
        n, _, times = part.rstrip(")").partition("(x")
        tasks_of_hosts += [n] * int(times or 1)
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job = int(environment.get("SLURM_JOB_ID", 0))
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(n_tasks),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": tasks_of_hosts[int(environment.get("SLURM_NODEID", 0))],
        "MASTER_ADDR": first_host(hosts) if hosts else "127.0.0.1",
        "MASTER_PORT": str(20000 + job % 10000),  # jobs that share a host differ
    }
    for name, value in variables.items():
        environment.setdefault(name, value)
    if environment["RANK"] == "0":
        print(f"task 0 of {n_tasks}: srun has to start the others, too", flush=True)


def first_host(hosts):
    """"gpu[003-006,9],login1", a list of hosts as SLURM writes it -> "gpu003"."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", hosts)
    return match[1] + (match[2] or "")


def world_size():
    """Return the number of processes, before any of them has joined the others."""
    adopt_slurm()
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size():
    """Return the number of processes on this host."""
    adopt_slurm()
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def store_of_attempt():
    """Return the store in which ranks find each other.

    torchrun --max-restarts keeps its store, with the addresses of the ranks that are gone."""
    store, _, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)


# ------------------------------------------------------------- ranks that differ, are stuck or gone

# How long a collective waits for other ranks. Loading and compiling take some ranks longer than
# others; once training runs, a rank that is late for minutes is stuck.
START_TIMEOUT = timedelta(minutes=30)
TRAINING_TIMEOUT = timedelta(minutes=10)
ROLL_CALL_SECONDS = 10.0
# NCCL's time-out is longer than gloo's by this. NCCL ends a process without naming a rank, so
# watch_gpu ends it half of this time before, and names the ranks.
NCCL_PATIENCE = timedelta(minutes=1)
WATCH_SECONDS = 5.0

# What gloo and the store say of a rank that is stuck or gone.
LOST = re.compile("timed? ?out|Connection closed|Connection reset|Broken pipe", re.IGNORECASE)


def refuse_differences(agreed):
    """ValueError on all ranks if the dict `agreed` is not the same on all of them."""
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, agreed)
    differences = []
    for name, value in of_ranks[0].items():
        # Other code may not have a constant of this name.
        others = [rank for rank, other in enumerate(of_ranks) if other.get(name) != value]
        if others:
            other_value = of_ranks[others[0]].get(name)
            ranks = ", ".join(map(str, others))
            differences.append(f"{name} is {value!r} on rank 0 and {other_value!r} on rank {ranks}")
    if differences:
        raise ValueError(f"{'; '.join(differences)}: start all ranks with the same code, "
                         "constants and files")


def shorten_timeouts(grid, step_seconds):
    """From here on, collectives wait for TRAINING_TIMEOUT only, or for the time of three steps.

    NCCL counts from the moment when the CPU queued a collective, which may be a step earlier than
    when the GPU comes to it."""
    timeout = max(TRAINING_TIMEOUT, timedelta(seconds=3 * step_seconds))
    groups = [dist.group.WORLD, *grid.mesh.get_all_groups()]
    if grid.sp_group is not None:
        groups.append(grid.sp_group)
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout + NCCL_PATIENCE, group)
        gloo = group._get_backend(torch.device("cpu"))
        gloo._set_default_timeout(timeout)


@contextlib.contextmanager
def naming_lost_ranks():
    """Say which ranks are stuck or gone, and where this one waited, if a collective times out.

    On the CPU this is added to the error of the collective. For a GPU see watch_gpu."""
    finished = threading.Event()
    if "nccl" in dist.get_backend_config():
        threading.Thread(target=watch_gpu, args=(finished,), daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        place = place_in_code(traceback.extract_tb(error.__traceback__))
        raise RuntimeError(f"{error}\n{call_roll(place)}") from error
    finally:
        finished.set()


def watch_gpu(finished):
    """End this process if a collective on the GPU times out, and say which ranks are missing.

    No error can be raised meanwhile: the main thread may itself wait for the GPU. It runs in a
    thread until the Event `finished`."""
    while not finished.wait(WATCH_SECONDS):
        late = [collective for collective in pending_on_gpu() if is_late(collective)]
        if late:
            name = late[0]["profiling_name"]
            main_thread = sys._current_frames()[threading.main_thread().ident]
            place = place_in_code(traceback.extract_stack(main_thread))
            roll = call_roll(f"{name} on the GPU, and at {place}")
            print(f"{name} timed out.\n{roll}", file=sys.stderr, flush=True)
            os._exit(1)


def is_late(collective):
    """Return whether a collective of the flight recorder will soon have waited for its time-out."""
    seconds = time.time() - collective["time_created_ns"] / 1e9
    timeout = collective["timeout_ms"] / 1e3
    return seconds > timeout - NCCL_PATIENCE.total_seconds() / 2


def pending_on_gpu():
    """Return the collectives that NCCL has not completed, the oldest first: torch's flight
    recorder."""
    recorded = torch._C._distributed_c10d._dump_nccl_trace(True, False, True)
    return pickle.loads(recorded)["entries"]


def place_in_code(stack):
    """Return the line of our code in a list of traceback.FrameSummary that called this file, if any
    did, and the line of this file that it came to."""
    folder = Path(__file__).parent
    frames = [frame for frame in stack if Path(frame.filename).parent == folder]
    callers = [frame for frame in frames if frame.filename != __file__]
    caller = callers[-1]
    place = f"{Path(caller.filename).name}:{caller.lineno}, {caller.line}"
    if frames[-1].filename == __file__:
        place += f", which calls {frames[-1].line}"
    return place


def call_roll(place):
    """Return which ranks report within ROLL_CALL_SECONDS that they wait in vain, and which do not.

    place: where this rank waited. The store is used, as the process group may be unusable."""
    store = dist.distributed_c10d._get_default_store()
    lines = []
    try:
        store.set(f"lost/{dist.get_rank()}", place)
        time.sleep(ROLL_CALL_SECONDS)
        for rank in range(dist.get_world_size()):
            if store.check([f"lost/{rank}"]):
                where = store.get(f"lost/{rank}").decode()
                lines.append(f"rank {rank} waited for others at {where}")
            else:
                lines.append(f"rank {rank} does not answer: it is stuck or gone")
    except RuntimeError:  # the store is in rank 0, or in torchrun on its host
        lines = ["rank 0 does not answer: it is stuck or gone, or its host is"]
    return "\n".join(lines)
