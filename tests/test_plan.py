"""The plan of a run, before anything is loaded: what it says, and that it is so."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import forked
import pytest
from conftest import write_config, write_model
from test_house import ROOT

from data.prepare.run import prepare
from fms_spec.errors import UserError
from pipelines.config import load_config
from pipelines.generate.vllm_engine import GPU_OVERHEAD
from pipelines.plan.devices import CPU_FRAMEWORK, CPU_HEAP, DEVICES, Device, find_device
from pipelines.plan.plan import Plan, Ranks, Sizes, mend, verdict
from pipelines.train.planned import plan_of

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
CPU = Device("cpu", 64e9, 1e11, 1e10, 1e9, framework=CPU_FRAMEWORK, heap=CPU_HEAP)
LLAMAS = {
    "8B": (dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32), 8.03e9),
    "70B": (dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64), 70.55e9),
}


@pytest.fixture
def llama(tmp_path):
    """Writes a folder with nothing but a config.json, and gives the `RunConfig` shipped for Llama-3.1-8B with that base model."""

    def write(size, **changes):
        values, _ = LLAMAS[size]
        values |= dict(
            architectures=["LlamaForCausalLM"], model_type="llama", num_key_value_heads=8, vocab_size=128256,
            max_position_embeddings=131072,
            tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001,
            rope_scaling=dict(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"
            ),
        )  # fmt: skip
        (tmp_path / size).mkdir(exist_ok=True)
        (tmp_path / size / "config.json").write_text(json.dumps(values))
        few = ["phase1.positions=2048", "phase2.positions=2048"]  # a rehearsal of seconds
        words = [f"base_model.name={tmp_path / size}", *few, *(f"{key}={value}" for key, value in changes.items())]
        return load_config(ROOT / "pipelines/configs/llama3.1_8b.yaml", words)

    return write


def weights(plan):
    parts = plan.moments[plan.worst]
    return parts["base: layers"] + parts["base: embeddings"]


@pytest.mark.parametrize("size", LLAMAS)
def test_a_config_json_is_enough_to_plan_a_llama(llama, size):
    plan = Plan(llama(size), Sizes(), Ranks(), DEVICES["h100"])
    tables = plan.run.tables
    assert weights(plan) - tables == pytest.approx(2 * LLAMAS[size][1], rel=0.001)  # the published number of weights, in bf16
    flops, traffic, moved = plan.work("phase1")["base model"]
    assert flops > 2 * (LLAMAS[size][1] - 2.2e9) * 8 * 4096 and traffic > 0 and moved == 0
    assert plan.fits == (size == "8B") and verdict(plan).startswith("fits: " if plan.fits else "does not fit: ")


def test_sharding_divides_the_layers_and_the_optimiser_and_costs_network(llama):
    whole = Plan(llama("70B"), Sizes(), Ranks(8, 8), DEVICES["h100"])
    split = whole.changed(parallel={"base_model": "shard", "speculator": "shard"})
    before, after = whole.moments["optimiser"], split.moments["optimiser"]
    two_layers = before["base: layers"] / 40
    assert after["base: layers"] == pytest.approx(before["base: layers"] / 8 + two_layers, rel=1e-6)
    assert after["base: embeddings"] == before["base: embeddings"]  # the heads read them at every step
    for part in ("heads: masters", "heads: moments", "gradients"):
        assert after[part] == before[part] // 8
    assert split.work("phase1")["base model"][2] == pytest.approx(4 * 7 / 8 * before["base: layers"])  # four micro-batches
    pairs = whole.changed(parallel={"base_model": "hybrid", "group_size": 2})
    assert pairs.moments["optimiser"]["base: layers"] == pytest.approx(before["base: layers"] / 2 + two_layers, rel=1e-6)


@pytest.mark.parametrize("size, processes, share", [("8B", 1, 1.08), ("8B", 4, 0.7), ("70B", 8, 1.0), ("70B", 4, 1.0)])
def test_what_the_verdict_names_makes_the_run_fit(llama, size, processes, share):
    device = DEVICES["a100-80"]
    plan = Plan(llama(size), Sizes(), Ranks(processes, processes), device)
    plan = Plan(plan.config, plan.sizes, plan.ranks, replace(device, memory=min(plan.peak * share, device.memory)))
    words, mended = mend(plan)
    assert not plan.fits and mended.fits and f"with {' '.join(words)} it fits" in verdict(plan)
    applied = Plan(llama(size, **dict(word.split("=") for word in words)), Sizes(), plan.ranks, plan.device)
    assert applied.fits and applied.peak == mended.peak


def test_vllm_in_the_trainers_process_needs_the_weights_once_more_and_takes_the_rest_only_if_it_is_free(llama):
    plan = Plan(llama("8B", **{"generation.engine": "vllm"}), Sizes(), Ranks(), DEVICES["h100"])
    row = 2 * 32 * 8 * 128 * 2 * (64 + 256)  # keys and values, layers, groups, head width, bytes, tokens
    assert plan.fits and plan.moments["generation"]["vLLM"] == pytest.approx(2 * LLAMAS["8B"][1] + row + GPU_OVERHEAD, rel=0.001)


def test_what_a_cpus_allocator_keeps_of_freed_blocks_is_not_added_to_heads_of_a_few_large_matrices(llama):
    medusa = {"speculator": "{family: medusa, n_predict: 4}", "phase1.loss.smooth_l1": 0.0, "phase2.loss.smooth_l1": 0.0}
    parts = Plan(llama("8B", **medusa), Sizes(), Ranks(), CPU).moments["optimiser"]
    weights = parts["heads: masters"] + parts["heads: moments"] + parts["gradients"]
    assert weights > 4 * 4 * 4 * 128256 * 4096 and parts["allocator"] < 0.02 * weights


def test_a_run_that_no_setting_makes_fit_is_told_what_it_takes(llama):
    assert "it takes a larger --device, or more --processes" in verdict(Plan(llama("70B"), Sizes(), Ranks(), DEVICES["rtx4090"]))


def test_a_base_model_that_no_processes_can_share_is_offered_no_sharing_and_refused_it(llama, tmp_path):
    ranks, device = Ranks(4, 4), DEVICES["rtx4090"]
    alone = {"base_model.backend": "transformers"}
    told = verdict(Plan(llama("70B", **alone), Sizes(), ranks, device))
    assert "parallel.base_model" not in told and told.endswith("it takes a larger --device")
    with pytest.raises(UserError, match="only what ibm-fms runs can be shared; set parallel.base_model=replicate"):
        Plan(llama("70B", **alone, **{"parallel.base_model": "shard"}), Sizes(), ranks, device)
    with pytest.raises(UserError, match="64 heads in 8 groups can't be split over 3 processes"):
        Plan(llama("70B", **{"parallel.base_model": "tensor"}), Sizes(), Ranks(3, 3), device)


def test_a_plan_with_prepared_data_needs_no_weights_of_the_base_model(tmp_path, config_file, model_dir):
    (tmp_path / "bare").mkdir()
    shutil.copy(model_dir / "config.json", tmp_path / "bare")
    plan, note = plan_of(config_file(**{"base_model.name": tmp_path / "bare"}), device="h100")
    assert plan.fits and "rows and prompts as in" in note


def test_a_draft_vocabulary_or_texts_over_the_base_models_are_refused(llama):
    with pytest.raises(UserError, match="draft_vocab_size 200000"):
        Plan(llama("8B", **{"speculator.draft_vocab_size": 200000}), Sizes(), Ranks(), DEVICES["h100"])
    with pytest.raises(UserError, match="over the context"):
        Plan(llama("8B"), Sizes(prompt_length=131072), Ranks(), DEVICES["h100"])
    with pytest.raises(UserError, match="--device=h1000: give here, or one of a100-40"):
        find_device("h1000", "bfloat16")


def run(directory, *words):
    return forked.run(*words, cwd=directory, env=ENVIRONMENT)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--device=h100", "--device is for --plan only"),
        ("--processes=2", "--processes is for --plan only"),
        ("--plan --device=abacus", "--device=abacus: give here"),
        ("--plan --processes=0", "--processes=0"),
        ("--plan --processes=2 --processes_per_node=4", "no more on a node than in all"),
        ("--plan base_model.name=nowhere", "nowhere"),
    ],
)
def test_mistakes_in_what_is_to_be_planned_are_named(tmp_path, config_file, words, message):
    config_file()
    finished = run(tmp_path, "scripts.train", "--config=run.yaml", "--out_dir=out", *words.split())
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 1 and len(lines) == 1 and message in lines[0], finished.stderr
    assert "Traceback" not in finished.stderr and not (tmp_path / "out").exists()


def test_a_plan_is_printed_and_nothing_is_written_even_where_a_run_stands(tmp_path, config_file):
    config_file(hidden_state_cache=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("do not touch")
    before = sorted(tmp_path.rglob("*"))
    words = ["--config=run.yaml", "--out_dir=out", "--plan", "--processes=4", "--device=l40s", "hidden_state_cache=true"]
    finished = run(tmp_path, "scripts.train", *words, f"base_model.name={config_file().base_model.name}")
    assert finished.returncode == 0, finished.stderr
    assert sorted(tmp_path.rglob("*")) == before
    for word in ("KV cache", "loss chunk", "heads: moments", "GB of network", "cache on disk", "fits: "):
        assert word in finished.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(base model, prepared data) large enough for python and torch themselves not to decide a run's memory: 100 million weights."""
    place = tmp_path_factory.mktemp("large")
    (place / "corpus").mkdir()
    for i in range(40):  # enough for the steps below
        (place / "corpus" / f"{i:02}.txt").write_text(" ".join(f"w{(7 * i + j) % 90}" for j in range(128)))
    base = write_model(
        place / "base", vocab_size=32768, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=4,
        num_hidden_layers=8,
    )  # fmt: skip
    prepare(source=str(place / "corpus"), tokenizer=str(base), out_dir=str(place / "data"), seq_length=128, prompt_length=8, held_out=3)
    return base, place / "data"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, processes, changes",
    [
        ("hidden_state", 1, {"schedule.pattern": "[[phase1, 1]]"}),
        ("mlp", 1, {"schedule.pattern": "[[phase1, 1]]", "speculator.inner_dim": 384, "phase1.batch_size": 4}),
        (
            "hidden_state", 1,
            {
                "schedule.pattern": "[[phase2, 1]]", "generation.batch_size": 64, "generation.max_new_tokens": 32,
                "speculator.base_layers": "[0, 3, 6]",
            },
        ),
        (
            "mlp", 2,
            {
                "schedule.pattern": "[[phase1, 1]]", "speculator.inner_dim": 384, "phase1.batch_size": 2,
                "parallel.base_model": "shard", "parallel.speculator": "shard",
            },
        ),
    ],
)  # fmt: skip
def test_the_planned_peak_is_within_15_percent_of_what_a_run_takes(tmp_path, large, family, processes, changes):
    base, data = large
    of_family = {"phase1.loss.smooth_l1": 0.0}
    if family == "hidden_state":
        of_family = {"speculator.draft_vocab_size": 16384, "speculator.width": 512}
    changes = {
        "schedule.steps": 2, "speculator.inner_dim": 1024, "phase1.batch_size": 16, "phase1.positions": "null", "phase2.batch_size": 32,
        "phase2.loss.distillation": 1.0, "phase2.loss.only_accepted": "false", "validation.prompts": 0,
    } | of_family | changes  # fmt: skip
    config = write_config(tmp_path / "run.yaml", base, data, family, **changes)
    planned = Plan(config, Sizes(128, 8), Ranks(processes, processes), CPU).peak
    overrides = [f"{key}={value}" for key, value in changes.items()]
    child = (
        "import resource, subprocess, sys; finished = subprocess.run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(finished.returncode)"
    )
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *several, "-m", "scripts.train", "--config=run.yaml", "--out_dir=out", *overrides]
    finished = subprocess.run([sys.executable, "-c", child, *command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert planned == pytest.approx(int(finished.stdout.split()[-1]), rel=0.15)
