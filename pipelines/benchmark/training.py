"""What a training step costs at full size: speed, operations and memory, through the real trainer and objectives.

Under torchrun every rank computes a video, and rank 0 keeps the results; memory is that of rank 0.

Weights and data are random, and drawn here: cost does not depend on them.
"""

import json
import logging
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed.tensor import DTensor

from arl2.distillation.data import LatentDataset
from arl2.distillation.latent_writer import LatentWriter
from arl2.distillation.objective import ForwardMode, Objective
from arl2.distillation.sampling import Batches, NoiseLevels
from arl2.distillation.sharding import fill_shards, put_parameter, shard_backbone
from arl2.distillation.stage1 import Stage1, Stage1Settings
from arl2.distillation.stage2 import Stage2, Stage2Settings
from arl2.distillation.trainer import LOSSES, Trainer, TrainerSettings
from arl2.model import HybridSettings, HybridWanModel
from arl2.ops.compiling import compile_blocks
from arl2.rollout import FewStepSampler, num_blocks
from pipelines.benchmark.ceilings import measure_ceilings
from pipelines.benchmark.measure import release
from pipelines.benchmark.training_flops import StepFlops, stage1_flops, stage2_flops
from pipelines.benchmark.training_memory import Allocator, MemoryNotes, WatchedObjective
from pipelines.cli import rank_and_world_size
from pipelines.config import Frames, Pixels, Rank
from pipelines.generation.random_model import random_transformer
from pipelines.provenance import device_name, environment
from pipelines.records import open_records
from pipelines.training.run import enable_grad, precision_of
from wan.config import WAN_SIZES, wan_size
from wan.utils.errors import InputError, out_of_memory
from wan.utils.ranges import Bounds, Choices, Count, Seed, check_ranges
from wan.utils.settings import require_same_settings
from wan.vae.wan_vae import WAN21_VAE

log = logging.getLogger(__name__)

JSON_FILE = "training.json"
CARD_BYTES, SPARE_BYTES, MIN_SHARE = 80e9, 10e9, 0.4
"""What is wanted: so much of such a card left over, and this share of the rate of matrix products."""
STEPS = {1: 6000, 2: 12000}
PUBLISHED_HOURS = {1: 50.0, 2: 106.0}
"""The paper's steps and H100-hours of each stage, second-hand; how many videos it takes a step is not known."""
VIDEOS_PER_STEP = (1, 8)
WEIGHT_STD = 0.02
"""Of drawn weights of a sharded backbone: outputs stay finite."""
EMA_DECAY = {1: None, 2: 0.999}


@dataclass(frozen=True)
class TrainingRow:
    """One way to train.

    Attributes:
        name: of the row.
        stage: 1 or 2.
        checkpointing, offload_checkpoints, blocks_per_graph, forward_mode, compile: as in the stage's config.
        window_frames: of the student's softmax layers; None for full memory.
        without_teacher: whether the target is the data's velocity alone, as in training on long videos.
    """

    name: str
    stage: int
    checkpointing: bool = False
    offload_checkpoints: bool = False
    blocks_per_graph: int | None = None
    forward_mode: ForwardMode = ForwardMode.PARALLEL
    compile: bool = False
    window_frames: int | None = None
    without_teacher: bool = False


LONG = TrainingRow("stage2-long", 2, checkpointing=True, blocks_per_graph=7, window_frames=21, without_teacher=True)
"""Training on long videos, as configs/long.yaml has it; measure it at several --frames."""
ROWS = (
    TrainingRow("stage1", 1),
    TrainingRow("stage2-checkpointed", 2, checkpointing=True),
    TrainingRow("stage2-offloaded", 2, checkpointing=True, offload_checkpoints=True),
    TrainingRow("stage1-compiled", 1, compile=True),
    TrainingRow("stage2-checkpointed-compiled", 2, checkpointing=True, compile=True),
    TrainingRow("stage1-loop", 1, forward_mode=ForwardMode.SEQUENTIAL),
    TrainingRow("stage2-loop-checkpointed", 2, checkpointing=True, forward_mode=ForwardMode.SEQUENTIAL),
    TrainingRow(
        "stage2-loop-checkpointed-cut",
        2,
        checkpointing=True,
        blocks_per_graph=2,
        forward_mode=ForwardMode.SEQUENTIAL,
    ),
    TrainingRow("stage1-loop-cut", 1, blocks_per_graph=1, forward_mode=ForwardMode.SEQUENTIAL),
    TrainingRow("stage2-loop-cut", 2, blocks_per_graph=1, forward_mode=ForwardMode.SEQUENTIAL),
    LONG,
    TrainingRow("stage2", 2),
)
"""The most important first, and last the one for which memory may not be enough."""


