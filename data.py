"""From documents to micro-batches: packing and order.

A row of the run holds pieces of documents, side by side: up to MAX_LENGTH tokens of them or, with
PACKING=none, up to BATCH_SIZE documents. The rows of a step depend on the seed and the step alone.
Ranks appear as integers only: how many there are, and which one asks for its shard of a row.
"""
import bisect
import functools
import math
import zlib
from typing import NamedTuple

import numpy as np
import torch

# Those who import this module also use the names of the other two as its own.
from corpus import (  # noqa: F401
    DOCUMENT, Corpus, build_corpus, check_columns, find_files, hold_out, is_chat, read_rows)
from examples import (  # noqa: F401
    FORMATS, IGNORE, KEYS, Encoder, bounded, first_tokens, is_trained, mask, naming, open_tokenizer,
    token_ids)

MANY_DROPPED = 0.1  # of the tokens: if OVERLONG drops more, it is warned of
ORDER_VERSION = 2  # raise it when the same documents would give other rows, so that no run is resumed
NO_TARGET = ~0  # an untrained token, used as the next token where a document has none


class Batch(NamedTuple):
    """One micro-batch in CPU memory: a flat row of T tokens, or the t = T/P of one of P ranks."""
    input_ids: torch.Tensor     # (t,) int64
    labels: torch.Tensor        # (t,) int64: the next token of the same document, or IGNORE
    position_ids: torch.Tensor  # (t,) int64: position in the segment
    cu_seqlens: torch.Tensor    # (d+1,) int32: boundaries of the segments of the whole row
    max_seqlen: int             # length of the longest segment of the whole row
    weights: torch.Tensor       # (t,) float32: LOSS_WEIGHT of each target, 0 where there is none
    sources: torch.Tensor       # (t,) int64: index in DATA of the source of each token; 0: padding
    checksum: int               # of the tokens of the whole row


# -------------------------------------------------------------------------------------- packing
# A piece is a part of a document that lies in one row. Each pack function takes the lengths of
# the documents in their order. It returns the pieces of all rows, one row after the other, and the
# index of the first piece of each row.

PIECE = np.dtype([("document", np.int64), ("start", np.int64), ("length", np.int64)])


def make_pieces(document, start, length):
    pieces = np.empty(len(document), PIECE)
    pieces["document"] = document
    pieces["start"] = start
    pieces["length"] = length
    return pieces


def pack_split(lengths, max_length):
    """Concatenate the documents, and cut this stream of tokens after every max_length."""
    document_starts = np.cumsum(lengths) - lengths
    row_starts = np.arange(0, lengths.sum(), max_length)
    # A piece begins where a document or a row begins.
    position = np.union1d(document_starts, row_starts)  # in the stream, (pieces,)
    document = np.searchsorted(document_starts, position, "right") - 1
    start = position - document_starts[document]
    left_in_document = lengths[document] - start
    left_in_row = max_length - position % max_length
    pieces = make_pieces(document, start, np.minimum(left_in_document, left_in_row))
    first_of_row = np.flatnonzero(position % max_length == 0)
    return pieces, first_of_row


def pack_whole(lengths, max_length):
    """Fill rows with uncut documents; those of more than max_length come in pieces."""
    pieces = cut_documents(lengths, max_length)
    order, first_of_row = knapsack(pieces["length"], max_length)
    return pieces[order], first_of_row


def pack_none(lengths, max_length, batch_size):
    """Put batch_size documents into each row; those of more than max_length come in pieces."""
    pieces = cut_documents(lengths, max_length)
    first_of_row = np.arange(0, len(pieces), batch_size)
    return pieces, first_of_row


