"""What a step costs: its FLOPs, memory and time, and the settings that make it fast where it fits.

Everything here is arithmetic on a Config of model.py; no tensor is made. train.py prints it before
the weights are loaded, and tools/plan.py prints it for GPUs one does not have. L is the number of
layers. C, I, V and t are those of model.py.
"""
import itertools
from dataclasses import replace
from typing import NamedTuple

from one_rank import runs_without_fsdp
from recompute import divide_heads


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
USABLE_MEMORY = 0.95        # of a GPU, for tensors: the rest is for CUDA and what memory() misses
NCCL_MEMORY = 2.5           # GiB of a GPU. With CUDA's own, two GPUs take 1.6 to 2.1, and four 3.1
USABLE_HOST_MEMORY = 0.85   # of a host: the rest is for the system and the page cache
HALF_RATE_LENGTH = 1200     # tokens of a document with which attention reaches half of its rate
GPUS_PER_HOST = 8
NETWORK = 40e9              # bytes/s of a GPU to another host (400 Gbit/s, less its overhead)
HOST_BANDWIDTH = 20e9       # bytes/s of CPU memory for each rank, when AdamW runs on the CPU
ALIKE = 1.01                # steps that differ by less are as good: the simplest settings win
WAITS_FOR_SAVES = 1.02      # how much longer a run takes if CPU memory has no space for the copy of
                            # a checkpoint: 30 s every half an hour
ADAMW_STATES = 3 * 4        # bytes a parameter: float32 weight and two moments
ADAMW_TRAFFIC = 32          # bytes a parameter that AdamW and the gradient norm read (20) and write
                            # (12); with one_rank.py 16 to 20 and 14
STEP_OVERHEAD = 0.01        # seconds of a step in which the GPU waits for the CPU
PROCESS = 2 * 2**30         # bytes of CPU memory of a process that offloads nothing
KEEP_INPUTS = ("all", "pairs")  # values of RECOMPUTE with which the attention kernels run again


def gpu_of(device_name):
    """Return the GPU of GPUS whose name is a part of the device's name.

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
    replicas: int = 1       # groups of so many ranks, which sum their gradients
    accumulate: int = 1     # micro-batches of a step
    document: float | None = None   # tokens of the mean document, weighted by its tokens; None: as
                                    # `pairs` say, which is shorter where attention has windows

    @property
    def world(self):
        return self.ranks * self.replicas


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
    """Return attention_pairs of a layer: the mean over all layers, whose windows may differ."""
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    pairs = {window: attention_pairs(cu_seqlens, window) for window in set(windows)}
    return sum(pairs[window] for window in windows) / len(windows)


def block_parameters(config):
    """Return the parameters of one block's matrix products: attention's four, the MLP's two or
    three."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * heads
    mlp_matrices = 3 if config.mlp_gate else 2
    return attention + mlp_matrices * config.hidden_size * config.intermediate_size


def recomputed_layers(config, recompute, keep_layers):
    """Return the number of blocks that do not keep everything."""
    if recompute == "none":
        return 0
    return max(config.num_hidden_layers - keep_layers, 0)


def recomputed_parameters(config, recompute, keep_layers, chunked):
    """Return the number of parameters of the products that backward computes again, in all blocks.

    Of a block these are all but its last product. With "pairs" the first block of a pair is
    computed once more. chunked: the block runs in chunks, which compute the products after attention
    once more than the block, and q_proj and k_proj if their outputs are normalized. Left out are these
    two where no chunks are, and the last product, which runs again with "all" and no chunks."""
    n_recomputed = recomputed_layers(config, recompute, keep_layers)
    block = block_parameters(config)
    down_proj = config.hidden_size * config.intermediate_size
    parameters = n_recomputed * (block - down_proj)
    if recompute == "pairs":
        parameters += n_recomputed // 2 * block
    if chunked:
        _, mlp_computed = mlp_widths(config)
        o_proj = config.hidden_size * config.num_attention_heads * config.head_dim
        in_chunks = o_proj + config.hidden_size * mlp_computed
        if config.qk_norm:      # whose backward needs q and k before it
            heads = config.num_attention_heads + config.num_key_value_heads
            in_chunks += config.hidden_size * config.head_dim * heads
        parameters += (config.num_hidden_layers - n_recomputed) * (in_chunks - down_proj)
        if recompute in KEEP_INPUTS:
            parameters += n_recomputed * in_chunks
    return parameters


