"""Checkpoints that hold everything needed to go on: weights, optimiser, data positions, counters.

Tensors go through torch.distributed.checkpoint into safetensors files, each process writing its part, and are read back in any other
parts; the rest is JSON, so that reading one never runs code. A checkpoint is written beside its final name and renamed, and believed only
where every file has the size and the sha256 that checksums.json says.
"""

import re
import shutil
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fms_spec.errors import UserError
from fms_spec.files import read_json, sha256_of, sync, write_json
from pipelines.parallel.processes import Processes

NAME = re.compile(r"step-(\d{8,})")
CHECKSUMS, HEADS = "checksums.json", "speculator.json"
FILE_BYTES = 2**26  # of tensors in a file: torch keeps a whole file's bytes in memory while it writes it
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(directory, step, speculator, optimizer, description, progress, keep, processes):
    """Write `directory/step-N` and remove all but the newest `keep`; returns its path. Called by all `Processes` of the run.

    Args:
        description: the speculator's config.json, for export. progress: JSON-able state of everything that is no tensor.

    Raises:
        UserError: it can't be written, e.g. on a full disk.
    """
    final = checkpoint_path(directory, step)
    partial = final.with_suffix(".partial")
    try:
        if processes.main:
            sweep(directory)
            partial.mkdir(parents=True)
        processes.wait_for_all()
        write_tensors(partial, tensors_of(speculator, optimizer)[0], processes.count == 1)
        own = {path.name: entry_of(path) for path in partial.glob(f"shard-{processes.rank + 1:05d}-*")}
        entries = {name: entry for share in processes.gather(own) for name, entry in share.items()}
        if processes.main:
            for name, value in ((HEADS, description), ("progress.json", progress)):
                write_json(partial / name, value)
                entries[name] = entry_of(partial / name)
            write_json(partial / CHECKSUMS, entries)
            put_in_place(partial, final, keep)
    except (CheckpointException, OSError, SafetensorError, UserError) as error:
        cause = disk_error(error)
        if cause is None:  # e.g. a lost connection to another process
            raise RuntimeError(str(error)) from error  # torch's own is no Exception
        shutil.rmtree(partial, ignore_errors=True)  # room is what is needed
        raise UserError(f"checkpoint {final}: can't be written ({cause}); make room or mend the folder, then resume the run") from error
    processes.wait_for_all()
    return final


def sweep(directory):
    """Remove what a killed run left of a checkpoint that it was writing or removing."""
    for stale in Path(directory).glob("step-*.partial"):
        shutil.rmtree(stale, ignore_errors=True)


def tensors_of(speculator, optimizer):
    """({name: tensor} of all that a checkpoint holds in tensors, the optimiser's flat state); both share the tensors with the two."""
    weights, moments = get_state_dict(speculator, optimizer, options=FLAT)
    tensors = {f"speculator.{name}": value for name, value in weights.items()}
    # What else is in it, param_groups, comes from the config at every step.
    return tensors | {f"optimizer.{name}": value for name, value in moments.items() if name.startswith("state.")}, moments


def write_tensors(directory, tensors, alone):
    """Write this process's part of {name: tensor}, in files of about FILE_BYTES; alone: there is no other process."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.itemsize
    with warnings.catch_warnings():  # torch warns that a single process is a single process
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory), files, save_distributed=True), no_dist=alone)


def entry_of(path):
    """What checksums.json says of a file; it is on the disk when this returns."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def put_in_place(partial, final, keep):
    """Rename a checkpoint that is whole, and remove all but the newest `keep`; damaged ones are never removed."""
    if final.exists():  # a damaged one, which the run stepped over
        aside = final.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    sync(partial)
    partial.rename(final)
    sync(final.parent)
    whole = whole_checkpoints(final.parent)
    for old in whole[: whole.index(final) + 1][:-keep]:  # a newer one is damaged in a way that its sizes don't tell: it counts for nothing
        discard(old)


def discard(old):
    """Remove a checkpoint; where that fails, say so: the run can do without."""
    try:
        if old.is_symlink():
            old.unlink()
        else:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))  # half removed it would pass for a damaged one, and stay
    except OSError as error:
        print(f"warning: {old}: an old checkpoint can't be removed ({error.strerror or error})", file=sys.stderr)


