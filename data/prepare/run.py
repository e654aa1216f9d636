"""From a source of text to a prepared folder: read, tokenise, hold out, shuffle, pack, draw prompts, describe.

The documents are tokenised once into a file on disk (documents.DocumentSpool); everything after that works on document numbers.
"""

import heapq
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np

from data.manifest import CONVERSATIONS, MANIFEST, TEXTS, check_seed
from data.prepare.chat import ChatTemplate
from data.prepare.documents import DocumentSpool
from data.prepare.encoding import encode_documents
from data.prepare.folder import finished_set, refuse_inside, writing
from data.prepare.rows import check_format
from data.prepare.sources import Skipped, open_source
from data.prepare.tables import READING, has_prompt, write_tables
from data.progress import progress
from data.tokenizer import load_tokenizer, refuse_unknown, use_threads
from fms_spec.errors import UserError
from fms_spec.files import write_json
from fms_spec.timing import Stopwatch

PROMPT_LENGTH = {False: 64, True: 1024}  # tokens: of a piece of text, and at most of a conversation
MOST_WORKERS = 1024  # threads; with many more the machine does nothing but make them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the output, besides the contents of the source and the tokenizer."""

    seq_length: int = 4096
    text_column: str = "text"
    prompt_length: int | None = None
    held_out: int = 0
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed, f"--seed={self.seed}")
        for name, smallest in dict(seq_length=2, prompt_length=1, held_out=0).items():
            if getattr(self, name) is not None and not smallest <= getattr(self, name) < 2**31:  # Parquet's lengths have 32 bits
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {smallest} and below 2^31")
        if self.max_tokens is not None and self.max_tokens < self.seq_length:
            raise UserError(f"--max_tokens={self.max_tokens}: less than one row of --seq_length={self.seq_length}")

    def generator(self, *stream):
        """A random generator for one kind of choice."""
        return np.random.default_rng((self.seed, *stream))


def prepare(*, source, tokenizer, out_dir, workers=None, format=None, chat_template=None, **settings):
    """Write the folder that RowReader and read_prompts read, or find it written from the same inputs. Returns its manifest.

    source, tokenizer, out_dir, format, chat_template: as typed by the user; workers: threads of the tokenizer (None: all cores), without
    effect on the output; settings: see Settings. Same inputs give the same bytes, on the same day where a chat template asks for the date.

    Raises:
        UserError: anything wrong with the source, the tokenizer, a setting or `out_dir`; nothing is left behind.
    """
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers={workers}: must be from 1 to {MOST_WORKERS}")
    settings = Settings(**settings)
    check_format(format, settings.text_column)
    use_threads(workers)
    opened = open_source(source, settings.text_column, format)
    if settings.prompt_length is None:
        settings = replace(settings, prompt_length=PROMPT_LENGTH[opened.conversations])
    refuse_inside(out_dir, source)
    loaded = load_tokenizer(tokenizer)
    check_room(settings, loaded.prefix)
    template = chat_template_of(opened, loaded, source, chat_template)
    inputs = {
        "format_version": CONVERSATIONS if template else TEXTS,
        "source": opened.fingerprint(),
        "tokenizer": loaded.sha256,
        **asdict(settings),
        **({"format": format, "chat_template": template.sha256} if template else {}),
    }
    manifest = finished_set(out_dir, inputs)
    if manifest:
        print(f"{out_dir} already holds this set, nothing to do: {summary(manifest)}")
        return manifest

    tell_sizes(loaded)
    skipped, watch = Skipped(opened), Stopwatch()
    with watch.measure("all"), writing(out_dir, inputs) as folder, DocumentSpool(folder, copies=not template) as spool:
        read_documents(spool, opened, loaded, template, settings, skipped)
        if not len(spool):
            raise UserError(f"source {source}: no documents" + (f"; {skipped}" if skipped.first else ""))
        tables = write_tables(folder, spool, opened, loaded, settings)
        manifest = {
            "inputs": inputs,
            "source": about_source(source, spool, skipped, template),
            "tokenizer": loaded.identity(),
            **({"chat_template": template.identity(chat_template)} if template else {}),
            "tables": tables,
        }
        write_json(folder / MANIFEST, manifest, sort_keys=True, ensure_ascii=False)
    if skipped.first:
        print(f"warning: {skipped}", file=sys.stderr)
    rate = spool.token_count / watch.seconds["all"]
    print(f"{out_dir}: {summary(manifest)}; {rate:,.0f} tokens/s")
    return manifest


def about_source(source, spool, skipped, template):
    """What the manifest records of what was read and left out."""
    read = {"documents_read": len(spool), "tokens_read": spool.token_count, "skipped": dict(skipped.counts)}
    return {"name": source} | read | ({"first_skipped": skipped.first} if template and skipped.first else {})


def chat_template_of(opened, tokenizer, source, path):
    """The `ChatTemplate` for a source of conversations, None for one of texts; path: --chat_template."""
    if opened.conversations:
        return ChatTemplate(tokenizer, path)
    if path:
        raise UserError(f"--chat_template={path}: source {source} holds texts, which need none; leave it out")
    return None


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


def read_documents(spool, source, tokenizer, template, settings, skipped):
    """Tokenise the source into the spool; with max_tokens, only as much of it as is needed."""
    enough = Enough(settings)
    documents = source.documents(settings.generator(READING))
    with progress(desc="tokenise", unit="token", unit_scale=True, total=settings.max_tokens) as bar:
        for document, encoded in encode_documents(documents, tokenizer, template, skipped):
            tokens, answers, _ = encoded
            if tokenizer.overflows:
                refuse_unknown(tokens, tokenizer.embedding_size, tokenizer.backend, source.label(document.file, document.row))
            if not spool.append(encoded, document.file, document.row, document.content.category if template else None):
                skipped.add("copies", document)
                continue
            bar.update(len(tokens))
            length = settings.prompt_length
            promptable = has_prompt(answers[:, 0], length, tokenizer.prefix).any() if template else len(tokens) > length
            if enough.after(len(tokens), promptable):
                return


class Enough:
    """Tells when max_tokens will be there for the train rows, whichever documents are held out later and whatever prefixes add."""

    def __init__(self, settings):
        self.settings, self.longest, self.total, self.promptable = settings, [], 0, 0

    def after(self, length, promptable):
        """True if, with one more document of `length` tokens, no more are needed. promptable: whether it may be held out."""
        wanted, held_out = self.settings.max_tokens, self.settings.held_out
        if wanted is None:
            return False
        self.total += length
        self.promptable += bool(promptable)
        heapq.heappush(self.longest, length)
        if len(self.longest) > held_out:
            heapq.heappop(self.longest)
        return self.promptable >= held_out and self.total - sum(self.longest) >= wanted
