"""Look at prepared data before it is trained on: python -m scripts.inspect_data DIR [--row=N] [--html=page.html]"""

from typing import Annotated, ClassVar

from pydantic import Field

from pipelines.cli import arguments, main
from pipelines.show.prepared import print_prepared


@arguments
class Arguments:
    """Print what a prepared folder holds, how long its texts are, what was left out, and its first rows with what is trained on in colour.

    Args:
        data: the folder, from scripts.prepare_data; its name may stand alone.
        row: show this row alone, counted from 0.
        html: write it all as one page there instead.
        tokenizer: the tokenizer's folder or Hub name, if it is no longer where the data was prepared with it.
    """

    FIRST: ClassVar[str] = "data"
    data: str
    row: Annotated[int, Field(ge=0)] | None = None
    html: str | None = None
    tokenizer: str | None = None


def run(parsed):
    print_prepared(parsed.data, parsed.row, parsed.tokenizer, parsed.html)


if __name__ == "__main__":
    main(Arguments, run, computes=False)
