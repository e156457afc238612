"""Folders in and out: bit-equal when nothing was trained, and refused by name when they are not what they say."""
import json

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file, save_file

import convert
from model import Transformer

FAMILIES = [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}),
            ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5,
                                           "original_max_position_embeddings": 128}})]


def load(folder):
    model = Transformer(convert.load_config(folder))
    convert.load_weights(model, folder)
    return model


def edit(folder, **changes):
    """Change config.json; a value of None removes the key."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type,changes", FAMILIES, ids=str)
def test_what_was_not_trained_comes_back_bit_equal(hf_folder, tmp_path, monkeypatch, model_type, changes, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM
    folder, theirs = hf_folder(model_type, **changes)
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    edit(folder, dtype=dtype, some_unknown_note="kept", auto_map={"AutoConfig": "x.py"})
    (folder / "tokenizer.json").write_bytes(b'{"odd":  "spacing"}\r\n')
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    monkeypatch.setattr(convert, "SHARD_BYTES", 40_000)
    convert.save_weights(load(folder), folder, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    back = {k: v for shard in shards for k, v in load_file(shard).items()}
    source = load_file(folder / "model.safetensors")
    assert len(shards) > 1 and back.keys() == source.keys()
    assert all(torch.equal(back[k], source[k]) and back[k].dtype == source[k].dtype for k in source)
    for file in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["some_unknown_note"] == "kept" and "auto_map" not in written
    config, before = AutoConfig.from_pretrained(tmp_path / "out"), AutoConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_theta"] == before.rope_parameters["rope_theta"] == written["rope_theta"]
    assert config.rope_parameters.get("factor") == before.rope_parameters.get("factor")
    ids = torch.arange(20)[None]
    opened, source = (AutoModelForCausalLM.from_pretrained(f, attn_implementation="eager").float()
                      for f in (tmp_path / "out", folder))
    assert_close(opened(ids).logits, source(ids).logits, "logits", rtol=0)


def test_old_and_new_rope_keys_mean_the_same(hf_folder):
    folder, _ = hf_folder()
    scaling = {"type": "linear", "factor": 4.0}
    edit(folder, rope_parameters=None, rope_theta=7e4, rope_scaling=scaling)
    old = convert.load_config(folder)
    edit(folder, rope_theta=None, rope_scaling=None,
         rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 7e4})
    assert convert.load_config(folder) == old and (old.rope_theta, old.rope_scaling["factor"]) == (7e4, 4.0)
    written = convert.export_config({}, old, torch.float32)
    assert written["rope_scaling"]["type"] == written["rope_parameters"]["rope_type"] == "linear"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 7e4


CONFIGS = [({"architectures": ["FancyForCausalLM"]}, "FancyForCausalLM .* not supported"),
           ({"quantization_config": {"quant_method": "fp8"}}, "quantized .fp8"), ({"hidden_act": "gelu"}, "gelu"),
           ({"rope_theta": 3.0}, "differ: remove one"),
           ({"rope_scaling": {"type": "linear", "factor": 2.0},
             "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "differ: remove the wrong one"),
           ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral' is unknown"),
           ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "original_max_position")]


@pytest.mark.parametrize("changes,message", CONFIGS, ids=lambda v: str(v)[:40])
def test_a_config_that_cannot_be_followed_is_refused(hf_folder, changes, message):
    folder, _ = hf_folder()
    edit(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        convert.load_config(folder)


def drop(tensors):
    del tensors["model.norm.weight"]


def add(tensors):
    tensors["model.layers.0.rope.weight"] = torch.zeros(1)


def reshape(tensors):
    tensors["model.norm.weight"] = torch.zeros(7)


@pytest.mark.parametrize("change,message", [(drop, "1 tensors are missing: model.norm.weight"),
                                            (reshape, "norm.weight has shape"),
                                            (add, "1 are not the architecture's: model.layers.0.rope.weight")])
def test_tensors_that_are_not_the_models_are_named(hf_folder, change, message):
    folder, _ = hf_folder()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_files_that_are_not_there_or_not_safetensors_are_named(hf_folder):
    folder, _ = hf_folder()
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    for name, error in (("../model.safetensors", "points out of the folder"), ("/model.safetensors", "points out"),
                        ("model-2.safetensors", "is missing")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            load(folder)
    index.unlink()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        load(folder)
