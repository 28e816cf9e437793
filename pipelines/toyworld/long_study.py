"""Training, examining and keeping the models of the study of long training; see `arl2.toyworld.study.long_rows`.

    work/data/<set>/<piece>/               training videos, drawn by whichever process is free
    work/runs/<row>/                       the trainer's folder
    work/weights/<row>.safetensors         the trained average, in half precision, as `checkpoint_path` takes it
    work/results/<row>.json                everything known of a row; a row that has one is done
    work/probes/<row>/<probe>.json         its answers

Rows of another seed than 0 have `.seed<n>` behind their names. Several processes may work on one folder, on one GPU or
many: each takes the next row that no other has taken.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from arl2.checkpoint import holds_hybrid_alone, save_generator, save_hybrid_weights
from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridWanModel, keep_gates_in_float32
from arl2.toyworld.probe.long_probe import STANDARD_LATENTS, Context
from arl2.toyworld.probe.memory_benchmark import equal_memory_window
from arl2.toyworld.study.long_rows import Layers, LongRow, Stage, Start, Window
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, HEIGHT, WIDTH
from arl2.toyworld.world.worlds import World
from pipelines.console.shipped import ROOT
from pipelines.dtypes import choose_dtype
from pipelines.provenance import device_name, git_commit
from pipelines.records import claimed, open_records, read_record, write_record
from pipelines.settings import load_config
from pipelines.toyworld.draw import DrawSettings, draw_latents
from pipelines.toyworld.long_memory import LongProbeSettings, read_model, run_rows
from pipelines.toyworld.study import OutOfTimeError
from pipelines.training.config import Stage1Config, Stage2Config, TrainingConfig
from pipelines.training.export import EXPORT
from pipelines.training.run import train
from wan.checkpoints.formats import transformer_config
from wan.text import load_text_encoder
from wan.utils.errors import InputError
from wan.utils.json_lines import read_json_lines
from wan.vae.wan_vae import load_vae, spatial_stride

log = logging.getLogger(__name__)

CONFIGS = ROOT / "configs" / "toyworld"
STAGE1_WEIGHTS = ROOT / "docs" / "results" / "distillation" / "study" / "stage1.safetensors"
SHIPPED_HYBRID = "hybrid_75.safetensors"
LONG_LATENTS = 4 * STANDARD_LATENTS
SLOW_DECAY = "state.decay=slow"
WORK = "--output_folder"
Result = dict[str, Any]


@dataclass(frozen=True)
class Exam:
    """A probe that every row takes.

    Attributes:
        times: length of the videos, as a multiple of STANDARD_LATENTS.
        world, context: see `LongProbeSettings`.
    """

    times: int
    world: World
    context: Context = Context.OWN

    @property
    def name(self) -> str:
        """Of its file, and in results."""
        return f"{self.world}_{self.times}x_{self.context}"


EXAMS = (
    *(Exam(times, World.STANDARD) for times in (1, 4, 16)),
    *(Exam(times, World.LONG) for times in (4, 16)),
    *(Exam(times, world, Context.TRUE) for world in World for times in (4, 16)),
)
"""A row takes those of its world."""
CURVES = tuple(Exam(64, world) for world in World)
"""For curves, of the rows that are asked for."""


@dataclass(frozen=True)
class LongStudySettings:
    """What a session is given.

    Attributes:
        work: folder of everything.
        model: the toy world's bundle.
        device: where to compute.
        long_videos: drawn for training of each world, of four times the standard length.
        short_videos: drawn of the standard world and length.
        pieces: in how many parts they are drawn, each by one process.
        exam_videos: of every exam.
        exam_batch: videos at once; affects only speed.
        seed: of the trainings.
        steps: of every training, in the place of the config's and the row's.
        overrides: further settings of every training, `key=value`.
        deadline: when to stop, on the clock of `time.monotonic`.
    """

    work: Path
    model: Path
    device: torch.device
    long_videos: int = 5120
    short_videos: int = 12288
    pieces: int = 8
    exam_videos: int = 136
    exam_batch: int = 136
    seed: int = 0
    steps: int | None = None
    overrides: tuple[str, ...] = ()
    deadline: float = math.inf

    def is_over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.deadline


class LongStudy:
    """Makes what is missing; see the module.

    Args:
        settings: see there.
    """

    def __init__(self, settings: LongStudySettings) -> None:
        self.settings = settings

    def path(self, kind: str, name: str, suffix: str = "") -> Path:
        """Of a row's file or folder."""
        seed = self.settings.seed
        return self.settings.work / kind / (name + (f".seed{seed}" if seed else "") + suffix)

    @contextmanager
    def _claimed(self, name: str, wait: bool = False) -> Iterator[bool]:
        with claimed(self.settings.work / "locks" / name, name, wait) as free:
            yield free

    # Data.

    def data(self, world: World, is_short: bool = False) -> list[Path]:
        """Folders of the training videos; draws those that no process has drawn, and waits for the others.

        Args:
            world: kind of their scenes.
            is_short: whether they have the standard length.

        Raises:
            OutOfTimeError: the session ended before.
        """
        settings = self.settings
        name, latents = (f"{world}_short", STANDARD_LATENTS) if is_short else (f"{world}_long", LONG_LATENTS)
        videos = settings.short_videos if is_short else settings.long_videos
        size = -(-videos // settings.pieces)
        folders = [settings.work / "data" / name / str(piece) for piece in range(settings.pieces)]
        for wait in (False, True):  # first what nobody is at
            for piece, folder in enumerate(folders):
                with self._claimed(f"{name}_{piece}", wait) as free:
                    done = folder / "done"
                    if free and not done.exists():
                        if settings.is_over():
                            raise OutOfTimeError
                        # Videos of the exams have seeds of their own, see `arl2.toyworld.probe.long_probe`.
                        draw = DrawSettings((world,), size, latents, seed=piece * size)
                        dtype = choose_dtype(None, settings.device)
                        draw_latents(draw, settings.model, folder, settings.device, dtype)
                        done.touch()
        return folders

    # Training.

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Of the transformer."""
        return transformer_config(self.settings.model)

    @cached_property
    def shipped_layers(self) -> list[int]:
        """Hybrid layers of the shipped hybrid."""
        model = read_model(self.settings.model, self.settings.model / SHIPPED_HYBRID, torch.device("cpu"))
        return sorted(model.hybrid_attentions())

    def layers_of(self, row: LongRow) -> list[int]:
        """A row's hybrid layers."""
        return {
            Layers.NONE: [],
            Layers.SHIPPED: self.shipped_layers,
            Layers.ALL: list(range(self.sizes["num_layers"])),
        }[row.layers]

    @cached_property
    def generator(self) -> HybridWanModel:
        """The bundle's softmax model, for its sizes."""
        return read_model(self.settings.model, self.settings.model, torch.device("cpu"))

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame."""
        stride = spatial_stride(self.settings.model)
        return self.generator.tokens_per_frame(HEIGHT // stride, WIDTH // stride)

    def window_of(self, row: LongRow) -> int | None:
        """Latent frames of the window of a row's softmax layers; None for full memory."""
        if row.is_short or row.window is Window.FULL:
            return None
        if row.window_frames is not None or row.window is Window.TRAINED:
            return row.window_frames or STANDARD_LATENTS
        return equal_memory_window(self.generator, len(self.shipped_layers), STANDARD_LATENTS, self.tokens_per_frame)

    def weights_before(self, row: LongRow) -> Path | None:
        """The file that a row's training begins with; None for the bundle's own.

        Raises:
            InputError: the row that should have made it is not done.
        """
        if row.after:
            with self._claimed(self.path("", row.after).name, wait=True):
                pass  # another process may be training it
            file = self.path("weights", row.after, ".safetensors")
            if not file.is_file():
                raise InputError(f"no {file}: run the row {row.after} first")
            return file
        return {
            Start.GENERATOR: None,
            Start.SHIPPED: self.settings.model / SHIPPED_HYBRID,
            Start.STAGE1: STAGE1_WEIGHTS,
        }[row.start]

    def config(self, row: LongRow) -> TrainingConfig:
        """A row's training: a config of configs/toyworld, and what the study changes."""
        settings = self.settings
        kind: type[TrainingConfig] = Stage1Config if row.stage is Stage.ONE else Stage2Config
        folders = ", ".join(map(str, self.data(row.world, row.is_short)))
        changes = [
            *(f"model_folder={settings.model}", f"run_folder={self.path('runs', row.name)}", f"data=[{folders}]"),
            *("tracker=none", "sample_every=0", "keep=1", f"device={settings.device}", f"seed={settings.seed}"),
            *("optimizer.decay=cosine", "ema_decay=0.99"),
            *self._decay_changes(row),
            *(self._stage2_changes(row) if row.stage is not Stage.ONE else []),
            *row.settings,
            *([f"steps={settings.steps}"] if settings.steps is not None else []),
        ]
        files = {Stage.ONE: "stage1.yaml", Stage.SHORT: "stage2.yaml", Stage.LONG: "long.yaml"}
        config = load_config(kind, CONFIGS / files[row.stage], [*changes, *settings.overrides])
        config.report_every = config.steps
        return config

    def _decay_changes(self, row: LongRow) -> list[str]:
        """The size of a block, where half-lives are counted in blocks."""
        if SLOW_DECAY not in row.settings:
            return []
        return [f"state.decay_block_tokens={FRAMES_PER_BLOCK * self.tokens_per_frame}"]

    def _stage2_changes(self, row: LongRow) -> list[str]:
        """Weights to begin with, layers, memory, and what trains."""
        before, window = self.weights_before(row), self.window_of(row)
        memory = ["memory.kind=full"] if window is None else ["memory.kind=window", f"memory.window_frames={window}"]
        memory += [] if window is None else [f"memory.sink_frames={row.window.sink_frames}"]
        is_whole = before is not None and not holds_hybrid_alone(before) and before != STAGE1_WEIGHTS
        return [
            f"init_from={'null' if before is None or is_whole else before}",
            f"checkpoint_path={before if is_whole else 'null'}",
            *(f"hybrid_layers={self.layers_of(row)}", *memory),
            *(["trainable=all"] if row.trains_all else []),
        ]

    def train(self, row: LongRow) -> Result:
        """Train a row if its weights are not there; returns figures of the training.

        Raises:
            OutOfTimeError: the session ended before.
        """
        run, weights = self.path("runs", row.name), self.path("weights", row.name, ".safetensors")
        if not weights.is_file():
            config = self.config(row)
            if not (run / EXPORT).is_dir() and not train(config, self.settings.is_over):
                raise OutOfTimeError
            model = HybridWanModel.from_pretrained(run / f"{EXPORT}_ema")
            weights.parent.mkdir(parents=True, exist_ok=True)
            if row.trains_all:
                keep_gates_in_float32(model, torch.float16)
                save_generator(model, weights)
            else:
                save_hybrid_weights(model, weights, torch.float16)
        lines = read_json_lines(run / "losses.jsonl") if (run / "losses.jsonl").exists() else []
        seconds, tail = [line["seconds"] for line in lines], [line["loss"] for line in lines[-50:] if line["loss"]]
        if not lines:
            return {}  # weights that another machine trained
        return {"steps": len(lines), "seconds": sum(seconds), "last_loss": sum(tail) / max(1, len(tail))}

    # Examining.

    def examine(self, row: LongRow, exams: tuple[Exam, ...] = EXAMS) -> Result:
        """Figures of a row by those of the exams that are of its world, with its bytes of memory.

        Raises:
            OutOfTimeError: the session ended before.
        """
        settings, exams = self.settings, tuple(exam for exam in exams if exam.world is row.world)
        model = read_model(settings.model, self.path("weights", row.name, ".safetensors"), settings.device)
        sampler, window = load_config(Stage2Config, CONFIGS / "long.yaml", []).sampler(), self.window_of(row)
        setup = EvalSetup(model, sampler, window, row.window.sink_frames)
        vae = load_vae(settings.model, device=settings.device)
        encoder = load_text_encoder(settings.model, text_len=self.sizes["text_len"], device=settings.device)
        found: Result = {"memory_bytes": self.memory_bytes(model, row, exams)}
        for exam in exams:
            if settings.is_over():
                raise OutOfTimeError
            probe = LongProbeSettings(
                exam.times,
                settings.exam_videos,
                settings.seed + 1,
                exam.world,
                exam.context,
                batch=settings.exam_batch,
            )
            path = self.path("probes", row.name) / f"{exam.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_records(path, "models") as records:
                figures = run_rows({row.name: setup}, vae, encoder, probe, records)[row.name]
            found[exam.name] = {name: value for name, value in figures.items() if name != "answers"}
        return found

    def memory_bytes(self, model: HybridWanModel, row: LongRow, exams: tuple[Exam, ...]) -> dict[str, int]:
        """Bytes that a model remembers of one video, by length; keys and values as inference keeps them."""
        stride, window = spatial_stride(self.settings.model), self.window_of(row)
        return {
            str(times): model.memory_bytes(
                times * STANDARD_LATENTS,
                HEIGHT // stride,
                WIDTH // stride,
                torch.bfloat16,
                window,
                row.window.sink_frames,
            )
            for times in sorted({exam.times for exam in exams})
        }

    def _made_with(self, row: LongRow) -> Result:
        """What a row's results depend on."""
        settings = self.settings
        videos = settings.short_videos if row.is_short else settings.long_videos
        made_with = {"seed": settings.seed, "steps": settings.steps, "overrides": settings.overrides}
        return made_with | {"row": vars(row), "training_videos": videos, "exam_videos": settings.exam_videos}

    def run_row(self, row: LongRow) -> None:
        """Train and examine a row that has no result, unless another process is at it."""
        with self._claimed(self.path("", row.name).name) as free:
            if not free:
                log.info("%s: another process is at it", row.name)
                return
            made_with = self._made_with(row)
            page = self.path("results", row.name, ".json")
            if read_record(page, made_with, f"move it away, or give another {WORK}") is not None:
                return
            started = time.perf_counter()
            training = self.train(row)
            exams = {} if row.is_short else self.examine(row)
            about = {"name": row.name, "device": device_name(self.settings.device), "torch": torch.__version__}
            write_record(page, made_with, about | {"git_commit": git_commit(), "training": training, "exams": exams})
            log.info("%s: %.0f s in this session", row.name, time.perf_counter() - started)

    def run_curves(self, row: LongRow) -> None:
        """The exams of 64 times the length, for curves; the row must be trained."""
        with self._claimed(f"{self.path('', row.name).name}_curves") as free:
            page = self.path("curves", row.name, ".json")
            made_with = self._made_with(row)
            if free and read_record(page, made_with, f"move it away, or give another {WORK}") is None:
                write_record(page, made_with, {"name": row.name, "exams": self.examine(row, CURVES)})


def rows_of(part: tuple[LongRow, ...], only: list[str]) -> list[LongRow]:
    """Rows of a part, or those of them that are named.

    Raises:
        InputError: a name that no row has.
    """
    unknown = set(only) - {row.name for row in part}
    if unknown:
        raise InputError(f"no row {min(unknown)!r} in this part: choose from {', '.join(row.name for row in part)}")
    return [row for row in part if not only or row.name in only]
