"""Any part of a parameter, read from the torch tensor that holds it."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfe_jax.hf.mapping import prefixes
from jfe_jax.models.hf_spec import Entry, transposed

ENTRIES = {
    "query": (Entry("a.query_dnh", "x.weight", 1), (6, 4, 5)),
    "out": (Entry("a.out_nhd", "x.weight", 2), (4, 5, 6)),
    "linear": (Entry("a.up_df", "x.weight", 1), (6, 9)),
    "head bias": (Entry("a.query_bias_nh", "x.bias"), (4, 5)),
    "table": (Entry("a.table_vd", "x.weight"), (11, 3)),
    "norm": (Entry("a.scale_d", "x.weight"), (7,)),
    "convolution": (Entry("a.patch_yxcd", "x.weight", convolution=True), (4, 4, 3, 5)),
}


@st.composite
def parts(draw):
    entry, shape = ENTRIES[draw(st.sampled_from(sorted(ENTRIES)))]
    index = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        index.append(slice(start, draw(st.integers(start + 1, size))))
    return entry, shape, tuple(index)


@given(parts())
def test_a_part_is_the_same_read_alone(drawn):
    entry, shape, index = drawn
    ours = np.arange(np.prod(shape)).reshape(shape)
    theirs = entry.to_theirs(ours)
    assert theirs.shape == entry.their_shape(shape)
    out = np.zeros_like(ours[index], order="C")
    entry.part(shape, index, theirs.__getitem__, out)
    np.testing.assert_array_equal(out, ours[index])


@pytest.mark.parametrize(
    ("name", "index", "block"),
    [
        ("query", (slice(2, 4), slice(1, 3), slice(0, 5)), (slice(5, 15), slice(2, 4))),
        ("out", (slice(1, 2), slice(0, 5), slice(0, 3)), (slice(0, 3), slice(5, 10))),
        ("head bias", (slice(1, 2), slice(0, 5)), (slice(5, 10),)),
        ("table", (slice(4, 8), slice(0, 3)), (slice(4, 8), slice(0, 3))),
    ],
)
def test_no_more_is_read_than_a_device_holds(name, index, block):
    entry, shape = ENTRIES[name]
    theirs = entry.to_theirs(np.zeros(shape))
    asked = []

    def fetch(index):
        asked.append(index)
        return theirs[index]

    entry.part(shape, index, fetch, np.empty([one.stop - one.start for one in index]))
    assert asked == [block]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_matrices_of_many_blocks_are_turned(dtype):
    matrix = np.random.default_rng(0).normal(size=(300, 4500)).astype(dtype)
    for one in (matrix, matrix[7:, 3:4001], matrix.T):
        np.testing.assert_array_equal(transposed(one), one.T)


def test_prefixes_are_as_the_files_spell_them():
    names = [
        "language_model.model.norm.weight",
        "vision_tower.vision_model.post_layernorm.bias",
        "vision_tower.vision_model.embeddings.position_ids",
        "multi_modal_projector.linear.bias",
        "language_model.lm_head.weight",
    ]
    assert prefixes(names) == {
        "vision_tower.": "vision_tower.vision_model.",
        "language_model.model.": "language_model.model.",
        "multi_modal_projector.": "multi_modal_projector.",
    }
    mixed = prefixes([*names, "vision_tower.post_layernorm.weight"])
    assert "vision_tower." not in mixed
