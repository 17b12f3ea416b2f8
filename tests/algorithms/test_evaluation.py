"""
What judges a model, on a policy that is a table (table_policy.py): each eval/... figure is compared
with a number worked out by hand or with a finite sum.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

import data
import tasks
from harness import evaluate
from model import GPTConfig, Samples
from table_policy import PROMPTS, Call, Policy, Task, Tokens, Wide, config_of, kl_of_first_answers
from tiny import Letters, move, tiny_model


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


def judge(full, ref="ref", task=None, **settings):
    """-> what evaluate returns, and the policy that was judged"""
    pi = Policy("pi")
    algo = SimpleNamespace(model=pi, ref_model=ref and Policy(ref), tokenizer=Tokens(),
                           task=task or Task(), config=config_of(**settings))
    return evaluate.evaluate(algo, full), pi


@pytest.mark.parametrize("full, expected", [(True, FULL), (False, QUICK)], ids=["full", "quick"])
def test_every_figure_by_hand(full, expected):
    """Accuracy, greedy, pass@k, worked, right when worked, length, ood; KL(pi || ref) of the first
    answer to each problem, at its own prompt, over its real tokens alone, a sum per answer and a
    mean over answers."""
    found, _ = judge(full)
    kl = kl_of_first_answers(Policy("pi"), Policy("ref"))
    assert found == pytest.approx({**expected, "eval/kl": kl}, abs=1e-6)
    assert abs(kl - kl_of_first_answers(Policy("ref"), Policy("pi"))) > 0.1   # KL(ref || pi)


def test_pass_at_k_by_hand():
    """Of 4 answers 2 are right: one drawn is right with 1/2, of two at least one with 5/6, of three
    always; a mean over problems. A reward of at most .5 is not right."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    found = [evaluate.pass_at_k(rewards, k) for k in (1, 2, 3, 4)]
    assert found == pytest.approx([1 / 4, 5 / 12, 1 / 2, 1 / 2])


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


KEPT = {True: {"eval/kept/skill": (3 + 4 + 1 + 3) / 16, "eval/kept/other": 2 / 4},
        False: {"eval/kept/skill": (1 + 1 + 0 + 1) / 4, "eval/kept/other": 0 / 4}}


@pytest.mark.parametrize("full, expected", [(True, FULL), (False, QUICK)], ids=["full", "quick"])
def test_what_is_kept_by_hand(full, expected):
    """A skill that is not taught: four answers to each of its problems (u, v, w and u again) at
    temperature 1, quick one; judged by its own answers. No other figure changes for it."""
    task = Task()
    task.kept = ("skill", "other")
    found, pi = judge(full, task=task)
    kl = kl_of_first_answers(Policy("pi"), Policy("ref"))
    assert found == pytest.approx({**expected, **KEPT[full], "eval/kl": kl}, abs=1e-6)
    asked = [(call.prompts, call.n, call.temperature) for call in pi.calls[-2:]]
    n = 4 if full else 1
    assert asked == [(["u", "v", "w", "u"], n, 1.0), (["uu"] * 4, n, 1.0)]
    assert pi.calls[:-2] == judge(full)[1].calls


def test_skills_of_the_chain_task_are_judged_by_their_own_problems():
    """A policy that reverses digits and knows nothing else keeps reversing alone; none of the
    problems it is judged by stands in the corpus."""
    def reverses(prompt_ids, prompt_mask, limit, eos_id, *args):
        asked = [bytes(row[mask][1:].tolist()) for row, mask in zip(prompt_ids, prompt_mask)]
        seen.extend(p.decode() for p in asked)
        ids = torch.tensor([[*p[-2:0:-1][:4].ljust(4), eos_id] for p in asked])
        return Samples(ids, torch.ones_like(ids, dtype=torch.bool), None, None)
    seen, tokenizer = [], data.Tokenizer("byte")
    pi = SimpleNamespace(generate=reverses, config=GPTConfig())
    task = tasks.Chain(other_skills=True)
    found = evaluate.judge_answers(pi, None, tokenizer, task, config_of(eval_problems=50), False)
    assert found["eval/kept/reversing"] == 1 and found["eval/kept/facts"] == 0
    assert found["eval/accuracy"] == 0
    assert not {p for p in seen if p[0] == "r"} & {d[:6] for d in task.corpus(5000, 0)}
    assert {p for p in seen if p[0] == "k"} <= {f"k{i:02d}=" for i in range(50)}


def test_no_seed_changes_the_problems():
    """Runs of different seeds are judged by the same problems and the same draw; the training
    problems are never asked."""
    asked = [judge(True, seed=seed)[1].calls for seed in (0, 1)]
    assert asked[0] == asked[1]
    asked = [evaluate.held_out(tasks.Chain(), split, 50) for split in ("test", "ood")]
    assert all(tasks.is_test(p["prompt"]) for problems in asked for p in problems)
    assert [{">" in p["prompt"] for p in problems} for problems in asked] == [{False}, {True}]


