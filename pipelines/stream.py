"""One prompt, continued on the console."""

import torch
from jinja2 import TemplateError
from rich.console import Console

from data.tokenizer import encode_prompt, refuse_unknown, served_tokenizer
from fms_spec.acceptance import pooled_acceptance
from fms_spec.base_model import BaseModel
from fms_spec.decoding import Decoding
from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError
from fms_spec.loading import load_for_decoding
from fms_spec.lookup import PromptLookup
from fms_spec.model_config import resolve_base_model
from fms_spec.options import DecodingOptions
from fms_spec.sampling import Sampling
from fms_spec.transformers_backend import first_line
from pipelines.cli import draft_shape


def stream(parsed):
    """Print the continuation as it is decoded, and how fast that went; parsed: the flags of scripts.decode."""
    if parsed.compare and not parsed.speculator:
        raise UserError("--compare sets a speculator against plain decoding; give --speculator")
    sampling = Sampling(temperature=parsed.temperature, top_k=parsed.top_k, top_p=parsed.top_p)
    tokenizer = served_tokenizer(resolve_base_model(parsed.base_model))
    base_model, proposer = load(parsed)
    options = DecodingOptions(
        max_new_tokens=parsed.max_new_tokens, min_new_tokens=parsed.min_new_tokens, tokenizer=tokenizer, sampling=sampling,
        stop=(parsed.stop,) if isinstance(parsed.stop, str) else tuple(parsed.stop), seeds=(parsed.seed,),
    )  # fmt: skip
    prompt = encode(tokenizer, parsed)
    refuse_unknown(prompt, base_model.vocab_size, tokenizer.backend_tokenizer, "--prompt")
    console = Console(highlight=False, soft_wrap=True, force_terminal=True if parsed.mark else None)
    rate = continue_prompt(base_model, prompt, options, proposer, console, parsed.mark)
    if parsed.compare:
        plain = continue_prompt(base_model, prompt, options, None, Console(quiet=True), False)
        console.print(f"plain decoding: {plain:.1f} tokens/s" + (f"; speed-up {rate / plain:.2f}" if plain else ""))


def load(parsed):
    """(base model, proposer or None)."""
    settings, shape = {"dtype": parsed.dtype, "backend": parsed.backend}, draft_shape(parsed)
    if parsed.speculator not in (None, "prompt_lookup"):
        base_model, _, proposer = load_for_decoding(parsed.base_model, parsed.speculator, shape, **settings)
        return base_model, proposer
    if shape != DraftShape(parsed.lookahead if parsed.speculator else None):
        flags = "lookahead, top_k_per_head, nodes, min_probability and lookup"
        raise UserError(f"{flags} shape a speculator's candidates; give --speculator (prompt_lookup takes a lookahead)")
    base_model = BaseModel(parsed.base_model, **settings)
    base_model.pack()
    return base_model, PromptLookup(4 if parsed.lookahead is None else parsed.lookahead) if parsed.speculator else None


def encode(tokenizer, parsed):
    """The prompt's tokens: int64 [n]."""
    if not parsed.chat:
        return torch.tensor(encode_prompt(tokenizer, parsed.prompt), dtype=torch.int64)
    if not tokenizer.chat_template:
        raise UserError(f"base model {parsed.base_model}: it has no chat template; leave --chat out")
    messages = [{"role": "user", "content": parsed.prompt}]
    try:
        return torch.tensor(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except TemplateError as error:
        problem = f"its chat template can't be used ({first_line(error)})"
        raise UserError(f"base model {parsed.base_model}: {problem}; mend it, or leave --chat out") from None


def continue_prompt(base_model, prompt, options, proposer, console, mark):
    """Stream the text, print the figures; returns decoded tokens per second, without the prompt's own time."""
    decoding, accepted, count, reason = Decoding(base_model, [prompt], options, proposer), [], 0, None
    for (emitted,) in decoding.run():
        for place, piece in enumerate(emitted.pieces):
            drafted = emitted.accepted is not None and place < emitted.accepted
            console.print(piece, end="", markup=False, style="green" if mark and drafted else None)
        console.file.flush()
        count, reason = count + len(emitted.tokens), emitted.finish_reason
        if emitted.accepted is not None:
            accepted.append(emitted.accepted)
    timing = decoding.timing()
    rate = (count - 1) / timing.decoding if timing.decoding else 0.0
    found = pooled_acceptance(accepted, proposer.lookahead if proposer else 0)
    length = f", acceptance length {found.length:.2f} over {found.steps} steps" if proposer else ""
    console.print(f"\n\n{count} tokens ({reason}), {rate:.1f} tokens/s{length}")
    return rate
