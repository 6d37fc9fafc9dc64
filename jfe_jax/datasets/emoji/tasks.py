"""Defines the units of the benchmark: their queries, candidates and sizes."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jfe_jax.datasets.emoji import edit_queries, plain_queries, selective_queries
from jfe_jax.datasets.emoji.mbeir_layout import EmojiUnit
from jfe_jax.datasets.emoji.query_spec import Key, QuerySpec, SceneIndex, image_of, restrict_to_split, sample_balanced
from jfe_jax.datasets.emoji.splits import SplitView

# Maximum number of queries per unit and split. The cost of evaluating a unit is that of embedding its queries and pool.
MAX_QUERIES = {"train": 12_000, "val": 110, "test": 800, "combo": 330}
_NEGATIVES = 4
_VALUES = frozenset(edit_queries.list_attribute_answers())
_DRAWS = {"train": 3, "val": 3, "test": 4, "combo": 6}

MakeQueries = Callable[[SceneIndex, SplitView, str, random.Random], Iterator[QuerySpec]]


@dataclass(frozen=True, kw_only=True)
class UnitSpec:
    """Specifies how a unit is generated.

    Attributes:
      wanted: the kind of its candidates: "image", "pair", "name" (labels), "answer" (labels and answers to questions)
        or "caption".
      make: generates all queries of a view.
      splits: the splits that contain it.
    """

    unit: EmojiUnit
    wanted: str
    make: MakeQueries
    splits: tuple[str, ...] = ("train", "val", "test", "combo")


def _from_images(make: Callable[[SceneIndex, list[int], random.Random], Iterator[QuerySpec]]) -> MakeQueries:
    """Adapts a generator of queries from images: the query images or, if there are none, the positives."""

    def queries(scenes: SceneIndex, view: SplitView, split: str, rng: random.Random) -> Iterator[QuerySpec]:
        return make(scenes, sorted(view.sources | view.targets), rng)

    return queries


def _select(scenes: SceneIndex, view: SplitView, split: str, rng: random.Random) -> Iterator[QuerySpec]:
    return selective_queries.select(scenes, view, rng, _DRAWS[split])


def _composed_pairs(scenes: SceneIndex, view: SplitView, split: str, rng: random.Random) -> Iterator[QuerySpec]:
    """Task 8: every kind of edit, answered with images that carry their names."""
    images = sorted(view.sources)
    for queries in (
        edit_queries.modify(scenes, images, rng),
        edit_queries.relative(scenes, images, rng),
        selective_queries.select(scenes, view, rng, _DRAWS[split]),
    ):
        for query in queries:
            foils = scenes.pairs_of([query.foil]) if isinstance(query.foil, int) else [None]
            yield QuerySpec(
                source=query.source,
                text=query.text,
                answers=tuple(scenes.pairs_of(answer for answer in query.answers if isinstance(answer, int))),
                group=query.group,
                kind=query.kind,
                edit=query.edit,
                foil=foils[0],
            )


_STAGE_1 = ("train", "val")
SPECS = (
    UnitSpec(unit=EmojiUnit(dataset="emoji", task=0), wanted="image", make=_from_images(plain_queries.text_to_image)),
    UnitSpec(
        unit=EmojiUnit(dataset="emoji", task=1),
        wanted="name",
        make=_from_images(plain_queries.text_to_name),
        # Names have no images that could be held out.
        splits=("train", "val", "test"),
    ),
    UnitSpec(unit=EmojiUnit(dataset="emoji", task=2), wanted="pair", make=_from_images(plain_queries.text_to_pair)),
    UnitSpec(unit=EmojiUnit(dataset="emoji", task=3), wanted="name", make=_from_images(plain_queries.image_to_name)),
    UnitSpec(unit=EmojiUnit(dataset="emoji", task=4), wanted="image", make=_from_images(plain_queries.image_to_image)),
    UnitSpec(unit=EmojiUnit(dataset="emoji", task=6), wanted="answer", make=_from_images(edit_queries.questions)),
    UnitSpec(unit=EmojiUnit(dataset="emoji", task=8), wanted="pair", make=_composed_pairs),
    UnitSpec(unit=EmojiUnit(dataset="emojimodify", task=7), wanted="image", make=_from_images(edit_queries.modify)),
    UnitSpec(unit=EmojiUnit(dataset="emojirelative", task=7), wanted="image", make=_from_images(edit_queries.relative)),
    UnitSpec(unit=EmojiUnit(dataset="emojiselect", task=7), wanted="image", make=_select),
    UnitSpec(
        unit=EmojiUnit(dataset="emojicaption", task=0),
        wanted="image",
        make=_from_images(plain_queries.caption_to_image),
        splits=_STAGE_1,
    ),
    UnitSpec(
        unit=EmojiUnit(dataset="emojicaption", task=3),
        wanted="caption",
        make=_from_images(plain_queries.image_to_caption),
        splits=_STAGE_1,
    ),
    UnitSpec(
        unit=EmojiUnit(dataset="emojitext", task=1),
        wanted="name",
        make=_from_images(plain_queries.text_to_text),
        splits=_STAGE_1,
    ),
)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A unit's queries of one split, the hard negatives of each, and its pool."""

    queries: list[QuerySpec]
    negatives: list[list[Key]]
    pool: list[Key]


