"""Writing continuations, as a run or `scripts.generate_continuations` has them written."""

from data.continuations.store import ContinuationStore
from data.reader import check_tokenizer, check_vocabulary, read_manifest
from fms_spec.base_model import read_config, resolve_base_model
from fms_spec.weights import fingerprint
from pipelines.generate.engines import check_context, describe_generation


def open_store(out_dir, data_dir, prompts, base_model, settings, seed):
    """The `ContinuationStore` in `out_dir` for the prompts of `data_dir`, refused where they don't fit; loads no weights.

    base_model: `BaseModelSection`. settings: `GenerationSection`.

    Raises:
        UserError: no such base model, another tokenizer, tokens that the model lacks, texts over the context, a setting out of range, or
            shards of other settings.
    """
    path = resolve_base_model(base_model.name)
    check_tokenizer(read_manifest(data_dir), path)
    check_vocabulary(data_dir, read_config(path).vocab_size)
    check_context(path, prompts.tokens.shape[1], settings.max_new_tokens)
    described = describe_generation(settings, fingerprint(path), base_model.dtype)
    return ContinuationStore(out_dir, prompts, shard_prompts=settings.batch_size, settings=described, seed=seed)


def command_of(config, out_dir):
    """The words behind `python` that write to `out_dir` what a run with `config` (`RunConfig`) reads."""
    settings = config.generation
    flags = {
        "base_model": config.base_model.name, "prompts": config.data.dir, "out_dir": out_dir, "engine": settings.engine,
        "max_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
        "seed": config.seed, "shard_prompts": settings.batch_size, "limit": config.data.prompts, "memory_share": settings.memory_share,
        "dtype": config.base_model.dtype, "backend": config.base_model.backend,
    }  # fmt: skip
    return ["-m", "scripts.generate_continuations", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]
