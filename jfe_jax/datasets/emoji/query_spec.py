"""Defines query specifications without ids, the index they are generated from, and their balanced sampling."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from jfe_jax.datasets.emoji.images import Gallery, Picture, pictures_by_image
from jfe_jax.datasets.emoji.splits import SplitView, map_split_groups

# A candidate: an image's number, a text, or both.
Key = int | str | tuple[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuerySpec:
    """A query and its positives, before ids are assigned.

    Attributes:
      source: the query's image, if any.
      text: the query's text, if any.
      answers: all positives, the one it was generated from first.
      group: base group of the query.
      kind: "plain" asks for the same thing in another form; "additive" replaces a value of the image by one that the
        text names; "relational" by a function of the image's own value; "selective" names what of the image counts.
      edit: finer than `kind`.
      foil: a negative that answers the same text for another image, or the image itself; for two-way accuracy.
    """

    source: int | None
    text: str | None
    answers: tuple[Key, ...]
    group: str
    kind: str
    edit: str
    foil: Key | None = None


class SceneIndex:
    """Indexes pictures by their attributes.

    Attributes:
      gallery: all of them.
      pictures_of_image: image → the pictures with these pixels.
      at: (concept, gender, tone, style) → picture.
      pictures_of_label: label → its pictures, one per vendor.
      labels: every label, in order.
      group: an emoji's group → the group it is split with.
    """

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self.pictures_of_image = pictures_by_image(gallery)
        self.at = {picture_key(picture): picture for picture in gallery.pictures}
        self.pictures_of_label: dict[str, list[Picture]] = defaultdict(list)
        for picture in gallery.pictures:
            self.pictures_of_label[picture.emoji.label].append(picture)
        self.labels = list(self.pictures_of_label)
        self.group = map_split_groups(gallery)
        self._genders = defaultdict(dict)
        self._tones = defaultdict(dict)
        self._images: dict[str, dict[int, None]] = defaultdict(dict)
        for picture in gallery.pictures:
            self._genders[picture.emoji.concept][picture.emoji.gender] = picture.emoji.name
            self._tones[picture.emoji.concept][picture.emoji.tone] = True
            self._images[picture.emoji.concept][picture.image] = None

    def genders(self, concept: str) -> dict[str | None, str]:
        """Returns the genders of a concept → its name in each."""
        return self._genders[concept]

    def tones(self, concept: str) -> list[int]:
        """Returns the skin tones of a concept, those of a single person only."""
        return [tone for tone in self._tones[concept] if isinstance(tone, int)]

    def find_variant(self, picture: Picture, **values) -> Picture | None:
        """Returns the picture that differs only in the given values (gender, tone, style), if there is one."""
        concept, gender, tone, style = picture_key(picture)
        return self.at.get(
            (concept, values.get("gender", gender), values.get("tone", tone), values.get("style", style))
        )

    def group_of_image(self, image: int) -> str:
        return self.group[self.pictures_of_image[image][0].emoji.group]

    def other_images_of_concept(self, image: int) -> list[int]:
        """Returns the other images of an image's concept."""
        concept = self.pictures_of_image[image][0].emoji.concept
        return [one for one in self._images[concept] if one != image]

    def labels_of(self, images: Iterable[int]) -> list[str]:
        """Returns the distinct labels of the images, in order."""
        return list(dict.fromkeys(p.emoji.label for image in images for p in self.pictures_of_image[image]))

    def pairs_of(self, images: Iterable[int]) -> list[tuple[int, str]]:
        """Returns the images with each of their labels."""
        return [(image, label) for image in images for label in self.labels_of([image])]


def picture_key(picture: Picture) -> tuple[str, str | None, object, str]:
    return picture.emoji.concept, picture.emoji.gender, picture.emoji.tone, picture.style


def restrict_to_split(
    queries: Iterable[QuerySpec], pool: set[Key], view: SplitView, strict: bool
) -> Iterator[QuerySpec]:
    """Yields the queries that a split may use, without the answers outside the split.

    Args:
      strict: drop a query unless all images among its answers are targets of the view.
    """
    for query in queries:
        if query.source is not None and query.source not in view.sources:
            continue
        images = [image for answer in query.answers if (image := image_of(answer)) is not None]
        if strict and not view.targets.issuperset(images):
            continue
        answers = tuple(
            answer
            for answer in query.answers
            if answer in pool and ((image := image_of(answer)) is None or image in view.targets)
        )
        if answers:
            foil = query.foil if query.foil in pool and query.foil not in answers else None
            yield QuerySpec(
                source=query.source,
                text=query.text,
                answers=answers,
                group=query.group,
                kind=query.kind,
                edit=query.edit,
                foil=foil,
            )


def image_of(key: Key) -> int | None:
    """Returns the image of a candidate, if it has one."""
    if isinstance(key, tuple):
        return key[0]
    return key if isinstance(key, int) else None


def text_of(key: Key) -> str | None:
    """Returns the text of a candidate, if it has one."""
    if isinstance(key, tuple):
        return key[1]
    return key if isinstance(key, str) else None


def sample_balanced(queries: Iterable[QuerySpec], max_queries: int, rng: random.Random) -> list[QuerySpec]:
    """At most `most` asks, in turn from every edit, and in each edit in turn from every group; duplicates left out."""
    by_edit: dict[str, dict[str, list[QuerySpec]]] = defaultdict(lambda: defaultdict(list))
    for query in queries:
        by_edit[query.edit][query.group].append(query)
    queues = []
    for edit in sorted(by_edit):
        groups = [by_edit[edit][group] for group in sorted(by_edit[edit])]
        for group in groups:
            rng.shuffle(group)
        rng.shuffle(groups)
        queues.append(_round_robin(groups))
    chosen: dict[tuple, QuerySpec] = {}
    for query in _round_robin(queues):
        if len(chosen) == max_queries:
            break
        chosen.setdefault((query.source, query.text, query.answers), query)
    return list(chosen.values())


def _round_robin(queues: Iterable[Iterable[QuerySpec]]) -> Iterator[QuerySpec]:
    return (query for turn in zip_longest(*queues) for query in turn if query is not None)
