"""
What a run shows to people: the console line, tables, problems answered before and after, pictures.
"""

import json
import os
import re
import sys

import torch
from tqdm import tqdm

from harness import checkpoint, evaluate, hub, ranks

# Console columns: the metric's name in metrics.jsonl, its heading, its format. A column shows if
# the run has the metric.
COLUMNS = [
    ("step", "step", "{:d}"), ("reward", "reward", "{:.3f}"), ("true_reward", "true", "{:.3f}"),
    ("loss", "loss", "{:+.3f}"), ("nll", "nll", "{:.3f}"), ("mean_weight", "weight", "{:.2f}"),
    ("frac_weight_near_zero", "unweighted", "{:.2f}"), ("kept", "kept", "{:.2f}"),
    ("mu", "mu", "{:.2f}"), ("open", "open", "{:.2f}"),
    ("rewards/chosen", "chosen", "{:+.2f}"), ("rewards/rejected", "rejected", "{:+.2f}"),
    ("rewards/margins", "margin", "{:.2f}"), ("skipped_pairs", "skipped", "{:.2f}"),
    ("accuracy", "accuracy", "{:.3f}"), ("loss/value", "value loss", "{:.3f}"),
    ("teacher_kl", "to teacher", "{:.3f}"),
    ("policy/approxkl", "moved", "{:.3f}"), ("eval/pair_accuracy", "heldout pairs", "{:.3f}"),
    ("eval/accuracy", "heldout", "{:.3f}"), ("eval/loss", "heldout nll", "{:.3f}"),
    ("eval/worked", "worked", "{:.2f}"), ("completions/mean_length", "length", "{:.1f}"),
    ("eval/kl", "KL", "{:.2f}"), ("entropy", "entropy", "{:.3f}"), ("grad_norm", "grad", "{:.2f}"),
    ("max_ratio", "ratio", "{:.2f}"), ("clip_ratio", "clipped", "{:.3f}"),
    ("frac_reward_zero_std", "flat", "{:.2f}"),
    ("tokens_per_second/sample", "sample/s", "{:,.0f}"),
    ("tokens_per_second/train", "train/s", "{:,.0f}"), ("left", "left", "{}"),
]
LEGEND = """\
heldout: accuracy on held-out problems (sampled)   worked: share of answers with worked steps
length: tokens per answer   KL: from the start model, per answer   sample/s, train/s: tokens/second
"""   # each algorithm adds its own columns

NOTHING = "nothing held out to judge by"
MADE_FIRST = {"pretrain": "pre-training one first (once; every algorithm starts from it)",
              "rm": "training one first (once)"}


