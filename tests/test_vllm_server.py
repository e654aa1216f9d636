"""What a user of `vllm serve` meets: refusals before anything is loaded, versions, and the HTTP server itself."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import need_vllm

need_vllm()

from conftest import write_model
from openai import APIConnectionError, OpenAI
from test_house import ROOT
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import interfaces
from vllm_helpers import SIZES, write_published

from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.options import DecodingOptions
from fms_spec.vllm.versions import TRIED, version_of


def configure(place, speculator, **settings):
    """The engine's whole configuration, as vLLM makes it before it loads anything."""
    speculative = {"model": str(speculator), "num_speculative_tokens": 3} | settings
    return EngineArgs(str(place / "base_model"), dtype="float32", speculative_config=speculative).create_engine_config()


def test_a_speculator_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, served, monkeypatch):
    for settings in ({}, {"method": "mlp_speculator"}):
        assert configure(served, served / "mlp_tied", **settings).speculative_config.method == "eagle"
    with pytest.raises(ValueError, match=r"num_speculative_tokens 6: speculator .*hidden_state has 3 heads; ask for at most as many"):
        configure(served, served / "hidden_state", num_speculative_tokens=6)
    assert configure(served, served / "layers").speculative_config.method == "eagle3"
    with monkeypatch.context() as patch:
        patch.setattr(interfaces, "supports_eagle3", lambda target: False)
        with pytest.raises(
            ValueError, match=r"speculator .*layers reads inner layers \(speculator.base_layers\), and vLLM's LlamaForCausalLM"
        ):
            configure(served, served / "layers")
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1: vLLM's V2 runner doesn't draft in one pass, .* unset it"):
            configure(served, served / "pointer")
    with pytest.raises(ValueError, match="draft_sample_method probabilistic: attached heads draft their best tokens; leave it out"):
        configure(served, served / "pointer", draft_sample_method="probabilistic")
    write_model(tmp_path / "base_model", seed=1, **SIZES)
    with pytest.raises(ValueError, match="hidden_state was trained for .*base_model .fingerprint"):
        configure(tmp_path, served / "hidden_state")
    write_published(tmp_path / "published", tied=True, vocabulary=50)
    with pytest.raises(ValueError, match="fits a base model of width 64 and vocabulary 50, .* has 64 and 96"):
        configure(served, tmp_path / "published")
    altered = shutil.copytree(served / "hidden_state", tmp_path / "altered") / "model.safetensors"
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    with pytest.raises(ValueError, match=f"speculator weights {altered}: altered since the export"):
        configure(served, altered.parent)


def test_other_methods_keep_vllms_own_drafters_and_untried_versions_are_left_alone_in_one_line(tmp_path):
    script = """
import fms_spec.vllm.versions as versions
from packaging.specifiers import SpecifierSet
versions.TRIED = SpecifierSet({range!r})
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import SpeculativeConfig
print(hasattr(SpeculativeConfig.__init__, "fms_spec"))
"""
    for versions, patched in ((str(TRIED), True), ("<0.1", False)):
        finished = subprocess.run([sys.executable, "-c", script.format(range=versions)], cwd=tmp_path, capture_output=True, text=True)
        assert finished.stdout.splitlines()[-1] == str(patched), finished.stderr
        said = [line for line in (finished.stdout + finished.stderr).splitlines() if "fms-spec serves speculators with vLLM" in line]
        assert len(said) == (0 if patched else 1)


def test_the_exported_cards_command_serves_eight_streaming_clients_over_http_and_stops_cleanly(served, prompts):
    card = (served / "hidden_state/README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("vllm serve")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).with_name("vllm")), *shlex.split(command)[1:]]
    if version_of("vllm") is None:  # the CPU build's own command looks for a package called vllm and doesn't start
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *shlex.split(command)[2:]]
    small = ["--dtype=float32", "--enforce-eager", "--max-model-len=256", "--max-num-seqs=4", "--kv-cache-memory-bytes=100000000"]
    base_model = BaseModel(str(served / "base_model"), dtype="float32")
    texts, _ = decode(base_model, prompts[:8], DecodingOptions(max_new_tokens=30))
    tokenizer = AutoTokenizer.from_pretrained(served / "base_model")
    with (served / "server.log").open("w") as log:
        server = subprocess.Popen([*words, f"--port={port}", *small], stdout=log, stderr=log, start_new_session=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wait_for(client, server, served / "server.log")

        def ask(prompt):
            parts = client.completions.create(
                model=str(served / "base_model"), prompt=prompt.tolist(), temperature=0, max_tokens=30, stream=True
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


def test_the_benchmark_compares_the_speculator_with_plain_decoding_and_ngram_and_counts_acceptance_both_ways(served, tmp_path):
    lines = "".join(json.dumps({"prompt": f"w{number} w{number + 1} w{number + 2}"}) + "\n" for number in range(3))
    (tmp_path / "prompts.jsonl").write_text(lines)
    words = ["scripts.benchmark", "serving", f"--base_model={served / 'base_model'}", f"--speculator={served / 'mlp_tied'}"]
    words += [f"--prompts={tmp_path / 'prompts.jsonl'}", "--max_new_tokens=12", "--dtype=float32", f"--out={tmp_path / 'speed.jsonl'}"]
    finished = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    plain, ngram, speculator = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["way"] for line in (plain, ngram, speculator)] == ["plain", "ngram", "speculator"]
    assert plain["speedup"] == 1 and plain["texts"] == speculator["texts"] == {"equal": 3, "parted": 0}
    assert speculator["acceptance_length"] >= 1 and speculator["our_acceptance_length"] >= 1
    assert "acceptance_length" not in ngram
