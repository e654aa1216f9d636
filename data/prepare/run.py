"""From a source of text to a prepared folder: read, tokenise, hold out, shuffle, pack, draw prompts, describe.

The documents are tokenised once into a file on disk (documents.DocumentSpool); everything after that works on document numbers.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np

from data.cluster import Cluster
from data.manifest import CONVERSATIONS, MANIFEST, TEXTS, check_seed
from data.prepare.chat import ChatTemplate
from data.prepare.documents import DocumentSpool
from data.prepare.encoding import one_by_one
from data.prepare.folder import finished_set, refuse_inside, writing
from data.prepare.mixture import Mixture
from data.prepare.near import NearCopies
from data.prepare.overlap import Evaluation
from data.prepare.reading import read_documents
from data.prepare.rows import spellable
from data.prepare.tables import PROMPT_LENGTH, write_tables
from data.tokenizer import load_tokenizer, use_threads
from fms_spec.errors import UserError
from fms_spec.files import write_whole
from fms_spec.timing import Stopwatch

UNSAID = {
    "on_bad_row": "stop",
    "near_duplicates": None,
}  # recorded where they are others: folders of before lack them
MOST_WORKERS = 1024  # threads; with many more the machine does nothing but make them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the output, besides the contents of the source and the tokenizer.

    on_bad_row: "stop" or "skip". near_duplicates: how similar a document may at most be to one before, see near.NearCopies.
    """

    seq_length: int = 4096
    text_column: str = "text"
    prompt_length: int | None = None
    held_out: int = 0
    max_tokens: int | None = None
    seed: int = 0
    on_bad_row: str = "stop"
    near_duplicates: float | None = None

    def __post_init__(self):
        check_seed(self.seed, f"--seed={self.seed}")
        for name, smallest in dict(seq_length=2, prompt_length=1, held_out=0).items():
            if getattr(self, name) is not None and not smallest <= getattr(self, name) < 2**31:  # Parquet's lengths have 32 bits
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {smallest} and below 2^31")
        if self.on_bad_row not in ("stop", "skip"):
            raise UserError(f"--on_bad_row={self.on_bad_row}: stop or skip")
        if self.max_tokens is not None and self.max_tokens < self.seq_length:
            raise UserError(f"--max_tokens={self.max_tokens}: less than one row of --seq_length={self.seq_length}")

    def generator(self, *stream):
        """A random generator for one kind of choice."""
        return np.random.default_rng((self.seed, *stream))


def prepare(*, workers=None, ray=None, **how):
    """Write the folder that RowReader and read_prompts read, or find it written from the same inputs. Returns its manifest.

    source, tokenizer, out_dir, format, chat_template, evaluation: as typed by the user; settings: see Settings. Same inputs give the same
    bytes, on the same day where a chat template asks for the date. Without effect on the output are workers, threads of the tokenizer
    (None: all cores), and ray, the address of a cluster that tokenises (see `cluster.Cluster`).

    Raises:
        UserError: anything wrong with the source, the tokenizer, a setting, the cluster or `out_dir`; nothing is left behind.
    """
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers={workers}: must be from 1 to {MOST_WORKERS}")
    if workers is not None and ray is not None:
        raise UserError(f"--workers={workers}: with --ray={ray} a thread of each of its processors tokenises; leave one of the two out")
    use_threads(workers)
    if ray is None:
        return prepare_by(one_by_one, **how)
    with Cluster(ray) as cluster:
        return prepare_by(cluster.each, **how)


