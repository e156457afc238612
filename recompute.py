"""What a block keeps for backward: where it lies until then, and what is recomputed from it.

The class Block of model.py draws it: with RECOMPUTE a block keeps its input and the outputs of
attention, and recomputes the rest. Otherwise it keeps all that autograd saves. Kept holds either,
and Offload moves it to CPU memory. AttendWithRecompute runs the attention kernel's backward on
recomputed q, k and v, so that its forward runs only once. attend_in_parts runs the kernel for some
of the heads at a time. divide_blocks says which blocks recompute, and which offload.
"""
import contextlib
import ctypes
import functools
import itertools
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

SLAB = 2**28    # bytes that are pinned at a time
SMALL = 2**20   # bytes of a tensor that is not worth two copies
ALIGNMENT = 2**9    # bytes: copies begin at multiples of it
TOUCHED = 2**24     # bytes of new memory that a thread touches at a time
MAX_PARTS = 8       # of the heads, for which attention runs one after another
PART_WORK = 2**20   # tokens x query heads of a part: with less, a GPU would not be busy


def share_storage(a, b):
    """Whether two tensors are views of the same memory."""
    address = a.untyped_storage().data_ptr()
    return address != 0 and address == b.untyped_storage().data_ptr()   # 0: no elements


class View(NamedTuple):
    """Which part of a base tensor a view is, to take it of an equal tensor later."""
    shape: tuple
    stride: tuple
    offset: int             # elements after the beginning of the base
    base_stride: tuple

    @classmethod
    def of(cls, tensor, base):
        offset = tensor.storage_offset() - base.storage_offset()
        return cls(tensor.shape, tensor.stride(), offset, base.stride())

    def take(self, base):
        """Return the same part of `base`, which has the memory layout of the first one."""
        assert base.stride() == self.base_stride, f"strides {base.stride()}, not {self.base_stride}"
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


