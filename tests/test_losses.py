"""The losses against double-precision autograd on all logits, in every path, and in both dtypes."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fms_spec import passes
from fms_spec.losses import LossWeights, SoftTargetLoss
from fms_spec.passes import Arithmetic, Compiled, InPlace, arithmetic_of, from_logits

POSITIONS, WIDTH, BASE_WIDTH, VOCABULARY = 37, 10, 6, 45
PATHS = {
    "cross_entropy": (1.0, 0.0, 0.0), "distillation": (0.0, 1.0, 0.0), "acceptance": (0.0, 0.0, 1.0), "text_and_teacher": (0.7, 0.3, 0.0),
    "teacher_twice": (0.0, 0.6, 0.4), "all": (0.5, 0.3, 0.9),
}  # fmt: skip


def case(scale=1.0):
    """Features, weight, targets (some of none), teacher states and their weight."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    targets = torch.randint(-1, VOCABULARY, (POSITIONS,), generator=generator)
    targets[::5] = -1
    return (
        scale * draw(POSITIONS, WIDTH),
        draw(VOCABULARY, WIDTH),
        targets,
        scale * draw(POSITIONS, BASE_WIDTH),
        draw(VOCABULARY, BASE_WIDTH),
    )


def plain_loss(features, weight, targets, teacher, teacher_weight, path):
    """All logits at once, in double precision."""
    cross_entropy, distillation, acceptance = path
    log_q = F.linear(features, weight).log_softmax(-1)
    log_p = F.linear(teacher.double(), teacher_weight.double()).log_softmax(-1)
    rate = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    return (
        cross_entropy * F.nll_loss(log_q, targets, ignore_index=-1, reduction="sum")
        + distillation * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        - acceptance * rate.log().sum()
    )


class NotCompiled(Compiled):
    """What a GPU's compiler is given, as it stands."""

    pass_over = staticmethod(from_logits)


WAYS = [InPlace, NotCompiled]


def our_loss(features, weight, targets, teacher, teacher_weight, weights, dtype, way=InPlace, cap=None):
    """Of one head, its scale 1."""
    given = (lambda _: teacher, teacher_weight, cap) if weights.teacher else (None, None, None)
    return SoftTargetLoss.apply([targets], *given, torch.ones(1), weights, Arithmetic(dtype, way), None, features, weight)[0]


def both(path, dtype, train_weight=True, scale=1.0, way=InPlace):
    """(loss, gradients) of ours in `dtype` and of the plain one, on the same numbers, weighed by 0.3."""
    features, weight, targets, teacher, teacher_weight = case(scale)
    if dtype == torch.bfloat16:
        features, weight, teacher, teacher_weight = (value.bfloat16() for value in (features, weight, teacher, teacher_weight))
    weights = LossWeights(path[0], path[1], 0.0, (1.0,), path[2])
    results = []
    for kind in (dtype, torch.float64):
        x, w = features.to(kind, copy=True).requires_grad_(), weight.to(kind, copy=True).requires_grad_(train_weight)
        if kind == torch.float64:
            loss = plain_loss(x, w, targets, teacher, teacher_weight, path)
        else:
            loss = our_loss(x, w, targets, teacher, teacher_weight, weights, dtype, way)
        (0.3 * loss).backward()
        results.append([loss.detach().double(), x.grad.double()] + ([w.grad.double()] if train_weight else []))
    return results


@pytest.fixture(params=[512, 8])
def rows(request, monkeypatch):
    """Positions of a chunk, on any device: all of them in one, or five."""
    for name in ("CPU_ROWS", "GPU_ROWS"):
        monkeypatch.setattr(passes, name, request.param)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_losses_and_gradients_are_those_of_double_precision_autograd(rows, path, way):
    for found, expected in zip(*both(path, torch.float32, way=way)):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_base_models_soft_cap_bounds_its_logits_and_not_the_drafts(rows, way):
    features, weight, targets, teacher, teacher_weight = case()
    x, weights = features.requires_grad_(), LossWeights(0.0, 1.0, 0.0, (1.0,))
    found = our_loss(x, weight, targets, teacher, teacher_weight, weights, torch.float32, way, cap=1.5)
    log_q = F.linear(features.double(), weight.double()).log_softmax(-1)
    capped = 1.5 * torch.tanh(F.linear(teacher.double(), teacher_weight.double()) / 1.5)
    expected = F.kl_div(log_q, capped.log_softmax(-1), log_target=True, reduction="sum")
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-5)
    for ours, theirs in zip(torch.autograd.grad(found, x), torch.autograd.grad(expected, features)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_frozen_readout_gets_no_gradient_and_the_features_the_same(path):
    for found, expected in zip(*both(path, torch.float32, train_weight=False)):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["distillation", "all"])
