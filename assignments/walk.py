"""
Assignment 0, a first walk: the whole project, nothing cut, and eight questions whose answers stand
on the screen. An answer is compared with what the student's own files say, so that nothing has to
be trained again and no machine's rounding matters.
"""

import json
import pathlib
import re

from assignments import answers, grade, judge, make
from tasks import Chain

POINTS = 10   # for each answer; as much for a run, and for a batch, of one's own seed
ALGORITHMS = answers.ALGORITHMS.split(", ")


# -- a student's copy -----------------------------------------------------------------------------


def copy_of():
    """Every file of a student's copy, {path: text}."""
    files = dict(make.read())
    for name in ("requirements.txt", "pyproject.toml", "LICENSE", ".gitignore"):
        files[name] = (make.ROOT / name).read_text()
    files["answers.txt"] = answers.form()
    files["check.py"] = (make.HERE / "answers.py").read_text()
    files["README.md"] = (make.HERE / "handouts/0.md").read_text()
    files["PROJECT.md"] = make.project(files)
    return files


# -- what the files say ---------------------------------------------------------------------------


def metrics(text):
    """The lines of metrics.jsonl: before training, and the logged ones."""
    lines = [json.loads(line) for line in text.splitlines()]
    return lines[0], lines[1:]


def batch(text):
    """--inspect all -> the prompt, and of the chosen and of the rejected answer its rows: the
    probability and {algorithm: weight, in thousandths}."""
    found, prompts = {}, []
    for part in re.split(r"\n\s*\n", text.replace("\r", "")):
        lines = part.strip().splitlines()
        head = re.fullmatch(r"(\S+)  (chosen|rejected)", lines[0]) if lines else None
        if head:
            names = lines[1].split()[2:]
            rows = [line.split()[-len(names) - 1:] for line in lines[2:]]
            found[head[2]] = [(float(p), dict(zip(names, map(float, weights))))
                              for p, *weights in rows]
            prompts.append(head[1])
    return prompts[0], found["chosen"], found["rejected"]


def problem(seed):
    """The problem of question 8: seed 37 has 3+7*3=."""
    return f"{seed // 10}+{seed % 10}*3="


def mean(values):
    return sum(values) / len(values)


def expected(number, files, seed):
    """What the files say to a question, and how far an answer may be from it."""
    if number <= 3:
        before, logged = metrics(files["run/metrics.jsonl"])
    if 5 <= number <= 7:
        _, chosen, rejected = batch(files["inspect.txt"])
        p, weights = min(chosen, key=lambda row: row[0])
    if number == 1:
        return [before["eval/accuracy"], logged[-1]["eval/accuracy"]], 0.0011
    if number == 2:   # as the table shows it, with two digits
        return [next(line["step"] for line in logged if line["eval/worked"] >= 0.895)], 0
    if number == 3:
        config = json.loads(files["run/config.json"])
        return [config["batch_size"] * (1 - logged[-1]["frac_reward_zero_std"])], 0.3
    if number == 4:
        runs = json.loads(files["compare/compare.json"])
        return [mean([run["after"]["eval/ood_accuracy"] for run in runs if run["variant"] == name])
                for name in ("sft", "dft")], 0.0011
    if number == 5:   # its weight is (1 - p) / N
        N = 1000 * (1 - p) / weights["sft"]
        return [N], 0.04 * N
    if number == 6:
        return [weights["dft"] / weights["sft"]], 0.03
    if number == 7:
        return [" ".join(name for name in ALGORITHMS if rows[0][1][name] < 0) or "none"
                for rows in (chosen, rejected)], None
    return [Chain.solve(problem(seed))["answer"]], None


def agrees(number, said, files, seed):
    """-> whether an answer is what the files say, and what they say"""
    values, tolerance = expected(number, files, seed)
    if number == 7:
        right = all(set(a.split()) == set(b.split()) for a, b in zip(said, values))
        return right, "; ".join(values)
    if number == 8:
        return Chain.final_answer(said[0]) == values[0], f"an answer that ends with {values[0]}"
    right = all(abs(float(a) - b) <= tolerance for a, b in zip(said, values))
    return right, " ".join(f"{value:.3f}".removesuffix(".000") for value in values)


def own(file, files, seed):
    """Whether a file is of this seed: a run of the main job to its end, or a batch whose problem is
    one of the first eight."""
    if file == "run":
        config = json.loads(files["run/config.json"])
        _, logged = metrics(files["run/metrics.jsonl"])
        return (config["algo"], config["seed"]) == ("grpo", seed) and \
            logged[-1]["step"] == config["max_steps"] == 60
    prompts = [e["prompt"] for e in Chain().problems("train", 4000, seed)[:8]]
    return batch(files["inspect.txt"])[0] in prompts


# -- grading --------------------------------------------------------------------------------------


def results(folder):
    """One folder, as Gradescope reads it, and the seed that it says it is of."""
    files, tests = {}, []

    def test(name, points, check):
        """check() -> whether it is right, and what is so"""
        try:
            right, why = check()
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError,
                ZeroDivisionError, OverflowError, RecursionError, StopIteration):
            right, why = False, "the files do not say so: is one missing, or changed by hand?"
        tests.append({"name": name, "max_score": points, "score": points if right else 0,
                      "output": "" if right else why, "visibility": "after_published"})
    for file in ("answers.txt", *answers.FILES):
        try:
            files[file] = judge.read(folder, file)
        except (OSError, ValueError):   # no such file, or none that can be read as text
            pass
    said = answers.read(files.get("answers.txt", ""))
    seed = said["seed"]
    for number, (asked, what, _) in answers.QUESTIONS.items():
        def check(number=number, what=what):
            if said[number] is None or seed is None:
                return False, f"no answer, or not of the form: {what}"
            right, truth = agrees(number, said[number], files, seed)
            return right, f"said {' '.join(said[number])}, the files say {truth}"
        test(f"{number}: {asked}", POINTS, check)
    for file in ("run", "inspect"):
        test(f"{file}: it is that of seed {seed}", POINTS,
             lambda file=file: (own(file, files, seed), f"it is not that of seed {seed}"))
    return {"score": sum(test["score"] for test in tests), "tests": tests}, seed


def grade_all(folders, out):
    """Grade folders, print a table and say which seeds are there more than once. -> {name:
    results}"""
    names, seeds = grade.names_of(folders), {}
    found = {}
    for name, folder in zip(names, folders):
        found[name], seed = results(pathlib.Path(folder))
        seeds.setdefault(seed, []).append(name)
    grade.show(found, out)
    for seed, those in seeds.items():
        if len(those) > 1 and seed is not None:
            print(f"Seed {seed} is that of {', '.join(those)}")
    return found
