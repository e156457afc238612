"""What a run shows (log, loss.png, samples), evaluation in training, and tools/evaluate.py."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from conftest import assert_close, on_ranks, tiny_config, write_jsonl
from test_train import metrics_of, run, set_constants, setup  # noqa: F401

import convert
import metrics
import train
from model import Transformer
from tools import show

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import evaluate  # noqa: E402
import tasks  # noqa: E402

# ------------------------------------------------------------------------- evaluation in training


def train_and_held_out(settings):
    """Return the texts of the documents that these settings train, and that they hold out."""
    set_constants(settings)
    folder, config, _, _ = train.plan(1)
    texts = []
    for rows in train.open_all_data(folder, config):
        documents = rows.documents(0)
        texts.append({rows.corpus.read(i, 0, 10**6).tobytes() for i in documents})
    return texts


def test_rows_are_shown_as_they_are_trained(setup, capsys):  # noqa: F811
    """Without the documents that are held out."""
    settings = setup("run", EVAL_DATA=0.3, MAX_LENGTH=64)
    set_constants(settings)
    folder, config, _, _ = train.plan(1)
    rows, _ = train.open_all_data(folder, config)
    show.main([f"{name}={value}" for name, value in settings.items()])
    assert rows.describe() in capsys.readouterr().out


def test_a_source_that_is_named_twice_has_one_name(setup):  # noqa: F811
    set_constants(setup("run", EVAL_DATA=["a.jsonl", "a.jsonl", "b.jsonl"]))
    assert train.source_names() == ["a.jsonl", "b.jsonl"]


def test_a_sample_begins_as_a_text_of_training(setup, tmp_path, capfd):  # noqa: F811
    """A tokenizer may also append eos, after which another text would begin."""
    settings = setup("run", MAX_STEPS=0, SAMPLE_PROMPTS=["hello"], SAMPLE_TOKENS=0)
    path = Path(settings["MODEL"]) / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    eos = backend.token_to_id("<|endoftext|>")
    backend.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)])
    backend.save(str(path))
    on_ranks(1, run, settings, tmp_path=tmp_path)
    assert capfd.readouterr().out.rstrip().endswith("-" * 80 + "\nhello")


def test_a_share_is_held_out_by_hash(setup, tmp_path):  # noqa: F811
    settings = setup("run", EVAL_DATA=0.3, MAX_LENGTH=512)
    trained, held_out = train_and_held_out(settings)
    everything = trained | held_out
    assert 0.15 * len(everything) < len(held_out) < 0.45 * len(everything)
    assert not trained & held_out
    folder, config, _, _ = train.plan(1)
    rows, _ = train.open_all_data(folder, config)
    assert f"{len(rows.corpus.hashes) - len(rows.documents(0))} of 60 documents are held out for " in (
        rows.describe())

    # The same ones in another order, in another format, with other rows, with keys in any order.
    lines = Path(settings["DATA"]).read_text().splitlines()
    other = [{"other": None, **json.loads(line)} for line in reversed(lines)]
    path = tmp_path / "other.json"
    path.write_text(json.dumps([*other, {"text": "one more"}]))
    changes = {"DATA": str(path), "SEED": 5, "PACKING": "whole"}
    trained_again, held_out_again = train_and_held_out({**settings, **changes})
    assert held_out <= held_out_again
    assert trained <= trained_again
    # A smaller share is a part of a larger one.
    assert train_and_held_out({**settings, "EVAL_DATA": 0.1})[1] <= held_out


def test_a_share_is_never_trained(setup, tmp_path):  # noqa: F811
    """All targets are trained once an epoch or evaluated, and a changed share is not resumed."""
    whole = setup("whole", MAX_STEPS=-1, MAX_LENGTH=512)
    on_ranks(1, run, whole, tmp_path=tmp_path)
    part = setup("part", MAX_STEPS=-1, MAX_LENGTH=512, EVAL_DATA=0.3)
    on_ranks(1, run, part, tmp_path=tmp_path)
    set_constants(part)
    folder, config, _, _ = train.plan(1)
    _, held_out = train.open_all_data(folder, config)
    n_targets = held_out.accounting()["trained"]

    def trained(name):
        return sum(line.get("target_tokens", 0) for line in metrics_of(tmp_path / name))

    assert n_targets > 0
    assert trained("part") + n_targets == trained("whole")
    with pytest.raises(AssertionError, match="The data of .* differs"):
        on_ranks(1, run, {**part, "EVAL_DATA": 0.4}, tmp_path=tmp_path)


@pytest.mark.parametrize("change,message", [
    ({"EVAL_DATA": 1}, "EVAL_DATA 1 is not a share .*: use a number between 0 and 1"),
    ({"EVAL_DATA": 1e-9}, "EVAL_DATA 1e-09 holds out no token to train of 60 documents: use"),
    ({"EVAL_DATA": 0.1, "DATA": "synthetic"}, "EVAL_DATA 0.1 is a share of the documents in files"),
    ({"WANDB": "project"}, "WANDB 'project' needs the package wandb, .*: pip install wandb"),
])
def test_wrong_evaluations_are_refused(setup, monkeypatch, change, message):  # noqa: F811
    monkeypatch.setattr(train.importlib.util, "find_spec", find_nothing)
    with pytest.raises(ValueError, match=message):
        run(setup("run", **change))


def find_nothing(name):
    return None


def test_evaluation_by_position_and_source(setup, tmp_path, monkeypatch):  # noqa: F811
    """Without a step of training, on any ranks: equal to one forward for each row."""
    chat = setup("", data="chat")["DATA"]
    text = setup("")["DATA"]
    settings = {"EVAL_DATA": [chat, text], "MAX_STEPS": 0, "LOSS_WEIGHT": "square"}
    monkeypatch.setattr(train, "position_edges", edges_of_tests)
    on_ranks(1, run, setup("alone", **settings), tmp_path=tmp_path)
    on_ranks(4, run, setup("spread", SEQUENCE_PARALLEL_SIZE=2, **settings), tmp_path=tmp_path)

    set_constants(setup("", **settings), {"MAX_LENGTH": 64, "DTYPE": "float32"})
    folder = Path(train.MODEL)
    model = Transformer(convert.load_config(folder))
    convert.load_weights(model, folder)
    rows = train.open_data([chat, text], folder, model.config)
    bands = train.band_names([16])
    n_chats = len(Path(chat).read_text().splitlines())
    sums = {}
    for row in range(rows.per_epoch):
        batch = rows.batch(row, 1, 0)
        logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        documents = np.repeat(rows.find(row)["document"], rows.find(row)["length"])
        for i, document in enumerate(documents):
            band = bands[int(batch.position_ids[i] >= 16)]
            for name in ("all", band, chat if document < n_chats else text):
                part = sums.setdefault(name, [0.0, 0.0])
                part[0] += batch.weights[i].item() * losses[i].item()
                part[1] += batch.weights[i].item()

    expected = {name: loss / weight for name, (loss, weight) in sums.items()}
    for name in ("alone", "spread"):
        [line] = metrics_of(tmp_path / name)
        assert line["step"] == 0
        actual = {"all": line["eval_loss"], **line["eval_by_position"], **line["eval_by_source"]}
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_close(actual[key], expected[key], f"{key} of {name}", rtol=1e-5)


def edges_of_tests(length):
    return [16]


def test_positions_are_doubled():
    assert train.band_names(train.position_edges(8192)) == ["0-1k", "1k-2k", "2k-4k", "4k-8k"]
    assert train.band_names(train.position_edges(1000)) == ["0-1k"]


# --------------------------------------------------------------------------------- what a run shows


def test_the_line_of_a_step():
    line = {"step": 120, "epoch": 0.5, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.0,
            "seconds": 1.0, "tokens_per_second_per_gpu": 1000.0, "tokens_seen": 123_456,
            "elapsed_seconds": 61.2, "seconds_left": 3600.0, "skipped": False, "mfu": None}
    assert metrics.format_line(line, 2000) == (
        "step   120/2,000  epoch  0.500  loss   2.0000  norm    1.000  lr 0.00e+00     1.00 s  "
        "    1,000 tok/s/rank  123,456 tokens  elapsed 0:01:01  left 1:00:00")


class Recorder:
    """Stands for the writer of TensorBoard and the run of Weights & Biases."""

    def __init__(self):
        self.numbers = []
        self.closed = False

    def add_scalar(self, name, value, step):
        self.numbers.append((step, name, value))

    def log(self, numbers, step):
        for name, value in numbers.items():
            self.numbers.append((step, name, value))

    def close(self):
        self.closed = True

    finish = close


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The Log of a run of 10 steps, of which 2 are done, with recorders."""
    write_jsonl(tmp_path / "metrics.jsonl", [step_line(2, tokens=100)])
    recorders = {"tensorboard": Recorder(), "wandb": Recorder()}

    def init(project, **settings):
        assert project == "project"
        return recorders["wandb"]

    def open_tensorboard(run, steps_done):
        assert (run, steps_done) == (tmp_path, 2)
        return recorders["tensorboard"]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(metrics, "open_tensorboard", open_tensorboard)
    return metrics.Log(tmp_path, 10, 2, "project", {}), recorders


