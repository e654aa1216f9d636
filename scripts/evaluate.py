"""Measure a speculator: python -m scripts.evaluate --base_model=DIR --speculator=DIR --prompts=PREPARED [--out=report.json]"""

import json
from pathlib import Path
from typing import Literal

from data.prompts import load_prompts
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.speculators import load_speculator
from pipelines.environment import environment
from pipelines.evaluate import evaluate, print_report
from scripts.cli import arguments, main


@arguments
class Arguments:
    """Decode held-out prompts greedily with and without a speculator; report acceptance as vLLM counts it, speed, and losslessness.

    Args:
        base_model: directory or hub name of the base model the speculator was trained for.
        speculator: directory written by scripts.export, or a published MLP speculator.
        prompts: a folder from scripts.prepare_data with held-out documents, or a .jsonl file with a "prompt" text on each line.
        out: also write the report here, as JSON.
        limit: use only the first so many prompts.
        max_new_tokens: decode at most so many tokens after each prompt.
        lookahead: tokens drafted a step; what the speculator was trained for by default.
        dtype: bfloat16, float16 or float32.
        backend: auto, fms or transformers.
    """

    base_model: str
    speculator: str
    prompts: str
    out: str | None = None
    limit: int | None = None
    max_new_tokens: int = 128
    lookahead: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"


def run(parsed):
    if parsed.out and Path(parsed.out).exists():
        raise UserError(f"{parsed.out} exists already; give another --out")
    base_model = BaseModel(parsed.base_model, dtype=parsed.dtype, backend=parsed.backend)
    speculator = load_speculator(parsed.speculator, base_model)
    prompts = load_prompts(parsed.prompts, base_model.path, parsed.limit)
    report = evaluate(base_model, speculator, prompts, max_new_tokens=parsed.max_new_tokens, lookahead=parsed.lookahead)
    report["environment"] = environment()
    print_report({name: value for name, value in report.items() if name != "environment"}, parsed.speculator)
    if parsed.out:
        Path(parsed.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(Arguments, run)
