import json

import pytest
import torch
from conftest import load_speculator
from safetensors.torch import load_file, save_file

from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError
from fms_spec.files import sha256_of
from fms_spec.proposers import Step
from fms_spec.speculators.directory import check_speculator, describe, save_speculator
from fms_spec.speculators.hidden_state import HiddenStateSpeculator
from fms_spec.speculators.mlp import MLPSpeculator


def mlp(base_model, **changes):
    torch.manual_seed(2)
    return MLPSpeculator(base_model.width, base_model.vocab_size, **dict(n_predict=3, inner_dim=16) | changes)


def hidden_state(base_model, n_predict=3, base_layers=()):
    torch.manual_seed(2)
    draft_ids, state_scale = torch.arange(0, base_model.vocab_size, 2), torch.rand(base_model.width * (1 + len(base_layers))) + 0.5
    speculator = HiddenStateSpeculator(
        base_model.width, base_model.vocab_size, draft_ids, state_scale, n_predict, width=12, inner_dim=20, base_layers=base_layers
    )
    for trunk in speculator.trunks:
        torch.nn.init.normal_(trunk.out.weight)
        torch.nn.init.normal_(trunk.out.bias)
    speculator.attach(base_model)
    return speculator


def edit_config(directory, **values):
    """Change config.json's values; None takes one out."""
    file = directory / "config.json"
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def save_published(directory, speculator, base_model):
    """A directory whose weights carry no sha256, as published ones."""
    save_speculator(directory, speculator, describe(speculator, base_model))
    edit_config(directory, weights_sha256=None)


def refused(directory, base_model, match):
    with pytest.raises(UserError, match=match) as error:
        load_speculator(directory, base_model)
    assert "\n" not in str(error.value)


def propose(speculator, hidden, tokens):
    """The chain that decoding would check: int64 [m, n_predict]."""
    return DraftShape().proposer(speculator).propose(Step(hidden, tokens, [])).tokens


@pytest.mark.parametrize("layers", [(), (1, 2)])
def test_hidden_state_heads_predict_the_states_of_the_formulas(base_model, layers):
    speculator, d = hidden_state(base_model, base_layers=layers), base_model.width
    hidden, tokens = torch.randn(4, d * (1 + len(layers))), torch.tensor([[5, 9, 2], [1, 1, 1], [90, 3, 4], [7, 8, 95]])
    weights = {name: value.double() for name, value in speculator.state_dict().items()}
    sigma, *sigmas = weights["state_scale"].split(d)
    embedding = base_model.embedding_weight.double()
    embedding = embedding / embedding.square().mean().sqrt()
    norm = lambda x: x / torch.sqrt((x * x).mean() + 1e-6)  # noqa: E731
    for row, (h, line) in enumerate(zip(hidden.double(), tokens)):
        z = y = torch.zeros(0, dtype=torch.float64)
        h, *inner = h.split(d)
        read = torch.cat([norm(part) / own for part, own in zip(inner, sigmas)]) if layers else h / sigma
        for i, token in enumerate(line):
            own = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"trunks.{min(i, 1)}.")}
            before = [z / sigma, y] if i else []
            x = own["mix.weight"] @ torch.cat([read, *before, embedding[token]])
            gate = own["gate.weight"] @ norm(x)
            y = norm(x + own["down.weight"] @ (gate * gate.sigmoid() * (own["up.weight"] @ norm(x))))
            z = sigma * (own["out.weight"] @ y + own["out.bias"])
            features = list(speculator.heads(hidden, tokens, [4, 4, 4]))[i][0][row]
            torch.testing.assert_close(features.double(), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [hidden_state, lambda base_model: mlp(base_model)], ids=["hidden_state", "mlp"])
def test_a_proposed_chain_is_what_the_trained_heads_find_likeliest(base_model, family):
    speculator = family(base_model)
    hidden, first = torch.randn(6, base_model.width), torch.arange(6)
    chain = propose(speculator, hidden, first)
    seen = torch.cat([first[:, None], chain], dim=1)
    for i, (features, weight, _) in enumerate(speculator.heads(hidden, seen, [6, 6, 6])):
        best = (features @ weight.T).argmax(-1)
        assert torch.equal(chain[:, i], best if speculator.draft_ids is None else speculator.draft_ids[best])


