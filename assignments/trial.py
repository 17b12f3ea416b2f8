"""
Do my five tests fail on what I was given, and pass on what I have mended?

    python check.py        each of bugs/bug_1.py to bugs/bug_5.py
    python check.py 3      the third alone

A test is run twice: over the files as they were handed out (the first commit), where it has to
fail, and over the files as they stand, where it has to pass. The exit code is 0 if all do.
"""

import ast
import builtins
import functools
import importlib.abc
import importlib.util
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"   # before torch: the models are tiny

# -- the project from texts -----------------------------------------------------------------------


class Texts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from {path: text}. There is no file, and so no source to be read."""

    def __init__(self, files):
        self.files = {}
        for path, text in files.items():
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            name = name.removeprefix("tests.")   # its helpers are imported by their bare names
            self.files[name] = path, text

    def find_spec(self, name, path=None, target=None):
        if name in self.files:
            package = self.files[name][0].endswith("__init__.py")
            return importlib.util.spec_from_loader(name, self, is_package=package)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        path, text = self.files.pop(module.__name__)   # read once, then forgotten
        module.__file__ = path
        exec(compile(text, path, "exec"), module.__dict__)


def load(files):
    """From now on the project's modules are those of the texts."""
    finder = Texts(files)
    for name in finder.files:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, finder)
    return list(finder.files)


# -- what a test and a change may use -------------------------------------------------------------

MODULES = {"collections", "copy", "dataclasses", "functools", "itertools", "math", "numpy",
           "pytest", "random", "torch", "types"}   # and the project's own
# What leads to the text of the code, to files or to the process and not to behaviour.
FORBIDDEN = set("""
    __import__ breakpoint compile delattr eval exec exit format format_map getattr globals input
    locals open quit setattr vars ast atexit attrgetter builtins codecs ctypes ctypeslib dis excinfo
    f2py frame fx gc getrepr grad_fn hub importlib importorskip inspect io jit library linecache
    marshal memmap methodcaller multiprocessing next_functions operator ops os package
    pathlib pickle pkgutil platform posix profiler profilers resource runpy shutil signal socket
    source statement subprocess sys tb tempfile threading tokenize traceback utils
    weakref""".split())
METHODS = {"__init__", "__call__", "__len__", "__getitem__", "__iter__", "__next__", "__enter__",
           "__exit__", "__contains__"}
PREFIXES = "_", "co_", "f_", "tb_", "gi_", "cr_", "ag_", "func_"
CHANGED = 5   # lines of a file


def identifiers(tree):
    """(name, line, whether it is looked up in an object or a module) of all that a text names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno, False
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno, True
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno, False
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            words = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            yield from ((part, node.lineno, True) for word in words for part in word.split("."))
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from ((word, node.lineno, False) for word in node.names)


@functools.cache
def named(text):
    return {name for name, _, _ in identifiers(ast.parse(text))}


def complaint(text, modules):
    """Why a test is not run, in one line; None if it may be. modules: the names of the project's.
    Raises nothing: what is no Python is said as well."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"line {getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', error)}"
    for name, line, inside in identifiers(tree):
        hidden = name.startswith(PREFIXES) if inside else name.startswith("__")
        if name in FORBIDDEN or hidden and name not in METHODS:
            return f"line {line}: `{name}` is not allowed: a test looks at what the code does"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                if (name or ".").split(".")[0] not in MODULES | set(modules):
                    return f"line {node.lineno}: {name} cannot be imported in a test"
            if any(a.name == "*" for a in node.names):
                return f"line {node.lineno}: import names, not *"
        if isinstance(node, ast.Match):   # whose patterns look attributes up
            return f"line {node.lineno}: `match` is not allowed"
    if not any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
               for node in tree.body):
        return "there is no function test_..."
    return None


def changes(planted, theirs):
    """How many lines of code differ, comments and layout aside: of each stretch the longer side.

    Worked example: one line in place of another is 1, two in place of one are 2.
    """
    import difflib
    a, b = (ast.unparse(ast.parse(text)).splitlines() for text in (planted, theirs))
    found = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in found if kind != "equal")


