"""Models by directory or by name on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fms_spec.errors import UserError
from fms_spec.speculators.tensor_files import PICKLE

FILES = ["*.json", "*.safetensors", PICKLE, "tokenizer*", "*.jinja"]


def local_directory(kind: str, name: Path | str, **where: Any) -> Path:
    """Path of a model given as a directory or a hub name, downloaded where it is not there yet.

    Args:
        kind: what it is, for messages: "base model" or "speculator". where: revision, local_files_only, as for `snapshot_download`.

    Raises:
        UserError: no such directory, and not to be had from the hub.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=FILES, **where))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise UserError(f"{kind} {name}: no such directory, and not to be had from the hub ({reason})") from error
