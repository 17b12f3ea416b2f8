"""
When does on-policy sampling matter?

Claim      On-policy sampling matters where the reward's peak is unlikely under the reference
           policy. Where the two are aligned, offline methods and imitation do as well. And a
           negative gradient, one that pushes bad answers down, speeds learning.
Source     Tajwar and others, 2404.14367: a bandit, then a token version, then language models.
Here       The bandit: 100 actions, a policy that is a table of logits, a reference with most
           of its mass near action 20 (Laplace, scale 8), and a reward exp(-((a - peak) / 10)^2)
           whose peak moves from 20 (aligned: the reference earns .64) to 70 (far: .003). There is
           no prompt and no network, so nothing generalises: what is not sampled moves by the
           softmax alone. The token version: answers of 4 tokens, a table for each position, and
           the mean of the tokens' rewards. (The paper's is a transformer that writes 9 tokens, and
           its bandit has several states and a small network.)
Arms       rft    imitate the best of each group of 10     sampler renewed never (inf), every 100 or
           dpo    a pair: the best of it, and one worse    10 updates, or every update (1: online)
           ipo    the same pairs (inf and 1 alone)
           pg     GRPO's loss and its advantages, not divided by the deviation; pg positive takes
                  the positive advantages alone, on the same samples: no negative gradient
           Every arm makes as many updates and draws as many answers. Offline means that all of
           them come from the reference: fresh ones, which is kinder than a fixed set.
Falsified  by an offline arm that comes as far as its online one where the peak is far; by one that
           stays behind where they are aligned; by pg positive learning as fast as pg.

The verdict, by verdict() below. A gap is the difference of two arms' final expected reward (exact,
no sampling; at best about 1), paired by seed, with its 95 % interval. It is "large" if the whole
interval is above .1, "small" if all of it is below, else unclear. Each arm has the learning rate
(and, with dpo and ipo, the beta) that did best in the very figure compared, at that peak, on other
seeds than those reported. The bandit's verdict is the experiment's; the token version has its own.
With 20 seeds, and 8 for the choice, two of the bandit's gaps were unclear; so there are 100, and
16. The rule is the same.

    holds here             for rft, dpo and ipo the gap online - offline is large at peak 70 and
                           small at 20; pg - offline rft is small at 20; and pg's reward, averaged
                           over the updates at peak 70, is above pg positive's by more than .02
    holds with a condition for at least one of rft, dpo and ipo it is large at 70 and small at 20;
                           what failed or is unclear is named
    does not hold here     for none of the three, and each has a far gap that is small or an
                           aligned one that is large
    cannot be told         otherwise; a single seed has no interval

    python experiments/peak.py             100 seeds, 3 minutes
    python experiments/peak.py --quick     one seed, half a minute
"""

import argparse
import json
import math
import pathlib
import platform
import re
import sys
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))   # so that the algorithm files are found from any folder

import data  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import rft  # noqa: E402
from common import (CONDITION, FAILS, HOLDS, UNCLEAR, compared, difference,  # noqa: E402
                    interval)
from harness import report  # noqa: E402
from harness.checkpoint import write, write_text  # noqa: E402
from harness.errors import InputError, one_line  # noqa: E402

ALIGNED, FAR = 20, 70
LARGE, FASTER = 0.1, 0.02   # gaps of the final reward, and of its mean over the updates
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
BETAS = (0.1, 0.01)         # of dpo and ipo
SWEEP_SEEDS = range(1000, 1016)


class Arm(NamedTuple):
    """A loss, and how many updates pass between two renewals of the sampler."""
    loss: str             # rft, dpo, ipo, pg or pg positive
    sync: float = 1.0     # as dpo's sync_steps: 1 is online, inf offline

    @property
    def name(self):
        return self.loss if self.loss.startswith("pg") else f"{self.loss} {self.sync:g}"


ARMS = [*(Arm(loss, sync) for loss in ("rft", "dpo") for sync in (math.inf, 100, 10, 1)),
        Arm("ipo", math.inf), Arm("ipo", 1), Arm("pg"), Arm("pg positive")]
FAMILIES = ("rft", "dpo", "ipo")
TIMED = ("rft 1", "dpo 1", "pg", "pg positive")   # those whose speed is compared at the far peak


