"""What a run records of itself: metrics.jsonl, the lines on the screen, loss.png and env.json."""
import collections
import contextlib
import datetime
import errno
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

# The line that is printed for each step: keys of metrics.jsonl, in this order and format.
LOG_FORMAT = {
    "step": "step {}",
    "epoch": "epoch {:6.3f}",
    "loss": "loss {:8.4f}",
    "eval_loss": "eval_loss {:8.4f}",
    "eval_by_position": "by position: {}",
    "eval_by_source": "by source: {}",
    "grad_norm": "norm {:8.3f}",
    "learning_rate": "lr {:.2e}",
    "seconds": "{:7.2f} s",
    "mfu": "mfu {:5.1%}",
    "tokens_per_second_per_gpu": "{:9,.0f} tok/s/rank",
    "peak_memory_gib": "{:6.1f} GiB",
    "tokens_seen": "{:,} tokens",
    "elapsed_seconds": "elapsed {}",
    "seconds_left": "left {}",
    "skipped": "SKIPPED",
    "spike": "SPIKE",
    "memory_full": "MEMORY FULL",
}

# The time left is estimated without the first steps of a process, in which kernels are compiled.
WARM_UP_STEPS = 3

# A loss is a spike if it exceeds the median of the last SPIKE_WINDOW by so many times their median
# deviation from it. Unlike mean and standard deviation, earlier spikes hardly change these.
SPIKE_WINDOW = 100
SPIKE_DEVIATIONS = 8
SMALLEST_DEVIATION = 1e-3   # of the median: losses that are all the same deviate by nothing

WARNED = set()  # the subjects of warn_once

# Seconds between two drawings of loss.png, which takes about one.
PLOT_SECONDS = 300


