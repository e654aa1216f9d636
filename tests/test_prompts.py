"""Prompts to evaluate with: what the base model is handed, which ones a limit keeps, and how mistakes are named."""

import json

import pytest
import torch
from conftest import write_model, write_tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data.prompts import load_prompts
from data.reader import read_prompts
from fms_spec.errors import UserError
from pipelines.stream import encode, stream
from scripts.decode import Arguments

EOS, USER, ASSISTANT = 0, 92, 93  # the tokens <eos>, w90, w91
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'w90 ' if message['role'] == 'user' else 'w91 ' }}{{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w91{% endif %}"
)


def words(*numbers):
    """The tiny tokenizer's ids of w1, w2, ..."""
    return [number + 2 for number in numbers]


@pytest.fixture
def plain_tokenizer(tmp_path):
    write_tokenizer(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def chat_tokenizer(tmp_path):
    """Has a chat template, and begins a text with <eos> where special tokens are asked for."""
    write_tokenizer(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def beginning_tokenizer(tmp_path):
    """(path, id of <s>) of one that begins a text with <s>, whose chat template writes <s> itself."""
    write_tokenizer(tmp_path / "beginning")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "beginning")
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>", special=True)})
    tokenizer.chat_template = "{{ bos_token }} " + CHAT_TEMPLATE
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save_pretrained(tmp_path / "beginning")
    return tmp_path / "beginning", bos


def write_lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_prompt_text_is_continued_as_it_stands_and_blank_lines_are_passed_over(tmp_path, plain_tokenizer):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1 w2 w3", "id": 7}\r\n \n{"prompt": "w4", "category": "qa"}')
    prompts = load_prompts(str(tmp_path / "p.jsonl"), plain_tokenizer)
    assert [(prompt.category, prompt.turns) for prompt in prompts] == [(None, 1), ("qa", 1)]
    tokens = [prompt.tokens([]) for prompt in prompts]
    assert [ids.tolist() for ids in tokens] == [words(1, 2, 3), words(4)]
    assert all(ids.dtype == torch.int64 and ids.dim() == 1 for ids in tokens)


def test_a_byte_order_mark_before_the_first_line_is_passed_over(tmp_path, plain_tokenizer):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "w1"}\n')
    assert load_prompts(tmp_path / "p.jsonl", plain_tokenizer)[0].tokens([]).tolist() == words(1)


def test_a_line_separator_within_a_text_does_not_end_its_line(tmp_path, plain_tokenizer):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1\u2028w2"}\n{"prompt": "w3\x85w4"}\n', encoding="utf-8")
    prompts = load_prompts(tmp_path / "p.jsonl", plain_tokenizer)
    assert [prompt.tokens([]).tolist() for prompt in prompts] == [words(1, 2), words(3, 4)]


def test_a_prepared_folder_gives_its_held_out_prompts(data_dir, model_dir):
    held_out = read_prompts(data_dir, "held_out").tokens
    prompts = load_prompts(data_dir, model_dir)
    assert all(torch.equal(prompt.tokens([]), tokens) for prompt, tokens in zip(prompts, held_out)) and len(prompts) == 3
    two = load_prompts(data_dir, model_dir, limit=2)
    assert [prompt.encoded.tolist() for prompt in two] == [tokens.tolist() for tokens in held_out[:2]]
    assert {(prompt.category, prompt.turns) for prompt in prompts} == {(None, 1)}


def test_a_limit_keeps_the_first_of_each_category_in_the_files_order(tmp_path, chat_tokenizer):
    categories = ["qa", None, "math", "qa", None, "qa", None, "math"]
    entries = [{"prompt": f"w{i}"} | ({"category": category} if category else {}) for i, category in enumerate(categories)]
    entries[2] = {"turns": ["w2"], "category": "math"}
    path = write_lines(tmp_path / "p.jsonl", *entries)

    def kept(limit):
        return [(prompt.category, prompt.tokens([]).tolist()[1]) for prompt in load_prompts(path, chat_tokenizer, limit)]

    everything = [(category, i + 2) for i, category in enumerate(categories)]
    assert kept(None) == kept(3) == everything
    assert kept(2) == everything[:5] + everything[7:]
    assert kept(1) == everything[:3]


def test_a_later_turn_contains_the_replies_before_it_without_their_special_tokens(tmp_path, chat_tokenizer):
    path = write_lines(tmp_path / "p.jsonl", {"turns": ["w1 w2", "w3", "w4"], "category": "writing", "question_id": 81})
    (chat,) = load_prompts(path, chat_tokenizer)
    assert (chat.category, chat.turns) == ("writing", 3)
    first, second, third = (chat.tokens(replies) for replies in ([], [[*words(7, 8), EOS]], [[*words(7, 8), EOS], []]))
    assert first.dtype == torch.int64 and first.tolist() == [USER, *words(1, 2), EOS, ASSISTANT]
    assert second.tolist() == [*first, *words(7, 8), EOS, USER, *words(3), EOS, ASSISTANT]
    assert third.tolist() == [*second, EOS, USER, *words(4), EOS, ASSISTANT]  # an empty reply is one, too


def test_special_tokens_are_added_to_a_prompt_and_not_to_a_chat(tmp_path, chat_tokenizer):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "w1"}, {"turns": ["w1"]})
    prompt, chat = load_prompts(path, chat_tokenizer)
    assert prompt.tokens([]).tolist() == [EOS, *words(1)]
    assert chat.tokens([]).tolist() == [USER, *words(1), EOS, ASSISTANT]


