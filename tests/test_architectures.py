"""docs/base_models.md, walked: each architecture is computed as `transformers` computes it by itself, or refused in one line."""

import re
from pathlib import Path

import pytest
import torch
from architectures import MODELS, write_architecture
from conftest import Planted
from transformers import AutoModelForCausalLM

from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.errors import UserError
from fms_spec.options import DecodingOptions

TABLE = Path(__file__).parents[1] / "docs" / "base_models.md"
NEW_TOKENS = 40


def verdicts():
    """{architecture: what the table says of it}"""
    rows = re.findall(r"^\| ([^|]+) \| `[^|]+` \| ([^|]+) \|", TABLE.read_text(), re.MULTILINE)
    return {label.strip(): verdict.strip() for label, verdict in rows}


def test_the_table_holds_every_architecture_that_is_tried():
    assert verdicts().keys() == MODELS.keys()


def greedy(model, prompt, count):
    """Best tokens of `transformers`' own forward over the whole text, again for each: nothing is cached."""
    text = prompt.tolist()
    for _ in range(count):
        text.append(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax().item())
    return text


def check_inner_layers(model, theirs, tokens, label):
    """What enters each layer is what `transformers` says enters it; or it is four states a token, and refused."""
    model.give_layers(range(model.layers))
    if label == "Gemma 3n (text)":
        with pytest.raises(UserError, match="its layers hand on .* leave speculator.base_layers out"):
            model.hidden_states(tokens, torch.zeros_like(tokens))
        model.give_layers([])
    else:
        inner = torch.cat(theirs.get_decoder()(tokens, output_hidden_states=True).hidden_states[:-1], dim=-1)
        given = model.hidden_states(tokens, torch.zeros_like(tokens))[..., model.width :]
        assert ((given - inner).norm(dim=-1) / inner.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize("label", MODELS)
@torch.no_grad()
def test_an_architecture_is_as_transformers_has_it_or_refused_as_the_table_says(tmp_path, label):
    directory = write_architecture(tmp_path / "model", label)
    backend, _, reason = verdicts()[label].partition(": ")
    if backend == "refused":
        with pytest.raises(UserError) as error:
            BaseModel(str(directory), dtype="float32", device="cpu")
        assert reason in str(error.value) and str(directory) in str(error.value) and "\n" not in str(error.value)
        return
    model = BaseModel(str(directory), dtype="float32", device="cpu")
    assert model.backend == backend.replace("ibm-fms", "fms")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(1, 96, (1, 100), generator=torch.Generator().manual_seed(1))
    states = model.hidden_states(tokens, (torch.arange(100) >= 37).long()[None])
    pieces = [tokens[:, :37], tokens[:, 37:]]
    expected = torch.cat([theirs.get_decoder()(piece).last_hidden_state for piece in pieces], dim=1)
    logits = torch.cat([theirs(piece).logits for piece in pieces], dim=1)
    for ours, right in ((states, expected), (model.logits(states), logits)):
        assert ((ours - right).norm(dim=-1) / right.norm(dim=-1)).max() < 1e-4
    check_inner_layers(model, theirs, tokens, label)
    prompt = tokens[0, :30]
    text = greedy(theirs, prompt, NEW_TOKENS + 4)
    for proposer in (None, Planted([text], 96, 3, lambda _, step: step % 4, branches=2)):
        (result,), _ = decode(model, [prompt], DecodingOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True), proposer)
        assert result.tokens == text[30 : 30 + NEW_TOKENS]
    assert 1 < sum(result.accepted) < NEW_TOKENS  # of the tree's candidates some were right and some were not