def checkpoint_path(directory, step):
    """Where the checkpoint of a step is, or would be."""
    return Path(directory) / f"step-{step:08d}"


def checkpoints(directory):
    """A run's checkpoints, whole or damaged, oldest first."""
    paths = [path for path in Path(directory).glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def whole_checkpoints(directory):
    """Those of `checkpoints` whose files are there in their sizes; `damage` reads them too."""
    return [path for path in checkpoints(directory) if problem_of(path) is None]


def problem_of(path, names=()):
    """What is damaged in a checkpoint, in a few words, or None. names: also read these of its files, and compare their sha256."""
    try:
        entries = read_json(path / CHECKSUMS, "")
        for name, entry in sorted(entries.items()):
            if Path(name).name != name or not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {entry['bytes']}"
            if name in names and sha256_of(path / name) != entry["sha256"]:
                return f"{name} was altered: its sha256 is another one"
        stray = sorted({file.name for file in path.glob("*.safetensors")} - entries.keys())  # torch's reader would take them too
        if stray:
            return f"{stray[0]} is not of it"
    except UserError:
        return f"{CHECKSUMS} is missing or can't be read"
    except (OSError, AttributeError, KeyError, TypeError) as error:
        return f"{getattr(error, 'filename', None) or CHECKSUMS} can't be read"
    missing = sorted({"progress.json", HEADS} - entries.keys())
    return f"{CHECKSUMS} lacks {missing[0]}" if missing else None


def damage(path, processes=Processes()):
    """As `problem_of`, having read every file: each of the processes, all of which call this, reads its share."""
    files = sorted(file.name for file in Path(path).iterdir())
    problems = processes.gather(problem_of(Path(path), {"progress.json", *files[processes.rank :: processes.count]}))
    return next((problem for problem in problems if problem), None)


def newest_checkpoint(directory, processes=Processes()):
    """The newest whole checkpoint of a run, None where there is none; damaged ones are named on stderr, and stepped over.

    Raises:
        UserError: there are some, and all are damaged.
    """
    # One process looks: on a network disk each may see another moment.
    names = processes.gather([path.name for path in checkpoints(directory)] if processes.main else None)[0]
    for name in reversed(names):
        path = Path(directory) / name
        problem = damage(path, processes)
        if problem is None:
            return path
        if processes.main:
            print(f"warning: checkpoint {path} is damaged ({problem}); it is kept, and the one before is taken", file=sys.stderr)
    if names:
        raise UserError(f"{directory}: every checkpoint is damaged; mend one, or move the folder away to begin again")
    return None


def load_checkpoint(path, speculator, optimizer):
    """Restore weights and optimiser in place from a whole checkpoint; returns what was saved as progress.

    Raises:
        UserError: it doesn't fit.
    """
    tensors, moments = tensors_of(speculator, optimizer)
    read_tensors(path, tensors)
    weights = {name.removeprefix("speculator."): value for name, value in tensors.items() if name.startswith("speculator.")}
    moments |= {name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")}
    set_state_dict(speculator, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)
    return read_progress(path)


def read_progress(path):
    """What was saved as progress.

    Raises:
        UserError: it can't be read, or is of another step than the folder's name says.
    """
    progress = read_json(Path(path) / "progress.json", "take another checkpoint")
    step = int(NAME.fullmatch(Path(path).name)[1])
    if progress["step"] != step:
        raise UserError(f"checkpoint {path}: it is of step {progress['step']}; give it its name back")
    return progress


def load_weights(path, speculator):
    """Restore only the speculator's weights, in place."""
    weights = speculator.state_dict()
    read_tensors(path, {f"speculator.{name}": value for name, value in weights.items()})
    speculator.load_state_dict(weights)


def read_tensors(path, tensors):
    """Fill {name: tensor} from a checkpoint directory; raises UserError where that fails."""
    try:
        with warnings.catch_warnings():  # torch warns that a single process is a single process
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise UserError(f"checkpoint {path}: can't be read ({reason.strip()[:160]}); take the one before") from error


def disk_error(error):
    """What went wrong with a file, in a few words, where an error of a save is about one; None where it is not."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if isinstance(cause, (SafetensorError, UserError)) or (isinstance(cause, OSError) and not isinstance(cause, ConnectionError)):
            return getattr(cause, "strerror", None) or str(cause)
    return None
