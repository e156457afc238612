"""Measure whether a model uses its context: loss by position, retrieval, evidence and LongPPL.

    torchrun --nproc_per_node 8 tools/evaluate.py FOLDER ... [LENGTHS=4k,32k,128k] [NAME=VALUE ...]

FOLDERs are Hugging Face folders, such as those of a model before and after training; they are shown
side by side. NAMEs are the fields of Options, in capitals, and some constants of train.py; --help
prints all. Weights are sharded over all ranks, and the tokens of a row over the ranks of a
sequence-parallel group, as in train.py.

Retrieval needs no generation. Greedy decoding writes an answer exactly if each of its tokens is the
one with the largest logit, given all tokens before it. One forward tells this for all the questions
of a row. tasks.py has the tasks.

Evidence is the gain in the log-probability of an answer from the fact that it is about: that of the
row minus that of the same row without the facts.

LongPPL is the perplexity of key tokens (arXiv 2410.23771): those whose loss falls by more than 2
when the whole context replaces one of about 4k tokens, and is below 2 then. It separates models
that use their context better than perplexity, to which most tokens add no more than noise. The key
tokens are those of the last folder, and the same for all folders.

Writes evaluation.json and evaluation.png to the folder OUT.
"""
import json
import math
import re
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import convert  # noqa: E402
import data  # noqa: E402
import parallel  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
from model import Execution, Transformer, attention_kernel  # noqa: E402


class Options(NamedTuple):
    lengths: str = "4k"     # of the rows of retrieval, in tokens: 4k,32k,128k
    depths: int = 5         # places in a row that are asked for
    samples: int = 4        # rows for each task and length
    documents: int = 4      # of DATA, cut to the longest of the lengths; 0: no losses
    tasks: str = ",".join(tasks.TASKS)
    out: str = "evaluation"  # folder of the results


# Constants of train.py that can be set, too. DATA is long documents, by default the source of
# Python's library. SEQUENCE_PARALLEL_SIZE is by default the largest that the heads allow.
CONSTANTS = (
    "DATA", "FORMAT", "COLUMNS", "BAD_ROWS", "ACCEPT_LOSS", "NO_STOP_TOKEN", "CACHE_DIR",
    "SEQUENCE_PARALLEL_SIZE", "ATTENTION", "DTYPE", "SEED")

# The least and the largest number that an option may be.
RANGES = {
    "DEPTHS": (1, len(tasks.THINGS)),
    "SAMPLES": (1, train.MANY),
    "DOCUMENTS": (0, train.MANY),
}

# LongPPL's choices
SHORT_CONTEXT = 4096    # tokens that are seen at least, if not the whole context is
STRIDE = 1024           # tokens that are scored in each window of SHORT_CONTEXT + STRIDE tokens
MIN_GAIN = 2.0          # of a key token: loss with the short context minus loss with the whole
MAX_LOSS = 2.0          # of a key token with the whole context

MLP_CHUNK = 2**15       # tokens at a time outside attention, so that rows of 1M tokens fit


class Row(NamedTuple):
    """Token ids of some texts side by side."""
    ids: np.ndarray         # (T,)
    lengths: list           # of each text
    is_scored: np.ndarray   # (T,) bool: the others need no logits


class Score(NamedTuple):
    """How a model predicts each token of a row from those of its text before it."""
    losses: np.ndarray      # (T,) float32; 0 for the first token of a text, and if not scored
    is_largest: np.ndarray  # (T,) bool: greedy decoding would choose this token


# -------------------------------------------------------------------------------- scoring of rows

def load_model(folder, grid):
    """Return the model of a Hugging Face folder, sharded over all ranks."""
    with torch.device("meta"):
        execution = Execution(train.ATTENTION, mlp_chunk=MLP_CHUNK)
        model = Transformer(convert.load_config(folder), grid.sp_group, execution)
    parallel.shard(model, model.block_groups(), grid, getattr(torch, train.DTYPE), 3, False)
    convert.load_weights(model, folder)
    return model


