"""Hugging Face folders in and out.

Each family is compared with transformers, or with a plain reference where its code is in the
folder, and each fault of a folder is refused by a message that names it.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY, assert_close, generated_logits, on_ranks, row, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import parallel
import train
from model import Config, Transformer, rope_cos_sin, rope_frequencies
from tools import check

# Sizes of which no two are equal, so that exchanging two of them is noticed
ODD = dict(num_attention_heads=6, num_key_value_heads=3, head_dim=10)
BIASED = {"attention_bias": True}
FOUR_LAYERS = {"num_hidden_layers": 4}
FAMILIES = [  # model_type of transformers, what to change in its configuration
    ("llama", {}),
    ("llama", {**BIASED, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"head_dim": 8}),
    ("qwen2", {"tie_word_embeddings": True, "head_dim": 8}),
    ("qwen3", {}),
    ("qwen3", {**BIASED, "tie_word_embeddings": True}),
    ("internlm3", {}),
    ("internlm3", {**BIASED, "mlp_bias": True}),
    ("gemma", {"tie_word_embeddings": True}),
    ("gemma", {**BIASED, "tie_word_embeddings": False}),
    ("cohere", {"logit_scale": 0.3, "head_dim": 8}),
    ("cohere", {"use_qk_norm": True, "head_dim": 8, **BIASED}),
    ("cohere", {"use_qk_norm": True, "head_dim": 8, "tie_word_embeddings": False}),
    ("starcoder2", {}),
    ("starcoder2", {"tie_word_embeddings": False, "use_bias": False, "sliding_window": 5}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("smollm3", {**FOUR_LAYERS, "head_dim": 8, "pad_token_id": 0}),
    ("smollm3", {**FOUR_LAYERS, "head_dim": 8, "pad_token_id": 0, "no_rope_layers": [0, 1, 1, 0],
                 "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": False}),
    ("olmo2", {"head_dim": 8}),
    ("olmo2", {"head_dim": 8, "num_key_value_heads": 6, **BIASED}),
    ("olmo3", {**FOUR_LAYERS, "head_dim": 8, "sliding_window": 5}),
    ("olmo3", {**FOUR_LAYERS, "head_dim": 8, "sliding_window": 5, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0,
                           "original_max_position_embeddings": 64},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}),
    ("granite", {"head_dim": 8, "attention_multiplier": 0.2, "residual_multiplier": 0.22,
                 "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    ("granite", {"head_dim": 8, **BIASED, "tie_word_embeddings": True}),
    ("seed_oss", {}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("ernie4_5", {}),
    ("ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
    ("hunyuan_v1_dense", {}),
    ("hunyuan_v1_dense", {**BIASED, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}}),
    ("phi3", {"head_dim": 8, "pad_token_id": 0}),
    ("phi3", {"head_dim": 8, "pad_token_id": 0, "sliding_window": 5, "tie_word_embeddings": True}),
    ("ministral3", {"head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 64,
                    "sliding_window": 7, "rope_parameters": {
                        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 32.0,
                        "beta_slow": 1.0, "original_max_position_embeddings": 4, "mscale": 1.0,
                        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}}),
    ("phi3", {"head_dim": 8, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("glm", {"head_dim": 12, "pad_token_id": 0}),
    ("glm4", {"head_dim": 12, "pad_token_id": 0}),
    ("glm4", {"head_dim": 12, "pad_token_id": 0, "attention_bias": False}),
    ("gemma3_text", {**FOUR_LAYERS, "num_hidden_layers": 7, "sliding_window": 5,
                     "query_pre_attn_scalar": 30}),
    ("gemma3_text", {**FOUR_LAYERS, "sliding_window": 5, "query_pre_attn_scalar": 30,
                     "tie_word_embeddings": False, **BIASED,
                     "layer_types": ["full_attention", "sliding_attention"] * 2}),
]


def load(folder):
    model = Transformer(convert.load_config(folder))
    convert.load_weights(model, folder)
    return model


def json_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, drop=(), **changes):
    """Change keys of config.json, then drop some. Return the folder"""
    config = {**json_of(folder), **changes}
    for key in drop:
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_same_tensors(folder, expected_folder):
    actual = tensors_of(folder)
    expected = tensors_of(expected_folder)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# ------------------------------------------------------------------------------------------------
# Families that transformers implements


@pytest.mark.parametrize("model_type,changes", FAMILIES, ids=str)
def test_family_equals_transformers(hf_folder, tmp_path, model_type, changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, theirs = hf_folder(model_type, **{**ODD, **changes})
    if model_type == "internlm3":  # transformers calls it a Llama, its authors do not
        bias = changes.get("attention_bias", False)
        edit_config(folder, drop=["attention_bias", "mlp_bias"],
                    architectures=["InternLM3ForCausalLM"], qkv_bias=bias, bias=bias)
    ours = load(folder)
    name = model_type.replace("_text", "").replace("seed_oss", "seedoss")
    assert ours.config.architecture.lower().startswith(name.replace("hunyuan_v1_", "hunyuan"))

    # logits and gradients
    ids, positions, cu_seqlens, max_seqlen, labels = row([23])
    expected = theirs(ids[None]).logits[0]  # (T, V)
    logits = ours(ids, positions, cu_seqlens, max_seqlen)
    largest = expected.abs().max().item()
    assert_close(logits, expected, "logits", atol=1e-5 * largest)
    for n_prompt in (1, 9):
        logits = generated_logits(ours, ids, n_prompt)
        what = f"logits with a cache, after {n_prompt} tokens"
        assert_close(logits, expected[n_prompt - 1:], what, atol=1e-5 * largest)
    torch.nn.functional.cross_entropy(expected, labels, reduction="sum").backward()
    ours(ids, positions, cu_seqlens, max_seqlen, labels).backward()
    expected_gradients = {}
    for name, parameter in theirs.named_parameters():
        expected_gradients[name] = parameter.grad
    slices, _ = convert.layout(ours)
    compared = set()
    for name, parameter in ours.named_parameters():
        place = slices[name]
        compared.add(place.name)
        whole = expected_gradients[place.name]
        gradient = place.view(whole).flatten(0, 1)
        tolerance = 1e-4 * whole.abs().max().item()
        assert_close(parameter.grad, gradient, f"gradient of {name}", atol=tolerance, rtol=1e-4)
    assert compared == expected_gradients.keys()

    # the export
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    config_before = AutoConfig.from_pretrained(folder)
    config_after = AutoConfig.from_pretrained(tmp_path / "out")
    assert config_before.rope_parameters == config_after.rope_parameters
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(reopened(ids[None]).logits[0], expected)


@pytest.mark.parametrize("model_type,text_type", [
    ("gemma3", "gemma3_text"), ("mistral3", "mistral")])
@pytest.mark.parametrize("newer_names", [False, True])
def test_the_text_model_of_one_with_images(hf_folder, tmp_path, model_type, text_type, newer_names):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text_folder, text_model = hf_folder(
        text_type, "text", head_dim=8, tie_word_embeddings=False, pad_token_id=0)
    config = AutoConfig.for_model(
        model_type, text_config=text_model.config.to_dict(), tie_word_embeddings=False,
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
                       "head_dim": 8})
    whole = AutoModelForImageTextToText.from_config(config)
    whole.model.language_model.load_state_dict(text_model.model.state_dict())
    whole.lm_head.load_state_dict(text_model.lm_head.state_dict())
    folder = tmp_path / "whole"
    whole.save_pretrained(folder)
    if newer_names:
        tensors = {}
        for name, tensor in tensors_of(folder).items():
            name = name.replace("language_model.model", "model.language_model")
            tensors[name.replace("language_model.lm_head", "lm_head")] = tensor
        save_file(tensors, folder / "model.safetensors")

    convert.save_weights(load(folder), folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", text_folder)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(reopened) is type(text_model)
    ids = row([23]).input_ids[None]
    assert_close(reopened(ids).logits, text_model(ids).logits, "logits", atol=1e-5)


@pytest.mark.parametrize("of_whole", [True, False])
@pytest.mark.parametrize("of_text", [None, True, False])
def test_a_text_model_is_tied_where_the_whole_model_is(tmp_path, of_whole, of_text):
    from transformers import AutoConfig
    text_config = {**TINY, "model_type": "mistral"}
    source = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
              "text_config": text_config, "tie_word_embeddings": of_whole}
    if of_text is not None:
        text_config["tie_word_embeddings"] = of_text
    (tmp_path / "config.json").write_text(json.dumps(source))
    theirs = AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert convert.load_config(tmp_path).tie_word_embeddings == theirs


def test_gelu_of_gemma_is_exported_as_the_approximation_that_was_trained(hf_folder, tmp_path):
    """Which transformers 5 takes it for, and transformers 4 does not."""
    folder, _ = hf_folder("gemma", tie_word_embeddings=True)
    edit_config(folder, hidden_act="gelu")
    convert.save_weights(load(folder), folder, tmp_path / "out")
    assert json_of(tmp_path / "out")["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_in_small_shards_is_bit_equal(
        hf_folder, tokenizer_files, tmp_path, monkeypatch, dtype):
    folder, theirs = hf_folder("llama", **ODD, tie_word_embeddings=True, eos_token_id=[2, 3])
    theirs.to(dtype).save_pretrained(folder)
    tokenizer_files(folder)
    generation_config = '{"eos_token_id": [2, 3],  "temperature": 0.6}'
    (folder / "generation_config.json").write_text(generation_config)
    edit_config(folder, my_own_key={"kept": 1}, auto_map={"AutoConfig": "x.Y"})
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    convert.save_weights(load(folder), folder, out)
    assert_same_tensors(out, folder)

    # the shards and their index
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    n = len(shards)
    assert n > 1
    assert shards == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total_size = 0
    for shard in shards:
        tensors = load_file(out / shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        total_size += size
        assert size <= 20_000 or len(tensors) == 1
        indexed = {name for name, file in index["weight_map"].items() if file == shard}
        assert indexed == tensors.keys()
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total_size
    assert "lm_head.weight" not in index["weight_map"]

    # the other files
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    config = json_of(out)
    assert config["my_own_key"] == {"kept": 1}
    assert config["eos_token_id"] == [2, 3]
    assert "auto_map" not in config
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert config["dtype"] == config["torch_dtype"]

    # and once more, from several shards
    convert.save_weights(load(out), out, tmp_path / "out2")
    assert_same_tensors(tmp_path / "out2", folder)


# ------------------------------------------------------------------------------------------------
# Families whose code is in the folder


def write_folder(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text("class C: pass\n")
    saved = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(saved, folder / "model.safetensors")
    return folder


def wide_model(**changes):
    """A tiny model whose width is that of its 8 heads of 8, as these families have no head_dim."""
    return tiny_model(hidden_size=64, **changes)


def remote_folder(folder, architecture, tensors, drop=(), **changes):
    """The folder of wide_model() as another architecture would have written it."""
    config = {key: value for key, value in TINY.items() if key != "head_dim" and key not in drop}
    config.update(
        architectures=[architecture], hidden_size=64, max_position_embeddings=512,
        torch_dtype="float32", rms_norm_eps=1e-6, auto_map={"AutoConfig": "configuration.C"},
        attn_implementation="eager", **changes)
    return write_folder(folder, config, tensors)


def fuse_by_key_value_head(q, k, v):
    """Rows of 8 query heads and 4 key/value heads of 8 rows each -> InternLM2's wqkv."""
    rows = []
    for g in range(4):
        rows.append(q[16 * g:16 * g + 8])
        rows.append(q[16 * g + 8:16 * g + 16])
        rows.append(k[8 * g:8 * g + 8])
        rows.append(v[8 * g:8 * g + 8])
    return torch.cat(rows)


