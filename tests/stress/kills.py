"""Kill everything that writes, at random moments, and see whether anything is lost.

    python tests/stress/kills.py --count 100 --json kills.json --markdown docs/results/kills.md
    python tests/stress/kills.py --seed 7 --trials 12 31          # again, those two alone

Inference, both stages, layer gates, the data writers, conversion and layer selection run on tiny models, alone and two
processes at a time, and are killed (SIGKILL, SIGTERM, SIGINT) at moments drawn by the clock or by changes of files.
After every kill nothing under a final name may be partial. Started again, and perhaps killed again, every command must
end with status 0 and leave what an unbroken run leaves, byte for byte. Status 1 if something is wrong: the folder of
such a trial stays, and `--trials` with the same seed runs it again.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from processes import ROOT, Server
from rich.console import Console
from rich.table import Table
from scenarios import scenarios
from trees import Problem
from trials import SIGNALS, Bench, Trial

from pipelines.provenance import git_commit

SIGNAL_NAMES = ("SIGKILL", "SIGTERM", "SIGINT")
console = Console(soft_wrap=True, highlight=False, width=180)


@dataclass
class Report:
    """What came of a run of the stress test.

    Attributes:
        trials: in order.
        unsteady: what differs between unbroken runs.
        seconds: that it took.
    """

    trials: list[Trial]
    unsteady: list[Problem]
    seconds: float

    @property
    def kills(self) -> int:
        """Signals that reached a working process."""
        return sum(len(trial.kills) for trial in self.trials)

    @property
    def problems(self) -> list[Problem]:
        """Everything that was wrong."""
        return [*self.unsteady, *(problem for trial in self.trials for problem in trial.problems)]


def run_kills(
    count: int,
    seed: int = 0,
    names: Sequence[str] = (),
    numbers: Sequence[int] = (),
    jobs: int = 2,
    folder: Path | None = None,
    signals: Sequence[str] = SIGNAL_NAMES,
) -> Report:
    """Run trials until `count` signals have reached working processes.

    Args:
        count: of kills.
        seed: of everything random; a trial's number says the rest.
        names: parts of the names of the scenarios to run; all of them by default.
        numbers: run these trials alone, whatever `count` says.
        jobs: trials at a time.
        folder: where; a temporary one by default, which stays if something is wrong.
        signals: names of those to send.
    """
    weights = {kind: weight for kind, weight in SIGNALS.items() if kind.name in signals}
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="kills-")) if folder is None else folder.absolute()
    with Server() as server:
        bench = Bench(place, server, seed, weights)
        chosen = [one for one in scenarios(bench.world) if not names or any(name in one.name for name in names)]
        bench.prepare([chosen[number % len(chosen)] for number in numbers] if numbers else chosen)
        report = Report([], bench.unsteady, 0.0)
        waiting = iter(numbers) if numbers else iter(range(1_000_000))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    is_enough = not numbers and report.kills >= count
                    number = None if is_enough else next(waiting, None)
                if number is None:
                    return
                trial = bench.try_out(chosen[number % len(chosen)], number)
                with lock:
                    report.trials.append(trial)
                    tell(trial, report, seed)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in [pool.submit(work) for _ in range(jobs)]:
                    done.result()
            finally:
                waiting = iter(())  # after an interruption, or an error, nothing new is begun
    report.trials.sort(key=lambda trial: trial.number)
    report.seconds = time.monotonic() - began
    if not report.problems:
        shutil.rmtree(place)
    return report


def tell(trial: Trial, report: Report, seed: int) -> None:
    """Say what came of a trial."""
    done = ", ".join(filter(None, [trial.how, *(kill.moment for kill in trial.kills)])) or "ended before it was killed"
    verdict = f"WRONG, see {trial.folder}; again: --seed {seed} --trials {trial.number}" if trial.problems else "right"
    console.print(f"{report.kills:4d} kills  trial {trial.number}  {trial.scenario}: {done}: {verdict}", markup=False)
    for problem in trial.problems[:6]:
        console.print(f"      {problem.kind}: {problem.text}", markup=False)


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table: a row per scenario."""
    found = []
    for name in dict.fromkeys(trial.scenario for trial in report.trials):
        trials = [trial for trial in report.trials if trial.scenario == name]
        signals = Counter(kill.signal for trial in trials for kill in trial.kills)
        kinds = Counter(kind for trial in trials for kind in {problem.kind for problem in trial.problems})
        right = sum(not trial.problems for trial in trials)
        wrong = ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common())
        counts = (str(signals[signal]) for signal in SIGNAL_NAMES)
        found.append((name, str(len(trials)), *counts, f"{right} of {len(trials)}", wrong))
    return found


