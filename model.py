"""The model: a Llama-style transformer on one flat row of packed documents.

Letters in shapes, for one rank:
    T tokens of the row             H query heads                C hidden size
    t = T/P tokens of this rank     G key/value heads            I intermediate size of the MLP
    P ranks that share the row      D head size                  V vocabulary size
    n of this rank's tokens, N of all ranks': those of documents that cross a border between ranks

Precision: matrix products, attention and the residual stream run in the dtype of the weights,
bfloat16 in training. The statistics of the norms, the rotation of q and k, the softmax and the loss
are float32, because their sums and exponentials lose too much in bfloat16. RoPE angles are computed
in float64: near position one million a float32 angle is up to 0.03 radians off. FSDP2 keeps the
master weights in float32 (parallel.py).
"""
import functools
import importlib
import itertools
import math
import zlib
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import parallel
from parallel import (
    AttendWithRecompute,
    Kept,
    heads_to_seq,
    seq_to_heads,
    split_heads_by_rank,
)


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
    recompute: str = "none"             # or "all_but_attention" or "all": recomputed in backward
    keep_layers: int = 0                # last blocks, which are exempt from `recompute`
    offload_layers: int = 0             # first blocks that offload what they keep to CPU memory
    mlp_chunk: int = 0                  # tokens that pass the MLP at a time; 0: all t
    loss_chunk: int = 8192              # tokens whose logits exist at a time
    compile: bool = False               # torch.compile the two halves of a block, and the loss


# ------------------------------------------------------------------------------ attention kernels
# All kernels share one signature: q (T, H, D), k and v (T, G, D), cu_seqlens (n+1,) int32 on the
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
        n = end - start
        qi = q[start:end].transpose(0, 1)[None]                                 # (1, H, n, D)
        ki = k[start:end].transpose(0, 1)[None]                                 # (1, G, n, D)
        vi = v[start:end].transpose(0, 1)[None]                                 # (1, G, n, D)
        mask = None
        if window is not None and n > window:
            position = torch.arange(n, device=q.device)
            distance = position[:, None] - position                             # (n, n)
            mask = (distance >= 0) & (distance < window)
        out = package.scaled_dot_product_attention(
            qi, ki, vi, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))                                  # (n, H, D)
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
    """-> (name, function): the first of KERNELS that works here, or `choice` itself.

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
    """-> inverse frequencies (R/2,) float32, and the factor that cos and sin are multiplied by.

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
    """-> (R/2,): 1 for the dimensions that keep their frequency, 0 for those that are stretched.

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

class Attention(nn.Module):
    """Self-attention of a row whose tokens are spread over P ranks (Ulysses, arXiv 2309.14509)."""

    def __init__(self, config, layer, sp_group, execution):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        H = config.num_attention_heads
        G = config.num_key_value_heads
        self.head_dim = D
        self.window = config.window(layer)
        self.interleaved = config.rope_interleaved
        self.kernel_choice = execution.attention
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
        inputs = []
        if segments.any_local:
            inputs.append(tuple(x[segments.local] for x in qkv))
        if segments.any_crossing:
            if not segments.all_crossing:  # or else `project` has split the heads
                qkv = split_heads_by_rank([segments.take_crossing(x) for x in qkv], self.P)
            exchanged = seq_to_heads(qkv, self.sp_group, segments.crossing_tokens)
            q, k, v = exchanged.split((self.q_heads, self.kv_heads, self.kv_heads), dim=1)
            if exchanged.numel() >= 2**31:  # some kernels compute offsets into a view in 32 bits
                q = q.contiguous()
                k = k.contiguous()
                v = v.contiguous()
            inputs.append((q, k, v))
        return inputs

    def kernel_outputs(self, a, segments):
        """Attention's output a (t, H, D) -> what the kernels returned for `kernel_inputs`."""
        outputs = []
        if segments.any_local:
            outputs.append(a[segments.local])
        if segments.any_crossing:
            crossing = segments.take_crossing(a)
            outputs.append(seq_to_heads(crossing, self.sp_group, segments.crossing_tokens))
        return outputs

    def forward(self, qkv, segments, recompute_tensors=None):
        """What `project` returned -> attention's output for this rank's tokens (t, H*D).

        recompute_tensors: see AttendWithRecompute; None: autograd keeps inputs and outputs."""
        inputs = self.kernel_inputs(qkv, segments)
        kernels = self.kernels(segments, inputs[0][0])
        if recompute_tensors is None:
            outputs = [kernel(q, k, v) for kernel, (q, k, v) in zip(kernels, inputs)]
        else:
            flat_inputs = itertools.chain(*inputs)
            outputs = AttendWithRecompute.apply(recompute_tensors, kernels, *flat_inputs)

        local = outputs[0] if segments.any_local else None                      # (t - n, H, D)
        crossing = None
        if segments.any_crossing:
            crossing = heads_to_seq(
                outputs[-1], self.sp_group, segments.crossing_tokens)           # (n, H, D)
        return segments.join(local, crossing).flatten(1)                        # (t, H*D)

    def kernels(self, segments, q):
        """-> the attention kernel for local documents and for crossing ones, if there are any."""
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


