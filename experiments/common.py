"""
What the experiments share: flags, runs, learning rates, statistics, results.

An experiment is a script of its own, run by `python experiments/NAME.py [--seeds N] [--quick]
[--jobs N]`. It holds its claim (the docstring), and

    ARMS, FLAGS               {name: arm, as compare.py writes it}; the flags of all arms
    QUICK_ARMS, QUICK_FLAGS   the arms of --quick, and the flags that it adds
    SWEEP_SEEDS               how many seeds choose among an arm's values
    verdict, draw             the rule, and the picture

and, where it needs them,

    BASES                     how many base models: seed s starts from base s % BASES [1]
    SEEDS                     how many seeds, where five do not tell [5]
    FIRST                     commands of train.py, for what the arms need besides a base model
    measure                   (model, tokenizer, task, config) -> {name: figure}, what train.py
                              does not print, of each finished run
    START                     whether `measure` also judges what the runs start from [True]
    extra                     (asked, the arms so far) -> {name: figures} of what is no run of
                              train.py, None after Ctrl-C; they join the arms' figures
    SHOWN                     the arms that the picture shows [all]
    choose                    {variant: its runs of the sweep} -> the variant that stands for the
                              arm [the highest mean accuracy]
    judge                     (run of the sweep) -> what stands for it in the results, in place of
                              its accuracy; the highest mean is chosen

`{seed}` in an arm or in FIRST stands for the run's seed. There are two parts:

    1. The sweep: every arm whose word has several values (`sft:learning_rate=1e-3|3e-3`) is run
       with each of them, on seeds of their own (from 100). The best mean stands for the arm.
    2. The figures: every arm with the chosen values on seeds 0, 1, 2, ...

So the choice does not flatter the figures. (Both parts are judged by the same held-out problems.)
All runs are those of compare.py: in out/, reused if they are finished, resumed if they are not.

The rule is a function of the figures, written before the run; the start has figures like an arm:

    verdict({"base": ..., arm: {"accuracy": [one per seed], ...}})
        -> (one of the four verdicts, {name: effect})

An effect is a mean over seeds with its 95 % interval. `compared` says on which side of a margin the
interval lies, and a rule decides by that alone.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import compare  # noqa: E402
import train  # noqa: E402
from harness import arms as harness_arms  # noqa: E402
from harness import chat, checkpoint, flags, prepare, report  # noqa: E402
from harness.errors import InputError, one_line  # noqa: E402

HOLDS, FAILS = "holds here", "does not hold here"
UNCLEAR = "cannot be told at this scale"
CONDITION = "holds with a condition: "
RATES = ":learning_rate=3e-4|1e-3|3e-3"
SWEEP_SEED = 100   # the first seed of the sweep; the figures' own seeds are below
LONG = ["--pretraining", "long"]   # the base models of all figures; --quick makes do with short

# Student's t, 97.5 %, for 1, 2, ... 30 degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
     2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
     2.052, 2.048, 2.045, 2.042)


# -- statistics -----------------------------------------------------------------------------------


def interval(values):
    """The mean of n numbers with its 95 % t interval: mean +- t(n-1) s / sqrt(n).

    -> {"mean", "low", "high", "n"}; of one number low and high are None. Above 31 numbers t is that
    of 31, a little too wide. Raises ValueError for no numbers.

    Worked example: of 1, 2, 3 the mean is 2 and s is 1: 2 +- 4.303 / sqrt(3) = 2 +- 2.484.
    """
    n = len(values)
    if not n:
        raise ValueError("an interval needs at least one number")
    mean = sum(values) / n
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    half = T[min(n - 1, len(T)) - 1] * math.sqrt(variance / n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def difference(a, b):
    """The interval of a - b, seed by seed: both arms have the same seeds, hence the same
    demonstrations or prompts. Raises ValueError for lists of different lengths.

    Worked example: [.9, .8] - [.5, .6] are .4 and .2: .3 +- 12.706 x .1 = .3 +- 1.271.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} figures cannot be paired")
    return interval([x - y for x, y in zip(a, b)])


