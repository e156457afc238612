"""RoPE against transformers, and a row of packed documents against the same documents alone."""
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from conftest import assert_close, row, tiny_config, tiny_model

from bench.run import SHAPES
from model import Config, Execution, Transformer, attention_pairs, flops, memory, rope_cos_sin, rope_frequencies

def test_packed_documents_are_the_documents_alone():
    model, lengths = tiny_model(), [5, 1, 17, 9]
    ids, positions, cu_seqlens, max_seqlen, labels = row(lengths)
    packed = model(ids, positions, cu_seqlens, max_seqlen)
    loss = model(ids, positions, cu_seqlens, max_seqlen, labels)
    alone, alone_loss = [], 0.0
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        one = torch.tensor([0, end - start], dtype=torch.int32)
        alone.append(model(ids[start:end], positions[start:end], one, end - start))
        alone_loss += model(ids[start:end], positions[start:end], one, end - start, labels[start:end])
    assert_close(packed, torch.cat(alone), "logits", atol=1e-5)
    assert_close(loss, alone_loss, "loss", rtol=1e-6)

def test_a_changed_document_leaves_the_others_bit_equal():
    model = tiny_model()
    ids, positions, cu_seqlens, max_seqlen, _ = row([5, 8, 9])
    before = model(ids, positions, cu_seqlens, max_seqlen)
    ids[5:13] = (ids[5:13] + 1) % 97
    after = model(ids, positions, cu_seqlens, max_seqlen)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[13:], after[13:])
    assert not torch.equal(before[5:13], after[5:13])

def test_without_varlen_a_token_sees_the_whole_row():
    model = tiny_model()
    ids, _, _, _, _ = row([5, 8])
    whole = torch.tensor([0, 13], dtype=torch.int32)
    before = model(ids, torch.arange(13), whole, 13)
    ids[0] = (ids[0] + 1) % 97
    assert not torch.equal(before[12], model(ids, torch.arange(13), whole, 13)[12])

EXECUTIONS = [Execution(recompute="all_but_attention"), Execution(recompute="all"), Execution(loss_chunk=7),
              Execution(recompute="all_but_attention", offload_layers=9), Execution(recompute="all", offload_layers=9),
              Execution(recompute="all_but_attention", mlp_chunk=5, loss_chunk=9), Execution(mlp_chunk=6),
              Execution(recompute="all_but_attention", keep_layers=1, offload_layers=9, mlp_chunk=31)]

@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_execution_changes_no_gradient(execution):
    ids, positions, cu_seqlens, max_seqlen, labels = row([5, 1, 17, 9], masked=0.3)
    weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(1))
    plain, other = tiny_model(), tiny_model(execution=execution)
    expected = plain(ids, positions, cu_seqlens, max_seqlen, labels, weights)
    loss = other(ids, positions, cu_seqlens, max_seqlen, labels, weights)
    assert_close(loss, expected, "loss", rtol=1e-6)
    expected.backward(), loss.backward()
    for name, p in plain.named_parameters():
        scale = p.grad.abs().max().item()
        assert_close(other.get_parameter(name).grad, p.grad, f"gradient of {name}", atol=1e-6 * scale, rtol=1e-5)

def test_weighted_loss_is_the_plain_formula():
    model = tiny_model().double()
    ids, positions, cu_seqlens, max_seqlen, labels = row([5, 1, 17, 9], masked=0.3)
    weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(1))
    logits = model(ids, positions, cu_seqlens, max_seqlen)
    each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    loss = model(ids, positions, cu_seqlens, max_seqlen, labels, weights)
    assert_close(loss, (each * weights).sum(), "loss", rtol=1e-6)
    nothing = torch.full_like(labels, -100)
    assert model(ids, positions, cu_seqlens, max_seqlen, nothing, weights) == 0

@pytest.mark.parametrize("recompute,calls", [("none", 2), ("all_but_attention", 2), ("all", 4)])
@pytest.mark.parametrize("offload", [False, True])
def test_attention_runs_forward_once_a_layer(monkeypatch, recompute, calls, offload):
    if offload and recompute == "none":
        offload = False
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *a, **k: seen.append(1) or kernel(*a, **k))
    model = tiny_model(execution=Execution(recompute=recompute, offload_layers=9 * offload))
    ids, positions, cu_seqlens, max_seqlen, labels = row([16])
    model(ids, positions, cu_seqlens, max_seqlen, labels).backward()
    assert len(seen) == calls

