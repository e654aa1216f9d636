"""vLLM as the engine of phase 2: rows of any shards in flight at once, so that its batch is never drained between two shards.

Shapes: p prompts of a shard.
"""

import math
import os
import sys
from threading import Thread

import torch

from data.progress import progress
from fms_spec.errors import UserError
from fms_spec.model_config import DTYPES, attention_heads, head_width, read_config, read_eos_token_ids, resolve_base_model
from fms_spec.proof import FLOATS
from fms_spec.seeds import mixed
from fms_spec.vllm.versions import installed_vllm
from fms_spec.weights import read_entries

QUEUED = 1.25  # requests handed over, as a multiple of those it runs together: enough that it never waits for us
DEATHS = 3  # in a row, without a finished row between them
CPU_ROWS, CPU_MEMORY = 256, 0.5  # without a GPU: rows together, unless their caches need more than this share of the free memory
CACHE_BLOCK = 128  # tokens; a row's cache is rounded up to whole blocks
# Bytes that vLLM's process takes besides the share it was given: a CUDA context, NCCL's buffers, and room to grow; not measured here.
GPU_OVERHEAD = 2 * 2**30


def need_vllm(what):
    """Raise UserError where there is no vLLM that the plugin was tried with. what: needs it."""
    _, problem = installed_vllm()
    if problem:
        raise UserError(f"{what} needs vLLM: {problem}; pip install 'fms-spec[vllm]'")


class VLLMEngine:
    """Runs vLLM in processes of its own; starts it when the first shard is handed over, and again when it dies.

    What was finished when it died is kept; the other rows are asked for again.

    Args:
        name: the base model's directory or hub name. settings: the config's `GenerationSection`. sleeps: give the device's memory back
        whenever nothing is in flight, for a device that is shared with training.

    Raises:
        UserError: no vLLM, no such base model, or a GPU that has no room for it.
    """

    def __init__(self, name, settings, prompt_length, seed, dtype="bfloat16", sleeps=False):
        version, _ = installed_vllm()
        if version is None:
            raise UserError("generation by vLLM: vLLM is not installed; install fms-spec[vllm], or take the embedded engine")
        self.path = resolve_base_model(name)
        self.settings, self.seed, self.dtype = settings, seed, dtype
        self.length = prompt_length + settings.max_new_tokens
        self.stop = sorted(read_eos_token_ids(self.path, read_config(self.path)))
        self.sleeping = {"enable_sleep_mode": True} if sleeps else {}
        self.llm, self.bar, self.deaths = None, None, 0
        self.asleep, self.lent = False, 0  # lent: bytes of the GPU that it gave back to sleep, and wants again
        self.stepped = False  # whether it has run once since it was started
        device_settings(self.path, dtype, self.length, settings.memory_share)  # refuses before the run's first step
        self.prompts, self.results, self.waiting = {}, {}, set()  # by shard: p prompts, {row: (tokens, reason)}; (shard, row) in flight

    def use(self, base_model):
        """vLLM's processes load one of their own."""

    @property
    def idle(self):
        return not self.prompts

    @property
    def wants_more(self):
        """Whether another shard would find room; always while there is none."""
        return self.idle or len(self.waiting) < QUEUED * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs

    def submit(self, index, prompts):
        """Hand over the prompts of a shard: a list of p int64 [length]."""
        self.prompts[index], self.results[index] = prompts, {}
        self.waiting |= {(index, row) for row in range(len(prompts))}
        if self.llm is None:
            self.start(index)
        elif self.asleep:
            self.wake(index)
        self.ask([(index, row) for row in range(len(prompts))])

    def step(self):
        """Let vLLM run once; returns the shards that finished: (index, list of p int64 [n], list of p finish reasons).

        Raises:
            UserError: it died too often, or ended a row for another reason than its end or its length.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            outputs = self.llm.llm_engine.step()
        except EngineDeadError:
            self.restart()
            return []
        self.stepped = True
        for output in outputs:
            if output.finished:
                self.deaths = 0
                index, row = map(int, output.request_id.split("-")[:2])
                (written,) = output.outputs
                if written.finish_reason not in ("stop", "length"):
                    raise UserError(f"vLLM gave up row {row} of shard {index} ({written.finish_reason}); its log above says why")
                self.results[index][row] = (torch.tensor(written.token_ids), written.finish_reason)
                self.bar.update(len(written.token_ids))
                self.waiting.discard((index, row))
        whole = [index for index, prompts in self.prompts.items() if len(self.results[index]) == len(prompts)]
        finished = []
        for index in whole:
            rows = [self.results[index][row] for row in range(len(self.prompts.pop(index)))]
            del self.results[index]
            finished.append((index, *map(list, zip(*rows))))
        if self.sleeping and self.idle and finished:
            held = gpu_memory()[0]
            self.llm.sleep(level=1)
            self.asleep, self.lent = True, gpu_memory()[0] - held
        return finished

    def wake(self, index):
        """Wake vLLM; where training has come to need some of what it gave back, start it again with less. index: of the next shard."""
        self.asleep = False
        if gpu_memory()[0] < self.lent:
            self.close()
            self.start(index)
        else:
            self.llm.wake_up()

    def ask(self, rows):
        """Queue (shard, row) pairs."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            for index, row in rows:
                prompt = {"prompt_token_ids": self.prompts[index][row].tolist()}
                self.llm.llm_engine.add_request(f"{index}-{row}", prompt, self.sampling_params(index, row))
        except EngineDeadError:
            self.restart()

    def sampling_params(self, index, row):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self.settings
        # A seed for each row kills vLLM 0.32 on a CPU: its sampler asks CPU generators for an offset they don't have.
        seed = mixed(self.seed, index, row) if torch.cuda.is_available() else None
        return SamplingParams(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, max_tokens=settings.max_new_tokens,
            stop_token_ids=self.stop, seed=seed, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def start(self, index):
        """Start vLLM; the number of the first shard keeps processes that share a table from drawing the same numbers."""
        self.llm = start_vllm(
            self.path, self.dtype, self.length, self.settings.memory_share, seed=mixed(self.seed, index) % 2**32,
            enable_prefix_caching=False, **self.sleeping,
        )  # fmt: skip
        self.stepped = False
        if self.bar is None:  # not `or`: a bar without a total has no truth
            self.bar = progress(desc="vLLM", unit="token", unit_scale=True, leave=False)
        Thread(target=wake_when_dead, args=[self.llm.llm_engine.engine_core], daemon=True).start()

    def restart(self):
        """Start vLLM again after it died and ask for what it had not finished.

        Raises:
            UserError: it died too often, or in its first step: so does every other one.
        """
        self.deaths, self.asleep = self.deaths + 1, False
        self.close()
        if not self.stepped:
            raise UserError("vLLM died in its first step; its log above says why")
        if self.deaths == DEATHS:
            raise UserError(f"vLLM died {DEATHS} times in a row without finishing a row; its log above says why")
        rows = sorted(self.waiting)
        print(f"vLLM died (its log above says why): starting it again, {len(rows)} rows are asked for again", file=sys.stderr, flush=True)
        self.start(rows[0][0])
        self.ask(rows)

    def close(self):
        """Stop vLLM's processes."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None


def start_vllm(path, dtype, length, memory_share=0.9, **settings):
    """An `LLM` in processes of its own, for texts of up to `length` tokens; settings: more of its arguments.

    memory_share: the most that it takes of a GPU's memory.

    Raises:
        UserError: it does not start, or the GPU has no room for it.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a process with threads and a model doesn't survive a fork
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # it keeps a core for itself otherwise, half of two
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    device = device_settings(path, dtype, length, memory_share)
    try:
        return LLM(str(path), dtype=dtype, max_model_len=length, use_tqdm_on_load=sys.stderr.isatty(), **device, **settings)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"vLLM did not start ({str(error).strip().splitlines()[-1][:200]}); its log above says why") from error


