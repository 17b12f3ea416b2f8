"""
Attacks on the grader: functions that exit, loop, lie, patch, spy, read, write and forge, called as
a student's body is. None earns anything, and the judge goes on.
"""

import ctypes
import json
import pathlib
import socket
import sys
import tempfile
import time

import pytest
import torch

from assignments import grade, judge, make, table
from conftest import ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="these limits are Linux's")

VICTIM = '''
def double(x):
    return 2 * x

def exits(x):
    import os
    os._exit(0)

def leaves(x):
    raise SystemExit(0)

def fills(x):
    return bytearray(8 << 30)

def floods(x):
    import torch
    return torch.zeros(3_000_000, dtype=torch.float64)

def lies(x):
    class Equal:
        def __eq__(self, other): return True
        def __bool__(self): return True
    return Equal()

def lies_as_tensor(x):
    import torch
    class Equal(torch.Tensor):
        def __eq__(self, other): return True
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None): return True
    return x.as_subclass(Equal)

def lies_as_number(x):
    class Equal(float):
        def __eq__(self, other): return True
    return Equal(1)

def patches(x):
    import builtins, torch
    torch.allclose = torch.equal = lambda *args, **kwargs: True
    torch.Tensor.__eq__ = lambda *args: True
    builtins.all = lambda *args: True
    return 3 * x

def prints(x):
    import sys
    for _ in range(1000):
        print("ok 10/10", flush=True)
        print("10 of 10 points", file=sys.stderr, flush=True)
    return 3 * x

def spies(x):
    import sys
    frame, names = sys._getframe(), []
    while frame is not None:
        names += [*frame.f_locals, *map(str, frame.f_locals.values())]
        frame = frame.f_back
    return [[*sys.modules], names]

def reads(x):
    return open("REFERENCE").read()

def lists(x):
    import os
    return os.listdir("FOLDER")

def writes(x):
    open("FOLDER/written", "w").write("x")

def removes(x):
    import os
    os.remove("FOLDER/kept")

def connects(x):
    import socket
    socket.create_connection(("127.0.0.1", PORT), timeout=2)

def forks(x):
    import os
    if os.fork() == 0:
        while True:
            pass

def runs(x):
    import subprocess
    subprocess.run(["true"])

def kills(x):
    import os
    os.kill(os.getppid(), 9)

def asks(x):
    return x.__class__.__mro__

def asks_on(x):
    import time
    while True:
        x.encode("a")
        time.sleep(0.1)

def reaches(x):
    return x.encode.__globals__

def sets(x):
    x.eos_id = 7
    return x.eos_id

def imports(x):
    import collections, functools, itertools, math, numpy, torch.nn.functional
    return math.sqrt(x)

def forges(x):
    import os, pickle, struct
    for number in range(3, 20):
        try:
            os.write(number, struct.pack("<QQ", 5, 0) + pickle.dumps(print)[:5])
        except OSError:
            pass
    return x

def raises(x):
    raise ValueError("line one\\nline two")

def recurses(x):
    return recurses(x)

def grows(x):
    x = [x]
    for _ in range(100_000):
        x = [x]
    return x
'''


class Tokens:
    """An object as bodies get them."""
    eos_id, secret = 5, "the expected number"

    def encode(self, text):
        return [len(text)]


@pytest.fixture(scope="module")
def call():
    """call(name, argument): a function of VICTIM, in a worker with 3 seconds for each call."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        other = pathlib.Path(folder) / "other"
        other.mkdir()
        (other / "kept").write_text("x")
        text = VICTIM.replace("REFERENCE", str(ROOT / "grpo.py")).replace("FOLDER", str(other))
        copy = pathlib.Path(folder) / "copy"
        make.write({"victim.py": text.replace("PORT", str(server.getsockname()[1]))}, copy)
        names = [f"victim.{line[4:line.index('(')]}" for line in text.splitlines()
                 if line.startswith("def ")]
        peer = judge.Peer(str(copy), names, {}, 3)
        yield lambda name, x=1.0: peer.call(f"victim.{name}", [x], {})
        peer.stop()
        assert [path.name for path in other.iterdir()] == ["kept"]


def refused(call, name, x=1.0):
    """Why a call brings no value."""
    with pytest.raises(Exception) as error:
        call(name, x)
    assert call("double", 4) == 8   # the judge is there, and the next call is answered
    return str(error.value)


def test_values_and_gradients_come_back(call):
    """What is honest arrives: numbers, tensors of each type, the gradient of what was given."""
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    found = call("double", x)
    assert found.requires_grad and found.tolist() == [[2, -4]]
    assert torch.autograd.grad(found.sum(), x)[0].tolist() == [[2, 2]]
    for dtype in (torch.float64, torch.int64, torch.float32):
        found = call("double", torch.ones(2, 0, 3, dtype=dtype))
        assert found.dtype == dtype and found.shape == (2, 0, 3) and not found.requires_grad
    assert call("double", float("inf")) == float("inf") and call("double", "ab") == "abab"
    assert call("double", [None, True]) == [None, True, None, True]
    assert call("imports", 4.0) == 2
    with torch.no_grad():
        assert not call("double", x).requires_grad


def test_functions_that_do_not_come_back(call):
    """Each costs its own points and none of another's; one that hangs is not asked again."""
    assert "exits: its process ended" in refused(call, "exits")
    assert "SystemExit" in refused(call, "leaves")
    start = time.monotonic()
    assert "did not return within 3 seconds" in refused(call, "asks_on", Tokens())
    again = time.monotonic()
    assert "did not return within 3 seconds" in refused(call, "asks_on", Tokens())
    assert time.monotonic() - again < 1 < again - start
    assert "line one line two" == refused(call, "raises")
    assert "recursion" in refused(call, "recurses")


