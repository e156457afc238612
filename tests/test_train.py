"""train.py as its users run it: the same numbers on any ranks, resume to the bit, and errors before any waiting."""
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_close, on_ranks, write_jsonl

import convert
import parallel
import train
from model import Transformer

DEFAULTS = {name: getattr(train, name) for name in train.CONSTANTS}
SMALL = {"INIT": "weights", "MAX_LENGTH": 64, "GLOBAL_BATCH_SIZE": 4, "MAX_STEPS": 4, "DTYPE": "float32",
         "SAVE_EVERY": 0, "SAMPLE_PROMPTS": [], "LEARNING_RATE": 1e-3, "SEQUENCE_PARALLEL_SIZE": 1}

def run(settings, edit=None):
    """train.main() with these constants, in this process. edit: called first, to break something on purpose."""
    for name, value in {**DEFAULTS, **SMALL, **settings}.items():
        setattr(train, name, value)
    if edit:
        edit()
    train.main()

def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

def weights(folder):
    return [f.read_bytes() for f in sorted((folder / "hf").glob("*.safetensors"))]

def assert_same_run(actual, expected, rtol):
    assert [m["step"] for m in metrics(actual)] == [m["step"] for m in metrics(expected)]
    for a, e in zip(metrics(actual), metrics(expected)):
        for key in ("loss", "grad_norm", "target_tokens", "learning_rate"):
            assert_close(a[key], e[key], f"{key} of step {a['step']} in {actual}", rtol=rtol)

@pytest.fixture
def setup(tmp_path, hf_folder, tokenizer_files):
    """A model folder, text and chat files of very uneven rows -> function from what differs to the whole settings."""
    folder, _ = hf_folder(vocab_size=260, eos_token_id=0, bos_token_id=None)
    tokenizer_files(folder)
    rng = random.Random(0)
    word = lambda n: "".join(rng.choice("abc de\n") for _ in range(n))
    text = [{"text": word(rng.choice([1, 5, 40, 200]))} for _ in range(60)]
    chat = [{"messages": [{"role": "user", "content": word(rng.choice([1, 90]))},
                          {"role": "assistant", "content": word(rng.choice([1, 3, 30]))}]} for _ in range(40)]
    files = {"text": write_jsonl(tmp_path / "text.jsonl", text), "chat": write_jsonl(tmp_path / "chat.jsonl", chat)}

    def settings(name, data="text", **changes):
        return {"MODEL": str(folder), "DATA": files[data], "RUN_DIR": str(tmp_path / name),
                "CACHE_DIR": str(tmp_path / "cache"), **changes}
    return settings

GRID = [(2, 1, 2, 1), (2, 2, 3, 1), (4, 2, 1, 1), (4, 4, 2, 1), (4, 2, 3, 2), (8, 8, 2, 1)]

def test_text_is_trained_alike_on_any_ranks(setup, tmp_path):
    on_ranks(1, run, setup("alone"), tmp_path=tmp_path)
    assert {m["tokens"] for m in metrics(tmp_path / "alone")} == {256}
    for world, sp, zero, replicas in GRID:
        name = f"{world}-{sp}-{zero}-{replicas}"
        settings = setup(name, SEQUENCE_PARALLEL_SIZE=sp, ZERO_STAGE=zero, REPLICAS=replicas)
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
    settings = setup(packing, PACKING=packing, BATCH_SIZE=3, MAX_STEPS=-1, EPOCHS=1.0)
    on_ranks(2, run, {**settings, "SEQUENCE_PARALLEL_SIZE": 2}, tmp_path=tmp_path)
    lengths = [len(json.loads(line)["text"]) + 1 for line in open(settings["DATA"])]    # a byte a token, and eos
    assert sum(m["target_tokens"] for m in metrics(tmp_path / packing)) == sum(n - 1 for n in lengths)

def test_resume_is_exact(setup, tmp_path):
    """Stop after 3 of 7 steps, in the second epoch of three: to the bit on the same ranks, to rounding on others."""
    settings = {"MAX_STEPS": 7, "GLOBAL_BATCH_SIZE": 32}
    on_ranks(2, run, setup("whole", **settings, SAVE_EVERY=3, KEEP_CHECKPOINTS=9), tmp_path=tmp_path)
    assert metrics(tmp_path / "whole")[-1]["epoch"] > 2
    for name, world, sp, zero in (("same", 2, 1, 2), ("other", 4, 2, 3)):
        checkpoints = tmp_path / name / "checkpoints"
        shutil.copytree(tmp_path / "whole/checkpoints/step-00000003", checkpoints / "step-00000003")
        shutil.copy(tmp_path / "whole/metrics.jsonl", tmp_path / name)
        on_ranks(world, run, setup(name, **settings, SEQUENCE_PARALLEL_SIZE=sp, ZERO_STAGE=zero), tmp_path=tmp_path)
        assert [m["step"] for m in metrics(tmp_path / name)] == [1, 2, 3, 4, 5, 6, 7]
        assert_same_run(tmp_path / name, tmp_path / "whole", rtol=0 if name == "same" else 1e-6)
    assert weights(tmp_path / "same") == weights(tmp_path / "whole")

