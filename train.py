"""Train a Llama-style model on very long sequences.

    torchrun --nproc_per_node 8 train.py [NAME=VALUE ...]

Edit the constants below, or set any of them on the command line. Then read main() from top to
bottom: plan, data, process groups, model, resume, training loop, export, samples. An error is one
line; with the environment variable DEBUG=1 its traceback is printed.
"""
import ast
import contextlib
import difflib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

import convert
import data
import parallel
from costs import (
    Work,
    candidates,
    choose,
    flops,
    gpu_of,
    host_memory,
    mean_attention_pairs,
    memory,
    step_seconds,
)
from model import Config, Execution, Transformer, attention_kernel
from metrics import Log, describe_environment, remove_lines, show, warn_once
from one_rank import AdamW

# What to train, on what data, and where the results go
MODEL = "demo"                  # Hugging Face folder; "demo": a small Llama, made on first use
INIT = "weights"                # "weights": start from those of MODEL; "random": new weights
DATA = "demo"                   # files, globs or folders; a list or {path: epochs}; "synthetic"
SYNTHETIC_DOCUMENT = 0          # tokens per document of DATA="synthetic"; 0: MAX_LENGTH
RUN_DIR = "runs/demo"           # checkpoints, metrics and the trained hf/ folder of one run
CACHE_DIR = "runs/cache"        # tokenized data and the demo; can be shared by all runs

# How documents become rows
MAX_LENGTH = 8192               # tokens per packed row, and at most per piece of a document
PACKING = "split"               # "split": concatenate and cut; "whole": uncut documents; "none"
USE_VARLEN_ATTN = True          # attention within documents; False: within the whole packed row
BATCH_SIZE = 1                  # documents per row, used with PACKING="none" only
GROUP_BY_LENGTH = False         # with PACKING="none": steps of documents of similar length
OVERLONG = "split"              # longer documents: "split", "truncate", "truncate_middle", "drop"
APPEND_EOS = True               # plain text ends with the tokenizer's eos, which is a target
TRAIN_ON_PROMPT = False         # chat: train all tokens; False: the assistant's only
MASK_HISTORY = False            # chat: train the last assistant turn only
ACCEPT_LOSS = False             # chat: train although the template leaves out contents of a chat
NO_STOP_TOKEN = "refuse"        # chat: where no stop token ends an answer: "append" eos; "accept"
FORMAT = ""                     # of rows that have the keys of several formats, such as "text"
COLUMNS = {}                    # {key that a format has: the key in the rows of DATA}
BAD_ROWS = "stop"               # "stop" at an unusable row; or the share that may be skipped
MAX_POSITION_EMBEDDINGS = 0     # extend the context to so many tokens; 0: as in the checkpoint
ROPE_SCALING = None             # how: "yarn", "linear", "dynamic", "llama3" or a dict; None: yarn
LOSS_WEIGHT = "token"           # of a document with n targets: n; "sample": 1; "square": sqrt(n)

# How the work is divided: world = REPLICAS x data parallel x SEQUENCE_PARALLEL_SIZE
SEQUENCE_PARALLEL_SIZE = 0      # ranks that share one row; 0: the fewest within 5% of the fastest
GLOBAL_BATCH_SIZE = 8           # rows per optimizer step, independent of the number of ranks
REPLICAS = 1                    # copies of the sharded model (HSDP), such as one on each host

# Memory and speed. RECOMPUTE="auto" also chooses the next five, except those that you set.
RECOMPUTE = "auto"              # "none", "all_but_attention", "all"; the least memory: "pairs"
KEEP_LAYERS = 0                 # layers exempt from RECOMPUTE; raise while memory is free
ZERO_STAGE = 2                  # 2 shards gradients; 3 also frees weights after forward; 1 neither
OFFLOAD_ACTIVATIONS = 0         # first layers that keep activations in CPU memory; -1: all
OFFLOAD_OPTIMIZER = False       # keep parameters and optimizer states in CPU memory
MLP_CHUNK = 0                   # tokens at a time outside attention; 0: all; lower to save memory
LOSS_CHUNK = 8192               # tokens whose logits exist at a time; lower to save memory
COMPILE = True                  # use torch.compile on a GPU
ATTENTION = "auto"              # flash_attn_4, flash_attn_3, flash_attn_2, torch_varlen, sdpa
DTYPE = "auto"                  # of matrix products: "bfloat16" on GPUs, "float32" on CPUs

# Optimization
LEARNING_RATE = 1e-5            # peak, reached after the warm-up; for pretrained models of 1 to 8B
MIN_LEARNING_RATE_RATIO = 0.1   # of the peak, at the end of the schedule
LR_SCHEDULE = "cosine"          # "linear", "constant", "wsd": constant, then linear in the last 20%
WARMUP_RATIO = 0.05             # fraction of all steps, at least one step; 0: no warm-up
BETAS = (0.9, 0.95)             # of AdamW
WEIGHT_DECAY = 0.1              # of matrices; norms and biases have none
MAX_GRAD_NORM = 1.0             # gradients are clipped to this global norm; 0: no clipping
EPOCHS = 1.0                    # passes over DATA, used if MAX_STEPS is -1
MAX_STEPS = -1                  # optimizer steps; -1: follow EPOCHS; 0: load, check and export
SEED = 0                        # of the data order, of INIT="random" and of the samples

# Evaluation, samples and checkpoints
EVAL_DATA = ""                  # like DATA; 0.05: hold out 5% of the documents of DATA; "": none
EVAL_EVERY = 0                  # steps between evaluations; 0: before the first and after the last
WANDB = ""                      # Weights & Biases project for the metrics; "": none
SAMPLE_PROMPTS = []             # texts to continue at the end of a run
SAMPLE_TOKENS = 80              # tokens to sample after each of SAMPLE_PROMPTS
SAVE_EVERY = 0                  # steps between checkpoints; 0: not by step; -1: none, no hf/
SAVE_MINUTES = 30.0             # minutes between checkpoints; 0: not by time
KEEP_CHECKPOINTS = 2            # number of newest checkpoints to keep; -1: all
RESUME = "auto"                 # "auto": newest checkpoint in RUN_DIR; "never"; or a checkpoint

# The names of the constants above, which the command line can set and every run records.
CONSTANTS = [name for name in globals() if name.isupper()]
DEFAULTS = {name: globals()[name] for name in CONSTANTS}
SET_BY_HAND = set()  # names that the command line has set, maybe to their defaults

# What MODEL="demo" uses instead of the defaults above: it learns from nothing, in two minutes.
DEMO = {
    "MAX_LENGTH": 512,
    "GLOBAL_BATCH_SIZE": 4,
    "LEARNING_RATE": 4e-3,
    "MIN_LEARNING_RATE_RATIO": 0.05,
    "MAX_STEPS": 400,
    "SAVE_EVERY": 200,
    # They do not end with a newline, which is one token with the indentation that follows it.
    "SAMPLE_PROMPTS": [
        "def __init__(self, name):", "import os\nimport sys", "class Error(Exception):"],
}


def main():
    """Train MODEL on DATA as the constants say, and export it to RUN_DIR."""
    # Chunks, gathers and copies leave gaps between what is kept on a GPU, which these segments fill.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

    # Plan. Wrong constants are reported before any process waits for another.
    world = parallel.world_size()
    folder, config, sp, _ = plan(world)
    dtype = getattr(torch, DTYPE)  # of the matrix products; master weights are float32
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    check_machine(device_type)
    kernel_name, _ = attention_kernel(ATTENTION, device_type, dtype)

    # Data. It is tokenized before the process groups exist, so that no collective can time out.
    # The last step may have fewer rows than the others. Padding fills it.
    rows, eval_rows = open_all_data(folder, config)
    total_rows = rows.count(EPOCHS) if MAX_STEPS < 0 else MAX_STEPS * GLOBAL_BATCH_SIZE
    steps = ceil_div(total_rows, GLOBAL_BATCH_SIZE)

    # Process groups. What the run will need is printed before it is taken.
    record = run_record(folder, config, rows, eval_rows)
    grid = parallel.init(REPLICAS, sp, {
        **record["constants"],
        "the sequence-parallel size": sp,
        "the attention kernel": kernel_name,
        **facts_of_run(record, rows)})
    execution = execution_settings(device_type)
    print_once(grid, f"{rows.describe()}\n{steps:,} steps")
    print_once(grid, describe_context(folder, config, rows) + describe_plan(
        config, grid, execution, rows, steps))

    # Model and optimizer, new or from a checkpoint. Then train, export and sample. The lock keeps
    # other runs out of RUN_DIR.
    run_lock = FileLock(Path(RUN_DIR) / "lock")
    log = None
    saver = None
    try:
        parallel.run_on_ranks("RUN_DIR", lock_run, run_lock, only=0)
        refuse_separate_folders()
        checkpoint, steps_done = find_checkpoint(record, steps, grid)
        with timed(grid, "loading the model"), explain_out_of_memory(config, grid, execution):
            model = build_model(folder, config, grid, execution, dtype, checkpoint)
            optimizer = build_optimizer(model)
            if checkpoint is not None:
                parallel.load_checkpoint(checkpoint, model, [optimizer])
        if checkpoint is not None:
            print_once(grid, f"resumed from {checkpoint}")
        print_once(grid, describe(model, kernel_name, grid))
        if 0 < steps <= steps_done:
            print_once(grid, f"all {steps:,} steps are done, so that nothing is trained, and the model "
                             f"is that of step {steps_done:,}: raise MAX_STEPS or EPOCHS for more, or "
                             "set RUN_DIR to a new folder for a new run")
        parallel.run_on_ranks("RUN_DIR", open_run, record, steps_done, rows.accounting(), only=0)
        if SAVE_EVERY >= 0:
            saver = parallel.Saver(Path(RUN_DIR) / "checkpoints", record)
        if saver is not None and steps_done < steps:
            saver.check_space(model, KEEP_CHECKPOINTS)
        if grid.rank == 0:
            log = Log(Path(RUN_DIR), steps, steps_done, WANDB, record["constants"])
        with parallel.naming_lost_ranks():
            with (explain_out_of_memory(config, grid, execution),
                  receive_signals() as stop_requests):
                stopped = training_loop(model, optimizer, grid, rows, eval_rows, total_rows,
                                        steps_done, saver, log, stop_requests)
            if not stopped:
                finish(model, folder, grid)
    finally:
        if saver is not None:
            saver.close()
        if log is not None:
            log.close()
        run_lock.release()
    parallel.close()


