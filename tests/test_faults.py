"""Faults of a run, by real processes that are killed, stopped, or given something wrong.

A run that was interrupted must end with the metrics and weights of one that was not.
"""
import ast
import contextlib
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import _run_rank, on_ranks, write_jsonl
from filelock import FileLock
from test_train import assert_same_run, exported_weights, metrics_of, run, set_constants

import convert
import data
import metrics
import parallel
import test_train
import train

setup = test_train.setup  # a fixture
ROOT = Path(train.__file__).parent
parallel.ROLL_CALL_SECONDS = 1.0  # ranks that wait for a killed one


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing loss.png takes most of the time of a short run. It is tested elsewhere."""
    monkeypatch.setattr(metrics, "plot", lambda run, lines: None)


@pytest.fixture(autouse=True)
def no_earlier_warnings(monkeypatch):
    monkeypatch.setattr(metrics, "WARNED", set())


def own_rank():
    return int(os.environ["RANK"])


def steps_of(folder):
    return [line["step"] for line in metrics_of(folder) if "loss" in line]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class Ranks:
    """Runs function(*args) on `world` forked gloo ranks, which the test can send signals to."""

    def __init__(self, world, function, *args, tmp_path):
        context = mp.get_context("fork")
        self.errors = context.SimpleQueue()
        store = tmp_path / f"store-{os.urandom(4).hex()}"
        self.processes = []
        for rank in range(world):
            arguments = (rank, world, store, function, args, self.errors)
            self.processes.append(context.Process(target=_run_rank, args=arguments))
        for process in self.processes:
            process.start()

    def send(self, number, ranks=None):
        """Send a signal to some ranks, or to all."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                os.kill(process.pid, number)

    def end(self, seconds=60):
        """Wait for the ranks and kill those that run longer. Return their exit codes and
        messages."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join()
        messages = []
        while not self.errors.empty():
            messages.append(self.errors.get())
        return [process.exitcode for process in self.processes], "\n".join(messages)


def wait_for(condition, seconds=60):
    """Wait until condition() is true. AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was never true"
        time.sleep(0.02)


def has_steps(folder, n):
    """Return a function that tells whether a run has done n steps."""
    path = folder / "metrics.jsonl"

    def condition():
        return path.exists() and path.read_bytes().count(b"\n") >= n
    return condition


# --------------------------------------------------------------------------- ranks that do not agree


def differ_on_rank_1(name, value):
    if own_rank() == 1:
        setattr(train, name, value)


def differ_in_a_file():
    """Rank 1 reads data of the same name that lacks a line."""
    if own_rank() == 1:
        open_data = train.open_data

        def open_shorter(source, *arguments):
            shorter = Path(source).with_name("shorter.jsonl")
            lines = Path(source).read_text().splitlines(keepends=True)
            shorter.write_text("".join(lines[:-1]))
            return open_data(str(shorter), *arguments)
        train.open_data = open_shorter


def run_with(settings, edit, *arguments):
    """train.main() with these constants, after edit(*arguments)."""
    def change():
        edit(*arguments)
    run(settings, change)


@pytest.mark.parametrize("name,value", [
    ("LEARNING_RATE", 0.5), ("MAX_STEPS", 5), ("GLOBAL_BATCH_SIZE", 8),
    ("SEQUENCE_PARALLEL_SIZE", 2)])
def test_ranks_with_other_constants_stop_before_the_first_step(setup, tmp_path, name, value):
    ranks = Ranks(2, run_with, setup("run"), differ_on_rank_1, name, value, tmp_path=tmp_path)
    codes, messages = ranks.end()
    assert codes == [1, 1]
    assert messages.count(f"{name} is ") == 2
    assert f"{value!r} on rank 1: start all ranks with the same code" in messages
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_ranks_with_other_data_stop_before_the_first_step(setup, tmp_path):
    ranks = Ranks(2, run, setup("run"), differ_in_a_file, tmp_path=tmp_path)
    codes, messages = ranks.end()
    assert codes == [1, 1]
    assert "the hash of DATA is " in messages


def choose_another_size_on_rank_1():
    choose_settings = train.choose_settings

    def choose(*arguments):
        sp, execution = choose_settings(*arguments)
        return sp + own_rank(), execution
    train.choose_settings = choose


def test_ranks_that_chose_another_size_stop_before_the_first_step(setup, tmp_path):
    """A size that is not set follows from the memory of the host, which may differ."""
    settings = setup("run", SEQUENCE_PARALLEL_SIZE=0)
    ranks = Ranks(2, run, settings, choose_another_size_on_rank_1, tmp_path=tmp_path)
    codes, messages = ranks.end(seconds=20)
    assert codes == [1, 1]
    assert "the sequence-parallel size is 1 on rank 0 and 2 on rank 1" in messages


def compare_with_older_code():
    """Runs on every rank. The code of rank 1 lacks a constant."""
    agreed = {"NEW": 5, "the hash of the code": "b"}
    if own_rank() == 1:
        agreed = {"the hash of the code": "a"}
    message = "NEW is 5 on rank 0 and None on rank 1; the hash of the code is 'b' on rank 0"
    with pytest.raises(ValueError, match=message):
        parallel.refuse_differences(agreed)


def test_ranks_with_older_code_are_named(tmp_path):
    on_ranks(2, compare_with_older_code, tmp_path=tmp_path)


def add_a_micro_batch_on_rank_1():
    rows_step = data.Rows.step

    def step(self, number, *arguments, **keywords):
        batches = rows_step(self, number, *arguments, **keywords)
        if number == 2 and own_rank() == 1:
            batches.append(batches[0])
        return batches
    data.Rows.step = step


def give_rank_1_other_rows():
    rows_batch = data.Rows.batch

    def batch(self, row, sp, sp_rank):
        if row == 5 and own_rank() == 1:
            row = 6
        return rows_batch(self, row, sp, sp_rank)
    data.Rows.batch = batch


