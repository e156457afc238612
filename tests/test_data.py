"""Formats, chat masks, the token cache, packing, order and batches.

The expected values are what a reader would write by hand, or the rule in its plainest form.
"""
import collections
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import convert
import corpus
import data
import examples
import train
from tools import show

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]",
            "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|User|>", "<|Assistant|>",
            "<|end_of_sentence|>"]

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TEMPLATES = {
    "chatml": convert.CHAT_TEMPLATE,

    "llama3": (
        "<s>"
        "{% for m in messages %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),

    # The system prompt is written into the last question, so that the text before an early answer
    # changes with later turns.
    "mistral": (
        "<s>"
        "{% if messages[0].role == 'system' %}"
        "{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}"
        "{% set rest = messages %}"
        "{% endif %}"
        "{% for m in rest %}"
        "{% if m.role != 'user' %}"
        " {{ m.content }}</s>"
        "{% elif not loop.last and loop.index0 < rest | length - 2 or system is not defined %}"
        "[INST] {{ m.content }}[/INST]"
        "{% else %}"
        "[INST] {{ system }}\n\n{{ m.content }}[/INST]"
        "{% endif %}"
        "{% endfor %}"
    ),

    # The thoughts of answers before the last question are removed.
    "qwen3": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}"
        "{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 < ns.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
        "{% else %}"
        "{{ m.content }}"
        "{% endif %}"
        "<|im_end|>\n"
        "{% endfor %}"
    ) + PROMPT,

    "deepseek": (
        "<s>"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<|end_of_sentence|>"
        "{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    ),

    # The generation prompt begins a thought, whether or not the answer has one.
    "thinks": convert.CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),

    # The end of a turn is written after the first answer only.
    "eos first": (
        "{% for m in messages %}"
        "### {{ m.role }}: {{ m.content }}\n"
        "{% if loop.index == 2 %}<|endoftext|>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    ),

    # The end of a turn is written after the last turn only.
    "eos last": (
        "{% for m in messages %}"
        "### {{ m.role }}: {{ m.content }}\n"
        "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    ),

    # No turn has an end.
    "endless": (
        "{% for m in messages %}"
        "{{ m.role }}: {{ m.content }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),

    # Tool calls are written only where the content is null, and arguments only if they are JSON.
    "calls without content": (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' and m.tool_calls and m.content is none %}"
        "<|Assistant|>{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}"
        "{% endfor %}<|end_of_sentence|>"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<|end_of_sentence|>"
        "{% else %}<|User|>{{ m.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    ),

    # Only questions and answers are written, without the thoughts of an answer.
    "forgetful": (
        "{% for m in messages %}"
        "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% if m.role == 'assistant' %}"
        "<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endif %}"
        "{% endfor %}"
    ) + PROMPT,

    # A system prompt is added where the conversation has none.
    "default": (
        "{% for m in messages %}"
        "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
    ) + PROMPT,

    "marked": (
        "{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n"
        "{% endfor %}"
    ),

    # The generation markers enclose answers to questions only.
    "marks some": (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' and not loop.first %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>"
        "{% endfor %}"
    ),

    "tools": (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n"
        "{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "<|im_end|>\n"
        "{% endfor %}"
    ) + PROMPT,

    "refuses": "{% if messages | length > 1 %}{{ raise_exception('only one') }}{% endif %}",
}


class Reader:
    """An Encoder whose result is text: trained tokens are enclosed in «»."""

    def __init__(self, encode):
        self.encode = encode

    def __call__(self, row):
        tokens, _ = self.encode(row)
        changes = np.flatnonzero(np.diff(data.is_trained(tokens))) + 1
        text = ""
        for run in np.split(tokens, changes):
            if len(run) > 0:
                decoded = self.encode.tokenizer.decode(data.token_ids(run).tolist())
                text += f"«{decoded}»" if data.is_trained(run[0]) else decoded
        return text


@pytest.fixture
def reader(tmp_path, tokenizer_files):
    """A function from a template, or its name, and the settings of Encoder to a Reader."""
    def make(template="chatml", append_eos=True, train_on_prompt=False, mask_history=False,
             overlong="split", cap=0, **more):
        # " Y" and " u" are tokens, so that it matters where an answer begins.
        merges = [("Ġ", "Y"), ("Ġ", "u")]
        tokenizer_files(tmp_path, TEMPLATES.get(template, template), SPECIALS, merges)
        encoder = data.Encoder(
            str(tmp_path), append_eos, train_on_prompt, mask_history, overlong, cap, **more)
        return Reader(encoder)
    return make


def unmarked(text):
    return text.replace("«", "").replace("»", "")


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def chat(*messages):
    return {"messages": list(messages)}


def test_marking_tokens_as_untrained():
    tokens = np.array([0, 5, ~0, ~5], np.int32)
    assert data.mask(tokens).tolist() == [~0, ~5, ~0, ~5]
    assert data.token_ids(tokens).tolist() == [0, 5, 0, 5]
    assert data.is_trained(tokens).tolist() == [True, True, False, False]


# ---------------------------------------------------------------------------------- what is trained

ONE_TURN = chat(user("Hi"), assistant("Yes"))
TWO_TURNS = chat(user("Hi"), assistant("Yes"), user("So"), assistant("No"))
THREE_ROLES = chat(system("Be."), user("Hi"), assistant("Yes"), user("So"), assistant("No"))

CALL = '{"name": "f", "arguments": {"x": 1}}'
SHAREGPT_TOOLS = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": CALL},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two"},
    ],
    "tools": '[{"name": "f"}]',
}
OPENAI_CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
OPENAI_TOOLS = chat(user("Hi"), assistant(None, tool_calls=[OPENAI_CALL]))
TOOLS_FOR_A_TEMPLATE_WITHOUT = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    ],
    "tools": [{"name": "f"}],
}
TWO_CALLS_IN_A_LIST = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": f"[{CALL}, {CALL}]"},
    ],
}

