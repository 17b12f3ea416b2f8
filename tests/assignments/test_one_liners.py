"""
Assignment 9, whose bodies stand nowhere in the project: what a right solution earns and what wrong
ones lose.

The right solution is no text of this repository, or it could be handed in. It is assembled here
from the plain loops of the hidden tests, over scalars; a loss becomes the straight line that has
its value and its slope. Wrong solutions are that text with a line changed.
"""

import inspect
import json
import re
import shlex
import sys
import textwrap

from test_grading import Wrong

import train
from assignments import check, grade, make, table
from conftest import ROOT
from harness import flags
from model import GPTConfig

NINE = table.assignment(9)
sys.path += [str(ROOT / NINE.files_in), str(ROOT / "assignments/hidden")]
import mine  # noqa: E402
import test_9  # noqa: E402

AROUND = {"entropy_weights": """
import math
found = torch.tensor([[weight([math.exp(x) for x in token]) if real else 0.0
                       for token, real in zip(*rows)]
                      for rows in zip(all_logprobs.tolist(), completion_mask.tolist())],
                     dtype=all_logprobs.dtype)
return found
""", "divergence_loss": """
A = advantages[:, None].expand_as(logprobs)
cells = [list(zip(*rows)) for rows in zip(logprobs.exp().tolist(), old_logprobs.exp().tolist(),
                                          A.tolist())]
values, dropped = (torch.tensor([[of(*cell, delta) for cell in row] for row in cells],
                                dtype=logprobs.dtype) for of in (loss, is_dropped))
dropped = dropped.bool()
line = values + ~dropped * values * (logprobs - logprobs.detach())
return line, dropped & completion_mask.bool()
""", "overlong_rewards": """
counts = [int(sum(row)) for row in completion_mask.tolist()]
return torch.tensor([float(reward(n, max_length, cache)) for n in counts])
"""}
SCALARS = {"entropy_weights": (test_9.weight,), "overlong_rewards": (test_9.reward,),
           "divergence_loss": (test_9.is_dropped, test_9.loss)}


def body(name):
    """The text of a right body."""
    functions = "".join(inspect.getsource(f).replace("def ", "import math\ndef ", 1)
                        for f in SCALARS[name])
    return textwrap.indent(functions + AROUND[name].lstrip(), "    ")


def with_bodies(bodies):
    """The text of mine.py with some bodies written, {name: text}."""
    text = (ROOT / NINE.files_in / "mine.py").read_text()
    for name, written in bodies.items():
        stub = f'    raise NotImplementedError("mine.{name}: yours to write")\n'
        assert text.count(stub) == 1
        text = text.replace(stub, written)
    return text


def points(bodies):
    """-> the points of these bodies, in this process, and the names of the tests that fail."""
    keep = dict(vars(mine))
    try:
        exec(compile(with_bodies(bodies), "mine.py", "exec"), vars(mine))
        why = check.run([ROOT / test for test in NINE.tests()])
    finally:
        vars(mine).update(keep)
    assert all(len(r) < 400 and "\n" not in r for r in why.values() if r)
    return (grade.results(NINE, why)["score"],
            [test.split("::")[1] for test, reason in why.items() if reason])


