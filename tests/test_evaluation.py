"""
What judges a model, on a policy that is a table: every prompt has 16 answers written down and every
prefix its logits, so that each eval/... figure is a number worked out by hand or a finite sum. The
policy keeps a record of what it was asked.

Vocabulary 0, 1, <end>, <pad>; an answer has up to three tokens. It is right where it is the one in
ANSWERS, and counts as worked where it is at least as long as the prompt.
"""

import itertools
import json
import math
import random
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

import data
import report
import rm
from model import Samples
from test_grpo import Letters, move, tiny_model

PROMPTS = {"train": ["a", "bb"], "test": ["p", "qq", "rrr", "ssss", "never asked"],
           "ood": ["x", "xx", "y", "yy"]}
ANSWERS = {"p": "1", "qq": "10", "rrr": "0", "ssss": "11", "x": "1", "xx": "0", "y": "0", "yy": "1",
           "a": "1", "bb": "1"}
GREEDY = {"p": "1", "qq": "10", "rrr": "1", "ssss": "", "a": "1", "bb": "1"}
DRAWS = {"p": ["1"] * 8 + ["0"] * 4 + [""] * 4,       # 8 of 16 right, 12 worked; 28 tokens
         "qq": ["0", "10"] + ["01"] * 7 + ["1"] * 7,  # 1 right, 8 worked; 40 tokens, <end> too
         "rrr": ["101"] + ["0"] * 2 + ["1"] * 13,     # 2 right, 1 other worked, cut off; 33 tokens
         "ssss": ["1"] * 16,                          # none right, none worked; 32 tokens
         "x": ["1", "0", "1", "1"] + ["0"] * 12, "xx": ["1"] * 16,
         "y": ["1", "1", "0", "1"] + ["0"] * 12, "yy": ["1", "0", "0", "1"] + ["1"] * 12,
         "a": ["1"] * 16, "bb": ["1"] * 16}
ARGS = SimpleNamespace(device="cpu", dtype="float32", eval_problems=4, seed=0, top_k=0, top_p=1.0,
                       micro_batch_size=0)
Call = namedtuple("Call", "prompts n temperature top_k top_p seed grad bfloat16")


def args_of(**flags):
    return SimpleNamespace(**{**vars(ARGS), **flags})


class Tokens:
    """0, 1, <end> and <pad>, and behind them the letters of prompts."""
    eos_id, pad_id = 2, 3

    def encode(self, text):
        return [int(c) if c in "01" else ord(c) for c in text]

    def decode(self, ids):
        ids = ids[:ids.index(2)] if 2 in ids else ids
        return "".join("01"[i] for i in ids)


class Task:
    """The problems of PROMPTS, in that order; what is right and what is worked depends on the
    prompt."""
    columns, max_new_tokens, learned_reward = ("answer",), 3, None

    def __init__(self, name="table"):
        self.name = name

    def problem(self, rng, split):
        rng.asked = getattr(rng, "asked", -1) + 1
        prompt = PROMPTS[split][rng.asked % len(PROMPTS[split])]
        return {"prompt": prompt, "answer": ANSWERS[prompt]}

    @staticmethod
    def reward(prompts, completions, answer):
        assert answer == [ANSWERS[p] for p in prompts]
        return [float(c == a) for c, a in zip(completions, answer)]

    @staticmethod
    def is_worked(prompt, completion):
        return len(completion) >= len(prompt)


