"""Checkpoints: what is damaged in one is named and never believed, nothing in one runs code, and none is lost for another."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import write_config
from safetensors.torch import load_file

import pipelines.train.checkpoint
from fms_spec.errors import UserError
from pipelines.export import export
from pipelines.train.checkpoint import checkpoints, newest_checkpoint, tensors_of
from pipelines.train.loop import Trainer
from pipelines.train.run import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, data_dir):
    """(config, folder) of a run of nine steps that kept all its checkpoints: 2, 4, 6, 8, 9."""
    place = tmp_path_factory.mktemp("finished")
    config = write_config(place / "run.yaml", model_dir, data_dir, **{"checkpoint.keep": 9})
    train(config, place / "run")
    return config, place / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to damage, that lacks the last step."""
    shutil.copytree(finished[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000009")
    return tmp_path / "run"


def weights(run):
    """Every tensor of its last checkpoint as bytes: weights, moments. (safetensors' header is written in a drawn order.)"""
    tensors = load_file(run / "checkpoints/step-00000009" / FILES[0])
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def into_a_folder(path):
    path.unlink()
    path.mkdir()


FILES = ["shard-00001-model-00001-of-00001.safetensors", "progress.json", "speculator.json", "checksums.json"]


@pytest.mark.parametrize("damage", [flip, empty, cut, remove, into_a_folder])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_kept_and_the_one_before_is_gone_on_with(finished, run, capsys, file, damage):
    if (file, damage) == ("checksums.json", cut):
        damage = empty  # its last byte is a line's end
    newest = run / "checkpoints/step-00000008"
    damage(newest / file)
    damaged = {path.name: path.read_bytes() for path in newest.iterdir() if path.is_file()}
    train(finished[0], run, resume=True)
    printed = capsys.readouterr()
    assert "going on from step 6" in printed.out
    (warning,) = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert newest.name in warning and file in warning
    assert weights(run) == weights(finished[1])
    assert {path.name: path.read_bytes() for path in newest.with_suffix(".damaged").iterdir() if path.is_file()} == damaged


def test_every_flipped_byte_of_a_checkpoints_tensors_is_found(run):
    newest, size = run / "checkpoints/step-00000008", (run / "checkpoints/step-00000008" / FILES[0]).stat().st_size
    places = torch.randint(0, size, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in [0, size - 1, *places]:
        flip(newest / FILES[0], place)
        assert newest_checkpoint(run / "checkpoints").name == "step-00000006"
        flip(newest / FILES[0], place)
    assert newest_checkpoint(run / "checkpoints") == newest


def test_where_every_checkpoint_is_damaged_a_run_does_not_begin_again(finished, run):
    for checkpoint in checkpoints(run / "checkpoints"):
        flip(checkpoint / "progress.json")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train(finished[0], run, resume=True)


def test_what_is_no_checkpoint_is_not_taken_for_the_newest(finished, run, capsys):
    (run / "checkpoints/step-notes.txt").write_text("mine")
    (run / "checkpoints/step-00000099.partial").mkdir()
    (run / "checkpoints/step-99").mkdir()
    train(finished[0], run, resume=True)
    assert "going on from step 8" in capsys.readouterr().out
    assert (run / "checkpoints/step-notes.txt").read_text() == "mine"


def test_a_renamed_checkpoint_is_not_believed_to_be_of_another_step(finished, run):
    (run / "checkpoints/step-00000008").rename(run / "checkpoints/step-00000099")
    with pytest.raises(UserError, match="it is of step 8"):
        train(finished[0], run, resume=True)


@contextmanager
def killed_in_the_sixth_step(monkeypatch):
    """What runs within ends there; its newest checkpoint is an earlier one."""
    step = Trainer.train_step

    def until_the_sixth(self, *job):
        if self.step == 5:
            raise KeyboardInterrupt
        step(self, *job)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "train_step", until_the_sixth)
        yield


def test_a_damaged_newer_checkpoint_never_costs_the_one_that_was_just_written(finished, run, monkeypatch):
    config = finished[0].model_copy(update={"checkpoint": finished[0].checkpoint.model_copy(update={"keep": 1})})
    record = json.loads((run / "run.json").read_text())
    record["config"]["checkpoint"]["keep"] = 1
    (run / "run.json").write_text(json.dumps(record))
    for checkpoint in checkpoints(run / "checkpoints")[1:]:
        flip(checkpoint / FILES[0])
    with killed_in_the_sixth_step(monkeypatch):
        train(config, run, resume=True)
    assert newest_checkpoint(run / "checkpoints").name == "step-00000004"
    train(config, run, resume=True)
    assert weights(run) == weights(finished[1])


def test_tensors_of_another_file_in_a_checkpoint_are_not_read(finished, run, capsys):
    shutil.copy(run / "checkpoints/step-00000004" / FILES[0], run / "checkpoints/step-00000008/z.safetensors")
    train(finished[0], run, resume=True)
    assert "step-00000008 is damaged (z.safetensors is not of it)" in capsys.readouterr().err
    assert weights(run) == weights(finished[1])


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_and_keeps_its_log(finished, run):
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="checkpoints: holds none, and metrics.jsonl tells of step 9; bring it back"):
        train(finished[0], run, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_old_checkpoint_that_can_not_be_removed_is_told_and_ends_nothing(finished, tmp_path, capsys, monkeypatch):
    rename = Path.rename

    def busy(self, target):
        if target.name == "step-00000002.partial" and self.suffix != ".partial":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    config = finished[0].model_copy(update={"checkpoint": finished[0].checkpoint.model_copy(update={"keep": 1})})
    train(config, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished[1])
    assert "step-00000002: an old checkpoint can't be removed (Device or resource busy)" in capsys.readouterr().err


class Evil:
    """Pickled, it runs a command where it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_no_file_of_a_run_can_run_code(finished, run, tmp_path):
    evil = pickle.dumps(Evil(tmp_path / "ran"))
    newest = run / "checkpoints/step-00000008"
    (newest / ".metadata").write_bytes(evil)
    for file in FILES:
        (newest / file).write_bytes(evil)
        entries = json.loads((run / "checkpoints/step-00000006/checksums.json").read_text())
        entries[file] = {"bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
        if file != "checksums.json":
            (newest / "checksums.json").write_text(json.dumps(entries))
        with pytest.raises(UserError):
            export(newest, tmp_path / "exported")
    train(finished[0], run, resume=True)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_is_not_exported_and_a_run_gives_its_newest_whole_one(run, tmp_path, capsys):
    flip(run / "checkpoints/step-00000008" / FILES[0])
    with pytest.raises(UserError, match="step-00000008 is damaged \\(shard-.*sha256"):
        export(run / "checkpoints/step-00000008", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    export(run, tmp_path / "exported")
    assert "6 steps" in (tmp_path / "exported/README.md").read_text()
    assert "step-00000008 is damaged" in capsys.readouterr().err


def test_a_run_goes_on_from_a_checkpoint_of_older_code_which_also_kept_the_state_of_a_generator(finished, tmp_path, monkeypatch):
    def older(*held):
        tensors, moments = tensors_of(*held)
        return tensors | {"rng": torch.get_rng_state()}, moments

    with monkeypatch.context() as patched:
        patched.setattr(pipelines.train.checkpoint, "tensors_of", older)
        train(finished[0], tmp_path / "run")
    assert "rng" in weights(tmp_path / "run") and "rng" not in weights(finished[1])
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000009")
    train(finished[0], tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(finished[1])
