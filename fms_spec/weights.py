"""The safetensors files of a base model: which of them hold it, what is in them, and the fingerprint that tells models apart."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fms_spec.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes of every tensor that enter the fingerprint: a fine-tune changes nearly all of them, and 70B weights take seconds, not minutes.
FINGERPRINT_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, dtype as safetensors names it, shape, and the bytes [start, end) of the file that hold it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_map(path: Path | str) -> dict[str, str]:
    """{tensor name: file name} of a directory's index.

    Raises:
        UserError: there is none that can be read.
    """
    try:
        files = json.loads((Path(path) / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(file).name for name, file in files.items()}
    except FileNotFoundError:
        raise UserError(f"base model {path}: no {SINGLE} and no {INDEX} in it; save the model with save_pretrained first") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"base model {path}: its {INDEX} can't be read ({error!r}); copy or download it again") from error


def weight_files(path: Path | str) -> list[Path]:
    """The files that hold the model in a directory, as `transformers` chooses them: model.safetensors, else those that the index names.

    Raises:
        UserError: neither is there, an index that can't be read, or a file that it names and that is missing.
    """
    path = Path(path)
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    named = sorted(set(weight_map(path).values()))
    missing = [name for name in named if not (path / name).is_file()]
    if missing:
        raise UserError(f"base model {path}: {INDEX} names {missing[0]}, which is not there; copy or download it again")
    return [path / name for name in named]


def stray_files(path: Path | str) -> list[str]:
    """Names of *.safetensors files that nothing here reads and vLLM does: those beside model.safetensors where there is no index."""
    named = {file.name for file in weight_files(path)}
    return [] if (Path(path) / INDEX).exists() else sorted({file.name for file in Path(path).glob("*.safetensors")} - named)


def read_entries(path: Path | str) -> dict[str, Entry]:
    """{tensor name: `Entry`} of a model's directory, from the headers of its files.

    Raises:
        UserError: as `weight_files`; a file that can't be read; an index that says another file for a tensor than the one that has it.
    """
    files = weight_files(path)
    headers = {file.name: read_header(file) for file in files}
    if files[0].name != SINGLE:
        index = weight_map(path)
        there = [(name, file) for file, entries in headers.items() for name in entries]
        wrong = sorted(set(there) ^ set(index.items()))
        if wrong:
            raise UserError(f"base model {path}: {INDEX} and the files disagree on tensor {wrong[0][0]} ({wrong[0][1]}); copy them again")
    return {name: entry for entries in headers.values() for name, entry in entries.items()}


def read_header(file: Path) -> dict[str, Entry]:
    """{tensor name: `Entry`} of one file."""
    try:
        with safe_open(file, "pt"):
            pass  # checks that the header and the file's size agree
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"base model weights {file}: can't be read ({error}); copy or download them again") from error
    header.pop("__metadata__", None)
    return {
        name: Entry(file, value["dtype"], tuple(value["shape"]), *(8 + size + offset for offset in value["data_offsets"]))
        for name, value in header.items()
    }


def read_tensors(entries: Mapping[str, Entry], names: Collection[str], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """{name: tensor} for some names of `read_entries`, each file opened once."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({entries[name].file for name in names}):
        with safe_open(file, "pt", device=str(device)) as opened:
            tensors |= {name: opened.get_tensor(name) for name in names if entries[name].file == file}
    return tensors


def fingerprint(path: Path | str) -> str:
    """Hash (hex, 32 characters) that tells base models apart, whatever backend or dtype they are loaded with.

    Over every tensor's name, dtype, shape and 4 KiB from its middle, in name order, so that re-sharded files agree.

    Raises:
        UserError: as `read_entries`.
    """
    entries, samples = read_entries(path), []
    for name in sorted(entries):
        entry = entries[name]
        with open(entry.file, "rb") as stream:
            stream.seek(entry.start + max(0, (entry.end - entry.start - FINGERPRINT_BYTES) // 2))
            sample = stream.read(min(FINGERPRINT_BYTES, entry.end - entry.start))
        samples.append(f"{name} {entry.dtype} {list(entry.shape)} ".encode() + sample)
    return hashlib.sha256(b"".join(samples)).hexdigest()[:32]
