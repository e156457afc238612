"""RoPE against transformers, and a row of packed documents against the same documents alone."""
import collections
import dataclasses
import gc
import json
import math
import statistics
import weakref
from pathlib import Path

import pytest
import torch
from conftest import assert_close, row, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import parallel
import recompute
from bench.run import SHAPES
from costs import (
    GPUS,
    Work,
    attention_pairs,
    choose,
    crossing,
    flops,
    host_memory,
    mean_attention_pairs,
    memory,
    offloaded_bytes,
    offloading_seconds,
    step_seconds,
)
from model import Config, Execution, rope_cos_sin, rope_frequencies


def alone(model, ids, labels, start, end):
    """Return the logits and loss of tokens start to end as a row of their own."""
    n = end - start
    positions = torch.arange(n)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
    logits = model(ids[start:end], positions, cu_seqlens, n)
    loss = model(ids[start:end], positions, cu_seqlens, n, labels[start:end])
    return logits, loss


def test_packed_documents_are_the_documents_alone():
    model = tiny_model()
    ids, positions, cu_seqlens, max_seqlen, labels = row([5, 1, 17, 9])
    edges = cu_seqlens.tolist()
    documents = [alone(model, ids, labels, start, end) for start, end in zip(edges, edges[1:])]
    expected_logits = torch.cat([logits for logits, _ in documents])
    expected_loss = sum(loss for _, loss in documents)

    logits = model(ids, positions, cu_seqlens, max_seqlen)
    loss = model(ids, positions, cu_seqlens, max_seqlen, labels)
    assert_close(logits, expected_logits, "logits", atol=1e-5)
    assert_close(loss, expected_loss, "loss", rtol=1e-6)


def test_a_changed_document_leaves_the_others_bit_equal():
    model = tiny_model()
    ids, positions, cu_seqlens, max_seqlen, _ = row([5, 8, 9])
    before = model(ids, positions, cu_seqlens, max_seqlen)
    ids[5:13] = (ids[5:13] + 1) % 97
    after = model(ids, positions, cu_seqlens, max_seqlen)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[13:], after[13:])
    assert not torch.equal(before[5:13], after[5:13])


def test_without_varlen_a_token_sees_the_whole_row():
    model = tiny_model()
    ids, _, _, _, _ = row([5, 8])
    positions = torch.arange(13)
    one_segment = torch.tensor([0, 13], dtype=torch.int32)
    before = model(ids, positions, one_segment, 13)
    ids[0] = (ids[0] + 1) % 97
    after = model(ids, positions, one_segment, 13)
    assert not torch.equal(before[12], after[12])


EXECUTIONS = [
    Execution(recompute="all_but_attention"),
    Execution(recompute="all"),
    Execution(loss_chunk=7),
    Execution(recompute="all_but_attention", offload_layers=9),
    Execution(recompute="all", offload_layers=9),
    Execution(recompute="pairs"),
    Execution(recompute="pairs", offload_layers=1),
    Execution(recompute="all_but_attention", mlp_chunk=5, loss_chunk=9),
    Execution(offload_layers=1),
    Execution(offload_layers=9, mlp_chunk=6),
    Execution(mlp_chunk=6),
    Execution(recompute="all_but_attention", keep_layers=1, offload_layers=9, mlp_chunk=31),
]


