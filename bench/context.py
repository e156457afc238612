"""Compare ways to extend a model's context: loss by position, before and after some training.

    python bench/context.py MODEL=hf-folder [LENGTH=32768] [STEPS=50] [ROWS=8] [NAME=VALUE ...]

LENGTH is the number of positions of the extended model and the tokens of a row, STEPS the optimizer
steps of each variant, and ROWS the number of held-out documents. Other arguments are constants of
train.py. The text is the source code of Python's standard library and of torch, so that nothing has
to be downloaded. Losses are those of the folders that train.py exports.

Writes context.jsonl and context.png to this folder, or to the one named by the environment variable
OUT. Runs on one GPU, or on a CPU if model and LENGTH are small.
"""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import convert
from model import Execution, Transformer

HERE = Path(__file__).resolve().parent
OUT = Path(os.environ.get("OUT") or HERE)

TRAINING = [
    "GLOBAL_BATCH_SIZE=1",
    "LEARNING_RATE=1e-4",
    "MIN_LEARNING_RATE_RATIO=0.1",
    "WARMUP_RATIO=0.1",
    "WEIGHT_DECAY=0.0",
    "RECOMPUTE=none",
    "SAVE_EVERY=0",
    "SAMPLE_PROMPTS=[]",
    "RESUME=never",
]
DOCUMENT_LIMIT = 600_000    # characters
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings"}    # folders
LOGITS_CHUNK = 1024         # tokens whose float32 logits exist at a time


class Options(NamedTuple):
    model: str = ""         # Hugging Face folder with a tokenizer
    length: int = 32768     # tokens of a row, and positions of the extended model
    steps: int = 50         # optimizer steps of each variant
    rows: int = 8           # held-out documents, of which the first `length` tokens are measured


def read_documents():
    """Return {name: text}. A package of the standard library or of torch is one document.

    Modules that are single files form one document for each first letter.
    """
    roots = {
        "": Path(sysconfig.get_paths()["stdlib"]),
        "torch/": Path(torch.__file__).parent,
    }
    texts = defaultdict(str)
    for prefix, root in roots.items():
        for file in sorted(root.rglob("*.py")):
            path = file.relative_to(root)
            if LEFT_OUT.intersection(path.parts):
                continue
            package = path.parts[0]
            if len(path.parts) == 1:
                package = f"modules of {path.name[0].lower()}"
            name = prefix + package
            if len(texts[name]) < DOCUMENT_LIMIT:
                texts[name] += f"# {path}\n{file.read_text(errors='replace')}\n"
    return {name: text[:DOCUMENT_LIMIT] for name, text in sorted(texts.items())}


def position_bands(length):
    """Return (first, end) of five bands: the last half of positions, the quarter before it, ..."""
    ends = [length // 16, length // 8, length // 4, length // 2, length]
    starts = [0, *ends[:-1]]
    return list(zip(starts, ends))


@torch.no_grad()
def measure(folder, rows, length, attention):
    """Return the mean loss in each band of positions, over rows of token ids (length + 1,)."""
    if torch.cuda.is_available():
        device = "cuda"
        dtype = torch.bfloat16
    else:
        device = "cpu"
        dtype = torch.float32
    model = Transformer(convert.load_config(folder), execution=Execution(attention))
    convert.load_weights(model, folder)
    model.to(device, dtype)

    bands = position_bands(length)
    sums = [0.0] * len(bands)
    positions = torch.arange(length, device=device)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    for row in rows:
        input_ids = row[:-1].to(device)
        labels = row[1:].to(device)
        logits = model(input_ids, positions, cu_seqlens, length)    # (length, V)
        losses = []
        for z, y in zip(logits.split(LOGITS_CHUNK), labels.split(LOGITS_CHUNK)):
            losses.append(F.cross_entropy(z.float(), y, reduction="none"))
        loss = torch.cat(losses)                                    # (length,)
        for i, (first, end) in enumerate(bands):
            sums[i] += loss[first:end].sum().item()
    means = [total / len(rows) / (end - first) for total, (first, end) in zip(sums, bands)]
    return [round(mean, 4) for mean in means]


def train(options, steps, constants, text, folder):
    """Run train.py for `steps` steps on the file `text`. Return the seconds of its steps.

    The run is in folder/run, and its exported model in folder/run/hf.
    """
    run = folder / "run"
    command = [
        sys.executable,
        str(HERE.parent / "train.py"),
        f"MODEL={options.model}",
        f"DATA={text}",
        f"RUN_DIR={run}",
        f"CACHE_DIR={folder / 'cache'}",
        f"MAX_LENGTH={options.length}",
        f"MAX_STEPS={steps}",
        f"MAX_POSITION_EMBEDDINGS={options.length}",
        *TRAINING,
        *constants,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line)["seconds"] for line in metrics)


