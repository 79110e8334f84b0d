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


def test_scripts_named_in_the_docs_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:python|torchrun [^\n]*?) ((?:docs/)?\w+\.py)\b", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"\btools[./]([a-z_]+)", text):
            assert (ROOT / f"tools/{name}.py").exists(), f"{page.name}: tools.{name}"
        for name in re.findall(r"@(recipes/\w+\.txt)", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("line", [
    "python train.py --data data/train.json", "torchrun --nproc_per_node 4 train.py",
    "python evaluate.py --wider", "python export.py --ir", "python detect.py photo.jpg"])
def test_readme_says_the_commands(line):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert line in [shown.split(" #")[0].strip() for shown in lines]


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"
