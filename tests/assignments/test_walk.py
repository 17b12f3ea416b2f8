"""Assignment 0: what the form takes, what the files say, and what each kind of answer earns."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import compare
import train
from assignments import answers, make, walk
from assignments.__main__ import main
from conftest import ROOT
from harness import flags, tokens
from harness.errors import InputError
from model import GPTConfig
from tasks import Chain
from tiny import PROBLEMS, coin
from tiny import make as make_algorithm

# Of a batch: right answers of 500 tokens, so that SFT's weight is (1 - .4) / 500 = 1.2 thousandths.
BATCH = """Base model: out/chain-pretrain-0 (made earlier in 208 s)
weight of each token's gradient

{prompt}  chosen
token       prob       sft       dft       dpo       ppo      grpo
+          0.900    +0.200    +0.180    +0.582    -0.049    +0.165
7          0.400    +1.200    +0.480    +4.270    +0.000    +1.209
<end>      1.000    +0.000    +0.000    +0.000    -0.000    +0.000

{prompt}  rejected
token       prob       sft       dft       dpo       ppo      grpo
5          0.074    +0.000    -0.000    -6.612    -2.222    -0.851
<end>      0.999    +0.000    +0.000    +0.010    +0.003    +0.001
"""
RIGHT = {1: "0.480 0.988", 2: "10", 3: "5.4", 4: "0.860, 0.875", 5: "500", 6: "0.4",
         7: "ppo; grpo dpo ppo", 8: "3+7=0;0*3=0"}


def metrics(step, accuracy, worked, flat):
    return {"step": step, "eval/accuracy": accuracy, "eval/worked": worked,
            "frac_reward_zero_std": flat}


def hand_in(folder, answered=RIGHT, seed="37", **changes):
    """A student's folder. changes: {file, dots and slashes as _: its text}"""
    run = [metrics(0, 0.4797, 0.31, None), metrics(5, 0.69, 0.894, 0.03),
           metrics(10, 0.88, 0.896, 0.16), metrics(60, 0.98787, 1.0, 0.83125)]
    del run[0]["frac_reward_zero_std"]
    runs = [{"variant": name, "after": {"eval/ood_accuracy": value}} for name, value in
            (("sft", 0.85), ("sft", 0.87), ("dft", 0.87), ("dft", 0.88))]
    config = {"algo": "grpo", "seed": 37, "batch_size": 32, "max_steps": 60}
    prompt = Chain().problems("train", 4000, 37)[3]["prompt"]
    files = {"answers.txt": f"seed: {seed}\n" + "".join(f"# a remark: {n}\n{n}: {text}\n"
                                                      for n, text in answered.items()),
             "run/config.json": json.dumps(config), "inspect.txt": BATCH.format(prompt=prompt),
             "run/metrics.jsonl": "".join(json.dumps(line) + "\n" for line in run),
             "compare/compare.json": json.dumps(runs)}
    for path in files:
        files[path] = changes.get(re.sub(r"[./]", "_", path), files[path])
    make.write(files, folder)
    return folder


def points(folder):
    """{what: points} of a folder"""
    found, _ = walk.results(folder)
    assert sum(t["max_score"] for t in found["tests"]) == 100
    return {t["name"].split(":")[0]: t["score"] for t in found["tests"]}


EVERYTHING = {**{str(n): 10 for n in RIGHT}, "run": 10, "inspect": 10}


def test_right_answers_earn_everything(tmp_path):
    """100 points for what stands in the files, with the digits that the screen shows."""
    assert points(hand_in(tmp_path)) == EVERYTHING


@pytest.mark.parametrize("number, said", [
    (1, "0.871 1.000"), (1, "0.988 0.480"), (2, "5"), (2, "60"), (3, "0.83"), (3, "26.6"),
    (4, "0.875 0.860"), (4, "0.925 0.938"), (5, "0.5"), (5, "540"), (5, "3"), (6, "0.9"),
    (6, "2.5"), (7, "none; dpo ppo grpo"), (7, "ppo; sft dft dpo ppo grpo"), (7, "ppo; dpo"),
    (7, "dpo ppo grpo; ppo"), (8, "3+7*3=4"), (8, "4"), (3, "nan"), (3, "1e999"), (2, "10 steps"),
    (8, ""), (7, "all; all"), (1, "0.480")])
def test_a_wrong_answer_costs_its_own_points(tmp_path, number, said):
    """And no other's; so does one that has not the form."""
    assert points(hand_in(tmp_path, {**RIGHT, number: said})) == {**EVERYTHING, str(number): 0}


