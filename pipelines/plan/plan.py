"""What a run will need: memory of one process by part and moment, work and time of a step, and whether it fits.

The parts' own needs come from `rehearsal`; here they are divided over processes and added up.
"""

from dataclasses import dataclass

import torch

from fms_spec.errors import UserError
from fms_spec.passes import arithmetic_of
from pipelines.config import FILL_ROWS
from pipelines.generate.engines import sampling_of
from pipelines.generate.vllm_engine import GPU_OVERHEAD
from pipelines.parallel.mesh import check_shared, group_size
from pipelines.plan.devices import ACROSS_NODES
from pipelines.plan.rehearsal import nbytes, rehearsal_of

HEADROOM = 1.1  # a plan fits with a tenth of the memory to spare: its figures are right to within 15%
WHOLE = ("framework", "base: layers", "base: embeddings", "kept", "KV cache")  # few large blocks, taken once: the allocator adds nothing
WEIGHTS = ("heads: masters", "heads: moments", "gradients")  # blocks of the trained weights' sizes
MAPPED = 2**25  # bytes: a larger block glibc maps by itself and gives back whole; Medusa's read-outs counted as others were 16% too many


@dataclass(frozen=True)
class Sizes:
    """What the prepared data decides: tokens of a row and of the longest prompt; rows and prompts that are read, None where not known;
    tokens of validation's longest prompt, None for as many."""

    seq_length: int = 4096
    prompt_length: int = 64
    rows: int | None = None
    prompts: int | None = None
    held_out_length: int | None = None


@dataclass(frozen=True)
class Ranks:
    """The processes of a run that is only planned. count: of all. local_count: on one machine."""

    count: int = 1
    local_count: int = 1