# name: (template, row, text with trained tokens in «»)
MASKS = {
    "chatml": (
        "chatml", THREE_ROLES,
        "<|im_start|>system\nBe.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"
        "<|im_start|>user\nSo<|im_end|>\n"
        "<|im_start|>assistant\n«No<|im_end|>»\n"),
    "llama3 trims": (
        "llama3", chat(user("Hi"), assistant(" Yes ")),
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes<|eot_id|>»"),
    "mistral": (
        "mistral", TWO_TURNS,
        "<s>[INST] Hi[/INST]« Yes</s>»[INST] So[/INST]« No</s>»"),
    "mistral with system": (
        "mistral", chat(system("Be."), user("Hi"), assistant("Yes")),
        "<s>[INST] Be.\n\nHi[/INST]« Yes</s>»"),
    "qwen3 removes early thoughts": (
        "qwen3",
        chat(user("Hi"), assistant("<think>\nhm\n</think>\n\nYes"),
             user("So"), assistant("<think>\nah\n</think>\n\nNo")),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"
        "<|im_start|>user\nSo<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nah\n</think>\n\nNo<|im_end|>»\n"),
    "deepseek": (
        "deepseek", THREE_ROLES,
        "<s>Be."
        "<|User|>Hi<|Assistant|>«Yes<|end_of_sentence|>»"
        "<|User|>So<|Assistant|>«No<|end_of_sentence|>»"),
    "generation markers": (
        "marked", ONE_TURN,
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    "an answer alone": (
        "chatml", chat(assistant("Yes")),
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    "an empty answer": (
        "chatml", chat(user("Hi"), assistant("")),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«<|im_end|>»\n"),
    "an answer first": (
        "chatml", chat(assistant("Yes"), user("Hi")),
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"
        "<|im_start|>user\nHi<|im_end|>\n"),
    "content parts, and a turn that is not trained": (
        "chatml",
        chat(user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
             assistant("Yes", train=False), assistant("No")),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>assistant\n«No<|im_end|>»\n"),
    "sharegpt": (
        "chatml",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
         "system": "Be."},
        "<|im_start|>system\nBe.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    "alpaca": (
        "chatml",
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be.",
         "history": [["Hi", "Yes"]]},
        "<|im_start|>system\nBe.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"
        "<|im_start|>user\nAdd\n1 2<|im_end|>\n"
        "<|im_start|>assistant\n«3<|im_end|>»\n"),
    "prompt and completion": (
        "chatml", {"prompt": "Once ", "completion": "upon"},
        "Once« upon<|endoftext|>»"),  # " u" is one token, and a part of it is trained
    "the end of the last turn only": (
        "eos last", ONE_TURN,
        "### user: Hi\n### assistant:« Yes\n<|endoftext|>»"),
    "the prompt begins a thought that the answer lacks": (
        "thinks", chat(user("Hi"), assistant("<table>x")),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«<table>x<|im_end|>»\n"),
    "the prompt begins a thought that the answer continues": (
        "thinks", chat(user("Hi"), assistant("<think>\nhm")),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n«hm<|im_end|>»\n"),
    "a default system prompt": (
        "default", ONE_TURN,
        "<|im_start|>system\nBe.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    "text": ("chatml", {"text": "Once <|im_end|> upon"}, "«Once <|im_end|> upon<|endoftext|>»"),
    "empty text": ("chatml", {"text": ""}, ""),
    "sharegpt tools": (
        "tools", SHAREGPT_TOOLS,
        '<|im_start|>system\n[{"type": "function", "function": {"name": "f"}}]<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n«<call>{CALL}</call><|im_end|>»\n"
        "<|im_start|>tool\n2<|im_end|>\n"
        "<|im_start|>assistant\n«Two<|im_end|>»\n"),
    "openai tools": (
        "tools", OPENAI_TOOLS,
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n«<call>{CALL}</call><|im_end|>»\n"),
    "two tool calls": (
        "tools", TWO_CALLS_IN_A_LIST,
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n«<call>{CALL}</call><call>{CALL}</call><|im_end|>»\n"),
    "tools for a template without": (
        "chatml", TOOLS_FOR_A_TEMPLATE_WITHOUT,
        '<|im_start|>system\nTools:\n{"name": "f"}<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n«{"name": "f", "arguments": {}}<|im_end|>»\n'),
    "tool calls for a template that wants no content, and JSON": (
        "calls without content", OPENAI_TOOLS,
        '<|User|>Hi<|Assistant|>«f{"x": 1}<|end_of_sentence|>»'),
    "an answer first, where the template adds a system prompt": (
        "default", chat(assistant("Yes"), user("Hi"), assistant("No")),
        "<|im_start|>system\nBe.<|im_end|>\n"
        "<|im_start|>assistant\n«Yes<|im_end|>»\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«No<|im_end|>»\n"),
    "no turn is to be trained": (
        "chatml", chat(user("Hi"), assistant("Yes", weight=0)),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"),
    "prompt and completion of messages": (
        "chatml",
        {"prompt": TWO_TURNS["messages"], "completion": [user("Why"), assistant("Ah")]},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n"
        "<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n«Ah<|im_end|>»\n"),
    "a result that also stands in the call": (
        "tools",
        chat(user("Hi"), assistant(None, tool_calls=[OPENAI_CALL]), tool("f"), assistant("x")),
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n«<call>{CALL}</call><|im_end|>»\n"
        "<|im_start|>tool\nf<|im_end|>\n"
        "<|im_start|>assistant\n«x<|im_end|>»\n"),
    "one tool that is no list": (
        "tools", {**ONE_TURN, "tools": {"name": "f"}},
        '<|im_start|>system\n[{"type": "function", "function": {"name": "f"}}]<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n"),
    "early thoughts that are left out in use": (
        "forgetful",
        chat(user("Hi"), assistant("<think>hm</think>Yes"), user("So"), assistant("No")),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n"
        "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n«No<|im_end|>»\n"),
}


ENDLESS_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template,message", [
    (ENDLESS_LOOP, "message 1: it takes more than 1 seconds: correct the template"),
    ("{{ 'a' * 10**11 }}", "message 1: it takes more than 4 GiB of memory: correct the template"),
])
def test_a_template_that_does_not_end_is_refused(reader, monkeypatch, template, message):
    monkeypatch.setattr(examples, "RENDER_SECONDS", 1)
    with pytest.raises(ValueError, match=message):
        reader(template)({"instruction": "hello", "output": "yes"})


def test_a_template_that_does_not_end_is_refused_at_the_first_row(
        build, tmp_path, tokenizer_files, monkeypatch):
    """It would take as long for every other row, and for other forms of the same tool calls."""
    monkeypatch.setattr(examples, "RENDER_SECONDS", 1)
    tokenizer_files(tmp_path, ENDLESS_LOOP)
    call = assistant(None, tool_calls=[OPENAI_CALL])
    path = write_jsonl(tmp_path / "a.jsonl", [chat(user("Hi"), call)] * 100)
    began = time.monotonic()
    with pytest.raises(ValueError, match="a.jsonl:1: .*it takes more than 1 seconds"):
        build(path)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("template,row,expected", MASKS.values(), ids=MASKS)
def test_what_is_trained(reader, template, row, expected):
    assert reader(template)(row) == expected


def test_tokenized_rows_keep_their_labels(reader):
    tokens, full_length = reader().encode({"input_ids": [20, 21, 22], "labels": [-100, 21, 22]})
    assert tokens.tolist() == [~20, 21, 22]
    assert full_length == 3


def test_the_last_turn_only(reader):
    expected = reader()(TWO_TURNS).replace("«Yes<|im_end|>»", "Yes<|im_end|>")
    assert reader(mask_history=True)(TWO_TURNS) == expected


def test_every_token(reader):
    expected = f"«{unmarked(reader()(TWO_TURNS))}»"
    assert reader(train_on_prompt=True)(TWO_TURNS) == expected


def test_a_turn_that_is_written_differently_before_others_is_refused(reader):
    with pytest.raises(ValueError, match="message 2: .* set MASK_HISTORY=True"):
        reader("mistral")(THREE_ROLES)
    expected = "<s>[INST] Hi[/INST] Yes</s>[INST] Be.\n\nSo[/INST]« No</s>»"
    assert reader("mistral", mask_history=True)(THREE_ROLES) == expected


# Templates that write no token at the end of a trained answer.
ENDLESS = [
    ("endless", ONE_TURN, "message 1", "user: Hi\nassistant:« Yes<|endoftext|>»\n"),
    ("endless", TWO_TURNS, "message 1",
     "user: Hi\nassistant:« Yes<|endoftext|>»\nuser: So\nassistant: «No<|endoftext|>»\n"),
    ("eos last", chat(user("Hi"), assistant("Yes"), assistant("No", weight=0)), "message 1",
     "### user: Hi\n### assistant:« Yes<|endoftext|>»\n### assistant: No\n<|endoftext|>"),
]


@pytest.mark.parametrize("template,row,place,appended", ENDLESS)
def test_an_answer_without_a_stop_token_is_refused(reader, template, row, place, appended):
    with pytest.raises(ValueError, match=f"{place}: .* no stop token .* NO_STOP_TOKEN=append"):
        reader(template)(row)
    assert reader(template, no_stop_token="append")(row) == appended

    accepted = appended.replace("<|endoftext|>»\n", "»\n")
    read = reader(template, no_stop_token="accept")
    assert read(row) == accepted
    [encoded] = read.encode.encode_rows([row])
    assert encoded.is_endless


def test_a_template_that_does_not_end_the_last_answer_is_refused(reader):
    with pytest.raises(ValueError, match="message 3: the chat template writes no stop token"):
        reader("eos first")(TWO_TURNS)


def test_a_template_may_end_the_last_answer_only(reader):
    """The ids are those of the template. What follows the first answer is not trained."""
    read = reader("eos last")
    assert read(TWO_TURNS) == ("### user: Hi\n### assistant:« Yes»\n"
                               "### user: So\n### assistant: «No\n<|endoftext|>»")
    [encoded] = read.encode.encode_rows([TWO_TURNS])
    assert encoded.is_endless
    assert reader("eos last", no_stop_token="append")(TWO_TURNS) == (
        "### user: Hi\n### assistant:« Yes<|endoftext|>»\n"
        "### user: So\n### assistant: «No\n<|endoftext|>»")


# As the template of DeepSeek V3, this one ends an answer of words, but not one tool call. The token
# at the end of the call is not special.
CALL_WITHOUT_END = (
    "{% for m in messages %}"
    "{% if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}"
    "{% elif m.content %}<|assistant|>{{ m.content }}</s>"
    "{% else %}<|assistant|>{{ m.tool_calls[0].function.name }}<call_end>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_tool_call_does_not_end_with_a_token_that_is_not_special(tmp_path, tokenizer_files):
    backend = byte_level(tmp_path, tokenizer_files)
    save_tokenizer(tmp_path, backend, CALL_WITHOUT_END, ["<call_end>"])

    def read(row, no_stop_token="refuse"):
        encode = data.Encoder(str(tmp_path), True, False, False, "split", 0, accept_loss=True,
                              no_stop_token=no_stop_token)
        return Reader(encode)(row)

    call = {"function": {"name": "f", "arguments": {}}}
    called = chat(user("Hi"), assistant(None, tool_calls=[call]))
    with pytest.raises(ValueError, match="message 1: .*no stop token"):
        read(called)
    before = "<|user|>Hi<|assistant|>"
    assert read(called, "append") == f"{before}«f<call_end></s>»"
    assert read(called, "accept") == f"{before}«f<call_end>»"
    answered = chat(*called["messages"], tool("2"), assistant("Two"))
    assert read(answered) == f"{before}«f<call_end>»<|tool|>2<|assistant|>«Two</s>»"


def test_an_untrained_turn_needs_no_stop_token(reader):
    row = chat(user("Hi"), assistant("Yes", weight=0))
    assert reader("endless")(row) == "user: Hi\nassistant: Yes\n"


def test_eos_is_appended_where_every_token_is_trained(reader):
    read = reader("endless", train_on_prompt=True, no_stop_token="append")
    row = chat(user("Hi"), assistant("Yes"), user("So"), assistant("No", weight=0))
    assert read(row) == ("«user: Hi\nassistant: Yes<|endoftext|>\n"
                         "user: So\nassistant: »No<|endoftext|>«\n»")


REASON = {"reasoning_content": "hm"}
CALLS = {"tool_calls": [OPENAI_CALL]}
LEFT_OUT = [
    (chat(user("Hi"), assistant("Yes"), tool("22"), assistant("No")),
     "message 2: .*'22' of the tool"),
    (chat(system("Be."), user("Hi"), assistant("Yes")), "message 0: .*'Be.' of the system"),
    (chat(user("Hi"), assistant("<think>hm</think>Yes")), "message 1: .*'hm' of the assistant"),
    (chat(user("Hi"), assistant("Yes", **REASON)), "message 1: .*'hm' of the assistant"),
    (chat(user("Hi"), assistant("Yes", reasoning="hm")), "message 1: .*'hm' of the assistant"),
    (chat(user("Hi"), assistant("Yes", reasoning="", thinking="hm")),
     "message 1: .*'hm' of the assistant"),
    ({**ONE_TURN, "tools": [{"name": "look"}]}, "message 0: .*look.* of the system"),
]


@pytest.mark.parametrize("row,message", LEFT_OUT)
def test_what_the_template_leaves_out_is_named(reader, row, message):
    with pytest.raises(ValueError, match=f"{message}: .*ACCEPT_LOSS=True"):
        reader("forgetful")(row)
    read = reader("forgetful", accept_loss=True)
    assert "«Yes<|im_end|>»" in read(row)
    [encoded] = read.encode.encode_rows([row])
    assert encoded.is_lossy


@pytest.mark.parametrize("arguments", ["{}", '{"x": "12 \\"in\\"\\n"}'])
def test_tool_calls_that_the_template_leaves_out_are_named(reader, arguments):
    template = "{# tool_calls #}" + TEMPLATES["chatml"]
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    row = chat(user("Hi"), assistant("", tool_calls=[call]))
    with pytest.raises(ValueError, match="message 1: the chat template leaves out '(f|12)"):
        reader(template)(row)
    assert json.dumps(json.loads(arguments)) in reader("tools")(row)


def test_weights_of_zero_hold_where_every_token_is_trained(reader):
    row = chat(user("Hi"), assistant("Yes", weight=0), {**user("So"), "weight": 0}, assistant("No"))
    assert reader(train_on_prompt=True)(row) == (
        "«<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n»Yes<|im_end|>"
        "«\n<|im_start|>user\n»So«<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n»")


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}You are a helpful assistant.\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}")


@pytest.mark.parametrize("template,content,expected", [
    ("chatml", "use", "«<|im_start|>user\n»use«<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n»"),
    (DEFAULT_SYSTEM, " help ", "«You are a helpful assistant.\nuser: »help«\nassistant: No\n»")])
def test_the_content_of_weight_zero_is_not_found_elsewhere(reader, template, content, expected):
    """In the name of a role, or in a system prompt that the template adds."""
    row = chat({**user(content), "weight": 0}, assistant("No"))
    assert reader(template, train_on_prompt=True, no_stop_token="accept")(row) == expected


@pytest.mark.parametrize("filter_", ["", " | trim", ".rstrip()", ".lstrip()"])
def test_a_content_of_weight_zero_may_be_trimmed_or_looked_at(reader, filter_):
    """As by Qwen3's template, for which the result of a tool is no question."""
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.content.strip().startswith('<tool>') %}(tool)"
        "{% endif %}{{ m.content" + filter_ + " }}.\n{% endfor %}")
    row = chat(user("Hi"), {**user(" <tool> it is help </tool> "), "weight": 0}, assistant("No"))
    read = reader(template, train_on_prompt=True, no_stop_token="accept")
    found = re.sub(r"\s*([«»])\s*", r"\1", read(row))
    assert "user:(tool)»<tool> it is help </tool>«." in found


def test_a_content_of_weight_zero_that_is_written_otherwise_is_refused(reader):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    row = chat({**user("So"), "weight": 0}, assistant("NO"))
    read = reader(template, train_on_prompt=True, no_stop_token="accept", accept_loss=True)
    with pytest.raises(ValueError, match="message 0 .* has weight 0, but the chat template does not"):
        read(row)


def test_a_prompt_of_messages_is_trained_as_one_of_text(reader):
    row = {"prompt": [user("Hi"), assistant("Yes")], "completion": [assistant("No")]}
    text = unmarked(reader()(row))
    assert reader(train_on_prompt=True)(row) == f"«{text}»"


AMBIGUOUS = {"instruction": "Add", "input": "", "output": "3", "text": "Below is ..."}


def test_format_and_columns_choose_what_is_read(reader):
    expected = "<|im_start|>user\nAdd<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»\n"
    with pytest.raises(ValueError, match="match 'text' and 'instruction': .*set FORMAT"):
        reader()(AMBIGUOUS)
    assert reader(wanted_format="instruction")(AMBIGUOUS) == expected
    assert reader(wanted_format="text")(AMBIGUOUS) == "«Below is ...<|endoftext|>»"

    columns = {"instruction": "q", "output": "a"}
    assert reader(columns=columns)({"q": "Add", "a": "3", "output": 1}) == expected
    assert reader(columns={"output": "text"})({"instruction": "Add", "text": "3"}) == expected


def counts_renderings(monkeypatch):
    """A list that grows with every rendering of a conversation."""
    renderings = []
    render = examples.Chat.render

    def count_and_render(self, *arguments, **more):
        renderings.append(arguments)
        return render(self, *arguments, **more)

    monkeypatch.setattr(examples.Chat, "render", count_and_render)
    return renderings


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3", "deepseek", "marked"])
def test_long_chats_are_rendered_as_often_as_short_ones(reader, monkeypatch, template):
    renderings = counts_renderings(monkeypatch)
    read = reader(template)
    counts = []
    for n_turns in (10, 300):
        turns = []
        for i in range(n_turns):
            turns += [user(f"Question {i}"), assistant(f"Answer {i}")]
        renderings.clear()
        text = read(chat(*turns))
        assert text.count("«Answer ") == text.count("«") == n_turns
        counts.append(len(renderings))
    assert counts[0] == counts[1]


# Letters of the templates' own words, so that contents are also found in other places.
short_texts = st.text("asutien<|_ \n", min_size=1, max_size=4).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(short_texts, short_texts), min_size=1, max_size=5),
       st.sampled_from(["chatml", "qwen3", "deepseek", "default", "thinks"]))
def test_spans_do_not_depend_on_those_found_before(turns, template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    messages = []
    for question, answer in turns:
        messages += [{**user(question), "trained": 1}, {**assistant(answer), "trained": 1}]
    control = examples.control_tokens(tokenizer)
    made = examples.Chat(messages, [], TEMPLATES[template], tokenizer, control, [])
    for i in made.answers():
        assert made.find_span(i) == made.render_span(i)


# ----------------------------------------------------------------------- the ids of the whole text

def save_tokenizer(folder, backend, template, added=()):
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(list(added))  # not special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def sentencepiece_like():
    """A tokenizer that puts a space before the text, and knows the words of the tests."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    letters += sorted(set("HelowrdYesNintm|>:ua"))
    merges = [("\u2581", "Y"), ("e", "s"), ("\u2581Y", "es"), ("l", "d"), ("w", "o")]
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPACES = [
    (ONE_TURN, "Yes</s>"),
    (chat(user("Hello"), assistant(" Yes")), " Yes</s>"),
    (chat(user("Hello wor"), assistant("ld")), "ld</s>"),
    (chat(user("</s>"), assistant("\u6f22 <s>")), "\u6f22 <s></s>"),
    ({"prompt": "Hello wor", "completion": "ld"}, "ld</s>"),
]


@pytest.mark.parametrize("row,trained", SPACES)
def test_tokens_are_those_of_the_whole_text(tmp_path, row, trained):
    """Pieces of a text, tokenized alone, would each begin with a space."""
    tokenizer = save_tokenizer(tmp_path, sentencepiece_like(), ZEPHYR)
    encode = data.Encoder(str(tmp_path), True, False, False, "split", 0)
    tokens, _ = encode(row)
    ids = data.token_ids(tokens)
    assert tokenizer.decode(ids[data.is_trained(tokens)]) == trained

    if "</s>" not in str(row):  # which is text there, but not to the tokenizer alone
        if "messages" in row:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            expected = tokenizer(text, add_special_tokens=False).input_ids
        else:
            expected = [*tokenizer("Hello world", add_special_tokens=False).input_ids, 2]
        assert ids.tolist() == expected


def byte_level(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path)
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_texts_are_neither_truncated_nor_padded(tmp_path, tokenizer_files):
    backend = byte_level(tmp_path, tokenizer_files)
    tokenizer_files(tmp_path)
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    encode = data.Encoder(str(tmp_path), False, False, False, "split", 0)
    assert [len(encoded.tokens) for encoded in encode.encode_rows(
        [{"text": "a"}, {"text": "abcdefghij"}])] == [1, 10]
    assert "assistant\n«Yes<|im_end|>»" in Reader(encode)(ONE_TURN)


@pytest.mark.parametrize("token", ["<U>", '<"U">', "<\u2581U\n>", "<tool>"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_tokens_that_only_the_template_writes_are_text_elsewhere(
        tmp_path, tokenizer_files, token, role):
    """The template writes an added token, which is not special, once for each message."""
    backend = byte_level(tmp_path, tokenizer_files)
    written = json.dumps(token)  # as in a string of the template, where a quote is escaped
    template = "{% for m in messages %}{{ " + written + " }}{{ m.content }}</s>{% endfor %}"
    save_tokenizer(tmp_path, backend, template, [token])
    encode = data.Encoder(str(tmp_path), True, False, False, "split", 0)
    row = chat(user("Hi"), assistant("Yes"))
    messages = {message["role"]: message for message in row["messages"]}
    messages[role]["content"] += f" {token}!"
    tokens, _ = encode(row)
    ids = data.token_ids(tokens).tolist()
    assert ids.count(backend.token_to_id(token)) == 2
    assert f" {token}!" in encode.tokenizer.decode(ids)


def test_control_tokens_that_only_the_tokenizer_sees_are_refused(tmp_path, tokenizer_files):
    backend = byte_level(tmp_path, tokenizer_files)
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<end>", normalized=True)])
    save_tokenizer(tmp_path, backend, TEMPLATES["chatml"])
    encode = data.Encoder(str(tmp_path), True, False, False, "split", 0)
    encode(chat(user("<end>"), assistant("a")))
    with pytest.raises(ValueError, match="reads other control tokens than the row"):
        encode(chat(user("<END>"), assistant("a")))


def test_a_control_token_of_one_character_is_refused_in_texts(tmp_path, tokenizer_files):
    backend = byte_level(tmp_path, tokenizer_files)
    backend.add_special_tokens(["\ue000"])
    save_tokenizer(tmp_path, backend, TEMPLATES["chatml"])
    encode = data.Encoder(str(tmp_path), True, False, False, "split", 0)
    encode(ONE_TURN)
    for row in (chat(user("\ue000"), assistant("a")), {"text": "a\ue000"}):
        with pytest.raises(ValueError, match="control token of one character.*remove it"):
            encode(row)


def test_generation_markers_must_enclose_every_answer(reader):
    with pytest.raises(ValueError, match="enclose 1 of 2 assistant turns"):
        reader("marks some")(chat(assistant("Yes"), user("Hi"), assistant("No")))


CONTROL_TOKENS_IN_TEXTS = [
    chat(user("Hi<|im_end|>\n<|im_start|>assistant\nHa"), assistant("Yes<|endoftext|>!")),
    {"text": "<|im_end|>"},
    {"prompt": "<|im_start|>", "completion": "a"},
    {"prompt": "a<|im_", "completion": "end|>"},
    chat(user([{"text": "<|im_"}, {"text": "end|>"}]), assistant("a")),
]


@pytest.mark.parametrize("row", CONTROL_TOKENS_IN_TEXTS)
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_control_tokens_in_a_text_are_text(reader, row, train_on_prompt):
    """The same row without control tokens, (|im_end|) for <|im_end|>, has as many of them."""
    read = reader(train_on_prompt=train_on_prompt)
    plain = json.loads(json.dumps(row).replace("<|", "(|").replace("|>", "|)"))

    def count_control_tokens(row):
        tokens, _ = read.encode(row)
        ids = data.token_ids(tokens).tolist()
        return [ids.count(control_id) for control_id in range(3)]

    assert count_control_tokens(row) == count_control_tokens(plain)
    written = unmarked(read(row)).replace("<|", "(|").replace("|>", "|)")
    written_plain = unmarked(read(plain)).replace("<|", "(|").replace("|>", "|)")
    assert written == written_plain


BAD_ROWS = [
    (chat(user("Hi")), "0 of 0 assistant turns"),
    (chat({"role": "robot", "content": "a"}), "message 0.*'robot' is unknown: use one of system"),
    (chat({"role": "user"}), "message 0.*content None is not text"),
    (chat(user([{"type": "image_url"}])), "message 0.*has no 'text'.*remove the part or the row"),
    (chat(assistant("a", weight=0.5)), "message 0.*weight is 0.5: use 0 or 1"),
    ({**ONE_TURN, "images": ["a.png"]}, "has 'images': only text.*remove the key or the row"),
    ({"prompt": "p", "completion": "c", "image": "a.png"}, "the row has 'image': only text"),
    (chat(user("Hi"), {**assistant("a"), "reasoning_content": ["deep"]}),
     r"message 1.*reasoning_content \['deep'\] is not a string"),
    (chat({**user("Hi"), "images": ["a.png"]}, assistant("a")),
     "message 0.*the message has 'images': only text"),
    (chat(), "0 of 0 assistant turns"),
    ({"messages": None}, "no format"),
    ({"text": None}, "no format"),
    ({"a": 1}, "keys .'a'. match no format"),
    ([1], "no format"),
    ({"instruction": "a", "output": None}, "no format"),
    ({"text": "a", "messages": []}, "match 'text' and 'messages'.*exactly one of"),
    ({"messages": "foo"}, "messages 'foo' is not a list of objects, the messages: fix or remove"),
    ({"messages": [1]}, "messages '.1.' is not a list of objects"),
    ({"text": 5}, "text 5 is not a string.*fix or remove the row"),
    ({"text": b"a"}, "is not a string"),
    ({"text": "a\ufdd0"}, "no text: remove them"),
    ({"text": "a\ud800"}, "no text: remove them"),
    ({"input_ids": [1, 2], "labels": [2, 3]}, "has 1 where labels has 2.*own place.*-100"),
    ({"input_ids": [1, "a"]}, "input_ids has 'a'.*integer"),
    ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
    ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "message 0.*JSONDecodeError"),
]


@pytest.mark.parametrize("row,message", BAD_ROWS)
def test_a_bad_row_is_named(reader, row, message):
    with pytest.raises(ValueError, match=f"(?s)file:1: .*{message}"), data.naming("file:1"):
        reader()(row)


def test_a_template_that_refuses_is_named(reader):
    with pytest.raises(ValueError, match="the chat template, up to message 1: .*only one"):
        reader("refuses")(ONE_TURN)


# ----------------------------------------------------------------------------------------- OVERLONG

@pytest.mark.parametrize("overlong,expected", [
    ("split", "«abcdefghij»"),
    ("truncate", "«abcdef»"),
    ("drop", ""),
    ("truncate_middle", "«abc»h«ij»"),
])
def test_overlong_texts(reader, overlong, expected):
    text = {"text": "abcdefghij"}
    assert reader(append_eos=False, overlong=overlong, cap=6)(text) == expected
    assert reader(append_eos=False, overlong=overlong, cap=10)(text) == "«abcdefghij»"


LONG_QUESTION = chat(user("Short"), assistant("Yes it is"),
                     user("What is " + "long " * 60 + "this?"), assistant("No"))


def test_the_middle_of_the_longest_question_is_removed(reader):
    whole = reader()(LONG_QUESTION)
    read = reader(overlong="truncate_middle", cap=120)
    kept = read(LONG_QUESTION)
    assert "What is long" in kept
    assert "long this?" in kept
    assert kept.count("long") < 20
    assert kept.startswith(whole[:100])
    assert kept.endswith("assistant\n«No<|im_end|>»\n")

    tokens, full_length = read.encode(LONG_QUESTION)
    assert len(tokens) == 120
    assert full_length > 300


def test_a_long_answer_is_dropped(reader):
    long_answer = chat(user("Hi"), assistant("long " * 20))
    assert reader(overlong="truncate_middle", cap=30)(long_answer) == ""


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_answers_and_turns_are_kept_whatever_the_cap(reader, train_on_prompt):
    """Either nothing is kept, or both answers and all the tokens that begin and end turns are."""
    read = reader(overlong="truncate_middle", train_on_prompt=train_on_prompt)
    for cap in range(30, 300):
        read.encode.cap = cap
        kept = unmarked(read(LONG_QUESTION))
        if cap >= 100:
            assert kept
        if kept:
            assert "<|im_start|>assistant\nYes it is<|im_end|>" in kept
            assert "<|im_start|>assistant\nNo<|im_end|>" in kept
            assert kept.count("<|im_start|>user\n") == 2
            assert kept.count("<|im_end|>") == 4


# ---------------------------------------------------------------------------------- files and cache

TEXTS = ["one", "two\u2028 and more", "three 三", "", "five", "six", "seven", "eight"]


def write(path, texts=TEXTS):
    """Write rows of {"text": ...} in the format that the file's name says. Return the path."""
    rows = [{"text": text} for text in texts]
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        table = pyarrow.table({"text": texts, "messages": pyarrow.nulls(len(texts))})
        parquet.write_table(table, path)
        return str(path)

    if name.endswith(".json"):
        content = json.dumps(rows, indent=1)
    else:
        content = "\r\n\r\n".join(json.dumps(row) for row in rows)
    byte_order_mark = b"\xef\xbb\xbf"
    content = byte_order_mark + content.encode()
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    if path.name.endswith(".zst"):
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def build(tmp_path, tokenizer_files):
    """A function from DATA and settings to its Corpus, with the byte-level tokenizer."""
    tokenizer_files(tmp_path)

    def build_corpus(source, overlong="split", cap=0, bad_rows=0.0):
        append_eos = True
        train_on_prompt = False
        mask_history = False
        return data.build_corpus(source, tmp_path, tmp_path / "cache", append_eos,
                                 train_on_prompt, mask_history, overlong, cap, bad_rows=bad_rows)
    return build_corpus


def texts_of(corpus, decode_specials=False):
    """The documents as texts, without eos. A token is a letter of the byte-level alphabet."""
    letters = dict(enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=3))
    if decode_specials:
        letters.update(enumerate(SPECIALS[:3]))
    decoder = decoders.ByteLevel()
    texts = []
    for document in range(len(corpus.targets)):
        tokens = data.token_ids(corpus.read(document, 0, 10**6))[:-1].tolist()
        texts.append(decoder.decode([letters[token] for token in tokens]))
    return texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.jsonl.gz",
                                  "a.json.gz", "a.jsonl.zst"])
def test_files_of_every_kind(build, tmp_path, name):
    assert texts_of(build(write(tmp_path / name))) == TEXTS


@pytest.mark.parametrize("indent", [2, None])
def test_a_file_of_one_object(build, tmp_path, indent):
    """Over several lines, or on one."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "one"}, indent=indent))
    assert texts_of(build(str(path))) == ["one"]


@pytest.fixture
def books(tmp_path):
    """A folder of one text in each of two folders, and a file of two texts beside it."""
    (tmp_path / "books/old").mkdir(parents=True)
    write(tmp_path / "books/a.jsonl", ["a"])
    write(tmp_path / "books/old/b.json", ["b"])
    (tmp_path / "books/README.md").write_text("not data")
    write(tmp_path / "c.jsonl.gz", ["c", "d"])
    return tmp_path


def test_folders_and_globs(build, books):
    assert texts_of(build(str(books / "books"))) == ["a", "b"]
    assert texts_of(build(str(books / "books/**/*.json*"))) == ["a", "b"]
    both = build([str(books / "books"), str(books / "c.jsonl.gz")])
    assert texts_of(both) == ["a", "b", "c", "d"]


def test_sources_have_their_epochs(build, books):
    both = build({str(books / "books"): 2.0, str(books / "c.*"): 0.5})
    assert texts_of(both) == ["a", "b", "c", "d"]
    assert both.sources == [(0, 2, 2.0), (2, 4, 0.5)]

    rows = data.Rows(both, "none", 10, seed=0)
    assert sorted(rows.documents(0)) in ([0, 0, 1, 1, 2], [0, 0, 1, 1, 3])
    assert sorted([*rows.documents(0), *rows.documents(1)]) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 3]


def test_sources_that_cannot_be_used_are_named(build, books):
    rule = "name files whose names end with .json"
    with pytest.raises(ValueError, match=f"DATA '.*books/.*' matches README.md: {rule}"):
        build(str(books / "books/*"))
    with pytest.raises(ValueError, match=f"DATA '.*nothing' matches no file: {rule}"):
        build(str(books / "*nothing"))
    with pytest.raises(ValueError, match="DATA '.*nothing.jsonl' does not exist: name a file, a"):
        build(str(books / "nothing.jsonl"))
    with pytest.raises(ValueError, match="DATA '{/c: 1}' is no Python literal.*: quote its paths"):
        build("{/c: 1}")
    with pytest.raises(ValueError, match="DATA '.*' is set to 0 epochs: use more than 0, or leave"):
        build({str(books / "c.*"): 0})


BROKEN_FILES = [
    ("a.jsonl", b'{"text": "a"}\n{"text": "b',
     "a.jsonl:2: JSONDecodeError .*each line must be one JSON object.*fix or remove the line"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}',
     "a.jsonl:2: UnicodeDecodeError .*utf-8.*fix or remove the line"),
    ("a.json", b'[{"text": "a"}, {"text', "a.json: JSONDecodeError .*one JSON array"),
    ("a.json", b'[{"text": "a"}, 5]', "a.json:2: .*no format"),
    ("a.json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}',
     "a.json: .*Extra data.*an object on each of its lines"),
    ("a.jsonl.gz", gzip.compress(b"{}")[:-9], "a.jsonl.gz: the file is damaged .*again"),
    ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "a.jsonl: the file is UTF-16: convert it, such"),
    ("a.txt", b"caf\xe9 au lait", "a.txt: it is not UTF-8 .*0xe9.*: convert it"),
    ("a.jsonl", b"", "no token to train"),
    ("a.parquet", b"PAR1", "a.parquet: the file is damaged .*again"),
    ("a.jsonl", b'{"text": "a"}\n\n\n{"text": null}', "a.jsonl:4: .*no format.*, not null; set COLUMNS"),
]


@pytest.mark.parametrize("name,content,message", BROKEN_FILES)
def test_broken_files_are_named(build, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(str(tmp_path / name))


def test_the_cache_is_built_once(build, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    first = build(path)

    monkeypatch.setattr(corpus, "tokenize", lambda *_: pytest.fail("tokenized again"))
    assert build(path).key == first.key
    assert build(str(tmp_path / "a.*")).key == first.key


def test_the_cache_is_keyed_by_content_and_settings(build, tmp_path):
    path = write(tmp_path / "a.jsonl")
    first = build(path)
    assert build(path, overlong="truncate", cap=3).key != first.key

    write(tmp_path / "a.jsonl", [*TEXTS[:-1], "night"])  # of the same size
    changed = build(path)
    assert changed.key != first.key
    assert texts_of(changed)[-1] == "night"


@pytest.fixture
def encoded_rows(tmp_path, monkeypatch):
    """A function that returns how many rows were tokenized since its last call."""
    folder = tmp_path / "encoded"  # worker processes share files alone
    folder.mkdir()
    encode_rows = data.Encoder.encode_rows

    def leave_a_file_and_encode(self, rows):
        (folder / f"{os.getpid()}-{time.time_ns()}").write_text(str(len(rows)))
        return encode_rows(self, rows)

    def count():
        n_rows = 0
        for file in folder.iterdir():
            n_rows += int(file.read_text())
            file.unlink()
        return n_rows

    monkeypatch.setattr(data.Encoder, "encode_rows", leave_a_file_and_encode)
    return count


def homes_of(tmp_path):
    """{the first document of a file: the folder in the cache with its tokens}."""
    homes = {}
    for home in (tmp_path / "cache").iterdir():
        if home.is_dir():
            homes[np.fromfile(home / "tokens.bin", np.int32)[0]] = home
    return homes


@pytest.mark.parametrize("torn,checked", [(0, True), (5, True), (5, False)])
def test_a_killed_tokenization_is_continued(
        build, tmp_path, monkeypatch, encoded_rows, torn, checked):
    """Killed after 170 documents, in the middle of a record: the other 230 are tokenized once."""
    many = [f"{i} " * (1 + i % 7) for i in range(400)]
    sources = [write(tmp_path / "a.jsonl", many[:150]), write(tmp_path / "b.jsonl", many[150:])]
    build(sources)
    assert encoded_rows() == 400

    done, killed = sorted((tmp_path / "cache").glob("*/tokens.bin"), key=os.path.getsize)
    home = killed.parent
    whole = tmp_path / "whole"
    home.rename(whole)
    part = home.with_suffix(".part")
    part.mkdir()
    documents = np.fromfile(whole / "documents.bin", data.DOCUMENT)[:20]
    n_tokens = int(documents["length"].sum())
    (part / "documents.bin").write_bytes(documents.tobytes() + b"x" * torn)
    tokens = np.fromfile(whole / "tokens.bin", np.int32)[:n_tokens + torn]
    tokens.tofile(part / "tokens.bin")
    if checked:
        (part / "checked").touch()

    read = []
    read_chunks = corpus.read_chunks

    def note_and_read(*arguments, **more):
        read.append((*arguments, *more.values()))
        return read_chunks(*arguments, **more)

    monkeypatch.setattr(corpus, "read_chunks", note_and_read)
    continued = build(sources)
    assert encoded_rows() == 230
    line = 2 * 20 - 1  # every second one is empty
    # All rows are read once more, to check them, if the killed build has not done it.
    assert read == ([] if checked else [(sources[1],)]) + [(sources[1], line)]
    for name in ("tokens.bin", "documents.bin"):
        assert (home / name).read_bytes() == (whole / name).read_bytes()
    assert texts_of(continued) == many


# What a killed process leaves, as a program of its own.
SLOW_BUILD = """
import sys
import time
sys.path.insert(0, sys.argv[1])
import corpus
corpus.CHUNK_BYTES = 100
encode_rows = corpus.Encoder.encode_rows
def encode_slowly(self, rows):
    time.sleep(0.05)
    return encode_rows(self, rows)
corpus.Encoder.encode_rows = encode_slowly
folder, data = sys.argv[2:]
corpus.build_corpus(data, folder, folder + "/cache", True, False, False, "split", 0)
"""


def wait_until(condition, seconds=30):
    """Return the first value of a condition that is true."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{condition.__name__} did not become true")


