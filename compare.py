"""
Several algorithms from the same base, over the same seeds: one table and one picture.

    python compare.py sft dft dpo:sync_steps=inf grpo --seeds 3
    python compare.py grpo "sft:num_demonstrations=64>grpo:max_steps=200" --jobs 2
    python compare.py "grpo:learning_rate=3e-4|1e-3|3e-3" --seeds 3

A word is an arm: an algorithm, or `name:flag=value:flag=value`, whose own flags win over the common
flags that follow. Every run is that of train.py, in a folder named for its arm and seed. What is
finished already is reused, and what was interrupted goes on. --jobs 4 makes four runs at a time.

`sft>grpo` is a chain: GRPO starts from what SFT made. Each stage is a run by itself, and arms that
begin alike share their first stages. A chain costs what its stages cost together; its memory is the
most that one of them took. Its KL is that to the base from which the first stage started: the last
model is judged again, on the same problems with the same random numbers. A learned reward (--reward
model) is the same in all stages: that of the base.

`flag=a|b` is a sweep: one run for each value (several such flags: for each combination) and seed.
The table has the values with the best mean over seeds; below it stand the means of all. The choice
is made on the very problems that are reported, so it flatters every swept arm alike, and an arm
with one value not at all.
"""

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

import train
from harness import chat, checkpoint, evaluate, flags, prepare, report
from harness.arms import Arm, base_folder, check, stages, values
from harness.errors import InputError, one_line

DEFAULT = ["sft", "dft", "dpo", "ppo", "grpo", "hybrid"]


def plan(words, common, seed, seeds):
    """[Arm], word by word, value by value and seed by seed. Raises InputError for two that are the
    same; to share the first stages of a chain is fine."""
    arms, names, ends = [], {}, set()
    for word in words:
        for variant, s in itertools.product(values(word), range(seed, seed + seeds)):
            arm = Arm(word, variant, s, stages(variant, common, s, train.ALGORITHMS))
            for stage in arm.stages:
                folder = stage.config.out_dir
                twin = names.setdefault(folder, stage.name)
                if twin != stage.name or stage is arm.stages[-1] and folder in ends:
                    raise InputError(f"{twin} and {stage.name} are, or look like, the same")
            ends.add(folder)
            arms.append(arm)
    return arms


# -- runs -----------------------------------------------------------------------------------------


def reusable(config):
    """Whether the run's folder holds this very run, finished or not: with the same settings, and
    begun after what it starts from was made."""
    path = os.path.join(config.out_dir, "ckpt.pt")
    if not os.path.exists(path):
        return False
    try:
        checkpoint.check_same_settings(config, checkpoint.read(path), path)
    except InputError:
        return False
    began = os.path.join(config.out_dir, "config.json")
    if checkpoint.read_json(began)["eval_problems"] != config.eval_problems:
        return False
    starts = config.init_from, config.reward_model, getattr(config, "teacher", None)
    for start in filter(None, starts):
        start = os.path.join(start, "ckpt.pt") if os.path.isdir(start) else start
        if os.path.getmtime(start) > os.path.getmtime(began):
            return False
    return True


def run_one(stage, stopped):
    """Train one run in a process of its own, or reuse it -> its summary, None after Ctrl-C, which
    `stopped` remembers."""
    config = stage.config
    same = reusable(config)
    if not (same and prepare.is_finished(config)):
        if stopped:
            return None
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
        command = [sys.executable, script, *stage.command, *(["--resume"] if same else [])]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode in (130, -signal.SIGINT):
            stopped.append(stage)
            return None
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(f"{stage.name}, seed {config.seed}: {reason.removeprefix('error: ')}")
    return checkpoint.read_json(os.path.join(config.out_dir, "summary.json"))


def run_all(arms, jobs):
    """Make every run once: all first stages, then all second ones -> {folder: summary}, None after
    Ctrl-C."""
    levels = [{arm.stages[i].config.out_dir: arm.stages[i] for arm in arms if i < len(arm.stages)}
              for i in range(max(len(arm.stages) for arm in arms))]
    made, stopped = {}, []
    # Ctrl-C reaches the runs themselves, which save and end with 130.
    handler = signal.signal(signal.SIGINT, lambda *_: stopped.append("here"))
    bar = tqdm(desc="runs", unit="run", total=sum(map(len, levels)))

    def start(stage):
        bar.set_postfix_str(f"{stage.name}, seed {stage.config.seed}")
        return run_one(stage, stopped)
    try:
        with ThreadPoolExecutor(jobs) as pool, bar:
            for level in levels:
                summaries = (pool.map if jobs > 1 else map)(start, level.values())
                for stage, summary in zip(level.values(), summaries):
                    if summary is None:
                        return None
                    made[stage.config.out_dir] = summary
                    bar.update()
                    bar.write(report.result_line({"variant": stage.name, **summary}))
    finally:
        signal.signal(signal.SIGINT, handler)
    return made


