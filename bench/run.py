"""Measure the speed and memory of train.py. Results are appended to results.jsonl.

    python bench/run.py "llama3.2-3b 1 8192 RECOMPUTE=none" "llama2-7b 4 131072 MAX_STEPS=4" ...

Each argument is one measurement: a model shape, the number of GPUs (which all share each sequence),
the sequence length in tokens, and any constants of train.py. NUM_LAYERS=n keeps only the first n
layers of the shape. MEDIAN_DOCUMENT=n fills the rows with documents of log-normal lengths, whose
median is n tokens. Weights and documents are random. Every run is a train.py process of its own.

Rows of results.jsonl that say OFFLOAD_ACTIVATIONS=True are older: it offloaded all layers, as -1
does now.

Speeds are medians over the steps after the third; a run of three steps or fewer counts its last.
If the environment variable OUT names a folder, the result and the output of the run also go there.
"""
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The sizes of a model. The head size is HEAD_DIM for every shape."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int          # width of the MLP's hidden layer
    vocabulary: int
    tied: bool          # the embedding is also the output head


class Settings(NamedTuple):
    """What one measurement runs, as written in the "row" field of results.jsonl."""
    shape: str          # a key of SHAPES
    gpus: int
    tokens: int         # sequence length
    constants: dict     # name: value, both strings; constants of train.py, and OWN_OPTIONS


SHAPES = {
    "llama3.2-3b": Shape(28, 3072, 24, 8, 8192, 128256, True),
    "llama2-7b": Shape(32, 4096, 32, 32, 11008, 32000, False),
    "llama3.1-8b": Shape(32, 4096, 32, 8, 14336, 128256, False),
    "tiny": Shape(2, 256, 4, 2, 512, 1024, False),
}
HEAD_DIM = 128
PEAK = 989e12       # dense bfloat16 FLOP/s of an H100 or H200
LENGTH_SPREAD = 1.2     # standard deviation of the logarithm of a length, with MEDIAN_DOCUMENT
WARM_UP_STEPS = 3   # steps that the medians leave out: they compile, allocate and pin memory
# Where a row does not say otherwise. Rows of results.jsonl without RECOMPUTE ran with this one.
DEFAULTS = {"MAX_STEPS": "7", "GLOBAL_BATCH_SIZE": "1", "RECOMPUTE": "all_but_attention"}
OWN_OPTIONS = ("NUM_LAYERS", "MEDIAN_DOCUMENT")     # of a row, not constants of train.py
# Constants of train.py that RECOMPUTE=auto chooses.
MEMORY_SETTINGS = ("RECOMPUTE", "KEEP_LAYERS", "ZERO_STAGE", "MLP_CHUNK", "OFFLOAD_ACTIVATIONS",
                   "OFFLOAD_OPTIMIZER")
PACKAGES = ("torch", "triton", "flash-attn-4")  # whose versions are recorded
HERE = Path(__file__).resolve().parent


def parse_settings(row):
    """Return the Settings of a row, "shape gpus tokens NAME=VALUE ..."."""
    shape, gpus, tokens, *assignments = row.split()
    constants = dict(assignment.split("=", 1) for assignment in assignments)
    return Settings(shape, int(gpus), int(tokens), constants)


def block_parameters(shape):
    """Return the number of parameters of one block that take part in matrix products."""
    attention = 2 * shape.width * HEAD_DIM * (shape.heads + shape.kv_heads)
    mlp = 3 * shape.width * shape.inner
    return attention + mlp


def write_config(folder, shape, layers=None):
    """Write a config.json for a shape of SHAPES, enough for INIT=random. Return the folder."""
    sizes = SHAPES[shape]
    if layers is None:
        layers = sizes.layers
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": sizes.width,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": sizes.inner,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": sizes.tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 2**24,   # more than any row has: nothing is extended
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # breakdown.py calls this on every rank. A rename is atomic, so no rank reads a partial file.
    temporary = folder / f"config.{os.getpid()}"
    temporary.write_text(json.dumps(config))
    temporary.rename(folder / "config.json")
    return folder


def document_lengths(settings):
    """Return the lengths of documents that fill the rows of a run; None without MEDIAN_DOCUMENT.

    They fill each row exactly, as the last document is cut.
    """
    constants = {**DEFAULTS, **settings.constants}
    if "MEDIAN_DOCUMENT" not in constants:
        return None
    median = int(constants["MEDIAN_DOCUMENT"])
    rows = int(constants["MAX_STEPS"]) * int(constants["GLOBAL_BATCH_SIZE"])
    random = np.random.default_rng(0)
    lengths = []
    for _ in range(rows + 1):   # one more than needed, as packing may leave a few tokens empty
        left = settings.tokens
        while left > 0:
            length = round(random.lognormal(math.log(median), LENGTH_SPREAD))
            lengths.append(min(max(length, 16), left))
            left -= lengths[-1]
    return lengths


def write_documents(path, lengths, vocabulary):
    """Write documents of random tokens, one JSON object a line, and return the path."""
    random = np.random.default_rng(0)
    # As in write_config, every rank of breakdown.py writes the same file.
    temporary = path.with_suffix(f".{os.getpid()}")
    with open(temporary, "w") as f:
        for length in lengths:
            tokens = random.integers(vocabulary, size=length).tolist()
            f.write(json.dumps({"input_ids": tokens}) + "\n")
    temporary.rename(path)
    return path


