"""Write the table results.md and the plot mfu.png from the measurements in results.jsonl.

    python bench/report.py

Each result stands beside its roof: the MFU of a step that consists of its matrix products and
attention kernels alone. Their rates are those that roof.py measured for the same shape and number
of GPUs at the nearest length (roofs.jsonl). What the settings recompute counts as part of the step.

The plot also shows other codebases. Their figures are published ones, or were measured on the same
machines, with FlashAttention 4 where the codebase supports it.
"""
import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.run import HEAD_DIM, HERE, PEAK, SHAPES, block_parameters, parse_settings
from costs import KEEP_INPUTS

# (shape, GPUs): {codebase: {sequence length: causal MFU}}, each with its fastest setting. That of
# transformers + Liger recomputes nothing at 8k and 32k, and whole blocks at 128k.
OTHERS = {
    ("llama3.2-3b", 1): {
        "transformers + Liger": {8192: 0.481, 32768: 0.554, 131072: 0.438},
        "torchtitan 0.2.2": {8192: 0.445, 32768: 0.420},
    },
    ("llama2-7b", 4): {
        "DeepSpeed ALST + Liger": {32768: 0.310, 131072: 0.379, 524288: 0.417},
        "transformers + Liger + FSDP2, a row a GPU": {32768: 0.444},
        "torchtitan 0.2.2, context parallel": {131072: 0.289},
    },
    ("llama3.1-8b", 4): {
        "TRL, Qwen3-8B, 8 H100": {1048576: 0.354},
        "DeepSpeed ALST, 8 H100": {1153434: 0.224},
    },
}
# The same for documents of mixed lengths, MEDIAN_DOCUMENT=2048, which are not plotted.
OTHERS_MIXED = {
    ("llama3.2-3b", 1): {"transformers + Liger": {32768: 0.558, 131072: 0.464}},
    ("llama2-7b", 2): {"DeepSpeed ALST + Liger": {131072: 0.355}},
}
# A row with one of these constants is in the table, but not in the plot of one document per row.
NOT_PLOTTED = {"SYNTHETIC_DOCUMENT", "MEDIAN_DOCUMENT", "ATTENTION", "GLOBAL_BATCH_SIZE",
               "OFFLOAD_ACTIVATIONS"}
# What RECOMPUTE=auto may choose is only shown where it differs.
UNSET = {"RECOMPUTE": "auto", "KEEP_LAYERS": 0, "ZERO_STAGE": 2, "MLP_CHUNK": 0,
         "OFFLOAD_ACTIVATIONS": 0, "OFFLOAD_OPTIMIZER": False}
HEADER = [
    "| row (shape, GPUs, tokens, settings) | runs | seconds a step | tokens/s a GPU | mfu | roof "
    "| GPU, GiB | host, GiB a rank |",
    "|---|---|---|---|---|---|---|---|",
]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def has_environment(result):
    """Return whether a run recorded its code. The oldest did not."""
    return "env" in result


def is_unchanged(result):
    """Return whether nothing that matters to a run has changed since."""
    return "note" not in result


def with_chosen_settings(result):
    """Return the row of a result, which says after RECOMPUTE=auto what that chose."""
    chosen = result.get("memory_settings", {})
    unlike = [f"{name}={value}" for name, value in chosen.items() if value != UNSET[name]]
    text = f"RECOMPUTE=auto (chose {' '.join(unlike)})"
    return result["row"].replace("RECOMPUTE=auto", text)


