"""Which tree pays on this machine: measured costs of a step against the acceptance that each tree would have had.

Shapes: n candidates.
"""

from functools import partial
from itertools import islice

import torch

from fms_spec.acceptance import accepted_in_text, pooled_acceptance, steps_in_text
from fms_spec.candidates import Tree
from fms_spec.context import of_text
from fms_spec.decoding import decode
from fms_spec.draft_shape import DraftShape
from fms_spec.options import DecodingOptions
from fms_spec.proposers import Step
from pipelines.timer import median_seconds

NODES = (1, 2, 3, 4, 6, 8, 12, 16)  # candidates of the trees that are compared
PROBABILITIES = (0.0, 0.05, 0.1, 0.2, 0.3)  # that end chains which are compared
LOOKUPS = (0, 10)  # tokens that are looked up instead
REPEATS = 9
SHOWN = 8
TEXTS = 64  # that trees are tried on: their states are kept in memory
CONTEXT = 256  # cached tokens of the measured forwards


def forward_seconds(base_model, sizes):
    """{tokens: seconds} of a forward with logits, batch 1, over a chain of so many tokens on a cache of `CONTEXT`."""
    forward = forward_at(base_model, min(CONTEXT, base_model.context_length - max(sizes)), max(sizes))
    return median_seconds({size: partial(forward, size) for size in sizes}, base_model.device, REPEATS, left_out=1)


def forward_at(base_model, held, most):
    """A function that runs such a forward over so many tokens, at most `most`, on a cache that holds `held`."""
    cache = base_model.new_cache(1, held + most)
    cache.hold([held])

    @torch.inference_mode()
    def forward(size):
        tokens = torch.ones(1, size, dtype=torch.int64, device=base_model.device)
        base_model.logits(base_model.extend(tokens, cache, Tree.full([1] * (size - 1), base_model.device)))

    return forward


def shapes(n_predict):
    """The `DraftShape`s that are compared: every chain; whole ones that end early or look up; and the best 2 to 16 nodes at every depth."""
    depths = range(1, n_predict + 1)
    trees = [DraftShape(lookahead=depth, nodes=nodes) for depth in depths for nodes in NODES if nodes > depth]
    more = [DraftShape(min_probability=probability, lookup=lookup) for lookup in LOOKUPS for probability in PROBABILITIES]
    return [DraftShape(lookahead=depth) for depth in depths] + more[1:] + trees


@torch.inference_mode()
def suggest(base_model, speculator, texts):
    """Expected speed-up of every shape over plain decoding: the `SHOWN` best first, as dicts.

    speedup = tokens x plain step / (drafting + forwards over the trees), batch 1. A chain that ends early is drafted at the price of one
    that is as long.

    Args:
        texts: iterable of (states [s, d], tokens int64 [s], prompt length, new tokens), greedy texts as for `steps_in_text`, of which
        the first `TEXTS` count; without any, nothing is suggested.
    """
    texts = list(islice(texts, TEXTS))
    if not texts:
        return []
    states, tokens, _, _ = texts[0]
    context = of_text(speculator, states, tokens, torch.tensor([len(tokens) - 1], device=tokens.device))
    step = Step(states[-1:], tokens[-1:], [tokens.tolist()], context=context)
    proposers = {shape: shape.proposer(speculator) for shape in shapes(speculator.n_predict)}
    costs = forward_seconds(base_model, range(1, 2 + max(proposer.nodes for proposer in proposers.values())))
    drafts = {shape: partial(proposer.propose, step) for shape, proposer in proposers.items() if not uneven(shape)}
    drafting = median_seconds(drafts, base_model.device, REPEATS, left_out=1)
    rows = [expected(shape, proposer, texts, costs, drafting) for shape, proposer in proposers.items()]
    return sorted(rows, key=lambda row: -row["speedup"])[:SHOWN]


def uneven(shape):
    """Whether a shape's chains differ in length."""
    return shape.min_probability or shape.lookup


def expected(shape, proposer, texts, costs, drafting):
    """A row of `suggest`: costs {tokens: seconds of a forward}, drafting {shape: seconds} of those that aren't `uneven`."""
    drafted, copied, counts = [], [], []
    for text in texts:
        steps = steps_in_text(proposer, *text)
        drafted += [candidates for _, candidates in steps]
        counts += [accepted for accepted, _ in steps]
        copied += looked_up(proposer, steps, *text) if shape.lookup else [False] * len(steps)
    acceptance = pooled_acceptance(counts, proposer.lookahead)
    chains = [DraftShape(lookahead=count) if uneven(shape) else shape for count in drafted]
    seconds = {
        "drafting_ms": sum(drafting[chain] for chain, found in zip(chains, copied) if not found),
        "verifying_ms": sum(costs[1 + count] for count in drafted),
    }
    heads = proposer.heads if shape.lookup else proposer
    return {
        "lookahead": heads.lookahead, "nodes": shape.nodes, "min_probability": shape.min_probability, "lookup": shape.lookup,
        "candidates": sum(drafted) / len(counts), "acceptance_length": acceptance.length,
        **{part: 1000 * spent / len(counts) for part, spent in seconds.items()}, "plain_ms": 1000 * costs[1],
        "speedup": acceptance.length * len(counts) * costs[1] / sum(seconds.values()),
    }  # fmt: skip


def looked_up(proposer, steps, states, tokens, prompt_length, new_tokens):
    """Of each of a text's steps by a `LookupFirst`, whether its candidates were looked up: the heads weren't run then."""
    line, end = tokens.numpy(force=True), prompt_length + 1
    for accepted, _ in steps:
        yield bool(proposer.lookup.look_up(line[:end]))
        end += accepted + 1


def chain_acceptance(speculator, texts, lookahead=None):
    """What the speculator's chain earns, the way other engines serve it, over texts as for `suggest`, as JSON values; the whole chain by
    default."""
    proposer = DraftShape(lookahead).proposer(speculator)
    acceptance = pooled_acceptance([count for text in texts for count in accepted_in_text(proposer, *text)], proposer.lookahead)
    return {"chain_acceptance_length": acceptance.length, "chain_acceptance_per_position": acceptance.per_position}


def greedy_texts(base_model, samples, lookahead):
    """What `suggest` needs of `samples.Sample`s: plainly decoded texts with the base model's states, one after the other.

    Each goes on by `lookahead` tokens where the context has room: decoding judges its last step past the end of the text.
    """
    for sample in samples:
        if sample.kind == "plain" and sample.new_tokens > 1:
            tokens, more = sample.tokens, min(lookahead, base_model.context_length - len(sample.tokens))
            if more:
                (result,), _ = decode(base_model, [tokens], DecodingOptions(max_new_tokens=more, ignore_eos=True))
                tokens = torch.cat([tokens, torch.tensor(result.tokens)])
            states = base_model.hidden_states(tokens[None], torch.zeros(1, len(tokens), dtype=torch.int64))[0]
            yield states, tokens.to(base_model.device), sample.prompt_length, sample.new_tokens
