"""Disturb the demo at random for some minutes, and compare it with a run that is left alone.

    python bench/soak.py [MINUTES [SEED [SECONDS]]]

About every SECONDS (60) the run of two processes is killed (kill -9 of one rank, or of all), asked
to stop (SIGTERM, SIGINT), held for a while (SIGSTOP), or its disk is full for a save. After it ends
it is started again with the same command. Each kind of event is drawn before any is drawn again. At
the end the disturbed run is completed, and the losses and norms of all steps, and the exported
weights, must equal the undisturbed run's, bit for bit.
"""
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs/soak"
STEPS_PER_MINUTE = 45  # more than a disturbed run does on two cores, so that it lasts for MINUTES
EVENTS = ("kill one", "kill all", "SIGTERM", "SIGINT", "SIGSTOP", "full disk")


def command(name, steps):
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "--shutdown-timeout", "120", str(ROOT / "train.py"), f"RUN_DIR={FOLDER / name}",
        f"CACHE_DIR={FOLDER / 'cache'}", f"MAX_STEPS={steps}", "SAVE_EVERY=7", "DTYPE=float32",
        "GLOBAL_BATCH_SIZE=8", "SEQUENCE_PARALLEL_SIZE=1", "SAMPLE_PROMPTS=[]"]


def start(name, steps, file_size=resource.RLIM_INFINITY):
    """Start a run, whose files cannot grow beyond file_size bytes. Return its process."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(name, steps), preexec_fn=limit, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)


def children(pid):
    """Return process ids of the ranks, in order."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def metrics(name):
    """Return {step: (loss, grad_norm)} of a run."""
    path = FOLDER / name / "metrics.jsonl"
    values = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if "grad_norm" in line:
            values[line["step"]] = (line["loss"], line["grad_norm"])
    return values


def weights(name):
    return [path.read_bytes() for path in sorted((FOLDER / name / "hf").glob("*.safetensors"))]


def wait_until_training(process, name):
    """Wait until the run writes metrics, or ends."""
    path = FOLDER / name / "metrics.jsonl"
    size = path.stat().st_size if path.exists() else 0
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        if path.exists() and path.stat().st_size > size:
            return
        time.sleep(0.1)
        # The steps after the checkpoint are removed at the start.
        size = min(size, path.stat().st_size if path.exists() else 0)


def disturb(event, process, rng):
    """Do to the run what the event says. All but SIGSTOP end it."""
    ranks = children(process.pid)
    if event == "kill one":
        os.kill(rng.choice(ranks), signal.SIGKILL)
    elif event == "kill all":
        for pid in [process.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
    elif event == "SIGSTOP":
        pid = rng.choice(ranks)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(rng.uniform(1, 10))
        os.kill(pid, signal.SIGCONT)
    else:
        process.send_signal(getattr(signal, event))


def soak(minutes, seed, seconds):
    """Disturb the run until the time is up, then complete it."""
    rng = random.Random(seed)
    deck = []
    counts = collections.Counter()
    steps = round(STEPS_PER_MINUTE * minutes)
    deadline = time.monotonic() + 60 * minutes
    file_size = resource.RLIM_INFINITY
    while time.monotonic() < deadline:
        process = start("disturbed", steps, file_size)
        file_size = resource.RLIM_INFINITY
        wait_until_training(process, "disturbed")
        event = "SIGSTOP"
        while event == "SIGSTOP" and process.poll() is None and time.monotonic() < deadline:
            time.sleep(rng.uniform(0, 2 * seconds))
            if process.poll() is not None:
                event = "ended by itself"  # its disk was full
            else:
                deck = deck or rng.sample(EVENTS, len(EVENTS))
                event = deck.pop()
                if event == "full disk":
                    process.send_signal(signal.SIGTERM)
                    file_size = rng.randrange(200_000, 2_000_000)  # a checkpoint's shard is larger
                else:
                    disturb(event, process, rng)
            counts[event] += 1
            print(f"{event}, after step {max(metrics('disturbed'), default=0)}", flush=True)
        try:
            process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            sys.exit(f"the run does not end after {event}")
    print(dict(counts), flush=True)
    if start("disturbed", steps).wait() != 0:
        sys.exit("the disturbed run cannot be completed")
    return steps


def main(minutes=30.0, seed=0, seconds=60.0):
    shutil.rmtree(FOLDER, ignore_errors=True)
    steps = soak(minutes, seed, seconds)
    if start("alone", steps).wait() != 0:
        sys.exit("the undisturbed run failed")

    actual = metrics("disturbed")
    expected = metrics("alone")
    different = [step for step in expected if actual.get(step) != expected[step]]
    if different or len(actual) != len(expected):
        sys.exit(f"steps {different} of {len(expected)} differ")
    if weights("disturbed") != weights("alone"):
        sys.exit("the exported weights differ")
    print(f"{len(expected)} steps and the exported weights are the same, bit for bit")


if __name__ == "__main__":
    main(*[float(argument) for argument in sys.argv[1:]])
