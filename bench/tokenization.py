"""Measures the CPU time of tokenization beside that of the tokenizer alone, and of long chats.

    python bench/tokenization.py FOLDER TEXT.jsonl

FOLDER has a tokenizer and a chat template; TEXT.jsonl has rows of {"text": ...}. A build of a
corpus is compared with calls of encode_batch alone, the part of it that cannot be avoided. Each of
them runs in one process per core, as processes that run at the same time slow each other down. The
two are repeated in turn, and the smallest time of each is reported.
"""
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import corpus  # noqa: E402
from examples import Encoder  # noqa: E402

MEGABYTES = 8  # of text, for each length of documents
REPEATS = 3
SETTINGS = (True, False, False, "split", 0)  # of Encoder, after the folder


def cpu_seconds(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def encode_batches(backend, texts, batch_size):
    for start in range(0, len(texts), batch_size):
        backend.encode_batch(texts[start:start + batch_size], add_special_tokens=False)


def measure_encode_batch(backend, texts, batch_size):
    """Return the CPU seconds of encode_batch, of so many texts a call, in one process per core."""
    n_cores = len(os.sched_getaffinity(0))
    began = cpu_seconds(resource.RUSAGE_CHILDREN)
    processes = []
    for core in range(n_cores):
        part = texts[core::n_cores]
        process = multiprocessing.Process(target=encode_batches, args=(backend, part, batch_size))
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
    return cpu_seconds(resource.RUSAGE_CHILDREN) - began


def measure_build(folder, texts):
    """Return the CPU seconds of a build: of the workers, and of the process that reads files."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        workers = cpu_seconds(resource.RUSAGE_CHILDREN)
        reader = cpu_seconds(resource.RUSAGE_SELF)
        corpus.build_corpus(str(path), folder, temporary + "/cache", *SETTINGS)
        workers = cpu_seconds(resource.RUSAGE_CHILDREN) - workers
        reader = cpu_seconds(resource.RUSAGE_SELF) - reader
    return workers, reader


def main(folder, path):
    text = "\n".join(json.loads(line)["text"] for line in open(path))
    text *= 1 + MEGABYTES * 10**6 // len(text)
    text = text[:MEGABYTES * 10**6]
    encoder = Encoder(folder, *SETTINGS)
    encoder.load()  # imports transformers
    began = cpu_seconds(resource.RUSAGE_SELF)
    encoder.load()
    loading = cpu_seconds(resource.RUSAGE_SELF) - began

    for length in (2000, 40):
        texts = [text[start:start + length] for start in range(0, len(text), length)]
        backend = encoder.tokenizer.backend_tokenizer
        times = []
        for _ in range(REPEATS):
            by_1000 = measure_encode_batch(backend, texts, 1000)
            by_100 = measure_encode_batch(backend, texts, 100)
            workers, reader = measure_build(folder, texts)
            times.append((by_1000, by_100, workers, reader - loading))  # once, whatever the size
        by_1000, by_100, workers, reader = map(min, zip(*times))
        build = workers + reader
        print(f"{length} characters: encode_batch of 1,000 texts {by_1000:.2f} s, of 100 "
              f"{by_100:.2f} s; build {workers:.2f} + {reader:.2f} s, share {by_1000 / build:.2f} "
              f"and {by_100 / build:.2f}; {MEGABYTES / workers:.1f} MB/s per worker, "
              f"{MEGABYTES / reader:.0f} MB/s read")

    for n_messages in (10, 100, 1000, 4000):
        messages = []
        for i in range(n_messages):
            role = "assistant" if i % 2 else "user"
            messages.append({"role": role, "content": text[100 * i:100 * i + 100]})
        began = time.process_time()
        encoder({"messages": messages})
        seconds = time.process_time() - began
        print(f"a chat of {n_messages} messages: {seconds:.3f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
