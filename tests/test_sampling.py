"""Sampling with a speculator follows the base model exactly: token for token where candidates are picked, by distribution where drawn."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import EVERY, KINDS, SHAPES, chi_square, prompts_of, tiny_proposer
from hypothesis import given, settings
from hypothesis import strategies as st

import fms_spec.decoding
from fms_spec.candidates import Candidates, Tree
from fms_spec.decoding import decode, stream
from fms_spec.errors import UserError
from fms_spec.options import DecodingOptions
from fms_spec.proposers import draw_children
from fms_spec.sampling import Chance, Sampling, draw
from fms_spec.verification import match, reject

EXAMPLES = {"deadline": None, "derandomize": True, "database": None}
SAMPLINGS = [
    Sampling(temperature=0.7), Sampling(temperature=1.0), Sampling(temperature=1.5),
    Sampling(temperature=1.2, top_k=4), Sampling(temperature=1.0, top_p=0.8),
]  # fmt: skip
NAMES = ["temperature 0.7", "temperature 1", "temperature 1.5", "top_k", "top_p"]
# Statistics are held against their mean plus five standard deviations, always with the same seeds.
MOST = 5


def test_a_uniform_draw_follows_the_weights_and_never_takes_what_has_none():
    @settings(max_examples=200, **EXAMPLES)
    @given(
        weights=st.lists(st.sampled_from([0.0, 0.0, 1e-38, 1e-7, 0.1, 1.0, 3.0, 1e30]), min_size=1, max_size=8), seed=st.integers(0, 10_000)
    )
    def check(weights, seed):
        edges = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
        uniforms = torch.cat([edges, torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))])
        rows = torch.tensor(weights).expand(len(uniforms), -1)
        drawn = draw(rows, uniforms)
        if any(weights):
            assert (rows.gather(1, drawn[:, None]) > 0).all()
        else:
            assert (drawn == len(weights) - 1).all()

    check()
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 6.0, 0.0])
    drawn = draw(weights.expand(20_000, -1), torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1])
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 6000, 0, 2000, 12_000, 0]


def test_choosing_follows_the_probabilities_and_these_are_temperature_then_top_k_then_top_p():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    logits[7] = -torch.inf
    uniforms = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shapes = [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.8}, {"top_k": 40}, {"top_k": 1}, {"top_p": 1e-6}]
    for temperature in (0.5, 1.0, 1.3):
        for shape in shapes:
            sampling = Sampling(temperature=temperature, **shape)
            expected = (logits.double() / temperature).softmax(-1)
            if sampling.top_k:
                expected[expected < expected.topk(sampling.top_k).values[-1]] = 0
                expected /= expected.sum()
            if sampling.top_p < 1:
                ordered, order = expected.sort(descending=True)
                expected[order[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0
            expected /= expected.sum()
            torch.testing.assert_close(sampling.probabilities(logits).double(), expected, rtol=1e-5, atol=1e-7)
            counts = torch.bincount(sampling.choose(logits.expand(20_000, -1), uniforms), minlength=40)
            if sampling.top_k == 1 or sampling.top_p < 0.1:
                assert counts[logits.argmax()] == 20_000
            else:
                assert chi_square(counts, expected * 20_000) < MOST


def test_greedy_takes_the_likeliest_and_its_distribution_is_a_point():
    logits = torch.randn(3, 4, 9)
    assert torch.equal(Sampling().choose(logits, None), logits.argmax(-1))
    assert torch.equal(Sampling().probabilities(logits), torch.nn.functional.one_hot(logits.argmax(-1), 9).float())
    assert Sampling(temperature=0.5, top_k=3).as_dict() == {"temperature": 0.5, "top_k": 3, "top_p": 1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-9},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": -0.5},
        {"top_p": 1.01},
    ],
)
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_seeds_numbers_do_not_depend_on_its_neighbours_nor_on_how_many_are_drawn():
    alone, together = Chance([5], 10, 4, "cpu"), Chance([3, 5, 8], 10, 4, "cpu")
    assert torch.equal(alone.choices[0], together.choices[1]) and torch.equal(alone.tests[0], together.tests[1])
    assert torch.equal(Chance([5], 30, 0, "cpu").choices[0, :10], alone.choices[0])
    assert len(torch.cat([together.choices.flatten(), together.tests.flatten()]).unique()) == 3 * (10 + 10 * 4)
    together.keep_sequences([1])
    assert torch.equal(together.choices, alone.choices) and torch.equal(together.tests, alone.tests)


@pytest.mark.slow
def test_picked_candidates_leave_a_sampled_text_as_it_is_token_for_token(tiny_models):
    wins, losses = Counter(), Counter()

    @settings(max_examples=100, **EXAMPLES)
    @given(
        shape=st.integers(0, len(SHAPES) - 1), backend=st.sampled_from(["fms", "transformers"]), seed=st.integers(0, 1_000_000),
        kind=st.sampled_from(["best", "lookup", "first"]), family=st.sampled_from(EVERY), levels=st.integers(1, 4),
        extra=st.integers(0, 8), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), sampling=st.sampled_from(SAMPLINGS),
        least=st.integers(0, 20),
    )  # fmt: skip
    def check(shape, backend, seed, kind, family, levels, extra, lengths, sampling, least):
        model, seeds = tiny_models.get(shape, backend, seed), tuple(seed + 7 * i for i in range(len(lengths)))
        prompts = prompts_of(*lengths, words=model.vocab_size, seed=seed)
        options = DecodingOptions(max_new_tokens=20, min_new_tokens=least, sampling=sampling, seeds=seeds)
        proposer = tiny_proposer(model, kind, family, seed, [1] * levels, extra)
        plain, _ = decode(model, prompts, options)
        fast, _ = decode(model, prompts, options, proposer)
        assert [(result.tokens, result.finish_reason) for result in fast] == [(result.tokens, result.finish_reason) for result in plain]
        wins[kind] += sum(accepted > 0 for result in fast for accepted in result.accepted)
        losses[kind] += sum(accepted == 0 for result in fast for accepted in result.accepted)

    check()
    assert min(*wins.values(), *losses.values()) > 50 and len(wins) == 3


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_prompt_samples_in_a_batch_what_it_samples_alone_with_its_seed_and_something_else_with_another(tiny_models, kind):
    model, sampling = tiny_models.get(6, seed=2), Sampling(temperature=1.0, top_p=0.95)
    prompts, seeds = prompts_of(7, 3, 12, 3, words=model.vocab_size), (11, 5, 11, 6)
    proposer = kind and tiny_proposer(model, kind, "hidden_state", widths=(3, 2))

    def sample(prompts, seeds):
        options = DecodingOptions(max_new_tokens=30, ignore_eos=True, sampling=sampling, seeds=seeds)
        return [result.tokens for result in decode(model, prompts, options, proposer)[0]]

    together = sample(prompts, seeds)
    assert together == [sample([prompt], (seed,))[0] for prompt, seed in zip(prompts, seeds)] == sample(prompts, seeds)
    others = sample(prompts, tuple(seed + 1 for seed in seeds))
    assert all(one != other for one, other in zip(together, others))
    assert sample([prompts[0]] * 2, None) == sample([prompts[0]] * 2, (0, 1))


TREES = {"chain": [1, 1, 1], "ending": [1, 1, 1], "tree 2,2": [2, 2], "tree 3,1": [3, 1], "best": [1, 1]}


def exact(model, prompt, sampling):
    """Probability of every three first new tokens: [v, v, v]."""
    v, length = model.vocab_size, len(prompt)
    pairs = torch.cartesian_prod(torch.arange(v), torch.arange(v))
    tokens = torch.cat([prompt.expand(len(pairs), -1), pairs], dim=1)
    states = model.hidden_states(tokens, torch.zeros_like(tokens))[:, length - 1 :]
    first, second, third = sampling.probabilities(model.logits(states)).double().unbind(1)
    return (first.gather(1, pairs[:, :1]) * second.gather(1, pairs[:, 1:]) * third).view(v, v, v)


def off(model, name, sampling, batches=10, rows=512):
    """(how far three sampled tokens are from their exact distribution, share of first steps in which something was accepted)"""
    kind, prompt, v = name.split()[0], torch.tensor([1, 5, 2]), model.vocab_size
    proposer = tiny_proposer(model, kind, "hidden_state" if kind == "tree" else "mlp_tied", 3, TREES[name], extra=3)
    counts, accepted = torch.zeros(v**3), []
    for batch in range(batches):
        options = DecodingOptions(
            max_new_tokens=12, ignore_eos=True, sampling=sampling, seeds=tuple(range(batch * rows, (batch + 1) * rows))
        )
        texts = [[] for _ in range(rows)]
        for number, step in enumerate(islice(stream(model, [prompt] * rows, options, proposer), 3)):  # every step adds a token
            for emitted in step:
                texts[emitted.index] += emitted.tokens
            accepted += [emitted.accepted > 0 for emitted in step if number == 1]
        first, second, third = torch.tensor([text[:3] for text in texts]).unbind(1)
        counts += torch.bincount(first * v * v + second * v + third, minlength=v**3)
    return chi_square(counts, exact(model, prompt, sampling) * batches * rows), sum(accepted) / len(accepted)


@pytest.fixture
def small(tiny_models):
    """A vocabulary of eight, so that all texts of three tokens can be counted and untrained heads are often right."""
    return tiny_models.get(0, seed=5)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
@pytest.mark.parametrize("name", TREES)
def test_three_sampled_tokens_follow_the_base_models_exact_distribution(small, name, sampling):
    distance, accepted = off(small, name, sampling)
    assert distance < MOST
    assert 0.1 < accepted < 0.95  # or it would prove nothing


def keeps_the_whole_target(candidates, target_probs, tests, bonus):
    """The bonus after a rejection from p instead of max(p - q, 0)."""
    verdict, rows = reject(candidates, target_probs, tests, bonus), torch.arange(len(target_probs))
    return replace(verdict, newest=draw(target_probs[rows, verdict.last], bonus[rows, verdict.last]))


def accepts_all_that_is_possible(candidates, target_probs, tests, bonus):
    return reject(candidates, target_probs, torch.zeros_like(tests), bonus)


def rejects_all(candidates, target_probs, tests, bonus):
    return reject(candidates, target_probs, torch.full_like(tests, torch.inf), bonus)


def turns_the_ratio_round(candidates, target_probs, tests, bonus):
    """Accepts with min(1, q / p)."""
    index = (torch.arange(len(tests))[:, None], candidates.tree.parents[:, 1:], candidates.tokens.clamp(min=0))
    wins = tests[:, : len(index[1][0])] * target_probs[index] < candidates.draft_probs[index]
    return reject(candidates, target_probs, torch.where(wins, 0.0, torch.inf).double(), bonus)


def uses_one_number_for_test_and_bonus(candidates, target_probs, tests, bonus):
    return reject(candidates, target_probs, tests, tests[:, :1].expand_as(bonus))


def accepts_the_first(candidates, chosen):
    return match(candidates, torch.cat([candidates.tokens[:, :1], chosen[:, candidates.tokens[:, :1].shape[1] :]], dim=1))


def repeats_the_roots_choice(candidates, chosen):
    return replace(match(candidates, chosen), newest=chosen[:, 0])


WRONG_REJECTIONS = [
    keeps_the_whole_target, accepts_all_that_is_possible, rejects_all, turns_the_ratio_round, uses_one_number_for_test_and_bonus,
]  # fmt: skip
WRONG_MATCHES = [accepts_the_first, repeats_the_roots_choice]


@pytest.mark.parametrize("wrong", WRONG_REJECTIONS + WRONG_MATCHES)
def test_the_count_finds_a_wrong_rule(small, monkeypatch, wrong):
    rule, names = ("match", ["best"]) if wrong in WRONG_MATCHES else ("reject", ["chain", "tree 2,2", "tree 3,1"])
    monkeypatch.setattr(fms_spec.decoding, rule, wrong)
    for name in names:
        assert off(small, name, Sampling(temperature=1.0), batches=6)[0] > MOST


def off_by_hand(rule, widths, seed, rows=40_000):
    """How far two tokens are off by a rule on drawn candidates, vocabulary five; odd seeds put zeros into p, 2, 3, 6 and 7 into q."""
    torch.manual_seed(seed)
    p, q = (torch.randn(2, 6, 5) * 1.5).softmax(-1)  # row i is for what follows token i, the last one for the first token
    p[:, :2] *= 1 - seed % 2
    q[:, 2:] *= 1 - seed // 2 % 2
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    levels = [torch.full((rows, 1), 5)]
    for width in widths:
        drawn = draw_children(q[levels[-1].flatten()], torch.rand(levels[-1].numel(), width, dtype=torch.float64))
        levels.append(drawn.where(levels[-1].view(-1, 1) >= 0, -1).view(rows, -1))
    tree, seen = Tree.full(widths), torch.cat(levels, dim=1)
    numbers = torch.rand(rows, 2 * tree.nodes, dtype=torch.float64)
    candidates = Candidates(seen[:, 1:], tree, q[torch.cat(levels[:-1], dim=1)])
    if rule is match:
        verdict = match(candidates, draw(p[seen], numbers[:, : tree.nodes]))
    else:
        verdict = rule(candidates, p[seen], numbers[:, : tree.nodes - 1], numbers[:, tree.nodes :])
    # The accepted nodes are the way to the last one, and none of them was missing.
    assert torch.equal(verdict.accepted, tree.ancestors[0, verdict.last]) and (seen[verdict.accepted] >= 0).all()
    depth = tree.depths[0, verdict.last]
    first, second = [
        torch.where(depth == level, verdict.newest, (seen * verdict.accepted * (tree.depths == level + 1)).sum(1)) for level in (0, 1)
    ]
    second = draw(p[first], torch.rand(rows, dtype=torch.float64)).where(depth == 0, second)  # left to the next step
    return chi_square(torch.bincount(first * 5 + second, minlength=25), p[5, :, None] * p[:5] * rows)


@pytest.mark.parametrize("widths", [[1], [1, 1], [2], [3], [5], [2, 2], [3, 2]], ids=str)
@pytest.mark.parametrize("rule", [reject, match])
def test_both_rules_are_exact_for_any_target_and_draft_with_and_without_zeros(rule, widths):
    assert max(off_by_hand(rule, widths, seed) for seed in range(8)) < MOST


@pytest.mark.parametrize("wrong", WRONG_REJECTIONS)
def test_a_wrong_rule_is_found_out_by_hand_too(wrong):
    assert min(off_by_hand(wrong, widths, 0) for widths in ([1], [2], [3, 2])) > MOST


def test_a_missing_candidate_and_one_that_the_target_rules_out_are_never_accepted():
    tree, rows = Tree.full([2, 1]), 50
    target = torch.rand(rows, 5, 5)
    target[:, :, 3] = 0  # as EOS before min_new_tokens
    target /= target.sum(-1, keepdim=True)
    tokens = torch.tensor([[-1, 3, 2, 2]]).expand(rows, -1)
    candidates, always = Candidates(tokens, tree, torch.full((rows, 3, 5), 0.2)), torch.zeros(rows, 4, dtype=torch.float64)
    verdicts = [reject(candidates, target, always, torch.rand(rows, 5, dtype=torch.float64))]
    verdicts += [match(candidates, torch.full((rows, 5), token)) for token in (0, 2)]
    for verdict in verdicts:
        assert verdict.accepted.tolist() == [[True, False, False, False, False]] * rows and not verdict.last.any()
        assert not (verdict.newest == 3).any()
