"""Conversations by the base model itself: python -m scripts.generate_conversations --base_model=DIR --conversations=N --out_dir=DIR"""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.cli import arguments, main
from pipelines.config import Count, CountOrZero, Seed
from pipelines.generate.conversations import write_conversations
from pipelines.generate.write import sections_of


@arguments
class Arguments:
    """Have the base model write conversations, its own questions included, or write the answers of given ones anew, turn by turn.

    conversations.jsonl in out_dir is a --source of scripts.prepare_data. Stopped and started again, it goes on where it was; any number of
    processes share the work on one out_dir.

    Args:
        base_model: directory or hub name of the base model.
        out_dir: folder of the conversations, and of what was written turn by turn.
        source: conversations whose answers are written anew, as scripts.prepare_data takes them; without it the questions are written too.
        conversations: how many; of a source the first so many, all by default.
        questions: of each conversation that is written from nothing.
        format: what the source's rows hold: see scripts.prepare_data.
        chat_template: a Jinja file that conversations are written by; the tokenizer's own template otherwise.
        engine: vllm, or embedded for the decoding of this project, which needs no other install.
        max_tokens: a turn that has no end within so many tokens is left out.
        temperature: 0 is greedy.
        top_k: sample from the so many likeliest tokens; 0 is off.
        top_p: sample from the likeliest tokens that together have this probability; 1 is off.
        seed: decides the sampling, and the order of a source's files.
        shard_prompts: conversations of a shard.
        memory_share: of a GPU's memory, for vLLM.
        dtype: bfloat16, float16 or float32.
        backend: auto, fms or transformers, for the embedded engine.
    """

    base_model: str
    out_dir: str
    source: str | None = None
    conversations: Count | None = None
    questions: Count = 1
    format: str | None = None
    chat_template: str | None = None
    engine: Literal["vllm", "embedded"] = "vllm"
    max_tokens: Count = 1024
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: CountOrZero = 10
    top_p: float = 1.0
    seed: Seed = 0
    shard_prompts: Count = 96
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"


def run(parsed):
    settings, base_model = sections_of(parsed)
    flags = ("source", "conversations", "questions", "format", "chat_template", "seed")
    write_conversations(base_model, settings, parsed.out_dir, **{name: getattr(parsed, name) for name in flags})


if __name__ == "__main__":
    main(Arguments, run)
