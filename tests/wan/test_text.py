"""Prompts to embeddings: cleaning, padding, layouts and bad folders. Golden values are in test_golden.py."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from wan.text import (
    NATIVE_TEXT_FILE,
    NATIVE_TOKENIZER_FOLDER,
    TOY_TEXT,
    TextEncoder,
    clean_prompt,
    has_text,
    load_text_encoder,
    native_umt5_names,
    save_native_umt5,
    umt5_config,
    umt5_from_native,
    word_tokenizer,
)
from wan.utils.errors import CheckpointError, InputError

WORDS = ("a", "red", "blue", "disc", "rolls")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(UMT5EncoderModel(umt5_config(TOY_TEXT)).eval(), word_tokenizer(WORDS), 8)


@pytest.fixture
def folder(encoder: TextEncoder, tmp_path: Path) -> Path:
    """A folder in diffusers' layout."""
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "tokenizer")  # a used tokenizer would save its padding too
    return tmp_path


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
        ("<b>fish &amp;amp; chips", "<b>fish & chips"),  # ftfy leaves entities alone in what looks like HTML
        ("l&#39;eau", "l'eau"),
        ("schÃ¶n", "schön"),
        ("a\u3000b\u00a0c", "a b c"),
        (" &amp;nbsp; ", ""),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(prompt: str, clean: str) -> None:
    assert clean_prompt(prompt) == clean


@pytest.mark.parametrize("prompt", ["a", "é", "...", "🙂", "视频", "&amp;", "\u200bx", "¿", "ﷺ"])
def test_what_can_be_seen_is_text(prompt: str) -> None:
    assert has_text(prompt)


UNSEEN = [
    *("", " \t\n", "&nbsp;", "&amp;nbsp;", "&#8203;", "\u200b\u200d\u2060", "\x00\x01\x1b", "\ufeff", "\ufe0f"),
    *("\u0301", "\u3164", "\u2800", "\u202e", "\u00ad", "\U000e0041"),
]


@pytest.mark.parametrize("prompt", UNSEEN)
def test_what_cannot_be_seen_is_no_text(prompt: str) -> None:
    assert not has_text(prompt)


