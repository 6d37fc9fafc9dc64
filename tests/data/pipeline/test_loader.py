import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import synthetic_mbeir
from jfe_jax import config as configs
from jfe_jax.data.formats.candidate_ids import CandidateIndices
from jfe_jax.data.formats.mbeir import MODALITIES, Mbeir
from jfe_jax.data.ids import IDS_PER_DATASET
from jfe_jax.data.image_transforms import to_pixels
from jfe_jax.data.pipeline import mixture
from jfe_jax.data.pipeline.loader import training_batches
from jfe_jax.data.pipeline.pair_reader import redistribute
from jfe_jax.data.prepare.prepare import prepare_dataset
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.data.storage.prepared_dataset import PreparedDataset
from jfe_jax.errors import UserError
from tests.data.conftest import silent
from tests.support.mbeir_directory import edit_row, make_mbeir


def take(iterator, count):
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def with_data(cfg, **changes):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))


def leaves(batch):
    return [*batch.packed, *batch[1:]]


def assert_same(one, other):
    for left, right in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def segment(packed, group, item):
    start, end = packed.pool_span[group, item]
    return packed.tokens[group].ravel()[start:end]


def image_of(packed, group, item):
    (slots,) = np.nonzero(packed.image_start[group] == packed.pool_span[group, item, 0])
    return packed.pixels[group, slots[0]] if len(slots) else None


def test_each_pair_is_a_query_of_the_data_with_one_of_its_positives(make_config, mbeir_dir):
    """Every item of a batch is traced back to its row on disk by its tokens and its pixels."""
    cfg = make_config(hard_negatives=2, rows=24, image_slots=64)
    encoder = ItemEncoder(cfg.tokens, cfg.model.vision, cfg.model.image_token)
    mbeir = Mbeir(mbeir_dir)
    candidates, indices = {}, CandidateIndices(mbeir)
    for dataset in (0, 2):
        index = indices.for_dataset(dataset)
        candidates |= {int(index.find([one.did])[0][0]): one for one in index.candidates()}
    dids = {number: one.did for number, one in candidates.items()}
    known = {}
    for unit in mbeir.units("train"):
        for query in mbeir.queries("train", unit):
            wanted = next(one for one in candidates.values() if one.did == query.pos[0]).modality
            for prompt in mbeir.instructions(unit.dataset, query.modality, wanted):
                pixels = to_pixels(query.image, 32).tobytes() if query.image else None
                key = encoder.tokens(query.text, prompt, query.image is not None).tobytes(), pixels
                known.setdefault(key, []).append(query)
    seen_prompts, tasks = set(), set()
    for batch in take(training_batches(cfg, groups=2, split="train"), 4):
        packed, n = batch.packed, 8
        assert batch.candidate_ids.dtype == batch.positive_ids.dtype == np.int32
        assert batch.candidate_ids.shape == (2, n * 3) and batch.positive_ids.shape == (2, n, 2)
        assert packed.valid.shape == (2, n * 4) and packed.valid.all()
        for group, pair in itertools.product(range(2), range(n)):
            pixels = image_of(packed, group, pair)
            key = segment(packed, group, pair).tobytes(), None if pixels is None else pixels.tobytes()
            places = [pair, n + 2 * pair, n + 2 * pair + 1]
            numbers = batch.candidate_ids[group, places]
            modalities = [MODALITIES[one] for one in batch.candidate_modality[group, places]]
            assert modalities == [candidates[number].modality for number in numbers]
            queries = [query for query in known[key] if dids[numbers[0]] in query.pos]
            assert queries, "no such query has this positive"
            assert any({dids[one] for one in numbers[1:]} <= {*query.neg} for query in queries)
            right = {dids[one] for one in batch.positive_ids[group, pair] if one >= 0}
            assert any(right == {*query.pos} for query in queries)
            seen_prompts.add(key[0])
            for place, number in zip((n + pair, 2 * n + 2 * pair, 2 * n + 2 * pair + 1), numbers, strict=True):
                one = candidates[number]
                np.testing.assert_array_equal(
                    segment(packed, group, place), encoder.tokens(one.text, None, one.image is not None)
                )
                got = image_of(packed, group, place)
                assert (got is None) == (one.image is None)
                if got is not None:
                    np.testing.assert_array_equal(got, to_pixels(one.image, 32))
            tasks.add((queries[0].modality, candidates[numbers[0]].modality))
    assert len(tasks) == 8, "a task is missing in the mixture"