class SavedTensor:
    """What autograd saved: a tensor, and later only which view it was of one of several tensors."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        self.base_index = None
        self.view = None

    def replace_by_view(self, bases):
        """Refer to the tensor as a view of one of `bases`, to which it is added if it is of none.

        Bases may share their storage, as q, k and v do after an exchange. Then any of them serves,
        since a View is an offset in memory."""
        for i, base in enumerate(bases):
            if share_storage(self.tensor, base) and self.tensor.dtype == base.dtype:
                self.base_index = i
                break
        else:
            self.base_index = len(bases)
            bases.append(self.tensor)
        self.view = View.of(self.tensor, bases[self.base_index])
        self.tensor = None

    def restore(self, bases):
        return self.view.take(bases[self.base_index])


class KernelGraph:
    """The autograd graph of one call of an attention kernel, without the tensors that it saves.

    A kernel saves q, k, v and the output for backward, 4 x (H + G) x D bytes a token in bfloat16.
    Here it runs in a graph of its own, on detached inputs. The graph keeps only which part of these
    four was saved, so that their memory is freed; `backward` is given them again. What else the
    kernel saves, such as the log-sum-exp, is kept by the caller."""

    def __init__(self):
        self.given = []     # q, k, v, the output and the other tensors, while backward runs
        self.inputs = None
        self.out_edge = None
        self.n_others = 0

    def forward(self, kernel, q, k, v):
        """Return kernel(q, k, v), and a list of the other tensors that `backward` needs."""
        saved_tensors = []
        given = self.given  # the hooks must not refer to self: that would be a reference cycle

        def pack(tensor):
            saved = SavedTensor(tensor)
            saved_tensors.append(saved)
            return saved

        def unpack(saved):
            return saved.restore(given)

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            self.inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = kernel(*self.inputs)
        self.out_edge = get_gradient_edge(out)

        bases = [q, k, v, out]
        for saved in saved_tensors:
            saved.replace_by_view(bases)
        # The graph needs its leaves, but not their values: it recorded their shapes in forward.
        for x in self.inputs:
            x.data = x.new_empty(0)
        others = bases[4:]
        self.n_others = len(others)
        return out.detach(), others

    def backward(self, q, k, v, out, kept, grad_out):
        """Return the gradients of q, k and v. The tensors are those of forward, up to rounding.

        kept: an iterator, from which this takes the other tensors that forward returned."""
        self.given.extend((q, k, v, out, *itertools.islice(kept, self.n_others)))
        gradients = torch.autograd.grad(self.out_edge, self.inputs, grad_out)
        self.given.clear()
        return gradients


class AttendWithRecompute(torch.autograd.Function):
    """kernel(q, k, v) of each of `kernels`; q, k, v and the outputs are not kept for backward.

    `recompute_tensors()` returns them in backward: a list of (q, k, v), and a list of outputs. Only
    the log-sum-exps are kept. So the forward of each kernel runs only once."""

    @staticmethod
    def forward(ctx, recompute_tensors, kernels, *qkv):
        """qkv: q, k, v of the first kernel, then of the next. Return the outputs."""
        ctx.recompute_tensors = recompute_tensors
        ctx.graphs = []
        outputs = []
        kept = []
        for i, kernel in enumerate(kernels):
            graph = KernelGraph()
            q, k, v = qkv[3 * i:3 * i + 3]
            out, others = graph.forward(kernel, q, k, v)
            outputs.append(out)
            kept.extend(others)
            ctx.graphs.append(graph)
        ctx.save_for_backward(*kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        kept = iter(ctx.saved_tensors)
        inputs, outputs = ctx.recompute_tensors()
        gradients = []
        for graph, (q, k, v), out, grad_out in zip(ctx.graphs, inputs, outputs, grad_outputs):
            gradients.extend(graph.backward(q, k, v, out, kept, grad_out.contiguous()))
        # The loss refers to the graph, and the graph to this node, after backward as well. So let
        # go of what was kept for it now.
        ctx.graphs = None
        ctx.recompute_tensors = None
        return None, None, *gradients


def divide_heads(tokens, q_heads, kv_heads):
    """Divide the heads of q (tokens, q_heads, D), k and v (tokens, kv_heads, D) into parts of equal
    size. Return a list of (slice of the query heads, slice of the key/value heads).

    A part has one or more key/value heads with all query heads that share them, or some of the
    query heads that share one. A short row is a single part."""
    q_per_kv = q_heads // kv_heads

    def is_possible(n):
        size = q_heads // n
        return q_heads % n == 0 and (size % q_per_kv == 0 or q_per_kv % size == 0)

    most = min(max(tokens * q_heads // PART_WORK, 1), MAX_PARTS)
    n_parts = max(n for n in range(1, most + 1) if is_possible(n))
    size = q_heads // n_parts
    kv_size = max(size // q_per_kv, 1)
    parts = []
    for begin in range(0, q_heads, size):
        kv_begin = begin // q_per_kv
        parts.append((slice(begin, begin + size), slice(kv_begin, kv_begin + kv_size)))
    return parts


def attend_in_parts(kernel, q, k, v):
    """q (T, H, D), k and v (T, G, D) -> kernel(q, k, v), with less memory in backward if the row is
    long."""
    parts = divide_heads(len(q), q.shape[1], k.shape[1])
    if len(parts) == 1:
        return kernel(q, k, v)
    return AttendInParts.apply(kernel, parts, q, k, v)


class AttendInParts(torch.autograd.Function):
    """kernel(q, k, v), for one part of the heads after another.

    The kernel's backward computes the gradients of q, k and v from sums in float32. For all heads
    these would take up to three times the memory of q, k and v. Here those of one part exist at a
    time. They are added to the gradients of k and v, and written over q, which becomes its gradient.

    So no other operation may need q in its backward. In a checkpoint, autograd would not notice that
    q has changed, and the gradients would be wrong without an error.

    All tensors are kept by save_for_backward. So a checkpoint around the block can free them in
    forward and recompute them in backward."""

    @staticmethod
    def forward(ctx, kernel, parts, q, k, v):
        ctx.parts = parts
        ctx.graphs = []
        kept = []
        out = q.new_empty(q.shape)
        for heads, kv_heads in parts:
            graph = KernelGraph()
            part = [q[:, heads], k[:, kv_heads], v[:, kv_heads]]
            out[:, heads], others = graph.forward(kernel, *[x.contiguous() for x in part])
            kept.extend(others)
            ctx.graphs.append(graph)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, *others = ctx.saved_tensors
        kept = iter(others)
        grad_k = torch.zeros_like(k)
        grad_v = torch.zeros_like(v)

        def backward_of_part(graph, heads, kv_heads):
            """A function, so that its tensors are freed before the next part."""
            part = [q[:, heads], k[:, kv_heads], v[:, kv_heads], out[:, heads]]
            part_grad_q, part_grad_k, part_grad_v = graph.backward(
                *[x.contiguous() for x in part], kept, grad_out[:, heads].contiguous())
            q[:, heads] = part_grad_q       # this part of q is not needed any more
            grad_k[:, kv_heads] += part_grad_k
            grad_v[:, kv_heads] += part_grad_v

        for graph, (heads, kv_heads) in zip(ctx.graphs, ctx.parts):
            backward_of_part(graph, heads, kv_heads)
        return None, None, q, grad_k, grad_v


class Kept:
    """Tensors that a block which recomputes keeps for backward, by name. They are on the GPU or, with
    `offload`, an Offload, in CPU memory."""

    def __init__(self, offload):
        self.offload = offload
        self.getters = {}       # name: function that returns the tensor
        self.offloaded = []     # (tensor, its getter), only during forward

    def add(self, name, tensor):
        tensor = tensor.detach()
        if self.offload is None:
            def get():
                return tensor
        else:
            get = functools.partial(self.offload.load, self.offload.store(tensor))
            self.offloaded.append((tensor, get))
        self.getters[name] = get

    def get(self, name):
        return self.getters[name]()

    @contextlib.contextmanager
    def saved_by_reference(self):
        """The context of the block's forward. Wherever autograd would save an offloaded tensor, or
        a view of one, it saves how to load it instead, so that its GPU memory is freed."""
        if self.offload is None:
            yield
            return

        offloaded = self.offloaded  # autograd holds on to pack, which must not refer to self

        def pack(saved):
            for tensor, get in offloaded:
                if share_storage(saved, tensor):
                    return get, View.of(saved, tensor)
            return saved

        def unpack(packed):
            if isinstance(packed, torch.Tensor):
                return packed
            get, view = packed
            return view.take(get())

        with saved_tensors_hooks(pack, unpack):
            yield
        offloaded.clear()


class OffloadedTensor:
    """A tensor on its way to CPU memory and back."""

    def __init__(self, tensor, parts):
        self.tensor = tensor        # until it is released
        self.parts = parts          # of pinned memory, which hold its bytes
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.copied_out = None      # CUDA event: the copy to CPU memory is complete
        self.copy = None            # on the GPU again, once it is being copied back
        self.copied_back = None     # CUDA event: that is complete

    def release(self):
        """Let kernels that are queued from here on reuse the tensor's memory, after its copy."""
        if self.tensor is not None:
            torch.cuda.current_stream().wait_event(self.copied_out)
            self.tensor = None


