"""The project's modules imported anew, some of them from a changed text, and put back after."""

import contextlib
import importlib.abc
import importlib.util
import io
import sys

from conftest import ROOT

# The project's modules and the tests', by the names under which they are imported.
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts)
           for pattern in ("*.py", "harness/*.py") for path in ROOT.glob(pattern)}
MODULES |= {"harness", *(path.stem for pattern in ("tests/**/*.py", "assignments/hidden/*.py")
                         for path in ROOT.glob(pattern))}


class Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports some of the project's modules from changed texts, {file: text}."""

    def __init__(self, texts):
        self.texts = {file.removesuffix(".py").replace("/", "."): (file, text)
                      for file, text in texts.items()}

    def find_spec(self, name, path=None, target=None):
        if name in self.texts:
            file = ROOT / self.texts[name][0]
            return importlib.util.spec_from_file_location(name, file, loader=self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        text = self.texts[module.__name__][1]
        exec(compile(text, module.__spec__.origin, "exec"), module.__dict__)


@contextlib.contextmanager
def fresh_modules(texts):
    """Within it every module is imported anew, those of the texts as they are there, and nothing is
    printed."""
    modules = {name: sys.modules.pop(name) for name in MODULES & set(sys.modules)}
    mutant, path = Mutant(texts), sys.path[:]
    sys.meta_path.insert(0, mutant)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.meta_path.remove(mutant)
        for name in MODULES & set(sys.modules):
            del sys.modules[name]
        sys.modules.update(modules)
        sys.path[:] = path
