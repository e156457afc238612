"""Extend a model's context, and see what it buys: loss by position on long text, before and after a few steps.

    python bench/context.py MODEL=hf-folder [STEPS=50] [LENGTH=32768] [ROWS=8] [NAME=VALUE of train.py ...]

The text is on every machine that can run this: the sources of Python's standard library and of torch, a document a
package, apart for training and for measuring. Every variant goes through train.py's export, so what is measured is what
would be served. Lines go to context.jsonl, curves to context.png, in $OUT or beside this file. One GPU; a CPU for small
rows."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
OUT = Path(os.environ.get("OUT") or HERE)
sys.path.insert(0, str(HERE.parent))

import convert
from model import Execution, Transformer

MODEL = ""                  # Hugging Face folder with a tokenizer
LENGTH = 32768              # tokens of a row, and positions of the extended model
STEPS = 50                  # optimizer steps of each variant
ROWS = 8                    # held-out documents, of whose first LENGTH tokens the loss is taken
TRAIN = ["GLOBAL_BATCH_SIZE=1", "LEARNING_RATE=1e-4", "MIN_LEARNING_RATE=1e-5", "WARMUP_RATIO=0.1", "WEIGHT_DECAY=0.0",
         "RECOMPUTE=none", "SAVE_EVERY=0", "SAMPLE_PROMPTS=[]", "RESUME=never"]
LIMIT = 600_000             # characters of a document

def documents():
    """-> {name: text}. A package of the standard library or of torch is a document, and so are the single modules of
    one first letter."""
    roots = {"": Path(sysconfig.get_paths()["stdlib"]), "torch/": Path(torch.__file__).parent}
    texts, left_out = defaultdict(str), {"site-packages", "dist-packages", "test", "tests", "encodings"}
    for prefix, root in roots.items():
        for file in sorted(root.rglob("*.py")):
            part, *inside = file.relative_to(root).parts
            if left_out.isdisjoint((part, *inside)):
                name = prefix + (part if inside else f"modules of {part[0].lower()}")
                if len(texts[name]) < LIMIT:
                    texts[name] += f"# {file.relative_to(root)}\n{file.read_text(errors='replace')}\n"
    return {name: text[:LIMIT] for name, text in sorted(texts.items())}

def bands():
    """-> (first, end) positions: the last band is half of LENGTH, each one before it half of the next."""
    ends = [LENGTH >> i for i in range(4, -1, -1)]
    return list(zip([0, *ends], ends))

@torch.no_grad()
def measure(folder, rows, attention):
    """-> mean loss in each band of positions over rows of token ids (LENGTH + 1,)."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = Transformer(convert.load_config(folder), execution=Execution(attention))
    convert.load_weights(model, folder)
    model.to(device, dtype)
    position, sums = torch.arange(LENGTH, device=device), [0.0] * len(bands())
    cu_seqlens = torch.tensor([0, LENGTH], dtype=torch.int32, device=device)
    for row in rows:
        logits, labels = model(row[:-1].to(device), position, cu_seqlens, LENGTH), row[1:].to(device)
        chunks = zip(logits.split(1024), labels.split(1024))
        loss = torch.cat([F.cross_entropy(z.float(), y, reduction="none") for z, y in chunks])
        sums = [s + loss[first:end].sum().item() for s, (first, end) in zip(sums, bands())]
    return [round(s / len(rows) / (end - first), 4) for s, (first, end) in zip(sums, bands())]

def draw(lines):
    """One panel before training and one after, a curve a variant."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps = sorted({line["steps"] for line in lines})
    figure, axes = plt.subplots(1, len(steps), figsize=(5.5 * len(steps), 4.2), sharey=True, squeeze=False)
    names = [f"{a / 1024:g}-{b / 1024:g}k" for a, b in bands()]
    for axis, step in zip(axes[0], steps):
        for line in lines:
            if line["steps"] == step:
                axis.plot(names, line["loss"], marker="o", label=line["variant"])
        axis.set(title=f"after {step} steps" if step else "before training", xlabel="positions")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="loss a token", ylim=(None, min(axes[0][0].get_ylim()[1], 2.5 * lines[0]["loss"][0])))
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(OUT / "context.png", dpi=120)
    plt.close(figure)

def main(passed):
    from transformers import AutoTokenizer
    tokenizer, config = AutoTokenizer.from_pretrained(MODEL), convert.load_config(MODEL)
    texts, lines = documents(), []
    tokens = {name: tokenizer(text).input_ids for name, text in texts.items()}
    long = [name for name, ids in tokens.items() if len(ids) > LENGTH]
    held_out = long[::max(len(long) // ROWS, 1)][:ROWS]
    variants = {"as it is": ["ROPE_SCALING=default"],
                "base x 10": [f"ROPE_SCALING={dict(rope_theta=10 * config.rope_theta)}"],
                **{kind: [f"ROPE_SCALING={kind}"] for kind in ("linear", "dynamic", "yarn")}}
    rows = [torch.tensor(tokens[name][:LENGTH + 1]) for name in held_out]
    attention = next((p.split("=")[1] for p in passed if p.startswith("ATTENTION=")), "auto")
    print(f"{sum(map(len, tokens.values())):,} tokens; held out: {', '.join(held_out)}", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        text = Path(tmp) / "train.jsonl"
        text.write_text("".join(json.dumps({"text": t}) + "\n" for name, t in texts.items() if name not in held_out))
        for steps in (0, STEPS) if STEPS else (0,):
            for variant, constants in variants.items():
                run = Path(tmp) / "run" / f"{variant.replace(' ', '-')}-{steps}"
                command = [sys.executable, str(HERE.parent / "train.py"), f"MODEL={MODEL}", f"DATA={text}",
                           f"RUN_DIR={run}", f"CACHE_DIR={tmp}/cache", f"MAX_LENGTH={LENGTH}", f"MAX_STEPS={steps}",
                           f"MAX_POSITION_EMBEDDINGS={LENGTH}", *TRAIN, *constants, *passed]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
                metrics = (run / "metrics.jsonl").read_text().splitlines()
                line = {"variant": variant, "steps": steps, "bands": bands(),
                        "loss": measure(run / "hf", rows, attention), "model": Path(MODEL).name,
                        "seconds": round(sum(json.loads(m)["seconds"] for m in metrics), 1),
                        "constants": constants + passed, "held_out": held_out, "torch": torch.__version__}
                lines.append(line)
                (OUT / "context.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
                draw(lines)
                shutil.rmtree(run)
                print(f"{variant:<10} {steps:>3} steps {line['seconds']:>6} s  {line['loss']}", flush=True)

if __name__ == "__main__":
    own = {"MODEL": str, "LENGTH": int, "STEPS": int, "ROWS": int}
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    globals().update({name: own[name](given.pop(name)) for name in own if name in given})
    if not os.path.isdir(MODEL):
        sys.exit(__doc__)
    main([f"{name}={value}" for name, value in given.items()])
