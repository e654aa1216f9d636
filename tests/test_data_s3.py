"""Sources in an S3 store: a server of it, which asks for keys, and `s3fs` before it as users have it.

The server is a process of its own: vLLM asks every module of its process for all its attributes, which Flask's refuse.
"""

import gzip
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from data_helpers import write_tokenizer
from test_data_sources import parquet

import data.prepare.encoding
from data.prepare.documents import DocumentSpool
from data.prepare.run import prepare
from fms_spec.errors import UserError

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("moto"), reason="no S3 server is installed (moto)")
POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


@pytest.fixture
def server(monkeypatch):
    """A server's process, which the environment names; it ends with the test."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield process
    s3fs.S3FileSystem.clear_instance_cache()
    process.kill()
    process.wait()


@pytest.fixture
def folder(server, tmp_path, monkeypatch):
    """A folder `bucket` of sixty texts in JSON lines and in Parquet, and a store that holds the same, to which the environment has keys."""
    import boto3

    nowhere = {name: str(tmp_path / "none") for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE")}  # not those of whoever runs this
    given = {"DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true", "MAX_ATTEMPTS": "1"} | nowhere
    for name, value in (given | {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    store, generator = s3fs.S3FileSystem(), np.random.default_rng(0)
    store.mkdir("bucket")
    texts = [" ".join(f"w{word}" for word in generator.integers(0, 50, 30)) for _ in range(60)]
    files = {"c.parquet": parquet(texts[40:])}
    for name, part in (("a.jsonl.gz", texts[:20]), ("b.jsonl.gz", texts[20:40])):
        files[name] = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in part).encode(), mtime=0)
    (tmp_path / "bucket/x").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "bucket/x" / name).write_bytes(content)
        store.pipe_file(f"bucket/x/{name}", content)
    users = boto3.client("iam")
    users.create_user(UserName="reader")
    users.put_user_policy(UserName="reader", PolicyName="reading", PolicyDocument=json.dumps(POLICY))
    key = users.create_access_key(UserName="reader")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    strict = urllib.request.Request(f"{users.meta.endpoint_url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(strict).close()  # from now on those who have no key are turned away
    s3fs.S3FileSystem.clear_instance_cache()
    return tmp_path / "bucket"


def prepared(tmp_path, source, out="out", **how):
    """A source, prepared: the bytes of its tables, and what the manifest knows it by."""
    tokenizer = write_tokenizer(tmp_path / "t")
    manifest = prepare(source=str(source), tokenizer=tokenizer, out_dir=str(tmp_path / out), seq_length=32, prompt_length=4, **how)
    return {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.parquet")} | manifest["inputs"]


def refused(tmp_path, source):
    """The one line with which it is refused."""
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, source)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    return str(caught.value)


def test_a_bucket_and_a_folder_give_the_same_bytes_packed_and_in_parquet(folder, tmp_path):
    for number, place in enumerate(("x", "x/*.gz", "x/c.parquet")):
        assert prepared(tmp_path, f"s3://bucket/{place}", f"s{number}") == prepared(tmp_path, folder / place, f"d{number}")


def test_what_a_store_refuses_is_one_line_that_names_the_source(folder, tmp_path, monkeypatch):
    assert "source s3://none/x: cannot be read (The specified bucket does not exist); mend the URL" in refused(tmp_path, "s3://none/x")
    assert "source s3://bucket/none.jsonl: no such file or folder" in refused(tmp_path, "s3://bucket/none.jsonl")
    key = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "another"}
    for changes, said in (
        ({"AWS_SECRET_ACCESS_KEY": "another"}, "signature"), (key, "does not exist in our records"),
        (dict.fromkeys(key), "credentials"), ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect"),
    ):  # fmt: skip
        with monkeypatch.context() as changed:
            for name, value in changes.items():
                changed.delenv(name) if value is None else changed.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            for place in ("x", "x/a.jsonl.gz", "x/*.gz"):
                line = refused(tmp_path, f"s3://bucket/{place}")
                assert line.startswith(f"source s3://bucket/{place}: cannot be read (") and said in line and "or the rights to it" in line


def test_a_store_that_goes_away_on_the_way_ends_in_one_line_and_leaves_nothing(folder, server, tmp_path, monkeypatch):
    append, documents = DocumentSpool.append, []

    def counted(*document):
        documents.append(document)
        if len(documents) == 2:
            server.kill()
            server.wait()
        return append(*document)

    monkeypatch.setattr(data.prepare.encoding, "BATCH_DOCUMENTS", 2)
    monkeypatch.setattr(DocumentSpool, "append", counted)
    assert "s3://bucket/x/" in (line := refused(tmp_path, "s3://bucket/x")) and "cannot be read (Could not connect" in line
    assert 2 <= len(documents) < 60
