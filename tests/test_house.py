"""The rules of the house that a program can check; CONTRIBUTING.md states them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("wan", "arl2", "pipelines", "scripts")
LIBRARIES = LAYERS[:3]
FILES = sorted(path for folder in LAYERS for path in (ROOT / folder).rglob("*.py")) + sorted(ROOT.glob("*.py"))
MOST_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_ENTRY_POINT_LINES = 60


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
    assert len(text.splitlines()) < MOST_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            documentation = len((ast.get_docstring(node) or "").splitlines())
            assert lines - documentation < MOST_FUNCTION_LINES, node.name
    folder = path.relative_to(ROOT).parts[0]
    if folder in LIBRARIES:
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
def test_the_map_names_every_file(folder: str, suffix: str) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The map")[2].partition("\n## ")[0]
    names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert names and not {name for name in names if name + suffix not in page}


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def in_load(keyword: ast.keyword, tree: ast.AST) -> bool:
    """Whether a keyword belongs to a call that loads a state dict."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and keyword in node.keywords)
    return any("load" in ast.unparse(call.func) for call in calls)


def test_entry_points_are_short() -> None:
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= MOST_ENTRY_POINT_LINES, path


def test_nothing_touches_the_gpu_when_imported() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
        assert not any("torch.cuda." in ast.unparse(node) for node in top), path
