"""What devices can do: public figures by name, or this machine's own, measured in a second."""

import os
from dataclasses import dataclass
from functools import partial

import torch

from fms_spec.errors import UserError
from fms_spec.model_config import DTYPES
from pipelines.timer import seconds_in_turn

ACROSS_NODES = 50e9  # bytes/s a GPU: 400 Gb/s each, as in NVIDIA's reference clusters
# Measured: python, torch, ibm-fms, transformers, pyarrow and their first calls. torch's builds for GPUs load more: 244 MiB 2.11, 303 2.14.
CPU_FRAMEWORK = (930 if torch.version.cuda else 660) * 2**20
CUDA_FRAMEWORK = 600 * 2**20  # a CUDA context with cuBLAS's workspaces; not measured here
# Heap over what is alive in it, `plan.WHOLE` aside: glibc before 2.38 rarely gives an aligned block back whole. Measured: 1.1 to 1.5 times.
CPU_HEAP = 1.25


@dataclass(frozen=True)
class Device:
    """memory: bytes. flops: dense bf16, per second. bandwidth, link: bytes per second of its memory, and to its neighbours in the node.

    compute_share, bandwidth_share: of those rates that a run is taken to reach. framework: bytes taken before any tensor. heap: bytes the
    allocator holds for each byte alive.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    compute_share: float = 0.4
    bandwidth_share: float = 0.7
    framework: float = CUDA_FRAMEWORK
    heap: float = 1.0


# Data sheets: memory in GiB, bf16 FLOP/s without sparsity, memory and one-way link bytes/s (NVLink; PCIe 4.0 x16 where there is none).
DEVICES = {
    name: Device(name, gib * 2**30, flops, bandwidth, link)
    for name, gib, flops, bandwidth, link in [
        ("a100-40", 40, 312e12, 1.555e12, 300e9), ("a100-80", 80, 312e12, 2.039e12, 300e9), ("h100", 80, 989e12, 3.35e12, 450e9),
        ("h200", 141, 989e12, 4.8e12, 450e9), ("b200", 180, 2250e12, 8.0e12, 900e9), ("l40s", 48, 362e12, 0.864e12, 32e9),
        ("rtx4090", 24, 165e12, 1.008e12, 32e9),
    ]
}  # fmt: skip


def find_device(name, dtype):
    """The `Device` of a name; "here" measures this machine in a dtype of `DTYPES`.

    Raises:
        UserError: a name that is not known.
    """
    if name == "here":
        return measure_here(dtype)
    if name not in DEVICES:
        raise UserError(f"--device={name}: give here, or one of {', '.join(DEVICES)}")
    return DEVICES[name]


def measure_here(dtype):
    """This machine's first GPU, or its CPU: rates of a matrix product and of a copy."""
    cuda = torch.cuda.is_available()
    device, size = ("cuda", 8192) if cuda else ("cpu", 1024)
    matrix = torch.randn(size, size, device=device).to(DTYPES[dtype])
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    seconds = fastest({"product": lambda: matrix @ matrix, "copy": block.clone}, device)
    flops, bandwidth = 2 * size**3 / seconds["product"], 2 * block.nbytes / seconds["copy"]
    shared = {"compute_share": 1.0, "bandwidth_share": 1.0}  # measured, not promised
    if cuda:
        return Device("here", device_memory(), flops, bandwidth, 32e9, **shared)
    return Device("here", device_memory(), flops, bandwidth, bandwidth / 2, **shared, framework=CPU_FRAMEWORK, heap=CPU_HEAP)


def fastest(works, device):
    """{name: seconds of the fastest of a few calls} of functions without arguments; the first calls warm up."""
    return {name: min(seconds) for name, seconds in seconds_in_turn(works, torch.device(device), 5, left_out=2).items()}


def faster_dtype(rows=512, inner=576, columns=8192):
    """ "bfloat16" or "float32", whichever multiplies matrices faster here; bfloat16 on a GPU.

    CPUs differ: bf16 can run at twice the rate of fp32, and on the Xeon of benchmarks/README.md it runs at half. The shape is that of
    a training step's read-out.
    """
    if torch.cuda.is_available():
        return "bfloat16"
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    factors = {name: (a.to(DTYPES[name]), b.to(DTYPES[name])) for name in ("float32", "bfloat16")}
    seconds = fastest({name: partial(torch.mm, *pair) for name, pair in factors.items()}, "cpu")
    return min(seconds, key=seconds.get)


def device_memory():
    """Bytes of the first GPU, or of this machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
