"""A run's folder: what is damaged in it is named and never believed, and it has one owner."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_config
from safetensors.torch import load_file

from fms_spec.errors import UserError
from fms_spec.files import owned
from pipelines.checkpoint import checkpoints, newest_checkpoint
from pipelines.export import export
from pipelines.metrics import Metrics
from pipelines.run_state import examine_run
from pipelines.stopping import STOPPED, Stopped
from pipelines.train import Trainer
from scripts.train import train

ROOT = Path(__file__).parents[1]


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
    """Every tensor of its last checkpoint as bytes: weights, moments, RNG. (safetensors' header is written in a drawn order.)"""
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


def test_a_run_that_has_no_room_says_so_before_it_writes(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(UserError, match="GB more are needed .*10 checkpoints.*free"):
        train(finished[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_doctor_says_of_a_run_how_far_it_is_what_is_damaged_and_how_to_go_on(run, data_dir, capsys):
    def told():
        return {finding.name: (finding.state, finding.detail) for finding in examine_run(run)}

    first = told()
    assert {state for state, _ in first.values()} == {"works"}
    assert list(first)[:5] == ["run.json", "step-00000002", "step-00000004", "step-00000006", "step-00000008"]
    assert "step 8 of 9 is saved" in first["to go on"][1] and str(data_dir) in first["data"][1] and "2 shards" in first["continuations"][1]
    flip(run / "checkpoints/step-00000006" / FILES[0])
    cut(run / "continuations/continuations-00001.parquet")
    (run / "metrics.jsonl").write_text("")
    with owned(run):
        second = told()
    assert [name for name, (state, _) in second.items() if state == "broken"] == ["step-00000006", "metrics.jsonl", "continuations"]
    assert "sha256" in second["step-00000006"][1] and "lines" in second["metrics.jsonl"][1] and "00001" in second["continuations"][1]
    assert f"process {os.getpid()} on" in second["to go on"][1]
    for checkpoint in checkpoints(run / "checkpoints"):
        empty(checkpoint / "checksums.json")
    (run / "run.json").write_text("{")
    assert told()["to go on"][0] == told()["run.json"][0] == "broken"
    with pytest.raises(UserError, match="holds no run"):
        examine_run(run / "continuations")


def test_a_damaged_newer_checkpoint_never_costs_the_one_that_was_just_written(finished, run, monkeypatch):
    config = finished[0].model_copy(update={"checkpoint": finished[0].checkpoint.model_copy(update={"keep": 1})})
    record = json.loads((run / "run.json").read_text())
    record["config"]["checkpoint"]["keep"] = 1
    (run / "run.json").write_text(json.dumps(record))
    for checkpoint in checkpoints(run / "checkpoints")[1:]:
        flip(checkpoint / FILES[0])
    step = Trainer.train_step

    def killed_at_the_fifth(self, *job):
        if self.step == 5:
            raise KeyboardInterrupt
        step(self, *job)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "train_step", killed_at_the_fifth)
        train(config, run, resume=True)
    assert newest_checkpoint(run / "checkpoints").name == "step-00000004"
    train(config, run, resume=True)
    assert weights(run) == weights(finished[1])


def test_tensors_of_another_file_in_a_checkpoint_are_not_read(finished, run, capsys):
    shutil.copy(run / "checkpoints/step-00000004" / FILES[0], run / "checkpoints/step-00000008/z.safetensors")
    train(finished[0], run, resume=True)
    assert "step-00000008 is damaged (z.safetensors is not of it)" in capsys.readouterr().err
    assert weights(run) == weights(finished[1])


def test_a_signal_just_after_the_data_was_had_loses_no_data(finished, tmp_path, monkeypatch):
    had = Trainer.next_batches

    def interrupted(self, phase):
        batches = had(self, phase)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "next_batches", interrupted)
        with pytest.raises(Stopped):
            train(finished[0], tmp_path / "run")
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000003"
    train(finished[0], tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(finished[1])


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


@pytest.mark.parametrize("content", ["", None])
def test_a_lost_run_record_is_written_again_on_resume(finished, run, content, capsys):
    before = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(content) if content is not None else (run / "run.json").unlink()
    with pytest.raises(UserError, match="other files"):
        train(finished[0], run)
    train(finished[0], run, resume=True)
    assert json.loads((run / "run.json").read_text())["config"] == before["config"]
    assert "run.json is lost" in capsys.readouterr().err


def test_a_damaged_run_record_is_named(finished, run):
    for content in ('{"config"', "[]", '{"config": {}, "processes": 1, "inputs": {}}', "\x00" * 50):
        (run / "run.json").write_text(content)
        with pytest.raises(UserError, match="run.json: .*copy it back"):
            train(finished[0], run, resume=True)


def test_a_run_killed_before_its_record_was_written_is_begun(finished, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.run.json.4321.partial").write_text("{")
    (tmp_path / "new/run.json").write_text("")
    train(finished[0], tmp_path / "new", resume=True)
    assert weights(tmp_path / "new") == weights(finished[1])
    assert not list((tmp_path / "new").glob(".*"))


def test_another_base_model_or_other_data_under_the_same_name_is_refused(finished, run, model_dir, other_model_dir, data_dir, tmp_path):
    for name, place in {"base": model_dir, "data": data_dir}.items():
        shutil.copytree(place, tmp_path / name)
    config = write_config(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "data", **{"checkpoint.keep": 9})
    shutil.rmtree(run)
    train(config, run)
    shutil.rmtree(run / "continuations")
    shutil.copytree(other_model_dir, tmp_path / "base", dirs_exist_ok=True)
    with pytest.raises(UserError, match="another base_model_fingerprint"):
        train(config, run, resume=True)
    shutil.copytree(model_dir, tmp_path / "base", dirs_exist_ok=True)
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    manifest["tables"]["rows-train"]["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another data_fingerprint"):
        train(config, run, resume=True)


def test_lost_and_damaged_lines_of_metrics_are_told_and_the_others_kept(finished, run, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:20], "[]", *lines[5:-1], lines[-1][:-2]]))
    train(finished[0], run, resume=True)
    assert "metrics.jsonl: 2 lines of the" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 9
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints/step-00000009")
    train(finished[0], run, resume=True)
    assert "are lost" in capsys.readouterr().err


def test_metrics_killed_while_they_are_rewritten_lose_nothing(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_owners_file_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("do not lose")
    (tmp_path / "run/.owner").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match="run: cannot be written"), owned(tmp_path / "run"):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "do not lose"


def start(config_file, out_dir, *words):
    command = [sys.executable, "-m", "scripts.train", f"--config={config_file}", f"--out_dir={out_dir}", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition(), process.communicate()[1][-2000:]


def test_a_run_in_another_runs_folder_is_refused_and_sigterm_finishes_the_step_and_saves(finished, tmp_path, model_dir, data_dir):
    write_config(tmp_path / "run.yaml", model_dir, data_dir)
    long = ["schedule.steps=700", "checkpoint.every=350", "validation.prompts=0"]
    first = start(tmp_path / "run.yaml", tmp_path / "run", *long)
    log = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 2, first)
    config = write_config(tmp_path / "run.yaml", model_dir, data_dir, **dict(word.split("=") for word in long))
    with pytest.raises(UserError, match=f"process {first.pid} on .* is writing there"):
        train(config, tmp_path / "run", resume=True)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == STOPPED == 143
    (saved,) = checkpoints(tmp_path / "run/checkpoints")
    step = json.loads((saved / "progress.json").read_text())["step"]
    assert f"stopped by SIGTERM, step {step} of 700 is saved; start it again to go on, scripts.train with --resume\n" in said
    assert json.loads(log.read_text().splitlines()[-1])["step"] == step < 350


def test_a_second_sigterm_ends_the_run_at_once(tmp_path):
    code = "import time\nfrom pipelines.stopping import stopping\nwith stopping():\n print('in', flush=True)\n while True: time.sleep(0.01)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM


def test_drawn_kills_and_damages_lose_nothing():
    """The short form of `python -m tests.faults`."""
    command = [sys.executable, "-m", "tests.faults", "--tries=1", "--kinds=kills,operations,damage"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout
    assert [line.split(",")[-1] for line in finished.stdout.splitlines()] == [" 0 lost"] * 3
