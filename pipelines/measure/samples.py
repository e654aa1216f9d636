"""Texts decoded with a speculator, plainly, and with prompt lookup, in turn on the same machine; and how they compare."""

import gc
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from data.progress import progress
from fms_spec.decoding import Timing, decode
from fms_spec.errors import UserError
from fms_spec.lookup import PromptLookup
from fms_spec.options import DecodingOptions


@dataclass(frozen=True)
class Sample:
    """One text: which prompt, what it is a case of, which way it was decoded, what came of it.

    category, source, role: see `data.prompts.Prompt`. turn: which of its conversation's answers it is, from 1, None where it is of no
    conversation. verdict: against the plain text "equal", "differs", or "parted" until `settle` has found out whether that is "rounding" or
    "differs".
    tokens: of prompt and continuation, int64 [s]. parted_at: index of the first new token that isn't the plain text's, None where all are.
    """

    prompt: int
    category: str | None
    source: str | None
    turn: int | None
    role: str | None
    kind: str
    accepted: list
    new_tokens: int
    timing: Timing
    verdict: str
    tokens: torch.Tensor
    prompt_length: int
    parted_at: int | None

    @property
    def prompt_tokens(self):
        """What was to be continued: int64 [prompt_length]."""
        return self.tokens[: self.prompt_length]

    @property
    def text(self):
        """The continuation, as a list of ints."""
        return self.tokens[self.prompt_length :].tolist()


def usual_methods(proposer):
    """What is compared: plain decoding, the proposer, and prompt lookup with as many candidates."""
    return {"plain": None, "speculator": proposer, "prompt_lookup": PromptLookup(proposer.nodes)}


def decode_in_turn(base_model, prompts, methods, max_new_tokens):
    """Decode every prompt greedily and alone, by all methods in turn.

    A turn that is over the base model's context, with max_new_tokens and candidates, is left out, and so are those after it.

    Args:
        prompts: objects with category, source and role (str or None), first_turn (int or None), turns (int) and tokens(replies) -> int64
        [n], the tokens to be continued when the turns before were answered with `replies`; see `data.prompts`. methods: {kind: proposer},
        "plain" with None first; see `usual_methods`.

    Returns:
        list of `Sample`.

    Raises:
        UserError: every prompt is over the context.
    """
    options = DecodingOptions(max_new_tokens=max_new_tokens)
    room = base_model.context_length - max_new_tokens - max((method.lookahead for method in methods.values() if method), default=0)
    first, short = first_within(room, prompts, base_model), DecodingOptions(max_new_tokens=min(4, max_new_tokens), ignore_eos=True)
    for method in methods.values():  # first calls choose kernels and allocate
        decode(base_model, [first], short, method)
    samples = []
    for number, prompt in enumerate(progress(prompts, desc="decode", unit="prompt")):
        replies = []
        while len(replies) < prompt.turns and len(tokens := prompt.tokens(replies)) <= room:
            turn = prompt.first_turn and prompt.first_turn + len(replies)
            for kind, method in methods.items():
                (result,), timing = decode(base_model, [tokens], options, method)
                if kind == "plain":
                    replies.append(result.tokens)
                position = parting(replies[-1], result.tokens)
                verdict = "equal" if position is None else "differs" if base_model.dtype == torch.float32 else "parted"
                whole = torch.cat([tokens, torch.tensor(result.tokens)])
                facts = result.accepted, len(result.tokens), timing, verdict, whole, len(tokens), position
                samples.append(Sample(number, prompt.category, prompt.source, turn, prompt.role, kind, *facts))
    return samples


def first_within(room, prompts, base_model):
    """The first turn of the first prompt that has at most `room` tokens: int64 [n]; raises UserError where there is none."""
    turns = [prompt.tokens([]) for prompt in prompts]
    turn = next((tokens for tokens in turns if len(tokens) <= room), None)
    if turn is None:
        shortest, context = min(map(len, turns)), base_model.context_length
        raise UserError(
            f"every prompt, the shortest of {shortest} tokens, is over the context of {base_model.name}, {context}, {room} without the new "
            "tokens and candidates; give shorter prompts, or lower the number of new tokens, lookahead or lookup"
        )
    return turn


