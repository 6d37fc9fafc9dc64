"""Texts of the benchmark: attribute values, paraphrases of each edit, and prompts.

The vocabulary is small and closed, so that a small model can learn it from scratch. `{name}` is stated in the text and
is never the name of what the query's image shows.
"""

from jfe_jax.datasets.emoji.labels import FEMALE, MALE, NEUTRAL

STYLES = {"google": "Noto", "twitter": "Twemoji"}
TONES = {0: "yellow", 1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
GENDERS = (FEMALE, MALE, NEUTRAL)

# Captions of plain tasks, in addition to the label: paraphrases, and the vendor's style.
CAPTIONS = {
    "tone": ("{name} with {tone} skin", "{tone} skin tone, {name}", "{name}, the skin is {tone}"),
    "style": ("{text}, in {style} style", "{style} style: {text}", "{text}, drawn by {style}"),
}

_STEPS = {
    "darker": ("one step darker", "one shade darker", "make the skin one step darker", "the next darker skin tone"),
    "lighter": (
        "one step lighter",
        "one shade lighter",
        "make the skin one step lighter",
        "the next lighter skin tone",
    ),
    "two_darker": ("two steps darker", "two shades darker", "make the skin two steps darker"),
    "two_lighter": ("two steps lighter", "two shades lighter", "make the skin two steps lighter"),
}
_GENDER_SWAP = ("the other gender", "swap the gender", "the same but of the other gender", "the opposite gender")
_STYLE_SWAP = ("in the other style", "the same in the other style", "switch the style", "drawn in the other style")


def _combine_phrases(ones: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    pairs = tuple(zip(ones, others, strict=False))
    return tuple(f"{one}, {other}" for one, other in pairs) + tuple(f"{other} and {one}" for one, other in pairs)


MODIFY = {
    "tone": (
        "with {tone} skin",
        "the same with {tone} skin tone",
        "change the skin tone to {tone}",
        "make the skin {tone}",
    ),
    "gender": ("make it {gender}", "the {gender} version", "change the gender to {gender}", "the same but {gender}"),
    "tone_gender": (
        "{gender} with {tone} skin",
        "make it {gender} and the skin {tone}",
        "change to {gender} and to {tone} skin tone",
    ),
    "tone_style": (
        "with {tone} skin in {style} style",
        "make the skin {tone} and the style {style}",
        "change to {style} style and to {tone} skin tone",
    ),
}

RELATIVE = {
    **_STEPS,
    "gender_swap": _GENDER_SWAP,
    "style_swap": _STYLE_SWAP,
    "darker_gender_swap": _combine_phrases(_STEPS["darker"], _GENDER_SWAP),
    "lighter_gender_swap": _combine_phrases(_STEPS["lighter"], _GENDER_SWAP),
    "darker_style_swap": _combine_phrases(_STEPS["darker"], _STYLE_SWAP),
    "lighter_style_swap": _combine_phrases(_STEPS["lighter"], _STYLE_SWAP),
    "gender_style_swap": _combine_phrases(_GENDER_SWAP, _STYLE_SWAP),
}

SELECT = {
    "keep_tone": (
        "{name} with this skin tone, in {style} style",
        "take only the skin tone: {name} in {style} style",
        "{name}, {style} style, the skin tone as here",
    ),
    "keep_tone_style": (
        "{name} with this skin tone and in this style",
        "take the skin tone and the style: {name}",
        "{name}, skin tone and style as here",
    ),
    "keep_gender_tone": (
        "{name} of this gender and skin tone, in {style} style",
        "take the gender and the skin tone: {name} in {style} style",
        "{name}, {style} style, gender and skin tone as here",
    ),
    "keep_gender_style": (
        "{name} with {tone} skin, of this gender and in this style",
        "take the gender and the style: {name} with {tone} skin",
        "{name}, {tone} skin, gender and style as here",
    ),
    "keep_gender_tone_style": (
        "{name} of this gender and skin tone and in this style",
        "take the gender, the skin tone and the style: {name}",
        "{name}, gender, skin tone and style as here",
    ),
    "keep_concept": (
        "what this shows, but {who} in {style} style",
        "take only what is shown: {who}, {style} style",
        "whatever this is, {who}, drawn by {style}",
    ),
}

QUESTIONS = {
    "category": ("what kind of thing is this?", "which category does this belong to?"),
    "tone": ("what is the skin tone?", "which skin tone is it?"),
    "gender_tone": ("what are the gender and the skin tone?", "which gender and skin tone?"),
    "tone_style": ("what are the skin tone and the style?", "which skin tone and style?"),
    "gender_tone_style": ("what are the gender, the skin tone and the style?", "which gender, skin tone and style?"),
    "step_darker": ("which skin tone is one step darker than this?", "name the next darker skin tone"),
    "step_lighter": ("which skin tone is one step lighter than this?", "name the next lighter skin tone"),
    "name_tone": ("its name with {tone} skin", "what is it called with {tone} skin tone?"),
    "name_gender": ("its name if it is {gender}", "what is the {gender} version called?"),
    "name_gender_swap": ("its name with the other gender", "what is it called with the opposite gender?"),
}

# (dataset, query modality, candidate modality) → four prompts.
PROMPTS = {
    ("emoji", "text", "image"): (
        "Find the emoji picture that shows this.",
        "Show the picture of this emoji.",
        "Retrieve an emoji image that matches the description.",
        "Which picture fits these words?",
    ),
    ("emoji", "text", "text"): (
        "Find the name of the emoji described here.",
        "Give the emoji's name that means this.",
        "Retrieve the name that fits these words.",
        "Which emoji name is meant?",
    ),
    ("emoji", "text", "image,text"): (
        "Find the emoji picture with its name that fits this.",
        "Show the picture and the name of this emoji.",
        "Retrieve a named emoji image that matches the description.",
        "Which named picture fits these words?",
    ),
    ("emoji", "image", "text"): (
        "Find the name of this emoji.",
        "What is this emoji called?",
        "Retrieve the name of what the picture shows.",
        "Which name fits this picture?",
    ),
    ("emoji", "image", "image"): (
        "Find the same emoji as another vendor draws it.",
        "Show this emoji drawn by the other vendor.",
        "Retrieve the other vendor's picture of this emoji.",
        "Which picture is the same emoji in another hand?",
    ),
    ("emoji", "image,text", "text"): (
        "Answer the question about this emoji.",
        "Find the answer to the question about the picture.",
        "Retrieve the words that answer this about the emoji.",
        "What is the answer for this picture?",
    ),
    ("emoji", "image,text", "image,text"): (
        "Find the named emoji picture that this picture and the words ask for.",
        "Show the picture and the name of the emoji that is wanted.",
        "Retrieve the named emoji image that fits the picture and the words.",
        "Which named picture is asked for?",
    ),
    ("emojimodify", "image,text", "image"): (
        "Find the emoji picture after this change.",
        "Show this emoji changed as the words say.",
        "Retrieve the changed emoji image.",
        "Which picture is this emoji with the change?",
    ),
    ("emojirelative", "image,text", "image"): (
        "Find the emoji picture that differs from this one as said.",
        "Show the emoji that stands to this one as the words say.",
        "Retrieve the emoji image relative to this picture.",
        "Which picture differs from this one in that way?",
    ),
    ("emojiselect", "image,text", "image"): (
        "Find the emoji picture that keeps of this one only what the words say.",
        "Show the emoji that takes from this picture what is named.",
        "Retrieve the emoji image that shares the named part of this picture.",
        "Which picture takes only that from this one?",
    ),
    ("emojicaption", "text", "image"): (
        "Find the picture for this caption.",
        "Show what the caption says.",
        "Retrieve the captioned image.",
        "Which picture has this caption?",
    ),
    ("emojicaption", "image", "text"): (
        "Find the caption of this picture.",
        "Say what the picture shows.",
        "Retrieve a caption for the image.",
        "Which caption has this picture?",
    ),
    ("emojitext", "text", "text"): (
        "Find the text that means the same.",
        "Say this in other words.",
        "Retrieve the sentence with this meaning.",
        "Which text says the same?",
    ),
}
