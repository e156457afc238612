"""Show where the time of a training step goes: one step under torch.profiler, kernels by class.

    torchrun --nproc_per_node 4 bench/breakdown.py SHAPE=llama2-7b MAX_LENGTH=32768 ...

Arguments are constants of train.py, and four more: SHAPE, a model of bench/run.py, instead of
MODEL; NUM_LAYERS=n, to keep only the first n layers of that shape; MEDIAN_DOCUMENT=n, as in
bench/run.py; and MEMORY=1, to list what is allocated at the peak of memory instead of the kernels.
Needs a GPU. Rank 0 prints. Where the GPU was idle for long, it says what the CPU did meanwhile.
"""
import collections
import gc
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import metrics
import train
from bench.run import SHAPES, Settings, document_lengths, write_config, write_documents

OWN_OPTIONS = ("SHAPE", "NUM_LAYERS", "MEDIAN_DOCUMENT", "MEMORY")
CLASSES = {  # part of a kernel's name: class. The first that matches counts.
    "nccl": "exchange, gather, reduce",
    "flash": "attention",
    "Flash": "attention",
    "fmha": "attention",
    "gemm": "matrix products",
    "nvjet": "matrix products",
    "cutlass": "matrix products",
    "Adam": "optimizer",
    "multi_tensor_apply": "norm, clip, optimizer",
    "triton": "compiled elementwise",
    "Memcpy": "copies",
    "Memset": "copies",
    "chunk_cat": "FSDP copies",
    "split_with_sizes": "FSDP copies",
    "CatArray": "concatenation",
    "elementwise": "plain elementwise",
}


class Kernel(NamedTuple):
    """One kernel or copy on the GPU. Times are in microseconds."""
    start: float
    end: float
    name: str


class Gap(NamedTuple):
    """A time in which the GPU ran no kernel, but at most copies. Times are in microseconds."""
    duration: float
    start: float
    before: str         # name of the last kernel before it
    after: str          # name of the first kernel after it


class CpuSampler:
    """Records every few milliseconds where the Python threads are that queue kernels."""
    INTERVAL = 0.005    # seconds

    def __init__(self):
        self.samples = []   # (microseconds since 1970, as in Kernel; text)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def start(self):
        gc.callbacks.append(self.record_collection)
        self.thread.start()

    def stop(self):
        gc.callbacks.remove(self.record_collection)
        self.stopped.set()
        self.thread.join()

    def run(self):
        while not self.stopped.wait(self.INTERVAL):
            # Of autograd, whose threads call our hooks, threading knows nothing.
            others = {thread.ident for thread in threading.enumerate()}
            others.remove(threading.main_thread().ident)
            for thread, frame in sys._current_frames().items():
                if thread not in others:
                    self.samples.append((time.time() * 1e6, describe_stack(frame)))

    def record_collection(self, phase, info):
        """Python calls it at the start and the end of a garbage collection."""
        text = f"garbage collection of generation {info['generation']}: {phase}"
        self.samples.append((time.time() * 1e6, text))

    def describe(self, gap):
        """Return what the threads did most of the time in a Gap."""
        during = [text for moment, text in self.samples
                  if gap.start <= moment <= gap.start + gap.duration]
        if not during and gap.duration < 2e6 * self.INTERVAL:
            return "too short for a sample"
        if not during:
            return "no sample: a thread held Python's lock"
        counted = collections.Counter(during).most_common(3)
        return "; ".join(f"{n} of {len(during)} samples: {text}" for text, n in counted)


def describe_stack(frame, depth=5):
    """Return the innermost lines of a thread."""
    lines = []
    while frame is not None and len(lines) < depth:
        lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


class Allocation(NamedTuple):
    size: int       # bytes
    where: str      # the Python lines that made it, innermost first


def kernel_class(name):
    for part, kind in CLASSES.items():
        if part in name:
            return kind
    return "other"


def recorded_kernels(profiler):
    """Return what the GPU ran under the profiler, a list of Kernel."""
    kernels = []
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            start = event.start_ns() / 1e3
            end = (event.start_ns() + event.duration_ns()) / 1e3
            kernels.append(Kernel(start, end, event.name()))
    return kernels


def find_gaps(kernels):
    """Return the microseconds in which any of `kernels` ran, and the Gaps between them."""
    kernels = sorted(kernels)
    busy = 0.0
    gaps = []
    busy_until = kernels[0].start
    last = ""
    for kernel in kernels:
        if kernel.start > busy_until:
            gaps.append(Gap(kernel.start - busy_until, busy_until, last, kernel.name))
        # Streams overlap: only the part of a kernel after all earlier ones adds to the busy time.
        if kernel.end > busy_until:
            busy += kernel.end - max(kernel.start, busy_until)
            busy_until = kernel.end
            last = kernel.name
    return busy, gaps


