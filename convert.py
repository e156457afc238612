"""Hugging Face folders in and out: config.json <-> Config, safetensors <-> parameters, rank by rank.

    python convert.py runs/demo/checkpoints/step-00000300 OUT_FOLDER    a training checkpoint as a Hugging Face folder
    python convert.py check FOLDER    how far our layers, logits and loss are from transformers'
"""
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import parallel
from model import Config, Transformer, rope_frequencies

SHARD_BYTES, INDEX = 5 * 10**9, "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
                   "generation_config.json", "*.tiktoken", "*.py")

class Family(NamedTuple):
    """How one architecture's folder differs from Llama's, for loading and for export."""
    switches: object = lambda get: {}   # config.json, as a function get(key, default) -> fields of Config
    keys: dict = {}         # field of Config -> its key of config.json, where not as in KEYS
    names: dict = {}        # pattern in the names of our parameters -> theirs, in order; several may become one
    grouped: str = "-"      # their q, k, v in one, where all of one key/value head comes before the next head
    remote: bool = False    # its code comes with the folder, so auto_map stays
    own_rope: bool = False  # its code reads no rope_scaling, so its context cannot be extended

def _qwen_window(get):
    window, first, types = get("sliding_window", 4096), get("max_window_layers", 28), get("layer_types", ())
    used = get("use_sliding_window", False)
    if used and ("full_attention" in types or first > 0 and not types):
        raise ValueError("a sliding window for some layers only is not built: set use_sliding_window to false")
    return window if used else None

