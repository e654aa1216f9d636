"""The manifest of a prepared folder: what it was made from and what it must hold. It is written last."""

import hashlib
import json
from pathlib import Path

from fms_spec.errors import UserError
from fms_spec.files import sha256_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def read_manifest(data_dir):
    """The manifest of a folder written by scripts.prepare_data, as a dict.

    Raises:
        UserError: there is none (never prepared, or half-written), or it is of another format.
    """
    path = Path(data_dir) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{data_dir}: no {MANIFEST}, so it is half-written or not prepared; run scripts.prepare_data") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare the data again into another folder") from None
    version = manifest.get("inputs", {}).get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this code reads {FORMAT_VERSION}; run scripts.prepare_data again")
    return manifest


def data_fingerprint(data_dir):
    """Hash (hex, 32 characters) of what a prepared folder holds: of its tables' checksums, not of the names its source went by.

    Raises:
        UserError: as read_manifest.
    """
    manifest = read_manifest(data_dir)
    held = json.dumps([manifest["inputs"], manifest["tables"]], sort_keys=True)
    return hashlib.sha256(held.encode()).hexdigest()[:32]


def table_of(manifest, data_dir, name):
    """The manifest's entry for table `name`, e.g. "rows-train".

    Raises:
        UserError: the folder was prepared without that table.
    """
    if name not in manifest["tables"]:
        known = ", ".join(manifest["tables"])
        mend = "; prepare it with --held_out=N" if name.endswith("held_out") else ""
        raise UserError(f"{data_dir}: holds no table {name} (it holds {known}){mend}")
    return manifest["tables"][name]


def shown(value):
    """A setting as it appears in a message: hashes are cut to the part a person compares."""
    text = json.dumps(value)
    return text if len(text) < 50 else text[:16] + "…" + text[-1]


def reason(error):
    """What a library's error says, on one line and short enough for a message of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_sizes(data_dir, shards):
    """Compare the files on disk with the manifest without reading them.

    Raises:
        UserError: a shard is missing, cut short or longer than it was; names it.
    """
    for shard in shards:
        path = Path(data_dir) / shard["file"]
        if not path.is_file():
            raise UserError(f"{path}: missing; remove the folder and run scripts.prepare_data again")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes where the manifest says {shard['bytes']} (cut short or altered); "
                "remove the folder and run scripts.prepare_data again"
            )


def check_contents(data_dir, shard):
    """Compare a shard's sha256 with the manifest.

    Raises:
        UserError: it was altered; names it.
    """
    check_sizes(data_dir, [shard])
    path = Path(data_dir) / shard["file"]
    if sha256_of(path) != shard["sha256"]:
        raise UserError(f"{path}: altered since it was prepared (sha256); remove the folder and run scripts.prepare_data again")
