"""
Offline, semi-online, online: how often must the sampler be renewed? And what if a learner is given
another one's samples?

Claim      Semi-online DPO, whose sampler is renewed every so many updates, is as good as online
           DPO; offline DPO is far behind. So it is with a reference that moves along.
Source     Semi-online: 2506.21495. The tandem: 2405.08448, where a learner that gets the online
           run's own samples in their order repeats that run, and one that gets them shuffled gains
           little over offline (with IPO; with an imitation of the winners it comes up to online).
Here       DPO on chain: 60 updates, the sampler renewed after each, after ten, or never. All draw
           16 answers to each of 32 prompts a step, so offline as well has fresh answers all the
           time: kinder than a fixed set. A moving reference is renewed with the sampler; offline
           it never moves. Each arm has a learning rate of its own.
           The tandem: IPO, and an imitation of the best of each 16 answers, at a rate of 1e-3. An
           online run keeps its batches. From the same start, a learner updates on them in order,
           another shuffled, a third on answers of the start: nothing differs but the batches.
           A first version chose rates on one seed, of one base model; DPO every ten updates with a
           moving reference got 1e-3, with which it falls apart on the other base. With a sweep on
           both, and five seeds, the gap to offline was too uncertain to tell; so there are ten. The
           rule is the same.
Falsified  by offline that comes near online, or by ten updates between renewals that do not.

Rule       Three gaps in held-out accuracy, paired by seed: online - offline; online - every ten
           with the reference fixed; the same with it moving. Each has a 95 % interval, which is
           compared with a margin of .05.
           holds here           the first lies above, the two others below
           with a condition     the first lies above, one other below: named
           does not hold here   the first lies below, or both others above
           cannot be told       any other case, or a replay in order that is not the online run,
                                bit for bit (then the code is wrong)
           The tandem's shuffled and offline learners are effects, no part of the rule.

One task and one length of run: that ten are few enough says nothing of larger steps.

Time       28 minutes on one core (80 runs, and 80 of the tandem); the base models 8 more.
"""

import contextlib
import io
import os
import random
import sys

import common
import compare
import torch
import train
from harness import arms as harness_arms
from harness import checkpoint, prepare
from harness.run import Run
from tqdm import tqdm

ARMS = {"online": "dpo" + common.RATES, "every 10": "dpo:sync_steps=10" + common.RATES,
        "offline": "dpo:sync_steps=inf" + common.RATES,
        "online, moving": "dpo:sync_ref=true" + common.RATES,
        "every 10, moving": "dpo:sync_steps=10:sync_ref=true" + common.RATES}
TANDEM = {"IPO": ("dpo:loss_type=ipo", "dpo:loss_type=ipo:sync_steps=inf"),   # online and offline
          "best of 16": ("rft:keep=best:rounds=60", "rft:keep=best")}
WAYS = ("online", "in order", "shuffled", "offline")
FLAGS = ["--max_steps", "60", "--eval_steps", "60"]
QUICK_ARMS = ARMS
QUICK_FLAGS = ["--max_steps", "20", "--eval_problems", "64"]
SEEDS, SWEEP_SEEDS, BASES = 10, 2, 2
MARGIN = 0.05


# -- the tandem -----------------------------------------------------------------------------------


def recording(Algorithm, batches):
    """Algorithm, which also puts every batch that it samples into a list."""
    class Recording(Algorithm):
        def sample(self, examples, generator, step, log):
            batches.append(super().sample(examples, generator, step, log))
            return batches[-1]
    return Recording


def replaying(Algorithm, batches):
    """Algorithm, which samples nothing: its step i gets batch i of a list."""
    class Replaying(Algorithm):
        def sample(self, examples, generator, step, log):
            return batches[step]
    return Replaying


def shuffled(batches, seed):
    """The same batches in another order."""
    return random.Random(f"tandem {seed}").sample(batches, len(batches))


class Short(Run):
    """A run that is not judged before its first step: what it starts from is known."""

    def evaluate(self, full):
        return super().evaluate(full) if self.step else {}


def learn(config, change, batches):
    """A run of train.py's loop, of change(algorithm, batches); reused if it is finished. -> its
    summary, None after Ctrl-C. The batches stay in its folder."""
    path = os.path.join(config.out_dir, "batches.pt")
    if not (compare.reusable(config) and prepare.is_finished(config) and os.path.exists(path)):
        changed = {**train.ALGORITHMS, config.algo: change(train.ALGORITHMS[config.algo], batches)}
        algo, _, seconds = prepare.build(config, changed)
        with contextlib.redirect_stdout(io.StringIO()), \
                Short(algo, "", pretrain_seconds=seconds) as run:
            train.train(algo, run)
        checkpoint.write(path, lambda tmp: torch.save(batches, tmp))
        if run.finish() is None:
            return None
    return checkpoint.read_json(os.path.join(config.out_dir, "summary.json"))


