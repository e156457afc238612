"""The model: a Llama-style transformer on one flat row of packed documents.

Letters in shapes, for one rank:
    T tokens of the row             H query heads                C hidden size
    t = T/P tokens of this rank     G key/value heads            I intermediate size of the MLP
    P ranks that share the row      D head size                  V vocabulary size
    n tokens of this rank that are part of documents which cross a border between ranks
    N tokens of all such documents, the sum of n over the ranks
    m tokens of one document        d documents of the row       c tokens of a chunk of the loss

Precision: matrix products, attention and the residual stream run in the dtype of the weights,
bfloat16 in training. The statistics of the norms, the rotation of q and k, the softmax and the loss
are float32, because their sums and exponentials lose too much in bfloat16. RoPE angles are computed
in float64: near position one million a float32 angle is up to 0.03 radians off. The master weights
are float32 (parallel.py, one_rank.py).
"""
import functools
import importlib
import itertools
import math
import zlib
from dataclasses import dataclass, field, replace

import torch
import torch._functorch.config
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import parallel
from costs import attention_pairs, flops, memory  # noqa: F401  (for callers of this module)
from parallel import heads_to_seq, seq_to_heads, split_heads_by_rank
from recompute import AttendWithRecompute, Kept, Offload, attend_in_parts, divide_blocks


@dataclass
class Config:
    """The architecture. Fields have the names of a Hugging Face config.json where it has them."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # {"rope_type": ..., "factor": ...}; None: plain RoPE
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False               # normalize every head of q and k before RoPE
    sliding_window: int | None = None   # a token attends to this many, itself included; None: all
    architecture: str = "LlamaForCausalLM"
    norm: str = "rms"                   # or another kind that Norm lists
    activation: str = "silu"            # or "gelu_pytorch_tanh"
    mlp_gate: bool = True               # activation(gate) * up; False: activation(gate) alone
    parallel_residual: bool = False     # attention and MLP both read the same norm of x
    rope_interleaved: bool = False      # rotate dimensions 2i and 2i+1 together, not i and i+D/2
    scale_embedding: bool = False       # multiply embeddings by sqrt(hidden_size)
    logit_scale: float = 1.0
    normalize_head: bool = False        # scale every row of lm_head to length 1
    norm_before: bool = True            # attention and MLP read the norm of x
    norm_after: bool = False            # what attention and MLP add to x is normalized first
    qk_norm_across_heads: bool = False  # qk_norm of all heads together, not of every head
    qk_norm_after_rope: bool = False
    attention_multiplier: float | None = None   # of q k; None: 1/sqrt(head_dim)
    residual_multiplier: float = 1.0    # of what attention and MLP add to x
    embedding_multiplier: float = 1.0
    partial_rotary_factor: float = 1.0  # RoPE rotates this fraction of a head's dimensions
    sliding_layers: list | None = None  # layers that have the sliding window; None: all
    sliding_rope_theta: float | None = None     # these layers' plain RoPE; None: that of all
    nope_layers: list = field(default_factory=list)     # layers without RoPE

    def slides(self, layer):
        return self.sliding_layers is None or layer in self.sliding_layers

    def window(self, layer):
        """The sliding window of a layer, or None."""
        return self.sliding_window if self.slides(layer) else None

    def rope_kind(self, layer):
        """Which RoPE a layer has, as rope_cos_sin takes it."""
        if layer in self.nope_layers:
            return "none"
        if self.sliding_rope_theta is not None and self.slides(layer):
            return "sliding"
        return "default"


@dataclass
class Execution:
    """How the work is carried out. These settings change results only by rounding."""
    attention: str = "auto"             # or a name in KERNELS
    recompute: str = "none"             # by backward; or "all_but_attention", "all", "pairs"
    keep_layers: int = 0                # blocks that are exempt from `recompute`, see divide_blocks
    offload_layers: int = 0             # first blocks that offload what they keep to CPU memory
    mlp_chunk: int = 0                  # tokens at a time outside the attention kernel; 0: all t
    loss_chunk: int = 8192              # tokens whose logits exist at a time
    zero_stage: int = 2                 # of parallel.shard
    offload_optimizer: bool = False     # keep parameters and optimizer states in CPU memory
    compile: bool = False               # torch.compile the two halves of a block, and the loss

    def groups(self, n_blocks):
        """Return the Groups of a model with so many blocks."""
        return divide_blocks(n_blocks, self.recompute, self.keep_layers, self.offload_layers)


# ------------------------------------------------------------------------------ attention kernels
# All kernels share one signature: q (T, H, D), k and v (T, G, D), cu_seqlens (d+1,) int32 on the
# device, max_seqlen int, window int or None -> out (T, H, D), causal within each segment.

def flash_attention(package, unbounded, q, k, v, cu_seqlens, max_seqlen, window):
    """FlashAttention 2, 3 or 4, whose first arguments have different positions: keywords only."""
    if window is None:
        window_size = (unbounded, unbounded)
    else:
        window_size = (window - 1, 0)
    out = package.flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen, causal=True, window_size=window_size)
    if isinstance(out, tuple):  # version 4 also returns the log-sum-exp
        out = out[0]
    return out


def torch_varlen_attention(package, unbounded, q, k, v, cu_seqlens, max_seqlen, window):
    """torch's varlen_attn, which in version 2.11 needs as many key/value heads as query heads."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)                                       # (T, H, D)
    v = v.repeat_interleave(group, dim=1)                                       # (T, H, D)
    left = unbounded if window is None else window - 1
    return package.varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(left, 0))


