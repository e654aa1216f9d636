"""Windows, caps and sinks: what layers ask their attention for, in long packed texts and in batches of unequal ones."""

import pytest
import torch
from architectures import write_architecture
from conftest import Planted, prompts_of
from transformers import AutoModelForCausalLM

from fms_spec import attention
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.errors import UserError
from fms_spec.options import DecodingOptions

ASKING = ["Mistral, sliding window", "Gemma 2", "gpt-oss", "Qwen2, sliding windows"]

# What training and decoding would get wrong, broken one at a time: the proof has to find each.
BROKEN = {
    "a window that is ignored": ("Mistral, sliding window", "sliding_window", None),
    "a window that is one too wide": ("Mistral, sliding window", "sliding_window", lambda window: window + 1),
    "scores that are not capped": ("Gemma 2", "softcap", None),
    "sinks that are left out": ("gpt-oss", "s_aux", None),
    "a scale that is left out": ("Gemma 2", "scaling", None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_layer_asks_its_attention_for_is_missed_when_it_is_not_given(tmp_path, monkeypatch, case):
    label, name, change = BROKEN[case]
    directory = write_architecture(tmp_path / "model", label)
    for key in (attention.PACKED, attention.CACHED):
        right = attention.AttentionInterface()[key]

        def broken(*inputs, right=right, **named):
            return right(*inputs, **named | {name: change(named[name]) if change else None})

        monkeypatch.setitem(attention.AttentionInterface._global_mapping, key, broken)
    with pytest.raises(UserError, match="differs from transformers by .* of the norm in the states"):
        BaseModel(str(directory), dtype="float32", device="cpu")


@pytest.mark.parametrize("label", ASKING)
@torch.no_grad()
def test_a_packed_text_is_the_same_in_blocks_of_queries_of_any_size(tmp_path, monkeypatch, label):
    directory = write_architecture(tmp_path / "model", label)
    model = BaseModel(str(directory), dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, segments = prompts_of(100)[0][None], (torch.arange(100) >= 37).long()[None]
    right = torch.cat([theirs.get_decoder()(piece).last_hidden_state for piece in (tokens[:, :37], tokens[:, 37:])], dim=1)
    for size in (1, 7, 16, 50):
        monkeypatch.setattr(attention, "BLOCK", size)
        torch.testing.assert_close(model.hidden_states(tokens, segments), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [2, 16])  # a tree deeper than its window, and one within it
@pytest.mark.parametrize("label", ASKING)
def test_a_batch_of_unequal_texts_says_what_each_says_alone(tmp_path, label, window):
    model = BaseModel(str(write_architecture(tmp_path / "model", label, sliding_window=window)), dtype="float32", device="cpu")
    prompts, options = prompts_of(3, 40, 17, 60), DecodingOptions(max_new_tokens=30, ignore_eos=True)
    alone = [decode(model, [prompt], DecodingOptions(max_new_tokens=34, ignore_eos=True))[0][0].tokens for prompt in prompts]
    texts = [prompt.tolist() + tokens for prompt, tokens in zip(prompts, alone)]
    for proposer in (None, Planted(texts, 96, 3, lambda index, step: (index + step) % 4, branches=2)):
        together, _ = decode(model, prompts, options, proposer)
        assert [text.tokens for text in together] == [tokens[:30] for tokens in alone]
