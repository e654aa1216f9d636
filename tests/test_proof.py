"""What is proved of a base model before it is used: its files, its config, its computation, and the tokens it is asked about."""

import io
import json
import logging

import pytest
import torch
from architectures import LLAMA3, write_architecture
from conftest import prompts_of, tiny_speculator, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fms_spec import proof, rotary
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.errors import UserError
from fms_spec.losses import LossWeights, head_losses
from fms_spec.options import DecodingOptions
from fms_spec.weights import fingerprint

BACKENDS = ["fms", "transformers"]


def edit_weights(directory, edit):
    """`edit` is given {name: tensor} of model.safetensors and may change it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(directory, match, **settings):
    """The model is refused in one line that names it and says `match`."""
    with pytest.raises(UserError, match=match) as error:
        BaseModel(str(directory), **{"dtype": "float32", "device": "cpu"} | settings)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def drop(name):
    return lambda tensors: tensors.pop(name)


WRONG_TENSORS = {
    "a norm is missing": (drop("model.layers.1.input_layernorm.weight"), r"layers\.1\.(ln|input_layernorm)"),
    "a projection is missing": (drop("model.layers.1.mlp.up_proj.weight"), "up_proj|w1"),
    "the lm_head is missing": (drop("lm_head.weight"), "head.weight"),
    "a bias that the config has not": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "bias"),
    "a layer more than the config has": (
        lambda t: t.update({name.replace("layers.1", "layers.2"): t[name].clone() for name in list(t) if "layers.1" in name}), r"layers\.2",
    ),
    "another shape": (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "norm"),
    "another prefix": (lambda t: [t.update({f"_orig_mod.{name}": t.pop(name)}) for name in list(t)], "base model"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_tensor_that_is_missing_left_over_or_of_another_shape_is_named(tmp_path, case, backend):
    edit, named = WRONG_TENSORS[case]
    directory = write_model(tmp_path / "model")
    edit_weights(directory, edit)
    refused(directory, named, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_that_old_checkpoints_hold_are_no_tensor_left_over(tmp_path, backend):
    directory = write_model(tmp_path / "model")
    edit_weights(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    BaseModel(str(directory), dtype="float32", device="cpu", backend=backend)


def test_a_tied_lm_head_that_is_in_the_files_all_the_same_has_to_be_the_embedding(tmp_path):
    directory = write_model(tmp_path / "model", tie_word_embeddings=True)
    edit_weights(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    BaseModel(str(directory), dtype="float32", device="cpu")
    edit_weights(directory, lambda tensors: tensors["lm_head.weight"].add_(1))
    refused(directory, "tie_word_embeddings")


def test_only_the_files_that_hold_the_model_are_read_and_fingerprinted(tmp_path, caplog):
    directory = write_model(tmp_path / "model")
    tokens = prompts_of(20)[0][None]
    before = fingerprint(directory)
    expected = BaseModel(str(directory), dtype="float32", device="cpu").hidden_states(tokens, torch.zeros_like(tokens))
    stray = {name: torch.randn_like(value) for name, value in load_file(directory / "model.safetensors").items()}
    save_file(stray, directory / "a_fp16.safetensors", metadata={"format": "pt"})
    for backend in BACKENDS:
        model = BaseModel(str(directory), dtype="float32", device="cpu", backend=backend)
        torch.testing.assert_close(model.hidden_states(tokens, torch.zeros_like(tokens)), expected, rtol=1e-4, atol=1e-4)
    assert fingerprint(directory) == before
    assert "a_fp16.safetensors" in caplog.text


def test_a_damaged_set_of_files_is_refused_by_the_name_of_what_is_damaged(tmp_path):
    directory = write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    refused(directory, "no model.safetensors and no model.safetensors.index.json")
    model.save_pretrained(directory, max_shard_size="20KB")
    BaseModel(str(directory), dtype="float32", device="cpu")
    first = sorted(directory.glob("model-*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    refused(directory, f"{first.name}: can't be read")
    first.unlink()
    refused(directory, f"names {first.name}, which is not there")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(directory, "index.json can't be read")


def test_auto_falls_back_where_ibm_fms_differs_and_says_so(tmp_path, monkeypatch, caplog):
    directory = write_model(tmp_path / "model")
    turn = rotary.RotaryOnce.adjusted_qk
    monkeypatch.setattr(rotary.RotaryOnce, "adjusted_qk", lambda self, q, k, places, *_, **__: turn(self, q, k, places // 2))
    model = BaseModel(str(directory), dtype="float32", device="cpu")
    assert model.backend == "transformers"
    assert "ibm-fms differs from transformers" in caplog.text and "it runs in transformers" in caplog.text
    refused(directory, "ibm-fms differs from transformers by .* use backend=transformers", backend="fms")


def test_all_kinds_of_layers_are_among_those_that_are_proved(tmp_path):
    directory = write_architecture(tmp_path / "model", "GLM 4 MoE")
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers, config.first_k_dense_replace = 12, 5
    config.layer_types = None if getattr(config, "layer_types", None) is None else ["full_attention"] * 12
    assert proof.first_layers(config).num_hidden_layers == 6  # five without experts, one with
    mixed = AutoConfig.from_pretrained(write_architecture(tmp_path / "mixed", "Gemma 3 (text)"))
    mixed.num_hidden_layers, mixed.layer_types = 12, ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 6
    cut = proof.first_layers(mixed)
    assert cut.num_hidden_layers == len(cut.layer_types) == 6 and cut.sliding_window == proof.WINDOW


@pytest.mark.parametrize(
    "eos, named", [([0, 96], "EOS token 96 is outside"), (-1, "EOS token -1 is outside"), ("x", "no list of token ids")]
)
def test_eos_ids_that_are_no_tokens_of_the_model_are_refused(tmp_path, eos, named):
    directory = write_model(tmp_path / "model")
    edit_json(directory / "generation_config.json", eos_token_id=eos)
    refused(directory, named)


def test_a_generation_config_that_is_cut_is_named(tmp_path):
    directory = write_model(tmp_path / "model")
    (directory / "generation_config.json").write_text('{"eos_')
    refused(directory, "generation_config.json: can't be read")


ODD_CONFIGS = {
    "heads that don't divide the width": dict(num_attention_heads=3),
    "no heads": dict(num_attention_heads=0),
    "no layers": dict(num_hidden_layers=0),
    "a number that is a text": dict(hidden_size="32"),
    "an unknown activation": dict(hidden_act="nonsense"),
    "an unknown rope": dict(rope_scaling={"rope_type": "su", "factor": 2.0}),
    "a rope that grows": dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "windows without a width": dict(layer_types=["sliding_attention"] * 2),
    "other weights by another name": dict(transformers_weights="other.safetensors"),
    "no such architecture": dict(architectures={"a": 1}),
    "no context": dict(max_position_embeddings=2),
    "no vocabulary": dict(vocab_size=0),
    "an encoder": dict(model_type="bert", architectures=["BertForMaskedLM"]),
    "an encoder and a decoder": dict(model_type="bart", architectures=["BartForConditionalGeneration"]),
    "no such dtype": dict(dtype="float7"),
    "key-value heads that don't divide the heads": dict(num_key_value_heads=3),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_a_config_that_can_not_be_is_refused_in_one_line(tmp_path, case):
    directory = write_model(tmp_path / "model")
    edit_json(directory / "config.json", **ODD_CONFIGS[case])
    refused(directory, "base model")


def test_an_old_config_says_the_same_as_a_new_one(tmp_path):
    tokens = prompts_of(60)[0][None]
    found = []
    for name, rope in [("new", dict(rope_parameters=LLAMA3)), ("old", dict(rope_parameters=None, rope_theta=5e5, rope_scaling={
        ("type" if key == "rope_type" else key): value for key, value in LLAMA3.items() if key != "rope_theta"
    }))]:  # fmt: skip
        directory = write_model(tmp_path / name)
        edit_json(directory / "config.json", **rope)
        model = BaseModel(str(directory), dtype="float32", device="cpu", backend="fms")
        found.append(model.hidden_states(tokens, torch.zeros_like(tokens)))
    torch.testing.assert_close(*found)


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    directory = write_model(tmp_path / "model")
    (directory / "configuration_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass XConfig: pass\n")
    edit_json(directory / "config.json", model_type="x", auto_map={"AutoConfig": "configuration_x.XConfig"})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    refused(directory, "config.json can't be used")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_no_numbers_are_named_wherever_they_are(tmp_path, backend):
    directory = write_model(tmp_path / "model", num_hidden_layers=4)
    edit_weights(directory, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"].fill_(float("nan")))
    refused(directory, "model.layers.3.mlp.up_proj.weight holds values that are not finite", backend=backend)


def test_a_model_that_changes_on_disk_is_proved_again(tmp_path):
    directory = write_model(tmp_path / "model")
    BaseModel(str(directory), dtype="float32", device="cpu")
    edit_json(directory / "config.json", num_hidden_layers=1)
    refused(directory, r"layers\.1")


def test_quantised_weights_that_the_config_keeps_quiet_about_are_refused(tmp_path):
    directory = write_model(tmp_path / "model", num_hidden_layers=4)
    name = "model.layers.3.mlp.up_proj.weight"
    edit_weights(directory, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(directory, "F8_E4M3")


def test_an_index_that_says_another_file_than_the_one_that_has_a_tensor_is_refused(tmp_path):
    directory = write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, f"disagree on tensor {name}")


def test_a_prompt_with_a_token_over_the_vocabulary_is_refused_before_any_work(base_model):
    with pytest.raises(UserError, match="token 96 of a prompt is over the vocabulary of .*, 96"):
        decode(base_model, [torch.tensor([1, 2]), torch.tensor([96])], DecodingOptions(max_new_tokens=2))


def test_longrope_is_held_to_its_short_factors_and_vllm_is_told_of(tmp_path, caplog):
    directory = write_architecture(tmp_path / "model", "Phi-3, longrope")
    model = BaseModel(str(directory), dtype="float32", device="cpu")
    assert model.context_length == 128
    assert "--max-model-len 128" in caplog.text


def test_quantised_weights_run_where_transformers_runs_them_and_are_refused_in_one_line_elsewhere(tmp_path):
    directory = write_model(tmp_path / "fp8")
    expected = {}

    def quantise(tensors):
        for name, value in tensors.items():
            scale = value.abs().max() / 448
            expected[name] = (value / scale).to(torch.float8_e4m3fn).float() * scale if "proj" in name else value.clone()
        for name in [name for name in tensors if "proj" in name]:
            tensors[name + "_scale_inv"] = (tensors[name].abs().max() / 448).reshape(1, 1)
            tensors[name] = (tensors[name] / tensors[name + "_scale_inv"]).to(torch.float8_e4m3fn)

    edit_weights(directory, quantise)
    edit_json(directory / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    model = BaseModel(str(directory), dtype="float32", device="cpu")
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_model(tmp_path / "plain"))).float().eval()
    plain.load_state_dict(expected)
    tokens = prompts_of(20)[0][None]
    with torch.no_grad():
        found, right = model.logits(model.hidden_states(tokens, torch.zeros_like(tokens))), plain(tokens).logits
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
    for kind in ("gptq", "awq", "bitsandbytes"):
        edit_json(directory / "config.json", quantization_config={"quant_method": kind, "bits": 4, "group_size": 128, "load_in_4bit": True})
        refused(directory, f"quantised \\({kind}\\).*take the unquantised model")


@pytest.mark.parametrize("label", ["Phi", "Gemma 2", "Cohere"])
def test_heads_are_taught_by_the_models_own_distribution_with_its_bias_its_cap_and_its_scale(tmp_path, label):
    directory = write_architecture(tmp_path / "model", label)
    model = BaseModel(str(directory), dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    heads = tiny_speculator(model, "hidden_state", n_predict=2)
    tokens = prompts_of(30)[0][None]
    states = model.hidden_states(tokens, torch.zeros_like(tokens))
    positions = choose_positions(usable_positions(torch.zeros_like(tokens), torch.zeros(1), 2))
    windows = make_windows(states, tokens, positions, 2)
    weights = LossWeights(0.0, 1.0, 0.0, (1.0, 1.0), 0.0)
    _, losses = head_losses(heads, windows, model, weights, torch.tensor([float(count) for count in positions.counts]))
    with torch.no_grad():
        log_p = theirs(tokens).logits[0][:, heads.draft_ids].double().log_softmax(-1)
        assert torch.equal(heads.best_base_tokens(model, states)[0], heads.draft_ids[log_p.argmax(-1)])
        outputs = list(heads.heads(windows.hidden, windows.tokens, windows.counts))
    for head, (features, weight, _) in enumerate(outputs):
        log_q = (features.double() @ weight.double().T).log_softmax(-1)
        p = log_p[positions.index[: positions.counts[head]] + 1 + head]
        expected = (p.exp() * (p - log_q)).sum(-1).mean()
        assert losses[head].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_proof_leaves_nothing_behind_in_the_logs_of_a_model_that_is_right(model_dir, caplog, capfd):
    proof.proved.cache_clear()
    with caplog.at_level(logging.WARNING):
        BaseModel(str(model_dir), dtype="float32", device="cpu")
    assert not caplog.records and capfd.readouterr() == ("", "")
