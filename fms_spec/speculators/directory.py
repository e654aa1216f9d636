"""Speculators on disk: how they are written to a directory, read from one, and held to the base model they were trained for.

A speculator directory holds config.json and model.safetensors. The MLP family is in IBM's published layout; our own keys stand beside
it, among them the fingerprint of the base model it was trained for, and the sha256 of the weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from fms_spec.base_model import BaseModel as FrozenModel
from fms_spec.errors import UserError
from fms_spec.files import cannot_write, read_json, sha256_of, write_json
from fms_spec.hub import local_directory
from fms_spec.model_config import DTYPES, read_config, resolve_base_model
from fms_spec.speculators.interface import Sizes, Speculator
from fms_spec.speculators.registry import FAMILIES, ModelType, family_of
from fms_spec.speculators.tensor_files import read_tensors, weight_files
from fms_spec.weights import SINGLE, fingerprint


class Published(BaseModel):
    """What a config.json says beside the family's sizes."""

    model_config = ConfigDict(strict=True)
    model_type: ModelType
    base_model_name_or_path: str | None = None
    base_model_fingerprint: str | None = None
    weights_sha256: dict[Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")], str] | None = None  # {file: hexadecimal}


class Description(Published):
    """What `describe` says beside the family's sizes."""

    base_model_name_or_path: str
    base_model_fingerprint: str
    torch_dtype: Literal["bfloat16", "float16", "float32"]


def check_config(config: Any, file: Path, expected: type[Published] = Published) -> dict[str, Any]:
    """Refuse a config.json's value that `from_config` can't build from; file: its path. Returns `config`.

    Raises:
        UserError: names the key.
    """
    try:
        published = expected.model_validate(config)
        family_of(published.model_type).sizes.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        problem = f"lacks {key}" if first["type"] == "missing" else f"{key} is {first['input']!r:.60}: {first['msg']}"
        raise UserError(f"{file}: no config of a speculator ({problem}); take an undamaged copy") from None
    return config


def sizes_of(config: dict[str, Any]) -> Sizes:
    """The family's sizes in a config.json's values, which `check_config` has passed."""
    return family_of(config["model_type"]).sizes.model_validate(config)


def speculative_config(directory: Path | str, config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What vLLM is to be told of a speculator that drafts so many tokens."""
    method = family_of(config["model_type"]).vllm_method
    return ({"method": method} if method else {}) | {"model": str(directory), "num_speculative_tokens": tokens}


def from_config(config: dict[str, Any]) -> Speculator:
    """An untrained speculator from a config.json's values, which `check_config` has passed."""
    return family_of(config["model_type"]).from_config(config)


def describe(speculator: Speculator, base_model: FrozenModel) -> dict[str, Any]:
    """config.json of a speculator: its own values, and which base model in which dtype it was trained for."""
    return speculator.saved_config() | {
        "base_model_name_or_path": base_model.name,
        "base_model_fingerprint": base_model.fingerprint,
        "torch_dtype": str(base_model.dtype).removeprefix("torch."),
    }


def save_speculator(
    directory: Path | str, speculator: Speculator, config: dict[str, Any], layout: Callable[..., Any] | None = None
) -> None:
    """Write model.safetensors and config.json; `config` is from `describe`, weights are written in its torch_dtype.

    layout: what makes another of config and tensors; None writes the family's own.

    Raises:
        UserError: no room for them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[config["torch_dtype"]]
    tensors = {
        key: value.to(dtype if value.is_floating_point() else value.dtype).cpu().contiguous()
        for key, value in speculator.published_state().items()
    }
    config, tensors = layout(config, tensors) if layout else (config, tensors)
    file = directory / SINGLE
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise cannot_write(file, OSError(str(error))) from None
    write_json(directory / "config.json", config | {"weights_sha256": {file.name: sha256_of(file)}})


def give(speculator: Speculator, base_model: FrozenModel) -> Speculator:
    """`read_speculator`'s, ready to propose on a base model that it was checked for."""
    speculator.to(device=base_model.device, dtype=base_model.dtype).attach(base_model)
    base_model.give_layers(speculator.base_layers)
    return speculator


def read_speculator(directory: Path | str, config: dict[str, Any]) -> Speculator:
    """The weights of a speculator directory as fp32, not attached yet, on the CPU; `config` is its config.json.

    Raises:
        UserError: weights that are missing, damaged or of other sizes.
    """
    with torch.device("meta"):  # memory is taken for what the files hold, whatever the config may say
        speculator = from_config(config)
    read_weights(speculator, directory, config)
    return speculator.eval().requires_grad_(False)


def read_weights(speculator: Speculator, directory: Path | str, config: dict[str, Any]) -> None:
    """Give a speculator the weights of a directory, as fp32; `config` is its config.json. Raises UserError as `read_speculator`."""
    tensors = {key: value for file in check_weights(directory, config) for key, value in read_tensors(file).items()}
    for key, value in tensors.items():
        # Copied, as tensors of a pickle may be one in memory, and training changes them in place.
        tensors[key] = value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        if not tensors[key].isfinite().all():
            raise UserError(f"speculator {directory}: tensor {key} holds values that are not finite; take another checkpoint")
    speculator.load_published_state(tensors)


def check_weights(directory: Path | str, config: dict[str, Any]) -> list[Path]:
    """The `weight_files` of a speculator directory, held to the sha256 that its config.json has of them; published ones have none.

    Raises:
        UserError: names a file that is missing, can't be read or was altered; and as `weight_files`.
    """
    known = config.get("weights_sha256")
    files = weight_files(directory, known)
    for file in files:
        try:
            altered = known and sha256_of(file) != known[file.name]
        except OSError as error:
            raise UserError(f"speculator weights {file}: can't be read ({error.strerror}); copy or export them again") from None
        if altered:
            raise UserError(f"speculator weights {file}: altered since the export, their sha256 is another one; copy or export them again")
    return files


def read_speculator_config(directory: Path | str) -> dict[str, Any]:
    """config.json of a speculator directory; raises UserError where there is none that can be used."""
    file = Path(directory) / "config.json"
    if not file.exists():
        raise UserError(f"speculator {directory}: no config.json; give a directory written by scripts.export")
    config = read_json(file, "copy or export the speculator again")
    for family in FAMILIES.values():
        config = family.translated(config, Path(directory))
    return check_config(config, file)


def check_speculator(directory: Path | str, base_model: Path | str) -> dict[str, Any]:
    """Refuse a pair that doesn't fit before any weight is loaded; returns the speculator's config.json, `complete`.

    Args:
        base_model: its directory or hub name.

    Raises:
        UserError: as `resolve_base_model`, `read_config`, `check_base_model`, `check_layers` and `check_weights`.
    """
    directory = local_directory("speculator", directory)
    config = read_speculator_config(directory)
    path = resolve_base_model(base_model)
    base_config = read_config(path)
    check_base_model(directory, config, base_model, fingerprint(path), (base_config.hidden_size, base_config.vocab_size))
    config = check_layers(directory, config, base_model, base_config.num_hidden_layers)
    check_weights(directory, config)
    return config


def check_base_model(
    directory: Path | str, config: dict[str, Any], name: Path | str, print_of_weights: str | None, sizes: tuple[int, int]
) -> None:
    """Refuse a speculator that was trained for another base model than `name`.

    Published directories carry no fingerprint; for them, and where `print_of_weights` is None, only the sizes (width, vocabulary) have to
    agree.
    """
    theirs = config.get("base_model_fingerprint")
    trained_for = config.get("base_model_name_or_path") or "an unnamed base model"
    if theirs and print_of_weights and theirs != print_of_weights:
        raise UserError(
            f"speculator {directory} was trained for {trained_for} (fingerprint {theirs}), not for {name} "
            f"({print_of_weights}); use the base model it was trained for, or train one for this"
        )
    own = sizes_of(config)
    expected = (own.emb_dim, own.vocab_size)
    if expected != sizes:
        raise UserError(
            f"speculator {directory} (for {trained_for}) fits a base model of width {expected[0]} and vocabulary {expected[1]}, "
            f"{name} has {sizes[0]} and {sizes[1]}"
        )


def check_layers(directory: Path | str, config: dict[str, Any], name: Path | str, layers: int) -> dict[str, Any]:
    """Refuse a speculator that reads inner layers of a base model with more or fewer of them than `name` has; its config, `complete`."""
    config = check_config(family_of(config["model_type"]).complete(config, layers), Path(directory) / "config.json")
    if misfit := sizes_of(config).misfit(layers):
        raise UserError(f"speculator {directory} reads {misfit}, {name} has {layers}; use the base model it was trained for")
    return config
