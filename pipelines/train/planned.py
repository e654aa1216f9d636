"""What a run will need, from its config and the prepared data, if it is there."""

import os
from pathlib import Path

from fms_spec.errors import UserError
from pipelines.plan.devices import find_device
from pipelines.plan.feasible import check_sizes
from pipelines.plan.plan import Plan, Ranks, Sizes
from pipelines.train.build import given_heads
from pipelines.train.run import check_processes, read_data, sizes_of


def plan_of(config, processes=None, per_node=None, device=None, fresh=True):
    """(the `Plan` of a run, a note on what its sizes are those of); nothing is loaded or written.

    Args:
        config: `RunConfig`. processes: how many; those of torchrun, or one, by default. per_node: on each machine, up to 8 by default.
        device: name of one of `devices.DEVICES`; this machine's own, measured, by default.
        fresh: whether the run is yet to begin; one that is resumed reads no `speculator.init_from`.

    Raises:
        UserError: a device that isn't known, numbers of processes that can't be, a config that fits no base model, or as `given_heads`.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1)) if processes is None else processes
    per_node = min(8, processes) if per_node is None else per_node
    if not 1 <= per_node <= processes:
        raise UserError(
            f"--processes={processes} --processes_per_node={per_node}: both must be at least 1, and no more on a node than in all"
        )
    check_processes(config, Ranks(processes, per_node))
    if fresh:
        given_heads(config)
    if Path(config.data.dir).is_dir():
        sizes, note = sizes_of(*read_data(config)), f"rows and prompts as in {config.data.dir}"
        check_sizes(config, sizes, processes, memory=float("inf"))
    else:
        sizes = Sizes(rows=config.data.rows, prompts=config.data.prompts)
        note = "no prepared data yet: rows of 4,096 and prompts of 64 tokens assumed"
    return Plan(config, sizes, Ranks(processes, per_node), find_device(device or "here", config.base_model.dtype)), note
