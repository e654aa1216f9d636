import json

import pytest
import torch
from conftest import write_model
from fms.modules.positions import RotaryEmbedding
from transformers import AutoModelForCausalLM, LlamaConfig

from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.rotary import RotaryOnce, look_up_once
from fms_spec.weights import fingerprint

BACKENDS = ["fms", "transformers"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def random_rows(*shape):
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_states_and_logits_are_those_of_the_models_own_forward(tmp_path, backend, kind):
    directory = write_model(tmp_path / kind, kind=kind)
    model = BaseModel(str(directory), dtype="float32", backend=backend, device="cpu")
    tokens = random_rows(2, 40)
    states = model.hidden_states(tokens, torch.zeros_like(tokens))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens, output_hidden_states=True)
    torch.testing.assert_close(states, reference.hidden_states[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(states), reference.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_get_the_states_they_have_alone(model_dir, backend):
    model = BaseModel(str(model_dir), dtype="float32", backend=backend, device="cpu")
    tokens = random_rows(2, 50)
    segments = torch.zeros(2, 50, dtype=torch.int32)
    segments[0, 7:], segments[0, 30:], segments[1, 45:] = 1, 2, -1
    packed = model.hidden_states(tokens, segments)
    for row, start, end in [(0, 0, 7), (0, 7, 30), (0, 30, 50), (1, 0, 45)]:
        alone = tokens[row : row + 1, start:end]
        torch.testing.assert_close(
            packed[row : row + 1, start:end], model.hidden_states(alone, torch.zeros_like(alone)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_extending_a_cache_by_pieces_gives_the_states_of_the_whole_row(model_dir, backend):
    model = BaseModel(str(model_dir), dtype="float32", backend=backend, device="cpu")
    tokens = random_rows(3, 30)
    whole = model.hidden_states(tokens, torch.zeros_like(tokens))
    cache, pieces = model.new_cache(3, 30), []
    for start, end in [(0, 11), (11, 12), (12, 19), (19, 30)]:
        pieces.append(model.extend(tokens[:, start:end], cache))
        cache.hold([end] * 3)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", [{}, LLAMA3], ids=["plain", "llama3"])
def test_positions_turn_queries_and_keys_as_ibm_fms_does(scaling):
    theirs = RotaryEmbedding(8, 10_000.0, 64, 1.0, scaling)
    layer = torch.nn.Module()
    layer.position_encoder = theirs
    rope = {"rope_type": "default", "rope_theta": 10_000.0} | scaling
    look_up_once(layer, LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=rope), torch.device("cpu"))
    assert isinstance(layer.position_encoder, RotaryOnce)
    for positions in (torch.tensor([[0, 1, 5], [63, 2, 2]]), torch.tensor([[9, 9, 10], [1, 0, 62]])):
        query, keys = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
        for ours, expected in zip(layer.position_encoder.adjusted_qk(query, keys, positions), theirs.adjusted_qk(query, keys, positions)):
            torch.testing.assert_close(ours, expected)


def test_the_fingerprint_names_the_weights_and_not_how_they_were_loaded(model_dir, other_model_dir, tmp_path):
    models = [BaseModel(str(model_dir), dtype=dtype, backend=backend) for dtype in ("float32", "bfloat16") for backend in BACKENDS]
    assert len({model.fingerprint for model in models}) == 1
    assert fingerprint(other_model_dir) != fingerprint(model_dir)
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path) == fingerprint(model_dir)


def test_what_cannot_be_a_base_model_is_refused_in_one_line_that_names_it(tmp_path, model_dir):
    cases = {"nowhere": "nowhere"}
    empty = tmp_path / "empty"
    empty.mkdir()
    cases[str(empty)] = "no config.json"
    bare = write_model(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    cases[str(bare)] = "no model.safetensors"
    cut = write_model(tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    cases[str(cut)] = "model.safetensors: can't be read"
    deep = write_model(tmp_path / "deep")
    config = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))  # building so many would not end
    cases[str(deep)] = "asks for 1000000000 layers, and its files hold 21 tensors"
    folder = write_model(tmp_path / "folder")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    cases[str(folder)] = "generation_config.json: can't be read"
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            BaseModel(name)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_a_document_over_the_context_is_refused(base_model):
    tokens = torch.ones(1, base_model.context_length + 1, dtype=torch.int64)
    with pytest.raises(UserError, match="context"):
        base_model.hidden_states(tokens, torch.zeros_like(tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_packed_for_decoding_give_the_same_states(model_dir, backend):
    plain, packed = (BaseModel(str(model_dir), dtype="bfloat16", backend=backend, device="cpu") for _ in range(2))
    packed.pack()
    for count in (1, 4, 40):
        tokens = random_rows(2, count)
        expected = plain.hidden_states(tokens, torch.zeros_like(tokens)).float()
        found = packed.hidden_states(tokens, torch.zeros_like(tokens)).float()
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()
        assert (packed.logits(found.bfloat16()) - plain.logits(found.bfloat16())).abs().max() < 0.1 * expected.abs().max()
        assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.99