def check_gradients(execution, **changes):
    """Assert that they are those of the plainest execution."""
    ids, positions, cu_seqlens, max_seqlen, labels = row([5, 1, 17, 9], masked=0.3)
    weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(1))
    plain = tiny_model(**changes)
    expected = plain(ids, positions, cu_seqlens, max_seqlen, labels, weights)
    expected.backward()

    model = tiny_model(execution=execution, **changes)
    loss = model(ids, positions, cu_seqlens, max_seqlen, labels, weights)
    loss.backward()
    assert_close(loss, expected, "loss", rtol=1e-6)
    for name, p in plain.named_parameters():
        largest = p.grad.abs().max().item()
        gradient = model.get_parameter(name).grad
        assert_close(gradient, p.grad, f"gradient of {name}", atol=1e-6 * largest, rtol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_execution_changes_no_gradient(execution):
    check_gradients(execution)


@pytest.mark.parametrize("heads,kv_heads", [(8, 4), (6, 2), (8, 1), (8, 8)])
@pytest.mark.parametrize("execution", [
    Execution(recompute="all"),
    Execution(recompute="pairs", offload_layers=1, mlp_chunk=7),
], ids=str)
def test_parts_of_the_heads_change_no_gradient(monkeypatch, execution, heads, kv_heads):
    """As in a long row: one query head at a time."""
    monkeypatch.setattr(recompute, "PART_WORK", 1)
    check_gradients(
        execution, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=3,
        qk_norm=True)


@pytest.mark.parametrize("compute", ["all", "pairs"])
def test_parts_keep_nothing_in_forward(monkeypatch, compute):
    """Neither q, k, v, the output nor a log-sum-exp. And the model attends in parts, of one head."""
    monkeypatch.setattr(recompute, "PART_WORK", 1)
    heads = []
    storages = []
    forward = recompute.KernelGraph.forward
    attend = recompute.AttendInParts.forward

    def recorded_forward(graph, kernel, q, k, v):
        heads.append(q.shape[1])
        out, others = forward(graph, kernel, q, k, v)
        storages.extend(weakref.ref(x.untyped_storage()) for x in others)
        return out, others

    def recorded_attend(ctx, kernel, parts, q, k, v):
        out = attend(ctx, kernel, parts, q, k, v)
        storages.extend(weakref.ref(x.untyped_storage()) for x in (q, k, v, out))
        return out

    monkeypatch.setattr(recompute.KernelGraph, "forward", recorded_forward)
    monkeypatch.setattr(recompute.AttendInParts, "forward", recorded_attend)
    model = tiny_model(execution=Execution(recompute=compute, mlp_chunk=7))
    ids, positions, cu_seqlens, max_seqlen, labels = row([16])
    loss = model(ids, positions, cu_seqlens, max_seqlen, labels)
    gc.collect()
    assert heads == [1] * 16        # 8 heads of 2 layers
    assert len(storages) > 8
    assert not any(storage() is not None for storage in storages)
    loss.backward()


def test_a_kernel_may_save_tensors_without_elements():
    """They have no address, and are still different tensors."""
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(torch.empty(0), torch.empty(0, dtype=torch.int64))
            return q.clone()

        @staticmethod
        def backward(ctx, grad_out):
            assert [x.dtype for x in ctx.saved_tensors] == [torch.float32, torch.int64]
            return grad_out, grad_out, grad_out

    graph = recompute.KernelGraph()
    q, k, v = [torch.randn(4, 2, 8) for _ in range(3)]
    out, others = graph.forward(Kernel.apply, q, k, v)
    graph.backward(q, k, v, out, iter(others), torch.ones_like(out))


@pytest.mark.parametrize("compute", ["none", "all_but_attention", "all"])
def test_both_halves_run_in_chunks(compute):
    block = tiny_model(execution=Execution(recompute=compute, mlp_chunk=7)).model["layers"][0]
    sizes = {"pre_attention": set(), "post_attention": set()}

    def record(name):
        half = getattr(block, name)

        def recorded(x, *args):
            sizes[name].add(len(x))
            return half(x, *args)

        setattr(block, name, recorded)

    record("pre_attention")
    record("post_attention")
    _, positions, cu_seqlens, _, _ = row([16])
    cos, sin = rope_cos_sin(tiny_config(), positions)
    segments = parallel.segments_of_rank(cu_seqlens, None, positions.device)
    block(torch.randn(16, 48, requires_grad=True), cos, sin, segments).sum().backward()
    assert sizes == {"pre_attention": {7, 2}, "post_attention": {7, 2}}


@pytest.mark.parametrize("tokens,heads,kv_heads,expected", [
    (2**18, 24, 8, [(6, 2)] * 4),       # no more than the row has work for
    (2**20, 24, 8, [(3, 1)] * 8),
    (2**20, 32, 32, [(4, 4)] * 8),
    (2**20, 4, 1, [(1, 1)] * 4),        # heads that share one of k and v
    (2**20, 28, 4, [(7, 1)] * 4),       # not 4 at a time, which would need two of k and v
    (2**15, 24, 8, [(24, 8)]),          # a short row
])
def test_heads_are_divided(tokens, heads, kv_heads, expected):
    parts = recompute.divide_heads(tokens, heads, kv_heads)
    sizes = [(q.stop - q.start, kv.stop - kv.start) for q, kv in parts]
    assert sizes == expected
    for q, kv in parts:
        assert kv.start == q.start * kv_heads // heads
        assert kv.stop == -(-q.stop * kv_heads // heads)
    assert [q.start for q, _ in parts[1:]] == [q.stop for q, _ in parts[:-1]]
    assert parts[-1][0].stop == heads


def test_a_part_is_freed_before_the_next(monkeypatch):
    """And the gradient of q is where q was."""
    monkeypatch.setattr(recompute, "PART_WORK", 1)
    made = []

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out = q + k + v
            ctx.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            assert not any(storage() is not None for storage in made)
            tensors = [*ctx.saved_tensors, *[grad_out.clone() for _ in range(3)]]
            made.extend(weakref.ref(x.untyped_storage()) for x in tensors)
            return tuple(tensors[4:])

    q, k, v = [torch.randn(16, 4, 8) for _ in range(3)]
    out = recompute.attend_in_parts(Kernel.apply, *[x.requires_grad_() for x in (q, k, v)])
    assert torch.equal(out, q + k + v)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert len(made) == 4 * 7
    assert all(torch.equal(x, torch.ones_like(x)) for x in gradients)
    assert gradients[0].data_ptr() == q.data_ptr()


def test_weighted_loss_is_the_plain_formula():
    model = tiny_model().double()
    ids, positions, cu_seqlens, max_seqlen, labels = row([5, 1, 17, 9], masked=0.3)
    weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(1))
    logits = model(ids, positions, cu_seqlens, max_seqlen)
    each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    expected = (each * weights).sum()

    loss = model(ids, positions, cu_seqlens, max_seqlen, labels, weights)
    assert_close(loss, expected, "loss", rtol=1e-6)
    no_targets = torch.full_like(labels, -100)
    assert model(ids, positions, cu_seqlens, max_seqlen, no_targets, weights) == 0


@pytest.mark.parametrize("recompute,offload,calls", [
    ("none", False, 2), ("none", True, 2), ("all_but_attention", False, 2), ("all_but_attention", True, 2),
    ("all", False, 4), ("all", True, 4), ("pairs", False, 5), ("pairs", True, 5)])
def test_how_often_the_attention_kernel_runs(monkeypatch, recompute, offload, calls):
    """In forward and backward of two layers: once a layer, unless everything is recomputed, and
    once more in the first of a pair."""
    kernel = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def counted(*args, **kwargs):
        seen.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    model = tiny_model(execution=Execution(recompute=recompute, offload_layers=9 if offload else 0))
    ids, positions, cu_seqlens, max_seqlen, labels = row([16])
    model(ids, positions, cu_seqlens, max_seqlen, labels).backward()
    assert len(seen) == calls


class LazyStream(TorchDispatchMode):
    """A stream of a GPU that copies nothing before it is waited for.

    As on a GPU, a tensor that is copied must not be freed until then. What is copied back is not a
    number before."""

    def __init__(self):
        super().__init__()
        self.queued = collections.deque()   # copies, as `later` returns them
        self.n_done = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function != torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))
        target, source = args[:2]
        if target.untyped_storage().nbytes() != recompute.SLAB:
            target.fill_(255)       # as bytes of a float, not a number
        self.queued.append((self.later(target), self.later(source)))
        return target

    def later(self, tensor):
        """Return a function that returns the tensor, whose memory it does not keep."""
        storage = weakref.ref(tensor.untyped_storage())
        view = tensor.storage_offset(), tensor.shape, tensor.stride()

        def get():
            assert storage() is not None, "freed before it was copied"
            return torch.empty(0, dtype=torch.uint8).set_(storage(), *view)

        return get

    def wait_stream(self, stream):
        """The computing stream has always done its work."""

    def wait_event(self, n_copies):
        """Copies up to an event of record_event are done."""
        while self.n_done < n_copies:
            target, source = self.queued.popleft()
            target().copy_(source())
            self.n_done += 1

    def record_event(self):
        return self.n_done + len(self.queued)


