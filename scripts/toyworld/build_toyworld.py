"""Build the toy world's models, step by step; a step that is done is skipped, so the script can be started again.

    python scripts/toyworld/build_toyworld.py --output_folder runs/toyworld                # every step that is not done
    python scripts/toyworld/build_toyworld.py --output_folder runs/toyworld --step teacher # one, again

1. first_vae  a small AutoencoderKLWan
2. vae        the same, trained further on the edges of objects
3. text       a small UMT5
4. first_teacher  a causal transformer, teacher-forced flow matching, full memory
5. teacher    the same, trained further with many first blocks, in which prompts are obeyed
6. few_step   the 4-step generator, regression on the teacher's trajectories
7. bundle     everything in half precision, in diffusers' layout, as models/toyworld ships it

A killed step goes on from where it was at most 500 steps before. Each leaves its weights and a JSON with its quality,
settings, seconds, card and versions in the output folder. A step that was made with other settings, or from models that
were made again since, is not skipped but refused: --step makes it again. One process at a time works on a folder.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import hashlib
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin

from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler
from arl2.toyworld.training.progress import Progress
from arl2.toyworld.training.train_teacher import (
    FEW_STEP,
    PROMPTED,
    TransformerTraining,
    distil_few_step,
    new_transformer,
    train_teacher,
    validation_loss,
)
from arl2.toyworld.training.train_teacher import FIRST as FIRST_TEACHER
from arl2.toyworld.training.train_text import TextTraining, text_quality, train_text
from arl2.toyworld.training.train_vae import FIRST, SHARPENING, VAETraining, train_vae
from arl2.toyworld.training.vae_quality import vae_quality
from arl2.toyworld.world.latents import (
    LatentVideos,
    encode_world,
    load_latent_videos,
    models_of,
    save_latent_videos,
    toy_text_encoder,
    world_tokenizer,
)
from arl2.toyworld.world.scenes import HEIGHT, NUM_FRAMES, WIDTH
from arl2.trained_memory import TrainedMemory
from pipelines.cli import choose_device, entry_point
from pipelines.flags import Parser, as_input, as_path
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.provenance import device_name
from pipelines.records import read_record, write_record
from wan.config import wan_size
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
from wan.utils.files import atomic_folder, check_writable, content_hash
from wan.utils.locks import exclusive
from wan.utils.ranges import Bounds, Count
from wan.vae.wan_vae import load_vae

log = logging.getLogger(__name__)

FEW_STEPS = (1000, 750, 500, 250)
TIMESTEP_SHIFT = 5.0
TRAINING_VIDEOS, VALIDATION_VIDEOS = 24576, 512
VALIDATION_SEED = -5_000_000
Result = dict[str, Any]
Settings = TypeVar("Settings", bound=VAETraining | TextTraining | TransformerTraining)
TEXT = TextTraining()
SIZES = ("batch", "openings", "captions")


@dataclass(frozen=True)
class Build:
    """What every step is given.

    Attributes:
        work: folder of the steps' results.
        device: where to compute.
        steps: optimiser steps in the place of a step's own.
        most_videos: cap on every number of videos, for rehearsals.
        vae: folder of a trained VAE to take in the place of that of the first steps.
    """

    work: Path
    device: torch.device
    steps: int | None = None
    most_videos: int = TRAINING_VIDEOS
    vae: Path | None = None

    def videos(self, number: int) -> int:
        """`number`, capped."""
        return min(number, self.most_videos)

    def progress(self, name: str, settings: Any, every: int = Progress.every) -> Progress:
        """What keeps a step's training, for it to go on after it was killed."""
        return Progress(self.work / f"{name}.partial", every, asdict(settings))

    def settings(self, default: Settings) -> Settings:
        """A step's settings, with the steps and the batch that this build takes."""
        capped: dict[str, Any] = {name: self.videos(value) for name, value in asdict(default).items() if name in SIZES}
        changed = replace(default, **capped)
        return changed if self.steps is None else replace(changed, steps=self.steps)


def few_step_sampler() -> FewStepSampler:
    """The steps of the shipped generator, as at 1.3B."""
    return FewStepSampler.from_steps(FEW_STEPS, TIMESTEP_SHIFT)


def save_model(model: ModelMixin, folder: Path) -> None:
    """Write a model's folder; under its name there is a whole one or none."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)


def report_since(started: float) -> Callable[..., None]:
    """Log a step's number, its seconds and its figures."""

    def report(step: int, *figures: float) -> None:
        log.info("step %d, %.0f s: %s", step, time.perf_counter() - started, ", ".join(f"{x:.4f}" for x in figures))

    return report


