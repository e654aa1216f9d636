"""Where the time of decoding goes, without making the device wait."""

import time
from typing import Any

import torch


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
