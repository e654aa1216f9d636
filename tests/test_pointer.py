"""The pointer: what is copied from the text, in the losses over packed rows and in what is proposed."""

import json

import pytest
import torch
from conftest import POINTERS, load_speculator, tiny_speculator, write_model
from test_losses import WAYS

import scripts.decode
import scripts.evaluate
import scripts.export
import scripts.train
from fms_spec import passes
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.base_model import BaseModel
from fms_spec.context import of_text
from fms_spec.losses import LossWeights, head_losses
from fms_spec.passes import Arithmetic
from fms_spec.proposers import started
from pipelines.cli import main

HEADS, CHUNK = 3, 8
HEAD_WEIGHTS = (1.0, 0.5, 0.25)
LOSSES = {
    "cross-entropy": LossWeights(1.0, 0.0, 0.0, HEAD_WEIGHTS), "distillation": LossWeights(0.0, 1.0, 0.0, HEAD_WEIGHTS),
    "acceptance": LossWeights(0.0, 0.0, 0.0, HEAD_WEIGHTS, 1.0), "all": LossWeights(0.3, 0.7, 0.0, HEAD_WEIGHTS, 0.4),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return BaseModel(str(write_model(tmp_path_factory.mktemp("pointer") / "model", vocab_size=24)), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rows(model):
    """Two packed rows: tokens, documents, states."""
    tokens = torch.randint(0, 24, (2, 30), generator=torch.Generator().manual_seed(1))
    segments = torch.zeros(2, 30, dtype=torch.int32)
    segments[0, 12:], segments[1, 24:] = 1, -1
    return tokens, segments, model.hidden_states(tokens, segments)


def windows_of(rows):
    tokens, segments, states = rows
    positions = choose_positions(usable_positions(segments, torch.zeros(len(tokens), dtype=torch.int64), HEADS))
    return make_windows(states, tokens, positions, HEADS, segments)


def said(speculator, model, windows, rows):
    """Yields (head, draft distribution over the vocabulary fp64 [v], state the target comes from, target), by the formulas alone."""
    tokens, segments, states = (part.flatten(0, 1) for part in rows)
    documents = segments + 100 * (torch.arange(len(tokens)) // rows[0].shape[1])
    states, embedding = states.double(), model.embedding_weight.double()
    embedding = embedding / embedding.square().mean().sqrt()
    own = {name: value.double() for name, value in speculator.pointer.named_parameters()}
    norm = lambda x: x / torch.sqrt((x * x).mean() + 1e-6)  # noqa: E731
    pair = lambda *tokens: torch.cat([0 * embedding[0] if token is None else embedding[token] for token in tokens])  # noqa: E731
    token = lambda t: int(tokens[t])  # noqa: E731
    state = speculator.start(windows.hidden.double(), windows.text.before)
    for head in range(HEADS):
        state = speculator.advance(state, windows.tokens[:, head], head)
        features, weight = speculator.output(state, head)
        inner = state[2] if isinstance(state[0], torch.Tensor) and len(state) == 5 else state[0]
        for m in range(windows.counts[head]):
            t = int(windows.index[m])
            begin = next(j for j in range(t + 1) if documents[j] == documents[t])
            line = [token(j) if j > begin else None for j in range(begin, t + 1)] + windows.tokens[m, : head + 1].tolist()
            query = own["query_tokens.weight"] @ pair(line[-1], line[-2]) + own["query_state.weight"] @ norm(inner[m])
            scores = []
            for j in range(begin, t + 1):
                key = own["key_tokens.weight"] @ pair(*(token(i) if i > begin else None for i in (j, j - 1)))  # the first is not known
                scores.append(own["sharpness"][0] * 8 / speculator.pointer.width * (query @ key))
            scores = torch.stack(scores)
            gate = torch.sigmoid(scores.logsumexp(0) + (own["gate.weight"] @ norm(inner[m]) + own["gate.bias"])[0])
            known = speculator.over_all((features[m] @ weight.T).softmax(-1)[None])[0]
            copied = torch.zeros(24, dtype=torch.float64).index_add(0, tokens[begin + 1 : t + 2], scores.softmax(0))
            yield head, (1 - gate) * known + gate * copied, states[t + 1 + head], int(windows.tokens[m, head + 1])


def loss_of(q, p, entry, weights):
    """One position's loss: q, p over the draft vocabulary."""
    loss = weights.distillation * (p * (p.log() - q.log())).sum()
    if weights.cross_entropy and entry >= 0:
        loss = loss - weights.cross_entropy * q[entry].log()
    return loss - weights.acceptance * torch.minimum(p, q).sum().log() if weights.acceptance else loss


def in_double(speculator, model):
    speculator.double().attach(BareWeights(model))
    return speculator


class BareWeights:
    """A base model's weights in fp64."""

    def __init__(self, model):
        self.embedding_weight, self.output_weight = model.embedding_weight.double(), model.output_weight.double()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("family", POINTERS)
def test_losses_and_gradients_are_those_of_the_formulas_in_double(model, rows, family, name, way, monkeypatch):
    monkeypatch.setattr(passes, "CPU_ROWS", CHUNK)
    monkeypatch.setattr(passes, "GPU_ROWS", CHUNK)
    weights, windows = LOSSES[name], windows_of(rows)
    speculator = tiny_speculator(model, family, n_predict=HEADS)
    counts = torch.tensor(windows.counts, dtype=torch.float32)
    total, _ = head_losses(speculator, windows, model, weights, counts, Arithmetic(torch.float32, way))
    total.backward()
    found = {name: value.grad.clone() for name, value in speculator.named_parameters()}
    speculator.zero_grad()
    in_double(speculator, model)
    teacher, expected = speculator.teacher_weight(BareWeights(model)), 0.0
    for head, q, state, target in said(speculator, model, windows, rows):
        drafted = q if speculator.draft_ids is None else q[speculator.draft_ids]
        entry = int(speculator.draft_targets(torch.tensor([target]))[0])
        expected = expected + weights.heads[head] / counts[head] * loss_of(drafted, (teacher @ state).softmax(-1), entry, weights)
    expected.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    for name, value in speculator.named_parameters():
        assert (found[name] - value.grad).norm() <= 1e-4 * value.grad.norm(), name


@pytest.mark.parametrize("packed", [False, True], ids=["as trained", "packed"])
@pytest.mark.parametrize("family", POINTERS)
def test_what_is_proposed_is_what_is_trained(model, rows, family, packed):
    windows = windows_of(rows)
    tokens, _, states = rows
    speculator = in_double(tiny_speculator(model, family, n_predict=HEADS), model)
    expected = {}
    for head, q, *_ in said(speculator, model, windows, rows):
        expected.setdefault(head, []).append(q)
    speculator = tiny_speculator(model, family, n_predict=HEADS)
    if packed:
        speculator.pack()
    text = tokens[0, :12]  # the first document: its positions stand first, of each depth
    index = [number for number, t in enumerate(windows.index.tolist()) if t < 12]
    roots = windows.index[index] + 1
    context = of_text(speculator, states[0, :12], text, roots)
    state = started(speculator, Stub(states[0, roots - 1], context))
    for head in range(HEADS):
        state = speculator.advance(state, windows.tokens[index, head], head)
        kept = [row for row, number in enumerate(index) if number < windows.counts[head]]
        found = speculator.logits(state, head, context)[kept].exp()
        right = torch.stack([expected[head][index[row]] for row in kept])
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-6)


class Stub:
    """As much of a `Step` as heads start from."""

    def __init__(self, hidden, context):
        self.hidden, self.context = hidden, context


@pytest.mark.parametrize("family", POINTERS)
def test_nothing_is_copied_from_another_document_or_from_what_comes_later(model, rows, family):
    tokens, _, states = rows
    speculator = tiny_speculator(model, family, n_predict=HEADS)
    weights, windows = LOSSES["distillation"], windows_of(rows)
    head_losses(speculator, windows, model, weights, torch.tensor(windows.counts))[0].backward()
    expected = speculator.pointer.key_tokens.weight.grad.clone()
    # The same two documents and the third apart, each a row of its own.
    parted = torch.zeros(3, 30, dtype=torch.int64)
    ids = torch.full((3, 30), -1, dtype=torch.int32)
    alone = torch.zeros(3, 30, states.shape[-1])
    for number, (row, span) in enumerate([(0, slice(0, 12)), (0, slice(12, 30)), (1, slice(0, 24))]):
        length = span.stop - span.start
        parted[number, :length], ids[number, :length], alone[number, :length] = tokens[row, span], 0, states[row, span]
    windows = windows_of((parted, ids, alone))
    speculator.zero_grad()
    head_losses(speculator, windows, model, weights, torch.tensor(windows.counts))[0].backward()
    torch.testing.assert_close(speculator.pointer.key_tokens.weight.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["mlp", "hidden_state", "eagle3"])
def test_heads_that_read_the_text_plan_train_resume_export_evaluate_and_decode(
    tmp_path, config_file, base_model, model_dir, data_dir, capsys, family
):
    config_file(family)
    words, settings = [f"--config={tmp_path / 'run.yaml'}"], ["checkpoint.keep=9"]
    settings += ["speculator.layers=2"] if family == "eagle3" else ["speculator.pointer.width=16"]
    main(scripts.train.Arguments, scripts.train.run, words=[*words, f"--out_dir={tmp_path / 'none'}", "--plan", *settings], overrides=True)
    assert "fits" in capsys.readouterr().out
    trained = []
    for name in ("whole", "resumed"):
        run = [*words, f"--out_dir={tmp_path / name}"]
        main(scripts.train.Arguments, scripts.train.run, words=[*run, *settings], overrides=True)
        if name == "resumed":  # from the step before the last save
            last, *_ = sorted((tmp_path / name / "checkpoints").iterdir(), reverse=True)
            last.rename(tmp_path / "last")
            main(scripts.train.Arguments, scripts.train.run, words=[*run, *settings, "--resume"], overrides=True)
        out = tmp_path / f"speculator_{name}"
        main(scripts.export.Arguments, scripts.export.run, words=[f"--checkpoint={tmp_path / name}", f"--out_dir={out}"])
        trained.append(load_speculator(out, base_model))
    for key, value in trained[0].published_state().items():
        assert torch.equal(value, trained[1].published_state()[key]), key
    assert family == "eagle3" or trained[0].pointer.query_state.weight.any()  # zeros at the start
    places = [f"--base_model={model_dir}", f"--speculator={tmp_path / 'speculator_whole'}", "--dtype=float32"]
    report = tmp_path / "report.json"
    flags = [f"--prompts={data_dir}", "--max_new_tokens=24", "--nodes=5", f"--out={report}"]
    main(scripts.evaluate.Arguments, scripts.evaluate.evaluate, words=[*places, *flags])
    values = json.loads(report.read_text())
    assert values["lossless"] is True and values["tokens_per_forward"] >= 1
    main(scripts.decode.Arguments, scripts.decode.stream, words=[*places, "--prompt=w1 w2 w3", "--max_new_tokens=20", "--temperature=0.9"])
    assert "acceptance length" in capsys.readouterr().out