# ------------------------------------------------------------------------------------ training loop

def training_loop(model, optimizer, grid, rows, eval_rows, total_rows, steps_done, saver, log,
                  stop_requests):
    """Run the steps after `steps_done`. Return True if a signal stopped the run."""
    steps = ceil_div(total_rows, GLOBAL_BATCH_SIZE)
    if eval_rows is not None and evaluation_is_missing(steps_done, steps, log):
        print_once(grid, f"evaluating {eval_rows.per_epoch:,} rows before the first step")
        evaluate(model, eval_rows, grid, steps_done, log, stop_requests)
    not_finite = 0  # consecutive steps
    save_seconds = 0.0  # that training waited for a save before this step
    last_save_time = time.monotonic()
    step_began = time.monotonic()    # what is between steps, such as evaluation, is in no step's time
    if steps_done < steps:
        upcoming = load_step(steps_done + 1, rows, total_rows, grid, model.config)

    for step in range(steps_done + 1, steps + 1):
        batches, sums = upcoming

        loss_sum = forward_backward(model, batches, sums.weight, grid, stop_requests)
        if loss_sum is None:
            is_saved = step - 1 == steps_done
            stop(saver, step - 1, is_saved, model, optimizer, not_finite, grid)
            return True
        norm = parallel.grad_norm(model.parameters())

        # The CPU prepares the next step while the GPU works on this one.
        if step < steps:
            upcoming = load_step(step + 1, rows, total_rows, grid, model.config)

        # Only here does the CPU wait for the GPU. All ranks have the same values, so that all of
        # them skip a step, or none.
        loss = loss_sum.item()
        grad_norm = norm.item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        skip = not finite or sums.targets == 0
        lr = learning_rate(step, steps)
        update(optimizer, lr, grad_norm, skip)

        now = time.monotonic()
        seconds = now - step_began
        step_began = now
        if grid.rank == 0:
            log.step({
                "step": step, "loss": loss,
                "epoch": min(step * GLOBAL_BATCH_SIZE, total_rows) / rows.per_epoch,
                "grad_norm": grad_norm, "learning_rate": lr, "seconds": seconds, "skipped": skip,
                "rows": rows_of_step(step) if skip else None, "save_seconds": save_seconds,
                **speed_and_memory(model.config, sums, seconds, grid)})
            if log.draw_if_due():
                step_began = time.monotonic()
        save_seconds = 0.0
        not_finite = 0 if finite or sums.targets == 0 else not_finite + 1
        stop_if_diverged(step, not_finite, saver)
        if step == steps_done + 2:  # the first step compiles
            parallel.shorten_timeouts(grid, seconds)
            if saver is not None:
                warn_of_long_stops(seconds / len(batches), saver.seconds, grid)

        if eval_rows is not None and eval_due(step, steps):
            evaluate(model, eval_rows, grid, step, log, stop_requests)
            step_began = time.monotonic()
        if saver is not None and (step == steps or save_due(step, last_save_time, saver, grid)):
            save_began = time.monotonic()
            save(saver, step, model, optimizer, not_finite, grid)
            if step > steps_done + 1:
                warn_of_long_stops(seconds / len(batches), saver.seconds, grid)
            last_save_time = time.monotonic()
            step_began = last_save_time
            save_seconds = last_save_time - save_began
    if saver is not None and steps_done < steps:
        with timed(grid, "saving the last checkpoint"):
            saver.wait()
    stopped = parallel.any_rank(bool(stop_requests))
    if stopped:  # in the last step, which is saved: what remains is the export
        stop(saver, steps, True, model, optimizer, not_finite, grid)
    return stopped


def forward_backward(model, batches, step_weight, grid, stop_requests):
    """Compute the gradients of a step. Return its loss, a tensor, or None if a signal asks to stop.

    step_weight: the sum of the weights of all targets of the step, on all ranks.
    """
    loss_sum = torch.zeros((), device=grid.device)
    for i, batch in enumerate(batches):
        # The launcher does not wait long after it has asked to stop: abandon this step.
        if parallel.any_rank(bool(stop_requests)):
            return None

        # The loss of the step is sum(weight x cross entropy) / sum(weight) over its targets on all
        # ranks. So each micro-batch is divided by the weight of the whole step, and losses and
        # gradients are summed over micro-batches and ranks, never averaged.
        weights = batch.weights / max(step_weight, 1e-9)
        parallel.set_gradient_sync(
            model, model.execution.zero_stage, is_last=i == len(batches) - 1)
        batch_loss = model(batch.input_ids, batch.position_ids, batch.cu_seqlens.tolist(),
                           batch.max_seqlen, batch.labels, weights)
        batch_loss.backward()
        loss_sum += batch_loss.detach()
        del batch_loss  # free the graph before the next forward
    return parallel.all_sum(loss_sum)