@pytest.mark.parametrize("edit,sp", [(add_a_micro_batch_on_rank_1, 1), (give_rank_1_other_rows, 2)])
def test_ranks_with_another_step_stop(setup, tmp_path, edit, sp):
    ranks = Ranks(2, run, setup("run", SEQUENCE_PARALLEL_SIZE=sp), edit, tmp_path=tmp_path)
    codes, messages = ranks.end()
    assert codes == [1, 1]
    assert messages.count("The ranks do not have the same step.") == 2
    assert "rank 1, of sequence group" in messages
    assert steps_of(tmp_path / "run") in ([], [1])


# ------------------------------------------------------------------------------ signals and killing


def slow_down(steps=1):
    """Every micro-batch after so many steps takes a while, so that signals arrive in one."""
    set_gradient_sync = parallel.set_gradient_sync
    done = has_steps(Path(train.RUN_DIR), steps)

    def wait_and_set(*arguments, **keywords):
        if done():
            time.sleep(0.3)
        set_gradient_sync(*arguments, **keywords)
    parallel.set_gradient_sync = wait_and_set


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_between_micro_batches_after_a_checkpoint(setup, tmp_path, number, capfd):
    """A step takes twelve seconds after the first one, and the run stops in less."""
    settings = setup("run", MAX_STEPS=3, GLOBAL_BATCH_SIZE=80)
    ranks = Ranks(2, run, settings, slow_down, tmp_path=tmp_path)
    wait_for(has_steps(tmp_path / "run", 1))
    time.sleep(0.5)
    ranks.send(number, ranks=[1])
    codes, messages = ranks.end(seconds=8)
    assert codes == [0, 0], messages
    assert steps_of(tmp_path / "run") == [1]
    assert checkpoints(tmp_path / "run") == ["step-00000001"]
    assert "stopped by a signal after step 1. This continues the run:" in capfd.readouterr().out
    if number != signal.SIGTERM:
        return
    on_ranks(2, run, settings, tmp_path=tmp_path)
    on_ranks(2, run, {**settings, "RUN_DIR": str(tmp_path / "whole")}, tmp_path=tmp_path)
    assert_same_run(tmp_path / "run", tmp_path / "whole", rtol=0)
    assert exported_weights(tmp_path / "run") == exported_weights(tmp_path / "whole")


def terminate(moment):
    """Return a function that sends SIGTERM to rank 1 at a moment, and waits until it has arrived."""
    def send():
        if own_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    owner, name, calls_before = {
        "in a save": (parallel.dcp, "save", 0),
        "in an evaluation": (train, "position_edges", 1),  # not in that before the first step
        "in the last step": (parallel, "grad_norm", 3),
    }[moment]
    function = getattr(owner, name)
    calls = []

    def send_and_call(*arguments, **keywords):
        if len(calls) == calls_before:
            send()
        calls.append(1)
        return function(*arguments, **keywords)
    setattr(owner, name, send_and_call)


def losses_of(folder):
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in metrics_of(folder)]


def test_a_signal_at_any_moment_leaves_one_checkpoint(setup, tmp_path, capfd):
    evaluated = write_jsonl(tmp_path / "evaluated.jsonl", [{"text": "abc " * 50}])
    constants = {"EVAL_DATA": evaluated, "EVAL_EVERY": 2, "SAVE_EVERY": 2, "KEEP_CHECKPOINTS": 1}
    on_ranks(2, run, setup("whole", **constants), tmp_path=tmp_path)
    whole = losses_of(tmp_path / "whole")
    assert [step for step, _, _ in whole] == [0, 1, 2, 2, 3, 4, 4]
    for moment in ("in a save", "in an evaluation", "in the last step"):
        folder = tmp_path / moment
        settings = setup(moment, **constants)
        capfd.readouterr()
        on_ranks(2, run_with, settings, terminate, moment, tmp_path=tmp_path)
        out = capfd.readouterr().out
        [step] = re.findall(r"stopped by a signal after step (\d)\. This continues the run:", out)
        assert checkpoints(folder) == [f"step-0000000{step}"]
        stopped = losses_of(folder)
        assert stopped == whole[:len(stopped)]
        if moment == "in an evaluation":
            assert stopped[-1][0] == 2
            assert stopped[-1][2] is None
        assert not (folder / "hf").exists()

        on_ranks(2, run, settings, tmp_path=tmp_path)
        assert losses_of(folder) == whole
        assert exported_weights(folder) == exported_weights(tmp_path / "whole")


def test_a_run_without_checkpoints_does_not_say_that_it_can_be_continued(capsys):
    grid = parallel.Grid(0, 1, 1, 0, 1, 0, None, None, torch.device("cpu"))
    train.stop(None, 3, 0, None, None, 0, grid)
    out = capsys.readouterr().out
    assert "stopped by a signal after step 3: nothing is saved, as SAVE_EVERY is -1" in out
    assert "continues" not in out


