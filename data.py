"""From files to rows: formats, chat masks, the token cache, packing, order, batches.

A document is a run of tokens, some of them trained. A row is up to MAX_LENGTH tokens of documents side by side; a piece
of a document in a row is a segment. Which rows a step sees is a function of the seed and the step alone: there is no
loader state. Parallelism is two integers here: which rows (dp), which share of a row (sp).
"""
import bisect
import fcntl
import glob
import hashlib
import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

IGNORE = -100

class Batch(NamedTuple):
    """One micro-batch: a flat row of T tokens, or one rank's t of them, on the host."""
    input_ids: torch.Tensor     # (t,) int64
    labels: torch.Tensor        # (t,) int64: the token that follows in the same document, or -100
    position_ids: torch.Tensor  # (t,) int64: position in its segment
    cu_seqlens: torch.Tensor    # (n+1,) int32: the whole row's segments, never cut
    max_seqlen: int             # the longest of them
    weights: torch.Tensor       # (t,) float32: LOSS_WEIGHT of each target, 0 where there is none

# ------------------------------------------------------------------------------------------------------------- formats
def find_files(data):
    """A path, glob or list of them -> sorted files. FileNotFoundError names what matches nothing."""
    files = []
    for pattern in [data] if isinstance(data, str) else data:
        found = sorted(glob.glob(str(pattern), recursive=True))
        if not found:
            raise FileNotFoundError(f"DATA {pattern!r} matches no file: name .jsonl files, or globs of them")
        files += found
    for f in files:
        if not f.endswith(".jsonl"):
            raise ValueError(f"DATA {f!r} is not a .jsonl file: convert it, one JSON object a line")
    return files

def read_rows(files):
    """Yields (file:line, row as a dict). Blank lines, CRLF and a BOM are accepted; ValueError for anything else odd."""
    for path in files:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                where = f"{path}:{number}"
                try:
                    line = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    row = json.loads(line) if line else None
                except UnicodeDecodeError as e:
                    raise ValueError(f"{where}: not UTF-8 ({e.reason} at byte {e.start}): convert the file") from e
                except json.JSONDecodeError as e:
                    raise ValueError(f"{where}: not JSON ({e.msg} at column {e.colno}): mend or remove the line") from e
                if line and not isinstance(row, dict):
                    raise ValueError(f"{where}: a {type(row).__name__}, not an object: each line is {{...}}")
                if line:
                    yield where, row

def to_text(where, row, tokenizer):
    """A row, its format told by its keys -> (text, trained character spans; None: a plain text, trained whole)."""
    formats = [key for key in ("text", "messages") if key in row]
    if len(formats) != 1:
        raise ValueError(f"{where}: keys {sorted(row)} match {' and '.join(formats) or 'no format'}: a row has either "
                         "`text` or `messages`")
    if formats == ["text"]:
        if not isinstance(row["text"], str):
            raise ValueError(f"{where}: text is {json.dumps(row['text'])[:40]}, not a string: mend or remove the line")
        return row["text"], None
    return chat_text(where, row["messages"], tokenizer)

def chat_text(where, messages, tokenizer):
    """Messages -> the template's text and the spans to train: what the template writes for an assistant's turn, its end
    of turn included, found by rendering prefixes. ValueError names the turn whose prefix is none, or a row without
    one."""
    roles = ("system", "user", "assistant", "tool")
    for i, m in enumerate(messages if isinstance(messages, list) and messages else [None]):
        if not isinstance(m, dict) or m.get("role") not in roles or not isinstance(m.get("content"), str):
            raise ValueError(f"{where}: message {i} is {json.dumps(m)[:60]}: each needs a role of {', '.join(roles)} "
                             "and a string content")
        for token in tokenizer.all_special_tokens:
            if token in m["content"]:
                raise ValueError(f"{where}: message {i} contains the control token {token!r}, which would end or open "
                                 "a turn: remove it")

    def render(upto, prompt):
        return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)

    text, spans = render(len(messages), False), []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            before, after = render(i, True), render(i + 1, False)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(f"{where}: message {i}: the chat template writes earlier turns anew once a later one "
                                 "follows, so the trained tokens cannot be told: train one turn a row")
            spans.append((len(before), len(after.rstrip())))
    if not spans:
        raise ValueError(f"{where}: no assistant turn, so nothing to train: remove the row")
    return text, spans

