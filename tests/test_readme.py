"""README.md is true: its commands run on tiny models and files of the same names, with numbers that
are smaller; its diffs are applied to a copy of the code and run; its tables and messages are those
of the code."""
import ast
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close, on_ranks, randomize, row, tiny_config, write_jsonl
from torch.distributed.run import get_args_parser

import convert
import train
from bench import report
from tools import readme, show

ROOT = Path(train.__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import evaluate  # noqa: E402

README = (ROOT / "README.md").read_text()


def blocks(language):
    """The blocks of code in README.md in this language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(block):
    """The commands of a block that run train.py or a tool on a model, as lists of words.

    What Slurm starts as several tasks on each host becomes a command of torchrun.
    """
    tasks = re.search("--nodes=([0-9]+) --ntasks-per-node=([0-9]+)", block)
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["srun", "python"]:
            nodes, per_node = tasks.groups()
            words[:2] = ["torchrun", "--nnodes", nodes, "--nproc_per_node", per_node]
        elif words[:1] == ["srun"]:
            nodes, _ = tasks.groups()
            words = [word.replace("$SLURM_JOB_NUM_NODES", nodes) for word in words[1:]]
        if "MODEL=" in line or "tools/evaluate.py" in line:
            found.append(words)
    return found


def section(title):
    """The text between a heading of README.md and the next one."""
    _, _, rest = README.partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0]


def table_cells(text):
    """The rows of the first table in a text without its heading, as lists of cells."""
    table = re.search(r"^\|.*?\n(?!\|)", text, re.DOTALL | re.MULTILINE)[0]
    rows = []
    for line in table.splitlines()[2:]:
        cells = line.strip("|").split("|")
        rows.append([cell.strip() for cell in cells])
    return rows


# ---------------------------------------------------------------------------------------- recipes

SCALE = 256  # lengths are divided by it: 8k becomes 32 tokens, and 1M becomes 4096
RECIPES = [block for block in blocks("bash") if commands(block)]


def smaller(argument):
    """NAME=VALUE of a recipe with a value for tiny models and two ranks a host."""
    name, _, value = argument.partition("=")
    fixed = {"GLOBAL_BATCH_SIZE": 4, "EVAL_DATA": 0.2, "LENGTHS": "512"}
    if name in fixed:
        value = fixed[name]
    elif value.isdigit() and int(value) >= 1024:
        value = int(value) // SCALE
    return f"{name}={value}"


@pytest.fixture
def folder(tmp_path, hf_folder, tokenizer_files):
    """A folder with the models and the data that the recipes name."""
    contexts = {"Llama-3.1-8B": 131072, "Llama-3-8B": 8192, "Qwen2.5-7B-Instruct": 32768,
                "SmolLM2-135M": 8192}
    for name, positions in contexts.items():
        model_type = "qwen2" if name.startswith("Qwen") else "llama"
        model, _ = hf_folder(model_type, f"models/{name}", vocab_size=260, eos_token_id=0,
                             bos_token_id=None, max_position_embeddings=positions // SCALE)
        tokenizer_files(model)

    # No two are the same, since a share of them is held out by their contents.
    texts = [{"text": "abc de\n" * 5 * i} for i in range(1, 41)]
    chats = []
    for i in range(1, 21):
        question = {"role": "user", "content": "ab " * i}
        answer = {"role": "assistant", "content": "cd " * (i % 9 + 1)}
        chats.append({"messages": [question, answer]})
    for name in ("books", "long"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", texts)
    write_jsonl(tmp_path / "chat.jsonl", chats)
    return tmp_path


def restore_defaults():
    """Set the constants of train.py to those of its file, which another test may have changed."""
    for name, value in train.DEFAULTS.items():
        setattr(train, name, value)
    train.SET_BY_HAND.clear()


def run_training(home, arguments):
    os.chdir(home)
    restore_defaults()
    train.override(arguments)
    train.main()


def run_show(home, arguments):
    os.chdir(home)
    restore_defaults()
    show.main(arguments)


def run_evaluation(home, arguments):
    os.chdir(home)
    restore_defaults()
    evaluate.main(*evaluate.parse_arguments(arguments))


def run_name(block):
    name = re.search("RUN_DIR=([^ ]+)", block)
    return name[1] if name else "evaluation"


@pytest.mark.parametrize("block", RECIPES, ids=run_name)
def test_recipes(folder, block, capfd):
    for words in commands(block):
        if words[0] == "python":
            arguments = [smaller(argument) for argument in words[2:]]
            on_ranks(1, run_show, folder, arguments, tmp_path=folder)
            assert "\033[32mcd" in capfd.readouterr().out, "trained tokens are not green"
            continue

        assert words[0] == "torchrun"
        options = get_args_parser().parse_args(words[1:])
        ranks = 2 * int(options.nnodes.partition(":")[0])
        if options.training_script == "tools/evaluate.py":
            evaluate_folders(folder, ranks, options.training_script_args)
            continue
        assert options.training_script == "train.py"
        if "srun" not in block:     # for a micro-batch and a save
            assert options.shutdown_timeout >= 600
        arguments = [smaller(argument) for argument in options.training_script_args]
        on_ranks(ranks, run_training, folder, [*arguments, *SHORT], tmp_path=folder)
        check_run(folder, dict(argument.split("=", 1) for argument in arguments))


SHORT = ["MAX_STEPS=2", "DTYPE=float32"]


def evaluate_folders(home, ranks, arguments):
    """Run tools/evaluate.py on folders of which the second is like the first."""
    folders = [argument for argument in arguments if "=" not in argument]
    for trained in folders[1:]:
        shutil.copytree(home / folders[0], home / trained)
    short = ["DEPTHS=2", "SAMPLES=1", "DOCUMENTS=1", "TASKS=needle"]
    arguments = [smaller(argument) if "=" in argument else argument for argument in arguments]
    on_ranks(ranks, run_evaluation, home, [*arguments, *short], tmp_path=home)
    results = json.loads((home / "evaluation" / "evaluation.json").read_text())
    assert list(results["folders"]) == folders
    assert (home / "evaluation" / "evaluation.png").exists()


def check_run(folder, constants):
    """The run has done its steps, and its exported model has rows of MAX_LENGTH in its context."""
    run = folder / constants["RUN_DIR"]
    text = (run / "metrics.jsonl").read_text()
    losses = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    config = convert.load_config(run / "hf")
    assert config.max_position_embeddings >= int(constants["MAX_LENGTH"])
    if constants["MODEL"] == "runs/32k/hf":
        assert config.rope_scaling["factor"] == config.max_position_embeddings / (8192 // SCALE)


def test_the_batch_script_starts_torchrun_on_the_first_host(tmp_path):
    [script] = [block for block in RECIPES if "srun torchrun" in block]
    for name, code in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo host1; echo host2"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True,
                            env={"PATH": path, "SLURM_JOB_NODELIST": "host[1-2]",
                                 "SLURM_JOB_NUM_NODES": "2"}, check=True)
    words = result.stdout.splitlines()
    options = get_args_parser().parse_args(words[1:])
    assert options.rdzv_endpoint == "host1:29500"
    assert options.nnodes == "2"
    # torchrun has to be done before Slurm ends the job, which it asks to stop some time before.
    assert options.shutdown_timeout < int(re.search("--signal=TERM@([0-9]+)", script)[1])


# ------------------------------------------------------------------------------------------ diffs


@pytest.fixture
def apply(tmp_path):
    """Return a function that applies a diff of README.md to a copy of the code, whose folder it returns."""

    def write(number):
        copy = tmp_path / "copy"
        shutil.copytree(ROOT, copy, ignore=lambda _, names: {*names} - CODE)
        for options in (["--check"], []):
            subprocess.run(["git", "apply", *options, "-"], input=blocks("diff")[number], text=True,
                           cwd=copy, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
                           check=True)
        return copy
    return write


CODE = {path.name for path in ROOT.glob("*.py")} | {"tools", "check.py"}


def load_changed(path):
    """The module in a file, beside the one of the same name that is loaded."""
    spec = importlib.util.spec_from_file_location(f"changed_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_diff_of_a_schedule(apply):
    changed = load_changed(apply(0) / "train.py")
    changed.override(["LEARNING_RATE=1.0", "MIN_LEARNING_RATE_RATIO=0.0", "WARMUP_RATIO=0.2",
                      "LR_SCHEDULE=wsd_sqrt"])
    changed.check_constants()
    rates = [round(changed.learning_rate(step, 12), 6) for step in (1, 2, 10, 11, 12)]
    assert rates == [0.5, 1, 1, 0.292893, 0]


def test_diff_of_a_z_loss(apply):
    changed = load_changed(apply(1) / "model.py")
    model = changed.Transformer(tiny_config(), execution=changed.Execution(loss_chunk=8))
    randomize(model.parameters(), torch.Generator().manual_seed(0))
    input_ids, position_ids, cu_seqlens, max_seqlen, labels = row([5, 20], masked=0.2)
    inputs = (input_ids, position_ids, cu_seqlens, max_seqlen)
    weights = torch.rand(25)

    loss = model(*inputs, labels, weights)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    logits = model(*inputs)
    is_target = labels != -100
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    terms = cross_entropy + changed.Z_LOSS * logits.logsumexp(-1) ** 2
    expected = (weights * is_target * terms).sum()
    expected.backward()
    assert_close(loss, expected, "loss")
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, name, atol=1e-5, rtol=1e-4)
    plain = (weights * is_target * cross_entropy).sum()
    assert loss > plain + 1e-3, "the term is too small to be tested"


def test_diff_of_an_architecture(apply, hf_folder, tokenizer_files):
    folder, _ = hf_folder("cwm", vocab_size=260, eos_token_id=0, bos_token_id=0,
                          num_hidden_layers=5, sliding_window=100, max_position_embeddings=1024)
    tokenizer_files(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]  # which follow from their number
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architecture CwmForCausalLM is not supported"):
        convert.load_config(folder)
    result = subprocess.run([sys.executable, "tools/check.py", folder], cwd=apply(2), text=True,
                            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "logits" in result.stdout


# ------------------------------------------------------------------------ tables, messages, links


def test_table_of_constants():
    table = readme.constants_table((ROOT / "train.py").read_text())
    assert re.findall(r"^\| `([A-Z_]+)`", table, re.MULTILINE) == train.CONSTANTS
    assert readme.with_table(README, table) == README, "run python tools/readme.py"


def test_plans_are_those_of_the_tool():
    assert len(readme.PLAN.findall(README)) == 2
    assert readme.with_plans(README) == README, "run python tools/readme.py"


def test_diffs_name_the_lines_of_the_code():
    assert readme.with_line_numbers(README) == README, "run python tools/readme.py"


def test_results_are_those_of_the_measured_runs():
    measured = (ROOT / "bench" / "results.md").read_text().splitlines()
    peers = set()
    for codebases in [*report.OTHERS.values(), *report.OTHERS_MIXED.values()]:
        for results in codebases.values():
            peers |= {f"{mfu:.1%}" for mfu in results.values()}
    for _, _, ours, roof, theirs, _ in table_cells(README):
        assert theirs.strip("*") in peers | {""}
        if ours:
            numbers = [*ours.replace(" tokens/s", "").split(", "), roof]
            cells = [f"| {number} |" for number in numbers]
            lines = [line for line in measured if all(cell in line for cell in cells)]
            assert lines, f"no run in results.md has {numbers}"


def test_messages_are_those_of_the_code():
    texts = []
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    symptoms = table_cells(section("When something goes wrong"))
    assert len(symptoms) >= 10
    for symptom, _ in symptoms:
        for message in re.findall("`(.*?)`", symptom):
            assert any(message in text for text in texts), f"nothing says {message!r}"


def test_every_fault_has_its_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    faults = table_cells(section("What happens to a run when something fails"))
    assert len(faults) >= 30
    for fault, _, names in faults:
        found = re.findall("`(test_.*?)`", names)
        assert found, f"no test of: {fault}"
        for name in found:
            assert f"def {name}(" in tests, f"no test has the name {name}"


def test_every_file_is_described():
    described = set(re.findall(r"^    (\w+\.py) ", section("The files"), re.MULTILINE))
    assert described == {path.name for path in ROOT.glob("*.py")}


def test_names_in_capitals_are_constants():
    """Every constant in the text exists. The diffs and the batch script have names of their own."""
    text = re.sub(r"```(diff|bash)\n.*?```", "", README, flags=re.DOTALL)
    names = set(re.findall(r"`([A-Z]+_[A-Z_]+)\b", text))
    for block in RECIPES:
        names |= set(re.findall(r"\b([A-Z_]+)=", block))
    # of the shell, of libraries, and of tools
    others = {"HEAD", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "HOST_MEMORY", "LENGTHS", "SAMPLES",
              "DOCUMENTS", "SHOW"}
    assert names - others <= set(train.CONSTANTS)


def test_links_and_pictures_exist():
    anchors = set()
    for title in re.findall("^## (.*)", README, re.MULTILINE):
        anchors.add("#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"))
    for target in re.findall(r"\]\((?!http)(.*?)\)", README):
        assert target in anchors or (ROOT / target).exists(), target
