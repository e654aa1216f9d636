"""Write phase 2's continuations: python -m scripts.generate_continuations --base_model=DIR --prompts=PREPARED --out_dir=DIR"""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.cli import arguments, main
from pipelines.config import Count, CountOrZero, Seed
from pipelines.generate.write import write_continuations


@arguments
class Arguments:
    """Have the base model continue a prepared folder's prompts, as Parquet shards that scripts.train reads (data.continuations).

    Stopped and started again, it goes on where it was; any number of processes share the work on one out_dir.

    Args:
        base_model: directory or hub name of the base model.
        prompts: a folder from scripts.prepare_data.
        out_dir: folder of the shards; manifest.json is written when all of them are there.
        engine: vllm, or embedded for the decoding of this project, which needs no other install.
        ray: HOST:PORT of a Ray cluster, or auto for the one that this machine is of: the engine runs on each of its GPUs, or nodes.
        max_tokens: end each continuation at so many tokens; generation.max_new_tokens of the run's config.
        temperature: 0 is greedy.
        top_k: sample from the so many likeliest tokens; 0 is off.
        top_p: sample from the likeliest tokens that together have this probability; 1 is off.
        seed: decides which prompts a shard holds, and the sampling; seed of the run's config.
        shard_prompts: prompts of a shard; generation.batch_size of the run's config.
        limit: continue only the first so many prompts; data.prompts of the run's config.
        shards: FROM:TO, write only the shards from FROM up to TO, without TO, e.g. to spread them over machines.
        memory_share: of a GPU's memory, for vLLM.
        dtype: bfloat16, float16 or float32.
        backend: auto, fms or transformers, for the embedded engine.
        ahead: begin no shard beyond so many after those a training run has begun; runs set it for their producers.
        parent: end when the process of this id is gone; runs set it for their producers.
        status: file that tells how far the work is, as JSON; runs set it for their producers.
    """

    base_model: str
    prompts: str
    out_dir: str
    engine: Literal["vllm", "embedded"] = "vllm"
    ray: str | None = None
    max_tokens: Count = 256
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: CountOrZero = 10
    top_p: float = 1.0
    seed: Seed = 0
    shard_prompts: Count = 96
    limit: Count | None = None
    shards: str | None = None
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "fms", "transformers"] = "auto"
    ahead: Count | None = None
    parent: Count | None = None
    status: str | None = None


if __name__ == "__main__":
    main(Arguments, write_continuations)
