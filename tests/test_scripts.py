"""The commands as a user types them: the README's own, and mistakes on the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_model
from test_house import ROOT, readme_commands

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


def run(directory, *words):
    return subprocess.run([sys.executable, *words], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus_dir):
    """A directory with what the README supposes: corpus/, base_model/ and first.yaml, the README's own."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "corpus").symlink_to(corpus_dir)
    write_model(directory / "base_model")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (directory / "first.yaml").write_text(yaml)
    return directory


def test_the_readmes_commands_do_what_it_says(place):
    commands = [command for command in readme_commands() if command.startswith("python -m scripts.")]
    assert [command.split()[2] for command in commands] == [
        "scripts.prepare_data", "scripts.train", "scripts.export", "scripts.evaluate"
    ]  # fmt: skip
    for command in commands:
        finished = run(place, *command.split()[1:])
        assert finished.returncode == 0, finished.stderr
    report = json.loads((place / "report.json").read_text())
    assert report["lossless"] is True and 1 <= report["acceptance_length"] <= 4
    assert len(report["acceptance_per_position"]) == 3 and report["plain_tokens_per_s"] > 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("scripts.train --config=first.yaml", "--out_dir is required"),
        ("scripts.train --config=first.yaml --out_dir=new --resum", "did you mean --resume"),
        ("scripts.train --config=nowhere.yaml --out_dir=new", "nowhere.yaml: can't be read"),
        ("scripts.train --config=first.yaml --out_dir=new optimizer.lr=fast", "optimizer.lr"),
        ("scripts.train --config=first.yaml --out_dir=new base_model.name=nowhere", "nowhere"),
        ("scripts.train --config=first.yaml --out_dir=base_model", "base_model holds other files"),
        ("scripts.prepare_data --source=nowhere --tokenizer=base_model --out_dir=new", "nowhere"),
        ("scripts.prepare_data --source=corpus --tokenizer=base_model --out_dir=new --seed=1e3", "--seed"),
        ("scripts.export --checkpoint=corpus --out_dir=new", "corpus is no checkpoint"),
        ("scripts.evaluate --base_model=base_model --speculator=corpus --prompts=prepared", "corpus: no config.json"),
        ("scripts.evaluate --base_model=base_model --speculator=corpus --prompts=prepared --dtype=fp8", "--dtype"),
        ("scripts.evaluate --base_model=base_model --speculator=corpus --prompts=prepared --backend=onnx", "--backend"),
        ("scripts.quickstart --out_dir=base_model", "base_model holds other files"),
        ("scripts.quickstart --out_dir=new --scale=7.0", "--scale=7.0"),
    ],
)
def test_a_mistake_ends_with_one_line_exit_code_1_and_nothing_written(place, words, message):
    test_needs = place / "prepared"
    if "first.yaml --out_dir=base_model" in words and not test_needs.exists():
        run(place, *readme_commands()[[c.split()[2] for c in readme_commands() if "scripts" in c].index("scripts.prepare_data")].split()[1:])
    before = sorted(place.iterdir())
    finished = run(place, "-m", *words.split())
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 1 and len(lines) == 1 and message in lines[0], finished.stderr
    assert "Traceback" not in finished.stderr and sorted(place.iterdir()) == before


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem not in ("__init__", "cli")))
def test_help_describes_every_flag_and_starts_nothing(tmp_path, script):
    finished = run(tmp_path, "-m", f"scripts.{script}", "--help")
    text = finished.stdout + finished.stderr
    assert finished.returncode == 0 and "FLAGS" in text and "--" in text
    assert list(tmp_path.iterdir()) == []


def test_prompts_from_a_jsonl_file_are_read_and_their_mistakes_named(place):
    (place / "prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n\n{"prompt": "w4 w5"}\n')
    words = ["-m", "scripts.evaluate", "--base_model=base_model", "--speculator=speculator", "--max_new_tokens=8", "--dtype=float32"]
    finished = run(place, *words, "--prompts=prompts.jsonl")
    assert finished.returncode == 0, finished.stderr
    (place / "broken.jsonl").write_text('{"prompt": "w1"}\n{"promt": "w2"}\n')
    finished = run(place, *words, "--prompts=prompts.jsonl", "--lookahead=0")
    assert finished.returncode == 1 and "lookahead 0" in finished.stderr and "Traceback" not in finished.stderr
    finished = run(place, *words, "--prompts=broken.jsonl")
    assert finished.returncode == 1 and "broken.jsonl, line 2" in finished.stderr


def test_shards_of_continuations_are_kept_where_the_readme_says(place):
    assert list((place / "runs/first/continuations").glob("*.parquet"))
    assert Path(place / "runs/first/metrics.jsonl").is_file()
