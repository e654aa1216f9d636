"""Train a speculator: python -m scripts.train --config=CONFIG.yaml --out_dir=runs/mine [--resume] [key.path=value ...]

On several GPUs or nodes: torchrun --nproc_per_node=8 -m scripts.train ...
"""

import os
from pathlib import Path

from fms_spec.errors import UserError
from pipelines.cli import arguments, main
from pipelines.config import load_config
from pipelines.parallel.processes import joined
from pipelines.plan.devices import find_device
from pipelines.plan.feasible import check_sizes
from pipelines.plan.plan import Plan, Ranks, Sizes, verdict
from pipelines.show.console import print_plan
from pipelines.train.run import check_processes, read_data, sizes_of, train


@arguments
class Arguments:
    """Train attached speculator heads on a frozen base model, in two phases.

    Trailing key.path=value words override the config, e.g. schedule.steps=700.

    Args:
        config: YAML file; pipelines/configs holds examples with a reason for each value.
        out_dir: where checkpoints, metrics and continuations go; one run each.
        resume: go on with the run in out_dir from its newest checkpoint.
        profile: FIRST:END, write a trace of these steps, counted from 0 and without END, to out_dir/profile.
        plan: only say what memory, work and time the run would need and whether it fits, from the base model's config.json; writes nothing.
        processes: plan for so many; those of torchrun, or one, by default.
        processes_per_node: plan for so many on each machine; up to 8 by default.
        device: plan for h100, h200, b200, a100-80, a100-40, l40s or rtx4090; this machine, measured, by default.
    """

    config: str
    out_dir: str
    resume: bool = False
    profile: str | None = None
    plan: bool = False
    processes: int | None = None
    processes_per_node: int | None = None
    device: str | None = None


def run(parsed, overrides):
    if parsed.plan:
        return plan(load_config(parsed.config, overrides), parsed)
    for flag in ("processes", "processes_per_node", "device"):
        if getattr(parsed, flag) is not None:
            raise UserError(f"--{flag} is for --plan only; add --plan, or leave it out")
    with joined() as processes:
        train(load_config(parsed.config, overrides), Path(parsed.out_dir), parsed.resume, processes, parsed.profile)


def plan(config, parsed):
    """Print the plan of a run.

    Raises:
        UserError: a device that isn't known, numbers of processes that can't be, or a config that fits no base model.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1)) if parsed.processes is None else parsed.processes
    per_node = min(8, processes) if parsed.processes_per_node is None else parsed.processes_per_node
    if not 1 <= per_node <= processes:
        raise UserError(
            f"--processes={processes} --processes_per_node={per_node}: both must be at least 1, and no more on a node than in all"
        )
    check_processes(config, Ranks(processes, per_node))
    sizes, note = (
        Sizes(rows=config.data.rows, prompts=config.data.prompts),
        "no prepared data yet: rows of 4,096 and prompts of 64 tokens assumed",
    )
    if Path(config.data.dir).is_dir():
        sizes, note = sizes_of(*read_data(config)), f"rows and prompts as in {config.data.dir}"
        check_sizes(config, sizes, processes, memory=float("inf"))
    device = find_device(parsed.device or "here", config.base_model.dtype)
    found = Plan(config, sizes, Ranks(processes, per_node), device)
    print_plan(found, note, verdict(found))


if __name__ == "__main__":
    main(Arguments, run, overrides=True)
