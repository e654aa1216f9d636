"""Documents that hold what will be evaluated on are left out, whatever file that stands in, and no others are."""

import difflib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, unmarked, write_chat_tokenizer
from data_helpers import BOS, as_text, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare.overlap import OVERLAPS, RUN, Evaluation
from data.prepare.run import prepare
from data.tokenizer import load_tokenizer
from fms_spec.errors import UserError
from pipelines.show.prepared import details_of, summary_of


def spelt(tokens):
    return " ".join(f"w{token}" for token in tokens)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("overlap") / "t", template="<s> $A"))


@pytest.fixture(scope="module")
def evaluation_of(tmp_path_factory, loaded):
    folder = tmp_path_factory.mktemp("evaluations")

    def make(texts):
        path = folder / "questions.jsonl"
        path.write_text("".join(json.dumps({"question_id": number, "turns": [spelt(text)]}) + "\n" for number, text in enumerate(texts)))
        return Evaluation(str(path), loaded)

    return make


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 40), st.integers(RUN - 3, RUN + 3), st.integers(0, 9))
def test_a_run_is_found_from_its_length_on_wherever_it_lies_in_either_text(evaluation_of, seed, before, ahead, length, behind):
    generator = np.random.default_rng(seed)
    text, run = generator.integers(0, 25, ahead + length + behind), generator.integers(40, 50, length)
    text[ahead : ahead + length] = run
    document = np.concatenate([generator.integers(25, 40, before), run, generator.integers(25, 40, 30)])
    evaluation = evaluation_of([generator.integers(0, 25, 40), text])
    found = evaluation.overlap(None, as_text(document))
    assert found == ((OVERLAPS, "questions.jsonl#1") if length >= RUN else None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_what_is_found_is_what_python_finds_by_comparing_every_place(evaluation_of, seed):
    generator = np.random.default_rng(seed)
    texts = [generator.integers(0, 3, 80).tolist() for _ in range(3)]
    texts.append(texts[0][:50] + texts[1][30:])
    evaluation = evaluation_of(texts)
    for _ in range(5):
        cuts = [texts[generator.integers(4)][(start := generator.integers(60)) : start + generator.integers(5, 40)] for _ in range(4)]
        document = [token for cut in cuts for token in [*cut, *generator.integers(0, 3, 3).tolist()]]
        longest = [difflib.SequenceMatcher(None, text, document, autojunk=False).find_longest_match().size for text in texts]
        assert (evaluation.overlap(None, as_text(document)) is not None) == (max(longest) >= RUN)


QUESTION = [*range(20, 20 + RUN)]


@pytest.mark.parametrize("kind", ["turns", "messages", "csv", "parquet", "json", "txt", "folder"])
def test_every_file_that_a_source_may_be_is_one_to_evaluate_on(tmp_path, loaded, kind):
    asked = spelt(QUESTION)
    rows = {"turns": {"turns": ["w1", asked]}, "messages": {"messages": [{"role": "user", "content": asked}]}}
    row = rows.get(kind, {"id": 7, "question": asked, "answer": "w1"})
    path = tmp_path / ("e.jsonl" if kind in ("turns", "messages", "folder") else f"e.{kind}")
    if kind == "csv":
        path.write_text("".join(",".join(map(str, line)) + "\n" for line in (row, row.values())))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(asked if kind == "txt" else json.dumps([row] if kind == "json" else row))
    document = as_text([1, 2, 3, *QUESTION, 4])
    assert Evaluation(str(path.parent if kind == "folder" else path), loaded).overlap(None, document)
    assert not Evaluation(str(path), loaded).overlap(None, as_text([1, 2, 3, *QUESTION[1:], 4]))


def test_tables_of_several_kinds_may_lie_in_one_folder_to_evaluate_on(tmp_path, loaded):
    texts = [spelt(range(first, first + RUN)) for first in range(3)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": texts[0]}))
    (tmp_path / "b.csv").write_text(f"question\n{texts[1]}\n")
    pq.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": texts[2]}]}]), tmp_path / "c.parquet")
    assert Evaluation(str(tmp_path), loaded).texts == 3


def test_what_system_and_tools_say_is_no_question(tmp_path, loaded):
    said = lambda role, text: {"role": role, "content": text}  # noqa: E731
    other = spelt(range(RUN))
    row = {"messages": [said("system", spelt(QUESTION)), said("user", other), said("tool", spelt(QUESTION))], "tools": [spelt(QUESTION)]}
    (tmp_path / "e.jsonl").write_text(json.dumps(row))
    evaluation = Evaluation(str(tmp_path / "e.jsonl"), loaded)
    assert not evaluation.overlap(None, as_text(QUESTION)) and evaluation.overlap(None, as_text(range(RUN)))
    assert evaluation.texts == 1 and BOS not in evaluation.tokens


def test_documents_with_questions_are_left_out_counted_and_the_first_named(tmp_path, capsys):
    tokenizer = write_tokenizer(tmp_path / "t")
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 20, 60).tolist() for _ in range(30)]
    texts[7][10:10] = QUESTION
    texts[9][3:3] = QUESTION
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": spelt(text)}) + "\n" for text in texts))
    (tmp_path / "e.jsonl").write_text(json.dumps({"turns": ["w1", spelt(QUESTION)]}))
    settings = {"source": str(tmp_path / "a.jsonl"), "tokenizer": tokenizer, "seq_length": 32, "prompt_length": 4}
    manifest = prepare(**settings, out_dir=str(tmp_path / "out"), evaluation=str(tmp_path / "e.jsonl"))
    assert manifest["source"]["documents_read"] == 28 and manifest["source"]["skipped"] == {OVERLAPS: 2}
    assert manifest["source"]["firsts"] == {OVERLAPS: f"a.jsonl#7 ({OVERLAPS}: e.jsonl#0)"}
    assert manifest["evaluation"]["texts"] == 2 and manifest["evaluation"]["shorter_texts"] == 1
    told = " ".join(summary_of(tmp_path / "out") + details_of(tmp_path / "out"))
    assert f"2 {OVERLAPS}, first a.jsonl#7" in told and "1 texts, and 1 shorter that can't be told" in told
    with pytest.raises(UserError, match="holds data prepared with another evaluation"):
        prepare(**settings, out_dir=str(tmp_path / "out"))


