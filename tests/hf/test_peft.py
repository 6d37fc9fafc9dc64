"""Adapters against the library PEFT: theirs into ours, ours into theirs, gradients, and merging."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from jfe_jax.checkpoint import base_model, model_io
from jfe_jax.cli.main import main
from jfe_jax.config import Config, LoraConfig
from jfe_jax.data.pipeline.packer import pack
from jfe_jax.errors import UserError
from jfe_jax.hf import lora_merge
from jfe_jax.hf.convert import from_hf, to_hf
from jfe_jax.hf.load import load_hf, open_hf
from jfe_jax.hf.peft import SETTINGS, WEIGHTS
from jfe_jax.models import lora
from jfe_jax.models.registry import build_model
from jfe_jax.utils import pytrees
from tests.support import paligemma_oracle as oracle

# PEFT asks transformers for what transformers calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ITEMS = oracle.items()
BATCH = pack(list(ITEMS.values()), groups=1, rows=2, row_tokens=64, image_slots=4, layout="packed")
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
CASES = {
    "Gemma 1, all of the text tower": ({}, {"target_modules": LANGUAGE}),
    "Gemma 2, rsLoRA, some of both towers, a norm": (
        {"kv_heads": 2, "text": oracle.GEMMA_2},
        {
            "target_modules": ["q_proj", "fc1", "down_proj", "linear"],
            "use_rslora": True,
            "modules_to_save": ["language_model.norm"],
        },
    ),
}
TARGETS = {
    "Gemma 1, all of the text tower": ("attention", "mlp"),
    "Gemma 2, rsLoRA, some of both towers, a norm": (
        *("attention.query", "mlp.down", "vision.attention.query", "vision.mlp.up", "projector"),
    ),
}


def random_adapter(source: Path, directory: Path, **settings) -> PeftModel:
    """A PEFT model over the directory `source`, every A and B random, saved to `directory`."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    adapted = get_peft_model(model, PeftConfig(r=3, lora_alpha=7, **settings)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in (weight for weight in adapted.parameters() if weight.requires_grad):
            # What is added is half as large as the base's weights: a merge that is wrong by a little shows.
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    adapted.save_pretrained(directory)
    return adapted


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Its name, the base's directory, PEFT's model, the directory it saved, and the run that we made of it."""
    folder = tmp_path_factory.mktemp("peft")
    model, settings = CASES[request.param]
    source = oracle.save(oracle.tiny(**model), folder / "base")
    theirs = random_adapter(source, folder / "adapter", **settings)
    assert main(["convert", "from-hf", str(folder / "adapter"), str(folder / "run"), "--base", str(source)]) == 0
    return request.param, source, theirs, folder / "adapter", folder / "run"


def theirs_of(model) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: oracle.pooled(model, item, "last").numpy() for name, item in ITEMS.items()}


def ours_of(graphdef, params) -> np.ndarray:
    return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(BATCH))(params))[0]


def graph(config: Config) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0))))


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_same(ours, theirs: dict[str, np.ndarray], limit: float = 1e-5):
    for row, (name, wanted) in zip(ours, theirs.items(), strict=True):
        assert relative(row, wanted) <= limit, name


def test_theirs_embeds_the_same_here(case):
    name, source, theirs, _, run = case
    loaded = model_io.load_model(run)
    assert loaded.config.model.lora == LoraConfig(rank=3, alpha=7, rslora="rsLoRA" in name, targets=TARGETS[name])
    assert_same(ours_of(loaded.graphdef, loaded.params), theirs_of(theirs.base_model.model))
    # The adapters do something, and only they and the chosen norm are in the run.
    config, params = load_hf(source)
    assert relative(ours_of(graph(config), params), ours_of(loaded.graphdef, loaded.params)) > 0.1
    held = model_io.open_model(run).arrays
    assert {path for path in held if not lora.is_adapter(path)} == set(loaded.config.optimizer.train)
    assert loaded.config.optimizer.train == (("tower.norm.scale_d",) if "norm" in name else ())


def test_gradients_of_every_pair_agree(case):
    _, _, theirs, _, run = case
    loaded = model_io.load_model(run)
    weights = np.random.default_rng(1).normal(size=(len(ITEMS), loaded.config.model.text.width)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(loaded.graphdef, params)(BATCH)[0] * weights)))
    ours = pytrees.flatten(nnx.to_pure_dict(gradient(loaded.params)))
    theirs.zero_grad()
    sum(
        oracle.pooled(theirs.base_model.model, item, "last") @ torch.from_numpy(row)
        for item, row in zip(ITEMS.values(), weights, strict=True)
    ).backward()
    wanted = {
        name.removesuffix(".default.weight"): weight.grad.numpy()
        for name, weight in theirs.named_parameters()
        if "lora" in name
    }
    seen = 0
    for kernel in lora.kernels(loaded.config.model.lora):
        short = {"out_nhd": "o_proj" if "tower" in kernel.module else "out_proj", "kernel_cd": "linear"}.get(
            kernel.name, {"up_df": "fc1", "down_fd": "fc2"}.get(kernel.name) if "vision" in kernel.module else None
        )
        short = short or {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.get(
            kernel.short, f"{kernel.short}_proj"
        )
        tower = {"tower": "language_model", "vision": "vision_tower", "projector": "multi_modal_projector"}
        for side, path, inner in zip("AB", kernel.pair, (kernel.inner, 1), strict=True):
            names = [name for name in wanted if tower[kernel.path.split(".")[0]] in name]
            names = sorted(name for name in names if name.endswith(f"{short}.lora_{side}"))
            leaf = np.asarray(ours[path])
            for own, name in zip(leaf if kernel.stacked else [leaf], names, strict=True):
                rows = int(np.prod(own.shape[:inner]))
                given = own.reshape(rows, -1).T
                assert np.linalg.norm(given - wanted[name]) <= 1e-4 * np.linalg.norm(wanted[name]), name
                seen += 1
    assert seen == len(wanted)


def test_ours_embeds_the_same_there(case, tmp_path):
    _, source, theirs, directory, run = case
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out")]) == 0
    model = PaliGemmaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    names = {name for name, _ in model.named_modules()}
    loaded = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    assert_same(theirs_of(loaded.base_model.model).values(), theirs_of(theirs.base_model.model), 1e-6)
    # The very tensors, and nothing else, lie where PEFT had them.
    one, other = load_file(directory / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], name)
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text())
    assert settings["base_model_name_or_path"] == str(source)
    assert set(settings["modules_to_save"] or []) <= names
    assert "PeftModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    # And back without naming the base.
    assert main(["convert", "from-hf", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    again, first = model_io.load_model(tmp_path / "again"), model_io.load_model(run)
    assert again.config.model == first.config.model
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_merged_embeds_as_unmerged(case, tmp_path):
    _, _, theirs, _, run = case
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out"), "--merge"]) == 0
    config, params = load_hf(tmp_path / "out")
    assert config.model.lora.rank == 0
    loaded = model_io.load_model(run)
    unmerged = ours_of(loaded.graphdef, loaded.params)
    assert relative(ours_of(graph(config), params), unmerged) <= 2e-6
    model, report = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(theirs_of(model.eval()).values(), theirs_of(theirs.base_model.model))
    # In memory it is the same.
    merged = lora.merge(nnx.to_pure_dict(loaded.params), loaded.config.model.lora)
    for (path, leaf), other in zip(nnx.to_flat_state(params), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(leaf[...], other, rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_merging_into_bfloat16_is_said(tmp_path, capsys):
    source = oracle.save(oracle.tiny().to(torch.bfloat16), tmp_path / "base")
    theirs = random_adapter(source, tmp_path / "adapter", target_modules=LANGUAGE)
    run = tmp_path / "run"
    from_hf(tmp_path / "adapter", run, beneath=str(source))
    to_hf(run, tmp_path / "wide", merge=True)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    config, params = load_hf(tmp_path / "wide")
    assert_same(ours_of(graph(config), params), theirs_of(theirs.base_model.model))
    capsys.readouterr()
    assert main(["convert", "to-hf", str(run), str(tmp_path / "narrow"), "--merge", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().err
    # Against the numbers themselves.
    whole, narrow, old = (
        pytrees.flatten(nnx.to_pure_dict(load_hf(tmp_path / name)[1])) for name in ("wide", "narrow", "base")
    )
    lost = sum(float(((narrow[path] - whole[path]) ** 2).sum()) for path in old)
    change = sum(float(((whole[path] - old[path]) ** 2).sum()) for path in old)
    assert 0 < lost < change
    assert said == (
        f"warning: bfloat16 loses {(lost / change) ** 0.5:.1%} of what the adapters change; without --dtype nothing is "
        "lost\n"
    )


def test_a_fingerprint_of_what_lies_on_the_disk_is_that_of_what_is_loaded(case, monkeypatch):
    source = case[1]
    # In several parts.
    monkeypatch.setattr(base_model, "CHUNK_ELEMENTS", 100)
    assert base_model.fingerprint_stored(open_hf(source).arrays) == base_model.fingerprint_params(
        nnx.to_pure_dict(load_hf(source)[1])
    )


def test_another_base_is_refused_at_merging_too(case, tmp_path):
    name, source, _, _, run = case
    shutil.copytree(run, tmp_path / "run")
    other = oracle.save(oracle.tiny(**CASES[name][0], seed=9), tmp_path / "other")
    base_model.write_base_ref(tmp_path / "run", base_model.read_base_ref(run)._replace(path=other))
    with pytest.raises(UserError, match="other: not the weights that the adapters of"):
        lora_merge.open_whole(tmp_path / "run")
    with pytest.raises(UserError, match="other: not the weights that the adapters of"):
        model_io.load_model(tmp_path / "run")
    assert source.is_dir()


@pytest.fixture
def edited(case, tmp_path):
    """Imports a copy of the adapter with its settings or tensors changed; returns the error's text."""
    _, source, _, directory, _ = case
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)

    def attempt(settings=None, tensors=None, beneath=str(source)) -> str:
        tree = json.loads((copy / SETTINGS).read_text()) | (settings or {})
        (copy / SETTINGS).write_text(json.dumps(tree))
        if tensors:
            save_file(tensors(load_file(copy / WEIGHTS)), copy / WEIGHTS)
        with pytest.raises(UserError) as error:
            from_hf(copy, tmp_path / "run", beneath=beneath)
        assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
        return str(error.value)

    return attempt