def prepare_by(each, *, source, tokenizer, out_dir, format=None, chat_template=None, evaluation=None, **settings):
    """As `prepare`. each: see `encoding.encode_documents`."""
    settings = Settings(**settings)
    mixture = Mixture(source, settings.text_column, format, settings.on_bad_row)
    if settings.max_tokens is not None and len(mixture.parts) > 1 and not mixture.weights:
        raise UserError(f"--max_tokens={settings.max_tokens}: of which source, is not said; give each in {source} a weight")
    if settings.prompt_length is None:
        settings = replace(settings, prompt_length=PROMPT_LENGTH[mixture.conversations])
    for part in mixture.parts:
        refuse_inside(out_dir, part.settings.path)
    loaded = load_tokenizer(tokenizer)
    check_room(settings, loaded.prefix)
    template = chat_template_of(mixture, loaded, source, chat_template)
    near = NearCopies(settings.near_duplicates) if settings.near_duplicates is not None else None
    evaluated = Evaluation(evaluation, loaded) if evaluation else None
    inputs, detailed = inputs_of(mixture, loaded, settings, template, format, evaluated)
    manifest = finished_set(out_dir, inputs)
    if manifest:
        print(f"{out_dir} already holds this set, nothing to do: {summary(manifest)}")
        return manifest

    tell_sizes(loaded)
    watch, copies = Stopwatch(), not (template or mixture.named or near)  # one source's texts are what they have always been
    with watch.measure("all"), writing(out_dir, inputs) as folder, DocumentSpool(folder, copies) as spool:
        unwanted = [*([evaluated.overlap] if evaluated else []), spool.seen, *([near.seen] if near else [])]
        read_documents(spool, mixture, loaded, template, settings, unwanted, each)
        tables = write_tables(folder, spool, mixture, loaded, settings)
        manifest = {
            "inputs": inputs,
            "source": about_source(source, spool, mixture, template, detailed),
            "tokenizer": loaded.identity(),
            **({"chat_template": template.identity(chat_template)} if template else {}),
            **({"evaluation": evaluated.identity()} if evaluated else {}),
            "tables": tables,
        }
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
        write_whole(folder / MANIFEST, f"{spellable(text)}\n".encode())  # paths may be any bytes
    tell_left_out(mixture)
    rate = spool.token_count / watch.seconds["all"]
    print(f"{out_dir}: {summary(manifest)}; {rate:,.0f} tokens/s")
    return manifest


def inputs_of(mixture, tokenizer, settings, template, format, evaluated):
    """(what the output depends on, whether there is anything in it that folders of before don't have)."""
    inputs = {
        "format_version": CONVERSATIONS if template else TEXTS,
        "source": mixture.fingerprint(),
        "tokenizer": tokenizer.sha256,
        **{name: value for name, value in asdict(settings).items() if name not in UNSAID or value != UNSAID[name]},
        **({"format": format, "chat_template": template.sha256} if template else {}),
    }
    evaluation = {"evaluation": evaluated.source.fingerprint()} if evaluated else {}
    return inputs | mixture.inputs() | evaluation, bool(mixture.named or evaluation or UNSAID.keys() & inputs.keys())


def tell_left_out(mixture):
    """Say on stderr what was left out of each source."""
    for part in mixture.parts:
        if part.skipped.first:
            print(f"warning: {part.name and part.name + ': '}{part.skipped}", file=sys.stderr)


def about_source(source, spool, mixture, template, detailed):
    """What the manifest records of what was read and left out; detailed: with the first of each kind, which once was not recorded."""
    skipped = sum((part.skipped.counts for part in mixture.parts), Counter())
    first = next(filter(None, (part.skipped.first for part in mixture.parts)), None)
    about = {"name": source, "documents_read": len(spool), "tokens_read": spool.token_count, "skipped": dict(skipped)}
    about |= {"first_skipped": first} if template and first else {}
    if not mixture.named:
        return about | ({"firsts": mixture.parts[0].skipped.firsts} if detailed else {})
    documents, tokens = (np.bincount(spool.parts, by, len(mixture.parts)).astype(int).tolist() for by in (None, spool.lengths))
    about["mixture"] = {
        part.name: {
            "path": part.settings.path, **({"holds": part.holds} if mixture.of_both else {}),
            "documents_read": documents[number], "tokens_read": tokens[number],
            "skipped": dict(part.skipped.counts), "firsts": part.skipped.firsts,
        }
        for number, part in enumerate(mixture.parts)
    }  # fmt: skip
    return about


def chat_template_of(mixture, tokenizer, source, path):
    """The `ChatTemplate` for a source of conversations, None for one of texts; path: --chat_template."""
    if mixture.conversations:
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
