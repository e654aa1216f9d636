"""Which tree pays on this machine: measured costs of a step against the acceptance that each tree would have had.

Shapes: n candidates.
"""

from functools import partial
from itertools import islice

import torch

from data.progress import progress
from fms_spec.acceptance import accepted_in_text, judged, pooled_acceptance, said_at, steps_at, walked
from fms_spec.candidates import Tree
from fms_spec.context import of_text
from fms_spec.decoding import decode
from fms_spec.draft_shape import DraftShape
from fms_spec.lookup import LookupFirst, PromptLookup
from fms_spec.options import DecodingOptions
from fms_spec.proposers import BestNodesProposer, Step
from fms_spec.timing import timed
from pipelines.timer import in_turn, median_seconds, medians

NODES = (1, 2, 3, 4, 6, 8, 12, 16)  # candidates of the trees that are compared
PROBABILITIES = (0.0, 0.05, 0.1, 0.2, 0.3)  # that end chains which are compared
LOOKUPS = (0, 10)  # tokens that are looked up instead
REPEATS = 9
SHOWN = 8
TEXTS = 64  # that shapes are tried on: their states are kept in memory
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


def seconds_behind_forward(base_model, works, held=CONTEXT):
    """{name: seconds} of functions without arguments, each begun right behind a forward over a token on a cache of `held`, as drafting is
    in a step.

    A forward reads all weights and leaves none of the heads' in the caches: on two cores a draft took 3.3 ms behind one, and 1.6 behind
    other drafts.
    """
    forward, device = forward_at(base_model, min(held, base_model.context_length - 1), 1), base_model.device

    def seconds(work, _):
        timed(partial(forward, 1), device)  # waited for, as a step waits for what it accepts
        return timed(work, device)[1]

    return medians({name: taken[1:] for name, taken in in_turn(works, range(1 + REPEATS), seconds).items()})


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
        texts: iterable of (states [s, d], tokens int64 [s], prompt length, new tokens), greedy texts as for `acceptance.judged`, of which
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
    drafting = seconds_behind_forward(base_model, drafts)
    outcomes = [tried(speculator, text) for text in progress(texts, desc="trees compared", unit="text")]
    rows = [expected(shape, speculator, [outcome[shape] for outcome in outcomes], costs, drafting) for shape in proposers]
    return sorted(rows, key=lambda row: -row["speedup"])[:SHOWN]


def uneven(shape):
    """Whether a shape's chains differ in length."""
    return shape.min_probability or shape.lookup


def tried(speculator, text):
    """{shape: (accepted, candidates, whether they were looked up)} of all `shapes`, three lists over a text's positions: see `judged`.

    Shorter chains are parts of the longest, smaller trees of the largest: the heads are run over a text once for each end of chains, and
    once for all trees.
    """
    chains = {probability: judged(DraftShape(min_probability=probability).proposer(speculator), *text) for probability in PROBABILITIES}
    copies = judged(PromptLookup(max(LOOKUPS), LookupFirst.MATCH), *text)
    trees = trees_tried(BestNodesProposer(speculator, max(NODES), speculator.n_predict), *text)
    found = {}
    for shape in shapes(speculator.n_predict):
        if shape.nodes:
            steps = [(accepted, nodes, False) for accepted, nodes in zip(*trees[shape.lookahead, shape.nodes])]
        elif shape.lookup:
            ways = zip(zip(*copies), zip(*chains[shape.min_probability]))
            steps = [(*(copied if copied[1] else drafted), bool(copied[1])) for copied, drafted in ways]
        else:
            deepest = shape.lookahead or speculator.n_predict
            steps = [(min(one, deepest), min(count, deepest), False) for one, count in zip(*chains[shape.min_probability])]
        found[shape] = tuple(zip(*steps)) or ((), (), ())
    return found


def trees_tried(proposer, *text):
    """{(depth, nodes): (accepted, candidates)} of smaller trees than the proposer's, as `judged` would find each.

    The best n nodes up to a depth are the first n, by joint probability, of all that deep among which the best of a larger n are picked; a
    parent stands before its child, so that those of a path that count are the first of it.
    """
    found = {(depth, nodes): ([], []) for depth in range(1, proposer.lookahead + 1) for nodes in NODES}
    for roots, step in steps_at(proposer, *text):
        right = torch.ones(len(roots), 1, dtype=torch.bool, device=roots.device)  # [m, 1 + nodes so far], the root's first
        joint = torch.empty(len(roots), 0, device=roots.device)
        for depth, (level, tokens, parents) in enumerate(zip(*proposer.levels(step)), start=1):
            said = said_at(text[1], roots[:, None] + depth)
            right = torch.cat([right, right.gather(1, parents) & (tokens == said)], dim=1)
            joint = torch.cat([joint, level], dim=1)
            rank = joint.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            for nodes in NODES:
                accepted, candidates = found[depth, nodes]
                accepted += (right[:, 1:] & (rank < nodes)).sum(-1).tolist()
                candidates += [min(nodes, joint.shape[1])] * len(roots)
    return found


def expected(shape, speculator, outcomes, costs, drafting):
    """A row of `suggest`: outcomes as `tried` gives them of each text, costs {tokens: seconds of a forward}, drafting {shape: seconds} of
    those that aren't `uneven`."""
    steps = [(each[0][index], each[1][index], each[2][index]) for each in outcomes for index in walked(*each[:2])]
    counts, drafted, copied = zip(*steps) if steps else ((), (), ())
    lookahead = shape.lookahead or speculator.n_predict
    acceptance = pooled_acceptance(counts, max(lookahead, shape.lookup))
    chains = [DraftShape(lookahead=count) if uneven(shape) else shape for count in drafted]
    seconds = {
        "drafting_ms": sum(drafting[chain] for chain, found in zip(chains, copied) if not found),
        "verifying_ms": sum(costs[1 + count] for count in drafted),
    }
    return {
        "lookahead": lookahead, "nodes": shape.nodes, "min_probability": shape.min_probability, "lookup": shape.lookup,
        "candidates": sum(drafted) / len(counts), "acceptance_length": acceptance.length,
        **{part: 1000 * spent / len(counts) for part, spent in seconds.items()}, "plain_ms": 1000 * costs[1],
        "speedup": acceptance.length * len(counts) * costs[1] / sum(seconds.values()),
    }  # fmt: skip


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
