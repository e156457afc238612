"""From files to rows: formats, chat masks, the token cache, packing, order, batches.

    python data.py [NAME=VALUE ...] [SHOW=0,5] [--lengths]      what train.py, so set, will see: counts, rows, a plot

A document is a run of tokens, some of them trained; a row is up to MAX_LENGTH tokens, pieces of documents side by side.
Which rows a step sees is a function of seed and step alone. Parallelism is two integers, of rows and of shares.
"""
import bisect
import fcntl
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

IGNORE = -100   # the label of no target
class Batch(NamedTuple):
    """One micro-batch: a flat row of T tokens, or one rank's t of them, on the host."""
    input_ids: torch.Tensor     # (t,) int64
    labels: torch.Tensor        # (t,) int64: the token that follows in the same document, or -100
    position_ids: torch.Tensor  # (t,) int64: position in its segment
    cu_seqlens: torch.Tensor    # (n+1,) int32: the whole row's segments, never cut
    max_seqlen: int             # the longest of them
    weights: torch.Tensor       # (t,) float32: LOSS_WEIGHT of each target, 0 where there is none

# --------------------------------------------------------------------------------------------------- files and formats
def find_files(data):
    """DATA: a source, a list of them or {source: epochs}; a source: a path, glob or folder. -> files of each, epochs"""
    known, sources = re.compile(r"\.(jsonl|json|parquet)(\.gz)?$"), []
    data = data if isinstance(data, dict) else dict.fromkeys([data] if isinstance(data, str) else data, 1.0)
    for source, epochs in data.items():
        found = [Path(path) for path in glob.glob(source, recursive=True)]
        files = {path for path in found if not path.is_dir()}   # a set: "books/**" finds what is in a folder twice
        files |= {path for folder in found for path in folder.rglob("*") if known.search(path.name)}
        if not files or not all(known.search(path.name) for path in files) or not epochs > 0:
            raise ValueError(f"DATA {source!r} x {epochs} matches no file, or not .json(l), .parquet (.gz): name those")
        sources.append(sorted(map(str, files)))
    return sources, [*data.values()]

