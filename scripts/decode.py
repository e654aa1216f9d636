"""Continue a prompt: python -m scripts.decode --base_model=DIR --speculator=DIR --prompt='def fibonacci(n):' [--temperature=0.8]"""

from typing import Literal

from pipelines.cli import arguments, main
from pipelines.config import Seed
from pipelines.stream import stream


@arguments
class Arguments:
    """Stream the base model's continuation of a prompt, written with a speculator's help, and say how fast it went.

    Args:
        base_model: directory or hub name.
        prompt: text to be continued.
        speculator: directory written by scripts.export, a published MLP, EAGLE-3 or Medusa speculator, or prompt_lookup; none by default.
        chat: take the prompt as a user's turn and apply the base model's chat template.
        max_new_tokens: at most so many tokens.
        min_new_tokens: no end of text, and no stop string, before so many.
        stop: text that ends the continuation and is left out of it, or a list of such texts.
        temperature: 0 for the likeliest token, higher for more chance.
        top_k: sample among the so many likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of sampling.
        lookahead: depth of the candidates; what the speculator was trained for by default.
        top_k_per_head: children of each candidate, level by level, as in 3,2,1; a chain by default.
        nodes: draft the so many likeliest candidates instead, as a tree.
        min_probability: end a chain after a candidate that the heads hold less likely than this to be accepted; 0 never.
        lookup: where the last three tokens stood in the text before, try the so many that followed there, without the heads; 0 for none.
        mark: show the tokens that were accepted candidates in green.
        compare: decode plainly as well and report the speed-up.
        dtype: bfloat16, float16 or float32.
        backend: auto, fms or transformers.
    """

    base_model: str
    prompt: str
    speculator: str | None = None
    chat: bool = False
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: str | list[str] | tuple[str, ...] = ()
    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    seed: Seed = 0
    lookahead: int | None = None
    top_k_per_head: tuple[int, ...] | int | None = None
    nodes: int | None = None
    min_probability: float | int = 0.0
    lookup: int = 0
    mark: bool = False
    compare: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"


if __name__ == "__main__":
    main(Arguments, stream)
