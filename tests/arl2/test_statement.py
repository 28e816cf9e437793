"""config.json, weights and request are one statement: each way to contradict one another is refused by name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import HYBRID, TINY, tiny_model

from arl2.checkpoint import build_hybrid, read_generator, save_generator, save_hybrid_weights
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.statement import ADAPTER_PARTS, FFN_ADAPTER_PARTS, LAYER_PARTS, found_settings
from wan.checkpoints.fields import RELEASED
from wan.checkpoints.formats import TransformerWeights, diffusers_name, read_transformer, transformer_config
from wan.checkpoints.identify import is_hybrid_part
from wan.checkpoints.loading import StateDict
from wan.checkpoints.record import RECORD, read_record
from wan.config import wan_size
from wan.model import CausalWanModel
from wan.utils.errors import CheckpointError, InputError

CPU, F32 = torch.device("cpu"), torch.float32
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build(path: Path, wanted: HybridSettings = HybridSettings(), dtype: torch.dtype | None = F32) -> HybridWanModel:
    weights = read_transformer(path)
    return build_hybrid(weights, {} if path.is_dir() else dict(TINY), wanted, dtype=dtype, device=CPU)[0]


@pytest.fixture
def model() -> HybridWanModel:
    return tiny_model(HYBRID, F32)


@pytest.fixture
def folder(model: HybridWanModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[StateDict], Any], settings: dict[str, Any] | None = None) -> None:
    """Change a folder's weights, which then say nothing of their origin, and its config.json."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (settings or {})))


def test_the_parts_of_a_layer_are_those_of_the_model(model: HybridWanModel) -> None:
    names = model.hybrid_parameter_names()
    expected = {f"blocks.{layer}.self_attn.{part}" for layer in (0, 2) for part in LAYER_PARTS + ADAPTER_PARTS}
    assert set(names) == expected | {f"blocks.{layer}.{part}" for layer in (0, 2) for part in FFN_ADAPTER_PARTS}
    assert {name for name in model.state_dict() if is_hybrid_part(name)} == set(names)


def without(*ends: str) -> Callable[[StateDict], None]:
    def change(state: StateDict) -> None:
        for name in [name for name in state if name.endswith(ends)]:
            del state[name]

    return change


def nothing(state: StateDict) -> None:
    """Leave the weights as they are."""


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (without("0.self_attn.A_log"), {}, "lacks blocks.0.self_attn.A_log"),
        (without("gate_proj.weight"), {}, "gate headwise, the weights lack blocks.0.self_attn.gate_proj.weight"),
        (without("lora_q_B"), {}, "lacks blocks.0.self_attn.lora_q_B"),
        (without("0.ffn.0.lora_B"), {}, "lacks blocks.0.ffn.0.lora_B"),
        (without("2.ffn.0.lora_A", "2.ffn.0.lora_B", "2.ffn.2.lora_A", "2.ffn.2.lora_B"), {}, "see blocks.2"),
        (without(*(f"0.self_attn.{part}" for part in ADAPTER_PARTS)), {}, "lacks blocks.0.self_attn.lora_k_A"),
        (without(*ADAPTER_PARTS), {}, "none in its hybrid layers"),
        (without(*ADAPTER_PARTS, *FFN_ADAPTER_PARTS), {}, "lora_rank 3, the weights hold None"),
        (without(*FFN_ADAPTER_PARTS), {}, "ffn_lora .* the weights hold"),
        (without(*(f"0.self_attn.{part}" for part in LAYER_PARTS + ADAPTER_PARTS)), {}, "see blocks.0"),
        (lambda s: without(*filter(is_hybrid_part, list(s)))(s), {}, "hybrid_layers .0, 2., the weights hold"),
        (nothing, {"hybrid_layers": [0, 1, 2]}, "hybrid_layers .0, 1, 2., the weights hold"),
        (nothing, {"hybrid_layers": [99]}, "hybrid_layers .99., the weights hold"),
        (nothing, {"hybrid_layers": []}, "hybrid_layers .., the weights hold"),
        (nothing, {"lora_rank": None}, "lora_rank None, the weights hold 3"),
        (nothing, {"lora_rank": 4}, "lora_rank 4, the weights hold 3"),
        (nothing, {"ffn_lora": "all"}, "ffn_lora"),
        (nothing, {"ffn_lora": "none"}, "ffn_lora"),
        (nothing, {"num_layers": 2}, "num_layers 2, the weights hold 3"),
        (nothing, {"num_layers": 200}, "num_layers 200, the weights hold 3"),
        (nothing, {"_class_name": "CausalWanModel"}, "a setting that we do not know"),
        (lambda s: s.update({"blocks.0.ffn.0.lora_B": torch.ones(4, 40)}), {}, "adapters of several ranks"),
        (lambda s: s.update({"blocks.0.self_attn.A_log": torch.ones(2).half()}), {}, "A_log is float16"),
        (lambda s: s.update({"blocks.0.self_attn.a_proj.bias": torch.ones(2)}), {}, "it has blocks.0.self_attn.a_proj"),
        (lambda s: s.update({"blocks.1.self_attn.phi_q.weight": torch.ones(24, 12, 1)}), {}, "block 1 is neither"),
    ],
)
@pytest.mark.parametrize("wanted", [HybridSettings(), HybridSettings((0, 2), 3, 6.0)], ids=["no request", "request"])
def test_a_folder_that_contradicts_itself(
    change: Callable[[StateDict], Any], settings: dict[str, Any], words: str, wanted: HybridSettings, folder: Path
) -> None:
    rewrite(folder, change, settings)
    with pytest.raises(CheckpointError, match=words) as error:
        build(folder, wanted)
    assert str(error.value).isprintable()