def damage(folder, how):
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
    before = metrics(tmp_path / "run")
    damage(folder / "step-00000004", how)
    (folder / "step-00000006.part").mkdir()
    (folder / "somebody-elses").mkdir()
    on_ranks(2, run, setup("run", MAX_STEPS=4, SAVE_EVERY=3), tmp_path=tmp_path)
    out = capfd.readouterr().out
    assert "WARNING" in out and "step-00000004" in out and "resumed from" in out and "step-00000002" in out
    assert [m["loss"] for m in metrics(tmp_path / "run")] == [m["loss"] for m in before]
    assert {f.name for f in folder.iterdir()} == {"step-00000003", "step-00000004", "step-00000004.damaged",
                                                  "somebody-elses"}
    damage(folder / "step-00000004", "manifest.json")
    with pytest.raises(AssertionError, match="step-00000004 is not a whole checkpoint"):
        on_ranks(2, run, setup("run", RESUME=str(folder / "step-00000004")), tmp_path=tmp_path)
    with pytest.raises(AssertionError, match="holds step-00000004, which this run from step 0 would meet again"):
        on_ranks(2, run, setup("run", RESUME="never"), tmp_path=tmp_path)

def poison_one_rank():
    """The loss of one rank's first micro-batch of step 2 is NaN."""
    accumulate, calls = parallel.accumulate, []

    def broken(model, *rest, **more):
        accumulate(model, *rest, **more)
        calls.append(1)
        if len(calls) == 3 and torch.distributed.get_rank() == 1:  # two micro-batches a step
            model.model["norm"].register_forward_hook(lambda m, i, out: out * float("nan") if len(calls) == 3 else out)
    parallel.accumulate = broken

def test_a_step_that_is_not_finite_is_skipped_by_all(setup, tmp_path):
    on_ranks(2, run, setup("run", MAX_STEPS=3), poison_one_rank, tmp_path=tmp_path)
    assert [m["skipped"] for m in metrics(tmp_path / "run")] == [False, True, False]
    constant = {"LR_SCHEDULE": "constant", "WARMUP_RATIO": 0.0}
    on_ranks(2, run, setup("one", MAX_STEPS=1, **constant), tmp_path=tmp_path)
    on_ranks(2, run, setup("two", MAX_STEPS=2, **constant), poison_one_rank, tmp_path=tmp_path)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")

def test_zero_steps_export_the_weights_untouched(setup, tmp_path):
    settings = setup("none", MAX_STEPS=0)
    on_ranks(2, run, settings, tmp_path=tmp_path)
    source, out = (convert.Transformer(convert.load_config(settings["MODEL"])) for _ in range(2))
    convert.load_weights(source, settings["MODEL"])
    convert.load_weights(out, tmp_path / "none/hf")
    for name, p in source.named_parameters():
        assert torch.equal(p, out.get_parameter(name)), name
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "none/hf" / file).read_bytes() == (Path(settings["MODEL"]) / file).read_bytes()