WRONG = [
    Wrong("entropy_weights", "the entropy in nats, not divided by log V",
          "entropy / math.log(len(probabilities))", "entropy", 76,
          "test_entropy_weights_have_ends"),
    Wrong("entropy_weights", "divided by log 20, as where 20 tokens are kept",
          "math.log(len(probabilities))", "math.log(20)", 76, "test_entropy_weights_have_ends"),
    Wrong("entropy_weights", "divided by the tokens that can come",
          "math.log(len(probabilities))", "math.log(max(2, sum(p > 0 for p in probabilities)))", 88,
          "test_entropy_weights_have_ends"),
    Wrong("entropy_weights", "0 log 0", "for p in probabilities if p > 0",
          "for p in probabilities", 88, "test_entropy_weights_have_ends"),
    Wrong("entropy_weights", "sure tokens count", "return entropy /", "return 1 - entropy /", 76,
          "test_entropy_weights_elsewhere"),
    Wrong("entropy_weights", "detach forgotten", "return found",
          "p = all_logprobs.exp().sum(-1)\n    return found * (1 + p - p.detach())", 92,
          "test_entropy_weights_are_constants"),
    Wrong("entropy_weights", "padding has weights", "if real else 0.0", "", 88,
          "test_entropy_weights_keep_precision_and_ignore_padding"),
    Wrong("divergence_loss", "the ratio in place of the difference", "abs(p - old) > delta",
          "abs(p / old - 1) > delta", 66, "test_divergence_is_no_ratio"),
    Wrong("divergence_loss", "the difference of log-probabilities", "abs(p - old) > delta",
          "abs(math.log(p / old)) > delta", 66, "test_divergence_is_no_ratio"),
    Wrong("divergence_loss", "dropped whatever the advantage", "return away and abs", "return abs",
          68, "test_divergence_lets_tokens_come_back"),
    Wrong("divergence_loss", "dropped on the way back", "A * (p - old) > 0", "A * (p - old) < 0",
          60, "test_divergence_lets_tokens_come_back"),
    Wrong("divergence_loss", "only gains are held back", "away = A * (p - old) > 0",
          "away = A > 0 and p > old", 70, "test_divergence_gradients_elsewhere"),
    Wrong("divergence_loss", "clipped, not dropped", "return 0.0 if is", "return -A if is", 80,
          "test_divergence_losses_elsewhere"),
    Wrong("divergence_loss", "the ratio is detached", "* values * (logprobs - logprobs.detach())",
          "* 0", 72, "test_divergence_gradients_elsewhere"),
    Wrong("divergence_loss", "the gradient of the log-probability alone",
          "* values * (logprobs - logprobs.detach())",
          "* -A * (logprobs - logprobs.detach())", 72, "test_divergence_gradients_elsewhere"),
    Wrong("divergence_loss", "an advantage for each column", "advantages[:, None]", "advantages",
          64, "test_divergence_losses_elsewhere"),
    Wrong("divergence_loss", "padding is dropped too", " & completion_mask.bool()", "", 96,
          "test_divergence_tells_what_it_dropped"),
    Wrong("overlong_rewards", "one token too early", "n - (L - C)", "n + 1 - (L - C)", 76,
          "test_overlong_rewards_have_ends"),
    Wrong("overlong_rewards", "no end at -1", "min(max(n - (L - C), 0), C)", "max(n - (L - C), 0)",
          76, "test_overlong_rewards_have_ends"),
    Wrong("overlong_rewards", "short answers earn", "max(n - (L - C), 0)", "(n - (L - C))", 76,
          "test_overlong_rewards_elsewhere"),
    Wrong("overlong_rewards", "a share of L", ", C) / C", ", C) / L", 76,
          "test_overlong_rewards_elsewhere"),
    Wrong("overlong_rewards", "the batch's width for the answer's length", "int(sum(row))",
          "len(row)", 76, "test_overlong_rewards_count_real_tokens"),
    Wrong("overlong_rewards", "a reward for length", "return -min", "return min", 76,
          "test_overlong_rewards_elsewhere"),
]


def test_wrong_solutions_lose_what_they_should():
    """Each the points of what rests on its wrong line; the right one beside it has all."""
    right = {name: body(name) for name in SCALARS}
    assert points(right) == (100, [])
    scores = {}
    for wrong in WRONG:
        assert right[wrong.body].count(wrong.right) == 1, wrong
        written = right[wrong.body].replace(wrong.right, wrong.wrong)
        scores[wrong], failed = points({**right, wrong.body: written})
        assert wrong.proof in failed, (wrong, failed)
        own = {r.test.split("::")[1] for r in NINE.all() if r.body == wrong.body}
        assert set(failed) <= own, wrong
    assert scores == {wrong: wrong.score for wrong in WRONG}


