"""Checkpoints that hold everything needed to go on: weights, optimiser, data positions, counters, RNG.

Tensors go through torch.distributed.checkpoint, each process writing its part, and are read back in any other parts; the rest is JSON. A
checkpoint is written beside its final name and renamed, so that a directory called step-N is always whole.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fms_spec.errors import UserError


def save_checkpoint(directory, step, speculator, optimizer, description, progress, keep, processes):
    """Write `directory/step-N` and remove all but the newest `keep`; returns its path. Called by all `Processes` of the run.

    Args:
        description: the speculator's config.json, for export. progress: JSON-able state of everything that is no tensor.

    Raises:
        UserError: it can't be written, e.g. on a full disk.
    """
    final = checkpoint_path(directory, step)
    partial = final.with_suffix(".partial")
    weights, moments = get_state_dict(speculator, optimizer)
    try:
        if processes.main:
            for stale in Path(directory).glob("*.partial"):
                shutil.rmtree(stale)
            partial.mkdir(parents=True)
        processes.wait_for_all()
        tensors = {"speculator": weights, "optimizer": moments, "rng": torch.get_rng_state()}
        with warnings.catch_warnings():  # torch warns that a single process is a single process
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(tensors, checkpoint_id=partial, no_dist=processes.count == 1)
        if processes.main:
            (partial / "speculator.json").write_text(json.dumps(description, indent=2))
            (partial / "progress.json").write_text(json.dumps(progress, indent=2))
            put_in_place(partial, final, keep)
    except (CheckpointException, OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # room is what is needed
        raise UserError(f"checkpoint {final}: can't be written ({reason_of(error)}); make room, then resume the run") from error
    processes.wait_for_all()
    return final


def put_in_place(partial, final, keep):
    """Rename a checkpoint that is whole, and remove all but the newest `keep`."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in whole_checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old)


def checkpoint_path(directory, step):
    """Where the checkpoint of a step is, or would be."""
    return Path(directory) / f"step-{step:08d}"


def whole_checkpoints(directory):
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in Path(directory).glob("step-*") if path.suffix != ".partial")


def load_checkpoint(path, speculator, optimizer):
    """Restore weights, optimiser and RNG in place; returns what was saved as progress.

    Raises:
        UserError: files that are missing or cut short.
    """
    weights, moments = get_state_dict(speculator, optimizer)
    state = {"speculator": weights, "optimizer": moments, "rng": torch.get_rng_state()}
    read_tensors(path, state)
    set_state_dict(speculator, optimizer, model_state_dict=state["speculator"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["rng"])
    return json.loads((Path(path) / "progress.json").read_text())


def load_weights(path, speculator):
    """Restore only the speculator's weights, in place."""
    weights = speculator.state_dict()
    read_tensors(path, {"speculator": weights})
    speculator.load_state_dict(weights)


def read_tensors(path, state):
    """Fill `state` from a checkpoint directory; raises UserError where that fails."""
    try:
        with warnings.catch_warnings():  # torch warns that a single process is a single process
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path}: can't be read, it may be cut short ({reason_of(error)}); remove it to use the one before"
        ) from error


def reason_of(error):
    """The last line of what an error of torch says, which is the cause."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__).strip()[:160]
