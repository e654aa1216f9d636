"""What scripts.doctor says of environments that lack something or hold something broken."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import write_model
from test_house import ROOT

from fms_spec.errors import UserError
from fms_spec.vllm import versions as vllm_versions
from pipelines.machine import doctor
from pipelines.measure.benchmarks import run_continuations, run_serving
from pipelines.show.console import print_findings


def state(finding):
    return finding.state, finding.detail


def test_without_vllm_its_lines_say_that_it_is_missing_and_what_to_install(monkeypatch, capsys):
    real = vllm_versions.version_of
    for module in (vllm_versions, doctor):
        monkeypatch.setattr(module, "version_of", lambda name: None if name.startswith("vllm") else real(name))
    kinds = {finding.name: finding for finding in doctor.examine()}
    assert kinds["prepare, train, decode"].state == "works"
    assert kinds["continuations by vLLM"].state == "missing" and "fms-spec[vllm]" in kinds["continuations by vLLM"].detail
    assert kinds["serving in vLLM"].state == kinds["vllm serve"].state == "missing"
    print_findings(kinds.values())
    assert "pip install 'fms-spec[vllm]'" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", [run_continuations, run_serving])
def test_without_vllm_a_benchmark_that_needs_it_names_a_wrong_folder_first(monkeypatch, tmp_path, benchmark):
    monkeypatch.setattr(vllm_versions, "version_of", lambda name: None)
    base, wrong = str(write_model(tmp_path / "base")), str(tmp_path / "wrong")
    with pytest.raises(UserError, match="wrong"):
        benchmark(SimpleNamespace(base_model=base, speculator=wrong, prompts=wrong, out=None))


@pytest.mark.parametrize("version", ["0.1.0", "99.0.0"])
def test_a_vllm_that_was_not_tried_is_named_with_the_range_that_was(monkeypatch, version):
    monkeypatch.setattr(vllm_versions, "version_of", lambda name: version)
    finding = doctor.plugin()
    assert finding.state == "broken" and version in finding.detail and str(vllm_versions.TRIED) in finding.detail


def test_a_plugin_that_is_left_out_by_the_environment_is_told(monkeypatch):
    monkeypatch.setattr(vllm_versions, "version_of", lambda name: "0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    assert state(doctor.plugin()) == ("broken", "VLLM_PLUGINS=something_else leaves the plugin out; add fms_spec to it")
    monkeypatch.setenv("VLLM_PLUGINS", "something_else,fms_spec")
    assert doctor.plugin().state == "works"


@pytest.mark.parametrize(
    "statement, error",
    [
        ("pass", None),
        ("raise ImportError('no such symbol')", "ImportError: no such symbol"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_what_an_import_fails_with_is_told_also_where_it_says_nothing(statement, error):
    assert doctor.error_of(statement) == error


@pytest.mark.slow
def test_a_torchvision_that_does_not_fit_ends_with_exit_code_1_and_the_mend(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "scripts.doctor"]
    finished = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path, "COLUMNS": "300"}, capture_output=True, text=True, cwd=tmp_path
    )
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("│ torchvision")]
    assert "broken" in line and "nms does not exist" in line and "pip uninstall torchvision" in line
