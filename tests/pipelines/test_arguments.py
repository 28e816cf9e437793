"""Command lines: one style of flags in all entry points, former names, ranges, and what cannot be understood."""

import ast
import logging
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import ROOT

import inference
import train_stage1
import train_stage2
from arl2.model import FFNLoRA
from pipelines.config import InferenceConfig, MemoryKind, SinkKind
from pipelines.flags import Parser
from pipelines.generation.arguments import inference_parser
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.settings import load_config
from wan.utils.errors import InputError

CHUNKWISE = ROOT / "configs" / "causal_forcing_dmd_chunkwise.yaml"
TOY = ROOT / "configs" / "toyworld" / "inference.yaml"
PUBLISHED = (
    "--config_path configs/causal_forcing_dmd_chunkwise.yaml --output_folder output/chunkwise "
    "--checkpoint_path checkpoints/chunkwise/causal_forcing.pt --data_path prompts/test.txt "
    "--hybrid_layers 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21"
)
BASE = ["--config", str(CHUNKWISE), "--output_folder", "out", "--prompt", "x"]
SCRIPTS = [*(ROOT / "scripts").rglob("*.py"), *ROOT.glob("*.py")]


def read(*flags: str) -> InferenceConfig:
    """The config of a command line of inference.py."""
    arguments = inference_parser().parse_args([*BASE, *flags])
    return load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)


def test_the_published_command_line_works_unchanged() -> None:
    arguments = inference_parser().parse_args(PUBLISHED.split())
    assert arguments.output_folder == Path("output/chunkwise") and arguments.data_path == Path("prompts/test.txt")
    config = load_config(InferenceConfig, ROOT / arguments.config, arguments.settings, arguments.flags)
    assert config.hybrid.layers == list(range(22)) and config.hybrid.ffn_lora is FFNLoRA.HYBRID
    assert config.checkpoint_path == "checkpoints/chunkwise/causal_forcing.pt"


def test_every_memory_field_has_a_flag_and_a_setting() -> None:
    by_flags = read("--memory", "window", "--window_frames", "6", "--sink_frames", "0").memory
    by_settings = read("memory.kind=window", "memory.window_frames=6", "memory.sink_frames=0").memory
    assert by_flags == by_settings and by_flags.kind is MemoryKind.window and by_flags.window == (6, 0)
    others = read("--sink", "average", "--sink_decay", "0.5", "--recompute").memory
    assert others == read("memory.sink=average", "memory.sink_decay=0.5", "memory.recompute=true").memory
    assert (others.sink, others.sink_decay, others.recompute) == (SinkKind.average, 0.5, True)


def test_settings_may_stand_anywhere() -> None:
    config = read("--hybrid_layers", "0", "1", "fps=24", "--lora_rank", "4", "height=64", "--fp8", "width=96")
    assert (config.hybrid.layers, config.hybrid.lora_rank, config.fps) == ([0, 1], 4, 24)
    assert (config.height, config.width, config.speed.fp8) == (64, 96, True)
    arguments = inference_parser().parse_args(["fps=24", *BASE[:-1], "a=b"])
    assert arguments.prompt == "a=b" and arguments.settings == ["fps=24"]


def test_settings_may_stand_behind_a_double_dash() -> None:
    config = read("fps=24", "--", "height=64", "width=96")
    assert (config.fps, config.height, config.width) == (24, 64, 96)


@pytest.mark.parametrize("style", ["--cuda-graphs", "--cuda_graphs", "--no-cuda-graphs", "--no_cuda_graphs"])
def test_dashes_are_understood(style: str) -> None:
    assert read(style).speed.cuda_graphs is ("no" not in style)
    assert read("--tiny-vae", "a.pth", "--no-fast-vae", "--overlap-decoding").speed.tiny_vae == "a.pth"


def test_a_flag_without_being_given_leaves_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("speed: {fp8: true, fast_vae: false, tiny_vae: a.pth}\nnum_output_frames: 9\n")
    arguments = inference_parser().parse_args(["--config", str(tmp_path / "c.yaml"), *BASE[2:]])
    assert arguments.flags == {}
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    assert (config.speed.fp8, config.speed.fast_vae, config.speed.tiny_vae, config.num_output_frames) == (
        True,
        False,
        "a.pth",
        9,
    )
    assert not load_config(InferenceConfig, arguments.config, [], {"speed.fp8": False}).speed.fp8


