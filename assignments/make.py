"""
A student's copy of the project: the files as they stand, without the bodies that are to be written
and without what would give them away, and with the tests that are the requirements.
"""

import ast
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess

from assignments import check
from harness.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
HERE = pathlib.Path(__file__).resolve().parent
COMMIT = {"GIT_AUTHOR_NAME": "Course", "GIT_AUTHOR_EMAIL": "course@example.org",
          "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_NAME": "Course",
          "GIT_COMMITTER_EMAIL": "course@example.org", "GIT_CONFIG_GLOBAL": os.devnull,
          "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z", "GIT_CONFIG_NOSYSTEM": "1"}


@functools.cache
def read():
    """The project's own files, {path: text}."""
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")])
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def code(assignment):
    """The project's files with the named bodies cut, {path: text}. What gives one away in another
    file says so where it stood."""
    files, messages = dict(read()), {}
    if assignment.files_in:
        files |= {path.name: path.read_text() for path in ROOT.glob(f"{assignment.files_in}/*.py")
                  if not path.name.startswith("test_")}
    for name in assignment.bodies:
        messages.setdefault(name.split(".")[0], {})[name] = f"{name}: {check.MISSING}"
    theirs = " and ".join(assignment.files()) + (" are" if len(assignment.files()) > 1 else " is")
    for name in assignment.also:
        why = f"{name}: left out, as {theirs} {check.MISSING}"
        messages.setdefault(name.split(".")[0], {})[name] = why
    for module, found in messages.items():
        files[f"{module}.py"] = check.cut(files[f"{module}.py"], {
            name.split(".", 1)[1]: message for name, message in found.items()})
    return files


def tests(assignment):
    """The tests that are requirements, and what they import of the tests' own files, {path: text}.
    Other tests of the same files are left out: some are of later assignments."""
    wanted = {}
    for requirement in assignment.requirements:
        path, name = requirement.test.split("::")
        wanted.setdefault(path, set()).add(name)
    files = {f"tests/{path}": without_tests((ROOT / assignment.tests_in / path).read_text(), names)
             for path, names in wanted.items()}
    helpers = {path.stem: path for path in sorted(ROOT.glob("tests/**/*.py"))
               if not path.name.startswith("gallery")}
    due = [("conftest", ()), *(found for text in files.values() for found in imports(text))]
    while due:
        name, wanted = due.pop()
        path = name in helpers and str(helpers[name].relative_to(ROOT))
        if path and path not in files:
            files[path] = helpers[name].read_text()
            if name.startswith("test_"):   # of another file of tests what is imported from it
                files[path] = without_tests(files[path], wanted)
            if name == "conftest":   # without the fixtures for experiments, which are not copied
                files[path] = re.sub(r"pytest_plugins = .*\n\n?", "", files[path])
            due += imports(files[path])
    return files


def imports(text):
    """The modules that a file imports at its head, each with the names that it takes from it."""
    for node in ast.iter_child_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, tuple(alias.name for alias in node.names)


def without_tests(text, keep):
    """A test file with these test functions alone, and of the other functions those that they
    use: a helper of another test may be an answer."""
    lines, tree, keep = text.splitlines(keepends=True), ast.parse(text), set(keep)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for _ in functions:   # at most as many steps from one to the next
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or node.name in keep:
                keep |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                keep |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}   # fixtures
    for node in reversed(functions):
        if node.name not in keep:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            del lines[first - 1:node.end_lineno]
    return re.sub(r"\n{4,}", "\n\n\n", "".join(lines)).rstrip("\n") + "\n"


def told(assignment):
    """What check.py has to know."""
    requirements = [{"number": i, "points": r.points, "body": r.body, "test": r.test,
                     "proves": check.proves(ROOT / assignment.tests_in / r.test.split("::")[0],
                                            r.test.split("::")[1])}
                    for i, r in enumerate(assignment.requirements, 1)]
    cut = code(assignment)
    return {"number": assignment.number, "title": assignment.title,
            "requirements": requirements, "hidden": sum(r.points for r in assignment.hidden),
            "bodies": assignment.files(),
            "outside": {file: check.outside(cut[file], names)
                        for file, names in assignment.files().items()}}


