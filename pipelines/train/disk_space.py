"""Room on the disk for what a run will write, asked for before it starts."""

import shutil
from pathlib import Path

from fms_spec.errors import UserError

MASTER_BYTES = 12  # of a trained weight in a checkpoint: fp32, and the optimiser's two moments


def check_space(out_dir, speculator, keep, hidden_states, continuations):
    """Refuse a run that has no room.

    Args:
        keep: checkpoints that are kept; one more is there while the oldest is not yet removed. hidden_states, continuations: bytes at most.

    Raises:
        UserError: says how much the run needs for what, and how much is free.
    """
    checkpoints = (keep + 1) * MASTER_BYTES * sum(weight.numel() for weight in speculator.parameters())
    needed = checkpoints + hidden_states + continuations - taken(out_dir)
    free = shutil.disk_usage(next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())).free
    if needed > free:
        parts = {f"{keep + 1} checkpoints": checkpoints, "hidden states": hidden_states, "continuations": continuations}
        told = ", ".join(f"{size / 1e9:.3g} GB of {name}" for name, size in parts.items() if size)
        raise UserError(
            f"{out_dir}: {needed / 1e9:.3g} GB more are needed ({told}) and {free / 1e9:.3g} GB are free; make room, give another out_dir, "
            "or turn hidden_state_cache off and lower checkpoint.keep"
        )


def taken(out_dir):
    """Bytes on the disk of what is in a folder already; files with holes count for what they hold."""
    return sum(path.stat().st_blocks * 512 for path in Path(out_dir).rglob("*") if path.is_file())