BAD_FLAGS = [
    ("--promp y", "unknown flag --promp: did you mean --prompt or --prompt_schedule?"),
    ("--conf c.yaml", "unknown flag --conf: did you mean --config?"),
    ("--num 6", "did you mean --num_output_frames?"),
    ("--cuda", "did you mean --cuda_graphs?"),
    ("--lora_ 3", "did you mean --lora_rank or --lora_alpha?"),
    ("--xyzzy", "unknown flag --xyzzy"),
    ("--output_path x", "unknown flag --output_path: did you mean --output_folder?"),
    ("--model_folder x", "unknown flag --model_folder: it is a setting, give model_folder=value"),
    ("--model-folder=x", "unknown flag --model-folder: it is a setting, give model_folder=value"),
    ("--context_noise 0.1", "unknown flag --context_noise: it is a setting, give context_noise=value"),
    ("--height 64", "unknown flag --height: it is a setting, give height=value"),
    ("-- height", "'height' is no setting: give key=value"),
    ("height=", "error: height has no value: give height=value\n"),
    ("checkpoint_path=", "give checkpoint_path=value, or checkpoint_path=null for none"),
    ("--seed=9223372036854775808", "--seed 9223372036854775808 is out of range"),
    ("--seed 1.5", "--seed 1.5 does not fit: give an integer"),
    ("--seed x", "--seed 'x' does not fit"),
    ("--seed", "expected one argument"),
    ("--lora_rank 0", "--lora_rank 0 is out of range: give an integer from 1"),
    ("--lora_rank 1000000000", "out of range"),
    ("--lora_alpha nan", "--lora_alpha 'nan' does not fit"),
    ("--lora_alpha .inf", "--lora_alpha inf is out of range"),
    ("--lora_alpha 1e400", "--lora_alpha inf is out of range"),
    ("--num_output_frames 0", "--num_output_frames 0 is out of range: give an integer from 1 to 1000000"),
    ("--num_output_frames 1000000000", "out of range"),
    ("--num_output_frames 3.0", "does not fit: give an integer"),
    ("--window_frames 0", "--window_frames 0 is out of range"),
    ("--sink_frames -1", "--sink_frames -1 is out of range"),
    ("--hybrid_layers 0 x", "--hybrid_layers 'x' does not fit"),
    ("--hybrid_layers -1", "--hybrid_layers -1 is out of range"),
    ("--memory some", "--memory 'some' does not fit: give one of "),
    ("--dtype int8", "invalid choice"),
    ("--checkpoint_path ", "--checkpoint_path '' is out of range"),
    (
        "--checkpoint_path nowhere.pt",
        "fetch it with scripts/download_weights.py --what NAME, whose --help has the names",
    ),
    ("fps", "'fps' is no setting: give key=value"),
    ("fps=0", "fps 0 is out of range: give an integer from 1 to 1000"),
    ("fps=-16", "fps -16 is out of range"),
    ("fsp=3", "unknown setting 'fsp': did you mean fps?"),
    ("seed=3", "unknown setting 'seed': it is a flag, give --seed"),
    ("output_folder=x", "unknown setting 'output_folder': it is a flag, give --output_folder"),
    ("hybrid_layers=[0]", "unknown setting 'hybrid_layers': give hybrid.layers=value"),
    ("window_frames=3", "unknown setting 'window_frames': give memory.window_frames=value"),
    ("hybrid=[0]", "hybrid [0] does not fit: give settings by name, hybrid.layers, hybrid.lora_rank, "),
    ("--seed ", "--seed is empty: give an integer"),
    ("--promp y", "did you mean --prompt or --prompt_schedule? --help lists all flags\n"),
    ("--lora_alpha 1e-320", "--lora_alpha 1e-320 is out of range"),
    ("num_output_frames=9 --num_output_frames 6", "given as a flag and as key=value, 6 and 9"),
    ("memory.kind=full --memory window", "memory.kind is given as a flag and as key=value"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_what_cannot_be_understood_is_one_line_and_status_2(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CausalVideoPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(sys, "argv", ["inference.py", *BASE, *flags.split(" ")])
    assert inference.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error


def test_a_flag_given_twice_counts_last_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read("--lora_rank", "3", "--lora_rank", "3").hybrid.lora_rank == 3
        assert not caplog.text
        assert read("--lora_rank", "3", "--lora_rank", "4").hybrid.lora_rank == 4
        assert read("--compile", "--no_compile").speed.compile is False
        assert read("fps=8", "fps=9").fps == 9
    assert "--lora_rank is given twice, 3 and 4: the last counts" in caplog.text and "fps= is given more" in caplog.text


def test_a_window_of_a_full_memory_is_a_contradiction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--window_frames", "6"], ["--memory", "full", "--sink_frames", "3"]):
        arguments = ["--config", str(TOY), "--output_folder", "out", "--prompt", "x", *flags]
        monkeypatch.setattr(sys, "argv", ["inference.py", *arguments])
        assert inference.main() == 2
        assert "give memory.kind=window too" in capsys.readouterr().err


def test_help_groups_flags_and_shows_ranges_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        inference_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for part in ("memory of the softmax layers:", "speed:", "--cuda_graphs, --no_cuda_graphs", "key=value"):
        assert part in text
    assert "(an integer from 1 to 1000000; default 21 unless the config sets it)" in text
    assert "default 'trained' unless the config sets it" in text
    assert "by default that of the checkpoint, or 32 where it does not say (a number from 1e-06 to 1000000)" in text
    assert "--config_path" not in text and "--cuda-graphs" not in text


def test_help_says_of_switches_what_is_so_without_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (
        ("inference", "by default on a GPU"),
        ("benchmark", "(default false unless the config sets it)"),
    ):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            import_module(name).main()
        assert f"decode beside the next block's denoising{';' if words[0] == 'b' else ''} {words} --fp8" in " ".join(
            capsys.readouterr().out.split()
        )


def test_training_takes_the_common_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config_path", str(ROOT / "configs" / "stage1.yaml"), "--output-folder", "runs/x", "--device", "cpu"]
    for module, flags, message in (
        (train_stage1, [*common, "run_folder=runs/y"], "run_folder is given as a flag and as key=value"),
        (train_stage1, [*common, "--seed", "9223372036854775808"], "--seed 9223372036854775808 is out of range"),
        (train_stage2, [*common, "optimizer.warmup_steps=-5"], "optimizer.warmup_steps -5 is out of range"),
        (train_stage2, [*common, "--steps", "3"], "unknown flag --steps: it is a setting, give steps=value"),
        (train_stage2, common[2:], "required: --config"),
    ):
        monkeypatch.setattr(sys, "argv", ["train", *flags])
        assert module.main() == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


NUMBERS = {
    "generate_latents": ["--data_path x --folder y --videos_per_prompt 0", "--data_path x --folder y fps=0"],
    "sample_suite": [
        "--suite hundred --output_folder y --samples 10000",
        "--suite hundred --output_folder y --limit 0",
    ],
    "encode_videos": ["--videos x --folder y fps=0", "--data_path x --output_folder y --fps 3"],
    "select_layers": ["--method random --yaml y --videos 0", "--method random --yaml y --batch -1"],
    "probe_memory": [
        "--json x --videos 1",
        "--json x --hidden_frames 0",
        "--json x --num_videos 1e3",
        "--json x --times 0",
    ],
}


@pytest.mark.parametrize(("script", "flags"), [(name, flags) for name, lines in NUMBERS.items() for flags in lines])
def test_numbers_of_scripts_have_ranges(
    script: str, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = call(monkeypatch, capsys, import_module(script), "--config", str(TOY), *flags.split())
    assert status == 2 and error.count("\n") == 1, error
    assert any(word in error for word in ("out of range", "does not fit", "unknown flag --fps")), error


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("benchmark", "--repeats 0"),
        ("benchmark", "--lengths 0"),
        ("benchmark", "--blocks_sampled 1"),
        ("benchmark", "repeats=0"),
        ("benchmark", "warmup_blocks=0"),
        ("profile_generation", "--row x --frames 0"),
        ("benchmark_training", "--hybrid_layers 0"),
        ("benchmark_training", "--lora_rank 0"),
        ("toyworld_study", "--work w --part table --videos 1"),
        ("toyworld_study", "--work w --part table --budget_seconds -1"),
        ("build_toyworld", "--work w --steps 0"),
        ("toyworld_samples", "--fps 0"),
        ("draw_latents", "--folder f --latent_frames 0"),
        ("draw_latents", "--folder f --informative 2"),
        ("make_random_model", "--size toy --folder f --seed 9223372036854775808"),
        ("convert_checkpoint", "a b --lora_rank 0"),
        ("download_weights", "--wha wan"),
        ("demo", "--config x"),
        ("evaluate", "folder --json x --drift_seconds 0"),
        ("evaluate", "folder --json x --blocks 9 0"),
        ("verify", "folder --dtype int8"),
    ],
)
def test_what_scripts_refuse(
    script: str, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = call(monkeypatch, capsys, import_module(script), *flags.split())
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert any(word in error for word in ("out of range", "unknown flag", "invalid choice")), error


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: ModuleType, *flags: str
) -> tuple[int, str]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    return int(script.main()), capsys.readouterr().err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_entry_point_has_flags_of_its_own_making(path: Path) -> None:
    """Numbers are declared, paths are checked, names have underscores, and nothing goes round the parser."""
    tree = ast.parse(path.read_text())
    assert "ArgumentParser" not in path.read_text()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        flags = [text for text in texts if text.startswith("--") and " " not in text]
        if flags and any(keyword.arg in ("type", "help") for keyword in node.keywords):
            types = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "type"]
            assert not {"int", "float", "Path"} & set(types), f"{flags[0]}: declare its range by add_value"
            assert all("-" not in flag[2:] for flag in flags)
            assert flags[0] not in ("--folder", "--videos", "--config_path", "--output")


def test_a_parser_without_a_config_takes_no_settings() -> None:
    parser = Parser("")
    with pytest.raises(InputError, match="unexpected a=3"):
        parser.parse_args(["a=3"])
    arguments: Any = parser.parse_args([])
    assert arguments.settings == [] and arguments.flags == {}
