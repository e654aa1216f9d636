"""Continuations are generated once, kept, and read in an order that can be resumed."""

import json
import os
import time

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.continuations import Continuations
from data.reader import Prompts
from fms_spec.errors import UserError

SETTINGS = {"base_model": "abc", "engine": "transformers", "sampling": {"temperature": 1.0, "top_k": 10, "stop": (0,)}}


def some_prompts(count=10, length=3):
    return Prompts(
        torch.arange(count * length).reshape(count, length),
        torch.arange(count) + 100,
        [f"file#{number}" for number in range(count)],
    )


class Generate:
    """Stands in for the base model: the first prompt token decides length and contents."""

    def __init__(self, lengths=lambda first: first % 5 + 2):
        self.lengths, self.blocks = lengths, []

    def __call__(self, prompts, block):
        self.blocks.append(block)
        lengths = [self.lengths(int(prompt[0])) for prompt in prompts]
        continuations = [torch.arange(length) + 1000 * int(prompt[0]) for prompt, length in zip(prompts, lengths)]
        return continuations, ["stop" if length < 6 else "length" for length in lengths]


def store(folder, generate=None, **changes):
    arguments = {"shard_prompts": 4, "batch_size": 3, "settings": SETTINGS, "seed": 0, "prompts": some_prompts(), **changes}
    return Continuations(folder, generate=generate or Generate(), **arguments)


def fields_of(batch):
    return [batch.tokens.tolist(), batch.segment_ids.tolist(), batch.first_states.tolist(), batch.row_ids.tolist()]


def test_an_epoch_gives_each_prompt_once_with_its_continuation_and_padding(tmp_path):
    batch = next(store(tmp_path, batch_size=10))
    assert sorted(batch.row_ids.tolist()) == list(range(100, 110))
    assert batch.first_states.tolist() == [2] * 10
    for tokens, segments, row in zip(batch.tokens, batch.segment_ids, batch.row_ids.tolist()):
        first = (row - 100) * 3
        length = 3 + first % 5 + 2
        assert tokens[:length].tolist() == [first, first + 1, first + 2, *range(1000 * first, 1000 * first + length - 3)]
        assert segments.tolist() == [0] * length + [-1] * (len(tokens) - length)


def test_nothing_is_generated_before_it_is_needed_nor_twice(tmp_path):
    generate = Generate()
    continuations = store(tmp_path, generate, batch_size=4)
    next(continuations)
    assert generate.blocks == [0]
    orders = [[next(continuations).row_ids.tolist() for _ in range(5)] for _ in range(3)]
    assert generate.blocks == [0, 1, 2]
    assert orders[0] != orders[1] != orders[2]
    again = Generate()
    assert fields_of(next(store(tmp_path, again))) == fields_of(next(store(tmp_path / "other")))
    assert again.blocks == []


def test_shards_may_be_written_ahead(tmp_path):
    ahead = store(tmp_path)
    assert [ahead.ensure_shard(index) for index in range(ahead.shard_count)] == [True] * 3
    assert not ahead.ensure_shard(1)
    refusing = store(tmp_path, generate=lambda *_: pytest.fail("generated again"))
    for _ in range(8):
        next(refusing)
    assert sorted(os.listdir(tmp_path)) == [f"continuations-{index:05d}.parquet" for index in range(3)]


def test_a_shard_says_how_it_was_made(tmp_path):
    continuations = store(tmp_path)
    continuations.ensure_shard(0)
    table = pq.read_table(continuations.path(0))
    made_by = json.loads(table.schema.metadata[b"made_by"])
    assert made_by["sampling"]["top_k"] == 10 and made_by["seed"] == 0 and made_by["engine"] == "transformers"
    assert set(table.column("finish_reason").to_pylist()) <= {"stop", "length"}
    assert all(b"description" in field.metadata for field in table.schema)


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 12), before=st.integers(0, 12), seed=st.integers(0, 5))
def test_a_resumed_store_continues_exactly(tmp_path_factory, batch_size, before, seed):
    folder, generate = tmp_path_factory.mktemp("resume"), Generate(lambda first: first % 4)  # some are too short to be used
    continuations = store(folder, generate, batch_size=batch_size, seed=seed)
    for _ in range(before):
        next(continuations)
    resumed = store(folder, generate, batch_size=batch_size, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(continuations.state_dict())))
    for _ in range(4):
        batch = next(resumed)
        assert fields_of(batch) == fields_of(next(continuations))
        assert len(batch.tokens) == batch_size


def test_continuations_too_short_to_teach_are_dropped(tmp_path):
    batch = next(store(tmp_path, Generate(lambda first: first // 3), batch_size=8))  # prompt i is continued by i tokens
    assert sorted(batch.row_ids.tolist()) == list(range(102, 110))


def test_a_base_model_that_never_says_anything_is_reported(tmp_path):
    with pytest.raises(UserError, match="stopped at once after every prompt"):
        next(store(tmp_path, Generate(lambda first: 0)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"settings": {**SETTINGS, "sampling": {"temperature": 0.5, "top_k": 10, "stop": (0,)}}},
            r"sampling.temperature \(1.0 there, 0.5 asked",
        ),
        ({"settings": {**SETTINGS, "base_model": "other"}}, "another base_model"),
        ({"seed": 1}, r"another seed \(0 there, 1 asked"),
        ({"shard_prompts": 5}, "another shard_prompts"),
        ({"prompts": some_prompts(11)}, "another prompts_sha256"),
    ],
)
def test_shards_made_with_other_settings_are_refused_naming_the_setting(tmp_path, change, named):
    next(store(tmp_path))
    with pytest.raises(UserError, match=f"continuations-00000.parquet: written with .*{named}"):
        next(store(tmp_path, **change))


def test_a_shard_that_cannot_be_read_is_named_with_the_mend(tmp_path):
    path = store(tmp_path).path(0)
    next(store(tmp_path))
    os.truncate(path, 200)
    with pytest.raises(UserError, match="continuations-00000.parquet: cannot be read.* delete it"):
        next(store(tmp_path))
    path.unlink()
    assert len(next(store(tmp_path)).tokens) == 3


def test_a_failed_generation_leaves_no_file(tmp_path):
    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(store(tmp_path / "out", fail))
    with pytest.raises(ValueError, match="finish reasons"):
        next(store(tmp_path / "out", lambda prompts, block: ([torch.arange(3)] * len(prompts), ["eos"] * len(prompts))))
    assert not (tmp_path / "out").exists()


def test_a_position_of_another_shard_size_or_no_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="shard_prompts 4, not 5"):
        store(tmp_path, shard_prompts=5).load_state_dict(store(tmp_path).state_dict())
    with pytest.raises(UserError, match="prompt table is empty"):
        store(tmp_path, prompts=some_prompts(0))


def test_the_seconds_spent_generating_are_counted(tmp_path):
    def slow(prompts, block):
        time.sleep(0.05)
        return Generate()(prompts, block)

    continuations = store(tmp_path, slow)
    next(continuations)
    assert 0.05 <= continuations.generate_seconds < 5
