"""Hugging Face folders in and out: config.json <-> Config, safetensors <-> parameters, rank by rank.

    python convert.py runs/demo/checkpoints/step-00000300 OUT_FOLDER      a training checkpoint as a Hugging Face folder

A family is a row of FAMILIES. Its names map ours to theirs; the inverse, for export, is computed from it.
"""
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import Config, Transformer, parallel, rope_frequencies

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
                   "generation_config.json", "*.tiktoken")


class Family(NamedTuple):
    """How one architecture's folder differs from Llama's."""
    switches: object        # config.json as a dict -> the fields of Config that it sets apart
    renames: tuple = ()     # (ours, theirs) substrings of parameter names, applied in order


FAMILIES = {
    "LlamaForCausalLM": Family(lambda c: {
        "qkv_bias": c.get("attention_bias", False), "o_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False)}),
    "MistralForCausalLM": Family(lambda c: {"sliding_window": c.get("sliding_window", 4096)}),
    "Qwen2ForCausalLM": Family(lambda c: {"qkv_bias": True, "sliding_window": _qwen_window(c)}),
    "Qwen3ForCausalLM": Family(lambda c: {
        "qkv_bias": c.get("attention_bias", False), "o_bias": c.get("attention_bias", False), "qk_norm": True,
        "head_dim": c.get("head_dim", 128), "sliding_window": _qwen_window(c)}),
}
MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
               "qwen3": "Qwen3ForCausalLM"}


def _qwen_window(c):
    if not c.get("use_sliding_window"):
        return None
    if c.get("max_window_layers", 0) > 0:
        raise ValueError("use_sliding_window with max_window_layers > 0 gives layers different windows, which is not "
                         "built: set use_sliding_window to false in config.json")
    return c.get("sliding_window", 4096)


# --------------------------------------------------------------------------------------------------------- config.json

def load_config(folder):
    """-> Config. FileNotFoundError or ValueError names the file and the key that is missing, contradictory or
    unknown."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"MODEL {str(folder)!r} has no config.json: name a Hugging Face folder")
    c = json.loads(path.read_text())
    architecture = (c.get("architectures") or [MODEL_TYPES.get(c.get("model_type"))])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"{path}: architecture {architecture} (model_type {c.get('model_type')}) is not supported: "
                         f"use one of {', '.join(FAMILIES)}")
    if c.get("quantization_config"):
        raise ValueError(f"{path}: the weights are quantized ({c['quantization_config'].get('quant_method')}): train "
                         "from the unquantized folder")
    if c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {c['hidden_act']!r} is not silu, the only one built")
    theta, scaling = _rope(c, path)
    fields = {
        "architecture": architecture, "vocab_size": c["vocab_size"], "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"], "num_hidden_layers": c["num_hidden_layers"],
        "num_attention_heads": c["num_attention_heads"],
        "num_key_value_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "rms_norm_eps": c.get("rms_norm_eps", 1e-6), "rope_theta": theta, "rope_scaling": scaling,
        "max_position_embeddings": c.get("max_position_embeddings", 2048),
        "tie_word_embeddings": c.get("tie_word_embeddings", False)}
    config = Config(**{**fields, **FAMILIES[architecture].switches(c)})
    try:
        rope_frequencies(config)
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path}: rope scaling {scaling}: {e}") from e
    return config


def _rope(c, path):
    """-> rope_theta, rope_scaling, from the old keys (rope_theta, rope_scaling), the new (rope_parameters), or both."""
    new = c.get("rope_parameters") or {}
    old = c.get("rope_scaling") or {}
    old = {("rope_type" if k == "type" else k): v for k, v in old.items()}
    theta = new.get("rope_theta", c.get("rope_theta", old.get("rope_theta", 10000.0)))
    if c.get("rope_theta", theta) != theta:
        raise ValueError(f"{path}: rope_theta {c['rope_theta']} and {theta} in rope_parameters differ: remove one")
    new, old = ({k: v for k, v in d.items() if k != "rope_theta" and v is not None} for d in (new, old))
    if new and old and {"rope_type": "default", **new} != {"rope_type": "default", **old}:
        raise ValueError(f"{path}: rope_scaling {old} and rope_parameters {new} differ: remove the wrong one")
    scaling = new or old
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor {scaling['partial_rotary_factor']} is not built")
    if scaling.get("rope_type", "default") == "default":
        return float(theta), None
    if scaling["rope_type"] == "llama3" and "original_max_position_embeddings" not in scaling:
        raise ValueError(f"{path}: rope_type llama3 needs original_max_position_embeddings: add it")
    return float(theta), scaling


def export_config(source, config, dtype):
    """-> the config.json of `source` (a dict) with what training changed, in the words of transformers 4 and 5 both: 4
    silently takes theta 10000 where it finds only the new ones."""
    c = {k: v for k, v in source.items() if k not in ("auto_map", "quantization_config", "rope_parameters")}
    scaling = config.rope_scaling or {"rope_type": "default"}
    c["rope_parameters"] = {"rope_theta": config.rope_theta, **scaling}
    c["rope_theta"], c["rope_scaling"] = config.rope_theta, config.rope_scaling and dict(config.rope_scaling)
    if c["rope_scaling"]:
        c["rope_scaling"]["type"] = c["rope_scaling"]["rope_type"]
    c["max_position_embeddings"], c["architectures"] = config.max_position_embeddings, [config.architecture]
    c["torch_dtype"] = c["dtype"] = str(dtype).removeprefix("torch.")
    return c


# ------------------------------------------------------------------------------------------------------------- weights

def their_name(config, ours):
    """The name of a parameter in the folder of its family."""
    for mine, theirs in FAMILIES[config.architecture].renames:
        ours = ours.replace(mine, theirs)
    return ours


def _weight_files(folder):
    """-> {tensor name: path}. ValueError or FileNotFoundError for everything that is not a whole set of safetensors."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{index}: {name!r} points out of the folder: only plain file names are read")
    else:
        names = {f.name for f in folder.glob("*.safetensors")}
    if not names:
        others = sorted(f.name for f in folder.glob("*.bin"))
        raise FileNotFoundError(f"{folder} has no .safetensors{f' ({others[0]} is a pickle)' if others else ''}: save "
                                "the model with safe_serialization=True, or set INIT=random")
    where = {}
    for name in sorted(names):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing, and {index.name} names it: download it")
        try:
            with safe_open(folder / name, "pt") as f:
                where.update(dict.fromkeys(f.keys(), folder / name))
        except SafetensorError as e:
            what = "a git-lfs pointer" if (folder / name).read_bytes()[:12] == b"version http" else "damaged"
            raise ValueError(f"{folder / name} is {what} ({e}): download it again") from e
    return where