def step_line(step, **changes):
    return {"step": step, "loss": 4.0, "grad_norm": 1.0, "learning_rate": 0.0, "tokens": 10,
            "tokens_per_second_per_gpu": 1.0, "skipped": False, **changes}


def test_the_time_left_leaves_out_the_first_steps(log, tmp_path, monkeypatch):
    log, _ = log
    clock = log.began
    monkeypatch.setattr(train.time, "monotonic", lambda: clock)
    for step, seconds in ((3, 100), (4, 50), (5, 50), (6, 2), (7, 4)):
        clock += seconds
        log.step(step_line(step))
    lines = metrics_of(tmp_path)[1:]
    assert [line["seconds_left"] for line in lines] == [None, None, None, 2 * 4, 3 * 3]
    assert [line["elapsed_seconds"] for line in lines] == [100, 150, 200, 202, 206]
    assert [line["tokens_seen"] for line in lines] == [110, 120, 130, 140, 150]


def test_spikes_are_marked(log, tmp_path):
    log, _ = log
    for step in range(3, 60):
        noise = 0.1 * (-1) ** step
        spike = step in (5, 50)  # at step 5 the spread is not known yet
        log.step(step_line(step, loss=3 + noise if not spike else 5.0))
    assert [line["step"] for line in metrics_of(tmp_path)[1:] if line["spike"]] == [50]


