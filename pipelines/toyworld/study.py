"""Making, examining and keeping the models of the toy world's study of distillation; see `arl2.toyworld.study.rows`.

    work/latents_<n>_from_0.safetensors    training videos, kept in the device's memory while training
    work/study/results/<row>.json          everything known of a row; a row that has one is done
    work/study/weights/<row>.safetensors   what was trained, in half precision
    work/study/runs/<row>/                 the trainer's folder; its checkpoints go once the weights are kept

Rows of another seed than 0 have `.seed<n>` behind their names. Stage 1 is that of seed 0 for all.

Several processes may work on one folder, on one GPU or many: each takes the next row that no other has taken.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from arl2.checkpoint import build_hybrid, plan_hybrid, save_hybrid_weights
from arl2.distillation.checkpointing import copy_tensors_
from arl2.distillation.data import ResidentLatents
from arl2.distillation.objective import Objective
from arl2.distillation.stage1 import stage1_parameters
from arl2.distillation.stage2 import stage2_parameters
from arl2.distillation.trainer import CHECKPOINTS, LOSSES, Trainer
from arl2.evaluation.eval_setup import EvalSetup
from arl2.layer_selection.gates import LayerGates
from arl2.layer_selection.scores import Selection, read_stage1_errors, replacement_scores
from arl2.model import HybridSettings, HybridWanModel
from arl2.statement import GATES
from arl2.toyworld.probe.memory_benchmark import (
    MemoryBenchmark,
    MemoryBenchmarkSettings,
    equal_memory_window,
)
from arl2.toyworld.study.ablations import Variant, install
from arl2.toyworld.study.objectives import NoisyWriteStage2, WindowStudent
from arl2.toyworld.study.rows import PARTS, Kind, Row, Window
from arl2.toyworld.world.latents import encode_world, models_of, require_same_models, save_latent_videos
from arl2.toyworld.world.render import STRIDE
from arl2.toyworld.world.scenes import HEIGHT, NUM_FRAMES, WIDTH
from arl2.trained_memory import TrainedMemory
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.console.shipped import ROOT
from pipelines.provenance import architecture_of, device_name, git_commit, text_fingerprints, vae_fingerprint
from pipelines.records import SETTINGS, claimed, read_record, write_record
from pipelines.settings import load_config
from pipelines.training.config import (
    GatesConfig,
    Stage1Config,
    Stage2Config,
    TrainingConfig,
    check_training,
    read_layers,
)
from pipelines.training.run import new_accelerator, new_objective, new_trainer
from wan.checkpoints.formats import read_transformer, transformer_config
from wan.checkpoints.loading import as_state_dict, fingerprint_of_file, read_weights
from wan.checkpoints.saving import write_safetensors
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
from wan.utils.files import read_json
from wan.vae.wan_vae import WanVAE, load_vae, spatial_stride

log = logging.getLogger(__name__)

CONFIGS = ROOT / "configs" / "toyworld"
WORK = "--output_folder"
Result = dict[str, Any]
Config = TypeVar("Config", bound=TrainingConfig)


class OutOfTimeError(Exception):
    """The time of this session is over; everything is kept, and the next one goes on."""


@dataclass(frozen=True)
class StudySettings:
    """What a session is given.

    Attributes:
        work: folder of everything.
        model: the toy world's bundle.
        device: where to compute.
        training_videos: how many are drawn, if there is no file of them yet.
        exam: how large exams are.
        seed: of stage 2.
        steps: of every training but stage 1, in the place of the config's.
        stage1_steps: of stage 1.
        overrides: further settings of every training, `key=value`.
        layers_file: of scripts/select_layers.py, in the place of stage 1's errors.
        deadline: when to stop, on the clock of `time.monotonic`.
    """

    work: Path
    model: Path
    device: torch.device
    training_videos: int = 24576
    exam: MemoryBenchmarkSettings = field(default_factory=MemoryBenchmarkSettings)
    seed: int = 0
    steps: int | None = None
    stage1_steps: int | None = None
    overrides: tuple[str, ...] = ()
    layers_file: Path | None = None
    deadline: float = math.inf

    @property
    def folder(self) -> Path:
        """Of what is to be kept."""
        return self.work / "study"

    def is_over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.deadline


class Study:
    """Makes what is missing; see the module.

    Args:
        settings: see there.
    """

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self._exam_seconds = 0.0

    def path(self, kind: str, name: str, suffix: str = "") -> Path:
        """Of a row's file or folder; stage 1 is that of seed 0."""
        seed = self.settings.seed if name != "stage1" else 0
        return self.settings.folder / kind / (name + (f".seed{seed}" if seed else "") + suffix)

    def result(self, name: str, made_with: Result) -> Result | None:
        """What is known of a row, if it is done.

        Raises:
            InputError: its file is damaged, or was made with other settings.
        """
        return read_record(self.path("results", name, ".json"), made_with, f"move it away, or give another {WORK}")

    def keep(self, name: str, result: Result, made_with: Result) -> None:
        """Write a row's result, and what it was made with."""
        card = device_name(self.settings.device)
        about = {"name": name, "seed": self.settings.seed, "device": card, "torch": torch.__version__}
        write_record(self.path("results", name, ".json"), made_with, result | about | {"git_commit": git_commit()})

    @cached_property
    def models(self) -> Result:
        """Fingerprints of the bundle's models."""
        vae, encoder = self._encoders(torch.device("cpu"))
        weights = read_transformer(self.settings.model)
        return {
            "transformer": fingerprint_of_file(weights.state),
            "architecture": architecture_of(plan_hybrid(weights, self.sizes, HybridSettings()).model),
            "vae": vae_fingerprint(vae),
            **text_fingerprints(encoder),
        }

    def training_settings(self, name: str = "") -> Result:
        """What a training depends on, but for its row; that of stage 1 for its name."""
        settings = self.settings
        steps = settings.stage1_steps if name == "stage1" else settings.steps
        seed = 0 if name == "stage1" else settings.seed
        return {"models": self.models, "steps": steps, "seed": seed, "overrides": settings.overrides}

    def row_settings(self, row: Row) -> Result:
        """What a row's training depends on."""
        return self.training_settings() | {"row": vars(row) | {"layers": self.layers_of(row)}}

    def exam_settings(self) -> Result:
        """What an exam depends on."""
        exam = {name: value for name, value in vars(self.settings.exam).items() if name != "batch"}
        return {"models": self.models, "exam": exam}

    @contextmanager
    def claimed(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Keep other processes off a row; see `claimed`."""
        with claimed(self.path("locks", name), name, wait) as free:
            yield free

    # What all rows share.

    def make_data(self) -> Path:
        """The file of training videos, made if there is none."""
        settings = self.settings
        with claimed(settings.work / ".data.lock", "training videos", wait=True):
            found = sorted(settings.work.glob("latents_*_from_0.safetensors"))
            if not found:
                return self._encode()
            file = max(found, key=lambda path: path.stat().st_size)
            require_same_models(file, models_of(*self._encoders(torch.device("cpu"))))
            return file

    def _encoders(self, device: torch.device) -> tuple[WanVAE, TextEncoder]:
        folder = self.settings.model
        encoder = load_text_encoder(folder, text_len=self.sizes["text_len"], device=device)
        return load_vae(folder, device=device), encoder

    def _encode(self) -> Path:
        settings = self.settings
        started = time.perf_counter()
        vae, encoder = self._encoders(settings.device)
        file = settings.work / f"latents_{settings.training_videos}_from_0.safetensors"
        save_latent_videos(encode_world(vae, encoder, settings.training_videos), file, models_of(vae, encoder))
        log.info("%d videos encoded in %.0f s", settings.training_videos, time.perf_counter() - started)
        return file

    @cached_property
    def data_file(self) -> Path:
        """See `make_data`."""
        return self.make_data()

    @cached_property
    def data(self) -> ResidentLatents:
        """The training videos."""
        return ResidentLatents(self.data_file, self.settings.device)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """Of the transformer."""
        return transformer_config(self.settings.model)

    @cached_property
    def exam(self) -> MemoryBenchmark:
        """The exam, with what the teacher makes of it."""
        settings = self.settings
        vae, encoder = self._encoders(settings.device)
        teacher = EvalSetup(self.build(HybridSettings(), torch.float32), self.config(Stage2Config, "teacher").sampler())
        return MemoryBenchmark(vae, encoder, teacher, settings.exam)

    def build(self, hybrid: HybridSettings, dtype: torch.dtype) -> HybridWanModel:
        """The generator with some hybrid layers, frozen; what is new is untrained."""
        settings = self.settings
        weights = read_transformer(settings.model)
        return build_hybrid(
            weights,
            self.sizes,
            hybrid,
            dtype=dtype,
            device=settings.device,
            seed=settings.seed,
            to_be_trained=True,
        )[0]

    def config(self, kind: type[Config], name: str, changes: tuple[str, ...] = ()) -> Config:
        """A training's config: that of configs/toyworld, and what the study changes."""
        settings = self.settings
        stage = {Stage1Config: "stage1", Stage2Config: "stage2", GatesConfig: "gates"}[kind]
        steps = settings.stage1_steps if kind is Stage1Config else settings.steps
        fixed = [
            *(f"model_folder={settings.model}", f"run_folder={self.path('runs', name)}", "tracker=none"),
            *("sample_every=0", "save_every=200", "keep=1", f"device={settings.device}", f"seed={settings.seed}"),
            *([f"init_from={self.path('weights', 'stage1', '.safetensors')}"] if kind is not Stage1Config else []),
            *([f"steps={steps}"] if steps is not None else []),
        ]
        config = load_config(kind, CONFIGS / f"{stage}.yaml", [*fixed, *changes, *settings.overrides])
        return replace(config, report_every=config.steps, seed=0 if kind is Stage1Config else settings.seed)

    # Training.

    def train(self, name: str, config: TrainingConfig, objective: Objective) -> tuple[Trainer, Result]:
        """Train to the end, from where an earlier session stopped.

        Raises:
            OutOfTimeError: the session ended before.
        """
        trainer = new_trainer(config, self.data, new_accelerator(config), objective)
        if not trainer.run(self.settings.is_over):
            raise OutOfTimeError
        lines = [json.loads(line) for line in (Path(config.run_folder) / LOSSES).read_text().splitlines()]
        tail = [line["loss"] for line in lines[-max(1, len(lines) // 20) :] if line["loss"] is not None]
        seconds = [line["seconds"] for line in lines]
        training = {
            "steps": config.steps,
            "batch": config.batch,
            "seconds": sum(seconds),
            "seconds_a_step": sorted(seconds)[len(seconds) // 2],
            "last_loss": sum(tail) / len(tail),
            "metrics": objective.metrics(),
        }
        log.info("%s: %d steps, %.0f s, loss %.4g", name, config.steps, sum(seconds), training["last_loss"])
        return trainer, training

    def keep_weights(self, name: str, values: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> None:
        """Write what was trained."""
        kept = {
            key: value.detach().to(torch.float32 if key.endswith(GATES) else dtype).cpu()
            for key, value in values.items()
        }
        write_safetensors(self.path("weights", name, ".safetensors"), kept, {})

    def stage1(self) -> None:
        """Train all layers by stage 1, or wait until another process has."""
        with self.claimed("stage1", wait=True):
            if self.result("stage1", self.training_settings("stage1")) is None:
                self._stage1()

    def _stage1(self) -> None:
        config = self.config(Stage1Config, "stage1")
        config.data = [str(self.data_file)]
        check_training(config, self.data)
        model = install(self.build(config.hybrid(self.sizes["num_layers"]), self.training_dtype), Variant.PLAIN)
        trainer, training = self.train("stage1", config, new_objective(config, model))
        self.keep_weights("stage1", trainer.state.trainables, torch.float32)
        report = sorted((self.path("runs", "stage1") / "reports").glob("step-*.json"))[-1]
        result = {"training": training, "layers": read_json(report)["layers"]}
        self.keep("stage1", result, self.training_settings("stage1"))
        shutil.rmtree(self.path("runs", "stage1") / CHECKPOINTS)

    @property
    def training_dtype(self) -> torch.dtype:
        """Of frozen weights."""
        return torch.bfloat16 if self.settings.device.type == "cuda" else torch.float32

    def layers_of(self, row: Row) -> list[int]:
        """A row's hybrid layers.

        Raises:
            InputError: stage 1 is not done.
        """
        if row.layers or row.share == 100 or row.kind in (Kind.SOFTMAX, Kind.WINDOW):
            return list(row.layers) or list(range(self.sizes["num_layers"] if row.share == 100 else 0))
        if self.settings.layers_file is not None:
            return read_layers(self.settings.layers_file, row.share, self.sizes["num_layers"])
        page = self.path("results", "stage1", ".json")
        if not page.is_file():
            raise InputError(f"no {page}: run --part stage1 first, which says which layers to convert")
        return Selection("stage1_error", read_stage1_errors(page, self.sizes["num_layers"])).layers(row.share)

    def row_config(self, row: Row) -> Stage2Config:
        """Stage 2 of a row."""
        changes = (*row.settings, f"hybrid_layers={self.layers_of(row) or [0]}")
        return self.config(Stage2Config, row.name, changes)

    def hybrid_of(self, row: Row, config: Stage2Config) -> HybridSettings:
        """A row's hybrid layers and adapters."""
        if row.kind in (Kind.SOFTMAX, Kind.WINDOW):
            return HybridSettings()
        hybrid = config.hybrid(self.sizes["num_layers"])
        return replace(hybrid, lora_rank=None) if row.kind is Kind.STAGE1 else hybrid

    def objective_of(self, row: Row, config: Stage2Config) -> Objective:
        """What a row's training minimises."""
        model = install(self.build(self.hybrid_of(row, config), self.training_dtype), row.variant)
        setup = self.setup(row, model)
        if row.kind is Kind.STAGE2 and setup.window_frames is not None:
            config.memory = MemoryConfig(MemoryKind.window, setup.window_frames, setup.sink_frames)
        if row.kind is Kind.WINDOW:
            teacher = self.build(HybridSettings(), self.training_dtype)
            assert setup.window_frames is not None
            settings = config.objective_settings()
            return WindowStudent(model, teacher, settings, setup.window_frames, setup.sink_frames)
        if row.variant is Variant.NOISY_WRITES:
            config.levels.per_block = len(config.denoising_steps)
            return NoisyWriteStage2(model, config.objective_settings())
        return new_objective(config, model)

    def train_row(self, row: Row) -> Result:
        """Train a row if its weights are not there; returns figures of the training."""
        page, made_with = self.path("weights", row.name, ".json"), self.row_settings(row)
        training = read_record(page, made_with, f"move it away, or give another {WORK}")
        if training is not None:
            return {name: value for name, value in training.items() if name != SETTINGS}
        config = self.row_config(row)
        config.data = [str(self.data_file)]
        check_training(config, self.data)
        trainer, training = self.train(row.name, config, self.objective_of(row, config))
        self.keep_weights(row.name, trainer.state.ema or trainer.state.trainables)
        if any(other.kind is Kind.RAW and other.of == row.name for rows in PARTS.values() for other in rows):
            self.keep_weights(f"{row.name}.raw", trainer.state.trainables)
        write_record(page, made_with, training)
        shutil.rmtree(self.path("runs", row.name) / CHECKPOINTS)
        return training

    # Examining.

    def setup(self, row: Row, model: HybridWanModel) -> EvalSetup:
        """A model as a row is sampled."""
        stride, layers = spatial_stride(self.settings.model), round(self.sizes["num_layers"] * 0.75)
        tokens = model.tokens_per_frame(HEIGHT // stride, WIDTH // stride)
        trained = (NUM_FRAMES - 1) // STRIDE + 1
        equal = equal_memory_window(model, layers, trained, tokens)
        sampler = self.config(Stage2Config, row.name).sampler()
        return EvalSetup(model, sampler, row.window.frames(equal, trained), row.window.sink_frames)

    def model_of(self, row: Row) -> HybridWanModel:
        """A row's model with what was trained, in float32."""
        model = install(self.build(self.hybrid_of(row, self.row_config(row)), torch.float32), row.variant)
        if row.kind is Kind.SOFTMAX:
            return model
        others = {Kind.STAGE1: "stage1", Kind.RAW: f"{row.of}.raw", Kind.AGAIN: row.of}
        name = others.get(row.kind, row.name)
        file = self.path("weights", name, ".safetensors")
        if row.of:
            with self.claimed(row.of, wait=True):
                pass  # another process may be training it
        if not file.is_file():
            raise InputError(f"no {file}: run the part that trains {name} first")
        targets = dict(model.named_parameters()) if row.kind is Kind.WINDOW else stage2_parameters(model)
        state = as_state_dict(read_weights(file), file)
        copy_tensors_(targets, {key: value for key, value in state.items() if key in targets or row.trains}, file)
        return model

    def examine(self, row: Row, training: Result | None) -> Result:
        """Take the exam, and keep the result.

        Raises:
            OutOfTimeError: no exam fits into what is left of the session.
        """
        if time.monotonic() + self._exam_seconds > self.settings.deadline:
            raise OutOfTimeError
        started = time.perf_counter()
        model = self.model_of(row)
        setup, real = self.setup(row, model), self.exam.probe.latents_BFCHW
        result: Result = {"row": vars(row) | {"layers": self.layers_of(row)}, "training": training}
        for times in (1, 4):  # keys and values as inference keeps them
            frames, height, width = real.shape[1] * times, real.shape[3], real.shape[4]
            memory = model.memory_bytes(frames, height, width, torch.bfloat16, setup.window_frames, setup.sink_frames)
            result[f"memory_bytes_{times}x"] = memory
        result |= {"window_frames": setup.window_frames, "sink_frames": setup.sink_frames}
        result |= {"exam": self.exam.take(setup, row.noise_seed), "exam_settings": vars(self.settings.exam)}
        seconds = time.perf_counter() - started
        self._exam_seconds = seconds
        self.keep(row.name, result | {"exam_seconds": seconds}, self.row_settings(row) | self.exam_settings())
        log.info("%s: examined in %.0f s", row.name, seconds)
        return result

    def run_row(self, row: Row) -> None:
        """Train and examine a row that has no result, unless another process is at it."""
        with self.claimed(row.name) as free:
            if not free:
                log.info("%s: another process is at it", row.name)
            elif self.result(row.name, self.row_settings(row) | self.exam_settings()) is None:
                self.examine(row, self.train_row(row) if row.trains else None)

    def run_ceilings(self) -> None:
        """The probe on the videos themselves."""
        with self.claimed("ceilings") as free:
            if free and self.result("ceilings", self.exam_settings()) is None:
                self.keep("ceilings", {"ceilings": self.exam.ceilings()}, self.exam_settings())

    # Choosing layers.

    def replacement(self, videos: int = 64) -> dict[int, float]:
        """Scores by replacing one layer at a time, after stage 1."""
        model = self.build(HybridSettings(tuple(range(self.sizes["num_layers"]))), torch.float32)
        install(model, Variant.PLAIN)
        file = self.path("weights", "stage1", ".safetensors")
        copy_tensors_(stage1_parameters(model), as_state_dict(read_weights(file), file), file)
        probe, sampler = self.exam.probe, self.config(Stage2Config, "replacement").sampler()
        rows = slice(0, videos)
        blocks = probe.frames // self.config(Stage2Config, "replacement").frames_per_block
        scores = replacement_scores(
            model, sampler, probe.text_BTD[rows], lambda block, step: probe.noise(False, block, step)[rows], blocks
        )
        return {layer: sum(values) / len(values) for layer, values in scores.items()}

    def gates(self) -> tuple[dict[int, float], Result]:
        """Scores by trained layer gates."""
        config = self.config(GatesConfig, "gates")
        config.data = [str(self.data_file)]
        check_training(config, self.data)
        model = self.build(config.hybrid(self.sizes["num_layers"]), self.training_dtype)
        objective = new_objective(config, model)
        assert isinstance(objective, LayerGates)
        _, training = self.train("gates", config, objective)
        return {layer: 1 - share for layer, share in objective.probabilities().items()}, training

    # Shipping.

    def export(self, row: Row) -> Path:
        """Write what a row has more than the generator, in half precision, as `checkpoint_path` takes it.

        Raises:
            InputError: a row of another layer than the product's.
        """
        if row.variant is not Variant.PLAIN or row.window is not Window.FULL:
            raise InputError(f"{row.name} has other layers than inference.py: export a plain hybrid")
        file = self.path("export", row.name, ".safetensors")
        model = self.model_of(row)
        model.mark_trained(TrainedMemory(num_frames=self.data[0][0].shape[0]))
        save_hybrid_weights(model, file, torch.float16)
        return file