def test_compiled_losses_and_gradients_are_those_of_double_precision_autograd(path):
    for found, expected in zip(*both(PATHS[path], torch.float32, way=Compiled)):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_in_bf16_only_the_matrix_products_are_rounded(path, way):
    found, expected = both(path, torch.bfloat16, way=way)
    torch.testing.assert_close(found[0], expected[0], rtol=5e-3, atol=0)  # logits rounded to 8 bits
    for ours, theirs in zip(found[1:], expected[1:]):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_distributions_with_nothing_in_common_still_give_finite_losses_and_gradients(path, way):
    (loss, *gradients), _ = both(path, torch.float32, scale=60.0, way=way)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_the_acceptance_loss_is_zero_where_the_head_says_what_the_base_model_says():
    _, _, targets, teacher, weight = case()
    weights = LossWeights(0.0, 0.0, 0.0, (1.0,), 1.0)
    assert our_loss(teacher, weight, targets, teacher, weight, weights, torch.float32).item() == pytest.approx(0.0, abs=1e-5)
    assert our_loss(-teacher, weight, targets, teacher, weight, weights, torch.float32) > POSITIONS


def test_a_sum_of_products_stays_in_fp32_within_autocast():
    a, b = torch.rand(300, 7, generator=torch.Generator().manual_seed(0)), torch.rand(300, 7, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert passes.dot(a, b).item() == pytest.approx((a.double() * b.double()).sum().item(), rel=1e-6)


def test_matrix_products_are_computed_in_fp32_where_bf16_is_slow(monkeypatch):
    states = torch.zeros(1, dtype=torch.bfloat16)
    cpus = {
        "amx": ({"amx_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, torch.bfloat16),
        "avx512_bf16 at full rate": ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        "avx512_bf16 at half of it": ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, torch.float32),
        "neither": ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32),
        "unknown": ({}, torch.float32),
    }
    for found, expected in cpus.values():
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert arithmetic_of(states) == Arithmetic(expected, InPlace) and arithmetic_of(states.float()).dtype == torch.float32
    assert arithmetic_of(torch.zeros(1, dtype=torch.bfloat16, device="meta")).dtype == torch.bfloat16


def test_a_gpus_losses_are_compiled_where_its_compiler_works_and_it_is_told_where_not(monkeypatch):
    states = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)

    def broken(*_):
        raise RuntimeError("Failed to find C compiler\nand more")

    for compile, way in ((lambda work: lambda _: work, Compiled), (broken, InPlace)):
        passes.compiles.cache_clear()
        monkeypatch.setattr(passes.torch, "compile", compile)
        monkeypatch.setattr(passes.torch, "ones", lambda *_, **__: None)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert [arithmetic_of(states), arithmetic_of(states)] == [Arithmetic(torch.bfloat16, way)] * 2
        assert len(told) == (way is InPlace) and all("(Failed to find C compiler)" in str(warning.message) for warning in told)
    passes.compiles.cache_clear()


def test_a_gpus_chunks_hold_as_many_logits_whatever_the_vocabulary():
    on_a_gpu = Arithmetic(torch.bfloat16, Compiled)
    assert [on_a_gpu.rows(columns) for columns in (3072, 32768, 128256, 2**20)] == [8192, 8192, 2048, 512]
    assert Arithmetic(torch.float32, InPlace).rows(3072) == Arithmetic(torch.float32, InPlace).rows(2**20) == 512
