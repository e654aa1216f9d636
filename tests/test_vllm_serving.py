"""Speculators of both families in the real vLLM, through the installed plugin; its engine runs in this process, so that it starts in seconds."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed (make install installs it)")

import torch
from conftest import chi_square, prompts_of, write_model
from openai import APIConnectionError, OpenAI
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams

from data.prepare import prepare
from data.prompts import Prompt
from data.reader import read_prompts
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.loading import load_for_decoding
from fms_spec.options import Options
from fms_spec.proposers import Step, TopKProposer
from fms_spec.sampling import Sampling
from fms_spec.vllm_plugin import TRIED, version_of
from pipelines.config import load_config
from pipelines.evaluate import evaluate, figures
from pipelines.export import export
from scripts.train import train

# vLLM's attention on a CPU takes heads from 32 coordinates on.
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
FAMILIES = {
    "hidden_state": "{family: hidden_state, n_predict: 3, width: 32, inner_dim: 64, draft_vocab_size: 64}",
    "mlp_tied": "{family: mlp, n_predict: 3, inner_dim: 48}",
    "mlp_untied": "{family: mlp, n_predict: 3, inner_dim: 48, tie_weights: false, scale_input: false}",
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base_model/, data/ with 64 documents, and a speculator of each family that knows what the base model says after them."""
    place = tmp_path_factory.mktemp("serving")
    write_model(place / "base_model", **SIZES)
    (place / "corpus").mkdir()
    for number, words in enumerate(prompts_of(*[40] * 64)):
        (place / "corpus" / f"{number}.txt").write_text(" ".join(f"w{word - 1}" for word in words.tolist()))
    prepare(source=str(place / "corpus"), tokenizer=str(place / "base_model"), out_dir=str(place / "data"), seq_length=64, prompt_length=8)
    for family, settings in FAMILIES.items():
        (place / "run.yaml").write_text(CONFIG.format(place=place, speculator=settings))
        train(load_config(place / "run.yaml"), place / f"run-{family}", resume=False)
        export(place / f"run-{family}", place / family)
    return place


@contextmanager
def serving(base_model, speculator=None, num_speculative_tokens=3, **settings):
    """An `LLM` in this process, with room for eight requests and less cache than eight long ones need."""
    speculative = speculator and {"method": "mlp_speculator", "model": str(speculator), "num_speculative_tokens": num_speculative_tokens}
    defaults = dict(
        dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=40, block_size=32,
        num_gpu_blocks_override=20, kv_cache_memory_bytes=10**8, disable_log_stats=False, distributed_executor_backend="uni",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(str(base_model), speculative_config=speculative, **defaults | settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def counters(llm):
    """{name: value} of vLLM's own counters."""
    return {metric.name.removeprefix("vllm:"): getattr(metric, "value", None) or getattr(metric, "values", None) for metric in llm.get_metrics()}


def answers(llm, prompts, params):
    """Token ids and finish reason of each prompt's answer."""
    outputs = llm.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], params, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason) for output in outputs]


def drafter_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter


@pytest.fixture(scope="module")
def prompts(place):
    """64 of unequal lengths: prompts that the speculators were trained on, with more or less of what the base model says after them."""
    base_model = BaseModel(str(place / "base_model"), dtype="float32")
    known = list(read_prompts(place / "data").tokens)
    texts, _ = decode(base_model, known, Options(max_new_tokens=40, ignore_eos=True))
    return [torch.cat([prompt, torch.tensor(text.tokens[: 7 * i % 40], dtype=torch.int64)]) for i, (prompt, text) in enumerate(zip(known, texts))]