def append_line(path, result):
    with open(path, "a") as f:
        f.write(json.dumps(result) + "\n")


def median(lines, key):
    """Return the median of a field of metrics.jsonl, or None if it is null, as MFU on a CPU."""
    if lines[0][key] is None:
        return None
    return statistics.median(line[key] for line in lines)


def train(settings, layers, documents, folder):
    """Run train.py with its files in `folder`. Return the command and the completed process.

    documents: their lengths; None: all have the length that SYNTHETIC_DOCUMENT says.
    """
    model = write_config(folder / "model", settings.shape, layers)
    data = ["DATA=synthetic"]
    if documents:
        vocabulary = SHAPES[settings.shape].vocabulary
        path = write_documents(folder / "documents.jsonl", documents, vocabulary)
        data = [f"DATA={path}", "PACKING=whole"]
    if settings.gpus > 1:
        launcher = ["torchrun", "--nproc_per_node", str(settings.gpus)]
    else:
        launcher = [sys.executable]
    constants = {**DEFAULTS, **settings.constants}
    for name in OWN_OPTIONS:
        constants.pop(name, None)
    command = [
        *launcher,
        str(HERE.parent / "train.py"),
        f"MODEL={model}",
        "INIT=random",
        *data,
        f"MAX_LENGTH={settings.tokens}",
        f"RUN_DIR={folder / 'run'}",
        f"CACHE_DIR={folder / 'cache'}",
        "SAVE_EVERY=-1",
        *[f"{name}={value}" for name, value in constants.items()],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return command, done


def measure(row, out):
    """Run one row and append its result to results.jsonl. Return the result.

    A run that fails prints the end of its output. The steps that it completed are still recorded;
    if there are none, the result is None.
    """
    settings = parse_settings(row)
    layers = int(settings.constants.get("NUM_LAYERS", SHAPES[settings.shape].layers))
    documents = document_lengths(settings)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        began = time.time()
        command, done = train(settings, layers, documents, folder)
        wall = round(time.time() - began)

        metrics = folder / "run" / "metrics.jsonl"
        lines = []
        if metrics.exists():
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        if lines:
            environment = json.loads((folder / "run" / "env.json").read_text())
            del environment["command"]  # it names folders of this machine; see "command" below
            packages = environment["packages"]
            environment["packages"] = {name: packages.get(name) for name in PACKAGES}
            # The constants of the run, with those that RECOMPUTE=auto has chosen.
            constants = json.loads((folder / "run" / "config.json").read_text())

    output = done.stdout + done.stderr
    if out:
        name = row.replace(" ", "_").replace("=", "-")
        (Path(out) / f"{name}.log").write_text(output)
    if done.returncode != 0:
        print(f"{row}: exit {done.returncode}", *output.splitlines()[-25:], sep="\n", flush=True)
    if not lines:
        return None

    warm = lines[WARM_UP_STEPS:] or lines[-1:]
    # Paths of this machine are left out of the recorded command.
    recorded_command = " ".join(word for word in command if "/" not in word)
    result = {
        "row": row,
        "layers": layers,
        "seconds": median(warm, "seconds"),
        "tokens_per_second_per_gpu": median(warm, "tokens_per_second_per_gpu"),
        "mfu": median(warm, "mfu"),
        "hfu": median(warm, "hfu"),
        "peak_memory_gib": lines[-1]["peak_memory_gib"],
        "reserved_memory_gib": lines[-1]["reserved_memory_gib"],
        "used_memory_gib": lines[-1]["used_memory_gib"],
        "steps_memory_full": sum(line["memory_full"] for line in warm),
        "peak_host_memory_gib": lines[-1]["peak_host_memory_gib"],
        "loss": [round(line["loss"], 5) for line in lines],
        "grad_norm": [round(line["grad_norm"], 4) for line in lines],
        "steps_measured": len(warm),
        "wall": wall,
        "env": environment,
        "command": recorded_command,
        "memory_settings": {name: constants[name] for name in MEMORY_SETTINGS},
    }
    if documents:
        # The mean length of a document, weighted by its tokens.
        result["document"] = round(sum(n * n for n in documents) / sum(documents))
    append_line(HERE / "results.jsonl", result)
    if out:
        append_line(Path(out) / "results.jsonl", result)
    print(describe(result), flush=True)
    return result


def describe(result):
    """Return a line for the screen. What a CPU does not measure is shown as zero."""
    return (
        f"{result['row']}: {result['seconds']:.3f} s"
        f"  {result['tokens_per_second_per_gpu']:,.0f} tok/s/GPU"
        f"  mfu {result['mfu'] or 0:.1%}"
        f"  hfu {result['hfu'] or 0:.1%}"
        f"  {result['peak_memory_gib'] or 0:.1f} GiB"
        f"  host {result['peak_host_memory_gib']:.0f} GiB"
        f"  loss {result['loss'][0]}..{result['loss'][-1]}"
        f"  wall {result['wall']} s"
    )


if __name__ == "__main__":
    for row in sys.argv[1:]:
        measure(row, os.environ.get("OUT"))
