"""From files to documents: tokenized once, and stored in a memory-mapped cache."""
import glob
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from examples import (
    HASHES, Encoder, hash_row, is_trained, naming, parse_json, parse_row, read_example, token_ids)

# ---------------------------------------------------------------------------------------- files

DATA_FILE = re.compile(r"\.(jsonl|json|parquet)(\.gz)?$")


def find_files(data):
    """Returns a sorted list of files for each source of DATA, and the epochs of each source.

    DATA is a source, a list of sources, or {source: epochs}. A source is a path, glob or folder.
    """
    if isinstance(data, str):
        epochs_of_source = {data: 1.0}
    elif isinstance(data, dict):
        epochs_of_source = data
    else:
        epochs_of_source = dict.fromkeys(data, 1.0)

    sources = []
    for source, epochs in epochs_of_source.items():
        # A set, because a glob such as books/** finds both a folder and the files in it.
        files = set()
        for path in map(Path, glob.glob(source, recursive=True)):
            if path.is_dir():
                files.update(file for file in path.rglob("*") if DATA_FILE.search(file.name))
            else:
                files.add(path)
        unknown = sorted(file.name for file in files if not DATA_FILE.search(file.name))
        if unknown or not files:
            found = unknown[0] if unknown else "no file"
            raise ValueError(f"DATA {source!r} matches {found}: name files whose names end with "
                             ".json, .jsonl or .parquet, or with one of these and .gz")
        if not epochs > 0:
            raise ValueError(f"DATA {source!r} is set to {epochs} epochs: use more than 0")
        sources.append(sorted(str(file) for file in files))
    return sources, list(epochs_of_source.values())


def read_rows(path):
    """Yields (place, row) for each row of a file. A place is path:line, or path:number of the row.

    A row of a .jsonl file is its unparsed line (bytes), and others are objects.
    """
    open_file = gzip.open if path.endswith(".gz") else open
    with naming(path), open_file(path, "rb") as file:
        beginning = file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")  # after a byte order mark
        if path.removesuffix(".gz").endswith(".parquet"):
            rows = read_parquet(file)
        elif beginning.startswith(b"["):
            rows = parse_json(file.read(), "the file must be one JSON array in UTF-8; fix it")
        else:
            rows = file  # its lines; parsing them is left to the worker processes

        for number, row in enumerate(rows, 1):
            is_blank = isinstance(row, bytes) and not row.strip()
            if not is_blank:
                yield f"{path}:{number}", row


def read_parquet(file):
    from pyarrow import parquet

    for batch in parquet.ParquetFile(file).iter_batches(1000):
        yield from batch.to_pylist()


def is_chat(data, wanted_format="", columns=None):
    """Returns whether the first row of a source of DATA is a conversation."""
    sources, _ = find_files(data)
    for files in sources:
        for place, row in itertools.islice(read_rows(files[0]), 1):
            with naming(place):
                if read_example(parse_row(row), wanted_format, columns).chat is not None:
                    return True
    return False


# ---------------------------------------------------------------------------------- token cache

CACHE_VERSION = 6  # part of every key: raise it when the same files would give other tokens
TOKENIZER_FILE = re.compile("token|vocab|merges|template")
BLOCK_BYTES = 8 * 2**20  # what a core tokenizes at a time, as the data may be larger than memory

# The record of one document in documents.bin.
DOCUMENT = np.dtype([
    ("length", np.int64),
    ("targets", np.int64),      # trained tokens, except the first, which no token precedes
    ("full_length", np.int64),  # before OVERLONG
    ("largest_id", np.int64),
    ("source", np.int64),       # index of its source in DATA
    ("hash", np.int64),         # of its row, from 0 to below HASHES
])


class Corpus(NamedTuple):
    """Tokenized documents, memory-mapped. Document i is tokens[offsets[i]:offsets[i + 1]].

    If the key is "synthetic", documents are random, and `tokens` is the size of the vocabulary.
    """
    tokens: np.ndarray   # int32; see `mask`
    offsets: np.ndarray  # (documents + 1,) int64
    targets: np.ndarray  # (documents,) int64: trained tokens, except the first of a document
    full: np.ndarray     # (documents,) int64: lengths before OVERLONG
    sources: list        # (first document, last + 1, epochs) of each source
    key: str             # hash of files, tokenizer and settings; or "synthetic"
    hashes: np.ndarray = None    # (documents,) int64 below HASHES, of the rows of the files
    selected: np.ndarray = None  # (documents,) bool: those that this run uses; None: all

    def read(self, document, start, end):
        """Returns tokens [start, end) of a document; fewer if the document ends before."""
        first, last = self.offsets[document:document + 2]
        if self.key == "synthetic":
            generator = np.random.default_rng(int(document))
            tokens = generator.integers(0, self.tokens, last - first, np.int32)
            return tokens[start:end]
        return self.tokens[first + start:min(first + end, last)]


def build_corpus(data, folder, cache, *settings, vocab_size=None):
    """Returns the Corpus of DATA, tokenized with the tokenizer of a Hugging Face folder.

    settings: the arguments of Encoder after the folder.
    """
    sources, epochs = find_files(data)
    key = cache_key(sources, folder, cache, settings)
    home = Path(cache) / key
    # The first process tokenizes and the others wait for this lock. They do so before the process
    # group exists, where no collective can time out.
    with FileLock(home.with_suffix(".lock")):
        if not home.exists():
            tokenize(sources, home, (str(folder), *settings))

    documents = np.fromfile(home / "documents.bin", DOCUMENT)
    if not documents["targets"].any():
        raise ValueError(f"DATA {data} holds no token to train: name other files")
    largest = documents["largest_id"].max()
    if vocab_size and largest >= vocab_size:
        raise ValueError(f"token {largest} is beyond the vocabulary of {vocab_size} tokens: use "
                         "the tokenizer of the model")

    # Documents are stored in the order of their sources.
    ends = np.searchsorted(documents["source"], range(len(sources)), "right").tolist()
    firsts = [0, *ends[:-1]]
    return Corpus(
        tokens=np.memmap(home / "tokens.bin", np.int32, "r"),
        offsets=np.insert(np.cumsum(documents["length"]), 0, 0),
        targets=documents["targets"],
        full=documents["full_length"],
        sources=list(zip(firsts, ends, epochs)),
        key=key,
        hashes=documents["hash"],
    )


