"""What scripts.prepare_data promises about its output."""

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import EOS, WORDS, as_text, distinct_documents, pieces_of, prepare_small, rows_of, write_corpus, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import data.parquet
import data.prepare.encoding
import data.prepare.sources
import data.tokenizer
import scripts.prepare_data
from data.continuations.shard import lists_of
from data.prepare.documents import pack
from data.prepare.run import prepare
from data.reader import read_manifest, read_prompts, read_token_counts
from fms_spec.errors import UserError
from pipelines.cli import main


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without_names(folder):
    contents = bytes_of(folder)
    manifest = json.loads(contents.pop("manifest.json"))
    manifest["source"].pop("name")
    return contents, manifest


documents_of_tokens = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=30), min_size=1, max_size=12)


@given(documents_of_tokens, st.integers(2, 9))
def test_packing_keeps_every_token_in_order_and_starts_mark_the_documents(documents, seq_length):
    rows = list(pack(map(as_text, documents), seq_length, []))
    flat = [token for document in documents for token in document]
    kept = len(flat) // seq_length * seq_length
    assert [token for row in rows for token in row.tokens.tolist()] == flat[:kept]
    assert all(row.own.all() for row in rows)
    begins = {0}
    for document in documents:
        begins.add(max(begins) + len(document))
    expected = [[at for at in range(seq_length) if at == 0 or row * seq_length + at in begins] for row in range(len(rows))]
    assert [row.starts for row in rows] == expected


@settings(max_examples=15, deadline=None)
@given(documents=documents_of_tokens, seed=st.integers(0, 3))
def test_each_document_is_found_whole_in_the_rows_with_its_end_of_text_token(documents, seed):
    with tempfile.TemporaryDirectory() as folder:
        one_row = sum(len(document) + 1 for document in documents)
        out = prepare_small(Path(folder), documents, seq_length=one_row, prompt_length=1, seed=seed)
        assert sorted(pieces_of(rows_of(out))) == sorted([*document, EOS] for document in documents)


def test_the_same_input_and_seed_give_the_same_bytes_and_another_seed_another_order(tmp_path):
    first = prepare_small(tmp_path, held_out=3)
    again = prepare_small(tmp_path, held_out=3, out="again", workers=1)
    other = prepare_small(tmp_path, held_out=3, out="other", seed=1)
    assert bytes_of(first) == bytes_of(again)
    assert rows_of(first) != rows_of(other)


def test_the_source_may_lie_anywhere(tmp_path):
    here, there = prepare_small(tmp_path / "here"), prepare_small(tmp_path / "there")
    for ours, theirs in zip(without_names(here)[0].items(), without_names(there)[0].items()):
        assert ours == theirs
    assert read_manifest(here)["inputs"] == read_manifest(there)["inputs"]


def test_counts_in_the_manifest_add_up(tmp_path):
    out = prepare_small(tmp_path, held_out=3)
    manifest = read_manifest(out)
    assert manifest["source"]["documents_read"] == 40
    assert manifest["source"]["tokens_read"] == 40 * 21
    for split, documents in dict(train=37, held_out=3).items():
        table = manifest["tables"][f"rows-{split}"]
        assert table["documents"] == documents
        assert table["tokens"] == 16 * table["rows"] == 16 * len(rows_of(out, split))
        assert table["tokens"] + table["dropped_tail_tokens"] == 21 * documents
    assert read_token_counts(out).sum() == manifest["tables"]["rows-train"]["tokens"]
    assert len(read_token_counts(out)) == manifest["tokenizer"]["vocab_size"] == 52


def test_held_out_documents_and_their_copies_appear_nowhere_in_train(tmp_path):
    documents = distinct_documents(40, 15)  # 16 with the end-of-text token: one document is one row
    out = prepare_small(tmp_path, [*documents, *documents[:20]], held_out=30)
    held_out = {tuple(tokens) for tokens, _ in rows_of(out, "held_out")}
    train = {tuple(tokens) for tokens, _ in rows_of(out)}
    assert len(held_out) == 30 and len(train) == 10
    assert not held_out & train
    assert not set(read_prompts(out, "held_out").sources) & set(read_prompts(out).sources)