def encode(batch, tokenizer, append_eos):
    """[(text, spans)] -> [int32 array]: token ids, those not trained as their complement ~id, which is negative."""
    backend, out = tokenizer.backend_tokenizer, []
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    eos = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []
    plain = all(spans is None for _, spans in batch)
    backend.encode_special_tokens = plain  # in plain text "<|endoftext|>" is fourteen characters, not a token
    encoded = backend.encode_batch_fast([t for t, _ in batch], add_special_tokens=False) if plain else \
        backend.encode_batch([t for t, _ in batch], add_special_tokens=False)
    backend.encode_special_tokens = False
    for (_, spans), e in zip(batch, encoded):
        if spans is None:
            out.append(np.array(bos + e.ids + eos if e.ids else [], np.int32))
        else:
            ids, starts = np.array(e.ids, np.int32), np.array([s for s, _ in e.offsets])
            trained = np.zeros(len(ids), bool)
            for start, end in spans:
                trained |= (starts >= start) & (starts < end)
            out.append(np.where(trained, ids, ~ids))
    return out

# --------------------------------------------------------------------------------------------------------- token cache
class Corpus(NamedTuple):
    """Tokenized documents, memory-mapped. Document i is tokens[offsets[i]:offsets[i + 1]]."""
    tokens: np.ndarray      # int32; ~id where the token is not trained
    offsets: np.ndarray     # (documents + 1,) int64
    targets: np.ndarray     # (documents,) int64: trained tokens but a first one, which nothing precedes
    key: str                # hash of files, tokenizer and settings

    def read(self, document, start, end):
        """Tokens start to end of a document, fewer where it ends before."""
        first, last = self.offsets[document:document + 2]
        return self.tokens[first + start:min(first + end, last)]

