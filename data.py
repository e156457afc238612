"""From files to micro-batches: formats, chat masks, the token cache, packing and order.

A row of a file is one example: a text or a conversation. It is tokenized once into a document, and
the documents are stored in a memory-mapped cache. A row of the run holds up to MAX_LENGTH tokens:
pieces of documents, side by side. The rows of a step depend on the seed and the step alone. Ranks
appear as integers only: how many there are, and which one asks for its shard of a row.
"""
import bisect
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

IGNORE = -100  # the label of a position without a target


class Batch(NamedTuple):
    """One micro-batch in CPU memory: a flat row of T tokens, or the t = T/P of one of P ranks."""
    input_ids: torch.Tensor     # (t,) int64
    labels: torch.Tensor        # (t,) int64: the next token of the same document, or IGNORE
    position_ids: torch.Tensor  # (t,) int64: position in the segment
    cu_seqlens: torch.Tensor    # (n+1,) int32: boundaries of the segments of the whole row
    max_seqlen: int             # length of the longest segment of the whole row
    weights: torch.Tensor       # (t,) float32: LOSS_WEIGHT of each target, 0 where there is none
    sources: torch.Tensor       # (t,) int64: index in DATA of the source of each token; 0: padding
    checksum: int               # of the tokens of the whole row


# ---------------------------------------------------------------- trained and untrained tokens
# A token that is not trained, such as one of a question, is stored as the complement ~id of its
# id. Ids are not negative and complements are, so one int32 array holds the ids and the loss mask.
# In this file, `tokens` are stored in this way, and `ids` are plain.

NO_TARGET = ~0  # an untrained token, used as the next token where a document has none


def mask(tokens):
    """Returns the tokens marked as untrained."""
    return np.minimum(tokens, ~tokens)


def token_ids(tokens):
    """Returns the plain ids of tokens, trained or not."""
    return np.maximum(tokens, ~tokens)


def is_trained(tokens):
    return tokens >= 0


# ---------------------------------------------------------------------------------------- files

DATA_FILE = re.compile(r"\.(jsonl|json|parquet)(\.gz)?$")


def find_files(data):
    """Returns a sorted list of files for each source of DATA, and the epochs of each source.

    DATA is a source, a list of sources, or {source: epochs}. A source is a path, glob or folder.
    """
    if isinstance(data, str):
        epochs_of_source = {data: 1.0}
    elif isinstance(data, dict):
        epochs_of_source = data
    else:
        epochs_of_source = dict.fromkeys(data, 1.0)

    sources = []
    for source, epochs in epochs_of_source.items():
        # A set, because a glob such as books/** finds both a folder and the files in it.
        files = set()
        for path in map(Path, glob.glob(source, recursive=True)):
            if path.is_dir():
                files.update(file for file in path.rglob("*") if DATA_FILE.search(file.name))
            else:
                files.add(path)
        unknown = sorted(file.name for file in files if not DATA_FILE.search(file.name))
        if unknown or not files:
            found = unknown[0] if unknown else "no file"
            raise ValueError(f"DATA {source!r} matches {found}: name files whose names end with "
                             ".json, .jsonl or .parquet, or with one of these and .gz")
        if not epochs > 0:
            raise ValueError(f"DATA {source!r} is set to {epochs} epochs: use more than 0")
        sources.append(sorted(str(file) for file in files))
    return sources, list(epochs_of_source.values())


@contextmanager
def naming(what):
    """Turns any error in the body into a ValueError whose message begins with `what`."""
    try:
        yield
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        raise ValueError(f"{what}: {kind}{error}") from error


def read_rows(path):
    """Yields (place, row) for each row of a file. A place is path:line, or path:number of the row.

    A row of a .jsonl file is its unparsed line (bytes), and others are objects.
    """
    open_file = gzip.open if path.endswith(".gz") else open
    with naming(path), open_file(path, "rb") as file:
        beginning = file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")  # after a byte order mark
        if path.removesuffix(".gz").endswith(".parquet"):
            rows = read_parquet(file)
        elif beginning.startswith(b"["):
            rows = parse_json(file.read(), "the file must be one JSON array in UTF-8; fix it")
        else:
            rows = file  # its lines; parsing them is left to the worker processes

        for number, row in enumerate(rows, 1):
            is_blank = isinstance(row, bytes) and not row.strip()
            if not is_blank:
                yield f"{path}:{number}", row


def read_parquet(file):
    from pyarrow import parquet

    for batch in parquet.ParquetFile(file).iter_batches(1000):
        yield from batch.to_pylist()


