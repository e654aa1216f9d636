"""How losses pass over a chunk of positions' logits: in place on a CPU, compiled on a GPU.

Shapes: c positions of a chunk, k feature width, r draft vocabulary.

A GPU's products are over before its memory has given and taken logits ten times: of 512 x 49,152 in fp32, as a CPU keeps them, that is
1 GB, where the products of features 576 wide take a tenth of a millisecond. So there logits stay in the products' own dtype, torch.compile
joins what reads and writes them, and chunks are larger, as the read-out's gradient is added to once a chunk.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fms_spec.read_out import capped

CPU_ROWS = 512  # logits of so many at once are 0.26 GB for 128k tokens in fp32, and matrix products already run at full rate
GPU_ROWS, GPU_LOGITS = 8192, 2**28  # at most so many positions, and logits: half a GB of them in bf16

Room = list[Any]  # fp32 [c, r] or None each: log q of the draft, log p of the base model, and two more to write to
Product = tuple[torch.Tensor, torch.Tensor, float | None]  # features [c, k] and read-out [r, k] of logits, and their soft cap
Work = Callable[..., tuple[torch.Tensor, ...]]  # of a room and more: what is found; log q becomes the gradient by the logits


@dataclass(frozen=True)
class Arithmetic:
    """In which dtype losses compute their products, and how they pass over the logits: `InPlace` or `Compiled`."""

    dtype: torch.dtype
    way: "type[InPlace] | type[Compiled]"

    def rows(self, columns: int) -> int:
        """Positions whose logits exist at once, of so many columns."""
        return CPU_ROWS if self.way is InPlace else min(GPU_ROWS, max(1, GPU_LOGITS // columns // CPU_ROWS) * CPU_ROWS)


def arithmetic_of(states: torch.Tensor) -> Arithmetic:
    """How heads and losses are computed on base-model states of this device and dtype: the one place that chooses.

    bf16 is left as it is where its products are the faster ones, see `fast_in_bf16`; on other CPUs its rounding gains nothing. The rule
    asks what the CPU is rather than a clock, so that a resumed run computes as it began. `scripts.benchmark train_step` (the lines named
    "loss") compares it with torch's `F.linear_cross_entropy`, which is slower here and returns its loss in bf16, and with the plain way.
    """
    if states.device.type == "cuda":
        return Arithmetic(states.dtype, Compiled if compiles(states.device) else InPlace)
    slow = states.device.type == "cpu" and not fast_in_bf16()
    return Arithmetic(torch.float32 if slow else states.dtype, InPlace)


def fast_in_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: where it has AMX, and an AMD where it has avx512_bf16.

    The products of a 512-position chunk with 49,152 tokens ran at 390 GFLOP/s in bf16 and 191 in fp32 on two cores of an EPYC, and at 132
    to 138 and 235 to 258 on two of a Xeon, which has avx512_bf16 too (benchmarks/README.md, "A training step").
    """
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and "AMD" in found.get("cpu_name", "")))


@cache
def compiles(device: torch.device) -> bool:
    """Whether torch.compile works there; where it doesn't, why is said once."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever torch's compiler, Triton or their absence raises
        reason = str(error).splitlines()[0]
        warnings.warn(f"losses are computed without torch.compile, which doesn't work here ({reason}): slower", stacklevel=2)
        return False
    return True


class InPlace:
    """fp32 logits, in buffers that every chunk uses again."""

    def __init__(self, like: torch.Tensor, size: tuple[int, int], wanted: Sequence[bool]):
        """like: of the device. size: (c, r) at most. wanted: which of a room are."""
        self.buffers = [like.new_empty(size, dtype=torch.float32) if want else None for want in wanted]

    def __call__(self, work: Work, products: Sequence[Product | None], *args: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What `work` finds of a room and `args`, and the gradient by the draft's logits in the features' dtype.

        products: the draft's, and the base model's or None.
        """
        draft = products[0]
        assert draft is not None
        room: Room = [None if buffer is None else buffer[: len(draft[0])] for buffer in self.buffers]
        for product, out in zip(products, room):
            if product is not None:
                log_softmax_of(*product, out)
        return work(room, *args), room[0].to(draft[0].dtype)


class Compiled:
    """Logits in the features' dtype; nothing of a chunk is kept."""

    def __init__(self, like: torch.Tensor, size: tuple[int, int], wanted: Sequence[bool]):
        """See `InPlace`."""

    def __call__(self, work: Work, products: Sequence[Product | None], *args: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """See `InPlace`."""
        logits = [None if product is None else product[0] @ product[1].T for product in products]
        caps = [None if product is None else product[2] for product in products]
        for value in (*logits, *args):
            if isinstance(value, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)  # how many positions a later head has is another at every step
        return self.pass_over(work, logits, caps, *args)

    @staticmethod
    def pass_over(*args: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Compiled `from_logits`."""
        return compiled()(*args)


@cache
def compiled() -> Callable[..., Any]:
    """`from_logits` as torch.compile makes it: once for every losses' weights, vocabulary and dtype that a process trains with."""
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)  # of the 8 by default a comparison of recipes has more, and goes on uncompiled
    # A row's logits belong to one block: split among several, as few rows would have them, they are read once more.
    return torch.compile(from_logits, options={"split_reductions": False})


def from_logits(work: Work, logits: list[torch.Tensor | None], caps: list[float | None], *args: Any) -> tuple[Any, torch.Tensor]:
    """As `InPlace`, of logits [c, r]: what is compiled, so that nothing in place is seen outside."""
    room: Room = [None if z is None else capped(z.float(), cap).log_softmax(-1) for z, cap in zip(logits, caps)] + [None, None]
    found = work(room, *args)
    assert logits[0] is not None
    return found, room[0].to(logits[0].dtype)


def log_softmax_of(features: torch.Tensor, weight: torch.Tensor, cap: float | None, out: torch.Tensor) -> None:
    """log_softmax(features @ weight.T), fp32, into `out` [c, r]; the logits soft-capped first, where there is a cap."""
    torch.mm(features, weight.T, out=out) if features.dtype == out.dtype else out.copy_(features @ weight.T)
    torch.log_softmax(capped(out, cap), -1, out=out)


def add_at(total: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """total [c, r] at index int64 [c, 1] += value [c, 1]; compiled, within the pass that writes all of it."""
    if torch.compiler.is_compiling():
        total.add_(value.where(torch.arange(total.shape[1], device=total.device) == index, 0.0))
    else:
        total.scatter_add_(1, index, value)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of a b: without their product in memory, and compiled, within the pass that reads them. Autocast leaves `torch.dot` in fp32."""
    return (a * b).sum(-1).sum() if torch.compiler.is_compiling() else torch.dot(a.flatten(), b.flatten())


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; total is fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":  # the sums never leave fp32, and memory sees them once
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)
