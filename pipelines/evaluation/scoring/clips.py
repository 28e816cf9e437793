"""The videos of a folder, with what a manifest says of them; everything is checked before the first is decoded."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.evaluation.sampling import MANIFEST, VIDEOS
from pipelines.evaluation.scoring.metric import Blocks, Clip
from pipelines.media.reader import SUFFIXES
from pipelines.media.video import video_facts
from pipelines.prompts.names import shown
from wan.utils.errors import InputError
from wan.utils.files import read_json

MAX_MANIFEST_BYTES = 2**28
ISO_SUFFIXES = (".mp4", ".m4v", ".mov")
LARGE_BOX = (1).to_bytes(4)
_INDEX = re.compile(r"-(\d{1,4})$")
_CURE = "finish it with scripts/sample_suite.py, or give the folder of videos without the manifest"


@dataclass(frozen=True)
class ClipFolder:
    """The videos of a folder.

    Attributes:
        path: the folder that holds them.
        clips: sorted by name.
        settings: what made them, as the manifest says; None without one.
    """

    path: Path
    clips: tuple[Clip, ...]
    settings: Mapping[str, Any] | None = None
    by_name: dict[str, Clip] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {clip.name: clip for clip in self.clips})

    @property
    def fingerprint(self) -> str:
        """Hash of names and contents."""
        text = "".join(f"{clip.name}\n{clip.sha256}\n" for clip in self.clips)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_clips(folder: Path, blocks: Blocks | None = None, prompts_from_names: bool = False) -> ClipFolder:
    """Find the videos of a folder and read what is known of them.

    Args:
        folder: what `scripts/sample_suite.py` wrote, its `videos` with the manifest beside them, or any folder of
            videos (`SUFFIXES`).
        blocks: how the videos were generated; by default what the manifest says.
        prompts_from_names: whether names without a manifest are `{prompt}-{index}`, as VBench has them.

    Raises:
        InputError: no folder, no videos, a video that is damaged or has no rate, or a manifest that does not fit.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {shown(folder)}: give one that holds videos")
    manifest = next((path for path in (folder / MANIFEST, folder.parent / MANIFEST) if path.is_file()), None)
    if manifest is not None and (manifest.parent == folder or folder.name == VIDEOS):
        return _of_manifest(manifest, blocks)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"no videos in {shown(folder)}: give a folder that holds some ({', '.join(SUFFIXES)})")
    clips = [_unlisted(path, blocks, prompts_from_names) for path in paths]
    _check_distinct(clips)
    return ClipFolder(folder, tuple(clips))


def _check_distinct(clips: Sequence[Clip]) -> None:
    """Make sure that no two videos have the same prompt and index, by which runs are paired."""
    found: dict[tuple[str, int], Clip] = {}
    for clip in clips:
        other = found.setdefault((clip.group, clip.index), clip)
        if other is not clip:
            raise InputError(
                f"{shown(other.name)} and {shown(clip.name)} are both number {clip.index} of '{shown(clip.group)}': "
                "rename one"
            )


def _unlisted(path: Path, blocks: Blocks | None, prompts_from_names: bool) -> Clip:
    """A video that no manifest names."""
    number = _INDEX.search(path.stem)
    group = path.stem[: number.start()] if number else path.stem
    return _clip(path, group if prompts_from_names else None, group, int(number[1]) if number else 0, blocks)


def _of_manifest(path: Path, blocks: Blocks | None) -> ClipFolder:
    """The videos that a manifest names, which must be those of its folder."""
    page = read_json(path, max_bytes=MAX_MANIFEST_BYTES)
    settings, entries = page.get("settings"), page.get("videos")
    if not isinstance(settings, dict) or not isinstance(entries, dict):
        raise InputError(f"{shown(path)} is no manifest of scripts/sample_suite.py: give the folder of videos alone")
    videos = path.parent / VIDEOS
    there = {file.name for file in videos.iterdir() if file.suffix in SUFFIXES} if videos.is_dir() else set()
    if not entries:
        raise InputError(f"{shown(path)} names no videos: {_CURE}")
    for names, problem in ((entries.keys() - there, "are not there"), (there - entries.keys(), "it does not name")):
        if names:
            first = shown(min(names))
            raise InputError(
                f"{shown(path)} does not fit its folder: {len(names)} videos {problem}, such as {first}: {_CURE}"
            )
    clips = [_listed(videos / name, entry, path, settings, blocks) for name, entry in sorted(entries.items())]
    _check_distinct(clips)
    return ClipFolder(videos, tuple(clips), settings)


def _listed(path: Path, entry: Any, manifest: Path, settings: Mapping[str, Any], blocks: Blocks | None) -> Clip:
    """A video that a manifest names."""
    prompt, index, digest = (
        entry.get(key) if isinstance(entry, dict) else None for key in ("prompt", "index", "sha256")
    )
    if not isinstance(prompt, str) or type(index) is not int or not isinstance(digest, str):
        raise InputError(f"{shown(manifest)} lacks prompt, index or hash of {shown(path.name)}: {_CURE}")
    clip = _clip(path, prompt, prompt, index, blocks)
    if clip.sha256 != digest:
        raise InputError(f"{shown(path)} is not the video that {shown(manifest)} names (another hash): {_CURE}")
    if blocks is None:
        return _with_blocks(clip, settings)
    return clip


def _with_blocks(clip: Clip, settings: Mapping[str, Any]) -> Clip:
    """A video with its blocks, if the settings tell their length.

    The first latent frame is one frame of video, every later one as many as fit the video's length.
    """
    latents, per_block = settings.get("num_output_frames"), settings.get("frames_per_block")
    if type(latents) is not int or type(per_block) is not int or latents < 2 or per_block < 1:
        return clip
    stride, rest = divmod(clip.num_frames - 1, latents - 1)
    if rest or stride < 1:
        return clip
    values = vars(clip) | {"blocks": Blocks((per_block - 1) * stride + 1, per_block * stride)}
    return Clip(**values)


def _clip(path: Path, prompt: str | None, group: str, index: int, blocks: Blocks | None) -> Clip:
    """A video whose container is whole."""
    facts = video_facts(path)
    _check_not_cut(path)
    if not facts.num_frames or not facts.fps:
        raise InputError(f"{shown(path)} has no frames, or no frame rate: make it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Clip(
        path.name, path, digest, prompt, group, index, facts.num_frames, facts.height, facts.width, facts.fps, blocks
    )


def _check_not_cut(path: Path) -> None:
    """Make sure that an mp4 ends where its last box does: of a cut one, players show the beginning and say nothing.

    Boxes are those of ISO/IEC 14496-12: a size of 4 bytes, a type of 4 bytes; size 1 is followed by one of 8 bytes, and
    size 0 means up to the end.

    Raises:
        InputError: it is cut.
    """
    if path.suffix.lower() not in ISO_SUFFIXES:
        return
    end, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place < end:
            file.seek(place)
            head = file.read(16)
            size = int.from_bytes(head[8:16] if head[:4] == LARGE_BOX else head[:4])
            if head[:4] == bytes(4):
                return
            if size < 8 or place + size > end:
                raise InputError(f"{shown(path)} is cut short or damaged at byte {place} of {end}: make it again")
            place += size
