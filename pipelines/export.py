"""From a training checkpoint to a directory that can be served."""

import json

from fms_spec.errors import UserError
from fms_spec.speculators import from_config, save_speculator
from pipelines.checkpoint import load_weights, whole_checkpoints


def export(checkpoint, out_dir):
    """Write the speculator of a checkpoint, or of a run's newest one, in the base model's dtype; returns `out_dir`.

    Raises:
        UserError: no checkpoint there, one cut short, or an out_dir that exists.
    """
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already; give a new out_dir")
    if (checkpoint / "checkpoints").is_dir():
        found = whole_checkpoints(checkpoint / "checkpoints")
        if not found:
            raise UserError(f"{checkpoint} has no whole checkpoint yet; let the run reach its first one")
        checkpoint = found[-1]
    try:
        config = json.loads((checkpoint / "speculator.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is no checkpoint of a run; give RUN/checkpoints/step-N or RUN") from error
    speculator = from_config(config)
    load_weights(checkpoint, speculator)
    partial = out_dir.with_name(out_dir.name + ".partial")
    save_speculator(partial, speculator, config)
    partial.rename(out_dir)
    return out_dir
