"""Documents that are made from the code are as the code is now."""

import importlib.util
import re
from pathlib import Path

import pytest

from trainer.config import Config, leaves
from trainer.errors import ExitCode

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("program", ["draw_networks", "draw_distribution"])
def test_drawings_are_of_the_code_as_it_is(program: str) -> None:
    spec = importlib.util.spec_from_file_location(program, ROOT / "docs" / f"{program}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.drawings().items():
        assert (ROOT / "docs" / "images" / name).read_text() == text, "run `make drawings`"


def test_links_and_pictures_in_the_documents_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
        assert [t for t in targets if "://" not in t and not (document.parent / t).exists()] == []


def test_every_exit_code_is_in_the_operations_manual() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert [code for code in ExitCode if f"| {code.value} |" not in text] == []


def test_every_setting_named_in_the_documents_exists() -> None:
    sections = "data|model|loss|optimizer|train|runtime"
    known = {key for key, _ in leaves(Config())}
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)[`=]", document.read_text())
        assert [key for key in named if key not in known and not any(k.startswith(key + ".") for k in known)] == []