def call(function, recompute, *args):
    """function(*args); with `recompute`, only args are kept for its backward."""
    if not recompute:
        return function(*args)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


# Compiled together with its checkpoint, backward recomputes only what gradients need, so the last
# product of a half is not computed again. All blocks share one compiled function: their weights
# are its inputs. It is specialized on the half, recompute, gradients on or off, and the shape.
compiled_call = torch.compile(call)
torch._dynamo.config.recompile_limit = 64


class Block(nn.Module):
    """A transformer block: x + Attention(norm(x)), then x + MLP(norm(x)).

    Some architectures have norms of what is added, x + norm(Attention(x)), or both.

    Outside the attention kernel every token is computed by itself. So a block has two halves,
    before and after the kernel, that are compiled, recomputed and cut into chunks of tokens.

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

    Compiled, each product of the block runs at most once more. Not compiled, as on a CPU, the last
    step computes q, k and v once again.
    """

    def __init__(self, config, layer, sp_group, execution, recompute):
        super().__init__()
        C = config.hidden_size
        no_norm = nn.Identity()
        self.input_layernorm = Norm(C, config) if config.norm_before else no_norm
        self.self_attn = Attention(config, layer, sp_group, execution)
        self.post_self_attn_layernorm = Norm(C, config) if config.norm_after else no_norm
        self.post_attention_layernorm = None  # of what the MLP reads, as Llama calls it
        if not config.parallel_residual:
            self.post_attention_layernorm = Norm(C, config) if config.norm_before else no_norm
        self.mlp = MLP(config)
        self.post_mlp_layernorm = Norm(C, config) if config.norm_after else no_norm
        self.residual_multiplier = config.residual_multiplier
        self.recompute = recompute
        self.mlp_chunk = execution.mlp_chunk
        self.call_half = compiled_call if execution.compile else call

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

    def post_attention_in_chunks(self, x, a, recompute):
        """post_attention, mlp_chunk tokens at a time: a (t, I) of t = 1M, I = 14336 is 28 GiB."""
        chunk = self.mlp_chunk or len(x)
        if chunk >= len(x):
            return self.call_half(self.post_attention, recompute, x, a)
        # Chunks are always recomputed: kept, they would take as much memory as the row at once.
        outputs = [self.call_half(self.post_attention, True, xi, ai)
                   for xi, ai in zip(x.split(chunk), a.split(chunk))]
        return torch.cat(outputs)                                               # (t, C)

    def forward(self, x, cos, sin, segments, offload=None):
        """x (t, C) -> (t, C). offload: where what is kept for backward goes, None: it stays."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x, cos, sin, segments)

        kept = Kept(offload)
        with kept.saved_by_reference():
            kept.add("x", x)
            if self.recompute == "all":
                # Not compiled as a whole: it contains the kernels and the exchange.
                return call(self.compute, True, x, cos, sin, segments)
            return self.compute_and_keep_attention(x, cos, sin, segments, kept)

    def compute(self, x, cos, sin, segments):
        """Forward in which autograd keeps what it needs."""
        qkv = self.call_half(self.pre_attention, False, x, cos, sin, segments.all_crossing)
        a = self.self_attn(qkv, segments)                                       # (t, H*D)
        return self.post_attention_in_chunks(x, a, recompute=False)

    def compute_and_keep_attention(self, x, cos, sin, segments, kept):
        """Forward in which only `kept` and the log-sum-exp are kept, as the picture above shows."""
        attention = self.self_attn

        @torch.no_grad()
        def recompute_tensors():  # called in backward
            qkv = self.call_half(
                self.pre_attention, False, kept.get("x"), cos, sin, segments.all_crossing)
            a = kept.get("a").unflatten(1, (-1, attention.head_dim))            # (t, H, D)
            return attention.kernel_inputs(qkv, segments), attention.kernel_outputs(a, segments)

        qkv = self.call_half(self.pre_attention, True, x, cos, sin, segments.all_crossing)
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
        self.offload = parallel.Offload()
        self.rope_kinds = {config.rope_kind(i) for i in range(config.num_hidden_layers)}

        layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            keeps_everything = i >= config.num_hidden_layers - execution.keep_layers
            recompute = "none" if keeps_everything else execution.recompute
            layers.append(Block(config, i, sp_group, execution, recompute))
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": layers,
            "norm": Norm(config.hidden_size, config),
        })
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, labels=None, weights=None):
        """input_ids, position_ids, labels, weights (t,): this rank's shard of the row.
        cu_seqlens (n+1,): the borders of all documents of the row, best as a list of ints, since a
        tensor on the GPU has to be waited for. max_seqlen, the longest, follows from them.

        With labels (-100: no target) -> sum of weight x cross entropy, float32; without weights
        every target counts 1. Without labels -> logits (t, V)."""
        segments = parallel.segments_of_rank(
            cu_seqlens, self.sp_group, input_ids.device)
        ropes = {kind: rope_cos_sin(self.config, position_ids, kind) for kind in self.rope_kinds}
        x = self.embed(input_ids)                                               # (t, C)
        for i, block in enumerate(self.model["layers"]):
            offload = self.offload if i < self.execution.offload_layers else None
            cos, sin = ropes[self.config.rope_kind(i)]
            x = block(x, cos, sin, segments, offload)
        x = self.model["norm"](x)
        head = self.head_weight()                                               # (V, C)
        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        if labels is None:
            return x @ head.T                                                   # (t, V)

        is_target = labels != -100
        if weights is None:
            weights = is_target.float()
        else:
            weights = weights * is_target
        return ChunkedCrossEntropy.apply(
            x, head, labels.clamp(min=0), weights, self.execution, torch.is_grad_enabled())

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
        """-> (V, C)."""
        head = self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight
        if self.config.normalize_head:
            head = F.normalize(head)
        return head

    def local_parameters(self):
        """Yields (name, this rank's rows of the parameter, index of the first of them)."""
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


compiled_loss_and_gradient = torch.compile(loss_and_gradient)


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
        if needs_gradient:
            grad_x = torch.empty_like(x)
            grad_head = torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(x), execution.loss_chunk):
            chunk = slice(start, start + execution.loss_chunk)
            logits = x[chunk] @ head.T                                          # (c, V)
            chunk_loss, grad_logits = compute(logits, labels[chunk], weights[chunk])
            loss += chunk_loss
            if needs_gradient:
                grad_x[chunk] = grad_logits @ head                              # (c, C)
                grad_head += grad_logits.T @ x[chunk]                           # (V, C)
        ctx.save_for_backward(grad_x, grad_head)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_head = ctx.saved_tensors
        return grad_x.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None


