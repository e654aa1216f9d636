"""What a row of a table holds, told by its columns or named: a text, or a conversation in one of the spellings that are in use."""

import difflib
import math
import re
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from data.prepare.values import checked, json_list, kind, parsed
from fms_spec.errors import UserError, shown

BAD_ROW = "unreadable"  # why it is left out
ANY_TEXT = "any text"  # a format that is asked for what is evaluated on: every text of a row, whatever its column
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot
SHOWN_COLUMNS = 500  # characters of a message: a table without a header has a text for a name
# Columns of each format: those that tell it, and those that are read where they are there.
FORMATS = {
    "text": ((), ()),  # of the column that is named
    "messages": (("messages",), ("system", "tools", "category")),
    "sharegpt": (("conversations",), ("system", "tools", "category")),
    "ultrachat": (("data",), ("category",)),
    "alpaca": (("instruction", "output"), ("input", "system", "category")),
    "prompt_completion": (("prompt", "completion"), ("tools", "category")),
}
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SPEAKERS = ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
UNASKED = [name for name, role in SPEAKERS.items() if role not in ("user", "assistant")]


class Conversation(NamedTuple):
    """Messages as chat templates take them, {"role", "content", …}, the tools that the assistant may call, None for none, and the kind of
    conversation that the row says it is, by which an evaluation tells them apart."""

    messages: list
    tools: list | None = None
    category: str | None = None

    @property
    def asked_by(self):
        """Whose message each of the assistant's follows: roles, "" where it is the first."""
        roles = ["", *(message["role"] for message in self.messages)]
        return tuple(before for before, role in pairwise(roles) if role == "assistant")


class BadRow(NamedTuple):
    """A row that can't be read, or isn't wanted. problem: which, and why; why: the same for all of a kind."""

    problem: str
    why: str = BAD_ROW


class Wanted(NamedTuple):
    """What a source's rows are to be read as.

    format: of FORMATS, None to be told by their columns, or ANY_TEXT. on_bad_row: "stop" or "skip".
    """

    text_column: str = "text"
    format: str | None = None
    on_bad_row: str = "stop"

    def tried(self, read, *row):
        """What `read` makes of a row; a `BadRow` where it raises UserError and such rows are skipped."""
        try:
            return read(*row)
        except UserError as error:
            if self.on_bad_row == "stop":
                raise
            return BadRow(str(error))


class Layout(NamedTuple):
    """How a table's rows are read. columns: those it needs; read: function of (row, where it stands) giving a text, "" for null, None for
    one that UTF-8 cannot spell, or a `Conversation`."""

    format: str
    columns: list
    read: Any

    @property
    def conversations(self):
        """Whether its rows are read as those, not as texts."""
        return self.format in READERS


def check_format(name, text_column):
    """Raise UserError for a --format that isn't known, or has no text for --text_column to name."""
    if name is not None and name not in FORMATS:
        raise UserError(f"--format={name}: not known; give one of {', '.join(FORMATS)}, or leave it out to tell it by the columns")
    if name not in (None, "text") and text_column != "text":
        raise UserError(f"--text_column={text_column}: --format={name} reads columns of its own; leave one of the two out")


def layout_of(names, wanted, where):
    """The `Layout` of a table with columns of these names.

    Raises:
        UserError: they are of no format, or of several, or lack those of the one that is wanted; names `where`.
    """
    if wanted.format == ANY_TEXT:
        return Layout(ANY_TEXT, list(names), lambda row, _: list(texts_within(row)))
    column = wanted.text_column
    needed = {name: (column,) if name == "text" else FORMATS[name][0] for name in FORMATS}
    if wanted.format or column != "text":
        found = [wanted.format or "text"]
        missing = [name for name in needed[found[0]] if name not in names]
        if missing:
            raise no_column(where, missing[0], names)
    else:
        found = [name for name, columns in needed.items() if all(column in names for column in columns)]
    if not found:
        raise no_column(where, column, names)
    if len(found) > 1:
        raise UserError(f"{where}: its columns are those of {' and of '.join(found)}; say which with --format={found[0]} or another")
    (name,) = found
    columns = [*needed[name], *(other for other in FORMATS[name][1] if other in names)]
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise UserError(f"{where}: two columns {twice[0]!r}")
    return Layout(name, columns, partial(text_of, column=column) if name == "text" else partial(conversation_of, read=READERS[name]))


def text_of(row, where, column):
    """The text of one row."""
    if column not in row:
        raise no_column(where, column, list(row))
    text = row[column]
    if isinstance(text, bytes):
        try:
            return text.decode()
        except UnicodeDecodeError:
            return None
    if text is not None and not isinstance(text, str):
        raise no_text(where, column, type(text).__name__)
    return None if text and not text.isascii() and LONE_SURROGATE.search(text) else text or ""


def texts_within(value):
    """Yield every text in a JSON value, but not what system and tools say, nor descriptions of tools."""
    if isinstance(value, str):
        if not LONE_SURROGATE.search(value):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_within(item)
    elif isinstance(value, dict) and not any(value.get(name) in UNASKED for name in ("role", "from")):
        for name, item in value.items():
            if name not in ("tools", "system", "role", "from"):
                yield from texts_within(item)


def conversation_of(row, where, read):
    """A row's conversation as `read` finds it, with its category, a text or a number, such as that of a class."""
    category = row.get("category")
    if isinstance(category, float):  # a table whose rows don't all have a number makes floats of them
        category = None if math.isnan(category) else int(category) if category.is_integer() else category
    name = str(category) if isinstance(category, int | float) else checked(category or "", f"{where}: category")
    return read(row, where)._replace(category=spellable(name) or None)


