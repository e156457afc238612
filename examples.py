"""From a row of a file to tokens: formats, chat templates, and which of the tokens are trained.

A row is a text or a conversation in one of several formats. Encoder turns it into the tokens of one
document.
"""
import itertools
import json
import os
import re
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
    """Returns the tokens marked as untrained."""
    return np.minimum(tokens, ~tokens)


def token_ids(tokens):
    """Returns the plain ids of tokens, trained or not."""
    return np.maximum(tokens, ~tokens)


def is_trained(tokens):
    return tokens >= 0


# --------------------------------------------------------------------------------------- errors

@contextmanager
def naming(what):
    """Turns any error in the body into a ValueError whose message begins with `what`."""
    try:
        yield
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        raise ValueError(f"{what}: {kind}{error}") from error


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
