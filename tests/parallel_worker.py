"""What each process of tests/test_parallel.py runs: python -m torch.distributed.run ... parallel_worker.py JOBS.json

Several runs one after the other in one start, which takes longer than they do. JOBS.json: list of {config, out_dir, overrides, resume,
fails: how the last process ends in its third step, or "never"; each process then says its id beside out_dir. late: the last process is
so many seconds late when groups for the speculator are made, twice as many as any may be silent}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

import pipelines.parallel.processes
import pipelines.train.build
from fms_spec.errors import UserError
from pipelines.cli import fail
from pipelines.config import load_config
from pipelines.generate.producers import Producers
from pipelines.parallel.processes import joined
from pipelines.train.loop import Trainer
from pipelines.train.run import train


def bytes_held(module):
    """Bytes of a module's parameters on this process, fp32 master and frozen ones alike."""
    return sum(getattr(parameter, "_local_tensor", parameter).nbytes for parameter in module.parameters())


def fail_in_the_third_step(how):
    """Have this process fail as a user's mistake, a bug or a killed process would have it."""
    step = Trainer.train_step

    def failing(self, *job):
        if self.step == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("a shard is damaged") if how == "mistake" else ValueError("a bug")
        return step(self, *job)

    Trainer.train_step = failing


def be_late(seconds, last):
    """Have the last process take so many seconds longer to load its base model."""
    distribute = pipelines.train.build.distribute_speculator
    pipelines.parallel.processes.SILENCE_SECONDS = seconds / 2

    def distribute_late(*parts):
        time.sleep(seconds * last)
        distribute(*parts)

    pipelines.train.build.distribute_speculator = distribute_late


def found_around(folder):
    """What a producer of this process sees in its environment, and how long each of its groups waits for the others, in seconds."""
    producers = Producers([sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"], [{}], folder)
    producers.start()
    producers.processes[0].wait()
    waits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in distributed_c10d._world.pg_map]
    return {"environment": json.loads((folder / "producer-0.log").read_text().splitlines()[-1]), "waits": waits}


def main(jobs):
    with joined() as processes:
        for job in jobs:
            if "fails" in job:
                Path(job["out_dir"]).with_suffix(f".{processes.rank}").write_text(str(os.getpid()))
            if job.get("fails", "never") != "never" and processes.rank == processes.count - 1:
                fail_in_the_third_step(job["fails"])
            if "late" in job:
                be_late(job["late"], processes.rank == processes.count - 1)
            config = load_config(job["config"], job["overrides"])
            trainer = train(config, Path(job["out_dir"]), job.get("resume", False), processes)
            held = {"base_model": bytes_held(trainer.base_model.model), "speculator": bytes_held(trainer.speculator)}
            held["moments"] = sum(
                getattr(value, "_local_tensor", value).nbytes
                for state in trainer.optimizer.state.values()
                for value in state.values()
                if value.dim()
            )
            (Path(job["out_dir"]) / f"held-{processes.rank}.json").write_text(json.dumps(held))
        if processes.main:
            folder = Path(jobs[-1]["out_dir"]).with_suffix(".around")
            found = found_around(folder)
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text()))
    except UserError as error:
        fail(str(error))
