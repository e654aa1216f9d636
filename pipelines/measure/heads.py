"""How fast and how large the heads' part of a training step is: ours, and the plain version that keeps all heads' logits.

Shapes: m positions, d base width, k feature width, v vocabulary, h heads. Weights, states and tokens are random: arithmetic doesn't
depend on them.
"""

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fms_spec.alignment import Windows
from fms_spec.losses import LossWeights, SoftTargetLoss, head_losses
from fms_spec.model_config import DTYPES
from fms_spec.passes import CPU_ROWS, arithmetic_of
from fms_spec.speculators.interface import Corpus
from fms_spec.speculators.registry import FAMILIES, settings_of
from pipelines.timer import median_seconds

FEW = 64  # tokens on which FLOPs are counted and kernels warmed up
KERNELS = ("ours", "linear_cross_entropy", "plain") if hasattr(F, "linear_cross_entropy") else ("ours", "plain")  # torch 2.13 has it


@dataclass(frozen=True)
class Shape:
    """What decides a head step's cost. name: in the results. d: base width. loss_width: of the features that losses alone are measured on.
    settings: {family: what a config says of it}."""

    name: str
    d: int
    vocab_size: int
    loss_width: int
    heads: int
    tokens: int
    settings: dict


class RandomBase:
    """As much of a base model as heads need, of a shape and with random weights; embedding and lm_head are tied."""

    output_cap, eos_token_ids = None, ()

    def __init__(self, shape, dtype, device):
        self.width, self.vocab_size = shape.d, shape.vocab_size
        self.embedding_weight = self.output_weight = 0.04 * torch.randn(shape.vocab_size, shape.d, dtype=dtype, device=device)


def build_heads(shape, family, base):
    """An untrained, attached speculator with fp32 weights on the base's device."""
    torch.manual_seed(0)
    settings = settings_of({"family": family, "n_predict": shape.heads} | shape.settings[family])
    corpus = Corpus(torch.arange(shape.vocab_size, 0, -1), torch.randn(FEW, shape.d))
    speculator = FAMILIES[family].build(settings, base, corpus).to(base.output_weight.device)
    speculator.attach(base)
    return speculator


def loss_weights(family, heads):
    """The quickstart's loss for families that predict states, the reference's for others."""
    return LossWeights(0.0, 1.0, 0.1, (1.0,) * heads) if FAMILIES[family].predicts_states else LossWeights(1.0, 0.0, 0.0, (1.0,) * heads)


def random_windows(shape, tokens, dtype, device):
    """`Windows` of one document, in which every head has so many positions."""
    states = torch.randn(tokens + shape.heads + 1, shape.d, dtype=dtype, device=device)
    following = torch.randint(0, shape.vocab_size, (tokens, shape.heads + 1), device=device)
    return Windows(states, torch.arange(tokens, device=device), following, [tokens] * shape.heads)


def plain_losses(speculator, windows, base_model, weights, counts):
    """`head_losses` as the reference does it: all heads' logits [h, m, v] kept and stacked, products in the states' dtype, fp32 losses."""
    device, dtype = windows.states.device, windows.states.dtype
    losses = []
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = list(speculator.heads(windows.hidden, windows.tokens, windows.counts))
        logits = torch.stack([F.linear(features, weight) for features, weight, _ in outputs])
        for head, (features, *_) in enumerate(outputs):
            states, loss = windows.target_states(head), 0.0
            if weights.cross_entropy:
                targets = speculator.draft_targets(windows.targets(head))
                loss = weights.cross_entropy * F.cross_entropy(logits[head].float(), targets, ignore_index=-1, reduction="sum")
            if weights.distillation:
                log_q = logits[head].float().log_softmax(-1)
                log_p = F.linear(states, speculator.teacher_weight(base_model)).float().log_softmax(-1)
                loss = loss + weights.distillation * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
            if weights.smooth_l1:
                loss = loss + weights.smooth_l1 * speculator.state_distance(features, states).sum()
            losses.append(weights.heads[head] * loss / counts[head])
    return sum(losses), torch.stack(losses).detach()


def counts_of(windows):
    """Positions of each head, as `head_losses` takes them: fp32 [h]."""
    return torch.tensor(windows.counts, dtype=torch.float32, device=windows.states.device)


