"""Conversations become the tokens that `transformers` makes of them, and what the assistant wrote is told exactly or not at all."""

from datetime import date
from unittest.mock import Mock

import numpy as np
import pytest
from chat_templates import TEMPLATES, conversations, loose, unmarked, write_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare.chat import ChatTemplate, LeftOut
from data.prepare.rows import Conversation
from data.tokenizer import load_tokenizer
from fms_spec.errors import UserError


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "pieces"])
def tokenizer(tmp_path_factory, request):
    return load_tokenizer(write_chat_tokenizer(tmp_path_factory.mktemp("chat"), pieces=request.param))


@pytest.fixture(scope="module")
def templates(tokenizer, tmp_path_factory):
    """{(name, whether it marks answers): ChatTemplate}."""
    folder, made = tmp_path_factory.mktemp("templates"), {}
    for name, text in TEMPLATES.items():
        for marks in (True, False):
            path = folder / f"{name}-{marks}.jinja"
            path.write_text(text if marks else unmarked(text))
            made[name, marks] = ChatTemplate(tokenizer, path)
    return made


def encoded(template, messages, tools=None):
    """(ids, [(prompt, start, end)]) of one conversation, or why it is left out."""
    try:
        (result,) = template.encode([template.render(Conversation(messages, tools))])
    except LeftOut as left_out:
        return str(left_out)
    return str(result) if isinstance(result, LeftOut) else (result[0].tolist(), result[1].tolist())


def expected(template, messages, tools=None):
    """(ids, mask) as `transformers` has them, from the template that marks its answers."""
    found = template.served.apply_chat_template(
        messages, tools=tools, chat_template=template.given, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


def compare(templates, name, messages, tools=None):
    """Check one conversation against `transformers`, with and without marks; returns what of the two was not left out."""
    ids, mask = expected(templates[name, True], messages, tools)
    told = []
    for marks in (True, False):
        template, found = templates[name, marks], encoded(templates[name, marks], messages, tools)
        if isinstance(found, str):
            continue
        assert found[0] == ids == template.served.apply_chat_template(messages, tools=tools, chat_template=template.given)["input_ids"]
        ours = np.zeros(len(ids), int)
        for prompt, start, end in found[1]:
            ours[start:end] = 1
            assert prompt in (-1, start)
        assert ours.tolist() == mask
        told.append(marks)
    return told


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_the_mask_is_what_the_template_would_mark(templates, name):
    @settings(max_examples=25, deadline=None)
    @given(conversations(name))
    def check(messages):
        assert compare(templates, name, messages) == [True, False]

    check()


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_with_blanks_around_them_are_told_exactly_or_left_out(templates, name):
    @settings(max_examples=25, deadline=None)
    @given(conversations(name, loose))
    def check(messages):
        compare(templates, name, messages)

    check()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_the_template_gives_to_be_answered(templates, name):
    @settings(max_examples=10, deadline=None)
    @given(conversations(name), st.booleans())
    def check(messages, marks):
        template = templates[name, marks]
        ids, answers = encoded(template, messages)
        spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for number, (prompt, _, _) in zip(spoken, answers, strict=True):
            asked = template.served.apply_chat_template(messages[:number], chat_template=template.given, add_generation_prompt=True)
            assert prompt == -1 or ids[:prompt] == asked["input_ids"]
        assert max(prompt for prompt, _, _ in answers) > 0

    check()


def one(tokenizer, tmp_path, template, messages, tools=None):
    """`encoded` by a template of its own."""
    (tmp_path / "t.jinja").write_text(template)
    return encoded(ChatTemplate(tokenizer, tmp_path / "t.jinja"), messages, tools)


ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "{% for m in messages %}" + TURN + TURN + "{% endfor %}",
        "{{ messages | length }}{% for m in messages %}" + TURN + "{% endfor %}",
        "{% for m in messages | reverse %}" + TURN + "{% endfor %}",
    ],
    ids=["a thought is begun in prompts alone", "no token ends a turn", "written twice", "counted in front", "last turn first"],
)
def test_answers_that_prompts_do_not_lead_to_or_nothing_ends_are_not_guessed(tokenizer, tmp_path, template):
    assert one(tokenizer, tmp_path, template, ASKED) == "which tokens are the assistant's is not sure"