@pytest.fixture
def lazy_stream(monkeypatch):
    """Let Offload treat CPU tensors as those of a GPU, with small slabs. Return its stream."""
    stream = LazyStream()
    monkeypatch.setattr(recompute, "copies_by_stream", lambda tensor: True)
    monkeypatch.setattr(recompute, "pin", lambda tensor, owner: None)
    monkeypatch.setattr(recompute, "SLAB", 2**12)
    monkeypatch.setattr(recompute, "SMALL", 2**6)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return stream


@pytest.mark.parametrize("n", [1, 5000, 3 * 10**6])
def test_memory_to_be_pinned_is_touched(n):
    tensor = torch.full((n + 3,), math.nan)
    recompute.touch(tensor[3:])
    assert tensor[:3].isnan().all()
    assert torch.equal(tensor[3:], torch.zeros(n))


def gradients_of(model, lengths):
    ids, positions, cu_seqlens, max_seqlen, labels = row(lengths)
    model.zero_grad()
    model(ids, positions, cu_seqlens, max_seqlen, labels).backward()
    return [p.grad for p in model.parameters()]


OFFLOADS = [execution for execution in EXECUTIONS if execution.offload_layers > 0] + [
    Execution(recompute="all_but_attention", keep_layers=3, offload_layers=4),
    Execution(recompute="pairs", keep_layers=2, offload_layers=5),
]


