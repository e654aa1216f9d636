"""run.json: what a run is, written once, and compared before the run is gone on with."""

import sys

from fms_spec.errors import UserError, first_difference
from fms_spec.files import OWNER, read_json, write_json
from fms_spec.speculators.registry import FAMILIES
from pipelines.train.checkpoint import checkpoints

RECORD = "run.json"


def check_out_dir(out_dir, config, resume, processes, inputs):
    """Refuse an out_dir that can't be this run's, before any work.

    processes: how many there are. inputs: what tells the base model's weights and the data from others, {name: text}.

    Raises:
        UserError: it holds another run, a run that wasn't asked to be resumed, or other files.
    """
    record = read_record(out_dir)
    if record is None:
        if out_dir.exists() and not out_dir.is_dir():
            raise UserError(f"{out_dir} is a file; give another out_dir")
        names = {path.name for path in out_dir.iterdir()} - {OWNER, RECORD} if out_dir.exists() else set()
        if names and not (resume and checkpoints(out_dir / "checkpoints")):
            raise UserError(f"{out_dir} holds other files ({min(names)}); give an empty or new out_dir")
        if names:
            print(f"warning: {out_dir / RECORD} is lost; it is taken for a run with this config", file=sys.stderr)
        return
    now = what_decides(config.model_dump(mode="json"), processes) | inputs
    difference = first_difference(what_decides(record["config"], record["processes"]) | record["inputs"], now)
    if difference:
        key, before, now = difference
        raise UserError(
            f"{out_dir} holds a run with another {key} ({before!r}, now {now!r}); give another out_dir, or the same one to resume"
        )
    if not resume:
        raise UserError(f"{out_dir} holds a run already; add --resume to go on with it, or give another out_dir")


def read_record(out_dir):
    """A run's record as a dict; None where there is none, or an empty one.

    Raises:
        UserError: it is damaged.
    """
    record = out_dir / RECORD
    if not record.is_file() or not record.stat().st_size:
        return None
    mend = "copy it back, or remove it and resume with the config that the run was started with"
    values = read_json(record, mend)
    try:
        what_decides(values["config"], values["processes"]) | values["inputs"] | values["versions"]
        values["command"], values["git_revision"], values["device"]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{record}: no record of a run; {mend}") from None
    return values


def what_decides(config, processes):
    """A run's config as a dict, without what changes only how its steps are computed, so that a run may be resumed in another way.

    Continuations are the same ones however they come, and a step is the same one over any number of processes if its micro-batches are.
    """
    left_out = ("mode", "shards_ahead", "producer_devices", "memory_share")
    phases = {}
    for name in ("phase1", "phase2"):
        phases[name] = {("accumulate x processes" if key == "accumulate" else key): value for key, value in config[name].items()}
        phases[name]["accumulate x processes"] *= processes
    generation = {key: value for key, value in config["generation"].items() if key not in left_out}
    family = FAMILIES[
        config["speculator"]["family"]
    ].settings.model_fields  # records of earlier revisions hold the settings of all families
    speculator = {key: value for key, value in config["speculator"].items() if key in family}
    rest = {key: value for key, value in config.items() if key != "parallel"}
    return rest | phases | {"generation": generation, "speculator": speculator}


def claim_out_dir(out_dir, config, processes, inputs, environment):
    """Write run.json (resolved config, processes, inputs, versions, git revision, command), unless the run has one from its first start."""
    if read_record(out_dir) is None:
        counts = {"processes": processes.count, "processes_per_node": processes.local_count}
        made_by = {"config": config.model_dump(mode="json"), **counts, "inputs": inputs} | environment
        write_json(out_dir / RECORD, made_by)
