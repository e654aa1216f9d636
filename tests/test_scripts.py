"""The commands as a user types them: those of the README and of docs/, and mistakes on the command line."""

import ctypes
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import write_model
from documents import GUIDES, ROOT, blocks, commands

from data.yaml_files import parse
from fms_spec.speculators.directory import speculative_config
from fms_spec.speculators.eagle3 import Eagle3Speculator
from pipelines.config import load_config

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
CONTINUE = "scripts.generate_continuations --engine=embedded --out_dir=new"


pytestmark = pytest.mark.slow


def run(directory, *words):
    """What comes of `python` with these words."""
    if words[0] == "-m" and words[1].startswith("scripts."):
        return forked.run(*words[1:], cwd=directory, env=ENVIRONMENT)
    return start(directory, *words)


def start(directory, *words):
    """The same, in a process that has imported nothing yet."""
    return subprocess.run([sys.executable, *words], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus_dir):
    """A directory with what the README supposes, corpus/, base_model/ and first.yaml, and what its commands make of it.

    What they printed stands in printed.json: {script: text}.
    """
    directory = tmp_path_factory.mktemp("readme")
    (directory / "corpus").symlink_to(corpus_dir)
    write_model(directory / "base_model")
    write_model(directory / "other_model", seed=1)
    (directory / "recurrent").mkdir()
    (directory / "recurrent/config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    (directory / "recurrent/model.safetensors").write_bytes(b"no weights: refused before they are looked at")
    (yaml,) = blocks("README.md", "yaml")
    (directory / "first.yaml").write_text(yaml)
    printed = {}
    for command in commands("README.md"):
        if command.startswith("python -m "):
            finished = start(directory, *shlex.split(command)[1:])
            assert finished.returncode == 0, finished.stderr
            printed[command.split()[2]] = finished.stdout
    (directory / "printed.json").write_text(json.dumps(printed))
    return directory


def test_the_readmes_commands_do_what_it_says(place):
    printed = json.loads((place / "printed.json").read_text())
    assert list(printed) == [
        "scripts.prepare_data", "scripts.generate_continuations", "scripts.train", "scripts.export", "scripts.evaluate", "scripts.decode",
        "scripts.benchmark",
    ]  # fmt: skip
    card = (place / "speculator/README.md").read_text()
    assert """vllm serve base_model --host 127.0.0.1 --speculative-config '{"model": "speculator",""" in card
    assert "14 steps over" in card and "acceptance length" in card
    report = json.loads((place / "report.json").read_text())
    assert report["lossless"] is True and 1 <= report["acceptance_length"] <= 4
    assert len(report["acceptance_per_position"]) == 3 and report["plain_tokens_per_s"] > 0
    assert report["prompt_lookup"]["speedup"] > 0 and report["suggestion"] and list(report["categories"]) == ["all"]
    low, high = report["acceptance_length_interval"]
    assert low <= report["acceptance_length"] <= high and sum(report["shares"].values()) == pytest.approx(1)
    assert (place / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s, acceptance length" in printed["scripts.decode"] and "speed-up" in printed["scripts.decode"]
    lines = [json.loads(line) for line in (place / "speed.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in printed["scripts.benchmark"].splitlines()] == lines
    assert {line["name"] for line in lines} == {
        "forward", "plain", "tree", "our_prompt_lookup", "prompt_lookup", "batch", "context",
    }  # fmt: skip
    assert all(line["benchmark"] == "decode" and line["environment"]["versions"]["torch"] for line in lines)
    assert all(line["environment"]["command"].startswith("benchmark.py decode --") for line in lines)
    assert all(sum(line["texts"].values()) == 2 for line in lines if "texts" in line)


@pytest.mark.parametrize("document, command", [(document, command) for document in GUIDES[1:] for command in commands(document)])
def test_the_commands_in_docs_run(place, document, command):
    name, *words = shlex.split(command)
    if name == "vllm" and "eagle3" in words[-1]:
        assert json.loads(words[-1]) == speculative_config("speculator", {"model_type": Eagle3Speculator.model_type}, 3)
        return
    if name == "vllm":  # the card's, which tests/test_vllm_server.py starts
        assert shlex.join([name, *words]) in (place / "speculator/README.md").read_text().splitlines()
        return
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[name]
    finished = run(place, *module, *words)
    assert finished.returncode == 0, finished.stderr
    if name == "torchrun":
        assert json.loads((place / "runs/two/run.json").read_text())["processes"] == 2
        assert "phase2/loss" in (place / "runs/two/metrics.jsonl").read_text()


@pytest.mark.parametrize("document", [document for document in GUIDES if blocks(document, "python")])
def test_the_documents_python_runs(place, document):
    for block in blocks(document, "python"):
        finished = run(place, "-c", block + "\nprint(step[0].finish_reason)")
        assert finished.returncode == 0 and finished.stdout.split()[-1] in ("length", "stop"), finished.stderr


def test_the_settings_in_docs_are_taken(tmp_path):
    (first,) = blocks("README.md", "yaml")
    for document in GUIDES[1:]:
        for block in blocks(document, "yaml"):
            config = parse(first, "README.md")
            for section, settings in parse(block, document).items():
                config[section] = settings if "family" in settings else config.get(section, {}) | settings
            (tmp_path / "run.yaml").write_text(json.dumps(config))
            load_config(tmp_path / "run.yaml", [])


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
        ("scripts.train --config=first.yaml --out_dir=new generation.top_k=7", "another top_k (10 there, 7 asked)"),
        (f"{CONTINUE} --prompts=corpus --base_model=base_model", "run scripts.prepare_data"),
        (f"{CONTINUE} --prompts=prepared --base_model=base_model --max_tokens=249", "over the context"),
        (f"{CONTINUE} --prompts=prepared --base_model=base_model --temperature=-1", "--temperature"),
        (f"{CONTINUE} --prompts=prepared --base_model=base_model --max_tokens=9 --shards=1:9", "--shards=1:9"),
        ("scripts.generate_conversations --base_model=base_model --conversations=2 --out_dir=new", "has no chat template; give"),
        ("scripts.export --checkpoint=corpus --out_dir=new", "corpus is no checkpoint"),
        ("scripts.evaluate --base_model=base_model --speculator=corpus --prompts=prepared", "corpus: no config.json"),
        ("scripts.evaluate --base_model=base_model --speculator=corpus --prompts=prepared --dtype=fp8", "--dtype"),
        ("scripts.evaluate --base_model=base_model --speculator=corpus --prompts=prepared --backend=onnx", "--backend"),
        ("scripts.evaluate --base_model=base_model --speculator=speculator --prompts=prepared --against=sglang", "--against"),
        ("scripts.evaluate --base_model=base_model --speculator=speculator --prompts=prepared --max_new_tokens=250", "every prompt"),
        ("scripts.evaluate --base_model=base_model --speculator=speculator --prompts=prepared --lookahead=4", "lookahead 4"),
        ("scripts.evaluate --base_model=base_model --speculator=speculator --prompts=prepared --nodes=1", "nodes 1"),
        ("scripts.evaluate --base_model=base_model --speculator=speculator --prompts=prepared --out=nowhere/r.json", "no such folder"),
        ("scripts.evaluate --base_model=other_model --speculator=speculator --prompts=prepared", "was trained for base_model"),
        ("scripts.decode --base_model=other_model --speculator=speculator --prompt=w1", "was trained for base_model"),
        ("scripts.decode --base_model=base_model --speculator=speculator --prompt=w1 --top_k_per_head=2,2 --nodes=4", "top_k_per_head"),
        ("scripts.decode --base_model=base_model --speculator=speculator --prompt=w1 --top_k_per_head=2,0", "top_k_per_head 2,0"),
        ("scripts.decode --base_model=base_model --prompt=w1 --nodes=4", "give --speculator"),
        ("scripts.decode --base_model=base_model --prompt=w1 --max_new_tokens=500", "over the context"),
        ("scripts.decode --base_model=base_model --speculator=speculator --prompt=w1 --max_new_tokens=253", "over the context"),
        ("scripts.decode --base_model=base_model --prompt=w1 --temperature=-1", "temperature -1"),
        ("scripts.decode --base_model=base_model --prompt=w1 --chat", "no chat template"),
        ("scripts.decode --base_model=base_model --prompt=w1 --compare", "give --speculator"),
        ("scripts.evaluate --base_model=base_model --speculator=speculator --prompts=prepared --max_new_tokens=1", "--max_new_tokens"),
        ("scripts.benchmark decode --base_model=base_model --speculator=speculator --prompts=prepared --out=no/x", "no such folder"),
        ("scripts.benchmark serving --base_model=base_model --speculator=speculator --prompts=prepared --out=no/x", "no such folder"),
        ("scripts.benchmark continuations --base_model=base_model --prompts=corpus", "corpus"),
        ("scripts.benchmark train_step --base_model=base_model --data=corpus", "run scripts.prepare_data"),
        ("scripts.benchmark train_step --base_model=base_model --data=prepared --parts=head", "--parts: head is none of heads"),
        ("scripts.benchmark train_step --base_model=base_model --data=prepared --out=no/x", "no such folder"),
        ("scripts.benchmark report --results=nowhere.jsonl --out=new", "nowhere.jsonl: can't be read"),
        ("scripts.benchmark report --results=first.yaml --out=new", "first.yaml, line 1"),
        ("scripts.benchmark report --results=first.yaml", "--out is required"),
        ("scripts.doctor --verbose", "--verbose"),
        ("scripts.decode --base_model=recurrent --prompt=w1", "base model recurrent"),
        ("scripts.benchmark speed --base_model=base_model", "give one of decode"),
        ("scripts.benchmark", "give one of decode"),
        ("scripts.quickstart --out_dir=base_model", "base_model holds other files"),
        ("scripts.quickstart --out_dir=new --scale=7.0", "--scale=7.0"),
    ],
)
def test_a_mistake_ends_with_one_line_exit_code_1_and_nothing_written(place, words, message):
    before = sorted(place.iterdir())
    finished = run(place, "-m", *words.split())
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 1 and len(lines) == 1 and message in lines[0], finished.stderr
    assert "Traceback" not in finished.stderr and sorted(place.iterdir()) == before


SCRIPTS = sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__", "cli", "benchmark", "doctor", "recipe"})


@pytest.mark.parametrize(
    "script",
    [
        *SCRIPTS,
        "benchmark decode",
        "benchmark continuations",
        "benchmark serving",
        "benchmark train_step",
        "benchmark recipe",
        "benchmark report",
    ],
)
def test_help_describes_every_flag_and_starts_nothing(tmp_path, script):
    finished = run(tmp_path, "-m", *f"scripts.{script}".split(), "--help")
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


def test_texts_on_the_command_line_stay_as_they_are_typed(place):
    for prompt in ("[1]", "1e3", "None", "w1,w2", "{'a': 1}"):
        finished = run(place, "-m", "scripts.decode", "--base_model=base_model", f"--prompt={prompt}", "--max_new_tokens=2")
        assert finished.returncode == 0, finished.stderr


def test_generate_gives_the_same_text_with_and_without_a_speculator_and_ends_at_a_stop_string(place):
    words = ["-m", "scripts.decode", "--base_model=base_model", "--prompt=w1 w2", "--dtype=float32", "--max_new_tokens=12"]
    text = lambda *more: run(place, *words, *more).stdout.split("\n\n")[0]  # noqa: E731
    plain = text()
    assert len(plain.split()) == 12
    for more in (["--speculator=speculator"], ["--speculator=speculator", "--nodes=6"], ["--speculator=prompt_lookup"]):
        assert text(*more) == plain
    sampled = text("--temperature=1.5", "--seed=3")
    assert sampled != plain and sampled == text("--temperature=1.5", "--seed=3", "--speculator=speculator", "--nodes=6")
    stop = plain.split()[5]
    assert text(f"--stop={stop}", "--speculator=speculator").split() == plain.split()[: plain.split().index(stop)]
    marked = run(place, *words, "--speculator=speculator", "--top_k_per_head=64", "--mark").stdout
    assert "\x1b[32m" in marked


def test_shards_of_continuations_are_kept_where_the_readme_says(place):
    assert list((place / "continuations").glob("*.parquet")) and (place / "continuations/manifest.json").is_file()
    assert not (place / "runs/first/continuations").exists()
    assert Path(place / "runs/first/metrics.jsonl").is_file()


ALLOCATE = """
import ctypes, sys, torch
from pipelines.cli import arguments, main

class Told(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "f", "g", "h", "i", "j")]

@arguments
class Nothing:
    pass

def run(_):
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = Told
    before = libc.mallinfo2().hblkhd
    block = torch.empty(2**26, dtype=torch.uint8)
    print(libc.mallinfo2().hblkhd - before > 2**25)

computes, gpu = map(int, sys.argv[1:])
if gpu:
    torch.cuda.is_available = lambda: True
main(Nothing, run, words=[], computes=bool(computes))
"""


@pytest.mark.parametrize("computes, gpu, fetched", [(1, 0, False), (0, 0, True), (1, 1, True)])
def test_freed_memory_is_kept_only_by_commands_that_compute_on_the_cpu(tmp_path, computes, gpu, fetched):
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("only glibc tells where a block comes from")
    (tmp_path / "allocate.py").write_text(ALLOCATE)
    finished = run(tmp_path, "allocate.py", str(computes), str(gpu))
    assert finished.stdout == f"{fetched}\n", finished.stderr