# ------------------------------------------------------------------------------------- arithmetic
# How much work, memory and time a step takes, and the settings that make it fast where it fits.

class GPU(NamedTuple):
    """What the arithmetic needs to know of a GPU. Rates are those of real kernels in a step."""
    memory: float               # GiB
    peak: float                 # FLOP/s of dense bfloat16 products in its data sheet, for the MFU
    products: float             # FLOP/s of matrix products, with the elementwise work of a block
    attention_forward: float    # FLOP/s of the kernel on long documents
    attention_backward: float
    bandwidth: float            # bytes/s of its memory
    link: float                 # bytes/s from GPU to GPU of one host, as NCCL reaches it
    host_link: float            # bytes/s to or from pinned CPU memory


# The rates of the H200 were measured (bench/roofs.jsonl, bench/LOG.md). Those of the others are
# estimates: the data sheet's ratio to the H200, and FlashAttention 2 instead of 4 on the A100.
GPUS = {
    "A100-40": GPU(39.5, 312e12, 230e12, 200e12, 170e12, 1.1e12, 200e9, 25e9),
    "A100-80": GPU(79.2, 312e12, 230e12, 200e12, 170e12, 1.4e12, 200e9, 25e9),
    "H100": GPU(79.1, 989e12, 640e12, 620e12, 580e12, 2.4e12, 278e9, 55e9),
    "H800": GPU(79.1, 989e12, 640e12, 620e12, 580e12, 2.4e12, 140e9, 55e9),
    "H200": GPU(139.8, 989e12, 655e12, 650e12, 610e12, 3.4e12, 278e9, 55e9),
    "B200": GPU(178.0, 2250e12, 1400e12, 1350e12, 1150e12, 5.6e12, 550e9, 55e9),
}
USABLE_MEMORY = 0.94        # of a GPU: the rest is for CUDA, NCCL and fragmentation
USABLE_HOST_MEMORY = 0.85   # of a host: the rest is for the system and the page cache
HALF_RATE_LENGTH = 1200     # tokens of a document with which attention reaches half of its rate
GPUS_PER_HOST = 8
NETWORK = 40e9              # bytes/s of a GPU to another host (400 Gbit/s, less its overhead)
HOST_BANDWIDTH = 20e9       # bytes/s of CPU memory for each rank, when AdamW runs on the CPU
ALIKE = 1.01                # steps that differ by less are as good: the simplest settings win
STEP_OVERHEAD = 0.01        # seconds of a step in which the GPU waits for the CPU
PROCESS = 2 * 2**30         # bytes of CPU memory of a process that offloads nothing


