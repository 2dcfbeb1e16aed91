"""The laws that no single file can hold: who imports whom, who touches files, how long functions are.

Each law is a function of the syntax trees of all modules that gives the breaches it finds; a second test plants breaches.
"""

import ast
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.mutations import ROOT, read_mutants

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "trainer"
Trees = Mapping[str, ast.Module]
Breaches = Iterator[str]

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
LIGHT = {
    f"trainer.{name}" for name in ("config", "cluster", "errors", "help", "arguments", "commands", "__main__", "relay", "startup")
}
HEAVY = ("tensorflow", "keras", "numpy", "trainer.train", "trainer.data", "trainer.model")
MAY_READ_THE_ENVIRONMENT = {"trainer.commands", "trainer.startup"}
MAY_WRITE_FILES = {"trainer.data", "trainer.runtime", STORAGE}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
WRITES_A_FILE = {
    "write_text", "write_bytes", "open", "fdopen", "mkdir", "makedirs", "touch", "unlink", "remove", "rmdir", "removedirs",
    "rename", "renames", "symlink_to", "symlink", "hardlink_to", "link", "chmod", "truncate", "mkstemp", "mkdtemp",
}  # fmt: skip
WRITES_FILES = {"shutil"}  # a module of nothing else
LONGEST, MEDIAN = 40, 13


def trees(package: Path) -> Trees:
    """Every module of a package by its name."""
    parts = {path: path.relative_to(package.parent).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(p for p in parts[path] if p != "__init__"): ast.parse(path.read_text(), str(path)) for path in parts}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imported(node: ast.AST) -> Iterator[str]:
    """The modules, or the names, that an import statement asks for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        folder = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
        yield from (f"{node.module}.{alias.name}" if folder else node.module for alias in node.names)


def allowed(importer: str, other: str) -> bool:
    room = room_of(importer)
    if room_of(other) == room or other in FOUNDATION or other == "trainer.__version__":
        return True
    if importer in FOUNDATION or room == STORAGE:
        return False
    if room in ROOMS:
        return room_of(other) == STORAGE and room != "trainer.model"
    if room == "trainer.train":
        return room_of(other) in ROOMS or room_of(other) == STORAGE
    return room in COMMANDS


def dotted(node: ast.AST) -> str:
    """`os.path.join` as it stands there; empty for what is no chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def walk(modules: Trees) -> Iterator[tuple[str, ast.AST, str]]:
    """Module, node and `module:line` of everything."""
    for name, tree in modules.items():
        for node in ast.walk(tree):
            yield name, node, f"{name}:{getattr(node, 'lineno', 0)}"


def arrows_point_one_way(modules: Trees) -> Breaches:
    """A room imports only what is below it."""
    for name, node, where in walk(modules):
        for other in imported(node):
            if other.split(".")[0] == "trainer" and not allowed(name, other):
                yield f"{where} imports {other}"


def imports_are_absolute(modules: Trees) -> Breaches:
    """Else the law above would not see them."""
    for _, node, where in walk(modules):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{where} imports relatively"


def what_answers_a_wrong_key_is_light(modules: Trees) -> Breaches:
    """It loads nothing heavy; the clock in test_main says so too."""
    for name in LIGHT & modules.keys():
        for node in modules[name].body:
            heavy = [other for other in imported(node) if other.startswith(HEAVY)]
            yield from (f"{name}:{node.lineno} imports {other}" for other in heavy)


def few_read_the_environment(modules: Trees) -> Breaches:
    """The commands, which hand it on, and the start."""
    for name, node, where in walk(modules):
        words = {node.attr} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            words = {alias.name for alias in node.names}
        if name not in MAY_READ_THE_ENVIRONMENT and words & ENVIRONMENT:
            yield f"{where} reads the environment"


