"""Serves attached heads in vLLM: the package's entry point in the group vllm.general_plugins.

vLLM calls `register` once in each of its processes. A draft model of ours becomes known to it as any out-of-tree model does, and so does
the configuration of every family. The one thing changed in memory is how a speculative_config is read: where its model is a speculator of
ours, it is checked before any weight is loaded, and drafts by the method `eagle`. Another model's runs are left exactly as they are.
"""

import functools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fms_spec.vllm.versions import installed_vllm

METHOD = "eagle"  # hands a draft the states after the final norm, and asks nothing of the base model's class
INNER = "eagle3"  # hands it the residual stream that enters chosen layers, where the base model's class can
UNDERSTOOD = (None, METHOD, INNER, "mlp_speculator")  # what a speculative_config may say; the last is what IBM's cards say
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # vLLM's own variable
ONE_PASS = {"parallel_drafting": True, "use_local_argmax_reduction": True}  # a draft's tokens of one pass, chosen by the draft model


class AttachedHeadsConfig(PretrainedConfig):
    """What vLLM reads a speculator's config.json into."""

    def __init__(self, emb_dim: int = 1, n_predict: int = 1, base_layers: Sequence[int] = (), **values: Any) -> None:
        super().__init__(**values)
        self.hidden_size, self.n_predict = emb_dim * max(1, len(base_layers)), n_predict
        self.eagle_aux_hidden_state_layer_ids = list(base_layers)
        self.num_hidden_layers, self.num_attention_heads, self.head_dim = 1, 5040, 1  # of none, but split evenly over any ranks
        self.mask_token_id = 0  # what stands in the rows of tokens to be drafted, where it is read by nobody
        self.architectures = ["Eagle3AttachedHeads" if base_layers else "EagleAttachedHeads"]


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

    from fms_spec.vllm.draft_model import AttachedHeads, AttachedHeadsOnLayers

    ModelRegistry.register_model("EagleAttachedHeads", AttachedHeads)
    ModelRegistry.register_model("Eagle3AttachedHeads", AttachedHeadsOnLayers)
    for family in ours():
        _CONFIG_REGISTRY[family.model_type] = AttachedHeadsConfig
    if not hasattr(SpeculativeConfig.__init__, "fms_spec"):
        SpeculativeConfig.__init__ = checked(SpeculativeConfig.__init__)


def ours() -> list[Any]:
    """The families that vLLM doesn't know by itself."""
    from fms_spec.speculators.registry import FAMILIES

    return [family for family in FAMILIES.values() if not family.vllm_method]


def checked(original: Callable[..., None]) -> Callable[..., None]:
    """`SpeculativeConfig.__init__` that knows our speculators and refuses those that can't draft here."""

    @functools.wraps(original)
    def __init__(self: Any, *arguments: Any, **settings: Any) -> None:
        config = config_of_ours(**settings)
        if config:
            check_wish(settings, config)
            settings |= {"method": INNER if config.get("base_layers") else METHOD, **ONE_PASS}
        original(self, *arguments, **settings)
        if config:
            check(self)

    __init__.fms_spec = True  # type: ignore[attr-defined]
    return __init__


def config_of_ours(method: str | None = None, model: str | None = None, revision: str | None = None, **_: Any) -> dict[str, Any] | None:
    """config.json of a speculative_config's model where that is a speculator of one of our families."""
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    if method not in UNDERSTOOD or not model or not (Path(model).is_dir() or str(model).count("/") == 1):
        return None  # "ngram", the name of a class, or nothing
    try:
        config = get_hf_file_to_dict("config.json", model, revision)
    except (OSError, json.JSONDecodeError):
        return None  # vLLM itself says what is wrong with it
    known = {family.model_type for family in ours()}
    return config if isinstance(config, dict) and config.get("model_type") in known else None


def check_wish(settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse what heads with this config.json can't do here.

    Raises:
        UserError: more tokens asked for than there are heads; drafts that are drawn; vLLM's V2 runner.
    """
    from fms_spec.errors import UserError

    tokens, heads = settings.get("num_speculative_tokens"), config.get("n_predict")
    if isinstance(tokens, int) and isinstance(heads, int) and tokens > heads:
        raise UserError(f"num_speculative_tokens {tokens}: speculator {settings['model']} has {heads} heads; ask for at most as many")
    if settings.get("draft_sample_method", "greedy") != "greedy":
        raise UserError(f"draft_sample_method {settings['draft_sample_method']}: attached heads draft their best tokens; leave it out")
    if os.environ.get(RUNNER, "0") != "0":  # unset, vLLM takes the other by itself
        raise UserError(f"{RUNNER}={os.environ[RUNNER]}: vLLM's V2 runner doesn't draft in one pass, as attached heads do; unset it")


def check(settings: Any) -> None:
    """Refuse a speculator that doesn't fit the model vLLM is to serve, before any weight is loaded.

    Args:
        settings: `SpeculativeConfig`. Its draft model becomes a local directory, downloaded where it was a hub name.

    Raises:
        UserError: another base model, other sizes, altered weights, inner layers of a model that doesn't give them, or a split that
        leaves the heads without what they share with the base model.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_eagle3

    from fms_spec.errors import UserError
    from fms_spec.hub import local_directory
    from fms_spec.speculators.directory import check_base_model, check_layers, check_weights, read_speculator_config
    from fms_spec.speculators.registry import family_of

    draft, target = settings.draft_model_config, settings.target_model_config
    draft.model = str(local_directory("speculator", draft.model, revision=draft.revision))
    config = read_speculator_config(draft.model)
    sizes = (target.get_hidden_size(), target.get_vocab_size())
    check_base_model(draft.model, config, target.model, fingerprint_of(target), sizes)
    check_layers(draft.model, config, target.model, target.get_total_num_hidden_layers())
    check_weights(draft.model, config)
    if settings.method == INNER and not supports_eagle3(target_class := ModelRegistry.resolve_model_cls(target.architectures, target)[0]):
        what = f"vLLM's {target_class.__name__} doesn't give its inner layers"
        raise UserError(f"speculator {draft.model} reads inner layers (speculator.base_layers), and {what}; train it without")
    stages = settings.target_parallel_config.pipeline_parallel_size
    if stages > 1 and (family_of(config["model_type"]).needs_embedding or config.get("pointer_width")):
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
