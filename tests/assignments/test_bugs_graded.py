"""Assignment 7, graded: what honest, wrong and dishonest hand-ins earn."""

import json
import random
import re
import sys

import pytest

from assignments import bugs, grade, make, trial
from conftest import ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="these limits are Linux's")
SALT = "a secret of nobody"
PROJECT = list(make.read().values())


def row(words):
    [bug] = [bug for bug in bugs.gallery() if words in bug.consequence]
    return bug


CISPO = row("CISPO's weight")
# Beside it four others, as in a student's copy.
FIVE = [CISPO, *map(row, ("the rewards that are logged", "the clip also covers",
                          "a mean of means: short", "prefers the worse answer"))]
HONEST = '''
import torch
import grpo


def helper(x):
    return torch.tensor([[x]], requires_grad=True)


def test_the_weight_is_not_differentiated():
    logprobs = helper(-0.5)
    losses, _, _ = grpo.policy_loss(logprobs, logprobs.detach(), torch.tensor([2.0]),
                                    torch.ones(1, 1).bool(), loss_type="cispo")
    losses.sum().backward()
    assert abs(logprobs.grad.item() + 2) < 1e-6
'''


@pytest.fixture(scope="module")
def bench():
    made = bugs.Bench()
    yield made
    made.stop()


def judged(bench, text, bug=CISPO, seconds=20):
    """None, or why a test earns nothing."""
    return bugs.test_fails_as_it_should(bench, FIVE, bug, text, seconds, random.Random(0))


def own_tests():
    """{bug: the test that notices it, as a student's}, of those that need no fixture."""
    modules = {path.removesuffix(".py").split("/")[0] for path in make.read()} | {"world", "tiny"}
    for bug in bugs.gallery():
        file, name = bug.killer.split("::")
        text = make.without_tests((ROOT / "tests" / file).read_text(), {name.split("[")[0]})
        head = text[text.index(f"def {name.split('[')[0]}"):].split("\n")[0]
        if "[" not in name and "()" in head and trial.complaint(text, modules) is None \
                and "parametrize" not in text:
            yield bug, text


def hand_in(folder, found, tests, mended):
    make.write({**bugs.copy_of(found, 2), **tests, **mended}, folder)
    return folder


def test_right_lines_and_the_projects_own_tests_earn_everything(tmp_path, capsys):
    """100 points; the copy as it was handed out 0; tests of the neighbour's bugs, with the files
    mended, the half of the mended ones."""
    found = {}
    for bug, text in own_tests():
        found.setdefault(bug.file, (bug, text))
    chosen = list(found.values())[:5]
    five = [bug for bug, _ in chosen]
    tests = {f"bugs/bug_{i}.py": text for i, (_, text) in enumerate(chosen, 1)}
    mended = {bug.file: make.read()[bug.file] for bug in five}
    moved = {f"bugs/bug_{i % 5 + 1}.py": text for i, (_, text) in enumerate(chosen, 1)}
    folders = [hand_in(tmp_path / "ada", five, tests, mended),
               hand_in(tmp_path / "bob", five, {}, {}),
               hand_in(tmp_path / "eve", five, moved, mended)]
    results = grade.report(lambda folder: bugs.judge_folder(folder, five, SALT, 60), folders,
                           tmp_path / "out", 1)
    assert {name: one["score"] for name, one in results.items()} == {"ada": 100, "bob": 0,
                                                                     "eve": 50}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["folder", "points", *(w for i in range(1, 6) for w in ("bug", str(i)))]
    assert lines[1] == ["ada", "100", *["20/20"] * 5] and lines[3] == ["eve", "50", *["10/20"] * 5]
    written = json.loads((tmp_path / "out/ada/results.json").read_text())
    assert written["tests"][0] == {
        "name": "bug 1: the test fails where it is, and passes where it is not", "max_score": 10,
        "score": 10, "output": "", "visibility": "visible"}
    assert sum(test["max_score"] for test in written["tests"]) == 100


# -- tests of students ----------------------------------------------------------------------------


def test_an_honest_test(bench):
    """It fails where its bug is and not where another one is."""
    assert judged(bench, HONEST) is None
    assert judged(bench, HONEST, bug=FIVE[1]) == "it passes where the bug is"


@pytest.mark.parametrize("body, message", [
    ("assert False, 'always'", "it fails where no bug is: AssertionError: always"),
    ("pass", "it passes where the bug is"),
    ("raise SystemExit(80)", "it fails where no bug is: SystemExit: 80"),
    ("print('passed' * 1000)", "it passes where the bug is"),
    ("import random; assert random.random() < 0.5", "it "),
    ("while True: pass", "it took longer than 2 seconds")])
def test_tests_that_tell_nothing(bench, body, message):
    """A verdict that does not depend on the files earns nothing, whatever it is."""
    assert judged(bench, f"def test_x():\n    {body}\n", seconds=2 if "while" in body else 20) \
        .startswith(message)


