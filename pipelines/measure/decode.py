"""How fast decoding is here, as ratios of things measured in turn in one run. Batch 1 unless said otherwise."""

import sys
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from fms_spec.base_model import BaseModel
from fms_spec.context import ContextCache
from fms_spec.decoding import decode
from fms_spec.draft_shape import DraftShape
from fms_spec.lookup import PromptLookup
from fms_spec.options import DecodingOptions
from fms_spec.proposers import Step
from pipelines.measure.figures import figures
from pipelines.measure.samples import decode_in_turn, first_within, logit_gap, side_by_side
from pipelines.measure.suggestion import REPEATS, forward_at, forward_seconds, seconds_behind_forward
from pipelines.timer import in_turn, median_seconds, texts_in_turn

DTYPE = "bfloat16"
SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 13, 17)  # tokens of a forward: 9 verifies 8 candidates
BATCHES = (1, 2, 4, 8, 16)
CONTEXTS = (256, 2048, 8192)  # tokens, or what the base model's context leaves room for
COPYING = ("summarization", "rag", "extraction")  # of Spec-Bench: where answers repeat the prompt
LOOKUP_TOKENS = 10  # transformers' documented prompt_lookup_num_tokens


class Generate:
    """`transformers` generate on the same weights: greedy, with its own cache, optionally with its prompt lookup."""

    def __init__(self, base_model):
        self.model = AutoModelForCausalLM.from_pretrained(base_model.path, dtype=base_model.dtype).to(base_model.device).eval()
        self.eos = sorted(base_model.eos_token_ids)

    def __call__(self, prompt, new_tokens, lookup=False):
        """New tokens of one prompt, int64 [n], as a list of ints."""
        extra = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if lookup else {}
        output = self.model.generate(
            prompt[None].to(self.model.device), attention_mask=torch.ones_like(prompt[None]), max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=self.eos, pad_token_id=0, **extra,
        )  # fmt: skip
        return output[0, len(prompt) :].tolist()


def whole(base_model, prompt, new_tokens, proposer=None):
    """New tokens of our own decoding, as `Generate` gives them: reading the prompt is part of it."""
    (result,), _ = decode(base_model, [prompt], DecodingOptions(max_new_tokens=new_tokens), proposer)
    return result.tokens


def rates_and_texts(methods, prompts, new_tokens, title):
    """`texts_in_turn` of functions (prompt, new_tokens) -> tokens, warmed up."""
    for method in methods.values():
        method(prompts[0], 4)
    return texts_in_turn(
        {name: lambda prompt, method=method: method(prompt, new_tokens) for name, method in methods.items()}, prompts, title
    )


def forwards(base_model):
    """What verifying costs: forwards over 1 to 17 tokens, with logits, on a cache of 256; and without `BaseModel.pack`."""
    seconds = forward_seconds(base_model, SIZES)
    unpacked = BaseModel(base_model.name, dtype=DTYPE, backend=base_model.backend, device=base_model.device)
    return {
        "name": "forward", "ms": {size: 1000 * spent for size, spent in seconds.items()},
        "times_one_token": {size: spent / seconds[1] for size, spent in seconds.items()},
        "ms_unpacked": {size: 1000 * spent for size, spent in forward_seconds(unpacked, SIZES).items()},
    }  # fmt: skip


def plain(base_model, generate, prompts, new_tokens):
    """Plain decoding against `transformers` generate, both with reading the prompt; and whether they wrote the same, by bf16 logits."""
    methods = {"ours": lambda *job: whole(base_model, *job), "transformers": generate}
    rates, texts = rates_and_texts(methods, prompts, new_tokens, "plain")
    pairs = list(zip(prompts, texts["transformers"], texts["ours"]))
    ratio = rates["ours"] / rates["transformers"]
    texts = side_by_side(pairs, [logit_gap(base_model, *pair) for pair in pairs])
    return {"name": "plain", "tokens_per_s": rates, "ours_over_transformers": ratio} | texts


def trees(base_model, speculator, prompts, shapes, new_tokens):
    """Speed-up, acceptance and shares of a step for each shape of tree and for prompt lookup, all against plain decoding in turn."""
    proposers = {f"tree {index}": shape.proposer(speculator) for index, shape in enumerate(shapes)}
    proposers["our_prompt_lookup"] = PromptLookup(4)
    samples = decode_in_turn(base_model, prompts, {"plain": None} | proposers, new_tokens)
    for (kind, proposer), shape in zip(proposers.items(), [*shapes, None]):
        partings = [sample.parted_at for sample in samples if sample.kind == kind]
        texts = {"equal": partings.count(None), "parted": len(partings) - partings.count(None)}
        yield {
            "name": "tree" if shape else kind, "lookahead": proposer.lookahead, "nodes": proposer.nodes,
            "min_probability": shape.min_probability if shape else 0.0, "lookup": shape.lookup if shape else 0,
            "chain": shape is not None and not (shape.nodes or shape.top_k_per_head), "texts": texts,
            **figures(samples, kind, proposer.lookahead),
        }  # fmt: skip


