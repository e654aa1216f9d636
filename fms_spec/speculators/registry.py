"""The families by name: the one place that lists them."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from fms_spec.speculators.eagle3 import Eagle3Speculator
from fms_spec.speculators.hidden_state import HiddenStateSpeculator
from fms_spec.speculators.interface import Speculator
from fms_spec.speculators.medusa import MedusaSpeculator
from fms_spec.speculators.mlp import MLPSpeculator

KNOWN = (MLPSpeculator, HiddenStateSpeculator, Eagle3Speculator, MedusaSpeculator)
FAMILIES: dict[str, type[Speculator]] = {family.name: family for family in KNOWN}


def one_of(value: str, known: Iterable[str]) -> str:
    """The value, which must be known; raises pydantic's error otherwise."""
    if value not in known:
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": " or ".join(map(repr, known))})
    return value


ModelType = Annotated[str, AfterValidator(lambda value: one_of(value, [family.model_type for family in FAMILIES.values()]))]


class Named(BaseModel):
    model_config = ConfigDict(strict=True)
    family: Annotated[str, AfterValidator(lambda value: one_of(value, list(FAMILIES)))]


def settings_of(values: Any) -> Any:
    """The `Settings` of the family that `values` name, checked; raises pydantic's ValidationError. What is no dict is given back."""
    if not isinstance(values, dict):
        return values
    return FAMILIES[Named.model_validate(values).family].settings.model_validate(values)


def family_of(model_type: str) -> type[Speculator]:
    """The family of a config.json's model_type, a `ModelType`."""
    return next(family for family in FAMILIES.values() if family.model_type == model_type)
