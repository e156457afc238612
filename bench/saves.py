"""Measure on one GPU what it costs training to save checkpoints in the background.

    python bench/saves.py [SECONDS [SAVES [NAME=VALUE ...]]]

Trains the shape of llama3.2-3b with 14 layers on random rows of 16k tokens, and saves a checkpoint
every SECONDS (60). The time of a step before the first save is compared with that from each save to
the next, for the first one and SAVES (2) more. The first one also pins CPU memory, and is told by
itself. Any constants of train.py can be set; LAYERS and SHAPE choose another model. The disk, that
of TMPDIR, has to hold two checkpoints of 20 GiB each. If it takes longer than SECONDS to write one,
the saves are further apart.

The time of a step is from its line in metrics.jsonl to the next, so that it contains what training
waits for. The field "seconds" leaves out saves. The run is ended by kill -9, without an export. If
the environment variable OUT names a folder, the result and the times of all steps also go there.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.run import HERE, write_config  # noqa: E402

WARM_UP_STEPS = 10
MANY_STEPS = 100_000  # more than the run does
DEFAULTS = {"SHAPE": "llama3.2-3b", "LAYERS": "14", "MAX_LENGTH": "16384", "GLOBAL_BATCH_SIZE": "1"}


def train(folder, seconds, saves, constants):
    """Train until a run has begun to save for so many times.

    Return the lines of metrics.jsonl, and {step of a checkpoint: seconds that its save took, to
    half a second} for those that are complete.
    """
    constants = {**DEFAULTS, **constants}
    model = write_config(folder / "model", constants.pop("SHAPE"), int(constants.pop("LAYERS")))
    run = folder / "run"
    command = [
        sys.executable, str(HERE.parent / "train.py"), f"MODEL={model}", "INIT=random",
        "DATA=synthetic", f"RUN_DIR={run}", f"CACHE_DIR={folder / 'cache'}", "SAVE_EVERY=0",
        f"SAVE_MINUTES={seconds / 60}", "KEEP_CHECKPOINTS=1", f"MAX_STEPS={MANY_STEPS}",
        *[f"{name}={value}" for name, value in constants.items()]]
    began = {}      # step: time
    took = {}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    while len(began) < saves:
        if process.poll() is not None:
            sys.exit(f"the run failed:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.5)
        for path in run.glob("checkpoints/step-*"):
            step = int(re.search(r"\d+", path.name)[0])
            began.setdefault(step, time.time())
            if path.suffix == "" and step not in took:
                took[step] = time.time() - began[step]
    process.kill()
    process.wait()
    lines = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in lines], sorted(began), took


def main(seconds=60.0, saves=2, **constants):
    # The run ends when another save begins, at which the last interval ends.
    with tempfile.TemporaryDirectory() as folder:
        lines, steps, took = train(Path(folder), seconds, saves + 2, constants)
    elapsed = [line["elapsed_seconds"] for line in lines]

    def seconds_a_step(first, last):
        return (elapsed[last - 1] - elapsed[first - 1]) / (last - first)

    alone = seconds_a_step(WARM_UP_STEPS, steps[0])
    first, *later = [seconds_a_step(*pair) for pair in zip(steps, steps[1:])]
    result = {
        "steps_saved": steps,
        "seconds_to_complete": [round(took[step], 1) for step in steps if step in took],
        "seconds_a_step_without_saves": alone,
        "seconds_a_step_with_first_save": first,
        "seconds_a_step_with_saves": later,
        "share": statistics.median(later) / alone - 1,
        "seconds_of_first_save": (first - alone) * (steps[1] - steps[0]),
    }
    print(json.dumps(result))
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "saves.json").write_text(json.dumps(result))
        (Path(os.environ["OUT"]) / "elapsed_seconds.json").write_text(json.dumps(elapsed))


if __name__ == "__main__":
    numbers = [argument for argument in sys.argv[1:] if "=" not in argument]
    assignments = [argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument]
    kinds = (float, int)
    main(*[kind(number) for kind, number in zip(kinds, numbers)], **dict(assignments))
