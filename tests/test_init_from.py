"""A run that goes on from heads that are there: exported ones, or published ones in a layout that is read."""

import shutil

import forked
import pytest
import torch
from test_plan import ENVIRONMENT

from fms_spec.errors import UserError
from fms_spec.speculators.directory import read_speculator, read_speculator_config
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
