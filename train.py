"""longspan: train a Llama-shaped model on very long sequences.

    torchrun --nproc_per_node 8 train.py [NAME=VALUE ...]

Edit the constants, or set any of them on the command line. main() reads downwards: plan, data, model, loop, export.
"""
import ast
import difflib
import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

import convert
import data
import parallel
from model import Execution, Transformer, attention_kernel, attention_pairs, explaining, flops, memory

# What to train, on what, where to
MODEL = "demo"              # Hugging Face folder; "demo": a small Llama of our own, made on first use
INIT = "weights"            # "weights": the folder's; "random": from its config.json alone
DATA = "demo"               # files, globs, folders (README); a list, or {each: epochs}; or "demo", or "synthetic"
SYNTHETIC_DOCUMENT = 0      # tokens of each document of DATA="synthetic"; 0: MAX_LENGTH
RUN_DIR = "runs/demo"       # checkpoints, metrics and the trained hf/ folder
CACHE_DIR = "runs/cache"    # tokenized data and the demo, shared between runs

# Rows
MAX_LENGTH = 1024           # tokens of a row, and of the longest piece of a document
PACKING = "split"           # "split": concatenate and cut; "whole": fill rows with uncut documents; "none"
USE_VARLEN_ATTN = True      # a token attends to its own document only; False: to all before it in the row
BATCH_SIZE = 1              # documents of a row, PACKING "none" only
GROUP_BY_LENGTH = False     # PACKING "none": documents of one step are of like length
OVERLONG = "split"          # documents longer than MAX_LENGTH: in pieces; or "truncate", "truncate_middle", "drop"
APPEND_EOS = True           # a plain text ends with the tokenizer's eos, and it is trained
TRAIN_ON_PROMPT = False     # chat: every token is trained, not the assistant's only
MASK_HISTORY = False        # chat: the assistant's last turn only
MAX_POSITION_EMBEDDINGS = 0 # positions of a model that is to be extended; 0: the checkpoint's
ROPE_SCALING = None         # how: "linear" (None), "dynamic", "yarn", "llama3", {"factor": ...}, {"rope_theta": ...}
LOSS_WEIGHT = "token"       # of a target: "token" 1, "sample" 1/n, "square" 1/sqrt(n), n the targets of its document

# Spreading the work: world = replicas x dp x sp
SEQUENCE_PARALLEL_SIZE = 0  # ranks that share one row; 0: all (of a replica)
GLOBAL_BATCH_SIZE = 4       # rows of an optimizer step, whatever the ranks
ZERO_STAGE = 2              # 3: parameters freed after forward; 2: gradients sharded; 1: gradients whole until the last
REPLICAS = 1                # copies of the sharded states, for several hosts
RECOMPUTE = "all_but_attention"  # in backward: this, "all", or "none"; less memory, more work
KEEP_LAYERS = 0             # last layers that recompute nothing all the same: raise it until memory is full
OFFLOAD_ACTIVATIONS = False # what is kept for backward waits in host memory; a number: that of the first n layers only
OFFLOAD_OPTIMIZER = False   # parameters and optimizer states live in host memory
MLP_CHUNK = 0               # tokens that pass the MLP at a time; 0: all of a rank's
LOSS_CHUNK = 8192           # tokens whose logits exist at a time
COMPILE = True              # torch.compile on a GPU
ATTENTION = "auto"          # or flash_attn_4, flash_attn_3, flash_attn_2, torch_varlen, sdpa
DTYPE = "bfloat16"          # of matrix products; "float32" for exact tests

# Optimization
LEARNING_RATE = 6e-3        # peak
MIN_LEARNING_RATE = 3e-4    # at the end of the schedule
LR_SCHEDULE = "cosine"      # "linear", "constant", or "wsd": constant, then linear over the last fifth
WARMUP_RATIO = 0.05         # of all steps
BETAS = (0.9, 0.95)         # AdamW's
WEIGHT_DECAY = 0.1          # on matrices
MAX_GRAD_NORM = 1.0         # global norm that gradients are clipped to; 0: never
EPOCHS = 1.0                # passes over the data
MAX_STEPS = 360             # optimizer steps; -1: as EPOCHS gives; 0: load, check, export
SEED = 0                    # of the order of the data and of INIT="random"

# Along the way
EVAL_DATA = ""              # like DATA; "": none
EVAL_EVERY = 0              # steps between evaluations; the last step is evaluated too
SAMPLE_PROMPTS = ["def __init__(self, ", "import os\nimport sys\n\ndef main(", "class Error("]    # continued at the end
SAMPLE_TOKENS = 80          # tokens of each continuation
SAVE_EVERY = 200            # steps between checkpoints; the last step is always saved; -1: write none, nor hf/
KEEP_CHECKPOINTS = 2        # newest ones
RESUME = "auto"             # "auto": from the newest checkpoint of RUN_DIR; "never"; or the path of one

