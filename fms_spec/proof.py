"""Proof, when a base model is loaded, that the seam computes what `transformers` computes.

A few layers, with their real weights, run in fp32 on the CPU: as `transformers` runs them by itself, text by text, and as this code does,
packed into one row, at near and far positions, and on a cache, as a text and as a tree. So the model is never held twice, only its
embedding, its lm_head and the first layers up to the last one of a new kind, for as long as the proof takes.

Shapes: n tokens, d base width, v vocabulary.
"""

import copy
import logging
from collections.abc import Sequence
from functools import cache as remembered
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fms_spec import fms_backend, transformers_backend
from fms_spec.candidates import Tree
from fms_spec.errors import UserError
from fms_spec.model_config import context_length, read_config, rope_kinds
from fms_spec.weights import read_entries, stray_files, weight_files

LENGTHS = (24, 17, 23)  # tokens of the texts
WINDOW = 8  # what a window is narrowed to, so that texts are longer than it
FLOATS = ("F64", "F32", "F16", "BF16")
TINY = torch.finfo(torch.float32).tiny  # a norm that may be divided by: states of nothing but zeros agree too
TOLERANCE = 1e-4  # of a state's or logits' norm; fp32 rounds to 1e-6 or so

log = logging.getLogger("fms_spec")


def settle_backend(name: Path | str, path: Path, config: PretrainedConfig, backend: str, seam: Any) -> str:
    """ "fms" or "transformers": which of them is to run a model, and is proved to compute it as it is meant.

    Args:
        config: of the model, from `read_config`. backend: as for `BaseModel`; "auto" falls back to `transformers`, and says so.
        seam: the class to be proved, `BaseModel`, which imports this file.

    Raises:
        UserError: tensors that are missing or left over, or no backend that was asked for computes the model.
    """
    for file in stray_files(path):
        log.warning("base model %s: %s is no part of it and is not read here, but vLLM reads every *.safetensors; move it away", name, file)
    if "longrope" in rope_kinds(config):
        length = context_length(config)
        log.warning(
            "base model %s: longrope, whose short factors hold up to %d tokens; serve it with --max-model-len %d, for with more vLLM turns "
            "every token by its long ones", name, length, length,
        )  # fmt: skip
    if choose_backend(name, config, backend) == "fms":
        problem = proved(name, path, stamp(path), "fms", seam)
        if problem is None:
            return "fms"
        if backend == "fms":
            raise UserError(f"base model {name}: {problem}; use backend=transformers")
        log.warning("base model %s: %s; it runs in transformers", name, problem)
    problem = proved(name, path, stamp(path), "transformers", seam)
    if problem:
        raise UserError(f"base model {name}: {(config.architectures or ['unknown'])[0]} is not supported ({problem})")
    return "transformers"


def choose_backend(name: Path | str, config: PretrainedConfig, backend: str) -> str:
    """What `settle_backend` tries first, from the config alone.

    Raises:
        UserError: ibm-fms was asked for and can't run it.
    """
    if backend == "transformers":
        return backend
    try:
        problem = fms_backend.unsupported(config)
    except (AttributeError, KeyError, TypeError) as error:  # a config that says it is of another architecture than it is
        problem = transformers_backend.first_line(error)
    if problem and backend == "fms":
        raise UserError(f"base model {name}: {problem}; use backend=transformers")
    if problem and (config.architectures or [""])[0] in fms_backend.ARCHITECTURES:
        log.warning("base model %s: %s; it runs in transformers", name, problem)
    return "transformers" if problem else "fms"


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a model's files do: names, sizes and times of its config and weights."""
    files = [path / "config.json", *weight_files(path)]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@remembered
def proved(name: Path | str, path: Path, _: tuple[tuple[str, int, int], ...], backend: str, seam: Any) -> str | None:
    """What keeps a backend from computing a model, or None. Remembered for a process, as long as its `stamp` stays.

    Raises:
        UserError: tensors that are missing, left over or damaged.
    """
    config = read_config(path)
    reference: Any = None
    try:  # whatever an architecture that doesn't fit the seam may do
        check_entries(name, path, config)
        if backend == "fms" and (problem := fms_backend.misfit(path, config)):
            return problem
        first = first_layers(config)
        reference = transformers_backend.load(name, path, first, torch.float32, some_layers=True)
        check_tied(name, reference, config)
        if reference._is_stateful:
            return "its state-space layers' cache can't drop tokens"
        # Two draws of tokens: that two experts score alike to within rounding happens in one, another computation in both.
        answers = [texts_alone(reference, seed, context_length(config)) for seed in (0, 1)]
        if backend == "fms":
            reference = None  # one of the two at a time
        model = seam.__new__(seam)
        model.open(name, path, first, backend, torch.float32, "cpu", reference)
        problem = difference(model, *answers[0]) and difference(model, *answers[1])
    except UserError:
        raise
    except Exception as error:
        problem = transformers_backend.first_line(error)
    if problem and backend == "transformers" and not getattr(reference, "_supports_attention_backend", True):
        return "its attention doesn't go through transformers' AttentionInterface, so it can't be held to a text or a tree"
    return problem


