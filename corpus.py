"""From files to documents: tokenized once, and stored in a memory-mapped cache.

Each row of each file is one document. Processes on all cores tokenize the rows, and what they write
is kept by file, so that a build that was killed, or a corpus with a changed file, continues.
"""
import collections
import ctypes
import fcntl
import functools
import gc
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from examples import (
    HASHES, REQUIRED_KEYS, Encoded, Encoder, TemplateLimit, describe_error, is_trained, naming,
    parse_json, parse_row, read_example, token_ids)

# ---------------------------------------------------------------------------------------- files

DATA_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet|txt)(\.gz|\.zst)?$")
OTHER_FILE = re.compile(r"\.(csv|tsv|arrow|feather|xlsx)(\.gz|\.zst)?$")  # data, but not readable
NOT_LINES = re.compile(rb"\s*(\[|\{\s*\n)")   # how JSON begins that is not an object on each line


class Source(NamedTuple):
    """One source of DATA."""
    name: str       # path, glob or folder
    files: list     # paths, sorted
    epochs: float
    skipped: list   # names of files in the folder that are not data


def find_files(data, constant="DATA"):
    """Return a list of the Source of each source of DATA, or of another constant of train.py.

    DATA is a source, a list of sources, or {source: epochs}. A source is a path, glob or folder.
    A file that is named several times belongs to the first source that names it.
    """
    if isinstance(data, str):
        epochs_of_source = {data: 1.0}
    elif isinstance(data, dict):
        epochs_of_source = data
    else:
        epochs_of_source = dict.fromkeys(data, 1.0)

    sources = []
    known = set()  # files of earlier sources, without symbolic links
    for name, epochs in epochs_of_source.items():
        if not epochs > 0:
            raise ValueError(f"{constant} {name!r} is set to {epochs} epochs: use more than 0, or "
                             "leave the source out")
        found, skipped = find_source(name, constant)
        files = []
        for path in sorted(found):
            real_path = os.path.realpath(path)
            if real_path not in known:
                known.add(real_path)
                files.append(path)
        sources.append(Source(name, files, epochs, sorted(skipped)))
    return sources


def find_source(name, constant):
    """Return the data files of a source, and the names of other files in its folders."""
    # Sets, because a glob such as books/** finds both a folder and the files in it.
    files = set()
    skipped = set()
    for path in glob.glob(name, recursive=True):
        if os.path.isdir(path):
            in_folder = list_folder(path)
            files.update(file for file in in_folder if DATA_FILE.search(file))
            skipped.update(file for file in in_folder if not DATA_FILE.search(file))
        else:
            files.add(path)
    skipped -= files

    unknown = sorted(path for path in files if not DATA_FILE.search(path))
    unknown += sorted(path for path in skipped if OTHER_FILE.search(path))
    if name[:1] in "{[" and not files:
        raise ValueError(f"{constant} {name!r} is no Python literal, and matches no file: quote its "
                         "paths, such as '{\"a.jsonl\": 2.0}'")
    if not files and not unknown and not glob.has_magic(name) and not os.path.exists(name):
        raise ValueError(f"{constant} {name!r} does not exist: name a file, a folder or a glob")
    if unknown or not files:
        found = os.path.basename(unknown[0]) if unknown else "no file"
        raise ValueError(f"{constant} {name!r} matches {found}: name files whose names end with "
                         ".json, .jsonl, .ndjson, .parquet or .txt, or with one of these and .gz "
                         "or .zst; convert others")
    return files, [os.path.basename(path) for path in skipped]


def list_folder(folder):
    """Return the files in a folder and the folders in it, but not in hidden ones."""
    files = []
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in visited:  # a symbolic link to a folder that contains it
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return files


class Chunk(NamedTuple):
    """Consecutive rows of a file, which one worker process takes at a time."""
    path: str
    numbers: list  # see read_rows
    rows: list
    n_bytes: int
    is_last: bool


