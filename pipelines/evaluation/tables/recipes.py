"""How each of the paper's tables is made from checkpoints: commands in their order, and the GPU-hours that they take.

Hours are products of rates that were measured (docs/results), on one H100 at Wan 1.3B, and of counts. Where no rate was
measured there is no figure.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.config import InferenceConfig
from pipelines.evaluation.layer_scores import BASELINE, layer_folder
from pipelines.evaluation.tables.build import TABLES
from pipelines.settings import load_config
from wan.checkpoints.formats import transformer_config
from wan.utils.errors import InputError

FPS_TO_MP4 = 41.2
"""Frames per second from noise to mp4 of the 75 % hybrid with a window, 81 frames (docs/results/many_gpus.md)."""
STAGE1_HOURS, STAGE2_HOURS = 23.0, 105.0
"""6000 and 12,000 steps of 8 videos (docs/results/training_full_size.md)."""
VBENCH_PROMPTS, VBENCH_SAMPLES = 944, 5
SUITES = {"quality": "vbench", "drift": "moviegen", "ablations": "vbench", "layers": "hundred"}
"""Prompts by table."""
SINGLE = "single_layers"
LAYER_PROMPTS = 12
"""The paper's number of prompts for the choice of layers."""
LONG_LATENTS = 240
"""Latent frames of videos for drift: a minute at 16 frames per second."""
ABLATIONS: dict[str, tuple[str, ...]] = {
    "the method": (),
    "no output gate": ("state.gate=none",),
    "no rotation": ("state.rotation=none",),
    "token reads": ("state.reads=token",),
    "noisy writes": ("state.writes=noisy", "forward_mode=sequential", "levels.per_block=4"),
    "no adapters": ("lora=false",),
}
"""Settings of both stages by row; see docs/ablations.md."""
ONLY_IN_STAGE2 = ("forward_mode=sequential", "levels.per_block=4", "lora=false")


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        words: its words, from the repository's root.
        hours: GPU-hours at 1.3B on an H100; None where no rate was measured.
        makes: file or folder that it leaves.
    """

    words: tuple[str, ...]
    hours: float | None
    makes: Path

    @property
    def line(self) -> str:
        """The command, as a shell takes it."""
        return shlex.join(self.words)


@dataclass(frozen=True)
class Request:
    """What a table is made of.

    Attributes:
        table: its name.
        config: of scripts/inference.py's kind.
        folder: of everything that is made.
        checkpoints: weights by label; None for those of the config.
        suite: prompts; None for those of the table, see `SUITES`.
        limit, samples: prompts at most, and videos per prompt; None for the suite's own.
        metrics: of scripts/evaluate.py.
        device: None for the default.
        settings: further settings of the config, `key=value`.
    """

    table: str
    config: Path
    folder: Path
    checkpoints: dict[str, Path | None] = field(default_factory=lambda: {"model": None})
    suite: str | None = None
    limit: int | None = None
    samples: int | None = None
    metrics: tuple[str, ...] = ("pixels", "learned")
    device: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def device_words(self) -> tuple[str, ...]:
        """The flag of the device."""
        return () if self.device is None else ("--device", self.device)

    @property
    def prompts(self) -> str:
        """The suite."""
        return self.suite or SUITES[self.table]

    @property
    def page(self) -> Path:
        """The finished table."""
        return self.folder / f"{self.table}.md"


def _python(script: str, *words: str | Path) -> tuple[str, ...]:
    return ("python", f"scripts/{script}", *map(str, words))


def _given(name: str, value: object | None) -> tuple[str, ...]:
    return () if value is None else (f"--{name}", str(value))


def _folder_name(label: str) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "_" for char in label)


def _benchmark(request: Request) -> list[Step]:
    """Speed and memory, on random weights; the benchmark has a config of its own."""
    folder = request.folder / "benchmark"
    words = _python("benchmark.py", "--config", request.config, "--output_folder", folder, *request.device_words)
    return [Step(words, None, folder / "benchmark.json"), _table(request, [f"{folder / 'benchmark.json'}"])]


def _scored(request: Request) -> list[Step]:
    """Videos of every model, their scores, and the table with pictures."""
    steps, files = [], []
    for label, checkpoint in request.checkpoints.items():
        made, scored = _videos(request, label, checkpoint)
        steps += [made, scored]
        files.append(f"{label}={scored.makes}")
    return [*steps, _table(request, files, pictures=True)]


def _videos(request: Request, label: str, checkpoint: Path | None, layer: int | None = None) -> tuple[Step, Step]:
    """Sampling and scoring of one model, or of one that is hybrid in one of its layers."""
    folder = request.folder / _folder_name(label)
    frames = (f"num_output_frames={LONG_LATENTS}",) if request.table == "drift" else ()
    given = any(setting.startswith("num_output_frames=") for setting in request.settings)
    words = _python(
        "sample_suite.py",
        *("--suite", request.prompts, "--config", request.config, "--output_folder", folder),
        *_given("checkpoint_path", checkpoint),
        *(() if layer is None else ("--hybrid_layers", str(layer))),
        *_given("limit", request.limit),
        *_given("samples", request.samples),
        *request.device_words,
        *(() if given else frames),
        *request.settings,
    )
    seconds_of_video = (4 * LONG_LATENTS - 3 if request.table == "drift" else 81) / FPS_TO_MP4
    number = None
    if request.prompts.startswith("vbench"):
        number = min(request.limit or VBENCH_PROMPTS, VBENCH_PROMPTS) * (request.samples or VBENCH_SAMPLES)
    elif request.limit is not None:
        number = request.limit * (request.samples or 1)
    hours = None if number is None or given else number * seconds_of_video / 3600
    scores = folder / "scores.json"
    scoring = _python("evaluate.py", folder, "--metrics", *request.metrics, "--json", scores, *request.device_words)
    return Step(words, hours, folder), Step(scoring, None, scores)


def _table(request: Request, files: Sequence[str], pictures: bool = False) -> Step:
    sheet = ("--pictures", str(request.folder / "pictures.png")) if pictures else ()
    words = _python("make_tables.py", *files, "--table", request.table, "--output_file", request.page, *sheet)
    return Step(words, 0.0, request.page)


def _ablations(request: Request) -> list[Step]:
    """Both stages of every row, then videos and scores of all."""
    steps: list[Step] = []
    checkpoints: dict[str, Path | None] = {}
    base = _given_checkpoint(request)
    for label, settings in ABLATIONS.items():
        folder = request.folder / "runs" / _folder_name(label)
        first = tuple(setting for setting in settings if setting not in ONLY_IN_STAGE2)
        one, two = folder / "stage1", folder / "stage2"
        stage1 = ("train_stage1.py", "--config", "configs/stage1.yaml", f"run_folder={one}", *base, *first)
        stage2 = ("train_stage2.py", "--config", "configs/stage2.yaml", f"run_folder={two}", f"init_from={one}")
        steps.append(Step(("torchrun", "--nproc_per_node", "8", *stage1), STAGE1_HOURS, one))
        steps.append(Step(("torchrun", "--nproc_per_node", "8", *stage2, *base, *settings), STAGE2_HOURS, two))
        checkpoints[label] = two / "export_ema"
    checkpoints["stage 1 alone"] = request.folder / "runs" / _folder_name("the method") / "stage1" / "export"
    alone = request.folder / "runs" / "stage_2_alone"
    words = ("train_stage2.py", "--config", "configs/stage2.yaml", f"run_folder={alone}", "init_from=null", *base)
    steps.append(Step(("torchrun", "--nproc_per_node", "8", *words), STAGE2_HOURS, alone))
    checkpoints["stage 2 alone"] = alone / "export_ema"
    return steps + _scored(replace(request, checkpoints=checkpoints))


def _given_checkpoint(request: Request) -> tuple[str, ...]:
    (path, *more) = request.checkpoints.values()
    if more:
        raise InputError("ablations are trained from one checkpoint: give one --checkpoint_path")
    return () if path is None else (f"checkpoint_path={path}",)


def _layers(request: Request) -> list[Step]:
    """Two choices of layers, from a stage-1 export with all layers hybrid.

    One is by deviation from the softmax model, the other by the scores of videos made with one layer hybrid at a time.
    """
    (path, *more) = request.checkpoints.values()
    if path is None or more:
        raise InputError("layers are scored on one stage-1 export with all layers hybrid: give --checkpoint_path")
    model_folder = Path(load_config(InferenceConfig, request.config, list(request.settings)).model_folder)
    number = request.limit or LAYER_PROMPTS
    few = replace(request, limit=number, samples=request.samples or 1, folder=request.folder / SINGLE)
    steps = [*_videos(few, BASELINE, None)]
    for layer in range(transformer_config(model_folder)["num_layers"]):
        steps += _videos(few, layer_folder(layer), path, layer)
    replacement, scored = request.folder / "replacement.yaml", request.folder / "vbench.yaml"
    common = ("--config", request.config)
    by_scores = _python("select_layers.py", *common, "--method", "vbench", "--scores", few.folder, "--yaml", scored)
    by_deviation = _python(
        "select_layers.py",
        *(*common, "--method", "replacement", "--checkpoint_path", path, "--data_path", "prompts/hundred.jsonl"),
        *("--json", request.folder / "replacement.json", "--yaml", replacement, "--num_videos", str(number)),
        *request.device_words,
        *request.settings,
    )
    steps += [Step(by_scores, 0.0, scored), Step(by_deviation, None, replacement)]
    return [*steps, _table(request, [str(replacement), str(scored)])]


def _recall(request: Request) -> list[Step]:
    """What models of the toy world remember."""
    found = request.folder / "probe.json"
    also = [f"{label}={path}" for label, path in request.checkpoints.items() if path is not None]
    words = _python(
        "probe_memory.py",
        *("--config", request.config, "--times", "4", "--json", found),
        *(("--also", *also) if also else ()),
        *_given("num_videos", request.limit),
        *request.device_words,
    )
    return [Step(words, None, found), _table(request, [str(found)])]


RECIPES: dict[str, Callable[[Request], list[Step]]] = {
    "efficiency": _benchmark,
    "memory": _benchmark,
    "quality": _scored,
    "drift": _scored,
    "ablations": _ablations,
    "layers": _layers,
    "recall": _recall,
}
assert RECIPES.keys() == TABLES.keys()


def steps_of(request: Request) -> list[Step]:
    """The commands of a table, in their order.

    Raises:
        InputError: checkpoints that the table cannot be made of.
    """
    return RECIPES[request.table](request)
