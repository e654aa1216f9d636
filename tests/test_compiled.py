"""torch.compile changes no figure of a run, and says so in a line where it doesn't work."""

import json
import os
import subprocess
import sys

import pytest
from torch._dynamo.utils import counters

from fms_spec.errors import UserError
from pipelines.train.compiled import check_compiler
from pipelines.train.run import train

pytestmark = pytest.mark.slow


def figures(run_dir):
    """{(step, name): value} of losses, gradient norms and acceptance."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = ("loss", "norm", "acceptance")
    return {(record["step"], name): record[name] for record in records for name in record if any(part in name for part in wanted)}


@pytest.fixture
def compiler():
    try:
        check_compiler()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("family, backend", [("hidden_state", "fms"), ("mlp", "transformers")])
def test_a_compiled_run_has_the_losses_and_acceptance_of_one_that_is_not(tmp_path, config_file, compiler, family, backend):
    graphs = []  # compiled so far
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        train(config_file(family, **{"compile": compiled, "base_model.backend": backend}), tmp_path / name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] > graphs[0]  # something was compiled
    plain, compiled = figures(tmp_path / "plain"), figures(tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-5, abs=1e-6) and len(plain) > 50


def test_without_a_compiler_a_run_says_so_before_it_loads_anything(tmp_path, config_file):
    config_file()
    nowhere = str(tmp_path / "nowhere")
    found = subprocess.run(
        [sys.executable, "-m", "scripts.train", f"--config={tmp_path}/run.yaml", f"--out_dir={nowhere}", "compile=true"],
        env=os.environ | {"CXX": nowhere, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode and "compile: true: torch.compile doesn't work here" in found.stderr
    assert "Traceback" not in found.stderr and not (tmp_path / "nowhere").exists()