def duration(seconds):
    """75 -> `1:15`"""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Console:
    """One aligned line per logging interval, under a heading that is printed once. Pre-training, of
    which a reader wants to know only when it ends, shows a progress bar in its place."""

    def __init__(self, config, step):
        self.columns, self.bar = None, None
        if config.algo == "pretrain":
            self.bar = tqdm(total=config.max_steps, initial=step, desc="pretrain", unit="step",
                            mininterval=1, disable=ranks.RANK > 0)

    def show(self, line, seconds_left):
        """line: what metrics.jsonl gets; empty where none is due."""
        if self.bar is not None:
            self.bar.update()
            if line:
                self.bar.set_postfix({k: f"{line[k]:.3f}" for k in ("loss", "eval/accuracy")
                                      if k in line})
        elif line:
            self.print({**line, "left": duration(seconds_left)})

    def print(self, line):
        if self.columns is None:
            self.columns = [c for c in COLUMNS if c[0] in line]
            print("  ".join(f"{title:>{max(len(title), 6)}}" for _, title, _ in self.columns))
        cells = [(form.format(line[name]) if name in line else "", title)
                 for name, title, form in self.columns]
        print("  ".join(f"{cell:>{max(len(title), 6)}}" for cell, title in cells), flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


# -- before and after a run -----------------------------------------------------------------------


def opening(algo, resumed_at=0):
    """What is about to happen, with the answers to the questions that the numbers will raise."""
    config = algo.config
    if config.algo == "pretrain":
        return f"Pre-training into {config.out_dir}"
    start = f" from step {resumed_at}" if resumed_at else ""
    how = getattr(algo.task, "understood", "")   # of a file with other columns than ours
    read = f"{config.data}: {how}\n" if how else ""
    if hasattr(algo.tokenizer, "described"):   # of a published model
        read += f"{algo.tokenizer.described()}\n"
    return (f"\n{read}{config.algo} on {algo.task.name}: {algo.model.num_parameters():,} "
            f"parameters, {config.device}, {config.dtype}, {config.max_steps} steps of "
            f"{config.batch_size}{start}, into {config.out_dir}\n"
            + ("" if algo.model.config.scalar_head else LEGEND) + algo.legend)


def needed_line(config, kind, finished, otherwise=""):
    """One line on a base model or a reward model that a run needs. otherwise: with which settings
    it was made that are not today's."""
    if finished:
        summary = checkpoint.read_json(os.path.join(config.out_dir, "summary.json"))
        made = f"made earlier in {summary['seconds']:.0f} s"
        if otherwise:
            made += f" with {otherwise}: delete the folder to have it made anew"
        return f"{kind}: {config.out_dir} ({made})"
    return f"No {kind.lower()} in {config.out_dir} yet: {MADE_FIRST[config.algo]}."


def shared_line(kind, summary, folder):
    """One line on a base model or a reward model that has just been made."""
    a = summary["after"]
    line = f"{kind}: {folder}, made in {duration(summary['seconds'])}"
    if "eval/pair_accuracy" in a:
        line += (f": right about {a['eval/pair_accuracy']:.1%} of {a['eval/pairs']} held-out "
                 "pairs")
    if "eval/accuracy" in a:
        line += f": held-out accuracy {a['eval/accuracy']:.3f}"
    if "eval/worked" in a:
        line += (f"; worked steps in {a['eval/worked']:.0%} of its answers, right "
                 f"{a['eval/accuracy_when_worked']:.0%} of the time")
    return line


ROWS = [("accuracy, sampled", "eval/accuracy", 1),
        ("accuracy, greedy", "eval/greedy_accuracy", None),
        ("pass@4", "eval/pass@4", 4), ("pass@16", "eval/pass@16", 16),
        ("out of distribution", "eval/ood_accuracy", 1),
        ("kept: reversing", "eval/kept/reversing", None), ("kept: facts", "eval/kept/facts", None),
        ("kept: chain", "eval/kept/chain", None),
        ("pairs ranked right", "eval/pair_accuracy", None),
        ("worked steps", "eval/worked", None),
        ("right when worked", "eval/accuracy_when_worked", None),
        ("completion length", "eval/mean_length", None),
        ("held-out nll", "eval/loss", None), ("KL to the start", "eval/kl", None)]


def table(columns, task):
    """A table with a row a measure: columns is [(heading, {"eval/...": value})]; chance stands
    beside pass@k."""
    lines = [f"{'held-out problems':<22}" + "".join(f"{title:>9}" for title, _ in columns)
             + f"{'chance':>9}"]
    for title, name, k in ROWS:
        if any(name in values for _, values in columns):
            chance = task.chance(k) if k else None
            cells = [f"{values[name]:.3f}" if name in values else "-" for _, values in columns]
            cells.append("" if chance is None else f"{chance:.3f}")
            lines.append(f"{title:<22}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines) if len(lines) > 1 else NOTHING


def before_and_after(algo):
    """Three held-out problems, with an answer of the start model and one of the trained model."""
    task, config = algo.task, algo.config
    problems = evaluate.held_out(task, "test", 3)
    columns = []
    for model in (algo.ref_model, algo.model):
        texts, rewards, _, _ = evaluate.answers(model, algo.tokenizer, task, problems, config)
        columns.append([(text, "ok" if r > 0.5 else "x")
                        for text, r in zip(texts, rewards.flatten().tolist())])
    width = max(len(text) for text, _ in [("before", ""), *columns[0]]) + 3
    lines = [f"{'problem (sampled answers)':<27}{'before':<{width}}    after"]
    for problem, (was, was_right), (now, now_right) in zip(problems, *columns):
        lines.append(f"{problem['prompt']:<27}{was:<{width}}{was_right:<4}{now}  {now_right}")
    return "\n".join(lines)


def finish(algo, summary):
    """The end of a run: table, problems answered before and after, files, what to try next."""
    config, parts = algo.config, []
    a_policy = config.algo not in ("pretrain", "rm")
    if a_policy and summary["after"]:
        parts.append(table([("before", summary["before"]), ("after", summary["after"])], algo.task))
    if a_policy and "eval/accuracy" in summary["after"]:
        parts.append(before_and_after(algo))
    parts.append(
        f"{summary['steps']} steps in {duration(summary['seconds'])}, of it "
        f"{duration(summary['eval_seconds'])} for evaluations; "
        f"{summary['sampled_tokens']:,} tokens sampled, {summary['trained_tokens']:,} trained on\n"
        f"files: {config.out_dir}/ckpt.pt, metrics.jsonl, summary.json, {plot(config.out_dir)}\n"
        + next_commands(config))
    return "\n" + "\n\n".join(parts)


def next_commands(config):
    flags = f" --data {config.data}" if config.data else ""
    flags += f" --task {config.task}" if config.task != "chain" and not config.data else ""
    flags += f" --worked_share {config.worked_share}" if config.worked_share != 0.3 else ""
    flags += " --other_skills" if config.other_skills else ""
    if getattr(config, "init_from", None) and hub.is_published(config.init_from):
        flags += f" --init_from {config.init_from}"
    if config.algo == "pretrain":
        return f"next:  python train.py --algo grpo --init_from {config.out_dir}{flags}"
    if config.algo == "rm":
        return (f"next:  python train.py --algo ppo --reward model --reward_model {config.out_dir}"
                f"{flags}")
    other = "sft" if config.algo == "grpo" else "grpo"
    return (f"next:  python sample.py {config.out_dir}\n"
            f"       python train.py --algo {other}{flags}\n"
            f"       python compare.py sft dft dpo grpo --seeds 3{flags}")


# -- a comparison ---------------------------------------------------------------------------------

# Heading, where the number is in a run's summary, format.
MEASURES = [("accuracy", ("after", "eval/accuracy"), "{:.3f}"),
            ("greedy", ("after", "eval/greedy_accuracy"), "{:.3f}"),
            ("pass@16", ("after", "eval/pass@16"), "{:.3f}"),
            ("ood", ("after", "eval/ood_accuracy"), "{:.3f}"),
            ("reversing", ("after", "eval/kept/reversing"), "{:.3f}"),
            ("facts", ("after", "eval/kept/facts"), "{:.3f}"),
            ("chain", ("after", "eval/kept/chain"), "{:.3f}"),
            ("nll", ("after", "eval/loss"), "{:.3f}"),
            ("KL", ("after", "eval/kl"), "{:.2f}"),
            ("length", ("after", "eval/mean_length"), "{:.1f}"),
            ("updates", ("updates",), "{:.0f}"), ("sampled", ("sampled_tokens",), "{:,.0f}"),
            ("trained", ("trained_tokens",), "{:,.0f}"),
            ("train s", ("train_seconds",), "{:.1f}"),
            ("eval s", ("eval_seconds",), "{:.1f}"), ("MB", ("peak_memory_mb",), "{:.0f}")]
COSTS = """\
train s, eval s: seconds of training and of the evaluations between   MB: peak memory of the whole
process, Python, torch and evaluations included (on a GPU: of the tensors there)"""
# What a run is compared by: the first of these that it has.
JUDGED = (("eval/accuracy", "held-out accuracy"), ("eval/loss", "held-out nll"))


def result_line(result):
    """One line on a finished run of a comparison."""
    after = result["after"]
    found = next((f"{title} {after[name]:.3f}" for name, title in JUDGED if name in after), NOTHING)
    return (f"{result['variant']}, seed {result['seed']}: {found}, {result['steps']} steps in "
            f"{result['seconds']:.0f} s")


def by_arm(results):
    """{arm: {variant: its runs, one a seed}}. A sweep has a variant for every value of its flags,
    any other arm has one."""
    arms = {}
    for result in results:
        variants = arms.setdefault(result.get("sweep", result["variant"]), {})
        variants.setdefault(result["variant"], []).append(result)
    return arms


def judged(variants):
    """How the variants of an arm are judged: the name of the measure, its title, and {variant: mean
    over its seeds}; None where nothing was."""
    for name, title in JUDGED:
        if all(name in run["after"] for runs in variants.values() for run in runs):
            return name, title, {variant: sum(run["after"][name] for run in runs) / len(runs)
                                 for variant, runs in variants.items()}


def chosen(variants):
    """The variant of an arm that stands for it: the highest mean accuracy, or the lowest mean nll;
    the first of equals.

    Worked example: accuracies {"grpo:beta=0": [.5, .7], "grpo:beta=1": [.9, .1]} have the means .6
    and .5: it is "grpo:beta=0".
    """
    found = judged(variants)
    if found is None:
        return next(iter(variants))
    name, _, means = found
    return (max if name == "eval/accuracy" else min)(means, key=means.get)


def sweep_line(arm, variants):
    """One line on a swept arm: the mean over seeds for each combination of values."""
    swept = [i for i, piece in enumerate(re.split("[:>]", arm)) if "|" in piece]
    _, title, means = judged(variants) or (None, NOTHING, {})
    cells = []
    for variant, mean in means.items():
        pieces = re.split("[:>]", variant)
        cells.append(f"{' '.join(pieces[i] for i in swept)} {mean:.3f}")
    return f"{arm}: {title} {', '.join(cells)}".rstrip()


def comparison(results):
    """The table of a comparison: a row an arm, each cell the mean over seeds and, behind +-, half
    of largest minus smallest; the base first. Token counts, seconds and memory are those of the
    run, without the base. Below it a line for every swept arm."""
    def value(result, keys):
        for key in keys:
            result = result.get(key) if result is not None else None
        return result

    def cell(runs, keys, form):
        values = [v for v in (value(run, keys) for run in runs) if v is not None]
        if not values:
            return "-"
        text = form.format(sum(values) / len(values))
        if keys[0] == "after" and len(values) > 1:   # what a run cost needs no spread
            text += f" +-{form.format((max(values) - min(values)) / 2)}"
        return text

    groups, sweeps = {"base": [{"after": results[0]["before"]}]}, []
    for arm, variants in by_arm(results).items():
        groups[chosen(variants)] = variants[chosen(variants)]
        sweeps += [sweep_line(arm, variants)] if len(variants) > 1 else []
    rows = [["", *(title for title, _, _ in MEASURES)]]
    rows += [[name, *(cell(runs, keys, form) for _, keys, form in MEASURES)]
             for name, runs in groups.items()]
    shown = [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in shown}
    lines = []
    for row in rows:
        cells = [f"{row[i]:>{widths[i]}}" for i in shown[1:]]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    return "\n".join([*lines, COSTS, *sweeps])


def peak_memory_mb():
    """The most memory that this process ever held, everything in it counted; if it used a GPU, the
    most that tensors held there. None where it cannot be known."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource   # absent on Windows
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10   # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# -- pictures -------------------------------------------------------------------------------------

NO_PICTURE = "and for a picture of the curves: pip install matplotlib"
# Of curve.png: the axis, and the series on it as (metric, legend).
PANELS = [("accuracy", [("eval/accuracy", "held-out, sampled"),
                        ("eval/ood_accuracy", "out of distribution"),
                        ("reward", "training reward"),
                        ("eval/worked", "answers with worked steps")]),
          ("loss", [("nll", "training nll"), ("eval/loss", "held-out nll")]),
          ("nats", [("eval/kl", "KL to the start"), ("entropy", "entropy")]),
          ("tokens", [("completions/mean_length", "completion length")])]


def read_metrics(path):
    """The objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    if os.path.exists(path):
        with open(path) as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    break
    return lines


def pyplot():
    """matplotlib's pyplot, drawing to files; None where it is not installed."""
    try:
        import matplotlib
        if "matplotlib.pyplot" not in sys.modules:   # a notebook that draws keeps its own screen
            matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    return plt


def plot(out_dir):
    """Draw curve.png from metrics.jsonl. Returns what to tell the reader about it."""
    plt = pyplot()
    if plt is None:
        return NO_PICTURE
    lines = read_metrics(os.path.join(out_dir, "metrics.jsonl"))
    panels = []
    for label, series in PANELS:
        seen = [s for s in series if sum(s[0] in line for line in lines) > 1]
        panels += [(label, seen)] if seen else []
    if not panels:
        return "metrics too few for a picture"
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (label, series) in zip(axes[0], panels):
        for name, title in series:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points), label=title, linestyle="--" if name == "reward" else "-")
        axis.set_xlabel("updates")
        axis.set_ylabel(label)
        axis.set_ylim(*((0, 1) if label == "accuracy" else (0, None)))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(os.path.join(out_dir, "curve.png"), dpi=120)
    plt.close(figure)
    return "curve.png"