@contextmanager
def naming(what):
    """An error in what is read or rendered becomes a ValueError that says in what."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{what}: {'' if type(e) is ValueError else f'{type(e).__name__} '}{e}") from e

def read_rows(path):
    """Yields (file:line, row): the bytes of a line, or an object of .parquet or a JSON array; file:row is theirs."""
    with naming(path), (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
        rows = f
        if path.removesuffix(".gz").endswith(".parquet"):
            from pyarrow import parquet
            rows = (row for batch in parquet.ParquetFile(f).iter_batches(1000) for row in batch.to_pylist())
        elif f.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            rows = json.loads(f.read().decode("utf-8-sig"))
        for number, row in enumerate(rows, 1):
            if not isinstance(row, bytes) or row.strip():
                yield f"{path}:{number}", row

FORMATS = "text", "messages", "conversations", "instruction output", "prompt completion", "input_ids"    # a row's keys
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
SEAM = "\ufdd0"     # Unicode keeps it out of texts; it parts what is tokenized: a "<|im_end|>" in a text ends no turn
PIECE = re.compile(f"[^{SEAM}]+")

def to_messages(row, kind):
    """messages (OpenAI), conversations (ShareGPT) or instruction (alpaca) -> messages as chat templates read them."""
    if kind == "instruction output":
        asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
        pairs = [*(row.get("history") or ()), (asked, row["output"])]
        turns = [{"role": r, "content": c} for pair in pairs for r, c in zip(("user", "assistant"), pair, strict=True)]
    else:
        turns = list(row[kind])
    turns[:0] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for i, turn in enumerate(turns):
        with naming(f"message {i}, {json.dumps(turn)[:60]}"):
            m = {"value": "" if turn.get("tool_calls") else None} | {k: v for k, v in turn.items() if v is not None}
            role, content = m.get("role", m.get("from")), m.get("content", m["value"])
            if role == "function_call":
                calls, content = np.atleast_1d(json.loads(content)), ""     # one or several
                m["tool_calls"] = [{"type": "function", "function": call} for call in calls]
            for function in (call["function"] for call in m.get("tool_calls", ())):
                if isinstance(function["arguments"], str):
                    function["arguments"] = json.loads(function["arguments"])
            content = SEAM.join(part["text"] for part in content) if isinstance(content, list) else content
            trained = m.get("train", m.get("loss", m.get("weight", 1)))
            if role not in ROLES or not isinstance(content, str) or trained not in (0, 1):
                raise ValueError(f"role is one of {[*ROLES]}, content is text, train, loss or weight is 0 or 1")
            turns[i] = {**m, "role": ROLES[role], "content": content, "trained": trained}
    return turns

class Encoder:
    """Rows -> token ids, with the tokenizer and the chat template of a Hugging Face folder."""
    def __init__(self, folder, append_eos, train_on_prompt, mask_history, overlong, cap):
        from transformers import AutoTokenizer
        self.tokenizer = t = AutoTokenizer.from_pretrained(folder)
        self.train_on_prompt, self.mask_history, self.overlong, self.cap = train_on_prompt, mask_history, overlong, cap
        self.all = train_on_prompt and overlong != "truncate_middle"    # and no answer to be told from its question
        self.bos = t.bos_token if t("a").input_ids[:1] == [t.bos_token_id] else ""
        self.eos = t.eos_token if append_eos and t.eos_token else ""
        control = {a.content: i for i, a in t.added_tokens_decoder.items() if a.special}
        self.control, self.control_ids = sorted(control, key=len, reverse=True), [~i for i in control.values()]
        self.is_control = re.compile("|".join(map(re.escape, self.control)) or "(?!)")

    def __call__(self, row):
        """A parsed row -> its ids, int32, ~id (negative) where a token is not trained; its length before OVERLONG."""
        row = {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else {}
        kind, *more = [kind for kind in FORMATS if row.keys() >= {*kind.split()}] or ["no format"]
        if more or kind not in FORMATS:
            raise ValueError(f"keys {sorted(row)} match {[kind, *more]}: a row is an object with one of {FORMATS}")
        if kind == "input_ids":
            pairs = [*zip(row["input_ids"], row.get("labels", row["input_ids"]), strict=True)]
            if not all(type(i) is int and 0 <= i < 2**31 and label in (i, IGNORE) for i, label in pairs):
                raise ValueError(f"labels are the ids at their own places in input_ids, not the next ones, or {IGNORE}")
            found = [np.array([i if i == label else ~i for i, label in pairs], np.int32)]
        else:
            found, (text, spans) = [np.array([], np.int32)], self.write(row, kind)
            cuts = sorted({0, len(text), *itertools.chain(*spans or ())})   # an answer is tokenized apart, as later
            for piece in itertools.chain(*(PIECE.finditer(text, *cut) for cut in itertools.pairwise(cuts))):
                encoding = self.tokenizer.backend_tokenizer.encode(piece[0], add_special_tokens=False)
                ids, trained = np.array(encoding.ids, np.int32), any(a <= piece.start() < b for a, b in spans or ())
                found.append(ids if trained or spans is None else ~ids)
        ids = np.concatenate(found)
        all_of_them = self.train_on_prompt and kind != "input_ids"
        return self.shorten(np.maximum(ids, ~ids) if all_of_them else ids, ids), len(ids)

    def shorten(self, ids, told):
        """What OVERLONG leaves of a document. truncate_middle takes out the middle of a text, or of a chat's longest
        stretch in a turn that is no answer (told < 0), 8 tokens from its ends; or else the document is dropped."""
        extra = len(ids) - self.cap
        if extra <= 0 or self.overlong in ("split", "truncate"):
            return ids if self.overlong == "split" else ids[:self.cap]
        chat = (told[1:] < 0).any()
        free = (told < 0) & ~np.isin(told, self.control_ids) if chat else told >= 0
        edges = np.flatnonzero(np.diff(free, prepend=False, append=False)).reshape(-1, 2)
        start, end = max(edges.tolist(), key=lambda edge: edge[1] - edge[0], default=(0, 0))
        if self.overlong == "drop" or end - start < extra + 16 * chat:
            return ids[:0]
        at = (start + end - extra) // 2
        ids = np.delete(ids, slice(at, at + extra))
        ids[at:at + 1] = np.minimum(ids[at:at + 1], ~ids[at:at + 1])    # what led to it is gone: no target
        return ids

    def write(self, row, kind):
        """A row -> its text as the model reads it, and the spans of it that are trained; None: all."""
        written = json.dumps(row, ensure_ascii=False, default=lambda _: None)
        if re.search(f"[{SEAM}\ud800-\udfff]", written):
            raise ValueError(f"holds {SEAM!r} or half of a surrogate pair, which are no text: remove them")
        row = json.loads(self.is_control.sub(lambda m: m[0][0] + SEAM + m[0][1:], written))
        if kind not in ("text", "prompt completion"):
            return self.chat(to_messages(row, kind), row.get("tools"))
        prompt, answer = ("", row["text"]) if kind == "text" else (row["prompt"], row["completion"])
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            raise ValueError(f"{written[:60]}: text, prompt and completion are strings: mend or remove the row")
        before = self.bos + SEAM + prompt + SEAM
        text = before + answer + SEAM + self.eos if prompt + answer else ""
        return text, [(len(before), len(text))] if prompt and not self.all else None

    def chat(self, messages, tools):
        """Messages -> the template's text and the spans to train: what it writes for an assistant's turn after the
        generation prompt, with the end of the turn; told by its generation markers, or by rendering prefixes."""
        from transformers.utils.chat_template_utils import render_jinja_template
        tools = json.loads(tools or "null") if isinstance(tools, str) else tools
        template = self.tokenizer.get_chat_template(None, tools)
        as_text = lambda objects: "\n".join(json.dumps(it, ensure_ascii=False) for it in objects)
        if tools and "tools" not in template:  # what a template has no words for becomes text: nothing is lost
            said = [messages.pop(0)["content"]] if messages[0]["role"] == "system" else []
            messages.insert(0, {"role": "system", "content": "\n".join([*said, "Tools:", as_text(tools)])})
        for m in messages if "tool_calls" not in template else ():
            m["content"] += as_text(call["function"] for call in m.pop("tool_calls", ()))
        tools = [t if "function" in t else {"type": "function", "function": t} for t in tools or ()] or None
        marked = bool(re.search(r"{%-?\s*generation\b", template))

        def render(upto, prompt=False):
            with naming(f"the chat template, up to message {upto - 1}"):
                return render_jinja_template([messages[:upto]], tools, chat_template=template,
                                             return_assistant_tokens_mask=marked, add_generation_prompt=prompt,
                                             **self.tokenizer.special_tokens_map)
        (text,), marks = render(len(messages))
        if self.all:
            return text, None
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        chosen = [i for i in (answers[-1:] if self.mask_history else answers) if messages[i]["trained"]]
        if not chosen or marked and len(marks[0]) != len(answers):
            raise ValueError(f"{len(chosen)} of {len(answers)} assistant turns to train, the template marks {marks}")
        spans = []
        for i in chosen:
            after = render(i + 1)[0][0].rstrip()
            if marked:
                start, end = marks[0][answers.index(i)]
            else:
                before = render(i, True)[0][0]
                start = len(before) if text.startswith(before) else len(text)
                if start == len(text) and i and text.startswith(render(i)[0][0]):   # it prompts to think: up to there
                    common = os.path.commonprefix([text, before])
                    start = max([common.rfind("\n") + 1, *(m.end() for m in self.is_control.finditer(common))])
                end = len(after) if text.startswith(after) else start   # or written otherwise once others follow
            closing = next((token for token in self.control if after.endswith(token)), "")
            if not text[start:end].rstrip().endswith(closing):  # then it is what the template writes next
                control = self.is_control.search(text, end)
                end = control.end() if control and after.endswith(text[start:control.end()]) else start
            if end <= start:
                raise ValueError(f"message {i}: the template writes it otherwise before others: set MASK_HISTORY=True")
            spans.append((start, end))
        return text, spans

# --------------------------------------------------------------------------------------------------------- token cache
class Corpus(NamedTuple):
    """Tokenized documents, memory-mapped. Document i is tokens[offsets[i]:offsets[i + 1]]."""
    tokens: np.ndarray      # int32; ~id where the token is not trained. "synthetic": the size of the vocabulary
    offsets: np.ndarray     # (documents + 1,) int64
    targets: np.ndarray     # (documents,) int64: trained tokens but a first one, which nothing precedes
    full: np.ndarray        # (documents,) int64: lengths before OVERLONG
    sources: list           # (first document, last + 1, how often an epoch sees them)
    key: str                # hash of files, tokenizer and settings; or "synthetic"

    def read(self, document, start, end):
        """Tokens start to end of a document, fewer where it ends before; of a synthetic one, random and made now."""
        first, last = self.offsets[document:document + 2]
        if self.key == "synthetic":
            return np.random.default_rng(int(document)).integers(0, self.tokens, last - first, np.int32)[start:end]
        return self.tokens[first + start:min(first + end, last)]

@contextmanager
def locked(path):
    """One process of this host at a time; the others wait, before any process group exists to run into a timeout."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def build_corpus(data, folder, cache, *settings, vocab_size=None):
    """-> Corpus of DATA, tokenized with the tokenizer of the Hugging Face folder by whichever process comes first.
    settings: those of Encoder. The key holds the content of files and tokenizer: a changed file is another corpus."""
    (sources, epochs), memory = find_files(data), Path(cache) / "hashes.json"
    content, tokenizer = [4, settings, [len(files) for files in sources]], re.compile("token|vocab|merges|template")
    files = sum(sources, []) + sorted(f for f in Path(folder).iterdir() if tokenizer.search(f.name) and f.is_file())
    with locked(memory.with_suffix(".lock")):  # a file's hash is remembered by its size and time of change
        known = json.loads(memory.read_text()) if memory.exists() else {}
        for f in files:
            stamp = f"{os.path.abspath(f)} {os.stat(f).st_size} {os.stat(f).st_mtime_ns}"
            with open(f, "rb") as opened:
                known[stamp] = known.get(stamp) or hashlib.file_digest(opened, "sha256").hexdigest()
            content.append(known[stamp])
        memory.with_suffix(".part").write_text(json.dumps(known))
        memory.with_suffix(".part").rename(memory)
    home = memory.with_name(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16])
    with locked(home.with_suffix(".lock")):
        if not home.exists():
            tokenize(sources, home, (str(folder), *settings))
    lengths, targets, full, largest, source = np.fromfile(home / "documents.bin", np.int64).reshape(-1, 5).T
    if not targets.any():
        raise ValueError(f"DATA {data} holds no token to train: name other files")
    if vocab_size and largest.max() >= vocab_size:
        raise ValueError(f"token {largest.max()} is beyond the vocabulary of {vocab_size}: use the model's tokenizer")
    ends = np.searchsorted(source, range(len(sources)), "right").tolist()
    return Corpus(np.memmap(home / "tokens.bin", np.int32, "r"), np.insert(np.cumsum(lengths), 0, 0), targets, full,
                  [*zip([0, *ends], ends, epochs)], home.name)

