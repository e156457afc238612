"""Data: formats, masks, the cache, packing, order. The plainer truth: what a reader would do by hand."""
import gzip
import json
import math
import os
import time

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

import convert
import data
import train
from tools import show

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|eot_id|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"]
TEMPLATES = {
    "chatml": convert.CHAT_TEMPLATE,
    "llama3": "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    # the system prompt goes into the last question, so what precedes an early answer changes with later turns
    "mistral": "<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
               "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
               "{% if not loop.last and loop.index0 < rest | length - 2 or system is not defined %}[INST] {{ m.content }}[/INST]"
               "{% else %}[INST] {{ system }}\n\n{{ m.content }}[/INST]{% endif %}"
               "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    # thoughts of answers before the last question are left out
    "qwen3": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
             "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 < ns.last %}"
             "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "deepseek": "<s>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
                "<|Assistant|>{{ m.content }}<|end_of_sentence|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
    # prompts to think, whatever follows; eos behind the last turn only; a system prompt of its own
    "thinks": convert.CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
    "eos last": "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n"
                "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}### assistant: {% endif %}",
    "default": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe.<|im_end|>\n{% endif %}"
               "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "marked": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
              "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
    "tools": "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
             "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
             "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"}

@pytest.fixture
def encoder(tmp_path, tokenizer_files):
    """-> function from a template and Encoder's settings to one from a row to (tokens as text, the trained ones in «»)."""
    def make(template="chatml", append_eos=True, train_on_prompt=False, mask_history=False, overlong="split", size=0):
        tokenizer_files(tmp_path, TEMPLATES[template], SPECIALS, [("Ġ", "Y"), ("Ġ", "u")])
        encode = data.Encoder(str(tmp_path), append_eos, train_on_prompt, mask_history, overlong, size)

        def read(row):
            ids, _ = encode(row)
            runs = np.split(ids, np.flatnonzero(np.diff(ids >= 0)) + 1)
            decode = lambda run: encode.tokenizer.decode(np.maximum(run, ~run).tolist())
            return "".join(f"«{decode(run)}»" if run[0] >= 0 else decode(run) for run in runs if len(run))
        read.encode = encode
        return read
    return make

def ask(*turns, **more):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[t[0]], "content": t[1:]} for t in turns], **more}

MASKS = [
    ("chatml", ask("sBe.", "uHi", "aYes", "uSo", "aNo"),
     "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n"
     "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n«No<|im_end|>»\n"),
    ("llama3", ask("uHi", "a Yes "), "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes<|eot_id|>»"),
    ("mistral", ask("uHi", "aYes", "uSo", "aNo"), "<s>[INST] Hi[/INST]« Yes</s>»[INST] So[/INST]« No</s>»"),
    ("mistral", ask("sBe.", "uHi", "aYes"), "<s>[INST] Be.\n\nHi[/INST]« Yes</s>»"),
    ("qwen3", ask("uHi", "a<think>\nhm\n</think>\n\nYes", "uSo", "a<think>\nah\n</think>\n\nNo"),
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n<|im_start|>user\nSo<|im_end|>\n"
     "<|im_start|>assistant\n«<think>\nah\n</think>\n\nNo<|im_end|>»\n"),
    ("deepseek", ask("sBe.", "uHi", "aYes", "uSo", "aNo"),
     "<s>Be.<|User|>Hi<|Assistant|>«Yes<|end_of_sentence|>»<|User|>So<|Assistant|>«No<|end_of_sentence|>»"),
    ("marked", ask("uHi", "aYes"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    ("chatml", ask("aYes"), "<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    ("chatml", ask("uHi", "a"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n"),
    ("chatml", ask("aYes", "uHi"), "<|im_start|>assistant\n«Yes<|im_end|>»\n<|im_start|>user\nHi<|im_end|>\n"),
    ("chatml", {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                             {"role": "assistant", "content": "Yes", "train": False}, {"role": "assistant", "content": "No"}]},
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>assistant\n«No<|im_end|>»\n"),
    ("chatml", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], "system": "Be."},
     "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    ("chatml", {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be.", "history": [["Hi", "Yes"]]},
     "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n"
     "<|im_start|>user\nAdd\n1 2<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n"),
    ("chatml", {"prompt": "Once ", "completion": "upon"}, "Once «upon<|endoftext|>»"),
    ("eos last", ask("uHi", "aYes"), "### user: Hi\n### assistant: «Yes\n<|endoftext|>»"),
    ("thinks", ask("uHi", "a<table>x"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<table>x<|im_end|>»\n"),
    ("thinks", ask("uHi", "a<think>\nhm"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n«hm<|im_end|>»\n"),
    ("default", ask("uHi", "aYes"), "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
     "<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    ("chatml", {"text": "Once <|im_end|> upon"}, "«Once <|im_end|> upon<|endoftext|>»"),
    ("chatml", {"text": ""}, ""),
    ("chatml", {"input_ids": [20, 21, 22], "labels": [-100, 21, 22]}, None),
    ("tools", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                                 {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two"}], "tools": '[{"name": "f"}]'},
     '<|im_start|>system\n[{"type": "function", "function": {"name": "f"}}]<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
     '«<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>»\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n«Two<|im_end|>»\n'),
    ("tools", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}]},
     '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>»\n'),
    ("chatml", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}],
                "tools": [{"name": "f"}]},
     '<|im_start|>system\nTools:\n{"name": "f"}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
     '«{"name": "f", "arguments": {}}<|im_end|>»\n')]

