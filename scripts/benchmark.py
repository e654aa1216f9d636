"""Measure speed on this machine, as JSON lines: python -m scripts.benchmark decode --base_model=DIR --speculator=DIR --prompts=PREPARED"""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from data.prompts import load_prompts
from fms_spec.base_model import resolve_base_model
from fms_spec.errors import UserError
from fms_spec.loading import load_for_decoding
from pipelines.benchmark_decode import DTYPE, benchmark_decode
from pipelines.environment import environment
from scripts.cli import arguments, draft_shape, main_of


@arguments
class Decode:
    """Decoding in bf16: forwards, plain and speculative decoding, prompt lookup, batches; every ratio from one run.

    Args:
        base_model: directory or hub name.
        speculator: directory written by scripts.export, or a published MLP speculator.
        prompts: a folder from scripts.prepare_data with held-out documents, or a .jsonl file.
        spec_bench: another .jsonl file, compared with `transformers` prompt lookup category by category.
        limit: use only the first so many of `prompts`, of each category.
        spec_bench_limit: use only the first so many of each category of `spec_bench`.
        max_new_tokens: decode at most so many tokens after each prompt, 2 or more: speed is that of the steps after the first.
        lookahead: depth of the candidates; what the speculator was trained for by default.
        top_k_per_head: children of each candidate, level by level, as in 3,2,1; a chain by default.
        nodes: draft the so many likeliest candidates instead, as a tree.
        out: also append the lines to this file.
    """

    base_model: str
    speculator: str
    prompts: str
    spec_bench: str | None = None
    limit: int | None = None
    spec_bench_limit: int | None = None
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
    lookahead: int | None = None
    top_k_per_head: tuple[int, ...] | int | None = None
    nodes: int | None = None
    out: str | None = None


def run_decode(parsed):
    if parsed.out and not Path(parsed.out).parent.is_dir():
        raise UserError(f"{parsed.out}: no such folder to write to; make it, or give another --out")
    shape = draft_shape(parsed)
    path = resolve_base_model(parsed.base_model)
    prompts = load_prompts(parsed.prompts, path, parsed.limit)
    spec_bench = load_prompts(parsed.spec_bench, path, parsed.spec_bench_limit) if parsed.spec_bench else []
    base_model, speculator, _ = load_for_decoding(parsed.base_model, parsed.speculator, shape, dtype=DTYPE)
    write_lines("decode", benchmark_decode(base_model, speculator, prompts, spec_bench, parsed.max_new_tokens, shape), parsed.out)


def write_lines(benchmark, lines, out):
    """Print each result as a line of JSON, with the benchmark's name and what it was measured on, and append it to `out`."""
    measured_on = environment()
    for line in lines:
        text = json.dumps({"benchmark": benchmark} | line | {"environment": measured_on})
        print(text, flush=True)
        if out:
            with open(out, "a") as stream:
                stream.write(text + "\n")


if __name__ == "__main__":
    main_of({"decode": (Decode, run_decode)})
