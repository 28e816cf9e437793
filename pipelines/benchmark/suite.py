"""Running a benchmark: case by case, each written down as soon as it is measured."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from pipelines.benchmark.cases import BenchmarkConfig, Case, SpeedOptions, by_row, empty_model, plan_cases
from pipelines.benchmark.ceilings import Ceilings, measure_ceilings
from pipelines.benchmark.measure import build_stage, measure_case, release
from pipelines.generation.lockstep import Lockstep
from pipelines.provenance import device_name, environment
from pipelines.records import open_records
from wan.utils.settings import plain

log = logging.getLogger(__name__)

JSON_FILE = "benchmark.json"
MODEL_KEYS = (
    "size",
    "height",
    "width",
    "fps",
    "frames_per_block",
    "denoising_steps",
    "lora_rank",
    "warmup_blocks",
    "seed",
)
"""Settings of a model and of how it is measured."""

Results = dict[str, Any]


def run_benchmark(
    config: BenchmarkConfig,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    again: bool = False,
    on_record: Callable[[Results], None] = lambda results: None,
    lockstep: Lockstep | None = None,
) -> Results:
    """Measure all cases that the folder's file does not have yet.

    Args:
        config: what to measure.
        device, dtype: where and in what to compute.
        folder: of the results.
        again: measure also what is there.
        on_record: told all results after each new record, and once at the end.
        lockstep: of the ranks that compute every video together; this one leads.

    Returns:
        all results of the file: settings, figures of others, runs (environment and ceilings), records.

    Raises:
        InputError: a case that cannot be, or results of another card or other settings in the folder.
    """
    cases = plan_cases(config, num_ranks(lockstep))
    cure = "give another --output_folder, or remove it"
    with open_records(folder / JSON_FILE, "records", "case", {"runs": []}, cure) as records:
        records.made_with(shared_settings(config, device, dtype))
        results = records.page
        for record in results["records"]:
            record["case"] = with_defaults(record["case"])
        results["published"] = [asdict(figure) for figure in config.published]
        todo = [case for case in cases if again or records.find(asdict(case)) is None]
        log.info("%d cases, %d of them measured before", len(cases), len(cases) - len(todo))
        if todo:
            ceilings = start_run(results, config, todo[0], device, dtype)
        for row in by_row(todo).values():
            if lockstep is not None:
                lockstep.tell((row, ceilings))
            build = cache(partial(build_stage, config, row[0], device, dtype, folder, lockstep))
            for case in row:
                record = measure_case(build, config, case, ceilings, dtype) | {"run": len(results["runs"]) - 1}
                records.put(asdict(case), record)
                on_record(results)
                log.info("%s, %d frames: %s", case.row, case.frames, outcome(record))
            del build
            release()
        if lockstep is not None:
            lockstep.tell(None)
        on_record(results)
        return results


def follow_benchmark(
    config: BenchmarkConfig, device: torch.device, dtype: torch.dtype, folder: Path, lockstep: Lockstep
) -> None:
    """Compute the videos that the leading rank measures, until it measures nothing more; arguments as there."""
    plan_cases(config, num_ranks(lockstep))
    while (order := lockstep.hear()) is not None:
        row, ceilings = order
        build = cache(partial(build_stage, config, row[0], device, dtype, folder, lockstep))
        for case in row:
            measure_case(build, config, case, ceilings, dtype)
        del build
        release()


def num_ranks(lockstep: Lockstep | None) -> int:
    """Number of ranks that compute a video together."""
    return 1 if lockstep is None else lockstep.size


def with_defaults(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case as it was written down, with what it did not say yet when it was measured."""
    return {"ranks": Case.ranks} | dict(case) | {"speed": plain(asdict(SpeedOptions())) | case["speed"]}


def shared_settings(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The settings that all records of a file share."""
    shared = {key: value for key, value in asdict(config).items() if key in MODEL_KEYS}
    return shared | {"dtype": str(dtype).removeprefix("torch."), "device": device_name(device)}


def start_run(
    results: Results, config: BenchmarkConfig, case: Case, device: torch.device, dtype: torch.dtype
) -> Ceilings:
    """Measure the card's ceilings and note them with the environment."""
    model = empty_model(config, case)
    per_frame = model.tokens_per_frame(*config.latent_size)
    ceilings = measure_ceilings(
        model, config.frames_per_block * per_frame, config.window_frames * per_frame, device, dtype
    )
    # The card's clocks are read while it is still warm from the work just done.
    results["runs"].append(environment(device) | {"ceilings": asdict(ceilings)})
    return ceilings


def outcome(record: Results) -> str:
    """A record in a few words."""
    if record["status"] != "ok":
        return f"{record['status']} after {record['reached_frames']} frames: {record['error']}"
    parts = (("dit_fps", "of the transformer"), ("fps", "end to end"))
    summary = record["summary"]
    return ", ".join(f"{summary[name]['median']:.2f} fps {part}" for name, part in parts if name in summary)
