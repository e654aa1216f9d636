"""The run's configuration: strict YAML, every key checked before any work starts."""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from data.yaml_files import parse, read_yaml
from fms_spec.errors import UserError, shown
from fms_spec.losses import LossWeights
from fms_spec.sampling import Sampling
from fms_spec.seeds import LARGEST
from fms_spec.settings import Place, Section, explain, first_problem
from fms_spec.speculators.interface import Settings
from fms_spec.speculators.registry import FAMILIES, settings_of
from pipelines.schedule import Schedule

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # of anything; the data and the memory bound most of them further, see `feasible`
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
FILL_ROWS = 8  # of a base-model forward when hidden_state_cache keeps its states


class BaseModelSection(Section):
    name: Place  # directory or hub name
    backend: Literal["auto", "fms", "transformers"] = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class DataSection(Section):
    dir: Place  # written by scripts.prepare_data
    train_on: Literal["answers", "last_answer", "all"] | None = None  # phase 1, of conversations; None: their answers, and all of texts
    rows: Count | None = None  # phase 1 reads only so many rows, drawn once; None reads all
    prompts: Count | None = None  # phase 2 continues only so many prompts; None continues all
    continuations: Place | None = None  # phase 2's Parquet shards; None puts them beside the run's outputs


class ScheduleSection(Section):
    steps: Count
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
                    f"{phase} would run for {count} of schedule.steps {self.steps}; raise those, or take it out of schedule.pattern"
                )
        return self

    def build(self):
        return Schedule(tuple(self.pattern), self.mode, self.steps)


class LearningRateSection(Section):
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    peak: float = Field(1.0, gt=0, le=1)  # as a share of optimizer.lr
    end: float = Field(0.1, ge=0)
    warmup_steps: CountOrZero = 2000
    warmup_share: float = Field(0.05, ge=0, le=1)  # of the phase's steps; the smaller of the two counts


class LossSection(Section):
    cross_entropy: Weight = 1.0  # on the text's own tokens
    distillation: Weight = 0.0  # forward KL from the base model's distribution
    acceptance: Weight = 0.0  # -log of the rate at which the base model accepts what is drawn from the head (LK loss)
    smooth_l1: Weight = 0.0  # on the base model's next hidden states; of families that predict them
    heads: list[Weight] | None = None  # one weight a head; None weighs all alike
    only_accepted: bool = False  # train later heads only where the tokens before theirs are the base model's own greedy ones

    def weights(self, heads):
        """`LossWeights` for so many heads."""
        return LossWeights(self.cross_entropy, self.distillation, self.smooth_l1, tuple(self.heads or [1.0] * heads), self.acceptance)


class PhaseSection(Section):
    batch_size: Count  # rows of a micro-batch
    accumulate: Count = 1  # micro-batches of a step
    positions: Count | None = None  # of a micro-batch, drawn evenly; None trains on all
    lr: LearningRateSection = LearningRateSection()
    loss: LossSection = LossSection()


class OptimizerSection(Section):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def betas_as_tuple(cls, values):
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            values = values | {"betas": tuple(values["betas"])}
        return values

    @model_validator(mode="after")
    def decays(self):
        if self.lr * self.weight_decay >= 1:
            raise ValueError(f"optimizer.weight_decay {self.weight_decay} x lr {self.lr} takes all of a weight away at a step; lower one")
        return self


class GenerationSection(Section):
    engine: Literal["embedded", "vllm"] = "embedded"  # what decodes the continuations
    mode: Literal["inline", "ahead", "alongside"] = "inline"  # by the trainer itself, before the run, or by producers during it
    shards_ahead: Count = 2  # alongside: shards that producers may be ahead of the trainer
    producer_devices: list[str] = Field([""], min_length=1)  # alongside: CUDA_VISIBLE_DEVICES of each; "": a GPU that no trainer uses
    memory_share: float = Field(0.9, gt=0, le=1)  # vllm on a GPU: at most so much of it, and never more than is free
    batch_size: Count = 96  # prompts decoded together: a shard
    max_new_tokens: Count = 256
    temperature: float = 1.0
    top_k: CountOrZero = 10
    top_p: float = 1.0

    @model_validator(mode="after")
    def sampling(self):
        Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        return self