def test_equal_losses_make_no_small_difference_a_spike(log, tmp_path):
    log, _ = log
    for step in range(3, 60):
        loss = {50: 3.01, 55: 3.1}.get(step, 3.0)
        log.step(step_line(step, loss=loss))
    assert [line["step"] for line in metrics_of(tmp_path)[1:] if line["spike"]] == [55]


def test_steps_that_ran_out_of_cached_memory_are_marked(log, capsys, monkeypatch):
    """On a pretended GPU whose allocator had to begin again in the second of three steps."""
    log, _ = log
    retries = iter([0, 2, 0])
    monkeypatch.setattr(train, "peak_flops", lambda grid: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**31)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**32))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": next(retries)})
    monkeypatch.setattr(torch.cuda, "reset_accumulated_memory_stats", lambda: None)
    grid = SimpleNamespace(device=torch.device("cuda"), world=1, sp=1)
    sums = train.StepSums(1, 1, 10, 10, 0)
    for step in (3, 4, 5):
        entries = train.speed_and_memory(tiny_config(), sums, 1, grid)
        assert (entries["reserved_memory_gib"], entries["used_memory_gib"]) == (2, 3)
        log.step(step_line(step, **entries))
    lines = capsys.readouterr().out.splitlines()
    assert ["MEMORY FULL" in line for line in lines] == [False, True, False]


