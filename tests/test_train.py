"""train.py as its users run it: the same numbers on any number of ranks, exact resuming, and errors
before any process waits for another. Also how the files of the project may import each other."""
import ast
import errno
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import assert_close, on_ranks, tiny_config, tiny_model, write_jsonl
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

import convert
import data
import metrics
import parallel
import train
from costs import GPUS, step_seconds
from model import Config, Transformer
from tools import plan as plan_tool

ROOT = Path(train.__file__).parent
DEFAULTS = {name: getattr(train, name) for name in train.CONSTANTS}

# What the tests want otherwise: small, exact and without samples.
SMALL = {
    "INIT": "weights",
    "MAX_LENGTH": 64,
    "GLOBAL_BATCH_SIZE": 4,
    "MAX_STEPS": 4,
    "DTYPE": "float32",
    "SAVE_EVERY": 0,
    "SAMPLE_PROMPTS": [],
    "LEARNING_RATE": 1e-3,
    "SEQUENCE_PARALLEL_SIZE": 1,
}


def set_constants(*settings):
    """Set the constants of train.py to their defaults, then to each of the dicts."""
    train.SET_BY_HAND.clear()
    for constants in (DEFAULTS, *settings):
        for name, value in constants.items():
            setattr(train, name, value)


def run(settings, edit=None):
    """train.main() with these constants in this process, after edit() has broken something."""
    set_constants(SMALL, settings)
    if edit is not None:
        edit()
    train.main()


def metrics_of(folder):
    text = (Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def exported_weights(folder):
    return [file.read_bytes() for file in sorted((folder / "hf").glob("*.safetensors"))]


def assert_same_run(actual_folder, expected_folder, rtol):
    actual = metrics_of(actual_folder)
    expected = metrics_of(expected_folder)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for a, e in zip(actual, expected):
        for key in ("loss", "grad_norm", "target_tokens", "learning_rate"):
            what = f"{key} of step {a['step']} in {actual_folder}"
            assert_close(a[key], e[key], what, rtol=rtol)


@pytest.fixture
def setup(tmp_path, hf_folder, tokenizer_files):
    """Make a model folder and text and chat files whose documents differ much in length.

    Return a function from a run's name and its other constants to all of its settings.
    """
    folder, _ = hf_folder(vocab_size=260, eos_token_id=0, bos_token_id=None)
    tokenizer_files(folder)
    rng = random.Random(0)

    def random_text(choices):
        n = rng.choice(choices)
        return "".join(rng.choice("abc de\n") for _ in range(n))

    texts = [{"text": random_text([1, 5, 40, 200])} for _ in range(60)]
    chats = []
    for _ in range(40):
        question = {"role": "user", "content": random_text([1, 90])}
        answer = {"role": "assistant", "content": random_text([1, 3, 30])}
        chats.append({"messages": [question, answer]})
    files = {
        "text": write_jsonl(tmp_path / "text.jsonl", texts),
        "chat": write_jsonl(tmp_path / "chat.jsonl", chats),
    }

    def settings(name, data="text", **changes):
        return {
            "MODEL": str(folder),
            "DATA": files[data],
            "RUN_DIR": str(tmp_path / name),
            "CACHE_DIR": str(tmp_path / "cache"),
            **changes,
        }
    return settings


# -------------------------------------------------------------- the same run on any number of ranks

GRIDS = [  # ranks, SEQUENCE_PARALLEL_SIZE, ZERO_STAGE, REPLICAS
    (2, 1, 2, 1),
    (2, 2, 3, 1),
    (4, 2, 1, 1),
    (4, 4, 2, 1),
    (4, 2, 3, 2),
    (8, 8, 2, 1),
]


def test_text_is_trained_alike_on_any_ranks(setup, tmp_path):
    on_ranks(1, run, setup("alone"), tmp_path=tmp_path)
    assert {line["tokens"] for line in metrics_of(tmp_path / "alone")} == {256}
    for world, sp, zero_stage, replicas in GRIDS:
        name = f"{world}-{sp}-{zero_stage}-{replicas}"
        settings = setup(
            name, SEQUENCE_PARALLEL_SIZE=sp, ZERO_STAGE=zero_stage, REPLICAS=replicas)
        on_ranks(world, run, settings, tmp_path=tmp_path)
        assert_same_run(tmp_path / name, tmp_path / "alone", rtol=1e-5)


@pytest.mark.parametrize("weight", ["token", "sample", "square"])
def test_chat_is_trained_alike_on_any_ranks(setup, tmp_path, weight):
    settings = {"data": "chat", "PACKING": "whole", "LOSS_WEIGHT": weight, "MAX_LENGTH": 160}
    on_ranks(1, run, setup("alone", **settings), tmp_path=tmp_path)
    on_ranks(4, run, setup("four", SEQUENCE_PARALLEL_SIZE=4, **settings), tmp_path=tmp_path)
    assert_same_run(tmp_path / "four", tmp_path / "alone", rtol=1e-5)


@pytest.mark.parametrize("packing", ["split", "whole", "none"])
def test_every_target_is_trained_once_an_epoch(setup, tmp_path, packing):
    settings = setup(
        packing, PACKING=packing, BATCH_SIZE=3, MAX_STEPS=-1, EPOCHS=1.0, SEQUENCE_PARALLEL_SIZE=2)
    on_ranks(2, run, settings, tmp_path=tmp_path)
    targets = 0
    for line in Path(settings["DATA"]).read_text().splitlines():
        targets += len(json.loads(line)["text"])  # a token per byte, and eos, less the first token
    assert sum(line["target_tokens"] for line in metrics_of(tmp_path / packing)) == targets


def test_evaluation_does_not_depend_on_ranks(setup, tmp_path):
    """eval_loss of an untrained model is the mean over all targets of EVAL_DATA, on any grid."""
    chat = setup("", data="chat")["DATA"]
    settings = {"EVAL_DATA": chat, "EVAL_EVERY": 2, "MAX_STEPS": 3, "LEARNING_RATE": 0.0}
    on_ranks(1, run, setup("alone", **settings), tmp_path=tmp_path)
    on_ranks(4, run, setup("spread", SEQUENCE_PARALLEL_SIZE=2, **settings), tmp_path=tmp_path)

    set_constants(SMALL, setup(""))
    folder = Path(train.MODEL)
    model = Transformer(convert.load_config(folder))
    convert.load_weights(model, folder)
    rows = train.open_data(chat, folder, model.config)
    loss = 0.0
    targets = 0
    for row in range(rows.per_epoch):
        batch = rows.batch(row, 1, 0)
        loss += model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen,
                      batch.labels).item()
        targets += (batch.labels != data.IGNORE).sum().item()

    for name in ("alone", "spread"):
        lines = [line for line in metrics_of(tmp_path / name) if "eval_loss" in line]
        assert [line["step"] for line in lines] == [0, 2, 3]
        for line in lines:
            what = f"eval_loss of step {line['step']} of {name}"
            assert_close(line["eval_loss"], loss / targets, what, rtol=1e-5)


def test_samples_do_not_depend_on_ranks(setup, tmp_path, capfd):
    printed = []
    for world in (1, 2):
        settings = setup(f"run{world}", MAX_STEPS=1, SEQUENCE_PARALLEL_SIZE=world,
                         SAMPLE_PROMPTS=["ab", "c"], SAMPLE_TOKENS=6)
        on_ranks(world, run, settings, tmp_path=tmp_path)
        samples = capfd.readouterr().out.split("-" * 80)[1:]
        assert len(samples) == 2
        printed.append(samples)
    assert printed[0] == printed[1]


def be_greedy():
    train.SAMPLE_TEMPERATURE = 1e-6


NO_ROPE_AND_WINDOWS = {  # the first layer has no RoPE, the last one a window of 5 tokens
    "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize("model_type,changes,world", [
    ("llama", {}, 1), ("llama", {}, 2), ("qwen3", {}, 2), ("smollm3", NO_ROPE_AND_WINDOWS, 2)])