class World(NamedTuple):
    """The bandit and how long it is played. One table of logits for each peak and seed."""
    tokens: int = 1
    peaks: tuple = (20, 30, 40, 50, 60, 70)
    steps: int = 400
    groups: int = 10             # groups of num_generations answers at each update
    num_generations: int = 10
    actions: int = 100
    centre: int = 20             # of the reference
    scale: float = 8.0
    width: float = 10.0          # of the reward
    record: int = 5              # updates between two measurements


class Run(NamedTuple):
    """What training gives: peaks x seeds (M, S, ..), measured at `updates`."""
    updates: list
    rewards: torch.Tensor        # (M, S, number of updates) exact expected reward

    @property
    def final(self):
        """(M, S) after the last update."""
        return self.rewards[..., -1]

    @property
    def mean(self):
        """(M, S) over the updates: the sooner it learns, the higher."""
        return self.rewards.mean(-1)


# -- the bandit -----------------------------------------------------------------------------------


def reference(world):
    """Logits (A,) of the reference: a discrete Laplace distribution."""
    distance = (torch.arange(world.actions, dtype=torch.float64) - world.centre).abs()
    return -distance / world.scale


def bump(world, peak):
    """Reward (A,) of each action: 1 at the peak, 1/e at a width from it."""
    distance = torch.arange(world.actions, dtype=torch.float64) - peak
    return (-(distance / world.width) ** 2).exp()


def expected_reward(logits, bumps):
    """logits (N, T, A), bumps (N, A) -> (N,): exact, for an answer earns the mean of its tokens."""
    return (logits.softmax(-1) * bumps[:, None]).sum(-1).mean(1)


def random_numbers(world, seed):
    """All of a seed's, shared by the arms and the peaks: what picks the actions (steps, T, B) and
    what picks the pairs (steps, B), B = groups x num_generations."""
    generator = torch.Generator().manual_seed(seed)
    B = world.groups * world.num_generations
    draws = torch.rand(world.steps, world.tokens, B, generator=generator, dtype=torch.float64)
    return draws, torch.rand(world.steps, B, generator=generator, dtype=torch.float64)