def test_a_claim_converts_nothing_and_a_request_does(tmp_path: Path) -> None:
    tiny_model(dtype=F32).save_pretrained(tmp_path)
    assert list(build(tmp_path, HybridSettings((1,), 2)).hybrid_attentions()) == [1]
    rewrite(tmp_path, nothing, {"hybrid_layers": [1]})
    for wanted in (HybridSettings(), HybridSettings((1,))):
        with pytest.raises(CheckpointError, match=r"hybrid_layers \[1\], the weights hold \[\]"):
            build(tmp_path, wanted)


@pytest.mark.parametrize(
    ("name", "value"), [("eps", 1e-5), ("num_heads", 4), ("text_len", 6), ("lora_alpha", 5.0), ("trained_memory", None)]
)
def test_what_weights_do_not_show_is_recorded_beside_them(name: str, value: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    if name == "trained_memory":
        assert build(folder).hybrid.layers == (0, 2)
        return
    for load in (build, HybridWanModel.from_pretrained):
        with pytest.raises(CheckpointError, match=f"{name}|A_log"):
            load(folder)


def test_a_header_that_contradicts_itself_or_is_malformed_is_refused(model: HybridWanModel, tmp_path: Path) -> None:
    path = tmp_path / "hybrid.safetensors"
    save_hybrid_weights(model, path)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    record = header["arl2"]
    for changes, words in (
        ({"lora_alpha": "16.0"}, r"lora_alpha 16\.0, and 6\.0 in arl2: convert it again"),
        ({"lora_alpha": "nan"}, "lora_alpha nan, and 6"),
        *(({"arl2": text}, "settings in its header are malformed") for text in ("[]", "null", "{}", "3", "[" * 9999)),
        ({"arl2": record.replace("{", '{"eps": 0.001, ', 1)}, "settings in its header are malformed"),
        ({"lora_alpha": "x"}, "settings in its header are malformed"),
    ):
        save_file(load_file(path), tmp_path / "other.safetensors", header | changes)
        with pytest.raises(CheckpointError, match=words):
            read_record(tmp_path / "other.safetensors", {})
    assert read_record(path, {})["lora_alpha"] == 6
    with pytest.raises(CheckpointError, match="'arl2' is no dictionary of settings"):
        read_record(tmp_path / "a.pt", {"arl2": {}})


def test_heads_that_weights_do_not_show_are_those_of_known_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = wan_size("toy")
    with torch.device("meta"):
        names = CausalWanModel(**RELEASED | toy).state_dict()
    state = {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in names.items()}
    for changes, words in (
        ({}, None),
        ({"num_heads": 6}, "num_heads 6, the toy model of these sizes has 3"),
        ({"num_heads": 6, "num_layers": 7}, "num_heads 6 gives heads of 32 channels, known models have 64"),
    ):
        caplog.clear()
        sizes = dict(toy) | changes
        kept = {n: v for n, v in state.items() if not n.startswith("blocks.7.") or sizes["num_layers"] == 8}
        weights = TransformerWeights(kept, "here", config=sizes)

        def load(weights: TransformerWeights = weights) -> None:
            build_hybrid(weights, {}, HybridSettings(), dtype=None, device=torch.device("cpu"))

        if words is not None and "of these sizes" in words:
            with pytest.raises(CheckpointError, match=words):
                load()
        else:
            load()
            assert [words in record.getMessage() for record in caplog.records] == ([True] if words else [])


def test_a_bare_file_has_its_alpha_and_layers_recorded(model: HybridWanModel, tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        save_generator(model, tmp_path / name)
        assert build(tmp_path / name).hybrid == model.hybrid
    state = load_file(tmp_path / "a.safetensors")
    save_generator(tiny_model(dtype=F32), tmp_path / "b.pt")
    stored = torch.load(tmp_path / "b.pt", weights_only=True)
    torch.save(stored | {"generator": state}, tmp_path / "b.pt")  # hybrid weights, softmax record
    with pytest.raises(CheckpointError, match="hybrid_layers"):
        build(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "record", [[1], None, {1: 2}, torch.ones(1), {"lora_alpha": float("nan")}, {"x": 1}, {"eps": 1}]
)
def test_a_malformed_record_is_refused(record: Any, model: HybridWanModel, tmp_path: Path) -> None:
    torch.save({"generator": model.state_dict(), "arl2": record}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"record|entry 'arl2'"):
        build(tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["[]", "null", "{", '"x"', '{"lora_alpha": "x"}'])
def test_a_malformed_header_is_refused(text: str, model: HybridWanModel, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "a.safetensors", {"arl2": text})
    with pytest.raises(CheckpointError, match=r"header|record"):
        build(tmp_path / "a.safetensors")
    save_file(model.state_dict(), tmp_path / "b.safetensors", {"lora_alpha": text})
    with pytest.raises(CheckpointError, match="header"):
        build(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("stored", "wanted", "words"),
    [
        (HybridSettings((0, 2)), HybridSettings(lora_rank=4), "without adapters"),
        (HybridSettings((0, 2)), HybridSettings((0, 2), 4), "without adapters"),
        (HYBRID, HybridSettings(ffn_lora=FFNLoRA.ALL), "ffn_lora all"),
        (HYBRID, HybridSettings((1,)), "not in"),
        (HYBRID, HybridSettings(lora_rank=5), "rank 3"),
        (HybridSettings(), HybridSettings((1,), 25), "above the model's 24 channels"),
        (HybridSettings(), HybridSettings((3,)), "out of range"),
    ],
)
def test_requests_that_contradict_the_weights(
    stored: HybridSettings, wanted: HybridSettings, words: str, tmp_path: Path
) -> None:
    save_generator(tiny_model(stored, F32), tmp_path / "a.pt")
    with pytest.raises(InputError, match=words):
        build(tmp_path / "a.pt", wanted)


@pytest.mark.parametrize("alpha", [0.0, 1e-320, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_cannot_scale_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="lora_alpha"):
        HybridSettings(lora_alpha=alpha)


def test_the_alpha_of_the_folder_is_not_that_of_another_checkpoint(model: HybridWanModel, tmp_path: Path) -> None:
    """The folder that gives the sizes may be a hybrid with other adapters."""
    tiny_model(HybridSettings((1,), 2, 9.0), F32).save_pretrained(tmp_path / "folder")
    torch.save({"generator": model.state_dict()}, tmp_path / "a.pt")
    sizes = transformer_config(tmp_path / "folder")
    weights = read_generator(tmp_path / "folder", tmp_path / "a.pt")
    built, _ = build_hybrid(weights, sizes, HybridSettings(lora_alpha=6.0), dtype=F32, device=CPU)
    assert built.hybrid == HYBRID


def test_adapters_of_every_block_stay_so_where_every_layer_is_hybrid(tmp_path: Path) -> None:
    settings = HybridSettings((0, 1, 2), 3, 6.0, FFNLoRA.ALL)
    tiny_model(settings, F32).save_pretrained(tmp_path / "m")
    assert build(tmp_path / "m").hybrid == settings
    assert build(tmp_path / "m", HybridSettings((1,))).hybrid.layers == (1,)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "module.model."])
@pytest.mark.parametrize("names", ["ours", "diffusers"])
def test_prefixes_of_other_tools(prefix: str, names: str, tmp_path: Path) -> None:
    softmax = tiny_model(dtype=F32)
    name_of = diffusers_name if names == "diffusers" else str
    save_file({prefix + name_of(n): v for n, v in softmax.state_dict().items()}, tmp_path / "a.safetensors")
    built = build(tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(built[name], value) for name, value in softmax.state_dict().items())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["transformer.blocks.0.attn1.to_q.lora_A.weight"], "a LoRA"),
        (["diffusion_model.blocks.0.self_attn.q.lora_down.weight"], "a LoRA"),
        (["lora_unet_blocks_0_q.alpha"], "a LoRA"),
        (["encoder.conv1.weight", "decoder.middle.0.residual.0.gamma"], "a VAE"),
        (["decoder.conv_in.weight"], "a VAE"),
        (["token_embedding.weight", "blocks.0.attn.q.weight"], "a text encoder"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "a text encoder"),
        (["patch_embedding.weight", "img_emb.proj.0.weight"], "an image branch"),
        (["x.y"], "unknown weights"),
    ],
)
def test_other_families_are_named(names: list[str], words: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=words):
        read_transformer(tmp_path / "a.safetensors")


