"""Hugging Face folders in and out: every family beside transformers or a plain reference, and every fault by its
name."""
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY, assert_close, on_ranks, row, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import parallel
import train
from model import Config, Transformer, rope_cos_sin, rope_frequencies
from tools import check

ODD = dict(num_attention_heads=6, num_key_value_heads=3, head_dim=10)
BIASED = {"attention_bias": True}
FAMILIES = [
    ("llama", {}), ("llama", {**BIASED, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 5}), ("mistral", {"sliding_window": None}),
    ("qwen2", {"head_dim": 8}), ("qwen2", {"tie_word_embeddings": True, "head_dim": 8}), ("qwen3", {}),
    ("qwen3", {**BIASED, "tie_word_embeddings": True}), ("internlm3", {}), ("internlm3", {**BIASED, "mlp_bias": True}),
    ("gemma", {"tie_word_embeddings": True}), ("gemma", {**BIASED, "tie_word_embeddings": False}),
    ("cohere", {"logit_scale": 0.3, "head_dim": 8}), ("cohere", {"use_qk_norm": True, "head_dim": 8, **BIASED}),
    ("cohere", {"use_qk_norm": True, "head_dim": 8, "tie_word_embeddings": False}),
    ("starcoder2", {}), ("starcoder2", {"tie_word_embeddings": False, "use_bias": False, "sliding_window": 5})]

def load(folder):
    model = Transformer(convert.load_config(folder))
    convert.load_weights(model, folder)
    return model

def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}

def assert_same_tensors(actual, expected):
    actual, expected = tensors(actual), tensors(expected)
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        assert actual[name].dtype == t.dtype and torch.equal(actual[name], t), name

def edit_config(folder, drop=(), **changes):
    c = json_of(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**c, **changes}.items() if k not in drop}))
    return folder

