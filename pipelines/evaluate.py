"""What a speculator earns on held-out prompts, measured by decoding them with and without it."""

import math

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fms_spec.acceptance import pooled_acceptance
from fms_spec.decoding import decode


def evaluate(base_model, speculator, prompts, *, max_new_tokens, lookahead=None):
    """Greedy decoding of each prompt alone, plain and with the speculator in turn, so that both meet the same machine.

    Args:
        prompts: list of 1-D int64 tensors. lookahead: drafts a step; by default what the speculator was trained for.

    Returns:
        dict: acceptance_length, acceptance_per_position, draft_steps, plain_tokens_per_s and speculative_tokens_per_s (of decoding,
        without prefill), speedup, lossless, prompts, differing_at_a_tie, differing, new_tokens.
    """
    lookahead = speculator.n_predict if lookahead is None else lookahead
    base_model.pack(1 + lookahead)
    accepted, verdicts = [], []
    seconds, tokens = {"plain": 0.0, "speculative": 0.0}, {"plain": 0, "speculative": 0}
    decode(base_model, prompts[:1], max_new_tokens=4, speculator=speculator, lookahead=lookahead)  # first calls choose kernels and allocate
    for prompt in tqdm(prompts, desc="decode", unit="prompt", dynamic_ncols=True):
        outputs = {}
        for kind, head in (("plain", None), ("speculative", speculator)):
            (result,), timing = decode(
                base_model, [prompt], max_new_tokens=max_new_tokens, speculator=head, lookahead=lookahead if head else None
            )
            outputs[kind] = result
            seconds[kind] += timing.decoding
            tokens[kind] += len(result.tokens) - 1  # the first token comes from the prefill
        accepted += outputs["speculative"].accepted
        verdicts.append(compare(base_model, prompt, outputs["plain"].tokens, outputs["speculative"].tokens))
    acceptance = pooled_acceptance(accepted, lookahead)
    rates = {kind: tokens[kind] / seconds[kind] if seconds[kind] else math.nan for kind in seconds}
    return {
        "acceptance_length": acceptance.length,
        "acceptance_per_position": acceptance.per_position,
        "draft_steps": acceptance.steps,
        "lookahead": lookahead,
        "plain_tokens_per_s": rates["plain"],
        "speculative_tokens_per_s": rates["speculative"],
        "speedup": rates["speculative"] / rates["plain"],
        "lossless": "differs" not in verdicts,
        "prompts": len(prompts),
        "differing_at_a_tie": verdicts.count("tie"),
        "differing": verdicts.count("differs"),
        "new_tokens": tokens["speculative"] + len(prompts),
    }


def compare(base_model, prompt, plain, speculative):
    """ "equal", "tie" or "differs" for two decoded token lists.

    A forward over one token and one over several may round differently in bf16. A tie is a first difference between two tokens whose
    logits, in a forward over the whole prefix, are no further apart than one step of the base model's dtype at the largest logit.
    """
    if plain == speculative:
        return "equal"
    place = next((i for i, (a, b) in enumerate(zip(plain, speculative)) if a != b), None)
    if place is None:
        return "differs"  # one stops where the other goes on
    prefix = torch.cat([prompt, torch.tensor(plain[:place], dtype=torch.int64)])[None]
    states = base_model.hidden_states(prefix, torch.zeros_like(prefix))
    logits = base_model.logits(states[0, -1]).double()
    spacing = torch.finfo(base_model.dtype).eps * 2 ** math.floor(math.log2(max(logits.abs().max().item(), 1e-30)))
    return "tie" if (logits[plain[place]] - logits[speculative[place]]).abs() <= spacing else "differs"


def print_report(report, title):
    """The report as a table on stdout."""
    table = Table(title=title, show_header=False)
    for name, value in report.items():
        if isinstance(value, float):
            value = f"{value:.3f}"
        elif isinstance(value, list):
            value = " / ".join(f"{item:.3f}" for item in value)
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {item:.1f}" if isinstance(item, float) else f"{key} {item}" for key, item in value.items())
        table.add_row(name, str(value))
    Console().print(table)
