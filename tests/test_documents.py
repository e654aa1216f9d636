"""The documents: what they link to, name and show is there. tests/test_scripts.py runs their blocks."""

import importlib
import inspect
import json
import re
from pathlib import Path

import fire
import pytest
from documents import DOCUMENTS, GUIDES, ROOT, anchors, commands, languages, links, spans, text_of

from pipelines.cli import read_words
from pipelines.config import load_config
from pipelines.measure.recipe import compared

SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(document):
    for path, heading in links(document):
        assert path.exists(), f"{document} links to {path}"
        assert not heading or heading in anchors(path.resolve().relative_to(ROOT)), f"{document} links to {heading} of {path}"


def test_a_reader_of_the_readme_finds_every_guide_and_reads_no_more_than_149_lines():
    linked = {path.resolve() for path, _ in links("README.md")}
    assert linked >= {ROOT / document for document in DOCUMENTS if document != "README.md"}
    assert len(text_of("README.md").splitlines()) < 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_show_only_blocks_that_are_run(document):
    assert languages(document) <= ({"bash", "yaml", "python"} if document in GUIDES else set())


def test_the_readmes_make_targets_exist_and_ci_runs_its_test_command():
    targets = {command.split()[1] for command in commands("README.md") if command.startswith("make ")}
    assert targets == {"quickstart", "test"}
    targets |= {span.split()[1] for span in spans("README.md") if span.startswith("make ")}
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= defined
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()


def test_the_readme_names_every_command_and_every_folder():
    names = set(spans("README.md"))
    assert {name for name in names if re.fullmatch(r"scripts\.\w+", name)} == {f"scripts.{script}" for script in SCRIPTS}
    assert anchors("docs/commands.md") >= {f"scripts{script}" for script in SCRIPTS}
    rooms = {path.parent.name for top in ("fms_spec", "data", "pipelines", "scripts") for path in (ROOT / top).rglob("__init__.py")}
    assert {Path(name).name for name in names if name.endswith("/")} == rooms | {"configs", "docs", "benchmarks", "tests"}


def written_commands(document):
    """Commands of ours in a document's text, with what follows their names: (class of their arguments, words)."""
    for span in spans(document):
        module, *words = span.removeprefix("python -m ").split()
        if module.removeprefix("scripts.") not in SCRIPTS or not words or "--help" in words:
            continue
        name = words.pop(0).title().replace("_", "") if module == "scripts.benchmark" else "Arguments"
        if words:
            yield getattr(importlib.import_module(module), name), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text_have_flags_that_exist_and_values_that_fit(document):
    for arguments, words in written_commands(document):
        required = {name for name, parameter in inspect.signature(arguments).parameters.items() if parameter.default is parameter.empty}
        rest = [f"--{name}=x" for name in required if "…" in words and not any(word.startswith(f"--{name}=") for word in words)]
        words = [word.replace("=…", "=heads") for word in words if word != "…"]
        flags, overrides = read_words(arguments, words + rest, overrides=True)
        parsed = fire.Fire(arguments, command=flags, serialize=lambda _: None)  # checks the values, and raises
        if overrides:
            load_config(ROOT / parsed.config, overrides)


def rows_under(document, heading):
    """Cells of the first table under a heading, without the table's own."""
    part = text_of(document).split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*$", part, re.MULTILINE)[2:]]


def read_lines(name):
    return [json.loads(line) for line in (ROOT / "benchmarks" / name).read_text().splitlines()]


def test_the_table_of_recipes_says_what_their_results_say():
    shown, found = rows_under("benchmarks/README.md", "What the quickstart's budget teaches"), []
    for line in compared(read_lines("recipe-2-core-xeon.jsonl")):
        low, high = line["acceptance_length_interval"]
        less, more = line["more_interval"]
        found.append([
            f"{line['acceptance_length']:.3f} ({low:.2f} to {high:.2f})",
            f"{line['more']:+.3f} ({less:+.3f} to {more:+.3f})" if line["variant"] != "shipped" else "",
            " / ".join(f"{share:.3f}" for share in line["acceptance_per_position"]),
            f"{line['averaged']['acceptance_length']:.3f}", f"{line['head_cpu_seconds'] / 60:.1f}",
        ])  # fmt: skip
    assert sorted(row[1:] for row in shown) == sorted(found)


def test_the_table_of_the_longer_run_says_what_its_results_say():
    results = {f"{line['step']:,}": line for line in read_lines("longer-run-2-core-xeon.jsonl")}
    for step, positions, _, length, shares in rows_under("benchmarks/README.md", "A longer run"):
        line = results[step]
        assert positions == f"{line['positions']:,}" and length == f"{line['acceptance_length']:.3f}"
        assert shares == " / ".join(f"{share:.3f}" for share in line["acceptance_per_position"])
