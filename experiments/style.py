"""
Memorise, forget, keep: what another notation costs, and what reinforcement learning keeps.

Claim      SFT memorises, RL generalises: on problems that training does not show, SFT ends below
           where it began and RL above. And forgetting follows the KL that training moves the
           policy by (RL's Razor).
Source     2501.17161 (SFT memorises, RL generalises), 2509.04259 (RL's Razor).
Here       Chain. Demonstrations that are right, 400 or 4,000, in the base model's own notation
           (`7+5=2;2*3=6`) or a foreign one: letters (`a7+5=2;a2*3=6`), swapped (`5+7=2;3*2=6`), or
           each in one of the three (mixed). SFT on each, DFT on the own one and, added after the
           first run, on letters (at SFT's rates it fell to .06 in the sweep, so it has lower ones
           instead: 3e-4, 1e-3 and 3e-3); on the same prompts RFT with 20 rounds, online DPO and
           GRPO, 8 answers each: they keep their own notation.
           All make 150 updates of 32; mixed makes 450, so that it meets each style as often (in a
           pilot it had reached .43 after 200). The base knows two skills more, reversing and facts.
           ood are problems with `>`, which the base knows and post-training never shows. The base
           works out three answers in ten there; who carries the habit over gains. KL is that of
           the policy to the base on held-out problems; forward KL, that of the paper, is the other
           way round, along the base's answers. Rates are chosen by the accuracy on the task alone,
           which takes a larger one for SFT in the own style (1e-3) than for GRPO (3e-4); what is
           kept follows the rate too, so that this pair shows no difference of the methods.
           SFT's demonstrations are given; RL's are its own: sampling, negative answers and notation
           differ at once, except for SFT in the own notation.
Falsified  by SFT that does not fall below the base out of distribution, or by GRPO that does not
           rise. The own style asks whether it is imitation or the teacher's notation.

Rule       Out of distribution, paired by seed: SFT - base for each of own, letters and swapped,
           with 4,000 demonstrations, and GRPO - base. Each has a 95 % interval. The claim is true
           of a style if GRPO - base lies above .05 and SFT - base below -.05; false if GRPO - base
           lies below .05 or SFT - base above -.05; unclear otherwise, or where SFT or GRPO has
           less than .9 on the task itself.
           holds here           true of all three styles
           with a condition     true of some: they are named
           does not hold here   false of all three
           cannot be told       any other case
           RL's Razor has no part in it: it is shown as the rank correlation, over the arms, of the
           KL and what was lost, one for each seed. Arms with foreign notation and arms without are
           two clusters, which alone make it high.

Time       22 minutes on one core (85 runs); the base models, which others share, 2 more.
"""

import sys

import common
import compare
import torch
from harness import checkpoint, evaluate

STYLES = ("own", "letters", "swapped")
NUMBERS = {"few": 400, "many": 4000}
OWN, FOREIGN = ":learning_rate=3e-4|1e-3", ":learning_rate=3e-3|6e-3"   # the range: by a pilot
RATES = {"own": OWN, "letters": FOREIGN, "swapped": FOREIGN}
ARMS = {**{f"SFT, {style}, {size}": f"sft:style={style}:num_demonstrations={n}" + RATES[style]
           for size, n in NUMBERS.items() for style in STYLES},
        "DFT, own": "dft:style=own:num_demonstrations=4000" + OWN,
        "DFT, letters": "dft:style=letters:num_demonstrations=4000" + common.RATES,
        **{arm: f"{word}:num_generations=8" + OWN
           for arm, word in (("RFT", "rft:rounds=20"), ("DPO", "dpo"), ("GRPO", "grpo"))},
        "SFT, mixed, x3": "sft:style=mixed:num_demonstrations=4000:max_steps=450" + FOREIGN}
FLAGS = ["--other_skills", "--max_steps", "150", "--eval_steps", "150"]
QUICK_ARMS = {arm: word for arm, word in ARMS.items() if "x3" not in arm}
QUICK_FLAGS = ["--max_steps", "4", "--eval_problems", "32"]
SWEEP_SEEDS, BASES = 1, 2
MARGIN, LEARNED = 0.05, 0.9


@torch.no_grad()
def measure(model, tokenizer, task, config):
    """{"forward KL": KL(base || policy) along the base's answers to held-out problems}"""
    base = checkpoint.build_model(checkpoint.read(compare.start_of(config)), config.device)
    problems = evaluate.held_out(task, "test", config.eval_problems)
    _, _, _, kl = evaluate.answers(base, tokenizer, task, problems, config, ref_model=model)
    return {"forward KL": max(0.0, kl.mean().item())}   # rounding may fall below 0


