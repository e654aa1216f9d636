"""Documents that are nearly the same are left out when asked, and those that are not stay."""

import json

import numpy as np
import pytest
from chat_templates import CHATML, unmarked, write_chat_tokenizer
from data_helpers import write_tokenizer

from data.prepare.near import CHARACTERS, NEAR, NearCopies
from data.prepare.rows import Conversation
from data.prepare.run import prepare
from data.prepare.sources import Document
from fms_spec.errors import UserError

pytest.importorskip("datasketch")
GENERATOR = np.random.default_rng(0)


def words(count):
    return [f"word{number}" for number in GENERATOR.integers(0, 10**6, count)]


def similarity(first, second):
    """Of two texts, by all their shingles."""
    one, two = ({text[at : at + CHARACTERS] for at in range(len(text) - CHARACTERS + 1)} for text in (first, second))
    return len(one & two) / len(one | two)


def test_what_is_as_similar_as_asked_is_found_and_what_is_less_is_not():
    found = {True: [], False: []}
    for _ in range(200):
        first = words(300)
        second = list(first)
        for place in GENERATOR.integers(0, 300, int(GENERATOR.integers(1, 30))):
            second[place] = "other"
        near = NearCopies(0.8)
        texts = [" ".join(first), " ".join(second)]
        assert near.seen(Document(texts[0], 0, 0), None) is None
        actual = similarity(*texts)
        if not 0.7 < actual < 0.9:  # the estimate is off by a few hundredths, and so is the index
            found[actual > 0.8].append(near.seen(Document(texts[1], 0, 1), None) == (NEAR, ""))
    assert len(found[True]) > 20 and sum(found[True]) >= 0.9 * len(found[True])
    assert len(found[False]) > 20 and not any(found[False])


def test_copies_and_near_copies_are_counted_apart_and_the_first_of_them_is_kept(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t")
    text = [f"w{number}" for number in GENERATOR.integers(0, 50, 200)]
    others = [" ".join(f"w{number}" for number in GENERATOR.integers(0, 50, 200)) for _ in range(9)]
    rows = [*others, " ".join(text), " ".join(text), " ".join([*text[:100], "w1", *text[101:]]), " ".join([*text, "w2"])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings = {"source": str(tmp_path / "a.jsonl"), "tokenizer": tokenizer, "seq_length": 32, "prompt_length": 4}
    manifest = prepare(**settings, out_dir=str(tmp_path / "out"), near_duplicates=0.7)
    assert manifest["source"]["skipped"] == {"copies": 1, NEAR: 2} and manifest["source"]["documents_read"] == 10
    assert manifest["source"]["firsts"][NEAR] == f"a.jsonl#11 ({NEAR})" and manifest["inputs"]["near_duplicates"] == 0.7
    assert prepare(**settings, out_dir=str(tmp_path / "all"))["source"]["documents_read"] == 13
    again = prepare(**settings, out_dir=str(tmp_path / "again"), near_duplicates=0.7)
    assert again["tables"] == manifest["tables"]


def test_conversations_with_the_same_system_prompt_and_tools_are_not_near_for_that(tmp_path):
    tokenizer = write_chat_tokenizer(tmp_path / "t", unmarked(CHATML))
    system = {"role": "system", "content": " ".join(words(300))}
    rows = []
    for _ in range(12):
        said = [" ".join(words(12)) for _ in range(2)]
        rows.append({"messages": [system, {"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]})
    rows.append({"messages": [*rows[0]["messages"][:2], {"role": "assistant", "content": rows[0]["messages"][2]["content"] + " now"}]})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": str(tmp_path / "c.jsonl"), "tokenizer": tokenizer, "seq_length": 4096, "prompt_length": 4096}
    manifest = prepare(**settings, out_dir=str(tmp_path / "out"), near_duplicates=0.7)
    assert manifest["source"]["skipped"] == {NEAR: 1} and manifest["source"]["documents_read"] == 12


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_a_similarity_that_is_none_is_refused(tmp_path, threshold):
    with pytest.raises(UserError, match=f"--near_duplicates={threshold}: a similarity, over 0 and up to 1"):
        NearCopies(threshold)


@pytest.mark.parametrize("content", ["a", "short text", Conversation([{"role": "user", "content": "?"}])])
def test_short_ones_are_compared_whole(content):
    near = NearCopies(0.8)
    assert near.seen(Document(content, 0, 0), None) is None and near.seen(Document(content, 0, 1), None) == (NEAR, "")
    assert near.seen(Document("something else", 0, 2), None) is None


def test_conversations_without_a_word_are_not_near_to_each_other():
    near, called = NearCopies(0.8), Conversation([{"role": "system", "content": "be kind"}, {"role": "assistant", "content": ""}])
    assert [near.seen(Document(called, 0, row), None) for row in range(2)] == [None, None]