def curve(result, measure):
    """The evaluations of a run, or of the stages of a chain one after the other: updates and tokens
    go on from where the last stage ended, whose end is the next one's start."""
    lines, before = [], {"updates": 0, "sampled_tokens": 0}
    for folder in result.get("stages", [result["folder"]]):
        stage = read_metrics(os.path.join(folder, "metrics.jsonl"))
        stage = [line for line in stage if measure in line][1 if lines else 0:]
        lines += [{**line, **{name: line[name] + n for name, n in before.items()}}
                  for line in stage]
        before = {name: lines[-1][name] for name in before} if lines else before
    return lines


def plot_comparison(folder, results):
    """Draw compare.png: held-out accuracy (or nll) against updates and against sampled tokens, mean
    and range over seeds, of a swept arm for the values in the table. Returns what to tell the
    reader about it."""
    plt = pyplot()
    if plt is None:
        return NO_PICTURE
    found = [pair for pair in JUDGED if pair[0] in results[0]["after"]]
    if not found:
        return f"no picture: {NOTHING}"
    measure, title = found[0]
    shown = {chosen(variants): variants[chosen(variants)]
             for variants in by_arm(results).values()}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, name in zip(axes, ("updates", "sampled_tokens")):
        for i, (variant, runs) in enumerate(shown.items()):
            points = list(zip(*(curve(run, measure) for run in runs)))   # [evaluation][seed]
            x = [sum(line[name] for line in lines) / len(lines) for lines in points]
            y = [[line[measure] for line in lines] for lines in points]
            if not points:
                continue
            if name == "sampled_tokens" and x[-1] == 0:    # imitation samples nothing: a level
                level = sum(y[-1]) / len(y[-1])
                axis.axhline(level, color=f"C{i}", linestyle=":", linewidth=1)
                continue
            axis.plot(x, [sum(v) / len(v) for v in y], color=f"C{i}", label=variant)
            axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=f"C{i}",
                              alpha=0.2, linewidth=0)
        axis.set_xlabel(name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(title)
    axes[1].set_title("dotted: samples nothing", fontsize=8)
    figure.tight_layout()
    # The names of arms are long: they stand below the curves, and the picture grows with them.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", fontsize=8, ncol=2,
                  bbox_to_anchor=(0.5, 0), frameon=False)
    figure.savefig(os.path.join(folder, "compare.png"), dpi=120, bbox_inches="tight")
    plt.close(figure)
    return "compare.png"
