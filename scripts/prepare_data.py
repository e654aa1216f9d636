"""Turn texts or conversations into rows and prompts: python -m scripts.prepare_data --source=text --tokenizer=model --out_dir=prepared"""

from dataclasses import asdict
from typing import Literal

from data.prepare.run import prepare
from pipelines.cli import arguments, main
from pipelines.config import Seed


@arguments
class Arguments:
    """Tokenise, shuffle and pack a corpus for training; the same inputs give the same bytes.

    Args:
        source: a folder (recursive, without hidden files), a glob, a file, or a Hub dataset name[:config[:split]]. Files are texts, or
            tables with a text or a conversation in each row: .jsonl, .ndjson, .json, .csv and .tsv, also packed as .gz, .bz2, .xz or
            .zst, .parquet, .arrow and .feather. A folder has texts or tables, and of tables in splits its train split is read. A .yaml file
            names several sources, each with a weight and more (docs/data.md).
        tokenizer: the base model's folder or Hub name; each piece of a document in a row, and each prompt, begins as it begins a text.
        out_dir: where to write; nothing of another set is ever overwritten.
        seq_length: tokens of a packed row.
        text_column: the column of tables and datasets that holds the text.
        format: what rows hold: text, messages (OpenAI), sharegpt, ultrachat, alpaca or prompt_completion; told by their columns otherwise.
        on_bad_row: "stop" at a row that can't be read, or "skip" it, and say how many there were; a damaged file always stops.
        evaluation: what will be evaluated on, read as a source is; documents that share 25 tokens in a row with it are left out.
        near_duplicates: leave out documents that are so similar to one before, such as 0.8, by MinHash; takes 4 KB of memory a document.
        chat_template: a Jinja file that conversations are written by; the tokenizer's own template otherwise.
        prompt_length: tokens of a prompt for continuations, 64 by default; of conversations the most there may be, 1024 by default.
        held_out: how many documents to keep out of training, for evaluation.
        max_tokens: stop after so many packed tokens; reads no more of the source than that takes.
        seed: decides the order, the held-out documents and the prompts.
        workers: threads of the tokenizer, all cores by default; no effect on the output.
        ray: HOST:PORT of a Ray cluster whose processors tokenise, or auto for the one that this machine is of; no effect on the output.
    """

    source: str
    tokenizer: str
    out_dir: str
    seq_length: int = 4096
    text_column: str = "text"
    format: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    evaluation: str | None = None
    near_duplicates: float | None = None
    chat_template: str | None = None
    prompt_length: int | None = None
    held_out: int = 0
    max_tokens: int | None = None
    seed: Seed = 0
    workers: int | None = None
    ray: str | None = None


if __name__ == "__main__":
    main(Arguments, lambda parsed: prepare(**asdict(parsed)), computes=False)
