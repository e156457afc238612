"""Shows what train.py, with the same settings, would train on.

    python tools/show.py [NAME=VALUE ...] [SHOW=0,5] [--lengths]

Prints where the tokens of DATA go. SHOW prints rows of the run as text, with trained tokens in
green. --lengths draws a histogram of the documents' lengths, lengths.png.
"""
import itertools
import signal
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import train  # noqa: E402

GREEN = "\033[32m"
PLAIN = "\033[0m"


def show_row(rows, row, sp, decode):
    """Print a row of the run: its tokens, its documents, and the shards of the sp ranks."""
    shards = [rows.batch(row, sp, rank) for rank in range(sp)]
    ids = torch.cat([shard.input_ids for shard in shards]).tolist()
    labels = torch.cat([shard.labels for shard in shards]).tolist()
    positions = torch.cat([shard.position_ids for shard in shards]).tolist()

    # A mark is what to print before a token: (its index, text).
    marks = []
    if sp > 1:
        for rank in range(sp):
            marks.append((len(ids) // sp * rank, f"\n=== shard of rank {rank}"))
    pieces = rows.find(row)
    starts = [0, *np.cumsum(pieces["length"])]  # of pieces, and of the padding or the next row
    marks += color_marks(labels, [start for start in starts if start < len(ids)])
    marks += document_marks(rows, pieces, positions)
    marks.sort(key=lambda mark: mark[0])
    marks.append((len(ids), PLAIN + "\n"))

    # The tokens between two marks are decoded together, as one character may have several tokens.
    for (start, text), (end, _) in itertools.pairwise(marks):
        print(text + decode(ids[start:end]), end="")
    print(marks[-1][1], end="")


def color_marks(labels, starts):
    """Mark where trained tokens begin and end: a token is trained if it is the label before it.

    starts: the indices at which pieces of documents and the padding begin. The label before such a
    token is of another piece.
    """
    trained = [False] + [label != data.IGNORE for label in labels[:-1]]
    for start in starts:
        trained[start] = False
    marks = []
    for i in range(1, len(trained)):
        if trained[i] != trained[i - 1]:
            marks.append((i, GREEN if trained[i] else PLAIN))
    return marks


def document_marks(rows, pieces, positions):
    """Mark where the pieces of documents and the padding begin."""
    ends = np.cumsum(pieces["length"])
    marks = []
    for (document, start, n), end in zip(pieces, ends):
        first = end - n
        text = (f"\n--- document {document}, {n} tokens from {start} of {rows.lengths[document]}, "
                f"positions from {positions[first]}\n")
        marks.append((first, text))
    if ends[-1] < len(positions):
        marks.append((ends[-1], "\n--- padding\n"))
    return marks


def draw_lengths(lengths):
    from matplotlib import pyplot

    pyplot.hist(lengths, bins=100)
    pyplot.xlabel("tokens of a document")
    pyplot.savefig("lengths.png")
    pyplot.close()


def parse_rows(text):
    """"0,5" -> [0, 5]. Raise ValueError for anything else."""
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"SHOW={text} are not numbers of rows: use values like 0 or 0,5.")
    return [int(number) for number in numbers]


def main(arguments):
    shown = []
    settings = []
    for argument in arguments:
        if argument.startswith("SHOW="):
            shown += parse_rows(argument.removeprefix("SHOW="))
        elif argument != "--lengths":
            settings.append(argument)
    train.override(settings)

    # The rows do not depend on the number of processes. Plan for as few as these settings allow.
    world = max(train.SEQUENCE_PARALLEL_SIZE, 1) * train.REPLICAS
    folder, config, sp, _ = train.plan(world)
    if isinstance(train.EVAL_DATA, float):  # a share of DATA, which is not trained
        rows, _ = train.open_all_data(folder, config)
    else:
        rows = train.open_data(train.DATA, folder, config)
    print(rows.describe())
    for row in shown:
        show_row(rows, row, sp, data.open_tokenizer(folder).decode)
    if "--lengths" in arguments:
        draw_lengths(rows.corpus.full)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the output may be cut, as by `| head`
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    try:
        main(sys.argv[1:])
    except Exception as error:
        train.report(error)
