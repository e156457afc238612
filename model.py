"""The model: Llama's shape with the switches of its relatives, on one flat row of packed documents.

Letters, for one rank: T tokens of the row, t = T/P of them here, P ranks of the sequence, H query heads, G key/value
heads, D head size, C width, I inner width, V vocabulary.
float32: the norms' statistics, the rotation, the softmax, the loss, master weights and their reduction (parallel.py);
RoPE's angles are float64, since position x frequency at a million tokens leaves float32 no digit of the turn.
Everything else runs in the dtype of the weights, bfloat16 in training.
"""
import contextlib
import functools
import importlib
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import parallel
from parallel import cut_heads, heads_to_seq, seq_to_heads

@dataclass
class Config:
    """What the weights are. Field names are those of a Hugging Face config.json."""
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
    qk_norm: bool = False               # norm of every head of q and k, before RoPE
    sliding_window: int | None = None   # tokens a query sees, itself included; None: all before it
    architecture: str = "LlamaForCausalLM"
    norm: str = "rms"                   # "rms_plus_one": times 1 + weight; "layer": LayerNorm; "layer_bias": with bias
    activation: str = "silu"            # or "gelu_pytorch_tanh"
    mlp_gate: bool = True               # activation(gate) * up; False: the activation alone
    parallel_residual: bool = False     # attention and MLP read one norm of x, and both are added to x
    rope_interleaved: bool = False      # dimensions 2i and 2i + 1 turn together; False: i and i + D/2
    scale_embedding: bool = False       # embeddings times sqrt(C)
    logit_scale: float = 1.0
    normalize_head: bool = False        # rows of lm_head are brought to length 1

@dataclass
class Execution:
    """How the work is done. Nothing here changes a result by more than rounding."""
    attention: str = "auto"             # or the name of one of KERNELS
    recompute: str = "none"             # "all_but_attention", "all": what backward computes again
    keep_layers: int = 0                # last blocks that recompute nothing all the same
    offload_layers: int = 0             # first blocks whose kept tensors wait in host memory
    mlp_chunk: int = 0                  # tokens; 0: the row's share at once
    loss_chunk: int = 8192              # tokens whose logits exist at a time
    compile: bool = False               # torch.compile the two halves of a block and the loss

# ---------------------------------------------------------------------------------------------- attention kernels
# One signature: q (T, H, D), k and v (T, G, D), cu_seqlens (n+1,) int32 on the device, max_seqlen, window -> (T, H, D).
def _flash(module, left, q, k, v, cu_seqlens, max_seqlen, window):
    """FlashAttention 2, 3 or 4. `left` is the package's word for an unbounded left side of the window."""
    out = module.flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen, causal=True, window_size=(window - 1, 0) if window else (left, left))
    return out[0] if isinstance(out, tuple) else out