def writer(node: ast.AST) -> str:
    """The name by which something writes a file; empty for all else."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return next((name for name in names if name in WRITES_FILES), "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id if node.func.id == "open" else ""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ""
    name, of = node.func.attr, dotted(node.func.value)
    # A string's `replace` takes two values, that of dataclasses takes keywords.
    renames = name == "replace" and (of == "os" or (len(node.args) == 1 and not node.keywords))
    return name if of != "files" and (name in WRITES_A_FILE or renames) else ""


def few_write_files(modules: Trees) -> Breaches:
    """Data, runtime and storage; the others ask them."""
    for name, node, where in walk(modules):
        if room_of(name) not in MAY_WRITE_FILES and (word := writer(node)):
            yield f"{where} writes files: {word}"


def nothing_hides_an_error(modules: Trees) -> Breaches:
    """No handler, and no switch, that would take any error whatever."""
    for _, node, where in walk(modules):
        kinds = [node.type] if isinstance(node, ast.ExceptHandler) else []
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "suppress":
            kinds = list(node.args)
        listed = [part for kind in kinds for part in (kind.elts if isinstance(kind, ast.Tuple) else [kind])]
        names = {"anything" if part is None else dotted(part).split(".")[-1] for part in listed}
        if names & {"anything", "Exception", "BaseException"}:
            yield f"{where} takes every error"
        if isinstance(node, ast.keyword) and node.arg == "ignore_errors":
            yield f"{where} ignores errors"
        if isinstance(node, ast.Attribute) and node.attr == "nan_to_num":
            yield f"{where} hides what is not a number"


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


def functions_are_short(modules: Trees) -> Breaches:
    found = [(node, where) for _, node, where in walk(modules) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [body_length(node) for node, _ in found]
    yield from (f"{where} has {lines} lines" for (_, where), lines in zip(found, lengths, strict=True) if lines > LONGEST)
    if statistics.median(lengths) >= MEDIAN:
        yield f"half of the functions have {MEDIAN} lines or more"


def no_test_module_is_imported(modules: Trees) -> Breaches:
    """Of the tests, not of the package: what two test modules need is a helper."""
    for _, node, where in walk(modules):
        for other in imported(node):
            if other.startswith("tests.") and ".test_" in other:
                yield f"{where} imports {other}"


Law = Callable[[Trees], Breaches]
PLANTED: list[tuple[Law, str, str, str]] = [
    (arrows_point_one_way, "data.order", "from trainer.runtime import files", "1 imports trainer.runtime.files"),
    (arrows_point_one_way, "model.losses", "import trainer.storage.places", "1 imports trainer.storage.places"),
    (arrows_point_one_way, "storage.places", "def f():\n from trainer.train import step", "2 imports trainer.train.step"),
    (arrows_point_one_way, "config", "from trainer.arguments import parse", "1 imports trainer.arguments"),
    (arrows_point_one_way, "train.plan", "from trainer.predict import predict", "1 imports trainer.predict"),
    (imports_are_absolute, "data.order", "from ..train import step", "1 imports relatively"),
    (what_answers_a_wrong_key_is_light, "help", "from keras import ops", "1 imports keras"),
    (what_answers_a_wrong_key_is_light, "relay", "import tensorflow as tf", "1 imports tensorflow"),
    (few_read_the_environment, "cluster", "import os as system\nsystem.environ", "2 reads the environment"),
    (few_read_the_environment, "data.keep", "from os import environ as e", "1 reads the environment"),
    (few_read_the_environment, "data.keep", "os.getenv('X')", "1 reads the environment"),
    (few_write_files, "predict", "p.touch()", "1 writes files: touch"),
    (few_write_files, "train.loop", "temporary.replace(path)", "1 writes files: replace"),
    (few_write_files, "train.loop", "os.replace(a, b)", "1 writes files: replace"),
    (few_write_files, "export", "import shutil", "1 writes files: shutil"),
    (few_write_files, "export", "from shutil import move", "1 writes files: shutil"),
    (few_write_files, "help", "with open(name) as f:\n pass", "1 writes files: open"),
    (few_write_files, "help", "path.open('w')", "1 writes files: open"),
    (nothing_hides_an_error, "data.order", "try:\n f()\nexcept:\n g()", "3 takes every error"),
    (nothing_hides_an_error, "cores", "try:\n f()\nexcept BaseException as e:\n g()", "3 takes every error"),
    (nothing_hides_an_error, "cores", "try:\n f()\nexcept (OSError, Exception):\n g()", "3 takes every error"),
    (nothing_hides_an_error, "cores", "with contextlib.suppress(Exception):\n f()", "1 takes every error"),
    (nothing_hides_an_error, "data.keep", "rmtree(x, ignore_errors=True)", "1 ignores errors"),
    (nothing_hides_an_error, "train.step", "tf.math.nan_to_num(x)", "1 hides what is not a number"),
    (functions_are_short, "config", "def f():\n" + " g()\n" * 41, "1 has 41 lines"),
]
LAWS = list(dict.fromkeys(law for law, *_ in PLANTED))


def test_the_package_keeps_every_law() -> None:
    """All breaches at once."""
    package = trees(PACKAGE)
    assert len(package) > 70
    assert "\n".join(breach for law in LAWS for breach in law(package)) == ""


def test_no_module_of_the_tests_imports_a_test_module() -> None:
    tests = trees(TESTS)
    assert len(tests) > 90
    assert "\n".join([*imports_are_absolute(tests), *no_test_module_is_imported(tests)]) == ""


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("from tests.data.test_prepare import options", "1 imports tests.data.test_prepare"),
        ("from tests import test_cluster", "1 imports tests.test_cluster"),
        ("def f():\n import tests.test_cluster as other", "2 imports tests.test_cluster"),
    ],
)
def test_a_test_module_that_imports_another_is_found(text: str, breach: str) -> None:
    program = f"{text}\n{(TESTS / 'test_preflight.py').read_text()}"
    assert list(no_test_module_is_imported({"tests.test_preflight": ast.parse(program)})) == [f"tests.test_preflight:{breach}"]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_law_finds_what_breaks_it(law: Law) -> None:
    """Some lines are put before those of a module, and they alone are found."""
    for of, module, text, breach in PLANTED:
        if of is law:
            path = PACKAGE / f"{module.replace('.', '/')}.py"
            found = list(law({f"trainer.{module}": ast.parse(f"{text}\n{path.read_text()}")}))
            assert found == [f"trainer.{module}:{breach}"], text


def test_every_mutant_still_fits_the_code() -> None:
    """Its old text stands once in its file, and each of its tests is there."""
    mutants = read_mutants()
    assert len(mutants) > 200
    named = {test.partition("[")[0] for mutant in mutants for test in mutant.tests}
    lost = []
    for name in named:
        file, _, function = name.partition("::")
        text = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        if not text or (function and f"def {function}(" not in text):
            lost.append(name)
    assert lost == []
