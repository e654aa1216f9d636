"""Decoding on one preallocated cache: plain, or checking a proposer's candidates in one forward.

Shapes: b live sequences, n candidates, d base width, v vocabulary.

A step runs each sequence's newest token and its candidates at once, each seeing the cached text and its own ancestors. The candidates that
the base model would have said itself are accepted, and its own next token comes on top. Plain decoding is the same step with no candidates,
so both are compared on equal terms.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fms_spec.base_model import BaseModel
from fms_spec.candidates import Candidates, Tree
from fms_spec.context import ContextCache, recent_tokens, without_first
from fms_spec.options import DecodingOptions
from fms_spec.proposers import Proposer, Step
from fms_spec.sampling import Chance
from fms_spec.text import TextStream
from fms_spec.timing import Marks
from fms_spec.verification import Verdict, match, reject

# Finished sequences leave the batch once they are this share of it: leaving moves the cache of all that stay, so not at every end.
LEAVING_SHARE = 1 / 8
PREFILL_CHUNK = 1024  # prompt tokens a forward: their mask grows with the chunk times the prompt, 1 GB at 8,192 squared and 8 heads a group


@dataclass
class Emitted:
    """What one step added to one text.

    index: of the prompt. tokens: list of ints, at least one, up to EOS or the limit. accepted: how many candidates the base model accepted
    (the first so many tokens), None where the step had none. pieces: the text that each token sets free, all "" without a tokenizer.
    finish_reason: None while the text goes on, "stop" (EOS or a stop string) or "length".
    """

    index: int
    accepted: int | None = None
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The step's text."""
        return "".join(self.pieces)


