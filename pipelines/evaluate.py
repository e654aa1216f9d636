"""What a speculator earns, measured by decoding prompts with it, plainly, and with prompt lookup, in turn on the same machine."""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from fms_spec.acceptance import pooled_acceptance
from fms_spec.decoding import Timing, decode
from fms_spec.options import Options
from fms_spec.proposers import PromptLookup

RESAMPLES, INTERVAL = 1000, 0.95  # of the bootstrap over prompts


@dataclass(frozen=True)
class Sample:
    """One text: which prompt and category, which way it was decoded, what came of it.

    verdict: "equal", "tie" or "differs" against the plain text; see `compare`. tokens: of prompt and continuation, int64 [s].
    """

    prompt: int
    category: str
    kind: str
    accepted: list
    new_tokens: int
    timing: Timing
    verdict: str
    tokens: torch.Tensor
    prompt_length: int


def usual_ways(proposer):
    """What `report` compares: plain decoding, the proposer, and prompt lookup with as many candidates."""
    return {"plain": None, "speculator": proposer, "prompt_lookup": PromptLookup(proposer.nodes)}


def evaluate(base_model, prompts, ways, max_new_tokens):
    """Decode every prompt greedily and alone, in all ways in turn.

    Args:
        prompts: objects with category (str or None), turns (int) and tokens(replies) -> int64 [n], the tokens to be continued when the
        turns before were answered with `replies`. ways: {kind: proposer}, "plain" with None first; see `usual_ways`.

    Returns:
        list of `Sample`.
    """
    options = Options(max_new_tokens=max_new_tokens)
    for way in ways.values():  # first calls choose kernels and allocate
        decode(base_model, [prompts[0].tokens([])], Options(max_new_tokens=4, ignore_eos=True), way)
    samples = []
    for number, prompt in enumerate(tqdm(prompts, desc="decode", unit="prompt", dynamic_ncols=True)):
        replies = []
        for _ in range(prompt.turns):
            tokens = prompt.tokens(replies)
            for kind, way in ways.items():
                (result,), timing = decode(base_model, [tokens], options, way)
                if kind == "plain":
                    replies.append(result.tokens)
                whole = torch.cat([tokens, torch.tensor(result.tokens)])
                verdict = compare(base_model, tokens, replies[-1], result.tokens)
                category = prompt.category or "all"
                samples.append(Sample(number, category, kind, result.accepted, len(result.tokens), timing, verdict, whole, len(tokens)))
    return samples


def compare(base_model, prompt, plain, speculative):
    """ "equal", "tie" or "differs" for two decoded token lists.

    A forward over one token and one over several may round differently in bf16. A tie is a first difference between two tokens whose
    logits, in a forward over the whole prefix, are no further apart than one step of the base model's dtype at the largest logit.
    """
    if plain == speculative:
        return "equal"
    place = next((i for i, (a, b) in enumerate(zip(plain, speculative)) if a != b), None)
    if place is None:
        return "differs"  # one stops where the other goes on
    prefix = torch.cat([prompt, torch.tensor(plain[:place], dtype=torch.int64)])[None]
    states = base_model.hidden_states(prefix, torch.zeros_like(prefix))
    logits = base_model.logits(states[0, -1]).double()
    spacing = torch.finfo(base_model.dtype).eps * 2 ** math.floor(math.log2(max(logits.abs().max().item(), 1e-30)))
    return "tie" if (logits[plain[place]] - logits[speculative[place]]).abs() <= spacing else "differs"


def report(samples, proposer):
    """The figures of `evaluate`'s samples, as JSON values.

    Returns:
        dict: the speculator's figures (see `figures`) over all prompts; plain_tokens_per_s; lossless, differing_at_a_tie, differing;
        prompt_lookup: the same figures for it; categories: {name: the speculator's figures and prompt lookup's speed}.
    """
    speculated = [sample for sample in samples if sample.kind == "speculator"]
    verdicts = [sample.verdict for sample in speculated]
    values = figures(samples, "speculator", proposer.lookahead)
    categories = {}
    for category in dict.fromkeys(sample.category for sample in samples):
        own = [sample for sample in samples if sample.category == category]
        lookup = figures(own, "prompt_lookup", 1)
        categories[category] = figures(own, "speculator", proposer.lookahead) | {"prompt_lookup_speedup": lookup["speedup"]}
    return values | {
        "lookahead": proposer.lookahead,
        "nodes": proposer.nodes,
        "lossless": "differs" not in verdicts,
        "texts": len(verdicts),
        "differing_at_a_tie": verdicts.count("tie"),
        "differing": verdicts.count("differs"),
        "prompts": len({sample.prompt for sample in samples}),
        "prompt_lookup": figures(samples, "prompt_lookup", proposer.nodes),
        "categories": categories,
    }


def figures(samples, kind, lookahead):
    """Acceptance, speed and shares of one way of decoding, against plain decoding of the same prompts; `..._interval` is the 95% one.

    Speed is of decoding, without reading the prompt and without its first token.
    """
    own = [sample for sample in samples if sample.kind == kind]
    plain = [sample for sample in samples if sample.kind == "plain"]
    acceptance = pooled_acceptance((count for sample in own for count in sample.accepted), lookahead)
    numbers = sorted({sample.prompt for sample in own})
    sums = torch.zeros(6, len(numbers), dtype=torch.float64)  # accepted, steps, tokens and seconds, plain tokens and seconds
    for place, number in enumerate(numbers):
        for first, group in ((2, own), (4, plain)):
            mine = [sample for sample in group if sample.prompt == number]
            sums[first, place] = sum(sample.new_tokens - 1 for sample in mine)
            sums[first + 1, place] = sum(sample.timing.decoding for sample in mine)
        counts = [count for sample in own if sample.prompt == number for count in sample.accepted]
        sums[0, place], sums[1, place] = sum(counts), len(counts)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=generator)
    resampled = sums[:, drawn].sum(-1)
    length = lambda total: 1 + total[0] / total[1].clamp(min=1)  # noqa: E731
    speedup = lambda total: (total[2] / total[3]) / (total[4] / total[5])  # noqa: E731
    total, seconds = sums.sum(-1), sum(sample.timing.decoding for sample in own)
    return {
        "acceptance_length": acceptance.length,
        "acceptance_length_interval": interval(length(resampled)),
        "acceptance_per_position": acceptance.per_position,
        "draft_steps": acceptance.steps,
        "new_tokens": sum(sample.new_tokens for sample in own),
        "plain_tokens_per_s": (total[4] / total[5]).item(),
        "tokens_per_s": (total[2] / total[3]).item(),
        "speedup": speedup(total).item(),
        "speedup_interval": interval(speedup(resampled)),
        "shares": {
            part: sum(getattr(s.timing, part) for s in own) / seconds if seconds else 0.0 for part in ("drafting", "verifying", "overhead")
        },
    }


def interval(values):
    """The middle 95% of resampled values, as [low, high]; values that are no number, from prompts without a step, are left out."""
    edge = (1 - INTERVAL) / 2
    found = values[values.isfinite()]
    return found.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist() if len(found) else [math.nan, math.nan]
