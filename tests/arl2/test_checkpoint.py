"""Weights of every format, read strictly, converted only on request, and written back."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from tiny_models import HYBRID, TINY, new_memory, tiny_model

from arl2.checkpoint import build_hybrid, found_settings, read_generator, save_generator, save_hybrid_weights
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from wan.checkpoints.formats import (
    TransformerWeights,
    diffusers_name,
    native_name,
    read_transformer,
    transformer_config,
)
from wan.checkpoints.loading import StateDict
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import atomic_path

CPU = torch.device("cpu")
F32 = torch.float32


def build(weights: TransformerWeights, wanted: HybridSettings = HybridSettings()) -> HybridWanModel:
    return build_hybrid(weights, dict(TINY), wanted, dtype=F32, device=CPU)[0]


def same(a: StateDict, b: StateDict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def softmax() -> StateDict:
    return {name: value.clone() for name, value in tiny_model(dtype=F32).state_dict().items()}


@pytest.fixture
def hybrid() -> StateDict:
    return {name: value.clone() for name, value in tiny_model(HYBRID, F32).state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "model.{}",
        "model._fsdp_wrapped_module.{}",
        "_fsdp_wrapped_module.model.{}",
        "_orig_mod.model.{}",
        "module.{}",
    ],
)
def test_generators_behind_every_wrapper(wrap: str, hybrid: StateDict, tmp_path: Path) -> None:
    def checkpointed(name: str) -> str:
        return wrap.format(name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."))

    ema = {checkpointed(name): value + 1 for name, value in hybrid.items()}
    torch.save({"generator": {checkpointed(n): v for n, v in hybrid.items()}, "generator_ema": ema}, tmp_path / "a.pt")
    assert same(read_transformer(tmp_path / "a.pt").state, hybrid)
    assert same(read_transformer(tmp_path / "a.pt", use_ema=True).state, {n: v + 1 for n, v in hybrid.items()})


def test_native_folders_in_one_file_and_in_shards(softmax: StateDict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"_class_name": "WanModel", "dim": 24, "num_layers": 3, "model_type": "t2v"}'
    )
    save_file(softmax, tmp_path / "diffusion_pytorch_model.safetensors")
    weights = read_transformer(tmp_path)
    assert same(weights.state, softmax) and weights.causal is False
    assert weights.config["dim"] == 24 and weights.config["text_dim"] == 4096
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(softmax)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: softmax[name] for name in part}, tmp_path / file)
    entries = ",".join(f'"{name}": "{file}"' for file, part in shards.items() for name in part)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{{entries}}}}}')
    assert same(read_transformer(tmp_path).state, softmax)
    index.write_text('{"weight_map": {"x": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside"):
        read_transformer(tmp_path)


def test_diffusers_names_are_those_of_its_own_converter(softmax: StateDict) -> None:
    theirs = convert_wan_transformer_to_diffusers(dict(softmax))
    assert theirs.keys() == {diffusers_name(name) for name in softmax}
    assert {native_name(name) for name in theirs} == softmax.keys()


def test_a_diffusers_folder_computes_what_diffusers_computes(tmp_path: Path) -> None:
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=40,
        num_layers=2,
    ).eval()
    theirs.save_pretrained(tmp_path / "transformer")
    weights = read_transformer(tmp_path)
    model, _ = build_hybrid(weights, transformer_config(tmp_path), HybridSettings(), dtype=F32, device=CPU)
    latents, text = torch.randn(1, 3, 4, 4, 6), torch.randn(1, 512, 12)
    with torch.no_grad():
        # One block at one timestep is the plain bidirectional network.
        expected = theirs(latents.transpose(1, 2), torch.tensor([300.0]), text).sample.transpose(1, 2)
        views = new_memory(model, batch=1).read(18)
        flow = model(latents, torch.full((1, 3), 300.0), text, views, torch.arange(3)).flow
    torch.testing.assert_close(flow, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["pt", "safetensors", "folder"])
def test_what_is_written_is_read(ending: str, tmp_path: Path) -> None:
    model = tiny_model(HYBRID, F32)
    path = tmp_path / f"out.{ending}"
    model.save_pretrained(path) if ending == "folder" else save_generator(model, path)
    again = build(read_transformer(path), HybridSettings(lora_alpha=HYBRID.lora_alpha))
    assert again.hybrid == model.hybrid
    assert same(again.state_dict(), model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_settings_are_found_in_the_names(hybrid: StateDict, softmax: StateDict) -> None:
    assert found_settings(hybrid) == HybridSettings((0, 2), 3, ffn_lora=FFNLoRA.HYBRID)
    assert found_settings(softmax) == HybridSettings(ffn_lora=FFNLoRA.NONE)


def test_conversion_says_what_is_untrained_and_keeps_the_rest(
    softmax: StateDict, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = HybridSettings((1,), 2)
    model, report = build_hybrid(TransformerWeights(softmax, "x"), dict(TINY), wanted, dtype=F32, device=CPU)
    assert sorted(model.hybrid_parameter_names()) == report.untrained
    assert "UNTRAINED" in caplog.text and f"{len(report.untrained)} parameters" in caplog.text
    kept = {name.replace(".linear.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in softmax.items())


def test_what_a_conversion_writes_says_at_every_load_that_it_is_untrained(
    softmax: StateDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model(dtype=F32).save_pretrained(tmp_path / "softmax")
    weights = TransformerWeights(softmax, "x")
    model, _ = build_hybrid(weights, dict(TINY), HybridSettings((0, 2), 2), dtype=F32, device=CPU)
    (told,) = [record.getMessage() for record in caplog.records if "UNTRAINED" in record.getMessage()]
    model.save_pretrained(tmp_path / "folder")
    save_generator(model, tmp_path / "a.pt")
    save_generator(model, tmp_path / "a.safetensors")
    save_hybrid_weights(model, tmp_path / "hybrid.safetensors")

    def warnings(name: str, wanted: HybridSettings = HybridSettings(), **options: bool) -> list[str]:
        caplog.clear()
        weights = read_generator(tmp_path / "softmax", tmp_path / name)
        sizes = {} if name == "folder" else dict(TINY)
        again, report = build_hybrid(weights, sizes, wanted, dtype=F32, device=CPU, **options)
        assert not report.untrained
        again.save_pretrained(tmp_path / "again")
        return [record.getMessage() for record in caplog.records if "UNTRAINED" in record.getMessage()]

    for name in ("folder", "a.pt", "a.safetensors", "hybrid.safetensors", "again"):
        assert warnings(name) == [told], name
        assert not warnings(name, to_be_trained=True)
    caplog.clear()
    HybridWanModel.from_pretrained(tmp_path / "folder")
    assert told in caplog.text
    wanted = HybridSettings((2,), ffn_lora=FFNLoRA.NONE)
    model.merge_ffn_lora()
    model.save_pretrained(tmp_path / "folder")
    (fewer,) = warnings("folder", wanted)
    assert "of 1 hybrid layers are UNTRAINED" in fewer
    model.set_untrained_layers(())
    model.save_pretrained(tmp_path / "folder")
    assert not warnings("folder")
    for mark in ([7], [0, 0], 3):
        save_file(
            model.state_dict(),
            tmp_path / "b.safetensors",
            {"arl2": json.dumps(model.record() | {"untrained_layers": mark})},
        )
        with pytest.raises(CheckpointError, match="untrained_layers"):
            warnings("b.safetensors")


def test_new_parameters_depend_on_the_seed_and_not_on_the_other_layers(softmax: StateDict) -> None:
    def new(layers: tuple[int, ...], seed: int) -> torch.Tensor:
        weights = TransformerWeights(softmax, "x")
        model, _ = build_hybrid(weights, dict(TINY), HybridSettings(layers), dtype=F32, device=CPU, seed=seed)
        return model.state_dict()["blocks.1.self_attn.a_proj.weight"]

    assert torch.equal(new((1,), 0), new((0, 1, 2), 0))
    assert not torch.equal(new((1,), 0), new((1,), 1))


def test_stage_one_weights_serve_fewer_layers() -> None:
    trained = tiny_model(HybridSettings((0, 1, 2)), F32).state_dict()
    model, report = build_hybrid(
        TransformerWeights(trained, "x"), dict(TINY), HybridSettings((1,)), dtype=F32, device=CPU
    )
    assert list(model.hybrid_attentions()) == [1] and not report.untrained
    assert {name.split(".")[1] for name in report.dropped} == {"0", "2"}
    assert torch.equal(model.state_dict()["blocks.1.self_attn.A_log"], trained["blocks.1.self_attn.A_log"])


def test_gates_keep_their_float32_values_in_bfloat16(hybrid: StateDict) -> None:
    model, _ = build_hybrid(
        TransformerWeights(hybrid, "x"), dict(TINY), HybridSettings(), dtype=torch.bfloat16, device=CPU
    )
    gate = model.state_dict()["blocks.0.self_attn.A_log"]
    assert torch.equal(gate, hybrid["blocks.0.self_attn.A_log"]) and model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.2.bias"), "missing blocks.1.ffn.2.bias"),
        (lambda s: s.update({"blocks.1.extra": torch.zeros(1)}), "unexpected blocks.1.extra"),
        (lambda s: s.update({"head.head.bias": torch.zeros(3)}), "head.head.bias is (3,), the model has (16,)"),
        (lambda s: s.pop("blocks.0.self_attn.A_log"), "lacks blocks.0.self_attn.A_log"),
        (lambda s: s.update({"blocks.1.k_img.weight": torch.zeros(1)}), "image branch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: object, message: str, hybrid: StateDict, tmp_path: Path) -> None:
    change(hybrid)
    torch.save({"generator": hybrid}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as error:
        build(read_transformer(tmp_path / "a.pt"), HybridSettings((0, 2), 3))
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (HybridSettings((0, 1, 2)), "not in [1]"),
        (HybridSettings((0, 2), 8), "rank 3"),
        (HybridSettings((0,)), "cannot be dropped"),
    ],
)
def test_wishes_that_contradict_the_weights_are_refused(
    wanted: HybridSettings, message: str, hybrid: StateDict
) -> None:
    with pytest.raises(InputError, match=message.replace("[", r"\[").replace("]", r"\]")):
        build(TransformerWeights(hybrid, "x"), wanted)


def test_the_scale_of_stored_adapters_is_not_overruled_in_silence(tmp_path: Path) -> None:
    model = tiny_model(HYBRID, F32)
    model.save_pretrained(tmp_path)
    weights = read_transformer(tmp_path)
    assert build(weights).hybrid.lora_alpha == HYBRID.lora_alpha
    with pytest.raises(InputError, match=r"alpha 6.0, lora_alpha says 5.0"):
        build(weights, HybridSettings(lora_alpha=5.0))


def test_other_families_and_code_are_refused(softmax: StateDict, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, message in (
        ({"token_embedding.weight": torch.zeros(1)}, "a text encoder"),
        ({"encoder.conv1.weight": torch.zeros(1)}, "a VAE"),
        ({"generator": 3}, "int"),
        ({"a": torch.zeros(1), "step": 5}, "'step' is a int"),
        ([1, 2], "list"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            read_transformer(path)

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("code ran",))

    torch.save({"generator": Code()}, path)
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_transformer(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_transformer(tmp_path / "none.pt")
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        read_transformer(path)


def test_atomic_path_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not list(path.parent.iterdir())
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole" and len(list(path.parent.iterdir())) == 1


def test_hybrid_weights_alone_go_on_their_base(softmax: StateDict, hybrid: StateDict, tmp_path: Path) -> None:
    base = HybridWanModel(**TINY)
    base.load_state_dict(softmax)
    base.save_pretrained(tmp_path / "base")
    whole = build(TransformerWeights(hybrid, "x"), HYBRID)
    save_hybrid_weights(whole, tmp_path / "h.safetensors")
    weights = read_generator(tmp_path / "base", tmp_path / "h.safetensors")
    model, report = build_hybrid(weights, dict(TINY), HybridSettings(), dtype=F32, device=CPU)
    assert report.settings == HYBRID and not report.untrained
    for name, value in model.state_dict().items():
        plain = name.replace(".linear.", ".")
        expected = softmax[plain] if plain in softmax else hybrid[name]
        assert torch.equal(value, expected), name
    assert same(read_generator(tmp_path / "base", None).state, softmax)
    save_generator(whole, tmp_path / "whole.safetensors")
    assert same(read_generator(tmp_path / "base", tmp_path / "whole.safetensors").state, hybrid)


def test_hybrid_weights_alone_in_half_precision_keep_their_gates(tmp_path: Path) -> None:
    model = tiny_model(HYBRID, F32)
    save_hybrid_weights(model, tmp_path / "h.safetensors", torch.float16)
    state = load_file(tmp_path / "h.safetensors")
    assert state.keys() == set(model.hybrid_parameter_names())
    assert {value.dtype for name, value in state.items() if name.endswith(("A_log", "dt_bias"))} == {F32}
    assert {value.dtype for name, value in state.items() if not name.endswith(("A_log", "dt_bias"))} == {torch.float16}


def test_hybrid_weights_that_cannot_go_on_a_base(tmp_path: Path) -> None:
    model = tiny_model(HYBRID, F32)
    model.save_pretrained(tmp_path / "hybrid")
    save_hybrid_weights(model, tmp_path / "h.safetensors")
    with pytest.raises(CheckpointError, match="hybrid already"):
        read_generator(tmp_path / "hybrid", tmp_path / "h.safetensors")
    HybridWanModel(**(TINY | {"dim": 48})).save_pretrained(tmp_path / "wide")
    weights = read_generator(tmp_path / "wide", tmp_path / "h.safetensors")
    with pytest.raises(CheckpointError, match="shape"):
        build_hybrid(weights, TINY | {"dim": 48}, HybridSettings(), dtype=F32, device=CPU)
    (tmp_path / "h.safetensors").write_bytes((tmp_path / "h.safetensors").read_bytes()[:20])
    with pytest.raises(CheckpointError, match="damaged"):
        read_generator(tmp_path / "wide", tmp_path / "h.safetensors")


def test_hybrid_weights_alone_where_whole_ones_are_wanted(tmp_path: Path) -> None:
    save_hybrid_weights(tiny_model(HYBRID, F32), file := tmp_path / "h.safetensors")
    with pytest.raises(CheckpointError, match=r"holds hybrid weights alone.*softmax weights or whole ones"):
        read_transformer(file)
    tiny_model(dtype=F32).save_pretrained(tmp_path / "base")
    save_file(load_file(file) | {"blocks.0.self_attn.phi_z.weight": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"what is none \(blocks.0.self_attn.phi_z.weight\)"):
        read_generator(tmp_path / "base", file)