class ParallelSection(Section):
    """How several processes share the models; a single process ignores it. Batches are always split over all processes."""

    base_model: Literal["replicate", "shard", "hybrid", "tensor"] = "replicate"  # shard, hybrid: FSDP2; tensor: ibm-fms's own strategy
    speculator: Literal["replicate", "shard", "hybrid"] = "replicate"
    group_size: Count | None = None  # hybrid, tensor: neighbouring processes that share one copy; None: those of a node


class ValidationSection(Section):
    every: Count = 500  # steps
    prompts: CountOrZero = 32  # the last so many held-out prompts, whose greedy continuations acceptance is measured on; 0 turns it off
    max_new_tokens: int = Field(64, ge=2, le=2**31 - 1)


class CheckpointSection(Section):
    every: Count = 500  # steps
    keep: Count = 2  # newest ones kept


class RunConfig(Section):
    """One training run, resolved."""

    seed: Seed = 0
    base_model: BaseModelSection
    speculator: Annotated[SerializeAsAny[Settings], BeforeValidator(settings_of)]  # of whichever family it names
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
    log_every: Count = 10  # steps

    @model_validator(mode="after")
    def consistent(self):
        for phase in self.schedule.build().phase_steps():
            loss, lr = getattr(self, phase).loss, getattr(self, phase).lr
            if lr.decay != "constant" and lr.end > lr.peak:
                raise ValueError(f"{phase}.lr.end {lr.end} is over its peak, {lr.peak}; lower it, or set {phase}.lr.decay to constant")
            if loss.heads is not None and len(loss.heads) != self.speculator.n_predict:
                raise ValueError(f"{phase}.loss.heads has {len(loss.heads)} weights for {self.speculator.n_predict} heads")
            if loss.heads is not None and not any(loss.heads):
                raise ValueError(f"{phase}.loss.heads has no weight over 0: nothing would be learned")
            family = self.speculator.family
            if loss.smooth_l1 and not FAMILIES[family].predicts_states:
                able = " or ".join(name for name, other in FAMILIES.items() if other.predicts_states)
                raise ValueError(f"{phase}.loss.smooth_l1 needs the {able} family: the {family} family predicts no hidden states")
            if not (loss.cross_entropy or loss.distillation or loss.acceptance or loss.smooth_l1):
                raise ValueError(f"{phase}.loss has no weight over 0: nothing would be learned")
        return self


def load_config(path, overrides=()):
    """Read a YAML file, apply `key.path=value` overrides, check everything.

    Raises:
        UserError: one line naming the file, the key and what it should be; for an unknown key the nearest known one.
    """
    values = read_yaml(path, "config")
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected keys and values, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problem = first_problem(error)
        raise UserError(f"config {path}: {explain(problem, known_keys(problem, values))}") from None


def apply_override(values, override):
    """Set one `key.path=value` in nested dicts, the value read as YAML.

    Raises:
        UserError: no key, no value, a value that is no YAML, or a path that goes through something that is no section.
    """
    path, _, text = override.partition("=")
    *sections, key = path.split(".")
    if not all([*sections, key]) or not text.strip():
        raise UserError(f"override {shown(override)}: give a key.path and a value behind its =, be it null")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override {shown(override)}: {section} is a value, not a section")
    values[key] = parse(text, f"override {shown(override)}")


def known_keys(problem, values):
    """The keys of the section in which pydantic found one that is unknown; none for other problems."""
    if problem["type"] != "extra_forbidden":
        return []
    section = RunConfig
    for part in problem["loc"][:-1]:
        section = section.model_fields[part].annotation
        section = FAMILIES[values["speculator"]["family"]].settings if section is Settings else section
        section, *_ = get_args(section) or [section]  # one that may be left out is told as `Section | None`
    return section.model_fields
