"""From a row of a file to tokens: formats, chat templates, and which of the tokens are trained.

A row is a text or a conversation in one of several formats. Encoder turns it into the tokens of one
document.
"""
import bisect
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import resource
import signal
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

IGNORE = -100  # the label of a position without a target


# ---------------------------------------------------------------- trained and untrained tokens
# A token that is not trained, such as one of a question, is stored as the complement ~id of its
# id. Ids are not negative and complements are, so one int32 array holds the ids and the loss mask.
# In this file, `tokens` are stored in this way, and `ids` are plain.


def mask(tokens):
    """Return the tokens marked as untrained."""
    return np.minimum(tokens, ~tokens)


def token_ids(tokens):
    """Return the plain ids of tokens, trained or not."""
    return np.maximum(tokens, ~tokens)


def is_trained(tokens):
    return tokens >= 0


# --------------------------------------------------------------------------------------- errors

JSON = json.JSONDecoder()  # json.loads takes twice as long for a short row


class TemplateLimit(ValueError):
    """A chat template takes too long or too much memory, probably for every row."""


@contextmanager
def naming(what):
    """Turn any error in the body into a ValueError whose message begins with `what`."""
    try:
        yield
    except TemplateLimit as error:
        raise TemplateLimit(f"{what}: {error}") from error
    except Exception as error:
        raise ValueError(f"{what}: {describe_error(error)}") from error


def describe_error(error):
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error}): convert it, such as with iconv -f LATIN1 -t UTF-8"
    is_damage = isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile))
    if is_damage or type(error).__name__ == "ArrowInvalid":
        return f"the file is damaged ({error}): copy or download it again"
    kind = "" if type(error) is ValueError else f"{type(error).__name__} "
    return f"{kind}{error}"


def parse_json(content, rule):
    """Return the object that bytes hold. The error message ends with the rule."""
    try:
        text = content.decode().strip(" \t\r\n")
        value, end = JSON.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8; nested too deeply
        raise ValueError(f"{type(error).__name__} {error}: {rule}") from error


# -------------------------------------------------------------------------------------- formats

# The keys that an example of each format must have. The first of them names the format.
FORMATS = {
    "text": ("text",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "input_ids": ("input_ids",),
}

# The keys that rows must have, and all keys that are read.
REQUIRED_KEYS = set(itertools.chain(*FORMATS.values()))
KEYS = REQUIRED_KEYS | {"input", "history", "system", "tools", "functions", "labels"}

# The names of roles in files (of OpenAI, then of ShareGPT), and those that chat templates expect.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool",
         "developer": "system", "function": "tool"}

HASHES = 2**32  # the number of values of hash_text
SORTED_JSON = json.JSONEncoder(sort_keys=True, default=str)

# Keys of a row or message that no chat template writes.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")

# Keys of the thoughts of an answer. A template writes one of them.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def parse_row(row):
    """Return a row, an object or the line (bytes) of a .jsonl file, as an object without nulls."""
    if isinstance(row, bytes):
        row = parse_json(row, "each line must be one JSON object in UTF-8; fix or remove the line")
    if not isinstance(row, dict):
        return {}
    if None in row.values():
        row = {key: value for key, value in row.items() if value is not None}
    return row


