"""The draft model that vLLM runs: attached heads behind its method `eagle`, which hands over the states after the final norm, or `eagle3`,
which hands over the residual stream that enters chosen layers.

vLLM runs a draft first on all tokens of a step, token x_{t+1} beside state h_t, takes each request's last row of what comes out, and goes
on from there with a token a request: exactly head 0, then the later ones.

Shapes: n tokens of a pass, b requests, d width of what is handed over, r draft vocabulary, v vocabulary.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.platforms import current_platform

from fms_spec.read_out import with_bias
from fms_spec.speculators.directory import read_speculator, read_speculator_config
from fms_spec.speculators.interface import State
from fms_spec.transformers_backend import output_of
from fms_spec.vllm.cpu import mend_sampling
from fms_spec.vllm.running import RunningStates
from fms_spec.vllm.token_store import Pass, TokenStore


class AttachedHeads(nn.Module):
    """A `Speculator` behind vLLM's interface of draft models."""

    has_own_embed_tokens = has_own_lm_head = False  # so vLLM puts the base model's in their places

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)
        if current_platform.is_cpu():
            mend_sampling()
        settings = vllm_config.speculative_config
        self.directory, self.target = settings.draft_model_config.model, settings.target_model_config
        self.model: Any = nn.Module()
        self.model.embed_tokens = nn.Module()
        self.model.embed_tokens.register_parameter("weight", None)
        self.device = torch.empty(0).device  # vLLM makes models under the one they are to be on
        self.store = TokenStore(vllm_config, f"model.layers.{self.target.get_total_num_hidden_layers()}.tokens")
        self.running = RunningStates(vllm_config.scheduler_config.max_num_batched_tokens, self.device)
        self.attached = False
        self.batch: Pass | None = None

    def load_weights(self, weights: Any) -> set[str]:
        speculator = read_speculator(self.directory, read_speculator_config(self.directory))
        self.speculator = speculator.to(device=self.device, dtype=self.target.dtype)
        return {name for name, _ in self.named_parameters()}

    def attach(self) -> None:
        """Take what is shared with the base model, once vLLM has put it here; whole on every rank."""
        size = self.target.get_vocab_size()
        layer = SimpleNamespace(**{name: whole(self.lm_head, getattr(self.lm_head, name, None), size) for name in ("weight", "bias")})
        weight, bias, _ = output_of(layer, self.target.hf_text_config)
        embedding = whole(self.model.embed_tokens, getattr(self.model.embed_tokens, "weight", None), size)
        self.speculator.attach(SimpleNamespace(embedding_weight=embedding, output_weight=with_bias(weight, bias)))
        self.speculator.pack()
        self.attached = True

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Names of rows of `running`, [n, d], for `compute_logits` and for the next pass.

        Args:
            input_ids: int [n], x_{t+1}. positions: int64 [n], t. hidden_states: [n, d], h_t, or what the pass before gave.
        """
        if not self.attached:
            self.attach()
        tokens, self.batch = input_ids.long(), self.store.current()
        before = None
        if self.speculator.context_width:
            before = torch.full_like(tokens, -1)
            if self.batch:
                self.store.write(self.batch, tokens)
                before = self.store.before(self.batch, positions)
        heads, state = self.advance(tokens, before, hidden_states)
        self.running.keep(state, positions, heads)
        names = self.running.named(hidden_states)
        return names, names

    def advance(self, tokens: torch.Tensor, before: torch.Tensor | None, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(number of each token's head, int64 [n]; the running state after it)."""
        rows, later = self.running.numbers(hidden)

        def after(head: int) -> State:
            start = (hidden,) if before is None else (hidden, before)
            return self.speculator.advance(self.running.state(rows) if head else self.speculator.start(*start), tokens, head)

        if (head := known_head(self.batch)) is not None:
            return torch.full_like(tokens, head), after(head)
        heads = torch.where(later, self.running.heads[rows] + 1, 0)
        return heads, self.by_head(heads, after)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of rows of the last pass, one for each request, in order: names [b, d] -> [b, v], -inf where no draft can be."""
        rows, _ = self.running.numbers(hidden_states)
        state, heads, context = self.running.state(rows), self.running.heads[rows], None
        if self.speculator.context_width and self.batch:
            context = self.store.context(self.batch, self.speculator, self.running.positions[rows] - heads + 1, hidden_states.dtype)

        def logits(head: int) -> torch.Tensor:
            return self.speculator.logits(state, head, context)

        head = known_head(self.batch)
        found = self.by_head(heads, logits) if head is None else logits(head)
        if self.speculator.draft_ids is None or context is not None:
            return found
        every = found.new_full((len(found), self.target.get_vocab_size()), -torch.inf)
        return every.index_copy_(1, self.speculator.draft_ids, found)

    def by_head(self, heads: torch.Tensor, of_head: Callable[[int], Any]) -> Any:
        """For each row what `of_head` gives of its own head: all that compute differently are run, as no host knows which."""
        found = of_head(0)
        for head in range(1, self.speculator.distinct_heads):
            found = chosen(heads >= head, of_head(head), found)
        return found


class AttachedHeadsOnLayers(AttachedHeads, Eagle3LlamaForCausalLM):
    """The same behind vLLM's method `eagle3`, of whose models it must be one, for heads that read inner layers."""

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[n, layers d], as vLLM hands them over and `Speculator.start` takes them."""
        return hidden_states


def known_head(batch: Pass | None) -> int | None:
    """The head of a pass; 0 where vLLM measures memory, None where it doesn't say."""
    return batch.head if batch else 0


def chosen(rows: torch.Tensor, these: Any, others: Any) -> Any:
    """`these` where rows bool [n], else `others`: tensors [n, ...], tuples of them, or None."""
    if isinstance(these, tuple):
        return tuple(chosen(rows, *pair) for pair in zip(these, others))
    return None if these is None else torch.where(rows.view(-1, *[1] * (these.dim() - 1)), these, others)


def whole(layer: Any, value: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    """A part of the base model's embedding or lm_head that is split over ranks, as [v, ...]."""
    if value is not None and layer.tp_size > 1:
        value = tensor_model_parallel_all_gather(value.data, dim=0)
    return None if value is None else value.data[:vocab_size]
