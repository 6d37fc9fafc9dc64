"""Draws a few emoji in the packages' layout: people with tones and genders, hands with tones, things, equal flags."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
TONE_NAMES = ("light", "medium-light", "medium", "medium-dark", "dark")
SKIN = ((255, 210, 60), (250, 220, 190), (230, 190, 150), (200, 150, 100), (150, 100, 60), (90, 60, 40))
ROLES = ("cook", "pilot", "judge", "singer", "farmer", "mage", "guard", "artist", "student", "teacher")
HANDS = ("raised fist", "waving hand", "thumbs up", "OK hand", "ear", "nose")
THINGS = tuple(f"{color} {shape}" for color in ("red", "blue", "green", "black") for shape in ("cup", "box", "star"))
_INK = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 160, 30), "black": (10, 10, 10)}


def packages(root: Path) -> dict[str, Path]:
    """Writes both vendors' images and emojibase's three files; returns the directory of each."""
    places = {key: root / key for key in ("google", "twitter", "emojibase")}
    for place in places.values():
        place.mkdir(parents=True)
        (place / "LICENSE").write_text("a licence\n", encoding="utf-8")
    entries: list[dict] = []
    for number, role in enumerate(ROLES):
        for prefix, form in (("", 0), ("man ", 1), ("woman ", 2)):
            code = f"{0x1F9D1 + form:X}-200D-{0x1F373 + number:X}"
            entry = _entry(f"{prefix}{role}", code, 1, 25, [role, f"work {number}"])
            _add_tones(entry, code)
            entries.append(entry)
            _draw(places, entry, number, form)
    for number, hand in enumerate(HANDS):
        code = f"{0x1F440 + number:X}"
        entry = _entry(hand, code, 1, 16, [hand.split()[-1], "body"])
        _add_tones(entry, code)
        entries.append(entry)
        _draw(places, entry, 40 + number, 0)
    for number, thing in enumerate(THINGS):
        # The presentation selector is in emojibase's code and not in the file's name.
        entries.append(_entry(thing, f"{0x2600 + number:X}-FE0F", 7, 81, thing.split()))
        _draw(places, entries[-1], 60 + number, 0)
    for number, name in enumerate(("Norway", "Bouvet Island")):
        entries.append(_entry(f"flag: {name}", f"1F1E6-{0x1F1E7 + number:X}", 9, 98, ["flag", name]))
        # No vendor distinguishes them.
        _draw(places, entries[-1], 90, 0)
    entries.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    _write(places["emojibase"] / "data.json", entries)
    keys = {1: ("people-body", {16: "hand-fingers-open", 25: "person-role"}), 7: ("objects", {81: "household"})}
    keys[9] = ("flags", {98: "country-flag"})
    groups = {
        "groups": {str(group): key for group, (key, _) in keys.items()},
        "subgroups": {str(number): key for _, subs in keys.values() for number, key in subs.items()},
        "hierarchy": {str(group): list(subs) for group, (_, subs) in keys.items()},
    }
    _write(places["emojibase"] / "groups.json", groups)
    messages = {
        name: [{"key": key, "message": key.replace("-", " ")} for key in groups[name].values()]
        for name in ("groups", "subgroups")
    }
    _write(places["emojibase"] / "messages.json", messages)
    return places


def _entry(label: str, code: str, group: int, subgroup: int, tags: list[str]) -> dict:
    return {"label": label, "hexcode": code, "group": group, "subgroup": subgroup, "tags": tags}


def _add_tones(entry: dict, code: str) -> None:
    head, *rest = code.split("-")
    entry["skins"] = [
        {"label": f"{entry['label']}: {name} skin tone", "hexcode": "-".join([head, tone, *rest]), "tone": number}
        for number, (tone, name) in enumerate(zip(TONES, TONE_NAMES, strict=True), 1)
    ]


def _draw(places: dict[str, Path], entry: dict, number: int, form: int) -> None:
    for style in ("google", "twitter"):
        for tone, one in enumerate([entry, *entry.get("skins", [])]):
            image = Image.new("RGBA", (64, 64))
            draw = ImageDraw.Draw(image)
            ink = _INK.get(entry["label"].split()[0], SKIN[tone])
            outline = "black" if style == "google" else None
            draw.ellipse((8, 8, 56 - form * 8, 56), fill=ink, outline=outline, width=3)
            draw.rectangle(
                (number % 10 * 6, number // 10 * 6, number % 10 * 6 + 6, number // 10 * 6 + 8), fill=(9, 99, 199)
            )
            image.save(places[style] / f"{one['hexcode'].replace('-FE0F', '').lower()}.png")


def _write(file: Path, tree: object) -> None:
    file.write_text(json.dumps(tree), encoding="utf-8")