def test_batches_are_a_function_of_seed_and_step(make_config):
    cfg = make_config()
    first = take(training_batches(cfg, groups=2, split="train"), 5)
    again = take(training_batches(cfg, groups=2, split="train"), 5)
    for one, other in zip(first, again, strict=True):
        assert_same(one, other)
    (other,) = take(training_batches(dataclasses.replace(cfg, seed=1), groups=2, split="train"), 1)
    assert not np.array_equal(first[0].candidate_ids, other.candidate_ids)
    uncached = take(training_batches(make_config(image_cache_mib=0), groups=2, split="train"), 5)
    for one, other in zip(first, uncached, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("tight", [False, True])
def test_a_resumed_iterator_goes_on_as_if_it_had_never_stopped(make_config, tight):
    """Also when pairs wait for the next step because the rows are too few for all of them."""
    cfg = make_config(rows=4 if tight else 12)
    iterator = training_batches(cfg, groups=2, split="train")
    list(itertools.islice(iterator, 3))
    state = json.loads(json.dumps(iterator.get_state()))
    assert bool(state["waiting"]) == tight
    rest = take(iterator, 4)
    fresh = training_batches(cfg, groups=2, split="train")
    next(fresh)
    fresh.set_state(state)
    for one, other in zip(rest, take(fresh, 4), strict=True):
        assert_same(one, other)
    assert len(json.dumps(state)) < 300


def test_what_does_not_fit_waits_and_nothing_is_lost(make_config, caplog):
    """All pairs of the stream come out, in a tight layout as in a roomy one, and fillers are marked."""

    def pairs(batches):
        for batch in batches:
            for group in range(2):
                for pair in np.flatnonzero(batch.packed.valid[group, :8]):
                    yield segment(batch.packed, group, pair).tobytes(), int(batch.candidate_ids[group, pair])

    roomy = list(pairs(take(training_batches(make_config(), groups=2, split="train"), 12)))
    assert len(roomy) == 12 * 16
    batches = take(training_batches(make_config(rows=4), groups=2, split="train"), 24)
    tight = list(pairs(batches))
    short = [batch for batch in batches if not batch.packed.valid.all()]
    assert short
    assert "raise data.image_slots or data.rows" in caplog.text
    for batch in batches:
        valid = batch.packed.valid
        np.testing.assert_array_equal(valid[:, :8], valid[:, 8:])
        np.testing.assert_array_equal(batch.candidate_ids >= 0, valid[:, 8:])
        np.testing.assert_array_equal((batch.positive_ids >= 0).any(-1), valid[:, :8])
    # Those that wait at the end are the only ones missing of as many as have been taken.
    waiting = 2
    assert len(tight) > len(roomy)
    early = roomy[: len(roomy) - waiting]
    left = list(tight)
    for pair in early:
        left.remove(pair)


def test_one_group_and_many_have_the_same_pairs(make_config):
    one = take(training_batches(make_config(rows=24), groups=1, split="train"), 3)
    four = take(training_batches(make_config(rows=24), groups=4, split="train"), 3)
    for whole, split in zip(one, four, strict=True):
        pairs = []
        for batch in (whole, split):
            right = batch.positive_ids.reshape(-1, batch.positive_ids.shape[2]).tolist()
            pairs.append(sorted(zip(batch.candidate_ids.ravel(), right, strict=True)))
        assert pairs[0] == pairs[1]


def test_processes_share_the_stream(make_config):
    cfg = make_config()
    whole = take(training_batches(make_config(pairs=32, rows=24, image_slots=64), groups=2, split="train"), 2)
    parts = [
        take(training_batches(cfg, groups=2, split="train", process_index=index, process_count=2), 2)
        for index in range(2)
    ]
    assert parts[0][0].candidate_ids.shape == (1, 8)
    got = sorted(number for part in parts for batch in part for number in batch.candidate_ids.ravel())
    wanted = np.concatenate([batch.candidate_ids.ravel() for batch in whole])[: len(got)]
    assert got == sorted(wanted)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4)])
