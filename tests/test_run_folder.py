"""A run's folder beside its checkpoints: what it is, its log, its one owner, and how a run in it is stopped and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import write_config
from forked import ROOT, Command
from test_checkpoint import FILES, cut, empty, finished, flip, run, weights  # noqa: F401 (two are fixtures)

from fms_spec.errors import UserError
from fms_spec.files import owned
from pipelines.parallel.stopping import STOPPED, Stopped
from pipelines.train.checkpoint import checkpoints
from pipelines.train.loop import Trainer
from pipelines.train.metrics import Metrics
from pipelines.train.run import train
from pipelines.train.run_state import examine_run, launcher_of


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


@pytest.mark.parametrize(
    "counts, words",
    [
        ({"processes": 1, "processes_per_node": 1}, "python"),
        ({"processes": 2}, "torchrun --standalone --nproc_per_node=2"),  # as records of before say
        ({"processes": 8, "processes_per_node": 8}, "torchrun --standalone --nproc_per_node=8"),
        (
            {"processes": 32, "processes_per_node": 8},
            "torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HEAD:29500 --nproc_per_node=8",
        ),
    ],
)
def test_a_run_of_several_processes_is_gone_on_with_by_as_many_on_each_node(counts, words):
    assert launcher_of(counts) == words.split()


def test_a_signal_just_after_the_data_was_had_loses_no_data(finished, tmp_path, monkeypatch):
    had = Trainer.read

    def interrupted(self, phase):
        batches = had(self, phase)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "read", interrupted)
        with pytest.raises(Stopped):
            train(finished[0], tmp_path / "run")
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000003"
    train(finished[0], tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(finished[1])


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


def test_a_lock_that_a_killed_writer_left_on_a_shard_that_is_there_is_removed_on_resume(finished, run):
    (run / "continuations/.continuations-00001.parquet.lock").touch()
    train(finished[0], run, resume=True)
    assert not list((run / "continuations").glob(".*"))


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
    return Command(["scripts.train", f"--config={config_file}", f"--out_dir={out_dir}", *words])


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
    code = "import time\nfrom pipelines.parallel.stopping import stopping\n"
    code += "with stopping():\n print('in', flush=True)\n while True: time.sleep(0.01)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM


@pytest.mark.slow
def test_drawn_kills_and_damages_lose_nothing():
    """The short form of `python -m tests.faults`."""
    command = [sys.executable, "-m", "tests.faults", "--tries=1", "--kinds=kills,operations,damage"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout
    assert [line.split(",")[-1] for line in finished.stdout.splitlines()] == [" 0 lost"] * 3
