import json
import signal
import time

import pytest
import torch
from conftest import load_speculator
from forked import Command
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fms_spec.base_model import BaseModel
from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError
from fms_spec.proposers import Step
from fms_spec.speculators.mlp import MLPSpeculator
from pipelines.export import export
from pipelines.train.checkpoint import whole_checkpoints
from pipelines.train.run import train


def weights_of(run_dir, tmp_path):
    out = tmp_path / f"export-{run_dir.name}"
    export(run_dir, out)
    return (out / "model.safetensors").read_bytes()


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [(r["step"], name, r[name]) for r in records(run_dir) for name in sorted(r) if "loss" in name or "acceptance" in name]


@pytest.mark.parametrize("family", ["hidden_state", "mlp"])
def test_a_run_twice_from_one_seed_is_the_same_to_the_bit_and_another_seed_is_not(tmp_path, config_file, family):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config_file(family, seed=seed), tmp_path / name, resume=False)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights_of(tmp_path / "a", tmp_path) == weights_of(tmp_path / "b", tmp_path) != weights_of(tmp_path / "c", tmp_path)


@pytest.mark.parametrize("family", ["hidden_state", "mlp"])
def test_training_learns_and_its_export_is_what_was_trained(tmp_path, config_file, family, base_model):
    # More than nine steps, on one phase: the tiny random base model has little to learn from.
    config = config_file(family, **{"schedule.steps": 120, "schedule.pattern": "[[phase1, 1]]", "log_every": 20})
    train(config, tmp_path / "run", resume=False)
    curve = [record["phase1/loss"] for record in records(tmp_path / "run") if "phase1/loss" in record]
    assert curve[-1] < 0.9 * curve[0]
    export(tmp_path / "run", tmp_path / "speculator")
    speculator = load_speculator(tmp_path / "speculator", base_model)
    assert speculator.n_predict == 3
    assert DraftShape().proposer(speculator).propose(Step(torch.randn(2, base_model.width), torch.tensor([3, 4]), [])).tokens.shape == (
        2,
        3,
    )


def test_phases_alternate_five_to_two_and_every_figure_is_logged(tmp_path, config_file):
    train(config_file(), tmp_path / "run", resume=False)
    order = "".join("1" if "phase1/loss" in r else "2" for r in records(tmp_path / "run") if any(k.endswith("/loss") for k in r))
    assert order == "111112211"
    last = [r for r in records(tmp_path / "run") if r["step"] == 9]
    names = {name for record in last for name in record}
    assert {"phase1/loss_head_0", "phase1/loss_head_2", "phase1/lr", "phase1/grad_norm", "tokens_per_s", "time_share/base_model"} <= names
    assert {
        "time_share/heads",
        "time_share/data",
        "time_share/generation",
        "validation/acceptance_length",
        "validation/acceptance_at_3",
    } <= names
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    written = {event.step: event.value for event in board.Scalars("phase1/loss")}
    for record in records(tmp_path / "run"):
        if "phase1/loss" in record:
            assert written[record["step"]] == pytest.approx(record["phase1/loss"], rel=1e-6)
    kept = json.loads((tmp_path / "run/run.json").read_text())
    assert kept["config"]["optimizer"]["lr"] == 0.01 and {"command", "git_revision", "versions", "device"} <= set(kept)


