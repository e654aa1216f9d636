"""EAGLE-3's published layout and its settings: what is written, what is read, where heads start from, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import load_speculator, tiny_eagle3, write_model
from safetensors.torch import load_file, save_file
from test_eagle3 import STEPS, VARIANTS, WORDS

from fms_spec.base_model import BaseModel
from fms_spec.context import of_text
from fms_spec.errors import UserError
from fms_spec.loading import load_for_decoding
from fms_spec.proposers import Step, TopKProposer
from fms_spec.speculators.directory import describe, save_speculator
from fms_spec.speculators.eagle3 import Eagle3Speculator
from fms_spec.speculators.eagle3_layout import IDS
from fms_spec.speculators.interface import Corpus
from fms_spec.speculators.registry import settings_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return BaseModel(str(write_model(tmp_path_factory.mktemp("eagle3") / "model", vocab_size=WORDS)), dtype="float32", device="cpu")


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
    assert {"fc.weight", "midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"} <= set(tensors)
    for number in range(1, config["num_hidden_layers"]):  # the norm of what enters it, as vLLM and as SGLang name it
        assert torch.equal(*(tensors[f"layers.{number}.{name}.weight"] for name in ("input_layernorm", "hidden_norm")))
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config[IDS] == [0, 2] and config["eagle_config"][IDS] == [-1, 1]  # as vLLM and as SGLang count them
    embedding = {"embed_tokens.weight": model.embedding_weight.clone()}  # as many published ones have it
    for name in ("input_layernorm", "hidden_norm"):  # each engine's own trainers write one of them
        left = {key: value for key, value in tensors.items() if not (key.startswith("layers.") and key.endswith(f".{name}.weight"))}
        rewrite(tmp_path, lambda _, left=left: {key.replace("midlayer.", "layers.0."): value for key, value in left.items()} | embedding)
        assert load_speculator(tmp_path, model).config.num_hidden_layers == len(speculator.layers)
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


def test_a_directory_of_the_speculators_package_is_read_too(model, tmp_path):
    speculator = saved(tmp_path, model, norm_before_residual=True)
    config = json.loads((tmp_path / "config.json").read_text())
    top = ("draft_vocab_size", IDS, "norm_before_residual")
    layout = {
        "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "fc_norm": False, "target_hidden_size": None,
        "speculators_config": {"algorithm": "eagle3", "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
                               "verifier": {"name_or_path": "somebody/base", "architectures": ["LlamaForCausalLM"]}},
        "transformer_layer_config": {key: value for key, value in config.items() if key not in (*top, "eagle_config", "n_predict")},
    } | {key: config[key] for key in top}  # fmt: skip
    layout["transformer_layer_config"] |= {"weights_sha256": None, "base_model_fingerprint": None, "architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(layout))
    loaded = load_speculator(tmp_path, model)
    assert loaded.n_predict == 5 and loaded.norm_before_residual and loaded.base_layers == (0, 2)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in speculator.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps(layout | {"transformer_layer_config": {"model_type": "qwen3"}}))
    with pytest.raises(UserError, match="model_type is 'qwen3'"):
        load_speculator(tmp_path, model)


WRONG = {
    "another width": ({"hidden_size": 64}, None, "fits a base model of width 64 and vocabulary 24, .* has 32 and 24"),
    "another fingerprint": ({"base_model_fingerprint": "0" * 32}, None, "was trained for .*fingerprint 000"),
    "layers that don't exist": ({IDS: [0, 3]}, None, "reads a base model of 3 layers or more, .* has 2; use"),
    "layers that don't exist, as SGLang counts": ({IDS: None, "eagle_config": {IDS: [0, 2]}}, None, "reads a base model of 3 layers"),
    "layers out of order": ({IDS: [2, 0]}, None, "layer_ids is .*ascending order"),
    "the states alone": ({"eagle_config": {"use_aux_hidden_state": False}}, None, "eagle_config.use_aux_hidden_state is False"),
    "a draft vocabulary over the base's": ({"draft_vocab_size": 25}, None, "draft_vocab_size is 25: Input is over vocab_size, 24"),
    "no layers": ({"num_hidden_layers": 0}, None, "num_hidden_layers is 0"),
    "a layer that isn't there": ({"num_hidden_layers": 2}, None, "layers.1.input_layernorm.weight: the file says missing"),
    "a layer more than it says": ({}, lambda all: all.update({"layers.1.mlp.up_proj.weight": torch.zeros(20, 32)}), "layers.1.* not exp"),
    "norms of two kinds": (
        {"num_hidden_layers": 2},
        lambda all: all.update({"layers.1.input_layernorm.weight": torch.ones(32), "layers.1.hidden_norm.weight": torch.zeros(32)}),
        "layers.1.hidden_norm.weight: another than layers.1.input_layernorm.weight",
    ),
    "a base model": ({"architectures": ["LlamaForCausalLM"]}, None, "architectures.0 is 'LlamaForCausalLM'"),
    "no number of heads": ({"num_attention_heads": None}, None, "lacks num_attention_heads"),
    "heads that don't divide the width": ({"num_attention_heads": 5}, None, "num_attention_heads is 5: Input is no divisor of .*, 32"),
    "heads that don't divide": ({"num_key_value_heads": 3}, None, "num_key_value_heads is 3: Input is no divisor of .*, 4"),
    "a width of its own": ({"target_hidden_size": 64}, None, "target_hidden_size is 64: Input is another width than hidden_size, 32"),
    "positions that hang on the length": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, None, "rope_scaling is .*llama3"),
    "positions that lack a number": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None, "can't be built .*low_freq_factor"),
    "positions that turn by a word": ({"rope_theta": "fast"}, None, "its layer can't be built"),
    "a norm of a word": ({"rms_norm_eps": "small"}, None, "its layer can't be built .*rms_norm_eps"),
    "heads of an odd width": ({"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None}, None, "heads of 1 coord.* pairs"),
    "a sliding window": ({"layer_types": ["sliding_attention"], "sliding_window": 4}, None, "layer_types.0 is 'sliding_attention'"),
    "positions of half a head": ({"partial_rotary_factor": 0.5}, None, "partial_rotary_factor is 0.5"),
    "scaled logits": ({"logit_scale": 0.5}, None, "logit_scale is 0.5"),
    "quantised": ({"quantization_config": {"bits": 4}}, None, "quantization_config is"),
    "no fc": ({}, lambda all: all.pop("fc.weight"), r"tensor fc.weight: the file says missing, the config \[32, 64\]"),
    "no d2t": ({}, lambda all: all.pop("d2t"), r"tensor d2t: the file says missing, the config \[12\]"),
    "d2t out of the vocabulary": ({}, lambda all: all["d2t"].add_(13), "tensor d2t: no ascending tokens of a vocabulary of 24"),
    "d2t of ids": ({}, lambda all: all["d2t"].mul_(-1), "tensor d2t: no ascending tokens"),
    "d2t of fractions": ({}, lambda all: all.update(d2t=all["d2t"].float()), "tensor d2t: the file says torch.float32"),
    "t2d of others": ({}, lambda all: all["t2d"].logical_not_(), "tensor t2d: it names other tokens than d2t"),
    "t2d of one value": ({}, lambda all: all.update(t2d=torch.tensor(True)), "tensor t2d: it names other tokens than d2t"),
    "another lm_head": ({}, lambda all: all.update({"lm_head.weight": torch.zeros(11, 32)}), r"lm_head.weight: the file says \[11, 32\]"),
    "whole numbers by the layer's other name": (
        {}, lambda all: all.update({"layers.0.mlp.up_proj.weight": all.pop("midlayer.mlp.up_proj.weight").int()}),
        r"up_proj.weight: the file says torch.int32 \[20, 32\]",
    ),
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
    return Eagle3Speculator.build(settings, model, Corpus(torch.arange(WORDS, 0, -1), torch.randn(50, 3 * model.width)))


def test_heads_start_from_the_base_models_lm_head_and_if_asked_from_its_last_layers(model):
    speculator, theirs = built(model, init="last_layers"), load_file(f"{model.path}/model.safetensors")
    own, two = speculator.state_dict(), built(model, init="last_layers", layers=2).state_dict()
    assert torch.equal(own["lm_head.weight"], theirs["lm_head.weight"][speculator.draft_ids])
    for name in ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"):
        assert torch.equal(own[f"layers.0.{name}.weight"], theirs[f"model.layers.1.{name}.weight"])
        assert torch.equal(two[f"layers.0.{name}.weight"], theirs[f"model.layers.0.{name}.weight"])
        assert torch.equal(two[f"layers.1.{name}.weight"], theirs[f"model.layers.1.{name}.weight"])
    assert torch.equal(own["layers.0.self_attn.k_proj.weight"][:, 32:], theirs["model.layers.1.self_attn.k_proj.weight"])
    assert own["layers.0.self_attn.k_proj.weight"][:, :32].abs().max() < 0.02
    other = built(model).state_dict()
    assert not torch.equal(other["layers.0.mlp.down_proj.weight"], own["layers.0.mlp.down_proj.weight"])


def test_heads_start_from_the_whole_layer_where_a_process_holds_some_of_its_heads(model, monkeypatch):
    whole = built(model, init="last_layers").layers[0].self_attn.o_proj.weight
    monkeypatch.setattr(model, "query_heads", model.query_heads // 2)
    monkeypatch.setattr(model, "kv_groups", model.kv_groups // 2)
    assert torch.equal(built(model, init="last_layers").layers[0].self_attn.o_proj.weight, whole)


def test_heads_that_start_as_induction_heads_copy_before_they_are_trained(tmp_path):
    sizes = dict(vocab_size=96, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = BaseModel(str(write_model(tmp_path / "base", **sizes)), dtype="float32", device="cpu")
    model.give_layers((0, 2))
    text = torch.randperm(96, generator=torch.Generator().manual_seed(5))[:40].repeat(2)
    states = model.hidden_states(text[None], torch.zeros(1, 80, dtype=torch.int64))[0]
    roots, found = torch.arange(42, 78), {}
    for init, layers in [("last_layers", 1), ("induction", 1), ("induction", 2)]:
        torch.manual_seed(0)
        settings = settings_of({"family": "eagle3", "base_layers": [0, 2], "init": init, "layers": layers})
        speculator = Eagle3Speculator.build(settings, model, Corpus(torch.ones(96), states))
        speculator.attach(model)
        context = of_text(speculator, states, text, roots)
        drafted = TopKProposer(speculator, [1, 1]).propose(Step(states[roots - 1], text[roots], [], context=context)).tokens
        found[init, layers] = (drafted[:, 0] == text[roots + 1]).float().mean().item()
    assert found["induction", 1] > 0.5 and found["induction", 2] > 0.5 and found["last_layers", 1] < 0.1, found


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init": "last_layers", "inner_dim": 48}, r"init: base model .* has no model.layers.1.mlp.gate_proj.weight of \[48, 32\]"),
        ({"init": "last_layers", "layers": 3}, "layers 3: the base model has 2 to start as"),
        ({"base_layers": []}, "the published ones are none of a base model of 2 layers; give them"),
        ({"base_layers": [0, 3]}, "base_layers 3: the base model has 2 layers; give some of 0 to 2"),
        ({"draft_vocab_size": 25}, "draft_vocab_size 25 is over the base model's vocabulary, 24"),
        ({"kv_heads": 3}, "attention_heads 4 are no multiple of its kv_heads, 3"),
        ({"attention_heads": 5, "kv_heads": 5}, "attention_heads 5 are .* no divisor of the width, 32"),
        ({"head_dim": 7}, "head_dim 7: .* even"),
        ({"init": "induction"}, "init: induction heads take a base model with a tied embedding"),
        ({"init": "induction", "base_layers": [1, 2]}, r"base_layers \[1, 2\]: init induction reads 0 too; give it or none"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_base_model_are_refused_in_one_line(model, settings, message):
    with pytest.raises(UserError, match=message):
        built(model, **settings)


@pytest.mark.parametrize("init, layers", [("random", (2, 15, 27)), ("induction", (0, 2, 15, 27, 29))])
def test_states_are_read_where_nothing_is_said_that_sglang_can_give_too(init, layers):
    settings = settings_of({"family": "eagle3", "init": init})
    assert Eagle3Speculator.base_layers_of(settings, SimpleNamespace(layers=30)) == layers  # 30, what leaves the last, it can't


def test_heads_too_narrow_to_copy_are_refused_in_one_line(tmp_path):
    sizes = dict(vocab_size=WORDS, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    model = BaseModel(str(write_model(tmp_path / "base", **sizes)), dtype="float32", device="cpu")
    with pytest.raises(UserError, match="no rotary pair of heads of 4 coordinates turns slowly enough"):
        built(model, init="induction")
