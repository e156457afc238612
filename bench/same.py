"""Fingerprint what a checkout computes, to show that a change of its source changes no result.

    python bench/same.py CHECKOUT OUT.json [NAME=TOKENIZER_FOLDER ...] [DATA=SAMPLE_FOLDER]
    python bench/same.py compare BEFORE.json AFTER.json

The fingerprint consists of the demo's loss and gradient norm over 40 steps and its exported
weights, on one rank and on two; the rows into which 100,000 random lengths are packed, in every
mode; and the token caches of the files of SAMPLE_FOLDER, under the demo's tokenizer and every one
that is given. The second command exits with 1 if anything differs.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

DEMO = [
    "MODEL=demo",
    "DATA=demo",
    "INIT=weights",
    "MAX_LENGTH=512",
    "GLOBAL_BATCH_SIZE=4",
    "MAX_STEPS=40",
    "LEARNING_RATE=6e-3",
    "WARMUP_RATIO=0.05",
    "DTYPE=bfloat16",
    "SAVE_EVERY=0",
    "SAMPLE_PROMPTS=[]",
    "RECOMPUTE=all_but_attention",
]


class CacheSettings(NamedTuple):
    """The settings of data.build_corpus, in its order."""
    append_eos: bool
    train_on_prompt: bool
    mask_history: bool
    overlong: str
    cap: int


CACHE_SETTINGS = [
    CacheSettings(True, False, False, "split", 0),
    CacheSettings(True, False, True, "truncate_middle", 256),
]


def hash_text(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_arrays(arrays):
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def demo(checkout, ranks, folder):
    """Train the demo. Return its losses and gradient norms, and a hash of its exported weights."""
    run = folder / f"run-{ranks}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        str(checkout / "train.py"),
        *DEMO,
        f"RUN_DIR={run}",
        f"CACHE_DIR={folder / 'cache'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)

    metrics = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "loss" in line:
            metrics.append((line["loss"], line["grad_norm"]))
    tensors = {}
    for file in sorted((run / "hf").glob("*.safetensors")):
        tensors.update(load_file(file))
    weights = hash_arrays(tensors[name] for name in sorted(tensors))
    return {"metrics": metrics, "weights": weights}


def token_cache(data, file, tokenizer, settings, folder):
    corpus = data.build_corpus(str(file), str(tokenizer), str(folder), *settings)
    documents = []
    for document, length in enumerate(np.diff(corpus.offsets)):
        documents.append(corpus.read(document, 0, length))
    return hash_arrays([*documents, corpus.offsets, corpus.targets, corpus.full])


def to_integers(piece):
    """Return a piece as a plain tuple: its hash must not depend on how `data` stores it."""
    return tuple(int(number) for number in piece)


def packing(data, **settings):
    """Return hashes of one and a half epochs of 100,000 documents of log-normal lengths."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(6.5, 1.2, 100_000).astype(np.int64), 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sources = [(0, 60_000, 1.0), (60_000, 100_000, 0.7)]  # first document, end, epochs
    corpus = data.Corpus(97, offsets, lengths - 1, lengths, sources, "synthetic")
    rows = data.Rows(corpus, max_length=8192, seed=5, **settings)
    n_rows = rows.count(1.5)

    pieces_of_rows = []
    for row in range(n_rows):
        pieces_of_rows.append([to_integers(piece) for piece in rows.find(row)])

    global_batch_size = 16
    dp = 2
    dp_rank = 1
    sp = 4
    sp_rank = 3
    fields = []
    for step in (1, 7):
        for batch in rows.step(step, global_batch_size, dp, dp_rank, sp, sp_rank, n_rows):
            fields.append(batch.input_ids.numpy())
            fields.append(batch.labels.numpy())
            fields.append(batch.position_ids.numpy())
            fields.append(batch.cu_seqlens.numpy())
            fields.append(batch.weights.numpy())

    accounting = sorted((name, str(value)) for name, value in rows.accounting().items())
    return {
        "rows": hash_text(repr(pieces_of_rows)),
        "batches": hash_arrays(fields),
        "accounting": hash_text(repr(accounting)),
    }


def fingerprint(checkout, tokenizers, samples):
    """Return {what: hashes or numbers}. tokenizers: {name: folder}. samples: a folder, or None."""
    sys.path.insert(0, str(checkout))
    import data
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for ranks in (1, 2):
            found[f"demo, {ranks} ranks"] = demo(checkout, ranks, folder)

        tokenizers = {"demo": folder / "cache" / "demo", **tokenizers}
        files = sorted(samples.glob("*.json*")) if samples is not None else []
        for file in files:
            for name, tokenizer in tokenizers.items():
                for settings in CACHE_SETTINGS:
                    what = f"{file.name}, {name}, {tuple(settings)}"
                    found[what] = token_cache(data, file, tokenizer, settings, folder / "tokens")

    for weight in ("token", "sample", "square"):
        found[f"split, {weight}"] = packing(data, packing="split", loss_weight=weight)
    found["split, no varlen"] = packing(data, packing="split", use_varlen_attn=False)
    found["whole"] = packing(data, packing="whole")
    found["none"] = packing(data, packing="none", batch_size=3)
    found["none, grouped"] = packing(data, packing="none", batch_size=2, grouped_rows=8)
    return found


def compare(before, after):
    """Print what is the same and what differs. Return the number of differences."""
    names = sorted({*before, *after})
    n_different = 0
    for name in names:
        if before.get(name) == after.get(name):
            print(f"same       {name}")
        else:
            n_different += 1
            print(f"DIFFERENT  {name}")
            print(f"    before {before.get(name)}")
            print(f"    after  {after.get(name)}")
    print(f"{n_different} of {len(names)} differ")
    return n_different


def main(arguments):
    if not arguments:
        sys.exit(__doc__)
    if arguments[0] == "compare":
        before_file, after_file = arguments[1:]
        before = json.loads(Path(before_file).read_text())
        after = json.loads(Path(after_file).read_text())
        sys.exit(1 if compare(before, after) > 0 else 0)

    checkout, out, *named = arguments
    folders = dict(argument.split("=", 1) for argument in named)
    samples = folders.pop("DATA", None)
    if samples is not None:
        samples = Path(samples)
    found = fingerprint(Path(checkout).resolve(), folders, samples)
    Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