@pytest.mark.parametrize("model_type,changes", FAMILIES, ids=str)
def test_family_equals_transformers(hf_folder, tmp_path, model_type, changes):
    folder, theirs = hf_folder(model_type, **{**ODD, **changes})
    if model_type == "internlm3":  # transformers calls it a Llama, its authors do not
        bias = changes.get("attention_bias", False)
        edit_config(folder, BIASED | {"mlp_bias": 1}, architectures=["InternLM3ForCausalLM"], qkv_bias=bias, bias=bias)
    ours = load(folder)
    assert ours.config.architecture.lower().startswith(model_type)
    ids, positions, cu_seqlens, max_seqlen, labels = row([23])
    expected = theirs(ids[None]).logits[0]
    logits = ours(ids, positions, cu_seqlens, max_seqlen)
    assert_close(logits, expected, "logits", atol=1e-5 * expected.abs().max().item())
    torch.nn.functional.cross_entropy(expected, labels, reduction="sum").backward()
    ours(ids, positions, cu_seqlens, max_seqlen, labels).backward()
    found = {convert.their_name(ours.config, name): p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        assert_close(found.pop(name), p.grad, f"gradient of {name}", atol=1e-4 * p.grad.abs().max().item(), rtol=1e-4)
    assert not found
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    from transformers import AutoConfig, AutoModelForCausalLM
    before, after = AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(tmp_path / "out")
    assert before.rope_parameters == after.rope_parameters
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(again(ids[None]).logits[0], expected)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_in_small_shards_is_bit_equal(hf_folder, tokenizer_files, tmp_path, monkeypatch, dtype):
    folder, theirs = hf_folder("llama", **ODD, tie_word_embeddings=True, eos_token_id=[2, 3])
    theirs.to(dtype).save_pretrained(folder)
    tokenizer_files(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3],  "temperature": 0.6}')
    edit_config(folder, my_own_key={"kept": 1}, auto_map={"AutoConfig": "x.Y"})
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    convert.save_weights(load(folder), folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    shards = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    n = len(shards)
    assert n > 1 and shards == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for name in shards:
        held = load_file(tmp_path / "out" / name)
        size = sum(t.nbytes for t in held.values())
        total += size
        assert size <= 20_000 or len(held) == 1
        assert {k for k, file in index["weight_map"].items() if file == name} == held.keys()
        with safe_open(tmp_path / "out" / name, "pt") as f:
            assert f.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total and "lm_head.weight" not in index["weight_map"]
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes(), file
    c = json_of(tmp_path / "out")
    assert c["my_own_key"] == {"kept": 1} and c["eos_token_id"] == [2, 3] and "auto_map" not in c
    assert c["torch_dtype"] == c["dtype"] == str(dtype).removeprefix("torch.")
    convert.save_weights(load(tmp_path / "out"), tmp_path / "out", tmp_path / "out2")
    assert_same_tensors(tmp_path / "out2", folder)

# ------------------------------------------------------------------------------ families whose code is in the folder

def written_folder(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text("class C: pass\n")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder

def json_of(folder):
    return json.loads((folder / "config.json").read_text())

def remote_folder(folder, architecture, tensors, drop=(), **changes):
    """The folder of tiny_model() as another architecture would have written it."""
    c = {k: v for k, v in TINY.items() if k != "head_dim" and k not in drop}
    c.update(architectures=[architecture], max_position_embeddings=512, torch_dtype="float32", rms_norm_eps=1e-6,
             auto_map={"AutoConfig": "configuration.C"}, attn_implementation="eager", **changes)
    return written_folder(folder, c, tensors)

def widened(**changes):
    return tiny_model(hidden_size=64, **changes)

def internlm2_folder(folder, bias):
    """-> the folder, and the model that was fused into it."""
    llama = widened(qkv_bias=bias, o_bias=bias)
    theirs = {"model.tok_embeddings.weight": llama.model["embed_tokens"].weight,
              "model.norm.weight": llama.model["norm"].weight, "output.weight": llama.lm_head.weight}
    for i, block in enumerate(llama.model["layers"]):
        a, m, at = block.self_attn, block.mlp, f"model.layers.{i}."
        for kind in ("weight", "bias") if bias else ("weight",):
            q, k, v = (getattr(w, kind) for w in (a.q_proj, a.k_proj, a.v_proj))
            rows = []
            for g in range(4):  # 8 heads, 4 key/value heads of 8 rows each
                rows += [q[16 * g:16 * g + 8], q[16 * g + 8:16 * g + 16], k[8 * g:8 * g + 8], v[8 * g:8 * g + 8]]
            theirs |= {at + f"attention.wqkv.{kind}": torch.cat(rows),
                       at + f"attention.wo.{kind}": getattr(a.o_proj, kind)}
        theirs |= {at + "attention_norm.weight": block.input_layernorm.weight,
                   at + "ffn_norm.weight": block.post_attention_layernorm.weight,
                   at + "feed_forward.w1.weight": m.gate_proj.weight, at + "feed_forward.w3.weight": m.up_proj.weight,
                   at + "feed_forward.w2.weight": m.down_proj.weight}
    remote_folder(folder, "InternLM2ForCausalLM", theirs, model_type="internlm", bias=bias,
                  rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1e6)
    return edit_config(folder, hidden_size=64), llama

@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_fuses_by_key_value_head(tmp_path, bias):
    folder, llama = internlm2_folder(tmp_path / "hf", bias)
    ours = load(folder)
    for name, p in llama.named_parameters():
        assert torch.equal(ours.get_parameter(name), p), name
    assert ours.config.rope_theta == 1e6 and ours.config.rope_scaling == {"rope_type": "dynamic", "factor": 2.0}
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    c = json_of(tmp_path / "out")
    assert c["auto_map"] and (tmp_path / "out" / "configuration.py").exists()  # or nothing could open it
    assert c["rope_scaling"] == {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}

def load_sharded(folder):
    grid = parallel.init(1, 1)
    with torch.device("meta"):
        model = Transformer(convert.load_config(folder), grid.sp_group)
    parallel.shard(model, model.model["layers"], grid, torch.float32, 3, False)
    convert.load_weights(model, folder)
    return grid, model

def load_and_save_shards(folder, expected, out):
    grid, model = load_sharded(folder)
    for name, rows, first in model.local_parameters():
        assert torch.equal(rows, expected.get_parameter(name)[first:first + len(rows)]), f"{name} on rank {grid.rank}"
    convert.save_weights(model, folder, out)

def test_fused_tensors_are_loaded_and_saved_by_shards(tmp_path):
    """Of 3 ranks, whose shares of the rows end inside a key/value head."""
    folder, llama = internlm2_folder(tmp_path / "hf", bias=True)
    on_ranks(3, load_and_save_shards, folder, llama, tmp_path / "out", tmp_path=tmp_path)
    assert_same_tensors(tmp_path / "out", folder)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 3

@pytest.mark.parametrize("architecture", ["BaiChuanForCausalLM", "BaichuanForCausalLM"])
def test_baichuan_fuses_q_k_v_and_its_second_normalizes_the_head(tmp_path, architecture):
    llama = widened(num_key_value_heads=8)
    theirs = dict(llama.named_parameters())
    for i in range(2):
        at = f"model.layers.{i}.self_attn."
        theirs[at + "W_pack.weight"] = torch.cat([theirs.pop(f"{at}{x}_proj.weight") for x in "qkv"])
    folder = remote_folder(tmp_path / "hf", architecture, theirs, drop=("num_key_value_heads",), model_type="baichuan")
    edit_config(folder, hidden_size=64, model_max_length=512)
    ours = load(folder)
    second = architecture == "BaichuanForCausalLM"
    if second:
        with torch.no_grad():
            llama.lm_head.weight /= llama.lm_head.weight.norm(dim=1, keepdim=True)
    ids, positions, cu_seqlens, max_seqlen, labels = row([23])
    expected = llama(ids, positions, cu_seqlens, max_seqlen)
    assert_close(ours(ids, positions, cu_seqlens, max_seqlen), expected, "logits", atol=1e-5)
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    with pytest.raises(ValueError, match="reads no rope_scaling"):
        convert.extend_context(ours.config, 4096, None, 512)
    if second:
        with pytest.raises(ValueError, match="BaichuanForCausalLM .* 13B, whose ALiBi is not supported"):
            convert.load_config(edit_config(folder, drop=["max_position_embeddings"]))

def plain_decoder(layers, x, head_dim, turn):
    """x (n, C) through `layers`, each one a dict of the steps' matrices; turn rotates (n, heads, head_dim)."""
    rms = lambda x, w: w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    for w in layers:
        h = rms(x, w["norm1"])
        q, k, v = ((h @ m.T + b).unflatten(-1, (-1, head_dim)) for m, b in zip(w["qkv"], w["bias"]))
        q, k = turn(q), turn(k)
        heads = []
        for i in range(q.shape[1]):
            j = i * k.shape[1] // q.shape[1]  # heads in a row share a key/value head
            scores = (q[:, i] @ k[:, j].T / head_dim ** 0.5).masked_fill(~causal, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, j])
        x = x + torch.cat(heads, -1) @ w["o"].T
        h = rms(x, w["norm2"])
        x = x + (torch.nn.functional.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
    return rms(x, layers[0]["last"])

def random_tensors(**shapes):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1) for name, shape in shapes.items()}

def equals_the_plain_one(folder, tmp_path, expected, ids):
    """`folder` as this model has the logits `expected`, is written back bit for bit, and refuses a longer context."""
    ours, n = load(folder), len(ids)
    logits = ours(ids, torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)
    assert_close(logits, expected, "logits", atol=1e-5 * expected.abs().max().item())
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    assert json_of(tmp_path / "out") == {**json_of(folder), "dtype": "float32"}
    with pytest.raises(ValueError, match="reads no rope_scaling"):
        convert.extend_context(ours.config, 4096, None, 512)
    return ours

