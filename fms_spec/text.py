"""New tokens as text, piece by piece, ending where a stop string begins."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class TextStream:
    """Turns one sequence's tokens into text as they come.

    A character whose bytes are not all there yet is held back, and so is what may be the beginning of a stop string.

    Args:
        tokenizer: a `transformers` tokenizer. stop: strings, none of them empty.

    Attributes:
        text: everything given out so far. stopped: whether a stop string was met; it and what follows it never come out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()):
        self.backend, self.stop = tokenizer.backend_tokenizer, tuple(stop)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int, may_stop: bool = True) -> str:
        """Take one token id; returns the text that it sets free. With may_stop False, no part of it counts towards a stop string."""
        self.held += self.stream.step(self.backend, token) or ""
        if not may_stop:
            return self._release(len(self.held))
        starts = [start for start in (self.held.find(stop) for stop in self.stop) if start >= 0]
        self.stopped = self.stopped or bool(starts)
        return self._release(min(starts) if starts else len(self.held) - self._beginning())

    def finish(self) -> str:
        """The text still held back, once no token is to come."""
        return self._release(0 if self.stopped else len(self.held))

    def _release(self, count: int) -> str:
        free, self.held = self.held[:count], self.held[count:]
        self.text += free
        return free

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = range(min(len(self.held), max((len(stop) for stop in self.stop), default=1) - 1), 0, -1)
        return next((length for length in lengths if any(stop.startswith(self.held[-length:]) for stop in self.stop)), 0)