def latent_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a latent of Wan 2.1's VAE."""
    stride = 2 ** len(WAN21_VAE["temperal_downsample"])
    return height // stride, width // stride


@dataclass(frozen=True)
class TrainingBenchmark:
    """What is measured.

    Attributes:
        size: of the transformer, see `wan.config.WAN_SIZES`.
        height, width: pixels.
        frames, frames_per_block: latent frames.
        num_hybrid_layers: the first so many layers are hybrid in stage 2; all are in stage 1.
        lora_rank: of stage 2.
        shard: divide the frozen weights over the ranks.
        steps, warmup_steps: measured, and run before them.
        seed: of weights, data and noise.
    """

    size: Annotated[str, Choices(tuple(WAN_SIZES))] = "1.3B"
    height: Pixels = 480
    width: Pixels = 832
    frames: Frames = 21
    frames_per_block: Count = 3
    num_hybrid_layers: Count = 22
    lora_rank: Rank = 16
    shard: bool = False
    steps: Annotated[int, Bounds(1, 10**4)] = 3
    warmup_steps: Annotated[int, Bounds(1, 10**4)] = 1
    seed: Seed = 0

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent."""
        return latent_size(self.height, self.width)

    def hybrid(self, stage: int) -> HybridSettings:
        """Of the student."""
        layers = wan_size(self.size)["num_layers"]
        return HybridSettings(tuple(range(layers))) if stage == 1 else self._stage2(layers)

    def _stage2(self, layers: int) -> HybridSettings:
        if self.num_hybrid_layers > layers:
            raise InputError(f"{self.num_hybrid_layers} hybrid layers, but the model has {layers}: give 1 to {layers}")
        return HybridSettings(tuple(range(self.num_hybrid_layers)), self.lora_rank)

    def check(self) -> None:
        """Make sure that it can be measured.

        Raises:
            InputError: it cannot.
        """
        check_ranges(self)
        num_blocks(self.frames, self.frames_per_block)
        self.hybrid(2)
        if self.shard and rank_and_world_size()[1] == 1:
            raise InputError("--shard divides the weights over ranks: start with torchrun")


def run_training_benchmark(
    config: TrainingBenchmark,
    rows: tuple[TrainingRow, ...],
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
) -> dict[str, Any]:
    """Measure the rows that the folder's file does not have yet; each is written down as soon as it is measured.

    Args:
        config, rows: what to measure.
        device, dtype: where and in what to compute.
        folder: of the results.

    Returns:
        settings, runs (environment, ceilings), rows, each with the number of its run, and cost.

    Raises:
        InputError: what cannot be measured, or results of other settings in the folder.
    """
    config.check()
    settings = asdict(config) | {"dtype": str(dtype).removeprefix("torch."), "device": device_name(device)}
    settings |= {"world_size": rank_and_world_size()[1]} if rank_and_world_size()[1] > 1 else {}
    cure = "give another --output_folder, or remove it"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision_of(dtype))
    path = folder / JSON_FILE if accelerator.is_main_process else None
    if path is None:
        logging.disable(logging.WARNING)  # one voice is enough
    with open_records(path, "rows", others={"runs": []}, cure=cure) as records:
        records.made_with(settings)
        results = records.page
        for row in rows:
            there = records.find(row.name)
            if there is not None:
                measured = asdict(TrainingRow(**there["row"]))  # older ones do not say all
                require_same_settings(measured, asdict(row), f"{folder / JSON_FILE} has {row.name} measured", cure)
        todo = broadcast_object_list([[row for row in rows if records.find(row.name) is None]])[0]
        if todo:
            student = _empty_model(config, config.hybrid(2))
            tokens = config.frames_per_block * student.tokens_per_frame(*config.latent_size)
            ceilings = measure_ceilings(student, tokens, tokens, accelerator.device, dtype)
            results["runs"].append(environment(accelerator.device) | {"ceilings": asdict(ceilings)})
        for row in todo:
            record = measure_row(row, config, max(ceilings.gemm.values()), accelerator, dtype)
            results["cost"] = cost(results["rows"] | {row.name: record})
            records.put(row.name, record | {"run": len(results["runs"]) - 1})
        return results


def measure_row(
    row: TrainingRow, config: TrainingBenchmark, ceiling: float, accelerator: Accelerator, dtype: torch.dtype
) -> dict[str, Any]:
    """Measure one row; that memory runs out is its result."""
    flops, notes = row_flops(row, config), MemoryNotes()
    record: dict[str, Any] = {"row": asdict(row), "status": "ok", "flops": _page(flops)}
    release()
    try:
        with tempfile.TemporaryDirectory() as folder:
            lines = _train(row, config, accelerator, dtype, Path(folder), notes)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        record |= {"status": "oom", "error": str(error).splitlines()[0]}
        log.info("%s: out of memory", row.name)
    else:
        seconds = [line["seconds"] for line in lines[config.warmup_steps :]]
        median = statistics.median(seconds)
        record |= {"losses": [line["loss"] for line in lines], "seconds": seconds, "steps_per_second": 1 / median}
        for name, operations in (("model", flops.model), ("hardware", flops.hardware)):
            rate = operations / median
            record[name] = {"flops_per_second": rate, "share_of_matmul": rate / ceiling}
        spare = CARD_BYTES - notes.reserved_peak
        record |= {"spare_bytes": spare, "bar_memory": spare >= SPARE_BYTES}
        record["bar_speed"] = record["hardware"]["share_of_matmul"] >= MIN_SHARE
        log.info(
            "%s: %.3g s a step, %.0f %% of the matmul rate",
            row.name,
            median,
            100 * record["hardware"]["share_of_matmul"],
        )
    release()
    return record | {"memory": asdict(notes)}


def _train(
    row: TrainingRow,
    config: TrainingBenchmark,
    accelerator: Accelerator,
    dtype: torch.dtype,
    folder: Path,
    notes: MemoryNotes,
) -> list[dict[str, Any]]:
    """Run the trainer for the row's steps; returns its log."""
    device, steps = accelerator.device, config.warmup_steps + config.steps
    allocator = Allocator(device)
    before = allocator.allocated()
    hybrid, random = config.hybrid(row.stage), {"seed": config.seed, "dtype": dtype, "device": device}
    model = (random_sharded_transformer if config.shard else random_transformer)(config.size, hybrid, **random)
    notes.weights = allocator.allocated() - before
    objective = WatchedObjective(_objective(row, config, model), allocator, notes)
    enable_grad(objective.parameters_to_train(), device)
    if row.compile:
        compile_blocks(model)
    settings = TrainerSettings(steps, ema_decay=EMA_DECAY[row.stage], save_every=steps, report_every=steps)
    batches = _batches(config, model, folder, accelerator.num_processes)
    trainer = Trainer(accelerator, objective, batches, settings, folder, {})
    notes.trainables = allocator.allocated() - before - notes.weights
    try:
        trainer.run()
        notes.gradients_and_optimizer = allocator.allocated() - before - notes.weights - notes.trainables
    except RuntimeError:
        notes.note(step_peak=allocator.take_peak())  # of the step that failed
        raise
    finally:
        allocator.take_peak()
        notes.note(reserved_peak=allocator.reserved_peak)
    log_of_run = [(folder / LOSSES).read_text() if accelerator.is_main_process else ""]
    return [json.loads(line) for line in broadcast_object_list(log_of_run)[0].splitlines()]


