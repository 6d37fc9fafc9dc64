"""M-BEIR's units in numbers: what the benchmarks draw rows, texts and mixtures from.

Rows of queries and candidates by unit are UniIR's table of M-BEIR (arXiv 2311.17136, table 1), in thousands; texts'
mean lengths follow the sources' own (a caption 10 to 25 words, a passage of Wikipedia 100).
"""

from typing import NamedTuple

import numpy as np


class UnitShape(NamedTuple):
    """A unit as published: thousands of training queries and of its local pool's candidates, mean words of texts."""

    dataset: str
    number: int
    task: int
    queries: int
    candidates: int
    query_words: int
    candidate_words: int


UNITS = (
    UnitShape("visualnews", 0, 0, 99, 542, 19, 0),
    UnitShape("visualnews", 0, 3, 100, 537, 0, 19),
    UnitShape("fashion200k", 1, 0, 15, 201, 5, 0),
    UnitShape("fashion200k", 1, 3, 15, 61, 0, 5),
    UnitShape("webqa", 2, 1, 16, 544, 17, 45),
    UnitShape("webqa", 2, 2, 17, 403, 17, 13),
    UnitShape("edis", 3, 2, 26, 1047, 25, 16),
    UnitShape("nights", 4, 4, 16, 40, 0, 0),
    UnitShape("oven", 5, 6, 150, 676, 8, 100),
    UnitShape("oven", 5, 8, 157, 335, 8, 100),
    UnitShape("infoseek", 6, 6, 141, 611, 9, 100),
    UnitShape("infoseek", 6, 8, 143, 481, 9, 100),
    UnitShape("fashioniq", 7, 7, 16, 74, 11, 0),
    UnitShape("cirr", 8, 7, 26, 21, 12, 0),
    UnitShape("mscoco", 9, 0, 100, 5, 10, 0),
    UnitShape("mscoco", 9, 3, 113, 25, 0, 10),
)
MODALITIES = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
PROMPTS = (
    "Find an image or a text that answers the question.",
    "Retrieve what is asked for in the query.",
    "Which of the entries matches the given description best?",
    "Identify the entry that fits.",
)
# How often a data set's queries count in place of its size; M-BEIR's own, see configs/mbeir.yaml.
UPSAMPLE = {"webqa": 100_000.0, "edis": 50_000.0, "nights": 50_000.0, "fashioniq": 50_000.0, "cirr": 50_000.0}


def lengths(count: int, mean_words: int, rng: np.random.Generator) -> np.ndarray:
    """Words of `count` texts, int [count]: log-normal."""
    return np.maximum(2, rng.lognormal(np.log(mean_words) - 0.06, 0.35, count).round().astype(int))


def shares() -> np.ndarray:
    """Returns each unit's share of the up-sampled training union, float64 [units]."""
    sizes = np.array([1000.0 * unit.queries for unit in UNITS])
    datasets = np.array([unit.dataset for unit in UNITS])
    for name, count in UPSAMPLE.items():
        sizes[datasets == name] *= count / sizes[datasets == name].sum()
    return sizes / sizes.sum()
