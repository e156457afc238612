"""Hugging Face folders in and out: config.json <-> Config, safetensors <-> parameters, rank by rank.

    python convert.py runs/demo/checkpoints/step-00000300 OUT_FOLDER      a training checkpoint as a Hugging Face folder

A family is a row of FAMILIES. Its names map ours to theirs; the inverse, for export, is computed from it.
"""
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import Config, Transformer, parallel, rope_frequencies

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
                   "generation_config.json", "*.tiktoken", "*.py")


class Family(NamedTuple):
    """How one architecture's folder differs from Llama's."""
    switches: object = lambda get: {}   # config.json, as a function get(key, default) -> fields of Config
    renames: tuple = ()     # (ours, theirs) substrings of parameter names, in order; several of ours may be one
    grouped: bool = False   # their q, k, v: the rows of one key/value head, then those of the next
    remote: bool = False    # its code comes with the folder, so auto_map stays
    own_rope: bool = False  # its code reads no rope_scaling, so its context cannot be extended


def _qwen_window(get):
    window, first, types = get("sliding_window", 4096), get("max_window_layers", 28), get("layer_types", ())
    if get("use_sliding_window") and ("full_attention" in types or first > 0 and not types):
        raise ValueError("a sliding window for some layers only is not built: set use_sliding_window to false")
    return window if get("use_sliding_window") else None


def _biases(attention, mlp=False):
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


