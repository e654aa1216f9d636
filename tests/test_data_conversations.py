"""Conversations of every spelling and kind of file become the same rows, and a mistake in one is named by file, row and field."""

import gzip
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_templates import CHATML, LLAMA3, unmarked, write_chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from data.manifest import data_fingerprint
from data.parquet import shard_entry
from data.prepare.documents import pack_whole
from data.prepare.encoding import Encoded
from data.prepare.rows import Conversation, Wanted
from data.prepare.run import prepare
from data.prepare.sources import open_source
from data.prompts import load_prompts
from data.reader import RowReader, read_manifest, read_prompts, read_token_counts
from fms_spec.errors import UserError
from pipelines.show.prepared import summary_of

USER, ASSISTANT = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
SYSTEM = {"role": "system", "content": "w0"}
TALK = [USER, ASSISTANT, {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "w1"}}}]}
RESULT = {"role": "tool", "content": "w9", "tool_call_id": "7"}
SPELT = {"type": "function", "function": {"name": "look", "arguments": '{"at": "w1"}'}}


def sharegpt(*turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]


def contents_in(source, format=None):
    """What a source gives, in the order of the labels."""
    opened = open_source(str(source), Wanted(format=format))
    found = [(opened.label(document.file, document.row), document.content) for document in opened.documents(np.random.default_rng(0))]
    return [content for _, content in sorted(found, key=lambda pair: pair[0])]


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"messages": TALK, "prompt": "w1", "prompt_id": "x"}, Conversation(TALK)),
        ({"messages": [SYSTEM, *TALK], "tools": None}, Conversation([SYSTEM, *TALK])),
        ({"messages": [USER, CALL, RESULT, ASSISTANT], "tools": TOOLS}, Conversation([USER, CALL, RESULT, ASSISTANT], TOOLS)),
        (
            {"messages": [USER, CALL | {"content": None, "tool_calls": [SPELT]}], "tools": json.dumps(TOOLS)},
            Conversation([USER, CALL], TOOLS),
        ),
        ({"messages": json.dumps(TALK)}, Conversation(TALK)),
        ({"messages": TALK, "system": "w0"}, Conversation([SYSTEM, *TALK])),
        ({"messages": [USER, ASSISTANT | {"tool_calls": []}]}, Conversation(TALK[:2])),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "w"}, {"type": "text", "text": "1"}]}, ASSISTANT]},
            Conversation(TALK[:2]),
        ),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "w5"}]}, Conversation([USER, ASSISTANT | {"reasoning_content": "w5"}])),
        ({"conversations": sharegpt(("human", "w1"), ("gpt", "w2"), ("human", "w3"), ("gpt", "w4"))}, Conversation(TALK)),
        ({"conversations": sharegpt(("system", "w0"), ("user", "w1"), ("assistant", "w2"))}, Conversation([SYSTEM, *TALK[:2]])),
        ({"conversations": sharegpt(("human", "w1"), ("gpt", "w2")), "system": "w0"}, Conversation([SYSTEM, *TALK[:2]])),
        ({"conversations": TALK, "id": 3}, Conversation(TALK)),
        ({"id": "1", "data": ["w1", "w2", "w3", "w4"]}, Conversation(TALK)),
        ({"instruction": "w1", "input": "", "output": "w2"}, Conversation(TALK[:2])),
        ({"instruction": "w1", "output": "w2", "system": "w0"}, Conversation([SYSTEM, *TALK[:2]])),
        (
            {"instruction": "w1", "input": "w2", "output": "w3"},
            Conversation([USER | {"content": "w1\n\nw2"}, ASSISTANT | {"content": "w3"}]),
        ),
        ({"prompt": "w1", "completion": "w2"}, Conversation(TALK[:2])),
        ({"prompt": TALK[:3], "completion": TALK[3:]}, Conversation(TALK)),
        ({"messages": TALK, "category": "math"}, Conversation(TALK, None, "math")),
        ({"instruction": "w1", "output": "w2", "category": 3}, Conversation(TALK[:2], None, "3")),
        ({"prompt": "w1", "completion": "w2", "category": ""}, Conversation(TALK[:2])),
        ({"messages": TALK, "category": 3.0}, Conversation(TALK, None, "3")),
        ({"messages": TALK, "category": 0.5}, Conversation(TALK, None, "0.5")),
        ({"messages": TALK, "category": float("nan")}, Conversation(TALK)),
    ],
)
def test_a_conversation_is_told_by_its_columns_in_every_kind_of_file(tmp_path, row, conversation):
    line = json.dumps(row) + "\n"
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "b.json").write_text(json.dumps([row], indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(pa.compress(line.encode(), "zstd", asbytes=True))
    assert contents_in(tmp_path) == [conversation] * 4
    if any(isinstance(turn.get("content"), list) for turn in row.get("messages", []) if isinstance(turn, dict)):
        return  # a column of Arrow holds texts or lists
    table = pa.Table.from_pylist([row])
    pq.write_table(table, tmp_path / "e.parquet")
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert contents_in(tmp_path) == [conversation] * 6


def test_fields_that_arrow_gives_every_turn_are_not_there_where_they_are_null(tmp_path):
    rows = [{"messages": [USER, CALL, RESULT, ASSISTANT], "tools": TOOLS}, {"messages": [USER, ASSISTANT | {"thinking": "w5"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert contents_in(tmp_path) == [Conversation(rows[0]["messages"], TOOLS), Conversation(rows[1]["messages"])]


def test_a_row_with_columns_of_two_kinds_is_read_as_the_one_that_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w7", "messages": TALK, "instruction": "w1", "output": "w2"}))
    with pytest.raises(UserError, match="a.jsonl:1: its columns are those of text and of messages and of alpaca; say which with --format="):
        open_source(str(tmp_path))
    assert contents_in(tmp_path, "text") == ["w7"]
    assert contents_in(tmp_path, "messages") == [Conversation(TALK)]
    assert contents_in(tmp_path, "alpaca") == [Conversation(TALK[:2])]
    with pytest.raises(UserError, match="no column 'conversations'"):
        open_source(str(tmp_path), Wanted(format="sharegpt"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "w1"}, "a.jsonl:2: messages: not a line of JSON"),
        ({"messages": None}, "a.jsonl:2: messages: nothing, not a list"),
        ({"messages": {"role": "user"}}, "a.jsonl:2: messages: an object, not a list"),
        ({"messages": ["w1"]}, 'a.jsonl:2: messages[0]: a text, not a message with "role" and "content"'),
        ({"messages": [USER, {"content": "w1"}]}, "a.jsonl:2: messages[1]: an object, not a message"),
        ({"messages": [{"role": "robot", "content": "w1"}]}, "a.jsonl:2: messages[0].role: 'robot' is none of system, developer, user"),
        ({"messages": [{"role": 3, "content": "w1"}]}, "a.jsonl:2: messages[0].role: 3 is none of"),
        ({"messages": [USER | {"content": 3}]}, "a.jsonl:2: messages[0].content: a number, not a text"),
        ({"messages": [USER | {"content": None}]}, "a.jsonl:2: messages[0].content: nothing, not a text"),
        ({"messages": [{"role": "user"}]}, "a.jsonl:2: messages[0].content: missing"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "a.jsonl:2: messages[0].content[0].type: 'image_url', and only text"),
        ({"messages": [USER, CALL | {"tool_calls": [{"id": "1"}]}]}, "a.jsonl:2: messages[1].tool_calls[0]: an object, not a call"),
        (
            {"messages": [USER, CALL | {"tool_calls": [{"function": {"name": "look", "arguments": "{"}}]}]},
            "a.jsonl:2: messages[1].tool_calls[0]: its arguments: not a line of JSON",
        ),
        ({"messages": TALK, "category": ["math"]}, "a.jsonl:2: category: a list, not a text"),
        ({"messages": TALK, "tools": "look"}, "a.jsonl:2: tools: not a line of JSON"),
        ({"messages": TALK, "tools": ["look"]}, "a.jsonl:2: tools[0]: a text, not the JSON schema of a function"),
        ({"conversations": TALK}, "a.jsonl:2: no column 'messages'"),
    ],
)
def test_a_mistake_in_a_conversation_is_named_by_file_row_and_field(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        contents_in(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": sharegpt(("robot", "w1"))}, "a.json item 1: conversations[0].from: 'robot' is none of"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "a.json item 1: conversations[0].value: a number, not a text"),
        ({"conversations": [{"from": "human"}]}, "a.json item 1: conversations[0].value: missing"),
        ({"data": ["w1", None]}, "a.json item 1: data[1]: nothing, not a text"),
        ({"instruction": "w1", "output": None}, "a.json item 1: output: nothing, not a text"),
        ({"prompt": "w1", "completion": ["w2"]}, "a.json item 1: completion[0]: a text, not a message"),
        ({"prompt": 1, "completion": "w2"}, "a.json item 1: prompt: a number, not a text"),
    ],
)
def test_a_mistake_in_the_other_spellings_is_named_too(tmp_path, row, message):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(UserError) as caught:
        contents_in(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    try:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    except pa.ArrowInvalid:
        return
    with pytest.raises(UserError, match="a.parquet row 1: "):
        contents_in(tmp_path / "a.parquet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat") / "t", unmarked(CHATML))


def answered(number):
    """A conversation of two questions that can be told by its words."""
    texts = [f"hello {number}", f"yes {number}", "and now", f"no {number}"]
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


def prepared(tmp_path, tokenizer, rows, out="prepared", **settings):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"seq_length": 64} | settings
    prepare(source=str(tmp_path / "chats.jsonl"), tokenizer=tokenizer, out_dir=str(tmp_path / out), **settings)
    return tmp_path / out


CHATS = [{"messages": answered(number)} for number in range(30)]


def test_one_command_is_enough_and_the_manifest_says_what_was_left_out_and_by_which_template(tmp_path, tokenizer):
    rows = [
        *CHATS,
        *CHATS[:2],
        {"messages": []},
        {"messages": answered(0)[:1]},
        {"messages": [USER, {"role": "assistant", "content": "\n\nyes"}]},
    ]
    manifest = read_manifest(prepared(tmp_path, tokenizer, rows, held_out=3))
    skipped = {"copies": 2, "empty": 1, "without an answer": 1, "which tokens are the assistant's is not sure": 1}
    assert manifest["source"]["skipped"] == skipped and manifest["source"]["documents_read"] == 30
    assert manifest["source"]["first_skipped"] == "chats.jsonl#32 (empty)"
    assert manifest["inputs"]["format_version"] == 2 and manifest["inputs"]["prompt_length"] == 1024
    assert manifest["chat_template"]["templates"] == {"default": unmarked(CHATML)}
    assert 0 < manifest["tables"]["rows-train"]["answer_tokens"] < manifest["tables"]["rows-train"]["tokens"]


def test_a_template_that_takes_no_conversation_ends_in_one_line_that_says_why(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('not these') }}")
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, tokenizer, CHATS, chat_template=str(tmp_path / "t.jinja"))
    assert "no documents; skipped 30 documents (30 refused by the chat template), the first is chats.jsonl#" in str(caught.value)
    assert "not these" in str(caught.value) and not (tmp_path / "prepared").exists()


def test_texts_take_no_template_and_conversations_beside_texts_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds texts, which need none; leave it out"):
        prepared(tmp_path, tokenizer, [{"text": "w1"}], chat_template="t.jinja")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "both" / "b.jsonl").write_text(json.dumps(CHATS[0]))
    with pytest.raises(UserError, match="b.jsonl: holds conversations, and .*a.jsonl beside it texts; prepare them apart"):
        open_source(str(tmp_path / "both"))
    (tmp_path / "a.txt").write_text("w1")
    with pytest.raises(UserError, match="a.txt: is one text, and --format=alpaca asks for tables"):
        open_source(str(tmp_path / "a.txt"), Wanted(format="alpaca"))
    with pytest.raises(UserError, match="--format=chat: not known; give one of text, messages, sharegpt"):
        prepared(tmp_path, tokenizer, CHATS, format="chat")
    with pytest.raises(UserError, match="--text_column=body: --format=messages reads columns of its own; leave one of the two out"):
        prepared(tmp_path, tokenizer, CHATS, format="messages", text_column="body")


