import json

import pytest

from jfe_jax.data.formats.mbeir import Mbeir, format_string, parse_dataset_id
from jfe_jax.errors import UserError
from tests.support.mbeir_directory import MODALITIES, UNITS, edit_line, edit_row, make_mbeir


@pytest.fixture
def own(tmp_path):
    """A copy of the directory that a test may modify."""
    return make_mbeir(tmp_path, queries_per_task=2)


def test_units_queries_pools_and_judgements_fit_together(mbeir_dir):
    mbeir = Mbeir(mbeir_dir)
    assert mbeir.splits == ["test", "train", "val"]
    assert [unit.name for unit in mbeir.units("val")] == sorted(f"{name}_task{task}" for task, name in UNITS.items())
    for unit in mbeir.units("val"):
        queries = mbeir.queries("val", unit)
        local = {one.did: one for one in mbeir.pool("val", unit, "local")}
        everything = {one.did for one in mbeir.pool("val", unit, "global")}
        qrels = mbeir.qrels("val", unit)
        assert len(queries) == 12 and len(local) == 40 and local.keys() < everything
        for query in queries:
            assert qrels[query.qid] == dict.fromkeys(query.pos, 1)
            assert query.modality == MODALITIES[unit.task][0] == query.item().modality
            assert {local[did].modality for did in query.pos} == {MODALITIES[unit.task][1]}
            assert set(query.neg) <= local.keys() and not set(query.neg) & set(query.pos)
            assert query.image is None or query.image.is_file()


def test_both_spellings_read_alike(tmp_path):
    code = Mbeir(make_mbeir(tmp_path / "code", queries_per_task=3))
    card = Mbeir(make_mbeir(tmp_path / "card", queries_per_task=3, spelling="card"))
    assert (tmp_path / "card/cand_pool/union_pool").is_dir() and not (tmp_path / "card/cand_pool/global").exists()

    def plain(one):
        return {name: getattr(one, name) for name in one.__slots__ if name != "image"}

    for unit in code.units("train"):
        assert [plain(one) for one in code.queries("train", unit)] == [
            plain(one) for one in card.queries("train", unit)
        ]
        for kind in ("local", "global"):
            assert [plain(one) for one in code.pool("train", unit, kind)] == [
                plain(one) for one in card.pool("train", unit, kind)
            ]
    known = code.instruction_table
    assert card.instruction_table.keys() == known.keys()


def test_instructions_are_found_by_name_and_by_id(mbeir_dir):
    mbeir = Mbeir(mbeir_dir)
    prompts = mbeir.instructions("shapes", "image,text", "image")
    assert prompts[0] == "Find by image,text what is meant." and len(prompts) == 4
    assert (
        prompts == mbeir.instructions(0, "image,text", "image") == mbeir.instructions("Shapes", "image,text", "image")
    )
    assert mbeir.instructions("shapes", "text", "text", required=False) == ()
    with pytest.raises(UserError, match="no instructions for dataset shapes, query text, candidate text"):
        mbeir.instructions("shapes", "text", "text")


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (' "a red car" ', "A red car."),
        ("Is it?\r\n", "Is it?"),
        ("done!", "Done!"),
        ("", ""),
        (None, ""),
        ("éa", "Éa."),
    ],
)
def test_texts_are_formatted_as_published(raw, wanted):
    assert format_string(raw) == wanted


def test_split_names_and_files_of_several_tasks(own):
    (own / "query/test_unseen_pairs").mkdir()
    row = (own / "query/val/mbeir_facts_task1_val.jsonl").read_text()
    (own / "query/test_unseen_pairs/mbeir_facts_task1_test_unseen_pairs.jsonl").write_text(row)
    (own / "query/union_train").mkdir()
    (own / "query/union_train/mbeir_union_up_train.jsonl").write_text(row)
    mbeir = Mbeir(own)
    (unit,) = mbeir.units("test_unseen_pairs")
    assert (unit.name, unit.dataset, unit.task) == ("facts_task1", "facts", 1)
    (union,) = mbeir.units("union_train")
    assert (union.name, union.task) == ("union_up", None)
    assert len(mbeir.queries("union_train", union)) == 2
    with pytest.raises(UserError, match="no unit facts_task2; there are facts_task1"):
        mbeir.unit("test_unseen_pairs", "facts_task2")
    with pytest.raises(UserError, match="no such split; there are"):
        mbeir.units("tset")


