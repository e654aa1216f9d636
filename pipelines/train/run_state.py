"""What state a run's folder is in: how far it is, what is damaged, and how to go on. Nothing is written."""

import shlex
from pathlib import Path

from data.continuations.shard import read_shard
from data.manifest import check_contents, data_fingerprint, read_manifest
from fms_spec.errors import UserError
from fms_spec.files import owner_of
from fms_spec.model_config import resolve_base_model
from fms_spec.weights import fingerprint
from pipelines.machine.doctor import Finding
from pipelines.train.checkpoint import checkpoints, damage, read_progress
from pipelines.train.metrics import read_lines
from pipelines.train.run_record import RECORD, read_record


def examine_run(out_dir):
    """List of `Finding` about a run's out_dir; every file that a resumed run would believe is read.

    Raises:
        UserError: there is no run.
    """
    owner, paths = owner_of(out_dir), checkpoints(out_dir / "checkpoints")
    try:
        record = read_record(out_dir)
        if record is None and not paths:
            raise UserError(f"{out_dir}: holds no run; give the --out_dir of scripts.train, or its folder run of a quickstart")
    except UserError as error:
        if not paths:
            raise
        record = None
        findings = [Finding(RECORD, "broken", str(error))]
    else:
        findings = [about_record(record, out_dir)]
    states = [about_checkpoint(path) for path in paths]
    whole = [path for path, state in zip(paths, states) if state.state == "works"]
    findings += [*states, about_metrics(out_dir, whole[-1] if whole else None)]
    if record:
        findings += [about_base_model(record), about_data(record)]
        findings.append(about_continuations(Path(record["config"]["data"]["continuations"] or out_dir / "continuations")))
    return [*findings, how_to_go_on(record, whole, paths, owner)]


def about_record(record, out_dir):
    if record is None:
        return Finding(RECORD, "broken", f"{out_dir / RECORD} is missing or empty; a resumed run writes it again")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return Finding(RECORD, "works", f"revision {record['git_revision']}, {record['device']}, {versions}")


def about_checkpoint(path):
    problem = damage(path)
    if problem:
        return Finding(path.name, "broken", f"{problem}; a resumed run steps over it")
    try:
        progress = read_progress(path)
    except UserError as error:
        return Finding(path.name, "broken", str(error))
    hours = sum(progress["seconds"].values()) / 3600
    return Finding(path.name, "works", f"{progress['tokens']:,} positions trained, {hours:.2f} hours")


def about_metrics(out_dir, newest):
    """newest: the whole checkpoint that a resumed run would take, or None."""
    lines = read_lines(out_dir / "metrics.jsonl")
    detail = f"{len(lines)} lines, up to step {max((line['step'] for line in lines), default=0)}"
    if newest:
        progress = read_progress(newest)
        lost = progress["log_lines"] - sum(line["step"] <= progress["step"] for line in lines)
        if lost > 0:
            return Finding("metrics.jsonl", "broken", f"{detail}; {lost} before step {progress['step']} are lost")
    return Finding("metrics.jsonl", "works", detail)


def about_base_model(record):
    name = record["config"]["base_model"]["name"]
    try:
        same = fingerprint(resolve_base_model(name)) == record["inputs"]["base_model_fingerprint"]
    except UserError as error:
        return Finding("base model", "broken", str(error))
    return Finding("base model", "works", name) if same else Finding("base model", "broken", f"{name} is another one than this run's")


def about_data(record):
    folder = record["config"]["data"]["dir"]
    try:
        if data_fingerprint(folder) != record["inputs"]["data_fingerprint"]:
            return Finding("data", "broken", f"{folder} holds other data than this run's")
        tables = read_manifest(folder)["tables"]
        for shard in [shard for table in tables.values() for shard in table["shards"]]:
            check_contents(folder, shard)
    except UserError as error:
        return Finding("data", "broken", str(error))
    return Finding("data", "works", f"{folder}, {tables['rows-train']['rows']:,} rows, {tables['prompts-train']['rows']:,} prompts")


def about_continuations(folder):
    shards, rows = sorted(folder.glob("continuations-*.parquet")), 0
    for path in shards:
        try:
            rows += len(read_shard(path)[0])
        except UserError as error:
            return Finding("continuations", "broken", str(error))
    return Finding("continuations", "works", f"{folder}: {len(shards)} shards, {rows:,} texts")


def how_to_go_on(record, whole, paths, owner):
    """The last line: what a user does next."""
    name = "to go on"
    if owner:
        return Finding(name, "works", f"{owner} is writing there")
    if paths and not whole:
        return Finding(name, "broken", "no checkpoint is whole: mend one, or move the folder checkpoints away to begin again")
    if record is None:
        return Finding(name, "works", "the command that the run was started with, and --resume")
    step, steps = int(whole[-1].name.removeprefix("step-")) if whole else 0, record["config"]["schedule"]["steps"]
    if step == steps:
        return Finding(name, "works", f"finished: {steps} steps; scripts.export writes its speculator")
    script, *words = shlex.split(record["command"])
    words = [word for word in words if word != "--resume"] + ["--resume"] * (script == "train.py")
    again = shlex.join([*launcher_of(record), "-m", f"scripts.{script.removesuffix('.py')}", *words])
    return Finding(name, "works", f"step {step} of {steps} is saved: {again}")


def launcher_of(record):
    """Words that start as many processes as a run had, on each of its nodes."""
    count = record["processes"]
    each = record.get("processes_per_node", count)  # records of before don't say
    if count == 1:
        return ["python"]
    several = [f"--nnodes={count // each}", "--rdzv_backend=c10d", "--rdzv_endpoint=HEAD:29500"] if count > each else ["--standalone"]
    return ["torchrun", *several, f"--nproc_per_node={each}"]
