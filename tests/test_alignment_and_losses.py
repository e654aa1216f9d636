import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fms_spec import passes
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.losses import LossWeights, head_losses
from fms_spec.speculators.mlp import MLPSpeculator

HEADS, WIDTH, VOCABULARY = 3, 12, 40


class BareBase:
    """As much of a base model as the losses need."""

    def __init__(self):
        self.output_cap = None
        self.output_weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(5))


def row(segments, first=0):
    generator = torch.Generator().manual_seed(3)
    segments = torch.tensor(segments, dtype=torch.int32)
    tokens = torch.randint(0, VOCABULARY, segments.shape, generator=generator)
    states = torch.randn(*segments.shape, WIDTH, generator=generator)
    return states, tokens, segments, torch.full((len(segments),), first)


def lined_up(states, tokens, segments, first, **choice):
    positions = choose_positions(usable_positions(segments, first, HEADS), **choice)
    return make_windows(states, tokens, positions, HEADS)


def slow_mlp_logits(speculator, hidden, tokens):
    """The published formulas for one position, in double precision and plain Python loops over heads."""
    weights = {name: value.double() for name, value in speculator.state_dict().items()}
    n, d = speculator.n_predict, speculator.inner_dim
    state_weight = 0.5 ** (0.5 / n)
    token_weight = math.sqrt((1 - state_weight**2) * d / 2)
    rms = lambda x: x / torch.sqrt((x * x).mean() + 1e-6)  # noqa: E731
    s = rms(hidden.double()) / math.sqrt(2) if speculator.scale_input else hidden.double()
    logits = []
    for i in range(n):
        own = 0 if speculator.tie_weights else i
        projection = min(i, 1) if speculator.tie_weights else i
        u = weights[f"proj.{projection}.weight"] @ s + token_weight / state_weight * weights[f"emb.{own}.weight"][tokens[i]]
        u = weights[f"ln.{own}.weight"] * rms(u) + weights[f"ln.{own}.bias"]
        s = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        logits.append(weights[f"head.{own}.weight"] @ s)
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_each_heads_loss_is_the_slow_double_precision_one_from_the_formulas(tied, scaled):
    torch.manual_seed(0)
    speculator = MLPSpeculator(WIDTH, VOCABULARY, HEADS, inner_dim=10, tie_weights=tied, scale_input=scaled)
    states, tokens, segments, first = row([[0] * 9 + [1] * 7, [0] * 5 + [1] * 8 + [-1] * 3])
    windows, base = lined_up(states, tokens, segments, first), BareBase()
    total, found = head_losses(speculator, windows, base, LossWeights(0.7, 0.3, 0.0, (1.0, 0.5, 2.0)), torch.tensor(windows.counts))

    expected, seen = [0.0] * HEADS, [0] * HEADS
    for r in range(2):
        for t in range(16):
            for i in range(HEADS):
                target = t + 2 + i
                if target >= 16 or segments[r, t] < 0 or segments[r, t] != segments[r, target]:
                    continue
                logits = slow_mlp_logits(speculator, states[r, t], tokens[r, t + 1 : t + 1 + HEADS].tolist() + [0] * HEADS)[i]
                log_q = logits.log_softmax(-1)
                log_p = (base.output_weight.double() @ states[r, t + 1 + i].double()).log_softmax(-1)
                expected[i] += 0.7 * -log_q[tokens[r, target]] + 0.3 * (log_p.exp() * (log_p - log_q)).sum()
                seen[i] += 1
    assert seen == windows.counts and total.item() == pytest.approx(found.sum().item())
    for i, weight in enumerate((1.0, 0.5, 2.0)):
        torch.testing.assert_close(found[i].double(), weight * expected[i] / seen[i], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_plain_autograd_and_do_not_depend_on_the_chunk(monkeypatch):
    torch.manual_seed(0)
    states, tokens, segments, first = row([[0] * 30])
    weights, base = LossWeights(0.5, 1.0, 0.0, (1.0,) * HEADS), BareBase()
    windows = lined_up(states, tokens, segments, first)
    speculator = MLPSpeculator(WIDTH, VOCABULARY, HEADS, inner_dim=10)

    def gradients(loss):
        speculator.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in speculator.named_parameters()}

    plain = 0.0
    for i, (features, weight, _) in enumerate(speculator.heads(windows.hidden, windows.tokens, torch.tensor(windows.counts))):
        log_q = F.linear(features, weight).log_softmax(-1)
        p = F.linear(windows.target_states(i), base.output_weight).softmax(-1)
        plain = plain + 0.5 * F.nll_loss(log_q, windows.targets(i)) + F.kl_div(log_q, p, reduction="batchmean")
    expected = gradients(plain)
    for chunk in (512, 7, 1):
        monkeypatch.setattr(passes, "CPU_ROWS", chunk)
        found = gradients(head_losses(speculator, windows, base, weights, torch.tensor(windows.counts))[0])
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_heads_without_a_weight_are_run_only_where_no_other_has_their_weights():
    states, tokens, segments, first = row([[0] * 30])
    windows = lined_up(states, tokens, segments, first)
    for tied, run in ((True, 2), (False, 3)):
        speculator = MLPSpeculator(WIDTH, VOCABULARY, HEADS, inner_dim=10, tie_weights=tied)
        seen = []
        speculator.output = lambda state, head, output=speculator.output, seen=seen: seen.append(head) or output(state, head)
        total, parts = head_losses(
            speculator, windows, BareBase(), LossWeights(0.5, 1.0, 0.0, (1.0, 0.0, 0.0)), torch.tensor(windows.counts)
        )
        assert seen == [*range(run)] and len(parts) == HEADS and not parts[1:].any() and total == parts[0] > 0


