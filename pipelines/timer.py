"""Ways of doing one thing, measured in turn, so that all meet the same machine."""

import statistics
from functools import partial

from data.progress import progress
from fms_spec.timing import timed


def in_turn(methods, rounds, measure):
    """What measure(method, round) says, of all {name: method} in every round, every other one backwards: what ran before may have
    warmed or cooled the machine.

    Args:
        rounds: iterable of what each is about.

    Returns:
        {name: list of what was said, round by round}
    """
    results = {name: [] for name in methods}
    for number, about in enumerate(rounds):
        for name in list(methods)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(measure(methods[name], about))
    return results


def seconds_in_turn(methods, device, rounds, left_out=0):
    """{name: list of seconds} of functions without arguments. left_out: so many rounds before don't count: first calls choose kernels."""
    taken = in_turn(methods, range(left_out + rounds), lambda work, _: timed(work, device)[1])
    return {name: seconds[left_out:] for name, seconds in taken.items()}


def median_seconds(methods, device, rounds, left_out=0):
    """{name: median} of `seconds_in_turn`."""
    return medians(seconds_in_turn(methods, device, rounds, left_out))


def medians(results):
    """{name: median} of {name: numbers}."""
    return {name: statistics.median(numbers) for name, numbers in results.items()}


def texts_in_turn(methods, prompts, title):
    """Every prompt by all of {name: function of it that returns the tokens it wrote, when they are there}.

    Returns:
        ({name: tokens per second}, {name: list of each prompt's tokens})
    """
    results = in_turn(methods, progress(prompts, desc=title, unit="prompt"), lambda write, prompt: timed(partial(write, prompt)))
    texts = {name: [text for text, _ in pairs] for name, pairs in results.items()}
    return {name: sum(map(len, texts[name])) / sum(seconds for _, seconds in pairs) for name, pairs in results.items()}, texts
