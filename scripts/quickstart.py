"""The whole way on one machine: python -m scripts.quickstart --out_dir=quickstart [--chat] [--scale=1.0]"""

from pathlib import Path

from pipelines.cli import arguments, main
from pipelines.quickstart import quickstart


@arguments
class Arguments:
    """Prepare data, train both phases, export, and measure a speculator for SmolLM2-135M-Instruct on Python's own sources, or for chat.

    Stopped and started again with the same flags, it goes on where it was.

    Args:
        out_dir: where everything goes; report.json at the end.
        chat: take conversations for text, which the base model writes itself, its users' questions included.
        scale: share of the full budget of text, steps and prompts; 0.05 takes about two minutes on two cores.
    """

    out_dir: str
    chat: bool = False
    scale: float = 1.0


def run(parsed):
    quickstart(Path(parsed.out_dir), parsed.scale, parsed.chat)


if __name__ == "__main__":
    main(Arguments, run)
