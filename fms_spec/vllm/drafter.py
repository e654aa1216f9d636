"""The drafter that runs inside vLLM's model runner: attached heads as one batched chain on the device.

Shapes: b requests of a step, k drafted tokens, d base width, v vocabulary.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.transformers_utils.configs.mlp_speculator import MLPSpeculatorConfig
from vllm.v1.spec_decode.medusa import MedusaProposer
from vllm.v1.worker import gpu_model_runner

from fms_spec.proposers import Step, TopKProposer
from fms_spec.read_out import with_bias
from fms_spec.speculators.directory import read_speculator, read_speculator_config
from fms_spec.vllm.cpu import mend_sampling
from fms_spec.vllm.versions import METHOD


class AttachedHeadsConfig(MLPSpeculatorConfig):
    """What vLLM reads a config.json into whose model_type it doesn't know: to its configuration, one more kind of MLP speculator."""

    def __init__(self, n_predict: int = 3, **values: Any) -> None:
        super().__init__(n_predict=n_predict, top_k_tokens_per_head=[1] * n_predict, **values)
        self.model_type = METHOD


class AttachedHeadsDrafter(MedusaProposer):
    """Drafts with a `Speculator` where vLLM's Medusa drafter would be asked to.

    vLLM runs it on the state from which each request's newest token was chosen. Medusa's heads need no more; ours also need that token,
    which `handing_over` leaves in `sampled` beforehand.
    """

    sampled: list[list[int]]  # b lists of ints: what each request was given in this step, none where its prompt is still being read

    def load_model(self, target_model: torch.nn.Module) -> None:
        model_config = self.vllm_config.model_config
        directory = self.spec_config.draft_model_config.model
        self.speculator = read_speculator(directory, read_speculator_config(directory)).to(device=self.device, dtype=self.dtype)
        self.speculator.attach(served_weights(target_model, model_config.get_vocab_size()))
        self.speculator.pack()
        self.chain = TopKProposer(self.speculator, [1] * self.num_speculative_tokens)

    def propose(
        self, num_speculative_tokens: int, target_hidden_states: torch.Tensor, sampling_metadata: Any, slot_mappings: Any = None
    ) -> torch.Tensor:
        """int64 [b, k] of states [b, d]; nothing here waits for the device."""
        newest = [tokens[-1] if tokens else 0 for tokens in self.sampled]  # without a token the scheduler drops the draft
        tokens = torch.tensor(newest, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        drafted = self.chain.propose(Step(target_hidden_states, tokens, texts=[]))
        return drafted.tokens[:, :num_speculative_tokens]


def drafting(original: Callable[..., Any]) -> Callable[..., None]:
    """`GPUModelRunner.__init__` that makes our drafter for our method."""

    def __init__(self: Any, vllm_config: Any, *arguments: Any, **named: Any) -> None:
        settings = vllm_config.speculative_config
        if settings is None or settings.method != METHOD:
            return original(self, vllm_config, *arguments, **named)
        if current_platform.is_cpu():
            mend_sampling()
        settings.method = "medusa"  # the only branch that hands a drafter these states; here, in the worker, nothing else asks
        gpu_model_runner.MedusaProposer = AttachedHeadsDrafter
        try:
            original(self, vllm_config, *arguments, **named)
        finally:
            gpu_model_runner.MedusaProposer = MedusaProposer

    return __init__


def handing_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """`GPUModelRunner.propose_draft_token_ids` that shows our drafter the sampled tokens first."""

    def propose_draft_token_ids(self: Any, scheduler_output: Any, sampled_token_ids: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(self.drafter, AttachedHeadsDrafter):
            self.drafter.sampled = sampled_token_ids
        return original(self, scheduler_output, sampled_token_ids, *arguments, **named)

    return propose_draft_token_ids


def served_weights(target_model: torch.nn.Module, vocab_size: int) -> SimpleNamespace:
    """What `Speculator.attach` takes from a base model, out of vLLM's: embedding_weight and output_weight, [v, d], whole on every rank."""
    layers = [layer for layer in target_model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = [layer for layer in layers if not isinstance(layer, ParallelLMHead)]
    outputs = [layer for layer in layers if isinstance(layer, ParallelLMHead)] or embeddings  # tied
    first, last = embeddings[0], outputs[0]
    parts = ((first, first.weight), (last, last.weight), (last, getattr(last, "bias", None)))
    embedding, output, bias = (whole(layer, value, vocab_size) for layer, value in parts)
    assert output is not None
    return SimpleNamespace(embedding_weight=embedding, output_weight=with_bias(output, bias))


def whole(layer: Any, value: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    if value is not None and layer.tp_size > 1:
        value = tensor_model_parallel_all_gather(value.data, dim=0)
    return None if value is None else value.data[:vocab_size]
