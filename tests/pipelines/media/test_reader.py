"""Videos as training data sees them: the colours that a player shows, upright, and found whatever they are called."""

import logging
import os
import shutil
import unicodedata
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.media.frames import HD_LINES, UnusableVideoError
from pipelines.media.reader import find_videos, read_clip
from wan.utils.errors import InputError

WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
"""Share of red and blue in luma, by the matrix's number in H.273."""
BLOCK = 16
LIMITED, FULL = 1, 2
NAMES = [
    b" spaces .mp4 ",
    b"dots...",
    b"a:b.mp4",
    b"http:x.mp4",
    b"file:a.mp4",
    b"concat:a.mp4|b.mp4",
    b"100%.mp4",
    b"a%03d.mp4",
    b"#1?.mp4",
    b"-rf.mp4",
    b"UPPER.MP4",
    "é ü 🙂.mp4".encode(),
    b"caf\xe9.mp4",
    b"quo\"te's.mp4",
    b"back\\slash.mp4",
]


def colour_blocks(height: int, width: int) -> NDArray[np.uint8]:
    colours = np.random.default_rng(0).integers(0, 256, (height // BLOCK, width // BLOCK, 3))
    return np.kron(colours, np.ones((BLOCK, BLOCK, 1), int)).astype(np.uint8)


def planes(
    picture: NDArray[np.uint8], matrix: int, full: bool, bits: int, step: tuple[int, int]
) -> list[NDArray[np.generic]]:
    """A picture's Y, U and V by the formula, U and V with every `step`-th row and column."""
    red, green, blue = (picture[..., channel] / 255 for channel in range(3))
    of_red, of_blue = WEIGHTS[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = (blue - luma) / 2 / (1 - of_blue), (red - luma) / 2 / (1 - of_red)
    unit, top = 2 ** (bits - 8), 2**bits - 1
    if full:
        values = [luma * top, *(one * top + 128 * unit for one in chroma)]
    else:
        values = [(16 + 219 * luma) * unit, *((128 + 224 * one) * unit for one in chroma)]
    values = [np.clip(np.rint(one), 0, top).astype(np.uint8 if bits == 8 else np.uint16) for one in values]
    return [values[0], *(one[:: step[0], :: step[1]] for one in values[1:])]


def write_planes(
    path: Path,
    values: list[NDArray[np.generic]],
    form: str,
    codec: str = "ffv1",
    *,
    matrix: int = 2,
    color_range: int = 0,
    trc: int = 2,
    options: dict[str, str] | None = None,
    turn: int | None = None,
) -> None:
    """A video of two frames with these planes and tags."""
    height, width = values[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, form
        tags = {"colorspace": matrix, "color_range": color_range, "color_trc": trc}
        for number in range(2):
            frame = av.VideoFrame(width, height, form)
            for plane, value in zip(frame.planes, values, strict=True):
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                content = np.ascontiguousarray(value).view(np.uint8).reshape(len(value), -1)
                rows[:, : content.shape[1]] = content
                plane.update(rows)
            for name, tag in tags.items():
                setattr(stream.codec_context, name, tag)
                setattr(frame, name, tag)
            if turn is not None and not number:
                stream.set_display_rotation(turn)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_picture(path: Path, picture: NDArray[np.uint8], codec: str, form: str, given: str, **tags: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], form
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(picture, format=given)
            frame = frame if given == form else frame.reformat(format=form)
            for name, tag in tags.items():
                setattr(stream.codec_context, name, tag)
                setattr(frame, name, tag)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def difference(path: Path, expected: NDArray[np.uint8]) -> int:
    """The largest difference in the middles of the blocks, away from where chroma is interpolated."""
    frames = list(read_clip(path, *expected.shape[:2], 16))
    assert len(frames) == 2
    rows, columns = (np.arange(size) % BLOCK for size in expected.shape[:2])
    middle = ((rows >= 4) & (rows < 12))[:, None] & ((columns >= 4) & (columns < 12))[None]
    return int(np.abs(frames[0].astype(int) - expected)[middle].max())


@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("form", "bits", "step"),
    [
        ("yuv420p", 8, (2, 2)),
        ("yuv422p", 8, (1, 2)),
        ("yuv444p", 8, (1, 1)),
        ("yuv420p10le", 10, (2, 2)),
        ("yuv444p12le", 12, (1, 1)),
    ],
)
def test_tagged_colours_are_those_of_the_tags(
    form: str, bits: int, step: tuple[int, int], full: bool, matrix: int, tmp_path: Path
) -> None:
    picture = colour_blocks(32, 96)
    values = planes(picture, matrix, full, bits, step)
    write_planes(tmp_path / "a.mkv", values, form, matrix=matrix, color_range=FULL if full else LIMITED)
    assert difference(tmp_path / "a.mkv", picture) <= 2


@pytest.mark.parametrize("height", [480, 576, 704, HD_LINES, 1088])
@pytest.mark.parametrize("tag", [2, 0])
def test_colours_without_a_tag_are_those_of_players(height: int, tag: int, tmp_path: Path) -> None:
    picture = colour_blocks(height, 32)
    for matrix in (1, 6):
        write_planes(tmp_path / "a.mkv", planes(picture, matrix, False, 8, (2, 2)), "yuv420p", matrix=tag)
        is_right = matrix == (1 if height >= 720 else 6)
        assert (difference(tmp_path / "a.mkv", picture) <= 2) == is_right


@pytest.mark.parametrize(
    ("codec", "name", "options"),
    [
        ("libx264", "a.mp4", {"crf": "0"}),
        ("libvpx-vp9", "a.webm", {"lossless": "1"}),
        ("libx264", "a.mov", {"qp": "0"}),
    ],
)
def test_tags_are_read_from_every_container(codec: str, name: str, options: dict[str, str], tmp_path: Path) -> None:
    picture = colour_blocks(32, 96)
    for matrix in (1, 6):
        values = planes(picture, matrix, False, 8, (2, 2))
        write_planes(tmp_path / name, values, "yuv420p", codec, matrix=matrix, color_range=LIMITED, options=options)
        assert difference(tmp_path / name, picture) <= 2


@pytest.mark.parametrize(
    ("codec", "form", "name"),
    [
        ("ffv1", "bgr0", "a.mkv"),
        ("ffv1", "gbrp10le", "a.mkv"),
        ("libx264rgb", "rgb24", "a.mp4"),
        ("png", "rgb24", "a.mov"),
        ("qtrle", "rgb24", "a.mov"),
        ("libvpx-vp9", "gbrp", "a.webm"),
        ("mjpeg", "yuvj444p", "a.avi"),
    ],
)
def test_rgb_and_full_range_codecs(codec: str, form: str, name: str, tmp_path: Path) -> None:
    picture = colour_blocks(32, 96)
    write_picture(tmp_path / name, picture, codec, form, "rgb24")
    assert difference(tmp_path / name, picture) <= 3


def test_grey_has_the_range_of_its_tag(tmp_path: Path) -> None:
    grey = colour_blocks(32, 96)[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for tag, stored in (
        (0, grey),
        (FULL, grey),
        (LIMITED, np.rint(16 + grey.astype(float) * 219 / 255).astype(np.uint8)),
    ):
        write_picture(tmp_path / "a.mkv", stored, "ffv1", "gray", "gray", color_range=tag)
        assert difference(tmp_path / "a.mkv", expected) <= 1


@pytest.mark.parametrize(
    ("codec", "form", "name"),
    [("png", "rgba", "a.mov"), ("qtrle", "argb", "a.mov"), ("ffv1", "yuva444p", "a.mkv"), ("ffv1", "bgra", "a.mkv")],
)
def test_what_is_transparent_is_white(codec: str, form: str, name: str, tmp_path: Path) -> None:
    alpha = np.zeros((32, 96, 1), np.uint8)
    alpha[:, 48:] = 255
    expected = colour_blocks(32, 96)
    write_picture(tmp_path / name, np.concatenate([expected, alpha], axis=2), codec, form, "rgba")
    expected[:, :48] = 255
    assert difference(tmp_path / name, expected) <= 2


@pytest.mark.parametrize("size", [(33, 17), (31, 64), (32, 95)])
def test_odd_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    picture = np.full((*size, 3), (200, 40, 90), np.uint8)
    write_planes(tmp_path / "a.mkv", planes(picture, 1, False, 8, (2, 2)), "yuv420p", matrix=1)
    assert difference(tmp_path / "a.mkv", picture) <= 2


def test_colours_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    values = planes(colour_blocks(32, 96), 1, False, 10, (2, 2))
    for tags, message in (
        ({"trc": 16}, "HDR .PQ"),
        ({"trc": 18}, "HDR .HLG"),
        ({"matrix": 8}, "matrix"),
        ({"matrix": 14}, "matrix"),
    ):
        write_planes(tmp_path / "a.mkv", values, "yuv420p10le", **tags)
        with pytest.raises(UnusableVideoError, match=message):
            next(read_clip(tmp_path / "a.mkv", 32, 96, 16))


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_videos_are_turned_and_mirrored_as_their_matrix_says(turn: int, mirrored: bool, tmp_path: Path) -> None:
    picture = colour_blocks(32, 48)
    values = planes(picture, 1, False, 8, (2, 2))
    write_planes(tmp_path / "a.mp4", values, "yuv420p", "libx264", matrix=1, turn=turn, options={"qp": "0"})
    expected = np.rot90(picture, turn // 90)
    if mirrored:  # the first column of the matrix, negated: left and right exchanged
        content = bytearray((tmp_path / "a.mp4").read_bytes())
        at = content.index(b"tkhd") + 4 + 40
        for place in (at, at + 12):
            value = int.from_bytes(content[place : place + 4], "big", signed=True)
            content[place : place + 4] = (-value).to_bytes(4, "big", signed=True)
        (tmp_path / "a.mp4").write_bytes(content)
        expected = expected[:, ::-1]
    assert difference(tmp_path / "a.mp4", np.ascontiguousarray(expected)) <= 2


def test_other_angles_are_refused(tmp_path: Path) -> None:
    values = planes(colour_blocks(32, 48), 1, False, 8, (2, 2))
    write_planes(tmp_path / "a.mp4", values, "yuv420p", "libx264", turn=30)
    with pytest.raises(UnusableVideoError, match=r"is turned by .* not by a multiple of 90"):
        next(read_clip(tmp_path / "a.mp4", 32, 48, 16))


@pytest.mark.parametrize("factors", [(0, 0), (1, 0), (1, 2)])
def test_a_display_matrix_that_is_no_turn_is_refused_as_that(factors: tuple[int, int], tmp_path: Path) -> None:
    values = planes(colour_blocks(32, 48), 1, False, 8, (2, 2))
    write_planes(tmp_path / "a.mp4", values, "yuv420p", "libx264", turn=0)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    for place, factor in zip((at, at + 16), factors, strict=True):
        content[place : place + 4] = (factor << 16).to_bytes(4, "big")
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UnusableVideoError, match="has a display matrix that does more than turn and mirror"):
        next(read_clip(tmp_path / "a.mp4", 32, 48, 16))


def test_interlaced_videos_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = colour_blocks(32, 96)
    options = {"x264-params": "interlaced=1", "qp": "0"}
    write_planes(
        tmp_path / "a.mp4", planes(picture, 1, False, 8, (2, 2)), "yuv420p", "libx264", matrix=1, options=options
    )
    assert len(list(read_clip(tmp_path / "a.mp4", 32, 96, 16))) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "a.mp4 is interlaced" in caplog.text


def test_a_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "gray"
        for number, time in enumerate((0, 1, 5, 6)):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32), 10 * number, np.uint8), format="gray")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert [int(frame[0, 0, 0]) // 10 for frame in read_clip(tmp_path / "a.mkv", 16, 32, 16)][:7] == [
        0,
        1,
        1,
        1,
        1,
        2,
        3,
    ]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write_planes(path, planes(colour_blocks(32, 48), 1, False, 8, (2, 2)), "yuv420p", "libx264", matrix=1)
    return path


def test_any_name_is_found_and_read(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a list by relative and absolute paths, and in the working directory, where names look most like addresses."""
    folder = os.fsencode(tmp_path)
    for name in NAMES:
        shutil.copy(clip, os.path.join(folder, name))
    (tmp_path / "list.tsv").write_bytes(b"\n".join(name + b"\tred" for name in NAMES))
    (tmp_path / "absolute.tsv").write_bytes(b"".join(folder + b"/" + name + b"\tred\r\n" for name in NAMES))
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "list.tsv", Path("list.tsv"), tmp_path / "absolute.tsv"):
        videos = find_videos(source)
        assert [os.fsencode(video.path.name) for video in videos] == NAMES
        for video in videos:
            assert len(list(read_clip(video.path, 32, 48, 16))) == 2
    assert [os.fsencode(video.source) for video in find_videos(Path("list.tsv"))] == NAMES


def test_names_are_found_in_either_normal_form_and_with_spaces_around(clip: Path, tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        shutil.copy(clip, tmp_path / unicodedata.normalize(form, f"é{form}.mp4"))
    lines = [unicodedata.normalize(other, f"é{form}.mp4") for form, other in (("NFC", "NFD"), ("NFD", "NFC"))]
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "list.tsv").write_text("\n".join(f"{line}\tred" for line in [*lines, " a.mp4 "]))
    videos = find_videos(tmp_path / "list.tsv")
    assert all(video.path.is_file() for video in videos) and videos[2].source == "a.mp4"


def test_addresses_playlists_and_pipes_are_not_opened(clip: Path, tmp_path: Path) -> None:
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "list.tsv").write_text("a.mp4\tred\nhttp://127.0.0.1:9/a.mp4\tred\n")
    address = find_videos(tmp_path / "list.tsv")[1].path
    for path in (address, *(tmp_path / name for name in ("concat.mp4", "hls.mp4", "pipe.mp4", "."))):
        with pytest.raises(UnusableVideoError):
            next(read_clip(path, 32, 48, 16))


def test_a_file_named_in_two_ways_is_named_twice(clip: Path, tmp_path: Path) -> None:
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for other in ("./a.mp4", str(tmp_path / "a.mp4"), f"../{tmp_path.name}/a.mp4", "link.mp4", " a.mp4"):
        (tmp_path / "list.tsv").write_text(f"a.mp4\tred\nloop.mp4\tred\n{other}\tblue\n")
        with pytest.raises(InputError, match=r"line 3 names .*twice"):
            find_videos(tmp_path / "list.tsv")


def test_folders_hold_videos_of_every_container_and_captions_of_every_kind(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = {
        "a.MP4": b"a red\r\nball\r\n",
        "b.mov": b"\xef\xbb\xbfa red ball",
        "c.mkv": "a red ball".encode("utf-16"),
        "d.d.webm": b"\n\n a red ball \n",
        "e.avi": b"a red ball",
        "f.m4v": b"&nbsp;",
        "g.mp4": b"\xe9",
        "h.mp4": b"a\0b",
    }
    for name, caption in captions.items():
        shutil.copy(clip, tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_bytes(caption)
    (tmp_path / "e.txt").rename(tmp_path / "e.TXT")
    (tmp_path / "link.mp4").symlink_to("a.MP4")
    (tmp_path / "link.txt").write_text("a red ball")
    (tmp_path / "notes.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        videos = find_videos(tmp_path)
    assert [video.source for video in videos] == ["a.MP4", "b.mov", "c.mkv", "d.d.webm", "e.avi", "link.mp4"]
    assert {video.prompt for video in videos} == {"a red ball"}
    assert [record.args[0] for record in caplog.records] == ["f.m4v", "g.mp4", "h.mp4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.mp4\t&nbsp;\n", "line 1 holds nothing that can be seen"),
        (b"a.mp4\tcaf\xe9\n", "line 1: .*not valid text"),
        (b"\n\na.mp4 red\n", "line 3: 'a.mp4 red' is not a path, a tab and a prompt"),
        (b"\t red\n", "line 1"),
        (b"a\0.mp4\tred\n", "binary"),
        (b"x" * 300 + b"\tred\n", "none of the 1 videos"),
    ],
)
def test_bad_lines_of_a_list_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        find_videos(tmp_path / "list.tsv")


def test_a_missing_list_is_called_one(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"list of videos|cannot read"):
            find_videos(path)


def test_damage_never_ends_in_another_error(clip: Path, tmp_path: Path) -> None:
    generator, whole, read = np.random.default_rng(0), clip.read_bytes(), 0
    for _ in range(60):
        content = bytearray(whole)
        for at in generator.integers(0, len(content), 4):
            content[at] = generator.integers(256)
        (tmp_path / "a.mp4").write_bytes(content)
        with suppress(UnusableVideoError):
            read += len(list(read_clip(tmp_path / "a.mp4", 32, 48, 16)))
    assert read > 0


def test_pictures_are_read_at_the_size_asked_for(clip: Path) -> None:
    frame = next(read_clip(clip, 16, 24, 16))
    assert frame.shape == (16, 24, 3) and Image.fromarray(frame).mode == "RGB"


def test_a_video_that_was_not_fetched_is_called_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(
        UnusableVideoError, match="is a Git-LFS pointer, which stands for the video: run `git lfs pull`"
    ):
        list(read_clip(tmp_path / "a.mp4", 16, 16, 16))