CONSTANTS = [name for name in globals() if name.isupper()]
CHOICES = {"INIT": ("weights", "random"), "PACKING": ("split", "whole", "none"), "ZERO_STAGE": (1, 2, 3),
           "OVERLONG": ("split", "truncate", "truncate_middle", "drop"), "LOSS_WEIGHT": ("token", "sample", "square"),
           "RECOMPUTE": ("all_but_attention", "all", "none"), "DTYPE": ("bfloat16", "float32"),
           "LR_SCHEDULE": ("cosine", "linear", "constant", "wsd")}
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12}    # dense bfloat16 FLOP/s
LOG = {"step": "step {:>6}", "epoch": "epoch {:6.3f}", "loss": "loss {:8.4f}", "eval_loss": "eval_loss {:8.4f}",
       "grad_norm": "norm {:8.3f}", "learning_rate": "lr {:.2e}", "seconds": "{:7.2f} s", "mfu": "mfu {:5.1%}",
       "tokens_per_second_per_gpu": "{:9,.0f} tok/s/rank", "peak_memory_gib": "{:6.1f} GiB", "skipped": "SKIPPED"}

def override(arguments):
    """Set constants from NAME=VALUE: a Python literal or a bare string, of the default's type."""
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name not in CONSTANTS or not equals:
            near = difflib.get_close_matches(name, CONSTANTS, 1, 0) or CONSTANTS
            raise ValueError(f"{argument!r} sets no constant of train.py: NAME=VALUE, the nearest name is {near[0]}")
        default, value = globals()[name], text
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default) and name not in ("DATA", "EVAL_DATA", "BETAS", "OFFLOAD_ACTIVATIONS",
                                                            "ROPE_SCALING"):
            raise ValueError(f"{name}={text} is no {type(default).__name__}: give one, like {default!r}")
        globals()[name] = value

def learning_rate(step, steps):
    """Of optimizer step `step` (from 1): warm-up, then the schedule. A function of the step alone."""
    warmup = round(WARMUP_RATIO * steps)
    if step <= warmup:
        return LEARNING_RATE * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    down = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 0.0,
            "wsd": max(0.0, (done - 0.8) / 0.2)}[LR_SCHEDULE]
    return LEARNING_RATE + (MIN_LEARNING_RATE - LEARNING_RATE) * down

