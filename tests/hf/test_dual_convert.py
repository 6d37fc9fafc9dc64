"""SigLIP and CLIP directories in and out: the same bytes back, opened and embedded by transformers all the same."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor, SiglipModel, SiglipProcessor

from jfe_jax.cli.main import main
from jfe_jax.data.item import Item
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.embedding.retriever import Retriever
from jfe_jax.errors import UserError
from jfe_jax.hf.load import load_hf, open_hf
from jfe_jax.hf.safetensors_io import INDEX, SINGLE
from tests.support import siglip_clip_oracle as oracle

CLASSES = {"siglip": (SiglipModel, SiglipProcessor), "clip": (CLIPModel, CLIPProcessor)}
TEXTS = {
    "ascii": "A small red house!",
    "apostrophe": "don't  stop, the same person",
    "non-ascii": "ein Häuschen, 写真 🙂 ‎مرحبا",
    "spaces": "  two \t spaces\n",
    "empty": "",
    "long": "find an image that matches " * 30,
}


def noise(height: int, width: int, *channels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, *channels), np.uint8))


IMAGES = {
    "wide": noise(40, 97, 3),
    "tall": noise(131, 50, 3),
    "right size": noise(56, 56, 3),
    "grey": noise(50, 41),
    "palette": noise(50, 40, 3).convert("P"),
    "1x1": noise(1, 1, 3),
    "5000x20": noise(20, 5000, 3),
}


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module", params=["siglip", "clip"])
def converted(request, tmp_path_factory):
    """Family, the original directory, and what came out after it went in."""
    folder = tmp_path_factory.mktemp(request.param)
    # CLIP in bfloat16: it comes back in the type that it had.
    model = oracle.tiny(request.param, vision={"num_hidden_layers": 2})
    if request.param == "clip":
        model = model.to(torch.bfloat16)
    source = oracle.save(model, folder / "source")
    assert main(["convert", "from-hf", str(source), str(folder / "run")]) == 0
    assert main(["convert", "to-hf", str(folder / "run"), str(folder / "out")]) == 0
    return request.param, source, folder / "out"


@pytest.fixture
def broken(converted, tmp_path):
    """A copy of the original to damage."""
    return converted[0], shutil.copytree(converted[1], tmp_path / "broken")


def edit(directory, name, change):
    tree = json.loads((directory / name).read_text())
    change(tree)
    (directory / name).write_text(json.dumps(tree))


def test_the_same_bytes_come_back_and_transformers_opens_them(converted):
    family, source, out = converted
    assert (out / SINGLE).read_bytes() == (source / SINGLE).read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    model, report = AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(model) is CLASSES[family][0] and not any(report.values()), report
    assert open_hf(out).config.model == open_hf(source).config.model
    assert type(AutoProcessor.from_pretrained(out, backend="pil")) is CLASSES[family][1]


def test_other_spellings_and_shards_come_back_as_they_were(converted, tmp_path):
    family, source, _ = converted
    shutil.copytree(source, tmp_path / "old")
    tensors = {f"{family}.{name}": one for name, one in load_file(source / SINGLE).items()}
    buffers = {f"{family}.text_model.embeddings.position_ids": np.arange(30)[None]}
    save_file(tensors | buffers, tmp_path / "old" / SINGLE, {"format": "pt"})
    assert main(["convert", "from-hf", str(tmp_path / "old"), str(tmp_path / "run")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--max-shard-size", "30KB"]) == 0
    assert (tmp_path / "out" / INDEX).exists()
    found = {name: one for file in (tmp_path / "out").glob("*.safetensors") for name, one in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, one in tensors.items():
        assert found[name].tobytes() == one.tobytes() and found[name].shape == one.shape, name
    one, other = open_hf(tmp_path / "out").arrays, open_hf(source).arrays
    assert one.keys() == other.keys()


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_the_processors(converted, name):
    family, _, out = converted
    processor = CLASSES[family][1].from_pretrained(out)
    config = open_hf(out).config
    encoder = ItemEncoder(config.tokens, config.model.vision, config.model.image_token)
    padding = {"padding": "max_length"} if family == "siglip" else {}
    (theirs,) = processor(text=[TEXTS[name]], truncation=True, return_tensors="np", **padding)["input_ids"]
    np.testing.assert_array_equal(encoder.tokens(TEXTS[name], None, False), theirs)
    assert encoder.cut_texts == (len(processor.tokenizer(TEXTS[name])["input_ids"]) > 30)


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_the_processors(converted, name):
    family, _, out = converted
    processor = CLASSES[family][1].from_pretrained(out).image_processor
    config = open_hf(out).config
    encoder = ItemEncoder(config.tokens, config.model.vision, config.model.image_token)
    theirs = processor(images=IMAGES[name], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    theirs = theirs * np.array(config.model.vision.std) + config.model.vision.mean
    assert np.abs(encoder.pixels(png(IMAGES[name]), name) / 255 - theirs).max() <= 1 / 255 + 1e-6


def test_embeddings_are_what_transformers_computes_from_the_same_items(converted):
    family, _, out = converted
    model, processor = (kind.from_pretrained(out) for kind in CLASSES[family])
    model = model.float().eval()
    padding = {"padding": "max_length"} if family == "siglip" else {}
    text, image = TEXTS["apostrophe"], IMAGES["wide"]
    items = [Item(text=text), Item(image=png(image)), Item(text=text, image=png(image)), Item(instruction=text)]
    with torch.no_grad():
        words = model.get_text_features(**processor(text=[text], return_tensors="pt", **padding)).pooler_output[0]
        seen = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output[0]
    theirs = [one / one.norm() for one in (words, seen, words + seen, words)]
    for ours, wanted in zip(Retriever.load(out).encode(items), theirs, strict=True):
        # A pixel may round the other way.
        assert np.linalg.norm(ours - wanted.numpy()) <= 1e-4


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", {"model_type": "blip"}, "model_type 'blip'.*'siglip' and 'clip'"),
        ("config.json", {"vision_config.hidden_act": "relu"}, r"vision_config\.hidden_act = 'relu'"),
        ("config.json", {"text_config.hidden_act": "silu"}, r"text_config\.hidden_act = 'silu'"),
        ("config.json", {"vision_config.num_channels": 1}, r"vision_config\.num_channels = 1"),
        ("config.json", {"vision_config.model_type": "vit"}, r"vision_config\.model_type = 'vit'"),
        ("config.json", {"text_config.num_attention_heads": 5}, r"hidden_size 24 is no multiple"),
        ("preprocessor_config.json", {"resample": 2}, "resample = 2"),
        ("preprocessor_config.json", {"size": {"height": 50, "width": 60}}, r"size = \{'height': 50, 'width': 60\}"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize = False"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5]}, "mean and std are three numbers"),
    ],
)
def test_what_is_not_implemented_is_refused(broken, file, change, named):
    def apply(tree):
        for key, value in change.items():
            *parents, last = key.split(".")
            for parent in parents:
                tree = tree[parent]
            tree[last] = value

    edit(broken[1], file, apply)
    with pytest.raises(UserError, match=named):
        load_hf(broken[1])


def test_clips_texts_must_end_in_the_token_that_is_pooled(broken):
    family, directory = broken
    if family == "siglip":
        edit(directory, "config.json", lambda tree: tree["text_config"].update(projection_size=48))
        with pytest.raises(UserError, match=r"projection_size 48 is not vision_config.hidden_size 24"):
            load_hf(directory)
        return
    edit(directory, "config.json", lambda tree: tree["text_config"].update(eos_token_id=7))
    with pytest.raises(UserError, match=r"eos_token_id is 7, but the tokenizer closes a text with 591"):
        load_hf(directory)


def test_all_that_does_not_fit_is_listed_at_once(broken):
    _, directory = broken
    tensors = load_file(directory / SINGLE)
    del tensors["logit_scale"]
    tensors |= {"vision_model.adapter.weight": np.zeros(3, np.float32)}
    save_file(tensors, directory / SINGLE)
    with pytest.raises(UserError, match=r"vision_model.adapter.weight is unknown.*logit_scale is missing"):
        load_hf(directory)


def test_sentencepiece_alone_is_refused_with_the_way_out(broken):
    _, directory = broken
    (directory / "tokenizer.json").rename(directory / "spiece.model")
    with pytest.raises(UserError, match=r"spiece.model only; add the model's tokenizer.json"):
        config = load_hf(directory)[0]
        ItemEncoder(config.tokens, config.model.vision, config.model.image_token)


def test_the_layout_of_sentence_transformers_is_refused(converted, tmp_path, capsys):
    _, source, _ = converted
    assert main(["convert", "from-hf", str(source), str(tmp_path / "run")]) == 0
    out = ["to-hf", str(tmp_path / "run"), str(tmp_path / "x"), "--layout", "sentence-transformers"]
    assert main(["convert", *out]) == 1
    assert "sentence-transformers layout is of the fusion model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
