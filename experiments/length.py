"""
Which way of averaging the loss makes wrong answers longer?

Claim      Dividing each answer's loss by its own length (GRPO's 1/|y|) blames a token of a long
           wrong answer less than one of a short wrong answer: wrong answers grow. A constant in its
           place (Dr. GRPO), or the mean over all tokens of the batch (DAPO), does not do that.
Source     2503.20783 (Dr. GRPO), 2503.14476 (DAPO). That 1/|y| alone turns the expected gradient
           is proved on an enumerated world in tests/identities/test_aggregation.py; here is the
           question whether it shows in lengths.
Here       Wrong answers must last, and their length must be free. Most worlds of this repository
           lack one or the other: on chain they die out (five or six terms as well, if the base was
           taught them), on countdown an expression has about one length (7.5 tokens for wrong and
           7.7 for right ones, whatever the average, in a pilot). So the base, which has seen three
           and four terms, is trained on three to six. With five and six it has to write more steps
           than it ever saw, stops too early or goes astray, and stays wrong; an answer may be as
           long as 60 tokens. Three arms differ in --loss_type alone: 100 updates on 32 x 8 answers.
           Advantages are divided by the deviation in all of them. Each has the learning rate, of
           5e-4, 1e-3 and 2e-3, that is best in accuracy on the sweep's seed. (In a first version
           all had 1e-3, for Adam divides the gradient by its size: a smaller constant is no smaller
           step.)
           Lengths are those of sampled answers to held-out problems of five and six terms, so that
           they do not grow because the easier problems drop out. (Trained on five and six terms
           alone, one pilot run of 60 updates went the other way: wrong answers of 8.9 tokens with
           grpo, 15.4 with dr_grpo.) One base model; few tokens beside the thousands of a reasoning
           model, and no room for idle talk.
Falsified  by wrong answers of the arm grpo that are no longer than those of the other two.

Rule       Three effects in tokens, paired by seed, whose 95 % intervals are compared with a margin
           of 1 token (a step of a worked answer has 6): the growth of wrong answers with grpo from
           the base on, and the gaps grpo - dr_grpo and grpo - dapo in their length.
           holds here           growth and both gaps lie above
           with a condition     both gaps lie above and the growth below: wrong answers are longer
                                than with the others, but do not grow; or the growth and one gap lie
                                above and the other gap below: named
           does not hold here   both gaps lie below
           cannot be told       any other case
           No part of the rule: the length of right answers, and the same at equal rates: 1e-3,
           which was all of the first version, and 5e-4, which was added when that had left the
           intervals wide. The rule is the same, the rates that it reads are not.

Time       19 minutes on one core (44 runs); the base model 1 more.
"""

import sys

import common
import tasks
from harness import evaluate, prepare

START = "out/length-base"
WORDS = {name: f"grpo:init_from={START}:max_steps=100:num_generations=8:loss_type={name}"
         for name in ("grpo", "dr_grpo", "dapo")}
EQUAL = ("1e-3", "5e-4")
ARMS = {**{name: f"{word}:learning_rate=5e-4|1e-3|2e-3" for name, word in WORDS.items()},
        **{f"{name} at {rate}": f"{word}:learning_rate={rate}"
           for rate in EQUAL for name, word in WORDS.items()}}
# The base of --pretraining long, with shorter problems than those of the arms.
FIRST = [f"--algo pretrain --pretraining short {prepare.LONG_FLAGS} --seed 0 --min_terms 3 "
         f"--max_terms 4 --max_new_tokens 0 --out_dir {START}"]
FLAGS = ["--min_terms", "3", "--max_terms", "6", "--max_new_tokens", "60", "--eval_steps", "100"]
QUICK_ARMS = {arm: ARMS[arm].replace("=100", "=10") for arm in WORDS}
QUICK_FLAGS = ["--eval_problems", "32"]
SWEEP_SEEDS = 1
MARGIN = 1.0
HARD = 5, 6   # terms of the problems by which lengths are judged
SAMPLES = 8   # answers to each


def mean_length(lengths, which):
    """The mean of the lengths for which `which` is True; 0 where it is for none. (n,), (n,)"""
    return lengths[which].float().mean().item() if which.any() else 0.0


def measure(model, tokenizer, task, config):
    """Of sampled answers to held-out problems of five and six terms: how long the wrong and the
    right ones are, which share is right, and which share used up all tokens."""
    problems = tasks.Chain(*HARD).problems("test", config.eval_problems, seed=0)
    _, rewards, lengths, _ = evaluate.answers(model, tokenizer, task, problems, config, SAMPLES)
    right, lengths = rewards.flatten() > 0.5, lengths.flatten()               # (P SAMPLES,)
    return {"wrong": mean_length(lengths, ~right), "right": mean_length(lengths, right),
            "hard": right.float().mean().item(),
            "at limit": (lengths >= task.max_new_tokens).float().mean().item()}


def verdict(figures):
    effects = {}
    for measure in ("wrong", "right"):
        for suffix in ("", *(f" at {rate}" for rate in EQUAL)):   # the rule reads three of them
            pairs = [(name, "base") for name in WORDS] + [("grpo", "dr_grpo"), ("grpo", "dapo")]
            for name, other in pairs if f"grpo{suffix}" in figures else []:
                beside = other if other == "base" else other + suffix
                effects[f"{measure} answers, {name} - {other}{suffix}"] = common.difference(
                    figures[name + suffix][measure], figures[beside][measure])
    growth, *gaps = (common.compared(effects[f"wrong answers, grpo - {arm}"], MARGIN)
                     for arm in ("base", "dr_grpo", "dapo"))
    if gaps == ["below", "below"]:
        return common.FAILS, effects
    if gaps == ["above", "above"] and growth != "unclear":
        return common.HOLDS if growth == "above" else (
            f"{common.CONDITION}wrong answers are longer than with the others, but do not "
            "grow"), effects
    if growth == "above" and sorted(gaps) == ["above", "below"]:
        beside = "dr_grpo" if gaps[0] == "above" else "dapo"
        return f"{common.CONDITION}beside {beside} alone", effects
    return common.UNCLEAR, effects


def draw(plt, figures):
    """How long wrong and right answers are before and after; beside it what they are worth."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = ((("wrong", "wrong answers"), ("right", "right answers")),
              (("accuracy", "accuracy, all problems"), ("hard", "accuracy, 5 and 6 terms"),
               ("at limit", "answers that used up all tokens")))
    arms = [arm for arm in ("base", *ARMS) if arm in figures]
    for axis, measures in zip(axes, panels):
        for i, (measure, label) in enumerate(measures):
            for x, arm in enumerate(arms):   # a little apart, so that none hides another
                common.draw_point(axis, x + 0.2 * (i - 1), figures[arm][measure], f"C{i}")
            axis.plot([], [], "s", color=f"C{i}", label=label)
        axis.set_xticks(range(len(arms)), [arm.replace(" at ", "\n") for arm in arms], fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("tokens per answer, 5 and 6 terms")
    axes[1].set_ylabel("share (mean and range over seeds)")
    axes[1].set_ylim(-0.03, 1.03)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    common.start(sys.modules[__name__])