def close_stdout():
    """Nobody reads what is printed any more, as after the terminal was closed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    sys.stdout = os.fdopen(write_end, "w")


def test_training_goes_on_without_its_terminal(setup, tmp_path):
    on_ranks(1, run, setup("run"), close_stdout, tmp_path=tmp_path)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def hang_in_step_2():
    learning_rate = train.learning_rate

    def hang(step, steps):
        if step == 2:
            (Path(train.RUN_DIR) / f"hangs-{own_rank()}").touch()
            time.sleep(60)
        return learning_rate(step, steps)
    train.learning_rate = hang


def test_a_second_signal_ends_the_processes_at_once(setup, tmp_path):
    ranks = Ranks(2, run, setup("run"), hang_in_step_2, tmp_path=tmp_path)
    wait_for((tmp_path / "run/hangs-0").exists)
    wait_for((tmp_path / "run/hangs-1").exists)
    ranks.send(signal.SIGTERM)
    ranks.send(signal.SIGTERM)  # passed on by a second process: it is the same request
    time.sleep(1.5)
    assert all(process.is_alive() for process in ranks.processes)
    ranks.send(signal.SIGTERM)
    codes, _ = ranks.end(seconds=2)
    assert codes == [1, 1]


def kill_in_save(moment):
    """Rank 1 is killed at a moment of the save of step 2."""
    def kill():
        if own_rank() == 1 and any(Path(train.RUN_DIR).glob("checkpoints/step-00000002.part")):
            os.kill(os.getpid(), signal.SIGKILL)

    owner, name = {
        "before writing": (parallel.dcp, "save"),
        "after writing": (parallel, "file_hash"),
    }[moment]
    function = getattr(owner, name)

    def kill_or_call(*arguments, **keywords):
        kill()
        return function(*arguments, **keywords)
    setattr(owner, name, kill_or_call)


@pytest.mark.parametrize("moment", ["before writing", "after writing"])
def test_kill_in_a_save_loses_only_that_save(setup, tmp_path, moment):
    settings = setup("run", MAX_STEPS=3, SAVE_EVERY=1)
    on_ranks(2, run, {**settings, "RUN_DIR": str(tmp_path / "whole")}, tmp_path=tmp_path)
    ranks = Ranks(2, run_with, settings, kill_in_save, moment, tmp_path=tmp_path)
    codes, _ = ranks.end()
    assert codes == [1, -signal.SIGKILL]
    assert checkpoints(tmp_path / "run") == ["step-00000001", "step-00000002.part"]
    on_ranks(2, run, settings, tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000003"]
    assert_same_run(tmp_path / "run", tmp_path / "whole", rtol=0)
    assert exported_weights(tmp_path / "run") == exported_weights(tmp_path / "whole")


def kill_while_removing():
    """Rank 0 is killed when it has removed one file of an older checkpoint."""
    def remove_one_and_kill(folder):
        (folder / "manifest.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.shutil.rmtree = remove_one_and_kill


def test_kill_after_a_save_leaves_no_half_of_an_older_checkpoint(setup, tmp_path):
    settings = setup("run", MAX_STEPS=3, SAVE_EVERY=1, KEEP_CHECKPOINTS=1)
    ranks = Ranks(2, run, settings, kill_while_removing, tmp_path=tmp_path)
    codes, _ = ranks.end()
    assert codes == [-signal.SIGKILL, 1]
    assert checkpoints(tmp_path / "run") == ["step-00000001.part", "step-00000002"]
    on_ranks(2, run, settings, tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == ["step-00000003"]


def report_little_memory():
    parallel.available_memory = int


def test_where_memory_is_short_training_waits_for_a_save(setup, tmp_path, capfd):
    settings = setup("run", MAX_STEPS=2)
    on_ranks(2, run, settings, report_little_memory, tmp_path=tmp_path)
    assert "training waits while a checkpoint is written" in capfd.readouterr().out
    parallel.read_manifest(tmp_path / "run/checkpoints/step-00000002")


def torchrun(settings, world, *options):
    """Return the command of a run by torchrun."""
    arguments = [f"{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world),
            *options, str(ROOT / "train.py"), *arguments]


def test_torchrun_stops_and_the_printed_command_continues(setup, tmp_path):
    """One rank of the run that continues is killed, and torchrun starts them all again."""
    settings = setup("run", MAX_STEPS=400, MAX_LENGTH=64, SAVE_EVERY=0, SEQUENCE_PARALLEL_SIZE=1,
                     SAMPLE_PROMPTS=[], INIT="weights", DTYPE="float32")
    command = torchrun(settings, 2, "--standalone", "--shutdown-timeout", "100", "--max-restarts",
                       "1", "--monitor-interval", "0.1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    wait_for(has_steps(tmp_path / "run", 2))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    printed = out.splitlines()
    [continues] = [i for i, line in enumerate(printed) if "This continues the run" in line]
    step = int(printed[continues].split()[6].rstrip("."))
    assert checkpoints(tmp_path / "run") == [f"step-{step:08d}"]
    assert steps_of(tmp_path / "run") == list(range(1, step + 1))

    # A later NAME=VALUE replaces an earlier one.
    again = shlex.split(printed[continues + 1])
    again += [f"MAX_STEPS={step + 200}", f"SAVE_EVERY={step + 1}"]
    process = subprocess.Popen(again, stdout=subprocess.PIPE, text=True, env=environment)
    wait_for((tmp_path / f"run/checkpoints/step-{step + 1:08d}").exists)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    for first in (step, step + 1):
        assert f"resumed from {tmp_path}/run/checkpoints/step-{first:08d}" in out
    assert steps_of(tmp_path / "run") == list(range(1, step + 201))


def test_the_printed_command_has_each_constant_once(setup, tmp_path):
    """Without torchrun. It is stopped twice, and its command does not grow."""
    settings = setup("run", MAX_STEPS=4000, MAX_LENGTH=64, SAVE_EVERY=0, SAMPLE_PROMPTS=[])
    arguments = [f"{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(ROOT / "train.py"), "RESUME=never", "SEED=1", *arguments,
               "RESUME=never", "SEED=2"]
    for n_steps in (2, 4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_for(has_steps(tmp_path / "run", n_steps))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        command = shlex.split(out.splitlines()[-1])
        assert command == [sys.executable, str(ROOT / "train.py"), "RESUME=auto", "SEED=2",
                           *arguments]


def test_long_micro_batches_and_saves_are_warned_of(monkeypatch, capsys):
    grid = parallel.Grid(0, 1, 1, 0, 1, 0, None, None, torch.device("cpu"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for given, micro_batch, save, warned in (
            ("", 29, 0, False), ("", 31, 0, True), ("", 15, 16, True),
            ("--shutdown-timeout=90", 60, 20, False), ("--shutdown_timeout 90", 60, 40, True)):
        monkeypatch.setattr(train, "command_line", f"torchrun {given} train.py".strip)
        metrics.WARNED.clear()
        train.warn_of_long_stops(micro_batch, save, grid)
        out = capsys.readouterr().out
        assert ("start it with --shutdown-timeout" in out) == warned, (given, micro_batch, save)

    monkeypatch.setattr(train, "command_line", "torchrun train.py".strip)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    metrics.WARNED.clear()
    train.warn_of_long_stops(60, 20, grid)
    assert capsys.readouterr().out == ""


def slow_saves_of_a_torchrun():
    """A micro-batch takes no time, but a save takes longer than torchrun waits."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "1"
    write = parallel.write_checkpoint

    def write_slowly(*args):
        time.sleep(1.5)
        write(*args)
    parallel.write_checkpoint = write_slowly


