"""
The documents cannot drift: every file, function and test that README, SURVEY, RESULTS, its tables
and CONTRIBUTING name exists, every command is one that the program takes, every flag is a flag, and
every table of figures is the one that its results file gives.
"""

import ast
import json
import re
import shlex
import statistics

import common
import pytest

import compare
import sample
import tasks
import train
from conftest import ROOT
from harness import flags, report
from model import GPTConfig

MORE = "assets/results/README.md"
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text()
             for path in [*sorted(ROOT.glob("*.md")), ROOT / MORE]}
GUIDE = [line for line in DOCUMENTS["SURVEY.md"].splitlines()
         if re.search(r"\]\(tests/\w+/test_\w+\.py\) `test_", line)]
BLOCKS = [(name, block) for name, text in DOCUMENTS.items()
          for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S)]
COMMANDS = [(name, line.split("   ")[0].replace("pip install -r requirements.txt && ", ""))
            for name, block in BLOCKS for line in block.splitlines()
            if re.match(r"(pip install -r requirements.txt && )?python "
                        r"(train|compare|sample|experiments/\w+)\.py", line)]
BASES = "assets/results/base_seeds.json"
WORLDS = ["clean", "wrong", "letters", "swapped", "rare", "facts"]   # in the README's order
TABLES = [table for name in ("RESULTS.md", MORE) for table in
          re.findall(r"<!-- (assets/\S+\.json) -->\n```\n(.*?)\n```", DOCUMENTS[name], re.S)]


def names(path):
    """Functions, methods and classes defined in a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def parse(words):
    return flags.parse(words, train.ALGORITHMS, GPTConfig)


def test_the_guide_is_there():
    """The survey's sections 2, 3.1, 3.2, 4.1 to 4.4, 6 and 7 each have at least one line."""
    sections = {line.split("|")[1].split(",")[0].strip() for line in GUIDE}
    assert {"2", "3.1", "3.2", "4.1", "4.2", "4.3", "4.4", "6", "7"} <= sections
    assert len(GUIDE) >= 50


@pytest.mark.parametrize("line", GUIDE, ids=[line.split("`")[7] for line in GUIDE])
def test_a_line_of_the_guide(line):
    """The function is defined in the file that is linked, the test in the test file, and its
    docstring says what it proves."""
    file, function, test_file, test = re.findall(r"`([^`]+)`", line)[-4:]
    [path] = re.findall(r"\]\((tests/\w+/test_\w+\.py)\)", line)
    assert f"]({file})" in line and path.endswith(test_file)
    assert function in names(file) and test in names(path)
    tree = ast.parse((ROOT / path).read_text())
    [proof] = [node for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef) and node.name == test]
    assert ast.get_docstring(proof)


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_links_lead_somewhere(name):
    """Every relative link and picture is a file of the repository."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name])
             if not link.startswith("http")]
    folder = (ROOT / name).parent
    assert [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("name, command", COMMANDS)
def test_every_command_is_one(name, command, monkeypatch):
    """What a document tells people to type is accepted by the program."""
    _, script, *words = shlex.split(command)
    if script == "sample.py":
        monkeypatch.setattr(sample.checkpoint, "read", lambda path: {"settings": {}})
        sample.parse(words)
    elif script == "train.py":
        parse(words)
    elif script.startswith("experiments/"):
        assert (ROOT / script).exists()
        common.parse("name", "", words)
    else:
        first_flag = next((i for i, w in enumerate(words) if w.startswith("--")), len(words))
        shared = [w for w in words[first_flag:]]
        for own in ("--seeds", "--seed", "--jobs", "--out_dir"):
            if own in shared:
                at = shared.index(own)
                del shared[at:at + 2]
        assert compare.plan(words[:first_flag] or compare.DEFAULT, shared, 0, 1)


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_flags_exist(name):
    """Every --flag that a document mentions is one of some program."""
    known = {"--seeds", "--jobs", "--quick", "--help", "--nproc_per_node", "--out", "--salt",
             "--student", "--nnodes", "--rdzv_endpoint", "--rdzv_backend"}   # the last of torchrun
    for algo in train.ALGORITHMS:
        parser = flags.make_parser(algo, train.ALGORITHMS, GPTConfig)
        known |= set(parser._option_string_actions)
    known |= {f"--{flag}" for flag in flags.declarations(sample.SampleConfig)}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z_]+", DOCUMENTS[name]))
    assert mentioned <= known, mentioned - known


def test_every_file_is_in_the_reading_order():
    """The README names each of the project's files."""
    files = {path.name for path in ROOT.glob("*.py")}
    assert {f for f in files if f"`{f}`" not in DOCUMENTS["README.md"]} == set()