def furthest(a, b):
    """The largest difference between two runs' parameters: 0 if they are equal bit for bit."""
    a, b = (checkpoint.read(config.out_dir)["model"] for config in (a, b))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def tandem(loss, flags, seed):
    """The four learners of one loss and seed -> {way: summary}, None after Ctrl-C."""
    found, configs = {}, {}
    for way in WAYS:
        word = TANDEM[loss][way == "offline"]
        [stage] = harness_arms.stages(word, flags, seed, train.ALGORITHMS)
        config = configs[way] = stage.config
        config.out_dir = f"out/tandem/{loss}-{way}-{seed}".replace(" ", "_")
        batches, change = [], recording
        if way in ("in order", "shuffled"):
            kept = os.path.join(configs["online"].out_dir, "batches.pt")
            batches, change = torch.load(kept, weights_only=True), replaying
            batches = shuffled(batches, seed) if way == "shuffled" else batches
        summary = learn(config, change, batches)
        if summary is None:
            return None
        away = furthest(config, configs["online"])
        found[way] = {**summary, "measured": {"parameters": away}}
    return found


def extra(asked, made):
    """The tandem's figures; "parameters" is how far the furthest parameter is from that of online.
    None after Ctrl-C."""
    flags, found = [*FLAGS, *(QUICK_FLAGS if asked.quick else common.LONG)], {}
    pairs = [(loss, seed) for loss in TANDEM for seed in range(asked.seeds)]
    for loss, seed in tqdm(pairs, desc="tandem"):
        four = tandem(loss, [*flags, "--base_seed", str(seed % BASES)], seed)
        if four is None:
            return None
        for way, summary in four.items():
            found.setdefault(f"{loss}, {way}", []).append(summary)
    return {name: common.figures_of(runs) for name, runs in found.items()}


# -- the rule and the picture ---------------------------------------------------------------------


def verdict(figures):
    def gap(a, b, measure="accuracy"):
        return common.difference(figures[a][measure], figures[b][measure])

    offline = gap("online", "offline")
    semi = {"fixed": gap("online", "every 10"),
            "moving": gap("online, moving", "every 10, moving")}
    effects = {"online - offline": offline, "online - every 10": semi["fixed"],
               "online - every 10, reference moving": semi["moving"],
               "online: reference moving - fixed": gap("online, moving", "online"),
               "online - offline, ood": gap("online", "offline", "ood")}
    for loss in TANDEM:
        for a, b in (("online", "in order"), ("online", "shuffled"), ("shuffled", "offline")):
            effects[f"{loss}: {a} - {b}"] = gap(f"{loss}, {a}", f"{loss}, {b}")
    sides = {reference: common.compared(effect, MARGIN) for reference, effect in semi.items()}
    close = [reference for reference, side in sides.items() if side == "below"]
    offline = common.compared(offline, MARGIN)
    if any(max(figures[f"{loss}, in order"]["parameters"]) > 0 for loss in TANDEM):
        return common.UNCLEAR, effects
    if offline == "below" or set(sides.values()) == {"above"}:
        return common.FAILS, effects
    if offline != "above" or not close:
        return common.UNCLEAR, effects
    if len(close) == 1:
        return f"{common.CONDITION}with a {close[0]} reference alone", effects
    return common.HOLDS, effects


def draw(plt, figures):
    """Accuracy and KL against the updates between renewals; beside it the tandem's accuracy."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.8))
    lines = {"reference fixed": ("online", "every 10", "offline"),
             "reference moving": ("online, moving", "every 10, moving")}
    for axis, measure in zip(axes, ("accuracy", "KL")):
        for i, (label, arms) in enumerate(lines.items()):
            common.draw_means(axis, range(len(arms)), [figures[arm][measure] for arm in arms],
                              label, f"C{i}")
        axis.set_xticks(range(3), ["1\nonline", "10", "never\noffline"])
        axis.set_xlabel("updates between renewals")
    axes[0].set_title("DPO: held-out accuracy")
    axes[1].set_title("DPO: KL to the start, in nats")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="lower left", ncol=2,
                  bbox_to_anchor=(0.15, 0))
    for i, loss in enumerate(loss for loss in TANDEM if f"{loss}, online" in figures):
        for x, way in enumerate(WAYS):
            common.draw_point(axes[2], x + 0.12 * i, figures[f"{loss}, {way}"]["accuracy"],
                              f"C{2 + i}")
        axes[2].plot([], [], "s", color=f"C{2 + i}", label=loss)
    axes[2].set_xticks(range(4), ["online", "in\norder", "shuf-\nfled", "offline"])
    axes[2].set_xlabel("the learner's batches")
    axes[2].set_title("tandem: held-out accuracy")
    axes[2].legend(frameon=False, loc="lower left")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle("mean and range over seeds", fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
