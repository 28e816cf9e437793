"""How long training takes from its start to its first step, and the memory that it takes on the way."""

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch

from arl2.distillation.trainer import LOSSES
from pipelines.benchmark.training import latent_size, write_random_videos
from pipelines.config import Frames, Pixels
from pipelines.console.shipped import ROOT, SOURCES
from pipelines.generation.random_model import random_transformer
from pipelines.provenance import environment
from pipelines.training.export import write_model_folder
from wan.checkpoints.formats import WEIGHT_FILES, transformer_config
from wan.config import WAN_SIZES
from wan.utils.errors import InputError
from wan.utils.files import write_json
from wan.utils.json_lines import read_json_lines
from wan.utils.ranges import Bounds, Choices, Seed, check_ranges

JSON_FILE = "loading.json"
INTERVAL_SECONDS = 0.25
STEPS_OF_RUN = 10000
"""What the run is told; it is ended earlier."""
READ_BYTES = 1 << 26


@dataclass(frozen=True)
class LoadingBenchmark:
    """What is measured.

    Attributes:
        stage: 1 or 2.
        size: of the transformer, see `wan.config.WAN_SIZES`.
        height, width: pixels of the video.
        frames: its latent frames.
        processes: started by torchrun.
        steps: run before the end.
        timeout: seconds until the run is ended.
        seed: of weights and data.
    """

    stage: Annotated[int, Bounds(1, 2)] = 2
    size: Annotated[str, Choices(tuple(WAN_SIZES))] = "14B"
    height: Pixels = 480
    width: Pixels = 832
    frames: Frames = 21
    processes: Annotated[int, Bounds(1, 1024)] = 2
    steps: Annotated[int, Bounds(1, 10**4)] = 2
    timeout: Annotated[int, Bounds(1, 10**5)] = 600
    seed: Seed = 0


def run_loading_benchmark(
    benchmark: LoadingBenchmark, config: Path, settings: list[str], device: torch.device, folder: Path
) -> dict[str, Any]:
    """Write random weights and a video unless they are there, train, and watch.

    Args:
        config: of the stage; its paths are replaced.
        settings: `key=value`, which go before the config's.
        folder: of everything written.

    Returns:
        seconds from its start to the beginning and the end of the first step, seconds of all steps,
        host_peak_bytes and, of them, host_peak_bytes_before_first_step (a page that several processes map counts once),
        gpu_peak_bytes of every card, file_bytes.
    """
    check_ranges(benchmark)
    weights = write_world(benchmark, device, folder)
    read_whole(weights)
    run = folder / f"run-{time.time_ns()}"
    stage = f"train_stage{benchmark.stage}.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    own = [f"model_folder={weights.parent}", "checkpoint_path=null", f"data=[{folder / 'data'}]", f"run_folder={run}"]
    own += [f"steps={STEPS_OF_RUN}", "tracker=none", "sample_every=0"]
    own += ["init_from=null"] if benchmark.stage == 2 else []
    line = [*launcher, str(benchmark.processes), str(ROOT / stage), "--config", str(config), *own, *settings]
    page = {"benchmark": asdict(benchmark), "command": line[1:], "environment": environment(device)}
    page |= {"file_bytes": weights.stat().st_size} | watch(line, run, benchmark.steps, benchmark.timeout)
    write_json(folder / JSON_FILE, page)
    return page


def write_world(benchmark: LoadingBenchmark, device: torch.device, folder: Path) -> Path:
    """Write weights and data; returns the file of weights."""
    model_folder = folder / f"model-{benchmark.size}"
    weights = model_folder / WEIGHT_FILES[0]
    if not weights.exists():
        model = random_transformer(benchmark.size, seed=benchmark.seed, device=device, dtype=torch.bfloat16)
        write_model_folder(model, model.state_dict(), model_folder)
        del model
        torch.cuda.empty_cache()
    sizes = transformer_config(model_folder)
    shape = (benchmark.frames, *latent_size(benchmark.height, benchmark.width))
    write_random_videos(folder / "data", benchmark.processes, shape, sizes, benchmark.seed)
    return weights


def read_whole(path: Path) -> None:
    """Read a file once, so that it is in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(READ_BYTES):
            pass


def watch(line: list[str], run: Path, steps: int, timeout: float) -> dict[str, Any]:
    """Run a training command until so many steps are done, and measure it from outside.

    Raises:
        InputError: it made no step.
    """
    started, begun = time.monotonic(), None
    host: list[tuple[float, int]] = []
    gpu_peak: list[int] = []
    paths = os.pathsep.join(filter(None, (str(SOURCES), os.getenv("PYTHONPATH"))))
    said = run.with_suffix(".txt")  # a file, since a pipe that nobody reads would fill and hold the run up
    environment_of_run = os.environ | {"PYTHONPATH": paths}
    with said.open("w") as output, subprocess.Popen(line, env=environment_of_run, stderr=output) as process:
        while process.poll() is None:
            host.append((time.monotonic() - started, proportional_bytes(process.pid)))
            gpu_peak = [max(pair) for pair in zip(used_gpu_bytes(), gpu_peak or used_gpu_bytes(), strict=True)]
            done = len(steps_of(run))
            if begun is None and done:
                begun = time.monotonic() - started
            if done >= steps or time.monotonic() - started > timeout:
                process.terminate()
                break
            time.sleep(INTERVAL_SECONDS)
    lines = steps_of(run)
    if not lines or begun is None:
        errors = said.read_text().splitlines()
        told = [text for text in errors if "rror: " in text] or errors[-3:]
        raise InputError(f"the run made no step in {time.monotonic() - started:.0f} s: {' / '.join(told[:3])}")
    loaded = begun - lines[0]["seconds"]
    return {
        "seconds_to_first_step": loaded,
        "seconds_to_end_of_first_step": begun,
        "seconds": [one["seconds"] for one in lines],
        "losses": [one["loss"] for one in lines],
        "host_peak_bytes": max(size for _, size in host),
        "host_peak_bytes_before_first_step": max(size for seconds, size in host if seconds <= loaded),
        "gpu_peak_bytes": gpu_peak,
    }


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log so far."""
    return read_json_lines(run / LOSSES) if (run / LOSSES).exists() else []


def proportional_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants; resident size where the system tells no other."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            facts = process.memory_full_info()
            total += facts.pss if hasattr(facts, "pss") else facts.rss
    except psutil.Error:
        pass  # ended meanwhile
    return total


def used_gpu_bytes() -> list[int]:
    """Bytes in use on every visible card, whoever uses them."""
    return [total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))]
