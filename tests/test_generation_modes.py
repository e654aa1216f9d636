"""Phase 2's continuations written by the trainer, ahead of it or alongside it: the same run to the bit, whoever dies on the way."""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import prompts_of, write_config
from forked import Command, run
from test_continuation_writer import contents, wait_for
from test_training import losses, records, weights_of

import pipelines.generate.supply
import pipelines.train.run
from data.continuations.store import ContinuationStore
from data.continuations.supply import Alongside
from fms_spec.errors import UserError
from pipelines.config import GenerationSection
from pipelines.generate.engines import EmbeddedEngine
from pipelines.generate.producers import Producers, own_devices
from pipelines.train.checkpoint import whole_checkpoints
from pipelines.train.run import train

pytestmark = pytest.mark.slow

# Five shards of two prompts, the last of one; four steps of phase 2 on three rows each, so that batches span shards and epochs.
SMALL = {"generation.batch_size": 2, "phase2.batch_size": 3, "schedule.steps": 14, "checkpoint.every": 4, "validation.prompts": 0}
ALONGSIDE = SMALL | {"generation.mode": "alongside", "generation.shards_ahead": 1}


@pytest.fixture(scope="module")
def inline(tmp_path_factory, model_dir, data_dir):
    """A run whose trainer wrote its continuations: (its folder, its weights)."""
    folder = tmp_path_factory.mktemp("inline")
    train(write_config(folder / "run.yaml", model_dir, data_dir, **SMALL), folder / "run", resume=False)
    return folder / "run", weights_of(folder / "run", folder)


