"""Speculative decoding says what plain decoding says, and ends where it is told to end."""

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
from conftest import EVERY, KINDS, SHAPES, Planted, prompts_of, tiny_proposer, tiny_speculator
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import fms_spec.decoding
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode, stream
from fms_spec.errors import UserError
from fms_spec.lookup import PromptLookup
from fms_spec.options import DecodingOptions
from fms_spec.proposers import TopKProposer
from fms_spec.sampling import Sampling

SEEDS = st.integers(0, 1_000_000)


@st.composite
def limits(draw):
    most = draw(st.integers(1, 24))
    least = draw(st.integers(0, most))
    return DecodingOptions(max_new_tokens=most, min_new_tokens=draw(st.sampled_from([0, least])), ignore_eos=draw(st.booleans()))


def decode_plainly(model, prompts, options):
    """Plain decoding. An example in which a choice hangs on rounding is thrown away: it could say nothing."""
    original, seen = model.logits, []
    with patch.object(model, "logits", lambda states: seen.append(original(states)) or seen[-1]):
        plain, _ = decode(model, prompts, options)
    best = [logits.topk(2).values for logits in seen]
    assume(min((two[..., 0] - two[..., 1]).min().item() for two in best) > 1e-4)
    return plain


def said(results):
    """What must not depend on how it was decoded."""
    return [(result.tokens, result.text, result.finish_reason) for result in results]


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.slow
def test_speculative_greedy_decoding_equals_plain_decoding_token_for_token(tiny_models, tokenizer):
    wins, losses, far, ends = Counter(), Counter(), Counter(), Counter()

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.integers(0, len(SHAPES) - 1), backend=st.sampled_from(["fms", "transformers"]), seed=SEEDS, options=limits(),
        kind=st.sampled_from(KINDS), family=st.sampled_from(EVERY), extra=st.integers(0, 12),
        widths=st.lists(st.integers(1, 3), min_size=1, max_size=4), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
        stop=st.none() | st.integers(0, 30),
    )  # fmt: skip
    def check(shape, backend, seed, options, kind, family, widths, extra, lengths, stop):
        model = tiny_models.get(shape, backend, seed)
        model.eos_token_ids = {seed % model.vocab_size, 0}
        if stop is not None:
            options = replace(options, tokenizer=tokenizer, stop=(f"w{stop % model.vocab_size} w1", f"w{stop}"))
        prompts = prompts_of(*lengths, words=model.vocab_size, seed=seed)
        plain = decode_plainly(model, prompts, options)
        fast, _ = decode(model, prompts, options, tiny_proposer(model, kind, family, seed, widths, extra))
        assert said(fast) == said(plain)
        accepted = [count for result in fast for count in result.accepted]
        for name in (kind,) if kind == "lookup" else (kind, family):
            wins[name] += sum(count > 0 for count in accepted)
            losses[name] += sum(count == 0 for count in accepted)
        far[kind] += sum(count > 1 for count in accepted)
        ends.update(result.finish_reason for result in fast)

    check()
    # The examples prove something only if candidates of every kind and family were accepted at times and rejected at times.
    assert all(min(wins[name], losses[name]) > 20 for name in (*KINDS, *EVERY))
    assert all(far[kind] for kind in KINDS) and min(ends["stop"], ends["length"]) > 100


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_batch_of_unequal_prompts_decodes_as_each_prompt_alone(base_model, kind):
    prompts, options = prompts_of(3, 17, 8, 30, 5), DecodingOptions(max_new_tokens=40)
    proposer = kind and tiny_proposer(base_model, kind, widths=(3, 2))
    together, _ = decode(base_model, prompts, options, proposer)
    assert together == [decode(base_model, [prompt], options, proposer)[0][0] for prompt in prompts]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_both_backends_decode_the_same_tokens(base_model, kind):
    other = BaseModel(base_model.name, dtype="float32", backend="transformers", device="cpu")
    prompts, options = prompts_of(5, 12), DecodingOptions(max_new_tokens=20)
    proposer = kind and tiny_proposer(base_model, kind, "hidden_state", widths=(3, 2, 1))
    assert decode(other, prompts, options, proposer)[0] == decode(base_model, prompts, options, proposer)[0]


