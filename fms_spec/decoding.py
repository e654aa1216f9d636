"""Decoding on one preallocated cache: plain, or checking a speculator's chain in one forward.

Shapes: b live sequences, k drafted tokens, d base width, v vocabulary.

A step runs each sequence's last token and its k drafted tokens at once. The leading drafts that equal what the base model would have
said are accepted; its own next token is the bonus. Rejected drafts stay behind in the cache but are never counted, so they are
overwritten. Plain decoding is the same loop with k = 0, so both are compared on equal terms.
"""

import time
from dataclasses import dataclass, field

import torch

from fms_spec.errors import UserError
from fms_spec.sampling import Sampling

# Finished sequences leave the batch once they are this share of it: leaving moves the cache of all that stay, so not at every end.
LEAVING_SHARE = 1 / 8


@dataclass
class Continuation:
    """What was decoded for one prompt.

    tokens: the new tokens, ending with EOS where finish_reason is "stop" ("length" otherwise).
    accepted: for every step that drafted, how many drafts were accepted, as the base model judged them.
    """

    tokens: list = field(default_factory=list)
    finish_reason: str = "length"
    accepted: list = field(default_factory=list)


@dataclass
class Timing:
    """Seconds of prefill and of decoding steps, and the number of steps (base-model forwards after prefill)."""

    prefill: float = 0.0
    decoding: float = 0.0
    steps: int = 0


@torch.inference_mode()
def decode(base_model, prompts, *, max_new_tokens, speculator=None, lookahead=None, sampling=Sampling(), generator=None, progress=None):
    """Decode a batch of prompts of unequal length together; sequences that finish leave the batch.

    Args:
        prompts: list of 1-D int64 tensors. speculator: any `Speculator`, or None for plain decoding. lookahead: drafts a step, at most
        and by default what the speculator was trained for. generator: seeds sampling. progress: called with the number of new tokens
        after each step.

    Returns:
        (list of Continuation, in the prompts' order, Timing)

    Raises:
        UserError: an empty prompt, no new tokens asked for, a prompt too long for the context, a lookahead over the trained one, or sampling with a speculator.
    """
    drafts = check_request(base_model, prompts, max_new_tokens, speculator, lookahead, sampling)
    timing, clock = Timing(), time.perf_counter
    start = clock()
    results = [Continuation() for _ in prompts]
    capacity = max(len(prompt) for prompt in prompts) + max_new_tokens + drafts
    cache = base_model.new_cache(len(prompts), capacity)
    hidden = prefill(base_model, cache, prompts)
    last = sampling.choose(base_model.logits(hidden), generator)
    live = list(range(len(prompts)))
    done = take_tokens(results, live, [[token] for token in last.tolist()], base_model.eos_token_ids, max_new_tokens)
    timing.prefill = clock() - start
    while len(done) < len(live):
        if len(done) >= max(1, LEAVING_SHARE * len(live)):
            kept = [i for i in range(len(live)) if i not in done]
            live, done = [live[i] for i in kept], set()
            kept = torch.tensor(kept, device=last.device)
            cache.keep_sequences(kept)
            hidden, last = hidden[kept], last[kept]
        hidden, last, emitted = step(base_model, cache, hidden, last, speculator, drafts, sampling, generator)
        if drafts:
            for i, tokens in enumerate(emitted):
                if i not in done:
                    results[live[i]].accepted.append(len(tokens) - 1)
        done |= take_tokens(results, live, emitted, base_model.eos_token_ids, max_new_tokens, done)
        timing.steps += 1
        if progress:
            progress(sum(len(tokens) for tokens in emitted))
    timing.decoding = clock() - start - timing.prefill
    return results, timing


def check_request(base_model, prompts, max_new_tokens, speculator, lookahead, sampling):
    """Number of drafts a step; raises UserError for what `decode` refuses."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise UserError("an empty prompt can't be continued; give at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    drafts = 0
    if speculator is not None:
        drafts = speculator.n_predict if lookahead is None else lookahead
        if not 1 <= drafts <= speculator.n_predict:
            raise UserError(f"lookahead {drafts}: this speculator was trained for 1 to {speculator.n_predict}")
        if sampling.temperature > 0:
            raise UserError("sampling with a speculator is not supported; use temperature 0, or decode without the speculator")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens + drafts > base_model.context_length:
        raise UserError(
            f"a prompt of {longest} tokens, {max_new_tokens} new ones and {drafts} drafts are over the context of {base_model.name}, "
            f"{base_model.context_length}; shorten the prompt or lower the number of new tokens"
        )
    return drafts


def prefill(base_model, cache, prompts):
    """Store the prompts in an empty cache; returns the states [b, d] at their last tokens.

    Shorter prompts are padded on the right: what follows a prompt's last token is masked from it, never counted, and overwritten.
    """
    device = base_model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.nn.utils.rnn.pad_sequence([prompt.to(device) for prompt in prompts], batch_first=True)
    hidden = base_model.extend(padded, cache)
    cache.lengths = lengths
    return hidden[cache.rows[:, 0], lengths - 1]


def step(base_model, cache, hidden, last, speculator, drafts, sampling, generator):
    """One forward of the base model; advances the cache by what is accepted.

    Args:
        hidden: [b, d] state that gave `last`. last: int64 [b], chosen but not yet in the cache.

    Returns:
        (state [b, d] that gave the newest token, newest token int64 [b], emitted tokens as b lists)
    """
    rows = cache.rows[:, 0]
    tokens = last[:, None]
    if drafts:
        tokens = torch.cat([tokens, speculator.propose(hidden, last, drafts)], dim=1)
    states = base_model.extend(tokens, cache)
    if not drafts:
        newest = sampling.choose(base_model.logits(states[:, -1]), generator)
        cache.lengths += 1
        return states[:, -1], newest, [[token] for token in newest.tolist()]
    verdict = base_model.logits(states).argmax(-1)  # [b, k + 1]
    accepted = (verdict[:, :-1] == tokens[:, 1:]).cumprod(dim=1).sum(dim=1)  # [b]
    cache.lengths += accepted + 1
    counts = accepted.tolist()
    emitted = [line[: count + 1] for line, count in zip(verdict.tolist(), counts)]
    return states[rows, accepted], verdict[rows, accepted], emitted


def take_tokens(results, live, emitted, eos_token_ids, max_new_tokens, done=frozenset()):
    """Append emitted tokens up to EOS or the limit; returns the indices into `live` that finished now."""
    finished = set()
    for i, tokens in enumerate(emitted):
        if i in done:
            continue
        result = results[live[i]]
        for token in tokens:
            result.tokens.append(token)
            if token in eos_token_ids:
                result.finish_reason = "stop"
            if token in eos_token_ids or len(result.tokens) == max_new_tokens:
                finished.add(i)
                break
    return finished
