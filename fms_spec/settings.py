"""Sections of a config: strict values, told what is wrong with them by key."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Side = Annotated[int, Field(ge=1, le=2**20)]  # of a tensor's side: a product of three fits into 63 bits


class Section(BaseModel):
    """Strict: an unknown key is an error, and so is a value of another type (`lr: yes` is not 1), infinity and nan."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
