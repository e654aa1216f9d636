"""What an export may change: how large the draft vocabulary is, and the layout that is written."""

import io
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import load_speculator, write_config
from safetensors.torch import load_file

import pipelines.export as exports
from data.reader import read_token_counts
from fms_spec.errors import UserError
from pipelines.export import export
from pipelines.train.run import train

KEPT = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir, data_dir):
    """{family: a finished run}; of eagle3 with two layers."""
    place = tmp_path_factory.mktemp("runs")
    settings = {"validation.prompts": 0, "checkpoint.every": 9}
    for family, more in {"hidden_state": {}, "mlp": {}, "eagle3": {"speculator.layers": 2, "speculator.init": "last_layers"}}.items():
        train(write_config(place / f"{family}.yaml", model_dir, data_dir, family, **settings | more), place / family)
    return place


@pytest.mark.parametrize("family", ["hidden_state", "eagle3"])
def test_a_pruned_vocabulary_is_the_most_frequent_tokens_whose_logits_stay_and_its_coverage_is_told(
    runs, tmp_path, base_model, data_dir, capsys, family
):
    whole = load_speculator(export(runs / family, tmp_path / "whole"), base_model)
    pruned = load_speculator(export(runs / family, tmp_path / "pruned", KEPT), base_model)
    written = [token for row in continuations(runs / family) for token in row]
    counts = read_token_counts(data_dir) + torch.bincount(torch.tensor(written), minlength=base_model.vocab_size)
    order = sorted(whole.draft_ids.tolist(), key=lambda token: (token != 0, -counts[token], token))  # 0 is EOS
    assert pruned.draft_ids.tolist() == sorted(order[:KEPT])
    entries = torch.isin(whole.draft_ids, pruned.draft_ids)
    hidden = torch.randn(3, base_model.width)
    state = (hidden, hidden) if family == "hidden_state" else (hidden, None)
    torch.testing.assert_close(pruned.read_out_logits(state, 0), whole.read_out_logits(state, 0)[:, entries])

    shares = [sum(counts[token].item() for token in ids) / counts.sum().item() for ids in (order, order[:KEPT])]
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    assert config["draft_vocab_size"] == KEPT and config["draft_vocab_coverage"] == {
        "counted_tokens": counts.sum().item(), "written_tokens": len(written), "pruned_from": 64,
        "before": pytest.approx(shares[0], abs=1e-6), "share": pytest.approx(shares[1], abs=1e-6),
    }  # fmt: skip
    pattern = r"pruned from 64 to 20 tokens: (.*)% of the ([\d,]+) tokens in the training rows of .*/data and the ([\d,]+) that the base "
    said = re.search(pattern + r"model wrote in .*/continuations are in it, (.*) points fewer than before", capsys.readouterr().out)
    assert [int(number.replace(",", "")) for number in said.group(2, 3)] == [counts.sum() - len(written), len(written)] and written
    assert float(said[1]) == pytest.approx(100 * shares[1], abs=0.01)
    assert float(said[4]) == pytest.approx(100 * (shares[0] - shares[1]), abs=0.02)
    assert said[0] in (tmp_path / "pruned/README.md").read_text()