def parse_json(content, rule):
    """Returns the object that bytes hold. The error message ends with the rule."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{type(error).__name__} {error}: {rule}") from error


# -------------------------------------------------------------------------------------- formats

# Each format is named by the keys that an example must have.
FORMATS = ("text", "messages", "conversations", "instruction output", "prompt completion",
           "input_ids")
CHAT_FORMATS = ("messages", "conversations", "instruction output")

# The names of roles in files (of OpenAI, then of ShareGPT), and those that chat templates expect.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

# The text before and after this character is tokenized separately. Unicode keeps it for internal
# use (a "noncharacter"), so it has no place in the texts of the data.
BOUNDARY = "\ufdd0"
TEXT_PART = re.compile(f"[^{BOUNDARY}]+")
NOT_TEXT = re.compile(f"[{BOUNDARY}\ud800-\udfff]")


def is_chat(data):
    """Returns whether the first row of a source of DATA is a conversation."""
    sources, _ = find_files(data)
    for files in sources:
        for place, row in itertools.islice(read_rows(files[0]), 1):
            with naming(place):
                example = parse_json(row, "fix the line") if isinstance(row, bytes) else row
                if find_format(example) in CHAT_FORMATS:
                    return True
    return False


def find_format(example):
    """Returns the one of FORMATS that the keys of an example match."""
    found = [kind for kind in FORMATS if example.keys() >= set(kind.split())]
    if len(found) != 1:
        matches = " and ".join(map(repr, found)) if found else "no format"
        raise ValueError(f"keys {sorted(example)} match {matches}: a row must be a JSON object "
                         f"with the keys of exactly one of {FORMATS}")
    return found[0]


def read_input_ids(example):
    """Returns the tokens of an example that is tokenized already. Its labels are not shifted."""
    ids = example["input_ids"]
    labels = example.get("labels", ids)
    if len(ids) != len(labels):
        raise ValueError(f"there are {len(labels)} labels for {len(ids)} input_ids: give each "
                         "token one label")
    tokens = []
    for token, label in zip(ids, labels):
        is_id = type(token) is int and 0 <= token < 2**31
        if not is_id or label not in (token, IGNORE):
            raise ValueError(f"input_ids has {token!r} where labels has {label!r}: an id must be "
                             "an integer, and a label must be the id at its own place, not the "
                             f"next one, or {IGNORE}")
        tokens.append(token if label == token else ~token)
    return np.array(tokens, np.int32)


def to_messages(example, kind):
    """Returns the messages of a conversation as chat templates expect them.

    kind is "messages" (OpenAI), "conversations" (ShareGPT) or "instruction output" (alpaca). Each
    message also has the key "trained": whether it is to be trained, if it is the assistant's.
    """
    if kind == "instruction output":
        turns = alpaca_turns(example)
    else:
        turns = list(example[kind])
    if example.get("system"):
        turns.insert(0, {"role": "system", "content": example["system"]})

    messages = []
    for i, turn in enumerate(turns):
        with naming(f"message {i}, {json.dumps(turn)[:60]}"):
            messages.append(to_message(turn))
    return messages


def alpaca_turns(example):
    question = "\n".join(filter(None, [example["instruction"], example.get("input")]))
    pairs = list(example.get("history") or [])
    pairs.append((question, example["output"]))

    turns = []
    for asked, answered in pairs:
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answered})
    return turns


def to_message(turn):
    """Returns one turn of OpenAI's or ShareGPT's format as a message that chat templates expect."""
    # A table such as .parquet has every column in every row: null is the same as a missing key.
    message = {key: value for key, value in turn.items() if value is not None}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if content is None and message.get("tool_calls"):
        content = ""

    if role == "function_call":  # ShareGPT: the content is one call, or a list of them
        calls = json.loads(content)
        if not isinstance(calls, list):
            calls = [calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        content = ""
    for call in message.get("tool_calls", ()):
        # OpenAI gives the arguments as a string of JSON, and chat templates expect an object.
        function = call["function"]
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
    if isinstance(content, list):
        content = join_parts(content)

    trained = message.get("train", message.get("loss", message.get("weight", 1)))
    if role not in ROLES:
        raise ValueError(f"role {role!r} is unknown: use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"content {content!r} is not text: give a string or a list of text parts")
    if trained not in (0, 1):
        raise ValueError(f"train, loss or weight is {trained!r}: use 0 or 1")
    return {**message, "role": ROLES[role], "content": content, "trained": trained}


def join_parts(parts):
    """Returns the text of a list of content parts."""
    for part in parts:
        if "text" not in part:
            raise ValueError(f"content part {json.dumps(part)[:60]} has no 'text': only text can "
                             "be trained; remove the part or the row")
    # Parts are tokenized separately, so that two of them never form a control token.
    return BOUNDARY.join(part["text"] for part in parts)


# ------------------------------------------------------------------------ chat: what is trained
# The trained part of a conversation is what the chat template writes for the assistant after the
# generation prompt, including the token that ends the turn. If the template has generation
# markers, they say where that is in the text. Otherwise it is found by rendering the first
# messages alone, as their text should be a prefix of the text of the whole conversation.

class ControlTokens(NamedTuple):
    """Tokens such as <|im_end|>, which the chat template may write and a user may not."""
    ids: list            # of all of them
    texts: list          # the longest first, as one may be the beginning of another
    pattern: re.Pattern  # matches any of them


def open_tokenizer(folder):
    """Returns the tokenizer of a Hugging Face folder. Code that is in the folder is not run.

    Raises ValueError if the tokenizer cannot be read without it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    model_file = folder / "tokenizer.model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if model_file.exists() and not (folder / "tokenizer.json").exists():
            read_as_sentencepiece(tokenizer.backend_tokenizer, model_file)
    except Exception as error:
        raise ValueError(
            f"The tokenizer of {folder} cannot be read, and code that is in the folder is not run: "
            f"put a tokenizer.json beside it, or use rows of input_ids. ({error})") from error
    return tokenizer


