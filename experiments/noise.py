"""
Wrong demonstrations, and as many flipped rewards.

Claim      SFT imitates mistakes like anything else. DFT, which weighs a token by the model's own
           belief, passes over what the model knows to be wrong.
Source     2508.05629 (DFT). Its family: 2510.00526 (p^alpha), 2509.23753 (ASFT), 2508.17784
           (PSFT), 2508.11408 (CHORD's weight, p (1 - p)).
Here       A share of the demonstrations of chain, 0, .1, .3 or .6, has one wrong step and the wrong
           answer that follows from it. RFT and GRPO have no demonstrations: their verifier errs as
           often. All make 100 updates of 32; RFT and GRPO sample, and their tokens are counted.
           Each arm has a learning rate of its own at each share.
Falsified  by SFT that loses nothing with a learning rate of its own, or by DFT that loses as much.

Rule       At each share above 0, two effects in held-out accuracy (really right, never flipped),
           paired by seed: the gap, DFT - SFT at this share, and DFT's fall, its accuracy at 0 minus
           that at this share. Each has a 95 % interval, which is compared with a margin of .05.
           The claim is true at a share if the gap lies above and the fall below; false if the gap
           lies below or the fall above; else unclear.
           holds here           true at .1, .3 and .6
           with a condition     true at some: they are named
           does not hold here   false at all
           cannot be told       any other case

Time       45 minutes on one core (256 runs); the base model, which others share, 4 more.
"""

import sys

import common

SHARES = (0.0, 0.1, 0.3, 0.6)
IMITATION = {"SFT": "sft", "DFT": "dft", "power .5": "dft:loss_type=power:alpha=0.5",
             "asft": "dft:loss_type=asft", "psft": "dft:loss_type=psft",
             "chord": "dft:loss_type=chord"}
REWARDED = {"RFT": "rft:rounds=10", "GRPO": "grpo"}
ARMS = {**{f"{arm}, {share}": f"{word}:wrong_share={share}" + common.RATES
           for arm, word in IMITATION.items() for share in SHARES},
        **{f"{arm}, {share}": f"{word}:reward=flipped:flip_probability={share}" + common.RATES
           for arm, word in REWARDED.items() for share in SHARES}}
FLAGS = ["--max_steps", "100", "--eval_steps", "100"]
QUICK_ARMS = {arm: word for arm, word in ARMS.items() if arm.split(", ")[1] in ("0.0", "0.3")}
QUICK_FLAGS = ["--max_steps", "10", "--eval_problems", "32"]
SWEEP_SEEDS = 1
MARGIN = 0.05


def shares_of(figures):
    """Those for which there are figures: --quick has two."""
    return [share for share in SHARES if f"SFT, {share}" in figures]


def verdict(figures):
    def accuracy(arm, share):
        return figures[f"{arm}, {share}"]["accuracy"]

    effects, truth = {}, {}
    for share in shares_of(figures)[1:]:
        gap = common.difference(accuracy("DFT", share), accuracy("SFT", share))
        fall = common.difference(accuracy("DFT", 0.0), accuracy("DFT", share))
        effects |= {f"DFT - SFT at {share}": gap, f"fall of DFT at {share}": fall}
        sides = common.compared(gap, MARGIN), common.compared(fall, MARGIN)
        truth[share] = True if sides == ("above", "below") else None
        if sides[0] == "below" or sides[1] == "above":
            truth[share] = False
    for arm in (*IMITATION, *REWARDED):   # no part of the rule
        if arm != "DFT":
            effects[f"fall of {arm} at 0.3"] = common.difference(accuracy(arm, 0.0),
                                                                 accuracy(arm, 0.3))
    true = [str(share) for share, is_true in truth.items() if is_true]
    if len(true) == len(truth):
        return common.HOLDS, effects
    if true:
        return f"{common.CONDITION}at a share of {' and '.join(true)}", effects
    return common.FAILS if set(truth.values()) == {False} else common.UNCLEAR, effects


def draw(plt, figures):
    """Accuracy against the share of mistakes: on the left who imitates, on the right who is
    rewarded, beside SFT and DFT; below, out of distribution."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharex=True, sharey=True)
    shares = shares_of(figures)
    colors = {arm: f"C{i}" for i, arm in enumerate([*IMITATION, *REWARDED])}
    for row, measure in zip(axes, ("accuracy", "ood")):
        for axis, arms in zip(row, (IMITATION, ("SFT", "DFT", *REWARDED))):
            for arm in arms:
                values = [figures[f"{arm}, {share}"][measure] for share in shares]
                common.draw_means(axis, shares, values, arm, colors[arm])
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.3)
        row[0].set_ylabel({"accuracy": "held-out accuracy", "ood": "out of distribution"}[measure])
    for axis, what in zip(axes[1], ("wrong demonstrations", "wrong demonstrations or rewards")):
        axis.set_xlabel(f"share of {what}")
        axis.set_xticks(SHARES)
    for axis in axes[0]:
        axis.legend(frameon=False, loc="lower left")
    figure.suptitle("mean and range over seeds", fontsize=9)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