def test_prompts_are_pieces_of_their_document_without_its_end(tmp_path):
    documents = [[*range(10)], [1, 2, 3], [*range(20, 50)]]
    prompts = read_prompts(prepare_small(tmp_path, documents, seq_length=8))
    assert prompts.ids.tolist() == [0, 1] and sorted(prompts.sources) == ["0000.txt", "0002.txt"]
    for tokens, source in zip(lists_of(prompts.tokens), prompts.sources):
        assert tokens == list(range(tokens[0], tokens[0] + 4))
        assert (tokens[0] < 10) == (source == "0000.txt")


def test_a_held_out_table_may_have_no_rows_but_exists(tmp_path):
    out = prepare_small(tmp_path, held_out=1, seq_length=64)
    assert rows_of(out, "held_out") == []
    assert len(read_prompts(out, "held_out")) == 1


def test_large_tables_are_cut_into_shards(tmp_path, monkeypatch):
    whole = prepare_small(tmp_path)
    monkeypatch.setattr(data.parquet, "SHARD_BYTES", 10 * 16 * 4)
    monkeypatch.setattr(data.parquet, "GROUP_BYTES", 3 * 16 * 4)
    cut = prepare_small(tmp_path, out="cut")
    shards = read_manifest(cut)["tables"]["rows-train"]["shards"]
    assert [shard["rows"] for shard in shards] == [10, 10, 10, 10, 10, 2]
    assert rows_of(cut) == rows_of(whole)


def test_max_tokens_bounds_the_rows_and_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare.encoding, "BATCH_DOCUMENTS", 1)
    out = prepare_small(tmp_path, max_tokens=100, held_out=2)
    manifest = read_manifest(out)
    assert manifest["tables"]["rows-train"]["tokens"] == 96
    assert manifest["source"]["documents_read"] == 7  # five for 100 tokens, two that may be held out


def test_every_column_says_what_it_holds(tmp_path):
    out = prepare_small(tmp_path)
    for path in out.glob("*.parquet"):
        schema = pq.read_schema(path)
        assert {b"seq_length", b"tokenizer_sha256", b"seed", b"description"} <= schema.metadata.keys()
        assert all({b"description", b"unit"} <= field.metadata.keys() for field in schema)
    assert pq.read_schema(out / "rows-train-00000.parquet").field("tokens").type == pa.list_(pa.int32(), 16)


def test_long_documents_are_encoded_in_pieces_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data.tokenizer, "PIECE_CHARACTERS", 7)
    text = "w1 w2\nw3\nw4 w5 w6\nw7\n"
    assert "".join(data.tokenizer.cut(text)) == text
    tokenizer = data.tokenizer.load_tokenizer(write_tokenizer(tmp_path))
    assert [tokens.tolist() for tokens in tokenizer.encode(["w1\nw2\nw3\nw4\n", ""])] == [[1, 2, 3, 4], []]


def test_a_truncation_length_in_the_tokenizer_cuts_no_document(tmp_path):
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    plain = data.tokenizer.load_tokenizer(str(folder)).sha256
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    cutting = data.tokenizer.load_tokenizer(str(folder))
    assert len(cutting.encode(["w1 w2 w3 w4"])[0]) == 4
    assert cutting.sha256 == plain


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_of_a_file_are_documents(tmp_path, kind):
    texts = ["w1 w2 w3 w4", "", "w5 w6", None, "w7 w8 w9 w10"]
    path = tmp_path / f"corpus.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"body": texts, "other": range(5)}), path)
    else:
        lines = "\n".join(json.dumps({"body": text, "other": 1}) for text in texts)
        (gzip.open if kind == "jsonl.gz" else open)(path, "wt").write(lines + "\n\n")
    out = tmp_path / "out"
    manifest = prepare(
        source=str(path),
        tokenizer=write_tokenizer(tmp_path / "t"),
        out_dir=str(out),
        text_column="body",
        seq_length=13,
        prompt_length=4,
    )
    assert sorted(pieces_of(rows_of(out))) == [[1, 2, 3, 4, EOS], [5, 6, EOS], [7, 8, 9, 10, EOS]]
    assert manifest["source"]["skipped"] == {"empty": 2}
    assert sorted(read_prompts(out).sources) == [f"corpus.{kind}#0", f"corpus.{kind}#4"]


