"""The residual stream inside the base model: that it is what `transformers` has there, and heads that read it."""

import json

import pytest
import torch
from conftest import INNER, prompts_of, tiny_speculator, write_config, write_model
from test_plan import CPU
from transformers import AutoModelForCausalLM

import scripts.export
import scripts.train
from fms_spec.base_model import BaseModel
from fms_spec.candidates import Tree
from fms_spec.decoding import decode
from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError
from fms_spec.loading import load_for_decoding
from fms_spec.options import DecodingOptions
from pipelines.cli import main
from pipelines.plan.plan import Plan, Ranks, Sizes
from pipelines.train.run import train

LAYERS = 4
ASKED = (3, 0, LAYERS, 1)  # in an order of one's own


@pytest.fixture(scope="module", params=["llama", "granite"])
def directory(request, tmp_path_factory):
    """A model of four layers, or one that multiplies its embedding, of two."""
    return write_model(tmp_path_factory.mktemp("inner") / request.param, kind=request.param, num_hidden_layers=LAYERS)


@pytest.fixture(params=["fms", "transformers"])
def model(request, directory):
    return BaseModel(str(directory), dtype="float32", backend=request.param, device="cpu")


def asked_of(model):
    return tuple(min(index, model.layers) for index in ASKED)


@torch.no_grad()
def stated(model, text):
    """What `transformers` has of a text by itself, the final states and those of `asked_of`: [n, (1 + k) d]."""
    theirs, left = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation="eager").eval(), []
    theirs.model.norm.register_forward_pre_hook(lambda _, args: left.append(args[0]))  # the last of hidden_states comes after the norm
    *inner, final = theirs(text[None], output_hidden_states=True, use_cache=False).hidden_states
    inner.append(left[0])
    return torch.cat([final, *(inner[index] for index in asked_of(model))], dim=-1)[0]


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_two_documents_of_a_row_have_inside_the_model_what_each_has_alone(model):
    text = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(1))
    model.give_layers(asked_of(model))
    states = model.hidden_states(text[None], (torch.arange(40) >= 17).long()[None])[0]
    assert states.shape[-1] == model.state_width == 5 * model.width
    same(states, torch.cat([stated(model, text[:17]), stated(model, text[17:])]))
    same(model.logits(states), model.logits(states[:, : model.width]))


def test_a_text_read_in_pieces_and_candidates_onto_a_cache_has_inside_the_model_what_it_has_alone(model):
    text = torch.randint(1, 96, (20,), generator=torch.Generator().manual_seed(2))
    model.give_layers(asked_of(model))
    cache = model.new_cache(1, 40)
    pieces = [model.extend(text[None, :7], cache)[0]]
    cache.hold([7])
    pieces.append(model.extend(text[None, 7:9], cache)[0])
    cache.hold([9])
    other = (text + 1) % 96
    nodes = torch.stack([text[9], other[10], text[10], other[11], text[11]])  # a root, two children, and a child of each
    tree = Tree(torch.tensor([[0, 0, 0, 1, 2]]))
    states = model.extend(nodes[None], cache, tree)[0]
    same(states[[1, 3]], stated(model, torch.cat([text[:10], other[10:12]]))[-2:])
    cache.accept([[0, 2, 4]])
    pieces += [states[[0, 2, 4]], model.extend(text[None, 12:], cache)[0]]
    same(torch.cat(pieces), stated(model, text))


def test_where_nobody_asks_any_more_nothing_is_left_in_the_models_way(model):
    tokens = torch.arange(1, 30)[None]
    before = model.hidden_states(tokens, torch.zeros_like(tokens))
    model.give_layers([1])
    assert not torch.equal(model.hidden_states(tokens, torch.zeros_like(tokens)), before)
    model.give_layers([])
    assert torch.equal(model.hidden_states(tokens, torch.zeros_like(tokens)), before)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.model.modules())


@pytest.mark.parametrize("index", [-1, 3])
def test_a_layer_that_there_is_not_is_refused_in_one_line(base_model, index):
    with pytest.raises(UserError, match=f"base has 2 layers, no state {index}; correct speculator.base_layers") as error:
        base_model.give_layers([0, index])
    assert "\n" not in str(error.value) and base_model.inner_layers == ()