def is_running(process):
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state = stat.rpartition(")")[2].split()[0]
    return state != "Z"  # it has ended, and nobody has asked for its exit code


def test_equal_texts_have_one_hash(build, tmp_path, tokenizer_files):
    """Whatever else is in their rows, and whether or not the tokenizer has control tokens there."""
    texts = ["a", "a<|im_end|>", "", "a", "a<|im_end|>"]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    hashes = build(path).hashes.tolist()
    assert hashes[:2] == hashes[3:]
    assert len(set(hashes)) == 3

    chats = [{"id": 1, **ONE_TURN}, {**ONE_TURN, "id": 1}, ONE_TURN]
    hashes_of_chats = build(write_jsonl(tmp_path / "b.jsonl", chats)).hashes.tolist()
    assert hashes_of_chats[0] == hashes_of_chats[1] != hashes_of_chats[2]

    tokenizer_files(tmp_path, specials=["<|endoftext|>"])
    assert build(path).hashes.tolist() == hashes


def test_a_killed_process_leaves_no_worker_and_no_lock(build, tmp_path, encoded_rows):
    texts = [f"document {i}" for i in range(400)]
    path = write(tmp_path / "a.jsonl", texts)
    root = str(Path(corpus.__file__).parent)
    killed = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, root, str(tmp_path), path],
                              stderr=subprocess.DEVNULL)

    def written():
        return [file for file in tmp_path.glob("cache/*.part/documents.bin") if file.stat().st_size]

    def workers_are_gone():
        return not any(map(is_running, workers))

    workers = []
    try:
        wait_until(written)
        workers += Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        assert workers
        for worker in workers:
            opened = [os.readlink(link) for link in Path(f"/proc/{worker}/fd").iterdir()]
            assert not any(name.endswith(".lock") for name in opened)
        killed.kill()
        killed.wait()
        wait_until(workers_are_gone, seconds=5)
    finally:
        killed.kill()
        for worker in filter(is_running, workers):
            os.kill(int(worker), signal.SIGKILL)

    assert texts_of(build(path)) == texts
    assert 0 < encoded_rows() < 400


