"""Several processes on this machine, over gloo: the same training, and one end for all."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_config

from data.distributed import DistributedBatches
from data.prepare.run import prepare
from data.reader import RowReader
from fms_spec.errors import UserError
from pipelines.config import ParallelSection, load_config
from pipelines.export import export
from pipelines.parallel.mesh import group_size
from pipelines.parallel.processes import PATIENCE, Processes, take_gpu
from pipelines.train.checkpoint import whole_checkpoints
from pipelines.train.run import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# One step: four micro-batches of one row in phase 1, of two continuations in phase 2; shards of five prompts, which nothing divides.
STEP = {
    "speculator.pointer.width": 16, "speculator.base_layers": "[1]", "phase1.batch_size": 1, "phase2.batch_size": 2,
    "generation.batch_size": 5, "schedule.steps": 9, "log_every": 1,
}  # fmt: skip
WAYS = {
    2: {"replicate": {}, "shard": {"parallel.base_model": "shard", "parallel.speculator": "shard"}},
    4: {
        "replicate": {},
        "shard": {"parallel.base_model": "shard", "parallel.speculator": "shard"},
        "hybrid": {"parallel.base_model": "hybrid", "parallel.speculator": "hybrid", "parallel.group_size": 2},
        "tensor": {"parallel.base_model": "tensor", "parallel.group_size": 2},
        "cached": {"parallel.base_model": "shard", "hidden_state_cache": "true"},
    },
}


ATTENDING = {
    "speculator": "{family: eagle3, n_predict: 3, layers: 2, draft_vocab_size: 64, base_layers: [0, 1]}",
    "phase1.loss.smooth_l1": 0.0,
}


TEMPLATE = "{% for message in messages %}{{ message.content + ' <eos> ' }}{% endfor %}"


def settings(count, **changes):
    return {**STEP, "phase1.accumulate": 4 // count, "phase2.accumulate": 4 // count, **changes}


def attending_to(place, data, count):
    return settings(count, **ATTENDING, **{"data.dir": place / data})


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir):
    """A folder with prepared data of forty documents, and of conversations whose first rows hold no answer, and run.yaml."""
    directory = tmp_path_factory.mktemp("parallel")
    (directory / "corpus").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        words = torch.randint(0, 94, (60 + 10 * (i % 7),), generator=generator).tolist()
        (directory / "corpus" / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words))
    data = directory / "data"
    prepare(source=str(directory / "corpus"), tokenizer=str(model_dir), out_dir=str(data), seq_length=64, prompt_length=8, held_out=3)
    (directory / "chat.jinja").write_text(TEMPLATE)
    with open(directory / "chats.jsonl", "w") as file:
        for _ in range(20):
            asked, said = (
                " ".join(f"w{word}" for word in torch.randint(0, 94, (count,), generator=generator).tolist()) for count in (90, 20)
            )
            file.write(json.dumps({"prompt": asked, "completion": said}) + "\n")
    prepare(
        source=str(directory / "chats.jsonl"), tokenizer=str(model_dir), out_dir=str(directory / "chats"), seq_length=64, held_out=3,
        chat_template=str(directory / "chat.jinja"),
    )  # fmt: skip
    write_config(directory / "run.yaml", model_dir, data)
    return directory


def job(place, name, resume=False, **changes):
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return {"config": str(place / "run.yaml"), "out_dir": str(place / name), "overrides": overrides, "resume": resume}


def launch(place, words, jobs):
    """torchrun with `words`, as a user would start it."""
    file = place / f"jobs-{Path(jobs[0]['out_dir']).name}.json"
    file.write_text(json.dumps(jobs))
    found = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(found)}
    command = [sys.executable, "-m", "torch.distributed.run", *words, str(ROOT / "tests/parallel_worker.py"), str(file)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_jobs(place, count, jobs):
    """(exit code, what was printed) of processes of one node."""
    process = launch(place, ["--standalone", f"--nproc_per_node={count}"], jobs)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def figures(place, name):
    """Everything a run logged that doesn't depend on the clock."""
    records = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    wanted = ("loss", "grad_norm", "acceptance", "/lr")
    return [(r["step"], key, r[key]) for r in records for key in sorted(r) if key == "tokens" or any(word in key for word in wanted)]


@pytest.fixture(scope="module")
def alone(place):
    """One process, four micro-batches a step."""
    train(load_config(place / "run.yaml", job(place, "alone", **settings(1))["overrides"]), place / "alone", resume=False)
    return figures(place, "alone")


