"""Continuations are generated once, kept, and read in an order that can be resumed."""

import json
import os

import pyarrow.parquet as pq
import pytest
from continuation_helpers import SETTINGS, Engine, open_store, some_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from data.continuations.batches import Continuations
from data.continuations.supply import Ahead, GroupInline, Inline
from data.continuations.writer import write_shards
from fms_spec.errors import UserError


class Supplied(Continuations):
    """As a run reads them: what a batch needs is had before it is read."""

    def __init__(self, store, supply, batch_size):
        super().__init__(store, batch_size)
        self.supply, self.spent = supply, []

    def __next__(self):
        self.spent += [self.supply.have(*shard) for shard in self.needed(1)]
        return super().__next__()


def store(folder, engine=None, batch_size=3, **changes):
    table = open_store(folder, **changes)
    return Supplied(table, Inline(table, 1, lambda: engine or Engine()), batch_size)


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
    engine = Engine()
    continuations = store(tmp_path, engine, batch_size=4)
    next(continuations)
    assert engine.begun == [0]
    orders = [[next(continuations).row_ids.tolist() for _ in range(5)] for _ in range(3)]
    assert engine.begun == [0, 1, 2]
    assert orders[0] != orders[1] != orders[2]
    again = Engine()
    assert fields_of(next(store(tmp_path, again))) == fields_of(next(store(tmp_path / "other")))
    assert again.begun == []


def test_a_shard_says_how_it_was_made(tmp_path):
    shards = open_store(tmp_path)
    write_shards(shards, Engine(), [0])
    table = pq.read_table(shards.path(0))
    made_by = json.loads(table.schema.metadata[b"made_by"])
    assert made_by["sampling"]["top_k"] == 10 and made_by["seed"] == 0 and made_by["engine"] == "transformers"
    assert set(table.column("finish_reason").to_pylist()) <= {"stop", "length"}
    assert all(b"description" in field.metadata for field in table.schema)


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 12), before=st.integers(0, 12), seed=st.integers(0, 5))
def test_a_resumed_store_continues_exactly(tmp_path_factory, batch_size, before, seed):
    folder, engine = tmp_path_factory.mktemp("resume"), Engine(lambda first: first % 4)  # some are too short to be used
    continuations = store(folder, engine, batch_size=batch_size, seed=seed)
    for _ in range(before):
        next(continuations)
    resumed = store(folder, engine, batch_size=batch_size, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(continuations.state_dict())))
    for _ in range(4):
        batch = next(resumed)
        assert fields_of(batch) == fields_of(next(continuations))
        assert len(batch.tokens) == batch_size


def test_continuations_too_short_to_teach_are_dropped(tmp_path):
    batch = next(store(tmp_path, Engine(lambda first: first // 3), batch_size=8))  # prompt i is continued by i tokens
    assert sorted(batch.row_ids.tolist()) == list(range(102, 110))


def test_a_base_model_that_never_says_anything_is_reported(tmp_path):
    with pytest.raises(UserError, match="stopped at once after every prompt"):
        next(store(tmp_path, Engine(lambda first: 0)))


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
    continuations = store(tmp_path)
    path = continuations.store.path(0)
    next(continuations)
    os.truncate(path, 200)
    continuations.load_state_dict(continuations.state_dict() | {"epoch": 1})
    for read in (lambda: store(tmp_path), lambda: [next(continuations) for _ in range(5)]):
        with pytest.raises(UserError, match="continuations-00000.parquet: cannot be read.* delete it"):
            read()
    path.unlink()
    assert len(next(store(tmp_path)).tokens) == 3


def test_a_flipped_byte_of_a_shard_is_noticed_or_changes_nothing(tmp_path):
    shards = open_store(tmp_path)
    write_shards(shards, Engine(), [0])
    whole, path = shards.path(0).read_bytes(), shards.path(0)
    rows = [[part if isinstance(part, int) else part.tolist() for part in row] for row in shards.read(0)]
    noticed = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert [[part if isinstance(part, int) else part.tolist() for part in row] for row in shards.read(0)] == rows
        except UserError as error:
            assert "continuations-00000.parquet: " in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 100


def test_a_shard_of_other_prompts_is_refused_and_one_from_before_there_were_checksums_is_read(tmp_path):
    shards = open_store(tmp_path)
    write_shards(shards, Engine(), [0, 1])
    table = pq.read_table(shards.path(0))
    before = len(shards.read(0))
    pq.write_table(table.replace_schema_metadata({"made_by": table.schema.metadata[b"made_by"]}), shards.path(0))
    assert len(shards.read(0)) == before
    shards.path(1).rename(shards.path(0))
    with pytest.raises(UserError, match="continuations-00000.parquet: holds other prompts than shard 0 of these; delete it"):
        shards.read(0)
    shards.path(0).unlink()
    shards.path(0).mkdir()
    with pytest.raises(UserError, match="continuations-00000.parquet: cannot be read"):
        open_store(tmp_path)


def test_a_group_that_reads_more_than_was_said_decodes_it_with_the_runs_base_model(tmp_path):
    class LeadingEngine(Engine):
        leads, model = True, None

        def use(self, base_model):
            self.model = base_model

        def dismiss(self):
            pass

    table, engine = open_store(tmp_path), LeadingEngine()
    write_shards(table, Engine(), [0])
    supply = GroupInline(Inline(table, 4, lambda: engine), engine)
    supply.begin("the model", 0)
    assert supply.have(0, 1) == {} and supply.have(1, 2)["generation"] > 0
    assert engine.model == "the model" and table.has(1)


def test_any_seed_that_is_a_date_or_more_is_taken_and_others_are_refused(tmp_path):
    for seed in (20261126, 2**63 - 1):
        assert len(next(store(tmp_path / str(seed), seed=seed)).tokens) == 3
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match=f"seed {seed}: a seed must be from 0 to"):
            open_store(tmp_path, seed=seed)


def test_a_position_of_another_shard_size_or_no_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="shard_prompts 4, not 5"):
        store(tmp_path, shard_prompts=5).load_state_dict(store(tmp_path).state_dict())
    with pytest.raises(UserError, match="prompt table is empty"):
        store(tmp_path, prompts=some_prompts(0))


def test_the_seconds_spent_generating_are_counted(tmp_path):
    continuations = store(tmp_path, Engine(seconds=0.05))
    next(continuations)
    (spent,) = continuations.spent
    assert 0.05 <= spent["generation"] < 5 and spent["waiting"] == 0


def test_an_engine_is_made_before_the_run_if_a_shard_that_it_reads_is_missing_and_closed_with_it(tmp_path):
    table, made = open_store(tmp_path), []
    make_engine = lambda: made.append(Engine()) or made[-1]  # noqa: E731
    write_shards(table, Engine(), [0])
    supply = Inline(table, 4, make_engine)
    supply.have(0, 1)
    assert not made
    supply.have(1, 2)  # more than was said
    supply.close()
    assert len(made) == 1 and made[0].closed
    Inline(table, 9, make_engine)
    assert len(made) == 2
    with pytest.raises(UserError, match="1 shards .* are missing; run this"):
        Ahead(table, 9, "this")
    Ahead(table, 8, "this").have(1, 2)
