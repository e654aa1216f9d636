"""The small interface behind which every family of attached heads stands.

Shapes: m positions (of a row in training, of a batch in decoding), d base width, s width of the states that the base model gives, which is
d, or (1 + layers) d of heads with `base_layers`; k feature width, r draft vocabulary.

Alignment, the same in training and decoding: h_t is the base model's state after its final norm at position t. Head i (from 0) has
seen h_t and the tokens x_{t+1} ... x_{t+1+i}, and predicts x_{t+2+i}.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self

import torch
from pydantic import BaseModel as Checked
from pydantic import ConfigDict, Field
from torch import nn
from torch.nn import functional as F

from fms_spec.alignment import Windows
from fms_spec.base_model import BaseModel
from fms_spec.context import Context, Recent, Seen, Text
from fms_spec.errors import UserError
from fms_spec.losses import LossWeights, head_losses
from fms_spec.mixture import LEAST, mixed
from fms_spec.passes import arithmetic_of
from fms_spec.read_out import read_out
from fms_spec.settings import Place, Section
from fms_spec.speculators.tensor_files import form

Size = Annotated[int, Field(ge=1, le=2**24)]  # a matrix of two such can be counted in 64 bits


class Sizes(Checked):
    """What a family's constructor takes from config.json; other keys stand beside them."""

    model_config = ConfigDict(strict=True)
    emb_dim: Size
    vocab_size: Size
    n_predict: int = Field(ge=1, le=64)

    def misfit(self, layers: int) -> str | None:
        """Which base models they read, in words, where that is none of so many layers."""
        return None


State = torch.Tensor | tuple[torch.Tensor | None, ...]  # running, of m positions


class BaseWeights(Protocol):
    """What heads take from a base model, be it a `BaseModel` or vLLM's: [v, d], and [v, d], or [v, d + 1] with a bias."""

    @property
    def embedding_weight(self) -> torch.Tensor: ...

    @property
    def output_weight(self) -> torch.Tensor: ...


class Settings(Section):
    """What a config says of a family; each adds its own, and names itself: `family: Literal["..."]`."""

    family: str
    n_predict: int = Field(3, ge=1, le=64)
    init_from: Place | None = Field(None, exclude_if=lambda name: name is None)  # heads to go on from; none: a run is recorded as before


@dataclass(frozen=True)
class Corpus:
    """What untrained heads are given of the text they will be trained on.

    token_counts: int64 [tokenizer vocabulary], how often each token is trained on. states: fp32 [m, s] on the CPU, the base model's over a
    family's `sample_rows`; None where it wants none.
    """

    token_counts: torch.Tensor
    states: torch.Tensor | None