def test_greedy_samples_are_those_of_transformers(
        setup, hf_folder, tokenizer_files, tmp_path, capfd, model_type, changes, world):
    """The ranks share each row in training. The second prompt has fewer tokens than two."""
    folder, reference = hf_folder(model_type, model_type, vocab_size=260, eos_token_id=None,
                                  bos_token_id=None, pad_token_id=None, **changes)
    tokenizer = tokenizer_files(folder)
    prompts = ["def main(): return 1", "c"]
    settings = setup("run", MODEL=str(folder), MAX_STEPS=0, SEQUENCE_PARALLEL_SIZE=world,
                     ZERO_STAGE=3, RECOMPUTE="pairs", SAMPLE_PROMPTS=prompts, SAMPLE_TOKENS=12)
    on_ranks(world, run, settings, be_greedy, tmp_path=tmp_path)

    samples = capfd.readouterr().out.split("-" * 80 + "\n")[1:]
    for prompt, written in zip(prompts, samples, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        [expected] = reference.generate(ids, max_new_tokens=12, do_sample=False)
        assert written == tokenizer.decode(expected) + "\n"


# ---------------------------------------------------------------------------- resuming and stopping


def test_resume_is_exact(setup, tmp_path):
    """A run is resumed after step 3 of 7, in the second of three epochs.

    On the same ranks the results are the same bit for bit, on others up to rounding.
    """
    settings = {"MAX_STEPS": 7, "GLOBAL_BATCH_SIZE": 32}
    whole = tmp_path / "whole"
    keep_all = {"SAVE_EVERY": 3, "KEEP_CHECKPOINTS": 9}
    on_ranks(2, run, setup("whole", **settings, **keep_all), tmp_path=tmp_path)
    assert metrics_of(whole)[-1]["epoch"] > 2

    for name, world, sp, zero_stage, rtol in (("same", 2, 1, 2, 0), ("other", 4, 2, 3, 1e-6)):
        resumed = tmp_path / name
        checkpoint = "checkpoints/step-00000003"
        shutil.copytree(whole / checkpoint, resumed / checkpoint)
        shutil.copy(whole / "metrics.jsonl", resumed)
        changes = {"SEQUENCE_PARALLEL_SIZE": sp, "ZERO_STAGE": zero_stage}
        on_ranks(world, run, setup(name, **settings, **changes), tmp_path=tmp_path)
        assert [line["step"] for line in metrics_of(resumed)] == [1, 2, 3, 4, 5, 6, 7]
        assert_same_run(resumed, whole, rtol)
    assert exported_weights(tmp_path / "same") == exported_weights(whole)


def test_resume_is_exact_anywhere_in_an_epoch(setup, tmp_path):
    """An epoch is two steps: a run is resumed within the first, after it, and in the second."""
    texts = [{"text": "abc de " * n} for n in range(1, 9)]
    settings = {
        "DATA": write_jsonl(tmp_path / "eight.jsonl", texts), "PACKING": "none",
        "GLOBAL_BATCH_SIZE": 4, "SAVE_EVERY": 1, "KEEP_CHECKPOINTS": -1}
    whole = tmp_path / "whole"
    on_ranks(1, run, setup("whole", **settings), tmp_path=tmp_path)
    assert [line["epoch"] for line in metrics_of(whole)] == [0.5, 1, 1.5, 2]

    for step in (1, 2, 3):
        resumed = tmp_path / f"after-{step}"
        checkpoint = f"checkpoints/step-{step:08d}"
        shutil.copytree(whole / checkpoint, resumed / checkpoint)
        shutil.copy(whole / "metrics.jsonl", resumed)
        on_ranks(1, run, setup(resumed.name, **settings), tmp_path=tmp_path)
        assert_same_run(resumed, whole, rtol=0)
        assert exported_weights(resumed) == exported_weights(whole)


def test_changed_constants_are_shown_and_another_model_is_refused(setup, tmp_path, capfd):
    on_ranks(1, run, setup("run", MAX_STEPS=1), tmp_path=tmp_path)
    changed = setup("run", MAX_STEPS=2, LEARNING_RATE=0.5)
    on_ranks(1, run, changed, tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "LEARNING_RATE was 0.001 and is now 0.5, compared with step-00000001" in out
    assert "steps are done" not in out
    on_ranks(1, run, changed, tmp_path=tmp_path)
    out += capfd.readouterr().out
    assert ("all 2 steps are done, so that nothing is trained, and the model is that of step 2: raise "
            "MAX_STEPS or EPOCHS") in out
    assert "SEED was" not in out

    with pytest.raises(AssertionError, match="The config of .*step-00000002 differs .*"
                       "max_position_embeddings was 512 and is now 1024. Set RUN_DIR"):
        on_ranks(1, run, {**changed, "MAX_POSITION_EMBEDDINGS": 1024}, tmp_path=tmp_path)


def spy_on_hyperparameters():
    loop = train.training_loop

    def print_and_loop(model, optimizer, *arguments):
        print("AdamW:", [(group["weight_decay"], *group["betas"]) for group in optimizer.param_groups])
        return loop(model, optimizer, *arguments)
    train.training_loop = print_and_loop


def test_a_resumed_run_has_its_own_hyperparameters(setup, tmp_path, capfd):
    """Not those of its checkpoint."""
    on_ranks(1, run, setup("run", MAX_STEPS=1, WEIGHT_DECAY=0.1), tmp_path=tmp_path)
    changed = setup("run", MAX_STEPS=2, WEIGHT_DECAY=0.7, BETAS=(0.8, 0.99))
    on_ranks(2, run, changed, spy_on_hyperparameters, tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "WEIGHT_DECAY was 0.1 and is now 0.7" in out
    assert "AdamW: [(0.7, 0.8, 0.99), (0.0, 0.8, 0.99)]" in out


ROWS_OF_STEPS = [{"GLOBAL_BATCH_SIZE": 2}, {"MAX_LENGTH": 32}, {"PACKING": "whole"}, {"SEED": 5}]


@pytest.mark.parametrize("changed", ROWS_OF_STEPS, ids=str)
def test_a_run_whose_steps_would_have_other_rows_is_not_resumed(setup, tmp_path, changed):
    """Some rows would be trained twice, and others never."""
    on_ranks(1, run, setup("run", MAX_STEPS=1), tmp_path=tmp_path)
    [name] = changed
    with pytest.raises(AssertionError, match=f"{name} was .* and is now .*, so that steps .* other "
                       "rows.*Undo this, or .*new run"):
        on_ranks(1, run, {**setup("run", MAX_STEPS=2), **changed}, tmp_path=tmp_path)


def test_a_run_is_resumed_although_constants_without_effect_have_changed(setup, tmp_path):
    """BATCH_SIZE with PACKING="split", and SEED where only samples are left to be drawn."""
    on_ranks(1, run, setup("run", MAX_STEPS=1, BATCH_SIZE=3), tmp_path=tmp_path)
    on_ranks(1, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)
    on_ranks(1, run, setup("run", MAX_STEPS=2, SEED=7), tmp_path=tmp_path)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]


def have_an_earlier_order():
    data.ORDER_VERSION = 1


def test_a_run_of_code_with_another_order_of_rows_is_not_resumed(setup, tmp_path):
    on_ranks(1, run, setup("run", MAX_STEPS=1), have_an_earlier_order, tmp_path=tmp_path)
    with pytest.raises(AssertionError, match="was written by code that had another order of rows"):
        on_ranks(1, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)


def test_other_weights_are_not_resumed(setup, tmp_path):
    """Of the same shapes, such as those of a base model and of its chat model."""
    settings = setup("run", MAX_STEPS=1)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    folder = Path(settings["MODEL"])
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="was trained from .*MODEL .* has other weights, which "
                       "resuming would ignore: set RUN_DIR"):
        on_ranks(1, run, {**settings, "MAX_STEPS": 2}, tmp_path=tmp_path)

    path = folder / "model.safetensors"
    others = path.rename(folder / "others")     # weights are not needed any more
    on_ranks(2, run, {**settings, "MAX_STEPS": 2}, tmp_path=tmp_path)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    others.rename(path)
    with pytest.raises(AssertionError, match="MODEL .* has other weights"):
        on_ranks(1, run, {**settings, "MAX_STEPS": 3}, tmp_path=tmp_path)


def test_a_run_and_an_export_overwrite_no_model(setup, tmp_path):
    settings = setup("run", MAX_STEPS=1)
    model = settings["MODEL"]
    set_constants(SMALL, settings, {"RUN_DIR": model})
    with pytest.raises(ValueError, match="RUN_DIR .* would overwrite MODEL .*: set another RUN_DIR"):
        train.check_machine("cpu")
    on_ranks(1, run, settings, tmp_path=tmp_path)
    set_constants(SMALL, settings, {"MODEL": str(tmp_path / "run/hf")})
    with pytest.raises(ValueError, match="RUN_DIR .* would overwrite MODEL .*: set another RUN_DIR"):
        train.check_machine("cpu")
    set_constants(SMALL, settings, {"RUN_DIR": str(tmp_path / "run/hf")})
    with pytest.raises(ValueError, match="RUN_DIR .* holds the weights of a model"):
        train.check_machine("cpu")

    checkpoint = tmp_path / "run/checkpoints/step-00000001"
    with pytest.raises(ValueError, match=f"OUT {model} is the folder of the model that was trained"):
        convert.main(checkpoint, model)
    with pytest.raises(ValueError, match="OUT .*run is the folder of a run, which would be overw"):
        convert.main(checkpoint, tmp_path / "run")
    with pytest.raises(ValueError, match="is the folder of a run: name .* such as .*step-00000001"):
        convert.main(tmp_path / "run", tmp_path / "out")


def test_constants_that_change_nothing_are_warned_of(setup, tmp_path, capfd):
    settings = setup("run", MAX_STEPS=0, BATCH_SIZE=3, MAX_POSITION_EMBEDDINGS=2048,
                     ROPE_SCALING={"rope_type": "linear", "factor": 2.0}, EVAL_DATA=0.3)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "WARNING: BATCH_SIZE 3 changes nothing with PACKING 'split'" in out
    assert "GROUP_BY_LENGTH" not in out
    assert "WARNING: ROPE_SCALING's factor 2 extends to 1,024 positions only: use 4" in out
    assert re.search(r"evaluating \d+ rows before the first step", out)


def test_changed_contents_of_eval_data_are_said(setup, tmp_path, capfd):
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": "abc"}])
    on_ranks(1, run, setup("run", MAX_STEPS=1, EVAL_DATA=held_out), tmp_path=tmp_path)
    write_jsonl(tmp_path / "eval.jsonl", [{"text": "abcd"}])
    on_ranks(1, run, setup("run", MAX_STEPS=2, EVAL_DATA=held_out), tmp_path=tmp_path)
    assert "EVAL_DATA has other contents, so that losses on it" in capfd.readouterr().out


@pytest.mark.parametrize("length,varlen,beyond", [
    (256, True, "0.0%"), (512, True, "50.0%"), (512, False, "50.0%")])
def test_positions_beyond_the_old_ones_are_counted_in_rows(setup, length, varlen, beyond):
    """Not in documents, which may be longer than a row."""
    settings = setup("run", DATA="synthetic", SYNTHETIC_DOCUMENT=2048 if varlen else 64,
                     MAX_LENGTH=length, USE_VARLEN_ATTN=varlen, MAX_POSITION_EMBEDDINGS=512)
    config = Path(settings["MODEL"]) / "config.json"
    source = json.loads(config.read_text())
    config.write_text(json.dumps({**source, "max_position_embeddings": 256}))
    set_constants(SMALL, settings)
    folder, config, _, _ = train.plan(1)
    rows, _ = train.open_all_data(folder, config)
    assert f"{beyond} of the tokens are at positions beyond" in train.describe_context(
        folder, config, rows)
    assert rows.accounting()["attention"] == 1.0


def test_the_epoch_ends_with_its_rows(setup, tmp_path):
    """Although the last step has fewer rows than the others."""
    settings = setup("run", MAX_STEPS=-1, EPOCHS=1.0, GLOBAL_BATCH_SIZE=50)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    assert metrics_of(tmp_path / "run")[-1]["epoch"] == 1.0


def load_no_first_weights():
    def fail(*arguments):
        raise AssertionError("the weights of MODEL are read")
    convert.load_weights = fail
    convert.check_weights = fail
    Transformer.init_weights = fail


@pytest.mark.parametrize("init", ["weights", "random"])
def test_a_resumed_run_reads_no_first_weights(setup, tmp_path, init):
    """The checkpoint has all of them, and reading them takes minutes for a large model."""
    settings = {"MAX_STEPS": 2, "SAVE_EVERY": 1, "INIT": init}
    whole = tmp_path / "whole"
    on_ranks(2, run, setup("whole", **settings), tmp_path=tmp_path)
    shutil.copytree(whole / "checkpoints/step-00000001", tmp_path / "run/checkpoints/step-00000001")
    on_ranks(2, run, setup("run", **settings), load_no_first_weights, tmp_path=tmp_path)
    assert exported_weights(tmp_path / "run") == exported_weights(whole)


def terminate_one_rank():
    """Rank 1 receives SIGTERM while it works on step 2."""
    learning_rate = train.learning_rate

    def terminate_and_return(step, steps):
        if step == 2 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # a thread of its own reads signals
        return learning_rate(step, steps)
    train.learning_rate = terminate_and_return


def test_sigterm_on_one_rank_stops_all_after_a_checkpoint(setup, tmp_path, capfd):
    on_ranks(2, run, setup("whole", MAX_STEPS=6), tmp_path=tmp_path)
    on_ranks(2, run, setup("run", MAX_STEPS=6), terminate_one_rank, tmp_path=tmp_path)
    # The ranks ask each other before every micro-batch: step 3 does not begin.
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    printed = capfd.readouterr().out
    assert printed.count("saving the last checkpoint: ") == 2
    assert re.search("saving the last checkpoint: .* s\nstopped by a signal after step 2", printed)
    assert not (tmp_path / "run/hf").exists()

    on_ranks(2, run, setup("run", MAX_STEPS=6), tmp_path=tmp_path)
    assert "resumed from" in capfd.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "whole", rtol=0)
    assert exported_weights(tmp_path / "run") == exported_weights(tmp_path / "whole")


