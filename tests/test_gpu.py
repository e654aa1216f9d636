"""What only a GPU can tell: pytest -m gpu, on a machine that has one; with two, that a model stays on its own and that processes share."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, WORDS, prompts_of, tiny_speculator, write_config, write_model
from test_house import ROOT
from test_parallel import WAYS, figures, job, place, run_jobs, settings  # noqa: F401 (place is a fixture)
from test_training import records, weights_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from data.prepare.run import prepare
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.losses import LossWeights, head_losses
from fms_spec.options import DecodingOptions
from fms_spec.passes import Arithmetic, Compiled, InPlace
from fms_spec.proposers import TopKProposer
from fms_spec.sampling import Sampling
from fms_spec.speculators.directory import describe, save_speculator
from pipelines.config import load_config
from pipelines.train.checkpoint import whole_checkpoints
from pipelines.train.compiled import check_compiler
from pipelines.train.run import train

GPUS = torch.cuda.device_count()  # none unless pytest was called with -m gpu
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no GPU that torch sees; pytest -m gpu shows it those that there are")]
two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
PROMPTS = prompts_of(5, 9, 3)
ROW = torch.cat(prompts_of(30, 20))[None]
SEGMENTS = torch.tensor([[0] * 30 + [1] * 20])


def curve(run_dir):
    """[(step, metric, value)] of losses and acceptance."""
    wanted = ("loss", "acceptance")
    return [(line["step"], name, line[name]) for line in records(run_dir) for name in sorted(line) if any(word in name for word in wanted)]


def same_curves(first, second, rel):
    assert [line[:2] for line in first] == [line[:2] for line in second] and first
    for (step, name, value), (_, _, expected) in zip(first, second):
        if "acceptance" not in name:  # a choice may hang on rounding
            assert value == pytest.approx(expected, rel=rel), f"{name} at step {step}"


@pytest.mark.parametrize("backend", ["fms", "transformers"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.1)])
def test_states_are_those_of_a_cpu(model_dir, backend, dtype, tolerance):
    expected = BaseModel(str(model_dir), dtype="float32", backend=backend, device="cpu").hidden_states(ROW, SEGMENTS)
    model = BaseModel(str(model_dir), dtype=dtype, backend=backend)
    found = model.hidden_states(ROW, SEGMENTS)
    assert found.device.type == "cuda" and found.dtype == model.dtype
    off = (found.float().cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert off.max() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_says_what_transformers_says(model_dir, family):
    model = BaseModel(str(model_dir), dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(model.device).eval()
    speculator = tiny_speculator(BaseModel(str(model_dir), dtype="float32", device="cpu"), family).to(model.device)
    speculator.attach(model)
    for proposer in (None, TopKProposer(speculator, [2, 2, 1])):
        results, _ = decode(model, PROMPTS, DecodingOptions(max_new_tokens=40), proposer)
        for prompt, result in zip(PROMPTS, results):
            expected = theirs.generate(
                prompt[None].to(model.device), attention_mask=torch.ones_like(prompt[None]).to(model.device), max_new_tokens=40,
                do_sample=False, eos_token_id=0, pad_token_id=0,
            )  # fmt: skip
            assert result.tokens == expected[0, len(prompt) :].tolist()


class Attended(TorchDispatchMode):
    """The ways in which torch computes attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "attention" in str(function):
            self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["fms", "transformers"])
def test_no_attention_is_planned_anew_for_every_length(tmp_path, backend):
    directory = write_model(tmp_path, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)  # heads of 64
    model = BaseModel(str(directory), dtype="bfloat16", backend=backend)
    speculator = tiny_speculator(BaseModel(str(directory), dtype="float32", device="cpu"), "eagle3").to(model.device, model.dtype)
    speculator.attach(model)
    with Attended() as attended:
        model.hidden_states(ROW, SEGMENTS)
        decode(model, PROMPTS, DecodingOptions(max_new_tokens=6), TopKProposer(speculator, [2, 1]))
    assert attended.seen and not any("cudnn" in name for name in attended.seen), attended.seen


