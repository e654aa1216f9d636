"""Measure a speculator: python -m scripts.evaluate --base_model=DIR --speculator=DIR --prompts=PREPARED [--out=report.json]"""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.cli import arguments, main
from pipelines.measure.evaluate import evaluate


@arguments
class Arguments:
    """Decode prompts greedily with a speculator, plainly and with prompt lookup; report acceptance as vLLM counts it, speed, losslessness.

    Also tried on the plain texts: which tree would have been fastest, from the costs of a step on this machine. Texts in bfloat16 or
    float16 that aren't the plain ones are decoded again in float32, which tells rounding from a loss.

    Args:
        base_model: directory or hub name of the base model the speculator was trained for.
        speculator: directory written by scripts.export, or a published MLP, EAGLE-3 or Medusa speculator.
        prompts: a folder from scripts.prepare_data with held-out documents, or a .jsonl file with a "prompt" text, or chat "turns", a line.
        out: also write the report here, as JSON, and a plot beside it, as PNG.
        limit: use only the first so many prompts of each category.
        max_new_tokens: decode at most so many tokens after each prompt, 2 or more: speed is that of the steps after the first.
        lookahead: depth of the candidates; what the speculator was trained for by default.
        top_k_per_head: children of each candidate, level by level, as in 3,2,1; a chain by default.
        nodes: draft the so many likeliest candidates instead, as a tree.
        min_probability: end a chain after a candidate that the heads hold less likely than this to be accepted; 0 never.
        lookup: where the last three tokens stood in the text before, try the so many that followed there, without the heads; 0 for none.
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
    min_probability: float | int = 0.0
    lookup: int = 0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"
    against: Literal["vllm"] | None = None


if __name__ == "__main__":
    main(Arguments, evaluate)
