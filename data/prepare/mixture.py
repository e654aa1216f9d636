"""Several sources in one YAML file: what is read of each, and how much of it there is beside the others.

A file has `sources`, a name for each and its settings below it (`SourceSettings`). Paths are told from where the command runs.
"""

import glob
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from data.prepare.languages import Languages
from data.prepare.rows import FORMATS, ROLES, BadRow, Wanted, check_format
from data.prepare.sources import Skipped, open_source
from data.yaml_files import read_yaml
from fms_spec.errors import UserError
from fms_spec.settings import Place, Section, explain, first_problem

Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]  # it stands before a / in the names of documents
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}$")]


class SourceSettings(Section):
    """What is read of one source.

    path: as --source. weight: its share of the mixture's tokens, against the other weights. split: of a data set's, train where none is
    given. limit: read so many documents at most, without those that are left out. min_tokens, max_tokens: documents of other lengths are
    left out. roles: so are conversations in which others speak. languages: so are documents in others, see languages.Languages.
    """

    path: Place
    weight: float | None = Field(None, gt=0, le=1e6)
    split: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")] | None = None
    format: Literal[tuple(FORMATS)] | None = None
    text_column: str = "text"
    limit: Count | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    roles: list[Literal[tuple(ROLES)]] | None = Field(None, min_length=1)
    languages: list[Language] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def consistent(self):
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}: nothing would be left")
        if self.format not in (None, "text") and self.text_column != "text":
            raise ValueError(f"format {self.format} reads columns of its own; leave text_column {self.text_column} out")
        return self


class MixtureFile(Section):
    sources: dict[Name, SourceSettings] = Field(min_length=1)

    @model_validator(mode="after")
    def all_weighed_or_none(self):
        without = [name for name, section in self.sources.items() if section.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"sources.{without[0]} has no weight, and others have; give each one, or none")
        return self


def is_mixture(source):
    """Whether a --source names a file of this kind."""
    return source.lower().endswith((".yaml", ".yml")) and not glob.has_magic(source) and not Path(source).expanduser().is_dir()


def read_mixture(path):
    """{name: `SourceSettings`} of a file, in its order.

    Raises:
        UserError: one line naming the file, the key and what it should be.
    """
    values = read_yaml(Path(path).expanduser(), "mixture")
    try:
        return MixtureFile.model_validate(values).sources
    except ValidationError as error:
        problem = first_problem(error)
        section = SourceSettings if len(problem["loc"]) > 1 else MixtureFile
        where = ".".join(map(str, problem["loc"]))
        prefix = f"{where}: " if problem["type"] == "value_error" and where else ""
        raise UserError(f"mixture {path}: {prefix}{explain(problem, section.model_fields)}") from None


class Part:
    """One source, open, and what was left out of it. name: "" of a source that no file names."""

    def __init__(self, name, settings, on_bad_row):
        self.name, self.settings, self.skipped = name, settings, Skipped(self.label)
        self.source = open_source(settings.path, Wanted(settings.text_column, settings.format, on_bad_row), settings.split)
        if settings.roles and not self.source.conversations:
            raise UserError(f"sources.{name}.roles: {settings.path} holds texts, in which nobody speaks; leave them out")
        self.holds = "conversations" if self.source.conversations else "texts"
        self.languages = Languages(settings.languages, f"sources.{name}.languages") if settings.languages else None

    def label(self, file, row):
        """A document's name."""
        return (f"{self.name}/" if self.name else "") + self.source.label(file, row)

    def misfit(self, _, encoded):
        """(why, "") of a document, encoding.Encoded, that has too few tokens or too many; None of others."""
        tokens, least, most = len(encoded.tokens), self.settings.min_tokens, self.settings.max_tokens
        if least and tokens < least:
            return f"under {least} tokens", ""
        return (f"over {most} tokens", "") if most and tokens > most else None

    def documents(self, generator):
        """Yield the source's `Document`s in the order it has them; those in which other roles speak, or in other languages, as `BadRow`."""
        for document in self.source.documents(generator):
            unwanted = self.unwanted(document)
            yield document._replace(content=unwanted) if unwanted else document

    def unwanted(self, document):
        """The `rows.BadRow` that a `Document` becomes in which other roles speak, or in another language; None of others."""
        roles = self.settings.roles
        if roles and (others := {message["role"] for message in document.messages}.difference(roles)):
            return BadRow(", ".join(sorted(others)), "others speak")
        language = self.languages and self.languages.other(document.texts)
        return BadRow(language, "other languages") if language else None


class Mixture:
    """The sources of one preparation, one or more.

    Attributes:
        parts: list of `Part`. named: whether a file names them. weights: one for each, None where all is taken as it is. conversations:
        whether any of them holds those. of_both: whether others hold texts.
    """

    def __init__(self, source, text_column, format, on_bad_row):
        """source, text_column, format, on_bad_row: as typed by the user.

        Raises:
            UserError: anything wrong with a source or its settings.
        """
        self.named = is_mixture(source)
        if self.named and (format or text_column != "text"):
            flag = f"--format={format}" if format else f"--text_column={text_column}"
            raise UserError(f"{flag}: {source} has several sources; write it there, below the one that it is about")
        check_format(format, text_column)
        alone = {"": SourceSettings.model_construct(path=source, format=format, text_column=text_column)}
        sections = read_mixture(source) if self.named else alone
        self.parts = [Part(name, section, on_bad_row) for name, section in sections.items()]
        weights = [part.settings.weight for part in self.parts]
        self.weights = weights if None not in weights else None
        self.conversations = any(part.source.conversations for part in self.parts)
        self.of_both = len({part.holds for part in self.parts}) > 1

    def fingerprint(self):
        """Of all that the sources hold, hex: a single one's own where no file names it."""
        if not self.named:
            return self.parts[0].source.fingerprint()
        return hashlib.sha256(json.dumps([[part.name, part.source.fingerprint()] for part in self.parts]).encode()).hexdigest()

    def inputs(self):
        """Settings of the sources, as the manifest has them; where they lie is none. Empty where no file names them."""
        sections = {part.name: part.settings.model_dump(exclude={"path"}, exclude_none=True) for part in self.parts}
        return {"mixture": sections} if self.named else {}

    def share(self, number):
        """Share of the tokens that is to come from a source, at most 1."""
        return self.weights[number] / sum(self.weights) if self.weights else 1.0

    def label(self, part, file, row):
        """A document's name, by the number of its part."""
        return self.parts[part].label(file, row)