@pytest.mark.parametrize("recompute", ["none", "all_but_attention", "all"])
def test_recomputation_lets_go_of_q_k_v(recompute):
    block = tiny_model(execution=Execution(recompute=recompute)).model["layers"][0]
    project, storages = block.before, []

    def before(*args):
        qkv = project(*args)
        storages.extend(weakref.ref(t.untyped_storage()) for t in qkv)
        return qkv

    block.before = before
    ids, positions, cu_seqlens, max_seqlen, _ = row([16])
    x = torch.randn(16, 48, requires_grad=True)
    y = block(x, *rope_cos_sin(tiny_config(), positions), cu_seqlens, max_seqlen)
    gc.collect()
    assert any(s() is not None for s in storages) == (recompute == "none") and y.requires_grad

@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_backward_frees_what_was_kept(execution):
    """Without waiting for Python's cycle collector: at a million tokens what it has not found yet is 100 GiB."""
    block, storages = tiny_model(execution=execution).model["layers"][0], []
    after = block.after
    block.after = lambda x, a: storages.extend(weakref.ref(t.untyped_storage()) for t in (x, a)) or after(x, a)
    ids, positions, cu_seqlens, max_seqlen, _ = row([16])
    cos_sin = rope_cos_sin(tiny_config(), positions)
    gc.collect(), gc.disable()
    try:
        loss = block(torch.randn(16, 48, requires_grad=True) * 1.0, *cos_sin, cu_seqlens, max_seqlen).sum()
        loss.backward()
        assert storages and not any(s() is not None for s in storages), "and the loss still holds the graph"
    finally:
        gc.enable()

ROPE = [{}, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64}]

@pytest.mark.parametrize("scaling", ROPE, ids=lambda s: s.get("rope_type", "default"))
def test_rope_equals_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=512, num_attention_heads=8, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0, **scaling}))
    config = Config(1, 512, 1, 1, 8, 8, 64, rope_theta=50000.0, max_position_embeddings=512,
                    rope_scaling=scaling or None)
    frequency, amplitude = rope_frequencies(config)
    assert_close(frequency, theirs.inv_freq, "frequencies", rtol=1e-6)
    positions = torch.tensor([0, 1, 4095, 131071, 1000000])
    angle = positions.double()[:, None] * theirs.inv_freq.double()
    cos, sin = rope_cos_sin(config, positions)
    assert_close(cos[:, 0], angle.cos() * theirs.attention_scaling, "cos", atol=1e-6)
    assert_close(sin[:, 0], angle.sin() * theirs.attention_scaling, "sin", atol=1e-6)
    assert amplitude == pytest.approx(theirs.attention_scaling)

def test_flops_by_hand():
    config = tiny_model().config
    block = 48 * 8 * (2 * 8 + 2 * 4) + 3 * 48 * 80
    forward = 2 * 100 * (2 * block + 48 * 97) + 2 * 4 * 8 * 8 * 1250
    assert flops(config, 100, attention_pairs([0, 50])) == (3 * forward, 3 * forward)
    assert flops(config, 100, 1250, "all")[1] == 3 * forward + 2 * (2 * 100 * (block - 48 * 80) + 4 * 64 * 1250)
    assert attention_pairs([0, 10, 13], window=4) == 4 * 10 - 8 + 4.5
    without_gate = flops(tiny_config(mlp_gate=False), 100, 1250)[0]
    assert without_gate == 3 * (forward - 2 * 100 * 2 * 48 * 80)

def test_memory_is_what_was_measured():
    """By the rows that say which code they ran, on FlashAttention 4; without the one that memory() excludes."""
    lines = (Path(__file__).parents[1] / "bench/results.jsonl").read_text().splitlines()
    measured = {r["row"]: r for r in map(json.loads, lines) if "env" in r and "ATTENTION" not in r["row"]}
    seen = 0
    for name, result in measured.items():
        shape, gpus, length, *constants = name.split()
        if (gpus, length) == ("1", "524288"):
            continue
        L, (_, C, H, G, I, V, tied) = result["layers"], SHAPES[shape]
        given = dict(c.split("=") for c in constants)
        number = lambda name, default=0: L if given.get(name) == "True" else int(given.get(name, default))
        config = Config(V, C, I, L, H, G, 128, tie_word_embeddings=tied)
        execution = Execution("auto", given.get("RECOMPUTE", "all_but_attention"), number("KEEP_LAYERS"),
                              number("OFFLOAD_ACTIVATIONS"), number("MLP_CHUNK"), number("LOSS_CHUNK", 8192))
        sizes = int(length) // int(gpus), int(gpus)
        parts = memory(config, *sizes, execution, number("ZERO_STAGE", 2), number("GLOBAL_BATCH_SIZE", 1))
        assert_close(sum(parts.values()), result["peak_memory_gib"], f"{name}: {parts}", rtol=0.12)
        seen += 1
    assert seen >= 6
