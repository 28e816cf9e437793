"""Suites are read strictly, parts of them are even, and every prompt has a file of its own."""

import json
import unicodedata
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.evaluation.names import MAX_STEM_BYTES, can_be_name, file_stems, ignores_case
from pipelines.evaluation.sampling import plan_videos
from pipelines.evaluation.suite_files import KNOWN, OWN, read_suite, read_suite_file, with_extended
from pipelines.evaluation.suites import Suite, SuiteEntry, limited, of_dimensions, with_samples
from pipelines.prompts.schedules import Switch
from wan.utils.errors import InputError

VBENCH = [
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"], "auxiliary_info": {"a": "b"}},
    {"prompt_en": "a still bench", "dimension": ["temporal_flickering"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["overall_consistency", "imaging_quality"]},
]
AWKWARD = [
    "../../etc/passwd",
    "/root",
    "a\\b",
    ".hidden",
    "-rf",
    " a",
    "a\tb",
    "a\x1b[31mb",
    "a\u202eb",
    "x" * (MAX_STEM_BYTES + 1),
    "é" * (MAX_STEM_BYTES // 2 + 1),
    unicodedata.normalize("NFD", "café"),
    "..",
    "日\u2028本",
]


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_vbench_is_read_as_vbench_reads_it(tmp_path: Path) -> None:
    suite = read_suite_file(write(tmp_path / "info.json", VBENCH))
    assert [entry.prompt for entry in suite.entries] == ["The bund Shanghai, oil painting", "a still bench"]
    assert suite.entries[0].dimensions == ("appearance_style", "overall_consistency", "imaging_quality")
    assert suite.dimensions[-1] == "temporal_flickering" and suite.name == "info"
    folder = tmp_path / "vbench"
    folder.mkdir()
    write(folder / "VBench_full_info.json", VBENCH)
    write(
        folder / "all_dimension.txt",
        "a still bench\nThe bund Shanghai, oil painting\nThe bund Shanghai, oil painting\n",
    )
    write(folder / "all_dimension_extended.txt", "Bench.\nShanghai 1.\nShanghai 2.\n")
    suite = read_suite("vbench", tmp_path)
    assert [(entry.extended, entry.samples) for entry in suite.entries] == [("Shanghai 1.", 5), ("Bench.", 25)]
    own = write(tmp_path / "own.txt", "".join(f"{number}\n" for number in range(100)))
    assert read_suite("hundred", tmp_path, own).entries[99].extended == "99"
    other = write(tmp_path / "other.txt", "B.\nS.\nT.\n")
    assert read_suite("vbench", tmp_path, other).entries[0].conditioning == "S."


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "[{", "a.json is not valid JSON"),
        ("a.json", [{"prompt_en": "x", "dimension": ["beauty"]}], "entry 1 has the dimension beauty"),
        ("a.json", [{"prompt_en": "x", "dimension": "color"}], "entry 1 has the dimensions"),
        ("a.json", [{"prompt_en": "x"}], "entry 1 has the dimension none"),
        ("a.json", [{"prompt_en": "x", "dimension": ["color"]}, {"dimension": ["color"]}], "entry 2 has no prompt_en"),
        ("a.json", [{"prompt_en": "", "dimension": ["color"]}], "entry 1 is empty"),
        ("a.json", [{"prompt_en": "x", "dimension": ["color"]}] * 2, "entry 2 has the prompt and a dimension of"),
        ("a.txt", "a\nb\na\n", "line 3 has the prompt of"),
        ("a.jsonl", '{"prompt": "x", "seed": 3}', "line 1 has a seed: in a suite"),
        ("a.jsonl", '{"prompt": "x", "dimensions": "color"}', "line 1 has the dimensions"),
        ("a.jsonl", '{"prompt": "x", "dimensions": ["a", "a"]}', "names a dimension twice"),
        ("a.jsonl", '{"prompt": "x", "extended": " "}', "extended is empty"),
        ("a.jsonl", '{"prompt": "x", "extended": 3}', "has the extended 3, which is not text"),
        ("a.jsonl", '{"extended": "x"}', "line 1 has no prompt"),
        ("a.jsonl", '{"prompts": []}', "line 1 is no video of several prompts"),
        ("a.jsonl", '{"prompts": ["a"]}\n{"prompt": "b"}', "line 2 is no video of several prompts"),
        ("a.jsonl", '{"prompts": ["a", {"prompt": "b", "frame": 9}]}', "prompts must begin at 0"),
        (
            "a.jsonl",
            '{"prompts": [{"prompt": "a", "frame": 0}, {"prompt": "b", "second": 1}]}',
            "all in frames, all",
        ),
        ("a.jsonl", '{"prompts": [{"prompt": "a", "frame": 0}, {"prompt": "b", "frame": 0}]}', "follow each other"),
        ("a.jsonl", '{"prompts": ["a", {"prompt": "b", "frame": 1.5}]}', "prompt 2 needs a prompt and at most one"),
        ("a.jsonl", '{"prompts": ["a", 7]}', "prompt 2 is 7"),
    ],
)
def test_a_damaged_suite_is_one_line(name: str, content: object, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        read_suite_file(path)
    assert words in str(error.value) and "\n" not in str(error.value), error.value


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    suite = read_suite_file(write(tmp_path / "a.txt", "one\ntwo\n"))
    with pytest.raises(InputError, match="has 1 lines"):
        with_extended(suite, write(tmp_path / "long.txt", "One.\n"), None)
    with pytest.raises(InputError, match="'one' is not among the prompts"):
        with_extended(suite, write(tmp_path / "long.txt", "One.\nTwo.\n"), write(tmp_path / "k.txt", "two\nthree\n"))
    assert with_extended(suite, write(tmp_path / "long.txt", "One.\nTwo.\n"), None).entries[1].extended == "Two."


def test_videos_of_several_prompts_are_made_of_all_or_of_the_first(tmp_path: Path) -> None:
    line = '{"prompts": [{"prompt": "a", "second": 0}, {"prompt": "b", "second": 2.5}], "dimensions": ["x"]}'
    suite = read_suite_file(write(tmp_path / "a.jsonl", line))
    prompts = Switch("a", second=0.0), Switch("b", second=2.5)
    assert suite.entries[0].prompts == prompts and suite.dimensions == ("x",)
    (video,) = plan_videos(suite, suite, 0, ignores_case=False)
    assert video.job.prompt == "a" and video.job.name == "a-0" and video.job.prompts == prompts
    (first,) = plan_videos(suite, suite, 0, ignores_case=False, first_prompt=True)
    assert first.job == replace(video.job, prompts=())
    assert len(read_suite("interactive", tmp_path).entries) >= 4


def test_a_limit_is_spread_over_the_dimensions() -> None:
    sizes = {"a": 40, "b": 7, "c": 3}
    entries = [SuiteEntry(f"{name} {n}", dimensions=(name,)) for name, size in sizes.items() for n in range(size)]
    suite = Suite("x", (*entries, SuiteEntry("both", dimensions=("a", "b"))))
    parts = [limited(suite, limit).entries for limit in range(1, 60)]
    assert [len(part) for part in parts] == [min(limit, 51) for limit in range(1, 60)]
    for part in parts[5:9]:
        counts = [sum(name in entry.dimensions for entry in part) for name in sizes]
        assert max(counts) - min(counts) <= 1, counts
    assert all(set(a) <= set(b) for a, b in pairwise(parts)), "a larger part holds the smaller"
    assert list(parts[20]) == [entry for entry in suite.entries if entry in parts[20]]
    assert limited(Suite("y", (SuiteEntry("1"), SuiteEntry("2"))), 1).entries[0].prompt in "12"
    assert {entry.prompt for entry in of_dimensions(suite, ["c"]).entries} == {"c 0", "c 1", "c 2"}
    assert with_samples(suite, 3).num_videos == 153


def test_names_are_those_of_vbench_where_they_can_be(tmp_path: Path) -> None:
    fine = ["A 3D model of a 1800s victorian house.", "a façade (1) - 'x', \"y\": z?", "日本", "x" * MAX_STEM_BYTES]
    assert file_stems(fine, ignores_case=False) == fine
    stems = file_stems([*fine, *AWKWARD], ignores_case=True)
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        path = tmp_path / f"{stem}-9999.mp4"
        path.write_bytes(b"x")
        (tmp_path / f".{stem}-9999.lock").write_bytes(b"x")
        assert path.resolve().parent == tmp_path.resolve()
    assert not any(can_be_name(prompt) for prompt in AWKWARD)
    assert len(list(tmp_path.glob("*.mp4"))) == len(stems)


def test_names_that_differ_in_case_are_two_files_wherever_that_can_be(tmp_path: Path) -> None:
    """VBench has such a pair: a fantasy landscape."""
    pair = ["a fantasy landscape", "A fantasy landscape", "b"]
    assert file_stems(pair, ignores_case=False) == pair
    first, second, third = file_stems(pair, ignores_case=True)
    assert (first, third) == ("a fantasy landscape", "b") and second.startswith("a-fantasy-landscape-")
    (tmp_path / "a").mkdir()
    assert ignores_case(tmp_path / "a") == (tmp_path / "A").exists()
    (tmp_path / "A").mkdir(exist_ok=True)
    assert ignores_case(tmp_path / "a") == (len(list(tmp_path.iterdir())) == 1)


def test_a_prompt_that_is_the_safe_name_of_another_does_not_take_its_file() -> None:
    (safe,) = file_stems(["a/b"], ignores_case=True)
    stems = file_stems(["a/b", safe], ignores_case=True)
    assert stems[1] == safe and stems[0] != safe


def test_the_hundred_are_what_they_are_meant_to_be() -> None:
    suite = read_suite("hundred", OWN)
    assert len(suite.entries) == 100 and KNOWN["hundred"].folder is None
    counts = {name: sum(name in entry.dimensions for entry in suite.entries) for name in suite.dimensions}
    assert len(counts) >= 11 and min(counts.values()) >= 5, counts
    assert len({entry.dimensions for entry in suite.entries[:12]}) >= 10, "twelve choose layers: they must be varied"
    for entry in suite.entries:
        assert entry.extended is not None and can_be_name(entry.prompt)
        assert len(entry.prompt.split()) <= 20, entry.prompt
        assert 60 <= len(entry.extended.split()) <= 100, (len(entry.extended.split()), entry.prompt)
