from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.train_step import batches
from jfe_jax import config as configs
from jfe_jax.data.pipeline.batch_builder import BatchShape, build_batch

STAGE2 = configs.load(Path(__file__).parents[3] / "configs" / "paligemma_3b" / "stage2.yaml")
DEVICES = 256


def test_stage_2s_rows_are_real_tokens_on_m_beirs_mix_and_no_pair_waits_long():
    """On a host with four of its devices; images are as long as there, but of 16 pixels."""
    model = replace(STAGE2.model, vision=replace(STAGE2.model.vision, image_size=16, patch_size=1))
    data, steps, groups = STAGE2.data, 40, 4
    shape = BatchShape(
        groups=groups,
        pairs=data.pairs // DEVICES,
        negatives=0,
        positives=1,
        rows=data.rows // DEVICES,
        row_tokens=data.row_tokens,
        image_slots=data.image_slots // DEVICES,
        image_size=16,
        layout="packed",
    )
    stream = enumerate(batches.mixed(replace(STAGE2, model=model), steps * groups * shape.pairs))
    waiting, seen, since, real, count = {}, [], {}, [], 0
    for step in range(steps - 5):
        builder, waiting = build_batch(shape, sorted(waiting.items()), stream)
        batch = builder.finish()
        real.append((batch.packed.segments > 0).mean())
        for group, indices in enumerate(builder.indices):
            # In the stream's order, whatever the order of packing.
            np.testing.assert_array_equal(batch.candidate_ids[group, : len(indices)], sorted(indices))
            seen += indices
        since = {index: since.get(index, step) for index in waiting}
        assert all(step - first < 2 for first in since.values())
        count += builder.count
    assert sorted([*seen, *waiting]) == list(range(len(seen) + len(waiting)))
    assert np.mean(real) >= 0.92
    assert count >= 0.95 * len(real) * groups * shape.pairs
