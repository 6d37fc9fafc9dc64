"""What one of two processes refuses, both leave with at once, and one says it."""

import json
import shutil

import pytest

from jfe_jax.cli.main import main
from tests.support.launched import launched
from tests.support.tiny_retriever import random_retriever, save

SCRIPT = """
import contextlib, io, json, sys
from pathlib import Path
from jfe_jax.parallel.distributed import initialize_distributed
initialize_distributed()
import jax
from jfe_jax.cli.main import main
told = {}
for name, words in json.loads(Path(sys.argv[1]).read_text()).items():
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        status = main(words[jax.process_index()])
    told[name] = status, [line for line in said.getvalue().splitlines() if line.startswith("jfe")]
Path(f"{sys.argv[1]}.{jax.process_index()}").write_text(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_refusal_is_everybodys(shapes_retriever, mbeir_path, tmp_path):
    run = str(save(shapes_retriever, tmp_path / "run"))
    other = str(save(random_retriever(shapes_retriever.config, tmp_path / "other", 1), tmp_path / "other"))
    lines = [json.dumps({"id": f"t{number}", "text": f"text {number}"}) + "\n" for number in range(6)]
    (tmp_path / "items.jsonl").write_text("".join(lines))
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.jsonl").write_text("".join([*lines[:5], '{"id": "picture", "image": "broken.png"}\n']))
    (tmp_path / "bad.jsonl").write_text("".join([*lines, "{\n"]))

    def embed(out, *, items="items", checkpoint=run):
        items = str(tmp_path / f"{items}.jsonl")
        return ["embed", "--checkpoint", checkpoint, "--items", items, "--out", str(tmp_path / out), "--shard", "3"]

    def evaluate(out):
        words = ["eval", "--checkpoint", run, "--data", str(mbeir_path), "--units", "facts_task1", "--pool", "local"]
        return [*words, "--out", str(tmp_path / out)]

    assert main(embed("index")) == 0 == main(evaluate("claimed"))
    shutil.copytree(tmp_path / "claimed", tmp_path / "damaged")
    claim = tmp_path / "claimed/embeddings/checkpoint.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"fingerprint": "another"}))
    manifest = next((tmp_path / "damaged/embeddings").glob("mbeir*/manifest.json"))
    manifest.write_text("{")
    # Of each case what process 0 is told to do, process 1 too if there is no other; which of them speaks, and says.
    cases = {
        "another checkpoint's index": ([embed("index", checkpoint=other)], 0, "holds an index of another fingerprint"),
        "no directory": ([embed("items.jsonl/out")], 0, "items.jsonl/out"),
        "a bad line": ([embed("bad", items="bad")], 0, "bad.jsonl:7: not JSON"),
        "no checkpoint there": ([embed("none"), embed("none", checkpoint=f"{run}/none")], 1, "no checkpoint there"),
        "no checkpoint here": ([embed("none", checkpoint=f"{run}/none"), embed("none")], 0, "no checkpoint there"),
        "two checkpoints": ([embed("two"), embed("two", checkpoint=other)], 1, "process 1 finds another fingerprint"),
        "an image in the second share": ([embed("picture", items="broken")], 1, "broken.png: cannot be read as"),
        "another checkpoint's store": ([evaluate("claimed")], 0, "holds embeddings of"),
        "a damaged manifest": ([evaluate("damaged")], 0, "no index, or a broken one"),
    }
    commands = tmp_path / "commands.json"
    words = {name: [told[0], told[-1]] for name, (told, _, _) in cases.items()}
    commands.write_text(json.dumps(words | {"good": [embed("good")] * 2}))
    launched(SCRIPT, [str(commands)])
    told = [json.loads((tmp_path / f"commands.json.{number}").read_text()) for number in range(2)]
    for name, (_, speaker, says) in cases.items():
        (status, said), (other_status, silence) = told[speaker][name], told[1 - speaker][name]
        assert status == other_status == 1 and not silence, (name, told[0][name], told[1][name])
        assert len(said) == 1 and says in said[0], (name, said)
    assert told[0]["good"] == told[1]["good"] == [0, []], "they are still in step"