def load_results():
    """Return one result for all runs that differ in MAX_STEPS only, by GPUs, shape and length.

    It is the run of median MFU; of two runs, the slower. The added field "runs" is their number.
    """
    runs_of = {}
    for result in read_lines(HERE / "results.jsonl"):
        if result["mfu"]:  # not measured on a CPU
            row = re.sub(" MAX_STEPS=[0-9]+", "", with_chosen_settings(result))
            runs_of.setdefault(row, []).append(result)

    results = []
    for runs in runs_of.values():
        # Runs of earlier code count only where there is no other.
        for is_recent in (has_environment, is_unchanged):
            recent = [result for result in runs if is_recent(result)]
            if recent:
                runs = recent
        runs = sorted(runs, key=lambda result: result["mfu"])
        middle = runs[(len(runs) - 1) // 2]
        results.append({**middle, "runs": len(runs)})

    def order(result):
        settings = parse_settings(result["row"])
        return settings.gpus, settings.shape, settings.tokens

    return sorted(results, key=order)


def nearest_rates(settings):
    """Return the line of roofs.jsonl of the same shape and GPUs at the nearest length, or None."""
    candidates = []
    for rates in read_lines(HERE / "roofs.jsonl"):
        measured = parse_settings(rates["roof"])
        if (measured.shape, measured.gpus) == (settings.shape, settings.gpus):
            candidates.append(rates)
    if not candidates:
        return None

    def distance(rates):
        return abs(parse_settings(rates["roof"]).tokens - settings.tokens)

    return min(candidates, key=distance)


def roof(result):
    """Return the causal MFU of a step of kernels alone; None if their rates were not measured."""
    settings = parse_settings(result["row"])
    rates = nearest_rates(settings)
    if rates is None:
        return None
    shape = SHAPES[settings.shape]
    L = result["layers"]
    T = settings.tokens
    t = T // settings.gpus
    document = result.get("document") or int(settings.constants.get("SYNTHETIC_DOCUMENT", T))

    # FLOPs of one GPU in forward: all its matrix products, and the attention of one layer, which is
    # causal and within documents. A token sees half a document on average.
    block = block_parameters(shape)
    head = shape.width * shape.vocabulary
    products = 2 * t * (L * block + head)
    attention = 4 * shape.heads * HEAD_DIM * T * document / 2 / settings.gpus

    # What backward recomputes. The last product of a block, down_proj, is never recomputed, because
    # backward does not read its output.
    used = {**settings.constants, **result.get("memory_settings", {})}  # where they chose themselves
    recompute = used.get("RECOMPUTE", "all_but_attention")
    keep_layers = int(used.get("KEEP_LAYERS", 0))
    recomputed_layers = 0 if recompute == "none" else L - keep_layers
    recomputed_products = 2 * t * (block - shape.width * shape.inner) * recomputed_layers
    attention_forwards = L
    if recompute in KEEP_INPUTS:
        attention_forwards += recomputed_layers
    if recompute == "pairs":  # every second block is computed once more
        recomputed_products += t * block * recomputed_layers
        attention_forwards += recomputed_layers / 2

    # The backward of a product does twice the work of its forward. That of attention does 2.5 times
    # the work, because its kernel recomputes the scores. Model FLOPs count both as twice.
    products_seconds = (3 * products + recomputed_products) / rates["products_tflops"] / 1e12
    forward_flops = attention_forwards * attention
    forward_seconds = forward_flops / rates["attention_forward_tflops"] / 1e12
    backward_flops = 2.5 * L * attention
    backward_seconds = backward_flops / rates["attention_backward_tflops"] / 1e12
    seconds = products_seconds + forward_seconds + backward_seconds
    model_flops = 3 * (products + L * attention)
    return model_flops / seconds / PEAK


def write_table(results, path):
    lines = list(HEADER)
    for result in results:
        best = roof(result)
        # Results of earlier code lack the memory of the host.
        host = result.get("peak_host_memory_gib")
        cells = [
            with_chosen_settings(result),
            f"{result['runs']}",
            f"{result['seconds']:.2f}",
            f"{result['tokens_per_second_per_gpu']:,.0f}",
            f"{result['mfu']:.1%}",
            f"{best:.1%}" if best else "",
            f"{result['peak_memory_gib']:.1f}",
            f"{host:.0f}" if host else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def select(results, shape, gpus):
    """Return {sequence length: result} for rows of one document, with the fastest settings."""
    fastest = {}
    for result in results:
        settings = parse_settings(result["row"])
        if (settings.shape, settings.gpus) != (shape, gpus):
            continue
        if NOT_PLOTTED.intersection(settings.constants):
            continue
        other = fastest.get(settings.tokens)
        if other is None or result["mfu"] > other["mfu"]:
            fastest[settings.tokens] = result
    return fastest


def is_power_of_two(n):
    return n.bit_count() == 1


def format_length(tokens):
    if tokens < 2**20:
        return f"{tokens // 2**10}k"
    return f"{tokens // 2**20}M"


def draw_panel(axes, shape, gpus, ours, others):
    """Draw the MFU of one shape by sequence length.

    ours: {length: result}. others: {codebase: {length: MFU}}.
    """
    lengths = list(ours)
    percent = [100 * result["mfu"] for result in ours.values()]
    roof_percent = [100 * roof(result) for result in ours.values()]
    axes.plot(lengths, roof_percent, "k--", marker="_", label="roof: kernels alone")
    axes.plot(lengths, percent, "C0", marker="o", label="longspan")

    above = {"textcoords": "offset points", "ha": "center", "fontsize": 8,
             "zorder": 10, "path_effects": [withStroke(linewidth=4, foreground="white")]}
    for length, result in ours.items():
        mfu = 100 * result["mfu"]
        note = f"{mfu:.1f}"
        if result["layers"] != SHAPES[shape].layers:
            note += f"\n{result['layers']} layers"
        axes.annotate(note, (length, mfu), (0, 8), **above)

    ticks = set(ours)
    for i, (name, points) in enumerate(others.items(), start=1):
        other_percent = [100 * mfu for mfu in points.values()]
        axes.plot(list(points), other_percent, f"C{i}", marker="s", ms=4, label=name)
        # A length like 1153434 would overlap the label of a power of two beside it.
        ticks.update(length for length in points if is_power_of_two(length))

    title = f"{shape}, {gpus} H200"
    axes.set(title=title, xscale="log", xlabel="tokens of a row, one document", ylim=(0, 70))
    axes.set_xticks(sorted(ticks), [format_length(length) for length in sorted(ticks)])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)


def draw(results, path):
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(OTHERS), sharey=True)
    for axes, ((shape, gpus), others) in zip(panels, OTHERS.items()):
        draw_panel(axes, shape, gpus, select(results, shape, gpus), others)
    panels[0].set_ylabel("model FLOPs utilization, causal, %")
    figure.savefig(path, dpi=110)


def main():
    results = load_results()
    write_table(results, HERE / "results.md")
    draw(results, HERE / "mfu.png")


if __name__ == "__main__":
    main()
