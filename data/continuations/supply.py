"""How a trainer comes by the shard it reads next: writes it itself, has had it written ahead, or has it written alongside."""

import sys
import time

from tqdm import tqdm

from data.continuations.writer import POLL_SECONDS, write_shards
from fms_spec.errors import UserError
from fms_spec.timing import timed

FIRST_MESSAGE, NEXT_MESSAGES = 10, 60  # seconds of waiting after which a message is printed


class Supply:
    """What all have in common."""

    def __init__(self, store):
        self.store = store
        store.sweep()  # a writer that was killed may have left a lock on a shard that is there, which nobody will claim again

    def begin(self, base_model, begun):
        """Told once before the run's first step. base_model: the run's. begun: shards of the first epoch that have been read."""

    def have(self, index, begun):
        """Return when shard `index` is there; `begun`: shards of the first epoch that are begun, this one included.

        Returns:
            {"generation": seconds of writing shards in this process, "waiting": of waiting for others' shards}; what took none is left out.

        Raises:
            UserError: it can't be had.
        """
        raise NotImplementedError

    def figures(self):
        """{metric: number} of this moment, for the run's log."""
        return {}

    def close(self):
        """End what was started."""


class Inline(Supply):
    """The trainer's own process writes a missing shard when it is needed.

    rows: how many the run will read. make_engine: called if a shard is missing, at once, so that an engine that isn't there is told
    before anything is loaded. writers: trainers that will need the same shard at the same time; each writes another one of those to come.
    """

    def __init__(self, store, rows, make_engine, writers=1):
        super().__init__(store)
        self.make_engine, self.writers, self.base_model = make_engine, writers, None
        self.missing = missing_shards(store, rows)
        self.engine = make_engine() if self.missing else None

    def begin(self, base_model, begun):
        self.base_model = base_model
        if self.engine:
            self.engine.use(base_model)

    def have(self, index, begun):
        if self.store.has(index):
            return {}
        if self.engine is None:  # more is read than was said
            self.engine = self.make_engine()
            self.engine.use(self.base_model)
        following = [other for other in self.missing if other > index and not self.store.has(other)]
        tally, seconds = timed(lambda: write_shards(self.store, self.engine, [index, *following[: self.writers - 1]]))
        waiting = tally.seconds["waiting"]  # other processes were writing
        return {"generation": seconds - waiting, "waiting": waiting}

    def close(self):
        if self.engine:
            self.engine.close()


class GroupInline(Supply):
    """As a supply, by the first of some processes that hold one base model between them; the others work for it.

    supply: of the leader. engine: also `supply`'s; has `leads`, and `follow()`, which returns when the leader calls `dismiss()`.
    """

    def __init__(self, supply, engine):
        super().__init__(supply.store)
        self.supply, self.engine = supply, engine

    def begin(self, base_model, begun):
        self.engine.use(base_model)
        self.supply.begin(base_model, begun)

    def have(self, index, begun):
        if self.engine.leads:
            spent = self.supply.have(index, begun)
            self.engine.dismiss()
            return spent
        return {"generation": timed(self.engine.follow)[1]}

    def close(self):
        self.supply.close()


class Awaited(Supply):
    """Another process of the run sees to it that the shards are written."""

    def have(self, index, begun):
        return {"waiting": timed(lambda: self.wait(index))[1]}

    def wait(self, index):
        while not self.store.has(index):
            time.sleep(POLL_SECONDS)


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

    def have(self, index, begun):
        if not self.store.has(index):
            raise self.refusal(1)
        return {}

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

    def begin(self, base_model, begun):
        if self.missing:
            self.store.post_shards_begun(begun)
            self.producers.start()

    def have(self, index, begun):
        if self.missing:
            self.store.post_shards_begun(begun)
        return {"waiting": timed(lambda: self.wait(index, begun))[1]}

    def wait(self, index, begun):
        started = time.monotonic()
        next_message = started + FIRST_MESSAGE
        while not self.store.has(index):
            if self.store.shards_begun() < begun:  # another run that reads the same folder is not so far
                self.store.post_shards_begun(begun)
            self.producers.check()
            time.sleep(POLL_SECONDS)
            if time.monotonic() > next_message:
                waited, name = time.monotonic() - started, self.store.path(index).name
                tqdm.write(f"waiting for {name} since {waited:.0f} s; the producers' logs are in {self.producers.log_dir}", file=sys.stderr)
                next_message += NEXT_MESSAGES

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