def compared(effect, margin):
    """Where an effect lies: "above" the margin or "below" it with its whole interval, else
    "unclear"; so is every effect of one seed.

    Worked example, margin .05: .06 to .10 is above, -.20 to .04 is below, .01 to .09 is unclear.
    """
    if effect["low"] is None or effect["low"] <= margin <= effect["high"]:
        return "unclear"
    return "above" if effect["low"] > margin else "below"


# -- flags ----------------------------------------------------------------------------------------


def parse(name, doc, argv, seeds=5):
    """The flags that all experiments have; seeds: the default. Raises InputError."""
    parser = flags.Parser(prog=f"{name}.py", description=doc, allow_abbrev=False,
                          usage=f"python experiments/{name}.py [--seeds N] [--quick] [--jobs N]",
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help=f"how many seeds [{seeds}; with --quick 1]")
    parser.add_argument("--quick", action="store_true",
                        help="one seed, few steps, no sweep: does it run? It gives no verdict")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time [1]")
    asked = parser.parse_args(flags.underscores(argv))
    if asked.seeds is None:
        asked.seeds = 1 if asked.quick else seeds
    if not 1 <= asked.seeds <= SWEEP_SEED:
        raise InputError(f"--seeds {asked.seeds}: 1 to {SWEEP_SEED} are possible")
    if asked.jobs < 1:
        raise InputError(f"--jobs {asked.jobs}: at least 1 is needed")
    asked.again = shlex.join(["python", f"experiments/{name}.py", *argv])
    return asked


# -- runs -----------------------------------------------------------------------------------------


