"""Rules of the house that a reader may rely on."""

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from documents import ROOT

MAY_IMPORT = {
    "fms_spec": {"fms_spec"},
    "data": {"data", "fms_spec"},
    "pipelines": {"pipelines", "data", "fms_spec"},
    "scripts": {"scripts", "pipelines", "data", "fms_spec"},
}


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_those_they_may(package):
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            ours = {name.split(".")[0] for name in names} & set(MAY_IMPORT)
            assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours}"


ROOMS = [f"pipelines.{room}" for room in ("measure", "train", "plan", "generate", "parallel", "machine", "show")]


def modules():
    """{dotted name: file} of everything that may be imported."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for package in MAY_IMPORT for path in sources(package)}


def imported(path, known):
    """Names of `known` modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def test_no_module_imports_one_that_imports_it():
    known = modules()
    graph = graphlib.TopologicalSorter({name: imported(path, known) for name, path in known.items()})
    graph.prepare()  # raises CycleError, which names them


def test_rooms_of_pipelines_import_only_those_below_them():
    known = modules()
    for place, room in enumerate(ROOMS):
        for name, path in known.items():
            if name.startswith(room + "."):
                above = {other for other in imported(path, known) if other.startswith(tuple(f"{higher}." for higher in ROOMS[:place]))}
                assert not above, f"{name} imports {above}"


def test_no_command_imports_another():
    known = [name for name in modules() if name.startswith("scripts.")]
    assert not {name: found for name in known if (found := imported(modules()[name], known))}


def test_every_folder_says_what_belongs_there():
    folders = {path.parent for package in MAY_IMPORT for path in sources(package)}
    for folder in folders:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert said and len(said) > 40, folder


def test_families_are_known_to_the_registry_alone():
    families = {f"fms_spec.speculators.{name}" for name in ("mlp", "hidden_state", "eagle3", "medusa")}
    known = modules()
    assert {name for name, path in known.items() if imported(path, known) & families} == {"fms_spec.speculators.registry"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_files_stay_under_300_lines(package):
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(package)}
    assert not {name: lines for name, lines in long.items() if lines > 300}


def test_the_wheel_holds_fms_spec_and_nothing_else(tmp_path):
    # Built from a copy of what is under version control, so that no build folder is left behind; with the packages that are here.
    source = tmp_path / "source"
    left_out = (".git", ".venv", ".*_cache", "*.egg-info", "build", "quickstart", "quickstart-chat", "runs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path / "wheels", source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fms_spec"}
    assert {"fms_spec/speculators/mlp.py", "fms_spec/py.typed"} <= set(names)
