"""Tiny models, their folders, and ranks to run them on. Nothing here needs a GPU, a network or another repository."""
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from model import Config, Transformer  # noqa: E402

TINY = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, head_dim=8)

def tiny_config(**changes):
    return Config(**{**TINY, **changes})

def tiny_model(seed=0, execution=None, **changes):
    """A model whose norms and biases are not ones and zeros, so that losing one is noticed."""
    model = Transformer(tiny_config(**changes), **({"execution": execution} if execution else {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.ndim == 1))
    return model

def row(lengths, vocab_size=97, seed=0, masked=0.0):
    """A packed row of documents: input_ids, position_ids, cu_seqlens, max_seqlen, labels; some labels -100."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    ids = torch.randint(vocab_size, (T,), generator=generator)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    labels = torch.cat([ids[1:], ids[:1]])
    labels[edges[1:] - 1] = -100
    labels[torch.rand(T, generator=generator) < masked] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    return ids, positions, edges.int(), max(lengths), labels

def assert_close(actual, expected, what, atol=0.0, rtol=1e-5):
    """Names the worst element of a failure, both its values, and what they are of."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    excess = (actual - expected).abs() - (atol + rtol * expected.abs())
    worst = excess.flatten().argmax() if excess.numel() else 0
    assert not (excess > 0).any() and torch.isfinite(actual).all(), (
        f"{what}: {int((excess > 0).sum())} of {excess.numel()} elements differ, the worst at {int(worst)}: "
        f"{actual.flatten()[worst]:.9g}, expected {expected.flatten()[worst]:.9g} (atol {atol}, rtol {rtol})")

def _rank(rank, world, store, function, args, errors):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # ranks are gloo's here, also where there is a GPU
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        function(*args)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except BaseException:
        errors.put(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # without gloo's teardown, whose threads sometimes abort a process that is done

def on_ranks(world, function, *args, tmp_path):
    """Run function(*args) on `world` gloo ranks; a failure shows every rank's own traceback. Forked, not spawned: ranks
    need not import torch again, and none of them touches a GPU."""
    context = mp.get_context("fork")
    errors, store = context.SimpleQueue(), tmp_path / f"store-{os.urandom(4).hex()}"
    ranks = [context.Process(target=_rank, args=(r, world, store, function, args, errors)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        process.kill()
    seen = []
    while not errors.empty():
        seen.append(errors.get())
    assert all(p.exitcode == 0 for p in ranks), "\n".join(seen) or f"exit codes {[p.exitcode for p in ranks]}"

@pytest.fixture
def hf_folder(tmp_path):
    """Write a folder as transformers would, from one of its own tiny models. -> (folder, the transformers model)"""
    def write(model_type="llama", name="hf", **changes):
        from transformers import AutoConfig, AutoModelForCausalLM
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**TINY, "max_position_embeddings": 512, **changes})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model
    return write

@pytest.fixture
def tokenizer_files(tmp_path):
    """Give a folder a byte-level tokenizer of 260 tokens with a ChatML template."""
    def write(folder, template=None, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), merges=()):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        import convert
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(
            {t: i for i, t in enumerate([*specials, *letters, *map("".join, merges)])}, [*merges]))
        tokenizer.add_special_tokens([*specials])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                                       additional_special_tokens=[*specials[1:]])
        fast.chat_template = template or convert.CHAT_TEMPLATE
        fast.save_pretrained(folder)
        return fast
    return write

def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)