def device_settings(path, dtype, length, memory_share):
    """What vLLM is told of this machine: of a GPU the share of all its memory, no more than is free; of a CPU rows and bytes of caches.

    Raises:
        UserError: a GPU with too little for the weights and the cache of one row.
    """
    row = row_bytes(read_config(path), dtype, length)
    if not torch.cuda.is_available():
        import psutil  # vLLM needs it too, and would take nearly the whole machine's memory by itself

        caches = int(min(CPU_ROWS * row, CPU_MEMORY * psutil.virtual_memory().available))
        return {"max_num_seqs": CPU_ROWS, "kv_cache_memory_bytes": caches, "enforce_eager": True}
    free, total = gpu_memory()
    room, need = min(free - GPU_OVERHEAD, memory_share * total), weight_bytes(path, dtype) + row
    if room < need:
        raise UserError(
            f"vLLM: the weights of {path} and one row's cache take {need / 1e9:.1f} GB, and of the GPU's {total / 1e9:.1f} GB it may have "
            f"{max(0, room) / 1e9:.1f} ({free / 1e9:.1f} are free, memory_share is {memory_share:.2g}); make room, or give it a GPU of its "
            "own, as generation.mode=ahead and alongside do"
        )
    return {"gpu_memory_utilization": room / total}


def row_bytes(config, dtype, length):
    """Bytes of the cache of one text of `length` tokens."""
    token = 2 * config.num_hidden_layers * attention_heads(config)[1] * head_width(config) * DTYPES[dtype].itemsize
    return token * -(-length // CACHE_BLOCK) * CACHE_BLOCK


def weight_bytes(path, dtype):
    """Bytes of a base model's weights in `dtype`; quantised ones as they are in the files."""
    entries = read_entries(path).values()
    return sum(math.prod(one.shape) * DTYPES[dtype].itemsize if one.dtype in FLOATS else one.end - one.start for one in entries)


def gpu_memory():
    """(free, all) bytes of this process's GPU, after torch has given back what it only keeps for its next tensors."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()


def wake_when_dead(client):
    """Let `step` raise when vLLM's process is gone: killed from outside, it would leave the caller waiting for its next output for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    client.output_queue_thread.join()
    client.outputs_queue.put(EngineDeadError())
