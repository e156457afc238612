"""Tiny models and their folders, packed rows, and processes to run several ranks on.

Nothing here needs a GPU, a network or another repository.
"""
import json
import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

import convert  # noqa: E402
from model import Config, Execution, Transformer  # noqa: E402

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
RANK_TIMEOUT = 240  # seconds


class Row(NamedTuple):
    """A packed row of T tokens, in the order of Transformer.forward's arguments."""
    input_ids: torch.Tensor     # (T,)
    position_ids: torch.Tensor  # (T,)
    cu_seqlens: torch.Tensor    # (documents + 1,) int32
    max_seqlen: int
    labels: torch.Tensor        # (T,), -100 where there is no target


# ------------------------------------------------------------------------------ models and rows


def tiny_config(**changes):
    return Config(**{**TINY, **changes})


def randomize(parameters, generator=None):
    """Fill matrices with 0.2 x normal, and vectors (norms, biases) with 1 + 0.2 x normal.

    Norms and biases are then not ones and zeros, so that a test notices if one is lost.
    """
    with torch.no_grad():
        for p in parameters:
            values = torch.randn(p.shape, generator=generator) * 0.2
            if p.ndim == 1:
                values += 1
            p.copy_(values)


def tiny_model(seed=0, execution=None, sp_group=None, **changes):
    """Return a Transformer of tiny_config(**changes), with random weights that `seed` fixes."""
    model = Transformer(tiny_config(**changes), sp_group, execution or Execution())
    randomize(model.parameters(), torch.Generator().manual_seed(seed))
    return model


def row(lengths, vocab_size=97, seed=0, masked=0.0):
    """Return a Row of random documents. About a fraction `masked` of the labels is -100."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    input_ids = torch.randint(vocab_size, (T,), generator=generator)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    labels = torch.cat([input_ids[1:], input_ids[:1]])
    labels[edges[1:] - 1] = -100  # nothing follows the last token of a document
    labels[torch.rand(T, generator=generator) < masked] = -100
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return Row(input_ids, position_ids, edges.int(), max(lengths), labels)


@torch.no_grad()
def generated_logits(model, input_ids, n_prompt):
    """Feed the first n_prompt tokens of a text to the model, and then one at a time, with a cache.

    Return the logits after the prompt and after each later token, (T - n_prompt + 1, V).
    """
    caches = model.new_caches()
    logits = []
    edges = [0, *range(n_prompt, len(input_ids) + 1)]
    for start, end in zip(edges, edges[1:]):
        n = end - start
        positions = torch.arange(start, end, device=input_ids.device)
        logits.append(model(input_ids[start:end], positions, [0, n], n, caches=caches))
    return torch.cat(logits)


def assert_close(actual, expected, what, atol=0.0, rtol=1e-5):
    """Assert |actual - expected| <= atol + rtol * |expected|. A failure names the worst element."""
    actual = torch.as_tensor(actual).double()
    expected = torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    difference = (actual - expected).abs()
    allowed = atol + rtol * expected.abs()
    close = difference <= allowed  # false for NaN
    if close.all():
        return
    worst = (difference - allowed).flatten().argmax()  # argmax takes NaN for the largest
    n_different = int((~close).sum())
    raise AssertionError(
        f"{what}: {n_different} of {close.numel()} elements differ, the worst at {int(worst)}: "
        f"{actual.flatten()[worst]:.9g}, expected {expected.flatten()[worst]:.9g} "
        f"(atol {atol}, rtol {rtol})"
    )


# ---------------------------------------------------------------------------------------- ranks


def _run_rank(rank, world, store, function, args, errors):
    """The body of one process of on_ranks. Puts its traceback into `errors` if it fails."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # ranks use gloo here, even where there is a GPU
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world
        )
        function(*args)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except BaseException:
        errors.put(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        os._exit(1)
    # Exit without gloo's teardown, whose threads sometimes abort a process that has finished.
    os._exit(0)


def on_ranks(world, function, *args, tmp_path):
    """Run function(*args) on `world` gloo ranks. A failure shows the traceback of every rank.

    The processes are forked, so that they need not import torch again. None of them uses a GPU.
    """
    context = mp.get_context("fork")
    errors = context.SimpleQueue()
    store = tmp_path / f"store-{os.urandom(4).hex()}"
    processes = []
    for rank in range(world):
        arguments = (rank, world, store, function, args, errors)
        processes.append(context.Process(target=_run_rank, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(RANK_TIMEOUT)
        process.kill()

    tracebacks = []
    while not errors.empty():
        tracebacks.append(errors.get())
    exit_codes = [process.exitcode for process in processes]
    message = "\n".join(tracebacks) or f"exit codes {exit_codes}"
    assert all(code == 0 for code in exit_codes), message


# ---------------------------------------------------------------------------------------- files


@pytest.fixture
def hf_folder(tmp_path):
    """Return a function that saves a tiny model of transformers, -> its folder and the model."""

    def write(model_type="llama", name="hf", **changes):
        from transformers import AutoConfig, AutoModelForCausalLM
        torch.manual_seed(0)
        settings = {**TINY, "max_position_embeddings": 512, **changes}
        config = AutoConfig.for_model(model_type, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.float().eval()
        randomize(model.parameters())
        folder = tmp_path / name
        model.save_pretrained(folder)
        return folder, model

    return write


@pytest.fixture
def tokenizer_files():
    """Return a function that saves a byte-level tokenizer in a folder, -> the tokenizer.

    It has 256 tokens besides specials and merges. Its chat template is ChatML by default.
    """

    def write(
        folder,
        template=None,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        merges=(),
    ):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merged = ["".join(pair) for pair in merges]
        vocabulary = {token: i for i, token in enumerate([*specials, *letters, *merged])}
        tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
        tokenizer.add_special_tokens(list(specials))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|endoftext|>",
            additional_special_tokens=list(specials[1:]),
        )
        fast.chat_template = template or convert.CHAT_TEMPLATE
        fast.save_pretrained(folder)
        return fast

    return write


def write_jsonl(path, rows):
    """Write objects as lines of JSON. Return the path as a string, as DATA expects it."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return str(path)
