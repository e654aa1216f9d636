"""Tiny random base models of many architectures, each with what makes it differ from Llama switched on."""

import torch
import transformers
from conftest import WORDS, write_tokenizer

SIZES = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=None, tie_word_embeddings=False, initializer_range=0.3,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 128,
}  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, num_key_value_heads=4)

# {label: (transformers' name of the family, changes of its config)}
MODELS = {
    "Llama": ("Llama", {}),
    "Llama 3.1, 3.2, 3.3": ("Llama", dict(rope_parameters=LLAMA3)),
    "Llama, linear scaling": ("Llama", dict(rope_parameters=LINEAR)),
    "Llama, YaRN": ("Llama", dict(rope_parameters=YARN)),
    "Llama, dynamic scaling": ("Llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
    "Llama, biases and tied lm_head": ("Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "Llama, another activation": ("Llama", dict(hidden_act="gelu")),
    "Llama, own head width": ("Llama", dict(head_dim=16)),
    "Mistral": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "Mistral, sliding window": ("Mistral", dict(sliding_window=16)),
    "Ministral": ("Ministral", dict(head_dim=8, sliding_window=16, layer_types=MIXED)),
    "Mixtral": ("Mixtral", dict(sliding_window=None, **EXPERTS)),
    "Granite": ("Granite", dict(logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2)),
    "Granite MoE": ("GraniteMoe", dict(**EXPERTS, logits_scaling=4.0, attention_multiplier=0.2)),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, sliding windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "Qwen2 MoE": ("Qwen2Moe", dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=32, mlp_only_layers=[0],
    )),
    "Qwen3": ("Qwen3", dict(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e6}, intermediate_size=72)),
    "Qwen3 MoE": ("Qwen3Moe", dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "Gemma": ("Gemma", dict(head_dim=16)),
    "Gemma 2": ("Gemma2", dict(
        head_dim=16, sliding_window=16, query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=5.0,
    )),
    "Gemma 3 (text)": ("Gemma3Text", dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=24, layer_types=MIXED)),
    "gpt-oss": ("GptOss", dict(head_dim=16, **EXPERTS, sliding_window=16)),
    "Phi": ("Phi", dict(num_key_value_heads=4)),
    "Phi-3": ("Phi3", dict(sliding_window=16)),
    "Phi-3, longrope": ("Phi3", dict(sliding_window=None, original_max_position_embeddings=128, rope_parameters=LONGROPE)),
    "Phi MoE": ("Phimoe", dict(**EXPERTS, lm_head_bias=True, sliding_window=None)),
    "OLMo": ("Olmo", dict(clip_qkv=2.0)),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", dict(sliding_window=16, layer_types=MIXED)),
    "OLMoE": ("Olmoe", dict(num_experts=4, num_experts_per_tok=2)),
    "Cohere": ("Cohere", dict(logit_scale=0.0625)),
    "Cohere 2": ("Cohere2", dict(logit_scale=0.25, sliding_window=16, layer_types=MIXED)),
    "StableLM": ("StableLm", {}),
    "Nemotron": ("Nemotron", {}),
    "SmolLM3": ("SmolLM3", dict(no_rope_layers=[1, 1, 0])),
    "Exaone 4": ("Exaone4", dict(sliding_window=16, sliding_window_pattern=None, layer_types=MIXED)),
    "StarCoder 2": ("Starcoder2", dict(sliding_window=16)),
    "GLM": ("Glm", dict(head_dim=16)),
    "GLM 4": ("Glm4", dict(head_dim=16)),
    "GLM 4 MoE": ("Glm4Moe", ROUTED | dict(head_dim=16)),
    "Helium": ("Helium", dict(head_dim=8)),
    "Seed-OSS": ("SeedOss", dict(head_dim=16)),
    "Ernie 4.5": ("Ernie4_5", dict(head_dim=16)),
    "Hunyuan dense": ("HunYuanDenseV1", dict(head_dim=16)),
    "Arcee": ("Arcee", {}),
    "Apertus": ("Apertus", {}),
    "MiniMax M2": ("MiniMaxM2", dict(head_dim=16, **EXPERTS)),
    "GPT-2": ("GPT2", dict(num_key_value_heads=None)),
    "GPT-NeoX": ("GPTNeoX", dict(num_key_value_heads=None)),
    "OPT": ("OPT", dict(num_key_value_heads=None, ffn_dim=64, word_embed_proj_dim=32)),
    "GPT-J": ("GPTJ", dict(num_key_value_heads=None, rotary_dim=8)),
    "Bloom": ("Bloom", dict(num_key_value_heads=None)),
    "MPT": ("Mpt", {}),
    "Falcon": ("Falcon", {}),
    "GPT-BigCode": ("GPTBigCode", dict(num_key_value_heads=1)),
    "DeepSeek V3": ("DeepseekV3", ROUTED | LATENT | dict(first_k_dense_replace=1)),
    "Llama 4 (text)": ("Llama4Text", dict(head_dim=16, num_local_experts=2, intermediate_size_mlp=64)),
    "Ministral 3": ("Ministral3", dict(head_dim=16, sliding_window=None)),
    "Gemma 3 (with images)": ("Gemma3", dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=24, layer_types=MIXED)),
    "Gemma 3n (text)": ("Gemma3nText", dict(
        head_dim=16, sliding_window=16, layer_types=MIXED, intermediate_size=[64] * 3, num_kv_shared_layers=1,
        vocab_size_per_layer_input=WORDS, activation_sparsity_pattern=[0.0] * 3,
    )),
    "Gemma 4 (text), heads of one width": ("Gemma4Text", dict(
        head_dim=16, global_head_dim=16, num_global_key_value_heads=2, sliding_window=16, layer_types=MIXED,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    )),
    "Gemma 4 (text), heads of two widths": ("Gemma4Text", dict(
        head_dim=16, global_head_dim=32, num_global_key_value_heads=2, sliding_window=16, layer_types=MIXED,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    )),
    "VaultGemma": ("VaultGemma", dict(head_dim=16, sliding_window=16, layer_types=MIXED)),
    "CWM": ("Cwm", dict(bos_token_id=1, head_dim=16, sliding_window=16, layer_types=MIXED)),
    "dots.llm1": ("Dots1", ROUTED | dict(head_dim=16, first_k_dense_replace=1, n_shared_experts=1)),
    "DiffLlama": ("DiffLlama", {}),
    "BitNet": ("BitNet", {}),
    "Persimmon": ("Persimmon", dict(num_key_value_heads=None)),
    "Doge": ("Doge", {}),
    "LFM2": ("Lfm2", dict(layer_types=["conv", "full_attention", "conv"])),
    "CodeGen": ("CodeGen", dict(num_key_value_heads=None, rotary_dim=8)),
    "Nemotron-H": ("NemotronH", {}),
    "Bamba": ("Bamba", dict(mamba_n_heads=8, mamba_d_head=8)),
    "Mamba": ("Mamba", {}),
    "Mamba 2": ("Mamba2", dict(num_heads=8, head_dim=8)),
    "Jamba": ("Jamba", dict(use_mamba_kernels=False, num_experts=2)),
    "Falcon H1": ("FalconH1", {}),
    "Qwen3-Next": ("Qwen3Next", dict(head_dim=16)),
    "Granite MoE hybrid": ("GraniteMoeHybrid", dict(layer_types=["mamba", "attention", "mamba"], mamba_n_heads=8, mamba_d_head=8)),
    "RecurrentGemma": ("RecurrentGemma", {}),
}  # fmt: skip


def write_architecture(directory, label, seed=0, **more):
    """Its config, with `more` changed, random weights with biases and sinks that matter, and a tokenizer."""
    family, changes = MODELS[label]
    config, changes = getattr(transformers, f"{family}Config"), SIZES | changes | more
    config = config(**changes) if "text_config" not in config.sub_configs else config(text_config=changes, vision_config=VISION)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "bias" in name or "sinks" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory
