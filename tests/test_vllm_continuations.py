"""Continuations written by the real vLLM, in processes of its own."""

import json
import subprocess
import sys

import pytest
from conftest import need_vllm

need_vllm()

import psutil
import pyarrow.parquet as pq
import torch
from conftest import prompts_of, write_model
from forked import run
from test_chat_training import TEMPLATE
from test_house import ROOT

from data.prepare.run import prepare
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.errors import UserError
from fms_spec.options import DecodingOptions
from pipelines.config import GenerationSection, load_config
from pipelines.generate.vllm_engine import VLLMEngine
from pipelines.train.run import train

SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)  # heads of 32: vLLM's least on a CPU


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus_dir):
    place = tmp_path_factory.mktemp("vllm")
    write_model(place / "base_model", **SIZES)
    prepare(source=str(corpus_dir), tokenizer=str(place / "base_model"), out_dir=str(place / "data"), seq_length=64, prompt_length=8)
    return place


def start(*words):
    """A command in a process of its own, as vLLM needs it."""
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)


def rows(directory):
    table = pq.read_table(sorted(directory.glob("*.parquet")))
    return [table.column(name).to_pylist() for name in ("prompt_id", "prompt", "continuation", "finish_reason")]


def test_vllm_writes_the_greedy_rows_of_the_embedded_engine_and_they_train_phase_2(place):
    for engine in ("vllm", "embedded"):
        words = [
            "scripts.generate_continuations",
            f"--base_model={place / 'base_model'}",
            f"--prompts={place / 'data'}",
            f"--engine={engine}",
        ]
        words += [f"--out_dir={place / engine}", "--max_tokens=40", "--temperature=0", "--top_k=0", "--shard_prompts=5", "--dtype=float32"]
        finished = run(*words) if engine == "embedded" else start(*words)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "is complete" in finished.stdout and "tokens/s" in finished.stdout
    assert rows(place / "vllm") == rows(place / "embedded") and set(rows(place / "vllm")[3]) == {"stop", "length"}
    (place / "run.yaml").write_text(f"""
base_model: {{name: {place / "base_model"}, dtype: float32}}
speculator: {{family: hidden_state, n_predict: 2, width: 16, inner_dim: 24, draft_vocab_size: 64}}
data: {{dir: {place / "data"}, continuations: {place / "vllm"}}}
schedule: {{steps: 14}}
phase1: {{batch_size: 4, loss: {{cross_entropy: 1.0}}}}
phase2: {{batch_size: 5, loss: {{cross_entropy: 1.0}}}}
generation: {{engine: vllm, mode: ahead, batch_size: 5, max_new_tokens: 40, temperature: 0.0, top_k: 0}}
validation: {{prompts: 0}}
""")
    train(load_config(place / "run.yaml"), place / "run", resume=False)
    assert (place / "run/checkpoints/step-00000014").is_dir()


def test_vllm_writes_the_greedy_answers_of_the_embedded_engine_turn_by_turn(place):
    (place / "chat.jinja").write_text(TEMPLATE)
    texts = [" ".join(f"w{number}" for number in prompt.tolist()) for prompt in prompts_of(*range(2, 22), words=90)]
    conversations = [[{"role": "user", "content": text}, {"role": "assistant"}] * 2 for text in texts]
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))
    for engine in ("vllm", "embedded"):
        words = ["scripts.generate_conversations", f"--base_model={place / 'base_model'}", f"--source={place / 'chats.jsonl'}"]
        words += [f"--out_dir={place / 'chats' / engine}", f"--engine={engine}", f"--chat_template={place / 'chat.jinja'}"]
        words += ["--max_tokens=40", "--temperature=0", "--top_k=0", "--shard_prompts=5", "--dtype=float32"]
        finished = run(*words) if engine == "embedded" else start(*words)
        assert finished.returncode == 0, finished.stderr[-3000:]
    vllm, embedded = ((place / "chats" / engine) for engine in ("vllm", "embedded"))
    assert (vllm / "conversations.jsonl").read_bytes() == (embedded / "conversations.jsonl").read_bytes()
    for turn in ("turn-00", "turn-01"):
        assert rows(vllm / turn) == rows(embedded / turn)
    assert not (vllm / "turn-02").exists()


def test_an_engine_that_is_killed_is_started_again_and_no_row_is_lost(place, capfd):
    settings = GenerationSection(max_new_tokens=120, temperature=0.0, top_k=0)
    prompts = torch.stack(prompts_of(*[8] * 40))
    engine = VLLMEngine(str(place / "base_model"), settings, 8, seed=2**31, dtype="float32")
    try:
        for index in range(2):
            engine.submit(index, prompts[20 * index : 20 * index + 20])
        engine.step()
        (core,) = [child for child in psutil.Process().children() if "EngineCore" in " ".join(child.cmdline())]
        core.kill()
        found = {}
        while not engine.idle:
            found |= {index: (tokens, reasons) for index, tokens, reasons in engine.step()}
    finally:
        engine.close()
    expected, _ = decode(BaseModel(str(place / "base_model"), dtype="float32"), list(prompts), DecodingOptions(max_new_tokens=120))
    assert [row.tolist() for index in range(2) for row in found[index][0]] == [text.tokens for text in expected]
    assert [reason for index in range(2) for reason in found[index][1]] == [text.finish_reason for text in expected]
    assert "vLLM died" in capfd.readouterr().err


def test_an_engine_that_cannot_run_the_model_is_started_once_and_ends_the_run_with_a_line(tmp_path, config_file):
    config = config_file(**{"generation.engine": "vllm", "generation.mode": "alongside"})  # heads of 8
    with pytest.raises(UserError, match="producer 0: vLLM died in its first step; its log above says why; its log is .*producer-0.log"):
        train(config, tmp_path / "run", resume=False)
    log = (tmp_path / "run/producers/producer-0.log").read_text()
    assert "head_dim=8" in log and "starting it again" not in log and log.count("error: vLLM") == 1


def test_the_benchmark_puts_all_ways_side_by_side_at_each_batch(place, tmp_path):
    words = ["scripts.benchmark", "continuations", f"--base_model={place / 'base_model'}", f"--prompts={place / 'data'}"]
    words += ["--max_tokens=4", "--dtype=float32", f"--out={tmp_path / 'speed.jsonl'}"]
    finished = start(*words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [1, 4, 16, 48, 96]
    for line in lines:
        assert set(line["tokens_per_s"]) == {"embedded", "transformers", "vllm", "vllm_offline"}
        assert 0 < line["vllm_wrapper_share"] < 1 and line["embedded_over_transformers"] > 0
