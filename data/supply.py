"""How a trainer comes by the shard it reads next: writes it itself, has had it written ahead, or has it written alongside."""

import sys
import time

from tqdm import tqdm

from data.continuation_writer import POLL_SECONDS, write_shards
from fms_spec.errors import UserError

FIRST_MESSAGE, NEXT_MESSAGES = 10, 60  # seconds of waiting after which a message is printed


class Supply:
    """What every way has in common.

    Attributes:
        seconds: {"generation": writing shards in this process, "waiting": for shards of others}, counted up.
    """

    def __init__(self, store):
        self.store, self.seconds = store, {"generation": 0.0, "waiting": 0.0}

    def begin(self, place):
        """Told once before the run's first step; `place`: shards of the first epoch that have been read."""

    def need(self, index, place):
        """Return when shard `index` is there; `place`: shards of the first epoch that are begun, this one included."""
        raise NotImplementedError

    def figures(self):
        """{metric: number} of this moment, for the run's log."""
        return {}

    def close(self):
        """End what was started."""


class Inline(Supply):
    """The trainer's own process writes a missing shard when it is needed.

    rows: how many the run will read. make_engine: called if a shard is missing, at once, so that an engine that isn't there is told
    before the run starts.
    """

    def __init__(self, store, rows, make_engine):
        super().__init__(store)
        self.make_engine = make_engine
        self.engine = make_engine() if missing_shards(store, rows) else None

    def need(self, index, place):
        if self.store.has(index):
            return
        started = time.monotonic()
        self.engine = self.engine or self.make_engine()
        waiting = write_shards(self.store, self.engine, [index]).seconds["waiting"]  # another process was writing it
        self.seconds["waiting"] += waiting
        self.seconds["generation"] += time.monotonic() - started - waiting

    def close(self):
        if self.engine:
            self.engine.close()


class Ahead(Supply):
    """Every shard is there before the run starts.

    rows: how many the run will read. command: what writes the shards.

    Raises:
        UserError: shards that the run will read are missing; says how many, and the command.
    """

    def __init__(self, store, rows, command):
        super().__init__(store)
        self.command = command
        missing = missing_shards(store, rows)
        if missing:
            raise self.refusal(len(missing))

    def need(self, index, place):
        if not self.store.has(index):
            raise self.refusal(1)

    def refusal(self, missing):
        return UserError(f"{self.store.out_dir}: {missing} shards of continuations that this run reads are missing; run {self.command}")


class Alongside(Supply):
    """Producers write shards in processes of their own, not further ahead of the trainer than they were told.

    rows: how many the run will read. producers: start() starts them, check() restarts those that ended, statuses() returns what
    `continuation_writer.Tally.values` of each said last, stop() ends them.
    """

    def __init__(self, store, rows, producers):
        super().__init__(store)
        self.producers, self.missing = producers, bool(missing_shards(store, rows))

    def begin(self, place):
        if self.missing:
            self.store.post_place(place)
            self.producers.start()

    def need(self, index, place):
        self.store.post_place(place)
        started = time.monotonic()
        next_message = started + FIRST_MESSAGE
        while not self.store.has(index):
            if self.store.reader_place() < place:  # another run that reads the same folder is not so far
                self.store.post_place(place)
            self.producers.check()
            time.sleep(POLL_SECONDS)
            if time.monotonic() > next_message:
                waited, name = time.monotonic() - started, self.store.path(index).name
                tqdm.write(f"waiting for {name} since {waited:.0f} s; the producers' logs are in {self.producers.log_dir}", file=sys.stderr)
                next_message += NEXT_MESSAGES
        self.seconds["waiting"] += time.monotonic() - started

    def figures(self):
        statuses = self.producers.statuses()
        waiting, writing = (sum(status[f"{part}_seconds"] for status in statuses) for part in ("waiting", "writing"))
        if not waiting + writing:
            return {}
        rate = sum(status["tokens_per_s"] for status in statuses)
        return {"producer/waiting_share": waiting / (waiting + writing), "producer/tokens_per_s": rate}

    def close(self):
        self.producers.stop()


def missing_shards(store, rows):
    """Numbers of the missing ones among the first shards that hold `rows` useful rows; a missing one counts as full."""
    missing = []
    for index in range(store.shard_count):
        if rows <= 0:
            break
        if store.has(index):
            rows -= len(store.read(index))
        else:
            missing.append(index)
            rows -= len(store.block(index)[1])
    return missing
