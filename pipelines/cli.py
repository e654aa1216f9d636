"""How every script starts: Fire fills a frozen, validated argument class, and the work runs after that."""

import ctypes
import difflib
import errno
import inspect
import json
import os
import re
import sys

import fire
import torch
from fire.decorators import SetParseFns
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from data.progress import quiet_libraries
from fms_spec.errors import UserError, shown
from fms_spec.files import check_writable

# Strict: Fire ignores annotations, so `--seed=1e3` would arrive as a float where an int was declared.
arguments = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))

TEXTS = ("prompt", "stop", "text_column")  # all other flags are places, numbers and words that begin with no ~
FLAG = re.compile("--|-[a-zA-Z]")  # as Fire has it: a negative number is a value
# What the machine may refuse, and nobody has to mend in the code.
MENDS = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "give a place that can be written to",
    errno.EACCES: "give a place that you have the rights to", errno.EPERM: "give a place that you have the rights to",
    errno.ENAMETOOLONG: "give a shorter name", errno.ELOOP: "mend the links", errno.ENOTDIR: "give another path",
    errno.EISDIR: "give another path", errno.EIO: "look after the disk", errno.ESTALE: "look after the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENFILE: "close other programs' files",
}  # fmt: skip

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def main(argument_class, run, overrides=False, words=None, computes=True):
    """Parse the command line (or `words`) into `argument_class` and call `run(parsed)`; with overrides `run(parsed, key.path=value words)`.

    Fire alone would run the work first and complain about unknown flags afterwards, so it only builds the argument object. A
    `UserError` ends the process with one line on stderr and exit code 1; an argument of the wrong type likewise, and a file that the
    machine refuses; Ctrl-C with 130. computes: whether `run` has models compute, on the CPU where there is no GPU.
    """
    quiet_libraries()
    keep_texts(argument_class)
    words = sys.argv[1:] if words is None else words
    try:
        flags, settings = read_words(argument_class, words, overrides)
        parsed = fire.Fire(argument_class, command=flags, serialize=lambda _: None)
        if isinstance(parsed, argument_class):
            if computes and not torch.cuda.is_available():
                keep_freed_memory()
            run(parsed, settings) if overrides else run(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # a check of ours, which names what it is about
            fail(first["msg"].removeprefix("Value error, "))
        fail(f"--{first['loc'][0]}: {first['msg']} (got {shown(first['input'])})")
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in MENDS or error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; {MENDS[error.errno]}")
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def main_of(commands):
    """`main` of the command that the first word names: {name: (argument class, run)}, with True behind them where it takes overrides."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        return main(*commands[name], words=sys.argv[2:])
    if name in ("--help", "-h"):
        return fire.Fire({name: argument_class for name, (argument_class, *_) in commands.items()}, command=["--help"])
    fail(f"{name or 'no command'}: give one of {', '.join(commands)} first; --help tells more")


def keep_texts(argument_class):
    """Tell Fire to leave text flags as they are typed: it would read --prompt=[1] as a list and --prompt=1e3 as a number.

    Several texts are given as a JSON list, --stop='["\\n", "END"]'.
    """
    parameters = inspect.signature(argument_class).parameters.values()
    texts = {parameter.name: str for parameter in parameters if parameter.annotation in (str, str | None)}
    texts |= {parameter.name: texts_of for parameter in parameters if parameter.name == "stop"}
    SetParseFns(**texts)(argument_class)


def texts_of(value):
    """A text as it is typed, or those of a JSON list."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, list) else value


def keep_freed_memory():
    """Tell glibc to keep freed blocks instead of giving them back to the system and fetching them, page by page, for the next tensor.

    On two CPU cores the hidden states of SmolLM2-135M in fp32 went from 672 to 853 tokens/s (`scripts.benchmark train_step`, the line
    named "freed_memory"). Elsewhere than on glibc, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
        mallopt(parameter, value)


def draft_shape(parsed):
    """`DraftShape` of the flags lookahead, top_k_per_head, nodes, min_probability and lookup."""
    from fms_spec.draft_shape import DraftShape  # with it come transformers and more, which scripts.doctor must start without

    widths = parsed.top_k_per_head
    widths = (widths,) if isinstance(widths, int) else widths
    return DraftShape(parsed.lookahead, widths, parsed.nodes, parsed.min_probability, parsed.lookup)


def check_new(path, flag):
    """Raise UserError where a new file can't be made at a Path, which the flag names."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: no such folder to write to; make it, or give another {flag}")
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; give another {flag}")
    check_writable(path)


def read_words(argument_class, words, overrides):
    """(flags, each as --name=value; key.path=value words) of a command line, of which nothing is left over.

    A first word without a flag is the value of the one that the class's FIRST names, if it names any.

    Raises:
        UserError: a flag that `argument_class` lacks (names the nearest one it has), without its value or given twice, a required one not
        given, a text that isn't UTF-8, or a word that is none of these.
    """
    parameters, words = inspect.signature(argument_class).parameters, list(words)
    if "--help" in words or "-h" in words:
        return words, []
    given, settings, first = {}, [], getattr(argument_class, "FIRST", None)
    if first and words and not FLAG.match(words[0]):
        words[0] = f"--{first}={words[0]}"
    while words:
        word = words.pop(0)
        if not FLAG.match(word):
            if not (overrides and "=" in word):
                raise UserError(f"{shown(word)}: a word that no flag takes; --help lists the flags")
            settings.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        check_name(name, parameters, given)
        switch = parameters[name].annotation is bool
        if not equals and words and not FLAG.match(words[0]) and (not switch or words[0] in ("True", "False")):
            value = words.pop(0)
        elif not equals and switch:
            value = "True"
        if not value:
            raise UserError(f"--{name} needs a value")
        given[name] = checked_text(name, value) if name in TEXTS else os.path.expanduser(value)  # the shell leaves a ~ behind = as it is
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise UserError(f"--{name} is required; --help lists all flags")
    return [f"--{name}={value}" for name, value in given.items()], settings


def check_name(name, parameters, given):
    """Raise UserError for a flag that isn't among `parameters`, or is `given` already."""
    if name not in parameters:
        near = difflib.get_close_matches(name, parameters, n=1)
        hint = f", did you mean --{near[0]}?" if near else f"; known: {', '.join('--' + known for known in parameters)}"
        raise UserError(f"unknown flag --{name}{hint}")
    if name in given:
        raise UserError(f"--{name} is given twice; leave one out")


def checked_text(name, value):
    """The text that a flag is given, as it is typed; raises UserError where it isn't UTF-8, which a path may be and no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{name}={shown(value)}: not UTF-8, it may be cut within a character; give it whole") from None
    return value


def fail(message, code=1):
    """Print one line on stderr and end the process."""
    sys.stdout.flush()
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    sys.exit(code)
