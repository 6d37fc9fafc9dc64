"""Tests that labels in emojibase's spelling get the correct group, gender and tone."""

import json

import pytest

from jfe_jax.datasets.emoji.labels import FEMALE, MALE, NEUTRAL, read_labels
from jfe_jax.errors import UserError

PEOPLE = {
    "running": {
        "running": ("person running", "man running", "woman running"),
        "running: facing right": (
            "person running: facing right",
            "man running: facing right",
            "woman running: facing right",
        ),
    },
    "cook": {"cook": ("cook", "man cook", "woman cook")},
    "red hair": {"red hair": ("person: red hair", "man: red hair", "woman: red hair")},
    "child": {"child": ("child", "boy", "girl")},
    "older person": {"older person": ("older person", "old man", "old woman")},
    "deaf person": {"deaf person": ("deaf person", "deaf man", "deaf woman")},
    "merperson": {"merperson": ("merperson", "merman", "mermaid")},
    "person with crown": {"person with crown": ("person with crown", "prince", "princess")},
}
SEVERAL = {
    "kiss": ("kiss", "kiss: woman, man", "kiss: man, man"),
    "holding hands": ("people holding hands", "woman and man holding hands", "men holding hands"),
    "family": ("family", "family: man, boy", "family: adult, adult, child"),
    "wrestling": ("people wrestling", "men wrestling", "women wrestling"),
}
HANDS = {
    "backhand index pointing": ("backhand index pointing left", "backhand index pointing right"),
    "thumbs": ("thumbs up", "thumbs down"),
    "pushing hand": ("leftwards pushing hand", "rightwards pushing hand"),
    "waving hand": ("waving hand",),
}
ALONE = ("ninja", "person in bed", "woman with headscarf")


@pytest.fixture(scope="module")
def by_label(tmp_path_factory):
    labels = [label for concepts in PEOPLE.values() for names in concepts.values() for label in names]
    labels += [label for names in (*SEVERAL.values(), *HANDS.values(), ALONE, ["pizza"]) for label in names]
    entries = []
    for number, label in enumerate(labels):
        entry = {"label": label, "hexcode": f"{number:04X}-FE0F", "group": 4 if label == "pizza" else 1, "subgroup": 1}
        if label != "pizza":
            entry["skins"] = [
                {"label": f"{label}: light skin tone", "hexcode": f"{number:04X}-1F3FB", "tone": 1},
                {"label": f"{label}: two", "hexcode": f"{number:04X}-1F3FB-1F3FC", "tone": [1, 2]},
            ]
        entries.append(entry)
    root = tmp_path_factory.mktemp("emojibase")
    one = {"1": "some"}
    groups = {"groups": {**one, "4": "food"}, "subgroups": one, "hierarchy": {"1": [1], "4": [1]}}
    messages = {}
    for key in ("groups", "subgroups"):
        messages[key] = [{"key": name, "message": name} for name in groups[key].values()]
    for name, tree in (("data", entries), ("groups", groups), ("messages", messages)):
        (root / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    codes = {f"{n:04X}{tail}" for n in range(len(labels)) for tail in ("", "-1F3FB", "-1F3FB-1F3FC")}
    return {emoji.label: emoji for emoji in read_labels(root, codes)}


def test_genders_of_one_concept_share_its_group(by_label):
    for group, concepts in PEOPLE.items():
        for concept, names in concepts.items():
            for name, gender in zip(names, (NEUTRAL, MALE, FEMALE), strict=True):
                found = by_label[name]
                assert (found.group, found.concept, found.gender, found.tone) == (group, concept, gender, 0)
                assert by_label[f"{name}: light skin tone"].name == name


def test_several_people_have_no_gender(by_label):
    for group, names in {**SEVERAL, **HANDS}.items():
        for name in names:
            assert (by_label[name].group, by_label[name].concept, by_label[name].gender) == (group, name, None)


def test_a_gender_without_another_is_none(by_label):
    assert all(by_label[name].gender is None for name in ALONE)


def test_tones_are_parsed_from_the_labels(by_label):
    assert [by_label[f"ninja{end}"].tone for end in ("", ": light skin tone", ": two")] == [0, 1, (1, 2)]
    assert by_label["pizza"].tone is None and by_label["pizza"].category == "food: some"


def test_a_damaged_package_is_named(tmp_path):
    (tmp_path / "data.json").write_text("[{", encoding="utf-8")
    with pytest.raises(UserError, match=str(tmp_path)):
        read_labels(tmp_path, set())
