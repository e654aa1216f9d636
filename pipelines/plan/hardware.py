"""What this machine is good at, measured."""

import time

import torch


def faster_dtype(rows=512, inner=576, columns=8192, repeats=5):
    """ "bfloat16" or "float32", whichever multiplies matrices faster here; bfloat16 on a GPU.

    CPUs differ: bf16 can run at twice the rate of fp32, and on the cores of the README's figures it runs at half. The shape is that of
    a training step's read-out.
    """
    if torch.cuda.is_available():
        return "bfloat16"
    seconds = {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(*shape).to(getattr(torch, name)) for shape in ((rows, inner), (inner, columns)))
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[name] = min(times[1:])  # the first one chooses a kernel
    return min(seconds, key=seconds.get)