class Log:
    """Where the first rank records a run: metrics.jsonl and from it the screen, loss.png,
    TensorBoard and Weights & Biases."""

    def __init__(self, run, steps, steps_done, wandb_project, constants):
        """run: RUN_DIR, a Path; steps: of the whole run; constants: {name: value}."""
        self.run = run
        self.steps = steps
        self.began = time.monotonic()
        self.drawn = self.began
        self.warm_step = steps_done + WARM_UP_STEPS
        self.warm_time = self.began  # when the warm step ended
        earlier = read_metrics(run)
        self.tokens_seen = sum(line.get("tokens", 0) for line in earlier)
        losses = [line["loss"] for line in earlier if math.isfinite(line.get("loss", math.nan))]
        self.losses = collections.deque(losses, maxlen=SPIKE_WINDOW)  # of the last steps
        self.evaluated = {line["step"] for line in earlier if "eval_loss" in line}
        self.tensorboard = None
        with warning_if_not_written():
            self.tensorboard = open_tensorboard(run, steps_done)
        self.wandb = None
        if wandb_project:
            import wandb
            self.wandb = wandb.init(
                project=wandb_project, name=run.name, dir=run, config=constants)

    def step(self, line):
        """Record a training step: its metrics, and how far the run is."""
        now = time.monotonic()
        step = line["step"]
        self.tokens_seen += line["tokens"]
        if step == self.warm_step:
            self.warm_time = now
        seconds_left = None
        if step > self.warm_step:
            seconds_left = (now - self.warm_time) / (step - self.warm_step) * (self.steps - step)
        self.write({
            **line,
            "tokens_seen": self.tokens_seen,
            "elapsed_seconds": now - self.began,
            "seconds_left": seconds_left,
            "spike": self.is_spike(line["loss"]),
        })

    def is_spike(self, loss):
        """Return whether a loss is far above those of the steps before it, and remember it."""
        spike = False
        if len(self.losses) >= SPIKE_WINDOW // 4:
            median = np.median(self.losses)
            deviation = np.median(np.abs(self.losses - median))
            deviation = max(deviation, SMALLEST_DEVIATION * median)
            spike = loss > median + SPIKE_DEVIATIONS * deviation
        if math.isfinite(loss):
            self.losses.append(loss)
        return bool(spike)

    def draw_if_due(self):
        """Draw loss.png if it is old. Return whether it was drawn."""
        due = time.monotonic() - self.drawn > PLOT_SECONDS
        if due:
            with warning_if_not_written():
                plot(self.run, read_metrics(self.run))
            self.drawn = time.monotonic()
        return due

    def write(self, line):
        """Append the dict `line` to metrics.jsonl, print it and pass it on."""
        with warning_if_not_written():
            append(self.run / "metrics.jsonl", json.dumps(line) + "\n")
        show(format_line(line, self.steps))
        numbers = flatten(line)
        if self.tensorboard is not None:
            with warning_if_not_written():
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(name, value, line["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=line["step"])

    def close(self):
        """Draw loss.png once more, and complete what TensorBoard and Weights & Biases have."""
        with warning_if_not_written():
            lines = read_metrics(self.run)
            if lines:
                plot(self.run, lines)
        if self.tensorboard is not None:
            with warning_if_not_written():
                self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def remove_lines(path, after_step):
    """Remove the lines of metrics.jsonl after a step, and what is not a line of metrics.

    A machine that lost power, or a full disk, may have left a part of a line.
    """
    kept = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            print(f"WARNING: {path}:{number} is no line of metrics, and is removed.", flush=True)
            continue
        if step <= after_step:
            kept.append(line + b"\n")
    part = path.with_suffix(".part")
    part.write_bytes(b"".join(kept))
    part.rename(path)


def append(path, text):
    """Append text to a file. Raise OSError if it is not written as a whole, and then remove it."""
    content = text.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextlib.contextmanager
def warning_if_not_written():
    """Warn once of an OSError in the body and go on: training does not need what it records."""
    try:
        yield
    except OSError as error:
        warn_once(f"{error}: training goes on without it")


def warn_once(text, subject=None):
    """Print a warning, but not a second one of the same subject, by default the text."""
    subject = subject or text
    if subject not in WARNED:
        WARNED.add(subject)
        show(f"WARNING: {text}")


def show(text, end="\n"):
    """Print, where that is possible: training goes on after its terminal or its pipe is closed."""
    with contextlib.suppress(OSError):
        print(text, end=end, flush=True)


def open_tensorboard(run, steps_done):
    """Return a writer of TensorBoard events, or None if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard", purge_step=steps_done + 1)


def read_metrics(run):
    """Return the lines of metrics.jsonl as dicts."""
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def format_line(line, steps):
    """Return a line of metrics.jsonl as it is printed, in the order and format of LOG_FORMAT."""
    total = f"{steps:,}"
    shown = {**line, "step": f"{line['step']:>{len(total)},}/{total}"}
    for key in ("elapsed_seconds", "seconds_left"):
        if line.get(key) is not None:
            shown[key] = datetime.timedelta(seconds=round(line[key]))
    for key in ("eval_by_position", "eval_by_source"):
        losses = shown.pop(key, {})
        if len(losses) > 1:  # a single one is the eval_loss
            shown[key] = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    # What a line does not have, or has as None or False, is not shown.
    parts = []
    for key, template in LOG_FORMAT.items():
        value = shown.get(key)
        if value is not None and value is not False:
            parts.append(template.format(value))
    return "  ".join(parts)


def flatten(line):
    """Return {name: number} of a line of metrics.jsonl. Nested names are joined by a slash."""
    numbers = {}
    for key, value in line.items():
        if isinstance(value, dict):
            for name, number in value.items():
                numbers[f"{key}/{name}"] = number
        elif isinstance(value, (int, float)) and key != "step":
            numbers[key] = float(value)
    return numbers


# ------------------------------------------------------------------------------------- loss.png

def plot(run, lines):
    """Draw loss.png of a run from the lines of metrics.jsonl.

    Skipped steps are red marks at the top of the panel of the loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(11, 9), layout="constrained")
    figure.suptitle(run)
    grid = figure.add_gridspec(3, 2, height_ratios=(1.6, 1, 1))
    panels = {
        "loss per target": figure.add_subplot(grid[0, :]),
        "learning rate": figure.add_subplot(grid[1, 0]),
        "gradient norm": figure.add_subplot(grid[1, 1]),
        "tokens per second per GPU": figure.add_subplot(grid[2, 0] if evaluations else grid[2, :]),
    }
    if evaluations:
        panels["evaluation loss by position"] = figure.add_subplot(grid[2, 1])
    for title, axes in panels.items():
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    plot_losses(panels["loss per target"], training, evaluations)
    plot_key(panels["learning rate"], training, "learning_rate")
    panels["learning rate"].ticklabel_format(axis="y", scilimits=(0, 0))
    plot_key(panels["gradient norm"], training, "grad_norm")
    panels["gradient norm"].set_yscale("log")
    axis = panels["gradient norm"].yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")   # 0.1, not 10^-1
    axis.set_minor_formatter(NullFormatter())
    plot_key(panels["tokens per second per GPU"], training, "tokens_per_second_per_gpu")
    panels["tokens per second per GPU"].set_ylim(bottom=0)
    if evaluations:
        plot_positions(panels["evaluation loss by position"], evaluations)
    figure.savefig(run / "loss.png", dpi=120)


def plot_key(axes, lines, key, **style):
    """Draw a metric over the steps."""
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], lw=1, **style)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_losses(axes, training, evaluations):
    """Draw the loss of each step, its moving average, the evaluations, and what was skipped."""
    plot_key(axes, training, "loss", color="tab:blue", alpha=0.35, label="each step")
    finite = [line for line in training if math.isfinite(line["loss"])]
    if len(finite) > 20:
        window = max(len(finite) // 50, 5)
        losses = [line["loss"] for line in finite]
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        steps = [line["step"] for line in finite[window - 1:]]
        axes.plot(steps, smooth, color="tab:blue", label=f"mean of {window} steps")
    if evaluations:
        plot_key(axes, evaluations, "eval_loss", color="tab:orange", marker="o", ms=4,
                 label="evaluation")
        sources = evaluations[-1]["eval_by_source"]
        for i, name in enumerate(sources if len(sources) > 1 else ()):
            points = [{"step": line["step"], **line["eval_by_source"]} for line in evaluations]
            plot_key(axes, points, name, color=f"C{i + 2}", marker=".", ls="--",
                     label=f"evaluation of {last_parts(name)}")
    skipped = [line["step"] for line in training if line["skipped"]]
    if skipped:
        axes.plot(skipped, np.ones(len(skipped)), "v", color="red", clip_on=False,
                  transform=axes.get_xaxis_transform(), label="skipped")
    axes.legend(fontsize=8)


def last_parts(source):
    """Return a file and its folder: of /data/code/*.jsonl, the last part alone says too little."""
    return "/".join(Path(source).parts[-2:])


def plot_positions(axes, evaluations):
    """Draw the loss by position of the first evaluation and of the last three, the last darkest."""
    shown = evaluations[:1] + evaluations[1:][-3:]
    for i, line in enumerate(shown):
        losses = line["eval_by_position"]
        axes.plot(list(losses), list(losses.values()), marker="o", ms=4, lw=1, color="tab:orange",
                  alpha=(i + 1) / len(shown), label=f"step {line['step']:,}")
    axes.legend(fontsize=8)
    axes.set_xlabel("tokens before the target that it can attend to")


# ------------------------------------------------------------------------------------- env.json

def describe_environment():
    """Return the versions, the hardware and the state of this repository that a run depends on."""
    # The commit, and "-dirty" after it if a file of the repository differs from it.
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = {}
    for package in importlib.metadata.distributions():
        packages[package.metadata["Name"]] = package.version
    n_gpus = torch.cuda.device_count()
    return {
        "git": git.stdout.strip(),
        "command": sys.argv,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if n_gpus > 0 else None,
        "gpus_of_first_host": [torch.cuda.get_device_name(i) for i in range(n_gpus)],
        "world": int(os.environ.get("WORLD_SIZE", 1)),
        "host": os.uname().nodename,
        "packages": dict(sorted(packages.items())),
    }