def hash_text(text):
    """Return an integer below HASHES that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[-4:], "big")


def hash_row(fields):
    """Return the hash of a row that is not a text. The order of its keys does not matter."""
    return hash_text(SORTED_JSON.encode(fields))


def read_example(fields, wanted_format="", columns=None):
    """Return the kind of a row and its content, in a form that all formats have in common.

    These are "text" and the text; "prompt" and (prompt, completion); "chat" and (messages,
    functions), see to_messages and read_tools; "input_ids" and the tokens. fields: see parse_row.
    columns: {key that is expected: name of the column that has its content}.
    """
    keys = tuple(fields)
    if columns:
        fields = rename_columns(fields, columns)
    kind = find_format(tuple(fields), wanted_format, keys)

    if kind not in ("text", "input_ids"):  # a text may be one column of many
        check_media(fields, "row")
    if kind == "text":
        return kind, check_text(fields, "text")
    if kind == "input_ids":
        return kind, read_input_ids(fields)
    if kind == "prompt" and not isinstance(fields["prompt"], list):
        prompt = check_text(fields, "prompt")
        completion = check_text(fields, "completion")
        if not prompt:
            return "text", completion
        return "prompt", (prompt, completion)
    return "chat", (to_messages(fields, kind), read_tools(fields))


def rename_columns(fields, columns):
    renamed = {key: value for key, value in fields.items() if key not in columns.values()}
    for key, column in columns.items():
        if column in fields:
            renamed[key] = fields[column]
    return renamed


@functools.lru_cache
def find_format(keys, wanted, keys_in_data):
    """Return the one of FORMATS that the keys of an example match.

    keys_in_data: its keys before COLUMNS renamed them.
    """
    found = []
    for kind, required in FORMATS.items():
        if set(required) <= set(keys):
            found.append(kind)
    if wanted in found:
        return wanted
    if len(found) != 1:
        matches = " and ".join(map(repr, found)) if found else "no format"
        known = [" ".join(required) for required in FORMATS.values()]
        renamed = f", with COLUMNS {sorted(keys)}," if set(keys) != set(keys_in_data) else ""
        remedy = "FORMAT to the first key of one, or " if found else ""
        raise ValueError(f"keys {sorted(keys_in_data)}{renamed} match {matches}: a row must be a "
                         f"JSON object with the keys of exactly one of {known}, not null; set "
                         f"{remedy}COLUMNS to the names that the keys have in DATA")
    return found[0]


def check_text(example, key):
    text = example[key]
    if not isinstance(text, str):
        raise ValueError(f"{key} {str(text)[:60]} is not a string: text, prompt and completion "
                         "must be strings; fix or remove the row")
    if not text.isascii() and NOT_TEXT.search(text):  # a search takes longer than isascii
        raise_not_text()
    return text


def raise_not_text():
    raise ValueError(f"the row contains {BOUNDARY!r} or half of a surrogate pair, which are no "
                     "text: remove them")


def read_input_ids(example):
    """Return the tokens of an example that is tokenized already. Its labels are not shifted."""
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


def read_tools(example):
    """Return the functions that a row offers to the assistant, in the form that OpenAI uses."""
    tools = example.get("tools") or example.get("functions") or []
    if isinstance(tools, str):
        tools = json.loads(tools)
    if isinstance(tools, dict):
        tools = [tools]
    functions = []
    for tool in tools or ():
        functions.append(tool if "function" in tool else {"type": "function", "function": tool})
    return functions


def to_messages(example, kind):
    """Return the messages of a conversation as chat templates expect them.

    kind is one of FORMATS. Each message has two more keys: "trained" is 0 if it must not be, and
    "is_prompt" is whether it is trained with TRAIN_ON_PROMPT only, whoever wrote it.
    """
    n_prompt = 0
    if kind == "instruction":
        turns = alpaca_turns(example)
    elif kind == "prompt":  # TRL: the prompt and the completion are lists of messages
        turns = [*example["prompt"], *example["completion"]]
        n_prompt = len(example["prompt"])
    else:
        turns = example[kind]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{kind} {str(turns)[:60]!r} is not a list of objects, the messages: fix or "
                         "remove the row")
    turns = list(turns)
    if example.get("system"):
        turns.insert(0, {"role": "system", "content": example["system"]})

    messages = []
    for i, turn in enumerate(turns):
        with naming(f"message {i}, {json.dumps(turn, default=str)[:60]}"):
            message = to_message(turn)
        messages.append({**message, "is_prompt": i < n_prompt})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("0 of 0 assistant turns are to be trained: add one, or remove the row")
    if NOT_TEXT.search(json.dumps(example, ensure_ascii=False, default=str)):
        raise_not_text()
    return messages


def check_media(fields, what):
    """Raise ValueError if a row or message has images, video or audio."""
    for key in MEDIA:
        if fields.get(key):
            raise ValueError(f"the {what} has {key!r}: only text can be trained; remove the key or "
                             "the row")


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
    """Return one turn of OpenAI's or ShareGPT's format as a message that chat templates expect."""
    # A table such as .parquet has every column in every row: null is the same as a missing key.
    message = {key: value for key, value in turn.items() if value is not None}
    check_media(message, "message")
    for key in THOUGHTS:
        if message.get(key) and not isinstance(message[key], str):
            raise ValueError(f"{key} {str(message[key])[:60]} is not a string: thoughts must be "
                             "strings; fix or remove the row")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))

    calls = message.get("tool_calls", [])
    if role == "function_call":  # ShareGPT: the content is one call, or a list of them
        functions = json.loads(content)
        if not isinstance(functions, list):
            functions = [functions]
        calls = [{"type": "function", "function": function} for function in functions]
        content = ""
    elif "function_call" in message:  # OpenAI's earlier form
        calls = [{"type": "function", "function": message.pop("function_call")}]
    if calls:
        message["tool_calls"] = [parse_arguments(call) for call in calls]
        content = content or ""
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


def parse_arguments(call):
    """Return a tool call whose arguments are an object, not the JSON of one."""
    function = call.get("function", call)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def join_parts(parts):
    """Return the text of a list of content parts."""
    for part in parts:
        if "text" not in part:
            raise ValueError(f"content part {json.dumps(part, default=str)[:60]} has no 'text': "
                             "only text can be trained; remove the part or the row")
    return "".join(part["text"] for part in parts)


# -------------------------------------------------------------------------------- control tokens

# A control token in somebody's text is split by this character before the text is tokenized, and
# the tokens of the character are removed afterwards. Unicode keeps the character for internal use
# (a "noncharacter"), so it has no place in the texts of the data.
BOUNDARY = "\ufdd0"
NOT_TEXT = re.compile(f"[{BOUNDARY}\ud800-\udfff]")
PAIRED_TAG = re.compile(r"</?([\w▁|｜-]+)>")


class ControlTokens(NamedTuple):
    """Tokens such as <|im_end|>, which a chat template may write and the texts of a row may not."""
    ids: dict            # {text: id} of all of them
    all: re.Pattern      # matches any of them
    turns: re.Pattern    # those that an assistant's text must not contain either
    special: list        # texts of those that the tokenizer calls special


def open_tokenizer(folder):
    """Return the tokenizer of a Hugging Face folder. Code that is in the folder is not run.

    Raise ValueError if the tokenizer cannot be read without it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    model_file = folder / "tokenizer.model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if model_file.exists() and not (folder / "tokenizer.json").exists():
            read_as_sentencepiece(tokenizer.backend_tokenizer, model_file)
    except Exception as error:
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(
            f"The tokenizer of {folder} cannot be read, and code that is in the folder is not run: "
            f"put a tokenizer.json beside it, or use rows of input_ids. ({reason})") from error
    return tokenizer


