"""`hidden_state` heads laid out for proposing: what they say is what the heads as trained say."""

from types import SimpleNamespace

import pytest
import torch

from fms_spec.context import of_text
from fms_spec.proposers import select
from fms_spec.speculators.hidden_state import HiddenStateSpeculator

D, V, DRAFT, TEXT = 32, 48, 20, 14
SHAPES = {
    "narrow": {}, "as wide as the base model": {"width": D}, "one head": {"n_predict": 1}, "two heads": {"n_predict": 2},
    "copying": {"pointer_width": 8}, "one head that copies": {"n_predict": 1, "pointer_width": 8},
    "copying, inner layers": {"pointer_width": 8, "base_layers": (0, 2)}, "wide, inner layers": {"width": 40, "base_layers": (1, 2)},
}  # fmt: skip


def attached(shape, dtype=torch.float32, bias=True, seed=3):
    """The same heads every time, no weight of which is zero."""
    torch.manual_seed(seed)
    values = {"n_predict": 4, "width": 12, "inner_dim": 20, "pointer_width": 0, "base_layers": ()} | shape
    base = SimpleNamespace(embedding_weight=torch.randn(V, D), output_weight=torch.randn(V, D + bias))
    scale = torch.rand(D * (1 + len(values["base_layers"]))) + 0.5
    heads = HiddenStateSpeculator(D, V, torch.randperm(V)[:DRAFT].sort().values, scale, **values)
    for weight in heads.parameters():
        if weight.numel() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    states = torch.randn(TEXT, len(scale))
    base.embedding_weight, base.output_weight, states = (part.to(dtype) for part in (base.embedding_weight, base.output_weight, states))
    heads.to(dtype).attach(base)
    return heads, states, torch.randint(0, V, (TEXT,))


@torch.no_grad()
def logits_of(heads, states, text):
    """Of every head along a tree: two positions, each of which parts in two behind its first draft."""
    ends = torch.tensor([6, TEXT - 1])
    context = of_text(heads, states, text, ends)
    state = heads.start(states[ends - 1], *([] if context is None else [context.before]))
    tokens, found = text[ends], []
    for head in range(heads.n_predict):
        state = heads.advance(state, tokens, head)
        found.append(heads.logits(state, head, context).float())
        if head == 0:
            state, tokens = select(state, torch.tensor([0, 0, 1, 1])), torch.tensor([3, 4, 5, 6])
    return torch.cat([logits.flatten() for logits in found])


@pytest.mark.parametrize("bias", [False, True], ids=["", "with a bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_packed_heads_say_what_they_said(shape, bias):
    heads, *rest = attached(shape, bias=bias)
    expected = logits_of(heads, *rest)
    heads.pack()
    torch.testing.assert_close(logits_of(heads, *rest), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_bfloat16_packed_heads_are_as_near_to_the_truth_as_they_were(shape):
    before = after = 0.0
    for seed in range(12):  # of one seed alone the two may differ by half; of twelve by a quarter at most
        truth = logits_of(*attached(shape, seed=seed))
        heads, *rest = attached(shape, torch.bfloat16, seed=seed)
        before += (logits_of(heads, *rest) - truth).square().mean()
        heads.pack()
        after += (logits_of(heads, *rest) - truth).square().mean()
    assert after < 1.5 * before