def read_chunks(path, after=0):
    """Yield the rows of a file whose number is greater than `after`, as Chunks."""
    numbers = []
    rows = []
    n_bytes = 0
    for number, row in read_rows(path):
        if number <= after:
            continue
        numbers.append(number)
        rows.append(row)
        n_bytes += len(row) if isinstance(row, bytes) else len(str(row))
        if n_bytes >= CHUNK_BYTES:
            yield Chunk(path, numbers, rows, n_bytes, is_last=False)
            numbers = []
            rows = []
            n_bytes = 0
    yield Chunk(path, numbers, rows, n_bytes, is_last=True)


def read_rows(path):
    """Yield (number, row) for each row of a file.

    A row of a .jsonl file is its unparsed line (bytes), and its number is that of the line. Other
    rows are objects, and are counted. Both begin with 1.
    """
    name = path.removesuffix(".gz").removesuffix(".zst")
    with naming(printable(path)), open_file(path) as file:
        beginning = file.peek(3)[:3]
        if beginning == b"\xef\xbb\xbf":   # the byte order mark of UTF-8
            file.read(3)
        elif beginning[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("the file is UTF-16: convert it, such as with iconv -f UTF-16 -t UTF-8")
        if name.endswith(".parquet"):
            rows = read_parquet(file)
        elif name.endswith(".txt"):
            rows = [{"text": file.read().decode()}]
        elif NOT_LINES.match(file.peek(64)):
            content = parse_json(file.read(), "the file must be one JSON array, or have an object on "
                                              "each of its lines, in UTF-8; fix it")
            rows = content if isinstance(content, list) else [content]
        else:
            rows = file  # its lines; parsing them is left to the worker processes

        for number, row in enumerate(rows, 1):
            is_blank = isinstance(row, bytes) and not row.strip()
            if not is_blank:
                yield number, row


def printable(path):
    """Return a path as text that can be written, with \\xff for a byte that is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def open_file(path):
    """Open a file, which may be compressed, to read bytes."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import pyarrow
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def read_parquet(file):
    from pyarrow import parquet

    for batch in parquet.ParquetFile(file).iter_batches(1000):
        for row in batch.to_pylist():
            yield without_nulls(row)


def without_nulls(value):
    """Return a value of a parquet file without the keys of its objects that are null.

    All objects of a column have the same keys there, and null fills those that were missing.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def is_chat(data, wanted_format="", columns=None):
    """Return whether a source of DATA begins with a conversation."""
    for source in find_files(data):
        for path in source.files[:1]:
            if first_kind(path, wanted_format, columns) == "chat":
                return True
    return False


def first_kind(path, wanted_format, columns):
    """Return the kind (see read_example) of the first usable row of a file; "" after bad rows."""
    for _, row in itertools.islice(read_rows(path), MAX_REPORTED):
        try:
            kind, _ = read_example(parse_row(row), wanted_format, columns)
        except Exception:
            continue  # the error is reported together with those of other rows
        return kind
    return ""


# ---------------------------------------------------------------------------------- token cache

CACHE_VERSION = 7  # part of every key: raise it when the same files would give other tokens
TOKENIZER_FILE = re.compile("token|vocab|merges|template|generation_config")
CHUNK_BYTES = 2**20  # what a worker process takes at a time
BATCH_ROWS = 100  # in a call of the tokenizer: with 1,000 short ones, the CPU cache is too small
OLD_PART = 7 * 24 * 3600  # seconds after which what a killed build left is removed
MAX_REPORTED = 10  # bad rows in one error
SILENT_SECONDS = 3  # of a wait for a lock, before it is reported

# The record of one row in documents.bin.
DOCUMENT = np.dtype([
    ("number", np.int64),       # of the row in its file
    ("length", np.int64),
    ("targets", np.int64),      # trained tokens, except the first, which no token precedes
    ("full_length", np.int64),  # before OVERLONG
    ("largest_id", np.int64),
    ("hash", np.int64),         # of its content, from 0 to below HASHES: see hold_out
    ("is_bad", np.bool_),       # the row cannot be used; its error is in errors.txt
    ("is_lossy", np.bool_),
    ("is_endless", np.bool_),
])


class TokenFiles:
    """The tokens of several files, memory-mapped as if they were one array.

    A slice must be inside one file.
    """

    def __init__(self, paths, sizes):
        self.paths = paths
        self.firsts = np.cumsum(sizes) - sizes  # of each file, the index of its first token
        # Files are opened when they are needed, as there may be more than a process can map.
        self.open = functools.lru_cache(maxsize=4096)(self.map)

    def map(self, file):
        if os.path.getsize(self.paths[file]) == 0:
            return np.empty(0, np.int32)  # an empty file cannot be mapped
        return np.memmap(self.paths[file], np.int32, "r")

    def __getitem__(self, window):
        file = int(np.searchsorted(self.firsts, window.start, "right")) - 1
        first = self.firsts[file]
        return self.open(file)[window.start - first:window.stop - first]


class Corpus(NamedTuple):
    """Tokenized documents, memory-mapped. Document i is tokens[offsets[i]:offsets[i + 1]].

    If the key is "synthetic", documents are random, and `tokens` is the size of the vocabulary.
    """
    tokens: np.ndarray   # int32; see `mask`. Or TokenFiles
    offsets: np.ndarray  # (documents + 1,) int64
    targets: np.ndarray  # (documents,) int64: trained tokens, except the first of a document
    full: np.ndarray     # (documents,) int64: lengths before OVERLONG
    sources: list        # (first document, last + 1, epochs) of each source
    key: str             # hash of files, tokenizer and settings; or "synthetic"
    notes: str = ""      # what was read, in lines
    hashes: np.ndarray = None    # (documents,) int64 below HASHES: see hold_out
    selected: np.ndarray = None  # (documents,) bool: those that this run uses; None: all

    def read(self, document, start, end):
        """Return the tokens [start, end) of a document; fewer if the document ends before."""
        first, last = self.offsets[document:document + 2]
        if self.key == "synthetic":
            generator = np.random.default_rng(int(document))
            tokens = generator.integers(0, self.tokens, last - first, np.int32)
            return tokens[start:end]
        return self.tokens[first + start:min(first + end, last)]


def build_corpus(data, folder, cache, *settings, vocab_size=None, bad_rows=0.0):
    """Return the Corpus of DATA, tokenized with the tokenizer of a Hugging Face folder.

    settings: the arguments of Encoder after the folder. bad_rows: the share of rows that may be
    unusable.
    """
    sources = find_files(data)
    homes = find_homes(sources, folder, cache, settings)
    if not all(home.exists() for home in homes.values()):
        # The first process tokenizes and the others wait for this lock. They do so before the
        # process group exists, where no collective can time out.
        with exclusive(Path(cache) / "tokenizing.lock") as lock:
            remove_old_parts(cache)
            paths = {home: path for path, home in homes.items() if not home.exists()}
            tokenized = {home: path for path, home in homes.items() if home.exists()}
            if paths:
                tokenize(paths, tokenized, Encoder(str(folder), *settings), lock, bad_rows)

    rows_of_file = {}
    for path, home in homes.items():
        rows_of_file[path] = np.fromfile(home / "documents.bin", DOCUMENT)
    # Files of equal content have one home, and their rows count once here, as in check_rows.
    path_of_home = {home: path for path, home in homes.items()}
    errors = list_bad_rows(path_of_home)
    n_rows = sum(len(rows_of_file[path]) for path in path_of_home.values())
    n_bad = sum(rows_of_file[path]["is_bad"].sum() for path in path_of_home.values())
    check_bad_rows(errors, n_bad, n_rows, bad_rows)
    rows = np.concatenate(list(rows_of_file.values()))
    documents = rows[~rows["is_bad"]]
    if not documents["targets"].any():
        raise ValueError(f"DATA {data} holds no token to train: name other files")
    largest = documents["largest_id"].max()
    if vocab_size and largest >= vocab_size:
        raise ValueError(f"token {largest} is beyond the vocabulary of {vocab_size} tokens, the "
                         "vocab_size of config.json: use the tokenizer of the model")

    # Documents are stored in the order of their files.
    spans = []
    notes = []
    first = 0
    for source in sources:
        of_source = [rows_of_file[path] for path in source.files]
        n_documents = sum(int((~found["is_bad"]).sum()) for found in of_source)
        spans.append((first, first + n_documents, source.epochs))
        first += n_documents
        notes += describe_source(source, of_source, [homes[path] for path in source.files])
    sizes = [found["length"].sum() for found in rows_of_file.values()]
    key = json.dumps([home.name for home in homes.values()])
    return Corpus(
        tokens=TokenFiles([home / "tokens.bin" for home in homes.values()], sizes),
        offsets=np.insert(np.cumsum(documents["length"]), 0, 0),
        targets=documents["targets"],
        full=documents["full_length"],
        sources=spans,
        key=hashlib.sha256(key.encode()).hexdigest()[:16],
        notes="\n".join(notes),
        hashes=documents["hash"],
    )


def describe_source(source, rows_of_files, homes):
    """Return lines that tell what was read from a source. rows_of_files: arrays of DOCUMENT."""
    if not source.files:
        return [f"{printable(source.name)}: earlier sources have all of its files"]
    rows = np.concatenate(rows_of_files)
    lines = [f"{printable(source.name)}: {len(source.files):,} files, "
             f"{(~rows['is_bad']).sum():,} documents, {rows['full_length'].sum():,} tokens, "
             f"{rows['targets'].sum():,} trained, {source.epochs:g} epochs"]
    if source.skipped:
        lines.append(f"  {len(source.skipped):,} files are no data: "
                     f"{', '.join(map(printable, source.skipped[:5]))}")
    if rows["is_lossy"].any():
        lines.append(f"  {rows['is_lossy'].sum():,} chats have contents that the chat template "
                     "leaves out")
    if rows["is_endless"].any():
        lines.append(f"  {rows['is_endless'].sum():,} chats have answers to which the chat "
                     "template gives no stop token")
    for found, home in zip(rows_of_files, homes):
        if found["is_bad"].any():
            lines.append(f"  {found['is_bad'].sum():,} rows are skipped: {home}/bad_rows.txt")
    return lines


def hold_out(corpus, share):
    """Split the documents of a Corpus: return one without, and one with this share of them.

    A document is held out because of the hash of its text alone, or of its row if it is not plain
    text. So equal ones stay together, and the same ones are held out with another tokenizer, other
    settings and further files.
    """
    held_out = corpus.hashes < share * HASHES
    for part, name in ((held_out, "holds out"), (~held_out, "leaves")):
        if not corpus.targets[part].any():
            raise ValueError(f"EVAL_DATA {share} {name} no token to train of {len(held_out)} "
                             "documents: use another share, or name a file")
    notes = (f"{corpus.notes}\n{held_out.sum():,} of {len(held_out):,} documents are held out for "
             f"EVAL_DATA {share}")
    training = corpus._replace(
        selected=~held_out, key=f"{corpus.key} without {share}", notes=notes)
    # Each document that is held out is evaluated once, whatever the epochs of its source.
    sources = [(first, end, 1.0) for first, end, _ in corpus.sources]
    evaluation = corpus._replace(
        selected=held_out, sources=sources, key=f"{share} of {corpus.key}")
    return training, evaluation


def find_homes(sources, folder, cache, settings):
    """Return {path: folder of its tokens}. Its name is a hash of file, tokenizer and settings."""
    files = list(itertools.chain.from_iterable(source.files for source in sources))
    tokenizer_files = sorted(Path(folder).glob("additional_chat_templates/*"))
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and TOKENIZER_FILE.search(path.name):
            tokenizer_files.append(path)
    hashes = hash_files([*tokenizer_files, *files], Path(cache) / "hashes.json")
    of_tokenizer = hashes[:len(tokenizer_files)]
    homes = {}
    for path, file_hash in zip(files, hashes[len(tokenizer_files):]):
        # Of the name only the suffix matters, which tells how to read the file. So a file that was
        # moved is recognized, and one that was changed is not.
        name = re.sub(r"(\.gz|\.zst)$", "", path)
        content = [CACHE_VERSION, settings, of_tokenizer, file_hash, os.path.splitext(name)[1]]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        homes[path] = Path(cache) / key
    return homes


def hash_files(files, memory):
    """Return the hash of each file. Those in the file `memory` are not computed again."""
    with exclusive(memory.with_suffix(".lock")):
        known = json.loads(memory.read_text()) if memory.exists() else {}
        hashes = []
        for path in files:
            # A file of the same path, size and time of change is taken to be the same.
            status = os.stat(path)
            stamp = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
            if stamp not in known:
                with open(path, "rb") as file:
                    known[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
            hashes.append(known[stamp])

        part = memory.with_suffix(".part")
        part.write_text(json.dumps(known))
        part.rename(memory)  # a killed process leaves no half of it
    return hashes


@contextmanager
def exclusive(path):
    """Hold the lock of a file, which contains the name of its holder, and yield the open file.

    The system releases the lock when all processes that have this open file have ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:  # not "w": the holder's name must stay until the lock is free
        for attempt in itertools.count():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 10 * SILENT_SECONDS and os.environ.get("LOCAL_RANK", "0") == "0":
                    file.seek(0)
                    print(f"waiting for {path}, which {file.read()} holds", file=sys.stderr)
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield file


def remove_old_parts(cache):
    """Remove what killed builds left a week ago or earlier."""
    for part in Path(cache).glob("*.part"):
        if part.is_dir() and time.time() - part.stat().st_mtime > OLD_PART:
            shutil.rmtree(part)


def tokenize(paths, tokenized, encoder, lock, bad_rows):
    """Write the documents of files, {folder to write: path}, using all cores.

    tokenized: {folder: path} of the files that are already tokenized. A call that was killed is
    continued by the next one.
    """
    # Forked workers inherit the encoder: it is loaded once, and its memory is shared.
    format_settings = (encoder.wanted_format, encoder.columns)
    kinds = {first_kind(path, *format_settings) for path in paths.values()}
    has_text = len(kinds - {"", "input_ids"}) > 0
    if has_text and encoder.tokenizer is None:
        encoder.load()
    if "chat" in kinds:  # before each row fails
        encoder.check_template()
    check_rows(paths, tokenized, encoder, lock, bad_rows)

    homes = {path: home for home, path in paths.items()}
    chunks = itertools.chain.from_iterable(map(continue_part, homes, homes.values()))
    errors = []
    n_rows = 0
    with process_chunks("tokenizing", encode_chunk, chunks, list(homes), encoder, lock) as done:
        for chunk, (tokens, records, errors_of_chunk) in done:
            n_rows += len(chunk.rows)
            home = homes[chunk.path]
            part = home.with_suffix(".part")
            # A row counts as done when its record is written, so its tokens come first.
            append(part / "tokens.bin", tokens.tobytes())
            append(part / "errors.txt", "".join(errors_of_chunk).encode())
            append(part / "documents.bin", records.tobytes())
            if chunk.is_last:
                part.rename(home)
            errors += name_rows(chunk.path, errors_of_chunk)
            if bad_rows == 0 and len(errors) >= MAX_REPORTED:
                break
    if bad_rows == 0:
        check_bad_rows(errors, len(errors), n_rows, bad_rows)


def check_rows(paths, tokenized, encoder, lock, bad_rows):
    """Raise a ValueError if more rows than bad_rows allows cannot be used.

    All rows are read, and written by the chat template, before any is tokenized. So a bad row does
    not cost a whole tokenization. The arguments are those of tokenize.
    """
    unchecked = []
    for home, path in paths.items():
        # A killed build may have checked all rows. But a share is one of the rows of all files.
        if bad_rows > 0 or not was_checked(home).exists():
            unchecked.append(path)
    chunks = itertools.chain.from_iterable(map(read_chunks, unchecked))
    errors = list_bad_rows(tokenized)
    n_bad = len(errors)
    sizes = [os.path.getsize(home / "documents.bin") for home in tokenized]
    n_rows = sum(sizes) // DOCUMENT.itemsize
    with process_chunks("checking", check_chunk, chunks, unchecked, encoder, lock) as done:
        for chunk, errors_of_chunk in done:
            n_rows += len(chunk.rows)
            n_bad += len(errors_of_chunk)
            errors += name_rows(chunk.path, errors_of_chunk[:MAX_REPORTED])
            if bad_rows == 0 and n_bad >= MAX_REPORTED:
                break  # a share can be checked after the last row only
    check_bad_rows(errors, n_bad, n_rows, bad_rows)
    if bad_rows == 0:
        for home in paths:
            was_checked(home).parent.mkdir(exist_ok=True)
            was_checked(home).touch()


def was_checked(home):
    """The file that says that no row of a file is bad, in the part of its build."""
    return home.with_suffix(".part") / "checked"


def check_bad_rows(errors, n_bad, n_rows, bad_rows):
    """Raise a ValueError that names the first bad rows if there are more than bad_rows allows."""
    if n_bad > bad_rows * n_rows:
        shown = "".join(itertools.islice(errors, MAX_REPORTED))
        count = f"{n_bad} of {n_rows}"
        if bad_rows == 0 and n_bad >= MAX_REPORTED:
            count = f"at least {n_bad}"  # later rows may not have been read
        remedy = "set BAD_ROWS to the share of rows that may be skipped"
        if bad_rows > 0:
            share = math.ceil(1e4 * n_bad / n_rows) / 1e4   # rounded up, so that it suffices
            remedy = f"raise BAD_ROWS {bad_rows:g} to {share:g} to skip them"
        raise ValueError(f"{shown}{count} rows cannot be used: fix or remove them, or {remedy}")


def check_columns(data, columns):
    """Raise a ValueError if COLUMNS names a column that no file of DATA has, as by a typo. Then
    another key of the rows could be trained.

    Only the first rows of each file are read, and only the columns are checked that each row of a
    format needs.
    """
    paths = itertools.chain.from_iterable(source.files for source in find_files(data))
    needed = {column for key, column in columns.items() if key in REQUIRED_KEYS}
    known = set()
    for path in paths:
        if needed <= known:
            return
        for _, row in itertools.islice(read_rows(path), MAX_REPORTED):
            with suppress(ValueError):  # bad rows are reported together, later
                known.update(parse_row(row))
    missing = sorted(needed - known)
    if missing and known:
        raise ValueError(
            f"COLUMNS {columns} names {missing[0]!r}, which is no key of the first rows of DATA: "
            f"their keys are {', '.join(sorted(known))}. Name one of them.")


def continue_part(path, home):
    """Yield the Chunks of a file that are not in the part of a killed build yet."""
    part = home.with_suffix(".part")
    part.mkdir(exist_ok=True)
    yield from read_chunks(path, after=drop_incomplete(part))


def drop_incomplete(part):
    """Truncate the files of a killed build after the last complete row. Return its number."""
    with open(part / "documents.bin", "ab") as file:
        n_rows = file.tell() // DOCUMENT.itemsize
        file.truncate(n_rows * DOCUMENT.itemsize)
    rows = np.fromfile(part / "documents.bin", DOCUMENT)
    with open(part / "tokens.bin", "ab") as file:
        file.truncate(int(rows["length"].sum()) * np.dtype(np.int32).itemsize)
    with open(part / "errors.txt", "ab+") as file:
        file.seek(0)
        complete = itertools.islice(file, int(rows["is_bad"].sum()))
        file.truncate(sum(map(len, complete)))
    return rows["number"].max(initial=0)


def append(path, content):
    with open(path, "ab") as file:
        file.write(content)


def list_bad_rows(paths):
    """Return a line about each row that cannot be used of tokenized files, {their folder: path}.

    Also writes them to bad_rows.txt in these folders. They have the current path, unlike errors.txt.
    """
    lines = []
    for home, path in paths.items():
        with open(home / "errors.txt", newline="\n") as file:
            of_file = name_rows(path, file)
        content = "".join(of_file).encode()
        listed = home / "bad_rows.txt"
        is_listed = listed.exists() and listed.read_bytes() == content
        if of_file and not is_listed:
            # The cache may be somebody else's, who tokenized a file of the same content.
            with suppress(PermissionError):
                listed.write_bytes(content)
        lines += of_file
    return lines


def name_rows(path, errors):
    """Return lines about rows of a file, "path:number: error", from those without the path."""
    return [f"{printable(path)}:{error}" for error in errors]


@contextmanager
def process_chunks(what, function, chunks, files, encoder, lock):
    """Yield an iterator over (chunk, function(chunk)), computed by one process per core.

    The sizes of `files` are the total of the progress bar.
    """
    n_cores = len(os.sched_getaffinity(0))
    total_bytes = sum(map(os.path.getsize, files))
    fork = multiprocessing.get_context("fork")
    arguments = (encoder, lock, os.getpid())
    pool = ProcessPoolExecutor(n_cores, fork, initializer=start_worker, initargs=arguments)
    bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, mininterval=2,
               disable=None)  # shown on a terminal only

    def results():
        # In the order of the chunks, and few at a time, as the data may be larger than memory.
        waiting = collections.deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(function, chunk)))
            if len(waiting) > 4 * n_cores:
                yield finish(*waiting.popleft())
        while waiting:
            yield finish(*waiting.popleft())

    def finish(chunk, future):
        result = future.result()
        bar.update(chunk.n_bytes)
        return chunk, result

    try:
        with bar:
            yield results()
    except BrokenProcessPool as error:
        raise RuntimeError("a process that tokenizes was killed, probably because memory ran out: "
                           "give the job more memory, or fewer cores by taskset") from error
    finally:
        pool.shutdown(cancel_futures=True)


