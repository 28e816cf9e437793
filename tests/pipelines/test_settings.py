"""Configs from YAML, `key=value` and flags: every field against every kind of value, and files that are no configs."""

import dataclasses
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from arl2.distillation.checkpointing import current_names as current_fingerprint
from arl2.distillation.objective import ForwardMode
from arl2.distillation.stage2 import Context
from pipelines.benchmark.cases import BenchmarkConfig, plan_cases
from pipelines.config import InferenceConfig, MemoryKind
from pipelines.settings import load_config, parse_overrides
from pipelines.training.config import GatesConfig, Stage1Config, Stage2Config, TrainingConfig, read_layers
from pipelines.yaml_files import parse
from wan.utils.errors import InputError
from wan.utils.ranges import check_ranges, declarations, declared

CONFIGS = (InferenceConfig, Stage1Config, Stage2Config, GatesConfig, BenchmarkConfig)
VALUES = (
    *("-1", "0", "1", "3", "3.0", "0.5", '"3"', ".nan", ".inf", "-.inf", "1e400", "1e-400", '""', "null", "[]", "{}"),
    *(
        "true",
        "yes",
        "on",
        "abc",
        "loop",
        "1" + "0" * 30,
        "-9223372036854775809",
        "9" * 5000,
        "[1, 1]",
        "[[]]",
        "{a: 1}",
    ),
    *(
        "[null]",
        "[3, abc]",
        "[.nan]",
        "[-1]",
        "0x10",
        "2026-01-01",
        "1:30",
        "'a\\0b'",
        '"a\\0b"',
        "/" * 5000,
        "x" * 300,
    ),
    *("${a}", "🙂"),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every setting of a config by its dotted name, and the outer ones."""
    for name, hint in declarations(kind).items():
        inner = declared(hint).kind
        yield f"{prefix}{name}", inner
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{name}.")


def floats(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from floats(one)
    elif isinstance(value, float):
        yield value


def derive(config: Any) -> None:
    """Everything that is made of a config before anything loads."""
    check_ranges(config)
    assert all(math.isfinite(number) for number in floats(dataclasses.asdict(config)))
    config.sampler()
    if isinstance(config, TrainingConfig):
        config.trainer()
        config.objective_settings()
        config.levels.check(len(config.denoising_steps))
        config.hybrid(8)
    elif isinstance(config, InferenceConfig):
        config.memory.check(config.frames_per_block)
        config.hybrid.settings()
    else:
        plan_cases(config)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_field_takes_a_value_or_refuses_it_in_one_line(kind: type, file: Path) -> None:
    refused = 0
    inherited = dict(leaves(TrainingConfig)) if kind in (Stage2Config, GatesConfig) else {}  # stage 1 has tried them
    names = [name for name, _ in leaves(kind) if name not in inherited]
    for name in names:
        *outer, last = name.split(".")
        for value in VALUES:
            text = "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(outer))
            file.write_text(f"{text}{'  ' * len(outer)}{last}: {value}\n")
            for overrides in ((), (f"{name}={value}",)):
                if overrides:
                    file.write_text("frames_per_block: 3\n")
                try:
                    derive(load_config(kind, file, overrides))
                except InputError as error:
                    refused += 1
                    message = str(error)
                    assert "\n" not in message and len(message) < 700, (name, value, message)
    assert refused > 20 * len(names)


OUT_OF_RANGE = {
    InferenceConfig: {
        "fps": (0, -16, 10**9),
        "strength": (0, -0.5, 1.5, ".nan"),
        "context_noise": (-1, 1001),
        "memory.sink_frames": (-1,),
        "memory.window_frames": (0, -6, 10**9),
        "num_output_frames": (0, -3, 10**9),
        "height": (0, -480, 10**5),
        "width": (0, 10**5),
        "denoising_steps": ([], [0], [1001], [250, 500], [500, 500], [-1]),
        "timestep_shift": (0, -5, ".nan", ".inf"),
        "frames_per_block": (0, -3, 10**6),
        "hybrid.lora_rank": (0, -1, 10**9),
        "hybrid.lora_alpha": (".nan", ".inf", -1),
        "hybrid.layers": ([-1],),
        "checkpoint_path": ('""', '" "'),
        "model_folder": ('""', "null"),
        "speed.tiny_vae": ('""',),
        "speed.vae_device": ('""', "gpu", "cuda:x", "cuda:01", "meta"),
    },
    Stage2Config: {
        "seed": (2**63, -(2**63) - 1),
        "steps": (0, -1, 10**10, 3.5),
        "batch": (0, -1, 10**7),
        "accumulation": (0,),
        "optimizer.lr": (0, -1, ".inf", ".nan", "1e400"),
        "optimizer.max_grad_norm": (0, ".nan", ".inf"),
        "optimizer.betas": ([0.9], [1, 0.9], [0.9, -0.1], [".nan", 0.9]),
        "optimizer.weight_decay": (-0.1, ".inf"),
        "optimizer.warmup_steps": (-5, -1, 1.5),
        "optimizer.decay": ("steep",),
        "ema_decay": (0, 1, 1.5, ".nan"),
        "blocks_per_graph": (0, -1),
        "levels.per_block": (0, -1),
        "share": (0, 101, -75),
        "lora_rank": (0, -1, 10**9),
        "lora_alpha": (0, ".nan", ".inf"),
        "data": ([], ["a", "a"], ['""'], "null"),
        "save_every": (0,),
        "keep": (0,),
        "report_every": (0,),
        "sample_every": (-1,),
        "sample_frames": (0,),
        "sample_fps": (0, -16),
        "max_bad_steps": (0,),
        "tracker": ("paper",),
        "dtype": ("float16",),
    },
    GatesConfig: {"temperature": (0, -1, ".nan"), "budget": (0, 1, ".nan", 1.5), "budget_weight": (-1, ".inf")},
    BenchmarkConfig: {
        "repeats": (0,),
        "warmup_blocks": (0,),
        "blocks_sampled": (1, 0),
        "lengths": ([0], [-1], [10**9], [9, 9]),
        "size": ("huge",),
        "quick.repeats": (0,),
        "fps": (0,),
    },
}
CASES = [
    (kind, name, value) for kind, fields in OUT_OF_RANGE.items() for name, values in fields.items() for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_numbers_have_ranges(kind: type, name: str, value: Any, file: Path) -> None:
    file.write_text("frames_per_block: 3\n")
    text = str(value).replace("'", "")
    with pytest.raises(
        InputError, match=rf"{re.escape(name)}\S* .*(out of range|fit|elements, not).*: give "
    ) as refused:
        load_config(kind, file, [f"{name}={text}"])
    assert str(file) not in str(refused.value), "the command line is at fault"
    outer = name.split(".")
    file.write_text(
        "".join(f"{'  ' * depth}{key}:" + "\n" * (key != outer[-1]) for depth, key in enumerate(outer)) + f" {text}\n"
    )
    with pytest.raises(InputError, match=re.escape(name)) as refused:
        load_config(kind, file)
    assert str(file) in str(refused.value)


FILES = {
    "list": (b"- a: 1\n", "it is a list"),
    "scalar": (b"5\n", "it is a single value"),
    "text": (b"just words\n", "it is a single value"),
    "empty": (b"", "is empty"),
    "comments": (b"# nothing\n", "is empty"),
    "binary": (bytes(range(256)), "is not UTF-8 text"),
    "nul": (b"a: \0\n", "no printable text"),
    "latin-1": ("tracker: ü\n".encode("latin-1"), "is not UTF-8 text"),
    "utf-16": ("steps: 1\n".encode("utf-16"), "is not UTF-8 text"),
    "brackets": (b"data: " + b"[" * 50000, "nested more than"),
    "braces": (b"{a: " * 50000, "nested more than"),
    "dashes": (b"- " * 50000, "nested more than"),
    "bomb": (b"a: &a [x, x]\nb: &b [*a, *a]\n", "anchors"),
    "alias": (b"a: *b\n", "anchors"),
    "merge": (b"<<: {steps: 3}\n", "unknown setting '<<'"),
    "twice": (b"steps: 1\nbatch: 2\nsteps: 3\n", "line 3: 'steps' is given twice"),
    "twice inside": (b"optimizer:\n  lr: 1.0\n  lr: 2.0\n", "'lr' is given twice"),
    "tag": (b"steps: !!python/object/apply:os.system [ls]\n", "tags"),
    "plain tag": (b"steps: !!int '3'\n", "tags"),
    "documents": (b"steps: 1\n---\nsteps: 2\n", "second document"),
    "list as a name": (b"? [a]\n: 1\n", "cannot be a name"),
    "tabs": (b"optimizer:\n\tlr: 1\n", "not valid YAML"),
    "open bracket": (b"data: [a\n", "not valid YAML"),
    "number as a name": (b"1: 2\n", "unknown setting '1'"),
    "null as a name": (b"~: 2\n", "unknown setting '~'"),
    "long": (b"# " + b"x" * 2**20 + b"\nsteps: 1\n", "larger than 1 MiB"),
    "unknown": (b"stepz: 1\n", "unknown setting 'stepz': did you mean steps?"),
    "dotted": (b"optimizer.lr: 1\n", "unknown setting 'optimizer.lr'"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_config_is_refused_in_one_line(case: str, file: Path) -> None:
    content, message = FILES[case]
    file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load_config(Stage1Config, file)
    text = str(refused.value)
    assert message in text and str(file) in text and "\n" not in text and len(text) < 700, text


def test_a_folder_and_names_that_cannot_be(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.yaml", "is not there"),
        (Path("/dev/null"), "no config file /dev/null: it is no regular file; those of the project are in "),
    ):
        with pytest.raises(InputError, match=message):
            load_config(Stage1Config, path)
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(InputError, match=r"no config file|cannot read"):
            load_config(Stage1Config, Path(name))


def test_a_byte_order_mark_and_crlf_are_read(file: Path) -> None:
    file.write_bytes("\ufeffsteps: 7\r\ntracker: none\r\n".encode())
    config = load_config(Stage1Config, file)
    assert (config.steps, config.tracker) == (7, "none")


def test_scalars_are_those_of_the_core_schema() -> None:
    text = "1, -2, 1e-3, 1.5E3, .5, 5., .inf, -.INF, ~, null, true, FALSE, on, yes, 1_000, 0x10, 010, 2026-01-01, 1:30"
    values = parse(f"[{text}, '3', \"on\"]", "x")
    assert values == [
        *(1, -2, 0.001, 1500.0, 0.5, 5.0, math.inf, -math.inf, None, None, True, False),
        *("on", "yes", "1_000", "0x10", 10, "2026-01-01", "1:30", "3", "on"),
    ]
    assert [type(value) for value in values[:4]] == [int, int, float, float]


def test_settings_go_before_the_file_and_the_file_before_defaults(file: Path) -> None:
    file.write_text("steps: 5\nbatch: 3\nmemory: {window_frames: 7}\n")
    flags = {"seed": 4}
    config = load_config(Stage2Config, file, ["steps=6", "memory.kind=window", "run_folder=2024", " keep = 1"], flags)
    assert (config.steps, config.batch, config.seed, config.run_folder, config.keep) == (6, 3, 4, "2024", 1)
    assert config.memory.window == (7, 3)
    assert load_config(Stage2Config, file, ["steps=6", "init_from=a", "steps=7", "init_from=null"]).steps == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps"], "'steps' is no setting: give key=value"),
        (["=3"], "'=3' is no setting"),
        (["steps="], "steps has no value: give steps=value"),
        (["checkpoint_path="], "give checkpoint_path=value, or checkpoint_path=null for none"),
        (["stepps="], "unknown setting 'stepps'"),
        (["stepz=3"], "unknown setting 'stepz': did you mean steps?"),
        (["memory.knid=full"], "did you mean memory.kind?"),
        (["steps.x=3"], "steps"),
        (["memory=3"], "give settings by name"),
        (["memory.kind.x=3"], "memory.kind"),
        (["steps=[1"], "not valid YAML"),
        (["." * 3000 + "=1"], "unknown setting"),
        (["data=" + "[" * 50000], "nested more than"),
        (["a" * 10**6 + "=1"], "unknown setting"),
    ],
)
def test_settings_that_cannot_be_understood(overrides: list[str], message: str, file: Path) -> None:
    file.write_text("steps: 5\n")
    with pytest.raises(InputError) as refused:
        load_config(Stage2Config, file, overrides)
    assert ("null" in str(refused.value)) == ("null" in message or "null" in overrides[0])
    assert message in str(refused.value) and len(str(refused.value)) < 1000 and "\n" not in str(refused.value)


def test_a_flag_and_a_setting_must_not_contradict_one_another(file: Path) -> None:
    file.write_text("steps: 5\n")
    assert load_config(Stage2Config, file, ["steps=6"], {"steps": 6}).steps == 6
    with pytest.raises(InputError, match="steps is given as a flag and as key=value, 7 and 6"):
        load_config(Stage2Config, file, ["steps=6"], {"steps": 7})


def test_former_names_are_understood_and_the_log_says_so(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("path: loop\ncontext: student\n")
    with caplog.at_level(logging.WARNING):
        config = load_config(Stage2Config, file)
    assert config.forward_mode is ForwardMode.SEQUENTIAL and config.context is Context.SELF_ROLLOUT
    assert load_config(Stage2Config, file, ["path=parallel"]).forward_mode is ForwardMode.PARALLEL
    assert load_config(Stage2Config, file, ["forward_mode=parallel"]).forward_mode is ForwardMode.PARALLEL
    file.write_text("read_clean: false\n")
    assert not load_config(Stage1Config, file).loss_on_clean_pass
    file.write_text("rows: [{name: a, hybrid_layers: 2}]\n")
    assert load_config(BenchmarkConfig, file).rows[0].num_hybrid_layers == 2
    for text in ("path: parallel\nforward_mode: parallel\n", "forward_mode: parallel\npath: loop\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="gives forward_mode and its former name path"):
            load_config(Stage2Config, file)


def test_a_run_of_an_earlier_version_is_the_same_run() -> None:
    before = {"path": "loop", "context": "student", "read_clean": True, "steps": 3}
    now = {"forward_mode": "sequential", "context": "self_rollout", "loss_on_clean_pass": True, "steps": 3}
    assert current_fingerprint(before) == now == current_fingerprint(now)


def test_every_config_of_the_project_is_read_without_former_names(caplog: pytest.LogCaptureFixture) -> None:
    training = {"stage1": Stage1Config, "stage2": Stage2Config, "long": Stage2Config, "gates": GatesConfig}
    kinds = training | {"benchmark": BenchmarkConfig}
    for path in (ROOT / "configs").rglob("*.yaml"):
        load_config(kinds.get(path.stem.split("_")[0], InferenceConfig), path)
    assert "former" not in caplog.text


def test_sampling_stands_in_every_config_under_the_same_flat_names() -> None:
    names = ("frames_per_block", "denoising_steps", "warp_denoising_steps", "timestep_shift")
    for kind in CONFIGS:
        assert [declarations(kind)[name] for name in names] == [declarations(InferenceConfig)[name] for name in names]


def test_memory_settings_by_key_value(file: Path) -> None:
    file.write_text("frames_per_block: 3\n")
    settings = ["memory.kind=window", "memory.window_frames=6", "memory.sink_frames=0"]
    memory = load_config(InferenceConfig, file, settings).memory
    assert (memory.kind, memory.window) == (MemoryKind.window, (6, 0))


@pytest.mark.parametrize(
    "text", ["", "[]", "'50': 3", "'50': [a]", "'50': [-1]", "'75': [1]", "[" * 50000, "\0", "'50': [1.5]"]
)
def test_a_layers_file_that_names_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "layers.yaml").write_text(text)
    with pytest.raises(InputError, match=r"layers\.yaml"):
        read_layers(tmp_path / "layers.yaml", 50, 4)


def test_overrides_by_their_dotted_names() -> None:
    found = parse_overrides(Stage2Config, ["optimizer={lr: 1.0e-3, betas: [0, 0.5]}", "memory.kind=window"])
    assert found == {"optimizer.lr": 0.001, "optimizer.betas": [0, 0.5], "memory.kind": "window"}
