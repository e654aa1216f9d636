"""A stand-in for the base model, and a process that writes continuations with it: continuation_helpers.py FOLDER SECONDS ROOM."""

import os
import sys
import time

import torch

from data.continuations.store import ContinuationStore
from data.continuations.writer import write_shards
from data.reader import Prompts

SETTINGS = {"base_model": "abc", "engine": "transformers", "sampling": {"temperature": 1.0, "top_k": 10, "stop": (0,)}}


def some_prompts(count=10, length=3):
    return Prompts(
        list(torch.arange(count * length).reshape(count, length)),
        torch.arange(count) + 100,
        [f"file#{number}" for number in range(count)],
        *[[None] * count] * 3,
    )


def open_store(folder, **changes):
    return ContinuationStore(folder, **{"prompts": some_prompts(), "shard_prompts": 4, "settings": SETTINGS, "seed": 0, **changes})


class Engine:
    """The first prompt token decides length and contents; one shard is finished a step, the one that was submitted first.

    room: shards that may be submitted at once. seconds: of a step. log: file that gets "process shard" for each shard submitted.
    """

    def __init__(self, lengths=lambda first: first % 5 + 2, room=1, seconds=0.0, log=None):
        self.lengths, self.room, self.seconds, self.log = lengths, room, seconds, log
        self.begun, self.submitted, self.closed = [], [], False

    def use(self, base_model):
        pass

    @property
    def idle(self):
        return not self.submitted

    @property
    def wants_more(self):
        return len(self.submitted) < self.room

    def submit(self, index, prompts):
        self.begun.append(index)
        self.submitted.append((index, prompts))
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {index}\n")

    def step(self):
        time.sleep(self.seconds)
        index, prompts = self.submitted.pop(0)
        lengths = [self.lengths(int(prompt[0])) for prompt in prompts]
        continuations = [torch.arange(length) + 1000 * int(prompt[0]) for prompt, length in zip(prompts, lengths)]
        return [(index, continuations, ["stop" if length < 6 else "length" for length in lengths])]

    def close(self):
        self.closed = True


def table_of(folder):
    """A store of forty shards of one prompt."""
    return open_store(folder, prompts=some_prompts(40), shard_prompts=1)


if __name__ == "__main__":
    folder, seconds, room = sys.argv[1:]
    table = table_of(folder)
    write_shards(table, Engine(seconds=float(seconds), room=int(room), log=f"{folder}.log"), range(table.shard_count))
