"""A Ray cluster that is there already: others' processors do the work, and this process alone reads the sources and writes the files.

Each node needs what this project depends on; its code goes there with the work. Tasks and not Ray Data: its blocks are Arrow tables, which
don't hold every conversation that JSON does, and in order they would be read far beyond what --max_tokens takes.
"""

import logging
import os
import signal
import socket
from collections import deque
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from data.manifest import reason
from fms_spec.errors import UserError

ROOT = Path(__file__).parents[1]
CODE = ("fms_spec", "data", "pipelines")  # packages of this project that go to the nodes
DECIDING = ("tokenizers", "transformers")  # packages whose other versions may give other tokens
AHEAD = 2  # batches given out for each processor: one to work at and one to go on with
TRIES = 4  # of a batch, where the process that was at it died
CONNECTING = 5  # seconds to reach the head


class Cluster:
    """A connection to a Ray cluster, to be closed; a process has one at most.

    Args:
        address: HOST:PORT of its head, or "auto" for the one that this machine belongs to; as typed by the user.

    Raises:
        UserError: Ray is not installed, there is no such cluster, it has no processors, or one of its nodes can't do this project's work.
    """

    def __init__(self, address):
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` it would copy this folder with its environment
        try:
            import ray
        except ImportError:
            raise UserError(f"--ray={address}: Ray is not installed; pip install 'fms-spec[ray]', or leave it out") from None
        self.ray, self.flag = ray, f"--ray={address}"
        try:
            self.connect(address)
            self.nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
            self.ask(refuse_others, {name: version(name) for name in DECIDING})
        except BaseException:
            ray.shutdown()
            raise

    def connect(self, address):
        """Join the cluster. SIGTERM stays this process's own: Ray would print stacks, and end with another code."""
        code = [str(ROOT / name) for name in CODE]
        # A task has one processor, so its tokenizer has one thread.
        environment = {"py_modules": code, "excludes": ["__pycache__"], "env_vars": {"RAYON_NUM_THREADS": "1"}}
        ending = signal.getsignal(signal.SIGTERM)
        try:
            refuse_silence(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            self.ray.init(address, runtime_env=environment, logging_level=logging.ERROR)
        except SystemExit:  # what Ray has made of a SIGTERM meanwhile
            signal.alarm(0)  # it may have set one, to abort in 3 seconds
            signal.signal(signal.SIGTERM, ending)
            signal.raise_signal(signal.SIGTERM)
            raise
        except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and kinds of its own
            mend = "start one with `ray start`, here and on the others, or leave it out"
            raise UserError(f"{self.flag}: no cluster to be reached ({reason(error)}); {mend}") from None
        finally:
            with suppress(ValueError):  # not the first thread, whose alone signals are
                signal.signal(signal.SIGTERM, ending)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Leave the cluster, which ends what still runs there for this process."""
        self.ray.shutdown()

    def ask(self, function, *arguments):
        """Call a function on every node, before any work goes there; one that has died meanwhile is left out.

        Raises:
            UserError: it raised one, or can't be imported there, and names the node; or no node is left.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        errors = self.ray.exceptions
        task, calls = self.ray.remote(num_cpus=0, max_retries=0)(function), []
        for node in self.nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls.append((node, task.options(scheduling_strategy=there).remote(*arguments)))
        self.nodes = []
        for node, call in calls:
            try:
                self.ray.get(call)
                self.nodes.append(node)
            except (errors.TaskUnschedulableError, errors.NodeDiedError):
                continue
            except errors.RayError as error:
                raise UserError(f"{self.flag}: node {node['NodeManagerAddress']}: {said(error)}") from None
        if not self.nodes:
            raise UserError(f"{self.flag}: none of its nodes has a processor to give; start one with `ray start --address=…`")

    def each(self, function, items):
        """Yield (item, function(item)) in the order of the items, each in a task of its own.

        A task is done again where it was at work in a process, or on a node, that died. An item that can't be had is so only once all
        before it have been yielded: they are taken ahead of what may never be asked for.

        Raises:
            UserError: a task's process died TRIES times.
        """
        task, function = self.ray.remote(num_cpus=1, max_retries=TRIES - 1)(called), self.ray.put(function)
        given = ((item, task.remote([function], item)) for item in items)
        for item, call in ahead(given, AHEAD * int(self.ray.cluster_resources()["CPU"])):
            try:
                result = self.ray.get(call)
            except self.ray.exceptions.RayTaskError:
                raise  # what the function raised
            except self.ray.exceptions.RayError as error:
                raise UserError(f"{self.flag}: given up after {TRIES} tries ({reason(error)}); see Ray's logs") from None
            yield item, result


def refuse_silence(address):
    """Raise OSError where nobody listens at HOST:PORT: Ray would end the process, and that after a minute."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECTING).close()


def refuse_others(versions):
    """Raise UserError where a node lacks what work needs, or has other `versions`, {package: version}, of what decides its outcome."""
    try:
        import_module("data.prepare.encoding")
    except ImportError as error:
        raise UserError(f"{reason(error)}; install what pyproject.toml names, as here") from None
    for name, here in versions.items():
        if version(name) != here:
            raise UserError(f"has {name} {version(name)}, and here is {here}; install the same")


def said(error):
    """What a RayError comes to, in a line: the `UserError` in it, or the end of its long story."""
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, UserError) else reason(str(error).strip().splitlines()[-1])


def called(held, item):
    """In a task: `item` given to the function whose reference is `held`, in a list, which Ray doesn't look into."""
    return fetched(held[0])(item)


@lru_cache(maxsize=1)  # with it goes a tokenizer, which takes as long to be read as a batch does
def fetched(reference):
    import ray

    return ray.get(reference)


def ahead(items, count):
    """Yield items, of which up to `count` are taken beforehand; what goes wrong on the way to one is raised in its turn."""
    items, held, end = iter(items), deque(), None
    while True:
        while end is None and len(held) < count:
            try:
                held.append(next(items))
            except Exception as error:  # StopIteration among them
                end = error
        if held:
            yield held.popleft()
        elif isinstance(end, StopIteration):
            return
        else:
            raise end