@pytest.fixture(scope="module")
def shared(place):
    """Runs of four and of two processes in every way of sharing; and "moved", begun sharded by four and gone on with by two."""
    early = {"checkpoint.every": 4, "checkpoint.keep": 9}
    moved = {
        4: job(place, "moved", **settings(4, **early, **WAYS[4]["shard"])),
        2: job(place, "moved", resume=True, **settings(2, **early)),
    }
    attending = {4: [], 2: [job(place, f"{data}-2", **attending_to(place, data, 2), **WAYS[2]["shard"]) for data in ("data", "chats")]}
    for count in (4, 2):
        jobs = [job(place, f"{way}{count}", **settings(count, **changes)) for way, changes in WAYS[count].items()]
        code, output = run_jobs(place, count, [moved[count], *attending[count], *jobs])
        assert code == 0, output[-3000:]
        if count == 4:
            checkpoints = whole_checkpoints(place / "moved/checkpoints")
            assert [path.name for path in checkpoints] == ["step-00000004", "step-00000008", "step-00000009"]
            for later in checkpoints[1:]:
                shutil.rmtree(later)
    assert "going on from step 4" in output
    return place


@pytest.mark.parametrize("count, way", [(count, way) for count, ways in WAYS.items() for way in ways])
def test_any_number_of_processes_in_every_way_of_sharing_trains_as_one_does_over_both_phases(alone, shared, count, way):
    found = figures(shared, f"{way}{count}")
    assert [line[:2] for line in found] == [line[:2] for line in alone] and any(key == "phase2/loss" for _, key, _ in found)
    for (step, key, value), (_, _, expected) in zip(found, alone):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7), f"{key} at step {step}"


@pytest.mark.parametrize("data", ["data", "chats"])
def test_heads_that_attend_to_the_text_train_in_parts_as_whole_be_there_rows_without_an_answer(place, shared, data):
    train(load_config(place / "run.yaml", job(place, data, **attending_to(place, data, 1))["overrides"]), place / f"{data}-1", resume=False)
    for (step, key, value), (_, _, expected) in zip(figures(shared, f"{data}-2"), figures(place, f"{data}-1"), strict=True):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7), f"{key} at step {step}"


def test_every_group_of_every_way_waits_as_long_as_continuations_may_take(shared):
    for last in ("shard2", "cached4"):  # the last runs of their starts, after which the groups of all are there
        waits = json.loads((shared / f"{last}.around/found.json").read_text())["waits"]
        assert len(waits) > 1 and set(waits) == {PATIENCE.total_seconds()}


def test_a_producer_of_one_of_several_processes_sees_nothing_of_their_launcher(shared):
    seen = json.loads((shared / "cached4.around/found.json").read_text())["environment"]
    assert set(seen) - set(os.environ) <= {"PYTHONPATH", "OMP_NUM_THREADS"} and "PATH" in seen


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes, chosen = Processes(), []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    processes.count, processes.local_count, processes.local_rank = 4, 2, 1
    take_gpu(processes)
    assert chosen == [1]
    processes.local_count = 4
    with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs: start at most 2"):
        take_gpu(processes)


def test_what_is_sharded_is_held_in_parts(shared):
    held = {
        way: [json.loads((shared / way / f"held-{rank}.json").read_text()) for rank in range(4)]
        for way in ("replicate4", "shard4", "hybrid4", "tensor4")
    }
    whole = held["replicate4"][0]
    layers = whole["base_model"] - 2 * 96 * 32 * 4 - 32 * 4  # without embedding, lm_head and last norm, which stay whole
    for way, parts in {"shard4": 4, "hybrid4": 2, "tensor4": 2}.items():
        for one in held[way]:
            rest = one["base_model"] - (whole["base_model"] - layers)
            assert rest == pytest.approx(layers / parts, rel=0.02)
    for way, parts in {"shard4": 4, "hybrid4": 2}.items():
        for name in ("speculator", "moments"):
            assert sum(one[name] for one in held[way]) == pytest.approx(4 * whole[name] / parts, rel=0.01)


def test_a_run_goes_on_with_another_number_of_processes_and_another_sharding(alone, shared, tmp_path):
    for (step, key, value), (_, _, expected) in zip(figures(shared, "moved"), alone, strict=True):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7), f"{key} at step {step}"
    export(shared / "moved", tmp_path / "speculator")  # in one process


