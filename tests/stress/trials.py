"""One trial: start, kill at a random moment, start again to the end, and compare with an unbroken run."""

import random
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Command, Moment, Process, Server
from scenarios import Harm, Scenario
from trees import Problem, Tree, damage, differences, files_of, hidden, order_of, tree_of
from world import build_training, build_world

TIMEOUT_SECONDS = 120.0
SIGNALS = {signal.SIGKILL: 0.7, signal.SIGTERM: 0.15, signal.SIGINT: 0.15}
KILLS_IN_A_ROW = {1: 0.6, 2: 0.25, 3: 0.15}
BY_CLOCK = 0.5
"""Share of the moments by the clock; the others are just before a change of a file, or within milliseconds of one."""
MAX_DELAY_SECONDS = 0.004
ERRORS_OF_INTERRUPTION = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass
class Kill:
    """One signal that reached a working process.

    Attributes:
        moment: when.
        change: the last change of a file before it.
        found: how many files lay under their final names afterwards, and what else.
        status: of the process.
    """

    moment: str
    signal: str
    change: str
    found: dict[str, Any]
    status: int | None


@dataclass
class Trial:
    """What came of a scenario.

    Attributes:
        number: which, of a seed.
        how: what was done besides the kills.
        kills: in order.
        problems: what was not as it must be; none of a good one.
        statuses: of all processes, in order.
    """

    number: int
    scenario: str
    folder: Path
    how: str = ""
    kills: list[Kill] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    statuses: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What unbroken runs of a scenario's commands leave, one after the other.

    Attributes:
        trees: by how exactly data sets and checkpoints are taken, see `tree_of`.
        order: keys of the data set's samples.
        seconds: that the first command took.
        changes: how many changes of files it made.
        stderr: lines that it wrote to standard error.
    """

    trees: dict[tuple[bool, bool], Tree]
    order: list[str]
    seconds: float
    changes: int
    stderr: frozenset[str]


class Bench:
    """Runs trials in a folder of its own, with a world in it and unbroken runs to compare with.

    Args:
        folder: for everything; its path must not change between runs that are compared.
        server: starts the commands.
        seed: of all that is random.
        signals: weights of the signals to send.
    """

    def __init__(
        self, folder: Path, server: Server, seed: int, signals: Mapping[signal.Signals, float] = SIGNALS
    ) -> None:
        self.world = folder / "world"
        self._folder, self._server, self._seed = folder, server, seed
        self._signals = signals
        self._references: dict[tuple[Command, ...], Reference] = {}
        self.unsteady: list[Problem] = []
        build_world(self.world)

    def prepare(self, scenarios: Sequence[Scenario]) -> None:
        """Make the references that scenarios need; twice each, since what differs by itself proves nothing."""
        if any(scenario.needs_training for scenario in scenarios):
            build_training(self.world, self._server)
        for scenario in scenarios:
            for commands in groups_of(scenario):
                if commands not in self._references:
                    self._references[commands] = self._reference(scenario, commands)

    def _reference(self, scenario: Scenario, commands: tuple[Command, ...]) -> Reference:
        folders = [self._folder / f"reference-{len(self._references)}-{turn}" for turn in (0, 1)]
        runs: list[Process] = []
        for folder in folders:
            folder.mkdir()
            for command in commands:
                runs.append(self._server.run(command, folder, TIMEOUT_SECONDS))
                if not is_done(runs[-1], scenario) or (len(runs) == 1 and runs[-1].status != 0):
                    raise RuntimeError(f"{command} ended with {runs[-1].status}: {runs[-1].stderr}")
        first, second = (tree_of(folder) for folder in folders)
        for problem in differences(second, first):
            self.unsteady.append(Problem("unsteady", f"{scenario.name}: {problem.kind} {problem.text} in a second run"))
        ways = [(by_sample, last) for by_sample in (False, True) for last in (False, True)]
        reference = Reference(
            {way: tree_of(folders[0], *way) for way in ways},
            order_of(folders[0]),
            min(runs[0].seconds, runs[len(commands)].seconds),
            len(runs[0].changes),
            frozenset(runs[0].stderr.splitlines()),
        )
        for folder in folders:
            shutil.rmtree(folder)
        return reference

    def references(self, scenario: Scenario) -> list[Reference]:
        """The references of a scenario; several where only one command can win."""
        return [self._references[commands] for commands in groups_of(scenario)]

    def try_out(self, scenario: Scenario, number: int) -> Trial:
        """Run a trial; its folder stays if something is wrong."""
        chance = random.Random(f"{self._seed}/{number}")
        trial = Trial(number, scenario.name, self._folder / f"trial-{number:04d}")
        trial.folder.mkdir()
        if len(scenario.commands) == 1:
            self._alone(scenario, trial, chance)
        else:
            self._together(scenario, trial, chance)
        if not trial.problems:
            shutil.rmtree(trial.folder)
        return trial

    def _alone(self, scenario: Scenario, trial: Trial, chance: random.Random) -> None:
        (reference,) = self.references(scenario)
        for _ in range(chance.choices(list(KILLS_IN_A_ROW), list(KILLS_IN_A_ROW.values()))[0]):
            moment = draw(chance, reference, self._signals)
            process = self._server.run(scenario.commands[0], trial.folder, TIMEOUT_SECONDS, moment)
            if not self._judge_struck(process, moment, scenario, trial):
                break
        self._finish(scenario, trial, [reference])

    def _together(self, scenario: Scenario, trial: Trial, chance: random.Random) -> None:
        references = self.references(scenario)
        moment, victim = draw(chance, references[0], self._signals), chance.randrange(2)
        if scenario.harm is Harm.PAUSED:
            processes = self._pause(scenario, trial, chance.randint(1, references[0].changes), chance.random() < 0.5)
        else:
            offset = chance.choice((0.0, chance.uniform(0, 0.1), chance.uniform(0, references[0].seconds / 2)))
            trial.how = f"the second started {offset:.3f} s after the first"
            is_killed = scenario.harm is Harm.KILLED
            processes = self._start_both(scenario, trial, offset, victim, moment if is_killed else None)
        for process in processes:
            self._server.wait(process, TIMEOUT_SECONDS)
        was_struck = False
        for place, process in enumerate(processes):
            other = processes[1 - place].pid
            if scenario.harm is Harm.KILLED and place == victim:
                was_struck = self._judge_struck(process, moment, scenario, trial, other)
            else:
                self._judge_left_alone(process, other, scenario, trial)
        trial.problems += damage(trial.folder, [one.trees[False, False] for one in references])
        statuses = [process.status for process in processes]
        if not was_struck and all(status != 0 for status in statuses):
            trial.problems.append(Problem("both refused", f"statuses {statuses}"))
        if scenario.one_wins:
            self._finish_one(scenario, trial, references, statuses)
            return
        is_one_command = len(set(scenario.commands)) == 1
        if all(status == 0 for status in statuses) or (is_one_command and 0 in statuses):
            self._compare(scenario, trial, references)
        self._finish(scenario, trial, references)

    def _start_both(
        self, scenario: Scenario, trial: Trial, offset: float, victim: int, moment: Moment | None
    ) -> list[Process]:
        """Start two processes and perhaps signal one of them at a moment."""
        first, second = scenario.commands
        by_clock = moment is not None and moment.change is None
        processes = [self._server.start(first, trial.folder, moment if victim == 0 else None)]
        begin = time.monotonic()
        if moment is not None and by_clock and victim == 0 and moment.seconds < offset:
            self._server.strike(processes[0], moment)
        time.sleep(max(0.0, begin + offset - time.monotonic()))
        processes.append(self._server.start(second, trial.folder, moment if victim == 1 else None))
        if moment is not None and by_clock and (victim == 1 or moment.seconds >= offset):
            self._server.strike(processes[victim], moment)
        return processes

    def _pause(self, scenario: Scenario, trial: Trial, change: int, reverse: bool) -> list[Process]:
        """Stop a process before a change, let the other run to its end, or until it seems to wait, and go on."""
        commands = scenario.commands[::-1] if reverse else scenario.commands
        trial.how = f"{'the second' if reverse else 'the first'} paused before change {change} while the other ran"
        stopped = self._server.start(commands[0], trial.folder, Moment(signal.SIGSTOP, 0.0, change))
        self._server.wait_for_change(stopped, change, TIMEOUT_SECONDS)
        other = self._server.start(commands[1], trial.folder)
        other.ended.wait(3 * max(one.seconds for one in self.references(scenario)))
        self._server.signal(stopped, signal.SIGCONT)
        return [other, stopped] if reverse else [stopped, other]

    def _judge_struck(
        self, process: Process, moment: Moment, scenario: Scenario, trial: Trial, other: int | None = None
    ) -> bool:
        """Judge a process that was to be killed; returns whether it was."""
        trial.statuses.append(process.status)
        references = self.references(scenario)
        expected = {-int(moment.signal), ERRORS_OF_INTERRUPTION.get(moment.signal)}
        if process.status not in expected:
            if not is_done(process, scenario) and not is_refused(process, scenario, other):
                trial.problems.append(Problem("status after signal", f"{moment}: {told(process)}"))
            return False
        found = {"whole": len(list(files_of(trial.folder))), "hidden": hidden(trial.folder)}
        last = process.changes[-1].replace(f"{trial.folder}/", "") if process.changes else ""
        trial.kills.append(Kill(str(moment), moment.signal.name, last, found, process.status))
        if process.hung:
            trial.problems.append(Problem("does not end", f"{moment}: killed after {TIMEOUT_SECONDS} s"))
        if moment.signal is not signal.SIGKILL and process.has_begun and not process.was_over:
            lines = [line for line in process.stderr.splitlines() if line.strip() and line not in references[0].stderr]
            if len(lines) != 1 or (process.status or 0) < 0:
                trial.problems.append(Problem(f"words after {moment.signal.name}", f"{moment}: {told(process)}"))
        if other is None:
            trial.problems += damage(trial.folder, [one.trees[False, False] for one in references])
        return True

    def _judge_left_alone(self, process: Process, other: int, scenario: Scenario, trial: Trial) -> None:
        trial.statuses.append(process.status)
        if process.hung:
            trial.problems.append(Problem("does not end", f"killed after {TIMEOUT_SECONDS} s"))
        elif process.status == 2 and not is_refused(process, scenario, other):
            trial.problems.append(Problem("refusal", f"names neither process {other} nor the cause: {told(process)}"))
        elif process.status not in (0, 2):
            trial.problems.append(Problem("beside another", told(process)))

    def _finish(self, scenario: Scenario, trial: Trial, references: list[Reference]) -> None:
        """Run every command to its end and compare."""
        for command in dict.fromkeys(scenario.commands):
            process = self._server.run(command, trial.folder, TIMEOUT_SECONDS)
            trial.statuses.append(process.status)
            if not is_done(process, scenario):
                trial.problems.append(Problem("cannot go on", told(process)))
        self._compare(scenario, trial, references)

    def _finish_one(
        self, scenario: Scenario, trial: Trial, references: list[Reference], statuses: Sequence[int | None]
    ) -> None:
        """The same where one command wins: the winner ends well, the other is refused for good."""
        if all(status == 0 for status in statuses):
            trial.problems.append(Problem("both ended well", "two runs of other settings in one folder"))
        again = [self._server.run(command, trial.folder, TIMEOUT_SECONDS) for command in scenario.commands]
        trial.statuses += [process.status for process in again]
        won = [place for place, process in enumerate(again) if process.status == 0]
        for process in again:
            if process.status != 0 and not is_refused(process, scenario, None):
                trial.problems.append(Problem("cannot go on", told(process)))
        if len(won) != 1:
            trial.problems.append(Problem("cannot go on", f"statuses {[process.status for process in again]}"))
        else:
            self._compare(scenario, trial, [references[won[0]]])

    def _compare(self, scenario: Scenario, trial: Trial, references: list[Reference]) -> None:
        """Compare what is there with unbroken runs."""
        graceful = any(kill.signal != signal.SIGKILL.name for kill in trial.kills)
        # Who is asked to end keeps what there is: a shard with fewer samples, a checkpoint between two others.
        way = (graceful or len(scenario.commands) > 1, graceful)
        try:
            found = tree_of(trial.folder, *way)
        except Exception as error:  # a damaged data set, whatever its reader raises
            trial.problems.append(Problem("partial", f"cannot be read: {type(error).__name__}: {error}"))
            return
        best = min((differences(found, reference.trees[way]) for reference in references), key=len)
        if len(set(scenario.commands)) == 1 and not best and order_of(trial.folder) != references[0].order:
            best = [Problem("order", "the samples are there in another order")]
        known = set(trial.problems)
        left = [Problem("left over", name) for name in hidden(trial.folder)]
        trial.problems += [problem for problem in [*best, *left] if problem not in known]


def groups_of(scenario: Scenario) -> list[tuple[Command, ...]]:
    """Commands that leave a reference together, one after the other; the same one twice leaves what it leaves once."""
    different = tuple(dict.fromkeys(scenario.commands))
    return [(command,) for command in different] if scenario.one_wins else [different]


def draw(chance: random.Random, reference: Reference, signals: Mapping[signal.Signals, float] = SIGNALS) -> Moment:
    """A random moment of a command that takes as long, and changes as many files, as an unbroken run."""
    kind = chance.choices(list(signals), list(signals.values()))[0]
    if chance.random() < BY_CLOCK:
        return Moment(kind, chance.uniform(0, reference.seconds))
    delay = chance.choice((0.0, chance.uniform(0, MAX_DELAY_SECONDS)))
    return Moment(kind, delay, chance.randint(1, reference.changes))


def is_done(process: Process, scenario: Scenario) -> bool:
    """Whether a command ended well, or said that its result is there already."""
    return process.status == 0 or (not scenario.one_wins and is_refused(process, scenario, None))


def is_refused(process: Process, scenario: Scenario, other: int | None) -> bool:
    """Whether a command was refused, in words that name the process in its way or another known cause."""
    if process.status != 2:
        return False
    named = other is not None and re.search(rf"\bprocess {other}\b", process.stderr) is not None
    return named or any(part in process.stderr for part in scenario.refusals)


def told(process: Process) -> str:
    """What a process left its starter with: status, and what it wrote to standard error."""
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else "nothing"
    kind = "a traceback" if any(line.startswith("Traceback") for line in lines) else f"{len(lines)} lines"
    return f"status {process.status}, {kind} ({len(lines)}), last: {last}"