@contextmanager
def locked(path):
    """One process of this host at a time; the others wait, before any process group exists to run into a timeout."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def build_corpus(data, folder, cache, append_eos=True, vocab_size=None):
    """-> Corpus of the files `data`, tokenized with the tokenizer of the Hugging Face folder by whichever process comes
    first. The key holds the content of files and tokenizer: a changed file is another corpus."""
    files, digest = find_files(data), hashlib.sha256(json.dumps([1, append_eos]).encode())
    patterns = ("tokenizer*", "*.jinja", "special_tokens_map.json")
    tokenizer_files = sorted(f for p in patterns for f in Path(folder).glob(p))
    for f in [*files, *tokenizer_files]:
        with open(f, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    key = digest.hexdigest()[:16]
    home = Path(cache) / key
    with locked(Path(cache) / f"{key}.lock"):
        if not home.exists():
            _tokenize(files, folder, home, append_eos)
    corpus = Corpus(np.memmap(home / "tokens.bin", np.int32, "r"), np.load(home / "offsets.npy"),
                    np.load(home / "targets.npy"), key)
    largest = int(np.load(home / "largest.npy"))
    if vocab_size and largest >= vocab_size:
        raise ValueError(f"token id {largest} in {data} is beyond the model's vocabulary of {vocab_size}: the "
                         f"tokenizer of {folder} is not the model's")
    return corpus

def _tokenize(files, folder, home, append_eos):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    part, begun, largest = home.with_suffix(".part"), time.time(), 0
    part.mkdir(exist_ok=True)
    lengths, targets, batch, characters = [], [], [], 0
    total, shown = sum(Path(f).stat().st_size for f in files), begun
    with open(part / "tokens.bin", "wb") as out:
        def flush():
            nonlocal largest
            for ids in encode(batch, tokenizer, append_eos):
                out.write(ids.tobytes())
                lengths.append(len(ids))
                targets.append(int((ids[1:] >= 0).sum()))
                largest = max(largest, int(np.maximum(ids, ~ids).max(initial=0)))
            batch.clear()

        for where, row in read_rows(files):
            batch.append(to_text(where, row, tokenizer))
            characters += len(batch[-1][0])
            if len(batch) == 1000:
                flush()
            if time.time() - shown > 5:
                shown, done = time.time(), characters / total
                left = (shown - begun) * (1 / done - 1)
                print(f"tokenizing {done:4.0%}, {sum(lengths):,} tokens, {left:.0f} s to go", flush=True)
        flush()
    if not sum(targets):
        raise ValueError(f"{files[0]}{' and others' if files[1:] else ''} hold no token to train: name other DATA")
    np.save(part / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(part / "targets.npy", np.array(targets, np.int64))
    np.save(part / "largest.npy", np.array(largest))
    part.rename(home)

class Synthetic(NamedTuple):
    """DATA="synthetic": documents of one length, of random tokens below vocab_size, made when they are read."""
    documents: int
    length: int
    vocab_size: int
    key: str = "synthetic"

    @property
    def offsets(self):
        return np.arange(self.documents + 1, dtype=np.int64) * self.length

    @property
    def targets(self):
        return np.full(self.documents, self.length - 1)

    def read(self, document, start, end):
        return np.random.default_rng(int(document)).integers(0, self.vocab_size, self.length, np.int32)[start:end]

# ------------------------------------------------------------------------------------------------------ packing, order
class Segments(NamedTuple):
    """The rows of an epoch. Row r is segments rows[r] to rows[r + 1]; segment i is `length` tokens of a document."""
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    rows: np.ndarray

def pack_split(lengths, order, max_length):
    """Documents end to end in `order`, cut every max_length tokens: nothing is lost. Neighbouring rows share documents,
    so Rows deals them out of order."""
    ends = np.cumsum(lengths[order])
    total = int(ends[-1])
    edges = np.unique(np.concatenate([[0], ends, np.arange(max_length, total, max_length)]))
    starts = edges[:-1]
    which = np.searchsorted(ends, starts, "right")
    rows = np.searchsorted(starts, np.arange(0, total, max_length))
    return Segments(order[which], starts - (ends - lengths[order])[which], np.diff(edges), np.append(rows, len(starts)))

def knapsack(lengths, capacity):
    """-> lists of indices: each bin takes the longest that still fits until none does. O(n log n): equal lengths share
    one entry of the sorted list that is searched."""
    by_length = {}
    for i in np.argsort(lengths, kind="stable")[::-1].tolist():
        by_length.setdefault(int(lengths[i]), []).append(i)
    left, bins = sorted(by_length), []
    while left:
        bins.append([])
        room = capacity
        while (at := bisect.bisect_right(left, room) - 1) >= 0:
            n = left[at]
            bins[-1].append(by_length[n].pop())
            room -= n
            if not by_length[n]:
                left.pop(at)
    return bins

class Rows:
    """The rows of every step. Epoch e's order is drawn from (seed, e); row g of the run is row g % n of epoch g //
    n."""

    def __init__(self, corpus, packing, max_length, seed, batch_size=1, use_varlen_attn=True, loss_weight="token"):
        self.corpus, self.packing, self.max_length, self.seed = corpus, packing, max_length, seed
        self.batch_size, self.varlen, self.loss_weight = batch_size, use_varlen_attn, loss_weight
        self.epoch, self.segments = None, None
        self.lengths = np.diff(corpus.offsets)
        self._load(0)
        self.per_epoch = len(self.segments.rows) - 1

    def _load(self, epoch):
        """The segments of an epoch; they depend on nothing but (corpus, settings, seed, epoch)."""
        if epoch == self.epoch:
            return
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(np.flatnonzero(self.lengths))
        if self.packing == "split":
            self.segments = pack_split(self.lengths, order, self.max_length)
            self.deal = rng.permutation(len(self.segments.rows) - 1)
        else:  # pieces of at most max_length, then bins of them
            pieces = [(d, s, min(self.max_length, n - s)) for d, n in zip(order.tolist(), self.lengths[order].tolist())
                      for s in range(0, n, self.max_length)]
            document, start, length = np.array(pieces, np.int64).T
            if self.packing == "whole":
                bins = knapsack(length, self.max_length)
                bins = [bins[i] for i in rng.permutation(len(bins))]
            else:
                bins = [range(i, min(i + self.batch_size, len(length))) for i in range(0, len(length), self.batch_size)]
            flat = np.concatenate([np.asarray(b, np.int64) for b in bins])
            self.segments = Segments(document[flat], start[flat], length[flat],
                                     np.cumsum([0, *(len(b) for b in bins)]))
            self.deal = np.arange(len(bins))
        self.epoch = epoch

    def batch(self, row, sp, sp_rank):
        """Row `row` of the run, or None for a row of padding -> this rank's share of it."""
        ids, labels, positions, weights, lengths = [], [], [], [], []
        if row is not None:
            self._load(row // self.per_epoch)
            segments = self.segments
            for i in range(*segments.rows[self.deal[row % self.per_epoch]:][:2]):
                document, start, n = segments.document[i], segments.start[i], segments.length[i]
                tokens = self.corpus.read(document, start, start + n + 1)           # one more: the last one's target
                following = np.where(tokens[1:] >= 0, tokens[1:], IGNORE)
                tokens = tokens[:n]
                ids.append(np.maximum(tokens, ~tokens))
                labels.append(np.append(following, [IGNORE] * (n - len(following))))
                positions.append(np.arange(n))
                targets = max(int(self.corpus.targets[document]), 1)
                weight = {"token": 1.0, "sample": 1 / targets, "square": targets ** -0.5}[self.loss_weight]
                weights.append(np.where(labels[-1] != IGNORE, weight, 0.0))
                lengths.append(n)
        fill = -sum(lengths) % sp or (0 if lengths else sp)
        if fill:  # a segment of its own
            ids.append(np.zeros(fill, int)), labels.append(np.full(fill, IGNORE)), positions.append(np.arange(fill))
            weights.append(np.zeros(fill)), lengths.append(fill)
        T = sum(lengths)
        if not self.varlen:
            positions, lengths = [np.arange(T)], [T]
        share = slice(T // sp * sp_rank, T // sp * (sp_rank + 1))
        ids, labels, positions, weights = (
            torch.from_numpy(np.concatenate(x).astype(dtype)[share]) for x, dtype in
            ((ids, np.int64), (labels, np.int64), (positions, np.int64), (weights, np.float32)))
        cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
        return Batch(ids, labels, positions, cu_seqlens, int(max(lengths)), weights)

    def step(self, step, global_batch_size, dp, dp_rank, sp, sp_rank, total):
        """The micro-batches of optimizer step `step` (from 1) for one rank: rows dp_rank, dp_rank + dp, ... of the
        step's global_batch_size; rows past the run's `total` are padding."""
        first = (step - 1) * global_batch_size
        rows = range(first + dp_rank, first + global_batch_size, dp)
        return [self.batch(row if row < total else None, sp, sp_rank) for row in rows]

    def accounting(self):
        """One line: where the corpus's tokens are."""
        tokens, targets = int(self.lengths.sum()), int(self.corpus.targets.sum())
        return (f"{(self.lengths > 0).sum():,} documents ({(self.lengths == 0).sum():,} empty), {tokens:,} tokens = "
                f"{targets:,} targets + {tokens - targets:,} masked or first; {self.per_epoch:,} rows an epoch, "
                f"{tokens / self.per_epoch:,.0f} tokens each")