# -- results --------------------------------------------------------------------------------------


def added_up(summaries):
    """The summary of a chain: steps, tokens and seconds are those of all stages, memory is the most
    that one of them took, `before` is that of the first stage and the rest that of the last.

    Worked example: stages of 100 and 60 updates in 300 and 500 MB make 160 updates in 500 MB.
    """
    first, last = summaries[0], summaries[-1]
    memory = [s["peak_memory_mb"] for s in summaries if s["peak_memory_mb"] is not None]
    numbers = [{name: value for name, value in s.items() if isinstance(value, (int, float))}
               for s in summaries]
    totals = {name: sum(s.get(name, 0) for s in numbers) for s in numbers for name in s}
    return {**last, **totals, "algo": ">".join(s["algo"] for s in summaries), "seed": last["seed"],
            "peak_memory_mb": max(memory, default=None), "before": first["before"]}


def start_of(config):
    """The folder of the model that a run starts from: its base model, if no other is named."""
    return config.init_from or base_folder(config, train.ALGORITHMS)


def kl_to_base(first, last):
    """eval/kl of a chain's last model to the model that its first stage started from."""
    model, base = (checkpoint.build_model(checkpoint.read(path), last.device)
                   for path in (last.out_dir, start_of(first)))
    task = prepare.make_task(last, model.config.block_size)
    tokenizer = chat.tokenizer_of(last)
    return evaluate.judge_answers(model, base, tokenizer, task, last, full=True)["eval/kl"]


def result(arm, made):
    """The row of an arm in compare.json."""
    configs = [stage.config for stage in arm.stages]
    folders = [config.out_dir for config in configs]
    row = {"variant": arm.variant, "folder": folders[-1], **made[folders[-1]]}
    if len(folders) > 1:
        row |= {"stages": folders, **added_up([made[folder] for folder in folders])}
        if "eval/kl" in row["after"]:   # the last stage's own is that to what it started from
            row["after"] = {**row["after"], "eval/kl": kl_to_base(configs[0], configs[-1])}
    return row if arm.word == arm.variant else {"sweep": arm.word, **row}


def main(argv):
    argv = flags.underscores(argv)
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    words = argv[:first_flag] or DEFAULT
    parser = flags.Parser(prog="compare.py", description=__doc__, allow_abbrev=False,
                          usage="python compare.py ALGO[:FLAG=VALUE...][>ALGO...] ... "
                                "[flags of train.py]",
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds [1]")
    parser.add_argument("--seed", type=int, default=0, help="the first of them [0]")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time [1]")
    parser.add_argument("--out_dir", help="folder of the table [out/<task>-compare]")
    asked, common = parser.parse_known_args(argv[first_flag:])
    for name in ("seeds", "jobs"):
        if getattr(asked, name) < 1:
            raise InputError(f"--{name} {getattr(asked, name)}: at least 1 is needed")
    arms = plan(words, common, asked.seed, asked.seeds)
    task = prepare.task_name(arms[0].stages[0].config)
    folder = os.path.normpath(asked.out_dir or f"out/{task}-compare")
    again = f"python compare.py {shlex.join(argv)}"

    # Everything is checked before anything is trained, then what the runs start from is made.
    prepare.check_folder(folder)
    for config in check(arms, train.ALGORITHMS):
        if not prepare.is_finished(config) and train.run(config, again, again) == 130:
            return 130
    if asked.jobs > 1:   # the runs share the cores
        cores = os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // asked.jobs)))
    made = run_all(arms, asked.jobs)
    if made is None:
        print(f"\nstopped; go on with: {again}")
        return 130
    results = [result(arm, made) for arm in arms]
    path = os.path.join(folder, "compare.json")
    checkpoint.write_text(path, json.dumps(results, indent=2) + "\n")
    picture = report.plot_comparison(folder, results)
    print(f"\n{report.comparison(results)}\n\nfiles: {path}, {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(one_line(lambda: main(sys.argv[1:])))
