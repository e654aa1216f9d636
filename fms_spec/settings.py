"""Sections of a config: strict values, told what is wrong with them by key."""

import difflib
import os
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fms_spec.errors import shown

# Of a file, a folder or on the hub; a ~ is one's own folder, as in the shell.
Place = Annotated[str, Field(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$"), AfterValidator(os.path.expanduser)]
Side = Annotated[int, Field(ge=1, le=2**20)]  # of a tensor's side: a product of three fits into 63 bits


class Section(BaseModel):
    """Strict: an unknown key is an error, and so is a value of another type (`lr: yes` is not 1), infinity and nan."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def ascending(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids, if each is larger than the one before; raises pydantic's error otherwise."""
    if list(ids) != sorted(set(ids)):
        raise PydanticCustomError("ascending", "Input should be layers in ascending order, none of them twice")
    return ids


as_tuple = BeforeValidator(lambda ids: tuple(ids) if isinstance(ids, list) else ids)  # YAML has lists only, strict pydantic wants tuples
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0, le=2**16)], ...],
    as_tuple,
    AfterValidator(ascending),
]


def first_problem(error: ValidationError) -> ErrorDetails:
    """The problem that says most: a mistyped key is also a missing one."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


def explain(problem: ErrorDetails, known: Iterable[str]) -> str:
    """One line for a problem that pydantic found in a section's values. known: the keys there are where it found one that is unknown."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key {key}, " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # ours, raised by a section's own check
        return message
    if problem["type"] == "model_type":  # pydantic would name a class
        message = "should be a section, with keys and values"
    if problem["type"] == "string_pattern_mismatch":
        message = "should be a path or a name"
    return f"{key}: {message} (got {shown(problem['input'])})"