def project(files):
    """The project's README without pictures and without links to what is not copied."""
    return without_links((ROOT / "README.md").read_text(), files)


def without_links(text, files):
    """A document without pictures and without links to what is not among the files."""
    text = re.sub(r"^!\[.*\n\n?", "", text, flags=re.M)
    return re.sub(r"\[([^\]]*)\]\((?!http)([^)]+)\)",
                  lambda link: link[0] if link[2] in files else link[1], text)


def workflow(assignment):
    """For GitHub Classroom: a step for each requirement, and one that adds up their points."""
    steps, names = [], [f"r{i}" for i, _ in enumerate(assignment.requirements, 1)]
    for i, requirement in enumerate(assignment.requirements, 1):
        steps.append(f"""      - id: r{i}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: "{i}. {requirement.body}"
          command: python check.py {i}
          timeout: 10
          max-score: {requirement.points}
""")
    results = "".join(f"          {name.upper()}_RESULTS: "
                      f"\"${{{{steps.{name}.outputs.result}}}}\"\n" for name in names)
    return f"""# The visible requirements, run in the student's own copy, which they can change.
# The points that count are those of python -m assignments grade {assignment.number} FOLDER.
name: Autograding
on: [push, repository_dispatch]
permissions:
  checks: write
  actions: read
  contents: read
jobs:
  check:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
      - run: pip install -r requirements.txt
{"".join(steps)}      - uses: classroom-resources/autograding-grading-reporter@v1
        env:
{results}        with:
          runners: {",".join(names)}
"""


def whole(assignment):
    """The copy of an assignment that is a report: the project with its experiments, nothing cut,
    the template, the rubric, two examples and what checks a report."""
    paths = [*ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/results/*.json")]
    paths += [ROOT / name for name in ("RESULTS.md", "SURVEY.md", "requirements.txt", "LICENSE",
                                       ".gitignore")]
    files = {**read(), **{str(path.relative_to(ROOT)): path.read_text() for path in paths}}
    files |= {f"examples/{path.parent.name}/{path.name}": path.read_text()
              for path in sorted(HERE.glob("reports/*/*"))}
    for name, source in (("report.md", "reports/template.md"), ("RUBRIC.md", "reports/rubric.md"),
                         ("README.md", f"handouts/{assignment.number}.md"),
                         ("check.py", "report.py")):
        files[name] = (HERE / source).read_text()
    files["PROJECT.md"] = project(files)
    for name in ("RESULTS.md", "SURVEY.md"):
        files[name] = without_links(files[name], files)
    return files


def copy_of(assignment):
    """Every file of a student's copy, {path: text}."""
    if assignment.number == 0:
        from assignments import walk   # which needs this file
        return walk.copy_of()
    if not assignment.bodies:
        return whole(assignment)
    files = {**code(assignment), **tests(assignment)}
    for name in ("requirements.txt", "pyproject.toml", "LICENSE", ".gitignore"):
        files[name] = (ROOT / name).read_text()
    files["check.py"] = (HERE / "check.py").read_text()
    files["assignment.json"] = json.dumps(told(assignment), indent=1) + "\n"
    files["README.md"] = (HERE / f"handouts/{assignment.number}.md").read_text()
    files["PROJECT.md"] = project(files)
    files[".github/workflows/classroom.yml"] = workflow(assignment)
    return files


def write(files, folder):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def make(assignment, folder):
    """Write a student's copy into a new folder, with a history of one commit."""
    hand_out(copy_of(assignment), folder, f"Assignment {assignment.number}: {assignment.title}")


def hand_out(files, folder, message):
    """Write files into a new folder and commit them."""
    if shutil.which("git") is None:
        raise InputError("git is not installed: a student's copy has a history of its own")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder} is there already: choose another folder")
    write(files, folder)
    for words in (["init", "-q", "-b", "main", "--template="], ["add", "-A"],
                  ["commit", "-q", "-m", message]):
        subprocess.run(["git", *words], cwd=folder, check=True, env={**os.environ, **COMMIT})
