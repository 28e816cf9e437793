"""config.json of transformer, VAE and text encoder: types and ranges, checked before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HYBRID, tiny_model
from transformers import UMT5EncoderModel

from arl2.model import HybridWanModel
from wan.checkpoints.formats import transformer_config
from wan.text import TOY_TEXT, load_text_encoder, umt5_config, word_tokenizer
from wan.utils.errors import CheckpointError
from wan.vae.wan_vae import TOY_VAE, load_vae, new_vae, spatial_stride

NAN, INF = float("nan"), float("inf")
REMOVED = object()


def changed(folder: Path, name: str, value: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if value is REMOVED:
        del config[name]
    else:
        config[name] = value
    path.write_text(json.dumps(config))


def message_of(load: Any, *arguments: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


TRANSFORMER: list[tuple[str, Any]] = [
    *(("num_layers", value) for value in (REMOVED, 0, -1, 3.0, "3", None, True, 100_000, 10**400)),
    *(("num_heads", value) for value in (REMOVED, 0, -2, 5)),
    *(("dim", value) for value in (-24, 0, 10**12, [24])),
    *(("text_len", value) for value in (10**9, 1e9, 0)),
    *(("eps", value) for value in (REMOVED, 0, -1e-6, NAN, INF, "1e-6", 1)),
    *(("patch_size", value) for value in ([1, 2], [1, 0, 2], [2, 2, 2], 2, None)),
    *(("model_type", value) for value in ("i2v", None)),
    ("qk_norm", "yes"),
    *(("hybrid_layers", value) for value in (REMOVED, None, "0", [0.5], [-1], {})),
    *(("lora_rank", value) for value in (REMOVED, 0, -1, "4", 10**9)),
    *(("lora_alpha", value) for value in (REMOVED, 0, NAN, INF, "x", None)),
    *(("ffn_lora", value) for value in (REMOVED, "some", None)),
    *(("trained_memory", value) for value in ([], {}, {"window_frames": -3, "sink_frames": 0, "num_frames": None})),
    ("unknown", 1),
    ("\x1b[31m\n", 1),
]


@pytest.mark.parametrize(
    ("name", "value"), TRANSFORMER, ids=lambda value: "removed" if value is REMOVED else repr(value)[:24]
)
def test_settings_of_the_transformer(name: str, value: Any, tmp_path: Path) -> None:
    tiny_model(HYBRID, torch.float32).save_pretrained(tmp_path)
    changed(tmp_path, name, value)
    for load in (transformer_config, HybridWanModel.from_pretrained):
        message = message_of(load, tmp_path)
        assert "config.json" in message and (name in message or not name.isprintable())


@pytest.mark.parametrize("text", ["[]", "null", "3", "", "{", "[" * 100_000, '{"dim": 1, "dim": 2}', "\ud800"])
def test_config_files_that_are_none(text: str, tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    message_of(transformer_config, tmp_path)
    (tmp_path / "config.json").unlink()
    message_of(transformer_config, tmp_path)
    (tmp_path / "config.json").mkdir()
    message_of(transformer_config, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("qk_norm", "rms_norm"), ("num_layers", REMOVED), ("attention_head_dim", 3), ("image_dim", 1280), ("x", 1)],
)
def test_settings_of_a_transformer_in_diffusers_layout(name: str, value: Any, tmp_path: Path) -> None:
    config = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 8,
        "ffn_dim": 40,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "rope_max_seq_len": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert transformer_config(tmp_path)["dim"] == 24 and transformer_config(tmp_path)["text_len"] == 512
    changed(tmp_path, name, value)
    message_of(transformer_config, tmp_path)


def test_a_native_config_is_taken_as_it_is_and_other_programs_settings_must_be_neutral(tmp_path: Path) -> None:
    sizes = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "freq_dim": 8, "in_dim": 4, "out_dim": 4}
    config = {"_class_name": "WanModel", "text_len": 5, "eps": 1e-5, "window_size": [-1, -1], "text_dim": 12} | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {"eps": 1e-5, "text_dim": 12, **sizes}.items() <= transformer_config(tmp_path).items()
    changed(tmp_path, "window_size", [5, 5])
    assert "window_size" in message_of(transformer_config, tmp_path)


VAE: list[tuple[str, Any]] = [
    *(("latents_std", value) for value in (REMOVED, [0.0] * 16, [-1.0] * 16, [NAN] * 16, [1.0] * 15, None)),
    *(("latents_mean", value) for value in (REMOVED, [INF] * 16, [0.0], "x")),
    *(("base_dim", value) for value in (REMOVED, 0, "4", 10**9, 8)),
    *(("z_dim", value) for value in (0, 8)),
    *(("dim_mult", value) for value in ([], [1, 2, 4], [1] * 100, None)),
    *(("num_res_blocks", value) for value in (0, 10**6, 3)),
    *(("temperal_downsample", value) for value in (REMOVED, [True] * 3, [1, 0, 1], [False, True], None)),
    *(("in_channels", value) for value in (4, None)),
    ("scale_factor_spatial", 16),
    ("unknown", 1),
    ("_class_name", "AutoencoderKL"),
]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    new_vae(TOY_VAE | {"dim": 4}).save_pretrained(folder / "vae")
    return folder / "vae"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    UMT5EncoderModel(umt5_config(TOY_TEXT)).save_pretrained(folder / "text_encoder")
    word_tokenizer(["a"]).save_pretrained(folder / "tokenizer")
    return folder / "text_encoder"


@pytest.fixture
def kept(request: pytest.FixtureRequest) -> Any:
    """A folder whose config.json and weights are put back."""
    folder: Path = request.getfixturevalue(request.param)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("kept", ["vae"], indirect=True)
@pytest.mark.parametrize(("name", "value"), VAE, ids=lambda value: "removed" if value is REMOVED else repr(value)[:24])
def test_settings_of_the_vae(name: str, value: Any, kept: Path) -> None:
    assert spatial_stride(kept.parent) == 8
    changed(kept, name, value)
    message_of(load_vae, kept.parent)


TEXT: list[tuple[str, Any]] = [
    *(("num_layers", value) for value in (REMOVED, 0, 10**6, 3, None)),
    *(("num_heads", value) for value in (0, 8)),
    *(("d_model", value) for value in (-1, "x")),
    *(("d_kv", value) for value in (REMOVED, 0, 8)),
    *(("vocab_size", value) for value in (10**12, 100)),
    *(("relative_attention_num_buckets", value) for value in (REMOVED, 0, 16)),
    *(("relative_attention_max_distance", value) for value in (REMOVED, 0)),
    *(("layer_norm_epsilon", value) for value in (REMOVED, 0, NAN, "x")),
    *(("feed_forward_proj", value) for value in (REMOVED, "relu", "gated-silu")),
    ("dense_act_fn", "silu"),
    *(("model_type", value) for value in ("t5", ["umt5"], None)),
]


@pytest.mark.parametrize("kept", ["text"], indirect=True)
@pytest.mark.parametrize(("name", "value"), TEXT, ids=lambda value: "removed" if value is REMOVED else repr(value)[:24])
def test_settings_of_the_text_encoder(name: str, value: Any, kept: Path) -> None:
    changed(kept, name, value)
    message_of(load_text_encoder, kept.parent)


@pytest.mark.parametrize("kept", ["vae", "text"], indirect=True)
def test_weights_of_vae_and_text_encoder(kept: Path) -> None:
    load = load_vae if kept.name == "vae" else load_text_encoder
    file = next(kept.glob("*.safetensors"))
    whole = load_file(file)
    name = next(name for name in sorted(whole) if name.endswith("weight") and whole[name].ndim > 1)
    for value in (whole[name] * NAN, whole[name].to(torch.int32), whole[name].half(), whole[name][None]):
        save_file(whole | {name: value.contiguous()}, file)
        assert name in message_of(load, kept.parent)
    save_file({other: value for other, value in whole.items() if other != name}, file)
    assert name in message_of(load, kept.parent)
    if kept.name == "text_encoder":
        save_file(whole | {"encoder.embed_tokens.weight": whole["shared.weight"] + 1}, file)
        assert "differ" in message_of(load, kept.parent)