def test_flags_reach_the_sampler():
    """Temperature, top_k and top_p of `sample.py` reach all sampled answers, but not the greedy
    ones; bfloat16 and the number of problems reach all."""
    pi, config = Policy("pi"), config_of(dtype="bfloat16", eval_problems=2)
    evaluate.judge_answers(pi, None, Tokens(), Task(), config, True, temperature=0.7, top_k=2,
                           top_p=0.5)
    sampled, greedy = (0.7, 2, 0.5, 1, False, True), (0, 0, 1.0, 1, False, True)
    assert [call[2:] for call in pi.calls] == [sampled, greedy, sampled]
    assert [call.prompts for call in pi.calls] == [["p", "qq"], ["p", "qq"], ["x", "xx"]]


@pytest.mark.parametrize("sampled, micro_batch_size", [(16, 0), (40, 1), (3, 3), (64, 2)])
def test_in_parts_the_figures_are_the_same(monkeypatch, sampled, micro_batch_size):
    """However few answers are sampled or scored at a time, every figure stays; no part is larger
    than allowed (a problem's 16 answers are one part at the least), and none is asked twice."""
    whole, _ = judge(True)
    monkeypatch.setattr(evaluate, "SAMPLED", sampled)
    found, pi = judge(True, micro_batch_size=micro_batch_size)
    assert found == pytest.approx(whole, abs=1e-6)
    assert all(len(call.prompts) * call.n <= max(sampled, call.n) for call in pi.calls)
    assert max(pi.rows) <= (micro_batch_size or evaluate.SCORED) and sum(pi.rows) == 4
    asked = [(p, call.n, call.temperature) for call in pi.calls for p in call.prompts]
    assert len(asked) == len(set(asked)) == 12


def test_how_many_at_a_time_without_flags():
    """By default 1,024 answers are sampled and 256 scored at a time, which bounds the memory of an
    evaluation: of 1,030 problems a quick one makes two parts, and KL parts of 256 rows."""
    _, pi = judge(False, task=Wide(), eval_problems=1030)
    assert [len(call.prompts) for call in pi.calls] == [1024, 6, 1024, 6]
    assert pi.rows == [256] * 4 + [6]


def test_problems_are_drawn_once():
    """A second evaluation does not draw its problems again, with three skills beside the task
    either."""
    task = Task("drawn once")
    task.kept = ("skill", "other", "train")
    judge(False, task=task)
    task.problem = lambda rng, split: pytest.fail("drawn again")
    assert judge(False, task=task)[0]["eval/accuracy"] == 1 / 4


def test_what_is_left_out():
    """No reference, no KL; a task without steps to show, no `worked`; a policy at its reference has
    a KL of exactly 0, a policy that never works anything out is right 0 times when it does, and one
    that does so once may be right always."""
    task = Task()
    task.shows_steps = False
    found, _ = judge(True, ref=None, task=task)
    assert found == pytest.approx({k: v for k, v in FULL.items() if "worked" not in k})
    task.shows_steps, task.is_worked = True, lambda prompt, completion: False
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
    monkeypatch.setattr(evaluate, "answer_kl", lambda model, ref_model, b: torch.tensor([-1e-7]))
    assert judge(False)[0]["eval/kl"] == 0.0


def test_kl_of_a_real_model():
    """With two small transformers: the KL along each first answer is that of single unpadded
    forward passes. The same draw every time; without a reference, no KL."""
    policy, ref, task = tiny_model(), tiny_model(seed=1), tasks.Chain(2, 3)
    move(policy)
    problems, letters = evaluate.held_out(task, "test", 6), Letters()
    generate, drawn = policy.generate, []
    policy.generate = lambda *args: drawn.append(generate(*args)) or drawn[-1]
    texts, rewards, lengths, kls = evaluate.answers(policy, letters, task, problems, config_of(), 3,
                                                    ref_model=ref)
    first = lengths[:, 0].tolist()
    assert len({len(p["prompt"]) for p in problems}) > 1 and len(set(first)) > 1   # padding
    for i, problem in enumerate(problems):
        prompt = [16] + letters.encode(problem["prompt"])
        ids = torch.tensor([prompt + drawn[0].completion_ids[3 * i][:first[i]].tolist()])
        logp, logq = (m(ids)[0, len(prompt) - 1:-1].log_softmax(-1) for m in (policy, ref))
        kl = (logp.exp() * (logp - logq)).sum().item()
        assert kls[i].item() == pytest.approx(kl, abs=1e-5) and kl > 0.1
    again = evaluate.answers(policy, letters, task, problems, config_of(), 3)
    assert again[0] == texts and again[3] is None
    assert torch.equal(again[1], rewards) and torch.equal(again[2], lengths)
