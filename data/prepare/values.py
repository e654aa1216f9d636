"""JSON values of rows, checked: what they must be, and what they are called where they are something else."""

import json

from data.manifest import reason
from fms_spec.errors import UserError


def checked(text, where):
    """A text, refused where it is something else."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {kind(text)}, not a text")
    return text


def json_list(value, column, where, separator=": "):
    """A list, which tables without nested columns spell as JSON."""
    where = f"{where}{separator}{column}"
    value = parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise UserError(f"{where}: {kind(value)}, not a list")
    return value


def parsed(content, where):
    """The JSON value that a text or bytes spell."""
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of JSON ({reason(error)}); mend or remove the line") from None


def kind(value):
    """What a JSON value is, in a word."""
    words = {type(None): "nothing", dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return words.get(type(value), "a number")