def test_a_hub_dataset_is_packed_in_stream_order_and_read_no_further_than_needed(tmp_path, monkeypatch):
    import datasets

    class Builder:
        hash = "commit"

        def as_streaming_dataset(self, split):
            assert split == "validation"
            return iter({"text": f"{WORDS[number]} w0 w0"} for number in range(50))

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder() if (name, config) == ("a/b", "c") else None)
    monkeypatch.setattr(data.prepare.encoding, "BATCH_DOCUMENTS", 4)
    out = tmp_path / "out"
    prepare(
        source="a/b:c:validation",
        tokenizer=write_tokenizer(tmp_path / "t"),
        out_dir=str(out),
        seq_length=4,
        prompt_length=2,
        max_tokens=12,
    )
    assert rows_of(out) == [([0, 0, 0, EOS], [0]), ([1, 0, 0, EOS], [0]), ([2, 0, 0, EOS], [0])]
    assert read_prompts(out).sources == ["a/b#0", "a/b#1", "a/b#2"]


def test_the_command_prepares_a_glob_and_says_what_it_skipped(tmp_path, monkeypatch, capsys):
    source = write_corpus(tmp_path / "corpus", distinct_documents(5, 20))
    (tmp_path / "corpus" / "z.txt").write_bytes(b"\xff\xfe")
    arguments = [f"--source={source}/*.txt", f"--tokenizer={write_tokenizer(tmp_path / 't')}", f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["prepare_data", *arguments, "--seq_length=16", "--prompt_length=4"])
    main(scripts.prepare_data.Arguments, lambda parsed: prepare(**vars(parsed)))
    captured = capsys.readouterr()
    assert "rows-train 6 (5 documents)" in captured.out
    assert "skipped 1 documents (1 not UTF-8), the first is z.txt" in captured.err


def test_hidden_files_are_no_documents(tmp_path):
    write_corpus(tmp_path / "corpus" / ".git", distinct_documents(3, 20))
    assert read_manifest(prepare_small(tmp_path))["source"]["documents_read"] == 40


def test_text_that_utf8_cannot_spell_is_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w1 \\ud800 w2"}\n')
    tokenizer = write_tokenizer(tmp_path / "t")
    manifest = prepare(source=str(tmp_path / "a.jsonl"), tokenizer=tokenizer, out_dir=str(tmp_path / "out"), seq_length=4, prompt_length=3)
    assert manifest["source"]["documents_read"] == 1 and manifest["source"]["skipped"] == {"not UTF-8": 1}


def test_a_source_and_its_files_may_have_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_corpus(folder / "texts", distinct_documents(3, 20))
    (folder / os.fsdecode(b"\xe9.jsonl")).write_text('{"text": "w1 w2 w3 w4"}\n{"text": 1}\n')
    settings = {"tokenizer": write_tokenizer(tmp_path / "t"), "seq_length": 4, "prompt_length": 3}
    prepare(source=str(folder / "texts"), out_dir=str(tmp_path / "texts"), **settings)
    assert read_manifest(tmp_path / "texts")["source"]["name"] == f"{tmp_path}/caf\ufffd/texts"
    prepare(source=f"{folder}/*.jsonl", out_dir=str(tmp_path / "rows"), on_bad_row="skip", **settings)
    first = read_manifest(tmp_path / "rows")["source"]["firsts"]["unreadable"]
    assert first.startswith(f"\ufffd.jsonl#1 (unreadable: {tmp_path}/caf\ufffd/\ufffd.jsonl:2: column 'text' holds int")


def test_an_interrupted_run_leaves_nothing_and_a_killed_one_is_written_over(tmp_path, monkeypatch):
    whole = prepare_small(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("data.prepare.tables.write_token_counts", interrupt)
        prepare_small(tmp_path, out="killed")
    assert not (tmp_path / "killed").exists()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("data.prepare.tables.write_token_counts", interrupt)
        patched.setattr("data.prepare.folder.remove_ours", lambda *_, **__: None)  # a kill cleans up nothing
        prepare_small(tmp_path, out="killed")
    assert sorted(os.listdir(tmp_path / "killed")) == [
        "incomplete.json",
        "prompts-train-00000.parquet",
        "rows-train-00000.parquet",
    ]
    with pytest.raises(UserError, match="another seed"):
        prepare_small(tmp_path, out="killed", seed=5)
    assert bytes_of(prepare_small(tmp_path, out="killed")) == bytes_of(whole)