def sdpa_attention(package, unbounded, q, k, v, cu_seqlens, max_seqlen, window):
    """scaled_dot_product_attention, a document at a time: for CPUs, and the reference in tests."""
    outputs = []
    edges = cu_seqlens.tolist()
    for start, end in zip(edges, edges[1:]):
        m = end - start
        qi = q[start:end].transpose(0, 1)[None]                                 # (1, H, m, D)
        ki = k[start:end].transpose(0, 1)[None]                                 # (1, G, m, D)
        vi = v[start:end].transpose(0, 1)[None]                                 # (1, G, m, D)
        mask = None
        if window is not None and m > window:
            position = torch.arange(m, device=q.device)
            distance = position[:, None] - position                             # (m, m)
            mask = (distance >= 0) & (distance < window)
        out = package.scaled_dot_product_attention(
            qi, ki, vi, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))                                  # (m, H, D)
    return torch.cat(outputs)                                                   # (T, H, D)


KERNELS = {
    # name: (module, minimum compute capability, function, how the package writes "no window"),
    # the fastest first
    "flash_attn_4": ("flash_attn.cute", 9, flash_attention, None),
    "flash_attn_3": ("flash_attn_interface", 9, flash_attention, -1),
    "flash_attn_2": ("flash_attn", 8, flash_attention, -1),
    "torch_varlen": ("torch.nn.attention.varlen", 8, torch_varlen_attention, -1),
    "sdpa": ("torch.nn.functional", 0, sdpa_attention, -1),
}


@functools.cache
def attention_kernel(choice, device_type, dtype):
    """Return (name, function): the first of KERNELS that works here, or `choice` itself.

    ValueError if `choice` is unknown, or does not work with this device and dtype."""
    if choice != "auto" and choice not in KERNELS:
        raise ValueError(f"ATTENTION {choice!r} is not known: use auto, {', '.join(KERNELS)}")

    capability = 0  # flash kernels need a GPU and a 16-bit dtype
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        capability, _ = torch.cuda.get_device_capability()
    candidates = KERNELS if choice == "auto" else [choice]
    for name in candidates:
        module, minimum_capability, function, unbounded = KERNELS[name]
        if capability < minimum_capability:
            continue
        try:
            package = importlib.import_module(module)
        except ImportError:
            continue
        # Version 4 installs an empty package `flash_attn`, which would pass for version 2.
        if function is flash_attention and not hasattr(package, "flash_attn_varlen_func"):
            continue
        return name, functools.partial(function, package, unbounded)
    raise ValueError(
        f"ATTENTION {choice!r} is not available for {dtype} on {device_type}: install its package, "
        f"use a GPU and bfloat16, or set ATTENTION to auto or another of {', '.join(KERNELS)}")


# ---------------------------------------------------------------------------------- RoPE and norm

def rope_frequencies(config):
    """Return inverse frequencies (R/2,) float32, and the factor that cos and sin are multiplied by.

    R is the number of a head's dimensions that RoPE rotates: D x partial_rotary_factor. The formulas
    are those of transformers, including the rounding to float32, because the checkpoints were
    trained with these numbers. ValueError for an unknown rope_type."""
    R = int(config.head_dim * config.partial_rotary_factor)
    scaling = config.rope_scaling or {}
    rope_type = scaling.get("rope_type", "default")
    factor = scaling["factor"] if scaling else 1.0

    exponent = torch.arange(0, R, 2).float() / R
    base_powers = config.rope_theta ** exponent                                 # (R/2,)
    frequency = 1.0 / base_powers

    # For "dynamic", convert.extend_context has already put a larger base into rope_theta.
    if rope_type in ("default", "dynamic"):
        return frequency, 1.0
    if rope_type == "linear":
        return frequency / factor, 1.0
    if rope_type == "llama3":
        return llama3_frequencies(frequency, factor, scaling), 1.0
    if rope_type == "yarn":
        stretched = 1.0 / (factor * base_powers)
        ramp = yarn_ramp(R, config, scaling)
        return stretched * (1 - ramp) + frequency * ramp, yarn_attention_factor(factor, scaling)
    raise ValueError(
        f"rope_type {rope_type!r} is unknown: use default, linear, dynamic, yarn or llama3")