def _torch_varlen(module, left, q, k, v, cu_seqlens, max_seqlen, window):
    """torch's own kernel, with a key and value head for every query head, as torch 2.11 wants it."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return module.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                              window_size=(window - 1 if window else left, 0))

def _sdpa(module, left, q, k, v, cu_seqlens, max_seqlen, window):
    """scaled_dot_product_attention, document by document: the CPU's path and the plainest statement of the others."""
    out, edges = [], cu_seqlens.tolist()
    for start, end in zip(edges, edges[1:]):
        qi, ki, vi = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))        # (1, H or G, n, D)
        mask, n = None, end - start
        if window and n > window:
            ago = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
            mask = (ago >= 0) & (ago < window)
        o = module.scaled_dot_product_attention(qi, ki, vi, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        out.append(o[0].transpose(0, 1))                                            # (n, H, D)
    return torch.cat(out)

KERNELS = {  # name: (module, its least GPU generation, adapter, its word for "no bound"), best first
    "flash_attn_4": ("flash_attn.cute", 9, _flash, None),
    "flash_attn_3": ("flash_attn_interface", 9, _flash, -1),
    "flash_attn_2": ("flash_attn", 8, _flash, -1),
    "torch_varlen": ("torch.nn.attention.varlen", 8, _torch_varlen, -1),
    "sdpa": ("torch.nn.functional", 0, _sdpa, -1),
}

@functools.cache
def attention_kernel(choice, device_type, dtype):
    """-> (name, function): the first of KERNELS that this machine has, or `choice` itself. ValueError if it cannot."""
    half = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    generation = torch.cuda.get_device_capability()[0] if half else 0
    for name in [name for name in KERNELS if choice in ("auto", name)]:
        module, least, adapter, left = KERNELS[name]
        try:
            found = importlib.import_module(module) if generation >= least else None
        except ImportError:
            continue
        # version 4 alone leaves an empty `flash_attn` behind, which is not version 2
        if found and (adapter is not _flash or hasattr(found, "flash_attn_varlen_func")):
            return name, functools.partial(adapter, found, left)
    raise ValueError(f"ATTENTION {choice!r} is not to be had for {dtype} on {device_type} here: install it, use a GPU "
                     f"and bfloat16, or choose auto, or another of {', '.join(KERNELS)}")

# --------------------------------------------------------------------------------------------------- RoPE and norm
def rope_frequencies(config):
    """-> (D/2,) float32 inverse frequencies, and the factor of cos and sin. Formulas as in transformers, whose
    float32 frequencies are the ones the checkpoints were trained with."""
    D, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
    kind, factor = scaling.get("rope_type", "default"), scaling["factor"] if scaling else 1.0
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    exponent = torch.arange(0, D, 2).float() / (D * scaling.get("partial_rotary_factor", 1.0))
    frequency = 1.0 / base ** exponent * (exponent < 1)  # the other dimensions never turn
    if kind in ("default", "dynamic"):  # convert.extend_context has made what dynamic changes a larger base
        return frequency, 1.0
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":  # long waves are stretched, short ones kept, smoothly between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wave = 2 * math.pi / frequency
        smooth = ((scaling["original_max_position_embeddings"] / wave - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequency / factor + smooth * frequency, 1.0
    if kind == "yarn":  # the same by the number of turns within the original length, as a ramp over dimensions
        turns = [scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1]
        low, high = (D * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        keep = 1 - ((torch.arange(D // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        amplitude = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return 1.0 / (factor * base ** exponent) * (1 - keep) + frequency * keep, amplitude
    raise ValueError(f"rope_type {kind!r} is unknown: use default, linear, dynamic, yarn or llama3")

def rope_cos_sin(config, position_ids):
    """position_ids (t,) -> cos, sin (t, 1, D/2) float32, for all layers: 512 MiB together at t = 1M and D = 128."""
    frequency, amplitude = rope_frequencies(config)
    angle = position_ids.double()[:, None, None] * frequency.to(position_ids.device).double()
    return (angle.cos() * amplitude).float(), (angle.sin() * amplitude).float()

def rotate(x, cos, sin, interleaved=False):
    """x (t, H, D), its two halves of D being the real and the imaginary parts; interleaved, these alternate."""
    sizes, dim = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    a, b = x.float().unflatten(-1, sizes).unbind(dim)                               # (t, H, D/2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim).flatten(-2).to(x.dtype)

class Norm(nn.Module):
    """Of the last dimension, as config.norm says."""
    def __init__(self, size, config):
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(size)), config.rms_norm_eps, config.norm
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer_bias" else 0.0

    def forward(self, x):
        y = x.float()
        if self.kind in ("layer", "layer_bias"):
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms":
            return self.weight * y.to(x.dtype)
        return (y * (self.weight.float() + (self.kind == "rms_plus_one")) + self.bias).to(x.dtype)

# ---------------------------------------------------------------------------------------------------- transformer
class Attention(nn.Module):
    def __init__(self, config, sp_group, execution):
        super().__init__()
        H, G, D, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.head_dim, self.window, self.sp_group, self.choice = D, config.sliding_window, sp_group, execution.attention
        self.P, self.interleaved = sp_group.size() if sp_group is not None else 1, config.rope_interleaved
        self.heads = [max(heads // self.P, 1) for heads in (H, G, G)]               # of q, k, v on this rank
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, G * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        if config.qk_norm:  # Qwen3's heads share a weight, Cohere's have their own
            self.q_norm, self.k_norm = (Norm(D if config.norm == "rms" else (heads, D), config) for heads in (H, G))

    def project(self, x, cos, sin):
        """x (t, C) -> q (t, H, D), k and v (t, G, D), rotated; for P ranks cut and joined: (P, t, H/P + 2 G/P, D)."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(y, cos, sin, self.interleaved) for y in (q, k))
        return cut_heads((q, k, v), self.P) if self.P > 1 else (q, k, v)

    def exchange(self, qkv):
        """What project returned -> q (T, H/P, D), k and v (T, G/P, D): the whole row, in one message."""
        if self.P == 1:
            return qkv
        q, k, v = (row := seq_to_heads(qkv, self.sp_group)).split(self.heads, dim=1)
        # views of one row serve every kernel as they are, until offsets in it pass what kernels hold in 32 bits
        return (q, k, v) if row.numel() < 2**31 else (q.contiguous(), k.contiguous(), v.contiguous())

    def forward(self, qkv, cu_seqlens, max_seqlen, keep):
        """qkv of this rank's tokens -> (t, H*D); attends for H/P heads over the whole row. keep: a parallel.Keep."""
        q, k, v = self.exchange(qkv)                                                # (T, H/P, D), (T, G/P, D)
        _, kernel = attention_kernel(self.choice, q.device.type, q.dtype)
        with keep.inputs_of_attention(q, k, v):
            out = kernel(q, k, v, cu_seqlens, max_seqlen, self.window)              # (T, H/P, D)
        return keep.output_of_attention(out, heads_to_seq(out, self.sp_group)).flatten(1)  # (t, H*D)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, I, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj, self.up_proj = nn.Linear(C, I, bias), nn.Linear(C, I, bias) if config.mlp_gate else None
        self.down_proj = nn.Linear(I, C, bias)
        self.activation = F.silu if config.activation == "silu" else functools.partial(F.gelu, approximate="tanh")

    def forward(self, x):
        y = self.activation(self.gate_proj(x))
        return self.down_proj(y if self.up_proj is None else y * self.up_proj(x))

class Block(nn.Module):
    """x -> x + Attention(norm(x)) -> x + MLP(norm(x)), cut where tokens meet: before and after attention every token
    goes its own way, so these halves are what is compiled, recomputed and taken in slices."""

    def __init__(self, config, sp_group, execution, recompute):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config)
        self.self_attn = Attention(config, sp_group, execution)
        self.post_attention_layernorm = None if config.parallel_residual else Norm(config.hidden_size, config)
        self.mlp = MLP(config)
        self.recompute, self.compile, self.chunk = recompute, execution.compile, execution.mlp_chunk

    def before(self, x, cos, sin):
        """x (t, C) -> q, k, v as Attention.forward takes them."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x, a):
        """x (t, C), attention's output a (t, H*D) -> (t, C)."""
        y = x + self.self_attn.o_proj(a)
        if self.post_attention_layernorm is None:
            return y + self.mlp(self.input_layernorm(x))
        return y + self.mlp(self.post_attention_layernorm(y))

    def forward(self, x, cos, sin, cu_seqlens, max_seqlen, offload=None):
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.run(x, cos, sin, cu_seqlens, max_seqlen, parallel.Keep())
        if self.recompute == "all":
            with parallel.Keep(offload).hooks(x):
                return checkpoint(self.run, x, cos, sin, cu_seqlens, max_seqlen, parallel.Keep(), **_CHECKPOINT)
        again = lambda x: self.self_attn.exchange(half(self.compile, False, self.before, x, cos, sin))
        keep = parallel.Keep(offload, again, self.self_attn.sp_group)
        with keep.hooks(x):
            return self.run(x, cos, sin, cu_seqlens, max_seqlen, keep)

    def run(self, x, cos, sin, cu_seqlens, max_seqlen, keep):
        recompute = self.recompute == "all_but_attention"
        qkv = half(self.compile, recompute, self.before, x, cos, sin)
        a = self.self_attn(qkv, cu_seqlens, max_seqlen, keep)                       # (t, H*D)
        chunk = self.chunk or len(x)
        slices = zip(x.split(chunk), a.split(chunk))  # at t = 1M and I = 14336 one (t, I) alone is 28 GiB
        y = [half(self.compile, recompute or chunk < len(x), self.after, xi, ai) for xi, ai in slices]
        return y[0] if len(y) == 1 else torch.cat(y)

_CHECKPOINT = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}

def _half(recompute, function, *args):
    return checkpoint(function, *args, **_CHECKPOINT) if recompute else function(*args)

_compiled_half = torch.compile(_half)           # one cache for all blocks: their weights are its inputs
torch._dynamo.config.recompile_limit = 64       # halves x recomputed or not x with gradient or not x shapes

def half(compile, recompute, function, *args):
    """function(*args), keeping for backward only the arguments if `recompute`. Compiled, backward recomputes just what
    it reads: the last product of a half is never computed again."""
    return (_compiled_half if compile else _half)(recompute, function, *args)

class Transformer(nn.Module):
    """Parameters carry the names of a Llama checkpoint. Tied embeddings: there is no lm_head."""

    def __init__(self, config, sp_group=None, execution=Execution()):
        super().__init__()
        self.config, self.execution, keep = config, execution, execution.keep_layers
        L, C, V = config.num_hidden_layers, config.hidden_size, config.vocab_size
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(V, C),
            "layers": nn.ModuleList(
                Block(config, sp_group, execution, execution.recompute if i < L - keep else "none") for i in range(L)),
            "norm": Norm(C, config)})
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(C, V, bias=False)
        self.offload = parallel.Offload()

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, labels=None, weights=None):
        """input_ids, position_ids, labels, weights (t,): this rank's share; cu_seqlens (n+1,) int32: the whole row's.
        With labels (-100: no target): the sum of weight (None: 1) x cross entropy, float32. Without: logits (t, V)."""
        cos, sin = rope_cos_sin(self.config, position_ids)
        x = self.model["embed_tokens"](input_ids)                                   # (t, C)
        if self.config.scale_embedding:  # by a number of x's dtype, as in training
            x = x * torch.tensor(self.config.hidden_size ** 0.5, dtype=x.dtype, device="cpu").item()
        for i, block in enumerate(self.model["layers"]):
            offload = self.offload if i < self.execution.offload_layers else None
            x = block(x, cos, sin, cu_seqlens, max_seqlen, offload)
        x = self.model["norm"](x)
        head = self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight    # (V, C)
        head = F.normalize(head) if self.config.normalize_head else head
        x = x if self.config.logit_scale == 1 else x * self.config.logit_scale
        if labels is None:
            return x @ head.T                                                       # (t, V)
        weights = (labels != -100).float() if weights is None else weights * (labels != -100)
        return ChunkedCrossEntropy.apply(x, head, labels.clamp(min=0), weights, self.execution, torch.is_grad_enabled())

    def local_parameters(self):
        """Yields name, this rank's rows of the parameter (a plain tensor), and the number of the first of them."""
        for name, parameter in self.named_parameters():
            yield name, *parallel.local_rows(parameter)

    @torch.no_grad()
    def init_weights(self, seed):
        """Matrices normal with deviation 1/sqrt(C), a tenth of it where a block writes its result, norms times one,
        biases zero; the same whatever the number of ranks."""
        for name, rows, first in self.local_parameters():
            if rows.ndim == 2 and "norm" not in name:
                shape, std = self.get_parameter(name).shape, self.config.hidden_size ** -0.5
                std *= 0.1 if "o_proj" in name or "down_proj" in name else 1.0
                generator = torch.Generator(rows.device).manual_seed(seed + zlib.crc32(name.encode()))
                full = torch.empty(shape, device=rows.device).normal_(0, std, generator=generator)
                rows.copy_(full[first:first + len(rows)])
            else:
                rows.fill_(0.0 if name.endswith("bias") or self.config.norm == "rms_plus_one" else 1.0)

def _softmax_and_gradient(logits, labels, weights):
    """logits (c, V) -> sum of weight x cross entropy in float32, and its gradient (c, V) in the logits' dtype."""
    z = logits.float()
    lse = z.logsumexp(dim=-1, keepdim=True)
    target = labels[:, None] == torch.arange(z.shape[1], device=z.device)
    loss = (weights * (lse[:, 0] - (z * target).sum(-1))).sum()
    return loss, (weights[:, None] * ((z - lse).exp() - target.float())).to(logits.dtype)

_compiled_softmax_and_gradient = torch.compile(_softmax_and_gradient)

class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens, so that (t, V) logits, 256 GiB at t = 1M and V = 128k,
    never exist and no product is computed twice. The head's gradient is summed over chunks in float32."""

    @staticmethod
    def forward(ctx, x, head, labels, weights, execution, needs_gradient):
        loss, dx, dhead = torch.zeros((), device=x.device), None, None
        softmax = _compiled_softmax_and_gradient if execution.compile else _softmax_and_gradient
        if needs_gradient:
            dx, dhead = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(x), execution.loss_chunk):
            part = slice(start, start + execution.loss_chunk)
            chunk_loss, dlogits = softmax(x[part] @ head.T, labels[part], weights[part])
            loss += chunk_loss
            if needs_gradient:
                dx[part] = dlogits @ head                                           # (c, C)
                dhead += dlogits.T @ x[part]                                        # (V, C)
        ctx.save_for_backward(dx, dhead)
        return loss

    @staticmethod
    def backward(ctx, scale):
        dx, dhead = ctx.saved_tensors
        return dx.mul_(scale), dhead.mul_(scale), None, None, None, None

# ----------------------------------------------------------------------------------------------------- arithmetic
def attention_pairs(cu_seqlens, window=None):
    """cu_seqlens (n+1,) on the host -> pairs of a query and a key it sees: n^2/2 a document, less the far ones."""
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])]
    return sum(n ** 2 - max(n - (window or n), 0) ** 2 for n in lengths) / 2