class Policy:
    """A table of logits for every prompt and prefix, drawn once and for all by their names, and the
    answers of DRAWS."""
    device = torch.device("cpu")

    def __init__(self, name, draws=DRAWS):
        self.name, self.draws, self.calls, self.rows = name, draws, [], []

    def logits(self, prompt, prefix):
        rng = random.Random(f"{self.name} {prompt} {prefix}")
        return [rng.gauss(0, 1) for _ in range(4)]

    def logprobs(self, prompt, prefix):
        """In plain arithmetic, for the figures that are expected."""
        z = self.logits(prompt, prefix)
        return [x - math.log(sum(map(math.exp, z))) for x in z]

    def nll(self, prompt, text):
        """Of a text and its <end>, summed."""
        tokens = Tokens().encode(text) + [2]
        return -sum(self.logprobs(prompt, text[:t])[token] for t, token in enumerate(tokens))

    def completion_logits(self, prompt_ids, prompt_mask, completion_ids, completion_mask,
                          prompt_index):
        self.rows.append(len(completion_ids))
        prompts = ["".join(map(chr, ids[mask][1:])) for ids, mask in zip(prompt_ids, prompt_mask)]
        table = []
        for p, ids, real in zip(prompt_index, completion_ids, completion_mask):
            prefixes = ["".join(map(str, ids[:t].tolist())) if real[t] else f"padding {t}"
                        for t in range(len(ids))]
            table.append([self.logits(prompts[p], prefix) for prefix in prefixes])
        return torch.tensor(table)

    def generate(self, prompt_ids, prompt_mask, max_new_tokens, eos_id, pad_id, num_generations=1,
                 temperature=1.0, top_k=0, top_p=1.0, generator=None):
        prompts = ["".join(map(chr, ids[mask][1:])) for ids, mask in zip(prompt_ids, prompt_mask)]
        self.calls.append(Call(
            prompts, num_generations, temperature, top_k, top_p, generator.initial_seed(),
            torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        drawn = [[GREEDY[p]] if temperature == 0 else self.draws[p][:num_generations]
                 for p in prompts]
        ids = [(Tokens().encode(text) + [eos_id])[:max_new_tokens] for ts in drawn for text in ts]
        T = max(map(len, ids))
        return Samples(torch.tensor([row + [pad_id] * (T - len(row)) for row in ids]),
                       torch.tensor([[t < len(row) for t in range(T)] for row in ids]),
                       torch.tensor([eos_id not in row for row in ids]), None)


def kl_of_first_answers(pi, ref):
    """KL(pi || ref) summed over the tokens of each test problem's first answer, then averaged over
    the problems."""
    total = 0.0
    for prompt in PROMPTS["test"][:4]:
        tokens = (Tokens().encode(DRAWS[prompt][0]) + [2])[:3]
        for t in range(len(tokens)):
            logp, logq = (m.logprobs(prompt, "".join(map(str, tokens[:t]))) for m in (pi, ref))
            total += sum(math.exp(a) * (a - b) for a, b in zip(logp, logq))
    return total / 4


def at_least_one(right, k):
    """The share of all k of 16 answers, `right` of them right, among which at least one is right:
    counted."""
    subsets = list(itertools.combinations(range(16), k))
    return sum(min(s) < right for s in subsets) / len(subsets)


FULL = {"eval/accuracy": 11 / 64, "eval/greedy_accuracy": 2 / 4, "eval/pass@1": 11 / 64,
        "eval/pass@4": sum(at_least_one(right, 4) for right in (8, 1, 2, 0)) / 4,
        "eval/pass@16": 3 / 4, "eval/worked": 21 / 64, "eval/accuracy_when_worked": 9 / 21,
        "eval/mean_length": 133 / 64, "eval/ood_accuracy": (3 + 0 + 1 + 2) / 16}
QUICK = {"eval/accuracy": 1 / 4, "eval/worked": 2 / 4, "eval/accuracy_when_worked": 1 / 2,
         "eval/mean_length": 9 / 4, "eval/ood_accuracy": 2 / 4}


def judge(full, args=ARGS, ref="ref", task=None):
    """-> what evaluate returns, and the policy that was judged"""
    pi = Policy("pi")
    return report.evaluate(args, pi, ref and Policy(ref), Tokens(), task or Task(), full), pi


# -- every figure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("full, expected", [(True, FULL), (False, QUICK)], ids=["full", "quick"])
def test_every_figure_by_hand(full, expected):
    """Accuracy, greedy, pass@k, worked, right when worked, length, ood; KL(pi || ref) of the first
    answer to each problem, at its own prompt, over its real tokens alone, a sum per answer and a
    mean over answers."""
    found, _ = judge(full)
    kl = kl_of_first_answers(Policy("pi"), Policy("ref"))
    assert found == pytest.approx({**expected, "eval/kl": kl}, abs=1e-6)
    assert abs(kl - kl_of_first_answers(Policy("ref"), Policy("pi"))) > 0.1   # KL(ref || pi)


def test_what_was_asked_and_how_often():
    """The test split's problems, 16 samples each at temperature 1 and one greedily; then ood's, 4
    each. Quick: one sample each. Each time the first eval_problems of them, the same draw, no
    gradient, the whole distribution."""
    test, ood = PROMPTS["test"][:4], PROMPTS["ood"]
    expected = {True: [(test, 16, 1.0), (test, 1, 0), (ood, 4, 1.0)],
                False: [(test, 1, 1.0), (ood, 1, 1.0)]}
    for full, calls in expected.items():
        _, pi = judge(full)
        assert pi.calls == [Call(*call, 0, 1.0, 1, False, False) for call in calls]


def test_no_seed_changes_the_problems():
    """Runs of different seeds are judged by the same problems and the same draw; the training
    problems are never asked."""
    asked = [judge(True, args_of(seed=seed))[1].calls for seed in (0, 1)]
    assert asked[0] == asked[1]
    asked = [report.held_out(data.Chain(), split, 50) for split in ("test", "ood")]
    assert all(data.is_test(p["prompt"]) for problems in asked for p in problems)
    assert [{">" in p["prompt"] for p in problems} for problems in asked] == [{False}, {True}]


def test_flags_reach_the_sampler():
    """--top_k, --top_p, bfloat16 and the number of problems: what --eval_only was asked for is what
    is judged."""
    args = args_of(top_k=2, top_p=0.5, dtype="bfloat16", eval_problems=2)
    _, pi = judge(True, args)
    assert {call[3:] for call in pi.calls} == {(2, 0.5, 1, False, True)}
    assert [call.prompts for call in pi.calls] == [["p", "qq"], ["p", "qq"], ["x", "xx"]]


@pytest.mark.parametrize("sampled, micro_batch_size", [(16, 0), (40, 1), (3, 3), (64, 2)])
def test_in_parts_the_figures_are_the_same(monkeypatch, sampled, micro_batch_size):
    """However few answers are sampled or scored at a time, every figure stays; no part is larger
    than allowed (a problem's 16 answers are one part at the least), and none is asked twice."""
    whole, _ = judge(True)
    monkeypatch.setattr(report, "SAMPLED", sampled)
    args = args_of(micro_batch_size=micro_batch_size)
    found, pi = judge(True, args)
    assert found == pytest.approx(whole, abs=1e-6)
    assert all(len(call.prompts) * call.n <= max(sampled, call.n) for call in pi.calls)
    assert max(pi.rows) <= (micro_batch_size or report.SCORED) and sum(pi.rows) == 4
    asked = [(p, call.n, call.temperature) for call in pi.calls for p in call.prompts]
    assert len(asked) == len(set(asked)) == 12


def test_how_many_at_a_time_without_flags():
    """By default 1,024 answers are sampled and 128 scored at a time, which bounds the memory of an
    evaluation: of 1,030 problems a quick one makes two parts, and KL parts of 128 rows."""
    _, pi = judge(False, args_of(eval_problems=1030), task=Wide())
    assert [len(call.prompts) for call in pi.calls] == [1024, 6, 1024, 6]
    assert pi.rows == [128] * 8 + [6]


class Wide(Task):
    """As many problems as are wanted, all alike."""

    def problem(self, rng, split):
        return {"prompt": "p", "answer": "1"}


def test_problems_are_drawn_once():
    """A second evaluation does not draw its problems again."""
    task = Task("drawn once")
    judge(False, task=task)
    task.problem = lambda rng, split: pytest.fail("drawn again")
    assert judge(False, task=task)[0]["eval/accuracy"] == 1 / 4


def test_what_is_left_out():
    """No reference, no KL; a task without steps to show, no `worked`; a policy at its reference has
    a KL of exactly 0, a policy that never works anything out is right 0 times when it does, and one
    that does so once may be right always."""
    task = Task()
    task.is_worked = None
    found, _ = judge(True, ref=None, task=task)
    assert found == pytest.approx({k: v for k, v in FULL.items() if "worked" not in k})
    task.is_worked = lambda prompt, completion: False
    found, _ = judge(False, ref="pi", task=task)
    assert (found["eval/kl"], found["eval/worked"], found["eval/accuracy_when_worked"]) == (0, 0, 0)
    task.is_worked = lambda prompt, completion: prompt == "p"
    found, _ = judge(False, task=task)
    assert (found["eval/worked"], found["eval/accuracy_when_worked"]) == (1 / 4, 1)


def test_the_verifier_gets_the_columns_of_the_task():
    """A task whose rewards need something else than an `answer` is judged by its own columns."""
    task = Task()
    task.columns, problem = ("target", "prompt"), Task().problem
    task.problem = lambda rng, split: {**problem(rng, split), "target": "1"}
    task.reward = lambda prompts, completions, target, prompt: [
        float(c == t and p == q) for p, c, t, q in zip(prompts, completions, target, prompt)]
    assert judge(False, task=task)[0]["eval/accuracy"] == 2 / 4   # the first answers to p and ssss


def test_rounding_leaves_no_negative_kl(monkeypatch):
    """The KL is at least 0, and where a sum of rounding errors is below, 0 is what is said."""
    monkeypatch.setattr(report, "answer_kl", lambda model, ref_model, b: torch.tensor([-1e-7]))
    assert judge(False)[0]["eval/kl"] == 0.0


def test_kl_of_a_real_model():
    """With two small transformers: the KL along each first answer is that of single unpadded
    forward passes. The same draw every time; without a reference, no KL."""
    policy, ref, task = tiny_model(), tiny_model(seed=1), data.Chain(2, 3)
    move(policy)
    problems, letters = report.held_out(task, "test", 6), Letters()
    generate, drawn = policy.generate, []
    policy.generate = lambda *args: drawn.append(generate(*args)) or drawn[-1]
    found = report.answers(ARGS, policy, letters, task, problems, 3, ref_model=ref)
    lengths = found.lengths[:, 0].tolist()
    assert len({len(p["prompt"]) for p in problems}) > 1 and len(set(lengths)) > 1   # padding
    for i, problem in enumerate(problems):
        prompt = [16] + letters.encode(problem["prompt"])
        ids = torch.tensor([prompt + drawn[0].completion_ids[3 * i][:lengths[i]].tolist()])
        logp, logq = (m(ids)[0, len(prompt) - 1:-1].log_softmax(-1) for m in (policy, ref))
        kl = (logp.exp() * (logp - logq)).sum().item()
        assert found.kl[i].item() == pytest.approx(kl, abs=1e-5) and kl > 0.1
    again = report.answers(ARGS, policy, letters, task, problems, 3)
    assert again.texts == found.texts and again.kl is None
    assert torch.equal(again.rewards, found.rewards) and torch.equal(again.lengths, found.lengths)


# -- a file's held-out lines -----------------------------------------------------------------------


def file_task(folder, held_out, train=({"prompt": "t", "completion": "0"},)):
    """A task of two .jsonl files. Columns are those that all lines have, so the training lines get
    the same ones."""
    for name, rows in (("train", [{**held_out[0], **row} for row in train]), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.JsonLines(folder / "train.jsonl", folder / "test.jsonl", 3)


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2])
@pytest.mark.parametrize("rows, trained", [
    ([{"prompt": "p", "completion": "0101"}, {"prompt": "qq", "completion": ""},
      {"prompt": "rrr", "completion": "1"}],
     [("p", "0101"), ("qq", ""), ("rrr", "1")]),
    ([{"prompt": "p", "chosen": "10", "rejected": "0"},
      {"prompt": "qq", "chosen": "0", "rejected": "111"}],
     [("p", "10"), ("qq", "0")]),
    ([{"text": "0110"}, {"text": "1"}], [("", "0110"), ("", "1")]),
    ([{"prompt": "p", "completion": "01", "label": True},
      {"prompt": "p", "completion": "1110", "label": False},
      {"prompt": "qq", "completion": "0", "label": 1},
      {"prompt": "qq", "completion": "11", "label": 0}],
     [("p", "01"), ("qq", "0")]),
], ids=["completions", "preferences", "texts", "labels"])
def test_held_out_loss_by_hand(tmp_path, rows, trained, micro_batch_size):
    """A mean over all tokens of all lines, ends included, in nats: of what is to be written, at its
    own prompt; not of rejected answers, nor of those that are labelled bad."""
    args = args_of(micro_batch_size=micro_batch_size)
    found, pi = judge(True, args, task=file_task(tmp_path, rows))
    nll = sum(Policy("pi").nll(*t) for t in trained) / sum(len(text) + 1 for _, text in trained)
    assert found == {"eval/loss": pytest.approx(nll, abs=1e-6)}
    assert pi.calls == [] and max(pi.rows) == min(micro_batch_size or 128, len(trained))


def test_lines_are_scored_in_parts(tmp_path):
    """128 lines at a time without --micro_batch_size, so that memory does not follow the size of
    the file."""
    task = file_task(tmp_path, [{"text": "0"}] * 130)
    _, pi = judge(True, args_of(eval_problems=200), task=task)
    assert pi.rows == [128, 2]


@pytest.mark.parametrize("rows", [
    [{"prompt": "p"}], [{"prompt": "p", "completion": "1", "label": False}]],
    ids=["bare prompts", "bad answers alone"])
def test_nothing_to_judge_by(tmp_path, rows):
    """No figure, and no error, where the held-out lines do not say what is good; nor where there
    are none."""
    task = file_task(tmp_path, rows)
    assert judge(True, task=task)[0] == {}
    task.test = []
    assert judge(True, args_of(eval_problems=5), task=task)[0] == {}


def test_a_file_with_answers_is_judged_by_them(tmp_path):
    """Lines with an answer: accuracy and KL as for a task, by the last number, over the first
    eval_problems lines; there is no ood split, and nothing is worked out."""
    rows = [{"prompt": p, "answer": ANSWERS.get(p, "1")} for p in PROMPTS["test"]]
    found, pi = judge(False, task=file_task(tmp_path, rows, [{"prompt": "t"}]))
    kl = kl_of_first_answers(Policy("pi"), Policy("ref"))
    expected = {"eval/accuracy": 1 / 4, "eval/mean_length": 9 / 4, "eval/kl": kl}
    assert found == pytest.approx(expected, abs=1e-6)
    assert [call.prompts for call in pi.calls] == [PROMPTS["test"][:4]]
    task = file_task(tmp_path, rows, [{"prompt": "t"}])
    full, pi = judge(True, task=task)
    assert full["eval/greedy_accuracy"] == 2 / 4 and len(pi.calls) == 2
    task.test = []
    assert judge(True, args_of(eval_problems=5), task=task)[0] == {}


# -- a reward model --------------------------------------------------------------------------------


class Scorer:
    """A reward model that is a table: 1 for each 1 in an answer, 3 for each where the prompt has an
    even number of letters, less the answer's length; in the column after the last real token, where
    alone it is to be read."""
    device = torch.device("cpu")

    def __init__(self):
        self.rows = []

    def completion_logits(self, prompt_ids, prompt_mask, completion_ids, completion_mask,
                          prompt_index, read_last):
        assert read_last
        self.rows.append(len(completion_ids))
        B, T = completion_ids.shape
        table = torch.full((B, T + 1, 1), 100.0)
        for b, (p, ids, mask) in enumerate(zip(prompt_index, completion_ids, completion_mask)):
            value = 3.0 if prompt_mask[p].sum() % 2 else 1.0       # its first token is <end>
            table[b, mask.sum()] = value * (ids[mask] == 1).sum() - mask.sum()
        return table


def make_rm(draws, task, num_generations=8):
    """RM with the table for a model, and a sampler that gives each prompt the draws."""
    sampler = Policy("sampler", draws)
    sampler.with_scalar_head = Scorer
    config = rm.RMConfig(num_generations=num_generations)
    return rm.RM(config, sampler, sampler, Tokens(), task), sampler


@pytest.mark.parametrize("wrong, accuracy", [("0", 1 / 3), ("011", 0.0)], ids=["", "a tie"])
def test_pair_accuracy_by_hand(wrong, accuracy):
    """One right answer in each group and wrong ones all alike, so that the pair is known. p: 1
    against 0, r is -1 and -2, ranked right (or 1 against 011, both -1: a tie is no success); qq: 10
    against 11, 0 and 3, wrong; rrr: 0 against 1, -2 and -1, wrong; ssss has no pair. Asked are the
    test problems, once, however often the model is judged."""
    draws = {"p": [wrong] * 7 + ["1"], "qq": ["10"] + ["11"] * 7, "rrr": ["1"] * 7 + ["0"],
             "ssss": ["0"] * 8}
    algo, sampler = make_rm(draws, Task())
    expected = {"eval/pair_accuracy": pytest.approx(accuracy), "eval/pairs": 3}
    assert algo.evaluate(ARGS) == expected and algo.evaluate(ARGS) == expected
    assert sampler.calls == [Call(PROMPTS["test"][:4], 8, 1.0, 0, 1.0, 1, False, False)]
    assert algo.model.rows == [6, 6]


def test_pairs_are_made_in_parts():
    """128 problems of 8 answers at a time, or one problem where it has more than 1,024; none is
    left out, and bfloat16 is what --dtype says."""
    algo, sampler = make_rm({"p": ["0"] * 7 + ["1"]}, Wide())
    args = args_of(eval_problems=260, dtype="bfloat16")
    assert algo.evaluate(args) == {"eval/pair_accuracy": 1.0, "eval/pairs": 260}
    asked = [(len(call.prompts), call.bfloat16) for call in sampler.calls]
    assert asked == [(128, True), (128, True), (4, True)]
    algo, sampler = make_rm({"p": ["0"] * 1024 + ["1"]}, Wide(), 1025)
    assert algo.evaluate(args_of(eval_problems=2))["eval/pairs"] == len(sampler.calls) == 2


def test_pairs_of_a_file(tmp_path):
    """A file's held-out preferences: p, 1 above 0 is ranked right; qq, 10 above 11 is not; equal
    answers are no pair."""
    rows = [{"prompt": p, "chosen": a, "rejected": b}
            for p, a, b in (("p", "1", "0"), ("qq", "10", "11"), ("rrr", "1", "1"))]
    algo, sampler = make_rm({}, file_task(tmp_path, rows))
    assert algo.evaluate(ARGS) == {"eval/pair_accuracy": 0.5, "eval/pairs": 2}
    assert sampler.calls == []
    algo, _ = make_rm({}, file_task(tmp_path, rows[2:]))
    assert algo.evaluate(ARGS) == {}
    algo, _ = make_rm({}, file_task(tmp_path, rows))
    algo.task.test = []
    assert algo.evaluate(ARGS) == {}
