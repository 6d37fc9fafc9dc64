"""What went wrong where the first result is not right: was the instruction not followed, or the item not found?

Axes: Q queries.
"""

from collections.abc import Sequence

import numpy as np

from jfe_jax.evaluation.eval_set import CandidatePools, EvalQuery

# A mistake's number is its place here, from 1.
MISTAKES = ("right item, wrong modality", "other item, wrong modality", "right modality, wrong item")


def classify_mistakes(asked: Sequence[EvalQuery], first: np.ndarray, pools: CandidatePools) -> np.ndarray:
    """int8 [Q]: 0 where the first result is right, else the number of the mistake.

    A result has the wrong modality if no right candidate has it. It is then the right item if it shows the image or
    says the text of a right candidate or of the query itself: the caption that asks for an image, found as a text.

    Args:
      first: int [Q]; the first result of each query, a position in `pools.candidates`.
    """
    return np.array([_mistake(one, int(row), pools) for one, row in zip(asked, first, strict=True)], np.int8)


def _mistake(asked: EvalQuery, row: int, pools: CandidatePools) -> int:
    known = pools.candidates
    if known.did(row) in asked.relevant:
        return 0
    right = [one for did in asked.relevant if (one := known.row(did)) >= 0]
    if known.modality(row) in {asked.wanted, *map(known.modality, right)}:
        return 3
    found, right = known[row], [known[one] for one in right]
    about = [asked.query, *right]
    same_image = found.image is not None and any(found.image == one.image for one in about)
    same_text = found.text is not None and any(_plain(found.text) == _plain(one.text) for one in about if one.text)
    return 1 if same_image or same_text else 2


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
