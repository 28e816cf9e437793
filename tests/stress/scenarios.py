"""What is killed: every program that writes, alone and two at a time."""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from processes import Command


class Harm(Enum):
    """What happens to one of the processes of a scenario."""

    NONE = "left to end"
    KILLED = "one killed"
    PAUSED = "one paused"


@dataclass(frozen=True)
class Scenario:
    """Commands that work in one folder, alone or two at once.

    Attributes:
        name: for the table.
        commands: one, or two that run at the same time.
        harm: what happens to one of them.
        one_wins: only one of the commands can have the folder, the other is refused.
        refusals: parts of messages with which a command may end with status 2, besides the number of the process
            that is in its way.
        needs_training: whether the commands need the world's data and its stage 1.
    """

    name: str
    commands: tuple[Command, ...]
    harm: Harm = Harm.KILLED
    one_wins: bool = False
    refusals: tuple[str, ...] = ()
    needs_training: bool = False


def single_scenarios(world: Path) -> list[Scenario]:
    """Every program that writes, alone."""
    results = ("--output_folder", "out", "--metrics_dir", "metrics", "--device", "cpu")
    inference = ("--config_path", f"{world}/inference.yaml", *results, "--data_path", f"{world}/prompts.txt")
    data = ("--config", f"{world}/data.yaml", "--device", "cpu")
    suite = ("--config", f"{world}/inference.yaml", "--suite", f"{world}/prompts.txt", *results[:2], *results[-2:])
    gates = ("--method", "gates", "--training", f"{world}/gates.yaml", "--yaml", "layers.yaml")
    export = ("--method", "replacement", "--checkpoint_path", f"{world}/stage1/run/export", "--videos", "4")
    scores = (*export, "--data_path", f"{world}/prompts.txt", "--json", "scores.json", "--yaml", "layers.yaml")
    select = "scripts/select_layers.py"
    return [
        Scenario("inference, full memory", (Command("inference.py", inference),)),
        Scenario("inference, window", (Command("inference.py", (*inference, "--memory", "window")),)),
        _training("stage 1", "train_stage1.py", "--config", f"{world}/stage1.yaml"),
        _training("stage 2", "train_stage2.py", "--config", f"{world}/stage2.yaml"),
        _training("layer gates", select, "--config", f"{world}/data.yaml", *gates),
        Scenario("generate_latents", (_latents(world, "prompts.txt", "--videos_per_prompt", "22"),)),
        Scenario("encode_videos", (_clips(world, "clips.tsv"),)),
        *(_conversion(world, ending) for ending in (".pt", ".safetensors", "")),
        _training("select_layers, replacement", select, *data, *scores),
        Scenario("sample_suite", (Command("scripts/sample_suite.py", suite),)),
        Scenario("evaluate", (Command("scripts/evaluate.py", (f"{world}/clips", "--json", "out/scores.json")),)),
    ]


def pair_scenarios(world: Path) -> list[Scenario]:
    """Two at once, the same command twice and commands that share a folder: left to end, one killed, one paused."""
    singles = {scenario.name: scenario for scenario in single_scenarios(world)}
    inference, stage1, stage2 = (singles[name].commands[0] for name in ("inference, full memory", "stage 1", "stage 2"))
    others = replace(inference, arguments=(*inference.arguments[:-1], f"{world}/others.txt"))
    alike = [
        replace(scenario, name=f"twice: {scenario.name}", commands=scenario.commands * 2)
        for scenario in singles.values()
        if scenario.name != "inference, window"
    ]
    differing = [
        Scenario("inference, other prompts", (inference, others)),
        Scenario(
            "generate_latents, other seeds",
            (_latents(world, "prompts.txt"), _latents(world, "prompts.txt", "--seed", "1")),
        ),
        Scenario("encode_videos, other clips", (_clips(world, "first.tsv"), _clips(world, "last.tsv"))),
        Scenario(
            "stage 1 and stage 2 in one run_folder",
            (stage1, stage2),
            one_wins=True,
            refusals=("other settings", "choose another run_folder"),
            needs_training=True,
        ),
    ]
    return [
        replace(pair, name=f"{pair.name}, {harm.value}", harm=harm) for pair in [*alike, *differing] for harm in Harm
    ]


def scenarios(world: Path) -> list[Scenario]:
    """One round: alone twice, since most kills are to fall there, and every pair once."""
    singles, pairs = single_scenarios(world), pair_scenarios(world)
    middle = len(pairs) // 2
    return [*singles, *pairs[:middle], *singles, *pairs[middle:]]


def _training(name: str, script: str, *arguments: str) -> Scenario:
    return Scenario(name, (Command(script, arguments),), needs_training=True)


def _latents(world: Path, prompts: str, *arguments: str) -> Command:
    fixed = ("--config", f"{world}/many.yaml", "--data_path", f"{world}/{prompts}", "--folder", "data")
    return Command("scripts/generate_latents.py", (*fixed, "--device", "cpu", *arguments))


def _clips(world: Path, videos: str) -> Command:
    fixed = ("--config", f"{world}/data.yaml", "--videos", f"{world}/{videos}", "--folder", "data", "--device", "cpu")
    return Command("scripts/encode_videos.py", (*fixed, "num_output_frames=3"))


def _conversion(world: Path, ending: str) -> Scenario:
    command = Command("scripts/convert_checkpoint.py", (f"{world}/hybrid", f"converted{ending}"))
    return Scenario(f"convert_checkpoint to {ending or 'a folder'}", (command,), refusals=("exists",))
