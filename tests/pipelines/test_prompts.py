"""Prompts: files of every kind, and names and seeds that are safe, unique, and dependent on nothing but the prompt."""

import csv
import json
from dataclasses import astuple
from pathlib import Path

import pytest
from paths import ROOT

from pipelines.prompts.files import PromptRequest, read_prompt_file
from pipelines.prompts.jobs import (
    output_name,
    plan_jobs,
    prompt_seed,
    read_prompts,
    read_requests,
    repeat_requests,
    shard_jobs,
)
from wan.utils.errors import InputError

NASTY = [
    "a/b/../../etc/passwd",
    "..",
    ".",
    "/",
    "CON",
    "a" * 500,
    "🙂🙂🙂",
    "مرحبا بالعالم",
    "tab\tand\x00control\x1b",
    "Ünïcödé",
    "same words!",
    "same words?",
    "-rf *",
]


def test_names_are_safe_unique_and_stay_in_the_folder(tmp_path: Path) -> None:
    jobs = plan_jobs([*NASTY, *NASTY], seed=0)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name.encode()) <= 100
        assert all(character.isascii() and (character.isalnum() or character == "-") for character in name)
        assert not name.startswith("-")
        assert (tmp_path / f"{name}.mp4").resolve().parent == tmp_path.resolve()
    assert len({job.seed for job in jobs}) == len(jobs)


def test_a_job_depends_on_nothing_but_its_prompt_seed_and_occurrence() -> None:
    forward = {job.prompt: job for job in plan_jobs(NASTY, seed=7)}
    backward = {job.prompt: job for job in plan_jobs(NASTY[::-1], seed=7)}
    assert forward == backward
    assert forward == {prompt: plan_jobs([prompt], seed=7)[0] for prompt in NASTY}
    other = {job.prompt: job for job in plan_jobs(NASTY, seed=8)}
    assert all(other[p].seed != forward[p].seed and other[p].name != forward[p].name for p in NASTY)
    assert 0 <= prompt_seed(0, "x") < 2**63


def test_names_and_seeds_are_those_of_earlier_versions() -> None:
    (job,) = plan_jobs(["a red ring rolls behind the wall and comes out again"], seed=0)
    assert job.name == "a-red-ring-rolls-behind-the-wall-and-comes-out-again-3f30d430db8e8e8c"
    assert job.seed == 2276686264789321542


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_ranks_share_all_jobs(world_size: int) -> None:
    jobs = plan_jobs(NASTY, seed=0)
    shares = [shard_jobs(jobs, rank, world_size) for rank in range(world_size)]
    assert sorted(job.name for part in shares for job in part) == sorted(job.name for job in jobs)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_seed_of_its_own_is_the_seed_of_the_noise_in_every_run() -> None:
    requests = [PromptRequest("x"), PromptRequest("x", seed=0), PromptRequest("x"), PromptRequest("x", 5, name="mine")]
    jobs, others = plan_jobs(requests, seed=0), plan_jobs(requests, seed=1)
    assert [job.seed for job in jobs] == [prompt_seed(0, "x"), 0, prompt_seed(0, "x", 1), 5]
    assert [job.name for job in jobs[::2]] == [output_name(0, "x"), output_name(0, "x", 1)]
    assert jobs[3].name == "mine" and len({job.name for job in jobs}) == 4
    assert [ours == theirs for ours, theirs in zip(jobs, others, strict=True)] == [False, True, False, True]


def test_repetitions_are_other_videos() -> None:
    requests = [PromptRequest("x"), PromptRequest("y", seed=3), PromptRequest("z", name="mine")]
    repeated = repeat_requests(requests, 3)
    jobs = plan_jobs(repeated, seed=0)
    assert repeated[:3] == requests and [job.prompt for job in jobs] == ["x", "y", "z"] * 3
    assert len({job.seed for job in jobs}) == len({job.name for job in jobs}) == 9
    assert jobs[1].seed == 3 and [job.name for job in jobs[2::3]] == ["mine", "mine-2", "mine-3"]
    assert plan_jobs(repeat_requests([PromptRequest("x"), PromptRequest("y")], 2), 0) == plan_jobs(["x", "y"] * 2, 0)


