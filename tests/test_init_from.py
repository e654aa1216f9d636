"""A run that goes on from heads that are there: exported ones, or published ones in a layout that is read."""

import json
import os
import shutil

import forked
import pytest
import torch
from test_checkpoint import killed_in_the_sixth_step
from test_plan import ENVIRONMENT

from fms_spec.errors import UserError
from fms_spec.speculators.directory import describe, read_speculator, read_speculator_config, save_speculator
from fms_spec.speculators.medusa import MedusaSpeculator
from pipelines.export import export
from pipelines.train.planned import plan_of
from pipelines.train.run import train


@pytest.fixture
def exported(tmp_path, config_file):
    """A function of a family that trains and exports it, and returns the directory."""

    def make(family):
        train(config_file(family), tmp_path / "first")
        export(tmp_path / "first", tmp_path / "heads")
        return tmp_path / "heads"

    return make


def copied(speculator):
    return {key: value.detach().clone() for key, value in speculator.published_state().items()}


@pytest.mark.parametrize("family", ["hidden_state", "mlp", "eagle3"])
def test_a_run_begins_with_the_weights_it_is_given_and_is_resumed_without_them(tmp_path, config_file, exported, family):
    heads, begun = exported(family), {}
    config = config_file(family, seed=7, **{"speculator.init_from": heads})
    train(config, tmp_path / "run", before=lambda trainer: begun.update(copied(trainer.speculator)))
    given = read_speculator(heads, read_speculator_config(heads)).published_state()
    assert begun.keys() == given.keys() and all(torch.equal(begun[key], value) for key, value in given.items())
    shutil.rmtree(heads)
    words = ("--config=run.yaml", "--plan", "--device=h100", f"speculator.init_from={heads}")
    planned = [forked.run("scripts.train", f"--out_dir={out_dir}", *words, cwd=tmp_path, env=ENVIRONMENT) for out_dir in ("run", "new")]
    assert [each.returncode for each in planned] == [0, 1] and f"speculator {heads}: no such directory" in planned[1].stderr
    ended = train(config, tmp_path / "run", resume=True).speculator
    assert any(not torch.equal(value, begun[key]) for key, value in copied(ended).items())


def killed(config, out_dir, monkeypatch):
    """A run that is killed and gone on with to its end: its `Trainer`."""
    with killed_in_the_sixth_step(monkeypatch):
        train(config, out_dir)
    return train(config, out_dir, resume=True)


@pytest.mark.parametrize("family", ["hidden_state", "eagle3"])
def test_a_run_from_heads_of_another_draft_vocabulary_is_resumed_to_the_same_bits(tmp_path, config_file, monkeypatch, family):
    first = train(config_file(family), tmp_path / "first").speculator.draft_ids
    export(tmp_path / "first", tmp_path / "heads", draft_vocab_size=40)
    config = config_file(family, seed=7, **{"speculator.init_from": tmp_path / "heads", "speculator.draft_vocab_size": 40})
    whole, resumed = train(config, tmp_path / "whole").speculator, killed(config, tmp_path / "killed", monkeypatch).speculator
    own = train(config_file(family, **{"speculator.draft_vocab_size": 40}), tmp_path / "own").speculator.draft_ids
    assert set(whole.draft_ids.tolist()) < set(first.tolist()) and not torch.equal(whole.draft_ids, own)
    assert all(torch.equal(value, copied(whole)[key]) for key, value in copied(resumed).items())


ROPE = {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
PUBLISHED = {"rms_norm_eps": 1e-3, "norm_before_residual": True, **ROPE}


def test_what_no_setting_says_of_published_heads_is_kept_by_a_run_and_when_it_is_resumed(tmp_path, config_file, exported, monkeypatch):
    file = exported("eagle3") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PUBLISHED))
    config = config_file("eagle3", **{"speculator.init_from": tmp_path / "heads"})
    resumed = killed(config, tmp_path / "run", monkeypatch).speculator
    assert PUBLISHED.items() <= resumed.saved_config().items()
    whole = train(config, tmp_path / "whole").speculator
    assert all(torch.equal(value, copied(whole)[key]) for key, value in copied(resumed).items())


def test_heads_without_the_biases_that_ours_have_are_gone_on_from(tmp_path, config_file, base_model):
    heads = MedusaSpeculator(base_model.width, base_model.vocab_size, 3, bias=False)
    save_speculator(tmp_path / "heads", heads, describe(heads, base_model))
    trained = train(config_file("medusa", **{"speculator.init_from": tmp_path / "heads"}), tmp_path / "run").speculator
    assert trained.bias is False and copied(trained).keys() == heads.published_state().keys()


def test_heads_whose_weights_hang_on_how_many_there_are_are_refused_another_number(tmp_path, config_file, exported):
    with pytest.raises(UserError, match="its n_predict is 3, and the config's speculator section makes 4"):
        train(config_file("mlp", **{"speculator.init_from": exported("mlp"), "speculator.n_predict": 4}), tmp_path / "run")


def test_a_tilde_is_ones_own_folder_before_heads_too(config_file):
    assert config_file(**{"speculator.init_from": "~/heads"}).speculator.init_from == os.path.expanduser("~/heads")


def test_heads_that_do_not_fit_are_refused_in_one_line_by_a_run_and_its_plan_before_anything_is_loaded(
    tmp_path, config_file, exported, monkeypatch, other_model_dir
):
    heads = exported("hidden_state")
    monkeypatch.setattr("pipelines.train.run.load_base_model", lambda *_: pytest.fail("the base model was loaded"))
    wrong = [
        ("mlp", {}, "a hidden_state_speculator, and speculator.family is mlp"),
        ("hidden_state", {"speculator.width": 32}, "its width is 16, and the config's speculator section makes 32"),
        ("hidden_state", {"base_model.name": other_model_dir}, "was trained for .*, not for"),
        ("hidden_state", {"speculator.init_from": tmp_path / "none"}, "none"),
    ]
    for family, changes, message in wrong:
        config = config_file(family, **{"speculator.init_from": heads} | changes)
        with pytest.raises(UserError, match=message) as error:
            train(config, tmp_path / "run")
        with pytest.raises(UserError, match=message) as planned:
            plan_of(config, device="h100")
        assert "\n" not in str(error.value) and str(planned.value) == str(error.value)