def damage(folder, how):
    """Damage one shard of a checkpoint, or remove the file that `how` names."""
    shard = next(folder.glob("__0_*"))
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "missing":
        shard.unlink()
    else:
        (folder / how).unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "manifest.json", ".metadata"])
def test_a_damaged_checkpoint_is_passed_over(setup, tmp_path, how, capfd):
    on_ranks(2, run, setup("run", MAX_STEPS=4, SAVE_EVERY=2), tmp_path=tmp_path)
    folder = tmp_path / "run/checkpoints"
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    damage(folder / "step-00000004", how)
    (folder / "step-00000006.part").mkdir()
    (folder / "somebody-elses").mkdir()

    # RESUME=auto sets it aside and takes the one before.
    on_ranks(2, run, setup("run", MAX_STEPS=4, SAVE_EVERY=3), tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "WARNING" in out
    assert "step-00000004" in out
    assert "resumed from" in out
    assert "step-00000002" in out
    assert [line["loss"] for line in metrics_of(tmp_path / "run")] == losses
    assert {path.name for path in folder.iterdir()} == {
        "step-00000003", "step-00000004", "step-00000004.damaged", "somebody-elses"}

    # One that is named must be whole, and a new run must not meet the old one's checkpoints.
    damage(folder / "step-00000004", "manifest.json")
    with pytest.raises(AssertionError, match="step-00000004 is not a whole checkpoint"):
        settings = setup("run", RESUME=str(folder / "step-00000004"))
        on_ranks(2, run, settings, tmp_path=tmp_path)
    with pytest.raises(AssertionError, match="holds step-00000004, but .* start after step 0: set"):
        on_ranks(2, run, setup("run", RESUME="never"), tmp_path=tmp_path)


def test_changed_data_is_not_resumed(setup, tmp_path):
    settings = setup("run", MAX_STEPS=1)
    on_ranks(1, run, settings, tmp_path=tmp_path)

    twice_as_often = {**settings, "DATA": {settings["DATA"]: 2.0}}
    with pytest.raises(AssertionError, match="The data of .*step-00000001.* differs .*: DATA was "):
        on_ranks(1, run, twice_as_often, tmp_path=tmp_path)

    with open(settings["DATA"], "a") as f:
        f.write('{"text": "more"}\n')
    with pytest.raises(AssertionError, match="The data of .*step-00000001.* differs .*: the files "):
        on_ranks(1, run, {**settings, "LEARNING_RATE": 0.5}, tmp_path=tmp_path)


def test_a_second_run_of_a_folder_is_refused(setup, tmp_path):
    """A run locks its folder until it ends. A lock file that is left behind refuses nobody."""
    on_ranks(1, run, setup("run", MAX_STEPS=1), tmp_path=tmp_path)
    folder = tmp_path / "run"
    owner = (folder / "owner").read_text()
    assert re.fullmatch(r"process \d+ on \S+", owner)

    with FileLock(folder / "lock", timeout=0):
        message = f"RUN_DIR: rank 0: {folder} is in use by {owner}: stop that run"
        with pytest.raises(AssertionError, match=re.escape(message)):
            on_ranks(2, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)

    on_ranks(2, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)
    assert [line["step"] for line in metrics_of(folder)] == [1, 2]


def run_and_lock_again(settings):
    """main() fails in the training loop, and another run of this process locks the folder."""
    lock = Path(settings["RUN_DIR"]) / "lock"

    def fail(*arguments):
        with pytest.raises(Timeout):
            FileLock(lock, timeout=0).acquire()
        raise KeyError("broken")

    training_loop = train.training_loop
    train.training_loop = fail
    with pytest.raises(KeyError) as failure:
        run(settings)
    train.training_loop = training_loop
    run(settings)
    with FileLock(lock, timeout=0):
        pass
    # The traceback kept the first main()'s variables alive: its lock was released, not collected.
    assert failure.value.args == ("broken",)


def test_main_releases_the_folder_when_it_ends_or_fails(setup, tmp_path):
    on_ranks(1, run_and_lock_again, setup("run", MAX_STEPS=1), tmp_path=tmp_path)


# --------------------------------------------------------------------------- steps that are skipped


def poison_one_rank():
    """The loss of the first micro-batch of step 2 is NaN on one rank."""
    set_gradient_sync = parallel.set_gradient_sync
    calls = []

    def sync_and_poison(model, *arguments, **keywords):
        set_gradient_sync(model, *arguments, **keywords)
        calls.append(1)

        def make_nan(module, inputs, output):
            if len(calls) == 3:
                return output * float("nan")
            return output

        # Two micro-batches are a step.
        if len(calls) == 3 and torch.distributed.get_rank() == 1:
            model.model["norm"].register_forward_hook(make_nan)
    parallel.set_gradient_sync = sync_and_poison


def test_a_step_that_is_not_finite_is_skipped_by_all(setup, tmp_path):
    on_ranks(2, run, setup("run", MAX_STEPS=3), poison_one_rank, tmp_path=tmp_path)
    assert [line["skipped"] for line in metrics_of(tmp_path / "run")] == [False, True, False]

    # Two steps, of which the second is skipped, leave the weights of one step.
    constant = {"LR_SCHEDULE": "constant", "WARMUP_RATIO": 0.0}
    on_ranks(2, run, setup("one", MAX_STEPS=1, **constant), tmp_path=tmp_path)
    on_ranks(2, run, setup("two", MAX_STEPS=2, **constant), poison_one_rank, tmp_path=tmp_path)
    assert exported_weights(tmp_path / "two") == exported_weights(tmp_path / "one")


def test_steps_without_a_target_are_skipped(setup, tmp_path):
    """Three of four rows have no target. However many follow each other, the run goes on."""
    untrained = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    path = write_jsonl(tmp_path / "few.jsonl", [{"input_ids": [5, 6, 7]}] + 7 * [untrained])
    settings = setup("run", DATA=path, PACKING="none", GLOBAL_BATCH_SIZE=1, MAX_STEPS=8)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    lines = metrics_of(tmp_path / "run")
    assert sorted(line["target_tokens"] for line in lines) == [0, 0, 0, 0, 0, 0, 0, 2]
    for line in lines:
        assert line["skipped"] == (line["target_tokens"] == 0)
        assert math.isfinite(line["loss"])
        assert math.isfinite(line["grad_norm"])


def make_every_norm_nan():
    def grad_norm(parameters):
        return torch.tensor(float("nan"))
    parallel.grad_norm = grad_norm


def test_a_run_that_diverges_ends(setup, tmp_path):
    message = "5 consecutive steps, up to step 5, was not finite: lower LEARNING_RATE 0.001"
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, run, setup("run", MAX_STEPS=9), make_every_norm_nan, tmp_path=tmp_path)
    assert [line["skipped"] for line in metrics_of(tmp_path / "run")] == [True] * 5


