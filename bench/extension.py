"""Extend a model's context, and measure whether it uses the longer one: before and after.

    python bench/extension.py MODEL OUT [LENGTH=32768] [STEPS=50] [ROWS=4] [NAME=VALUE ...]

MODEL is a Hugging Face folder. LENGTH is the number of positions of the extended model and the
tokens of a row, STEPS the optimizer steps, and ROWS the rows of each. Other arguments are constants
of train.py. About half of the rows are documents of tools/tasks.py, of which the answers alone are
targets, and the others are the source code of torch; a document of either kind counts the same.

All results are written to the folder OUT: extended/hf is the model, and evaluation.json and
evaluation.png compare it with MODEL at LENGTH and a half, a quarter and an eighth of it. The
questions are not those of training. Runs on one GPU, or on a CPU if model and LENGTH are small.
"""
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import context

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import tasks  # noqa: E402

WRITERS = 8         # processes that write documents of tasks, each with a seed of its own

CHARACTERS_PER_TOKEN = 4    # of source code, about

TRAINING = [
    "PACKING=whole",
    "LOSS_WEIGHT=sample",   # else the few answers would be lost among the tokens of source code
    "LEARNING_RATE=3e-4",
    "WARMUP_RATIO=0.1",
    "WEIGHT_DECAY=0.0",
    "SAVE_EVERY=0",
    "SAMPLE_PROMPTS=[]",
    "RESUME=never",
]


class Options(NamedTuple):
    length: int = 32768     # tokens of a row, and positions of the extended model
    steps: int = 50         # optimizer steps
    rows: int = 4           # of each step


def write_data(model, folder, options):
    """Write the documents of tasks-*.jsonl and code.jsonl to a folder, and return both names."""
    n = options.steps * options.rows // 2
    with ProcessPoolExecutor(WRITERS) as pool:
        done = []
        for i in range(WRITERS):
            path = folder / f"tasks-{i}.jsonl"
            done.append(pool.submit(
                tasks.write_documents, model, path, options.length, -(-n // WRITERS), i + 1))
        for future in done:
            future.result()

    # Python's library is what tools/evaluate.py measures, so it is not trained on.
    room = n * options.length * CHARACTERS_PER_TOKEN
    with open(folder / "code.jsonl", "w") as file:
        for name, text in context.read_documents().items():
            if name.startswith("torch/") and room > 0:
                file.write(json.dumps({"text": text[:room]}) + "\n")
                room -= len(text)
    return [str(folder / "tasks-*.jsonl"), str(folder / "code.jsonl")]


def main(model, out, options, constants):
    out.mkdir(parents=True, exist_ok=True)
    data = write_data(model, out, options)
    subprocess.run([
        sys.executable, str(ROOT / "train.py"),
        f"MODEL={model}",
        f"DATA={data}",
        f"RUN_DIR={out / 'extended'}",
        f"CACHE_DIR={out / 'cache'}",
        f"MAX_LENGTH={options.length}",
        f"MAX_POSITION_EMBEDDINGS={options.length}",
        f"GLOBAL_BATCH_SIZE={options.rows}",
        f"MAX_STEPS={options.steps}",
        *TRAINING,
        *constants,
    ], check=True)

    lengths = [options.length // part for part in (8, 4, 2, 1)]
    subprocess.run([
        sys.executable, str(ROOT / "tools" / "evaluate.py"), model, str(out / "extended" / "hf"),
        f"LENGTHS={','.join(map(str, lengths))}",
        f"OUT={out}",
    ], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 3 or "=" in sys.argv[1] + sys.argv[2]:
        sys.exit(__doc__)
    model, out, *arguments = sys.argv[1:]
    options, constants = context.parse_arguments(arguments, Options)
    main(model, Path(out), options, constants)
