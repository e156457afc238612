"""Draw exchange.png: which heads of which tokens a rank has, before and during attention.

    python bench/exchange.py
"""
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

RANKS = 4
HEADS = 8
DOCUMENTS = (3, 4, 1, 2, 4, 2)  # tokens of each; the second and the fifth cross into another shard
TOKENS = sum(DOCUMENTS)
COLORS = ListedColormap(("#4c78a8", "#f2a541", "#6aa56e", "#c56b8a"))


def owners_by_tokens():
    """Return (T, H): the rank that has each head of each token while they are projected."""
    rank = np.arange(TOKENS) * RANKS // TOKENS
    return np.repeat(rank[:, None], HEADS, axis=1)


def owners_by_heads():
    """Return (T, H): the rank that has them while a document of all ranks is attended."""
    rank = np.arange(HEADS) * RANKS // HEADS
    return np.repeat(rank[None], TOKENS, axis=0)


def owners_of_documents():
    """Return (T, H): a document inside one shard stays with its rank, the others are exchanged."""
    by_tokens = owners_by_tokens()
    owners = owners_by_heads()
    start = 0
    for length in DOCUMENTS:
        ranks = by_tokens[start:start + length]
        if ranks.min() == ranks.max():
            owners[start:start + length] = ranks
        start += length
    return owners


def draw(axes, owners, title, documents):
    axes.pcolormesh(owners, cmap=COLORS, vmin=0, vmax=RANKS - 1, edgecolor="white", linewidth=1)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    for edge in np.cumsum(documents)[:-1]:
        axes.axhline(edge, color="black", linewidth=2)


def draw_arrow(figure, x, text):
    """A double arrow between two panels, with its text above it."""
    figure.text(x, 0.53, text, ha="center", va="bottom", fontsize=9)
    figure.text(x, 0.50, "\u27f7", ha="center", va="top", fontsize=22)


def main():
    figure = Figure(figsize=(11, 4.4))
    width = 0.145
    panels = []
    for left in (0.05, 0.305, 0.555, 0.81):
        panels.append(figure.add_axes((left, 0.14, width, 0.64)))

    draw(panels[0], owners_by_tokens(), "(T/P, H, D)\na rank: its tokens, all heads", [TOKENS])
    draw(panels[1], owners_by_heads(), "(T, H/P, D)\na rank: all tokens, its heads", [TOKENS])
    draw(panels[2], owners_by_tokens(), "six documents, the same shards", DOCUMENTS)
    draw(panels[3], owners_of_documents(),
         "only documents in two\nshards are exchanged", DOCUMENTS)
    panels[0].set_ylabel("tokens of the row", fontsize=10)
    for axes in panels:
        axes.set_xlabel("heads", fontsize=10)
    draw_arrow(figure, 0.25, "all-to-all")
    draw_arrow(figure, 0.755, "all-to-all")
    figure.text(0.25, 0.95, "One document in the row", ha="center", fontsize=12)
    figure.text(0.755, 0.95, "Packed documents", ha="center", fontsize=12)

    for rank in range(RANKS):
        x = 0.32 + 0.1 * rank
        figure.text(x, 0.02, "\u25a0", color=COLORS(rank), fontsize=14, ha="right")
        figure.text(x + 0.005, 0.025, f"rank {rank}", fontsize=10)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
