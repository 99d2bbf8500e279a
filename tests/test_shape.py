"""The module's shape: nesting, the order of its sections, examples that hold, and files only where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

from conftest import ROOT

import enrich_dataset as module

SOURCE = (ROOT / "enrich_dataset.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def nesting(node: ast.AST) -> int:
    deeper = isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match)
    return deeper + max((nesting(child) for child in ast.iter_child_nodes(node)), default=0)


def test_nothing_is_nested_deeper_than_three() -> None:
    assert [function.name for function in FUNCTIONS if nesting(function) > 3] == []


def test_a_section_uses_only_what_stands_above_it_but_for_the_story_that_uses_all() -> None:
    heads = [
        (number, name)
        for number, line in enumerate(SOURCE.splitlines(), 1)
        if (name := line[6:].rstrip(" -")) and line.startswith("# --- ")
    ]
    order = [name for _, name in heads]

    def section(node: ast.AST) -> int:
        return sum(number <= getattr(node, "lineno", 0) for number, _ in heads)

    made = {
        name: section(node)
        for node in TREE.body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
        )
    }
    told = order.index("The story") + 1
    upward = {
        (order[section(node) - 1], used.id)
        for node in TREE.body
        if section(node) not in {0, told}
        for used in ast.walk(node)
        if isinstance(used, ast.Name) and isinstance(used.ctx, ast.Load) and made.get(used.id, 0) > section(node)
    }
    assert upward == set()


# Files of tests that are about more than one section, or none.
OTHER_TESTS = {"local_model", "notebook", "readme", "recorded", "shape", "stand_in", "storms"}


def test_each_section_of_the_module_has_its_file_of_tests_and_no_other_has_one() -> None:
    sections = {name.lower().replace(" ", "_") for name in re.findall(r"^# --- (.+?) -+$", SOURCE, re.MULTILINE)}
    sections = {"story" if name == "the_story" else name for name in sections}
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert files - OTHER_TESTS == sections
    assert len(sections) > 20


def test_the_top_level_is_what_the_user_asked_for() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()} | {".git"}
    here = {path.name for path in ROOT.iterdir() if not any(path.match(pattern) for pattern in ignored)}
    # A copy that is no clone has nothing to list, and what is there counts.
    assert ({path.split("/")[0] for path in listed} or here) == {
        "enrich_dataset.py", "example_usage.py", "tests", "requirements.txt", "ENRICHMENT_README.md",
        ".gitignore", "HatefulData.csv", "pyproject.toml", ".ci",
    }  # fmt: skip


def test_only_declared_packages_are_imported() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(TREE)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    declared = {re.split("[>=]", line)[0].replace("-", "_") for line in (ROOT / "requirements.txt").read_text().split()}
    comes_with_pandas, if_installed = {"numpy"}, {"matplotlib"}
    assert imported - set(sys.stdlib_module_names) == declared | comes_with_pandas | if_installed


def examples() -> Iterator[tuple[str, str]]:
    for function in FUNCTIONS:
        docstring = ast.get_docstring(function) or ""
        yield from re.findall(rf"({function.name}\(.+?\)) == (.+?)[.\n]*$", docstring, re.MULTILINE)


def test_examples_in_docstrings_hold() -> None:
    found = list(examples())
    assert len(found) >= 5
    for left, right in found:
        assert eval(left, vars(module)) == eval(right), left  # noqa: S307 # our own docstrings