def flops(config, tokens, pairs, recompute="none", keep_layers=0, chunked=False):
    """Return model FLOPs and hardware FLOPs of forward and backward over `tokens` tokens.

    Model FLOPs are 3 x forward. In forward a parameter of a matrix product takes 2 per token, and
    each of the `pairs` of attention, those of a layer on average, 4 x H x D. Hardware FLOPs add what
    backward recomputes: see recomputed_parameters, and the attention kernel with "all" and "pairs".
    """
    L = config.num_hidden_layers
    lm_head = config.hidden_size * config.vocab_size
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    forward = 2 * tokens * (L * block_parameters(config) + lm_head) + L * attention

    n_recomputed = recomputed_layers(config, recompute, keep_layers)
    recomputed = 2 * tokens * recomputed_parameters(config, recompute, keep_layers, chunked)
    if recompute in KEEP_INPUTS:
        recomputed += n_recomputed * attention
    if recompute == "pairs":
        recomputed += n_recomputed // 2 * attention
    return 3 * forward, 3 * forward + recomputed


def count_parameters(config):
    """Return the parameters of one block, and of the embeddings and the head together.

    Norms and biases are too few to matter."""
    embedding = config.vocab_size * config.hidden_size
    return block_parameters(config), embedding if config.tie_word_embeddings else 2 * embedding


def total_parameters(config):
    """Return the number of parameters of the model, but norms and biases."""
    block, embeddings = count_parameters(config)
    return config.num_hidden_layers * block + embeddings


def attention_widths(config, sp):
    """Return how many values per token q has, and q, k and v together, in one rank's attention.

    With fewer key/value heads than ranks, these are replicated."""
    q = config.num_attention_heads * config.head_dim
    kv = max(config.num_key_value_heads, sp) * config.head_dim
    return q, q + 2 * kv


def mlp_widths(config):
    """Return how many values per token the MLP keeps for backward, gate and up; and with their
    product."""
    I = config.intermediate_size
    return (2 * I, 3 * I) if config.mlp_gate else (I, 2 * I)


def kept_by_block(config, recompute, chunked, work):
    """Return the bytes a token, in bfloat16, that a block or a pair keeps for backward, except the
    log-sum-exp.

    chunked: the block runs in chunks, which keep their inputs only."""
    C = config.hidden_size
    q, qkv = attention_widths(config, work.sp)
    if recompute in KEEP_INPUTS:
        return 2 * C                        # x, of a block or a pair
    if recompute == "all_but_attention":
        return 2 * (C + q)                  # x and attention's output
    kept = C + qkv + q                      # x, q, k, v, attention's output
    if crossing(work) > 0:
        kept += q                           # all outputs after their exchange, besides those before
    if not chunked:
        mlp_kept, _ = mlp_widths(config)
        kept += C + mlp_kept                # x + attention, gate and up
    return 2 * kept