encoder = functools.cache(Encoder)      # of each worker, which has it from the process that it is forked from

def encode_row(settings, row):
    """-> token ids of a row; their number, targets, number before OVERLONG, largest; the row's source."""
    where, content, source = row
    with naming(where):
        content = json.loads(content.decode("utf-8-sig")) if isinstance(content, bytes) else content
        ids, full = encoder(*settings)(content)
    return ids, np.array([len(ids), (ids[1:] >= 0).sum(), full, np.maximum(ids, ~ids).max(initial=0), source])

def tokenize(sources, home, settings):
    """Write the corpus `home` with all cores. After a kill it goes on behind the last document that is whole."""
    part, total = home.with_suffix(".part"), sum(os.path.getsize(f) for files in sources for f in files)
    part.mkdir(exist_ok=True)
    rows = ((*row, number) for number, files in enumerate(sources) for f in files for row in read_rows(f))
    encoder(*settings)
    pool = ProcessPoolExecutor(cores := len(os.sched_getaffinity(0)), multiprocessing.get_context("fork"))
    bar = tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, mininterval=2)
    with bar, pool, open(part / "tokens.bin", "ab") as tokens, open(part / "documents.bin", "ab") as documents:
        documents.truncate(documents.tell() // 40 * 40)
        had = np.fromfile(documents.name, np.int64).reshape(-1, 5)
        tokens.truncate(4 * int(had[:, 0].sum()))
        def stretch(row):  # 8 MiB a core at a time: the corpus may be larger than memory
            bar.update(len(row[1] if isinstance(row[1], bytes) else str(row[1])))
            return bar.n // (2**23 * cores)
        for _, some in itertools.groupby(itertools.islice(rows, len(had), None), stretch):
            few, abouts = 1 + len(some := list(some)) // (64 * cores), []
            for ids, about in pool.map(functools.partial(encode_row, settings), some, chunksize=few):
                tokens.write(ids), abouts.append(about)
            tokens.flush(), documents.write(np.stack(abouts)), documents.flush()    # a full disk stops it before
    part.rename(home)

# ------------------------------------------------------------------------------------------------------ packing, order
def knapsack(lengths, capacity):
    """-> indices of lengths, bin after bin; where each bin begins. A bin takes the longest that still fits until none
    does, and is repeated while its lengths last: the work grows with the number of distinct lengths."""
    order, indices, sizes = np.argsort(lengths, kind="stable"), [], []
    values, first = np.unique(lengths[order], return_index=True)
    having = dict(zip(left := values.tolist(), np.split(order, first[1:])))     # length: its indices; left: its keys
    while left:
        room, at, take = capacity, len(left), {}
        while (at := bisect.bisect_right(left, room, 0, at) - 1) >= 0:
            take[left[at]] = n = min(len(having[left[at]]), room // left[at])
            room -= n * left[at]
        times = min(len(having[length]) // n for length, n in take.items())
        indices.append(np.hstack([having[length][:n * times].reshape(times, n) for length, n in take.items()]).ravel())
        sizes += [sum(take.values())] * times
        for length, n in take.items():
            having[length] = having[length][n * times:]
            if not len(having[length]):
                left.pop(bisect.bisect_left(left, length))
    return np.concatenate(indices), np.cumsum(sizes) - sizes

def group_by_length(lengths, step, rng, at=0):
    """-> indices in XTuner's order of `step` documents a step, but the steps of a stretch of 50 are shuffled, or the
    loss would swing. The longest comes first of all; the first step has `at` documents already."""
    at, mega = at + np.arange(len(lengths)), max(1, min(len(lengths) // (4 * step), 50)) * step
    order = np.lexsort((-lengths, at // mega))
    longest = np.argmax(lengths[order])
    order[[0, longest]] = order[[longest, 0]]
    draw = rng.random(at[-1] // step + 1)
    draw[-1], draw[0] = 2, -1
    return order[np.lexsort((draw[at // step], at // mega))]

class Rows:
    """The rows of a run, those of its epochs end to end. Epoch e's order is drawn from (seed, e) alone."""
    def __init__(self, corpus, packing, max_length, seed, batch_size=1, use_varlen_attn=True, loss_weight="token",
                 grouped_rows=0):
        self.corpus, self.packing, self.max_length, self.seed = corpus, packing, max_length, seed
        self.batch_size = batch_size if packing == "none" else 1
        self.varlen, self.loss_weight = use_varlen_attn, loss_weight
        self.grouped = grouped_rows * batch_size * (packing == "none")      # documents of a step, or 0: not grouped
        self.lengths = np.diff(corpus.offsets)
        self.epoch = functools.lru_cache(2)(self._pack)     # a step may see two
        self.size = functools.cache(lambda epoch: len(self.epoch(epoch)[1]))
        self.per_epoch = self.size(0)

    def documents(self, epoch):
        """-> the documents of an epoch: of each source, which is a circle, as many as its epochs say, going round."""
        chosen = []
        for first, last, epochs in self.corpus.sources:
            n, line = last - first, np.random.default_rng((self.seed, first)).permutation(last - first)
            chosen.append(first + line[np.arange(round(epoch * epochs * n), round((epoch + 1) * epochs * n)) % n])
        return np.concatenate(chosen)

    def _pack(self, epoch):
        """-> pieces (n, 3): document, start, length; rows (r, 2): its first piece, its last + 1."""
        rng, room = np.random.default_rng((self.seed, epoch)), self.max_length
        order = rng.permutation(self.documents(epoch))
        order = order[self.lengths[order] > 0]
        lengths = self.lengths[order]
        if not len(order):
            raise ValueError(f"epoch {epoch} of DATA holds no token: raise the epochs of its sources")
        space = lengths if self.packing == "split" else -(-lengths // room) * room
        begins = np.cumsum(space) - space   # of documents, on a line that is cut at every multiple of `room`
        cuts = np.union1d(begins, np.arange(0, begins[-1] + space[-1], room))
        which = np.searchsorted(begins, cuts, "right") - 1
        start = cuts - begins[which]
        length = np.minimum(lengths[which] - start, room - cuts % room)
        chosen, first = slice(None), np.arange(0, len(which), self.batch_size)
        if self.packing == "split":
            first = np.flatnonzero(cuts % room == 0)
        elif self.packing == "whole":
            chosen, first = knapsack(length, room)
        elif self.grouped:
            before = self.batch_size * sum(map(self.size, range(epoch)))
            chosen = group_by_length(length, self.grouped, rng, before % self.grouped)
        rows = np.stack([first, np.append(first[1:], len(which))], axis=1)
        return (np.stack([order[which], start, length], axis=1)[chosen],
                rows if self.grouped else rng.permutation(rows))

    def count(self, epochs):    # of rows
        return math.ceil(sum(min(epochs - epoch, 1) * self.size(epoch) for epoch in range(math.ceil(epochs))))

    def find(self, row):
        """Row of the run -> its pieces (n, 3): document, start, length."""
        epoch = 0
        while row >= self.size(epoch):
            row, epoch = row - self.size(epoch), epoch + 1
        pieces, rows = self.epoch(epoch)
        return pieces[slice(*rows[row])]

    def batch(self, row, sp, sp_rank):
        """Row `row` of the run, or None for a row of padding -> this rank's share of it."""
        pieces = self.find(row) if row is not None else np.empty((0, 3), int)
        # one token more than the piece has, the last one's target; ~0 at the document's end
        tokens = [np.append(self.corpus.read(d, start, start + n + 1), ~0)[:n + 1] for d, start, n in pieces]
        counts, T = self.corpus.targets[pieces[:, 0]].clip(1), pieces[:, 2].sum()
        if fill := -T % sp if T else sp:    # a segment of its own, of tokens that are not trained
            tokens, counts, T = [*tokens, np.full(fill + 1, ~0)], np.append(counts, 1), T + fill
        following, lengths = np.concatenate([t[1:] for t in tokens]), np.array([len(t) - 1 for t in tokens])
        weights = np.repeat(counts ** {"token": 0.0, "sample": -1.0, "square": -0.5}[self.loss_weight], lengths)
        lengths = lengths if self.varlen else T[None]
        ids = np.concatenate([t[:-1] for t in tokens])
        share = slice(T // sp * sp_rank, T // sp * (sp_rank + 1))
        ids, labels, positions, weights = (torch.from_numpy(field[share]) for field in (
            np.maximum(ids, ~ids), np.where(following >= 0, following, IGNORE),
            np.concatenate([np.arange(n) for n in lengths]), weights * (following >= 0)))
        edges = torch.from_numpy(np.cumsum([0, *lengths])).int()
        return Batch(ids, labels, positions, edges, int(max(lengths)), weights.float())

    def step(self, step, global_batch_size, dp, dp_rank, sp, sp_rank, total):
        """The micro-batches of optimizer step `step` (from 1) for one rank; rows past the run's `total` are padding. As
        ranks wait for one another, the dp heaviest rows come first, the heaviest to who has the least so far."""
        first, mine, load = (step - 1) * global_batch_size, [], np.zeros(dp)
        work = {row: (self.find(row)[:, 2] ** 2).sum() for row in range(first, min(first + global_batch_size, total))}
        rows = sorted(work, key=work.get, reverse=True) + [None] * (global_batch_size - len(work))
        for i in range(0, global_batch_size, dp):
            for rank, row in zip(np.argsort(load, kind="stable"), rows[i:i + dp]):
                load[rank] += work.get(row, 0)
                mine += [row] if rank == dp_rank else []
        return [self.batch(row, sp, sp_rank) for row in mine]

    def accounting(self):
        """Of the first epoch. Padding is what rows lack to max_length (x batch_size); it is never computed."""
        documents, (pieces, rows) = self.documents(0), self.epoch(0)
        full, kept, targets = (of[documents] for of in (self.corpus.full, self.lengths, self.corpus.targets))
        document, start, length = pieces.T
        sizes, room = np.add.reduceat(length, np.sort(rows[:, 0])), len(rows) * self.max_length * self.batch_size
        histogram = enumerate(np.bincount(np.log2(full[full > 0]).astype(int)))
        return {"documents": len(full), "empty": (full == 0).sum(), "without_target": (kept[targets == 0] > 0).sum(),
                "dropped_documents": (full[kept == 0] > 0).sum(), "shortened": (kept < full)[kept > 0].sum(),
                "tokens": full.sum(), "trained": targets.sum(), "masked": (kept - targets).sum(),
                "dropped": (full - kept).sum(), "rows": len(rows), "padding": room - kept.sum(),
                "fill": kept.sum() / room, "pieces_a_row": len(pieces) / len(rows),
                "cut_documents": ((start == 0) & (length < self.lengths[document])).sum(),
                "attention": (length ** 2).sum() / (sizes ** 2).sum(), "lengths": {2**i: n for i, n in histogram if n}}

    def describe(self):
        most = max((a := self.accounting())["lengths"].values())
        bars = "  ".join(f"{n:,} {'▁▂▃▄▅▆▇█'[7 * count // most]}" for n, count in a["lengths"].items())
        return ("{documents:,} documents, of them {empty:,} empty, {without_target:,} without a target, "
                "{dropped_documents:,} dropped, {shortened:,} shortened, {cut_documents:,} cut by rows\n"
                "{tokens:,} tokens = {trained:,} trained + {masked:,} masked or first + {dropped:,} dropped\n"
                "{rows:,} rows, {fill:.2%} full, the rest {padding:,} of padding; {pieces_a_row:.1f} pieces each, "
                "{attention:.1%} of a whole row's attention\ntokens of a document, from: {bars}").format(**a, bars=bars)

def show(rows, row, sp, decode):
    """Print a row of the run: trained tokens in green, where documents and the shares of ranks begin."""
    shares = [rows.batch(row, sp, rank) for rank in range(sp)]
    ids, labels, positions = (torch.cat([share[field] for share in shares]).tolist() for field in range(3))
    pieces, trained = rows.find(row), [False, *(label != IGNORE for label in labels)]
    marks = [(len(ids) // sp * rank, f"\n=== share of rank {rank}") for rank in range(sp) if sp > 1]
    marks += [(i, "\033[32m" if trained[i] else "\033[0m") for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    marks += [(at, f"\n--- document {d}, {n} tokens from {i} of {rows.lengths[d]}, positions from {positions[at]}\n")
              for at, (d, i, n) in zip(np.cumsum([0, *pieces[:, 2]]), pieces)]
    marks += [(n, "\n--- padding\n") for n in [pieces[:, 2].sum()] if n < len(ids)]
    for (a, mark), (b, _) in itertools.pairwise([*sorted(marks, key=lambda mark: mark[0]), (len(ids), "")]):
        print(mark + decode(ids[a:b]), end="")
    print("\033[0m")

def main(arguments):
    from transformers import AutoTokenizer
    import train
    train.override([a for a in arguments if not a.startswith(("SHOW=", "--lengths"))])
    folder, config, sp, _ = train.plan(max(train.SEQUENCE_PARALLEL_SIZE, 1) * train.REPLICAS)
    rows = train.open_data(train.DATA, folder, config)
    print(rows.describe())
    for row in (int(n) for a in arguments if a.startswith("SHOW=") for n in a[5:].split(",")):
        show(rows, row, sp, AutoTokenizer.from_pretrained(folder).decode)
    if "--lengths" in arguments:
        from matplotlib import pyplot
        pyplot.hist(rows.corpus.full, bins=100), pyplot.xlabel("tokens of a document"), pyplot.savefig("lengths.png")

if __name__ == "__main__":
    main(sys.argv[1:])