def read_as_sentencepiece(backend, model_file):
    """Make a tokenizers.Tokenizer split text as sentencepiece does with its `model_file`.

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


def first_tokens(tokenizer):
    """Return the ids that a text begins with: many tokenizers have bos, and only some write it."""
    begins_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins_with_bos else []


def control_tokens(tokenizer):
    """Return the ControlTokens: special tokens, and added tokens that a chat template contains."""
    templates = tokenizer.chat_template or ""
    if isinstance(templates, dict):
        templates = "\n".join(templates.values())
    ids = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        is_written = find_value(templates, text, 0)[0] >= 0
        if token.special or (is_written and len(text.strip()) > 1):
            ids[text] = token_id

    # Tags in pairs, such as <think> and </think>, are parts of an answer. An assistant's text may
    # contain them, unless they are special.
    special = [text for text in ids if tokenizer.added_tokens_decoder[ids[text]].special]
    turns = []
    for text in ids:
        tag = PAIRED_TAG.fullmatch(text)
        is_paired = tag and {f"<{tag[1]}>", f"</{tag[1]}>"} <= ids.keys()
        if text in special or not is_paired:
            turns.append(text)
    return ControlTokens(ids, any_of(ids), any_of(turns), special)


def any_of(texts):
    """Return a pattern that matches any of the texts, and the longest where several match."""
    matches_nothing = "(?!)"
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or matches_nothing)


def split_tokens(text, pattern):
    """Return a text with a BOUNDARY in every token that the pattern matches."""
    def split(match):
        token = match[0]
        if len(token) == 1:
            raise ValueError(f"the row contains {token!r}, a control token of one character, which "
                             "the tokenizer cannot read as text: remove it")
        return token[0] + BOUNDARY + token[1:]

    return pattern.sub(split, text)


def split_tokens_in(value, pattern):
    """Return an object, such as a message, with a BOUNDARY in the control tokens of its texts."""
    if isinstance(value, str):
        return split_tokens(value, pattern)
    if isinstance(value, dict):
        return {split_tokens(key, pattern): split_tokens_in(item, pattern)
                for key, item in value.items()}
    if isinstance(value, list):
        return [split_tokens_in(item, pattern) for item in value]
    return value


# ------------------------------------------------------------------------ chat: what is trained
# The trained part of a conversation is what the chat template writes for the assistant after the
# generation prompt, including the token that ends the turn. If the template has generation
# markers, they say where that is in the text. Otherwise it is found by rendering the first
# messages alone, as their text should be a prefix of the text of the whole conversation.

THINK_TAG = re.compile("</?think>")


class Place(NamedTuple):
    """Where the contents of a message stand in the text of a conversation."""
    start: int
    end: int
    lost: str  # a content that does not stand there, or ""


RENDER_SECONDS = 20         # that a template may take to write one conversation
RENDER_BYTES = 4 * 2**30    # of memory that it may take


@contextmanager
def bounded():
    """End the body with a TemplateLimit if it takes too long or too much memory.

    A chat template is a program from a folder that may come from anywhere.
    """
    def stop(number, frame):
        raise TemplateLimit(f"it takes more than {RENDER_SECONDS} seconds: correct the template, "
                            "or remove the conversation")

    with open("/proc/self/statm", "rb", buffering=0) as file:
        pages = int(file.read().split()[5])  # of data and stack
    limit = pages * resource.getpagesize() + RENDER_BYTES
    old_limit, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    old_handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        yield
    except MemoryError:
        raise TemplateLimit(f"it takes more than {RENDER_BYTES / 2**30:.0f} GiB of memory: correct "
                            "the template, or remove the conversation") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (old_limit, hard_limit))
        signal.signal(signal.SIGALRM, old_handler)


class Chat:
    """A conversation as the chat template writes it.

    messages: see to_messages. stop_tokens: texts of the tokens that end an answer in use.
    """

    def __init__(self, messages, functions, template, tokenizer, control, stop_tokens):
        self.messages = messages
        self.functions = functions
        self.template = template
        self.variables = tokenizer.special_tokens_map
        self.control = control
        self.stop_tokens = stop_tokens
        self.has_markers = re.search(r"{%-?\s*generation\b", template) is not None
        self.text, self.marked = self.render(len(messages))
        if self.has_markers and len(self.marked) != len(self.answers()):
            raise ValueError("the generation markers of the chat template enclose "
                             f"{len(self.marked)} of {len(self.answers())} assistant turns: "
                             "correct them, or remove them all")
        self.places = self.find_contents()
        self.spans = {}  # see find_span

    def render(self, n_messages, add_generation_prompt=False, messages=None):
        """Return the text of the first messages, and the spans of the generation markers.

        messages: those to render instead of this conversation's.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = messages or self.messages
        with naming(f"the chat template, up to message {n_messages - 1}"), bounded():
            texts, marked = render_jinja_template(
                [messages[:n_messages]],
                self.functions or None,
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_markers,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        return texts[0], marked[0] if self.has_markers else None

    def find_contents(self):
        """Return the Place of each message."""
        # Contents have no control tokens, so that none is found in a part of one.
        text = self.control.turns.sub(lambda match: "\0" * len(match[0]), self.text)
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        last_question = max(questions, default=-1)
        places = []
        position = 0
        for i, message in enumerate(self.messages):
            # Thoughts before the last question are left out in use, too.
            contents = contents_of(message, with_thoughts=i > last_question)
            values = texts_in(message.get("tool_calls", []))
            # Some templates write a system prompt into a later question.
            is_system = message["role"] == "system"
            place = find_place(text, contents, values, 0 if is_system else position)
            places.append(place)
            if not is_system:
                position = place.end
        return places

    def lost(self):
        """Return (index, content) of each message whose content the template leaves out."""
        lost = [(i, place.lost) for i, place in enumerate(self.places) if place.lost]
        for function in self.functions:
            name = function["function"]["name"]
            if name not in self.text:
                lost.append((0, name))
        return lost

    def find_span(self, i):
        """Return the span (start, end) of message i, an assistant's, and whether it has an end.

        Its start and end relative to its content depend on the text between the contents only. So
        the chat is rendered again once for every such text, not for every message.
        """
        place = self.places[i]
        before = self.places[i - 1].end if i > 0 else 0
        after = self.places[i + 1].start if i + 1 < len(self.places) else len(self.text)
        context = (self.text[before:place.start], self.text[place.end:after], i == 0,
                   place.start == place.end)
        is_in_order = before <= place.start <= place.end <= after and not place.lost
        if is_in_order and context in self.spans:
            from_start, from_end, is_ended = self.spans[context]
            return place.start + from_start, place.end + from_end, is_ended

        start, end, is_ended = self.render_span(i)
        if is_in_order and before <= start and end <= after:
            self.spans[context] = (start - place.start, end - place.end, is_ended)
        return start, end, is_ended

    def render_span(self, i):
        """Return the same as find_span, from the renderings of the messages before and up to i."""
        is_last = i + 1 == len(self.messages)
        through_turn = self.text if is_last else self.render(i + 1)[0]
        through_turn = through_turn.rstrip()
        end_token = self.find_end_token(through_turn)
        if self.has_markers:
            start, end = self.marked[self.answers().index(i)]
        else:
            start = self.find_start(i)
            end = self.find_end(start, through_turn, end_token)
        if end <= start:
            raise ValueError(f"message {i}: the chat template writes it differently when other "
                             "messages follow: set MASK_HISTORY=True")
        if self.find_end_token(self.text[start:end].rstrip()):
            return start, end, True

        # The token that ends the turn may follow. In some formats it begins the next turn.
        rest = self.text[end:]
        following = self.control.turns.match(rest.lstrip())
        if following and following[0] in (end_token, *self.stop_tokens):
            end += len(rest) - len(rest.lstrip()) + following.end()
            return start, end, True
        return start, end, False

    def find_end_token(self, text):
        """Return the token that ends the turn if a text ends with one, or "".

        Other control tokens are inside a turn, such as DeepSeek V3's after each tool call.
        """
        for token in (*self.control.special, *self.stop_tokens):
            if text.endswith(token):
                return token
        return ""

    def find_start(self, i):
        """Return where message i begins in the text; len(text) if it is not found."""
        text = self.text
        if i == 0:
            # No message is before it. It begins after the first generation prompt.
            history, _ = self.render(1)
            prompt, _ = self.render(1, add_generation_prompt=True)
            prompt = prompt.removeprefix(history)
            found = text.find(prompt)
            if prompt and 0 <= found <= self.places[0].start:
                return found + len(prompt)
            return self.places[0].start

        prompt, _ = self.render(i, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)

        # The generation prompt may open a thought that this answer does not have. The answer then
        # begins after the last line break or control token that is common to both texts.
        history, _ = self.render(i)
        if not text.startswith(history):
            return len(text)
        common = os.path.commonprefix([text, prompt])
        candidates = [match.end() for match in self.control.turns.finditer(common)]
        return max([self.places[i - 1].end, common.rfind("\n") + 1, *candidates])

    def find_end(self, start, through_turn, end_token):
        """Return where the turn that begins at `start` ends in the text; start if not found."""
        text = self.text
        if text.startswith(through_turn):
            return len(through_turn)

        # A template may write the token that ends the turn after the last turn only.
        without_end = through_turn.removesuffix(end_token).rstrip()
        if text.startswith(without_end):
            return max(len(without_end), start)

        # A template may write a turn differently once others follow, as Qwen3's removes earlier
        # thoughts. The turn then ends at the next control token, if through_turn ends with the
        # same text.
        match = self.control.turns.search(text, start)
        if match and through_turn.endswith(text[start:match.end()]):
            return match.end()
        return start

    def find_untrained(self):
        """Return the spans of the messages whose weight is 0."""
        spans = []
        contents_to_find = []
        for i, message in enumerate(self.messages):
            if not message["trained"] and message["role"] == "assistant":
                start, end, _ = self.find_span(i)
                spans.append((start, end))
            elif not message["trained"] and message["content"].strip():
                contents_to_find.append(i)
        return spans + self.find_exactly(contents_to_find)

    def find_exactly(self, indices):
        """Return the spans of the contents of these messages.

        The same words may stand elsewhere, such as in the name of a role. So the conversation is
        rendered once more, with other contents in their places. ValueError if the template does not
        write a content as it is.
        """
        if not indices:
            return []
        messages = list(self.messages)
        index_of = {}   # stand-in: index
        for i in indices:
            # The first and the last word stay: a template may ask for them.
            content = messages[i]["content"]
            words = content.split()
            name = f"content{i}"
            while name in self.text:
                name += "x"
            stand_in = f"{words[0]} {name}. {words[-1]}"
            index_of[stand_in] = i
            messages[i] = {**messages[i], "content": content.replace(content.strip(), stand_in)}
        rendered, _ = self.render(len(messages), messages=messages)

        spans = []
        expected = ""   # what `rendered` says that self.text is
        begin = 0       # of what is left of `rendered`
        for match in any_of(index_of).finditer(rendered):
            expected += rendered[begin:match.start()]
            begin = match.end()
            content = self.messages[index_of[match[0]]]["content"].strip()
            spans.append((len(expected), len(expected) + len(content)))
            expected += content
        if expected + rendered[begin:] != self.text:
            raise ValueError(f"message {indices[0]} or a later one has weight 0, but the chat template "
                             "does not write its content as it is, or writes others differently with "
                             "other words in it: leave out the weight, or the message")
        return spans

    def answers(self):
        """Return the indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def contents_of(message, with_thoughts):
    """Return the texts of a message that its template should write, in their order."""
    content = message["content"] or ""
    contents = [content]
    if message["role"] == "assistant":
        contents = THINK_TAG.split(content)
        if not with_thoughts:
            contents = contents[-1:]
        else:
            values = [message.get(key) for key in THOUGHTS]
            thoughts = [value for value in values if isinstance(value, str) and value]
            contents = thoughts[:1] + contents
    contents = [content.strip() for content in contents]
    return [content for content in contents if content]


def find_place(text, contents, values, position):
    """Return the Place of contents, in their order, and of values after them, in any order."""
    starts = []
    lost = []
    for content in contents:
        found = text.find(content, position)
        if found < 0:
            lost.append(content)
        else:
            starts.append(found)
            position = found + len(content)

    end = position
    for value in values:
        found, length = find_value(text, value, position)
        if found < 0:
            lost.append(value)
        else:
            starts.append(found)
            end = max(end, found + length)
    return Place(min(starts, default=end), end, lost[0] if lost else "")


def texts_in(calls):
    """Return the texts in tool calls: names, and all strings in arguments."""
    texts = []

    def collect(value):
        if isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, str) and value.strip():
            texts.append(value.strip())

    for call in calls:
        collect(call["function"])
    return texts


def find_value(text, value, position):
    """Return where a value stands in a text, as it is or as JSON, and its length there."""
    for ensure_ascii in (False, True):
        written = json.dumps(value, ensure_ascii=ensure_ascii)[1:-1]
        for form in (value, written):
            found = text.find(form, position)
            if found >= 0:
                return found, len(form)
    return -1, 0


def message_forms(messages):
    """Yield messages with tool calls in the forms that chat templates are written for.

    These have "" or None as the content of a call, and arguments as an object or as JSON.
    """
    yield messages
    if not any("tool_calls" in message for message in messages):
        return
    for content, as_json in ((None, False), ("", True), (None, True)):
        form = []
        for message in messages:
            if "tool_calls" in message:
                message = rewrite_calls(message, content, as_json)
            form.append(message)
        yield form


def rewrite_calls(message, content, as_json):
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if as_json:
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls, "content": message["content"] or content}


def write_tools_as_text(messages, functions, template):
    """Return the messages, with tools and tool calls as text where the template omits them."""
    if functions and "tools" not in template:
        lines = ["Tools:", as_json_lines(function["function"] for function in functions)]
        if messages[0]["role"] == "system":
            lines.insert(0, messages[0]["content"])
            messages = messages[1:]
        tools = {"role": "system", "content": "\n".join(lines), "trained": 1, "is_prompt": False}
        messages = [tools, *messages]
    if "tool_calls" not in template:
        for message in messages:
            calls = message.pop("tool_calls", ())
            message["content"] += as_json_lines(call["function"] for call in calls)
    return messages


def as_json_lines(objects):
    return "\n".join(json.dumps(item, ensure_ascii=False) for item in objects)


# ------------------------------------------------------------------------------------- encoding

class Written(NamedTuple):
    """An example as text, or as its tokens if it has them. A span is (start, end) in the text."""
    text: str = ""
    answers: list = None       # spans of what is trained by default; None: all
    untrained: list = ()       # spans that are never trained
    is_document: bool = False  # no chat: bos and eos are added
    is_lossy: bool = False     # the template leaves out contents
    is_endless: bool = False   # an answer ends without a stop token
    tokens: np.ndarray = None


class Encoded(NamedTuple):
    """A row as tokens."""
    tokens: np.ndarray        # (n,) int32: see `mask`
    full_length: int          # before OVERLONG
    hash: int = 0             # of a text, or of a row of another kind: see hash_text, hash_row
    is_lossy: bool = False    # see Written, as the next one
    is_endless: bool = False


class Encoder:
    """Turns examples into tokens with the tokenizer and chat template of a Hugging Face folder.

    cap: the number of tokens above which OVERLONG applies, unless OVERLONG is "split".
    The other settings are the constants of train.py.
    """

    def __init__(self, folder, append_eos, train_on_prompt, mask_history, overlong, cap,
                 wanted_format="", columns=None, accept_loss=False, no_stop_token="refuse"):
        self.folder = folder
        self.append_eos = append_eos
        self.train_on_prompt = train_on_prompt
        self.mask_history = mask_history
        self.overlong = overlong
        self.cap = cap
        self.wanted_format = wanted_format
        self.columns = columns
        self.accept_loss = accept_loss
        self.no_stop_token = no_stop_token
        self.tokenizer = None
        self.control_ids = []
        if overlong == "truncate_middle":  # which keeps control tokens, also those of input_ids
            self.load()

    def load(self):
        """Load the tokenizer, which rows of input_ids do not need."""
        tokenizer = open_tokenizer(self.folder)
        ends_with_eos = self.append_eos and tokenizer.eos_token_id is not None
        self.tokenizer = tokenizer
        self.bos = first_tokens(tokenizer)
        self.eos = [tokenizer.eos_token_id] if ends_with_eos else []
        self.control = control_tokens(tokenizer)
        self.stop_tokens = stop_tokens(self.folder, tokenizer)
        self.control_ids = list(self.control.ids.values())
        self.is_control = np.zeros(max(tokenizer.get_vocab().values()) + 1, bool)
        self.is_control[self.control_ids] = True

    def check_template(self):
        """Raise a ValueError if the tokenizer cannot write conversations."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"conversations need a chat template, and the tokenizer of MODEL {self.folder} has "
                "none: copy chat_template.jinja, or the tokenizer_config.json that holds it, from the "
                "instruct version of the model to this folder, or use rows of text, or of prompt and "
                "completion")

    def __call__(self, row):
        """Return the tokens (int32) of a row, and their number before OVERLONG."""
        [encoded] = self.encode_rows([row])
        if isinstance(encoded, Exception):
            raise encoded
        return encoded.tokens, encoded.full_length

    def encode_rows(self, rows):
        """Return the Encoded of each row, or the error that it causes.

        Plain texts are tokenized in one call, which is faster for short ones.
        """
        results = [None] * len(rows)
        texts = {}  # those that are plain, by their places in the results
        for i, row in enumerate(rows):
            try:
                fields = parse_row(row)
                kind, content = self.read(fields)
                if self.is_plain(kind, content):
                    texts[i] = content
                    continue
                row_hash = hash_text(content) if kind == "text" else hash_row(fields)
                encoded = self.encode(self.write(kind, content))
                results[i] = encoded._replace(hash=row_hash)
            except Exception as error:
                results[i] = error

        if texts:
            backend = self.tokenizer.backend_tokenizer
            encodings = backend.encode_batch_fast(list(texts.values()), add_special_tokens=False)
            for i, encoding in zip(texts, encodings):
                tokens = np.array(self.bos + encoding.ids + self.eos, np.int32)
                shortened = self.shorten(tokens, tokens)
                results[i] = Encoded(shortened, len(tokens), hash_text(texts[i]))
        return results

    def check(self, row):
        """Raise the errors of a row, except those that only the tokenizer would find."""
        kind, content = self.read(parse_row(row))
        if not self.is_plain(kind, content):
            self.write(kind, content)

    def read(self, fields):
        """Return the kind and content of a row: see read_example. fields: see parse_row."""
        kind, content = read_example(fields, self.wanted_format, self.columns)
        if kind != "input_ids" and self.tokenizer is None:
            self.load()
        return kind, content

    def is_plain(self, kind, content):
        """Return whether an example is a text that can be given to the tokenizer as it is."""
        return kind == "text" and content != "" and not self.control.all.search(content)

    def write(self, kind, content):
        """Return the Written of an example: all of its encoding that precedes the tokenizer."""
        if kind == "input_ids":
            return Written(tokens=content)
        if kind == "chat":
            return self.write_chat(*content)
        if kind == "prompt":
            return self.write_prompt(*content)
        return Written(split_tokens(content, self.control.all), is_document=content != "")

    def encode(self, written):
        """Return the Encoded of a Written."""
        if written.tokens is not None:
            tokens = self.shorten(written.tokens, written.tokens)
            return Encoded(tokens, len(written.tokens))
        return self.encode_with_spans(written)

    def write_prompt(self, prompt, answer):
        """Return the Written of a text that is trained after its prompt."""
        prompt = split_tokens(prompt, self.control.all)
        answer = split_tokens(answer, self.control.turns)
        if self.control.all.search(prompt + answer):
            prompt += BOUNDARY  # both together contain a control token
        text = prompt + answer
        answers = [(len(prompt), len(text) + 1)]  # with eos
        return Written(text, answers, is_document=True)

    def write_chat(self, messages, functions):
        """Return the Written of a conversation."""
        chat = self.render_chat(messages, functions)
        # Where every token is trained, only the last answer is located: it tells whether answers
        # have an end. But truncate_middle removes nothing of any, and eos is appended to all.
        needs_all = self.overlong == "truncate_middle" or self.no_stop_token == "append"
        only_last = self.mask_history or self.train_on_prompt and not needs_all
        candidates = chat.answers()[-1:] if only_last else chat.answers()
        spans = []
        endless = {}  # {index of an answer without a stop token: where it ends}
        learns_to_end = False
        for i in candidates:
            message = chat.messages[i]
            if not self.train_on_prompt and (not message["trained"] or message["is_prompt"]):
                continue
            start, end, is_ended = chat.find_span(i)
            spans.append((start, end))
            if not is_ended:
                endless[i] = end
            if message["trained"]:
                learns_to_end = is_ended

        # Some templates end the last answer only. The model learns to end there, and what follows
        # the other answers is not trained.
        trained_endless = [i for i in endless if chat.messages[i]["trained"]]
        if trained_endless and not learns_to_end and self.no_stop_token == "refuse":
            raise ValueError(f"message {trained_endless[0]}: the chat template writes no stop "
                             "token after it, so that the model would not learn to end: set "
                             "NO_STOP_TOKEN=append to append eos, or NO_STOP_TOKEN=accept")

        text = chat.text
        untrained = chat.find_untrained() if self.train_on_prompt else []
        if endless and self.no_stop_token == "append":
            token = self.tokenizer.eos_token
            ends = list(endless.values())
            text, spans, untrained = insert_token(text, token, ends, spans, untrained)
        return Written(text, spans, untrained, is_lossy=len(chat.lost()) > 0,
                       is_endless=len(endless) > 0)

    def render_chat(self, messages, functions):
        """Return the Chat of the first form of its tool calls that the template writes fully."""
        self.check_template()
        control = self.control
        template = self.tokenizer.get_chat_template(None, functions or None)
        functions = split_tokens_in(functions, control.all)
        split_messages = []
        for message in messages:
            pattern = control.turns if message["role"] == "assistant" else control.all
            split_messages.append(split_tokens_in(message, pattern))
        messages = write_tools_as_text(split_messages, functions, template)

        lossy = None
        first_error = None
        for form in message_forms(messages):
            try:
                chat = Chat(form, functions, template, self.tokenizer, control, self.stop_tokens)
            except TemplateLimit:
                raise
            except ValueError as error:
                first_error = first_error or error
                continue
            if not chat.lost():
                return chat
            lossy = lossy or chat
        if lossy is None:
            raise first_error
        if not self.accept_loss:
            i, content = lossy.lost()[0]
            content = content.replace(BOUNDARY, "")[:60]
            raise ValueError(f"message {i}: the chat template leaves out {content!r} of the "
                             f"{lossy.messages[i]['role']}: use a template that writes it, or set "
                             "ACCEPT_LOSS=True to train without it")
        return lossy

    def encode_with_spans(self, written):
        """Return the Encoded of a text. A token is in a span if they have a character in common.

        The whole text is tokenized at once: parts of it may have other tokens by themselves.
        """
        text = written.text
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Some tokenizers leave white space out of the offsets. It belongs to the token after it.
        ends = np.maximum.accumulate(offsets[:, 1])
        starts = np.minimum(offsets[:, 0], np.insert(ends, 0, 0)[:-1])

        if BOUNDARY in text:
            parts = [text[start:end] for start, end in zip(starts, ends)]
            kept = np.array([part != BOUNDARY for part in parts])
            if any(BOUNDARY in part and part != BOUNDARY for part in parts):
                raise ValueError("the row contains control tokens that the tokenizer cannot read "
                                 "as text: remove them")
            ids = ids[kept]
            starts = starts[kept]
            ends = ends[kept]

        # What the template writes and what the row has are the only control tokens.
        written_ids = [self.control.ids[match[0]] for match in self.control.all.finditer(text)]
        if ids[self.is_control[ids]].tolist() != written_ids:
            raise ValueError("the tokenizer reads other control tokens than the row and the chat "
                             "template have: remove them from the row")

        if written.is_document:
            ids = np.concatenate([self.bos, ids, self.eos]).astype(np.int32)
            starts = np.concatenate([[-1] * len(self.bos), starts, [len(text)] * len(self.eos)])
            ends = np.concatenate([[0] * len(self.bos), ends, [len(text) + 1] * len(self.eos)])
        in_answer = np.ones(len(ids), bool)
        if written.answers is not None:
            in_answer = overlaps(starts, ends, written.answers)
        trained = in_answer
        if self.train_on_prompt:
            trained = ~overlaps(starts, ends, written.untrained)
        tokens = np.where(trained, ids, ~ids)
        shortened = self.shorten(tokens, np.where(in_answer, ids, ~ids))
        return Encoded(shortened, len(tokens), is_lossy=written.is_lossy,
                       is_endless=written.is_endless)

    def shorten(self, tokens, answers):
        """Return the tokens after OVERLONG. answers: the same tokens, trained in answers only."""
        if len(tokens) <= self.cap or self.overlong == "split":
            return tokens
        start, end = range_to_remove(answers, self.overlong, self.cap, self.control_ids)
        if end > start:
            tokens = np.delete(tokens, slice(start, end))
            if start < len(tokens):  # the tokens that led to this one are gone: it is no target
                tokens[start] = mask(tokens[start])
        return tokens


