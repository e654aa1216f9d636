"""The files that hold a speculator's weights: which of a directory's they are, and what is in them."""

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fms_spec.errors import UserError
from fms_spec.weights import SINGLE

PICKLE = "medusa_lm_head.pt"  # of Medusa's first releases


def weight_files(directory: Path | str, named: Iterable[str] | None = None) -> list[Path]:
    """The files that hold a speculator directory's weights: those that its config.json names, or what a published one has.

    Raises:
        UserError: there are none, or of both kinds.
    """
    directory = Path(directory)
    if named:
        return [directory / name for name in named]
    whole, pickled = directory / SINGLE, [file for file in [directory / PICKLE] if file.exists()]
    files = [whole] if whole.exists() else sorted(directory.glob("*.safetensors"))  # published in parts
    if files and pickled:
        raise UserError(f"speculator {directory}: weights in {files[0].name} and in {PICKLE}; move those away that aren't the heads'")
    if not files + pickled:
        raise UserError(f"speculator {directory}: no *.safetensors weights in it, and no {PICKLE}")
    return files + pickled


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file of weights, as they lie on the disk; nothing in it is run.

    Raises:
        UserError: it can't be read, or is a pickle of other things than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"speculator weights {file}: can't be read ({error}); copy or export them again") from error
    except UnpicklingError:
        raise UserError(f"speculator weights {file}: a pickle that would run code, or a damaged one; take another copy") from None
    except Exception:  # of many kinds, and their texts of many lines
        raise UserError(f"speculator weights {file}: cut short, damaged, or older than torch 1.6; take another copy") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and lies(value) for name, value in tensors.items()):
        raise UserError(f"speculator weights {file}: holds other things than tensors by name; give a state dict that torch.save wrote")
    return tensors


def lies(value: object) -> bool:
    """Whether a pickle's value is a tensor all of whose elements stand in the file."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.is_cpu and value.is_contiguous()


def form(tensor: torch.Tensor | None, absent: str = "missing") -> str:
    """What has to agree of two tensors, in words: the shape, and the dtype where it isn't one of floating point."""
    if tensor is None:
        return absent
    return f"{'' if tensor.is_floating_point() else f'{tensor.dtype} '}{list(tensor.shape)}"