def test_long_saves_of_a_run_are_warned_of(setup, tmp_path, capfd):
    settings = setup("run", MAX_STEPS=3, SAVE_EVERY=1)
    on_ranks(2, run, settings, slow_saves_of_a_torchrun, tmp_path=tmp_path)
    printed = capfd.readouterr().out
    assert len(re.findall(r"and a save \d s, but torchrun kills the run 1 s after", printed)) == 1
    waited = [line["save_seconds"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert waited[0] == 0 < waited[1] < waited[2]   # the second save waited for the first


def shorten_times():
    """Collectives wait for four seconds after step 2. Micro-batches take a while from there on."""
    parallel.TRAINING_TIMEOUT = parallel.timedelta(seconds=4)
    slow_down(steps=2)


@pytest.mark.parametrize("sp", [1, 2])
def test_a_rank_that_is_stuck_is_named(setup, tmp_path, sp):
    settings = setup("run", MAX_STEPS=9, GLOBAL_BATCH_SIZE=12, SEQUENCE_PARALLEL_SIZE=sp)
    ranks = Ranks(3 if sp == 1 else 2, run, settings, shorten_times, tmp_path=tmp_path)
    wait_for(has_steps(tmp_path / "run", 2))
    ranks.send(signal.SIGSTOP, ranks=[1])
    others = [ranks.processes[0], *ranks.processes[2:]]
    wait_for(lambda: not any(process.is_alive() for process in others))
    codes, messages = ranks.end(seconds=0)
    assert codes == [1, -signal.SIGKILL, 1][:len(codes)]
    assert "rank 1 does not answer: it is stuck or gone" in messages
    assert "rank 0 waited for others at " in messages
    assert "rank 0 does not answer" not in messages


def hang_in(name):
    """Rank 1 hangs in the export, or in the thread that saves."""
    parallel.TRAINING_TIMEOUT = parallel.timedelta(seconds=4)
    parallel.SAVE_TIMEOUT = parallel.timedelta(seconds=4)
    if own_rank() == 1:
        module = {"save_weights": convert, "write_checkpoint": parallel}[name]
        setattr(module, name, lambda *args: time.sleep(1000))


@pytest.mark.parametrize("name", ["save_weights", "write_checkpoint"])
def test_a_rank_that_is_stuck_after_the_last_step_is_named(setup, tmp_path, name):
    settings = setup("run", MAX_STEPS=3)
    ranks = Ranks(2, run_with, settings, hang_in, name, tmp_path=tmp_path)
    wait_for(lambda: not ranks.processes[0].is_alive())
    codes, messages = ranks.end(seconds=0)
    assert codes == [1, -signal.SIGKILL]
    assert "rank 1 does not answer: it is stuck or gone" in messages


def hang_while_the_gpu_waits():
    """Both ranks hang in step 2. A collective of rank 0's GPU is pending since then."""
    def pending():
        hangs = Path(train.RUN_DIR) / "hangs-0"
        if not hangs.exists():
            return []
        return [{"profiling_name": "nccl:all_to_all", "timeout_ms": 31_000,
                 "time_created_ns": hangs.stat().st_mtime_ns}]

    hang_in_step_2()
    if own_rank() == 0:
        parallel.dist.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
        parallel.pending_on_gpu = pending
        parallel.WATCH_SECONDS = 0.2


def test_a_rank_that_the_gpu_waits_for_is_named(setup, tmp_path, capfd):
    ranks = Ranks(2, run, setup("run"), hang_while_the_gpu_waits, tmp_path=tmp_path)
    wait_for(lambda: not ranks.processes[0].is_alive())
    codes, _ = ranks.end(seconds=0)
    assert codes == [1, -signal.SIGKILL]
    printed = capfd.readouterr().err
    assert "nccl:all_to_all timed out" in printed
    assert "rank 0 waited for others at nccl:all_to_all on the GPU, and at train.py:" in printed
    assert "rank 1 does not answer: it is stuck or gone" in printed


def join_by_tcp_and_run(settings, port):
    """Rank 0 has the store of the process group, as without torchrun."""
    torch.distributed.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run(settings, slow_down)


def test_the_first_rank_is_named_if_it_is_gone(setup, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = setup("run", GLOBAL_BATCH_SIZE=8)
    ranks = Ranks(2, join_by_tcp_and_run, settings, port, tmp_path=tmp_path)
    wait_for(has_steps(tmp_path / "run", 2))
    ranks.send(signal.SIGKILL, ranks=[0])
    codes, messages = ranks.end(seconds=20)
    assert codes == [-signal.SIGKILL, 1]
    assert "rank 0 does not answer: it is stuck or gone" in messages


def test_a_rank_that_comes_back_in_time_goes_on(setup, tmp_path):
    settings = setup("run", MAX_STEPS=4, GLOBAL_BATCH_SIZE=8)
    ranks = Ranks(2, run, settings, shorten_times, tmp_path=tmp_path)
    wait_for(has_steps(tmp_path / "run", 2))
    ranks.send(signal.SIGSTOP, ranks=[1])
    time.sleep(1)
    ranks.send(signal.SIGCONT, ranks=[1])
    codes, messages = ranks.end()
    assert codes == [0, 0], messages
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def save_after_every_minute():
    """The clock of rank 0 goes a minute forward each time that it is read; rank 1's stands.

    A save is taken for complete at once: the steps are shorter than writing."""
    now = [0.0]

    def clock():
        if own_rank() == 0:
            now[0] += 60
        return now[0]
    train.time = types.SimpleNamespace(monotonic=clock, time=time.time, sleep=time.sleep)
    parallel.Saver.is_writing = lambda saver: False


def test_checkpoints_by_time_follow_one_clock(setup, tmp_path):
    settings = setup("run", MAX_STEPS=4, SAVE_MINUTES=1.0, KEEP_CHECKPOINTS=-1)
    on_ranks(2, run, settings, save_after_every_minute, tmp_path=tmp_path)
    assert len(checkpoints(tmp_path / "run")) == 4


# ---------------------------------------------------------------------------- checkpoints that stay


@pytest.mark.parametrize("keep,steps", [(-1, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_keep_checkpoints(setup, tmp_path, keep, steps):
    on_ranks(1, run, setup("run", SAVE_EVERY=1, KEEP_CHECKPOINTS=keep), tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == [f"step-{step:08d}" for step in steps]


@pytest.mark.parametrize("name,value,message", [
    ("KEEP_CHECKPOINTS", 0, "KEEP_CHECKPOINTS 0 is not a number of checkpoints: use -1"),
    ("KEEP_CHECKPOINTS", -2, "use -1 to keep all"),
    ("MLP_CHUNK", -5, "MLP_CHUNK -5 is out of range"),
    ("SEQUENCE_PARALLEL_SIZE", -1, "SEQUENCE_PARALLEL_SIZE -1 is out of range"),
    ("EPOCHS", 1e6, "EPOCHS 1000000.0 is out of range: use a number from .* to 10,000"),
    ("SAMPLE_PROMPTS", ["a", ""], "SAMPLE_PROMPTS .* are not texts to continue"),
    ("SAMPLE_PROMPTS", [1], "SAMPLE_PROMPTS .* are not texts to continue"),
])
def test_constants_that_no_run_can_use(name, value, message):
    set_constants({name: value})
    with pytest.raises(ValueError, match=message):
        train.check_constants()


def make_norms_nan(first, last):
    """The norm of the gradients is NaN in these steps."""
    steps = [0]
    grad_norm = parallel.grad_norm

    def norm(parameters):
        steps[0] += 1
        if first <= steps[0] <= last:
            return torch.tensor(float("nan"))
        return grad_norm(parameters)
    parallel.grad_norm = norm


def test_skipped_steps_prune_no_checkpoint(setup, tmp_path):
    settings = setup("run", MAX_STEPS=9, SAVE_EVERY=1, KEEP_CHECKPOINTS=1)
    with pytest.raises(AssertionError, match="Checkpoints of the steps before them: step-00000002"):
        on_ranks(2, run_with, settings, make_norms_nan, 3, 99, tmp_path=tmp_path)
    assert "step-00000002" in checkpoints(tmp_path / "run")
    skipped = metrics_of(tmp_path / "run")[2]
    assert skipped["skipped"]
    assert skipped["rows"] == [8, 11]

    on_ranks(2, run_with, {**settings, "RUN_DIR": str(tmp_path / "goes-on")}, make_norms_nan, 3, 4,
             tmp_path=tmp_path)
    assert checkpoints(tmp_path / "goes-on") == ["step-00000009"]


def slow_saves_and_norms_that_are_nan(fail_on_rank_1):
    """Writing a checkpoint takes longer than the steps after step 6, of which all are skipped.

    Or rank 1 fails in step 8."""
    save = parallel.dcp.save
    learning_rate = train.learning_rate

    def save_slowly(*arguments, **keywords):
        time.sleep(2)
        save(*arguments, **keywords)

    def fail(step, steps):
        if step == 8 and own_rank() == 1:
            raise torch.OutOfMemoryError("no memory")
        return learning_rate(step, steps)
    parallel.dcp.save = save_slowly
    if fail_on_rank_1:
        train.learning_rate = fail
    else:
        make_norms_nan(7, 99)


@pytest.mark.parametrize("fail_on_rank_1", [False, True])
def test_a_run_that_fails_completes_the_save_before(setup, tmp_path, fail_on_rank_1):
    settings = setup("run", MAX_STEPS=99, SAVE_EVERY=6)
    ranks = Ranks(2, run_with, settings, slow_saves_and_norms_that_are_nan, fail_on_rank_1,
                  tmp_path=tmp_path)
    codes, messages = ranks.end()
    assert codes == [1, 1]
    assert checkpoints(tmp_path / "run") == ["step-00000006"]
    if fail_on_rank_1:
        assert "no memory" in messages
    else:
        assert "Checkpoints of the steps before them: step-00000006" in messages


def make_a_weight_infinite_on_rank_1():
    update = train.update

    def update_and_break(optimizer, *arguments):
        update(optimizer, *arguments)
        weight = optimizer.param_groups[0]["params"][0].to_local()
        if own_rank() == 1:
            weight.detach()[0, 0] = float("inf")
    train.update = update_and_break


def test_weights_that_are_not_finite_are_not_saved(setup, tmp_path, capfd):
    on_ranks(2, run, setup("run", MAX_STEPS=1, SAVE_EVERY=1), make_a_weight_infinite_on_rank_1,
             tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == []
    assert "WARNING: step 1 is not saved" in capfd.readouterr().out


def flip(path, old, new):
    """Replace some bytes of a file."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def empty_files(path):
    manifest = json.loads(path.read_text())
    manifest["files"] = {}
    path.write_text(json.dumps(manifest))


def test_a_flipped_bit_in_the_manifest_is_damage(setup, tmp_path):
    on_ranks(1, run, setup("run", MAX_STEPS=2, SAVE_EVERY=1), tmp_path=tmp_path)
    folder = tmp_path / "run/checkpoints/step-00000002"
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    assert parallel.read_manifest(folder)["step"] == 2
    for old, new in ((b'"step": 2', b'"step": 3'), (b'"LEARNING_RATE"', b'"LEARNING_SATE"')):
        flip(manifest, old, new)
        with pytest.raises(ValueError, match="manifest.json is not what was written"):
            parallel.read_manifest(folder)
        manifest.write_bytes(whole)
    empty_files(manifest)
    with pytest.raises(ValueError, match="manifest.json is not what was written"):
        parallel.read_manifest(folder)

    # The one before it is taken, also where there is an earlier damaged one of the same step.
    (folder.parent / "step-00000002.damaged").mkdir()
    on_ranks(1, run, setup("run", MAX_STEPS=2, SAVE_EVERY=1), tmp_path=tmp_path)
    assert "step-00000002.damaged-2" in checkpoints(tmp_path / "run")
    assert steps_of(tmp_path / "run") == [1, 2]


def refuse_reading():
    """Rank 1 has no permission to read the shards."""
    file_hash = parallel.file_hash

    def refuse(path):
        if own_rank() == 1:
            raise PermissionError(13, "Permission denied", str(path))
        return file_hash(path)
    parallel.file_hash = refuse


def test_unreadable_and_damaged_checkpoints_stay_and_stop_the_run(setup, tmp_path):
    settings = setup("run", MAX_STEPS=2, SAVE_EVERY=1)
    on_ranks(2, run, settings, tmp_path=tmp_path)
    folder = tmp_path / "run"
    lines = metrics_of(folder)
    with pytest.raises(AssertionError, match="rank 1: PermissionError.*Permission denied"):
        on_ranks(2, run, settings, refuse_reading, tmp_path=tmp_path)
    assert checkpoints(folder) == ["step-00000001", "step-00000002"]

    for name in checkpoints(folder):
        empty_files(folder / "checkpoints" / name / "manifest.json")
    with pytest.raises(AssertionError, match="(?s)no checkpoint is undamaged.*begin at step 1, set"):
        on_ranks(2, run, settings, tmp_path=tmp_path)
    assert checkpoints(folder) == ["step-00000001", "step-00000002"]
    assert metrics_of(folder) == lines


def refuse_listing():
    """The folder of the checkpoints belongs to somebody else."""
    for name in ("listdir", "scandir"):
        function = getattr(os, name)

        def list_or_refuse(path, function=function):
            if Path(path).name == "checkpoints":
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)
        setattr(os, name, list_or_refuse)


def replace_by_a_link():
    """The folder of the checkpoints is a link to a disk that is not mounted."""
    folder = Path(train.RUN_DIR) / "checkpoints"
    folder.rename(folder.with_name("on the disk"))
    folder.symlink_to(folder.with_name("not mounted"))


@pytest.mark.parametrize("edit,message", [
    (refuse_listing, "PermissionError"), (replace_by_a_link, "FileNotFoundError")])
def test_checkpoints_that_cannot_be_listed_stop_the_run(setup, tmp_path, edit, message):
    """They may be whole: a run that began at step 1 would remove the metrics of their steps."""
    settings = setup("run", MAX_STEPS=2)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    lines = metrics_of(tmp_path / "run")
    with pytest.raises(AssertionError, match=f"looking into .*{message}"):
        on_ranks(1, run, settings, edit, tmp_path=tmp_path)
    assert metrics_of(tmp_path / "run") == lines


def test_a_run_in_use_is_left_alone(setup, tmp_path):
    """The second start must not even rename what it takes for damaged: it may be in the making."""
    settings = setup("run", MAX_STEPS=2, SAVE_EVERY=1)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    folder = tmp_path / "run"
    empty_files(folder / "checkpoints/step-00000002/manifest.json")
    with FileLock(folder / "lock", timeout=0):
        with pytest.raises(AssertionError, match="is in use by"):
            on_ranks(1, run, settings, tmp_path=tmp_path)
    assert checkpoints(folder) == ["step-00000001", "step-00000002"]


# --------------------------------------------------------------------------- full disks, half files


def limit_file_size(size):
    """Files of this process cannot grow beyond a size, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_when_saving(step):
    """Rank 1's disk is full from the save of a step on."""
    save = parallel.dcp.save

    def save_on_full_disk(state, storage_writer, process_group):
        if f"{step:08d}" in str(storage_writer.path) and own_rank() == 1:
            limit_file_size(20_000)
            report_little_space()
        save(state, storage_writer=storage_writer, process_group=process_group)
    parallel.dcp.save = save_on_full_disk


def refuse_folders():
    """Rank 0 cannot create the folder of step 2."""
    mkdir = Path.mkdir

    def refuse(path, *arguments, **keywords):
        if path.name == "step-00000002.part":
            raise OSError(30, "Read-only file system", str(path))
        mkdir(path, *arguments, **keywords)
    Path.mkdir = refuse


def test_a_checkpoint_in_a_read_only_folder_stops_all_ranks(setup, tmp_path):
    ranks = Ranks(2, run, setup("run", MAX_STEPS=4, SAVE_EVERY=2), refuse_folders,
                  tmp_path=tmp_path)
    codes, messages = ranks.end()
    assert codes == [1, 1]
    assert "Read-only file system" in messages
    assert "GiB are free there. Earlier checkpoints are intact: free space or make" in messages


def test_a_checkpoint_on_a_full_disk_stops_all_ranks(setup, tmp_path):
    settings = setup("run", MAX_STEPS=4, SAVE_EVERY=2)
    ranks = Ranks(2, run_with, settings, limit_when_saving, 4, tmp_path=tmp_path)
    codes, messages = ranks.end()
    assert codes == [1, 1]
    assert f"saving {tmp_path}/run/checkpoints/step-00000004.part" in messages
    assert "OSError: The disk is full: " in messages
    assert "GiB are free there. Earlier checkpoints are intact: free space" in messages
    parallel.read_manifest(tmp_path / "run/checkpoints/step-00000002")
    on_ranks(2, run, settings, tmp_path=tmp_path)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def report_little_space():
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 10, 1000)


def test_too_little_space_is_told_before_the_first_step(setup, tmp_path):
    with pytest.raises(AssertionError, match="has 0.0 GiB of free space and a checkpoint takes"):
        on_ranks(1, run, setup("run"), report_little_space, tmp_path=tmp_path)
    assert steps_of(tmp_path / "run") == []


def report_space_for_two():
    """The disk has space for two checkpoints."""
    def usage(path):
        n = len(parallel.published(Path(train.RUN_DIR) / "checkpoints"))
        return shutil._ntuple_diskusage(10**9, 0, 10**9 if n < 2 else 1000)
    shutil.disk_usage = usage


def test_where_a_disk_has_no_space_for_another_checkpoint_the_oldest_goes(setup, tmp_path, capfd):
    settings = setup("run", MAX_STEPS=4, SAVE_EVERY=1, KEEP_CHECKPOINTS=2)
    on_ranks(2, run, settings, report_space_for_two, tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000004"]
    assert "no space for another checkpoint: step-00000001 is removed" in capfd.readouterr().out
    parallel.read_manifest(tmp_path / "run/checkpoints/step-00000003")

    settings = setup("all", MAX_STEPS=4, SAVE_EVERY=1, KEEP_CHECKPOINTS=-1)
    with pytest.raises(AssertionError, match="besides the one before it: free space"):
        on_ranks(2, run, settings, report_space_for_two, tmp_path=tmp_path)
    assert checkpoints(tmp_path / "all") == ["step-00000001", "step-00000002"]


def stop_after_step_3():
    """The disk has space for two checkpoints, and a signal comes when the third is complete."""
    report_space_for_two()
    requests = []
    train.receive_signals = lambda: contextlib.nullcontext(requests)
    save = parallel.Saver.save

    def save_and_stop(saver, step, *args):
        save(saver, step, *args)
        if step == 3:
            requests.append(signal.SIGTERM)
    parallel.Saver.save = save_and_stop


def test_a_step_that_is_saved_needs_no_space_when_the_run_stops(setup, tmp_path):
    settings = setup("run", MAX_STEPS=6, SAVE_EVERY=1, GLOBAL_BATCH_SIZE=8)
    on_ranks(2, run, settings, stop_after_step_3, tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == ["step-00000002", "step-00000003"]


def test_before_the_first_step_no_checkpoint_is_removed_for_space(setup, tmp_path):
    """They may be the last before a divergence. A save, of finite weights, removes them."""
    on_ranks(2, run, setup("run", MAX_STEPS=2, SAVE_EVERY=1), tmp_path=tmp_path)
    settings = setup("run", MAX_STEPS=4, SAVE_EVERY=0)
    with pytest.raises(AssertionError, match="no more"):
        on_ranks(2, run, settings, fail_in_the_first_step, tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == ["step-00000001", "step-00000002"]


def fail_in_the_first_step():
    report_little_space()

    def fail(*args):
        raise ValueError("no more")
    train.training_loop = fail


def test_a_run_whose_steps_are_done_needs_no_space_for_a_checkpoint(setup, tmp_path):
    settings = setup("run", MAX_STEPS=2, SAVE_EVERY=0)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    shutil.rmtree(tmp_path / "run/hf")
    on_ranks(1, run, settings, report_little_space, tmp_path=tmp_path)
    assert (tmp_path / "run/hf/config.json").exists()


def be_on_another_host():
    """Rank 1 works in a folder of its own."""
    folder = Path(train.CACHE_DIR).parent / f"host-{own_rank()}"
    folder.mkdir()
    os.chdir(folder)


def test_a_folder_that_is_not_shared_is_refused(setup, tmp_path):
    """Rank 0's checkpoint would lack the shards of rank 1."""
    settings = {**setup("run"), "RUN_DIR": "run"}
    codes, messages = Ranks(2, run, settings, be_on_another_host, tmp_path=tmp_path).end()
    assert codes == [1, 1]
    assert "RUN_DIR run is not the same folder on rank 0 and on rank 1: set it to one" in messages
    assert not list(tmp_path.glob("host-*/run/checkpoints"))


def report_space_without_leftovers():
    """The disk has space for a checkpoint if no save that did not complete takes it."""
    def usage(path):
        is_full = any(Path(train.RUN_DIR).glob("checkpoints/*.part"))
        return shutil._ntuple_diskusage(10**9, 0, 1000 if is_full else 10**9)
    shutil.disk_usage = usage


def test_what_a_save_has_left_does_not_keep_a_run_from_starting(setup, tmp_path):
    """A save was killed, or has filled the disk. The same command goes on."""
    leftover = tmp_path / "run/checkpoints/step-00000009.part"
    leftover.mkdir(parents=True)
    (leftover / "__1_0.distcp").write_text("half a shard")
    on_ranks(2, run, setup("run", MAX_STEPS=2), report_space_without_leftovers, tmp_path=tmp_path)
    assert checkpoints(tmp_path / "run") == ["step-00000002"]


def limit_metrics():
    """metrics.jsonl has space for less than two lines."""
    append = metrics.append

    def append_on_full_disk(path, text):
        limit_file_size(int(1.5 * len(text)))
        try:
            append(path, text)
        finally:
            limit_file_size(resource.RLIM_INFINITY)
    metrics.append = append_on_full_disk


def test_metrics_that_cannot_be_written_are_warned_of_once(setup, tmp_path, capfd):
    on_ranks(1, run, setup("run", SAVE_EVERY=-1), limit_metrics, tmp_path=tmp_path)
    assert steps_of(tmp_path / "run") == [1]  # a whole line, and no part of the second
    out = capfd.readouterr().out
    assert out.count("metrics.jsonl'") == out.count("training goes on without it") == 1
    assert "step 4/4" in out


def remove_run_in_step_2():
    learning_rate = train.learning_rate

    def remove(step, steps):
        if step == 2:
            shutil.rmtree(train.RUN_DIR)
        return learning_rate(step, steps)
    train.learning_rate = remove


def test_a_run_whose_folder_is_gone_still_saves_its_model(setup, tmp_path, capfd):
    on_ranks(1, run, setup("run"), remove_run_in_step_2, tmp_path=tmp_path)
    assert "training goes on without it" in capfd.readouterr().out
    assert checkpoints(tmp_path / "run") == ["step-00000004"]
    assert exported_weights(tmp_path / "run")


def test_half_a_line_of_metrics_is_mended(setup, tmp_path, capfd):
    settings = setup("run", MAX_STEPS=2)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    path = tmp_path / "run/metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'\0\0\0\n\xff"\n{"step": 2, "lo')
    on_ranks(1, run, settings, tmp_path=tmp_path)
    assert steps_of(tmp_path / "run") == [1, 2]
    out = capfd.readouterr().out
    for number in (3, 4, 5):
        assert f"metrics.jsonl:{number} is no line of metrics, and is removed" in out


# ------------------------------------------------------------------------------------------- export


def kill_in_export(moment):
    """Return a function that ends the process by SIGKILL at a moment of an export."""
    def kill(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "second shard":
        save_file = convert.save_file
        calls = []

        def save_or_kill(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 2:
                kill()
            save_file(*arguments, **keywords)
        convert.save_file = save_or_kill
    elif moment == "tokenizer":
        convert._copy_tokenizer = kill
    elif moment == "removing the old one":
        shutil.rmtree = kill


def export(source, out, change, moment=None):
    """Export in several shards a model that differs from the source's by `change`."""
    from model import Transformer
    convert.SHARD_BYTES = 40_000
    model = Transformer(convert.load_config(source))
    convert.load_weights(model, source)
    with torch.no_grad():
        model.model["norm"].weight += change
    kill_in_export(moment)
    convert.save_weights(model, source, out)


def norm_of(folder):
    """Return the first weight of the final norm, from the folder as it is opened."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder).model.norm.weight[0].item()


def test_an_export_that_is_killed_leaves_the_old_or_the_new_one(setup, tmp_path):
    source = Path(setup("run")["MODEL"])
    out = tmp_path / "out"
    on_ranks(1, export, source, out, 1.0, tmp_path=tmp_path)
    (out / "README.md").write_text("mine")
    before = norm_of(out)
    for moment in ("second shard", "tokenizer"):
        ranks = Ranks(1, export, source, out, 2.0, moment, tmp_path=tmp_path)
        assert ranks.end()[0] == [-signal.SIGKILL]
        assert norm_of(out) == before
    ranks = Ranks(1, export, source, out, 2.0, "removing the old one", tmp_path=tmp_path)
    assert ranks.end()[0] == [-signal.SIGKILL]

    on_ranks(1, export, source, out, 3.0, tmp_path=tmp_path)
    assert norm_of(out) == pytest.approx(before + 2)
    assert (out / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob("out.*"))
    modes = {path.stat().st_mode & 0o777 for path in out.glob("*.safetensors")}
    assert modes == {(out / "config.json").stat().st_mode & 0o777}


# ------------------------------------------------------------------------ what others have prepared


class Payload:
    """A pickle of this creates a file as soon as it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def sign(folder):
    """Write sizes and hashes of all files into a manifest, as somebody who forges it would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = [file.stat().st_size, parallel.file_hash(file)]
    manifest["hash"] = parallel.manifest_hash(manifest)
    path.write_text(json.dumps(manifest))


def forge_metadata(folder, payload):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = payload
    path.write_bytes(pickle.dumps(metadata))


def forge_a_value(folder, payload):
    """The learning rate of the first parameters becomes the payload."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    [index] = [i for i in metadata.storage_data if i.fqn == "optimizer.param_groups.0.lr"]
    shard = folder / metadata.storage_data[index].relative_path
    offset = shard.stat().st_size
    with open(shard, "ab") as file:
        torch.save(payload, file)
    metadata.storage_data[index].offset = offset
    metadata.storage_data[index].length = shard.stat().st_size - offset
    path.write_bytes(pickle.dumps(metadata))


def forge_a_path(folder, payload):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../{folder.name}/{info.relative_path}"
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("forge,message", [
    (forge_metadata, "the metadata refers to posix.mkdir"),
    (forge_a_value, "(?i)weights.only"),
    (forge_a_path, "only files of the checkpoint itself are read"),
])
def test_a_checkpoint_of_somebody_else_runs_nothing(setup, tmp_path, forge, message):
    on_ranks(1, run, setup("theirs", MAX_STEPS=1), tmp_path=tmp_path)
    checkpoint = tmp_path / "theirs/checkpoints/step-00000001"
    trace = tmp_path / "was here"
    forge(checkpoint, Payload(trace))
    sign(checkpoint)
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, run, setup("mine", MAX_STEPS=2, RESUME=str(checkpoint)), tmp_path=tmp_path)
    if forge is not forge_a_value:  # an export does not read the optimizer's values
        with pytest.raises(BaseException, match=message):
            convert.main(checkpoint, tmp_path / "out")
    assert not trace.exists()


def test_a_manifest_that_names_another_folder_is_refused(setup, tmp_path):
    on_ranks(1, run, setup("theirs", MAX_STEPS=1), tmp_path=tmp_path)
    checkpoint = tmp_path / "theirs/checkpoints/step-00000001"
    manifest = checkpoint / "manifest.json"
    source = Path(setup("run")["MODEL"])
    for name, changes, message in (
            ("private", None, "has no config.json"), ("other", {"vocab_size": 97}, "whose vocab_size")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.secret").write_text("secret")
        if changes:
            config = json.loads((source / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **changes}))
        content = json.loads(manifest.read_text())
        content["model"] = str(folder)
        manifest.write_text(json.dumps(content))
        sign(checkpoint)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert.main(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_manifest_that_lists_files_elsewhere_is_refused(tmp_path):
    (tmp_path / "other").write_text("")
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    for name in ("../other", str(tmp_path / "other")):
        files = {".metadata": [0, ""], name: [0, parallel.file_hash(tmp_path / "other")]}
        manifest = {"step": 1, "files": files}
        manifest["hash"] = parallel.manifest_hash(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="only files of the checkpoint itself are read"):
            parallel.read_manifest(folder, part=1, parts=2)
        with pytest.raises(ValueError, match="only files of the checkpoint itself are read"):
            parallel.read_manifest(folder, part=0, parts=2)


def test_code_that_comes_with_a_model_is_never_run():
    """transformers would ask on the terminal, and run it if the answer is yes."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("bench/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


def test_a_billion_layers_are_refused_at_once(setup, tmp_path):
    folder = Path(setup("run")["MODEL"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    began = time.monotonic()
    with pytest.raises(ValueError, match="num_hidden_layers 1000000000 is not from 1 to"):
        convert.load_config(folder)
    assert time.monotonic() - began < 1
