"""What a speculator earns in vLLM here: with the plugin, plainly, and with vLLM's own ngram method, in turn in one run."""

import time

import torch
from tqdm import tqdm

from fms_spec.base_model import resolve_base_model
from fms_spec.hub import local_directory
from fms_spec.loading import load_for_decoding
from fms_spec.vllm_plugin import METHOD
from pipelines.evaluate import compare, evaluate, figures
from pipelines.vllm_engine import start_vllm

LOOKUP = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}  # as our own prompt lookup: its longest match is 3


def benchmark_serving(name, speculator, prompts, new_tokens, dtype):
    """One JSON value for each way, as an iterator; batch 1, greedy, speeds with reading the prompt.

    Args:
        prompts: as for `evaluate`; of a conversation, its first turn.
    """
    base_model, heads, proposer = load_for_decoding(name, speculator, dtype=dtype)
    tokens = heads.n_predict
    ours = figures(evaluate(base_model, prompts, {"plain": None, "speculator": proposer}, new_tokens), "speculator", tokens)
    del heads, proposer
    lines = [prompt.tokens([]) for prompt in prompts]
    speculations = {
        "plain": None,
        "ngram": {"method": "ngram", "num_speculative_tokens": tokens, **LOOKUP},
        # The last: a process has one set of vLLM's counters, those of the engine it started last.
        "speculator": {"method": METHOD, "model": str(local_directory("speculator", speculator)), "num_speculative_tokens": tokens},
    }
    length = max(map(len, lines)) + new_tokens + tokens  # room to draft to the end: vLLM drafts nothing that might not fit
    engines = {way: start_vllm(resolve_base_model(name), dtype, length, speculative_config=found, disable_log_stats=False)
               for way, found in speculations.items()}  # fmt: skip
    try:
        warm_up(engines, lines[0])
        before = counters(engines["speculator"])
        seconds, texts = in_turn(engines, lines, new_tokens)
        counted = counters(engines["speculator"]) - before
        for way in engines:
            verdicts = [compare(base_model, *job) for job in zip(lines, texts["plain"], texts[way])]
            rate, plain = (sum(map(len, texts[kind])) / seconds[kind] for kind in (way, "plain"))
            yield {
                "way": way, "tokens_per_s": rate, "speedup": rate / plain, "texts": {kind: verdicts.count(kind) for kind in set(verdicts)},
                **(acceptance(counted, ours) if way == "speculator" else {}),
            }  # fmt: skip
    finally:
        for engine in engines.values():
            engine.llm_engine.engine_core.shutdown()


def warm_up(engines, line):
    """A short text through every engine: first calls choose kernels and allocate."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    for engine in engines.values():
        engine.generate({"prompt_token_ids": line.tolist()[::-1]}, params, use_tqdm=False)


def in_turn(engines, lines, new_tokens):
    """({way: seconds in all}, {way: token lists}) of every line [n] through every engine, one after the other."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False)
    seconds, texts = dict.fromkeys(engines, 0.0), {way: [] for way in engines}
    for line in tqdm(lines, desc="serving", unit="prompt", dynamic_ncols=True):
        for way, engine in engines.items():
            start = time.perf_counter()
            (output,) = engine.generate({"prompt_token_ids": line.tolist()}, params, use_tqdm=False)
            seconds[way] += time.perf_counter() - start
            texts[way].append(list(output.outputs[0].token_ids))
    return seconds, texts


def counters(engine):
    """vLLM's own counts, int64: [drafts, accepted tokens, and those accepted at each position]."""
    found = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in engine.get_metrics() if "spec_decode_num_" in metric.name
    }
    return torch.tensor([found["drafts"].value, found["accepted_tokens"].value, *found["accepted_tokens_per_pos"].values])


def acceptance(counted, ours):
    """Acceptance by vLLM's counters (see `counters`), beside that of our own decoding (`figures`) on the same prompts."""
    drafts, accepted, *shares = counted.tolist()
    return {
        "acceptance_length": 1 + accepted / drafts, "acceptance_per_position": [count / drafts for count in shares],
        "our_acceptance_length": ours["acceptance_length"], "our_acceptance_per_position": ours["acceptance_per_position"],
    }  # fmt: skip
