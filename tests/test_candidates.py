"""Candidate trees, the proposers that make them, and exactly how far known candidates are accepted."""

import math
import random
from itertools import product

import pytest
import torch
from conftest import ATTENDING, FAMILIES, Planted, prompts_of, tiny_speculator
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fms_spec.acceptance import pooled_acceptance
from fms_spec.candidates import Candidates, Tree
from fms_spec.context import Context
from fms_spec.decoding import decode
from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError
from fms_spec.lookup import PromptLookup
from fms_spec.options import DecodingOptions
from fms_spec.proposers import BestNodesProposer, Step, TopKProposer
from fms_spec.sampling import Sampling

EXAMPLES = {"deadline": None, "derandomize": True, "database": None}


@st.composite
def trees(draw, most=12):
    """Parents of a few random trees of equally many nodes."""
    nodes = draw(st.integers(0, most))
    tree = st.tuples(st.just(0), *(st.integers(0, node - 1) for node in range(1, nodes + 1)))
    return [list(parents) for parents in draw(st.lists(tree, min_size=1, max_size=4))]


def ways(parents):
    """Nodes on the way from the root to each node, both included."""
    found = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        found.append([*found[parent], node])
    return found


@settings(max_examples=200, **EXAMPLES)
@given(batch=trees(most=20))
def test_a_node_sees_itself_and_its_ancestors_and_nothing_else(batch):
    tree = Tree(torch.tensor(batch))
    for row, parents in enumerate(batch):
        expected = [[other in way for other in range(len(parents))] for way in ways(parents)]
        assert tree.ancestors[row].tolist() == expected
        assert tree.depths[row].tolist() == [len(way) - 1 for way in ways(parents)]
    assert tree.nodes == len(batch[0])


@settings(max_examples=50, **EXAMPLES)
@given(widths=st.lists(st.integers(1, 4), max_size=4))
def test_a_full_tree_has_every_path_of_its_widths_level_by_level(widths):
    tree = Tree.full(widths)
    places = {0: ()}
    children = [[child for child in line if child] for line in tree.children.tolist()]
    for node in range(tree.nodes):  # parents stand before their children
        places |= {child: (*places[node], place) for place, child in enumerate(children[node])}
    levels = [list(product(*map(range, widths[:level]))) for level in range(len(widths) + 1)]
    assert [places[node] for node in range(tree.nodes)] == [path for level in levels for path in level]
    assert tree.parents.shape[0] == 1 and tree.depth == len(widths)


def seen_by(speculator, rows):
    """A random `Context` of so many sequences, each with a text of its own, for heads that keep one; else None."""
    if not speculator.context_width:
        return None
    kept, ends = torch.randn(rows, 9, speculator.context_width), torch.arange(rows) + 4
    return Context(kept, torch.zeros(rows, 9, dtype=torch.int64), ends, torch.zeros(rows, dtype=torch.int64))


def of_row(context, row):
    return context and Context(*(part[row : row + 1] for part in vars(context).values()))


def every_node(speculator, hidden, token, levels, context):
    """{path of tokens: joint log-probability} over the full tree of a draft vocabulary, one node after the other."""
    scores, draft_ids = {}, speculator.draft_ids if speculator.draft_ids is not None else torch.arange(speculator.vocab_size)

    def visit(path, state, token, score, head):
        state = speculator.advance(state, torch.tensor([token]), head, context)
        for child, more in zip(draft_ids.tolist(), F.linear(*speculator.output(state, head))[0].double().log_softmax(-1).tolist()):
            scores[*path, child] = score + more
            if head + 1 < levels:
                visit((*path, child), state, child, score + more, head + 1)

    visit((), speculator.start(hidden), token, 0.0, 0)
    return scores


def paths_of(candidates, row):
    """Tokens from the root to each candidate."""
    parents, tokens = candidates.tree.parents.expand(len(candidates.tokens), -1)[row].tolist(), candidates.tokens[row].tolist()
    assert parents[0] == 0 and all(parent < node for node, parent in enumerate(parents[1:], start=1)), "a parent behind its child"
    return [tuple(tokens[node - 1] for node in way[1:]) for way in ways(parents)[1:]]