@pytest.fixture(scope="module")
def plain(place, prompts):
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * i % 60, ignore_eos=i % 2 == 0) for i in range(len(prompts))]
    with serving(place / "base_model") as llm:
        return params, answers(llm, prompts, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_vllm_alone_and_acceptance_that_of_our_evaluation(place, prompts, plain, family):
    params, expected = plain
    base_model, _, proposer = load_for_decoding(str(place / "base_model"), place / family, dtype="float32")
    samples = evaluate(base_model, [Prompt(None, prompt) for prompt in prompts], {"plain": None, "speculator": proposer}, 32)
    ours = figures(samples, "speculator", 3)
    with serving(place / "base_model", place / family) as llm:
        assert answers(llm, prompts, params) == expected
        before = counters(llm)
        answers(llm, prompts, SamplingParams(temperature=0, max_tokens=32))
        after = counters(llm)
        assert after["num_preemptions"] > 0  # the cache was too small: requests were dropped and begun again
    drafts, accepted = (after[f"spec_decode_{name}"] - before[f"spec_decode_{name}"] for name in ("num_drafts", "num_accepted_tokens"))
    assert ours["acceptance_length"] > 1.1  # otherwise nothing is shown
    assert 1 + accepted / drafts == pytest.approx(ours["acceptance_length"], rel=0.02)


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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_published_speculator_drafts_in_vllm_what_the_formulas_and_our_own_family_draft(tmp_path, place, prompts, tied):
    tensors = write_published(tmp_path / "published", tied)
    _, own, _ = load_for_decoding(str(place / "base_model"), tmp_path / "published", dtype="float32")
    chain, seen = TopKProposer(own, [1, 1, 1]), []
    with serving(place / "base_model", tmp_path / "published") as llm:
        drafter = drafter_of(llm)
        propose = drafter.propose

        def watched(*arguments, **named):
            drafted = propose(*arguments, **named)
            rows = [row for row, tokens in enumerate(drafter.sampled) if tokens]
            newest = torch.tensor([drafter.sampled[row][-1] for row in rows], dtype=torch.int64)
            seen.append((named["target_hidden_states"][rows], newest, drafted[rows]))
            return drafted

        drafter.propose = watched
        answers(llm, prompts[:16], SamplingParams(temperature=0, max_tokens=12))
    states, newest, drafted = map(torch.cat, zip(*seen))
    assert len(states) > 100
    assert torch.equal(chain.propose(Step(states, newest, [])).tokens, drafted)
    assert [published_draft(tensors, *row, tied) for row in zip(states, newest)] == drafted.tolist()


@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=0.6, top_k=5)], ids=["T=1", "T=0.6, top-k 5"])
def test_sampled_output_has_the_base_models_own_distribution(tmp_path, settings):
    write_model(tmp_path / "base_model", **SIZES, vocab_size=8, initializer_range=0.1)
    write_published(tmp_path / "published", tied=True, vocabulary=8)
    model, prompt, count = BaseModel(str(tmp_path / "base_model"), dtype="float32"), torch.tensor([3, 5, 1]), 6000
    with serving(tmp_path / "base_model", tmp_path / "published", max_num_seqs=200, max_num_batched_tokens=2048) as llm:
        # Three tokens that count and the ones drafted after them; one prompt, and a batch that lets drafts be accepted and refused.
        found = answers(llm, [prompt] * count, SamplingParams(max_tokens=4, ignore_eos=True, seed=None, **settings))
        assert counters(llm)["spec_decode_num_accepted_tokens"] > count / 20
    sampling, every = Sampling(**settings), torch.cartesian_prod(*[torch.arange(8)] * 2)
    rows = torch.cat([prompt.expand(64, -1), every], dim=1)
    probabilities = sampling.probabilities(model.logits(model.hidden_states(rows, torch.zeros_like(rows)))).double()
    first, second = (probabilities[torch.arange(64), 2 + i, every[:, i]] for i in range(2))
    expected = (first * second)[:, None] * probabilities[:, 4]
    counts = torch.zeros(8, 8, 8)
    for tokens, _ in found:
        counts[tuple(tokens[:3])] += 1
    assert chi_square(counts, expected * count) < 5