# Each worker process sets this once. As an argument, it would be pickled with every call.
worker_encoder = None


def start_worker(encoder, lock, parent):
    """Prepare a process that tokenizes: it ends with its parent, and does not hold its lock."""
    global worker_encoder
    worker_encoder = encoder
    lock.close()
    gc.freeze()  # or each collection would look at all objects of the parent process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core
    # Otherwise it would wait for further chunks for ever if its parent is killed.
    set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG of Linux
    ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def check_chunk(chunk):
    """Return the errors of rows, except those that only the tokenizer would find.

    Raise ValueError for a chat template that takes too long: other rows would take as long.
    """
    errors = []
    for number, row in zip(chunk.numbers, chunk.rows):
        try:
            worker_encoder.check(row)
        except TemplateLimit as error:
            raise ValueError(f"{printable(chunk.path)}:{number}: {error}") from None
        except Exception as error:
            errors.append(describe_bad_row(number, error))
    return errors


def encode_chunk(chunk):
    """Return the tokens of all rows of a chunk, their records (DOCUMENT), and their errors."""
    results = []
    for start in range(0, len(chunk.rows), BATCH_ROWS):
        results += worker_encoder.encode_rows(chunk.rows[start:start + BATCH_ROWS])
    errors = []
    is_bad = [isinstance(result, Exception) for result in results]
    for i in np.flatnonzero(is_bad):
        errors.append(describe_bad_row(chunk.numbers[i], results[i]))
        results[i] = Encoded(np.array([], np.int32), full_length=0)

    # Arithmetic on all rows at once is much faster than one by one if they are short.
    records = np.zeros(len(results), DOCUMENT)
    records["number"] = chunk.numbers
    records["length"] = [len(encoded.tokens) for encoded in results]
    records["full_length"] = [encoded.full_length for encoded in results]
    records["hash"] = [encoded.hash for encoded in results]
    records["is_bad"] = is_bad
    records["is_lossy"] = [encoded.is_lossy for encoded in results]
    records["is_endless"] = [encoded.is_endless for encoded in results]
    tokens = np.concatenate([np.array([], np.int32), *[encoded.tokens for encoded in results]])
    not_empty = records["length"] > 0
    if not_empty.any():
        first = (np.cumsum(records["length"]) - records["length"])[not_empty]
        is_target = is_trained(tokens)
        is_target[first] = False
        records["targets"][not_empty] = np.add.reduceat(is_target, first, dtype=np.int64)
        records["largest_id"][not_empty] = np.maximum.reduceat(token_ids(tokens), first)
    return tokens, records, errors


def describe_bad_row(number, error):
    """Return a line about a row that cannot be used."""
    return f"{number}: {describe_error(error)}".replace("\n", " ") + "\n"
