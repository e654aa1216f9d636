"""What the tokenizer puts before a text in serving begins every piece of a document and every prompt, once."""

import hashlib
import json

import pytest
from data_helpers import BOS, EOS, as_text, distinct_documents, pieces_of, prepare_small, rows_of, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.continuations.shard import lists_of
from data.prepare.documents import pack
from data.reader import read_manifest, read_prompts, read_token_counts
from data.tokenizer import load_tokenizer
from fms_spec.errors import UserError

TEMPLATE = "<s> $A"


documents_of_tokens = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=15), min_size=1, max_size=8)


@given(documents_of_tokens, st.integers(3, 9), st.sampled_from([[0], [0, 1]]))
def test_packing_begins_every_piece_with_the_prefix_fills_the_rows_and_loses_nothing(documents, seq_length, prefix):
    rows = list(pack(map(as_text, documents), seq_length, prefix))
    flat = [token for document in documents for token in document]
    kept = [token for row in rows for token in row.tokens[row.own].tolist()]
    assert kept == flat[: len(kept)] and len(flat) - len(kept) < seq_length
    for row in rows:
        tokens, starts, own = row.tokens, row.starts, row.own
        assert len(tokens) == seq_length and starts[0] == 0 and starts == sorted(set(starts))
        for start, end in zip(starts, [*starts[1:], seq_length]):
            piece, added = tokens[start:end].tolist(), (~own[start:end]).tolist()
            assert piece[: len(prefix)] == prefix[: len(piece)] and (len(piece) >= len(prefix) or end == seq_length)
            assert added == [True] * sum(added) + [False] * (len(piece) - sum(added)) and sum(added) in (0, min(len(prefix), len(piece)))
            assert sum(added) != len(prefix) or piece[len(prefix) : 2 * len(prefix)] != prefix  # not before one of its own


def test_a_document_in_a_row_is_what_serving_reads_of_it_and_its_end(tmp_path):
    out = prepare_small(tmp_path, [[1, 2, 3], [4, 5], [BOS, 6, 7, 8], [BOS, BOS, 9]], template=TEMPLATE, seq_length=17, prompt_length=3)
    ((tokens, starts),) = rows_of(out)
    served = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    expected = [[*served(text).input_ids, EOS] for text in ("w1 w2 w3", "w4 w5", "w6 w7 w8", "w9")]
    assert sorted(pieces_of([(tokens, starts)])) == sorted(expected)


def test_a_piece_continued_in_the_next_row_begins_with_the_prefix_too(tmp_path):
    out = prepare_small(tmp_path, [[*range(20)]], template=TEMPLATE, seq_length=8)
    assert rows_of(out) == [([BOS, *range(7)], [0]), ([BOS, *range(7, 14)], [0]), ([BOS, *range(14, 20), EOS], [0])]


def test_prompts_begin_with_the_prefix_once_and_have_their_length_in_all(tmp_path):
    documents = [[*range(10)], [BOS, *range(20, 24)], [1, 2, 3], [30, BOS, BOS, 31]]
    prompts = read_prompts(prepare_small(tmp_path, documents, template=TEMPLATE, seq_length=8, prompt_length=4))
    found = dict(zip(prompts.sources, lists_of(prompts.tokens)))
    assert found.keys() == {"0000.txt", "0001.txt", "0003.txt"}
    first = found["0000.txt"][1]
    assert found["0000.txt"] == [BOS, first, first + 1, first + 2]
    assert found["0001.txt"] == [BOS, 20, 21, 22] and found["0003.txt"] == [BOS, 30, BOS, BOS]
    offsets = {
        read_prompts(prepare_small(tmp_path, documents, template=TEMPLATE, out=f"{seed}", seq_length=8, seed=seed)).tokens[0][1].item()
        for seed in range(4)
    }
    assert len(offsets) > 1


def test_a_prompt_drawn_where_the_text_has_the_prefix_gets_no_second_one(tmp_path):
    documents = [[BOS if position % 2 else 7 for position in range(9)]]
    prompts = [
        read_prompts(prepare_small(tmp_path, documents, template=TEMPLATE, out=f"{seed}", seq_length=8, seed=seed)).tokens[0].tolist()
        for seed in range(8)
    ]
    assert {tuple(tokens) for tokens in prompts} == {(BOS, 7, BOS, 7)}


def test_counts_are_of_the_documents_own_tokens(tmp_path):
    out = prepare_small(tmp_path, template=TEMPLATE, held_out=3)
    manifest, counts = read_manifest(out), read_token_counts(out)
    assert manifest["source"]["tokens_read"] == 40 * 21
    assert counts[BOS] == 0 and len(counts) == 53
    for split, documents in dict(train=37, held_out=3).items():
        table, rows = manifest["tables"][f"rows-{split}"], rows_of(out, split)
        own = sum(token != BOS for tokens, _ in rows for token in tokens)
        assert table["tokens"] == 16 * len(rows) and table["dropped_tail_tokens"] == 21 * documents - own
        assert split == "held_out" or counts.sum() == own


@pytest.mark.parametrize("max_tokens", [16, 100, 700])
def test_max_tokens_counts_whole_rows_with_their_prefixes(tmp_path, max_tokens):
    documents = [[BOS, *tokens] for tokens in distinct_documents(60, 20)]
    out = prepare_small(tmp_path, documents, template=TEMPLATE, held_out=2, max_tokens=max_tokens)
    assert read_manifest(out)["tables"]["rows-train"]["rows"] == max_tokens // 16


def test_the_prefix_is_part_of_the_tokenizers_identity_and_no_prefix_leaves_it_as_it_was(tmp_path):
    for template, prefix in ((None, []), ("$A", []), (TEMPLATE, [BOS]), ("<eos> <s> $A", [EOS, BOS])):
        loaded = load_tokenizer(write_tokenizer(tmp_path / f"{template}", template=template))
        without = json.dumps([json.loads(loaded.backend.to_str()), EOS], sort_keys=True)
        assert loaded.prefix == prefix and loaded.identity().get("prefix", []) == prefix
        assert (loaded.sha256 == hashlib.sha256(without.encode()).hexdigest()) == (not prefix)
    assert "prefix" not in read_manifest(prepare_small(tmp_path))["tokenizer"]
    assert read_manifest(prepare_small(tmp_path, template=TEMPLATE, out="begun"))["tokenizer"]["prefix"] == [BOS]


def test_a_tokenizer_may_end_a_text_with_eos_which_a_document_has_once_and_with_nothing_else(tmp_path):
    out = prepare_small(tmp_path, [[1, 2, 3]], template="<s> $A <eos>", seq_length=5, prompt_length=3)
    assert rows_of(out) == [([BOS, 1, 2, 3, EOS], [0])]
    with pytest.raises(UserError, match="tokenizer .*: ends a text with <unk> <eos>, where only its EOS token may stand; mend its"):
        load_tokenizer(write_tokenizer(tmp_path / "other", template="<s> $A <unk> <eos>"))


@pytest.mark.parametrize("setting", ["seq_length", "prompt_length"])
def test_a_length_that_the_prefix_would_fill_is_refused(tmp_path, setting):
    with pytest.raises(UserError, match=f"--{setting}=2: must be over 2, the tokens that the tokenizer begins a text with"):
        prepare_small(tmp_path, template="<s> <s> $A", **{setting: 2})
    assert not (tmp_path / "prepared").exists()
