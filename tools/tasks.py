"""Retrieval tasks in the manner of RULER (arXiv 2404.06654), for the tokenizer of any model.

    python tools/tasks.py FOLDER OUT.jsonl LENGTH ROWS [SEED]

writes documents of these tasks for training, in which far tokens matter, with the tokenizer of a
Hugging Face folder. They are token ids, of which the answers alone are targets, because the text
around them is random. SEED must differ from that of an evaluation; it is 1 unless given.

A row is a text of about `length` tokens and, after it, questions about facts in it. The texts are
synthetic and depend on the seed alone. Three tasks ask for the same kind of answer, a number, at
several depths; a depth is a place in the text, from 0, its beginning, to 1, its end.

    needle      The code of the gate is 483920.             one fact of its kind
    keys        The number of Karovel is 483920.            among many that differ in the name
    variables   Variable B is equal to variable A.          a chain of three such facts
    words       stone river stone ...                       which word occurs most often?

All questions of a row follow one another, with their answers, so that one forward asks about all
depths. Their order is random. Questions after the first also show how an answer is written.
"""
import json
import math
import operator
import os
import sys
from collections import defaultdict
from typing import NamedTuple

import numpy as np

TASKS = ("needle", "keys", "variables", "words")
OTHER_KEYS = 15         # facts of the task "keys" that no question asks for
HOPS = 2                # variables between the number and the one that is asked for
IGNORE = -100           # label of a token that is no target
COMMON_SHARE = 0.1      # of the list of words: the word that is asked for

THINGS = (
    "code of the gate", "price of the painting", "weight of the anchor", "height of the tower",
    "serial number of the engine", "balance of the account", "length of the bridge",
    "age of the manuscript", "width of the canal", "value of the coin", "depth of the well",
    "size of the orchard")
WORDS = (
    "stone river lamp garden window bottle forest candle mirror ladder basket hammer pencil carpet "
    "island button castle barrel cradle saddle violin wagon tunnel shovel pillow helmet meadow "
    "harbor anchor blanket needle pocket ribbon kettle fence valley temple market statue curtain"
).split()
ADJECTIVES = (
    "old quiet heavy bright narrow wooden empty distant broken patient green gentle").split()
VERBS = "faces follows resembles covers carries touches reaches supports hides joins".split()
SYLLABLES = "ka ro vel mi tan du sor le pin ga bru ne fol ti zan mo ri hek lu das".split()


class Question(NamedTuple):
    """A question of a row. Its answer is ids[start:end]."""
    task: str
    depth: float        # of its first fact; NaN: the whole text is needed
    start: int
    end: int
    evidence: list      # (start, end) in ids of each fact that is needed


class Example(NamedTuple):
    ids: list           # token ids of the text, the questions and the answers
    questions: list     # of Question, in the order of ids
    length: int         # the tokens that it was made for; ids has up to two sentences less


class Fact(NamedTuple):
    place: float        # where it is in the text, from 0 to 1
    sentence: str
    question: int       # index of the question that needs it; -1: none


class Asked(NamedTuple):
    prompt: str
    answer: str
    depth: float


def make_example(task, length, depths, tokenizer, seed, sample):
    """Return the Example of a task with a question for each depth, of at most `length` tokens."""
    # Made as long as the filling of a first attempt suggests, then shortened until it fits.
    seeds = (seed, TASKS.index(task), length, sample)
    trial = 100
    tokens_per_unit = len(text_ids(" ".join(filling(task, trial, seeds)), tokenizer)) / trial
    units = math.ceil(length / tokens_per_unit)
    while units > 0:
        example = build(task, units, length, depths, tokenizer, seeds)
        excess = len(example.ids) - length
        if excess <= 0:
            return example
        units -= math.ceil(excess / tokens_per_unit)
    raise ValueError(f"LENGTHS has {length}: the questions alone of the task {task!r} need more "
                     f"tokens; use at least {len(example.ids)}")


def build(task, units, length, depths, tokenizer, seeds):
    """Return the Example with `units` sentences, or words, besides its facts."""
    rng = np.random.default_rng(seeds)
    sentences = filling(task, units, seeds)
    if task == "words":
        facts = []
        asked = [Asked("The word that occurs most often in the list is", sentences[0], math.nan)]
        rng.shuffle(sentences)
    else:
        facts, asked = {"needle": needle, "keys": keys, "variables": variables}[task](depths, rng)

    text, facts_of_question = place_facts(facts, sentences)
    text += "\n\nQuestions about the text above.\n"
    answers = []  # in characters
    order = rng.permutation(len(asked))
    for i in order:
        text += asked[i].prompt
        answers.append((len(text), len(text) + 1 + len(asked[i].answer)))
        text += f" {asked[i].answer}.\n"

    # Added tokens have no place in the text: of them only the first, bos, is wanted.
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    bos = [token for token in tokenizer("a").input_ids[:1] if token == tokenizer.bos_token_id]
    starts = np.array([0] * len(bos) + [start for start, _ in encoding.offset_mapping])
    ends = np.array([0] * len(bos) + [end for _, end in encoding.offset_mapping])
    questions = []
    for i, answer in zip(order, answers):
        start, end = token_span(answer, starts, ends)
        evidence = [token_span(span, starts, ends) for span in facts_of_question[i]]
        questions.append(Question(task, asked[i].depth, start, end, evidence))
    return Example(bos + encoding.input_ids, questions, length)


