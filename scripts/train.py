"""Train a speculator: python -m scripts.train --config=CONFIG.yaml --out_dir=runs/mine [--resume] [key.path=value ...]

On several GPUs or nodes: torchrun --nproc_per_node=8 -m scripts.train ...
"""

from pathlib import Path

from fms_spec.errors import UserError
from pipelines.cli import arguments, main
from pipelines.config import load_config
from pipelines.parallel.processes import joined
from pipelines.plan.plan import verdict
from pipelines.show.console import print_plan
from pipelines.train.checkpoint import checkpoints
from pipelines.train.planned import plan_of
from pipelines.train.run import train


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
        fresh = not checkpoints(Path(parsed.out_dir) / "checkpoints")
        plan, note = plan_of(load_config(parsed.config, overrides), parsed.processes, parsed.processes_per_node, parsed.device, fresh)
        return print_plan(plan, note, verdict(plan))
    for flag in ("processes", "processes_per_node", "device"):
        if getattr(parsed, flag) is not None:
            raise UserError(f"--{flag} is for --plan only; add --plan, or leave it out")
    with joined() as processes:
        train(load_config(parsed.config, overrides), Path(parsed.out_dir), parsed.resume, processes, parsed.profile)


if __name__ == "__main__":
    main(Arguments, run, overrides=True)