def test_a_killed_worker_is_explained(build, tmp_path, monkeypatch):
    """As by the system where memory ran out."""
    parent = os.getpid()

    def kill_worker(encoder, rows):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(examples.Encoder, "encode_rows", kill_worker)
    path = write(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(RuntimeError, match="tokenizes was killed, probably because memory ran out"):
        build(path)


def test_a_wait_for_a_lock_says_who_holds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "SILENT_SECONDS", 0)
    path = tmp_path / "a.lock"
    entered = []

    def enter():
        with corpus.exclusive(path):
            entered.append(True)

    with corpus.exclusive(path):
        waiting = threading.Thread(target=enter)
        waiting.start()
        time.sleep(0.5)
        assert not entered
    waiting.join(10)
    assert entered
    name = f"process {os.getpid()} on {os.uname().nodename}"
    assert capsys.readouterr().err == f"waiting for {path}, which {name} holds\n"


def test_a_worker_that_is_killed_says_so(build, tmp_path, monkeypatch):
    def die(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(data.Encoder, "encode_rows", die)
    with pytest.raises(RuntimeError, match="was killed, probably because memory ran out: give"):
        build(write(tmp_path / "a.jsonl"))


def test_bad_rows_are_reported_together_before_any_is_tokenized(build, tmp_path, encoded_rows):
    rows = [json.dumps({"text": "a"})] * 30
    for number in range(4, 30, 2):
        rows[number - 1] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError) as failure:
        build([write(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    lines = str(failure.value).splitlines()
    assert len(lines) == 11
    for line, number in zip(lines, range(4, 24, 2)):
        assert line.startswith(f"{tmp_path}/a.jsonl:{number}: JSONDecodeError")
    assert "rows cannot be used: fix or remove them, or set BAD_ROWS" in lines[-1]
    assert lines[-1].startswith("at least 13 ")  # later rows may be bad, too
    assert encoded_rows() == 0


@pytest.mark.parametrize("template,row,message", [
    ("refuses", ONE_TURN, "TemplateError only one"),
    ("forgetful", LEFT_OUT[0][0], "the chat template leaves out '22' of the tool"),
    ("endless", ONE_TURN, "the chat template writes no stop token after it"),
])
def test_what_templates_refuse_is_reported_before_any_row_is_tokenized(
        build, tmp_path, tokenizer_files, encoded_rows, template, row, message):
    tokenizer_files(tmp_path, TEMPLATES[template], SPECIALS)
    rows = [{"text": "a"}] * 30
    for number in range(4, 30, 2):
        rows[number - 1] = row
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError) as failure:
        build([write(tmp_path / "b.jsonl"), path])
    lines = str(failure.value).splitlines()
    assert len(lines) == 11
    for line, number in zip(lines, range(4, 24, 2)):
        assert line.startswith(f"{path}:{number}: ") and message in line
    assert encoded_rows() == 0


def test_rows_of_input_ids_need_no_tokenizer(tmp_path):
    """Not even where the first of them cannot be used."""
    rows = [{"input_ids": [1, -1]}, {"input_ids": [1, 2]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = (True, False, False, "split", 0)
    with pytest.raises(ValueError, match="a.jsonl:1: input_ids has -1"):
        data.build_corpus(path, tmp_path, tmp_path / "cache", *settings)
    made = data.build_corpus(path, tmp_path, tmp_path / "cache", *settings, bad_rows=0.5)
    assert made.read(0, 0, 9).tolist() == [1, 2]


def test_chats_are_recognized_by_the_first_row_that_can_be_used(tmp_path):
    assert data.is_chat(write_jsonl(tmp_path / "a.jsonl", [{"text": 5}, ONE_TURN, {"text": "a"}]))
    assert not data.is_chat(write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, ONE_TURN]))


def test_a_mended_file_is_tokenized_alone(build, tmp_path, encoded_rows):
    first = write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"messages": []}')
    with pytest.raises(ValueError, match="b.jsonl:2: .*0 of 0 assistant turns"):
        build([first, str(tmp_path / "b.jsonl")])
    build(first)
    encoded_rows()
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": "y"}')
    assert texts_of(build([first, str(tmp_path / "b.jsonl")])) == [*TEXTS, "x", "y"]
    assert encoded_rows() == 2


@pytest.mark.parametrize("allowed,works", [(0.25, True), (0.1, False), (0.0, False)])
def test_a_share_of_bad_rows_is_skipped_and_listed(build, tmp_path, allowed, works):
    """The first row can be seen to be bad by itself, and the other one by its template only."""
    rows = [{"text": 5}, *[{"text": text} for text in TEXTS], LEFT_OUT_BY_CHATML]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    if not works:
        expected = "(?s)a.jsonl:1: .*a.jsonl:10: .*2 of 10 rows cannot be used"
        with pytest.raises(ValueError, match=expected):
            build(path, bad_rows=allowed)
        return

    made = build(path, bad_rows=allowed)
    assert texts_of(made) == TEXTS
    described = data.Rows(made, "whole", 9, 0).describe()
    match = re.search(r"2 rows are skipped: (.*/bad_rows.txt)", described)
    listed = Path(match[1]).read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == [f"{path}:1", f"{path}:10"]
    with pytest.raises(ValueError, match="2 of 10 rows cannot be used"):
        build(path)


def test_a_share_of_bad_rows_is_one_of_all_files(build, tmp_path):
    """Also of those that are tokenized already, and of a part that a killed build left."""
    first = write(tmp_path / "a.jsonl")
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": 5}, {"text": "x"}])
    build(first, bad_rows=0.2)
    made = build([first, second], bad_rows=0.2)
    assert texts_of(made) == [*TEXTS, "x"]

    [listed] = [file for file in tmp_path.glob("cache/*/bad_rows.txt") if file.stat().st_size > 0]
    line = listed.read_text()
    of_second = listed.parent
    homes = [file.parent for file in tmp_path.glob("cache/*/errors.txt")]
    [of_first] = [home for home in homes if home != of_second]
    # Killed after the line about the bad row, and before its record; then with the first file.
    for killed, missing in ((of_second, None), (of_first, of_second)):
        part = killed.with_suffix(".part")
        killed.rename(part)
        (part / "documents.bin").write_bytes(b"")
        if missing:
            shutil.rmtree(missing)
        made = build([first, second], bad_rows=0.2)
        assert texts_of(made) == [*TEXTS, "x"]
        assert listed.read_text() == line
    with pytest.raises(ValueError, match="b.jsonl:1: .*\n1 of 10 rows cannot be used"):
        build([first, second])


@pytest.mark.parametrize("name,shown", [("b.jsonl", "b.jsonl"), (b"b\xff.jsonl", r"b\xff.jsonl")])
def test_the_bad_rows_of_a_renamed_file_have_its_new_name(build, tmp_path, name, shown):
    """Also one whose name is not UTF-8, which cannot be written as it is."""
    old = write_jsonl(tmp_path / "a.jsonl", [{"text": 5}, {"text": "x"}])
    build(old, bad_rows=0.5)
    new = str(tmp_path / os.fsdecode(name))
    os.rename(old, new)
    made = build(new, bad_rows=0.5)
    [listed] = tmp_path.glob("cache/*/bad_rows.txt")
    assert listed.read_text().startswith(f"{tmp_path}/{shown}:1: text 5 is not a string")
    assert f"{tmp_path}/{shown}: 1 files" in made.notes
    assert f"1 rows are skipped: {listed}" in made.notes


def test_a_file_whose_name_is_not_utf8_can_be_read(build, tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    write_jsonl(folder / os.fsdecode(b"a\xff.jsonl"), [{"text": "x"}, {"text": 5}])
    (folder / os.fsdecode(b"\xff.md")).write_text("not data")
    with pytest.raises(ValueError) as failure:
        build(str(folder))
    assert rf"{folder}/a\xff.jsonl:2: text 5 is not a string" in str(failure.value)
    made = build(str(folder), bad_rows=0.5)
    assert texts_of(made) == ["x"]
    assert r"1 files are no data: \xff.md" in made.notes
    (folder / os.fsdecode(b"b\xff.json")).write_text("[{")
    with pytest.raises(ValueError, match=r"/b\\xff.json: JSONDecodeError"):
        build(str(folder))


def test_rows_of_equal_files_count_once(build, tmp_path):
    """One bad row of twenty, also if one file is there twice, and tokenized before or not."""
    rows = [{"text": 5}, *[{"text": str(i)} for i in range(9)]]
    bad = [write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "copy.jsonl", rows)]
    good = write_jsonl(tmp_path / "b.jsonl", [{"text": str(i)} for i in range(10)])
    build([*bad, good], bad_rows=0.06)
    more = write_jsonl(tmp_path / "c.jsonl", [{"text": "x"}])
    build([*bad, good, more], bad_rows=0.06)
    with pytest.raises(ValueError, match="1 of 20 rows cannot be used"):
        build([*bad, good], bad_rows=0.04)


LEFT_OUT_BY_CHATML = chat(user("Hi"), assistant("Yes", **REASON))


def test_what_killed_builds_left_is_removed_after_a_week(build, tmp_path):
    week = 7 * 24 * 3600
    ages = {"old": week + 60, "new": week - 60}
    for name, age in ages.items():
        part = tmp_path / f"cache/{name}.part"
        part.mkdir(parents=True)
        os.utime(part, (time.time() - age, time.time() - age))
    build(write(tmp_path / "a.jsonl"))
    assert [part.name for part in tmp_path.glob("cache/*.part") if part.is_dir()] == ["new.part"]


def test_nulls_of_a_table_are_no_text(build, tmp_path):
    """A column of objects has all keys in each of them there, and null where a key is missing."""
    messages = [user("Hi"), assistant(None, tool_calls=[
        {"function": {"name": "f", "arguments": {"x": "1"}}},
        {"function": {"name": "g", "arguments": {"y": "2"}}}])]
    parquet.write_table(pyarrow.Table.from_pylist([chat(*messages)]), tmp_path / "a.parquet")
    [text] = texts_of(build(str(tmp_path / "a.parquet")), decode_specials=True)
    assert '{"name": "f", "arguments": {"x": "1"}}' in text
    assert "null" not in text


def test_what_was_read_is_said(build, books):
    (books / "books/.hidden").mkdir()
    write(books / "books/.hidden/d.jsonl", ["hidden"])
    write(books / "books/.e.jsonl", ["hidden"])
    (books / "books/f.txt").write_text("one\ndocument")
    (books / "linked").mkdir()
    write(books / "linked/g.jsonl", ["linked"])
    (books / "books/link").symlink_to(books / "linked")
    (books / "books/loop").symlink_to(books / "books")
    sources = [str(books / "books"), str(books / "linked/g.jsonl"), str(books / "c.jsonl.gz")]
    made = build(sources)
    assert sorted(texts_of(made)) == ["a", "b", "c", "d", "linked", "one\ndocument"]

    assert not data.is_chat(sources)
    described = data.Rows(made, "whole", 99, seed=0).describe()
    assert f"{sources[0]}: 4 files, 4 documents, 24 tokens, 20 trained, 1 epochs" in described
    assert "1 files are no data: README.md" in described
    assert f"{sources[1]}: earlier sources have all of its files\n" in described
    assert "0 files" not in described
    assert f"{sources[2]}: 1 files, 2 documents, 4 tokens, 2 trained" in described


@pytest.mark.parametrize("name", ["d.csv", "d.arrow", "d.csv.gz"])
def test_data_that_cannot_be_read_is_refused_by_name(build, books, name):
    (books / "books" / name).write_text("a,b")
    with pytest.raises(ValueError, match=f"matches {name}: .*convert others"):
        build(str(books / "books"))


def test_what_the_template_leaves_out_is_counted(build, tmp_path, tokenizer_files):
    tokenizer_files(tmp_path, TEMPLATES["forgetful"])
    path = write_jsonl(tmp_path / "a.jsonl", [THREE_ROLES, TWO_TURNS])
    settings = (True, False, False, "split", 0, "", {}, True, "refuse")
    made = data.build_corpus(path, tmp_path, tmp_path / "cache", *settings)
    assert "1 chats have contents that the chat template leaves out" in made.notes


def test_columns_that_no_row_has_are_refused(tmp_path, tokenizer_files):
    """Another key of the rows would be trained instead."""
    tokenizer_files(tmp_path)
    rows = [{"text": "SHORT TITLE", "content": "the long body"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    def build_with(columns):
        settings = (True, False, False, "split", 0, "", columns)
        return data.build_corpus(path, tmp_path, tmp_path / "cache", *settings)

    with pytest.raises(ValueError, match="COLUMNS .* names 'contents', which is no key of the first "
                                         "rows of DATA: their keys are content, text. Name one"):
        data.check_columns(path, {"text": "contents"})
    data.check_columns(path, {"text": "content", "system": "only in some rows"})
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "of another form"}])
    data.check_columns([other, path], {"text": "content"})
    bad = tmp_path / "c.jsonl"
    bad.write_text("{")
    data.check_columns(str(bad), {"text": "content"})   # this row is named when all are read
    assert texts_of(build_with({"text": "content"})) == ["the long body"]
    with pytest.raises(ValueError, match=r"keys .'content', 'text'., with COLUMNS .'content', 'output'., "):
        build_with({"output": "text"})


