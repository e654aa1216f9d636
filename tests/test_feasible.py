"""Sizes that the data or the memory can't bear, told from the config alone."""

from dataclasses import replace

import pytest
from conftest import write_model

from data.prepare.run import prepare
from fms_spec.errors import UserError
from pipelines.plan.feasible import check_sizes
from pipelines.plan.plan import Sizes
from pipelines.train.planned import plan_of
from pipelines.train.run import read_data, train

SIZES = Sizes(seq_length=64, prompt_length=8, rows=12, prompts=9)


def test_a_run_that_just_fits_is_let_pass(config_file):
    changes = {"phase1.batch_size": 6, "phase2.batch_size": 9, "speculator.n_predict": 11, "validation.max_new_tokens": 237}
    check_sizes(config_file(**changes), SIZES)
    check_sizes(config_file("mlp"), SIZES)
    check_sizes(config_file(**{"speculator.n_predict": 62, "schedule.pattern": "[[phase1, 1]]", "phase2.batch_size": 1000}), SIZES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"phase1.batch_size": 7}, "phase1.batch_size 7 x accumulate 2: a step reads 14 rows, and there are 12"),
        ({"phase1.accumulate": 10**9}, "phase1.batch_size 3 x accumulate 1000000000"),
        ({"phase2.batch_size": 10}, "phase2.batch_size 10 x accumulate 1: a step reads 10 prompts, and there are 9"),
        ({"speculator.n_predict": 12}, "speculator.n_predict 12: the last head finds no token in phase2"),
        ({"speculator.n_predict": 63, "schedule.pattern": "[[phase1, 1]]"}, "n_predict 63: the last head finds no token in phase1"),
        ({"speculator.draft_vocab_size": 97}, "draft_vocab_size 97 is over the base model's vocabulary, 96"),
        ({"validation.max_new_tokens": 246}, "validation.max_new_tokens 246: .*over the context"),
        ({"speculator.inner_dim": 2**20, "speculator.width": 2**20}, "training the heads takes at least 123,149.1 GB .*there are 1.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(config_file, changes, message):
    with pytest.raises(UserError, match=message):
        check_sizes(config_file(**changes), SIZES, memory=1e9)


def test_rows_with_a_document_over_the_context_are_refused_by_a_run_and_its_plan(tmp_path, config_file, monkeypatch):
    monkeypatch.setattr("pipelines.train.run.load_base_model", lambda *_: pytest.fail("the base model was loaded"))
    short, other = {"base_model.name": write_model(tmp_path / "short", max_position_embeddings=48)}, {"schedule.pattern": "[[phase2, 1]]"}
    message = "rows hold a document of 64 tokens, over the context of .*short, 48; prepare it with --seq_length=48 or less"
    with pytest.raises(UserError, match=message):
        train(config_file(**short), tmp_path / "run")
    with pytest.raises(UserError, match=message):
        plan_of(config_file(**short), device="h100")
    read_data(config_file(**short, **other))  # where no row is read
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / f"texts/{number}.txt").write_text("w1 w2 w3 w4 " * 8 + f"w{number}")
    prepare(
        source=str(tmp_path / "texts"), tokenizer=str(tmp_path / "short"), out_dir=str(tmp_path / "data"), seq_length=64, prompt_length=8
    )
    read_data(config_file(**short, **{"data.dir": tmp_path / "data", "validation.prompts": 0}))  # several short ones in a row


def test_validations_own_prompts_may_be_longer_than_those_that_are_continued(config_file):
    with pytest.raises(UserError, match="validation.max_new_tokens 20: with prompts of 234 tokens and 3 heads that is over the context"):
        check_sizes(config_file(), replace(SIZES, held_out_length=234))
    check_sizes(config_file(), replace(SIZES, held_out_length=233))


def test_hidden_states_over_the_memory_are_refused_and_shared_heads_count_in_parts(config_file):
    with pytest.raises(UserError, match="phase1.batch_size or accumulate"):
        check_sizes(config_file(), SIZES, memory=6 * 64 * 32 * 4 - 1)
    weights = {"speculator.inner_dim": 2**16, "speculator.width": 2**10}
    sizes, whole = replace(SIZES, rows=24, prompts=16), 16 * 2 * 3 * 2**26
    with pytest.raises(UserError, match="training the heads"):
        check_sizes(config_file(**weights), sizes, memory=whole, processes=4)
    check_sizes(config_file(**weights, **{"parallel.speculator": "shard"}), sizes, memory=whole, processes=4)
