"""EAGLE-3: the published computation, in the losses over packed rows and in what is proposed."""

from dataclasses import replace

import pytest
import torch
from conftest import prompts_of, tiny_eagle3, write_model

from fms_spec import context as context_module
from fms_spec import decoding
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.base_model import BaseModel
from fms_spec.context import of_text
from fms_spec.losses import LossWeights, head_losses
from fms_spec.options import DecodingOptions
from fms_spec.proposers import Step, TopKProposer

STEPS, WORDS = 3, 24
WEIGHTS = LossWeights(0.3, 0.7, 0.0, (1.0, 0.5, 0.25), 0.4)
VARIANTS = {
    "published": {}, "3.1": {"fc_norm": True, "norm_output": True}, "speculators": {"norm_before_residual": True},
    "three layers": {"layers": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = BaseModel(str(write_model(tmp_path_factory.mktemp("eagle3") / "model", vocab_size=WORDS)), dtype="float32", device="cpu")
    model.give_layers((0, 2))
    return model


@pytest.fixture(scope="module")
def rows(model):
    """Two packed rows: tokens, documents, states."""
    tokens = torch.randint(0, WORDS, (2, 20), generator=torch.Generator().manual_seed(1))
    segments = torch.zeros(2, 20, dtype=torch.int32)
    segments[0, 8:], segments[1, 15:] = 1, -1
    return tokens, segments, model.hidden_states(tokens, segments)


def heads_of(model, variant):
    torch.manual_seed(3)
    speculator = tiny_eagle3(model, STEPS, **VARIANTS[variant])
    speculator.attach(model)
    return speculator


class Reference:
    """The published computation on one text in fp64, with nothing kept: each draft is the last of a whole sequence that is run anew."""

    def __init__(self, speculator, embedding):
        self.own = {name: value.detach().double().requires_grad_() for name, value in speculator.named_parameters()}
        self.heads, self.groups, self.width, self.theta, self.eps = 4, 2, 8, 100.0, 1e-5
        self.embedding, self.names, self.layers = embedding.double(), set(self.own), len(speculator.layers)
        self.normed_residual, self.normed_output = speculator.norm_before_residual, speculator.norm_output

    def norm(self, x, name):
        return self.own[name + ".weight"] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)

    def turn(self, x):
        """Pairs (j, j + 4) of heads [n, heads, 8] turned by place * theta^(-j / 4), as complex numbers."""
        half = self.width // 2
        angles = torch.arange(len(x))[:, None, None] * self.theta ** (-torch.arange(half).double() / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag], -1)

    def first(self, states):
        """g_0 of the inner layers' states [n, 2 d]."""
        if "fc_norm.0.weight" in self.names:
            low, high = states.chunk(2, -1)
            states = torch.cat([self.norm(low, "fc_norm.0"), self.norm(high, "fc_norm.1")], -1)
        return states @ self.own["fc.weight"].T

    def layer(self, number, x, residual):
        """A layer's output [n, d] at every place of a sequence: its attention reads x [n, inputs] and is added to residual [n, d]."""
        mine = lambda name: self.own[f"layers.{number}.{name}.weight"]  # noqa: E731
        query = self.turn((x @ mine("self_attn.q_proj").T).view(-1, self.heads, self.width))
        keys = self.turn((x @ mine("self_attn.k_proj").T).view(-1, self.groups, self.width))
        values = (x @ mine("self_attn.v_proj").T).view(-1, self.groups, self.width)
        read, later = [], torch.ones(len(x), len(x)).triu(1).bool()
        for head in range(self.heads):
            group = head // (self.heads // self.groups)
            scores = (query[:, head] @ keys[:, group].T / self.width**0.5).masked_fill(later, -torch.inf)
            read.append(scores.softmax(-1) @ values[:, group])
        residual = residual + torch.cat(read, -1) @ mine("self_attn.o_proj").T
        y = self.norm(residual, f"layers.{number}.post_attention_layernorm")
        gate = y @ mine("mlp.gate_proj").T
        return residual + (gate * torch.sigmoid(gate) * (y @ mine("mlp.up_proj").T)) @ mine("mlp.down_proj").T

    def last(self, g, tokens):
        """The layers' output at the last place of a sequence: states g [n, d] beside tokens [n]."""
        normed = self.norm(g, "layers.0.hidden_norm")
        x = torch.cat([self.norm(self.embedding[tokens], "layers.0.input_layernorm"), normed], -1)
        x = self.layer(0, x, normed if self.normed_residual else g)
        for number in range(1, self.layers):
            x = self.layer(number, self.norm(x, f"layers.{number}.input_layernorm"), x)
        return x[-1]

    def drafts(self, states, tokens, drafted):
        """Logits of each step after a text's states [n, 2 d] and the n tokens that follow each, then after each of `drafted`."""
        g, seen = self.first(states), tokens
        for token in [*drafted, tokens[0]]:  # whatever comes after the last step
            x = self.last(g, seen)
            normed = self.norm(x, "norm")
            yield normed @ self.own["lm_head.weight"].T
            g, seen = torch.cat([g, (normed if self.normed_output else x)[None]]), torch.cat([seen, token[None]])


