"""Tests the emoji benchmark on drawn emoji: splits are disjoint, answers are correct and need the image."""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from jfe_jax.data.formats.mbeir import Mbeir
from jfe_jax.datasets import emoji
from jfe_jax.datasets.emoji import tasks
from jfe_jax.datasets.emoji.images import find_images, read_gallery
from jfe_jax.datasets.emoji.labels import read_labels
from jfe_jax.datasets.emoji.splits import SPLITS, make_split_views
from jfe_jax.datasets.emoji.tasks import SPECS
from jfe_jax.errors import UserError
from tests.support import emoji_packages

TONE = re.compile(r": ([a-z-]+) skin tone")
# The image supplies what the answer is of; the text must not.
CONCEPT_FROM_IMAGE = {"emoji_task6", "emoji_task8", "emojimodify_task7", "emojirelative_task7"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    return emoji_packages.packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module", autouse=True)
def few():
    """Fewer queries than the real benchmark has."""
    with pytest.MonkeyPatch.context() as patch:
        for name, max_queries in (("train", 600), ("test", 300)):
            patch.setitem(tasks.MAX_QUERIES, name, max_queries)
        yield


@pytest.fixture(scope="module")
def root(packages, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "emoji"
    emoji.write_benchmark(out, size=32, seed=3, fold=1, packages=packages, vocab_size=512)
    return out


@pytest.fixture(scope="module")
def everything(root):
    """(split, unit name, query, its JSON, local pool by id) of all queries."""
    data = Mbeir(root)
    found = []
    for name in data.splits:
        for unit in data.units(name):
            pool = {candidate.did: candidate for candidate in data.pool(name, unit, "local")}
            found += [
                (name, unit.name, query, json.loads(query.src_content), pool) for query in data.queries(name, unit)
            ]
    return found


def without_gender(name: str) -> str:
    return name.removeprefix("man ").removeprefix("woman ")


def shown(text: str) -> tuple[str, str | None, str]:
    """ "woman cook: dark skin tone (Noto)" → name, tone, style."""
    label, style = re.fullmatch(r"(.*) \((\w+)\)", text).groups()
    tone = TONE.search(label)
    return TONE.sub("", label), tone and tone[1], style


def test_every_unit_has_queries_and_files(root):
    data = Mbeir(root)
    assert set(data.splits) == set(SPLITS)
    for name in SPLITS:
        units = [unit.name for unit in data.units(name)]
        assert sorted(units) == sorted(spec.unit.name for spec in SPECS if name in spec.splits)
        # So few drawn emoji leave no validation group with genders.
        empty = [unit.name for unit in data.units(name) if not data.queries(name, unit)]
        assert not empty or name == "val"


def test_positives_are_in_both_pools_and_agree_with_qrels(root):
    data = Mbeir(root)
    for name in data.splits:
        for unit in data.units(name):
            qrels = data.qrels(name, unit) if data.queries(name, unit) else {}
            local = {candidate.did for candidate in data.pool(name, unit, "local")}
            union = {candidate.did for candidate in data.pool(name, unit, "global")}
            assert local <= union
            for query in data.queries(name, unit):
                assert query.pos and set(query.pos) <= local and set(query.neg) <= local
                assert qrels.pop(query.qid) == dict.fromkeys(query.pos, 1)
                assert not set(query.pos) & set(query.neg)
            assert not qrels


def test_a_candidate_is_in_a_pool_once(root):
    data = Mbeir(root)
    for name in data.splits:
        pool = data.pool(name, data.units(name)[0], "global")
        contents = [(one.text, one.image and Image.open(one.image).tobytes()) for one in pool]
        assert len(set(contents)) == len(contents) == len({one.did for one in pool})


def test_no_base_of_test_or_val_is_seen_in_training(everything, root):
    groups, images = defaultdict(set), defaultdict(set)
    for name, _, query, source, pool in everything:
        groups[name].add(source["group"])
        images[name] |= {query.image} | {pool[did].image for did in (*query.pos, *query.neg)}
        if name == "train":
            images[name] |= {candidate.image for candidate in pool.values()}
    assert not groups["test"] & groups["train"] and not groups["val"] & groups["train"]
    assert not groups["test"] & groups["val"] and groups["combo"] <= groups["train"]
    sources = {query.image for name, _, query, *_ in everything if name in ("test", "val")} - {None}
    assert sources and not sources & images["train"]
    labels = {source["shows"] for name, _, _, source, _ in everything if name == "test" and "shows" in source}
    trained = json.dumps([query.text for name, _, query, *_ in everything if name == "train"])
    for label in labels:
        assert shown(label)[0] not in trained


def test_combinations_ask_for_images_that_training_has_not(everything):
    seen = set()
    for name, _, query, _, pool in everything:
        if name == "train":
            seen |= {query.image} | {candidate.image for candidate in pool.values()}
    asked = 0
    for name, unit, query, _, pool in everything:
        if name == "combo":
            answers = {pool[did].image for did in query.pos}
            new = answers if None not in answers else {query.image}
            assert not new & seen, unit
            asked += 1
    assert asked


def test_texts_need_the_image(everything):
    checked = 0
    for _, unit, query, source, _ in everything:
        if (unit in CONCEPT_FROM_IMAGE and not source["edit"].startswith("keep_")) or source["edit"] == "keep_concept":
            for label in source["shows"].rpartition(" (")[0].split(" / "):
                name = without_gender(TONE.sub("", label))
                assert not re.search(rf"\b{re.escape(name)}\b", query.text, re.IGNORECASE), (query.text, name)
            checked += 1
    assert checked > 100


def test_the_same_relation_has_different_answers_for_different_images(everything):
    answers = defaultdict(set)
    for name, unit, query, _, _ in everything:
        if name == "train" and unit == "emojirelative_task7":
            answers[query.text].add(query.pos)
    assert answers and all(len(different) > 1 for different in answers.values())


@pytest.mark.parametrize("edit, step", [("darker", 1), ("lighter", -1), ("two_darker", 2), ("two_lighter", -2)])
def test_steps_change_the_tone_alone(everything, edit, step):
    checked = 0
    for _, unit, query, source, pool in everything:
        if unit == "emojirelative_task7" and source["edit"] == edit:
            name, tone, style = shown(source["shows"])
            index = emoji_packages.TONE_NAMES.index(tone) + step
            wanted = (name, emoji_packages.TONE_NAMES[index], style)
            assert {shown(pool[did].src_content) for did in query.pos} == {wanted}
            checked += 1
    assert checked


def test_swaps_take_the_other_value(everything):
    seen = set()
    for _, unit, query, source, pool in everything:
        if unit == "emojirelative_task7" and source["edit"] in ("gender_swap", "style_swap"):
            name, tone, style = shown(source["shows"])
            if source["edit"] == "gender_swap":
                name = name.replace("woman", "man") if "woman" in name else name.replace("man", "woman")
            else:
                style = "Noto" if style == "Twemoji" else "Twemoji"
            assert (name, tone, style) in {shown(pool[did].src_content) for did in query.pos}
            seen.add(source["edit"])
    assert len(seen) == 2


def test_named_values_are_those_of_the_answer(everything):
    checked = 0
    for _, unit, query, source, pool in everything:
        if unit == "emojimodify_task7":
            name, tone, style = shown(pool[query.pos[0]].src_content)
            if "tone" in source["edit"]:
                words = re.findall(r"yellow|medium-light|medium-dark|light|medium|dark", query.text.lower())
                assert words == [tone or "yellow"]
            if "style" in source["edit"]:
                assert style in query.text and style != shown(source["shows"])[2]
            if "gender" in source["edit"]:
                genders = {"man": "male", "woman": "female"}
                assert re.findall(r"\b(?:fe)?male\b|gender-neutral", query.text.lower()) == [
                    genders.get(name.split(" ")[0], "gender-neutral")
                ]
            checked += 1
    assert checked


def test_selected_values_come_from_the_image_and_the_rest_from_the_text(everything):
    checked = defaultdict(int)
    for _, unit, query, source, pool in everything:
        if unit == "emojiselect_task7" and source["edit"] != "keep_concept":
            own, own_tone, own_style = shown(source["shows"])
            name, tone, style = shown(pool[query.pos[0]].src_content)
            base, kept, text = without_gender(name), source["edit"].split("_"), query.text.lower()
            assert base.lower() in text and base != without_gender(own)
            if "tone" in kept:
                assert tone == own_tone and "light" not in text and "dark" not in text
            if "style" in kept:
                assert style == own_style and style.lower() not in text
            else:
                assert style.lower() in text
            if "gender" in kept:
                assert name.removesuffix(base) == own.removesuffix(without_gender(own))
                assert "man " not in text
            else:
                assert name.lower() in text
            checked[source["edit"]] += 1
    assert len(checked) == 5


def test_foils_are_wrong_answers(everything):
    found = 0
    for *_, query, source, pool in everything:
        if "foil" in source:
            assert source["foil"] in pool and source["foil"] not in query.pos
            found += 1
    assert found


def test_look_alikes_are_one_candidate_and_one_group(root, packages):
    gallery = _gallery(packages)
    flags = [picture for picture in gallery.pictures if picture.emoji.label.startswith("flag")]
    assert len({picture.image for picture in flags}) == 2  # one per vendor
    for fold in range(5):
        views = make_split_views(gallery, 0, fold)
        assert len([name for name in ("train", "val", "test") if flags[0].image in views[name].sources]) <= 1
    pool = Mbeir(root).pool("train", Mbeir(root).units("train")[0], "global")
    assert all(one.src_content.count("flag") in (0, 2) for one in pool if one.image)


def test_folds_part_the_groups_and_spread_the_toned_ones(packages):
    gallery = _gallery(packages)
    parts = [make_split_views(gallery, 7, fold)["test"].groups for fold in range(5)]
    assert (
        sum(map(len, parts))
        == len(set().union(*parts))
        == len(emoji_packages.ROLES) + len(emoji_packages.HANDS) + len(emoji_packages.THINGS) + 1
    )
    toned = [len(part & set(emoji_packages.ROLES)) for part in parts]
    assert toned == [2] * 5
    assert parts != [make_split_views(gallery, 8, fold)["test"].groups for fold in range(5)]


def test_two_runs_give_the_same_bytes(root, packages, tmp_path):
    emoji.write_benchmark(tmp_path / "again", size=32, seed=3, fold=1, packages=packages, vocab_size=512)
    assert _digests(tmp_path / "again") == _digests(root)


def test_images_have_the_size_and_the_tokenizer_the_vocabulary_asked_for(root):
    image = next((root / "mbeir_images").rglob("*.png"))
    with Image.open(image) as opened:
        assert opened.size == (32, 32) and opened.mode == "RGB"
        assert opened.getpixel((31, 31)) == (255, 255, 255)
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    assert len(tokenizer) == 512 and tokenizer.decode(tokenizer("one step darker").input_ids) == "one step darker"
    assert "CC-BY-4.0" in (root / "LICENSES.md").read_text(encoding="utf-8")


def test_a_finished_directory_is_reused_and_a_foreign_one_refused(root, packages, tmp_path):
    settings = dict(size=32, seed=3, fold=1, packages=packages, vocab_size=512)
    before = _digests(root)
    assert emoji.write_benchmark(root, **settings)["test/emoji_task0"] > 0
    with pytest.raises(UserError, match="was made with"):
        emoji.write_benchmark(root, **{**settings, "seed": 4})
    assert _digests(root) == before
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not made by this command"):
        emoji.write_benchmark(tmp_path, **settings)
    with pytest.raises(UserError, match="folds are 0 to 4"):
        emoji.write_benchmark(tmp_path / "new", fold=5, packages=packages)


def test_nothing_is_left_of_a_run_that_fails(packages, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emoji, "write_emoji_images", full)
    with pytest.raises(UserError, match="No space left"):
        emoji.write_benchmark(tmp_path / "out", packages=packages, vocab_size=512)
    assert not list(tmp_path.iterdir())


def test_a_broken_image_is_named(packages, tmp_path):
    broken = {key: tmp_path / key for key in packages}
    for key, place in packages.items():
        broken[key].mkdir()
        for file in place.iterdir():
            (broken[key] / file.name).write_bytes(file.read_bytes())
    victim = sorted(broken["google"].glob("*.png"))[3]
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(UserError, match=victim.name):
        emoji.write_benchmark(tmp_path / "out", packages=broken, vocab_size=512)


def _gallery(packages):
    files = {style: find_images(packages[style]) for style in ("google", "twitter")}
    return read_gallery(read_labels(packages["emojibase"], set(files["google"])), files)


def _digests(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }
