"""Acceptance on held-out prompts while training: what greedy decoding would accept, without decoding each time.

Shapes: p prompts, s tokens of a text.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from fms_spec.acceptance import accepted_in_text
from fms_spec.decoding import decode
from fms_spec.options import DecodingOptions


class Validation:
    """The base model's greedy continuations of some prompts and its states along them, made once: the base model is frozen.

    Args:
        prompts: list of p int64 [n], this process's share of them, which may be none. max_new_tokens: each continuation is judged over so
        many tokens. lookahead: deepest candidates.
    """

    def __init__(self, base_model, prompts, max_new_tokens, lookahead):
        self.prompt_lengths = list(map(len, prompts))
        # Decoding judges its last step past the end of the text, so the text goes on by as many tokens as are drafted.
        options = DecodingOptions(max_new_tokens=max_new_tokens + lookahead, ignore_eos=True)
        self.tokens = self.states = self.new_tokens = ()
        with base_model.together():
            if len(prompts):
                results, _ = decode(base_model, prompts, options)
                texts = [torch.cat([prompt, torch.tensor(result.tokens)]) for prompt, result in zip(prompts, results)]
                segment_ids = pad_sequence([torch.zeros_like(text) for text in texts], batch_first=True, padding_value=-1)
                states = base_model.hidden_states(pad_sequence(texts, batch_first=True).to(base_model.device), segment_ids)
                self.tokens = [text.to(base_model.device) for text in texts]
                self.states = [row[: len(text)] for row, text in zip(states, texts)]
                self.new_tokens = [length_to_eos(result.tokens[:max_new_tokens], base_model.eos_token_ids) for result in results]

    def accepted(self, proposer):
        """What a proposer would accept at each step of each prompt, as decoding greedily would up to rounding of the states.

        Returns:
            list of lists of ints.
        """
        accepted = []
        for states, tokens, length, count in zip(self.states, self.tokens, self.prompt_lengths, self.new_tokens):
            with torch.autocast(states.device.type, dtype=states.dtype, enabled=states.dtype != torch.float32):
                accepted.append(accepted_in_text(proposer, states, tokens, length, count))
        return accepted


def length_to_eos(tokens, eos_token_ids):
    """Number of tokens up to and with the first EOS, or all of them."""
    return next((length for length, token in enumerate(tokens, start=1) if token in eos_token_ids), len(tokens))