@pytest.mark.parametrize("text, name", [
    ("import inspect", "inspect"), ("import os", "os"), ("from train import os", "os"),
    ("import torch\nx = torch.sys", "sys"), ("x = open('grpo.py')", "open"),
    ("import grpo\nx = grpo.k3.__code__", "__code__"), ("x = getattr(1, 'real')", "getattr"),
    ("import grpo\nx = '{0.__code__}'.format(grpo.k3)", "format"), ("x = eval('1')", "eval"),
    ("import grpo\nx = f'{grpo.k3.__code__.co_code}'", "co_code"), ("x = globals()", "globals"),
    ("import grpo\nx = grpo.__dict__", "__dict__"), ("import torch.jit", "jit"),
    ("import torch\nx = torch.fx", "fx"), ("import importlib", "importlib"),
    ("import pytest\nx = pytest.importorskip", "importorskip"), ("x = __import__", "__import__"),
    ("try:\n    x = 1\nexcept ValueError as e:\n    x = e.__traceback__", "__traceback__"),
    ("x = [].__class__", "__class__"), ("import dataclasses\nx = dataclasses.sys", "sys"),
    ("def f(x):\n    yield x\nx = f(1).gi_frame", "gi_frame"), ("import ctypes", "ctypes")])
def test_what_leads_to_the_text_is_refused(text, name):
    """By its name, before anything is run."""
    complaint = trial.complaint(f"{text}\ndef test_x():\n    pass\n", {"grpo", "train"})
    assert re.fullmatch(rf"line \d: `{name}` is not allowed: .*", complaint)


@pytest.mark.parametrize("text, message", [
    ("def test_x(:\n", "line 1: "), ("x = 1\n", "there is no function test_"), ("\0", "line 1: "),
    ("class A:\n    def test_x(self): pass\n", "there is no function test_"),
    ("import time\ndef test_x(): pass\n", "line 1: time cannot be imported"),
    ("from . import grpo\ndef test_x(): pass\n", "line 1: None cannot be imported"),
    ("from grpo import *\ndef test_x(): pass\n", "line 1: import names, not *"),
    ("def test_x():\n    match 1:\n        case object(__code__=c): pass\n", "`match`"),
    ("def test_x():\n    return " + "(" * 300 + ")" * 300, "too many nested")])
def test_what_is_no_test_is_said(text, message):
    """In one line."""
    assert message in trial.complaint(text, {"grpo"})


# What gets past the names is still in a locked process, over other bytes each time.
PAST = {
    "bytes": "import grpo\nBEFORE = {code}\ndef test_x():\n"
             "    assert grpo.policy_loss.__code__.co_code != BEFORE\n",
    "source": "import inspect, grpo\ndef test_x():\n"
              "    assert '.detach() * A * logprobs' in inspect.getsource(grpo)\n",
    "reads": "def test_x():\n    assert '.detach() * A' in open({root!r} + '/grpo.py').read()\n",
    "writes": "def test_x():\n    open({folder!r}, 'w').write('x')\n",
    "exits": "import os\ndef test_x():\n    os._exit(80)\n",
    "dies": "import os\ndef test_x():\n    os._exit(0)\n",
    "forks": "import os\ndef test_x():\n    os.fork()\n",
    "fills": "def test_x():\n    bytearray(8 << 30)\n",
    "kills": "import os\ndef test_x():\n    os.kill(os.getppid(), 9)\n",
    "forges": "import os\ndef test_x():\n    for i in range(3, 30):\n        try:\n"
              "            os.write(i, b'passed')\n        except OSError:\n            pass\n"}


@LINUX
@pytest.mark.parametrize("name", PAST)
def test_what_gets_past_the_names_earns_nothing(bench, name, tmp_path, monkeypatch):
    """And the next test is run as if nothing had been."""
    if name == "kills" and bugs_landlock() < 6:
        pytest.skip("this kernel lacks version 6 of Landlock")
    known = compile(bugs.plant([CISPO])["grpo.py"], "grpo.py", "exec")
    code = next(c for c in known.co_consts if getattr(c, "co_name", "") == "policy_loss").co_code
    text = PAST[name].format(code=code, root=str(ROOT), folder=str(tmp_path / "x"))
    monkeypatch.setattr(trial, "complaint", lambda *asked: None)
    why = judged(bench, text)
    assert why and not list(tmp_path.iterdir())
    assert bench.process.poll() is None
    message = {"files": bugs.plant([]), "test": "def test_x(): pass", "seed": 0}
    assert bench.ask(message, 20)["verdict"] == "passed"


def bugs_landlock():
    from test_attacks import landlock
    return landlock()


# -- mended files ---------------------------------------------------------------------------------