def test_a_conversation_without_an_answer_and_one_that_the_template_refuses_are_left_out_with_the_reason(tokenizer, templates):
    assert encoded(templates["chatml", False], ASKED[:1]) == "without an answer"
    with pytest.raises(LeftOut) as caught:
        templates["gemma", False].render(Conversation([{"role": "system", "content": "no"}, *ASKED]))
    assert (caught.value.why, caught.value.detail) == ("refused by the chat template", "no system role")


def test_the_word_that_stands_in_for_answers_is_not_taken_for_one_that_is_there(tokenizer, templates):
    messages = [ASKED[0], {"role": "assistant", "content": "Qzx"}]
    assert encoded(templates["chatml", False], messages) == "which tokens are the assistant's is not sure"
    assert not isinstance(encoded(templates["chatml", True], messages), str)


def test_an_answer_that_ends_with_a_special_token_of_its_own_is_ended_by_the_templates(templates):
    for text in ("yes<|im_end|>", "yes <s>", "<|eot_id|>"):
        assert compare(templates, "chatml", [ASKED[0], {"role": "assistant", "content": text}, *ASKED]) == [True, False]


def test_a_conversation_is_written_once_a_prompt_once_whole_and_once_more_where_nothing_is_marked(templates, monkeypatch):
    for marks, whole in ((False, 2), (True, 1)):
        template = templates["chatml", marks]
        monkeypatch.setattr(template, "write", Mock(wraps=template.write))
        assert len(encoded(template, ASKED * 5)[1]) == 5 and template.write.call_count == 5 + whole


def test_an_answer_that_the_template_takes_apart_is_told_all_the_same(tokenizer, tmp_path):
    taken = TURN.replace("m.content", "m.content.split('</think>')[-1]")
    template = "{% for m in messages %}" + taken + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ids, answers = one(tokenizer, tmp_path, template, [ASKED[0], {"role": "assistant", "content": "no</think>yes"}, *ASKED])
    told = [tokenizer.backend.decode(ids[start:end], skip_special_tokens=False) for _, start, end in answers]
    assert [text.strip() for text in told] == ["yes<|im_end|>"] * 2


def test_tools_reach_the_template(templates):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    assert compare(templates, "qwen3", ASKED, tools) == [True, False]
    assert len(encoded(templates["qwen3", False], ASKED, tools)[0]) > len(encoded(templates["qwen3", False], ASKED)[0])


def test_all_conversations_of_a_folder_have_the_date_on_which_its_template_was_read(templates):
    template = templates["dated", False]
    today, template.date = template.date, date(1999, 12, 31)
    text, template.date = template.render(Conversation(ASKED)).text, today
    assert "1999" in text and templates["llama3", False].date is None


def test_a_tokenizer_without_a_template_and_a_template_that_is_none_end_in_one_line(tokenizer, tmp_path):
    with pytest.raises(UserError, match="has no chat template; give its model's in a Jinja file, --chat_template=FILE"):
        ChatTemplate(tokenizer)
    for content, message in ((None, "can't be read"), (b"\xff", "not UTF-8"), (b" ", "is empty"), (b"{% for m %}", "line 1: ")):
        if content is not None:
            (tmp_path / "t.jinja").write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            ChatTemplate(tokenizer, tmp_path / "t.jinja")
        assert "t.jinja" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_with_a_template_for_tools_writes_those_conversations_by_it(tmp_path):
    folder = write_chat_tokenizer(tmp_path / "t", {"default": unmarked(TEMPLATES["chatml"]), "tool_use": unmarked(TEMPLATES["qwen3"])})
    template = ChatTemplate(load_tokenizer(folder))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    for asked in (None, tools):
        (ids, answers) = encoded(template, ASKED, asked)
        assert ids == template.served.apply_chat_template(ASKED, tools=asked)["input_ids"] and len(answers) == 1
    assert "Tools: " in template.write(ASKED, tools)[0] and "Tools: " not in template.write(ASKED, None)[0]