def gpu_of(device_name):
    """-> the GPU of GPUS whose name is a part of the device's name.

    An unknown one gets the rates of an A100, whose proportions are good enough to choose settings,
    and no peak."""
    for name, gpu in GPUS.items():
        if name.partition("-")[0] in device_name:
            return gpu
    return GPUS["A100-80"]._replace(peak=None)


class Work(NamedTuple):
    """What an optimizer step asks of one GPU, however it is carried out."""
    tokens: int             # t of a row
    pairs: float            # (query, key) pairs of attention in the whole row
    sp: int = 1             # P
    ranks: int = 1          # over which parameters and optimizer states are sharded
    accumulate: int = 1     # micro-batches of a step


class Settings(NamedTuple):
    """The constants of train.py that trade memory for time."""
    recompute: str = "none"
    keep_layers: int = 0
    zero_stage: int = 2
    mlp_chunk: int = 0
    offload_layers: int = 0
    offload_optimizer: bool = False

    def execution(self, given):
        """-> a copy of the Execution `given` with these settings."""
        return replace(
            given, recompute=self.recompute, keep_layers=self.keep_layers,
            mlp_chunk=self.mlp_chunk, offload_layers=self.offload_layers)


def attention_pairs(cu_seqlens, window=None):
    """cu_seqlens, a list of ints -> number of (query, key) pairs that causal attention computes.

    n^2 / 2 for a document of n tokens, less those further away than the window."""
    pairs = 0
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        n = end - start
        beyond_window = max(n - window, 0) if window else 0
        pairs += n ** 2 - beyond_window ** 2
    return pairs / 2


def mean_attention_pairs(config, cu_seqlens):
    """-> attention_pairs of a layer: the mean over all layers, whose windows may differ."""
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    pairs = {window: attention_pairs(cu_seqlens, window) for window in set(windows)}
    return sum(pairs[window] for window in windows) / len(windows)