@pytest.mark.parametrize("path, table", TABLES, ids=[path for path, _ in TABLES])
def test_a_table_is_what_its_results_say(path, table):
    """A comparison's table is exactly what compare.py prints for the results file."""
    assert report.comparison(json.loads((ROOT / path).read_text())) == table


def test_the_table_of_base_models_is_what_its_results_say():
    """A row for each run of base_seeds.json."""
    columns = [("before", "eval/accuracy", ".3f"), ("before", "eval/worked", ".2f"),
               ("before", "eval/accuracy_when_worked", ".2f"),
               ("before", "eval/ood_accuracy", ".3f"), ("after", "eval/accuracy", ".3f"),
               ("after", "eval/worked", ".2f"), ("after", "eval/ood_accuracy", ".3f")]
    runs = json.loads((ROOT / BASES).read_text())
    rows = ["| " + " | ".join([run["pretraining"], str(run["base_seed"]),
                               *(format(run[when][name], form) for when, name, form in columns)])
            + " |" for run in runs]
    assert len(rows) == 10 and "\n".join(rows) in DOCUMENTS["RESULTS.md"]


def test_what_is_said_of_the_base_models():
    """Below their table: the least and the most of a column, of the short ones and of the long
    ones; and the half range of three seeds of GRPO."""
    said = DOCUMENTS["RESULTS.md"].split("\n## Ten base models")[1].split("|\n\n")[-1]
    runs = json.loads((ROOT / BASES).read_text())

    def ends(when, name, form):
        return [format(end(run[when][name] for run in runs if run["pretraining"] == kind), form)
                for kind in ("short", "long") for end in (min, max)]
    ood = [run["after"]["eval/ood_accuracy"]
           for run in json.loads((ROOT / "assets/results/compare.json").read_text())
           if run["variant"] == "grpo"]
    assert [f"0{f}" for f in re.findall(r"(?<![\w.])\.\d{2,3}\b", said)] == [
        *ends("before", "eval/accuracy", ".3f"),
        *ends("before", "eval/accuracy_when_worked", ".2f"), *ends("after", "eval/accuracy", ".3f"),
        *ends("after", "eval/ood_accuracy", ".3f"), f"{(max(ood) - min(ood)) / 2:.3f}"]


def test_the_run_that_the_readme_shows():
    """Its table is that of the first of those base models."""
    first = json.loads((ROOT / BASES).read_text())[0]
    shown = report.table([("before", first["before"]), ("after", first["after"])], tasks.Chain())
    shown = "\n".join(line.rstrip() for line in shown.splitlines())
    assert first["pretraining"] == "short" and f"\n{shown}\n" in DOCUMENTS["README.md"]