def test_no_logits_outlive_their_chunk(monkeypatch):
    monkeypatch.setattr(passes, "CPU_ROWS", 16)
    speculator = MLPSpeculator(WIDTH, VOCABULARY, HEADS, inner_dim=10)
    states, tokens, segments, first = row([[0] * 200])
    windows = lined_up(states, tokens, segments, first)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor):
        head_losses(speculator, windows, BareBase(), LossWeights(1.0, 1.0, 0.0, (1.0,) * HEADS), torch.tensor(windows.counts))
    assert saved and not [shape for shape in saved if shape[-1:] == (VOCABULARY,) and shape[0] > 16]
    assert saved.count((VOCABULARY, 10)) == 1  # the gradient of the read-out that all heads share


def test_nothing_beyond_a_documents_end_changes_its_losses():
    speculator = MLPSpeculator(WIDTH, VOCABULARY, HEADS, inner_dim=10)
    states, tokens, segments, first = row([[0] * 10 + [1] * 10])

    def losses_of_first_document():
        usable = usable_positions(segments, first, HEADS)
        usable[:, :, 10:] = False
        windows = make_windows(states, tokens, choose_positions(usable), HEADS)
        return head_losses(speculator, windows, BareBase(), LossWeights(1.0, 1.0, 0.0, (1.0,) * HEADS), torch.tensor([8, 7, 6]))

    before = losses_of_first_document()
    states[0, 10:], tokens[0, 10:] = 7.0, 0
    torch.testing.assert_close(losses_of_first_document(), before, rtol=0, atol=0)


def test_phase_two_starts_at_the_end_of_the_prompt_and_ends_with_the_continuation():
    segments = torch.tensor([[0] * 9 + [-1] * 3, [0] * 12], dtype=torch.int32)
    usable = usable_positions(segments, torch.tensor([4, 4]), heads=2)
    assert usable[0].nonzero().tolist() == [[0, 4], [0, 5], [0, 6]] + [[1, t] for t in range(4, 10)]
    assert usable[1].nonzero().tolist() == [[0, 4], [0, 5]] + [[1, t] for t in range(4, 9)]


def test_later_heads_are_asked_only_where_the_drafts_before_would_have_been_accepted():
    segments, greedy = torch.zeros(1, 10, dtype=torch.int32), torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    usable = usable_positions(segments, torch.tensor([0]), HEADS, greedy)[:, 0]
    for head in range(HEADS):
        for t in range(10):
            drafted = range(t + 2, t + 2 + head)  # heads before this one drafted these
            assert usable[head, t] == (t + 2 + head < 10 and all(greedy[0, place] for place in drafted))


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 4))
def test_a_head_is_trained_where_all_tokens_up_to_its_target_are_of_one_answer(trained, heads):
    segments = torch.zeros(1, len(trained), dtype=torch.int32)
    usable = usable_positions(segments, torch.tensor([0]), heads, trained=torch.tensor([trained]))[:, 0]
    for head in range(heads):
        for t in range(len(trained)):
            predicted = trained[t + 1 : t + 3 + head]
            assert usable[head, t] == (len(predicted) == head + 2 and all(predicted))


def test_targets_that_are_masked_give_no_loss_and_the_state_before_an_answer_is_seen():
    speculator = MLPSpeculator(WIDTH, VOCABULARY, HEADS, inner_dim=10)
    states, tokens, segments, first = row([[0] * 20])
    trained = torch.zeros(1, 20, dtype=torch.bool)
    trained[:, 8:15] = True

    def losses():
        positions = choose_positions(usable_positions(segments, first, HEADS, trained=trained))
        windows = make_windows(states, tokens, positions, HEADS)
        counts = torch.tensor(positions.counts, dtype=torch.float32)
        return head_losses(speculator, windows, BareBase(), LossWeights(1.0, 1.0, 0.0, (1.0,) * HEADS, 1.0), counts)

    before = losses()
    states[0, :7], states[0, 15:], tokens[0, :8], tokens[0, 15:] = 7.0, 7.0, 0, 0
    torch.testing.assert_close(losses(), before, rtol=0, atol=0)
    states[0, 7] = 7.0
    assert not torch.equal(losses()[0], before[0])


def test_drawn_positions_are_some_of_the_usable_ones_and_the_same_for_the_same_seed():
    usable = usable_positions(torch.zeros(3, 20, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), HEADS)
    drawn = [choose_positions(usable, 11, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert drawn[0].index.tolist() == drawn[1].index.tolist() and drawn[0].counts == drawn[1].counts
    assert len(set(drawn[0].index.tolist())) == 11 == drawn[0].counts[0]
    for head in range(HEADS):
        chosen = drawn[0].index[: drawn[0].counts[head]]
        assert usable[head].flatten()[chosen].all()
        assert not usable[head].flatten()[drawn[0].index[drawn[0].counts[head] :]].any()
