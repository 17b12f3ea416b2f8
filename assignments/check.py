"""
Which requirements of this assignment hold?

    python check.py        every requirement: its points, what its test proves, and why it fails
    python check.py 3      the third alone

The exit code is 0 if all of them hold. For the whole story of a failure run its test by itself:
python -m pytest tests/... (the file and the name stand in assignment.json).
"""

import ast
import hashlib
import json
import os
import pathlib
import re
import sys
import textwrap
import tokenize

os.environ["OMP_NUM_THREADS"] = "1"   # before torch: the models are tiny
MISSING = "yours to write"

# -- bodies and what is around them ---------------------------------------------------------------


def find(tree, name):
    """A function in a syntax tree (or in a text) by its dotted name, `token_losses` or
    `SFT.logprobs`: the last of that name, as in Python. None if it is not there."""
    node = ast.parse(tree) if isinstance(tree, str) else tree
    for part in name.split("."):
        found = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                 and n.name == part]
        if not found:
            return None
        node = found[-1]
    return node if isinstance(node, ast.FunctionDef) else None


def body_of(node):
    """A function's statements without its docstring."""
    return node.body[ast.get_docstring(node) is not None:]


def body_lines(text, node):
    """First and last line (from 1) of what follows the signature and the docstring, comments
    included."""
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno + 1
    else:   # after the colon that ends the signature
        lines, depth, first = iter(text.splitlines(keepends=True)[node.lineno - 1:]), 0, None
        for token in tokenize.generate_tokens(lambda: next(lines, "")):
            depth += (token.string in "([{") - (token.string in ")]}") if token.string else 0
            if token.string == ":" and depth == 0:
                first = node.lineno + token.end[0]
                break
    return first, node.body[-1].end_lineno


def cut(text, messages):
    """The text with bodies replaced by an exception: {dotted name: message}. Signatures,
    docstrings, comments outside and all other lines stay byte for byte. Raises ValueError for a
    name that is not there."""
    lines, tree, spans = text.splitlines(keepends=True), ast.parse(text), []
    for name, message in messages.items():
        node = find(tree, name)
        if node is None:
            raise ValueError(f"there is no function {name}")
        indent = " " * (node.col_offset + 4)
        raised = f'{indent}raise NotImplementedError("{message}")\n'
        if len(raised) > 101:
            half = message.index(" ", 40) + 1
            raised = (f'{indent}raise NotImplementedError(\n{indent}    "{message[:half]}"\n'
                      f'{indent}    "{message[half:]}")\n')
        spans.append((*body_lines(text, node), raised))
    for first, last, raised in sorted(spans, reverse=True):
        lines[first - 1:last] = [raised]
    return "".join(lines)


def outside(text, names):
    """A number for all that stands outside the named bodies, layout and comments aside."""
    tree = ast.parse(cut(text, {name: MISSING for name in names}))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


# -- why a test fails -----------------------------------------------------------------------------


def shown(value):
    """Numbers with four digits, whatever they are in."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, float):
        return "0" if abs(value) < 1e-12 else f"{value:.4g}"   # rounding errors tell nothing
    return str(value)


def difference(found, expected):
    """`found .25, expected .5`: whole if they are small, else where they first differ."""
    import torch
    try:
        found, expected = torch.broadcast_tensors(
            *(torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected)))
    except (RuntimeError, TypeError, ValueError):
        shapes = [tuple(getattr(x, "shape", ())) for x in (found, expected)]
        return f"found shape {shapes[0]}, expected {shapes[1]}"
    if found.numel() <= 8:
        return f"found {shown(found.tolist())}, expected {shown(expected.tolist())}"
    for digits in (3, 6, 99):   # where they are furthest apart
        off = ~torch.isclose(found, expected, rtol=10.0 ** -digits, atol=0.1 * 10.0 ** -digits)
        if off.any():
            break
    at = off.nonzero()[0].tolist()
    return (f"at {at} found {shown(found[tuple(at)].item())}, expected "
            f"{shown(expected[tuple(at)].item())}; {int(off.sum())} of {off.numel()} are off")


def example(item):
    """`, with ratio=1.5, advantage=-1`: the parameters of a test that has some."""
    if not hasattr(item, "callspec"):
        return ""
    words = ", ".join(f"{name}={shown(value) if isinstance(value, (float, list)) else repr(value)}"
                      for name, value in item.callspec.params.items())
    return f", with {words}" if len(words) < 130 else f", with {item.callspec.id}"


def reason(excinfo, item, misses):
    """One line on why a test failed."""
    error, mine = excinfo.value, [e for e in excinfo.traceback
                                  if "site-packages" not in str(e.path)
                                  and pathlib.Path(e.path) != pathlib.Path(__file__)]
    entry = (mine or excinfo.traceback)[-1]
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, NotImplementedError):
        return line
    if not isinstance(error, AssertionError):
        at = f" ({mine[-1].path.name}, line {mine[-1].lineno + 1})" if mine else ""
        return f"{type(error).__name__}: {line}"[:200] + at + example(item)
    statement = str(entry.statement)
    lines = range(entry.lineno + 1, entry.lineno + 1 + max(1, len(statement.splitlines())))
    for file, at, found, expected in reversed(misses):
        if file == str(entry.path) and at in lines and "not close" not in statement:
            return difference(found, expected) + example(item)
    claim = re.sub(r" ± [^,)]+", "", line.removeprefix("assert "))
    claim = re.sub(r"approx\((.*)\)$", r"\1", claim)
    if not re.search(" [=!<>]=? | in ", claim) or len(claim) > 160:   # it says less than the code
        claim = " ".join(statement.split()).removeprefix("assert ")
    claim = claim[claim.startswith("(") and claim.count("(") > claim.count(")"):]
    return f"does not hold: {claim}"[:200] + example(item)


class Watch:
    """A pytest plugin that keeps, for each `file::test`, how often it ran and why it failed."""

    def __init__(self):
        self.ran, self.why, self.misses, self.watched = {}, {}, [], []

    def watch(self, module, name):
        """Remember what a comparison of the tests' helpers was given where it says no."""
        compare = getattr(module, name)
        self.watched.append((module, name, compare))

        def watched(found, expected, *more, **settings):
            try:
                answer = compare(found, expected, *more, **settings)
                same = answer is None or answer   # torch.testing's return nothing
            except AssertionError:
                same = False
                raise
            finally:
                if not same:
                    frame = sys._getframe(1)
                    self.misses.append((frame.f_code.co_filename, frame.f_lineno, found, expected))
            return answer
        setattr(module, name, watched)

    def pytest_runtest_makereport(self, item, call):
        key = f"{item.path.name}::{item.originalname}"
        if call.excinfo is not None:
            try:
                why = reason(call.excinfo, item, self.misses)
            except Exception as error:   # of what was returned: the test has failed all the same
                why = f"what was found cannot be shown ({type(error).__name__})"
            self.why.setdefault(key, why)
        if call.when == "call":
            self.ran[key] = self.ran.get(key, 0) + 1
            self.misses.clear()

    def pytest_collectreport(self, report):
        if report.failed:
            line = str(report.longrepr).strip().splitlines()[-1].removeprefix("E ").strip()
            self.why.setdefault(pathlib.Path(report.nodeid).name, line[:200])