def attention_transient(config, recompute, work):
    """Return the values a token at the peak of the backward of attention's kernel.

    The gradients of x and of the output exist; q, k, v and the output too where they are recomputed.
    The kernel adds gradients of q, k and v, and their sums in float32, which count twice. Where it
    runs in parts, these and contiguous copies of its arguments exist for one part. But the gradients
    of k and v are whole, and that of q is written over q."""
    C = config.hidden_size
    q, qkv = attention_widths(config, work.sp)
    kv = (qkv - q) // 2

    def of_kernel(q, kv):
        # Several query heads add to the gradients of one key/value head.
        sums_of_kv = 2 * (kv + kv) if kv < q else 0
        return q + 2 * kv + 2 * q + sums_of_kv

    if recompute == "none":
        return C + q + of_kernel(q, kv)
    if recompute == "all_but_attention":
        return C + q + qkv + of_kernel(q, kv)

    def in_parts(P):
        """With the heads spread over P ranks, and P times the tokens."""
        heads = config.num_attention_heads // P
        kv_heads = max(config.num_key_value_heads // P, 1)
        parts = divide_heads(P * work.tokens, heads, kv_heads)
        if len(parts) == 1:
            return of_kernel(q, kv)
        part_heads, part_kv_heads = parts[0]
        part_q = P * config.head_dim * (part_heads.stop - part_heads.start)
        part_kv = P * config.head_dim * (part_kv_heads.stop - part_kv_heads.start)
        copies = part_q + 2 * part_kv + 2 * part_q      # of q, k, v, the output and its gradient
        return 2 * kv + copies + of_kernel(part_q, part_kv)

    exchanged = crossing(work)
    added = (1 - exchanged) * in_parts(1) + exchanged * in_parts(work.sp)
    return C + q + qkv + q + added


def transient_of_block(config, recompute, chunk, work):
    """Return the bytes at the peak of one block's backward, besides what it has kept since
    forward."""
    C = config.hidden_size
    tokens = work.tokens
    q, qkv = attention_widths(config, work.sp)
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
    if recompute in KEEP_INPUTS:
        mlp += tokens * (qkv + q)           # q, k, v, attention's output

    attention = attention_transient(config, recompute, work)

    # Tensors before and after their exchange: the output, if it is not kept, and its gradient; and
    # contiguous copies, see Attention.exchange.
    exchanged = q
    if recompute != "none":
        exchanged += q
    if crossing(work) * tokens * qkv >= 2**31:
        exchanged += qkv
    attention += crossing(work) * exchanged

    # In the backward of the projections: gradients of the block's x, of q, k, v, and of q and k
    # before their rotation; the norm of x, its gradients by q, k and v, and the gradient of x. With
    # chunks these exist for all tokens: the gradients of the block's x, of q, k, v, and of the input
    # x, in chunks and joined.
    projections = C + qkv + (qkv + q) // 2 + C + 3 * C + C
    if chunked:
        projections = C + qkv + C + C
    second_input = tokens * C if recompute == "pairs" else 0
    return 2 * (max(mlp, tokens * attention, tokens * projections) + second_input)


def loss_memory(config, tokens, loss_chunk):
    """Return the bytes at the peak of the last norm and the loss, in forward."""
    C = config.hidden_size
    V = config.vocab_size
    chunk = min(loss_chunk, tokens)
    # The input of the last norm, its output, and the gradient of that.
    norm = tokens * (2 * C + 2 * C + 2 * C)
    # Logits and their gradient in bfloat16. Python lets go of those of a chunk only when it assigns
    # those of the next one, so there are three. Or two and the product for the head's gradient.
    logits = 2 * V * chunk
    product = 2 * V * C
    if chunk < tokens:
        head_gradient = 4 * V * C  # float32, the sum over chunks
        return norm + head_gradient + max(3 * logits, 2 * logits + product)
    return norm + 2 * logits + product


def kept_by_groups(config, work, execution):
    """Return for each Group of the execution: bytes that it keeps and that can be offloaded, and
    bytes of log-sum-exps, float32, that stay on the GPU."""
    chunked = 0 < execution.mlp_chunk < work.tokens
    log_sum_exp = 4 * config.num_attention_heads * work.tokens

    def kept(recompute):
        size = work.tokens * kept_by_block(config, recompute, chunked, work)
        if recompute == "none":
            return size + log_sum_exp, 0
        if recompute == "all_but_attention":
            return size, log_sum_exp
        return size, 0      # the kernels run again

    of_kind = {"none": kept("none"), execution.recompute: kept(execution.recompute)}
    return [of_kind[group.recompute] for group in execution.groups(config.num_hidden_layers)]


def kept_on_gpu(config, work, execution):
    """Return the bytes that blocks keep on the GPU at the end of forward, and a list of those when
    backward comes to each block."""
    groups = execution.groups(config.num_hidden_layers)
    sizes, stay = zip(*kept_by_groups(config, work, execution))
    n_offloaded = sum(group.offloads for group in groups)
    in_backward = []
    for i, group in enumerate(groups):
        offloaded = sum(sizes[group.n_released:min(i + 1, n_offloaded)])
        kept = offloaded + sum(sizes[n_offloaded:i + 1]) + sum(stay[:i + 1])
        in_backward += [kept] * len(group.blocks)
    return sum(sizes[n_offloaded:]) + sum(stay), in_backward


def gathered_together(execution):
    """Return the number of blocks that ZeRO 3 gathers at a time."""
    return 2 if execution.recompute == "pairs" else 1


def without_fsdp(work, execution):
    """Return whether one_rank.py does the work of FSDP2."""
    return runs_without_fsdp(work.world, execution.zero_stage, execution.offload_optimizer)


def gathered_weights(blocks, config, ranks):
    """Return the bytes of the bfloat16 weights of the embeddings and of `blocks` blocks, and of the
    buffer of the last all-gather."""
    block, embeddings = count_parameters(config)
    buffer = 2 * block if ranks > 1 else 0
    return 2 * (embeddings + blocks * block) + buffer


def gradient_bytes(work, execution):
    """Return the bytes a parameter of a reduced gradient: 4, float32; 2, bfloat16, with one_rank.py
    and one micro-batch, whose gradients are not added; 0 if they go to CPU memory."""
    if execution.offload_optimizer:
        return 0
    uncast = without_fsdp(work, execution)
    return 2 if uncast and work.accumulate == 1 else 4


def gradients_of_earlier(config, work, execution):
    """Return the bytes of the gradients of earlier micro-batches, which ZeRO 1 does not reduce."""
    if work.accumulate == 1:
        return 0
    if execution.zero_stage == 1:
        return 4 * total_parameters(config)
    size = gradient_bytes(work, execution)
    return size * total_parameters(config) / work.ranks


class Moment(NamedTuple):
    """Bytes on a GPU at a moment that can be the peak of a step, besides the optimizer states."""
    weights: float = 0
    gradients: float = 0
    kept: float = 0
    transient: float = 0
    loss: float = 0


def accumulated_gradients(earlier, reduced, work, execution):
    """Return the bytes of the gradients of all micro-batches so far. earlier: of earlier ones,
    which ZeRO 1 has not reduced; reduced: of the shards that this one has reduced."""
    if execution.zero_stage == 1:
        return max(earlier - work.ranks * reduced, 0) + reduced
    return max(earlier, reduced)


def end_of_forward(kept, config, work, execution):
    """Return the Moment of the loss. kept: bytes that blocks keep on the GPU."""
    L = config.num_hidden_layers
    gathered = L if execution.zero_stage < 3 else gathered_together(execution)
    return Moment(
        weights=gathered_weights(gathered, config, work.ranks),
        gradients=gradients_of_earlier(config, work, execution),
        kept=kept,
        loss=loss_memory(config, work.tokens, execution.loss_chunk))


def backward_of_block(i, kept, transient, config, work, execution):
    """Return the Moment of block i. kept, transient: bytes that blocks keep, and its own at
    most."""
    L = config.num_hidden_layers
    block, _ = count_parameters(config)

    # ZeRO 3 has gathered this block, or pair, and the next one. FSDP2 with ZeRO 1 and 2 frees a
    # block after its backward, unless other micro-batches need its weights.
    gathered = L
    if execution.zero_stage == 3:
        gathered = min(i + 1, 2 * gathered_together(execution))
    elif work.accumulate == 1 and not without_fsdp(work, execution):
        gathered = i + 1

    # Those of the head and of this block are bfloat16 and not yet reduced.
    head = 2 * config.vocab_size * config.hidden_size
    earlier = gradients_of_earlier(config, work, execution)
    size = gradient_bytes(work, execution)
    reduced = size * (L - 1 - i) * block / work.ranks
    gradients = accumulated_gradients(earlier, reduced, work, execution)
    return Moment(
        weights=gathered_weights(gathered, config, work.ranks),
        gradients=gradients + head + 2 * block,
        kept=kept,
        transient=transient)


def end_of_backward(config, work, execution):
    """Return the Moment in which the embeddings' gradient is reduced, or added to that of the
    head."""
    L = config.num_hidden_layers
    _, embeddings = count_parameters(config)
    earlier = gradients_of_earlier(config, work, execution)
    size = gradient_bytes(work, execution)
    reduced = size * total_parameters(config) / work.ranks
    gradients = accumulated_gradients(earlier, reduced, work, execution)
    weights = 0
    added = 4
    if without_fsdp(work, execution):
        weights = gathered_weights(L, config, work.ranks)
        added = size
    return Moment(weights=weights, gradients=gradients + added * embeddings)


def moments_of_step(config, work, execution):
    """Return the Moments in which a step's memory can be at its peak."""
    at_loss, in_backward = kept_on_gpu(config, work, execution)
    moments = [end_of_forward(at_loss, config, work, execution)]
    chunk = min(execution.mlp_chunk or work.tokens, work.tokens)
    transient = {recompute: transient_of_block(config, recompute, chunk, work)
                 for recompute in ("none", execution.recompute)}
    for group in execution.groups(config.num_hidden_layers):
        i = group.blocks[-1]
        moments.append(backward_of_block(
            i, in_backward[i], transient[group.recompute], config, work, execution))
    moments.append(end_of_backward(config, work, execution))
    return moments


def memory(config, work, execution):
    """Return {part: GiB} of one GPU at the peak of a step, compiled and with FlashAttention 4.

    A row of one document takes the most. Within 5% of what was measured (bench/results.jsonl)."""
    peak = max(moments_of_step(config, work, execution), key=sum)
    states = ADAMW_STATES * total_parameters(config) / work.ranks
    parts = {
        "optimizer states": 0 if execution.offload_optimizer else states,
        "gathered weights": peak.weights,
        "gradients": peak.gradients,
        "kept for backward": peak.kept,
        "transient activations": peak.transient,
        "loss": peak.loss,
    }
    return {part: size / 2**30 for part, size in parts.items()}


def offloaded_bytes(config, work, execution):
    """Return the bytes that blocks keep in CPU memory for backward."""
    groups = execution.groups(config.num_hidden_layers)
    kept = kept_by_groups(config, work, execution)
    return sum(size for group, (size, _) in zip(groups, kept) if group.offloads)


def host_memory(config, work, execution):
    """Return the GiB of CPU memory of one rank's process."""
    size = PROCESS + offloaded_bytes(config, work, execution)
    if execution.offload_optimizer:  # and float32 gradients
        size += (ADAMW_STATES + 4) * total_parameters(config) / work.ranks
    return size / 2**30


def product_seconds(config, gpu, work, execution):
    """Return the seconds of the matrix products of a micro-batch, and of those that are computed
    again.

    2 FLOPs a parameter and token in forward, 4 in backward, and 2 where they are recomputed."""
    t = work.tokens
    head = config.hidden_size * config.vocab_size
    forward = config.num_hidden_layers * block_parameters(config) + head
    recomputed = recomputed_parameters(
        config, execution.recompute, execution.keep_layers, 0 < execution.mlp_chunk < t)
    return 6 * t * forward / gpu.products, 2 * t * recomputed / gpu.products


def attention_seconds(config, gpu, work):
    """Return the seconds of forward and backward of a layer's attention kernel.

    Backward does 2.5 times the work of forward: the scores are computed again."""
    length = 2 * work.pairs / (work.tokens * work.sp)   # to which a token attends, twice the mean
    efficiency = length / (length + HALF_RATE_LENGTH)
    work_of_layer = 4 * config.num_attention_heads * config.head_dim * work.pairs / work.sp
    forward = work_of_layer / gpu.attention_forward / efficiency
    return forward, 2.5 * work_of_layer / gpu.attention_backward / efficiency


def mean_document(work):
    """Return the tokens of the mean document of a row, weighted by its tokens."""
    return work.document or 2 * work.pairs / (work.tokens * work.sp)


def crossing(work):
    """Return about which share of the tokens is exchanged: a document at every border of shards."""
    return 0 if work.sp == 1 else min(mean_document(work) / work.tokens, 1)


def link_of(gpu, ranks):
    """Return the bytes/s between so many GPUs: those of a host are linked faster than hosts."""
    return gpu.link if ranks <= GPUS_PER_HOST else NETWORK


def exchange_seconds(config, gpu, work):
    """Return the seconds of the exchange of sequence parallelism in forward of a layer: of q, k, v
    and the output of documents that cross a border."""
    q, qkv = attention_widths(config, work.sp)
    exchanged = 2 * work.tokens * crossing(work) * (qkv + q) * (work.sp - 1) / work.sp
    return exchanged / link_of(gpu, work.sp)


def products_of_block(config, gpu, work):
    """Return the seconds of the matrix products of a block in forward."""
    return 2 * work.tokens * block_parameters(config) / gpu.products


def offloading_seconds(config, gpu, work, execution, forward):
    """Return the seconds in which the blocks of a micro-batch wait for copies to and from CPU
    memory.

    forward: seconds of a block, of which backward takes twice as many. A copy begins when its group
    ends, or when it may come back, and after the copy before it; n_released says which copies a
    group waits for."""
    backward = 2 * forward
    groups = execution.groups(config.num_hidden_layers)
    copies = [size / gpu.host_link if group.offloads else 0
              for group, (size, _) in zip(groups, kept_by_groups(config, work, execution))]
    n_offloaded = sum(group.offloads for group in groups)

    now = 0             # of the blocks
    copied = 0          # when the last copy that was queued is complete
    complete = {}       # index of a group: when its copy is
    for i, group in enumerate(groups):
        if group.n_released > 0:
            now = max(now, complete[group.n_released - 1])
        now += forward * len(group.blocks)
        if group.offloads:
            copied = max(copied, now) + copies[i]
            complete[i] = copied
    now = max(now, copied)
    waits = now - forward * config.num_hidden_layers

    now = copied = 0
    queued = n_offloaded    # the first group whose copy back has been queued
    for i, group in reversed(list(enumerate(groups))):
        while queued > group.n_released:
            queued -= 1
            copied = max(copied, now) + copies[queued]
            complete[queued] = copied
        if group.offloads:
            now = max(now, complete[i])
        now += backward * len(group.blocks)
    return waits + now - backward * config.num_hidden_layers


def sharding_seconds(config, gpu, work, execution, compute):
    """Return the seconds of FSDP in a step: gathers in bfloat16, and the reduction in float32.

    compute: seconds of a micro-batch that hide a part of it."""
    parameters = total_parameters(config)
    if without_fsdp(work, execution):
        if work.accumulate == 1:
            return 0
        # The gradients of a second micro-batch make those of the first float32 (reads 2 bytes,
        # writes 4). Like those of later ones, they are added (reads 4 and 2, writes 4).
        return (6 + 10 * (work.accumulate - 1)) * parameters / gpu.bandwidth
    n_gathers = 2 * work.accumulate if execution.zero_stage == 3 else 1
    n_reductions = 1 if execution.zero_stage == 1 else work.accumulate
    moved = (2 * n_gathers + 4 * n_reductions) * parameters
    transfer = moved * (work.ranks - 1) / work.ranks / link_of(gpu, work.ranks)
    # About half of it is hidden; all of it is not where it takes longer than the computing.
    seconds = max(transfer / 2, transfer - work.accumulate * compute)
    # Copies: the cast (reads 4 bytes, writes 2), into the parameters (2, 2), gradients to float32
    # (2, 4) and their reduction (4, 4).
    seconds += (10 * n_gathers + 14 * n_reductions) * parameters / gpu.bandwidth
    if execution.offload_optimizer:
        copied = 4 * (n_gathers + n_reductions) * parameters / work.ranks
        seconds += copied / gpu.host_link
    return seconds


def step_seconds(config, gpu, work, execution):
    """Return {part: seconds} of one optimizer step. Within 10% of what was measured on H200s."""
    L = config.num_hidden_layers
    recomputed = recomputed_layers(config, execution.recompute, execution.keep_layers)

    products, recomputation = product_seconds(config, gpu, work, execution)
    forward, backward = attention_seconds(config, gpu, work)
    attention = L * (forward + backward)
    # In forward, in backward, and where q, k and v are recomputed.
    exchanges = 2 * L + recomputed
    if execution.recompute in KEEP_INPUTS:
        recomputation += recomputed * forward
    if execution.recompute == "pairs":
        recomputation += recomputed // 2 * forward
        exchanges += recomputed // 2
    exchange = exchanges * exchange_seconds(config, gpu, work)
    compute = products + recomputation + attention + exchange
    offloading = offloading_seconds(
        config, gpu, work, execution, products_of_block(config, gpu, work) + forward)
    sharding = sharding_seconds(config, gpu, work, execution, compute)
    bandwidth = HOST_BANDWIDTH if execution.offload_optimizer else gpu.bandwidth
    optimizer = ADAMW_TRAFFIC * total_parameters(config) / work.ranks / bandwidth

    return {
        "matrix products": work.accumulate * products,
        "attention": work.accumulate * attention,
        "recomputation": work.accumulate * recomputation,
        "exchange": work.accumulate * exchange,
        "offloading": work.accumulate * offloading,
        "gathers and reductions": sharding,
        "optimizer": optimizer + STEP_OVERHEAD,
    }


def usable_memory(gpu, work):
    """Return the GiB of a GPU that the tensors of a step may take, by memory()."""
    return USABLE_MEMORY * gpu.memory - (NCCL_MEMORY if work.world > 1 else 0)


def overruns(config, gpu, work, execution, host):
    """Return what a step needs over what it may take, of a GPU and of `host` GiB of CPU memory."""
    on_gpu = sum(memory(config, work, execution).values())
    on_host = host_memory(config, work, execution)
    return on_gpu / usable_memory(gpu, work), on_host / (USABLE_HOST_MEMORY * host)


def candidates(config, work, execution, given):
    """Yield copies of `execution` with other settings, without keep_layers, the simplest first.

    given: {field: value} for those that are not to be chosen."""
    L = config.num_hidden_layers
    tries = {
        "offload_optimizer": [False, True],
        "recompute": ["none", "all_but_attention", "all", "pairs"],
        "offload_layers": sorted({round(L * eighth / 8) for eighth in range(9)}),
        "mlp_chunk": [0] + [chunk for chunk in (65536, 32768, 16384) if chunk < work.tokens],
        "zero_stage": [2, 3, 1] if work.accumulate > 1 and work.ranks > 1 else [2, 3],
        "keep_layers": [0],
    }
    tries.update({name: [value] for name, value in given.items()})
    for values in itertools.product(*tries.values()):
        yield replace(execution, **dict(zip(tries, values)))


def seconds_to_compare(config, gpu, work, execution, host):
    """Return the seconds of a step by which settings are compared.

    Attention is left out, which all of them have in common. Nor does it hide copies to CPU memory
    here, since documents may be shorter than `work` says, so that it takes little time. Added is
    the time of saves that training has to wait for."""
    parts = step_seconds(config, gpu, work, execution)
    attention = parts.pop("attention")
    parts["offloading"] = work.accumulate * offloading_seconds(
        config, gpu, work, execution, products_of_block(config, gpu, work))
    seconds = sum(parts.values())
    checkpoint = ADAMW_STATES * total_parameters(config) / work.ranks / 2**30
    if host_memory(config, work, execution) + checkpoint > USABLE_HOST_MEMORY * host:
        seconds += (WAITS_FOR_SAVES - 1) * (seconds + attention)
    return seconds


def choose(config, gpu, work, execution, given, host):
    """Return a copy of `execution` with the settings that fit and have the shortest step, the
    simplest of those that are alike; or None if none fit.

    given: see candidates. host: GiB of CPU memory for each rank."""
    fitting = []
    for base in candidates(config, work, execution, given):
        variants = [base]
        if base.recompute != "none" and "keep_layers" not in given:
            variants = [replace(base, keep_layers=n) for n in range(config.num_hidden_layers)]
        best = None
        for variant in variants:
            if max(overruns(config, gpu, work, variant, host)) > 1:
                break   # nor does it fit if more layers keep everything
            seconds = seconds_to_compare(config, gpu, work, variant, host)
            if best is None or seconds < best[0]:
                best = seconds, variant
        if best is not None:
            fitting.append(best)
    if not fitting:
        return None
    shortest = min(seconds for seconds, _ in fitting)
    return next(variant for seconds, variant in fitting if seconds <= ALIKE * shortest)