def read(folder, train_on=None):
    """{row: [texts of the tokens that are trained on, run by run]} and the batch, of a whole folder."""
    count = read_manifest(folder)["tables"]["rows-train"]["rows"]
    batch = next(RowReader(folder, batch_size=count, seed=0, train_on=train_on))
    served = AutoTokenizer.from_pretrained(folder.parent / "served")
    runs = []
    for tokens, trained in zip(batch.tokens, batch.trained):
        edges = torch.cat([trained[:1], trained[1:] != trained[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0].tolist()
        runs.append([served.decode(tokens[a:b]) for a, b in pairwise(edges) if trained[a]])
    return runs, batch


def test_the_mask_of_a_row_is_its_answers_or_the_last_of_each_conversation_or_all(tmp_path, tokenizer):
    write_chat_tokenizer(tmp_path / "served")
    folder = prepared(tmp_path, tokenizer, CHATS, seq_length=2048 // 4)
    runs, batch = read(folder)
    told = [text for row in runs for text in row]
    whole = [text for text in told if text.endswith("<|im_end|>")]
    assert {text.split()[0] for text in whole} == {"yes", "no"} and len(told) - len(whole) <= 2 * len(runs)
    last, _ = read(folder, "last_answer")
    assert [text for row in last for text in row if text.endswith("<|im_end|>")] == [text for text in whole if text.startswith("no")]
    assert next(RowReader(folder, batch_size=1, seed=0, train_on="all")).trained is None
    assert batch.trained.shape == batch.tokens.shape and batch.trained.dtype == torch.bool


def test_texts_are_trained_on_whole_and_have_no_answers_to_ask_for(data_dir):
    assert (
        next(RowReader(data_dir, batch_size=1, seed=0)).trained is None
        and next(RowReader(data_dir, batch_size=1, seed=0, train_on="all")).trained is None
    )
    assert read_manifest(data_dir)["inputs"]["format_version"] == 1
    with pytest.raises(UserError, match="holds texts, which have no answers to train on; leave data.train_on: answers out"):
        RowReader(data_dir, batch_size=1, seed=0, train_on="answers")


def test_prompts_end_where_any_of_the_answers_begins_within_the_limit(tmp_path, tokenizer):
    whole = read_prompts(prepared(tmp_path, tokenizer, CHATS))
    lengths = {len(tokens) for tokens in whole.tokens}
    assert len(whole) == 30 and len(lengths) > 1 and whole.longest == max(lengths)
    short = read_prompts(prepared(tmp_path, tokenizer, CHATS, out="short", prompt_length=min(lengths) + 2))
    assert len(short) == 30 and short.longest <= min(lengths) + 2
    with pytest.raises(UserError, match="--prompt_length=3: no conversation comes to an answer within so many tokens; raise it"):
        prepared(tmp_path, tokenizer, CHATS, out="none", prompt_length=3)
    with pytest.raises(
        UserError, match="--held_out=5: only 0 different documents have a prompt of at most 3 tokens; lower --held_out or raise"
    ):
        prepared(tmp_path, tokenizer, CHATS, out="none", prompt_length=3, held_out=5)


@pytest.mark.parametrize("begun", [False, True], ids=["plain", "begun"])
def test_an_answer_that_nothing_comes_before_has_no_prompt(tmp_path, begun):
    folder = write_chat_tokenizer(tmp_path / "t", "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}")
    if begun:  # as texts are, and no conversation by this template
        begin_texts(folder)
    rows = [{"messages": answered(number)[1 : 4 if number < 10 else 2]} for number in range(30)]
    chats = prepared(tmp_path, folder, rows, held_out=8)
    for split, count in (("train", 2), ("held_out", 8)):
        prompts = read_prompts(chats, split)
        assert prompts.turns == [2] * count and all(map(len, prompts.tokens))


def test_a_prompt_says_which_answer_it_asks_for_and_what_its_row_says_it_is(tmp_path, tokenizer):
    rows = [row | ({"category": f"kind {number % 3}"} if number % 3 else {}) for number, row in enumerate(CHATS)]
    folder = prepared(tmp_path, tokenizer, rows, held_out=8)
    kept = [None, "kind 1", "kind 2"]
    for split, count in (("train", 22), ("held_out", 8)):
        prompts = read_prompts(folder, split)
        assert len(prompts) == count and {*prompts.turns} == {1, 2}
        assert prompts.categories == [kept[int(source.rpartition("#")[2]) % 3] for source in prompts.sources]
        begun = AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids("<|im_start|>")
        assert [(tokens == begun).sum() for tokens in prompts.tokens] == [2 * turn for turn in prompts.turns]
    held_out = read_prompts(folder, "held_out")
    loaded = load_prompts(folder, tokenizer)
    assert [(prompt.category, prompt.first_turn) for prompt in loaded] == list(zip(held_out.categories, held_out.turns))
    assert {(prompt.role, prompt.source) for prompt in loaded} == {("user", None)}
    assert len(load_prompts(folder, tokenizer, limit=1)) == len({*held_out.categories})


def test_a_prompt_says_whose_message_its_answer_follows_where_that_was_kept(tmp_path, tokenizer):
    looked_up = [answered(0)[0], {"role": "assistant", "content": "look"}, {"role": "tool", "content": "42."}, ASSISTANT]
    rows = [{"messages": [looked_up[0] | {"content": f"hello {number}"}, *looked_up[1:]]} for number in range(30)]
    folder = prepared(tmp_path, tokenizer, rows)
    prompts = read_prompts(folder)
    assert {*zip(prompts.turns, prompts.roles)} == {(1, "user"), (2, "tool")}
    path, manifest = folder / "prompts-train-00000.parquet", json.loads((folder / "manifest.json").read_text())
    pq.write_table(pq.read_table(path).drop_columns("role"), path)
    manifest["tables"]["prompts-train"]["shards"] = [shard_entry(path, len(prompts))]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = read_prompts(folder)
    assert before.roles == [None] * 30 and before.turns == prompts.turns


def test_a_category_that_utf8_cannot_spell_has_a_mark_in_its_place(tmp_path, tokenizer):
    prompts = read_prompts(prepared(tmp_path, tokenizer, [row | {"category": "kind \ud800"} for row in CHATS]))
    assert {*prompts.categories} == {"kind \ufffd"}


def test_conversations_of_several_sources_are_of_the_category_of_their_row_or_else_of_their_source(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row | {"category": "sums"}) + "\n" for row in CHATS[:15]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS[15:]))
    (tmp_path / "m.yaml").write_text(f"sources: {{first: {{path: {tmp_path}/a.jsonl}}, second: {{path: {tmp_path}/b.jsonl}}}}")
    prepare(source=str(tmp_path / "m.yaml"), tokenizer=tokenizer, out_dir=str(tmp_path / "out"), seq_length=64)
    assert Counter(read_prompts(tmp_path / "out").categories) == {"sums": 15, "second": 15}
    lines = summary_of(tmp_path / "out")
    assert len(lines) == 4 and "(first " in lines[1] and ", second " in lines[1]


def test_tokens_are_counted_by_what_is_trained_on_and_all_where_that_was_not_counted(tmp_path, tokenizer, data_dir):
    folder = prepared(tmp_path, tokenizer, CHATS)
    every = next(RowReader(folder, batch_size=read_manifest(folder)["tables"]["rows-train"]["rows"], seed=0))
    every = every.tokens[every.segment_ids >= 0].bincount(minlength=len(read_token_counts(folder)))
    assert read_token_counts(folder).equal(every)
    for asked in ("answers", "last_answer"):
        batch = next(RowReader(folder, batch_size=read_manifest(folder)["tables"]["rows-train"]["rows"], seed=0, train_on=asked))
        assert read_token_counts(folder, asked).equal(batch.tokens[batch.trained].bincount(minlength=len(every)))
    assert read_token_counts(folder, None).equal(read_token_counts(folder, "answers")) and not read_token_counts(folder, None).equal(every)
    path, manifest = folder / "token_counts.parquet", json.loads((folder / "manifest.json").read_text())
    pq.write_table(pq.read_table(path, columns=["token", "count"]), path)
    manifest["tables"]["token_counts"]["shards"] = [shard_entry(path, len(every))]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_token_counts(folder, None).equal(every)
    assert read_token_counts(data_dir, None).equal(read_token_counts(data_dir))
    with pytest.raises(UserError, match="holds texts, which have no answers to train on"):
        read_token_counts(data_dir, "answers")


def test_the_same_conversations_give_the_same_bytes_and_another_template_another_set(tmp_path, tokenizer):
    first = prepared(tmp_path, tokenizer, CHATS)
    again = prepared(tmp_path, tokenizer, CHATS, out="again")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {path.name: path.read_bytes() for path in again.iterdir()}
    (tmp_path / "t.jinja").write_text(LLAMA3)
    with pytest.raises(UserError, match="prepared with another chat_template"):
        prepared(tmp_path, tokenizer, CHATS, chat_template=str(tmp_path / "t.jinja"))
    other = prepared(tmp_path, tokenizer, CHATS, out="other", chat_template=str(tmp_path / "t.jinja"))
    assert data_fingerprint(other) != data_fingerprint(first)


def begin_texts(folder):
    """Have a tokenizer put <s> before texts; returns it as it is served."""
    served = AutoTokenizer.from_pretrained(folder)
    served.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    served.save_pretrained(folder)
    return served


def test_a_beginning_of_text_stands_once_before_conversations_and_only_where_the_template_has_it(tmp_path):
    folder = write_chat_tokenizer(tmp_path / "t", unmarked(CHATML))
    served = begin_texts(folder)
    for number, (begin, first) in enumerate((("", "<|im_start|>"), ("{{ bos_token }}", "<s>"))):
        (tmp_path / "t.jinja").write_text(begin + unmarked(CHATML))
        out = prepared(tmp_path, folder, CHATS, out=f"{number}", chat_template=str(tmp_path / "t.jinja"), max_tokens=640)
        batch = next(RowReader(out, batch_size=5, seed=0))
        bos = served.convert_tokens_to_ids("<s>")
        starts = sum(len(segments[segments >= 0].unique()) for segments in batch.segment_ids)
        assert (batch.tokens[batch.segment_ids >= 0] == bos).sum() == (starts if begin else 0)
        prompts = read_prompts(out).tokens
        assert {served.convert_ids_to_tokens(tokens[0].item()) for tokens in prompts} == {first}
        expected = served.apply_chat_template(answered(3), chat_template=begin + unmarked(CHATML))["input_ids"]
        assert any(expected[: len(tokens)] == tokens.tolist() for tokens in prompts)


spans = st.lists(st.tuples(st.integers(0, 19), st.integers(1, 5)), max_size=3)
encoded_documents = st.lists(st.tuples(st.integers(1, 20), spans, st.booleans()), min_size=1, max_size=12)


@given(encoded_documents, st.integers(3, 12), st.sampled_from([[], [900], [900, 901]]), st.sampled_from([0, 2, 64]))
def test_conversations_are_packed_whole_where_a_row_holds_them_and_their_answers_stay_on_their_tokens(drawn, seq_length, prefix, open_rows):
    documents, first = [], 1
    for length, spans, prefixed in drawn:
        answers = sorted((-1, start, min(length, start + size)) for start, size in spans if start < length)
        documents.append(Encoded(np.arange(first, first + length, dtype=np.int32), np.array(answers, np.int32).reshape(-1, 3), prefixed))
        first += length
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("data.prepare.documents.OPEN_ROWS", open_rows)
        rows = list(pack_whole(documents, seq_length, prefix))
    assert sorted(token for row in rows for token in row.tokens[row.own].tolist()) == list(range(1, first))
    answered, last = Counter(), Counter()
    for row in rows:
        assert not row.own[seq_length - row.room :].any()
        for start, end, is_last in row.answers:
            answered.update(row.tokens[start:end].tolist())
            last.update(row.tokens[start:end].tolist() if is_last else [])
            assert row.own[start:end].all()
    for tokens, answers, prefixed in documents:
        within = [row for row in rows if np.isin(tokens, row.tokens[row.own]).any()]
        assert len(within) == 1 or len(prefix) * prefixed + len(tokens) > seq_length
        for token in tokens.tolist():
            spans = [token - tokens[0] in range(start, end) for _, start, end in answers.tolist()]
            assert answered[token] == sum(spans) and last[token] == (spans[-1] if spans else 0)
    assert {row.tokens[start] for row in rows for start in row.starts if not row.own[start]} <= {*prefix[:1]}


def test_nested_columns_are_read_in_every_spelling_of_arrow(tmp_path):
    for number, text in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        turn = pa.struct({"role": text, "content": text})
        for many in (pa.list_(turn), pa.large_list(turn)):
            table = pa.table({"messages": pa.array([TALK, TALK[:2]], many)})
            pq.write_table(table, tmp_path / f"{number}.parquet")
            assert contents_in(tmp_path / f"{number}.parquet") == [Conversation(TALK), Conversation(TALK[:2])]


def test_a_hub_dataset_gives_no_nulls_in_the_place_of_fields_that_a_turn_has_not(monkeypatch):
    import datasets

    class Builder:
        def as_streaming_dataset(self, split):
            calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "w1", "to": None}}}]
            turns = [USER | {"tool_calls": None}, CALL | {"tool_calls": calls}, RESULT, ASSISTANT | {"tool_call_id": None}]
            return iter([{"messages": turns, "tools": [TOOLS[0] | {"strict": None}]}, {"messages": TALK, "tools": None}])

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder())
    contents = [document.content for document in open_source("a/b").documents(None)]
    assert contents == [Conversation([USER, CALL, RESULT, ASSISTANT], TOOLS), Conversation(TALK)]


def test_a_hub_dataset_of_conversations_is_streamed(tmp_path, tokenizer, monkeypatch):
    import datasets

    class Builder:
        hash = "commit"

        def as_streaming_dataset(self, split):
            return iter(CHATS + [{"messages": [USER, {"role": "robot", "content": "w1"}]}] * with_robot)

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder())
    with_robot = 0
    manifest = prepare(source="a/b", tokenizer=tokenizer, out_dir=str(tmp_path / "out"), seq_length=64)
    assert manifest["source"]["documents_read"] == 30 and set(read_prompts(tmp_path / "out").sources) == {f"a/b#{n}" for n in range(30)}
    with_robot = 1
    with pytest.raises(UserError, match=r"a/b row 30: messages\[1\].role: 'robot' is none of"):
        prepare(source="a/b", tokenizer=tokenizer, out_dir=str(tmp_path / "no"), seq_length=64)
    assert not (tmp_path / "no").exists()
