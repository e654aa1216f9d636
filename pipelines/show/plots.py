"""Pictures of what was measured, as PNG files."""

import textwrap
from io import BytesIO

import matplotlib

from fms_spec.files import write_whole
from pipelines.show.console import GROUPS

matplotlib.use("Agg")  # files, never a window
from matplotlib import pyplot


def save(figure, path):
    """Write a figure whole, and let go of it."""
    picture = BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    write_whole(path, picture.getvalue())


def plot_evaluation(values, path):
    """Acceptance per position, and speed-up with its interval of all texts and of groups where there are several, of `figures.summary`'s
    values."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(1, 2), layout="constrained")
    shares = values["acceptance_per_position"]
    left.bar(range(1, len(shares) + 1), shares)
    left.set(title=f"acceptance length {values['acceptance_length']:.2f}", xlabel="candidate depth", ylabel="share of steps", ylim=(0, 1))
    left.set_xticks(range(1, len(shares) + 1))
    groups = {"all": values | {"prompt_lookup_speedup": values["prompt_lookup"]["speedup"]}}
    for kind, shown_as in GROUPS.items():
        groups |= {shown_as.format(name): group for name, group in values[kind].items() if len(values[kind]) > 1}
    ticks = range(len(groups))
    middles = [group["speedup"] for group in groups.values()]
    errors = [
        [abs(group["speedup"] - group["speedup_interval"][side]) for group in groups.values()] for side in (0, 1)
    ]  # fmt: skip
    right.bar([tick - 0.2 for tick in ticks], middles, 0.4, yerr=errors, capsize=3, label="speculator")
    right.bar([tick + 0.2 for tick in ticks], [group["prompt_lookup_speedup"] for group in groups.values()], 0.4, label="prompt lookup")
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set_xticks(list(ticks), groups, rotation=30, ha="right", parse_math=False)
    right.set(title="speed against plain decoding", ylabel="times")
    right.legend()
    save(figure, path)


def plot_ratios(ratios, title, path):
    """[(label, value)] as bars from 1, on a logarithmic axis: what is twice as fast reaches as far as what takes twice as long."""
    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.3 * len(ratios)), layout="constrained")
    ticks = range(len(ratios))
    axes.barh(ticks, [value - 1 for _, value in ratios], left=1)
    axes.set_yticks(ticks, [label for label, _ in ratios], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1.0, color="black", linewidth=0.8)
    for tick, (_, value) in enumerate(ratios):
        axes.annotate(f" {value:.2f}", (max(value, 1.0), tick), va="center", fontsize=8)
    axes.set_title("\n".join(textwrap.fill(line, 150) for line in title.splitlines()), fontsize=8)
    axes.set_xlabel("times")
    save(figure, path)