FAMILIES = {
    "LlamaForCausalLM": Family(),
    "YiForCausalLM": Family(names={"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}, remote=True),
    "MistralForCausalLM": Family(lambda get: {"sliding_window": get("sliding_window", 4096)}),
    "Qwen2ForCausalLM": Family(lambda get: {"qkv_bias": True, "sliding_window": _qwen_window(get)}),
    "Qwen3ForCausalLM": Family(lambda get: {
        "qk_norm": True, "head_dim": get("head_dim", 128), "sliding_window": _qwen_window(get)}),
    "QWenLMHeadModel": Family(  # its code turns the dynamic base and logn off in training
        lambda get: {"qkv_bias": True, "intermediate_size": get("intermediate_size") // 2},
        {"head_dim": "kv_channels", "max_position_embeddings": "seq_length", "rms_norm_eps": "layer_norm_epsilon",
         "rope_theta": "rotary_emb_base"},
        {"model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
         "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn": "attn", "[qkv]_proj": "c_attn",
         "gate_proj": "w2", "up_proj": "w1", "(o|down)_proj": "c_proj"}, remote=True, own_rope=True),
    "InternLMForCausalLM": Family(lambda get: {
        "rope_theta": get("rotary", {}).get("base", 1e4), "rope_scaling": {
            "rope_type": {"origin": "default"}.get(get("rotary", {}).get("type"), "dynamic"),
            "factor": get("rotary", {}).get("scaling_factor", 1.0)}},
        {"qkv_bias": "bias", "o_bias": "bias"}, remote=True, own_rope=True),
    "InternLM2ForCausalLM": Family(keys={"qkv_bias": "bias", "o_bias": "bias"}, grouped="wqkv", remote=True, names={
        "embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm", "o_proj": "wo",
        "post_attention_layernorm": "ffn_norm", "self_attn": "attention", "[qkv]_proj": "wqkv", "mlp": "feed_forward",
        "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "InternLM3ForCausalLM": Family(keys={"qkv_bias": "qkv_bias", "o_bias": "bias", "mlp_bias": "bias"}, remote=True),
    "GemmaForCausalLM": Family(lambda get: {  # hidden_act may say gelu, which the model was not trained with
        "norm": "rms_plus_one", "scale_embedding": True, "activation": "gelu_pytorch_tanh",
        "head_dim": get("head_dim", 256), "tie_word_embeddings": get("tie_word_embeddings", True)}),
    "CohereForCausalLM": Family(lambda get: {
        "norm": "layer", "rms_norm_eps": get("layer_norm_eps", 1e-5), "parallel_residual": True,
        "rope_interleaved": True, "qk_norm": get("use_qk_norm", False), "logit_scale": get("logit_scale", 0.0625),
        "tie_word_embeddings": get("tie_word_embeddings", True)}),
    "Starcoder2ForCausalLM": Family(lambda get: {
        "norm": {"layer_norm": "layer_bias"}[get("norm_type", "layer_norm")], "mlp_gate": False,
        "rms_norm_eps": get("norm_epsilon", get("layer_norm_epsilon", 1e-5)),
        "sliding_window": get("sliding_window", None), "tie_word_embeddings": get("tie_word_embeddings", True)},
        dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "use_bias"), {"gate_proj": "c_fc", "down_proj": "c_proj"}),
    "BaiChuanForCausalLM": Family(names={"[qkv]_proj": "W_pack"}, remote=True, own_rope=True),
    "ChatGLMModel": Family(
        lambda get: {"rope_theta": 1e4 * get("rope_ratio", 1), "rope_interleaved": True,
                     "rope_scaling": {"factor": 1.0, "partial_rotary_factor": 0.5}},
        {"vocab_size": "padded_vocab_size", "num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size",
         "num_key_value_heads": "multi_query_group_num", "head_dim": "kv_channels", "rms_norm_eps": "layernorm_epsilon",
         "max_position_embeddings": "seq_length", "qkv_bias": "add_qkv_bias"},
        {"model.embed_tokens": "transformer.embedding.word_embeddings", "model.layers": "transformer.encoder.layers",
         "model.norm": "transformer.encoder.final_layernorm", "lm_head": "transformer.output_layer", "self_attn":
         "self_attention", "[qkv]_proj": "query_key_value", "o_proj": "dense", "(gate|up)_proj": "dense_h_to_4h",
         "down_proj": "dense_4h_to_h"}, remote=True, own_rope=True),
}
FAMILIES["BaichuanForCausalLM"] = FAMILIES["BaiChuanForCausalLM"]._replace(switches=lambda _: {"normalize_head": True})
FAMILIES["ChatGLMForConditionalGeneration"] = FAMILIES["ChatGLMModel"]
MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}
KEYS = {**{key: key for key in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "mlp_bias")},
    "qkv_bias": "attention_bias", "o_bias": "attention_bias", "activation": "hidden_act"}
# A key that nobody asked for is refused if its name says that it computes, unless its value is neutral
COMPUTES = re.compile("(?!.*(dropout|implementation|flash|fp32|initializer|logn|layer_scaling|original_rope)).*(attn|"
                      "attention|rope|rotary|norm|scal|softcap|multipl|expert|moe|lora|alibi|window|bias|residual|mup|"
                      "layer_types|sink|original_max)")
TRUE = {"no_bias", "scale_attn_weights", "rmsnorm", "post_layer_norm", "multi_query_attention"}  # or refused
ROPE_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
             "high_freq_factor", "truncate", "beta_fast", "beta_slow", "attention_factor"}

# --------------------------------------------------------------------------------------------------------- config.json
def load_config(folder):
    """-> Config. FileNotFoundError or ValueError names the file and the key that is missing, in conflict or unknown."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"MODEL {str(folder)!r} has no config.json: name a Hugging Face folder")
    try:
        return _config(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: {f'{e} is missing' if isinstance(e, KeyError) else e}") from e

def _config(c):
    """config.json as a dict -> Config. KeyError is a missing key."""
    architecture = (c.get("architectures") or [MODEL_TYPES.get(c.get("model_type"))])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture} is not supported: use one of {', '.join(FAMILIES)}")
    if quantized := c.get("quantization_config"):
        raise ValueError(f"the weights are quantized ({quantized.get('quant_method')}): train the original")
    family, asked = FAMILIES[architecture], {"rope_theta", "rope_scaling", "rope_parameters"}

    def get(key, *default):  # null is the default, but of a window, where it says that there is none
        asked.add(key)
        return default[0] if default and c.get(key) is None and (key, key in c) != ("sliding_window", True) else c[key]

    found = {field: get(key, None) for field, key in {**KEYS, **family.keys}.items()}
    fields = _rope(c) | {field: value for field, value in found.items() if value is not None} | family.switches(get)
    if architecture == "BaichuanForCausalLM" and "max_position_embeddings" not in fields:
        raise ValueError(f"{architecture} without max_position_embeddings is 13B, whose ALiBi is not built: use 7B")
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    for key, value in c.items():
        neutral = value in (None, False, 0, 1, "", [], {}, ["full_attention"] * fields["num_hidden_layers"])
        fine = key in asked or not COMPUTES.match(key) or neutral and value is not True
        if not (value is True if key in TRUE else fine):
            raise ValueError(f"{key} {value!r} changes the computation, by its name, and is not built for "
                             f"{architecture}: use another folder, or remove the key if it changes nothing")
    config = Config(architecture=architecture, **fields)
    if config.activation not in ("silu", "gelu_pytorch_tanh"):
        raise ValueError(f"hidden_act {config.activation!r} is not built: use silu or gelu_pytorch_tanh")
    rope_frequencies(config)
    return config

def _scaling(given):
    """A rope_scaling by its new words. ValueError names a key that is not built, or misspelt."""
    given = {("rope_type" if key == "type" else key): value for key, value in (given or {}).items()}
    for key in set(given) - ROPE_KEYS:
        raise ValueError(f"rope_scaling's {key} {given[key]!r} is not built: use {', '.join(sorted(ROPE_KEYS))}")
    return given

def _rope(c):
    """-> rope_theta and rope_scaling, from the keys of this name, the new one (rope_parameters), or both."""
    found = {}
    for given in ({"rope_theta": c.get("rope_theta")}, c.get("rope_scaling"), c.get("rope_parameters")):
        for key, value in _scaling(given).items():
            if value is not None and found.setdefault(key, value) != value:
                raise ValueError(f"{key} {found[key]} and rope_parameters' {value} differ: remove the wrong one")
    theta = float(found.pop("rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_scaling": found if found.get("rope_type", "default") != "default" else None}

def extend_context(config, positions, scaling, length):
    """Change `config` for `positions` positions by `scaling`: a rope_type or dict, its factor ceil(new / old) unless
    given, or a rope_theta alone; None: the checkpoint's type or linear. Dynamic becomes its base at `length`."""
    old, had = config.max_position_embeddings, config.rope_scaling or {}
    scaling = {"rope_type": scaling} if isinstance(scaling, str) else _scaling(scaling)
    theta = scaling.pop("rope_theta", 0)
    if 0 < positions < old:
        raise ValueError(f"MAX_POSITION_EMBEDDINGS {positions} is less than the checkpoint's {old}: 0 keeps these")
    if (positions > old or scaling or theta) and FAMILIES[config.architecture].own_rope:
        raise ValueError(f"{config.architecture} reads no rope_scaling: leave its {old} positions as they are")
    config.max_position_embeddings, config.rope_theta = max(positions, old), float(theta or config.rope_theta)
    if scaling or positions > old and not theta:
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
        c |= {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}, "rope_theta": theta,
              "rope_scaling": scaling and {**scaling, "type": scaling["rope_type"]},
              "max_position_embeddings": config.max_position_embeddings}
    name = str(dtype).removeprefix("torch.")
    return {**c, "architectures": [config.architecture], "torch_dtype": name, "dtype": name}

