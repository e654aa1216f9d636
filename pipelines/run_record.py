"""run.json: what a run is, written once, and compared before the run is gone on with."""

import json

from fms_spec.errors import UserError, first_difference


def check_out_dir(out_dir, config, resume, processes):
    """Refuse an out_dir that can't be this run's, before any work; processes: how many there are.

    Raises:
        UserError: it holds another run, a run that wasn't asked to be resumed, or other files.
    """
    record = out_dir / "run.json"
    if record.is_file():
        found = json.loads(record.read_text())
        difference = first_difference(
            what_decides(found["config"], found["processes"]), what_decides(config.model_dump(mode="json"), processes)
        )
        if difference:
            key, before, now = difference
            raise UserError(
                f"{out_dir} holds a run with another {key} ({before!r}, now {now!r}); give another out_dir, or the same config to resume"
            )
        if not resume:
            raise UserError(f"{out_dir} holds a run already; add --resume to go on with it, or give another out_dir")
    elif out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} holds other files; give an empty or new out_dir")


def what_decides(config, processes):
    """A run's config as a dict, without what changes only how its steps are computed, so that a run may be resumed in another way.

    Continuations are the same ones however they come, and a step is the same one over any number of processes if its micro-batches are.
    """
    ways = ("mode", "shards_ahead", "producer_devices", "memory_share")
    phases = {}
    for name in ("phase1", "phase2"):
        phases[name] = {("accumulate x processes" if key == "accumulate" else key): value for key, value in config[name].items()}
        phases[name]["accumulate x processes"] *= processes
    generation = {key: value for key, value in config["generation"].items() if key not in ways}
    return {key: value for key, value in config.items() if key != "parallel"} | phases | {"generation": generation}


def claim_out_dir(out_dir, config, processes, environment):
    """Write run.json (resolved config, processes, versions, git revision, command), unless the run has one from its first start."""
    out_dir.mkdir(parents=True, exist_ok=True)
    record = out_dir / "run.json"
    if not record.is_file():
        made_by = {"config": config.model_dump(mode="json"), "processes": processes} | environment
        record.write_text(json.dumps(made_by, indent=2) + "\n")
