"""
tour.ipynb, without running it (.ci/run does that): well-formed, stripped of outputs, every cell
compiles, what it takes from the project's files exists, and no figure in its prose can go stale.
"""

import ast
import copy
import importlib
import json
import re
import subprocess
import sys

import pytest

import train
from conftest import ROOT
from harness import flags
from model import GPTConfig

TOUR = json.loads((ROOT / "tour.ipynb").read_text(encoding="utf-8"))
OURS = {path.stem for folder in ("", "experiments") for path in (ROOT / folder).glob("*.py")}
FLAGS = {flag for algo in train.ALGORITHMS for flag in flags.make_parser(
    algo, train.ALGORITHMS, GPTConfig)._option_string_actions}
FIGURE = re.compile(r"(?<![\w.-])\d*\.\d+(?!\.)|\d+ ?%|\d+ (?:seconds|minutes|hours)")


def cells(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def taken(tree):
    """What a cell imports of the project: {name in the notebook: module or object}. Raises
    ImportError or AttributeError for what is not there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in OURS:
                    found[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS | {"harness"}:
            for alias in node.names:
                module = importlib.import_module(node.module)
                value = getattr(module, alias.name, None)
                if value is None:   # a module of a package, or nothing
                    value = importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = value
    return found


def faults(notebook):
    """What is wrong with a notebook, in words."""
    wrong, names = [], {}
    if notebook["nbformat"] != 4 or len({c["id"] for c in notebook["cells"]}) != len(
            notebook["cells"]):
        wrong.append("format")
    for cell in notebook["cells"]:
        if cell["metadata"] or cell.get("outputs") or cell.get("execution_count"):
            wrong.append("not stripped")
        if max(map(len, "".join(cell["source"]).splitlines())) > 100:
            wrong.append("too wide")
    for source in cells(notebook, "code"):
        try:
            tree = ast.parse(source)
            names |= taken(tree)
        except (SyntaxError, ImportError, AttributeError) as error:
            wrong.append(f"does not compile or import: {error}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = names.get(node.value.id)
                if owner is not None and not hasattr(owner, node.attr):
                    wrong.append(f"{node.value.id}.{node.attr} is not there")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "train.main":
                words = ast.literal_eval(node.args[0])
                try:
                    flags.parse(words, train.ALGORITHMS, GPTConfig)
                except flags.InputError as error:
                    wrong.append(str(error))
    for prose in cells(notebook, "markdown"):
        without_code = re.sub(r"`[^`]*`", "", prose)
        wrong += [f"a figure: {figure}" for figure in FIGURE.findall(without_code)]
        links = re.findall(r"\]\(([^)]+)\)", prose)
        wrong += [f"no {link}" for link in links if not (ROOT / link).exists()]
        for command in re.findall(r"`(train\.main\(.*?\))`", prose):
            words = ast.literal_eval(ast.parse(command).body[0].value.args[0])
            flags.parse(words, train.ALGORITHMS, GPTConfig)
        wrong += [f"no {flag}" for flag in re.findall(r"--[a-z_]+", prose) if flag not in FLAGS]
        files = re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb|md))`", prose)
        wrong += [f"no {file}" for file in files if not (ROOT / file).exists()]
    return wrong


def test_the_notebook_is_sound():
    """Nothing is wrong with it, and it takes the steps that it promises from the real files."""
    assert faults(TOUR) == []
    code = "\n".join(cells(TOUR, "code"))
    for used in ("grpo.group_advantages(", "grpo.token_weights(", "grpo.policy_loss(",
                 "algo.minibatches(", "algo.loss(", "rare.verdict(", '"--inspect", "all"'):
        assert used in code
    assert not re.search(r"^class |\.std\(|softmax", code, re.M)   # nothing is pasted
    found = json.loads((ROOT / "experiments/results/rare.json").read_text())
    assert found["verdict"] == "holds here"   # as the last section concludes
    assert max(len(source.splitlines()) for source in cells(TOUR, "code")) <= 40


@pytest.mark.parametrize("kind, text, expected", [
    ("code", f"x = '{'x' * 95}'", "too wide"), ("code", "def f(:", "does not compile"),
    ("code", "import grpo\ngrpo.group_advantage(1)", "grpo.group_advantage is not there"),
    ("code", "from harness.log import Logg", "does not compile or import"),
    ("code", "from harness import nothing", "does not compile or import"),
    ("code", "train.main(['--algo', 'grop'])", "--algo grop is unknown"),
    ("markdown", "It gets .985 right.", "a figure: .985"), ("markdown", "In 31 % of", "a figure"),
    ("markdown", "It takes 3 minutes.", "a figure"), ("markdown", "[x](nowhere.md)", "no nowhere"),
    ("markdown", "see `nowhere.py`", "no nowhere.py"), ("markdown", "`--tempo 2`", "no --tempo")])
def test_what_is_wrong_is_seen(kind, text, expected):
    """A planted cell of each kind of fault, one at a time."""
    notebook = copy.deepcopy(TOUR)
    notebook["cells"].append({"cell_type": kind, "id": "planted", "metadata": {}, "source": [text]})
    [fault] = faults(notebook)
    assert fault.startswith(expected)


@pytest.mark.parametrize("change", [
    {"outputs": [{"output_type": "stream", "text": "7"}]}, {"execution_count": 3},
    {"metadata": {"scrolled": True}}])
def test_what_an_execution_leaves_is_seen(change):
    """Outputs, counts and the marks of an editor are not committed."""
    notebook = copy.deepcopy(TOUR)
    notebook["cells"][1] |= change
    assert faults(notebook) == ["not stripped"]


def test_the_first_cell(monkeypatch, tmp_path):
    """On a laptop it does nothing. On Colab it clones the address that was filled in, installs what
    is required and goes there; without an address it says what to do; once there, nothing."""
    first, done = cells(TOUR, "code")[0], []
    monkeypatch.chdir(tmp_path)

    def call(words, check):
        assert check
        done.append(words)
        if words[0] == "git":
            (tmp_path / words[-1]).mkdir()
            (tmp_path / words[-1] / "train.py").touch()
    monkeypatch.setattr(subprocess, "run", call)
    exec(first, {})
    monkeypatch.setitem(sys.modules, "google.colab", object())
    with pytest.raises(SystemExit, match="write the repository's address above"):
        exec(first, {})
    assert not done and 'REPOSITORY = ""' in first
    filled = first.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/it.git"')
    for _ in range(2):
        exec(filled, {})
    assert [words[:2] for words in done] == [["git", "clone"], [sys.executable, "-m"]]
    assert "https://example.org/it.git" in done[0] and "requirements.txt" in done[1]
    assert str(tmp_path) not in first and (tmp_path / "post-training").samefile(".")
