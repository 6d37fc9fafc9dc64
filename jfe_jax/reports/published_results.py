"""Published figures, to stand beside ours: in %, each with its pool and where it was read.

M-BEIR's are hit@5 (hit@10 of Fashion200K and FashionIQ), which their papers call recall; MMEB's are hit@1.
"""

from dataclasses import dataclass, field

from jfe_jax.evaluation.protocols import MBEIR_UNITS


@dataclass(frozen=True)
class Published:
    """One row: `values` by unit or group, `mean` over all units of the protocol."""

    model: str
    pool: str
    mean: float
    source: str
    values: dict[str, float] = field(default_factory=dict)


def _units(*values: float) -> dict[str, float]:
    return dict(zip(MBEIR_UNITS, values, strict=True))


_UNIIR = "UniIR, arXiv 2311.17136"
_LAMRA = "LamRA, arXiv 2412.01720"
_MARVEL = "U-MARVEL, arXiv 2507.14902"
MBEIR = (
    Published("CLIP_SF", "local", 50.6, _UNIIR),
    Published(
        "CLIP_SF",
        "global",
        48.9,
        _UNIIR,
        _units(42.6, 77.9, 17.8, 84.7, 59.4, 78.8, 42.8, 92.3, 17.9, 32.0, 39.2, 24.0, 24.3, 43.9, 60.2, 44.6),
    ),
    Published("BLIP_FF", "local", 46.8, _UNIIR),
    Published(
        "BLIP_FF",
        "global",
        45.5,
        _UNIIR,
        _units(23.0, 75.6, 25.4, 79.5, 50.3, 79.7, 21.1, 88.8, 27.6, 33.0, 38.7, 19.7, 28.5, 51.4, 57.8, 27.7),
    ),
    Published("MM-Embed", "global", 52.7, "MM-Embed, arXiv 2411.02571"),
    Published("LamRA-Ret", "local", 56.6, _LAMRA),
    Published("LamRA-Ret", "global", 54.9, _LAMRA),
    Published("U-MARVEL (7B)", "local", 63.2, _MARVEL),
    Published("U-MARVEL (7B)", "global", 60.7, _MARVEL),
    Published("U-MARVEL (7B) + reranker", "local", 64.8, _MARVEL),
    Published("U-MARVEL (7B) + reranker", "global", 61.8, _MARVEL),
    Published("V-Retrver (reranker)", "local", 69.7, "V-Retrver, arXiv 2602.06034"),
)

_LEADERBOARD = "results.csv of the MMEB leaderboard (TIGER-Lab/MMEB)"
_MMEB_GROUPS = ("IND", "OOD", "Classification", "VQA", "Retrieval", "Grounding")
MMEB = tuple(
    Published(model, "per-query", mean, _LEADERBOARD, dict(zip(_MMEB_GROUPS, values, strict=True)))
    for model, mean, *values in (
        ("CLIP", 37.8, 37.1, 38.7, 42.8, 9.1, 53.0, 51.8),
        ("BLIP2", 25.2, 25.3, 25.1, 27.0, 4.2, 33.9, 47.0),
        ("SigLIP", 34.8, 32.3, 38.0, 40.3, 8.4, 31.6, 59.5),
        ("OpenCLIP", 39.7, 39.3, 40.2, 47.8, 10.9, 52.3, 53.3),
        ("UniIR (BLIP_FF)", 42.8, 44.7, 40.4, 42.1, 15.0, 60.1, 62.2),
        ("UniIR (CLIP_SF)", 44.7, 47.1, 41.7, 44.3, 16.2, 61.8, 65.3),
        ("E5-V", 13.3, 14.9, 11.5, 21.8, 4.9, 11.5, 19.0),
        ("MagicLens", 27.8, 31.0, 23.7, 38.8, 8.3, 35.4, 26.0),
        ("VLM2Vec (Phi-3.5-V, full)", 55.9, 62.8, 47.4, 52.8, 50.3, 57.8, 72.3),
        ("VLM2Vec (Phi-3.5-V, LoRA)", 60.1, 66.5, 52.0, 54.8, 54.9, 62.3, 79.5),
        ("VLM2Vec (LLaVA-1.6, LoRA, low resolution)", 55.0, 61.0, 47.5, 54.7, 50.3, 56.2, 64.0),
        ("VLM2Vec (LLaVA-1.6, LoRA, high resolution)", 62.9, 67.5, 57.1, 61.2, 49.9, 67.4, 86.1),
    )
)
BY_PROTOCOL = {"mbeir": MBEIR, "mmeb": MMEB}