def score_rows(model, rows, grid, description):
    """Return the Score of each row. Data-parallel groups score different rows."""
    scores = {}
    rounds = range(train.ceil_div(len(rows), grid.dp))
    with train.timed(grid, f"{description}, {len(rows)} rows"):
        for i in parallel.progress(rounds, description):
            # All ranks take part in all forwards, because weights are gathered in them.
            index = min(i * grid.dp + grid.dp_rank, len(rows) - 1)
            scores[index] = score_row(model, rows[index], grid)

    def mine():
        return scores if grid.sp_rank == 0 else {}

    merged = {}
    for part in parallel.run_on_ranks(description, mine):
        merged.update(part)
    return [merged[i] for i in range(len(rows))]


@torch.no_grad()
def score_row(model, row, grid):
    """Return the Score of a row, on all ranks that share it."""
    n = len(row.ids)
    padding = -n % grid.sp
    lengths = row.lengths + [padding] if padding > 0 else row.lengths
    ids = torch.tensor(np.append(row.ids, np.zeros(padding, np.int64)))             # (T,)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    is_scored = torch.tensor(np.append(row.is_scored, np.zeros(padding, bool)))
    labels = torch.where(is_scored, ids, data.IGNORE).roll(-1)
    labels[cu_seqlens[1:].long() - 1] = data.IGNORE  # nothing follows the end of a text
    positions = torch.cat([torch.arange(length) for length in lengths])

    def shard(x):
        return x.chunk(grid.sp)[grid.sp_rank].to(grid.device)

    losses, is_largest = model(
        shard(ids), shard(positions), cu_seqlens.tolist(), max(lengths), shard(labels),
        per_token=True)

    # Each rank knows the scores of its shard. The others add zeros.
    scores = torch.zeros(grid.sp, 2, len(losses), device=grid.device)               # (P, 2, t)
    scores[grid.sp_rank, 0] = losses
    scores[grid.sp_rank, 1] = is_largest.float()
    if grid.sp > 1:
        parallel.all_sum(scores, grid.sp_group)
    scores = scores.transpose(0, 1).flatten(1).cpu().numpy()                        # (2, T)
    # What position t tells is about token t + 1.
    losses, is_largest = np.roll(scores, 1, axis=1)[:, :n]
    return Score(losses, is_largest > 0)


# -------------------------------------------------------------------------------------- retrieval

def measure_retrieval(model, tokenizer, grid, options):
    """Return a dict for each question: task, length, depth, distance, correct, gain."""
    depths = np.linspace(0, 1, options.depths)
    examples = []
    for length in parse_lengths(options.lengths):
        for task in options.tasks.split(","):
            for sample in range(options.samples):
                examples.append(tasks.make_example(
                    task, length, depths, tokenizer, train.SEED, sample))
    rows = [question_row(example) for example in examples]
    scores = score_rows(model, rows, grid, "retrieval")

    # The task "words" has no facts that could be taken away.
    with_facts = [i for i, example in enumerate(examples) if example.questions[0].evidence]
    ablated = [tasks.without_evidence(examples[i], tokenizer, train.SEED) for i in with_facts]
    rows = [question_row(example) for example in ablated]
    ablated_scores = dict(zip(with_facts, score_rows(model, rows, grid, "evidence")))

    results = []
    for i, example in enumerate(examples):
        for question in example.questions:
            answer = slice(question.start, question.end)
            result = {
                "task": question.task,
                "length": example.length,
                "depth": None if math.isnan(question.depth) else round(question.depth, 3),
                "correct": bool(scores[i].is_largest[answer].all()),
                "log_probability": -float(scores[i].losses[answer].sum()),
            }
            if i in ablated_scores:
                without = -float(ablated_scores[i].losses[answer].sum())
                result["gain"] = result["log_probability"] - without
                result["distance"] = question.start - question.evidence[0][1]
            results.append(result)
    return results


def question_row(example):
    """Return the Row of an Example, in which only the answers are scored."""
    is_scored = np.zeros(len(example.ids), bool)
    for question in example.questions:
        is_scored[question.start:question.end] = True
    return Row(np.array(example.ids), [len(example.ids)], is_scored)


def text_row(ids):
    """Return the Row of a single text, in which all tokens are scored."""
    return Row(np.array(ids), [len(ids)], np.ones(len(ids), bool))


