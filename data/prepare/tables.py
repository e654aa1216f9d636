"""The tables of a prepared folder, written from tokenised documents: rows, prompts, token counts."""

from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.manifest import CONVERSATIONS, TEXTS
from data.parquet import TableWriter, metadata_of, prompts_schema, rows_schema, shard_entry, token_counts_schema
from data.prepare.documents import by_weight, choose_held_out, missing_prefix, pack, pack_whole
from data.progress import progress
from fms_spec.errors import UserError

# Each random choice has a stream of its own, so that e.g. asking for prompts of another length does not reorder the rows.
READING, HOLDING_OUT, SHUFFLING, PROMPTING = range(4)
PROMPT_LENGTH = {False: 64, True: 1024}  # tokens: of a piece of text, and at most of a conversation


def write_tables(folder, spool, mixture, tokenizer, settings):
    """Write the tables of every split and the token counts; returns the manifest's entries."""
    length, chats, prefix = settings.prompt_length, mixture.conversations, tokenizer.prefix
    try:
        drawn = settings.generator(HOLDING_OUT)
        held_out, train = choose_held_out(spool, settings.held_out, drawn, mixture.weights)
    except ValueError as error:
        what, more = (f"a prompt of at most {length} tokens", "raise") if chats else (f"the {length} tokens of a prompt", "lower")
        mend = f"lower --held_out or {more} --prompt_length"
        raise UserError(f"--held_out={settings.held_out}: {error} {what}; {mend}") from None
    about = metadata_of(tokenizer, settings.seq_length, settings.seed, CONVERSATIONS if chats else TEXTS)
    counts = np.zeros((3 if chats else 1, tokenizer.vocab_size), np.int64)
    splits = {"train": train, "held_out": held_out} if settings.held_out else {"train": train}
    tables = {}
    for number, (split, documents) in enumerate(splits.items()):
        documents = in_order(documents, spool, mixture, settings.generator(SHUFFLING, number), split == "train")
        schema = rows_schema(settings.seq_length, about, chats)
        rows = write_rows(folder, split, documents, spool, settings, schema, prefix, counts if split == "train" else None)
        if split == "train" and rows["rows"] == 0:
            tokens = int(spool.lengths[documents].sum())
            if not tokens:
                mend = "lower --held_out; copies of held-out documents are left out of training"
                raise UserError(f"--held_out={settings.held_out}: no document is left to train on; {mend}")
            raise UserError(f"only {tokens} tokens to train on, less than one row of --seq_length={settings.seq_length}; lower it")
        tables[f"rows-{split}"] = rows
        used = documents[: rows["documents"]]
        if mixture.named:
            rows["sources"] = shares_of(used, spool, mixture)
        schema, draw = prompts_schema(length, about, chats), settings.generator(PROMPTING, number)
        prompts = write_prompts(folder, split, used, spool, mixture, length, schema, prefix, draw)
        if prompts["rows"] == 0 and chats:
            raise UserError(f"--prompt_length={length}: no conversation comes to an answer within so many tokens; raise it")
        if prompts["rows"] == 0:
            longest = int(spool.lengths[used].max()) - 1
            raise UserError(f"--prompt_length={length}: no document is so long, the longest has {longest} tokens; lower it")
        tables[f"prompts-{split}"] = prompts
    tables["token_counts"] = write_token_counts(folder, counts, token_counts_schema(about, chats))
    return tables


def in_order(documents, spool, mixture, generator, weighed):
    """Numbers of documents in the order in which they are packed: those of streams as they came, all others drawn from `generator`.

    weighed: whether the sources' weights hold, so that some documents may be left over; otherwise all are there.
    """
    drawn, several = generator.permutation(documents), len(mixture.parts) > 1
    queues = []
    for number, part in enumerate(mixture.parts):
        order = drawn if part.source.finite else documents
        queues.append(order[spool.parts[order] == number] if several else order)
    if not several:
        return queues[0]
    for number, part in enumerate(mixture.parts):
        if weighed and not len(queues[number]):
            mend = "lower --held_out; copies of held-out documents are left out of training"
            raise UserError(f"source {part.settings.path}: no document of it is left to train on; {mend}")
    weights = mixture.weights if weighed else None
    return np.fromiter(by_weight(queues, spool.lengths, weights), np.int64)


def shares_of(used, spool, mixture):
    """{name: documents and tokens of it that rows were made of}; of what was read, the rest is left over, or held out."""
    parts = spool.parts[used]
    documents, tokens = (np.bincount(parts, by, len(mixture.parts)).astype(int).tolist() for by in (None, spool.lengths[used]))
    return {part.name: {"documents": documents[n], "tokens": tokens[n]} for n, part in enumerate(mixture.parts)}


