"""
A reward that is not what was meant: learned from preferences, or simply wrong.

Claim      A policy trained against a learned reward first gets better and then worse while that
           reward still rises. A KL to the start holds it back; a larger set of preferences makes
           the reward harder to fool. Wrong rewards are followed to the letter.
Source     Over-optimisation, the distance as KL, best of n, and the size of the set: 2210.10760.
           Spurious rewards, which there improve some models: 2506.10947.
Here       A reward model learns from pairs of the base's answers, each seen once: 5, 25 or 150
           updates of 64 problems, nearly all of which give a pair. (A small set is thus also a
           short training.) Each seed has its own. GRPO against it makes 60 updates of 16 prompts
           with 16 answers; accuracy is the verifier's. With the largest set there are anchors, a
           beta of .1 or 1. Beside them GRPO with the verifier itself, and with rewards that
           are wrong: leaky, format and random. Each arm has the learning rate, of 3e-4 and 1e-3,
           that gets most of its own reward over the last ten updates of the sweep's run: what
           someone sees who has no verifier. (True accuracy would choose the rate that is stopped
           at its top. In a first version all had 1e-3; where the sweep chose that again, the
           figures are those.) The smaller rate stands as an anchor beside the others: no beta,
           3e-4. `leaky`, which chose 3e-4, also stands at 1e-3. Best of n: the answer of n that
           the reward model ranks first, at a KL of log n - (n - 1) / n or less. "best" is the best
           of a run's six evaluations, so a little flattered.
Falsified  by true accuracy that stays where the learned reward led it, or by anchors and larger
           sets that change nothing.

Rule       In held-out accuracy, paired by seed, against a margin of .05; three parts:
           fall     with each set, no anchor: base - the end lies above, while the proxy (the mean
                    score, in standard deviations of the base's) rose: its interval is above 0.
                    False where base - the end lies below, or the proxy's interval below 0
           anchor   beta .1, and beta 1, - none lie above
           size     the largest set - the smallest lies above
           holds here           all three, with all sets and both anchors
           with a condition     the fall is true with some set: those and what fails are named
           does not hold here   the fall is false with every set
           cannot be told       any other case
           The smaller rate, the verifier and the wrong rewards are effects, no part of the rule.

Time       32 minutes on one core (73 runs and 18 reward models); the two base models, which others
           share, 2 more.
"""

import functools
import json
import math
import os
import sys
from types import SimpleNamespace

import common
import torch

import compare
import data
import tasks
from harness import checkpoint, evaluate, prepare

SIZES = {"300 pairs": 5, "1,500 pairs": 25, "9,000 pairs": 150}   # updates of 64 problems
LEARNED = {name: f"grpo:reward=model:reward_model=out/rm-{n}-{{seed}}" for name, n in SIZES.items()}
SMALLEST, *_, LARGEST = SIZES
ANCHORS = {"beta .1": ":beta=0.1", "beta 1": ":beta=1"}
WRONG = ("leaky", "format", "random")
SLOWER, LEAKY = "rate 3e-4", "leaky at 1e-3"   # at a rate that is not theirs
ARMS = {arm: f"{word}:learning_rate=3e-4|1e-3" for arm, word in {
            "verifier": "grpo", **LEARNED, **{a: LEARNED[LARGEST] + f for a, f in ANCHORS.items()},
            **{reward: f"grpo:reward={reward}" for reward in WRONG}}.items()}
ARMS |= {SLOWER: f"{LEARNED[LARGEST]}:learning_rate=3e-4",
         LEAKY: "grpo:reward=leaky:learning_rate=1e-3"}
SHOWN = [arm for arm in ARMS if arm not in (*WRONG, LEAKY)]
FIRST = [f"--algo rm --max_steps {n} --batch_size 64 --eval_steps {n} --logging_steps 5 "
         f"--out_dir out/rm-{n}-{{seed}}" for n in SIZES.values()]
FLAGS = ["--max_steps", "60", "--batch_size", "16", "--eval_steps", "10"]
QUICK_ARMS = {arm: ARMS[arm] for arm in ("verifier", *LEARNED, "beta 1")}
QUICK_FLAGS = ["--max_steps", "10", "--eval_steps", "5", "--eval_problems", "32"]
SWEEP_SEEDS, BASES = 1, 2
START = False   # the course is that of a run
MARGIN = 0.05
STEPS, BEST_OF = range(10, 60, 10), (4, 16, 64)