def make_task_data(spec: UnitSpec, scenes: SceneIndex, view: SplitView, split: str, seed: int) -> TaskData:
    """Samples a unit's queries. Deterministic in its arguments."""
    rng = random.Random(f"{seed}/{split}/{spec.unit.name}")
    pool = _pool(spec.wanted, scenes, view)
    members = set(pool)
    combo = split == "combo"
    if combo and spec.wanted in ("name", "answer"):
        # The new part of a combination is its image, which here is the query's.
        view = SplitView(
            sources=view.targets, targets=view.targets, named=view.named, pool=view.pool, groups=view.groups
        )
    queries = restrict_to_split(spec.make(scenes, view, split, rng), members, view, strict=combo)
    queries = (query for query in queries if query.group in view.groups)
    chosen = sample_balanced(queries, MAX_QUERIES[split], rng)
    return TaskData(queries=chosen, negatives=[_negatives(query, scenes, members, rng) for query in chosen], pool=pool)


def _pool(wanted: str, scenes: SceneIndex, view: SplitView) -> list[Key]:
    images = sorted(view.pool)
    if wanted == "image":
        return list(images)
    if wanted == "pair":
        return list(scenes.pairs_of(images))
    labels = scenes.labels_of(images)
    if wanted == "name":
        return list(labels)
    if wanted == "answer":
        categories = dict.fromkeys(picture.emoji.category for picture in scenes.gallery.pictures)
        return list(dict.fromkeys((*labels, *categories, *edit_queries.list_attribute_answers())))
    pictures = (picture for image in images for picture in scenes.pictures_of_image[image])
    return list(dict.fromkeys(caption for picture in pictures for caption in plain_queries.captions_of(picture)))


def _negatives(query: QuerySpec, scenes: SceneIndex, members: set[Key], rng: random.Random) -> list[Key]:
    """Samples hard negatives of the positive's modality: the foil, the query's image, others of its base."""
    first = query.answers[0]
    found: list[Key] = [query.foil] if query.foil is not None else []
    near = [
        image
        for one in (query.source, image_of(first))
        if one is not None
        for image in scenes.other_images_of_concept(one)
    ]
    near = rng.sample(near, min(len(near), 2 * _NEGATIVES))
    own = [] if query.source is None else [query.source]
    if isinstance(first, str) and first in _VALUES:
        found += rng.sample(sorted(_VALUES - {first}), _NEGATIVES)
    for image in (*own, *near):
        if isinstance(first, int):
            found.append(image)
        elif isinstance(first, tuple):
            found += scenes.pairs_of([image])
        elif first in scenes.pictures_of_label:
            found += scenes.labels_of([image])
    return [key for key in dict.fromkeys(found) if key in members and key not in query.answers][:_NEGATIVES]
