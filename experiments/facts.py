"""
What imitation alone can teach: facts that the model does not believe yet.

Claim      DFT weighs a token by the model's own belief in it, so what the model thinks impossible
           is learned slowly or never; RL rewards only answers that are sampled. SFT learns it.
Source     DFT's weight and its limits: 2508.05629. p^alpha between SFT (0) and DFT (1), for models
           that know little or much of the answer: 2510.00526.
Here       Fifty facts that no text told (`k73=` is `87`), from a base that knows fifty others.
           Weights p^alpha with alpha 0 (SFT), .25, .5, .75 and 1 (DFT), and GRPO on the same
           prompts. All make 300 updates of 32 prompts, GRPO with 16 answers each; only GRPO
           samples. DFT a second time with four times the updates: is it slow or stuck? (No part of
           the rule.) What is kept of the old skills is shown as well, at the rates that were best
           for the new facts alone.
Falsified  by DFT or GRPO that reach SFT, each with a learning rate of its own, swept like SFT's.

Rule       Two gaps in accuracy on the facts, SFT - DFT and SFT - GRPO, paired by seed. Each has a
           95 % interval, which is compared with a margin of .05.
           holds here           both intervals lie above
           with a condition     one lies above, the other below: named
           does not hold here   both lie below
           cannot be told       any other case, or SFT itself has learned less than half

Time       10 minutes on one core (77 runs); the base model, which others share, 4 more.
"""

import sys

import common

BELIEF = {"SFT": 0.0, "alpha .25": 0.25, "alpha .5": 0.5, "alpha .75": 0.75, "DFT": 1.0}   # alpha
ARMS = {"SFT": "sft" + common.RATES,
        **{name: f"dft:loss_type=power:alpha={alpha}" + common.RATES
           for name, alpha in BELIEF.items() if 0 < alpha < 1},
        "DFT": "dft" + common.RATES, "DFT, x4": "dft:max_steps=1200" + common.RATES,
        "GRPO": "grpo" + common.RATES}
FLAGS = ["--task", "facts", "--other_skills", "--max_steps", "300", "--eval_steps", "300"]
QUICK_ARMS = {arm: word for arm, word in ARMS.items() if arm != "DFT, x4"}
QUICK_FLAGS = ["--max_steps", "60"]
SWEEP_SEEDS = 2
MARGIN = 0.05


def verdict(figures):
    sft = figures["SFT"]["accuracy"]
    effects = {f"SFT - {arm}": common.difference(sft, figures[arm]["accuracy"])
               for arm in figures if arm not in ("SFT", "base")}
    gaps = {arm: common.compared(effects[f"SFT - {arm}"], MARGIN) for arm in ("DFT", "GRPO")}
    if sum(sft) / len(sft) < 0.5 or "unclear" in gaps.values():
        return common.UNCLEAR, effects
    stalls = [arm for arm, gap in gaps.items() if gap == "above"]
    if len(stalls) == 1:
        return f"{common.CONDITION}for {stalls[0]} alone", effects
    return common.HOLDS if stalls else common.FAILS, effects


def draw(plt, figures):
    """Accuracy on the new facts and on what was known before, against alpha; the others beside
    it."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    alphas = list(BELIEF.values())
    beside = [arm for arm in ("DFT, x4", "GRPO") if arm in figures]
    places = [1.25 + 0.25 * i for i in range(len(beside))]
    panels = [("new facts", ["accuracy"]),
              ("kept of what was known", ["facts", "reversing", "chain"])]
    for axis, (title, measures) in zip(axes, panels):
        for i, measure in enumerate(measures):
            label = {"accuracy": "new facts", "facts": "old facts"}.get(measure, measure)
            common.draw_means(axis, alphas, [figures[arm][measure] for arm in BELIEF], label,
                              f"C{i}")
            for x, arm in zip(places, beside):   # a little apart, so that none hides another
                common.draw_point(axis, x + 0.04 * (i - len(measures) // 2),
                                  figures[arm][measure], f"C{i}")
        axis.set_title(title)
        names = {"DFT, x4": "4 x\nDFT"}
        axis.set_xticks([*alphas, *places], ["0\nSFT", ".25", ".5", ".75", "1\nDFT",
                                             *(names.get(arm, arm) for arm in beside)])
        axis.set_xlabel("weight p^alpha of a token")
        common.accuracy_axis(axis, loc="center left")
    axes[0].set_ylabel("accuracy (mean and range over seeds)")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
