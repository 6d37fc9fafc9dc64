"""Generates queries for the same content in another modality or wording, and the stage 1 caption pairs."""

import random
from collections import defaultdict
from collections.abc import Iterator

from jfe_jax.datasets.emoji.edit_queries import describe_edits
from jfe_jax.datasets.emoji.images import Picture
from jfe_jax.datasets.emoji.labels import Emoji
from jfe_jax.datasets.emoji.phrases import CAPTIONS, STYLES, TONES
from jfe_jax.datasets.emoji.query_spec import Key, QuerySpec, SceneIndex

_MOST_TAGS = 3
# Tags that match more names than this are not descriptive.
_MOST_NAMES = 6


def text_to_image(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Task 0: a name, or the name in other words, with or without the vendor's style → image."""
    for picture in _pictures(scenes, images):
        for edit, text, found in _name_queries(scenes, picture, rng):
            yield _make_plain_query(
                None, text, tuple(dict.fromkeys(one.image for one in found)), _group(scenes, picture), edit
            )


def text_to_pair(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Task 2: the same words → image with its name."""
    for picture in _pictures(scenes, images):
        label = picture.emoji.label
        for edit, text, found in _name_queries(scenes, picture, rng):
            pairs = tuple(dict.fromkeys((one.image, label) for one in found))
            yield _make_plain_query(None, text, pairs, _group(scenes, picture), edit)


def text_to_name(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Task 1: tags, or the name in other words → name."""
    tagged = _TagIndex(scenes)
    for label in scenes.labels_of(images):
        picture = scenes.pictures_of_label[label][0]
        other = _paraphrase(picture.emoji, rng)
        if other:
            yield _make_plain_query(None, other, (label,), _group(scenes, picture), "other_words")
        for text, names in tagged.draw(picture.emoji, rng):
            yield _make_plain_query(None, text, names, _group(scenes, picture), "tags")


def image_to_name(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Task 3."""
    for image in images:
        yield _make_plain_query(image, None, tuple(scenes.labels_of([image])), scenes.group_of_image(image), "name")


def image_to_image(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Task 4: the same emoji by the other vendor."""
    for image in images:
        found = {
            other.image: None
            for picture in scenes.pictures_of_image[image]
            for other in scenes.pictures_of_label[picture.emoji.label]
            if other.style != picture.style
        }
        if found and image not in found:
            yield _make_plain_query(image, None, tuple(found), scenes.group_of_image(image), "other_vendor")


def caption_to_image(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Stage 1, task 0: as task 0, and tags."""
    yield from text_to_image(scenes, images, rng)
    tagged = _TagIndex(scenes)
    for picture in _pictures(scenes, images):
        for text, names in tagged.draw(picture.emoji, rng):
            found = [picture.image, *(one.image for name in names for one in scenes.pictures_of_label[name])]
            yield _make_plain_query(None, text, tuple(dict.fromkeys(found)), _group(scenes, picture), "tags")


def image_to_caption(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Stage 1, task 3: all captions of an image are positives; each row lists another one first."""
    for image in images:
        captions = [caption for picture in scenes.pictures_of_image[image] for caption in captions_of(picture)]
        rng.shuffle(captions)
        for first in captions[:3]:
            answers = (first, *(one for one in captions if one != first))
            yield _make_plain_query(image, None, answers, scenes.group_of_image(image), "caption")


def text_to_text(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Stage 1, task 1: names in other words, tags, and changes carried out on a name."""
    yield from text_to_name(scenes, images, rng)
    for image in images:
        for picture in scenes.pictures_of_image[image]:
            for words, target in describe_edits(scenes, picture, rng):
                label = target.emoji.label
                if label != picture.emoji.label:
                    text = f"{picture.emoji.label}, {words}"
                    yield _make_plain_query(None, text, (label,), _group(scenes, picture), "changed_name")


def captions_of(picture: Picture) -> list[str]:
    """Returns all captions of a picture: its label, the paraphrases of it, and the first two with the style."""
    plain = [picture.emoji.label, *_all_paraphrases(picture.emoji)]
    form = CAPTIONS["style"][0]
    return [*plain, *(form.format(text=text, style=STYLES[picture.style]) for text in plain[:2])]


class _TagIndex:
    """Finds the names that match a set of keywords."""

    def __init__(self, scenes: SceneIndex):
        self._names: dict[str, dict[str, None]] = defaultdict(dict)
        for label in scenes.labels:
            emoji = scenes.pictures_of_label[label][0].emoji
            # Keywords do not describe the tone, so they refer to the emoji without one.
            if not emoji.tone:
                for tag in emoji.tags:
                    self._names[tag][label] = None

    def draw(self, emoji: Emoji, rng: random.Random) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields sampled keywords of an emoji with all matching names, its own first; none if too many match."""
        if emoji.tone or not emoji.tags:
            return
        tags = rng.sample(emoji.tags, min(_MOST_TAGS, len(emoji.tags)))
        names = [label for label in self._names[tags[0]] if all(label in self._names[tag] for tag in tags)]
        if len(names) <= _MOST_NAMES:
            yield ", ".join(tags), (emoji.label, *(name for name in names if name != emoji.label))


def _name_queries(scenes: SceneIndex, picture: Picture, rng: random.Random) -> Iterator[tuple[str, str, list[Picture]]]:
    """Yields the edit, the text and the pictures that match it."""
    emoji = picture.emoji
    text = _paraphrase(emoji, rng) if rng.random() < 0.5 else None
    named = text or emoji.label
    form = rng.choice(CAPTIONS["style"])
    yield "name_style", form.format(text=named, style=STYLES[picture.style]), [picture]
    yield "name", named, sorted(scenes.pictures_of_label[emoji.label], key=lambda one: one.style != picture.style)


def _all_paraphrases(emoji: Emoji) -> list[str]:
    if not isinstance(emoji.tone, int):
        return []
    return [form.format(name=emoji.name, tone=TONES[emoji.tone]) for form in CAPTIONS["tone"]]


def _paraphrase(emoji: Emoji, rng: random.Random) -> str | None:
    others = _all_paraphrases(emoji)
    return rng.choice(others) if others else None


def _pictures(scenes: SceneIndex, images: list[int]) -> Iterator[Picture]:
    return (picture for image in images for picture in scenes.pictures_of_image[image])


def _group(scenes: SceneIndex, picture: Picture) -> str:
    return scenes.group[picture.emoji.group]


def _make_plain_query(
    source: int | None, text: str | None, answers: tuple[Key, ...], group: str, edit: str
) -> QuerySpec:
    return QuerySpec(source=source, text=text, answers=answers, group=group, kind="plain", edit=edit)