@torch.no_grad()
def load_weights(model, folder):
    """Fill every parameter from the folder's safetensors. Each rank reads its own rows from the mapped files.
    ValueError names a tensor that is missing, not expected, or of another shape; nothing has been read then."""
    config, where = model.config, _weight_files(folder)
    wanted = {their_name(config, name): p.shape for name, p in model.named_parameters()}
    unused = {n for n in where if n.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        unused.add(their_name(config, "lm_head.weight"))
    missing, extra = sorted(set(wanted) - set(where)), sorted(set(where) - set(wanted) - unused)
    if missing or extra:
        raise ValueError(f"{folder}: " + "; ".join(f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in
                         (("tensors are missing", missing), ("are not the architecture's", extra)) if names)
                         + f". The folder is not the {config.architecture} its config.json describes")
    files = {path: safe_open(path, "pt") for path in set(where.values())}
    for name, shape in wanted.items():
        found = tuple(files[where[name]].get_slice(name).get_shape())
        if found != tuple(shape):
            raise ValueError(f"{where[name]}: {name} has shape {found}, and config.json asks for {tuple(shape)}")
    for name, rows, first in model.local_parameters():
        theirs = their_name(config, name)
        if len(rows):
            rows.copy_(files[where[theirs]].get_slice(theirs)[first:first + len(rows)])


@torch.no_grad()
def save_weights(model, source_folder, out_folder):
    """Write a Hugging Face folder: safetensors in shards of at most 5 GB, config.json, tokenizer files byte for byte.
    All ranks call it; tensors are gathered one at a time, and each rank holds and writes the shards that fall to it."""
    source, out, config = Path(source_folder), Path(out_folder), model.config
    out.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    mesh = getattr(next(iter(parameters.values())), "device_mesh", None)
    rank, world = (mesh.get_rank(), mesh.size()) if mesh is not None else (0, 1)
    source_config = json.loads((source / "config.json").read_text())
    named = source_config.get("dtype") or source_config.get("torch_dtype") or "float32"
    dtype = DTYPES.get(named, torch.bfloat16)
    total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
    limit, shards, filled = min(SHARD_BYTES, -(-total // world)), [[]], 0
    for name, p in parameters.items():
        if filled and filled + p.numel() * dtype.itemsize > limit:
            shards, filled = shards + [[]], 0
        shards[-1].append(name)
        filled += p.numel() * dtype.itemsize
    one = len(shards) == 1
    names = ["model.safetensors" if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
             for i in range(len(shards))]
    error = None
    for start in range(0, len(shards), world):
        mine = {}
        for owner, shard in enumerate(shards[start:start + world]):
            for name in shard:
                p = parameters[name]
                full = p.full_tensor() if hasattr(p, "full_tensor") else p
                if owner == rank:
                    mine[their_name(config, name)] = full.detach().to("cpu", dtype).contiguous()
        try:  # the other ranks go on to the next gather: fail after the last
            if mine:
                save_file(mine, out / names[start + rank], metadata={"format": "pt"})
        except (OSError, SafetensorError) as e:
            error = error or e
    if error:
        raise OSError(f"{out}: {error}") from error
    if rank == 0:
        weight_map = {their_name(config, n): file for file, shard in zip(names, shards) for n in shard}
        if not one:
            (out / "model.safetensors.index.json").write_text(json.dumps(
                {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
        (out / "config.json").write_text(json.dumps(export_config(source_config, config, dtype), indent=2))
        for file in (f for pattern in TOKENIZER_FILES for f in source.glob(pattern)):
            if not (out / file.name).exists() or not file.samefile(out / file.name):
                shutil.copyfile(file, out / file.name)


def main(checkpoint, out):
    """Checkpoint -> Hugging Face folder, in one process, on the host. The run's config.json says which MODEL it was."""
    manifest = parallel.read_manifest(checkpoint)
    source = manifest["model"]
    with torch.device("cpu"):
        model = Transformer(Config(**manifest["config"]))
    parallel.load_checkpoint(checkpoint, model)
    save_weights(model, source, out)
    print(f"{out}: step {manifest['step']} of {source}, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.path.isdir(sys.argv[1]):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
