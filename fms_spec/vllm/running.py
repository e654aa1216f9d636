"""Running states between the passes of a draft in vLLM, which itself carries nothing but rows as wide as the base model.

So states stay here, in buffers that never move (a recorded CUDA graph reads them where they are), and what vLLM carries is a row's number,
written in numbers that 16 bits hold exactly.

Shapes: n tokens of a pass, d base width.
"""

from typing import Any

import torch

MARK = -1.0  # first number of a row that holds a row's number; all behind the digits are zero, as in no state of a base model
BASE, DIGITS = 128, 4  # bfloat16 holds whole numbers up to 256


class RunningStates:
    """Room for the states of `rows` tokens. positions, heads: int64 [rows], of each one its t and the head that has seen its token."""

    def __init__(self, rows: int, device: torch.device):
        self.rows = rows
        self.parts: list[torch.Tensor | None] | None = None
        self.positions, self.heads, number = (torch.arange(rows, device=device) for _ in range(3))
        self.digits = torch.stack([number // BASE**digit % BASE for digit in range(DIGITS)], dim=-1)

    def keep(self, state: tuple[torch.Tensor | None, ...], positions: torch.Tensor, heads: torch.Tensor) -> None:
        """Put the state of a pass's n tokens into the first n rows."""
        if self.parts is None:
            self.parts = [part if part is None else part.new_zeros(self.rows, *part.shape[1:]) for part in state]
        for room, value in zip([*self.parts, self.positions, self.heads], [*state, positions, heads]):
            if room is not None and value is not None:
                room[: len(value)] = value

    def state(self, rows: torch.Tensor) -> Any:
        """The states of rows int64 [n]."""
        assert self.parts is not None
        return tuple(part if part is None else part[rows] for part in self.parts)

    def named(self, like: torch.Tensor) -> torch.Tensor:
        """[n, d] like `like`: the numbers of the first n rows."""
        named = torch.zeros_like(like)
        named[:, 0] = MARK
        named[:, 1 : 1 + DIGITS] = self.digits[: len(like)]
        return named

    def numbers(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(number of the row that each of [n, d] names, int64 [n], some row where it is a base model's state; whether it names one)."""
        names = (hidden[:, 0] == MARK) & (hidden[:, 1 + DIGITS :] == 0).all(-1)
        digits = hidden[:, 1 : 1 + DIGITS].where(names[:, None], 0).long()
        return sum(digits[:, digit] * BASE**digit for digit in range(DIGITS)).clamp(0, self.rows - 1), names