@pytest.mark.parametrize("execution", OFFLOADS, ids=str)
def test_offloaded_tensors_come_back(lazy_stream, execution):
    """In steps whose rows and documents have other lengths, with the pinned memory of the longest."""
    plain = tiny_model(num_hidden_layers=6)
    model = tiny_model(num_hidden_layers=6, execution=execution)
    sizes = []
    for lengths in ([20, 30], [50], [17, 2, 5], [49, 1]):
        expected = gradients_of(plain, lengths)
        for found, gradient in zip(gradients_of(model, lengths), expected):
            largest = gradient.abs().max().item()
            assert_close(found, gradient, "gradient", atol=1e-5 * largest, rtol=1e-5)
        assert model.offload.stored == []
        assert not lazy_stream.queued       # all that came back was waited for
        sizes.append(len(model.offload.slabs))
        assert sizes[-1] * recompute.SLAB >= model.offload.n_used > 0
    assert 0 < sizes[-1] <= sizes[0] + 1


def forward_of_a_block(execution, method, offload=None):
    """Forward of one block -> its output, and weak references to the storages of the tensors that
    its method `method` received and returned."""
    block = tiny_model(execution=execution).model["layers"][0]
    original = getattr(block, method)
    storages = []

    def recorded(*args):
        results = original(*args)
        tensors = [*args, *(results if isinstance(results, tuple) else [results])]
        tensors = [x for x in tensors if torch.is_tensor(x)]
        storages.extend((x.shape, weakref.ref(x.untyped_storage())) for x in tensors)
        return results

    setattr(block, method, recorded)
    _, positions, cu_seqlens, max_seqlen, _ = row([16])
    cos, sin = rope_cos_sin(tiny_config(), positions)
    x = torch.randn(16, 48, requires_grad=True) * 1.0       # not a leaf, which would stay alive
    segments = parallel.segments_of_rank(cu_seqlens, None, x.device)
    return block(x, cos, sin, segments, offload), storages


@pytest.mark.parametrize("recompute,kept", [("all", [0, 1, 2, 3, 4]), ("pairs", [0, 2, 4])])
def test_which_inputs_of_blocks_are_kept(recompute, kept):
    model = tiny_model(execution=Execution(recompute=recompute), num_hidden_layers=5)
    inputs = []

    def record(block, args):
        inputs.append(weakref.ref(args[0].untyped_storage()))

    for block in model.model["layers"]:
        block.register_forward_pre_hook(record)
    ids, positions, cu_seqlens, max_seqlen, labels = row([16])
    loss = model(ids, positions, cu_seqlens, max_seqlen, labels)
    gc.collect()
    assert [i for i, storage in enumerate(inputs) if storage() is not None] == kept
    loss.backward()
    assert not any(storage() is not None for storage in inputs)


@pytest.mark.parametrize("recompute", ["none", "all_but_attention", "all"])
def test_recomputation_frees_q_k_v(recompute):
    y, storages = forward_of_a_block(Execution(recompute=recompute), "pre_attention")
    gc.collect()
    qkv_shapes = ((16, 8, 8), (16, 4, 8))
    alive = [storage() is not None for shape, storage in storages if shape in qkv_shapes]
    assert len(alive) == 3
    assert any(alive) == (recompute == "none")
    assert y.requires_grad


