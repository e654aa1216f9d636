"""The families of attached heads, and how they are written to and read from a directory.

A speculator directory holds config.json and model.safetensors. The MLP family is in IBM's published layout; our own keys stand beside
it, among them the fingerprint of the base model it was trained for.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fms_spec.base_model import DTYPES, read_config, resolve_base_model
from fms_spec.errors import UserError
from fms_spec.hub import local_directory
from fms_spec.speculators.base import Speculator
from fms_spec.speculators.hidden_state import HiddenStateSpeculator
from fms_spec.speculators.mlp import MLPSpeculator
from fms_spec.weights import fingerprint

FAMILIES = {family.family: family for family in (MLPSpeculator, HiddenStateSpeculator)}

__all__ = [
    "FAMILIES", "HiddenStateSpeculator", "MLPSpeculator", "Speculator", "check_speculator", "describe", "from_config", "load_speculator",
    "save_speculator",
]  # fmt: skip


def from_config(config):
    """An untrained speculator from a config.json's values.

    Raises:
        UserError: a model_type that is no family here, or values missing for it.
    """
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise UserError(f"speculator model_type {config.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    return family.from_config(config)


def describe(speculator, base_model):
    """config.json of a speculator: its own values, and which base model in which dtype it was trained for."""
    return speculator.saved_config() | {
        "base_model_name_or_path": base_model.name,
        "base_model_fingerprint": base_model.fingerprint,
        "torch_dtype": str(base_model.dtype).removeprefix("torch."),
    }


def save_speculator(directory, speculator, config):
    """Write config.json and model.safetensors; `config` is from `describe`, weights are written in its torch_dtype."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[config["torch_dtype"]]
    tensors = {
        key: value.to(dtype if value.is_floating_point() else value.dtype).cpu().contiguous()
        for key, value in speculator.published_state().items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_speculator(directory, base_model):
    """A speculator ready to propose: attached, in the base model's dtype and on its device.

    Raises:
        UserError: not a speculator directory, damaged weights, or one that was trained for another base model.
    """
    directory = local_directory("speculator", directory)
    config = read_speculator_config(directory)
    check_base_model(directory, config, base_model.name, base_model.fingerprint, (base_model.width, base_model.vocab_size))
    speculator = read_speculator(directory, config).to(device=base_model.device, dtype=base_model.dtype)
    speculator.attach(base_model)
    return speculator


def read_speculator(directory, config):
    """The weights of a speculator directory as fp32, not attached yet, on the CPU; `config` is its config.json.

    Raises:
        UserError: weights that are missing, damaged or of other sizes.
    """
    speculator = from_config(config)
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise UserError(f"speculator {directory}: no *.safetensors weights in it")
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"speculator weights {file}: can't be read ({error}); export them again") from error
    speculator.load_published_state({key: value.float() if value.is_floating_point() else value for key, value in tensors.items()})
    return speculator.eval().requires_grad_(False)


def read_speculator_config(directory):
    """config.json of a speculator directory; raises UserError where there is none that can be read."""
    try:
        return json.loads((Path(directory) / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"speculator {directory}: no config.json; give a directory written by scripts.export") from error
    except (OSError, ValueError) as error:
        raise UserError(f"speculator {directory}: its config.json can't be read ({error})") from error


def check_speculator(directory, base_model):
    """Refuse a pair that doesn't fit before any weight is loaded; returns the speculator's config.json.

    Args:
        base_model: its directory or hub name.

    Raises:
        UserError: as `resolve_base_model`, `read_config` and `check_base_model`.
    """
    config = read_speculator_config(local_directory("speculator", directory))
    path = resolve_base_model(base_model)
    base_config = read_config(path)
    check_base_model(directory, config, base_model, fingerprint(path), (base_config.hidden_size, base_config.vocab_size))
    from_config(config)
    return config


def check_base_model(directory, config, name, print_of_weights, sizes):
    """Refuse a speculator that was trained for another base model than `name`.

    Published directories carry no fingerprint; for them, and where `print_of_weights` is None, only the sizes (width, vocabulary) have to
    agree.
    """
    theirs = config.get("base_model_fingerprint")
    trained_for = config.get("base_model_name_or_path", "an unnamed base model")
    if theirs and print_of_weights and theirs != print_of_weights:
        raise UserError(
            f"speculator {directory} was trained for {trained_for} (fingerprint {theirs}), not for {name} "
            f"({print_of_weights}); use the base model it was trained for, or train one for this"
        )
    expected = (config.get("emb_dim"), config.get("vocab_size"))
    if expected != sizes:
        raise UserError(
            f"speculator {directory} (for {trained_for}) fits a base model of width {expected[0]} and vocabulary {expected[1]}, "
            f"{name} has {sizes[0]} and {sizes[1]}"
        )
