"""Write a trained speculator to serve: python -m scripts.export --checkpoint=RUN/checkpoints/step-N --out_dir=DIR"""

import os
from pathlib import Path

from pipelines.cli import arguments, main
from pipelines.export import export


@arguments
class Arguments:
    """Turn a training checkpoint into config.json and model.safetensors.

    Args:
        checkpoint: a checkpoint directory, or a run's out_dir for its newest one.
        out_dir: where to write; must not exist yet.
    """

    checkpoint: str
    out_dir: str


def run(parsed):
    print(export(Path(parsed.checkpoint), Path(os.path.normpath(parsed.out_dir))))


if __name__ == "__main__":
    main(Arguments, run, computes=False)