def place_facts(facts, sentences):
    """Return the text of the sentences with the facts between them, and where the facts are.

    The latter is {question: (start, end) in characters of each of its facts}.
    """
    text = ""
    spans = defaultdict(list)
    facts = sorted(facts, key=operator.attrgetter("place"))  # stable: chains stay in order
    for i in range(len(sentences) + 1):
        while facts and facts[0].place * len(sentences) <= i:
            fact = facts.pop(0)
            spans[fact.question].append((len(text), len(text) + len(fact.sentence)))
            text += fact.sentence + " "
        if i < len(sentences):
            text += sentences[i] + " "
    return text, spans


def token_span(span, starts, ends):
    """Return the first and the last + 1 of the tokens that overlap a span of characters."""
    # The space before a word may be a part of its token, a token of its own, or in no token.
    first = np.searchsorted(ends, span[0], "right")
    end = np.searchsorted(starts, span[1], "left")
    return int(first), int(end)


def needle(depths, rng):
    """Return a fact and a question for each depth. No two facts are of the same kind."""
    if len(depths) > len(THINGS):
        raise ValueError(f"DEPTHS {len(depths)} is more than the {len(THINGS)} kinds of facts")
    facts = []
    asked = []
    things = rng.permutation(THINGS)
    for i, (depth, thing) in enumerate(zip(depths, things)):
        number = random_number(rng)
        facts.append(Fact(depth, f"The {thing} is {number}.", i))
        asked.append(Asked(f"The {thing} is", number, depth))
    return facts, asked


def keys(depths, rng):
    """Return a fact and a question for each depth, and OTHER_KEYS facts at random places."""
    facts = []
    asked = []
    places = [*depths, *rng.random(OTHER_KEYS)]
    names = random_names(len(places), rng)
    for i, (place, name) in enumerate(zip(places, names)):
        number = random_number(rng)
        question = i if i < len(depths) else -1
        facts.append(Fact(place, f"The number of {name} is {number}.", question))
        if i < len(depths):
            asked.append(Asked(f"The number of {name} is", number, place))
    return facts, asked


def variables(depths, rng):
    """Return a chain of facts and a question about its last variable for each depth."""
    facts = []
    asked = []
    names = random_names(len(depths) * (HOPS + 1), rng)
    for i, depth in enumerate(depths):
        number = random_number(rng)
        chain = [names.pop() for _ in range(HOPS + 1)]
        facts.append(Fact(depth, f"The variable {chain[0]} is set to {number}.", i))
        # No variable is used before it is set.
        places = np.sort(rng.uniform(depth, 1, HOPS))
        for place, name, earlier in zip(places, chain[1:], chain):
            facts.append(Fact(place, f"The variable {name} is equal to variable {earlier}.", i))
        asked.append(Asked(f"The value of the variable {chain[-1]} is", number, depth))
    return facts, asked


def filling(task, units, seeds):
    """Return so many sentences; or words, of which the first is the most frequent one."""
    # Seeded apart from the facts, so that a row that is shortened keeps its facts.
    rng = np.random.default_rng((*seeds, 1))
    if task == "words":
        common, *others = rng.permutation(WORDS)
        n_common = max(int(units * COMMON_SHARE), 2)
        rest = rng.choice(others, max(units - n_common, 0))
        return [str(common)] * n_common + [str(word) for word in rest]
    # All words are drawn at once, because a draw takes longer than all else about a sentence.
    adjectives = rng.choice(ADJECTIVES, (units, 2))
    nouns = rng.choice(WORDS, (units, 2))
    verbs = rng.choice(VERBS, units)
    sentences = []
    for (a, b), (x, y), verb in zip(adjectives, nouns, verbs):
        sentences.append(f"The {a} {x} {verb} the {b} {y}.")
    return sentences


def random_number(rng):
    return str(rng.integers(100_000, 1_000_000))


def random_names(n, rng):
    """Return n different names of three syllables."""
    names = set()
    while len(names) < n:
        names.add("".join(rng.choice(SYLLABLES, 3)).capitalize())
    return sorted(names)


def write_documents(folder, path, length, n, seed):
    """Write n documents of `length` tokens, with five questions each, in turn of all tasks."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with open(path, "w") as file:
        for i in range(n):
            depths = np.random.default_rng((seed, i)).random(5)
            example = make_example(TASKS[i % len(TASKS)], length, depths, tokenizer, seed, i)
            labels = [IGNORE] * len(example.ids)
            for question in example.questions:
                answer = slice(question.start, question.end)
                labels[answer] = example.ids[answer]
            file.write(json.dumps({"input_ids": example.ids, "labels": labels}) + "\n")


def text_ids(text, tokenizer):
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def without_evidence(example, tokenizer, seed):
    """Return the example with filling in place of its facts. All positions stay the same."""
    ids = list(example.ids)
    for question in example.questions:
        for start, end in question.evidence:
            sentences = filling(question.task, end - start, (seed, start))
            ids[start:end] = text_ids(" ".join(sentences), tokenizer)[:end - start]
    return example._replace(ids=ids)


if __name__ == "__main__":
    numbers = sys.argv[3:]
    if len(numbers) not in (2, 3) or not os.path.isdir(sys.argv[1]):
        sys.exit(__doc__)
    wrong = [number for number in numbers if not number.isdecimal()]
    if wrong:
        sys.exit(f"LENGTH, ROWS or SEED {wrong[0]!r} is not a whole number: use one like 4096")
    folder, path = sys.argv[1:3]
    length, n, seed = [int(number) for number in [*numbers, 1][:3]]
    try:
        write_documents(folder, path, length, n, seed)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
