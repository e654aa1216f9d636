"""The run's configuration: strict YAML, every key checked before any work starts."""

import difflib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fms_spec.errors import UserError
from pipelines.schedule import Schedule


class Section(BaseModel):
    """Strict: an unknown key is an error, and so is a value of another type (`lr: yes` is not 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseModelSection(Section):
    name: str  # directory or hub name
    backend: Literal["auto", "fms", "transformers"] = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class SpeculatorSection(Section):
    family: Literal["mlp", "hidden_state"]
    n_predict: int = Field(3, ge=1)
    inner_dim: int = Field(4096, ge=1)
    width: int = Field(768, ge=1)  # hidden_state: of the trunk
    draft_vocab_size: int | None = Field(None, ge=2)  # hidden_state: the most frequent tokens of the corpus; None keeps all
    tie_weights: bool = True  # mlp
    scale_input: bool = True  # mlp


class DataSection(Section):
    dir: str  # written by scripts.prepare_data
    rows: int | None = Field(None, ge=1)  # phase 1 reads only so many rows, drawn once; None reads all
    prompts: int | None = Field(None, ge=1)  # phase 2 continues only so many prompts; None continues all
    continuations: str | None = None  # phase 2's Parquet shards; None puts them beside the run's outputs


class ScheduleSection(Section):
    steps: int = Field(ge=1)
    pattern: list[tuple[Literal["phase1", "phase2"], int]] = [("phase1", 5), ("phase2", 2)]
    mode: Literal["interleaved", "sequential"] = "interleaved"

    @model_validator(mode="before")
    @classmethod
    def pairs_as_tuples(cls, values):
        """YAML has lists only, and strict pydantic wants tuples."""
        if isinstance(values, dict) and isinstance(values.get("pattern"), list):
            values = values | {"pattern": [tuple(pair) if isinstance(pair, list) else pair for pair in values["pattern"]]}
        return values

    @model_validator(mode="after")
    def whole_pattern(self):
        if not self.pattern or any(count < 1 for _, count in self.pattern):
            raise ValueError("schedule.pattern needs at least one [phase, steps] pair, each of at least one step")
        for phase, count in self.build().phase_steps().items():
            if count < 2:  # one step has no warm-up and no decay: a slip rather than a plan
                raise ValueError(
                    f"{phase} would run for {count} of schedule.steps {self.steps}; raise schedule.steps, or take it out of schedule.pattern"
                )
        return self

    def build(self):
        return Schedule(tuple(self.pattern), self.mode, self.steps)


class LearningRateSection(Section):
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    peak: float = Field(1.0, gt=0)  # as a share of optimizer.lr
    end: float = Field(0.1, ge=0)
    warmup_steps: int = Field(2000, ge=0)
    warmup_share: float = Field(0.05, ge=0, le=1)  # of the phase's steps; the smaller of the two counts


class LossSection(Section):
    cross_entropy: float = Field(1.0, ge=0)  # on the text's own tokens
    distillation: float = Field(0.0, ge=0)  # forward KL from the base model's distribution
    acceptance: float = Field(0.0, ge=0)  # -log of the rate at which the base model accepts what is drawn from the head (LK loss)
    smooth_l1: float = Field(0.0, ge=0)  # on the base model's next hidden states; hidden_state family only
    heads: list[float] | None = None  # one weight a head; None weighs all alike
    only_accepted: bool = False  # train later heads only where the tokens before theirs are the base model's own greedy ones


class PhaseSection(Section):
    batch_size: int = Field(ge=1)  # rows of a micro-batch
    accumulate: int = Field(1, ge=1)  # micro-batches of a step
    positions: int | None = Field(None, ge=1)  # of a micro-batch, drawn evenly; None trains on all
    lr: LearningRateSection = LearningRateSection()
    loss: LossSection = LossSection()


class OptimizerSection(Section):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def betas_as_tuple(cls, values):
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            values = values | {"betas": tuple(values["betas"])}
        return values


class GenerationSection(Section):
    engine: Literal["embedded", "vllm"] = "embedded"  # what decodes the continuations
    mode: Literal["inline", "ahead", "alongside"] = "inline"  # by the trainer itself, before the run, or by producers during it
    shards_ahead: int = Field(2, ge=1)  # alongside: shards that producers may be ahead of the trainer
    producer_devices: list[str] = Field([""], min_length=1)  # alongside: CUDA_VISIBLE_DEVICES of each producer; "" leaves it alone
    memory_share: float = Field(0.9, gt=0, le=1)  # vllm on a GPU: of its memory; less where training uses the same one
    batch_size: int = Field(96, ge=1)  # prompts decoded together: a shard
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(10, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class ParallelSection(Section):
    """How several processes share the models; a single process ignores it. Batches are always split over all processes."""

    base_model: Literal["replicate", "shard", "hybrid", "tensor"] = "replicate"  # shard, hybrid: FSDP2; tensor: ibm-fms's own strategy
    speculator: Literal["replicate", "shard", "hybrid"] = "replicate"
    group_size: int | None = Field(None, ge=1)  # hybrid, tensor: neighbouring processes that share one copy; None: those of a node


class ValidationSection(Section):
    every: int = Field(500, ge=1)  # steps
    prompts: int = Field(
        32, ge=0
    )  # the last so many held-out prompts, whose greedy continuations acceptance is measured on; 0 turns it off
    max_new_tokens: int = Field(64, ge=2)


class CheckpointSection(Section):
    every: int = Field(500, ge=1)  # steps
    keep: int = Field(2, ge=1)  # newest ones kept


class RunConfig(Section):
    """One training run, resolved."""

    seed: int = 0
    base_model: BaseModelSection
    speculator: SpeculatorSection
    data: DataSection
    schedule: ScheduleSection
    phase1: PhaseSection
    phase2: PhaseSection
    optimizer: OptimizerSection = OptimizerSection()
    generation: GenerationSection = GenerationSection()
    parallel: ParallelSection = ParallelSection()
    compile: bool = False  # torch.compile of heads and of the base model's feed-forward layers, where a process has it whole
    hidden_state_cache: bool = False  # keep hidden states on disk for further passes over the same rows
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log_every: int = Field(10, ge=1)  # steps

    @model_validator(mode="after")
    def consistent(self):
        for phase in ("phase1", "phase2"):
            loss = getattr(self, phase).loss
            if loss.heads is not None and len(loss.heads) != self.speculator.n_predict:
                raise ValueError(f"{phase}.loss.heads has {len(loss.heads)} weights for {self.speculator.n_predict} heads")
            if self.speculator.family == "mlp" and loss.smooth_l1:
                raise ValueError(f"{phase}.loss.smooth_l1 needs the hidden_state family: the mlp family predicts no hidden states")
            if not (loss.cross_entropy or loss.distillation or loss.acceptance or loss.smooth_l1):
                raise ValueError(f"{phase}.loss has no weight over 0: nothing would be learned")
        return self


def load_config(path, overrides=()):
    """Read a YAML file (YAML 1.2: 1e-3 is a number, no is a word), apply `key.path=value` overrides, check everything.

    Raises:
        UserError: one line naming the file, the key and what it should be; for an unknown key the nearest known one.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"config {path}: {where}{getattr(error, 'problem', None) or 'not YAML'}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected keys and values, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override, yaml)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        # A mistyped key is also a missing one: the mistyped one says more.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise UserError(f"config {path}: {explain(problem)}") from error


def apply_override(values, override, yaml):
    """Set one `key.path=value` in nested dicts, the value read as YAML.

    Raises:
        UserError: a path that goes through something that is no section.
    """
    path, _, text = override.partition("=")
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override {override}: {section} is a value, not a section")
    values[key] = yaml.load(text)


def explain(problem):
    """One line for a problem pydantic found."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = RunConfig
        for part in problem["loc"][:-1]:
            section = section.model_fields[part].annotation
        near = difflib.get_close_matches(str(problem["loc"][-1]), section.model_fields, n=1, cutoff=0.5)
        known = f"did you mean {near[0]}?" if near else f"known: {', '.join(section.model_fields)}"
        return f"unknown key {key}, {known}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # ours, raised by a section's own check
        return message
    return f"{key}: {message} (got {problem['input']!r})"
