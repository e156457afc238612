"""Where a step's time goes: train.py's own constants on the command line, one step under torch.profiler, kernels by
class.

    torchrun --nproc_per_node 4 bench/breakdown.py MODEL=... DATA=synthetic MAX_STEPS=5     (or plain python)
    SHAPE=llama3.2-3b instead of MODEL writes that shape of bench/run.py; NUM_LAYERS=n keeps its first n layers;
    MEMORY=1 lists what is alive at the memory's peak instead.
"""
import collections
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import torch
from run import write_config

import train

CLASSES = [("nccl", "exchange, gather, reduce"), ("flash", "attention"), ("Flash", "attention"), ("fmha", "attention"),
           ("gemm", "matrix products"), ("nvjet", "matrix products"), ("cutlass", "matrix products"),
           ("Adam", "optimizer"), ("multi_tensor_apply", "norm, clip, optimizer"),
           ("triton", "compiled elementwise"), ("Memcpy", "copies"),
           ("Memset", "copies"), ("chunk_cat", "FSDP copies"), ("split_with_sizes", "FSDP copies"),
           ("CatArray", "concatenation"), ("elementwise", "plain elementwise")]

def show_memory():
    """What is alive at the run's peak, by the lines that made it."""
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    alive, now, peak, at_peak = {}, 0, 0, {}
    for event in trace:
        if event["action"] == "alloc":
            frames = [f for f in event["frames"] if f["filename"].endswith(".py")]
            where = [f"{Path(f['filename']).name}:{f['line']}" for f in frames]
            alive[event["addr"]], now = (event["size"], " < ".join(where[:5])), now + event["size"]
        elif event["action"] == "free_requested" and event["addr"] in alive:
            now -= alive.pop(event["addr"])[0]
        if now > peak + 2**26:
            peak, at_peak = now, dict(alive)
    sizes = collections.Counter()
    for size, where in at_peak.values():
        sizes[where] += size
    print(f"{peak / 2**30:.1f} GiB at the peak")
    for where, size in sizes.most_common(24):
        print(f"{size / 2**30:9.2f} GiB  {where}")

def main(arguments):
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("SHAPE=", "NUM_LAYERS=", "MEMORY=")))
    arguments = [a for a in arguments if a.split("=")[0] not in options]
    folder = Path(tempfile.gettempdir()) / f"profile-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    if "SHAPE" in options:
        layers = int(options.get("NUM_LAYERS", 0)) or None
        arguments.append(f"MODEL={write_config(folder / 'model', options['SHAPE'], layers)}")
    train.override(["INIT=random", "DATA=synthetic", f"RUN_DIR={folder}/run", "SAVE_EVERY=-1", "MAX_STEPS=5",
                    "GLOBAL_BATCH_SIZE=1", *arguments])
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    plain_log, rank, memory = train.log, int(os.environ.get("RANK", 0)), "MEMORY" in options

    def log(line):
        plain_log(line)
        if line["step"] == train.MAX_STEPS - 2:
            torch.cuda.synchronize()
            memory or profiler.__enter__()
        if line["step"] == train.MAX_STEPS - 1:
            torch.cuda.synchronize()
            show_memory() if memory else profiler.__exit__(None, None, None)

    train.log = log
    if memory:
        torch.cuda.memory._record_memory_history(max_entries=10**7, stacks="python")
    train.main()
    if rank or memory:
        return
    kernels = [(e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3, e.name())
               for e in profiler.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    spans = sorted(k[:2] for k in kernels)
    busy, until, last, gaps = 0.0, spans[0][0], "", []
    for start, end, name in sorted(kernels):
        if start > until:
            gaps.append((start - until, f"{last[:60]} -> {name[:60]}"))
        last = name if end > until else last
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
    total, names = collections.Counter(), collections.defaultdict(collections.Counter)
    for start, end, name in kernels:
        kind = next((c for word, c in CLASSES if word in name), "other")
        total[kind] += end - start
        names[kind][name[:90]] += end - start
    print(f"step: {(until - spans[0][0]) / 1e3:.1f} ms from first to last kernel, {busy / 1e3:.1f} ms with one running")
    for us, where in sorted(gaps, reverse=True)[:6]:
        print(f"{us / 1e3:9.2f} ms  idle: {where}")
    for kind, us in total.most_common():
        print(f"{us / 1e3:9.1f} ms  {kind}")
        for name, part in names[kind].most_common(6):
            print(f"      {part / 1e3:9.1f} ms  {name}")

if __name__ == "__main__":
    main(sys.argv[1:])
