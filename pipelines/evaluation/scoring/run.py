"""One run of scoring: every video is decoded once for all metrics that it lacks, and the JSON grows video by video."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation.scoring.clips import ClipFolder
from pipelines.evaluation.scoring.metric import NOT_MEASURED, Clip, Frames, Metric, NotMeasuredError, Rows
from pipelines.evaluation.scoring.ranks.shares import adopt_shares, share_path, take_shares
from pipelines.evaluation.scoring.ranks.team import Team, Timing, summed
from pipelines.evaluation.scoring.registry import ENTRIES, SETS, Entry, Resources
from pipelines.evaluation.scoring.sets.metric import SetMetric
from pipelines.evaluation.scoring.statistics import estimate, over_time
from pipelines.media.video import iterate_video
from pipelines.prompts.names import shown
from pipelines.provenance import environment, versions
from pipelines.records import Records, open_records
from wan.utils.errors import InputError
from wan.utils.files import remove
from wan.utils.settings import plain, require_same_settings

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the JSON and of the definitions in it; raise it when a definition changes."""
MAX_FRAMES = 16
MAX_CHUNK_BYTES = 64 * 2**20
"""Frames that are decoded at a time: as many as both allow, and at least one."""
LOG_SECONDS = 10.0
SAVE_SECONDS = 5.0
"""The JSON of thousands of videos takes a second to write: not after each, if they come quickly."""
WHOLE = {NOT_MEASURED: "a value of the whole video was read, not measured here"}
LEFT_OUT = "videos_not_measured"
SUMMED_UP = ("value", "drift", "slope")
CURE = "give another --json, or remove that one"
SET_VALUES = ("draws", "reference_videos", "of", "of_prompts")
ALONE = Team()
DECODING = "decoding"
"""The name under which the time that decoding takes is kept, beside the metrics."""
Score = dict[str, Any]
Todo = tuple[str, list[str]]
"""A video, and the metrics to measure it by."""


@dataclass(frozen=True)
class Run:
    """Videos, metrics and settings of a run of scoring.

    Attributes:
        clips: the videos.
        names: of metrics.
        resources: what metrics are made from.
        drift_seconds: seconds at both ends of a video that drift compares.
    """

    clips: ClipFolder
    names: Sequence[str]
    resources: Resources
    drift_seconds: float


def score(run: Run, json: Path, team: Team = ALONE) -> dict[str, Any]:
    """Score the videos that a file does not have yet, and sum up.

    Scores are kept by video and metric. A video whose content changed is scored again. Metrics that could not be
    measured are tried again. Processes of a team share the videos, and all must call this; those that do not lead keep
    their share in a file of their own until it is in the one of the leading process.

    Args:
        json: the file, which need not be there.

    Returns:
        its content; of a process that does not lead, its share.

    Raises:
        InputError: the file was made of other videos, settings or weights, or cannot be written; or a video is damaged.
    """
    settings = {"format": FORMAT, "drift_seconds": run.drift_seconds}
    with ExitStack() as stack:
        with team.step():
            if team.leads:
                records = _opened(stack, json, settings)
                _check_videos(run, records, json)
                adopt_shares(records, json)
        with team.step():
            if not team.leads:
                records = _opened(stack, share_path(json, team.rank), settings)
            made, missing = _make(run, records, json)
        team.agree({"videos": run.clips.fingerprint, "metrics": list(run.names), "missing": missing})
        team.agree({name: metric.identity() for name, metric in made.items()})
        records.page["folder"] = str(run.clips.path)
        records.page["made_with"] = dict(run.clips.settings or {})
        records.page["environment"] = environment(run.resources.device)
        single = {name: metric for name, metric in made.items() if isinstance(metric, Metric)}
        todo = team.from_leader(_todo(run, single, records) if team.leads else None)
        timing = Timing()
        try:
            records.save()
            _score_clips(run, single, todo[team.rank :: team.size], records, timing)
        finally:
            records.save()
        take_shares(records, team.gathered(records.page["videos"]))
        found = _measure_sets({name: one for name, one in made.items() if isinstance(one, SetMetric)}, team, timing)
        timings = team.gathered(timing)
        if team.leads:
            _sum_up(run, records, missing, found, summed(timings))
        with team.step():  # the shares are in the file now
            pass
        if not team.leads:
            remove(share_path(json, team.rank))
        return records.page


def _opened(stack: ExitStack, path: Path, settings: Mapping[str, Any]) -> Records:
    """A file of scores, held until the stack ends."""
    records = stack.enter_context(open_records(path, "videos", others={"metrics": {}}, cure=CURE))
    records.made_with(settings)
    return records


def _check_videos(run: Run, records: Records, json: Path) -> None:
    """Make sure that a file has no videos that the folder lacks."""
    gone = records.page["videos"].keys() - run.clips.by_name.keys()
    if gone:
        raise InputError(
            f"{json} has scores of {len(gone)} videos that {shown(run.clips.path)} lacks, such as {shown(min(gone))}: "
            f"{CURE}"
        )