def internlm2_folder(folder, bias):
    """Return the folder, and the model that was fused into it."""
    llama = wide_model(qkv_bias=bias, o_bias=bias)
    tensors = {
        "model.tok_embeddings.weight": llama.model["embed_tokens"].weight,
        "model.norm.weight": llama.model["norm"].weight,
        "output.weight": llama.lm_head.weight,
    }
    for i, block in enumerate(llama.model["layers"]):
        layer = f"model.layers.{i}"
        attention = block.self_attn
        for kind in ("weight", "bias") if bias else ("weight",):
            q = getattr(attention.q_proj, kind)
            k = getattr(attention.k_proj, kind)
            v = getattr(attention.v_proj, kind)
            tensors[f"{layer}.attention.wqkv.{kind}"] = fuse_by_key_value_head(q, k, v)
            tensors[f"{layer}.attention.wo.{kind}"] = getattr(attention.o_proj, kind)
        tensors[f"{layer}.attention_norm.weight"] = block.input_layernorm.weight
        tensors[f"{layer}.ffn_norm.weight"] = block.post_attention_layernorm.weight
        tensors[f"{layer}.feed_forward.w1.weight"] = block.mlp.gate_proj.weight
        tensors[f"{layer}.feed_forward.w3.weight"] = block.mlp.up_proj.weight
        tensors[f"{layer}.feed_forward.w2.weight"] = block.mlp.down_proj.weight
    remote_folder(folder, "InternLM2ForCausalLM", tensors, model_type="internlm", bias=bias,
                  rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1e6)
    return folder, llama


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_fuses_by_key_value_head(tmp_path, bias):
    folder, llama = internlm2_folder(tmp_path / "hf", bias)
    ours = load(folder)
    for name, parameter in llama.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    assert ours.config.rope_theta == 1e6
    assert ours.config.rope_scaling == {"rope_type": "dynamic", "factor": 2.0}

    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    config = json_of(tmp_path / "out")
    # its own configuration takes exactly these two keys
    assert config["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    # without its code nothing could open the folder
    assert config["auto_map"]
    assert (tmp_path / "out" / "configuration.py").exists()


def load_sharded(folder):
    grid = parallel.init(1, 1)
    with torch.device("meta"):
        model = Transformer(convert.load_config(folder), grid.sp_group)
    parallel.shard(model, model.block_groups(), grid, torch.float32, 3, False)
    convert.load_weights(model, folder)
    return grid, model


def load_and_save_shards(folder, expected, out):
    grid, model = load_sharded(folder)
    for name, rows, first in model.local_parameters():
        expected_rows = expected.get_parameter(name)[first:first + len(rows)]
        assert torch.equal(rows, expected_rows), f"{name} on rank {grid.rank}"
    convert.save_weights(model, folder, out)


def test_fused_tensors_are_loaded_and_saved_by_shards(tmp_path, monkeypatch):
    """On 3 ranks, whose shards of the rows end inside a key/value head."""
    folder, llama = internlm2_folder(tmp_path / "hf", bias=True)
    monkeypatch.setattr(convert, "SHARD_BYTES", 60_000)
    on_ranks(3, load_and_save_shards, folder, llama, tmp_path / "out", tmp_path=tmp_path)
    assert_same_tensors(tmp_path / "out", folder)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 3


@pytest.mark.parametrize("architecture", ["BaiChuanForCausalLM", "BaichuanForCausalLM"])
def test_baichuan_fuses_q_k_v_and_its_second_normalizes_the_head(tmp_path, architecture):
    is_second = architecture == "BaichuanForCausalLM"
    llama = wide_model(num_key_value_heads=8)
    tensors = dict(llama.named_parameters())
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        qkv = [tensors.pop(f"{attention}.{letter}_proj.weight") for letter in "qkv"]
        tensors[f"{attention}.W_pack.weight"] = torch.cat(qkv)
    folder = remote_folder(tmp_path / "hf", architecture, tensors, drop=["num_key_value_heads"],
                           model_type="baichuan", model_max_length=512)
    ours = load(folder)

    if is_second:
        with torch.no_grad():
            llama.lm_head.weight /= llama.lm_head.weight.norm(dim=1, keepdim=True)
    ids, positions, cu_seqlens, max_seqlen, _ = row([23])
    expected = llama(ids, positions, cu_seqlens, max_seqlen)
    logits = ours(ids, positions, cu_seqlens, max_seqlen)
    assert_close(logits, expected, "logits", atol=1e-5)
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)

    with pytest.raises(ValueError, match="reads no rope_scaling"):
        convert.extend_context(ours.config, 4096, None, 512)
    if is_second:
        edit_config(folder, drop=["max_position_embeddings"])
        message = "BaichuanForCausalLM .* 13B, whose ALiBi is not supported"
        with pytest.raises(ValueError, match=message):
            convert.load_config(folder)


