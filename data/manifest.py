"""The manifest of a prepared folder: what it was made from and what it must hold. It is written last."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from fms_spec.errors import UserError
from fms_spec.files import read_json, sha256_of
from fms_spec.seeds import LARGEST

TEXTS, CONVERSATIONS = VERSIONS = (1, 2)  # of the format: rows say which tokens are answers where conversations are among them
MANIFEST = "manifest.json"
AGAIN = "remove the folder and run scripts.prepare_data again"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, StringConstraints(pattern=r"^[\w-]+\.parquet$")]  # of that folder: no other leads out of it


class Known(BaseModel):
    """What a JSON file of ours must say of something; more is let pass."""

    model_config = ConfigDict(strict=True)


class Shard(Known):
    file: PlainName
    rows: Count
    bytes: Count
    sha256: Sha256


class Table(Known):
    """tokens: of rows; answer_tokens, padding_tokens: of conversations' alone."""

    rows: Count
    shards: list[Shard]
    tokens: Count | None = None
    answer_tokens: Count | None = None
    padding_tokens: Count | None = None

    @model_validator(mode="after")
    def rows_add_up(self):
        assert self.rows == sum(shard.rows for shard in self.shards), "its rows are not those of its shards"
        return self


class Inputs(Known):
    format_version: Literal[VERSIONS]
    seq_length: Annotated[int, Field(ge=2)]
    prompt_length: Annotated[int, Field(ge=1)]


class TokenizerIdentity(Known):
    name: str
    sha256: Sha256


class Source(Known):
    name: str
    documents_read: Count
    tokens_read: Count
    skipped: dict[str, Count]


class ChatTemplateIdentity(Known):
    """Of conversations alone. answers_end_with: token id -> how many answers."""

    origin: str
    sha256: Sha256
    answers_end_with: dict[Annotated[str, StringConstraints(pattern=r"^\d+$")], Count]


class Manifest(Known):
    inputs: Inputs
    source: Source
    chat_template: ChatTemplateIdentity | None = None
    tokenizer: TokenizerIdentity
    tables: dict[str, Table]

    @field_validator("tables")
    @classmethod
    def rows_say_their_tokens(cls, tables):
        assert all(table.tokens is not None for name, table in tables.items() if name.startswith("rows-")), "rows have a number of tokens"
        return tables

    @model_validator(mode="after")
    def template_of_conversations(self):
        assert (self.inputs.format_version == CONVERSATIONS) == (self.chat_template is not None), "conversations have a chat template"
        return self


def read_manifest(data_dir):
    """The manifest of a folder written by scripts.prepare_data, as a dict.

    Raises:
        UserError: there is none (never prepared, or half-written), or it is damaged or of another format.
    """
    path = Path(data_dir) / MANIFEST
    if not os.path.exists(path):
        raise UserError(f"{data_dir}: no {MANIFEST}, so it is half-written or not prepared; run scripts.prepare_data")
    manifest = read_json(path, AGAIN)
    inputs = manifest.get("inputs") if isinstance(manifest, dict) else None
    version = inputs.get("format_version") if isinstance(inputs, dict) else None
    if version not in VERSIONS:
        raise UserError(f"{path}: format version {shown(version)}, this code reads up to {VERSIONS[-1]}; run scripts.prepare_data again")
    checked(Manifest, manifest, path, AGAIN)
    return manifest


def checked(model, value, path, mend):
    """Check the JSON value of a file with a pydantic model.

    Raises:
        UserError: it is of another shape; names the file and the key.
    """
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"{path}: {key}: {reason(first['msg'])}, so it is damaged or altered; {mend}") from None


def check_seed(seed, where):
    """Raise UserError for a seed that is not from 0 to 2^63 - 1; where: what it was given with."""
    if not 0 <= seed <= LARGEST:
        raise UserError(f"{where}: a seed must be from 0 to 2^63 - 1")


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
            raise UserError(f"{path}: missing; {AGAIN}")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes where the manifest says {shard['bytes']} (cut short or altered); {AGAIN}")


def check_contents(data_dir, shard):
    """Compare a shard's sha256 with the manifest.

    Raises:
        UserError: it was altered, or can't be read; names it.
    """
    check_sizes(data_dir, [shard])
    path = Path(data_dir) / shard["file"]
    try:
        checksum = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); mend its permissions or its disk") from None
    if checksum != shard["sha256"]:
        raise UserError(f"{path}: altered since it was prepared (sha256); {AGAIN}")