@pytest.mark.parametrize("template,row,expected", MASKS)
def test_what_is_trained(encoder, template, row, expected):
    read = encoder(template)
    assert read(row) == expected if expected is not None else read.encode(row)[0].tolist() == [~20, 21, 22]

def test_every_token_or_the_last_turn_only(encoder):
    chat = ask("uHi", "aYes", "uSo", "aNo")
    assert encoder(mask_history=True)(chat) == encoder()(chat).replace("«Yes<|im_end|>»", "Yes<|im_end|>")
    assert encoder(train_on_prompt=True)(chat) == f"«{encoder()(chat).replace('«', '').replace('»', '')}»"
    late = ask("sBe.", "uHi", "aYes", "uSo", "aNo")
    with pytest.raises(ValueError, match="message 2: .* set MASK_HISTORY=True"):
        encoder("mistral")(late)
    for template, chat in (("eos last", ask("uHi", "aYes", "uSo", "aNo")), ("default", ask("aYes", "uHi", "aNo"))):
        with pytest.raises(ValueError, match="message [01]: "):
            encoder(template)(chat)
    assert encoder("mistral", mask_history=True)(late) == "<s>[INST] Hi[/INST] Yes</s>[INST] Be.\n\nSo[/INST]« No</s>»"

@pytest.mark.parametrize("row", [ask("uHi<|im_end|>\n<|im_start|>assistant\nHa", "aYes<|endoftext|>!"), {"text": "<|im_end|>"},
                                 {"prompt": "<|im_start|>", "completion": "a"}, {"prompt": "a<|im_", "completion": "end|>"},
                                 {"messages": [{"role": "user", "content": [{"text": "<|im_"}, {"text": "end|>"}]},
                                               {"role": "assistant", "content": "a"}]}])
@pytest.mark.parametrize("every", [False, True])
def test_control_tokens_in_a_text_are_text(encoder, row, every):
    read = encoder(train_on_prompt=every)
    plain = json.loads(json.dumps(row).replace("<|", "(|").replace("|>", "|)"))
    ids = lambda row: [int(max(i, ~i)) for i in read.encode(row)[0]]
    count = lambda row: [ids(row).count(token) for token in range(3)]
    assert count(row) == count(plain)
    assert read(row).replace("«", "").replace("»", "") == read(plain).replace("«", "").replace("»", "").replace("(|", "<|").replace("|)", "|>")

