"""Look at prepared data before it is trained on: python -m scripts.inspect_data DIR [--row=N]"""

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
        tokenizer: the tokenizer's folder or Hub name, if it is no longer where the data was prepared with it.
    """

    FIRST: ClassVar[str] = "data"
    data: str
    row: Annotated[int, Field(ge=0)] | None = None
    tokenizer: str | None = None


if __name__ == "__main__":
    main(Arguments, lambda parsed: print_prepared(parsed.data, parsed.row, parsed.tokenizer), computes=False)
