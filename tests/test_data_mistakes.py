"""Every mistake a user can make when preparing data ends in one line that names it, and writes nothing."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import distinct_documents, prepare_small, write_corpus, write_tokenizer

from data.prepare.run import prepare
from fms_spec.errors import UserError
from fms_spec.files import owned


def refused(tmp_path, source, **settings):
    """The message with which prepare refuses; checks that nothing was written."""
    settings = {"seq_length": 4, "prompt_length": 2, "tokenizer": None, **settings}
    settings["tokenizer"] = settings["tokenizer"] or write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError) as caught:
        prepare(source=str(source), out_dir=str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", distinct_documents(5, 20))


def test_a_missing_source_is_named(tmp_path):
    assert "/nowhere: no such file or folder" in refused(tmp_path, tmp_path / "nowhere")
    assert "nowhere.jsonl: no such file or folder" in refused(tmp_path, "nowhere.jsonl")


def test_a_name_that_is_neither_here_nor_on_the_hub_is_named(tmp_path, monkeypatch):
    import datasets

    def nothing(name, config):
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets, "load_dataset_builder", nothing)
    assert "source neither:here: no such file or folder here, nor a dataset" in refused(tmp_path, "neither:here")
    assert "name:config:split" in refused(tmp_path, "a:b:c:d")


def test_a_glob_that_matches_nothing_is_named(tmp_path, corpus):
    assert "*.md: the pattern matches no file" in refused(tmp_path, f"{corpus}/*.md")


def test_a_folder_without_documents_is_named(tmp_path):
    (tmp_path / "none").mkdir()
    assert "none: the folder holds no files" in refused(tmp_path, tmp_path / "none")
    (tmp_path / "none" / "empty.txt").write_text(" \n")
    (tmp_path / "none" / "binary.txt").write_bytes(b"\x80")
    message = refused(tmp_path, tmp_path / "none")
    assert "no documents" in message and "1 empty, 1 not UTF-8" in message and "the first is" in message
    assert "the first is binary.txt (not UTF-8)" in refused(tmp_path, tmp_path / "none" / "binary.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path, corpus):
    os.chmod(f"{corpus}/0002.txt", 0)
    assert "0002.txt: cannot be read" in refused(tmp_path, corpus)


def test_a_missing_text_column_is_named_with_the_nearest(tmp_path):
    pq.write_table(pa.table({"texts": ["w1"], "url": ["u"]}), tmp_path / "a.parquet")
    message = refused(tmp_path, tmp_path / "a.parquet")
    assert "a.parquet: no column 'text'; did you mean --text_column=texts? It has: texts, url" in message
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n{"body": "w1"}\n')
    assert "a.jsonl:2: no column 'text'; It has: body" in refused(tmp_path, tmp_path / "a.jsonl")


def test_a_text_column_without_text_is_named(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "column 'text' holds int64, not strings" in refused(tmp_path, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": ["w1"]}\n')
    assert "a.jsonl:1: column 'text' holds list" in refused(tmp_path, tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", ['{"text": "w1"', '["w1"]', '{"text": "\\ud8"}', b'{"text": "\xff"}'])
def test_a_malformed_line_is_named_by_file_and_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "w1"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    assert f"{tmp_path}/a.jsonl:3: not " in refused(tmp_path, tmp_path / "a.jsonl")


def test_a_parquet_file_cut_short_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["w1 w2"] * 100}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "a.parquet: cannot be read, it may be cut short" in refused(tmp_path, path)
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])  # the footer is whole, the pages are not
    assert "a.parquet: cannot be read, it may be cut short" in refused(tmp_path, path)


def test_a_compressed_file_cut_short_is_named(tmp_path):
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "w1"}\n' * 1000)[:-10])
    assert "a.jsonl.gz: cannot be read, it may be cut short" in refused(tmp_path, tmp_path / "a.jsonl.gz")


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path, corpus):
    assert "/nothing: no such folder" in refused(tmp_path, corpus, tokenizer=str(tmp_path / "nothing"))
    (tmp_path / "bare").mkdir()
    assert "/bare: cannot be loaded" in refused(tmp_path, corpus, tokenizer=str(tmp_path / "bare"))


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path, corpus):
    assert "no EOS token" in refused(tmp_path, corpus, tokenizer=write_tokenizer(tmp_path / "t", eos=None))


def test_a_corpus_smaller_than_a_row_is_refused_with_the_numbers(tmp_path, corpus):
    assert "only 105 tokens" in refused(tmp_path, corpus, seq_length=106)
    assert "--seq_length=106" in refused(tmp_path, corpus, seq_length=106)
    assert "--max_tokens=3: less than one row" in refused(tmp_path, corpus, max_tokens=3)


def test_more_held_out_documents_than_there_are_is_refused(tmp_path, corpus):
    assert "--held_out=6: only 5 different documents" in refused(tmp_path, corpus, held_out=6)
    assert "--held_out=5: no document is left to train on" in refused(tmp_path, corpus, held_out=5)
    assert "only 0 different documents have the 21 tokens of a prompt" in refused(tmp_path, corpus, held_out=1, prompt_length=21)


@pytest.mark.parametrize(
    "setting", [{"seed": -1}, {"seed": 2**63}, {"seq_length": 1}, {"prompt_length": 0}, {"held_out": -1}, {"workers": 0}]
)
def test_a_setting_out_of_range_is_named(tmp_path, corpus, setting):
    assert f"--{next(iter(setting))}=" in refused(tmp_path, corpus, **setting)


def test_a_folder_inside_the_source_is_refused(tmp_path, corpus):
    with pytest.raises(UserError, match="lies inside the source"):
        prepare(source=corpus, tokenizer=write_tokenizer(tmp_path / "t"), out_dir=f"{corpus}/out")


def test_a_whole_set_is_used_again_when_asked_for_the_same(tmp_path, capsys):
    out = prepare_small(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare_small(tmp_path)
    assert "already holds this set, nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_a_whole_set_of_other_inputs_is_refused_naming_the_setting(tmp_path):
    out = prepare_small(tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"another held_out \(0 there, 2 asked\); give another --out_dir"):
        prepare_small(tmp_path, held_out=2)
    (tmp_path / "corpus" / "new.txt").write_text("w1")
    with pytest.raises(UserError, match="another source"):
        prepare_small(tmp_path)
    (tmp_path / "corpus" / "new.txt").unlink()
    write_tokenizer(tmp_path / "other", words=[f"w{49 - number}" for number in range(50)])
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(source=str(tmp_path / "corpus"), tokenizer=str(tmp_path / "other"), out_dir=str(out), seq_length=16, prompt_length=4)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_whole_set_with_a_damaged_shard_is_not_used_again(tmp_path):
    os.truncate(prepare_small(tmp_path) / "rows-train-00000.parquet", 50)
    with pytest.raises(UserError, match="rows-train-00000.parquet: 50 bytes where the manifest says"):
        prepare_small(tmp_path)


@pytest.mark.parametrize("names", [["notes.txt"], ["incomplete.json", "notes.txt"], ["rows-train-00000.parquet"]])
def test_a_folder_with_other_files_is_refused_and_kept(tmp_path, names):
    (tmp_path / "prepared").mkdir()
    for name in names:
        (tmp_path / "prepared" / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds other files .{names[-1]}"):
        prepare_small(tmp_path)
    assert {path.name: path.read_text() for path in (tmp_path / "prepared").iterdir()} == dict.fromkeys(names, "mine")


def test_an_out_dir_that_is_a_file_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "prepared").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        prepare_small(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        prepare_small(tmp_path, out="prepared/below")
    assert (tmp_path / "prepared").read_text() == "mine"


def test_an_out_dir_that_no_path_leads_to_is_refused_in_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for out in ("loop", "dangling", "loop/below", "x" * 300):
        with pytest.raises(UserError) as caught:
            prepare_small(tmp_path, out=out)
        assert out in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_parquet_files_cannot_have_is_refused_in_one_line(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(UserError, match="prepared: is not UTF-8, as the path of a Parquet file must be; give another --out_dir"):
        prepare_small(tmp_path, out=f"{folder.name}/prepared")
    assert not folder.exists()
    folder.mkdir()
    pq.write_table(pa.table({"text": ["w1"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(folder / "a.parquet")
    assert "a.parquet: its path is not UTF-8, as that of a Parquet file must be; rename it" in refused(tmp_path, folder)


def test_an_empty_folder_may_be_written(tmp_path):
    (tmp_path / "prepared").mkdir()
    assert (prepare_small(tmp_path) / "manifest.json").exists()


def test_what_a_process_left_that_was_killed_in_its_last_moment_is_removed(tmp_path):
    out = prepare_small(tmp_path)
    (out / "incomplete.json").write_text((out / "manifest.json").read_text())
    (out / ".owner").write_text("1\nelsewhere\n")
    prepare_small(tmp_path)
    assert not (out / "incomplete.json").exists() and not (out / ".owner").exists()
    inputs = json.loads((out / "manifest.json").read_text())["inputs"]
    (out / "incomplete.json").write_text(json.dumps(inputs))
    (out / "manifest.json").rename(out / ".manifest.json.123.partial")
    prepare_small(tmp_path)
    assert not [path.name for path in out.iterdir() if "partial" in path.name or "incomplete" in path.name]


def test_two_processes_do_not_write_one_folder(tmp_path):
    manifest = json.loads((prepare_small(tmp_path) / "manifest.json").read_text())
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/incomplete.json").write_text(json.dumps(manifest["inputs"]))
    with owned(tmp_path / "busy"), pytest.raises(UserError, match=f"busy: process {os.getpid()} on .* is writing there"):
        prepare_small(tmp_path, out="busy")
    assert [path.name for path in (tmp_path / "busy").iterdir()] == ["incomplete.json"]