def test_the_grader_gives_all_points_and_none(tmp_path):
    """Through the judge with a salt: the right bodies in a copy have 100, and the copy as it was
    handed out has 0, each test naming the body."""
    copies = {"right": with_bodies({name: body(name) for name in SCALARS}), "stubs": None}
    for name, text in copies.items():
        make.write(make.copy_of(NINE) | ({"mine.py": text} if text else {}), tmp_path / name)
    found = grade.grade(NINE, [tmp_path / name for name in copies], tmp_path / "out", "salt")
    assert [one["score"] for one in found.values()] == [100, 0], found["right"]
    assert all("yours to write" in test["output"] for test in found["stubs"]["tests"])
    written = json.loads((tmp_path / "out/right/results.json").read_text())
    assert [t["visibility"] for t in written["tests"]].count("visible") == 3


def test_most_points_are_drawn():
    """10 for the cells of the docstrings, 90 for hidden properties; each test says what it
    proves."""
    assert sum(r.points for r in NINE.requirements) == 10
    assert sum(r.points for r in NINE.hidden) == 90
    for path in NINE.tests():
        file, name = path.split("::")
        assert check.proves(ROOT / file, name).endswith((".", ":"))
    for body_name in NINE.bodies:
        assert {body_name.split(".")[1]} <= {r.body for r in NINE.requirements}
    names = {node.split("::")[1] for node in NINE.tests()}
    texts = [(ROOT / path).read_text() for path in ("assignments/hidden/test_9.py",
                                                    "assignments/extensions/test_mine.py")]
    assert names == set(re.findall(r"^def (test_\w+)", "".join(texts), re.M))


def test_the_copy_has_the_project_whole():
    """Every file of the project as it stands, and beside them the three stubs, their visible tests
    and the handout; no hidden test, and nothing that computes one of the three."""
    files = make.copy_of(NINE)
    assert {path: files[path] for path in make.read()} == make.read()
    assert files["mine.py"] == with_bodies({})
    assert [path for path in files if "/test_" in path] == ["tests/test_mine.py"]
    assert files["README.md"] == (ROOT / "assignments/handouts/9.md").read_text()
    everything = "".join(make.read().values())
    assert not re.search(r"overlong|2601\.02151|2602\.04879|\bEAFT\b|\bDPPO\b", everything)
    told = json.loads(files["assignment.json"])
    assert told["bodies"] == {"mine.py": ["entropy_weights", "divergence_loss",
                                          "overlong_rewards"]}
    assert told["hidden"] == 90 and len(told["requirements"]) == 3


def test_handout_and_notes_say_what_is_so():
    """The points of each body, the commands, and what each wrong solution earns."""
    handout = (ROOT / "assignments/handouts/9.md").read_text()
    for name in SCALARS:
        visible, hidden = (sum(r.points for r in rows if r.body == name)
                           for rows in (NINE.requirements, NINE.hidden))
        assert re.search(rf"^\| `{name}` \| [\d, ]+ \| {visible} \| {hidden} \|$", handout, re.M)
    commands = re.findall(r"`python (train\.py [^`]*)`", handout.replace("\n   ", " "))
    for command in commands:
        flags.parse(shlex.split(command.replace(" S", " 7"))[1:], train.ALGORITHMS, GPTConfig)
    notes = (ROOT / "assignments/instructor/9.md").read_text()
    rows = re.findall(r"^\| (.*) \| (\d+) \| `(test_\w+)` \|$", notes, re.M)
    assert len(commands) == 3
    assert rows == [(wrong.mistake, str(wrong.score), wrong.proof) for wrong in WRONG]
    for text in (handout, notes):
        assert max(map(len, text.splitlines())) <= 100
    assert not [line for line in notes.splitlines()
                if len(line) > 60 and line in "".join(make.copy_of(NINE).values())]
