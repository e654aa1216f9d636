"""Prompts to evaluate with: held-out ones of a prepared folder, or the lines of a JSONL file. Shapes: n tokens of a prompt."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.reader import check_tokenizer, read_manifest, read_prompts
from data.tokenizer import encode_prompt, read_embedding_size, refuse_unknown, served_tokenizer
from fms_spec.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """Tokens that the base model is to continue as they stand.

    Attributes:
        category: a text or None. encoded: int64 [n]. first_turn: which of its conversation's answers is asked for first, from 1; None for
        a text that is of none. role: whose message that answer follows, None where that isn't known. source: of the mixture that it was
        held out of, None for what is of none. turns: how many are asked for.
    """

    category: str | None
    encoded: torch.Tensor
    first_turn: int | None = None
    role: str | None = None
    source: str | None = None
    turns = 1

    def tokens(self, replies):
        """What the base model is to continue next: int64 [n].

        Args:
            replies: lists of token ids, what it answered to the turns before; fewer than `turns`.
        """
        assert len(replies) < self.turns
        return self.encoded


@dataclass(frozen=True)
class Chat:
    """A Prompt of one or more user turns, put together by the base model's chat template.

    Attributes:
        category: a text or None. texts: what the user says, turn by turn. tokenizer: a `transformers` one with a chat template.
    """

    category: str | None
    texts: list[str]
    tokenizer: Any
    first_turn, role, source = 1, "user", None

    @property
    def turns(self):
        return len(self.texts)

    def tokens(self, replies):
        """As Prompt.tokens: the conversation up to the first turn that `replies` holds no answer to, int64 [n]."""
        assert len(replies) < self.turns
        messages = [{"role": "user", "content": self.texts[0]}]
        for reply, text in zip(replies, self.texts[1:]):
            messages.append({"role": "assistant", "content": self.tokenizer.decode(reply, skip_special_tokens=True)})
            messages.append({"role": "user", "content": text})
        # the template writes BOS and the like itself; return_dict=False: transformers 5 would give a BatchEncoding
        return torch.tensor(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), dtype=torch.int64)


def load_prompts(path, tokenizer_dir, limit=None):
    """List of Prompt and Chat, in the file's order.

    Args:
        path: a folder from prepare_data whose documents were partly held out, or a .jsonl file. Each of its lines has a "prompt"
            text, encoded as in serving and continued, or "turns", a list of user texts for the chat template; and a "category" text, if
            wanted.
        tokenizer_dir: the base model's. limit: use only the first so many of each category; those without one count as one.

    Raises:
        UserError: nothing there that can be read, another tokenizer's tokens, tokens that the base model lacks, a malformed line, turns
            but no chat template, or no prompts.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: must be at least 1")
    prompts = held_out_prompts(path, tokenizer_dir) if os.path.isdir(path) else read_lines(path, tokenizer_dir)
    if not prompts:
        raise UserError(f'prompts {path}: none in it; give at least one line like {{"prompt": "Once upon a time"}}')
    kept, counts = [], Counter()
    for prompt in prompts:
        counts[prompt.category] += 1
        if limit is None or counts[prompt.category] <= limit:
            kept.append(prompt)
    return kept


def held_out_prompts(path, tokenizer_dir):
    """The Prompts that a prepared folder holds out."""
    manifest = read_manifest(path)
    tokenizer, held_out = check_tokenizer(manifest, tokenizer_dir), read_prompts(path, "held_out")
    refuse_unknown(torch.cat(held_out.tokens), tokenizer.embedding_size, tokenizer.backend, f"prompts {path}")
    mixed = "mixture" in manifest["inputs"]  # then the names of documents begin with that of their source
    sources = [name.partition("/")[0] if mixed else None for name in held_out.sources]
    return [Prompt(*facts) for facts in zip(held_out.categories, held_out.tokens, held_out.turns, held_out.roles, sources)]


def read_lines(path, tokenizer_dir):
    """The Prompt or Chat of each line of a JSONL file; blank lines are passed over."""
    try:
        # not splitlines(): it also cuts at U+2028 and the like, which JSON allows within a text
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"prompts {path}: can't be read ({problem}); give a prepared folder or a .jsonl file") from error
    tokenizer, embedding_size = served_tokenizer(tokenizer_dir), read_embedding_size(tokenizer_dir)
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"prompts {path}, line {number}"
        prompt, turns, category = read_fields(line, where)
        if turns is None:
            prompts.append(Prompt(category, torch.tensor(encode_prompt(tokenizer, prompt), dtype=torch.int64)))
        elif tokenizer.chat_template:
            prompts.append(Chat(category, turns, tokenizer))
        else:
            mend = 'give "prompt" texts, or take a base model with a chat template'
            raise UserError(f'{where}: it has "turns", but the tokenizer in {tokenizer_dir} has no chat template; {mend}')
        for text in turns or [prompt]:  # of a chat not what its template adds, which is the model's own
            refuse_unknown(tokenizer(text).input_ids, embedding_size, tokenizer.backend_tokenizer, where)
    return prompts


def read_fields(line, where):
    """(prompt, turns, category) of a line; None where it has none, and one of the first two is always None."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); write one JSON object on each line") from error
    fields = [entry.get(name) for name in ("prompt", "turns", "category")] if isinstance(entry, dict) else [None] * 3
    prompt, turns, category = fields
    if (prompt is None) == (turns is None):
        raise UserError(f'{where}: expected a JSON object with either "prompt", a text, or "turns", a list of user texts')
    if turns is None and not is_text(prompt):
        raise UserError(f'{where}: its "prompt" must be a text that is not empty')
    if prompt is None and not (isinstance(turns, list) and turns and all(map(is_text, turns))):
        raise UserError(f'{where}: its "turns" must be a list of one or more texts, none of them empty')
    if category is not None and not is_text(category):
        raise UserError(f'{where}: its "category" must be a text that is not empty; or leave it out')
    return fields


def is_text(value):
    """Whether it is text that a tokenizer takes: JSON can spell half a surrogate pair, which is none."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= character <= "\udfff" for character in value)
