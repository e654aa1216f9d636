"""A small served model with speculators that know its texts, and vLLM running in the tests' own process, where it starts in seconds."""

import json
from contextlib import contextmanager

import pytest
import torch
from conftest import prompts_of, write_model
from safetensors.torch import save_file
from torch.nn import functional as F

from data.prepare.run import prepare
from data.reader import read_prompts
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.options import DecodingOptions
from fms_spec.speculators.directory import read_speculator_config, speculative_config
from pipelines.config import load_config
from pipelines.export import export
from pipelines.train.run import train

# vLLM's attention on a CPU takes heads from 32 coordinates on.
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
FAMILIES = {
    "hidden_state": "{family: hidden_state, n_predict: 3, width: 32, inner_dim: 64, draft_vocab_size: 64}",
    "mlp_tied": "{family: mlp, n_predict: 3, inner_dim: 48}",
    "mlp_untied": "{family: mlp, n_predict: 3, inner_dim: 48, tie_weights: false, scale_input: false, pointer: {width: 16}}",
    "pointer": "{family: hidden_state, n_predict: 3, width: 32, inner_dim: 64, draft_vocab_size: 32, pointer: {width: 16}}",
    "medusa": "{family: medusa, n_predict: 3}",
    "eagle3": "{family: eagle3, n_predict: 3, draft_vocab_size: 64, base_layers: [0, 1, 2]}",
    "eagle3_deep": "{family: eagle3, n_predict: 3, layers: 2, draft_vocab_size: 64, base_layers: [0, 1, 2], init: last_layers}",
    "layers": "{family: hidden_state, n_predict: 3, width: 32, inner_dim: 64, draft_vocab_size: 64, base_layers: [1], pointer: {width: 8}}",
}
CONFIG = """
base_model: {{name: {place}/base_model, dtype: float32}}
speculator: {speculator}
data: {{dir: {place}/data, continuations: {place}/continuations}}
schedule: {{steps: 120, pattern: [[phase2, 1]]}}
phase1: {{batch_size: 4, loss: {{cross_entropy: 1.0}}}}
phase2: {{batch_size: 16, loss: {{cross_entropy: 1.0}}}}
generation: {{batch_size: 64, max_new_tokens: 60, temperature: 0.0, top_k: 0}}
optimizer: {{lr: 0.01}}
validation: {{prompts: 0}}
checkpoint: {{every: 120}}
"""


def make_place(place, families=FAMILIES, write=lambda directory: write_model(directory, **SIZES)):
    """Write base_model/, data/ with 64 documents, and a speculator of each family that knows what the base model says after them.

    write: writes the base model.
    """
    write(place / "base_model")
    (place / "corpus").mkdir()
    for number, words in enumerate(prompts_of(*[40] * 64)):
        (place / "corpus" / f"{number}.txt").write_text(" ".join(f"w{word - 1}" for word in words.tolist()))
    prepare(source=str(place / "corpus"), tokenizer=str(place / "base_model"), out_dir=str(place / "data"), seq_length=64, prompt_length=8)
    for family in families:
        settings = FAMILIES[family]
        (place / "run.yaml").write_text(CONFIG.format(place=place, speculator=settings))
        train(load_config(place / "run.yaml"), place / f"run-{family}", resume=False)
        export(place / f"run-{family}", place / family)


def served_prompts(place):
    """64 of unequal lengths: prompts that the speculators were trained on, with more or less of what the base model says after them."""
    base_model = BaseModel(str(place / "base_model"), dtype="float32")
    known = list(read_prompts(place / "data").tokens)
    texts, _ = decode(base_model, known, DecodingOptions(max_new_tokens=40, ignore_eos=True))
    return [
        torch.cat([prompt, torch.tensor(text.tokens[: 7 * i % 40], dtype=torch.int64)])
        for i, (prompt, text) in enumerate(zip(known, texts))
    ]


@contextmanager
def serving(base_model, speculator=None, num_speculative_tokens=3, **settings):
    """An `LLM` in this process, with room for eight requests and less cache than eight long ones need."""
    speculative = speculator and speculative_config(speculator, read_speculator_config(speculator), num_speculative_tokens)
    defaults = dict(
        dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=56, block_size=32,
        num_gpu_blocks_override=20, kv_cache_memory_bytes=10**8, disable_log_stats=False, distributed_executor_backend="uni",
    )  # fmt: skip
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()  # groups that an engine of another test left would be taken, which fit other models
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(str(base_model), speculative_config=speculative, **defaults | settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def counters(llm):
    """{name: value} of vLLM's own counters."""
    return {
        metric.name.removeprefix("vllm:"): getattr(metric, "value", None) or getattr(metric, "values", None) for metric in llm.get_metrics()
    }


def answers(llm, prompts, params):
    """Token ids and finish reason of each prompt's answer."""
    outputs = llm.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], params, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason) for output in outputs]


def drafter_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter


def write_published(directory, tied, heads=3, width=64, inner=24, vocabulary=96):
    """An MLP speculator directory in the published layout, made of random numbers; returns its tensors as fp64 without the prefix."""
    torch.manual_seed(5)
    tensors = {}
    for i in range(heads):
        shapes = {"emb": (vocabulary, inner), "proj": (inner, width if i == 0 else inner), "head": (vocabulary, inner)}
        tensors |= {f"{part}.{i}.weight": torch.randn(shape) / inner**0.5 for part, shape in shapes.items()}
        tensors |= {f"ln.{i}.weight": torch.rand(inner) + 0.5, f"ln.{i}.bias": torch.randn(inner) / 5}
    if tied:  # the published tied files repeat the shared tensors
        for name in list(tensors):
            part, i, kind = name.split(".")
            tensors[name] = tensors[f"{part}.{min(int(i), 1) if part == 'proj' else 0}.{kind}"].clone()
    directory.mkdir()
    save_file({f"speculator.{name}": value for name, value in tensors.items()}, directory / "model.safetensors")
    config = {
        "model_type": "mlp_speculator", "architectures": ["MLPSpeculatorPreTrainedModel"], "base_model_name_or_path": "somebody/base",
        "emb_dim": width, "inner_dim": inner, "vocab_size": vocabulary, "n_predict": heads, "n_candidates": 5,
        "top_k_tokens_per_head": [4, 3, 2], "tie_weights": tied, "scale_input": tied,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return {name: value.double() for name, value in tensors.items()}


def published_draft(tensors, hidden, token, tied, heads=3):
    """What the published formulas draft after one state [d] and token; list of ints."""
    norm = lambda x: x / torch.sqrt((x * x).mean() + 1e-6)  # noqa: E731
    inner = len(tensors["ln.0.weight"])
    state_weight = 0.5 ** (0.5 / heads)
    token_weight = ((1 - state_weight**2) * inner / 2) ** 0.5
    state, drafted = norm(hidden.double()) / 2**0.5 if tied else hidden.double(), []
    for i in range(heads):
        own = {name.rsplit(".", 2)[0] + name[name.rindex(".") :]: value for name, value in tensors.items() if f".{i}." in name}
        mixed = own["proj.weight"] @ state + token_weight / state_weight * own["emb.weight"][token]
        state = F.gelu(own["ln.weight"] * norm(mixed) + own["ln.bias"])
        token = int((own["head.weight"] @ state).argmax())
        drafted.append(token)
    return drafted
