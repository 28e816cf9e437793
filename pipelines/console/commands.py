"""The commands of `arl2`: the one table of their names, groups and entry points."""

import difflib
import re
from contextvars import ContextVar
from pathlib import PurePosixPath
from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
        name: what is typed after `arl2`.
        script: its entry point, below the folder of what ships.
        about: what it does, in one line.
    """

    name: str
    script: str
    about: str


GROUPS: dict[str, tuple[Command, ...]] = {
    "generate": (
        Command("generate", "inference.py", "generate videos from prompts, pictures or videos"),
        Command("app", "scripts/app.py", "open a local page in which videos are generated live"),
        Command("demo", "scripts/demo.py", "generate videos of the toy world on the CPU"),
    ),
    "weights": (
        Command("download", "scripts/download_weights.py", "fetch public weights"),
        Command("convert", "scripts/convert_checkpoint.py", "convert weights between formats"),
        Command("export-hub", "scripts/export_hub.py", "write a folder for the hub, with a model card"),
    ),
    "train": (
        Command("generate-latents", "scripts/generate_latents.py", "make training data: rollouts of the teacher"),
        Command("encode-videos", "scripts/encode_videos.py", "make training data from real videos"),
        Command("draw-latents", "scripts/toyworld/draw_latents.py", "make training data of the toy world"),
        Command("train-stage1", "train_stage1.py", "train hybrid layers to put out what the teacher's attention does"),
        Command("select-layers", "scripts/select_layers.py", "choose the layers to convert"),
        Command("train-stage2", "train_stage2.py", "train the hybrid model end to end"),
    ),
    "evaluate": (
        Command("probe", "scripts/probe_memory.py", "measure on the toy world what a model remembers"),
        Command("download-suites", "scripts/download_suites.py", "fetch the prompts of benchmarks"),
        Command("sample-suite", "scripts/sample_suite.py", "generate the videos that a benchmark wants"),
        Command("evaluate", "scripts/evaluate.py", "score videos, or compare two sets of scores"),
        Command("make-tables", "scripts/make_tables.py", "make the paper's tables from files of results"),
        Command("reproduce", "scripts/reproduce.py", "print or run the commands that make one of the paper's tables"),
        Command("verify", "scripts/verify.py", "replay reference outputs of the published code"),
    ),
    "measure": (
        Command("bench", "scripts/benchmark.py", "speed and memory of generation"),
        Command("bench-training", "scripts/profiling/benchmark_training.py", "speed and memory of a training step"),
        Command("bench-loading", "scripts/profiling/benchmark_loading.py", "time and memory until training begins"),
        Command("bench-offloading", "scripts/profiling/benchmark_offloading.py", "generation from host memory"),
        Command("bench-kernels", "scripts/profiling/benchmark_kernels.py", "the Triton kernels"),
        Command("profile", "scripts/profiling/profile_generation.py", "where the time of generating a video goes"),
        Command("make-random-model", "scripts/profiling/make_random_model.py", "write a model with random weights"),
    ),
    "the toy world's studies": (
        Command("build-toyworld", "scripts/toyworld/build_toyworld.py", "train the toy world's models"),
        Command("toyworld-samples", "scripts/toyworld/toyworld_samples.py", "draw scenes of the toy world"),
        Command("toyworld-study", "scripts/toyworld/toyworld_study.py", "the study of distillation"),
        Command("long-study", "scripts/toyworld/long_study.py", "the study of long training"),
        Command("measure-switches", "scripts/toyworld/measure_switches.py", "sessions and switches of the prompt"),
    ),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}
COMPLETION = "completion"
"""The command that is no script: it writes a shell's completion."""
PROGRAM = "arl2"

running: ContextVar[Command | None] = ContextVar("running", default=None)
"""The command of `arl2` that this process runs; None where a script was started by its path."""
_BY_SCRIPT = {command.script: command for command in COMMANDS.values()}
_BY_STEM = {PurePosixPath(command.script).stem.replace("_", "-"): command for command in COMMANDS.values()}
_MENTION = re.compile(
    r"(?P<start>\bpython |\btorchrun (?:[^\n]|\\\n)*?)?(?<![\w/.])(?P<script>(?:scripts/)?[\w/]+\.py)\b"
)


def find_command(name: str) -> Command | None:
    """The command of a name, of a name with underscores, or of its script's name."""
    dashed = name.removesuffix(".py").replace("_", "-")
    return COMMANDS.get(dashed) or _BY_STEM.get(dashed)


def nearest(name: str) -> str | None:
    """The name that was most likely meant."""
    close = difflib.get_close_matches(name.replace("_", "-"), [*COMMANDS, COMPLETION, *_BY_STEM], n=1)
    found = find_command(close[0]) if close else None
    return found.name if found is not None else next(iter(close), None)


def in_words_of_console(text: str) -> str:
    """A text that names scripts, with the commands in their places: `python scripts/benchmark.py` is `arl2 bench`.

    The text itself where a script was started by its path.
    """
    if running.get() is None:
        return text

    def replaced(match: re.Match[str]) -> str:
        command, start = _BY_SCRIPT.get(match["script"]), match["start"] or ""
        if command is None:
            return match[0]
        return f"{start}-m {PROGRAM} {command.name}" if start.startswith("torchrun") else f"{PROGRAM} {command.name}"

    return _MENTION.sub(replaced, text)


def overview() -> str:
    """The help of `arl2` itself."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"usage: {PROGRAM} COMMAND [FLAGS]", ""]
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {one.name:{width}}{one.about}" for one in commands), ""]
    lines += [
        "shell:",
        f"  {COMPLETION:{width}}write the completion of bash, zsh or fish",
        "",
        f"{PROGRAM} COMMAND --help lists the flags of a command, {PROGRAM} --version says the version.",
        f"Several processes: torchrun --nproc_per_node N -m {PROGRAM} COMMAND …",
    ]
    return "\n".join(lines) + "\n"