def test_qwen_1_against_a_plain_reference(tmp_path):
    t, V, C, I = {}, 97, 48, 40
    for i in range(2):
        at = f"transformer.h.{i}."
        t |= {at + "ln_1.weight": (C,), at + "ln_2.weight": (C,), at + "attn.c_attn.weight": (3 * C, C),
              at + "attn.c_attn.bias": (3 * C,), at + "attn.c_proj.weight": (C, C), at + "mlp.w1.weight": (I, C),
              at + "mlp.w2.weight": (I, C), at + "mlp.c_proj.weight": (C, I)}
    t = random_tensors(**t, **{"transformer.wte.weight": (V, C), "transformer.ln_f.weight": (C,),
                               "lm_head.weight": (V, C)})
    config = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": V, "hidden_size": C,
              "intermediate_size": 2 * I, "num_hidden_layers": 2, "num_attention_heads": 6, "kv_channels": 8,
              "layer_norm_epsilon": 1e-6, "rotary_emb_base": 5000, "rotary_pct": 1.0, "seq_length": 512,
              "max_position_embeddings": 8192, "no_bias": True, "scale_attn_weights": True, "use_dynamic_ntk": True,
              "use_logn_attn": True, "use_flash_attn": "auto", "attn_dropout_prob": 0.0, "tie_word_embeddings": False,
              "torch_dtype": "float32", "auto_map": {"AutoConfig": "configuration.C"}}
    folder = written_folder(tmp_path / "hf", config, t)
    layers = [{"norm1": t[f"{at}ln_1.weight"], "norm2": t[f"{at}ln_2.weight"], "last": t["transformer.ln_f.weight"],
               "qkv": t[f"{at}attn.c_attn.weight"].split(C), "bias": t[f"{at}attn.c_attn.bias"].split(C),
               "o": t[f"{at}attn.c_proj.weight"], "gate": t[f"{at}mlp.w2.weight"], "up": t[f"{at}mlp.w1.weight"],
               "down": t[f"{at}mlp.c_proj.weight"]} for at in ("transformer.h.0.", "transformer.h.1.")]
    ids = row([23])[0]

    def turn(x):  # dimensions 0..3 are the real parts, 4..7 the imaginary ones
        angle = torch.arange(23)[:, None] / 5000 ** (torch.arange(4) / 4)
        z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((z.real, z.imag), -1)

    expected = plain_decoder(layers, t["transformer.wte.weight"][ids], 8, turn) @ t["lm_head.weight"].T
    config = equals_the_plain_one(folder, tmp_path, expected, ids).config
    assert (config.max_position_embeddings, config.intermediate_size) == (512, I)
    source = json_of(folder)
    for changes in ({"no_bias": False}, {"scale_attn_weights": False}, {"rotary_pct": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} .* changes the computation"):
            convert.load_config(written_folder(tmp_path / "hf", {**source, **changes}, t))

@pytest.mark.parametrize("architecture", ["ChatGLMModel", "ChatGLMForConditionalGeneration"])
def test_chatglm_3_against_a_plain_reference(tmp_path, architecture):
    t, V, C, I, D, H, G = {}, 97, 48, 40, 16, 4, 2
    for i in range(2):
        at = f"transformer.encoder.layers.{i}."
        t |= {at + "input_layernorm.weight": (C,), at + "post_attention_layernorm.weight": (C,),
              at + "self_attention.query_key_value.weight": ((H + 2 * G) * D, C),
              at + "self_attention.query_key_value.bias": ((H + 2 * G) * D,),
              at + "self_attention.dense.weight": (C, H * D), at + "mlp.dense_h_to_4h.weight": (2 * I, C),
              at + "mlp.dense_4h_to_h.weight": (C, I)}
    t = random_tensors(**t, **{
        "transformer.embedding.word_embeddings.weight": (V, C), "transformer.encoder.final_layernorm.weight": (C,),
        "transformer.output_layer.weight": (V, C)})
    config = {"architectures": [architecture], "model_type": "chatglm", "padded_vocab_size": V, "hidden_size": C,
              "ffn_hidden_size": I, "num_layers": 2, "num_attention_heads": H, "multi_query_attention": True,
              "multi_query_group_num": G, "kv_channels": D, "layernorm_epsilon": 1e-6, "rmsnorm": True,
              "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
              "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "rope_ratio": 2,
              "attention_dropout": 0.0, "bias_dropout_fusion": True, "fp32_residual_connection": False,
              "original_rope": True, "post_layer_norm": True, "seq_length": 512, "tie_word_embeddings": False,
              "quantization_bit": 0, "torch_dtype": "float32", "auto_map": {"AutoConfig": "configuration.C"}}
    folder = written_folder(tmp_path / "hf", config, t)
    layers = []
    for at in ("transformer.encoder.layers.0.", "transformer.encoder.layers.1."):
        gate, up = t[at + "mlp.dense_h_to_4h.weight"].chunk(2)
        weight, bias = (t[at + f"self_attention.query_key_value.{kind}"].split([H * D, G * D, G * D])
                        for kind in ("weight", "bias"))
        layers.append({"norm1": t[at + "input_layernorm.weight"], "norm2": t[at + "post_attention_layernorm.weight"],
                       "last": t["transformer.encoder.final_layernorm.weight"], "qkv": weight, "bias": bias,
                       "o": t[at + "self_attention.dense.weight"], "gate": gate, "up": up,
                       "down": t[at + "mlp.dense_4h_to_h.weight"]})
    ids = row([23])[0]

    def turn(x):  # of 16 dimensions the first 8 turn, as pairs of neighbours
        angle = torch.arange(23)[:, None] / 20000 ** (torch.arange(4) / 4)
        z = torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2)).contiguous())
        z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((torch.view_as_real(z).flatten(-2), x[..., 8:]), -1)

    x = plain_decoder(layers, t["transformer.embedding.word_embeddings.weight"][ids], D, turn)
    equals_the_plain_one(folder, tmp_path, x @ t["transformer.output_layer.weight"].T, ids)
    source = json_of(folder)
    for changes in ({"rmsnorm": False}, {"multi_query_attention": False}, {"add_bias_linear": True}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} .* changes the computation"):
            convert.load_config(written_folder(tmp_path / "hf", {**source, **changes}, t))

