"""Parallelism, applied to built models: which processes share a copy of the base model and of the speculator.

A mesh of processes has two dimensions: "replicate", over which copies are kept alike, and "shard", over which one copy is split. To
replicate is a shard dimension of one, so there is one path for all settings.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.model_config import attention_heads, read_config, resolve_base_model
from fms_spec.proof import settle_backend
from pipelines.parallel.distributed_base_model import ShardedBaseModel, TensorParallelBaseModel
from pipelines.parallel.processes import PATIENCE


def group_size(kind, settings, processes):
    """Processes that share one copy under `kind` (a value of `ParallelSection`); a single process shares with none.

    processes: `Processes`, or `plan.Ranks`.

    Raises:
        UserError: groups that don't divide the processes.
    """
    if kind == "replicate" or processes.count == 1:
        return 1
    if kind == "shard":
        return processes.count
    size = settings.group_size or processes.local_count
    if processes.count % size:
        raise UserError(f"parallel.group_size {size} does not divide the {processes.count} processes of this run; give one that does")
    return size


def check_shared(name, backend, config, kind, size):
    """Refuse a base model, run by `backend`, whose copies `size` processes can't share as `kind` says; config: its own."""
    if size > 1 and backend != "fms":
        raise UserError(f"base model {name}: only what ibm-fms runs can be shared; set parallel.base_model=replicate")
    heads, groups = attention_heads(config)
    if kind == "tensor" and (heads % size or (groups % size and size % groups)):
        raise UserError(
            f"base model {name}: {heads} heads in {groups} groups can't be split over {size} processes; "
            "give a parallel.group_size that divides them"
        )


def mesh_of(size, processes):
    """A ("replicate", "shard") mesh whose copies are split over `size` neighbouring processes.

    Its groups are made here: those that torch makes for a mesh give up after its own ten or thirty minutes.
    """
    processes.wait_for_all()  # who waits for others while a group is made isn't heard meanwhile, which 60 s later looks like its end
    ranks = torch.arange(processes.count).view(-1, size)
    group_of = lambda line: dist.group.WORLD if len(line) == processes.count else dist.new_group(line, timeout=PATIENCE)  # noqa: E731
    groups = []
    for lines in (ranks.T.tolist(), ranks.tolist()):
        made = [group_of(line) for line in lines]  # every process has to make all of them
        groups += [group for group, line in zip(made, lines) if processes.rank in line]
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def load_base_model(config, processes):
    """The `BaseModel` of a `RunConfig`, this process's part of it where it is shared.

    Raises:
        UserError: as `BaseModel`; a model that the setting can't split.
    """
    section, kind = config.base_model, config.parallel.base_model
    path, backend, size = resolve_base_model(section.name), None, group_size(kind, config.parallel, processes)
    if processes.main:  # its proof is that of all
        backend = settle_backend(section.name, path, read_config(path), section.backend, BaseModel)
    backend = processes.gather(backend)[0]
    check_shared(section.name, backend, read_config(path), kind, size)
    settings = {"dtype": section.dtype, "backend": backend, "device": processes.device, "proved": True}
    if size == 1:
        return BaseModel(section.name, **settings)
    shared = TensorParallelBaseModel if kind == "tensor" else ShardedBaseModel
    return shared(section.name, mesh_of(size, processes), **settings)


def distribute_speculator(speculator, config, processes):
    """Have FSDP2 keep the fp32 masters, and with them the optimiser's moments, in the parts that `parallel.speculator` says.

    Weights are gathered in fp32 and cast by autocast, so that the arithmetic is that of one process; gradients are added up in fp32. They
    are added, not averaged: the losses are already divided by the positions of all processes.
    """
    if processes.count == 1:
        return
    mesh = mesh_of(group_size(config.parallel.speculator, config.parallel, processes), processes)
    # One group: all heads read the same weights, which are gathered once a forward and kept until the gradients are there.
    fully_shard(speculator, mesh=mesh, reshard_after_forward=False)
    speculator.set_gradient_divide_factor(1.0)
    speculator.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    register_fsdp_forward_method(speculator, "losses")


@contextmanager
def gathered(speculator):
    """Whole weights of a shared speculator on every process while the block runs, which trains nothing. All processes come here."""
    if not isinstance(speculator, FSDPModule):
        yield
        return
    speculator.unshard()
    yield
    speculator.reshard()


def own_prompts(prompts, base_model, processes):
    """This process's share of prompts, a list, each of which is to be continued once."""
    if isinstance(base_model, TensorParallelBaseModel):  # a group decodes as one; that all its processes count it changes no mean
        return prompts[base_model.copy :: base_model.copies]
    return prompts[processes.rank :: processes.count]