@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_run_resumed_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, config_file, cached):
    config = config_file(hidden_state_cache=cached)
    train(config, tmp_path / "whole", resume=False)
    command = ["scripts.train", f"--config={tmp_path / 'run.yaml'}", f"--out_dir={tmp_path / 'killed'}"]
    command.append(f"hidden_state_cache={str(cached).lower()}")
    process = Command(command)
    deadline = time.monotonic() + 120
    while not whole_checkpoints(tmp_path / "killed/checkpoints") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert whole_checkpoints(tmp_path / "killed/checkpoints")
    train(config, tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights_of(tmp_path / "killed", tmp_path) == weights_of(tmp_path / "whole", tmp_path)


def test_weights_that_fit_and_mean_something_else_are_not_gone_on_from(tmp_path, config_file, monkeypatch):
    train(config_file("mlp"), tmp_path / "run", resume=False)
    build = MLPSpeculator.build
    monkeypatch.setattr(MLPSpeculator, "build", lambda settings, *rest: build(settings.model_copy(update={"scale_input": False}), *rest))
    message = "checkpoint .*step-00000009: its scale_input is True, and the config's speculator section makes False"
    with pytest.raises(UserError, match=message):
        train(config_file("mlp"), tmp_path / "run", resume=True)


def test_a_hidden_state_cache_changes_nothing_but_the_time(tmp_path, config_file):
    train(config_file(), tmp_path / "plain", resume=False)
    train(config_file(hidden_state_cache="true"), tmp_path / "cached", resume=False)
    for (_, _, plain), (_, _, cached) in zip(losses(tmp_path / "plain"), losses(tmp_path / "cached"), strict=True):
        assert cached == pytest.approx(plain, rel=1e-4)


def test_states_are_kept_of_the_phases_that_are_trained_in(tmp_path, config_file):
    trainer = train(config_file(hidden_state_cache=True, **{"schedule.pattern": "[[phase2, 1]]", "schedule.steps": 2}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/hidden_states").iterdir()] == ["phase2"]
    assert trainer.states["phase1"].nbytes == 0 < trainer.states["phase2"].nbytes


def test_accumulated_micro_batches_give_the_gradients_of_one_large_batch(tmp_path, config_file):
    runs = {"many": {"phase1.batch_size": 2, "phase1.accumulate": 3}, "one": {"phase1.batch_size": 6, "phase1.accumulate": 1}}
    for name, settings in runs.items():
        config = config_file(**settings | {"phase1.positions": "null", "schedule.pattern": "[[phase1, 1]]", "schedule.steps": 4})
        train(config, tmp_path / name, resume=False)
    for (_, _, many), (_, _, one) in zip(losses(tmp_path / "many"), losses(tmp_path / "one"), strict=True):
        assert many == pytest.approx(one, rel=1e-4)


def test_an_out_dir_with_another_run_is_never_touched(tmp_path, config_file):
    train(config_file(), tmp_path / "run", resume=False)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match="--resume"):
        train(config_file(), tmp_path / "run", resume=False)
    with pytest.raises(UserError, match="optimizer.lr \\(0.01, now 0.02\\)"):
        train(config_file(**{"optimizer.lr": 0.02}), tmp_path / "run", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not lose")
    with pytest.raises(UserError, match="other files"):
        train(config_file(), tmp_path / "mine", resume=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert before == {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}


def test_mistakes_in_what_a_run_is_given_are_found_before_it_writes_anything(tmp_path, config_file, other_model_dir):
    long_prompts = {"generation.max_new_tokens": 250}
    cases = [
        (long_prompts, "over the context"),
        ({"data.dir": tmp_path / "nothing"}, "prepare_data"),
        ({"base_model.name": tmp_path / "no_model"}, "no such directory"),
        ({"speculator.draft_vocab_size": 4000}, "draft_vocab_size 4000"),
        ({"data.rows": 4000}, "ask for fewer"),
        ({"validation.prompts": 0, "base_model.backend": "fms", "phase1.loss.cross_entropy": 0, "phase1.loss.distillation": 0,
          "phase1.loss.smooth_l1": 0}, "nothing would be learned"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as error:
            train(config_file(**changes), tmp_path / "run", resume=False)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_longer_finite_ends_the_run_in_one_line_and_is_never_saved(tmp_path, config_file):
    with pytest.raises(UserError, match="loss is not finite at step"):
        changes = {"optimizer.lr": 1e30, "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 1e30}
        train(config_file(**changes), tmp_path / "run", resume=False)
    for checkpoint in whole_checkpoints(tmp_path / "run/checkpoints"):
        export(checkpoint, tmp_path / checkpoint.name)
        assert all(value.isfinite().all() for value in load_file(tmp_path / checkpoint.name / "model.safetensors").values())


def test_masters_stay_fp32_while_the_base_model_computes_in_bf16(tmp_path, config_file, model_dir):
    trainer = train(config_file(**{"base_model.dtype": "bfloat16"}), tmp_path / "run", resume=False)
    assert {parameter.dtype for parameter in trainer.speculator.parameters()} == {torch.float32}
    assert {value.dtype for state in trainer.optimizer.state.values() for value in state.values()} == {torch.float32}
    export(tmp_path / "run", tmp_path / "speculator")
    loaded = load_speculator(tmp_path / "speculator", BaseModel(str(model_dir), dtype="bfloat16", device="cpu"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_trace_of_chosen_steps_is_written_and_changes_nothing(tmp_path, config_file, capsys):
    train(config_file(), tmp_path / "plain", resume=False)
    train(config_file(), tmp_path / "traced", resume=False, profile="3:5")
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain")
    (trace,) = (tmp_path / "traced/profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    assert trace.name == "steps-3-5-process-0.json" and any("fused_adamw" in event.get("name", "").lower() for event in events)
    assert {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")} == {"ProfilerStep#3", "ProfilerStep#4"}
    capsys.readouterr()
    train(config_file(), tmp_path / "plain", resume=True, profile="3:5")
    assert "no step is traced: those of --profile=3:5 were taken before" in capsys.readouterr().out
    for wrong in ("5:3", "3", "0:100", "a:b"):
        with pytest.raises(UserError, match=f"--profile={wrong}"):
            train(config_file(), tmp_path / "new", resume=False, profile=wrong)
    assert not (tmp_path / "new").exists()