def llama3_frequencies(frequency, factor, scaling):
    """Divide low frequencies by `factor`, keep high ones, and interpolate in between.

    Which is which depends on how often a wave turns within the original context length."""
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    turns = scaling["original_max_position_embeddings"] / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def yarn_ramp(R, config, scaling):
    """Return (R/2,): 1 for the dimensions that keep their frequency, 0 for those that are
    stretched.

    YaRN (arXiv 2309.00071, section 3.2): the ramp is linear between the dimensions that turn
    beta_fast and beta_slow times within the original context length."""
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)

    def dimension_of(turns):
        return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = dimension_of(scaling.get("beta_fast") or 32)
    last = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, R - 1)
    dimension = torch.arange(R // 2).float()
    return 1 - ((dimension - first) / max(last - first, 0.001)).clamp(0, 1)


def yarn_attention_factor(factor, scaling):
    """YaRN's temperature: cos and sin are multiplied by it (arXiv 2309.00071, section 3.4)."""
    if scaling.get("attention_factor"):
        return scaling["attention_factor"]
    if factor <= 1:
        return 1.0
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        numerator = 0.1 * scaling["mscale"] * math.log(factor) + 1.0
        return numerator / (0.1 * scaling["mscale_all_dim"] * math.log(factor) + 1.0)
    return 0.1 * math.log(factor) + 1.0


def rope_cos_sin(config, position_ids, kind="default"):
    """position_ids (t,) -> cos and sin (t, 1, R/2) float32, computed once for all layers of a kind.

    kind: "default", "sliding": plain RoPE with sliding_rope_theta, or "none": angles of zero, which
    leave q and k as they are. Together they take 512 MiB at t = 1M and R = 128. Where q is scaled,
    they are (t, 2, R/2): [:, 0] for q and [:, 1] for k."""
    q_scale = attention_scale(config, position_ids)
    if kind != "default":
        theta = config.sliding_rope_theta or config.rope_theta
        config = replace(config, rope_theta=theta, rope_scaling=None)
    frequency, attention_factor = rope_frequencies(config)
    if kind == "none":
        frequency = torch.zeros_like(frequency)
    frequency = frequency.to(position_ids.device).double()
    angle = position_ids.double()[:, None, None] * frequency                    # (t, 1, R/2)
    cos = angle.cos() * attention_factor
    sin = angle.sin() * attention_factor
    if q_scale is not None:
        cos = torch.cat((cos * q_scale, cos), dim=1)                            # (t, 2, R/2)
        sin = torch.cat((sin * q_scale, sin), dim=1)                            # (t, 2, R/2)
    return cos.float(), sin.float()


def attention_scale(config, position_ids):
    """What q is multiplied by besides the kernel's 1/sqrt(D): a number, (t, 1, 1), or None."""
    scaling = config.rope_scaling or {}
    if config.attention_multiplier is not None:
        return config.attention_multiplier * config.head_dim ** 0.5
    if scaling.get("llama_4_scaling_beta"):  # Ministral 3: it grows with the position of q
        contexts = position_ids // int(scaling["original_max_position_embeddings"])
        return 1 + scaling["llama_4_scaling_beta"] * contexts.double().log1p()[:, None, None]
    return None


def rotate(x, cos, sin, interleaved):
    """Rotate the first R dimensions of x (t, H, D) by its positions.

    Dimensions i and i+R/2 are a pair, or 2i and 2i+1 if interleaved."""
    R = 2 * cos.shape[-1]
    if R < x.shape[-1]:
        rotated = rotate(x[..., :R], cos, sin, interleaved)
        return torch.cat((rotated, x[..., R:]), dim=-1)                         # (t, H, D)
    if interleaved:
        pairs = x.float().unflatten(-1, (-1, 2))                                # (t, H, D/2, 2)
        dim = -1
    else:
        pairs = x.float().unflatten(-1, (2, -1))                                # (t, H, 2, D/2)
        dim = -2
    a, b = pairs.unbind(dim)                                                    # (t, H, D/2)
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim)
    return rotated.flatten(-2).to(x.dtype)                                      # (t, H, D)


class Norm(nn.Module):
    """RMSNorm or LayerNorm of the last dimension, as config.norm says.

    "rms": RMSNorm. "rms_float32": RMSNorm whose product with the weight is float32, too.
    "rms_plus_one": the same with 1 + weight. "layer": LayerNorm without bias. "layer_bias":
    LayerNorm with bias."""

    def __init__(self, size, config):
        super().__init__()
        self.kind = config.norm
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        if self.kind == "layer_bias":
            self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        y = x.float()
        if self.kind in ("layer", "layer_bias"):
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)

        # Where the product with the weight is rounded differs between the families.
        if self.kind == "rms":
            return self.weight * y.to(x.dtype)
        weight = self.weight.float()
        if self.kind == "rms_plus_one":
            weight = weight + 1
        y = y * weight
        if self.kind == "layer_bias":
            y = y + self.bias
        return y.to(x.dtype)


# ------------------------------------------------------------------------------------ transformer