def test_conversations_need_a_chat_template(build, tmp_path, tokenizer_files):
    tokenizer = tokenizer_files(tmp_path)
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [ONE_TURN] * 20)
    with pytest.raises(ValueError) as failure:
        build(path)
    assert "conversations need a chat template, and the tokenizer of MODEL" in str(failure.value)
    assert len(str(failure.value).splitlines()) == 1

    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, ONE_TURN])
    with pytest.raises(ValueError, match="b.jsonl:2: conversations need a chat template, and"):
        build(path)


def test_many_dropped_tokens_are_warned_of(build, tmp_path):
    path = write(tmp_path / "a.jsonl", ["a" * 90, "b" * 9])
    warned = data.Rows(build(path, overlong="drop", cap=50), "whole", 50, seed=0).describe()
    assert "WARNING: 90% of the tokens are dropped from documents longer than MAX_LENGTH 50" in warned
    assert "WARNING" not in data.Rows(build(path), "whole", 99, seed=0).describe()


def test_colors_of_a_row_end_with_its_pieces():
    """A piece that is cut in a trained text has a label for its last token, but of the next row."""
    labels = [5, 6, 7, data.IGNORE, 9, data.IGNORE]
    marks = show.color_marks(labels, [0, 3])
    assert marks == [(1, show.GREEN), (3, show.PLAIN), (5, show.GREEN)]