class Plan:
    """Attributes, bytes of one process: moments {name: {part: bytes}}; peak, of the worst moment, named `worst`; disk, of kept states.

    Args:
        config: `RunConfig`. sizes: `Sizes`. ranks: `Ranks`. device: `devices.Device`.

    Raises:
        UserError: the base model's config can't be used, the run's doesn't fit it, or groups that don't divide the processes.
    """

    def __init__(self, config, sizes, ranks, device):
        self.config, self.sizes, self.ranks, self.device = config, sizes, ranks, device
        self.run = rehearsal_of(config.base_model, config.speculator)
        self.base_shards = group_size(config.parallel.base_model, config.parallel, ranks)
        self.head_shards = group_size(config.parallel.speculator, config.parallel, ranks)
        model, kind = self.run.base_model, config.parallel.base_model
        check_shared(model.name, model.backend, model.config, kind, self.base_shards)
        self.can_share = model.backend == "fms"
        self.phases = list(config.schedule.build().phase_steps())
        base, itemsize = self.run.base_model, self.run.base_model.dtype.itemsize
        self.lengths = {"phase1": sizes.seq_length, "phase2": sizes.prompt_length + config.generation.max_new_tokens}
        if self.lengths["phase2"] > base.context_length:
            raise UserError(f"texts of {self.lengths['phase2']} tokens are over the context of {base.name}, {base.context_length}")
        self.masters = nbytes(self.run.speculator.parameters())
        mapped = nbytes(weight for weight in self.run.speculator.parameters() if weight.nbytes // self.head_shards > MAPPED)
        self.in_heap = 1 - mapped / self.masters  # share of the trained weights
        tokens = {"phase1": (sizes.rows or 0) * sizes.seq_length, "phase2": (sizes.prompts or 0) * self.lengths["phase2"]}
        kept = sum(tokens[phase] for phase in self.phases) * (base.state_width * itemsize + 1)  # one byte says whether it is the best token
        self.disk = kept if config.hidden_state_cache else 0
        self.moments = self.list_moments()
        self.worst = max(self.moments, key=lambda name: sum(self.moments[name].values()))
        self.peak = sum(self.moments[self.worst].values())
        self.fits = self.peak * HEADROOM <= device.memory

    def list_moments(self):
        """{moment: {part: bytes}}, each with what is always there; on a CPU with the allocator's share as a part of its own."""
        lasting = self.lasting()
        moments = {"building": {"activations": self.building()}, "optimiser": {"gradients": self.masters // self.head_shards}}
        for phase in self.phases:
            moments |= self.of_phase(phase)
        if self.config.validation.prompts:
            settings = self.config.validation
            rows = -(-settings.prompts // self.ranks.count)
            length = self.sizes.held_out_length or self.sizes.prompt_length
            moments["validation"] = self.decoding(rows, length, settings.max_new_tokens + self.config.speculator.n_predict)
        held = max(self.states(phase) for phase in self.phases)
        moments["optimiser"]["hidden states"] = held
        for name, parts in moments.items():
            parts = moments[name] = lasting | parts
            shares = {part: self.in_heap if part in WEIGHTS else not part.startswith(WHOLE) for part in parts}
            parts["allocator"] = int((self.device.heap - 1) * sum(size * shares[part] for part, size in parts.items()))
        return moments

    def lasting(self):
        """{part: bytes} of what is there from the first step to the last."""
        base = self.run.base_model
        flying = 0
        if self.base_shards > 1 and self.config.parallel.base_model != "tensor":
            # glibc does not fill the gaps that freed gathers leave: of 405 MB of layers 385 were held once all had been gathered.
            flying = base.layer_bytes if self.device.heap > 1 else 2 * base.largest_layer
        parts = {
            "framework": int(self.device.framework),
            "base: layers": base.layer_bytes // self.base_shards + flying,
            "base: embeddings": base.other_bytes + self.run.tables,
            "base: draft head": self.run.frozen,
            "heads: masters": self.masters // self.head_shards,
            "heads: moments": 2 * self.masters // self.head_shards,
        }
        if self.disk and self.device.heap > 1:
            parts["kept states"] = self.disk  # of a process on a CPU; the system may take it back
        return parts

    def building(self):
        """Attaching the heads, and forwards over the rows a family samples, whose states are kept in fp32 on the CPU."""
        attaching, rows = self.run.building.peak - self.run.frozen, self.run.speculator.sample_rows
        if not rows:
            return attaching
        n = self.sizes.seq_length
        kept = 2 * rows * n * self.run.base_model.state_width * 4 if self.device.heap > 1 else 0
        return max(self.run.forward(1, n).peak + kept, attaching)

    def states(self, phase):
        """Bytes of the states that a step holds: of all its micro-batches."""
        return self.micro_states(phase) * getattr(self.config, phase).accumulate

    def micro_states(self, phase):
        base = self.run.base_model
        return getattr(self.config, phase).batch_size * self.lengths[phase] * base.state_width * base.dtype.itemsize

    def of_phase(self, phase):
        """Moments of one phase's step."""
        settings, n = getattr(self.config, phase), self.lengths[phase]
        rows = max(settings.batch_size, FILL_ROWS) if self.config.hidden_state_cache and phase == "phase1" else settings.batch_size
        forward = self.run.forward(rows, n).peak
        asked = self.config.phase1.loss.only_accepted or self.config.phase2.loss.only_accepted
        best = self.run.best_tokens(rows, n).peak if asked else 0
        before = self.states(phase) - self.micro_states(phase)
        head, chunk = self.heads(phase)
        gathered = self.masters if self.ranks.count > 1 else 0  # FSDP2's copy for the step, in fp32, of whole masters too
        if self.head_shards > 1 and self.device.heap > 1:
            gathered *= 5  # flat buffers of all heads, gathered and reduced, and gloo's copies of both: without them 34% under
        gradients = min(self.masters, head.peak - chunk)
        moments = {
            f"{phase}: base model": {"hidden states": before, "activations": max(forward, best + self.micro_states(phase))},
            f"{phase}: heads": {
                "hidden states": self.states(phase), "gradients": gradients, "heads: gathered": gathered, "loss chunk": chunk,
                "activations": head.peak - chunk - gradients,
            },
        }  # fmt: skip
        if phase == "phase2" and self.config.generation.mode == "inline":
            moments["generation"] = self.generation()
        return moments

    def heads(self, phase):
        """See `Rehearsal.heads`; every position counts for every head it may, as if no later head were ever left out."""
        settings, heads = getattr(self.config, phase), self.config.speculator.n_predict
        usable = self.lengths["phase1"] - 1 if phase == "phase1" else self.config.generation.max_new_tokens
        counts = tuple(max(1, settings.batch_size * (usable - 1 - head)) for head in range(heads))
        counts = tuple(min(count, settings.positions or count) for count in counts)
        weights = settings.loss.weights(heads)
        states = torch.empty(0, dtype=self.run.base_model.dtype)
        arithmetic = arithmetic_of(states) if self.device.heap > 1 else self.run.on_a_gpu()
        return self.run.heads(weights, settings.batch_size, self.lengths[phase], counts, settings.accumulate > 1, arithmetic)

    def generation(self):
        """Parts of writing continuations in the trainer's own process."""
        settings = self.config.generation
        if settings.engine == "vllm":  # in processes of its own; on a GPU it takes what is free, and no less than this
            base, cache = self.run.base_model, self.decoding(1, self.sizes.prompt_length, settings.max_new_tokens)["KV cache"]
            return {"vLLM": GPU_OVERHEAD + base.layer_bytes + base.other_bytes + cache if self.device.heap == 1 else 0}
        return self.decoding(self.decoded_rows(), self.sizes.prompt_length, settings.max_new_tokens)

    def decoded_rows(self):
        """Prompts that one process decodes together; processes that split a model by layers share a batch."""
        size = self.config.generation.batch_size
        rows = min(size, self.sizes.prompts or size)
        return rows if self.config.parallel.base_model == "tensor" else -(-rows // self.base_shards)

    def decoding(self, rows, prompt_length, new_tokens):
        prefill, step, cache = self.run.decode(sampling_of(self.config.generation), rows, prompt_length, new_tokens)
        groups = self.base_shards if self.config.parallel.base_model == "tensor" else 1
        return {"KV cache": cache // groups, "activations": max(prefill.peak, step.peak)}

    def work(self, phase):
        """{part: (FLOPs, bytes of memory, bytes over the network)} of one process and step."""
        settings, base, n = getattr(self.config, phase), self.run.base_model, self.lengths[phase]
        forward, (head, _) = self.run.forward(settings.batch_size, n), self.heads(phase)
        away, times = 1 - 1 / self.base_shards, settings.accumulate
        fsdp = self.config.parallel.base_model in ("shard", "hybrid")
        split = 1 if fsdp else self.base_shards  # tensor parallel: each process does its part of every row of its group
        states = self.micro_states(phase) * base.width // base.state_width
        states = 2 * 2 * states * base.layers * self.base_shards  # a sum over the group after attention and after the MLP
        moved = away * (base.layer_bytes if fsdp else states)
        shared = 2 * self.masters * (1 - 1 / self.ranks.count)  # reduce-scatter and gather, or an all-reduce, in fp32
        parts = {
            "base model": (times * forward.flops, times * forward.traffic / split, times * moved),
            "heads and losses": (times * head.flops, times * head.traffic, 0),
            "optimiser": (0, 7 * self.masters / self.head_shards, shared),  # reads 4 tensors of the weights' size, writes 3
        }
        if phase == "phase2" and self.config.generation.mode == "inline" and self.config.generation.engine == "embedded":
            writing, new = self.config.generation, self.config.generation.max_new_tokens
            rows = self.decoded_rows()
            prefill, step, _ = self.run.decode(sampling_of(writing), rows, self.sizes.prompt_length, new)
            share = settings.batch_size * times / rows
            gathers = away * base.layer_bytes * (new + 1) if fsdp else 0
            parts["generation"] = tuple(
                share * part for part in (prefill.flops + new * step.flops, prefill.traffic + new * step.traffic, gathers)
            )
        return parts

    def seconds(self, work):
        """Of one part's work: the slowest of computing, memory and network, as if the others hid behind it."""
        flops, traffic, moved = work
        link = self.device.link if self.ranks.count <= self.ranks.local_count else min(self.device.link, ACROSS_NODES)
        rate, bandwidth = self.device.compute_share * self.device.flops, self.device.bandwidth_share * self.device.bandwidth
        return max(flops / rate, traffic / bandwidth, moved / (self.device.bandwidth_share * link))

    def changed(self, **sections):
        """The plan with other settings: {section: {key: value}}."""
        values = {name: getattr(self.config, name).model_copy(update=update) for name, update in sections.items()}
        return Plan(self.config.model_copy(update=values), self.sizes, self.ranks, self.device)


def mend(plan):
    """(`key.path=value` words, the plan with them) that make a plan fit: one change if one does, else all that help, fitting or not."""
    before, words, changed = plan, [], {}
    for sections in changes(plan):
        tried = plan.changed(**sections)
        if tried.fits:
            return words_of(sections), tried
    while True:  # no single change: the one that helps most, again and again
        tried = [(before.changed(**sections), sections) for sections in changes(before)]
        best, sections = min(tried, key=lambda pair: pair[0].peak, default=(before, {}))
        if best.peak >= before.peak:
            return words, before
        for name, update in sections.items():
            changed[name] = changed.get(name, {}) | update
        before, words = best, words_of(changed)
        if best.fits:
            return words, best


def changes(plan):
    """Settings that the worst moment hangs on, the ones that cost least first."""
    config, updates = plan.config, []
    phase = plan.worst.partition(":")[0]
    if phase in plan.phases:
        size, times = getattr(config, phase).batch_size, getattr(config, phase).accumulate
        halves = [2**i for i in range(1, size.bit_length()) if size % 2**i == 0]
        updates += [{phase: {"batch_size": size // half, "accumulate": times * half}} for half in halves]
    for section, key in (("generation", "batch_size"), ("validation", "prompts")):
        if plan.worst == section:
            size = getattr(getattr(config, section), key)
            updates += [{section: {key: size // 2**i}} for i in range(1, size.bit_length())]
    if plan.ranks.count > 1:
        parts = ["speculator"] + ["base_model"] * plan.can_share
        updates += [{"parallel": {part: "shard"}} for part in parts if getattr(config.parallel, part) == "replicate"]
        updates += [{"parallel": dict.fromkeys(parts, "shard")}] * plan.can_share
    if config.base_model.dtype == "float32":
        updates.append({"base_model": {"dtype": "bfloat16"}})
    return updates


def words_of(sections):
    return [f"{name}.{key}={value}" for name, update in sections.items() for key, value in update.items()]


def verdict(plan):
    """One line: whether the run fits, and if not what makes it fit."""
    need = f"{plan.peak / 1e9:.1f} GB a process ({plan.worst}) of {plan.device.memory / 1e9:.1f} GB"
    if plan.fits:
        return f"fits: {need}"
    words, mended = mend(plan)
    if mended.fits:
        return f"does not fit: {need}; with {' '.join(words)} it fits: {mended.peak / 1e9:.1f} GB"
    more = plan.ranks.count == 1 and plan.can_share
    remedy = "a larger --device" + ", or more --processes with parallel.base_model=shard" * more
    return f"does not fit: {need}, and {mended.peak / 1e9:.1f} GB with {' '.join(words) or 'any one setting changed'}; it takes {remedy}"
