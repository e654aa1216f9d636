"""The comparison of recipes on a tiny model, as a user runs it."""

import json
import os
import signal
import time

import pytest
import torch
from conftest import write_config
from forked import Command, run
from test_house import ROOT

from pipelines.measure.recipe import SharedStates, compared, read_variants
from pipelines.train.state_cache import HiddenStates

TWO = """
- name: as it is
  why: what the others are compared with
- name: phase 1 alone
  why: text of the base model's own may not be needed
  set: ["schedule.pattern=[[phase1, 1]]", "phase1.loss.only_accepted=true", "speculator.base_layers=[1]"]
"""


@pytest.fixture
def place(tmp_path, model_dir, data_dir):
    write_config(tmp_path / "run.yaml", model_dir, data_dir)
    (tmp_path / "variants.yaml").write_text(TWO)
    return tmp_path


def command(*more):
    words = ["recipe", "--config=run.yaml", "--variants=variants.yaml", "--out_dir=out", *more]
    return ["scripts.benchmark", *words]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}  # no heading of the table is broken


def sweep(place, *more):
    return run(*command(*more), cwd=place, env=ENVIRONMENT)


def lines(place):
    return [json.loads(line) for line in (place / "out/results.jsonl").read_text().splitlines()]


def test_an_interrupted_comparison_goes_on_with_what_is_missing_and_ends_with_a_table(place):
    first = Command(command(), cwd=place, env=ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not (place / "out/results.jsonl").is_file() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (before,) = lines(place)[:1]

    second = sweep(place)
    assert second.returncode == 0, second.stderr
    assert "== phase 1 alone" in second.stdout and "== as it is" not in second.stdout and "over the first (95%)" in second.stdout
    found = lines(place)
    assert found[0] == before and [line["variant"] for line in found] == ["as it is", "phase 1 alone"]
    for line in found:
        low, high = line["acceptance_length_interval"]
        assert low <= line["acceptance_length"] <= high and len(line["acceptance_per_position"]) == 3
        assert line["steps"] == 9 and line["positions"] > 0 and line["head_cpu_seconds"] > 0 and len(line["by_prompt"]) == 3
        assert line["averaged"]["draft_steps"] > 0 and line["environment"]["versions"]["torch"]
    alone = found[1]["base_model_tokens"]
    assert alone["rows"] == found[0]["base_model_tokens"]["rows"] > 0 == alone["generation"] == alone["continuations"]
    assert not (place / "out/run").exists()

    third = sweep(place)
    assert third.returncode == 0 and "==" not in third.stdout and lines(place) == found


@pytest.mark.parametrize(
    "text, more, message",
    [
        (None, [], "variants.yaml: can't be read"),
        ("- name: a", [], "entry 1: why"),
        ("- {name: a, why: b, sets: []}", [], "entry 1: sets"),
        ("- {name: a, why: b}\n- {name: a, why: c}", [], "entry 2: the name a is given twice"),
        ("- {name: a, why: b, set: [optimizer.rl=1]}", [], "did you mean lr?"),
        ("- {name: a, why: b, set: [data.dir=elsewhere]}", [], "a: changes data"),
        ("- {name: a, why: b, set: [data.rows=1000]}", [], "1000 rows asked"),
        (TWO, ["optimizer.lr=fast"], "optimizer.lr"),
        (TWO, ["data.dir=nowhere"], "nowhere: no manifest.json"),
    ],
)
def test_a_mistake_in_the_list_ends_with_one_line_before_any_work(place, text, more, message):
    (place / "variants.yaml").unlink()
    if text:
        (place / "variants.yaml").write_text(text)
    finished = sweep(place, *more)
    said = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 1 and len(said) == 1 and message in said[0], finished.stderr
    assert "Traceback" not in finished.stderr and not (place / "out").exists()


def test_results_of_another_config_are_not_taken_for_these(place):
    assert sweep(place, "schedule.steps=7").returncode == 0
    finished = sweep(place)
    assert finished.returncode == 1 and "holds as it is with other settings" in finished.stderr
    (place / "out/results.jsonl").unlink()
    finished = sweep(place, "validation.max_new_tokens=9")
    assert finished.returncode == 1 and "made with another validation.max_new_tokens (20, now 9)" in finished.stderr


def test_the_shipped_variants_fit_the_shipped_quickstart():
    configs = ROOT / "pipelines/configs"
    variants = read_variants(configs / "variants/quickstart.yaml", configs / "quickstart.yaml", [])
    assert len(variants) > 1 and not next(iter(variants.values()))[0].set


def test_shared_states_say_of_each_token_what_states_of_ones_own_say(base_model, tmp_path):
    from fms_spec.batch import Batch

    tokens = torch.randint(0, base_model.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    best = lambda states: base_model.logits(states).argmax(-1)  # noqa: E731
    tokens[:, 6] = best(base_model.hidden_states(tokens, torch.zeros_like(tokens)))[:, 5]
    own = HiddenStates(base_model, best)
    shared = SharedStates(HiddenStates(base_model, None, tmp_path / "cache", 4, 12, 4), best)
    for rows in ([2, 0], [0, 3], [1, 2]):
        batch = Batch(tokens[rows], torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.tensor(rows))
        (states, greedy), (expected_states, expected) = shared(batch), own(batch)
        assert torch.allclose(states, expected_states, atol=1e-5) and torch.equal(greedy, expected) and greedy[:, 6].all()


def test_a_variant_is_compared_with_the_first_prompt_by_prompt():
    first = {"by_prompt": [[1, 10], [9, 10], [5, 10]], "acceptance_length": 1.5}
    better = {"by_prompt": [[2, 10], [10, 10], [6, 10]], "acceptance_length": 1.6}
    same, more = compared([first, better])
    assert same["more"] == 0 and same["more_interval"] == [0, 0]
    assert more["more"] == pytest.approx(0.1) and more["more_interval"] == pytest.approx([0.1, 0.1]), "prompts differ, the gain does not"