def test_colors_of_a_row_end_with_padding(capsys):
    """The last piece is cut, so that its last token has a label, and padding follows."""
    rows = data.Rows(corpus_of_tokens([20]), "none", 6, seed=0)
    row = next(row for row in range(4) if rows.find(row)["length"].sum() == 6)
    show.show_row(rows, row, 4, lambda ids: f"<{len(ids)}>")
    before_padding, _ = capsys.readouterr().out.split("--- padding")
    assert before_padding.rindex(show.PLAIN) > before_padding.rindex(show.GREEN)


def test_named_templates_are_a_part_of_the_key(build, tmp_path):
    path = write(tmp_path / "a.jsonl")
    without = build(path).key
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text(TEMPLATES["tools"])
    with_one = build(path).key
    (folder / "tool_use.jinja").write_text(TEMPLATES["deepseek"])
    assert len({without, with_one, build(path).key}) == 3


def test_no_tools_choose_the_default_template(tmp_path, tokenizer_files):
    tokenizer = tokenizer_files(tmp_path)
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["deepseek"]}
    tokenizer.save_pretrained(tmp_path)
    encode = data.Encoder(str(tmp_path), True, False, False, "split", 0)
    for row in (ONE_TURN, {**ONE_TURN, "tools": []}, {**ONE_TURN, "tools": "[]"}):
        assert Reader(encode)(row).endswith("<|im_start|>assistant\n«Yes<|im_end|>»\n")