def refusal(planted, theirs, project):
    """Why a changed file is not taken; None if it is. A change may name what the project names
    somewhere, and methods of tensors: no new imports, classes or attributes that are set."""
    from collections import Counter

    import torch
    try:
        number, trees = changes(planted, theirs), [ast.parse(text) for text in (planted, theirs)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"line {getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', error)}"
    if number == 0:
        return "nothing is changed"
    if number > CHANGED:
        return f"{number} lines are changed, and {CHANGED} may be"
    known = set().union(*map(named, project))
    known |= {arg.arg for arg in ast.walk(trees[0]) if isinstance(arg, ast.arg)}
    known |= {name for name in (*dir(torch.Tensor), *dir(builtins)) if not name.startswith("_")}
    old, new = ([name for name, _, _ in identifiers(tree)] for tree in trees)
    stored = {n.id for n in ast.walk(trees[1]) if isinstance(n, ast.Name)
              and isinstance(n.ctx, ast.Store)}
    for name in Counter(new) - Counter(old):
        if name in FORBIDDEN or name.startswith("__") or name not in known | stored:
            return f"the change names `{name}`, which is not allowed"
    kinds = [Counter(type(n).__name__ + (" stored" if isinstance(n, ast.Attribute) and not
                                         isinstance(n.ctx, ast.Load) else "")
                     for n in ast.walk(tree)) for tree in trees]
    for kind in ("Import", "ImportFrom", "ClassDef", "Global", "Nonlocal", "Attribute stored"):
        if kinds[1][kind] > kinds[0][kind]:
            return "a change imports nothing, and sets no attribute"
    return None


# -- a test, run ----------------------------------------------------------------------------------


def verdict(text, seed=0):
    """Run the test functions of a text, after load(). -> ("passed" or "failed", why)"""
    import random
    import types

    import pytest
    import torch
    torch.set_num_threads(1)
    random.seed(seed)
    torch.manual_seed(seed)
    few = types.ModuleType("pytest")
    few.approx, few.raises, few.fail, sys.modules["pytest"] = (
        pytest.approx, pytest.raises, pytest.fail, few)
    space = {"__name__": "bug"}
    try:
        exec(compile(text, "bug.py", "exec"), space)
        for name in [name for name in space if name.startswith("test_")]:
            space[name]()
    except (Exception, pytest.fail.Exception, SystemExit) as error:
        words = " ".join(str(error).split())
        return "failed", f"{type(error).__name__}: {words}"[:200]
    return "passed", ""


# -- what a student sees --------------------------------------------------------------------------


def git(*words):
    import subprocess
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def handed_out():
    """{path: text} of the first commit."""
    [first] = git("rev-list", "--max-parents=0", "HEAD").split()
    paths = [path for path in git("ls-tree", "-r", "--name-only", first).split()
             if path.endswith(".py") and not path.startswith("bugs/") and path != "check.py"]
    return {path: git("show", f"{first}:{path}") for path in paths}


def as_they_are(paths):
    return {path: open(path).read() for path in paths if os.path.exists(path)}


def main(words):
    import subprocess
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    before = handed_out()
    if words[:1] in (["before"], ["now"]):   # in a process of its own
        load(before if words[0] == "before" else as_they_are(before))
        outcome, why = verdict(open(f"bugs/bug_{words[1]}.py").read())
        print(why)
        return {"passed": 0, "failed": 1}[outcome]
    if not set(words) <= set("12345"):
        print("error: python check.py N: a number from 1 to 5", file=sys.stderr)
        return 2
    modules, now, good = [path.split("/")[-1][:-3] for path in before], as_they_are(before), True
    for number in words or "12345":
        path = f"bugs/bug_{number}.py"
        wrong = complaint(open(path).read(), [*modules, "harness"]) if os.path.exists(path) else \
            "there is no such file"
        if wrong is None:
            def run(when, number=number):
                return subprocess.run([sys.executable, __file__, when, number],
                                      capture_output=True, text=True)
            if run("before").returncode == 0:
                wrong = "it passes on the files as they were handed out, and has to fail there"
            elif (last := run("now")).returncode != 0:
                wrong = f"it fails on your files: {(last.stdout or last.stderr).strip()}"
        good = good and wrong is None
        print(f"{'--' if wrong else 'ok'}  {path}  {wrong or 'fails before, passes now'}")
    for path in now:
        if now[path] != before[path] and ast.dump(ast.parse(now[path])) != ast.dump(
                ast.parse(before[path])):
            wrong = refusal(before[path], now[path], before.values())
            good = good and wrong is None
            number = changes(before[path], now[path])
            print(f"{'--' if wrong else 'ok'}  {path}  "
                  f"{wrong or f'{number} changed line' + 's' * (number > 1)}")
    print("Whether it is the bug of BUGS.md, and whether it is mended, the grading says.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