def rms_norm(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_decoder(layers, final_norm, x, head_dim, rotate):
    """A decoder written as plainly as possible: x (n, C) -> (n, C).

    Each layer is a dict of its matrices; rotate applies RoPE to (n, heads, head_dim).
    """
    n = len(x)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for layer in layers:
        normed = rms_norm(x, layer["norm1"])
        qkv = []
        for weight, bias in zip(layer["qkv"], layer["qkv_bias"]):
            projected = normed @ weight.T + bias
            qkv.append(projected.unflatten(-1, (-1, head_dim)))  # (n, heads, head_dim)
        q = rotate(qkv[0])
        k = rotate(qkv[1])
        v = qkv[2]

        heads = []
        for i in range(q.shape[1]):
            group = i * k.shape[1] // q.shape[1]  # consecutive heads share a key/value head
            scores = q[:, i] @ k[:, group].T / head_dim ** 0.5  # (n, n)
            weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
            heads.append(weights @ v[:, group])
        x = x + torch.cat(heads, -1) @ layer["o"].T

        normed = rms_norm(x, layer["norm2"])
        gate = torch.nn.functional.silu(normed @ layer["gate"].T)
        x = x + (gate * (normed @ layer["up"].T)) @ layer["down"].T
    return rms_norm(x, final_norm)


def random_tensors(shapes):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes.items():
        mean = 1.0 if len(shape) == 1 else 0.0
        tensors[name] = torch.randn(shape, generator=generator) * 0.2 + mean
    return tensors


def assert_equals_reference(folder, tmp_path, expected, ids):
    """`folder` as our model has the logits `expected`, is exported bit for bit, and refuses a
    longer context. Return the model"""
    ours = load(folder)
    n = len(ids)
    logits = ours(ids, torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)
    assert_close(logits, expected, "logits", atol=1e-5 * expected.abs().max().item())
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    assert json_of(tmp_path / "out") == {**json_of(folder), "dtype": "float32"}
    with pytest.raises(ValueError, match="reads no rope_scaling"):
        convert.extend_context(ours.config, 4096, None, 512)
    return ours


def assert_changes_are_refused(folder, changes):
    """Each of the changes (key, value) of config.json alone is refused."""
    original = (folder / "config.json").read_text()
    for key, value in changes:
        edit_config(folder, **{key: value})
        with pytest.raises(ValueError, match=f"{key} .* changes the computation"):
            convert.load_config(folder)
        (folder / "config.json").write_text(original)


def rotate_halves(x, base):
    """RoPE on x (n, heads, 8): dimensions 0 to 3 are real parts, 4 to 7 the imaginary ones."""
    angle = torch.arange(len(x))[:, None] / base ** (torch.arange(4) / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (n, 1, 4) complex
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def rotate_neighbours(x, base):
    """RoPE on x (n, heads, 16): pairs of neighbours among the first 8 dimensions turn."""
    angle = torch.arange(len(x))[:, None] / base ** (torch.arange(4) / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (n, 1, 4) complex
    pairs = x[..., :8].unflatten(-1, (4, 2)).contiguous()
    turned = torch.view_as_complex(pairs) * turn
    return torch.cat((torch.view_as_real(turned).flatten(-2), x[..., 8:]), -1)


def test_qwen_1_against_a_plain_reference(tmp_path):
    V = 97
    C = 48
    I = 40
    config = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": V,
        "hidden_size": C, "intermediate_size": 2 * I, "num_hidden_layers": 2,
        "num_attention_heads": 6, "kv_channels": 8, "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 5000, "rotary_pct": 1.0, "seq_length": 512,
        "max_position_embeddings": 8192, "no_bias": True, "scale_attn_weights": True,
        "use_dynamic_ntk": True, "use_logn_attn": True, "use_flash_attn": "auto",
        "attn_dropout_prob": 0.0, "tie_word_embeddings": False, "torch_dtype": "float32",
        "auto_map": {"AutoConfig": "configuration.C"},
    }
    shapes = {}
    for i in range(2):
        layer = f"transformer.h.{i}"
        shapes[f"{layer}.ln_1.weight"] = (C,)
        shapes[f"{layer}.ln_2.weight"] = (C,)
        shapes[f"{layer}.attn.c_attn.weight"] = (3 * C, C)
        shapes[f"{layer}.attn.c_attn.bias"] = (3 * C,)
        shapes[f"{layer}.attn.c_proj.weight"] = (C, C)
        shapes[f"{layer}.mlp.w1.weight"] = (I, C)
        shapes[f"{layer}.mlp.w2.weight"] = (I, C)
        shapes[f"{layer}.mlp.c_proj.weight"] = (C, I)
    shapes["transformer.wte.weight"] = (V, C)
    shapes["transformer.ln_f.weight"] = (C,)
    shapes["lm_head.weight"] = (V, C)
    tensors = random_tensors(shapes)
    folder = write_folder(tmp_path / "hf", config, tensors)

    layers = []
    for i in range(2):
        layer = f"transformer.h.{i}"
        layers.append({
            "norm1": tensors[f"{layer}.ln_1.weight"],
            "qkv": tensors[f"{layer}.attn.c_attn.weight"].split(C),
            "qkv_bias": tensors[f"{layer}.attn.c_attn.bias"].split(C),
            "o": tensors[f"{layer}.attn.c_proj.weight"],
            "norm2": tensors[f"{layer}.ln_2.weight"],
            "gate": tensors[f"{layer}.mlp.w2.weight"],
            "up": tensors[f"{layer}.mlp.w1.weight"],
            "down": tensors[f"{layer}.mlp.c_proj.weight"],
        })
    ids = row([23])[0]
    x = plain_decoder(
        layers, tensors["transformer.ln_f.weight"], tensors["transformer.wte.weight"][ids],
        head_dim=8, rotate=lambda x: rotate_halves(x, base=5000))
    expected = x @ tensors["lm_head.weight"].T

    ours = assert_equals_reference(folder, tmp_path, expected, ids)
    assert ours.config.max_position_embeddings == 512
    assert ours.config.intermediate_size == I
    assert_changes_are_refused(
        folder, [("no_bias", False), ("scale_attn_weights", False), ("rotary_pct", 0.5)])


@pytest.mark.parametrize("architecture", ["ChatGLMModel", "ChatGLMForConditionalGeneration"])
def test_chatglm_3_against_a_plain_reference(tmp_path, architecture):
    V = 97
    C = 48
    I = 40
    D = 16  # head size
    H = 4   # query heads
    G = 2   # key/value heads
    config = {
        "architectures": [architecture], "model_type": "chatglm", "padded_vocab_size": V,
        "hidden_size": C, "ffn_hidden_size": I, "num_layers": 2, "num_attention_heads": H,
        "multi_query_attention": True, "multi_query_group_num": G, "kv_channels": D,
        "layernorm_epsilon": 1e-6, "rmsnorm": True, "add_bias_linear": False,
        "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True,
        "rope_ratio": 2, "attention_dropout": 0.0, "bias_dropout_fusion": True,
        "fp32_residual_connection": False, "original_rope": True, "post_layer_norm": True,
        "seq_length": 512, "tie_word_embeddings": False, "quantization_bit": 0,
        "torch_dtype": "float32", "auto_map": {"AutoConfig": "configuration.C"},
    }
    shapes = {}
    for i in range(2):
        layer = f"transformer.encoder.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (C,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (C,)
        shapes[f"{layer}.self_attention.query_key_value.weight"] = ((H + 2 * G) * D, C)
        shapes[f"{layer}.self_attention.query_key_value.bias"] = ((H + 2 * G) * D,)
        shapes[f"{layer}.self_attention.dense.weight"] = (C, H * D)
        shapes[f"{layer}.mlp.dense_h_to_4h.weight"] = (2 * I, C)
        shapes[f"{layer}.mlp.dense_4h_to_h.weight"] = (C, I)
    shapes["transformer.embedding.word_embeddings.weight"] = (V, C)
    shapes["transformer.encoder.final_layernorm.weight"] = (C,)
    shapes["transformer.output_layer.weight"] = (V, C)
    tensors = random_tensors(shapes)
    folder = write_folder(tmp_path / "hf", config, tensors)

    layers = []
    qkv_rows = [H * D, G * D, G * D]
    for i in range(2):
        layer = f"transformer.encoder.layers.{i}"
        gate, up = tensors[f"{layer}.mlp.dense_h_to_4h.weight"].chunk(2)
        layers.append({
            "norm1": tensors[f"{layer}.input_layernorm.weight"],
            "qkv": tensors[f"{layer}.self_attention.query_key_value.weight"].split(qkv_rows),
            "qkv_bias": tensors[f"{layer}.self_attention.query_key_value.bias"].split(qkv_rows),
            "o": tensors[f"{layer}.self_attention.dense.weight"],
            "norm2": tensors[f"{layer}.post_attention_layernorm.weight"],
            "gate": gate,
            "up": up,
            "down": tensors[f"{layer}.mlp.dense_4h_to_h.weight"],
        })
    ids = row([23])[0]
    x = plain_decoder(
        layers, tensors["transformer.encoder.final_layernorm.weight"],
        tensors["transformer.embedding.word_embeddings.weight"][ids],
        head_dim=D, rotate=lambda x: rotate_neighbours(x, base=20000))
    expected = x @ tensors["transformer.output_layer.weight"].T

    assert_equals_reference(folder, tmp_path, expected, ids)
    assert_changes_are_refused(
        folder, [("rmsnorm", False), ("multi_query_attention", False), ("add_bias_linear", True)])


def test_internlm_and_old_yi(tmp_path):
    llama = wide_model(qkv_bias=True, o_bias=True)
    folder = remote_folder(tmp_path / "internlm", "InternLMForCausalLM",
                           dict(llama.named_parameters()), bias=True)
    config = load(folder).config
    assert config.qkv_bias
    assert config.o_bias
    assert not config.mlp_bias
    # rows up to its positions leave its dynamic RoPE alone; the base for longer rows could not be
    # exported
    convert.extend_context(config, 0, None, 512)
    assert config.rope_theta == 10000
    with pytest.raises(ValueError, match="MAX_LENGTH at most 512 if its RoPE is dynamic"):
        convert.extend_context(config, 0, None, 2048)

    llama = wide_model()
    tensors = {}
    for name, parameter in llama.named_parameters():
        name = name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2")
        tensors[name] = parameter
    folder = remote_folder(
        tmp_path / "yi", "YiForCausalLM", tensors, model_type="Yi", rope_theta=5e6)
    ours = load(folder)
    assert ours.config.rope_theta == 5e6
    for name, parameter in llama.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    convert.save_weights(ours, folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)


def test_other_architectures_are_refused(hf_folder):
    folder, _ = hf_folder()
    edit_config(folder, architectures=["MixtralForCausalLM"])
    message = "architecture MixtralForCausalLM is not supported: use one of Llama"
    with pytest.raises(ValueError, match=message):
        convert.load_config(folder)
    edit_config(folder, architectures=["Gemma2ForCausalLM"])
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is not supported .it caps the scores"):
        convert.load_config(folder)


# ------------------------------------------------------------------------------------------------
# Longer contexts

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXTENSIONS = [  # MAX_POSITION_EMBEDDINGS, ROPE_SCALING, the checkpoint's scaling, expected factor
    (1500, None, None, 3.0),
    (2048, "yarn", None, 4.0),
    (2048, {"type": "llama3"}, None, 4.0),
    (0, {"rope_type": "linear", "factor": 2.5}, None, 2.5),
    (2048, {"rope_theta": 5e5}, None, None),
    (1024, None, {"rope_type": "linear", "factor": 4.0}, 8.0),
    (1024, None, LLAMA3, 16.0),
    (2048, {"rope_type": "linear", "rope_theta": 5e4}, None, 4.0),
    (2048, {"rope_type": "dynamic"}, None, None),
    (0, None, {"rope_type": "dynamic", "factor": 6.0}, None),
]


@pytest.mark.parametrize("positions,limit", [(1024, 1024), (0, 512)])
def test_a_tokenizer_truncates_at_the_extended_context(
        hf_folder, tokenizer_files, tmp_path, positions, limit):
    folder, _ = hf_folder()
    tokenizer_files(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 512}))
    ours = load(folder)
    convert.extend_context(ours.config, positions, None, 512)
    convert.save_weights(ours, folder, tmp_path / "out")
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written == {**json.loads(path.read_text()), "model_max_length": limit}


@pytest.mark.parametrize("positions,scaling,old_scaling,factor", EXTENSIONS, ids=str)
def test_extended_context_is_what_transformers_serves(
        hf_folder, tmp_path, positions, scaling, old_scaling, factor):
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = {}
    if old_scaling:
        changes["rope_parameters"] = {"rope_theta": 10000.0, **old_scaling}
    folder, _ = hf_folder("llama", head_dim=16, **changes)
    ours = load(folder)
    length = 2048
    convert.extend_context(ours.config, positions, scaling, length)
    new_scaling = ours.config.rope_scaling or {}
    assert new_scaling.get("factor") == factor
    if old_scaling is None and factor and positions:
        assert factor == math.ceil(positions / 512)
    out = tmp_path / "out"
    convert.save_weights(ours, folder, out)

    # logits, up to position 1950, where transformers' float32 angles are wrong by 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    ids, _, cu_seqlens, max_seqlen, _ = row([40])
    positions_far_apart = torch.arange(40) * 50
    expected = theirs(ids[None], position_ids=positions_far_apart[None]).logits[0]
    logits = ours(ids, positions_far_apart, cu_seqlens, max_seqlen)
    assert_close(logits, expected, "logits", atol=1e-4 * expected.abs().max().item())

    # config.json says the same to transformers 4 and 5
    config = json_of(out)
    assert config["max_position_embeddings"] >= max(positions, 512)
    rope_of_4 = config["rope_scaling"] or {"rope_type": "default"}
    rope_of_5 = config["rope_parameters"]
    assert rope_of_4.get("type", rope_of_4["rope_type"]) == rope_of_5["rope_type"]
    without_type = {key: value for key, value in rope_of_4.items() if key != "type"}
    assert rope_of_5 == {"rope_theta": config["rope_theta"], **without_type}
    their_config = AutoConfig.from_pretrained(out)
    assert their_config.rope_parameters["rope_theta"] == ours.config.rope_theta

    # to us, too, and the same extension once more changes nothing
    reloaded = convert.load_config(out)
    assert torch.equal(rope_frequencies(reloaded)[0], rope_frequencies(ours.config)[0])
    theta_before = reloaded.rope_theta
    scaling_before = reloaded.rope_scaling
    convert.extend_context(reloaded, positions, scaling if factor else None, length)
    assert reloaded.rope_theta == theta_before
    assert reloaded.rope_scaling == scaling_before