BAD = [(ask("uHi"), "0 of . assistant turns"), ({"messages": [{"role": "robot", "content": "a"}]}, "message 0.*role"),
       ({"messages": [{"role": "user"}]}, "message 0.*content None is not text"), ({"text": None}, "no format"), ({"text": 5}, "is not a string"),
       ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 0.*'text'"),
       ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "message 0.*weight"),
       ({"messages": [{"role": "assistant", "content": "a", "train": False}]}, "0 of . assistant turns"),
       ({"messages": None}, "no format"), ({"messages": []}, "0 of . assistant turns"), ({"a": 1}, "no format"), ([1], "no format"),
       ({"text": "a", "messages": []}, "'text', 'messages'"), ({"input_ids": [1, 2], "labels": [2, 3]}, "own place"),
       ({"input_ids": [1, "a"]}, "own place"), ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
       ({"text": b"a"}, "is not a string"), ({"text": "a\ufdd0"}, "no text"), ({"text": "a\ud800"}, "no text"),
       ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "message 0.*JSONDecodeError"),
       ({"instruction": "a", "output": None}, "no format")]

@pytest.mark.parametrize("row,message", BAD)
def test_a_bad_row_is_named(encoder, row, message):
    with pytest.raises(ValueError, match=f"(?s)file:1: .*{message}"), data.naming("file:1"):
        encoder()(row)

def test_a_template_that_refuses_is_named(encoder, tmp_path, tokenizer_files):
    TEMPLATES["refuses"] = "{% if messages | length > 1 %}{{ raise_exception('only one') }}{% endif %}"
    with pytest.raises(ValueError, match="the chat template, up to message 1: .*only one"):
        encoder("refuses")(ask("uHi", "aYes"))

# ------------------------------------------------------------------------------------------------------------- OVERLONG

@pytest.mark.parametrize("policy,expected", [("split", "«abcdefghij»"), ("truncate", "«abcdef»"), ("drop", ""),
                                             ("truncate_middle", "«abc»h«ij»")])
def test_overlong_texts(encoder, policy, expected):
    assert encoder(append_eos=False, overlong=policy, size=6)({"text": "abcdefghij"}) == expected
    assert encoder(append_eos=False, overlong=policy, size=10)({"text": "abcdefghij"}) == "«abcdefghij»"

def test_overlong_chats_keep_their_answers(encoder):
    """The middle of the longest question goes; not what asks at its two ends, and nothing of any answer."""
    chat = ask("uShort", "aYes it is", "uWhat is " + "long " * 60 + "this?", "aNo")
    whole = encoder()(chat)
    kept = encoder(overlong="truncate_middle", size=120)(chat)
    assert "What is long" in kept and "long this?" in kept and kept.count("long") < 20
    assert kept.startswith(whole[:100]) and kept.endswith("assistant\n«No<|im_end|>»\n")
    ids, full = encoder(overlong="truncate_middle", size=120).encode(chat)
    assert len(ids) == 120 and full > 300
    assert encoder(overlong="truncate_middle", size=30)(ask("uHi", "a" + "long " * 20)) == ""
    for every in (False, True):     # nothing but the middle of a turn goes, whatever the size, or all of it
        read = encoder(overlong="truncate_middle", train_on_prompt=every)
        for read.encode.cap in range(30, 300):
            size, left = read.encode.cap, read(chat).replace("«", "").replace("»", "")
            whole = [f"<|im_start|>assistant\n{answer}<|im_end|>" in left for answer in ("Yes it is", "No")]
            assert not left or left.count("<|im_start|>user\n") == left.count("<|im_end|>") - 2 == 2 and all(whole)
            assert size < 100 or left

# ------------------------------------------------------------------------------------------------------ files and cache

TEXTS = ["one", "two\u2028 and more", "three 三", "", "five", "six", "seven", "eight"]

def write(path, texts=TEXTS):
    """A file of {"text": ...} rows in the format that its name says."""
    rows, name = [{"text": t} for t in texts], path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet
        table = pyarrow.table({"text": texts, "messages": pyarrow.nulls(len(texts))})
        parquet.write_table(table, path)
        return str(path)
    content = json.dumps(rows, indent=1) if name.endswith(".json") else "\r\n\r\n".join(map(json.dumps, rows))
    content = b"\xef\xbb\xbf" + content.encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)

@pytest.fixture
def corpus(tmp_path, tokenizer_files):
    """-> function from DATA (and settings) to its Corpus, with the byte-level tokenizer."""
    tokenizer_files(tmp_path)
    return lambda source, *settings: data.build_corpus(source, tmp_path, tmp_path / "cache",
                                                       *(settings or (True, False, False, "split", 0)))

