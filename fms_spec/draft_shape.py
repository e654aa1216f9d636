"""Which candidates are asked for, and who proposes them."""

from dataclasses import dataclass

from fms_spec.errors import UserError
from fms_spec.lookup import LookupFirst
from fms_spec.proposers import BestNodesProposer, Proposer, TopKProposer, level_sizes
from fms_spec.speculators.interface import Speculator

MOST_NODES = 1024  # of a tree: who sees whom is a matrix of their square, worked out anew for each step


@dataclass(frozen=True)
class DraftShape:
    """Which tree a speculator drafts: a chain of `lookahead`, the tree of `top_k_per_head`, or the best `nodes` up to `lookahead` deep.

    Everything left out is as deep as the speculator was trained for. Of a chain: min_probability, see `TopKProposer`; lookup, so many
    tokens are copied instead where there are any, see `LookupFirst`.
    """

    lookahead: int | None = None
    top_k_per_head: tuple[int, ...] | None = None
    nodes: int | None = None
    min_probability: float = 0.0
    lookup: int = 0

    def check(self, n_predict: int) -> tuple[tuple[int, ...] | None, int | None, int]:
        """(children of each level or None, nodes, lookahead) for a speculator of `n_predict` heads.

        Raises:
            UserError: deeper than the heads, a level without candidates, over MOST_NODES, or shapes that exclude each other.
        """
        widths = self.top_k_per_head
        if widths is not None and (self.nodes is not None or self.lookahead is not None):
            raise UserError("top_k_per_head says how deep and wide the tree is: give it without lookahead and nodes")
        lookahead = len(widths) if widths is not None else n_predict if self.lookahead is None else self.lookahead
        if not 1 <= lookahead <= n_predict:
            raise UserError(f"lookahead {lookahead}: this speculator was trained for 1 to {n_predict}")
        if widths is not None and min(widths) < 1:
            raise UserError(f"top_k_per_head {','.join(map(str, widths))}: every level needs at least 1")
        if self.nodes is not None and self.nodes < lookahead:
            raise UserError(f"nodes {self.nodes}: must be at least the lookahead, {lookahead}")
        if not 0 <= self.min_probability < 1:
            raise UserError(f"min_probability {self.min_probability}: must be at least 0 (off) and under 1")
        for name in ("min_probability", "lookup"):
            if (value := getattr(self, name)) and (widths or self.nodes):
                raise UserError(f"{name} {value} is for chains: give it without top_k_per_head and nodes")
        if not 0 <= self.lookup <= MOST_NODES:
            raise UserError(f"lookup {self.lookup}: must be from 0 (off) to {MOST_NODES:,}")
        nodes = self.nodes or sum(level_sizes(widths or ()))
        if nodes > MOST_NODES:
            raise UserError(f"a tree of {nodes:,} candidates: at most {MOST_NODES:,}; lower nodes or top_k_per_head")
        return widths or (None if self.nodes else (1,) * lookahead), self.nodes, lookahead

    def proposer(self, speculator: Speculator) -> Proposer:
        """The proposer of this shape; raises UserError as `check`, and for a level wider than the draft vocabulary."""
        widths, nodes, lookahead = self.check(speculator.n_predict)
        size = speculator.vocab_size if speculator.draft_ids is None else len(speculator.draft_ids)
        if widths and max(widths) > size:
            raise UserError(f"top_k_per_head {','.join(map(str, widths))}: this speculator's heads know {size} tokens")
        if widths:
            heads = TopKProposer(speculator, widths, self.min_probability)
            return LookupFirst(heads, self.lookup) if self.lookup else heads
        assert nodes is not None
        return BestNodesProposer(speculator, nodes, lookahead)