def gain_by_distance(questions):
    """Return {"0-1k": mean gain ...}, by the tokens between the evidence and the answer."""
    with_facts = [question for question in questions if "gain" in question]
    distances = [question["distance"] for question in with_facts]
    edges = train.position_edges(max(distances, default=0) + 1)
    bands = np.searchsorted(edges, distances, "right")
    gains = {}
    for band, name in enumerate(train.band_names(edges)):
        of_band = [question["gain"] for question, b in zip(with_facts, bands) if b == band]
        if of_band:
            gains[name] = float(np.mean(of_band))
    return gains


def mean_by(results, keys, value):
    """Return {keys of a result: mean of its values}."""
    values = defaultdict(list)
    for result in results:
        values[tuple(result[key] for key in keys)].append(result[value])
    return {key: float(np.mean(of_key)) for key, of_key in values.items()}


# ------------------------------------------------------------------------- losses of long documents

def read_documents(folder, tokenizer, length, options):
    """Return the first `length` tokens of documents that are so long, as arrays of token ids."""
    if train.DATA == "demo":
        return python_documents(tokenizer, length, options.documents)
    corpus = train.open_corpus(train.DATA, folder, convert.load_config(folder))
    lengths = np.diff(corpus.offsets)
    long = np.flatnonzero(lengths >= length)[:options.documents]
    if len(long) == 0:
        raise ValueError(f"no document of DATA {train.DATA} has {length} tokens, the longest has "
                         f"{lengths.max()}: use documents that are longer, lower LENGTHS, or set "
                         "DOCUMENTS=0 for retrieval alone.")
    return [data.token_ids(corpus.read(document, 0, length)) for document in long]


