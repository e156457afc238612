"""What a block keeps for backward: where it lies until then, and what is recomputed from it.

The class Block of model.py draws it: with RECOMPUTE a block keeps its input and the outputs of
attention, and recomputes the rest. Kept holds these tensors by name, and Offload moves them to CPU
memory. AttendWithRecompute runs the attention kernel's backward on recomputed q, k and v, so that
its forward runs only once.
"""
import contextlib
import functools
import weakref
from typing import NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks


def share_storage(a, b):
    """Whether two tensors are views of the same memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


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
        """-> the same part of `base`, which has the memory layout of the first one."""
        assert base.stride() == self.base_stride, f"strides {base.stride()}, not {self.base_stride}"
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


class SavedTensor:
    """What autograd saved: a tensor, or later only which view it was of one of several tensors."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        self.base_index = None
        self.view = None

    def replace_by_view(self, bases):
        """Let go of the tensor if it is a view of one of `bases`.

        Bases may share their storage, as q, k and v do after an exchange. Then any of them serves,
        since a View is an offset in memory."""
        for i, base in enumerate(bases):
            if share_storage(self.tensor, base):
                self.base_index = i
                self.view = View.of(self.tensor, base)
                self.tensor = None
                return

    def restore(self, bases):
        if self.tensor is not None:
            return self.tensor
        return self.view.take(bases[self.base_index])


class KernelGraph:
    """The autograd graph of one call of an attention kernel, without q, k, v and the output.

    A kernel saves these four for backward, 4 x (H + G) x D bytes a token in bfloat16. Here it runs
    in a graph of its own, on detached inputs. Of the four the graph keeps only which part was
    saved, so that their memory is freed; `backward` is given them again. What else the kernel
    saves, such as the log-sum-exp, stays saved."""

    def __init__(self):
        self.given = []     # q, k, v and the output while backward runs
        self.inputs = None
        self.out_edge = None

    def forward(self, kernel, q, k, v):
        """-> kernel(q, k, v)."""
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

        for saved in saved_tensors:
            saved.replace_by_view((q, k, v, out))
        # The graph needs its leaves, but not their values: it recorded their shapes in forward.
        for x in self.inputs:
            x.data = x.new_empty(0)
        return out.detach()

    def backward(self, q, k, v, out, grad_out):
        """-> the gradients of q, k and v. The four tensors are those of forward, up to rounding."""
        self.given.extend((q, k, v, out))
        gradients = torch.autograd.grad(self.out_edge, self.inputs, grad_out)
        self.given.clear()
        return gradients


class AttendWithRecompute(torch.autograd.Function):
    """kernel(q, k, v) of each of `kernels`; q, k, v and the outputs are not kept for backward.

    `recompute_tensors()` returns them in backward: a list of (q, k, v), and a list of outputs. Only
    the log-sum-exps are kept. So the forward of each kernel runs only once."""

    @staticmethod
    def forward(ctx, recompute_tensors, kernels, *qkv):
        """qkv: q, k, v of the first kernel, then of the next. -> the outputs."""
        ctx.recompute_tensors = recompute_tensors
        ctx.graphs = []
        outputs = []
        for i, kernel in enumerate(kernels):
            graph = KernelGraph()
            q, k, v = qkv[3 * i:3 * i + 3]
            outputs.append(graph.forward(kernel, q, k, v))
            ctx.graphs.append(graph)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        inputs, outputs = ctx.recompute_tensors()
        gradients = []
        for graph, (q, k, v), out, grad_out in zip(ctx.graphs, inputs, outputs, grad_outputs):
            gradients.extend(graph.backward(q, k, v, out, grad_out.contiguous()))
        # The loss refers to the graph, and the graph to this node, after backward as well. So let
        # go of what was kept for it now.
        ctx.graphs = None
        ctx.recompute_tensors = None
        return None, None, *gradients


class Kept:
    """What a block keeps for backward, by name. With `offload` it goes to CPU memory."""

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
    """A tensor in CPU memory, and later its copy on the GPU."""

    def __init__(self, buffer, host, device):
        self.buffer = buffer    # the pinned memory that `host` is the beginning of
        self.host = host
        self.device = device
        self.copy = None        # on the device, once it is being loaded
        self.loaded = None      # CUDA event: the copy is complete