def check_entries(name: Path | str, path: Path, config: PretrainedConfig) -> None:
    """Refuse quantised weights of a model whose config doesn't say that they are, and more layers than tensors, before they are built."""
    entries = read_entries(path)
    if config.num_hidden_layers > len(entries):
        layers = f"its config.json asks for {config.num_hidden_layers} layers, and its files hold {len(entries)} tensors"
        raise UserError(f"base model {name}: {layers}; take both from one model")
    if getattr(config, "quantization_config", None) is None:
        for key, entry in entries.items():
            if key.endswith("weight") and entry.dtype not in FLOATS:
                raise UserError(f"base model {name}: tensor {key} is {entry.dtype}, and its config.json has no quantization_config")


def check_tied(name: Path | str, model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Refuse an lm_head that is there and not the embedding that the config says it is: `transformers` takes it, engines don't."""
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if config.tie_word_embeddings and model._tied_weights_keys and embedding is not output and not torch.equal(embedding, output):
        raise UserError(
            f"base model {name}: config.json ties lm_head and embedding, its files hold two that differ; set tie_word_embeddings: "
            "false or take the lm_head out of the files"
        )


def first_layers(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the first layers up to the last one of a new kind, at least two where there are two, with narrow windows."""
    with torch.device("meta"):
        layers = layer_stack(AutoModelForCausalLM.from_config(config, trust_remote_code=False), config.num_hidden_layers)
    listed = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == len(layers)}
    kinds = []
    for index, layer in enumerate(layers):
        shapes = sorted((key, tuple(value.shape)) for key, value in layer.state_dict().items())
        kinds.append(repr((shapes, [value[index] for value in listed.values()])))
    count = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    cut = copy.deepcopy(config)
    for key, value in listed.items():
        object.__setattr__(cut, key, value[:count])
    cut.num_hidden_layers = min(count, len(layers))
    if getattr(cut, "sliding_window", None):
        cut.sliding_window = min(cut.sliding_window, WINDOW)
    return cut


def layer_stack(model: nn.Module, count: int) -> nn.ModuleList:
    """The `nn.ModuleList` of a model's `count` layers."""
    stack = next((part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count), None)
    if stack is None:
        raise ValueError(f"{type(model).__name__} has no stack of its {count} layers")
    return stack


def texts_alone(
    model: PreTrainedModel, seed: int, context: int
) -> tuple[list[torch.Tensor], list[int], list[torch.Tensor], list[torch.Tensor]]:
    """(list of texts int64 [n], their first positions, the states [n, d], the logits [n, v]) of `transformers` by itself."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, lengths = model.get_input_embeddings().weight.shape[0], [min(length, context) for length in LENGTHS]
    texts = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
    starts = [0, (context - lengths[1]) // 2, context - lengths[2]]
    rows = pad_sequence(texts, batch_first=True)  # on the right, where no token of the text sees it
    positions = torch.tensor(starts)[:, None] + torch.arange(rows.shape[1])
    trunk = model.get_decoder()
    states: list[torch.Tensor] = []
    trunk.config._attn_implementation = "eager"
    hook = trunk.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    with torch.no_grad():
        logits = model(rows, position_ids=positions.clamp(max=context - 1), use_cache=False).logits
    hook.remove()
    cut = [[part[row, :length] for row, length in enumerate(lengths)] for part in (states[0], logits)]
    return texts, starts, cut[0], cut[1]


@torch.no_grad()
def difference(
    model: Any, texts: list[torch.Tensor], starts: Sequence[int], states: list[torch.Tensor], logits: list[torch.Tensor]
) -> str | None:
    """Where and by how much a `BaseModel` differs from `texts_alone`, in words; None where it doesn't."""
    lengths = [len(text) for text in texts]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(0, end - length, end) for end, length in zip(ends, lengths)]
    positions = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths)])
    packed = model.packed_states(torch.cat(texts)[None], positions[None], spans)[0]
    cached = on_cache(model, texts[0])
    for name, ours, theirs in [
        ("states of packed texts", packed, torch.cat(states)),
        ("states on a cache", cached, states[0]),
        ("logits", model.logits(packed), torch.cat(logits)),
    ]:
        if not theirs.isfinite().all():
            return f"transformers itself gives no finite {name}"
        off = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=TINY)).max().item()
        if not off <= TOLERANCE:  # NaN is none
            backend = "this code" if model.backend == "transformers" else "ibm-fms"
            return f"{backend} differs from transformers by {off:.1g} of the norm in the {name}"
    return None


def on_cache(model: Any, text: torch.Tensor) -> torch.Tensor:
    """States [n, d] of a text that is read onto a cache in three pieces, the second of them as one of a tree's two branches."""
    third = len(text) // 3
    cache, tree = model.new_cache(1, 2 * len(text)), Tree.full([2] + [1] * (third - 2), model.device)
    pieces = [model.extend(text[None, :third], cache)[0]]
    cache.hold([third])
    nodes = text[third + 1 : 2 * third].repeat_interleave(2)
    nodes[::2] = 0  # the branch that is not taken stands before the other, so that accepting moves entries
    states = model.extend(torch.cat([text[third : third + 1], nodes])[None], cache, tree)[0]
    path = [0, *range(2, 2 * third - 1, 2)]
    cache.accept([path])
    return torch.cat([*pieces, states[path], model.extend(text[None, 2 * third :], cache)[0]])