def spellable(text):
    """A text with a mark in the place of what UTF-8 cannot spell."""
    return LONE_SURROGATE.sub("\ufffd", text)


def messages_of(row, where, column="messages"):
    """OpenAI's messages, or ShareGPT's turns, in whichever column."""
    turns = json_list(field_of(row, column, where), column, where)
    messages = [message_of(turn, f"{where}: {column}[{number}]") for number, turn in enumerate(turns)]
    system = row.get("system") and [{"role": "system", "content": text_field(row, "system", where)}]
    return Conversation((system or []) + messages, tools_of(row, where))


def ultrachat_of(row, where):
    """Texts by turns of the user and of the assistant."""
    texts = json_list(field_of(row, "data", where), "data", where)
    for number, text in enumerate(texts):
        checked(text, f"{where}: data[{number}]")
    return Conversation([{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)])


def alpaca_of(row, where):
    """An instruction, with what it is about below it where there is that, and the answer."""
    asked = [text_field(row, name, where) for name in ("instruction", "input") if name == "instruction" or row.get(name)]
    turns = [("system", text_field(row, "system", where))] if row.get("system") else []
    turns += [("user", "\n\n".join(asked)), ("assistant", text_field(row, "output", where))]
    return Conversation([{"role": role, "content": text} for role, text in turns])


def prompt_completion_of(row, where):
    """A prompt and its completion, each a text or a list of messages."""
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = field_of(row, column, where)
        if isinstance(value, list):
            messages += [message_of(turn, f"{where}: {column}[{number}]") for number, turn in enumerate(value)]
        else:
            messages.append({"role": role, "content": text_field(row, column, where)})
    return Conversation(messages, tools_of(row, where))


READERS = {
    "messages": messages_of,
    "sharegpt": partial(messages_of, column="conversations"),
    "ultrachat": ultrachat_of,
    "alpaca": alpaca_of,
    "prompt_completion": prompt_completion_of,
}


def message_of(turn, where):
    """One message {"role", "content", …} of a turn in OpenAI's spelling, whose other fields are kept, or in ShareGPT's."""
    names, roles = (("from", "value"), SPEAKERS) if isinstance(turn, dict) and "from" in turn else (("role", "content"), ROLES)
    if not isinstance(turn, dict) or names[0] not in turn:
        raise UserError(f'{where}: {kind(turn)}, not a message with "role" and "content", or "from" and "value"')
    role = roles.get(turn[names[0]]) if isinstance(turn[names[0]], str) else None
    if role is None:
        raise UserError(f"{where}.{names[0]}: {shown(turn[names[0]])} is none of {', '.join(roles)}")
    rest = {} if names[0] == "from" else {name: value for name, value in turn.items() if name not in names and value is not None}
    if "tool_calls" in rest:
        calls = json_list(rest.pop("tool_calls"), "tool_calls", where, separator=".")
        called = [call_of(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
        rest |= {"tool_calls": called} if called else {}  # templates that ask whether the field is there take none for one
    if role == "assistant" and turn.get(names[1]) is None:  # it called tools, or only thought
        return {"role": role, "content": ""} | rest
    if names[1] not in turn:
        raise UserError(f"{where}.{names[1]}: missing")
    return {"role": role, "content": content_of(turn[names[1]], f"{where}.{names[1]}")} | rest


def content_of(content, where):
    """A message's text, or the texts of its parts, one after the other."""
    if not isinstance(content, list):
        return checked(content, where)
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise UserError(f"{where}[{number}].type: {shown(part['type'])}, and only text is read")
        texts.append(checked(part.get("text") if isinstance(part, dict) else part, f"{where}[{number}]"))
    return "".join(texts)


def call_of(call, where):
    """A tool call with its arguments as the object that templates take; OpenAI's own files have it spelt as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f'{where}: {kind(call)}, not a call with a function\'s "name"')
    if isinstance(function.get("arguments"), str):
        arguments = function | {"arguments": parsed(function["arguments"], f"{where}: its arguments")}
        return call | {"function": arguments} if "function" in call else arguments
    return call


def tools_of(row, where):
    """The row's tools, None where it has none."""
    tools = row.get("tools") or None
    if tools is None:
        return None
    tools = json_list(tools, "tools", where)
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise UserError(f"{where}: tools[{number}]: {kind(tool)}, not the JSON schema of a function")
    return tools or None


def field_of(row, column, where):
    if column not in row:
        raise no_column(where, column, list(row))
    return row[column]


def text_field(row, column, where):
    return checked(field_of(row, column, where), f"{where}: {column}")


def no_text(where, column, kind):
    """The error for a text column that holds something else."""
    return UserError(f"{where}: column {column!r} holds {kind}, not strings; name another with --text_column, or leave it out")


def no_column(where, column, names):
    """The error for an absent column, with the nearest one there is."""
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean --text_column={near[0]}? " if near else ""
    known = ", ".join(" and ".join(needed) for needed, _ in FORMATS.values() if needed)
    has = f"It has: {listed(names)} (choose with --text_column; conversations are read from {known})"
    return UserError(f"{where}: no column {column!r}; {hint}{has}")


def listed(names):
    """Names of columns, on one line and not too long."""
    text = " ".join(", ".join(names).split())
    return text if len(text) <= SHOWN_COLUMNS else text[:SHOWN_COLUMNS] + "…"
