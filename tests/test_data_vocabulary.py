"""Token ids that the base model's embedding lacks are refused where the data are prepared and where they are read."""

import json

import pytest
from data_helpers import EOS, UNKNOWN, distinct_documents, prepare_small, write_corpus, write_tokenizer

from data.prepare.run import prepare
from data.prompts import load_prompts
from data.reader import check_vocabulary
from fms_spec.errors import UserError

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write_base_model(folder, embedding, template=None):
    """A tokenizer's folder with a config.json."""
    write_tokenizer(folder, template=template)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **embedding}))
    return str(folder)


def prepare_with(tmp_path, documents, embedding, template=None):
    """Prepare with the tokenizer of a base model of such a config."""
    tokenizer = write_base_model(tmp_path / "base", embedding, template)
    source = write_corpus(tmp_path / "corpus", documents)
    prepare(source=source, tokenizer=tokenizer, out_dir=str(tmp_path / "out"), seq_length=16, prompt_length=4)


@pytest.mark.parametrize("embedding", [{"vocab_size": UNKNOWN}, {"text_config": {"vocab_size": UNKNOWN}}])
def test_a_document_with_a_token_that_the_embedding_lacks_is_named(tmp_path, embedding):
    documents = [*distinct_documents(3, 20), [1, 2, UNKNOWN, 3]]
    with pytest.raises(UserError) as caught:
        prepare_with(tmp_path, documents, embedding)
    assert str(caught.value).startswith("0003.txt: token '<unk>' has id 51, but the tokenizer has 52 ids, the model's embedding 51; take ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "template", "token"), [(EOS, None, "'<eos>' has id 50"), (52, "<s> $A", "'<s>' has id 52")])
def test_what_the_tokenizer_puts_around_a_text_is_looked_at_before_any_is_read(tmp_path, monkeypatch, size, template, token):
    monkeypatch.setattr("data.prepare.run.read_documents", None)
    with pytest.raises(UserError, match=f"tokenizer .*base: token {token}, .* the model's embedding {size}; take "):
        prepare_with(tmp_path, distinct_documents(3, 20), {"vocab_size": size}, template)


@pytest.mark.parametrize(
    ("embedding", "told"),
    [
        ({"vocab_size": 51}, "warning: {0} has 52 ids, the model's embedding 51; a document with one of the others will be refused"),
        ({"vocab_size": 64}, "{0} has 52 ids, the model's embedding 64 (padded, harmless)"),
        ({"vocab_size": 52}, None),
        ({}, None),
    ],
)
def test_sizes_that_differ_are_told_in_a_line(tmp_path, capsys, embedding, told):
    prepare_with(tmp_path, distinct_documents(3, 20), embedding)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "ids" in line]
    assert lines == ([told.format(f"tokenizer {tmp_path / 'base'}")] if told else [])
    prepare_with(tmp_path, distinct_documents(3, 20), embedding)
    assert "ids" not in capsys.readouterr().err  # nothing is to do the second time


def test_prepared_rows_are_refused_for_a_base_model_that_lacks_one_of_their_tokens(tmp_path):
    out = prepare_small(tmp_path, [[*range(40), UNKNOWN] * 2], seq_length=80)
    for size in (52, 64):
        check_vocabulary(out, size)
    with pytest.raises(UserError, match=r"prepared: token 51 occurs in it, but the tokenizer has 52 ids, the base model's embedding 51; "):
        check_vocabulary(out, 51)
    with pytest.raises(UserError, match="token 30 occurs in it, .* embedding 30; "):
        check_vocabulary(out, 30)
    check_vocabulary(prepare_small(tmp_path / "fewer", [[*range(20), *range(20)]]), 51)  # has the id, does not use it


def test_a_prompt_with_a_token_that_the_embedding_lacks_is_refused_by_its_line(tmp_path):
    base = write_base_model(tmp_path / "base", {"vocab_size": UNKNOWN})
    (tmp_path / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "w1"}\n{"turns": ["w1", "w2"]}\n')
    assert len(load_prompts(path, base)) == 2
    for line in ({"prompt": "w1 unheard"}, {"turns": ["w1", "w2 unheard"]}):
        path.write_text('{"prompt": "w1"}\n' + json.dumps(line))
        with pytest.raises(UserError, match="p.jsonl, line 2: token '<unk>' has id 51, .* embedding 51; "):
            load_prompts(path, base)


def test_a_prepared_folders_prompts_are_refused_for_a_base_model_that_lacks_one_of_their_tokens(tmp_path):
    out = prepare_small(tmp_path, [[1, UNKNOWN] * 5, [2, UNKNOWN] * 5], held_out=1, prompt_length=4, seq_length=8)
    assert len(load_prompts(out, str(tmp_path / "tokenizer"))) == 1
    with pytest.raises(UserError, match="prepared: token '<unk>' has id 51, .* embedding 51; "):
        load_prompts(out, write_base_model(tmp_path / "base", {"vocab_size": UNKNOWN}))
