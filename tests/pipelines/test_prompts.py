"""Prompt files, names and seeds: safe, unique, and dependent on nothing but the prompt itself."""

from pathlib import Path

import pytest

from pipelines.prompts import plan_jobs, prompt_seed, read_prompts, shard_jobs
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


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_ranks_share_all_jobs(world_size: int) -> None:
    jobs = plan_jobs(NASTY, seed=0)
    shares = [shard_jobs(jobs, rank, world_size) for rank in range(world_size)]
    assert sorted(job.name for part in shares for job in part) == sorted(job.name for job in jobs)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_prompt_files_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst\r\n\r\n  second with \u2028 a separator \n\nthird".encode())
    assert read_prompts(path) == ["first", "second with \u2028 a separator", "third"]


def test_bad_prompt_files_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with pytest.raises(InputError, match="no prompt file"):
        read_prompts(path)
    with pytest.raises(InputError, match="cannot read"):
        read_prompts(tmp_path / ("long" * 100))
    path.write_text(" \n\n")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(path)
    path.write_bytes(b"\x00\x01 bytes that happen to be UTF-8\n")
    with pytest.raises(InputError, match="binary"):
        read_prompts(path)
