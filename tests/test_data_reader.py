"""Reading a prepared folder: order, resuming, and damage."""

import json
import os

import pytest
import torch
from data_helpers import EOS, distinct_documents, prepare_small, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import data.parquet
from data.reader import RowReader, check_tokenizer, read_manifest, read_prompts, read_token_counts
from fms_spec.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """52 rows in shards of 10, written in row groups of 3."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data.parquet, "SHARD_BYTES", 10 * 16 * 4)
        patched.setattr(data.parquet, "GROUP_BYTES", 3 * 16 * 4)
        return prepare_small(tmp_path_factory.mktemp("reader"), held_out=2, documents=distinct_documents(42, 20))


def fields_of(batch):
    return [batch.tokens.tolist(), batch.segment_ids.tolist(), batch.first_states.tolist(), batch.row_ids.tolist()]


def test_an_epoch_gives_every_row_once_in_an_order_that_changes(prepared):
    reader = RowReader(prepared, batch_size=len(RowReader(prepared, batch_size=1, seed=0)), seed=0)
    first, second = next(reader).row_ids.tolist(), next(reader).row_ids.tolist()
    assert len(reader) == 52 and reader.seq_length == 16
    assert sorted(first) == sorted(second) == list(range(52))
    assert first != second and first != list(range(52))
    assert next(RowReader(prepared, batch_size=52, seed=1)).row_ids.tolist() != first


def test_batches_have_the_promised_shapes_and_segments_follow_the_documents(prepared):
    batch = next(RowReader(prepared, batch_size=7, seed=0))
    assert batch.tokens.shape == batch.segment_ids.shape == (7, 16)
    assert (batch.tokens.dtype, batch.segment_ids.dtype) == (torch.int64, torch.int32)
    assert batch.first_states.tolist() == [0] * 7 and batch.row_ids.dtype == torch.int64
    for tokens, segments in zip(batch.tokens, batch.segment_ids):
        ends = (tokens == EOS).int()
        assert segments.tolist() == (ends.cumsum(0) - ends).tolist()  # a document ends with its end-of-text token


def test_the_longest_document_of_the_rows_is_found(prepared):
    reader = RowReader(prepared, batch_size=52, seed=0)
    segments = next(reader).segment_ids
    assert reader.longest_document() == max(int(row.bincount().max()) for row in segments)


def test_a_row_keeps_its_number_across_epochs_and_seeds(prepared):
    rows = {}
    for seed in range(3):
        batch = next(RowReader(prepared, batch_size=104, seed=seed))
        for number, tokens in zip(batch.row_ids.tolist(), batch.tokens.tolist()):
            assert rows.setdefault(number, tokens) == tokens


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 60), before=st.integers(0, 12), seed=st.integers(0, 5))
def test_a_resumed_reader_continues_exactly(prepared, batch_size, before, seed):
    reader = RowReader(prepared, batch_size=batch_size, seed=seed)
    for _ in range(before):
        next(reader)
    resumed = RowReader(prepared, batch_size=batch_size, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(reader.state_dict())))
    for _ in range(4):
        assert fields_of(next(resumed)) == fields_of(next(reader))


def test_a_position_of_another_seed_or_table_is_refused(prepared):
    state = RowReader(prepared, batch_size=1, seed=0).state_dict()
    with pytest.raises(UserError, match="seed 0, not 1"):
        RowReader(prepared, batch_size=1, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="rows 52, not"):
        RowReader(prepared, "held_out", batch_size=1, seed=0).load_state_dict(state)


def test_a_half_written_folder_is_refused(tmp_path):
    for read in (lambda folder: RowReader(folder, batch_size=1, seed=0), read_prompts, read_token_counts, read_manifest):
        with pytest.raises(UserError, match="half-written or not prepared; run scripts.prepare_data"):
            read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"inputs": {"format_version": 0}}')
    with pytest.raises(UserError, match="format version 0"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"inputs"')
    with pytest.raises(UserError, match="manifest.json: can't be read.*run scripts.prepare_data again"):
        read_manifest(tmp_path)


def test_a_split_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no table rows-held_out .*--held_out=N"):
        RowReader(prepare_small(tmp_path), "held_out", batch_size=1, seed=0)
    with pytest.raises(UserError, match="rows-held_out has no rows"):
        RowReader(prepare_small(tmp_path, out="few", seq_length=64, held_out=1), "held_out", batch_size=1, seed=0)


def test_a_shard_cut_short_is_refused_when_the_folder_is_opened(tmp_path):
    out = prepare_small(tmp_path)
    os.truncate(out / "rows-train-00000.parquet", 100)
    with pytest.raises(UserError, match="rows-train-00000.parquet: 100 bytes where the manifest says .*cut short"):
        RowReader(out, batch_size=1, seed=0)
    os.unlink(out / "rows-train-00000.parquet")
    with pytest.raises(UserError, match="rows-train-00000.parquet: missing"):
        RowReader(out, batch_size=1, seed=0)


@pytest.mark.parametrize("name", ["rows-train", "prompts-train", "token_counts"])
def test_an_altered_shard_is_refused_when_it_is_read(tmp_path, name):
    out = prepare_small(tmp_path)
    path = next(out.glob(f"{name}*"))
    contents = bytearray(path.read_bytes())
    contents[20] ^= 1
    path.write_bytes(contents)
    read = {"rows-train": lambda: next(RowReader(out, batch_size=1, seed=0)), "prompts-train": lambda: read_prompts(out)}
    with pytest.raises(UserError, match=f"{path.name}: altered since it was prepared"):
        read.get(name, lambda: read_token_counts(out))()


SHARD = ("tables", "rows-train", "shards", 0)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("tables",), None), (("tables",), []), (("inputs",), []), (("tokenizer",), None), (("tables", "rows-train"), []),
        ((*SHARD, "sha256"), None), ((*SHARD, "rows"), 20), ((*SHARD, "rows"), -1), ((*SHARD, "rows"), "42"), ((*SHARD, "bytes"), 1.5),
        (("tables", "rows-train", "rows"), 10**12), (("inputs", "seq_length"), "16"), (("inputs", "seq_length"), 0),
        (("tables", "rows-train", "tokens"), None),
        ((*SHARD, "file"), "../rows-train-00000.parquet"), ((*SHARD, "file"), "/rows-train-00000.parquet"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_or_with_names_that_lead_out_of_the_folder_is_refused_naming_the_place(tmp_path, place, value):
    out = prepare_small(tmp_path)
    manifest = read_manifest(out)
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json: (tables|inputs|tokenizer|format).*run scripts.prepare_data again") as caught:
        RowReader(out, batch_size=1, seed=0)
    assert "\n" not in str(caught.value)


def test_sizes_of_the_manifest_that_the_shards_do_not_have_are_refused_before_memory_is_taken_by_them(tmp_path):
    out = prepare_small(tmp_path)
    manifest = read_manifest(out)
    for rows, length in ((10**12, 16), (manifest["tables"]["rows-train"]["rows"], 10**12)):
        table = manifest["tables"]["rows-train"]
        table["rows"] = table["shards"][0]["rows"] = rows
        manifest["inputs"]["seq_length"] = length
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="rows-train-00000.parquet: holds 52 rows of .* the manifest says"):
            RowReader(out, batch_size=1, seed=0)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'"inputs"', b'{"inputs": 3}', b"\xff", b"[" * 100_000, None])
def test_a_manifest_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="manifest.json: .*run scripts.prepare_data again"):
        read_manifest(tmp_path)


def test_any_seed_that_is_a_date_or_more_reads_and_others_are_refused(prepared):
    for seed in (20261126, 2**63 - 1):
        assert len(next(RowReader(prepared, batch_size=3, seed=seed)).row_ids) == 3
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match=f"seed {seed}: a seed must be from 0 to"):
            RowReader(prepared, batch_size=3, seed=seed)


def test_token_counts_are_those_of_the_train_rows(prepared):
    tokens = next(RowReader(prepared, batch_size=52, seed=0)).tokens
    assert read_token_counts(prepared).tolist() == torch.bincount(tokens.flatten(), minlength=52).tolist()


def test_only_the_tokenizer_the_data_was_prepared_with_is_accepted(prepared, tmp_path):
    manifest = read_manifest(prepared)
    check_tokenizer(manifest, write_tokenizer(tmp_path / "same"))
    other = write_tokenizer(tmp_path / "other", words=[f"w{49 - number}" for number in range(50)])
    with pytest.raises(UserError, match=f"the data was prepared with tokenizer .* {other} has another"):
        check_tokenizer(manifest, other)


def test_a_reader_of_some_rows_reads_the_same_ones_in_every_epoch(prepared):
    whole = len(RowReader(prepared, batch_size=1, seed=3))
    reader = RowReader(prepared, batch_size=1, seed=3, rows=whole - 2)
    epochs = [{int(next(reader).row_ids) for _ in range(len(reader))} for _ in range(3)]
    assert len(reader) == whole - 2 == len(epochs[0]) and epochs[0] == epochs[1] == epochs[2]
    with pytest.raises(UserError, match="ask for fewer"):
        RowReader(prepared, batch_size=1, seed=3, rows=whole + 1)


def test_some_rows_come_from_all_over_the_table(prepared):
    whole, drawn = next(RowReader(prepared, batch_size=52, seed=0)), set()
    tokens_of = dict(zip(whole.row_ids.tolist(), whole.tokens.tolist()))
    for seed in range(20):
        batch = next(RowReader(prepared, batch_size=2, seed=seed, rows=2))
        assert [tokens_of[row] for row in batch.row_ids.tolist()] == batch.tokens.tolist()
        drawn.update(batch.row_ids.tolist())
    assert len(drawn) > 20  # of 52 in 6 shards, two at a time


def test_only_so_many_prompts_are_read_and_not_more_than_there_are(prepared):
    whole = read_prompts(prepared)
    some = read_prompts(prepared, limit=5)
    assert (
        len(some) == 5
        and all(map(torch.equal, some.tokens, whole.tokens[:5]))
        and some.ids.equal(whole.ids[:5])
        and some.sources == whole.sources[:5]
    )
    with pytest.raises(UserError, match="ask for fewer"):
        read_prompts(prepared, limit=len(whole) + 1)