@pytest.mark.parametrize("case", ["Gemma 1, all of the text tower"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        *(
            ({key: value}, f"not implemented here: {key} = {value!r}; merge with PEFT")
            for key, value in {
                "use_dora": True,
                "bias": "all",
                "rank_pattern": {"q_proj": 8},
                "alpha_pattern": {"q_proj": 8},
                "fan_in_fan_out": True,
                "init_lora_weights": "pissa",
                "something_new": True,
            }.items()
        ),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only 'LORA' is read"),
        ({"r": 0}, "r is 0 and lora_alpha 7; both have to be numbers above 0"),
    ],
)
def test_what_is_not_plain_lora_is_refused(edited, settings, says):
    assert says in edited(settings)


@pytest.mark.parametrize("case", ["Gemma 1, all of the text tower"], indirect=True)
def test_tensors_that_do_not_fit_are_listed(edited):
    def change(tensors):
        first = "base_model.model.model.language_model.layers.0.self_attn."
        del tensors[f"{first}q_proj.lora_B.weight"]
        tensors[f"{first}k_proj.lora_A.weight"] = np.zeros((3, 5), np.float32)
        return tensors | {"base_model.model.model.language_model.embed.lora_A.weight": np.zeros((3, 5), np.float32)}

    said = edited(tensors=change)
    assert "language_model.embed.lora_A.weight has no place" in said
    assert "self_attn.k_proj.lora_A.weight has shape [3, 5], not [3, 32]" in said
    assert "tower.blocks.attention.lora.query.b_rnh: layers [1, 2] of 3" in said
    assert "stands on /nowhere; give its directory as --base" in edited(beneath="/nowhere")


def test_options_that_do_not_go_together(case, tmp_path):
    _, source, _, _, run = case
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--layout sentence-transformers: .* add --merge"):
        to_hf(run, out, layout="sentence-transformers")
    with pytest.raises(UserError, match="--base names what adapters stand on"):
        to_hf(run, out, merge=True, beneath="x")
    with pytest.raises(UserError, match=r"--base: .* has no adapter_config\.json"):
        from_hf(source, out, beneath="x")
    from_hf(source, tmp_path / "plain")
    with pytest.raises(UserError, match=r"--merge: .* has no adapters"):
        to_hf(tmp_path / "plain", out, merge=True)
    assert not out.exists()
