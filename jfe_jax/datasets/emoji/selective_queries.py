"""Generates select queries: the text selects values of the image to keep, and states the other values."""

import random
from collections import defaultdict
from collections.abc import Iterator

from jfe_jax.datasets.emoji.images import Picture
from jfe_jax.datasets.emoji.labels import NEUTRAL
from jfe_jax.datasets.emoji.phrases import GENDERS, SELECT, STYLES, TONES
from jfe_jax.datasets.emoji.query_spec import QuerySpec, SceneIndex
from jfe_jax.datasets.emoji.splits import SplitView

_KEPT = ("gender", "tone", "style")


def select(scenes: SceneIndex, view: SplitView, rng: random.Random, draws: int) -> Iterator[QuerySpec]:
    """Image + what to keep of it + what to take instead of the rest → image.

    Except for `keep_concept`, the text names a picture of `view.named`: the target's words were seen in training, but
    the image that the values are read from was not.

    Args:
      draws: number of random sources per target picture and edit.
    """
    for edit in SELECT:
        if edit == "keep_concept":
            yield from _keep_concept(scenes, view, rng, draws)
        else:
            yield from _keep_values(scenes, view, rng, draws, edit)


def _keep_values(scenes: SceneIndex, view: SplitView, rng: random.Random, draws: int, edit: str) -> Iterator[QuerySpec]:
    kept = [name for name in _KEPT if name in edit.split("_")]
    sources = defaultdict(list)
    for image in sorted(view.sources):
        pictures = scenes.pictures_of_image[image]
        values = {_kept_values(picture, kept) for picture in pictures}
        # For an image with two meanings, the value to keep is ambiguous.
        if len(values) == 1 and None not in values:
            sources[values.pop()].append(pictures[0])
    for target in _pictures(scenes, view.named):
        values, name = _kept_values(target, kept), _source_free_name(scenes, target, kept)
        if values is None or name is None:
            continue
        for _ in range(draws):
            source = rng.choice(sources[values]) if sources[values] else None
            if source is None or scenes.group[source.emoji.group] == scenes.group[target.emoji.group]:
                continue
            text = rng.choice(SELECT[edit]).format(name=name, tone=TONES[target.emoji.tone], style=STYLES[target.style])
            foil = _foil_picture(scenes, target, rng.choice(kept), rng)
            yield QuerySpec(
                source=source.image,
                text=text,
                answers=(target.image,),
                group=scenes.group[source.emoji.group],
                kind="selective",
                edit=edit,
                foil=foil and foil.image,
            )


def _keep_concept(scenes: SceneIndex, view: SplitView, rng: random.Random, draws: int) -> Iterator[QuerySpec]:
    for source in _pictures(scenes, view.sources):
        emoji = source.emoji
        if not isinstance(emoji.tone, int):
            continue
        for _ in range(draws):
            gender = rng.choice(GENDERS) if emoji.gender else None
            values = {"gender": gender, "tone": rng.choice(list(TONES)), "style": rng.choice(list(STYLES))}
            targets = [scenes.find_variant(picture, **values) for picture in scenes.pictures_of_image[source.image]]
            images = dict.fromkeys(target.image for target in targets if target is not None)
            if not images or source.image in images:
                continue
            who = " ".join(([gender] if gender else []) + [f"with {TONES[values['tone']]} skin"])
            text = rng.choice(SELECT["keep_concept"]).format(who=who, style=STYLES[values["style"]])
            yield QuerySpec(
                source=source.image,
                text=text,
                answers=tuple(images),
                group=scenes.group[emoji.group],
                kind="selective",
                edit="keep_concept",
                foil=source.image,
            )


def _pictures(scenes: SceneIndex, images: frozenset[int]) -> Iterator[Picture]:
    return (scenes.pictures_of_image[image][0] for image in sorted(images))


def _kept_values(picture: Picture, kept: list[str]) -> tuple | None:
    """Returns the values to keep of a picture with a skin tone, and with a gender if that is kept."""
    emoji = picture.emoji
    if not isinstance(emoji.tone, int) or ("gender" in kept and emoji.gender is None):
        return None
    values = {"gender": emoji.gender, "tone": emoji.tone, "style": picture.style}
    return tuple(values[name] for name in kept)


def _source_free_name(scenes: SceneIndex, picture: Picture, kept: list[str]) -> str | None:
    """Returns the picture's name for the text, without a gender if the image supplies it; None if there is none."""
    if "gender" not in kept:
        return picture.emoji.name
    return scenes.genders(picture.emoji.concept).get(NEUTRAL)


def _foil_picture(scenes: SceneIndex, picture: Picture, kept: str, rng: random.Random) -> Picture | None:
    """Returns the picture with another value of an attribute that the image supplies."""
    values = {"gender": GENDERS, "tone": tuple(TONES), "style": tuple(STYLES)}[kept]
    own = {"gender": picture.emoji.gender, "tone": picture.emoji.tone, "style": picture.style}[kept]
    return scenes.find_variant(picture, **{kept: rng.choice([value for value in values if value != own])})