def update(optimizer, lr, grad_norm, skip):
    """Clip the gradients, update the weights unless `skip`, and free the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    factor = 1.0
    if 0 < MAX_GRAD_NORM < grad_norm:
        factor = MAX_GRAD_NORM / grad_norm
    if not skip:
        optimizer.scaled_step(factor)
    optimizer.zero_grad()


def learning_rate(step, steps):
    """Return the learning rate of optimizer step `step`, counted from 1, of a run of `steps`."""
    # It depends on the step alone, so that a resumed run needs no state of a scheduler.
    warmup = round(WARMUP_RATIO * steps)
    if WARMUP_RATIO > 0:
        warmup = max(warmup, 1)
    if step <= warmup:
        return LEARNING_RATE * step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    # From 0 at the peak to 1 at the end.
    if LR_SCHEDULE == "cosine":
        decay = (1 - math.cos(math.pi * progress)) / 2
    elif LR_SCHEDULE == "linear":
        decay = progress
    elif LR_SCHEDULE == "wsd":
        decay = max(0.0, (progress - 0.8) / 0.2)
    else:
        decay = 0.0
    return LEARNING_RATE * (1 + (MIN_LEARNING_RATE_RATIO - 1) * decay)


class StepSums(NamedTuple):
    """Sums over all ranks and micro-batches of one optimizer step."""
    weight: float           # loss weights of all targets; the loss is divided by it
    targets: float          # tokens that are trained
    tokens: float
    attention_pairs: float  # pairs of a query and a key that it attends to, for the FLOPs
    mismatch: float         # 0 if the ranks have the same step, see `mismatch_term`


def load_step(step, rows, total_rows, grid, config):
    """Return this rank's micro-batches of a step, on its device, and the StepSums of all ranks.

    The sums are reduced on the CPU, so that nothing waits for the GPU. Raise RuntimeError on all
    ranks if they do not have the same number of micro-batches, or those of one row not the same.
    """
    batches = rows.step(
        step, GLOBAL_BATCH_SIZE, dp=grid.dp, dp_rank=grid.dp_rank, sp=grid.sp,
        sp_rank=grid.sp_rank, total=total_rows)
    parts = []
    for batch in batches:
        pairs = mean_attention_pairs(config, batch.cu_seqlens.tolist())
        parts.append(StepSums(
            weight=batch.weights.double().sum().item(),
            targets=(batch.labels != data.IGNORE).sum().item(),
            tokens=len(batch.input_ids),
            attention_pairs=pairs / grid.sp,  # cu_seqlens describe the whole row on every rank
            mismatch=0))
    # The fingerprint is about the step, not about a micro-batch.
    parts.append(StepSums(0, 0, 0, 0, mismatch_term(step, batches, grid)))

    sums = torch.tensor(parts, dtype=torch.float64).sum(0)
    parallel.all_sum(sums)
    sums = StepSums(*sums.tolist())
    if sums.mismatch != 0:
        raise RuntimeError(describe_mismatch(step, batches, grid))
    return [to_device(batch, grid.device) for batch in batches], sums


def mismatch_term(step, batches, grid):
    """Return the term of this rank in StepSums.mismatch, a sum that is 0 if the ranks agree.

    All ranks must have the same number of micro-batches, and those of one row the same tokens. If
    they do not, the sum is 0 with a probability of about 2^-32.
    """
    count = zlib.crc32(f"{step} {len(batches)}".encode())
    row = zlib.crc32(str([batch.checksum for batch in batches]).encode())
    # The first of n ranks adds n - 1 times its hash, and each of the others subtracts its own.
    term = count * (grid.world - 1) if grid.rank == 0 else -count
    term += row * (grid.sp - 1) if grid.sp_rank == 0 else -row
    return term


def describe_mismatch(step, batches, grid):
    """Return what each rank has of a step, where that is not the same."""
    checksums = [batch.checksum for batch in batches]
    mine = f"step {step} with {len(batches)} micro-batches of the rows {checksums}"
    lines = []
    for rank, theirs in enumerate(parallel.run_on_ranks("comparing ranks", str, mine)):
        lines.append(f"rank {rank}, of sequence group {rank // grid.sp}: {theirs}")
    return ("The ranks do not have the same step. All need the same number of micro-batches, and "
            "those of one sequence group the same rows (named by checksums). Remove CACHE_DIR, "
            "which may be damaged on one host, and start again.\n" + "\n".join(lines))


def to_device(batch, device):
    """Copy a batch to a GPU, which overlaps with the kernels before it.

    cu_seqlens stays on the CPU, where the model reads it.
    """
    if device.type != "cuda":
        return batch
    fields = {}
    for name, value in batch._asdict().items():
        if torch.is_tensor(value) and name != "cu_seqlens":
            value = parallel.copy_without_waiting(value, device)
        fields[name] = value
    return data.Batch(**fields)


def rows_of_step(step):
    """Return the numbers of the first and the last row of a step, in the order of training."""
    return [(step - 1) * GLOBAL_BATCH_SIZE, step * GLOBAL_BATCH_SIZE - 1]


# A run ends with an error after this many consecutive steps whose loss or gradient is not finite.
MAX_SKIPPED_STEPS = 5


def stop_if_diverged(step, not_finite, saver):
    """Raise RuntimeError after MAX_SKIPPED_STEPS consecutive steps that were not finite."""
    if not_finite < MAX_SKIPPED_STEPS:
        return
    if saver is not None:
        saver.wait()  # the save may be of a step before them
    checkpoints = parallel.published(Path(RUN_DIR) / "checkpoints")
    before = [c.name for c in checkpoints if int(c.name.removeprefix("step-")) <= step - not_finite]
    raise RuntimeError(
        f"The loss or gradient of {not_finite} consecutive steps, up to step {step}, was not "
        f"finite: lower LEARNING_RATE {LEARNING_RATE}, or inspect the data of these steps. "
        f"Checkpoints of the steps before them: {', '.join(before) or 'none'}. To continue from "
        "one of them, set RESUME to its path and RUN_DIR to a new folder.")


def speed_and_memory(config, sums, seconds, grid):
    """Return the entries of metrics.jsonl that tell how well a step used the hardware."""
    model_flops, hardware_flops = flops(
        config, sums.tokens, sums.attention_pairs, RECOMPUTE, KEEP_LAYERS,
        chunked=0 < MLP_CHUNK < sums.tokens / GLOBAL_BATCH_SIZE / grid.sp)   # of the mean row
    # MFU counts what the model needs, HFU also what backward recomputes.
    mfu = None
    hfu = None
    peak = peak_flops(grid)
    if peak is not None:
        mfu = model_flops / seconds / grid.world / peak
        hfu = hardware_flops / seconds / grid.world / peak

    gpu_memory = None
    reserved_memory = None
    used_memory = None
    memory_full = False
    if grid.device.type == "cuda":
        gpu_memory = torch.cuda.max_memory_allocated() / 2**30
        reserved_memory = torch.cuda.max_memory_reserved() / 2**30
        free, total = torch.cuda.mem_get_info()
        used_memory = (total - free) / 2**30    # with what CUDA and NCCL take, and other processes
        # An allocation failed, and succeeded after torch had given what it did not use back to the
        # GPU. It will take it again. Both take time, up to a second.
        memory_full = torch.cuda.memory_stats()["num_alloc_retries"] > 0
        torch.cuda.reset_accumulated_memory_stats()
    cpu_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    return {
        "tokens": int(sums.tokens),
        "target_tokens": int(sums.targets),
        "tokens_per_second_per_gpu": sums.tokens / seconds / grid.world,
        "mfu": mfu,
        "hfu": hfu,
        "peak_memory_gib": gpu_memory,
        "reserved_memory_gib": reserved_memory,
        "used_memory_gib": used_memory,
        "peak_host_memory_gib": cpu_memory,
        "memory_full": memory_full,
    }


def peak_flops(grid):
    """Return the bfloat16 FLOP/s of this GPU, or None if DTYPE is another or it is not known."""
    if grid.device.type == "cuda" and DTYPE == "bfloat16":
        return gpu_of(torch.cuda.get_device_name()).peak
    return None


# --------------------------------------------------------------------------------------- evaluation

def eval_due(step, steps):
    """Return whether to evaluate after this step. Step 0 is what training is compared with."""
    return step in (0, steps) or (EVAL_EVERY > 0 and step % EVAL_EVERY == 0)


def evaluation_is_missing(steps_done, steps, log):
    """Return whether to evaluate before the first step of this process.

    A signal may have stopped the run in the evaluation of its last step. Rank 0 decides, which has
    read metrics.jsonl.
    """
    missing = log is not None and steps_done not in log.evaluated
    return MAX_STEPS == 0 or (eval_due(steps_done, steps) and parallel.any_rank(missing))


@torch.no_grad()
def evaluate(model, rows, grid, step, log, stop_requests=()):
    """Log the loss over all rows of EVAL_DATA: sum(weight x cross entropy) / sum(weight).

    Also log it by position, the number of tokens that a token can attend to, and by source. A
    request to stop abandons it: it takes longer than a launcher waits. Resuming repeats it.
    """
    began = time.monotonic()
    names = source_names()
    edges = position_edges(rows.max_length)
    n_bands = len(edges) + 1
    boundaries = torch.tensor(edges, dtype=torch.long, device=grid.device)
    # Of each position band, then of each source: sum(weight x cross entropy) and sum(weight).
    sums = torch.zeros(n_bands + len(names), 2, dtype=torch.float64, device=grid.device)
    for i in parallel.progress(range(ceil_div(rows.per_epoch, grid.dp)), "evaluating"):
        if parallel.any_rank(bool(stop_requests)):
            parallel.free_gathered(model)
            return
        # One row for each data-parallel rank; past the last row it is padding of weight 0.
        [batch] = rows.step(
            i + 1, global_batch_size=grid.dp, dp=grid.dp, dp_rank=grid.dp_rank, sp=grid.sp,
            sp_rank=grid.sp_rank, total=rows.per_epoch)
        batch = to_device(batch, grid.device)
        losses, _ = model(batch.input_ids, batch.position_ids, batch.cu_seqlens.tolist(),
                          batch.max_seqlen, batch.labels, per_token=True)
        parts = torch.stack([batch.weights * losses, batch.weights], dim=1).double()    # (t, 2)
        band = torch.bucketize(batch.position_ids, boundaries, right=True)              # (t,)
        sums.index_add_(0, band, parts)
        sums.index_add_(0, n_bands + batch.sources, parts)
    parallel.all_sum(sums)
    parallel.free_gathered(model)
    if grid.rank == 0:
        loss_sum, weight = sums[:n_bands].sum(0).tolist()
        line = {"step": step, "eval_loss": loss_sum / weight, "eval_seconds": time.monotonic() - began}
        line["eval_by_position"] = quotients(band_names(edges), sums[:n_bands])
        line["eval_by_source"] = quotients(names, sums[n_bands:])
        log.write(line)


def source_names():
    """Return the names of the sources of EVAL_DATA, in the order of their documents."""
    sources = DATA if isinstance(EVAL_DATA, float) else EVAL_DATA
    return [sources] if isinstance(sources, str) else list(dict.fromkeys(sources))


def position_edges(length):
    """Return 1k, 2k, 4k ... below `length`: where one band of positions ends and another begins."""
    edges = []
    edge = 1024
    while edge < length:
        edges.append(edge)
        edge *= 2
    return edges


def band_names(edges):
    """Return "0-1k", "1k-2k" ... for the bands that position_edges separates."""
    ends = [edge // 1024 for edge in edges]
    ends.append(2 * ends[-1] if ends else 1)
    starts = ["0"] + [f"{end}k" for end in ends[:-1]]
    return [f"{start}-{end}k" for start, end in zip(starts, ends)]


def quotients(names, sums):
    """Return {name: sum / weight} for sums (names, 2), without those of weight 0."""
    return {name: part / weight for name, (part, weight) in zip(names, sums.tolist()) if weight > 0}


# ------------------------------------------------------------------------------ saving and stopping

def save_due(step, last_save_time, saver, grid):
    """Return whether to save after this step.

    If the save before is still being written, one that is due by SAVE_MINUTES is skipped, and one
    that is due by SAVE_EVERY waits for it.
    """
    at_step = SAVE_EVERY > 0 and step % SAVE_EVERY == 0
    late = 0 < SAVE_MINUTES < (time.monotonic() - last_save_time) / 60
    if not at_step and not parallel.any_rank(late):
        return False
    is_writing = parallel.any_rank(saver.is_writing())
    if is_writing and grid.rank == 0:
        slow = "the disk takes longer to write a checkpoint than"
        remedy = "raise it, or set RUN_DIR to a faster disk"
        if not at_step:
            warn_once(f"{slow} SAVE_MINUTES {SAVE_MINUTES:g} allows, so that there are fewer "
                      f"checkpoints: {remedy}")
        elif step - saver.step >= SAVE_EVERY:
            warn_once(f"{slow} SAVE_EVERY {SAVE_EVERY} allows, so that training waits: {remedy}")
    return at_step or not is_writing


def save(saver, step, model, optimizer, not_finite, grid):
    """Begin to save a step, unless its weights are not finite."""
    if not parallel.all_finite(model, optimizer):
        print_once(grid, f"WARNING: step {step} is not saved, as its weights are not finite")
        return
    # After steps that were skipped, the checkpoints of the steps before them are worth more.
    keep = KEEP_CHECKPOINTS if not_finite == 0 else -1
    saver.save(step, model, optimizer, keep)


def stop(saver, step, is_saved, model, optimizer, not_finite, grid):
    """Save `step` if it is not, and print the command that continues the run."""
    if saver is None:
        print_once(grid, f"stopped by a signal after step {step}: nothing is saved, as SAVE_EVERY "
                         "is -1")
        return
    if not is_saved:
        with timed(grid, "saving the last checkpoint"):
            save(saver, step, model, optimizer, not_finite, grid)
            saver.wait()
    saver.wait()  # for an earlier save
    how = "This, or the same batch script," if "SLURM_JOB_ID" in os.environ else "This"
    print_once(
        grid, f"stopped by a signal after step {step}. {how} continues the run:\n{command_line()}")


def command_line():
    """Return the command that continues this run, with torchrun or srun if it started this one."""
    words = sys.orig_argv
    launcher = Path(f"/proc/{os.getppid()}/cmdline")
    if "TORCHELASTIC_RUN_ID" in os.environ and launcher.exists():
        words = launcher.read_text().split("\0")[:-1]
    elif "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        words = ["srun", f"--ntasks={os.environ['SLURM_NTASKS']}", *words]

    # It ends with the arguments of train.py, of which a later one replaces an earlier one.
    arguments = sys.argv[1:]
    program = words[:len(words) - len(arguments)]
    constants = {argument.partition("=")[0]: argument for argument in arguments}
    if RESUME != "auto":
        constants["RESUME"] = "RESUME=auto"
    return shlex.join([*program, *constants.values()])


def warn_of_long_stops(micro_batch_seconds, save_seconds, grid):
    """Say so if torchrun would kill a run before it could save: it completes a micro-batch first.

    save_seconds: what the last complete save took, or 0 if there is none yet.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    given = re.search(r"--shutdown[-_]timeout[= ](\d+)", command_line())
    patience = int(given[1] if given else os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    seconds = micro_batch_seconds + save_seconds
    if seconds > patience and grid.rank == 0:
        save = f" and a save {save_seconds:.0f} s" if save_seconds > 0 else ""
        warn_once(f"a micro-batch takes {micro_batch_seconds:.0f} s{save}, but torchrun kills the "
                  f"run {patience} s after it is told to stop, so that no checkpoint would be "
                  f"saved: start it with --shutdown-timeout {round(3 * seconds) + 60}",
                  subject="long stops")


# Signals that stop a run after a checkpoint.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def receive_signals():
    """Yield a list that receives the first of STOP_SIGNALS. A second one ends the process at once.

    Ranks receive a signal at different times. They stop together, when `any_rank` has a request.
    """
    requests = []
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    # Python runs handlers in the main thread, which may be waiting for the GPU or another rank. So
    # the handlers do nothing, and a thread reads the signals, which Python writes to the pipe.
    def ignore(number, frame):
        pass

    def read():
        first = 0.0
        while True:
            numbers = os.read(read_end, 1)
            now = time.monotonic()
            if not numbers:  # the pipe was closed
                os.close(read_end)
                return
            number = numbers[0]
            if number in STOP_SIGNALS and not requests:
                first = now
                requests.append(number)
            # A launcher and a scheduler may both pass on the same signal.
            elif number in STOP_SIGNALS and now - first > 1:
                os._exit(1)

    old_handlers = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            old_handlers[number] = signal.signal(number, ignore)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=read, daemon=True).start()
    try:
        yield requests
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        os.close(write_end)


