"""The quickstart, stopped in the middle and started again: the whole way on the real small model, and that for chat on a tiny one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec

import pytest
from conftest import write_model, write_tokenizer
from test_chat_training import TEMPLATE
from test_house import ROOT
from transformers import LlamaForCausalLM

from data.reader import read_manifest, read_prompts
from pipelines import quickstart
from pipelines.machine.small_model import PACKAGE

pytestmark = pytest.mark.slow


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} carries the small base model; make test installs it")
def test_a_quickstart_stopped_in_training_goes_on_and_ends_with_a_lossless_report(tmp_path):
    out = tmp_path / "quickstart: a #2"  # which YAML would take for more than a name
    command = [sys.executable, "-m", "scripts.quickstart", f"--out_dir={out}", "--scale=0.05"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not list(out.glob("run/checkpoints/step-*7")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    parts = json.loads((out / "parts.json").read_text())
    assert set(parts["seconds"]) == {"base model", "data"} and parts["peak_memory_gb"] > 0

    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=os.environ | {"COLUMNS": "120"})
    assert second.returncode == 0, second.stderr[-3000:]
    assert "== data" not in second.stdout and "going on from step" in second.stdout
    report = json.loads((out / "report.json").read_text())
    names = {
        "acceptance_length", "acceptance_per_position", "chain_acceptance_length", "plain_tokens_per_s", "tokens_per_s", "speedup",
        "lossless", "prompt_lookup", "phase1_steps", "phase2_steps", "seconds_by_part",
    }  # fmt: skip
    assert names <= set(report) and all(name in second.stdout for name in names)
    assert report["lossless"] is True and report["differing"] == 0
    assert report["acceptance_length"] > 1.1, "even a twentieth of the budget learns something"
    assert report["phase1_steps"] > 2 * report["phase2_steps"] > 0
    parts = {name: seconds for name, seconds in report["seconds_by_part"].items() if not name.startswith("training: ")}
    within = sum(seconds for name, seconds in report["seconds_by_part"].items() if name.startswith("training: "))
    assert set(parts) == {"base model", "data", "training", "export", "evaluation"} and parts["training"] >= within * 0.999
    assert sum(parts.values()) == pytest.approx(report["seconds_in_all"])
    assert (out / "speculator/model.safetensors").is_file() and list((out / "run/continuations").glob("*.parquet"))


def write_chat_model(folder):
    """A tiny model with words enough for the shipped draft vocabulary, which ends its turns after some of them."""
    write_model(folder, vocab_size=4096, max_position_embeddings=2048)
    write_tokenizer(folder, words=4096)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[0] *= 2.5
    model.save_pretrained(folder)


def test_a_chat_quickstart_stopped_in_training_goes_on_from_conversations_of_its_own_and_ends_with_a_lossless_report_by_turn(
    tmp_path, monkeypatch, capsys
):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "unpack_small_model", lambda folder: folder.exists() or write_chat_model(folder))
    with monkeypatch.context() as first, pytest.raises(KeyboardInterrupt):
        first.setattr(quickstart, "train", stopped)
        quickstart.quickstart(tmp_path / "chat", 0.1, True)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("chat/[cd]*/**/*")}
    assert "== conversations" in capsys.readouterr().out

    quickstart.quickstart(tmp_path / "chat", 0.1, True)
    printed = capsys.readouterr().out
    assert "== conversations" not in printed and written == {path: path.stat().st_mtime_ns for path in written}
    conversations = [json.loads(line)["messages"] for line in (tmp_path / "chat/chats/conversations.jsonl").read_text().splitlines()]
    tables = read_manifest(tmp_path / "chat/data")["tables"]
    assert tables["prompts-held_out"]["rows"] == 4 and tables["prompts-train"]["rows"] == len(conversations) - 4
    assert {len(messages) for messages in conversations} == {2}

    report = json.loads((tmp_path / "chat/report.json").read_text())
    assert report["lossless"] is True and report["texts"] == 2 and report["phase1_steps"] == 90 and report["phase2_steps"] == 36
    turns = Counter(map(str, read_prompts(tmp_path / "chat/data", "held_out").turns[:2]))
    assert {turn: group["texts"] for turn, group in report["turns"].items()} == turns
    assert set(report["seconds_by_part"]) >= {"base model", "conversations", "data", "training", "export", "evaluation"}
    assert "prompt_lookup" in printed and (tmp_path / "chat/speculator/model.safetensors").is_file()