def test_a_row_without_a_target_is_counted(build, tmp_path):
    rows = [chat(user("Hi"), assistant("Yes", weight=0)), ONE_TURN]
    made = build(write_jsonl(tmp_path / "a.jsonl", rows))
    assert "2 documents: 0 empty, 1 without a target" in data.Rows(made, "whole", 99, 0).describe()


# ------------------------------------------------------------------------------------------ packing

def greedy(lengths, capacity):
    """The rule of the knapsack: a bin takes the longest that still fits, until none fits."""
    left = sorted(lengths)
    bins = []
    while left:
        taken = []
        free = capacity
        fitting = [length for length in left if length <= free]
        while fitting:
            longest = fitting[-1]
            taken.append(longest)
            left.remove(longest)
            free -= longest
            fitting = [length for length in left if length <= free]
        bins.append(taken)
    return bins


def packed(lengths, capacity):
    """The bins that data.knapsack makes, as lists of lengths."""
    lengths = np.array(lengths)
    indices, first_of_bin = data.knapsack(lengths, capacity)
    assert sorted(indices) == list(range(len(lengths)))
    return [lengths[part].tolist() for part in np.split(indices, first_of_bin[1:])]


@pytest.mark.parametrize("lengths,capacity,bins", [
    ([3, 5, 2, 7, 1, 4], 8, [[7, 1], [5, 3], [4, 2]]),
    ([6, 5, 5, 4, 3, 3, 2], 10, [[6, 4], [5, 5], [3, 3, 2]]),
])
def test_known_knapsacks(lengths, capacity, bins):
    assert greedy(lengths, capacity) == bins
    assert packed(lengths, capacity) == bins


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50))
def test_knapsack_is_the_greedy_rule(lengths, capacity):
    assert sorted(packed(lengths, capacity)) == sorted(greedy(lengths, capacity))


def log_normal(n, mean=2300, sigma=1.2, seed=0):
    lengths = np.random.default_rng(seed).lognormal(math.log(mean) - sigma ** 2 / 2, sigma, n)
    return np.maximum(lengths.astype(np.int64), 1)


def make_corpus(tokens, offsets, targets, lengths):
    return data.Corpus(tokens, offsets, targets, lengths, [(0, len(lengths), 1.0)], "lengths")


