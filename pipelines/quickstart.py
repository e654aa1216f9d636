"""The whole way on one machine with a small real model: prepare, train, export, measure.

The text is Python's own sources, or chats: conversations that the base model writes itself.
"""

import json
import resource
from functools import partial
from pathlib import Path

from data.prepare.python_sources import copy_python_sources
from data.prepare.run import prepare
from data.prompts import load_prompts
from data.reader import read_manifest
from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError
from fms_spec.files import OWNER, owned, read_json, write_json
from fms_spec.loading import load_for_decoding
from fms_spec.timing import timed
from pipelines.config import BaseModelSection, GenerationSection, load_config
from pipelines.export import export
from pipelines.generate.conversations import CONVERSATIONS, write_conversations
from pipelines.machine.environment import environment
from pipelines.machine.small_model import unpack_small_model
from pipelines.measure.figures import losslessness, numbers, summary
from pipelines.measure.samples import decode_in_turn, settle, usual_methods
from pipelines.measure.suggestion import chain_acceptance, greedy_texts
from pipelines.plan.devices import faster_dtype
from pipelines.show.console import GROUPS, print_groups, print_values
from pipelines.train.checkpoint import newest_checkpoint, read_progress
from pipelines.train.run import train

CONFIGS = Path(__file__).parent / "configs"
ROW_TOKENS = 512  # rows of one document each, mostly: short enough that attention costs little, longer than any evaluated context
CHAT_ROW_TOKENS = 1024  # a question with its answer has at most some 600: it stands whole in its row
CHATS, TURN_TOKENS = 160, 512  # written, of which about a fifth are lost: of 63 answers 14 had no end within 512 tokens
HELD_OUT = 40  # documents that no training step sees: those evaluated, and validation's 16
SHAPE = DraftShape(min_probability=0.1, lookup=10)  # chosen on prompts that are in no split
PROMPTS, NEW_TOKENS = 24, 64  # evaluated: one prompt a held-out document


def read_or_none(path):
    """The JSON value in a file, None where there is none that can be read."""
    try:
        return read_json(path, "")
    except UserError:
        return None


class Parts:
    """Runs each part once, and remembers over restarts which are done, how many seconds they took, and the most memory any start took."""

    def __init__(self, path):
        self.path, known = path, read_or_none(path)
        whole = isinstance(known, dict) and {"seconds", "peak_memory_gb"} <= known.keys()
        # Parts that are done end at once: only their figures are lost.
        self.seconds, self.peak = (known["seconds"], known["peak_memory_gb"]) if whole else ({}, 0.0)

    def run(self, name, work):
        if name not in self.seconds:
            print(f"== {name}", flush=True)
            _, self.seconds[name] = timed(work)
            self.peak = max(self.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)  # Linux counts in KiB
            write_json(self.path, {"seconds": self.seconds, "peak_memory_gb": self.peak})


def quickstart(out, scale, chat):
    """Go the whole way in the folder `out` (Path), or what is left of it. chat: with conversations for text.

    Raises:
        UserError: a scale that isn't over 0 and at most 1, or a folder that holds something else.
    """
    if not 0 < scale <= 1:
        raise UserError(f"--scale={scale}: must be over 0 and at most 1")
    with owned(out):
        go_through(out, scale, chat, claim(out, scale, chat))


def go_through(out, scale, chat, dtype):
    parts = Parts(out / "parts.json")
    parts.run("base model", lambda: unpack_small_model(out / "base_model"))
    if chat:
        parts.run("conversations", lambda: write_chats(out, scale, dtype))
    parts.run("data", lambda: prepare_data(out, scale, chat))
    config = scaled_config(out, scale, chat, dtype)
    parts.run("training", lambda: train(config, out / "run", resume=True))
    parts.run("export", lambda: (out / "speculator").exists() or export(out / "run", out / "speculator"))
    if not isinstance(read_or_none(out / "evaluation.json"), dict):
        parts.seconds.pop("evaluation", None)
    parts.run("evaluation", lambda: measure(out, scale))
    write_report(out, config, parts.seconds, parts.peak)


def claim(out, scale, chat):
    """Refuse an out_dir that holds something else, or another quickstart; returns the dtype the base model trains in."""
    record = out / "quickstart.json"
    if not any(path.name not in (record.name, OWNER) for path in out.iterdir()):  # nothing yet that an older one would say something of
        write_json(record, {"scale": scale, "chat": chat, "dtype": faster_dtype()})
    if not record.is_file():
        raise UserError(f"{out} holds other files; give an empty or new --out_dir")
    values = read_or_none(record)
    if not isinstance(values, dict) or not {"scale", "chat", "dtype"} <= values.keys():
        raise UserError(f"{record}: can't be read, it may be damaged; give another --out_dir")
    if (values["scale"], values["chat"]) != (scale, chat):
        flags = f"--scale={values['scale']} --chat={values['chat']}"
        raise UserError(f"{out} holds a quickstart with {flags}; give those to go on, or another --out_dir")
    return values["dtype"]


def scaled(count, scale, least):
    """A share of the budget's `count`, `least` at the smallest."""
    return max(least, round(count * scale))


def scaled_config(out, scale, chat, dtype):
    """The shipped config with this run's paths and dtype, and with its budget scaled; no step reads more than is prepared."""
    path = CONFIGS / ("quickstart_chat.yaml" if chat else "quickstart.yaml")
    own = {"base_model.name": str(out / "base_model"), "data.dir": str(out / "data"), "base_model.dtype": dtype}
    overrides = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    full, tables = load_config(path, overrides), read_manifest(out / "data")["tables"]
    rows, prompts = (tables[name]["rows"] for name in ("rows-train", "prompts-train"))
    smaller = {
        "schedule.steps": scaled(full.schedule.steps, scale, 7),
        "phase1.batch_size": min(full.phase1.batch_size, rows),
        "phase2.batch_size": min(full.phase2.batch_size, prompts),
        "data.rows": full.data.rows and scaled(full.data.rows, scale, full.phase1.batch_size),  # None reads all
        "data.prompts": full.data.prompts and scaled(full.data.prompts, scale, full.phase2.batch_size),
        "generation.batch_size": scaled(full.generation.batch_size, scale, full.phase2.batch_size),
        "validation.every": scaled(full.validation.every, scale, 7),
        "validation.prompts": scaled(full.validation.prompts, scale, 2),
        "checkpoint.every": scaled(full.checkpoint.every, scale, 7),
    }
    return load_config(path, overrides + [f"{key}={json.dumps(value)}" for key, value in smaller.items()])


def write_chats(out, scale, dtype):
    """Have the base model write the conversations, all of a turn together."""
    count = scaled(CHATS, scale, 16)
    settings = GenerationSection(batch_size=count, max_new_tokens=TURN_TOKENS)
    base_model = BaseModelSection(name=str(out / "base_model"), dtype=dtype)
    write_conversations(base_model, settings, out / "chats", conversations=count)


def prepare_data(out, scale, chat):
    if chat:
        source, row_tokens = out / "chats" / CONVERSATIONS, CHAT_ROW_TOKENS
    else:
        source, row_tokens = out / "corpus", ROW_TOKENS
        print(f"{copy_python_sources(source)} Python files")
    tokenizer, held_out = str(out / "base_model"), scaled(HELD_OUT, scale, 4)
    prepare(source=str(source), tokenizer=tokenizer, out_dir=str(out / "data"), seq_length=row_tokens, held_out=held_out)


def measure(out, scale):
    """Decode held-out prompts; the result waits in evaluation.json for the report."""
    load = partial(load_for_decoding, str(out / "base_model"), out / "speculator", SHAPE)
    prompts = load_prompts(out / "data", out / "base_model", scaled(PROMPTS, scale, 2))
    samples, values = decode_prompts(load, prompts)
    samples, _ = settle(samples, [], load, NEW_TOKENS)
    write_json(out / "evaluation.json", values | losslessness(samples, prompts))


def decode_prompts(load, prompts):
    """(samples, their figures); the models are let go of on return."""
    base_model, speculator, proposer = load()
    samples = decode_in_turn(base_model, prompts, usual_methods(proposer), NEW_TOKENS)
    chain = chain_acceptance(speculator, greedy_texts(base_model, samples, speculator.n_predict))
    return samples, summary(samples, proposer) | chain


def write_report(out, config, seconds, peak):
    """Write report.json and print it as a table."""
    progress = read_progress(newest_checkpoint(out / "run/checkpoints"))
    steps = config.schedule.build().phase_steps()
    # A run that was stopped and resumed took longer than its last start; the checkpoints carry the seconds of all of them.
    seconds = seconds | {"training": max(seconds["training"], sum(progress["seconds"].values()))}
    values = read_or_none(out / "evaluation.json") | {
        "phase1_steps": steps["phase1"],
        "phase2_steps": steps["phase2"],
        "seconds_by_part": seconds | {f"training: {part}": spent for part, spent in progress["seconds"].items()},
        "seconds_in_all": sum(seconds.values()),
        "peak_memory_gb": peak,
    }
    write_json(out / "report.json", numbers(values | {"environment": environment()}), allow_nan=False)
    print_values({name: value for name, value in values.items() if name not in GROUPS}, str(out / "report.json"))
    print_groups(values)
