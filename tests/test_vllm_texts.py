"""Base models in the real vLLM, an oracle that shares no code with this one's: the texts are the same."""

import pytest
from conftest import need_vllm

need_vllm()

from architectures import write_architecture
from conftest import prompts_of
from vllm import SamplingParams
from vllm_helpers import SIZES, answers, serving

from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode
from fms_spec.options import DecodingOptions

# vLLM's attention on a CPU takes heads from 32 coordinates on; two of the models have no other lm_head than their embedding there.
SERVED = {
    "Llama, linear scaling": {}, "Llama, YaRN": {}, "Mistral, sliding window": {}, "Qwen3": {}, "Gemma 2": {"tie_word_embeddings": True},
    "Gemma 3 (text)": {}, "gpt-oss": {}, "Phi-3": {}, "Cohere": {"tie_word_embeddings": True}, "Granite": {}, "OLMo 3": {}, "Exaone 4": {},
}  # fmt: skip


@pytest.mark.parametrize("label", SERVED)
def test_greedy_texts_are_those_of_vllm(tmp_path, label):
    directory = write_architecture(tmp_path / "model", label, **SIZES | {"head_dim": 32} | SERVED[label])
    prompts = prompts_of(5, 9, 17, 24, 30, 33, 40, 60)
    ours, _ = decode(BaseModel(str(directory), dtype="float32", device="cpu"), prompts, DecodingOptions(max_new_tokens=40, ignore_eos=True))
    with serving(directory, num_gpu_blocks_override=64) as llm:  # room for windows beside whole texts, however many batches are in flight
        theirs = answers(llm, prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert [text.tokens for text in ours] == [tokens for tokens, _ in theirs]
