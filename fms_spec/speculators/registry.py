"""The families by name: the one place that lists them."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from fms_spec.speculators.hidden_state import HiddenStateSpeculator
from fms_spec.speculators.mlp import MLPSpeculator

FAMILIES = {family.name: family for family in (MLPSpeculator, HiddenStateSpeculator)}


def one_of(names):
    """A pydantic type: one of the strings that `names`, a function, gives when it is validated."""

    def check(value):
        if value not in names():
            expected = " or ".join(map(repr, names()))
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    return Annotated[str, AfterValidator(check)]


ModelType = one_of(lambda: [family.model_type for family in FAMILIES.values()])


class Named(BaseModel):
    model_config = ConfigDict(strict=True)
    family: one_of(lambda: list(FAMILIES))


def settings_of(values):
    """The `Settings` of the family that `values` name, checked; raises pydantic's ValidationError. What is no dict is given back."""
    if not isinstance(values, dict):
        return values
    return FAMILIES[Named.model_validate(values).family].settings.model_validate(values)


def family_of(model_type):
    """The family of a config.json's model_type, a `ModelType`."""
    return next(family for family in FAMILIES.values() if family.model_type == model_type)