def plan(world):
    """Check what the constants say before any process waits for another. -> folder, Config, sp, dp."""
    for name, values in CHOICES.items():
        if globals()[name] not in values:
            raise ValueError(f"{name} {globals()[name]!r} is unknown: use one of {', '.join(map(str, values))}")
    for name in ("MAX_LENGTH", "BATCH_SIZE", "GLOBAL_BATCH_SIZE", "REPLICAS", "LOSS_CHUNK", "EPOCHS"):
        if globals()[name] <= 0:
            raise ValueError(f"{name} {globals()[name]} is not positive: use 1 or more")
    if OFFLOAD_ACTIVATIONS and RECOMPUTE == "none":
        raise ValueError("OFFLOAD_ACTIVATIONS moves nothing with RECOMPUTE 'none': use 'all_but_attention' or 'all'")
    demo = Path(CACHE_DIR) / "demo"
    with FileLock(demo.with_suffix(".lock")):
        if "demo" in (MODEL, DATA, EVAL_DATA) and not (demo / "model.safetensors").exists():
            convert.write_demo(demo)
    folder = demo if MODEL == "demo" else Path(MODEL)
    config = convert.load_config(folder)
    convert.extend_context(config, MAX_POSITION_EMBEDDINGS, ROPE_SCALING, MAX_LENGTH)
    sp = SEQUENCE_PARALLEL_SIZE or max(world // REPLICAS, 1)
    dp = parallel.check(world, REPLICAS, sp, config.num_attention_heads, config.num_key_value_heads)
    if GLOBAL_BATCH_SIZE % dp:
        raise ValueError(f"GLOBAL_BATCH_SIZE {GLOBAL_BATCH_SIZE} is not a multiple of the {dp} rows in flight ({world} "
                         f"processes / SEQUENCE_PARALLEL_SIZE {sp}): use {-(-GLOBAL_BATCH_SIZE // dp) * dp}")
    if config.sliding_window and config.sliding_window >= MAX_LENGTH:
        config.sliding_window = None  # no query is far enough from any key
    return folder, config, sp, dp

def open_data(source, folder, config):
    """DATA or EVAL_DATA -> its data.Rows, tokenized now if they never were."""
    if source == "synthetic":
        length = SYNTHETIC_DOCUMENT or MAX_LENGTH
        n = -(-max(MAX_STEPS, 1) * GLOBAL_BATCH_SIZE * MAX_LENGTH // length)
        lengths, offsets = np.full(n, length), np.arange(n + 1) * length
        corpus = data.Corpus(config.vocab_size, offsets, lengths - 1, lengths, [(0, n, 1.0)], source)
    else:
        files = f"{CACHE_DIR}/demo/demo.jsonl" if source == "demo" else source
        corpus = data.build_corpus(files, folder, CACHE_DIR, APPEND_EOS, TRAIN_ON_PROMPT, MASK_HISTORY, OVERLONG,
                                   MAX_LENGTH * (OVERLONG != "split"), vocab_size=config.vocab_size)
    return data.Rows(corpus, PACKING, MAX_LENGTH, SEED, BATCH_SIZE, USE_VARLEN_ATTN, LOSS_WEIGHT,
                     GROUP_BY_LENGTH * GLOBAL_BATCH_SIZE)

def main():
    world = int(os.environ.get("WORLD_SIZE", 1))
    folder, config, sp, dp = plan(world)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if DTYPE == "bfloat16" else torch.float32
    kernel, _ = attention_kernel(ATTENTION, "cuda" if cuda else "cpu", dtype)
    rows = open_data(DATA, folder, config)
    held_out = open_data(EVAL_DATA, folder, config) if EVAL_DATA else None
    total_rows = rows.count(EPOCHS) if MAX_STEPS < 0 else MAX_STEPS * GLOBAL_BATCH_SIZE
    steps = -(-total_rows // GLOBAL_BATCH_SIZE)

    grid = parallel.init(REPLICAS, sp)
    first = grid.rank == 0
    say = print if first else lambda *_, **__: None
    offload = config.num_hidden_layers if OFFLOAD_ACTIVATIONS is True else int(OFFLOAD_ACTIVATIONS)
    execution = Execution(ATTENTION, RECOMPUTE, KEEP_LAYERS, offload, MLP_CHUNK, LOSS_CHUNK, COMPILE and cuda)
    with torch.device("meta"):
        model = Transformer(config, grid.sp_group, execution)
    parallel.shard(model, model.model["layers"], grid, dtype, ZERO_STAGE, OFFLOAD_OPTIMIZER)
    convert.load_weights(model, folder) if INIT == "weights" else model.init_weights(SEED)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    parts = memory(config, -(-MAX_LENGTH // sp), world // REPLICAS, execution, ZERO_STAGE, GLOBAL_BATCH_SIZE // dp)
    parts["optimizer states"] *= not OFFLOAD_OPTIMIZER
    needs = f"{sum(parts.values()):.1f} GiB = " + " + ".join(f"{size:.1f} {part}" for part, size in parts.items())
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{config.architecture} of {parameters / 1e6:,.1f}M parameters, {kernel}, {DTYPE}, {grid.device.type}\n"
        f"{config.max_position_embeddings:,} positions, theta {config.rope_theta:,.0f}, scaling {config.rope_scaling}\n"
        f"{world} ranks = {REPLICAS} replicas x {dp // REPLICAS} dp x {sp} sp\n"
        f"{GLOBAL_BATCH_SIZE} rows a step = {dp} in flight x accumulative_counts {GLOBAL_BATCH_SIZE // dp}; at most "
        f"{GLOBAL_BATCH_SIZE * MAX_LENGTH:,} tokens a step\n"
        f"{rows.describe()}\n{steps:,} steps\nmemory at the peak, on a GPU: {needs}")

    notes = json.loads(json.dumps({     # as a checkpoint's manifest will give it back
        "model": str(folder.resolve()), "config": vars(config), "data": [rows.corpus.key, rows.corpus.sources],
        "constants": {name: globals()[name] for name in CONSTANTS}}))
    done = resume(notes, model, optimizer, say)
    parallel.together("RUN_DIR", open_run, notes, done, rows.accounting(), only=0)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("second SIGTERM") if stop else stop.append(True))

    def prepare(step):
        """The step's micro-batches on the device, and over all ranks the sums of: weights, targets, tokens, pairs of
        attention, requests to stop. The sums go by the host, so that the GPU is not waited for."""
        batches = rows.step(step, GLOBAL_BATCH_SIZE, dp, grid.dp_rank, sp, grid.sp_rank, total_rows)
        sums = [(b.weights.double().sum().item(), (b.labels != data.IGNORE).sum().item(), len(b.input_ids),
                 attention_pairs(b.cu_seqlens.tolist(), config.sliding_window) / sp, 0) for b in batches]
        sums = parallel.all_sum(torch.tensor([*sums, (0, 0, 0, 0, len(stop))], dtype=torch.float64).sum(0)).tolist()
        return [to_device(b, grid.device) for b in batches], sums

    gpu = torch.cuda.get_device_name() if cuda and DTYPE == "bfloat16" else ""
    peak = next((rate for name, rate in PEAK.items() if name in gpu), None)
    skipped, began = 0, time.time()
    ahead = prepare(done + 1) if done < steps else None
    with explaining(needs):
        for step in range(done + 1, steps + 1):
            batches, (weight, targets, tokens, pairs, stopping) = ahead
            loss = torch.zeros((), device=grid.device)
            for i, b in enumerate(batches):
                parallel.accumulate(model, ZERO_STAGE, last=i == len(batches) - 1)
                # sum of weight x cross entropy over this rank's targets / weights of all the step's targets
                share = b.weights / max(weight, 1e-9)
                part = model(b.input_ids, b.position_ids, b.cu_seqlens, b.max_seqlen, b.labels, share)
                part.backward()
                loss += part.detach()
                del part  # and with it the graph
            parallel.all_sum(loss)
            norm = parallel.grad_norm(model.parameters())
            ahead = prepare(step + 1) if step < steps else None
            lr = learning_rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, norm = loss.item(), norm.item()   # the step's only wait for the device
            skip = not (targets and math.isfinite(loss) and math.isfinite(norm))
            if not skip:
                if 0 < MAX_GRAD_NORM < norm:
                    torch._foreach_mul_([p.grad for p in model.parameters()], MAX_GRAD_NORM / norm)
                optimizer.step()
            optimizer.zero_grad()
            skipped = skipped + 1 if skip and targets else 0
            now = time.time()
            seconds, began = now - began, now
            if first:
                work = flops(config, tokens, pairs, RECOMPUTE, KEEP_LAYERS)
                mfu, hfu = (peak and w / seconds / world / peak for w in work)
                log({"step": step, "epoch": step * GLOBAL_BATCH_SIZE / rows.per_epoch, "loss": loss, "grad_norm": norm,
                     "learning_rate": lr, "tokens": int(tokens), "target_tokens": int(targets), "seconds": seconds,
                     "tokens_per_second_per_gpu": tokens / seconds / world, "mfu": mfu, "hfu": hfu,
                     "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None, "skipped": skip,
                     "peak_host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})
            if skipped == 5:
                raise RuntimeError(f"5 steps in a row had a loss or gradient that is not finite, up to step {step}: "
                                   f"lower LEARNING_RATE {LEARNING_RATE}, or look at their data. Nothing was saved")
            if held_out and (step == steps or stopping or EVAL_EVERY and step % EVAL_EVERY == 0):
                evaluate(model, held_out, grid, step)
                began = time.time()
            if SAVE_EVERY >= 0 and (step == steps or stopping or SAVE_EVERY and step % SAVE_EVERY == 0):
                parallel.save_checkpoint(Path(RUN_DIR) / "checkpoints", step, model, optimizer, notes, KEEP_CHECKPOINTS)
                began = time.time()
            if stopping:
                say(f"stopped by SIGTERM after step {step}; the same command resumes")
                return parallel.close()
    if first and steps > done:
        plot()
    if SAVE_EVERY >= 0:
        parallel.together("export", convert.save_weights, model, folder, Path(RUN_DIR) / "hf")
        say(f"{RUN_DIR}/hf is a Hugging Face folder")
    if SAMPLE_PROMPTS and DATA != "synthetic":
        sample(model, folder, grid, say)
    parallel.close()

def to_device(batch, device):
    """Without waiting: from pinned memory, which the kernels of the step before hide."""
    move = lambda t: t.pin_memory().to(device, non_blocking=True) if torch.is_tensor(t) else t
    return data.Batch(*map(move, batch)) if device.type == "cuda" else batch

@torch.no_grad()
def evaluate(model, rows, grid, step):
    """sum of weight x cross entropy / sum of weights, over all rows of EVAL_DATA."""
    sums = torch.zeros(2, dtype=torch.float64, device=grid.device)
    for i in range(-(-rows.per_epoch // grid.dp)):
        b, = rows.step(i + 1, grid.dp, grid.dp, grid.dp_rank, grid.sp, grid.sp_rank, rows.per_epoch)
        b = to_device(b, grid.device)
        loss = model(b.input_ids, b.position_ids, b.cu_seqlens, b.max_seqlen, b.labels, b.weights)
        sums += torch.stack([loss, b.weights.sum()])
    loss, weight = parallel.all_sum(sums).tolist()
    if grid.rank == 0:
        log({"step": step, "eval_loss": loss / weight})

def plot():
    """RUN_DIR/loss.png, from metrics.jsonl."""
    from matplotlib import pyplot
    lines = [json.loads(line) for line in (Path(RUN_DIR) / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "eval_loss"):
        points = [(line["step"], line[key]) for line in lines if key in line]
        pyplot.plot(*zip(*points), label=key) if points else None
    pyplot.xlabel("step"), pyplot.ylabel("loss a target"), pyplot.grid(alpha=0.3), pyplot.legend()
    pyplot.savefig(Path(RUN_DIR) / "loss.png", dpi=120), pyplot.close()

def resume(notes, model, optimizer, say):
    """Load the checkpoint that RESUME names. -> the steps it has done."""
    home = Path(RUN_DIR) / "checkpoints"
    folder, manifest = parallel.find_checkpoint(home, RESUME)
    done = manifest["step"] if manifest else 0
    newer = sorted(f.name for f in home.glob(parallel.STEP) if int(f.name[5:]) > done)
    if newer:
        raise ValueError(f"{RUN_DIR} holds {newer[-1]}, which this run from step {done} would meet again: set RUN_DIR "
                         "to a new folder, or RESUME=auto to go on from there")
    if folder is None:
        return 0
    for key in ("config", "data"):
        if notes[key] != manifest[key]:
            raise ValueError(f"{folder} has another {key}, {manifest[key]}, not {notes[key]}: set RUN_DIR to a new one")
    for name, now in notes["constants"].items():
        if (then := manifest["constants"].get(name)) != now:
            say(f"since {folder.name}, {name} changed from {then!r} to {now!r}")
    parallel.load_checkpoint(folder, model, optimizer)
    say(f"resumed from {folder}")
    return done

def open_run(notes, done, accounting):
    """RUN_DIR is this process's until it ends: config.json, env.json, metrics.jsonl of the steps up to `done`."""
    run = Path(RUN_DIR)
    run.mkdir(parents=True, exist_ok=True)
    lock = open_run.lock = open(run / "lock", "a+")     # and lets go of the one before
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{run} is in use by {(run / 'lock').read_text()}: stop it, or set another RUN_DIR") from None
    (run / "lock").write_text(f"process {os.getpid()} of {os.uname().nodename}")
    (run / "config.json").write_text(json.dumps(notes["constants"], indent=2))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    (run / "env.json").write_text(json.dumps({
        "torch": torch.__version__, "python": sys.version.split()[0], "git": git.stdout.strip(), "data": notes["data"],
        "gpu": gpu, "accounting": accounting}, indent=2, default=int))
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    metrics.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= done))

def log(line):
    """A line of metrics.jsonl, and the same on the screen."""
    with open(Path(RUN_DIR) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    shown = (form.format(line[key]) for key, form in LOG.items() if line.get(key) not in (None, False))
    print("  ".join(shown), flush=True)

@torch.no_grad()
def sample(model, folder, grid, say, temperature=0.5):
    """Print continuations of SAMPLE_PROMPTS: a whole forward for each token."""
    from transformers import AutoTokenizer
    tokenizer, generator = AutoTokenizer.from_pretrained(folder), torch.Generator().manual_seed(SEED)
    for prompt in SAMPLE_PROMPTS:
        ids = tokenizer(prompt).input_ids
        for _ in range(SAMPLE_TOKENS):
            row = torch.tensor(ids + [0] * (-len(ids) % (128 * grid.sp)), device=grid.device)   # the text, and filling
            edges = torch.tensor([0, len(row)], dtype=torch.int32, device=grid.device)
            share = torch.arange(len(row), device=grid.device).chunk(grid.sp)[grid.sp_rank]
            logits = model(row[share], share, edges, len(row)).float()[share == len(ids) - 1].sum(0)    # or 0
            if grid.sp > 1:
                parallel.all_sum(logits, grid.sp_group)
            ids += torch.multinomial(torch.softmax(logits.cpu() / temperature, dim=-1), 1, generator=generator).tolist()
        say("-" * 80 + "\n" + tokenizer.decode(ids).split(tokenizer.eos_token or "\0")[0])

if __name__ == "__main__":
    try:
        override(sys.argv[1:])
        main()
    except Exception:
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(2)  # torchrun ends the others when one fails: let the first process speak
        raise