def test_another_number_of_processes_goes_on_with_nothing_twice_and_nothing_left_out(make_config, before, after):
    """Also with pairs that wait, which a tight layout has: the stream's pairs come once each, by their positives."""
    cfg = make_config(mixture={"shapes_task0": 1.0}, instruction_probability=0.0, rows=4, row_tokens=48)

    def run(states, count, steps):
        taken, after_states = [], []
        for index in range(count):
            iterator = training_batches(cfg, groups=4, split="train", process_index=index, process_count=count)
            if states:
                iterator.set_state(redistribute(json.loads(json.dumps(states)), index, count))
            for batch in itertools.islice(iterator, steps):
                for group, pair in zip(*np.nonzero(batch.packed.valid[:, : batch.positive_ids.shape[1]]), strict=True):
                    taken.append(segment(batch.packed, group, pair).tobytes())
            after_states.append(iterator.get_state())
            iterator.close()
        return taken, after_states

    first, states = run(None, before, 2)
    assert any(state["waiting"] for state in states)
    second, states = run(states, after, 3)
    # What waits in the end has been taken out of the stream and not come yet.
    end = max(state["base"] + after * state["next"] for state in states)
    left = [
        number
        for place, state in enumerate(states)
        for number in (*state["waiting"], *range(state["base"] + place + after * state["next"], end, after))
    ]
    # In one group pairs stand in the stream's order.
    stream = training_batches(with_data(cfg, rows=400), groups=1, split="train")
    wanted = []
    while len(wanted) < end:
        batch = next(stream)
        wanted += [segment(batch.packed, 0, pair).tobytes() for pair in range(batch.positive_ids.shape[1])]
    stream.close()
    wanted = [one for number, one in enumerate(wanted[:end]) if number not in left]
    assert sorted(first + second) == sorted(wanted)