def read_as_sentencepiece(backend, model_file):
    """Makes a tokenizers.Tokenizer split text as sentencepiece does with its `model_file`.

    transformers 5 leaves out the space before a text where it does not know the tokenizer's class.
    """
    import sentencepiece
    from tokenizers import normalizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))

    def agrees():
        for text in ("a word", " a  b", "a\n\tb", "1234 \u00e9\u6f22", "x = f(y)"):
            if backend.encode(text, add_special_tokens=False).ids != model.encode(text):
                return False
        return True

    if not agrees():
        space = "\u2581"
        steps = [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        backend.normalizer = normalizers.Sequence(steps)
        backend.pre_tokenizer = None
    if not agrees():
        raise ValueError("transformers reads tokenizer.model differently from sentencepiece")


def control_tokens(tokenizer):
    ids = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            ids[token.content] = token_id
    texts = sorted(ids, key=len, reverse=True)
    matches_nothing = "(?!)"
    pattern = re.compile("|".join(map(re.escape, texts)) or matches_nothing)
    return ControlTokens(list(ids.values()), texts, pattern)


def split_control_tokens(example, control):
    """Returns an example with a BOUNDARY in every control token that its texts contain."""
    # Values that JSON cannot hold, such as the bytes of an image, become null.
    written = json.dumps(example, ensure_ascii=False, default=lambda value: None)
    if NOT_TEXT.search(written):
        raise ValueError(f"the row contains {BOUNDARY!r} or half of a surrogate pair, which are "
                         "no text: remove them")

    def split(match):
        token = match[0]
        return token[0] + BOUNDARY + token[1:]

    return json.loads(control.pattern.sub(split, written))


def write_tools_as_text(messages, tools, template):
    """Returns the messages, with tools and tool calls as text where the template omits them."""
    if tools and "tools" not in template:
        lines = ["Tools:", as_json_lines(tools)]
        if messages[0]["role"] == "system":
            lines.insert(0, messages[0]["content"])
            messages = messages[1:]
        messages = [{"role": "system", "content": "\n".join(lines)}, *messages]
    if "tool_calls" not in template:
        for message in messages:
            calls = message.pop("tool_calls", ())
            message["content"] += as_json_lines(call["function"] for call in calls)
    return messages


def as_json_lines(objects):
    return "\n".join(json.dumps(item, ensure_ascii=False) for item in objects)


def find_answers(text, marked, messages, render, mask_history, control):
    """Returns the spans (start, end) of the text to train, one for each chosen assistant turn.

    marked: the spans of the generation markers; None if the template has none.
    render: see Encoder.write_chat.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    candidates = answers[-1:] if mask_history else answers
    chosen = [i for i in candidates if messages[i]["trained"]]
    if not chosen:
        raise ValueError(f"0 of {len(answers)} assistant turns are to be trained: add one, or "
                         "remove the row")
    if marked is not None and len(marked) != len(answers):
        raise ValueError(f"the generation markers of the chat template enclose {len(marked)} of "
                         f"{len(answers)} assistant turns: correct them, or remove them all")

    spans = []
    for i in chosen:
        through_turn, _ = render(i + 1)
        through_turn = through_turn.rstrip()  # white space after the end of the turn is no answer
        if marked is not None:
            start, end = marked[answers.index(i)]
        else:
            start = find_start(text, i, render, control)
            end = len(through_turn) if text.startswith(through_turn) else start
        end = find_end(text, start, end, through_turn, control)
        if end <= start:
            raise ValueError(f"message {i}: the chat template writes it differently when other "
                             "messages follow: set MASK_HISTORY=True")
        spans.append((start, end))
    return spans


def find_start(text, i, render, control):
    """Returns where the answer of turn i begins in the text; len(text) if it is not found."""
    prompt, _ = render(i, add_generation_prompt=True)
    start = len(prompt) if text.startswith(prompt) else len(text)
    if start < len(text) or i == 0:
        return start

    # The generation prompt may open a thought that this answer does not have. The answer then
    # begins after the last line break or control token that is common to both texts.
    history, _ = render(i)
    if not text.startswith(history):
        return len(text)
    common = os.path.commonprefix([text, prompt])
    candidates = [match.end() for match in control.pattern.finditer(common)]
    return max([common.rfind("\n") + 1, *candidates])


def find_end(text, start, end, through_turn, control):
    """Returns the end of a span, moved to include the token that ends the turn.

    through_turn is the text up to and including the turn. Returns start if the end is not found.
    """
    end_of_turn = ""
    for token in control.texts:
        if through_turn.endswith(token):
            end_of_turn = token
            break
    if text[start:end].rstrip().endswith(end_of_turn):
        return end

    # Generation markers may not include the end of the turn. And a template may write a turn
    # differently once others follow, as that of Qwen3 removes earlier thoughts. The turn then ends
    # at the next control token, if through_turn ends with the same text.
    match = control.pattern.search(text, end)
    if match and through_turn.endswith(text[start:match.end()]):
        return match.end()
    return start


# ------------------------------------------------------------------------------------- encoding

class Encoder:
    """Turns examples into tokens with the tokenizer and chat template of a Hugging Face folder.

    cap: the number of tokens above which OVERLONG applies, unless OVERLONG is "split".
    """

    def __init__(self, folder, append_eos, train_on_prompt, mask_history, overlong, cap):
        tokenizer = open_tokenizer(folder)
        # Many tokenizers have a bos token, and only some begin a text with it.
        begins_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token if begins_with_bos else ""
        self.eos = tokenizer.eos_token if append_eos and tokenizer.eos_token else ""
        self.control = control_tokens(tokenizer)
        self.train_on_prompt = train_on_prompt
        self.mask_history = mask_history
        self.overlong = overlong
        self.cap = cap
        # Where every token is trained, answers need not be located, unless truncate_middle must
        # know them: it removes nothing of an answer.
        self.locates_answers = not train_on_prompt or overlong == "truncate_middle"

    def __call__(self, example):
        """Returns the tokens (int32) of an example, and their number before OVERLONG."""
        if not isinstance(example, dict):
            example = {}
        example = {key: value for key, value in example.items() if value is not None}
        kind = find_format(example)
        if kind == "input_ids":
            tokens = read_input_ids(example)
        else:
            text, spans = self.write(example, kind)
            tokens = self.encode(text, spans)

        start, end = range_to_remove(tokens, self.overlong, self.cap, self.control.ids)
        kept = tokens
        if self.train_on_prompt and kind != "input_ids":
            kept = token_ids(kept)
        if end > start:
            kept = np.delete(kept, slice(start, end))
            if start < len(kept):  # the tokens that led to this one are gone: it is no target
                kept[start] = mask(kept[start])
        return kept, len(tokens)

    def write(self, example, kind):
        """Returns an example as text, and the spans (start, end) of it to train; None for all."""
        example = split_control_tokens(example, self.control)
        if kind in ("text", "prompt completion"):
            return self.write_text(example, kind)
        messages = to_messages(example, kind)
        return self.write_chat(messages, example.get("tools"))

    def write_text(self, example, kind):
        for key in kind.split():
            if not isinstance(example[key], str):
                raise ValueError(f"{key} {str(example[key])[:60]} is not a string: text, prompt "
                                 "and completion must be strings; fix or remove the row")
        if kind == "text":
            prompt = ""
            answer = example["text"]
        else:
            prompt = example["prompt"]
            answer = example["completion"]
        if not prompt and not answer:
            return "", None

        # The boundaries keep control tokens from forming where two of these texts meet.
        context = self.bos + BOUNDARY + prompt + BOUNDARY
        text = context + answer + BOUNDARY + self.eos
        if prompt and self.locates_answers:
            return text, [(len(context), len(text))]
        return text, None

    def write_chat(self, messages, tools):
        from transformers.utils.chat_template_utils import render_jinja_template

        if isinstance(tools, str):
            tools = json.loads(tools or "null")
        template = self.tokenizer.get_chat_template(None, tools)
        messages = write_tools_as_text(messages, tools, template)
        # Templates expect the tools as OpenAI writes them. ShareGPT gives the functions alone.
        functions = []
        for tool in tools or ():
            functions.append(tool if "function" in tool else {"type": "function", "function": tool})
        has_markers = re.search(r"{%-?\s*generation\b", template) is not None

        def render(n_messages, add_generation_prompt=False):
            """Returns the text of the first messages, and the spans of the generation markers."""
            with naming(f"the chat template, up to message {n_messages - 1}"):
                texts, marked = render_jinja_template(
                    [messages[:n_messages]],
                    functions or None,
                    chat_template=template,
                    return_assistant_tokens_mask=has_markers,
                    add_generation_prompt=add_generation_prompt,
                    **self.tokenizer.special_tokens_map,
                )
            return texts[0], marked[0] if has_markers else None

        text, marked = render(len(messages))
        if not self.locates_answers:
            return text, None
        spans = find_answers(text, marked, messages, render, self.mask_history, self.control)
        return text, spans

    def encode(self, text, spans):
        """Returns the tokens of a text, trained inside the spans only, or everywhere if None."""
        # A span is tokenized separately from the text before it, as in use, where the model
        # continues a prompt that was tokenized without the answer.
        edges = {0, len(text)}
        for span in spans or ():
            edges.update(span)

        parts = [np.array([], np.int32)]
        for start, end in itertools.pairwise(sorted(edges)):
            trained = spans is None or any(a <= start < b for a, b in spans)
            for part in TEXT_PART.finditer(text, start, end):
                # The text has its bos and eos already, or the template decides about them.
                backend = self.tokenizer.backend_tokenizer
                encoding = backend.encode(part[0], add_special_tokens=False)
                ids = np.array(encoding.ids, np.int32)
                parts.append(ids if trained else mask(ids))
        return np.concatenate(parts)


def range_to_remove(tokens, overlong, cap, control_ids):
    """Returns (start, end): OVERLONG removes tokens[start:end] of a document."""
    n = len(tokens)
    extra = n - cap
    if overlong == "split" or extra <= 0:
        return 0, 0
    if overlong == "truncate":
        return cap, n
    if overlong == "drop":
        return 0, n

    # "truncate_middle" removes from the middle of a text, or of the longest part of a conversation
    # that is inside one turn and not trained. There 8 tokens must remain at both ends.
    trained = is_trained(tokens)
    is_chat = not trained[1:].all()
    if is_chat:
        removable = ~trained & ~np.isin(token_ids(tokens), control_ids)
        margin = 8
    else:
        removable = trained
        margin = 0
    start, end = longest_run(removable)
    if end - start < extra + 2 * margin:
        return 0, n  # it cannot be shortened in this way, and is dropped
    middle = (start + end - extra) // 2
    return middle, middle + extra


def longest_run(flags):
    """Returns (start, end) of the first longest run of True; (0, 0) if there is none."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    starts = edges[0::2]
    ends = edges[1::2]
    if len(starts) == 0:
        return 0, 0
    longest = np.argmax(ends - starts)
    return int(starts[longest]), int(ends[longest])


# ---------------------------------------------------------------------------------- token cache

CACHE_VERSION = 5  # part of every key: raise it when the same files would give other tokens
TOKENIZER_FILE = re.compile("token|vocab|merges|template")
HASHES = 2**32
BLOCK_BYTES = 8 * 2**20  # what a core tokenizes at a time, as the data may be larger than memory

# The record of one document in documents.bin.
DOCUMENT = np.dtype([
    ("length", np.int64),
    ("targets", np.int64),      # trained tokens, except the first, which no token precedes
    ("full_length", np.int64),  # before OVERLONG
    ("largest_id", np.int64),
    ("source", np.int64),       # index of its source in DATA
    ("hash", np.int64),         # of its row, from 0 to below HASHES
])


class Corpus(NamedTuple):
    """Tokenized documents, memory-mapped. Document i is tokens[offsets[i]:offsets[i + 1]].

    If the key is "synthetic", documents are random, and `tokens` is the size of the vocabulary.
    """
    tokens: np.ndarray   # int32; see `mask`
    offsets: np.ndarray  # (documents + 1,) int64
    targets: np.ndarray  # (documents,) int64: trained tokens, except the first of a document
    full: np.ndarray     # (documents,) int64: lengths before OVERLONG
    sources: list        # (first document, last + 1, epochs) of each source
    key: str             # hash of files, tokenizer and settings; or "synthetic"
    hashes: np.ndarray = None    # (documents,) int64 below HASHES, of the rows of the files
    selected: np.ndarray = None  # (documents,) bool: those that this run uses; None: all

    def read(self, document, start, end):
        """Returns tokens [start, end) of a document; fewer if the document ends before."""
        first, last = self.offsets[document:document + 2]
        if self.key == "synthetic":
            generator = np.random.default_rng(int(document))
            tokens = generator.integers(0, self.tokens, last - first, np.int32)
            return tokens[start:end]
        return self.tokens[first + start:min(first + end, last)]


def build_corpus(data, folder, cache, *settings, vocab_size=None):
    """Returns the Corpus of DATA, tokenized with the tokenizer of a Hugging Face folder.

    settings: the arguments of Encoder after the folder.
    """
    sources, epochs = find_files(data)
    key = cache_key(sources, folder, cache, settings)
    home = Path(cache) / key
    # The first process tokenizes and the others wait for this lock. They do so before the process
    # group exists, where no collective can time out.
    with FileLock(home.with_suffix(".lock")):
        if not home.exists():
            tokenize(sources, home, (str(folder), *settings))

    documents = np.fromfile(home / "documents.bin", DOCUMENT)
    if not documents["targets"].any():
        raise ValueError(f"DATA {data} holds no token to train: name other files")
    largest = documents["largest_id"].max()
    if vocab_size and largest >= vocab_size:
        raise ValueError(f"token {largest} is beyond the vocabulary of {vocab_size} tokens: use "
                         "the tokenizer of the model")

    # Documents are stored in the order of their sources.
    ends = np.searchsorted(documents["source"], range(len(sources)), "right").tolist()
    firsts = [0, *ends[:-1]]
    return Corpus(
        tokens=np.memmap(home / "tokens.bin", np.int32, "r"),
        offsets=np.insert(np.cumsum(documents["length"]), 0, 0),
        targets=documents["targets"],
        full=documents["full_length"],
        sources=list(zip(firsts, ends, epochs)),
        key=key,
        hashes=documents["hash"],
    )


def hold_out(corpus, share):
    """Splits the documents of a Corpus: returns one without, and one with this share of them.

    A document is held out because of the hash of its row alone. So equal rows stay together, and
    the same ones are held out with another tokenizer, other settings and further files.
    """
    held_out = corpus.hashes < share * HASHES
    for part, name in ((held_out, "holds out"), (~held_out, "leaves")):
        if not corpus.targets[part].any():
            raise ValueError(f"EVAL_DATA {share} {name} no token to train of {len(held_out)} "
                             "documents: use another share, or name a file")
    training = corpus._replace(selected=~held_out, key=f"{corpus.key} without {share}")
    # Each document that is held out is evaluated once, whatever the epochs of its source.
    sources = [(first, end, 1.0) for first, end, _ in corpus.sources]
    evaluation = corpus._replace(
        selected=held_out, sources=sources, key=f"{share} of {corpus.key}")
    return training, evaluation


def cache_key(sources, folder, cache, settings):
    """Returns a hash of the contents of all files, of the tokenizer, and of the settings."""
    # The names of files do not matter: a moved file is recognized, and a changed one is not.
    files = list(itertools.chain.from_iterable(sources))
    for path in sorted(Path(folder).iterdir()):
        if TOKENIZER_FILE.search(path.name) and path.is_file():
            files.append(path)
    hashes = hash_files(files, Path(cache) / "hashes.json")
    files_of_source = [len(source) for source in sources]
    content = [CACHE_VERSION, settings, files_of_source, *hashes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def hash_files(files, memory):
    """Returns the hash of each file. Those in the file `memory` are not computed again."""
    with FileLock(memory.with_suffix(".lock")):
        known = json.loads(memory.read_text()) if memory.exists() else {}
        hashes = []
        for path in files:
            # A file of the same path, size and time of change is taken to be the same.
            status = os.stat(path)
            stamp = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
            if stamp not in known:
                with open(path, "rb") as file:
                    known[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
            hashes.append(known[stamp])

        part = memory.with_suffix(".part")
        part.write_text(json.dumps(known))
        part.rename(memory)  # a killed process leaves no half of it
    return hashes


def tokenize(sources, home, settings):
    """Writes the documents of all files to the folder `home`, using all cores.

    settings: all arguments of Encoder. A call that was killed is continued by the next one.
    """
    part = home.with_suffix(".part")
    part.mkdir(exist_ok=True)
    total_bytes = sum(os.path.getsize(path) for path in itertools.chain.from_iterable(sources))
    n_cores = len(os.sched_getaffinity(0))

    # Forked workers inherit the encoder: it is loaded once, and its memory is shared.
    encoder = Encoder(*settings)
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(n_cores, fork, initializer=start_worker, initargs=(encoder,))
    bar = tqdm(total=total_bytes, desc="tokenizing", unit="B", unit_scale=True, mininterval=2,
               disable=None)  # shown on a terminal only
    tokens_file = open(part / "tokens.bin", "ab")
    documents_file = open(part / "documents.bin", "ab")
    with bar, pool, tokens_file, documents_file:
        n_done = drop_incomplete(tokens_file, documents_file)
        rows = itertools.islice(read_sources(sources), n_done, None)
        for block, n_bytes in split_into_blocks(rows, BLOCK_BYTES * n_cores):
            records = []
            chunksize = 1 + len(block) // (64 * n_cores)
            for tokens, record in pool.map(encode_in_worker, block, chunksize=chunksize):
                tokens_file.write(tokens)
                records.append(record)
            # A document counts as done when its record is written, so its tokens come first.
            tokens_file.flush()
            documents_file.write(np.array(records, DOCUMENT))
            documents_file.flush()
            bar.update(n_bytes)
    part.rename(home)


def drop_incomplete(tokens_file, documents_file):
    """Truncates the files of a killed build after the last complete document; returns how many."""
    n_documents = documents_file.tell() // DOCUMENT.itemsize
    documents_file.truncate(n_documents * DOCUMENT.itemsize)
    documents = np.fromfile(documents_file.name, DOCUMENT)
    n_tokens = int(documents["length"].sum())
    tokens_file.truncate(n_tokens * np.dtype(np.int32).itemsize)
    return n_documents


def read_sources(sources):
    """Yields (place, row, index of the source) for all rows of all files."""
    for source, files in enumerate(sources):
        for path in files:
            for place, row in read_rows(path):
                yield place, row, source


def split_into_blocks(rows, block_bytes):
    """Yields (rows, their bytes) for consecutive blocks of about block_bytes."""
    block = []
    n_bytes = 0
    for place, row, source in rows:
        block.append((place, row, source))
        n_bytes += len(row) if isinstance(row, bytes) else len(str(row))
        if n_bytes >= block_bytes:
            yield block, n_bytes
            block = []
            n_bytes = 0
    if block:
        yield block, n_bytes


# Each worker process sets this once. As an argument, it would be pickled with every call.
worker_encoder = None


def start_worker(encoder):
    global worker_encoder
    worker_encoder = encoder


def encode_in_worker(row):
    return encode_row(worker_encoder, row)


def encode_row(encoder, row):
    """Returns the tokens of a row (place, content, source), and the fields of its DOCUMENT."""
    place, content, source = row
    with naming(place):
        if isinstance(content, bytes):
            rule = "each line must be one JSON object in UTF-8; fix or remove the line"
            content = parse_json(content, rule)
        tokens, full_length = encoder(content)
    targets = int(is_trained(tokens[1:]).sum())
    largest_id = int(token_ids(tokens).max(initial=0))
    return tokens, (len(tokens), targets, full_length, largest_id, source, hash_row(content))


def hash_row(content):
    """Returns an integer below HASHES that depends on the contents of a row alone.

    It is the same for the formats of files: the order of keys and null values do not matter.
    """
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not None}
    text = json.dumps(content, sort_keys=True, default=str)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HASHES


# -------------------------------------------------------------------------------------- packing
# A piece is a part of a document that lies in one row. Each pack function takes the lengths of
# the documents in their order. It returns the pieces of all rows, one row after the other, and the
# index of the first piece of each row.

PIECE = np.dtype([("document", np.int64), ("start", np.int64), ("length", np.int64)])


def make_pieces(document, start, length):
    pieces = np.empty(len(document), PIECE)
    pieces["document"] = document
    pieces["start"] = start
    pieces["length"] = length
    return pieces


def pack_split(lengths, max_length):
    """Concatenates the documents, and cuts this stream of tokens after every max_length."""
    document_starts = np.cumsum(lengths) - lengths
    row_starts = np.arange(0, lengths.sum(), max_length)
    # A piece begins where a document or a row begins.
    position = np.union1d(document_starts, row_starts)  # in the stream, (pieces,)
    document = np.searchsorted(document_starts, position, "right") - 1
    start = position - document_starts[document]
    left_in_document = lengths[document] - start
    left_in_row = max_length - position % max_length
    pieces = make_pieces(document, start, np.minimum(left_in_document, left_in_row))
    first_of_row = np.flatnonzero(position % max_length == 0)
    return pieces, first_of_row


def pack_whole(lengths, max_length):
    """Fills rows with uncut documents; those of more than max_length come in pieces."""
    pieces = cut_documents(lengths, max_length)
    order, first_of_row = knapsack(pieces["length"], max_length)
    return pieces[order], first_of_row


def pack_none(lengths, max_length, batch_size):
    """Puts batch_size documents into each row; those of more than max_length come in pieces."""
    pieces = cut_documents(lengths, max_length)
    first_of_row = np.arange(0, len(pieces), batch_size)
    return pieces, first_of_row


def cut_documents(lengths, max_length):
    """Returns the pieces of all documents, of max_length except for the last of a document."""
    n_pieces = -(-lengths // max_length)
    document = np.repeat(np.arange(len(lengths)), n_pieces)
    first_piece = np.cumsum(n_pieces) - n_pieces
    number_in_document = np.arange(len(document)) - first_piece[document]
    start = number_in_document * max_length
    length = np.minimum(lengths[document] - start, max_length)
    return make_pieces(document, start, length)


def knapsack(lengths, capacity):
    """Packs lengths into bins. Each bin takes the longest that still fits until none fits.

    Returns the indices of the lengths, bin after bin, and where each bin begins among them.
    """
    # Equal lengths keep their order, which was drawn at random.
    order = np.argsort(lengths, kind="stable")
    distinct, first = np.unique(lengths[order], return_index=True)
    distinct = distinct.tolist()
    left = dict(zip(distinct, np.split(order, first[1:])))  # length: indices not packed yet
    packed = []
    bin_sizes = []
    while distinct:
        taken = fill_bin(distinct, left, capacity)
        # The same bin is repeated while there are lengths for it. So the work grows with the
        # number of distinct lengths, not with the number of documents.
        repeats = min(len(left[length]) // n for length, n in taken.items())
        columns = []
        for length, n in taken.items():
            columns.append(left[length][:n * repeats].reshape(repeats, n))
            left[length] = left[length][n * repeats:]
            if len(left[length]) == 0:
                del distinct[bisect.bisect_left(distinct, length)]
        bins = np.hstack(columns)  # (repeats, lengths in a bin)
        packed.append(bins.ravel())
        bin_sizes += [bins.shape[1]] * repeats
    first_of_bin = np.cumsum(bin_sizes) - bin_sizes
    return np.concatenate(packed), first_of_bin


def fill_bin(distinct, left, capacity):
    """Returns {length: how many of it} for one bin. distinct: the lengths in `left`, sorted."""
    taken = {}
    free = capacity
    i = bisect.bisect_right(distinct, free) - 1  # the longest that fits
    while i >= 0:
        length = distinct[i]
        n = min(len(left[length]), free // length)
        taken[length] = n
        free -= n * length
        i = bisect.bisect_right(distinct, free, 0, i) - 1
    return taken


def group_by_length(lengths, step, rng, at=0):
    """Returns the indices of lengths in an order where those of one step are similar.

    step: documents in a step. at: documents that the first step has already.
    """
    # As in XTuner, lengths are sorted within stretches of up to 50 steps.
    position = at + np.arange(len(lengths))
    steps_per_stretch = max(1, min(len(lengths) // (4 * step), 50))
    stretch = position // (steps_per_stretch * step)
    order = np.lexsort((-lengths, stretch))
    # The longest of all comes first: if memory is too small, this shows at once.
    longest = np.argmax(lengths[order])
    order[[0, longest]] = order[[longest, 0]]

    # The steps of a stretch are shuffled, as a loss that follows the lengths would swing. The
    # first step stays first, and the last step, which may be incomplete, stays last.
    draw = rng.random(position[-1] // step + 1)  # (steps,)
    draw[-1] = 2
    draw[0] = -1
    return order[np.lexsort((draw[position // step], stretch))]


# ---------------------------------------------------------------------- documents within a row
# Under sequence parallelism a row is cut into equal shards. A document inside one shard is attended
# by that rank alone. One that crosses a border is exchanged, and its attention is divided among all
# ranks. So the longest documents should lie across the borders, and the others such that each rank
# has as much attention to compute. The order is made for 2, 4 and 8 shards at once, whatever
# the number of ranks: it must not depend on how the work is divided.

BORDER_LEVELS = 3  # 2**3 shards


def order_for_shards(lengths):
    """Returns an order of the documents of a row, with these lengths, that suits its shards."""
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    return order_span(longest_first, lengths.tolist(), 0, 0, BORDER_LEVELS)


def order_span(documents, lengths, before, after, levels):
    """Returns an order of `documents`, the longest first, for one span of a row and its halves.

    before, after: tokens at the span's ends that belong to documents across its borders.
    """
    if levels == 0 or len(documents) < 2:
        return documents
    half = (before + after + sum(lengths[i] for i in documents)) / 2

    # Either the longest document lies across the middle, or none is meant to.
    left, right, work = divide(documents, lengths, half - before, half - after)
    middle = []
    longest = documents[0]
    part = lengths[longest] / 2
    left_of_it, right_of_it, work_beside = divide(
        documents[1:], lengths, half - before - part, half - after - part)
    if work_beside + lengths[longest] ** 2 / 2 < work:
        left = left_of_it
        right = right_of_it
        middle = [longest]

    left_end = half - before - sum(lengths[i] for i in left)
    right_start = half - after - sum(lengths[i] for i in right)
    left = order_span(left, lengths, before, max(left_end, 0), levels - 1)
    right = order_span(right, lengths, max(right_start, 0), after, levels - 1)
    return left + middle + right


def divide(documents, lengths, left_capacity, right_capacity):
    """Divides documents, the longest first, into two lists of similar attention work.

    Returns the lists, and the larger of their sums of squared lengths.
    """
    sides = ([], [])
    free = [left_capacity, right_capacity]
    work = [0, 0]
    for i in documents:
        side = 0 if work[0] <= work[1] else 1
        if lengths[i] > free[side]:
            side = 0 if free[0] >= free[1] else 1
        sides[side].append(i)
        free[side] -= lengths[i]
        work[side] += lengths[i] ** 2
    return sides[0], sides[1], max(work)


# ----------------------------------------------------------------------------------------- rows

WEIGHT_EXPONENT = {"token": 0.0, "sample": -1.0, "square": -0.5}  # of the targets of a document


class Epoch(NamedTuple):
    """The rows of one epoch in the order of training. Row i is pieces[first[i]:end[i]]."""
    pieces: np.ndarray  # (pieces,) PIECE
    first: np.ndarray   # (rows,) int64
    end: np.ndarray     # (rows,) int64


class Rows:
    """The rows of a run: those of epoch 0, of epoch 1, and so on.

    The order of an epoch depends on the seed and its number only: there is no state to save.
    """

    def __init__(self, corpus, packing, max_length, seed, batch_size=1, use_varlen_attn=True,
                 loss_weight="token", grouped_rows=0):
        self.corpus = corpus
        self.packing = packing
        self.max_length = max_length
        self.seed = seed
        self.use_varlen_attn = use_varlen_attn
        self.loss_weight = loss_weight
        if packing == "none":
            self.batch_size = batch_size
            self.documents_per_step = grouped_rows * batch_size  # 0: not grouped by length
        else:
            self.batch_size = 1
            self.documents_per_step = 0
        self.lengths = np.diff(corpus.offsets)
        n_documents = [end - first for first, end, _ in corpus.sources]
        self.source_of_document = np.repeat(np.arange(len(n_documents)), n_documents)
        self.sizes = {}  # epoch: its number of rows
        self.epoch = functools.lru_cache(maxsize=2)(self.pack)  # a step may have rows of two
        self.per_epoch = self.size(0)

    def documents(self, epoch):
        """Returns the documents of an epoch: of each source, as many as its epochs say."""
        chosen = []
        for first, end, epochs in self.corpus.sources:
            documents = np.arange(first, end)
            if self.corpus.selected is not None:
                documents = documents[self.corpus.selected[first:end]]
            n = len(documents)
            # A source of 0.3 epochs cycles through its documents in a fixed random order, so that
            # all of them are seen before any is seen again.
            order = np.random.default_rng((self.seed, first)).permutation(n)
            position = np.arange(round(epoch * epochs * n), round((epoch + 1) * epochs * n))
            chosen.append(documents[order[position % n]])
        return np.concatenate(chosen)

    def pack(self, epoch):
        """Packs the documents of an epoch. Returns its Epoch; self.epoch remembers the last two."""
        rng = np.random.default_rng((self.seed, epoch))
        documents = rng.permutation(self.documents(epoch))
        documents = documents[self.lengths[documents] > 0]
        if len(documents) == 0:
            raise ValueError(f"epoch {epoch} of DATA holds no token: raise the epochs of its "
                             "sources")

        lengths = self.lengths[documents]
        if self.packing == "split":
            pieces, first = pack_split(lengths, self.max_length)
        elif self.packing == "whole":
            pieces, first = pack_whole(lengths, self.max_length)
        else:
            pieces, first = pack_none(lengths, self.max_length, self.batch_size)
        pieces["document"] = documents[pieces["document"]]
        end = np.append(first[1:], len(pieces))

        # Grouping replaces the shuffling of rows. An epoch may end within a step, so the first step
        # of this one may have documents of the epoch before.
        if self.documents_per_step > 0:
            rows_before = sum(self.size(earlier) for earlier in range(epoch))
            at = rows_before * self.batch_size % self.documents_per_step
            order = group_by_length(pieces["length"], self.documents_per_step, rng, at)
            return Epoch(pieces[order], first, end)
        order = rng.permutation(len(first))
        return Epoch(pieces, first[order], end[order])

    def size(self, epoch):
        """Returns the number of rows of an epoch."""
        if epoch not in self.sizes:
            self.sizes[epoch] = len(self.epoch(epoch).first)
        return self.sizes[epoch]

    def count(self, epochs):
        """Returns the number of rows of so many epochs, which may be a fraction."""
        # Epochs may differ by some rows, as they pack other documents, or in another order.
        rows = 0
        for epoch in range(math.ceil(epochs)):
            rows += min(epochs - epoch, 1) * self.size(epoch)
        return math.ceil(rows)

    def find(self, row):
        """Returns the pieces of a row of the run in their order in it, an array of PIECE."""
        pieces = self.find_unordered(row)
        if self.use_varlen_attn:  # or else the order of documents matters
            pieces = pieces[order_for_shards(pieces["length"])]
        return pieces

    def find_unordered(self, row):
        epoch = 0
        while row >= self.size(epoch):
            row -= self.size(epoch)
            epoch += 1
        pieces, first, end = self.epoch(epoch)
        return pieces[first[row]:end[row]]

    def batch(self, row, sp, sp_rank):
        """Returns the shard of rank sp_rank of a row of the run, or of a row of padding if None."""
        pieces = np.empty(0, PIECE) if row is None else self.find(row)
        segments = [self.read_with_next(*piece) for piece in pieces]
        lengths = pieces["length"]
        # Documents without targets have no weights, but 0 ** -1 must not be computed.
        n_targets = self.corpus.targets[pieces["document"]].clip(1)
        sources = self.source_of_document[pieces["document"]]

        # T must be a multiple of sp. The padding is a segment of its own, without targets.
        T = int(lengths.sum())
        padding = -T % sp if T > 0 else sp
        if padding > 0:
            segments.append(np.full(padding + 1, NO_TARGET))
            lengths = np.append(lengths, padding)
            n_targets = np.append(n_targets, 1)
            sources = np.append(sources, 0)
            T += padding

        # Labels are made before the row is cut into shards: the target of the last position of a
        # shard is the first token of the next shard.
        tokens = np.concatenate([segment[:-1] for segment in segments])  # (T,)
        next_tokens = np.concatenate([segment[1:] for segment in segments])  # (T,)
        has_target = is_trained(next_tokens)
        labels = np.where(has_target, next_tokens, IGNORE)
        weights = np.repeat(n_targets ** WEIGHT_EXPONENT[self.loss_weight], lengths) * has_target
        sources = np.repeat(sources, lengths)  # (T,)
        if not self.use_varlen_attn:
            lengths = np.array([T])  # one segment: tokens attend across documents
        position_ids = np.concatenate([np.arange(length) for length in lengths])  # (T,)
        cu_seqlens = np.cumsum([0, *lengths])  # (n+1,)

        t = T // sp
        shard = slice(t * sp_rank, t * (sp_rank + 1))
        return Batch(
            input_ids=torch.from_numpy(token_ids(tokens)[shard]),  # (t,)
            labels=torch.from_numpy(labels[shard]),
            position_ids=torch.from_numpy(position_ids[shard]),
            cu_seqlens=torch.from_numpy(cu_seqlens).int(),  # (n+1,)
            max_seqlen=int(max(lengths)),
            weights=torch.from_numpy(weights[shard]).float(),
            sources=torch.from_numpy(sources[shard]),
            checksum=zlib.crc32(tokens),
        )

    def read_with_next(self, document, start, length):
        """Returns the tokens of a piece and the one that follows it, (length + 1,) int64."""
        tokens = self.corpus.read(document, start, start + length + 1)
        # At the end of a document, read returns one token less, and NO_TARGET takes its place.
        return np.append(tokens, NO_TARGET)[:length + 1]

    def step(self, step, global_batch_size, dp, dp_rank, sp, sp_rank, total):
        """Returns the micro-batches of optimizer step `step` (from 1) for one rank.

        total: the number of rows of the run; later ones are padding.
        """
        first = (step - 1) * global_batch_size
        end = min(first + global_batch_size, total)
        work = {}  # of a row: attention grows with the square of the length of a piece
        for row in range(first, end):
            work[row] = (self.find_unordered(row)["length"] ** 2).sum()

        # Which rows a step has does not depend on the ranks, but who computes them does. As ranks
        # wait for one another, the dp heaviest rows are dealt first, then the next dp, each time
        # the heaviest to the rank with the least work so far.
        rows = sorted(work, key=work.get, reverse=True)
        rows += [None] * (global_batch_size - len(rows))
        mine = []
        load = np.zeros(dp)
        for i in range(0, global_batch_size, dp):
            lightest_first = np.argsort(load, kind="stable")
            for rank, row in zip(lightest_first, rows[i:i + dp]):
                if row is not None:
                    load[rank] += work[row]
                if rank == dp_rank:
                    mine.append(row)
        return [self.batch(row, sp, sp_rank) for row in mine]

    def accounting(self):
        """Returns counts of the first epoch: where its tokens go, and how its rows are filled.

        Padding is what rows lack to max_length (times batch_size); it is not computed.
        """
        documents = self.documents(0)
        full = self.corpus.full[documents]
        kept = self.lengths[documents]
        targets = self.corpus.targets[documents]

        # The attention of a row is the sum of its squared piece lengths. Without the boundaries of
        # documents it would be the square of the row's length.
        pieces, first, _ = self.epoch(0)
        lengths = pieces["length"]
        row_lengths = np.add.reduceat(lengths, np.sort(first))
        capacity = len(first) * self.max_length * self.batch_size
        is_beginning = pieces["start"] == 0
        is_part = lengths < self.lengths[pieces["document"]]
        return {
            "documents": len(documents),
            "empty": (full == 0).sum(),
            "without_target": ((kept > 0) & (targets == 0)).sum(),
            "dropped_documents": ((full > 0) & (kept == 0)).sum(),
            "shortened": ((kept > 0) & (kept < full)).sum(),
            "tokens": full.sum(),
            "trained": targets.sum(),
            "masked": (kept - targets).sum(),
            "dropped": (full - kept).sum(),
            "rows": len(first),
            "padding": capacity - kept.sum(),
            "fill": kept.sum() / capacity,
            "pieces_a_row": len(pieces) / len(first),
            "cut_documents": (is_beginning & is_part).sum(),
            "attention": (lengths ** 2).sum() / (row_lengths ** 2).sum(),
            "lengths": length_histogram(full),
        }

    def describe(self):
        """Returns the accounting as a few lines of text."""
        counts = self.accounting()
        histogram = counts.pop("lengths")
        tallest = max(histogram.values())
        bars = []
        for length, count in histogram.items():
            bars.append(f"{length:,} {'▁▂▃▄▅▆▇█'[7 * count // tallest]}")
        text = (
            "{documents:,} documents: {empty:,} empty, {without_target:,} without a target, "
            "{dropped_documents:,} dropped, {shortened:,} shortened, {cut_documents:,} cut by "
            "rows\n"
            "{tokens:,} tokens = {trained:,} trained + {masked:,} masked or first + {dropped:,} "
            "dropped\n"
            "{rows:,} rows, {fill:.2%} full, {padding:,} tokens of padding; {pieces_a_row:.1f} "
            "pieces in each, with {attention:.1%} of the attention of undivided rows\n"
            "lengths of documents, in tokens from: {bars}"
        )
        return text.format(**counts, bars="  ".join(bars))


def length_histogram(lengths):
    """Returns {2**i: how many lengths are from 2**i to below 2**(i+1)}, without zeros."""
    counts = np.bincount(np.log2(lengths[lengths > 0]).astype(int))
    return {2**i: count for i, count in enumerate(counts) if count > 0}
