"""Prompts to evaluate with: held-out ones of a prepared folder, or the lines of a JSONL file."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from data.reader import check_tokenizer, read_manifest, read_prompts
from fms_spec.errors import UserError


def load_prompts(path, tokenizer_dir, limit=None):
    """List of 1-D int64 tensors.

    Args:
        path: a folder from prepare_data whose documents were partly held out, or a .jsonl file with a "prompt" text on each line.
        tokenizer_dir: the base model's. limit: use only the first so many.

    Raises:
        UserError: nothing there that can be read, another tokenizer's tokens, a malformed line, or no prompts.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: must be at least 1")
    if path.is_dir():
        check_tokenizer(read_manifest(path), tokenizer_dir)
        prompts = list(read_prompts(path, "held_out").tokens)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        prompts = [torch.tensor(tokenizer(text).input_ids, dtype=torch.int64) for text in read_texts(path)]
    if not prompts:
        raise UserError(f"prompts {path}: none in it")
    return prompts[:limit]


def read_texts(path):
    """The "prompt" of each line of a JSONL file; blank lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    texts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                text = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'prompts {path}, line {number}: expected a JSON object with a "prompt" text') from error
            if not isinstance(text, str) or not text:
                raise UserError(f'prompts {path}, line {number}: its "prompt" is no text')
            texts.append(text)
    return texts