def sample(logits, uniforms):
    """Actions by the inverse of the distribution function. (N, T, A), (N, T, B) -> (N, T, B)

    Worked example: probabilities .2, .3, .5 and the random numbers .1, .2, .6 give 0, 1, 2.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    actions = torch.searchsorted(cumulative, uniforms.contiguous(), right=True)
    return actions.clamp(max=logits.shape[-1] - 1)   # the last sum may be a little below 1


# -- the losses, all of them the project's own ----------------------------------------------------


def arm_loss(loss, logprobs, ref_logprobs, rewards, uniforms, num_generations, beta=0.1):
    """The loss summed over the tables, each with its own answers, as a mean over them.

    logprobs, ref_logprobs (N, B, T); rewards, uniforms (N, B). Tables share no parameter, so each
    gets the gradient that it would get alone. Raises ValueError for an unknown loss.
    """
    N, B, T = logprobs.shape
    grouped = rewards.view(-1, num_generations)                                 # (N P, G)
    logprobs, mask = logprobs.reshape(N * B, T), torch.ones(N * B, T, dtype=logprobs.dtype)
    tables = mask.view(N, B, T)   # weights are a table's own: vmap hands over one after the other
    if loss == "rft":
        row_weights = rft.kept(grouped, "best").view(N, B)
        weights = torch.vmap(rft.token_weights)(tables, row_weights)            # (N, B, T)
        return (rft.token_losses(logprobs) * weights.flatten(0, 1)).sum()
    if loss in ("dpo", "ipo"):
        rows = data.choose_pairs(grouped, uniforms.view_as(grouped))            # (2 pairs,)
        logps, ref_logps = logprobs.sum(-1)[rows], ref_logprobs.reshape(N * B, T).sum(-1)[rows]
        lengths = mask.sum(-1)[rows]
        losses = dpo.preference_loss(logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2],
                                     lengths[0::2], lengths[1::2],
                                     {"dpo": "sigmoid", "ipo": "ipo"}[loss], beta)
        table = rows[0::2] // B                                                 # whose pair it is
        return (losses / table.bincount(minlength=N)[table]).sum()
    if loss in ("pg", "pg positive"):
        config = grpo.GRPOConfig(num_generations=num_generations, scale_rewards="none",
                                 advantage_sign="positive" if loss == "pg positive" else "both")
        advantages = grpo.batch_advantages({"rewards": rewards.flatten()}, config, ["verifier"],
                                           [1.0], logprobs.dtype)               # (N B,)
        losses, _, _ = grpo.policy_loss(logprobs, logprobs.detach(), advantages, mask)
        weights = torch.vmap(grpo.token_weights)(tables)                        # (N, B, T)
        return (losses * weights.flatten(0, 1)).sum()
    raise ValueError(f"loss {loss!r}: choose from rft, dpo, ipo, pg, pg positive")


def train(arm, learning_rate, beta, world, seeds):
    """Play the bandit for every peak and seed at once. -> Run"""
    draws, picks = zip(*(random_numbers(world, seed) for seed in seeds))
    draws, picks = torch.stack(draws, 1), torch.stack(picks, 1)    # (steps, S, T, B), (steps, S, B)
    M, S = len(world.peaks), len(seeds)
    bumps = torch.stack([bump(world, peak) for peak in world.peaks])
    bumps = bumps.repeat_interleave(S, 0)                                       # (N, A)
    ref_logits = reference(world).expand(M * S, world.tokens, -1)               # (N, T, A)
    logits = ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    updates, measured = [], []
    for step in range(world.steps + 1):
        if step % world.record == 0 or step == world.steps:
            updates.append(step)
            measured.append(expected_reward(logits.detach(), bumps))
        if step == world.steps:
            break
        if step % arm.sync == 0:                                   # with inf at step 0 alone
            sampler = logits.detach().clone()
        actions = sample(sampler, draws[step].repeat(M, 1, 1))                  # (N, T, B)
        rewards = bumps.gather(1, actions.flatten(1)).view_as(actions).mean(1)  # (N, B)
        logprobs = logits.log_softmax(-1).gather(-1, actions).mT                # (N, B, T)
        ref_logprobs = ref_logits.log_softmax(-1).gather(-1, actions).mT
        optimizer.zero_grad()
        arm_loss(arm.loss, logprobs, ref_logprobs, rewards, picks[step].repeat(M, 1),
                 world.num_generations, beta).backward()
        optimizer.step()
    return Run(updates, torch.stack(measured, -1).view(M, S, -1))


# -- the sweep, then the runs that are reported ---------------------------------------------------


def settings_of(arm, quick=False):
    """What is swept: (learning rate, beta). One setting with --quick."""
    betas = BETAS if arm.loss in ("dpo", "ipo") else BETAS[:1]
    return [(0.1, BETAS[0])] if quick else [(lr, beta) for lr in LEARNING_RATES for beta in betas]


def best_setting(sweep, measure, peak_index):
    """The setting with the highest mean over the sweep's seeds. sweep: {setting: Run}; measure:
    final or mean. The first of equals."""
    return max(sweep, key=lambda s: getattr(sweep[s], measure)[peak_index].mean().item())


def play(world, seeds, sweep_seeds, bar, quick=False):
    """Sweep each arm, then run it on the reported seeds with what did best at each peak. -> {arm:
    {"peak 20, final": figures, ...}}"""
    found = {}
    for arm in ARMS:
        sweep = {}
        for setting in settings_of(arm, quick):
            sweep[setting] = train(arm, *setting, world, sweep_seeds)
            bar.update()
        wanted = [(peak, "final") for peak in world.peaks]
        wanted += [(FAR, "mean")] if arm.name in TIMED else []
        best = {(peak, measure): best_setting(sweep, measure, world.peaks.index(peak))
                for peak, measure in wanted}
        runs = {}
        for setting in dict.fromkeys(best.values()):   # one run for all peaks that it is best at
            peaks = tuple(dict.fromkeys(peak for peak, m in best if best[peak, m] == setting))
            run = train(arm, *setting, world._replace(peaks=peaks), seeds)
            runs.update({(setting, peak): Run(run.updates, run.rewards[i]) for i, peak
                         in enumerate(peaks)})
        found[arm.name] = {}
        for (peak, measure), setting in best.items():
            means = {f"{lr:g} {beta:g}": getattr(r, measure)[world.peaks.index(peak)].mean().item()
                     for (lr, beta), r in sweep.items()}
            found[arm.name][f"peak {peak}, {measure}"] = {
                "learning_rate": setting[0], "beta": setting[1],
                "sweep": {name: round(mean, 4) for name, mean in means.items()},
                **figures(runs[setting, peak], measure, peak)}
    return found


def figures(run, measure, peak):
    """What the results keep of an arm at a peak: the figure of each seed, and for the picture the
    quartiles over seeds of the reward at each measurement."""
    kept = {"per_seed": [round(x, 6) for x in getattr(run, measure).tolist()]}
    if measure == "final" and peak in (ALIGNED, FAR):
        quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        kept["updates"] = run.updates
        kept["quartiles"] = [[round(x, 4) for x in line]
                             for line in run.rewards.quantile(quarters, dim=0).tolist()]
    return kept


# -- figures and the verdict ----------------------------------------------------------------------


def gap(arms, first, second, peak, measure="final"):
    """The interval of first - second, seed by seed."""
    return difference(*(arms[name][f"peak {peak}, {measure}"]["per_seed"]
                        for name in (first, second)))


def gaps(arms):
    """What verdict() reads, {name: interval}; the last one is for the reader."""
    found = {}
    for family in FAMILIES:
        found[f"{family} far"] = gap(arms, f"{family} 1", f"{family} inf", FAR)
        found[f"{family} aligned"] = gap(arms, f"{family} 1", f"{family} inf", ALIGNED)
    found["imitation"] = gap(arms, "pg", "rft inf", ALIGNED)
    found["speed"] = gap(arms, "pg", "pg positive", FAR, "mean")
    found["speed of dpo over rft"] = gap(arms, "dpo 1", "rft 1", FAR, "mean")
    return found


def verdict(found):
    """The rule at the head of this file. found: what gaps() returns -> one of the four verdicts, a
    condition with what it is."""
    far = {f: compared(found[f"{f} far"], LARGE) for f in FAMILIES}
    aligned = {f: compared(found[f"{f} aligned"], LARGE) for f in FAMILIES}
    held = [f for f in FAMILIES if far[f] == "above" and aligned[f] == "below"]
    if not held:
        decided = all(far[f] == "below" or aligned[f] == "above" for f in FAMILIES)
        return FAILS if decided else UNCLEAR
    but = []
    for f in FAMILIES:
        if far[f] != "above":
            but.append(f"{f} gains {'little' if far[f] == 'below' else 'unclearly'} where the peak "
                       "is far")
        if aligned[f] != "below":
            but.append(f"{f} gains {'much' if aligned[f] == 'above' else 'unclearly'} where they "
                       "are aligned")
    imitation, speed = compared(found["imitation"], LARGE), compared(found["speed"], FASTER)
    if imitation != "below":
        but.append("imitation is " + ("behind" if imitation == "above" else "unclear")
                   + " where they are aligned")
    if speed != "above":
        but.append("a negative gradient does not speed learning" if speed == "below" else
                   "whether a negative gradient speeds learning is unclear")
    if not but:
        return HOLDS
    return f"{CONDITION}online sampling matters for {', '.join(held)}; " + "; ".join(but)


# -- what is written ------------------------------------------------------------------------------


def summary(name, result):
    """The table that is printed: final reward, mean over seeds, by arm and peak; then the gaps."""
    peaks = result["settings"]["peaks"]
    lines = [f"{name}: final expected reward, mean over seeds",
             f"{'peak':14}" + "".join(f"{peak:>8}" for peak in peaks),
             f"{'reference':14}" + "".join(f"{r:8.3f}" for r in result["reference"])]
    for arm, found in result["arms"].items():
        means = [interval(found[f"peak {peak}, final"]["per_seed"])["mean"] for peak in peaks]
        lines.append(f"{arm:14}" + "".join(f"{m:8.3f}" for m in means))
    for gap, of in result["gaps"].items():
        spread = "one seed" if of["n"] == 1 else f"{of['low']:+.3f} to {of['high']:+.3f}"
        lines.append(f"  {gap:22} {of['mean']:+.3f}   {spread}")
    return "\n".join([*lines, f"verdict: {result['verdict']}"])


def draw(plt, path, result):
    """Three panels: the reward over the updates, at the aligned and at the far peak; and what
    sampling online adds, against what the reference earns."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4))
    colours = {"rft": "C0", "dpo": "C1", "ipo": "C2", "pg": "C3", "pg positive": "C4"}
    names = {"rft": "best of 10, imitated", "dpo": "DPO", "ipo": "IPO", "pg": "policy gradient",
             "pg positive": "its positive half"}
    for axis, peak, how in zip(axes, (ALIGNED, FAR), ("likely", "unlikely")):
        for arm in (Arm("rft", math.inf), Arm("rft"), Arm("dpo", math.inf), Arm("dpo"), Arm("pg"),
                    Arm("pg positive")):
            found = result["arms"][arm.name][f"peak {peak}, final"]
            low, mid, high = found["quartiles"]
            where = "" if arm.loss.startswith("pg") else \
                ", offline" if arm.sync == math.inf else ", online"
            axis.plot(found["updates"], mid, color=colours[arm.loss], label=names[arm.loss] + where,
                      linestyle="--" if arm.sync == math.inf else "-")
            axis.fill_between(found["updates"], low, high, color=colours[arm.loss], alpha=0.2,
                              linewidth=0)
        axis.set_title(f"peak at {peak}: {how} under the reference", fontsize=10)
        axis.set_xlabel("updates")
        axis.set_ylabel("expected reward: median, quartiles")
        axis.set_ylim(-0.03, 1.03)
    for family in FAMILIES:
        points = [gap(result["arms"], f"{family} 1", f"{family} inf", peak)
                  for peak in result["settings"]["peaks"]]
        mean = [p["mean"] for p in points]
        errors = None if points[0]["n"] == 1 else \
            [[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]]
        axes[2].errorbar(result["reference"], mean, yerr=errors, color=colours[family], marker="o",
                         capsize=3, label=names[family])
    axes[2].set_xscale("log")
    axes[2].axhline(0, color="grey", linewidth=0.8)
    axes[2].set_title("what sampling online adds", fontsize=10)
    axes[2].set_xlabel("expected reward of the reference")
    axes[2].set_ylabel("online - offline, final reward, 95 %")
    axes[2].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", fontsize=9, ncol=3,
                  bbox_to_anchor=(0.34, 0), frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight", format="png")
    plt.close(figure)


