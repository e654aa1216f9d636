import pytest
import torch
from conftest import EVERY, tiny_speculator, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prompts import Prompt
from fms_spec.acceptance import accepted_in_text, judged, pooled_acceptance, walked
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.draft_shape import DraftShape
from fms_spec.lookup import PromptLookup
from fms_spec.options import DecodingOptions
from pipelines.measure.samples import decode_in_turn
from pipelines.measure.suggestion import chain_acceptance, greedy_texts, seconds_behind_forward, shapes, suggest, tried
from pipelines.train.validation import Validation

SHAPES = [DraftShape(), DraftShape(lookahead=1), DraftShape(top_k_per_head=(3, 2)), DraftShape(nodes=7), DraftShape(lookahead=2, nodes=4)]
SHAPES += [DraftShape(min_probability=0.05), DraftShape(lookup=5)]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A vocabulary of 12, so that untrained heads are right now and then and texts end early."""
    directory = write_model(tmp_path_factory.mktemp("small") / "model", vocab_size=12)
    return BaseModel(str(directory), dtype="float32", device="cpu")


def heads(model, seed, family="mlp_untied"):
    return tiny_speculator(model, family, seed, n_predict=3)


def test_acceptance_is_counted_as_vllm_counts_it():
    found = pooled_acceptance([0, 3, 1, 0], drafts=3)
    assert found.length == 2.0 and found.per_position == [0.5, 0.25, 0.25] and found.steps == 4
    assert pooled_acceptance([], drafts=2).length == 1.0


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES), length=st.integers(1, 12), new_tokens=st.integers(2, 24),
    family=st.sampled_from(EVERY),
)  # fmt: skip
def test_the_evaluator_without_decoding_gives_what_decoding_accepts(small_model, seed, shape, length, new_tokens, family):
    proposer = shape.proposer(heads(small_model, seed, family))
    prompts = list(torch.randint(1, 12, (4, length), generator=torch.Generator().manual_seed(seed)))
    decoded, _ = decode(small_model, prompts, DecodingOptions(max_new_tokens=new_tokens), proposer)
    expected = [list(result.accepted) for result in decoded]
    validation = Validation(small_model, list(prompts), new_tokens, 3)
    assert validation.accepted(proposer) == expected


def test_texts_that_end_early_are_among_those_compared(small_model):
    decoded, _ = decode(small_model, [torch.tensor([word]) for word in range(1, 12)], DecodingOptions(max_new_tokens=24))
    assert {result.finish_reason for result in decoded} == {"stop", "length"}


def test_prompt_lookup_is_judged_without_decoding_too(small_model):
    proposer = PromptLookup(3)
    (prompt,) = torch.randint(1, 12, (1, 9), generator=torch.Generator().manual_seed(3))
    (result,), _ = decode(small_model, [prompt], DecodingOptions(max_new_tokens=30, ignore_eos=True), proposer)
    (longer,), _ = decode(small_model, [prompt], DecodingOptions(max_new_tokens=33, ignore_eos=True))
    text = torch.cat([prompt, torch.tensor(longer.tokens)])
    states = small_model.hidden_states(text[None], torch.zeros(1, len(text), dtype=torch.int64))[0]
    found = accepted_in_text(proposer, states, text, len(prompt), 30)
    assert found == result.accepted and sum(found) > 0


def test_a_text_that_begins_without_anything_to_look_up_is_judged_to_its_end():
    text = torch.tensor([*range(100), *range(20)])  # every token is new for longer than is judged at once
    accepted, candidates = judged(PromptLookup(3), torch.zeros(120, 1), text, 1, 119)
    assert candidates == [0] * 99 + [3] * 19 and accepted[99:] == [3] * 17 + [2, 1] and len(walked(accepted, candidates)) == 5


def test_candidates_past_the_end_of_a_known_text_count_as_wrong(small_model):
    proposer = DraftShape(top_k_per_head=(12, 1)).proposer(heads(small_model, 0))
    (result,), _ = decode(small_model, [torch.tensor([3, 4])], DecodingOptions(max_new_tokens=2, ignore_eos=True))
    text = torch.tensor([3, 4, *result.tokens])
    states = small_model.hidden_states(text[None], torch.zeros(1, 4, dtype=torch.int64))[0]
    assert accepted_in_text(proposer, states, text, 2, 2) == [1]  # all 12 words are candidates, and one token more is known


@pytest.mark.parametrize("n_predict", [1, 5])
def test_a_tree_is_suggested_for_any_number_of_heads(small_model, n_predict):
    speculator = tiny_speculator(small_model, "hidden_state", n_predict=n_predict)
    (result,), _ = decode(small_model, [torch.tensor([3, 4])], DecodingOptions(max_new_tokens=12, ignore_eos=True))
    text = torch.tensor([3, 4, *result.tokens])
    states = small_model.hidden_states(text[None], torch.zeros(1, len(text), dtype=torch.int64))[0]
    assert suggest(small_model, speculator, [(states, text, 2, 8)])[0]["lookahead"] <= n_predict


def test_a_draft_is_timed_right_behind_a_forward_as_in_a_step(small_model, monkeypatch):
    ran, logits = [], small_model.logits
    monkeypatch.setattr(small_model, "logits", lambda states: ran.append("forward") or logits(states))
    found = seconds_behind_forward(small_model, {"one": lambda: ran.append("draft"), "other": lambda: ran.append("draft")})
    assert found.keys() == {"one", "other"} and min(found.values()) >= 0
    assert ran == ["forward", "draft"] * (len(ran) // 2) and len(ran) > 4


def text_of(model, prompt, new_tokens, more):
    """A greedy text as the suggestion takes it, which goes on by `more` tokens."""
    (result,), _ = decode(model, [prompt], DecodingOptions(max_new_tokens=new_tokens + more, ignore_eos=True))
    tokens = torch.cat([prompt, torch.tensor(result.tokens)])
    return model.hidden_states(tokens[None], torch.zeros(1, len(tokens), dtype=torch.int64))[0], tokens, len(prompt), new_tokens


@pytest.mark.parametrize("family", ["mlp_untied", "hidden_state_pointer"])
def test_every_shape_is_judged_as_part_of_a_larger_one_as_it_would_be_alone(small_model, family):
    speculator = heads(small_model, 5, family)
    prompts = torch.randint(1, 12, (3, 20), generator=torch.Generator().manual_seed(2))
    for text in (text_of(small_model, prompt, 40, 10) for prompt in prompts):
        found = tried(speculator, text)
        for shape in shapes(speculator.n_predict):
            accepted, candidates, _ = found[shape]
            assert (list(accepted), list(candidates)) == judged(shape.proposer(speculator), *text), shape
        assert sum(found[DraftShape(lookahead=3, nodes=8)][0]) > sum(found[DraftShape(lookahead=1)][0]) > 0


def test_heads_count_as_run_in_the_suggestion_where_decoding_runs_them(small_model, monkeypatch):
    shape = DraftShape(lookup=10)
    speculator, runs, found = heads(small_model, 3), [], []
    proposer = shape.proposer(speculator)
    propose = proposer.heads.propose
    monkeypatch.setattr(proposer.heads, "propose", lambda step: runs.append(1) or propose(step))
    for prompt in torch.randint(1, 12, (8, 20), generator=torch.Generator().manual_seed(1)):
        decode(small_model, [prompt], DecodingOptions(max_new_tokens=20, ignore_eos=True), proposer)
        accepted, candidates, copied = tried(speculator, text_of(small_model, prompt, 20, 10))[shape]
        found += [copied[index] for index in walked(accepted, candidates)]
    assert found.count(False) == len(runs) and found.count(True) > 5


def test_what_a_chain_would_have_earned_on_evaluated_texts_is_what_decoding_with_it_earns(small_model):
    speculator = heads(small_model, 3)
    ways = {"plain": None, "speculator": DraftShape(lookahead=2).proposer(speculator)}
    prompts = [Prompt(None, tokens) for tokens in torch.randint(1, 12, (100, 5), generator=torch.Generator().manual_seed(1))]
    samples = decode_in_turn(small_model, prompts, ways, 2)  # the second candidate is past the end of the text
    steps = [count for sample in samples if sample.kind == "speculator" for count in sample.accepted]
    expected = pooled_acceptance(steps, 2)
    found = chain_acceptance(speculator, greedy_texts(small_model, samples, 3), 2)
    assert found["chain_acceptance_length"] == expected.length
    assert found["chain_acceptance_per_position"] == expected.per_position and expected.per_position[1] > 0
