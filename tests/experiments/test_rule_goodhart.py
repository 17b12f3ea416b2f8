"""
The rule of experiments/goodhart.py on made-up figures, the sign of each of its effects, and its own
measures by hand.
"""

import json
import math

import common
import goodhart
import pytest
import torch
from experiment_helpers import around, scattered

SMALL, MIDDLE, LARGE = goodhart.SIZES
HELD = "holds with a condition: the fall with "


def figures(seeds=5, proxy=3.0, **accuracy):
    """Figures of all arms. Keywords small, middle, large: GRPO against that set, no anchor;
    weak and strong: the betas .1 and 1. proxy: one number, or one for each size."""
    names = {"small": SMALL, "middle": MIDDLE, "large": LARGE, "weak": "beta .1",
             "strong": "beta 1", "slow": "rate 3e-4"}
    means = {"base": 0.48, "verifier": 0.98, "small": 0.1, "middle": 0.15, "large": 0.25,
             "weak": 0.5, "strong": 0.65, "slow": 0.55, **accuracy}
    proxies = proxy if isinstance(proxy, tuple) else (proxy,) * 3
    found = {}
    for arm, mean in means.items():
        values = around(mean)[:seeds]
        found[names.get(arm, arm)] = {"accuracy": values, "best": around(0.8)[:seeds],
                                      "best of 64": around(0.7)[:seeds]}
    for size, value in zip(goodhart.SIZES, proxies):
        found[size]["proxy"] = around(value)[:seeds]
    found[goodhart.SLOWER]["proxy"] = around(2.5)[:seeds]
    return found


@pytest.mark.parametrize("accuracy, expected", [
    ({}, common.HOLDS),
    ({"large": 0.47}, f"{HELD}{SMALL} and {MIDDLE}; no with {LARGE}; beta .1 does not help"),
    ({"large": 0.47, "weak": 0.6}, f"{HELD}{SMALL} and {MIDDLE}; no with {LARGE}"),
    ({"small": scattered(0.2), "large": 0.25}, f"{HELD}{MIDDLE} and {LARGE}; unclear with {SMALL}; "
                                               "a larger set helps unclearly"),
    ({"large": 0.12}, f"{HELD}{SMALL} and {MIDDLE} and {LARGE}; a larger set does not help"),
    ({"strong": 0.27}, f"{HELD}{SMALL} and {MIDDLE} and {LARGE}; beta 1 does not help"),
    ({"weak": scattered(0.3)}, f"{HELD}{SMALL} and {MIDDLE} and {LARGE}; beta .1 helps unclearly"),
    # The policy got worse, but not in order to please the reward model.
    ({"proxy": (-1.0, 3.0, 3.0)}, f"{HELD}{MIDDLE} and {LARGE}; no with {SMALL}"),
    ({"proxy": ([-1.0, 2.0, -1.0, 1.0, 0.5], 3.0, 3.0)},
     f"{HELD}{MIDDLE} and {LARGE}; unclear with {SMALL}"),
    ({"small": 0.6, "middle": 0.7, "large": 0.8}, common.FAILS),
    ({"small": 0.44, "middle": 0.44, "large": 0.44}, common.FAILS),   # a fall of .04 is none
    ({"proxy": -1.0}, common.FAILS),
    ({"small": 0.6, "middle": 0.7, "large": scattered(0.4)}, common.UNCLEAR),
    ({"small": scattered(0.3), "middle": scattered(0.3), "large": scattered(0.3)},
     common.UNCLEAR),
    ({"verifier": 0.1, "slow": 0.1}, common.HOLDS)])   # no part of the rule
def test_the_rule(accuracy, expected):
    assert goodhart.verdict(figures(**accuracy))[0] == expected


def test_one_seed_concludes_nothing():
    assert goodhart.verdict(figures(seeds=1))[0] == common.UNCLEAR