def stop_tokens(folder, tokenizer):
    """Return the texts of the tokens that end an answer in use: eos, and those of the model."""
    ids = [tokenizer.eos_token_id]
    path = Path(folder) / "generation_config.json"
    if path.exists():
        declared = json.loads(path.read_text()).get("eos_token_id")
        ids += declared if isinstance(declared, list) else [declared]
    tokens = tokenizer.added_tokens_decoder
    return [tokens[token_id].content for token_id in ids if token_id in tokens]


def insert_token(text, token, places, *lists_of_spans):
    """Insert a token into a text at sorted places. Return the text, and all lists of spans."""
    parts = [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]

    def moved(position):
        return position + len(token) * bisect.bisect_right(places, position)

    results = [token.join(parts)]
    for spans in lists_of_spans:
        results.append([(moved(start), moved(end)) for start, end in spans])
    return results


def overlaps(starts, ends, spans):
    """Return which of the tokens from `starts` to `ends`, both sorted, overlap with a span."""
    flags = np.zeros(len(starts), bool)
    for start, end in spans:
        first = np.searchsorted(ends, start, "right")
        last = np.searchsorted(starts, end, "left")
        flags[first:last] = True
    return flags


def range_to_remove(tokens, overlong, cap, control_ids):
    """Return (start, end): OVERLONG removes tokens[start:end] of a document."""
    n = len(tokens)
    extra = n - cap
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
    """Return (start, end) of the first longest run of True; (0, 0) if there is none."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    starts = edges[0::2]
    ends = edges[1::2]
    if len(starts) == 0:
        return 0, 0
    longest = np.argmax(ends - starts)
    return int(starts[longest]), int(ends[longest])