def test_internlm_and_old_yi(tmp_path):
    llama = widened(qkv_bias=True, o_bias=True)
    folder = remote_folder(tmp_path / "internlm", "InternLMForCausalLM", dict(llama.named_parameters()), bias=True)
    config = load(edit_config(folder, hidden_size=64)).config
    assert config.qkv_bias and config.o_bias and not config.mlp_bias
    convert.extend_context(config, 0, None, 2048)  # its dynamic base, of factor 1, at the length of the rows
    assert config.rope_theta == pytest.approx(10000 * 4 ** (8 / 6)) and config.rope_scaling is None
    llama = widened()
    names = {n.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"): p
             for n, p in llama.named_parameters()}
    folder = remote_folder(tmp_path / "yi", "YiForCausalLM", names, model_type="Yi", rope_theta=5e6)
    ours = load(edit_config(folder, hidden_size=64))
    assert ours.config.rope_theta == 5e6
    assert all(torch.equal(ours.get_parameter(n), p) for n, p in llama.named_parameters())
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)

def test_other_architectures_are_refused(hf_folder):
    folder, _ = hf_folder()
    with pytest.raises(ValueError, match="architecture MixtralForCausalLM is not supported: use one of Llama"):
        convert.load_config(edit_config(folder, architectures=["MixtralForCausalLM"]))

# ------------------------------------------------------------------------------------------------- context extension

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
EXTENSIONS = [  # MAX_POSITION_EMBEDDINGS, ROPE_SCALING, the checkpoint's scaling, the factor
    (1500, None, None, 3.0), (2048, "yarn", None, 4.0), (2048, {"type": "llama3"}, None, 4.0),
    (0, {"rope_type": "linear", "factor": 2.5}, None, 2.5), (2048, {"rope_theta": 5e5}, None, None),
    (1024, None, {"rope_type": "linear", "factor": 4.0}, 8.0), (1024, None, LLAMA3, 16.0),
    (2048, {"rope_type": "linear", "rope_theta": 5e4}, None, 4.0),
    (2048, {"rope_type": "dynamic"}, None, None), (0, None, {"rope_type": "dynamic", "factor": 6.0}, None)]

@pytest.mark.parametrize("positions,scaling,had,factor", EXTENSIONS, ids=str)
def test_extended_context_is_what_transformers_serves(hf_folder, tmp_path, positions, scaling, had, factor):
    changes = {"rope_parameters": {"rope_theta": 10000.0, **had}} if had else {}
    folder, _ = hf_folder("llama", head_dim=16, **changes)
    ours, length = load(folder), 2048
    convert.extend_context(ours.config, positions, scaling, length)
    assert (ours.config.rope_scaling or {}).get("factor") == factor
    convert.save_weights(ours, folder, tmp_path / "out")
    from transformers import AutoConfig, AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ids, _, cu_seqlens, max_seqlen, _ = row([40])
    far = torch.arange(40) * 50  # up to position 1950, where transformers' float32 angles are 1e-4 off
    expected = theirs(ids[None], position_ids=far[None]).logits[0]
    assert_close(ours(ids, far, cu_seqlens, max_seqlen), expected, "logits", atol=1e-4 * expected.abs().max().item())
    c = json_of(tmp_path / "out")
    assert c["max_position_embeddings"] >= max(positions, 512)
    new, old = c["rope_parameters"], {"rope_theta": c["rope_theta"], **(c["rope_scaling"] or {"rope_type": "default"})}
    assert new == {k: v for k, v in old.items() if k != "type"}
    assert old.get("type", old["rope_type"]) == new["rope_type"]
    again = convert.load_config(tmp_path / "out")
    assert torch.equal(rope_frequencies(again)[0], rope_frequencies(ours.config)[0])
    before = (again.rope_theta, again.rope_scaling)
    convert.extend_context(again, positions, scaling if factor else None, length)  # the same once more: nothing
    assert (again.rope_theta, again.rope_scaling) == before
    if had is None and factor and positions:
        assert factor == math.ceil(positions / 512)
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == ours.config.rope_theta

@pytest.mark.parametrize("length", [512, 131072, 1048576])
def test_dynamic_is_frozen_at_the_training_length(length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    scaling = {"rope_type": "dynamic", "factor": 6.0}
    config = Config(1, 512, 1, 1, 8, 8, 64, rope_theta=50000.0, max_position_embeddings=512, rope_scaling=dict(scaling))
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=512,
                         rope_parameters={**scaling, "rope_theta": 50000.0})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=length)
    convert.extend_context(config, 0, None, length)
    assert_close(rope_frequencies(config)[0], expected, "frequencies", rtol=1e-6)
    cos, _ = rope_cos_sin(config, torch.tensor([0, 1, 4095, 131071, 1000000]))
    angle = torch.tensor([0, 1, 4095, 131071, 1000000]).double()[:, None] * rope_frequencies(config)[0].double()
    assert_close(cos[:, 0], angle.cos(), "cos", atol=1e-6)

@pytest.mark.parametrize("positions,scaling,message", [
    (256, None, "256 is less than the checkpoint's 512"), (1024, {"rope_type": "su"}, "'su' is unknown"),
    (1024, {"rope_type": "yarn"}, "needs its factor"),
    (1024, {"type": "linear", "facotr": 2.0}, "facotr 2.0 is not supported: use .*, factor,")])
def test_extensions_that_cannot_be_are_refused(positions, scaling, message):
    config = Config(1, 512, 1, 1, 8, 8, 64, max_position_embeddings=512)
    config.rope_scaling = {"rope_type": "linear", "factor": 2.0} if "needs" in message else None
    with pytest.raises(ValueError, match=message):
        convert.extend_context(config, positions, scaling, 512)

# ------------------------------------------------------------------------------------ config.json as it is published

ALWAYS = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True,
          "transformers_version": "4.40.0", "_name_or_path": "somebody/model"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1,
         "rope_scaling": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
