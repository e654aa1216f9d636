"""Tiny real models, tokenizers and prepared data, made on the spot: no network, no GPU."""

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["VLLM_NO_USAGE_STATS"] = "1"  # vLLM would report each start over the network
# Two threads of a process wait for each other wherever another one runs: beside two others 33 tests took over 280 s, with one thread 26.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.prepare.run import prepare
from fms_spec.base_model import BaseModel
from fms_spec.candidates import Candidates, Tree
from fms_spec.lookup import LookupFirst, PromptLookup
from fms_spec.proposers import BestNodesProposer, TopKProposer
from fms_spec.speculators.directory import check_speculator, give, read_speculator
from fms_spec.speculators.eagle3 import Eagle3Speculator
from fms_spec.speculators.hidden_state import HiddenStateSpeculator
from fms_spec.speculators.medusa import MedusaSpeculator
from fms_spec.speculators.mlp import MLPSpeculator
from pipelines.config import load_config

WORDS = 96


def pytest_configure(config):
    """Hide GPUs from all tests, and what they start, but those of `pytest -m gpu`: they are of exact figures, or many processes."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing has asked torch for a GPU yet


def pytest_ignore_collect(collection_path, config):
    """`pytest -m "not slow"` leaves out vLLM, which takes seconds to import."""
    return True if config.option.markexpr == "not slow" and collection_path.name.startswith("test_vllm") else None


# Each takes from 200 seconds (the first) to 15 (the last but vLLM's) of one core.
LONGEST = ["test_quickstart", "test_parallel", "test_plan", "test_scripts", "test_compiled", "test_cluster", "test_run_folder",
           "test_generation_modes", "test_decoding", "test_recipe",
           "test_train_step_benchmark", "test_vllm_serving", "test_vllm_continuations"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no worker waits long for the other; vLLM's last: it changes classes of transformers."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.path.stem.startswith("test_vllm"), order.get(item.path.stem, len(order))))


def need_vllm():
    """Skip a module of tests where no vLLM is installed that runs without a GPU."""
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm installs it)")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM needs a GPU, and pytest -m gpu tries it there", allow_module_level=True)


def write_tokenizer(directory, words=WORDS):
    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(words - 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory)


def write_model(directory, seed=0, kind="llama", **changes):
    """A random model with grouped-query heads and sharp logits, so that greedy continuations don't hang on rounding."""
    torch.manual_seed(seed)
    values = dict(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=None, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    if kind == "granite":
        config = GraniteConfig(**values, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2)
        GraniteForCausalLM(config).save_pretrained(directory)
    else:
        LlamaForCausalLM(LlamaConfig(**values | changes)).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def shared_base_model(model_dir):
    return BaseModel(str(model_dir), dtype="float32", device="cpu")


@pytest.fixture
def base_model(shared_base_model):
    """The same model in all tests of a process, without the inner layers that the test before may have asked it for."""
    shared_base_model.give_layers(())
    return shared_base_model


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """Twelve documents of 40 to 150 words."""
    directory = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        words = torch.randint(0, WORDS - 2, (40 + 10 * i,), generator=generator).tolist()
        (directory / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words))
    return directory


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, corpus_dir, model_dir):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare(source=str(corpus_dir), tokenizer=str(model_dir), out_dir=str(directory), seq_length=64, prompt_length=8, held_out=3)
    return directory


HEADS = {"hidden_state": ", width: 16, inner_dim: 24, draft_vocab_size: 64", "mlp": ", inner_dim: 24",
         "eagle3": ", draft_vocab_size: 64, base_layers: [0, 1, 2]"}  # fmt: skip


def write_config(path, model_dir, data_dir, family="hidden_state", **changes):
    """A run of seconds, written to `path`; changes: {"section.key": value}, as on the command line. Returns the `RunConfig`."""
    path.write_text(f"""
base_model: {{name: {model_dir}, dtype: float32}}
speculator: {{family: {family}, n_predict: 3{HEADS.get(family, "")}}}
data: {{dir: {data_dir}}}
schedule: {{steps: 9}}
phase1: {{batch_size: 3, accumulate: 2, positions: 40,
  loss: {{cross_entropy: 0.5, distillation: 1.0, smooth_l1: {0.1 if family == "hidden_state" else 0.0}}}}}
phase2: {{batch_size: 4, loss: {{cross_entropy: 1.0, only_accepted: true}}}}
generation: {{batch_size: 5, max_new_tokens: 12, temperature: 0.8, top_k: 10}}
optimizer: {{lr: 0.01}}
validation: {{every: 4, prompts: 2, max_new_tokens: 20}}
checkpoint: {{every: 2}}
log_every: 1
""")
    return load_config(path, [f"{key}={value}" for key, value in changes.items()])