def producers_of(run_dir):
    """Process ids of the living producers that write for a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if "scripts.generate_continuations" in words and f"--out_dir={run_dir / 'continuations'}" in words:
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


def test_continuations_written_ahead_by_the_command_give_the_bits_of_a_run_that_writes_them_itself(
    tmp_path, config_file, inline, monkeypatch
):
    ahead = SMALL | {"generation.mode": "ahead", "data.continuations": tmp_path / "ahead"}
    with monkeypatch.context() as patched:
        patched.setattr(pipelines.train.run, "load_base_model", lambda *_, **__: pytest.fail("the base model was loaded"))
        with pytest.raises(UserError, match="ahead: 5 shards .* are missing; run python -m scripts.generate_continuations ") as error:
            train(config_file(**ahead), tmp_path / "run", resume=False)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["run.yaml"]
    command = str(error.value).split("run python -m ")[1].split()
    assert run(*command, "--shards=3:5").returncode == 0
    finished = run(*command)
    assert "3 shards of 5 written" in finished.stdout and "9 rows" in finished.stdout
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert "shards of" not in again.stdout and "is complete" in again.stdout
    assert json.loads((tmp_path / "ahead/manifest.json").read_text())["environment"]["versions"]["torch"]
    train(config_file(**ahead), tmp_path / "run", resume=False)
    assert weights_of(tmp_path / "run", tmp_path) == inline[1] and losses(tmp_path / "run") == losses(inline[0])
    written = contents(inline[0] / "continuations")
    assert written and written.items() <= contents(tmp_path / "ahead").items()
    with pytest.raises(UserError, match=r"written with another temperature \(0.8 there, 0.5 asked"):
        train(config_file(**ahead | {"generation.temperature": 0.5}), tmp_path / "other", resume=False)


def test_producers_keep_the_asked_distance_and_may_die_without_a_bit_of_difference(tmp_path, config_file, inline, monkeypatch, capfd):
    have = Alongside.have

    def slowly(supply, index, begun):
        there = lambda: sum(map(supply.store.has, range(5)))  # noqa: E731
        if begun in (2, 3):  # this is not told yet: one shard beyond the one before
            wait_for(lambda: there() == begun)
            time.sleep(0.5)
            assert there() == begun
        if begun == 3:
            os.kill(supply.producers.processes[0].pid, signal.SIGKILL)
        return have(supply, index, begun)

    monkeypatch.setattr(Alongside, "have", slowly)
    train(config_file(**ALONGSIDE), tmp_path / "run", resume=False)
    assert "producer 0 ended (code -9); starting it again" in capfd.readouterr().err
    assert weights_of(tmp_path / "run", tmp_path) == inline[1] and losses(tmp_path / "run") == losses(inline[0])
    last = [record for record in records(tmp_path / "run") if "time_share/waiting" in record][-1]
    assert last["time_share/waiting"] > 0.2 and last["time_share/generation"] == 0 and last["producer/tokens_per_s"] > 0
    assert any(record.get("producer/waiting_share", 0) > 0.2 for record in records(tmp_path / "run"))
    assert producers_of(tmp_path / "run") == []


def test_a_whole_folder_of_continuations_is_only_read_whatever_the_mode(tmp_path, config_file, inline, monkeypatch):
    for touch in ("post_shards_begun", "claim", "_write"):
        monkeypatch.setattr(ContinuationStore, touch, lambda *_: pytest.fail("something was written to it"))
    for mode in ("inline", "alongside"):
        words = SMALL | {"generation.mode": mode, "data.continuations": inline[0] / "continuations"}
        train(config_file(**words), tmp_path / mode, resume=False)
        assert weights_of(tmp_path / mode, tmp_path) == inline[1]


def test_a_killed_trainer_takes_its_producers_with_it_and_its_run_goes_on_to_the_same_bits(tmp_path, config_file, inline):
    config, run_dir = config_file(**ALONGSIDE), tmp_path / "run"
    words = [f"{key}={value}" for key, value in ALONGSIDE.items()]
    command = ["scripts.train", f"--config={tmp_path / 'run.yaml'}", f"--out_dir={run_dir}", *words]
    process = Command(command)
    wait_for(lambda: producers_of(run_dir) and (run_dir / "continuations").exists() and contents(run_dir / "continuations"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not producers_of(run_dir), seconds=10)
    train(config, run_dir, resume=True)
    assert weights_of(run_dir, tmp_path) == inline[1] and losses(run_dir) == losses(inline[0])


def test_on_a_full_disk_a_run_keeps_what_it_has_trained_and_ends_with_the_same_bits_once_there_is_room(
    tmp_path, config_file, inline, monkeypatch
):
    fsync = os.fsync

    def full(file):
        if "continuations-00002" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="continuations-00002.parquet: cannot be written .No space left on device"):
            train(config_file(**SMALL), tmp_path / "run", resume=False)
    assert sorted(contents(tmp_path / "run/continuations")) == sorted(os.listdir(tmp_path / "run/continuations"))
    assert whole_checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000006"
    train(config_file(**SMALL), tmp_path / "run", resume=True)
    assert weights_of(tmp_path / "run", tmp_path) == inline[1] and losses(tmp_path / "run") == losses(inline[0])


def test_producers_that_cannot_work_end_the_run_with_their_own_words_and_another_mode_resumes_it(
    tmp_path, config_file, inline, monkeypatch, capfd
):
    failing = ["-c", "import sys; print('error: no room on the device', file=sys.stderr); sys.exit(1)"]
    with monkeypatch.context() as patched:
        patched.setattr(pipelines.generate.supply, "command_of", lambda *_: failing)
        with pytest.raises(UserError, match="producer 0: no room on the device; its log is .*producer-0.log"):
            train(config_file(**ALONGSIDE), tmp_path / "run", resume=False)
    assert "starting it again" not in capfd.readouterr().err
    assert whole_checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000005"
    train(config_file(**SMALL), tmp_path / "run", resume=True)
    assert weights_of(tmp_path / "run", tmp_path) == inline[1] and losses(tmp_path / "run") == losses(inline[0])


def test_the_first_error_is_told_even_if_no_checkpoint_can_be_written_either(tmp_path, config_file, monkeypatch, capfd):
    fsync = os.fsync

    def full(file):
        if any(name in os.readlink(f"/proc/self/fd/{file}") for name in ("continuations", "checkpoints")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="continuations-00000.parquet: cannot be written"):
        train(config_file(**SMALL | {"checkpoint.every": 14}), tmp_path / "run", resume=False)
    assert "up to step 5 is not saved: checkpoint" in capfd.readouterr().err


def test_a_shard_has_the_same_text_whoever_writes_it_and_no_two_shards_draw_the_same(base_model):
    settings = GenerationSection(max_new_tokens=12)
    prompts = torch.stack(prompts_of(5, 5, 5))

    def texts(index, engine):
        assert engine.wants_more and engine.idle
        engine.submit(index, prompts)
        assert not engine.wants_more and not engine.idle
        ((done, continuations, reasons),) = engine.step()
        assert done == index and engine.idle and len(reasons) == 3
        return [continuation.tolist() for continuation in continuations]

    first = EmbeddedEngine(settings, 0, base_model)
    assert texts(3, first) == texts(3, first) == texts(3, EmbeddedEngine(settings, 0, base_model))
    assert texts(3, first) != texts(4, first) and texts(3, first) != texts(3, EmbeddedEngine(settings, 1, base_model))


def test_a_producers_last_words_are_those_of_its_last_start(tmp_path):
    (tmp_path / "producer-0.log").write_text("error: of another run\n")
    producers = Producers([sys.executable, "-c", "raise SystemExit('no such luck')"], [{}], tmp_path)
    producers.start()
    with pytest.raises(UserError, match="ended 3 times without a shard: no such luck;"):
        while True:
            producers.check()
            time.sleep(0.02)
    assert "of another run" in (tmp_path / "producer-0.log").read_text()
    producers.stop()


def test_stopped_producers_leave_neither_children_nor_zombies(tmp_path):
    child = ["sh", "-c", "trap '' TERM; sleep 600"]  # it doesn't end by being asked
    command = f"import os, subprocess, time; print(os.getpid(), subprocess.Popen({child}).pid, flush=True); time.sleep(600)"
    producers = Producers([sys.executable, "-c", command], [{}, {"CUDA_VISIBLE_DEVICES": "1"}], tmp_path / "logs")
    producers.start()
    logs = [tmp_path / f"logs/producer-{number}.log" for number in range(2)]
    wait_for(lambda: all(log.read_text().endswith("\n") for log in logs))
    time.sleep(0.2)  # until the shells ignore it
    started = [int(word) for log in logs for word in log.read_text().split()]
    assert b"CUDA_VISIBLE_DEVICES=1" in Path(f"/proc/{started[2]}/environ").read_bytes()
    producers.stop()
    wait_for(lambda: not any(alive(process) for process in started), seconds=5)
    assert len(started) == 4 and not Path(f"/proc/{started[0]}").exists() and not Path(f"/proc/{started[2]}").exists()


def test_producers_on_a_machine_with_gpus_get_gpus_that_no_trainer_uses(tmp_path, config_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("pipelines.plan.feasible.device_memory", lambda: 2**40)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own_devices([""], trainers=1) == ["1"] and own_devices(["", "3", ""], trainers=1) == ["1", "3", "2"]
    assert own_devices(["2,3"], trainers=2) == ["2,3"]
    with pytest.raises(UserError, match="producer_devices: GPU 1 is a trainer's, which use 0, 1"):
        own_devices(["3", "1,2"], trainers=2)
    with pytest.raises(UserError, match="4 trainers and 1 producers want a GPU each, and there are 4"):
        own_devices([""], trainers=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert own_devices([""], trainers=1) == ["7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(UserError, match="set generation.mode=inline or ahead"):
        train(config_file(**ALONGSIDE), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def alive(process):
    """Whether a process runs; one that only waits to be noticed by its parent doesn't."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
