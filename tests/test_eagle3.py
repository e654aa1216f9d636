"""EAGLE-3: the published computation in the losses over packed rows and in what is proposed, and its published layout."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_eagle3, write_model
from safetensors.torch import load_file, save_file

from fms_spec import context as context_module
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.base_model import BaseModel
from fms_spec.context import of_text
from fms_spec.errors import UserError
from fms_spec.loading import load_for_decoding
from fms_spec.losses import LossWeights, head_losses
from fms_spec.proposers import Step, TopKProposer
from fms_spec.speculators.directory import describe, load_speculator, save_speculator
from fms_spec.speculators.eagle3 import Eagle3Speculator
from fms_spec.speculators.eagle3_layout import IDS
from fms_spec.speculators.interface import Corpus
from fms_spec.speculators.registry import settings_of

STEPS, WORDS = 3, 24
WEIGHTS = LossWeights(0.3, 0.7, 0.0, (1.0, 0.5, 0.25), 0.4)
VARIANTS = {"published": {}, "3.1": {"fc_norm": True, "norm_output": True}, "speculators": {"norm_before_residual": True}}


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
        self.embedding, self.names = embedding.double(), set(self.own)
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

    def last(self, g, tokens):
        """The layer's output at the last place of a sequence: states g [n, d] beside tokens [n]."""
        mine = lambda name: self.own[f"layers.0.{name}.weight"]  # noqa: E731
        normed = self.norm(g, "layers.0.hidden_norm")
        x = torch.cat([self.norm(self.embedding[tokens], "layers.0.input_layernorm"), normed], -1)
        query = self.turn((x @ mine("self_attn.q_proj").T).view(-1, self.heads, self.width))[-1]
        keys = self.turn((x @ mine("self_attn.k_proj").T).view(-1, self.groups, self.width))
        values = (x @ mine("self_attn.v_proj").T).view(-1, self.groups, self.width)
        read = []
        for head in range(self.heads):
            group = head // (self.heads // self.groups)
            read.append((keys[:, group] @ query[head] / self.width**0.5).softmax(0) @ values[:, group])
        residual = (normed if self.normed_residual else g)[-1] + mine("self_attn.o_proj") @ torch.cat(read)
        y = self.norm(residual, "layers.0.post_attention_layernorm")
        gate = mine("mlp.gate_proj") @ y
        return residual + mine("mlp.down_proj") @ (gate * torch.sigmoid(gate) * (mine("mlp.up_proj") @ y))

    def drafts(self, states, tokens, drafted):
        """Logits of each step after a text's states [n, 2 d] and the n tokens that follow each, then after each of `drafted`."""
        g, seen = self.first(states), tokens
        for token in [*drafted, tokens[0]]:  # whatever comes after the last step
            x = self.last(g, seen)
            normed = self.norm(x, "norm")
            yield normed @ self.own["lm_head.weight"].T
            g, seen = torch.cat([g, (normed if self.normed_output else x)[None]]), torch.cat([seen, token[None]])


def windows_of(rows):
    tokens, segments, states = rows
    positions = choose_positions(usable_positions(segments, torch.zeros(len(tokens), dtype=torch.int64), STEPS))
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


def saved(place, model, **variant):
    torch.manual_seed(3)
    speculator = tiny_eagle3(model, STEPS, **variant)
    save_speculator(place, speculator, describe(speculator, model))
    return speculator


def rewrite(place, tensors=None, **values):
    """Change a directory's tensors (a function of them) and config.json's values, None taking one out; it is a published one then."""
    if tensors:
        save_file(tensors(load_file(place / "model.safetensors")), place / "model.safetensors")
    config = json.loads((place / "config.json").read_text()) | {"weights_sha256": None, "base_model_fingerprint": None} | values
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_directory_is_the_published_layout_and_is_read_back_under_either_name_of_the_layer(model, tmp_path, variant):
    speculator = saved(tmp_path, model, **VARIANTS[variant])
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    draft_ids = speculator.draft_ids
    assert torch.equal(torch.arange(len(draft_ids)) + tensors["d2t"], draft_ids) and tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool and torch.equal(tensors["t2d"].nonzero()[:, 0], draft_ids)
    assert {"fc.weight", "layers.0.hidden_norm.weight", "layers.0.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"} <= set(tensors)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config[IDS] == [0, 2] and config["eagle_config"][IDS] == [-1, 1]  # as vLLM and as SGLang count them
    embedding = {"embed_tokens.weight": model.embedding_weight.clone()}  # as many published ones have it
    rewrite(tmp_path, lambda tensors: {key.replace("layers.0.", "midlayer."): value for key, value in tensors.items()} | embedding)
    loaded = load_speculator(tmp_path, model)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in speculator.state_dict().items())


def test_a_directory_without_a_draft_vocabulary_has_the_base_models_and_without_layers_the_published_ones(tmp_path):
    model = BaseModel(str(write_model(tmp_path / "base", vocab_size=WORDS, num_hidden_layers=8)), dtype="float32", device="cpu")
    torch.manual_seed(3)
    config = tiny_eagle3(model).config
    speculator = Eagle3Speculator(config, torch.arange(WORDS), STEPS, (2, 4, 5))
    save_speculator(tmp_path / "heads", speculator, describe(speculator, model))
    rewrite(tmp_path / "heads", draft_vocab_size=None, eagle_config=None, n_predict=None, **{IDS: None})
    assert not {"d2t", "t2d"} & set(load_file(tmp_path / "heads/model.safetensors"))
    loaded = load_speculator(tmp_path / "heads", model)
    assert loaded.base_layers == (2, 4, 5) and torch.equal(loaded.draft_ids, torch.arange(WORDS))
    rewrite(tmp_path / "heads", eagle_config={IDS: [0, 1, 7]})
    assert load_speculator(tmp_path / "heads", model).base_layers == (1, 2, 8)


WRONG = {
    "another width": ({"hidden_size": 64}, None, "fits a base model of width 64 and vocabulary 24, .* has 32 and 24"),
    "another fingerprint": ({"base_model_fingerprint": "0" * 32}, None, "was trained for .*fingerprint 000"),
    "layers that don't exist": ({IDS: [0, 3]}, None, "reads a base model of 3 layers or more, .* has 2; use"),
    "layers that don't exist, as SGLang counts": ({IDS: None, "eagle_config": {IDS: [0, 2]}}, None, "reads a base model of 3 layers"),
    "layers out of order": ({IDS: [2, 0]}, None, "layer_ids is .*ascending order"),
    "the states alone": ({"eagle_config": {"use_aux_hidden_state": False}}, None, "eagle_config.use_aux_hidden_state is False"),
    "a draft vocabulary over the base's": ({"draft_vocab_size": 25}, None, "draft_vocab_size is 25: Input is over vocab_size, 24"),
    "two layers": ({"num_hidden_layers": 2}, None, "num_hidden_layers is 2"),
    "a base model": ({"architectures": ["LlamaForCausalLM"]}, None, "architectures.0 is 'LlamaForCausalLM'"),
    "no number of heads": ({"num_attention_heads": None}, None, "lacks num_attention_heads"),
    "heads that don't divide": ({"num_key_value_heads": 3}, None, "num_key_value_heads is 3: Input is no divisor of .*, 4"),
    "a width of its own": ({"target_hidden_size": 64}, None, "target_hidden_size is 64: Input is another width than hidden_size, 32"),
    "positions that hang on the length": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, None, "rope_scaling is .*llama3"),
    "quantised": ({"quantization_config": {"bits": 4}}, None, "quantization_config is"),
    "no fc": ({}, lambda all: all.pop("fc.weight"), r"tensor fc.weight: the file says missing, the config \[32, 64\]"),
    "no d2t": ({}, lambda all: all.pop("d2t"), r"tensor d2t: the file says missing, the config \[12\]"),
    "d2t out of the vocabulary": ({}, lambda all: all["d2t"].add_(13), "tensor d2t: no ascending tokens of a vocabulary of 24"),
    "d2t of ids": ({}, lambda all: all["d2t"].mul_(-1), "tensor d2t: no ascending tokens"),
    "d2t of fractions": ({}, lambda all: all.update(d2t=all["d2t"].float()), "tensor d2t is torch.float32"),
    "t2d of others": ({}, lambda all: all["t2d"].logical_not_(), "tensor t2d: it names other tokens than d2t"),
    "another lm_head": ({}, lambda all: all.update({"lm_head.weight": torch.zeros(11, 32)}), r"lm_head.weight: the file says \[11, 32\]"),
    "a tensor too many": ({}, lambda all: all.update(more=torch.zeros(1)), r"tensor more: the file says \[1\], the config not expected"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_directory_that_is_not_computed_here_is_refused_in_one_line_before_the_base_model_is_loaded(model, tmp_path, monkeypatch, wrong):
    values, change, message = WRONG[wrong]
    saved(tmp_path, model)

    def changed(tensors):
        change(tensors)
        return tensors

    rewrite(tmp_path, change and changed, **values)
    monkeypatch.setattr("fms_spec.loading.BaseModel", None)
    with pytest.raises(UserError, match=message) as error:
        load_for_decoding(model.name, tmp_path)
    assert "\n" not in str(error.value)


def test_an_embedding_of_its_own_is_refused(model, tmp_path):
    saved(tmp_path, model)
    rewrite(tmp_path, lambda tensors: tensors | {"embed_tokens.weight": model.embedding_weight + 1})
    with pytest.raises(UserError, match="embed_tokens.weight: it is not the base model's"):
        load_speculator(tmp_path, model)


def built(model, **settings):
    settings = settings_of({"family": "eagle3", "base_layers": [0, 2], "draft_vocab_size": 12} | settings)
    return Eagle3Speculator.build(settings, model, Corpus(torch.arange(WORDS, 0, -1), None))


def test_heads_start_from_the_base_models_lm_head_and_if_asked_from_its_last_layer(model):
    speculator, theirs = built(model, init="last_layer"), load_file(f"{model.path}/model.safetensors")
    own = speculator.state_dict()
    assert torch.equal(own["lm_head.weight"], theirs["lm_head.weight"][speculator.draft_ids])
    for name in ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"):
        assert torch.equal(own[f"layers.0.{name}.weight"], theirs[f"model.layers.1.{name}.weight"])
    assert torch.equal(own["layers.0.self_attn.k_proj.weight"][:, 32:], theirs["model.layers.1.self_attn.k_proj.weight"])
    assert own["layers.0.self_attn.k_proj.weight"][:, :32].abs().max() < 0.02
    other = built(model).state_dict()
    assert not torch.equal(other["layers.0.mlp.down_proj.weight"], own["layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init": "last_layer", "inner_dim": 48}, r"last_layer: base model .* has no model.layers.1.mlp.gate_proj.weight of \[48, 32\]"),
        ({"base_layers": []}, "the published ones are none of a base model of 2 layers; give them"),
        ({"base_layers": [0, 3]}, "base_layers 3: the base model has 2 layers; give some of 0 to 2"),
        ({"draft_vocab_size": 25}, "draft_vocab_size 25 is over the base model's vocabulary, 24"),
        ({"kv_heads": 3}, "attention_heads 4 are no multiple of its kv_heads, 3"), ({"head_dim": 7}, "head_dim 7: .* even"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_base_model_are_refused_in_one_line(model, settings, message):
    with pytest.raises(UserError, match=message):
        built(model, **settings)
