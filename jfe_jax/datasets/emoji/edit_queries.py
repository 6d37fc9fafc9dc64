"""Generates queries that ask for a change of their image, and questions about it.

Every query is generated from the packages' metadata. None of them names the content of its image.
"""

import random
from collections.abc import Callable, Iterator

from jfe_jax.datasets.emoji.images import Picture
from jfe_jax.datasets.emoji.labels import FEMALE, MALE
from jfe_jax.datasets.emoji.phrases import GENDERS, MODIFY, QUESTIONS, RELATIVE, STYLES, TONES
from jfe_jax.datasets.emoji.query_spec import Key, QuerySpec, SceneIndex

_OTHER_GENDER = {MALE: FEMALE, FEMALE: MALE}
_STEPS = {"darker": 1, "lighter": -1, "two_darker": 2, "two_lighter": -2}
# The values that the text names, the changed picture (None if it does not exist), and the foil.
Change = tuple[dict[str, str], Picture | None, Picture | None]


def modify(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Image + named value → image."""
    for edit in MODIFY:
        yield from _edit_queries(scenes, images, rng, edit, "additive", MODIFY[edit], _named_changes(edit))


def relative(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Image + relation to its own value → image."""
    for edit in RELATIVE:
        yield from _edit_queries(scenes, images, rng, edit, "relational", RELATIVE[edit], _relative_changes(edit))


def questions(scenes: SceneIndex, images: list[int], rng: random.Random) -> Iterator[QuerySpec]:
    """Image + question → text."""
    for edit, texts in QUESTIONS.items():
        if edit.startswith("name_"):
            change = edit.removeprefix("name_")
            named = change in MODIFY
            changes = _named_changes(change) if named else _relative_changes(change)
            kind = "additive" if named else "relational"
            for query in _edit_queries(scenes, images, rng, edit, kind, texts, changes):
                labels = tuple(scenes.labels_of(answer for answer in query.answers if isinstance(answer, int)))
                foils = scenes.labels_of([query.foil]) if isinstance(query.foil, int) else [None]
                foil = None if foils[0] in labels else foils[0]
                yield _make_query(query.source, query.text, labels, query.group, kind, edit, foil)
        else:
            yield from _attribute_queries(scenes, images, rng, edit, texts)


def describe_edits(scenes: SceneIndex, picture: Picture, rng: random.Random) -> Iterator[tuple[str, Picture]]:
    """Yields a text for every edit that applies to a picture, and the picture after the edit."""
    for table, changes in ((MODIFY, _named_changes), (RELATIVE, _relative_changes)):
        for edit, texts in table.items():
            found = [(slots, target) for slots, target, _ in changes(edit)(scenes, picture) if target is not None]
            if found:
                slots, target = rng.choice(found)
                yield rng.choice(texts).format(**slots), target


def list_attribute_answers() -> list[str]:
    """Returns every text that can answer a question about tone, gender and style."""
    found: dict[str, None] = {}
    for gender in GENDERS:
        for tone in TONES:
            for style in STYLES:
                for edit in ("tone", "gender_tone", "tone_style", "gender_tone_style"):
                    found[_attribute_text(edit, gender, tone, style)] = None
    return list(found)


def _edit_queries(
    scenes: SceneIndex,
    images: list[int],
    rng: random.Random,
    edit: str,
    kind: str,
    texts: tuple[str, ...],
    changes: Callable[[SceneIndex, Picture], Iterator[Change]],
) -> Iterator[QuerySpec]:
    for image in images:
        # An image shared by several emoji has the answers of all of them.
        found: dict[tuple, tuple[dict[int, None], Key | None]] = {}
        for picture in scenes.pictures_of_image[image]:
            for slots, target, foil in changes(scenes, picture):
                if target is not None:
                    targets, _ = found.setdefault(tuple(slots.items()), ({}, foil and foil.image))
                    targets[target.image] = None
        for slots, (targets, foil) in found.items():
            # A change that leaves the image unchanged is skipped.
            if image not in targets:
                text = rng.choice(texts).format(**dict(slots))
                yield _make_query(image, text, tuple(targets), scenes.group_of_image(image), kind, edit, foil)


def _named_changes(edit: str) -> Callable[[SceneIndex, Picture], Iterator[Change]]:
    parts = edit.split("_")

    def changes(scenes: SceneIndex, picture: Picture) -> Iterator[Change]:
        emoji = picture.emoji
        if ("tone" in parts and not isinstance(emoji.tone, int)) or ("gender" in parts and emoji.gender is None):
            return
        tones = (
            [tone for tone in scenes.tones(emoji.concept) if tone != emoji.tone] if "tone" in parts else [emoji.tone]
        )
        genders = [one for one in GENDERS if one != emoji.gender] if "gender" in parts else [emoji.gender]
        styles = [one for one in STYLES if one != picture.style] if "style" in parts else [picture.style]
        for tone in tones:
            for gender in genders:
                for style in styles:
                    words = {"tone": TONES[tone] if "tone" in parts else "", "gender": gender, "style": STYLES[style]}
                    slots = {name: words[name] for name in parts}
                    yield slots, scenes.find_variant(picture, tone=tone, gender=gender, style=style), picture

    return changes


def _relative_changes(edit: str) -> Callable[[SceneIndex, Picture], Iterator[Change]]:
    step = _STEPS.get(edit.removesuffix("_gender_swap").removesuffix("_style_swap"), 0)
    swaps_gender, swaps_style = "gender" in edit, "style" in edit

    def changes(scenes: SceneIndex, picture: Picture) -> Iterator[Change]:
        values: dict[str, object] = {}
        foil: Picture | None = picture
        if step:
            tone = _step_tone(picture.emoji.tone, step)
            if tone is None:
                return
            values["tone"] = tone
            # The answer to the opposite step, with all other changes, if there is one.
            back = _step_tone(picture.emoji.tone, -step)
        if swaps_gender:
            if picture.emoji.gender not in _OTHER_GENDER:
                return
            values["gender"] = _OTHER_GENDER[picture.emoji.gender]
        if swaps_style:
            values["style"] = next(style for style in STYLES if style != picture.style)
        if step and back is not None:
            foil = scenes.find_variant(picture, **{**values, "tone": back})
        yield {}, scenes.find_variant(picture, **values), foil

    return changes


def _step_tone(tone: object, step: int) -> int | None:
    # Yellow is not on the light-to-dark scale.
    if isinstance(tone, int) and tone and 1 <= tone + step <= 5:
        return tone + step
    return None


def _attribute_queries(
    scenes: SceneIndex, images: list[int], rng: random.Random, edit: str, texts: tuple[str, ...]
) -> Iterator[QuerySpec]:
    kind = "relational" if edit.startswith("step_") else "selective"
    for image in images:
        found = {_attribute_answer(edit, picture) for picture in scenes.pictures_of_image[image]}
        # An image shared by several emoji has no unique answer.
        if len(found) == 1 and None not in found:
            answer, foil = found.pop()
            yield _make_query(image, rng.choice(texts), (answer,), scenes.group_of_image(image), kind, edit, foil)


def _attribute_answer(edit: str, picture: Picture) -> tuple[str, str | None] | None:
    emoji = picture.emoji
    if edit == "category":
        return emoji.category, None
    if not isinstance(emoji.tone, int) or ("gender" in edit and emoji.gender is None):
        return None
    if edit.startswith("step_"):
        step = _STEPS[edit.removeprefix("step_")]
        tone, back = _step_tone(emoji.tone, step), _step_tone(emoji.tone, -step)
        foil = back if back is not None else emoji.tone
        return None if tone is None else (_attribute_text("tone", "", tone, ""), _attribute_text("tone", "", foil, ""))
    # Correct except for the tone.
    foil = (emoji.tone + 3) % len(TONES)
    return tuple(_attribute_text(edit, emoji.gender, tone, picture.style) for tone in (emoji.tone, foil))


def _attribute_text(edit: str, gender: str | None, tone: int, style: str) -> str:
    parts = edit.split("_")
    words = [gender] if "gender" in parts else []
    words.append(f"{TONES[tone]} skin tone")
    if "style" in parts:
        words.append(f"{STYLES[style]} style")
    return ", ".join(words)


def _make_query(
    source: int | None, text: str | None, answers: tuple[Key, ...], group: str, kind: str, edit: str, foil: Key | None
) -> QuerySpec:
    return QuerySpec(source=source, text=text, answers=answers, group=group, kind=kind, edit=edit, foil=foil)
