"""The units of the benchmark: which queries, which candidates, how many."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jfe_jax.datasets.emoji import edit_queries, plain_queries, selective_queries
from jfe_jax.datasets.emoji.mbeir_layout import Unit
from jfe_jax.datasets.emoji.query_spec import Ask, Key, World, balanced, image_of, within
from jfe_jax.datasets.emoji.splits import View

# Queries of a unit and split at most. Evaluating every unit costs what its queries and its pool cost to embed.
MOST = {"train": 12_000, "val": 110, "test": 800, "combo": 330}
_NEGATIVES = 4
_VALUES = frozenset(edit_queries.answers())
_DRAWS = {"train": 3, "val": 3, "test": 4, "combo": 6}

_Make = Callable[[World, View, str, random.Random], Iterator[Ask]]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How a unit is made.

    Attributes:
      wanted: what its candidates are: "image", "pair", "name" (labels), "answer" (labels and answers to questions) or
        "caption".
      make: all queries of a view.
      splits: those it is in.
    """

    unit: Unit
    wanted: str
    make: _Make
    splits: tuple[str, ...] = ("train", "val", "test", "combo")


def _of_images(make: Callable[[World, list[int], random.Random], Iterator[Ask]]) -> _Make:
    """Queries made from images: those that the query shows or, if it shows none, those that it is answered with."""

    def asks(world: World, view: View, split: str, rng: random.Random) -> Iterator[Ask]:
        return make(world, sorted(view.sources | view.targets), rng)

    return asks


def _select(world: World, view: View, split: str, rng: random.Random) -> Iterator[Ask]:
    return selective_queries.select(world, view, rng, _DRAWS[split])


def _composed_pairs(world: World, view: View, split: str, rng: random.Random) -> Iterator[Ask]:
    """Task 8: every kind of edit, answered with images that carry their names."""
    images = sorted(view.sources)
    for asks in (
        edit_queries.modify(world, images, rng),
        edit_queries.relative(world, images, rng),
        selective_queries.select(world, view, rng, _DRAWS[split]),
    ):
        for ask in asks:
            foils = world.pairs_of([ask.foil]) if isinstance(ask.foil, int) else [None]
            yield Ask(
                source=ask.source,
                text=ask.text,
                answers=tuple(world.pairs_of(answer for answer in ask.answers if isinstance(answer, int))),
                group=ask.group,
                kind=ask.kind,
                edit=ask.edit,
                foil=foils[0],
            )


_STAGE_1 = ("train", "val")
SPECS = (
    Spec(unit=Unit(dataset="emoji", task=0), wanted="image", make=_of_images(plain_queries.text_to_image)),
    Spec(
        unit=Unit(dataset="emoji", task=1),
        wanted="name",
        make=_of_images(plain_queries.text_to_name),
        # Names have no images that could be held out.
        splits=("train", "val", "test"),
    ),
    Spec(unit=Unit(dataset="emoji", task=2), wanted="pair", make=_of_images(plain_queries.text_to_pair)),
    Spec(unit=Unit(dataset="emoji", task=3), wanted="name", make=_of_images(plain_queries.image_to_name)),
    Spec(unit=Unit(dataset="emoji", task=4), wanted="image", make=_of_images(plain_queries.image_to_image)),
    Spec(unit=Unit(dataset="emoji", task=6), wanted="answer", make=_of_images(edit_queries.questions)),
    Spec(unit=Unit(dataset="emoji", task=8), wanted="pair", make=_composed_pairs),
    Spec(unit=Unit(dataset="emojimodify", task=7), wanted="image", make=_of_images(edit_queries.modify)),
    Spec(unit=Unit(dataset="emojirelative", task=7), wanted="image", make=_of_images(edit_queries.relative)),
    Spec(unit=Unit(dataset="emojiselect", task=7), wanted="image", make=_select),
    Spec(
        unit=Unit(dataset="emojicaption", task=0),
        wanted="image",
        make=_of_images(plain_queries.caption_to_image),
        splits=_STAGE_1,
    ),
    Spec(
        unit=Unit(dataset="emojicaption", task=3),
        wanted="caption",
        make=_of_images(plain_queries.image_to_caption),
        splits=_STAGE_1,
    ),
    Spec(
        unit=Unit(dataset="emojitext", task=1),
        wanted="name",
        make=_of_images(plain_queries.text_to_text),
        splits=_STAGE_1,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A unit's queries of one split, wrong candidates for each, and its pool."""

    asks: list[Ask]
    negatives: list[list[Key]]
    pool: list[Key]


def make(spec: Spec, world: World, view: View, split: str, seed: int) -> Made:
    """Chooses a unit's queries; depends on nothing but its arguments."""
    rng = random.Random(f"{seed}/{split}/{spec.unit.name}")
    pool = _pool(spec.wanted, world, view)
    members = set(pool)
    combo = split == "combo"
    if combo and spec.wanted in ("name", "answer"):
        # What is new in a combination is its image: here it is the query's.
        view = View(sources=view.targets, targets=view.targets, named=view.named, pool=view.pool, groups=view.groups)
    asks = within(spec.make(world, view, split, rng), members, view, strict=combo)
    asks = (ask for ask in asks if ask.group in view.groups)
    chosen = balanced(asks, MOST[split], rng)
    return Made(asks=chosen, negatives=[_negatives(ask, world, members, rng) for ask in chosen], pool=pool)


def _pool(wanted: str, world: World, view: View) -> list[Key]:
    images = sorted(view.pool)
    if wanted == "image":
        return list(images)
    if wanted == "pair":
        return list(world.pairs_of(images))
    labels = world.labels_of(images)
    if wanted == "name":
        return list(labels)
    if wanted == "answer":
        categories = dict.fromkeys(picture.emoji.category for picture in world.gallery.pictures)
        return list(dict.fromkeys((*labels, *categories, *edit_queries.answers())))
    pictures = (picture for image in images for picture in world.of_image[image])
    return list(dict.fromkeys(caption for picture in pictures for caption in plain_queries.captions_of(picture)))


def _negatives(ask: Ask, world: World, members: set[Key], rng: random.Random) -> list[Key]:
    """Wrong candidates of the right modality: the foil, the query's own image, others of its base."""
    first = ask.answers[0]
    found: list[Key] = [ask.foil] if ask.foil is not None else []
    near = [image for one in (ask.source, image_of(first)) if one is not None for image in world.near(one)]
    near = rng.sample(near, min(len(near), 2 * _NEGATIVES))
    own = [] if ask.source is None else [ask.source]
    if isinstance(first, str) and first in _VALUES:
        found += rng.sample(sorted(_VALUES - {first}), _NEGATIVES)
    for image in (*own, *near):
        if isinstance(first, int):
            found.append(image)
        elif isinstance(first, tuple):
            found += world.pairs_of([image])
        elif first in world.of_label:
            found += world.labels_of([image])
    return [key for key in dict.fromkeys(found) if key in members and key not in ask.answers][:_NEGATIVES]