class Offload:
    """Moves tensors to pinned CPU memory during forward, and back during backward.

    Copies run on a stream of their own: out while later blocks compute, back two tensors before
    they are needed. The pinned buffers are used again in the next step, whose rows may have other
    lengths."""

    def __init__(self):
        self.stream = None
        self.free_buffers = []      # pinned memory that is not in use, as tensors of bytes
        self.stored = []            # OffloadedTensors in the order of forward
        self.leaving = None         # (event, tensor) of the copy out that was queued last

    def store(self, tensor):
        """Queue the copy to CPU memory. -> OffloadedTensor for `load`."""
        if not tensor.is_cuda:  # for tests: a copy that autograd does not know
            offloaded = OffloadedTensor(buffer=None, host=None, device=tensor.device)
            offloaded.copy = tensor.clone()
            return offloaded
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        main = torch.cuda.current_stream()

        # Kernels queued from here on wait for the previous copy. So its tensor can be let go of,
        # and they may reuse its memory.
        if self.leaving is not None:
            event, _ = self.leaving
            main.wait_event(event)

        buffer = self.take_buffer(tensor.nbytes)
        host = buffer[:tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        offloaded = OffloadedTensor(buffer, host, tensor.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            offloaded.host.copy_(tensor, non_blocking=True)
        self.leaving = (self.stream.record_event(), tensor)
        self.stored.append(offloaded)
        return offloaded

    def load(self, offloaded):
        """-> the tensor on its device. Also queues copies of the two that backward needs next."""
        if offloaded in self.stored:
            index = self.stored.index(offloaded)
            for needed_soon in reversed(self.stored[max(index - 2, 0):index + 1]):
                self.queue_copy_back(needed_soon)
            del self.stored[index]
            self.leaving = None  # copied earlier on the same stream: the wait below is enough
        if offloaded.loaded is not None:
            torch.cuda.current_stream().wait_event(offloaded.loaded)
        return offloaded.copy

    def queue_copy_back(self, offloaded):
        if offloaded.copy is not None:
            return
        host = offloaded.host
        offloaded.copy = torch.empty(host.shape, dtype=host.dtype, device=offloaded.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            offloaded.copy.copy_(host, non_blocking=True)
        offloaded.loaded = self.stream.record_event()
        # Safe although the copy has not run: the next copy into the buffer is queued behind it.
        self.free_buffers.append(offloaded.buffer)

    def take_buffer(self, size):
        """-> the smallest free buffer of at least `size` bytes, or a new one.

        A new one takes the place of a free one that is too small. So there are never more than a
        step needs, even if its rows are longer than any before."""
        self.free_buffers.sort(key=len)
        for i, buffer in enumerate(self.free_buffers):
            if len(buffer) >= size:
                return self.free_buffers.pop(i)
        if self.free_buffers:
            self.stream.synchronize()   # a copy from it may be queued
            self.free_buffers.pop()
        return pinned_buffer(size)


def pinned_buffer(size):
    """-> at least `size` bytes of pinned CPU memory. RuntimeError if it cannot be pinned.

    It has up to 3% more, for tensors of rows that are longer by a few tokens. torch's own allocator
    of pinned memory rounds up to a power of two, which wastes up to half."""
    unit = 2 ** max(size.bit_length() - 6, 0)
    buffer = torch.empty(-(-size // unit) * unit, dtype=torch.uint8)
    pin(buffer, owner=buffer)
    return buffer


def pin(tensor, owner):
    """Pin the CPU memory of a tensor for as long as the object `owner`, which keeps it, exists.

    RuntimeError if the system refuses."""
    error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
    if error != 0:
        raise RuntimeError(
            f"{tensor.nbytes / 2**30:.1f} GiB of CPU memory cannot be pinned (CUDA error {error}): "
            "raise `ulimit -l`, or lower OFFLOAD_ACTIVATIONS")
    weakref.finalize(owner, torch.cuda.cudart().cudaHostUnregister, tensor.data_ptr())