def test_every_query_comes_once_in_an_epoch(make_config, mbeir_dir):
    cfg = make_config(mixture={"shapes_task0": 1.0}, pairs=4, instruction_probability=0.0)
    mbeir = Mbeir(mbeir_dir)
    count = len(mbeir.queries("train", mbeir.unit("train", "shapes_task0")))
    batches = take(training_batches(cfg, groups=1, split="train"), 2 * count // 4)
    texts = [segment(batch.packed, 0, pair).tobytes() for batch in batches for pair in range(4)]
    first, second = texts[:count], texts[count:]
    assert sorted(first) == sorted(second) and first != second


def test_weights_instructions_and_order_follow_the_config(make_config, mbeir_dir):
    cfg = make_config(mixture={"shapes_task0": 3.0, "facts_task1": 1.0, "facts_task2": 0.0})
    batches = take(training_batches(cfg, groups=1, split="train"), 8)
    share = np.mean([batch.candidate_ids[0] < 10_000_000 for batch in batches])
    assert abs(share - 0.75) < 0.02

    in_order = make_config(mixture={"shapes_task0": 1.0}, shuffle=False, instruction_probability=0.0, pairs=4)
    encoder = ItemEncoder(in_order.tokens, in_order.model.vision, in_order.model.image_token)
    mbeir = Mbeir(mbeir_dir)
    queries = mbeir.queries("val", mbeir.unit("val", "shapes_task0"))
    (batch,) = take(training_batches(in_order, groups=1, split="val"), 1)
    for pair, query in enumerate(queries[:4]):
        np.testing.assert_array_equal(segment(batch.packed, 0, pair), encoder.tokens(query.text, None, False))


def test_homogeneous_sub_batches_are_of_one_unit_and_keep_the_shares(make_config):
    """Told by dataset, of which each unit here has one."""
    shares = {"shapes_task0": 3.0, "facts_task1": 1.0}
    batches = take(training_batches(make_config(mixture=shares, homogeneous=4), groups=1, split="train"), 8)
    datasets = np.concatenate([batch.candidate_ids[0, :16] // IDS_PER_DATASET for batch in batches])
    blocks = datasets.reshape(-1, 4)
    assert (blocks == blocks[:, :1]).all() and abs((datasets == 0).mean() - 0.75) < 0.05
    mixed = take(training_batches(make_config(mixture=shares), groups=1, split="train"), 8)
    mixed = np.concatenate([batch.candidate_ids[0, :16] // IDS_PER_DATASET for batch in mixed]).reshape(-1, 4)
    assert not (mixed == mixed[:, :1]).all()
    # Each query still comes once in an epoch.
    one = make_config(mixture={"shapes_task0": 1.0}, homogeneous=4, pairs=12, instruction_probability=0.0)
    (batch,) = take(training_batches(one, groups=1, split="train"), 1)
    whole = {segment(batch.packed, 0, pair).tobytes() for pair in range(12)}
    (plain,) = take(
        training_batches(with_data(one, homogeneous=1), groups=1, split="train"),
        1,
    )
    assert whole == {segment(plain.packed, 0, pair).tobytes() for pair in range(12)}
    with pytest.raises(UserError, match=r"data\.homogeneous: 0"):
        training_batches(make_config(homogeneous=0), groups=1, split="train")


def test_targets_say_how_many_queries_a_data_set_counts_as():
    """M-BEIR's own: the up-sampled union has 1,332,790 rows, of 1,150,203."""
    published = configs.load("configs/mbeir.yaml").data
    sizes = {f"{unit.dataset}_task{unit.task}": 1000 * unit.queries for unit in synthetic_mbeir.UNITS}
    weights = mixture.weights(published, sizes, "there")
    assert weights["webqa_task1"] + weights["webqa_task2"] == pytest.approx(100_000)
    assert weights["webqa_task1"] / weights["webqa_task2"] == pytest.approx(16 / 17)
    assert (weights["nights_task4"], weights["mscoco_task3"]) == (50_000, 113_000)
    assert sum(weights.values()) == pytest.approx(1_332_790, rel=0.002)
    with pytest.raises(UserError, match="no unit of nigths in this split; did you mean nights"):
        mixture.weights(dataclasses.replace(published, upsample={"nigths": 1.0}), sizes, "there")
    with pytest.raises(UserError, match="give one of them"):
        mixture.weights(dataclasses.replace(published, mixture={"nights_task4": 1.0}), sizes, "there")
    with pytest.raises(UserError, match="has to be above 0"):
        mixture.weights(dataclasses.replace(published, upsample={"nights": 0.0}), sizes, "there")


def test_hard_negatives_are_of_any_modality_or_the_wanted_one(tmp_path, make_config):
    own = make_mbeir(tmp_path / "mbeir", queries_per_task=4)
    file = own / "query/train/mbeir_facts_task1_train.jsonl"
    pools = {t: (own / f"cand_pool/local/mbeir_facts_task{t}_cand_pool.jsonl").read_text().splitlines() for t in (1, 2)}
    text, both = ([json.loads(row)["did"] for row in pools[t][30:32]] for t in (1, 2))
    for line in range(1, 5):
        edit_row(file, line, neg_cand_list=[*text, *both])
    list(prepare_dataset(Mbeir(own), tmp_path / "out", progress=silent, units=["facts_task1"], splits=["train"]))
    found = {}
    for wanted in ("any", "positive"):
        cfg = make_config(path=str(tmp_path / "out"), pairs=4, hard_negatives=3, negative_modality=wanted)
        (batch,) = take(training_batches(cfg, groups=1, split="train"), 1)
        negatives = batch.candidate_ids[0, 4:].reshape(4, 3)
        found[wanted] = (negatives >= 0).sum(1)
        kinds = batch.candidate_modality[0, 4:][batch.candidate_ids[0, 4:] >= 0]
        assert (set(kinds.tolist()) == {0}) == (wanted == "positive")
    assert found["any"].tolist() == [3] * 4 and found["positive"].tolist() == [2] * 4


def test_images_are_shifted_in_training_and_not_in_validation(make_config):
    """A shifted image is one of the 49 that `image_shift: 3` can make of it, and the draws are of seed and step."""
    plain = take(training_batches(make_config(), groups=1, split="train"), 2)
    shifted = take(training_batches(make_config(image_shift=3), groups=1, split="train"), 2)
    for one, other in zip(plain, shifted, strict=True):
        for before, after in zip(leaves(one)[:3], leaves(other)[:3], strict=True):
            np.testing.assert_array_equal(before, after)
    ways = list(itertools.product(range(-3, 4), repeat=2))
    made = [shift_by_padding(image, *way).tobytes() for image in plain[0].packed.pixels[0] for way in ways]
    counts = np.zeros(len(ways), int)
    for place, image in enumerate(shifted[0].packed.pixels[0]):
        mine = np.array([one == image.tobytes() for one in made[place * len(ways) : (place + 1) * len(ways)]])
        assert mine.any()
        counts += mine
    # An empty slot counts everywhere, so what is left is the draws.
    assert (counts > counts.min()).sum() > 5
    again = take(training_batches(make_config(image_shift=3), groups=1, split="train"), 2)
    for one, other in zip(shifted, again, strict=True):
        assert_same(one, other)
    (val,) = take(training_batches(make_config(image_shift=3), groups=1, split="val"), 1)
    assert_same(val, take(training_batches(make_config(), groups=1, split="val"), 1)[0])
    with pytest.raises(UserError, match=r"data.image_shift: 32 is not"):
        training_batches(make_config(image_shift=32), groups=1, split="train")


def shift_by_padding(image, down, right):
    height, width = image.shape[:2]
    return np.pad(image, ((4, 4), (4, 4), (0, 0)), "edge")[4 - down : 4 - down + height, 4 - right : 4 - right + width]


def test_padded_layout_has_an_item_a_row(make_config):
    cfg = make_config(layout="padded", rows=32)
    (padded,) = take(training_batches(cfg, groups=2, split="train"), 1)
    (packed,) = take(training_batches(make_config(), groups=2, split="train"), 1)
    assert padded.packed.segments.max() == 1 and packed.packed.segments.max() > 1
    np.testing.assert_array_equal(padded.candidate_ids, packed.candidate_ids)


def test_bins_hold_the_pairs_that_rows_do(make_config):
    cfg = make_config()
    tokens = cfg.data.rows * cfg.data.row_tokens
    binned = make_config(bins={cfg.data.row_tokens: 2 * cfg.data.rows})
    for batch, other in zip(
        *(take(training_batches(one, groups=2, split="train"), 2) for one in (cfg, binned)), strict=True
    ):
        assert [part.shape for part in other.packed.bins.token_index] == [(2, cfg.data.rows, cfg.data.row_tokens)]
        assert other.packed.tokens.size == tokens
        assert other.packed.valid.sum() >= batch.packed.valid.sum()


def test_fewer_negatives_than_wanted_leave_fillers(make_config):
    (batch,) = take(
        training_batches(make_config(hard_negatives=5, rows=48, image_slots=96), groups=1, split="train"), 1
    )
    negatives = batch.candidate_ids[0, 16:].reshape(16, 5)
    assert (negatives[:, :3] >= 0).all() and (negatives[:, 3:] == -1).all()
    valid = batch.packed.valid[0, 32:].reshape(16, 5)
    np.testing.assert_array_equal(valid, negatives >= 0)
    assert all(len({*row}) == 3 for row in negatives[:, :3].tolist())


@pytest.mark.parametrize(
    ("data", "tokens", "message"),
    [
        ({"path": ""}, {}, "data.path: not set"),
        ({"path": "/nowhere"}, {}, "/nowhere: no prepared data there"),
        ({"mixture": {"shape_task0": 1.0}}, {}, "did you mean shapes_task0"),
        ({"mixture": {"shapes_task0": -1.0}}, {}, "negative"),
        ({"mixture": {"shapes_task0": 0.0}}, {}, "every weight is 0"),
        ({"pairs": 15}, {}, "data.pairs: 15 is not divisible"),
        ({"rows": 13}, {}, "data.rows: 13 is not divisible"),
        ({"row_tokens": 40}, {}, "data.row_tokens: 40 is less than the longest item"),
        ({"bins": {64: 13}}, {}, "data.bins: 13 bins of 64 tokens do not divide among 2 groups"),
        ({"bins": {64: 2}}, {}, "data.bins: they have room for 128 tokens, fewer than"),
        ({"bins": {40: 64}}, {}, "data.bins: 40 is less than the longest item"),
        ({"bins": {64: 64}, "layout": "padded"}, {}, "data.bins: only for packed items, not with data.layout padded"),
        ({"layout": "padded"}, {}, "needs a row for each of the 32 items"),
        ({}, {"tokenizer": "/nowhere"}, "does not exist"),
    ],
)
def test_wrong_configurations_are_refused(make_config, data, tokens, message):
    with pytest.raises(UserError, match=message):
        training_batches(make_config(tokens, **data), groups=2, split="train")


def test_wrong_arguments_are_refused(make_config):
    with pytest.raises(UserError, match="no unit has a split 'trian'; did you mean train"):
        training_batches(make_config(), groups=2, split="trian")
    with pytest.raises(UserError, match="3 processes"):
        training_batches(make_config(), groups=2, split="train", process_count=3)
    cfg = make_config()
    small = dataclasses.replace(cfg.model, text=dataclasses.replace(cfg.model.text, vocab_size=500))
    with pytest.raises(UserError, match="vocab_size is 500"):
        training_batches(dataclasses.replace(cfg, model=small), groups=2, split="train")


def test_a_pair_larger_than_a_group_is_named(make_config):
    iterator = training_batches(make_config(image_slots=0), groups=2, split="train")
    with pytest.raises(UserError, match=r"query \d:\d+ .* does not fit into a group"):
        take(iterator, 50)


def test_other_candidates_than_the_queries_were_made_with_are_refused(make_config, tmp_path):
    own = make_mbeir(tmp_path / "mbeir", queries_per_task=2)
    list(prepare_dataset(Mbeir(own), tmp_path / "out", progress=silent, units=["facts_task1", "facts_task6"]))
    edit_row(own / "cand_pool/local/mbeir_facts_task1_cand_pool.jsonl", 1, txt="another text")
    list(prepare_dataset(Mbeir(own), tmp_path / "out", progress=silent, units=["facts_task1"]))
    cfg = make_config(path=str(tmp_path / "out"))
    with pytest.raises(UserError, match="facts_task6: made with other candidates"):
        training_batches(cfg, groups=1, split="train")


def test_an_unreadable_image_is_skipped_counted_and_said_once(make_config, monkeypatch, caplog):
    cfg = make_config(mixture={"facts_task1": 1.0, "shapes_task3": 1.0}, image_cache_mib=0)
    whole = take(training_batches(cfg, groups=1, split="train"), 4)
    find, broken = PreparedDataset.image, set()

    def one_broken(self, image_id, parts):
        if "shapes_task3" in parts and (not broken or image_id in broken):
            broken.add(image_id)
            return b"no image"
        return find(self, image_id, parts)

    monkeypatch.setattr(PreparedDataset, "image", one_broken)
    iterator = training_batches(cfg, groups=1, split="train")
    batches = list(itertools.islice(iterator, 4))
    state = iterator.get_state()
    iterator.close()
    assert [*state["bad"]] == ["shapes_task3"] and state["bad"]["shapes_task3"] > 1
    said = [one.message for one in caplog.records if "skipped a pair" in one.message]
    assert len(said) == len({*said}) and "of shapes_task3: image of query 0:" in said[0]
    # The rest is as it was, in order.
    ids = [np.concatenate([batch.candidate_ids[0, :16] for batch in some]).tolist() for some in (whole, batches)]
    kept = iter(ids[0])
    missing = 0
    for number in ids[1][: 64 - state["bad"]["shapes_task3"]]:
        while next(kept) != number:
            missing += 1
    assert missing == state["bad"]["shapes_task3"] or missing + 1 == state["bad"]["shapes_task3"]
    strict = with_data(cfg, max_bad_share=0.0)
    with pytest.raises(UserError, match=r"1 of \d+ pairs could not be read, more than data.max_bad_share, 0: image of"):
        take(training_batches(strict, groups=1, split="train"), 4)


def test_an_image_that_cannot_be_read_is_named(make_config, monkeypatch):
    def broken(*_):
        raise OSError("broken")

    monkeypatch.setattr(Image.Image, "load", broken)
    with pytest.raises(UserError, match=r"image of (query|candidate) \d:\d+: cannot be read as an image \(broken\)"):
        take(training_batches(make_config(), groups=2, split="train"), 3)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_reader_processes_read_the_same_and_resume_too(make_config, tmp_path):
    """In a process of its own, as a worker imports the main module anew."""
    cfg = make_config(workers=2)
    script = tmp_path / "read.py"
    script.write_text(
        f"""
import dataclasses, itertools, json, multiprocessing
import numpy as np
from jfe_jax.config import from_dict
from jfe_jax.data.pipeline.loader import training_batches
from jfe_jax.errors import UserError

def main():
    cfg = from_dict({json.loads(json.dumps(dataclasses.asdict(cfg) | {"optimizer": {}}))!r})
    here = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=0))
    alone = training_batches(here, groups=2, split="train")
    iterator = training_batches(cfg, groups=2, split="train")
    first = list(itertools.islice(iterator, 3))
    for one, other in zip(first, alone):
        for left, right in zip((*one.packed, *one[1:]), (*other.packed, *other[1:]), strict=True):
            np.testing.assert_array_equal(left, right)
    alone.close()
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(itertools.islice(iterator, 2))
    iterator.close()
    resumed = training_batches(cfg, groups=2, split="train")
    resumed.set_state(state)
    for one, other in zip(rest, resumed):
        for left, right in zip((*one.packed, *one[1:]), (*other.packed, *other[1:]), strict=True):
            np.testing.assert_array_equal(left, right)
    assert not np.array_equal(first[0].candidate_ids, first[1].candidate_ids)
    print("resumed")
    readers = multiprocessing.active_children()
    readers[1].kill()
    try:
        for _ in resumed:
            pass
    except UserError as error:
        print(error)
    resumed.close()
    print(len(readers), "readers,", len(multiprocessing.active_children()), "left")

if __name__ == "__main__":
    main()
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=400)
    resumed, killed, left = done.stdout.splitlines()
    assert (resumed, left, done.stderr) == ("resumed", "2 readers, 0 left", "")
    assert killed.startswith("a reader process ended with status -9; ")


def test_leaving_the_iterator_open_ends_the_process_cleanly(make_config, tmp_path):
    cfg = make_config()
    script = f"""
from jfe_jax.config import from_dict
from jfe_jax.data.pipeline.loader import training_batches
cfg = from_dict({json.loads(json.dumps(dataclasses.asdict(cfg) | {"optimizer": {}}))!r})
iterator = training_batches(cfg, groups=2, split="train")
next(iterator)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