# ------------------------------------------------------------------------------------------------------------- weights
def their_name(config, ours):
    """The name of a parameter in the folder of its family."""
    for pattern, theirs in FAMILIES[config.architecture].names.items():
        ours = re.sub(pattern, theirs, ours)
    return ours

def layout(model):
    """-> {our name: (their name, groups, first, n)}, {their name: its shape}. Several of ours in one of theirs come in
    our order (q, k, v): of each of `groups` equal parts of its rows, the n from `first` are ours."""
    config, ours, theirs = model.config, {}, {}
    for name, p in model.named_parameters():
        fused = their_name(config, name)
        groups = config.num_key_value_heads if FAMILIES[config.architecture].grouped in fused else 1
        rows = theirs.get(fused, (0,))[0]
        ours[name] = fused, groups, rows // groups, len(p) // groups
        theirs[fused] = (rows + len(p), *p.shape[1:])
    return ours, theirs

def _part(tensor, groups, first, n):
    """Of their tensor, the view (groups, n, ...) of the rows that are one of ours."""
    return tensor.unflatten(0, (groups, -1))[:, first:first + n]

def _open_weights(folder):
    """-> {tensor name: its open file}. ValueError or FileNotFoundError for what is not a whole set of safetensors."""
    folder, where = Path(folder), {}
    index, names = folder / INDEX, {f.name for f in folder.glob("*.safetensors")}
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as e:
            raise ValueError(f"{index} is damaged ({type(e).__name__}: {e}): download it again") from e
    if not names:
        others = sorted(f.name for f in folder.glob("*.bin"))
        raise FileNotFoundError(f"{folder} has no .safetensors{f' ({others[0]} is a pickle)' if others else ''}: save "
                                "the model with safe_serialization=True, or set INIT=random")
    for name in sorted(names):
        path = folder / name
        if path.name != name or path.suffix != ".safetensors":
            raise ValueError(f"{index}: {name!r} points out of the folder: only plain file names are read")
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as e:
            what = "damaged, or a git-lfs pointer" if path.exists() else "missing"
            raise ValueError(f"{path} is {what} ({e}): download it again") from e
        where.update(dict.fromkeys(file.keys(), file))
    return where