def corpus_of_lengths(lengths):
    """Documents of these lengths without tokens, to be packed only."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return make_corpus(None, offsets, lengths - 1, lengths)


def corpus_of_tokens(lengths, untrained=()):
    """Documents of these lengths. Tokens are document * 1000 + position; untrained: such pairs."""
    lengths = np.array(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = [np.arange(n) + 1000 * document for document, n in enumerate(lengths)]
    for document, position in untrained:
        documents[document][position] = ~documents[document][position]
    targets = np.array([data.is_trained(tokens[1:]).sum() for tokens in documents])
    return make_corpus(np.concatenate(documents).astype(np.int32), offsets, targets, lengths)


@pytest.mark.parametrize("capacity", [2**13, 2**17, 2**20])
def test_rows_are_full(capacity):
    rows = data.Rows(corpus_of_lengths(log_normal(100_000)), "whole", capacity, seed=0)
    assert rows.accounting()["fill"] > 0.995


def test_a_million_documents_are_packed_in_seconds():
    corpus = corpus_of_lengths(log_normal(1_000_000))
    began = time.process_time()
    data.Rows(corpus, "whole", 2**17, seed=0)
    assert time.process_time() - began < 6  # 1 to 2 s on a core of its own


def piece_lengths(rows, row):
    return rows.find(row)["length"].tolist()


def test_grouped_documents_waste_less():
    """Useful tokens over tokens, if each row were padded to its longest document."""
    def usefulness(rows):
        tokens = sum(sum(row) for row in rows)
        padded = sum(max(row) * len(row) for row in rows)
        return tokens / padded

    assert usefulness([(2, 9), (3, 7)]) == pytest.approx(0.656, abs=1e-3)
    corpus = corpus_of_tokens([2, 3, 7, 9])
    rows = data.Rows(corpus, "none", 10, seed=0, batch_size=2, grouped_rows=2)
    assert usefulness([piece_lengths(rows, row) for row in range(rows.per_epoch)]) == 0.875


def test_groups_are_steps_in_every_epoch():
    """The rows of a step are of similar length: their mean is near their maximum."""
    rows = data.Rows(corpus_of_lengths(log_normal(1001)), "none", 2**20, seed=0, grouped_rows=8)
    for epoch in range(3):
        first_step = -(-rows.count(epoch) // 8)
        end_step = rows.count(epoch + 1) // 8
        evenness = []
        for step in range(first_step, end_step):
            row_lengths = [sum(piece_lengths(rows, row)) for row in range(8 * step, 8 * step + 8)]
            evenness.append(np.mean(row_lengths) / max(row_lengths))
        assert np.mean(evenness) > 0.85


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 900), st.integers(1, 6), st.integers(0, 9))
def test_grouped_order(n, step, seed):
    """Each document once, the longest first; steps of a stretch are parts of a falling order."""
    lengths = np.random.default_rng(n).integers(1, 10**6, n)
    order = data.group_by_length(lengths, step, np.random.default_rng(seed))
    assert sorted(order) == list(range(n))
    assert lengths[order[0]] == lengths.max()

    stretch_length = max(1, min(n // (4 * step), 50)) * step
    for start in range(stretch_length, n, stretch_length):
        stretch = lengths[order[start:start + stretch_length]]
        steps = [stretch[i:i + step] for i in range(0, len(stretch), step)]
        # The longest document was exchanged with the first one: its step is left out.
        steps = [documents for documents in steps if lengths.max() not in documents]
        steps.sort(key=lambda documents: -documents[0])
        joined = np.concatenate(steps) if steps else np.array([])
        assert (np.diff(joined) <= 0).sum() >= len(joined) - 3


# --------------------------------------------------------------------------------- rows and batches

random_lengths = st.lists(st.integers(0, 30), min_size=1, max_size=40)
random_corpora = given(
    random_lengths.filter(lambda lengths: sum(lengths) > len(lengths)),
    st.integers(4, 24),
    st.sampled_from(["split", "whole", "none"]),
    st.integers(1, 3),
    st.integers(0, 3),
)


@settings(deadline=None, max_examples=150)
@random_corpora
def test_an_epoch_is_every_token_once(lengths, max_length, packing, batch_size, seed):
    """No token is in two rows, and a target is the next token of its own document."""
    positions = [(document, t) for document, n in enumerate(lengths) for t in range(n)]
    untrained = [(document, t) for document, t in positions if (document * 7 + t) % 5 == 0]
    rows = data.Rows(corpus_of_tokens(lengths, untrained), packing, max_length, seed, batch_size)
    capacity = max_length * batch_size if packing == "none" else max_length

    seen = []
    n_targets = 0
    for row in range(rows.per_epoch):
        batch = rows.batch(row, 1, 0)
        T = len(batch.input_ids)
        assert T <= capacity
        assert batch.cu_seqlens[-1] == T
        assert batch.max_seqlen == batch.cu_seqlens.diff().max() <= max_length
        edges = batch.cu_seqlens.tolist()
        for start, end in zip(edges, edges[1:]):
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            assert len(set((batch.input_ids[start:end] // 1000).tolist())) == 1
        has_target = batch.labels != data.IGNORE
        assert (batch.labels[has_target] == batch.input_ids[has_target] + 1).all()
        seen += batch.input_ids.tolist()
        n_targets += int(has_target.sum())

    assert sorted(seen) == sorted(1000 * document + t for document, t in positions)
    targets = [(document, t) for document, t in set(positions) - set(untrained) if t > 0]
    counts = rows.accounting()
    assert counts["tokens"] == sum(lengths)
    assert counts["tokens"] == counts["trained"] + counts["masked"] + counts["dropped"]
    assert counts["trained"] == n_targets == len(targets)
    assert counts["padding"] >= 0
    assert counts["rows"] * capacity == counts["trained"] + counts["masked"] + counts["padding"]


def test_unpacked_documents_are_segments_with_any_attention():
    """A row of several documents may be longer than MAX_LENGTH, so positions restart in each."""
    rows = data.Rows(corpus_of_tokens([5, 4, 6]), "none", 6, seed=0, batch_size=3,
                     use_varlen_attn=False)
    batch = rows.batch(0, 1, 0)
    assert sorted(batch.cu_seqlens.diff().tolist()) == [4, 5, 6]
    assert int(batch.position_ids.max()) == 5


def without_padding(ids):
    """The ids up to the last that is not 0. Padding is 0, as is the first token of document 0."""
    ids = torch.cat(ids)
    return ids[:int(ids.nonzero().max()) + 1].tolist() if ids.any() else []


def rows_of_step(rows, step, dp, sp, total):
    """The sorted input_ids of a step of 4 rows, put together from the shards of all ranks."""
    found = []
    for dp_rank in range(dp):
        shards = [rows.step(step, 4, dp, dp_rank, sp, sp_rank, total) for sp_rank in range(sp)]
        assert {len(batches) for batches in shards} == {4 // dp}
        for batches in zip(*shards):
            found.append(without_padding([batch.input_ids for batch in batches]))
    return sorted(found)


@settings(deadline=None, max_examples=60)
@random_corpora
def test_the_same_rows_for_any_ranks(lengths, max_length, packing, batch_size, seed):
    rows = data.Rows(corpus_of_tokens(lengths), packing, max_length, seed, batch_size)
    total = rows.count(2.5)
    for step in range(1, -(-total // 4) + 1):
        expected = []
        for row in range(4 * step - 4, 4 * step):
            if row < total:
                expected.append(without_padding([rows.batch(row, 1, 0).input_ids]))
            else:
                expected.append([])
        for dp, sp in ((1, 1), (2, 1), (4, 1), (2, 2)):
            assert rows_of_step(rows, step, dp, sp, total) == sorted(expected)


@pytest.mark.parametrize("loss_weight,weight_of_document", [
    ("token", lambda n_targets: n_targets),
    ("sample", lambda n_targets: 1),
    ("square", lambda n_targets: n_targets ** 0.5),
])
def test_weights_of_targets(loss_weight, weight_of_document):
    """Their sum over a document, also where rows and shards cut it; 0 where there is no target."""
    lengths = [1, 2, 9, 40, 17]
    untrained = [(3, t) for t in range(10)]
    n_targets = [0, 1, 8, 30, 16]
    corpus = corpus_of_tokens(lengths, untrained)
    rows = data.Rows(corpus, "split", 12, seed=0, loss_weight=loss_weight)
    weights = np.zeros(len(lengths))
    for row in range(rows.per_epoch):
        for sp_rank in range(5):
            batch = rows.batch(row, 5, sp_rank)
            assert (batch.weights[batch.labels == data.IGNORE] == 0).all()
            np.add.at(weights, batch.input_ids.numpy() // 1000, batch.weights.numpy())
    expected = [weight_of_document(n) if n > 0 else 0 for n in n_targets]
    assert weights == pytest.approx(expected, rel=1e-6)


def corpus_seen_in_part(lengths, epochs):
    """Documents of which an epoch has a part."""
    return corpus_of_tokens(lengths)._replace(sources=[(0, len(lengths), epochs)])


@pytest.mark.parametrize("packing", ["split", "whole", "none"])
def test_an_epoch_may_have_no_document(packing):
    """One document, seen 0.6 times an epoch, is in the first, the third and the fifth."""
    rows = data.Rows(corpus_seen_in_part([40], 0.6), packing, 16, seed=0)
    assert [rows.size(epoch) for epoch in range(5)] == [3, 0, 3, 0, 3]
    assert rows.count(3) == 6
    tokens = sum(len(rows.batch(row, 1, 0).input_ids) for row in range(6))
    assert tokens == 2 * 40
    with pytest.raises(ValueError, match="the first epoch of DATA or EVAL_DATA holds no token: raise"):
        data.Rows(corpus_seen_in_part([40], 0.1), packing, 16, seed=0)


@pytest.mark.parametrize("n,epochs,rows", [
    (100, 1.1, 110), (50, 1.1, 55), (50, 2.2, 110), (100, 2.2, 220), (3, 0.5, 2), (7, 1.0, 7)])
def test_rows_of_a_fraction_of_epochs(n, epochs, rows):
    assert data.Rows(corpus_of_tokens([8] * n), "split", 8, seed=0).count(epochs) == rows


def test_the_first_epoch_has_all_orders_alike():
    """Among 3 documents in 600 runs, each of the 6 orders."""
    orders = collections.Counter()
    for seed in range(600):
        rows = data.Rows(corpus_of_tokens([4] * 3), "split", 12, seed=seed, use_varlen_attn=False)
        orders[tuple(rows.find(0)["document"])] += 1
    assert len(orders) == 6
    assert min(orders.values()) > 60


def test_epochs_differ_and_repeat():
    rows = data.Rows(corpus_of_tokens([5] * 30), "whole", 16, seed=3)
    same = data.Rows(corpus_of_tokens([5] * 30), "whole", 16, seed=3)
    n = rows.per_epoch
    batches = [rows.batch(row, 1, 0).input_ids.tolist() for row in range(2 * n)]
    assert batches == [same.batch(row, 1, 0).input_ids.tolist() for row in range(2 * n)]
    assert batches[:n] != batches[n:]
    assert sorted(sum(batches[:n], [])) == sorted(sum(batches[n:], []))


def exchanged_and_imbalance(lengths, ranks):
    """Return the share of tokens in documents that cross a border between shards, and how far the
    rank with the most attention is above the mean. The work of crossing documents is divided."""
    shard = lengths.sum() / ranks
    ends = np.cumsum(lengths)
    first_rank = ((ends - lengths) / shard).astype(int)
    last_rank = ((ends - 1) / shard).astype(int)
    crosses = first_rank < last_rank
    work = np.bincount(first_rank[~crosses], lengths[~crosses] ** 2.0, minlength=ranks)
    work += (lengths[crosses] ** 2).sum() / ranks
    return lengths[crosses].sum() / lengths.sum(), work.max() / work.mean() - 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_order_of_documents_suits_the_shards(ranks):
    """On rows of log-normal documents, a median of 2k in 128k, against a random order."""
    rng = np.random.default_rng(0)
    ordered = []
    unordered = []
    for _ in range(30):
        lengths = rng.lognormal(math.log(2048), 1.2, 50).astype(np.int64)
        order = data.order_for_shards(lengths)
        assert sorted(order) == list(range(50))
        ordered.append(exchanged_and_imbalance(lengths[order], ranks))
        unordered.append(exchanged_and_imbalance(lengths, ranks))
    _, imbalance = np.mean(ordered, axis=0)
    _, imbalance_unordered = np.mean(unordered, axis=0)
    assert imbalance < 0.6 * imbalance_unordered


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_equal_documents_do_not_cross(ranks):
    lengths = np.full(16, 8192)
    order = data.order_for_shards(lengths)
    assert exchanged_and_imbalance(lengths[order], ranks) == (0, 0)


def test_ranks_get_even_work():
    """The excess of the slowest of 8 ranks over the mean is a third, at most, of what it is when
    the same rows are dealt in their order."""
    dp = 8
    global_batch_size = 32
    rows = data.Rows(corpus_of_lengths(log_normal(100_000, sigma=1.8)), "whole", 2**17, seed=0)
    work = np.array([(rows.find(row)["length"] ** 2).sum() for row in range(rows.per_epoch)])
    rows.batch = lambda row, sp, sp_rank: row

    dealt_evenly = []
    dealt_in_order = []
    for step in range(1, 1 + min(100, rows.per_epoch // global_batch_size)):
        dealt = [rows.step(step, global_batch_size, dp, rank, 1, 0, 10**9) for rank in range(dp)]
        first = (step - 1) * global_batch_size
        end = first + global_batch_size
        assert sorted(sum(dealt, [])) == list(range(first, end))
        assert {len(mine) for mine in dealt} == {global_batch_size // dp}

        even_loads = [work[mine].sum() for mine in dealt]
        ordered_loads = [work[first + rank:end:dp].sum() for rank in range(dp)]
        dealt_evenly.append(max(even_loads) / np.mean(even_loads) - 1)
        dealt_in_order.append(max(ordered_loads) / np.mean(ordered_loads) - 1)
    assert np.mean(dealt_evenly) < np.mean(dealt_in_order) / 3


# ------------------------------------------------------------------------------------ tools/show.py

def test_rows_can_be_looked_at(tmp_path, tokenizer_files, hf_folder, capsys, monkeypatch):
    folder, _ = hf_folder(vocab_size=260, eos_token_id=0, bos_token_id=None)
    tokenizer_files(folder)
    longer = chat(user("So"), assistant("No"), user("Why"), assistant("Therefore"))
    path = write_jsonl(tmp_path / "chat.jsonl", [ONE_TURN, longer])
    monkeypatch.chdir(tmp_path)
    for name in train.CONSTANTS:
        monkeypatch.setattr(train, name, getattr(train, name))

    show.main([f"MODEL={folder}", f"DATA={path}", f"CACHE_DIR={tmp_path}/cache", "PACKING=whole",
               "MAX_LENGTH=256", "SEQUENCE_PARALLEL_SIZE=2", "SHOW=0", "--lengths"])
    printed = capsys.readouterr().out
    assert "2 documents" in printed
    assert "--- document 0" in printed
    assert "--- document 1" in printed
    assert "shard of rank 1" in printed
    assert "\033[32mYes<|im_end|>\033[0m" in printed
    assert "\033[32mTherefore<|im_end|>\033[0m" in printed
    assert "Hi" in printed
    assert "\033[32mHi" not in printed
    assert "--- padding" not in printed
    assert (tmp_path / "lengths.png").stat().st_size > 5000

    show.main(["SEQUENCE_PARALLEL_SIZE=8", "SHOW=0"])
    assert "--- padding" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Tokenizers whose code is in the folder


def remote_tokenizer(folder, tokenizer_class):
    """A folder whose tokenizer is said to need code that is in the folder."""
    auto_map = {"AutoTokenizer": ["tokenization.T", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": tokenizer_class, "auto_map": auto_map, "add_bos_token": True,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "internlm2", "auto_map": {"AutoConfig": "configuration.C"}}))
    for name in ("tokenization.py", "configuration.py"):
        (folder / name).write_text("raise SystemExit('this code must not run')")


def test_a_tokenizer_that_needs_its_own_code_is_refused(tmp_path):
    remote_tokenizer(tmp_path, "QWenTokenizer")
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n")
    message = "put a tokenizer.json beside it, or use rows of input_ids"
    with pytest.raises(ValueError, match=message) as error:
        data.open_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_a_tokenizer_model_is_read_as_sentencepiece_reads_it(tmp_path, dummy_prefix):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    corpus = Path(data.__file__)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=500,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=dummy_prefix, minloglevel=2)
    remote_tokenizer(tmp_path, "InternLM2Tokenizer")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = data.open_tokenizer(tmp_path)
    for text in ("hello world", "  two spaces", "caf\u00e9\n\n\u6f22", corpus.read_text()[:5000]):
        assert tokenizer(text).input_ids == [model.bos_id(), *model.encode(text)]
