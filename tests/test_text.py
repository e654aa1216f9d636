"""Tokens become text piece by piece; nothing half-made and nothing of a stop string ever comes out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fms_spec.text import TextStream

EXAMPLES = {"deadline": None, "derandomize": True, "database": None}
# Token i is byte i; then come longer ones, some of which hold a part of a character, and <eos>.
EURO, SMILE = "€".encode(), "😀".encode()
LONGER = [b"ab", b"abc", b"de", b"bc", b" a", "é".encode(), EURO[:2], EURO[1:], b"c" + SMILE[:1], SMILE[1:], SMILE[1:3], SMILE[3:] + b"a"]
PIECES = [bytes([byte]) for byte in range(256)] + LONGER
EOS = len(PIECES)


@pytest.fixture(scope="module")
def tokenizer():
    # Byte-level vocabularies write printable bytes as they are and the others with letters from 256 on.
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    backend = Tokenizer(models.BPE({"".join(letters[byte] for byte in piece): i for i, piece in enumerate(PIECES)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def tokens_of(*pieces):
    return [PIECES.index(piece) for piece in pieces]


@st.composite
def texts(draw):
    """(text, tokens that spell it in some way)"""
    text = draw(st.text(st.sampled_from("abcde é€😀\n"), max_size=20))
    rest, tokens = text.encode(), []
    while rest:
        tokens.append(draw(st.sampled_from([i for i, piece in enumerate(PIECES) if rest.startswith(piece)])))
        rest = rest[len(PIECES[tokens[-1]]) :]
    return text, tokens


def growing(tokens):
    """The text after each token; tokens that end within a character wait for the next ones."""
    text, waiting = "", b""
    for token in tokens:
        waiting += PIECES[token]
        try:
            text, waiting = text + waiting.decode(), b""
        except UnicodeDecodeError:
            pass
        yield token, text


@settings(max_examples=200, **EXAMPLES)
@given(spelled=texts())
def test_the_pieces_add_up_to_the_text_and_nothing_whole_is_held_back(tokenizer, spelled):
    text, tokens = spelled
    assert tokenizer.decode(tokens) == text
    stream, out = TextStream(tokenizer), ""
    for token, so_far in growing(tokens):
        out += stream.push(token)
        assert out == so_far == stream.text
    assert out == text and stream.finish() == "" and not stream.stopped


def test_a_character_split_over_tokens_is_held_back_until_it_is_whole(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens_of(b"a", EURO[:2], EURO[2:], SMILE[:1], SMILE[1:3], SMILE[3:] + b"a", b"b")]
    assert pieces == ["a", "", "€", "", "", "😀a", "b"] and stream.finish() == ""


def test_special_tokens_are_not_text(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in [*tokens_of(b"ab"), EOS, *tokens_of(b"de"), EOS]] == ["ab", "", "de", ""]


@settings(max_examples=500, **EXAMPLES)
@given(spelled=texts(), stops=st.lists(st.text(st.sampled_from("abcde €"), min_size=1, max_size=6), min_size=1, max_size=3), data=st.data())
def test_a_stop_string_ends_the_text_before_it_and_no_part_of_it_leaks(tokenizer, spelled, stops, data):
    text, tokens = spelled
    if text and data.draw(st.booleans()):  # a stop string that is there for sure
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 8))])
    stream, out, ended = TextStream(tokenizer, stops), "", False
    for token, so_far in growing(tokens):
        out += stream.push(token)
        places = [so_far.find(stop) for stop in stops if stop in so_far]
        ended = bool(places)
        assert stream.stopped == ended and out == stream.text
        if ended:
            assert out == so_far[: min(places)]
            break
        # All comes out but the longest end that a stop string might begin with.
        ends = [so_far[place:] for place in range(len(so_far) + 1)]
        assert out + next(end for end in ends if any(stop.startswith(end) for stop in stops)) == so_far
    assert stream.finish() == ("" if ended else text[len(out) :])
    assert stream.text == (out if ended else text)


def test_a_stop_string_spelled_by_several_tokens_never_shows_its_beginning(tokenizer):
    spellings = [(b"abc", b"de"), (b"ab", b"c", b"de"), (b"a", b"bc", b"d", b"e"), (b" a", b"bc", b"de")]
    for spelling in spellings:
        for stop in ("abcde", "abcd", "abcdefgh"):
            stream = TextStream(tokenizer, (stop,))
            out = "".join(stream.push(token) for token in tokens_of(*spelling))
            before = " " if spelling[0] == b" a" else ""
            assert out == before and stream.stopped == (stop != "abcdefgh")
            assert stream.finish() == ("" if stream.stopped else "abcde")


def test_what_only_looked_like_a_stop_string_comes_out_once_it_is_another_text(tokenizer):
    stream = TextStream(tokenizer, ("abcx", "dex"))
    assert [stream.push(token) for token in tokens_of(b"abc", b"de", b"ab", b"b")] == ["", "abc", "de", "abb"]
    assert stream.finish() == "" and stream.text == "abcdeabb"
    stream = TextStream(tokenizer, ("abcx", "dex"))
    assert [stream.push(token) for token in tokens_of(b"de", b"x")] == ["", ""] and stream.stopped and stream.finish() == ""


def test_stop_strings_are_text_until_they_may_stop(tokenizer):
    stream = TextStream(tokenizer, ("bc",))
    assert [stream.push(token, may_stop=False) for token in tokens_of(b"abc", b"bc")] == ["abc", "bc"] and not stream.stopped
    assert [stream.push(token) for token in tokens_of(b"a", b"bc")] == ["a", ""] and stream.stopped