def middle(word):
    """The variant of a word that stands for it where nothing is swept."""
    variants = harness_arms.values(word)
    return variants[len(variants) // 2]


def plan(words, common, seeds, bases):
    """[Arm], word by word, value by value and seed by seed. Seed s starts from base s % bases.
    Raises InputError for an arm that cannot be run."""
    words, by_seed = list(words), []
    for seed in seeds:
        own = [word.replace("{seed}", str(seed)) for word in words]
        arms = compare.plan(own, [*common, "--base_seed", str(seed % bases)], seed, 1)
        written = [(word, variant) for word in words for variant in harness_arms.values(word)]
        by_seed.append([arm._replace(word=word, variant=variant)
                        for arm, (word, variant) in zip(arms, written)])
    return [arm for same in zip(*by_seed) for arm in same]


def make_first(words, common, seeds, bases, asked, commands):
    """Check all arms, and make what they start from: what `commands` make, and base models. ->
    False after Ctrl-C."""
    variants = dict.fromkeys(variant for word in words for variant in harness_arms.values(word))
    planned, first = plan(variants, common, seeds, bases), []
    for seed in seeds if commands else ():
        for command in commands:
            own = command.replace("{seed}", str(seed)).split()   # its flags win, as an arm's do
            argv = [*common, "--seed", str(seed), "--base_seed", str(seed % bases), *own]
            config = flags.parse(argv, train.ALGORITHMS, train.GPTConfig)
            first += [*prepare.check(config, train.ALGORITHMS), config]

    def make(configs):
        return all(prepare.is_finished(config) or
                   train.run(config, asked.again, asked.again) != 130 for config in configs)
    return make(first) and make(harness_arms.check(planned, train.ALGORITHMS))


def measured(measure, folder, config):
    """measure(model, tokenizer, task, config) -> {name: number}, for the model in a folder."""
    model = checkpoint.build_model(checkpoint.read(folder), config.device)
    task = prepare.make_task(config, model.config.block_size)
    return measure(model, chat.tokenizer_of(config), task, config)


def rows(planned, jobs, measure=None, start=True):
    """Run what was planned -> the rows of compare.json, None after Ctrl-C. What `measure` finds
    stands under "measured"; with start, what it finds of the start stands under "start"."""
    made = compare.run_all(planned, jobs)
    if made is None:
        return None
    found, starts = [compare.result(arm, made) for arm in planned], {}
    if measure:
        for arm, row in zip(tqdm(planned, desc="judging", unit="run"), found):
            config, folder = arm.stages[-1].config, compare.start_of(arm.stages[0].config)
            row["measured"] = measured(measure, config.out_dir, config)
            if start and folder not in starts:
                starts[folder] = measured(measure, folder, config)
            row["start"] = starts.get(folder, {})
    return found


def figures_of(runs, when="after", own="measured"):
    """{measure: [one figure per run]} for what report.MEASURES names and the runs have, and what
    was measured besides; a measure that one of them lacks is left out. when="before", own="start":
    of what they started from, which has no costs."""
    found, names = {}, {}
    for title, keys, _ in report.MEASURES:
        if keys[0] == "after":
            names[title] = (when, *keys[1:])
        elif when == "after":
            names[title] = keys
    if when == "after":
        names |= {"before": ("before", "eval/accuracy"), "seconds": ("seconds",)}
    names |= {name: (own, name) for name in runs[0].get(own, {})}
    for title, keys in names.items():
        values = []
        for run in runs:
            value = run
            for key in keys:
                value = value.get(key) if value is not None else None
            values.append(value)
        if None not in values:
            found[title] = values
    return found


def run_arms(experiment, words, common, asked):
    """words: {arm: word}. -> ({arm: its figures, variant and sweep}, figures of the start), None
    after Ctrl-C."""
    bases = getattr(experiment, "BASES", 1)
    swept = {} if asked.quick else {arm: word for arm, word in words.items() if "|" in word}
    sweep_seeds = range(SWEEP_SEED, SWEEP_SEED + experiment.SWEEP_SEEDS) if swept else ()
    if not make_first(words.values(), common, [*range(asked.seeds), *sweep_seeds], bases, asked,
                      getattr(experiment, "FIRST", [])):
        return None
    chosen, tried = {arm: middle(word) for arm, word in words.items()}, {}
    if swept:
        planned = plan(swept.values(), common, sweep_seeds, bases)
        print(f"part 1 of 2, the sweep: {len(planned)} runs; part 2 has "
              f"{len(words) * asked.seeds}", flush=True)
        results = rows(planned, asked.jobs)
        if results is None:
            return None
        by_word = report.by_arm(results)
        for arm, word in swept.items():
            runs_of = by_word[word]
            if hasattr(experiment, "judge"):
                tried[arm] = {variant: [experiment.judge(run) for run in runs]
                              for variant, runs in runs_of.items()}
                chosen[arm] = max(tried[arm], key=lambda variant: sum(tried[arm][variant]))
            else:
                tried[arm] = {variant: figures_of(runs)["accuracy"]
                              for variant, runs in runs_of.items()}
                chosen[arm] = getattr(experiment, "choose", report.chosen)(runs_of)
    # An arm may have chosen what another arm is.
    planned = plan(dict.fromkeys(chosen.values()), common, range(asked.seeds), bases)
    print(f"{'part 2 of 2, ' if swept else ''}the figures: {len(planned)} runs", flush=True)
    results = rows(planned, asked.jobs, getattr(experiment, "measure", None),
                   getattr(experiment, "START", True))
    if results is None:
        return None
    by_word = report.by_arm(results)
    made = {arm: {"variant": variant, "sweep": tried.get(arm, {}),
                  "seeds": [run["seed"] for run in by_word[variant][variant]],
                  "figures": figures_of(by_word[variant][variant])}
            for arm, variant in chosen.items()}
    first = by_word[next(iter(chosen.values()))]
    return made, figures_of(next(iter(first.values())), "before", "start")


# -- results --------------------------------------------------------------------------------------


def lines_of(found):
    """JSON with each list of numbers on a line of its own.

    Worked example: {"a": [1, 2.5]} in two lines of braces and one of `"a": [1, 2.5]`.
    """
    text = json.dumps(found, indent=1)
    return re.sub(r"\[\n[-+\d.eE,\s]+\]", lambda m: " ".join(m[0].split()).replace("[ ", "[")
                  .replace(" ]", "]"), text) + "\n"


def shown(effect):
    """`+0.300 (-0.971 to +1.571)`"""
    if effect["low"] is None:
        return f"{effect['mean']:+.3f} (one seed: no interval)"
    return f"{effect['mean']:+.3f} ({effect['low']:+.3f} to {effect['high']:+.3f})"


def table(figures):
    """A row an arm: means over seeds with half the range. A measure named `... at 10`, one moment
    of many, is for the picture and left out."""
    known = [title for title, _, _ in report.MEASURES]
    own = [n for arm in figures.values() for n in arm
           if n not in (*known, "before", "seconds") and not re.search(r" at \d", n)]
    names = [n for n in dict.fromkeys(("accuracy", "pass@16", "ood", "reversing", "facts", "chain",
                                       "KL", "length", *own, "updates", "sampled", "trained",
                                       "seconds"))
             if any(n in arm for arm in figures.values())]
    lines = [["", *names]]
    for name, arm in figures.items():
        cells = [name]
        for measure in names:
            v, small = arm.get(measure), measure not in ("updates", "sampled", "trained")
            text = "-" if v is None else f"{sum(v) / len(v):,.{3 if small else 0}f}"
            spread = v is not None and small and len(v) > 1 and measure != "seconds"
            cells.append(text + (f" +-{(max(v) - min(v)) / 2:.3f}" if spread else ""))
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                               for i, (cell, w) in enumerate(zip(line, widths))) for line in lines)


