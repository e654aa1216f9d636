"""The quickstart on the real small model: the whole way, stopped in the middle and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from test_house import ROOT

from pipelines.machine.small_model import PACKAGE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} carries the small base model; make test installs it"),
]


def test_a_quickstart_stopped_in_training_goes_on_and_ends_with_a_lossless_report(tmp_path):
    out = tmp_path / "quickstart"
    command = [sys.executable, "-m", "scripts.quickstart", f"--out_dir={out}", "--scale=0.05"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not list(out.glob("run/checkpoints/step-*7")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    parts = json.loads((out / "parts.json").read_text())
    assert set(parts) == {"base model", "data"}

    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=os.environ | {"COLUMNS": "120"})
    assert second.returncode == 0, second.stderr[-3000:]
    assert "== data" not in second.stdout and "going on from step" in second.stdout
    report = json.loads((out / "report.json").read_text())
    names = {
        "acceptance_length", "acceptance_per_position", "chain_acceptance_length", "plain_tokens_per_s", "tokens_per_s", "speedup",
        "lossless", "prompt_lookup", "phase1_steps", "phase2_steps", "seconds_by_part",
    }  # fmt: skip
    assert names <= set(report) and all(name in second.stdout for name in names)
    assert report["lossless"] is True and report["differing"] == 0
    assert report["acceptance_length"] > 1.1, "even a twentieth of the budget learns something"
    assert report["phase1_steps"] > 2 * report["phase2_steps"] > 0
    parts = {name: seconds for name, seconds in report["seconds_by_part"].items() if not name.startswith("training: ")}
    within = sum(seconds for name, seconds in report["seconds_by_part"].items() if name.startswith("training: "))
    assert set(parts) == {"base model", "data", "training", "export", "evaluation"} and parts["training"] >= within * 0.999
    assert sum(parts.values()) == pytest.approx(report["seconds_in_all"])
    assert (out / "speculator/model.safetensors").is_file() and list((out / "run/continuations").glob("*.parquet"))
