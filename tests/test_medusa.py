"""Medusa's heads: the published formulas and layout."""

import json

import pytest
import torch
from conftest import ALONE, tiny_speculator
from safetensors.torch import load_file
from torch.nn import functional as F

from fms_spec.errors import UserError
from fms_spec.proposers import Step, TopKProposer
from fms_spec.speculators.directory import describe, load_speculator, save_speculator
from fms_spec.speculators.interface import Corpus
from fms_spec.speculators.medusa import MedusaSpeculator
from fms_spec.speculators.registry import settings_of


def test_each_head_drafts_from_the_state_alone_what_the_published_formulas_draft_also_from_a_published_directory(base_model, tmp_path):
    speculator = tiny_speculator(base_model, ALONE)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    tensors = load_file(tmp_path / "model.safetensors")
    published = {
        "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": 32, "vocab_size": 96, "num_heads": 4,
        "num_hidden_layers": 2, "medusa_fc_bias": True, "truncated_vocab_size": 96,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    loaded, hidden, expected = load_speculator(tmp_path, base_model), torch.randn(5, 32), []
    for i in range(4):
        y = hidden.double()
        for j in range(2):
            weight, bias = (tensors[f"blocks.{i}.layers.{j}.{part}"].double() for part in ("weight", "bias"))
            y = y + F.silu(y @ weight.T + bias)
        expected.append((y @ tensors[f"lm_heads.{i}.weight"].double().T).argmax(-1))
    found = TopKProposer(loaded, [1] * 4).propose(Step(hidden, torch.arange(5), [])).tokens
    assert torch.equal(found, torch.stack(expected, dim=1))
    (tmp_path / "config.json").write_text(json.dumps(published | {"truncated_vocab_size": 64}))
    with pytest.raises(UserError, match="truncated_vocab_size is 64"):
        load_speculator(tmp_path, base_model)


def test_untrained_heads_say_what_the_base_model_says(base_model):
    corpus = Corpus(torch.ones(96), None)
    speculator = MedusaSpeculator.build(settings_of({"family": "medusa", "n_predict": 2}), base_model, corpus)
    hidden = base_model.hidden_states(torch.arange(1, 9)[None], torch.zeros(1, 8, dtype=torch.int64))[0]
    drafted = TopKProposer(speculator, [1, 1]).propose(Step(hidden, torch.arange(8), [])).tokens
    assert torch.equal(drafted, base_model.logits(hidden).argmax(-1)[:, None].expand(-1, 2))