def test_without_some_arms():
    """--quick leaves out a beta: what it would do is unclear."""
    found = {arm: f for arm, f in figures().items() if arm in ("base", *goodhart.QUICK_ARMS)}
    verdict, effects = goodhart.verdict(found)
    assert verdict.endswith("; beta .1 helps unclearly")
    assert not {"beta .1 - none", "rate 3e-4 - none", "rate 3e-4 - beta 1"} & set(effects)


def test_the_effects_have_their_sign():
    """By hand from the figures above: a fall and the proxy's rise are positive."""
    _, effects = goodhart.verdict(figures())
    for name, mean in {f"fall, {SMALL}": 0.38, f"fall, {LARGE}": 0.23,
                       f"rise before, {LARGE}": 0.32, f"proxy's rise, {MIDDLE}": 3.0,
                       f"best of 64 - base, {SMALL}": 0.22,
                       "beta .1 - none": 0.25, "beta 1 - none": 0.4, "rate 3e-4 - none": 0.3,
                       "proxy, rate 3e-4 - none": -0.5, "rate 3e-4 - beta 1": -0.1,
                       "size": 0.15, "verifier - base": 0.5}.items():
        assert effects[name]["mean"] == pytest.approx(mean), name


# -- measures -------------------------------------------------------------------------------------


def test_best_of_by_hand():
    """Two problems with four answers each. Best of 1: the mean of all. Best of 2: of 1 3 | 2 0 and
    5 4 | 0 1 the second, first, first, second: right 0 1 0 0. Best of 4: the second and the first:
    0 0."""
    scores = torch.tensor([[1.0, 3, 2, 0], [5, 4, 0, 1]])
    rewards = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]])
    found = [goodhart.best_of(scores, rewards, n) for n in (1, 2, 4)]
    assert found == [0.5, 0.25, 0.0]
    assert goodhart.best_of(rewards, rewards, 4) == 1.0   # a perfect judge


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_of_best_of_n(n):
    """Of a base that is uniform on 2000 answers with scores all different: answer i of K is the
    best of n with probability (i^n - (i-1)^n) / K^n."""
    K = 2000
    p = [(i / K) ** n - ((i - 1) / K) ** n for i in range(1, K + 1)]
    kl = sum(x * math.log(x * K) for x in p if x)
    assert goodhart.kl_of_best(n) == pytest.approx(kl, abs=1e-3 * n)


def test_the_course_of_a_run():
    """The start is no part of it; the best is that of the evaluations, and its KL beside it."""
    lines = [{"step": 0, "eval/accuracy": 0.9, "eval/kl": 0.0}, {"step": 5, "loss": 1.0},
             {"step": 10, "eval/accuracy": 0.7, "eval/kl": 2.0},
             {"step": 20, "eval/accuracy": 0.8, "eval/kl": 3.0},
             {"step": 60, "eval/accuracy": 0.2, "eval/kl": 9.0}]
    assert goodhart.course(lines) == {
        "best": 0.8, "KL at the best": 3.0, "accuracy at 10": 0.7, "KL at 10": 2.0,
        "accuracy at 20": 0.8, "KL at 20": 3.0}


def test_a_rate_is_chosen_by_what_the_run_is_rewarded_with(tmp_path):
    """Its last two lines that have a reward, .6 and .8; neither the true accuracy nor an evaluation
    counts."""
    lines = [{"step": 5, "reward": 0.1}, {"step": 10, "reward": 0.6},
             {"step": 15, "reward": 0.8, "eval/accuracy": 0.2}, {"step": 15, "eval/accuracy": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    run = {"folder": str(tmp_path), "after": {"eval/accuracy": 0.3}}
    assert goodhart.judge(run) == pytest.approx(0.7)


def test_scores_stand_beside_their_answers():
    """Two answers to each of 600 problems, judged in more than one part: the judge of this test
    adds up the digits of problem and answer."""
    problems = [{"prompt": str(i)} for i in range(600)]
    texts = [str(1000 * k) for i in range(600) for k in (1, 2)]
    found = goodhart.score(lambda prompts, answers: [float(p) + float(a)
                                                     for p, a in zip(prompts, answers)],
                           problems, texts)
    assert found.shape == (600, 2) and found[599].tolist() == [1599, 2599]