def test_an_answer_that_was_evaluated_on_is_found_in_a_conversation_as_its_template_writes_it(tmp_path):
    tokenizer = write_chat_tokenizer(tmp_path / "t", unmarked(CHATML))
    answer = " ".join(f"word number {number} said" for number in range(12))
    turns = lambda question, text: [{"role": "user", "content": question}, {"role": "assistant", "content": text}]  # noqa: E731
    rows = [{"messages": turns(f"hello {number}", answer if number == 5 else f"yes {number}")} for number in range(20)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "e.json").write_text(json.dumps([{"messages": turns("and now", answer)}]))
    settings = {"source": str(tmp_path / "c.jsonl"), "tokenizer": tokenizer, "seq_length": 64}
    manifest = prepare(**settings, out_dir=str(tmp_path / "out"), evaluation=str(tmp_path / "e.json"))
    assert manifest["source"]["skipped"] == {OVERLAPS: 1} and manifest["source"]["first_skipped"].startswith("c.jsonl#5 ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "e.jsonl: source .*e.jsonl: no such file"),
        ('{"turns": ["w1"]}', "has no text of 25 tokens"),
        ("{", "e.jsonl:1: not a line of JSON"),
    ],
)
def test_an_evaluation_by_which_nothing_is_told_is_refused_before_any_work(tmp_path, content, message):
    if content:
        (tmp_path / "e.jsonl").write_text(content)
    (tmp_path / "a.txt").write_text("w1 w2")
    settings = {"source": str(tmp_path / "a.txt"), "tokenizer": write_tokenizer(tmp_path / "t"), "out_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=f"--evaluation=.*{message}"):
        prepare(**settings, evaluation=str(tmp_path / "e.jsonl"))
    assert not (tmp_path / "out").exists()
