"""Choosing layers: sets from scores, one hybrid layer at a time, and the script with all its methods."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import HEIGHT, HYBRID, TINY, WIDTH, tiny_model
from torch import Tensor

from arl2.layer_selection.scores import (
    Selection,
    only_hybrid_in,
    random_scores,
    read_scores,
    read_stage1_errors,
    replacement_scores,
)
from arl2.model import HybridSettings
from arl2.rollout import FewStepSampler
from pipelines.generation.random_model import random_pipeline
from wan.utils.errors import InputError
from wan.vae.wan_vae import TOY_VAE

select_layers = import_module("select_layers")
SAMPLER = FewStepSampler.from_steps([1000, 500], 5.0)


def noise(block: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * block + step)
    return torch.randn(2, 3, TINY["in_dim"], HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("layers", "sizes"), [(30, [8, 15, 22]), (8, [2, 4, 6]), (40, [10, 20, 30])])
def test_sets_are_the_lowest_scores(layers: int, sizes: list[int]) -> None:
    selection = Selection("m", {layer: -float(layer) for layer in range(layers)})
    sets = [selection.layers(share) for share in (25, 50, 75)]
    assert [len(chosen) for chosen in sets] == sizes
    assert sets[0] == list(range(layers - sizes[0], layers))


def test_equal_and_failed_scores() -> None:
    assert Selection("m", {0: math.nan, 1: 1.0, 2: 1.0, 3: math.inf}).layers(50) == [1, 2]
    assert Selection("m", {0: math.nan, 1: 1.0, 2: 1.0, 3: 0.0}).layers(75) == [1, 2, 3]
    assert Selection("m", {3: 1.0, 1: 1.0, 2: 1.0, 0: 2.0}).layers(25) == [1]


def test_the_file_says_what_was_chosen(tmp_path: Path) -> None:
    Selection("m", {3: 0.5, 0: 4.0, 1: 3.0, 2: 2.0}).write(tmp_path / "layers.yaml")
    assert yaml.safe_load((tmp_path / "layers.yaml").read_text()) == {
        "method": "m",
        "scores": {0: 4.0, 1: 3.0, 2: 2.0, 3: 0.5},
        "25": [3],
        "50": [2, 3],
        "75": [1, 2, 3],
    }


def test_the_other_layers_are_the_teachers_with_their_adapters_off() -> None:
    model = tiny_model(HYBRID)
    switches = lambda: [module.enabled for module in (*model.hybrid_attentions().values(), *model.adapters())]  # noqa: E731
    assert len(switches()) == 2 + 4
    with only_hybrid_in(model, {2}):
        assert switches() == [False, True, False, False, True, True]
    assert all(switches())


def test_scores_of_replacement_see_one_layer_each() -> None:
    model, words = tiny_model(HybridSettings((0, 1, 2))), torch.randn(2, 4, TINY["text_dim"], dtype=torch.float64)
    # Layer 1 remembers perfectly: it is its own teacher.
    attention = model.hybrid_attentions()
    attention[1].enabled = False
    scores = replacement_scores(model, SAMPLER, words, noise, 3)
    assert scores[1] == [0.0, 0.0] and all(len(scores[layer]) == 2 and min(scores[layer]) > 0 for layer in (0, 2))
    torch.nn.init.zeros_(attention[0].o.weight)  # what layer 0 remembers no longer matters
    assert max(replacement_scores(model, SAMPLER, words, noise, 3)[0]) < 1e-25


def test_scores_from_files(tmp_path: Path) -> None:
    page, reports = tmp_path / "scores.json", tmp_path / "run" / "reports"
    page.write_text('{"0": 0.5, "1": 2}')
    assert read_scores(page, 2) == {0: 0.5, 1: 2.0}
    with pytest.raises(InputError, match="lacks layers 2"):
        read_scores(page, 3)
    with pytest.raises(InputError, match="names layers 1"):
        read_scores(page, 1)
    for text, message in (
        ("[1]", "not an object"),
        ('{"0": "x", "1": 0}', "no numbers"),
        ('{"0": true, "1": 0}', "no numbers"),
        ('{"0": 1' + "0" * 400 + ', "1": 0}', "no numbers"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ):
        page.write_text(text)
        with pytest.raises(InputError, match=message):
            read_scores(page, 2)
    with pytest.raises(InputError, match="cannot read"):
        read_scores(tmp_path / "none.json", 2)
    reports.mkdir(parents=True)
    with pytest.raises(InputError, match="no reports"):
        read_stage1_errors(tmp_path / "run", 2)
    for step, error in ((10, 0.3), (20, 0.1)):
        layers = {"relative_error": {"0": error, "1": 2 * error}}
        (reports / f"step-{step:08d}.json").write_text(json.dumps({"step": step, "layers": layers}))
    assert read_stage1_errors(tmp_path / "run", 2) == {0: 0.1, 1: 0.2}
    page.write_text('{"relative_error": {"0": 0.12, "1": 0.34}}')
    assert read_stage1_errors(page, 2) == {0: 0.12, 1: 0.34}
    page.write_text('{"step": 1}')
    with pytest.raises(InputError, match="relative_error"):
        read_stage1_errors(page, 2)


def test_random_scores_follow_the_seed() -> None:
    assert random_scores(30, 1) == random_scores(30, 1) != random_scores(30, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model, hybrid in all layers ("all") and in some ("some")."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers in (("all", range(8)), ("some", (0, 3))):
        pipeline = random_pipeline("toy", HybridSettings(tuple(layers)), vae_config=TOY_VAE | {"dim": 4})
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Path) -> Callable[..., int]:
    """Calls the script."""
    (tmp_path / "config.yaml").write_text(
        f"model_folder: {models / 'all'}\nheight: 32\nwidth: 48\nnum_output_frames: 6\ndenoising_steps: [1000]\n"
    )
    (tmp_path / "prompts.txt").write_text("a red shape\nblue\n")
    monkeypatch.chdir(tmp_path)

    def call(method: str, *flags: object) -> int:
        fixed = ["--config", "config.yaml", "--yaml", "layers.yaml", "--device", "cpu", "--method", method]
        monkeypatch.setattr(sys, "argv", ["select_layers.py", *fixed, *map(str, flags)])
        return select_layers.main()

    return call


def test_replacement_is_kept_and_resumed(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Path
) -> None:
    flags = ("--checkpoint_path", models / "all" / "transformer", "--data_path", "prompts.txt", "--json", "scores.json")
    real, batches = select_layers.replacement_scores, []

    def counted(*arguments: object) -> object:
        if batches:
            raise KeyboardInterrupt
        batches.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr(select_layers, "replacement_scores", counted)
    assert run("replacement", *flags, "--videos", 2) == 130
    assert len(json.loads((tmp_path / "scores.json").read_text())["videos"]) == 1
    monkeypatch.setattr(select_layers, "replacement_scores", real)
    assert run("replacement", *flags, "--videos", 2) == 0
    resumed = yaml.safe_load((tmp_path / "layers.yaml").read_text())
    videos = json.loads((tmp_path / "scores.json").read_text())["videos"]
    assert len(videos) == 2 and resumed["scores"][5] == pytest.approx(sum(row["5"] for row in videos.values()) / 2)
    (tmp_path / "scores.json").unlink()
    assert run("replacement", *flags, "--videos", 2, "--batch", 2) == 0
    whole = yaml.safe_load((tmp_path / "layers.yaml").read_text())
    assert whole["method"] == "replacement" and [len(whole[share]) for share in ("25", "50", "75")] == [2, 4, 6]
    assert min(whole["scores"].values()) > 0
    assert whole["scores"] == pytest.approx(resumed["scores"], rel=1e-3)


def test_kept_scores_are_those_of_the_same_weights_and_the_same_request(
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    models: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(models / "all", tmp_path / "copy")
    flags = ("--data_path", "prompts.txt", "--json", "scores.json", "--videos", 2, "--checkpoint_path")
    scores = {layer: [0.5, math.inf] if layer else [1.0, 2.0] for layer in range(8)}
    monkeypatch.setattr(select_layers, "replacement_scores", lambda *args: scores)
    assert run("replacement", *flags, models / "all" / "transformer", "--batch", 2) == 0
    assert yaml.safe_load((tmp_path / "layers.yaml").read_text())["scores"][0] == 1.5
    monkeypatch.setattr(select_layers, "replacement_scores", lambda *args: pytest.fail("they are there"))
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace(str(models / "all"), str(tmp_path / "copy")))
    assert run("replacement", *flags, tmp_path / "copy" / "transformer") == 0, "the same weights at another path"
    again = yaml.safe_load((tmp_path / "layers.yaml").read_text())
    assert again["scores"][0] == 1.5 and again["scores"][3] == math.inf, "which JSON cannot say"
    before = (tmp_path / "scores.json").read_bytes()
    for folder, name in (("text_encoder", "text_encoder"), ("transformer", "weights")):
        file = next((tmp_path / "copy" / folder).glob("*.safetensors"))
        content = file.read_bytes()
        save_file({key: value * 1.5 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
        assert run("replacement", *flags, tmp_path / "copy" / "transformer") == 2
        assert f"({name} was" in " ".join(capsys.readouterr().err.split())
        file.write_bytes(content)
    assert run("replacement", *flags, tmp_path / "copy" / "transformer", "--seed", 1) == 2
    assert "seed was 0, is 1" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "scores.json").read_bytes() == before


def test_other_methods(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps({str(layer): 8 - layer for layer in range(8)}))
    (tmp_path / "report.json").write_text(json.dumps({"relative_error": {str(layer): layer for layer in range(8)}}))
    for method, flags, expected in (
        ("vbench", ("--scores", "scores.json"), [6, 7]),
        ("stage1_error", ("--scores", "report.json"), [0, 1]),
        ("random", ("--seed", 3), Selection("random", random_scores(8, 3)).layers(25)),
    ):
        assert run(method, *flags) == 0
        page = yaml.safe_load((tmp_path / "layers.yaml").read_text())
        assert page["25"] == expected and page["method"] == method


def test_what_cannot_work_is_said(
    run: Callable[..., int], tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text('{"settings": {}, "videos": {}}')
    (tmp_path / "window.yaml").write_text((tmp_path / "config.yaml").read_text() + "memory: {kind: window}\n")
    weights = ("--checkpoint_path", models / "all" / "transformer")
    for method, flags, message in (
        ("vbench", (), "scripts/reproduce.py layers prints the commands"),
        ("stage1_error", (), "needs --scores"),
        ("replacement", (), "needs --checkpoint_path"),
        ("replacement", weights, "needs --data_path"),
        ("replacement", (*weights, "--data_path", "prompts.txt", "--videos", 0), "from 1 to 100000"),
        ("replacement", (*weights, "--data_path", "prompts.txt", "--json", "old.json"), "other settings"),
        ("replacement", (*weights, "--data_path", "prompts.txt", "--config", "window.yaml"), "memory.kind to full"),
        ("replacement", ("--checkpoint_path", "none", "--data_path", "prompts.txt"), "no checkpoint"),
        (
            "replacement",
            ("--checkpoint_path", models / "some" / "transformer", "--data_path", "prompts.txt"),
            "hybrid in 2 of 8 layers",
        ),
    ):
        assert run(method, *flags) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "layers.yaml").exists()