MINISTRAL_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@pytest.mark.parametrize("model_type,scaling,changes", [
    ("smollm3", "yarn", FOUR_LAYERS), ("olmo2", "linear", {}),
    ("granite", "yarn", {"attention_multiplier": 0.2}),
    ("olmo3", "yarn", {**FOUR_LAYERS, "sliding_window": 5}), ("seed_oss", "dynamic", {}),
    ("ernie4_5", "llama3", {}), ("glm4", "yarn", {"num_attention_heads": 4}),
    ("gemma3_text", "linear", {**FOUR_LAYERS, "sliding_window": 5,
                               "layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("phi3", {"rope_theta": 1e6}, {}), ("ministral3", None, {"rope_parameters": MINISTRAL_YARN}),
], ids=str)
def test_extended_families_are_what_transformers_serves(
        hf_folder, tmp_path, model_type, scaling, changes):
    from transformers import AutoModelForCausalLM

    folder, _ = hf_folder(model_type, **{
        "head_dim": 16, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4,
        "pad_token_id": 0, **changes})
    ours = load(folder)
    convert.extend_context(ours.config, 2048, scaling, 2048)
    convert.save_weights(ours, folder, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids, _, cu_seqlens, max_seqlen, _ = row([40])
    positions_far_apart = torch.arange(40) * 50
    expected = theirs.eval()(ids[None], position_ids=positions_far_apart[None]).logits[0]
    logits = ours(ids, positions_far_apart, cu_seqlens, max_seqlen)
    assert_close(logits, expected, "logits", atol=1e-4 * expected.abs().max().item())
    assert convert.load_config(tmp_path / "out") == ours.config
    if model_type == "olmo2":  # transformers 4 takes exactly these keys
        assert json_of(tmp_path / "out")["rope_scaling"] == {"type": "linear", "factor": 4.0}


def test_alpha_of_hunyuan_is_exported_for_both_versions_of_transformers(hf_folder, tmp_path):
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
    folder, _ = hf_folder("hunyuan_v1_dense", rope_parameters=scaling)
    ours = load(folder)
    with pytest.raises(ValueError, match="HunYuanDenseV1ForCausalLM reads no rope_scaling"):
        convert.extend_context(ours.config, 2048, None, 512)
    convert.save_weights(ours, folder, tmp_path / "out")
    config = json_of(tmp_path / "out")
    assert config["rope_scaling"] == config["rope_parameters"] == scaling
    assert config["rope_theta"] == 1e4
    edit_config(folder, rope_parameters={**scaling, "rope_type": "yarn"})
    with pytest.raises(ValueError, match="not supported for Hunyuan: use dynamic with alpha"):
        convert.load_config(folder)


def test_olmo_3_keeps_its_base(hf_folder):
    folder, _ = hf_folder("olmo3", head_dim=6)
    config = convert.load_config(folder)
    for scaling in ("dynamic", {"rope_theta": 1e6}, {"rope_type": "linear", "rope_theta": 1e6}):
        with pytest.raises(ValueError, match="cannot have another base .* use ROPE_SCALING yarn"):
            convert.extend_context(config, 2048, scaling, 2048)


def test_a_scaled_mistral_is_exported_with_its_head_dim(hf_folder, tmp_path):
    """Transformers 4 computes yarn from this key, which the first Mistral leaves out."""
    folder, _ = hf_folder("mistral", head_dim=6)
    edit_config(folder, drop=["head_dim"])
    ours = load(folder)
    convert.extend_context(ours.config, 2048, None, 2048)
    convert.save_weights(ours, folder, tmp_path / "out")
    assert json_of(tmp_path / "out")["head_dim"] == 6


def test_ministral_keeps_its_type_of_scaling(hf_folder):
    folder, _ = hf_folder("ministral3", pad_token_id=0, rope_parameters=MINISTRAL_YARN)
    config = convert.load_config(folder)
    for scaling in ({"rope_type": "linear", "factor": 4.0}, "default"):
        with pytest.raises(ValueError, match="keep its type with ROPE_SCALING None"):
            convert.extend_context(config, 2048, scaling, 2048)


@pytest.mark.parametrize("positions", [0, 1024])
@pytest.mark.parametrize("length", [512, 131072, 1048576])
def test_dynamic_is_frozen_at_the_training_length(length, positions):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "dynamic", "factor": 6.0}
    config = Config(1, 512, 1, 1, 8, 8, 64, rope_theta=50000.0, max_position_embeddings=512,
                    rope_scaling=dict(scaling))
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=512,
                         rope_parameters={**scaling, "rope_theta": 50000.0})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=length)
    convert.extend_context(config, positions, None, length)
    frequencies, _ = rope_frequencies(config)
    assert_close(frequencies, expected, "frequencies", rtol=1e-6)

    position_ids = torch.tensor([0, 1, 4095, 131071, 1000000])
    cos, _ = rope_cos_sin(config, position_ids)
    angle = position_ids.double()[:, None] * frequencies.double()
    assert_close(cos[:, 0], angle.cos(), "cos", atol=1e-6)


@pytest.mark.parametrize("positions,scaling,message", [
    (256, None, "256 is less than the checkpoint's 512"),
    (1024, {"rope_type": "su"}, "'su' is unknown"),
    (1024, {"rope_type": "yarn"}, "needs its factor"),
    (1024, {"type": "linear", "facotr": 2.0}, "facotr 2.0 is not supported: use .*, factor,"),
])
def test_extensions_that_cannot_be_are_refused(positions, scaling, message):
    config = Config(1, 512, 1, 1, 8, 8, 64, max_position_embeddings=512)
    if message == "needs its factor":  # because the checkpoint is scaled by another type
        config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match=message):
        convert.extend_context(config, positions, scaling, 512)


@pytest.mark.parametrize("architecture,scaling", [
    ("YiForCausalLM", "linear"), ("YiForCausalLM", "yarn"), ("InternLM2ForCausalLM", "linear"),
    ("InternLM2ForCausalLM", None), ("Phi3ForCausalLM", "llama3"),
])
def test_families_are_extended_only_as_their_code_reads_it(architecture, scaling):
    def config():
        return Config(1, 512, 1, 1, 8, 8, 64, max_position_embeddings=512,
                      architecture=architecture)

    with pytest.raises(ValueError, match=f"{architecture} does not read rope_scaling of type"):
        convert.extend_context(config(), 2048, scaling, 2048)
    another_base = config()
    convert.extend_context(another_base, 2048, {"rope_theta": 1e6}, 2048)
    assert another_base.rope_theta == 1e6
    assert another_base.rope_scaling is None
    dynamic = config()
    convert.extend_context(dynamic, 2048, "dynamic", 2048)
    assert dynamic.rope_theta == pytest.approx(10000 * (4 * 3 + 1) ** (64 / 62))
    assert dynamic.rope_scaling is None


