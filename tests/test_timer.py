"""How ways are measured against one another, and what is drawn of prompts for an interval."""

import pytest
import torch

import fms_spec.timing
from fms_spec.timing import Stopwatch, timed
from pipelines.measure.figures import RESAMPLES, interval, resampled
from pipelines.timer import in_turn, median_seconds, medians, seconds_in_turn, texts_in_turn


@pytest.fixture
def clock(monkeypatch):
    """A list of one time, in seconds, that only the measured work moves."""
    now = [0.0]
    monkeypatch.setattr(fms_spec.timing.time, "perf_counter", lambda: now[0])
    return now


def taking(clock, *seconds):
    """Function that takes `seconds`, call by call."""
    waits = iter(seconds)

    def work():
        clock[0] += next(waits)

    return work


def test_all_ways_are_in_every_round_and_every_other_round_is_backwards():
    said = []
    found = in_turn({"a": 1, "b": 2}, "xyz", lambda way, about: said.append((way, about)) or f"{way}{about}")
    assert said == [(1, "x"), (2, "x"), (2, "y"), (1, "y"), (1, "z"), (2, "z")]
    assert found == {"a": ["1x", "1y", "1z"], "b": ["2x", "2y", "2z"]}
    assert medians({"a": [3, 1, 2], "b": [1, 2]}) == {"a": 2, "b": 1.5}


def test_seconds_are_those_of_the_work_and_first_calls_may_be_left_out(clock):
    ways = lambda: {"a": taking(clock, 9, 1, 2, 4), "b": taking(clock, 1, 8, 8, 8)}  # noqa: E731
    assert seconds_in_turn(ways(), torch.device("cpu"), 4) == {"a": [9, 1, 2, 4], "b": [1, 8, 8, 8]}
    assert median_seconds(ways(), torch.device("cpu"), 3, left_out=1) == {"a": 2, "b": 8}


def test_the_rate_of_writing_is_all_tokens_over_all_seconds(clock):
    def write(tokens, seconds):
        def run(prompt):
            clock[0] += seconds
            return [prompt] * tokens

        return run

    rates, texts = texts_in_turn({"slow": write(2, 1.0), "quick": write(3, 0.5)}, [7, 8], "writing")
    assert rates == {"slow": 2.0, "quick": 6.0} and texts == {"slow": [[7, 7], [8, 8]], "quick": [[7] * 3, [8] * 3]}


def test_a_stopwatch_adds_up_parts_and_goes_on_from_what_was_saved(clock):
    assert timed(lambda: "done") == ("done", 0.0)
    watch = Stopwatch({"data": 5.0})
    for part in ("data", "heads", "heads"):
        with pytest.raises(KeyError), watch.measure(part):
            clock[0] += 1
            raise KeyError
    assert watch.seconds == {"data": 6.0, "heads": 2.0}


def test_prompts_are_drawn_alike_for_every_table_so_that_differences_of_them_are_fair():
    sums = torch.arange(12, dtype=torch.float64).view(2, 6)
    drawn = resampled(sums)
    assert drawn.shape == (2, RESAMPLES) and torch.equal(resampled(sums[1]), drawn[1])
    assert torch.equal(drawn[1] - drawn[0], torch.full((RESAMPLES,), 36.0, dtype=torch.float64))
    low, high = interval(drawn[0])
    assert low < 15 < high and interval(resampled(sums[0])) == [low, high] == [7.0, 23.0]
