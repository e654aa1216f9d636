"""YAML 1.2 as people write settings in it: 1e-3 is a number, no is a word, and nothing in it makes objects."""

from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml import tokens as t
from ruamel.yaml.error import YAMLError

from fms_spec.errors import UserError

DEEPEST = 20  # a config's deepest value lies five deep; Python's parser ends at some hundreds, after seconds
STARTS = (t.BlockSequenceStartToken, t.BlockMappingStartToken, t.FlowSequenceStartToken, t.FlowMappingStartToken)
ENDS = (t.BlockEndToken, t.FlowSequenceEndToken, t.FlowMappingEndToken)


def read_yaml(path, what):
    """The value in a file. what: it is, for messages.

    Raises:
        UserError: one line naming the file, and the line of what is wrong in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors put a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    return parse(text, f"{what} {path}")


def parse(text, source):
    """The value in a text. source: what it stands in, for messages.

    Raises:
        UserError: no YAML, a tag (which would name a type), a value that there is none (a 99th of May), or nesting over DEEPEST.
    """
    try:
        problem = unwanted(text)
        value = None if problem else YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        said = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise UserError(f"{source}: {where}{said}") from None
    except ValueError as error:
        raise UserError(f"{source}: a value can't be read ({error})") from None
    if problem:
        raise UserError(f"{source}: {problem}")
    return value


def unwanted(text):
    """What no settings need, in words, or None."""
    depth = 0
    for token in YAML(typ="safe", pure=True).scan(text):
        line = token.start_mark.line + 1
        if isinstance(token, t.TagToken):
            return f"line {line}: a tag (!); write the value alone"
        depth += isinstance(token, STARTS) - isinstance(token, ENDS)
        if depth > DEEPEST:
            return f"line {line}: nested over {DEEPEST} deep"
    return None
