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
# Nine values, nine times, and so on: written out they would be 43 million.
NESTED = "b: &b [x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("bcdefgh", "cdefghi"))


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


@pytest.mark.parametrize("name", ["quickstart_chat", "quickstart_eagle3"])
def test_the_other_quickstarts_differ_from_the_first_only_where_they_say_why(name):
    plain, other = (next(path for path in CONFIGS if path.stem == stem) for stem in ("quickstart", name))
    settings = lambda line: line.partition(" #")[0].rstrip()  # noqa: E731
    known = [settings(line) for line in plain.read_text().splitlines()]
    changed = [line for line in other.read_text().splitlines() if settings(line) not in known and not line.startswith("#")]
    assert changed and all(" # " in line for line in changed)


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
        ("speculator: {family: mlp, pointer: {widht: 128}}", "unknown key speculator.pointer.widht, did you mean width"),
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


@pytest.mark.parametrize(
    "override, message",
    [
        ("seed=-1", "seed: .*greater than or equal to 0"),
        (f"seed={2**63}", "seed: .*less than or equal to 9223372036854775807"),
        ("phase1.loss.heads=[-1.0, 1.0, 1.0]", "phase1.loss.heads.0: .*greater than or equal to 0"),
        ("phase1.loss.heads=[0.0, 0.0, 0.0]", "phase1.loss.heads has no weight over 0"),
        ("phase1.loss.heads=[.nan, 1.0, 1.0]", "phase1.loss.heads.0: .*finite"),
        ("phase2.loss.cross_entropy=.inf", "phase2.loss.cross_entropy: .*finite"),
        ("phase2.loss.distillation=1e300", "phase2.loss.distillation: .*less than or equal"),
        ("phase1.lr.end=1e9", "phase1.lr.end 1000000000.0 is over its peak, 1.0"),
        ("phase2.lr.peak=0.05", "phase2.lr.end 0.1 is over its peak, 0.05"),
        ("phase1.lr.peak=2.0", "phase1.lr.peak: .*less than or equal to 1"),
        ("optimizer.lr=.inf", "optimizer.lr: .*finite"),
        ("optimizer.betas=[1.5, 0.9]", "optimizer.betas.0: .*less than 1"),
        ("optimizer.betas=[0.9, -0.1]", "optimizer.betas.1: .*greater than or equal to 0"),
        ("optimizer.betas=[.nan, 0.9]", "optimizer.betas.0: .*finite"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay: .*finite"),
        ("optimizer.weight_decay=1e9", "optimizer.weight_decay 1000000000.0 x lr 0.001 takes all of a weight away"),
        ("optimizer.clip_norm=.nan", "optimizer.clip_norm: .*finite"),
        ("generation.temperature=.inf", "generation.temperature: .*finite"),
        ("generation.temperature=1e-30", "temperature 1e-30: must be 0"),
        ("generation.top_p=0.0", "top_p 0.0: must be over 0"),
        ("speculator.n_predict=1000000", "speculator.n_predict: .*less than or equal to 64"),
        ("speculator.inner_dim=1000000000", "speculator.inner_dim: .*less than or equal"),
        ("schedule.steps=10000000000000", "schedule.steps: .*less than or equal"),
        ("base_model.name=''", "base_model.name: should be a path or a name"),
        ('data.dir="a\\0b"', "data.dir: should be a path or a name"),
        ("speculator.pointer.foo=1", "unknown key speculator.pointer.foo, known: width"),
        ("schedule=3", "schedule: should be a section, with keys and values .got 3"),
        ("schedule.steps=[1", "override 'schedule.steps=.1': line 1: "),
        ("schedule.steps=", "override 'schedule.steps=': give a key.path and a value"),
        ("=3", "override '=3': give a key.path and a value"),
        ("schedule..steps=3", "override 'schedule..steps=3': give a key.path and a value"),
        ("seed=!!python/object/apply:os.abort []", "line 1: a tag"),
        ("seed=" + "[" * 3000 + "]" * 3000, "nested over 20 deep"),
        ("seed={a: 1, a: 2}", "duplicate key"),
        ("seed=*a", "undefined alias"),
        ("seed=&a [*a]", "seed: .*integer"),
        ("seed=2026-99-99", "a value can't be read"),
        ("seed=" + "9" * 5000, "a value can't be read"),
        ("seed=0x" + "f" * 5000, "seed: .*a number of thousands of digits"),
    ],
)
def test_an_override_that_can_mean_nothing_is_one_short_line(tmp_path, override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(write(tmp_path, MINIMAL), [override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text, message",
    [
        (MINIMAL + "seed: !!python/object/apply:os.abort []\n", "line 8: a tag"),
        (MINIMAL + "seed: " + "[" * 3000 + "]" * 3000, "line 8: nested over 20 deep"),
        (MINIMAL + NESTED, "unknown key b"),
        (MINIMAL + "1: 2\n", "1: Keys should be strings"),
        (MINIMAL + "---\nseed: 1\n", "another document"),
        (MINIMAL + "seed: \x07\n", "special characters are not allowed"),
        (MINIMAL.encode("utf-16"), "not UTF-8 text"),
        (MINIMAL.encode() + b"# \xe9\n", "not UTF-8 text"),
    ],
)
def test_a_config_that_is_no_settings_is_one_short_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_byte_order_mark_anchors_and_rates_that_rise_nowhere_are_taken(tmp_path):
    path = tmp_path / "run.yaml"
    text = MINIMAL.replace("phase1: {batch_size: 8}", "phase1: {batch_size: 8, lr: &lr {peak: 0.05, decay: constant}}")
    path.write_text(text.replace("phase2: {batch_size: 96}", "phase2: {batch_size: 96, lr: *lr}"), encoding="utf-8-sig")
    config = load_config(path, [f"seed={2**63 - 1}"])
    assert config.phase1.lr == config.phase2.lr and config.phase2.lr.peak == 0.05 and config.seed == 2**63 - 1