def ranks(values):
    """1 for the smallest; equal ones share the mean of their places: 3 1 3 -> 2.5 1 2.5."""
    return [sum(w < v for w in values) + (1 + values.count(v)) / 2 for v in values]


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks, 0 where one of them is constant.

    Worked example: 1 2 9 and 5 8 7 have the ranks 1 2 3 and 1 3 2: 1/2.
    """
    a, b = ([r - (len(x) + 1) / 2 for r in ranks(list(values))] for values in (x, y))
    size = (sum(r * r for r in a) * sum(r * r for r in b)) ** 0.5
    return sum(r * s for r, s in zip(a, b)) / size if size else 0.0


def verdict(figures):
    base, grpo = figures["base"], figures["GRPO"]
    effects = {"GRPO - base, ood": common.difference(grpo["ood"], base["ood"])}
    rises, truth = common.compared(effects["GRPO - base, ood"], MARGIN), {}
    for style in STYLES:
        sft = figures[f"SFT, {style}, many"]
        change = common.difference(sft["ood"], base["ood"])
        effects |= {f"SFT {style} - base, ood": change,
                    f"GRPO - SFT {style}, ood": common.difference(grpo["ood"], sft["ood"])}
        sides = rises, common.compared(change, -MARGIN)
        truth[style] = True if sides == ("above", "below") else None
        if sides[0] == "below" or sides[1] == "above":
            truth[style] = False
        if min(sum(arm["accuracy"]) / len(arm["accuracy"]) for arm in (sft, grpo)) < LEARNED:
            truth[style] = None
    if "DFT, letters" in figures:   # from here on no part of the rule
        dft = figures["DFT, letters"]
        for measure in ("accuracy", "ood"):
            effects[f"DFT letters - SFT letters, {measure}"] = common.difference(
                dft[measure], figures["SFT, letters, many"][measure])
    arms = [figures[arm] for arm in figures if arm != "base"]
    for kl in ("KL", "forward KL"):
        for kept in ("ood", "reversing", "facts"):
            effects[f"{kl} and {kept} lost, rank correlation"] = common.interval(
                [rank_correlation([arm[kl][i] for arm in arms],
                                  [base[kept][i] - arm[kept][i] for arm in arms])
                 for i in range(len(base[kept]))])
    true = [style for style, is_true in truth.items() if is_true]
    if len(true) == len(STYLES):
        return common.HOLDS, effects
    if true:
        return f"{common.CONDITION}of SFT on {' and '.join(true)}", effects
    return common.FAILS if set(truth.values()) == {False} else common.UNCLEAR, effects


def draw(plt, figures):
    """Each arm on the task and out of distribution; what is kept, against the KL."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 5), width_ratios=[1.1, 1, 1])
    arms = [arm for arm in ARMS if arm in figures]

    def mean(arm, *names):
        return sum(sum(figures[arm][n]) / len(figures[arm][n]) for n in names) / len(names)
    for name, label, color, marker in (("accuracy", "on the task", "C0", "s"),
                                       ("ood", "out of distribution", "C3", "o")):
        for place, arm in enumerate(arms):
            values, middle = figures[arm][name], mean(arm, name)
            axes[0].errorbar([middle], [-place], xerr=[[middle - min(values)],
                                                       [max(values) - middle]],
                             color=color, fmt=marker, markersize=5, capsize=3)
        axes[0].axvline(mean("base", name), color=color, linestyle=":")
        axes[0].plot([], [], marker, color=color, label=label)
    axes[0].set_yticks([-place for place in range(len(arms))], arms)
    axes[0].set_xlim(-0.03, 1.03)
    axes[0].set_xlabel("accuracy (dotted: base)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="upper left", ncols=2)
    colors = {"SFT": "C0", "DFT": "C1", "RFT": "C2", "DPO": "C4", "GRPO": "C3"}
    for axis, title, names in zip(axes[1:], ("out of distribution", "reversing and facts"),
                                  (["ood"], ["reversing", "facts"])):
        for arm in arms:
            values = [sum(seed) / len(names) for seed in zip(*(figures[arm][n] for n in names))]
            common.draw_point(axis, mean(arm, "forward KL"), values, colors[arm.split(",")[0]])
        axis.axhline(mean("base", *names), color="black", linestyle=":")
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
        axis.set_xlabel("KL(base || policy), nats an answer")
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[1].set_ylabel("kept, mean and range (dotted: base)")
    for algo, color in colors.items():
        axes[2].plot([], [], "s", color=color, label=algo)
    axes[2].legend(frameon=False, loc="center right")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