# -------------------------------------------------------------------------------- what a run leaves


def test_sizes_that_are_not_those_of_the_weights_are_refused_before_memory_is_taken(
        hf_folder, monkeypatch):
    folder, _ = hf_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**40}))
    monkeypatch.setattr(parallel, "shard", lambda *args: pytest.fail("memory is taken"))
    grid = types.SimpleNamespace(sp_group=None)
    with pytest.raises(ValueError, match="tensors differ: .*1099511627776"):
        train.build_model(
            folder, convert.load_config(folder), grid, train.Execution(), torch.float32)


def test_zero_steps_export_the_weights_untouched(setup, tmp_path):
    settings = setup("none", MAX_STEPS=0)
    on_ranks(2, run, settings, tmp_path=tmp_path)
    source_folder = Path(settings["MODEL"])
    out_folder = tmp_path / "none/hf"

    source = Transformer(convert.load_config(source_folder))
    convert.load_weights(source, source_folder)
    out = Transformer(convert.load_config(source_folder))
    convert.load_weights(out, out_folder)
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, out.get_parameter(name)), name
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out_folder / file).read_bytes() == (source_folder / file).read_bytes()


def test_a_checkpoint_becomes_a_folder_that_transformers_opens(setup, tmp_path):
    from transformers import AutoModelForCausalLM
    on_ranks(2, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)
    convert.main(tmp_path / "run/checkpoints/step-00000002", tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf").state_dict()
    assert converted.keys() == exported.keys()
    for name in exported:
        assert torch.equal(converted[name], exported[name]), name


def test_the_demo_needs_nothing_but_python(tmp_path, capfd):
    settings = {
        "CACHE_DIR": str(tmp_path / "cache"),
        "RUN_DIR": str(tmp_path / "run"),
        "MAX_STEPS": 6,
        "SAMPLE_TOKENS": 4,
        "SAMPLE_PROMPTS": ["import os"],
        "LEARNING_RATE": 6e-3,
        "WARMUP_RATIO": 0.0,
        "SEQUENCE_PARALLEL_SIZE": 2,
    }
    on_ranks(2, run, settings, tmp_path=tmp_path)
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert losses[0] > 5.5
    assert losses[-1] < losses[0] - 0.5
    assert "import os" in capfd.readouterr().out


def test_a_run_leaves_its_accounting_and_a_plot(setup, tmp_path):
    on_ranks(1, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)
    environment = json.loads((tmp_path / "run/env.json").read_text())
    tokens = environment["accounting"]
    assert tokens["tokens"] == tokens["trained"] + tokens["masked"] + tokens["dropped"]
    assert tokens["tokens"] > 0
    assert (tmp_path / "run/loss.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------- errors

WRONG_CONSTANTS = [
    ({"SEQUENCE_PARALLEL_SIZE": 3},
     "SEQUENCE_PARALLEL_SIZE 3 does not divide 8 attention heads: use 1"),
    ({"SEQUENCE_PARALLEL_SIZE": 2}, "SEQUENCE_PARALLEL_SIZE 2 does not divide 1 processes"),
    ({"MODEL": "no/such"}, "MODEL 'no/such' has no config.json: .*; hf download no/such --local-dir"),
    ({"DATA": "no-such.jsonl"}, "does not exist: name a file"),
    ({"PACKING": "tight"}, "PACKING 'tight' is unknown: use one of split, whole, none"),
    ({"GLOBAL_BATCH_SIZE": 0},
     "GLOBAL_BATCH_SIZE 0 is out of range: use a number from 1 to 1,000,000"),
    ({"EPOCHS": float("nan")}, "EPOCHS nan is out of range: use a number from 1e-06 to 10,000"),
    ({"LEARNING_RATE": -1e-3}, "LEARNING_RATE -0.001 is out of range: use a number from 0 to 10"),
    ({"LEARNING_RATE": float("inf")}, "LEARNING_RATE inf is out of range"),
    ({"WEIGHT_DECAY": float("nan")}, "WEIGHT_DECAY nan is out of range"),
    ({"MLP_CHUNK": -5}, "MLP_CHUNK -5 is out of range"),
    ({"SEQUENCE_PARALLEL_SIZE": -1}, "SEQUENCE_PARALLEL_SIZE -1 is out of range"),
    ({"MAX_STEPS": -2}, "MAX_STEPS -2 is out of range: use a number from -1 to"),
    ({"WARMUP_RATIO": 1.5}, "WARMUP_RATIO 1.5 is out of range: use a number from 0 to 1"),
    ({"MIN_LEARNING_RATE_RATIO": -0.1}, "MIN_LEARNING_RATE_RATIO -0.1 is out of range"),
    ({"BETAS": 3}, "BETAS 3 are not two numbers from 0 to below 1"),
    ({"BETAS": (0.9, 1.0)}, "BETAS .0.9, 1.0. are not two numbers"),
    ({"BETAS": ("a", "b")}, "BETAS .'a', 'b'. are not two numbers"),
    ({"ROPE_SCALING": 5}, "ROPE_SCALING 5 is neither a name nor a dict: use None, 'yarn'"),
    ({"DATA": "demo"}, "DATA 'demo' is for MODEL 'demo' only"),
    ({"EVAL_DATA": "demo"}, "EVAL_DATA 'demo' is for MODEL 'demo' only"),
    ({"MAX_LENGTH": 1024},
     "MAX_LENGTH 1024 is beyond the model's 512 positions: .* MAX_POSITION_EMBEDDINGS=1024 and"),
    ({"ATTENTION": "fast"}, "ATTENTION 'fast' is not known: use auto, flash_attn_4"),
    ({"ATTENTION": "flash_attn_2"}, "is not available for torch.float32"),
    ({"OFFLOAD_ACTIVATIONS": -2},
     "OFFLOAD_ACTIVATIONS -2 is not a number of layers: .* -1 for all"),
    ({"OFFLOAD_OPTIMIZER": True}, "OFFLOAD_OPTIMIZER True needs a GPU"),
    ({"MAX_POSITION_EMBEDDINGS": 10**30}, "MAX_POSITION_EMBEDDINGS 10*0 is out of range"),
    ({"GLOBAL_BATCH_SIZE": 10**30}, "GLOBAL_BATCH_SIZE 10*0 is out of range: use a number from 1"),
    ({"MAX_STEPS": 10**30}, "MAX_STEPS 10*0 is out of range: use a number from -1"),
    ({"SEED": -1}, "SEED -1 is out of range: use a number from 0 to 4,294,967,295"),
    ({"DATA": 5}, "DATA 5 does not name files: use a path, a list of paths, {path: epochs}, 'demo'"),
    ({"DATA": [1]}, "DATA .1. does not name files"),
    ({"DATA": {}}, "DATA {} does not name files"),
    ({"DATA": {"a.jsonl": float("inf")}}, "DATA 'a.jsonl' is set to inf epochs: use .*1e-06 to 10,000"),
    ({"EVAL_DATA": {"a.jsonl": 0}}, "EVAL_DATA 'a.jsonl' is set to 0 epochs: use a number from"),
    ({"EVAL_DATA": [1]}, "EVAL_DATA .1. does not name files"),
    ({"EVAL_DATA": float("nan")}, "EVAL_DATA nan is not a share of the documents of DATA"),
    ({"EVAL_DATA": "nan", "DATA": "not-read-before"}, "EVAL_DATA 'nan' does not exist"),
    ({"SAMPLE_PROMPTS": [1]}, "SAMPLE_PROMPTS .1. are not texts to continue: use a list"),
    ({"COLUMNS": {"text": 5}}, "COLUMNS {'text': 5} are not names of keys: use strings"),
    ({"COLUMNS": {"content": "text"}}, "names 'content', which no format has: use {key of a format"),
    ({"RUN_DIR": ""}, "RUN_DIR '' is empty: set it to a value like 'runs/demo'"),
    ({"MODEL": ""}, "MODEL '' is empty"),
    ({"RUN_DIR": __file__}, "RUN_DIR .*test_train.py is not a folder that this user can write"),
    ({"CACHE_DIR": "/proc/none"}, "CACHE_DIR /proc/none is not a folder that this user can write"),
    ({"RESUME": "no/such"}, "RESUME 'no/such' is no folder: use 'auto', 'never' or a checkpoint"),
    ({"ROPE_SCALING": "linear"}, "ROPE_SCALING linear has nothing to extend, as "
     "MAX_POSITION_EMBEDDINGS 0 is not more than the checkpoint's 512: raise it"),
]


def fail_to_wait(*arguments):
    pytest.fail("a process group was waited for")


@pytest.mark.parametrize("change,message", WRONG_CONSTANTS, ids=lambda value: str(value)[:30])
def test_wrong_constants_are_refused(setup, monkeypatch, change, message):
    monkeypatch.setattr(parallel, "init", fail_to_wait)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run({**setup("run"), **change})


def test_a_batch_that_does_not_divide_is_refused(setup, monkeypatch):
    monkeypatch.setattr(parallel, "init", fail_to_wait)
    monkeypatch.setenv("WORLD_SIZE", "8")
    message = "GLOBAL_BATCH_SIZE 6 is not a multiple of the data-parallel size 8 .*: use 8"
    with pytest.raises(ValueError, match=message):
        run(setup("run", GLOBAL_BATCH_SIZE=6))


def test_a_batch_that_no_size_divides_is_refused(large_folder, monkeypatch):
    """The largest sequence-parallel size, 3, asks for the fewest rows. Memory is not the reason."""
    folder = large_folder(num_attention_heads=9, num_key_value_heads=3)
    settings = {"MODEL": folder, "MAX_LENGTH": 262144, "GLOBAL_BATCH_SIZE": 1}
    pretend_gpu(monkeypatch, 20)
    message = "GLOBAL_BATCH_SIZE 1 is not a multiple of the data-parallel size 2 .*SIZE 3.: use 2"
    with pytest.raises(ValueError, match=message):
        planned(settings, 6)


BAD_LINES = [
    ('{"text": 5}', "strings"),
    ('{"text": null}', "no format"),
    ("{", "JSONDecodeError"),
    ("[1]", "no format"),
    ('{"other": 1}', "no format"),
    ('{"text": "a", "messages": []}', "'text', 'messages'"),
    ('{"messages": []}', "0 of 0 assistant turns"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "0 of 0 assistant turns"),
    ('{"messages": [{"role": "robot", "content": "a"}]}', "role"),
    ('{"text": "a', "JSONDecodeError"),
]


@pytest.mark.parametrize("line,message", BAD_LINES)
def test_a_bad_line_is_named(setup, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r\n\r\n' + line.encode() + b"\n")
    with pytest.raises(ValueError, match=f"bad.jsonl:3: .*{message}"):
        run(setup("run", DATA=str(path)))


def test_nothing_to_train_is_refused(setup, tmp_path):
    path = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="no token to train"):
        run(setup("run", DATA=path))


def test_token_ids_beyond_the_vocabulary_are_refused(setup, hf_folder, tokenizer_files):
    folder, _ = hf_folder(name="short", vocab_size=100)
    tokenizer_files(folder)
    with pytest.raises(ValueError, match="beyond the vocabulary of 100"):
        run(setup("run", MODEL=str(folder)))


def fill_memory():
    def forward(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")
    Transformer.forward = forward


def test_out_of_memory_is_explained(setup, tmp_path):
    message = (r"(?s)CUDA out of.*expected peak was [\d.]+ GiB = [\d.]+ .* \+ .*"
               r"next settings to take are SEQUENCE_PARALLEL_SIZE=1 RECOMPUTE=\w+ KEEP_LAYERS.*"
               "in this order.*ZERO_STAGE=3.*OFFLOAD_ACTIVATIONS=-1.*lower MAX_LENGTH")
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, run, setup("run"), fill_memory, tmp_path=tmp_path)


# ----------------------------------------------------------------- constants that choose themselves

def pretend_gpu(monkeypatch, gib):
    """Let train.py plan for H200s of another size, with enough CPU memory."""
    monkeypatch.setattr(train, "this_gpu", lambda: GPUS["H200"]._replace(memory=gib))
    monkeypatch.setattr(train, "host_memory_per_process", lambda: 200.0)


@pytest.fixture
def large_folder(tmp_path):
    """A function that writes config.json of a 3B model with 262,144 positions. Return its
    folder."""
    def write(**changes):
        config = {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 3072,
            "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
            "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
            "max_position_embeddings": 262144, **changes}
        folder = tmp_path / "large"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)
    return write


def planned(settings, world, on_command_line=()):
    """Return the Plan, and what RECOMPUTE="auto" has chosen."""
    set_constants(settings)
    train.SET_BY_HAND.update(on_command_line)
    plan = train.plan(world)
    return plan, {name: getattr(train, name) for name in train.CHOSEN}


def test_memory_settings_choose_themselves(large_folder, monkeypatch):
    pretend_gpu(monkeypatch, 139.8)
    settings = {"MODEL": large_folder(), "MAX_LENGTH": 32768, "GLOBAL_BATCH_SIZE": 1}
    _, chosen = planned(settings, 1)
    assert chosen["RECOMPUTE"] == "none"

    pretend_gpu(monkeypatch, 79)
    _, chosen = planned(settings, 1)
    assert 0 < chosen["OFFLOAD_ACTIVATIONS"] < 28
    _, chosen = planned({**settings, "OFFLOAD_ACTIVATIONS": 0}, 1, ["OFFLOAD_ACTIVATIONS"])
    assert chosen["RECOMPUTE"] == "all_but_attention"
    assert 0 < chosen["KEEP_LAYERS"] < 28

    # What is set by hand stays, by assignment and on the command line.
    _, chosen = planned({**settings, "OFFLOAD_ACTIVATIONS": -1, "MLP_CHUNK": 4096}, 1)
    assert chosen["OFFLOAD_ACTIVATIONS"] == 28
    assert chosen["MLP_CHUNK"] == 4096
    _, chosen = planned(settings, 1, ["KEEP_LAYERS"])
    assert chosen["KEEP_LAYERS"] == 0
    _, chosen = planned({**settings, "RECOMPUTE": "all"}, 1)
    assert chosen == {"RECOMPUTE": "all", "KEEP_LAYERS": 0, "ZERO_STAGE": 2, "MLP_CHUNK": 0,
                      "OFFLOAD_ACTIVATIONS": 0, "OFFLOAD_OPTIMIZER": False}

    pretend_gpu(monkeypatch, 14)
    with pytest.raises(ValueError, match="MAX_LENGTH 262144 do not fit in 14 GiB .* more GPUs"):
        planned({**settings, "MAX_LENGTH": 262144}, 1)


@pytest.mark.parametrize("length,batch,changes,sp", [
    (8192, 8, {}, 1),
    (262144, 8, {}, 4),         # with one or two it fits by slow means only, as tested below
    (8192, 2, {}, 4),           # two rows for eight GPUs
    (8192, 8, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 1152}, 1),
])
def test_the_smallest_sequence_parallel_size_that_fits(
        large_folder, monkeypatch, length, batch, changes, sp):
    pretend_gpu(monkeypatch, 60)
    monkeypatch.setattr(train, "host_memory_per_process", lambda: 3.0)
    settings = {"MODEL": large_folder(**changes), "MAX_LENGTH": length, "GLOBAL_BATCH_SIZE": batch}
    plan, _ = planned(settings, 8)
    assert plan.sp == sp
    if length == 262144:
        for size, recompute in ((1, "pairs"), (2, "all")):
            _, chosen = planned({**settings, "SEQUENCE_PARALLEL_SIZE": size}, 8)
            assert chosen["RECOMPUTE"] == recompute