def test_sampled_texts_are_those_of_a_cpu(model_dir):
    texts = []
    for device in ("cpu", "cuda"):
        model = BaseModel(str(model_dir), dtype="float32", device=device)
        results, _ = decode(
            model, PROMPTS, DecodingOptions(max_new_tokens=20, sampling=Sampling(temperature=0.8, top_k=10), seeds=(1, 2, 3))
        )
        texts.append([result.tokens for result in results])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("way", [InPlace, Compiled])
def test_losses_and_their_gradients_are_those_of_double_precision(model_dir, family, dtype, tolerance, way):
    """Cross-entropy and distillation of three heads, all logits at once in fp64 on the CPU beside ours."""
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        model = BaseModel(str(model_dir), dtype="float32", device="cpu")
        speculator = tiny_speculator(model, family, n_predict=3)
        states = model.hidden_states(ROW, SEGMENTS)
        positions = choose_positions(usable_positions(SEGMENTS, torch.zeros(1, dtype=torch.int64), 3))
        if kind == torch.float64:
            speculator.double()
            if family == "hidden_state":
                speculator.frozen = tuple(weight.double() for weight in speculator.frozen)
            loss = plain_loss(speculator, make_windows(states.double(), ROW, positions, 3), model)
        else:
            there = BaseModel(str(model_dir), dtype="float32", device=device)
            speculator.to(device).attach(there)
            windows = make_windows(states.to(device), ROW, positions, 3)
            counts = torch.tensor(positions.counts, dtype=torch.float32, device=device)
            loss, _ = head_losses(speculator, windows, there, LossWeights(1.0, 1.0, 0.0, (1.0,) * 3), counts, Arithmetic(dtype, way))
        loss.backward()
        grads = torch.cat([weight.grad.flatten().double().cpu() for weight in speculator.parameters() if weight.grad is not None])
        found.append((loss.item(), grads))
    (expected, expected_grads), (loss, grads) = found
    assert loss == pytest.approx(expected, rel=tolerance)
    assert (grads - expected_grads).norm() < 3 * tolerance * expected_grads.norm()


def plain_loss(speculator, windows, model):
    total, teacher_weight = 0.0, speculator.teacher_weight(model).double()
    for head, (features, weight, _) in enumerate(speculator.heads(windows.hidden, windows.tokens, windows.counts)):
        log_q = F.linear(features, weight.double()).log_softmax(-1)
        log_p = F.linear(windows.target_states(head), teacher_weight).log_softmax(-1)
        targets = speculator.draft_targets(windows.targets(head))
        loss = F.nll_loss(log_q, targets, ignore_index=-1, reduction="sum") + F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        total = total + loss / len(features)
    return total


