"""The processes of one run: who they are, what they tell one another, and that they end together.

Started by torchrun (or anything that sets the same variables); without one, a run is a single process and nothing here does anything.
"""

import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fms_spec.errors import UserError
from pipelines.parallel.stopping import STOPPED, Stopped

# All that torchrun sets but OMP_NUM_THREADS, which may be the user's own. With some of them left vLLM waits for a launcher for ever.
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCHELASTIC_TIMER_FILE",
    "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip
WATCH_SECONDS = 1  # between looks for an error of another process
SILENCE_SECONDS = 60  # of a process, after which it counts as gone; a collective would wait for it for hours
GO_ON = "what was saved is kept, start the run again with --resume"
PATIENCE = timedelta(hours=2)  # of a collective: one process may be writing continuations while the others wait


class Processes:
    """rank: of this process, from 0. count: of all. local_rank, local_count: the same on its node. main: whether it is the first of all."""

    def __init__(self, store=None):
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if store else (0, 1)
        self.local_rank = int(os.environ["LOCAL_RANK"]) if store else 0
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) if store else 1
        self.main, self._store = self.rank == 0, store
        self._watcher, self._leaving = None, threading.Event()

    @property
    def device(self):
        """The torch device of this process."""
        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

    def add_up(self, tensor):
        """The sum of every process's tensor, in place, on its device; returns it."""
        if self._store:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """List of every process's picklable value."""
        if not self._store:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any(self, flag):
        """Whether `flag` is true in any process; asks over the CPU, and waits for no device."""
        if not self._store:
            return flag
        asked = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def wait_for_all(self):
        """Return when every process is here."""
        if self._store:
            dist.barrier()

    def report(self, message):
        """Tell the others that this process ends with an error; True if none has told of one before."""
        mine = f"{self.rank} {message}"
        return self._store.compare_set("error", "", mine).decode() == mine

    def watch(self):
        """End this process when another one has told of an error, is gone, or has been silent; said once on each node."""
        self._store.set(f"process {self.rank}", f"{os.getpid()} {process_space()}")
        self._watcher = threading.Thread(target=self._look, daemon=True)
        self._watcher.start()

    def _look(self):
        neighbour, heard, since = (self.rank + 1) % self.count, None, time.monotonic()
        try:
            for beat in itertools.count():
                if self._store.check(["error"]):
                    return self._end_with_the_first()
                self._store.set(f"beat {self.rank}", str(beat))
                last = self._store.get(f"beat {neighbour}") if self._store.check([f"beat {neighbour}"]) else None
                if last != heard:
                    heard, since = last, time.monotonic()
                for gone in self._gone():
                    self._end(f"process {gone} is gone without a word: killed, or the machine had no memory left; {GO_ON}")
                if time.monotonic() - since > SILENCE_SECONDS:  # as one that was killed on another node is
                    self._end(f"nothing was heard of process {neighbour} for {SILENCE_SECONDS} s; its node's log may say why; {GO_ON}")
                if self._leaving.wait(WATCH_SECONDS):
                    return
        except (dist.DistError, RuntimeError):
            if not self._leaving.is_set():
                if self.local_rank == 0:
                    print(f"error: process {self.rank}: the launcher of this run is gone; {GO_ON}", file=sys.stderr, flush=True)
                os._exit(1)

    def _gone(self):
        """Ranks of this node's processes that have ended without telling of an error or of their end."""
        first = self.rank - self.local_rank
        for rank in range(first, first + self.local_count):
            if self._store.check([f"process {rank}"]) and not self._store.check([f"left {rank}"]):
                process, space = self._store.get(f"process {rank}").decode().split(" ", 1)
                try:
                    if space == process_space():
                        os.kill(int(process), 0)
                except ProcessLookupError:
                    yield rank

    def _end(self, message):
        """End this process with an error that it found out; only the first to tell of one prints it."""
        if self.report(message):
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(1)

    def _end_with_the_first(self):
        """End this process because one, maybe itself, has told of an error."""
        rank, message = self._store.get("error").decode().split(" ", 1)
        if int(rank) == self.rank:
            return  # it ends by itself
        if self.local_rank == 0 and int(rank) // self.local_count != self.rank // self.local_count:
            print(f"error: process {rank}: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    def leave(self):
        """End the watch: a thread that still speaks to the store when Python ends would abort the process."""
        self._leaving.set()
        self._watcher.join()
        self._store.set(f"left {self.rank}", "")


def process_space():
    """Where this process's id means something: its host, and the namespace of its container, of which each process may have its own."""
    space = "/proc/self/ns/pid"
    return f"{socket.gethostname()} {os.readlink(space) if os.path.lexists(space) else ''}"


def take_gpu(processes):
    """Make this process's GPU the one that torch means by "cuda"; nothing where there is none.

    Raises:
        UserError: more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return
    gpus, count = torch.cuda.device_count(), processes.local_count
    if count > gpus:
        raise UserError(
            f"{count} processes on a machine with {gpus} GPUs: start at most {gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(processes.local_rank)


@contextmanager
def joined():
    """The `Processes` of this run, for as long as it runs; an error of one ends all within seconds, and is told once.

    Raises:
        UserError: that of the process that failed first; SystemExit in the others.
    """
    if "RANK" not in os.environ:
        yield Processes()
        return
    # The launcher's own store outlives any one of the processes, so that the last words of the first are still to be read.
    store, rank, count = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=count, timeout=PATIENCE)
    processes = Processes(dist.PrefixStore("run", store))
    processes.watch()
    # The launcher asks all to end as soon as one is gone: time for the watch to say which. Within the training loop, see stopping.
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(3 * WATCH_SECONDS, os._exit, [STOPPED]).start())
    try:
        take_gpu(processes)
        yield processes
        processes.wait_for_all()
        processes.leave()
    except Stopped:
        processes.wait_for_all()
        processes.leave()
        raise
    except UserError as error:
        first = processes.report(str(error))
        processes.leave()
        if not first:
            sys.exit(1)
        raise UserError(f"process {rank}: {error}" if rank else str(error)) from error
    except Exception as error:
        # A broken connection is only the echo of an error elsewhere, which may not have been told yet, or of a process that is gone.
        time.sleep(3 * WATCH_SECONDS if isinstance(error, RuntimeError) else 0)
        if processes.report(f"{type(error).__name__}: {error}"):
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
