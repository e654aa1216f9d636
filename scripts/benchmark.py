"""Measure speed on this machine, as JSON lines: python -m scripts.benchmark decode|continuations|serving|train_step|recipe|report --help"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data.prompts import load_prompts
from data.reader import RowReader, check_tokenizer, read_manifest, read_prompts
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.files import write_whole
from fms_spec.loading import load_for_decoding
from fms_spec.model_config import read_config, resolve_base_model
from fms_spec.speculators.directory import check_speculator
from pipelines.cli import arguments, draft_shape, keep_freed_memory, main_of
from pipelines.config import Count, GenerationSection
from pipelines.generate.engines import check_context
from pipelines.generate.vllm_engine import need_vllm
from pipelines.measure.continuations import benchmark_continuations
from pipelines.measure.decode import DTYPE, benchmark_decode
from pipelines.measure.recipe import compared
from pipelines.measure.recipe_sweep import RESULTS, sweep
from pipelines.measure.results import check_out, machines, markdown, ratios, read_results, rows, write_lines
from pipelines.measure.serving import benchmark_serving
from pipelines.measure.train_step import PARTS, benchmark_train_step
from pipelines.plan.devices import device_memory
from pipelines.plan.feasible import check_memory
from pipelines.show.console import print_recipes, print_results
from pipelines.show.plots import plot_ratios


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
        speculator: directory written by scripts.export, or a published MLP speculator.
        prompts: a folder from scripts.prepare_data with held-out documents, or a .jsonl file.
        limit: use only the first so many of `prompts`, of each category.
        max_new_tokens: decode at most so many tokens after each prompt.
        dtype: bfloat16, float16 or float32.
        out: also append the lines to this file.
    """

    base_model: str
    speculator: str
    prompts: str
    limit: int | None = None
    max_new_tokens: Annotated[int, Field(ge=2)] = 64
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
        dtype: of the base model in `rest` and `compile`: bfloat16, float16 or float32. The others are measured in fp32 and bf16.
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


def run_recipe(parsed, overrides):
    lines = sweep(parsed.config, parsed.variants, Path(parsed.out_dir), overrides)
    print_recipes(compared(lines), str(Path(parsed.out_dir) / RESULTS))


def run_train_step(parsed):
    check_out(parsed.out)
    parts = (parsed.parts,) if isinstance(parsed.parts, str) else parsed.parts
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: {part} is none of {', '.join(PARTS)}")
    path, manifest = resolve_base_model(parsed.base_model), read_manifest(parsed.data)
    check_tokenizer(manifest, path)
    for flag, count in (("tokens", parsed.tokens), ("wide_vocab", parsed.wide_vocab)):
        check_memory(4 * count * read_config(path).hidden_size, device_memory(), f"--{flag}={count}", "lower it")
    data = RowReader(parsed.data, batch_size=max(1, parsed.tokens // manifest["inputs"]["seq_length"]), seed=0)
    base_model = BaseModel(parsed.base_model, dtype=parsed.dtype)
    lines = benchmark_train_step(base_model, data, parsed.tokens, parsed.rounds, parsed.wide_vocab, parts, keep_freed_memory)
    write_lines("train_step", lines, parsed.out)


def run_report(parsed):
    lines = read_results([parsed.results] if isinstance(parsed.results, str) else parsed.results)
    out = Path(parsed.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: can't be a folder ({error.strerror}); give another") from error
    print_results(machines(lines), rows(lines))
    write_whole(out / "report.md", markdown(lines).encode())
    plot_ratios(ratios(lines), "\n".join(machines(lines)), out / "report.png")


def run_continuations(parsed):
    check_out(parsed.out)
    need_vllm("this benchmark")
    path = resolve_base_model(parsed.base_model)
    check_tokenizer(read_manifest(parsed.prompts), path)
    prompts = read_prompts(parsed.prompts).tokens
    check_context(path, prompts.shape[1], parsed.max_tokens)
    sampling = {"temperature": parsed.temperature, "top_k": parsed.top_k}
    settings = GenerationSection(max_new_tokens=parsed.max_tokens, memory_share=0.5, **sampling)  # the other ways share the GPU
    lines = benchmark_continuations(parsed.base_model, parsed.dtype, parsed.backend, prompts, settings)
    write_lines("continuations", lines, parsed.out)


def run_serving(parsed):
    check_out(parsed.out)
    need_vllm("this benchmark")
    check_speculator(parsed.speculator, parsed.base_model)
    prompts = load_prompts(parsed.prompts, resolve_base_model(parsed.base_model), parsed.limit)
    lines = benchmark_serving(parsed.base_model, parsed.speculator, prompts, parsed.max_new_tokens, parsed.dtype)
    write_lines("serving", lines, parsed.out)


def run_decode(parsed):
    check_out(parsed.out)
    shape = draft_shape(parsed)
    path = resolve_base_model(parsed.base_model)
    prompts = load_prompts(parsed.prompts, path, parsed.limit)
    spec_bench = load_prompts(parsed.spec_bench, path, parsed.spec_bench_limit) if parsed.spec_bench else []
    base_model, speculator, _ = load_for_decoding(parsed.base_model, parsed.speculator, shape, dtype=DTYPE)
    write_lines("decode", benchmark_decode(base_model, speculator, prompts, spec_bench, parsed.max_new_tokens, shape), parsed.out)


if __name__ == "__main__":
    commands = {
        "decode": (Decode, run_decode), "continuations": (Continuations, run_continuations), "serving": (Serving, run_serving),
        "train_step": (TrainStep, run_train_step), "recipe": (Recipe, run_recipe, True), "report": (Report, run_report),
    }  # fmt: skip
    main_of(commands)
