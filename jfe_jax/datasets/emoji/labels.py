"""Reads the names and attributes of emoji: base group, concept, gender, skin tone.

A *group* must not be divided between splits: it is one base emoji with all its tones, genders and directions. A
*concept* is invariant to tone, gender and vendor: "cook", "person walking: facing right". A group has one or a few
concepts.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jfe_jax.errors import UserError

MALE, FEMALE, NEUTRAL = "male", "female", "gender-neutral"

# Names that do not follow "man X" / "woman X" / "person X": label → concept, gender.
_IRREGULAR = {
    "person": ("person", NEUTRAL),
    "man": ("person", MALE),
    "woman": ("person", FEMALE),
    "child": ("child", NEUTRAL),
    "boy": ("child", MALE),
    "girl": ("child", FEMALE),
    "older person": ("older person", NEUTRAL),
    "old man": ("older person", MALE),
    "old woman": ("older person", FEMALE),
    "deaf person": ("deaf person", NEUTRAL),
    "deaf man": ("deaf person", MALE),
    "deaf woman": ("deaf person", FEMALE),
    "pregnant person": ("pregnant person", NEUTRAL),
    "pregnant man": ("pregnant person", MALE),
    "pregnant woman": ("pregnant person", FEMALE),
    "merperson": ("merperson", NEUTRAL),
    "merman": ("merperson", MALE),
    "mermaid": ("merperson", FEMALE),
    "person with crown": ("person with crown", NEUTRAL),
    "prince": ("person with crown", MALE),
    "princess": ("person with crown", FEMALE),
    "Mx Claus": ("Mx Claus", NEUTRAL),
    "Santa Claus": ("Mx Claus", MALE),
    "Mrs. Claus": ("Mx Claus", FEMALE),
}
_GENDER_WORDS = {"man": MALE, "woman": FEMALE, "person": NEUTRAL}
_REGULAR = re.compile(r"(man|woman|person)(?:: | )(.+)")
# Several people in one picture have no single gender.
_SEVERAL = re.compile(r"(?:people|men|women|woman and man) (.+)|(kiss|couple with heart|family)(?:: .+)?")
_FACING = ": facing right"
_DIRECTIONS = re.compile(r"\b(?:leftwards|rightwards|left-facing|right-facing|left|right|up|down)\b ?")
_PEOPLE = 1


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji, without a vendor.

    Attributes:
      code: code points in upper-case hexadecimal, without the presentation selector FE0F.
      label: its English name, "man cook: dark skin tone".
      name: the same without the tone, "man cook".
      group, concept: see the module.
      gender: MALE, FEMALE or NEUTRAL where the concept comes in at least two of them, else None.
      tone: 1 (light) … 5 (dark), 0 (yellow) where the concept comes in tones, a pair for two people, else None.
      tags: English keywords.
      category: Unicode's group and subgroup, "food & drink: fruit".
    """

    code: str
    label: str
    name: str
    group: str
    concept: str
    gender: str | None
    tone: int | tuple[int, int] | None
    tags: tuple[str, ...]
    category: str


def normalize_code(code: str) -> str:
    """Normalizes the code points of the packages' file names and of emojibase to one spelling."""
    return code.upper().replace("-FE0F", "")


def read_labels(emojibase: Path, codes: Collection[str]) -> list[Emoji]:
    """Reads the emoji of `codes` (see `normalize_code`), in emojibase's order.

    Raises:
      UserError: a file of the package is missing or malformed.
    """
    try:
        entries = json.loads((emojibase / "data.json").read_text(encoding="utf-8"))
        messages = json.loads((emojibase / "messages.json").read_text(encoding="utf-8"))
        meta = json.loads((emojibase / "groups.json").read_text(encoding="utf-8"))
        found = _parse_emoji(entries, _parse_categories(messages, meta), set(codes))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{emojibase}: not emojibase's English data ({error!r}); delete it to fetch it again"
        ) from error
    return _drop_unpaired_genders(found)


def _parse_emoji(entries: list[dict[str, Any]], categories: dict[tuple[int, int], str], codes: set[str]) -> list[Emoji]:
    people = {entry["label"] for entry in entries if entry.get("group") == _PEOPLE}
    # "cook" is the neutral form because there is a "man cook".
    roles = {match[2] for label in people if (match := _REGULAR.fullmatch(label.removesuffix(_FACING)))}
    found = []
    for entry in entries:
        if "group" not in entry:
            continue
        label = entry["label"]
        group, concept, gender = (
            _parse_person_label(label, roles) if entry["group"] == _PEOPLE else (label, label, None)
        )
        toned = any(
            isinstance(skin["tone"], int) and normalize_code(skin["hexcode"]) in codes for skin in _skins_of(entry)
        )
        for one in [entry, *_skins_of(entry)]:
            code, tone = normalize_code(one["hexcode"]), one.get("tone")
            if code not in codes:
                continue
            found.append(
                Emoji(
                    code=code,
                    label=one["label"],
                    name=label,
                    group=group,
                    concept=concept,
                    gender=gender,
                    tone=tuple(tone) if isinstance(tone, list) else tone or (0 if toned else None),
                    tags=tuple(entry.get("tags", ())),
                    category=categories[entry["group"], entry["subgroup"]],
                )
            )
    return found


def _parse_person_label(label: str, roles: set[str]) -> tuple[str, str, str | None]:
    """Returns the group, concept and gender of a picture of people or of a body part."""
    base = label.removesuffix(_FACING)
    facing = label[len(base) :]
    if base in _IRREGULAR:
        concept, gender = _IRREGULAR[base]
    elif several := _SEVERAL.fullmatch(base):
        return several[1] or several[2], label, None
    elif match := _REGULAR.fullmatch(base):
        concept, gender = match[2], _GENDER_WORDS[match[1]]
    elif base in roles:
        concept, gender = base, NEUTRAL
    else:
        return _DIRECTIONS.sub("", base).strip(), label, None
    return concept, concept + facing, gender


def _drop_unpaired_genders(found: list[Emoji]) -> list[Emoji]:
    genders = defaultdict(set)
    for emoji in found:
        genders[emoji.concept].add(emoji.gender)
    return [replace(emoji, gender=None) if len(genders[emoji.concept]) < 2 else emoji for emoji in found]


def _skins_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return entry.get("skins", [])


def _parse_categories(messages: dict[str, Any], meta: dict[str, Any]) -> dict[tuple[int, int], str]:
    groups = {one["key"]: one["message"] for one in messages["groups"]}
    subgroups = {one["key"]: one["message"] for one in messages["subgroups"]}
    return {
        (int(group), subgroup): f"{groups[meta['groups'][group]]}: {subgroups[meta['subgroups'][str(subgroup)]]}"
        for group, members in meta["hierarchy"].items()
        for subgroup in members
    }