def block_parameters(config):
    """-> parameters of one block's matrix products: attention's four, the MLP's two or three."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * heads
    mlp_matrices = 3 if config.mlp_gate else 2
    return attention + mlp_matrices * config.hidden_size * config.intermediate_size


def flops(config, tokens, pairs, recompute="none", keep_layers=0):
    """-> model FLOPs and hardware FLOPs of forward and backward over `tokens` tokens.

    Model FLOPs are 3 x forward. In forward a parameter of a matrix product takes 2 per token, and
    each of the `pairs` of attention, those of a layer on average, 4 x H x D. Hardware FLOPs add what
    backward recomputes, which is all of a block but its last product, and the attention kernel only
    with "all"."""
    L = config.num_hidden_layers
    block = block_parameters(config)
    lm_head = config.hidden_size * config.vocab_size
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    forward = 2 * tokens * (L * block + lm_head) + L * attention

    down_proj = config.hidden_size * config.intermediate_size
    recomputed_block = 0
    if recompute != "none":
        recomputed_block = 2 * tokens * (block - down_proj)
    if recompute == "all":
        recomputed_block += attention
    recomputing_layers = max(L - keep_layers, 0)
    return 3 * forward, 3 * forward + recomputing_layers * recomputed_block


def count_parameters(config):
    """-> parameters of one block, and of the embeddings and the head together.

    Norms and biases are too few to matter."""
    embedding = config.vocab_size * config.hidden_size
    return block_parameters(config), embedding if config.tie_word_embeddings else 2 * embedding


def attention_widths(config, sp):
    """-> values a token of q, and of q, k and v together, as one rank has them in attention.

    With fewer key/value heads than ranks, these are replicated."""
    q = config.num_attention_heads * config.head_dim
    kv = max(config.num_key_value_heads, sp) * config.head_dim
    return q, q + 2 * kv


def mlp_width(config):
    """-> values a token that the MLP keeps for backward: gate, up and their product."""
    return config.intermediate_size * (3 if config.mlp_gate else 2)


def kept_by_block(config, recompute, chunked, sp):
    """-> bytes a token that a block keeps for backward, except the log-sum-exp. They are bfloat16.

    chunked: the MLP runs in chunks, so that it keeps its inputs only."""
    C = config.hidden_size
    q, qkv = attention_widths(config, sp)
    if recompute == "all":
        return 2 * C                        # x
    if recompute == "all_but_attention":
        return 2 * (C + q)                  # x and attention's output
    kept = C + C + qkv + q                  # x, its norm, q, k, v, attention's output
    if sp > 1:
        kept += q                           # the output after its exchange, besides the one before
    if not chunked:
        kept += C + C + mlp_width(config)   # x + attention, its norm, what the MLP keeps
    return 2 * kept


def transient_of_block(config, recompute, tokens, chunk, sp):
    """-> bytes at the peak of one block's backward, besides what it has kept since forward."""
    C = config.hidden_size
    q, qkv = attention_widths(config, sp)
    kv = (qkv - q) // 2
    chunked = chunk < tokens

    # In the MLP: the gradient of the block's output, those of what the MLP has computed, and what
    # is recomputed. With chunks also the gradients of x and a, which the chunks fill.
    mlp = tokens * C + chunk * mlp_width(config)
    if recompute != "none" or chunked:
        mlp += chunk * (C + C + mlp_width(config))
    if chunked:
        mlp += tokens * (C + q)
    if recompute == "all":
        mlp += tokens * (C + qkv + q)       # the norm of x, q, k, v, attention's output

    # In the kernel: gradients of x and of the output, then of q, k, v, which it sums in float32.
    attention = C + q + qkv + 2 * q
    if kv < q:
        attention += 2 * (kv + kv)
    if recompute != "none":
        attention += qkv
    if recompute != "none" and sp > 1 or recompute == "all":
        attention += q                      # the output, which is not the kept tensor
    if recompute == "all":
        attention += C                      # the norm of x
    if sp > 1:
        attention += q                      # the output's gradient before its exchange
        if recompute == "all":
            attention += q                  # the output after its exchange
        if tokens * qkv >= 2**31:
            attention += qkv                # contiguous copies, see Attention.exchange
    return 2 * max(mlp, tokens * attention)