def windows_of(rows, first=0):
    """Of all positions from number `first` of each row on."""
    tokens, segments, states = rows
    positions = choose_positions(usable_positions(segments, torch.full((len(tokens),), first), STEPS))
    return make_windows(states, tokens, positions, STEPS, segments)


def expected_logits(reference, windows, rows):
    """Yields (position's number, step, logits fp64 [r])."""
    tokens, segments, states = (part.flatten(0, 1) for part in rows)
    documents = segments + 100 * (torch.arange(len(tokens)) // rows[0].shape[1])
    for m, t in enumerate(windows.index.tolist()):
        begin = int((documents == documents[t]).nonzero()[0])
        depth = sum(m < count for count in windows.counts)
        text = slice(begin, t + 1)
        following = windows.tokens[m, 1:depth]
        inner = states[text, -2 * states.shape[-1] // 3 :].double()
        yield from ((m, step, logits) for step, logits in enumerate(reference.drafts(inner, tokens[begin + 1 : t + 2], following)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_the_published_formulas_in_double(model, rows, variant, monkeypatch):
    monkeypatch.setattr(context_module, "ATTENDED", 8)
    speculator, windows = heads_of(model, variant), windows_of(rows)
    counts = torch.tensor(windows.counts, dtype=torch.float32)
    total, _ = head_losses(speculator, windows, model, WEIGHTS, counts)
    total.backward()
    reference, expected = Reference(speculator, model.embedding_weight), 0.0
    teacher = model.output_weight[speculator.draft_ids].double()
    final = windows.states[:, : model.width].double()
    entry = {token: place for place, token in enumerate(speculator.draft_ids.tolist())}
    for m, step, logits in expected_logits(reference, windows, rows):
        log_q, p = logits.log_softmax(-1), (teacher @ final[windows.index[m] + 1 + step]).softmax(-1)
        loss = WEIGHTS.distillation * (p * (p.log() - log_q)).sum() - WEIGHTS.acceptance * torch.minimum(p, log_q.exp()).sum().log()
        if (target := int(windows.tokens[m, step + 1])) in entry:
            loss = loss - WEIGHTS.cross_entropy * log_q[entry[target]]
        expected = expected + WEIGHTS.heads[step] / counts[step] * loss
    expected.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    for name, value in speculator.named_parameters():
        difference = (value.grad - reference.own[name].grad).norm()
        assert difference <= 1e-4 * reference.own[name].grad.norm() and value.grad.any(), name


def test_a_later_step_without_positions_trains_nothing_and_costs_nothing(model, rows):
    speculator, windows = heads_of(model, "published"), windows_of(rows)
    windows = replace(windows, counts=[*windows.counts[:2], 0])
    found = head_losses(speculator, windows, model, WEIGHTS, torch.tensor(windows.counts, dtype=torch.float32))[1]
    assert found[2] == 0 and found[:2].all()


def test_a_micro_batch_without_positions_gives_every_weight_a_gradient_of_zero_which_processes_add_up(model, rows):
    speculator, windows = heads_of(model, "published"), windows_of(rows, first=20)
    assert windows.counts == [0] * STEPS
    head_losses(speculator, windows, model, WEIGHTS, torch.ones(STEPS))[0].backward()
    assert all(value.grad is not None and not value.grad.any() for value in speculator.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chain_is_what_the_published_formulas_find_likeliest(model, rows, variant):
    speculator = heads_of(model, variant)
    reference, text, states = Reference(speculator, model.embedding_weight), rows[0][0, :8], rows[2][0, :8]
    roots = torch.arange(1, 8)
    context = of_text(speculator, states, text, roots)
    chains = TopKProposer(speculator, [1] * STEPS).propose(Step(states[roots - 1], text[roots], [], context=context)).tokens
    for root, chain in zip(roots.tolist(), chains):
        logits = reference.drafts(states[:root, model.width :].double(), text[1 : root + 1], chain[:-1])
        assert [int(speculator.draft_ids[step.argmax()]) for step in logits] == chain.tolist()


@pytest.mark.parametrize("variant", ["published", "three layers"])
def test_what_is_kept_while_texts_grow_is_what_each_gives_when_it_is_read_at_once(model, variant, monkeypatch):
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 4)
    speculator, steps = heads_of(model, variant), []

    class Watching(TopKProposer):
        def propose(self, step):
            steps.extend((text[:], kept[:end]) for text, kept, end in zip(step.texts, step.context.kept.clone(), step.context.end.tolist()))
            return super().propose(step)

    prompts = prompts_of(3, 11, 6, words=WORDS)
    list(decoding.stream(model, prompts, DecodingOptions(max_new_tokens=16, ignore_eos=True), Watching(speculator, [2, 1])))
    for text, kept in steps:
        tokens = torch.tensor(text)
        states = model.hidden_states(tokens[None], torch.zeros(1, len(text), dtype=torch.int64))[0]
        whole = of_text(speculator, states, tokens, torch.tensor([len(text) - 1]))
        torch.testing.assert_close(kept, whole.kept[0], rtol=1e-4, atol=1e-4)
    assert len(steps) > 20
