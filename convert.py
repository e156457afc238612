"""Hugging Face folders: read config.json and safetensors into our model, and write them back.

    python convert.py CHECKPOINT OUT [MODEL]    export a training checkpoint as such a folder

MODEL is the folder that was trained, where it is no longer at the path that the checkpoint records.
In this order: config.json to Config, longer contexts, loading weights, saving weights, and the demo
model. The table of architectures is in families.py.
"""
import hashlib
import json
import math
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import parallel
from families import FAMILIES, REASONS_AGAINST
from model import Config, Transformer, rope_frequencies

SHARD_BYTES = 5 * 10**9  # largest safetensors file of an export, unless one tensor is larger
SINGLE_FILE = "model.safetensors"  # holds all tensors of a small model
INDEX = "model.safetensors.index.json"  # says which file holds which tensor of a larger one
TOKENIZER_FILES = (  # what an export copies from the source folder, with code that comes with it
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.jinja", "additional_chat_templates/*", "chat_template.json", "generation_config.json",
    "tekken.json", "*.tiktoken", "*.py")
FINGERPRINT_PIECES = 64     # of a file of weights, see weights_fingerprint
FINGERPRINT_BYTES = 2**12   # of a piece
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
CHAT_TEMPLATE = (  # ChatML
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# Fields of Config that training does not change
SIZES = (
    "architecture", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim")
MAX_LAYERS = 10_000  # more are a mistake, or an attempt to fill the memory

# ------------------------------------------------------------------------------------------------
# config.json -> Config

# model_type -> architecture, for a config.json without "architectures"
MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}
MODEL_TYPES["gemma3_text"] = "Gemma3ForCausalLM"
del MODEL_TYPES["baichuan"]  # two architectures have this model_type

# field of Config -> its key in config.json; where that is missing or null, the family's default
# holds, or Config's
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "activation": "hidden_act",
}

# A key that we do not read may still change what the model computes. So a key with one of these
# words in its name is refused, unless its value says that it is off.
COMPUTING_WORDS = (
    "attn", "attention", "rope", "rotary", "norm", "scal", "softcap", "multipl", "expert", "moe",
    "lora", "alibi", "window", "bias", "residual", "mup", "layer_types", "sink", "original_max")

# Keys with one of these words are accepted all the same. They are about dropout (never applied),
# initialization, precision or the choice of a kernel; or their value does not matter: "logn" is off
# in training, "layer_scaling" cancels out, and no code reads "original_rope".
HARMLESS_WORDS = (
    "dropout", "implementation", "flash", "fp32", "initializer", "logn", "layer_scaling",
    "original_rope")

# Only true is implemented of these switches of Qwen 1 and ChatGLM; any other value is refused.
MUST_BE_TRUE = (
    "no_bias", "scale_attn_weights", "rmsnorm", "post_layer_norm", "multi_query_attention")

# These are not used if use_sliding_window is false.
WINDOW_KEYS = ("sliding_window", "max_window_layers")

# What is implemented of rope_scaling. Another key may change the frequencies, or be misspelt.
ROPE_KEYS = (
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "truncate", "beta_fast", "beta_slow", "attention_factor",
    "partial_rotary_factor")

MAY_BE_ZERO = ("partial_rotary_factor", "mscale", "mscale_all_dim", "llama_4_scaling_beta")

REQUIRED = object()  # stands for a default that does not exist
REQUIRED_FIELDS = (
    "num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")

# Models of text and images whose text model can be trained; text_config describes it.
WITH_IMAGES = ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration")


def load_config(folder):
    """Hugging Face folder -> Config.

    FileNotFoundError if there is no config.json. ValueError names the file and the key that is
    missing, contradicts another, or is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not Path(folder).exists()
        hint = f"; hf download {folder} --local-dir FOLDER makes one" if on_hub else ""
        raise FileNotFoundError(f"MODEL {str(folder)!r} has no config.json: "
                                f"give the path of a Hugging Face folder{hint}")
    try:
        config = _config(_text_model(json.loads(path.read_text())))
    except KeyError as e:
        raise ValueError(f"{path}: {e} is missing: take the file from the model's origin") from e
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: {e}") from e
    if config.tie_word_embeddings and _stores_another_head(path.parent, config):
        warnings.warn(f"{path} ties lm_head to the embedding, but the weights hold another "
                      "lm_head: the two are trained and exported untied, as transformers 5 loads "
                      "them", stacklevel=2)
        config.tie_word_embeddings = False
    return config


def _text_model(source):
    """config.json as a dict -> that of its text model, if it also describes a model of images."""
    architecture = (source.get("architectures") or [None])[0]
    if architecture not in WITH_IMAGES:
        return source
    text = dict(source["text_config"])
    text["architectures"] = [MODEL_TYPES.get(text["model_type"])]
    for key in ("dtype", "torch_dtype", "quantization_config", "eos_token_id", "bos_token_id"):
        if key in source:
            text.setdefault(key, source[key])
    if "tie_word_embeddings" in source:  # lm_head belongs to the whole model
        text["tie_word_embeddings"] = source["tie_word_embeddings"]
    return text


def _config(source):
    """config.json as a dict -> Config. KeyError for a missing key, else ValueError."""
    architecture = _architecture(source)
    family = FAMILIES[architecture]
    quantization = source.get("quantization_config")
    if quantization:
        raise ValueError(f"the weights are quantized ({quantization.get('quant_method')}): "
                         "train the original model")

    # the keys that are understood here: every other one has to be harmless, see below
    keys_read = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}

    def get(key, default=REQUIRED):
        keys_read.add(key)
        if default is REQUIRED:
            return source[key]
        if key == "sliding_window" and key in source:
            return source[key]  # null is a value here: no window
        if source.get(key) is None:
            return default
        return source[key]

    # later steps replace earlier ones: some families have their own keys or switches for RoPE
    keys = {**CONFIG_KEYS, **family.keys}
    fields = {**family.defaults, **_rope_fields(source, family)}
    for field, key in keys.items():
        value = get(key, None)
        if value is not None:
            fields[field] = value
    fields.update(family.switches(get))
    fields.update(family.fixed)

    # what a config.json may leave out, and what it may not
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    for field in REQUIRED_FIELDS:
        if fields.get(field) is None:
            raise KeyError(keys[field])
        if type(fields[field]) is not int:
            raise ValueError(f"{keys[field]} {fields[field]!r} is not a whole number: correct it")
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])

    layers = fields["num_hidden_layers"]
    if not 1 <= layers <= MAX_LAYERS:
        raise ValueError(f"num_hidden_layers {layers} is not from 1 to {MAX_LAYERS}: correct it")
    _refuse_other_keys(source, keys_read, layers, architecture)
    config = Config(architecture=architecture, **fields)
    if config.activation not in ("silu", "gelu_pytorch_tanh"):
        raise ValueError(f"hidden_act {config.activation!r} is not supported: "
                         "use silu or gelu_pytorch_tanh")
    rope_frequencies(config)  # raises an error if the rope_type is unknown or lacks a parameter
    return config


def _architecture(source):
    """config.json as a dict -> the key of FAMILIES. ValueError if there is none."""
    if "RUN_DIR" in source:  # train.py writes a config.json, too
        raise ValueError("these are the constants of a run: the trained model is in the folder hf "
                         "beside this file, use that")
    if source.get("architectures"):
        architecture = source["architectures"][0]
    else:
        architecture = MODEL_TYPES.get(source.get("model_type"))
    if architecture not in FAMILIES:
        reason = REASONS_AGAINST.get(architecture, "")
        raise ValueError(f"architecture {architecture} is not supported{reason}: "
                         f"use one of {', '.join(FAMILIES)}")
    return architecture


def _refuse_other_keys(source, keys_read, n_layers, architecture):
    """ValueError for a key that nothing has read and that, by its name, changes the computation."""
    off = (None, False, 0, 1, "", [], {}, ["full_attention"] * n_layers)  # 1: a neutral factor
    for key, value in source.items():
        if key in MUST_BE_TRUE:
            accepted = value is True
        elif key in WINDOW_KEYS and source.get("use_sliding_window") is False:
            accepted = True
        elif key in keys_read or not _changes_computation(key):
            accepted = True
        else:
            accepted = value in off and value is not True  # True == 1
        if not accepted:
            raise ValueError(f"{key} {value!r} changes the computation, by its name, and is not "
                             f"supported for {architecture}: use another folder, or remove the "
                             "key if it changes nothing")


def _changes_computation(key):
    if any(word in key for word in HARMLESS_WORDS):
        return False
    return any(word in key for word in COMPUTING_WORDS)


def _rope_fields(source, family):
    """config.json as a dict -> the fields of Config that are about RoPE.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 writes rope_parameters, and
    some folders have both. ValueError if they contradict each other.
    """
    if family.rope == "fixed":
        return {}
    newer = source.get("rope_parameters") or {}
    sliding = {}
    if family.sliding_rope and newer:  # one for each kind of layer
        sliding = newer.get("sliding_attention") or {}
        newer = newer["full_attention"]
        if sliding.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters of sliding_attention {sliding} are not supported: "
                             "use rope_type default")
        older_key = family.keys.get("sliding_rope_theta")
        older_theta = source.get(older_key)
        theta = sliding.get("rope_theta", older_theta)
        if older_theta not in (None, theta):
            raise ValueError(f"{older_key} {older_theta} and the rope_theta {theta} of "
                             "sliding_attention differ: remove the wrong one")

    found = {}
    older = {key: source.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for given in (older, source.get("rope_scaling"), newer):
        for key, value in _checked_scaling(given, family.rope_keys).items():
            if value is None:
                continue
            if key not in found:
                found[key] = value
            elif found[key] != value:
                raise ValueError(f"{key} {found[key]} and rope_parameters' {value} differ: "
                                 "remove the wrong one")

    default_theta = family.defaults.get("rope_theta", 10000.0)
    theta = found.pop("rope_theta", default_theta)
    if theta is None:
        raise KeyError("rope_theta")
    fields = {"rope_theta": float(theta), "rope_scaling": None}
    if family.sliding_rope:
        default_theta = family.defaults.get("sliding_rope_theta", theta)
        fields["sliding_rope_theta"] = float(sliding.get("rope_theta", default_theta))

    default_fraction = family.defaults.get("partial_rotary_factor")
    fraction = found.pop("partial_rotary_factor", default_fraction or 1.0)
    if fraction != 1 and default_fraction is None:
        raise ValueError(f"partial_rotary_factor {fraction} is not supported for this architecture")
    fields["partial_rotary_factor"] = fraction

    if "factor" in found and "rope_type" not in found:
        raise ValueError(f"rope_scaling {found} has no rope_type: add it")
    if found.get("rope_type", "default") != "default":
        fields["rope_scaling"] = found
    return fields


def _checked_scaling(given, more_keys=()):
    """rope_scaling (a dict or None) -> a copy in which "type", its older key, is "rope_type".

    ValueError names a key that is misspelt or not supported: neither in ROPE_KEYS nor more_keys. And
    a value that is no number greater than 0, or a factor below 1.
    """
    scaling = {}
    for key, value in (given or {}).items():
        if key == "finetuned":  # a note of YaRN's authors
            continue
        if key == "type":
            key = "rope_type"
            newer = given.get("rope_type", value)
            if newer != value:
                raise ValueError(f"rope_scaling's type {value!r} and rope_type {newer!r} differ: "
                                 "remove the wrong one")
        if key in ("short_factor", "long_factor"):
            raise ValueError("rope_scaling is LongRoPE, which is not supported, because its "
                             "frequencies change with the length of the text: use a folder "
                             "without it")
        if key not in ROPE_KEYS and key not in more_keys:
            raise ValueError(f"rope_scaling's {key} {value!r} is not supported: "
                             f"use {', '.join(sorted(ROPE_KEYS))}")
        if key not in ("rope_type", "truncate") and value is not None:
            least = 1 if key == "factor" else 0
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not is_number or value < least or (value == 0 and key not in MAY_BE_ZERO):
                rule = "a number of at least 1" if key == "factor" else "a number greater than 0"
                raise ValueError(f"rope_scaling's {key} {value!r} is not {rule}: correct it")
        scaling[key] = value
    return scaling


# ------------------------------------------------------------------------------------------------
# Longer contexts


def extend_context(config, positions, scaling, length):
    """Change `config`, in place, to a context of `positions` tokens; 0 keeps the checkpoint's.

    scaling: a rope_type, a dict of rope_scaling, {"rope_theta": base} for another base alone, or
    None for the checkpoint's own rope_type, else yarn. Its factor is ceil(positions / the
    checkpoint's) unless it is given. length: tokens of the longest row in training.
    """
    family = FAMILIES[config.architecture]
    old_positions = config.max_position_embeddings
    old_type = (config.rope_scaling or {}).get("rope_type", "default")
    if isinstance(scaling, str):
        wanted = {"rope_type": scaling}
    else:
        wanted = _checked_scaling(scaling, family.rope_keys)
    theta = wanted.pop("rope_theta", None)

    longer = positions > old_positions
    if 0 < positions < old_positions:
        raise ValueError(f"MAX_POSITION_EMBEDDINGS {positions} is less than the checkpoint's "
                         f"{old_positions}: use 0 to keep these")
    grows = old_type == "dynamic" and length > old_positions
    if family.rope == "fixed" and (longer or wanted or theta or grows):
        raise ValueError(f"{config.architecture} reads no rope_scaling: keep its {old_positions} "
                         "positions with MAX_POSITION_EMBEDDINGS 0 and ROPE_SCALING None, and "
                         f"MAX_LENGTH at most {old_positions} if its RoPE is dynamic")
    if wanted.get("rope_type") == "dynamic" and length <= old_positions:
        raise ValueError(f"ROPE_SCALING dynamic changes rows of more than {old_positions} tokens "
                         f"only, and MAX_LENGTH is {length}: raise it, or use another type")

    # another base alone stretches the context without rope_scaling
    new_scaling = config.rope_scaling
    if wanted or (longer and not theta):
        new_scaling = _extended_scaling(config.rope_scaling, wanted, old_positions, positions)
    rope_type = new_scaling["rope_type"] if new_scaling else "default"
    if family.rope == "theta" and rope_type not in ("default", "dynamic"):
        raise ValueError(f"{config.architecture} does not read rope_scaling of type {rope_type!r}, "
                         'or reads it otherwise: use ROPE_SCALING dynamic or {"rope_theta": base}')
    if family.rope == "scaling" and (theta or rope_type == "dynamic"):
        raise ValueError(f"{config.architecture} cannot have another base of RoPE: "
                         "use ROPE_SCALING yarn, linear or llama3")
    if family.rope_keys and rope_type != old_type:
        raise ValueError(f"{config.architecture} was trained with keys of rope_scaling that "
                         f"{rope_type!r} lacks: keep its type with ROPE_SCALING None")

    config.rope_scaling = new_scaling
    config.rope_theta = float(theta or config.rope_theta)
    if longer:
        config.max_position_embeddings = positions
    rope_frequencies(config)  # raises an error if the rope_type is unknown or lacks a parameter
    if rope_type == "dynamic" and length > old_positions:
        _freeze_dynamic(config, old_positions, length)
    elif rope_type == "dynamic":
        # Rows of the checkpoint's context do not change the base, which grows from there.
        config.max_position_embeddings = old_positions


def _extended_scaling(old, wanted, old_positions, positions):
    """The rope_scaling for a context that grows from old_positions to `positions` tokens.

    old: the checkpoint's own, or None. wanted: what the user gave; it replaces what follows from
    the rest.
    """
    old_type = old["rope_type"] if old else None
    rope_type = wanted.get("rope_type", old_type or "yarn")
    if rope_type == "default":
        return None

    scaling = _scaling_defaults(rope_type, old_positions)
    if not old:  # the first extension of this checkpoint
        if positions <= old_positions and rope_type != "dynamic" and "factor" not in wanted:
            raise ValueError(f"ROPE_SCALING {rope_type} has nothing to extend, as "
                             f"MAX_POSITION_EMBEDDINGS {positions} is not more than the "
                             f"checkpoint's {old_positions}: raise it, give the factor in a dict, "
                             "or use None")
        scaling["factor"] = float(max(math.ceil(positions / old_positions), 1))
    elif rope_type == old_type:  # another extension of the same type
        scaling.update(old)
        # the factor may already be that of a longer context than config.json says
        original = scaling.get("original_max_position_embeddings", 0)
        covered = max(old_positions, original * old["factor"])
        stretch = max(math.ceil(positions / covered), 1)
        if rope_type == "dynamic":
            stretch = 1  # its base already grows with the length of the row
        scaling["factor"] = float(old["factor"] * stretch)
    else:  # a type replaces another; how much of the old stretch it has to repeat is not known
        if "factor" not in wanted:
            raise ValueError(f"the checkpoint is scaled by {old}: ROPE_SCALING of another type "
                             "needs its factor")
        scaling["factor"] = wanted["factor"]
    return {**scaling, **wanted, "rope_type": rope_type}


def _scaling_defaults(rope_type, old_positions):
    """The parameters of a rope_type, besides its factor, that have to be written down."""
    if rope_type == "llama3":
        return {
            "original_max_position_embeddings": old_positions,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    if rope_type == "yarn":  # where this is missing, it is the new number of positions
        return {"original_max_position_embeddings": old_positions}
    return {}


def _freeze_dynamic(config, old_positions, length):
    """Replace dynamic scaling, whose base depends on the length of a row, by its base at `length`.

    So all rows are trained, and later served, with the same frequencies.
    """
    factor = config.rope_scaling["factor"]
    rotated = config.head_dim * config.partial_rotary_factor  # dimensions of a head
    exponent = rotated / (rotated - 2)
    config.rope_theta *= (factor * (length / old_positions - 1) + 1) ** exponent
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    config.rope_scaling = None


def export_config(source, config, dtype):
    """Return the config.json of an export: `source` (a dict) with what training changed."""
    family = FAMILIES[config.architecture]
    exported = dict(source)
    exported.pop("quantization_config", None)
    if not family.remote_code:
        exported.pop("auto_map", None)
    if family.rope != "fixed":
        exported.update(_exported_rope(source, config, family))
        exported["max_position_embeddings"] = config.max_position_embeddings
    elif source.get("rope_parameters"):  # Hunyuan's, for transformers 4
        exported["rope_scaling"] = source["rope_parameters"]
        exported["rope_theta"] = source["rope_parameters"]["rope_theta"]
    if "hidden_act" in source:  # transformers 4 does not correct the "gelu" of Gemma 1
        exported["hidden_act"] = config.activation
    tied_by_default = family.defaults.get("tie_word_embeddings", False)
    if source.get("tie_word_embeddings", tied_by_default) != config.tie_word_embeddings:
        exported["tie_word_embeddings"] = config.tie_word_embeddings

    exported["architectures"] = [config.architecture]
    exported["torch_dtype"] = str(dtype).removeprefix("torch.")
    exported["dtype"] = exported["torch_dtype"]
    return exported


def _exported_rope(source, config, family):
    """Return RoPE's keys, both as transformers 4 and as transformers 5 write them.

    Version 4 silently takes a rope_theta of 10000 where it finds rope_parameters only.
    """
    scaling = config.rope_scaling
    newer = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    older = scaling
    if scaling is not None and family.two_key_scaling and len(scaling) == 2:
        older = {"type": scaling["rope_type"], "factor": scaling["factor"]}
    elif scaling is not None and "type" in (source.get("rope_scaling") or {}):
        older = {**scaling, "type": scaling["rope_type"]}  # code before rope_type reads "type"
    exported = {"rope_theta": config.rope_theta, "rope_scaling": older, "rope_parameters": newer}
    if scaling is not None:  # transformers 4 cannot scale Mistral's RoPE without this key
        exported["head_dim"] = config.head_dim

    if "partial_rotary_factor" in family.defaults:
        newer["partial_rotary_factor"] = config.partial_rotary_factor
        exported["partial_rotary_factor"] = config.partial_rotary_factor
    if family.sliding_rope:
        sliding = {"rope_theta": config.sliding_rope_theta, "rope_type": "default"}
        exported["rope_parameters"] = {"full_attention": newer, "sliding_attention": sliding}
        key = family.keys.get("sliding_rope_theta")
        if key is not None:
            exported[key] = config.sliding_rope_theta
    return exported


# ------------------------------------------------------------------------------------------------
# Where our parameters are in the folder's tensors


class Slice(NamedTuple):
    """The rows of one tensor of the folder that are one of our parameters.

    The tensor's rows are `groups` equal parts. In each part the parameter has `rows` rows, from
    number `first` of the part; it is these rows of all parts, one after the other.

    In most cases the parameter is the whole tensor: one group, first 0, all rows. Some families
    store several parameters in one tensor. Baichuan's W_pack is one group of q, k and v:

        W_pack   | q q q q q q q q | k k k k k k k k | v v v v v v v v |

    InternLM2's wqkv has one group for each key/value head: the query heads that attend to it, then
    its key and its value. With 8 query heads and 2 key/value heads of D = 128 rows each:

        wqkv     | q0 q1 q2 q3 k0 v0 | q4 q5 q6 q7 k1 v1 |
                 |----- group 0 -----|----- group 1 -----|
        q_proj   Slice("...wqkv.weight", groups=2, first=0, rows=512)      q0 q1 q2 q3 q4 q5 q6 q7
        k_proj   Slice("...wqkv.weight", groups=2, first=512, rows=128)    k0 k1
        v_proj   Slice("...wqkv.weight", groups=2, first=640, rows=128)    v0 v1
    """
    name: str    # of the folder's tensor
    groups: int
    first: int
    rows: int

    def view(self, tensor):
        """The folder's tensor (rows, ...) -> a view of the parameter in it, (groups, rows, ...)."""
        parts = tensor.unflatten(0, (self.groups, -1))
        return parts[:, self.first:self.first + self.rows]


def their_name(config, ours):
    """The name of a parameter in the folder of its family."""
    name = ours
    for pattern, replacement in FAMILIES[config.architecture].names.items():
        name = re.sub(pattern, replacement, name)
    return name


def layout(model):
    """Return {our name: its Slice}, and {their name: shape of the tensor in the folder}."""
    grouped_qkv = FAMILIES[model.config.architecture].grouped_qkv
    slices = {}
    shapes = {}
    for ours, parameter in model.named_parameters():
        name = their_name(model.config, ours)
        groups = 1
        if grouped_qkv is not None and grouped_qkv in name:
            groups = model.config.num_key_value_heads

        # parameters that share a tensor follow each other in our order: q, k, v, or gate, up
        rows = parameter.shape[0]
        rows_before = shapes[name][0] if name in shapes else 0
        slices[ours] = Slice(name, groups, rows_before // groups, rows // groups)
        shapes[name] = (rows_before + rows, *parameter.shape[1:])
    return slices, shapes


# ------------------------------------------------------------------------------------------------
# Loading weights


@torch.no_grad()
def load_weights(model, folder):
    """Fill every parameter from the folder's safetensors. Each rank reads only its own rows.

    ValueError names tensors that are missing, not expected, or of another shape. The parameters are
    unchanged then.
    """
    files = check_weights(model, folder)
    slices, _ = layout(model)
    for ours, local, first in parallel.progress(list(model.local_parameters()), "loading weights"):
        place = slices[ours]
        file, stored_name = files[place.name]
        tensor = file.get_tensor(stored_name)  # memory-mapped: nothing is read yet
        full = place.view(tensor).flatten(0, 1)  # the shape of the whole parameter
        local.copy_(full[first:first + len(local)])


def check_weights(model, folder):
    """ValueError as load_weights raises it. The model may be on the meta device. Return the open
    files."""
    files = _open_weights(Path(folder))
    _, shapes = layout(model)
    _check_tensors(folder, model.config, files, shapes)
    return files


def _open_weights(folder):
    """Return {tensor name: (the open safetensors file that holds it, its name there)}.

    The two names are equal but for the text model in a model of text and images.

    FileNotFoundError if there are none; ValueError names a file that is missing or damaged, or
    says why it is not clear which files are the model's.
    """
    files = {}
    names = _weight_files(folder)
    for name in names:
        path = folder / name
        # an index that somebody else wrote must not make us read other files
        if path.name != name or path.suffix != ".safetensors":
            raise ValueError(f"{folder / INDEX}: {name!r} points out of the folder: "
                             "only names of .safetensors files in the folder are read")
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError) as e:
            problem = "damaged, or a git-lfs pointer" if path.exists() else "missing"
            raise ValueError(f"{path} is {problem} ({e}): download it again") from e
        for stored_name in file.keys():
            tensor_name = _name_in_text_model(stored_name)
            if tensor_name is not None:
                files[tensor_name] = (file, stored_name)
    if SINGLE_FILE not in names and (folder / SINGLE_FILE).exists():
        raise ValueError(f"{folder} has {SINGLE_FILE}, which transformers would load, and {INDEX}, "
                         "which names other files: remove the one that is not the model")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} has an adapter, which transformers would add to the weights: "
                         "merge it, or remove adapter_config.json")
    return files


def _name_in_text_model(name):
    """The name that a tensor has where the text model is alone; None: it is about images."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
        return None
    name = name.replace("language_model.lm_head", "lm_head")
    return re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)


def _weight_files(folder):
    """Return the names of the safetensors files that transformers loads: its index's, or the one.

    Others, such as consolidated.safetensors, hold the same weights in another form.
    """
    index = folder / INDEX
    if index.exists():
        try:
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as e:
            raise ValueError(f"{index} is damaged ({type(e).__name__}: {e}): "
                             "download it again") from e
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f" ({pickles[0]} is a pickle)" if pickles else ""
    raise FileNotFoundError(f"{folder} has no .safetensors that transformers would load, "
                            f"{SINGLE_FILE} or {INDEX}{found}: save the model with "
                            "safe_serialization=True, or set INIT=random")


def _stores_another_head(folder, config):
    """Whether the folder has a tensor lm_head that is not equal to its embedding."""
    try:
        files = _open_weights(folder)
    except (ValueError, FileNotFoundError):
        return False  # reported when the weights are loaded
    tensors = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        name = their_name(config, name)
        if name not in files:
            return False
        file, stored_name = files[name]
        tensors.append(file.get_tensor(stored_name))
    return not torch.equal(*tensors)


def _check_tensors(folder, config, files, shapes):
    """ValueError if the tensors in `files` are not those of `shapes`."""
    found = {}
    for name, (file, stored_name) in files.items():
        if not name.endswith(".inv_freq"):  # RoPE's frequencies, which old exports store
            found[name] = tuple(file.get_slice(stored_name).get_shape())
    if config.tie_word_embeddings:  # some folders store the tied matrix a second time
        found.pop(their_name(config, "lm_head.weight"), None)

    # all differences are collected: a few together show what kind of model the folder holds
    differences = []
    for name in sorted({*found, *shapes}):
        if found.get(name) != shapes.get(name):
            actual = found.get(name, "missing")
            expected = shapes.get(name, "expected")
            differences.append(f"{name} is {actual}, not {expected}")
    if differences:
        hint = ""
        if not config.tie_word_embeddings and their_name(config, "lm_head.weight") not in found:
            hint = ". Should tie_word_embeddings be true in config.json?"
        elif any("k_proj" in difference for difference in differences):
            hint = ". Is num_key_value_heads right in config.json?"
        raise ValueError(f"{folder} is not the {config.architecture} that its config.json "
                         f"describes: {len(differences)} tensors differ: "
                         f"{'; '.join(differences[:4])}{hint}")


# ------------------------------------------------------------------------------------------------
# Saving weights


@torch.no_grad()
def save_weights(model, source_folder, out_folder):
    """Write a Hugging Face folder: safetensors, config.json, and the files of the tokenizer.

    All ranks call it. It is written beside `out_folder` and renamed at the end, so an earlier
    export stays whole until then. If this rank cannot write, it raises OSError after the last
    collective, so that the others do not wait for it.
    """
    source = Path(source_folder)
    out = Path(out_folder).resolve()  # a link is not replaced, but what it points to
    part = out.with_name(out.name + ".part")
    source_config = _text_model(json.loads((source / "config.json").read_text()))
    rank, world = _rank_and_world(model)
    error = None
    if rank == 0:
        error = _clear(part)

    _, shapes = layout(model)
    dtypes = _export_dtypes(source, source_config, shapes)
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = _assign_shards(sizes)
    files = _shard_files(len(shards))
    if not _any_rank(error is not None, world):
        error = _write_shards(model, dtypes, shards, files, part)

    # one rank publishes, once all have written
    failed = _any_rank(error is not None, world)
    if rank == 0 and not failed:
        embedding_dtype = dtypes[their_name(model.config, "model.embed_tokens.weight")]
        exported = export_config(source_config, model.config, embedding_dtype)
        try:
            if len(shards) > 1:
                _write_index(part / INDEX, shards, files, sum(sizes.values()))
            (part / "config.json").write_text(json.dumps(exported, indent=2))
            _copy_tokenizer(source, part)
            positions = model.config.max_position_embeddings
            if positions > _config(source_config).max_position_embeddings:
                _extend_tokenizer(part, positions)
            for path in [*part.rglob("*"), part]:
                parallel.fsync(path)
        except OSError as e:
            error = e
    if rank == 0 and (failed or error is not None):
        shutil.rmtree(part, ignore_errors=True)  # it may have filled the disk
    if error is not None:
        raise OSError(f"{part}: {error}. Free space there or make the folder writable, and start "
                      "again") from error
    if rank == 0 and not failed:
        _replace_folder(out, part)
        parallel.fsync(out.parent)


def _any_rank(flag, world):
    """Whether `flag` is true on any rank; that of this process if the model is not sharded."""
    return parallel.any_rank(flag) if world > 1 else flag


def _clear(part):
    """Make an empty folder, without what an interrupted export left in it. Return an OSError or
    None."""
    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
    except OSError as e:
        return e


def _export_dtypes(source, source_config, shapes):
    """Return {tensor name: dtype in the source folder}, which may not be the one config.json names.

    Where the source has no such tensor: config.json's if it is float32 or float16, else bfloat16.
    """
    name = source_config.get("dtype") or source_config.get("torch_dtype") or "float32"
    default = torch.bfloat16
    if name in ("float32", "float16"):
        default = getattr(torch, name)
    try:
        stored = _open_weights(source)
    except (ValueError, FileNotFoundError):
        stored = {}
    dtypes = {}
    for name in shapes:
        dtypes[name] = default
        if name in stored:
            file, stored_name = stored[name]
            dtypes[name] = DTYPES.get(file.get_slice(stored_name).get_dtype(), default)
    return dtypes


def _rank_and_world(model):
    """This rank and the number of ranks that the model is sharded over; 0 and 1 if it is not."""
    parameter = next(model.parameters())
    if not hasattr(parameter, "device_mesh"):
        return 0, 1
    return parameter.device_mesh.get_rank(), parameter.device_mesh.size()


def _assign_shards(sizes):
    """{tensor name: bytes} -> the names of the tensors of each shard, in order.

    A shard has at most SHARD_BYTES, unless it is a single larger tensor.
    """
    shards = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled > 0 and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_files(n):
    """The file names of n shards, as transformers expects them."""
    if n == 1:
        return [SINGLE_FILE]
    return [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def _write_shards(model, dtypes, shards, files, out):
    """Write shards[i] to out / files[i], in rounds: each rank holds and writes one shard a round.

    Return the first error of this rank, or None.
    """
    rank, world = _rank_and_world(model)
    error = None
    for start in parallel.progress(range(0, len(shards), world), "exporting"):
        tensors = _gather(model, dtypes, shards[start:start + world], rank)
        try:
            if tensors:
                path = out / files[start + rank]
                save_file(tensors, path, metadata={"format": "pt"})
                path.chmod(out.stat().st_mode & 0o666)  # safetensors lets only the owner read it
                parallel.fsync(path)
        except (OSError, SafetensorError) as e:
            # The next rounds need all ranks: without this one, the others would wait forever.
            if error is None:
                error = e
        del tensors  # before the next round allocates its own
    return error


def _gather(model, dtypes, shards, rank):
    """Gather the tensors of `shards` on all ranks. Return {name: tensor} of shards[rank], on the
    host.

    It is empty if there is no such shard: the last round may have fewer shards than ranks.
    """
    slices, shapes = layout(model)
    in_this_round = {name for shard in shards for name in shard}
    mine = shards[rank] if rank < len(shards) else []
    tensors = {}
    for ours, parameter in model.named_parameters():
        place = slices[ours]
        if place.name not in in_this_round:
            continue
        # a collective, so every rank has to get here for the same parameters
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        if place.name in mine:
            if place.name not in tensors:
                tensors[place.name] = torch.empty(shapes[place.name], dtype=dtypes[place.name])
            target = place.view(tensors[place.name])  # (groups, rows, ...)
            target.copy_(full.unflatten(0, (place.groups, place.rows)))
    return tensors


def _replace_folder(out, part):
    """Rename the folder `part` to `out`, with the files of an earlier `out` that no export writes.
    """
    old = out.with_name(out.name + ".old")
    if old.exists():  # an export was interrupted between the two renames, or after them
        if not out.exists():
            old.rename(out)
        else:
            shutil.rmtree(old)
    if out.exists():
        for path in out.iterdir():
            kept = part / path.name
            if _is_exported(path) or kept.exists():
                continue
            if path.is_dir():
                shutil.copytree(path, kept, symlinks=True)
            else:
                shutil.copy2(path, kept, follow_symlinks=False)
        out.rename(old)
    part.rename(out)
    if old.exists():
        shutil.rmtree(old)


def _is_exported(path):
    """Whether an export writes weights of this name. Earlier ones would be loaded with the new."""
    return path.match("model.safetensors*") or path.match("model-?????-of-?????.safetensors")


def _write_index(path, shards, files, total_size):
    """Write the index that transformers needs to find the tensors in several shards."""
    weight_map = {}
    for shard, file in zip(shards, files):
        for name in shard:
            weight_map[name] = file
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2))


def _copy_tokenizer(source, out):
    """Copy the files of TOKENIZER_FILES byte for byte."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                target = out / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _extend_tokenizer(folder, positions):
    """Raise the length at which the tokenizer truncates, and to which vLLM limits the model."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    config = json.loads(path.read_text())
    if config.get("model_max_length", positions) < positions:
        config["model_max_length"] = positions
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False))


def weights_fingerprint(folder):
    """Return a hash that tells the weights of a folder from others of the same shapes; None if it
    has none.

    Of each file its size and pieces of it, so that a large model takes no time.
    """
    digest = hashlib.sha256()
    try:
        for name in sorted(_weight_files(folder)):
            size = (folder / name).stat().st_size
            digest.update(f"{name} {size}".encode())
            with open(folder / name, "rb") as file:
                for i in range(FINGERPRINT_PIECES):
                    file.seek(i * size // FINGERPRINT_PIECES)
                    digest.update(file.read(FINGERPRINT_BYTES))
    except (OSError, ValueError):
        return None
    return digest.hexdigest()[:16]


def main(checkpoint, out, model_folder=None):
    """Export a training checkpoint as a Hugging Face folder, in one process, without a GPU.

    model_folder: where the model that it was trained from lies now, if it was moved. ValueError if
    that is another model, or if the export would overwrite it or a run.
    """
    checkpoint = Path(checkpoint)
    newest = sorted(checkpoint.glob("checkpoints/step-*[0-9]"))
    if newest:
        raise ValueError(f"{checkpoint} is the folder of a run: name one of its checkpoints, such as "
                         f"{newest[-1]}")
    manifest = parallel.read_manifest(checkpoint)
    source = Path(model_folder or manifest["model"])
    if (Path(out) / "checkpoints").exists():
        raise ValueError(f"OUT {out} is the folder of a run, which would be overwritten: name a new "
                         "folder")
    if Path(out).resolve() == source.resolve():
        raise ValueError(f"OUT {out} is the folder of the model that was trained, which would be "
                         "overwritten: name a new folder. The model's own, where it was moved, is the "
                         f"third argument, python convert.py {checkpoint} OUT {out}")
    if not (source / "config.json").exists():
        raise FileNotFoundError(f"the folder {source} that was trained has no config.json: "
                                f"give its new path, python convert.py {checkpoint} {out} MODEL")
    # Files are copied from there. A manifest of somebody else may name any folder of this machine.
    source_config = load_config(source)
    for field in SIZES:
        trained = manifest["config"][field]
        found = getattr(source_config, field)
        if trained != found:
            raise ValueError(f"{checkpoint} names the model {source}, whose {field} is "
                             f"{found} and not {trained}: only its own model can be exported")
    model = Transformer(Config(**manifest["config"]))
    parallel.load_checkpoint(checkpoint, model)
    save_weights(model, source, out)
    print(f"{out}: step {manifest['step']} of {source}")


# ------------------------------------------------------------------------------------------------
# The demo


def write_demo(folder, vocab_size=2048):
    """Write demo.jsonl, a tokenizer trained on it, and a small Llama with random weights.

    The texts are the source of Python's standard library, which every machine has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for path in sorted(Path(json.__file__).parents[1].glob("*.py")):
        if 0 < path.stat().st_size < 8_000:
            texts.append(path.read_text("utf-8", "replace"))
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "demo.jsonl").write_text("".join(lines))
    _write_demo_tokenizer(folder, texts, vocab_size)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = Transformer(load_config(folder))
    model.init_weights(seed=0)
    save_weights(model, folder, folder)


def _write_demo_tokenizer(folder, texts, vocab_size):
    """Train a byte-level BPE tokenizer on the texts and save it with a ChatML template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    chat_tokens = ["<|im_start|>", "<|im_end|>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size, show_progress=False, special_tokens=[end, *chat_tokens])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=chat_tokens,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        if not Path(sys.argv[1]).is_dir():
            raise ValueError(f"CHECKPOINT {sys.argv[1]!r} is no folder: name one such as "
                             "runs/demo/checkpoints/step-00000400")
        main(*sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
