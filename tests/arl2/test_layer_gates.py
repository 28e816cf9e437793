"""Layer gates: what a mixed layer computes, that a broken hybrid is not chosen, and the script that trains them."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from paths import ROOT
from tiny_models import HEIGHT, TINY, WIDTH, new_memory, tiny_model, tiny_video
from torch import Tensor
from training_world import CONFIG, build_world

import train_stage1
from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.objective import ForwardMode
from arl2.distillation.sampling import Batches, NoiseLevels
from arl2.distillation.stage2 import Context
from arl2.layer_selection.gates import GateSettings, LayerGates, mix_among
from arl2.layer_selection.scores import Selection, read_gates
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import FewStepSampler, predict_flow, remember_block
from wan.teacher_forcing import teacher_forced_flow
from wan.utils.errors import InputError

ALL = HybridSettings((0, 1, 2))


def fixed_noise(seed: int = 5, batch: int = 2) -> BatchNoise:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 3, 1, 3, TINY["in_dim"], HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return BatchNoise(
        torch.rand(batch, 3, 1, generator=generator), noise, tuple(range(seed * 10_000, seed * 10_000 + batch))
    )


def looped(model: HybridWanModel) -> Tensor:
    torch.manual_seed(2)
    video = tiny_video()
    memory, text, flows = new_memory(model, differentiable=True), model.embed_text(video.text), []
    for start in range(0, 9, 3):
        block = slice(start, start + 3)
        flows.append(predict_flow(model, video.noisy[:, block], video.timesteps[:, start, None], text, memory, start))
        remember_block(model, video.clean[:, block], text, memory, start)
    return torch.cat(flows, dim=1)


def parallel(model: HybridWanModel) -> Tensor:
    torch.manual_seed(2)
    video = tiny_video()
    return teacher_forced_flow(model, video.noisy, video.timesteps, video.text, 3, video.clean)


def test_a_mixed_layer_is_either_mixer_at_the_ends_and_both_paths_agree_between() -> None:
    model = tiny_model(ALL)
    hybrid = looped(model)
    with model.as_teacher():
        softmax = looped(model)
    mixed = mix_among(model)
    for mix, expected in ((1.0, hybrid), (0.0, softmax)):
        for layer in mixed.values():
            layer.mix_B11 = torch.full((2, 1, 1), mix)
        torch.testing.assert_close(looped(model), expected, rtol=1e-12, atol=1e-12)
    for layer in mixed.values():
        layer.mix_B11 = torch.tensor([0.3, 0.9]).reshape(2, 1, 1)
    torch.testing.assert_close(looped(model), parallel(model), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(looped(model), hybrid)
    with model.as_teacher():
        torch.testing.assert_close(looped(model), softmax, rtol=0, atol=0)


def test_switches_are_hard_and_follow_the_probabilities() -> None:
    objective = LayerGates(tiny_model(ALL), GateSettings(3, budget=0.25))
    assert objective.probabilities() == pytest.approx(dict.fromkeys(range(3), 0.25))
    objective._draw(fixed_noise(batch=2000))
    for layer in objective.model.hybrid_attentions().values():
        mix = layer.mix_B11.detach()  # type: ignore[union-attr]
        assert set(mix.unique().tolist()) == {0.0, 1.0} and mix.mean().item() == pytest.approx(0.25, abs=0.03)
    objective._draw(fixed_noise(batch=2))
    first = [layer.mix_B11.clone() for layer in objective._mixed.values()]
    objective._draw(fixed_noise(batch=2))
    assert all(torch.equal(a, layer.mix_B11) for a, layer in zip(first, objective._mixed.values(), strict=True))


def test_switches_follow_the_seed_and_not_the_noise_of_the_blocks() -> None:
    objective, noise = LayerGates(tiny_model(ALL), GateSettings(3)), fixed_noise(batch=64)

    def drawn(noise: BatchNoise) -> Tensor:
        objective._draw(noise)
        return torch.cat([layer.mix_B11.detach().flatten() for layer in objective._mixed.values()])

    expected = drawn(noise)
    assert torch.equal(drawn(replace(noise, noise_BNPFCHW=-noise.noise_BNPFCHW)), expected)
    assert not torch.equal(drawn(replace(noise, seeds=tuple(seed + 64 for seed in noise.seeds))), expected)
    assert torch.equal(drawn(replace(noise, seeds=noise.seeds[::-1])).view(3, -1), expected.view(3, -1).flip(1))
    with pytest.raises(ValueError, match="a seed per video"):
        objective._draw(replace(noise, seeds=()))


def test_a_step_of_training_has_a_seed_per_video() -> None:
    class Data:
        def __len__(self) -> int:
            return 4

        def gather(self, indices: list[int]) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(indices), 6, 4, 2, 2), torch.zeros(len(indices), 5, 12)

    batches = Batches(Data(), 7, 4, 3, NoiseLevels(), FewStepSampler.from_steps([1000, 500], 5.0), 5.0)  # type: ignore[arg-type]
    whole = batches(3, range(4))[1].seeds
    assert len(set(whole)) == 4 and whole == batches(3, [0, 1])[1].seeds + batches(3, [2, 3])[1].seeds
    assert not set(whole) & set(batches(4, range(4))[1].seeds)


@pytest.mark.parametrize("mode", ForwardMode)
@pytest.mark.parametrize("broken", [0, 2])
def test_a_layer_whose_hybrid_is_broken_is_not_chosen(mode: ForwardMode, broken: int) -> None:
    model, video = tiny_model(ALL, torch.float32), tiny_video(dtype=torch.float32)
    model.requires_grad_(False)
    module = model.hybrid_attentions()[broken]
    module.phi_v.weight.mul_(30)
    module.gate_proj.weight.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = LayerGates(model, GateSettings(3, forward_mode=mode, budget=2 / 3))
    logits = objective.parameters_to_train()
    optimizer = torch.optim.Adam(logits.values(), lr=0.2)
    for step in range(15 if mode is ForwardMode.PARALLEL else 10):
        noise = fixed_noise(step)
        noise = replace(noise, noise_BNPFCHW=noise.noise_BNPFCHW.float())
        (loss,) = objective.losses(VideoBatch(video.clean, video.text), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = objective.probabilities()
    selection = Selection("gates", {layer: 1 - share for layer, share in shares.items()})
    assert shares[broken] == min(shares.values()) < 0.5 and broken not in selection.layers(75)
    assert sum(shares.values()) / 3 == pytest.approx(2 / 3, abs=0.15), "the budget holds"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert objective.reports(VideoBatch(video.clean, video.text), fixed_noise()) == {"hybrid_share": shares}


def test_what_gates_cannot_do_is_said() -> None:
    for settings, message in (
        ({"budget": 1.0}, "from 0.001 to 0.999"),
        ({"blocks_per_graph": 2}, "blocks_per_graph"),
        ({"context": Context.SELF_ROLLOUT}, "context data"),
    ):
        with pytest.raises(InputError, match=message):
            GateSettings(3, **settings)  # type: ignore[arg-type]


def test_the_script_trains_gates_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = build_world(tmp_path)
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(root / "stage1.yaml"), "steps=2"])
    assert train_stage1.main() == 0
    gates = CONFIG.format(root=root).replace("ema_decay: 0.5\n", "") + f"init_from: {root / 'run'}\n"
    (root / "gates.yaml").write_text(gates)
    (root / "inference.yaml").write_text(f"model_folder: {root / 'model'}\n")
    select = import_module("select_layers")

    def run(*flags: str) -> dict[str, object]:
        fixed = ["--config", str(root / "inference.yaml"), "--method", "gates", "--yaml", str(root / "layers.yaml")]
        monkeypatch.setattr(sys, "argv", ["select_layers.py", *fixed, *flags])
        assert select.main() == 0
        page = yaml.safe_load((root / "layers.yaml").read_text())
        assert isinstance(page, dict)
        return page

    training = ("--training", str(root / "gates.yaml"), "--set", f"run_folder={root / 'gates'}")
    page = run(*training)
    assert page["method"] == "gates" and page["scores"] == read_gates(root / "gates", 3)
    lines = (root / "gates" / "losses.jsonl").read_text()
    assert run(*training) == page and (root / "gates" / "losses.jsonl").read_text() == lines, "done is done"
    assert run("--scores", str(root / "gates")) == page
    assert not (root / "gates" / "export").exists()
    run_page = json.loads((root / "gates" / "run.json").read_text())
    assert run_page["stage"] == "GatesConfig" and (ROOT / "configs" / "gates.yaml").is_file()