def run(paths):
    """Run tests, given as paths with ::names, in this process. -> {file::test: None if it holds,
    else why not}"""
    import importlib

    import pytest
    watch = Watch()
    for module, name in (("world", "close"), ("tiny", "same"), ("torch.testing", "assert_close")):
        if importlib.util.find_spec(module):
            watch.watch(importlib.import_module(module), name)
    keep = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = open(os.devnull, "w")
    options = ["-vv", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--capture=no"]
    groups = {}
    for path in map(str, paths):
        groups.setdefault(path.split("::")[0], []).append(path)
    try:
        if pytest.main([*options, *map(str, paths)], [watch]) == pytest.ExitCode.USAGE_ERROR:
            for group in groups.values():   # a file that cannot be imported stops its own tests
                pytest.main([*options, *group], [watch])
    finally:
        sys.stdout, sys.stderr = keep
        for module, name, compare in watch.watched:
            setattr(module, name, compare)
    found = {}
    for path in paths:
        key = str(path).rsplit("/", 1)[-1]
        found[key] = watch.why.get(key, watch.why.get(key.split("::")[0]))
        if found[key] is None and key not in watch.ran:
            found[key] = "the test did not run"
    return found


# -- what a student sees --------------------------------------------------------------------------


def first_sentence(docstring):
    """Without the papers that it cites in brackets."""
    words = re.sub(r"\s*\([^()]*\b\d{4}\.\d{4,5}\b[^()]*\)", "", " ".join(docstring.split()))
    return re.split(r"(?<=\.)(?<!eq\.)\s+", words)[0]


def proves(path, test):
    """What a test's docstring says first."""
    node = find(pathlib.Path(path).read_text(), test)
    return first_sentence(ast.get_docstring(node))


def table(requirements, why):
    """A line for each requirement (its number, points, body, what it proves), and below it why it
    fails."""
    lines = []
    for requirement in requirements:
        reason = why[requirement["test"].rsplit("/", 1)[-1]]
        points = f"{0 if reason else requirement['points']}/{requirement['points']}"
        head = (f"{'--' if reason else 'ok'} {requirement['number']:>2} {points:>6}  "
                f"{requirement['body']:<18}")
        lines += textwrap.wrap(requirement["proves"], 99, initial_indent=head,
                               subsequent_indent=" " * len(head), break_on_hyphens=False)
        if reason:
            lines += textwrap.wrap(reason, 99, initial_indent=" " * 14 + "> ",
                                   subsequent_indent=" " * 16, break_on_hyphens=False)
    return lines


def main(words):
    folder = pathlib.Path(__file__).resolve().parent
    told = json.loads((folder / "assignment.json").read_text())
    requirements = told["requirements"]
    if words:
        if not words[0].isdigit() or not 1 <= int(words[0]) <= len(requirements):
            print(f"error: python check.py N: a number from 1 to {len(requirements)}",
                  file=sys.stderr)
            return 2
        requirements = requirements[int(words[0]) - 1:][:1]
    changed = []
    for file, names in told["bodies"].items():
        try:
            if outside((folder / file).read_text(), names) != told["outside"][file]:
                changed.append(file)
        except (OSError, SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            print(f"error: {file}{line}: {getattr(error, 'msg', error)}", file=sys.stderr)
            return 2
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    why = run([folder / "tests" / r["test"] for r in requirements])
    print(f"Assignment {told['number']}: {told['title']}\n")
    print("\n".join(table(requirements, why)))
    held = [r for r in requirements if why[r["test"].rsplit("/", 1)[-1]] is None]
    print(f"\n{sum(r['points'] for r in held)} of {sum(r['points'] for r in requirements)} points; "
          f"{len(held)} of {len(requirements)} requirements hold.")
    if not words:
        print(f"{told['hidden']} more points are given for tests that you do not see.")
    for file in changed:
        print(f"Note: {file} is changed outside the bodies that are yours to write; what stands "
              "there is not graded.")
    return 0 if len(held) == len(requirements) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
