"""A mixture's sources give documents in the languages that are asked for, told without a network, and all others are counted."""

import json
import sys

import pytest
from chat_templates import CHATML, unmarked, write_chat_tokenizer

from data.prepare.languages import identifier
from data.prepare.run import prepare
from data.reader import read_manifest
from fms_spec.errors import UserError
from pipelines.show.prepared import details_of

pytest.importorskip("py3langid")

ENGLISH = "The harbour is closed in winter because the ice is too thick for the ships that bring the mail."
GERMAN = "Der Hafen ist im Winter geschlossen, weil das Eis für die Schiffe zu dick ist, die sonst die Post bringen."
FRENCH = "Le port est fermé en hiver parce que la glace est trop épaisse pour les navires qui apportent le courrier."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("languages") / "t", unmarked(CHATML))


@pytest.fixture
def left(tmp_path, tokenizer):
    """A function of rows and a source's settings that prepares them: the manifest's entry of the source."""

    def run(rows, filters):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "m.yaml").write_text(f"sources: {{a: {{path: {tmp_path}/a.jsonl, {filters}}}}}")
        out = tmp_path / "out"
        settings = {"seq_length": 64, "on_bad_row": "skip"}
        prepare(source=str(tmp_path / "m.yaml"), tokenizer=tokenizer, out_dir=str(out), **settings)
        return read_manifest(out)["source"]["mixture"]["a"]

    return run


def test_documents_in_other_languages_are_left_out_counted_and_shown_with_the_first(left, tmp_path):
    texts = [ENGLISH, GERMAN, FRENCH, "", 7, *(f"{number} {text}" for number in range(3) for text in (ENGLISH, GERMAN, FRENCH))]
    read = left([{"text": text} for text in texts], "languages: [en, de]")
    assert read["documents_read"] == 8 and read["skipped"] == {"other languages": 4, "empty": 1, "unreadable": 1}
    assert read["firsts"]["other languages"] == "a/a.jsonl#2 (other languages: fr)"
    assert "4 other languages, first a/a.jsonl#2 (other languages: fr)" in " ".join(details_of(tmp_path / "out"))


def test_a_conversation_is_in_the_language_of_its_user_and_assistant(left):
    turns = [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": f"Yes. {ENGLISH}"}]
    prompted = [{"role": "system", "content": " ".join([GERMAN] * 4)}, *turns]
    german = [turn | {"content": GERMAN} for turn in turns]
    read = left([{"messages": messages} for messages in (turns, prompted, german)], "languages: [en]")
    assert read["documents_read"] == 2 and read["firsts"] == {"other languages": "a/a.jsonl#2 (other languages: de)"}


def test_a_language_that_is_none_and_a_missing_library_end_in_one_line_before_any_work(left, tmp_path, monkeypatch):
    rows = [{"text": ENGLISH}]
    for filters, message in {
        "languages: [en, xq]": "sources.a.languages: xq is the code of no language that can be told; give ISO 639 codes such as en, de, zh",
        "languages: [english]": "sources.a.languages.0: ",
        "languages: en": "sources.a.languages: ",
        "languages: []": "sources.a.languages: ",
    }.items():
        with pytest.raises(UserError) as caught:
            left(rows, filters)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match=r"sources.a.languages: needs py3langid; pip install 'fms-spec\[languages\]', or leave it out"):
        left(rows, "languages: [en]")
    assert not (tmp_path / "out").exists()
