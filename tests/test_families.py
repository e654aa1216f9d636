"""A family of a user's own, in this file alone, goes the whole way through the ordinary commands."""

import json
from typing import Literal

import pytest
import torch
from conftest import load_speculator
from torch import nn

import scripts.decode
import scripts.evaluate
import scripts.export
import scripts.train
from fms_spec.base_model import BaseModel as FrozenModel
from fms_spec.errors import UserError
from fms_spec.speculators.interface import Settings, Sizes, Speculator
from fms_spec.speculators.registry import FAMILIES
from pipelines.cli import main


class LinearSettings(Settings):
    family: Literal["linear"]
    bias: bool = False  # a setting that no other family has


class LinearSizes(Sizes):
    bias: bool


class LinearHeads(Speculator):
    """Each head is one linear layer on h_t, and looks at no token."""

    name, model_type, architecture = "linear", "linear_speculator", "LinearHeads"
    settings, sizes = LinearSettings, LinearSizes
    draft_ids = None

    def __init__(self, emb_dim, vocab_size, n_predict, bias):
        super().__init__()
        self.emb_dim, self.vocab_size, self.n_predict, self.bias = emb_dim, vocab_size, n_predict, bias
        self.layers = nn.ModuleList(nn.Linear(emb_dim + bias, vocab_size, bias=False) for _ in range(n_predict))

    @classmethod
    def build(cls, settings, base_model, corpus=None):
        return cls(base_model.width, base_model.vocab_size, settings.n_predict, settings.bias)

    def start(self, hidden):
        return torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=-1) if self.bias else hidden

    def advance(self, state, tokens, head):
        return state

    def output(self, state, head):
        return state, self.layers[head].weight

    def saved_config(self):
        return {
            "model_type": self.model_type, "architectures": [self.architecture], "emb_dim": self.emb_dim, "vocab_size": self.vocab_size,
            "n_predict": self.n_predict, "bias": self.bias,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config):
        return cls(**cls.sizes.model_validate(config).model_dump())


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setitem(FAMILIES, LinearHeads.name, LinearHeads)


def command(script, work, *words, **more):
    main(script.Arguments, work, words=list(words), **more)


def test_a_family_of_one_file_plans_trains_validates_exports_reloads_evaluates_and_decodes(
    linear, tmp_path, config_file, model_dir, data_dir, capsys
):
    config_file("linear", **{"speculator.bias": True})
    run, places = [f"--config={tmp_path / 'run.yaml'}", f"--out_dir={tmp_path / 'run'}"], [f"--base_model={model_dir}"]
    settings = ["speculator.bias=true", "optimizer.lr=0.03", "schedule.steps=70"]
    command(scripts.train, scripts.train.run, *run, "--plan", "--device=h100", *settings, overrides=True)
    assert "fits" in capsys.readouterr().out and not (tmp_path / "run").exists()

    command(scripts.train, scripts.train.run, *run, *settings, overrides=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["phase1/loss"] for line in lines if "phase1/loss" in line]
    assert losses[-1] < 0.9 * losses[0] and any("validation/acceptance_at_3" in line for line in lines)
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["speculator"] == {"family": "linear", "n_predict": 3, "bias": True}

    command(scripts.export, scripts.export.run, f"--checkpoint={tmp_path / 'run'}", f"--out_dir={tmp_path / 'speculator'}")
    loaded = load_speculator(tmp_path / "speculator", FrozenModel(str(model_dir), dtype="float32", device="cpu"))
    assert isinstance(loaded, LinearHeads) and loaded.bias
    places.append(f"--speculator={tmp_path / 'speculator'}")
    capsys.readouterr()

    report = tmp_path / "report.json"
    flags = [f"--prompts={data_dir}", "--max_new_tokens=24", "--nodes=5", "--lookahead=3", "--dtype=float32", f"--out={report}"]
    command(scripts.evaluate, scripts.evaluate.evaluate, *places, *flags)
    assert json.loads(report.read_text())["lossless"] is True
    capsys.readouterr()

    words = ["--prompt=w1 w2 w3", "--dtype=float32", "--max_new_tokens=20"]
    command(scripts.decode, scripts.decode.stream, *places, *words, "--top_k_per_head=2,2,1", "--compare")
    said = capsys.readouterr().out
    assert "acceptance length" in said and "speed-up" in said


def test_the_settings_of_one_family_are_no_other_ones(linear, config_file):
    with pytest.raises(UserError, match="unknown key speculator.width, known: family, n_predict, init_from, bias"):
        config_file("linear", **{"speculator.width": 8})
    with pytest.raises(UserError, match="unknown key speculator.bias, known: family, n_predict, "):
        config_file("mlp", **{"speculator.bias": True})
    with pytest.raises(UserError, match="smooth_l1 needs the hidden_state family: the linear family predicts no hidden states"):
        config_file("linear", **{"phase1.loss.smooth_l1": 0.5})
