"""Sources behind URLs are read as those on this machine are: the same texts, the same identity, the same bytes."""

import gzip
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import write_tokenizer
from fsspec.registry import known_implementations
from test_data_sources import TEXTS, lines, parquet, texts_in

from data.prepare.run import prepare
from data.prepare.sources import open_source
from fms_spec.errors import UserError


def arrow_stream():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": TEXTS}))
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": lines(),
    "b.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "c.jsonl.gz": gzip.compress(lines(), mtime=0),
    "d.jsonl.zst": pa.compress(lines(), "zstd", asbytes=True),
    "e.parquet": parquet(TEXTS),
    "f.csv": b"text\nw1 w2 w3\nw4 w5 w6\nw7 w8 w9\n",
    "g.arrow": arrow_stream(),
}


@pytest.fixture
def bucket(tmp_path):
    """A function that puts files into a store and into a folder; the URL and the folder."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]

    def put(files):
        for name, content in files.items():
            path = tmp_path / "bucket" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            store.pipe_file(f"/bucket/{name}", content)
        return "memory://bucket", str(tmp_path / "bucket")

    yield put
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("name", [*FILES, "h.txt"])
def test_every_kind_of_file_is_read_from_a_store_as_it_is_from_a_disk(bucket, name):
    url, folder = bucket({name: FILES.get(name, b"w1 w2 w3")})
    expected = TEXTS if name in FILES else TEXTS[:1]
    for place in ("", f"/{name}", "/*"):
        assert texts_in(url + place) == texts_in(folder + place) == expected
        assert open_source(url + place).fingerprint() == open_source(folder + place).fingerprint()


def test_a_folder_in_a_store_has_its_files_below_it_without_hidden_ones_and_one_split(bucket, capsys):
    url, folder = bucket(
        {"README.md": b"w0", "x/train-0.jsonl.gz": FILES["c.jsonl.gz"], "x/test-0.jsonl.gz": FILES["c.jsonl.gz"], ".git/x": b"w"}
    )
    assert texts_in(url) == TEXTS
    told = capsys.readouterr().err
    assert texts_in(folder) == TEXTS and capsys.readouterr().err == told and "the first is x/test-0.jsonl.gz" in told
    assert len(texts_in(f"{url}/**/*.gz")) == len(texts_in(f"{folder}/**/*.gz")) == 6
    source = open_source(url)
    first = next(source.documents(np.random.default_rng(0)))
    assert source.label(first.file, first.row) == "x/train-0.jsonl.gz#0"


def test_a_store_and_a_folder_give_the_same_bytes_alone_and_in_a_mixture(bucket, tmp_path):
    generator = np.random.default_rng(0)
    rows = [json.dumps({"text": " ".join(f"w{word}" for word in generator.integers(0, 50, 30))}) for _ in range(60)]
    table = pa.Table.from_pylist([json.loads(row) for row in rows[40:]])
    pq.write_table(table, tmp_path / "t.parquet")
    files = {"x/a.jsonl": "\n".join(rows[:20]).encode(), "x/b.jsonl.gz": gzip.compress("\n".join(rows[20:40]).encode(), mtime=0)}
    url, folder = bucket(
        files | {"y/c.parquet": (tmp_path / "t.parquet").read_bytes(), "e.jsonl": json.dumps({"turns": [rows[3]]}).encode()}
    )
    tokenizer, contents = write_tokenizer(tmp_path / "t"), []
    for number, root in enumerate((url, folder)):
        mixture = tmp_path / f"{number}.yaml"
        mixture.write_text(f"sources: {{x: {{path: '{root}/x', weight: 2}}, y: {{path: '{root}/y', weight: 1}}}}")
        for source, out in ((f"{root}/x", f"x{number}"), (str(mixture), f"m{number}")):
            settings = {"tokenizer": tokenizer, "out_dir": str(tmp_path / out), "seq_length": 32, "prompt_length": 4}
            manifest = prepare(source=source, evaluation=f"{root}/e.jsonl", **settings)
            contents.append({path.name: path.read_bytes() for path in (tmp_path / out).glob("*.parquet")} | manifest["inputs"])
            assert sum(manifest["source"]["skipped"].values()) == 1
    assert contents[:2] == contents[2:]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://bucket/nothing.jsonl", "memory://bucket/nothing.jsonl: no such file or folder"),
        ("memory://bucket/*.parquet", "no such file or folder"),
        ("nosuch://bucket/a.jsonl", "nosuch://bucket/a.jsonl: cannot be read .*rotocol"),
        ("zip://a.jsonl::memory://bucket/a.zip", "URLs within URLs aren't read"),
        ("memory://bucket/cut.jsonl.gz", "cut.jsonl.gz: cannot be read, it may be cut short"),
        ("memory://bucket/bad.jsonl", "bad.jsonl:2: not a line of JSON"),
        ("memory://bucket/a.zip", r"a.zip: .zip files aren't read; unpack it"),
    ],
)
def test_a_mistake_in_a_store_is_one_line_that_names_it(bucket, source, message):
    bucket({"a.zip": b"PK", "cut.jsonl.gz": gzip.compress(lines(TEXTS * 999))[:-9], "bad.jsonl": lines(TEXTS[:1]) + b"{"})
    with pytest.raises(UserError, match=message) as caught:
        texts_in(source)
    assert "\n" not in str(caught.value)


def test_a_store_that_fails_on_the_way_is_named_and_its_library_too_where_it_is_not_there(bucket, monkeypatch):
    url, _ = bucket({"a.jsonl": lines()})

    def fail(*_, **__):
        raise RuntimeError("no credentials")  # botocore's are no OSError either

    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"a.jsonl: cannot be read \(no credentials\); mend the URL"):
        patched.setattr(fsspec.get_filesystem_class("memory"), "_open", fail)
        texts_in(url)
    monkeypatch.setitem(known_implementations, "far", {"class": "nowhere.Far", "err": "Install farfs to reach it"})
    with pytest.raises(UserError, match=r"source far://x/a.jsonl: cannot be read \(Install farfs to reach it\)"):
        texts_in("far://x/a.jsonl")
