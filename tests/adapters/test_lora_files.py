"""LoRA files of every layout change weights by scale · B · A, and every other file is refused by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import ALPHA, LAYOUTS, NATIVE, PEFT, RANK, LoRALayout, named, new_pairs, peft_folder, products, theirs
from published import pickled, stored, wrapped
from tiny_models import HYBRID, TINY, tiny_model
from torch import Tensor

from arl2 import adapters
from arl2.adapters import base_parameters, base_tensors, fuse, read_loras
from arl2.checkpoint import build_hybrid, save_hybrid_weights
from arl2.model import HybridSettings, HybridWanModel
from wan.checkpoints.formats import TransformerWeights, read_transformer
from wan.checkpoints.lora import LoRASource, lora_of, read_lora
from wan.utils.errors import CheckpointError, InputError

CPU = torch.device("cpu")
Q = "blocks.0.self_attn.q"


@pytest.fixture
def model() -> HybridWanModel:
    return tiny_model(dtype=torch.float32)


def shapes_of(model: HybridWanModel) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in base_tensors(model.state_dict()).items()}


def values(model: HybridWanModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in base_parameters(model).items()}


def require_changed(model: HybridWanModel, before: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """All weights are what they were, but for some that are changed, to rounding."""
    for name, value in values(model).items():
        if name in changes:
            expected = (before[name].double() + changes[name]).to(value.dtype)
            tolerance = torch.finfo(value.dtype).eps
            torch.testing.assert_close(value, expected, rtol=2 * tolerance, atol=4 * tolerance)
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("weight", [1.0, -0.7])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_changes_weights_by_its_products(
    layout: LoRALayout, weight: float, model: HybridWanModel, tmp_path: Path
) -> None:
    pairs = new_pairs(shapes_of(model))
    before = values(model)
    source = LoRASource(layout.write(pairs, tmp_path), weight)
    fuse(base_parameters(model), read_loras(model.state_dict(), [source]))
    require_changed(model, before, products(pairs, weight * layout.scale))


def test_whole_changes_of_weights_biases_norms_and_modulations(model: HybridWanModel, tmp_path: Path) -> None:
    before, pairs = values(model), new_pairs(shapes_of(model), blocks=(1,))
    whole = {
        "blocks.1.self_attn.q.diff_b": f"blocks.1.{'self_attn.q.bias'}",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.diff_m": "head.modulation",
        "head.head.diff": "head.head.weight",
        "head.head.diff_b": "head.head.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_embedding.0.diff_b": "time_embedding.0.bias",
    }
    changes = {entry: torch.randn_like(before[name]) for entry, name in whole.items()}
    entries = named(pairs, NATIVE) | {f"diffusion_model.{entry}": value for entry, value in changes.items()}
    file = stored(entries, tmp_path / "a.safetensors")
    fuse(base_parameters(model), read_loras(model.state_dict(), [LoRASource(file, 0.5)]))
    expected = {whole[entry]: 0.5 * value.double() for entry, value in changes.items()}
    require_changed(model, before, products(pairs, 0.5) | expected)


def test_biases_after_the_product_have_its_scale(model: HybridWanModel, tmp_path: Path) -> None:
    before, pairs = values(model), new_pairs(shapes_of(model), blocks=(1,))
    bias = torch.randn(TINY["dim"])
    entries = named(pairs, PEFT) | {"base_model.model.blocks.1.self_attn.q.lora_B.bias": bias}
    folder = peft_folder(entries, tmp_path, lora_bias=True)
    fuse(base_parameters(model), read_loras(model.state_dict(), [LoRASource(folder)]))
    scale = ALPHA / RANK
    require_changed(model, before, products(pairs, scale) | {"blocks.1.self_attn.q.bias": scale * bias.double()})


def test_convolutions_are_adapted_as_matrices(model: HybridWanModel) -> None:
    before, shape = values(model), model.patch_embedding.weight.shape
    down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, 1, 1, 1)
    state = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    fuse(base_parameters(model), [(lora_of(state, shapes_of(model), "x"), 1.0)])
    product = (up.flatten(1).double() @ down.flatten(1).double()).view(shape)
    require_changed(model, before, {"patch_embedding.weight": product})


def test_patterns_of_peft_are_those_of_single_layers(model: HybridWanModel, tmp_path: Path) -> None:
    before, pairs = values(model), dict(new_pairs(shapes_of(model), blocks=(0, 1)))
    wide = new_pairs(shapes_of(model), blocks=(0, 1), rank=4)
    for name in ("blocks.0.ffn.0", "blocks.1.ffn.0"):
        pairs[name] = wide[name]
    settings = {"rank_pattern": {"ffn.0": 4}, "alpha_pattern": {"model.blocks.1.ffn.0": 7.0, "^blocks.0.ffn.2": 9.0}}
    folder = peft_folder(named(pairs, PEFT), tmp_path, **settings)
    fuse(base_parameters(model), read_loras(model.state_dict(), [LoRASource(folder)]))
    changes = products(pairs, ALPHA / RANK)
    for name, scale in {"blocks.0.ffn.0": ALPHA / 4, "blocks.1.ffn.0": 7 / 4, "blocks.0.ffn.2": 9 / RANK}.items():
        changes |= products({name: pairs[name]}, scale)
    require_changed(model, before, changes)


def test_several_loras_add_up_with_one_rounding(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before, first, second = values(model), new_pairs(shapes_of(model)), new_pairs(shapes_of(model), blocks=(0, 1))
    files = [stored(named(pairs, NATIVE), tmp_path / f"{n}.safetensors") for n, pairs in enumerate((first, second))]
    fuse(
        base_parameters(model), read_loras(model.state_dict(), [LoRASource(files[0], 2.0), LoRASource(files[1], -0.5)])
    )
    for name, value in values(model).items():
        change = products(first, 2.0).get(name, 0) + products(second, -0.5).get(name, torch.zeros(()))
        exact = before[name].double() + change
        # Rounded once: no further from the exact sum than its nearest neighbours, but for float32 sums before.
        nearest = (exact.to(torch.bfloat16).double() - exact).abs()
        assert bool(((value.double() - exact).abs() <= nearest + 1e-5 * exact.abs().clamp_min(1)).all()), name


def test_products_are_in_float32_whatever_is_allowed_elsewhere(
    model: HybridWanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, seen = adapters._changed, list[str]()

    def changed(*arguments: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return genuine(*arguments)

    monkeypatch.setattr(adapters, "_changed", changed)
    file = stored(named(new_pairs(shapes_of(model)), NATIVE), tmp_path / "a.safetensors")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        fuse(base_parameters(model), read_loras(model.state_dict(), [LoRASource(file)]))
        assert torch.get_float32_matmul_precision() == "medium" and set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_loras_of_every_floating_type(dtype: torch.dtype, model: HybridWanModel, tmp_path: Path) -> None:
    pairs = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in new_pairs(shapes_of(model)).items()}
    before = values(model)
    file = stored(named(pairs, NATIVE), tmp_path / "a.safetensors")
    fuse(base_parameters(model), read_loras(model.state_dict(), [LoRASource(file)]))
    require_changed(model, before, products(pairs, 1.0))


Change = Callable[[dict[str, Tensor]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "half a pair, A": (lambda s: s.pop(f"diffusion_model.{Q}.lora_B.weight"), f"{Q} has lora_A without lora_B"),
    "half a pair, B": (lambda s: s.pop(f"diffusion_model.{Q}.lora_A.weight"), f"{Q} has lora_B without lora_A"),
    "a layer too many": (
        lambda s: s.update({"diffusion_model.blocks.7.ffn.0.diff": torch.ones(2)}),
        "adapts blocks.7.ffn.0, which this model does not have",
    ),
    "a parameter too many": (
        lambda s: s.update({"diffusion_model.blocks.0.norm3.diff_m": torch.ones(2)}),
        "blocks.0.norm3.modulation, which this model does not have",
    ),
    "a wrong width": (
        lambda s: s.update({f"diffusion_model.{Q}.lora_A.weight": torch.ones(RANK, 7)}),
        rf"{Q}.weight is of \(24, 7\), the model has \(24, 24\)",
    ),
    "two ranks in a pair": (
        lambda s: s.update({f"diffusion_model.{Q}.lora_A.weight": torch.ones(RANK + 1, 24)}),
        rf"the adapter of {Q} is of \(4, 24\) and \(24, 3\)",
    ),
    "a vector": (
        lambda s: s.update({f"diffusion_model.{Q}.lora_A.weight": torch.ones(24)}),
        r"the adapter of .* must be \[rank, in\]",
    ),
    "a whole change of another shape": (
        lambda s: s.update({f"diffusion_model.{Q}.diff_b": torch.ones(3)}),
        rf"{Q}.bias is of \(3,\), the model has \(24,\)",
    ),
    "NaN": (lambda s: s[f"diffusion_model.{Q}.lora_A.weight"].fill_(float("nan")), f"{Q}.lora_A.weight has 72 of 72"),
    "an infinite alpha": (
        lambda s: s.update({f"diffusion_model.{Q}.alpha": torch.tensor(float("inf"))}),
        f"{Q}.alpha has 1 of 1 values NaN or infinite",
    ),
    "several alphas": (
        lambda s: s.update({f"diffusion_model.{Q}.alpha": torch.ones(2)}),
        f"alpha of {Q} has the shape",
    ),
    "a huge alpha": (
        lambda s: s.update({f"diffusion_model.{Q}.alpha": torch.tensor(1e30)}),
        rf"alpha of {Q} is 1e\+30, it must be a number of at most",
    ),
    "alpha of 0": (
        lambda s: s.update({f"diffusion_model.{Q}.alpha": torch.zeros(1)}),
        f"alpha of {Q} is 0, which says nothing",
    ),
    "a switch as alpha": (
        lambda s: s.update({f"diffusion_model.{Q}.alpha": torch.tensor(True)}),
        rf"{Q}.alpha is bool, not a number",
    ),
    "alpha alone": (
        lambda s: s.update({"diffusion_model.blocks.1.ffn.0.alpha": torch.ones(1)}),
        "blocks.1.ffn.0 has alpha without lora_A",
    ),
    "integers": (
        lambda s: s.update({f"diffusion_model.{Q}.lora_A.weight": torch.ones(RANK, 24, dtype=torch.int8)}),
        "is int8, not a dense tensor of floats",
    ),
    "twice": (
        lambda s: s.update({f"{Q}.lora_A.weight": torch.ones(RANK, 24)}),
        f"{Q} has several entries for down",
    ),
    "two adapters": (
        lambda s: s.update({f"blocks.1.ffn.{n}.lora_A.{n}.weight": torch.ones(RANK, 24) for n in (0, 2)}),
        "several adapters, 0, 2",
    ),
    "DoRA": (
        lambda s: s.update({f"diffusion_model.{Q}.dora_scale": torch.ones(24)}),
        rf"{Q}.dora_scale belongs to DoRA",
    ),
    "DoRA of peft": (
        lambda s: s.update({f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.ones(24)}),
        "belongs to DoRA",
    ),
    "LoKr": (lambda s: s.update({f"lora_unet_{Q.replace('.', '_')}.lokr_w1": torch.ones(2, 2)}), "belongs to LoKr"),
    "LoHa": (lambda s: s.update({f"{Q}.hada_w1_a": torch.ones(2, 2)}), "belongs to LoHa"),
    "a text encoder": (
        lambda s: s.update({"lora_te_text_model_q.lora_down.weight": torch.ones(2, 2)}),
        "a LoRA of the text encoder",
    ),
    "an image branch": (
        lambda s: s.update({"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(2, 24)}),
        r"adapts an image branch \(blocks.0.cross_attn.k_img\)",
    ),
    "an image branch of kohya": (
        lambda s: s.update({"lora_unet_blocks_0_cross_attn_v_img.lora_down.weight": torch.ones(2, 24)}),
        "adapts an image branch",
    ),
    "an unknown entry": (
        lambda s: s.update({f"{Q}.set_weight": torch.ones(24)}),
        f"{Q}.set_weight is no entry of a LoRA",
    ),
    "a base layer": (
        lambda s: s.update({f"base_model.model.{Q}.base_layer.weight": torch.ones(24, 24)}),
        "base_layer.weight is no entry of a LoRA",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_entry_that_does_not_fit_is_refused_by_name(name: str, model: HybridWanModel, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    state = named(new_pairs(shapes_of(model)), NATIVE)
    change(state)
    file = stored(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        read_lora(file, shapes_of(model))
    assert str(error.value).isprintable() and str(file) in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("use_dora", True), ("bias", "all"), ("peft_type", "LOHA"), ("fan_in_fan_out", True)),
        *(("modules_to_save", ["head"]), ("layer_replication", [[0, 2]]), ("use_rslora", "yes")),
        *(("r", 0), ("r", None), ("r", 4), ("lora_alpha", None), ("lora_alpha", "5"), ("lora_alpha", 1e400)),
        *(("rank_pattern", {"q": 0}), ("rank_pattern", {"q": 5}), ("rank_pattern", 3)),
        *(("alpha_pattern", {"(a+)+$": 1.0}), ("alpha_pattern", {"q": True}), ("alpha_pattern", {"q": 0})),
        *(("lora_alpha", 0), ("init_lora_weights", "pissa_niter_16"), ("use_new_kind_of_lora", True)),
    ],
)
def test_settings_of_peft_are_honoured_or_refused_by_name(
    setting: str, value: Any, model: HybridWanModel, tmp_path: Path
) -> None:
    folder = peft_folder(named(new_pairs(shapes_of(model)), PEFT), tmp_path, **{setting: value})
    expected = f"adapter_config.json says {value if setting == 'r' else 5}" if value in (4, {"q": 5}) else setting
    with pytest.raises(CheckpointError, match=rf"{expected}\b"):
        read_lora(folder, shapes_of(model))


def test_files_that_are_no_lora_say_what_they_are_and_where_they_belong(model: HybridWanModel, tmp_path: Path) -> None:
    state, shapes = model.state_dict(), shapes_of(model)
    whole = "holds a whole model, not a LoRA: give it as --checkpoint_path"
    save_hybrid_weights(tiny_model(HYBRID, torch.float32), tmp_path / "hybrid.safetensors")
    (tmp_path / "none").mkdir()
    model.save_pretrained(tmp_path / "model")
    files = {
        pickled({"generator": wrapped(state)}, tmp_path / "a.pt"): whole,
        pickled({"generator_ema": wrapped(state), "generator": wrapped(state)}, tmp_path / "b.pt"): whole,
        stored(wrapped(state, "diffusion_model.{}"), tmp_path / "c.safetensors"): whole,
        tmp_path / "hybrid.safetensors": "hybrid weights alone, not a LoRA: give it as --checkpoint_path",
        stored({"encoder.conv1.weight": torch.ones(1)}, tmp_path / "d.safetensors"): "holds a VAE, not a LoRA",
        stored({"x": torch.ones(1)}, tmp_path / "e.safetensors"): "unknown weights",
        pickled({"generator_lora": 3}, tmp_path / "f.pt"): "'generator_lora' is no dictionary",
        pickled({"critic_lora": named(new_pairs(shapes), PEFT)}, tmp_path / "g.pt"): "'critic_lora' is a dict",
        tmp_path / "missing.safetensors": "no LoRA at",
        tmp_path / "none": "has no adapter_model.safetensors nor",
        tmp_path / "model": whole,
    }
    for file, words in files.items():
        with pytest.raises(CheckpointError, match=words):
            read_lora(file, shapes)
    file = stored(named(new_pairs(shapes), NATIVE), tmp_path / "lora.safetensors")
    folder = peft_folder(named(new_pairs(shapes), PEFT), tmp_path / "folder")
    file_of_training = pickled({"generator_lora": named(new_pairs(shapes), PEFT)}, tmp_path / "lora.pt")
    for lora in (file, folder, folder / "adapter_model.safetensors", file_of_training):
        with pytest.raises(CheckpointError, match="holds a LoRA: give it as --lora"):
            read_transformer(lora)


@pytest.mark.parametrize("spelling", ["native", "diffusers", "kohya", "kohya of diffusers"])
def test_every_module_is_found_by_each_way_of_writing_it(spelling: str, model: HybridWanModel) -> None:
    before = values(model)
    changes = {name: torch.ones_like(value) for name, value in before.items() if not name.endswith("modulation")}

    def written(name: str) -> str:
        module, _, kind = name.rpartition(".")
        module = theirs(module) if "diffusers" in spelling else module
        entry = f"lora_unet_{module.replace('.', '_')}" if "kohya" in spelling else f"transformer.{module}"
        return f"{entry}.{'diff' if kind == 'weight' else 'diff_b'}"

    state = {written(name): value for name, value in changes.items()}
    assert len(state) == len(changes)
    fuse(base_parameters(model), [(lora_of(state, shapes_of(model), "x"), 1.0)])
    require_changed(model, before, {name: value.double() for name, value in changes.items()})


@pytest.mark.parametrize("scale", ["0", "nan", "inf", "-1e3"])
def test_a_scale_out_of_range_is_refused(scale: str) -> None:
    with pytest.raises(InputError, match=r"the scale .* of a\.safetensors is out of range"):
        LoRASource.from_text(f"a.safetensors:{scale}")


def test_a_scale_stands_after_the_last_colon() -> None:
    assert LoRASource.from_text("a/b.pt:0.5") == LoRASource(Path("a/b.pt"), 0.5)
    assert LoRASource.from_text("a:b.pt:-1") == LoRASource(Path("a:b.pt"), -1.0)
    assert LoRASource.from_text("a:b.pt") == LoRASource(Path("a:b.pt"))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files_of_a_model_stay_as_they_are(ending: str, model: HybridWanModel, tmp_path: Path) -> None:
    pairs, before, state = new_pairs(shapes_of(model)), values(model), model.state_dict()
    lora = LoRASource(stored(named(pairs, NATIVE), tmp_path / "lora.safetensors"), 0.5)
    file = pickled(state, tmp_path / "a.pt") if ending == "pt" else stored(state, tmp_path / "a.safetensors")
    content, weights = file.read_bytes(), read_transformer(file)
    loras = read_loras(weights.state, [lora])
    built, _ = build_hybrid(weights, dict(TINY), HybridSettings(), dtype=torch.float32, device=CPU)
    fuse(base_parameters(built), loras)
    require_changed(built, before, products(pairs, 0.5))
    assert file.read_bytes() == content, "weights may be mapped from the file"


def test_a_sum_beyond_the_range_of_its_type_is_refused(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float16)
    pairs = {name: (1e3 * a, 1e3 * b) for name, (a, b) in new_pairs(shapes_of(model)).items()}
    file = stored(named(pairs, NATIVE), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="leaves the range of float16: give a smaller scale"):
        fuse(base_parameters(model), read_loras(model.state_dict(), [LoRASource(file)]))


def test_before_or_after_conversion_to_hybrid_layers_is_the_same(model: HybridWanModel, tmp_path: Path) -> None:
    file = LoRASource(stored(named(new_pairs(shapes_of(model)), NATIVE), tmp_path / "a.safetensors"))
    wanted = HybridSettings((0, 2), 3)

    def converted() -> HybridWanModel:
        weights = TransformerWeights({name: value.clone() for name, value in model.state_dict().items()}, "x")
        return build_hybrid(weights, dict(TINY), wanted, dtype=torch.float32, device=CPU)[0]

    after = converted()
    fuse(base_parameters(after), read_loras(model.state_dict(), [file]))
    fuse(base_parameters(model), read_loras(model.state_dict(), [file]))
    found, expected = after.state_dict(), converted().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_hybrid_layers_are_changed_in_what_softmax_layers_have_and_in_nothing_else(tmp_path: Path) -> None:
    model = tiny_model(HYBRID, torch.float32)
    assert base_parameters(model).keys() == tiny_model().state_dict().keys()
    new = {name: model.get_parameter(name).detach().clone() for name in model.hybrid_parameter_names()}
    before, pairs = values(model), new_pairs(shapes_of(model))
    file = stored(named(pairs, NATIVE), tmp_path / "a.safetensors")
    fuse(base_parameters(model), read_loras(model.state_dict(), [LoRASource(file)]))
    require_changed(model, before, products(pairs, 1.0))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in new.items())


def test_a_pattern_of_no_layer_is_refused(model: HybridWanModel, tmp_path: Path) -> None:
    pairs = named(new_pairs(shapes_of(model)), PEFT)
    for name in ("attn1.to_q", "^blocks.1.ffn.0$"):  # spelled otherwise than in the file, and not adapted
        folder = peft_folder(pairs, tmp_path, alpha_pattern={name: 1.0})
        with pytest.raises(CheckpointError, match=f"a pattern names {re.escape(name)}, which .* does not adapt"):
            read_lora(folder, shapes_of(model))


def test_a_lora_that_changes_nothing_is_warned_of(model: HybridWanModel, caplog: pytest.LogCaptureFixture) -> None:
    pairs = new_pairs(shapes_of(model))
    lora_of(named(pairs, NATIVE), shapes_of(model), "trained")
    assert not caplog.records
    lora_of(named({name: (a, 0 * b) for name, (a, b) in pairs.items()}, NATIVE), shapes_of(model), "untrained")
    assert "untrained changes nothing" in caplog.text
