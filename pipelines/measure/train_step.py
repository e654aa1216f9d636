"""What a phase-1 step costs here, part by part; every ratio is of things measured in turn in one run."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from fms.models import get_model
from fms.modules.positions import RotaryEmbedding

from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.losses import head_losses
from fms_spec.rotary import RotaryOnce
from fms_spec.sampling import best_token
from fms_spec.timing import Marks
from pipelines.measure.heads import (
    RandomBase,
    Shape,
    build_heads,
    counts_of,
    head_step,
    loss_kernels,
    loss_weights,
    new_optimizer,
    random_windows,
    update,
)
from pipelines.timer import median_seconds, medians, seconds_in_turn
from pipelines.train.compiled import check_compiler, compile_base_model, compile_heads
from pipelines.train.metrics import Metrics

FAMILIES = ("mlp", "hidden_state")  # the reference's, with the whole vocabulary; ours, with a pruned one
DTYPES_TRIED = ("float32", "bfloat16")
MLP_WIDTH = 4096  # inner width of the published MLP speculators
SMALL_REPEATS = 50  # of things that take microseconds
FORWARD_TOKENS = 1024


def shapes(base_model, tokens, wide_vocab):
    """Shapes of the head steps: the base model's and a wide vocabulary's; on a GPU the latter is Llama-3.1-8B's with eight heads."""
    d, v = base_model.width, base_model.vocab_size
    model = shape_of("base_model", d, v, 3072, (768, 1536), d, 3, tokens)  # 3,072, trunk 768 and 1,536: the quickstart's
    published = shape_of("published_width", d, v, 3072, (768, 1536), MLP_WIDTH, 3, max(1, tokens // 16))
    if base_model.device.type == "cuda":
        return model, published, shape_of("wide", 4096, wide_vocab, 32768, (4096, 8192), 4096, 8, tokens)
    # Half of the tokens: the plain version keeps about 12 GB of logits and their gradients then.
    return model, published, shape_of("wide", 512, wide_vocab, 8192, (768, 1536), 512, 3, max(1, tokens // 2))


def shape_of(name, d, vocab_size, pruned, trunk, mlp_width, heads, tokens):
    """`Shape` of both families. pruned: draft vocabulary, at most half of the whole. trunk: (width, inner width) of hidden_state heads."""
    ours = {"width": trunk[0], "inner_dim": trunk[1], "draft_vocab_size": min(pruned, vocab_size // 2)}
    return Shape(name, d, vocab_size, mlp_width, heads, tokens, {"mlp": {"inner_dim": mlp_width}, "hidden_state": ours})


def dtypes_of(shape, device):
    """Of a GPU's wide shape bf16 alone: nobody trains such heads in fp32."""
    return DTYPES_TRIED[1:] if device.type == "cuda" and shape.name == "wide" else DTYPES_TRIED


def heads(base_model, shape, rounds):
    """Head steps of both families and dtypes; and how many times the tokens of the reference's heads ours train on in a second."""
    for dtype in dtypes_of(shape, base_model.device):
        lines = {family: head_step(shape, family, dtype, base_model.device, rounds) for family in FAMILIES}
        yield from lines.values()
        yield pruned_line(lines["mlp"], lines["hidden_state"])


def published_heads(base_model, shape, published, rounds):
    """The same against heads of the published inner width."""
    for dtype in DTYPES_TRIED:
        reference = head_step(published, "mlp", dtype, base_model.device, rounds)
        yield reference
        yield pruned_line(reference, head_step(shape, "hidden_state", dtype, base_model.device, rounds))


def pruned_line(reference, pruned):
    """Tokens per second of hidden_state heads over those of mlp heads, in our version and in the plain one: two lines of `head_step`."""
    ours = pruned["tokens_per_s"]["ours"]
    return {
        "name": "pruned_heads", "dtype": pruned["dtype"], "reference": reference["shape"], "reference_products": reference["products"],
        "pruned_products": pruned["products"], "tokens_per_s": ours,
        "over_reference": {kind: ours / rate for kind, rate in reference["tokens_per_s"].items()},
    }  # fmt: skip


def loss(base_model, shape, rounds):
    for dtype in dtypes_of(shape, base_model.device):
        yield loss_kernels(shape, dtype, base_model.device, rounds)


def bare_forward(base_model):
    """The decoder as ibm-fms loads it, without what `BaseModel` does to it."""
    name, device = str(base_model.path), base_model.device
    return get_model("hf_pretrained", model_path=name, data_type=base_model.dtype, device_type=device.type).base_model.eval()


def base_forward(base_model, rounds):
    """`BaseModel.hidden_states` against ibm-fms's own forward, on one row of one document."""
    if base_model.backend != "fms":
        yield {"name": "base_forward", "skipped": f"{base_model.name} runs in {base_model.backend}, not in ibm-fms"}
        return
    for dtype in DTYPES_TRIED:
        ours = BaseModel(base_model.name, dtype=dtype, device=base_model.device)
        bare, tokens = bare_forward(ours), min(FORWARD_TOKENS, base_model.context_length)
        ids = torch.randint(0, ours.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        segments, there = torch.zeros_like(ids), ids.to(ours.device)
        methods = {"ours": partial(ours.hidden_states, ids, segments), "ibm_fms": torch.no_grad()(partial(bare, there))}
        seconds = median_seconds(methods, ours.device, 2 * rounds + 1, left_out=1)
        yield {
            "name": "base_forward", "dtype": dtype, "tokens": tokens, "seconds": seconds,
            "tokens_per_s": {name: tokens / spent for name, spent in seconds.items()}, "over_ibm_fms": seconds["ibm_fms"] / seconds["ours"],
        }  # fmt: skip


def rest(base_model, shape, rows, rounds):
    """Where a real step's time goes; `rest` is all but the base model and the heads' forward, losses and backward."""
    for family in FAMILIES:
        speculator, weights = build_heads(shape, family, base_model), loss_weights(family, shape.heads)
        optimizer, spent = new_optimizer(speculator), {}
        with tempfile.TemporaryDirectory() as directory:
            metrics = Metrics(directory, 0)
            for step in range(1 + rounds):
                marks = Marks(base_model.device)
                batch = next(rows)
                marks.mark("data")
                states = base_model.hidden_states(batch.tokens, batch.segment_ids)
                marks.mark("base_model")
                positions = choose_positions(usable_positions(batch.segment_ids, batch.first_states, shape.heads, trained=batch.trained))
                windows = make_windows(states, batch.tokens, positions, shape.heads)
                loss, losses = head_losses(speculator, windows, base_model, weights, counts_of(windows))
                loss.backward()
                marks.mark("heads")
                update(speculator, optimizer)
                marks.mark("optimizer")
                metrics.write(step, {f"loss_head_{head}": value for head, value in enumerate(losses.tolist())})
                marks.mark("logging")
                for part, seconds in marks.seconds().items():
                    spent[part] = spent.get(part, 0.0) + (seconds if step else 0.0)  # the first step loads data and chooses kernels
            metrics.close()
        whole = sum(spent.values())
        yield {
            "name": "step_parts", "family": family, "dtype": str(base_model.dtype).removeprefix("torch."), "tokens": batch.tokens.numel(),
            "seconds": {part: seconds / rounds for part, seconds in spent.items()},
            "rest": 1 - (spent["base_model"] + spent["heads"]) / whole,
        }  # fmt: skip


def compiled(base_model, shape, rounds):
    """A config's `compile` on and off: the heads' forward and backward without their losses, and the base model's forward."""
    try:
        check_compiler()
    except UserError as error:
        yield {"name": "compile", "skipped": str(error)}
        return
    device = base_model.device
    for family in FAMILIES:
        base, methods = RandomBase(shape, torch.float32, device), {}
        for name in ("off", "on"):
            speculator = build_heads(shape, family, base)
            if name == "on":
                compile_heads(speculator)
            methods[name] = partial(features_and_back, speculator, random_windows(shape, shape.tokens, torch.float32, device))
        yield compile_line(f"{family} heads", methods, device, rounds)
    tokens = min(FORWARD_TOKENS, base_model.context_length)
    ids = torch.randint(0, base_model.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    quick = BaseModel(base_model.name, dtype=str(base_model.dtype).removeprefix("torch."), backend=base_model.backend, device=device)
    compile_base_model(quick)
    methods = {name: partial(model.hidden_states, ids, torch.zeros_like(ids)) for name, model in (("off", base_model), ("on", quick))}
    yield compile_line("base model", methods, device, rounds)


def features_and_back(speculator, windows):
    sum(features.sum() for features, *_ in speculator.heads(windows.hidden, windows.tokens, windows.counts)).backward()


def compile_line(what, methods, device, rounds):
    """First calls, which compile, and the median of later ones; or what went wrong."""
    try:
        taken = seconds_in_turn(methods, device, 2 * rounds + 2)
        first, seconds = {name: times[0] for name, times in taken.items()}, medians({name: times[1:] for name, times in taken.items()})
    except Exception as error:  # of torch.compile: there are as many kinds as ways to fail
        return {"name": "compile", "what": what, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {
        "name": "compile", "what": what, "first_seconds": first, "seconds": seconds, "on_over_off": seconds["off"] / seconds["on"],
    }  # fmt: skip


def small_parts(base_model, keep_freed_memory):
    """What smaller choices elsewhere bring: one look-up of rotary angles, `max` for `argmax`, and freed memory kept."""
    device = base_model.device
    if base_model.backend == "fms":
        layers = [module.position_encoder for module in bare_forward(base_model).modules() if hasattr(module, "position_encoder")]
        theirs = next(encoder for encoder in layers if isinstance(encoder, RotaryEmbedding))
        methods, config = {"ours": RotaryOnce(base_model.config, device), "ibm_fms": theirs}, base_model.config
        for tokens in (1, 9):
            q, k = (torch.randn(1, tokens, h, theirs.dim, device=device) for h in (config.num_attention_heads, config.num_key_value_heads))
            turns = {name: partial(turn, encoder, len(layers), q, k) for name, encoder in methods.items()}
            seconds = median_seconds(turns, device, SMALL_REPEATS)
            yield {"name": "rotary", "tokens": tokens, "layer_us": {name: 1e6 * spent / len(layers) for name, spent in seconds.items()}}
    logits = torch.randn(5, base_model.vocab_size, device=device).bfloat16()
    seconds = median_seconds({"max": partial(best_token, logits), "argmax": partial(logits.argmax, -1)}, device, SMALL_REPEATS)
    yield {
        "name": "best_token",
        "rows": 5,
        "vocab_size": base_model.vocab_size,
        "us": {name: 1e6 * spent for name, spent in seconds.items()},
    }
    if device.type == "cpu":
        rates = {}
        for name, prepare in (("kept", keep_freed_memory), ("returned", None)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rates[name] = pool.submit(forward_rate, base_model.name, prepare).result()
        yield {"name": "freed_memory", "hidden_states_tokens_per_s": rates, "kept_over_returned": rates["kept"] / rates["returned"]}


def turn(encoder, layers, q, k):
    """What so many layers do in a forward: positions are new in each, and the same in all of its layers."""
    positions = torch.arange(q.shape[1], device=q.device)[None]
    for _ in range(layers):
        encoder.adjusted_qk(q, k, positions)


def forward_rate(name, prepare):
    """Tokens per second of hidden states in fp32, four rows of 512, in a process of its own that has called `prepare`."""
    if prepare:
        prepare()
    base_model = BaseModel(name, dtype="float32", device="cpu")
    ids = torch.randint(0, base_model.vocab_size, (4, min(512, base_model.context_length)))
    seconds = median_seconds({"forward": lambda: base_model.hidden_states(ids, torch.zeros_like(ids))}, base_model.device, 4)
    return ids.numel() / seconds["forward"]


PARTS = ("heads", "wide_heads", "published_heads", "loss", "wide_loss", "base_forward", "rest", "compile", "small")


def benchmark_train_step(base_model, rows, tokens, rounds, wide_vocab, parts, keep_freed_memory):
    """JSON values of the `parts`, some of `PARTS`, as an iterator.

    Args:
        rows: endless corpus batches of so many `tokens`. keep_freed_memory: a function without arguments that tells the allocator to
            keep what is freed.
    """
    shape, published, wide = shapes(base_model, tokens, wide_vocab)
    lines = {
        "heads": lambda: heads(base_model, shape, rounds),
        "wide_heads": lambda: heads(base_model, wide, rounds),
        "published_heads": lambda: published_heads(base_model, shape, published, rounds),
        "loss": lambda: loss(base_model, shape, rounds),
        "wide_loss": lambda: loss(base_model, wide, rounds),
        "base_forward": lambda: base_forward(base_model, rounds),
        "rest": lambda: rest(base_model, shape, rows, rounds),
        "compile": lambda: compiled(base_model, shape, rounds),
        "small": lambda: small_parts(base_model, keep_freed_memory),
    }
    for part in parts:
        yield from lines[part]()
