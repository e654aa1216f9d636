"""The draft model that vLLM runs: attached heads behind its method `eagle`, which hands over the states after the final norm, or `eagle3`,
which hands over the residual stream that enters chosen layers.

vLLM shows a draft all tokens of a step in one pass, x_{t+1} beside h_t, and behind each request's newest a row for every further token that
is to be drafted (`parallel_drafting`). It then asks for those rows' tokens: there the chain is drafted, as our own decoding drafts it.

Shapes: n rows of a pass, b requests, k tokens drafted for each, d width of what is handed over.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.platforms import current_platform

from fms_spec.proposers import Step, TopKProposer
from fms_spec.read_out import with_bias
from fms_spec.speculators.directory import read_speculator, read_speculator_config
from fms_spec.transformers_backend import output_of
from fms_spec.vllm.cpu import mend_sampling
from fms_spec.vllm.token_store import TokenStore


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
        self.register_buffer("mask_hidden", torch.zeros(settings.draft_model_config.get_hidden_size()), persistent=False)
        self.drafted = settings.num_speculative_tokens
        self.attached = False

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
        self.proposer = TopKProposer(self.speculator, [1] * self.drafted)
        self.attached = True

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' own numbers, int64 [n], twice: vLLM picks those that are drafted behind, for `get_top_tokens`.

        Args:
            input_ids: int [n], x_{t+1}, anything where a draft is to stand. positions: int64 [n], t. hidden_states: [n, d], h_t.
        """
        if not self.attached:
            self.attach()
        batch = self.store.current()
        if batch and self.speculator.context_width:
            self.store.write(batch, input_ids.long())
        self.batch, self.rows = batch, (hidden_states, input_ids, positions)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return rows, rows

    def get_top_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Drafts of every request, in order, int64 [b k]: rows int64 [b k] of the last pass, those of each request's newest token first."""
        newest = rows.view(-1, self.proposer.lookahead)[:, 0]
        hidden, tokens, positions = (part[newest] for part in self.rows)
        context = None
        if self.speculator.context_width and self.batch:
            context = self.store.context(self.batch, self.speculator, positions, hidden.dtype)
        return self.proposer.propose(Step(hidden, tokens.long(), [], context=context)).tokens.flatten()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Never asked for: drafts are the heads' best tokens."""
        raise NotImplementedError


class AttachedHeadsOnLayers(AttachedHeads, Eagle3LlamaForCausalLM):
    """The same behind vLLM's method `eagle3`, of whose models it must be one, for heads that read inner layers."""

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[n, layers d], as vLLM hands them over and `Speculator.start` takes them."""
        return hidden_states


def whole(layer: Any, value: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    """A part of the base model's embedding or lm_head that is split over ranks, as [v, ...]."""
    if value is not None and layer.tp_size > 1:
        value = tensor_model_parallel_all_gather(value.data, dim=0)
    return None if value is None else value.data[:vocab_size]
