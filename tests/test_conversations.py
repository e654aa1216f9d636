"""Conversations that the base model writes, questions included, and given ones whose answers it writes anew, turn by turn."""

import json
import shutil
from datetime import date, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_templates import CHATML, TEMPLATES, unmarked, write_chat_tokenizer
from conftest import WORDS, write_model
from forked import Command
from test_chat_training import TEMPLATE
from transformers import AutoTokenizer, LlamaForCausalLM

import data.prepare.chat
from data.continuations.turns import Dialogue, Turns, own_dialogues, rewritten
from data.prepare.chat import ChatTemplate
from data.prepare.rows import Conversation
from data.prepare.run import prepare
from data.reader import RowReader
from data.tokenizer import load_tokenizer
from fms_spec.errors import UserError
from pipelines.generate.engines import EmbeddedEngine
from scripts.generate_conversations import Arguments, run

CONVERSATION = [
    {"role": "user", "content": "hello world"},
    {"role": "assistant", "content": "yes no 42."},
    {"role": "user", "content": "maybe"},
    {"role": "assistant", "content": "hello  42."},
]


def template_of(folder, text, pieces=False):
    return ChatTemplate(load_tokenizer(write_chat_tokenizer(folder, unmarked(text), pieces)))


def ids_of(template, messages, **how):
    return template.served.apply_chat_template(messages, return_dict=False, **how)


@pytest.mark.parametrize("pieces", [False, True], ids=["bytes", "pieces"])
@pytest.mark.parametrize("name", sorted({*TEMPLATES} - {"headings", "channels", "qwen3"}))
def test_a_model_that_writes_what_a_template_would_has_its_conversation_taken_word_for_word(tmp_path, name, pieces):
    template = template_of(tmp_path, TEMPLATES[name], pieces)
    turns, (dialogue,) = Turns(template, ["user", "assistant"]), own_dialogues(1, 2)
    for number, message in enumerate(CONVERSATION):
        prompt = turns.prompt(dialogue)
        if message["role"] == "assistant":
            assert prompt == ids_of(template, CONVERSATION[:number], add_generation_prompt=True)
        whole = ids_of(template, CONVERSATION[: number + 1])
        assert whole[: len(prompt)] == prompt
        turns.take(dialogue, whole[len(prompt) :])
        assert dialogue.ended is None and dialogue.messages[: number + 1] == CONVERSATION[: number + 1]
    assert dialogue.next is None and dialogue.answered == CONVERSATION


def test_what_a_template_would_not_write_so_is_no_answer(tmp_path):
    for name, why in (("channels", "special tokens within"), ("qwen3", "not written so by the chat template")):
        template = template_of(tmp_path / name, TEMPLATES[name])
        thought = [CONVERSATION[0], CONVERSATION[1] | {"reasoning_content": "maybe"}]
        turns, dialogue = Turns(template, ["assistant"]), rewritten(Conversation(thought))
        prompt = turns.prompt(dialogue)
        turns.take(dialogue, ids_of(template, thought)[len(prompt) :])
        assert dialogue.ended == why and dialogue.answered == []
    with pytest.raises(UserError, match="ends no turn of the user's with a special token.*--chat_template=FILE"):
        Turns(template_of(tmp_path / "headings", TEMPLATES["headings"]), ["user"])


def test_thoughts_that_a_template_takes_from_an_answer_are_left_out_of_the_next_prompt_as_it_does(tmp_path):
    template = template_of(
        tmp_path,
        """{%- for m in messages -%}
{%- set thought = m.content.split('</think>') -%}
{{ '<|im_start|>' + m.role + '\\n' + (m.content if loop.last else thought[-1]) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}""",
    )
    turns, (dialogue,) = Turns(template, ["user", "assistant"]), own_dialogues(1, 2)
    for said in ("hello world", "<think>maybe</think>yes", "maybe"):
        turns.take(dialogue, template.backend.encode(said + "<|im_end|>").ids)
        prompt = template.backend.decode(turns.prompt(dialogue), skip_special_tokens=False)
    assert prompt.count("yes") == 1 and "think" not in prompt
    assert dialogue.messages[1]["content"] == "<think>maybe</think>yes"


