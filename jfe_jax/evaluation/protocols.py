"""What a protocol's units are grouped by, and what its headline is.

M-BEIR's tasks fall into five forms after the paper "Joint Fusion and Encoding" (arXiv 2502.20008, figure 1). Which task
belongs to which form is our reading of their names: single-modal asks for its own modality, cross-modal for the other;
mixed-modal asks with one for both; conditional asks for an image by an image and a condition on it; multi-modal asks
with both for a text or for both.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from jfe_jax.data.formats.mbeir_records import TASKS

NEEDS_FUSION = (6, 7, 8)
DOES_NOT_NEED_FUSION = (0, 1, 3, 4)
FUSION = {"needs fusion": NEEDS_FUSION, "does not": DOES_NOT_NEED_FUSION}
FORMS = {"single-modal": (1, 4), "cross-modal": (0, 3), "mixed-modal": (2,), "multi-modal": (6, 8), "conditional": (7,)}
TASK_NAMES = {task: " → ".join(side.replace(",", "+") for side in modalities) for modalities, task in TASKS.items()}

# In the order of the published tables.
MBEIR_UNITS = (
    "visualnews_task0",
    "mscoco_task0",
    "fashion200k_task0",
    "webqa_task1",
    "edis_task2",
    "webqa_task2",
    "visualnews_task3",
    "mscoco_task3",
    "fashion200k_task3",
    "nights_task4",
    "oven_task6",
    "infoseek_task6",
    "fashioniq_task7",
    "cirr_task7",
    "oven_task8",
    "infoseek_task8",
)
# M-BEIR's headline takes hit@10 of these data sets and hit@5 of all others.
_HEADLINE_AT_10 = ("fashion200k", "fashioniq")


def headline_cutoff(dataset: str) -> int:
    """The k of hit@k that M-BEIR's headline takes of a data set."""
    return 10 if dataset in _HEADLINE_AT_10 else 5


@dataclass(frozen=True)
class Protocol:
    """How an evaluation's units are summed up.

    Attributes:
      name: "mbeir", "mmeb" or "jsonl".
      groups: name → whether a unit (its entry in results.json) belongs.
      units: whose mean the headline is, in order; () if there is no headline.
      headline, note: what the headline is called, and what that means.
      cutoff: data set → the k of the hit@k that the headline takes of it.
    """

    name: str
    groups: dict[str, Callable[[dict], bool]]
    units: tuple[str, ...] = ()
    headline: str = ""
    note: str = ""
    cutoff: Callable[[str], int] = headline_cutoff

    def order(self, unit: str, task: int | None) -> tuple:
        """A key to sort units by: those of the headline in its order, then by task and name."""
        known = self.units.index(unit) if unit in self.units else len(self.units)
        return known, -1 if task is None else task, unit

    def size(self, group: str) -> int:
        """How many of the headline's units belong to a group."""
        tasks = (re.search(r"_task(\d+)$", unit) for unit in self.units)
        entries = [
            {"unit": unit, "task": int(task[1]) if task else -1} for unit, task in zip(self.units, tasks, strict=True)
        ]
        return sum(map(self.groups[group], entries))


def _of_tasks(tasks: tuple[int, ...]) -> Callable[[dict], bool]:
    return lambda unit: unit["task"] in tasks


MBEIR = Protocol(
    "mbeir",
    {name: _of_tasks(tasks) for name, tasks in (FUSION | FORMS).items()},
    units=MBEIR_UNITS,
    headline="mean hit@5/10 of 16",
    note="hit@10 of Fashion200K and FashionIQ, hit@5 of the others, which the papers call Recall",
)
JSONL = Protocol("jsonl", {})

# MMEB's image tasks, those that its training set covers first (arXiv 2410.05160).
MMEB_IN = {
    "Classification": ("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
    "VQA": ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"),
    "Retrieval": (
        "VisDial",
        "CIRR",
        "VisualNews_t2i",
        "VisualNews_i2t",
        "MSCOCO_t2i",
        "MSCOCO_i2t",
        "NIGHTS",
        "WebQA",
    ),
    "Grounding": ("MSCOCO",),
}
MMEB_OUT = {
    "Classification": ("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    "VQA": ("ScienceQA", "VizWiz", "GQA", "TextVQA"),
    "Retrieval": ("FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    "Grounding": ("RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
}


def _of_names(names: tuple[str, ...]) -> Callable[[dict], bool]:
    return lambda unit: unit["unit"] in names


_MMEB_GROUPS = {name: MMEB_IN[name] + MMEB_OUT[name] for name in MMEB_IN} | {
    "IND": sum(MMEB_IN.values(), ()),
    "OOD": sum(MMEB_OUT.values(), ()),
}
MMEB = Protocol(
    "mmeb",
    {name: _of_names(names) for name, names in _MMEB_GROUPS.items()},
    units=sum((MMEB_IN[name] + MMEB_OUT[name] for name in MMEB_IN), ()),
    headline="mean hit@1 of 36",
    note="the right candidate first among the query's own, which the papers call Precision@1",
    cutoff=lambda dataset: 1,
)
PROTOCOLS = {protocol.name: protocol for protocol in (MBEIR, MMEB, JSONL)}
