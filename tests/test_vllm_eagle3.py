"""EAGLE-3 heads in the real vLLM, which knows their layouts without us: what it drafts is what we draft, token by token."""

import pytest
from conftest import need_vllm

need_vllm()

import torch
from vllm import SamplingParams
from vllm_helpers import answers, drafter_of, serving

from fms_spec.context import of_text
from fms_spec.decoding import decode
from fms_spec.loading import load_for_decoding
from fms_spec.options import DecodingOptions
from fms_spec.proposers import Step, TopKProposer
from pipelines.export import export

CHOICES = {"published": {}, "speculators": {"layout": "speculators"}, "pruned": {"draft_vocab_size": 40}}
CASES = [("eagle3", "published"), ("eagle3_deep", "pruned"), ("eagle3_deep", "speculators")]


def drafts_of(llm, prompt, count):
    """One prompt's greedy text, and [(place of the token that the draft begins after, the tokens drafted)]."""
    drafter, seen = drafter_of(llm), []
    propose = type(drafter).propose

    def watched(**named):
        rows = named["token_indices_to_sample"]
        last = named["common_attn_metadata"].query_start_loc[1:] - 1 if rows is None else rows
        place = int(named["target_positions"][last]) + 1
        seen.append((place, propose(drafter, **named)))
        return seen[-1][1]

    drafter.propose = watched
    ((tokens, _),) = answers(llm, [prompt], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
    return torch.cat([prompt, torch.tensor(tokens)]), [(place, drafted[0].tolist()) for place, drafted in seen]


@pytest.mark.parametrize("family, choice", CASES, ids=map(" ".join, CASES))
def test_every_token_that_vllm_drafts_is_the_one_that_we_draft(served, prompts, tmp_path, family, choice):
    heads = export(served / f"run-{family}", tmp_path / "heads", **CHOICES[choice])
    base_model, speculator, _ = load_for_decoding(str(served / "base_model"), heads, dtype="float32")
    assert len(speculator.layers) == (2 if family == "eagle3_deep" else 1)
    compared, chain = 0, TopKProposer(speculator, [1] * 3)
    with serving(served / "base_model", heads, max_num_batched_tokens=512) as llm:
        assert type(drafter_of(llm).model).__module__.startswith("vllm.")  # none of our code
        found = [drafts_of(llm, prompt, 24) for prompt in prompts[:12]]
    for text, drafts in found:
        states = base_model.hidden_states(text[None], torch.zeros(1, len(text), dtype=torch.int64))[0]
        drafts = [(place, drafted) for place, drafted in drafts if place < len(text)]  # others begin after the text's end
        roots = torch.tensor([place for place, _ in drafts])
        with torch.inference_mode():
            step = Step(states[roots - 1], text[roots], [], context=of_text(speculator, states, text, roots))
            assert chain.propose(step).tokens.tolist() == [drafted for _, drafted in drafts]
        compared += len(drafts)
    assert compared > 60
    plain, _ = decode(base_model, prompts[:12], DecodingOptions(max_new_tokens=24, ignore_eos=True))
    assert [text[len(prompt) :].tolist() for prompt, (text, _) in zip(prompts, found)] == [each.tokens for each in plain]
