"""The benchmarks of scripts.benchmark, from their flags to lines of results."""

from pathlib import Path

import torch

from data.prompts import load_prompts
from data.reader import RowReader, check_tokenizer, read_manifest, read_prompts
from fms_spec.base_model import BaseModel
from fms_spec.errors import UserError
from fms_spec.files import write_whole
from fms_spec.loading import load_for_decoding
from fms_spec.model_config import read_config, resolve_base_model
from fms_spec.speculators.directory import check_speculator
from pipelines.cli import draft_shape, keep_freed_memory
from pipelines.config import GenerationSection
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
    lines = read_results(parsed.results.split(",") if isinstance(parsed.results, str) else parsed.results)
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
    path = resolve_base_model(parsed.base_model)
    check_tokenizer(read_manifest(parsed.prompts), path)
    prompts = read_prompts(parsed.prompts).tokens
    if len(set(map(len, prompts))) > 1:
        raise UserError(f"--prompts={parsed.prompts}: its prompts are of unequal lengths, which this benchmark's ways don't all take")
    prompts = torch.stack(prompts)
    check_context(path, prompts.shape[1], parsed.max_tokens)
    need_vllm("this benchmark")
    sampling = {"temperature": parsed.temperature, "top_k": parsed.top_k}
    settings = GenerationSection(max_new_tokens=parsed.max_tokens, memory_share=0.5, **sampling)  # the other ways share the GPU
    lines = benchmark_continuations(parsed.base_model, parsed.dtype, parsed.backend, prompts, settings)
    write_lines("continuations", lines, parsed.out)


def run_serving(parsed):
    check_out(parsed.out)
    check_speculator(parsed.speculator, parsed.base_model)
    prompts = load_prompts(parsed.prompts, resolve_base_model(parsed.base_model), parsed.limit)
    need_vllm("this benchmark")
    lines = benchmark_serving(parsed.base_model, parsed.speculator, prompts, parsed.max_new_tokens, parsed.dtype, parsed.lookahead)
    write_lines("serving", lines, parsed.out)


def run_decode(parsed):
    check_out(parsed.out)
    shape = draft_shape(parsed)
    path = resolve_base_model(parsed.base_model)
    prompts = load_prompts(parsed.prompts, path, parsed.limit)
    spec_bench = load_prompts(parsed.spec_bench, path, parsed.spec_bench_limit) if parsed.spec_bench else []
    base_model, speculator, _ = load_for_decoding(parsed.base_model, parsed.speculator, shape, dtype=DTYPE)
    write_lines("decode", benchmark_decode(base_model, speculator, prompts, spec_bench, parsed.max_new_tokens, shape), parsed.out)