def test_values_that_are_none(call):
    """An object that calls itself equal to everything, something endless, something very large."""
    for name in ("lies", "lies_as_number"):
        assert "returned a value of type Equal" in refused(call, name)
    assert refused(call, "lies_as_tensor", torch.ones(2))
    assert "16 MB" in refused(call, "floods") or sys.platform != "linux"
    assert refused(call, "grows")


@LINUX
def test_memory_has_an_end(call):
    """Eight gigabytes are refused."""
    assert refused(call, "fills") in ("", "MemoryError")


def test_what_it_patches_and_prints_stays_with_it(call):
    """The comparisons of the judge are its own, and what is printed goes nowhere."""
    assert call("patches", 2.0) == 6 and not torch.allclose(torch.ones(1), torch.zeros(1))
    assert not all([False]) and call("prints", 2.0) == 6


def test_it_sees_no_test_and_no_reference(call):
    """No frame, local or module of the process knows tests, expected values or other files."""
    modules, names = call("spies")
    assert not {"pytest", "_pytest", "world", "tiny", "check", "judge", "table"} & set(modules)
    assert not any("expected" in name or "salt" in name for name in names)


def test_objects_show_what_they_must(call):
    """Of what a body is given it may see what it needs; the rest of the judge is out of reach."""
    assert refused(call, "asks", Tokens())
    assert refused(call, "reaches", Tokens())
    assert call("sets", Tokens()) and Tokens.eos_id == 5
    with pytest.raises(AttributeError, match="no attribute 'secret'"):
        judge.Peer("", [], {}, 1).answer({"get": "secret", "of": 0}, b"", [Tokens()])
    with pytest.raises(AttributeError):
        judge.Peer("", [], {}, 1).answer({"get": "__class__", "of": 0}, b"", [Tokens()])


def test_forged_messages_are_no_values(call):
    """It may write into its own socket: what comes is no value, and nothing is unpickled."""
    assert "it sent what is no" in refused(call, "forges")


def landlock():
    """The version of the kernel's sandbox; 0: there is none."""
    return max(ctypes.CDLL(None).syscall(444, None, 0, 1), 0) if sys.platform == "linux" else 0


@LINUX
@pytest.mark.parametrize("name, version", [
    ("reads", 1), ("lists", 1), ("writes", 1), ("removes", 1), ("connects", 4), ("forks", 0),
    ("runs", 0), ("kills", 6)])
def test_the_outside_is_shut(call, name, version):
    """No other file is read, written or removed, nothing is connected, started or killed."""
    if landlock() < version:
        pytest.skip(f"this kernel lacks version {version} of Landlock")
    assert refused(call, name)


def test_a_folder_of_tricks_earns_nothing(tmp_path):
    """Bodies that attack, beside a conftest, tests, a check.py and module code that would give
    all points: 0, and none of it has run."""
    assignment, folder, sign = table.assignment(6), tmp_path / "eve", tmp_path / "was here"
    make.write(make.copy_of(assignment), folder)
    trick = f"open({str(sign)!r}, 'w')\n"
    bodies = {"group_advantages": "print('100 of 100 points')\n    import os; os._exit(0)",
              "token_weights": "return __import__('os')",
              "policy_loss": "import sys\n    sys.modules['torch'].allclose = lambda *a: True\n"
                             "    return logprobs, logprobs, logprobs > 0",
              "k3": "class Equal:\n        def __eq__(self, other): return True\n"
                    "    return Equal()"}
    text = (folder / "grpo.py").read_text()
    for name, body in bodies.items():
        stub = f'raise NotImplementedError("grpo.{name}: yours to write")'
        assert text.count(stub) == 1
        text = text.replace(stub, body)
    (folder / "grpo.py").write_text(trick + text)
    for path in ("conftest.py", "tests/conftest.py", "check.py", "torch.py", "sitecustomize.py",
                 "tests/identities/test_k3.py", "assignments/__init__.py", "world.py"):
        make.write({path: trick}, folder)
    (folder / "assignment.json").write_text(json.dumps({"number": 1}))
    [found] = grade.grade(assignment, [folder], tmp_path / "out", seconds=3).values()
    assert found["score"] == 0 and not sign.exists()
    outputs = " ".join(test["output"] for test in found["tests"])
    for words in ("group_advantages: its process ended", "a value of type module",
                  "a value of type Equal"):
        assert words in outputs