def test_degenerate_turns_end_a_conversation_before_them_and_say_why(tmp_path):
    template = template_of(tmp_path, CHATML)
    turns = Turns(template, ["user", "assistant"])
    ids = lambda text: template.backend.encode(text, add_special_tokens=False).ids  # noqa: E731
    end, loop = "<|im_end|>", "yes hello world no 42. maybe " * 4
    cases = {
        "hello world": "cut at the limit", "hello</s>" + end: "special tokens within", " \n" + end: "empty", loop + end: "loops",
        "yes" + end: "copies",
    }  # fmt: skip
    cases = [(ids(text), why) for text, why in cases.items()] + [([*ids("😀")[:1], *ids(end)], "not UTF-8")]
    first = Dialogue([{"role": "user"}, {"role": "assistant"}])
    turns.take(first, ids("yes" + end))
    assert first.ended is None and first.next == 1
    for tokens, why in cases:
        dialogue = Dialogue([{"role": "user"}, {"role": "assistant"}])
        turns.take(dialogue, tokens)
        assert (dialogue.ended, dialogue.next, dialogue.answered) == (why, None, [])
        later = Dialogue([*CONVERSATION[:2], {"role": "user"}, {"role": "assistant"}])
        turns.take(later, tokens)
        assert later.answered == CONVERSATION[:2] and (later.ended == why or why == "copies")


def test_calls_of_tools_stay_with_what_the_tools_said_and_a_last_question_is_answered():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    given = [*CONVERSATION, {"role": "user", "content": "why"}, call, {"role": "tool", "content": "42"}]
    answer = {"role": "assistant"}
    expected = [given[0], answer, given[2], answer, *given[4:], answer]
    assert rewritten(Conversation([{"role": "user", "content": "\ud800"}])) == Dialogue([], ended="not UTF-8")
    assert rewritten(Conversation(given, [{"name": "look"}])) == Dialogue(expected, [{"name": "look"}])


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("chat") / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(model, folder, **changes):
    """What scripts.generate_conversations makes of a tiny model: (its conversations, its manifest)."""
    flags = {"base_model": str(model), "out_dir": str(folder), "engine": "embedded", "dtype": "float32", "max_tokens": 60} | changes
    run(Arguments(shard_prompts=8, **flags))
    lines = (folder / "conversations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def own(tmp_path_factory, chat_model):
    """Thirty conversations of two questions from nothing but the model: (folder, conversations, manifest)."""
    folder = tmp_path_factory.mktemp("own") / "chats"
    return folder, *write(chat_model, folder, conversations=30, questions=2)


def test_conversations_from_nothing_are_counted_looked_at_and_prepared_like_any_others(tmp_path, own, chat_model):
    folder, conversations, manifest = own
    assert manifest["conversations"] == 30 and 5 < manifest["kept"] == len(conversations) < 30
    assert (
        manifest["kept"] + sum(manifest["left_out"].values()) == 30 and manifest["shortened"] and "cut at the limit" in manifest["left_out"]
    )
    turns = [json.loads((folder / f"turn-{number:02d}/manifest.json").read_text()) for number in range(4)]
    for reason in ("stop", "length"):
        assert manifest["finish_reasons"][reason] == sum(turn["finish_reasons"].get(reason, 0) for turn in turns)
    assert manifest["tokens"] == sum(turn["tokens"] for turn in turns) and turns[0]["rows"] == 30 > turns[1]["rows"]
    for conversation in conversations:
        messages = conversation["messages"]
        assert [message["role"] for message in messages] in (["user", "assistant"], ["user", "assistant"] * 2)
        assert all(message["content"] for message in messages)
    source = str(folder / "conversations.jsonl")
    prepared = prepare(source=source, tokenizer=str(chat_model), out_dir=str(tmp_path / "data"), seq_length=64)
    assert prepared["source"]["documents_read"] == len(conversations) and not prepared["source"]["skipped"]
    assert next(RowReader(tmp_path / "data", batch_size=1, seed=0)).trained.any()


def test_of_what_was_written_near_copies_are_left_out_and_counted_when_it_is_prepared(tmp_path, own, chat_model):
    pytest.importorskip("datasketch")
    written = sorted(own[1], key=lambda conversation: -len(str(conversation)))
    for changed in written[:3]:
        *before, last = changed["messages"]
        written.append(changed | {"messages": [*before, last | {"content": last["content"] + " w5"}]})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(conversation) + "\n" for conversation in written))
    settings = {"source": str(tmp_path / "chats.jsonl"), "tokenizer": str(chat_model), "seq_length": 64}
    assert not prepare(**settings, out_dir=str(tmp_path / "all"))["source"]["skipped"]
    prepared = prepare(**settings, out_dir=str(tmp_path / "data"), near_duplicates=0.8)["source"]
    assert prepared["skipped"] == {"near copies": 3} and prepared["documents_read"] == len(own[1])
    assert prepared["firsts"]["near copies"] == f"chats.jsonl#{len(own[1])} (near copies)"