def test_a_checkpoint_becomes_a_folder_that_transformers_opens(setup, tmp_path):
    from transformers import AutoModelForCausalLM
    on_ranks(2, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)
    convert.main(tmp_path / "run/checkpoints/step-00000002", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf").state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)

def test_the_demo_needs_nothing_but_python(tmp_path, capfd):
    demo = {"CACHE_DIR": str(tmp_path / "cache"), "RUN_DIR": str(tmp_path / "run"), "MAX_STEPS": 6, "SAMPLE_TOKENS": 4,
            "SAMPLE_PROMPTS": ["import os"], "LEARNING_RATE": 6e-3, "WARMUP_RATIO": 0.0, "SEQUENCE_PARALLEL_SIZE": 2}
    on_ranks(2, run, demo, tmp_path=tmp_path)
    losses = [m["loss"] for m in metrics(tmp_path / "run")]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 0.5 and "import os" in capfd.readouterr().out

def test_samples_do_not_depend_on_ranks(setup, tmp_path, capfd):
    printed = []
    for world in (1, 2):
        settings = setup(f"run{world}", MAX_STEPS=1, SEQUENCE_PARALLEL_SIZE=world, SAMPLE_PROMPTS=["ab", "c"],
                         SAMPLE_TOKENS=6)
        on_ranks(world, run, settings, tmp_path=tmp_path)
        printed.append(capfd.readouterr().out.split("-" * 80)[1:])
    assert printed[0] == printed[1] and len(printed[0]) == 2

WRONG = [({"SEQUENCE_PARALLEL_SIZE": 3}, "SEQUENCE_PARALLEL_SIZE 3 does not divide 8 attention heads: use 1"),
         ({"SEQUENCE_PARALLEL_SIZE": 2}, "SEQUENCE_PARALLEL_SIZE 2 does not divide 1 processes"),
         ({"MODEL": "no/such"}, "MODEL 'no/such' has no config.json"), ({"DATA": "no-such.jsonl"}, "matches no file"),
         ({"PACKING": "tight"}, "PACKING 'tight' is unknown: use one of split, whole, none"),
         ({"GLOBAL_BATCH_SIZE": 0}, "GLOBAL_BATCH_SIZE 0 is not positive"),
         ({"ATTENTION": "fast"}, "ATTENTION 'fast' is not .*auto, .*flash_attn_4"),
         ({"ATTENTION": "flash_attn_2"}, "not to be had for torch.float32")]

@pytest.mark.parametrize("change,message", WRONG, ids=lambda v: str(v)[:30])
def test_wrong_constants_are_refused(setup, monkeypatch, change, message):
    monkeypatch.setattr(parallel, "init", lambda *_: pytest.fail("a process group was waited for"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run({**setup("run"), **change})

def test_a_batch_that_does_not_divide_is_refused(setup, monkeypatch):
    monkeypatch.setattr(parallel, "init", lambda *_: pytest.fail("a process group was waited for"))
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="GLOBAL_BATCH_SIZE 6 is not a multiple of the 8 rows in flight .*: use 8"):
        run(setup("run", GLOBAL_BATCH_SIZE=6))

BAD_LINES = [('{"text": 5}', "strings"), ('{"text": null}', "no format"), ("{", "JSONDecodeError"),
             ("[1]", "no format"), ('{"other": 1}', "no format"),
             ('{"text": "a", "messages": []}', "'text', 'messages'"),
             ('{"messages": []}', "0 of 0 assistant turns"),
             ('{"messages": [{"role": "user", "content": "a"}]}', "0 of 0 assistant turns"),
             ('{"messages": [{"role": "robot", "content": "a"}]}', "role"), ('{"text": "a', "JSONDecodeError")]

@pytest.mark.parametrize("line,message", BAD_LINES)
def test_a_bad_line_is_named(setup, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r\n\r\n' + line.encode() + b"\n")
    with pytest.raises(ValueError, match=f"bad.jsonl:3: .*{message}"):
        run(setup("run", DATA=str(path)))

def test_nothing_to_train_is_refused(setup, tmp_path):
    with pytest.raises(ValueError, match="no token to train"):
        run(setup("run", DATA=write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])))

def test_token_ids_beyond_the_vocabulary_are_refused(setup, hf_folder, tokenizer_files):
    folder, _ = hf_folder(name="short", vocab_size=100)
    tokenizer_files(folder)
    with pytest.raises(ValueError, match="beyond the vocabulary of 100"):
        run(setup("run", MODEL=str(folder)))

def test_changed_data_is_not_resumed(setup, tmp_path):
    settings = setup("run", MAX_STEPS=1)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    again = lambda data: on_ranks(1, run, {**settings, "DATA": data}, tmp_path=tmp_path)
    with pytest.raises(AssertionError, match="has another data"):
        again({settings["DATA"]: 2.0})      # seen twice as often
    with open(settings["DATA"], "a") as f:
        f.write('{"text": "more"}\n')
    with pytest.raises(AssertionError, match="has another data"):
        again(settings["DATA"])

def test_a_second_run_of_a_folder_is_refused(setup, tmp_path):
    """By the lock, not by its file: the one that a killed run left behind refuses nobody."""
    run(setup("run", MAX_STEPS=1))
    with pytest.raises(AssertionError, match=f"RUN_DIR: rank 0: ValueError: .*in use by process {os.getpid()} of"):
        on_ranks(2, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)
    train.open_run.lock.close()
    on_ranks(2, run, setup("run", MAX_STEPS=2), tmp_path=tmp_path)
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2]

