"""Results in JSON files: locked, read strictly, gone on with under the same settings alone."""

import json
import math
import os
from pathlib import Path

import pytest

from pipelines.records import claimed, open_records, read_record, reserved, write_record
from wan.utils.errors import InputError
from wan.utils.locks import exclusive

SETTINGS = {"seed": 0, "sizes": {"width": 8}}


def test_records_by_name_are_kept_as_they_come(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with open_records(file, "rows", others={"runs": []}) as records:
        records.made_with(SETTINGS)
        assert records.find("x") is None
        records.page["runs"].append("first")
        records.put("x", {"loss": math.nan, "seconds": [1.0, math.inf]})
        assert json.loads(file.read_text()) == {
            "settings": SETTINGS,
            "runs": ["first"],
            "rows": {"x": {"loss": None, "seconds": [1.0, None]}},
        }
    with open_records(file, "rows", others={"runs": []}) as records:
        records.made_with(SETTINGS)
        assert records.find("x") == {"loss": None, "seconds": [1.0, None]}
        records.put("x", {"loss": 1.0})
    assert json.loads(file.read_text())["rows"] == {"x": {"loss": 1.0}}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_records_of_a_list_are_told_by_a_field(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    first, second = {"row": "a", "layers": (1, 2)}, {"row": "b", "layers": ()}
    with open_records(file, "records", "case") as records:
        records.made_with(SETTINGS)
        for case, value in ((first, 1), (second, 2), (first, 3)):
            records.put(case, {"value": value})
        assert records.find(second) == {"value": 2, "case": {"row": "b", "layers": []}}
    assert [record["value"] for record in json.loads(file.read_text())["records"]] == [3, 2]


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_records(None) as records:
        records.made_with(SETTINGS)
        records.put("x", {"a": 1})
        assert records.find("x") == {"a": 1}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ('{"settings": ', "is not valid JSON"),
        ("\xff", "holds no such results|is not valid JSON"),
        ("[1]", "holds a JSON list"),
        ("null", "holds a JSON NoneType"),
        ("{}", "holds no such results: CURE"),
        ('{"settings": [], "rows": {}}', "holds no such results: CURE"),
        ('{"settings": {}, "rows": []}', "holds no such results: CURE"),
        ('{"settings": {}, "rows": {"x": 1}}', "holds no such results: CURE"),
        (
            json.dumps({"settings": SETTINGS | {"seed": 1}, "rows": {}}),
            r"made with other settings \(seed was 1, is 0\): CURE",
        ),
        (json.dumps({"settings": {}, "rows": {}}), "seed was nothing, is 0; sizes.width was nothing, is 8"),
    ],
)
def test_a_file_that_cannot_be_gone_on_with_stays_as_it_is(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message) as raised, open_records(file, "rows", cure="CURE") as records:
        records.made_with(SETTINGS)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)
    assert file.read_text(encoding="latin-1") == content and len(list(tmp_path.iterdir())) == 1


def test_one_process_at_a_time(tmp_path: Path) -> None:
    holder = f"in use by process {os.getpid()}"
    with open_records(tmp_path / "a.json"), open_records(tmp_path / "b.json"):
        with pytest.raises(InputError, match=holder), open_records(tmp_path / "a.json"):
            pass
        with pytest.raises(InputError, match=holder), reserved(tmp_path / "a.json"):
            pass
    with exclusive(tmp_path / "row", "row"), claimed(tmp_path / "row", "row", wait=False) as free:
        assert not free
    with claimed(tmp_path / "row", "row", wait=False) as free:
        assert free


def test_what_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "a.json", tmp_path / "folder", Path("/dev/null"), tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot write"), reserved(target):
            pass
    assert not Path("/dev/null").is_file()


def test_a_single_record_says_what_made_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.json"
    assert read_record(file, SETTINGS) is None
    write_record(file, SETTINGS, {"value": math.inf})
    assert read_record(file, SETTINGS) == {"settings": SETTINGS, "value": None}
    with pytest.raises(InputError, match=r"sizes\.width was 8, is 9\): move it away"):
        read_record(file, {"seed": 0, "sizes": {"width": 9}})
    file.write_text('{"value": 1}')
    with pytest.raises(InputError, match="does not say with which settings it was made"):
        read_record(file, SETTINGS)
