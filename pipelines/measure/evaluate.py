"""What a speculator earns, from the flags of scripts.evaluate to its report."""

from functools import partial
from pathlib import Path

from data.prompts import load_prompts
from fms_spec.errors import UserError
from fms_spec.files import write_json
from fms_spec.loading import load_for_decoding
from fms_spec.model_config import resolve_base_model
from fms_spec.vllm.versions import installed_vllm
from pipelines.cli import check_new, draft_shape
from pipelines.generate.vllm_engine import need_vllm
from pipelines.machine.environment import environment
from pipelines.measure.figures import losslessness, numbers, summary
from pipelines.measure.samples import decode_in_turn, free_memory, parting, settle, side_by_side, usual_methods
from pipelines.measure.serving import serve
from pipelines.measure.suggestion import LOOKUPS, chain_acceptance, greedy_texts, suggest
from pipelines.show.console import print_evaluation
from pipelines.show.plots import plot_evaluation


def evaluate(parsed):
    """Decode, compare, print, and write the report where one is asked for; parsed: the flags of scripts.evaluate."""
    out = Path(parsed.out) if parsed.out else None
    if out:
        check_report(out)
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
        write_json(out, numbers(values | {"environment": environment()}), allow_nan=False)
        plot_evaluation(values, out.with_suffix(".png"))


def measure(load, prompts, parsed):
    """(samples, their figures as JSON values) in the dtype asked for; the models are let go of on return."""
    base_model, speculator, proposer = load(dtype=parsed.dtype)
    samples = decode_in_turn(base_model, prompts, usual_methods(proposer), parsed.max_new_tokens)
    earned = partial(chain_acceptance, speculator)
    texts = partial(greedy_texts, base_model, samples, max(speculator.n_predict, *LOOKUPS))
    values = summary(samples, proposer) | {"min_probability": parsed.min_probability, "lookup": parsed.lookup}
    values |= earned(texts()) | {"suggestion": suggest(base_model, speculator, texts())}
    if parsed.against:
        *_, tokens = draft_shape(parsed).check(speculator.n_predict)  # of the heads: nothing is looked up there
        values["against"] = {"num_speculative_tokens": tokens} | earned(texts(), tokens)
    return samples, values


def serve_with_vllm(samples, values, parsed):
    """Put the prompts of the plain texts through vLLM and its acceptance into `values`; returns (prompt, plain text, vLLM's) of each."""
    free_memory()
    plain = [sample for sample in samples if sample.kind == "plain"]
    lines, tokens = [sample.prompt_tokens for sample in plain], values["against"]["num_speculative_tokens"]
    texts, acceptance = serve(parsed.base_model, parsed.speculator, lines, parsed.max_new_tokens, tokens, parsed.dtype)
    engine = {"engine": parsed.against, "version": installed_vllm()[0]}
    values["against"] = engine | acceptance | values["against"]
    return [(sample.prompt_tokens, sample.text, text) for sample, text in zip(plain, texts)]


def partings(pairs, gaps):
    """Where texts part, as JSON values: which text, at which new token, and how far apart the logits are; see `logit_gap`."""
    places = [parting(first, second) for _, first, second in pairs]
    return [{"text": text, "place": place, "gap": gaps[text]} for text, place in enumerate(places) if place is not None]


def check_report(out):
    """Raise UserError where the report and its picture can't be written without harm."""
    if out.suffix == ".png":
        raise UserError(f"--out={out}: the plot beside the report takes this name; end it in .json")
    for path in (out, out.parent / f"{out.stem}.png"):
        check_new(path, "--out")