@torch.no_grad()
def load_weights(model, folder):
    """Fill every parameter from the folder's safetensors. Each rank reads its own rows from the mapped files.
    ValueError names tensors that are missing, not expected, or of another shape; nothing has been read then."""
    where, (ours, wanted) = _open_weights(folder), layout(model)
    found = {name: tuple(f.get_slice(name).get_shape()) for name, f in where.items() if not name.endswith(".inv_freq")}
    if model.config.tie_word_embeddings:
        found.pop(their_name(model.config, "lm_head.weight"), None)
    wrong = [f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'expected')}"
             for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(f"{folder} is not the {model.config.architecture} that its config.json describes: "
                         f"{len(wrong)} tensors differ: {'; '.join(wrong[:4])}")
    for name, rows, first in model.local_parameters():
        theirs, *place = ours[name]
        tensor = _part(where[theirs].get_tensor(theirs), *place).flatten(0, 1)  # mapped from the file, not yet read
        rows.copy_(tensor[first:first + len(rows)])

@torch.no_grad()
def save_weights(model, source_folder, out_folder):
    """Write a Hugging Face folder: safetensors in shards of at most 5 GB, config.json, tokenizer files byte for byte.
    All ranks call it; tensors are gathered one at a time, and each rank holds and writes the shards that fall to it."""
    source, out, config = Path(source_folder), Path(out_folder), model.config
    parameters, (ours, theirs) = dict(model.named_parameters()), layout(model)
    mesh = getattr(next(iter(parameters.values())), "device_mesh", None)
    rank, world = (mesh.get_rank(), mesh.size()) if mesh is not None else (0, 1)
    source_config = json.loads((source / "config.json").read_text())
    named = source_config.get("dtype") or source_config.get("torch_dtype") or "float32"
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(named, torch.bfloat16)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in theirs.items()}
    limit, shard_of, n, filled = min(SHARD_BYTES, -(-sum(sizes.values()) // world)), {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            n, filled = n + 1, 0
        shard_of[name], filled = n - 1, filled + size
    files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    error = None
    for start in range(0, n, world):
        mine = {}
        for name, (fused, *place) in ours.items():
            if start <= shard_of[fused] < start + world:
                p = parameters[name]
                full = p.full_tensor() if hasattr(p, "full_tensor") else p
                if shard_of[fused] == start + rank:
                    part = _part(mine.setdefault(fused, torch.empty(theirs[fused], dtype=dtype)), *place)
                    part.copy_(full.unflatten(0, part.shape[:2]))
        try:  # the other ranks go on to the next gather: fail after the last
            out.mkdir(parents=True, exist_ok=True)
            if mine:
                save_file(mine, out / files[start + rank], metadata={"format": "pt"})
        except (OSError, SafetensorError) as e:
            error = error or e
    if error:
        raise OSError(f"{out}: {error}") from error
    if rank == 0:
        for old in [*out.glob("model.safetensors*"), *out.glob("model-?????-of-?????.safetensors")]:
            if old.name not in files:  # of an export by another number of ranks: somebody would read it
                old.unlink()
        if n > 1:
            (out / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": {
                name: files[i] for name, i in shard_of.items()}}, indent=2))
        (out / "config.json").write_text(json.dumps(export_config(source_config, config, dtype), indent=2))
        for file in (f for pattern in TOKENIZER_FILES for f in source.glob(pattern) if f.is_file()):
            if not (out / file.name).exists() or not file.samefile(out / file.name):
                shutil.copyfile(file, out / file.name)

CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def write_demo(folder, vocab_size=512):
    """A small Llama, its tokenizer and a corpus, of what every Python carries: the source of its standard library."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    texts = [f.read_text("utf-8", "replace") for f in files if 0 < f.stat().st_size < 8_000]
    (folder / "demo.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer, (end, *more) = ByteLevelBPETokenizer(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(texts, vocab_size, show_progress=False, special_tokens=[end, *more])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=end, pad_token=end,
                            additional_special_tokens=more, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 128,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
        "tie_word_embeddings": True, "dtype": "float32", "eos_token_id": 0, "bos_token_id": None}, indent=2))
    model = Transformer(load_config(folder))
    model.init_weights(seed=0)
    save_weights(model, folder, folder)

def main(checkpoint, out):
    """Checkpoint -> Hugging Face folder, in one process, on the host. The run's config.json says which MODEL it was."""
    manifest = parallel.read_manifest(Path(checkpoint))
    model = Transformer(Config(**manifest["config"]))
    parallel.load_checkpoint(checkpoint, model)
    save_weights(model, manifest["model"], out)
    print(f"{out}: step {manifest['step']} of {manifest['model']}")

@torch.no_grad()
def check(folder):
    """Print how far float32 layers, logits and loss are from transformers' on this file's text. -> is any apart?"""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, found, parted = Transformer(load_config(folder)), [], False
    load_weights(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(Path(__file__).read_text()[:600]).input_ids)
    for layer in [*model.model["layers"][:-1], model.model["norm"]]:  # transformers shows the last one after the norm
        layer.register_forward_hook(lambda module, args, output: found.append(output))
    found.append(model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)))
    output = theirs(ids[None], labels=ids[None], output_hidden_states=True)
    for i, (a, b) in enumerate(zip(found, (*output.hidden_states[1:], output.logits))):
        apart = ((a - b[0]).norm(dim=-1) / b[0].norm(dim=-1)).max().item()  # by token, as the first one may be huge
        parted |= (part := not apart < 1e-4)  # nan is apart, too
        print(f"{f'layer {i}' if b is not output.logits else 'logits':<10} {apart:.1e}{' PART' * part}")
    loss = torch.nn.functional.cross_entropy(found[-1][:-1], ids[1:])
    print(f"loss of {len(ids)} tokens {loss:.6f}, transformers' {output.loss:.6f}")
    return parted

if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[2 if sys.argv[1] == "check" else 1]).is_dir():
        sys.exit(__doc__)
    sys.exit(check(sys.argv[2]) if sys.argv[1] == "check" else main(*sys.argv[1:]))