@pytest.mark.parametrize("n_predict, layers", [(1, ()), (3, ()), (3, (0, 2))])
def test_a_hidden_state_speculator_survives_saving_and_drafts_the_same(tmp_path, base_model, n_predict, layers):
    speculator = hidden_state(base_model, n_predict, layers)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    loaded = load_speculator(tmp_path, base_model)
    assert base_model.inner_layers == loaded.base_layers == layers
    assert ("base_layers" in json.loads((tmp_path / "config.json").read_text())) == bool(layers)
    hidden, tokens = torch.randn(5, base_model.state_width), torch.arange(5)
    base_model.give_layers(())
    assert torch.equal(propose(loaded, hidden, tokens), propose(speculator, hidden, tokens))
    assert torch.equal(loaded.draft_ids, speculator.draft_ids)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_predict", [1, 2, 3])
def test_an_mlp_speculator_survives_the_published_layout_and_drafts_the_same(tmp_path, base_model, tied, n_predict):
    speculator = mlp(base_model, tie_weights=tied, n_predict=n_predict)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    loaded = load_speculator(tmp_path, base_model)
    hidden, tokens = torch.randn(5, base_model.width), torch.arange(5)
    assert torch.equal(propose(loaded, hidden, tokens), propose(speculator, hidden, tokens))


def test_the_published_layout_has_the_published_names(tmp_path, base_model):
    speculator = mlp(base_model, tie_weights=False)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    names = {f"speculator.{part}.{i}.weight" for part in ("emb", "proj", "head", "ln") for i in range(3)}
    assert set(load_file(tmp_path / "model.safetensors")) == names | {f"speculator.ln.{i}.bias" for i in range(3)}
    config = json.loads((tmp_path / "config.json").read_text())
    published = {
        "model_type": "mlp_speculator", "architectures": ["MLPSpeculatorPreTrainedModel"], "emb_dim": 32, "inner_dim": 16,
        "vocab_size": 96, "n_predict": 3, "top_k_tokens_per_head": [1, 1, 1], "tie_weights": False, "scale_input": True,
    }  # fmt: skip
    assert config | published == config and config["base_model_name_or_path"] == base_model.name


def test_a_tied_file_that_repeats_its_shared_weights_loads_too_unless_the_repeats_differ(tmp_path, base_model):
    speculator = mlp(base_model)
    save_published(tmp_path, speculator, base_model)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for part in ("emb", "proj", "head", "ln"):
        for kind in ("weight", "bias"):
            source = f"speculator.{part}.{1 if part == 'proj' else 0}.{kind}"
            if source in tensors:
                tensors |= {f"speculator.{part}.{i}.{kind}": tensors[source].clone() for i in (1, 2)}
    save_file(tensors, file)
    loaded = load_speculator(tmp_path, base_model)
    assert all(torch.equal(value, speculator.state_dict()[name]) for name, value in loaded.state_dict().items())
    save_file(tensors | {"speculator.head.2.weight": tensors["speculator.head.2.weight"] + 1}, file)
    with pytest.raises(UserError, match="head.2.weight differs"):
        load_speculator(tmp_path, base_model)


def test_a_speculator_is_refused_for_another_base_model_by_name(tmp_path, base_model, other_model_dir):
    from fms_spec.base_model import BaseModel

    speculator = mlp(base_model)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    other = BaseModel(str(other_model_dir), dtype="float32")
    with pytest.raises(UserError, match="was trained for .*base.*not for .*other"):
        load_speculator(tmp_path, other)