def random_sharded_transformer(
    size: str, hybrid: HybridSettings, *, seed: int, device: torch.device, dtype: torch.dtype
) -> HybridWanModel:
    """As `random_transformer`, with its backbone drawn where it is sharded; for speed and memory, not for training."""
    model = random_transformer(size, hybrid, device=torch.device("meta"), dtype=dtype)
    for name in model.hybrid_parameter_names():
        put_parameter(model, name, torch.zeros_like(model.get_parameter(name), device=device))
    for attention in model.hybrid_attentions().values():
        attention.init_hybrid_weights()
    shard_backbone(model)
    generator = torch.Generator(device).manual_seed(seed + distributed.get_rank())

    def draw(name: str, target: DTensor) -> torch.Tensor:
        rows = torch.empty(target.to_local().shape, dtype=dtype, device=device)
        return rows.normal_(std=WEIGHT_STD, generator=generator)

    fill_shards(model, draw, device)
    return model


def _objective(row: TrainingRow, config: TrainingBenchmark, model: HybridWanModel) -> Objective:
    if row.stage == 1:
        return Stage1(model, Stage1Settings(config.frames_per_block, row.blocks_per_graph, row.forward_mode))
    settings = Stage2Settings(
        config.frames_per_block,
        row.blocks_per_graph,
        row.forward_mode,
        checkpointing=row.checkpointing,
        offload_checkpoints=row.offload_checkpoints,
        window_frames=row.window_frames,
        teacher_weight=float(not row.without_teacher),
        data_weight=float(row.without_teacher),
    )
    return Stage2(model, settings)


def _batches(config: TrainingBenchmark, model: HybridWanModel, folder: Path, global_batch: int) -> Batches:
    """Random videos, written and read as real ones are."""
    write_random_videos(folder / "data", 1, (config.frames, *config.latent_size), model.config, config.seed)
    sampler = FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
    data, dtype = LatentDataset([folder / "data"]), model.patch_embedding.weight.dtype
    return Batches(
        data, config.seed, global_batch, config.frames_per_block, NoiseLevels(), sampler, 5.0, text_dtype=dtype
    )


def write_random_videos(
    folder: Path, count: int, frames_and_size: tuple[int, int, int], sizes: Mapping[str, Any], seed: int
) -> None:
    """Write random latents and text embeddings in bfloat16, as training reads them; what is there is kept.

    Args:
        frames_and_size: latent frames, height and width of each video.
        sizes: of the transformer that they are for.
        seed: of their values.
    """
    generator, (frames, *size) = torch.Generator().manual_seed(seed), frames_and_size
    with LatentWriter(folder, {}) as writer:
        for number in range(count):
            latents = torch.randn(frames, sizes["in_dim"], *size, generator=generator)
            text = torch.randn(sizes["text_len"], sizes["text_dim"], generator=generator)
            writer.add(str(number), latents.to(torch.bfloat16), "random", seed + number, text)


def row_flops(row: TrainingRow, config: TrainingBenchmark) -> StepFlops:
    """Operations of a step of a row, on one video."""
    student, teacher = (_empty_model(config, hybrid) for hybrid in (config.hybrid(row.stage), HybridSettings()))
    tokens = config.frames_per_block * student.tokens_per_frame(*config.latent_size)
    shape = (student, teacher, config.frames_per_block, tokens, num_blocks(config.frames, config.frames_per_block))
    if row.stage == 1:
        return stage1_flops(*shape)
    window = None if row.window_frames is None else row.window_frames * tokens // config.frames_per_block
    return stage2_flops(*shape, row.checkpointing, window, not row.without_teacher)


def cost(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """GPU-hours of all steps of each stage, by the quickest of its rows, beside the published ones."""
    page: dict[str, Any] = {"published_hours": PUBLISHED_HOURS, "steps": STEPS}
    for stage, steps in STEPS.items():
        done = [row for row in rows.values() if row["row"]["stage"] == stage and row["status"] == "ok"]
        done = [row for row in done if not row["row"].get("without_teacher")]
        if done:
            quickest = max(done, key=lambda row: row["steps_per_second"])
            hours = steps / quickest["steps_per_second"] / 3600
            by_batch = {str(videos): hours * videos for videos in VIDEOS_PER_STEP}
            page[f"stage{stage}"] = {"row": quickest["row"]["name"], "hours_by_videos_per_step": by_batch}
    return page


def _empty_model(config: TrainingBenchmark, hybrid: HybridSettings) -> HybridWanModel:
    """A model without storage, for its shapes."""
    return random_transformer(config.size, hybrid, device=torch.device("meta"))


def _page(flops: StepFlops) -> dict[str, Any]:
    return asdict(flops) | {"model": flops.model, "hardware": flops.hardware}