WRONG_LINE = CISPO.wrong
MENDED = {
    CISPO.right: None,
    CISPO.right + "   # so": None,
    "weight = ratio.clamp(max=1 + epsilon_high).detach()\n        losses = -weight * A * logprobs":
        None,
    "losses = -ratio.detach().clamp(max=1 + epsilon_high) * logprobs * A": None,
    CISPO.wrong + "   # mended": "nothing is changed",
    "losses = -ratio.detach() * A * logprobs": "the withheld test of this bug does not pass",
    "raise SystemExit(0)": "the withheld test of this bug does not pass",
    "x = 1\n        y = 2\n        z = 3\n        u = 4\n        v = 5\n        " + CISPO.right:
        "6 lines are changed, and 5 may be",
    "import os; os._exit(80)": "the change names `os`",
    "losses = torch.os": "the change names `os`",
    "losses = open('x')": "the change names `open`",
    "losses = eval('1')": "the change names `eval`",
    "losses = getattr(ratio, 'detach')()": "the change names `getattr`",
    "torch.allclose = max": "a change imports nothing",
    "import math": "a change imports nothing",
    "losses = ratio.__class__": "the change names `__class__`",
    "class Equal: pass": "the change names `Equal`",
    "losses = (": "line"}


@LINUX
@pytest.mark.parametrize("line", MENDED)
def test_mended_files(bench, line):
    """The project's own line, others that do the same, and what is refused."""
    planted = bugs.plant(FIVE)["grpo.py"]
    assert planted.count(CISPO.wrong) == 1
    theirs = planted.replace(CISPO.wrong, line)
    why, expected = bugs.is_mended(bench, CISPO, theirs, 20), MENDED[line]
    assert why is None if expected is None else expected in why


def test_what_is_changed_elsewhere_is_not_read(tmp_path, bench):
    """Other files, removed tests, a conftest that passes everything: the mended file counts, the
    others do not, and nothing of the folder is run."""
    sign = tmp_path / "was here"
    trick = f"open({str(sign)!r}, 'w')\n"
    folder = hand_in(tmp_path / "eve", FIVE, {}, {
        path: trick for path in ("conftest.py", "sitecustomize.py", "torch.py", "check.py",
                                 "model.py", "tests/world.py", "bugs/conftest.py", "pytest.py")})
    (folder / "grpo.py").write_text(make.read()["grpo.py"])
    (folder / "tests/tiny.py").unlink()
    (folder / "dpo.py").unlink()
    (folder / "dpo.py").symlink_to(ROOT / "dpo.py")
    found = bugs.judge_folder(folder, FIVE, SALT, 20)
    assert [test["score"] for test in found["tests"]] == [0, 10] + [0] * 8 and not sign.exists()
    assert "dpo.py: there is no such file" in found["tests"][3]["output"]


def test_idle_statements_change_no_behaviour_and_all_bytes():
    """Two faces of one file differ in the code of every function, and the worked example of a
    docstring still holds."""
    import ast
    texts = [ast.unparse(bugs.Idle(random.Random(i)).visit(ast.parse(make.read()["sft.py"])))
             for i in range(2)]
    spaces = [{"__name__": "sft"}, {"__name__": "sft"}]
    for text, space in zip(texts, spaces):
        exec(compile(text, "sft.py", "exec"), space)
    one, two = (space["token_weights"] for space in spaces)
    assert one.__code__.co_code + bytes(str(one.__code__.co_consts), "utf8") != \
        two.__code__.co_code + bytes(str(two.__code__.co_consts), "utf8")
    assert one.__doc__ == two.__doc__ and one.__doc__
    import torch
    mask = torch.tensor([[True, True], [True, False]])
    assert one(mask).tolist() == two(mask).tolist()


def test_the_students_own_check(tmp_path):
    """The example of the handout is a test as it is asked for; check.py says of each file whether
    it fails before and passes now."""
    import subprocess
    make.hand_out(bugs.copy_of(FIVE, 2), tmp_path / "ada", "Assignment 7")
    [example] = re.findall(r"```python\n(.*?)```", (tmp_path / "ada/README.md").read_text(), re.S)
    (tmp_path / "ada/bugs/bug_1.py").write_text(HONEST)
    (tmp_path / "ada/bugs/bug_2.py").write_text(example)
    (tmp_path / "ada/bugs/bug_3.py").write_text("import os\n")
    (tmp_path / "ada/grpo.py").write_text(make.read()["grpo.py"])
    done = [subprocess.run([sys.executable, "check.py", *words], cwd=tmp_path / "ada",
                           capture_output=True, text=True) for words in ("123", "6")]
    assert [one.returncode for one in done] == [1, 2]
    assert [line[:60] for line in done[0].stdout.splitlines()[:4]] == [
        "ok  bugs/bug_1.py  fails before, passes now",
        "--  bugs/bug_2.py  it passes on the files as they were hande",
        "--  bugs/bug_3.py  line 1: `os` is not allowed: a test looks",
        "ok  grpo.py  1 changed line"]
    assert subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path / "ada",
                          capture_output=True, text=True).stdout.count("\n") == 4