@pytest.mark.parametrize("number, said", [
    (1, ".480  .988"), (1, "0.48 0.987"), (3, "5.44"), (3, "5.3"), (5, "512"), (5, "500.0"),
    (6, ".41"), (7, "ppo ;dpo grpo ppo ppo"), (7, "ppo;dpo ppo grpo"), (8, "0"), (8, "3+7*3=0")])
def test_answers_may_be_written_in_several_ways(tmp_path, number, said):
    """With other blanks, fewer digits, or in another order where order means nothing."""
    assert points(hand_in(tmp_path, {**RIGHT, number: said})) == EVERYTHING


def test_files_of_another_seed_are_seen(tmp_path):
    """The run and the batch of another student earn nothing, nor does their own problem."""
    found = points(hand_in(tmp_path, seed="5"))
    assert found == {**EVERYTHING, "run": 0, "inspect": 0, "8": 0}
    assert points(hand_in(tmp_path, seed="x"))["1"] == 0


def test_a_run_must_be_the_main_job(tmp_path):
    """Of GRPO, and to its end."""
    for change in ({"algo": "sft"}, {"max_steps": 20}, {"seed": 3}):
        config = {"algo": "grpo", "seed": 37, "batch_size": 32, "max_steps": 60, **change}
        folder = hand_in(tmp_path, run_config_json=json.dumps(config))
        assert points(folder) == {**EVERYTHING, "run": 0}
    short = "".join(json.dumps(metrics(*m)) + "\n" for m in ((0, 0.48, 0, 0), (5, 0.988, 1, 0.8)))
    assert points(hand_in(tmp_path, run_metrics_jsonl=short))["run"] == 0


@pytest.mark.parametrize("text", [
    "", "{", "[]\n[]", "null", "[1, 2]\n" * 3, '{"step": "x"}\n' * 3, "[" * 100_000, "\0", "1e999",
    '{"algo": "grpo", "seed": 37}', "2-3=  chosen\n", "2-3=  chosen\na b\n\n2-3=  rejected\na b\n",
    '{"eval/accuracy": [], "eval/worked": {}, "frac_reward_zero_std": null}\n' * 2])
def test_files_that_say_nothing_cost_their_points_and_stop_nobody(tmp_path, text):
    """Whatever stands in a file: the questions that need it have no points, the others theirs."""
    for file, lost in (("run_config_json", {"3", "run"}),
                       ("inspect_txt", {"5", "6", "7", "inspect"}),
                       ("run_metrics_jsonl", {"1", "2", "3", "run"}),
                       ("compare_compare_json", {"4"})):
        found = points(hand_in(tmp_path, **{file: text}))
        assert {name for name in found if not found[name]} == lost, file
    assert set(points(hand_in(tmp_path, answers_txt=text)).values()) == {0}


def test_no_link_is_followed(tmp_path):
    """Files are the folder's own."""
    other, folder = hand_in(tmp_path / "other"), hand_in(tmp_path / "eve")
    (folder / "inspect.txt").unlink()
    (folder / "inspect.txt").symlink_to(other / "inspect.txt")
    shutil.rmtree(folder / "run")
    (folder / "run").symlink_to(other / "run")
    found = points(folder)
    assert {name for name in found if found[name]} == {"4", "8"}


