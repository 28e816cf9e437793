"""The memory probe at any length: its models, its file of results, and its tables.

Results of each row are kept by video as they come. A run that is started again makes what is missing: rows, or videos
of a row; rows whose model has changed are made again.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from arl2.checkpoint import build_hybrid, read_generator
from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import FewStepSampler
from arl2.toyworld.probe.long_probe import SEEDS_PER_SET, STANDARD_LATENTS, Context, make_long_probe, probe_videos
from arl2.toyworld.probe.long_report import report
from arl2.toyworld.probe.passes import Answer
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, STANDARD_HIDDEN_FRAMES
from arl2.toyworld.world.worlds import World
from arl2.trained_memory import describe_memory
from pipelines.provenance import architecture_of, device_name, text_fingerprints, vae_fingerprint
from pipelines.records import CURE, Record, Records
from wan.checkpoints.formats import transformer_config
from wan.checkpoints.loading import fingerprint_of
from wan.text import TextEncoder
from wan.utils.errors import InputError
from wan.utils.settings import differences, plain
from wan.vae.wan_vae import WanVAE

log = logging.getLogger(__name__)

VAE_ROW = "vae"
"""Row of the true frames through the VAE, which bounds all others."""
ANSWERS = "answers"
SHOWN_PASSES = (1, 2, 3, 5, 10, 20, 40)
MAX_CHECKED_LATENTS = 4 * STANDARD_LATENTS
"""Length up to which the questions are counted before the work."""


@dataclass(frozen=True)
class LongProbeSettings:
    """A long probe.

    Attributes:
        times: length of the videos, as a multiple of STANDARD_LATENTS.
        videos: number of videos.
        seed: of the set of scenes and of the noise.
        world: kind of scenes.
        context: what models remember.
        hidden_frames: lower bound on hidden frames in the standard world.
        batch: videos at once; affects only speed.
    """

    times: int
    videos: int = 24
    seed: int = 0
    world: World = World.STANDARD
    context: Context = Context.OWN
    hidden_frames: int = STANDARD_HIDDEN_FRAMES
    batch: int = 8

    def __post_init__(self) -> None:
        if self.videos > SEEDS_PER_SET:
            raise InputError(
                f"--num_videos {self.videos} is more than the {SEEDS_PER_SET} of a seed: use several seeds"
            )

    @property
    def latents(self) -> int:
        """Length of the videos in latent frames."""
        return self.times * STANDARD_LATENTS

    def identity(self) -> Record:
        """Settings that answers depend on."""
        named = ("times", "seed", "world", "context", "hidden_frames")
        return plain({name: getattr(self, name) for name in named})


def read_model(folder: Path, weights: str | Path, device: torch.device) -> HybridWanModel:
    """Build a transformer of the toy world from weights of any format, in float32."""
    read = read_generator(folder, weights)
    return build_hybrid(read, transformer_config(folder), HybridSettings(), dtype=torch.float32, device=device)[0]


def bundled_hybrids(folder: Path, device: torch.device) -> dict[str, HybridWanModel]:
    """Hybrids that lie beside the bundle's models, by name."""
    return {file.stem: read_model(folder, file, device) for file in sorted(folder.glob("*.safetensors"))}


def rows_of(
    generator: HybridWanModel, sampler: FewStepSampler, hybrids: Mapping[str, HybridWanModel]
) -> dict[str, EvalSetup | None]:
    """Rows of the table.

    Args:
        generator: softmax model, once with full memory, and with the hybrids' windows, without and with a sink.
        sampler: denoising steps of all.
        hybrids: models with the memory that is stored with their weights. One that was trained with full memory also
            gets a row with a window of the length trained on, since longer distances do harm.
    """
    rows: dict[str, EvalSetup | None] = {VAE_ROW: None, "teacher": EvalSetup(generator, sampler)}
    windows: set[int] = set()
    for name, model in hybrids.items():
        trained = model.trained_memory
        window = trained.window_frames if trained is not None else None
        rows[name] = EvalSetup(model, sampler, window, trained.sink_frames if trained is not None else 0)
        if window is None:
            window = trained.num_frames if trained is not None and trained.num_frames else STANDARD_LATENTS
            rows[f"{name}_window_{window}"] = EvalSetup(model, sampler, window)
        windows.add(window)
    for window in sorted(windows or {STANDARD_LATENTS}):
        rows[f"window_{window}"] = EvalSetup(generator, sampler, window)
        if window >= 2 * FRAMES_PER_BLOCK:
            rows[f"window_{window}_sink"] = EvalSetup(generator, sampler, window, FRAMES_PER_BLOCK)
    return rows


