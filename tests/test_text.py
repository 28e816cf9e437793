"""Prompts to embeddings: cleaning, padding, layouts and bad folders. Golden values are in test_golden.py."""

from pathlib import Path

import pytest
import torch
from transformers import UMT5EncoderModel

from pipelines.random_model import TOY_TEXT, word_tokenizer
from wan.errors import CheckpointError, InputError
from wan.text import (
    NATIVE_TEXT_FILE,
    NATIVE_TOKENIZER_FOLDER,
    TextEncoder,
    clean_prompt,
    load_text_encoder,
    save_native_umt5,
    umt5_config,
    umt5_from_native,
)

WORDS = ("a", "red", "blue", "disc", "rolls")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(UMT5EncoderModel(umt5_config(TOY_TEXT)).eval(), word_tokenizer(WORDS), 8)


def test_padding_is_zero_and_does_not_change_the_rest(encoder: TextEncoder) -> None:
    embedding = encoder.encode(["a red disc", "a blue disc rolls a red disc rolls a blue disc"])
    assert embedding.shape == (2, 8, 64)
    assert embedding[0, 4:].eq(0).all() and embedding[0, :4].ne(0).any(dim=-1).all()
    assert embedding[1].ne(0).any(dim=-1).all()
    wider = TextEncoder(encoder.model, encoder.tokenizer, 12).encode(["a red disc"])
    torch.testing.assert_close(wider[:, :8], embedding[:1])


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("  two\n\n words\t", "two words"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("l&#39;eau", "l'eau"),
        ("schÃ¶n", "schön"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(prompt: str, clean: str) -> None:
    assert clean_prompt(prompt) == clean


def test_both_layouts_load_the_same(encoder: TextEncoder, tmp_path: Path) -> None:
    native, diffusers = tmp_path / "native", tmp_path / "diffusers"
    save_native_umt5(encoder.model, native / NATIVE_TEXT_FILE)
    encoder.tokenizer.save_pretrained(native / NATIVE_TOKENIZER_FOLDER)
    encoder.model.save_pretrained(diffusers / "text_encoder")
    encoder.tokenizer.save_pretrained(diffusers / "tokenizer")
    prompt = ["a red disc rolls"]
    for folder in (native, diffusers):
        loaded = load_text_encoder(folder, config=TOY_TEXT, text_len=8)
        assert torch.equal(loaded.encode(prompt), encoder.encode(prompt))


def test_bad_folders_are_an_error(encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no text encoder in"):
        load_text_encoder(tmp_path)
    save_native_umt5(encoder.model, tmp_path / NATIVE_TEXT_FILE)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_text_encoder(tmp_path, config=TOY_TEXT)
    with pytest.raises(InputError, match="no tokenizer"):
        TextEncoder(encoder.model, None, 8).encode(["a"])
    state = torch.load(tmp_path / NATIVE_TEXT_FILE, weights_only=True)
    with pytest.raises(CheckpointError, match="shape"):
        umt5_from_native(state, TOY_TEXT | {"dim_ffn": 64})
    with pytest.raises(CheckpointError, match="unexpected extra"):
        umt5_from_native(state | {"extra": torch.zeros(1)}, TOY_TEXT)
    with pytest.raises(CheckpointError, match="a VAE, not a UMT5"):
        umt5_from_native({"encoder.conv1.weight": torch.zeros(1)}, TOY_TEXT)
    with pytest.raises(CheckpointError, match="T5"):
        umt5_from_native(state, TOY_TEXT | {"shared_pos": True})


def test_a_text_encoder_folder_that_lacks_a_weight_is_an_error(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    deeper = UMT5EncoderModel(umt5_config(TOY_TEXT | {"num_layers": 3}))
    deeper.config.num_layers = 2
    deeper.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(CheckpointError, match="unexpected keys"):
        load_text_encoder(tmp_path)