def test_if_attention_runs_again_with_all_sizes_the_faster_means_are_taken(
        large_folder, monkeypatch):
    """One rank needs "pairs", two "all"."""
    pretend_gpu(monkeypatch, 74)
    monkeypatch.setattr(train, "host_memory_per_process", lambda: 3.0)
    settings = {"MODEL": large_folder(), "MAX_LENGTH": 262144, "GLOBAL_BATCH_SIZE": 2}
    plan, chosen = planned(settings, 2)
    assert (plan.sp, chosen["RECOMPUTE"]) == (2, "all")


def test_a_plan_is_for_one_document_whatever_its_window():
    set_constants({"MAX_LENGTH": 1024, "PACKING": "split", "GLOBAL_BATCH_SIZE": 1})
    work = train.work_of_gpu(tiny_config(sliding_window=64), world=4, sp=4)
    assert work.document == 1024
    assert work.tokens == 256


def test_the_demo_has_constants_of_its_own(tmp_path):
    settings = {"CACHE_DIR": str(tmp_path), "LEARNING_RATE": 0.5}
    planned(settings, 2)
    assert train.MAX_LENGTH == train.DEMO["MAX_LENGTH"] != DEFAULTS["MAX_LENGTH"]
    assert train.MAX_STEPS == train.DEMO["MAX_STEPS"]
    assert train.LEARNING_RATE == 0.5
    assert train.DTYPE == "float32"


