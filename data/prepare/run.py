"""From a source of text to a prepared folder: read, tokenise, hold out, shuffle, pack, draw prompts, describe.

The documents are tokenised once into a file on disk (documents.DocumentSpool); everything after that works on document numbers.
"""

import heapq
import sys
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.manifest import FORMAT_VERSION, MANIFEST, check_seed
from data.parquet import TableWriter, metadata_of, prompts_schema, rows_schema, shard_entry, token_counts_schema
from data.prepare.documents import DocumentSpool, choose_held_out, missing_prefix, pack
from data.prepare.folder import finished_set, refuse_inside, writing
from data.prepare.sources import Skipped, open_source
from data.progress import progress
from data.tokenizer import encode_documents, load_tokenizer, refuse_unknown, use_threads
from fms_spec.errors import UserError
from fms_spec.files import write_json
from fms_spec.timing import Stopwatch

# Each random choice has a stream of its own, so that e.g. asking for prompts of another length does not reorder the rows.
READING, HOLDING_OUT, SHUFFLING, PROMPTING = range(4)


MOST_WORKERS = 1024  # threads; with many more the machine does nothing but make them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the output, besides the contents of the source and the tokenizer."""

    seq_length: int = 4096
    text_column: str = "text"
    prompt_length: int = 64
    held_out: int = 0
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed, f"--seed={self.seed}")
        for name, smallest in dict(seq_length=2, prompt_length=1, held_out=0).items():
            if not smallest <= getattr(self, name) < 2**31:  # Parquet's lengths have 32 bits
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {smallest} and below 2^31")
        if self.max_tokens is not None and self.max_tokens < self.seq_length:
            raise UserError(f"--max_tokens={self.max_tokens}: less than one row of --seq_length={self.seq_length}")

    def generator(self, *stream):
        """A random generator for one kind of choice."""
        return np.random.default_rng((self.seed, *stream))


def prepare(*, source, tokenizer, out_dir, workers=None, **settings):
    """Write the folder that RowReader and read_prompts read, or find it written from the same inputs. Returns its manifest.

    source, tokenizer, out_dir: as typed by the user; workers: threads of the tokenizer (None: all cores), without effect on
    the output; settings: see Settings. Same inputs give the same bytes.

    Raises:
        UserError: anything wrong with the source, the tokenizer, a setting or `out_dir`; nothing is left behind.
    """
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers={workers}: must be from 1 to {MOST_WORKERS}")
    use_threads(workers)
    settings = Settings(**settings)
    opened = open_source(source, settings.text_column)
    refuse_inside(out_dir, source)
    loaded = load_tokenizer(tokenizer)
    check_room(settings, loaded.prefix)
    inputs = {
        "format_version": FORMAT_VERSION,
        "source": opened.fingerprint(),
        "tokenizer": loaded.sha256,
        **asdict(settings),
    }
    manifest = finished_set(out_dir, inputs)
    if manifest:
        print(f"{out_dir} already holds this set, nothing to do: {summary(manifest)}")
        return manifest

    tell_sizes(loaded)
    skipped, watch = Skipped(opened), Stopwatch()
    with watch.measure("all"), writing(out_dir, inputs) as folder, DocumentSpool(folder) as spool:
        read_documents(spool, opened, loaded, settings, skipped)
        if not len(spool):
            raise UserError(f"source {source}: no documents" + (f"; {skipped}" if skipped.first else ""))
        tables = write_tables(folder, spool, opened, loaded, settings)
        manifest = {
            "inputs": inputs,
            "source": {
                "name": source,
                "documents_read": len(spool),
                "tokens_read": spool.token_count,
                "skipped": dict(skipped.counts),
            },
            "tokenizer": loaded.identity(),
            "tables": tables,
        }
        write_json(folder / MANIFEST, manifest, sort_keys=True, ensure_ascii=False)
    if skipped.first:
        print(f"warning: {skipped}", file=sys.stderr)
    rate = spool.token_count / watch.seconds["all"]
    print(f"{out_dir}: {summary(manifest)}; {rate:,.0f} tokens/s")
    return manifest


def check_room(settings, prefix):
    """Refuse rows and prompts that the tokenizer's prefix, a list of ids, would fill."""
    for name in ("seq_length", "prompt_length"):
        length = getattr(settings, name)
        if length <= len(prefix):
            raise UserError(f"--{name}={length}: must be over {len(prefix)}, the tokens that the tokenizer begins a text with")


def tell_sizes(tokenizer):
    """Say so where the base model beside the tokenizer has an embedding of another size."""
    sizes = f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model's embedding {tokenizer.embedding_size}"
    if tokenizer.overflows:
        print(f"warning: {sizes}; a document with one of the others will be refused", file=sys.stderr)
    elif tokenizer.embedding_size not in (None, tokenizer.vocab_size):
        print(f"{sizes} (padded, harmless)", file=sys.stderr)


def summary(manifest):
    """One line about a prepared folder."""
    parts = [
        f"{name} {table['rows']:,}" + (f" ({table['documents']:,} documents)" if "documents" in table else "")
        for name, table in manifest["tables"].items()
        if name != "token_counts"
    ]
    return ", ".join(parts)


