"""Queries with what was found for them, as cards: the right ones marked, thumbnails inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from jfe_jax.data.formats.mbeir import Candidate
from jfe_jax.data.image_transforms import decode
from jfe_jax.data.storage.image_store import ImageLookup
from jfe_jax.errors import UserError
from jfe_jax.evaluation.eval_set import EvalQuery
from jfe_jax.reports.html import text

THUMBNAIL = 96
SHOWN = 5


@dataclass(frozen=True)
class Ranking:
    """What one model found: its best candidates with their scores, and where the best right one stands (None: not in
    the pool); `model` is "" where there is only one."""

    model: str
    rank: int | None
    found: list[tuple[Candidate, float]]


@dataclass(frozen=True)
class Card:
    """One query; `outcome` is what it can be filtered by besides its unit."""

    unit: str
    outcome: str
    asked: EvalQuery
    rankings: list[Ranking]
    right: Candidate | None


def gallery(cards: Sequence[Card], outcomes: Sequence[str], images: ImageLookup) -> str:
    """Cards with filters by unit and outcome; empty without cards."""
    if not cards:
        return ""
    thumbnails = _Thumbnails(images)
    units = dict.fromkeys(card.unit for card in cards)
    outcomes = [outcome for outcome in outcomes if any(card.outcome == outcome for card in cards)]
    filters = _select("unit", "all units", list(units)) + _select("outcome", "all outcomes", outcomes)
    inner = "".join(_card(card, thumbnails) for card in cards)
    return f'<div class="filters">{filters}<span class="shown note"></span></div><div class="gallery">{inner}</div>'


def _card(card: Card, thumbnails: _Thumbnails) -> str:
    query = card.asked.query
    tags = [f'<span class="tag">{text(card.unit)}</span>']
    tags += [f'<span class="tag">{text(value)}</span>' for value in (card.asked.kind, card.asked.edit) if value]
    instruction = f'<div class="note">{text(card.asked.instruction)}</div>' if card.asked.instruction else ""
    said = f'<div class="said">{text(query.text)}</div>' if query.text else ""
    picture = _picture(query.image, thumbnails, "the query's image") if query.image is not None else ""
    lists = "".join(_ranking(ranking, card, thumbnails) for ranking in card.rankings)
    return (
        f'<article class="card" data-unit="{text(card.unit)}" data-outcome="{text(card.outcome)}">'
        f'<div class="tags">{"".join(tags)}</div><div class="ask">{picture}<div>{instruction}{said}</div></div>'
        f"{lists}</article>"
    )


def _ranking(ranking: Ranking, card: Card, thumbnails: _Thumbnails) -> str:
    rank = "not in the pool" if ranking.rank is None else f"right one at {ranking.rank}"
    state = "right" if ranking.rank == 1 else "wrong"
    model = f"<b>{text(ranking.model)}</b> " if ranking.model else ""
    shown = [_result(found, f"{score:.3f}", card, thumbnails) for found, score in ranking.found[:SHOWN]]
    if card.right is not None and ranking.rank is not None and ranking.rank > SHOWN:
        # In the last place: what should have been there.
        shown[-1] = _result(card.right, f"at {ranking.rank}", card, thumbnails)
    return (
        f'<div class="by">{model}<span class="tag {state}">{rank}</span></div><ol class="found">{"".join(shown)}</ol>'
    )


def _result(found: Candidate, caption: str, card: Card, thumbnails: _Thumbnails) -> str:
    right = ' class="right"' if found.did in card.asked.relevant else ""
    picture = _picture(found.image, thumbnails, found.did) if found.image is not None else ""
    words = f'<div class="words">{text(_short(found.text))}</div>' if found.text else ""
    return f'<li{right} title="{text(found.did)}">{picture}{words}<span class="score">{caption}</span></li>'


def _picture(path: Path, thumbnails: _Thumbnails, name: str) -> str:
    if not thumbnails[path]:
        return f'<div class="words note">{text(path.name)}: no image</div>'
    return f'<img class="picture" loading="lazy" alt="{text(name)}" src="{thumbnails[path]}">'


class _Thumbnails(dict[Path, str]):
    """Images as data URLs, made when they are asked for."""

    def __init__(self, images: ImageLookup):
        self._images = images

    def __missing__(self, path: Path) -> str:
        try:
            image = decode(self._images.get(path))
        except UserError:
            # The figures are there; a report does without a picture that has gone since.
            return self.setdefault(path, "")
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=70)
        return self.setdefault(path, f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def _select(name: str, everything: str, values: Sequence[str]) -> str:
    options = "".join(f'<option value="{text(value)}">{text(value)}</option>' for value in values)
    return f'<select name="{name}" aria-label="{name}"><option value="">{everything}</option>{options}</select>'


def _short(words: str, limit: int = 120) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"
