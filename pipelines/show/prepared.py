"""A prepared folder, to be looked at before it is trained on: in a few lines, and row by row with what is trained on in colour."""

from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers.decoders import DecodeStream

from data.manifest import CONVERSATIONS, check_contents, read_manifest, table_of
from data.reader import RowShard, read_prompts
from data.tokenizer import check_tokenizer
from fms_spec.errors import UserError
from fms_spec.files import write_whole
from pipelines.cli import check_new
from pipelines.show.console import WIDTH

BAR = 40  # characters of a histogram's longest bar
SHOWN_ROWS = 3
ANSWER, MARK, OTHER = "green", "bold cyan", "dim"  # what is trained on; special tokens, which mark the roles; the rest
# A terminal would obey these, and a page may not hold them: they are shown by their pictures, where they have one.
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {code: "�" for code in range(127, 160)}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>prepared data</title>
<style>
{stylesheet}
body {{ color: {foreground}; background-color: {background}; max-width: 120ch; margin: 2em auto; font-family: monospace }}
pre {{ font-family: inherit; white-space: pre-wrap; overflow-wrap: anywhere }}
</style>
</head>
<body>
<pre>{code}</pre>
</body>
</html>
"""


def summary_of(data_dir, train_on=None):
    """What a folder holds, in four lines, from its manifest alone. train_on: `RowReader.train_on` of a run that reads it."""
    manifest = read_manifest(data_dir)
    source, rows, prompts = manifest["source"], *(table_of(manifest, data_dir, name) for name in ("rows-train", "prompts-train"))
    skipped = left_out(source) or "nothing"
    skipped += f", the first is {source['first_skipped']}" if "first_skipped" in source and "firsts" not in source else ""
    kind = kind_of(manifest)
    share = f"{share_of(rows):.1%} of them {'answers' if kind == 'conversations' else 'trained on'}"
    asked = f"; phase 1 trains on: {train_on}" if train_on else ""
    used = {name: part["tokens"] for name, part in rows.get("sources", {}).items()}
    mixed = f" ({', '.join(f'{name} {tokens / sum(used.values()):.1%}' for name, tokens in used.items())})" if used else ""
    return [
        f"{data_dir}: {source['documents_read']:,} {kind} of {source['name']}, {source['tokens_read']:,} tokens; left out: {skipped}",
        f"rows to train on: {rows['rows']:,} of {manifest['inputs']['seq_length']:,} tokens{mixed}, {share}{asked}",
        f"prompts: {prompts['rows']:,}; held out: {manifest['tables'].get('prompts-held_out', {'rows': 0})['rows']:,}",
        f"tokenizer: {identity(manifest['tokenizer']['name'], manifest['tokenizer'])}; chat template: {template_of(manifest)}",
    ]


def details_of(data_dir):
    """What a folder was kept apart from, and each source of its mixture, a line each."""
    manifest, lines = read_manifest(data_dir), []
    if "evaluation" in manifest:
        about = manifest["evaluation"]
        told = f"{about['texts'] - about['shorter_texts']:,} texts, and {about['shorter_texts']:,} shorter that can't be told"
        lines.append(f"without documents that share {about['tokens_shared']} tokens with {about['path']}: {told}")
    return lines + mixture_lines(manifest, table_of(manifest, data_dir, "rows-train"))


def left_out(read):
    """What was left out of what was read, "" for nothing; of each kind the first, where the manifest has it."""
    firsts = read.get("firsts", {})
    shown = {why: f", first {first}" for why, first in firsts.items()}
    return "; ".join(f"{count:,} {why}{shown.get(why, '')}" for why, count in sorted(read["skipped"].items()))


def mixture_lines(manifest, rows):
    """A line for each source of a mixture: its share of what is trained on, and what was left out."""
    lines, used = [], rows.get("sources", {})
    total, held_out = sum(part["tokens"] for part in used.values()), manifest["tables"].get("rows-held_out", {}).get("sources", {})
    weights = {name: manifest["inputs"]["mixture"][name].get("weight", used[name]["tokens"]) for name in used}
    for name, part in used.items():
        read, weight = manifest["source"]["mixture"][name], weights[name] / sum(weights.values())
        rest = read["documents_read"] - part["documents"] - held_out.get(name, {"documents": 0})["documents"]
        out = "; ".join(filter(None, [left_out(read), f"{rest:,} left over" if rest else ""]))
        share = f"{part['tokens'] / total:.2%} of the tokens (asked {weight:.2%})"
        lines.append(f"  {name}: {share}, {part['documents']:,} documents of {read['path']}; left out: {out or 'nothing'}")
    return lines


def has_answers(manifest):
    return manifest["inputs"]["format_version"] == CONVERSATIONS


def kind_of(manifest):
    """What a folder was prepared from, in words."""
    held = {part.get("holds") for part in manifest["source"].get("mixture", {}).values()} - {None}
    return " and ".join(sorted(held)) or ("conversations" if has_answers(manifest) else "texts")


def template_of(manifest):
    """Which chat template wrote a folder's conversations."""
    if not has_answers(manifest):
        return "none, as for texts"
    template = manifest["chat_template"]
    dated = f", with the date {template['date']}" if "date" in template else ""
    return identity("the tokenizer's own" if template["origin"] == "tokenizer" else template["origin"], template) + dated


