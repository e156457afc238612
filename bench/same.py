"""Fingerprints of what a checkout computes, to show that a change of its text leaves every result bit for bit.

    python bench/same.py CHECKOUT OUT.json [NAME=FOLDER ...]     NAME=FOLDER: tokenizers; DATA=FOLDER: sample files
    python bench/same.py compare BEFORE.json AFTER.json

Compared are the demo's loss and gradient norm over 40 steps and its exported weights on one rank and on two, the token
caches of the sample files, and the rows that 100,000 random lengths are packed into in every mode.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = ["MODEL=demo", "DATA=demo", "INIT=weights", "MAX_LENGTH=512", "GLOBAL_BATCH_SIZE=4", "MAX_STEPS=40", "LEARNING_RATE=6e-3",
        "WARMUP_RATIO=0.05", "DTYPE=bfloat16", "SAVE_EVERY=0", "SAMPLE_PROMPTS=[]", "RECOMPUTE=all_but_attention"]
SETTINGS = [  # append_eos, train_on_prompt, mask_history, overlong, cap
    (True, False, False, "split", 0), (True, False, True, "truncate_middle", 256)]


def digest(*arrays):
    import numpy as np
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def demo(checkout, ranks, folder):
    """Train the demo in a process of its own. -> its losses and norms, and the exported tensors."""
    from safetensors.numpy import load_file
    run = folder / f"run-{ranks}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command = [*launch, str(checkout / "train.py"), *DEMO, f"RUN_DIR={run}", f"CACHE_DIR={folder}/cache"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tensors = {}
    for file in sorted((run / "hf").glob("*.safetensors")):
        tensors.update(load_file(file))
    return {"metrics": [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line],
            "weights": digest(*[tensors[name] for name in sorted(tensors)])}


def token_cache(data, file, tokenizer, settings, folder):
    corpus = data.build_corpus(str(file), str(tokenizer), str(folder), *settings)
    return digest(corpus.tokens, corpus.offsets, corpus.targets, corpus.full)


def packing(data, **settings):
    """The pieces of every row of 100,000 documents, log-normal in length, in the first epoch and half of the second."""
    import numpy as np
    lengths = np.maximum(np.random.default_rng(0).lognormal(6.5, 1.2, 100_000).astype(np.int64), 1)
    corpus = data.Corpus(97, np.concatenate([[0], np.cumsum(lengths)]), lengths - 1, lengths,
                         [(0, 60_000, 1.0), (60_000, 100_000, 0.7)], "synthetic")
    rows = data.Rows(corpus, max_length=8192, seed=5, **settings)
    pieces = [[tuple(int(number) for number in piece) for piece in rows.find(row)] for row in range(rows.count(1.5))]
    batches = [field.numpy() for step in (1, 7) for batch in rows.step(step, 16, 2, 1, 4, 3, rows.count(1.5))
               for field in (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens, batch.weights)]
    accounting = sorted((name, str(value)) for name, value in rows.accounting().items())
    return {"rows": hashlib.sha256(repr(pieces).encode()).hexdigest()[:16], "batches": digest(*batches),
            "accounting": hashlib.sha256(repr(accounting).encode()).hexdigest()[:16]}


def fingerprint(checkout, tokenizers, samples):
    sys.path.insert(0, str(checkout))
    import data
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for ranks in (1, 2):
            found[f"demo, {ranks} ranks"] = demo(checkout, ranks, folder)
        tokenizers = {"demo": folder / "cache" / "demo", **tokenizers}
        for file in sorted(samples.glob("*.json*")) if samples else []:
            for name, tokenizer in tokenizers.items():
                for settings in SETTINGS:
                    what = f"{file.name}, {name}, {settings}"
                    found[what] = token_cache(data, file, tokenizer, settings, folder / "tokens")
    for weight in ("token", "sample", "square"):
        found[f"split, {weight}"] = packing(data, packing="split", loss_weight=weight)
    found["split, no varlen"] = packing(data, packing="split", use_varlen_attn=False)
    found["whole"] = packing(data, packing="whole")
    found["none"] = packing(data, packing="none", batch_size=3)
    found["none, grouped"] = packing(data, packing="none", batch_size=2, grouped_rows=8)
    return found


def compare(before, after):
    """Print what differs. -> the number of differences."""
    different = 0
    for what in sorted({*before, *after}):
        same = before.get(what) == after.get(what)
        different += not same
        print(f"{'same     ' if same else 'DIFFERENT'}  {what}")
        if not same:
            print(f"    before {before.get(what)}\n    after  {after.get(what)}")
    print(f"{different} of {len({*before, *after})} differ")
    return different


def main(arguments):
    if arguments[0] == "compare":
        before, after = (json.loads(Path(file).read_text()) for file in arguments[1:3])
        sys.exit(compare(before, after) > 0)
    checkout, out, *named = arguments
    folders = dict(argument.split("=", 1) for argument in named)
    samples = folders.pop("DATA", None)
    found = fingerprint(Path(checkout).resolve(), folders, samples and Path(samples))
    Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
