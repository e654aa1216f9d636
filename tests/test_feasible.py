"""Sizes that the data or the memory can't bear, told from the config alone."""

from dataclasses import replace

import pytest

from fms_spec.errors import UserError
from pipelines.plan.feasible import check_sizes
from pipelines.plan.plan import Sizes

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
