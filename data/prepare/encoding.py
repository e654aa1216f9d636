"""Documents to tokens, many at a time. Shapes: n tokens, a answers."""

from functools import partial
from typing import NamedTuple

import numpy as np

from data.prepare.chat import LeftOut
from data.prepare.rows import BadRow, Conversation
from data.tokenizer import without_prefix

# Text handed to the tokenizer's threads at once, or to a node of a cluster; enough to keep them busy, small against memory.
BATCH_CHARACTERS = 2**21
BATCH_DOCUMENTS = 10_000


class Encoded(NamedTuple):
    """A document's tokens, int32 [n], without the tokenizer's prefix.

    answers: int32 [a, 3], see chat.ChatTemplate.encode, in these tokens; a text is one, which nothing asks for. prefixed: whether the
    prefix belongs before them.
    """

    tokens: np.ndarray
    answers: np.ndarray
    prefixed: bool


def one_by_one(function, items):
    """Yield (item, function(item)) of each: what `cluster.Cluster.each` does on several machines."""
    return ((item, function(item)) for item in items)


def encode_documents(documents, tokenizer, template, skipped, each):
    """Yield (document, `Encoded`) in order: texts with the end-of-text token, conversations as the template ends them.

    template: `chat.ChatTemplate` of conversations, None where they are texts. Documents that are empty, not UTF-8, or of no use as
    conversations are told to `skipped` and left out, a batch's at once. each: `one_by_one`, or `cluster.Cluster.each`.
    """
    for batch, outcomes in each(partial(encode_batch, tokenizer, template), batches(documents)):
        fit = []
        for document, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, LeftOut):
                skipped.add(outcome.why, document, outcome.detail)
                continue
            if template:
                template.count_ends(outcome)
            fit.append((document, outcome))
        yield from fit


def batches(documents):
    """Yield lists of them, of about as much text as is to be encoded at once."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.content if isinstance(document.content, str) else repr(document.content))
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer, template, documents):
    """For each of some `sources.Document`s its `Encoded`, or the `LeftOut` that tells why there is none: a list."""
    outcomes = [readable(document.content, template) for document in documents]
    fit = [number for number, outcome in enumerate(outcomes) if not isinstance(outcome, LeftOut)]
    if fit:
        encode = tokenizer.encode if template is None else template.encode
        for number, encoded in zip(fit, encode([outcomes[number] for number in fit]), strict=True):
            outcomes[number] = encoded if isinstance(encoded, LeftOut) else finished(encoded, tokenizer, template)
    return outcomes


def text_of(tokens):
    """A text, int32 [n] with the end-of-text token, as `Encoded`: all of it is trained on."""
    return Encoded(tokens, np.array([[-1, 0, len(tokens)]], np.int32), True)


def readable(content, template):
    """A document's text, or `chat.Rendered`, or the `LeftOut` that it has come to."""
    if isinstance(content, BadRow):
        return LeftOut(content.why, content.problem)
    if content is None:
        return LeftOut("not UTF-8")
    empty = not content.messages if isinstance(content, Conversation) else not content.strip()
    if empty:
        return LeftOut("empty")
    if template is None:
        return content
    try:
        return template.render(content)
    except LeftOut as left_out:
        return left_out


def finished(encoded, tokenizer, template):
    """The `Encoded` of a text's tokens, or of a conversation's (tokens, answers)."""
    if template is None:
        return text_of(np.append(without_prefix(encoded, tokenizer.prefix), np.int32(tokenizer.eos_token_id)))
    tokens, answers = encoded
    rest = without_prefix(tokens, tokenizer.prefix)
    shift = len(tokens) - len(rest)
    shifts = np.where(answers < 0, 0, shift)
    return Encoded(rest, answers - shifts, not tokenizer.prefix or shift > 0)
