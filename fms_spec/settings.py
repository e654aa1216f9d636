"""Sections of a config: strict values, told what is wrong with them by key."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

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