def test_an_optimiser_and_a_single_shard_are_named(tmp_path: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="an optimizer's state"):
        read_transformer(tmp_path / "a.pt")
    tiny_model(dtype=F32).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("*-of-*"))[0]
    with pytest.raises(CheckpointError, match=r"one shard of \d+: give its folder"):
        read_transformer(shard)
    assert build(tmp_path / "m").hybrid.layers == ()
    HybridWanModel.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "m")  # over the shards, which go
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", WEIGHTS]


def test_values_that_a_type_cannot_hold_are_refused_and_not_made_infinite(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float64)
    model.patch_embedding.weight.data[0, 0] = 1e5
    save_generator(model, tmp_path / "a.pt")
    assert build(tmp_path / "a.pt").dtype is F32
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight has values beyond the range of float16"):
        build(tmp_path / "a.pt", dtype=torch.float16)


def test_hybrid_weights_alone_must_be_whole(model: HybridWanModel, tmp_path: Path) -> None:
    tiny_model(dtype=F32).save_pretrained(tmp_path / "base")
    save_hybrid_weights(model, tmp_path / "h.safetensors")
    state = load_file(tmp_path / "h.safetensors")
    for name in ("blocks.2.self_attn.dt_bias", "blocks.0.ffn.2.lora_A"):
        save_file({other: value for other, value in state.items() if other != name}, tmp_path / "h.safetensors")
        weights = read_generator(tmp_path / "base", tmp_path / "h.safetensors")
        with pytest.raises(CheckpointError, match=f"lacks {name}"):
            build_hybrid(weights, dict(TINY), HybridSettings(), dtype=F32, device=CPU)