def python_documents(tokenizer, length, n):
    """Return n texts of `length` tokens each, from the source code of Python's library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    documents = []
    for i in range(n):
        text = ""
        for file in files[i * len(files) // n:]:
            text += file.read_text(errors="replace")
            if len(text) > 8 * length:  # a token is hardly longer than 8 characters
                break
        ids = tokenizer(text, verbose=False).input_ids[:length]
        if len(ids) < length:
            raise ValueError(f"Python's library has no text of {length} tokens: name a file with "
                             "DATA")
        documents.append(np.array(ids))
    return documents


def short_context_losses(model, documents, grid):
    """Return the losses (length,) of each document with a context of about SHORT_CONTEXT tokens.

    NaN for the first SHORT_CONTEXT tokens. Several windows share a row.
    """
    length = len(documents[0])
    size = SHORT_CONTEXT + STRIDE
    windows = []  # (document, start)
    for i in range(len(documents)):
        windows += [(i, start) for start in range(0, length - SHORT_CONTEXT, STRIDE)]
    windows_per_row = max(length // size, 1)
    groups = [windows[i:i + windows_per_row] for i in range(0, len(windows), windows_per_row)]
    rows = []
    for group in groups:
        texts = [documents[i][start:start + size] for i, start in group]
        is_scored = [np.arange(len(text)) >= SHORT_CONTEXT for text in texts]
        rows.append(Row(
            np.concatenate(texts), [len(text) for text in texts], np.concatenate(is_scored)))

    losses = np.full((len(documents), length), np.nan)
    for group, row, score in zip(groups, rows, score_rows(model, rows, grid, "short contexts")):
        edges = np.cumsum(row.lengths)
        for (i, start), of_window in zip(group, np.split(score.losses, edges[:-1])):
            scored = of_window[SHORT_CONTEXT:]
            first = start + SHORT_CONTEXT
            losses[i, first:first + len(scored)] = scored
    return losses


def loss_by_position(losses):
    """losses (documents, length) -> {"0-1k": mean loss, "1k-2k": ...}."""
    length = losses.shape[1]
    edges = train.position_edges(length)
    bounds = [1, *edges, length]  # nothing predicts the first token
    bands = zip(train.band_names(edges), bounds, bounds[1:])
    return {name: float(losses[:, start:end].mean()) for name, start, end in bands}


def key_tokens(losses, short_losses):
    """Return which tokens are key tokens of LongPPL, (documents, length) bool."""
    gain = short_losses - losses
    return (gain > MIN_GAIN) & (losses < MAX_LOSS)  # False where the short context is all


# ----------------------------------------------------------------------------------------- results

def evaluate(folder, tokenizer, documents, grid, options):
    """Return the results of a folder: retrieval, and with documents, these and their losses."""
    model = load_model(folder, grid)
    results = {"questions": measure_retrieval(model, tokenizer, grid, options)}
    if documents:
        scores = score_rows(model, [text_row(ids) for ids in documents], grid, "documents")
        results["documents"] = np.stack(documents)
        results["losses"] = np.stack([score.losses for score in scores])
        if len(documents[0]) > SHORT_CONTEXT:
            results["short_losses"] = short_context_losses(model, documents, grid)
    return results


def summarize(results):
    """results: {folder: what evaluate returned} -> the same for evaluation.json."""
    last = list(results.values())[-1]
    summaries = {}
    for folder, result in results.items():
        summary = {"scores": [], "evidence": gain_by_distance(result["questions"])}
        for (task, length, depth), score in mean_by(
                result["questions"], ("task", "length", "depth"), "correct").items():
            summary["scores"].append(
                {"task": task, "length": length, "depth": depth, "score": score})
        if "losses" in result:
            summary["loss_by_position"] = loss_by_position(result["losses"])
        if "short_losses" in last:
            # Key tokens have no meaning for a folder whose tokens are others.
            judge = last if np.array_equal(last["documents"], result["documents"]) else result
            is_key = key_tokens(judge["losses"], judge["short_losses"])
            losses = result["losses"][is_key]
            summary["longppl"] = float(np.exp(losses.mean())) if len(losses) > 0 else None
            summary["key_tokens"] = int(is_key.sum())
            own = key_tokens(result["losses"], result["short_losses"])
            summary["own_key_tokens"] = int(own.sum())
            summary["tokens_after_short_context"] = int(np.isfinite(result["short_losses"]).sum())
        summary["questions"] = result["questions"]
        summaries[folder] = summary
    return summaries


def parse_lengths(text):
    """"4k,1M" -> [4096, 1048576]."""
    factors = {"": 1, "k": 1024, "m": 2**20}
    lengths = []
    for part in text.split(","):
        match = re.fullmatch("([1-9][0-9]*)([km]?)", part.lower())
        if match is None:
            raise ValueError(f"LENGTHS {text!r} are not numbers of tokens: use values like 4096 or "
                             "4k,32k,1M.")
        lengths.append(int(match[1]) * factors[match[2]])
    return lengths


def parse_arguments(arguments):
    """Set the CONSTANTS of train.py that are given. Return the folders and the Options.

    Raise ValueError for an unknown name, and for a value that an option cannot have.
    """
    folders = []
    constants = []
    options = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            folders.append(argument)
        elif name in CONSTANTS:
            constants.append(argument)
        else:
            options[name.lower()] = read_option(name, text)
    train.override(constants)
    if not folders:
        raise ValueError("no FOLDER is given: name the Hugging Face folders to evaluate, such as "
                         "runs/demo/hf; --help shows what else can be set.")
    return folders, Options(**options)


def read_option(name, text):
    """Return the value of an option. Raise ValueError if it is unknown or cannot be used."""
    known = [field.upper() for field in Options._fields]
    if name not in known:
        raise ValueError(f"{name} is not an option: use one of {', '.join([*known, *CONSTANTS])}.")
    if name in RANGES:
        least, most = RANGES[name]
        if not text.isdecimal() or not least <= int(text) <= most:
            raise ValueError(f"{name} {text!r} is out of range: use a number from {least:,} to "
                             f"{most:,}.")
        return int(text)
    if name == "LENGTHS":
        parse_lengths(text)
    if name == "TASKS" and not set(text.split(",")) <= set(tasks.TASKS):
        raise ValueError(f"TASKS {text!r} are not tasks: use some of {','.join(tasks.TASKS)}.")
    return text


def prepare(folders, options):
    """Return the sequence-parallel size, and {folder: (tokenizer, documents)}.

    Raise ValueError or FileNotFoundError for whatever this evaluation cannot use.
    """
    if train.DATA == "synthetic":
        raise ValueError("DATA 'synthetic' is random tokens, which tell nothing of a model: name "
                         "files, or leave DATA out for Python's library.")
    train.complete_constants()
    train.check_constants()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    attention_kernel(train.ATTENTION, device_type, getattr(torch, train.DTYPE))
    world = parallel.world_size()
    sp = train.SEQUENCE_PARALLEL_SIZE or choose_sp(world, folders)
    for folder in folders:
        config = convert.load_config(folder)
        parallel.data_parallel_size(
            world, 1, sp, config.num_attention_heads, config.num_key_value_heads)
    train.make_folder("CACHE_DIR", train.CACHE_DIR)
    train.make_folder("OUT", options.out)

    texts = {}
    lengths = parse_lengths(options.lengths)
    for folder in folders:
        tokenizer = data.open_tokenizer(folder)
        for task in options.tasks.split(","):  # the questions may not fit in the shortest rows
            depths = np.linspace(0, 1, options.depths)
            tasks.make_example(task, min(lengths), depths, tokenizer, train.SEED, 0)
        documents = []
        if options.documents > 0:
            documents = read_documents(folder, tokenizer, max(lengths), options)
        texts[folder] = (tokenizer, documents)
    return sp, texts


def choose_sp(world, folders):
    """Return the largest sequence-parallel size that works for the heads of all folders."""
    configs = [convert.load_config(folder) for folder in folders]
    for sp in range(world, 0, -1):
        try:
            for config in configs:
                parallel.data_parallel_size(
                    world, 1, sp, config.num_attention_heads, config.num_key_value_heads)
            return sp
        except ValueError:
            continue


def main(folders, options):
    # What cannot be used is refused before a process waits for another.
    sp, texts = prepare(folders, options)
    settings = options._asdict()
    settings.update({name: getattr(train, name) for name in CONSTANTS})
    grid = parallel.init(1, sp, {**settings, "folders": folders, "the sequence-parallel size": sp})
    results = {}
    for folder in folders:
        rows = "a row on each" if sp == 1 else f"{sp} of which share a row"
        train.print_once(grid, f"{folder} on {grid.world} ranks, {rows}")
        with train.timed(grid, folder):
            results[folder] = evaluate(folder, *texts[folder], grid, options)
    if grid.rank == 0:
        summaries = summarize(results)
        out = Path(options.out)
        written = {"options": settings, "folders": summaries}
        (out / "evaluation.json").write_text(json.dumps(written, indent=1))
        draw(summaries, options, out / "evaluation.png")
        for folder, summary in summaries.items():
            print(describe(folder, summary))
    parallel.close()
    return results


def print_help():
    """Print the usage, and the options with their comments as they stand in this file."""
    source = Path(__file__).read_text()
    begin = source.index("class Options")
    end = source.index("# The least and the largest")
    print(f"{__doc__}\n{source[begin:end].rstrip()}")


def describe(folder, summary):
    """Return the results of a folder as a few lines of text."""
    lines = [folder]
    for (task, length), score in mean_by(summary["scores"], ("task", "length"), "score").items():
        lines.append(f"  {task:<10} {length:>9,} tokens  {score:6.1%} of answers")
    if summary["evidence"]:
        gains = "  ".join(f"{name} {gain:.2f}" for name, gain in summary["evidence"].items())
        lines.append(f"  gain of an answer from its facts, in nats, by their distance  {gains}")
    if "loss_by_position" in summary:
        losses = summary["loss_by_position"].items()
        lines.append("  loss  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses))
        if summary.get("longppl") is None:
            lines.append(f"  LongPPL: {why_no_longppl(summary)}")
        else:
            lines.append(
                f"  LongPPL {summary['longppl']:.3f} over {summary['key_tokens']:,} key tokens")
    return "\n".join(lines)


def why_no_longppl(summary):
    """Return what keeps the LongPPL of a folder from being measured."""
    if "longppl" in summary:
        return "there are no key tokens"
    return f"needs a length of LENGTHS above {SHORT_CONTEXT:,} tokens"


# ----------------------------------------------------------------------------------------- picture

def draw(summaries, options, path):
    """Draw a row of grids of depth and length for each folder, and below them the curves."""
    from matplotlib.figure import Figure
    names = options.tasks.split(",")
    lengths = parse_lengths(options.lengths)
    n_rows = len(summaries) + 1
    figure = Figure(figsize=(12, 2.6 * len(summaries) + 3.4), layout="constrained")
    figure.suptitle("answers that greedy decoding writes exactly, by depth and length", fontsize=11)
    columns = max(len(names), 3)
    grid = figure.add_gridspec(n_rows, 12, height_ratios=[1] * len(summaries) + [1.3])
    for i, (folder, summary) in enumerate(summaries.items()):
        for j, task in enumerate(names):
            width = 12 // columns
            axes = figure.add_subplot(grid[i, j * width:(j + 1) * width])
            draw_scores(axes, summary["scores"], task, lengths)
            if j == 0:
                axes.set_ylabel(f"{short_name(folder)}\n\ndepth", fontsize=9)
    positions = figure.add_subplot(grid[-1, :4])
    evidence = figure.add_subplot(grid[-1, 4:8])
    longppl = figure.add_subplot(grid[-1, 8:])
    draw_curves(positions, evidence, longppl, summaries)
    figure.savefig(path, dpi=120)


def draw_scores(axes, scores, task, lengths):
    """Draw the share of correct answers of a task by depth (down) and length (to the right)."""
    of_task = [score for score in scores if score["task"] == task]
    depths = sorted({score["depth"] for score in of_task if score["depth"] is not None}) or [None]
    image = np.zeros((len(depths), len(lengths)))
    for score in of_task:
        image[depths.index(score["depth"]), lengths.index(score["length"])] = score["score"]
    axes.imshow(image, cmap="RdYlGn", vmin=0, vmax=1, alpha=0.6, aspect="auto")
    for i, j in np.ndindex(image.shape):
        axes.text(j, i, f"{image[i, j]:.0%}", ha="center", va="center", fontsize=8)
    axes.set_title(task, fontsize=10)
    axes.set_xticks(range(len(lengths)), [short_number(length) for length in lengths], fontsize=8)
    if depths == [None]:
        axes.set_yticks([])
    else:
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)


def draw_curves(positions, evidence, longppl, summaries):
    """Draw loss by position, the gain from evidence by distance, and LongPPL, for each folder."""
    names = [short_name(folder) for folder in summaries]
    for i, (name, summary) in enumerate(zip(names, summaries.values())):
        losses = summary.get("loss_by_position", {})
        positions.plot(list(losses), list(losses.values()), marker="o", ms=4, label=name)
        gains = summary["evidence"]
        evidence.plot(list(gains), list(gains.values()), marker="o", ms=4, label=name)
        value = summary.get("longppl")
        if value is not None:
            longppl.bar(i, value, 0.6, color=f"C{i}")
            longppl.text(i, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
    positions.set_title("loss by position, lower is better", fontsize=10)
    evidence.set_title("gain of an answer from its facts, higher is better", fontsize=10)
    longppl.set_title("LongPPL, lower is better", fontsize=10)
    positions.set_ylabel("nats per token", fontsize=8)
    evidence.set_ylabel("nats per answer", fontsize=8)
    longppl.set_ylabel("perplexity of key tokens", fontsize=8)
    longppl.tick_params(labelsize=8)
    if longppl.patches:
        longppl.set_yscale("log")  # a model beyond its positions has thousands
        longppl.margins(y=0.1)  # room for the numbers above the bars
        longppl.set_ylim(bottom=1)
        longppl.set_xticks(range(len(names)), names, fontsize=8)
    else:
        longppl.set(xticks=[], yticks=[])
        last = list(summaries.values())[-1]
        longppl.text(0.5, 0.5, why_no_longppl(last), ha="center", va="center", fontsize=8,
                     transform=longppl.transAxes)
    for axes in (positions, evidence):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.legend(fontsize=8)
    positions.set_xlabel("position of the token in its document", fontsize=8)
    evidence.set_xlabel("tokens between the first fact and the answer", fontsize=8)


def short_name(folder):
    """Return the last part of a path: "runs/extended/hf", an export of train.py, is "extended"."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "hf" else path.name


def short_number(length):
    """131072 -> "128k"."""
    if length % 1024 == 0:
        return f"{length // 1024}k"
    return str(length)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print_help()
        sys.exit()
    try:
        main(*parse_arguments(sys.argv[1:]))
    except Exception as error:
        train.report(error)