# --------------------------------------------------------------------------------------------- data

def open_all_data(folder, config):
    """Return the data.Rows of DATA, and those of EVAL_DATA or None."""
    if not EVAL_DATA:
        return open_data(DATA, folder, config), None
    if not isinstance(EVAL_DATA, float):
        if EVAL_DATA not in ("demo", "synthetic"):  # before DATA is tokenized, which takes longer
            data.find_files(EVAL_DATA, "EVAL_DATA")
        return open_data(DATA, folder, config), open_data(EVAL_DATA, folder, config)
    training, held_out = data.hold_out(open_corpus(DATA, folder, config), EVAL_DATA)
    return make_rows(training), make_rows(held_out)


def open_data(source, folder, config):
    """Return the data.Rows of `source`, which is a value of DATA, or a path or paths."""
    return make_rows(open_corpus(source, folder, config))


def open_corpus(source, folder, config):
    """Return the data.Corpus of `source`.

    Files are tokenized with the tokenizer of `folder` unless they are in CACHE_DIR already.
    """
    if source == "demo" and MODEL != "demo":
        name = "DATA" if source == DATA else "EVAL_DATA"
        raise ValueError(f"{name} 'demo' is for MODEL 'demo' only, not for {MODEL!r}: set it to "
                         "your files.")
    if source == "synthetic":
        return synthetic_corpus(config.vocab_size)
    # The hash of the files is the key of the token cache, so changed files are tokenized again.
    files = f"{CACHE_DIR}/demo/demo.jsonl" if source == "demo" else source
    if COLUMNS and source == DATA:  # EVAL_DATA may have other keys
        data.check_columns(files, COLUMNS)
    cap = 0 if OVERLONG == "split" else MAX_LENGTH  # tokens per document; 0: no limit
    return data.build_corpus(
        files, folder, CACHE_DIR, APPEND_EOS, TRAIN_ON_PROMPT, MASK_HISTORY, OVERLONG, cap,
        FORMAT, COLUMNS, ACCEPT_LOSS, NO_STOP_TOKEN, vocab_size=config.vocab_size,
        bad_rows=0 if BAD_ROWS == "stop" else BAD_ROWS)


def make_rows(corpus):
    """Return the data.Rows of a corpus, packed as the constants say."""
    grouped_rows = GLOBAL_BATCH_SIZE if GROUP_BY_LENGTH else 0
    return data.Rows(
        corpus, PACKING, MAX_LENGTH, SEED, BATCH_SIZE, USE_VARLEN_ATTN, LOSS_WEIGHT, grouped_rows)


def synthetic_corpus(vocab_size):
    """Documents of random tokens, all of the same length, enough for MAX_STEPS steps."""
    length = SYNTHETIC_DOCUMENT or MAX_LENGTH
    n = ceil_div(max(MAX_STEPS, 1) * GLOBAL_BATCH_SIZE * row_length(), length)
    offsets = np.arange(n + 1) * length
    lengths = np.full(n, length)
    sources = [(0, n, 1.0)]  # one source of n documents, seen once per epoch
    return data.Corpus(vocab_size, offsets, lengths - 1, lengths, sources, "synthetic")


# ------------------------------------------------------------------------------ model and optimizer

def build_model(folder, config, grid, execution, dtype, checkpoint=None):
    """Return the model, sharded over the ranks, with its first weights.

    With a checkpoint, which is loaded next, it has no weights yet.
    """
    with torch.device("meta"):  # a rank allocates memory for its own shard only
        model = Transformer(config, grid.sp_group, execution)
    loads_weights = INIT == "weights" and checkpoint is None
    if loads_weights:
        convert.check_weights(model, folder)  # before memory is taken for sizes that may be wrong
    parallel.shard(model, model.block_groups(), grid, dtype, execution.zero_stage,
                   execution.offload_optimizer)
    if loads_weights:
        convert.load_weights(model, folder)
    elif checkpoint is None:
        model.init_weights(SEED)
    return model


def build_optimizer(model):
    """Return AdamW with weight decay on matrices, not on norms and biases."""
    decayed = []
    others = []
    for name, parameter in model.named_parameters():
        # Cohere's norms of q and k have a row for every head, so the shape alone does not tell.
        is_norm = "norm" in name
        if parameter.ndim > 1 and not is_norm:
            decayed.append(parameter)
        else:
            others.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, LEARNING_RATE, BETAS, parallel.cast_weights_of(model))
    # AdamW would allocate its states at the end of the first step, in the gaps that the activations
    # have left. The second step could then run out of memory, though the first did not.
    trained = [] if MAX_STEPS == 0 else decayed + others
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def execution_settings(device_type):
    """Return the constants that change speed and memory, but no result, as an Execution."""
    return Execution(
        attention=ATTENTION,
        recompute=RECOMPUTE,
        keep_layers=KEEP_LAYERS,
        offload_layers=OFFLOAD_ACTIVATIONS,
        mlp_chunk=MLP_CHUNK,
        loss_chunk=LOSS_CHUNK,
        zero_stage=ZERO_STAGE,
        offload_optimizer=OFFLOAD_OPTIMIZER,
        compile=COMPILE and device_type == "cuda")


# ------------------------------------------------------------------------------- export and samples

# Samples end after so many seconds, also those of a model too large to write SAMPLE_TOKENS in time.
SAMPLE_SECONDS = 120

# The logits of samples are divided by this; the smaller it is, the likelier is the likeliest token.
SAMPLE_TEMPERATURE = 0.5


def finish(model, folder, grid):
    """Export the model and print samples."""
    if SAVE_EVERY >= 0:
        hf_folder = Path(RUN_DIR) / "hf"
        with timed(grid, "exporting"):
            parallel.run_on_ranks("export", convert.save_weights, model, folder, hf_folder)
        print_once(grid, f"the trained model is in {hf_folder}, a Hugging Face folder")
    if SAMPLE_PROMPTS and DATA != "synthetic":
        sample(model, folder, grid)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiling for single tokens takes longer than samples
