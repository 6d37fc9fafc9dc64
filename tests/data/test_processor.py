import json
import pickle

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers

from jfe_jax.config import TokensConfig, VisionConfig
from jfe_jax.data.item import Item
from jfe_jax.data.processor import ItemEncoder, train_tokenizer
from jfe_jax.errors import UserError

VISION = VisionConfig(image_size=28, patch_size=14)
TEXTS = ["a red circle, filled", "the same but blue", "Which one is it?", "Find what is meant."]
VOCAB = 400


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, VOCAB, out)
    return out


def encoder(directory, **tokens) -> ItemEncoder:
    return ItemEncoder(TokensConfig(tokenizer=str(directory), **tokens), VISION, VOCAB - 1)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)


def test_ids_of_the_trained_tokenizer_are_where_models_expect_them(tokenizer_dir):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert [theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id] == [0, 1, 2, 3]
    assert theirs.convert_tokens_to_ids("<image>") == VOCAB - 1 == len(theirs) - 1
    text = "Ein grüner 🦀, 日本"
    assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    ours = encoder(tokenizer_dir)
    assert (ours.pad_id, ours.eos_id, ours.bos_id, ours.image_id, ours.vocab_size) == (0, 1, 2, VOCAB - 1, VOCAB)


def test_item_is_laid_out_as_paligemma_does_and_closed_by_eos(tokenizer_dir, picture):
    from transformers import AutoTokenizer, PaliGemmaProcessor, SiglipImageProcessor

    theirs = PaliGemmaProcessor(
        SiglipImageProcessor(size={"height": 28, "width": 28}, image_seq_length=VISION.patches),
        AutoTokenizer.from_pretrained(tokenizer_dir),
    )
    wanted = theirs(text="Find it. the same but blue", images=Image.fromarray(picture), return_tensors="np")
    got = encoder(tokenizer_dir).encode(Item(text="the same but blue", image=picture, instruction="Find it."))
    np.testing.assert_array_equal(got.tokens[:-1], wanted["input_ids"][0])
    assert got.tokens[-1] == 1 and got.tokens.dtype == np.int32
    np.testing.assert_allclose(got.pixels / 127.5 - 1, wanted["pixel_values"][0].transpose(1, 2, 0), atol=1e-6)


def test_parts_that_are_not_there_leave_no_tokens(tokenizer_dir, picture):
    ours = encoder(tokenizer_dir, newline=False)
    np.testing.assert_array_equal(ours.encode(Item(image=picture)).tokens, [VOCAB - 1] * 4 + [2, 1])
    text = ours.encode(Item(text="blue")).tokens
    assert text[0] == 2 and VOCAB - 1 not in text
    np.testing.assert_array_equal(text, ours.encode(Item(instruction="blue")).tokens)
    np.testing.assert_array_equal(text, ours.encode(Item(text="blue", instruction="")).tokens)
    newline = encoder(tokenizer_dir).encode(Item(text="blue")).tokens
    np.testing.assert_array_equal(np.delete(newline, -2), text)
    with pytest.raises(UserError, match="needs a text or an image"):
        ours.encode(Item(text=""))


def test_long_text_is_cut_and_counted(tokenizer_dir, picture):
    ours = encoder(tokenizer_dir, max_text_tokens=5)
    long = ours.encode(Item(text="the same but blue " * 9, image=picture)).tokens
    assert len(long) == ours.longest == VISION.patches + 1 + 5 + 1 + 1 and ours.cut_texts == 1
    assert long[-1] == 1
    ours.encode(Item(text="blue"))
    assert ours.cut_texts == 1


def test_text_that_spells_special_tokens_stays_text(tokenizer_dir):
    ids = encoder(tokenizer_dir).encode(Item(text="<image> <eos><bos>")).tokens
    assert VOCAB - 1 not in ids
    assert (ids == 1).sum() == 1 and (ids == 2).sum() == 1


def test_added_tokens_that_are_not_special_cannot_claim_an_image(tokenizer_dir, tmp_path):
    tree = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    tree["added_tokens"][-1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<bos>"}}')
    assert VOCAB - 1 not in encoder(tmp_path).encode(Item(text="an <image> here")).tokens


def test_a_tokenizer_of_gemmas_kind_loads_by_the_same_path(tmp_path):
    """Spaces as ▁, byte fallback, <image> after the model's own entries and not marked special."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\n", "▁", *"abcdert", "re", "red", "▁red"]
    merges = [("r", "e"), ("re", "d"), ("▁", "red")]
    gemma = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>"
        )
    )
    gemma.normalizer = normalizers.Replace(" ", "▁")
    gemma.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    gemma.add_tokens([AddedToken("<loc0000>", normalized=False), AddedToken("<image>", normalized=False)])
    gemma.save(str(tmp_path / "tokenizer.json"))
    image = len(pieces) + 1
    ours = ItemEncoder(TokensConfig(tokenizer=str(tmp_path)), VISION, image)
    ids = {piece: number for number, piece in enumerate(pieces)}
    wanted = [ids["<bos>"], ids["red"], ids["▁red"], ids["▁"], ids["<0xC3>"], ids["<0xA9>"], ids["\n"], ids["<eos>"]]
    np.testing.assert_array_equal(ours.encode(Item(text="red é", instruction="red")).tokens[[0, 1, 2]], wanted[:3])
    np.testing.assert_array_equal(ours.tokens("red red é", None, False), wanted)
    assert ours.vocab_size == image + 1


def test_an_encoder_travels_to_another_process(tokenizer_dir):
    ours = encoder(tokenizer_dir)
    copy = pickle.loads(pickle.dumps(ours))
    item = Item(text="Which one is <eos> it?")
    np.testing.assert_array_equal(copy.encode(item).tokens, ours.encode(item).tokens)


def test_directories_that_do_not_fit_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(UserError, match=r"model\.image_token is 7"):
        ItemEncoder(TokensConfig(tokenizer=str(tokenizer_dir)), VISION, 7)
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        encoder(tmp_path)
    tree = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    tree["added_tokens"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="no <image> token"):
        encoder(tmp_path)
    with pytest.raises(UserError, match="at least 261"):
        train_tokenizer(TEXTS, 200, tmp_path)