def test_evaluation_does_not_depend_on_ranks(setup, tmp_path):
    """The loss of EVAL_DATA: of the untrained model that of all its targets, by hand; on a grid that of one rank."""
    settings = dict(EVAL_EVERY=2, MAX_STEPS=3, LEARNING_RATE=0.0, MIN_LEARNING_RATE=0.0)
    chat = setup("", data="chat")["DATA"]
    on_ranks(1, run, setup("alone", EVAL_DATA=chat, **settings), tmp_path=tmp_path)
    on_ranks(4, run, setup("spread", EVAL_DATA=chat, SEQUENCE_PARALLEL_SIZE=2, **settings), tmp_path=tmp_path)
    alone, spread = ([(m["step"], m["eval_loss"]) for m in metrics(tmp_path / name) if "eval_loss" in m]
                     for name in ("alone", "spread"))
    assert [step for step, _ in alone] == [2, 3]
    folder = Path(setup("")["MODEL"])
    model = Transformer(convert.load_config(folder))
    convert.load_weights(model, folder)
    rows = train.open_data(chat, folder, model.config)
    batches = [rows.batch(row, 1, 0) for row in range(rows.per_epoch)]
    loss = sum(model(b.input_ids, b.position_ids, b.cu_seqlens, b.max_seqlen, b.labels).item() for b in batches)
    loss /= sum((b.labels != -100).sum().item() for b in batches)
    for step, value in alone + spread:
        assert_close(value, loss, f"eval_loss of step {step}", rtol=1e-5)

def test_a_run_leaves_its_accounting_and_a_plot(setup, tmp_path):
    run(setup("run", MAX_STEPS=2))
    accounting = json.loads((tmp_path / "run/env.json").read_text())["accounting"]
    assert accounting["tokens"] == accounting["trained"] + accounting["masked"] + accounting["dropped"] > 0
    assert (tmp_path / "run/loss.png").read_bytes()[:4] == b"\x89PNG"

def test_out_of_memory_is_explained(setup, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(Transformer, "forward", full)
    with pytest.raises(RuntimeError, match=r"(?s)CUDA out of.*Expected was [\d.]+ GiB = .*ZERO_STAGE=3.*MAX_LENGTH"):
        run(setup("run"))

def test_overrides():
    for name, value in DEFAULTS.items():
        setattr(train, name, value)
    train.override(["MAX_LENGTH=512", "LEARNING_RATE=1", "MODEL=some/folder", "DATA=['a.jsonl', 'b.jsonl']",
                    "COMPILE=False"])
    assert (train.MAX_LENGTH, train.LEARNING_RATE, train.MODEL, train.COMPILE) == (512, 1.0, "some/folder", False)
    assert train.DATA == ["a.jsonl", "b.jsonl"] and type(train.LEARNING_RATE) is float
    for wrong, message in (("MAX_LENGHT=5", "nearest name is MAX_LENGTH"), ("MAX_LENGTH=long", "is no int: give one"),
                           ("MAX_LENGTH", "NAME=VALUE")):
        with pytest.raises(ValueError, match=message):
            train.override([wrong])

@pytest.mark.parametrize("schedule,rates", [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 0.75, 0.25, 0]),
                                            ("cosine", [0.5, 1, 0.853553, 0.146447, 0]), ("wsd", [0.5, 1, 1, 1, 0])])
def test_schedules(schedule, rates):
    for name, value in {**DEFAULTS, "LEARNING_RATE": 1.0, "MIN_LEARNING_RATE": 0.0, "WARMUP_RATIO": 0.2,
                        "LR_SCHEDULE": schedule}.items():
        setattr(train, name, value)
    assert [round(train.learning_rate(s, 10), 6) for s in (1, 2, 4, 8, 10)] == rates

CEILINGS = {"train.py": 380, "model.py": 430, "parallel.py": 400, "data.py": 480, "convert.py": 400}

def test_files_stay_small():
    root = Path(train.__file__).parent
    lines = {name: (root / name).read_text().splitlines() for name in CEILINGS}
    assert {n: len(text) for n, text in lines.items() if len(text) > CEILINGS[n]} == {}
    assert sum(map(len, lines.values())) < 2000
    assert [(n, i) for n, text in lines.items() for i, line in enumerate(text, 1) if len(line) > 120] == []
    for name, text in lines.items():
        assert name == "parallel.py" or not any("torch.distributed" in line and "import" in line for line in text), name
    local = {n: {w for line in text for w in ("train", "model", "data", "parallel", "convert")
                 if line.startswith((f"import {w}", f"from {w} import"))} for n, text in lines.items()}
    assert local == {"train.py": {"data", "convert", "model", "parallel"}, "convert.py": {"model"},
                     "model.py": {"parallel"}, "data.py": set(), "parallel.py": set()}
