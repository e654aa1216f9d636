"""Speculators of both families in the real vLLM, through the installed plugin."""

import json
import os

import pytest
from conftest import need_vllm

need_vllm()

import torch
from architectures import write_architecture
from conftest import chi_square, write_model
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm_helpers import (
    SIZES,
    answers,
    counters,
    drafter_of,
    make_place,
    published_draft,
    served_prompts,
    serving,
    write_published,
)  # fmt: skip

from data.prompts import Prompt
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.loading import load_for_decoding
from fms_spec.options import DecodingOptions
from fms_spec.proposers import Step, TopKProposer
from fms_spec.sampling import Sampling
from fms_spec.vllm.token_store import PassBuilder, TokenStore
from pipelines.measure.evaluate import evaluate
from pipelines.measure.figures import figures
from pipelines.measure.samples import decode_in_turn
from scripts.evaluate import Arguments


@pytest.fixture(scope="module")
def plain(served, prompts):
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * i % 60, ignore_eos=i % 2 == 0) for i in range(len(prompts))]
    with serving(served / "base_model") as llm:
        return params, answers(llm, prompts, params)


# Prompts are read whole: beside the last token of a part vLLM shows a draft the prompt's last token, and its own keys keep that.
WHOLE = {"eagle3": {"max_num_batched_tokens": 512}}


@pytest.mark.parametrize("family", ["hidden_state", "mlp_tied", "mlp_untied", "layers", "eagle3", "medusa"])
def test_greedy_output_is_that_of_vllm_alone_and_acceptance_that_of_our_evaluation(served, prompts, plain, family):
    params, expected = plain
    base_model, _, proposer = load_for_decoding(str(served / "base_model"), served / family, dtype="float32")
    samples = decode_in_turn(base_model, [Prompt(None, prompt) for prompt in prompts], {"plain": None, "speculator": proposer}, 32)
    ours = figures(samples, "speculator", 3)
    with serving(served / "base_model", served / family, **WHOLE.get(family, {})) as llm:
        alone = type(drafter_of(llm).model).__module__.startswith("vllm.")  # served by what vLLM has itself
        assert answers(llm, prompts, params) == expected and alone == (family == "eagle3")
        before = counters(llm)
        answers(llm, prompts, SamplingParams(temperature=0, max_tokens=32))
        after = counters(llm)
        assert after["num_preemptions"] > 0  # the cache was too small: requests were dropped and begun again
    drafts, accepted = (after[f"spec_decode_{name}"] - before[f"spec_decode_{name}"] for name in ("num_drafts", "num_accepted_tokens"))
    assert ours["acceptance_length"] > 1.1  # otherwise nothing is shown
    assert 1 + accepted / drafts == pytest.approx(ours["acceptance_length"], rel=0.02)


def test_the_evaluation_against_vllm_finds_the_same_texts_and_acceptance(served, prompts, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(served / "base_model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": tokenizer.decode(prompt)}) for prompt in prompts[:24]))
    places = dict(base_model=str(served / "base_model"), speculator=str(served / "hidden_state"), prompts=str(tmp_path / "prompts.jsonl"))
    evaluate(Arguments(**places, dtype="float32", max_new_tokens=32, lookahead=2, against="vllm", out=str(tmp_path / "report.json")))
    found = json.loads((tmp_path / "report.json").read_text())["against"]
    assert found["engine"] == "vllm" and found["version"] and found["num_speculative_tokens"] == 2
    assert found["texts"] == {"equal": 24, "parted": 0} and found["largest_gap"] is None and found["partings"] == []
    assert found["acceptance_length"] > 1.1  # otherwise nothing is shown
    assert found["acceptance_length"] == pytest.approx(found["chain_acceptance_length"], abs=1e-3)  # the texts are the same, to the end
    assert found["acceptance_per_position"] == pytest.approx(found["chain_acceptance_per_position"], abs=1e-3)
    assert "24 of 24 equal" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["Phi", "Granite"])  # a bias of the lm_head; a scale of the logits
