"""Writing shards of continuations with whichever engine, beside any number of other writers.

An engine has `wants_more` (room for another shard), `submit(index, list of p prompts, int64 [length])`, `step()`, which returns the
shards finished in it as (index, list of p 1-D int64 tensors, list of p finish reasons), `idle` (nothing is submitted), `use(base_model)`,
which gives it the `BaseModel` to decode with before anything is submitted, if it wants one, and `close()`.
"""

import json
import time

from data.progress import progress
from fms_spec.files import write_whole
from fms_spec.timing import Stopwatch

POLL_SECONDS = 0.2  # between looks at what others have written
STATUS_SECONDS = 5  # between status files, where no shard is finished


def write_shards(store, engine, indices, ahead=None, status=None):
    """Have the shards `indices` there: write those that are missing, and wait for those that other processes are writing.

    A shard that another process claimed and did not finish, because it was killed, is taken over.

    store: ContinuationStore. ahead: begin no shard beyond so many after those the store's reader has begun; None: don't wait for it.
    status: path of a JSON file that tells what `Tally.values` returns, rewritten as the work goes on.

    Returns:
        The `Tally`.

    Raises:
        UserError: a shard or the status cannot be written. No claim outlives an exception.
    """
    store.sweep()
    writer = ShardWriter(store, engine, indices, ahead)
    # One shard takes one step of the embedded engine, which has a bar of its own.
    with progress(total=len(indices), desc="continuations", unit="shard", disable=len(indices) == 1) as bar:
        try:
            while not writer.done:
                shards = writer.tally.shards
                writer.advance()
                writer.tally.keep(status, at_once=writer.tally.shards > shards)
                bar.set_postfix({"tokens/s": f"{writer.tally.values()['tokens_per_s']:.0f}"}, refresh=False)
                bar.update(writer.there - bar.n)
        finally:
            writer.release()
    writer.tally.keep(status, at_once=True)
    return writer.tally


class Tally(Stopwatch):
    """What a writer has done, and where its time went: `waiting`, and `writing`, the engine's steps and the files."""

    def __init__(self):
        super().__init__({"waiting": 0.0, "writing": 0.0})
        self.shards, self.tokens = 0, 0  # tokens of the continuations
        self._kept = time.monotonic()

    def values(self):
        """Plain numbers; tokens_per_s without the waiting."""
        seconds = {f"{part}_seconds": spent for part, spent in self.seconds.items()}
        return {"shards": self.shards, "tokens": self.tokens, **seconds, "tokens_per_s": self.tokens / (self.seconds["writing"] or 1)}

    def keep(self, path, at_once):
        """Write the values to `path`, if there is one: at once, or when they are STATUS_SECONDS old."""
        if path and (at_once or time.monotonic() - self._kept > STATUS_SECONDS):
            write_whole(path, json.dumps(self.values()).encode())
            self._kept = time.monotonic()


class ShardWriter:
    """Keeps the engine busy with shards it could claim."""

    def __init__(self, store, engine, indices, ahead):
        self.store, self.engine, self.ahead, self.tally = store, engine, ahead, Tally()
        self.asked = len(indices)
        self.todo = dict.fromkeys(indices)  # neither claimed here nor known to be there, in order
        self.claims = {}  # of what the engine is at
        self._next_look = 0.0

    @property
    def there(self):
        """How many of the shards are known to be there."""
        return self.asked - len(self.todo) - len(self.claims)

    @property
    def done(self):
        return self.there == self.asked

    def advance(self):
        """Submit what there is room for, then take one step of the engine, or a short rest if it has nothing to do."""
        self.begin()
        if self.engine.idle:
            if self.todo:
                with self.tally.measure("waiting"):
                    time.sleep(POLL_SECONDS)
            return
        with self.tally.measure("writing"):
            for index, continuations, finish_reasons in self.engine.step():
                self.claims[index].write(continuations, finish_reasons)
                del self.claims[index]
                self.tally.shards += 1
                self.tally.tokens += sum(map(len, continuations))

    def begin(self):
        """Claim and submit shards while the engine has room; looks again only after POLL_SECONDS where it found too few."""
        if not self.engine.wants_more or time.monotonic() < self._next_look:
            return
        end = float("inf") if self.ahead is None else self.store.shards_begun() + self.ahead
        for index in list(self.todo):
            if not self.engine.wants_more:
                return
            if index >= end:
                break
            claim = self.store.claim(index)
            if claim:
                self.claims[index] = claim
                self.engine.submit(index, self.store.block(index)[0])
            if claim or self.store.has(index):
                del self.todo[index]
        self._next_look = time.monotonic() + POLL_SECONDS

    def release(self):
        """End all claims."""
        for claim in self.claims.values():
            claim.release()
