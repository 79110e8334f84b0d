"""The shape of the repository: three floors, imports run one way, links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = sorted(ROOT.glob("*.py"))
FLOORS = {"support": sorted(ROOT.glob("support/*.py")), "top": TOP, "tools": sorted(ROOT.glob("tools/*.py"))}
FORBIDDEN = {"support": {path.stem for path in TOP} | {"tools"}, "top": {"tools"}, "tools": set()}
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("weights/*.md")]


def imported(path):
    """The first parts of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_one_way(floor):
    wrong = [f"{path.relative_to(ROOT)} imports {name}" for path in FLOORS[floor] for name in imported(path)
             if name in FORBIDDEN[floor]]
    assert not wrong, "tools -> top -> support"


def test_model_imports_nothing_of_ours():
    own = {path.stem for path in TOP} | {"support", "tools"}
    assert not own & set(imported(ROOT / "model.py"))


def test_scripts_named_in_the_docs_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"python (\w+\.py)\b", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"python -m tools\.(\w+)", text):
            assert (ROOT / f"tools/{name}.py").exists(), f"{page.name}: tools.{name}"


def test_links_lead_somewhere():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        absent = [link for link in links
                  if not link.startswith("http") and not (page.parent / link).exists()]
        assert not absent, f"{page.name}: {absent}"