def loss_memory(config, tokens, loss_chunk):
    """-> bytes at the peak of the last norm and the loss, in forward."""
    C = config.hidden_size
    V = config.vocab_size
    chunk = min(loss_chunk, tokens)
    # The last norm is not compiled: its input in float32, and in bfloat16 what it has normalized,
    # its output, and the gradient of that.
    norm = tokens * (4 * C + 2 * C + 2 * C + 2 * C)
    # Logits and their gradient in bfloat16. Python lets go of those of a chunk only when it assigns
    # those of the next one, so there are three. Or two and the product for the head's gradient.
    logits = 2 * V * chunk
    head_gradient = 4 * V * C  # float32
    product = 2 * V * C
    if chunk < tokens:
        return norm + head_gradient + max(3 * logits, 2 * logits + product)
    return norm + head_gradient + 2 * logits + product


def memory(config, tokens, ranks, execution, zero_stage=2, accumulate=1, sp=1,
           offload_optimizer=False):
    """-> {part: GiB} of one GPU at the peak of a step, compiled and with FlashAttention 4.

    tokens: t of this rank; ranks: over which states are sharded; accumulate: micro-batches a step;
    sp: P. Within 5% of what was measured (bench/results.jsonl)."""
    L = config.num_hidden_layers
    block, embeddings = count_parameters(config)
    parameters = L * block + embeddings
    chunk = min(execution.mlp_chunk or tokens, tokens)
    whole = min(execution.keep_layers, L) if execution.recompute != "none" else L
    offloaded = min(execution.offload_layers, L - whole)
    prefetched = 3 if execution.recompute == "all" else 2   # blocks, by Offload.load
    everything = tokens * kept_by_block(config, "none", chunk < tokens, sp)
    inputs = tokens * kept_by_block(config, execution.recompute, chunk < tokens, sp)
    log_sum_exp = 4 * config.num_attention_heads * tokens
    if execution.recompute == "all":
        log_sum_exp *= whole / L  # kept by the whole blocks only

    def kept(blocks):
        """By the first `blocks` blocks, all of which backward has still to do.

        Of offloaded ones a few are on the GPU, once backward has come to them."""
        recomputed = min(blocks, L - whole)
        on_gpu = recomputed - offloaded if recomputed > offloaded else min(recomputed, prefetched)
        return on_gpu * inputs + (blocks - recomputed) * everything + blocks * log_sum_exp

    # AdamW: float32 weight and two moments.
    states = 0 if offload_optimizer else 3 * 4 * parameters / ranks
    # bfloat16 weights as FSDP gathers them. While there are earlier or later micro-batches, ZeRO 1
    # and 2 keep all of them; otherwise a block's are freed when its backward is done.
    gathering = 2 * block if ranks > 1 else 0       # the buffer of the last all-gather
    all_gathered = 2 * (embeddings + (L if zero_stage < 3 else 1) * block) + gathering
    # float32 gradients of earlier micro-batches.
    gradients_of_step = 0 if offload_optimizer else 4 * parameters / ranks
    earlier = 0
    if accumulate > 1:
        earlier = 4 * parameters if zero_stage == 1 else gradients_of_step

    # The moments that can be the peak, as (weights, gradients, kept, transient, loss).
    head_gradient = 2 * config.vocab_size * config.hidden_size
    loss = loss_memory(config, tokens, execution.loss_chunk)
    moments = [(all_gathered, earlier, kept(L), 0, loss)]
    # Backward of a block. Along blocks of one kind the sum is linear, so the ends are enough.
    for i in {L - 1, L - 1 - whole, offloaded - 1, min(prefetched, L) - 1, 0}:
        if i < 0:
            continue
        recompute = "none" if i >= L - whole else execution.recompute
        transient = transient_of_block(config, recompute, tokens, chunk, sp)
        gathered = all_gathered
        if zero_stage == 3:
            gathered = 2 * (embeddings + min(i + 1, 2) * block) + gathering
        elif accumulate == 1:
            gathered = 2 * (embeddings + (i + 1) * block) + gathering
        # Reduced gradients of later blocks, those of the head and of this block before reduction.
        reduced = 0 if offload_optimizer else 4 * (L - 1 - i) * block / ranks
        gradients = max(earlier, reduced) + head_gradient + 2 * block
        moments.append((gathered, gradients, kept(i + 1), transient, 0))
    # The reduction of the embeddings' gradient, in float32, ends backward.
    moments.append((0, max(earlier, gradients_of_step) + 4 * embeddings, 0, 0, 0))

    peak = max(moments, key=sum)
    names = ("gathered weights", "gradients", "kept for backward", "transient activations", "loss")
    parts = {"optimizer states": states, **dict(zip(names, peak))}
    return {part: size / 2**30 for part, size in parts.items()}