def test_prompts_of_the_demo_end_where_a_token_ends(tmp_path):
    """Otherwise what the model has learnt to follow them cannot follow."""
    train.make_demo(tmp_path / "demo")
    tokenizer = data.open_tokenizer(tmp_path / "demo")
    for prompt in train.DEMO["SAMPLE_PROMPTS"]:
        ids = tokenizer(prompt).input_ids
        assert tokenizer(prompt + "\n    pass\n").input_ids[:len(ids)] == ids, prompt


def test_other_models_have_the_defaults(setup):
    planned(setup("run", MAX_LENGTH=64), 1)
    for name in ("LEARNING_RATE", "MAX_STEPS", "SAMPLE_PROMPTS", "GLOBAL_BATCH_SIZE"):
        assert getattr(train, name) == DEFAULTS[name]


def test_a_run_prints_its_settings_and_why(setup, hf_folder, tmp_path, capfd):
    """Nine heads cannot be divided among two processes; nothing speaks of a GPU on a CPU."""
    folder, _ = hf_folder(
        name="nine", vocab_size=260, num_attention_heads=9, num_key_value_heads=3, hidden_size=72,
        eos_token_id=0, bos_token_id=None)
    given = setup("run", MAX_STEPS=1, SEQUENCE_PARALLEL_SIZE=0)
    shutil.copytree(given["MODEL"], tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        shutil.copy(file, folder)
    on_ranks(2, run, {**given, "MODEL": str(folder)}, tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "settings: SEQUENCE_PARALLEL_SIZE=1 RECOMPUTE=none KEEP_LAYERS=0 ZERO_STAGE=2" in out
    assert "9 attention heads and 3 key/value heads allow SEQUENCE_PARALLEL_SIZE 1 with 2" in out
    assert "GPU" not in out


@pytest.mark.parametrize("length, world, host", [(2**20, 8, 125), (32768, 12, 125), (2**17, 8, 250)])
def test_the_smallest_size_that_is_about_fastest_is_chosen(length, world, host):
    llama_8b = Config(128256, 4096, 14336, 32, 32, 8, 128)
    gpu = GPUS["H100"]

    def seconds_with(size):
        set_constants({"MAX_LENGTH": length, "SEQUENCE_PARALLEL_SIZE": size,
                       "GLOBAL_BATCH_SIZE": world})
        try:
            sp, execution = train.choose_settings(llama_8b, world, gpu, host)
        except ValueError:
            return math.inf, size
        work = train.work_of_gpu(llama_8b, world, sp)
        return sum(step_seconds(llama_8b, gpu, work, execution).values()), sp

    chosen_seconds, chosen = seconds_with(0)
    set_constants({"GLOBAL_BATCH_SIZE": world})
    sizes = train.possible_sizes(llama_8b, world)
    seconds = {size: seconds_with(size)[0] for size in sizes}
    assert chosen_seconds == seconds[chosen] <= 1.05 * min(seconds.values())
    assert all(seconds[size] > 1.05 * min(seconds.values()) for size in sizes if size < chosen)


def test_rows_of_several_documents_are_counted_whole(setup, tmp_path, capfd):
    given = setup("run", MAX_STEPS=1, PACKING="none", BATCH_SIZE=3, DATA="synthetic")
    on_ranks(1, run, given, tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "at most 768 tokens per step" in out     # 4 rows of 3 documents of 64 tokens
    assert "12 documents" in out                    # enough for one step


def test_sizes_are_those_of_a_replica(setup, hf_folder):
    """Six heads cannot be divided among the four processes of a replica."""
    folder, _ = hf_folder(name="six", vocab_size=260, num_attention_heads=6,
                          num_key_value_heads=2, hidden_size=48)
    set_constants(SMALL, setup("run", MODEL=str(folder), GLOBAL_BATCH_SIZE=16, REPLICAS=4))
    folder, config, sp, _ = train.plan(16)
    rows = train.open_data("synthetic", folder, config)
    grid = parallel.Grid(0, 16, 16, 0, 1, 0, None, None, torch.device("cpu"))
    text = train.describe_plan(config, grid, train.execution_settings("cpu"), rows, 1)
    assert "SEQUENCE_PARALLEL_SIZE 1, 2 with 4 processes of a replica" in text


def test_an_extension_that_few_tokens_use_is_told(setup, tmp_path, capfd):
    given = setup("run", MAX_STEPS=1, MAX_POSITION_EMBEDDINGS=1024)
    on_ranks(1, run, given, tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "extended from 512 to 1,024 positions: 0.0% of the tokens are at positions" in out
    assert "WARNING: with so few" in out

    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "abc " * 500}])
    on_ranks(1, run, {**given, "DATA": long, "MAX_LENGTH": 1024, "RUN_DIR": str(tmp_path / "long")},
             tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "48.8% of the tokens are at positions beyond the old ones" in out
    assert "WARNING" not in out


@pytest.mark.parametrize("error,text", [
    (OSError(errno.ENOSPC, "No space left on device"), "free space on the disks of CACHE_DIR"),
    (PermissionError(errno.EACCES, "Permission denied", "/x/hashes.lock"),
     "set CACHE_DIR to a folder in which this user can write"),
    (PermissionError(errno.EACCES, "Permission denied", "/books/1.txt"), "let this user read it"),
])
def test_errors_of_the_system_say_what_to_do(monkeypatch, error, text):
    monkeypatch.setattr(train, "CACHE_DIR", "/x")
    assert text in train.describe_error(error)


def test_ctrl_c_before_training_is_one_line():
    """As while the data are tokenized."""
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import parallel\n"
            "def interrupt(): raise KeyboardInterrupt\n"
            "parallel.world_size = interrupt; sys.argv = ['train.py']\n"
            f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "stopped by Ctrl-C while it was not training: start it again\n"


def test_the_command_that_continues_a_job_starts_all_its_tasks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "SEED=1"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "SEED=1"])
    assert train.command_line() == "python train.py SEED=1"
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert train.command_line() == "srun --ntasks=16 python train.py SEED=1"


def test_help_shows_the_constants(capsys):
    train.print_help()
    out = capsys.readouterr().out
    assert "torchrun --nproc_per_node 8 train.py [NAME=VALUE ...]" in out
    for name in train.CONSTANTS:
        assert f"\n{name} = " in out
    assert "# steps between checkpoints" in out


@pytest.fixture
def plan_for(monkeypatch, capsys):
    """A function that runs tools/plan.py. Return its lines, and {name of a row: {column: cell}}."""
    def run_tool(*arguments):
        for name in train.CONSTANTS:
            monkeypatch.setattr(train, name, DEFAULTS[name])
        monkeypatch.setattr(train, "SET_BY_HAND", set())
        plan_tool.main(list(arguments))
        lines = capsys.readouterr().out.splitlines()
        header = next(i for i, line in enumerate(lines) if "the plan" in line)
        titles = re.split(r"\s{2,}", lines[header].strip())
        end = lines.index("", header)
        table = {}
        for line in lines[header + 1:end]:
            *name, cells = re.split(r"\s{2,}", line.strip(), maxsplit=1)
            table[name[0]] = dict(zip(titles, cells.split()))
        return lines, table
    return run_tool


def test_a_plan_for_other_machines(large_folder, plan_for):
    lines, table = plan_for(f"MODEL={large_folder()}", "MAX_LENGTH=131072", "GPU=H100", "GPUS=8",
                            "HOST_MEMORY=1000", "TOKENS=1e9")
    assert lines[0].startswith("3.21B parameters on 8 x H100 of 79 GiB, 125 GiB of CPU memory each")
    titles = ["the plan", "half", "twice", "sp 2", "sp 4", "sp 8"]  # the plan is that of sp 1
    assert list(table["MAX_LENGTH"]) == titles
    lengths = ["131,072", "65,536", "262,144"] + 3 * ["131,072"]
    assert list(table["MAX_LENGTH"].values()) == lengths
    assert list(table["sequence parallel"].values())[3:] == ["2", "4", "8"]
    assert table["sequence parallel"]["the plan"] == "1"
    assert set(table["fits"].values()) == {"yes"}
    assert float(table["GPU, of 79 GiB"]["the plan"]) <= 0.94 * 79.1
    seconds = float(table["seconds a step"]["the plan"])
    days = 1e9 / (8 * 131072) * seconds / 86400
    assert float(table["days"]["the plan"]) == pytest.approx(days, abs=0.1)
    assert any(line.startswith("sp 8: SEQUENCE_PARALLEL_SIZE=8 RECOMPUTE=") for line in lines)
    assert not any("is beyond the model's" in line for line in lines)


