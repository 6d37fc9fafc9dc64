"""Hugging Face directories in and out: every spelling, every defect, and the same bits back."""

import contextlib
import dataclasses
import json
import math
import resource
import shutil

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

from jfe_jax.cli.main import main
from jfe_jax.config import Config, MeshConfig, ModelConfig, TextConfig
from jfe_jax.errors import UserError
from jfe_jax.hf import mapping
from jfe_jax.hf.convert import parse_bytes
from jfe_jax.hf.load import load_hf, open_hf
from jfe_jax.hf.safetensors_io import INDEX, SINGLE
from jfe_jax.hf.save import Outgoing, save_hf
from jfe_jax.hf.settings import read_config
from jfe_jax.models.registry import build_model
from jfe_jax.parallel.sharding import make_mesh
from tests.support import paligemma_oracle as oracle


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return oracle.save(oracle.tiny(kv_heads=2), tmp_path_factory.mktemp("hf") / "source")


@pytest.fixture
def broken(source, tmp_path):
    """A copy to damage, and a function that rewrites its tensors."""
    directory = tmp_path / "broken"
    shutil.copytree(source, directory)

    def rewrite(change):
        save_file(change(load_file(directory / SINGLE)), directory / SINGLE)
        return directory

    return rewrite


def opened(source, **changes) -> Outgoing:
    weights = open_hf(source)
    return Outgoing(weights.config, weights.arrays, source, 0)._replace(**changes)


def assert_same_bits(one, other):
    one, other = (dict(nnx.to_flat_state(params)) for params in (one, other))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf[...], other[path][...], str(path))


def test_what_goes_out_comes_back_to_the_bit(source, tmp_path):
    model = opened(source)
    save_hf(model, tmp_path / "out")
    assert_same_bits(load_hf(tmp_path / "out")[1], load_hf(source)[1])
    theirs, ours = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, name)


def test_transformers_opens_it_and_embeds_the_same(source, tmp_path):
    save_hf(opened(source), tmp_path / "out")
    model, report = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    original = oracle.tiny(kv_heads=2)
    for name, item in oracle.items().items():
        with torch.no_grad():
            assert torch.equal(oracle.hidden(model.eval(), item), oracle.hidden(original, item)), name


@pytest.mark.parametrize("text", [None, oracle.GEMMA_2], ids=["Gemma 1", "Gemma 2"])
def test_the_export_runs_in_both_directions_by_itself(text, tmp_path):
    """What a user of transformers writes: a padded batch, no mask of one's own, the last token's state."""
    original = oracle.tiny(text=text)
    save_hf(opened(oracle.save(original, tmp_path / "source")), tmp_path / "out")
    model = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    items = [item for item in oracle.items().values() if item.pixels is None]
    longest = max(len(item.tokens) for item in items)
    ids = np.stack([np.pad(item.tokens, (0, longest - len(item.tokens))) for item in items])
    mask = torch.tensor([[place < len(item.tokens) for place in range(longest)] for item in items]).long()
    with torch.no_grad():
        states = model.model(input_ids=torch.from_numpy(ids).long(), attention_mask=mask).last_hidden_state
        for row, item in zip(states, items, strict=True):
            vector = row[len(item.tokens) - 1]
            torch.testing.assert_close(
                vector / vector.norm(), oracle.pooled(original, item, "last"), atol=1e-6, rtol=1e-5
            )


def test_transformers_processor_prepares_images_as_we_do(source, tmp_path):
    save_hf(opened(source), tmp_path / "out")
    pixels = oracle.items()["image only"].pixels
    inputs = AutoProcessor.from_pretrained(tmp_path / "out")(
        images=pixels, text="<image>a red house", return_tensors="np"
    )
    assert (inputs["input_ids"] == oracle.IMAGE_TOKEN).sum() == oracle.PATCHES
    np.testing.assert_allclose(
        inputs["pixel_values"][0].transpose(1, 2, 0), pixels.astype(np.float32) / 127.5 - 1, atol=1e-6
    )


def test_how_items_are_pooled_and_cut_goes_along(source, tmp_path):
    model = opened(source)
    tree = {"pooling": "mean", "max_text_tokens": 17, "newline": False}
    config = Config(
        model=ModelConfig(**{**vars(model.config.model), "pooling": "mean"}),
        tokens=type(model.config.tokens)(max_text_tokens=17, newline=False),
    )
    save_hf(model._replace(config=config), tmp_path / "out")
    back = load_hf(tmp_path / "out")[0]
    assert {"pooling": back.model.pooling, **{k: getattr(back.tokens, k) for k in list(tree)[1:]}} == tree
    assert back.tokens.tokenizer == str(tmp_path / "out")


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace("language_model.model.", "model.language_model."),
        lambda name: f"model.{name.replace('language_model.model.', 'language_model.')}",
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
        lambda name: f"model.{name}" if name.startswith("vision_tower") else name,
    ],
    ids=["text of v5 in memory", "all of v5 in memory", "vision of v4", "mixed"],
)
def test_every_spelling_is_read(source, broken, spell):
    directory = broken(lambda tensors: {spell(name): tensor for name, tensor in tensors.items()})
    assert_same_bits(load_hf(directory)[1], load_hf(source)[1])


