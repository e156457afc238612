"""What crosses ranks: the grid, the exchange of sequence parallelism, FSDP2, what backward keeps, checkpoints.

Eight GPUs, REPLICAS 1, SEQUENCE_PARALLEL_SIZE 4 (so dp 2):        one row of tokens, cut into shares
    rank      0  1  2  3 | 4  5  6  7                              [ share 0 | share 1 | share 2 | share 3 ]
    dp_rank   0  0  0  0 | 1  1  1  1     which rows               ranks 0-3: the shares of dp group 0's row
    sp_rank   0  1  2  3 | 0  1  2  3     which share of a row     ranks 4-7: those of dp group 1's row
Parameters, gradients and optimizer states are sharded over all eight: sharding does not ask who holds which tokens.
With REPLICAS 2 ranks 0-3 and 4-7 would each hold a whole sharded copy, and gradients be summed between them.
"""
import contextlib
import hashlib
import json
import os
import shutil
import weakref
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

class Grid(NamedTuple):
    """Who this process is. dp_rank counts over replicas too: it says which rows of a step are this rank's."""
    rank: int
    world: int
    dp: int
    dp_rank: int
    sp: int
    sp_rank: int
    sp_group: object        # None when one rank holds the whole row
    mesh: object            # what FSDP2 shards over: (shard,) or (replicate, shard)
    device: torch.device

def check(world, replicas, sp, heads, kv_heads):
    """-> dp, rows in flight at a time. ValueError where the sizes do not fit; needs no process group."""
    if world % replicas:
        raise ValueError(f"REPLICAS {replicas} does not divide {world} processes: use a divisor of {world}")
    rules = {f"divide {heads} attention heads": lambda p: heads % p == 0,
             f"fit {kv_heads} key/value heads": lambda p: kv_heads % p == 0 or p % kv_heads == 0,
             f"divide {world} processes": lambda p: world % p == 0}
    for rule, holds in rules.items():
        if not holds(sp):
            works = [str(p) for p in range(1, world + 1) if all(holds(p) for holds in rules.values())]
            raise ValueError(f"SEQUENCE_PARALLEL_SIZE {sp} does not {rule}: use {', '.join(works)}")
    return world // sp