def _make(run: Run, records: Records, json: Path) -> tuple[dict[str, Metric | SetMetric], dict[str, str]]:
    """Make the metrics, and say why others cannot be made."""
    made: dict[str, Metric | SetMetric] = {}
    missing: dict[str, str] = {}
    known: dict[str, Any] = records.page["metrics"]
    for name in run.names:
        try:
            made[name] = ENTRIES[name].make(run.resources)
        except NotMeasuredError as error:
            missing[name] = str(error)
            if "identity" in known.get(name, {}):
                raise InputError(f"{json} has {name}, which cannot be measured now ({error}): {CURE}") from error
            log.warning("%s is not measured: %s", name, error)
    for name, metric in made.items():
        about = _about(ENTRIES[name]) | {"identity": metric.identity(), "origin": metric.origin()}
        former = known.get(name, {})
        if "identity" in former:
            before, now = ({key: one.get(key) for key in ("identity", "origin")} for one in (former, about))
            require_same_settings(before, now, f"{name} of {json} was measured", CURE)
            if former.get("versions") != about["versions"]:
                log.warning("%s was measured with %s before, now with %s", name, former["versions"], about["versions"])
        known[name] = former | about if name in SETS else about
    return made, missing


def _about(entry: Entry) -> dict[str, Any]:
    """Description of a metric for the file of scores, without values."""
    spec = {key: value for key, value in asdict(entry.spec).items() if key != "name"}
    return spec | {"direction": entry.spec.direction.value, "versions": versions(entry.packages)}


def _described(about: Mapping[str, Any]) -> dict[str, Any]:
    """Strip a metric's entry of the sums of an earlier run."""
    return {key: value for key, value in about.items() if key not in (*SUMMED_UP, *SET_VALUES, NOT_MEASURED, LEFT_OUT)}


def _facts(clip: Clip) -> dict[str, Any]:
    """What a file says of a video beside its scores."""
    return plain({key: value for key, value in asdict(clip).items() if key not in ("name", "path")})


def _todo(run: Run, made: Mapping[str, Metric], records: Records) -> list[Todo]:
    """Videos with the metrics that they lack."""
    found = []
    for clip in run.clips.clips:
        former = records.find(clip.name) or {}
        scores: dict[str, Score] = former.get("scores", {})
        facts = _facts(clip)
        changed = [key for key in facts if former and former.get(key) != facts[key]]
        if changed:
            log.warning("%s has another %s than before: it is scored again", shown(clip.name), ", ".join(changed))
            scores = {}
        wanted = [name for name in made if NOT_MEASURED in scores.get(name, {NOT_MEASURED: ""})]
        if wanted:
            found.append((clip.name, wanted))
    return found


def _score_clips(run: Run, made: Mapping[str, Metric], todo: Sequence[Todo], records: Records, timing: Timing) -> None:
    """Score videos; save and tell now and then."""
    told = saved = time.monotonic()
    for number, (name, wanted) in enumerate(todo, 1):
        clip, former = run.clips.by_name[name], records.find(name) or {}
        facts = _facts(clip)
        scores = former["scores"] if former and all(former.get(key) == facts[key] for key in facts) else {}
        scores = scores | measure_clip(clip, {one: made[one] for one in wanted}, run.drift_seconds, timing)
        records.page["videos"][name] = facts | {"scores": scores}
        if time.monotonic() - saved > SAVE_SECONDS:
            records.save()
            saved = time.monotonic()
        if time.monotonic() - told > LOG_SECONDS:
            log.info("scored %d of %d videos", number, len(todo))
            told = time.monotonic()


def _measure_sets(made: Mapping[str, SetMetric], team: Team, timing: Timing) -> dict[str, Any]:
    """Distances of the set of videos, or why one has none; features are made by all processes."""
    found: dict[str, Any] = {}
    for name, metric in made.items():
        with team.step(), timing.of(name), suppress(NotMeasuredError):  # the leading process comes across it again
            timing.count([name], metric.fill(team.rank, team.size))
        if team.leads:
            try:
                found[name] = metric.measure()
            except NotMeasuredError as error:
                found[name] = {NOT_MEASURED: str(error)}
    return found


def _sum_up(
    run: Run, records: Records, missing: Mapping[str, str], sets: Mapping[str, Any], timing: Mapping[str, Any]
) -> None:
    """Add means and distances to the file, and how fast metrics were."""
    page = records.page
    page["videos"] = {
        clip.name: page["videos"].get(clip.name) or _facts(clip) | {"scores": {}} for clip in run.clips.clips
    }
    page["metrics"].update({name: _about(ENTRIES[name]) | {NOT_MEASURED: why} for name, why in missing.items()})
    for name, about in page["metrics"].items():
        if name in sets:
            page["metrics"][name] = _described(about) | sets[name]
        elif name in SETS:
            if about.get("of", run.clips.fingerprint) != run.clips.fingerprint:
                page["metrics"][name] = _described(about) | {NOT_MEASURED: "videos changed since: ask for it again"}
        elif "identity" in about:
            page["metrics"][name] = _described(about) | _summary(page["videos"], name)
    page["timing"] = page.get("timing", {}) | dict(timing)
    records.save()


