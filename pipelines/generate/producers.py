"""Processes that write continuations beside the training run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fms_spec.errors import UserError
from pipelines.parallel.processes import LAUNCHER_VARIABLES

DEATHS = 3  # of one producer, without a shard from it in between
GRACE_SECONDS = 10  # from asking a producer to end to killing it


class Producers:
    """One process of `command` for each of `environments`, started again when it dies.

    Each gets --parent and --status behind the command, see scripts.generate_continuations, and is the leader of a process group, so
    that what an engine starts ends with it.

    Args:
        command: list of words. environments: for each process a dict of variables set besides those of this process. log_dir: made by
        `start`; producer-N.log is what N printed, producer-N.json what it says of itself.
    """

    def __init__(self, command, environments, log_dir):
        self.command, self.environments, self.log_dir = command, environments, Path(log_dir)
        self.processes = [None] * len(environments)
        self.deaths = [0] * len(environments)
        self._log_starts = [0] * len(environments)  # bytes in each log when its process was started

    def start(self):
        """Start those that have not been started."""
        for number, process in enumerate(self.processes):
            if process is None:
                self._start(number)

    def check(self):
        """Called while a shard is missing: start those that have ended.

        Raises:
            UserError: one has ended with an error of its own, which another start would meet again, as an engine that can't start; or has
                died DEATHS times without writing a shard. Says why and where its log is.
        """
        for number, process in enumerate(self.processes):
            if process is None or process.poll() is None:
                continue
            wrote = self._status(number).get("shards", 0)
            self.deaths[number] = 1 if wrote else self.deaths[number] + 1
            log = self._file(number, "log")
            error, last = last_words(log.read_bytes()[self._log_starts[number] :] if log.is_file() else b"")
            if process.returncode == 1 and error:
                raise UserError(f"producer {number}: {error}; its log is {log}")
            if self.deaths[number] == DEATHS:
                raise UserError(f"producer {number} ended {DEATHS} times without a shard: {last}; its log is {log}")
            tqdm.write(f"producer {number} ended (code {process.returncode}); starting it again, its log is {log}", file=sys.stderr)
            end_group(process, signal.SIGKILL)
            self.processes[number] = None
        self.start()

    def statuses(self):
        """What each producer says of itself since it was started; one that has said nothing yet is left out."""
        return [status for status in map(self._status, range(len(self.processes))) if status]

    def stop(self):
        """End all, with everything they started."""
        running = [process for process in self.processes if process]
        for process in running:
            end_group(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in running:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            end_group(process, signal.SIGKILL)  # what is left of it, be it only its children
            process.wait()
        self.processes = [None] * len(self.processes)

    def _start(self, number):
        status = self._file(number, "json")
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            status.unlink(missing_ok=True)
            log = open(self._file(number, "log"), "ab")
        except OSError as error:
            raise UserError(f"{self.log_dir}: no log can be written there ({error.strerror}); make room or mend the folder") from None
        # A producer is no process of the training run, whatever that was launched by.
        alone = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        with log:
            self._log_starts[number] = log.tell()
            self.processes[number] = subprocess.Popen(
                [*self.command, f"--parent={os.getpid()}", f"--status={status}"],
                env=alone | self.environments[number], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _file(self, number, kind):
        return self.log_dir / f"producer-{number}.{kind}"

    def _status(self, number):
        """What producer `number` wrote last; {} before, or where that can't be read: it only informs."""
        try:
            return json.loads(self._file(number, "json").read_text())
        except (OSError, ValueError):
            return {}


def own_devices(asked, trainers):
    """CUDA_VISIBLE_DEVICES of each producer: those of `asked`, where "" takes the next GPU that no trainer uses; as asked without a GPU.

    asked: `generation.producer_devices`. trainers: processes on this machine, which use the first GPUs that torch sees, one each.

    Raises:
        UserError: a trainer's GPU is asked for, or none is left.
    """
    if not torch.cuda.is_available():
        return asked
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    seen = [device.strip() for device in seen.split(",")]
    taken, named = seen[:trainers], [device.strip() for devices in asked for device in devices.split(",")]
    shared = sorted(set(taken) & set(named))
    if shared:
        raise UserError(f"generation.producer_devices: GPU {shared[0]} is a trainer's, which use {', '.join(taken)}; give others")
    free = iter([device for device in seen if device not in taken + named])
    assigned = [devices or next(free, None) for devices in asked]
    if None in assigned:
        raise UserError(
            f"generation.mode=alongside: {trainers} trainers and {len(asked)} producers want a GPU each, and there are {len(seen)}; start "
            "fewer, or set generation.mode=inline or ahead"
        )
    return assigned


def end_group(process, sign):
    """Send a signal to a producer and to all it started."""
    try:
        os.killpg(process.pid, sign)
    except ProcessLookupError:
        pass  # none of them is left


def last_words(log):
    """(what a log's bytes say of a user's mistake, or None; their last line)."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [None])[-1], lines[-1]


def end_with_parent(parent):
    """Have this process group end within seconds when `parent` (process id) is no longer the parent, even in the middle of a step."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE_SECONDS / 2)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
