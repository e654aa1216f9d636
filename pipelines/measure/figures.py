"""What samples add up to: acceptance, speed and losslessness, with intervals over prompts."""

import math
from bisect import bisect_left
from operator import attrgetter

import torch

from fms_spec.acceptance import pooled_acceptance

RESAMPLES, INTERVAL = 1000, 0.95  # of the bootstrap over prompts
TURNS = 5  # answers of a conversation that are told apart; those behind them are one group
CONTEXTS = (128, 512, 2048, 8192)  # tokens with which ranges of the context's length end


def summary(samples, proposer):
    """The figures of `samples.decode_in_turn`'s, as JSON values.

    Returns:
        dict: the speculator's figures (see `figures`) over all prompts; prompt_lookup: the same figures for it; categories, sources,
        turns, roles and contexts: those of each group of texts, see `grouped`. Texts of no mixture are of no source, those of no
        conversation in no turn, and of no role.
    """
    rest = "other" if any(sample.category for sample in samples) else "all"
    ahead = proposer.lookahead
    return figures(samples, "speculator", ahead) | {
        "lookahead": ahead,
        "nodes": proposer.nodes,
        "prompt_lookup": figures(samples, "prompt_lookup", proposer.nodes),
        "categories": grouped(samples, lambda sample: sample.category or rest, ahead),
        "sources": grouped(known(samples, "source"), lambda sample: sample.source, ahead),
        "turns": grouped(known(samples, "turn"), lambda sample: str(sample.turn) if sample.turn <= TURNS else f"over {TURNS}", ahead),
        "roles": grouped(known(samples, "role"), lambda sample: sample.role, ahead),
        "contexts": grouped(known(samples, "prompt_length"), lambda sample: context_range(sample.prompt_length), ahead),
    }


def known(samples, name):
    """Those of some samples of which an attribute is known, in its order."""
    value = attrgetter(name)
    return sorted(filter(value, samples), key=value)


def grouped(samples, group_of, lookahead):
    """{group: how many prompts and texts, the speculator's figures, prompt lookup's tokens a forward and speed}, in the samples' order.

    Args:
        group_of: function of a `samples.Sample` that names its group.
    """
    groups = {}
    for sample in samples:
        groups.setdefault(group_of(sample), []).append(sample)
    values = {}
    for name, own in groups.items():
        lookup, counts = figures(own, "prompt_lookup", 1), [sample.prompt for sample in own if sample.kind == "speculator"]
        theirs = {f"prompt_lookup_{figure}": lookup[figure] for figure in ("tokens_per_forward", "speedup")}
        values[name] = {"prompts": len({*counts}), "texts": len(counts)} | figures(own, "speculator", lookahead) | theirs
    return values


def context_range(length):
    """The name of the range of `CONTEXTS` that a prompt of so many tokens is in."""
    place = bisect_left(CONTEXTS, length)
    if place == len(CONTEXTS):
        return f"over {CONTEXTS[-1]}"
    return f"{CONTEXTS[place - 1] + 1 if place else 1} to {CONTEXTS[place]}"


def losslessness(samples, prompts):
    """How the speculator's texts compare with the plain ones, as JSON values, and how many of the prompts' turns were left out.

    Args:
        samples: as `settle` gives them. prompts: as for `samples.decode_in_turn`.
    """
    verdicts = [sample.verdict for sample in samples if sample.kind == "speculator"]
    return {
        "lossless": set(verdicts) <= {"equal", "rounding"},
        "texts": len(verdicts),
        "parting_by_rounding": verdicts.count("rounding"),
        "differing": verdicts.count("differs"),
        "prompts": len({sample.prompt for sample in samples}),
        "left_out": sum(prompt.turns for prompt in prompts) - len(verdicts),
    }


def figures(samples, kind, lookahead):
    """Acceptance, speed and shares of one way of decoding, against plain decoding of the same prompts; `..._interval` is the 95% one.

    Speed is of decoding, without reading the prompt and without its first token. `acceptance_length` leaves out steps without a draft, as
    vLLM's does; methods that don't always draft are compared by `tokens_per_forward`, where such a step counts as one token.
    """
    own = [sample for sample in samples if sample.kind == kind]
    plain = [sample for sample in samples if sample.kind == "plain"]
    acceptance = pooled_acceptance((count for sample in own for count in sample.accepted), lookahead)
    numbers = sorted({sample.prompt for sample in own})
    # Accepted, steps that drafted, tokens and seconds, plain tokens and seconds, forwards.
    sums = torch.zeros(7, len(numbers), dtype=torch.float64)
    for column, number in enumerate(numbers):
        for first, group in ((2, own), (4, plain)):
            mine = [sample for sample in group if sample.prompt == number]
            sums[first, column] = sum(sample.new_tokens - 1 for sample in mine)
            sums[first + 1, column] = sum(sample.timing.decoding for sample in mine)
        counts = [count for sample in own if sample.prompt == number for count in sample.accepted]
        sums[0, column], sums[1, column] = sum(counts), len(counts)
        sums[6, column] = sum(sample.timing.steps for sample in own if sample.prompt == number)
    drawn = resampled(sums)
    length = lambda total: 1 + total[0] / total[1].clamp(min=1)  # noqa: E731
    speedup = lambda total: (total[2] / total[3]) / (total[4] / total[5])  # noqa: E731
    per_forward = lambda total: total[2] / total[6].clamp(min=1)  # noqa: E731
    total, seconds = sums.sum(-1), sum(sample.timing.decoding for sample in own)
    return {
        "acceptance_length": acceptance.length,
        "acceptance_length_interval": interval(length(drawn)),
        "acceptance_per_position": acceptance.per_position,
        "draft_steps": acceptance.steps,
        "tokens_per_forward": per_forward(total).item(),
        "tokens_per_forward_interval": interval(per_forward(drawn)),
        "new_tokens": sum(sample.new_tokens for sample in own),
        "plain_tokens_per_s": (total[4] / total[5]).item(),
        "tokens_per_s": (total[2] / total[3]).item(),
        "speedup": speedup(total).item(),
        "speedup_interval": interval(speedup(drawn)),
        "shares": {
            part: sum(getattr(s.timing, part) for s in own) / seconds if seconds else 0.0 for part in ("drafting", "verifying", "overhead")
        },
    }


def resampled(sums):
    """What the prompts add up to in `RESAMPLES` drawings of as many of them, the same ones for every table of p prompts.

    Args:
        sums: fp64 [..., p], of each prompt.

    Returns:
        fp64 [..., RESAMPLES]
    """
    p = sums.shape[-1]
    return sums[..., torch.randint(p, (RESAMPLES, p), generator=torch.Generator().manual_seed(0))].sum(-1)


def interval(values):
    """The middle 95% of resampled values, as [low, high]; values that are no number, from prompts without a step, are left out."""
    edge = (1 - INTERVAL) / 2
    finite = values[values.isfinite()]
    return finite.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist() if len(finite) else [math.nan, math.nan]


def numbers(value):
    """A JSON value with None where there is no number, as for the speed of texts that end with their first token."""
    if isinstance(value, dict):
        return {name: numbers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