@settings(max_examples=60, **EXAMPLES)
@given(
    seed=st.integers(0, 100_000), family=st.sampled_from([*FAMILIES, ATTENDING]), levels=st.integers(1, 3), extra=st.integers(0, 20),
    sharp=st.booleans(),
)  # fmt: skip
def test_the_best_nodes_are_the_likeliest_of_all_and_make_a_tree(tiny_models, seed, family, levels, extra, sharp):
    model = tiny_models.get(0, seed=seed)
    speculator = tiny_speculator(model, family, seed)
    with torch.inference_mode():
        hidden, tokens = torch.randn(2, model.state_width) * (3 if sharp else 1), torch.tensor([seed % 8, 5])
        nodes, context = levels + extra, seen_by(speculator, 2)
        candidates = BestNodesProposer(speculator, nodes, levels).propose(Step(hidden, tokens, None, context=context))
        for row in range(2):
            scores = every_node(speculator, hidden[row : row + 1], int(tokens[row]), levels, of_row(context, row))
            order = sorted(scores, key=scores.get, reverse=True)
            assume(nodes >= len(order) or scores[order[nodes - 1]] - scores[order[nodes]] > 1e-4)
            found = paths_of(candidates, row)
            assert len(set(found)) == len(found), "siblings must differ"
            assert set(found) == set(order[:nodes])


def test_top_k_proposals_are_the_best_children_of_each_node_and_fill_the_tree(tiny_models):
    for seed, family in product(range(3), [*FAMILIES, ATTENDING]):
        model = tiny_models.get(2, seed=seed)
        speculator = tiny_speculator(model, family, seed)
        hidden, tokens, context = torch.randn(3, model.state_width), torch.tensor([1, 2, 3]), seen_by(speculator, 3)
        for widths in ([1, 1, 1], [3, 2], [2, 1, 3], [4]):
            with torch.inference_mode():
                candidates = TopKProposer(speculator, widths).propose(Step(hidden, tokens, None, context=context))
                assert candidates.draft_probs is None and candidates.tree.parents.tolist() == Tree.full(widths).parents.tolist()
                for row in range(3):
                    scores = every_node(speculator, hidden[row : row + 1], int(tokens[row]), len(widths), of_row(context, row))
                    expected = [()]
                    for level, width in enumerate(widths):
                        families = [[path for path in scores if path[:-1] == parent] for parent in expected if len(parent) == level]
                        expected += [path for family in families for path in sorted(family, key=scores.get, reverse=True)[:width]]
                    assert paths_of(candidates, row) == expected[1:]


@settings(max_examples=40, **EXAMPLES)
@given(seed=st.integers(0, 100_000), family=st.sampled_from([*FAMILIES, ATTENDING]), least=st.sampled_from([0.01, 0.1, 0.3, 0.99]))
def test_a_chain_ends_after_its_first_candidate_with_less_than_the_least_probability_each_sequence_by_itself(
    tiny_models, seed, family, least
):
    model, levels = tiny_models.get(0, seed=seed), 3
    speculator = tiny_speculator(model, family, seed, n_predict=levels)
    with torch.inference_mode():
        step = Step(3 * torch.randn(4, model.state_width), torch.arange(4), None, context=seen_by(speculator, 4))
        whole, ending = (DraftShape(min_probability=p).proposer(speculator).propose(step).tokens.tolist() for p in (0.0, least))
        depths = []
        for row, (line, found) in enumerate(zip(whole, ending)):
            scores = every_node(speculator, step.hidden[row : row + 1], row, levels, of_row(step.context, row))
            joint = [math.exp(scores[tuple(line[:depth])]) for depth in range(1, levels + 1)]
            assume(all(abs(value / least - 1) > 1e-3 for value in joint))
            depths.append(next((depth for depth, value in enumerate(joint, start=1) if value < least), levels))
            assert found == [*line[: depths[-1]], *[-1] * (len(found) - depths[-1])]
    assert len(ending[0]) == max(depths)


