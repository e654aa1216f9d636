"""The parts of a training run, run on tensors without data: what they keep in memory, compute, and move, before anything is loaded.

It is the run's own code that runs, so a plan can't drift from it. torch's fake tensors know shapes, dtypes and lifetimes and hold no
bytes; of the base model's equal layers two are enough, and its config.json is all that is read.

Shapes: b rows, n tokens, d width of the base model's states.
"""

import weakref
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import numpy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from fms_spec.alignment import Positions, make_windows
from fms_spec.base_model import BaseModel
from fms_spec.context import Recent, Text
from fms_spec.decoding import PREFILL_CHUNK
from fms_spec.errors import UserError
from fms_spec.fms_backend import build
from fms_spec.losses import SoftTargetLoss, head_losses
from fms_spec.model_config import DTYPES, attention_heads, read_config
from fms_spec.passes import Arithmetic, Compiled, from_logits
from fms_spec.proof import choose_backend, layer_stack
from fms_spec.read_out import read_out
from fms_spec.speculators.registry import FAMILIES
from fms_spec.transformers_backend import first_line

LAYERS = 2  # of the base model that are rehearsed; all are alike
aten = torch.ops.aten
GATHERS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default)  # read what they give out, not the whole table
FLOPS = flop_registry | {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * q.numel() * k.shape[2]}


@dataclass
class Cost:
    """Of one part. peak: most bytes at once over what there was before. kept: bytes of it still there at the end. flops: of matrix
    products and attention, causal attention counted as full. traffic: bytes that its operators read and write."""

    peak: int = 0
    kept: int = 0
    flops: int = 0
    traffic: int = 0


