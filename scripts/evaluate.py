"""Measure a speculator: python -m scripts.evaluate --base_model=DIR --speculator=DIR --prompts=PREPARED [--out=report.json]"""

import os.path
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data.prompts import load_prompts
from fms_spec.errors import UserError
from fms_spec.files import check_writable, write_json
from fms_spec.loading import load_for_decoding
from fms_spec.model_config import resolve_base_model
from fms_spec.vllm.versions import installed_vllm
from pipelines.cli import arguments, draft_shape, main
from pipelines.generate.vllm_engine import need_vllm
from pipelines.machine.environment import environment
from pipelines.measure.evaluate import evaluate, free_memory, losslessness, parting, settle, side_by_side, summary, usual_ways
from pipelines.measure.serving import serve
from pipelines.measure.suggestion import chain_acceptance, greedy_texts, suggest
from pipelines.show.console import print_evaluation
from pipelines.show.plots import plot_evaluation


@arguments
class Arguments:
    """Decode prompts greedily with a speculator, plainly and with prompt lookup; report acceptance as vLLM counts it, speed, losslessness.

    Also tried on the plain texts: which tree would have been fastest, from the costs of a step on this machine. Texts in bfloat16 or
    float16 that aren't the plain ones are decoded again in float32, which tells rounding from a loss.

    Args:
        base_model: directory or hub name of the base model the speculator was trained for.
        speculator: directory written by scripts.export, or a published MLP speculator.
        prompts: a folder from scripts.prepare_data with held-out documents, or a .jsonl file with a "prompt" text, or chat "turns", a line.
        out: also write the report here, as JSON, and a plot beside it, as PNG.
        limit: use only the first so many prompts of each category.
        max_new_tokens: decode at most so many tokens after each prompt, 2 or more: speed is that of the steps after the first.
        lookahead: depth of the candidates; what the speculator was trained for by default.
        top_k_per_head: children of each candidate, level by level, as in 3,2,1; a chain by default.
        nodes: draft the so many likeliest candidates instead, as a tree.
        dtype: bfloat16, float16 or float32.
        backend: auto, fms or transformers.
        against: vllm: also put the prompts through the installed vLLM with this speculator, and set texts and acceptance side by side.
    """

    base_model: str
    speculator: str
    prompts: str
    out: str | None = None
    limit: int | None = None
    max_new_tokens: Annotated[int, Field(ge=2)] = 128
    lookahead: int | None = None
    top_k_per_head: tuple[int, ...] | int | None = None
    nodes: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"
    against: Literal["vllm"] | None = None


def run(parsed):
    out = Path(parsed.out) if parsed.out else None
    if out:
        check_new(out)
    if parsed.against:
        need_vllm("--against=vllm")
    prompts = load_prompts(parsed.prompts, resolve_base_model(parsed.base_model), parsed.limit)
    load = partial(load_for_decoding, parsed.base_model, parsed.speculator, draft_shape(parsed), backend=parsed.backend)
    samples, values = measure(load, prompts, parsed)
    pairs = serve_with_vllm(samples, values, parsed) if parsed.against else []
    samples, gaps = settle(samples, pairs, load, parsed.max_new_tokens)
    values |= losslessness(samples, prompts)
    if parsed.against:
        values["against"] |= side_by_side(pairs, gaps) | {"partings": partings(pairs, gaps)}
    print_evaluation(values, parsed.speculator)
    if out:
        write_json(out, values | {"environment": environment()})
        plot_evaluation(values, out.with_suffix(".png"))


def measure(load, prompts, parsed):
    """(samples, their figures as JSON values) in the dtype asked for; the models are let go of on return."""
    base_model, speculator, proposer = load(dtype=parsed.dtype)
    samples = evaluate(base_model, prompts, usual_ways(proposer), parsed.max_new_tokens)
    earned = partial(chain_acceptance, speculator)
    texts = partial(greedy_texts, base_model, samples, speculator.n_predict)
    values = summary(samples, proposer) | earned(texts()) | {"suggestion": suggest(base_model, speculator, texts())}
    if parsed.against:
        values["against"] = earned(texts(), proposer.lookahead)
    return samples, values


def serve_with_vllm(samples, values, parsed):
    """Put the prompts of the plain texts through vLLM and its acceptance into `values`; returns (prompt, plain text, vLLM's) of each."""
    free_memory()
    plain = [sample for sample in samples if sample.kind == "plain"]
    lines, tokens = [sample.prompt_tokens for sample in plain], values["lookahead"]
    texts, acceptance = serve(parsed.base_model, parsed.speculator, lines, parsed.max_new_tokens, tokens, parsed.dtype)
    engine = {"engine": parsed.against, "version": installed_vllm()[0], "num_speculative_tokens": tokens}
    values["against"] = engine | acceptance | values["against"]
    return [(sample.prompt_tokens, sample.text, text) for sample, text in zip(plain, texts)]


def partings(pairs, gaps):
    """Where texts part, as JSON values: which text, at which new token, and how far apart the logits are; see `logit_gap`."""
    places = [parting(first, second) for _, first, second in pairs]
    return [{"text": text, "place": place, "gap": gaps[text]} for text, place in enumerate(places) if place is not None]


def check_new(out):
    """Raise UserError where the report and its picture can't be written without harm."""
    if out.suffix == ".png":
        raise UserError(f"--out={out}: the plot beside the report takes this name; end it in .json")
    if not out.parent.is_dir():
        raise UserError(f"{out}: no such folder to write to; make it, or give another --out")
    for path in (out, out.parent / f"{out.stem}.png"):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; give another --out")
        check_writable(path)


if __name__ == "__main__":
    main(Arguments, run)
