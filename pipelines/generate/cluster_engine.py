"""Engines in the processes of a Ray cluster, which pass for one: shards go to whichever wants more, and come back to be written here."""

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from data.cluster import Cluster
from data.manifest import reason
from fms_spec.errors import UserError
from fms_spec.model_config import resolve_base_model
from fms_spec.weights import fingerprint
from pipelines.generate.engines import start_engine
from pipelines.generate.vllm_engine import need_vllm

STEP_SECONDS = 0.2  # of an engine that is never done, until it is asked what it has finished
WAIT_SECONDS = 1  # for any of them to finish something
END_SECONDS = 5  # for engines to end
DEATHS = 3  # in one place, without a shard from it in between


class Worker:
    """An engine in a process of the cluster, started when it is first asked for a step. Arguments: see `engines.start_engine`."""

    def __init__(self, *how):
        self.how, self.engine = how, None

    def step(self, shards):
        """Take (index, prompts) of some shards and go on; returns (what an engine's `step` does, whether it wants more)."""
        try:
            self.engine = self.engine or start_engine(*self.how)
            for index, prompts in shards:
                self.engine.submit(index, prompts)
            finished, end = [], time.monotonic() + STEP_SECONDS
            while not finished and not self.engine.idle and time.monotonic() < end:
                finished = self.engine.step()
        except UserError as error:
            import ray

            raise UserError(f"node {ray.util.get_node_ip_address()}: {error}") from None
        return finished, self.engine.wants_more

    def close(self):
        if self.engine:
            self.engine.close()


@dataclass(eq=False)
class Place:
    """Where a worker runs. call: what it is at, None for nothing. given: shards to be handed over with the next call; shards: what it has
    not finished, {index: prompts}. deaths: of workers here since the last shard."""

    worker: Any
    call: Any
    given: list = field(default_factory=list)
    shards: dict = field(default_factory=dict)
    wants_more: bool = False
    deaths: int = 0


class ClusterEngine:
    """One worker on each GPU of a cluster, or where it has none one for each so many processors as its smallest node has.

    The shards of a worker that died go to the others, and another is started as soon as there is room for it.

    Args:
        address: see `data.cluster.Cluster`. settings: `GenerationSection`. base_model: `BaseModelSection`, known on each node.
        prompt_length: tokens. seed: of the store.

    Raises:
        UserError: as `Cluster`; a node has another base model, or none, or lacks the engine.
    """

    def __init__(self, address, settings, base_model, prompt_length, seed):
        self.cluster, self.places, self.lost = Cluster(address), [], {}
        try:
            if os.path.isdir(base_model.name):  # nodes work in other folders
                base_model = base_model.model_copy(update={"name": os.path.abspath(base_model.name)})
            self.cluster.ask(refuse_node, settings.engine, base_model.name, fingerprint(resolve_base_model(base_model.name)))
            count, share = places_of([node["Resources"] for node in self.cluster.nodes])
            make = self.cluster.ray.remote(scheduling_strategy="SPREAD", **share)(Worker)
            self.make = lambda: make.remote(settings, base_model, prompt_length, seed)
            self.places = [self.begin() for _ in range(count)]
        except BaseException:
            self.close()
            raise

    def begin(self, deaths=0):
        """A `Place` with a new worker in it."""
        worker = self.make()
        return Place(worker, worker.step.remote([]), deaths=deaths)

    @property
    def idle(self):
        """Whether nothing is to be waited for, be it a worker that is starting."""
        return not self.lost and not any(place.call or place.shards for place in self.places)

    @property
    def wants_more(self):
        return not self.lost and any(place.wants_more for place in self.places)

    def submit(self, index, prompts):
        """Take the prompts of shard `index`, a list of p int64 [length]."""
        place = next(place for place in self.places if place.wants_more)
        place.shards[index], place.wants_more = prompts, False
        place.given.append((index, prompts))

    def step(self):
        """Have all work, and wait a little for one of them; returns [(index, list of p continuations; list of p finish reasons)]."""
        while self.lost and any(place.wants_more for place in self.places):
            index = min(self.lost)
            self.submit(index, self.lost.pop(index))
        for place in self.places:
            if place.call is None and place.shards:
                place.call, place.given = place.worker.step.remote(place.given), []
        calls = {place.call: place for place in self.places if place.call}
        self.cluster.ray.wait(list(calls), timeout=WAIT_SECONDS)
        ready, _ = self.cluster.ray.wait(list(calls), num_returns=len(calls), timeout=0)  # all: one that is quick would hide the others
        return [shard for call in ready for shard in self.finished(calls[call])]

    def finished(self, place):
        """What a worker that is ready has finished."""
        errors, call, place.call = self.cluster.ray.exceptions, place.call, None
        try:
            finished, place.wants_more = self.cluster.ray.get(call)
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(f"{self.cluster.flag}: {error.cause}") from None
            raise
        except errors.RayError as error:
            self.replace(place, error)
            return []
        for index, *_ in finished:
            del place.shards[index]
        place.deaths = 0 if finished else place.deaths
        return finished

    def replace(self, place, error):
        """Start another worker in place of one that died."""
        if place.deaths + 1 == DEATHS:
            raise UserError(f"{self.cluster.flag}: a worker died {DEATHS} times without a shard ({reason(error)}); see Ray's logs")
        lost = ", ".join(map(str, place.shards)) or "none"
        print(f"a worker died ({reason(error)}): starting another, shards that are asked for again: {lost}", file=sys.stderr, flush=True)
        self.cluster.ray.kill(place.worker)  # where it is only out of reach
        self.lost |= place.shards
        self.places[self.places.index(place)] = self.begin(place.deaths + 1)

    def close(self):
        """End the workers that wait for work, and with the others leave the cluster."""
        ending = [place.worker.close.remote() for place in self.places if not place.call]
        if ending:
            self.cluster.ray.wait(ending, num_returns=len(ending), timeout=END_SECONDS)
        self.cluster.close()


def refuse_node(engine, name, expected):
    """Raise UserError where a node can't write what is asked for. expected: the base model's fingerprint."""
    if engine == "vllm":
        need_vllm("--engine=vllm")
    if fingerprint(resolve_base_model(name)) != expected:
        raise UserError(f"base model {name}: is another there than here; give a folder that all nodes share, or copy it anew")


def places_of(resources):
    """(how many workers, what each takes) on nodes with these resources, dicts with "CPU" and, where there are any, "GPU"."""
    gpus = sum(int(there.get("GPU", 0)) for there in resources)
    if gpus:
        return gpus, {"num_gpus": 1}
    processors = [int(there["CPU"]) for there in resources]
    return sum(there // min(processors) for there in processors), {"num_cpus": min(processors)}
