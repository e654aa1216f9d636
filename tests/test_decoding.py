import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fms_spec.acceptance import pooled_acceptance
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.errors import UserError
from fms_spec.sampling import Sampling
from fms_spec.speculators import MLPSpeculator


class Planted:
    """Proposes the known continuation, wrong from a chosen place on: a proposer whose acceptance is known beforehand."""

    def __init__(self, base_model, prompts, plain, right, n_predict=3):
        self.n_predict, self.right, self.vocab_size = n_predict, right, base_model.vocab_size
        self.texts = [torch.cat([prompt, torch.tensor(tokens)]).tolist() for prompt, tokens in zip(prompts, plain)]

    def propose(self, hidden, tokens, count):
        drafts = torch.zeros(len(tokens), count, dtype=torch.int64)
        for row, text in enumerate(self.texts):
            place = self.places[row]
            for i in range(count):
                truth = text[place + 1 + i] if place + 1 + i < len(text) else 0
                drafts[row, i] = truth if i < self.right else (truth + 1) % self.vocab_size
            self.places[row] = place + min(self.right, count) + 1
        return drafts


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, 96, (length,), generator=generator) for length in lengths]


def without_stops(model):
    """The same model, never ending by itself, so that lengths are known."""
    model = BaseModel(model.name, dtype="float32", device="cpu")
    model.eos_token_ids = set()
    return model


@pytest.fixture(scope="module")
def endless(base_model):
    return without_stops(base_model)


@pytest.mark.parametrize("right, steps", [(0, 24), (1, 12), (2, 8), (3, 6)])
def test_a_proposer_right_for_a_known_length_takes_exactly_that_many_steps(endless, right, steps):
    prompts = prompts_of(9)
    plain, plain_timing = decode(endless, prompts, max_new_tokens=25)
    planted = Planted(endless, prompts, [plain[0].tokens], right)
    planted.places = [9]
    fast, timing = decode(endless, prompts, max_new_tokens=25, speculator=planted)
    assert fast[0].tokens == plain[0].tokens
    assert (plain_timing.steps, timing.steps) == (24, steps)
    assert pooled_acceptance(fast[0].accepted, 3).length == 1 + right


def test_a_batch_of_unequal_prompts_decodes_as_each_prompt_alone(base_model):
    prompts = prompts_of(3, 17, 8, 30, 5)
    together, _ = decode(base_model, prompts, max_new_tokens=40)
    for prompt, result in zip(prompts, together):
        (alone,), _ = decode(base_model, [prompt], max_new_tokens=40)
        assert alone == result


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), lookahead=st.integers(1, 4), tied=st.booleans())
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(base_model, seed, lengths, lookahead, tied):
    torch.manual_seed(seed)
    speculator = MLPSpeculator(base_model.width, base_model.vocab_size, n_predict=4, inner_dim=16, tie_weights=tied)
    prompts = prompts_of(*lengths)
    plain, _ = decode(base_model, prompts, max_new_tokens=20)
    fast, _ = decode(base_model, prompts, max_new_tokens=20, speculator=speculator, lookahead=lookahead)
    assert [(r.tokens, r.finish_reason) for r in fast] == [(r.tokens, r.finish_reason) for r in plain]


def test_decoding_ends_with_the_first_eos_and_says_why(tmp_path, base_model, endless):
    prompts = prompts_of(6, 11)
    plain, _ = decode(endless, prompts, max_new_tokens=12)
    stopping = without_stops(base_model)
    stopping.eos_token_ids = {plain[0].tokens[4]}
    stopped, _ = decode(stopping, prompts, max_new_tokens=12)
    assert stopped[0].tokens == plain[0].tokens[: plain[0].tokens.index(plain[0].tokens[4]) + 1]
    assert stopped[0].finish_reason == "stop"
    planted = Planted(endless, prompts[:1], [plain[0].tokens], right=3)
    planted.places = [6]
    fast, _ = decode(stopping, prompts[:1], max_new_tokens=12, speculator=planted)
    assert fast[0].tokens == stopped[0].tokens and fast[0].finish_reason == "stop"


def test_finished_sequences_leave_the_batch(endless, monkeypatch):
    widths = []
    extend = endless.extend
    monkeypatch.setattr(endless, "extend", lambda tokens, cache, **more: widths.append(len(tokens)) or extend(tokens, cache, **more))
    prompts = prompts_of(4, 5, 6, 7)
    plain, _ = decode(endless, prompts, max_new_tokens=10)
    endless_stop = {plain[1].tokens[2]}
    monkeypatch.setattr(endless, "eos_token_ids", endless_stop)
    widths.clear()
    decode(endless, prompts, max_new_tokens=10)
    assert widths[0] == 4 and widths[-1] < 4


def test_sampling_follows_the_models_own_distribution(base_model):
    (prompt,) = prompts_of(7)
    states = base_model.hidden_states(prompt[None], torch.zeros(1, 7, dtype=torch.int64))
    logits = base_model.logits(states[0, -1]).double()
    draws = 4000
    for sampling in (Sampling(temperature=1.3), Sampling(temperature=2.0, top_k=5), Sampling(temperature=3.0, top_p=0.7)):
        expected = (logits / sampling.temperature).softmax(-1)
        if sampling.top_k:
            expected[expected < expected.topk(sampling.top_k).values[-1]] = 0
        if sampling.top_p < 1:
            ordered, order = expected.sort(descending=True)
            expected[order[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0
        expected /= expected.sum()
        chosen = sampling.choose(logits.float().expand(draws, -1), torch.Generator().manual_seed(0))
        counts = torch.bincount(chosen, minlength=96).double()
        assert counts[expected == 0].sum() == 0
        kept = expected * draws > 5
        chi_square = ((counts - expected * draws) ** 2 / (expected * draws))[kept].sum().item()
        degrees = int(kept.sum()) - 1
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_what_cannot_be_decoded_is_refused_before_any_work(base_model):
    speculator = MLPSpeculator(base_model.width, base_model.vocab_size, n_predict=2, inner_dim=16)
    (prompt,) = prompts_of(10)
    refused = [
        (dict(prompts=[torch.zeros(0, dtype=torch.int64)], max_new_tokens=5), "empty prompt"),
        (dict(prompts=[prompt], max_new_tokens=250), "over the context"),
        (dict(prompts=[prompt], max_new_tokens=0), "max_new_tokens 0"),
        (dict(prompts=[prompt], max_new_tokens=5, speculator=speculator, lookahead=0), "lookahead 0"),
        (dict(prompts=[prompt], max_new_tokens=5, speculator=speculator, lookahead=3), "lookahead 3"),
        (dict(prompts=[prompt], max_new_tokens=5, speculator=speculator, sampling=Sampling(temperature=1.0)), "sampling"),
    ]
    for arguments, message in refused:
        with pytest.raises(UserError, match=message):
            decode(base_model, **arguments)
    for wrong in (dict(temperature=-1.0), dict(top_k=-2), dict(top_p=0.0)):
        with pytest.raises(UserError):
            Sampling(**wrong)


@pytest.mark.parametrize("backend", ["fms", "transformers"])
def test_both_backends_decode_the_same_tokens(tmp_path, base_model, backend):
    model = BaseModel(base_model.name, dtype="float32", backend=backend, device="cpu")
    prompts = prompts_of(5, 12)
    assert decode(model, prompts, max_new_tokens=20)[0] == decode(base_model, prompts, max_new_tokens=20)[0]