def judge(run):
    """What a run of the sweep got of its own reward over its last ten updates, two lines of its
    log: by this its rate is chosen."""
    with open(os.path.join(run["folder"], "metrics.jsonl")) as file:
        rewards = [line["reward"] for line in map(json.loads, file) if "reward" in line]
    return sum(rewards[-2:]) / 2


# -- what is measured -----------------------------------------------------------------------------


def best_of(scores, rewards, n):
    """Mean reward of the answer that scores highest of n. Both (P, N), N a multiple of n.

    Worked example: scores 1 3 2 0, rewards 1 0 1 0. Of the pairs 1 3 and 2 0 the second and the
    first answer are taken: (0 + 1) / 2. Of all four the second: 0.
    """
    groups = scores.view(len(scores), -1, n)                                    # (P, N / n, n)
    first = groups.argmax(-1, keepdim=True)
    return rewards.view(groups.shape).gather(-1, first).mean().item()


def kl_of_best(n):
    """KL of best of n to the base, in nats: log n - (n - 1) / n, and less where scores are equal.
    For 1 it is 0, for 4 .636."""
    return math.log(n) - (n - 1) / n


def course(lines):
    """What the evaluations of a run found: accuracy and KL at each, and the best accuracy."""
    seen = {line["step"]: line for line in lines if "eval/accuracy" in line and line["step"]}
    best = max(seen.values(), key=lambda line: line["eval/accuracy"])
    found = {"best": best["eval/accuracy"], "KL at the best": best["eval/kl"]}
    for step in STEPS:
        if step in seen:
            found[f"accuracy at {step}"] = seen[step]["eval/accuracy"]
            found[f"KL at {step}"] = seen[step]["eval/kl"]
    return found


def score(judge, problems, texts):
    """A reward model's scores of n answers to each problem. -> (P, n)"""
    n = len(texts) // len(problems)
    prompts = [problem["prompt"] for problem in problems for _ in range(n)]
    found = [judge(prompts[i:i + 1024], texts[i:i + 1024]) for i in range(0, len(texts), 1024)]
    return torch.tensor(sum(found, [])).view(len(problems), n)


@functools.lru_cache
def of_base(folder, device, size):
    """64 answers of a base model to each held-out problem: texts, rewards (P, 64)."""
    task, model = tasks.Chain(), checkpoint.build_model(checkpoint.read(folder), device)
    problems = evaluate.held_out(task, "test", size)
    return evaluate.answers(model, data.Tokenizer(), task, problems, SimpleNamespace(device=device),
                            max(BEST_OF))[:2]


kept = {}   # a reward model's folder -> its scores of those answers, which several arms need


def measure(model, tokenizer, task, config):
    """The course of the run; with a learned reward also the proxy, how often the reward model ranks
    a held-out pair right, and best of n."""
    folder, judged_by = compare.start_of(config), config.reward_model
    with open(os.path.join(config.out_dir, "metrics.jsonl")) as file:
        found = course([json.loads(line) for line in file])
    if not judged_by:
        return found
    judge = prepare.reward_model(config, judged_by, tokenizer)
    summary = checkpoint.read_json(os.path.join(judged_by, "summary.json"))
    problems = evaluate.held_out(task, "test", config.eval_problems)
    own, *_ = evaluate.answers(model, tokenizer, task, problems, config, 4)
    texts, rewards = of_base(folder, config.device, config.eval_problems)
    if judged_by not in kept:
        kept[judged_by] = score(judge, problems, texts)
    scores = kept[judged_by]                                                    # (P, 64)
    proxy = (score(judge, problems, own).mean() - scores.mean()) / scores.std()
    return {**found, "proxy": proxy.item(), "pairs right": summary["after"]["eval/pair_accuracy"],
            **{f"best of {n}": best_of(scores, rewards, n) for n in BEST_OF}}


# -- the verdict and the picture ------------------------------------------------------------------


