"""Where time goes: seconds of work and of its parts, without making the device wait before they are asked for."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch

T = TypeVar("T")
HOST = torch.device("cpu")  # whose clock is the host's: for work that has waited for its device when it returns


class Marks:
    """Marks the ends of parts of a step and adds up the seconds between them; on a GPU by events, read only when asked for."""

    def __init__(self, device: torch.device):
        self.device, self.gpu = device, device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []  # the moment: an event, or seconds
        self.mark("start")

    def mark(self, part: str) -> None:
        """The part that began with the last mark ends here."""
        if self.gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self.device))  # torch's own choice is the first GPU's, not this one's
        else:
            moment = time.perf_counter()
        self.marks.append((part, moment))

    def seconds(self) -> dict[str, float]:
        """{part: seconds}."""
        if self.gpu:
            torch.cuda.synchronize(self.device)
        spent: dict[str, float] = {}
        for (_, before), (part, after) in zip(self.marks, self.marks[1:]):
            elapsed = before.elapsed_time(after) / 1000 if self.gpu else after - before
            spent[part] = spent.get(part, 0.0) + elapsed
        return spent


def timed(work: Callable[[], T], device: torch.device = HOST) -> tuple[T, float]:
    """(what a function without arguments returns, seconds it took); on a GPU with all that it queued there."""
    marks = Marks(device)
    result = work()
    marks.mark("work")
    return result, marks.seconds()["work"]


class Stopwatch:
    """Seconds by part on the host's clock, added up over a run; `seconds` travels with the checkpoints.

    On a GPU, work is queued: what a part is charged for is the time in which the host was held up by it.
    """

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = dict(seconds or {})

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({part: time.perf_counter() - start})

    def timed(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The items, the time that it takes to come by each charged to `part`."""
        iterator = iter(items)
        while True:
            with self.measure(part):
                one = list(islice(iterator, 1))
            if not one:
                return
            yield one[0]

    def add(self, seconds: dict[str, float]) -> None:
        """Charge {part: seconds} that were measured elsewhere."""
        for part, spent in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