def cut_documents(lengths, max_length):
    """Return the pieces of all documents, of max_length except for the last of a document."""
    n_pieces = -(-lengths // max_length)
    document = np.repeat(np.arange(len(lengths)), n_pieces)
    first_piece = np.cumsum(n_pieces) - n_pieces
    number_in_document = np.arange(len(document)) - first_piece[document]
    start = number_in_document * max_length
    length = np.minimum(lengths[document] - start, max_length)
    return make_pieces(document, start, length)


def knapsack(lengths, capacity):
    """Pack lengths into bins. Each bin takes the longest that still fits until none fits.

    Return the indices of the lengths, bin after bin, and where each bin begins among them.
    """
    # Equal lengths keep their order, which was drawn at random.
    order = np.argsort(lengths, kind="stable")
    distinct, first = np.unique(lengths[order], return_index=True)
    distinct = distinct.tolist()
    left = dict(zip(distinct, np.split(order, first[1:])))  # length: indices not packed yet
    packed = []
    bin_sizes = []
    while distinct:
        taken = fill_bin(distinct, left, capacity)
        # The same bin is repeated while there are lengths for it. So the work grows with the
        # number of distinct lengths, not with the number of documents.
        repeats = min(len(left[length]) // n for length, n in taken.items())
        columns = []
        for length, n in taken.items():
            columns.append(left[length][:n * repeats].reshape(repeats, n))
            left[length] = left[length][n * repeats:]
            if len(left[length]) == 0:
                del distinct[bisect.bisect_left(distinct, length)]
        bins = np.hstack(columns)  # (repeats, lengths in a bin)
        packed.append(bins.ravel())
        bin_sizes += [bins.shape[1]] * repeats
    first_of_bin = np.cumsum(bin_sizes) - bin_sizes
    return np.concatenate(packed), first_of_bin


def fill_bin(distinct, left, capacity):
    """Return {length: how many of it} for one bin. distinct: the lengths in `left`, sorted."""
    taken = {}
    free = capacity
    i = bisect.bisect_right(distinct, free) - 1  # the longest that fits
    while i >= 0:
        length = distinct[i]
        n = min(len(left[length]), free // length)
        taken[length] = n
        free -= n * length
        i = bisect.bisect_right(distinct, free, 0, i) - 1
    return taken


def group_by_length(lengths, step, rng, at=0):
    """Return the indices of lengths in an order where those of one step are similar.

    step: documents in a step. at: documents that the first step has already.
    """
    # As in XTuner, lengths are sorted within stretches of up to 50 steps.
    position = at + np.arange(len(lengths))
    steps_per_stretch = max(1, min(len(lengths) // (4 * step), 50))
    stretch = position // (steps_per_stretch * step)
    order = np.lexsort((-lengths, stretch))
    # The longest of all comes first: if memory is too small, this shows at once.
    longest = np.argmax(lengths[order])
    order[[0, longest]] = order[[longest, 0]]

    # The steps of a stretch are shuffled, as a loss that follows the lengths would swing. The
    # first step stays first, and the last step, which may be incomplete, stays last.
    draw = rng.random(position[-1] // step + 1)  # (steps,)
    draw[-1] = 2
    draw[0] = -1
    return order[np.lexsort((draw[position // step], stretch))]


# ---------------------------------------------------------------------- documents within a row
# Under sequence parallelism a row is cut into equal shards. A document inside one shard is attended
# by that rank alone. One that crosses a border is exchanged, and its attention is divided among all
# ranks. So the longest documents should lie across the borders, and the others such that each rank
# has as much attention to compute. The order is made for 2, 4 and 8 shards at once, whatever
# the number of ranks: it must not depend on how the work is divided.

BORDER_LEVELS = 3  # 2**3 shards


def order_for_shards(lengths):
    """Return an order of the documents of a row, with these lengths, that suits its shards."""
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    return order_span(longest_first, lengths.tolist(), 0, 0, BORDER_LEVELS)


def order_span(documents, lengths, before, after, levels):
    """Return an order of `documents`, the longest first, for one span of a row and its halves.

    before, after: tokens at the span's ends that belong to documents across its borders.
    """
    if levels == 0 or len(documents) < 2:
        return documents
    half = (before + after + sum(lengths[i] for i in documents)) / 2

    # Two layouts: no document across the middle, or the longest one, half of whose work is then on
    # each side. The one whose busier side has less work is taken.
    left, right, work = divide(documents, lengths, half - before, half - after)
    middle = []
    longest = documents[0]
    part = lengths[longest] / 2
    left_of_it, right_of_it, work_beside = divide(
        documents[1:], lengths, half - before - part, half - after - part)
    if work_beside + lengths[longest] ** 2 / 2 < work:
        left = left_of_it
        right = right_of_it
        middle = [longest]

    left_end = half - before - sum(lengths[i] for i in left)
    right_start = half - after - sum(lengths[i] for i in right)
    left = order_span(left, lengths, before, max(left_end, 0), levels - 1)
    right = order_span(right, lengths, max(right_start, 0), after, levels - 1)
    return left + middle + right


def divide(documents, lengths, left_capacity, right_capacity):
    """Divide documents, the longest first, into two lists of similar attention work.

    Return the lists, and the larger of their sums of squared lengths.
    """
    sides = ([], [])
    free = [left_capacity, right_capacity]
    work = [0, 0]
    for i in documents:
        side = 0 if work[0] <= work[1] else 1
        if lengths[i] > free[side]:
            side = 0 if free[0] >= free[1] else 1
        sides[side].append(i)
        free[side] -= lengths[i]
        work[side] += lengths[i] ** 2
    return sides[0], sides[1], max(work)


# ----------------------------------------------------------------------------------------- rows

WEIGHT_EXPONENT = {"token": 0.0, "sample": -1.0, "square": -0.5}  # of the targets of a document


class PackedEpoch(NamedTuple):
    """The rows of one epoch in the order of training. Row i is pieces[first[i]:end[i]]."""
    pieces: np.ndarray  # (pieces,) PIECE
    first: np.ndarray   # (rows,) int64
    end: np.ndarray     # (rows,) int64


class Rows:
    """The rows of a run: those of epoch 0, of epoch 1, and so on.

    The order of an epoch depends on the seed and its number only: there is no state to save.
    """

    def __init__(self, corpus, packing, max_length, seed, batch_size=1, use_varlen_attn=True,
                 loss_weight="token", grouped_rows=0):
        self.corpus = corpus
        self.packing = packing
        self.max_length = max_length
        self.seed = seed
        # Without packing, the documents of a row are only beside each other: each is a segment.
        self.use_varlen_attn = use_varlen_attn or packing == "none"
        self.loss_weight = loss_weight
        if packing == "none":
            self.batch_size = batch_size
            self.documents_per_step = grouped_rows * batch_size  # 0: not grouped by length
        else:
            self.batch_size = 1
            self.documents_per_step = 0
        self.lengths = np.diff(corpus.offsets)
        n_documents = [end - first for first, end, _ in corpus.sources]
        self.source_of_document = np.repeat(np.arange(len(n_documents)), n_documents)
        self.sizes = {}  # epoch: its number of rows
        # A step may have rows of two epochs, so the last two that were packed are remembered.
        self.packed = functools.lru_cache(maxsize=2)(self.pack)
        self.per_epoch = self.size(0)

    def documents(self, epoch):
        """Return the documents of an epoch: of each source, as many as its epochs say."""
        chosen = []
        for first, end, epochs in self.corpus.sources:
            documents = np.arange(first, end)
            if self.corpus.selected is not None:
                documents = documents[self.corpus.selected[first:end]]
            n = len(documents)
            # A source of 0.3 epochs cycles through its documents in a fixed random order, so that
            # all of them are seen before any is seen again.
            # The 1 keeps it apart from the order of an epoch of that number, see `pack`.
            order = np.random.default_rng((self.seed, first, 1)).permutation(n)
            position = np.arange(round(epoch * epochs * n), round((epoch + 1) * epochs * n))
            chosen.append(documents[order[position % n]])
        return np.concatenate(chosen)

    def pack(self, epoch):
        """Pack the documents of an epoch. Return its PackedEpoch; others call self.packed."""
        rng = np.random.default_rng((self.seed, epoch))
        documents = rng.permutation(self.documents(epoch))
        documents = documents[self.lengths[documents] > 0]
        if len(documents) == 0:
            if epoch == 0:
                raise ValueError("the first epoch of DATA or EVAL_DATA holds no token: raise the "
                                 "epochs of its sources")
            none = np.empty(0, np.int64)
            return PackedEpoch(np.empty(0, PIECE), none, none)

        lengths = self.lengths[documents]
        if self.packing == "split":
            pieces, first = pack_split(lengths, self.max_length)
        elif self.packing == "whole":
            pieces, first = pack_whole(lengths, self.max_length)
        else:
            pieces, first = pack_none(lengths, self.max_length, self.batch_size)
        pieces["document"] = documents[pieces["document"]]
        end = np.append(first[1:], len(pieces))

        # Grouping replaces the shuffling of rows. An epoch may end within a step, so the first step
        # of this one may have documents of the epoch before.
        if self.documents_per_step > 0:
            rows_before = sum(self.size(earlier) for earlier in range(epoch))
            at = rows_before * self.batch_size % self.documents_per_step
            order = group_by_length(pieces["length"], self.documents_per_step, rng, at)
            return PackedEpoch(pieces[order], first, end)
        order = rng.permutation(len(first))
        return PackedEpoch(pieces, first[order], end[order])

    def size(self, epoch):
        """Return the number of rows of an epoch."""
        if epoch not in self.sizes:
            self.sizes[epoch] = len(self.packed(epoch).first)
        return self.sizes[epoch]

    def count(self, epochs):
        """Return the number of rows of so many epochs, which may be a fraction."""
        # Epochs may differ by some rows, as they pack other documents, or in another order.
        rows = 0
        for epoch in range(math.ceil(epochs)):
            rows += min(epochs - epoch, 1) * self.size(epoch)
        return math.ceil(round(rows, 6))  # 1.1 epochs of 100 rows are 110.00000000000001

    def find(self, row):
        """Return the pieces of a row of the run in their order in it, an array of PIECE."""
        pieces = self.find_unordered(row)
        if self.use_varlen_attn:  # or else the order of documents matters
            pieces = pieces[order_for_shards(pieces["length"])]
        return pieces

    def find_unordered(self, row):
        epoch = 0
        while row >= self.size(epoch):
            row -= self.size(epoch)
            epoch += 1
        pieces, first, end = self.packed(epoch)
        return pieces[first[row]:end[row]]

    def batch(self, row, sp, sp_rank):
        """Return the shard of rank sp_rank of a row of the run, or of a row of padding if None."""
        pieces = np.empty(0, PIECE) if row is None else self.find(row)
        segments = [self.read_with_next(*piece) for piece in pieces]
        lengths = pieces["length"]
        # Documents without targets have no weights, but 0 ** -1 must not be computed.
        n_targets = self.corpus.targets[pieces["document"]].clip(1)
        sources = self.source_of_document[pieces["document"]]

        # T must be a multiple of sp. The padding is a segment of its own, without targets.
        T = int(lengths.sum())
        padding = -T % sp if T > 0 else sp
        if padding > 0:
            segments.append(np.full(padding + 1, NO_TARGET))
            lengths = np.append(lengths, padding)
            n_targets = np.append(n_targets, 1)
            sources = np.append(sources, 0)
            T += padding

        # Labels are made before the row is cut into shards: the target of the last position of a
        # shard is the first token of the next shard.
        tokens = np.concatenate([segment[:-1] for segment in segments])  # (T,)
        next_tokens = np.concatenate([segment[1:] for segment in segments])  # (T,)
        has_target = is_trained(next_tokens)
        labels = np.where(has_target, next_tokens, IGNORE)
        weights = np.repeat(n_targets ** WEIGHT_EXPONENT[self.loss_weight], lengths) * has_target
        sources = np.repeat(sources, lengths)  # (T,)
        if not self.use_varlen_attn:
            lengths = np.array([T])  # one segment: tokens attend across documents
        position_ids = np.concatenate([np.arange(length) for length in lengths])  # (T,)
        cu_seqlens = np.cumsum([0, *lengths])  # (d+1,)

        t = T // sp
        shard = slice(t * sp_rank, t * (sp_rank + 1))
        return Batch(
            input_ids=torch.from_numpy(token_ids(tokens)[shard]),  # (t,)
            labels=torch.from_numpy(labels[shard]),
            position_ids=torch.from_numpy(position_ids[shard]),
            cu_seqlens=torch.from_numpy(cu_seqlens).int(),  # (d+1,)
            max_seqlen=int(max(lengths)),
            weights=torch.from_numpy(weights[shard]).float(),
            sources=torch.from_numpy(sources[shard]),
            checksum=zlib.crc32(tokens),
        )

    def read_with_next(self, document, start, length):
        """Return the tokens of a piece and the one that follows it, (length + 1,) int64."""
        tokens = self.corpus.read(document, start, start + length + 1)
        # At the end of a document, read returns one token less, and NO_TARGET takes its place.
        return np.append(tokens, NO_TARGET)[:length + 1]

    def step(self, step, global_batch_size, dp, dp_rank, sp, sp_rank, total):
        """Return the micro-batches of optimizer step `step` (from 1) for one rank.

        total: the number of rows of the run; later ones are padding.
        """
        first = (step - 1) * global_batch_size
        end = min(first + global_batch_size, total)
        work = {}  # of a row: attention grows with the square of the length of a piece
        for row in range(first, end):
            work[row] = (self.find_unordered(row)["length"] ** 2).sum()

        # Which rows a step has does not depend on the ranks, but who computes them does. As ranks
        # wait for one another, the dp heaviest rows are dealt first, then the next dp, each time
        # the heaviest to the rank with the least work so far.
        rows = sorted(work, key=work.get, reverse=True)
        rows += [None] * (global_batch_size - len(rows))
        mine = []
        load = np.zeros(dp)
        for i in range(0, global_batch_size, dp):
            lightest_first = np.argsort(load, kind="stable")
            for rank, row in zip(lightest_first, rows[i:i + dp]):
                if row is not None:
                    load[rank] += work[row]
                if rank == dp_rank:
                    mine.append(row)
        return [self.batch(row, sp, sp_rank) for row in mine]

    def accounting(self):
        """Return counts of the first epoch: where its tokens go, and how its rows are filled.

        Padding is what rows lack to max_length (times batch_size); it is not computed.
        """
        documents = self.documents(0)
        full = self.corpus.full[documents]
        kept = self.lengths[documents]
        targets = self.corpus.targets[documents]

        # The attention of a row is the sum of its squared piece lengths. Without the boundaries of
        # documents it would be the square of the row's length.
        pieces, first, _ = self.packed(0)
        lengths = pieces["length"]
        row_lengths = np.add.reduceat(lengths, np.sort(first))
        attention = 1.0
        if self.use_varlen_attn:
            attention = (lengths ** 2).sum() / (row_lengths ** 2).sum()
        capacity = len(first) * self.max_length * self.batch_size
        is_beginning = pieces["start"] == 0
        is_part = lengths < self.lengths[pieces["document"]]
        return {
            "documents": len(documents),
            "empty": (full == 0).sum(),
            "without_target": ((kept > 0) & (targets == 0)).sum(),
            "dropped_documents": ((full > 0) & (kept == 0)).sum(),
            "shortened": ((kept > 0) & (kept < full)).sum(),
            "tokens": full.sum(),
            "trained": targets.sum(),
            "masked": (kept - targets).sum(),
            "dropped": (full - kept).sum(),
            "rows": len(first),
            "padding": capacity - kept.sum(),
            "fill": kept.sum() / capacity,
            "pieces_a_row": len(pieces) / len(first),
            "cut_documents": (is_beginning & is_part).sum(),
            "attention": attention,
            "lengths": length_histogram(full),
        }

    def describe(self):
        """Return the accounting as a few lines of text."""
        counts = self.accounting()
        histogram = counts.pop("lengths")
        tallest = max(histogram.values())
        bars = []
        for length, count in histogram.items():
            bars.append(f"{length:,} {'▁▂▃▄▅▆▇█'[7 * count // tallest]}")
        text = (
            "{notes}\n"
            "{documents:,} documents: {empty:,} empty, {without_target:,} without a target, "
            "{dropped_documents:,} dropped, {shortened:,} shortened, {cut_documents:,} cut by "
            "rows\n"
            "{tokens:,} tokens = {trained:,} trained + {masked:,} masked or first + {dropped:,} "
            "dropped\n"
            "{rows:,} rows, {fill:.2%} full (the {padding:,} tokens that they lack are not computed); "
            "{pieces_a_row:.1f} pieces in each, with {attention:.1%} of the attention of undivided "
            "rows\n"
            "lengths of documents, in tokens from: {bars}"
        )
        if counts["dropped"] > MANY_DROPPED * counts["tokens"]:
            share = counts["dropped"] / counts["tokens"]
            text += (f"\nWARNING: {share:.0%} of the tokens are dropped from documents longer than "
                     f"MAX_LENGTH {self.max_length}: raise it, or change OVERLONG")
        notes = self.corpus.notes
        return text.format(**counts, bars="  ".join(bars), notes=notes).lstrip()


def length_histogram(lengths):
    """Return {2**i: how many lengths are from 2**i to below 2**(i+1)}, without zeros."""
    counts = np.bincount(np.log2(lengths[lengths > 0]).astype(int))
    return {2**i: count for i, count in enumerate(counts) if count > 0}
