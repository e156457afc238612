"""Measure train.py itself: one process group a row, synthetic documents, random weights; results in
bench/results.jsonl.

    python bench/run.py "llama3.2-3b 1 8192 RECOMPUTE=none" "llama2-7b 4 131072 MAX_STEPS=4" ...

A row is: shape, GPUs (sequence parallel over all of them), tokens of a row, and any constants of train.py. NUM_LAYERS=n
keeps the first n layers of the shape. mfu and seconds are medians over the steps after the first three (or the
last)."""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {  # layers, width, heads, key/value heads, inner width, vocabulary, tied; head size 128
    "llama3.2-3b": (28, 3072, 24, 8, 8192, 128256, True),
    "llama2-7b": (32, 4096, 32, 32, 11008, 32000, False),
    "llama3.1-8b": (32, 4096, 32, 8, 14336, 128256, False),
    "tiny": (2, 256, 4, 2, 512, 1024, False),
}
HERE = Path(__file__).resolve().parent

def write_config(folder, shape, layers=None):
    """A Hugging Face folder of one config.json, enough for INIT=random."""
    L, C, H, G, I, V, tied = SHAPES[shape]
    Path(folder).mkdir(parents=True, exist_ok=True)
    part = Path(folder) / f"config.{os.getpid()}"      # whole or not at all: several ranks may write it
    part.write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers or L,
        "hidden_size": C, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": 128,
        "intermediate_size": I, "vocab_size": V,
        "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "hidden_act": "silu", "dtype": "bfloat16"}))
    part.rename(Path(folder) / "config.json")
    return folder

def measure(row, out):
    """Run one row. -> its result, also appended to results.jsonl."""
    shape, gpus, length, *settings = row.split()
    layers = next((int(s.split("=")[1]) for s in settings if s.startswith("NUM_LAYERS=")), None)
    settings = [s for s in settings if not s.startswith("NUM_LAYERS=")]
    with tempfile.TemporaryDirectory() as tmp:
        defaults = {"MAX_STEPS": 7, "GLOBAL_BATCH_SIZE": 1}
        given = {s.split("=")[0] for s in settings}
        settings += [f"{k}={v}" for k, v in defaults.items() if k not in given]
        command = ["torchrun" if gpus != "1" else sys.executable, *(["--nproc_per_node", gpus] if gpus != "1" else []),
                   str(HERE.parent / "train.py"), f"MODEL={write_config(tmp + '/model', shape, layers)}", "INIT=random",
                   "DATA=synthetic", f"MAX_LENGTH={length}", f"RUN_DIR={tmp}/run", "SAVE_EVERY=-1", *settings]
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "8"})
        name = row.replace(" ", "_").replace("=", "-")
        if out:
            (Path(out) / f"{name}.log").write_text(done.stdout + done.stderr)
        metrics = Path(tmp) / "run" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        env = json.loads((Path(tmp) / "run" / "env.json").read_text()) if lines else {}
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()
        print(f"{row}: exit {done.returncode}", *said[-25:], sep="\n", flush=True)
    if not lines:
        return None
    warm = lines[3:] or lines[-1:]
    median = lambda key: statistics.median(line[key] for line in warm) if warm[0][key] is not None else None
    result = {"row": row, "layers": layers or SHAPES[shape][0], **{k: median(k) for k in (
        "seconds", "tokens_per_second_per_gpu", "mfu", "hfu")}, "peak_memory_gib": lines[-1]["peak_memory_gib"],
              "peak_host_memory_gib": lines[-1]["peak_host_memory_gib"],
        "loss": [round(line["loss"], 5) for line in lines],
        "grad_norm": [round(line["grad_norm"], 4) for line in lines],
        "steps_measured": len(warm), "wall": round(time.time() - began), "env": env, "command": " ".join(
            c for c in command[0 if gpus != "1" else 1:] if "/" not in c).replace("torchrun", "torchrun", 1)}
    with open(HERE / "results.jsonl", "a") as f:
        f.write(json.dumps(result) + "\n")
    if out:
        with open(Path(out) / "results.jsonl", "a") as f:
            f.write(json.dumps(result) + "\n")
    print(f"{row}: {result['seconds']:.3f} s  {result['tokens_per_second_per_gpu']:,.0f} tok/s/GPU  mfu "
          f"{result['mfu'] or 0:.1%}  hfu {result['hfu'] or 0:.1%}  {result['peak_memory_gib'] or 0:.1f} GiB  host "
          f"{result['peak_host_memory_gib']:.0f} GiB  loss "
          f"{result['loss'][0]}..{result['loss'][-1]}  wall {result['wall']} s", flush=True)
    return result

if __name__ == "__main__":
    for row in sys.argv[1:]:
        measure(row, os.environ.get("OUT"))
