"""Where a run's figures go: JSON lines and TensorBoard."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fms_spec.files import cannot_write, write_whole


class Metrics:
    """Writes each record to metrics.jsonl and TensorBoard.

    After a resume, lines of steps that will be run again are dropped, so that every step stands there once. Of several processes only
    the main one `keeps` them.

    Args:
        lines: how many there were when the run was saved; where some are gone since, that is told on stderr.

    Attributes:
        lines: how many there are now.

    Raises:
        UserError: they can't be written, here and from `write`.
    """

    def __init__(self, out_dir, resumed_step, lines=0, keeps=True):
        self.path, self.keeps, self.lines = Path(out_dir) / "metrics.jsonl", keeps, lines
        if not keeps:
            return
        kept = [line for line in read_lines(self.path) if line["step"] <= resumed_step]
        if len(kept) < lines:
            print(f"warning: {self.path}: {lines - len(kept)} lines of the {lines} before step {resumed_step} are lost", file=sys.stderr)
        self.lines = len(kept)
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with self._writing():
            self.tensorboard = SummaryWriter(Path(out_dir) / "tensorboard", purge_step=resumed_step + 1)

    def write(self, step, values):
        """`values`: flat {name: number}; `step` is the number of optimiser steps done."""
        if not self.keeps:
            return
        with self._writing():
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        self.lines += 1

    def close(self):
        if self.keeps:
            with self._writing():
                self.tensorboard.close()

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise cannot_write(error.filename or self.path, error) from None


def read_lines(path):
    """The records of a metrics.jsonl, oldest first; what is none, such as a line cut short, is passed over, and so is a missing file."""
    try:
        texts = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for text in texts:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