_W_PACK = tuple((f"self_attn.{x}_proj", "self_attn.W_pack") for x in "qkv")
FAMILIES = {
    "LlamaForCausalLM": Family(lambda get: _biases(get("attention_bias", False), get("mlp_bias", False))),
    "YiForCausalLM": Family(renames=(("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2")), remote=True),
    "MistralForCausalLM": Family(lambda get: {"sliding_window": get("sliding_window", 4096)}),
    "Qwen2ForCausalLM": Family(lambda get: {"qkv_bias": True, "sliding_window": _qwen_window(get)}),
    "Qwen3ForCausalLM": Family(lambda get: {
        **_biases(get("attention_bias", False)), "qk_norm": True, "head_dim": get("head_dim", 128),
        "sliding_window": _qwen_window(get)}),
    "InternLMForCausalLM": Family(lambda get: {
        **_biases(get("bias", True)), "rope_theta": get("rotary", {}).get("base", 10000.0), "rope_scaling": {
            "rope_type": {"origin": "default"}.get(get("rotary", {}).get("type"), "dynamic"), "factor": 1.0}},
        remote=True, own_rope=True),
    "InternLM2ForCausalLM": Family(lambda get: _biases(get("bias", True)), (
        ("embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("self_attn.o_proj", "attention.wo"),
        *((f"self_attn.{x}_proj", "attention.wqkv") for x in "qkv"), ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2")), grouped=True, remote=True),
    "InternLM3ForCausalLM": Family(lambda get: {
        "qkv_bias": get("qkv_bias", get("attention_bias", False)),
        **dict.fromkeys(("o_bias", "mlp_bias"), get("bias", get("mlp_bias", False)))}, remote=True),
    "GemmaForCausalLM": Family(lambda get: {
        **_biases(get("attention_bias", False)), "norm": "rms_plus_one", "scale_embedding": True,
        "activation": "gelu_pytorch_tanh",  # hidden_act may say gelu, which the model was not trained with
        "head_dim": get("head_dim", 256), "tie_word_embeddings": get("tie_word_embeddings", True)}),
    "CohereForCausalLM": Family(lambda get: {
        **_biases(get("attention_bias", False)), "norm": "layer", "rms_norm_eps": get("layer_norm_eps", 1e-5),
        "parallel_residual": True, "rope_interleaved": True, "qk_norm": get("use_qk_norm", False),
        "logit_scale": get("logit_scale", 0.0625), "tie_word_embeddings": get("tie_word_embeddings", True)}),
    "BaiChuanForCausalLM": Family(lambda get: {}, _W_PACK, remote=True, own_rope=True),
    "BaichuanForCausalLM": Family(lambda get: {"normalize_head": True}, _W_PACK, remote=True, own_rope=True),
}
REFUSED = {"QWenLMHeadModel": "Qwen 1 renames every key and tensor, Qwen 1.5 does not", "Starcoder2ForCausalLM":
           "its MLP has no gate", "ChatGLMModel": "it rotates half of a head, and renames every key and tensor"}
MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
          "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
# A key that nobody asked for is refused if its name says that it computes, unless its value is neutral
COMPUTES = re.compile("attn|attention|rope|rotary|norm|scal|softcap|multipl|expert|moe|lora|alibi|window|bias|residual|"
                      "mup|layer_types|sink|original_max")
HARMLESS = re.compile("dropout|implementation|flash|fp32|initializer")
ROPE_KEYS = {"rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
             "truncate", "beta_fast", "beta_slow", "attention_factor"}


# --------------------------------------------------------------------------------------------------------- config.json

def load_config(folder):
    """-> Config. FileNotFoundError or ValueError names the file and the key that is missing, in conflict or unknown."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"MODEL {str(folder)!r} has no config.json: name a Hugging Face folder")
    c, asked = json.loads(path.read_text()), {"rope_theta", "rope_scaling", "rope_parameters"}
    architecture = (c.get("architectures") or [MODEL_TYPES.get(c.get("model_type"))])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"{path}: architecture {architecture} (model_type {c.get('model_type')}) is not supported: "
                         f"{REFUSED.get(architecture, 'it is unknown')}. Use one of {', '.join(FAMILIES)}")
    if c.get("quantization_config"):
        raise ValueError(f"{path}: the weights are quantized ({c['quantization_config'].get('quant_method')}): train "
                         "from the unquantized folder")

    def get(key, default=None):
        asked.add(key)
        return default if c.get(key) is None and key != "sliding_window" else c.get(key, default)

    try:
        fields = {"architecture": architecture, "activation": get("hidden_act", "silu"),
                  **{key: get(key) for key in SHARED if get(key) is not None}}
        fields["rope_theta"], fields["rope_scaling"] = _rope(c)
        fields.update(FAMILIES[architecture].switches(get))
        if architecture == "BaichuanForCausalLM" and "max_position_embeddings" not in fields:
            raise ValueError("max_position_embeddings is missing, as in 13B, whose ALiBi is not built: use 7B")
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        for key, value in c.items():
            neutral = value in (None, False, 0, 1, "", [], {}, ["full_attention"] * fields["num_hidden_layers"])
            suspect = COMPUTES.search(key) and not HARMLESS.search(key) and key not in asked
            if suspect and (value is True or not neutral):
                raise ValueError(f"{key} {value!r} changes the computation, by its name, and is not built for "
                                 f"{architecture}: use another folder, or remove the key if it changes nothing")
        if fields["activation"] not in ("silu", "gelu_pytorch_tanh"):
            raise ValueError(f"hidden_act {fields['activation']!r} is not built: use silu or gelu_pytorch_tanh")
        config = Config(**fields)
        rope_frequencies(config)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: {f'{e} is missing' if isinstance(e, KeyError) else e}") from e
    return config


def _rope(c):
    """-> rope_theta, rope_scaling, from the old keys (rope_theta, rope_scaling), the new (rope_parameters), or both."""
    new = c.get("rope_parameters") or {}
    old = {("rope_type" if k == "type" else k): v for k, v in (c.get("rope_scaling") or {}).items()}
    theta = new.get("rope_theta", c.get("rope_theta", old.get("rope_theta", 10000.0)))
    if c.get("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta {c['rope_theta']} and rope_parameters' {theta} differ: remove the wrong one")
    new, old = ({k: v for k, v in d.items() if k != "rope_theta" and v is not None} for d in (new, old))
    if new and old and {"rope_type": "default", **new} != {"rope_type": "default", **old}:
        raise ValueError(f"rope_scaling {old} and rope_parameters {new} differ: remove the wrong one")
    scaling = new or old
    for key in set(scaling) - ROPE_KEYS:
        raise ValueError(f"rope_scaling's {key} {scaling[key]!r} is not built: use {', '.join(sorted(ROPE_KEYS))}")
    return float(theta), None if scaling.get("rope_type", "default") == "default" else scaling


def extend_context(config, positions, scaling, theta, length):
    """Change `config` for `positions` positions by a base `theta` (0: the checkpoint's) or `scaling`: a rope_type or
    dict, its factor ceil(new / old) unless given; None: the checkpoint's type or linear. Dynamic becomes its base at
    `length`."""
    old, had = config.max_position_embeddings, config.rope_scaling or {}
    if 0 < positions < old:
        raise ValueError(f"MAX_POSITION_EMBEDDINGS {positions} is less than the checkpoint's {old}: 0 keeps these")
    if (positions > old or scaling or theta) and FAMILIES[config.architecture].own_rope:
        raise ValueError(f"{config.architecture} reads no rope_scaling: leave its {old} positions as they are")
    config.max_position_embeddings, config.rope_theta = max(positions, old), float(theta or config.rope_theta)
    if scaling or positions > old and not theta:
        scaling = {"rope_type": scaling} if isinstance(scaling, str) else scaling or {}
        scaling = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
        kind = scaling.setdefault("rope_type", had.get("rope_type", "linear"))
        if had and kind not in ("default", had["rope_type"]) and "factor" not in scaling:
            raise ValueError(f"the checkpoint is scaled by {had}: ROPE_SCALING of another type needs its factor")
        longer, same = math.ceil(config.max_position_embeddings / old), had.get("rope_type") == kind
        start = {"original_max_position_embeddings": old} if kind in ("llama3", "yarn") else {}
        start |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
        start |= had if same else {"factor": 1.0}
        start["factor"] = float(start["factor"] * (1 if same and kind == "dynamic" else longer))
        config.rope_scaling = None if kind == "default" else {**start, **scaling}
    rope_frequencies(config)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "dynamic" and length > old:
        config.rope_theta *= (scaling["factor"] * (length / old - 1) + 1) ** (config.head_dim / (config.head_dim - 2))
        config.max_position_embeddings, config.rope_scaling = max(config.max_position_embeddings, length), None


def export_config(source, config, dtype):
    """-> the config.json of `source` (a dict) with what training changed, in the words of transformers 4 and 5 both: 4
    silently takes theta 10000 where it finds only the new ones."""
    family = FAMILIES[config.architecture]
    c = {k: v for k, v in source.items() if k != "quantization_config" and (k != "auto_map" or family.remote)}
    if not family.own_rope:
        theta, scaling = config.rope_theta, config.rope_scaling
        c["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
        c["rope_theta"], c["rope_scaling"] = theta, scaling and {**scaling, "type": scaling["rope_type"]}
        c["max_position_embeddings"] = config.max_position_embeddings
    c["architectures"], c["torch_dtype"] = [config.architecture], str(dtype).removeprefix("torch.")
    return {**c, "dtype": c["torch_dtype"]}


# ------------------------------------------------------------------------------------------------------------- weights

def their_name(config, ours):
    """The name of a parameter in the folder of its family."""
    for mine, theirs in FAMILIES[config.architecture].renames:
        ours = ours.replace(mine, theirs)
    return ours


def layout(model):
    """-> {our name: (their name, row runs (start, stop) in it)}, {their name: its shape}. The rows of several of ours
    in one of theirs come in our order (q, k, v): all of q first, or all of the first key/value head."""
    config, together, ours, theirs = model.config, {}, {}, {}
    for name, p in model.named_parameters():
        together.setdefault(their_name(config, name), {})[name] = p.shape
    for fused, shapes in together.items():
        groups = config.num_key_value_heads if FAMILIES[config.architecture].grouped and len(shapes) > 1 else 1
        rows = sum(shape[0] for shape in shapes.values())
        theirs[fused], start = (rows, *next(iter(shapes.values()))[1:]), 0
        for name, shape in shapes.items():
            n = shape[0] // groups
            ours[name] = fused, [(first, first + n) for first in range(start, rows, rows // groups)]
            start += n
    return ours, theirs


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
    ours, wanted = layout(model)
    unused = {n for n in where if n.endswith(".inv_freq")}
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
        theirs, runs = ours[name]
        tensor, last = files[where[theirs]].get_slice(theirs), first + len(rows)
        for start, stop in runs:  # rows 0 to stop - start of what is left of ours; this rank wants first to last
            n = stop - start
            if first < n and last > 0:
                a, b = max(first, 0), min(last, n)
                rows[a - first:b - first].copy_(tensor[start + a:start + b])
            first, last = first - n, last - n


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
    ours, theirs = layout(model)
    total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
    limit, shards, filled = min(SHARD_BYTES, -(-total // world)), [[]], 0
    for name, shape in theirs.items():
        size = math.prod(shape) * dtype.itemsize
        if filled and filled + size > limit:
            shards, filled = shards + [[]], 0
        shards[-1].append(name)
        filled += size
    one = len(shards) == 1
    names = ["model.safetensors" if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
             for i in range(len(shards))]
    error = None
    for start in range(0, len(shards), world):
        mine = {}
        for owner, shard in enumerate(shards[start:start + world]):
            mine |= {name: torch.empty(theirs[name], dtype=dtype) for name in shard if owner == rank}
            for name, (fused, runs) in ours.items():
                if fused in shard:
                    p = parameters[name]
                    full = p.full_tensor() if hasattr(p, "full_tensor") else p
                    for a, b in runs if owner == rank else ():
                        mine[fused][a:b], full = full[:b - a], full[b - a:]
        try:  # the other ranks go on to the next gather: fail after the last
            if mine:
                save_file(mine, out / names[start + rank], metadata={"format": "pt"})
        except (OSError, SafetensorError) as e:
            error = error or e
    if error:
        raise OSError(f"{out}: {error}") from error
    if rank == 0:
        weight_map = {n: file for file, shard in zip(names, shards) for n in shard}
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
    model = Transformer(Config(**manifest["config"]))
    parallel.load_checkpoint(checkpoint, model)
    save_weights(model, source, out)
    print(f"{out}: step {manifest['step']} of {source}, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.path.isdir(sys.argv[1]):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