class KeyValueCache:
    """k and v (m, G, D) of the m tokens of a text so far, in one layer, to generate the next ones.

    With a sliding window only those of the last `window` tokens are kept."""

    def __init__(self, window):
        self.window = window
        self.k = None
        self.v = None

    def append(self, k, v):
        """Add k and v (tokens, G, D) of the next tokens."""
        if self.k is not None:
            k = torch.cat((self.k, k))
            v = torch.cat((self.v, v))
        if self.window is not None:
            k = k[-self.window:]
            v = v[-self.window:]
        self.k = k
        self.v = v

    def attend(self, q):
        """q (1, H, D) of the last token -> attention's output (1, H, D)."""
        assert len(q) == 1, f"{len(q)} tokens, which would attend to tokens after them"
        q = q.transpose(0, 1)[None]                                             # (1, H, 1, D)
        k = self.k.transpose(0, 1)[None]                                        # (1, G, m, D)
        v = self.v.transpose(0, 1)[None]                                        # (1, G, m, D)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out[0].transpose(0, 1)                                           # (1, H, D)


class Attention(nn.Module):
    """Self-attention of a row whose tokens are spread over P ranks (Ulysses, arXiv 2309.14509)."""

    def __init__(self, config, layer, sp_group, execution, in_parts):
        """in_parts: training attends with some of the heads at a time, see attend_in_parts."""
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        H = config.num_attention_heads
        G = config.num_key_value_heads
        self.head_dim = D
        self.window = config.window(layer)
        self.interleaved = config.rope_interleaved
        self.kernel_choice = execution.attention
        self.in_parts = in_parts
        self.sp_group = sp_group
        self.P = 1 if sp_group is None else sp_group.size()
        self.q_heads = H // self.P              # heads of this rank during attention
        self.kv_heads = max(G // self.P, 1)     # fewer heads than ranks: some ranks hold the same
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        self.q_norm = None
        self.k_norm = None
        self.norm_across_heads = config.qk_norm_across_heads
        self.norm_after_rope = config.qk_norm_after_rope
        if config.qk_norm and config.qk_norm_across_heads:  # Olmo 2
            self.q_norm = Norm(H * D, config)
            self.k_norm = Norm(G * D, config)
        elif config.qk_norm and config.norm == "layer":  # Cohere: every head has its own weight
            self.q_norm = Norm((H, D), config)
            self.k_norm = Norm((G, D), config)
        elif config.qk_norm:  # Qwen 3: the heads share one weight
            self.q_norm = Norm(D, config)
            self.k_norm = Norm(D, config)

    def project(self, x, cos, sin, for_exchange):
        """x (t, C) -> q (t, H, D), k and v (t, G, D) of this rank's tokens, rotated.

        for_exchange: as one tensor (P, t, H/P + 2 G/P, D), ordered by the rank that needs it. This
        copy is part of the compiled half, where it is fused with the rotation."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))                   # (t, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))                   # (t, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))                   # (t, G, D)
        if self.q_norm is not None and not self.norm_after_rope:
            q, k = self.normalize(q, k)
        q = rotate(q, cos[:, :1], sin[:, :1], self.interleaved)
        k = rotate(k, cos[:, -1:], sin[:, -1:], self.interleaved)
        if self.norm_after_rope:  # Hunyuan
            q, k = self.normalize(q, k)
        if for_exchange:
            return split_heads_by_rank((q, k, v), self.P)
        return q, k, v

    def normalize(self, q, k):
        """q (t, H, D), k (t, G, D) -> their norms."""
        if self.norm_across_heads:
            return self.q_norm(q.flatten(1)).view_as(q), self.k_norm(k.flatten(1)).view_as(k)
        return self.q_norm(q), self.k_norm(k)

    def kernel_inputs(self, qkv, segments):
        """What `project` returned -> [(q, k, v) of local documents, (q, k, v) of crossing ones].

        Local: all heads of this rank's tokens, q (t - n, H, D). Crossing: this rank's heads of the
        tokens of all ranks, q (N, H/P, D), after an exchange. Either is left out if there are no
        such documents."""
        if segments.all_crossing:   # `project` has split the heads
            return [self.exchange(qkv, segments)]
        inputs = list(zip(*[segments.divide(x) for x in qkv]))
        if segments.any_crossing:   # they are the last
            inputs[-1] = self.exchange(split_heads_by_rank(inputs[-1], self.P), segments)
        return inputs

    def exchange(self, by_rank, segments):
        """q, k and v of this rank's crossing tokens, as split_heads_by_rank returns them -> q, k and v
        of all of them, this rank's heads."""
        exchanged = seq_to_heads(by_rank, self.sp_group, segments.crossing_tokens)
        q, k, v = exchanged.split((self.q_heads, self.kv_heads, self.kv_heads), dim=1)
        if exchanged.numel() >= 2**31:  # some kernels compute offsets into a view in 32 bits
            q = q.contiguous()
            k = k.contiguous()
            v = v.contiguous()
        return q, k, v

    def kernel_outputs(self, a, segments):
        """Attention's output a (t, H, D) -> what the kernels returned for `kernel_inputs`."""
        outputs = segments.divide(a)
        if segments.any_crossing:
            outputs[-1] = seq_to_heads(outputs[-1], self.sp_group, segments.crossing_tokens)
        return outputs

    def forward(self, qkv, segments, recompute_tensors=None, cache=None):
        """What `project` returned -> attention's output for this rank's tokens (t, H*D).

        recompute_tensors: see AttendWithRecompute; None: autograd keeps inputs and outputs.
        cache: this layer's KeyValueCache, to which the tokens are appended. The first call may have
        any number of tokens, and each later one has one."""
        if cache is not None:
            q, k, v = qkv
            is_first = cache.k is None
            cache.append(k, v)
            if not is_first:
                return cache.attend(q).flatten(1)                               # (1, H*D)

        inputs = self.kernel_inputs(qkv, segments)
        kernels = self.kernels(segments, inputs[0][0])
        if recompute_tensors is not None:
            flat_inputs = itertools.chain(*inputs)
            outputs = AttendWithRecompute.apply(recompute_tensors, kernels, *flat_inputs)
        elif self.in_parts and torch.is_grad_enabled():
            outputs = [attend_in_parts(kernel, q, k, v)
                       for kernel, (q, k, v) in zip(kernels, inputs)]
        else:
            outputs = [kernel(q, k, v) for kernel, (q, k, v) in zip(kernels, inputs)]

        outputs = list(outputs)
        if segments.any_crossing:
            outputs[-1] = heads_to_seq(
                outputs[-1], self.sp_group, segments.crossing_tokens)           # (n, H, D)
        return segments.join(outputs).flatten(1)                                # (t, H*D)

    def kernels(self, segments, q):
        """Return the attention kernel for local documents and for crossing ones, if there are
        any."""
        _, kernel = attention_kernel(self.kernel_choice, q.device.type, q.dtype)
        kernels = []
        if segments.any_local:
            kernels.append(functools.partial(
                kernel, cu_seqlens=segments.local_cu_seqlens,
                max_seqlen=segments.local_max_seqlen, window=self.window))
        if segments.any_crossing:
            kernels.append(functools.partial(
                kernel, cu_seqlens=segments.crossing_cu_seqlens,
                max_seqlen=segments.crossing_max_seqlen, window=self.window))
        return kernels


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        I = config.intermediate_size
        self.gate_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, I, bias=config.mlp_bias) if config.mlp_gate else None
        self.down_proj = nn.Linear(I, C, bias=config.mlp_bias)
        self.gelu = config.activation == "gelu_pytorch_tanh"

    def forward(self, x):
        gate = self.gate_proj(x)                                                # (t, I)
        y = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        if self.up_proj is not None:
            y = y * self.up_proj(x)
        return self.down_proj(y)                                                # (t, C)