LLAMA31 = {**LLAMA, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "rope_theta": 500000.0,
           "max_position_embeddings": 131072, "vocab_size": 128256}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
           "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "attention_dropout": 0.0}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "attention_dropout": 0.0,
         "rms_norm_eps": 1e-6, "use_sliding_window": False, "rope_theta": 1000000.0, "tie_word_embeddings": False}
INTERNLM = {"hidden_act": "silu", "pad_token_id": 2, "tie_word_embeddings": False, "attn_implementation": "eager",
            "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"}}
GEMMA = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "attention_bias": False, "head_dim": 256,
         "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_activation": None, "rms_norm_eps": 1e-6,
         "rope_scaling": None, "rope_theta": 10000.0, "max_position_embeddings": 8192, "vocab_size": 256000}
COHERE = {"architectures": ["CohereForCausalLM"], "model_type": "cohere", "attention_bias": False, "hidden_act": "silu",
          "attention_dropout": 0.0, "layer_norm_eps": 1e-5, "model_max_length": 131072, "vocab_size": 256000}
BAICHUAN = {"model_type": "baichuan", "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "max_position_embeddings": 4096, "_from_model_config": True, "pad_token_id": 0,
            "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}}
GLM = {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True,
       "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "rmsnorm": True,
       "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "kv_channels": 128,
       "classifier_dropout": None, "fp32_residual_connection": False, "hidden_dropout": 0.0, "post_layer_norm": True,
       "multi_query_attention": True, "original_rope": True, "tie_word_embeddings": False, "multi_query_group_num": 2}

def sizes(C, I, L, H, G=None, **more):
    grouped = {"num_key_value_heads": G} if G else {}
    return {"hidden_size": C, "intermediate_size": I, "num_hidden_layers": L, "num_attention_heads": H, **grouped,
            **more}

def llama3(factor):
    return {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192}

PUBLISHED = {  # name: (config.json, what is expected of Config)
    "Llama 1 7B": ({**LLAMA, **sizes(4096, 11008, 32, 32), "max_sequence_length": 2048, "vocab_size": 32000,
                    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "pad_token_id": 0},
                   {"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 1e4, "rms_norm_eps": 1e-6}),
    "Llama 2 70B": ({**LLAMA, **sizes(8192, 28672, 80, 64, 8), "max_position_embeddings": 4096, "vocab_size": 32000},
                    {"num_key_value_heads": 8, "rope_theta": 1e4, "qkv_bias": False}),
    "Llama 3 8B": ({**LLAMA, **sizes(4096, 14336, 32, 32, 8), "rope_theta": 500000.0, "vocab_size": 128256,
                    "max_position_embeddings": 8192, "attention_bias": False}, {"rope_theta": 5e5}),
    "Llama 3.1 8B": ({**LLAMA31, **sizes(4096, 14336, 32, 32, 8), "rope_scaling": llama3(8.0)},
                     {"rope_scaling": llama3(8.0), "max_position_embeddings": 131072}),
    "Llama 3.2 1B": ({**LLAMA31, **sizes(2048, 8192, 16, 32, 8, head_dim=64), "tie_word_embeddings": True,
                      "rope_scaling": llama3(32.0)}, {"head_dim": 64, "tie_word_embeddings": True}),
    "Llama 3.3 70B": ({**LLAMA31, **sizes(8192, 28672, 80, 64, 8, head_dim=128), "rope_scaling": llama3(8.0),
                       "eos_token_id": [128001, 128008, 128009]}, {"head_dim": 128, "mlp_bias": False}),
    "SmolLM2 135M": ({**LLAMA, **sizes(576, 1536, 30, 9, 3), "is_llama_config": True, "rope_interleaved": False,
                      "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152, "attention_bias": False,
                      "max_position_embeddings": 8192, "transformers.js_config": {"dtype": "q4f16"}},
                     {"head_dim": 64, "rope_theta": 1e5}),
    "Yi 1.5 9B": ({**LLAMA, **sizes(4096, 11008, 48, 32, 4), "attention_bias": False, "attention_dropout": 0.0,
                   "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "vocab_size": 64000, "pad_token_id": 0,
                   "max_position_embeddings": 4096}, {"rope_theta": 5e6, "num_key_value_heads": 4}),
    "DeepSeek LLM 7B": ({**LLAMA, **sizes(4096, 11008, 30, 32, 32), "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                         "max_position_embeddings": 4096, "vocab_size": 102400}, {"num_hidden_layers": 30}),
    "DeepSeek LLM 67B": ({**LLAMA, **sizes(8192, 22016, 95, 64, 8), "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                          "max_position_embeddings": 4096, "vocab_size": 102400}, {"num_key_value_heads": 8}),
    "DeepSeek Coder 33B": ({**LLAMA, **sizes(7168, 19200, 62, 56, 8), "rms_norm_eps": 1e-6, "rope_theta": 100000,
                            "rope_scaling": {"factor": 4.0, "type": "linear"}, "max_position_embeddings": 16384,
                            "vocab_size": 32256},
                           {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "Mistral 7B 0.1": ({**MISTRAL, **sizes(4096, 14336, 32, 32, 8), "max_position_embeddings": 32768,
                        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}, {"sliding_window": 4096}),
    "Mistral 7B 0.3": ({**MISTRAL, **sizes(4096, 14336, 32, 32, 8), "max_position_embeddings": 32768,
                        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
                       {"sliding_window": None, "rope_theta": 1e6}),
    "Mistral Nemo": ({**MISTRAL, **sizes(5120, 14336, 40, 32, 8, head_dim=128), "max_position_embeddings": 131072,
                      "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 131072}, {"head_dim": 128}),
    "Zephyr 7B": ({**MISTRAL, **sizes(4096, 14336, 32, 32, 8), "max_position_embeddings": 32768, "pad_token_id": 2,
                   "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}, {"sliding_window": 4096}),
    "Qwen 7B": ({**sizes(4096, 22016, 32, 32), "architectures": ["QWenLMHeadModel"], "model_type": "qwen",
                 "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False,
                 "kv_channels": 128, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 32768, "no_bias": True,
                 "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True,
                 "seq_length": 8192, "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer",
                 "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936},
                {"intermediate_size": 11008, "qkv_bias": True, "o_bias": False, "max_position_embeddings": 8192}),
    "Qwen 1.5 7B": ({**QWEN2, **sizes(4096, 11008, 32, 32, 32), "max_window_layers": 28, "sliding_window": 32768,
                     "max_position_embeddings": 32768, "vocab_size": 151936}, {"sliding_window": None}),
    "Qwen 2 7B": ({**QWEN2, **sizes(3584, 18944, 28, 28, 4), "max_window_layers": 28, "sliding_window": 131072,
                   "max_position_embeddings": 131072, "vocab_size": 152064}, {"qkv_bias": True, "o_bias": False}),
    "Qwen 2.5 7B": ({**QWEN2, **sizes(3584, 18944, 28, 28, 4), "max_window_layers": 28, "sliding_window": 131072,
                     "max_position_embeddings": 131072, "use_mrope": False, "vocab_size": 152064}, {"head_dim": 128}),
    "Qwen 3 8B": ({**QWEN2, **sizes(4096, 12288, 36, 32, 8, head_dim=128), "architectures": ["Qwen3ForCausalLM"],
                   "model_type": "qwen3", "attention_bias": False, "max_window_layers": 36, "rope_scaling": None,
                   "sliding_window": None, "max_position_embeddings": 40960, "vocab_size": 151936},
                  {"qk_norm": True, "qkv_bias": False, "sliding_window": None}),
    "InternLM 7B": ({**INTERNLM, **sizes(4096, 11008, 32, 32), "architectures": ["InternLMForCausalLM"], "bias": True,
                     "model_type": "internlm", "rms_norm_eps": 1e-6, "rotary": {"base": 10000, "type": "dynamic"},
                     "max_position_embeddings": 2048, "vocab_size": 103168},
                    {"o_bias": True, "rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}),
    "InternLM 2 7B": ({**INTERNLM, **sizes(4096, 14336, 32, 32, 8), "architectures": ["InternLM2ForCausalLM"],
                       "model_type": "internlm2", "bias": False, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
                       "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "pretraining_tp": 1,
                       "max_position_embeddings": 32768, "vocab_size": 92544},
                      {"rope_theta": 1e6, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "o_bias": False}),
    "InternLM 2.5 7B 1M": ({**INTERNLM, **sizes(4096, 14336, 32, 32, 8), "architectures": ["InternLM2ForCausalLM"],
                            "model_type": "internlm2", "bias": False, "rms_norm_eps": 1e-5, "rope_theta": 50000000,
                            "rope_scaling": {"factor": 2.5, "type": "dynamic"}, "pretraining_tp": 1,
                            "max_position_embeddings": 262144, "vocab_size": 92544}, {"rope_theta": 5e7}),
    "InternLM 3 8B": ({**INTERNLM, **sizes(4096, 10240, 48, 32, 2, head_dim=128), "model_type": "internlm3",
                       "architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0, "bias": False,
                       "qkv_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 50000000,
                       "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "max_position_embeddings": 32768,
                       "vocab_size": 128512}, {"num_key_value_heads": 2, "qkv_bias": False, "mlp_bias": False}),
    "Gemma 2B": ({**GEMMA, **sizes(2048, 16384, 18, 8, 1)},
                 {"head_dim": 256, "tie_word_embeddings": True, "activation": "gelu_pytorch_tanh"}),
    "Gemma 7B": ({**GEMMA, **sizes(3072, 24576, 28, 16, 16)}, {"norm": "rms_plus_one", "scale_embedding": True}),
    "Command R": ({**COHERE, **sizes(8192, 22528, 40, 64, 64), "logit_scale": 0.0625, "rope_theta": 8000000.0,
                   "max_position_embeddings": 8192, "use_qk_norm": False},
                  {"tie_word_embeddings": True, "qk_norm": False, "rope_interleaved": True, "rms_norm_eps": 1e-5}),
    "Command R+": ({**COHERE, **sizes(12288, 33792, 64, 96, 8), "logit_scale": 0.8333333333333334,
                    "rope_theta": 75000000.0, "max_position_embeddings": 8192, "use_qk_norm": True},
                   {"qk_norm": True, "logit_scale": 0.8333333333333334}),
    "Starcoder 2 7B": ({**sizes(4608, 18432, 32, 36, 4), "architectures": ["Starcoder2ForCausalLM"], "use_bias": True,
                        "model_type": "starcoder2", "activation_function": "gelu", "attention_dropout": 0.1,
                        "attention_softmax_in_fp32": True, "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh",
                        "layer_norm_epsilon": 1e-5, "norm_epsilon": 1e-5, "norm_type": "layer_norm",
                        "mlp_type": "default", "residual_dropout": 0.1, "rope_theta": 1000000, "sliding_window": 4096,
                        "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
                        "max_position_embeddings": 16384, "vocab_size": 49152},
                       {"norm": "layer_bias", "mlp_gate": False, "o_bias": True, "mlp_bias": True,
                        "sliding_window": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "Baichuan 7B": ({**BAICHUAN, **sizes(4096, 11008, 32, 32), "architectures": ["BaiChuanForCausalLM"],
                     "vocab_size": 64000}, {"normalize_head": False}),
    "Baichuan 2 7B": ({**BAICHUAN, **sizes(4096, 11008, 32, 32), "architectures": ["BaichuanForCausalLM"],
                       "model_max_length": 4096, "vocab_size": 125696, "z_loss_weight": 0}, {"normalize_head": True}),
    "ChatGLM 3 6B": ({**GLM, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28, "num_attention_heads": 32,
                      "layernorm_epsilon": 1e-5, "padded_vocab_size": 65024, "vocab_size": 65024, "seq_length": 8192,
                      "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0},
                     {"num_key_value_heads": 2, "intermediate_size": 13696, "qkv_bias": True, "o_bias": False,
                      "max_position_embeddings": 8192, "vocab_size": 65024}),
    "GLM 4 9B": ({**GLM, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 40, "num_attention_heads": 32,
                  "num_hidden_layers": 40, "layernorm_epsilon": 1.5625e-07, "padded_vocab_size": 151552,
                  "rope_ratio": 500, "seq_length": 131072, "vocab_size": 151552},
                 {"rope_theta": 5e6, "rms_norm_eps": 1.5625e-07}),
}

@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name):
    published, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({**ALWAYS, **published}))
    config = convert.load_config(tmp_path)
    for key in ("hidden_size", "num_attention_heads", "vocab_size"):
        assert getattr(config, key) == published[key]
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.head_dim == 256 if "Gemma" in name else config.head_dim * config.num_attention_heads == (
        4096 if "Nemo" in name else config.hidden_size)
    if published["model_type"] in ("llama", "mistral", "qwen2", "qwen3", "gemma", "cohere", "starcoder2"):
        from transformers import AutoConfig
        theirs = AutoConfig.from_pretrained(tmp_path)
        for key in ("num_key_value_heads", "intermediate_size", "max_position_embeddings", "tie_word_embeddings"):
            assert getattr(config, key) == getattr(theirs, key), key
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]

# ------------------------------------------------------------------------------------------------------------ faults

LINEAR = {"rope_type": "linear", "factor": 4.0}

@pytest.mark.parametrize("drop,changes,theta,scaling", [
    (["rope_parameters"], {"rope_theta": 5e5}, 5e5, None),
    (["rope_theta"], {"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
    (["rope_parameters"], {"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, LINEAR),
    ([], {"rope_parameters": {"rope_theta": 3e4, **LINEAR}, "rope_theta": 3e4,
          "rope_scaling": {**LINEAR, "type": "linear"}}, 3e4, LINEAR),
    (["rope_parameters", "rope_theta"], {}, 1e4, None)], ids=str)
def test_both_dialects_of_rope_are_read(hf_folder, drop, changes, theta, scaling):
    folder, _ = hf_folder()
    config = convert.load_config(edit_config(folder, drop, **changes))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)

@pytest.mark.parametrize("changes,message", [
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
     "rope_theta 10000.0 and rope_parameters' 500000.0 differ"),
    ({"rope_parameters": {"rope_theta": 1e4, **LINEAR}, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
     "rope_type dynamic and rope_parameters' linear differ: remove"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "su", "factor": 2.0}}, "'su' is unknown"),
    ({"rope_parameters": {"rope_type": "linear"}}, "'factor' is missing"),
    ({"rope_parameters": {k: v for k, v in LLAMA3.items() if k[0] != "o"}},
     "'original_max_position_embeddings' is missing"),
    ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
    ({"rope_parameters": {**LINEAR, "rope_type": "yarn", "mscale": 0.7}}, "mscale 0.7 is not supported"),
    ({"architectures": ["UnheardOfForCausalLM"]}, "UnheardOfForCausalLM .*is not supported"),
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
    ({"hidden_act": "relu"}, "hidden_act 'relu'"), ({"qk_norm": True}, "qk_norm True changes"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 changes"),
    ({"num_local_experts": 8}, "num_local_experts"), ({"sliding_window": 4096}, "sliding_window 4096 changes"),
    ({"residual_multiplier": 0.22}, "residual_multiplier"), ({"rope_interleaved": True}, "rope_interleaved"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types")], ids=str)
def test_config_faults_are_named(hf_folder, changes, message):
    folder, _ = hf_folder()
    with pytest.raises(ValueError, match=message) as e:
        convert.load_config(edit_config(folder, **changes))
    assert "config.json" in str(e.value)

def test_neutral_and_harmless_keys_pass(hf_folder):
    folder, _ = hf_folder()
    convert.load_config(edit_config(
        folder, residual_multiplier=1.0, attention_dropout=0.1, rope_interleaved=False, sliding_window=None,
        pretraining_tp=1, attn_implementation="flash_attention_2", layer_types=["full_attention"] * 2,
        auto_map={"AutoConfig": "c.C"}))

@pytest.mark.parametrize("model_type,drop,changes,window", [
    ("mistral", ["sliding_window"], {}, 4096), ("mistral", [], {"sliding_window": None}, None),
    ("qwen2", [], {"use_sliding_window": False, "sliding_window": 7}, None),
    ("qwen2", ["layer_types"], {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7)])
def test_sliding_windows(hf_folder, model_type, drop, changes, window):
    folder, _ = hf_folder(model_type)
    assert convert.load_config(edit_config(folder, drop, **changes)).sliding_window == window

@pytest.mark.parametrize("length,window", [(7, None), (8, 7)])
def test_a_window_no_shorter_than_the_rows_is_none(hf_folder, monkeypatch, length, window):
    folder, _ = hf_folder("mistral", sliding_window=7)
    monkeypatch.setattr(train, "MODEL", str(folder))
    monkeypatch.setattr(train, "MAX_LENGTH", length)
    assert train.plan(1)[1].sliding_window == window

def test_windows_of_some_layers_are_refused(hf_folder):
    folder, _ = hf_folder("qwen2", head_dim=6)
    edit_config(folder, ["layer_types"], use_sliding_window=True, sliding_window=7, max_window_layers=1)
    with pytest.raises(ValueError, match="some layers only"):
        convert.load_config(folder)

def shards_of(folder, **moved):
    held = load_file(folder / "model.safetensors")
    where = {name: moved.get("to", "model.safetensors") for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

def tensors_after(change):
    def break_it(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return break_it

def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

NORM = "model.norm.weight"
OUT = "points out of the folder"
FOLDER_FAULTS = {
    "an index that leaves the folder": (lambda f: shards_of(f, to="../hf/model.safetensors"), OUT),
    "an absolute index": (lambda f: shards_of(f, to=str(f / "model.safetensors")), OUT),
    "an index of the folder itself": (lambda f: shards_of(f, to=".."), OUT),
    "a missing shard": (lambda f: shards_of(f, to="model-00001-of-00002.safetensors"), "00002.safetensors is missing"),
    "a missing tensor": (tensors_after(lambda t: t.pop(NORM)), rf"1 tensors differ: {NORM} is missing, not \(48,\)"),
    "an extra tensor": (tensors_after(lambda t: t.update(x=torch.ones(1))), r"x is \(1,\), not expected"),
    "an index cut short": (lambda f: (f / convert.INDEX).write_text('{"weight_map": {'), "index.json is damaged"),
    "an index of nothing": (lambda f: (f / convert.INDEX).write_text("{}"), "index.json is damaged .KeyError"),
    "a misshapen tensor": (tensors_after(lambda t: t.update({NORM: torch.ones(7)})), rf"{NORM} is \(7,\), not \(48,\)"),
    "a git-lfs pointer": (lambda f: (f / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git-lfs pointer"),
    "a truncated file": (lambda f: os.truncate(f / "model.safetensors", 5000), r"model.safetensors is damaged"),
    "pickles only": (only_pickles, r"pytorch_model.bin is a pickle"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "has no .safetensors"),
}

@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folder_faults_are_named_and_nothing_is_loaded(hf_folder, fault):
    folder, _ = hf_folder()
    break_it, message = FOLDER_FAULTS[fault]
    break_it(folder)
    model = Transformer(convert.load_config(folder))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert.load_weights(model, folder)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

def test_leftover_frequencies_and_a_stored_tied_head_are_accepted(hf_folder):
    folder, _ = hf_folder(tie_word_embeddings=True)
    tensors_after(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                                      "lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    load(folder)

@pytest.mark.parametrize("tied", [False, True])
def test_check_exits_by_what_it_found(hf_folder, tokenizer_files, tied):
    folder, _ = hf_folder(vocab_size=260, tie_word_embeddings=tied, **ODD)
    tokenizer_files(folder)

    def status():
        return subprocess.run([sys.executable, check.__file__, str(folder)], capture_output=True, text=True)
    equal = status()
    assert equal.returncode == 0 and "MISMATCH" not in equal.stdout, equal.stdout + equal.stderr
    edit_config(folder, rms_norm_eps=float("nan"))  # both are nan, everywhere: that is not equal
    apart = status()
    assert apart.returncode == 1 and apart.stdout.startswith("layer 0    nan MISMATCH\n"), apart.stdout + apart.stderr

def test_check_names_the_layer_where_we_part_from_transformers(hf_folder, tokenizer_files, capsys, monkeypatch):
    folder, _ = hf_folder(vocab_size=260, num_hidden_layers=3, **ODD)
    tokenizer_files(folder)
    assert not check.check(folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:-1] for line in lines[:4]] == [["layer", "0"], ["layer", "1"], ["layer", "2"], ["logits"]]
    losses = re.fullmatch(r"loss of 600 tokens (\S+), transformers' (\S+)", lines[4]).groups()
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    real = convert.load_weights

    def shifted(model, folder):
        real(model, folder)
        model.model["layers"][1].mlp.down_proj.weight.data *= 1.01
    with monkeypatch.context() as patched:
        patched.setattr(convert, "load_weights", shifted)
        assert check.check(folder)
        parted = [line.endswith(" MISMATCH") for line in capsys.readouterr().out.splitlines()[:4]]
        assert parted == [False, True, True, True]
    # we go by architectures, transformers by model_type, which knows no window
    assert check.check(edit_config(folder, architectures=["MistralForCausalLM"], sliding_window=300))
    assert all(line.endswith(" MISMATCH") for line in capsys.readouterr().out.splitlines()[:4])

def test_a_folder_without_a_whole_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        convert.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaFor')
    with pytest.raises(ValueError, match="config.json: Unterminated string"):
        convert.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="config.json: 'num_attention_heads' is missing"):
        convert.load_config(tmp_path)

def test_export_into_the_source_folder_keeps_its_tokenizer(hf_folder, tokenizer_files):
    folder, _ = hf_folder()
    tokenizer_files(folder)
    before = (folder / "tokenizer.json").read_bytes()
    shutil.copy(folder / "model.safetensors", folder.parent / "before.safetensors")
    convert.save_weights(load(folder), folder, folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert_same_tensors(folder, folder)

def test_export_replaces_one_of_other_shards(hf_folder, tmp_path, monkeypatch):
    """Or the files of before, which an index or a simpler name still points at, would be what is opened."""
    folder, theirs = hf_folder()
    (folder / "tokenizer").mkdir()  # some folders have it; only files are copied
    model = load(folder)
    whole = convert.SHARD_BYTES
    for shard_bytes in (20_000, whole, 30_000):
        monkeypatch.setattr(convert, "SHARD_BYTES", shard_bytes)
        with torch.no_grad():
            model.model["norm"].weight += 1
        convert.save_weights(model, folder, tmp_path / "out")
        (tmp_path / "out" / "model-mine.safetensors.txt").touch()
        assert torch.equal(load(tmp_path / "out").model["norm"].weight, model.model["norm"].weight)
        reopened = type(theirs).from_pretrained(tmp_path / "out")
        assert torch.equal(reopened.model.norm.weight, model.model["norm"].weight)
        shards = [f.name for f in (tmp_path / "out").glob("*.safetensors")]
        assert ("model.safetensors" in shards) == (shard_bytes == whole) == (len(shards) == 1)
        assert (tmp_path / "out" / "model-mine.safetensors.txt").exists()

def export_where_one_cannot_write(folder, out):
    grid, model = load_sharded(folder)
    if grid.rank == 1:
        out = folder / "config.json" / "out"  # below a file
    with pytest.raises(RuntimeError, match="export: rank 1: OSError: .*Not a directory"):
        parallel.together("export", convert.save_weights, model, folder, out)

def test_a_rank_that_cannot_write_leaves_no_other_waiting(hf_folder, tmp_path):
    folder, _ = hf_folder()
    on_ranks(2, export_where_one_cannot_write, folder, tmp_path / "out", tmp_path=tmp_path)
