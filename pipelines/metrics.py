"""Where a run's figures go: JSON lines, TensorBoard, and the time each part took."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Writes each record to metrics.jsonl and TensorBoard.

    After a resume, lines of steps that will be run again are dropped, so that every step stands there once. Of several processes only
    the main one `keeps` them.
    """

    def __init__(self, out_dir, resumed_step, keeps=True):
        self.path, self.keeps = Path(out_dir) / "metrics.jsonl", keeps
        if not keeps:
            return
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.tensorboard = SummaryWriter(Path(out_dir) / "tensorboard", purge_step=resumed_step + 1)

    def write(self, step, values):
        """`values`: flat {name: number}; `step` is the number of optimiser steps done."""
        if not self.keeps:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def close(self):
        if self.keeps:
            self.tensorboard.close()


class Stopwatch:
    """Seconds by part, added up over a run; `seconds` travels with the checkpoints.

    On a GPU, work is queued: what a part is charged for is the time in which the host was held up by it.
    """

    def __init__(self, seconds=None):
        self.seconds = dict(seconds or {})

    @contextmanager
    def measure(self, part):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