@pytest.mark.parametrize(
    "layers, message",
    [
        ("[1, 0]", r"speculator.base_layers: Input should be layers in ascending order, none of them twice \(got \[1, 0\]\)"),
        ("[1, 1]", "speculator.base_layers: Input should be layers in ascending order"),
        ("[-1]", "speculator.base_layers.0: .*greater than or equal to 0"), ("[0.5]", "speculator.base_layers.0: .*integer"),
        ("1", "speculator.base_layers: .*tuple"), ("[0, 2]", "speculator.base_layers 2: the base model has 2 layers; give some of 0 to 1"),
    ],
)  # fmt: skip
def test_layers_of_a_config_that_can_not_be_are_refused_in_one_line_before_anything_is_loaded(tmp_path, config_file, layers, message):
    with pytest.raises(UserError, match=message) as error:
        train(config_file(**{"speculator.base_layers": layers}), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out/run.json").exists()


def test_the_mlp_family_has_no_inner_layers(config_file):
    with pytest.raises(UserError, match="unknown key speculator.base_layers"):
        config_file("mlp", **{"speculator.base_layers": "[1]"})


def test_a_run_without_inner_layers_is_recorded_as_before_there_were_any(config_file):
    assert "base_layers" not in config_file().model_dump(mode="json")["speculator"]


def test_a_plan_counts_the_states_and_the_weights_that_read_them(config_file):
    plans = [Plan(config_file(hidden_state_cache=True, **more), Sizes(64, 8, 20, 9), Ranks(), CPU) for more in ({}, READING)]
    states, kept, masters, worst = ([value(plan) for plan in plans] for value in (
        lambda plan: plan.states("phase1"), lambda plan: plan.disk, lambda plan: plan.masters,
        lambda plan: plan.moments["phase1: base model"]["activations"],
    ))  # fmt: skip
    d, width, tokens = 32, 16, 20 * 64 + 9 * (8 + 12)
    assert states[1] == 4 * states[0] and kept[1] - kept[0] == 3 * d * 4 * tokens
    assert masters[1] - masters[0] == 2 * (2 * d * width) * 4  # two sets of weights read three states where they read one
    assert worst[1] - worst[0] >= 3 * 8 * 64 * d * 4  # a forward over eight rows


READING = {"speculator.base_layers": "[0, 1]"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir, data_dir):
    """The exported speculators of two runs that read inner layers, of which the second was resumed with its states kept on disk."""
    place = tmp_path_factory.mktemp("trained")
    write_config(place / "run.yaml", model_dir, data_dir)
    settings = [*(f"{key}={value}" for key, value in READING.items()), "checkpoint.keep=9", "hidden_state_cache=true", "schedule.steps=24"]
    for name in ("whole", "resumed"):
        words = [f"--config={place / 'run.yaml'}", f"--out_dir={place / name}", *settings]
        main(scripts.train.Arguments, scripts.train.run, words=words, overrides=True)
        if name == "resumed":
            for late in sorted((place / name / "checkpoints").iterdir())[3:]:
                late.rename(place / late.name)
            main(scripts.train.Arguments, scripts.train.run, words=[*words, "--resume"], overrides=True)
        words = [f"--checkpoint={place / name}", f"--out_dir={place / f'speculator_{name}'}"]
        main(scripts.export.Arguments, scripts.export.run, words=words)
    return place


def test_a_resumed_run_ends_with_the_same_bits(trained):
    whole, resumed = (trained / f"speculator_{name}/model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert json.loads((trained / "speculator_whole/config.json").read_text())["base_layers"] == [0, 1, 2]


@pytest.mark.parametrize("shape", [DraftShape(), DraftShape(top_k_per_head=(3, 2)), DraftShape(nodes=7)])
def test_an_exported_speculator_says_exactly_the_base_models_text_in_chains_and_trees(trained, model_dir, base_model, shape):
    loaded, _, proposer = load_for_decoding(model_dir, trained / "speculator_whole", shape, dtype="float32", device="cpu")
    prompts, options = prompts_of(3, 17, 8, 30), DecodingOptions(max_new_tokens=40, ignore_eos=True)
    plain, _ = decode(base_model, prompts, options)
    fast, _ = decode(loaded, prompts, options, proposer)
    assert loaded.inner_layers == (0, 1, 2) and [result.tokens for result in fast] == [result.tokens for result in plain]
    assert sum(count for result in fast for count in result.accepted) > 0


def test_speculators_that_read_different_layers_decode_in_turn_on_one_base_model(tiny_models):
    model, prompts, options = tiny_models.get(1), prompts_of(4, 9, words=8), DecodingOptions(max_new_tokens=12, ignore_eos=True)
    proposers = [DraftShape().proposer(tiny_speculator(model, family, n_predict=2)) for family in (INNER, "hidden_state", "mlp_tied")]
    plain, _ = decode(model, prompts, options)
    for proposer in proposers:
        assert [result.tokens for result in decode(model, prompts, options, proposer)[0]] == [result.tokens for result in plain]