def parting(first, second):
    """Index of the first difference between two texts, lists of ints, be it that one of them ends there; None for equal ones."""
    if first == second:
        return None
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def logit_gap(base_model, prompt, first, second):
    """How far apart the logits of the two tokens are at which two texts part, in one forward over what they share.

    Args:
        prompt: int64 [n]. first, second: what follows it, lists of ints.

    Returns:
        float, in the base model's dtype; None for equal texts and where one merely ends.
    """
    position = parting(first, second)
    if position is None or position == min(len(first), len(second)):
        return None
    prefix = torch.cat([prompt, torch.tensor(first[:position], dtype=torch.int64)])[None]
    logits = base_model.logits(base_model.hidden_states(prefix, torch.zeros_like(prefix))[0, -1])
    return (logits[first[position]] - logits[second[position]]).abs().item()


def side_by_side(pairs, gaps):
    """How many texts are equal and how many part, and the largest of the `logit_gap`s, None where there is none, as JSON values.

    Args:
        pairs: list of (prompt, text, other text). gaps: of each pair.
    """
    equal = sum(first == second for _, first, second in pairs)
    largest = max((gap for gap in gaps if gap is not None), default=None)
    return {"texts": {"equal": equal, "parted": len(pairs) - equal}, "largest_gap": largest}


def settle(samples, pairs, load, max_new_tokens):
    """What float32 says of texts that part: one base model, loaded only if there are any, after the caller has let go of its own.

    The speculator's text in bf16 or fp16 may part from the plain one because a forward over one token rounds otherwise than one over
    several. So both are decoded again in float32, from before the step in which they parted to their end; only where these part too,
    "parted" becomes "differs", otherwise "rounding".

    Args:
        samples: of `decode_in_turn`, with max_new_tokens. pairs: list of (prompt int64 [n], text, other text), as for `logit_gap`. load:
        function of dtype and device, as `load_for_decoding` for the same models and shape.

    Returns:
        (samples, with verdicts for the speculator's; list of the pairs' `logit_gap` in float32)
    """
    parted = [index for index, sample in enumerate(samples) if (sample.kind, sample.verdict) == ("speculator", "parted")]
    if not parted and all(first == second for _, first, second in pairs):
        return samples, [None] * len(pairs)

    def work(base_model, _, proposer):
        settled = list(samples)
        for index in progress(parted, desc="in float32", unit="text"):
            settled[index] = replace(samples[index], verdict=verdict_in(base_model, proposer, samples[index], max_new_tokens))
        return settled, [logit_gap(base_model, *pair) for pair in pairs]

    free_memory()
    try:
        return work(*load(dtype="float32"))
    except torch.OutOfMemoryError:
        pass  # only behind the block the model is let go
    free_memory()
    return work(*load(dtype="float32", device="cpu"))


def verdict_in(base_model, proposer, sample, max_new_tokens):
    """ "rounding" or "differs": whether plain and speculative decoding say the same from before the step in which the sample parted on."""
    kept = before_step(sample.accepted, sample.parted_at)
    prefix, options = sample.tokens[: sample.prompt_length + kept], DecodingOptions(max_new_tokens=max_new_tokens - kept)
    (plain,), _ = decode(base_model, [prefix], options)
    (speculative,), _ = decode(base_model, [prefix], options, proposer)
    return "rounding" if plain.tokens == speculative.tokens else "differs"


def before_step(accepted, position):
    """How many new tokens to keep so that reading them gives the root of the step that said token `position`, and that step comes next.

    Reading the prompt says the first token; each step says its accepted tokens and one more.
    """
    begins = accumulate((count + 1 for count in accepted), initial=1)
    return max((begin - 1 for begin in begins if begin <= position), default=0)


def free_memory():
    """Give what nothing refers to any more back to the device, cycles included, for another model or process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