def maybe_checkpoint(function, recompute, *args):
    """function(*args). With `recompute`, backward runs it again from args, which alone are kept."""
    if not recompute:
        return function(*args)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


# Compiled together with its checkpoint, backward recomputes only what gradients need, so the last
# product of a half is not computed again. All blocks share one compiled function: their weights
# are its inputs. It is specialized on the half, recompute, gradients on or off, and the shape.
compiled_maybe_checkpoint = torch.compile(maybe_checkpoint)
torch._dynamo.config.recompile_limit = 64
# A compiled half that is not recomputed keeps gate and up, but not their product, nor what a norm
# has computed: backward computes these again while it reads their inputs anyway. That is a third
# less to keep, and costs less time than an allocator at the limit of the memory.
torch._functorch.config.ban_recompute_materialized_backward = False


class Block(nn.Module):
    """A transformer block: x + Attention(norm(x)), then x + MLP(norm(x)).

    Some architectures have norms of what is added, x + norm(Attention(x)), or both.

    Outside the attention kernel every token is computed by itself. So a block has two halves,
    before and after the kernel, that are compiled, recomputed and cut into chunks of tokens.

    Without recomputation, autograd keeps or offloads what it needs: x, q, k, v, attention's output,
    the input of the MLP's norm, gate and up.

    With recompute "all_but_attention", one block in forward and backward:

    forward                                     kept for backward
        x                                       x (t, C), or offloaded
        q, k, v = pre_attention(x)
        exchange q, k, v of crossing documents
        outputs = kernels(q, k, v)              the log-sum-exps
        a = outputs, exchanged back             a (t, H*D), or offloaded
        y = post_attention(x, a)

    backward
        post_attention(x, a) again          ->  gradients of a, x and of its weights
        exchange the gradient of a
        q, k, v = pre_attention(x) again, and exchange q, k, v and a
        backward of the kernels             ->  gradients of q, k, v; then q, k, v and a are freed
        exchange the gradients of q, k, v back
        norm(x) again                       ->  gradients of x and of the weights; then x is freed

    Compiled, each product of the block runs at most once more, but those of q and k twice if their
    outputs are normalized. Not compiled, as on a CPU, the last step computes q, k and v once again.

    With "all" only x is kept, and the kernels run again, too, for some of the heads at a time. With
    "pairs" x is kept for every second block only, see Transformer.run_blocks.
    """

    def __init__(self, config, layer, sp_group, execution, recompute):
        super().__init__()
        C = config.hidden_size
        no_norm = nn.Identity()
        self.input_layernorm = Norm(C, config) if config.norm_before else no_norm
        self.self_attn = Attention(config, layer, sp_group, execution, in_parts=recompute == "all")
        self.post_self_attn_layernorm = Norm(C, config) if config.norm_after else no_norm
        self.post_attention_layernorm = None  # of what the MLP reads, as Llama calls it
        if not config.parallel_residual:
            self.post_attention_layernorm = Norm(C, config) if config.norm_before else no_norm
        self.mlp = MLP(config)
        self.post_mlp_layernorm = Norm(C, config) if config.norm_after else no_norm
        self.residual_multiplier = config.residual_multiplier
        self.recompute = recompute
        self.mlp_chunk = execution.mlp_chunk
        self.call_half = compiled_maybe_checkpoint if execution.compile else maybe_checkpoint

    def pre_attention(self, x, cos, sin, for_exchange):
        """x (t, C) -> q, k and v as Attention.project returns them."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin, for_exchange)

    def post_attention(self, x, a):
        """x (t, C), attention's output a (t, H*D) -> the block's output (t, C)."""
        attended = self.post_self_attn_layernorm(self.self_attn.o_proj(a))
        y = torch.add(x, attended, alpha=self.residual_multiplier)
        if self.post_attention_layernorm is None:  # parallel residual
            return y + self.mlp(self.input_layernorm(x))
        transformed = self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(y)))
        return torch.add(y, transformed, alpha=self.residual_multiplier)

    def call_in_chunks(self, half, recompute, tensors, *args):
        """Call half(*tensors, *args) for mlp_chunk tokens of the tensors at a time. Return a list of
        the results, a single one if there are no chunks.

        At t = 1M and I = 14336, each (t, I) in the MLP would take 28 GiB."""
        t = len(tensors[0])
        chunk = self.mlp_chunk or t
        if chunk >= t:
            return [self.call_half(half, recompute, *tensors, *args)]
        # Chunks are always recomputed: kept, they would take as much memory as the row at once.
        pieces = zip(*[tensor.split(chunk) for tensor in tensors])
        return [self.call_half(half, True, *piece, *args) for piece in pieces]

    def pre_attention_in_chunks(self, x, cos, sin, for_exchange, recompute):
        """pre_attention of all t tokens, computed in chunks."""
        chunks = self.call_in_chunks(self.pre_attention, recompute, (x, cos, sin), for_exchange)
        if len(chunks) == 1:
            return chunks[0]
        if for_exchange:
            return torch.cat(chunks, dim=1)
        return tuple(torch.cat(tensors) for tensors in zip(*chunks))            # q, k, v

    def post_attention_in_chunks(self, x, a, recompute):
        """post_attention of all t tokens, computed in chunks."""
        chunks = self.call_in_chunks(self.post_attention, recompute, (x, a))
        if len(chunks) == 1:
            return chunks[0]
        return torch.cat(chunks)                                                # (t, C)

    def forward(self, x, cos, sin, segments, offload=None, cache=None):
        """x (t, C) -> (t, C). offload: where what is kept for backward goes, None: it stays.
        cache: see Attention.forward."""
        if not torch.is_grad_enabled():
            return self.compute(x, cos, sin, segments, cache)
        assert cache is None, "a cache is for generation, which needs no gradients"

        if self.recompute == "none":
            if offload is None:
                return self.compute(x, cos, sin, segments)
            with offload.all_saved(except_for=[cos, sin, *self.parameters()]):
                return self.compute(x, cos, sin, segments)
        kept = Kept(offload)
        with kept.saved_by_reference():
            kept.add("x", x)
            if self.recompute == "all":
                # Not compiled as a whole: it contains the kernels and the exchange.
                return maybe_checkpoint(self.compute, True, x, cos, sin, segments)
            return self.compute_and_keep_attention(x, cos, sin, segments, kept)

    def compute(self, x, cos, sin, segments, cache=None):
        """Forward in which autograd keeps what it needs."""
        qkv = self.pre_attention_in_chunks(x, cos, sin, segments.all_crossing, recompute=False)
        a = self.self_attn(qkv, segments, cache=cache)                          # (t, H*D)
        return self.post_attention_in_chunks(x, a, recompute=False)

    def compute_and_keep_attention(self, x, cos, sin, segments, kept):
        """Forward in which only `kept` and the log-sum-exp are kept, as the picture above shows."""
        attention = self.self_attn

        @torch.no_grad()
        def recompute_tensors():  # called in backward
            qkv = self.pre_attention_in_chunks(
                kept.get("x"), cos, sin, segments.all_crossing, recompute=False)
            a = kept.get("a").unflatten(1, (-1, attention.head_dim))            # (t, H, D)
            return attention.kernel_inputs(qkv, segments), attention.kernel_outputs(a, segments)

        qkv = self.pre_attention_in_chunks(x, cos, sin, segments.all_crossing, recompute=True)
        a = attention(qkv, segments, recompute_tensors)                         # (t, H*D)
        kept.add("a", a)    # before post_attention saves it for backward
        return self.post_attention_in_chunks(x, a, recompute=True)


class Transformer(nn.Module):
    """Parameters have the names of a Llama checkpoint. With tied embeddings there is no lm_head."""

    def __init__(self, config, sp_group=None, execution=Execution()):
        super().__init__()
        self.config = config
        self.execution = execution
        self.sp_group = sp_group
        self.offload = Offload()
        self.rope_kinds = {config.rope_kind(i) for i in range(config.num_hidden_layers)}

        self.groups = execution.groups(config.num_hidden_layers)
        layers = nn.ModuleList()
        for group in self.groups:
            recompute = "all" if group.recompute == "pairs" else group.recompute
            for i in group.blocks:
                layers.append(Block(config, i, sp_group, execution, recompute))
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": layers,
            "norm": Norm(config.hidden_size, config),
        })
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, labels=None, weights=None,
                per_token=False, caches=None):
        """input_ids, position_ids, labels, weights (t,): this rank's shard of the row.
        cu_seqlens (d+1,): the borders of all documents of the row, best as a list of ints, since a
        tensor on the GPU has to be waited for. max_seqlen, the longest, follows from them.

        With labels (-100: no target) -> sum of weight x cross entropy, float32; without weights
        every target counts 1. With per_token -> what token_scores returns, for evaluation.
        Without labels -> logits (t, V).

        With caches, those of new_caches, a text is generated: the row is its next tokens, as
        Attention.forward takes them, and every rank has all of them -> logits of the last (1, V).
        """
        sp_group = self.sp_group if caches is None else None
        segments = parallel.segments_of_rank(cu_seqlens, sp_group, input_ids.device)
        ropes = {kind: rope_cos_sin(self.config, position_ids, kind) for kind in self.rope_kinds}
        x = self.embed(input_ids)                                               # (t, C)
        for group in self.groups:
            x = self.run_group(group, x, ropes, segments, caches)
        self.offload.release()
        if caches is not None:
            x = x[-1:]                                                          # (1, C)
        # Not compiled, the norm would keep and compute float32 copies of x: 12 GiB each at t = 1M.
        call_norm = compiled_maybe_checkpoint if self.execution.compile else maybe_checkpoint
        x = call_norm(self.model["norm"], False, x)                             # (t, C)
        head = self.head_weight()                                               # (V, C)
        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        if labels is None:
            return x @ head.T                                                   # (t, V)

        if per_token:
            return token_scores(x, head, labels, self.execution.loss_chunk)
        is_target = labels != -100
        if weights is None:
            weights = is_target.float()
        else:
            weights = weights * is_target
        return ChunkedCrossEntropy.apply(
            x, head, labels.clamp(min=0), weights, self.execution, torch.is_grad_enabled())

    def run_group(self, group, x, ropes, segments, caches=None):
        """x (t, C) -> (t, C), through the blocks of a Group. In backward, also brings back what was
        offloaded before it is needed."""
        offload = self.offload.begin_group(group) if torch.is_grad_enabled() else None
        x = self.run_blocks(group.blocks, x, ropes, segments, offload, caches)
        if x.requires_grad and self.groups[0].offloads:
            x.register_hook(functools.partial(self.offload.prefetch, group))
        return x

    def run_blocks(self, blocks, x, ropes, segments, offload, caches):
        """x (t, C) -> (t, C), through one block or a pair.

        Of two blocks only x is kept. Backward first computes the input of the second one again."""
        def run(x, offload):
            for i in blocks:
                cos, sin = ropes[self.config.rope_kind(i)]
                cache = caches[i] if caches is not None else None
                x = self.model["layers"][i](x, cos, sin, segments, offload, cache)
            return x

        if len(blocks) == 1 or not torch.is_grad_enabled():
            return run(x, offload)
        kept = Kept(offload)
        with kept.saved_by_reference():
            kept.add("x", x)
            return maybe_checkpoint(run, True, x, None)

    def block_groups(self):
        """Return the blocks of each group, whose weights are gathered together."""
        return [[self.model["layers"][i] for i in group.blocks] for group in self.groups]

    def new_caches(self):
        """Return an empty KeyValueCache for each layer."""
        layers = range(self.config.num_hidden_layers)
        return [KeyValueCache(self.config.window(i)) for i in layers]

    def embed(self, input_ids):
        """input_ids (t,) -> (t, C)."""
        x = self.model["embed_tokens"](input_ids)
        if self.config.scale_embedding:
            # Gemma was trained with this factor rounded to the dtype of the embeddings.
            scale = torch.tensor(self.config.hidden_size ** 0.5, dtype=x.dtype, device="cpu")
            x = x * scale.item()
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        return x

    def head_weight(self):
        """Return (V, C)."""
        head = self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight
        if self.config.normalize_head:
            head = F.normalize(head)
        return head

    def local_parameters(self):
        """Yield (name, this rank's rows of the parameter, index of the first of them)."""
        for name, parameter in self.named_parameters():
            rows, first = parallel.local_rows(parameter)
            yield name, rows, first

    @torch.no_grad()
    def init_weights(self, seed):
        """Random weights that do not depend on the number of ranks.

        Matrices are normal with standard deviation 1/sqrt(C), or a tenth of it where a block
        adds to the residual stream. Norms scale by one, biases are zero."""
        neutral_norm = 0.0 if self.config.norm == "rms_plus_one" else 1.0
        for name, rows, first in self.local_parameters():
            if name.endswith("bias"):
                rows.fill_(0.0)
            elif rows.ndim == 1 or "norm" in name:
                rows.fill_(neutral_norm)
            else:
                std = self.config.hidden_size ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std *= 0.1
                # Every rank draws the whole matrix and takes its rows.
                generator = torch.Generator(rows.device)
                generator.manual_seed(seed + zlib.crc32(name.encode()))
                full = torch.empty(self.get_parameter(name).shape, device=rows.device)
                full.normal_(0, std, generator=generator)
                rows.copy_(full[first:first + len(rows)])


@torch.no_grad()
def token_scores(x, head, labels, chunk):
    """Return the cross entropy of each target (t,) float32; and (t,) bool, whether the target has
    the largest logit, so that greedy decoding would choose it. 0 and False where the label is -100.

    x (t, C), head (V, C), labels (t,). The logits of `chunk` targets exist at a time."""
    losses = torch.zeros(len(x), device=x.device)
    is_largest = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    targets = (labels != -100).nonzero()[:, 0]
    for index in targets.split(chunk):
        logits = (x[index] @ head.T).float()                                    # (c, V)
        losses[index] = F.cross_entropy(logits, labels[index], reduction="none")
        is_largest[index] = logits.argmax(-1) == labels[index]
    return losses, is_largest


def loss_and_gradient(logits, labels, weights):
    """logits (c, V) -> the sum of weight x cross entropy, float32, and its gradient (c, V)."""
    logits32 = logits.float()
    log_sum_exp = logits32.logsumexp(dim=-1, keepdim=True)                      # (c, 1)
    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    is_label = labels[:, None] == vocabulary                                    # (c, V)
    label_logits = (logits32 * is_label).sum(-1)                                # (c,)
    loss = (weights * (log_sum_exp[:, 0] - label_logits)).sum()
    probabilities = (logits32 - log_sum_exp).exp()                              # (c, V)
    gradient = weights[:, None] * (probabilities - is_label.float())
    return loss, gradient.to(logits.dtype)


def multiply_(tensor, factor):
    """Multiply a tensor by a scalar tensor, which may have another dtype, in place."""
    tensor.mul_(factor)


compiled_loss_and_gradient = torch.compile(loss_and_gradient)
compiled_multiply = torch.compile(multiply_)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and its gradients in one pass over chunks of tokens.

    All logits (t, V) would be 256 GiB at t = 1M and V = 128k. Forward computes the gradients too,
    so no product with the head is computed twice. The head's gradient is summed over chunks in
    float32."""

    @staticmethod
    def forward(ctx, x, head, labels, weights, execution, needs_gradient):
        """x (t, C), head (V, C), labels and weights (t,) -> scalar float32."""
        compute = compiled_loss_and_gradient if execution.compile else loss_and_gradient
        loss = torch.zeros((), device=x.device)
        grad_x = None
        grad_head = None
        one_chunk = len(x) <= execution.loss_chunk
        if needs_gradient:
            grad_x = torch.empty_like(x)
            if not one_chunk:
                grad_head = torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(x), execution.loss_chunk):
            chunk = slice(start, start + execution.loss_chunk)
            logits = x[chunk] @ head.T                                          # (c, V)
            chunk_loss, grad_logits = compute(logits, labels[chunk], weights[chunk])
            loss += chunk_loss
            if needs_gradient:
                grad_x[chunk] = grad_logits @ head                              # (c, C)
                if one_chunk:
                    grad_head = grad_logits.T @ x                               # (V, C)
                else:
                    grad_head += grad_logits.T @ x[chunk]
        ctx.save_for_backward(grad_x, grad_head)
        ctx.compile = execution.compile
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_head = ctx.saved_tensors
        multiply = compiled_multiply if ctx.compile else multiply_
        multiply(grad_x, grad_loss)
        multiply(grad_head, grad_loss)
        return grad_x, grad_head, None, None, None, None
