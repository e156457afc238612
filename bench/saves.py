"""Measure on one GPU what it costs training to save checkpoints in the background.

    python bench/saves.py [SECONDS [SAVES [ROUNDS [NAME=VALUE ...]]]]

A round is a run without checkpoints, for SECONDS (60), and one that saves a checkpoint about every
SECONDS, until SAVES (3) of them have been followed by as many seconds of training. The first one
also pins CPU memory, and is told by itself. Both train the shape of llama3.2-3b with 14 layers on
random rows of 16k tokens. Any constants of train.py can be set; LAYERS and SHAPE choose another
model. The disk, that of TMPDIR, has to hold two checkpoints of 20 GiB each, and has to write one
within SECONDS: otherwise the next save waits for it.

The time of a step is from its line in metrics.jsonl to the next, so that it contains what training
waits for. The field "seconds" leaves out saves. The runs are ended by kill -9, without an export.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.run import HERE, write_config  # noqa: E402

WARM_UP_STEPS = 10
MANY_STEPS = 100_000  # more than any of the runs does
DEFAULTS = {"SHAPE": "llama3.2-3b", "LAYERS": "14", "MAX_LENGTH": "16384", "GLOBAL_BATCH_SIZE": "1"}


def train(folder, constants, is_done):
    """Train until is_done(the lines of metrics.jsonl). Returns those lines."""
    constants = {**DEFAULTS, **constants}
    model = write_config(folder / "model", constants.pop("SHAPE"), int(constants.pop("LAYERS")))
    run = folder / "run"
    command = [
        sys.executable, str(HERE.parent / "train.py"), f"MODEL={model}", "INIT=random",
        "DATA=synthetic", f"RUN_DIR={run}", f"CACHE_DIR={folder / 'cache'}", "SAVE_MINUTES=0",
        "KEEP_CHECKPOINTS=1", f"MAX_STEPS={MANY_STEPS}",
        *[f"{name}={value}" for name, value in constants.items()]]
    metrics = run / "metrics.jsonl"
    lines = []
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    while not is_done(lines):
        if process.poll() is not None:
            sys.exit(f"the run failed:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.5)
        if metrics.exists():
            whole_lines = metrics.read_text().rpartition("\n")[0].splitlines()
            lines = [json.loads(line) for line in whole_lines]
    process.kill()
    process.wait()
    return lines


def seconds_a_step(lines, first, last):
    """Returns the mean time of the steps after step `first` to step `last`."""
    elapsed = [line["elapsed_seconds"] for line in lines]
    return (elapsed[last - 1] - elapsed[first - 1]) / (last - first)


def without_saves(seconds, constants):
    """Returns the time of a step of a run that saves nothing."""
    def is_done(lines):
        if len(lines) <= WARM_UP_STEPS:
            return False
        warm = lines[WARM_UP_STEPS - 1]
        return lines[-1]["elapsed_seconds"] - warm["elapsed_seconds"] > seconds

    with tempfile.TemporaryDirectory() as folder:
        lines = train(Path(folder), {**constants, "SAVE_EVERY": -1}, is_done)
    return seconds_a_step(lines, WARM_UP_STEPS, len(lines))


def with_saves(steps, saves, constants):
    """Returns the time of a step from each save to the next. A checkpoint is saved every `steps`.

    The times of all steps are written to OUT, if the environment variable names a folder.
    """
    last = (saves + 1) * steps

    def is_done(lines):
        return len(lines) >= last

    with tempfile.TemporaryDirectory() as folder:
        lines = train(Path(folder), {**constants, "SAVE_EVERY": steps}, is_done)
        saved = [path.name for path in Path(folder).glob("run/checkpoints/step-*[0-9]")]
    print(f"checkpoints at the end: {', '.join(saved)}", flush=True)
    if "OUT" in os.environ:
        elapsed = [line["elapsed_seconds"] for line in lines]
        (Path(os.environ["OUT"]) / "elapsed_seconds.json").write_text(json.dumps(elapsed))
    return [seconds_a_step(lines, first, first + steps) for first in range(steps, last, steps)]


def main(seconds=60.0, saves=3, rounds=1, **constants):
    alone = []
    first = []
    saving = []
    for _ in range(rounds):
        alone.append(without_saves(seconds, constants))
        print(f"{alone[-1]:.3f} seconds a step without saves", flush=True)
        steps = max(round(seconds / alone[-1]), 1)
        first_save, *later = with_saves(steps, saves, constants)
        first.append(first_save)
        saving += later
        print(f"seconds a step: {alone} without saves, {first} with the first save, {saving} with "
              f"later ones, one every {steps} steps", flush=True)
    step = statistics.median(alone)
    result = {
        "seconds_without_saves": step,
        "seconds_with_saves": statistics.median(saving),
        "share": statistics.median(saving) / step - 1,
        "seconds_of_first_save": statistics.median((mean - step) * steps for mean in first),
    }
    print(json.dumps(result))
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "saves.json").write_text(json.dumps(result))


if __name__ == "__main__":
    numbers = [argument for argument in sys.argv[1:] if "=" not in argument]
    assignments = [argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument]
    kinds = (float, int, int)
    main(*[kind(number) for kind, number in zip(kinds, numbers)], **dict(assignments))