def test_training_is_not_told_that_new_parameters_are_untrained(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tiny_model(dtype=F32).save_pretrained(tmp_path)
    weights = read_transformer(tmp_path)
    with caplog.at_level(logging.WARNING):
        _, report = build_hybrid(weights, {}, HybridSettings((1,)), dtype=F32, device=CPU, to_be_trained=True)
    assert report.untrained and "UNTRAINED" not in caplog.text


def test_settings_of_weights_that_are_not_whole_are_not_guessed(model: HybridWanModel) -> None:
    state = dict(model.state_dict())
    assert found_settings(state) == HybridSettings((0, 2), 3, ffn_lora=FFNLoRA.HYBRID)
    del state["blocks.0.self_attn.phi_v.weight"]
    with pytest.raises(CheckpointError, match=r"the checkpoint: block 0 .* lacks blocks.0.self_attn.phi_v.weight"):
        found_settings(state)


@pytest.mark.parametrize("hybrid", [HYBRID, HybridSettings((0, 2))])
def test_advice_on_layers_is_in_words_of_no_entry_point_and_works(hybrid: HybridSettings, tmp_path: Path) -> None:
    tiny_model(hybrid, F32).save_pretrained(tmp_path)
    whole = "all of these, or name none" if hybrid.lora_rank else "a subset of these"
    with pytest.raises(InputError, match=rf"hybrid in layers \[0, 2\], not in \[1\]: ask for {whole}$") as told:
        build(tmp_path, HybridSettings((0, 1)))
    assert "--" not in str(told.value)
    assert build(tmp_path, HybridSettings((0, 2))).hybrid.layers == build(tmp_path).hybrid.layers == (0, 2)
    if hybrid.lora_rank is None:
        assert build(tmp_path, HybridSettings((2,))).hybrid.layers == (2,)
    for wanted in (HybridSettings((0,)), HybridSettings(lora_rank=7), HybridSettings(ffn_lora=FFNLoRA.ALL)):
        if hybrid.lora_rank is not None:
            with pytest.raises(InputError) as told:
                build(tmp_path, wanted)
            assert "--" not in str(told.value)


def test_a_softmax_model_claims_nothing_of_the_hybrid(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    rewrite(tmp_path, nothing)
    config = json.loads((tmp_path / "config.json").read_text())
    build(tmp_path)
    claims: list[tuple[dict[str, Any], str]] = [
        ({"lora_rank": 16}, "lora_rank 16, the weights hold None"),
        ({"ffn_lora": "all"}, "ffn_lora all, the weights have no adapters"),
        ({"untrained_layers": [0]}, "untrained_layers names layer 0, which is softmax"),
    ]
    for claim, words in claims:
        (tmp_path / "config.json").write_text(json.dumps(config | claim))
        with pytest.raises(CheckpointError, match=words):
            build(tmp_path)


def test_a_softmax_layer_is_not_untrained(tmp_path: Path) -> None:
    model = tiny_model(HYBRID, torch.float32)
    for name in ("a.pt", "a.safetensors"):
        model.register_to_config(untrained_layers=[1])
        save_generator(model, tmp_path / name)
        with pytest.raises(CheckpointError, match="untrained_layers names layer 1"):
            build(tmp_path / name)
        model.register_to_config(untrained_layers=[2])
        save_generator(model, tmp_path / name)
        assert build(tmp_path / name).config.untrained_layers == [2]


def test_an_untrained_adapter_of_a_softmax_layer_may_be_noted(tmp_path: Path) -> None:
    model = tiny_model(HybridSettings((0,), 3, 6.0, FFNLoRA.ALL), torch.float32)
    model.register_to_config(untrained_layers=[1])
    save_generator(model, tmp_path / "a.pt")
    assert build(tmp_path / "a.pt").config.untrained_layers == [1]


def test_merged_adapters_of_a_softmax_model_are_not_claimed(tmp_path: Path) -> None:
    model = tiny_model(HybridSettings((), 3, 6.0, FFNLoRA.ALL), torch.float32)
    merged = model.merge_ffn_lora()
    save_generator(model, tmp_path / "a.pt")
    assert build(tmp_path / "a.pt").hybrid.lora_rank is None
    model.unmerge_ffn_lora(merged)
    assert model.hybrid == HybridSettings((), 3, 6.0, FFNLoRA.ALL)


@pytest.mark.parametrize("name", ["lora_alpha", RECORD])
def test_a_header_that_says_a_thing_twice(name: str, tmp_path: Path) -> None:
    save_generator(tiny_model(HYBRID, torch.float32), file := tmp_path / "a.safetensors")
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size].decode().rstrip()
    twice = f'"{name}":"6.0","{name}":"7.0",'
    header = text.replace('"__metadata__":{', '"__metadata__":{' + twice, 1).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(CheckpointError, match=f"'{name}' is given twice"):
        build(file)


def test_a_record_of_alpha_alone(tmp_path: Path) -> None:
    state = {"a.b": torch.ones(2)}
    save_file(state, file := tmp_path / "a.safetensors", {RECORD: json.dumps({"lora_alpha": 6.0})})
    with pytest.raises(CheckpointError, match="holds lora_alpha alone"):
        read_record(file, {})
    with pytest.raises(CheckpointError, match="holds lora_alpha alone"):
        read_record(Path("a.pt"), {RECORD: {"lora_alpha": 6.0}})
    save_file(state, file, {"lora_alpha": "6.0"})
    assert read_record(file, {}) == {"lora_alpha": 6.0}