@pytest.mark.parametrize("method", ["pre_attention", "post_attention"])
def test_a_block_that_recomputes_nothing_offloads_all(monkeypatch, method):
    monkeypatch.setattr(recompute, "SMALL", 2**6)
    offload = recompute.Offload()
    stored = []
    store = offload.store
    offload.store = lambda tensor: stored.append(tensor.nbytes) or store(tensor)
    y, storages = forward_of_a_block(Execution(), method, offload)
    gc.collect()
    smallest_weight = 4 * 48 * 32   # of k_proj
    assert 0 < max(stored) < smallest_weight
    output = y.untyped_storage().data_ptr()
    alive = [shape for shape, storage in storages
             if storage() is not None and storage().data_ptr() != output]
    assert set(alive) <= {(16, 1, 4)}   # cos and sin, which all blocks have
    y.sum().backward()


@pytest.mark.parametrize("execution", OFFLOADS, ids=str)
def test_groups_are_released_and_prefetched_in_time(lazy_stream, execution):
    """While a group runs, only groups from n_released on have offloaded tensors on the GPU."""
    seen = []

    class Observed(recompute.Offload):
        def begin_group(self, group):
            offload = super().begin_group(group)
            for released in self.stored[:group.n_released]:
                assert all(offloaded.tensor is None for offloaded in released)
                seen.append("forward")
            return offload

        def prefetch(self, group, grad):
            super().prefetch(group, grad)
            assert len(self.stored) <= group.n_released
            for away in self.stored:
                assert all(offloaded.copy is None for offloaded in away)
                seen.append("backward")

    model = tiny_model(num_hidden_layers=6, execution=execution)
    model.offload = Observed()
    gradients_of(model, [20, 30])
    assert set(seen) == {"forward", "backward"}


def test_a_forward_without_backward_returns_its_pinned_memory(lazy_stream):
    model = tiny_model(execution=Execution(offload_layers=9))
    ids, positions, cu_seqlens, max_seqlen, labels = row([20, 30])
    sizes = []
    for _ in range(3):
        model(ids, positions, cu_seqlens, max_seqlen, labels)
        sizes.append(len(model.offload.slabs))
    assert sizes[0] == sizes[2]


def groups_of(*arguments):
    return [tuple(group) for group in recompute.divide_blocks(*arguments)]


def test_which_blocks_recompute_and_offload():
    """The last number: while the group runs, so many first groups have nothing on the GPU."""
    assert groups_of(3, "none", 0, 0) == [([i], "none", False, 0) for i in range(3)]
    # All offload: the copies of one group are under way while the next one computes.
    assert groups_of(3, "all", 0, 9) == [
        ([0], "all", True, 0), ([1], "all", True, 0), ([2], "all", True, 1)]
    assert groups_of(5, "all_but_attention", 2, 1) == [
        ([0], "all_but_attention", True, 0), ([1], "all_but_attention", False, 0),
        ([2], "all_but_attention", False, 0), ([3], "none", False, 1), ([4], "none", False, 1)]
    # More offload than recompute. They have the memory of blocks 5 to 8 until it is needed.
    assert groups_of(9, "all", 7, 5) == [
        ([0], "none", True, 0), ([1], "none", True, 0), ([2], "none", True, 0),
        ([3], "all", True, 0), ([4], "all", True, 1),
        ([5], "none", False, 2), ([6], "none", False, 3), ([7], "none", False, 5),
        ([8], "none", False, 5)]
    assert groups_of(6, "pairs", 1, 3) == [
        ([0, 1], "pairs", True, 0), ([2, 3], "pairs", True, 0), ([4], "pairs", False, 2),
        ([5], "none", False, 2)]


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_backward_frees_what_was_kept(execution):
    """Without waiting for Python's cycle collector: at a million tokens, what it has not found yet
    is 100 GiB. The loss still holds the graph."""
    gc.collect()
    gc.disable()
    try:
        y, storages = forward_of_a_block(execution, "post_attention")
        loss = y.sum()
        del y
        loss.backward()
        assert len(storages) >= 3
        assert not any(storage() is not None for _, storage in storages)
    finally:
        gc.enable()


ROPE_SCALINGS = [
    {},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
     "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]


@pytest.mark.parametrize("scaling", ROPE_SCALINGS, ids=lambda s: s.get("rope_type", "default"))
def test_rope_equals_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=512, num_attention_heads=8, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0, **scaling}))
    config = Config(
        vocab_size=1, hidden_size=512, intermediate_size=1, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64, rope_theta=50000.0,
        max_position_embeddings=512, rope_scaling=scaling or None)
    frequency, attention_factor = rope_frequencies(config)
    assert_close(frequency, theirs.inv_freq, "frequencies", rtol=1e-6)
    assert attention_factor == pytest.approx(theirs.attention_scaling)

    positions = torch.tensor([0, 1, 4095, 131071, 1000000])
    angle = positions.double()[:, None] * theirs.inv_freq.double()
    cos, sin = rope_cos_sin(config, positions)
    assert_close(cos[:, 0], angle.cos() * theirs.attention_scaling, "cos", atol=1e-6)
    assert_close(sin[:, 0], angle.sin() * theirs.attention_scaling, "sin", atol=1e-6)


