from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipelines.schedule import Schedule, learning_rate_factor

PATTERNS = st.lists(st.tuples(st.sampled_from(["phase1", "phase2"]), st.integers(1, 7)), min_size=1, max_size=4).map(tuple)


@given(PATTERNS, st.integers(1, 200))
def test_interleaved_phases_follow_the_pattern_over_and_over(pattern, steps):
    cycle = [phase for phase, count in pattern for _ in range(count)]
    schedule = Schedule(pattern, "interleaved", steps)
    assert [schedule.phase(step)[0] for step in range(steps)] == [cycle[step % len(cycle)] for step in range(steps)]


@given(PATTERNS, st.integers(1, 200), st.sampled_from(["interleaved", "sequential"]))
def test_each_phase_counts_its_own_steps_without_gap_and_both_modes_give_each_phase_the_same_share(pattern, steps, mode):
    schedule = Schedule(pattern, mode, steps)
    seen = {}
    for step in range(steps):
        phase, within = schedule.phase(step)
        assert within == seen.get(phase, 0)
        seen[phase] = within + 1
    assert seen == {phase: count for phase, count in schedule.phase_steps().items() if count}
    assert schedule.phase_steps() == Schedule(pattern, "interleaved", steps).phase_steps()


@given(PATTERNS, st.integers(1, 200))
def test_sequential_phases_never_come_back(pattern, steps):
    schedule = Schedule(pattern, "sequential", steps)
    order = [schedule.phase(step)[0] for step in range(steps)]
    assert sum(a != b for a, b in pairwise(order)) <= 1


@given(
    st.integers(1, 5000), st.floats(0.01, 1), st.floats(0, 0.01), st.integers(0, 3000), st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "constant"]),
)  # fmt: skip
def test_the_learning_rate_is_positive_and_never_over_its_peak_whatever_the_length(steps, peak, end, warmup_steps, warmup_share, decay):
    settings = dict(peak=peak, end=end, warmup_steps=warmup_steps, warmup_share=warmup_share, decay=decay)
    factors = [learning_rate_factor(step, steps, **settings) for step in {0, 1 % steps, steps // 2, steps - 1}]
    assert all(0 < factor <= peak for factor in factors[:1]) and all(0 <= factor <= peak for factor in factors)


def test_the_ibm_recipes_learning_rates():
    phase1 = dict(peak=1.0, end=0.1, warmup_steps=2000, warmup_share=0.05, decay="cosine")
    phase2 = dict(peak=0.1, end=0.01, warmup_steps=2000, warmup_share=0.05, decay="cosine")
    at = lambda step, steps, phase: learning_rate_factor(step, steps, **phase)  # noqa: E731
    assert at(749, 15000, phase1) > 0.99 and abs(at(374, 15000, phase1) - 0.75) < 1e-9  # parabola: 1 - (1 - 1/2)^2
    assert abs(at(14999, 15000, phase1) - 0.1) < 1e-9 and abs(at(7500, 15000, phase1) - 0.55) < 1e-3
    assert abs(at(299, 6000, phase2) - 0.0995) < 1e-3 and abs(at(5999, 6000, phase2) - 0.01) < 1e-9


def test_a_phase_of_one_step_trains_at_its_peak():
    assert learning_rate_factor(0, 1, peak=1.0, end=0.1, warmup_steps=2000, warmup_share=0.05, decay="cosine") == 1.0
