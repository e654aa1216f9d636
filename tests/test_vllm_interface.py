"""What the plugin needs of vLLM, read out of its sources: `python tests/test_vllm_interface.py DIR` reads those of a wheel that isn't
installed."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

# What is read, called or filled in; of a class its fields and methods, of a function its parameters.
NEEDED = {
    "config/speculative.py": {
        "SpeculativeConfig": "method model num_speculative_tokens revision draft_model_config target_model_config target_parallel_config"
        " parallel_drafting use_local_argmax_reduction draft_sample_method"
    },
    "engine/arg_utils.py": {"EngineArgs": "speculative_config create_speculative_config"},
    "forward_context.py": {"ForwardContext": "attn_metadata", "get_forward_context": ""},
    "model_executor/layers/attention_layer_base.py": {
        "AttentionLayerBase": "bind_kv_cache get_attn_backend get_kv_cache_spec supports_dcp"
    },
    "model_executor/models/registry.py": {"_ModelRegistry.register_model": "model_arch model_cls"},
    "transformers_utils/repo_utils.py": {"get_hf_file_to_dict": "file_name model revision"},
    "v1/attention/backend.py": {
        "AttentionMetadataBuilder.build": "common_prefix_len common_attn_metadata fast_build",
        "CommonAttentionMetadata": "slot_mapping block_table_tensor max_seq_len",
    },
    "v1/kv_cache_interface.py": {
        "FullAttentionSpec": "", "AttentionSpec": "num_kv_heads head_size head_size_v dtype", "KVCacheSpec": "block_size"
    },
}  # fmt: skip
# A class of ours defines all that is abstract in these; vLLM's own `__init__`s are called.
ABSTRACT = {
    "model_executor/layers/attention_layer_base.py": {"AttentionLayerBase": "get_attn_backend get_kv_cache_spec"},
    "v1/attention/backend.py": {
        "AttentionBackend": "get_builder_cls get_impl_cls get_name", "AttentionImpl": "__init__ forward",
        "AttentionMetadataBuilder": "__init__ build",
    },
}  # fmt: skip
# Words of the code that runs a draft model, on which its class counts.
SAID = {
    "transformers_utils/config.py": ["_CONFIG_REGISTRY"],
    "transformers_utils/configs/eagle.py": ['startswith("Eagle")'],
    "v1/spec_decode/llm_base_proposer.py": [
        "has_own_embed_tokens", "has_own_lm_head", "self.model.lm_head = ", "self.model.model.embed_tokens = ",
        "self.model.get_top_tokens(hidden_states)", "self.model.mask_hidden", "draft_token_ids.view(-1, self.num_speculative_tokens)",
        "model_hf_config.mask_token_id", "last_hidden_states[token_indices_to_sample]",
    ],
}  # fmt: skip


def changes(root):
    """What vLLM's sources in `root` lack of all this, a line each."""
    found = []
    for file in sorted({*NEEDED, *ABSTRACT, *SAID}):
        if not (root / file).is_file():
            found.append(f"vLLM has no {file} any more")
            continue
        text = (root / file).read_text()
        known = names(ast.parse(text))
        for owner, needed in NEEDED.get(file, {}).items():
            missing = sorted({*needed.split()} - known.get(owner, {}).keys()) if owner in known else ["it at all"]
            found += [f"vLLM's {file}: {owner} has no {name}" for name in missing]
        for owner, abstract in ABSTRACT.get(file, {}).items():
            wanted = sorted(name for name, is_abstract in known.get(owner, {}).items() if is_abstract)
            if wanted != sorted(abstract.split()):
                found.append(f"vLLM's {file}: {owner} wants {wanted} defined, not {abstract.split()}")
        found += [f"vLLM's {file} doesn't say {words!r} any more" for words in SAID.get(file, []) if words not in text]
    return found


def names(tree):
    """{class, function or class.method: {its fields, methods or parameters: whether that is abstract}}."""
    known = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            known[node.name] = parameters(node)
        if isinstance(node, ast.ClassDef):
            own = known[node.name] = {}
            for part in node.body:
                if isinstance(part, ast.AnnAssign | ast.Assign):
                    targets = [part.target] if isinstance(part, ast.AnnAssign) else part.targets
                    own |= {target.id: False for target in targets if isinstance(target, ast.Name)}
                if isinstance(part, ast.FunctionDef):
                    own[part.name] = any(isinstance(mark, ast.Name) and mark.id == "abstractmethod" for mark in part.decorator_list)
                    known[f"{node.name}.{part.name}"] = parameters(part)
    return known


def parameters(function):
    return {argument.arg: False for argument in (*function.args.args, *function.args.kwonlyargs)}


def test_the_installed_vllm_has_everything_that_the_plugin_needs():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    assert changes(Path(importlib.util.find_spec("vllm").origin).parent) == []


def test_what_a_vllm_lacks_is_told_in_a_line_each(tmp_path):
    (tmp_path / "forward_context.py").write_text("class ForwardContext:\n    other: int\n")
    told = changes(tmp_path)
    assert "vLLM's forward_context.py: ForwardContext has no attn_metadata" in told
    assert "vLLM's forward_context.py: get_forward_context has no it at all" in told
    assert "vLLM has no config/speculative.py any more" in told


if __name__ == "__main__":
    print("\n".join(changes(Path(sys.argv[1]))) or "nothing has changed")
