"""One cache for all candidates: what it costs, what moves in it, and that nothing rejected is ever seen again."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import SHAPES, Planted, prompts_of, tiny_proposer, tiny_speculator, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fms_spec.base_model import BaseModel
from fms_spec.candidates import Tree
from fms_spec.decoding import decode
from fms_spec.kv_cache import KVCache
from fms_spec.options import DecodingOptions
from fms_spec.proposers import BestNodesProposer, TopKProposer
from fms_spec.sampling import Sampling

EXAMPLES = {"deadline": None, "derandomize": True, "database": None}
BACKENDS = ("fms", "transformers")


@pytest.fixture
def caches(base_model, monkeypatch):
    """Every cache that decoding makes on the base model."""
    made, original = [], base_model.new_cache
    monkeypatch.setattr(base_model, "new_cache", lambda *sizes: made.append(original(*sizes)) or made[-1])
    return made


def test_a_tree_costs_one_slot_for_each_of_its_nodes_however_it_branches(base_model, caches):
    prompts, options = prompts_of(5, 9), DecodingOptions(max_new_tokens=20, ignore_eos=True)
    speculator = tiny_speculator(base_model, "mlp_tied", n_predict=12)
    truth = [
        prompt.tolist() + result.tokens
        for prompt, result in zip(prompts, decode(base_model, prompts, replace(options, max_new_tokens=40))[0])
    ]
    nodes, slot = 12, len(prompts) * 2 * 2 * 2 * 8 * 4  # sequences, layers, keys and values, key-value heads, their width, bytes
    shapes = [[1] * 12, [12], [6, 1], [4, 2], [3, 3], [2, 5], [3, 1, 1, 1]]
    proposers = [TopKProposer(speculator, widths) for widths in shapes]
    proposers += [BestNodesProposer(speculator, nodes, levels) for levels in (1, 4, 12)]
    proposers += [Planted(truth, base_model.vocab_size, 12 // branches, lambda index, step: 2, branches) for branches in (1, 3, 6)]
    assert {proposer.nodes for proposer in proposers} == {nodes}
    caches.clear()
    for proposer in (None, *proposers):
        decode(base_model, prompts, options, proposer)
    plain, *others = [cache.store.untyped_storage().nbytes() for cache in caches]
    assert len(caches) == 1 + len(proposers) and plain == (9 + 20) * slot
    assert set(others) == {plain + nodes * slot}


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made anew, views of `known` tensors left out."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("held", [[40, 40], [20, 40], [1000, 1000], [700, 1000]])
def test_a_step_makes_nothing_as_large_as_one_layers_keys_and_expands_no_heads(tmp_path, backend, held):
    directory = write_model(tmp_path, hidden_size=128, num_attention_heads=4, max_position_embeddings=2048)
    model = BaseModel(str(directory), dtype="float32", backend=backend, device="cpu")
    cache, tree = model.new_cache(2, 1500), Tree.full([3, 1])
    with torch.inference_mode():
        model.extend(torch.ones(2, 1, dtype=torch.int64), cache)  # rotary tables are made at the first call
        cache.store.normal_()
        cache.hold(held)
        with Largest([cache.store, *model.model.parameters(), *model.model.buffers()]) as largest:
            model.extend(torch.ones(2, tree.nodes, dtype=torch.int64), cache, tree)
            cache.accept([[0, 3, 6], [0, 1]])
    seen_keys = 2 * (max(held) + tree.nodes) * 2 * 32 * 4  # sequences, slots, key-value heads, their width, bytes
    assert cache.store.nbytes == 2 * 2 * 2 * 1500 * 2 * 32 * 4
    assert 0 < largest.bytes < cache.store.nbytes / 10
    if max(held) > 100:  # not with short texts, where the states of the new tokens are as large
        assert largest.bytes < seen_keys / 2


@settings(max_examples=200, **EXAMPLES)
@given(data=st.data(), batch=st.integers(1, 4), nodes=st.integers(1, 9))
def test_accepting_moves_the_accepted_entries_and_leaves_every_other_slot_as_it_was(data, batch, nodes):
    cache = KVCache(2, batch, 30, 2, 3, torch.float32, torch.device("cpu"))
    cache.store.normal_(generator=torch.Generator().manual_seed(batch * nodes))
    counts = data.draw(st.lists(st.integers(0, 20), min_size=batch, max_size=batch))
    cache.hold(counts)
    paths = [[0, *sorted(data.draw(st.sets(st.integers(1, nodes))))] if data.draw(st.booleans()) else [] for _ in range(batch)]
    expected = cache.store.clone()
    for row, path in enumerate(paths):
        for to, come in enumerate(path):
            expected[:, :, row, counts[row] + to] = cache.store[:, :, row, counts[row] + come]
    place = cache.store.data_ptr()
    cache.accept(paths)
    assert torch.equal(cache.store, expected) and cache.store.data_ptr() == place
    assert cache.counts == cache.lengths.tolist() == [count + len(path) for count, path in zip(counts, paths)]


def random_trees(chance, batch, nodes, shared):
    """`Tree` of a few nodes, one for all or another for each sequence; and a path from the root of each."""
    parents = [[0, *(chance.randrange(node) for node in range(1, nodes))] for _ in range(1 if shared else batch)]
    paths = []
    for row in range(batch):
        node, path = chance.randrange(nodes), []
        while node:
            path, node = [node, *path], parents[0 if shared else row][node]
        paths.append([0, *path])
    return Tree(torch.tensor(parents)), paths


@settings(max_examples=80, **EXAMPLES)
@given(
    shape=st.integers(0, len(SHAPES) - 1), backend=st.sampled_from(BACKENDS), seed=st.integers(0, 100_000), shared=st.booleans(),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), nodes=st.integers(1, 9),
)  # fmt: skip
def test_what_is_cached_after_accepting_is_what_a_plain_forward_caches_and_garbage_behind_it_is_never_seen(
    tiny_models, shape, backend, seed, shared, lengths, nodes
):
    model, chance = tiny_models.get(shape, backend, seed), random.Random(seed)
    batch, texts = len(lengths), [prompt.tolist() for prompt in prompts_of(*lengths, words=8, seed=seed)]
    cache = model.new_cache(batch, 60)
    cache.store.fill_(1e4)
    model.extend(torch.tensor([text + [0] * (max(lengths) - len(text)) for text in texts]), cache)
    cache.hold(lengths)
    for _ in range(3):
        tree, paths = random_trees(chance, batch, nodes, shared)
        tokens = torch.randint(1, 8, (batch, nodes))
        states = model.extend(tokens, cache, tree)
        cache.accept(paths)
        for row, (text, path) in enumerate(zip(texts, paths)):
            text += tokens[row, path].tolist()
            alone = model.new_cache(1, 60)
            plain = model.extend(torch.tensor([text]), alone)[0]
            assert cache.counts[row] == len(text)
            torch.testing.assert_close(states[row, path], plain[-len(path) :], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(cache.store[:, :, row, : len(text)], alone.store[:, :, 0, : len(text)], rtol=1e-4, atol=1e-4)
            cache.store[:, :, row, len(text) :] = 1e4  # what was rejected might be anything


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[6, 6], [6, 11, 3]])
def test_rejected_entries_change_no_bit_of_what_comes_after(tiny_models, backend, lengths):
    model, tree = tiny_models.get(7, backend, seed=4), Tree.full([2, 2])
    outcomes = []
    for poison in (0.0, 1e4, -1e4):
        cache, generator = model.new_cache(len(lengths), 40), torch.Generator().manual_seed(0)
        cache.store.fill_(poison)
        model.extend(torch.randint(1, 8, (len(lengths), max(lengths)), generator=generator), cache)
        cache.hold(lengths)
        for paths in ([[0, 2, 5], [0], [0, 1]], [[0, 1, 4], [0, 2], [0]]):
            states = model.extend(torch.randint(1, 8, (len(lengths), tree.nodes), generator=generator), cache, tree)
            cache.accept(paths[: len(lengths)])
            for row, count in enumerate(cache.counts):
                cache.store[:, :, row, count:] = poison
        outcomes.append((states, [cache.store[:, :, row, :count] for row, count in enumerate(cache.counts)]))
    for states, kept in outcomes[1:]:
        assert torch.equal(states, outcomes[0][0])
        assert all(torch.equal(one, other) for one, other in zip(kept, outcomes[0][1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["tree", "best", "lookup"])
def test_decoding_never_reads_a_slot_that_is_not_held(tiny_models, monkeypatch, backend, kind):
    def poisoned(cache, counts, hold=KVCache.hold):
        hold(cache, counts)
        for row, count in enumerate(counts):
            cache.store[:, :, row, count:] = 1e4

    for seed in range(4):
        model, prompts = tiny_models.get(3 + seed, backend, seed), prompts_of(9, 2, 5, words=8, seed=seed)
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            proposer, options = tiny_proposer(model, kind, seed=seed, widths=(3, 2)), DecodingOptions(max_new_tokens=20, sampling=sampling)
            clean, _ = decode(model, prompts, options, proposer)
            with monkeypatch.context() as patch:
                patch.setattr(KVCache, "hold", poisoned)
                assert decode(model, prompts, options, proposer)[0] == clean


def test_sequences_that_leave_take_their_slots_with_them_and_the_others_stay_as_they_were():
    cache = KVCache(3, 5, 20, 2, 4, torch.float32, torch.device("cpu"))
    cache.store.normal_()
    cache.hold([3, 8, 1, 20, 0])
    before, place = cache.store.clone(), cache.store.data_ptr()
    with Largest([cache.store]) as largest:
        cache.keep_sequences([1, 3, 4])
    assert torch.equal(cache.store, before[:, :, [1, 3, 4]]) and cache.counts == cache.lengths.tolist() == [8, 20, 0]
    cache.keep_sequences([1])
    assert torch.equal(cache.store, before[:, :, [3]]) and cache.counts == [20] and cache.store.shape[3] == 20
    assert cache.store.data_ptr() == place and largest.bytes <= before[0].nbytes
