"""What a speculator earns in vLLM here: with the plugin, plainly, and with vLLM's own ngram method, in turn in one run.

Shapes: n tokens of a line, which is a prompt.
"""

import sys
from functools import partial
from itertools import chain

import torch

from fms_spec.draft_shape import DraftShape
from fms_spec.hub import local_directory
from fms_spec.loading import load_for_decoding
from fms_spec.model_config import context_length, read_config, read_eos_token_ids, resolve_base_model
from fms_spec.speculators.directory import read_speculator_config, speculative_config
from pipelines.generate.vllm_engine import start_vllm
from pipelines.measure.figures import figures
from pipelines.measure.samples import decode_in_turn, free_memory, settle, side_by_side
from pipelines.timer import texts_in_turn

LOOKUP = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}  # as our own prompt lookup: its longest match is 3


def benchmark_serving(name, speculator, prompts, new_tokens, dtype, lookahead=None):
    """One JSON value for each method, as an iterator; batch 1, greedy, speeds with reading the prompt, texts against plain vLLM's.

    Args:
        prompts: as for `samples.decode_in_turn`, of which those over the context are left out. lookahead: tokens that are drafted, all
        that the speculator was trained for by default.

    Raises:
        UserError: as `load_for_decoding`.
    """
    load = partial(load_for_decoding, name, speculator, DraftShape(lookahead))
    lines, tokens, ours = our_decoding(load, prompts, new_tokens, dtype)
    free_memory()
    # The last with the speculator: a process has one set of vLLM's counters, those of the engine it started last.
    speculations = {
        "plain": None,
        "ngram": {"method": "ngram", "num_speculative_tokens": tokens, **LOOKUP},
        "speculator": attached(speculator, tokens),
    }
    length = length_of(lines, new_tokens, tokens, read_config(resolve_base_model(name)))
    share = 0.9 / len(speculations)  # they are there together
    engines = {method: start_vllm(resolve_base_model(name), dtype, length, share, speculative_config=config, disable_log_stats=False)
               for method, config in speculations.items()}  # fmt: skip
    try:
        warm_up(engines, lines[0])
        before = counters(engines["speculator"])
        rates, texts = texts_in_turn({method: writing(engine, new_tokens) for method, engine in engines.items()}, lines, "serving")
        counted = acceptance(counters(engines["speculator"]) - before)
    finally:
        for engine in engines.values():
            engine.llm_engine.engine_core.shutdown()
    pairs = {method: list(zip(lines, texts["plain"], texts[method])) for method in engines}
    _, gaps = settle([], [*chain(*pairs.values())], load, new_tokens)
    for index, method in enumerate(engines):
        comparison = side_by_side(pairs[method], gaps[index * len(lines) :][: len(lines)])
        speed = {"tokens_per_s": rates[method], "speedup": rates[method] / rates["plain"]}
        yield {"way": method} | speed | comparison | (counted | ours if method == "speculator" else {})


def our_decoding(load, prompts, new_tokens, dtype):
    """(list of int64 [n] that were continued, tokens drafted, acceptance as JSON values) of our own decoding with a chain."""
    base_model, _, proposer = load(dtype=dtype)
    samples = decode_in_turn(base_model, prompts, {"plain": None, "speculator": proposer}, new_tokens)
    values = figures(samples, "speculator", proposer.lookahead)
    ours = {f"our_{name}": values[name] for name in ("acceptance_length", "acceptance_per_position")}
    return [sample.prompt_tokens for sample in samples if sample.kind == "plain"], proposer.lookahead, ours


def serve(name, speculator, lines, new_tokens, tokens, dtype):
    """Put lines through vLLM, with a speculator that drafts `tokens`; its processes have ended on return.

    Args:
        name, speculator: directories or hub names. lines: list of int64 [n].

    Returns:
        (greedy texts, lists of ints that end at EOS or new_tokens; acceptance by vLLM's own counters, as JSON values)
    """
    from vllm import SamplingParams

    path = resolve_base_model(name)
    config = read_config(path)
    ends = [token for token in read_eos_token_ids(path, config) if token < config.vocab_size]
    engine = start_vllm(
        path, dtype, length_of(lines, new_tokens, tokens, config), speculative_config=attached(speculator, tokens), disable_log_stats=False
    )
    try:
        # Ends as ours do, whatever the tokenizer calls its EOS.
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, stop_token_ids=ends, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": line.tolist()} for line in lines], params, use_tqdm=sys.stderr.isatty())
        return [list(output.outputs[0].token_ids) for output in outputs], acceptance(counters(engine))
    finally:
        engine.llm_engine.engine_core.shutdown()


def attached(speculator, tokens):
    """vLLM's speculative_config for a speculator's directory or hub name."""
    directory = local_directory("speculator", speculator)
    return speculative_config(directory, read_speculator_config(directory), tokens)


def length_of(lines, new_tokens, tokens, config):
    """vLLM's max_model_len: room for the drafts behind the last step's drafts, where the context has it.

    Once the longest text of a batch has no such room, vLLM drafts for none of them, and counts old drafts again: 305 drafts of 12 texts
    of 48 tokens where 290 were due, acceptance length 1.86 for 1.99.
    """
    return min(max(map(len, lines)) + new_tokens + 2 * tokens + 1, context_length(config))


def warm_up(engines, line):
    """A short text through every engine: first calls choose kernels and allocate."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    for engine in engines.values():
        engine.generate({"prompt_token_ids": line.tolist()[::-1]}, params, use_tqdm=False)


def writing(engine, new_tokens):
    """Function of a line [n] that puts it through an engine and returns its new tokens, a list of ints."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False)

    def write(line):
        (output,) = engine.generate({"prompt_token_ids": line.tolist()}, params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    return write


def counters(engine):
    """vLLM's own counts, int64: [drafts, accepted tokens, and those accepted at each position]."""
    metrics = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in engine.get_metrics() if "spec_decode_num_" in metric.name
    }
    return torch.tensor([metrics["drafts"].value, metrics["accepted_tokens"].value, *metrics["accepted_tokens_per_pos"].values])


def acceptance(counted):
    """Acceptance by vLLM's counters (see `counters`), as JSON values."""
    drafts, accepted, *shares = counted.tolist()
    drafts = max(drafts, 1)  # none where every text ends at its first token
    return {"acceptance_length": 1 + accepted / drafts, "acceptance_per_position": [count / drafts for count in shares]}
