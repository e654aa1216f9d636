"""Traces of chosen steps, to be opened in Perfetto or chrome://tracing."""

from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fms_spec.errors import UserError


def profiled_steps(text, total):
    """(first, end) of --profile=FIRST:END, steps counted from 0, END not among them.

    Raises:
        UserError: no such range within a run of `total` steps.
    """
    first, _, end = str(text).partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) <= total):
        raise UserError(f"--profile={text}: give FIRST:END with FIRST below END and END at most schedule.steps, {total}")
    return int(first), int(end)


@contextmanager
def profiling(out_dir, first, end, step, rank):
    """A profiler of steps `first` to `end` for a run that begins at `step`; writes out_dir/profile/steps-FIRST-END-process-RANK.json."""
    path = out_dir / "profile" / f"steps-{first}-{end}-process-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    before = max(0, first - step)
    warmup = min(1, before)  # a step that is recorded and thrown away: the first one pays for the tools
    chosen = schedule(skip_first=before - warmup, wait=0, warmup=warmup, active=end - step - before, repeat=1)
    with profile(activities=activities, schedule=chosen, on_trace_ready=lambda prof: prof.export_chrome_trace(str(path))) as profiler:
        yield profiler