def flops(config, tokens, pairs, recompute="none", keep_layers=0):
    """-> model FLOPs and hardware FLOPs of forward and backward over `tokens` tokens with `pairs` attention pairs.
    Model: 3 x forward, where a weight of a matrix product counts 2 a token and a pair 4 x heads x head_dim. Hardware
    adds what backward computes again; the last product of a recomputed block never is."""
    C, L, D = config.hidden_size, config.num_hidden_layers, config.head_dim
    H, G, I = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    block = C * D * (2 * H + 2 * G) + (2 + config.mlp_gate) * C * I
    attention = 4 * H * D * pairs
    forward = 2 * tokens * (L * block + C * config.vocab_size) + L * attention
    again = 0 if recompute == "none" else 2 * tokens * (block - C * I) + (attention if recompute == "all" else 0)
    return 3 * forward, 3 * forward + (L - keep_layers) * again

def memory(config, tokens, ranks, execution, zero_stage=2, accumulate=1):
    """-> {part: GiB} of a GPU at a step's peak: `tokens` of the row here, states over `ranks`, `accumulate` batches a
    step. Within 12 % of what was measured with FlashAttention 4 (bench/results.jsonl), but less where all layers
    are offloaded: 70 GiB for the 92 of a 3B model's 512 thousand tokens on one GPU."""
    C, L, D, I = config.hidden_size, config.num_hidden_layers, config.head_dim, config.intermediate_size
    heads, qkv = config.num_attention_heads * D, (config.num_attention_heads + 2 * config.num_key_value_heads) * D
    block, ends = C * (heads + qkv) + 3 * C * I, C * config.vocab_size * (2 - config.tie_word_embeddings)
    N = L * block + ends
    whole = L if execution.recompute == "none" else min(execution.keep_layers, L)     # layers that keep everything
    waiting = min(execution.offload_layers, L - whole)                                # in host memory
    width = C if execution.recompute == "all" else C + heads
    chunk = min(execution.mlp_chunk or tokens, tokens)
    parts = {
        "optimizer states": 12 * N / ranks, "gathered weights": 2 * (N if zero_stage < 3 else ends + 2 * block),
        "gradients of earlier micro-batches": 4 * N / (ranks if zero_stage > 1 else 1) * (accumulate > 1),
        "kept for backward": 2 * tokens * (whole * (4 * C + qkv + heads + 3 * I) + (L - whole - waiting) * width),
        "a layer at work, or the loss": max(2 * tokens * (6 * C + 2 * qkv) + 10 * chunk * I,
                                            4 * config.vocab_size * (min(execution.loss_chunk, tokens) + C))}
    return {part: size / 2**30 for part, size in parts.items()}

@contextlib.contextmanager
def explaining(needs):
    """Out of memory on a GPU: the arithmetic, and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RuntimeError(f"{e}\nExpected was {needs}. In this order set RECOMPUTE=all_but_attention, KEEP_LAYERS=0, "
                           "ZERO_STAGE=3, MLP_CHUNK=32768, OFFLOAD_ACTIVATIONS=True, RECOMPUTE=all, OFFLOAD_OPTIMIZER="
                           "True, a lower MAX_LENGTH or more ranks a row. The last checkpoint is whole") from e