def init(replicas, sp):
    """Join the process group that torchrun (or srun) describes; alone, one of our own. -> Grid."""
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and here > gpus:
        raise ValueError(f"{here} processes on a host of {gpus} GPUs: start it with torchrun --nproc_per_node {gpus}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30), **alone)
    rank, world = dist.get_rank(), dist.get_world_size()
    grid = init_device_mesh(device.type, (world // sp, sp), mesh_dim_names=("dp", "sp"))
    mesh = init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    return Grid(rank, world, world // sp, rank // sp, sp, rank % sp, grid["sp"].get_group() if sp > 1 else None,
                mesh if replicas > 1 else mesh["shard"], device)

def close():
    dist.barrier()
    dist.destroy_process_group()

def all_sum(values, group=None):
    """Tensor -> its sum over all ranks (or the group's), in place."""
    dist.all_reduce(values, group=group)
    return values

def together(what, function, *args, only=None):
    """function(*args) on every rank, or on rank `only` -> what each of them returned, known to all. If it fails on any,
    RuntimeError on all: none waits for one that has stopped."""
    result, error, rank, outcomes = None, None, dist.get_rank(), [None] * dist.get_world_size()
    try:
        result = function(*args) if only in (None, rank) else None
    except (Exception, dcp.api.CheckpointException) as e:
        error = e
    dist.all_gather_object(outcomes, (result, error and f"rank {rank}: {type(error).__name__}: {error}"))
    for _, failure in outcomes:
        if failure:
            raise RuntimeError(f"{what}: {failure}") from error
    return [result for result, _ in outcomes]

# ------------------------------------------------------------------------------ Ulysses: the sequence-parallel exchange
class _AllToAll(torch.autograd.Function):
    """x (P, ...): part i goes to rank i. The exchange is its own transpose, so backward is the same exchange."""
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, out = group, torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad.contiguous(), ctx.group), None

def cut_heads(xs, P):
    """Tensors (t, H, D) of one rank -> (P, t, sum of their H/P, D): part i is what rank i attends with. Fewer heads
    than ranks: each goes to P/H ranks, and backward sums their gradients."""
    xs = [x if x.shape[1] >= P else x.repeat_interleave(P // x.shape[1], dim=1) for x in xs]
    return torch.cat([x.unflatten(1, (P, -1)).transpose(0, 1) for x in xs], dim=2)

def seq_to_heads(x, group):
    """x (T/P, H, D), tokens of this rank, all heads, or cut_heads' of several -> (T, H/P, D), heads of this rank."""
    if group is None:
        return x
    x = cut_heads([x], dist.get_world_size(group)) if x.ndim == 3 else x
    return _AllToAll.apply(x, group).flatten(0, 1)                                  # (P, T/P, H/P, D) -> (T, H/P, D)

def heads_to_seq(x, group):
    """The way back: x (T, H/P, D) -> (T/P, H, D)."""
    if group is None:
        return x
    out = _AllToAll.apply(x.unflatten(0, (dist.get_world_size(group), -1)).contiguous(), group)  # (P, T/P, H/P, D)
    return out.transpose(0, 1).flatten(1, 2)                                        # (T/P, H, D)

# ---------------------------------------------------------------------------------------------------------------- FSDP2
def shard(model, blocks, grid, dtype, zero_stage, offload_optimizer):
    """Shard fp32 parameters over grid.mesh; forward and backward see them gathered, in `dtype`. Gradients are summed,
    not averaged, in fp32: the loss was divided by the targets of the whole step already."""
    # cast_forward_inputs: cos, sin and the weights of the loss come in float32 and stay so
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = {"mesh": grid.mesh, "mp_policy": precision,
                "offload_policy": CPUOffloadPolicy() if offload_optimizer else OffloadPolicy()}
    for i, block in enumerate(blocks):  # backward starts at the last block: freeing it would only fetch it twice
        fully_shard(block, **settings, reshard_after_forward=zero_stage == 3 and i < len(blocks) - 1)
    fully_shard(model, **settings, reshard_after_forward=False)
    for module in [*blocks, model] if grid.world > 1 else []:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(grid.device.type == "cpu")  # nccl multiplies by 1 on the way
    model.to_empty(device="cpu" if offload_optimizer else grid.device)

def accumulate(model, zero_stage, last):
    """Before a micro-batch's forward: until the last, ZeRO 1 reduces no gradient, and 1 and 2 keep weights gathered."""
    model.set_requires_gradient_sync(last or zero_stage > 1)
    model.set_reshard_after_backward(last or zero_stage > 2)

def grad_norm(parameters):
    """-> the norm of all gradients over all ranks, a float64 scalar on their device. A row's norm is taken at a time:
    torch's float32 norm of a whole matrix of 28 million elements errs by 2e-3 on a CPU, a row's by 1e-7."""
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
    row_norms = torch.cat([torch.linalg.vector_norm(g, dim=-1).reshape(-1) for g in local])
    square = row_norms.double().square().sum()
    if hasattr(grads[0], "device_mesh"):  # replicas hold the same gradients: their dimension is not summed over
        mesh = grads[0].device_mesh
        all_sum(square, mesh.get_group(mesh.ndim - 1))
    return square.sqrt()

def local_rows(parameter):
    """-> this rank's rows of a parameter as a plain tensor, and the number of the first of them. FSDP2 cuts dimension 0
    into equal pieces, rounded up, so the last ranks may hold fewer rows or none."""
    if not hasattr(parameter, "device_mesh"):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    piece = -(-parameter.shape[0] // mesh.shape[-1])
    return parameter.to_local().detach(), min(piece * mesh.get_local_rank(mesh.ndim - 1), parameter.shape[0])

# ------------------------------------------------------------------------------------- what a block keeps for backward
class Keep:
    """Decides what autograd holds for one block, through saved_tensors_hooks that know a tensor by its storage.

    Kept: the block's input x (t, C), attention's output a (t, H, D), and the log-sum-exp. Computed when attention's
    backward asks, and let go after it: q, k, v from x by `again`, the kernel's own output from a. So the kernel's
    forward runs once. With `offload` x and a wait in host memory. Keep() leaves autograd alone."""

    def __init__(self, offload=None, again=None, group=None):
        self.offload, self.again, self.group = offload, again, group
        self.places, self.kernel_saved, self.qkv = {}, None, None       # places: storage -> how to get it, its offset

    @contextlib.contextmanager
    def hooks(self, x):
        """The context of the block's forward on x (t, C)."""
        self.x = self._keep(x)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self.places = {}  # autograd alone holds what was kept: a cycle through self would hold it past backward

    @contextlib.contextmanager
    def inputs_of_attention(self, q, k, v):
        """The context of the kernel's forward."""
        self.kernel_saved, kept = [], self.places
        if self.again:
            q.register_hook(self._let_go)
            self.places = kept | {_storage(t): (lambda i=i: self._qkv()[i], t.storage_offset())
                                  for i, t in enumerate((q, k, v))}
        yield
        self.places = kept  # q, k, v are about to be freed, and their addresses to be somebody else's

    def output_of_attention(self, out, a):
        """out (T, H/P, D) of the kernel, a (t, H, D) the same by token. -> a"""
        if self.again:
            self.a = self._keep(a)
        for saved in self.kernel_saved:
            if _storage(saved.get()) == _storage(out):
                saved.get = lambda: seq_to_heads(self.a(), self.group)
        self.kernel_saved = None
        return a

    def _keep(self, t):
        t = t.detach()
        get = self.offload.store(t) if self.offload else lambda: t
        self.places[_storage(t)] = get, t.storage_offset()
        return get

    @torch.no_grad()
    def _qkv(self):
        self.qkv = self.qkv or self.again(self.x())
        return self.qkv

    def _let_go(self, _):  # attention's backward is done; the hook, and so this object, lives as long as the graph
        self.qkv = self.x = self.a = self.again = None

    def _pack(self, t):
        place = self.places.get(_storage(t))
        if place is None and (self.kernel_saved is None or not t.is_floating_point()):
            return t
        held = t.detach()
        get, base = place or (lambda: held, t.storage_offset())
        saved = _Note(get=get, shape=t.shape, stride=t.stride(), offset=t.storage_offset() - base)
        if place is None:
            self.kernel_saved.append(saved)
        return saved

    def _unpack(self, saved):
        if isinstance(saved, torch.Tensor):
            return saved
        t = saved.get()
        return t.as_strided(saved.shape, saved.stride, t.storage_offset() + saved.offset)

def _storage(t):
    return t.untyped_storage().data_ptr()

class _Note:
    """A few fields, equal to itself alone."""
    def __init__(self, **fields):
        self.__dict__.update(fields)

class Offload:
    """Tensors that wait in pinned host memory between forward and backward. Copies run on a stream of their own: out
    while later layers compute, back two tensors (one block) before they are asked for. Buffers are kept for the next
    step. Without a GPU the copy is a plain one."""

    def __init__(self):
        self.stream, self.pool, self.line, self.leaving = None, {}, [], []

    def store(self, t):
        """-> a function that returns the tensor again."""
        if not t.is_cuda:
            copy = t.clone()
            return lambda: copy
        self.stream, main = self.stream or torch.cuda.Stream(), torch.cuda.current_stream()
        for event, _ in self.leaving:  # the memory of what left before is free for the kernels queued from here on
            main.wait_event(event)
        pool = self.pool.setdefault((t.shape, t.dtype), [])
        ticket = _Note(host=pool.pop() if pool else self._pinned(t), device=t.device, pool=pool, tensor=None)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            ticket.host.copy_(t, non_blocking=True)
        self.leaving = [(self.stream.record_event(), t)]
        self.line.append(ticket)
        return lambda: self._load(ticket)

    def _load(self, ticket):
        i = self.line.index(ticket) if ticket in self.line else 0
        for t in [ticket, *self.line[max(i - 2, 0):i][::-1]]:
            if t.tensor is None:
                t.tensor = torch.empty(t.host.shape, dtype=t.host.dtype, device=t.device)
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    t.tensor.copy_(t.host, non_blocking=True)
                t.event = self.stream.record_event()
                t.pool.append(t.host)  # its next use comes later on the same stream
        torch.cuda.current_stream().wait_event(ticket.event)  # and so for all that left before it, on the same stream
        self.line, self.leaving = [t for t in self.line if t is not ticket], []
        return ticket.tensor

    def _pinned(self, t):
        """Registered by hand: torch's pinned allocator rounds up to a power of two, up to twice the memory."""
        host = torch.empty(t.shape, dtype=t.dtype)
        error = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        if error:
            raise RuntimeError(f"{host.nbytes / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {error}): "
                               "raise `ulimit -l`, or lower OFFLOAD_ACTIVATIONS")
        weakref.finalize(host, torch.cuda.cudart().cudaHostUnregister, host.data_ptr())
        return host

# ---------------------------------------------------------------------------------------------------------- checkpoints
STEP = "step-" + 8 * "[0-9]"    # the names of published ones; nothing else is touched

def save_checkpoint(root, step, model, optimizer, notes, keep):
    """Write root/step-00000100: every rank its shards, then a manifest of sizes, hashes and `notes`, then a rename.
    What carries the name is whole. A step that is published already stays as it is; the newest `keep` stay."""
    folder = Path(root) / f"step-{step:08d}"
    part, rank = folder.with_suffix(".part"), dist.get_rank()

    def prepare():
        for leftover in folder.parent.glob(f"{STEP}.part"):
            shutil.rmtree(leftover)
        part.mkdir(parents=True)

    def write():
        dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=part)
        mine = [*part.glob(f"__{rank}_*"), *part.glob(".metadata" if rank == 0 else "nothing")]
        return {f.name: [f.stat().st_size, _hash(f)] for f in mine}

    def publish(files):
        manifest = {**notes, "step": step, "files": {k: v for f in files for k, v in f.items()}}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.sync()  # the bytes before the name that vouches for them
        part.rename(folder)
        for old in sorted(folder.parent.glob(STEP))[:-keep]:
            shutil.rmtree(old)

    if not together(f"looking for {folder}", folder.exists, only=0)[0]:
        together(f"preparing {part}", prepare, only=0)
        together(f"publishing {folder}", publish, together(f"saving {part}", write), only=0)

def read_manifest(folder, part=0, parts=1):
    """-> the manifest, after comparing every parts-th file with it. ValueError names what is missing or differs."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, (size, digest) in sorted(manifest["files"].items())[part::parts]:
            path = folder / name
            if not path.exists() or path.stat().st_size != size or _hash(path) != digest:
                raise ValueError(f"{path} is not what was written, or is missing: resume from another checkpoint")
    except (OSError, KeyError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder} is not a whole checkpoint ({type(e).__name__}: {e}): name another one") from e
    return manifest

def find_checkpoint(root, resume):
    """resume "never", "auto" (the newest whole one under root), or a path -> (folder, manifest) or (None, None). All
    ranks verify the files together; RuntimeError on all of them where a named one is damaged; others are set aside."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = together(f"looking into {root}", lambda: sorted(Path(root).glob(STEP), reverse=True), only=0)[0]
    for folder in {"auto": found, "never": []}.get(resume, [Path(resume)]):
        try:
            return folder, together(f"RESUME {resume}", read_manifest, folder, rank, world)[0]
        except RuntimeError as e:
            if resume != "auto":
                raise
            if rank == 0:
                print(f"WARNING: {e}. It is now {folder.name}.damaged; trying the one before it.", flush=True)
            together("setting it aside", folder.rename, folder.with_suffix(".damaged"), only=0)
    return None, None

def load_checkpoint(folder, model, *optimizer):
    """Fill model (and optimizer) from a checkpoint of any number of ranks."""
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])

def _hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