def has_prompt(lengths, limit, prefix):
    """Whether prompts of these lengths, -1 for none, have any tokens and at most `limit` with the prefix before them: bool, in the shape of
    `lengths`."""
    whole = lengths + len(prefix)
    return (lengths >= 0) & (whole > 0) & (whole <= limit)


def piece_length(length, mixture):
    """Tokens of a prompt that is a piece of a text: all that a prompt may have, but beside conversations no more than without them."""
    return min(length, PROMPT_LENGTH[False]) if mixture.conversations else length


def write_rows(folder, split, documents, spool, settings, schema, prefix, counts):
    """Pack `documents` (numbers, in order) into rows. Returns the table's entry.

    To `counts`, if given, its tokens are added, see `count_tokens`.
    """
    seq_length = settings.seq_length
    limit = settings.max_tokens // seq_length if split == "train" and settings.max_tokens is not None else None
    used = tokens_used = tokens_packed = answered = padding = 0

    def taken():
        nonlocal used, tokens_used
        for document in documents:
            encoded = spool[document]
            used, tokens_used = used + 1, tokens_used + len(encoded.tokens)
            yield encoded

    writer, whole = TableWriter(folder, f"rows-{split}", schema, seq_length), "answers" in schema.names
    rows = islice((pack_whole if whole else pack)(taken(), seq_length, prefix), limit)
    for row in progress(rows, desc=f"pack {split}", unit="row", leave=False):
        tokens_packed += int(row.own.sum())
        answered += sum(end - start for start, end, _ in row.answers)
        padding += row.room
        if counts is not None:
            count_tokens(counts, row)
        answers = [{"start": start, "end": end, "last": last} for start, end, last in row.answers]
        writer.append((row.tokens, row.starts, answers, row.room)[: len(schema)])
    table = writer.close()
    dropped = tokens_used - tokens_packed
    table |= {"answer_tokens": answered, "padding_tokens": padding} if whole else {}
    return {**table, "documents": used, "tokens": table["rows"] * seq_length, "dropped_tail_tokens": dropped}


def count_tokens(counts, row):
    """Add a `documents.Row` to counts int64 [c, vocabulary]: the documents' own tokens, as a prefix is never predicted; of conversations
    also those of answers, and of last answers."""
    np.add.at(counts[0], row.tokens[row.own], 1)
    for start, end, last in row.answers:
        for kind in counts[1 : 2 + last]:
            np.add.at(kind, row.tokens[start:end], 1)


def write_prompts(folder, split, documents, spool, mixture, length, schema, prefix, generator):
    """Draw one prompt from each document that has one. Returns the table's entry."""
    writer, pieces = TableWriter(folder, f"prompts-{split}", schema, length), piece_length(length, mixture)
    for document in documents.tolist():
        tokens, answers, prefixed = spool[document]
        number, *place = spool.origin(document)
        part, (category, askers) = mixture.parts[number], spool.about(document)
        draw, limit = (conversation_prompt, length) if part.source.conversations else (text_prompt, pieces)
        prompt, turn = draw(tokens, answers, limit, prefix if prefixed else [], generator)
        if prompt is not None:
            role = askers[turn - 1] if turn and len(askers) == len(answers) else ""  # a template may mark answers otherwise
            label = mixture.label(number, *place)
            writer.append((writer.rows, document, label, prompt, turn, category or part.name, role)[: len(schema)])
    return writer.close()


def text_prompt(tokens, _, length, prefix, generator):
    """(a piece of a text that is long enough even without the prefix, otherwise None; 0, as a text has no turns).

    The offset is random because the beginnings of files are licence headers, all alike. The end-of-text token is left out: a
    continuation of it would be another document.
    """
    if len(tokens) - 1 < length:
        return None, 0
    offset = int(generator.integers(len(tokens) - length))
    piece = tokens[offset : offset + length]
    return [*missing_prefix(piece, prefix), *piece][:length], 0


def conversation_prompt(tokens, answers, limit, prefix, generator):
    """(a conversation up to where one of its answers begins, any within `limit`; which one that is, from 1); None and 0 for none."""
    numbers = np.flatnonzero(has_prompt(answers[:, 0], limit, prefix))
    if not len(numbers):
        return None, 0
    number = int(numbers[generator.integers(len(numbers))])
    return [*prefix, *tokens[: answers[number, 0]]], number + 1


def write_token_counts(folder, counts, schema):
    """Write token frequencies [c, vocabulary], one file for the whole vocabulary. Returns the table's entry."""
    path, size = folder / "token_counts.parquet", counts.shape[1]
    columns = [pa.array(np.arange(size, dtype=np.int32)), *map(pa.array, counts)]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd")
    return {"rows": size, "shards": [shard_entry(path, size)]}
