"""Measure speed on this machine, as JSON lines: python -m scripts.benchmark decode|continuations|serving|train_step|recipe|report --help"""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.cli import arguments, main_of
from pipelines.config import Count
from pipelines.measure.benchmarks import run_continuations, run_decode, run_recipe, run_report, run_serving, run_train_step
from pipelines.measure.train_step import PARTS


@arguments
class Decode:
    """Decoding in bf16: forwards, plain and speculative decoding, prompt lookup, batches; every ratio from one run.

    Args:
        base_model: directory or hub name.
        speculator: directory written by scripts.export, or a published MLP, EAGLE-3 or Medusa speculator.
        prompts: a folder from scripts.prepare_data with held-out documents, or a .jsonl file.
        spec_bench: another .jsonl file, compared with `transformers` prompt lookup category by category.
        limit: use only the first so many of `prompts`, of each category.
        spec_bench_limit: use only the first so many of each category of `spec_bench`.
        max_new_tokens: decode at most so many tokens after each prompt, 2 or more: speed is that of the steps after the first.
        lookahead: depth of the candidates; what the speculator was trained for by default.
        top_k_per_head: children of each candidate, level by level, as in 3,2,1; a chain by default.
        nodes: draft the so many likeliest candidates instead, as a tree.
        min_probability: end a chain after a candidate that the heads hold less likely than this to be accepted; 0 never.
        lookup: where the last three tokens stood in the text before, try the so many that followed there, without the heads; 0 for none.
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
    min_probability: float | int = 0.0
    lookup: int = 0
    out: str | None = None


@arguments
class Continuations:
    """Writing phase 2's text at batches of 1 to 96: vLLM, the embedded engine and `transformers` generate; every ratio from one run.

    Args:
        base_model: directory or hub name.
        prompts: a folder from scripts.prepare_data.
        max_tokens: end each continuation at so many tokens.
        temperature: 0 is greedy.
        top_k: sample from the so many likeliest tokens; 0 is off.
        dtype: bfloat16, float16 or float32.
        backend: auto, fms or transformers, for the embedded engine.
        out: also append the lines to this file.
    """

    base_model: str
    prompts: str
    max_tokens: Count = 32
    temperature: float = 1.0
    top_k: int = 10
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"
    out: str | None = None


@arguments
class Serving:
    """A speculator in vLLM, one text at a time: through the plugin, plainly, and vLLM's own ngram method, in turn in one run.

    Args:
        base_model: directory or hub name.
        speculator: directory written by scripts.export, or a published MLP, EAGLE-3 or Medusa speculator.
        prompts: a folder from scripts.prepare_data with held-out documents, or a .jsonl file.
        limit: use only the first so many of `prompts`, of each category.
        max_new_tokens: decode at most so many tokens after each prompt.
        lookahead: tokens that are drafted; what the speculator was trained for by default.
        dtype: bfloat16, float16 or float32.
        out: also append the lines to this file.
    """

    base_model: str
    speculator: str
    prompts: str
    limit: int | None = None
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
    lookahead: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    out: str | None = None


@arguments
class TrainStep:
    """A phase-1 step's parts: heads and losses against the plain version, the base model's forward, the rest; every ratio from one run.

    Heads are measured with random weights, of the base model's shape and of one with a wide vocabulary.

    Args:
        base_model: directory or hub name.
        data: a folder from scripts.prepare_data, read as training does.
        tokens: of a step.
        rounds: how often each way is measured, in turn; medians count.
        wide_vocab: tokens of the wide vocabulary.
        parts: measure only some, as in heads,loss: of heads, wide_heads, published_heads, loss, wide_loss, base_forward, rest, compile
            and small.
        dtype: of the base model in `rest` and `compile`: bfloat16, float16 or float32. The others are measured in fp32 and
            bf16, on a GPU the wide vocabulary's in bf16 alone.
        out: also append the lines to this file.
    """

    base_model: str
    data: str
    tokens: Count = 4096
    rounds: Count = 3
    wide_vocab: Annotated[int, Field(ge=4, le=2**31 - 1)] = 128256
    parts: tuple[str, ...] | str = PARTS
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    out: str | None = None


@arguments
class Report:
    """Results of any benchmarks as one table and one picture of their ratios.

    Args:
        results: file of JSON lines, or several: a.jsonl,b.jsonl.
        out: folder to write report.md and report.png to.
    """

    results: tuple[str, ...] | str
    out: str


@arguments
class Recipe:
    """What a fixed budget teaches: named variants of a training config, each judged on the data's held-out prompts, which none trains on.

    The variants share the base model's hidden states and texts, so that each costs only its head steps. Stopped and started again, it goes
    on with the variants that are missing. Trailing key.path=value words override the config of all variants, e.g. schedule.steps=630.

    Args:
        config: YAML file, as for scripts.train.
        out_dir: where results.jsonl and what the variants share goes.
        variants: YAML list of entries with name, why, and set, a list of key.path=value words.
    """

    config: str
    out_dir: str
    variants: str = "pipelines/configs/variants/quickstart.yaml"


if __name__ == "__main__":
    commands = {
        "decode": (Decode, run_decode), "continuations": (Continuations, run_continuations), "serving": (Serving, run_serving),
        "train_step": (TrainStep, run_train_step), "recipe": (Recipe, run_recipe, True), "report": (Report, run_report),
    }  # fmt: skip
    main_of(commands)