def test_drawn_children_differ_come_from_the_heads_distribution_and_are_missing_where_it_holds_no_more(tiny_models):
    model = tiny_models.get(0, seed=1)
    speculator, sampling = tiny_speculator(model, "hidden_state", 1), Sampling(temperature=1.0, top_k=2)
    hidden, tokens, proposer = torch.randn(200, model.width), torch.arange(200) % 8, TopKProposer(speculator, [3, 2])
    with torch.inference_mode():
        candidates = proposer.propose(Step(hidden, tokens, None, sampling, torch.rand(200, proposer.nodes, dtype=torch.float64)))
    drafted, drafts = candidates.tokens[:, :3], candidates.draft_probs
    assert drafts.shape == (200, 4, 8) and torch.allclose(drafts.sum(-1), torch.ones(200, 4)) and (drafts > 0).sum(-1).max() == 2
    assert (drafted[:, 2] == -1).all() and (drafted[:, :2] >= 0).all() and (drafted[:, 0] != drafted[:, 1]).all()
    assert (drafts[:, 0].gather(1, drafted[:, :2]) > 0).all()
    for child in (0, 1):
        pair = candidates.tokens[:, 3 + 2 * child : 5 + 2 * child]
        assert (drafts[:, 1 + child].gather(1, pair) > 0).all() and (pair[:, 0] != pair[:, 1]).all()


def test_prompt_lookup_proposes_what_followed_the_latest_earlier_place_with_the_longest_match():
    def propose(*texts, lookahead=3):
        found = PromptLookup(lookahead).propose(Step(None, torch.tensor([text[-1] for text in texts]), list(texts)))
        assert found is None or found.tree.depths.tolist() == [list(range(found.tree.nodes))]
        return found and found.tokens.tolist()

    assert propose([1, 2, 3, 9, 8, 7, 1, 2, 3]) == [[9, 8, 7]]
    assert propose([1, 2, 5, 1, 2, 6, 3, 3, 1, 2]) == [[6, 3, 3]]  # the latest place
    assert propose([4, 1, 2, 5, 9, 2, 6, 6, 6, 4, 1, 2]) == [[5, 9, 2]]  # three equal tokens before the later place with one
    assert propose([7, 7, 7]) == [[7]] and propose([1, 2, 3, 4, 1], lookahead=2) == [[2, 3]]
    assert propose([5, 6, 5, 8], [1, 2, 3, 4]) is None and propose([5]) is None
    assert propose([5, 1, 5], [1, 2, 3], [1, 2, 3, 4, 1]) == [[1, 5, -1], [-1, -1, -1], [2, 3, 4]]


def test_impossible_shapes_of_trees_are_refused(tiny_models):
    refused = [
        (DraftShape(lookahead=0), "lookahead 0.* 1 to 2"),
        (DraftShape(lookahead=3), "lookahead 3.* 1 to 2"),
        (DraftShape(top_k_per_head=()), "lookahead 0.* 1 to 2"),
        (DraftShape(top_k_per_head=(1, 1, 1)), "lookahead 3.* 1 to 2"),
        (DraftShape(top_k_per_head=(2, 0)), "2,0: .*at least 1"),
        (DraftShape(nodes=1025), "a tree of 1,025 candidates: at most 1,024"),
        (DraftShape(top_k_per_head=(10**6, 10**6)), "a tree of 1,000,001,000,000 candidates"),
        (DraftShape(nodes=5, lookahead=3), "lookahead 3.* 1 to 2"),
        (DraftShape(nodes=5, lookahead=0), "lookahead 0.* 1 to 2"),
        (DraftShape(nodes=1), "nodes 1: .*lookahead, 2"),
        (DraftShape(nodes=0), "nodes 0: .*lookahead, 2"),
        (DraftShape(nodes=5, top_k_per_head=(2,)), "without lookahead and nodes"),
        (DraftShape(lookahead=1, top_k_per_head=(2,)), "without lookahead and nodes"),
        (DraftShape(min_probability=1.0), "min_probability 1.0: .*under 1"),
        (DraftShape(min_probability=-0.1), "min_probability -0.1: .*at least 0"),
        (DraftShape(min_probability=0.1, nodes=3), "min_probability 0.1 .*without top_k_per_head and nodes"),
        (DraftShape(lookup=4, top_k_per_head=(2,)), "lookup 4 .*without top_k_per_head and nodes"),
        (DraftShape(lookup=-1), "lookup -1: .*0 .off. to 1,024"),
    ]
    for shape, message in refused:
        with pytest.raises(UserError, match=message):
            shape.check(2)
    with pytest.raises(UserError, match="9,1: .*know 8 tokens"):
        DraftShape(top_k_per_head=(9, 1)).proposer(tiny_speculator(tiny_models.get(0), "mlp_tied"))
    for lookahead in (0, -1):
        with pytest.raises(UserError, match=f"lookahead {lookahead}: .*at least 1"):
            PromptLookup(lookahead)


