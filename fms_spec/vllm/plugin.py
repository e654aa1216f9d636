"""Serves attached heads in vLLM, unpatched on disk: the package's entry point in the group vllm.general_plugins.

vLLM calls `register` once in each of its processes. It knows the configuration of `method: mlp_speculator`, and has had no drafter for it
since its V0 engine went; its Medusa drafter is the one that is handed the states from which each newest token was chosen. So, in memory:
- every family's `model_type` and architectures become known, under the one method mlp_speculator;
- a speculator that doesn't fit is refused when the engine's configuration is made, before any weight is loaded;
- a model runner that is to draft with one gets our drafter where it would make a Medusa one, and hands it the sampled tokens.
Another method's runs are left exactly as they are.
"""

import functools
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

from fms_spec.vllm.versions import METHOD, installed_vllm


def register() -> None:
    """Make vLLM able to draft with attached heads, in this process. Says so in one line and does nothing where the version wasn't tried."""
    _, problem = installed_vllm()
    if problem:
        if multiprocessing.parent_process() is None:  # once, not in each of the engine's processes
            logging.getLogger("vllm").warning(problem)
        return
    from vllm.config.speculative import SpeculativeConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.v1.worker import gpu_model_runner

    from fms_spec.speculators.registry import FAMILIES
    from fms_spec.vllm.drafter import AttachedHeadsConfig, drafting, handing_over

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, family)
        if family.model_type != METHOD:  # which vLLM knows itself
            _CONFIG_REGISTRY[family.model_type] = AttachedHeadsConfig
    runner = gpu_model_runner.GPUModelRunner
    wrap(SpeculativeConfig, "__post_init__", checked)
    wrap(runner, "__init__", drafting)
    wrap(runner, "propose_draft_token_ids", handing_over)


def wrap(owner: type, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrapper(original)` in a method's place, once."""
    original = getattr(owner, name)
    if not hasattr(original, "fms_spec"):
        replacement = functools.wraps(original)(wrapper(original))
        replacement.fms_spec = True  # type: ignore[attr-defined]
        setattr(owner, name, replacement)


def checked(original: Callable[..., None]) -> Callable[..., None]:
    """`SpeculativeConfig.__post_init__` that refuses a speculator that can't draft here."""

    def __post_init__(self: Any) -> None:
        original(self)
        if self.method == METHOD:
            check(self)

    return __post_init__


def check(settings: Any) -> None:
    """Refuse a speculator that doesn't fit the model vLLM is to serve, before any weight is loaded.

    Args:
        settings: `SpeculativeConfig`. Its draft model becomes a local directory, downloaded where it was a hub name.

    Raises:
        UserError: more tokens asked than there are heads, another base model, other sizes, altered weights, or a split that
        leaves the heads without what they share with the base model.
    """
    from fms_spec.errors import UserError
    from fms_spec.hub import local_directory
    from fms_spec.speculators.directory import check_base_model, check_weights, read_speculator_config
    from fms_spec.speculators.registry import family_of

    draft, target = settings.draft_model_config, settings.target_model_config
    draft.model = str(local_directory("speculator", draft.model, revision=draft.revision))
    config = read_speculator_config(draft.model)
    sizes = (target.get_hidden_size(), target.get_vocab_size())
    check_base_model(draft.model, config, target.model, fingerprint_of(target), sizes)
    check_weights(draft.model, config)
    if settings.num_speculative_tokens > config["n_predict"]:
        asked = f"num_speculative_tokens {settings.num_speculative_tokens}"
        raise UserError(f"{asked}: speculator {draft.model} has {config['n_predict']} heads; ask for at most as many")
    if config.get("pointer_width"):
        raise UserError(
            f"speculator {draft.model} copies from the text (speculator.pointer), which isn't served in vLLM yet; train it without"
        )
    stages = settings.target_parallel_config.pipeline_parallel_size
    if stages > 1 and family_of(config["model_type"]).needs_embedding:
        mend = "split by tensor_parallel_size instead"
        raise UserError(f"pipeline_parallel_size {stages}: speculator {draft.model} needs the token embedding on the last rank; {mend}")


def fingerprint_of(target: Any) -> str | None:
    """Fingerprint of the model to be served (`ModelConfig`), or None where it can't be compared: quantised, or not on this machine yet."""
    from fms_spec.errors import UserError
    from fms_spec.hub import local_directory
    from fms_spec.weights import fingerprint

    if target.quantization:
        return None
    try:
        return fingerprint(local_directory("base model", target.model, revision=target.revision, local_files_only=True))
    except UserError:
        return None
