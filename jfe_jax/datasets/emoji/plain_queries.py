"""Queries that ask for the same thing in another form, and the stage-1 pairs of captions with images and texts."""

import random
from collections import defaultdict
from collections.abc import Iterator

from jfe_jax.datasets.emoji.edit_queries import changed_words
from jfe_jax.datasets.emoji.images import Picture
from jfe_jax.datasets.emoji.labels import Emoji
from jfe_jax.datasets.emoji.phrases import CAPTIONS, STYLES, TONES
from jfe_jax.datasets.emoji.query_spec import Ask, Key, World

_MOST_TAGS = 3
# Tags that fit more names than this describe nothing.
_MOST_NAMES = 6


def text_to_image(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Task 0: a name, or the name in other words, with or without the vendor's style → image."""
    for picture in _pictures(world, images):
        for edit, text, found in _worded(world, picture, rng):
            yield _plain(None, text, tuple(dict.fromkeys(one.image for one in found)), _group(world, picture), edit)


def text_to_pair(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Task 2: the same words → image with its name."""
    for picture in _pictures(world, images):
        label = picture.emoji.label
        for edit, text, found in _worded(world, picture, rng):
            pairs = tuple(dict.fromkeys((one.image, label) for one in found))
            yield _plain(None, text, pairs, _group(world, picture), edit)


def text_to_name(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Task 1: tags, or the name in other words → name."""
    tagged = _Tags(world)
    for label in world.labels_of(images):
        picture = world.of_label[label][0]
        other = _other_words(picture.emoji, rng)
        if other:
            yield _plain(None, other, (label,), _group(world, picture), "other_words")
        for text, names in tagged.draw(picture.emoji, rng):
            yield _plain(None, text, names, _group(world, picture), "tags")


def image_to_name(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Task 3."""
    for image in images:
        yield _plain(image, None, tuple(world.labels_of([image])), world.group_of_image(image), "name")


def image_to_image(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Task 4: the same emoji by the other vendor."""
    for image in images:
        found = {
            other.image: None
            for picture in world.of_image[image]
            for other in world.of_label[picture.emoji.label]
            if other.style != picture.style
        }
        if found and image not in found:
            yield _plain(image, None, tuple(found), world.group_of_image(image), "other_vendor")


def caption_to_image(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Stage 1, task 0: as task 0, and tags."""
    yield from text_to_image(world, images, rng)
    tagged = _Tags(world)
    for picture in _pictures(world, images):
        for text, names in tagged.draw(picture.emoji, rng):
            found = [picture.image, *(one.image for name in names for one in world.of_label[name])]
            yield _plain(None, text, tuple(dict.fromkeys(found)), _group(world, picture), "tags")


def image_to_caption(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Stage 1, task 3: an image's captions are right one and all, each row is made from another."""
    for image in images:
        captions = [caption for picture in world.of_image[image] for caption in captions_of(picture)]
        rng.shuffle(captions)
        for first in captions[:3]:
            answers = (first, *(one for one in captions if one != first))
            yield _plain(image, None, answers, world.group_of_image(image), "caption")


def text_to_text(world: World, images: list[int], rng: random.Random) -> Iterator[Ask]:
    """Stage 1, task 1: names in other words, tags, and changes carried out on a name."""
    yield from text_to_name(world, images, rng)
    for image in images:
        for picture in world.of_image[image]:
            for words, target in changed_words(world, picture, rng):
                label = target.emoji.label
                if label != picture.emoji.label:
                    text = f"{picture.emoji.label}, {words}"
                    yield _plain(None, text, (label,), _group(world, picture), "changed_name")


def captions_of(picture: Picture) -> list[str]:
    """All that a picture may be captioned with: its label, that in other words, and each with the style."""
    plain = [picture.emoji.label, *_all_other_words(picture.emoji)]
    form = CAPTIONS["style"][0]
    return [*plain, *(form.format(text=text, style=STYLES[picture.style]) for text in plain[:2])]


class _Tags:
    """Which names fit a set of keywords."""

    def __init__(self, world: World):
        self._names: dict[str, dict[str, None]] = defaultdict(dict)
        for label in world.labels:
            emoji = world.of_label[label][0].emoji
            # Keywords say nothing of the tone: they stand for the emoji without one.
            if not emoji.tone:
                for tag in emoji.tags:
                    self._names[tag][label] = None

    def draw(self, emoji: Emoji, rng: random.Random) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Some keywords of an emoji and all names that they fit, its own first; none if they fit too many."""
        if emoji.tone or not emoji.tags:
            return
        tags = rng.sample(emoji.tags, min(_MOST_TAGS, len(emoji.tags)))
        names = [label for label in self._names[tags[0]] if all(label in self._names[tag] for tag in tags)]
        if len(names) <= _MOST_NAMES:
            yield ", ".join(tags), (emoji.label, *(name for name in names if name != emoji.label))


def _worded(world: World, picture: Picture, rng: random.Random) -> Iterator[tuple[str, str, list[Picture]]]:
    """Edit, words and the pictures that they fit."""
    emoji = picture.emoji
    text = _other_words(emoji, rng) if rng.random() < 0.5 else None
    named = text or emoji.label
    form = rng.choice(CAPTIONS["style"])
    yield "name_style", form.format(text=named, style=STYLES[picture.style]), [picture]
    yield "name", named, sorted(world.of_label[emoji.label], key=lambda one: one.style != picture.style)


def _all_other_words(emoji: Emoji) -> list[str]:
    if not isinstance(emoji.tone, int):
        return []
    return [form.format(name=emoji.name, tone=TONES[emoji.tone]) for form in CAPTIONS["tone"]]


def _other_words(emoji: Emoji, rng: random.Random) -> str | None:
    others = _all_other_words(emoji)
    return rng.choice(others) if others else None


def _pictures(world: World, images: list[int]) -> Iterator[Picture]:
    return (picture for image in images for picture in world.of_image[image])


def _group(world: World, picture: Picture) -> str:
    return world.group[picture.emoji.group]


def _plain(source: int | None, text: str | None, answers: tuple[Key, ...], group: str, edit: str) -> Ask:
    return Ask(source=source, text=text, answers=answers, group=group, kind="plain", edit=edit)
