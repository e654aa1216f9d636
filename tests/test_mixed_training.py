"""A run on a mixture of texts and conversations, from its files to its losses: what of each the heads learn to predict."""

import json
from collections import Counter

import pytest
import torch
from conftest import write_config, write_model
from test_chat_training import TEMPLATE

from data.continuations.shard import read_shard
from data.prepare.run import prepare
from data.reader import read_manifest, read_prompts
from fms_spec.speculators.hidden_state import HiddenStateSpeculator
from pipelines.train.run import train

EOS = 0
GENERATOR = torch.Generator().manual_seed(0)


def tokens_of(first, count):
    """Tokens drawn from the thirty from `first` on: 5 for what users say, 35 for answers, 65 for texts."""
    return torch.randint(first, first + 30, (count,), generator=GENERATOR).tolist()


TEXTS = [tokens_of(65, 12 + number) for number in range(20)]
TALKS = [[(tokens_of(5, 7), tokens_of(35, 5 + number % 4)) for _ in range(1 + number % 3)] for number in range(20)]


def spelt(tokens):
    return " ".join(f"w{token - 2}" for token in tokens)


def messages_of(talk):
    return [{"role": role, "content": spelt(said)} for turn in talk for role, said in zip(("user", "assistant"), turn)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, `base`, and twenty texts and twenty conversations, prepared together, `data`."""
    folder = tmp_path_factory.mktemp("both")
    (write_model(folder / "base") / "chat_template.jinja").write_text(TEMPLATE)
    rows = {"texts": [{"text": spelt(text)} for text in TEXTS], "talks": [{"messages": messages_of(talk)} for talk in TALKS]}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "both.yaml").write_text(f"sources: {{{', '.join(f'{name}: {{path: {folder}/{name}.jsonl}}' for name in rows)}}}")
    how = {"tokenizer": str(folder / "base"), "out_dir": str(folder / "data"), "seq_length": 128, "prompt_length": 24}
    prepare(source=str(folder / "both.yaml"), **how)
    return folder


def windows_in(texts, head):
    """How often each run of tokens is in the texts that a head of this number may see: those given to it, and its target behind them."""
    return Counter(tuple(text[at : at + head + 2]) for text in texts for at in range(len(text) - head - 1))


@pytest.mark.parametrize("train_on", ["answers", "last_answer"])
def test_losses_see_texts_whole_and_of_conversations_the_answers_and_then_what_follows_prompts_of_both(
    tmp_path, place, monkeypatch, train_on
):
    seen, of_heads = [], HiddenStateSpeculator.losses

    def noted(heads, windows, *rest):
        seen.append([Counter(map(tuple, windows.tokens[:count, : head + 2].tolist())) for head, count in enumerate(windows.counts)])
        return of_heads(heads, windows, *rest)

    monkeypatch.setattr(HiddenStateSpeculator, "losses", noted)
    changes = {"data.train_on": train_on, "schedule.steps": 4, "schedule.pattern": "[[phase1, 2], [phase2, 2]]", "validation.prompts": 0}
    changes |= {"phase1.batch_size": read_manifest(place / "data")["tables"]["rows-train"]["rows"], "phase1.accumulate": 1}
    changes |= {"phase1.positions": "null", "phase2.batch_size": 20, "phase2.loss.only_accepted": "false", "generation.batch_size": 40}
    train(write_config(tmp_path / "run.yaml", place / "base", place / "data", **changes), tmp_path / "run")

    kept = slice(-1 if train_on == "last_answer" else 0, None)
    prepared = [[*text[1:], EOS] for text in TEXTS] + [[*answer, EOS] for talk in TALKS for _, answer in talk[kept]]
    (shard,) = (tmp_path / "run" / "continuations").glob("continuations-*.parquet")
    written = {row["prompt_id"]: row["continuation"] for row in read_shard(shard)[0].to_pylist()}
    assert [len(step) for step in seen] == [3] * 4
    for head, (*epochs, second, _) in enumerate(zip(*seen)):
        assert epochs == [windows_in(prepared, head)] * 2
        assert second and second <= windows_in(written.values(), head)
    begun = [number for number, text in written.items() if tuple(text[:2]) in seen[2][0]]
    origins = Counter(read_prompts(place / "data").sources[number].split("/")[0] for number in begun)
    assert origins.keys() == {"texts", "talks"} and min(origins.values()) > 3
