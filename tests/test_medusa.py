"""Medusa's heads: the published formulas and layout."""

import json
import os

import pytest
import torch
from conftest import ALONE, load_speculator, tiny_speculator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from fms_spec.errors import UserError
from fms_spec.proposers import Step, TopKProposer
from fms_spec.speculators.directory import describe, save_speculator
from fms_spec.speculators.interface import Corpus
from fms_spec.speculators.medusa import MedusaSpeculator
from fms_spec.speculators.registry import settings_of
from fms_spec.speculators.tensor_files import PICKLE


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


class ResBlock(nn.Module):
    """A layer of a head in the original release."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.act = nn.Linear(width, width), nn.SiLU()

    def forward(self, x):
        return x + self.act(self.linear(x))


class Code:
    """What a pickle runs where it is read without care: it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def original(tmp_path):
    """(folder, heads) of a directory as first published: 5 heads, of which config.json says 2, of 2 layers that are one; no sizes."""
    torch.manual_seed(4)
    heads = nn.ModuleList(nn.Sequential(*[ResBlock(32)] * 2, nn.Linear(32, 96, bias=False)) for _ in range(5))
    folder = tmp_path / "original"
    folder.mkdir()
    torch.save(heads.state_dict(), folder / PICKLE)
    config = {"base_model_name_or_path": "somebody/base", "medusa_num_heads": 2, "medusa_num_layers": 2, "transformers_version": "4.31.0"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, heads


@pytest.mark.parametrize("kind", ["a pickle", "safetensors of the same names"])
def test_an_original_release_is_read_and_all_its_heads_compute_what_its_modules_do(original, base_model, kind):
    (folder, heads), hidden = original, torch.randn(7, 32)
    tensors = torch.load(folder / PICKLE)
    assert {"0.0.linear.weight", "0.1.linear.bias", "0.2.weight"} <= tensors.keys()
    if kind != "a pickle":
        save_file({key: value.clone() for key, value in tensors.items()}, folder / "medusa_lm_head.safetensors")
        (folder / PICKLE).unlink()
    loaded = load_speculator(folder, base_model)
    assert loaded.n_predict == len(heads)
    for number, head in enumerate(heads):
        found = loaded.logits(loaded.advance(loaded.start(hidden), torch.arange(7), number), number)
        torch.testing.assert_close(found, head(hidden), rtol=1e-5, atol=1e-5)
    weights = list(loaded.parameters())
    assert len({weight.data_ptr() for weight in weights}) == len(weights)  # so that each is trained alone


def test_what_is_wrong_with_an_original_release_is_told_in_one_line_and_no_code_in_it_is_run(original, base_model):
    folder, file, config_file = original[0], original[0] / PICKLE, original[0] / "config.json"
    whole, tensors, config = file.read_bytes(), torch.load(file), json.loads(config_file.read_text())
    less, endless = {key: value for key, value in tensors.items() if key != "3.1.linear.bias"}, torch.zeros(1, 1).expand(2**20, 2**20)
    cases = [
        (lambda: torch.save(tensors | {"0.2.weight": Code(folder / "run")}, file), "a pickle that would run code"),
        (lambda: file.write_bytes(whole[:-100]), "cut short, damaged"),
        (lambda: torch.save(tensors, file, _use_new_zipfile_serialization=False), "older than torch 1.6"),
        (lambda: torch.save({"state_dict": tensors}, file), "other things than tensors by name"),
        (lambda: torch.save(tensors | {"0.2.weight": endless}, file), "other things than tensors by name"),
        (lambda: torch.save(less, file), "blocks.3.layers.1.bias: the file says missing, the config .32."),
        (lambda: torch.save(tensors | {"0.0.linear.weight": torch.zeros(3, 3)}, file), "the file says .3, 3., the config .32, 32."),
        (lambda: torch.save(tensors | {"0.0.linear.bias": torch.zeros(32).int()}, file), "the file says torch.int32 .32., the config .32."),
        (lambda: torch.save(tensors | {"extra": torch.zeros(3)}, file), "extra: the file says .3., the config not expected"),
        (lambda: torch.save({key: torch.zeros(8, 16) for key in tensors}, file), "fits a base model of width 16 and vocabulary 8"),
        (lambda: config_file.write_text(json.dumps(config | {"medusa_num_heads": 6})), "hold 5 heads .* medusa_num_heads is 6"),
        (lambda: config_file.write_text(json.dumps(config | {"medusa_num_layers": "1"})), "layers is '1'"),
        (lambda: save_file({"x": torch.zeros(1)}, folder / "base.safetensors"), "weights in base.safetensors and in medusa_lm_head.pt"),
        (lambda: file.unlink() or (folder / "base.safetensors").unlink(), "no .*safetensors weights in it, and no medusa_lm_head.pt"),
    ]  # fmt: skip
    for damage, message in cases:
        file.write_bytes(whole)
        damage()
        with pytest.raises(UserError, match=message) as error:
            load_speculator(folder, base_model)
        assert "\n" not in str(error.value) and not (folder / "run").exists()