def texts(corpus):
    """Documents without their eos; a byte-level token is a letter of the tokenizer's alphabet."""
    letters = dict(enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 3))
    decode = decoders.ByteLevel().decode
    return [decode([letters[i] for i in corpus.read(d, 0, 10**6)[:-1].tolist()]) for d in range(len(corpus.targets))]

@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.gz"])
def test_files_of_every_kind(corpus, tmp_path, name):
    assert texts(corpus(write(tmp_path / name))) == TEXTS

def test_folders_globs_lists_and_epochs(corpus, tmp_path):
    (tmp_path / "books/old").mkdir(parents=True)
    write(tmp_path / "books/a.jsonl", ["a"]), write(tmp_path / "books/old/b.json", ["b"])
    (tmp_path / "books/README.md").write_text("not data")
    write(tmp_path / "c.jsonl.gz", ["c", "d"])
    assert texts(corpus(str(tmp_path / "books"))) == ["a", "b"]
    assert texts(corpus(str(tmp_path / "books/**/*.json*"))) == ["a", "b"]
    both = corpus({str(tmp_path / "books"): 2.0, str(tmp_path / "c.*"): 0.5})
    assert texts(both) == ["a", "b", "c", "d"] and both.sources == [(0, 2, 2.0), (2, 4, 0.5)]
    rows = data.Rows(both, "none", 10, seed=0)
    assert sorted(rows.documents(0)) in ([0, 0, 1, 1, 2], [0, 0, 1, 1, 3])
    assert sorted([*rows.documents(0), *rows.documents(1)]) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 3]
    for wrong, message in ((str(tmp_path / "books/*"), "matches README.md"), (str(tmp_path / "nothing"), "matches no file"),
                           ({str(tmp_path / "c.*"): 0}, "is set to 0 epochs: use more than 0")):
        with pytest.raises(ValueError, match=f"DATA '.*{message}"):
            corpus(wrong)

BROKEN = [("a.jsonl", b'{"text": "a"}\n{"text": "b', "a.jsonl:2: .*JSON"), ("a.json", b'[{"text": "a"}, {"text', "a.json: .*JSON"),
          ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: .*utf-8"), ("a.jsonl.gz", gzip.compress(b"{}")[:-9], "a.jsonl.gz: EOF"),
          ("a.jsonl", b"", "no token to train"), ("a.json", b'[{"text": "a"}, 5]', "a.json:2: .*no format"),
          ("a.parquet", b"PAR1", "a.parquet: "), ("a.jsonl", b'{"text": "a"}\n\n\n{"text": null}', "a.jsonl:4: .*no format")]

