"""An export is there whole or not at all, touches nothing else, and doesn't hang on what the run wrote beside its checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import load_speculator, write_config

from fms_spec.errors import UserError
from fms_spec.files import sha256_of
from pipelines.export import export
from pipelines.train.checkpoint import whole_checkpoints
from pipelines.train.run import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir, data_dir):
    place = tmp_path_factory.mktemp("trained")
    config = write_config(place / "run.yaml", model_dir, data_dir, **{"schedule.steps": 8})
    train(config, place / "run")
    return place / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(run, out_dir, match):
    with pytest.raises(UserError, match=match) as error:
        export(run, out_dir)
    assert "\n" not in str(error.value)


def edit_speculator(checkpoint, **values):
    """Change speculator.json of a checkpoint that is whole all the same; None takes a value out."""
    file, sums = checkpoint / "speculator.json", checkpoint / "checksums.json"
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    entry = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {file.name: entry}))


def test_an_export_says_of_its_weights_what_they_are_and_leaves_nothing_beside_it(run, tmp_path, base_model):
    out = export(run, tmp_path / "new/speculator")
    config = json.loads((out / "config.json").read_text())
    assert config["weights_sha256"] == {"model.safetensors": sha256_of(out / "model.safetensors")}
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["speculator"]
    load_speculator(out, base_model)


def test_a_checkpoint_named_from_within_its_own_folder_is_of_its_run(run, tmp_path, monkeypatch):
    export(run, tmp_path / "whole")
    monkeypatch.chdir(run / "checkpoints")
    export(Path("step-00000008"), tmp_path / "within")
    cards = [(tmp_path / name / "README.md").read_text().replace(f"{tmp_path / name}", "") for name in ("whole", "within")]
    assert cards[0] == cards[1] and "revision" in cards[0]


@pytest.mark.parametrize("folder", [True, False])
def test_what_has_a_name_like_a_partial_export_is_the_users_and_stays(run, tmp_path, folder):
    mine = tmp_path / "speculator.partial"
    if folder:
        mine.mkdir()
        mine /= "thesis.txt"
    mine.write_text("do not lose")
    out = export(run, tmp_path / "speculator")
    assert mine.read_text() == "do not lose" and not (out / "thesis.txt").exists()


ODD_FILES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_text(""),
    "a list": lambda file: file.write_text("[]"),
    "other keys": lambda file: file.write_text('{"step": 8, "validation/acceptance_length": "x"}\n'),
    "a folder": lambda file: [file.unlink(), file.mkdir()],
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ODD_FILES)
def test_facts_that_can_not_be_read_are_left_out_of_the_model_card(run, tmp_path, base_model, capsys, name, damage):
    whole = (export(run, tmp_path / "whole") / "README.md").read_text()
    told = {"run.json": "revision", "metrics.jsonl": "acceptance length"}[name]
    ODD_FILES[damage](run / name)
    card = (export(run, tmp_path / "speculator") / "README.md").read_text()
    assert told in whole and told not in card and "8 steps over" in card
    if name == "run.json" and damage != "missing":
        assert capsys.readouterr().err == f"warning: {run / name}: can't be used, and the model card leaves it out\n"
    load_speculator(tmp_path / "speculator", base_model)


@pytest.mark.parametrize(
    "key, value",
    [("torch_dtype", None), ("torch_dtype", "int3"), ("base_model_name_or_path", None), ("base_model_fingerprint", None), ("width", "16"),
     ("width", 10**12), ("n_predict", 0), ("n_predict", 10**9), ("vocab_size", 10**12)],
)  # fmt: skip
def test_a_value_of_a_checkpoints_config_that_can_not_be_is_refused_by_its_key(run, tmp_path, key, value):
    newest = whole_checkpoints(run / "checkpoints")[-1]
    edit_speculator(newest, **{key: value})
    refused(newest, tmp_path / "speculator", f"{newest.name}/speculator.json: .*{key}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sizes_that_the_checkpoints_files_do_not_hold_are_refused_before_memory_is_asked_for(run, tmp_path):
    newest = whole_checkpoints(run / "checkpoints")[-1]
    edit_speculator(newest, width=2**24, inner_dim=2**24)
    refused(newest, tmp_path / "speculator", "asks for .* bytes of weights")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_place_that_can_not_be_written_is_one_line_that_names_it(run, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/x")
    for place, match in {
        "loop": "exists already", "dangling": "exists already", "run/run.json/below": "cannot be written", "n" * 300: "cannot be written",
    }.items():  # fmt: skip
        refused(run, tmp_path / place, match)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "loop", "run"]
    refused(run, Path("/proc/export"), "cannot be written")
    export(run, tmp_path / ("n" * 250))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small disk")
@pytest.mark.parametrize("options", ["size=4k", "size=16k", "ro"])
def test_a_disk_that_is_full_or_read_only_is_one_line_and_nothing_is_left(run, tmp_path, options):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        refused(run, disk / "new/speculator", "cannot be written")
        assert not any(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_what_a_killed_export_left_is_removed_by_the_next_one_and_a_living_ones_is_not(run, tmp_path):
    out = tmp_path / "speculator"
    script = (
        "import sys, time, pathlib, pipelines.export as export\n"
        "export.model_card = lambda *_: time.sleep(99)\n"
        "export.export(*map(pathlib.Path, sys.argv[1:]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, run, out], cwd=ROOT)
    found, deadline = [], time.monotonic() + 60
    while not found and process.poll() is None and time.monotonic() < deadline:
        found = [path for path in tmp_path.glob(".export-*") if (path / ".owner").exists()]
        time.sleep(0.01)
    try:
        export(run, out)
        assert found and found[0].is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert found[0].is_dir()
    shutil.rmtree(out)
    export(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "speculator"]


@pytest.mark.slow
def test_of_exports_at_once_one_is_there_whole_and_nothing_is_left_of_the_others(run, tmp_path):
    command = [sys.executable, "-c", "import sys; from scripts.export import *; input(); main(Arguments, run)"]
    words = [f"--checkpoint={run}", f"--out_dir={tmp_path}/some/where/../speculator"]
    racing = [subprocess.Popen([*command, *words], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate("\n", timeout=120)[1] for process in racing]
    codes = [process.returncode for process in racing]
    assert sorted(codes) == [0, 1, 1] and all("exists already" in words for code, words in zip(codes, said) if code)
    assert os.listdir(tmp_path / "some") == ["speculator"]
