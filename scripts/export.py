"""Write a trained speculator to serve: python -m scripts.export --checkpoint=RUN/checkpoints/step-N --out_dir=DIR"""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipelines.cli import arguments, main
from pipelines.export import export


@arguments
class Arguments:
    """Turn a training checkpoint into config.json and model.safetensors.

    Args:
        checkpoint: a checkpoint directory, or a run's out_dir for its newest one.
        out_dir: where to write; must not exist yet.
        draft_vocab_size: keep so many of the draft vocabulary's tokens, the most frequent in the run's prepared data and in what the base
            model wrote for its phase 2, and say how much of both they cover. All by default.
        layout: of eagle3 heads, "speculators" writes what that package reads. What is written by default, "vllm", is SGLang's too.
    """

    checkpoint: str
    out_dir: str
    draft_vocab_size: Annotated[int, Field(ge=2)] | None = None
    layout: str = "vllm"


def run(parsed):
    print(export(Path(parsed.checkpoint), Path(os.path.normpath(parsed.out_dir)), parsed.draft_vocab_size, parsed.layout))


if __name__ == "__main__":
    main(Arguments, run, computes=False)