def test_a_shape_that_is_left_out_is_a_chain_as_deep_as_the_speculator_was_trained_for(base_model):
    speculator = tiny_speculator(base_model, "mlp_tied", n_predict=3)
    for shape, widths in ((DraftShape(), [1, 1, 1]), (DraftShape(lookahead=2), [1, 1]), (DraftShape(top_k_per_head=(4, 2)), [4, 2])):
        proposer = shape.proposer(speculator)
        assert isinstance(proposer, TopKProposer) and proposer.widths == widths and proposer.lookahead == len(widths)
        assert proposer.nodes == Tree.full(widths).nodes - 1
    proposer = DraftShape(nodes=9).proposer(speculator)
    assert isinstance(proposer, BestNodesProposer) and (proposer.nodes, proposer.lookahead) == (9, 3)


def test_a_proposer_sees_the_state_that_chose_each_newest_token_and_the_text_up_to_it(base_model):
    prompts, seen = prompts_of(5, 12, 3), []
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        plain, _ = decode(base_model, prompts, DecodingOptions(max_new_tokens=30, ignore_eos=True, sampling=sampling))
        texts = [prompt.tolist() + result.tokens for prompt, result in zip(prompts, plain)]

        class Watching(Planted):
            def propose(self, step):
                assert step.tokens.tolist() == [text[-1] for text in step.texts]
                for text, state in zip(step.texts, step.hidden):
                    before = torch.tensor([text[:-1]])
                    torch.testing.assert_close(
                        state, base_model.hidden_states(before, torch.zeros_like(before))[0, -1], rtol=1e-4, atol=1e-4
                    )
                seen.append((len(step.texts), step.sampling.temperature, step.chance is not None and step.chance.tolist()))
                return super().propose(step)

        proposer = Watching(texts, base_model.vocab_size, 4, lambda index, step: (3, 0, 4, 1)[(index + step) % 4], branches=3)
        decode(base_model, prompts, DecodingOptions(max_new_tokens=20, ignore_eos=True, sampling=sampling), proposer)
    assert {rows for rows, *_ in seen} >= {2, 3} and all(bool(numbers) == (temperature > 0) for _, temperature, numbers in seen)
    numbers = [number for *_, lines in seen if lines for line in lines for number in line]
    assert len(numbers) == len(set(numbers)) and len(numbers) % 12 == 0  # every candidate's own, never used twice


# How many tokens are right, by prompt and step; and of how many candidates one branch at a random place is the right one.
NEVER = lambda index, step: 0  # noqa: E731
ALWAYS = lambda index, step: 99  # noqa: E731
SOMETIMES = lambda index, step: (3, 0, 1, 2, 0)[(step + 2 * index) % 5]  # noqa: E731
SHAPES_TRIED = pytest.mark.parametrize("lookahead, branches", list(product((2, 3, 4), (1, 3, 5))))
MOST = 25