def test_interrupted_and_begun_again_it_writes_the_same_and_nothing_twice(tmp_path, own, chat_model, monkeypatch):
    folder, step, steps = own[0], EmbeddedEngine.step, []

    def interrupted(engine):
        steps.append(engine)
        if len(steps) == 6:  # four shards of questions, and one of answers
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(EmbeddedEngine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(chat_model, tmp_path / "chats", conversations=30, questions=2)
    assert not (tmp_path / "chats/conversations.jsonl").exists()
    write(chat_model, tmp_path / "chats", conversations=30, questions=2)
    shards = sorted(path.relative_to(folder) for path in folder.glob("turn-*/*.parquet"))
    assert len(steps) == len(shards) + 1
    for name in (*shards, "conversations.jsonl"):
        assert (tmp_path / "chats" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(UserError, match="manifest.json: written with another temperature .1.0 there, 0.5 asked"):
        write(chat_model, tmp_path / "chats", conversations=30, questions=2, temperature=0.5)


@pytest.mark.slow
def test_two_processes_share_the_turns_and_end_with_the_same_conversations(tmp_path, own, chat_model):
    words = [f"--base_model={chat_model}", f"--out_dir={tmp_path / 'chats'}", "--conversations=30", "--questions=2", "--engine=embedded"]
    words += ["--dtype=float32", "--max_tokens=60", "--shard_prompts=8"]
    commands = [Command(["scripts.generate_conversations", *words]) for _ in range(2)]
    for command in commands:
        printed, errors = command.communicate(300)
        assert command.returncode == 0, errors
        assert f"{len(own[1])} of 30 conversations" in printed and "left out: " in printed
    assert (tmp_path / "chats/conversations.jsonl").read_bytes() == (own[0] / "conversations.jsonl").read_bytes()


def test_answers_are_written_anew_with_the_models_own_earlier_ones_in_context(tmp_path, chat_model):
    generator = torch.Generator().manual_seed(1)
    text = lambda: " ".join(f"w{word}" for word in torch.randint(3, WORDS - 2, (5,), generator=generator).tolist())  # noqa: E731
    given = [[{"role": role, "content": text()} for role in ("user", "assistant") * 2] for _ in range(20)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in given))
    settings = {"source": str(tmp_path / "given.jsonl"), "temperature": 0.0, "max_tokens": 30}
    found, manifest = write(chat_model, tmp_path / "chats", **settings)
    model, tokenizer, expected = LlamaForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model), []
    for messages in given:
        said = []
        for question in messages[::2]:
            prompt = tokenizer.apply_chat_template([*said, question], add_generation_prompt=True, return_dict=False)
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
            if ids[-1] != 0 or len(ids) == 1:
                break
            said += [question, {"role": "assistant", "content": tokenizer.decode(ids[:-1])}]
        expected += [{"messages": said}] if said else []
    assert found == expected and {len(one["messages"]) for one in expected} == {2, 4}
    assert sum(manifest["left_out"].values()) == 20 - len(found)
    assert len(write(chat_model, tmp_path / "first", **settings, conversations=8)[0]) < len(found)


