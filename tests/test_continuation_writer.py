"""Shards of one prompt table, written by several processes that may be killed at any moment."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from continuation_helpers import Engine, open_store, some_prompts, table_of

import data.continuations.supply
from data.continuations.writer import write_shards
from fms_spec.errors import UserError

HELPER = Path(__file__).with_name("continuation_helpers.py")


def start_writer(folder, seconds, room=1):
    environment = os.environ | {"PYTHONPATH": str(HELPER.parents[1])}
    return subprocess.Popen([sys.executable, HELPER, folder, str(seconds), str(room)], env=environment, stderr=subprocess.PIPE)


def begun(folder):
    """(process, shard) of every shard that a process of `start_writer` has begun."""
    log = Path(f"{folder}.log")
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def hidden_files(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.parquet"))}


@pytest.mark.slow
def test_two_processes_share_a_table_and_write_no_row_twice(tmp_path):
    writers = [start_writer(tmp_path / "shared", 0.1, room=2) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0], [writer.stderr.read() for writer in writers]
    processes, shards = zip(*begun(tmp_path / "shared"))
    assert sorted(shards) == list(range(40)) and set(processes) == {writer.pid for writer in writers}
    alone = table_of(tmp_path / "alone")
    write_shards(alone, Engine(), range(40))
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert hidden_files(tmp_path / "shared") == []


def test_what_a_killed_process_was_writing_is_taken_over_by_one_that_waits_for_it(tmp_path):
    slow, folder = start_writer(tmp_path / "out", 1000, room=3), tmp_path / "out"
    wait_for(lambda: len(begun(folder)) == 3)
    (folder / ".continuations-00001.parquet.1234.partial").write_bytes(b"half")
    engine = Engine()
    thread = threading.Thread(target=write_shards, args=(table_of(folder), engine, range(40)))
    thread.start()
    wait_for(lambda: len(engine.begun) == 37)
    time.sleep(0.5)
    assert thread.is_alive() and engine.begun == list(range(3, 40))
    slow.kill()
    thread.join(10)
    assert not thread.is_alive() and engine.begun[37:] == [0, 1, 2]
    assert len(contents(folder)) == 40 and hidden_files(folder) == []
    slow.communicate()


def test_a_shard_is_claimed_once_and_again_after_its_claim_ended(tmp_path):
    first, second = open_store(tmp_path), open_store(tmp_path)
    claim = first.claim(0)
    assert second.claim(0) is None and first.claim(0) is None
    claim.release()
    claim.release()
    again = second.claim(0)
    write_shards(first, Engine(), [1])
    assert first.claim(1) is None and first.claim(0) is None
    again.release()
    assert hidden_files(tmp_path) == []


@pytest.mark.parametrize("written", [False, True])
def test_a_claim_sought_in_the_moment_another_ends_is_alone_and_only_on_a_missing_shard(tmp_path, monkeypatch, written):
    store, other, flock = open_store(tmp_path), open_store(tmp_path), fcntl.flock
    before = other.claim(0)

    def late(file, how):
        if isinstance(file, int):  # the claim's, not a trial of the disk; the other claim ends between opening and locking
            monkeypatch.setattr(fcntl, "flock", flock)
            before.write(list(some_prompts(4).tokens), ["stop"] * 4) if written else before.release()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    claim = store.claim(0)
    assert (claim is None) == written and other.claim(0) is None
    if claim:
        claim.release()
    assert hidden_files(tmp_path) == []


def test_a_writer_stays_the_asked_number_of_shards_ahead_of_the_reader_and_finishes_what_it_has_begun(tmp_path):
    store, engine = table_of(tmp_path), Engine(room=5, seconds=0.01)
    thread = threading.Thread(target=write_shards, args=(store, engine, range(12)), kwargs={"ahead": 3, "status": tmp_path / "s.json"})
    thread.start()
    for place in (0, 1, 2, 7):
        store.post_shards_begun(place)
        wait_for(lambda place=place: store.has(place + 2))
        time.sleep(0.3)
        assert engine.begun == list(range(place + 3)) and engine.idle
    store.post_shards_begun(12)
    thread.join(10)
    assert len(contents(tmp_path)) == 12
    status = json.loads((tmp_path / "s.json").read_text())
    assert status["shards"] == 12 and status["waiting_seconds"] > 1 and 0 < status["writing_seconds"] < 5
    assert status["tokens"] == sum(len(row[2]) for index in range(12) for row in store.read(index))
    assert status["tokens_per_s"] == pytest.approx(status["tokens"] / status["writing_seconds"])


def test_a_full_disk_is_one_line_that_names_the_shard_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = open_store(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="continuations-00000.parquet: cannot be written .No space left on device") as error:
            write_shards(store, Engine(room=2), range(3))
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []
    write_shards(store, Engine(), range(3))
    assert len(contents(tmp_path)) == 3


def test_a_folder_that_cannot_be_made_or_is_not_ours_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=str(folder)):
            write_shards(open_store(folder), Engine(), [0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        open_store(tmp_path / "mine")


def test_whatever_goes_wrong_in_the_engine_no_claim_outlives_it(tmp_path):
    def fail(first):
        raise KeyboardInterrupt

    store = open_store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_shards(store, Engine(fail, room=2), range(3))
    with pytest.raises(ValueError, match="4 prompts, 1 continuations"):
        store.claim(0).write([some_prompts(1).tokens[0]], ["stop"])
    with pytest.raises(ValueError, match="finish reasons"):
        store.claim(0).write(list(some_prompts(4).tokens), ["eos"] * 4)
    assert os.listdir(tmp_path) == []


def test_the_manifest_comes_when_every_shard_is_there_and_says_what_they_hold(tmp_path):
    store = open_store(tmp_path)
    write_shards(store, Engine(), [0, 2])
    assert store.finish({"command": "this"}) is None and not (tmp_path / "manifest.json").exists()
    write_shards(store, Engine(), range(3))
    manifest = store.finish({"command": "this"})
    assert manifest == json.loads((tmp_path / "manifest.json").read_text()) == store.finish({"command": "that"})
    assert manifest["made_by"] == store.made_by and manifest["environment"] == {"command": "this"}
    lengths = [first % 5 + 2 for first in range(0, 30, 3)]
    counts = {"stop": sum(length < 6 for length in lengths), "length": sum(length == 6 for length in lengths)}
    assert (manifest["rows"], manifest["tokens"], manifest["finish_reasons"]) == (10, sum(lengths), counts)
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]
    assert [shard["bytes"] for shard in manifest["shards"]] == [len(content) for content in contents(tmp_path).values()]
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    with pytest.raises(UserError, match="manifest.json: written with another seed"):
        open_store(tmp_path, seed=1)
    write_shards(store, Engine(lambda first: 3), range(3))
    assert store.finish({"command": "anew"})["tokens"] == 30


def test_a_manifest_or_place_of_another_shape_is_named(tmp_path):
    store = open_store(tmp_path)
    write_shards(store, Engine(), range(3))
    manifest = store.finish({})
    shards = [{**manifest["shards"][0], "file": "../out.parquet"}]
    for content in ("", "[]", "3", "{}", "[" * 100_000, json.dumps(manifest | {"shards": 3}), json.dumps(manifest | {"shards": shards})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="manifest.json: .*delete it: it will be written again") as caught:
            open_store(tmp_path)
        assert "\n" not in str(caught.value)
    for content in ("", "[]", '{"shards_begun": -1}', '{"shards_begun": "1"}'):
        (tmp_path / "reader.json").write_text(content)
        with pytest.raises(UserError, match="reader.json: .*delete it"):
            store.shards_begun()


def test_what_killed_processes_left_is_removed_and_what_living_ones_hold_is_not(tmp_path):
    store, other = open_store(tmp_path), open_store(tmp_path)
    claim = other.claim(0)
    for name in ("continuations-00001.parquet", "manifest.json", "reader.json"):
        (tmp_path / f".{name}.lock").touch()
        (tmp_path / f".{name}.123.partial").touch()
    (tmp_path / ".continuations-00000.parquet.456.partial").touch()
    assert store.finish({}) is None
    assert sorted(hidden_files(tmp_path)) == [".continuations-00000.parquet.456.partial", ".continuations-00000.parquet.lock"]
    claim.release()
    write_shards(store, Engine(), range(3))
    store.post_shards_begun(1)
    assert store.finish({}) and hidden_files(tmp_path) == []


class SlowProducers:
    """Writes the missing shard when it has been asked for `patience` times."""

    log_dir = "logs"

    def __init__(self, store, patience):
        self.store, self.patience, self.checks = store, patience, 0

    def check(self):
        self.checks += 1
        if self.checks == 2:
            self.store.post_shards_begun(0)  # as another run would that reads the same folder
        if self.checks == self.patience:
            assert self.store.shards_begun() == 1
            write_shards(self.store, Engine(), [0])


def test_a_trainer_that_waits_says_so_and_holds_its_place_against_another_reader(tmp_path, monkeypatch, capfd):
    store = open_store(tmp_path)
    monkeypatch.setattr(data.continuations.supply, "FIRST_MESSAGE", 0.1)
    alongside = data.continuations.supply.Alongside(store, 4, SlowProducers(store, 4))
    spent = alongside.have(0, 1)
    said = [line for line in capfd.readouterr().err.splitlines() if "waiting for" in line]
    assert len(said) == 1 and "waiting for continuations-00000.parquet" in said[0] and "logs are in logs" in said[0]
    assert 0.6 < spent["waiting"] < 5
