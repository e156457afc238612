"""What a step costs: its FLOPs, memory and time, and the settings that make it fast where it fits.

Everything here is arithmetic on a Config of model.py; no tensor is made. train.py prints it before
the weights are loaded, and tools/plan.py prints it for GPUs one does not have. C, I, V, L and t are
those of model.py.
"""
import itertools
from dataclasses import replace
from typing import NamedTuple


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
    "H100": GPU(79.1, 989e12, 615e12, 600e12, 560e12, 2.4e12, 278e9, 55e9),
    "H800": GPU(79.1, 989e12, 615e12, 600e12, 560e12, 2.4e12, 140e9, 55e9),
    "H200": GPU(139.8, 989e12, 630e12, 630e12, 590e12, 3.4e12, 278e9, 55e9),
    "B200": GPU(178.0, 2250e12, 1350e12, 1300e12, 1110e12, 5.6e12, 550e9, 55e9),
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


def mlp_widths(config):
    """-> values a token that the MLP keeps for backward, gate and up; and with their product."""
    I = config.intermediate_size
    return (2 * I, 3 * I) if config.mlp_gate else (I, 2 * I)


def kept_by_block(config, recompute, chunked, sp):
    """-> bytes a token that a block keeps for backward, except the log-sum-exp. They are bfloat16.

    chunked: the MLP runs in chunks, so that it keeps its inputs only."""
    C = config.hidden_size
    q, qkv = attention_widths(config, sp)
    if recompute == "all":
        return 2 * C                        # x
    if recompute == "all_but_attention":
        return 2 * (C + q)                  # x and attention's output
    kept = C + qkv + q                      # x, q, k, v, attention's output
    if sp > 1:
        kept += q                           # the output after its exchange, besides the one before
    if not chunked:
        mlp_kept, _ = mlp_widths(config)
        kept += C + mlp_kept                # x + attention, gate and up
    return 2 * kept


def transient_of_block(config, recompute, tokens, chunk, sp):
    """-> bytes at the peak of one block's backward, besides what it has kept since forward."""
    C = config.hidden_size
    q, qkv = attention_widths(config, sp)
    kv = (qkv - q) // 2
    chunked = chunk < tokens

    # In the MLP: the gradient of the block's output, those of what the MLP has computed, and what
    # is recomputed. With chunks also the gradients of x and a, which the chunks fill.
    mlp_kept, mlp_computed = mlp_widths(config)
    mlp = tokens * C + chunk * mlp_computed
    if recompute != "none" or chunked:
        mlp += chunk * (C + C + mlp_computed)
    else:
        mlp += chunk * (C + mlp_computed - mlp_kept)    # a norm and the product
    if chunked:
        mlp += tokens * (C + q)
    if recompute == "all":
        mlp += tokens * (qkv + q)           # q, k, v, attention's output

    # In the kernel: gradients of x and of the output, then of q, k, v, which it sums in float32.
    attention = C + q + qkv + 2 * q
    if kv < q:
        attention += 2 * (kv + kv)
    if recompute != "none":
        attention += qkv
    if recompute != "none" and sp > 1 or recompute == "all":
        attention += q                      # the output, which is not the kept tensor
    if sp > 1:
        attention += q                      # the output's gradient before its exchange
        if recompute == "all":
            attention += q                  # the output after its exchange
        if tokens * qkv >= 2**31:
            attention += qkv                # contiguous copies, see Attention.kernel_inputs
    return 2 * max(mlp, tokens * attention)


def loss_memory(config, tokens, loss_chunk):
    """-> bytes at the peak of the last norm and the loss, in forward."""
    C = config.hidden_size
    V = config.vocab_size
    chunk = min(loss_chunk, tokens)
    # The input of the last norm, its output, and the gradient of that.
    norm = tokens * (2 * C + 2 * C + 2 * C)
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
        _, mlp_computed = mlp_widths(config)
        post_attention = config.hidden_size * (q + mlp_computed)
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
