"""The shape of the repository: imports run one way, files are short, the README names every script."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
OWN = {path.stem for path in SCRIPTS}
PYTHON = [*SCRIPTS, *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("docs/*.py"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def import_groups():
    """The groups of modules from left to right, as docs/conventions.md states them."""
    text = (ROOT / "docs/conventions.md").read_text(encoding="utf-8")
    line, = re.findall(r"^`([a-z0-9_, ]+(?: -> [a-z0-9_, ]+)+)`$", text, re.MULTILINE)
    return [group.split(", ") for group in line.split(" -> ")]


def own_imports(path):
    """The modules of this repository that a file imports, anywhere in it: `{(name, line)}`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {(name.split(".")[0], node.lineno) for name in names if name.split(".")[0] in OWN}
    return found


def test_the_order_names_every_module_once():
    named = [name for group in import_groups() for name in group]
    assert sorted(named) == sorted(OWN), "docs/conventions.md has the order of imports"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_imports_run_one_way(path):
    place = {name: place for place, group in enumerate(import_groups()) for name in group}
    wrong = [f"{path.name}:{line} imports {name}" for name, line in sorted(own_imports(path))
             if place[name] >= place[path.stem]]
    assert not wrong, f"not to the left of {path.stem} in docs/conventions.md: {wrong}"


def test_model_imports_nothing_of_ours():
    assert not own_imports(ROOT / "model.py")


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_files_and_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 430, f"{path.name} has {len(lines)} lines: split it by jobs"
    long = [f"{path.name}:{number}" for number, line in enumerate(lines, 1) if len(line) > 110]
    assert not long, f"lines over 110: {long}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_readme_names_every_script(path):
    assert re.search(rf"^{re.escape(path.name)} ", README, re.MULTILINE), "the tree in README.md has no line"


def test_the_readme_names_no_script_that_is_absent():
    for text in (README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))):
        named = set(re.findall(r"(?:^|python )(\w+\.py) ", text, re.MULTILINE))
        assert named <= {path.name for path in SCRIPTS}


def test_links_lead_somewhere():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("weights/*.md")):
        links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
        absent = [link for link in links
                  if not link.startswith("http") and not (path.parent / link).exists()]
        assert not absent, f"{path.name}: {absent}"


def test_the_readme_is_read_in_minutes():
    before = README[:README.index("\n## The files")]
    words = re.findall(r"\S*\w\S*", before)  # code and tables count too
    assert len(words) < 900, f"{len(words)} words before the tree"
    for line in ("python train.py --data data/train.json", "torchrun --nproc_per_node 4 train.py",
                 "python evaluate.py --wider", "python export.py --ir", "python detect.py photo.jpg"):
        assert re.search(rf"^{re.escape(line)}( +#.*)?$", before, re.MULTILINE), line