def test_a_run_is_not_gone_on_with_where_its_steps_would_be_other_ones(place, shared):
    code, output = run_jobs(place, 2, [job(place, "replicate4", resume=True, **settings(4))])
    assert code == 1
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 1 and "accumulate x processes (4, now 2)" in errors[0]


@pytest.mark.parametrize(
    "how, message", [("mistake", "a shard is damaged"), ("bug", "ValueError: a bug"), ("killed", "process 1 is gone without a word")]
)
def test_the_end_of_one_process_ends_all_within_seconds_and_its_error_is_told_once(place, how, message):
    code, output = run_jobs(place, 2, [job(place, how, **settings(2, **WAYS[2]["shard"])) | {"fails": how}])
    assert code == 1
    assert sum(message in line for line in output.splitlines()) == 1, output
    assert not [rank for rank in range(2) if Path(f"/proc/{(place / how).with_suffix(f'.{rank}').read_text()}").exists()]
    seconds = time.time() - (place / how / "metrics.jsonl").stat().st_mtime  # since the second step was logged
    assert seconds < 30


@pytest.mark.parametrize("sign, said", [(signal.SIGTERM, "stopped by SIGTERM, step "), (signal.SIGKILL, "launcher of this run is gone")])
def test_a_launcher_that_is_asked_to_end_has_the_step_saved_and_one_that_is_killed_ends_all(place, sign, said):
    name = f"launcher-{sign.name}"
    long = {"schedule.steps": 2000, "checkpoint.every": 1000, "validation.prompts": 0}
    process = launch(place, ["--standalone", "--nproc_per_node=2"], [job(place, name, **settings(2, **long)) | {"fails": "never"}])
    log, deadline = place / name / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sign)
    output, _ = process.communicate(timeout=60)
    assert sum(said in line for line in output.splitlines()) == 1, output
    pids = [Path(f"/proc/{(place / name).with_suffix(f'.{rank}').read_text()}") for rank in range(2)]
    while any(pid.exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(pid.exists() for pid in pids)
    assert len(whole_checkpoints(place / name / "checkpoints")) == (sign == signal.SIGTERM)


def test_two_nodes_with_a_copy_each_train_as_one_process_does_and_an_error_is_told_on_both(place, alone):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ways = {"parallel.base_model": "hybrid", "parallel.speculator": "hybrid"}
    late, broken = (job(place, name, **settings(4, **ways)) for name in ("nodes", "nodes_broken"))
    jobs = [late | {"late": 20}, broken | {"fails": "mistake"}]
    words = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    nodes = [launch(place, words, jobs) for _ in range(2)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    for (step, key, value), (_, _, expected) in zip(figures(place, "nodes"), alone, strict=True):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7), f"{key} at step {step}"
    assert [node.returncode for node in nodes] == [1, 1]
    assert [output.count("error: process 3: a shard is damaged") for output in outputs] == [1, 1], outputs


def test_shares_of_a_stream_are_the_stream(place):
    rows = lambda: RowReader(place / "data", batch_size=3, seed=1)  # noqa: E731
    whole = rows()
    expected = [next(whole).row_ids.tolist() for _ in range(60)]  # over the end of an epoch
    shares = [DistributedBatches(rows(), number, 4) for number in range(4)]
    assert [next(shares[place % 4]).row_ids.tolist() for place in range(60)] == expected
    assert len({json.dumps(share.state_dict()) for share in shares}) == 1
    fewer = [DistributedBatches(rows(), number, 2) for number in range(2)]
    for share in fewer:
        share.load_state_dict(shares[0].state_dict())
    assert [next(fewer[place % 2]).row_ids.tolist() for place in range(4)] == [next(whole).row_ids.tolist() for _ in range(4)]


def test_groups_that_do_not_divide_the_processes_are_refused():
    processes = Processes()
    processes.count, processes.local_count = 6, 6
    assert [group_size(kind, ParallelSection(group_size=3), processes) for kind in ("replicate", "shard", "hybrid", "tensor")] == [
        1,
        6,
        3,
        3,
    ]
    assert group_size("hybrid", ParallelSection(), processes) == 6
    assert {group_size(kind, ParallelSection(group_size=4), Processes()) for kind in ("shard", "hybrid", "tensor")} == {1}  # alone
    with pytest.raises(UserError, match="group_size 4 does not divide the 6"):
        group_size("hybrid", ParallelSection(group_size=4), processes)