def test_a_tied_output_matrix_and_old_buffers_are_left_aside(source, broken):
    extra = {
        "language_model.lm_head.weight": np.zeros((oracle.VOCABULARY, 32), np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 16), np.int64),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    }
    assert_same_bits(load_hf(broken(lambda tensors: tensors | extra))[1], load_hf(source)[1])


def test_shards_are_read_and_written(source, tmp_path):
    oracle.save(oracle.tiny(kv_heads=2), tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    assert_same_bits(load_hf(tmp_path / "theirs")[1], load_hf(source)[1])
    save_hf(opened(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=50_000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_bits(load_hf(tmp_path / "ours")[1], load_hf(source)[1])
    assert not any(
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)[1].values()
    )
    (tmp_path / "ours" / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        load_hf(tmp_path / "ours")


def test_bfloat16_is_widened_without_loss(tmp_path):
    model = oracle.tiny().to(torch.bfloat16)
    _, params = load_hf(oracle.save(model, tmp_path / "bf16"))
    table = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(params.embedder.table_vd[...], table)


def test_all_that_does_not_fit_is_listed_at_once(broken):
    table, norm = "language_model.model.embed_tokens.weight", "vision_tower.post_layernorm.bias"

    def change(tensors):
        del tensors[norm]
        return tensors | {"custom_text_proj.weight": np.zeros(3, np.float32), table: np.zeros((7, 32), np.float32)}

    with pytest.raises(UserError) as error:
        load_hf(broken(change))
    message = str(error.value)
    assert "custom_text_proj.weight is unknown" in message
    assert f"{table} has shape [7, 32], not [400, 32]" in message
    assert f"{norm} is missing" in message
    assert "\n" not in message


def test_pickled_weights_are_refused_with_the_reason(broken):
    directory = broken(dict)
    (directory / SINGLE).rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*run any code.*safetensors"):
        load_hf(directory)


def test_a_damaged_file_is_named(broken):
    directory = broken(dict)
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{SINGLE}: damaged"):
        load_hf(directory)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llava"}, "model_type 'llava'"),
        ({"text_config": {"model_type": "gemma3_text"}}, r"text_config\.model_type = 'gemma3_text'"),
        ({"text_config": {"layer_types": ["full_attention"] * 2}}, r"text_config\.layer_types = "),
        ({"text_config": {"rope_parameters": {"rope_type": "linear"}}}, "rope_type = 'linear'"),
        ({"vision_config": {"hidden_act": "gelu"}}, r"vision_config\.hidden_act = 'gelu'"),
        ({"image_token_index": None}, "image_token_index"),
        ({"image_token_index": 400}, r"config\.json: image_token_index 400 is beyond text_config\.vocab_size, 400"),
    ],
)
def test_an_unknown_architecture_is_refused(broken, change, named):
    directory = broken(dict)
    tree = json.loads((directory / "config.json").read_text())
    for key, value in change.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    (directory / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    with pytest.raises(UserError, match=named):
        load_hf(directory)


@pytest.mark.parametrize(
    ("image_token", "said"),
    [(17, "<image> has id 399, but model.image_token is 17"), (399, "ids up to 449, the model a vocabulary of 400")],
)
def test_a_tokenizer_of_another_model_is_refused(broken, tmp_path, capsys, image_token, said):
    directory = broken(dict)
    tree = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(tree | {"image_token_index": image_token}))
    if image_token == 399:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_tokens([f"<more{number}>" for number in range(50)])
        tokenizer.save(str(directory / "tokenizer.json"))
    assert main(["convert", "from-hf", str(directory), str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_published_config_leaves_most_out(broken):
    """config.json of google/paligemma-3b-pt-224 says little of what transformers takes by default."""
    directory = broken(dict)
    published = {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "projection_dim": 2048,
        "hidden_size": 2048,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 256,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
            "vocab_size": 257216,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_image_tokens": 256,
            "patch_size": 14,
            "projection_dim": 2048,
            "vision_use_head": False,
        },
    }
    (directory / "config.json").write_text(json.dumps(published))
    assert read_config(directory).model == ModelConfig()


def test_a_directory_in_use_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        save_hf(opened(source), tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()


def test_a_failed_export_leaves_nothing(source, tmp_path):
    model = opened(source)

    def damaged(index):
        raise UserError("cannot read it")

    norm = "tower.norm.scale_d"
    arrays = model.arrays | {norm: dataclasses.replace(model.arrays[norm], read=damaged)}
    with pytest.raises(UserError, match="cannot read it"):
        save_hf(model._replace(arrays=arrays), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def full_disk(size):
    """Files that cannot grow: what a full disk is to a writer, without needing one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10_000, 100_000], ids=["at the tokenizer", "at the weights"])
def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, capsys, size):
    run = tmp_path / "run"
    assert main(["convert", "from-hf", str(source), str(run)]) == 0
    with full_disk(size):
        assert main(["convert", "to-hf", str(run), str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'out'}: cannot write it (File too large); nothing is left of it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("size", [10_000, 40_000], ids=["at the tokenizer", "at the weights"])
def test_a_full_disk_leaves_nothing_of_an_import(source, tmp_path, capsys, size):
    with full_disk(size):
        assert main(["convert", "from-hf", str(source), str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "File too large" in told and len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_baseline_has_no_layout(source, tmp_path):
    model = opened(source)
    config = Config(model=ModelConfig(kind="two_tower"))
    with pytest.raises(UserError, match=r"two_tower.*no class of transformers"):
        save_hf(model._replace(config=config), tmp_path / "out")


def test_convert_there_and_back(source, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["convert", "from-hf", str(source), str(run)]) == 0
    assert main(["convert", "to-hf", str(run), str(out)]) == 0
    assert "parameters" in capsys.readouterr().out
    theirs, ours = load_file(source / SINGLE), load_file(out / SINGLE)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, name)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (run / "tokenizer" / SINGLE).exists()
    assert main(["convert", "from-hf", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
        lambda name: f"model.{name.replace('language_model.model.', 'language_model.')}",
    ],
    ids=["v4", "v5 in memory"],
)
def test_a_bfloat16_model_comes_back_to_the_byte_names_included(spell, tmp_path, capsys):
    source = oracle.save(oracle.tiny(text=oracle.GEMMA_2).to(torch.bfloat16), tmp_path / "source")
    save_file({spell(name): one for name, one in load_file(source / SINGLE).items()}, source / SINGLE, {"format": "pt"})
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["convert", "from-hf", str(source), run]) == 0
    assert main(["convert", "to-hf", run, str(out)]) == 0
    assert (out / SINGLE).read_bytes() == (source / SINGLE).read_bytes()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"

    wide, shards = str(tmp_path / "wide"), tmp_path / "shards"
    assert main(["convert", "from-hf", str(source), wide, "--dtype", "float32"]) == 0
    assert main(["convert", "to-hf", wide, str(shards), "--dtype", "float16", "--max-shard-size", "20KB"]) == 0
    assert len(list(shards.glob("*.safetensors"))) > 2
    for file in shards.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        for name, tensor in tensors.items():
            assert tensor.dtype == np.float16
            np.testing.assert_array_equal(tensor, load_file(source / SINGLE)[name].astype(np.float16))
    assert main(["convert", "to-hf", wide, str(tmp_path / "x"), "--max-shard-size", "big"]) == 1
    assert "--max-shard-size: 'big' is no size" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("text", "wanted"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 << 29), ("20kb", 20_000), ("7", 7)])
def test_sizes_are_read_as_transformers_reads_them(text, wanted):
    assert parse_bytes(text) == wanted


def test_every_device_reads_its_own_share(source):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = load_hf(source, mesh)[1]
    assert not params["tower"]["blocks"]["down_fd"].sharding.is_fully_replicated
    assert_same_bits(params, load_hf(source)[1])


def test_a_shard_cut_short_leaves_no_checkpoint(source, tmp_path, capsys):
    directory = oracle.save(oracle.tiny(), tmp_path / "cut", max_shard_size="50KB")
    victim = sorted(directory.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    assert main(["convert", "from-hf", str(directory), str(tmp_path / "run")]) == 1
    assert victim.name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_layers_of_two_types_are_refused(broken):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=r"the layers of .*up_proj\.weight have types"):
        load_hf(broken(lambda tensors: tensors | {name: tensors[name].astype(np.float16)}))
    with pytest.raises(UserError, match=r"up_proj\.weight has type I32, not F32 or BF16 or F16"):
        load_hf(broken(lambda tensors: tensors | {name: tensors[name].astype(np.int32)}))


def test_the_table_names_every_parameter_once():
    for text in (TextConfig(), TextConfig(post_norms=True)):
        config = ModelConfig(text=text)
        params = nnx.split(nnx.eval_shape(lambda config=config: build_model(config, nnx.Rngs(0))))[1]
        shapes = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(params)}
        layers = {"vision": config.vision.depth, "tower": text.depth}
        pieces = mapping.pieces(shapes)
        for name, shape in shapes.items():
            mine = [piece for piece in pieces.values() if piece.entry.ours == name]
            depth = layers[name.split(".")[0]] if ".blocks." in name else 1
            assert len(mine) == depth, name
            assert sum(math.prod(piece.shape) for piece in mine) == math.prod(shape)
