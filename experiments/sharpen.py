"""
Sharper or broader: how often one answer is right, and how often at least one of many.

Claim      Reinforcement learning from verifiable rewards raises pass@1 and lowers pass@k at large k
           below the base model's: it sharpens what is there. MaxRL's normaliser, a KL to the start,
           an entropy bonus and negative advantages alone each keep more of the breadth.
Source     2504.13837 (pass@k against k), 2602.02710 (MaxRL), 2505.22617 (the collapse of the
           entropy), 2506.01347 (positive or negative samples alone).
Here       Countdown, `3,5,7>26=` is `3*7+5`: many answers are right, and the base writes them at
           once. GRPO; RFT with 20 rounds; and GRPO with one change: MaxRL's normaliser, beta .05,
           entropy_coef .01, the negative advantages alone, or the positive ones alone. All make 80
           updates of 16 prompts with 16 answers each (RFT and one sign alone train on fewer of the
           tokens). The positive ones were added when the rule had been applied to the others,
           whose figures are the same; like RFT they are no part of it.
           pass@k is estimated without bias from 64 answers to each of 256 held-out problems, and so
           is that of the two base models. A remedy has one strength; only its rate is swept.
           An answer here is one expression of few tokens: what long reasoning does cannot be seen.
           Nor can problems that the base never solves: at k = 64 it solves nearly all.
Falsified  by GRPO that gains at k = 1 and loses nothing at k = 64; by remedies that do not help.

Rule       Effects are differences in pass@k, paired by seed. Each has a 95 % interval, which is
           compared with a margin of .05. GRPO sharpens if GRPO - base lies above the margin at
           k = 1 and below minus the margin at k = 64. A remedy (MaxRL, KL, entropy, negative) keeps
           breadth if remedy - base at k = 1 and remedy - GRPO at k = 64 both lie above.
           holds here           GRPO sharpens, and all four remedies keep breadth
           with a condition     GRPO sharpens: the remedies that keep breadth are named, or "no
                                remedy keeps breadth"
           does not hold here   GRPO - base lies above the margin at k = 1, and above minus the
                                margin at k = 64
           cannot be told       any other case

Time       10 minutes on one core (49 runs); the base models, which others share, 3 more.
"""

import sys

import common
import tasks
from harness import evaluate

KS = (1, 2, 4, 8, 16, 32, 64)
REMEDIES = {"MaxRL": "grpo:scale_rewards=mean:loss_type=dr_grpo", "KL": "grpo:beta=0.05",
            "entropy": "grpo:entropy_coef=0.01", "negative": "grpo:advantage_sign=negative"}
RATES = ":learning_rate=3e-4|1e-3"   # at 3e-3 GRPO fell below the base in a pilot
ARMS = {arm: word + RATES
        for arm, word in {"GRPO": "grpo", "RFT": "rft:rounds=20", **REMEDIES,
                          "positive": "grpo:advantage_sign=positive"}.items()}
FLAGS = ["--task", "countdown", "--batch_size", "16", "--max_steps", "80", "--eval_steps", "80",
         "--eval_problems", "128"]
QUICK_ARMS = ARMS
QUICK_FLAGS = ["--max_steps", "4", "--eval_problems", "32"]
SWEEP_SEEDS, BASES = 1, 2
MARGIN = 0.05


def measure(model, tokenizer, task, config):
    """{"p@1": ..., "p@64": ...}: pass@k from 64 answers to each held-out problem."""
    problems = evaluate.held_out(task, "test", 256)
    _, rewards, _, _ = evaluate.answers(model, tokenizer, task, problems, config, max(KS))
    return {f"p@{k}": evaluate.pass_at_k(rewards, k) for k in KS}


def verdict(figures):
    def gap(a, b, k):
        effect = effects[f"{a} - {b} at k = {k}"] = common.difference(figures[a][f"p@{k}"],
                                                                      figures[b][f"p@{k}"])
        return effect

    effects = {}
    gain = common.compared(gap("GRPO", "base", 1), MARGIN)
    change = common.compared(gap("GRPO", "base", 64), -MARGIN)
    broad = [arm for arm in REMEDIES
             if [common.compared(gap(arm, "base", 1), MARGIN),
                 common.compared(gap(arm, "GRPO", 64), MARGIN)] == ["above", "above"]]
    for arm in ("RFT", "positive"):   # no part of the rule
        gap(arm, "base", 1)
        gap(arm, "GRPO", 64)
    if gain != "above" or change == "unclear":
        return common.UNCLEAR, effects
    if change == "above":
        return common.FAILS, effects
    if len(broad) == len(REMEDIES):
        return common.HOLDS, effects
    kept = f"breadth is kept by {', '.join(broad)} alone" if broad else "no remedy keeps breadth"
    return f"{common.CONDITION}{kept}", effects


def draw(plt, figures):
    """pass@k against k: on the left whose answers are learned from, on the right what is added to
    GRPO; the base and random expressions beside both."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
    colors = {arm: f"C{i}" for i, arm in enumerate(ARMS)}
    chance = [tasks.Countdown().chance(k) for k in KS]
    titles = {"the answers learned from": ("GRPO", "RFT", "positive", "negative"),
              "what is added to GRPO": ("GRPO", "MaxRL", "KL", "entropy")}
    for axis, (title, arms) in zip(axes, titles.items()):
        base = [sum(figures["base"][f"p@{k}"]) / len(figures["base"][f"p@{k}"]) for k in KS]
        axis.plot(KS, base, "--", color="black", label="base")
        for arm in arms:
            common.draw_means(axis, KS, [figures[arm][f"p@{k}"] for k in KS], arm, colors[arm])
        axis.plot(KS, chance, ":", color="gray", label="random expressions")
        axis.set_xscale("log", base=2)
        axis.set_xticks(KS, [str(k) for k in KS])
        axis.set_xlabel("k, answers to a problem")
        axis.set_title(title)
        common.accuracy_axis(axis, loc="lower right")
    axes[0].set_ylabel("pass@k (mean and range over seeds)")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