def test_a_pool_of_the_split_goes_before_the_tasks(own):
    one = (own / "cand_pool/local/mbeir_facts_task1_cand_pool.jsonl").read_text().splitlines()[0]
    (own / "cand_pool/local/mbeir_facts_task1_test_cand_pool.jsonl").write_text(one)
    mbeir = Mbeir(own)
    unit = mbeir.unit("test", "facts_task1")
    assert len(mbeir.pool("test", unit, "local")) == 1 and len(mbeir.pool("val", unit, "local")) == 40


QUERIES, POOL = "query/val/mbeir_facts_task6_val.jsonl", "cand_pool/local/mbeir_facts_task6_cand_pool.jsonl"
SPOILT = [
    (QUERIES, lambda file: edit_line(file, 2, lambda text: text[:-3]), "not JSON"),
    (QUERIES, lambda file: edit_line(file, 2, lambda text: "[1]"), "expected an object, got"),
    (QUERIES, lambda file: edit_line(file, 2, lambda text: "[" * 100_000), "not JSON"),
    (QUERIES, lambda file: edit_row(file, 2, query_modality="audio"), "unknown query_modality 'audio'"),
    (QUERIES, lambda file: edit_row(file, 2, query_modality="text"), "contradicts the fields"),
    (QUERIES, lambda file: edit_row(file, 2, query_img_path="../../etc/passwd"), "leaves the directory"),
    (QUERIES, lambda file: edit_row(file, 2, query_img_path="/etc/passwd"), "leaves the directory"),
    (QUERIES, lambda file: edit_row(file, 2, query_txt=7), "query_txt is text or null"),
    (QUERIES, lambda file: edit_row(file, 2, query_txt="\ud800"), "lone surrogate"),
    (QUERIES, lambda file: edit_row(file, 2, qid=None), "qid is a text"),
    (QUERIES, lambda file: edit_row(file, 2, pos_cand_list="2:1"), "pos_cand_list is a list"),
    (QUERIES, lambda file: edit_row(file, 2, neg_cand_list=[{"id": 3}]), "neg_cand_list is a list"),
    (POOL, lambda file: edit_row(file, 2, did=5), "did is a text"),
    (POOL, lambda file: edit_row(file, 2, txt=None), "contradicts the fields, which hold nothing"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), SPOILT)
def test_errors_name_the_file_and_the_line(own, name, spoil, message):
    file, line = spoil(own / name)
    mbeir = Mbeir(own)
    unit = mbeir.unit("val", "facts_task6")
    with pytest.raises(UserError) as caught:
        mbeir.queries("val", unit)
        mbeir.pool("val", unit, "local")
    assert str(caught.value).startswith(f"{file}:{line}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_named(own):
    file = own / QUERIES
    file.write_bytes(file.read_bytes() + b'{"qid": "\xff"}\n')
    mbeir = Mbeir(own)
    with pytest.raises(UserError, match=r"task6_val\.jsonl:3: not UTF-8"):
        mbeir.queries("val", mbeir.unit("val", "facts_task6"))


def test_missing_files_are_named(own):
    mbeir = Mbeir(own)
    unit = mbeir.unit("val", "facts_task6")
    (own / POOL).unlink()
    with pytest.raises(UserError, match="no such candidate pool"):
        mbeir.pool("val", unit, "local")
    file = mbeir.qrels_file("val", unit)
    file.write_text("2:1 0 2:3\n")
    with pytest.raises(UserError, match=r"qrels\.txt:1: a line of qrels"):
        mbeir.qrels("val", unit)
    file.unlink()
    with pytest.raises(UserError, match="no such qrels file"):
        mbeir.qrels("val", unit)
    with pytest.raises(UserError, match="no M-BEIR directory"):
        Mbeir(own / "query")


def test_ids_contain_their_dataset_number():
    assert parse_dataset_id("9:123") == 9
    with pytest.raises(ValueError, match="not dataset:number"):
        parse_dataset_id("mscoco-4")


def test_source_content_stays_as_it_is(own):
    edit_row(own / QUERIES, 1, query_src_content={"kind": "relative"})
    edit_row(own / QUERIES, 2, query_src_content='{"kind": "select"}')
    mbeir = Mbeir(own)
    first, second = mbeir.queries("val", mbeir.unit("val", "facts_task6"))
    assert json.loads(first.src_content) == {"kind": "relative"}
    assert second.src_content == '{"kind": "select"}'