def train_and_measure_vae(build: Build, name: str, settings: VAETraining, start: AutoencoderKLWan | None) -> Result:
    """Train a VAE and keep it under a name."""
    kept = build.progress(name, settings)
    report, videos = report_since(time.perf_counter()), build.videos(64)
    vae = train_vae(settings, build.device, report, videos, kept, start)
    save_model(vae.model, build.work / name)
    kept.finish()
    drop_latents(build)
    videos = build.videos(256)
    return {"quality": vae_quality(vae, build.device, videos, min(videos, 16))}


def build_first_vae(build: Build) -> Result:
    """Train the VAE."""
    return train_and_measure_vae(build, "first_vae", build.settings(FIRST), None)


def build_vae(build: Build) -> Result:
    """Train the VAE further, on the edges of objects."""
    start = built(build, "first_vae")
    return train_and_measure_vae(build, "vae", build.settings(SHARPENING), load_vae(start).model.requires_grad_(True))


def built(build: Build, name: str) -> Path:
    """The folder of an earlier step's result.

    Raises:
        InputError: that step is not done.
    """
    if not (build.work / name).is_dir():
        raise InputError(f"no {name} in {build.work}: run the step {name} first")
    return build.work / name


def vae_folder(build: Build) -> Path:
    """The VAE to build on."""
    return build.vae or built(build, "vae")


def drop_latents(build: Build) -> None:
    """Forget encoded videos: what encoded them has just been replaced."""
    for file in build.work.glob("latents_*.safetensors"):
        log.info("%s is dropped: it is of former weights", file)
        file.unlink()


def world_data(build: Build, videos: int, first_seed: int = 0) -> LatentVideos:
    """Videos through the trained VAE, with embedded captions; kept, for the steps that follow."""
    videos = build.videos(videos)
    file = build.work / f"latents_{videos}_from_{first_seed}.safetensors"
    vae, encoder = load_vae(vae_folder(build), device=build.device), trained_text_encoder(build)
    made_by = models_of(vae, encoder)
    if not file.is_file():
        save_latent_videos(encode_world(vae, encoder, videos, first_seed), file, made_by)
    return load_latent_videos(file, build.device, made_by)


def load_transformer(build: Build, name: str) -> HybridWanModel:
    """A transformer of an earlier step."""
    model = HybridWanModel.from_pretrained(built(build, name))
    return model.to(build.device)


def build_text(build: Build) -> Result:
    """Train the text encoder."""
    settings = build.settings(TEXT)
    encoder = toy_text_encoder(settings.seed)
    encoder.model.to(build.device)
    reader = train_text(encoder, settings, report_since(time.perf_counter()))
    quality = text_quality(encoder, reader)
    with atomic_folder(build.work / "text") as temporary:
        encoder.model.save_pretrained(temporary / "text_encoder")
        world_tokenizer().save_pretrained(temporary / "tokenizer")
    drop_latents(build)
    return {"quality": quality}


def trained_text_encoder(build: Build) -> TextEncoder:
    """The text encoder of an earlier step."""
    return load_text_encoder(built(build, "text"), text_len=wan_size("toy")["text_len"], device=build.device)


def train_and_measure_teacher(build: Build, name: str, settings: TransformerTraining, start: HybridWanModel) -> Result:
    """Train a multi-step transformer and keep it under a name."""
    started = time.perf_counter()
    data = world_data(build, TRAINING_VIDEOS)
    encoding = time.perf_counter() - started
    kept = build.progress(name, settings)
    model = train_teacher(start, settings, data, report_since(time.perf_counter()), kept)
    save_model(model, build.work / name)
    kept.finish()
    held_out = world_data(build, VALIDATION_VIDEOS, VALIDATION_SEED)
    quality = {"validation_loss": validation_loss(model, held_out, settings.shift)}
    return {"encoding_seconds": encoding, "quality": quality}


def build_first_teacher(build: Build) -> Result:
    """Train the multi-step transformer."""
    settings = build.settings(FIRST_TEACHER)
    return train_and_measure_teacher(build, "first_teacher", settings, new_transformer(settings.seed))


def build_teacher(build: Build) -> Result:
    """Train it further on first blocks."""
    start = load_transformer(build, "first_teacher")
    return train_and_measure_teacher(build, "teacher", build.settings(PROMPTED), start)


def build_few_step(build: Build) -> Result:
    """Distil the few-step generator."""
    settings = build.settings(FEW_STEP)
    teacher = load_transformer(build, "teacher")
    data = world_data(build, TRAINING_VIDEOS)
    losses: list[float] = []
    report = report_since(time.perf_counter())

    def keep(step: int, loss: float) -> None:
        losses.append(loss)
        report(step, loss)

    kept = build.progress("few_step", settings, every=100)
    student = distil_few_step(settings, teacher, data, few_step_sampler(), keep, kept)
    student.set_trained_memory(TrainedMemory(num_frames=data.latents_NFCHW.shape[1]))
    save_model(student, build.work / "few_step")
    kept.finish()
    return {"quality": {"trajectory_loss": losses[-1], "losses": losses}}