def print_kernels(kernels, sampler):
    """Print the time from first to last kernel, where the GPU was idle, and each class's time."""
    busy, _ = find_gaps(kernels)
    computing, gaps = find_gaps([k for k in kernels if kernel_class(k.name) != "copies"])
    first_start = min(kernel.start for kernel in kernels)
    last_end = max(kernel.end for kernel in kernels)
    span = last_end - first_start
    print(
        f"step: {span / 1e3:.1f} ms from first to last kernel,"
        f" {busy / 1e3:.1f} ms with one running,"
        f" {(busy - computing) / 1e3:.1f} ms of these only copies"
    )
    for gap in sorted(gaps, reverse=True)[:8]:
        print(f"{gap.duration / 1e3:9.2f} ms  idle: {gap.before[:60]} -> {gap.after[:60]}")
        print(f"              {sampler.describe(gap)}")
    idle_before = collections.Counter()
    number_before = collections.Counter()
    for gap in gaps:
        idle_before[gap.after[:90]] += gap.duration
        number_before[gap.after[:90]] += 1
    for name, microseconds in idle_before.most_common(8):
        print(f"{microseconds / 1e3:9.2f} ms  idle in {number_before[name]} gaps before {name}")

    time_of_class = collections.Counter()
    time_of_name = collections.defaultdict(collections.Counter)
    for kernel in kernels:
        kind = kernel_class(kernel.name)
        duration = kernel.end - kernel.start
        time_of_class[kind] += duration
        time_of_name[kind][kernel.name[:90]] += duration
    for kind, microseconds in time_of_class.most_common():
        print(f"{microseconds / 1e3:9.1f} ms  {kind}")
        for name, part in time_of_name[kind].most_common(6):
            print(f"      {part / 1e3:9.1f} ms  {name}")


def replay(trace):
    """Return the peak of bytes in a trace of allocator events, and the Allocations at the peak."""
    alive = {}      # address: Allocation
    allocated = 0
    peak = 0
    at_peak = []
    for event in trace:
        if event["action"] == "alloc":
            lines = [
                f"{Path(frame['filename']).name}:{frame['line']}"
                for frame in event["frames"]
                if frame["filename"].endswith(".py")
            ]
            alive[event["addr"]] = Allocation(event["size"], " < ".join(lines[:5]))
            allocated += event["size"]
        elif event["action"] == "free_requested" and event["addr"] in alive:
            allocated -= alive.pop(event["addr"]).size
        # Copying `alive` at every new peak would be slow: 64 MiB is precise enough.
        if allocated > peak + 2**26:
            peak = allocated
            at_peak = list(alive.values())
    return peak, at_peak


def print_memory():
    """Print what is allocated at the peak so far, by the lines that made it."""
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    peak, at_peak = replay(snapshot["device_traces"][torch.cuda.current_device()])
    size_of_lines = collections.Counter()
    for allocation in at_peak:
        size_of_lines[allocation.where] += allocation.size
    print(f"{peak / 2**30:.1f} GiB at the peak")
    for where, size in size_of_lines.most_common(24):
        print(f"{size / 2**30:9.2f} GiB  {where}")


def set_constants(arguments):
    """Set the constants of train.py. Return the options of this script, {name: text}."""
    options = {}
    constants = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in OWN_OPTIONS:
            options[name] = value
        else:
            constants.append(argument)

    # The same folder on all ranks: torchrun gives its id to each of them.
    run = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"profile-{run}"
    if "SHAPE" in options:
        layers = None
        if "NUM_LAYERS" in options:
            layers = int(options["NUM_LAYERS"])
        model = write_config(folder / "model", options["SHAPE"], layers)
        constants.append(f"MODEL={model}")
    train.override([
        "INIT=random",
        "DATA=synthetic",
        f"RUN_DIR={folder / 'run'}",
        "SAVE_EVERY=-1",
        "MAX_STEPS=5",
        "GLOBAL_BATCH_SIZE=1",
        *constants,     # last, so that they replace the ones above
    ])
    if "MEDIAN_DOCUMENT" in options:
        rows = {"MAX_STEPS": train.MAX_STEPS, "GLOBAL_BATCH_SIZE": train.GLOBAL_BATCH_SIZE,
                "MEDIAN_DOCUMENT": options["MEDIAN_DOCUMENT"]}
        settings = Settings(options["SHAPE"], 1, train.MAX_LENGTH, rows)
        path = folder / "documents.jsonl"
        write_documents(path, document_lengths(settings), SHAPES[settings.shape].vocabulary)
        train.override([f"DATA={path}", "PACKING=whole", f"CACHE_DIR={folder / 'cache'}"])
    return options


def main(arguments):
    options = set_constants(arguments)
    show_memory = "MEMORY" in options
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    sampler = CpuSampler()
    original_step = metrics.Log.step

    def step(log, line):
        """train.py logs at the end of a step, on rank 0 only. Record the last step but one.

        The last step would not be typical: it does not prepare a next batch.
        """
        original_step(log, line)
        if line["step"] == train.MAX_STEPS - 2:
            torch.cuda.synchronize()
            if not show_memory:
                profiler.start()
                sampler.start()
        if line["step"] == train.MAX_STEPS - 1:
            torch.cuda.synchronize()
            if show_memory:
                print_memory()
            else:
                sampler.stop()
                profiler.stop()

    metrics.Log.step = step
    if show_memory:
        # From the start: what is allocated before this has no line to show.
        torch.cuda.memory._record_memory_history(max_entries=10**7, stacks="python")
    train.main()
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 and not show_memory:
        print_kernels(recorded_kernels(profiler), sampler)


if __name__ == "__main__":
    main(sys.argv[1:])
