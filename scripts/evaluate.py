"""Measure a speculator: python -m scripts.evaluate --base_model=DIR --speculator=DIR --prompts=PREPARED [--out=report.json]"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data.prompts import load_prompts
from fms_spec.base_model import resolve_base_model
from fms_spec.errors import UserError
from fms_spec.loading import load_for_decoding
from pipelines.environment import environment
from pipelines.evaluate import evaluate, report, usual_ways
from pipelines.plots import plot_evaluation
from pipelines.suggestion import chain_acceptance, greedy_texts, suggest
from pipelines.tables import print_evaluation
from scripts.cli import arguments, draft_shape, main


@arguments
class Arguments:
    """Decode prompts greedily with a speculator, plainly and with prompt lookup; report acceptance as vLLM counts it, speed, losslessness.

    Also tried on the plain texts: which tree would have been fastest, from the costs of a step on this machine.

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


def run(parsed):
    out = Path(parsed.out) if parsed.out else None
    if out:
        check_new(out, out.with_suffix(".png"))
    prompts = load_prompts(parsed.prompts, resolve_base_model(parsed.base_model), parsed.limit)
    base_model, speculator, proposer = load_for_decoding(
        parsed.base_model, parsed.speculator, draft_shape(parsed), dtype=parsed.dtype, backend=parsed.backend
    )
    samples = evaluate(base_model, prompts, usual_ways(proposer), parsed.max_new_tokens)
    texts = greedy_texts(base_model, samples)
    values = report(samples, proposer) | chain_acceptance(speculator, texts) | {"suggestion": suggest(base_model, speculator, texts)}
    print_evaluation(values, parsed.speculator)
    if out:
        out.write_text(json.dumps(values | {"environment": environment()}, indent=2) + "\n")
        plot_evaluation(values, out.with_suffix(".png"))


def check_new(*paths):
    """Raise UserError for files that can't be written without harm."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists already; give another --out")
        if not path.parent.is_dir():
            raise UserError(f"{path}: no such folder to write to; make it, or give another --out")


if __name__ == "__main__":
    main(Arguments, run)