@pytest.mark.parametrize("name,content,message", BROKEN)
def test_broken_files_are_named(corpus, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus(str(tmp_path / name))

def test_the_cache_is_built_once_and_keyed_by_content(corpus, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    first = corpus(path)
    monkeypatch.setattr(data, "tokenize", lambda *_: pytest.fail("tokenized again"))
    assert corpus(path).key == first.key and corpus(str(tmp_path / "a.*")).key == first.key
    monkeypatch.undo()
    write(tmp_path / "a.jsonl", [*TEXTS[:-1], "night"])         # of the same size
    assert corpus(path).key != first.key and texts(corpus(path))[-1] == "night"
    assert corpus(path, True, False, False, "truncate", 3).key != corpus(path).key

@pytest.mark.parametrize("torn", [0, 5])
def test_a_killed_tokenization_goes_on(corpus, tmp_path, monkeypatch, torn):
    """Killed after some parts, in the middle of a record: nothing is tokenized twice, the corpus is the same."""
    many = [f"{i} " * (i % 7) for i in range(400)]
    sources = [write(tmp_path / "a.jsonl", many[:150]), write(tmp_path / "b.jsonl", many[150:])]
    whole = corpus(sources)
    (tmp_path / "cache" / whole.key).rename(tmp_path / "whole")
    part = tmp_path / "cache" / f"{whole.key}.part"
    part.mkdir()
    lengths = np.fromfile(tmp_path / "whole/documents.bin", data.DOCUMENT)
    (part / "documents.bin").write_bytes(lengths[:170].tobytes() + b"x" * torn)
    (part / "tokens.bin").write_bytes((tmp_path / "whole/tokens.bin").read_bytes()[:4 * (int(lengths["length"][:170].sum()) + torn)])
    (tmp_path / "done").mkdir()
    encode = data.Encoder.__call__
    monkeypatch.setattr(data.Encoder, "__call__", lambda self, row: encode(self, row)
                        if not (tmp_path / "done" / f"{hash(str(row))}{os.getpid()}{time.time_ns()}").touch() else None)
    again = corpus(sources)
    assert len(list((tmp_path / "done").iterdir())) == 230
    for f in ("tokens.bin", "documents.bin"):
        assert (tmp_path / "cache" / whole.key / f).read_bytes() == (tmp_path / "whole" / f).read_bytes()
    assert texts(again) == many

# ------------------------------------------------------------------------------------------------------ packing, order

def greedy(lengths, capacity):
    """The rule in words: again and again the largest that still fits."""
    left, bins = sorted(lengths), []
    while left:
        bins.append([])
        while fits := [n for n in left if n <= capacity - sum(bins[-1])]:
            bins[-1].append(fits[-1])
            left.remove(fits[-1])
    return bins

def packed(lengths, capacity):
    indices, first = data.knapsack(np.array(lengths), capacity)
    assert sorted(indices) == list(range(len(lengths)))
    return [np.array(lengths)[part].tolist() for part in np.split(indices, first[1:])]

@pytest.mark.parametrize("lengths,capacity,bins", [
    ([3, 5, 2, 7, 1, 4], 8, [[7, 1], [5, 3], [4, 2]]), ([6, 5, 5, 4, 3, 3, 2], 10, [[6, 4], [5, 5], [3, 3, 2]])])
def test_known_knapsacks(lengths, capacity, bins):
    assert packed(lengths, capacity) == greedy(lengths, capacity) == bins

@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50))
def test_knapsack_is_the_greedy_rule(lengths, capacity):
    assert sorted(packed(lengths, capacity)) == sorted(greedy(lengths, capacity))

def log_normal(n, mean=2300, sigma=1.2, seed=0):
    lengths = np.random.default_rng(seed).lognormal(math.log(mean) - sigma ** 2 / 2, sigma, n)
    return np.maximum(lengths.astype(np.int64), 1)

class Lengths(data.Corpus):
    """Documents of these lengths, and their tokens, document * 1000 + position."""
    def __new__(cls, lengths, masked=()):
        tokens = np.concatenate([np.arange(n) + 1000 * d for d, n in enumerate(lengths)]).astype(np.int32)
        offsets = np.cumsum([0, *lengths])
        tokens[[offsets[d] + t for d, t in masked]] *= -1
        tokens[[offsets[d] + t for d, t in masked]] -= 1
        targets = np.array([(tokens[a + 1:b] >= 0).sum() for a, b in zip(offsets, offsets[1:])])
        return super().__new__(cls, tokens, offsets, targets, np.array(lengths), [(0, len(lengths), 1.0)], "lengths")

@pytest.mark.parametrize("capacity", [2**13, 2**17, 2**20])
def test_rows_are_full(capacity):
    lengths = log_normal(100_000)
    corpus = data.Corpus(None, np.cumsum([0, *lengths]), lengths - 1, lengths, [(0, len(lengths), 1.0)], "")
    assert data.Rows(corpus, "whole", capacity, seed=0).accounting()["fill"] > 0.995

def test_a_million_documents_are_packed_in_seconds():
    lengths = log_normal(1_000_000)
    corpus = data.Corpus(None, np.concatenate([[0], np.cumsum(lengths)]), lengths - 1, lengths, [(0, len(lengths), 1.0)], "")
    began = time.process_time()
    data.Rows(corpus, "whole", 2**17, seed=0)
    assert time.process_time() - began < 6      # 1 to 2 s on one core of its own

def test_grouped_documents_waste_less():
    useful = lambda rows: sum(map(sum, rows)) / sum(max(row) * len(row) for row in rows)
    assert useful([(2, 9), (3, 7)]) == pytest.approx(0.656, abs=1e-3)
    rows = data.Rows(Lengths([2, 3, 7, 9]), "none", 10, seed=0, batch_size=2, grouped_rows=2)
    assert useful([rows.find(row)["length"] for row in range(rows.per_epoch)]) == 0.875

