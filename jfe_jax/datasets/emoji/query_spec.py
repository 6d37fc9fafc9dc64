"""Ask: a query before it has ids, the index that queries are made from, and the balanced sample of them."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from jfe_jax.datasets.emoji.images import Gallery, Picture, look_alikes
from jfe_jax.datasets.emoji.splits import View, group_of

# A candidate: an image's number, a text, or both.
Key = int | str | tuple[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a query shows and says, and what is right.

    Attributes:
      source: the image it shows, if any.
      text: its words, if any.
      answers: all candidates that are right, the one it was made from first.
      group: base group that it is about.
      kind: "plain" asks for the same thing in another form; "additive" replaces a value of the image by one that the
        text names; "relational" by a function of the image's own value; "selective" names what of the image counts.
      edit: finer than `kind`.
      foil: a wrong candidate that answers the same words for another image, or the image itself; for two-way accuracy.
    """

    source: int | None
    text: str | None
    answers: tuple[Key, ...]
    group: str
    kind: str
    edit: str
    foil: Key | None = None


class World:
    """Pictures by what they show.

    Attributes:
      gallery: all of them.
      of_image: image → the pictures that look so.
      at: (concept, gender, tone, style) → picture.
      of_label: label → its pictures, one per vendor.
      labels: every label, in order.
      group: emoji's group → the group that it is split with.
    """

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self.of_image = look_alikes(gallery)
        self.at = {place(picture): picture for picture in gallery.pictures}
        self.of_label: dict[str, list[Picture]] = defaultdict(list)
        for picture in gallery.pictures:
            self.of_label[picture.emoji.label].append(picture)
        self.labels = list(self.of_label)
        self.group = group_of(gallery)
        self._genders = defaultdict(dict)
        self._tones = defaultdict(dict)
        self._images: dict[str, dict[int, None]] = defaultdict(dict)
        for picture in gallery.pictures:
            self._genders[picture.emoji.concept][picture.emoji.gender] = picture.emoji.name
            self._tones[picture.emoji.concept][picture.emoji.tone] = True
            self._images[picture.emoji.concept][picture.image] = None

    def genders(self, concept: str) -> dict[str | None, str]:
        """Genders that a concept comes in → its name in each."""
        return self._genders[concept]

    def tones(self, concept: str) -> list[int]:
        """Skin tones that a concept comes in, those of one person only."""
        return [tone for tone in self._tones[concept] if isinstance(tone, int)]

    def beside(self, picture: Picture, **values) -> Picture | None:
        """The picture that differs in the given values (gender, tone, style) only, if there is one."""
        concept, gender, tone, style = place(picture)
        return self.at.get(
            (concept, values.get("gender", gender), values.get("tone", tone), values.get("style", style))
        )

    def group_of_image(self, image: int) -> str:
        return self.group[self.of_image[image][0].emoji.group]

    def near(self, image: int) -> list[int]:
        """The other images of its concept."""
        concept = self.of_image[image][0].emoji.concept
        return [one for one in self._images[concept] if one != image]

    def labels_of(self, images: Iterable[int]) -> list[str]:
        """Labels of all that the images show, each once, in order."""
        return list(dict.fromkeys(p.emoji.label for image in images for p in self.of_image[image]))

    def pairs_of(self, images: Iterable[int]) -> list[tuple[int, str]]:
        """The images with each of their labels."""
        return [(image, label) for image in images for label in self.labels_of([image])]


def place(picture: Picture) -> tuple[str, str | None, object, str]:
    return picture.emoji.concept, picture.emoji.gender, picture.emoji.tone, picture.style


def within(asks: Iterable[Ask], pool: set[Key], view: View, strict: bool) -> Iterator[Ask]:
    """The asks that a split may use: source and answers allowed, answers outside taken away.

    Args:
      strict: all images among the answers must be targets of the view, or the ask is dropped.
    """
    for ask in asks:
        if ask.source is not None and ask.source not in view.sources:
            continue
        images = [image for answer in ask.answers if (image := image_of(answer)) is not None]
        if strict and not view.targets.issuperset(images):
            continue
        answers = tuple(
            answer
            for answer in ask.answers
            if answer in pool and ((image := image_of(answer)) is None or image in view.targets)
        )
        if answers:
            foil = ask.foil if ask.foil in pool and ask.foil not in answers else None
            yield Ask(
                source=ask.source,
                text=ask.text,
                answers=answers,
                group=ask.group,
                kind=ask.kind,
                edit=ask.edit,
                foil=foil,
            )


def image_of(key: Key) -> int | None:
    """The image of a candidate, if it has one."""
    if isinstance(key, tuple):
        return key[0]
    return key if isinstance(key, int) else None


def text_of(key: Key) -> str | None:
    """The text of a candidate, if it has one."""
    if isinstance(key, tuple):
        return key[1]
    return key if isinstance(key, str) else None


def balanced(asks: Iterable[Ask], most: int, rng: random.Random) -> list[Ask]:
    """At most `most` asks, in turn from every edit, and in each edit in turn from every group; duplicates left out."""
    by_edit: dict[str, dict[str, list[Ask]]] = defaultdict(lambda: defaultdict(list))
    for ask in asks:
        by_edit[ask.edit][ask.group].append(ask)
    queues = []
    for edit in sorted(by_edit):
        groups = [by_edit[edit][group] for group in sorted(by_edit[edit])]
        for group in groups:
            rng.shuffle(group)
        rng.shuffle(groups)
        queues.append(_in_turn(groups))
    chosen: dict[tuple, Ask] = {}
    for ask in _in_turn(queues):
        if len(chosen) == most:
            break
        chosen.setdefault((ask.source, ask.text, ask.answers), ask)
    return list(chosen.values())


def _in_turn(queues: Iterable[Iterable[Ask]]) -> Iterator[Ask]:
    return (ask for turn in zip_longest(*queues) for ask in turn if ask is not None)