def measure_clip(
    clip: Clip, metrics: Mapping[str, Metric], drift_seconds: float, timing: Timing | None = None
) -> dict[str, Score]:
    """Measure a video by some metrics.

    Args:
        timing: counts what each takes.

    Raises:
        InputError: it is damaged, or is not as its container says.
    """
    timing = timing or Timing()
    scores: dict[str, Score] = {}
    readers: dict[str, _Reader] = {}
    for name, metric in metrics.items():
        try:
            with timing.of(name):
                value = metric.known(clip)
            if value is not None:
                scores[name] = {"value": value, "drift": WHOLE, "slope": WHOLE}
            else:
                readers[name] = _Reader(metric, clip)
        except NotMeasuredError as error:
            scores[name] = {NOT_MEASURED: str(error)}
    num_frames, chunks = 0, _chunks(clip)
    while readers:
        with timing.of(DECODING):
            chunk = next(chunks, None)
        if chunk is None:
            break
        num_frames += len(chunk)
        for name, reader in readers.items():
            with timing.of(name):
                reader.add(chunk)
    if readers and num_frames != clip.num_frames:
        raise InputError(
            f"{shown(clip.path)} has {num_frames} frames, its container says {clip.num_frames}: make it again"
        )
    for name, reader in readers.items():
        try:
            scores[name] = reader.score(drift_seconds)
        except NotMeasuredError as error:
            scores[name] = {NOT_MEASURED: str(error)}
    measured = [name for name in metrics if NOT_MEASURED not in scores[name] and not metrics[name].is_read]
    timing.count(measured, clip.num_frames)
    timing.count([DECODING] if readers else [], clip.num_frames)
    return scores


def _chunks(clip: Clip) -> Iterator[Frames]:
    """The frames of a video, some at a time."""
    size = max(1, min(MAX_FRAMES, MAX_CHUNK_BYTES // (clip.height * clip.width * 3)))
    chunk: list[Frames] = []
    for frame in iterate_video(clip.path):
        chunk.append(frame)
        if len(chunk) == size:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


class _Reader:
    """The rows of a metric for a video that comes in chunks."""

    def __init__(self, metric: Metric, clip: Clip) -> None:
        self._metric, self._clip = metric, clip
        self._measure, self._stride = metric.begin(clip), metric.stride(clip)
        self._rows: list[Rows] = []
        self._seen = 0
        self._before: Frames | None = None

    def add(self, frames: Frames) -> None:
        """Measure the next frames."""
        offset = -self._seen % self._stride
        self._seen += len(frames)
        frames = frames[offset :: self._stride]
        if not len(frames):
            return
        if self._metric.of_pairs:
            joined = frames if self._before is None else np.concatenate([self._before, frames])
            self._before = frames[-1:].copy()
            frames = joined
            if len(frames) < 2:
                return
        self._rows.append(self._measure(frames))

    def score(self, drift_seconds: float) -> Score:
        """The value, what belongs to it, and its change over time."""
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, 1))
        if not np.isfinite(rows).all():
            raise NotMeasuredError("it gives numbers that are not finite")
        value = self._metric.summarise(rows)
        places = np.arange(len(rows)) + (1 if self._metric.of_pairs else 0)
        seconds = places * self._stride / self._clip.fps
        change = over_time(rows, seconds, self._clip.seconds, drift_seconds, self._metric.summarise)
        return {"value": value, **self._metric.details(rows), **change}


def _summary(videos: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Means over prompts with intervals, and how many videos have no value."""
    scored = {video: entry["scores"][name] for video, entry in videos.items() if name in entry["scores"]}
    reasons = [score[NOT_MEASURED] for score in scored.values() if NOT_MEASURED in score]
    if len(reasons) == len(scored):
        return {NOT_MEASURED: reasons[0] if reasons else "no videos"}
    found: dict[str, Any] = {}
    if reasons:
        log.warning("%s is not measured for %d of %d videos: %s", name, len(reasons), len(scored), reasons[0])
        found[LEFT_OUT] = len(reasons)
    for key in SUMMED_UP:
        values: dict[str, list[float]] = {}
        for video, score in scored.items():
            if isinstance(score.get(key), float):
                values.setdefault(videos[video]["group"], []).append(score[key])
        found[key] = estimate(values).as_record() if values else _first_reason(scored, key)
    return found


def _first_reason(scored: Mapping[str, Score], key: str) -> dict[str, str]:
    reasons = (score[key] for score in scored.values() if isinstance(score.get(key), dict))
    return next(reasons, {NOT_MEASURED: "no video has a value"})