def test_the_speed_that_is_told():
    """SCALING.md: medians of the seconds in speed.json, and the medians of their ratios, which are
    those of two figures of one round."""
    told = json.loads((ROOT / "assets/speed.json").read_text())

    def cells(times, name, other):
        ratio = statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
        return [f"{statistics.median(times[name]):.0f} ms", f"{ratio:.2f}"]
    sizes = ["2 x 64", "4 x 128"]
    rows = [["TRL 1.16", *(c for size in sizes
                           for c in cells(told["beside TRL"][size], "TRL", "here"))]]
    rows += [[name, *(c for size in sizes
                      for c in cells(told["in one process"][size], name, "as it is"))]
             for name in told["in one process"][sizes[0]]]
    assert len(rows) == 7 and [len(told["beside TRL"][size]["here"]) for size in sizes] == [5, 5]
    assert [len(told["in one process"][size]["as it is"]) for size in sizes] == [84, 36]
    for row in rows:
        assert "| " + " | ".join(row) + " |" in DOCUMENTS["SCALING.md"]
    here, share = ([statistics.median(numbers[size]) for size in sizes] for numbers in (
        {size: told["beside TRL"][size]["here"] for size in sizes},
        told["share of the matrix rate"]))
    words = " ".join(DOCUMENTS["SCALING.md"].split())
    assert f"(here {here[0]:.0f} ms at 2 layers of width 64, {here[1]:.0f} ms at 4 of 128" in words
    assert (f"would take .{100 * share[0]:.0f} of a step at 2 x 64 and .{100 * share[1]:.0f} at "
            "4 x 128") in words


def test_every_results_file_has_its_table():
    """And no table is without its file."""
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("assets/results/*.json")}
    assert files == {path for path, _ in TABLES} | {BASES} and len(TABLES) == len(files) - 1


# What is said besides the tables: chance at 16 tries.
def other_figures():
    return {f"{task.chance(16):.3f}" for task in (tasks.Chain(), tasks.Countdown())}


def test_figures_in_sentences_are_those_of_the_tables():
    """A figure like .986 that a sentence beside a table names stands in a table of its section, or
    in the comparison of all algorithms, to which others refer."""
    sections = [part for name in ("RESULTS.md", MORE)
                for part in re.split(r"^## ", DOCUMENTS[name], flags=re.M)
                if "```\n " in part or "| base seed |" in part]
    [all_of_them] = [section for section in sections if section.startswith("All of them")]
    seen = 0
    for section in sections:
        shown = re.findall(r"^```\n.*?^```|^\|.*?$", all_of_them + section, re.M | re.S)
        known = set(re.findall(r"\d\.\d{3}\b", "\n".join(shown))) | other_figures()
        prose = re.sub(r"^```\n.*?^```|^\|.*?$", "", section, flags=re.M | re.S)
        figures = re.findall(r"(?<![\w.])\.\d{3}\b", prose)
        assert [f for f in figures if f"0{f}" not in known] == [], section.splitlines()[0]
        seen += len(figures)
    assert seen > 40


def mean(runs, name):
    """`.718`, or "" where the runs have no such figure."""
    values = [run["after"].get(name) for run in runs]
    return "" if None in values else f"{sum(values) / len(values):.3f}".lstrip("0")


def test_the_worlds_of_the_readme_are_those_of_the_results():
    """Each row of its table: held-out accuracy and, where there is one, that out of distribution,
    of the first four arms of the world's results file."""
    table = DOCUMENTS["README.md"].split("| world | flags |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == len(WORLDS)
    for name, row in zip(WORLDS, rows):
        arms = {}
        for run in json.loads((ROOT / f"assets/results/{name}.json").read_text()):
            arms.setdefault(run["variant"], []).append(run)
        four = list(arms.values())[:4]
        assert [runs[0]["algo"] for runs in four] == ["sft", "dft", "grpo", "sft>grpo"]
        cells = [" / ".join(filter(None, (mean(runs, "eval/accuracy"),
                                          mean(runs, "eval/ood_accuracy")))) for runs in four]
        assert [cell.strip() for cell in row.strip("| ").split("|")[2:]] == cells


# -- the experiments ------------------------------------------------------------------------------

EXPERIMENTS = {path.stem: json.loads(path.read_text())
               for path in sorted(ROOT.glob("experiments/results/*.json"))}
CLAIMS = DOCUMENTS["RESULTS.md"].split("## Claims and verdicts")[1].split("\n## ")[0]


def effects_of(found):
    """{name: effect} of a results file."""
    return found["effects"] if "effects" in found else found["worlds"]["bandit"]["gaps"]


def claims():
    """{experiment: the cells of its row in RESULTS.md}"""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in CLAIMS.splitlines()
            if "`python experiments/" in line and line[0] == "|"]
    return {re.search(r"experiments/(\w+)\.py", row[-1])[1]: row for row in rows}


