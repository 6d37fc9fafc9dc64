"""The exported directory in sentence-transformers, against our own embeddings of the same items."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from jfe_jax import Item, Retriever
from jfe_jax.hf.load import open_hf
from jfe_jax.hf.save import Outgoing, save_hf
from tests.support import paligemma_oracle as oracle


@pytest.fixture(scope="module", params=[("last", None), ("mean", oracle.GEMMA_2)], ids=["last", "mean, Gemma 2"])
def exported(request, tmp_path_factory):
    pooling, text = request.param
    folder = tmp_path_factory.mktemp("st")
    source = oracle.save(oracle.tiny(text=text), folder / "source")
    weights = open_hf(source)
    config = dataclasses.replace(
        weights.config,
        model=dataclasses.replace(weights.config.model, pooling=pooling),
        tokens=dataclasses.replace(weights.config.tokens, max_text_tokens=12),
    )
    model = Outgoing(config, weights.arrays, source, 0)
    # A name of its own: what is loaded from the directory is cached by it.
    out = folder / f"export-{pooling}"
    save_hf(model, out, layout="sentence-transformers")
    return out


@pytest.fixture(scope="module")
def both(exported):
    theirs = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu")
    ours = Retriever.load(exported)
    return theirs, ours


def picture(mode: str, size=(40, 30)) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(len(mode)).integers(0, 256, (*size, *channels), np.uint8)
    return Image.fromarray(pixels, mode if mode != "RGBA" else None)


def agree(theirs: np.ndarray, ours: np.ndarray) -> None:
    assert theirs.shape == ours.shape
    assert np.linalg.norm(theirs - ours, axis=1).max() <= 1e-5


def test_texts_images_and_both(both, tmp_path):
    theirs, ours = both
    files = {mode: tmp_path / f"{mode}.png" for mode in ("L", "RGB", "RGBA")}
    for mode, file in files.items():
        picture(mode).save(file)
    texts = ["a small red house", "é 写 <image> <eos> 🙂", "find an image that matches " * 9]
    pairs = list(zip(texts, files.values(), strict=True))
    for given, items in (
        (texts, [Item(text=text) for text in texts]),
        ([str(files["L"]), picture("RGB"), picture("RGBA")], [Item(image=file) for file in files.values()]),
        (
            [{"text": text, "image": picture(file.stem)} for text, file in pairs],
            [Item(text=text, image=file) for text, file in pairs],
        ),
    ):
        agree(theirs.encode(given, batch_size=2), ours.encode(items))
        agree(theirs.encode(given[:1]), ours.encode(items[:1]))


def test_a_prompt_is_an_instruction(both):
    theirs, ours = both
    items = [
        Item(text="a house", instruction="find an image that matches"),
        Item(image=np.asarray(picture("RGB")), instruction="find an image that matches"),
    ]
    for given, item in zip(("a house", picture("RGB")), items, strict=True):
        agree(theirs.encode([given], prompt="find an image that matches "), ours.encode([item]))


def test_weights_stored_in_bfloat16_are_computed_with_in_float32(tmp_path):
    source = oracle.save(oracle.tiny().to(torch.bfloat16), tmp_path / "source")
    weights = open_hf(source)
    save_hf(Outgoing(weights.config, weights.arrays, source, 0), tmp_path / "half", layout="sentence-transformers")
    theirs = SentenceTransformer(str(tmp_path / "half"), trust_remote_code=True, device="cpu")
    agree(
        theirs.encode(["a small red house"]), Retriever.load(tmp_path / "half").encode([Item(text="a small red house")])
    )


def test_it_is_saved_again_and_opened(both, tmp_path):
    theirs, _ = both
    theirs.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again.encode(["a house"]), theirs.encode(["a house"]))
    assert again.get_embedding_dimension() == 32


def test_the_card_says_how_to_open_it(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert f'SentenceTransformer("{exported.name}", trust_remote_code=True)' in card
    assert "at most 12 tokens of text" in card and "max_text_tokens: 12" in card