@pytest.fixture
def config_file(tmp_path, model_dir, data_dir):
    return lambda family="hidden_state", **changes: write_config(tmp_path / "run.yaml", model_dir, data_dir, family, **changes)


# Small base models of twenty shapes, for tests over hundreds of random ones: vocabularies from 8 on, so that random heads are right at
# times.
SHAPES = [
    {
        "vocab_size": 8 + i, "num_hidden_layers": 1 + i % 3, "num_attention_heads": heads, "num_key_value_heads": groups,
        "hidden_size": heads * (4, 8)[i % 2], "intermediate_size": 2 * heads * (4, 8)[i % 2], "tie_word_embeddings": i % 5 == 4,
    }
    for i, (heads, groups) in enumerate([(2, 1), (4, 2), (4, 4), (6, 3), (4, 1)] * 4)
]  # fmt: skip


class TinyModels:
    """One loaded model for each of SHAPES and each backend; `get` gives it fresh random weights."""

    def __init__(self, directory):
        self.directory, self.loaded = directory, {}

    def get(self, shape, backend="fms", seed=0):
        key = (shape, backend)
        if key not in self.loaded:
            directory = self.directory / str(shape)
            if not directory.exists():
                write_model(directory, **SHAPES[shape])
            self.loaded[key] = BaseModel(str(directory), dtype="float32", backend=backend, device="cpu")
        model = self.loaded[key]
        torch.manual_seed(seed)
        for weight in model.model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
        model.eos_token_ids = {0}
        model.give_layers(())
        return model


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    return TinyModels(tmp_path_factory.mktemp("tiny"))


FAMILIES = ("mlp_tied", "mlp_untied", "hidden_state")
POINTERS = ("mlp_tied_pointer", "hidden_state_pointer")  # the same, copying from the text
INNER = "hidden_state_inner"  # the same, reading what enters and what leaves the base model's layers
ATTENDING = "eagle3"  # attends to the text
ALONE = "medusa"  # looks at no token
EVERY = (*FAMILIES, *POINTERS, INNER, ATTENDING, ALONE)