def test_a_model_unlike_llama_says_in_vllm_what_it_was_trained_for_and_accepts_as_much(tmp_path, label):
    changes = SIZES | ({"num_key_value_heads": 2} if label == "Phi" else {})
    make_place(tmp_path, ["pointer"], lambda directory: write_architecture(directory, label, **changes))
    prompts = served_prompts(tmp_path)
    base_model, _, proposer = load_for_decoding(str(tmp_path / "base_model"), tmp_path / "pointer", dtype="float32")
    samples = decode_in_turn(base_model, [Prompt(None, prompt) for prompt in prompts], {"plain": None, "speculator": proposer}, 32)
    ours = figures(samples, "speculator", 3)
    with serving(tmp_path / "base_model", tmp_path / "pointer") as llm:
        found = answers(llm, prompts, SamplingParams(temperature=0, max_tokens=32))
        counted = counters(llm)
    plain = [sample.tokens[sample.prompt_length :].tolist() for sample in samples if sample.kind == "plain"]
    assert [tokens for tokens, _ in found] == plain
    assert ours["acceptance_length"] > 1.05  # otherwise nothing is shown
    served = 1 + counted["spec_decode_num_accepted_tokens"] / counted["spec_decode_num_drafts"]
    assert served == pytest.approx(ours["acceptance_length"], rel=0.02)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_published_speculator_drafts_in_vllm_what_the_formulas_and_our_own_family_draft(tmp_path, served, prompts, tied):
    tensors = write_published(tmp_path / "published", tied)
    _, own, _ = load_for_decoding(str(served / "base_model"), tmp_path / "published", dtype="float32")
    chain, seen = TopKProposer(own, [1, 1, 1]), []
    with serving(served / "base_model", tmp_path / "published") as llm:
        drafter = drafter_of(llm)
        propose = drafter.propose

        def watched(**named):
            rows, newest = named["token_indices_to_sample"], named["next_token_ids"]
            rows = named["common_attn_metadata"].query_start_loc[1:] - 1 if rows is None else rows
            seen.append((named["target_hidden_states"][rows].clone(), newest.long(), propose(**named)))
            return seen[-1][-1]

        drafter.propose = watched
        answers(llm, prompts[:16], SamplingParams(temperature=0, max_tokens=12))
    states, newest, drafted = map(torch.cat, zip(*seen))
    assert len(states) > 100
    assert torch.equal(chain.propose(Step(states, newest, [])).tokens, drafted)
    assert [published_draft(tensors, *row, tied) for row in zip(states, newest)] == drafted.tolist()


@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=0.6, top_k=5)], ids=["T=1", "T=0.6, top-k 5"])
def test_sampled_output_has_the_base_models_own_distribution(tmp_path, settings):
    write_model(tmp_path / "base_model", **SIZES, vocab_size=8, initializer_range=0.1)
    write_published(tmp_path / "published", tied=True, vocabulary=8)
    model, prompt, count = BaseModel(str(tmp_path / "base_model"), dtype="float32"), torch.tensor([3, 5, 1]), 6000
    with serving(tmp_path / "base_model", tmp_path / "published", max_num_seqs=200, max_num_batched_tokens=2048) as llm:
        # Three tokens that count and the ones drafted after them; one prompt, and a batch that lets drafts be accepted and refused.
        found = answers(llm, [prompt] * count, SamplingParams(max_tokens=4, ignore_eos=True, seed=None, **settings))
        assert counters(llm)["spec_decode_num_accepted_tokens"] > count / 20
    sampling, every = Sampling(**settings), torch.cartesian_prod(*[torch.arange(8)] * 2)
    rows = torch.cat([prompt.expand(64, -1), every], dim=1)
    probabilities = sampling.probabilities(model.logits(model.hidden_states(rows, torch.zeros_like(rows)))).double()
    first, second = (probabilities[torch.arange(64), 2 + i, every[:, i]] for i in range(2))
    expected = (first * second)[:, None] * probabilities[:, 4]
    counts = torch.zeros(8, 8, 8)
    for tokens, _ in found:
        counts[tuple(tokens[:3])] += 1
    assert chi_square(counts, expected * count) < 5


def test_logprobs_stop_strings_structured_output_and_cached_prefixes_work_as_without_drafts(served, prompts):
    long = torch.cat(prompts[:5])[:180]  # read in chunks of 40 tokens, while others are decoded with drafts
    jobs = [
        (prompts[0], SamplingParams(temperature=0, max_tokens=20, logprobs=3)),
        (long, SamplingParams(temperature=0, max_tokens=30)),
        (long, SamplingParams(temperature=0, max_tokens=30)),
        (prompts[1], SamplingParams(temperature=0, max_tokens=1)),
        (prompts[2], SamplingParams(temperature=0, max_tokens=30, stop=["w7", "w30"], ignore_eos=True)),
        (prompts[3], SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(choice=["w5w9w7w8", "w3w2"]))),
        (prompts[4], SamplingParams(temperature=0, max_tokens=20, structured_outputs=StructuredOutputsParams(regex="(w1|w2|w3){12}"))),
        (prompts[5], SamplingParams(temperature=0, max_tokens=30, min_tokens=25)),
        (prompts[6], SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, frequency_penalty=0.4)),
    ]
    found = []
    for speculator in (None, served / "hidden_state"):
        with serving(served / "base_model", speculator, num_speculative_tokens=2) as llm:
            inputs = [{"prompt_token_ids": prompt.tolist()} for prompt, _ in jobs]
            outputs = [output.outputs[0] for _ in range(2) for output in llm.generate(inputs, [job for _, job in jobs], use_tqdm=False)]
            assert counters(llm)["prefix_cache_hits"] > 0
            if speculator:
                assert drafter_of(llm).num_speculative_tokens == 2 and counters(llm)["spec_decode_num_accepted_tokens"] > 0
        found.append([(list(output.token_ids), output.finish_reason, output.stop_reason, output.text) for output in outputs])
        found.append([[{token: entry.logprob for token, entry in entries.items()} for entries in outputs[0].logprobs]])
    assert found[2] == found[0]
    for ours, theirs in zip(found[3][0], found[1][0], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    structured = [text.replace(" ", "") for *_, text in found[2][5:7]]
    assert structured[0] in ("w5w9w7w8", "w3w2") and len(structured[1]) == 24


def test_a_draft_sees_its_own_text_also_from_cached_prefixes_and_where_vllm_does_not_say_which_pass_it_runs(served, prompts, monkeypatch):
    known = prompts[5]  # as long as a block and a bit more; some of the lines go on otherwise just where the block ends
    lines = [known[:length] for length in range(34, 44)] + [torch.cat([known[:32], prompt]) for prompt in prompts[8:12]]
    params, found, seen = SamplingParams(temperature=0, max_tokens=32), [], set()
    context = TokenStore.context

    def watched(*arguments):
        shown = context(*arguments)
        seen.update(tuple(tokens[:end].tolist()) for tokens, end in zip(shown.tokens, shown.end))
        return shown

    monkeypatch.setattr(TokenStore, "context", watched)
    # Prompts are read whole: beside the last token of a part vLLM shows a draft the prompt's last token, not the next one.
    with serving(served / "base_model", served / "pointer", num_gpu_blocks_override=64, max_num_batched_tokens=512) as llm:
        for unsaid in (False, False, True):
            if unsaid:
                monkeypatch.setattr(PassBuilder, "build_for_drafting", lambda self, common, draft_index: self.build(0, common))
            before = counters(llm)
            texts, after = answers(llm, lines, params), counters(llm)
            counts = [after[name] - (before[name] or 0) for name in ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens")]
            found.append((texts, counts))
        assert after["prefix_cache_hits"] > before["prefix_cache_hits"] > 0
    assert found[0] == found[1] == found[2] and counts[1] > 50
    seam = lambda text: (*text[:31], *text[32:])  # noqa: E731 - the last slot of the shared block stands for whichever text came first
    whole = [seam([*line.tolist(), *tokens][1:]) for line, (tokens, _) in zip(lines, texts)]
    assert len(seen) > 100 and all(any(text[: len(part) - 1] == seam(part) for text in whole) for part in seen)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_a_target_split_over_two_ranks_drafts_with_a_whole_drafter_on_each(served, prompts, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    texts, _ = decode(BaseModel(str(served / "base_model"), dtype="float32"), prompts[:8], DecodingOptions(max_new_tokens=30))
    two = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    with serving(served / "base_model", served / "pointer", **two) as llm:
        assert [tokens for tokens, _ in answers(llm, prompts[:8], SamplingParams(temperature=0, max_tokens=30))] == [
            t.tokens for t in texts
        ]
        counted = counters(llm)
        assert counted["spec_decode_num_accepted_tokens"] > 0.3 * counted["spec_decode_num_drafts"]