def test_damaged_speculators_are_refused_in_one_line(tmp_path, base_model):
    speculator = mlp(base_model)
    save_published(tmp_path, speculator, base_model)
    description = json.loads((tmp_path / "config.json").read_text())
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, tensors, emb = file.read_bytes(), load_file(file), "speculator.emb.0.weight"
    cases = [
        (lambda: file.write_bytes(whole[:-100]), "model.safetensors: can't be read"),
        (lambda: save_file({k: v for k, v in tensors.items() if "proj.1" not in k}, file), "proj.1.weight is missing"),
        (lambda: save_file(tensors | {emb: torch.zeros(3, 3)}, file), "emb.0.weight is"),
        (lambda: save_file(tensors | {"extra": torch.zeros(3)}, file), "extra has no place"),
        (lambda: save_file(tensors | {emb: tensors[emb].int()}, file), "emb.0.weight is torch.int32"),
        (lambda: save_file(tensors | {emb: tensors[emb] / 0}, file), "not finite"),
        (lambda: file.unlink(), "no \\*.safetensors"),
        (lambda: config.write_text(json.dumps(description | {"model_type": "bert"})), "bert"),
        (lambda: config.write_text("{"), "can't be read"),
        (lambda: config.write_text("[]"), "config.json: no config of a speculator"),
        (lambda: config.unlink(), "no config.json"),
    ]  # fmt: skip
    for damage, message in cases:
        damage()
        refused(tmp_path, base_model, message)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_bit_of_exported_weights_is_refused_by_their_files_name(tmp_path, base_model, place):
    speculator = hidden_state(base_model)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    refused(tmp_path, base_model, "model.safetensors: altered since the export")
    with pytest.raises(UserError, match="model.safetensors: altered"):  # before the base model is loaded
        check_speculator(tmp_path, base_model.name)


def test_weights_that_the_config_does_not_name_are_not_read(tmp_path, base_model):
    speculator = hidden_state(base_model)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    save_file({"trunks.0.mix.weight": torch.zeros(1)}, tmp_path / "z.safetensors")
    load_speculator(tmp_path, base_model)
    edit_config(tmp_path, weights_sha256={"../model.safetensors": sha256_of(tmp_path / "model.safetensors")})
    refused(tmp_path, base_model, "config.json: no config of a speculator .weights_sha256")


WRONG_VALUES = [
    ("width", "16"), ("width", 10**12), ("width", 0), ("width", 12.5), ("width", True), ("inner_dim", -1), ("draft_vocab_size", 10**12),
    ("n_predict", 10**9), ("n_predict", 0), ("emb_dim", None), ("model_type", ["x"]), ("base_model_fingerprint", 3),
    ("base_layers", [2, 1]), ("base_layers", [-1, 2]), ("base_layers", "2"),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG_VALUES)
def test_a_value_of_a_config_that_can_not_be_is_refused_by_its_key(tmp_path, base_model, key, value):
    speculator = hidden_state(base_model)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    edit_config(tmp_path, **{key: value})
    refused(tmp_path, base_model, f"config.json: .*{key}")


def test_a_speculator_that_reads_layers_of_a_deeper_base_model_is_refused_before_it_is_loaded(tmp_path, base_model):
    speculator = hidden_state(base_model)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    edit_config(tmp_path, base_layers=[0, 5])
    refused(tmp_path, base_model, "reads a base model of 5 layers, .*base has 2")
    with pytest.raises(UserError, match="reads a base model of 5 layers"):
        check_speculator(tmp_path, base_model.name)


def test_sizes_larger_than_the_files_are_refused_before_memory_is_asked_for(tmp_path, base_model):
    speculator = hidden_state(base_model)
    save_speculator(tmp_path, speculator, describe(speculator, base_model))
    edit_config(tmp_path, width=2**24, inner_dim=2**24)  # 10**15 bytes for a matrix
    refused(tmp_path, base_model, "the file says .*the config .*16777216")


def test_a_draft_vocabulary_of_tokens_that_the_base_model_lacks_is_refused(tmp_path, base_model):
    save_published(tmp_path, hidden_state(base_model), base_model)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for wrong in (tensors["draft_ids"] + base_model.vocab_size, tensors["draft_ids"] - 1, tensors["draft_ids"].flip(0)):
        save_file(tensors | {"draft_ids": wrong}, file)
        refused(tmp_path, base_model, "draft_ids: no ascending tokens")


def test_other_files_beside_the_weights_of_a_published_directory_are_not_read(tmp_path, base_model):
    save_published(tmp_path / "published", mlp(base_model), base_model)
    expected = load_speculator(tmp_path / "published", base_model).state_dict()
    zeros = {key: torch.zeros_like(value) for key, value in load_file(tmp_path / "published/model.safetensors").items()}
    save_file(zeros, tmp_path / "published/optimizer.safetensors")
    found = load_speculator(tmp_path / "published", base_model).state_dict()
    assert all(value.equal(expected[key]) for key, value in found.items())