def tiny_speculator(base_model, family, seed=0, n_predict=4):
    """Untrained heads, none of whose logits are zero; what they copy and what they know are about equally likely.

    From then on the base model gives the states that they read.
    """
    torch.manual_seed(seed)
    d, v, pointer_width = base_model.width, base_model.vocab_size, 16 if family.endswith("_pointer") else 0
    if family.startswith("mlp"):
        tied = family.startswith("mlp_tied")
        speculator = MLPSpeculator(d, v, n_predict, inner_dim=12, tie_weights=tied, pointer_width=pointer_width)
    elif family == ALONE:
        speculator = MedusaSpeculator(d, v, n_predict, layers=2)
        for weight in speculator.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    elif family == ATTENDING:
        speculator = tiny_eagle3(base_model, n_predict, layers=2)
    else:
        layers = (0, base_model.layers) if family == INNER else ()
        draft_ids, scale = torch.randperm(v)[: max(6, v // 2)].sort().values, torch.rand(d * (1 + len(layers))) + 0.5
        speculator = HiddenStateSpeculator(d, v, draft_ids, scale, n_predict, 12, 20, pointer_width, layers)
        for trunk in speculator.trunks:
            torch.nn.init.normal_(trunk.out.weight, std=0.5)
            torch.nn.init.normal_(trunk.out.bias)
    if pointer_width:
        for weight in (speculator.pointer.query_state.weight, speculator.pointer.gate.weight):
            torch.nn.init.normal_(weight, std=0.3)
        torch.nn.init.constant_(speculator.pointer.gate.bias, -6.0)
    speculator.attach(base_model)
    base_model.give_layers(speculator.base_layers)
    return speculator


def tiny_eagle3(base_model, n_predict=4, layers=1, **variant):
    """An `Eagle3Speculator` with two query heads to a key-value head, random weights, and half of the vocabulary."""
    d, v = base_model.width, base_model.vocab_size
    config = LlamaConfig(
        hidden_size=d, vocab_size=v, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
        num_hidden_layers=layers, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    draft_ids = torch.randperm(v)[: max(6, v // 2)].sort().values
    speculator = Eagle3Speculator(config, draft_ids, n_predict, (0, base_model.layers), **variant)
    for weight in speculator.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else torch.nn.init.uniform_(weight, 0.5, 1.5)
    return speculator


def load_speculator(directory, base_model):
    """A directory's heads, attached to a base model that is loaded already, as `load_for_decoding` would have them."""
    return give(read_speculator(directory, check_speculator(directory, base_model.name)), base_model)


KINDS = ("chain", "tree", "best", "lookup", "first", "ending")


def tiny_proposer(base_model, kind, family="mlp_tied", seed=0, widths=(2, 2), extra=4):
    """Candidates as deep as `widths` is long: a chain, one that ends early, a tree with those children, the best `extra` more nodes than
    levels, or lookup, `extra` + 2 deep and with the heads where it finds nothing for "first"."""
    if kind == "lookup":
        return PromptLookup(len(widths))
    speculator = tiny_speculator(base_model, family, seed)
    if kind == "first":
        return LookupFirst(TopKProposer(speculator, [1] * len(widths)), 2 + extra)
    if kind == "best":
        return BestNodesProposer(speculator, len(widths) + extra, len(widths))
    return TopKProposer(speculator, widths if kind == "tree" else [1] * len(widths), 0.3 if kind == "ending" else 0.0)


def prompts_of(*lengths, words=WORDS, seed=0):
    """Random prompts of these lengths, no two alike where the lengths allow it."""
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    return [torch.randint(1, words, (length,), generator=generator) for length in lengths]


class Planted:
    """A proposer whose acceptance is known beforehand: branches side by side, of which one at most is right, and for a known length.

    Args:
        texts: lists of ints, prompt and what the base model says, longer than it will be asked for. right: function of (prompt's index,
            number of its step) giving how many tokens are right. A wrong branch is wrong at its first token and right ever after.
    """

    speculator = None

    def __init__(self, texts, vocab_size, lookahead, right, branches=1, seed=0):
        self.texts, self.vocab_size, self.right, self.branches = texts, vocab_size, right, branches
        self.lookahead, self.nodes = lookahead, lookahead * branches
        self.tree = Tree.full([branches] + [1] * (lookahead - 1))
        self.steps, self.random = [0] * len(texts), random.Random(seed)

    def propose(self, step):
        return Candidates(torch.tensor([self.branches_of(text) for text in step.texts]), self.tree)

    def branches_of(self, text):
        """Tokens of one text's nodes, level after level."""
        index = next((index for index, whole in enumerate(self.texts) if whole[: len(text)] == text), None)
        if index is None:  # the text went another way
            return list(range(self.nodes))
        truth = self.texts[index][len(text) : len(text) + self.lookahead]
        chains = [[(truth[0] + 1 + branch) % self.vocab_size, *truth[1:]] for branch in range(self.branches)]
        right = self.right(index, self.steps[index])
        self.steps[index] += 1
        if right:
            chain = truth[:right] + [(token + 1) % self.vocab_size for token in truth[right : right + 1]] + truth[right + 1 :]
            chains[self.random.randrange(self.branches)] = chain
        return [chain[level] for level in range(self.lookahead) for chain in chains]


def chi_square(counts, expected):
    """How many standard deviations Pearson's statistic is over its mean; infinite where something impossible happened.

    Cells that are expected less than five times count together as one.
    """
    counts, expected = counts.double().flatten(), expected.double().flatten()
    if counts[expected == 0].any():
        return float("inf")
    rare = expected < 5
    counts, expected = (torch.cat([cells[~rare], cells[rare].sum()[None]]) for cells in (counts, expected))
    kept = expected >= 5
    degrees = int(kept.sum()) - 1
    return ((((counts - expected) ** 2 / expected)[kept].sum() - degrees) / max(1, 2 * degrees) ** 0.5).item()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A directory with base_model, data, and speculators hidden_state, mlp_tied and mlp_untied that know the base model's texts."""
    from vllm_helpers import make_place

    directory = tmp_path_factory.mktemp("served")
    make_place(directory)
    return directory


@pytest.fixture(scope="session")
def prompts(served):
    """64 prompts of unequal lengths for `served`."""
    from vllm_helpers import served_prompts

    return served_prompts(served)