def identity(name, recorded):
    return f"{name} (sha256 {recorded['sha256'][:12]})"


def share_of(rows):
    """Share of the tokens of a table of rows, without padding, that are answers; all of texts are trained on."""
    return rows.get("answer_tokens", rows["tokens"]) / max(1, rows["tokens"] - rows.get("padding_tokens", 0))


def print_prepared(data_dir, row=None, tokenizer=None, html=None):
    """Print the summary, lengths and first rows of a folder, or one of its rows; html: write them there as a page instead.

    tokenizer: where it is now, if it has moved.

    Raises:
        UserError: the folder is not whole, there is no such row, its tokenizer isn't to be had, or `html` can't be written.
    """
    if html:
        check_new(Path(html), "--html")
    console = Console(highlight=False, soft_wrap=True, **({"record": True, "file": StringIO(), "width": WIDTH} if html else {}))
    for part in parts_of(data_dir, row, tokenizer):
        console.print(part)
    if html:
        write_whole(Path(html), console.export_html(code_format=PAGE).encode(errors="replace"))
        print(html)


def parts_of(data_dir, row, tokenizer):
    """What `print_prepared` shows of a folder, one after the other, for a `rich` console."""
    manifest = read_manifest(data_dir)
    table = table_of(manifest, data_dir, "rows-train")
    if row is not None and row >= table["rows"]:
        raise UserError(f"--row={row}: {data_dir} has rows 0 to {table['rows'] - 1}")
    backend = check_tokenizer(manifest, tokenizer or manifest["tokenizer"]["name"]).backend
    if row is None:
        yield from map(Text, [*summary_of(data_dir), *details_of(data_dir)])
        yield histogram(piece_lengths(data_dir, table, manifest["inputs"]["seq_length"]), "tokens of a document's piece in a row")
        yield histogram(np.array(list(map(len, read_prompts(data_dir).tokens))), "tokens of a prompt")
    for number in range(min(SHOWN_ROWS, table["rows"])) if row is None else [row]:
        yield Text(f"\nrow {number}", style="bold")
        yield from shown_row(data_dir, manifest, table, number, backend)
    yield Text.assemble("\n", ("trained on", ANSWER), ", ", ("special tokens", MARK), ", ", ("seen, and not trained on", OTHER))


def piece_lengths(data_dir, table, seq_length):
    """Tokens between the starts of documents, and to the ends of rows: int64 [pieces]."""
    lengths = []
    for shard in table["shards"]:
        check_contents(data_dir, shard)
        with pq.ParquetFile(Path(data_dir) / shard["file"]) as file:
            for batch in file.iter_batches(columns=[name for name in ("document_starts", "padding") if name in file.schema_arrow.names]):
                for row in batch.to_pylist():
                    lengths.append(np.diff([*row["document_starts"], seq_length - row.get("padding", 0)]))
    return np.concatenate(lengths)


def histogram(lengths, title):
    """A table of how many lengths there are up to each power of two."""
    table = Table("up to", "", "count", title=f"{title}: median {np.median(lengths):,.0f}, longest {lengths.max():,}")
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers)
    for power in range(powers.min(), len(counts)):
        table.add_row(f"{2**power:,}", "█" * -(-counts[power] * BAR // counts.max()), f"{counts[power]:,}")
    return table


def shown_row(data_dir, manifest, table, number, backend):
    """A row's documents, each as a `Text`."""
    for shard in table["shards"]:
        if number < shard["rows"]:
            break
        number -= shard["rows"]
    check_contents(data_dir, shard)
    train_on = "answers" if has_answers(manifest) else "all"
    read = RowShard(Path(data_dir) / shard["file"], shard["rows"], manifest["inputs"]["seq_length"], train_on)
    tokens, segments, *trained = (part[0] for part in read.rows(np.array([number])))
    trained = trained[0] if trained else np.ones(len(tokens), bool)
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    texts, stream = [], None
    for token, segment, answer in zip(tokens.tolist(), segments.tolist(), trained.tolist()):
        if segment < 0:
            break
        if segment == len(texts):
            texts.append(Text.assemble((f"[document {segment}] ", "bold")))
            stream = DecodeStream(skip_special_tokens=False)
        style = ANSWER if answer else MARK if token in special else OTHER
        texts[-1].append((stream.step(backend, token) or "").translate(CONTROLS), style)
    return texts