def test_groups_are_steps_in_every_epoch():
    lengths = log_normal(1001)
    rows = data.Rows(Lengths(lengths), "none", 2**20, seed=0, grouped_rows=8)
    for epoch in range(3):
        steps = range(-(-rows.count(epoch) // 8), rows.count(epoch + 1) // 8)
        found = [[rows.find(row)["length"].sum() for row in range(8 * step, 8 * step + 8)] for step in steps]
        assert np.mean([np.mean(step) / max(step) for step in found]) > 0.85

@settings(deadline=None, max_examples=50)
@given(st.integers(1, 900), st.integers(1, 6), st.integers(0, 9))
def test_grouped_order(n, step, seed):
    """Steps of like lengths, the longest first of all; every document once; another order for another seed."""
    lengths = np.random.default_rng(n).integers(1, 10**6, n)
    order = data.group_by_length(lengths, step, np.random.default_rng(seed))
    assert sorted(order) == list(range(n)) and lengths[order[0]] == lengths.max()
    mega = max(1, min(n // (4 * step), 50)) * step
    for start in range(0, n, mega):
        stretch = lengths[order[start:start + mega]]
        blocks = [stretch[i:i + step] for i in range(0, len(stretch), step)]
        inner = [b for b in blocks if lengths.max() not in b]
        inner.sort(key=lambda b: -b[0])
        if start:  # but for the swap of the longest with the first, blocks are pieces of a falling sequence
            joined = np.concatenate(inner) if inner else np.array([])
            assert (np.diff(joined) <= 0).sum() >= len(joined) - 3

lengths_and_settings = given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(lambda x: sum(x) > len(x)), st.integers(4, 24),
    st.sampled_from(["split", "whole", "none"]), st.integers(1, 3), st.integers(0, 3))

@settings(deadline=None, max_examples=150)
@lengths_and_settings
def test_an_epoch_is_every_token_once(lengths, max_length, packing, batch_size, seed):
    """Tokens = trained + masked; none in two rows; a target is the next token of its own document; rows are not too long."""
    masked = [(d, t) for d, n in enumerate(lengths) for t in range(n) if (d * 7 + t) % 5 == 0]
    corpus = Lengths(lengths, masked)
    rows = data.Rows(corpus, packing, max_length, seed, batch_size)
    seen, targets = [], 0
    for r in range(rows.per_epoch):
        b = rows.batch(r, 1, 0)
        assert len(b.input_ids) <= max_length * (batch_size if packing == "none" else 1)
        assert b.cu_seqlens[-1] == len(b.input_ids) and b.max_seqlen == b.cu_seqlens.diff().max() <= max_length
        edges = b.cu_seqlens.tolist()
        for first, last in zip(edges, edges[1:]):
            assert b.position_ids[first:last].tolist() == list(range(last - first))
            assert len(set((b.input_ids[first:last] // 1000).tolist())) == 1
        wanted = b.labels != -100
        assert (b.labels[wanted] == b.input_ids[wanted] + 1).all()      # the next token of the same document
        seen += b.input_ids.tolist()
        targets += int(wanted.sum())
    assert sorted(seen) == sorted(1000 * d + t for d, n in enumerate(lengths) for t in range(n))
    a = rows.accounting()
    assert a["tokens"] == sum(lengths) == a["trained"] + a["masked"] + a["dropped"]
    assert a["trained"] == targets == sum((d, t) not in masked for d, n in enumerate(lengths) for t in range(1, n))
    room = max_length * (batch_size if packing == "none" else 1)
    assert a["padding"] >= 0 and a["rows"] * room == a["trained"] + a["masked"] + a["padding"]

@settings(deadline=None, max_examples=60)
@lengths_and_settings
def test_the_same_batches_for_any_ranks(lengths, max_length, packing, batch_size, seed):
    rows = data.Rows(Lengths(lengths), packing, max_length, seed, batch_size)
    total = rows.count(2.5)
    for step in range(1, -(-total // 4) + 1):
        alone = sorted(b.input_ids.tolist() for b in rows.step(step, 4, 1, 0, 1, 0, total) if (b.labels != -100).any() or b.input_ids.any())
        for dp, sp in ((2, 1), (4, 1), (2, 2)):
            shares = [[rows.step(step, 4, dp, d, sp, s, total) for s in range(sp)] for d in range(dp)]
            spread = [torch.cat([shares[d][s][i].input_ids for s in range(sp)]) for d in range(dp) for i in range(4 // dp)]
            spread = sorted(ids.tolist()[:-(len(ids) - n)] if (n := true_length(ids)) < len(ids) else ids.tolist() for ids in spread if true_length(ids))
            assert len(spread) == len(alone) and all(a[:len(b)] == b or b[:len(a)] == a for a, b in zip(spread, alone))

def true_length(ids):
    """Without the zeros that fill a row to a multiple of sp (token 0 is document 0's first, too)."""
    return int(ids.nonzero().max()) + 1 if ids.any() else 0

def test_epochs_differ_and_repeat():
    rows, again = (data.Rows(Lengths([5] * 30), "whole", 16, seed=3) for _ in range(2))
    batches = [rows.batch(r, 1, 0).input_ids.tolist() for r in range(2 * rows.per_epoch)]
    assert batches == [again.batch(r, 1, 0).input_ids.tolist() for r in range(2 * rows.per_epoch)]
    assert batches[:rows.per_epoch] != batches[rows.per_epoch:]
    assert sorted(sum(batches[:rows.per_epoch], [])) == sorted(sum(batches[rows.per_epoch:], []))

def test_ranks_get_even_work():
    """The same rows in each step, dealt evenly: the slowest of 8 ranks is over the mean by a third, at most, of what it
    was when rows were dealt in their order."""
    lengths = log_normal(100_000, sigma=1.8)
    corpus = data.Corpus(None, np.cumsum([0, *lengths]), lengths - 1, lengths, [(0, len(lengths), 1.0)], "")
    rows = data.Rows(corpus, "whole", 2**17, seed=0)
    work, dp, G = np.array([(rows.find(row)["length"] ** 2).sum() for row in range(rows.per_epoch)]), 8, 32
    rows.batch = lambda row, sp, rank: row
    excess = {"even": [], "in order": []}
    for step in range(1, 1 + min(100, rows.per_epoch // G)):
        dealt = [rows.step(step, G, dp, rank, 1, 0, 10**9) for rank in range(dp)]
        first = (step - 1) * G
        assert sorted(sum(dealt, [])) == list(range(first, first + G)) and {len(d) for d in dealt} == {G // dp}
        for name, loads in (("even", [work[d].sum() for d in dealt]),
                            ("in order", [work[first + rank:first + G:dp].sum() for rank in range(dp)])):
            excess[name].append(max(loads) / np.mean(loads) - 1)
    assert np.mean(excess["even"]) < np.mean(excess["in order"]) / 3

# ----------------------------------------------------------------------------------------------------------- to look at

def test_rows_can_be_looked_at(tmp_path, tokenizer_files, hf_folder, capsys, monkeypatch):
    folder, _ = hf_folder(vocab_size=260, eos_token_id=0, bos_token_id=None)
    tokenizer_files(folder)
    path = write_jsonl(tmp_path / "chat.jsonl", [ask("uHi", "aYes"), ask("uSo", "aNo", "uWhy", "aTherefore")])
    monkeypatch.chdir(tmp_path)
    for name in train.CONSTANTS:
        monkeypatch.setattr(train, name, getattr(train, name))
    show.main([f"MODEL={folder}", f"DATA={path}", "PACKING=whole", f"CACHE_DIR={tmp_path}/cache", "SHOW=0", "--lengths",
               "SEQUENCE_PARALLEL_SIZE=2", "MAX_LENGTH=256"])
    out = capsys.readouterr().out
    assert "\033[32mTherefore<|im_end|>\033[0m" in out and "\033[32mYes<|im_end|>\033[0m" in out and "rank 1" in out
    show.main(["SEQUENCE_PARALLEL_SIZE=8", "SHOW=0"])
    assert "--- padding" in capsys.readouterr().out and "padding\n" not in out and "\033[32mHi" not in out
    assert "2 documents" in out and "document 0" in out and "document 1" in out and "Hi" in out
    assert (tmp_path / "lengths.png").stat().st_size > 5000