def hold_out(corpus, share):
    """Splits the documents of a Corpus: returns one without, and one with this share of them.

    A document is held out because of the hash of its row alone. So equal rows stay together, and
    the same ones are held out with another tokenizer, other settings and further files.
    """
    held_out = corpus.hashes < share * HASHES
    for part, name in ((held_out, "holds out"), (~held_out, "leaves")):
        if not corpus.targets[part].any():
            raise ValueError(f"EVAL_DATA {share} {name} no token to train of {len(held_out)} "
                             "documents: use another share, or name a file")
    training = corpus._replace(selected=~held_out, key=f"{corpus.key} without {share}")
    # Each document that is held out is evaluated once, whatever the epochs of its source.
    sources = [(first, end, 1.0) for first, end, _ in corpus.sources]
    evaluation = corpus._replace(
        selected=held_out, sources=sources, key=f"{share} of {corpus.key}")
    return training, evaluation


def cache_key(sources, folder, cache, settings):
    """Returns a hash of the contents of all files, of the tokenizer, and of the settings."""
    # The names of files do not matter: a moved file is recognized, and a changed one is not.
    files = list(itertools.chain.from_iterable(sources))
    for path in sorted(Path(folder).iterdir()):
        if TOKENIZER_FILE.search(path.name) and path.is_file():
            files.append(path)
    hashes = hash_files(files, Path(cache) / "hashes.json")
    files_of_source = [len(source) for source in sources]
    content = [CACHE_VERSION, settings, files_of_source, *hashes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def hash_files(files, memory):
    """Returns the hash of each file. Those in the file `memory` are not computed again."""
    with FileLock(memory.with_suffix(".lock")):
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


def tokenize(sources, home, settings):
    """Writes the documents of all files to the folder `home`, using all cores.

    settings: all arguments of Encoder. A call that was killed is continued by the next one.
    """
    part = home.with_suffix(".part")
    part.mkdir(exist_ok=True)
    total_bytes = sum(os.path.getsize(path) for path in itertools.chain.from_iterable(sources))
    n_cores = len(os.sched_getaffinity(0))

    # Forked workers inherit the encoder: it is loaded once, and its memory is shared.
    encoder = Encoder(*settings)
    encoder.load()
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(n_cores, fork, initializer=start_worker, initargs=(encoder,))
    bar = tqdm(total=total_bytes, desc="tokenizing", unit="B", unit_scale=True, mininterval=2,
               disable=None)  # shown on a terminal only
    tokens_file = open(part / "tokens.bin", "ab")
    documents_file = open(part / "documents.bin", "ab")
    with bar, pool, tokens_file, documents_file:
        n_done = drop_incomplete(tokens_file, documents_file)
        rows = itertools.islice(read_sources(sources), n_done, None)
        for block, n_bytes in split_into_blocks(rows, BLOCK_BYTES * n_cores):
            records = []
            chunksize = 1 + len(block) // (64 * n_cores)
            for tokens, record in pool.map(encode_in_worker, block, chunksize=chunksize):
                tokens_file.write(tokens)
                records.append(record)
            # A document counts as done when its record is written, so its tokens come first.
            tokens_file.flush()
            documents_file.write(np.array(records, DOCUMENT))
            documents_file.flush()
            bar.update(n_bytes)
    part.rename(home)


def drop_incomplete(tokens_file, documents_file):
    """Truncates the files of a killed build after the last complete document; returns how many."""
    n_documents = documents_file.tell() // DOCUMENT.itemsize
    documents_file.truncate(n_documents * DOCUMENT.itemsize)
    documents = np.fromfile(documents_file.name, DOCUMENT)
    n_tokens = int(documents["length"].sum())
    tokens_file.truncate(n_tokens * np.dtype(np.int32).itemsize)
    return n_documents


def read_sources(sources):
    """Yields (place, row, index of the source) for all rows of all files."""
    for source, files in enumerate(sources):
        for path in files:
            for place, row in read_rows(path):
                yield place, row, source


def split_into_blocks(rows, block_bytes):
    """Yields (rows, their bytes) for consecutive blocks of about block_bytes."""
    block = []
    n_bytes = 0
    for place, row, source in rows:
        block.append((place, row, source))
        n_bytes += len(row) if isinstance(row, bytes) else len(str(row))
        if n_bytes >= block_bytes:
            yield block, n_bytes
            block = []
            n_bytes = 0
    if block:
        yield block, n_bytes


# Each worker process sets this once. As an argument, it would be pickled with every call.
worker_encoder = None


def start_worker(encoder):
    global worker_encoder
    worker_encoder = encoder


def encode_in_worker(row):
    return encode_row(worker_encoder, row)


def encode_row(encoder, row):
    """Returns the tokens of a row (place, content, source), and the fields of its DOCUMENT."""
    place, content, source = row
    with naming(place):
        tokens, full_length = encoder(content)
    targets = int(is_trained(tokens[1:]).sum())
    largest_id = int(token_ids(tokens).max(initial=0))
    row_hash = hash_row(parse_row(content))
    return tokens, (len(tokens), targets, full_length, largest_id, source, row_hash)
