"""How far something is: a bar on a terminal, and in a file of what was printed a line now and then."""

import os
import sys

from tqdm import tqdm

EVERY = 30  # seconds between lines


class Lines:
    """A file for `tqdm` that prints on stderr, as a line of its own, what would be drawn over the bar before."""

    def write(self, text):
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        """Each line is flushed."""


def progress(items=None, **how):
    """`tqdm` over items, or to be updated by hand. how: more of its arguments.

    Off a terminal it is lines: at the beginning, every `EVERY` seconds, and in the end; with leave=False only where it takes so long. Of
    several processes the first shows its own.
    """
    how["disable"] = how.get("disable", False) or not first_process()
    if sys.stderr.isatty():
        return tqdm(items, dynamic_ncols=True, **how)
    delay = 0 if how.get("leave", True) else EVERY
    return tqdm(items, **how | {"file": Lines(), "ncols": 0, "position": 0, "mininterval": EVERY, "maxinterval": 2 * EVERY, "delay": delay})


def quiet_libraries():
    """Leave out other packages' own bars where none can be drawn, be they imported already or later, or in a process started from here."""
    if sys.stderr.isatty() and first_process():
        return
    for package in ("HF_HUB", "HF_DATASETS"):  # `transformers` asks the first
        os.environ.setdefault(f"{package}_DISABLE_PROGRESS_BARS", "1")
    if transformers := sys.modules.get("transformers.utils.logging"):
        transformers.disable_progress_bar()  # and those of the hub


def first_process():
    """Whether this is the first of the processes that torchrun started, or was not started by it."""
    return os.environ.get("RANK", "0") == "0"