def test_flops_by_hand():
    attention_weights = 48 * 8 * (2 * 8 + 2 * 4)
    mlp_weights = 3 * 48 * 80
    block = attention_weights + mlp_weights
    pairs = 50 * 50 / 2
    attention = 4 * 8 * 8 * pairs
    forward = 2 * (2 * 100 * block + attention) + 2 * 100 * 48 * 97
    config = tiny_config()
    assert attention_pairs([0, 50]) == pairs
    assert flops(config, 100, pairs) == (3 * forward, 3 * forward)

    recomputed = 2 * (2 * 100 * (block - 48 * 80) + attention)
    assert flops(config, 100, pairs, "all") == (3 * forward, 3 * forward + recomputed)
    # The first block of a pair is computed once more, and a single one is not.
    pairs_recomputed = recomputed + 2 * 100 * block + attention
    assert flops(config, 100, pairs, "pairs") == (3 * forward, 3 * forward + pairs_recomputed)
    assert flops(config, 100, pairs, "pairs", keep_layers=1)[1] == 3 * forward + recomputed / 2
    # Chunks recompute what follows attention, but its last product: o_proj, gate_proj and up_proj.
    chunks = 2 * (2 * 100 * (48 * 8 * 8 + 2 * 48 * 80))
    assert flops(config, 100, pairs, chunked=True) == (3 * forward, 3 * forward + chunks)
    # And q_proj and k_proj, where their outputs are normalized.
    chunks += 2 * (2 * 100 * 48 * 8 * (8 + 4))
    assert flops(tiny_config(qk_norm=True), 100, pairs, chunked=True)[1] == 3 * forward + chunks
    without_gate = forward - 2 * 2 * 100 * 48 * 80
    assert flops(tiny_config(mlp_gate=False), 100, pairs)[0] == 3 * without_gate


def test_pairs_within_a_window():
    """Ten tokens that see 4 each, but the first ones, and a document shorter than the window."""
    assert attention_pairs([0, 10, 13], window=4) == (10 ** 2 - 6 ** 2) / 2 + 3 ** 2 / 2


def test_pairs_of_layers_with_different_windows():
    every_third = dict(num_hidden_layers=3, sliding_window=4, sliding_layers=[0, 1])
    within = attention_pairs([0, 10, 13], window=4)
    whole = attention_pairs([0, 10, 13])
    pairs = mean_attention_pairs(tiny_config(**every_third), [0, 10, 13])
    assert pairs == (2 * within + whole) / 3
    config = tiny_config(**{**every_third, "sliding_layers": None})
    assert mean_attention_pairs(config, [0, 10, 13]) == within


def execution_of(constants, layers):
    """The constants of a row of bench/results.jsonl -> Execution, GLOBAL_BATCH_SIZE."""
    given = dict(constant.split("=") for constant in constants)

    def number(name, default):
        value = given.get(name, default)
        return layers if value in ("True", "-1") else int(value)

    execution = Execution(
        recompute=given.get("RECOMPUTE", "all_but_attention"),
        keep_layers=number("KEEP_LAYERS", 0),
        offload_layers=number("OFFLOAD_ACTIVATIONS", 0),
        mlp_chunk=number("MLP_CHUNK", 0),
        loss_chunk=number("LOSS_CHUNK", 8192),
        zero_stage=number("ZERO_STAGE", 2))
    return execution, number("GLOBAL_BATCH_SIZE", 1)