HEADER = ("subject", "trials", *SIGNAL_NAMES, "right", "wrong")


METHOD = """
A trial starts a command on a tiny model, kills it once to three times, starts it again each time, and lets it end. Half
of the moments are uniform over the time that an unbroken run takes; the others are just before a change of a file (a
temporary file opened, a lock taken, a rename, a removal), or within 4 ms of it. "twice" and the rows of two commands
start two processes in one folder: both left to end, one of them killed, or one of them paused just before a change
while the other runs.

A trial is right if:

- after every kill, each file under its final name is whole: videos decode and equal the unbroken run's, tensors, JSON
  and pictures parse, checkpoints and exports have all their files, data sets can be read;
- after SIGTERM and SIGINT, the status is 143 or 130, with one line on standard error;
- of two processes, each ends with status 0, or one is refused with status 2 and the number of the process in its way;
- at the end, the status is 0 and the folder holds what unbroken runs leave, byte for byte except for seconds, without
  hidden files. Data sets are compared sample by sample where processes shared them or were asked to end: that divides
  samples otherwise among shards. A process that was asked to end may leave a checkpoint more, or another one before the
  last.
"""


def markdown(report: Report, seed: int, arguments: str) -> str:
    """The page of results."""
    signals = Counter(kill.signal for trial in report.trials for kill in trial.kills)
    wrong = sum(bool(trial.problems) for trial in report.trials)
    lines = [
        "# Kills: what is lost when processes die, or meet",
        "",
        f"{report.kills} kills ({', '.join(f'{signals[name]} {name}' for name in SIGNAL_NAMES)}) in "
        f"{len(report.trials)} trials, seed {seed}, {report.seconds / 60:.0f} minutes: "
        f"**{len(report.trials) - wrong} trials right, {wrong} wrong**.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"Python {platform.python_version()}, commit {(git_commit() or 'unknown')[:7]}.",
        "",
        "```",
        f"python tests/stress/kills.py {arguments}",
        "```",
        METHOD,
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row)} |" for row in rows(report)),
    ]
    if report.problems:
        kinds = Counter(problem.kind for problem in report.problems)
        lines += ["", "What was wrong, by kind:", ""]
        for kind, number in kinds.most_common():
            example = next(problem.text for problem in report.problems if problem.kind == kind)
            lines.append(f"- {kind}, {number} times; for example: {re.sub(r'[|`]', ' ', example)}")
    return "\n".join(lines) + "\n"


def command_line(arguments: argparse.Namespace) -> str:
    """The arguments on which the kills depend."""
    kept = [f"--count {arguments.count}", f"--seed {arguments.seed}"]
    for name in ("subjects", "trials"):
        if given := vars(arguments)[name]:
            kept.append(f"--{name} {' '.join(map(repr, given))}")
    if set(arguments.signals) != set(SIGNAL_NAMES):
        kept.append(f"--signals {' '.join(arguments.signals)}")
    return " ".join(kept)


def record(report: Report, seed: int) -> dict[str, Any]:
    """Every trial, for a JSON file."""
    trials = [asdict(trial) | {"folder": str(trial.folder) if trial.problems else None} for trial in report.trials]
    unsteady = [asdict(problem) for problem in report.unsteady]
    return {"seed": seed, "kills": report.kills, "seconds": report.seconds, "unsteady": unsteady, "trials": trials}


def main() -> int:
    """Parse, kill, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--count", type=int, default=100, help="kills")
    add("--seed", type=int, default=0)
    add("--subjects", nargs="+", default=[], help="parts of the names of the scenarios to run")
    add(
        "--trials", type=int, nargs="+", default=[], help="numbers of the trials to run, as the seed and --subjects say"
    )
    add("--signals", nargs="+", choices=SIGNAL_NAMES, default=SIGNAL_NAMES, help="which signals to send")
    add("--jobs", type=int, default=2, help="trials at a time")
    add("--folder", type=Path, help="where to work; must not exist")
    add("--json", type=Path, help="where every kill goes")
    add("--markdown", type=Path, help="where the page of results goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = run_kills(
        arguments.count,
        arguments.seed,
        arguments.subjects,
        arguments.trials,
        arguments.jobs,
        arguments.folder,
        arguments.signals,
    )
    table = Table(*HEADER)
    for row in rows(report):
        table.add_row(*row)
    console.print(table)
    for problem in report.unsteady:
        console.print(f"unsteady: {problem.text}", markup=False)
    console.print(f"{report.kills} kills in {len(report.trials)} trials, {report.seconds:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record(report, arguments.seed), indent=1) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(report, arguments.seed, command_line(arguments)))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    raise SystemExit(main())