def test_two_videos_never_have_one_name() -> None:
    automatic = plan_jobs(["x"], 0)[0].name
    for names in ((automatic.upper(), None), ("mine", "MINE")):
        with pytest.raises(InputError, match="two videos would be named"):
            plan_jobs([PromptRequest(prompt, name=name) for prompt, name in zip("yx", names, strict=True)], 0)


def test_text_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst\r\n\r\n  second with \u2028 a separator \n\nthird\rfourth".encode())
    assert read_prompts(path) == ["first", "second with \u2028 a separator", "third", "fourth"]
    assert [request.where for request in read_requests(path)] == [f"{path} line {n}" for n in (1, 3, 5, 6)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_mark(encoding: str, tmp_path: Path) -> None:
    lines = '{"prompt": "é 🙂"}\n{"prompt": "b"}'
    for name, text in (("a.txt", "é 🙂\nb"), ("a.jsonl", lines), ("a.csv", "prompt\né 🙂\nb")):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert read_prompts(tmp_path / name) == ["é 🙂", "b"]


RECORDS = [
    {"prompt": "a red ring"},
    {"prompt": "a, b; c\td", "seed": 7, "name": "mine"},
    {"prompt": 'he said "hi"', "seed": 2**63 - 1},
]


def table(delimiter: str) -> str:
    class Rows(list[str]):
        write = list.append

    rows = Rows()
    writer = csv.DictWriter(rows, ["name", "prompt", "seed"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return "".join(rows)


FORMS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "lines with gaps": "\n\n" + "\n \n".join(map(json.dumps, RECORDS)),
    "list": json.dumps(RECORDS),
    "printed list": json.dumps(RECORDS, indent=2),
    "commas": table(","),
    "tabs": table("\t"),
    "semicolons": table(";"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bare", [False, True])
def test_a_file_is_what_it_holds(form: str, bare: bool, tmp_path: Path) -> None:
    kind = next(kind for kind in ("lines", "list", "commas", "tabs", "semicolons") if kind in form)
    suffix = {"lines": ".jsonl", "list": ".JSON", "commas": ".csv", "tabs": ".tsv", "semicolons": ".csv"}[kind]
    path = tmp_path / ("prompts.txt" if bare else f"prompts{suffix}")
    path.write_text(FORMS[form], newline="")
    expected = [PromptRequest(record["prompt"], record.get("seed"), None, record.get("name")) for record in RECORDS]
    assert read_requests(path) == expected


def test_other_shapes_of_json(tmp_path: Path) -> None:
    for name, text in (
        ("a.json", '["a", {"prompt": "b", "seed": null}]'),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("a.jsonl", '"a"\n{"prompt": " b "}'),
        ("a.txt", '["a",\n "b"]'),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt": "b"}\n]'),
        ("a.txt", '[\n{"prompt": "a"},\n{"prompt": "b"}\n]'),
    ):
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name) == ["a", "b"]
    for name in ("a.json", "a.txt"):
        (tmp_path / name).write_text('{\n "prompt": "a",\n "seed": 1\n}')
        assert read_requests(tmp_path / name) == [PromptRequest("a", 1)]


@pytest.mark.parametrize(
    "lines",
    [
        ["{a cat} in braces", "{another}"],
        ["{not json", "plain"],
        ["a cat, a dog, a prompt", "red, green, blue"],
        ["[a cat] in brackets", "[1, 2]"],
        ["[1, 2]"],
        ["prompt: a cat", "seed, image"],
        ["my prompt, seed", "a, b"],
        ['"quoted"', '"another"'],
        ["a cat", "prompt,seed"],
        ["prompt"],
        ["one;two", "three"],
        ["null", "true"],
        ["a street in Paris, 1920", "a street in Rome, 1950"],
        ["prompt, a cat that sits on a mat", "another, b"],
        ['a sign that says "open": a shop', "a red, green and blue bird"],
        ["text, and more of it", "a cat, a dog"],
        ["text,image"],
        ["a|b", "c|d"],
        ["one\ttab", "none"],
    ],
)
def test_text_that_only_looks_like_something_else_stays_text(
    lines: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "a.txt") == lines
    assert not caplog.records


BAD = {
    "blank": ("a.txt", " \n\n", "holds no prompts"),
    "nothing": ("a.jsonl", "", "holds no prompts"),
    "an empty list": ("a.json", "[]", "holds no prompts"),
    "a header alone": ("a.csv", "prompt,seed\n", "holds no prompts"),
    "Latin-1": ("a.txt", b"fine\ncaf\xe9\n", "line 2 of .*UTF-8"),
    "NUL": ("a.txt", b"\x00\x01 bytes that happen to be UTF-8\n", "binary"),
    "UTF-16 without a mark": ("a.txt", "abc".encode("utf-16-le"), "byte order mark"),
    "UTF-32": ("a.txt", "abc".encode("utf-32"), "UTF-32"),
    "half UTF-16": ("a.txt", b"\xff\xfe\x00\x80\x01", "UTF-8"),
    "an entity": ("a.txt", "fine\n&nbsp;\n", r"line 2 holds nothing that can be seen \(&nbsp;\)"),
    "no width": ("a.txt", "\u200b\u200d\ufeff", "line 1 holds nothing that can be seen"),
    "control characters": ("a.txt", "fine\n\n\x01\x02\n", "line 3 holds nothing"),
    "a filler": ("a.jsonl", '{"prompt": "\u3164"}', "line 1 holds nothing"),
    "an empty prompt": ("a.jsonl", '{"prompt": " "}', "line 1 is empty"),
    "an empty cell": ("a.csv", "prompt,seed\na,1\n,2\n", "line 3 is empty"),
    "no prompt": ("a.jsonl", '{"prompt": "a"}\n\n{"seed": 1}', "line 3 has no prompt"),
    "a broken line": ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not valid JSON"),
    "a broken line of text": ("a.txt", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not valid JSON"),
    "a broken list": ("a.json", '[{"prompt": "a"},\n{"prompt" "b"}]', "line 2 is not valid JSON"),
    "deep": ("a.json", "[" * 100000, "nested too deeply"),
    "deep lines": ("a.jsonl", "[" * 100000, "line 1 is not valid JSON"),
    "digits": ("a.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 1"),
    "an unknown field of a list": ("a.json", '["a", {"prompt": "b", "x": 1}]', r"a.json request 2 has unknown fields"),
    "a number": ("a.jsonl", '{"prompt": "a"}\n3\n', "line 2 is 3, not a request"),
    "a list in a list": ("a.json", '[["a"]]', "request 1 is list, not a request"),
    "a field twice": ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
    "an unknown field": (
        "a.jsonl",
        '{"prompt": "a", "sead": 1}',
        r"line 1 has unknown fields \(sead\): the fields are",
    ),
    "an unknown column": ("a.csv", "prompt,sead\na,\n", r"line 2 has unknown fields \(sead\)"),
    "an unknown column of text": ("a.txt", "prompt,style\na,b\n", r"unknown fields \(style\)"),
    "rows of other widths in text": ("a.txt", "prompt,style\na cat, red,b\nb,c\n", "line 2 has 3 columns"),
    "columns of several words": ("a.txt", "Prompt,Negative Prompt\na,b\n", r"unknown fields \(negative prompt\)"),
    "other names of columns": ("a.txt", "caption,seed\na cat,1\n", "line 1 does not name the columns"),
    "one column": ("a.txt", "Prompt\na red ring\n", "line 1 is 'Prompt', the name of a column"),
    "one column in quotes": ("a.txt", '"prompt"\n"a red ring, rolling"\n', "the name of a column"),
    "bars": ("a.txt", "| prompt | seed |\n|---|---|\n| a | 1 |\n", "line 1 names columns between vertical bars"),
    "tabs without names": ("a.txt", "a cat\t1\na dog\t2\n", "has a tab in every line"),
    "JSON among text": ("a.txt", '{"prompt": "a"}\nplain\n', "line 1 is JSON, line 2 is not: write all"),
    "a broken list of text": ("a.txt", '[\n{"prompt": "a"},\n{"prompt": "b",}\n]', "line 3 is not valid JSON"),
    "an unfinished list": ("a.txt", '[{"prompt": "a"},\n{"prompt": "b"}', "line 2 is not valid JSON"),
    "lines with commas": ("a.txt", '{"prompt": "a"},\n{"prompt": "b"},\n', "line 1 is not valid JSON"),
    "a broken object of text": ("a.txt", '{\n"prompt": "a"\n"seed": 1\n}', "line 3 is not valid JSON"),
    "a list of rows": ("a.txt", '[["prompt", "seed"], ["a", 1]]', "request 1 is list, not a request"),
    "rows of JSON": ("a.txt", '["prompt", "seed"]\n["a", 1]\n', "line 1 is list, not a request"),
    "an empty list of text": ("a.txt", "[]", "holds no prompts"),
    "an index": ("a.csv", ",prompt\n0,a\n", r"unknown fields \(\(no name\)\)"),
    "a column twice": ("a.csv", "prompt,seed,Seed\na,1,2\n", "names a column twice"),
    "no header": ("a.csv", "a red ring\na blue disc\n", "line 1 does not name the columns"),
    "a comma too many": ("a.csv", "prompt,seed\na red ring, rolling,1\n", "line 2 has 3 columns, the first line 2"),
    "a comma too many in text": ("a.txt", "prompt,seed\na,1\nb, c,1\n", "line 3 has 3 columns"),
    "an open quote": ("a.csv", 'prompt,seed\n"a,1\nb,2\n', "line 2 is not a row of a table"),
    "a prompt that is a number": ("a.jsonl", '{"prompt": 3}', "the prompt 3, which is not text"),
    "a surrogate": ("a.jsonl", '{"prompt": "a \\ud800"}', "not valid text"),
    "a NUL in JSON": ("a.jsonl", '{"prompt": "a\\u0000"}', "not valid text"),
    "a negative seed": ("a.jsonl", '{"prompt": "a", "seed": -1}', "line 1 has the seed -1"),
    "a large seed": ("a.csv", f"prompt,seed\na,{2**63}\n", "line 2 has the seed 9223372036854775808"),
    "a fraction": ("a.jsonl", '{"prompt": "a", "seed": 1.0}', "the seed 1.0"),
    "a truth": ("a.jsonl", '{"prompt": "a", "seed": true}', "the seed true"),
    "a word": ("a.csv", "prompt,seed\na,one\n", "the seed one"),
    "the same video": ("a.jsonl", '{"prompt": "a", "seed": 1}\n' * 2, "line 2 asks for the same video as .*line 1"),
    "an image without a use": ("a.jsonl", '{"prompt": "a", "image": "b.png"}', "line 1 names an image, which only"),
    "an image without a name": ("a.jsonl", '{"prompt": "a", "image": ""}', "image without a name"),
    "names that differ in case": (
        "a.jsonl",
        '{"prompt": "a", "name": "é"}\n{"prompt": "b", "name": "E\\u0301"}',
        "line 2 has the name 'É' of .*line 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_requests(tmp_path / name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(tmp_path))


UNSAFE_NAMES = [
    *(
        "",
        " ",
        "a/b",
        "..",
        "../a",
        "/a",
        "a\\b",
        "C:a",
        "a\0",
        "a\nb",
        ".hidden",
        "-rf",
        "a.",
        "con",
        "NUL.txt",
        "com1",
    ),
    *("x" * 300, "é" * 150, "a*", "a?", 'a"', "a|b", "\u202eb", "a.mp4", "a.JSON", chr(0xD800), 3, ["a"]),
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_unsafe_names_are_refused(name: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "a", "name": name}))
    with pytest.raises(InputError, match=r"line 2.* name ") as caught:
        read_requests(tmp_path / "a.jsonl")
    assert str(caught.value).isprintable()


def test_safe_names_are_kept(tmp_path: Path) -> None:
    names = ["a", "take 1.5 (é)", "console", "x" * 200, "a-b_c", "视频"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": "a", "name": name}) for name in names))
    assert [job.name for job in plan_jobs(read_requests(tmp_path / "a.jsonl"), 0)] == names


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.txt", "no prompt file"),
        (tmp_path / ("long" * 100), "cannot read"),
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "no prompt file"),
    ):
        with pytest.raises(InputError, match=message):
            read_prompts(path)


def test_images_are_looked_for_beside_the_file_and_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    for name in ("both.png", "here.png", "lists/both.png", "lists/there.png", "lists/ spaced.png "):
        (tmp_path / name).write_bytes(b"")
    found = [
        "lists/both.png",
        "here.png",
        "lists/there.png",
        "lists/ spaced.png ",
        str(tmp_path / "both.png"),
        "lists/none.png",
    ]
    names = ["both.png", " here.png", "there.png", " spaced.png ", str(tmp_path / "both.png"), "none.png"]
    (tmp_path / "lists" / "a.txt").write_text("\n".join(f"{name}\ta cat" for name in names))
    (tmp_path / "lists" / "a.jsonl").write_text("\n".join(json.dumps({"prompt": "a cat", "image": n}) for n in names))
    (tmp_path / "lists" / "a.tsv").write_text("prompt\timage\n" + "\n".join(f"a cat\t{name}" for name in names))
    for name in ("a.txt", "a.jsonl", "a.tsv"):
        requests = read_prompt_file(Path("lists") / name, with_images=True)
        assert [str(request.image) for request in requests] == found


def test_lines_with_images_need_a_tab(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a.png\ta cat\n\nb.png a dog\n")
    with pytest.raises(InputError, match="line 3: with --i2v every line must be an image path, a tab, and a prompt"):
        read_prompt_file(tmp_path / "a.txt", with_images=True)
    (tmp_path / "a.txt").write_text("a.png\ta\tcat\n")
    (request,) = read_prompt_file(tmp_path / "a.txt", with_images=True)
    assert astuple(request)[:4] == ("a\tcat", None, tmp_path / "a.png", None)


def test_a_seed_in_quotes_is_shown_with_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "seed": "3"}\n')
    with pytest.raises(InputError, match="the seed is the text '3', not a number: drop the quotes"):
        read_requests(tmp_path / "a.jsonl")


def test_a_name_is_escaped_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "name": "a\\u0007b"}\n')
    with pytest.raises(InputError, match=r"the name 'a\\x07b' "):
        read_requests(tmp_path / "a.jsonl")


def test_an_extended_prompt_conditions_in_the_place_of_the_short_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,extended\nred,"A red ring, turning."\nblue,\n')
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "red", "extended": "A red ring, turning.", "dimensions": ["x"]}\n{"prompt": "blue"}'
    )
    dimensions: tuple[str, ...]
    for name, dimensions in (("a.csv", ()), ("a.jsonl", ("x",))):
        requests = read_requests(tmp_path / name)
        assert requests == [
            PromptRequest("A red ring, turning.", short="red", dimensions=dimensions),
            PromptRequest("blue"),
        ]
        assert plan_jobs(requests, 0)[0].prompt == "A red ring, turning."
    hundred = read_requests(ROOT / "prompts/hundred.jsonl")
    assert len(hundred) == 100 and all(len(request.prompt.split()) >= 60 for request in hundred)