@pytest.mark.parametrize("backend", ["fms", "transformers"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_prompts_that_are_read_in_pieces_are_continued_as_ever(tiny_models, monkeypatch, backend, chunk):
    for seed in range(6):
        model, prompts = tiny_models.get(3 * seed, backend, seed), prompts_of(12, 1, 3, 7, 4, words=8, seed=seed)
        options, proposer = (
            DecodingOptions(max_new_tokens=12, sampling=Sampling(temperature=float(seed % 2))),
            tiny_proposer(model, "best", seed=seed),
        )
        whole, _ = decode(model, prompts, options, proposer)
        with monkeypatch.context() as patch:
            patch.setattr(fms_spec.decoding, "PREFILL_CHUNK", chunk)
            assert decode(model, prompts, options, proposer)[0] == whole


@pytest.fixture
def known(base_model):
    """Two prompts and their endless greedy texts."""
    prompts = prompts_of(6, 11)
    plain, _ = decode(base_model, prompts, DecodingOptions(max_new_tokens=40, ignore_eos=True))
    assert [len(result.tokens) for result in plain] == [40, 40] and {result.finish_reason for result in plain} == {"length"}
    return prompts, [result.tokens for result in plain]


def planted(base_model, known, right):
    """Candidates of which the first so many are right; None for plain decoding."""
    texts = [prompt.tolist() + line for prompt, line in zip(*known)]
    return None if right is None else Planted(texts, base_model.vocab_size, 3, lambda index, step: right)


@pytest.mark.parametrize("right", [None, 0, 3])
def test_a_text_ends_with_the_first_eos_wherever_it_stands_in_an_accepted_path(base_model, known, monkeypatch, right):
    prompts, (first, second) = known
    for eos in first[1:9]:
        monkeypatch.setattr(base_model, "eos_token_ids", {eos})
        proposer = planted(base_model, known, right)
        results, _ = decode(base_model, prompts, DecodingOptions(max_new_tokens=30), proposer)
        assert results[0].tokens == first[: first.index(eos) + 1] and results[0].finish_reason == "stop"
        expected = (second[: second.index(eos) + 1], "stop") if eos in second[:30] else (second[:30], "length")
        assert (results[1].tokens, results[1].finish_reason) == expected


@pytest.mark.parametrize("right", [None, 0, 1, 3])
def test_min_new_tokens_ends_at_exactly_its_token_also_inside_an_accepted_path(base_model, known, monkeypatch, right):
    prompts, (first, _) = known
    for eos in first[1:9]:
        monkeypatch.setattr(base_model, "eos_token_ids", {eos})
        place = first.index(eos)
        for least in (place, place + 1):
            options, proposer = (
                DecodingOptions(max_new_tokens=30, min_new_tokens=least),
                planted(base_model, known, right),
            )
            results, _ = decode(base_model, prompts, options, proposer)
            assert (results[0].tokens == first[: place + 1]) == (least == place) and results[0].tokens[:place] == first[:place]
            assert said(results) == said(decode(base_model, prompts, options)[0])


@pytest.mark.parametrize("right", [None, 0, 1, 3])
def test_max_new_tokens_ends_a_text_at_exactly_that_length(base_model, known, right):
    for most in (1, 2, 3, 4, 5, 9):
        proposer = planted(base_model, known, right)
        results, _ = decode(base_model, known[0], DecodingOptions(max_new_tokens=most, ignore_eos=True), proposer)
        assert said(results) == [(tokens[:most], "", "length") for tokens in known[1]]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_min_new_tokens_keeps_eos_out_of_the_first_so_many_tokens_and_no_further(tiny_models, kind):
    ended = Counter()
    for seed in range(12):
        model = tiny_models.get(0, seed=seed)
        prompts, proposer = prompts_of(4, 9, words=8, seed=seed), kind and tiny_proposer(model, kind, seed=seed, widths=(3, 2, 2))
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            options = DecodingOptions(max_new_tokens=20, min_new_tokens=6, sampling=sampling)
            for result in decode(model, prompts, options, proposer)[0]:
                assert 0 not in result.tokens[:6] and 0 not in result.tokens[:-1]
                assert (result.finish_reason == "stop") == (result.tokens[-1] == 0)
                ended[len(result.tokens)] += 1
    assert ended[7] and ended[20]  # EOS was taken as soon as it was let


def test_stop_strings_end_the_text_before_them_and_not_before_min_new_tokens(base_model, known, tokenizer):
    prompts, (first, _) = known
    words = [tokenizer.decode([token]) for token in first]
    place = next(i for i in range(5, 25) if f"{words[i]} {words[i + 1]}" not in " ".join(words[:i]) and "<eos>" not in words[i : i + 2])
    stop = f"{words[place]} {words[place + 1]}"
    for right in (None, 0, 3):
        options = DecodingOptions(max_new_tokens=30, ignore_eos=True, tokenizer=tokenizer, stop=(stop, "never said"))
        (result, _), _ = decode(base_model, prompts, options, planted(base_model, known, right))
        assert result.tokens == first[: place + 2] and result.finish_reason == "stop"
        assert result.text == tokenizer.decode(first[:place], skip_special_tokens=True) + " "
        (late, _), _ = decode(base_model, prompts, replace(options, min_new_tokens=place + 2), planted(base_model, known, right))
        assert len(late.tokens) > place + 2 and stop in late.text
        # A text that ends where the stop string had only begun is given out whole.
        (short, _), _ = decode(base_model, prompts, replace(options, max_new_tokens=place + 1), planted(base_model, known, right))
        assert short.finish_reason == "length" and short.text == tokenizer.decode(first[: place + 1], skip_special_tokens=True)


@pytest.mark.parametrize("right", [None, 2])
def test_a_stream_gives_out_what_the_batch_returns_and_marks_what_was_accepted(base_model, known, tokenizer, right):
    prompts, tokens = known
    options = DecodingOptions(max_new_tokens=11, ignore_eos=True, tokenizer=tokenizer)
    results, timing = decode(base_model, prompts, options, planted(base_model, known, right))
    steps = list(stream(base_model, prompts, options, planted(base_model, known, right)))
    assert len(steps) == timing.steps + 1 == (11 if right is None else 5)
    for index, result in enumerate(results):
        emitted = [one for step in steps for one in step if one.index == index]
        assert [token for one in emitted for token in one.tokens] == result.tokens == tokens[index][:11]
        assert all("".join(one.pieces) == one.text and len(one.pieces) == len(one.tokens) for one in emitted)
        assert "".join(one.text for one in emitted) == result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
        assert [one.finish_reason for one in emitted] == [None] * (len(emitted) - 1) + ["length"]
        assert [one.accepted for one in emitted] == [None] + [right] * (len(emitted) - 1)
        assert [len(one.tokens) for one in emitted] == ([1] * 11 if right is None else [1, 3, 3, 3, 1])
        assert result.accepted == ([] if right is None else [2] * 4)


def test_progress_is_told_the_new_tokens_of_every_step(base_model, known):
    told = []
    _, timing = decode(base_model, known[0], DecodingOptions(max_new_tokens=7, ignore_eos=True), planted(base_model, known, 2), told.append)
    assert told == [2, 6, 6] and timing.steps == 2 and timing.decoding > 0 < timing.prefill


def test_finished_sequences_leave_the_batch(base_model, monkeypatch):
    prompts, widths, extend = prompts_of(4, 5, 6, 7), [], base_model.extend
    plain, _ = decode(base_model, prompts, DecodingOptions(max_new_tokens=10, ignore_eos=True))
    monkeypatch.setattr(base_model, "extend", lambda tokens, *more: widths.append(len(tokens)) or extend(tokens, *more))
    monkeypatch.setattr(base_model, "eos_token_ids", {plain[1].tokens[2]})
    results, _ = decode(base_model, prompts, DecodingOptions(max_new_tokens=10))
    assert widths[0] == 4 and widths == sorted(widths, reverse=True)
    ends = [len(result.tokens) for result in results]
    assert widths[1:] == [sum(end > step for end in ends) for step in range(1, max(ends))]


@pytest.mark.parametrize("most", range(2, 10))
def test_a_text_that_ends_inside_an_accepted_path_waits_in_a_large_batch_without_outgrowing_the_cache(base_model, most):
    # One finished text of sixteen stays in the batch; the longest prompt ends first, its last step having accepted more than was asked for.
    prompts = prompts_of(9, *[3] * 15)
    plain, _ = decode(base_model, prompts, DecodingOptions(max_new_tokens=30, ignore_eos=True))
    texts = [prompt.tolist() + result.tokens for prompt, result in zip(prompts, plain)]
    proposer = Planted(texts, base_model.vocab_size, 4, lambda index, step: 4 if index == 0 else 0)
    fast, _ = decode(base_model, prompts, DecodingOptions(max_new_tokens=most, ignore_eos=True), proposer)
    assert [result.tokens for result in fast] == [result.tokens[:most] for result in plain]


def test_what_cannot_be_decoded_is_refused_before_any_work(base_model, tokenizer, monkeypatch):
    monkeypatch.setattr(base_model, "extend", None)
    monkeypatch.setattr(base_model, "new_cache", None)
    (prompt,) = prompts_of(10)
    context = base_model.context_length
    refused = [
        ([], {"max_new_tokens": 5}, "empty prompt"),
        ([prompt, prompt[:0]], {"max_new_tokens": 5}, "empty prompt"),
        ([prompt], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([prompt], {"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens 6"),
        ([prompt], {"max_new_tokens": 5, "min_new_tokens": -1}, "min_new_tokens -1"),
        ([prompt], {"max_new_tokens": 5, "stop": ("x",)}, "need a tokenizer"),
        ([prompt], {"max_new_tokens": 5, "stop": ("x", ""), "tokenizer": tokenizer}, "empty"),
        ([prompt], {"max_new_tokens": 5, "stop": "x", "tokenizer": tokenizer}, "list of strings"),
        ([prompt], {"max_new_tokens": 5, "seeds": (1, 2)}, "2 seeds for 1 prompts"),
        ([prompt], {"max_new_tokens": context - 9}, f"over the context of .*, {context}"),
    ]
    for prompts, options, message in refused:
        for begin in (decode, stream):
            with pytest.raises(UserError, match=message):
                begin(base_model, prompts, DecodingOptions(**options))


def test_the_context_is_filled_to_its_last_token_and_candidates_count_too(base_model):
    (prompt,) = prompts_of(10)
    fits, proposer = base_model.context_length - 10, PromptLookup(3)
    assert len(decode(base_model, [prompt], DecodingOptions(max_new_tokens=fits, ignore_eos=True))[0][0].tokens) == fits
    assert len(decode(base_model, [prompt], DecodingOptions(max_new_tokens=fits - 3, ignore_eos=True), proposer)[0][0].tokens) == fits - 3
    for most, more in ((fits + 1, None), (fits - 2, proposer), (fits, TopKProposer(tiny_speculator(base_model, "mlp_tied"), [1]))):
        with pytest.raises(UserError, match="over the context"):
            decode(base_model, [prompt], DecodingOptions(max_new_tokens=most), more)