def build_bundle(build: Build) -> Result:
    """Put the parts together as they ship."""
    work, encoder = build.work, trained_text_encoder(build)
    transformer = load_transformer(build, "few_step").cpu().half()
    transformer.register_to_config(_name_or_path="")  # the folder it was loaded from concerns nobody
    pipeline = CausalVideoPipeline(
        transformer,
        torch.nn.Module.half(load_vae(vae_folder(build)).model),
        encoder.model.cpu().half(),
        encoder.tokenizer,
        denoising_steps=FEW_STEPS,
        timestep_shift=TIMESTEP_SHIFT,
        height=HEIGHT,
        width=WIDTH,
        num_frames=NUM_FRAMES,
    )
    save_model(pipeline, work / "bundle")
    size = sum(file.stat().st_size for file in (work / "bundle").rglob("*") if file.is_file())
    return {"quality": {"bytes": size}}


VAE_STEPS = ("first_vae", "vae")
STEPS: dict[str, Callable[[Build], Result]] = {
    "first_vae": build_first_vae,
    "vae": build_vae,
    "text": build_text,
    "first_teacher": build_first_teacher,
    "teacher": build_teacher,
    "few_step": build_few_step,
    "bundle": build_bundle,
}
TRAININGS: dict[str, VAETraining | TextTraining | TransformerTraining] = {
    "first_vae": FIRST,
    "vae": SHARPENING,
    "text": TEXT,
    "first_teacher": FIRST_TEACHER,
    "teacher": PROMPTED,
    "few_step": FEW_STEP,
}
MADE_FROM = {
    "vae": ("first_vae",),
    "first_teacher": ("vae", "text"),
    "teacher": ("vae", "text", "first_teacher"),
    "few_step": ("vae", "text", "teacher"),
    "bundle": ("vae", "text", "few_step"),
}


def made_with(build: Build, name: str) -> Result:
    """What a step's result depends on: its settings, and the models that it begins with.

    Raises:
        InputError: a step before it is not done.
    """
    settings = asdict(build.settings(TRAININGS[name])) if name in TRAININGS else {}
    inputs = {one: vae_folder(build) if one == "vae" else built(build, one) for one in MADE_FROM.get(name, ())}
    return settings | {"made_from": {one: weights_hash(folder) for one, folder in inputs.items()}}


def weights_hash(folder: Path) -> str:
    """Hash of all weights in a folder."""
    hashes = [f"{file.relative_to(folder)} {content_hash(file)}" for file in sorted(folder.rglob("*.safetensors"))]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]


def run_steps(build: Build, only: str | None) -> None:
    """Run the steps that are not done, or one.

    Raises:
        InputError: a step that is done was made with other settings or from other models, or its page is damaged.
    """
    for name, step in STEPS.items():
        page = build.work / f"{name}.json"
        if only not in (None, name) or (build.vae is not None and name in VAE_STEPS):
            continue
        settings = made_with(build, name)
        if only is None and read_record(page, settings, f"make it again with --step {name}") is not None:
            continue
        started = time.perf_counter()
        result = step(build)
        result |= {
            "seconds": time.perf_counter() - started,
            "device": device_name(build.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_record(page, settings, result)
        log.info("%s: %s", name, result["quality"])


@entry_point()
def main() -> int:
    """Parse, and run the steps that are not done."""
    parser = Parser(__doc__, aliases={"--videos": "--num_videos", "--work": "--output_folder"})
    parser.add_argument("--output_folder", type=as_path, required=True, metavar="PATH", help="of the steps' results")
    parser.add_argument("--step", choices=STEPS, help="only this one, again if it is done")
    parser.add_value("--steps", Count, "optimiser steps in the place of the default, with --step")
    videos = "at most, everywhere; few for a rehearsal"
    parser.add_value("--num_videos", Annotated[int, Bounds(1, 10**7)], videos, default=TRAINING_VIDEOS)
    trained = "folder of a trained VAE, such as models/toyworld/vae: trains none"
    parser.add_argument("--vae", type=as_input, metavar="PATH", help=trained)
    parser.add_device(None)
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.step is None and arguments.num_videos == TRAINING_VIDEOS:
        raise InputError("--steps needs --step, but for a rehearsal with --num_videos")
    device = choose_device(arguments.device)
    check_writable(arguments.output_folder)
    with exclusive(arguments.output_folder / ".lock", str(arguments.output_folder)):
        build = Build(arguments.output_folder, device, arguments.steps, arguments.num_videos, arguments.vae)
        run_steps(build, arguments.step)
    log.info("models and their figures are in %s", arguments.output_folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
