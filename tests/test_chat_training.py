"""Training on conversations: what is masked, resumed, validated and continued, on a folder with a chat template's base model."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from chat_templates import unmarked, write_chat_tokenizer
from conftest import EVERY, tiny_speculator, write_config, write_model
from test_training import losses, weights_of

from data.continuations.shard import read_shard
from data.prepare.run import prepare
from data.reader import read_manifest, read_prompts
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.errors import UserError
from fms_spec.losses import LossWeights
from pipelines.cli import main
from pipelines.show.prepared import print_prepared, summary_of
from pipelines.train.run import train
from scripts.inspect_data import Arguments as InspectArguments
from scripts.inspect_data import run

TEMPLATE = unmarked("""{%- for m in messages -%}
{{ ('w1' if m.role == 'user' else 'w2') + ' ' + m.content + ' <eos> ' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'w2 ' }}{% endif -%}""")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("chat") / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory, chat_model):
    """Forty conversations of one to three questions, prepared."""
    folder = tmp_path_factory.mktemp("chats")
    generator = torch.Generator().manual_seed(0)
    text = lambda: " ".join(f"w{word}" for word in torch.randint(3, 94, (7,), generator=generator).tolist())  # noqa: E731
    with open(folder / "chats.jsonl", "w") as file:
        for number in range(40):
            roles = ["user", "assistant"] * (1 + number % 3)
            file.write(json.dumps({"messages": [{"role": role, "content": text()} for role in roles]}) + "\n")
    prepare(source=str(folder / "chats.jsonl"), tokenizer=str(chat_model), out_dir=str(folder / "data"), seq_length=64, held_out=4)
    return folder / "data"


@pytest.fixture
def chat_config(tmp_path, chat_model, chats):
    return lambda **changes: write_config(tmp_path / "run.yaml", chat_model, chats, **changes)


def test_fewer_positions_are_trained_on_the_less_is_asked_for(tmp_path, chat_config):
    tokens = {}
    for asked in ("all", "answers", "last_answer"):
        trainer = train(chat_config(**{"data.train_on": asked, "phase1.positions": "null"}), tmp_path / asked)
        tokens[asked] = trainer.tokens
    assert tokens["all"] > 1.2 * tokens["answers"] > 1.2 * tokens["last_answer"]
    trainer = train(chat_config(**{"phase1.positions": "null"}), tmp_path / "default")
    assert trainer.tokens == tokens["answers"]


def test_a_run_on_conversations_resumed_has_the_bits_of_one_that_was_not_stopped_and_a_cache_changes_nothing(tmp_path, chat_config):
    train(chat_config(), tmp_path / "whole")
    train(chat_config(hidden_state_cache="true"), tmp_path / "cached")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cached")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(max((tmp_path / "part" / "checkpoints").iterdir()))
    train(chat_config(), tmp_path / "part", resume=True)
    assert weights_of(tmp_path / "part", tmp_path) == weights_of(tmp_path / "whole", tmp_path)
    with pytest.raises(UserError, match="holds a run with another data.train_on"):
        train(chat_config(**{"data.train_on": "all"}), tmp_path / "part", resume=True)


def test_phase_2_continues_conversations_of_unequal_lengths_up_to_the_end_of_the_turn(tmp_path, chat_config, chats):
    train(chat_config(**{"generation.max_new_tokens": 60}), tmp_path / "run")
    prompts = {number: tokens.tolist() for number, tokens in enumerate(read_prompts(chats).tokens)}
    found = 0
    for path in (tmp_path / "run" / "continuations").glob("continuations-*.parquet"):
        for row in read_shard(path)[0].to_pylist():
            assert row["prompt"] == prompts[row["prompt_id"]] and row["prompt"][-1] == 4  # w2, which an answer follows
            assert (row["continuation"][-1] == 0) == (row["finish_reason"] == "stop") and 0 not in row["continuation"][:-1]
            found += 1
    assert found and len({len(tokens) for tokens in prompts.values()}) > 1


def test_held_out_conversations_that_validation_finds_no_room_for_are_told_before_the_run_is_there(
    tmp_path, chat_config, chat_model, chats
):
    source, data = str(chats.parent / "chats.jsonl"), tmp_path / "data"
    prepare(source=source, tokenizer=str(chat_model), out_dir=str(data), seq_length=64, held_out=4, seed=10)
    length = max(map(len, read_prompts(data, "held_out").tokens[-2:]))
    assert length > read_prompts(data, limit=4).longest
    changes = {"data.dir": data, "data.prompts": 4, "validation.max_new_tokens": 256 - 3 - length + 1}
    with pytest.raises(UserError, match=f"validation.max_new_tokens .*: with prompts of {length} tokens and 3 heads that is over"):
        train(chat_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("family", EVERY)
def test_a_batch_without_a_token_to_predict_gives_no_loss_and_no_gradient(tiny_models, family):
    base_model = tiny_models.get(0)
    speculator = tiny_speculator(base_model, family)
    tokens, segments = torch.randint(0, 8, (2, 12)), torch.zeros(2, 12, dtype=torch.int32)
    trained = torch.zeros(2, 12, dtype=torch.bool)
    states = base_model.hidden_states(tokens, segments)
    positions = choose_positions(usable_positions(segments, torch.zeros(2, dtype=torch.int64), 4, trained=trained), 5)
    windows = make_windows(states, tokens, positions, 4, segments if speculator.context_width else None)
    loss, parts = speculator.losses(windows, base_model, LossWeights(1.0, 1.0, 0.0, (1.0,) * 4, 1.0), torch.zeros(4))
    loss.backward()
    assert loss == 0 and not parts.any() and all(not weight.grad.any() for weight in speculator.parameters() if weight.grad is not None)


@pytest.mark.parametrize("family", ["hidden_state", "eagle3"])
def test_heads_draft_from_the_tokens_that_are_most_of_the_answers(tmp_path, chat_model, family):
    source, data = tmp_path / "chats.jsonl", tmp_path / "data"
    with open(source, "w") as file:
        for number in range(20):
            asked, said = (
                " ".join(f"w{first + (number + word * step) % 10}" for word in range(9)) for first, step in ((10, number % 7), (50, 1))
            )
            file.write(json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}) + "\n")
    prepare(source=str(source), tokenizer=str(chat_model), out_dir=str(data), seq_length=64, held_out=2)
    asked, said = (set(range(first + 2, first + 12)) for first in (10, 50))  # the tokens of w10 to w19, and of w50 to w59
    drafted = {}
    for train_on in ("null", "all"):
        changes = {"speculator.draft_vocab_size": 18, "data.train_on": train_on}
        config = write_config(tmp_path / "run.yaml", chat_model, data, family, **changes)
        drafted[train_on] = {*train(config, tmp_path / train_on).speculator.draft_ids.tolist()}
    assert said < drafted["null"] and len(drafted["null"] & asked) < len(drafted["all"] & asked)


def test_a_run_says_in_four_lines_what_it_is_trained_on(tmp_path, chat_config, chats, capsys, data_dir):
    train(chat_config(), tmp_path / "run")
    printed = capsys.readouterr().out
    lines = summary_of(chats, "answers")
    assert len(lines) == 4 and "\n".join(lines) + "\n" in printed
    assert "phase 1 trains on: answers" in printed and "40 conversations of " in printed and "left out: nothing" in printed
    assert "chat template: the tokenizer's own (sha256 " in printed
    assert "100.0% of them trained on" in " ".join(summary_of(data_dir)) and len(summary_of(data_dir)) == 4


def test_a_folder_is_looked_at_and_a_row_of_it_shown_with_what_is_trained_on_in_colour(tmp_path, chats, data_dir, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for folder in (chats, data_dir):
        print_prepared(folder)
        printed = capsys.readouterr().out
        assert "row 0" in printed and "row 2" in printed and "row 3" not in printed
        assert "tokens of a document's piece in a row: median" in printed and "tokens of a prompt" in printed
    print_prepared(chats, row=3)
    printed = capsys.readouterr().out
    assert "row 3" in printed and "row 0" not in printed and "\x1b[32m" in printed and "\x1b[2m" in printed
    with pytest.raises(UserError, match=f"--row=9999: .*has rows 0 to {read_manifest(chats)['tables']['rows-train']['rows'] - 1}"):
        print_prepared(chats, row=9999)


class Page(HTMLParser):
    """What a page shows, and the classes of each of its pieces, by what the styles of the classes say."""

    def __init__(self, text):
        super().__init__()
        self.shown, self.open, self.tags = [], [], set()
        self.styles = dict(re.findall(r"\.(r\d+) {(.*?)}", text))
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open += [dict(attributes).get("class")] if tag == "span" else []

    def handle_endtag(self, tag):
        self.open = self.open[:-1] if tag == "span" else self.open

    def handle_data(self, data):
        self.shown.append((data, self.styles[self.open[-1]] if self.open else ""))


def test_the_same_is_one_page_that_needs_no_other_file(tmp_path, chats, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    print_prepared(chats)
    told = capsys.readouterr().out
    run(InspectArguments(data=str(chats), html=str(tmp_path / "page.html")))
    assert capsys.readouterr().out.split() == [str(tmp_path / "page.html")]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "".join(data for data, _ in page.shown).split()[-len(told.split()) :] == told.split()
    assert page.tags <= {"html", "head", "meta", "title", "style", "body", "pre", "span"} and "http" not in text and "url(" not in text
    colours = {style.partition(";")[0] for _, style in page.shown}
    assert {"color: #008000", "color: #008080", "color: #7f7f7f"} <= colours
    run(InspectArguments(data=str(chats), row=3, html=str(tmp_path / "row.html")))
    assert "row 3" in (tmp_path / "row.html").read_text() and "row 0" not in (tmp_path / "row.html").read_text()


def test_what_cannot_be_looked_at_is_told_in_one_line_and_no_page_is_left(tmp_path, chats, capsys):
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "empty").mkdir()
    for words, said in {
        f"{tmp_path / 'empty'}": "empty: no manifest.json, so it is half-written or not prepared; run scripts.prepare_data",
        f"{tmp_path / 'nowhere'}": "nowhere: no manifest.json",
        f"{tmp_path / 'there.html'}": "there.html: no manifest.json",
        f"{chats} --row=9999": "--row=9999: ",
        f"{chats} --row=-1": "--row: ",
        f"{chats} --row=two": "--row: ",
        f"{chats} --html={tmp_path / 'there.html'}": "there.html exists already; give another --html",
        f"{chats} --html={tmp_path / 'nowhere' / 'page.html'}": "page.html: no such folder to write to; make it, or give another --html",
        f"{chats} --html={tmp_path / 'page.html'} --tokenizer={tmp_path / 'gone'}": "gone: no such folder",
        "": "--data is required",
    }.items():
        with pytest.raises(SystemExit):
            main(InspectArguments, run, words=words.split(), computes=False)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line
    assert (tmp_path / "there.html").read_text() == "mine" and not (tmp_path / "page.html").exists()


def test_what_a_terminal_would_obey_is_shown_and_not_handed_on(tmp_path, capsys):
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("yes \x1b[2J no \x9b1m" * 9)
    prepare(source=str(tmp_path / "text.txt"), tokenizer=tokenizer, out_dir=str(tmp_path / "data"), seq_length=32, prompt_length=4)
    print_prepared(tmp_path / "data")
    printed = capsys.readouterr().out
    assert "yes ␛[2J no �1m" in printed and "\x1b[2J" not in printed and "\x9b" not in printed


def test_a_base_model_that_does_not_stop_where_answers_end_is_refused_before_it_writes_any(tmp_path, chat_config, chat_model):
    shutil.copytree(chat_model, tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(UserError, match="stops at w5, and answers end with <eos>; add it to eos_token_id"):
        train(chat_config(**{"base_model.name": tmp_path / "other"}), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