class Meter(TorchDispatchMode):
    """Counts the storages that are alive while operators run on fake tensors, and what the operators do."""

    def __init__(self):
        super().__init__()
        self.live, self.known, self.cost, self.start = 0, weakref.WeakSet(), Cost(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default:  # a number read on the host: any will do
            return 1
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        self.known.update(value.untyped_storage() for value in inputs)  # views and in-place operators give them out again
        out = function(*args, **(kwargs or {}))
        outputs = [value for value in tree_iter(out) if isinstance(value, torch.Tensor)]
        for value in outputs:
            self.count(value.untyped_storage())
        self.cost.peak = max(self.cost.peak, self.live - self.start)
        if outputs and not function.is_view and function is not aten._unsafe_view.default:
            written = sum(value.nbytes for value in outputs)
            read = sum(min(value.nbytes, value.untyped_storage().nbytes()) for value in inputs)  # an expanded tensor is read once
            self.cost.traffic += written + (written if function in GATHERS else read)
        if function.overloadpacket in FLOPS:
            self.cost.flops += FLOPS[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def count(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size):
        self.live -= size

    @contextmanager
    def as_one_kernel(self, read):
        """What runs inside keeps in memory what is there at the end, and reads so many bytes and writes that."""
        before, peak, traffic = self.live, self.cost.peak, self.cost.traffic
        yield
        self.cost.peak, self.cost.traffic = max(peak, self.live - self.start), traffic + read + self.live - before

    @contextmanager
    def measure(self):
        """Gives the `Cost` of what runs inside, whole once it has run."""
        self.start, self.cost = self.live, Cost()
        yield self.cost
        self.cost.kept = self.live - self.start


class Weightless(BaseModel):
    """A `BaseModel` of `LAYERS` layers made from a config alone; call it under a FakeTensorMode.

    layer_bytes: of all layers together. largest_layer: of one. other_bytes: of embedding, lm_head and final norm.
    """

    def __init__(self, section, config):
        """section: `BaseModelSection`. config: of the model, from `read_config`."""
        self.path = self.name = section.name
        self.backend, self.dtype = choose_backend(section.name, config, section.backend), DTYPES[section.dtype]
        self.device, self.fingerprint, self.layers = torch.device("cpu"), "", config.num_hidden_layers
        self.config = deepcopy(config)
        self.query_heads, self.kv_groups = attention_heads(config)
        self.model = self._load_fms() if self.backend == "fms" else self._load_transformers()
        stack = layer_stack(self.model, self.layers)
        sizes = [nbytes(layer.parameters()) for layer in stack]
        self.layer_bytes, self.largest_layer, self.other_bytes = sum(sizes), max(sizes), nbytes(self.model.parameters()) - sum(sizes)
        del stack[LAYERS:]
        self.config.num_hidden_layers = len(stack)
        take_data_away(self.model)

    def _load_fms(self):
        return build(self.config, self.dtype)

    def _load_transformers(self):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype, trust_remote_code=False)


def compiled_under(meter):
    """`passes.Compiled` as a meter counts it: the passes over a chunk's logits read them twice, and write a gradient."""

    class Fused(Compiled):
        @staticmethod
        def pass_over(work, logits, caps, *args):
            with meter.as_one_kernel(2 * nbytes(value for value in logits if value is not None)):
                return from_logits(work, logits, caps, *args)

    return Fused


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def take_data_away(model):
    """Replace a meta model's tensors by fake ones on the CPU, where mixed precision and attention do as they do in a run."""
    replaced = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    fresh = replaced.setdefault(value, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
                    table[name] = nn.Parameter(fresh, requires_grad=False) if isinstance(value, nn.Parameter) else fresh


@cache
def rehearsal_of(base_section, speculator_section):
    """`Rehearsal` of two sections of a config, made once."""
    return Rehearsal(base_section, speculator_section)


class Rehearsal:
    """The models of a run, without data, and what each part of it costs one process that holds them whole.

    Attributes:
        base_model: `Weightless`. speculator: fp32, attached. tables: bytes that the base model keeps besides weights. frozen: bytes of the
        base model's weights that the heads keep a copy of. building: `Cost` of attaching the heads.

    Raises:
        UserError: no usable config.json, or a draft vocabulary or layers over the base model's.
    """

    def __init__(self, base_section, speculator_section):
        config = read_config(base_section.name)
        self.mode, self.meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
        with self.mode:
            self.base_model = Weightless(base_section, config)
            with self.meter:
                with self.meter.measure() as cost:
                    self.base_model._settle()
                self.tables = cost.kept
                family = FAMILIES[speculator_section.family]
                self.base_model.give_layers(family.base_layers_of(speculator_section, self.base_model))
                self.speculator = family.build(speculator_section, self.base_model)
                with self.meter.measure() as self.building:
                    self.speculator.attach(self.base_model)
        self.frozen, self.compiled = self.building.kept, compiled_under(self.meter)

    def on_a_gpu(self):
        """`passes.Arithmetic` of a GPU whose compiler works, for this base model's states."""
        return Arithmetic(self.base_model.dtype, self.compiled)

    @contextmanager
    def running(self):
        with self.mode, self.meter, torch.no_grad(), self.meter.measure() as cost:
            yield cost

    @cache
    def forward(self, b, n):
        """The base model over packed rows, a document each; its states [b, n, d] are among the peak.

        Raises:
            UserError: an architecture that torch's fake tensors can't run.
        """
        try:
            with self.running() as cost:
                tokens = torch.zeros(b, n, dtype=torch.int64)
                self.base_model.packed_states(tokens, tokens, [(row, 0, n) for row in range(b)])
        except RuntimeError as error:  # as torch's grouped products of experts in fp32
            problem = f"its layers don't run without data ({first_line(error)})"
            raise UserError(f"base model {self.base_model.name}: no plan can be made of it: {problem}") from error
        return self.whole(cost)

    @cache
    def best_tokens(self, b, n):
        """`Speculator.best_base_tokens` over a micro-batch."""
        with self.running() as cost:
            self.speculator.best_base_tokens(self.base_model, self.states(b, n - 1))
        return cost

    @cache
    def heads(self, weights, b, n, counts, more, arithmetic):
        """Losses and gradients of one micro-batch: (Cost, bytes of a loss chunk). The states are not in the peak; the gradients are.

        weights: `LossWeights`. counts: positions of each head, a tuple. more: whether another micro-batch's gradients are there already.
        arithmetic: `passes.Arithmetic`.
        """
        with self.mode, self.meter:
            states, tokens = self.states(b, n), torch.zeros(b, n, dtype=torch.int64)
            positions = Positions(torch.zeros(counts[0], dtype=torch.int64), counts)
            with self.meter.measure() as cost:
                self.backward(weights, states, tokens, positions, arithmetic)
            if more:
                with self.meter.measure() as cost:
                    self.backward(weights, states, tokens, positions, arithmetic)
                cost.peak += nbytes(self.speculator.parameters())  # the first one's gradients
            self.speculator.zero_grad(set_to_none=True)
            rows = arithmetic.rows(len(self.speculator.teacher_weight(self.base_model)))
            with self.meter.measure() as chunk:
                self.one_chunk(weights, min(2 * rows, counts[0]), n, arithmetic)
        return cost, chunk.peak - chunk.kept

    def backward(self, weights, states, tokens, positions, arithmetic):
        windows = make_windows(states, tokens, positions, self.speculator.n_predict)
        if self.speculator.context_width:
            windows = replace(windows, text=self.text(*tokens.shape, positions.counts[0]))
        counts = torch.ones(len(positions.counts))
        head_losses(self.speculator, windows, self.base_model, weights, counts, arithmetic)[0].backward()

    def text(self, b, n, count):
        """What so many positions of packed rows see, spread evenly, each row one document."""
        slots = numpy.arange(count) * (b * n) // count
        spans = numpy.stack([slots // n * n, slots + 1], axis=1)
        listed = torch.zeros(min(b * n, self.base_model.vocab_size), dtype=torch.int64)
        recent, at = Recent(listed, torch.zeros(b * n, 3, dtype=torch.int64)), torch.zeros(count, dtype=torch.int64)
        return Text(recent, torch.zeros(b * n, dtype=torch.int64), numpy.arange(b * n) // n * n, at, at, spans, n)

    def one_chunk(self, weights, count, n, arithmetic):
        hidden, tokens, text = self.states(1, count)[0], torch.zeros(1, count, dtype=torch.int64).T, None
        if width := self.speculator.context_width:
            text = replace(self.text(1, n, count), kept=torch.zeros(n, width, dtype=arithmetic.dtype))
        features, weight, point = next(self.speculator.heads(hidden, tokens, [count], text))
        seen, more = None, []
        if point:
            seen, more = (torch.zeros(n, dtype=torch.int64), text), [*point, text.kept]
        weight_of_teacher = self.speculator.teacher_weight(self.base_model).to(arithmetic.dtype)
        given = (lambda _: teacher, weight_of_teacher, self.base_model.output_cap) if weights.teacher else (None, None, None)
        teacher = read_out(self.speculator.final(self.states(1, count)[0]), weight_of_teacher)
        self.meter.start, self.meter.cost.peak = self.meter.live, 0  # only the loss itself counts
        targets, inputs = torch.zeros(count, dtype=torch.int64), [value.detach() for value in (features, weight, *more)]
        SoftTargetLoss.apply([targets], *given, torch.ones(1), weights, arithmetic, seen, *inputs)

    @cache
    def decode(self, sampling, b, prompt_length, new_tokens):
        """(Cost of reading the prompts, Cost of one step over the longest texts, bytes of the cache); the cache is in neither's peak."""
        with self.running() as prefill:
            cache = self.base_model.new_cache(b, prompt_length + new_tokens)
            kept = nbytes([cache.store])
            self.base_model.extend(torch.zeros(b, min(prompt_length, PREFILL_CHUNK), dtype=torch.int64), cache)
        with self.running() as step:
            cache.hold([prompt_length + new_tokens - 1] * b)
            states = self.base_model.extend(torch.zeros(b, 1, dtype=torch.int64), cache)
        with self.running() as choice:
            sampling.choose(self.base_model.logits(states), torch.zeros(b, 1, dtype=torch.float64))
        prefill.peak -= kept
        prefill, step = self.whole(prefill), self.whole(step)
        step = Cost(max(step.peak, choice.peak), 0, step.flops + choice.flops, step.traffic + choice.traffic)
        return prefill, step, kept * self.base_model.layers // self.base_model.config.num_hidden_layers

    def whole(self, cost):
        """The cost with all layers; memory is not scaled, for a layer lets go of what the one before held."""
        times = self.base_model.layers / self.base_model.config.num_hidden_layers
        return Cost(cost.peak, cost.kept, int(cost.flops * times), int(cost.traffic * times))

    def states(self, b, n):
        return torch.empty(b, n, self.base_model.state_width, dtype=self.base_model.dtype)