def save(folder, results):
    """Write peak.json and, with matplotlib, peak.png. -> their names"""
    path = pathlib.Path(folder) / "peak.json"
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text)   # a list, a line
    write_text(str(path), text + "\n")
    plt = report.pyplot()
    if plt is None:
        return f"{path}; {report.NO_PICTURE}"
    picture = str(path.with_suffix(".png"))
    write(picture, lambda tmp: draw(plt, tmp, results["worlds"]["bandit"]))
    return f"{path}, {picture}"


def experiment(worlds, seeds, sweep_seeds, quick=False):
    """All of it: worlds {name: World}. -> the results, with the verdict of the first world."""
    began, results = time.monotonic(), {}
    total = len(worlds) * sum(len(settings_of(arm, quick)) for arm in ARMS)
    with tqdm(total=total, desc="settings", unit="setting") as bar:
        for name, world in worlds.items():
            arms = play(world, seeds, sweep_seeds, bar, quick)
            ref_logits = reference(world).expand(1, world.tokens, -1)
            found = gaps(arms)
            results[name] = {
                "verdict": verdict(found), "gaps": found,
                "reference": [expected_reward(ref_logits, bump(world, peak)[None]).item()
                              for peak in world.peaks],
                "settings": world._asdict(),
                "sampled_tokens": world.steps * world.groups * world.num_generations * world.tokens,
                "arms": arms}
    first = next(iter(results.values()))
    return {"name": "peak", "verdict": first["verdict"],
            "settings": {"seeds": list(seeds), "sweep_seeds": list(sweep_seeds),
                         "learning_rates": LEARNING_RATES, "betas": BETAS, "large": LARGE,
                         "faster": FASTER},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "seconds": round(time.monotonic() - began, 1), "worlds": results}


def main(argv):
    parser = argparse.ArgumentParser(prog="experiments/peak.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="how many seeds [100; with --quick 1]")
    parser.add_argument("--quick", action="store_true",
                        help="one seed, no sweep, into out/experiments: does it run?")
    asked = parser.parse_args(argv)
    if asked.seeds is None:
        asked.seeds = 1 if asked.quick else 100
    if not 1 <= asked.seeds <= SWEEP_SEEDS[0]:
        raise InputError(f"--seeds {asked.seeds}: 1 to {SWEEP_SEEDS[0]} are possible")
    torch.set_num_threads(1)
    worlds = {"bandit": World(), "tokens": World(tokens=4, peaks=(ALIGNED, FAR))}
    results = experiment(worlds, range(asked.seeds), SWEEP_SEEDS[:1 if asked.quick else None],
                         asked.quick)
    folder = ROOT / "out" / "experiments" if asked.quick else ROOT / "experiments" / "results"
    files = save(folder, results)
    print("\n\n".join(summary(name, result) for name, result in results["worlds"].items()))
    print(f"\n{results['seconds']:.0f} s; files: {files}")
    return 0


if __name__ == "__main__":
    sys.exit(one_line(lambda: main(sys.argv[1:])))
