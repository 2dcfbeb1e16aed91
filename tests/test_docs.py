"""Documents that are made from the code are as the code is now."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from trainer.arguments import parse
from trainer.config import Config, leaves
from trainer.errors import ExitCode, UserError

ROOT = Path(__file__).parent.parent
_OWN = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "trainer/sample/README.md")
DOCUMENTS = [*(ROOT / name for name in _OWN), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("program", ["draw_networks", "draw_distribution"])
def test_drawings_are_of_the_code_as_it_is(program: str) -> None:
    spec = importlib.util.spec_from_file_location(program, ROOT / "docs" / f"{program}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.drawings().items():
        assert (ROOT / "docs" / "images" / name).read_text() == text, "run `make drawings`"


def anchors(document: Path) -> set[str]:
    """What a link may point to in a document: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ +(.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_in_the_documents_exist() -> None:
    broken = []
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", document.read_text()):
            file = document.parent / target if target else document
            if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
                broken.append(f"{document.name}: {target}#{anchor}")
    assert broken == []


MAKE = r"(?:^|[`;&] ?)make ([a-z][\w-]*)"


def code_of(document: Path) -> str:
    """What a document shows as code, one piece a line."""
    pieces: list[str] = re.findall(r"^```.*?^```|`[^`\n]+`|^    [^\n]*$", document.read_text(), re.DOTALL | re.MULTILINE)
    return "\n".join(re.sub(r"(?m)^    ", "", piece) for piece in pieces)


def test_every_make_target_named_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(document.name, word) for document in DOCUMENTS for word in re.findall(MAKE, code_of(document), re.MULTILINE)}
    assert len(named) > 5
    assert sorted(pair for pair in named if pair[1] not in targets) == []


def test_every_file_named_in_the_documents_exists() -> None:
    """Paths of this repository, alone or in a command; a pattern must fit something."""
    folders = "|".join(("benchmarks", "configs", "deploy", "docker", "docs", "tests", "trainer", r"\.ci", r"\.github"))
    missing = []
    for document in DOCUMENTS:
        for path in re.findall(rf"(?<![\w./:=-])(?:{folders})/[\w./*-]*[\w*/]", code_of(document)):
            if not any(ROOT.glob(path.rstrip("/"))):
                missing.append(f"{document.name}: {path}")
    assert missing == []


def test_every_exit_code_is_in_the_operations_manual() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert [code for code in ExitCode if f"| {code.value} |" not in text] == []


def test_every_setting_named_in_the_documents_exists() -> None:
    sections = "data|model|loss|optimizer|train|runtime"
    known = {key for key, _ in leaves(Config())}
    for document in DOCUMENTS:
        named = re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)[`=]", document.read_text())
        assert [key for key in named if key not in known and not any(k.startswith(key + ".") for k in known)] == []


def test_every_command_in_the_documents_can_be_typed() -> None:
    """Each `trainer ...` line of their code has flags and settings that exist."""
    found, wrong = 0, []
    for document in DOCUMENTS:
        for line in re.findall(r"^(?:\.venv/bin/)?(trainer(?: .*)?)$", code_of(document), re.MULTILINE):
            found += 1
            try:
                values = parse(shlex.split(line.partition("  #")[0]))[1]
                unknown = {setting.partition("=")[0] for setting in values.set} - {key for key, _ in leaves(Config())}
                wrong += [f"{document.name}: {line}: {key}" for key in unknown]
            except (UserError, ValueError) as error:
                wrong.append(f"{document.name}: {line}: {error}")
    assert found > 15
    assert wrong == []
