"""Conversations that the base model writes, or whose answers it writes anew, turn by turn."""

import re
from collections import Counter
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data.continuations.shard import read_made_by
from data.continuations.store import ContinuationStore
from data.continuations.turns import Turns, as_json, own_dialogues, rewritten
from data.manifest import MANIFEST
from data.parquet import shard_entry
from data.prepare.chat import ChatTemplate
from data.prepare.rows import Wanted, check_format
from data.prepare.sources import open_source
from data.reader import Prompts
from data.tokenizer import load_tokenizer, refuse_unknown
from fms_spec.errors import UserError
from fms_spec.files import write_json, write_whole
from fms_spec.model_config import context_length, read_config, resolve_base_model
from fms_spec.seeds import mixed
from fms_spec.weights import fingerprint
from pipelines.generate.engines import describe_generation
from pipelines.generate.supply import check_stops
from pipelines.generate.write import Writer
from pipelines.machine.environment import environment

CONVERSATIONS = "conversations.jsonl"
OURS = re.compile(rf"turn-\d+|{CONVERSATIONS}|{MANIFEST}|\..*")


def write_conversations(
    base_model, settings, out_dir, *, source=None, conversations=None, questions=1, format=None, chat_template=None, seed=0
):
    """Write all turns that are missing, and then the conversations that came of them, `CONVERSATIONS` in `out_dir`.

    base_model: `BaseModelSection`. settings: `GenerationSection`. The rest: flags of scripts.generate_conversations.
    """
    out_dir, path = checked_folder(out_dir), resolve_base_model(base_model.name)
    tokenizer = load_tokenizer(str(path))
    template = ChatTemplate(tokenizer, chat_template)
    template.date = date_of(out_dir) or template.date
    dialogues = dialogues_of(source, conversations, questions, format, seed)
    turns = Turns(template, ["assistant"] if source else ["user", "assistant"])
    turns.ends["assistant"] |= check_stops(turns.ends["assistant"], path, tokenizer)
    room = context_length(read_config(path)) - settings.max_new_tokens
    longest = min(room, max(turns.longest_prompt(dialogue, settings.max_new_tokens) for dialogue in dialogues))
    made_by = describe_generation(settings, fingerprint(path), base_model.dtype) | {"conversations": len(dialogues)}
    made_by |= {"chat_template": template.sha256} | ({"date": template.date.isoformat()} if template.date else {})
    written = []  # the manifest of each turn's store
    with Writer(settings, base_model, longest) as writer:
        while len(prompts := prompts_of(dialogues, turns, longest)):
            refuse_unknown(torch.cat(prompts.tokens), tokenizer.embedding_size, tokenizer.backend, "conversations")
            folder, seed = out_dir / f"turn-{len(written):02d}", mixed(seed, len(written))
            store = ContinuationStore(folder, prompts, shard_prompts=settings.batch_size, settings=made_by, seed=seed)
            writer.write(store, range(store.shard_count))
            written.append(store.finish(environment()))
            take_all(store, dialogues, turns)
    finish(out_dir, dialogues, written)


def checked_folder(name):
    """`out_dir` as a path, refused where it holds anything that isn't ours."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out_dir {name}: is a file; give a folder")
    foreign = sorted(entry.name for entry in folder.iterdir() if not OURS.fullmatch(entry.name)) if folder.exists() else []
    if foreign:
        raise UserError(f"out_dir {name}: holds other files ({foreign[0]}); give an empty or new --out_dir")
    return folder


def date_of(out_dir):
    """The date that templates which ask for it were given when the folder was begun, None where there is none."""
    shard = next(out_dir.glob("turn-00/continuations-*.parquet"), None)
    day = read_made_by(shard).get("date") if shard else None
    return day and date.fromisoformat(day)


def dialogues_of(source, conversations, questions, format, seed):
    """The `Dialogue`s that the flags ask for."""
    if source is None:
        if conversations is None:
            raise UserError("--conversations is required where there is no --source: say how many the base model is to write")
        return own_dialogues(conversations, questions)
    if questions != 1:
        raise UserError(f"--questions={questions}: --source={source} has its own; leave one of the two out")
    check_format(format, "text")
    opened = open_source(source, Wanted(format=format))
    if not opened.conversations:
        raise UserError(f"source {source}: holds texts, and only conversations have answers to write anew")
    documents = islice(opened.documents(np.random.default_rng(seed)), conversations)
    dialogues = [rewritten(document.content) for document in documents]
    if all(dialogue.next is None for dialogue in dialogues):
        raise UserError(f"source {source}: no answer is to be written in any of {len(dialogues)} conversations")
    return dialogues


def prompts_of(dialogues, turns, longest):
    """`Prompts` for the next turn of all dialogues that go on; those that can't are ended."""
    found = {}
    for number, dialogue in enumerate(dialogues):
        if dialogue.next is None:
            continue
        ids = turns.prompt(dialogue)
        if ids is None:
            dialogue.ended = "refused by the chat template"
        elif len(ids) > longest:
            dialogue.ended = "over the base model's context"
        else:
            found[number] = torch.tensor(ids)
    unknown = [None] * len(found)
    return Prompts([*found.values()], torch.tensor([*found], dtype=torch.int64), [*map(str, found)], unknown, unknown, unknown)


def take_all(store, dialogues, turns):
    """Put what a store holds into the dialogues that its prompts were of."""
    said = {number: tokens for index in range(store.shard_count) for number, _, tokens, _ in store.rows(index)}
    for number in sorted(said):
        turns.take(dialogues[number], said[number].tolist())


def finish(out_dir, dialogues, written):
    """Write what is whole of the dialogues as a source of conversations, and a manifest of what was left out, and say so.

    written: the manifest of each turn's store.
    """
    kept = [dialogue for dialogue in dialogues if dialogue.answered]
    left_out = Counter(dialogue.ended or "without an answer" for dialogue in dialogues if not dialogue.answered)
    shortened = Counter(dialogue.ended for dialogue in kept if dialogue.ended)
    told = "".join(f"; {name}: {listed(counts)}" for name, counts in (("left out", left_out), ("shortened", shortened)) if counts)
    if not kept:
        raise UserError(f"{out_dir}: none of {len(dialogues)} conversations came to an answer{told}; give another --max_tokens")
    lines = [as_json({"messages": one.answered} | ({"tools": one.tools} if one.tools else {})) for one in kept]
    write_whole(out_dir / CONVERSATIONS, "".join(f"{line}\n" for line in lines).encode(errors="surrogatepass"))
    reasons = sum((Counter(turn["finish_reasons"]) for turn in written), Counter())
    counts = {"conversations": len(dialogues), "kept": len(kept), "left_out": left_out, "shortened": shortened}
    totals = {"tokens": sum(turn["tokens"] for turn in written), "finish_reasons": reasons}
    manifest = {**counts, **totals, "file": shard_entry(out_dir / CONVERSATIONS, len(kept)), "environment": environment()}
    write_json(out_dir / MANIFEST, manifest, sort_keys=True)
    print(f"{out_dir / CONVERSATIONS}: {len(kept):,} of {len(dialogues):,} conversations, {totals['tokens']:,} tokens written{told}")


def listed(counts):
    return ", ".join(f"{number} {why}" for why, number in sorted(counts.items()))