def test_there_is_a_row_for_every_experiment():
    """Claim, source, what we saw, verdict and command; every script has its results."""
    assert set(claims()) == set(EXPERIMENTS) and len(claims()) >= 3
    scripts = {path.stem for path in ROOT.glob("experiments/*.py")} - {"common"}
    assert set(EXPERIMENTS) == scripts
    for name, row in claims().items():
        assert len(row) == 5 and row[4] == f"`python experiments/{name}.py`"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_row_says_what_the_experiment_found(name):
    """The verdict word for word; each effect with its mean and interval; no other figure."""
    row = claims()[name]
    assert row[3] == EXPERIMENTS[name]["verdict"]
    named = row[2].split("; ")
    effects = {f"{what}: {common.shown(effect)}"
               for what, effect in effects_of(EXPERIMENTS[name]).items()}
    assert named and set(named) <= effects


def test_the_advice_says_what_the_experiments_found():
    """When to use what: each row's effects are those of its script."""
    section = DOCUMENTS["RESULTS.md"].split("## When to use what")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in section.splitlines() if line.endswith(".py` |")]
    for *_, seen, script in rows:
        effects = effects_of(EXPERIMENTS[script.strip("`").removesuffix(".py")])
        assert set(seen.split("; ")) <= {f"{what}: {common.shown(effect)}"
                                         for what, effect in effects.items()}
    assert len(rows) >= 6


def figures_in(found):
    """All that a sentence on an experiment may quote: effects and their intervals, means over
    seeds, halves of ranges."""
    numbers = [effect[end] for effect in effects_of(found).values()
               for end in ("mean", "low", "high")]
    arms = [arm["figures"] for arm in found.get("arms", {}).values()]
    arms += [found.get("base", {}), *found.get("extra", {}).values()]
    for values in (values for figures in arms for values in figures.values()):
        numbers += [sum(values) / len(values), (max(values) - min(values)) / 2]
    return {f"{abs(number):.3f}" for number in numbers}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_said_of_an_experiment(name):
    """Under the heading of its script: every figure like .718 is one of its results file."""
    [said] = re.findall(rf"^### `{name}\.py`(.*?)(?=^### |\Z)", CLAIMS, re.M | re.S)
    quoted = re.findall(r"(?<![\w.])\d*\.\d{3}\b", said)
    known = figures_in(EXPERIMENTS[name])
    assert quoted and [f for f in quoted if f"{float(f):.3f}" not in known] == []


def test_the_first_picture_of_the_readme():
    """What is said of it: the accuracy of RL, of demonstrations, and of both in either order."""
    said = DOCUMENTS["README.md"].split("rare.png)")[1].split("\n## ")[0]
    arms = EXPERIMENTS["rare"]["arms"]
    accuracies = {arm: arms[arm]["figures"]["accuracy"] for arm in arms}
    means = {arm: f"{sum(values) / len(values):.3f}" for arm, values in accuracies.items()}
    assert [f"0{f}" for f in re.findall(r"\.\d{3}\b", said)] == [
        means[arm] for arm in ("GRPO", "SFT", "SFT>GRPO", "GRPO>SFT")]


def test_sizes():
    """The README stays short enough to be read: about 9 kB besides the output that it shows."""
    without_output = re.sub(r"^```\n.*?^```", "", DOCUMENTS["README.md"], flags=re.M | re.S)
    assert len(without_output) < 9000
