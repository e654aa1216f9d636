from pathlib import Path

import pytest

from fms_spec.errors import UserError
from pipelines.config import load_config

CONFIGS = sorted((Path(__file__).parents[1] / "pipelines/configs").glob("*.yaml"))

MINIMAL = """
base_model: {name: somewhere}
speculator: {family: mlp}
data: {dir: prepared}
schedule: {steps: 7}
phase1: {batch_size: 8}
phase2: {batch_size: 96}
"""


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_says_how_it_is_run(path):
    config = load_config(path)
    counts = config.schedule.build().phase_steps()
    assert counts["phase1"] / counts["phase2"] == 2.5 and min(counts.values()) >= 2
    text = path.read_text()
    assert text.startswith("#") and ("scripts.train" in text or "make quickstart" in text)


def test_the_ibm_recipe_is_the_published_one():
    config = load_config(next(path for path in CONFIGS if "ibm" in path.name))
    assert config.schedule.build().phase_steps() == {"phase1": 15000, "phase2": 6000} and config.schedule.mode == "sequential"
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1e-3, (0.9, 0.95), 0.1)
    assert (config.generation.temperature, config.generation.top_k, config.generation.max_new_tokens) == (1.0, 10, 256)


def test_defaults_are_five_to_two_interleaved(tmp_path):
    schedule = load_config(write(tmp_path, MINIMAL)).schedule
    assert (schedule.pattern, schedule.mode) == ([("phase1", 5), ("phase2", 2)], "interleaved")


@pytest.mark.parametrize(
    "change, message",
    [
        ("learning_rate: 3", "unknown key learning_rate"),
        (
            "optimizer: {learning_rate: 1}",
            "unknown key optimizer.learning_rate, did you mean lr|unknown key optimizer.learning_rate, known: lr",
        ),
        ("phase1: {batch_sise: 8}", "unknown key phase1.batch_sise, did you mean batch_size"),
        ("phase1: {batch_size: 8, loss: {smoth_l1: 1.0}}", "unknown key phase1.loss.smoth_l1, did you mean smooth_l1"),
        ("optimizer: {lr: fast}", "optimizer.lr: .*number.*'fast'"),
        ("optimizer: {lr: no}", "optimizer.lr: .*number.*'no'"),
        ("optimizer: {lr: -1.0}", "optimizer.lr: .*greater than 0"),
        ("phase1: {batch_size: 8.5}", "phase1.batch_size: .*integer"),
        ("schedule: {steps: 0}", "schedule.steps: .*greater than or equal to 1"),
        ("schedule: {steps: 7, pattern: []}", "at least one"),
        ("schedule: {steps: 5}", "phase2 would run for 0 of schedule.steps 5"),
        ("schedule: {steps: 6}", "phase2 would run for 1 of schedule.steps 6"),
        ("schedule: {steps: 7, pattern: [[phase3, 1]]}", "schedule.pattern.0.0: .*phase1"),
        ("schedule: {steps: 7, pattern: [[phase1, 0]]}", "at least one step"),
        ("phase1: {batch_size: 8, loss: {heads: [1.0]}}", "phase1.loss.heads has 1 weights for 3 heads"),
        ("phase1: {batch_size: 8, loss: {smooth_l1: 1.0}}", "smooth_l1 needs the hidden_state family"),
        ("phase1: {batch_size: 8, loss: {cross_entropy: 0.0}}", "nothing would be learned"),
        ("generation: {mode: aside}", "generation.mode: .*alongside"),
        ("generation: {shards_ahead: 0}", "generation.shards_ahead: .*greater than or equal to 1"),
        ("generation: {producer_devices: []}", "generation.producer_devices: .*at least 1"),
        ("generation: {producer_devices: [0]}", "generation.producer_devices.0: .*string"),
        ("speculator: {family: mpl}", "speculator.family: .*mlp"),
    ],
)
def test_a_mistake_in_a_config_is_one_line_naming_file_and_key(tmp_path, change, message):
    key = change.split(":")[0]
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(f"{key}:")]
    path = write(tmp_path, "\n".join([*lines, change]))
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_section_and_a_broken_file_are_named(tmp_path):
    for text, message in [
        (MINIMAL.replace("data:", "date:"), "date|data is missing"),
        (MINIMAL.replace("data: {dir: prepared}\n", ""), "data is missing"),
        ("a: [1,", "line "),
        ("", "expected keys"),
        (MINIMAL + "phase1: {batch_size: 9}\n", "line|duplicate"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_config(write(tmp_path, text))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="can't be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_are_read_as_yaml_and_checked_like_the_file(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["optimizer.lr=1e-4", "schedule.mode=sequential", "schedule.pattern=[[phase2, 1]]", "base_model.name=a=b"])
    assert (config.optimizer.lr, config.schedule.mode, config.base_model.name) == (1e-4, "sequential", "a=b")
    assert config.schedule.build().phase_steps() == {"phase2": 7}
    for override, message in [("optimizer.lrr=1", "did you mean lr"), ("seed.x=1", "seed"), ("schedule.steps=many", "schedule.steps")]:
        with pytest.raises(UserError, match=message):
            load_config(path, [override])
