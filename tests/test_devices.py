"""What is asked of a GPU before and while it works; torch's answers about GPUs are put in its place here."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_speculator, write_config
from test_training import records
from torch.utils.flop_counter import FlopCounterMode

import fms_spec.losses
import fms_spec.passes
import fms_spec.timing
import pipelines.train.loop
import pipelines.train.metrics
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.losses import head_losses
from fms_spec.passes import Arithmetic, InPlace
from fms_spec.speculators import interface as speculator_base
from fms_spec.speculators.registry import FAMILIES
from fms_spec.timing import Marks
from pipelines.generate import vllm_engine
from pipelines.generate.vllm_engine import GPU_OVERHEAD, device_settings
from pipelines.parallel.processes import Processes
from pipelines.plan.devices import DEVICES
from pipelines.plan.plan import Plan, Ranks, Sizes
from pipelines.train.device_metrics import DeviceMetrics, known_device
from pipelines.train.run import train

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GiB with `free` bytes free and a torch that keeps `kept` of the others; `emptied` counts how often it gave them back."""
    state = SimpleNamespace(free=30 * GIB, kept=20 * GIB, emptied=0)

    def empty():
        state.free, state.kept, state.emptied = state.free + state.kept, 0, state.emptied + 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (state.free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 12_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 15_000_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    return state


def test_no_test_but_those_marked_gpu_sees_one(request):
    assert (not torch.cuda.is_available() and os.environ["CUDA_VISIBLE_DEVICES"] == "") or request.config.option.markexpr == "gpu"


def test_vllm_takes_of_a_gpu_what_training_leaves_free_and_no_more_than_its_share(gpu, model_dir):
    share = device_settings(model_dir, "bfloat16", 64, 0.9)["gpu_memory_utilization"]
    assert share * 80 * GIB == pytest.approx(50 * GIB - GPU_OVERHEAD) and gpu.emptied == 1
    assert device_settings(model_dir, "bfloat16", 64, 0.3) == {"gpu_memory_utilization": pytest.approx(0.3)}


def test_vllm_is_refused_a_gpu_without_room_for_the_weights_and_one_row_in_a_line(gpu, model_dir):
    weights = sum(weight.nbytes for weight in BaseModel(str(model_dir), dtype="bfloat16", device="cpu").model.state_dict().values())
    row = 2 * 2 * 2 * 8 * 2 * 128  # keys and values, layers, groups, head width, bytes, tokens in whole blocks
    gpu.kept, gpu.free = 0, GPU_OVERHEAD + weights + row
    device_settings(model_dir, "bfloat16", 64, 0.9)
    gpu.free -= 1
    with pytest.raises(UserError, match="are free, memory_share is 0.9.; make room, or give it a GPU of its own") as error:
        device_settings(model_dir, "bfloat16", 64, 0.9)
    assert "\n" not in str(error.value)
    gpu.free = 60 * GIB
    with pytest.raises(UserError, match="memory_share is 5e-07"):
        device_settings(model_dir, "bfloat16", 64, 5e-7)


def test_vllm_wakes_where_there_is_room_for_what_it_gave_back_and_starts_again_where_there_is_not(gpu, model_dir, monkeypatch):
    engine = vllm_engine.VLLMEngine.__new__(vllm_engine.VLLMEngine)
    calls = []
    engine.llm, engine.asleep, engine.lent = SimpleNamespace(wake_up=lambda: calls.append("woken")), True, 50 * GIB
    monkeypatch.setattr(engine, "close", lambda: calls.append("closed"))
    monkeypatch.setattr(engine, "start", lambda index: calls.append(f"started at {index}"))
    engine.wake(3)
    assert calls == ["woken"] and not engine.asleep and gpu.emptied == 1
    engine.lent = 51 * GIB
    engine.wake(4)
    assert calls == ["woken", "closed", "started at 4"]


def test_times_on_a_gpu_are_taken_on_the_gpu_that_computes(monkeypatch):
    recorded = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=recorded.append, elapsed_time=lambda _: 2000))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", recorded.append)
    marks = Marks(torch.device("cuda:1"))
    marks.mark("drafting")
    assert marks.seconds() == {"drafting": 2.0}
    assert recorded == ["stream of cuda:1", "stream of cuda:1", torch.device("cuda:1")]


@pytest.mark.parametrize("family", ["mlp_tied", "hidden_state"])
def test_the_base_models_best_tokens_are_found_without_the_logits_of_all_positions(base_model, family, monkeypatch):
    speculator, states = tiny_speculator(base_model, family), torch.randn(3, 40, base_model.width)
    whole, seen, linear = speculator.best_base_tokens(base_model, states), [], torch.nn.functional.linear
    monkeypatch.setattr(fms_spec.passes, "CPU_ROWS", 7)
    monkeypatch.setattr(speculator_base.F, "linear", lambda x, weight: seen.append(len(x)) or linear(x, weight))
    assert torch.equal(speculator.best_base_tokens(base_model, states), whole) and whole.shape == (3, 40)
    assert max(seen) == 7 and sum(seen) == 120