def new_optimizer(speculator):
    return torch.optim.AdamW(speculator.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def update(speculator, optimizer):
    """What follows a backward pass in training."""
    torch.nn.utils.clip_grad_norm_(speculator.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def product_rate(rows, k, columns, dtype, device, repeats=7):
    """FLOP/s of the fastest of a loss's three matrix products, [rows, k] by [k, columns], their results written to ready memory."""
    x, weight, grad = (torch.randn(*size, device=device).to(dtype) for size in ((rows, k), (columns, k), (rows, columns)))
    products = {"logits": (x, weight.T), "features": (grad, weight), "weight": (grad.T, x)}
    ready = {name: a @ b for name, (a, b) in products.items()}
    seconds = median_seconds({name: lambda name=name: torch.mm(*products[name], out=ready[name]) for name in products}, device, repeats)
    return 2 * rows * k * columns / min(seconds.values())


def head_step(shape, family, dtype_name, device, rounds):
    """A whole head step, forward, loss, backward, clipping and AdamW, against the plain version's, in turn, as a JSON value."""
    dtype = DTYPES[dtype_name]
    base = RandomBase(shape, dtype, device)
    speculator, weights = build_heads(shape, family, base), loss_weights(family, shape.heads)
    optimizer = new_optimizer(speculator)

    def step(losses_of, windows):
        losses_of(speculator, windows, base, weights, counts_of(windows))[0].backward()
        update(speculator, optimizer)

    few = random_windows(shape, FEW, dtype, device)
    with FlopCounterMode(display=False) as counter:
        plain_losses(speculator, few, base, weights, counts_of(few))[0].backward()
    flops = counter.get_total_flops() * shape.tokens / FEW
    step(head_losses, few)
    columns, k = next(speculator.heads(few.hidden.float(), few.tokens, few.counts))[1].shape
    windows = random_windows(shape, shape.tokens, dtype, device)
    arithmetic, rates = arithmetic_of(windows.states), []
    rows = min(arithmetic.rows(columns), shape.tokens)
    methods = {
        "ours": lambda: step(head_losses, windows), "plain": lambda: step(plain_losses, windows),
        "products": lambda: rates.append(product_rate(rows, k, columns, arithmetic.dtype, device)),
    }  # fmt: skip
    seconds = median_seconds(methods, device, rounds)
    del seconds["products"]
    rate = statistics.median(rates)  # in turn with the steps: a machine's speed may change within minutes
    return {
        "name": "head_step", "shape": shape.name, "family": family,
        "dtype": dtype_name, "computed_in": str(arithmetic.dtype).removeprefix("torch."), "way": arithmetic.way.__name__,
        "tokens": shape.tokens, "heads": shape.heads, "products": [k, columns], "seconds": seconds,
        "tokens_per_s": {name: shape.tokens / spent for name, spent in seconds.items()}, "over_plain": seconds["plain"] / seconds["ours"],
        "flops": flops, "product_gflop_per_s": rate / 1e9, "share_of_limit": flops / rate / seconds["ours"],
    }  # fmt: skip


def kernel_loss(kernel, features, weight, targets):
    """Cross-entropy of all heads by one of `KERNELS`: features [h] of [m, k], one weight [v, k], targets int64 [m] -> fp32 scalar."""
    dtype = features[0].dtype
    if kernel == "ours":
        weights, arithmetic, h = LossWeights(1.0, 0.0, 0.0, ()), arithmetic_of(features[0]), len(features)
        scales = torch.ones(h, device=targets.device)
        return SoftTargetLoss.apply([targets] * h, None, None, None, scales, weights, arithmetic, None, *features, *[weight] * h)[0]
    if kernel == "plain":
        logits = torch.stack([x @ weight.to(dtype).T for x in features])
        return sum(F.cross_entropy(head.float(), targets, reduction="sum") for head in logits)
    options = torch.nn.LinearCrossEntropyOptions()
    return sum(F.linear_cross_entropy(x, weight.to(dtype), targets, reduction="sum", options=options) for x in features)


def kernel_case(shape, dtype, device, heads, tokens):
    """Random (features, weight, targets) of `kernel_loss`; the weight is fp32, as it is kept in training."""
    torch.manual_seed(0)
    k = shape.loss_width
    features = [torch.randn(tokens, k, device=device).to(dtype).requires_grad_() for _ in range(heads)]
    weight = (k**-0.5 * torch.randn(shape.vocab_size, k, device=device)).requires_grad_()
    return features, weight, torch.randint(0, shape.vocab_size, (tokens,), device=device)


def loss_kernels(shape, dtype_name, device, rounds):
    """Loss and gradients by each kernel: seconds of one head, relative error, and peak memory of all heads, as a JSON value."""
    dtype = DTYPES[dtype_name]
    features, weight, targets = kernel_case(shape, dtype, device, 1, shape.tokens)
    losses = {}

    def work(kernel):
        features[0].grad = weight.grad = None
        loss = kernel_loss(kernel, features, weight, targets)
        loss.backward()
        losses[kernel] = loss.detach()

    seconds = median_seconds({kernel: lambda kernel=kernel: work(kernel) for kernel in KERNELS}, device, rounds)
    with torch.no_grad():
        exact = sum(  # in chunks: double-precision logits of 4,096 x 49,152 would take 1.6 GB
            F.cross_entropy(x.double() @ weight.double().T, y, reduction="sum")
            for x, y in zip(features[0].split(CPU_ROWS), targets.split(CPU_ROWS))
        )
    memory = {kernel: loss_memory(kernel, shape, dtype_name, device) for kernel in KERNELS}
    return {
        "name": "loss", "shape": shape.name, "dtype": dtype_name, "tokens": shape.tokens, "vocab_size": shape.vocab_size,
        "seconds": seconds,
        "relative_error": {kernel: abs(loss.double() / exact - 1).item() for kernel, loss in losses.items()},
        "loss_dtype": {kernel: str(loss.dtype).removeprefix("torch.") for kernel, loss in losses.items()},
        "heads_in_memory": shape.heads, "peak_bytes": memory,
    }  # fmt: skip


def loss_memory(kernel, shape, dtype_name, device):
    """Peak bytes that loss and gradients of all heads add to what was held before; on a CPU from a process of its own, None if unknown."""
    if device.type == "cuda":
        return added_memory(kernel, shape, dtype_name, device)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(added_memory, kernel, shape, dtype_name, device).result()


def added_memory(kernel, shape, dtype_name, device):
    """See `loss_memory`. On Linux the peak of resident memory (VmHWM) is set back to what is resident now, and read again afterwards."""
    run = lambda case: kernel_loss(kernel, *case).backward()  # noqa: E731
    run(kernel_case(shape, DTYPES[dtype_name], device, shape.heads, FEW))
    case = kernel_case(shape, DTYPES[dtype_name], device, shape.heads, shape.tokens)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(case)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_peak()
        run(case)
        return resident_peak() - before
    except OSError:
        return None


def resident_peak():
    """VmHWM of this process in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