def verdict(figures):
    def accuracy(arm):
        return figures[arm]["accuracy"]

    effects, fell, base = {}, {}, accuracy("base")
    for size in SIZES:
        fall = effects[f"fall, {size}"] = common.difference(base, accuracy(size))
        proxy = effects[f"proxy's rise, {size}"] = common.interval(figures[size]["proxy"])
        sides = common.compared(fall, MARGIN), common.compared(proxy, 0)
        fell[size] = True if sides == ("above", "above") else False if "below" in sides else None
        effects[f"rise before, {size}"] = common.difference(figures[size]["best"], base)
        effects[f"best of 64 - base, {size}"] = common.difference(figures[size]["best of 64"], base)
    for arm in ANCHORS:
        if arm in figures:
            effects[f"{arm} - none"] = common.difference(accuracy(arm), accuracy(LARGEST))
    effects["size"] = common.difference(accuracy(LARGEST), accuracy(SMALLEST))
    if SLOWER in figures:   # from here on no part of the rule
        effects[f"{SLOWER} - none"] = common.difference(accuracy(SLOWER), accuracy(LARGEST))
        effects[f"proxy, {SLOWER} - none"] = common.difference(figures[SLOWER]["proxy"],
                                                               figures[LARGEST]["proxy"])
        effects[f"{SLOWER} - beta 1"] = common.difference(accuracy(SLOWER), accuracy("beta 1"))
    for arm in ("verifier", *WRONG, LEAKY):
        if arm in figures:
            effects[f"{arm} - base"] = common.difference(accuracy(arm), base)

    if set(fell.values()) == {False}:
        return common.FAILS, effects
    if True not in fell.values():
        return common.UNCLEAR, effects
    but = [f"{'no' if is_so is False else 'unclear'} with {size}" for size, is_so in fell.items()
           if not is_so]
    parts = {"beta .1 - none": "beta .1", "beta 1 - none": "beta 1", "size": "a larger set"}
    for effect, name in parts.items():
        side = common.compared(effects[effect], MARGIN) if effect in effects else "unclear"
        if side != "above":
            but.append(f"{name} {'does not help' if side == 'below' else 'helps unclearly'}")
    if not but:
        return common.HOLDS, effects
    true = " and ".join(size for size, is_so in fell.items() if is_so)
    return f"{common.CONDITION}the fall with {true}; {'; '.join(but)}", effects


def draw(plt, figures):
    """True accuracy against the KL to the base: on the left learned rewards by the size of their
    set, each as GRPO's course and as best of n; on the right the anchors."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharex=True, sharey=True)
    base = figures["base"]["accuracy"]

    def run(axis, arm, label, color):
        own = figures[arm]
        steps = [step for step in STEPS if f"accuracy at {step}" in own]
        kl = [[0.0], *(own[f"KL at {step}"] for step in steps), own["KL"]]
        x = [sum(v) / len(v) for v in kl]
        values = [base, *(own[f"accuracy at {step}"] for step in steps), own["accuracy"]]
        common.draw_means(axis, x, values, label, color)
        axis.plot(x[-1:], [sum(values[-1]) / len(values[-1])], "s", color=color, markersize=8)

    for i, size in enumerate(SIZES):
        run(axes[0], size, f"GRPO, {size}", f"C{i}")
        of_n = [base, *(figures[size][f"best of {n}"] for n in BEST_OF)]
        axes[0].plot([kl_of_best(n) for n in (1, *BEST_OF)], [sum(v) / len(v) for v in of_n], "x--",
                     color=f"C{i}")
    axes[0].plot([], [], "x--", color="grey", label="best of 4, 16, 64")
    run(axes[1], LARGEST, f"{LARGEST}, no anchor", f"C{len(SIZES) - 1}")
    for i, arm in enumerate(a for a in (*ANCHORS, SLOWER, "verifier") if a in figures):
        label = arm if arm == "verifier" else f"{LARGEST}, {arm}"
        run(axes[1], arm, label, f"C{len(SIZES) + i}")
    for axis, title in zip(axes, ("learned rewards, no anchor", "with an anchor")):
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(-0.05, 200)
        axis.set_xlabel("KL to the base, nats an answer (a square: the end)")
        axis.set_title(title, fontsize=10)
        common.accuracy_axis(axis, fontsize=8, loc="upper right")
    axes[0].set_ylabel("true accuracy (mean and range over seeds)")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
