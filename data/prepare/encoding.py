"""Documents to tokens, many at a time. Shapes: n tokens, a answers."""

from typing import NamedTuple

import numpy as np

from data.prepare.chat import LeftOut
from data.prepare.rows import BAD_ROW, BadRow, Conversation
from data.tokenizer import without_prefix

# Text handed to the tokenizer's threads at once; enough to keep them busy, small against memory.
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


def encode_documents(documents, tokenizer, template, skipped):
    """Yield (document, `Encoded`) in order: texts with the end-of-text token, conversations as the template ends them.

    template: `chat.ChatTemplate` of conversations, None where they are texts. Documents that are empty, not UTF-8, or of no use as
    conversations are told to `skipped` and left out.
    """
    batch, characters = [], 0
    for document in documents:
        try:
            text = readable(document.content, template)
        except LeftOut as left_out:
            skipped.add(left_out.why, document, left_out.detail)
            continue
        batch.append((document, text))
        characters += len(text if template is None else text.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield from encode_batch(batch, tokenizer, template, skipped)
            batch, characters = [], 0
    if batch:
        yield from encode_batch(batch, tokenizer, template, skipped)


def text_of(tokens):
    """A text, int32 [n] with the end-of-text token, as `Encoded`: all of it is trained on."""
    return Encoded(tokens, np.array([[-1, 0, len(tokens)]], np.int32), True)


def readable(content, template):
    """A document's text, or `chat.Rendered`; raises LeftOut."""
    if isinstance(content, BadRow):
        raise LeftOut(BAD_ROW, content.problem)
    if content is None:
        raise LeftOut("not UTF-8")
    empty = not content.messages if isinstance(content, Conversation) else not content.strip()
    if empty:
        raise LeftOut("empty")
    return content if template is None else template.render(content)


def encode_batch(batch, tokenizer, template, skipped):
    """As encode_documents, for a list of (document, what `readable` made of it)."""
    documents, texts = zip(*batch)
    if template is None:
        for document, tokens in zip(documents, tokenizer.encode(texts), strict=True):
            tokens = np.append(without_prefix(tokens, tokenizer.prefix), np.int32(tokenizer.eos_token_id))
            yield document, text_of(tokens)
        return
    for document, encoded in zip(documents, template.encode(texts), strict=True):
        if isinstance(encoded, LeftOut):
            skipped.add(encoded.why, document)
            continue
        tokens, answers = encoded
        rest = without_prefix(tokens, tokenizer.prefix)
        shift = len(tokens) - len(rest)
        shifts = np.where(answers < 0, 0, shift)
        yield document, Encoded(rest, answers - shifts, not tokenizer.prefix or shift > 0)
