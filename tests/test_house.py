"""The rules of the house that a program can check; CONTRIBUTING.md states them."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

LAYERS = ("wan", "arl2", "pipelines", "scripts")
LIBRARIES = LAYERS[:3]
FILES = sorted(path for folder in LAYERS for path in (ROOT / folder).rglob("*.py")) + sorted(ROOT.glob("*.py"))
MAIN = "__main__.py"
"""What `python -m` runs of a package: an entry point, wherever it lies."""
PROGRAMS = [
    path for path in FILES if path.parent == ROOT or path.name == MAIN or "scripts" in path.relative_to(ROOT).parts
]
ENTRY_POINTS = [path for path in PROGRAMS if path.name != "setup.py"]
FLOORS = {
    "wan": (("utils",), ("ops", "checkpoints"), (".", "vae")),
    "arl2": (("ops",), (".",), ("inference", "distillation", "evaluation"), ("layer_selection",), ("toyworld",)),
    "pipelines": (
        (".", "prompts", "console"),
        ("media",),
        ("generation",),
        ("training", "evaluation", "app"),
        ("benchmark",),
        ("toyworld",),
    ),
}
"""Rooms of a package from the ground up; "." are the modules that lie in the package itself."""
FORMER_PLACES = ("pipelines.text_to_video", "pipelines.video")
"""Names that earlier versions documented; they import what they stood for."""
MAX_ENTRIES = 12
MAX_COMMANDS = 20
"""Files of `scripts` itself: each is a command, whose path users have in scripts of their own."""
MAX_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_ENTRY_POINT_LINES = 60


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "every module says what it is for"
    assert len(text.splitlines()) < MAX_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            documentation = len((ast.get_docstring(node) or "").splitlines())
            assert lines - documentation < MAX_FUNCTION_LINES, node.name
    folder = path.relative_to(ROOT).parts[0]
    if folder in LIBRARIES and path.name != MAIN:
        above = set(LAYERS[LAYERS.index(folder) + 1 :])
        assert not above & {name.split(".")[0] for name in imports(tree)}, "imports run one way"
        assert not any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree)), "libraries log"
    for forbidden in ("getattr(config", "weights_only=False", "allow_pickle=True"):
        assert forbidden not in text
    assert not any(
        isinstance(node, ast.keyword) and node.arg == "strict" and is_false(node.value) and in_load(node, tree)
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize(("folder", "suffix"), [("wan", ".py"), ("arl2", ".py"), ("scripts", "")])
def test_the_map_names_every_file_and_room(folder: str, suffix: str) -> None:
    page = (ROOT / "docs" / "code_map.md").read_text(encoding="utf-8")
    names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__"}
    assert names and not {name for name in names if name + suffix not in page}
    rooms = {path.name for path in (ROOT / folder).iterdir() if (path / "__init__.py").is_file()}
    assert not {room for room in rooms if f"{room}/" not in page}


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def in_load(keyword: ast.keyword, tree: ast.AST) -> bool:
    """Whether a keyword belongs to a call that loads a state dict."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and keyword in node.keywords)
    return any("load" in ast.unparse(call.func) for call in calls)


def test_entry_points_are_short() -> None:
    for path in {*ROOT.glob("*.py"), *ROOT.glob(f"*/{MAIN}")} & set(ENTRY_POINTS):
        assert len(path.read_text().splitlines()) <= MAX_ENTRY_POINT_LINES, path


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.name)
def test_an_entry_point_answers_signals_before_it_imports_what_is_heavy(path: Path) -> None:
    """`tests/scripts/test_signals.py` sends them."""
    _, *first = ast.parse(path.read_text(encoding="utf-8")).body[:3]
    assert "\n".join(map(ast.unparse, first)) == (
        "from arl2 import end_on_signals\nif __name__ == '__main__':\n    end_on_signals()"
    )


def test_what_answers_signals_imports_nothing_heavy() -> None:
    """Nor does what every program imports next."""
    command = "import sys; from wan.utils.signals import end_on_signals; import pipelines.cli; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pipelines.cli" in found.stdout.split() and "torch" not in found.stdout.split()


def test_nothing_touches_the_gpu_when_imported() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
        assert not any("torch.cuda." in ast.unparse(node) for node in top), path


def modules() -> dict[str, ast.AST]:
    """The modules of the libraries and what they hold."""
    paths = [path for path in FILES if path.relative_to(ROOT).parts[0] in LIBRARIES]
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules among `known` that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & known or {node.module}
    return found & known


def test_no_import_circle() -> None:
    trees = modules()
    graph = {name: imported_modules(tree, set(trees)) - {name} for name, tree in trees.items()}
    left = dict(graph)
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"modules that import one another: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def floor_of(module: str) -> tuple[str, int] | None:
    """A module's package, and the number of its floor there; None for the package itself."""
    package, _, rest = module.partition(".")
    if not rest:
        return None
    room = rest.split(".")[0] if (ROOT / package / rest.split(".")[0]).is_dir() else "."
    return package, next(number for number, rooms in enumerate(FLOORS[package]) if room in rooms)


def test_imports_inside_a_package_go_down() -> None:
    """A room may use its own floor's modules of the same room, and everything on the floors below."""
    trees = {name: tree for name, tree in modules().items() if name not in FORMER_PLACES}
    for name, tree in trees.items():
        for other in imported_modules(tree, set(trees)):
            above, below = floor_of(name), floor_of(other)
            if above is None or below is None or above[0] != below[0]:
                continue
            rooms = [module.split(".")[1] for module in (name, other)]
            is_same_room = rooms[0] == rooms[1] or "." in FLOORS[above[0]][above[1]]
            assert below[1] < above[1] or (below[1] == above[1] and is_same_room), f"{name} imports {other}"


def test_the_method_does_not_know_its_test_bed() -> None:
    for name, tree in modules().items():
        if name.startswith("arl2.") and not name.startswith("arl2.toyworld"):
            assert not any(other.startswith("arl2.toyworld") for other in imports(tree)), name


@pytest.mark.parametrize("root", ["wan", "arl2", "pipelines", "scripts", "tests", "configs"])
def test_a_folder_fits_on_a_page(root: str) -> None:
    for folder in [ROOT / root, *(path for path in (ROOT / root).rglob("*") if path.is_dir())]:
        entries = [
            path for path in folder.iterdir() if path.suffix in (".py", ".yaml") and not path.stem.startswith("__")
        ]
        most = MAX_COMMANDS if folder == ROOT / "scripts" else MAX_ENTRIES
        assert len(entries) <= most, f"{folder.relative_to(ROOT)} holds {len(entries)} files: divide it by topic"


@pytest.mark.parametrize("name", FORMER_PLACES)
def test_documented_imports_of_earlier_versions_still_work(name: str) -> None:
    with pytest.warns(DeprecationWarning, match="is now"):
        module = importlib.reload(importlib.import_module(name))
    assert all(hasattr(module, each) for each in module.__all__)