def host_memory(config, tokens, ranks, execution, offload_optimizer=False, sp=1):
    """-> GiB of CPU memory of one rank's process."""
    L = config.num_hidden_layers
    whole = L if execution.recompute == "none" else min(execution.keep_layers, L)
    offloaded = min(execution.offload_layers, L - whole)
    size = PROCESS + offloaded * tokens * kept_by_block(config, execution.recompute, False, sp)
    if offload_optimizer:
        block, embeddings = count_parameters(config)
        size += 4 * 4 * (L * block + embeddings) / ranks    # weight, gradient, two moments
    return size / 2**30


def step_seconds(config, gpu, work, execution, zero_stage=2, offload_optimizer=False):
    """-> {part: seconds} of one optimizer step. Within 10% of what was measured on H200s."""
    L = config.num_hidden_layers
    t = work.tokens
    block, embeddings = count_parameters(config)
    parameters = L * block + embeddings
    down_proj = config.hidden_size * config.intermediate_size
    q, qkv = attention_widths(config, work.sp)
    recompute = execution.recompute
    whole = L if recompute == "none" else min(execution.keep_layers, L)
    recomputed = L - whole

    # Matrix products: 2 FLOPs a parameter and token in forward, 4 in backward, and 2 where they
    # are recomputed. A chunk of the MLP recomputes itself, once more than the block around it.
    head = config.hidden_size * config.vocab_size
    products = 6 * t * (L * block + head) / gpu.products
    again = recomputed * (block - down_proj)
    if 0 < execution.mlp_chunk < t:
        post_attention = config.hidden_size * q + mlp_width(config) * config.hidden_size
        again += whole * (post_attention - down_proj)
        if recompute == "all":
            again += recomputed * post_attention
    recomputation = 2 * t * again / gpu.products

    # Attention. Its backward does 2.5 times the work of forward: the scores are computed again.
    length = 2 * work.pairs / (t * work.sp)     # mean document, weighted by its tokens
    efficiency = length / (length + HALF_RATE_LENGTH)
    flops_of_layer = 4 * config.num_attention_heads * config.head_dim * work.pairs / work.sp
    forward = flops_of_layer / gpu.attention_forward / efficiency
    attention = L * (forward + 2.5 * flops_of_layer / gpu.attention_backward / efficiency)
    if recompute == "all":
        recomputation += recomputed * forward

    # The exchange of sequence parallelism: of q, k, v and of the output of documents that cross a
    # border, in forward, in backward and where they are recomputed.
    link = gpu.link if work.sp <= GPUS_PER_HOST else NETWORK
    crossing = min(length / t, 1)       # share of the tokens, about a document at every border
    exchanged = 2 * t * crossing * (qkv + q) * (work.sp - 1) / work.sp
    exchange = (2 * L + recomputed) * exchanged / link
    compute = products + recomputation + attention + exchange

    # Offloading is hidden unless it takes longer than the computing beside it, forward or backward.
    offloaded = min(execution.offload_layers, recomputed)
    copied = offloaded * t * kept_by_block(config, recompute, False, work.sp)
    copy = copied / gpu.host_link
    offloading = max(copy - compute / 3, 0) + max(copy - 2 * compute / 3, 0)

    # FSDP, a micro-batch: gathers in bfloat16, and the reduction in float32.
    link = gpu.link if work.ranks <= GPUS_PER_HOST else NETWORK
    n_gathers = 2 * work.accumulate if zero_stage == 3 else 1
    n_reductions = 1 if zero_stage == 1 else work.accumulate
    moved = (2 * n_gathers + 4 * n_reductions) * parameters
    transfer = moved * (work.ranks - 1) / work.ranks / link
    # About half of it is hidden; all of it is not where it takes longer than the computing.
    communication = max(transfer / 2, transfer - work.accumulate * compute)
    # Copies: the cast (reads 4 bytes, writes 2), into the parameters (2, 2), gradients to float32
    # (2, 4) and their reduction (4, 4).
    communication += (10 * n_gathers + 14 * n_reductions) * parameters / gpu.bandwidth

    # AdamW reads weight, gradient and moments, writes all but the gradient; the norm reads that.
    optimizer = 32 * parameters / work.ranks / gpu.bandwidth
    if offload_optimizer:
        optimizer = 32 * parameters / work.ranks / HOST_BANDWIDTH
        copied = 4 * (n_gathers + n_reductions) * parameters / work.ranks
        communication += copied / gpu.host_link

    return {
        "matrix products": work.accumulate * products,
        "attention": work.accumulate * attention,
        "recomputation": work.accumulate * recomputation,
        "exchange": work.accumulate * exchange,
        "offloading": work.accumulate * offloading,
        "gathers and reductions": communication,
        "optimizer": optimizer + STEP_OVERHEAD,
    }


