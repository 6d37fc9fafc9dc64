"""M-BEIR's tasks by what they ask of a model."""

from jfe_jax.data.mbeir_rows import TASKS

NEEDS_FUSION = (6, 7, 8)
DOES_NOT_NEED_FUSION = (0, 1, 3, 4)
GROUPS = {"needs fusion": NEEDS_FUSION, "does not": DOES_NOT_NEED_FUSION}
TASK_NAMES = {task: " → ".join(side.replace(",", "+") for side in modalities) for modalities, task in TASKS.items()}

# M-BEIR's headline takes hit@10 of these data sets and hit@5 of all others.
_HEADLINE_AT_10 = ("fashion200k", "fashioniq")


def headline_cutoff(dataset: str) -> int:
    """The k of hit@k that M-BEIR's headline takes of a data set."""
    return 10 if dataset in _HEADLINE_AT_10 else 5