def test_a_prompt_and_a_chat_begin_with_the_beginning_of_text_once_even_where_the_text_has_it(tmp_path, beginning_tokenizer):
    folder, bos = beginning_tokenizer
    entries = [{"prompt": "w1 w2"}, {"prompt": "<s> w1 w2"}, {"turns": ["w1", "w2"]}]
    first, second, chat = load_prompts(write_lines(tmp_path / "p.jsonl", *entries), folder)
    assert first.tokens([]).tolist() == second.tokens([]).tolist() == [bos, *words(1, 2)]
    assert chat.tokens([]).tolist() == [bos, USER, *words(1), EOS, ASSISTANT]
    later = [bos, USER, *words(1), EOS, ASSISTANT, *words(7), EOS, USER, *words(2), EOS, ASSISTANT]
    assert chat.tokens([[bos, *words(7), EOS]]).tolist() == later


def test_generate_begins_its_prompt_with_the_beginning_of_text_once(beginning_tokenizer):
    folder, bos = beginning_tokenizer
    encoded = [
        encode(AutoTokenizer.from_pretrained(folder), Arguments(base_model=str(folder), prompt=prompt, chat=chat))
        for prompt, chat in (("w1 w2", False), ("<s> w1 w2", False), ("w1 w2", True))
    ]
    assert [tokens.tolist() for tokens in encoded] == [[bos, *words(1, 2)]] * 2 + [[bos, USER, *words(1, 2), EOS, ASSISTANT]]


def test_generate_refuses_a_prompt_with_a_token_that_the_base_model_lacks(tmp_path):
    folder = write_model(tmp_path / "small", vocab_size=50)
    with pytest.raises(UserError, match="--prompt: token 'w90' has id 92, but the tokenizer has 96 ids, the model's embedding 50; "):
        stream(Arguments(base_model=str(folder), prompt="w1 w90", dtype="float32"))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "w1"', "not JSON"),
        ('["w1"]', 'either "prompt", a text, or "turns"'),
        ('{"promt": "w1"}', 'either "prompt", a text, or "turns"'),
        ('{"prompt": "w1", "turns": ["w1"]}', 'either "prompt", a text, or "turns"'),
        ('{"prompt": ""}', '"prompt" must be a text that is not empty'),
        ('{"prompt": " \\n"}', '"prompt" must be a text that is not empty'),
        ('{"prompt": 3}', '"prompt" must be a text'),
        ('{"prompt": "w1 \\ud800"}', '"prompt" must be a text'),
        ('{"turns": []}', '"turns" must be a list of one or more texts'),
        ('{"turns": "w1"}', '"turns" must be a list'),
        ('{"turns": ["w1", ""]}', '"turns" must be a list of one or more texts, none of them empty'),
        ('{"turns": ["w1", null]}', '"turns" must be a list'),
        ('{"prompt": "w1", "category": 3}', '"category" must be a text'),
    ],
)
def test_a_malformed_line_is_named_with_file_and_number(tmp_path, chat_tokenizer, line, message):
    (tmp_path / "broken.jsonl").write_text(f'\n{{"prompt": "w1"}}\n{line}\n')
    refusal = refused(tmp_path / "broken.jsonl", chat_tokenizer)
    assert "broken.jsonl, line 3: " in refusal and message in refusal


def test_turns_without_a_chat_template_name_the_line_and_the_tokenizer(tmp_path, plain_tokenizer):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "w1"}, {"turns": ["w1"]})
    message = refused(path, plain_tokenizer)
    assert "p.jsonl, line 2: " in message and str(plain_tokenizer) in message and "chat template" in message and '"prompt" texts' in message


def test_prompts_that_are_not_there_or_not_text_are_refused(tmp_path, plain_tokenizer):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    assert "nowhere.jsonl: can't be read (No such file" in refused(tmp_path / "nowhere.jsonl", plain_tokenizer)
    assert "latin.jsonl: can't be read (not UTF-8 text)" in refused(tmp_path / "latin.jsonl", plain_tokenizer)
    assert "empty.jsonl: none in it" in refused(tmp_path / "empty.jsonl", plain_tokenizer)
    assert "limit 0: must be at least 1" in refused(tmp_path / "empty.jsonl", plain_tokenizer, limit=0)


def test_a_folder_prepared_with_another_tokenizer_is_refused(tmp_path, data_dir):
    write_tokenizer(tmp_path / "other", words=50)
    assert f"--tokenizer={tmp_path / 'other'}" in refused(data_dir, tmp_path / "other")


def refused(path, tokenizer_dir, limit=None):
    """The one line with which load_prompts refuses."""
    with pytest.raises(UserError) as caught:
        load_prompts(path, tokenizer_dir, limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)
