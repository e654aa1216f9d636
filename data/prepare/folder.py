"""The output folder: what may be written where. Nothing of a user's is ever overwritten."""

import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from data.manifest import MANIFEST, check_sizes, read_manifest, shown
from data.prepare.rows import LONE_SURROGATE
from fms_spec.errors import UserError, first_difference
from fms_spec.files import OWNER, PARTIAL, cannot_write, owned, write_json

# Written first, with the inputs, and removed last: a folder with this file and without a manifest is half-written, and ours.
MARKER = "incomplete.json"
OURS = re.compile(rf"(rows|prompts)-\w+-\d+\.parquet|token_counts\.parquet|\.?{re.escape(MANIFEST)}(\.\d+)?\.partial|{re.escape(MARKER)}")


def finished_set(out_dir, inputs):
    """The manifest of a whole set that was prepared from the same `inputs`; None if `out_dir` is free to be written.

    Raises:
        UserError: `out_dir` holds a set of other inputs, or anything that is not ours, or Parquet files can't be written there.
    """
    folder = Path(out_dir)
    if LONE_SURROGATE.search(str(folder)):
        raise UserError(f"out_dir {out_dir}: is not UTF-8, as the path of a Parquet file must be; give another --out_dir")
    try:
        if not os.path.lexists(folder):
            return None
        if not folder.is_dir():
            raise UserError(f"out_dir {out_dir}: is a file, or a link to none; give another --out_dir")
        names = sorted(entry.name for entry in folder.iterdir() if entry.name != OWNER and not PARTIAL.fullmatch(entry.name))
    except OSError as error:
        raise cannot_write(out_dir, error) from None
    if MANIFEST in names:
        manifest = read_manifest(out_dir)
        refuse_other_inputs(out_dir, manifest["inputs"], inputs)
        check_sizes(out_dir, [shard for table in manifest["tables"].values() for shard in table["shards"]])
        with suppress(OSError):  # left by a process that was killed in between; where the folder may only be read, they stay
            for name in (MARKER, OWNER):
                (folder / name).unlink(missing_ok=True)
        return manifest
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if foreign or (names and MARKER not in names):
        raise UserError(f"out_dir {out_dir}: holds other files ({(foreign or names)[0]}); give an empty or new --out_dir")
    if MARKER in names:
        try:
            started = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        except OSError as error:
            raise cannot_write(folder / MARKER, error) from None
        except (ValueError, RecursionError):  # killed while writing the marker, before any data
            return None
        refuse_other_inputs(out_dir, started, inputs)
    return None


def refuse_other_inputs(out_dir, old, new):
    """Raise UserError naming the first setting in which two sets differ."""
    difference = first_difference(old, new)
    if difference:
        name, before, now = difference
        raise UserError(
            f"out_dir {out_dir}: holds data prepared with another {name} ({shown(before)} there, {shown(now)} asked); "
            "give another --out_dir"
        )


def refuse_inside(out_dir, source):
    """Raise UserError if `out_dir` lies in the source folder: the next run would read its own output."""
    root, out = (Path(os.path.realpath(path)) for path in (os.path.expanduser(source), out_dir))
    if root.is_dir() and out.is_relative_to(root):
        raise UserError(f"out_dir {out_dir}: lies inside the source {source}; give an --out_dir outside of it")


@contextmanager
def writing(out_dir, inputs):
    """Hold `out_dir` (see finished_set) while it is written; what the block wrote is removed if it fails.

    Raises:
        UserError: the folder cannot be written, the disk is full, or another process is writing it.
    """
    folder = Path(out_dir)
    with owned(folder):
        if (folder / MANIFEST).exists():
            raise UserError(f"out_dir {out_dir}: another process has just prepared it; run again to use it")
        try:
            remove_ours(folder, keep=MARKER)
            write_json(folder / MARKER, inputs, sort_keys=True)
            try:
                yield folder
            except BaseException:
                if not (folder / MANIFEST).exists():  # interrupted after the last step: the set is whole
                    remove_ours(folder)
                raise
            (folder / MARKER).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"out_dir {out_dir}: cannot be written ({error.strerror or error})") from None


def remove_ours(folder, keep=None):
    """Remove the files of a half-written set. Never called on a folder with a manifest or with other files."""
    for entry in folder.iterdir():
        if OURS.fullmatch(entry.name) and entry.name != keep:
            entry.unlink()
