"""How every script starts: Fire fills a frozen, validated argument class, and the work runs after that."""

import ctypes
import difflib
import inspect
import sys

import fire
from fire.decorators import SetParseFns
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from fms_spec.errors import UserError

# Strict: Fire ignores annotations, so `--seed=1e3` would arrive as a float where an int was declared.
arguments = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def main(argument_class, run, overrides=False, words=None):
    """Parse the command line (or `words`) into `argument_class`, then call `run(parsed)`, or `run(parsed, words)` with trailing key.path=value words.

    Fire alone would run the work first and complain about unknown flags afterwards, so it only builds the argument object. A
    `UserError` ends the process with one line on stderr and exit code 1; an argument of the wrong type likewise; Ctrl-C with 130.
    """
    keep_freed_memory()
    keep_texts(argument_class)
    words = sys.argv[1:] if words is None else words
    settings = [word for word in words if overrides and not word.startswith("-") and "=" in word]
    flags = [word for word in words if word not in settings]
    try:
        check_flags(argument_class, flags)
        parsed = fire.Fire(argument_class, command=flags, serialize=lambda _: None)
        if isinstance(parsed, argument_class):
            run(parsed, settings) if overrides else run(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        flag = ".".join(str(part) for part in first["loc"])
        fail(f"--{flag}: {first['msg']} (got {first['input']!r})")
    except UserError as error:
        fail(str(error))
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
    """Tell Fire to leave text flags as they are typed: it would read --prompt=[1] as a list and --prompt=1e3 as a number."""
    parameters = inspect.signature(argument_class).parameters.values()
    texts = {parameter.name: str for parameter in parameters if parameter.annotation in (str, str | None)}
    SetParseFns(**texts)(argument_class)


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
    """`DraftShape` of the flags lookahead, top_k_per_head and nodes."""
    from fms_spec.proposers import DraftShape  # with it come transformers and more, which scripts.doctor must start without

    widths = parsed.top_k_per_head
    return DraftShape(parsed.lookahead, (widths,) if isinstance(widths, int) else widths, parsed.nodes)


def check_flags(argument_class, words):
    """Raise UserError for a flag that `argument_class` lacks, naming the nearest one it has, or for a required one not given."""
    parameters = inspect.signature(argument_class).parameters
    given = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--") and word != "--"]
    if "help" in given or "-h" in words:
        return
    for name in given:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f", did you mean --{near[0]}?" if near else f"; known: {', '.join('--' + known for known in parameters)}"
            raise UserError(f"unknown flag --{name}{hint}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise UserError(f"--{name} is required; --help lists all flags")


def fail(message, code=1):
    """Print one line on stderr and end the process."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
