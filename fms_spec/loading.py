"""A base model and a speculator, ready to decode."""

from pathlib import Path
from typing import Any

from fms_spec.base_model import BaseModel
from fms_spec.draft_shape import DraftShape
from fms_spec.proposers import Proposer
from fms_spec.speculators.directory import check_speculator, load_speculator
from fms_spec.speculators.interface import Speculator


def load_for_decoding(
    base_model: Path | str, speculator: Path | str, shape: DraftShape = DraftShape(), **settings: Any
) -> tuple[BaseModel, Speculator, Proposer]:
    """(BaseModel, attached speculator, its proposer), laid out for the few tokens of a decoding step.

    Everything that can be refused from configs and samples of the weights is refused before they are loaded.

    Args:
        base_model: directory or hub name. speculator: directory. shape: of the candidate tree. settings: dtype, backend, device as for
        `BaseModel`.

    Raises:
        UserError: as `check_speculator`, `DraftShape.check`, `BaseModel` and `load_speculator`.
    """
    shape.check(check_speculator(speculator, base_model)["n_predict"])
    model = BaseModel(base_model, **settings)
    heads = load_speculator(speculator, model)
    model.pack()
    heads.pack()
    return model, heads, shape.proposer(heads)