def sample(model, folder, grid):
    """Print continuations of SAMPLE_PROMPTS; for chat data they are the user's messages."""
    tokenizer = data.open_tokenizer(folder)
    generator = torch.Generator().manual_seed(SEED)
    chat = DATA != "demo" and data.is_chat(DATA, FORMAT, COLUMNS)
    deadline = time.monotonic() + SAMPLE_SECONDS
    for prompt in SAMPLE_PROMPTS:
        text, end = chat_prompt(tokenizer, prompt) if chat else (prompt, tokenizer.eos_token)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not chat:    # as a text begins in training; a template writes its own
            ids = data.first_tokens(tokenizer) + ids
        written = []
        for token in generate(model, ids, grid, generator, deadline):
            written.append(token)
            if end and tokenizer.decode(written[-1:]) == end:
                break
        print_once(grid, "-" * 80 + "\n" + tokenizer.decode(ids + written))


def chat_prompt(tokenizer, message):
    """Return a user's message in the chat template, and the token that ends the answer or None."""
    question = [{"role": "user", "content": message}]
    # The answer is this word, which the template does not contain.
    answered = [*question, {"role": "assistant", "content": "answer0"}]
    with data.naming("the chat template, for SAMPLE_PROMPTS"), data.bounded():
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    after_answer = whole.rpartition("answer0")[2]
    tokens = tokenizer.batch_decode(
        [[token] for token in tokenizer(after_answer, add_special_tokens=False).input_ids])
    ends = [token for token in tokens if token.strip()]
    return text, ends[0] if ends else tokenizer.eos_token


