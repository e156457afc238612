"""Table and plot of what is in results.jsonl: ours, the roof of the same settings, the peers.

    python bench/report.py          writes bench/results.md and bench/mfu.png

The roof is a step of nothing but its matrix products and attention kernels, at the rates that bench/roof.py measured
for the shape at the nearest length (roofs.jsonl); what a setting recomputes is in it. Peers: published, or measured on
the same machines with FlashAttention 4 where they take it."""
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from matplotlib.figure import Figure
from run import HERE, SHAPES

PEAK = 989e12
PEERS = {  # (shape, GPUs) -> {name: {tokens: causal mfu}}
    ("llama3.2-3b", 1): {"transformers + Liger": {8192: 0.400, 32768: 0.445, 131072: 0.438},
                         "torchtitan 0.2.2": {8192: 0.445, 32768: 0.420}},
    ("llama2-7b", 4): {"DeepSpeed ALST + Liger": {32768: 0.310, 131072: 0.379, 524288: 0.417},
                       "torchtitan 0.2.2, context parallel": {131072: 0.289}},
    ("llama3.1-8b", 4): {"TRL, Qwen3-8B, 8 H100": {1048576: 0.354}, "DeepSpeed ALST, 8 H100": {1153434: 0.224}}}

def settings(row):
    """-> shape, GPUs, tokens, {constant: value} of a row of results.jsonl."""
    shape, gpus, length, *rest = row.split()
    return shape, int(gpus), int(length), dict(s.split("=") for s in rest)

def roof(result):
    """Causal mfu if the step were nothing but kernels."""
    shape, gpus, T, constants = settings(result["row"])
    _, C, H, G, I, V, _ = SHAPES[shape]
    L, D, t = result["layers"], 128, T // gpus
    known = [json.loads(line) for line in (HERE / "roofs.jsonl").read_text().splitlines()]
    known = [r for r in known if settings(r["roof"])[:2] == (shape, gpus)]
    if not known:
        return None
    rates = min(known, key=lambda r: abs(settings(r["roof"])[2] - T))
    document = int(constants.get("SYNTHETIC_DOCUMENT", T))
    block = C * D * (2 * H + 2 * G) + 3 * C * I
    attention = 4 * H * D * T * document / 2 / gpus
    recompute, kept = constants.get("RECOMPUTE", "all_but_attention"), int(constants.get("KEEP_LAYERS", 0))
    again = 0 if recompute == "none" else L - kept
    products = 6 * t * (L * block + C * V) + 2 * t * (block - C * I) * again
    forward = attention * (L + (again if recompute == "all" else 0))
    seconds = (products / rates["products_tflops"] + forward / rates["attention_forward_tflops"]
               + 2.5 * L * attention / rates["attention_backward_tflops"]) / 1e12
    return (6 * t * (L * block + C * V) + 3 * L * attention) / seconds / PEAK

def main():
    measured = {}
    for result in map(json.loads, (HERE / "results.jsonl").read_text().splitlines()):
        if result["mfu"]:
            measured.setdefault(re.sub(" MAX_STEPS=[0-9]+", "", result["row"]), []).append(result)
    rows = []
    for runs in measured.values():  # the middle one of several, the lower of two; without those of earlier code
        runs = sorted([r for r in runs if "env" in r] or runs, key=lambda r: r["mfu"])
        rows.append({**runs[(len(runs) - 1) // 2], "runs": len(runs)})
    rows.sort(key=lambda r: (settings(r["row"])[1::-1], settings(r["row"])[2]))
    table = ["| row (shape, GPUs, tokens, settings) | runs | seconds a step | tokens/s a GPU | mfu | roof | GPU, GiB | "
             "host, GiB a rank |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        best, host = roof(r), r.get("peak_host_memory_gib")
        table.append(f"| {r['row']} | {r['runs']} | {r['seconds']:.2f} | {r['tokens_per_second_per_gpu']:,.0f} | "
                     f"{r['mfu']:.1%} | {f'{best:.1%}' if best else ''} | {r['peak_memory_gib']:.1f} | "
                     f"{f'{host:.0f}' if host else ''} |")
    (HERE / "results.md").write_text("\n".join(table) + "\n")
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, ((shape, gpus), peers) in zip(figure.subplots(1, len(PEERS), sharey=True), PEERS.items()):
        ours = {}
        for r in rows:  # one document a row; of several settings the fastest
            s, g, length, constants = settings(r["row"])
            plain = not {"SYNTHETIC_DOCUMENT", "ATTENTION", "GLOBAL_BATCH_SIZE", "OFFLOAD_ACTIVATIONS"} & set(constants)
            if (s, g) == (shape, gpus) and plain and r["mfu"] > ours.get(length, r | {"mfu": 0})["mfu"]:
                ours[length] = r
        axes.plot([*ours], [100 * roof(r) for r in ours.values()], "k--", marker="_", label="roof: kernels alone")
        axes.plot([*ours], [100 * r["mfu"] for r in ours.values()], "C0", marker="o", label="longspan")
        for length, r in ours.items():
            note = f"{100 * r['mfu']:.1f}" + (f"\n{r['layers']} layers" if r["layers"] != SHAPES[shape][0] else "")
            axes.annotate(note, (length, 100 * r["mfu"]), (0, -12), textcoords="offset points", ha="center", va="top",
                          fontsize=8)
        for i, (name, points) in enumerate(peers.items()):
            axes.plot([*points], [100 * mfu for mfu in points.values()], f"C{i + 1}", marker="s", ms=4, label=name)
        axes.set(title=f"{shape}, {gpus} H200", xscale="log", xlabel="tokens of a row, one document", ylim=(0, 70))
        ticks = sorted({*ours, *(n for points in peers.values() for n in points if n & (n - 1) == 0)})
        axes.set_xticks(ticks, [f"{n // 1024}k" if n < 2**20 else f"{n // 2**20}M" for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", fontsize=8)
    figure.axes[0].set_ylabel("model FLOPs utilization, causal, %")
    figure.savefig(HERE / "mfu.png", dpi=110)

if __name__ == "__main__":
    main()