def test_metrics_go_to_all_recorders(log, tmp_path):
    log, recorders = log
    log.step(step_line(3, mfu=None))
    log.write({"step": 3, "eval_loss": 2.0, "eval_by_position": {"0-1k": 2.0},
               "eval_by_source": {"a.jsonl": 1.5}})
    log.step(step_line(4, skipped=True, loss=math.nan))
    log.close()
    for recorder in recorders.values():
        assert recorder.closed
        names = {name for step, name, value in recorder.numbers}
        assert {"loss", "learning_rate", "tokens_seen"} <= names
        assert not {"step", "mfu"} & names
        assert (3, "eval_by_source/a.jsonl", 1.5) in recorder.numbers
        assert (4, "skipped", 1.0) in recorder.numbers
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_loss_png_is_drawn_now_and_then(log, tmp_path, monkeypatch):
    log, _ = log
    assert not log.draw_if_due()
    assert not (tmp_path / "loss.png").exists()
    monkeypatch.setattr(metrics, "PLOT_SECONDS", -1)
    assert log.draw_if_due()
    assert (tmp_path / "loss.png").exists()


def test_sources_of_the_plot_are_told_apart():
    assert metrics.last_parts("/data/code/*.jsonl") == "code/*.jsonl"
    assert metrics.last_parts("books.jsonl") == "books.jsonl"


def test_the_environment_is_recorded(setup, tmp_path):  # noqa: F811
    on_ranks(2, run, setup("run", MAX_STEPS=0), tmp_path=tmp_path)
    environment = json.loads((tmp_path / "run/env.json").read_text())
    assert environment["world"] == 2
    assert environment["packages"]["numpy"] == np.__version__
    assert environment["gpus_of_first_host"] == []