def generate(model, prompt, grid, generator, deadline):
    """Yield SAMPLE_TOKENS tokens that continue a prompt of token ids, fewer after the deadline.

    Each rank computes the whole text, also where ranks share the rows of training.
    """
    caches = model.new_caches()
    new_ids = prompt    # those that are not in the caches
    position = 0        # of the first of them
    for _ in range(SAMPLE_TOKENS):
        if parallel.any_rank(time.monotonic() > deadline):
            break
        row = torch.tensor(new_ids, device=grid.device)                             # (n,)
        positions = position + torch.arange(len(row), device=grid.device)
        [logits] = model(row, positions, [0, len(row)], len(row), caches=caches)    # (V,)

        # The first rank draws for all, so that a difference of rounding cannot part their texts.
        token = torch.zeros(1, dtype=torch.long)
        if grid.rank == 0:
            probabilities = torch.softmax(logits.float().cpu() / SAMPLE_TEMPERATURE, dim=-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
        parallel.all_sum(token)
        position += len(new_ids)
        new_ids = token.tolist()
        yield token.item()


# ----------------------------------------------------------------------------------- files of a run

# Constants that change the documents or their tokens.
DATA_CONSTANTS = (
    "DATA", "EVAL_DATA", "SYNTHETIC_DOCUMENT", "MAX_LENGTH", "OVERLONG", "APPEND_EOS",
    "TRAIN_ON_PROMPT", "MASK_HISTORY", "ACCEPT_LOSS", "NO_STOP_TOKEN", "FORMAT", "COLUMNS", "BAD_ROWS")

# Constants that decide which rows a step has, besides two for PACKING="none".
ROW_CONSTANTS = ("PACKING", "MAX_LENGTH", "GLOBAL_BATCH_SIZE", "SEED")


def run_record(folder, config, rows, eval_rows):
    """Return what a checkpoint records about its run, as reading the JSON gives it back."""
    record = {
        "model": str(folder.resolve()),
        "config": vars(config),
        "weights": None,
        "data": [rows.corpus.key, rows.corpus.sources],
        "eval_data": eval_rows.corpus.key if eval_rows is not None else None,
        "order": data.ORDER_VERSION,
        "constants": {name: globals()[name] for name in CONSTANTS},
    }
    if INIT == "weights" and MODEL != "demo":
        record["weights"] = convert.weights_fingerprint(folder)
    return json.loads(json.dumps(record))  # tuples become lists


def facts_of_run(record, rows):
    """Return {what: value} of what all ranks must have in common, besides the constants."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return {
        "the model's config": record["config"],
        "the hash of the model's weights": record["weights"],
        "the hash of DATA": rows.corpus.key,
        "the hash of EVAL_DATA": record["eval_data"],
        "the hash of the code": code.hexdigest()[:16],
        "the version of torch": torch.__version__,
    }


def lock_run(lock):
    """Acquire `lock` for this process. Raise ValueError if another run of RUN_DIR has it."""
    run = Path(RUN_DIR)
    run.mkdir(parents=True, exist_ok=True)
    owner = run / "owner"
    try:
        lock.acquire(timeout=0)  # the system releases it when the process ends, however it ends
    except Timeout:
        name = owner.read_text() if owner.exists() else "another process"
        raise ValueError(
            f"{run} is in use by {name}: stop that run, or set another RUN_DIR.") from None
    owner.write_text(f"process {os.getpid()} on {os.uname().nodename}")


def refuse_separate_folders():
    """Raise ValueError on all ranks if RUN_DIR is not one folder for all of them.

    Each writes its part of a checkpoint. Rank 0 has just written the file that lock_run describes.
    """
    def read_owner():
        owner = Path(RUN_DIR) / "owner"
        return owner.read_text() if owner.exists() else None

    owners = parallel.run_on_ranks("RUN_DIR", read_owner)
    others = [str(rank) for rank, owner in enumerate(owners) if owner != owners[0]]
    if others:
        raise ValueError(
            f"RUN_DIR {RUN_DIR} is not the same folder on rank 0 and on rank {', '.join(others)}: set "
            "it to one on a disk that all hosts share.")


def find_checkpoint(record, steps, grid):
    """Return the folder of the checkpoint that RESUME selects, or None, and how many steps it has done.

    record: of this run, see run_record. It takes over the fingerprint of weights that are gone.
    steps: of the whole run. Raise ValueError if the checkpoint is of another model, or of steps that
    have other rows, or if RUN_DIR has a newer one.
    """
    # All ranks verify the files of a checkpoint before any of them loads it.
    checkpoints = Path(RUN_DIR) / "checkpoints"
    folder, manifest = parallel.find_checkpoint(checkpoints, RESUME)
    steps_done = 0 if folder is None else manifest["step"]

    # A later step would not be saved where a checkpoint of its name exists.
    published = parallel.published(checkpoints)
    newest = published[-1].name if published else "step-00000000"
    if int(newest.removeprefix("step-")) > steps_done:
        raise ValueError(
            f"{RUN_DIR} holds {newest}, but this run would start after step {steps_done}: set "
            "RUN_DIR to a new folder, or RESUME=auto to continue from it.")
    if folder is None:
        return None, 0

    # Another model, other data or other rows cannot be continued. Other changes are reported.
    changes = changed_values(manifest["constants"], record["constants"])
    if record["config"] != manifest["config"]:
        of_config = changed_values(manifest["config"], record["config"])
        raise ValueError(
            f"The config of {folder} differs from that of MODEL {MODEL}: {', '.join(of_config)}. Set "
            "RUN_DIR to a new folder.")
    weights = manifest.get("weights")   # None: it began with random ones
    if None not in (weights, record["weights"]) and weights != record["weights"]:
        raise ValueError(
            f"{folder} was trained from {manifest['model']}, and MODEL {MODEL} has other weights, "
            "which resuming would ignore: set RUN_DIR to a new folder, or MODEL to that one.")
    record["weights"] = record["weights"] or weights
    if record["data"] != manifest["data"]:
        causes_of = DATA_CONSTANTS
        if DATA == "synthetic":     # as many documents as there are steps
            causes_of = (*DATA_CONSTANTS, "GLOBAL_BATCH_SIZE", "MAX_STEPS")
        causes = [change for change in changes if change.split()[0] in causes_of]
        raise ValueError(
            f"The data of {folder}, {manifest['data']}, differs from that of this run, "
            f"{record['data']}: {', '.join(causes) or 'the files or the tokenizer have changed'}. "
            "Undo this, or set RUN_DIR to a new folder.")
    if steps_done < steps and manifest.get("order", 1) != record["order"]:
        raise ValueError(f"{folder} was written by code that had another order of rows: continue with "
                         "that code, or set RUN_DIR to a new folder.")
    row_constants = ROW_CONSTANTS
    if "none" in (PACKING, manifest["constants"]["PACKING"]):
        row_constants += ("BATCH_SIZE", "GROUP_BY_LENGTH")
    other_rows = [change for change in changes if change.split()[0] in row_constants]
    if steps_done < steps and other_rows:
        raise ValueError(
            f"{', '.join(other_rows)}, so that steps after {folder} would have other rows: some would "
            "be trained twice, and others never. Undo this, or start a new run: export the checkpoint "
            "with convert.py, and set MODEL to that folder and RUN_DIR to a new one.")
    if manifest.get("eval_data", record["eval_data"]) != record["eval_data"]:
        changes.append("EVAL_DATA has other contents, so that losses on it are not comparable")
    for change in changes:
        print_once(grid, f"{change}, compared with {folder.name}")
    return folder, steps_done


def changed_values(before, now):
    """Return a text about each key whose value differs in two dicts: "KEY was 1 and is now 2"."""
    return [f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in {**before, **now}
            if before.get(key) != now.get(key)]


def open_run(record, steps_done, accounting):
    """Write config.json and env.json to RUN_DIR. metrics.jsonl keeps the steps to `steps_done`."""
    run = Path(RUN_DIR)
    (run / "config.json").write_text(json.dumps(record["constants"], indent=2))
    environment = {**describe_environment(), "data": record["data"], "accounting": accounting}
    (run / "env.json").write_text(json.dumps(environment, indent=2, default=int))

    # Steps after the checkpoint will be run again, and without one the evaluation at step 0, too.
    remove_lines(run / "metrics.jsonl", after_step=steps_done if steps_done > 0 else -1)


# --------------------------------------------------------------------------------------------- plan

# The constants that RECOMPUTE="auto" chooses, and the fields of Execution that they are.
CHOSEN = {
    "RECOMPUTE": "recompute",
    "KEEP_LAYERS": "keep_layers",
    "ZERO_STAGE": "zero_stage",
    "MLP_CHUNK": "mlp_chunk",
    "OFFLOAD_ACTIVATIONS": "offload_layers",
    "OFFLOAD_OPTIMIZER": "offload_optimizer",
}

# SEQUENCE_PARALLEL_SIZE=0 is the smallest size whose step is at most so many times as long as the
# shortest: the estimates of different sizes are not more exact than that.
ABOUT_AS_SHORT = 1.05


class Plan(NamedTuple):
    """What follows from the constants and the number of processes."""
    folder: Path        # Hugging Face folder of the model
    config: Config      # with the context length that the trained model will have
    sp: int             # sequence-parallel size: ranks that share one row
    dp: int             # data-parallel size: rows processed at the same time, in all replicas


def plan(world):
    """Check the constants, set those in CHOSEN to what is chosen, and return the Plan for `world`
    processes.

    Raise ValueError or FileNotFoundError that names the constant, the rule and the remedy.
    """
    complete_constants()
    check_constants()
    make_folder("CACHE_DIR", CACHE_DIR)
    demo = Path(CACHE_DIR) / "demo"
    if "demo" in (MODEL, DATA, EVAL_DATA):
        make_demo(demo)

    folder = demo if MODEL == "demo" else Path(MODEL)
    config = convert.load_config(folder)
    convert.extend_context(config, MAX_POSITION_EMBEDDINGS, ROPE_SCALING, MAX_LENGTH)
    if MAX_LENGTH > config.max_position_embeddings:
        raise ValueError(
            f"MAX_LENGTH {MAX_LENGTH} is beyond the model's {config.max_position_embeddings} "
            f"positions: extend them with MAX_POSITION_EMBEDDINGS={MAX_LENGTH} and, if not by "
            "yarn, ROPE_SCALING, or lower MAX_LENGTH.")
    if config.sliding_window and config.sliding_window >= MAX_LENGTH:
        config.sliding_window = None  # it covers every row; kernels are faster without a window

    sp, execution = choose_settings(config, world, this_gpu(), host_memory_per_process())
    for name, field in CHOSEN.items():
        globals()[name] = getattr(execution, field)
    return Plan(folder, config, sp, dp=world // sp)


def possible_sizes(config, world):
    """Return the sequence-parallel sizes that the constants and the heads allow, smallest first.

    Raise ValueError if there is none.
    """
    heads = (config.num_attention_heads, config.num_key_value_heads)
    sizes = [SEQUENCE_PARALLEL_SIZE]
    if SEQUENCE_PARALLEL_SIZE == 0:
        sizes = parallel.sequence_parallel_sizes(max(world // REPLICAS, 1), *heads)

    # All sizes divide the largest, so what the largest does not allow no other does.
    largest = sizes[-1]
    dp = parallel.data_parallel_size(world, REPLICAS, largest, *heads)
    if GLOBAL_BATCH_SIZE % dp != 0:
        next_multiple = ceil_div(GLOBAL_BATCH_SIZE, dp) * dp
        raise ValueError(
            f"GLOBAL_BATCH_SIZE {GLOBAL_BATCH_SIZE} is not a multiple of the data-parallel size "
            f"{dp} ({world} processes / SEQUENCE_PARALLEL_SIZE {largest}): use {next_multiple}.")
    return [sp for sp in sizes if GLOBAL_BATCH_SIZE * sp % world == 0]


def choose_settings(config, world, gpu, host):
    """Return the sequence-parallel size and the Execution of a run of `world` processes.

    Of what fits in the costs.GPU and `host` GiB of CPU memory a process, they are the smallest of
    possible_sizes whose step is about as short as with any, and the fastest settings with it.
    OFFLOAD_OPTIMIZER is taken only if nothing fits without it. What is set by hand stays.
    Raise ValueError if nothing fits.
    """
    sizes = possible_sizes(config, world)
    given = settings_by_hand(config)
    execution = execution_settings("cuda")
    if gpu is None:  # a CPU: its memory is not planned, and recomputing only takes time
        work = work_of_gpu(config, world, sizes[0])
        return sizes[0], next(candidates(config, work, execution, given))

    def seconds_of(sp, execution):
        return sum(step_seconds(config, gpu, work_of_gpu(config, world, sp), execution).values())

    # A lower bound for each size: a step that recomputes and offloads nothing. Larger sizes are not
    # tried if the best step so far is about as short as their bounds.
    lower_bound = {sp: seconds_of(sp, Execution(zero_stage=1)) for sp in sizes}
    for offload_optimizer in (False, True):
        best = None
        fitting = {}    # sp: (seconds, Execution)
        for sp in sizes:
            limited = {"offload_optimizer": offload_optimizer, **given}
            chosen = choose(
                config, gpu, work_of_gpu(config, world, sp), execution, limited, host)
            if chosen is not None:
                fitting[sp] = seconds_of(sp, chosen), chosen
                shortest = min(seconds for seconds, _ in fitting.values())
                best = next(sp for sp, (seconds, _) in fitting.items()
                            if seconds <= ABOUT_AS_SHORT * shortest)
            bounds = [lower_bound[larger] for larger in sizes if larger > sp]
            if best is not None and all(
                    fitting[best][0] <= ABOUT_AS_SHORT * bound for bound in bounds):
                return best, fitting[best][1]
    if RECOMPUTE != "auto":  # everything was set by hand, and is tried
        work = work_of_gpu(config, world, sizes[-1])
        return sizes[-1], next(candidates(config, work, execution, given))
    raise ValueError(
        f"Rows of MAX_LENGTH {MAX_LENGTH} do not fit in {gpu.memory:.0f} GiB of a GPU and "
        f"{host:.0f} GiB of CPU memory for each of {world} processes: use more GPUs or a "
        "smaller MAX_LENGTH. RECOMPUTE=pairs, with the constants below it set by hand, tries it.")


def settings_by_hand(config):
    """Return {field of Execution: value} of the constants in CHOSEN that are not to be chosen."""
    given = {}
    for name, field in CHOSEN.items():
        if RECOMPUTE != "auto" or (name != "RECOMPUTE" and is_set(name)):
            given[field] = globals()[name]
    if given.get("offload_layers") == -1:
        given["offload_layers"] = config.num_hidden_layers
    return given


def format_settings(execution, sp):
    """Return the settings in CHOSEN as constants to paste into a command line."""
    constants = [f"{name}={getattr(execution, field)}" for name, field in CHOSEN.items()]
    return " ".join([f"SEQUENCE_PARALLEL_SIZE={sp}", *constants])


def work_of_gpu(config, world, sp, pairs=None):
    """Return the costs.Work of one GPU. `pairs` of a row; without it, a row is one document."""
    document = None
    if pairs is None:
        pairs = mean_attention_pairs(config, [0, row_length()])
        document = row_length()
    dp = max(world // sp, 1)
    return Work(
        tokens=ceil_div(row_length(), sp),
        pairs=pairs,
        sp=sp,
        ranks=max(world // REPLICAS, 1),
        replicas=REPLICAS,
        accumulate=ceil_div(GLOBAL_BATCH_SIZE, dp),
        document=document)


def row_length():
    """Return the tokens of a row, at most."""
    return MAX_LENGTH * BATCH_SIZE if PACKING == "none" else MAX_LENGTH


def this_gpu():
    """Return the costs.GPU of this process, with the memory it really has, or None on a CPU."""
    if not torch.cuda.is_available():
        return None
    size = torch.cuda.get_device_properties(0).total_memory / 2**30
    return gpu_of(torch.cuda.get_device_name())._replace(memory=size)


def host_memory_per_process():
    """Return how many GiB of CPU memory there are for each process of this host."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = min(size, parallel.memory_limit())
    return size / 2**30 / parallel.local_world_size()


def check_machine(device_type):
    """Raise ValueError for a constant that no run on this machine can use."""
    run = Path(RUN_DIR).resolve()
    if MODEL != "demo" and Path(MODEL).resolve() in (run, run / "hf"):
        raise ValueError(f"RUN_DIR {RUN_DIR} would overwrite MODEL {MODEL}: set another RUN_DIR.")
    if any(run.glob("*.safetensors")):
        raise ValueError(f"RUN_DIR {RUN_DIR} holds the weights of a model, whose config.json would be "
                         "overwritten: set another RUN_DIR.")
    make_folder("RUN_DIR", RUN_DIR)
    if RESUME not in ("auto", "never") and not Path(RESUME).is_dir():
        there = [folder.name for folder in parallel.published(Path(RUN_DIR) / "checkpoints")]
        raise ValueError(f"RESUME {RESUME!r} is no folder: use 'auto', 'never' or a checkpoint. In "
                         f"{RUN_DIR}/checkpoints are: {', '.join(there) or 'none'}.")
    if OFFLOAD_OPTIMIZER and device_type == "cpu":
        raise ValueError("OFFLOAD_OPTIMIZER True needs a GPU, whose memory it saves: use "
                         "OFFLOAD_OPTIMIZER=False.")


def make_folder(name, path):
    """Create the folder that a constant names. Raise ValueError if it cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"{name} {path} is not a folder that this user can write: set another "
                         "one.")


def make_demo(folder):
    """Write the demo model and its corpus to `folder` unless it is there. Other processes wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "model.safetensors").exists():
            convert.write_demo(folder)


