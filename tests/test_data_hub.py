"""Data sets of the Hugging Face Hub in a mixture, streamed by `datasets` from where it keeps those that were loaded once."""

import json

import datasets
import numpy as np
import pytest
from chat_templates import CHATML, unmarked, write_chat_tokenizer
from data_helpers import rows_of, write_tokenizer
from test_data_conversations import CALL, RESULT, TALK, USER, answered
from test_data_mixture import shares

from data.prepare.rows import Conversation
from data.prepare.run import prepare
from data.prepare.sources import open_source
from data.reader import read_manifest, read_prompts
from fms_spec.errors import UserError

LONG = [f"w{30 + number % 20} " + "w40 w41 " * (1 + number % 9) for number in range(2500)]


class Kept(datasets.GeneratorBasedBuilder):
    """Rows that are put where `datasets` keeps what it has loaded from the Hub."""

    def _info(self):
        return datasets.DatasetInfo()

    def _split_generators(self, _):
        return [datasets.SplitGenerator(name, {"rows": rows}) for name, rows in self.rows.items()]

    def _generate_examples(self, rows):
        yield from enumerate(rows)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that keeps a data set, {split: rows}, under a name and a config; the folder of its files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")

    def keep(name, config, **rows):
        builder = Kept(str(tmp_path / "hub"), name.split("/")[-1], config, hash="c0ffee", repo_id=name)
        builder.rows = rows
        builder.download_and_prepare()
        return tmp_path / "hub" / name.replace("/", "___") / config / "0.0.0" / "c0ffee"

    return keep


@pytest.fixture
def run(tmp_path):
    """A function that prepares a file beside a data set: its folder."""

    def prepared(lines, tokenizer, settings, out="out", **how):
        (tmp_path / "file.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "mixture.yaml").write_text(f"sources: {{file: {{path: {tmp_path}/file.jsonl, weight: 3}}, hub: {{{settings}}}}}")
        prepare(source=str(tmp_path / "mixture.yaml"), tokenizer=tokenizer, out_dir=str(tmp_path / out), **how)
        return tmp_path / out

    return prepared


@pytest.fixture
def short():
    generator = np.random.default_rng(0)
    return [{"text": " ".join(f"w{word}" for word in generator.integers(0, 25, 12))} for _ in range(400)]


def test_texts_of_the_hub_have_their_share_of_the_tokens_beside_those_of_a_file(hub, run, short, tmp_path):
    hub("some/texts", "en", train=[{"text": "w0"}], more=[{"number": 7, "text": text} for text in LONG])
    tokenizer, how = write_tokenizer(tmp_path / "t"), {"seq_length": 64, "prompt_length": 2, "held_out": 20}
    folder = run(short, tokenizer, "path: 'some/texts:en', split: more, weight: 1", **how)
    rows = rows_of(folder)
    assert abs(shares(rows) - 0.75) < 0.02 and abs(shares(rows[: len(rows) // 4]) - 0.75) < 0.04
    tokens = {name: part["tokens"] for name, part in read_manifest(folder)["tables"]["rows-train"]["sources"].items()}
    assert abs(tokens["file"] - 3 * tokens["hub"]) <= 3 * 20
    names = [name for name in read_prompts(folder).sources if name.startswith("hub/some/texts#")]
    assert len(names) > 50 and names == sorted(names, key=lambda name: int(name.split("#")[1]))
    again = run(short, tokenizer, "path: 'some/texts:en:more', weight: 1", "again", **how)
    for path in folder.glob("*.parquet"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    part = run(short, tokenizer, "path: 'some/texts:en:more', weight: 1", "part", **how | {"max_tokens": 1024, "held_out": 0})
    assert abs(shares(rows_of(part)) - 0.75) < 0.06
    assert read_manifest(part)["source"]["mixture"]["hub"]["tokens_read"] <= 256 + 20


def test_conversations_of_the_hub_stand_beside_texts_of_a_file_without_what_others_of_their_fields_are(hub, run, tmp_path):
    hub("some/chats", "default", train=[{"messages": [USER, CALL, RESULT, *TALK[1:]]}, *({"messages": answered(n)} for n in range(30))])
    assert next(open_source("some/chats").documents(None)).content == Conversation([USER, CALL, RESULT, *TALK[1:]])
    tokenizer = write_chat_tokenizer(tmp_path / "t", unmarked(CHATML))
    texts = [{"text": f"text {number}, " + "and on " * 30} for number in range(30)]
    read = read_manifest(run(texts, tokenizer, "path: some/chats, weight: 1", seq_length=256))["source"]["mixture"]
    assert {name: part["holds"] for name, part in read.items()} == {"file": "texts", "hub": "conversations"}
    assert read["hub"]["documents_read"] + sum(read["hub"]["skipped"].values()) == 31


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("path: some/other", "source some/other: no such file or folder here, nor a dataset on the Hub"),
        ("path: 'some/texts:fr'", "source some/texts:fr: not to be had from the Hub so .*config 'fr'.*'en'"),
        ("path: 'some/texts:en:dev'", "source some/texts:en:dev: not to be had .*Bad split: dev. Available splits: .'train'."),
        ("path: 'some/texts:en:dev', split: train", "names a split, and split train is asked too; leave one of the two out"),
        ("path: some/texts, text_column: body", "source some/texts: .*no column 'body'"),
        ("path: some/texts, format: messages", "source some/texts: .*messages"),
        ("path: some/texts, roles: [user]", "sources.hub.roles: some/texts holds texts, in which nobody speaks"),
        ("path: some/texts", "source some/texts: the stream broke after row [0-9]+ .*; try again"),
    ],
)
def test_what_can_not_be_had_from_the_hub_is_one_line_and_nothing_is_left(hub, run, short, tmp_path, settings, message):
    (file,) = hub("some/texts", "en", train=[{"text": text} for text in LONG]).glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=message) as caught:
        run(short, write_tokenizer(tmp_path / "t"), f"{settings}, weight: 1", seq_length=64, prompt_length=2)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