def draw_means(axis, x, values, label, color):
    """A line through the means over seeds, a band from the lowest to the highest seed. x: numbers,
    values: for each of them the figures of all seeds."""
    axis.plot(x, [sum(v) / len(v) for v in values], "o-", color=color, label=label, markersize=4)
    axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color,
                      alpha=0.2, linewidth=0)


def draw_point(axis, x, values, color):
    """A square at the mean over seeds, whiskers from the lowest to the highest."""
    mean = sum(values) / len(values)
    axis.errorbar([x], [mean], yerr=[[mean - min(values)], [max(values) - mean]], color=color,
                  fmt="s", capsize=4, markersize=5)


def accuracy_axis(axis, **legend):
    """From 0 to 1 with a little room, a light grid, a legend without a frame."""
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, **legend)


def picture(path, draw, figures):
    """draw(pyplot, figures) -> a matplotlib figure, saved. Returns what to tell the reader."""
    plt = report.pyplot()
    if plt is None:
        return report.NO_PICTURE
    figure = draw(plt, figures)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def main(experiment, argv):
    """Run an experiment, the module of a script -> exit code. Results go to experiments/results/,
    those of --quick to out/quick/."""
    name = os.path.basename(experiment.__file__).removesuffix(".py")
    asked = parse(name, experiment.__doc__, argv, getattr(experiment, "SEEDS", 5))
    words, common, folder = experiment.ARMS, [*experiment.FLAGS, *LONG], "experiments/results"
    if asked.quick:
        words, common = experiment.QUICK_ARMS, [*experiment.FLAGS, *experiment.QUICK_FLAGS]
        folder = "out/quick"
    prepare.check_folder(folder)
    if asked.jobs > 1:   # the runs share the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // asked.jobs)))
    found, more = run_arms(experiment, words, common, asked), {}
    if found is not None and hasattr(experiment, "extra"):
        more = experiment.extra(asked, found[0])
    if found is None or more is None:
        print(f"\nstopped; go on with: {asked.again}")
        return 130
    made, base = found
    figures = {"base": base, **{arm: row["figures"] for arm, row in made.items()}, **more}
    verdict, effects = experiment.verdict(figures)
    if asked.quick:   # too few steps to conclude anything
        verdict = UNCLEAR
    path = os.path.join(folder, f"{name}.json")
    checkpoint.write_text(path, lines_of({
        "experiment": name, "verdict": verdict, "effects": effects,
        "settings": {"command": asked.again, "flags": common, "arms": words, "seeds": asked.seeds,
                     "sweep_seeds": 0 if asked.quick else experiment.SWEEP_SEEDS,
                     "bases": getattr(experiment, "BASES", 1)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "base": base, "arms": made, **({"extra": more} if more else {})}))
    drawn = picture(os.path.join(folder, f"{name}.png"), experiment.draw, figures)
    print(f"\n{table(figures)}\n")
    for what, effect in effects.items():
        print(f"{what}: {shown(effect)}")
    print(f"verdict: {verdict}\nfiles: {path}, {drawn}")
    return 0


def start(experiment):
    sys.exit(one_line(lambda: main(experiment, sys.argv[1:])))
