"""The architectures that can be trained: how each differs from Llama in config.json and in names.

A new one is an entry of FAMILIES and, if it computes what none of the others do, a field of Config
in model.py. convert.py reads the table.
"""
from typing import NamedTuple


def _no_switches(get):
    return {}


class Family(NamedTuple):
    """How the folders of one architecture differ from Llama's. The defaults describe Llama.

    STARCODER_2 below is an example of all that most architectures need: its MLP has no gate and its
    norms have biases (fixed), it has biases unless config.json denies them (defaults), one key is
    about all of them (keys), and its MLP's matrices have other names (names).
    """
    # Field of Config -> its value for this architecture, whatever config.json says.
    fixed: dict = {}
    # Field of Config -> its value where config.json has no such key, or null: the defaults of the
    # architecture's own configuration class. None: there is none, the key is required.
    defaults: dict = {}
    # Field of Config -> its key in config.json, where it differs from CONFIG_KEYS.
    keys: dict = {}
    # Function of `get` -> more fields of Config, where a dict cannot say it. get(key) is the value
    # of a key of config.json; get(key, default) is the default if the key is missing or null.
    switches: object = _no_switches
    # Regular expression -> replacement. Applied in order, they turn our name of a parameter into
    # the folder's. Parameters of ours that get one name are stored in one tensor (see Slice).
    names: dict = {}
    # Name of a tensor that holds q, k and v ordered by key/value head (see Slice).
    grouped_qkv: str | None = None
    # The modeling code is in the folder (trust_remote_code), so an export keeps auto_map.
    remote_code: bool = False
    # What that code, or transformers, reads of RoPE, and so how the context can be extended: "all"
    # rope_types, "theta": another base only, which "dynamic" becomes in training, "scaling": all
    # but another base, or "fixed": none.
    rope: str = "all"
    # Its configuration takes a rope_scaling of "type" and "factor" and of no other key.
    two_key_scaling: bool = False
    # Keys of rope_scaling that it has besides ROPE_KEYS.
    rope_keys: tuple = ()
    # Layers with a sliding window have plain RoPE, with a base of their own (sliding_rope_theta).
    sliding_rope: bool = False


# Yi's first releases, which have code of their own; later ones are plain Llama
YI = Family(
    names={"input_layernorm": "ln1", "post_attention_layernorm": "ln2"},
    remote_code=True, rope="theta")

NO_BIAS = {"qkv_bias": False, "o_bias": False, "mlp_bias": False}


def _mistral(get):
    return {"sliding_window": get("sliding_window", 4096)}


MISTRAL = Family(fixed=NO_BIAS, switches=_mistral)


def _ministral3(get):
    if not (get("rope_parameters", None) or get("rope_scaling", None)):
        raise ValueError("rope_parameters is missing, from which transformers takes the scaling of "
                         "Ministral 3: take config.json from the origin of the model")
    return {"sliding_window": get("sliding_window", None)}


# It scales q by its position, and "mscale" is about YaRN's temperature
MINISTRAL_3 = Family(
    fixed=NO_BIAS,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": None},
    switches=_ministral3,
    rope_keys=("llama_4_scaling_beta", "mscale", "mscale_all_dim", "max_position_embeddings"))


def _qwen1(get):
    # its intermediate_size counts the gate and the up projection together
    return {"intermediate_size": get("intermediate_size") // 2}


# Its dynamic RoPE and its scaling of attention by log n are off in training: neither is implemented
QWEN_1 = Family(
    fixed={"qkv_bias": True},
    switches=_qwen1,
    keys={
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
    },
    names={
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn": "attn",
        "[qkv]_proj": "c_attn",
        "gate_proj": "w2",
        "up_proj": "w1",
        "(o|down)_proj": "c_proj",
    },
    remote_code=True, rope="fixed")


def _per_layer(get, key, default):
    """A key of config.json that has an entry for each layer. ValueError if their numbers differ."""
    entries = get(key, default)
    n = get("num_hidden_layers")
    if len(entries) != n:
        raise ValueError(f"{key} has {len(entries)} entries for {n} layers: correct it")
    return entries


def _layer_windows(get, slides):
    """The sliding window and the layers that have it: those of layer_types, or of `slides`.

    slides: whether each layer has the window.
    """
    default = ["sliding_attention" if slide else "full_attention" for slide in slides]
    layer_types = _per_layer(get, "layer_types", default)
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layer_types {sorted(unknown)} are not supported: "
                         "use full_attention and sliding_attention")
    layers = [i for i, kind in enumerate(layer_types) if kind == "sliding_attention"]
    window = get("sliding_window", 4096)
    return {"sliding_window": window if layers else None, "sliding_layers": layers}