def draw(lines, length, path):
    """Draw a panel for each number of steps, with a curve of loss by position for each variant."""
    from matplotlib.figure import Figure
    all_steps = sorted({line["steps"] for line in lines})
    figure = Figure(figsize=(5.5 * len(all_steps), 4.2))
    panels = figure.subplots(1, len(all_steps), sharey=True, squeeze=False)[0]
    names = [f"{first / 1024:g}-{end / 1024:g}k" for first, end in position_bands(length)]
    for axes, steps in zip(panels, all_steps):
        for line in lines:
            if line["steps"] == steps:
                axes.plot(names, line["loss"], marker="o", label=line["variant"])
        title = f"after {steps} steps" if steps > 0 else "before training"
        axes.set(title=title, xlabel="positions")
        axes.grid(alpha=0.3)

    # Beyond its context a model's loss is so high that the other curves would look the same.
    highest = panels[0].get_ylim()[1]
    limit = 2.5 * lines[0]["loss"][0]
    panels[0].set(ylabel="loss a token", ylim=(None, min(highest, limit)))
    panels[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_jsonl(path, objects):
    with open(path, "w") as f:
        for item in objects:
            f.write(json.dumps(item) + "\n")


def choose_held_out(tokens, options):
    """Return the names of documents longer than `length`, spread evenly over all such documents."""
    long = [name for name, ids in tokens.items() if len(ids) > options.length]
    stride = max(len(long) // options.rows, 1)
    return long[::stride][:options.rows]


def main(options, constants):
    """Measure every variant. `constants`: NAME=VALUE of train.py, the same for all of them."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    larger_base = {"rope_theta": 10 * convert.load_config(options.model).rope_theta}
    variants = {
        "as it is": "ROPE_SCALING=default",
        "base x 10": f"ROPE_SCALING={larger_base}",
        "linear": "ROPE_SCALING=linear",
        "dynamic": "ROPE_SCALING=dynamic",
        "yarn": "ROPE_SCALING=yarn",
    }
    attention = "auto"
    for constant in constants:
        if constant.startswith("ATTENTION="):
            attention = constant.removeprefix("ATTENTION=")

    # Some documents are held out and measured. The others are trained on.
    texts = read_documents()
    tokens = {name: tokenizer(text).input_ids for name, text in texts.items()}
    held_out = choose_held_out(tokens, options)
    rows = [torch.tensor(tokens[name][:options.length + 1]) for name in held_out]
    training_rows = [{"text": text} for name, text in texts.items() if name not in held_out]
    n_tokens = sum(len(ids) for ids in tokens.values())
    print(f"{n_tokens:,} tokens; held out: {', '.join(held_out)}", flush=True)

    lines = []
    numbers_of_steps = [0, options.steps] if options.steps > 0 else [0]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text_file = folder / "train.jsonl"
        write_jsonl(text_file, training_rows)
        for steps in numbers_of_steps:
            for variant, rope_scaling in variants.items():
                variant_constants = [rope_scaling, *constants]
                seconds = train(options, steps, variant_constants, text_file, folder)
                loss = measure(folder / "run" / "hf", rows, options.length, attention)
                shutil.rmtree(folder / "run")
                lines.append({
                    "variant": variant,
                    "steps": steps,
                    "bands": position_bands(options.length),
                    "loss": loss,
                    "model": Path(options.model).name,
                    "seconds": round(seconds, 1),
                    "constants": variant_constants,
                    "held_out": held_out,
                    "torch": torch.__version__,
                })
                # After each variant, so that an interrupted comparison leaves what it has measured
                write_jsonl(OUT / "context.jsonl", lines)
                draw(lines, options.length, OUT / "context.png")
                print(f"{variant:<10} {steps:>3} steps {seconds:>6.1f} s  {loss}", flush=True)


def parse_arguments(arguments, options=Options):
    """Return the options, and the arguments that are constants of train.py."""
    given = dict(argument.split("=", 1) for argument in arguments)
    values = {}
    for name, default in options()._asdict().items():
        text = given.pop(name.upper(), None)
        if text is not None:
            values[name] = type(default)(text)
    constants = [f"{name}={value}" for name, value in given.items()]
    return options(**values), constants


if __name__ == "__main__":
    options, constants = parse_arguments(sys.argv[1:])
    if not os.path.isdir(options.model):
        sys.exit(__doc__)
    main(options, constants)