def test_what_a_gpu_has_queued_counts_in_the_rate_and_stands_in_a_part_of_its_own(tmp_path, config_file, monkeypatch):
    clock, tolist = [0.0], torch.Tensor.tolist

    def slow(tensor):
        if tensor.is_floating_point() and tensor.shape == (6,):  # three losses, count, norm, rate: a line of the log
            clock[0] += 100.0
        return tolist(tensor)

    monkeypatch.setattr(fms_spec.timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.Tensor, "tolist", slow)
    train(config_file(**{"validation.prompts": 0}), tmp_path / "run", resume=False)
    last = records(tmp_path / "run")[-1]
    shares = {name: value for name, value in last.items() if name.startswith("time_share/")}
    assert shares["time_share/device"] > 0.99 and sum(shares.values()) == pytest.approx(1)
    assert last["tokens_per_s"] == pytest.approx(last["tokens"] / 900, rel=0.01)


@pytest.mark.parametrize("family", ["mlp", "hidden_state"])
def test_a_plans_flops_are_those_that_torch_counts(tmp_path, model_dir, data_dir, family):
    config = write_config(tmp_path / "run.yaml", model_dir, data_dir, family, **{"phase1.positions": "null", "phase1.accumulate": 1})
    plan, heads = Plan(config, Sizes(64, 8), Ranks(), DEVICES["h100"]), config.speculator.n_predict
    base_model = BaseModel(str(model_dir), dtype="float32", device="cpu")
    speculator = FAMILIES[config.speculator.family].build(config.speculator, base_model)
    speculator.attach(base_model)
    tokens, segments = torch.zeros(3, 64, dtype=torch.int64), torch.zeros(3, 64, dtype=torch.int64)
    attend = lambda q, k, *_, **__: 4 * q[0] * q[1] * q[2] * k[2] * q[3]  # noqa: E731, which torch's counter doesn't know of a CPU
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attend}
    with FlopCounterMode(display=False, custom_mapping=attention) as counted:
        states = base_model.hidden_states(tokens, segments)
    work = plan.work("phase1")
    assert work["base model"][0] == counted.get_total_flops()
    positions = choose_positions(usable_positions(segments, torch.zeros(3, dtype=torch.int64), heads))
    windows = make_windows(states, tokens, positions, heads)
    with FlopCounterMode(display=False) as counted:
        head_losses(speculator, windows, base_model, config.phase1.loss.weights(heads), torch.ones(heads))[0].backward()
    assert work["heads and losses"][0] == counted.get_total_flops()


def test_the_metrics_of_a_gpu_are_its_memory_and_the_share_of_its_rate_and_a_cpu_has_none(gpu, tmp_path, config_file, monkeypatch):
    config, sizes, now = config_file(), Sizes(64, 8), [5.0]
    monkeypatch.setattr(pipelines.train.device_metrics.time, "perf_counter", lambda: now[0])
    metrics = DeviceMetrics(config, sizes, Processes(), torch.device("cuda:0"))
    now[0] = 7.0
    found = metrics.figures({"phase1": 10, "phase2": 4})
    plan = Plan(config, sizes, Ranks(), DEVICES["h100"])
    done = {phase: sum(plan.work(phase)[part][0] for part in ("base model", "heads and losses")) for phase in ("phase1", "phase2")}
    rate = (10 * done["phase1"] + 4 * done["phase2"]) / 2.0
    assert found == {"gpu/allocated_peak_gb": 12, "gpu/reserved_peak_gb": 15, "gpu/rate_share": pytest.approx(rate / 989e12)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA TITAN RTX")
    unknown = DeviceMetrics(config, sizes, Processes(), torch.device("cuda:0")).figures({"phase1": 10})
    assert set(unknown) == {"gpu/allocated_peak_gb", "gpu/reserved_peak_gb"}
    assert DeviceMetrics(config, sizes, Processes(), torch.device("cpu")).figures({"phase1": 10}) == {}


def test_a_gpu_is_known_by_the_drivers_name_where_its_rate_is_that_of_the_data_sheet():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200", "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA H100 PCIe": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA H20": None,
    }  # fmt: skip
    assert {name: found and found.name for name, found in ((name, known_device(name)) for name in names)} == names
    assert known_device("NVIDIA A100-SXM4-80GB").flops == DEVICES["a100-80"].flops


@pytest.mark.parametrize("family", ["mlp", "hidden_state"])
def test_losses_in_bf16_train_as_those_in_fp32_do_and_leave_the_masters_fp32(tmp_path, config_file, family, monkeypatch):
    """As on a GPU: many a CPU would compute a bf16 base model's losses in fp32."""
    changes = {"schedule.steps": 9, "schedule.pattern": "[[phase1, 1]]", "base_model.dtype": "bfloat16", "validation.prompts": 0}
    curves, dtypes, loss = {}, set(), fms_spec.losses.SoftTargetLoss.apply

    def seen(*inputs):
        dtypes.add(inputs[6].dtype)
        return loss(*inputs)

    monkeypatch.setattr(fms_spec.losses.SoftTargetLoss, "apply", seen)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setattr(fms_spec.losses, "arithmetic_of", lambda _, dtype=dtype: Arithmetic(dtype, InPlace))
        trainer = train(config_file(family, **changes), tmp_path / name, resume=False)
        curves[name] = [record["phase1/loss"] for record in records(tmp_path / name)]
        assert {parameter.dtype for parameter in trainer.speculator.parameters()} == {torch.float32}
        assert {value.dtype for state in trainer.optimizer.state.values() for value in state.values()} == {torch.float32}
    assert dtypes == {torch.float32, torch.bfloat16}
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.02) and curves["bf16"] != curves["fp32"]
    assert curves["bf16"][-1] < curves["bf16"][0]
