"""Tokens and pixels against transformers' own PaliGemmaProcessor on the exported directory."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, PaliGemmaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from benchmarks.common.tokenizer import IMAGE_TOKEN, paligemma_tokenizer
from jfe_jax.config import TokensConfig, VisionConfig
from jfe_jax.data.item import Item
from jfe_jax.data.processor import ItemEncoder
from jfe_jax.errors import UserError
from jfe_jax.hf.load import load_hf, open_hf
from jfe_jax.hf.save import Outgoing, save_hf
from tests.support import paligemma_oracle as oracle

TEXTS = {
    "ascii": "a small red house",
    "non-ascii": "ein Häuschen, 写真 🙂 ‎مرحبا",
    "empty": "",
    "ends in a newline": "the same person\n",
    "spaces": "  two  spaces ",
    "long": "find an image that matches " * 30,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    source = oracle.save(oracle.tiny(), folder / "source")
    weights = open_hf(source)
    save_hf(Outgoing(weights.config, weights.arrays, source, 0), folder / "out")
    config = load_hf(folder / "out")[0]
    # Its image preparation by Pillow, as SiglipImageProcessor's slow path: torchvision's differs in the last bits.
    processor = AutoProcessor.from_pretrained(folder / "out", backend="pil")
    return processor, ItemEncoder(config.tokens, config.model.vision, config.model.image_token), config


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int, *channels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, *channels), np.uint8))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """PaliGemma's own tokenizer, in its processor and in ours; a user's cache has it after the first time."""
    try:
        directory = paligemma_tokenizer(tmp_path_factory.mktemp("packages"), print)
    except UserError as error:
        pytest.skip(f"PaliGemma's tokenizer cannot be fetched: {error}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    processor = PaliGemmaProcessor(SiglipImageProcessorPil(image_seq_length=PATCHES), tokenizer)
    tokens = TokensConfig(tokenizer=str(directory), max_text_tokens=100)
    return processor, ItemEncoder(tokens, VisionConfig(image_size=56), IMAGE_TOKEN)


PATCHES = 16
REAL_TEXTS = TEXTS | {
    "newlines": "one\n\n\ntwo\n",
    "tabs and spaces": "\t a   b\u00a0c",
    # <bos> and the like are left out on purpose: to the processor a text that spells one is one, to us it is text.
    "places": "<loc0001><loc1023> <seg001> cat",
    "digits": "1234567890 3.14",
    "combining": "é ñ 한국어 ตัวอย่าง नमस्ते",
    "emoji of several": "👩🏽‍🚀🏳️‍🌈",
    "bytes": "\x01\x7f\ufeff\U0010ffff",
}


@pytest.mark.slow
@pytest.mark.parametrize("has_image", [True, False], ids=["with an image", "text alone"])
def test_ids_with_the_real_tokenizer_are_the_processors(real, has_image):
    processor, encoder = real
    image = noise(20, 30, 3)
    for name, text in REAL_TEXTS.items():
        if not has_image and not text:
            continue
        # Without an image the processor has nothing to say: the tokenizer does what it would do behind the image.
        (theirs,) = (
            processor(images=image, text=f"<image>{text}", return_tensors="np")["input_ids"]
            if has_image
            else processor.tokenizer([f"<bos>{text}\n"], add_special_tokens=False, return_tensors="np")["input_ids"]
        )
        ours = encoder.encode(Item(text=text or None, image=np.asarray(image) if has_image else None)).tokens
        kept = PATCHES * has_image + 1 + 100
        if len(theirs) > kept + 1:
            assert name == "long" and len(ours) == kept + 2
            np.testing.assert_array_equal(ours[:kept], theirs[:kept])
            assert ours[kept] == theirs[-1] and ours[-1] == encoder.eos_id
        else:
            np.testing.assert_array_equal(ours, [*theirs, encoder.eos_id], name)


@pytest.mark.slow
def test_a_cut_text_is_warned_of_once(real, caplog):
    encoder = real[1]
    before = encoder.cut_texts
    for _ in range(5):
        encoder.encode(Item(text=TEXTS["long"]))
    assert encoder.cut_texts == before + 5
    assert len([record for record in caplog.records if "texts cut to" in record.message]) == (before == 0)


EXIF = Image.Exif()
EXIF[0x0112] = 6
IMAGES = {
    "rgb": encoded(noise(50, 40, 3)),
    "jpeg": encoded(noise(50, 40, 3), "JPEG"),
    "grey": encoded(noise(50, 40)),
    "palette": encoded(noise(50, 40, 3).convert("P")),
    "palette with transparency": encoded(noise(50, 40, 3).convert("P"), transparency=0),
    "rgba": encoded(noise(50, 40, 4)),
    "grey with alpha": encoded(noise(50, 40, 4).convert("LA")),
    "cmyk": encoded(noise(50, 40, 3).convert("CMYK"), "JPEG"),
    "1x1": encoded(noise(1, 1, 3)),
    "5000x20": encoded(noise(20, 5000, 3)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_the_processors(prepared, name):
    processor, encoder, config = prepared
    text = TEXTS[name]
    image = noise(20, 30, 3)
    (theirs,) = processor(images=image, text=f"<image>{text}", return_tensors="np")["input_ids"]
    ours = encoder.encode(Item(text=text or None, image=np.asarray(image))).tokens
    assert ours[-1] == encoder.eos_id
    if len(theirs) - oracle.PATCHES - 2 > config.tokens.max_text_tokens:
        kept = oracle.PATCHES + 1 + config.tokens.max_text_tokens
        np.testing.assert_array_equal(ours[:kept], theirs[:kept])
        np.testing.assert_array_equal(ours[kept:-1], theirs[-1:])
    else:
        np.testing.assert_array_equal(ours[:-1], theirs)


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_the_processors(prepared, name):
    processor, encoder, _ = prepared
    opened = Image.open(io.BytesIO(IMAGES[name]))
    pixels = processor(images=opened, text="<image>", return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = encoder.encode(Item(image=IMAGES[name])).pixels
    assert np.abs(ours / 255 - (pixels + 1) / 2).max() <= 1 / 255


def test_a_turned_photo_stands_upright(prepared):
    """The processor takes what it is given; transformers' load_image turns it first, and so do we."""
    processor, encoder, _ = prepared
    data = encoded(noise(50, 40, 3), "JPEG", exif=EXIF)
    upright = Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270)
    pixels = processor(images=upright, text="<image>", return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(encoder.encode(Item(image=data)).pixels / 255 - (pixels + 1) / 2).max() <= 1 / 255


def test_sixteen_bits_are_scaled_where_the_processor_clips(prepared):
    """A 16-bit photo through transformers is white from 1/256 of its range on; ours is the photo."""
    processor, encoder, _ = prepared
    deep = np.random.default_rng(0).integers(0, 65536, (50, 40)).astype(np.uint16)
    eight = Image.fromarray((deep >> 8).astype(np.uint8))
    pixels = processor(images=eight, text="<image>", return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = encoder.encode(Item(image=encoded(Image.fromarray(deep)))).pixels
    assert np.abs(ours / 255 - (pixels + 1) / 2).max() <= 1 / 255
