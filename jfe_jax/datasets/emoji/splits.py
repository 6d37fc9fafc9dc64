"""Splits the pictures: groups by fold, unseen combinations of seen groups, and the distractors of a pool.

Test and validation groups are never seen in training. Of some training groups a few images (a concept in a gender, a
tone and a vendor's style) are held out of every role in training: the split `combo` queries for them.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jfe_jax.datasets.emoji.images import Gallery, Picture, pictures_by_image

FOLDS = 5
SPLITS = ("train", "val", "test", "combo")

# Shares of the groups outside the test fold, with and without skin tones. Groups with skin tones yield most composed
# queries, and there are few of them.
_VAL_SHARE = {"tones": 0.08, "plain": 0.04}
_COMBO_SHARE = 0.25
_DISTRACTOR_SHARE = {"tones": 0.16, "plain": 0.03}
_HELD_OUT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class SplitView:
    """The images and groups that one split may use.

    Attributes:
      sources: images that may be query images.
      targets: images that may be positives.
      named: images that a query may name outright although it shows another (the select queries): seen in training.
      pool: images of the split's candidate pools.
      groups: the base groups that queries are about.
    """

    sources: frozenset[int]
    targets: frozenset[int]
    named: frozenset[int]
    pool: frozenset[int]
    groups: frozenset[str]


def map_split_groups(gallery: Gallery) -> dict[str, str]:
    """Maps the group of an emoji to the group it is split with: groups that share an image are merged."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for pictures in pictures_by_image(gallery).values():
        first, *others = sorted({find(picture.emoji.group) for picture in pictures})
        leader.update(dict.fromkeys(others, first))
    return {picture.emoji.group: find(picture.emoji.group) for picture in gallery.pictures}


def make_split_views(gallery: Gallery, seed: int, fold: int) -> dict[str, SplitView]:
    """Returns the view of each of SPLITS, a function of the pictures, `seed` and `fold` only."""
    base = map_split_groups(gallery)
    members = defaultdict(list)
    for picture in gallery.pictures:
        members[base[picture.emoji.group]].append(picture)
    roles = _assign_roles(members, seed, fold)
    images = {role: _images(members, groups) for role, groups in roles.items()}
    held_out = frozenset(
        picture.image for group in sorted(roles["combo"]) for picture in _hold_out(members[group], seed)
    )
    seen = _images(members, roles["train"]) - held_out
    distractors = images["distractor"]

    def unseen(role: str) -> SplitView:
        own = images[role]
        return SplitView(
            sources=own, targets=own | distractors, named=distractors, pool=own | distractors, groups=roles[role]
        )

    return {
        "train": SplitView(sources=seen, targets=seen, named=seen, pool=seen, groups=roles["train"]),
        "val": unseen("val"),
        "test": unseen("test"),
        "combo": SplitView(
            sources=images["combo"],
            targets=held_out,
            named=held_out,
            pool=images["combo"],
            groups=roles["combo"],
        ),
    }


def split_stratum(pictures: Sequence[Picture]) -> str:
    """Returns the stratum for even folds: groups with tones and genders, with one of them, or of a category."""
    tones = any(isinstance(picture.emoji.tone, int) for picture in pictures)
    genders = any(picture.emoji.gender for picture in pictures)
    if tones or genders:
        return f"tones={tones} genders={genders}"
    return pictures[0].emoji.category.split(":")[0]


def _assign_roles(members: dict[str, list[Picture]], seed: int, fold: int) -> dict[str, frozenset[str]]:
    strata = defaultdict(list)
    for group, pictures in members.items():
        strata[split_stratum(pictures)].append(group)
    roles: dict[str, set[str]] = {role: set() for role in ("train", "val", "test", "combo", "distractor")}
    dealt = 0
    for name in sorted(strata):
        ordered = _hash_order(strata[name], f"fold/{seed}")
        # Continuing where the last stratum ended keeps the folds balanced in size.
        test = {group for i, group in enumerate(ordered) if (i + dealt) % FOLDS == fold}
        dealt += len(ordered)
        rest = _hash_order([group for group in ordered if group not in test], f"roles/{seed}/{fold}")
        kind = "tones" if "tones=True" in name else "plain"
        shares = (_VAL_SHARE[kind], _COMBO_SHARE, _DISTRACTOR_SHARE[kind])
        val, combo, distractor = (round(len(rest) * share) for share in shares)
        roles["test"] |= test
        roles["val"] |= set(rest[:val])
        roles["train"] |= set(rest[val:])
        roles["combo"] |= set(rest[val : val + combo])
        roles["distractor"] |= set(rest[val + combo : val + combo + distractor])
    return {role: frozenset(groups) for role, groups in roles.items()}


def _hold_out(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    if len(pictures) == 2:
        # One vendor's drawing of a single emoji stays in training, so that the emoji is seen.
        return _hash_order(pictures, f"combo/{seed}", _picture_key)[:1]
    return _hash_order(pictures, f"combo/{seed}", _picture_key)[: round(len(pictures) * _HELD_OUT_SHARE)]


def _picture_key(picture: Picture) -> str:
    return f"{picture.emoji.code}/{picture.style}"


def _images(members: dict[str, list[Picture]], groups: Iterable[str]) -> frozenset[int]:
    return frozenset(picture.image for group in groups for picture in members[group])


def _hash_order(things, salt: str, key=str) -> list:
    """Orders items by a hash of each item's name and the salt, independently of the other items."""
    return sorted(things, key=lambda thing: hashlib.sha256(f"{salt}/{key(thing)}".encode()).digest())
