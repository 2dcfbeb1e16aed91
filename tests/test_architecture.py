"""The laws that no single file can hold: who imports whom, who touches files, how long functions are."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trainer"
MODULES = sorted(PACKAGE.rglob("*.py"))

FOUNDATION = {
    "trainer",
    "trainer.counter",
    "trainer.cores",
    "trainer.startup",
    "trainer.config",
    "trainer.cluster",
    "trainer.errors",
}
_AT_THE_TOP = "__main__ arguments commands help model_card check evaluate predict export trained relay preflight"
COMMANDS = {f"trainer.{name}" for name in _AT_THE_TOP.split()}
ROOMS = {"trainer.data", "trainer.model", "trainer.runtime"}
STORAGE = "trainer.storage"  # below the rooms that touch files and buckets


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            yield from (f"{node.module}.{alias.name}" if folder else node.module for alias in node.names)


def allowed(importer: str, imported: str) -> bool:
    room, other = room_of(importer), room_of(imported)
    if other == room or imported in FOUNDATION or imported == "trainer.__version__":
        return True
    if importer in FOUNDATION or room == STORAGE:
        return False
    if room in ROOMS:
        return other == STORAGE and room != "trainer.model"
    if room == "trainer.train":
        return other in ROOMS or other == STORAGE
    return room in COMMANDS


def test_imports_keep_the_law() -> None:
    own = [(name_of(path), name) for path in MODULES for name in imports(path) if name.split(".")[0] == "trainer"]
    assert len(own) > 200
    assert [pair for pair in own if not allowed(*pair)] == []


LIGHT = ("config", "cluster", "errors", "help", "arguments", "commands", "__main__")


@pytest.mark.parametrize("name", LIGHT)
def test_what_answers_a_wrong_key_does_not_load_tensorflow(name: str) -> None:
    """Checked on the text here, and by the clock in test_main."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    top_level = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = ("import tensorflow", "from tensorflow", "import keras", "trainer.train", "trainer.data", "trainer.model")
    assert [line for line in top_level if any(word in line for word in heavy)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_cluster_and_the_entry_read_the_environment(path: Path) -> None:
    if name_of(path) not in {"trainer.commands", "trainer.startup"}:
        assert "os.environ" not in path.read_text()
        assert "getenv" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_data_and_runtime_write_files(path: Path) -> None:
    writers = (r"\.write_text\(", r"\.write_bytes\(", r"\bopen\(", r"\.mkdir\(", r"\.unlink\(")
    if room_of(name_of(path)) not in {"trainer.data", "trainer.runtime", STORAGE}:
        assert [word for word in writers if re.search(word, path.read_text())] == []


def functions() -> list[ast.FunctionDef]:
    return [node for path in MODULES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def body_length(function: ast.FunctionDef) -> int:
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


def test_functions_are_short() -> None:
    lengths = sorted(body_length(function) for function in functions())
    assert statistics.median(lengths) < 13
    assert lengths[-1] <= 40


def test_nothing_hides_an_error() -> None:
    for path in MODULES:
        text = path.read_text()
        assert [word for word in ("ignore_errors", "nan_to_num", "except:", "except Exception") if word in text] == []
