"""What of a source becomes a document: files of every kind are read as what they are, or refused or left out by a line that says so."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from data_helpers import write_tokenizer

from data.prepare.rows import Wanted
from data.prepare.run import prepare
from data.prepare.sources import open_source
from fms_spec.errors import UserError
from fms_spec.files import sha256_of

TEXTS = ["w1 w2 w3", "w4 w5 w6", "w7 w8 w9"]


def texts_in(source, text_column="text"):
    """The texts that a source gives, in the order of their labels."""
    opened = open_source(str(source), Wanted(text_column))
    found = [(opened.label(document.file, document.row), document.content) for document in opened.documents(np.random.default_rng(0))]
    return [text for _, text in sorted(found)]


def refused(source, text_column="text"):
    """The one line with which a source is refused."""
    with pytest.raises(UserError) as caught:
        texts_in(source, text_column)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def lines(texts=TEXTS):
    return "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts).encode()


def write_all(folder, **contents):
    """Files of these contents in `folder`; "__" in a name is a dot, "___" a slash."""
    for name, content in contents.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def parquet(column, name="text"):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", lines()),
        ("a.ndjson", lines()),
        ("a.JSONL", lines()),
        ("a.jsonl", b"\xef\xbb\xbf" + lines()),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("a.json", b" \n [" + lines().strip().replace(b"\n", b",") + b"]"),
        ("a.json.gz", gzip.compress(lines(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(lines())),
        ("a.jsonl.xz", lzma.compress(lines())),
        ("a.jsonl.zst", pa.compress(lines(), "zstd", asbytes=True)),
        ("a.json.gz", gzip.compress(json.dumps([{"text": text} for text in TEXTS]).encode(), mtime=0)),
        ("a.csv", "\ufefftext,other\r\nw1 w2 w3,1\r\n\r\nw4 w5 w6,2\r\nw7 w8 w9,3\r\n".encode()),
        ("a.csv.gz", gzip.compress(b'other,text\n1,"w1 w2 w3"\n"2\n",w4 w5 w6\n3,w7 w8 w9\n', mtime=0)),
        ("a.TSV", b"text\tother\nw1 w2 w3\t1\nw4 w5 w6\t2\nw7 w8 w9\t3\n"),
        ("A.PARQUET", parquet(TEXTS)),
    ],
)
def test_a_table_is_read_however_its_name_spells_its_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts_in(tmp_path / name) == texts_in(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array([text.encode() for text in TEXTS], pa.binary()),
        pa.array([text.encode() for text in TEXTS], pa.binary_view()),
    ],
)
def test_every_spelling_of_text_in_parquet_and_arrow_is_text(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_in(tmp_path / "a.parquet") == TEXTS
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, pa.schema([("text", column.type)])) as writer:
        writer.write_table(pa.table({"text": column}))
    assert texts_in(tmp_path / "a.arrow") == TEXTS


def test_bytes_that_are_no_text_are_no_document_and_a_file_with_nul_is_none(tmp_path):
    write_all(tmp_path, a__parquet=parquet(pa.array([b"w1", b"\xff", None])))
    assert texts_in(tmp_path) == ["w1", None, ""]
    (tmp_path / "b.txt").write_bytes("w1 w2".encode("utf-16-le"))
    assert texts_in(tmp_path / "b.txt") == [None]


def test_arrow_files_are_read_and_one_cut_at_a_batch_is_named(tmp_path):
    pyarrow.feather.write_feather(pa.table({"text": TEXTS}), tmp_path / "a.feather")
    assert texts_in(tmp_path / "a.feather") == TEXTS
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": TEXTS}))
    whole = (tmp_path / "a.arrow").read_bytes()
    for length in (len(whole) - 8, len(whole) // 2, 3, 0):
        (tmp_path / "a.arrow").write_bytes(whole[:length])
        assert "a.arrow: cannot be read, it may be cut short" in refused(tmp_path / "a.arrow")


def test_a_folder_saved_by_datasets_is_read_without_what_it_caches_there(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    loaded = datasets.load_from_disk(tmp_path / "one")
    loaded.map(lambda row: {"text": "w0"}, cache_file_name=str(tmp_path / "one" / "cache-0123.arrow"))
    assert texts_in(tmp_path / "one") == TEXTS
    both = {"train": datasets.Dataset.from_dict({"text": TEXTS}), "test": datasets.Dataset.from_dict({"text": ["w0"]})}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    assert texts_in(tmp_path / "two") == TEXTS


def test_a_cloned_data_set_gives_its_train_split_alone_and_says_what_is_left_out(tmp_path, capsys):
    write_all(
        tmp_path, README__md="w0", LICENSE="w0", dataset_infos__json="{}", data___train_00__parquet=parquet(TEXTS[:2]),
        data___train_01__parquet=parquet(TEXTS[2:]), data___test_00__parquet=parquet(["w0"]),
    )  # fmt: skip
    assert texts_in(tmp_path) == TEXTS
    told = capsys.readouterr().err
    assert "3 of the source are left out (about the tables), the first is LICENSE" in told
    assert "1 of the source are left out (of other splits than train), the first is data/test_00.parquet" in told
    assert texts_in(tmp_path / "data" / "test_00.parquet") == ["w0"]
    assert len(texts_in(f"{tmp_path}/**/*.parquet")) == 4


def test_splits_that_cannot_be_told_apart_are_refused_with_a_pattern_that_reads_them_all(tmp_path):
    write_all(tmp_path, validation__jsonl=lines(["w0"]), more__jsonl=lines())
    message = refused(tmp_path)
    assert "(validation.jsonl)" in message
    assert len(texts_in(message.split("--source='")[1].split("'")[0])) == 4
    write_all(tmp_path / "words", contest__jsonl=lines(["w0"]), detrained__jsonl=lines(["w1"]))
    assert texts_in(tmp_path / "words") == ["w0", "w1"]
    write_all(tmp_path / "tests", test_a__py="w0", b__py="w1", train__py="w2")
    assert texts_in(tmp_path / "tests") == ["w1", "w0", "w2"]


def test_texts_beside_tables_are_refused_and_a_tree_of_sources_is_texts_without_its_json(tmp_path, capsys):
    write_all(tmp_path / "mixed", a__txt="w0", b__jsonl__gz=gzip.compress(lines()))
    message = refused(tmp_path / "mixed")
    assert "holds tables (b.jsonl.gz) beside texts (a.txt)" in message
    assert texts_in(message.split("--source='")[1].split("'")[0]) == TEXTS
    files = dict(README__md="w0", a__py="w1", b___c__c="w2", d__rst="w3", Makefile="w4", package__json="{}", t__csv="a")
    tree = write_all(tmp_path / "tree", **files)
    assert sorted(texts_in(tree)) == ["w0", "w1", "w2", "w3", "w4"]
    assert "2 of the source are left out (JSON and CSV among texts), the first is package.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.txt.gz", "a.zip", "a.tar", "a.TAR.GZ", "a.tgz", "a.parquet.gz", "a.xlsx", "a.orc", "a.txt.xz", "a.7z"])
def test_packed_files_and_tables_of_other_kinds_are_refused_by_name_wherever_they_lie(tmp_path, name):
    write_all(tmp_path, b__txt="w1 w2")
    with zipfile.ZipFile(tmp_path / name, "w") as packed:
        packed.writestr("inner.txt", "w1 w2")
    for source in (tmp_path, tmp_path / name, f"{tmp_path}/*"):
        assert f"{name}: {os.path.splitext(name)[1]} files aren't read; unpack it" in refused(source)


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
def test_a_packed_table_cut_short_or_damaged_is_named(tmp_path, packing):
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}
    generator = np.random.default_rng(0)
    whole = packers[packing](lines([" ".join(f"w{number}" for number in generator.integers(0, 50, 50)) for _ in range(3000)]))
    path = tmp_path / f"a.jsonl.{packing}"
    for damaged in (whole[:-10], whole[: len(whole) // 2], whole[:5], b"no such thing"):
        path.write_bytes(damaged)
        assert f"a.jsonl.{packing}: cannot be read, it may be cut short" in refused(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,b\n"w1\nw1",1\nw2\n', "a.csv:4: 1 fields, the first line names 2"),
        ("a.csv", 'text,b\nw1,1\n"w2', "a.csv:3: not a line of CSV"),
        ("a.csv", "w1 w2 w3\nw4\n", "a.csv: no column 'text'; It has: w1 w2 w3"),
        ("a.csv", "text,text\nw1,w2\n", "two columns 'text'"),
        ("a.csv", "", "a.csv: no column 'text'"),
        ("a.csv", b"text\n\xff\n", "a.csv: not UTF-8; save it as UTF-8"),
        ("a.json", '[{"text": "w1"}, ["w2"]]', "a.json item 2: not a JSON object"),
        ("a.json", '[{"text": "w1"}, {"body": "w2"}]', "a.json item 2: no column 'text'; It has: body"),
        ("a.json", '[{"text": "w1"}', "a.json: not a line of JSON"),
        ("a.json", '{\n "text": "w1"\n}', "a.json:1: not a line of JSON"),
        ("a.jsonl", '{"text": "w1"}\n' + "[" * 100_000, "a.jsonl:2: not a line of JSON"),
    ],
)
def test_a_malformed_table_is_named_by_file_and_place(tmp_path, name, content, message):
    write_all(tmp_path, **{name.replace(".", "__"): content})
    assert message in refused(tmp_path / name)


@pytest.mark.parametrize("column", ["messages", "conversations", "turns"])
def test_a_column_of_conversations_is_no_text_and_the_texts_beside_it_are_read_when_named(tmp_path, column):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    rows = [{"prompt": "w1", column: chat}]
    write_all(tmp_path, a__jsonl=json.dumps(rows[0]), b__json=json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert f"column '{column}' holds list" in refused(tmp_path / name, column)
        assert texts_in(tmp_path / name, "prompt") == ["w1"]
        if column == "turns":
            assert "conversations are read from messages, conversations, data, " in refused(tmp_path / name)


def test_links_that_lead_nowhere_are_named_and_linked_folders_are_read_once(tmp_path, capsys):
    source = write_all(tmp_path / "source", a__txt="w1", b___c__txt="w2")
    (source / "loop").symlink_to(source)
    (source / "d.txt").symlink_to(source / "a.txt")
    assert texts_in(source) == texts_in(f"{source}/**/*.txt") == ["w1", "w2", "w1"]
    assert "1 of the source are left out (links to folders), the first is loop" in capsys.readouterr().err
    for target in ("nowhere", "e.txt"):
        (source / "e.txt").symlink_to(target)
        for asked in (source, f"{source}/*.txt"):
            assert "e.txt: a link that leads nowhere; mend or remove it" in refused(asked)
        (source / "e.txt").unlink()
    os.mkfifo(source / "f.txt")
    assert "f.txt: neither a file nor a folder" in refused(source)


def test_a_source_has_the_identity_it_always_had_and_what_was_once_read_otherwise_another(tmp_path):
    tree = write_all(tmp_path / "tree", a__py="w1", b___c__txt="w2", d__md="w3")
    assert open_source(str(tree)).fingerprint() == "f4f421c91db04ccc024944e5ba2577060bebcbee29034fa862ed174732e9b29d"
    tables = write_all(tmp_path / "tables", a__jsonl=lines(), b__jsonl=lines(["w0"]))
    assert open_source(str(tables)).fingerprint() == "726df0e8426f825abde0d20db114f5779bac438db1bbb0802d5eed9083ca0c2d"
    before = write_all(tmp_path / "text", a__json=lines())
    assert open_source(str(before)).fingerprint() != "9aae1bd5bc6cb21ccea9095521960970c3b48fe41e988c75947d3066fcb1cdb6"


def test_prompts_longer_than_every_document_are_refused_before_anything_is_kept(tmp_path):
    source, tokenizer = write_all(tmp_path / "source", a__txt=" ".join(TEXTS)), write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="--prompt_length=10: no document is so long, the longest has 9 tokens; lower it"):
        prepare(source=str(source), tokenizer=tokenizer, out_dir=str(tmp_path / "out"), seq_length=4, prompt_length=10)
    assert not (tmp_path / "out").exists()


def test_columns_apart_by_semicolons_are_not_read_as_one(tmp_path):
    (tmp_path / "excel.csv").write_text("text;id\nw1 w2;0\n")
    with pytest.raises(UserError, match="excel.csv: its columns are apart by ';'; save it with commas"):
        open_source(str(tmp_path / "excel.csv"))


def test_a_mark_before_a_text_is_not_of_the_text_and_tells_the_set_from_one_that_had_it(tmp_path):
    (tmp_path / "a").write_bytes(b"w1 w2")
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbfw1 w2")
    texts = [next(open_source(str(tmp_path / name)).documents(np.random.default_rng(0))).content for name in "ab"]
    assert texts == ["w1 w2", "w1 w2"]
    marked = open_source(str(tmp_path / "b")).fingerprint()
    assert marked != hashlib.sha256(f"b\0{sha256_of(tmp_path / 'b')}\n".encode()).hexdigest()


def test_tables_that_are_most_of_a_folder_are_not_left_out_for_a_stray_text(tmp_path):
    (tmp_path / "train.json").write_text('{"text": "w1 w2 w3 w4 w5"}\n' * 20)
    (tmp_path / "load.py").write_text("w1")
    with pytest.raises(UserError, match="holds tables .train.json. beside texts .load.py.*\\*.json' for its tables"):
        open_source(str(tmp_path))


def test_texts_of_another_encoding_are_told_so(tmp_path):
    for name, text in (("a.csv", "text,id\nw\xe9,1\n"), ("a.jsonl", '{"text": "w\xe9"}\n')):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="not UTF-8; save"):
            open_source(str(tmp_path / name))
