"""The contrastive losses as their formulas say, pair by pair in float64."""

import numpy as np

from jfe_jax.config import LossConfig
from jfe_jax.losses.contrastive import ContrastiveInputs


def plain(pairs: ContrastiveInputs, config: LossConfig, changes: dict[str, float] | None = None) -> tuple[float, float]:
    """Loss and accuracy; `changes` are values of the loss's parameters other than the config's."""
    values = {"log_inverse_temperature": -np.log(config.temperature), "bias": config.bias} | (changes or {})
    whole = _plain(pairs, config, values)
    total, weights = whole[0], 1.0
    for width, weight in config.matryoshka.items():
        short = pairs._replace(
            queries=_renormalised(pairs.queries, width), candidates=_renormalised(pairs.candidates, width)
        )
        total, weights = total + weight * _plain(short, config, values)[0], weights + weight
    return total / weights, whole[1]


def _renormalised(x: np.ndarray, width: int) -> np.ndarray:
    x = x[..., :width].astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _plain(pairs: ContrastiveInputs, config: LossConfig, values: dict[str, float]) -> tuple[float, float]:
    groups, n, _ = pairs.queries.shape
    c = pairs.candidates.shape[1]
    scale = np.exp(values["log_inverse_temperature"])
    scores = scale * np.einsum("gie,hje->gihj", pairs.queries.astype(np.float64), pairs.candidates.astype(np.float64))
    own_id, own_modality = pairs.candidate_ids[:, :n], pairs.candidate_modality[:, :n]

    def negative(g, i, h, j):
        if (g, i) == (h, j) or not pairs.query_valid[g, i] or not pairs.candidate_valid[h, j]:
            return False
        if config.mask_false_negatives and pairs.candidate_ids[h, j] in {*pairs.positive_ids[g, i], own_id[g, i]}:
            return False
        return config.negatives == "all" or pairs.candidate_modality[h, j] == own_modality[g, i]

    terms, hits = [], []
    for g in range(groups):
        for i in range(n):
            if not pairs.query_valid[g, i]:
                continue
            own = scores[g, i, g, i]
            rivals = [scores[g, i, h, j] for h in range(groups) for j in range(c) if negative(g, i, h, j)]
            hits.append(own > max(rivals, default=-np.inf))
            if config.kind == "sigmoid":
                bias = values["bias"]
                terms.append(np.log1p(np.exp(-own - bias)) + sum(np.log1p(np.exp(one + bias)) for one in rivals))
                continue
            forward = np.log(np.sum(np.exp([own, *rivals]))) - own
            rivals = [scores[h, j, g, i] for h in range(groups) for j in range(n) if negative(h, j, g, i)]
            backward = np.log(np.sum(np.exp([own, *rivals]))) - own
            terms.append((forward + backward) / 2 if config.directions == "both" else forward)
    return float(np.mean(terms)), float(np.mean(hits))
