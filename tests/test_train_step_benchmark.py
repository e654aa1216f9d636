"""The training step's benchmark on a tiny model, and the report over result files."""

import json
import multiprocessing
import sys
from dataclasses import replace

import forked
import pytest
import torch
from forked import FORKS

from fms_spec.losses import head_losses
from fms_spec.passes import arithmetic_of
from pipelines.measure import heads as benchmark_heads
from pipelines.measure.benchmarks import run_report, run_train_step
from pipelines.measure.heads import (
    KERNELS,
    RandomBase,
    build_heads,
    counts_of,
    head_step,
    kernel_case,
    kernel_loss,
    loss_memory,
    loss_weights,
    plain_losses,
    product_rate,
    random_windows,
)
from pipelines.measure.results import markdown, ratios, read_results, rows
from pipelines.measure.train_step import FAMILIES, shape_of
from scripts.benchmark import Report, TrainStep

CPU = torch.device("cpu")
TINY = shape_of("tiny", 16, 96, 24, (12, 20), 16, heads=3, tokens=40)


@pytest.fixture(scope="module")
def results(tmp_path_factory, model_dir, data_dir):
    """A file with the lines of every part but torch.compile's, which takes minutes."""
    out = tmp_path_factory.mktemp("results") / "tiny.jsonl"
    parts = ("heads", "wide_heads", "loss", "base_forward", "rest", "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda _: FORKS)  # eight processes of its own, which import all of torch each
        run_train_step(TrainStep(
            base_model=str(model_dir), data=str(data_dir), tokens=128, rounds=1, wide_vocab=64, parts=parts, dtype="float32", out=str(out),
        ))  # fmt: skip
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_version_that_is_compared_with_says_the_same(family):
    base = RandomBase(TINY, torch.float32, CPU)
    speculator, weights = build_heads(TINY, family, base), loss_weights(family, TINY.heads)
    windows, gradients = random_windows(TINY, TINY.tokens, torch.float32, CPU), []
    for losses_of in (head_losses, plain_losses):
        speculator.zero_grad()
        loss, losses = losses_of(speculator, windows, base, weights, counts_of(windows))
        loss.backward()
        gradients.append([loss.detach(), losses, *(parameter.grad.clone() for parameter in speculator.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_micro_batchs_losses_are_shares_of_the_whole_steps():
    base = RandomBase(TINY, torch.float32, CPU)
    speculator, weights = build_heads(TINY, "mlp", base), loss_weights("mlp", TINY.heads)
    windows = random_windows(TINY, TINY.tokens, torch.float32, CPU)
    with torch.no_grad():
        _, part = head_losses(speculator, windows, base, weights, torch.tensor([80.0, 40.0, 0.0]))
        _, whole = head_losses(speculator, windows, base, weights, counts_of(windows))
    torch.testing.assert_close(part, whole * torch.tensor([0.5, 1.0, 40.0]))


def test_every_loss_kernel_gives_the_same_loss_and_gradients():
    found = []
    for kernel in KERNELS:
        features, weight, targets = kernel_case(TINY, torch.float32, CPU, 2, 40)
        loss = kernel_loss(kernel, features, weight, targets)
        loss.backward()
        found.append([loss.detach(), weight.grad, *(x.grad for x in features)])
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_loss_takes_less_than_a_tenth_of_the_plain_versions_memory():
    shape = shape_of("some", 16, 8192, 64, (8, 8), 16, heads=3, tokens=4096)
    ours, plain = (loss_memory(kernel, shape, "float32", CPU) for kernel in ("ours", "plain"))
    assert 0.9 * 4 * 512 * 8192 < ours < plain / 10  # a chunk's logits, to the page


def test_flops_are_those_of_the_matrix_products(monkeypatch):
    monkeypatch.setattr(benchmark_heads, "product_rate", lambda *_: 1e9)
    line = head_step(replace(TINY, heads=1), "mlp", "float32", CPU, rounds=1)
    # Logits and projection, each times three; the first projection's input needs no gradient.
    assert line["flops"] == 40 * (6 * 16 * 96 + 4 * 16 * 16)
    assert line["share_of_limit"] == pytest.approx(line["flops"] / 1e9 / line["seconds"]["ours"])
    assert product_rate(8, 16, 32, torch.float32, CPU, repeats=1) > 0


def test_the_benchmark_says_of_every_part_what_it_took_and_on_which_machine(results):
    lines = read_results([results])
    names = {"head_step", "pruned_heads", "loss", "base_forward", "step_parts", "rotary", "best_token", "freed_memory"}
    assert {line["name"] for line in lines} == names
    assert all(line["benchmark"] == "train_step" and line["environment"]["versions"]["torch"] for line in lines)
    assert all("cores" in line["environment"]["device"] for line in lines)
    steps = [line for line in lines if line["name"] == "head_step"]
    assert {(line["shape"], line["family"], line["dtype"]) for line in steps} == {
        (shape, family, dtype) for shape in ("base_model", "wide") for family in FAMILIES for dtype in ("float32", "bfloat16")
    }
    for line in lines:
        if line["name"] == "loss":
            products = arithmetic_of(torch.empty(0, dtype=getattr(torch, line["dtype"]))).dtype
            most = 1e-6 if products == torch.float32 else 2e-4
            assert line["relative_error"]["ours"] < most and line["loss_dtype"]["ours"] == "float32"
        if line["name"] == "step_parts":
            assert set(line["seconds"]) == {"data", "base_model", "heads", "optimizer", "logging"} and line["tokens"] == 128
            assert 0 < line["rest"] < 1


def test_a_report_holds_every_line_and_every_ratio(results, tmp_path, capsys):
    lines = read_results([results])
    run_report(Report(results=str(results), out=str(tmp_path / "report")))
    text = (tmp_path / "report/report.md").read_text()
    assert text == markdown(lines) and text.count("| train_step |") == len(lines) == len(rows(lines))
    assert lines[0]["environment"]["device"] in text and "over_plain" in text
    assert (tmp_path / "report/report.png").read_bytes().startswith(b"\x89PNG")
    assert "head_step" in capsys.readouterr().out
    assert len(ratios(lines)) == sum(len(json.dumps(line).split("over_")) - 1 for line in lines if line["name"] != "pruned_heads") + 2 * 4


def test_a_report_is_made_of_several_files_given_with_commas_between(results, tmp_path):
    lines = read_results([results])
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(lines[0]) + "\n")
    finished = forked.run("scripts.benchmark", "report", f"--results={results},{other}", f"--out={tmp_path / 'report'}", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "report/report.md").read_text() == markdown(lines + lines[:1])


def test_lines_of_other_benchmarks_are_reported_too():
    measured = {"tokens_per_s": {"plain": 84.0}, "speculator_over_plain": 0.86}
    line = {"benchmark": "decode", "name": "batch", "batch": 4, **measured, "environment": {}}
    assert rows([line]) == [["decode", "batch", "batch 4", "tokens_per_s.plain 84, speculator_over_plain 0.86"]]
    assert ratios([line]) == [("decode batch (4): speculator_over_plain", 0.86)]