def fits(config, gpu, work, execution, settings, host):
    """-> whether a step with these Settings fits in the GPU and `host` GiB of CPU memory a rank."""
    execution = settings.execution(execution)
    on_host = host_memory(config, work.tokens, work.ranks, execution, settings.offload_optimizer,
                          work.sp)
    if on_host > USABLE_HOST_MEMORY * host:
        return False
    parts = memory(config, work.tokens, work.ranks, execution, settings.zero_stage,
                   work.accumulate, work.sp, settings.offload_optimizer)
    return sum(parts.values()) <= USABLE_MEMORY * gpu.memory


def candidates(config, work, given):
    """Yields Settings that recompute without keep_layers, the simplest first.

    given: {field of Settings: value} for those that are not to be chosen."""
    L = config.num_hidden_layers
    tries = {
        "offload_optimizer": [False, True],
        "recompute": ["none", "all_but_attention", "all"],
        "offload_layers": sorted({round(L * eighth / 8) for eighth in range(9)}),
        "mlp_chunk": [0] + [chunk for chunk in (65536, 32768, 16384) if chunk < work.tokens],
        "zero_stage": [2, 3, 1] if work.accumulate > 1 and work.ranks > 1 else [2, 3],
        "keep_layers": [0],
    }
    tries.update({name: [value] for name, value in given.items()})
    for values in itertools.product(*tries.values()):
        settings = Settings(**dict(zip(tries, values)))
        if settings.recompute != "none" or settings.offload_layers == 0:
            yield settings


def choose(config, gpu, work, execution, given, host):
    """-> the Settings with the shortest step that fit, the simplest of those that are alike; or
    None if none fits.

    given: see candidates. host: GiB of CPU memory for each rank."""
    fitting = []
    for settings in candidates(config, work, given):
        if not fits(config, gpu, work, execution, settings, host):
            continue
        if settings.recompute != "none" and "keep_layers" not in given:
            # The more layers keep everything, the shorter the step.
            for layers in range(1, config.num_hidden_layers - settings.offload_layers):
                longer = settings._replace(keep_layers=layers)
                if not fits(config, gpu, work, execution, longer, host):
                    break
                settings = longer
        seconds = step_seconds(config, gpu, work, settings.execution(execution),
                               settings.zero_stage, settings.offload_optimizer)
        fitting.append((sum(seconds.values()), settings))
    if not fitting:
        return None
    shortest = min(seconds for seconds, _ in fitting)
    alike = [settings for seconds, settings in fitting if seconds <= ALIKE * shortest]
    return alike[0]