def check_planted(base_model, right, lookahead, branches):
    """Decode two prompts of unequal length, greedily and sampling: the plain text in exactly the steps that the candidates earn."""
    prompts = prompts_of(5, 12)
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        plain, timing = decode(base_model, prompts, DecodingOptions(max_new_tokens=MOST + 10, ignore_eos=True, sampling=sampling))
        assert timing.steps == MOST + 9
        texts = [prompt.tolist() + result.tokens for prompt, result in zip(prompts, plain)]
        proposer = Planted(texts, base_model.vocab_size, lookahead, right, branches, seed=lookahead * branches)
        fast, timing = decode(base_model, prompts, DecodingOptions(max_new_tokens=MOST, ignore_eos=True, sampling=sampling), proposer)
        expected = []
        for index in range(len(prompts)):
            accepted, said = [], 1  # the prompt's own forward says the first token
            while said < MOST:
                accepted.append(min(right(index, len(accepted)), lookahead))
                said += accepted[-1] + 1
            expected.append(accepted)
        assert [result.tokens for result in fast] == [result.tokens[:MOST] for result in plain]
        assert [result.accepted for result in fast] == expected
        assert timing.steps == max(len(accepted) for accepted in expected)
    return fast, timing


@SHAPES_TRIED
def test_candidates_that_are_never_right_cost_steps_and_change_nothing(base_model, lookahead, branches):
    fast, timing = check_planted(base_model, NEVER, lookahead, branches)
    assert timing.steps == MOST - 1 and pooled_acceptance(fast[0].accepted, lookahead).length == 1


@SHAPES_TRIED
def test_candidates_that_are_always_right_are_accepted_to_the_last(base_model, lookahead, branches):
    fast, timing = check_planted(base_model, ALWAYS, lookahead, branches)
    assert timing.steps == -(-(MOST - 1) // (lookahead + 1))
    assert pooled_acceptance(fast[0].accepted, lookahead).length == 1 + lookahead


@SHAPES_TRIED
def test_candidates_that_are_sometimes_right_are_accepted_exactly_as_far_as_they_are(base_model, lookahead, branches):
    check_planted(base_model, SOMETIMES, lookahead, branches)


def plant(parents, truth, chance):
    """(tokens of a tree's candidates, length of its right path): what is wrong is wrong at its first token, and right ever after."""
    right = [0]
    while (children := [node for node in range(1, len(parents)) if parents[node] == right[-1]]) and chance.random() < 0.7:
        right.append(chance.choice(children))
    line, taken = [], {node: [] for node in range(len(parents))}
    for node in range(1, len(parents)):
        wanted, others = truth[len(ways(parents)[node]) - 2], [token for token in range(8) if token != truth[len(ways(parents)[node]) - 2]]
        choices = [wanted] if node in right else others if parents[node] in right else [wanted, *others]
        line.append(next(token for token in choices if token not in taken[parents[node]]))
        taken[parents[node]].append(line[-1])
    return line, len(right) - 1


@pytest.mark.slow
@settings(max_examples=100, **EXAMPLES)
@given(shape=st.integers(0, 19), backend=st.sampled_from(["fms", "transformers"]), batch=trees(most=7), seed=st.integers(0, 100_000))
def test_a_right_path_through_any_tree_is_accepted_exactly_as_far_as_it_goes(tiny_models, shape, backend, batch, seed):
    assume(len(batch[0]) > 1)
    model, prompts = tiny_models.get(shape, backend, seed), prompts_of(*(3, 8, 5, 2)[: len(batch)], words=8, seed=seed)
    plain, _ = decode(model, prompts, DecodingOptions(max_new_tokens=30, ignore_eos=True))
    wholes = [prompt.tolist() + result.tokens for prompt, result in zip(prompts, plain)]
    expected, chance = [[] for _ in prompts], random.Random(seed)

    class AnotherTreeForEach:
        lookahead = nodes = len(batch[0]) - 1
        speculator = None

        def propose(self, step):
            indices = [next(i for i, whole in enumerate(wholes) if whole[: len(text)] == text) for text in step.texts]
            planted = [plant(batch[index], wholes[index][len(text) :], chance) for index, text in zip(indices, step.texts)]
            for index, (_, accepted) in zip(indices, planted):
                expected[index].append(accepted)
            return Candidates(torch.tensor([line for line, _ in planted]), Tree(torch.tensor([batch[index] for index in indices])))

    fast, _ = decode(model, prompts, DecodingOptions(max_new_tokens=16, ignore_eos=True), AnotherTreeForEach())
    assert [result.tokens for result in fast] == [result.tokens[:16] for result in plain]
    assert [result.accepted for result in fast] == expected
