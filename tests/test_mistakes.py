"""Absurd command lines, in this process: one line that names the thing, before any work, and nothing left behind."""

import errno
import json
import os
from pathlib import Path

import pytest
from conftest import write_config, write_model

from fms_spec.errors import UserError
from fms_spec.files import owned
from pipelines.cli import main
from pipelines.measure import benchmarks
from pipelines.quickstart import Parts, claim
from scripts import benchmark, decode, evaluate, export, generate_continuations, prepare_data, quickstart, train

COMMANDS = {
    "train": (train.Arguments, train.run, True), "decode": (decode.Arguments, decode.stream), "export": (export.Arguments, export.run),
    "generate_continuations": (generate_continuations.Arguments, generate_continuations.write_continuations),
    "evaluate": (evaluate.Arguments, evaluate.evaluate), "quickstart": (quickstart.Arguments, quickstart.run),
    "train_step": (benchmark.TrainStep, benchmark.run_train_step), "recipe": (benchmark.Recipe, benchmark.run_recipe, True),
    "benchmark_decode": (benchmark.Decode, benchmark.run_decode), "report": (benchmark.Report, benchmark.run_report),
    "prepare_data": (prepare_data.Arguments, None),
}  # fmt: skip
LONG = "x" * 300


def said(capsys, command, *words):
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(*COMMANDS[command], words=list(words))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 1 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, model_dir, data_dir):
    """base and data, run.yaml, a list of variants, results of a benchmark, and base models whose other files are damaged."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "base").symlink_to(model_dir)
    (place / "data").symlink_to(data_dir)
    write_config(place / "run.yaml", model_dir, data_dir)
    (place / "variants.yaml").write_text("- {name: a, why: b}\n")
    (place / "results.jsonl").write_text('{"benchmark": "x", "name": "n", "a_over_b": 1.5, "environment": {}}\n')
    for name, file, text in [
        ("cut", "tokenizer.json", '{"version": "1.'), ("empty", "tokenizer_config.json", ""), ("list", "tokenizer_config.json", "[]"),
        ("cut_generation", "generation_config.json", '{"eos'), ("odd_end", "generation_config.json", '{"eos_token_id": "x"}'),
    ]:  # fmt: skip
        (write_model(place / name) / file).write_text(text)
    return place


@pytest.fixture
def here(tmp_path, monkeypatch, inputs):
    """A folder to stand in, with things in the way of what is to be written."""
    for entry in inputs.iterdir():
        (tmp_path / entry.name).symlink_to(entry.resolve())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dir").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("no/where")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = "--config=run.yaml --out_dir=new"
DECODE = "--base_model=base --prompt=w1 --dtype=float32"
EVALUATE = "--base_model=base --speculator=spec --prompts=data"
CONTINUE = "--base_model=base --prompts=data --out_dir=new --engine=embedded --max_tokens=8"
STEP = "--base_model=base --data=data --parts=loss"


@pytest.mark.parametrize(
    "command, words, message",
    [
        ("train", "--config=run.yaml --out_dir", "--out_dir needs a value"),
        ("train", "--config --out_dir=new", "--config needs a value"),
        ("train", "--config= --out_dir=new", "--config needs a value"),
        ("train", f"{TRAIN} --profile --resume", "--profile needs a value"),
        ("train", f"{TRAIN} --out_dir=other", "--out_dir is given twice"),
        ("train", f"{TRAIN} out_dir", "'out_dir': a word that no flag takes"),
        ("train", f"{TRAIN} --resume yes", "'yes': a word that no flag takes"),
        ("train", f"{TRAIN} -- --interactive", "unknown flag --"),
        ("train", f"{TRAIN} --resume=maybe", "--resume: "),
        ("train", f"{TRAIN} seed=[1", "override 'seed=[1': line 1"),
        ("decode", "--base_model=base --prompt", "--prompt needs a value"),
        ("decode", "--base_model=base --dtype=float32 --prompt=w1\udcc3", r"--prompt='w1\udcc3': not UTF-8"),
        ("decode", f"{DECODE} --stop=\udcc3", r"--stop='\udcc3': not UTF-8"),
        ("decode", f"{DECODE} --seed=-1", "--seed: "),
        ("decode", f"{DECODE} --seed={2**63}", "--seed: "),
        ("decode", f"{DECODE} --temperature=1e999", "--temperature: "),
        ("decode", f"{DECODE} --temperature -1", "temperature -1"),
        ("decode", f"{DECODE} --max_new_tokens=1000000000", "over the context"),
        ("decode", f"{DECODE} --speculator=prompt_lookup --lookahead=1000000000", "over the context"),
        ("decode", f"{DECODE} --min_probability=0.2", "min_probability and lookup shape a speculator's candidates; give --speculator"),
        ("decode", f"{DECODE} --lookahead=0", "shape a speculator's candidates"),
        ("decode", f"{DECODE} --speculator=prompt_lookup --lookup=4", "(prompt_lookup takes a lookahead)"),
        ("decode", f"{DECODE} --base_model=cut", "--base_model is given twice"),
        ("decode", "--base_model=cut --prompt=w1", "tokenizer "),
        ("decode", "--base_model=empty --prompt=w1", "tokenizer "),
        ("decode", "--base_model=list --prompt=w1", "tokenizer "),
        ("decode", "--base_model=cut_generation --prompt=w1", "generation_config.json"),
        ("decode", "--base_model=odd_end --prompt=w1", "eos_token_id"),
        ("train", f"{TRAIN} base_model.name=cut", "tokenizer "),
        ("train", f"{TRAIN} base_model.name=cut_generation", "generation_config.json"),
        ("train", f"{TRAIN} base_model.name=odd_end", "eos_token_id"),
        ("generate_continuations", f"{CONTINUE} --seed=-1", "--seed: "),
        ("generate_continuations", f"{CONTINUE} --parent=-1", "--parent: "),
        ("generate_continuations", f"{CONTINUE} --limit=1000000000000", "--limit: "),
        ("generate_continuations", f"{CONTINUE} --temperature=1e-30", "temperature 1e-30: must be 0"),
        ("prepare_data", f"--source=a --tokenizer=base --out_dir=new --seed={2**63}", "--seed: "),
        ("evaluate", f"{EVALUATE} --out", "--out needs a value"),
        ("evaluate", f"{EVALUATE} --out=/proc/report.json", "/proc/report.json: cannot be written"),
        ("evaluate", f"{EVALUATE} --out={LONG}", "File name too long"),
        ("evaluate", f"{EVALUATE} --out=loop", "loop exists already"),
        ("evaluate", f"{EVALUATE} --out=dangling", "dangling exists already"),
        ("evaluate", f"{EVALUATE} --out=file/report.json", "file/report.json: no such folder"),
        ("evaluate", f"{EVALUATE} --out=.", "exists already"),
        ("evaluate", f"{EVALUATE} --out=report.png", "end it in .json"),
        ("train_step", f"{STEP} --out=dangling", "dangling: a link that leads nowhere"),
        ("train_step", f"{STEP} --out=dir", "dir: cannot be written"),
        ("train_step", f"{STEP} --rounds=0", "--rounds: "),
        ("benchmark_decode", f"{EVALUATE} --out=/proc/lines.jsonl", "/proc/lines.jsonl: cannot be written"),
        ("report", "--results=results.jsonl --out=file/report", "file/report: can't be a folder"),
        ("quickstart", "--out_dir=file/new", "file/new: cannot be written"),
        ("quickstart", "--out_dir=loop", "loop: cannot be written"),
        ("quickstart", "--out_dir=new --scale=nan", "--scale: "),
        ("recipe", "--config=run.yaml --variants=variants.yaml --out_dir=dangling", "dangling: cannot be written"),
        ("recipe", "--config=run.yaml --variants=variants.yaml --out_dir=new phase1.batch_size=1000000000", "there are 12"),
    ],
)
def test_an_absurd_command_line_is_one_line_and_nothing_is_written(here, capsys, command, words, message):
    before = sorted(here.iterdir())
    assert message in said(capsys, command, *words.split())
    assert sorted(here.iterdir()) == before and (here / "file").read_text() == "mine"


def test_a_benchmark_over_the_memory_is_refused_before_anything_is_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr(benchmarks, "device_memory", lambda: 2**30)  # as if on a small machine
    for flag in ("tokens", "wide_vocab"):
        said_of_it = said(capsys, "train_step", *STEP.split(), f"--{flag}=20000000")
        assert f"--{flag}=20000000 takes at least 2.6 GB of memory, and there are 1.1" in said_of_it


def test_values_behind_a_space_and_negative_numbers_are_taken_as_values(here):
    parsed = []
    words = "--checkpoint -1 --out_dir new".split()
    main(export.Arguments, parsed.append, words=words)
    main(train.Arguments, lambda found, settings: parsed.append((found, settings)), True, ["--resume", *TRAIN.split(), "a.b=c=d", "x=-1"])
    words = ["--base-model", "base", "--prompt", "a=b", "--chat", "False", "--top_p", "-1", "--stop=- x"]
    main(decode.Arguments, parsed.append, words=words)
    assert (parsed[0].checkpoint, parsed[0].out_dir) == ("-1", "new")
    assert parsed[1][0].resume is True and parsed[1][1] == ["a.b=c=d", "x=-1"]
    assert (parsed[2].prompt, parsed[2].chat, parsed[2].top_p, parsed[2].stop) == ("a=b", False, -1, "- x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_file_that_the_machine_refuses_is_one_line_and_other_errors_keep_their_traceback(capsys):
    def fill(_):
        with open("/dev/full", "w") as file:
            file.write("x")
            file.flush()

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/report.json")

    words = ["--checkpoint=a", "--out_dir=b"]
    with pytest.raises(SystemExit) as ended:
        main(export.Arguments, refuse, words=words)
    assert ended.value.code == 1 and capsys.readouterr().err == "error: out/report.json: No space left on device; make room\n"
    with pytest.raises(OSError):  # names no file
        main(export.Arguments, fill, words=words)
    with pytest.raises(FileNotFoundError):
        main(export.Arguments, lambda _: open("nowhere/at/all"), words=words)


def test_a_folder_that_another_process_writes_is_refused_by_quickstart_and_recipe(here, capsys):
    with owned("new"):
        assert "is writing there" in said(capsys, "quickstart", "--out_dir=new")
        words = "--config=run.yaml --variants=variants.yaml --out_dir=new".split()
        assert "is writing there" in said(capsys, "recipe", *words)


def test_damaged_records_of_a_quickstart_are_taken_as_not_written_where_nothing_is_lost(tmp_path):
    record = tmp_path / "quickstart.json"
    record.write_text("")
    dtype = claim(tmp_path, 0.5, False)
    assert claim(tmp_path, 0.5, False) == dtype, "what was written can be read again"
    (tmp_path / "data").mkdir()
    for scale, chat in ((1.0, False), (0.5, True)):
        with pytest.raises(UserError, match="holds a quickstart with --scale=0.5 --chat=False"):
            claim(tmp_path, scale, chat)
    record.write_text('{"scale": 0.')
    with pytest.raises(UserError, match="quickstart.json: can't be read"):
        claim(tmp_path, 0.5, False)
    record.unlink()
    with pytest.raises(UserError, match="holds other files"):
        claim(tmp_path, 0.5, False)
    (tmp_path / "parts.json").write_text('{"data": 3')
    done = []
    parts = Parts(tmp_path / "parts.json")
    parts.run("data", lambda: done.append("data"))
    parts = Parts(tmp_path / "parts.json")
    parts.run("data", lambda: done.append("again"))
    assert done == ["data"] and list(parts.seconds) == ["data"] and parts.peak > 0
    (tmp_path / "parts.json").write_text(json.dumps({"seconds": parts.seconds, "peak_memory_gb": 1e6}))
    Parts(tmp_path / "parts.json").run("export", lambda: None)
    assert Parts(tmp_path / "parts.json").peak == 1e6  # of the start that took most


@pytest.mark.parametrize("text, message", [("", None), ('{"data"', None), ('{"data"', "shared.json: can't be read")])
def test_a_damaged_record_of_a_comparison_is_written_anew_where_it_is_alone(here, capsys, text, message):
    (here / "new").mkdir()
    (here / "new/shared.json").write_text(text)
    words = ["--config=run.yaml", "--variants=variants.yaml", "--out_dir=new", "schedule.pattern=[[phase1,1]]", "schedule.steps=2"]
    if message:
        (here / "new/hidden_states").mkdir()
        assert message in said(capsys, "recipe", *words)
    else:
        main(*COMMANDS["recipe"], words=words)
        assert (here / "new/results.jsonl").read_text().count("\n") == 1 and sorted(p.name for p in (here / "new").glob(".*")) == []


def test_a_place_may_be_told_from_ones_own_folder_and_a_text_is_never_taken_for_one(monkeypatch, tmp_path, config_file):
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = []
    main(export.Arguments, parsed.append, words=["--checkpoint=~/run", "--out_dir", "~/out"])
    assert (parsed[0].checkpoint, parsed[0].out_dir) == (f"{tmp_path}/run", f"{tmp_path}/out")
    main(decode.Arguments, parsed.append, words=["--base_model=~/m", "--prompt=~/x", '--stop=["a, b", "(c)"]'])
    assert (parsed[1].base_model, parsed[1].prompt, parsed[1].stop) == (f"{tmp_path}/m", "~/x", ["a, b", "(c)"])
    for text in ("w3 # c", "(a)", "a, b", "'a'", "5", "True", "[1", "{w1}"):
        main(decode.Arguments, parsed.append, words=["--base_model=m", "--prompt=x", f"--stop={text}"])
        assert parsed[-1].stop == text
    config = config_file(**{"base_model.name": "~/m", "data.dir": "~/d", "data.continuations": "~/c"})
    assert [config.base_model.name, config.data.dir, config.data.continuations] == [f"{tmp_path}/{name}" for name in "mdc"]