class Speculator(nn.Module):
    """Attached heads that guess `n_predict` tokens from one hidden state of a frozen base model.

    A family is one file, and known to `registry` alone. It defines `build`, `start`, `advance` and `output`; training and proposing
    (`proposers`) are the same three calls. `start` may return any tensor or tuple of tensors as the running state. A plan runs these calls
    on tensors without data, so that what a family costs needs no saying; vLLM's drafter runs them too, so that it is served by them.
    """

    name: str  # a config's speculator.family
    model_type: str  # config.json's
    architecture: str  # config.json's only entry under architectures
    settings: type[Settings]
    sizes: type[Sizes]
    sample_rows = 0  # corpus rows whose states `build` is to be given
    needs_embedding = False  # whether `attach` takes the base model's token embedding; the lm_head is there in any case
    vllm_method: str | None = None  # vLLM's own, by which it serves what is exported without us; None: our plugin serves it
    predicts_states = False  # whether there is a `state_distance`
    inherited: frozenset[str] = frozenset()  # of `saved_config`, what no setting decides: heads that are gone on from keep theirs
    any_depth = True  # whether `n_predict` may be another one where heads share their weights
    base_layers: tuple[int, ...] = ()  # what `BaseModel.give_layers` is to be told, and `start` is given behind the final states
    context_width = 0  # w of what `keep` keeps of each slot of a text, see `context`; 0: nothing is kept
    copies = False  # whether what is kept is what `point` copies from
    emb_dim: int  # d
    vocab_size: int
    n_predict: int
    draft_ids: Any  # int64 [r]: the token of each draft-vocabulary entry; None where it is the whole vocabulary
    # Others than the family's own: of config.json's values, {key: tensor} and the base model's config they make the first two anew.
    layouts: ClassVar[dict[str, Callable[..., Any]]] = {}

    @classmethod
    def base_layers_of(cls, settings: Any, base_model: Any) -> tuple[int, ...]:
        """The `base_layers` that heads of these settings will have, for the states that `build` is to be given; arguments as there.

        Raises:
            UserError: a layer that the base model hasn't.
        """
        return ()

    @classmethod
    def build(cls, settings: Any, base_model: Any, corpus: Corpus | None = None) -> Self:
        """Untrained heads, not attached yet, drawn from torch's global generator.

        Args:
            settings: of the class's `settings`. base_model: a `BaseModel`, or whatever has its width, vocab_size and layers. corpus: None
            where only sizes count, as in a plan.

        Raises:
            UserError: settings that don't fit the base model.
        """
        raise NotImplementedError

    @property
    def distinct_heads(self) -> int:
        """How many compute differently: those behind them compute as the last of them."""
        return self.n_predict

    def losses(
        self, windows: Windows, base_model: BaseModel, weights: LossWeights, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`losses.head_losses` of these heads; a method, as weights that are kept in parts are gathered around methods alone."""
        return head_losses(self, windows, base_model, weights, counts)

    def attach(self, base_model: BaseWeights) -> None:
        """Take what is frozen and shared (embedding, lm_head) from the base model. Nothing of it is trained or saved."""

    def final(self, states: torch.Tensor) -> torch.Tensor:
        """Those after the base model's final norm, of states [..., s]: [..., d]."""
        return states[..., : states.shape[-1] // (1 + len(self.base_layers))]

    def teacher_weight(self, base_model: BaseWeights) -> torch.Tensor:
        """The base model's lm_head on the draft vocabulary: [r, d], or [r, d + 1]; see `read_out.with_bias`."""
        return base_model.output_weight if self.draft_ids is None else base_model.output_weight[self.draft_ids]

    @torch.no_grad()
    def best_base_tokens(self, base_model: BaseWeights, states: torch.Tensor) -> torch.Tensor:
        """The base model's own best next token within the draft vocabulary: states [..., s] -> int64 [...].

        Logits are there for a chunk of positions at a time: of a micro-batch of 8 x 4,096 with 128k tokens all would be 8.4 GB in bf16.
        """
        weight, states = self.teacher_weight(base_model), self.final(states)
        chunks = states.flatten(0, -2).split(arithmetic_of(states).rows(len(weight)))
        best = torch.cat([F.linear(read_out(rows, weight), weight).argmax(-1) for rows in chunks]).view(states.shape[:-1])
        return best if self.draft_ids is None else self.draft_ids[best]

    def draft_targets(self, tokens: torch.Tensor) -> torch.Tensor:
        """Draft-vocabulary entry of each token, -1 where it has none: int64, the tokens' shape."""
        return tokens

    def keep(self, states: torch.Tensor, recent: Recent, slots: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
        """Of families with a `context_width`: what is kept of slots, [..., w].

        states: [..., s]. recent: of as many. slots: int64 [...], place of each in its text, from 0. seen: what each of them, flattened,
        sees of its text up to and with itself (`with_newest`), where what is kept hangs on that; vLLM's drafter has none.
        """
        raise NotImplementedError

    def start(self, hidden: torch.Tensor, before: torch.Tensor | None = None) -> State:
        """Running state before any token is seen: hidden [m, s]; before int64 [m], the token it is the state of, -1 for none.

        Families that keep a context are given `before`, others aren't.
        """
        raise NotImplementedError

    def advance(self, state: Any, tokens: torch.Tensor, head: int, seen: Seen | None = None) -> State:
        """Running state after head number `head` has seen its token: tokens int64 [m].

        Families that keep a context are given what the positions see of their texts, others aren't.
        """
        raise NotImplementedError

    def output(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [m, k], weight [r, k]): the head's logits are features @ weight.T, never formed here."""
        raise NotImplementedError

    def point(self, state: Any, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of families that copy: (query [m, w], gate [m]) for what is kept, see `pointer`."""
        raise NotImplementedError

    def logits(self, state: Any, head: int, context: Context | None = None) -> torch.Tensor:
        """The head's logits over the draft vocabulary, [m, r]; over the whole one, [m, v], where it copies. For proposing only."""
        scores = self.scores(state, head, context)
        if context is None or not self.copies:
            return scores
        return scores.clamp_(min=LEAST).log_()  # of 49,152 zeros a logarithm takes 0.23 ms, of these 0.02

    def scores(self, state: Any, head: int, context: Context | None = None) -> torch.Tensor:
        """In the order of `logits`, for a choice that asks for no more: where heads copy, their probabilities."""
        scores = self.read_out_logits(state, head)
        if context is None or not self.copies:
            return scores
        return mixed(scores.float().softmax(-1), self.over_all, *self.point(state, head), context)

    def probability(self, scores: torch.Tensor, picked: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """What `scores` hold likely of picked int64 [m, k]: fp32 [m, k]."""
        chosen = scores.gather(1, picked).float()
        return chosen if context is not None and self.copies else (chosen - scores.float().logsumexp(-1, keepdim=True)).exp()

    def read_out_logits(self, state: Any, head: int) -> torch.Tensor:
        """`output`'s product: [m, r]."""
        return F.linear(*self.output(state, head))

    def prune(self, entries: torch.Tensor) -> None:
        """Draft from these entries of the draft vocabulary alone, int64 [r'], ascending; before it is attached."""
        self.draft_ids = self.draft_ids[entries]

    def pack(self) -> None:
        """Lay the weights out for proposing, where that pays; see `BaseModel.pack`. It can't be trained or saved any more."""

    def state_distance(self, features: torch.Tensor, target_states: torch.Tensor) -> torch.Tensor:
        """Of `predicts_states`: how far features [m, k], an `output`'s, are from the true states [m, d]: fp32 [m]."""
        raise NotImplementedError

    def saved_config(self) -> dict[str, Any]:
        """Everything the constructor needs, as plain JSON values."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained one from a config.json's values; raises pydantic's ValidationError for wrong ones."""
        raise NotImplementedError

    @classmethod
    def translated(cls, config: Any, directory: Path) -> Any:
        """What a directory's config.json holds, in the family's own layout where it is another layout of it; anything else as it is."""
        return config

    @classmethod
    def complete(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """A config.json's values with what a published one leaves to be known, for a base model of so many layers."""
        return config

    def published_state(self) -> dict[str, torch.Tensor]:
        """{key: tensor} as written to model.safetensors."""
        return self.state_dict()

    def load_published_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the tensors that `published_state` wrote as one's own; raises UserError where one is missing, unknown or of another form."""
        own = self.state_dict()
        for key in own | tensors:
            said, wanted = form(tensors.get(key)), form(own.get(key), "not expected")
            if said != wanted:
                raise UserError(f"speculator tensor {key}: the file says {said}, the config {wanted}; export it again")
        self.load_state_dict(tensors, assign=True)

    def heads(
        self, hidden: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int], text: Text | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
        """Training forward: yield each head's (features, weight, what `point` says or None).

        Args:
            hidden: [m, s] states at t. tokens: int64 [m, >= n_predict], x_{t+1} onwards. counts: head i goes on with the first
            counts[i] positions only. text: of families that keep a context, with what they have kept of it.
        """
        state, seen = (self.start(hidden), ()) if text is None else (self.start(hidden, text.before), (text,))
        for head, count in enumerate(counts):
            state = self.advance(first(state, count), tokens[:count, head], head, *seen)
            yield *self.output(state, head), self.point(state, head) if text and self.copies else None

    def to_tokens(self, drafts: torch.Tensor) -> torch.Tensor:
        """Token of each entry of `logits`: int64, any shape; -1 stays -1."""
        return drafts if self.draft_ids is None or self.copies else self.draft_ids[drafts].where(drafts >= 0, -1)

    def over_vocabulary(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Probabilities of the entries of `logits` [..., r] as such over the whole vocabulary, [..., v]."""
        return probabilities if self.copies else self.over_all(probabilities)

    def over_all(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Probabilities over the draft vocabulary [..., r] as such over the whole vocabulary, [..., v]."""
        if self.draft_ids is None:
            return probabilities
        whole = probabilities.new_zeros(*probabilities.shape[:-1], self.vocab_size)
        return whole.index_copy_(-1, self.draft_ids, probabilities)


def first(state: State, count: int) -> State:
    """The first `count` positions of a running state: a tensor, or a tuple of tensors and None."""
    if isinstance(state, tuple):
        return tuple(None if part is None else part[:count] for part in state)
    return state[:count]