def run_rows(
    rows: Mapping[str, EvalSetup | None],
    vae: WanVAE,
    encoder: TextEncoder,
    settings: LongProbeSettings,
    records: Records,
) -> dict[str, Record]:
    """Answer what the file does not hold yet.

    Args:
        rows: models by name; None for the VAE alone.
        vae, encoder: VAE and text encoder of the toy world.
        settings: what is asked.
        records: the file, whose rows are added to.

    Returns:
        the rows, by name.

    Raises:
        InputError: the file was made with other settings, or the videos are too short to ask anything.
    """
    records.made_with(settings.identity() | {"vae": vae_fingerprint(vae), **text_fingerprints(encoder)})
    _require_questions(encoder, settings)
    records.page |= {"videos": settings.videos, "device": device_name(vae.device), "torch": torch.__version__}
    results = {}
    for name, setup in rows.items():
        made_with = _made_with(setup)
        record = _known(records.find(name), made_with)
        for videos in _missing(record, settings):
            started = time.perf_counter()
            probe = make_long_probe(
                encoder, settings.world, settings.seed, videos, settings.latents, settings.hidden_frames
            )
            answers = probe_videos(setup, vae, probe, settings.context)
            for video, answered in zip(videos, answers, strict=True):
                record[ANSWERS][str(video)] = [" ".join(map(str, answer)) for answer in answered]
            records.put(name, _with_figures(record, settings))
            log.info("%s: videos %s in %.0f s", name, videos, time.perf_counter() - started)
        results[name] = _with_figures(record, settings)
        records.put(name, results[name])
    return results


def _known(record: Record | None, made_with: Record) -> Record:
    """What the file holds of a row that was made with the model of now; an empty row if there is none."""
    known: Record = {"made_with": made_with, ANSWERS: {}}
    if record is None or not isinstance(record.get("made_with"), dict) or not isinstance(record.get(ANSWERS), dict):
        return known
    return known if differences(record["made_with"], made_with) else known | {ANSWERS: record[ANSWERS]}


def _parsed(lines: Sequence[str]) -> list[Answer]:
    """Answers of a video, which the file holds as lines of numbers.

    Raises:
        InputError: they are damaged.
    """
    try:
        return [Answer(*map(int, line.split())) for line in lines]
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"answers in the file of results are damaged ({error}): {CURE}") from error


def _missing(record: Record, settings: LongProbeSettings) -> Iterator[list[int]]:
    """Numbers of the videos that have no answers yet, in batches."""
    missing = [video for video in range(settings.videos) if str(video) not in record[ANSWERS]]
    for first in range(0, len(missing), settings.batch):
        yield missing[first : first + settings.batch]


def _made_with(setup: EvalSetup | None) -> Record:
    """What the answers of a row depend on beside the file's settings."""
    if setup is None:
        return {"weights": None}
    model = setup.transformer
    return plain(
        {
            "weights": fingerprint_of(model.state_dict()),
            "architecture": architecture_of(model),
            "window_frames": setup.window_frames,
            "sink_frames": setup.sink_frames,
            "timesteps": setup.sampler.timesteps,
        }
    )


def _with_figures(record: Record, settings: LongProbeSettings) -> Record:
    """A row with the figures of the videos that are asked for; its answers come last."""
    numbers = [str(video) for video in range(settings.videos) if str(video) in record[ANSWERS]]
    figures = report([_parsed(record[ANSWERS][number]) for number in numbers])
    return {"made_with": record["made_with"]} | figures | {ANSWERS: record[ANSWERS]}


def _require_questions(encoder: TextEncoder, settings: LongProbeSettings) -> None:
    """Make sure that short videos ask anything."""
    if settings.latents > MAX_CHECKED_LATENTS:
        return
    numbers = list(range(settings.videos))
    probe = make_long_probe(encoder, settings.world, settings.seed, numbers, settings.latents, settings.hidden_frames)
    if not probe.asked(probe.passes()).any():
        raise InputError(
            f"no object comes out again within {settings.latents} latent frames of the {settings.world} world: "
            "give a larger --times"
        )


def tables_of(rows: Mapping[str, Record]) -> list[Table]:
    """Accuracies after the last re-emergence; and those of colour and shape by age, load and pass."""
    main = Table("model", "memory", "after last", "95 %", "chance", "colour", "shape", "objects", "all answers")
    for name, row in rows.items():
        last, both = row["after_last"], row["after_last"]["both"]
        main.add_row(
            name,
            _memory_of(row["made_with"]),
            _percent(both),
            f"{100 * both['interval'][0]:.0f} to {100 * both['interval'][1]:.0f}",
            f"{100 * both['chance']:.1f}",
            _percent(last["colour"]),
            _percent(last["shape"]),
            str(both["objects"]),
            f"{_percent(row['all']['both'])} of {row['all']['both']['objects']}",
        )
    return [main, *(_grouped_table(title, rows) for title in ("ages", "loads", "passes"))]


TITLES = {
    "ages": "latent frames since last seen",
    "loads": "objects to remember",
    "passes": "how often it has come out again",
}


def _grouped_table(key: str, rows: Mapping[str, Record]) -> Table:
    """Percentages right of colour and shape, by one of the groupings."""
    grouped = {name: _groups(row[key]) for name, row in rows.items()}
    names = list(dict.fromkeys(group for groups in grouped.values() for group in groups))
    table = Table("model", *names, title=TITLES[key])
    for name, groups in grouped.items():
        table.add_row(name, *(_percent(groups[group]["both"]) if group in groups else "" for group in names))
    return table


def _groups(figures: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Figures by the name of their group; of passes a choice."""
    if isinstance(figures, Mapping):
        return {name: one for name, one in figures.items() if one["both"]["objects"]}
    return {str(number): figures[number - 1] for number in SHOWN_PASSES if number <= len(figures)}


def _memory_of(made_with: Record) -> str:
    return describe_memory(made_with["window_frames"], made_with["sink_frames"]) if made_with["weights"] else ""


def _percent(figure: Mapping[str, Any]) -> str:
    value = figure["accuracy"]
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"
