"""M-BEIR's tasks by what they ask of a model."""

TASKS = {
    0: "text → image",
    1: "text → text",
    2: "text → image+text",
    3: "image → text",
    4: "image → image",
    6: "image+text → text",
    7: "image+text → image",
    8: "image+text → image+text",
}
NEEDS_FUSION = (6, 7, 8)
DOES_NOT_NEED_FUSION = (0, 1, 3, 4)
GROUPS = {"needs fusion": NEEDS_FUSION, "does not": DOES_NOT_NEED_FUSION}

# M-BEIR's headline takes hit@10 of these data sets and hit@5 of all others.
HEADLINE_AT_10 = ("fashion200k", "fashioniq")


def headline_cutoff(dataset: str) -> int:
    """The k of hit@k that M-BEIR's headline takes of a data set."""
    return 10 if dataset in HEADLINE_AT_10 else 5