def test_a_changed_repository_is_recorded(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "metrics.py"))
    (tmp_path / "metrics.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "metrics.py")
    git("commit", "-qm", "first")
    clean = metrics.describe_environment()["git"]
    assert len(clean) == 40
    (tmp_path / "metrics.py").write_text("a = 2\n")
    assert metrics.describe_environment()["git"] == f"{clean}-dirty"


def test_samples_of_chat_data_use_the_template(setup, tmp_path, capfd):  # noqa: F811
    settings = setup("run", "chat", MAX_STEPS=0, SAMPLE_PROMPTS=["hello"], SAMPLE_TOKENS=3)
    on_ranks(1, run, settings, tmp_path=tmp_path)
    printed = capfd.readouterr().out
    assert "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n" in printed


def test_an_answer_ends_at_the_end_of_its_turn(tmp_path, tokenizer_files):
    tokenizer = tokenizer_files(tmp_path)
    text, end = train.chat_prompt(tokenizer, "hello")
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert end == "<|im_end|>"


def test_an_answer_ends_at_the_first_of_two_end_tokens(tmp_path, tokenizer_files):
    tokenizer = tokenizer_files(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}<|im_end|>", "{{ m.content }}<|im_end|>{{ eos_token }}")
    _, end = train.chat_prompt(tokenizer, "hello")
    assert end == "<|im_end|>"


def be_late():
    train.SAMPLE_SECONDS = -1


def test_samples_end_in_time(setup, tmp_path, capfd):  # noqa: F811
    settings = setup("run", MAX_STEPS=0, SAMPLE_PROMPTS=["hello"], SAMPLE_TOKENS=10**9)
    on_ranks(2, run, settings, be_late, tmp_path=tmp_path)
    assert capfd.readouterr().out.rstrip().endswith("-" * 80 + "\nhello")


# -------------------------------------------------------------------------------- tools/evaluate.py


@pytest.fixture
def folder(hf_folder, tokenizer_files):
    """A tiny model's folder with a byte-level tokenizer, and transformers' model of it.

    The constants of train.py, of which evaluate.py reads some, are their defaults.
    """
    set_constants()
    folder, reference = hf_folder(vocab_size=260, eos_token_id=0, bos_token_id=None,
                                  max_position_embeddings=2048)
    tokenizer_files(folder)
    return folder, reference


def score_on_one_rank(folder, rows_file):
    """Score the rows of a file in a process group, and write their scores beside it."""
    train.complete_constants()
    grid = evaluate.parallel.init(1, 1)
    model = evaluate.load_model(folder, grid)
    rows = [evaluate.text_row(ids) for ids in json.loads(rows_file.read_text())]
    scores = evaluate.score_rows(model, rows, grid, "rows")
    values = [[score.losses.tolist(), score.is_largest.tolist()] for score in scores]
    rows_file.with_suffix(".scores").write_text(json.dumps(values))


def test_scores_equal_those_of_transformers(folder, tmp_path):
    """Losses are those of its forward. An answer is right if its greedy generate writes it."""
    folder, reference = folder
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(260, (n,), generator=generator) for n in (3, 20, 50)]
    rows = []
    for prompt in prompts:
        written = reference.generate(
            prompt[None], max_new_tokens=5, do_sample=False, eos_token_id=None)[0]
        wrong = written.clone()
        wrong[-1] = (wrong[-1] + 1) % 260
        rows += [written.tolist(), wrong.tolist()]
    rows_file = tmp_path / "rows.json"
    rows_file.write_text(json.dumps(rows))
    on_ranks(1, score_on_one_rank, folder, rows_file, tmp_path=tmp_path)

    scores = json.loads(rows_file.with_suffix(".scores").read_text())
    for i, (ids, (losses, is_largest)) in enumerate(zip(rows, scores)):
        assert is_largest[-5:] == [True] * 4 + [i % 2 == 0]
        ids = torch.tensor(ids)
        logits = reference(ids[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        assert_close(losses[1:], expected, f"losses of row {i}", atol=1e-5)
        assert is_largest[1:] == (logits.argmax(-1) == ids[1:]).tolist()


def run_evaluate(folder, sp, settings):
    """main() of tools/evaluate.py with windows that suit rows of 2,000 tokens."""
    train.SEQUENCE_PARALLEL_SIZE = sp
    evaluate.SHORT_CONTEXT = 128
    evaluate.STRIDE = 32
    evaluate.MIN_GAIN = 0.0
    evaluate.MAX_LOSS = 100.0
    evaluate.main([str(folder)], evaluate.Options(**settings))


def numbers(value, name=""):
    """Yield (name, number) for all numbers in nested lists and dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{name}/{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from numbers(item, f"{name}/{i}")
    elif isinstance(value, (int, float)):
        yield name, value


def test_evaluation_is_the_same_on_any_ranks(folder, tmp_path):
    """On one rank, on two that share rows, and on two that take different rows."""
    folder, _ = folder
    results = {}
    for name, world, sp in (("alone", 1, 1), ("shared", 2, 2), ("apart", 2, 1)):
        settings = {"lengths": "1600", "depths": 2, "samples": 1, "documents": 3,
                    "out": str(tmp_path / name)}
        on_ranks(world, run_evaluate, folder, sp, settings, tmp_path=tmp_path)
        written = json.loads((tmp_path / name / "evaluation.json").read_text())
        results[name] = dict(numbers(written["folders"]))
        assert (tmp_path / name / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    assert len(results["alone"]) > 50
    for name in ("shared", "apart"):
        assert results[name].keys() == results["alone"].keys()
        for key, expected in results["alone"].items():
            what = f"{key}, {name}"
            assert_close(results[name][key], expected, what, atol=1e-4, rtol=1e-4)


def test_losses_with_a_short_context(folder, tmp_path, monkeypatch):
    """Each token after the first 8 is scored once, with 8 to 11 tokens before it."""
    monkeypatch.setattr(evaluate, "SHORT_CONTEXT", 8)
    monkeypatch.setattr(evaluate, "STRIDE", 4)
    documents = [np.arange(30), np.arange(30) + 100]
    seen = []

    def score_rows(model, rows, grid, description):
        # The loss of a token tells its id and how many tokens of its text are before it.
        scores = []
        for row in rows:
            before = np.concatenate([np.arange(length) for length in row.lengths])
            seen.extend(row.lengths)
            scores.append(evaluate.Score(row.ids + before / 100, None))
        return scores

    monkeypatch.setattr(evaluate, "score_rows", score_rows)
    losses = evaluate.short_context_losses(None, documents, None)
    assert max(seen) == 12
    assert np.isnan(losses[:, :8]).all()
    for document, of_document in zip(documents, losses):
        assert of_document[8:].astype(int).tolist() == document[8:].tolist()
        before = (of_document[8:] - document[8:]) * 100
        assert set(before.round().astype(int)) == {8, 9, 10, 11}


def test_key_tokens():
    losses = np.array([[1.0, 1.0, 3.0, 1.0]])
    short_losses = np.array([[3.5, 2.5, 9.0, np.nan]])
    assert evaluate.key_tokens(losses, short_losses).tolist() == [[True, False, False, False]]


def test_loss_by_position():
    losses = np.concatenate([[0.0], np.full(1023, 1.0), np.full(1024, 2.0), np.full(952, 3.0)])
    losses = np.stack([losses, 3 * losses])
    assert evaluate.loss_by_position(losses) == {"0-1k": 2.0, "1k-2k": 4.0, "2k-4k": 6.0}


def test_what_has_no_longppl_says_why():
    summary = {"scores": [], "evidence": {"0-1k": 1.25}, "loss_by_position": {"0-1k": 2.0}}
    assert evaluate.describe("a", summary) == (
        "a\n  gain of an answer from its facts, in nats, by their distance  0-1k 1.25\n  loss  0-1k 2.0000\n"
        "  LongPPL: needs a length of LENGTHS above 4,096 tokens")
    summary.update(longppl=None, key_tokens=0, evidence={})
    assert evaluate.describe("a", summary) == (
        "a\n  loss  0-1k 2.0000\n  LongPPL: there are no key tokens")
    summary.update(longppl=1.5, key_tokens=1000)
    assert evaluate.describe("a", summary).endswith("  LongPPL 1.500 over 1,000 key tokens")


def test_longppl_is_over_the_key_tokens_of_the_last_folder():
    def result(losses, document):
        return {"questions": [], "documents": np.array([document]), "losses": np.array([losses]),
                "short_losses": np.array([[np.nan, 5.0, 5.0, 0.5]])}

    before = result([9.0, 4.0, 6.0, 0.5], [1, 2, 3, 4])
    after = result([9.0, 1.0, 1.0, 0.5], [1, 2, 3, 4])
    other_tokens = result([9.0, 1.0, 5.0, 0.5], [1, 2, 3, 5])
    summaries = evaluate.summarize({"before": before, "other": other_tokens, "after": after})
    assert summaries["before"]["longppl"] == pytest.approx(math.exp(5))
    assert summaries["before"]["key_tokens"] == 2
    assert summaries["before"]["own_key_tokens"] == 0
    assert summaries["after"]["longppl"] == pytest.approx(math.exp(1))
    # The tokens of another tokenizer are judged by the folder's own losses.
    assert summaries["other"]["key_tokens"] == 1


def copying_scores(reach):
    """Return a stand-in for score_rows: a model that copies from its last `reach` tokens.

    It writes what followed the last occurrence of the 10 tokens before. Its probability is 0.9 for
    that token, or 0.01 for any token where there was no such occurrence.
    """
    def score_rows(model, rows, grid, description):
        scores = []
        for row in rows:
            ids = row.ids.tolist()
            last = {}
            losses = np.zeros(len(ids), np.float32)
            is_largest = np.zeros(len(ids), bool)
            for i in range(10, len(ids)):
                context = tuple(ids[i - 10:i])
                found = last.get(context, -10**9)
                near = found >= i - reach
                is_largest[i] = near and ids[found] == ids[i]
                losses[i] = -math.log(0.9 if is_largest[i] else 0.01)
                last[context] = i
            scores.append(evaluate.Score(losses, is_largest))
        return scores
    return score_rows


def test_a_model_that_uses_its_context_scores_high(folder, monkeypatch):
    from transformers import AutoTokenizer
    folder, _ = folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = evaluate.Options(lengths="4k", depths=3, samples=2, tasks="needle")
    scores = {}
    for reach in (4096, 1024):
        monkeypatch.setattr(evaluate, "score_rows", copying_scores(reach))
        results = evaluate.measure_retrieval(None, tokenizer, None, options)
        scores[reach] = evaluate.mean_by(results, ("depth",), "correct")
        gains = evaluate.gain_by_distance(results)
        assert gains["0-1k"] > 20
        assert (gains["2k-4k"] > 20) == (reach == 4096)
    assert scores[4096] == {(0.0,): 1.0, (0.5,): 1.0, (1.0,): 1.0}
    assert scores[1024] == {(0.0,): 0.0, (0.5,): 0.0, (1.0,): 1.0}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_tasks(task, tmp_path, tokenizer_files):
    tokenizer = tokenizer_files(tmp_path)
    depths = [0.0, 0.5, 1.0]
    example = tasks.make_example(task, 3000, depths, tokenizer, 0, 0)
    assert 2850 < len(example.ids) <= 3000
    assert example == tasks.make_example(task, 3000, depths, tokenizer, 0, 0)
    assert example.ids != tasks.make_example(task, 3000, depths, tokenizer, 0, 1).ids

    text = tokenizer.decode(example.ids)
    ablated = tasks.without_evidence(example, tokenizer, 0)
    assert len(ablated.ids) == len(example.ids)
    body = text.partition("Questions about")[0]
    ablated_body = tokenizer.decode(ablated.ids).partition("Questions about")[0]
    if task == "words":
        [question] = example.questions
        answer = tokenizer.decode(example.ids[question.start:question.end]).strip()
        words = body.split()
        assert words.count(answer) == max(words.count(word) for word in set(words))
        return

    assert sorted(question.depth for question in example.questions) == depths
    for question in example.questions:
        answer = tokenizer.decode(example.ids[question.start:question.end])
        assert answer[0] == " "
        assert 100_000 <= int(answer) <= 999_999
        facts = [tokenizer.decode(example.ids[start:end]) for start, end in question.evidence]
        assert f"{answer}." in facts[0]
        assert len(facts) == (1 + tasks.HOPS if task == "variables" else 1)
        assert answer in body
        assert answer not in ablated_body
        assert abs(question.evidence[0][0] / len(body) - question.depth) < 0.3


def test_documents_for_training(tmp_path, tokenizer_files):
    tokenizer = tokenizer_files(tmp_path)
    path = tmp_path / "documents.jsonl"
    tasks.write_documents(tmp_path, path, 3000, 4, seed=1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    assert len(set(texts)) == 4
    for text, row in zip(texts, rows):
        assert 2800 < len(row["input_ids"]) <= 3000
        assert "Questions about the text above" in text
        # The answers alone are targets: of the first three tasks five numbers, and then a word.
        targets = [token for token in row["labels"] if token != -100]
        answers = re.findall(r"(?: is| list is) (\w+)\.\n", text.split("text above")[1])
        assert "".join(tokenizer.decode(targets).split()) == "".join(answers)
        assert len(answers) in (1, 5)


def test_documents_that_are_too_short_are_refused(folder, tmp_path, monkeypatch):
    from transformers import AutoTokenizer
    folder, _ = folder
    monkeypatch.setattr(train, "CACHE_DIR", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": "a" * n} for n in (10, 600, 700)])
    monkeypatch.setattr(train, "DATA", path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = evaluate.Options()
    lengths = [len(ids) for ids in evaluate.read_documents(folder, tokenizer, 600, options)]
    assert lengths == [600, 600]
    with pytest.raises(ValueError, match="no document of DATA .* has 900 tokens, the longest has"):
        evaluate.read_documents(folder, tokenizer, 900, options)


def test_data_is_read_as_in_training(folder, tmp_path):
    """With the same constants. A row that cannot be used is skipped."""
    folder, _ = folder
    rows = [{"q": "a" * n, "a": "b", "text": "c"} for n in (600, 800)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"q": 5, "a": "b"}])
    folders, options = evaluate.parse_arguments([
        str(folder), f"DATA={path}", f"CACHE_DIR={tmp_path / 'cache'}", f"OUT={tmp_path / 'out'}",
        "FORMAT=instruction", "COLUMNS={'instruction': 'q', 'output': 'a'}", "BAD_ROWS=0.4",
        "LENGTHS=580", "TASKS=words"])
    _, texts = evaluate.prepare(folders, options)
    tokenizer, documents = texts[str(folder)]
    assert [len(ids) for ids in documents] == [580, 580]
    assert tokenizer.decode(documents[0]).startswith("<|im_start|>user\naaa")


def test_arguments():
    set_constants()
    folders, options = evaluate.parse_arguments(
        ["a", "b", "LENGTHS=4k,1M,100", "SAMPLES=2", "SEED=3"])
    assert folders == ["a", "b"]
    assert options.samples == 2
    assert train.SEED == 3
    assert evaluate.parse_lengths(options.lengths) == [4096, 2**20, 100]
    with pytest.raises(ValueError, match="LENGTH is not an option: use one of LENGTHS, DEPTHS"):
        evaluate.parse_arguments(["a", "LENGTH=4k"])
    with pytest.raises(ValueError, match="no FOLDER is given: name the Hugging Face folders"):
        evaluate.parse_arguments(["LENGTHS=4k"])


@pytest.mark.parametrize("argument,message", [
    ("MAX_LENGTH=4096", "MAX_LENGTH is not an option"),  # of train.py, but without a use here
    ("LENGTHS=abc", "LENGTHS 'abc' are not numbers of tokens: use values like 4096 or 4k,32k,1M"),
    ("LENGTHS=4k,", "LENGTHS '4k,' are not numbers of tokens"),
    ("LENGTHS=0", "LENGTHS '0' are not numbers of tokens"),
    ("LENGTHS=64,2k", "LENGTHS has 64: the questions alone of the task 'needle' need more tokens"),
    ("DATA=synthetic", "DATA .synthetic. is random tokens, which tell nothing of a model"),
    ("DEPTHS=0", "DEPTHS '0' is out of range: use a number from 1 to 12"),
    ("DEPTHS=13", "DEPTHS '13' is out of range"),
    ("SAMPLES=-1", "SAMPLES '-1' is out of range: use a number from 1"),
    ("DOCUMENTS=few", "DOCUMENTS 'few' is out of range: use a number from 0"),
    ("TASKS=needle,foo", "TASKS 'needle,foo' are not tasks: use some of needle,keys"),
    ("SEQUENCE_PARALLEL_SIZE=3", "SEQUENCE_PARALLEL_SIZE 3 does not divide 8 attention heads"),
    ("SEQUENCE_PARALLEL_SIZE=-1", "SEQUENCE_PARALLEL_SIZE -1 is out of range"),
    ("DTYPE=int3", "DTYPE 'int3' is unknown: use one of auto, bfloat16, float32"),
    ("ATTENTION=flash", "ATTENTION 'flash' is not known: use auto"),
    ("FORMAT=csv", "FORMAT 'csv' is unknown"),
    ("DATA=missing.jsonl", "DATA 'missing.jsonl' does not exist"),
    ("DATA=short.jsonl", "no document of DATA short.jsonl has 2048 tokens, the longest has 6: use"),
    ("OUT=short.jsonl", "OUT short.jsonl is not a folder that this user can write"),
])
def test_wrong_arguments_are_refused_first(folder, tmp_path, monkeypatch, argument, message):
    """Before processes wait for each other, and before a model is loaded."""
    folder, _ = folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.parallel, "init", None)
    write_jsonl(tmp_path / "short.jsonl", [{"text": "short"}])
    with pytest.raises(ValueError, match=message):
        evaluate.main(*evaluate.parse_arguments([str(folder), "LENGTHS=2k", argument]))


@pytest.mark.parametrize("arguments,message", [
    (["evaluate.py", "."], "FileNotFoundError: MODEL '.' has no config.json: give the path"),
    (["show.py", "SHOW=a"], "SHOW=a are not numbers of rows: use values like 0 or 0,5."),
    (["check.py", "missing"], "FileNotFoundError: MODEL 'missing' has no config.json: give the"),
    (["plan.py", "GPU=V100"], "GPU 'V100' is unknown: use one of A100-40"),
    (["../convert.py", "missing", "out"], "CHECKPOINT 'missing' is no folder: name one such as"),
])
def test_an_error_of_a_tool_is_one_line(tmp_path, arguments, message):
    tool, *rest = arguments
    environment = {**os.environ, "DEBUG": "0", "OMP_NUM_THREADS": "1"}
    path = Path(evaluate.__file__).parent / tool
    finished = subprocess.run([sys.executable, path, *rest], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.startswith(message)
    assert finished.stderr.count("\n") == 1


def test_an_export_has_the_name_of_its_run(tmp_path):
    assert evaluate.short_name(tmp_path / "extended" / "hf") == "extended"
    assert evaluate.short_name("models/llama/") == "llama"
