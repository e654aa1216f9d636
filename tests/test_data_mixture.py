"""Several sources in one YAML: each has its weight in tokens, each document is there once, and a mistake is one line that names the key."""

import gzip
import json
from collections import Counter
from itertools import count

import numpy as np
import pytest
from chat_templates import CHATML, unmarked, write_chat_tokenizer
from data_helpers import pieces_of, rows_of, write_tokenizer
from documents import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_data_conversations import answered
from transformers import AutoTokenizer

import data.prepare.encoding
from data.prepare.documents import by_weight
from data.prepare.mixture import read_mixture
from data.prepare.run import prepare
from data.prompts import load_prompts
from data.reader import RowReader, read_manifest, read_prompts, read_token_counts
from fms_spec.errors import UserError
from pipelines.show.prepared import details_of, summary_of

SHIPPED = sorted((ROOT / "data/configs").glob("*.yaml"))


@pytest.fixture
def mixed(tmp_path):
    """A function that prepares a mixture of YAML text with what `settings` say; its folder."""
    generator = np.random.default_rng(0)
    for name, documents in (("short", 400), ("long", 60)):
        low, length = (0, 10) if name == "short" else (25, 100)
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for _ in range(documents):
                words = generator.integers(low, low + 25, int(generator.integers(length // 2, length * 2)))
                file.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")

    def run(text, out="out", **settings):
        (tmp_path / "mixture.yaml").write_text(text.replace("HERE", str(tmp_path)))
        settings = {"seq_length": 64, "prompt_length": 4, **settings}
        prepare(source=str(tmp_path / "mixture.yaml"), tokenizer=tokenizer, out_dir=str(tmp_path / out), **settings)
        return tmp_path / out

    return run


TWO = "sources: {short: {path: HERE/short.jsonl, weight: 3}, long: {path: HERE/long.jsonl, weight: 1}}"


def shares(rows):
    """Share of the first source's tokens in rows; its words are below w25, and each document's last token is 50."""
    tokens = np.array([token for tokens, _ in rows for token in tokens])
    before = np.concatenate([tokens[:1], tokens[:-1]])
    return (np.where(tokens == 50, before, tokens) < 25).mean()


@given(st.data(), st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
def test_every_beginning_of_the_order_has_each_source_by_its_weight_to_within_a_document(data, weights):
    lengths = np.array(data.draw(st.lists(st.integers(1, 50), min_size=20, max_size=60)))
    owners = np.array(data.draw(st.lists(st.integers(0, len(weights) - 1), min_size=len(lengths), max_size=len(lengths))))
    queues = [np.flatnonzero(owners == number) for number in range(len(weights))]
    order = list(by_weight(queues, lengths, weights))
    assert len(order) == len({*order})
    for end in range(len(order) + 1):
        taken = np.bincount(owners[order[:end]], lengths[order[:end]], len(weights))
        assert np.ptp(taken / weights) <= max(50 / np.array(weights)) + 1e-9
    assert sorted(by_weight(queues, lengths, None)) == [*range(len(lengths))]


def test_rows_have_each_source_by_its_weight_and_no_document_twice(mixed):
    rows = rows_of(folder := mixed(TWO))
    assert abs(shares(rows) - 0.75) < 0.02 and abs(shares(rows[: len(rows) // 4]) - 0.75) < 0.08
    sources = read_manifest(folder)["tables"]["rows-train"]["sources"]
    tokens = {name: part["tokens"] for name, part in sources.items()}
    assert abs(tokens["short"] - 3 * tokens["long"]) <= 3 * 200
    names = read_prompts(folder).sources
    assert len({*names}) == len(names) and {name.split("/")[0] for name in names} == {"short", "long"}


def test_without_weights_all_of_every_source_is_there(mixed):
    folder = mixed(TWO.replace(", weight: 3", "").replace(", weight: 1", ""))
    sources = read_manifest(folder)["tables"]["rows-train"]["sources"]
    assert {name: part["documents"] for name, part in sources.items()} == {"short": 400, "long": 60}


def test_the_mixture_stays_when_tokens_are_bounded_and_no_source_is_read_further_than_its_share_takes(mixed):
    folder = mixed(TWO, max_tokens=2048)
    assert abs(shares(rows_of(folder)) - 0.75) < 0.06
    read = {name: part["tokens_read"] for name, part in read_manifest(folder)["source"]["mixture"].items()}
    assert 1536 <= read["short"] <= 1536 + 20 and 512 <= read["long"] <= 512 + 200


def test_documents_are_held_out_by_weight_too(mixed):
    folder = mixed(TWO, held_out=100)
    held_out = read_manifest(folder)["tables"]["rows-held_out"]["sources"]
    assert sum(part["documents"] for part in held_out.values()) == 100 and held_out["long"]["documents"] < 8  # 13 of all alike
    assert abs(shares(rows_of(folder)) - 0.75) < 0.03


def test_the_same_mixture_gives_the_same_bytes_and_another_weight_is_told(mixed, tmp_path):
    first = {path.name: path.read_bytes() for path in mixed(TWO).iterdir()}
    assert first == {path.name: path.read_bytes() for path in mixed(TWO, "again").iterdir()}
    with pytest.raises(UserError, match=r"another mixture.short.weight \(3.0 there, 2.0 asked\)"):
        mixed(TWO.replace("weight: 3", "weight: 2"))


def test_every_rank_reads_rows_of_the_mixture_once_an_epoch(mixed):
    folder = mixed(TWO)
    count = read_manifest(folder)["tables"]["rows-train"]["rows"]
    batch = next(RowReader(folder, batch_size=count, seed=0))
    documents = [tuple(piece) for piece in pieces_of(rows_of(folder)) if len(piece) > 8]
    assert sorted(batch.row_ids.tolist()) == [*range(count)] and max(Counter(documents).values()) == 1


def test_filters_and_limits_hold_for_their_own_source_and_are_counted(mixed):
    text = "sources: {short: {path: HERE/short.jsonl, min_tokens: 8, max_tokens: 15, limit: 50}, long: {path: HERE/long.jsonl}}"
    folder = mixed(text)
    read = read_manifest(folder)["source"]["mixture"]
    assert read["short"]["documents_read"] == 50 and read["long"]["documents_read"] == 60 and not read["long"]["skipped"]
    assert set(read["short"]["skipped"]) == {"under 8 tokens", "over 15 tokens"}
    lengths = [len(piece) for piece in pieces_of(rows_of(folder)) if max(piece[:-1], default=0) < 25 and piece[-1] == 50]
    assert max(lengths) <= 15
    told = " ".join(details_of(folder))
    assert "under 8 tokens, first short/short.jsonl#" in told and "50 documents of " in told


def test_a_document_that_is_in_two_sources_is_there_once_and_belongs_to_the_first(mixed, tmp_path):
    lines = (tmp_path / "long.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(lines[:20]) + json.dumps({"text": "w1 w2 w3 w4 w5"}) + "\n")
    folder = mixed("sources: {long: {path: HERE/long.jsonl}, more: {path: HERE/more.jsonl}}")
    read = read_manifest(folder)["source"]["mixture"]
    assert read["long"]["documents_read"] == 60 and read["more"]["documents_read"] == 1 and read["more"]["skipped"] == {"copies": 20}


def test_an_endless_stream_beside_a_file_is_read_as_far_as_its_share_takes_or_its_limit(mixed, monkeypatch):
    import datasets

    class Builder:
        hash = "commit"

        def as_streaming_dataset(self, split):
            assert split == "more"
            return iter({"text": f"w30 w31 w{32 + number % 9} " + "w40 " * (number + 1)} for number in count())

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder() if (name, config) == ("a/b", None) else None)
    monkeypatch.setattr(data.prepare.encoding, "BATCH_DOCUMENTS", 4)
    text = "sources: {short: {path: HERE/short.jsonl, weight: 3}, stream: {path: a/b, split: more, weight: 1}}"
    rows = rows_of(folder := mixed(text, max_tokens=2048))
    assert abs(shares(rows) - 0.75) < 0.06
    numbers = [int(name.split("#")[1]) for name in read_prompts(folder).sources if name.startswith("stream/a/b#")]
    assert numbers == [*range(len(numbers))] and len(numbers) > 5  # as it came
    limited = read_manifest(mixed(text.replace("split: more", "split: more, limit: 7"), "limited"))["source"]["mixture"]
    assert limited["stream"]["documents_read"] == 7
    with pytest.raises(UserError, match="source a/b:c:more: names a split, and split less is asked too"):
        mixed("sources: {a: {path: 'a/b:c:more', split: less}}", "twice")


def test_conversations_in_which_other_roles_speak_are_left_out_when_asked(tmp_path):
    tokenizer = write_chat_tokenizer(tmp_path / "t", unmarked(CHATML))
    rows = [{"messages": answered(number)} for number in range(20)]
    rows += [{"messages": [{"role": "system", "content": "hello"}, *answered(number)]} for number in range(20, 25)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "m.yaml").write_text(f"sources: {{chats: {{path: {tmp_path}/chats.jsonl, roles: [user, assistant]}}}}")
    manifest = prepare(source=str(tmp_path / "m.yaml"), tokenizer=tokenizer, out_dir=str(tmp_path / "out"), seq_length=64)
    read = manifest["source"]["mixture"]["chats"]
    assert read["documents_read"] == 20 and read["skipped"] == {"others speak": 5}
    assert read["firsts"] == {"others speak": "chats/chats.jsonl#20 (others speak: system)"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder prepared from twenty conversations and as many texts."""
    place = tmp_path_factory.mktemp("both")
    tokenizer = write_chat_tokenizer(place / "t", unmarked(CHATML))
    rows = {"chats": [{"messages": answered(number)} for number in range(20)]}
    rows["texts"] = [{"text": f"text {number}, " + "and on " * (20 + number)} for number in range(20)]
    for name, lines in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "m.yaml").write_text(f"sources: {{chats: {{path: {place}/chats.jsonl}}, texts: {{path: {place}/texts.jsonl}}}}")
    prepare(source=str(place / "m.yaml"), tokenizer=tokenizer, out_dir=str(place / "out"), seq_length=256, held_out=10)
    return place / "out"


@pytest.mark.parametrize(("train_on", "answers"), [(None, {"yes", "no"}), ("last_answer", {"no"})])
def test_texts_beside_conversations_are_trained_on_whole_and_conversations_on_their_answers(both, train_on, answers):
    served = AutoTokenizer.from_pretrained(both.parent / "t")
    batch = next(RowReader(both, batch_size=read_manifest(both)["tables"]["rows-train"]["rows"], seed=0, train_on=train_on))
    told = Counter()
    for tokens, segments, trained in zip(batch.tokens, batch.segment_ids, batch.trained):
        assert not trained[segments < 0].any()
        for segment in range(segments.max() + 1):
            own = segments == segment
            talks = served.decode(tokens[own][0]) == "<|im_start|>"
            told["conversation" if talks else "text"] += 1
            said = served.decode(tokens[own & trained]).split("<|im_end|>")[:-1]
            assert {text.split()[0] for text in said} == answers if talks else trained[own].all()
    assert min(told.values()) > 5
    assert read_token_counts(both, train_on).equal(batch.tokens[batch.trained].bincount(minlength=len(read_token_counts(both))))


def test_prompts_of_both_kinds_are_pieces_of_texts_and_conversations_up_to_an_answer(both):
    for split in ("train", "held_out"):
        prompts = read_prompts(both, split)
        found = {"chats": set(), "texts": set()}
        for source, tokens, turn, role in zip(prompts.sources, prompts.tokens, prompts.turns, prompts.roles):
            found[source.split("/")[0]].add((turn, role, len(tokens) == 64))
        assert found["texts"] == {(None, None, True)} and {(1, "user", False), (2, "user", False)} <= found["chats"]
    held_out = load_prompts(both, str(both.parent / "t"))
    assert Counter(prompt.source for prompt in held_out) == Counter(prompt.category for prompt in held_out) and len(held_out) == 10
    assert all((prompt.source == "chats") == (prompt.role == "user") == (prompt.first_turn is not None) for prompt in held_out)
    assert "40 conversations and texts of " in summary_of(both)[0] and "of them trained on" in summary_of(both)[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {a: {path: HERE/short.jsonl, wieght: 3}}", "unknown key sources.a.wieght, did you mean weight?"),
        ("source: {a: {path: HERE/short.jsonl}}", "unknown key source, did you mean sources?"),
        ("sources: {}", "sources: Dictionary should have at least 1 item"),
        ("sources: [HERE/short.jsonl]", "sources: Input should be a valid dictionary"),
        ("[HERE/short.jsonl]", "should be a section, with keys and values"),
        ("sources: {a: HERE/short.jsonl}", "sources.a: should be a section, with keys and values"),
        ("sources: {a: {weight: 1}}", "sources.a.path is missing"),
        ("sources: {a: {path: HERE/short.jsonl, weight: 0}}", "sources.a.weight: Input should be greater than 0"),
        ("sources: {a: {path: HERE/short.jsonl, weight: much}}", "sources.a.weight: Input should be a valid number (got 'much')"),
        ("sources: {a: {path: HERE/short.jsonl, limit: 1.5}}", "sources.a.limit: Input should be a valid integer"),
        ("sources: {a: {path: HERE/short.jsonl, format: chat}}", "sources.a.format: Input should be 'text', 'messages'"),
        ("sources: {a: {path: HERE/short.jsonl, roles: [robot]}}", "sources.a.roles.0: Input should be 'system'"),
        ("sources: {a: {path: HERE/short.jsonl, roles: [user]}}", "sources.a.roles: HERE/short.jsonl holds texts, in which nobody speaks"),
        ("sources: {a: {path: HERE/short.jsonl, min_tokens: 9, max_tokens: 8}}", "sources.a: min_tokens 9 is over max_tokens 8"),
        ("sources: {a: {path: HERE/short.jsonl, format: alpaca, text_column: b}}", "sources.a: format alpaca reads columns of its own"),
        ("sources: {a: {path: HERE/short.jsonl, split: test}}", "short.jsonl: split test is asked, and it is one file"),
        ("sources: {a: {path: HERE/nothing.jsonl}}", "nothing.jsonl: no such file or folder"),
        ("sources: {a: {path: HERE/short.jsonl, weight: 1}, b: {path: HERE/long.jsonl}}", "sources.b has no weight, and others have"),
        ("sources: {a b: {path: HERE/short.jsonl}}", "sources.a b"),
        ("sources: {a: {path: HERE/short.jsonl}, a: {path: HERE/long.jsonl}}", "mixture.yaml: line 1: "),
        (
            "sources: {a: {path: HERE/short.jsonl, min_tokens: 99}}",
            "short.jsonl: no documents; skipped 400 documents (400 under 99 tokens)",
        ),
        ("sources: {a: {path: HERE/short.jsonl, format: text, text_column: body}}", "no column 'body'"),
    ],
)
def test_a_mistake_in_a_mixture_is_one_line_that_names_the_key_and_nothing_is_written(mixed, tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        mixed(text)
    assert message.replace("HERE", str(tmp_path)) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_a_mixture_leaves_open_is_refused(mixed, tmp_path):
    open_weights = TWO.replace(", weight: 3", "").replace(", weight: 1", "")
    with pytest.raises(UserError, match="--max_tokens=256: of which source, is not said; give each in .*mixture.yaml a weight"):
        mixed(open_weights, max_tokens=256)
    with pytest.raises(UserError, match="--format=text: .*mixture.yaml has several sources; write it there"):
        mixed(TWO, format="text")


def test_a_split_is_chosen_by_the_names_of_files_in_a_folder(mixed, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / "set").mkdir(exist_ok=True)
        kind = "long" if name == "train" else "short"
        (tmp_path / "set" / f"{name}-0.jsonl").write_bytes((tmp_path / f"{kind}.jsonl").read_bytes())
    read = lambda text, out: read_manifest(mixed(text, out))["source"]["documents_read"]  # noqa: E731
    assert read("sources: {a: {path: HERE/set}}", "train") == 60
    assert read("sources: {a: {path: HERE/set, split: validation}}", "validation") == 400
    with pytest.raises(UserError, match="has no files of split test; their names tell of train, validation"):
        mixed("sources: {a: {path: HERE/set, split: test}}", "test")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_mixture_is_read_and_says_how_it_is_run(path):
    assert len(read_mixture(path)) > 1
    text = path.read_text()
    assert text.startswith("#") and f"--source=data/configs/{path.name}" in text


BAD = ['{"text": "w1 w2 w3"}', '{"text": "w4', '["w5"]', '{"body": "w6"}', '{"text": 7}', '{"text": "w8 w9 w10"}', "", '{"text": ""}']


@pytest.mark.parametrize(("name", "bad"), [("a.jsonl", 4), ("a.json", 4), ("a.csv", 1)])
def test_bad_rows_are_skipped_counted_and_the_first_named_only_when_asked(tmp_path, name, bad, capsys):
    rows = {"a.csv": "text,n\nw1 w2 w3,1\nw4\nw8 w9 w10,2\n", "a.jsonl": "\n".join(BAD), "a.json": "\n".join(BAD)}
    (tmp_path / name).write_text(rows[name])
    settings = {"source": str(tmp_path / name), "tokenizer": write_tokenizer(tmp_path / "t"), "out_dir": str(tmp_path / "out")}
    settings |= {"seq_length": 4, "prompt_length": 3}
    with pytest.raises(UserError, match=f"{name}:[23]: "):
        prepare(**settings)
    assert not (tmp_path / "out").exists()
    manifest = prepare(**settings, on_bad_row="skip")
    assert manifest["source"]["skipped"]["unreadable"] == bad and manifest["source"]["documents_read"] == 2
    assert f"{tmp_path}/{name}:" in capsys.readouterr().err
    assert f"unreadable: {tmp_path}/{name}:" in " ".join(summary_of(tmp_path / "out"))


@pytest.mark.parametrize("row", [{"messages": "w1"}, {"messages": [{"role": "robot", "content": "w1"}]}, {"messages": None}])
def test_a_bad_conversation_that_comes_first_is_skipped_too(tmp_path, row):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [row, {"messages": answered(0)}]))
    tokenizer = write_chat_tokenizer(tmp_path / "t", unmarked(CHATML))
    settings = {"source": str(tmp_path / "a.jsonl"), "tokenizer": tokenizer, "out_dir": str(tmp_path / "out"), "seq_length": 64}
    manifest = prepare(**settings, on_bad_row="skip")
    assert manifest["source"]["skipped"] == {"unreadable": 1} and manifest["source"]["documents_read"] == 1


def test_a_file_with_nothing_but_bad_rows_is_refused_with_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"texts": "w1"}\n{"texts": "w2"}\n')
    with pytest.raises(UserError, match="skipped 2 documents .2 unreadable., the first is .*a.jsonl:1: .*--text_column=texts"):
        settings = {"source": str(tmp_path / "a.jsonl"), "tokenizer": write_tokenizer(tmp_path / "t"), "out_dir": str(tmp_path / "out")}
        prepare(**settings, on_bad_row="skip")


def test_a_damaged_file_stops_although_bad_rows_are_skipped(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "w1"}\n' * 1000)[:-10])
    with pytest.raises(UserError, match="a.jsonl.gz: cannot be read, it may be cut short"):
        settings = {"source": str(tmp_path / "a.jsonl.gz"), "tokenizer": write_tokenizer(tmp_path / "t"), "out_dir": str(tmp_path / "out")}
        prepare(**settings, on_bad_row="skip")
