"""How fast phase 2's text is written here: vLLM, the embedded engine and `transformers` generate, in turn in one run."""

import statistics

import torch
from transformers import AutoModelForCausalLM

from fms_spec.base_model import BaseModel
from fms_spec.timing import Stopwatch, timed
from pipelines.generate.engines import EmbeddedEngine
from pipelines.generate.vllm_engine import VLLMEngine
from pipelines.timer import in_turn, medians

BATCHES = (1, 4, 16, 48, 96)
ROUNDS = 4  # of each method at each batch; medians count


def benchmark_continuations(name, dtype, backend, prompts, settings):
    """One JSON value for each batch size, as an iterator.

    Args:
        prompts: int64 [p, n], used again where a batch holds more. settings: `GenerationSection`; all methods sample alike and end at EOS.
    """
    base_model = BaseModel(name, dtype=dtype, backend=backend)
    vllm = VLLMEngine(name, settings, prompts.shape[1], seed=0, dtype=dtype)
    methods = {
        "embedded": engine_method(EmbeddedEngine(settings, 0, base_model)),
        "transformers": generate_method(base_model, settings),
        "vllm": engine_method(vllm),
        "vllm_offline": offline_method(vllm),
    }
    try:
        for method in methods.values():  # the first call starts vLLM, chooses kernels and allocates
            method(prompts[:2], 0)
        inside = Stopwatch({"vllm": 0.0})  # in vLLM's own calls; what is left of an engine's time is the wrapper's
        engine = vllm.llm.llm_engine
        engine.step, engine.add_request = map(inside.measure("vllm"), (engine.step, engine.add_request))
        for batch in BATCHES:
            chosen = prompts[torch.arange(batch) % len(prompts)]

            def rate_and_share(write, number, chosen=chosen):
                before = inside.seconds["vllm"]
                tokens, seconds = timed(lambda: write(chosen, number))
                return tokens / seconds, 1 - (inside.seconds["vllm"] - before) / seconds

            results = in_turn(methods, range(1, 1 + ROUNDS), rate_and_share)
            rates = {method: [rate for rate, _ in pairs] for method, pairs in results.items()}
            yield result(batch, rates) | {"vllm_wrapper_share": statistics.median(share for _, share in results["vllm"])}
    finally:
        vllm.close()


def result(batch, rates):
    """rates: {method: tokens per second, round by round}. Ratios are medians over rounds, each of which has all methods side by side."""
    over = lambda method, other: statistics.median(ours / theirs for ours, theirs in zip(rates[method], rates[other]))  # noqa: E731
    return {
        "batch": batch, "tokens_per_s": medians(rates),
        "embedded_over_transformers": over("embedded", "transformers"), "vllm_over_transformers": over("vllm", "transformers"),
        "vllm_over_its_offline_generate": over("vllm", "vllm_offline"),
    }  # fmt: skip


def engine_method(engine):
    """Function (prompts [b, n], shard number) -> tokens written, through an engine as training uses it."""

    def write(prompts, index):
        engine.submit(index, prompts)
        tokens = 0
        while not engine.idle:
            tokens += sum(len(row) for _, rows, _ in engine.step() for row in rows)
        return tokens

    return write


def offline_method(engine):
    """The same through vLLM's own `LLM.generate`, on the engine's vLLM."""

    def write(prompts, index):
        inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        params = [engine.sampling_params(index, row) for row in range(len(prompts))]
        return sum(len(output.outputs[0].token_ids) for output in engine.llm.generate(inputs, params, use_tqdm=False))

    return write


def generate_method(base_model, settings):
    """The same through `transformers` generate; all prompts are equally long, so nothing is padded."""
    model = AutoModelForCausalLM.from_pretrained(base_model.path, dtype=base_model.dtype).to(base_model.device).eval()
    eos = sorted(base_model.eos_token_ids)
    sampling = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}

    def write(prompts, index):
        torch.manual_seed(index)
        output = model.generate(
            prompts.to(model.device), attention_mask=torch.ones_like(prompts), max_new_tokens=settings.max_new_tokens, eos_token_id=eos,
            pad_token_id=-1 % base_model.vocab_size, **sampling,
        )[:, prompts.shape[1] :]  # fmt: skip
        ended = torch.isin(output, torch.tensor(eos, device=output.device)).cumsum(1)
        return int((ended - torch.isin(output, torch.tensor(eos, device=output.device)).long() == 0).sum())  # up to the first EOS, with it

    return write
