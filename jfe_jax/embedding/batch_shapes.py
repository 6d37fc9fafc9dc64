"""What groups a pool is computed in: of few shapes, as each is compiled, with rows that its items fill.

Axes: R rows, S tokens of a row, M image slots, B items of a group.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from jfe_jax.config import ModelConfig
from jfe_jax.data.pipeline.offline_packing import GroupShape, Size, pack_offline
from jfe_jax.models.registry import get_backbone


class ShapePolicy(NamedTuple):
    """How finely shapes are fitted to the items.

    Attributes:
      tokens: of a group, about.
      step: rows are a multiple of so many tokens.
      lengths: at most so many different rows are chosen for a pool.
      few: for so many items or fewer nothing is compiled that can be done without.
    """

    tokens: int
    step: int
    lengths: int
    few: int


# On a CPU 2,048 tokens are as fast as more, and leave less empty at the end. A program is compiled in two seconds, in
# which it embeds few items.
CPU = ShapePolicy(2048, 16, 4, 64)
ACCELERATOR = ShapePolicy(4096, 128, 2, 256)
# Rows are longer than this only if an item is; and a row for all that there is.
LONGEST_ROW, LONGEST_SINGLE = 2048, 512
# Rows of another length than those compiled for have to save so much, and a further length beside others so much.
MIN_GAIN_TO_SWITCH, MIN_GAIN_PER_LENGTH = 0.1, 0.01
# A further length means programs to compile: not for items whose text tower takes fewer FLOPs, seconds on a core.
LEAST_WORK = 2e11
# Of the items as many are laid out to see what rows of some lengths cost.
_TRIED = 512
# Of rows that are not chosen for many items.
_COARSE = 128
# There are no more items in a group than if each had so many.
_TOKENS_OF_ITEM = 8
# Time of a FLOP in attention beside that of one in a matrix: measured on a CPU, with rows of 640 and 1,280 tokens.
_ATTENTION = 3.0


class BatchShapePlanner:
    """Chooses for one model, and remembers what is compiled."""

    def __init__(self, model: ModelConfig, scale: ShapePolicy):
        self._model, self._scale = model, scale
        self._backbone = get_backbone(model)
        self._shortest_with_image = model.vision.patches + 2
        # All that were used; those of the last choice, and what they cost beside the items alone.
        self._used: set[int] = set()
        self._chosen: list[int] = []
        self._excess = 1.0

    def single(self, sizes: Collection[Size]) -> GroupShape | None:
        """A row for all of these items, if they are few."""
        if len(sizes) > LONGEST_SINGLE // _TOKENS_OF_ITEM:
            return None
        tokens, images = (sum(column) for column in zip(*sizes, strict=True))
        length = _rounded(tokens, _COARSE)
        room = self._room(1, length)
        short = length <= max(LONGEST_SINGLE, _rounded(max(size.tokens for size in sizes), _COARSE))
        return room if short and images <= room.image_slots and len(sizes) <= room.items else None

    def several(self, sizes: Sequence[Size]) -> list[GroupShape]:
        """For many items of these sizes: what `offline_packing.pack_offline` may choose from."""
        return [self._of(length) for length in self._lengths(sizes)]

    def _of(self, length: int) -> GroupShape:
        return self._room(max(1, self._scale.tokens // length), length)

    def _room(self, rows: int, length: int) -> GroupShape:
        slots = rows * (length // self._shortest_with_image)
        if not self._backbone.image_takes_tokens():
            # As many as would fit if it did.
            slots = rows * length // self._shortest_with_image
        return GroupShape(rows, length, max(1, slots), max(1, rows * length // _TOKENS_OF_ITEM))

    def _lengths(self, sizes: Sequence[Size]) -> list[int]:
        """Each S to be used: those that cost least, unless those chosen before are nearly as good."""
        longest = max(size.tokens for size in sizes)
        if len(sizes) <= self._scale.few:
            if longest > max(self._used, default=0):
                self._used.add(_rounded(longest, _COARSE))
            return sorted(self._used)
        some = sorted(sizes, reverse=True)[:: -(-len(sizes) // _TRIED)]
        alone = sum(size.tokens * self._token_cost(size.tokens) for size in some)
        kept = self._cost(some, self._chosen) / alone if longest <= max(self._chosen, default=0) else float("inf")
        if kept * (1 - MIN_GAIN_TO_SWITCH) > self._excess:
            work = alone * len(sizes) / len(some) * self._model.text.depth
            best = self._best(some, self._scale.lengths if work > LEAST_WORK else 1)
            excess = self._cost(some, best) / alone
            if kept * (1 - MIN_GAIN_TO_SWITCH) > excess:
                self._chosen, kept = best, excess
            self._excess = kept
            self._used.update(self._chosen)
        return self._chosen

    def _best(self, sizes: Sequence[Size], most: int) -> list[int]:
        """A length for all, then one more for a part of them, and so on while it is worth it."""
        longest, step = max(size.tokens for size in sizes), self._scale.step
        whole = range(_rounded(longest, _COARSE), min(LONGEST_ROW, self._scale.tokens) + 1, _COARSE)
        found: list[tuple[float, list[int]]] = []
        for start in {
            _rounded(longest, step),
            min(whole, key=lambda one: self._cost(sizes, [one]), default=_rounded(longest, step)),
        }:
            cost, lengths = self._cost(sizes, [start]), [start]
            while len(lengths) < most:
                more = [[*lengths, one] for one in range(step, max(lengths), step) if one not in lengths]
                costs = [self._cost(sizes, each) for each in more]
                if min(costs, default=cost) > cost * (1 - MIN_GAIN_PER_LENGTH):
                    break
                cost = min(costs)
                lengths = more[costs.index(cost)]
            found.append((cost, sorted(lengths)))
        return min(found)[1]

    def _cost(self, sizes: Sequence[Size], lengths: Sequence[int]) -> float:
        cost = 0.0
        for room, rows in pack_offline(sizes, [self._of(length) for length in lengths]):
            cost += sum(map(bool, rows)) * room.row_tokens * self._token_cost(room.row_tokens)
        return cost

    def _token_cost(self, length: int) -> float:
        """Of a token in a layer of the text tower, in rows of this length: FLOPs, those of attention weighed."""
        matrices, attention = self._backbone.token_flops(self._model)
        return matrices + _ATTENTION * length * attention


def _rounded(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