def measured_rows():
    """Yield what the runs of bench/results.jsonl that name their code were given and have taken:
    result, config, Work, Execution. With FlashAttention 4 only."""
    text = (Path(__file__).parents[1] / "bench/results.jsonl").read_text()
    for line in text.splitlines():
        result = json.loads(line)
        if "env" not in result or "ATTENTION=" in result["row"]:
            continue
        shape, gpus, length, *constants = result["row"].split()
        for name, value in result.get("memory_settings", {}).items():
            constants.append(f"{name}={value}")
        _, width, heads, kv_heads, inner, vocabulary, tied = SHAPES[shape]
        layers = result["layers"]
        config = Config(vocabulary, width, inner, layers, heads, kv_heads, head_dim=128,
                        tie_word_embeddings=tied)
        execution, global_batch_size = execution_of(constants, layers)
        P = int(gpus)
        T = int(length)
        given = dict(constant.split("=") for constant in constants)
        document = result.get("document") or int(given.get("SYNTHETIC_DOCUMENT", T))
        work = Work(T // P, T * document / 2, sp=P, ranks=P, accumulate=global_batch_size)
        yield result, config, work, execution


def test_memory_is_what_was_measured():
    errors = []
    for result, config, work, execution in measured_rows():
        if "note" in result:  # measured when more was kept or exchanged
            continue
        parts = memory(config, work, execution)
        total = sum(parts.values())
        if "MAX_STEPS=1" in result["row"].split():
            total -= parts["optimizer states"] * 2 / 3  # the first step has no moments yet
        assert_close(total, result["peak_memory_gib"], f"{result['row']}: {parts}", rtol=0.05)
        host = host_memory(config, work, execution)
        measured_host = result["peak_host_memory_gib"]
        assert_close(host, measured_host, f"{result['row']}: CPU memory", atol=0.2, rtol=0.05)
        errors.append(abs(total / result["peak_memory_gib"] - 1))
    assert len(errors) >= 12
    assert statistics.median(errors) < 0.01


def test_seconds_are_what_was_measured():
    compared = 0
    for result, config, work, execution in measured_rows():
        if "MAX_STEPS=1" in result["row"].split():
            continue  # the first step also pins memory
        if "document" in result:
            continue  # rows differ in their documents, so the median step is not the mean one
        parts = step_seconds(config, GPUS["H200"], work, execution)
        assert_close(sum(parts.values()), result["seconds"], f"{result['row']}: {parts}", rtol=0.1)
        compared += 1
    assert compared >= 18


LLAMA_3B = Config(128256, 3072, 8192, 28, 24, 8, 128, tie_word_embeddings=True)


def choose_for(length, document=None, given=None, gpu_memory=139.8, host=128):
    """Return the Execution for llama3.2-3b on one H200, or one of another memory."""
    gpu = GPUS["H200"]._replace(memory=gpu_memory)
    work = Work(length, length * (document or length) / 2)
    return choose(LLAMA_3B, gpu, work, Execution(), given or {}, host)


def test_replicas_of_one_rank_use_fsdp():
    """Their gradients are summed, so they are float32, and the weights are cast by FSDP2."""
    one = Work(8192, 8192**2 / 2)
    two = one._replace(replicas=2)
    parts = [step_seconds(LLAMA_3B, GPUS["H200"], work, Execution()) for work in (one, two)]
    assert parts[0]["gathers and reductions"] == 0 < parts[1]["gathers and reductions"]
    sizes = [memory(LLAMA_3B, work._replace(tokens=256), Execution()) for work in (one, two)]
    assert sum(sizes[0].values()) < sum(sizes[1].values())


def test_the_fastest_settings_that_fit_are_chosen():
    """Where nothing has to be recomputed nothing is; otherwise what was found best by hand."""
    assert choose_for(8192) == Execution()
    assert choose_for(32768) == Execution()
    offloaded = choose_for(131072)
    assert offloaded.recompute == "all_but_attention"
    assert offloaded.offload_layers + offloaded.keep_layers > 28    # some do both
    assert choose_for(131072, host=3).offload_layers == 0
    smaller = choose_for(131072, gpu_memory=120)
    assert smaller.keep_layers < offloaded.keep_layers
    long = choose_for(524288, document=8192)
    assert long.offload_layers > 0
    without_host = choose_for(524288, document=8192, host=3)
    assert without_host.recompute == "pairs"
    assert without_host.offload_layers == 0
    longest = choose_for(2**20, document=8192)
    assert longest.recompute == "pairs"
    assert longest.offload_layers > 0
    assert choose_for(2**20, document=8192, host=3) is None
    assert choose_for(2**24) is None


def test_how_long_blocks_wait_for_copies():
    """Blocks of 1 s in forward and 2 s in backward, whose copies take 3 s."""
    config = tiny_config()      # two blocks
    work = Work(100, pairs=0)
    execution = Execution(offload_layers=2)
    link = offloaded_bytes(config, work, execution) / 2 / 3
    gpu = GPUS["H200"]._replace(host_link=link)
    assert offloading_seconds(config, gpu, work, Execution(), 1) == 0
    # Forward ends after 2 s, and the copies after 1 + 3 + 3. In backward the second block begins
    # after 3 s, and the first after 6.
    assert offloading_seconds(config, gpu, work, execution, 1) == pytest.approx(5 + 4)
    faster = gpu._replace(host_link=6 * link)
    assert offloading_seconds(config, faster, work, execution, 1) == pytest.approx(0.5 + 0.5)


def test_copies_need_not_hide_behind_attention():
    """The documents may be shorter than those that the settings are chosen for."""
    for document in (1024, 131072):
        settings = choose_for(131072, document, host=1000)
        assert settings.offload_layers > 0
        short = Work(131072, pairs=131072 * 1024 / 2, document=131072)
        parts = step_seconds(LLAMA_3B, GPUS["H200"], short, settings)
        assert parts["offloading"] < 0.01 * sum(parts.values())


def test_host_memory_is_that_of_the_exchanged_outputs_too():
    """Where ranks share a document, as memory() has it."""
    execution = Execution(offload_layers=28)
    sizes = []
    for sp in (1, 2):
        work = Work(65536, pairs=0, sp=sp, ranks=sp, document=sp * 65536)
        sizes.append(host_memory(LLAMA_3B, work, execution))
    output = 28 * 65536 * 2 * 24 * 128 / 2**30
    assert sizes[1] - sizes[0] == pytest.approx(output)


def test_a_window_saves_no_exchange():
    """A document that crosses a border is exchanged whole, although its tokens see a few others."""
    gpu = GPUS["H200"]
    config = dataclasses.replace(LLAMA_3B, sliding_window=1024)
    pairs = mean_attention_pairs(config, [0, 262144])
    work = Work(65536, pairs, sp=4, ranks=4, document=262144)
    assert crossing(work) == 1
    settings = choose(config, gpu, work, Execution(), {}, host=128)
    parts = memory(config, work, settings)
    assert sum(parts.values()) <= 0.95 * gpu.memory


LLAMA_7B = Config(32000, 4096, 11008, 32, 32, 32, 128)


def test_the_best_measured_settings_are_chosen():
    """For two H200s at 128k, mixed lengths: all others that were tried took longer."""
    work = Work(65536, 131072 * 4600 / 2, sp=2, ranks=2, document=4600)
    settings = choose(LLAMA_7B, GPUS["H200"], work, Execution(), {}, host=128)
    assert settings == Execution(
        recompute="all_but_attention", keep_layers=20, zero_stage=3, offload_layers=20)


@pytest.mark.parametrize("length", [8192, 65536, 131072, 262144])
@pytest.mark.parametrize("size", [60, 80, 140])
def test_what_is_chosen_fits(length, size):
    settings = choose_for(length, gpu_memory=size)
    if settings is not None:
        parts = memory(LLAMA_3B, Work(length, pairs=0, document=length), settings)
        assert sum(parts.values()) <= 0.95 * size


def test_settings_that_are_given_stay():
    given = {"recompute": "all", "zero_stage": 3, "offload_layers": 5}
    settings = choose_for(32768, given=given)
    assert {name: getattr(settings, name) for name in given} == given
    given = {"recompute": "none", "offload_optimizer": False}
    assert choose_for(32768, given=given, gpu_memory=50) is None
    assert choose_for(524288, document=8192).mlp_chunk != 16384
    assert choose_for(524288, document=8192, given={"mlp_chunk": 16384}).mlp_chunk == 16384


def test_less_memory_takes_longer():
    """The settings that README lists, from the fastest to the least memory."""
    order = [
        Execution(),
        Execution(recompute="all_but_attention", keep_layers=14),
        Execution(recompute="all_but_attention"),
        Execution(recompute="all"),
        Execution(recompute="all", mlp_chunk=8192),
    ]
    work = Work(32768, 32768**2 / 2)
    sizes = []
    seconds = []
    for execution in order:
        sizes.append(sum(memory(LLAMA_3B, work, execution).values()))
        seconds.append(sum(step_seconds(LLAMA_3B, GPUS["H200"], work, execution).values()))
    assert seconds == sorted(seconds)
    assert sizes == sorted(sizes, reverse=True)
