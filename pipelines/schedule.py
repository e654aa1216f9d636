"""Which phase a step belongs to, and its learning rate: pure functions of the step, so a resumed run can't disagree."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A pattern of phases over a number of steps.

    Args:
        pattern: ((phase, steps), ...), one cycle; the default of this project is (("phase1", 5), ("phase2", 2)).
        mode: "interleaved" repeats the cycle; "sequential" runs the same number of steps of each phase, one phase after the other,
            in the order in which they first appear.
        steps: optimiser steps in all; the last cycle is cut where they end.
    """

    pattern: tuple
    mode: str
    steps: int

    def phase(self, step):
        """(phase, step within the phase) of optimiser step `step`, from 0."""
        if self.mode == "sequential":
            for phase, count in self.phase_steps().items():
                if step < count:
                    return phase, step
                step -= count
            raise IndexError("step is past the end of the schedule")
        cycles, offset = divmod(step, self._cycle_length())
        phase = self._phase_in_cycle(offset)
        within = sum(self._phase_in_cycle(i) == phase for i in range(offset))
        return phase, cycles * self._per_cycle(phase) + within

    def phase_steps(self):
        """{phase: its number of steps}, the same in both modes, in order of first appearance."""
        cycles, rest = divmod(self.steps, self._cycle_length())
        names = list(dict.fromkeys(name for name, _ in self.pattern))
        tail = [self._phase_in_cycle(i) for i in range(rest)]
        return {name: cycles * self._per_cycle(name) + tail.count(name) for name in names}

    def _cycle_length(self):
        return sum(count for _, count in self.pattern)

    def _per_cycle(self, phase):
        return sum(count for name, count in self.pattern if name == phase)

    def _phase_in_cycle(self, offset):
        for name, count in self.pattern:
            if offset < count:
                return name
            offset -= count
        raise IndexError("offset is past the end of the cycle")


def learning_rate_factor(step, steps, *, peak, end, warmup_steps, warmup_share, decay):
    """Learning rate of a phase as a share of the configured one.

    Parabolic warm-up to `peak` over min(warmup_steps, steps * warmup_share) steps, under a decay from `peak` to `end` at the phase's last
    step: "cosine" (the IBM recipe: peak 1 and end 0.1 in phase 1, 0.1 and 0.01 in phase 2), "linear" or "constant".

    Args:
        step: within the phase, from 0. steps: of the whole phase, at least 1. Phases of one step work: nothing divides by zero.
    """
    warmup = max(1.0, min(warmup_steps, steps * warmup_share))
    warm = peak * (1 - (1 - min(step + 1, warmup) / warmup) ** 2)
    progress = step / max(1, steps - 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[decay]
    return min(warm, end + (peak - end) * shape)