def copies_by_stream(tensor):
    """Whether a tensor is copied to CPU memory by a stream. Tests say so of CPU tensors, too."""
    return tensor.is_cuda


def split_as(tensor, parts):
    """Return views of a tensor's bytes, as many in each as in that of `parts`."""
    return tensor.view(-1).view(torch.uint8).split([len(part) for part in parts])


class Offload:
    """Moves tensors to pinned CPU memory during forward, and back during backward.

    Copies run on a stream of their own, while blocks compute. When they have to be complete is what
    Group.n_released says. Each forward fills the pinned memory from its beginning, whatever lengths
    its row and its documents have.

    Each forward of training has to be followed by its backward, which has to load every tensor that
    comes back: `load` makes the main stream wait for the copy, before it may reuse the memory."""

    def __init__(self):
        self.stream = None
        self.slabs = []             # pinned memory, which is never given back
        self.n_used = 0             # bytes of the slabs that hold tensors of this forward
        self.stored = []            # OffloadedTensors of each group that has not been brought back

    def begin_group(self, group):
        """Called in forward before a Group. Return where it offloads to: this object, or None."""
        if group.blocks[0] == 0:
            # What an earlier forward offloaded is not needed any more. Copies of it may still run.
            # Those that overwrite it are queued behind.
            self.stored = []
            self.n_used = 0
        self.release(group.n_released)
        if not group.offloads:
            return None
        self.stored.append([])
        return self

    def release(self, n_groups=None):
        """Release the GPU memory of the first n_groups groups, or of all."""
        for group in self.stored[:n_groups]:
            for offloaded in group:
                offloaded.release()

    def store(self, tensor):
        """Queue the copy of a contiguous tensor to CPU memory. Return an OffloadedTensor for
        `load`."""
        if not copies_by_stream(tensor):  # on a CPU, for tests: a copy unknown to autograd
            offloaded = OffloadedTensor(tensor, parts=[])
            offloaded.copy = tensor.clone()
            offloaded.tensor = None
            return offloaded
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        offloaded = OffloadedTensor(tensor, self.take_memory(tensor.nbytes))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for part, source in zip(offloaded.parts, split_as(tensor, offloaded.parts)):
                part.copy_(source, non_blocking=True)
        offloaded.copied_out = self.stream.record_event()
        self.stored[-1].append(offloaded)
        return offloaded

    @contextlib.contextmanager
    def all_saved(self, except_for):
        """The context of the forward of a block that recomputes nothing: what autograd saves goes to
        CPU memory, except for the tensors that are shared with other blocks, small ones and integers.
        """
        shared = {tensor.untyped_storage().data_ptr() for tensor in except_for}
        stored = {}     # address of a storage: the storage, and the getter of its bytes

        def pack(saved):
            storage = saved.untyped_storage()
            address = storage.data_ptr()
            if (address in shared or storage.nbytes() < SMALL
                    or not saved.is_floating_point()):
                return saved
            if address not in stored:
                content = torch.empty(0, dtype=torch.uint8, device=saved.device).set_(storage)
                stored[address] = storage, functools.partial(self.load, self.store(content))
            _, get = stored[address]
            return get, saved.dtype, saved.shape, saved.stride(), saved.storage_offset()

        def unpack(packed):
            if isinstance(packed, torch.Tensor):
                return packed
            get, dtype, *view = packed
            return get().view(dtype).as_strided(*view)

        with saved_tensors_hooks(pack, unpack):
            yield
        stored.clear()

    def prefetch(self, group, grad):
        """Called when backward comes to a Group: queue copies of what it needs, and of what groups
        before it need as far as n_released says. grad is not used: a tensor's hook is given it."""
        while len(self.stored) > group.n_released:
            for offloaded in reversed(self.stored.pop()):
                self.queue_copy_back(offloaded)

    def load(self, offloaded):
        """Return the tensor on its device, for kernels that are queued from here on."""
        if offloaded.copied_back is not None:
            torch.cuda.current_stream().wait_event(offloaded.copied_back)
        return offloaded.copy

    def queue_copy_back(self, offloaded):
        offloaded.copy = torch.empty(
            offloaded.shape, dtype=offloaded.dtype, device=offloaded.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for part, target in zip(offloaded.parts, split_as(offloaded.copy, offloaded.parts)):
                target.copy_(part, non_blocking=True)
        offloaded.copied_back = self.stream.record_event()

    def take_memory(self, size):
        """Return parts of the pinned memory with together `size` bytes, in as few slabs as
        possible.

        RuntimeError if no more memory can be pinned."""
        self.n_used = -(-self.n_used // ALIGNMENT) * ALIGNMENT
        parts = []
        while size > 0:
            index, offset = divmod(self.n_used, SLAB)
            if index == len(self.slabs):
                self.slabs.append(pinned_memory(SLAB))
            part = self.slabs[index][offset:offset + size]
            parts.append(part)
            self.n_used += len(part)
            size -= len(part)
        return parts


# ----------------------------------------------------------------------------- which blocks do what

KEEP_EVERYTHING_UNITS = 5   # memory of a group that keeps everything, in that of one that recomputes


class Group(NamedTuple):
    """Blocks that share what they keep for backward: a single one, or a pair."""
    blocks: list        # their indices
    recompute: str      # "none", "all_but_attention", "all" or "pairs"
    offloads: bool      # whether what they keep goes to CPU memory
    n_released: int     # While this group runs, so many first groups have nothing on the GPU: forward
                        # has waited for their copies, and backward has not begun to copy them back.


@functools.lru_cache
def divide_blocks(n_blocks, recompute, keep_layers, offload_layers):
    """Return the Groups of n_blocks blocks. keep_layers of them are exempt from `recompute`.

    The first blocks offload, and the last ones keep everything. If more offload than recompute, the
    first ones keep everything, too, since their copies have the most time:

        keep everything, offload    recompute, offload    keep everything

    and otherwise

        recompute, offload          recompute             keep everything
    """
    n_recomputed = 0 if recompute == "none" else max(n_blocks - keep_layers, 0)
    offload_layers = min(offload_layers, n_blocks)
    begin = max(offload_layers - n_recomputed, 0)   # of the blocks that recompute
    end = begin + n_recomputed
    group_size = 2 if recompute == "pairs" else 1
    groups = [[i] for i in range(begin)]
    groups += [list(range(i, min(i + group_size, end))) for i in range(begin, end, group_size)]
    groups += [[i] for i in range(end, n_blocks)]

    n_offloaded = sum(blocks[0] < offload_layers for blocks in groups)
    recomputes = [begin <= blocks[0] < end for blocks in groups]
    divided = []
    for i, blocks in enumerate(groups):
        divided.append(Group(
            blocks=blocks,
            recompute=recompute if recomputes[i] else "none",
            offloads=i < n_offloaded,
            n_released=count_released(i, n_offloaded, recomputes)))
    return divided


def count_released(i, n_offloaded, recomputes):
    """Return Group.n_released of group i, where the first n_offloaded groups offload.

    recomputes: whether each group recomputes. The groups from n_released to i - 1 may still be on
    the GPU while group i runs: in forward their copies need not be complete, and in backward they
    may have been copied back already. That takes memory, which has to be free at that moment."""
    # Memory is counted in that of a group that recomputes. One that keeps everything takes more.
    units = [1 if is_recomputed else KEEP_EVERYTHING_UNITS for is_recomputed in recomputes]

    # The groups after this one that stay on the GPU leave memory free: in forward they have not
    # filled theirs yet, in backward they have freed it. That of one group is left for transient
    # activations.
    n_staying = len(units) - max(i + 1, n_offloaded)
    allowed = KEEP_EVERYTHING_UNITS * (n_staying - 1)
    if recomputes[0]:   # all that offload recompute, and have little to copy
        allowed = min(allowed, 1)
    if 0 < i < n_offloaded:     # in any case the group before is copied while this one runs
        allowed = max(allowed, units[i - 1])

    n_before = min(i, n_offloaded)      # groups before this one that offload
    n_released = n_before
    while n_released > 0 and sum(units[n_released - 1:n_before]) <= allowed:
        n_released -= 1
    return n_released


# ------------------------------------------------------------------------------------ pinned memory

def pinned_memory(size):
    """Return `size` bytes of pinned CPU memory. RuntimeError if it cannot be pinned.

    torch's own allocator of pinned memory rounds up to a power of two, which wastes up to half."""
    tensor = torch.empty(size, dtype=torch.uint8)
    pin(tensor, owner=tensor)
    return tensor


def pin(tensor, owner):
    """Pin the memory of a new CPU tensor for as long as the object `owner`, which keeps it, exists.

    RuntimeError if the system refuses."""
    touch(tensor)
    error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if error != 0:
        raise RuntimeError(
            f"{tensor.nbytes / 2**30:.1f} GiB of CPU memory cannot be pinned (CUDA error {error}): "
            "raise `ulimit -l`, or lower OFFLOAD_ACTIVATIONS")
    weakref.finalize(owner, torch.cuda.cudart().cudaHostUnregister, tensor.data_ptr())


def touch(tensor):
    """Fill a new CPU tensor with zeros, so that the system provides its memory: fast, as huge pages
    and by several threads. One thread is given 1 GB/s of small pages."""
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - begin
    # An error only says that the system has no huge pages.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_HUGEPAGE))
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(torch.Tensor.zero_, tensor.view(-1).view(torch.uint8).split(TOUCHED)))