def continuations(run):
    """Token ids of what the base model wrote for a run, a list for each prompt."""
    shards = sorted((run / "continuations").glob("*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).column("continuation").to_pylist()]


def test_where_a_runs_continuations_are_gone_its_rows_alone_are_counted_and_the_line_says_so(runs, tmp_path, data_dir, capsys):
    run = Path(shutil.copytree(runs / "eagle3", tmp_path / "run"))
    shutil.rmtree(run / "continuations")
    export(run, tmp_path / "pruned", KEPT)
    said = f"training rows of {data_dir} (and none that the base model wrote: {run}/continuations has none) are in it"
    assert said in capsys.readouterr().out
    found = json.loads((tmp_path / "pruned/config.json").read_text())["draft_vocab_coverage"]
    assert found["written_tokens"] == 0 and found["counted_tokens"] == read_token_counts(data_dir).sum()


def test_heads_in_the_layout_of_the_speculators_package_are_read_back_and_held_to_their_base_model(
    runs, tmp_path, base_model, model_dir, other_model_dir
):
    own = load_speculator(export(runs / "eagle3", tmp_path / "own"), base_model)
    out = export(runs / "eagle3", tmp_path / "speculators", layout="speculators")
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["architectures"] == ["Eagle3DraftModel"] and config["speculators_model_type"] == "eagle3" and "model_type" not in config
    assert config["speculators_config"] == {
        "algorithm": "eagle3", "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
        "verifier": {"name_or_path": str(model_dir), "architectures": ["LlamaForCausalLM"]},
    }  # fmt: skip
    section = config["transformer_layer_config"]
    assert section["model_type"] == "llama" and section["num_hidden_layers"] == 2 and "draft_vocab_size" not in section
    assert section["rope_theta"] == 10000.0 and section["rope_scaling"] is None
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2] and config["norm_before_residual"] is False
    assert not any("midlayer" in key or key.startswith("layers.1.hidden_norm") for key in tensors) and "d2t" in tensors
    loaded = load_speculator(out, base_model)
    assert loaded.saved_config() == own.saved_config()
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in loaded.state_dict().items())
    (out / "config.json").write_text(json.dumps(config | {"base_model_fingerprint": "0" * 32}))
    with pytest.raises(UserError, match="was trained for .*fingerprint 000"):
        load_speculator(out, base_model)
    (out / "config.json").write_text(json.dumps(config | {"weights_sha256": {"model.safetensors": "0"}}))
    with pytest.raises(UserError, match="altered since the export"):
        load_speculator(out, base_model)


MISTAKES = {
    "too many": ("hidden_state", {"draft_vocab_size": 65}, "=65: the heads draft from 64 tokens; give at most as many"),
    "no draft vocabulary": ("mlp", {"draft_vocab_size": 8}, "=8: MLPSpeculatorPreTrainedModel has no draft vocabulary to prune"),
    "a layout of no one": ("eagle3", {"layout": "sglang"}, "=sglang: LlamaForCausalLMEagle3 can be .* vllm .SGLang's too., speculators"),
    "a layout of others": ("mlp", {"layout": "speculators"}, "=speculators: MLPSpeculatorPreTrainedModel can be written as vllm"),
}  # fmt: skip


def refused(checkpoint, tmp_path, monkeypatch, message, **choices):
    monkeypatch.setattr(exports, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message) as error:
        export(checkpoint, tmp_path / "speculator", **choices)
    assert "\n" not in str(error.value) and not (tmp_path / "speculator").exists()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_choice_that_can_not_be_is_refused_in_one_line_before_any_weight_is_read(runs, tmp_path, monkeypatch, mistake):
    family, choices, message = MISTAKES[mistake]
    refused(runs / family, tmp_path, monkeypatch, message, **choices)


def change_shard(run, change):
    shard = next((run / "continuations").glob("*.parquet"))
    shard.write_bytes(change(shard.read_bytes()))


def by_another(shard):
    return shard.replace(json.loads(pq.read_schema(io.BytesIO(shard)).metadata[b"made_by"])["base_model"].encode(), b"0" * 32)


LOST = {
    "a damaged shard": (lambda run: change_shard(run, lambda shard: shard[:-40]), "continuations-0.*parquet: cannot be read"),
    "a shard of another base model": (lambda run: change_shard(run, by_another), "continuations-0.*another base model wrote it"),
    "no run.json": (lambda run: (run / "run.json").unlink(), "has no run.json that names them"),
    "no data": (lambda run: name_data(run, dir=str(run / "none")), "counts of the run's prepared data: .*none: no manifest.json"),
    "other data": (lambda run: name_data(run, fingerprint="0"), "holds other data than the run was given"),
    "a record without data": (lambda run: name_data(run, dir=None), "run.json names none"),
}  # fmt: skip


def name_data(run, **changes):
    record = json.loads((run / "run.json").read_text())
    record["inputs"]["data_fingerprint"] = changes.get("fingerprint", record["inputs"]["data_fingerprint"])
    record["config"]["data"]["dir"] = changes.get("dir", record["config"]["data"]["dir"])
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("lost", LOST)
def test_a_vocabulary_is_not_pruned_without_the_counts_of_the_runs_own_data(runs, tmp_path, monkeypatch, lost):
    change, message = LOST[lost]
    run = Path(shutil.copytree(runs / "eagle3", tmp_path / "run"))
    change(run)
    refused(run, tmp_path, monkeypatch, message, draft_vocab_size=KEPT)