@pytest.mark.parametrize("family", ["hidden_state", "mlp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nine_steps_learn_resume_to_the_same_figures_and_tell_of_the_gpu(tmp_path, config_file, family, dtype):
    config = config_file(family, **{"base_model.dtype": dtype, "checkpoint.keep": 9})
    trainer = train(config, tmp_path / "whole")
    assert {(weight.device.type, weight.dtype) for weight in trainer.speculator.parameters()} == {("cuda", torch.float32)}
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for checkpoint in whole_checkpoints(tmp_path / "resumed/checkpoints")[2:]:  # all but steps 2 and 4
        shutil.rmtree(checkpoint)
    train(config, tmp_path / "resumed", resume=True)
    same_curves(curve(tmp_path / "resumed"), curve(tmp_path / "whole"), rel=1e-4 if dtype == "float32" else 0.02)
    last = next(line for line in reversed(records(tmp_path / "whole")) if "tokens_per_s" in line)
    assert 0 < last["gpu/allocated_peak_gb"] <= last["gpu/reserved_peak_gb"] and 0 < last["time_share/device"] < 1
    assert sum(value for name, value in last.items() if name.startswith("time_share/")) == pytest.approx(1)
    assert len(weights_of(tmp_path / "whole", tmp_path)) > 0


@pytest.mark.parametrize("changes", [{"hidden_state_cache": "true"}, {"compile": "true"}])
def test_kept_states_and_compiled_parts_train_as_others_do(tmp_path, config_file, changes):
    if "compile" in changes:
        check_compiler()
    train(config_file(), tmp_path / "plain")
    train(config_file(**changes), tmp_path / "changed")
    same_curves(curve(tmp_path / "changed"), curve(tmp_path / "plain"), rel=1e-3)


def test_an_evaluation_loses_nothing(tmp_path, model_dir, data_dir):
    base_model = BaseModel(str(model_dir), dtype="float32", device="cpu")
    speculator = tiny_speculator(base_model, "hidden_state", n_predict=3)
    save_speculator(tmp_path / "speculator", speculator, describe(speculator, base_model))
    words = ["scripts.evaluate", f"--base_model={model_dir}", f"--speculator={tmp_path / 'speculator'}", f"--prompts={data_dir}"]
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.json"
        command = [sys.executable, "-m", *words, "--max_new_tokens=20", f"--dtype={dtype}", f"--out={out}"]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-3000:]
        values = json.loads(out.read_text())
        assert values["environment"]["device"] == torch.cuda.get_device_name() and not values.get("differing"), values


def test_vllm_writes_continuations_on_the_trainers_gpu(tmp_path, corpus_dir):
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm installs it)")
    sizes = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)  # heads of 64
    write_model(tmp_path / "base_model", **sizes)
    prepare(source=str(corpus_dir), tokenizer=str(tmp_path / "base_model"), out_dir=str(tmp_path / "data"), seq_length=64, prompt_length=8)
    held = torch.empty(int(0.3 * torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device="cuda")  # vLLM may not have its 0.9 then
    del held  # but torch keeps it
    changes = {"generation.engine": "vllm", "base_model.dtype": "bfloat16", "schedule.steps": 14}
    write_config(tmp_path / "run.yaml", tmp_path / "base_model", tmp_path / "data", **changes)
    words = [f"{key}={value}" for key, value in changes.items()]
    train(load_config(tmp_path / "run.yaml", words), tmp_path / "run")  # phase 2 twice: it sleeps in between
    assert all(torch.isfinite(torch.tensor(value)) for _, _, value in curve(tmp_path / "run"))


@two
@pytest.mark.parametrize("backend", ["fms", "transformers"])
def test_a_model_on_the_second_gpu_leaves_the_first_alone(model_dir, backend):
    before = torch.cuda.memory_allocated(0)
    model = BaseModel(str(model_dir), dtype="float32", backend=backend, device="cuda:1")
    speculator = tiny_speculator(BaseModel(str(model_dir), dtype="float32", device="cpu"), "hidden_state").to(model.device)
    speculator.attach(model)
    results, timing = decode(model, PROMPTS, DecodingOptions(max_new_tokens=20), TopKProposer(speculator, [2, 1]))
    expected, _ = decode(BaseModel(str(model_dir), dtype="float32", device="cpu"), PROMPTS, DecodingOptions(max_new_tokens=20))
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert model.hidden_states(ROW, SEGMENTS).device == torch.device("cuda:1") and model.vocab_size == WORDS
    assert torch.cuda.memory_allocated(0) == before and timing.verifying > 0


@two
@pytest.mark.parametrize("way", [*WAYS[2], "tensor"])
def test_two_gpus_train_as_one_does(place, way):  # noqa: F811
    ways = WAYS[2] | {"tensor": {"parallel.base_model": "tensor", "parallel.group_size": 2}}
    train(load_config(place / "run.yaml", job(place, "one", **settings(1))["overrides"]), place / f"one-{way}")
    code, output = run_jobs(place, 2, [job(place, f"gpus-{way}", **settings(2, **ways[way]))])
    assert code == 0, output[-3000:]
    same_curves(figures(place, f"gpus-{way}"), figures(place, f"one-{way}"), rel=1e-3)


def test_more_processes_than_gpus_are_refused_in_one_line(place):  # noqa: F811
    code, output = run_jobs(place, GPUS + 1, [job(place, "crowd", **settings(1))])
    assert code == 1 and output.count(f"{GPUS + 1} processes on a machine with {GPUS} GPUs") == 1
    assert 'parallel_worker.py", line' not in output, output  # torchrun tells of a process's end with a traceback of its own
