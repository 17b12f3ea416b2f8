"""
The README cannot drift: every file, function and test that it names exists, every command in it is one that the parser
takes, and every flag is a flag.
"""

import ast
import re
import shlex

import pytest

import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()
GUIDE = [line for line in README.splitlines() if re.search(r"\]\(tests/test_\w+\.py\) `test_", line)]
COMMANDS = re.findall(r"^(?:pip install -r requirements.txt && )?python train\.py (.*)$", README, re.M)


def names(path):
    """Functions, methods and classes defined in a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_the_guide_is_there():
    """The survey's sections 2, 3.1, 3.2, 4.1, 4.3, 4.4 and 6 each have at least one line."""
    sections = {line.split("|")[1].split(",")[0].strip() for line in GUIDE}
    assert {"2", "3.1", "3.2", "4.1", "4.3", "4.4", "6"} <= sections and len(GUIDE) >= 25


@pytest.mark.parametrize("line", GUIDE, ids=[line.split("`")[7] for line in GUIDE])
def test_a_line_of_the_guide(line):
    """The function is defined in the file that is linked, the test in the test file, and its docstring says what it proves."""
    file, function, test_file, test = re.findall(r"`([^`]+)`", line)[-4:]
    assert f"]({file})" in line and f"](tests/{test_file})" in line
    assert function in names(file) and test in names(f"tests/{test_file}")
    tree = ast.parse((ROOT / "tests" / test_file).read_text())
    [proof] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == test]
    assert ast.get_docstring(proof)


def test_links_lead_somewhere():
    """Every relative link and picture is a file of the repository."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 20 and all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command):
    """What the README tells people to type is accepted by the parser (a comparison: each of its parts)."""
    words = shlex.split(command.split("   ")[0])
    at = words.index("--algo") + 1 if "--algo" in words else None
    for variant in words[at].split(",") if at else [None]:
        argv = list(words)
        if variant:
            name, *flags = variant.split(":")
            argv[at:at + 1] = [name, *(f"--{flag}" for flag in flags)]
        train.parse_args(argv)


def test_every_file_is_in_the_map():
    """The map of the files names each of the project's, and no other."""
    rows = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)
    assert sorted(rows) == sorted(path.name for path in ROOT.glob("*.py"))


def test_flags_exist():
    """Every --flag that the README mentions is one of some algorithm."""
    known = set().union(*(train.make_parser(algo)._option_string_actions for algo in train.ALGORITHMS))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z_]+", README))
    assert len(mentioned) > 12 and mentioned <= known, mentioned - known