def test_a_table_and_a_file_for_each(tmp_path, capsys):
    """Through the command line; seeds that are there twice are named."""
    folders = [hand_in(tmp_path / name) for name in ("anna", "ben")]
    hand_in(tmp_path / "ben", {**RIGHT, 5: "5"})
    assert main(["grade", "0", *map(str, folders), "--out", str(tmp_path / "grades")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["folder", "points", *EVERYTHING]
    assert lines[1].split()[:2] == ["anna", "100"] and lines[2].split()[:2] == ["ben", "90"]
    assert lines[-1] == "Seed 37 is that of anna, ben"
    written = json.loads((tmp_path / "grades/ben/results.json").read_text())
    assert written["score"] == 90
    assert [t["output"] for t in written["tests"] if not t["score"]] == [
        "said 5, the files say 500"]
    with pytest.raises(InputError, match="is no folder"):
        main(["grade", "0", "nowhere"])


# -- what the project writes is what is read ------------------------------------------------------


def test_a_batch_is_read_as_it_is_shown():
    """The text of --inspect all, of a tiny model: prompts, probabilities, and SFT's weights, from
    which the number of tokens follows."""
    algos = {name: make_algorithm(train.ALGORITHMS[name], coin if name in ("dpo", "ppo", "grpo")
                                  else None, ref_seed=None) for name in tokens.SIDE_BY_SIDE}
    generator = torch.Generator().manual_seed(0)
    text = tokens.table(tokens.side_by_side(algos, PROBLEMS, generator))
    prompt, chosen, rejected = walk.batch(text)
    assert prompt in [e["prompt"] for e in PROBLEMS]
    assert list(chosen[0][1]) == walk.ALGORITHMS == list(tokens.SIDE_BY_SIDE)
    assert len(chosen) + len(rejected) == len(re.findall(r" [+-]\d+\.\d{3}\n", text + "\n"))
    counts = [1000 * (1 - p) / row["sft"] for p, row in chosen if row["sft"] > 1]
    assert counts and max(counts) < 1.01 * min(counts)
    assert all(row["sft"] == row["dft"] == 0 for _, row in rejected)


# -- a student's copy and the texts ---------------------------------------------------------------


def handout():
    return (ROOT / "assignments/handouts/0.md").read_text()


def test_the_copy_is_the_whole_project(tmp_path):
    """Every file of code as it is, the form, and a check that runs without anything else: first it
    names what is missing, and then nothing."""
    assert main(["make", "0", "--out", str(tmp_path / "copy")]) == 0
    folder = tmp_path / "copy"
    assert all((folder / path).read_text() == text for path, text in make.read().items())
    assert (folder / "README.md").read_text() == handout()
    assert not list(folder.glob("**/instructor*")) and not (folder / "assignments").exists()

    def check():
        done = subprocess.run([sys.executable, "check.py"], cwd=folder, capture_output=True,
                              text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr
    code, lines, errors = check()
    assert code == 1 and errors == "" and max(map(len, lines)) <= 100
    assert sum(line.startswith("--") for line in lines) == 1 + 8 + len(answers.FILES)
    hand_in(folder)
    code, lines, errors = check()
    assert code == 0 and lines[-1] == "Everything has its form."
    assert lines[3] == "ok 1     0.480 0.988" and points(folder) == EVERYTHING
    text = answers.form()
    for number, said in RIGHT.items():
        text = text.replace(f"\n{number}: \n", f"\n{number}: {said}\n")
    (folder / "answers.txt").write_text(text.replace("seed: \n", "seed: 37\n"))
    assert check()[0] == 0 and points(folder) == EVERYTHING
    (folder / "answers.txt").unlink()
    assert check()[::2] == (2, "error: answers.txt cannot be read\n")


def test_the_commands_of_the_handout_are_taken():
    """And they are the main job, with 60 steps of 32 problems, the batch that is read, and the
    comparison."""
    commands = [shlex.split(c.split(" > ")[0].replace(" S", " 7").replace('"P"', "3+7*3="))[1:]
                for c in re.findall(r"`(python (?:train|compare|sample)\.py [^`]*)`", handout())]
    assert [words[0] for words in commands] == ["train.py", "train.py", "compare.py", "sample.py"]
    config = flags.parse(commands[0][1:], train.ALGORITHMS, GPTConfig)
    assert (config.algo, config.seed, config.max_steps, config.batch_size, config.out_dir) == (
        "grpo", 7, 60, 32, "run")
    inspected = flags.parse(commands[1][1:], train.ALGORITHMS, GPTConfig)
    assert inspected.inspect == "all"
    dpo = flags.parse(["--algo", "dpo"], train.ALGORITHMS, GPTConfig)
    assert (dpo.num_prompts, dpo.min_terms, dpo.max_terms) == (4000, Chain().min_terms,
                                                               Chain().max_terms)
    assert compare.plan(commands[2][1:3], commands[2][5:7], 0, 1)   # --max_steps 20
    assert commands[2][7:] == ["--out_dir", "compare"]
    assert commands[3][1:] == ["run", walk.problem(37)]


def test_the_texts_say_what_is_so():
    """Eight questions in the handout, the form and the notes; the points; tests that exist; the
    README's share of groups that teach."""
    notes = (ROOT / "assignments/instructor/0.md").read_text()
    for text in (handout().split("## Answer")[1], notes.split("## Common")[0]):
        assert re.findall(r"^(\d)\. ", text, re.M) == list("12345678")
    assert list(answers.QUESTIONS) == list(range(1, 9)) == list(RIGHT)
    assert re.findall(r"\| (\d+) \|$", handout(), re.M) == [str(walk.POINTS)] * 3
    known = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    assert all(f"def {test}(" in known for test in re.findall(r"`(test_\w+)`", notes))
    last = [line for line in (ROOT / "README.md").read_text().splitlines()
            if line.startswith("    60 ")][0].split()
    assert last[11] == "0.78" and "32 x .22, about 7" in notes
    assert Chain.solve(walk.problem(37))["steps"] == "3+7=0;0*3=0" in notes
    assert max(map(len, handout().splitlines())) <= 100