def test_logprobs_stop_strings_structured_output_and_cached_prefixes_work_as_without_drafts(place, prompts):
    long = torch.cat(prompts[:5])[:180]  # read in chunks of 40 tokens, while others are decoded with drafts
    jobs = [
        (prompts[0], SamplingParams(temperature=0, max_tokens=20, logprobs=3)),
        (long, SamplingParams(temperature=0, max_tokens=30)),
        (long, SamplingParams(temperature=0, max_tokens=30)),
        (prompts[1], SamplingParams(temperature=0, max_tokens=1)),
        (prompts[2], SamplingParams(temperature=0, max_tokens=30, stop=["w7", "w30"], ignore_eos=True)),
        (prompts[3], SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(choice=["w5w9w7w8", "w3w2"]))),
        (prompts[4], SamplingParams(temperature=0, max_tokens=20, structured_outputs=StructuredOutputsParams(regex="(w1|w2|w3){12}"))),
        (prompts[5], SamplingParams(temperature=0, max_tokens=30, min_tokens=25)),
        (prompts[6], SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, frequency_penalty=0.4)),
    ]
    found = []
    for speculator in (None, place / "hidden_state"):
        with serving(place / "base_model", speculator, num_speculative_tokens=2) as llm:
            inputs = [{"prompt_token_ids": prompt.tolist()} for prompt, _ in jobs]
            outputs = [output.outputs[0] for _ in range(2) for output in llm.generate(inputs, [job for _, job in jobs], use_tqdm=False)]
            assert counters(llm)["prefix_cache_hits"] > 0
            if speculator:
                assert drafter_of(llm).chain.lookahead == 2 and counters(llm)["spec_decode_num_accepted_tokens"] > 0
        found.append([(list(output.token_ids), output.finish_reason, output.stop_reason, output.text) for output in outputs])
        found.append([[{token: entry.logprob for token, entry in place.items()} for place in outputs[0].logprobs]])
    assert found[2] == found[0]
    for ours, theirs in zip(found[3][0], found[1][0], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    structured = [text.replace(" ", "") for *_, text in found[2][5:7]]
    assert structured[0] in ("w5w9w7w8", "w3w2") and len(structured[1]) == 24


def configure(place, speculator, **settings):
    """The engine's whole configuration, as vLLM makes it before it loads anything."""
    speculative = {"method": "mlp_speculator", "model": str(speculator), "num_speculative_tokens": 3} | settings
    return EngineArgs(str(place / "base_model"), dtype="float32", speculative_config=speculative).create_engine_config()


def test_a_speculator_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, place):
    assert configure(place, place / "mlp_tied").speculative_config.method == "mlp_speculator"
    with pytest.raises(ValueError, match=r"num_speculative_tokens 6: speculator .*hidden_state has 3 heads; ask for at most as many"):
        configure(place, place / "hidden_state", num_speculative_tokens=6)
    write_model(tmp_path / "base_model", seed=1, **SIZES)
    with pytest.raises(ValueError, match="hidden_state was trained for .*base_model .fingerprint"):
        configure(tmp_path, place / "hidden_state")
    write_published(tmp_path / "published", tied=True, vocabulary=50)
    with pytest.raises(ValueError, match="fits a base model of width 64 and vocabulary 50, .* has 64 and 96"):
        configure(place, tmp_path / "published")


def test_other_methods_keep_vllms_own_drafters_and_untried_versions_are_left_alone_in_one_line(tmp_path):
    script = """
import fms_spec.vllm_plugin as plugin
from packaging.specifiers import SpecifierSet
plugin.TRIED = SpecifierSet({range!r})
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.config import SpeculativeConfig
print([hasattr(method, "fms_spec") for method in (GPUModelRunner.__init__, SpeculativeConfig.__post_init__)])
"""
    for versions, patched in ((str(TRIED), True), ("<0.1", False)):
        finished = subprocess.run([sys.executable, "-c", script.format(range=versions)], cwd=tmp_path, capture_output=True, text=True)
        assert finished.stdout.splitlines()[-1] == str([patched] * 2), finished.stderr
        said = [line for line in (finished.stdout + finished.stderr).splitlines() if "fms-spec serves speculators with vLLM" in line]
        assert len(said) == (0 if patched else 1)


def test_the_exported_cards_command_serves_eight_streaming_clients_over_http_and_stops_cleanly(place, prompts):
    card = (place / "hidden_state/README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("vllm serve")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).with_name("vllm")), *shlex.split(command)[1:]]
    if version_of("vllm") is None:  # the CPU build's own command looks for a package called vllm and doesn't start
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *shlex.split(command)[2:]]
    small = ["--dtype=float32", "--enforce-eager", "--max-model-len=256", "--max-num-seqs=4", "--kv-cache-memory-bytes=100000000"]
    base_model = BaseModel(str(place / "base_model"), dtype="float32")
    texts, _ = decode(base_model, prompts[:8], Options(max_new_tokens=30))
    tokenizer = AutoTokenizer.from_pretrained(place / "base_model")
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen([*words, "--host=127.0.0.1", f"--port={port}", *small], stdout=log, stderr=log, start_new_session=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wait_for(client, server, place / "server.log")

        def ask(prompt):
            parts = client.completions.create(
                model=str(place / "base_model"), prompt=prompt.tolist(), temperature=0, max_tokens=30, stream=True
            )  # fmt: skip
            return "".join(part.choices[0].text for part in parts)

        with ThreadPoolExecutor(8) as clients:
            answered = list(clients.map(ask, prompts[:8]))
        assert [text.strip() for text in answered] == [tokenizer.decode(text.tokens, skip_special_tokens=True) for text in texts]
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        assert re.search(r"spec_decode_num_accepted_tokens_total\{.*\} [1-9]", metrics)
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def wait_for(client, server, log):
    """Return when the server answers; fails with the end of its log where it ends first."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return client.models.list()
        except APIConnectionError:
            time.sleep(0.5)
    pytest.fail("the server didn't come up: " + log.read_text()[-3000:])