def test_fields_of_messages_that_have_no_form_in_json_are_written_as_a_template_writes_them(tmp_path, chat_model):
    day = datetime(2024, 5, 1, 12)
    rows = [{"messages": [message | {"content": f"w{number}", "at": day} for message in CONVERSATION[:2]]} for number in range(3, 23)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "given.parquet")
    settings = {"tokenizer": str(chat_model), "seq_length": 64}
    assert prepare(source=str(tmp_path / "given.parquet"), out_dir=str(tmp_path / "given"), **settings)["source"]["documents_read"] == 20
    found, _ = write(chat_model, tmp_path / "chats", source=str(tmp_path / "given.parquet"))
    assert {one["messages"][0]["at"] for one in found} == {"2024-05-01 12:00:00"}
    source = str(tmp_path / "chats/conversations.jsonl")
    assert prepare(source=source, out_dir=str(tmp_path / "data"), **settings)["source"]["documents_read"] == len(found)


def test_a_template_that_asks_for_the_date_is_given_that_of_the_day_on_which_the_folder_was_begun(tmp_path, chat_model, monkeypatch):
    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date(2999, 12, 31)

    (tmp_path / "dated.jinja").write_text("{{ 'w' + strftime_now('%d') + ' ' }}" + TEMPLATE)
    settings = {"conversations": 16, "chat_template": str(tmp_path / "dated.jinja")}
    found, _ = write(chat_model, tmp_path / "chats", **settings)
    (tmp_path / "chats/turn-01/continuations-00000.parquet").unlink()
    monkeypatch.setattr(data.prepare.chat, "date", Tomorrow)
    assert write(chat_model, tmp_path / "chats", **settings)[0] == found


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "--conversations is required where there is no --source"),
        ({"source": "texts.jsonl"}, "holds texts, and only conversations have answers"),
        ({"source": "chats.jsonl", "questions": 2}, "--questions"),
        ({"source": "chats.jsonl", "format": "chat"}, "--format=chat: not known"),
        ({"source": "none.jsonl"}, "no answer is to be written"),
        ({"conversations": 2, "max_tokens": 256}, "left out: 2 over the base model's context; give another --max_tokens"),
        ({"conversations": 2, "chat_template": "nowhere.jinja"}, "--chat_template=nowhere.jinja: can't be read"),
        ({"conversations": 2, "chat_template": "headings.jinja"}, "ends no turn of the user's with a special token"),
        ({"conversations": 2, "out_dir": "mine"}, "holds other files"),
        ({"conversations": 2, "temperature": 1e-9}, "temperature"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(tmp_path, chat_model, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    (tmp_path / "none.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "headings.jinja").write_text(unmarked(TEMPLATES["headings"]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((UserError, ValueError), match=message) as caught:
        write(chat_model, tmp_path / "chats", **changes)
    assert "\n" not in str(caught.value) or "temperature" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_model_that_does_not_stop_where_its_template_ends_answers_is_refused(tmp_path, chat_model):
    shutil.copytree(chat_model, tmp_path / "other")
    (tmp_path / "other/generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(UserError, match="stops at w5, and answers end with <eos>; add it to eos_token_id"):
        write(tmp_path / "other", tmp_path / "chats", conversations=2)
    assert not (tmp_path / "chats").exists()
