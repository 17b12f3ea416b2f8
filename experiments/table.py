"""
DFT's offline table, in the small: imitate your own right answers, and weigh each token by belief.

Claim      DFT on the base's own verified answers, offline, is better than RFT and DPO on the same
           answers, and better even than PPO and GRPO, which are online.
Source     2508.05629, the offline setting; its order is DPO < RFT < PPO < GRPO < DFT.
Here       countdown (base .41), where there is room. Offline are DPO, RFT and DFT: all answers come
           from the base, 16 to each of 32 prompts a step. (Fresh ones at each step; the paper has
           four to a question, drawn once.) PPO and GRPO draw as many from the policy. All make 60
           updates: PPO two a step, in 30 steps. Each arm has a learning rate of its own. (First
           with the same rates for all; DPO was best at the lowest, below the base, so its rates
           are lower now.) Beside them, added after a first run had applied the rule to the others:
           AWR, offline as well, all answers weighted by their advantage; SFT and DFT on 1,920
           demonstrations, one right expression of many for each of as many prompts (the paper has
           DFT on such data); and SFT for 30 updates, then GRPO for 30.
Falsified  by an RFT, DPO, PPO or GRPO that DFT does not beat.

Rule       Four gaps in held-out accuracy, paired by seed: DFT - DPO, - RFT, - PPO, - GRPO. Each
           has a 95 % interval, which is compared with a margin of .02.
           holds here           all four lie above
           with a condition     some lie above: named
           does not hold here   all four lie below
           cannot be told       any other case
           AWR, the demonstrations and the chain are effects, no part of the rule.

These are 60 updates, and an online method that still rises may end elsewhere with more. DFT can
only make surer what the base does already; pass@16 shows what that costs.

Time       20 minutes on one core (86 runs); the base models, which others share, 4 more.
"""

import sys

import common

# In the paper's order.
ORDER = {"DPO": "dpo:sync_steps=inf", "RFT": "rft", "PPO": "ppo:max_steps=30:eval_steps=30",
         "GRPO": "grpo", "DFT": "rft:weighting=dft"}
TEXTS = "batch_size=32:num_demonstrations=1920"
HALF = ":max_steps=30:eval_steps=30"
MORE = {"AWR": "rft:weighting=awr", "SFT on texts": f"sft:{TEXTS}",
        "DFT on texts": f"dft:{TEXTS}",
        "SFT>GRPO": f"sft:{TEXTS}{HALF}{common.RATES}>grpo{HALF}"}
ARMS = {arm: word + common.RATES for arm, word in {**ORDER, **MORE}.items()}
ARMS["DPO"] = ORDER["DPO"] + ":learning_rate=3e-5|1e-4|3e-4"
FLAGS = ["--task", "countdown", "--max_steps", "60", "--eval_steps", "60"]
QUICK_ARMS = ARMS
QUICK_FLAGS = ["--max_steps", "10", "--eval_problems", "64"]
SWEEP_SEEDS, BASES = 1, 2
MARGIN = 0.02


def verdict(figures):
    def gap(a, b, measure="accuracy"):
        return common.difference(figures[a][measure], figures[b][measure])

    others, arms = [arm for arm in ORDER if arm != "DFT"], list(ORDER)
    effects = {f"DFT - {arm}": gap("DFT", arm) for arm in others}
    sides = {arm: common.compared(effects[f"DFT - {arm}"], MARGIN) for arm in others}
    for a, b in zip(arms[1:4], arms):   # neighbours in the paper's order
        effects[f"{a} - {b}"] = gap(a, b)
    effects |= {"DFT - RFT, pass@16": gap("DFT", "RFT", "pass@16"),
                "DFT - GRPO, pass@16": gap("DFT", "GRPO", "pass@16"),
                "DFT - GRPO, ood": gap("DFT", "GRPO", "ood")}
    for a, b in (("DFT", "AWR"), ("DFT on texts", "SFT on texts"), ("DFT", "DFT on texts"),
                 ("SFT>GRPO", "GRPO")):   # no part of the rule
        if a in figures and b in figures:
            effects[f"{a} - {b}"] = gap(a, b)
    beaten = [arm for arm in others if sides[arm] == "above"]
    if len(beaten) == len(others):
        return common.HOLDS, effects
    if beaten:
        return f"{common.CONDITION}DFT beats {', '.join(beaten)} alone", effects
    return common.FAILS if set(sides.values()) == {"below"} else common.UNCLEAR, effects


def draw(plt, figures):
    """Accuracy and pass@16 of each arm, first those of the paper in its order; the base is a dashed
    line."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    colors = {"DPO": "C0", "RFT": "C0", "DFT": "C0", "AWR": "C0", "SFT on texts": "C2",
              "DFT on texts": "C2", "SFT>GRPO": "C3"}
    for axis, measure in zip(axes, ("accuracy", "pass@16")):
        for x, arm in enumerate(ARMS):
            common.draw_point(axis, x, figures[arm][measure], colors.get(arm, "C1"))
        base = figures["base"][measure]
        axis.axhline(sum(base) / len(base), color="black", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(ARMS)), [arm.replace(" on ", "\non ").replace(">", "\n>")
                                           for arm in ARMS], fontsize=7)
        axis.set_title(f"held-out {measure}")
        axis.grid(alpha=0.3)
    for label, color in (("offline, the base's answers", "C0"), ("online", "C1"),
                         ("demonstrations", "C2"), ("demonstrations, then online", "C3")):
        axes[0].plot([], [], "s", color=color, label=label)
    axes[0].plot([], [], "--", color="black", label="the base")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="lower center", ncol=5,
                  fontsize=9)
    figure.suptitle("mean and range over seeds, the first five in the paper's order", fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