def _qwen_windows(get):
    # all keys are read in any case, because a key that is not read would be refused
    used = get("use_sliding_window", False)
    first = get("max_window_layers", 28)
    windows = _layer_windows(get, [i >= first for i in range(get("num_hidden_layers"))])
    return windows if used else {}


# Their code reads no attention_bias
QWEN_2 = Family(fixed={**NO_BIAS, "qkv_bias": True}, switches=_qwen_windows)
QWEN_3 = Family(fixed={"qk_norm": True}, defaults={"head_dim": 128}, switches=_qwen_windows)


def _internlm1(get):
    rotary = get("rotary", {})
    rope_type = "default" if rotary.get("type") == "origin" else "dynamic"
    return {
        "rope_theta": rotary.get("base", 1e4),
        "rope_scaling": {"rope_type": rope_type, "factor": rotary.get("scaling_factor", 1.0)},
    }


# One key is about the biases of all four projections of attention
INTERNLM_1 = Family(
    switches=_internlm1,
    keys={"qkv_bias": "bias", "o_bias": "bias"},
    remote_code=True, rope="fixed")

# InternLM 2 and 2.5. Their linear scaling is not that of the other families.
INTERNLM_2 = Family(
    keys={"qkv_bias": "bias", "o_bias": "bias"},
    names={
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "o_proj": "wo",
        "post_attention_layernorm": "ffn_norm",
        "self_attn": "attention",
        "[qkv]_proj": "wqkv",
        "mlp": "feed_forward",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
    },
    grouped_qkv="wqkv",
    remote_code=True, rope="theta", two_key_scaling=True)

# Its "bias" is about the output projection and the MLP only
INTERNLM_3 = Family(
    defaults={"rms_norm_eps": 1e-5},
    keys={"qkv_bias": "qkv_bias", "o_bias": "bias", "mlp_bias": "bias"},
    remote_code=True)


def _gemma1(get):
    for key in ("hidden_act", "hidden_activation"):
        activation = get(key, "gelu_pytorch_tanh")
        if activation not in ("gelu", "gelu_pytorch_tanh"):
            raise ValueError(f"{key} {activation!r} is not supported for Gemma: "
                             "use gelu_pytorch_tanh")
    return {"activation": "gelu_pytorch_tanh"}  # also where it says gelu, as transformers reads it


GEMMA = Family(
    fixed={"norm": "rms_plus_one", "scale_embedding": True},
    defaults={"head_dim": 256, "tie_word_embeddings": True},
    switches=_gemma1)


def _gemma3(get):
    period = get("sliding_window_pattern", get("_sliding_window_pattern", 6))
    n = get("num_hidden_layers")
    windows = _layer_windows(get, [(i + 1) % period != 0 for i in range(n)])
    return {**windows, "attention_multiplier": get("query_pre_attn_scalar", 256) ** -0.5}


# Norms of what attention and the MLP add to the residual stream; ours have the names of GLM 4
NAMES_OF_NORMS_AFTER = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}