def test_a_plan_says_why_a_run_does_not_fit(large_folder, plan_for):
    folder = large_folder(max_position_embeddings=8192)
    lines, table = plan_for(f"MODEL={folder}", "MAX_LENGTH=1572864", "GPUS=2", "HOST_MEMORY=100")
    assert "is beyond the model's 8,192 positions: also set MAX_POSITION_EMBEDDINGS=" in lines[2]
    assert table["fits"]["the plan"] == "NO:GPU"
    assert table["seconds a step"]["the plan"] == "-"
    on_gpu = float(table["GPU, of 79 GiB"]["the plan"])
    on_host = float(table["CPU, of 42 usable GiB"]["the plan"])
    assert on_gpu > 0.95 * 79 or on_host > 42
    assert any(line.startswith("the plan: does not fit; nearest to it is ") for line in lines)

    # With the memory that it names it fits, and with less it does not.
    [note] = [line for line in lines if line.startswith("the plan: ")]
    least = int(re.search(r"\(with HOST_MEMORY=(\d+) it fits\)", note)[1])
    for host, fits in ((least, "yes"), (least - 2, "NO:CPU")):
        _, table = plan_for(
            f"MODEL={folder}", "MAX_LENGTH=1572864", "GPUS=2", f"HOST_MEMORY={host}")
        assert table["fits"]["the plan"] == fits

    # The settings of the least GPU memory would offload all to a CPU memory that is short.
    lines, table = plan_for(f"MODEL={folder}", "MAX_LENGTH=1572864", "GPUS=2", "HOST_MEMORY=10")
    assert float(table["CPU, of 4 usable GiB"]["the plan"]) < 4

    with pytest.raises(ValueError, match="GLOBAL_BATCH_SIZE 8 is not a multiple of .* 3 .*: use 9"):
        plan_for(f"MODEL={folder}", "GPUS=3", "GLOBAL_BATCH_SIZE=8")
    lines, table = plan_for(f"MODEL={folder}", "GPUS=16", "GLOBAL_BATCH_SIZE=2")
    assert table["fits"]["sp 4"] == "refused"
    assert any("sp 4: GLOBAL_BATCH_SIZE 2 is not a multiple of the data-parallel size 4" in line
               for line in lines)


def test_a_plan_warns_of_rows_on_several_hosts(large_folder, plan_for):
    folder = large_folder(num_attention_heads=32)
    lines, table = plan_for(f"MODEL={folder}", "GPUS=32", "GLOBAL_BATCH_SIZE=2")
    assert table["sequence parallel"]["the plan"] == "16"
    assert any(line.startswith("the plan: ") and "exchanged between hosts" in line
               for line in lines)


@pytest.mark.parametrize("argument,message", [
    ("GPU=V100", "GPU 'V100' is unknown: use one of A100-40, A100-80"),
    ("GPUS=0", "GPUS '0' is not a number greater than 0: use one like 8"),
    ("HOST_MEMORY=much", "HOST_MEMORY 'much' is not a number"),
    ("DOCUMENT=-1", "DOCUMENT '-1' is not a number greater than 0: use one like 8192"),
])
def test_wrong_options_of_a_plan_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        plan_tool.main([argument])


# --------------------------------------------------------------------------------- single functions


def test_overrides():
    set_constants()
    train.override(["MAX_LENGTH=512", "LEARNING_RATE=1", "MODEL=some/folder",
                    "DATA=['a.jsonl', 'b.jsonl']", "COMPILE=False"])
    assert train.MAX_LENGTH == 512
    assert train.LEARNING_RATE == 1.0
    assert type(train.LEARNING_RATE) is float
    assert train.MODEL == "some/folder"
    assert train.DATA == ["a.jsonl", "b.jsonl"]
    assert train.COMPILE is False


@pytest.mark.parametrize("argument,message", [
    ("MAX_LENGHT=5", "nearest name is MAX_LENGTH"),
    ("--max-length=5", "nearest name is MAX_LENGTH"),
    ("MAX_LENGTH", "write NAME=VALUE"),
    ("MAX_LENGTH=long", "not of type int: use a value like 8192"),
    ("OFFLOAD_ACTIVATIONS=True", "OFFLOAD_ACTIVATIONS=True is not of type int: use a value like 0"),
    ("LEARNING_RATE=", "LEARNING_RATE= is not of type float: use a value like 1e-05"),
    ("LEARNING_RATE=True", "LEARNING_RATE=True is not of type float"),
])
def test_wrong_overrides_are_refused(argument, message):
    set_constants()
    with pytest.raises(ValueError, match=message):
        train.override([argument])


def test_numbers_that_are_no_literals():
    set_constants()
    train.override(["LEARNING_RATE=nan", "WANDB=nan"])
    assert train.WANDB == "nan"
    with pytest.raises(ValueError, match="LEARNING_RATE nan is out of range: use a number from 0"):
        train.check_constants()


def test_every_number_has_a_range():
    """Two are checked by rules of their own, and one takes one of three values."""
    numbers = {name for name, value in DEFAULTS.items() if type(value) in (int, float)}
    others = {"KEEP_CHECKPOINTS", "OFFLOAD_ACTIVATIONS", "ZERO_STAGE"}
    assert numbers - set(train.RANGES) == others
    for name, (least, most) in train.RANGES.items():
        for value in (float("nan"), float("inf"), least - 1, 10 * most + 1):
            set_constants({name: value})
            with pytest.raises(ValueError, match=f"{name} .* is out of range: use a number from"):
                train.check_constants()


@pytest.mark.parametrize("offload,layers", [(0, 0), (1, 1), (-1, 2)])
def test_offload_activations_counts_layers(setup, offload, layers):
    set_constants(SMALL, setup("run", OFFLOAD_ACTIVATIONS=offload))
    config = train.plan(1).config
    assert config.num_hidden_layers == 2
    assert train.execution_settings("cpu").offload_layers == layers


@pytest.mark.parametrize("schedule,rates", [
    ("constant", [0.5, 1, 1, 1, 1]),
    ("linear", [0.5, 1, 0.75, 0.25, 0]),
    ("cosine", [0.5, 1, 0.853553, 0.146447, 0]),
    ("wsd", [0.5, 1, 1, 1, 0]),
])
def test_schedules(schedule, rates):
    set_constants({"LEARNING_RATE": 1.0, "MIN_LEARNING_RATE_RATIO": 0.0, "WARMUP_RATIO": 0.2,
                   "LR_SCHEDULE": schedule})
    assert [round(train.learning_rate(step, 10), 6) for step in (1, 2, 4, 8, 10)] == rates


def test_norms_and_biases_have_no_weight_decay():
    # Cohere's norms of q and k are matrices: every head has its own weights.
    model = tiny_model(qk_norm=True, norm="layer", qkv_bias=True)
    decayed, others = train.build_optimizer(model).param_groups
    assert decayed["weight_decay"] == train.WEIGHT_DECAY and others["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    not_decayed = {names[id(parameter)] for parameter in others["params"]}
    expected = {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert not_decayed == expected
    assert any("q_norm" in name for name in expected)
    assert len(decayed["params"]) + len(not_decayed) == len(names)


def test_optimizer_states_are_those_of_adamw():
    """They exist before the first step, and are what AdamW would have begun with."""
    def after_two_steps(build):
        linear = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(linear.weight, 0.5)
        torch.nn.init.constant_(linear.bias, 0.5)
        optimizer = build(linear)
        before = len(optimizer.state)
        for step in (1, 2):
            for p in linear.parameters():
                p.grad = torch.full_like(p, 0.1 * step)
            optimizer.step()
        values = [v for p in linear.parameters() for v in optimizer.state[p].values()]
        return before, [*linear.parameters(), *values]

    def build_plain(linear):
        groups = train.build_optimizer(linear).param_groups
        return torch.optim.AdamW(groups, fused=True)

    n_states, ours = after_two_steps(train.build_optimizer)
    no_states, theirs = after_two_steps(build_plain)
    assert (n_states, no_states) == (2, 0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_learning_rate_of_short_runs():
    """It never exceeds the peak, ends at the ratio, and warms up for a step at least."""
    set_constants({"LEARNING_RATE": 2.0, "MIN_LEARNING_RATE_RATIO": 0.25, "WARMUP_RATIO": 0.01})
    for steps in (1, 2, 5, 50):
        rates = [train.learning_rate(step, steps) for step in range(1, steps + 1)]
        assert max(rates) == rates[0] == 2.0
        if steps > 1:
            assert rates[-1] == 0.5
    set_constants({"LEARNING_RATE": 2.0, "WARMUP_RATIO": 0.0})
    assert train.learning_rate(1, 10) < 2.0


def test_constants_tell_how_rows_are_read(setup, tmp_path):
    rows = [{"q": "Hi", "a": "Yes", "text": "both"}, {"q": 5, "a": "No"}, {"text": "x"}]
    set_constants(SMALL, setup("run", DATA=write_jsonl(tmp_path / "qa.jsonl", rows)))
    train.override(["COLUMNS={'instruction': 'q', 'output': 'a'}", "FORMAT=instruction",
                    "BAD_ROWS=0.4"])
    folder, config, *_ = train.plan(1)
    described = train.open_data(train.DATA, folder, config).describe()
    assert "1 files, 2 documents" in described
    assert "1 rows are skipped" in described


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, True, "go on", [0.1]])
def test_bad_rows_stop_or_are_a_share(value):
    set_constants(SMALL, {"BAD_ROWS": value})
    with pytest.raises(ValueError, match=f"BAD_ROWS {re.escape(repr(value))} is neither 'stop' nor"):
        train.check_constants()



# ------------------------------------------------------------------------------- errors of the user

def torchrun(*arguments, **environment):
    """Run train.py on two ranks. Return the exit code and what it printed."""
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py",
         *arguments],
        cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120)
    return finished.returncode, finished.stdout