def test_what_is_cut_from_the_left_is_named(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.truncation_side = "left"
    tokens = TextEncoder(encoder.model, tokenizer, 8).tokens(["a red disc rolls a blue disc rolls a disc"])
    assert tokenizer.decode(tokens["input_ids"][0], skip_special_tokens=True) == "rolls a blue disc rolls a disc"
    assert caplog.records[-1].getMessage().endswith("takes 7, the first 3 are dropped: 'a red disc'")


def test_what_is_cut_from_a_prompt_is_reported_once(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    fresh = TextEncoder(encoder.model, word_tokenizer(WORDS), 8)
    with caplog.at_level(logging.WARNING):
        fresh.tokens(["a red disc rolls a blue disc"])  # 7 words and the end mark
        assert not caplog.records
        fresh.tokens(["a red disc rolls a blue disc rolls  a disc"] * 2)
        fresh.tokens(["a red disc rolls a blue disc rolls a disc"])  # the same once it is cleaned
    (record,) = caplog.records
    assert record.getMessage() == (
        "the prompt 'a red disc rolls a blue disc rolls a disc' is too long: of its 10 tokens the text encoder "
        "takes 7, the last 3 are dropped: 'rolls a disc'"
    )


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
        assert loaded.model.shared.weight is loaded.model.encoder.embed_tokens.weight
        assert not any(value.is_meta for value in loaded.model.state_dict().values())


def test_weights_come_in_the_type_asked_for(encoder: TextEncoder, folder: Path) -> None:
    loaded = load_text_encoder(folder, text_len=8, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.encode(["a red disc"]).dtype is torch.bfloat16


def test_embeddings_can_enter_a_training_graph(encoder: TextEncoder) -> None:
    projection = torch.nn.Linear(64, 3)
    projection(encoder.encode(["a red disc"])).sum().backward()
    assert projection.weight.grad is not None


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_either_name_of_the_embedding_is_enough(encoder: TextEncoder, folder: Path, name: str) -> None:
    state = {key: value for key, value in encoder.model.state_dict().items() if "embed_tokens" not in key}
    state[name] = state.pop("shared.weight")
    save_file(state, folder / "text_encoder" / "model.safetensors")
    assert torch.equal(load_text_encoder(folder, text_len=8).encode(["a disc"]), encoder.encode(["a disc"]))


def test_sharded_weights_load(encoder: TextEncoder, folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    encoder.model.save_pretrained(folder / "text_encoder", max_shard_size="100KB")
    assert (folder / "text_encoder" / "model.safetensors.index.json").is_file()
    assert torch.equal(load_text_encoder(folder, text_len=8).encode(["a disc"]), encoder.encode(["a disc"]))


def test_native_names_are_those_that_are_saved(encoder: TextEncoder, tmp_path: Path) -> None:
    save_native_umt5(encoder.model, tmp_path / "umt5.pth")
    saved = torch.load(tmp_path / "umt5.pth", weights_only=True)
    assert {name: tuple(value.shape) for name, value in saved.items()} == native_umt5_names(TOY_TEXT)


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


def test_text_encoder_folders_that_do_not_fit_are_an_error(encoder: TextEncoder, folder: Path) -> None:
    config, weights = folder / "text_encoder" / "config.json", folder / "text_encoder" / "model.safetensors"
    _change(config, num_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected encoder\.block\.1"):
        load_text_encoder(folder)
    _change(config, num_layers=3)
    with pytest.raises(CheckpointError, match=r"missing encoder\.block\.2"):
        load_text_encoder(folder)
    _change(config, num_layers=2, d_ff=64)
    with pytest.raises(CheckpointError, match="shape"):
        load_text_encoder(folder)
    _change(config, model_type="clip_text_model")
    with pytest.raises(CheckpointError, match="'clip_text_model', not a UMT5"):
        load_text_encoder(folder)
    _change(config, model_type="umt5", d_ff=128)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_text_encoder(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no weights in"):
        load_text_encoder(folder)


def test_tokenizers_that_cannot_be_used_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, settings = folder / "tokenizer" / "tokenizer.json", folder / "tokenizer" / "tokenizer_config.json"
    whole, known = tokenizer.read_text(), settings.read_text()
    tokenizer.write_text(whole[:300])
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_text_encoder(folder)
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_text_encoder(folder)
    tokenizer.write_text(whole)
    settings.write_text(json.dumps({k: v for k, v in json.loads(known).items() if k != "pad_token"}))
    with pytest.raises(CheckpointError, match="no padding token"):
        load_text_encoder(folder)
    # A folder that brings code: neither run nor asked about.
    (folder / "tokenizer" / "custom.py").write_text("raise SystemExit('ran')")
    settings.write_text(known)
    _change(settings, tokenizer_class="Custom", auto_map={"AutoTokenizer": ["custom.Custom", None]})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_text_encoder(folder)


def _model(**changes: object) -> dict[str, object]:
    return {"model": json.loads(word_tokenizer(WORDS).backend_tokenizer.to_str())["model"] | changes}


VOCABULARY = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}
END = {"</s>": {"id": "</s>", "ids": [4000], "tokens": ["</s>"]}}
DAMAGED_TOKENIZERS: dict[str, tuple[str, object]] = {
    "an unknown type of model": ("tokenizer.json", _model(type="Nope")),
    "negative ids": ("tokenizer.json", _model(vocab={name: -n for name, n in VOCABULARY.items()})),
    "an empty vocabulary": ("tokenizer.json", _model(vocab={})),
    "a mark for unknown words that it does not know": ("tokenizer.json", _model(unk_token="zzz")),
    "ids beyond the embedding": ("tokenizer.json", _model(vocab={name: n + 1000 for name, n in VOCABULARY.items()})),
    "an end mark beyond the embedding": (
        "tokenizer.json",
        {
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}]}
            | {"pair": [], "special_tokens": END}
        },
    ),
    "deep nesting": ("tokenizer.json", "[" * 100_000),
    "a list of settings": ("tokenizer_config.json", "[]"),
    "a class that is a number": ("tokenizer_config.json", {"tokenizer_class": 5}),
    "deep nesting of settings": ("tokenizer_config.json", "[" * 100_000),
}


@pytest.mark.parametrize("name", DAMAGED_TOKENIZERS)
def test_a_damaged_tokenizer_is_an_error_of_loading(name: str, folder: Path) -> None:
    file, change = DAMAGED_TOKENIZERS[name]
    path = folder / "tokenizer" / file
    if isinstance(change, str):
        path.write_text(change)
    else:
        assert isinstance(change, dict)
        _change(path, **change)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .*download it again"):
        load_text_encoder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_was_not_fetched_is_an_error_with_its_cure(name: str, folder: Path) -> None:
    (folder / "tokenizer" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=f"{name} is a Git-LFS pointer.*run `git lfs pull`"):
        load_text_encoder(folder)