# The text model of Gemma 3. Its sliding layers have a RoPE of their own.
GEMMA_3 = GEMMA._replace(
    fixed={**GEMMA.fixed, "norm_after": True, "qk_norm": True},
    defaults={**GEMMA.defaults, "activation": "gelu_pytorch_tanh", "rope_theta": 1e6,
              "sliding_rope_theta": 1e4, "max_position_embeddings": 131072,
              # those of the 4B model, whose config.json leaves them out
              "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4},
    keys={"activation": "hidden_activation", "sliding_rope_theta": "rope_local_base_freq"},
    switches=_gemma3,
    names={"post_attention_layernorm": "pre_feedforward_layernorm", **NAMES_OF_NORMS_AFTER},
    sliding_rope=True)

# Transformers 4 and 5 have different defaults for rope_theta
COHERE = Family(
    fixed={"norm": "layer", "parallel_residual": True, "rope_interleaved": True},
    defaults={"rms_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True,
              "rope_theta": None},
    keys={"rms_norm_eps": "layer_norm_eps", "logit_scale": "logit_scale",
          "qk_norm": "use_qk_norm"})


def _starcoder2(get):
    norm_type = get("norm_type", "layer_norm")
    if norm_type != "layer_norm":
        raise ValueError(f"norm_type {norm_type!r} is not supported: use layer_norm")
    older_epsilon = get("layer_norm_epsilon", 1e-5)  # before the key was called norm_epsilon
    return {
        "rms_norm_eps": get("norm_epsilon", older_epsilon),
        "sliding_window": get("sliding_window", None),
    }


STARCODER_2 = Family(
    fixed={"norm": "layer_bias", "mlp_gate": False},
    defaults={"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
              "activation": "gelu_pytorch_tanh"},
    switches=_starcoder2,
    keys={"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias"},
    names={"gate_proj": "c_fc", "down_proj": "c_proj"})

# q, k and v are one tensor, one after the other
BAICHUAN_1 = Family(
    names={"[qkv]_proj": "W_pack"},
    remote_code=True, rope="fixed")


def _baichuan2(get):
    # the 13B model has ALiBi instead of RoPE, and its config.json has no number of positions
    if get("max_position_embeddings", None) is None:
        raise ValueError("BaichuanForCausalLM without max_position_embeddings is 13B, whose ALiBi "
                         "is not supported: use 7B")
    return {"normalize_head": True}


BAICHUAN_2 = BAICHUAN_1._replace(switches=_baichuan2)


def _chatglm(get):
    ratio = get("rope_ratio", 1)
    if ratio != 1 and get("padded_vocab_size") == 65024:
        raise ValueError(f"rope_ratio {ratio} divides the positions in ChatGLM 2, but multiplies "
                         "the base of RoPE in ChatGLM 3, and config.json does not tell these "
                         "apart: use a model without it, or GLM 4")
    return {"rope_theta": 1e4 * ratio}


# ChatGLM 2, 3 and GLM 4. Besides q, k and v, the gate and the up projection are one tensor.
CHATGLM = Family(
    fixed={"rope_interleaved": True, "partial_rotary_factor": 0.5},
    switches=_chatglm,
    keys={
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
        "qkv_bias": "add_qkv_bias",
    },
    names={
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.layers": "transformer.encoder.layers",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "self_attn": "self_attention",
        "[qkv]_proj": "query_key_value",
        "o_proj": "dense",
        "(gate|up)_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    },
    remote_code=True, rope="fixed")

# GLM 4 as transformers implements it; the releases of April 2025 (Glm4) have more norms
GLM = Family(
    fixed={"rope_interleaved": True, "o_bias": False},
    defaults={"qkv_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5,
              "rms_norm_eps": 1.5625e-07},
    names={"(gate|up)_proj": "gate_up_proj"})
GLM_4 = GLM._replace(fixed={**GLM.fixed, "norm_after": True})


def _smollm3(get):
    n = get("num_hidden_layers")
    period = get("no_rope_layer_interval", 4)
    has_rope = _per_layer(get, "no_rope_layers", [(i + 1) % period != 0 for i in range(n)])
    windows = _layer_windows(get, [not has_rope[i] for i in range(n)])
    if not get("use_sliding_window", False):
        windows = {}
    return {**windows, "nope_layers": [i for i in range(n) if not has_rope[i]]}


SMOLLM_3 = Family(defaults={"rope_theta": 2e6, "tie_word_embeddings": True}, switches=_smollm3)

# Extended by yarn or llama3, only transformers 5 opens it
OLMO_2 = Family(
    fixed={"norm": "rms_float32", "norm_before": False, "norm_after": True, "qk_norm": True,
           "qk_norm_across_heads": True},
    defaults={"rms_norm_eps": 1e-5},
    names=NAMES_OF_NORMS_AFTER,
    two_key_scaling=True)


def _olmo3(get):
    return _layer_windows(get, [(i + 1) % 4 != 0 for i in range(get("num_hidden_layers"))])


# Its sliding layers have the base of the others, but not their rope_scaling. So another base, which
# is for the others only, could not be exported for transformers 4.
OLMO_3 = OLMO_2._replace(
    defaults={**OLMO_2.defaults, "rope_theta": 5e5}, switches=_olmo3, sliding_rope=True,
    two_key_scaling=False, rope="scaling")


def _granite(get):
    return {
        "attention_multiplier": get("attention_multiplier", 1.0),
        "residual_multiplier": get("residual_multiplier", 1.0),
        "embedding_multiplier": get("embedding_multiplier", 1.0),
        "logit_scale": 1 / get("logits_scaling", 1.0),
    }


GRANITE = Family(switches=_granite)

SEED_OSS = Family(
    defaults={"qkv_bias": True, "head_dim": 128}, keys={"o_bias": "attention_out_bias"})

ERNIE_4_5 = Family(
    fixed={"rope_interleaved": True},
    defaults={"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
              "tie_word_embeddings": True},
    keys={"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias"})


def _hunyuan(get):
    for key in UNUSED_BY_HUNYUAN:
        get(key, None)
    older = get("rope_scaling", None) or {}
    newer = get("rope_parameters", None) or {}
    types = {scaling.get("rope_type", scaling.get("type")) for scaling in (older, newer) if scaling}
    if len(types) > 1:
        raise ValueError(f"rope_scaling {older} and rope_parameters {newer} differ: remove the wrong "
                         "one")
    scaling = {**older, **newer}
    theta = scaling.get("rope_theta") or get("rope_theta", 1e4)
    rope_type = scaling.get("rope_type") or scaling.get("type", "default")
    if rope_type == "dynamic" and scaling.get("alpha"):
        D = get("head_dim", None) or get("hidden_size") // get("num_attention_heads")
        theta *= scaling["alpha"] ** (D / (D - 2))
    elif rope_type != "default":
        raise ValueError(f"rope_scaling {scaling} is not supported for Hunyuan: use dynamic with "
                         "alpha, or none")
    return {"rope_theta": theta}


# Keys of its config.json about other models of the same authors
UNUSED_BY_HUNYUAN = (
    "attention_head_dim", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "norm_type",
    "norm_topk_prob", "routed_scaling_factor", "num_experts", "num_shared_expert", "moe_topk",
    "moe_intermediate_size", "use_qk_norm", "qk_norm", "use_rotary_pos_emb")

# Its RoPE has a larger base, which "alpha" says
HUNYUAN = Family(
    fixed={"qk_norm": True, "qk_norm_after_rope": True},
    defaults={"rms_norm_eps": 1e-5},
    switches=_hunyuan,
    names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"},
    rope="fixed")


def _phi3(get):
    get("original_max_position_embeddings", None)  # which longrope uses alone
    return {"sliding_window": get("sliding_window", None)}


# Phi 3 and 4 whose RoPE is plain; "longrope" is not supported
PHI_3 = Family(
    fixed=NO_BIAS,
    defaults={"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0},
    switches=_phi3,
    names={"[qkv]_proj": "qkv_proj", "(gate|up)_proj": "gate_up_proj"},
    rope="theta")

FAMILIES = {  # the first of "architectures" in config.json -> its family
    "LlamaForCausalLM": Family(),
    "YiForCausalLM": YI,
    "MistralForCausalLM": MISTRAL,
    "Ministral3ForCausalLM": MINISTRAL_3,
    "Qwen2ForCausalLM": QWEN_2,
    "Qwen3ForCausalLM": QWEN_3,
    "QWenLMHeadModel": QWEN_1,
    "InternLMForCausalLM": INTERNLM_1,
    "InternLM2ForCausalLM": INTERNLM_2,
    "InternLM3ForCausalLM": INTERNLM_3,
    "GemmaForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA_3,
    "CohereForCausalLM": COHERE,
    "Starcoder2ForCausalLM": STARCODER_2,
    "BaiChuanForCausalLM": BAICHUAN_1,  # their names differ in one capital letter
    "BaichuanForCausalLM": BAICHUAN_2,
    "ChatGLMModel": CHATGLM,
    "ChatGLMForConditionalGeneration": CHATGLM,
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": GLM_4,
    "SmolLM3ForCausalLM": SMOLLM_3,
    "Olmo2ForCausalLM": OLMO_2,
    "Olmo3ForCausalLM": OLMO_3,
    "GraniteForCausalLM": GRANITE,
    "SeedOssForCausalLM": SEED_OSS,
    "Ernie4_5ForCausalLM": ERNIE_4_5,
    "HunYuanDenseV1ForCausalLM": HUNYUAN,
    "Phi3ForCausalLM": PHI_3,
}

# architecture -> why it is not in the table, where that is not plain from its name
REASONS_AGAINST = {
    "Gemma2ForCausalLM": " (it caps the scores of attention, which not all kernels here can do)",
}