def read_documents(spool, source, tokenizer, settings, skipped):
    """Tokenise the source into the spool; with max_tokens, only as much of it as is needed."""
    enough = Enough(settings)
    documents = source.documents(settings.generator(READING))
    with progress(desc="tokenise", unit="token", unit_scale=True, total=settings.max_tokens) as bar:
        for document, tokens in encode_documents(documents, tokenizer, skipped):
            if tokenizer.overflows:
                refuse_unknown(tokens, tokenizer.embedding_size, tokenizer.backend, source.label(document.file, document.row))
            spool.append(tokens, document.file, document.row)
            bar.update(len(tokens))
            if enough.after(len(tokens)):
                return


class Enough:
    """Tells when max_tokens will be there for the train rows, whichever documents are held out later and whatever prefixes add."""

    def __init__(self, settings):
        self.settings, self.longest, self.total = settings, [], 0

    def after(self, length):
        """True if, with one more document of `length` tokens, no more are needed."""
        wanted, held_out = self.settings.max_tokens, self.settings.held_out
        if wanted is None:
            return False
        self.total += length
        heapq.heappush(self.longest, length)
        if len(self.longest) > held_out:
            heapq.heappop(self.longest)
        for_prompts = len(self.longest) == held_out and all(other > self.settings.prompt_length for other in self.longest)
        return for_prompts and self.total - sum(self.longest) >= wanted


def write_tables(folder, spool, source, tokenizer, settings):
    """Write the tables of every split and the token counts; returns the manifest's entries."""
    try:
        held_out, train = choose_held_out(spool, settings.held_out, settings.prompt_length, settings.generator(HOLDING_OUT))
    except ValueError as error:
        raise UserError(f"--held_out={settings.held_out}: {error}; lower --held_out or --prompt_length") from None
    about = metadata_of(tokenizer, settings.seq_length, settings.seed)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    splits = {"train": train, "held_out": held_out} if settings.held_out else {"train": train}
    tables = {}
    for number, (split, documents) in enumerate(splits.items()):
        if source.finite:
            documents = settings.generator(SHUFFLING, number).permutation(documents)
        rows = write_rows(folder, split, documents, spool, settings, about, tokenizer.prefix, counts if split == "train" else None)
        if split == "train" and rows["rows"] == 0:
            tokens = int(spool.lengths[documents].sum())
            if not tokens:
                mend = "lower --held_out; copies of held-out documents are left out of training"
                raise UserError(f"--held_out={settings.held_out}: no document is left to train on; {mend}")
            raise UserError(f"only {tokens} tokens to train on, less than one row of --seq_length={settings.seq_length}; lower it")
        tables[f"rows-{split}"] = rows
        used = documents[: rows["documents"]]
        prompts = write_prompts(folder, split, used, spool, source, settings, about, tokenizer.prefix, number)
        if prompts["rows"] == 0:
            longest = int(spool.lengths[used].max()) - 1
            raise UserError(f"--prompt_length={settings.prompt_length}: no document is so long, the longest has {longest} tokens; lower it")
        tables[f"prompts-{split}"] = prompts
    tables["token_counts"] = write_token_counts(folder, counts, about)
    return tables


def write_rows(folder, split, documents, spool, settings, about, prefix, counts):
    """Pack `documents` (numbers, in order) into rows. Returns the table's entry.

    To `counts` [vocabulary], if given, the documents' own tokens are added: a prefix is never predicted.
    """
    seq_length = settings.seq_length
    limit = settings.max_tokens // seq_length if split == "train" and settings.max_tokens is not None else None
    used = tokens_used = tokens_packed = 0

    def taken():
        nonlocal used, tokens_used
        for document in documents:
            tokens = spool[document]
            used, tokens_used = used + 1, tokens_used + len(tokens)
            yield tokens

    writer = TableWriter(folder, f"rows-{split}", rows_schema(seq_length, about), seq_length)
    rows = islice(pack(taken(), seq_length, prefix), limit)
    for tokens, starts, own in progress(rows, desc=f"pack {split}", unit="row", leave=False):
        tokens_packed += int(own.sum())
        if counts is not None:
            np.add.at(counts, tokens[own], 1)
        writer.append((tokens, starts))
    table = writer.close()
    dropped = tokens_used - tokens_packed
    return {**table, "documents": used, "tokens": table["rows"] * seq_length, "dropped_tail_tokens": dropped}


def write_prompts(folder, split, documents, spool, source, settings, about, prefix, number):
    """Draw one prompt from each document that is long enough even without the prefix. Returns the table's entry.

    The offset is random because the beginnings of files are licence headers, all alike. The end-of-text token is left out: a
    continuation of it would be another document.
    """
    length, generator = settings.prompt_length, settings.generator(PROMPTING, number)
    writer = TableWriter(folder, f"prompts-{split}", prompts_schema(length, about), length)
    for document in documents.tolist():
        tokens = spool[document][:-1]
        if len(tokens) >= length:
            offset = int(generator.integers(len(tokens) - length + 1))
            piece = tokens[offset : offset + length]
            prompt = [*missing_prefix(piece, prefix), *piece][:length]
            writer.append((writer.rows, document, source.label(*spool.origin(document)), prompt))
    return writer.close()


def write_token_counts(folder, counts, about):
    """Write token frequencies, one file for the whole vocabulary. Returns the table's entry."""
    path = folder / "token_counts.parquet"
    columns = [pa.array(np.arange(len(counts), dtype=np.int32)), pa.array(counts)]
    pq.write_table(pa.Table.from_arrays(columns, schema=token_counts_schema(about)), path, compression="zstd")
    return {"rows": len(counts), "shards": [shard_entry(path, len(counts))]}