def test_an_error_is_one_line_at_the_end(setup, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": 5}')
    settings = setup("run", DATA=str(tmp_path / "bad.jsonl"), MAX_LENGTH=64)
    arguments = [f"{name}={value}" for name, value in settings.items()]
    code, printed = torchrun(*arguments)
    assert code == 1
    message = f"{tmp_path}/bad.jsonl:1: text 5 is not a string"
    assert printed.count(message) == 1
    assert printed.count("1 of 1 rows cannot be used") == 1

    # The frame around it is torchrun's own, which has one traceback of its own.
    after = printed[printed.index(message):].splitlines()
    assert len(after) <= 4
    assert "/train.py" not in printed.replace("/train.py FAILED", "")
    assert "rank      : 1" not in printed


def test_debug_shows_the_traceback():
    code, printed = torchrun("MAX_LENGHT=1", DEBUG="1")
    assert code == 1
    assert "in override" in printed
    assert "ValueError: 'MAX_LENGHT=1' does not set a constant of train.py" in printed


def test_an_error_without_torchrun_is_one_line_and_red_on_a_terminal():
    terminal, stderr = pty.openpty()
    finished = subprocess.run([sys.executable, "train.py", "MAX_LENGHT=1"], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=stderr)
    os.close(stderr)
    printed = os.read(terminal, 10**4).decode()
    os.close(terminal)
    assert finished.returncode == 1
    assert finished.stdout == b""
    red = re.escape("\033[31m")
    plain = re.escape("\033[0m")
    assert re.fullmatch(f"{red}'MAX_LENGHT=1' does not set a constant .*{plain}\r\n", printed)


# ------------------------------------------------------------------ how the files import each other

MAY_IMPORT = {
    "train.py": {"data", "convert", "model", "costs", "parallel", "metrics", "one_rank"},
    "convert.py": {"families", "model", "parallel"},
    "model.py": {"costs", "parallel", "recompute"},
    "families.py": set(),
    "recompute.py": set(),
    "costs.py": {"one_rank", "recompute"},
    "metrics.py": set(),
    "data.py": {"corpus", "examples"},
    "corpus.py": {"examples"},
    "examples.py": set(),
    "one_rank.py": set(),
    "parallel.py": {"one_rank", "recompute"},
}

# Modules whose names a file gives to others as its own.
PASSED_ON = {"data.py": {"corpus", "examples"}}


def imports(tree):
    """Yield line, module and imported name (None: the module itself) of every import in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, node.module, alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, node.args[0].value, None


def attributes(tree):
    """Yield line, variable and attribute of every `variable.attribute` in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, node.value.id, node.attr


def names_of_imports(tree, passed_on):
    """The names that a file's imports define, except those of modules whose names it passes on."""
    names = set()
    for node in ast.walk(tree):
        is_passed_on = getattr(node, "module", None) in passed_on
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not is_passed_on:
            for alias in node.names:
                names.add(alias.asname or alias.name.partition(".")[0])
    return names


def wrong_imports(sources):
    """What breaks the rules of MAY_IMPORT in these files, {name: text}, as a list of messages."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    borrowed = {}
    for file, tree in trees.items():
        borrowed[file.removesuffix(".py")] = names_of_imports(tree, PASSED_ON.get(file, ()))
    programs = {path.stem for folder in ("tools", "bench") for path in ROOT.glob(f"{folder}/*.py")}
    local = {"tools", "bench", "tests", *programs, *borrowed}
    wrong = []
    for file, tree in trees.items():
        top_level = {node.lineno for node in tree.body}
        for line, module, name in imports(tree):
            first = module.partition(".")[0]
            if first in local and first not in MAY_IMPORT[file]:
                wrong.append(f"{file}:{line} imports {first}")
            if first in local and line not in top_level:
                wrong.append(f"{file}:{line} imports {first} inside a function")
            if first in borrowed and (name == "*" or name in borrowed[first]):
                wrong.append(f"{file}:{line} imports {name} through {first}")
            if f"{module}.{name}".startswith("torch.distributed") and file != "parallel.py":
                wrong.append(f"{file}:{line} imports torch.distributed")

        modules = {module for _, module, name in imports(tree) if name is None}
        for line, variable, attribute in attributes(tree):
            if variable in modules and attribute in borrowed.get(variable, ()):
                wrong.append(f"{file}:{line} uses {attribute} through {variable}")
            if (variable, attribute) == ("torch", "distributed") and file != "parallel.py":
                wrong.append(f"{file}:{line} uses torch.distributed")
    return wrong


def read_sources():
    return {name: (ROOT / name).read_text() for name in MAY_IMPORT}


def test_files_import_only_what_they_may():
    assert wrong_imports(read_sources()) == []


@pytest.mark.parametrize("file,code,message", [
    ("data.py", "import train", "imports train"),
    ("data.py", "def f():\n    import train", "imports train"),
    ("data.py", "def f():\n    importlib.import_module('model')", "imports model"),
    ("corpus.py", "import data", "imports data"),
    ("train.py", "data.np.zeros(1)", "uses np through data"),
    ("parallel.py", "from tools import show", "imports tools"),
    ("convert.py", "def f():\n    import parallel", "imports parallel inside a function"),
    ("convert.py", "from model import parallel", "imports parallel through model"),
    ("convert.py", "from model import *", "imports * through model"),
    ("train.py", "parallel.dist.barrier()", "uses dist through parallel"),
    ("train.py", "convert.parallel.close()", "uses parallel through convert"),
    ("model.py", "import torch.distributed as dist", "imports torch.distributed"),
    ("model.py", "from torch import distributed", "imports torch.distributed"),
    ("model.py", "torch.distributed.barrier()", "uses torch.distributed"),
])
def test_no_import_hides(file, code, message):
    sources = read_sources()
    allowed = wrong_imports(sources)
    sources[file] += f"\n{code}\n"
    found = [text for text in wrong_imports(sources) if text not in allowed]
    assert any(text.startswith(f"{file}:") and text.endswith(message) for text in found), found


def test_lines_are_at_most_120_columns():
    long_lines = []
    for name, text in read_sources().items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > 120:
                long_lines.append(f"{name}:{number} has {len(line)}")
    assert long_lines == []


@pytest.mark.parametrize("minutes_ago,is_writing,due", [
    (2, False, True), (2, True, False), (0.5, False, False)])
def test_a_save_that_is_being_written_is_not_waited_for(
        minutes_ago, is_writing, due, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "any_rank", bool)
    monkeypatch.setattr(train, "SAVE_MINUTES", 1.0)
    monkeypatch.setattr(train, "SAVE_EVERY", 10)
    saver = types.SimpleNamespace(is_writing=lambda: is_writing, step=0)
    grid = types.SimpleNamespace(rank=0)
    monkeypatch.setattr(metrics, "WARNED", set())
    assert train.save_due(7, time.monotonic() - 60 * minutes_ago, saver, grid) == due
    warned = "than SAVE_MINUTES 1 allows, so that there are fewer" in capsys.readouterr().out
    assert warned == (minutes_ago == 2 and is_writing)
    assert train.save_due(10, time.monotonic(), saver, grid)     # SAVE_EVERY says exactly when
    warned = "than SAVE_EVERY 10 allows, so that training waits" in capsys.readouterr().out
    assert warned == is_writing
    saver.step = 15     # by time, so that the disk is not slower than SAVE_EVERY
    monkeypatch.setattr(metrics, "WARNED", set())
    assert train.save_due(20, time.monotonic(), saver, grid)
    assert "WARNING" not in capsys.readouterr().out