def ceil_div(a, b):
    """a / b, rounded up to an integer."""
    return -(-a // b)


# ---------------------------------------------------------------------------------------- constants

# Constants that take one of a few values.
CHOICES = {
    "INIT": ("weights", "random"),
    "PACKING": ("split", "whole", "none"),
    "OVERLONG": ("split", "truncate", "truncate_middle", "drop"),
    "NO_STOP_TOKEN": ("refuse", "append", "accept"),
    "FORMAT": ("", *data.FORMATS),
    "LOSS_WEIGHT": ("token", "sample", "square"),
    "ZERO_STAGE": (1, 2, 3),
    "RECOMPUTE": ("auto", "none", "all_but_attention", "all", "pairs"),
    "DTYPE": ("auto", "bfloat16", "float32"),
    "LR_SCHEDULE": ("cosine", "linear", "constant", "wsd"),
}

# The least and the largest number that a constant may be.
MANY = 10**12            # no limit that matters
MANY_TOKENS = 2**31 - 1  # the ends of documents in a row are int32
MANY_ROWS = 10**6        # all rows of a step are prepared before it
RANGES = {
    "SYNTHETIC_DOCUMENT": (0, MANY_TOKENS),
    "MAX_LENGTH": (1, MANY_TOKENS),
    "BATCH_SIZE": (1, MANY_ROWS),
    "MAX_POSITION_EMBEDDINGS": (0, MANY_TOKENS),
    "SEQUENCE_PARALLEL_SIZE": (0, MANY),
    "GLOBAL_BATCH_SIZE": (1, MANY_ROWS),
    "REPLICAS": (1, MANY),
    "KEEP_LAYERS": (0, MANY),
    "MLP_CHUNK": (0, MANY),
    "LOSS_CHUNK": (1, MANY),
    "LEARNING_RATE": (0, 10),
    "MIN_LEARNING_RATE_RATIO": (0, 1),
    "WARMUP_RATIO": (0, 1),
    "WEIGHT_DECAY": (0, 10),
    "MAX_GRAD_NORM": (0, MANY),
    "EPOCHS": (1e-6, 10_000),       # the rows of each are packed before the first step
    "MAX_STEPS": (-1, 10**9),
    "SEED": (0, 2**32 - 1),
    "EVAL_EVERY": (0, MANY),
    "SAMPLE_TOKENS": (0, MANY),
    "SAVE_EVERY": (-1, MANY),
    "SAVE_MINUTES": (0, MANY),
}

# Constants that must not be empty.
PATHS = ("MODEL", "RUN_DIR", "CACHE_DIR", "RESUME")

# Constants whose value may be of another type than the default, such as a path or a list of paths.
ANY_TYPE = ("DATA", "EVAL_DATA", "BAD_ROWS", "BETAS", "ROPE_SCALING")

# Values of constants whose default shows too little, as they are written on a command line.
EXAMPLES = {
    "COLUMNS": "'COLUMNS={\"text\": \"content\"}'",
    "SAMPLE_PROMPTS": "'SAMPLE_PROMPTS=[\"Once\"]'",
}


def override(arguments, other_names=()):
    """Set constants from NAME=VALUE arguments, see read_value. other_names: those of the caller.

    Raise ValueError for an unknown name and for a value of another type than the default.
    """
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name not in CONSTANTS or not equals:
            alike = name.lstrip("-").replace("-", "_").upper()
            nearest = difflib.get_close_matches(alike, [*CONSTANTS, *other_names], 1, cutoff=0)[0]
            raise ValueError(f"{argument!r} does not set a constant of train.py: write NAME=VALUE. "
                             f"The nearest name is {nearest}.")
        default = DEFAULTS[name]
        value = read_value(text, default)
        if type(default) is str and type(value) in (int, float) and name not in ANY_TYPE:
            value = text    # RUN_DIR=2026 is a name
        if type(value) is not type(default) and name not in ANY_TYPE:
            example = EXAMPLES.get(name, repr(default))
            raise ValueError(f"{name}={text} is not of type {type(default).__name__}: "
                             f"use a value like {example}.")
        globals()[name] = value
        SET_BY_HAND.add(name)


def read_value(text, default):
    """Return the value that `text` means: a Python literal, or else a string as it stands.

    Where `default` is a float, numbers such as 1 and nan are floats, too.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if type(default) is float and type(value) in (int, str):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    return value


def is_set(name):
    """Return whether a constant was set, on the command line or to another value than its default.
    """
    return name in SET_BY_HAND or globals()[name] != DEFAULTS[name]


def complete_constants():
    """Set the constants that depend on others, as far as they are not set by hand."""
    if MODEL == "demo":
        for name, value in DEMO.items():
            if not is_set(name):
                globals()[name] = value
    if DTYPE == "auto":  # on CPUs bfloat16 is slower than float32
        globals()["DTYPE"] = "bfloat16" if torch.cuda.is_available() else "float32"


def check_constants():
    """Raise ValueError for a constant whose value no run can use."""
    for name, choices in CHOICES.items():
        value = globals()[name]
        if value not in choices:
            known = ", ".join(str(choice) or "''" for choice in choices)
            raise ValueError(f"{name} {value!r} is unknown: use one of {known}.")
    for name, (least, most) in RANGES.items():
        value = globals()[name]
        if not least <= value <= most:  # true for nan, too
            raise ValueError(f"{name} {value} is out of range: use a number from {least:,} to "
                             f"{most:,}.")
    for name in PATHS:
        if not globals()[name]:
            raise ValueError(f"{name} '' is empty: set it to a value like {DEFAULTS[name]!r}.")
    check_data_constants()
    check_collections()
    if KEEP_CHECKPOINTS == 0 or KEEP_CHECKPOINTS < -1:
        raise ValueError(f"KEEP_CHECKPOINTS {KEEP_CHECKPOINTS} is not a number of checkpoints: "
                         "use -1 to keep all, or a number greater than 0.")
    if WANDB and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"WANDB {WANDB!r} needs the package wandb, which is not installed: "
                         "pip install wandb, or set WANDB=''.")
    if OFFLOAD_ACTIVATIONS < -1:
        raise ValueError(f"OFFLOAD_ACTIVATIONS {OFFLOAD_ACTIVATIONS} is not a number of layers: "
                         "use 0 for none, -1 for all, or the number of first layers to offload.")


def check_data_constants():
    """Raise ValueError if DATA, EVAL_DATA or BAD_ROWS has a value that is not allowed."""
    if not names_files(DATA):
        raise ValueError(f"DATA {DATA!r} does not name files: use a path, a list of paths, "
                         "{path: epochs}, 'demo' or 'synthetic'.")
    check_epochs("DATA", DATA)
    if isinstance(EVAL_DATA, (int, float)):
        if not 0 < EVAL_DATA < 1:
            raise ValueError(f"EVAL_DATA {EVAL_DATA} is not a share of the documents of DATA: use "
                             "a number between 0 and 1, or name a file.")
        if DATA == "synthetic":
            raise ValueError(f"EVAL_DATA {EVAL_DATA} is a share of the documents in files, which "
                             "DATA 'synthetic' does not read: use EVAL_DATA=''.")
    elif EVAL_DATA and not names_files(EVAL_DATA):
        raise ValueError(f"EVAL_DATA {EVAL_DATA!r} does not name files: use a path, a list of "
                         "paths, {path: epochs}, a number between 0 and 1, or '' for none.")
    check_epochs("EVAL_DATA", EVAL_DATA)
    is_share = type(BAD_ROWS) in (int, float) and 0 <= BAD_ROWS <= 1
    if BAD_ROWS != "stop" and not is_share:
        raise ValueError(f"BAD_ROWS {BAD_ROWS!r} is neither 'stop' nor a share of the rows: use "
                         "'stop', or a number from 0 to 1.")


def names_files(value):
    """Return whether a value is a path, a list of paths, or a dict {path: epochs}."""
    if isinstance(value, str):
        return value != ""
    if not isinstance(value, (list, tuple, dict)):
        return False
    return len(value) > 0 and all(isinstance(path, str) and path for path in value)


def check_epochs(constant, value):
    """Raise ValueError if a dict {path: epochs} has a number of epochs that is not allowed."""
    if not isinstance(value, dict):
        return
    least, most = RANGES["EPOCHS"]
    for path, epochs in value.items():
        if not isinstance(epochs, (int, float)) or not least <= epochs <= most:
            raise ValueError(f"{constant} {path!r} is set to {epochs!r} epochs: use a number from "
                             f"{least:g} to {most:,}, or leave the source out.")


def check_collections():
    """Raise ValueError for a list, tuple or dict that does not hold what it should."""
    betas = BETAS if isinstance(BETAS, (tuple, list)) else ()
    in_range = [beta for beta in betas if isinstance(beta, (int, float)) and 0 <= beta < 1]
    if len(betas) != 2 or len(in_range) != 2:
        raise ValueError(f"BETAS {BETAS!r} are not two numbers from 0 to below 1: "
                         f"use values like {DEFAULTS['BETAS']}.")
    if not isinstance(ROPE_SCALING, (type(None), str, dict)) or ROPE_SCALING == "":
        raise ValueError(f"ROPE_SCALING {ROPE_SCALING!r} is neither a name nor a dict: use None, "
                         "'yarn', 'linear', 'dynamic', 'llama3' or a dict like config.json's.")
    if not all(isinstance(prompt, str) and prompt for prompt in SAMPLE_PROMPTS):
        raise ValueError(f"SAMPLE_PROMPTS {SAMPLE_PROMPTS!r} are not texts to continue: use a list "
                         "of strings such as ['Once'].")
    if not all(isinstance(key, str) for key in [*COLUMNS, *COLUMNS.values()]):
        raise ValueError(f"COLUMNS {COLUMNS!r} are not names of keys: use strings, such as "
                         "{'text': 'content'}.")
    for key in COLUMNS:
        if key not in data.KEYS:
            raise ValueError(f"COLUMNS {COLUMNS!r} names {key!r}, which no format has: use {{key of "
                             "a format: key in DATA}, with one of the keys "
                             f"{', '.join(sorted(data.KEYS))}.")


# -------------------------------------------------------------------------- what a run prints first

def print_once(grid, text, end="\n"):
    """Print on the first rank only."""
    if grid.rank == 0:
        show(text, end)


@contextlib.contextmanager
def timed(grid, what):
    """Print how long the body takes. On a terminal also say what it is while it runs."""
    began = time.monotonic()
    if sys.stdout.isatty():
        print_once(grid, f"{what} ...\r", end="")
    yield
    print_once(grid, f"{what}: {time.monotonic() - began:.1f} s")


def describe(model, kernel_name, grid):
    """Return what is trained and how the work is divided, for the first lines of a run."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    accumulation = GLOBAL_BATCH_SIZE // grid.dp
    return (
        f"{config.architecture}, {parameters / 1e6:,.1f}M parameters, "
        f"attention by {kernel_name}, {DTYPE} on {grid.device.type}\n"
        f"{config.max_position_embeddings:,} positions, RoPE theta {config.rope_theta:,.0f}, "
        f"RoPE scaling {config.rope_scaling}\n"
        f"{grid.world} ranks = {REPLICAS} replicas x {grid.dp // REPLICAS} data parallel "
        f"x {grid.sp} sequence parallel\n"
        f"{GLOBAL_BATCH_SIZE} rows per step = {grid.dp} at a time x {accumulation} accumulated "
        f"(accumulative_counts); at most {GLOBAL_BATCH_SIZE * row_length():,} tokens per step")


def describe_context(folder, config, rows):
    """Return a line: how many tokens of the data use an extension of the context; "" without one."""
    positions = convert.load_config(folder).max_position_embeddings
    if config.max_position_embeddings <= positions:
        return ""
    lengths = np.concatenate(first_segments(rows))
    beyond = np.maximum(lengths - positions, 0).sum() / lengths.sum()
    text = (f"extended from {positions:,} to {config.max_position_embeddings:,} positions: "
            f"{beyond:.1%} of the tokens are at positions beyond the old ones")
    if beyond < 0.05:
        text += ". WARNING: with so few the model hardly learns to use the new one"
    factor = (config.rope_scaling or {}).get("factor", math.inf)
    if factor * positions < config.max_position_embeddings:
        text += (f". WARNING: ROPE_SCALING's factor {factor:g} extends to {factor * positions:,.0f} "
                 f"positions only: use {config.max_position_embeddings / positions:g}")
    return text + "\n"


def describe_plan(config, grid, execution, rows, steps):
    """Return what the run is expected to take, and the constants that were chosen, to paste."""
    lines = [f"settings: {format_settings(execution, grid.sp)}"]
    for name in ("BATCH_SIZE", "GROUP_BY_LENGTH"):
        value = globals()[name]
        if PACKING != "none" and value != DEFAULTS[name]:
            lines.append(f"WARNING: {name} {value} changes nothing with PACKING {PACKING!r}: it is "
                         "for PACKING='none'. GLOBAL_BATCH_SIZE counts the rows of a step")
    largest = grid.world // REPLICAS
    sizes = parallel.sequence_parallel_sizes(
        largest, config.num_attention_heads, config.num_key_value_heads)
    if largest not in sizes:
        of_a_replica = " of a replica" if REPLICAS > 1 else ""
        lines.append(
            f"{config.num_attention_heads} attention heads and {config.num_key_value_heads} "
            f"key/value heads allow SEQUENCE_PARALLEL_SIZE {', '.join(map(str, sizes))} with "
            f"{largest} processes{of_a_replica}")
    gpu = this_gpu()
    if gpu is not None:
        work = work_of_gpu(config, grid.world, grid.sp, mean_pairs(config, rows))
        step = sum(step_seconds(config, gpu, work, execution).values())
        hours = steps * step / 3600
        host = host_memory(config, work_of_gpu(config, grid.world, grid.sp), execution)
        speed = GLOBAL_BATCH_SIZE * row_length() / step / grid.world
        lines += [
            f"expected peak memory of a GPU of {gpu.memory:.0f} GiB: "
            f"{describe_memory(config, grid, execution)}; "
            f"{host:.1f} GiB of CPU memory for each process",
            f"expected time: {step:.2f} s a step, {speed:,.0f} tokens/s a GPU; {steps:,} steps "
            f"take {hours / 24:.2f} days, {hours * grid.world:,.1f} GPU-hours",
        ]
    return "\n".join(lines)


def mean_pairs(config, rows, n=64):
    """Return the mean over the first `n` rows of the pairs of tokens that attention computes."""
    pairs = []
    for lengths in first_segments(rows, n):
        cu_seqlens = [0, *np.cumsum(lengths).tolist()]
        pairs.append(mean_attention_pairs(config, cu_seqlens))
    return sum(pairs) / len(pairs)


def first_segments(rows, n=64):
    """Return the lengths of the segments, in tokens, of each of the first `n` rows, as arrays."""
    segments = []
    for row in range(min(n, rows.per_epoch)):
        lengths = rows.find(row)["length"]
        segments.append(lengths if rows.use_varlen_attn else lengths.sum(keepdims=True))
    return segments


def memory_parts(config, grid, execution):
    """Return {part: GiB} of the expected peak memory of a GPU."""
    return memory(config, work_of_gpu(config, grid.world, grid.sp), execution)


def describe_memory(config, grid, execution):
    """Return the expected peak memory of a GPU in GiB as a sum of its parts."""
    parts = memory_parts(config, grid, execution)
    terms = " + ".join(f"{size:.1f} {part}" for part, size in parts.items())
    return f"{sum(parts.values()):.1f} GiB = {terms}"


# ---------------------------------------------------------------------------------- errors and help

@contextlib.contextmanager
def explain_out_of_memory(config, grid, execution):
    """Add to an out-of-memory error what was expected and which constants to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"{error}\n"
            f"The expected peak was {describe_memory(config, grid, execution)}.\n"
            f"{describe_next_settings(config, grid, execution)}"
            "Or change these constants one after the other, in this order, until the run fits: "
            "RECOMPUTE=all_but_attention, KEEP_LAYERS=0, ZERO_STAGE=3, MLP_CHUNK=32768, "
            "OFFLOAD_ACTIVATIONS=-1, RECOMPUTE=all, RECOMPUTE=pairs, OFFLOAD_OPTIMIZER=True. If it "
            "still does not fit, raise SEQUENCE_PARALLEL_SIZE or lower MAX_LENGTH. "
            "Checkpoints that are published are complete.") from error


def describe_next_settings(config, grid, execution):
    """Return a line that names the fastest settings that need less memory than those of this run, or
    "" if there are none."""
    # A GPU as large as the memory that was expected, of which choose() leaves a part free.
    gpu = this_gpu() or gpu_of("H200")
    gpu = gpu._replace(memory=sum(memory_parts(config, grid, execution).values()))
    work = work_of_gpu(config, grid.world, grid.sp)
    smaller = choose(config, gpu, work, execution, {}, host_memory_per_process())
    if smaller is None:
        return ""
    return f"The next settings to take are {format_settings(smaller, grid.sp)}.\n"


def print_help():
    """Print the usage and the constants with their comments, as they stand in this file."""
    source = Path(__file__).read_text()
    begin = source.index("# What to train")
    end = source.index("# The names of the constants above")
    print(f"{__doc__}\n{source[begin:end]}", end="")


def report(error):
    """End this process with exit code 1 and one line about an error, or with all if DEBUG is 1."""
    # torchrun stops all ranks when one of them fails, and it describes every rank that did not end
    # with exit code 0. So the other ranks wait until it stops them, and end with 0.
    signal.signal(signal.SIGTERM, exit_quietly)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # set by torchrun
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    elif error_file:
        time.sleep(1)  # until the others wait
    if os.environ.get("DEBUG") == "1":
        raise error

    text = describe_error(error)
    if sys.stderr.isatty():
        text = f"\033[31m{text}\033[0m"  # red
    if error_file:
        # torchrun shows the message in this file at the end of its own report.
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": message}))
    else:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # at once: other threads, as of NCCL, may wait for ranks that are gone


def describe_error(error):
    """Return the line about an error that ends a run."""
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text += (f": free space on the disks of CACHE_DIR {CACHE_DIR} and RUN_DIR {RUN_DIR}, and start "
                 "again")
    elif isinstance(error, PermissionError):
        path = Path(error.filename or "").absolute()
        folders = {"CACHE_DIR": CACHE_DIR, "RUN_DIR": RUN_DIR}
        ours = [name for name, folder in folders.items() if Path(folder).absolute() in path.parents]
        if ours:
            text += f": set {ours[0]} to a folder in which this user can write all files"
        else:
            text += ": let this user read it"
    if type(error) is not ValueError:
        text = f"{type(error).__name__}: {text} (DEBUG=1 shows where)"
    return text


def exit_quietly(signal_number, frame):
    os._exit(0)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print_help()
        sys.exit()
    try:
        override(sys.argv[1:])
        main()
    except Exception as error:
        report(error)
    except KeyboardInterrupt:  # training itself saves first, see receive_signals
        print("stopped by Ctrl-C while it was not training: start it again", file=sys.stderr, flush=True)
        os._exit(130)
