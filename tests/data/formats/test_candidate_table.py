"""Compares the candidate table with plain Python."""

import json
from pathlib import Path

import numpy as np
import pytest

from jfe_jax.data.formats.candidate_table import CandidateTable, content_id, read_candidate_table
from jfe_jax.data.formats.mbeir import Candidate, Mbeir
from jfe_jax.errors import UserError


@pytest.fixture
def mbeir(tmp_path):
    (tmp_path / "query").mkdir()
    return Mbeir(tmp_path)


def pool(mbeir, name, *rows):
    lines = [json.dumps({"modality": "image,text" if "img_path" in row else "text"} | row) for row in rows]
    (mbeir.path / name).write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return mbeir.path / name


def test_rows_are_those_of_the_files(mbeir):
    random = np.random.default_rng(0)
    numbers = random.choice(5000, 700, replace=False)
    rows = [{"did": f"{n % 3}:{n}", "txt": f"é {n % 90}", "img_path": f"{n % 7}.png"} for n in numbers.tolist()]
    rows = [row if number % 2 else {key: row[key] for key in ("did", "txt")} for number, row in enumerate(rows)]
    files = [pool(mbeir, "a.jsonl", *rows[:400]), pool(mbeir, "b.jsonl", *rows[300:], rows[310])]
    known, members = read_candidate_table(files, mbeir.candidate, mbeir.path)
    expected = sorted({row["did"] for row in rows}, reverse=True)
    assert [one.did for one in known] == expected == known.dids(np.arange(len(known))).tolist()
    for file, part in zip(files, (rows[:400], rows[300:]), strict=True):
        assert known.dids(members[file]).tolist() == sorted((row["did"] for row in part), reverse=True)
    by_did = {one.did: one for file in files for one in mbeir.candidates(file)}
    for number, did in enumerate(expected):
        assert known[number] == by_did[did] and known.row(did) == number and known.did(number) == did
        assert known.modality(number) == by_did[did].modality
        assert known.contents[number] == content_id(None, by_did[did].text, by_did[did].image, mbeir.path)
    assert known.row("9:9") == known.row("") == known.row("\U0010ffff") == -1
    shown = [number for number, one in enumerate(known) if one.image == mbeir.path / "5.png"]
    assert shown and known.showing(mbeir.path / "5.png").tolist() == shown
    assert not len(known.showing(mbeir.path / "none.png"))
    assert set(known.files) == {0, 1} and known.names == ["a", "b"]
    assert len(np.unique(known.contents)) == len({(one.text, one.image) for one in known})


def test_ids_that_stand_for_two_candidates_are_named(mbeir):
    one, other = {"did": "0:1", "txt": "one"}, {"did": "0:1", "txt": "other"}
    files = [pool(mbeir, "a.jsonl", {"did": "0:0", "txt": "x"}, one), pool(mbeir, "b.jsonl", one, other)]
    with pytest.raises(UserError, match=r"b\.jsonl:3: candidate 0:1 is another one than in a pool read before"):
        read_candidate_table(files, mbeir.candidate, mbeir.path)
    with pytest.raises(UserError, match=r"b\.jsonl:1: candidate 0:1 is there a second time"):
        read_candidate_table(files, mbeir.candidate, mbeir.path, repeated=False)
    (mbeir.path / "c.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"c\.jsonl: the pool of candidates is empty"):
        read_candidate_table([*files[:1], mbeir.path / "c.jsonl"], mbeir.candidate, mbeir.path)


def test_candidates_in_memory_are_ordered_too():
    root = Path("x")
    given = [Candidate(f"{n}", None, root / f"{n % 2}.png", "image") for n in (3, 10, 2)]
    known = CandidateTable.from_candidates(given, root)
    assert [one.did for one in known] == ["3", "2", "10"] and known.row("10") == 2
    assert known.digest(np.array([0, 1])) != known.digest(np.array([1, 0]))
    assert known.showing(root / "0.png").tolist() == [1, 2]
    with pytest.raises(IndexError):
        known[3]
