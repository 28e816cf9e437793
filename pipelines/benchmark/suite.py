"""Running a benchmark: case by case, each written down as soon as it is measured."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from pipelines.benchmark.cases import BenchmarkConfig, Case, by_row, empty_model, plan_cases
from pipelines.benchmark.ceilings import Ceilings, measure_ceilings
from pipelines.benchmark.measure import build_stage, measure_case, release
from pipelines.provenance import device_name, environment
from wan.utils.errors import InputError
from wan.utils.files import atomic_path

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
"""Settings that all records of a file share."""

Results = dict[str, Any]


def run_benchmark(
    config: BenchmarkConfig,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    again: bool = False,
    on_record: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure all cases that the folder's file does not have yet.

    Args:
        config: what to measure.
        device, dtype: where and in what to compute.
        folder: of the results.
        again: measure also what is there.
        on_record: told all results after each new record, and once at the end.

    Returns:
        all results of the file: settings, figures of others, runs (environment and ceilings), records.

    Raises:
        InputError: a case that cannot be, or results of another card or other settings in the folder.
    """
    cases = plan_cases(config)
    results = open_results(config, device, dtype, folder)
    todo = [case for case in cases if again or find_record(results, case) is None]
    log.info("%d cases, %d of them measured before", len(cases), len(cases) - len(todo))
    if todo:
        ceilings = start_run(results, config, todo[0], device, dtype)
    for row in by_row(todo).values():
        build = cache(partial(build_stage, config, row[0], device, dtype, folder))
        for case in row:
            record = measure_case(build, config, case, ceilings, dtype) | {"run": len(results["runs"]) - 1}
            put_record(results, case, record)
            save(results, folder)
            on_record(results)
            log.info("%s, %d frames: %s", case.row, case.frames, outcome(record))
        del build
        release()
    on_record(results)
    return results


def open_results(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype, folder: Path) -> Results:
    """The results in the folder, or new ones.

    Raises:
        InputError: they are of another card or other settings, or the file is damaged.
    """
    settings = {key: value for key, value in asdict(config).items() if key in MODEL_KEYS} | {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
    }
    results: Results = {"settings": settings, "runs": [], "records": []}
    path = folder / JSON_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            there = results["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no results: remove it, or give another --output_folder") from error
        different = [key for key in settings if there.get(key) != settings[key]]
        if different:
            key = different[0]
            raise InputError(
                f"{path} has results with {key} {there.get(key)}, not {settings[key]}: give another --output_folder"
            )
    results["published"] = [asdict(figure) for figure in config.published]
    return results


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


def find_record(results: Results, case: Case) -> Results | None:
    """The record of a case."""
    return next((record for record in results["records"] if record["case"] == asdict(case)), None)


def put_record(results: Results, case: Case, record: Results) -> None:
    """Add a record, in the place of the case's former one."""
    former = find_record(results, case)
    if former is None:
        results["records"].append(record)
    else:
        former.clear()
        former.update(record)


def save(results: Results, folder: Path) -> None:
    """Write the results; atomic."""
    with atomic_path(folder / JSON_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(results, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def outcome(record: Results) -> str:
    """A record in a few words."""
    if record["status"] != "ok":
        return f"{record['status']} after {record['reached_frames']} frames: {record['error']}"
    parts = (("dit_fps", "of the transformer"), ("fps", "end to end"))
    summary = record["summary"]
    return ", ".join(f"{summary[name]['median']:.2f} fps {part}" for name, part in parts if name in summary)