@dataclass
class Continuation:
    """What was decoded for one prompt: tokens, text and finish_reason as in `Emitted`.

    accepted: for every step that had candidates, how many the base model accepted, counted before the text was cut at its end.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    accepted: list[int] = field(default_factory=list)


@dataclass
class Timing:
    """Seconds by part, and the number of steps (base-model forwards after prefill). verifying: those forwards, with their logits."""

    prefill: float = 0.0
    drafting: float = 0.0
    verifying: float = 0.0
    overhead: float = 0.0
    steps: int = 0

    @property
    def decoding(self) -> float:
        """Seconds of all steps."""
        return self.drafting + self.verifying + self.overhead


def decode(
    base_model: BaseModel, prompts: Sequence[torch.Tensor], options: DecodingOptions, proposer: Proposer | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[Continuation], Timing]:  # fmt: skip
    """Decode a batch of prompts together, to their ends.

    Args:
        as for `stream`. progress: called with the number of new tokens after each step.

    Returns:
        (list of Continuation, in the prompts' order, Timing)

    Raises:
        UserError: as `stream`.
    """
    results, decoding = [Continuation() for _ in prompts], Decoding(base_model, prompts, options, proposer)
    for step in decoding.run():
        for emitted in step:
            result = results[emitted.index]
            result.tokens += emitted.tokens
            result.text += emitted.text
            result.finish_reason = emitted.finish_reason
            if emitted.accepted is not None:
                result.accepted.append(emitted.accepted)
        if progress:
            progress(sum(len(emitted.tokens) for emitted in step))
    return results, decoding.timing()


def stream(
    base_model: BaseModel, prompts: Sequence[torch.Tensor], options: DecodingOptions, proposer: Proposer | None = None
) -> Iterator[list[Emitted]]:
    """Decode a batch of prompts of unequal length together, giving out what every step adds; finished sequences leave the batch.

    Args:
        prompts: list of 1-D int64 tensors. options: `options.DecodingOptions`. proposer: see `proposers`; None for plain decoding.

    Returns:
        iterator of lists of `Emitted`, one for each text that is still going on: the first after the prompts were read, then one a step.

    Raises:
        UserError: an empty prompt, impossible limits, or texts and candidates that are over the base model's context; before any work.
    """
    return Decoding(base_model, prompts, options, proposer).run()


class Decoding:
    """One batch on its way."""

    def __init__(self, base_model: BaseModel, prompts: Sequence[torch.Tensor], options: DecodingOptions, proposer: Proposer | None):
        lookahead, nodes = (proposer.lookahead, proposer.nodes) if proposer else (0, 0)
        options.check(base_model, prompts, lookahead)
        self.base_model, self.options, self.proposer = base_model, options, proposer
        if proposer and proposer.speculator:  # one base model may have several, one after the other
            base_model.give_layers(proposer.speculator.base_layers)
        self.marks, self.steps = Marks(base_model.device), 0
        self.prompts = [prompt.to(base_model.device) for prompt in prompts]
        self.texts = [prompt.tolist() for prompt in prompts]
        self.emitted = [0] * len(prompts)
        self.streams = [TextStream(options.tokenizer, options.stop) if options.tokenizer else None for _ in prompts]
        self.live = list(range(len(prompts)))  # prompt of each row of the batch
        self.done: set[int] = set()  # rows that have ended and not left yet
        self.eos = [] if options.ignore_eos else sorted(token for token in base_model.eos_token_ids if token < base_model.vocab_size)
        self.root = Tree.full([], base_model.device)
        capacity = max(len(prompt) for prompt in prompts) + options.max_new_tokens + nodes
        self.cache = base_model.new_cache(len(prompts), capacity)
        self.context: ContextCache | None = None
        if proposer and proposer.speculator and proposer.speculator.context_width:
            self.context = ContextCache(proposer.speculator, len(prompts), capacity, base_model.dtype, base_model.device)
        self.chance: Chance | None = None
        if options.sampling.temperature > 0:
            seeds = range(len(prompts)) if options.seeds is None else options.seeds
            self.chance = Chance(seeds, options.max_new_tokens + lookahead + 1, 2 * nodes, base_model.device)

    @torch.inference_mode()
    def run(self) -> Iterator[list[Emitted]]:
        """See `stream`."""
        yield self.prefill()
        while len(self.done) < len(self.live):
            self.marks.mark("outside")  # whatever the reader of the iterator did meanwhile
            if len(self.done) >= max(1, LEAVING_SHARE * len(self.live)):
                self.leave()
                self.marks.mark("overhead")
            self.steps += 1
            yield self.step()

    def timing(self) -> Timing:
        """`Timing` so far."""
        seconds = self.marks.seconds()
        return Timing(**{part: seconds.get(part, 0.0) for part in ("prefill", "drafting", "verifying", "overhead")}, steps=self.steps)

    def prefill(self) -> list[Emitted]:
        """Read the prompts and choose each one's first token.

        Shorter prompts are padded on the right: what follows a prompt's last token is masked from it, never counted, and overwritten.
        """
        padded = torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True)
        ends = [len(prompt) for prompt in self.prompts]
        self.hidden = torch.empty(len(ends), self.base_model.state_width, dtype=self.base_model.dtype, device=self.base_model.device)
        for start in range(0, padded.shape[1], PREFILL_CHUNK):
            self.cache.hold([start] * len(ends))
            states = self.base_model.extend(padded[:, start : start + PREFILL_CHUNK], self.cache)
            if self.context:
                recent = recent_tokens(without_first(padded)).slots(start, start + PREFILL_CHUNK)
                self.context.read([start] * len(ends), states, recent)
            here = [row for row, end in enumerate(ends) if start < end <= start + PREFILL_CHUNK]
            self.hidden[here] = states[here, [ends[row] - 1 - start for row in here]]
        self.cache.hold(ends)
        candidates = Candidates(padded[:, :0], self.root)
        self.newest = self.verify(candidates, self.base_model.logits(self.hidden)[:, None], None).newest
        emitted = self.take([[token] for token in self.newest.tolist()], [None] * len(self.live))
        self.keep(self.hidden[:, None], [[0]] * len(ends), [end - 1 for end in ends])
        self.marks.mark("prefill")
        return emitted

    def step(self) -> list[Emitted]:
        """One forward of the base model over every sequence's newest token and its candidates."""
        drafts = tests = None
        if self.chance and self.proposer:
            drafts, tests = self.chance.for_step(self.counts()).tensor_split([self.proposer.nodes], dim=1)
        candidates = self.propose(drafts)
        self.marks.mark("drafting")
        tokens = torch.cat([self.newest[:, None], candidates.tokens.clamp(min=0)], dim=1)
        states = self.base_model.extend(tokens, self.cache, candidates.tree)
        logits = self.base_model.logits(states)
        self.marks.mark("verifying")
        verdict = self.verify(candidates, logits, tests)
        self.hidden, self.newest = states[self.rows(), verdict.last], verdict.newest
        # The one wait for the device in a step: everything the host needs of it, in one tensor.
        drafted = (candidates.tokens >= 0).any(1)
        lines = torch.cat([drafted[:, None], verdict.accepted, tokens, verdict.newest[:, None]], dim=1).tolist()
        nodes = tokens.shape[1]
        paths = [[node for node in range(nodes) if line[1 + node]] for line in lines]
        said = [[line[1 + nodes + node] for node in path[1:]] + line[-1:] for line, path in zip(lines, paths)]
        emitted = self.take(said, [len(path) - 1 if line[0] else None for line, path in zip(lines, paths)])
        self.keep(states, paths, self.cache.counts)
        # Rows that have ended stay where they are, or they would outgrow the cache before they leave.
        self.cache.accept([[] if row in self.done else path for row, path in enumerate(paths)])
        self.marks.mark("overhead")
        return emitted

    def keep(self, states: torch.Tensor, paths: list[list[int]], firsts: list[int]) -> None:
        """Let the speculator keep what it wants of the accepted nodes: states [b, n + 1, d], in the slots from `firsts` on."""
        if not self.context:
            return
        longest = max(map(len, paths))
        lines = []  # of each row the tokens from the one before `firsts` on
        for index, first in zip(self.live, firsts):
            line = [-1] * max(0, 2 - first) + self.texts[index][max(1, first - 1) : first + longest + 1]
            lines.append(line + [-1] * (longest + 2 - len(line)))
        nodes = torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=states.device)
        recent = recent_tokens(torch.tensor(lines, device=states.device)).slots(1, -1)
        self.context.read(firsts, states[self.rows()[:, None], nodes], recent)

    def propose(self, numbers: torch.Tensor | None) -> Candidates:
        """The proposer's `Candidates`, or none at all for a plain step."""
        candidates = None
        if self.proposer:
            texts = [self.texts[index] for index in self.live]
            context = self.context.seen(self.cache.lengths, max(self.cache.counts)) if self.context else None
            candidates = self.proposer.propose(Step(self.hidden, self.newest, texts, self.options.sampling, numbers, context))
        return candidates or Candidates(self.newest.new_zeros(len(self.live), 0), self.root)

    def verify(self, candidates: Candidates, logits: torch.Tensor, tests: torch.Tensor | None) -> Verdict:
        """`Verdict` on the candidates: logits [b, n + 1, v], tests float64 [b, at least n]."""
        depths = candidates.tree.depths
        if self.eos and min(self.emitted[index] for index in self.live) < self.options.min_new_tokens:
            early = self.counts() + depths < self.options.min_new_tokens
            logits[:, :, self.eos] = logits[:, :, self.eos].masked_fill(early[:, :, None], -torch.inf)
        numbers = self.chance.at(self.counts(), depths) if self.chance else None
        if candidates.draft_probs is not None:
            assert tests is not None and numbers is not None  # there is no drawing without chance
            return reject(candidates, self.options.sampling.probabilities(logits), tests, numbers)
        return match(candidates, self.options.sampling.choose(logits, numbers))

    def take(self, lines: list[list[int]], accepted: Sequence[int | None]) -> list[Emitted]:
        """Add each row's tokens to its text, up to its end; returns the step's `Emitted`."""
        step = []
        for row, (index, line) in enumerate(zip(self.live, lines)):
            if row not in self.done:
                step.append(self.extend_text(index, line, accepted[row]))
                if step[-1].finish_reason:
                    self.done.add(row)
        return step

    def extend_text(self, index: int, line: list[int], accepted: int | None) -> Emitted:
        options, emitted, stream = self.options, Emitted(index, accepted), self.streams[index]
        for token in line:
            self.emitted[index] += 1
            piece = stream.push(token, self.emitted[index] > options.min_new_tokens) if stream else ""
            ended = token in self.eos or (stream is not None and stream.stopped)
            if ended or self.emitted[index] == options.max_new_tokens:
                emitted.finish_reason = "stop" if ended else "length"
                piece += stream.finish() if stream else ""
            emitted.tokens.append(token)
            emitted.pieces.append(piece)
            if emitted.finish_reason:
                break
        self.texts[index] += emitted.tokens
        return emitted

    def leave(self) -> None:
        """Drop the rows that have ended."""
        kept = [row for row in range(len(self.live)) if row not in self.done]
        self.live, self.done = [self.live[row] for row in kept], set()
        self.cache.keep_sequences(kept)
        if self.context:
            self.context.keep_sequences(kept)
        if self.chance:
            self.chance.keep_sequences(kept)
        self.hidden, self.newest = self.hidden[kept], self.newest[kept]

    def rows(self) -> torch.Tensor:
        return torch.arange(len(self.live), device=self.base_model.device)

    def counts(self) -> torch.Tensor:
        """New tokens of each row so far: int64 [b, 1]."""
        return torch.tensor([[self.emitted[index]] for index in self.live], device=self.base_model.device)