def test_dynamic_of_short_rows_acts_from_the_positions_of_the_checkpoint():
    config = Config(1, 512, 1, 1, 8, 8, 64, max_position_embeddings=512)
    with pytest.raises(ValueError, match="more than 512 tokens only, and MAX_LENGTH is 512"):
        convert.extend_context(config, 1024, "dynamic", 512)
    config.rope_scaling = {"rope_type": "dynamic", "factor": 2.0}
    convert.extend_context(config, 1024, None, 512)
    assert config.max_position_embeddings == 512
    assert config.rope_scaling == {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("positions,factor", [(131072, 4.0), (131073, 8.0), (262144, 8.0)])
def test_a_yarn_factor_that_covers_the_new_positions_stays(positions, factor):
    """As the card of Qwen 2.5 says: factor 4 of 32768 positions reaches 131072."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for old_positions in (32768, 131072):
        config = Config(1, 512, 1, 1, 8, 8, 64, max_position_embeddings=old_positions,
                        rope_scaling=dict(scaling))
        convert.extend_context(config, positions, None, 1024)
        assert config.rope_scaling == {**scaling, "factor": factor}
        assert config.max_position_embeddings == positions


# ------------------------------------------------------------------------------------------------
# config.json as it is published

ALWAYS = {
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "use_cache": True, "transformers_version": "4.40.0", "_name_or_path": "somebody/model",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}
LLAMA31 = {
    **LLAMA, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "vocab_size": 128256,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "attention_dropout": 0.0,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
    "attention_dropout": 0.0, "rms_norm_eps": 1e-6, "use_sliding_window": False,
    "rope_theta": 1000000.0, "tie_word_embeddings": False,
}
INTERNLM = {
    "hidden_act": "silu", "pad_token_id": 2, "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"},
}
GEMMA = {
    "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "attention_bias": False,
    "head_dim": 256, "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_activation": None,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0,
    "max_position_embeddings": 8192, "vocab_size": 256000,
}
COHERE = {
    "architectures": ["CohereForCausalLM"], "model_type": "cohere", "attention_bias": False,
    "hidden_act": "silu", "attention_dropout": 0.0, "layer_norm_eps": 1e-5,
    "model_max_length": 131072, "vocab_size": 256000,
}
BAICHUAN = {
    "model_type": "baichuan", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "max_position_embeddings": 4096, "_from_model_config": True,
    "pad_token_id": 0, "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},
}
GLM = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "add_bias_linear": False,
    "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "rmsnorm": True, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "kv_channels": 128,
    "classifier_dropout": None, "fp32_residual_connection": False, "hidden_dropout": 0.0,
    "post_layer_norm": True, "multi_query_attention": True, "original_rope": True,
    "tie_word_embeddings": False, "multi_query_group_num": 2,
}


PLAIN = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_scaling": None,
}
OLMO_3_YARN = {
    "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
    "original_max_position_embeddings": 8192, "rope_type": "yarn",
}


def sizes(C, I, L, H, G=None, **more):
    """The sizes of a published model by the letters of model.py, as keys of config.json."""
    found = {
        "hidden_size": C,
        "intermediate_size": I,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        **more,
    }
    if G:
        found["num_key_value_heads"] = G
    return found


def llama3(factor):
    return {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "rope_type": "llama3", "original_max_position_embeddings": 8192}


PUBLISHED = {  # name: (config.json, what is expected of Config)
    "Llama 1 7B": (
        {**LLAMA, **sizes(4096, 11008, 32, 32), "max_sequence_length": 2048, "vocab_size": 32000,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "pad_token_id": 0},
        {"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 1e4, "rms_norm_eps": 1e-6}),
    "Llama 2 70B": (
        {**LLAMA, **sizes(8192, 28672, 80, 64, 8), "max_position_embeddings": 4096,
         "vocab_size": 32000},
        {"num_key_value_heads": 8, "rope_theta": 1e4, "qkv_bias": False}),
    "Llama 3 8B": (
        {**LLAMA, **sizes(4096, 14336, 32, 32, 8), "rope_theta": 500000.0, "vocab_size": 128256,
         "max_position_embeddings": 8192, "attention_bias": False},
        {"rope_theta": 5e5}),
    "Llama 3.1 8B": (
        {**LLAMA31, **sizes(4096, 14336, 32, 32, 8), "rope_scaling": llama3(8.0)},
        {"rope_scaling": llama3(8.0), "max_position_embeddings": 131072}),
    "Llama 3.2 1B": (
        {**LLAMA31, **sizes(2048, 8192, 16, 32, 8, head_dim=64), "tie_word_embeddings": True,
         "rope_scaling": llama3(32.0)},
        {"head_dim": 64, "tie_word_embeddings": True}),
    "Llama 3.3 70B": (
        {**LLAMA31, **sizes(8192, 28672, 80, 64, 8, head_dim=128), "rope_scaling": llama3(8.0),
         "eos_token_id": [128001, 128008, 128009]},
        {"head_dim": 128, "mlp_bias": False}),
    "SmolLM2 135M": (
        {**LLAMA, **sizes(576, 1536, 30, 9, 3), "is_llama_config": True, "rope_interleaved": False,
         "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
         "attention_bias": False, "max_position_embeddings": 8192,
         "transformers.js_config": {"dtype": "q4f16"}},
        {"head_dim": 64, "rope_theta": 1e5}),
    "Yi 1.5 9B": (
        {**LLAMA, **sizes(4096, 11008, 48, 32, 4), "attention_bias": False,
         "attention_dropout": 0.0, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0,
         "vocab_size": 64000, "pad_token_id": 0, "max_position_embeddings": 4096},
        {"rope_theta": 5e6, "num_key_value_heads": 4}),
    "DeepSeek LLM 7B": (
        {**LLAMA, **sizes(4096, 11008, 30, 32, 32), "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "max_position_embeddings": 4096, "vocab_size": 102400},
        {"num_hidden_layers": 30}),
    "DeepSeek LLM 67B": (
        {**LLAMA, **sizes(8192, 22016, 95, 64, 8), "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "max_position_embeddings": 4096, "vocab_size": 102400},
        {"num_key_value_heads": 8}),
    "DeepSeek Coder 33B": (
        {**LLAMA, **sizes(7168, 19200, 62, 56, 8), "rms_norm_eps": 1e-6, "rope_theta": 100000,
         "rope_scaling": {"factor": 4.0, "type": "linear"}, "max_position_embeddings": 16384,
         "vocab_size": 32256},
        {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "Mistral 7B 0.1": (
        {**MISTRAL, **sizes(4096, 14336, 32, 32, 8), "max_position_embeddings": 32768,
         "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
        {"sliding_window": 4096}),
    "Mistral 7B 0.3": (
        {**MISTRAL, **sizes(4096, 14336, 32, 32, 8), "max_position_embeddings": 32768,
         "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
        {"sliding_window": None, "rope_theta": 1e6}),
    "Mistral Nemo": (
        {**MISTRAL, **sizes(5120, 14336, 40, 32, 8, head_dim=128),
         "max_position_embeddings": 131072, "rope_theta": 1000000.0, "sliding_window": None,
         "vocab_size": 131072},
        {"head_dim": 128}),
    "Zephyr 7B": (
        {**MISTRAL, **sizes(4096, 14336, 32, 32, 8), "max_position_embeddings": 32768,
         "pad_token_id": 2, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
        {"sliding_window": 4096}),
    "Qwen 7B": (
        {**sizes(4096, 22016, 32, 32), "architectures": ["QWenLMHeadModel"], "model_type": "qwen",
         "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False,
         "fp32": False, "kv_channels": 128, "layer_norm_epsilon": 1e-6,
         "max_position_embeddings": 32768, "no_bias": True, "onnx_safe": None,
         "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True,
         "seq_length": 8192, "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer",
         "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True,
         "vocab_size": 151936},
        {"intermediate_size": 11008, "qkv_bias": True, "o_bias": False,
         "max_position_embeddings": 8192}),
    "Qwen 1.5 7B": (
        {**QWEN2, **sizes(4096, 11008, 32, 32, 32), "max_window_layers": 28,
         "sliding_window": 32768, "max_position_embeddings": 32768, "vocab_size": 151936},
        {"sliding_window": None}),
    "Qwen 2 7B": (
        {**QWEN2, **sizes(3584, 18944, 28, 28, 4), "max_window_layers": 28,
         "sliding_window": 131072, "max_position_embeddings": 131072, "vocab_size": 152064},
        {"qkv_bias": True, "o_bias": False}),
    "Qwen 2.5 7B": (
        {**QWEN2, **sizes(3584, 18944, 28, 28, 4), "max_window_layers": 28,
         "sliding_window": 131072, "max_position_embeddings": 131072, "use_mrope": False,
         "vocab_size": 152064},
        {"head_dim": 128}),
    "Qwen 3 8B": (
        {**QWEN2, **sizes(4096, 12288, 36, 32, 8, head_dim=128),
         "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
         "max_window_layers": 36, "rope_scaling": None, "sliding_window": None,
         "max_position_embeddings": 40960, "vocab_size": 151936},
        {"qk_norm": True, "qkv_bias": False, "sliding_window": None}),
    "InternLM 7B": (
        {**INTERNLM, **sizes(4096, 11008, 32, 32), "architectures": ["InternLMForCausalLM"],
         "bias": True, "model_type": "internlm", "rms_norm_eps": 1e-6,
         "rotary": {"base": 10000, "type": "dynamic"}, "max_position_embeddings": 2048,
         "vocab_size": 103168},
        {"o_bias": True, "rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}),
    "InternLM 2 7B": (
        {**INTERNLM, **sizes(4096, 14336, 32, 32, 8), "architectures": ["InternLM2ForCausalLM"],
         "model_type": "internlm2", "bias": False, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
         "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "pretraining_tp": 1,
         "max_position_embeddings": 32768, "vocab_size": 92544},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
         "o_bias": False}),
    "InternLM 2.5 7B 1M": (
        {**INTERNLM, **sizes(4096, 14336, 32, 32, 8), "architectures": ["InternLM2ForCausalLM"],
         "model_type": "internlm2", "bias": False, "rms_norm_eps": 1e-5, "rope_theta": 50000000,
         "rope_scaling": {"factor": 2.5, "type": "dynamic"}, "pretraining_tp": 1,
         "max_position_embeddings": 262144, "vocab_size": 92544},
        {"rope_theta": 5e7}),
    "InternLM 3 8B": (
        {**INTERNLM, **sizes(4096, 10240, 48, 32, 2, head_dim=128), "model_type": "internlm3",
         "architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0, "bias": False,
         "qkv_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 50000000,
         "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "max_position_embeddings": 32768,
         "vocab_size": 128512},
        {"num_key_value_heads": 2, "qkv_bias": False, "mlp_bias": False}),
    "Gemma 2B": (
        {**GEMMA, **sizes(2048, 16384, 18, 8, 1)},
        {"head_dim": 256, "tie_word_embeddings": True, "activation": "gelu_pytorch_tanh"}),
    "Gemma 7B": (
        {**GEMMA, **sizes(3072, 24576, 28, 16, 16)},
        {"norm": "rms_plus_one", "scale_embedding": True}),
    "Command R": (
        {**COHERE, **sizes(8192, 22528, 40, 64, 64), "logit_scale": 0.0625, "rope_theta": 8000000.0,
         "max_position_embeddings": 8192, "use_qk_norm": False},
        {"tie_word_embeddings": True, "qk_norm": False, "rope_interleaved": True,
         "rms_norm_eps": 1e-5}),
    "Command R+": (
        {**COHERE, **sizes(12288, 33792, 64, 96, 8), "logit_scale": 0.8333333333333334,
         "rope_theta": 75000000.0, "max_position_embeddings": 8192, "use_qk_norm": True},
        {"qk_norm": True, "logit_scale": 0.8333333333333334}),
    "Starcoder 2 7B": (
        {**sizes(4608, 18432, 32, 36, 4), "architectures": ["Starcoder2ForCausalLM"],
         "use_bias": True, "model_type": "starcoder2", "activation_function": "gelu",
         "attention_dropout": 0.1, "attention_softmax_in_fp32": True, "embedding_dropout": 0.1,
         "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5, "norm_epsilon": 1e-5,
         "norm_type": "layer_norm", "mlp_type": "default", "residual_dropout": 0.1,
         "rope_theta": 1000000, "sliding_window": 4096, "scale_attention_softmax_in_fp32": True,
         "scale_attn_weights": True, "max_position_embeddings": 16384, "vocab_size": 49152},
        {"norm": "layer_bias", "mlp_gate": False, "o_bias": True, "mlp_bias": True,
         "sliding_window": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "Baichuan 7B": (
        {**BAICHUAN, **sizes(4096, 11008, 32, 32), "architectures": ["BaiChuanForCausalLM"],
         "vocab_size": 64000},
        {"normalize_head": False}),
    "Baichuan 2 7B": (
        {**BAICHUAN, **sizes(4096, 11008, 32, 32), "architectures": ["BaichuanForCausalLM"],
         "model_max_length": 4096, "vocab_size": 125696, "z_loss_weight": 0},
        {"normalize_head": True}),
    "ChatGLM 3 6B": (
        {**GLM, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28,
         "num_attention_heads": 32, "layernorm_epsilon": 1e-5, "padded_vocab_size": 65024,
         "vocab_size": 65024, "seq_length": 8192, "pre_seq_len": None, "prefix_projection": False,
         "quantization_bit": 0},
        {"num_key_value_heads": 2, "intermediate_size": 13696, "qkv_bias": True, "o_bias": False,
         "max_position_embeddings": 8192, "vocab_size": 65024}),
    "GLM 4 9B": (
        {**GLM, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 40,
         "num_attention_heads": 32, "num_hidden_layers": 40, "layernorm_epsilon": 1.5625e-07,
         "padded_vocab_size": 151552, "rope_ratio": 500, "seq_length": 131072,
         "vocab_size": 151552},
        {"rope_theta": 5e6, "rms_norm_eps": 1.5625e-07}),
    "SmolLM 3 3B": (
        {**PLAIN, **sizes(2048, 11008, 36, 16, 4), "architectures": ["SmolLM3ForCausalLM"],
         "model_type": "smollm3", "layer_types": ["full_attention"] * 36, "max_window_layers": 28,
         "max_position_embeddings": 65536, "mlp_bias": False, "no_rope_layer_interval": 4,
         "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rope_theta": 5000000.0,
         "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
        {"nope_layers": [3, 7, 11, 15, 19, 23, 27, 31, 35], "tie_word_embeddings": True}),
    "OLMo 2 7B": (
        {**PLAIN, **sizes(4096, 11008, 32, 32, 32), "architectures": ["Olmo2ForCausalLM"],
         "model_type": "olmo2", "max_position_embeddings": 4096, "rope_theta": 500000,
         "tie_word_embeddings": False, "vocab_size": 100352},
        {"norm_before": False, "norm_after": True}),
    "Olmo 3 7B": (
        {**PLAIN, **sizes(4096, 11008, 32, 32, 32), "architectures": ["Olmo3ForCausalLM"],
         "model_type": "olmo3", "max_position_embeddings": 65536, "rope_theta": 500000,
         "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
         "rope_scaling": OLMO_3_YARN, "sliding_window": 4096, "tie_word_embeddings": False,
         "vocab_size": 100278},
        {"rope_scaling": OLMO_3_YARN, "sliding_rope_theta": 5e5, "sliding_window": 4096}),
    "Granite 3.3 8B": (
        {**PLAIN, **sizes(4096, 12800, 40, 32, 8), "architectures": ["GraniteForCausalLM"],
         "model_type": "granite", "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
         "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False,
         "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_theta": 10000000.0,
         "tie_word_embeddings": True, "vocab_size": 49159},
        {"logit_scale": 1 / 16, "residual_multiplier": 0.22, "attention_multiplier": 1 / 128}),
    "Seed-OSS 36B": (
        {**PLAIN, **sizes(5120, 27648, 64, 80, 8, head_dim=128), "model_type": "seed_oss",
         "architectures": ["SeedOssForCausalLM"], "attention_bias": True,
         "attention_out_bias": False, "residual_dropout": 0.1, "mlp_bias": False,
         "max_position_embeddings": 524288, "rope_scaling": {"rope_type": "default"},
         "rope_theta": 10000000.0, "tie_word_embeddings": False, "vocab_size": 155136},
        {"head_dim": 128, "qkv_bias": True, "o_bias": False, "rope_scaling": None}),
    "Ernie 4.5 0.3B": (
        {**PLAIN, **sizes(1024, 3072, 18, 16, 2, head_dim=128), "model_type": "ernie4_5",
         "architectures": ["Ernie4_5ForCausalLM"], "compression_ratio": 1.0,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "tie_word_embeddings": True, "use_bias": False, "vocab_size": 103424},
        {"head_dim": 128, "rope_interleaved": True, "qkv_bias": False}),
    "Hunyuan 7B": (
        {**PLAIN, **sizes(4096, 14336, 32, 32, 8, head_dim=128), "model_type": "hunyuan_v1_dense",
         "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_head_dim": 128,
         "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
         "max_position_embeddings": 32768,
         "mlp_bias": False, "moe_intermediate_size": None, "moe_topk": 1, "norm_topk_prob": True,
         "norm_type": "rms", "num_experts": 1, "num_shared_expert": 1, "use_qk_norm": True,
         "use_rotary_pos_emb": True, "rope_theta": 10000.0, "routed_scaling_factor": 1.0,
         "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0,
                          "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"},
         "tie_word_embeddings": False, "vocab_size": 128167},
        {"rope_theta": 1e4 * 1000 ** (128 / 126), "rope_scaling": None, "qk_norm": True}),
    "Phi 3 mini 4k": (
        {**PLAIN, **sizes(3072, 8192, 32, 32, 32), "architectures": ["Phi3ForCausalLM"],
         "model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
         "embd_pdrop": 0.0, "resid_pdrop": 0.0, "max_position_embeddings": 4096,
         "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064},
        {"sliding_window": 2047}),
    "Phi 4": (
        {**PLAIN, **sizes(5120, 17920, 40, 40, 10), "architectures": ["Phi3ForCausalLM"],
         "model_type": "phi3", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_theta": 250000,
         "max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
         "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
         "vocab_size": 100352},
        {"rope_theta": 250000.0, "sliding_window": None}),
    "GLM 4 9B 0414": (
        {**PLAIN, **sizes(4096, 13696, 40, 32, 2, head_dim=128), "model_type": "glm4",
         "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 32768, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
         "tie_word_embeddings": False, "vocab_size": 151552},
        {"partial_rotary_factor": 0.5, "norm_after": True, "qkv_bias": True, "o_bias": False}),
    "Gemma 3 1B": (
        {**PLAIN, **sizes(1152, 6912, 26, 4, 1, head_dim=256), "model_type": "gemma3_text",
         "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None,
         "cache_implementation": "hybrid", "final_logit_softcapping": None,
         "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768,
         "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_theta": 1000000,
         "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
        {"sliding_window": 512, "sliding_rope_theta": 1e4, "rope_theta": 1e6,
         "attention_multiplier": 1 / 16, "tie_word_embeddings": True}),
    "Gemma 3 4B": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
         "text_config": {
             "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
             "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
             "sliding_window": 1024},
         "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1e6}),
    "Mistral Small 3.1": (
        {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
         "text_config": {
             **sizes(5120, 32768, 40, 32, 8, head_dim=128), "attention_dropout": 0.0,
             "hidden_act": "silu", "max_position_embeddings": 131072, "model_type": "mistral",
             "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": None,
             "vocab_size": 131072},
         "vision_config": {"hidden_size": 1024, "model_type": "pixtral"}},
        {"head_dim": 128, "rope_theta": 1e9, "sliding_window": None}),
    "Ministral 3 8B": (
        {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
         "text_config": {
             **sizes(4096, 14336, 34, 32, 8, head_dim=128), "attention_dropout": 0.0,
             "hidden_act": "silu", "max_position_embeddings": 262144, "model_type": "ministral3",
             "rms_norm_eps": 1e-5, "sliding_window": None, "vocab_size": 131072,
             "rope_parameters": {
                 "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
                 "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                 "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"}},
         "vision_config": {"hidden_size": 1024, "model_type": "pixtral"}},
        {"head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 262144}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name):
    published, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({**ALWAYS, **published}))
    config = convert.load_config(tmp_path)
    text = published.get("text_config", published)
    for key in ("hidden_size", "num_attention_heads", "vocab_size"):
        assert getattr(config, key) == text.get(key, expected.get(key)), key
    for key, value in expected.items():
        assert getattr(config, key) == value, key

    width = config.head_dim * config.num_attention_heads
    if "Gemma" in name:
        assert config.head_dim == 256
    elif "Nemo" in name:
        assert width == 4096
    elif "head_dim" in text:
        assert config.head_dim == text["head_dim"]
    else:
        assert width == config.hidden_size

    remote_code = convert.FAMILIES[config.architecture].remote_code
    if not remote_code:
        from transformers import AutoConfig

        theirs = AutoConfig.from_pretrained(tmp_path).get_text_config()
        for key in ("num_key_value_heads", "intermediate_size", "max_position_embeddings",
                    "tie_word_embeddings"):
            assert getattr(config, key) == getattr(theirs, key), key
        rope = theirs.rope_parameters
        if config.sliding_rope_theta is not None:
            assert config.sliding_rope_theta == rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        if name != "Hunyuan 7B":  # whose alpha is in our base
            assert config.rope_theta == rope["rope_theta"]


# ------------------------------------------------------------------------------------------------
# Faults of config.json

LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("drop,changes,theta,scaling", [
    (["rope_parameters"], {"rope_theta": 5e5}, 5e5, None),
    (["rope_theta"], {"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
    (["rope_parameters"], {"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, LINEAR),
    ([], {"rope_parameters": {"rope_theta": 3e4, **LINEAR}, "rope_theta": 3e4,
          "rope_scaling": {**LINEAR, "type": "linear"}}, 3e4, LINEAR),
    (["rope_parameters", "rope_theta"], {}, 1e4, None),
], ids=str)
def test_both_dialects_of_rope_are_read(hf_folder, drop, changes, theta, scaling):
    folder, _ = hf_folder()
    config = convert.load_config(edit_config(folder, drop, **changes))
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


LLAMA3_INCOMPLETE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}
CONFIG_FAULTS = [  # changes of config.json, and the message
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4.0}},
     "type 'yarn' and rope_type 'linear' differ: remove"),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
     "rope_theta 10000.0 and rope_parameters' 500000.0 differ"),
    ({"rope_parameters": {"rope_theta": 1e4, **LINEAR},
      "rope_scaling": {"type": "dynamic", "factor": 4.0}},
     "rope_type dynamic and rope_parameters' linear differ: remove"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "su", "factor": 2.0}},
     "'su' is unknown"),
    ({"rope_parameters": {"rope_type": "linear"}},
     "'factor' is missing"),
    ({"rope_parameters": LLAMA3_INCOMPLETE},
     "'original_max_position_embeddings' is missing"),
    ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor 0.5 is not supported"),
    ({"rope_parameters": {**LINEAR, "rope_type": "yarn", "mscale": 0.7}},
     "mscale 0.7 is not supported"),
    ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "rope_scaling .* has no rope_type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
     "is LongRoPE, which is not supported"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope", "long_factor": [2.0]}},
     "is LongRoPE, which is not supported"),
    ({"architectures": ["GemmaForCausalLM"], "hidden_act": "silu"}, "hidden_act 'silu' .* Gemma"),
    ({"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "hidden_activation": "relu"},
     "hidden_activation 'relu' .* Gemma"),
    ({"architectures": ["CohereForCausalLM"], "rope_parameters": None}, "'rope_theta' is missing"),
    ({"architectures": ["ChatGLMModel"], "rope_ratio": 16, "padded_vocab_size": 65024},
     "rope_ratio 16 divides the positions in ChatGLM 2"),
    ({"architectures": None, "model_type": "baichuan"}, "architecture None is not supported"),
    ({"vocab_size": None}, "'vocab_size' is missing: take the file from the model's origin"),
    ({"hidden_size": "64"}, "hidden_size '64' is not a whole number: correct it"),
    ({"architectures": ["UnheardOfForCausalLM"]}, "UnheardOfForCausalLM .*is not supported"),
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
    ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"qk_norm": True}, "qk_norm True changes"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 changes"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"RUN_DIR": "runs/chat"}, "the constants of a run: the trained model is in the folder hf"),
    ({"sliding_window": 4096}, "sliding_window 4096 changes"),
    ({"residual_multiplier": 0.22}, "residual_multiplier"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
]


@pytest.mark.parametrize("model_type,changes,message", [
    ("olmo3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3}, "has 3 entries for 2 layers"),
    ("smollm3", {"no_rope_layers": []}, "no_rope_layers has 0 entries for 2 layers"),
    ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
     "'full_attention' is missing"),
])
def test_what_differs_between_layers_is_said_of_every_layer(
        hf_folder, model_type, changes, message):
    folder, _ = hf_folder(model_type, head_dim=6, pad_token_id=0)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        convert.load_config(folder)


@pytest.mark.parametrize("model_type,drop,changes,message", [
    ("gemma3_text", [], {"rope_local_base_freq": 3e4},
     "rope_local_base_freq 30000.0 and the rope_theta 10000.0 of sliding_attention differ"),
    ("hunyuan_v1_dense", [], {"rope_scaling": {"type": "linear", "factor": 4.0}},
     "rope_scaling .*linear.* and rope_parameters .*default.* differ: remove"),
    ("ministral3", ["rope_parameters"], {"rope_theta": 1e4}, "rope_parameters is missing"),
])
def test_ropes_that_transformers_would_read_otherwise_are_refused(
        hf_folder, model_type, drop, changes, message):
    folder, _ = hf_folder(model_type, head_dim=6, pad_token_id=0)
    edit_config(folder, drop, **changes)
    with pytest.raises(ValueError, match=message):
        convert.load_config(folder)


@pytest.mark.parametrize("changes,message", CONFIG_FAULTS, ids=str)
def test_config_faults_are_named(hf_folder, changes, message):
    folder, _ = hf_folder()
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        convert.load_config(folder)
    assert "config.json" in str(error.value)


def test_a_folder_without_a_whole_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        convert.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaFor')
    with pytest.raises(ValueError, match="config.json: Unterminated string"):
        convert.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="config.json: 'num_attention_heads' is missing"):
        convert.load_config(tmp_path)


def test_neutral_and_harmless_keys_pass(hf_folder):
    folder, _ = hf_folder()
    edit_config(
        folder,
        residual_multiplier=1.0,
        attention_dropout=0.1,
        rope_interleaved=False,
        sliding_window=None,
        pretraining_tp=1,
        attn_implementation="flash_attention_2",
        layer_types=["full_attention"] * 2,
        auto_map={"AutoConfig": "c.C"},
        partial_rotary_factor=1.0,
    )
    convert.load_config(folder)
    edit_config(folder, use_sliding_window=False, sliding_window=4096, max_window_layers=28)
    assert convert.load_config(folder).sliding_window is None
    yarn = {"type": "yarn", "factor": 2.0, "finetuned": True, "partial_rotary_factor": 1.0}
    edit_config(folder, drop=["rope_parameters"], rope_scaling=yarn)
    assert convert.load_config(folder).rope_scaling == {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_a_key_that_the_code_of_a_family_does_not_read_changes_nothing(hf_folder, model_type):
    folder, _ = hf_folder(model_type, head_dim=6)
    edit_config(folder, attention_bias=True)
    config = load(folder).config
    assert config.qkv_bias == (model_type == "qwen2")
    assert not config.o_bias


@pytest.mark.parametrize("model_type,field,key", [
    ("starcoder2", "activation", "hidden_act"), ("starcoder2", "qkv_bias", "use_bias"),
    ("smollm3", "rope_theta", "rope_parameters"), ("olmo2", "rms_norm_eps", "rms_norm_eps"),
    ("olmo3", "rope_theta", "rope_parameters"), ("olmo3", "sliding_layers", "layer_types"),
    ("ernie4_5", "rope_theta", "rope_parameters"), ("seed_oss", "qkv_bias", "attention_bias"),
    ("glm4", "partial_rotary_factor", "rope_parameters"), ("glm4", "qkv_bias", "attention_bias"),
    ("gemma3_text", "sliding_rope_theta", "rope_parameters"),
    ("gemma3_text", "sliding_layers", "layer_types"), ("smollm3", "nope_layers", "no_rope_layers"),
    ("phi3", "rms_norm_eps", "rms_norm_eps"), ("cohere", "qk_norm", "use_qk_norm"),
])
def test_a_missing_key_means_the_default_of_the_family(hf_folder, model_type, field, key):
    folder, _ = hf_folder(model_type, head_dim=6, num_hidden_layers=8, pad_token_id=0)
    before = convert.load_config(folder)
    edit_config(folder, drop=[key])
    assert getattr(convert.load_config(folder), field) == getattr(before, field)


def test_internlm_3_has_an_epsilon_of_its_own(hf_folder):
    folder, _ = hf_folder()
    edit_config(folder, drop=["rms_norm_eps", "attention_bias"],
                architectures=["InternLM3ForCausalLM"])
    assert convert.load_config(folder).rms_norm_eps == 1e-5


@pytest.mark.parametrize("model_type,drop,changes,window", [
    ("mistral", ["sliding_window"], {}, 4096),
    ("mistral", [], {"sliding_window": None}, None),
    ("qwen2", [], {"use_sliding_window": False, "sliding_window": 7}, None),
    ("qwen2", ["layer_types"],
     {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
])
def test_sliding_windows(hf_folder, model_type, drop, changes, window):
    folder, _ = hf_folder(model_type)
    edit_config(folder, drop, **changes)
    assert convert.load_config(folder).sliding_window == window


@pytest.mark.parametrize("length,window", [(7, None), (8, 7)])
def test_a_window_no_shorter_than_the_rows_is_none(hf_folder, monkeypatch, length, window):
    folder, _ = hf_folder("mistral", sliding_window=7)
    monkeypatch.setattr(train, "MODEL", str(folder))
    monkeypatch.setattr(train, "MAX_LENGTH", length)
    assert train.plan(1)[1].sliding_window == window


def test_layers_without_their_window_keep_their_rope(hf_folder, monkeypatch):
    folder, _ = hf_folder("gemma3_text", sliding_window=7, num_hidden_layers=6)
    monkeypatch.setattr(train, "MODEL", str(folder))
    monkeypatch.setattr(train, "MAX_LENGTH", 7)
    config = train.plan(1)[1]
    assert [config.window(i) for i in range(6)] == [None] * 6
    assert [config.rope_kind(i) for i in range(6)] == ["sliding"] * 5 + ["default"]


def test_windows_of_some_layers(hf_folder):
    folder, _ = hf_folder("qwen2", head_dim=6)
    edit_config(folder, ["layer_types"],
                use_sliding_window=True, sliding_window=7, max_window_layers=1)
    config = convert.load_config(folder)
    assert [config.window(0), config.window(1)] == [None, 7]
    edit_config(folder, max_window_layers=2)  # as many as there are layers
    config = convert.load_config(folder)
    assert [config.window(0), config.window(1)] == [None, None]
    edit_config(folder, layer_types=["sliding_attention", "chunked_attention"])
    with pytest.raises(ValueError, match="layer_types .*chunked_attention.* not supported"):
        convert.load_config(folder)


# ------------------------------------------------------------------------------------------------
# Faults of the weights

NORM = "model.norm.weight"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def index_to(file):
    """Return a function that gives a folder an index, by which all tensors are in `file`."""
    def break_it(folder):
        names = load_file(folder / "model.safetensors").keys()
        index = {"metadata": {}, "weight_map": {name: str(file) for name in names}}
        (folder / convert.INDEX).write_text(json.dumps(index))
    return break_it


def index_to_absolute_path(folder):
    index_to(folder / "model.safetensors")(folder)


def index_cut_short(folder):
    (folder / convert.INDEX).write_text('{"weight_map": {')


def index_of_nothing(folder):
    (folder / convert.INDEX).write_text("{}")


def edit_tensors(folder, drop=(), **changes):
    tensors = load_file(folder / "model.safetensors")
    for name in drop:
        del tensors[name]
    tensors.update(changes)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def missing_tensor(folder):
    edit_tensors(folder, drop=[NORM])


def extra_tensor(folder):
    edit_tensors(folder, x=torch.ones(1))


def misshapen_tensor(folder):
    edit_tensors(folder, **{NORM: torch.ones(7)})


def lfs_pointer(folder):
    (folder / "model.safetensors").write_text(LFS_POINTER)


def no_head(folder):
    edit_tensors(folder, drop=["lm_head.weight"])


def more_key_value_heads(folder):
    edit_config(folder, num_key_value_heads=6)


def truncated_file(folder):
    os.truncate(folder / "model.safetensors", 5000)


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def stale_index(folder):
    index_to("model-00001-of-00001.safetensors")(folder)
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


FOLDER_FAULTS = {  # name: (what breaks the folder, the message)
    "an index that leaves the folder":
        (index_to("../hf/model.safetensors"), "points out of the folder"),
    "an absolute index": (index_to_absolute_path, "points out of the folder"),
    "an index of the folder itself": (index_to(".."), "points out of the folder"),
    "a missing shard":
        (index_to("model-00001-of-00002.safetensors"), "00002.safetensors is missing"),
    "a missing tensor":
        (missing_tensor, rf"1 tensors differ: {NORM} is missing, not \(48,\)"),
    "an extra tensor": (extra_tensor, r"x is \(1,\), not expected"),
    "an index cut short": (index_cut_short, "index.json is damaged"),
    "an index of nothing": (index_of_nothing, "index.json is damaged .KeyError"),
    "a misshapen tensor": (misshapen_tensor, rf"{NORM} is \(7,\), not \(48,\)"),
    "a git-lfs pointer": (lfs_pointer, "git-lfs pointer"),
    "no head": (no_head, "lm_head.weight is missing.*Should tie_word_embeddings be true"),
    "more key/value heads than stored":
        (more_key_value_heads, "tensors differ: .*Is num_key_value_heads right in config.json"),
    "a truncated file": (truncated_file, r"model.safetensors is damaged"),
    "pickles only": (only_pickles, r"pytorch_model.bin is a pickle"),
    "an index beside a whole model": (stale_index, "remove the one that is not the model"),
    "an adapter": (adapter, "has an adapter"),
    "nothing": (no_weights, "has no .safetensors"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folder_faults_are_named_and_nothing_is_loaded(hf_folder, fault):
    folder, _ = hf_folder()
    break_it, message = FOLDER_FAULTS[fault]
    break_it(folder)
    model = Transformer(convert.load_config(folder))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert.load_weights(model, folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_leftover_frequencies_and_a_stored_tied_head_are_accepted(hf_folder):
    folder, _ = hf_folder(tie_word_embeddings=True)
    embedding = tensors_of(folder)["model.embed_tokens.weight"]
    edit_tensors(folder, **{
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": embedding.clone(),
    })
    load(folder)


def test_only_files_that_transformers_loads_are_read(hf_folder):
    folder, theirs = hf_folder()
    for stray in ("consolidated", "adapter_model", "zzz"):
        save_file({NORM: torch.full((48,), 7.0)}, folder / f"{stray}.safetensors")
    assert torch.equal(load(folder).model["norm"].weight, theirs.model.norm.weight)


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_a_head_that_differs_from_its_embedding_is_untied(hf_folder, tmp_path, model_type):
    from transformers import AutoModelForCausalLM

    folder, _ = hf_folder(model_type, tie_word_embeddings=True)
    edit_tensors(folder, **{"lm_head.weight": torch.randn(97, 48)})
    if model_type == "gemma":  # tied unless config.json says otherwise
        edit_config(folder, drop=["tie_word_embeddings"])
    with pytest.warns(UserWarning, match="ties lm_head to the embedding, but"):
        ours = load(folder)
    ids, positions, cu_seqlens, max_seqlen, _ = row([23])
    logits = ours(ids, positions, cu_seqlens, max_seqlen)
    convert.save_weights(ours, folder, tmp_path / "out")
    assert json_of(tmp_path / "out")["tie_word_embeddings"] is False
    for opened in (folder, tmp_path / "out"):
        theirs = AutoModelForCausalLM.from_pretrained(opened, attn_implementation="eager")
        expected = theirs(ids[None]).logits[0]
        assert_close(logits, expected, "logits", atol=1e-5 * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------
# tools/check.py


@pytest.mark.parametrize("tied", [False, True])
def test_check_exits_by_what_it_found(hf_folder, tokenizer_files, tied):
    folder, _ = hf_folder(vocab_size=260, tie_word_embeddings=tied, **ODD)
    tokenizer_files(folder)
    command = [sys.executable, check.__file__, str(folder)]

    equal = subprocess.run(command, capture_output=True, text=True)
    assert equal.returncode == 0, equal.stdout + equal.stderr
    assert "MISMATCH" not in equal.stdout

    edit_config(folder, rms_norm_eps=float("nan"))  # both are nan everywhere: that is not equal
    different = subprocess.run(command, capture_output=True, text=True)
    assert different.returncode == 1, different.stdout + different.stderr
    assert different.stdout.startswith("layer 0    nan MISMATCH\n")


def test_check_names_the_layer_where_we_differ_from_transformers(
        hf_folder, tokenizer_files, capsys, monkeypatch):
    folder, _ = hf_folder(vocab_size=260, num_hidden_layers=3, **ODD)
    tokenizer_files(folder)

    def mismatches():
        """Whether each layer and the logits are printed as different."""
        lines = capsys.readouterr().out.splitlines()
        return [line.endswith(" MISMATCH") for line in lines[:4]]

    # the same
    assert not check.check(folder)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[:-1] for line in lines[:4]]
    assert names == [["layer", "0"], ["layer", "1"], ["layer", "2"], ["logits"]]
    losses = re.fullmatch(r"loss of 600 tokens (\S+), transformers' (\S+)", lines[4]).groups()
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)

    # other weights in layer 1
    load_weights = convert.load_weights

    def load_weights_changed(model, folder):
        load_weights(model, folder)
        model.model["layers"][1].mlp.down_proj.weight.data *= 1.01

    with monkeypatch.context() as patched:
        patched.setattr(convert, "load_weights", load_weights_changed)
        assert check.check(folder)
        assert mismatches() == [False, True, True, True]

    # we go by architectures, transformers by model_type, which has no window
    edit_config(folder, architectures=["MistralForCausalLM"], sliding_window=300)
    assert check.check(folder)
    assert mismatches() == [True, True, True, True]


# ------------------------------------------------------------------------------------------------
# Exports


def test_export_into_the_source_folder_keeps_its_tokenizer(hf_folder, tokenizer_files):
    folder, _ = hf_folder()
    tokenizer_files(folder)
    tokenizer_before = (folder / "tokenizer.json").read_bytes()
    tensors_before = {name: tensor.clone() for name, tensor in tensors_of(folder).items()}
    convert.save_weights(load(folder), folder, folder)
    assert (folder / "tokenizer.json").read_bytes() == tokenizer_before
    tensors_after = tensors_of(folder)
    assert tensors_after.keys() == tensors_before.keys()
    for name, tensor in tensors_before.items():
        assert torch.equal(tensors_after[name], tensor), name


def test_export_replaces_one_of_other_shards(hf_folder, tmp_path, monkeypatch):
    """The earlier files, if they stayed, would be opened instead of the new ones."""
    folder, theirs = hf_folder()
    (folder / "tokenizer").mkdir()  # some folders have one; only files are copied
    model = load(folder)
    norm = model.model["norm"].weight
    out = tmp_path / "out"
    whole = convert.SHARD_BYTES
    for shard_bytes in (20_000, whole, 30_000):
        monkeypatch.setattr(convert, "SHARD_BYTES", shard_bytes)
        with torch.no_grad():
            norm += 1
        convert.save_weights(model, folder, out)
        (out / "model-mine.safetensors.txt").touch()

        assert torch.equal(load(out).model["norm"].weight, norm)
        reopened = type(theirs).from_pretrained(out)
        assert torch.equal(reopened.model.norm.weight, norm)
        shards = [file.name for file in out.glob("*.safetensors")]
        if shard_bytes == whole:
            assert shards == ["model.safetensors"]
        else:
            assert "model.safetensors" not in shards
            assert len(shards) > 1
        assert (out / "model-mine.safetensors.txt").exists()


@pytest.mark.parametrize("scaling", [
    {"rope_type": "yarn", "factor": -1}, {"rope_type": "linear", "factor": 0.5},
    {"rope_type": "yarn", "factor": math.inf}, {"rope_type": "yarn", "factor": 4, "beta_fast": -3},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": math.nan},
    {"rope_type": "linear", "factor": "4"},
])
def test_numbers_of_a_rope_scaling_are_checked(hf_folder, scaling):
    folder, _ = hf_folder()
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    with pytest.raises(ValueError, match="rope_scaling's .* is not a number"):
        convert.load_config(folder)


def test_an_export_is_on_disk_before_it_has_its_name(
        hf_folder, tokenizer_files, tmp_path, monkeypatch):
    folder, _ = hf_folder()
    tokenizer_files(folder)
    synchronized = []
    write_shards = convert._write_shards
    replace_folder = convert._replace_folder

    def write(model, dtypes, shards, files, out):
        error = write_shards(model, dtypes, shards, files, out)
        assert {out / file for file in files} == set(synchronized)  # by the rank that wrote them
        return error

    def replace(out, part):
        files = [path for path in part.rglob("*") if path.is_file()]
        assert len(files) > 4   # two shards, their index, config.json and the tokenizer
        assert {*files, part} <= set(synchronized)
        replace_folder(out, part)

    monkeypatch.setattr(convert, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(convert, "_write_shards", write)
    monkeypatch.setattr(convert, "_replace_folder", replace)
    monkeypatch.setattr(parallel, "fsync", synchronized.append)
    convert.save_weights(load(folder), folder, tmp_path / "out")
    assert synchronized[-1] == tmp_path


@pytest.mark.parametrize("stored,written", [
    (torch.float32, "bfloat16"), (torch.bfloat16, "float16"), (torch.float16, "float32"),
])
def test_export_has_the_dtype_of_the_tensors(hf_folder, tmp_path, stored, written):
    """Not that of config.json: 1e6 is infinite in float16, and bfloat16 rounds float32."""
    folder, theirs = hf_folder()
    theirs.to(stored).save_pretrained(folder)
    norm = torch.ones(48) if stored == torch.float16 else torch.full((48,), 1e6)
    edit_tensors(folder, **{NORM: norm})  # some folders have norms in float32
    edit_config(folder, dtype=written, torch_dtype=written)
    convert.save_weights(load(folder), folder, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folder)
    assert json_of(tmp_path / "out")["dtype"] == str(stored).removeprefix("torch.")


def save_on_ranks(folder, out):
    _, model = load_sharded(folder)
    convert.save_weights(model, folder, out)


def test_shards_do_not_depend_on_the_number_of_ranks(hf_folder, tmp_path):
    folder, _ = hf_folder()
    on_ranks(2, save_on_ranks, folder, tmp_path / "out", tmp_path=tmp_path)
    shards = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert shards == ["model.safetensors"]


def test_all_files_of_a_tokenizer_are_exported(hf_folder, tmp_path):
    folder, _ = hf_folder()
    (folder / "additional_chat_templates").mkdir()
    names = ("additional_chat_templates/rag.jinja", "tekken.json", "chat_template.json")
    for name in names:
        (folder / name).write_text(name)
    convert.save_weights(load(folder), folder, tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_text() == name


def test_export_of_a_checkpoint_whose_model_has_moved(hf_folder, tmp_path, monkeypatch):
    folder, _ = hf_folder()
    model = load(folder)
    manifest = {"config": vars(model.config), "model": str(tmp_path / "moved"), "step": 3}
    monkeypatch.setattr(parallel, "read_manifest", lambda checkpoint: manifest)
    monkeypatch.setattr(
        parallel, "load_checkpoint", lambda checkpoint, model: convert.load_weights(model, folder))
    with pytest.raises(FileNotFoundError, match="moved that was trained has no .* MODEL"):
        convert.main("checkpoint", tmp_path / "out")
    convert.main("checkpoint", tmp_path / "out", folder)
    assert_same_tensors(tmp_path / "out", folder)


def export_where_one_cannot_write(folder, out):
    grid, model = load_sharded(folder)
    convert.SHARD_BYTES = 10_000  # several files, so that both ranks write
    if grid.rank == 1:
        out = folder / "config.json" / "out"  # below a file
    with pytest.raises(RuntimeError, match="export: rank 1: OSError: .*Not a directory.* Free space"):
        parallel.run_on_ranks("export", convert.save_weights, model, folder, out)
    assert grid.rank != 0 or not out.with_name("out.part").exists()


def test_a_rank_that_cannot_write_leaves_no_other_waiting(hf_folder, tmp_path):
    folder, _ = hf_folder()
    on_ranks(2, export_where_one_cannot_write, folder, tmp_path / "out", tmp_path=tmp_path)