def against_prompt_lookup(base_model, speculator, generate, prompts, shape, new_tokens):
    """Our decoding with the speculator against `transformers` prompt lookup, by category, both with reading the prompt."""
    proposer = shape.proposer(speculator)
    methods = {
        "ours": lambda *job: whole(base_model, *job, proposer), "ours_plain": lambda *job: whole(base_model, *job),
        "transformers_prompt_lookup": lambda *job: generate(*job, lookup=True),
    }  # fmt: skip
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        own = [prompt.tokens([]) for prompt in prompts if prompt.category == category]
        rates, _ = rates_and_texts(methods, own, new_tokens, category or "prompts")
        ratio = rates["ours"] / rates["transformers_prompt_lookup"]
        yield {
            "name": "prompt_lookup",
            "category": category,
            "copying": category in COPYING,
            "tokens_per_s": rates,
            "ours_over_theirs": ratio,
        }


def batches(base_model, speculator, prompts, shape, new_tokens):
    """Speculation and prompt lookup against plain decoding at each batch size, over all prompts, without reading them.

    The last batch is filled up with the first prompts, and there are three or more. Nothing takes the place of a text that ends.
    """
    methods = {"plain": None, "speculator": shape.proposer(speculator), "prompt_lookup": PromptLookup(LOOKUP_TOKENS)}
    options = DecodingOptions(max_new_tokens=new_tokens, ignore_eos=True)

    def tokens_and_seconds(proposer, texts):
        results, timing = decode(base_model, texts, options, proposer)
        return sum(len(result.tokens) - 1 for result in results), timing.decoding

    for batch in BATCHES:
        firsts = range(0, max(len(prompts), 3 * batch), batch)
        groups = [[prompts[index % len(prompts)] for index in range(first, first + batch)] for first in firsts]
        totals = {name: map(sum, zip(*pairs)) for name, pairs in in_turn(methods, groups, tokens_and_seconds).items()}
        rates = {name: tokens / seconds for name, (tokens, seconds) in totals.items()}
        ratios = {f"{name}_over_plain": rate / rates["plain"] for name, rate in rates.items() if name != "plain"}
        yield {"name": "batch", "batch": batch, "tokens_per_s": rates, **ratios}


@torch.inference_mode()
def contexts(base_model, speculator):
    """What a step's parts cost as the text grows: drafting the whole chain, and the forward that verifies it; and bytes of a token."""
    chain, device = DraftShape().proposer(speculator), base_model.device
    room = base_model.context_length - chain.nodes - 1
    for held in sorted({min(length, room) for length in CONTEXTS}):
        context = None
        if speculator.context_width:
            kept = ContextCache(speculator, 1, held, base_model.dtype, device)
            kept.tokens.random_(base_model.vocab_size)
            context = kept.seen(torch.tensor([held], device=device), held)
        hidden = torch.randn(1, base_model.state_width, dtype=base_model.dtype, device=device)
        step = Step(hidden, torch.zeros(1, dtype=torch.int64, device=device), [[]], context=context)
        forward = partial(forward_at(base_model, held, chain.nodes + 1), chain.nodes + 1)
        seconds = median_seconds({"verifying": forward}, device, REPEATS, left_out=1)
        seconds |= seconds_behind_forward(base_model, {"drafting": partial(chain.propose, step)}, held)
        held_bytes = base_model.new_cache(1, 1).store.nbytes
        yield {
            "name": "context", "context": held, "ms": {part: 1000 * spent for part, spent in seconds.items()},
            "drafting_over_verifying": seconds["drafting"] / seconds["verifying"],
            "bytes_a_token": {"base_model": held_bytes, "speculator": speculator.context_width * base_model.dtype.itemsize},
        }  # fmt: skip


def benchmark_decode(base_model, speculator, prompts, spec_bench, new_tokens, shape=DraftShape()):
    """Everything above, as an iterator of JSON values. Prompts over the base model's context are left out, and counted on stderr.

    Args:
        prompts, spec_bench: prompts as for `samples.decode_in_turn`; spec_bench may be empty. shape: of the trees in comparisons.

    Raises:
        UserError: every one of `prompts` is over the context.
    """
    whole_depth = speculator.n_predict
    ending = DraftShape(min_probability=0.1), DraftShape(min_probability=0.1, lookup=LOOKUP_TOKENS)
    compared = [shape, DraftShape(), *ending, DraftShape(nodes=whole_depth + 1), DraftShape(nodes=max(8, whole_depth))]
    candidates = max(LOOKUP_TOKENS, *(each.proposer(speculator).lookahead for each in compared))
    room = base_model.context_length - new_tokens - candidates
    first_within(room, prompts, base_model)
    given = len(prompts) + len(spec_bench)
    prompts, spec_bench = ([prompt for prompt in each if len(prompt.tokens([])) <= room] for each in (prompts, spec_bench))
    if left_out := given - len(prompts) - len(spec_bench):
        print(f"warning: {left_out} of {given} prompts are over the context and left out", file=sys.stderr)
    tokens = [prompt.tokens([]) for prompt in prompts]
    yield forwards(base_model)
    generate = Generate(base_model)
    yield plain(base_model, generate, tokens, new_tokens)
    yield from trees(base_model, speculator, prompts, list(dict.fromkeys(compared)), new_tokens)
    yield from against_prompt_lookup(base_model, speculator, generate, prompts, shape, new_tokens)
    yield from against_prompt_lookup(base_model, speculator, generate, spec_bench, shape, new_tokens)
    yield from batches(base_model, speculator, tokens, shape, new_tokens)
    yield from contexts(base_model, speculator)
