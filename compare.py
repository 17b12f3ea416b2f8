"""
Several algorithms from the same base, over the same seeds: one table and one picture.

    python compare.py sft dft dpo:sync_steps=inf grpo --seeds 3

A word is an algorithm; `name:flag=value:flag=value` is a variant with flags of its own, which win
over the common flags that follow. Every run is that of train.py, in a folder named for its variant
and seed. What is finished already is reused, and what was interrupted goes on.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys

from tqdm import tqdm

import train
from harness import checkpoint, flags, prepare, report
from harness.errors import InputError, one_line
from model import GPTConfig

DEFAULT = ["sft", "dft", "dpo", "ppo", "grpo"]


def plan(words, common, seed, seeds):
    """[(variant, Config, command line)] of every run, variant by variant and seed by seed. Raises
    InputError where one cannot be run, or has nothing to be compared by."""
    runs = []
    for variant in words:
        name, *own = variant.split(":")
        if name in prepare.SHARED:
            raise InputError(f"{name} makes what the others start from: it cannot be compared with "
                             "them")
        for s in range(seed, seed + seeds):
            command = ["--algo", name, *common, *(f"--{flag}" for flag in own)]   # the last wins
            command = flags.underscores([*command, "--seed", str(s)])
            config = flags.parse(command, train.ALGORITHMS, GPTConfig)
            if {flag.split("=")[0] for flag in own} & {"algo", "seed"} or config.algo != name \
                    or config.out_dir or config.resume or config.inspect:
                raise InputError("a comparison chooses folders, goes on by itself and gives all "
                                 "variants the same seeds: leave out --algo, --resume and "
                                 "--inspect, and a variant's own algo, seed and out_dir")
            label = re.sub("[^a-zA-Z0-9_.]+", "-", variant)
            config.out_dir = f"out/{prepare.task_name(config)}-{label}-{s}"
            twin = next((v for v, other, _ in runs if other.out_dir == config.out_dir), None)
            if twin:
                raise InputError(f"{twin} and {variant} are, or look like, the same")
            runs.append((variant, config, [*command, "--out_dir", config.out_dir]))
    return runs


def check_held_out(config):
    """Raise InputError where a file holds out nothing to compare by."""
    if not config.data:
        return
    test = prepare.make_task(config, 10**9).test
    judged = {"answer", "completion", "chosen", "text"}
    if not test or not all(judged & set(line) for line in test):
        raise InputError(f"{config.data}: no held-out lines with an answer, a completion or a text "
                         "to compare by; give some as --eval_data")


def reusable(config):
    """Whether the run's folder holds this very run, finished or not."""
    path = os.path.join(config.out_dir, "ckpt.pt")
    if not os.path.exists(path):
        return False
    try:
        checkpoint.check_same_settings(config, checkpoint.read(path), path)
    except InputError:
        return False
    settings = checkpoint.read_json(os.path.join(config.out_dir, "config.json"))
    return settings["eval_problems"] == config.eval_problems


def run_one(variant, config, command):
    """Train one run in a process of its own, or reuse it -> its summary, None after Ctrl-C."""
    same = reusable(config)
    if not (same and prepare.is_finished(config)):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
        done = subprocess.run([sys.executable, script, *command, *(["--resume"] if same else [])],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode == 130:
            return None
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(f"{variant}, seed {config.seed}: {reason.removeprefix('error: ')}")
    summary = checkpoint.read_json(os.path.join(config.out_dir, "summary.json"))
    return {"variant": variant, "folder": config.out_dir, **summary}


def main(argv):
    argv = flags.underscores(argv)
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    words = argv[:first_flag] or DEFAULT
    parser = flags.Parser(prog="compare.py", description=__doc__, allow_abbrev=False,
                          usage="python compare.py ALGO[:FLAG=VALUE...] ... [flags of train.py]",
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds [1]")
    parser.add_argument("--seed", type=int, default=0, help="the first of them [0]")
    parser.add_argument("--out_dir", help="folder of the table [out/<task>-compare]")
    asked, common = parser.parse_known_args(argv[first_flag:])
    if asked.seeds < 1:
        raise InputError(f"--seeds {asked.seeds}: at least 1 is needed")
    runs = plan(words, common, asked.seed, asked.seeds)
    folder = os.path.normpath(asked.out_dir or f"out/{prepare.task_name(runs[0][1])}-compare")
    again = f"python compare.py {shlex.join(argv)}"

    # Everything is checked before anything is trained, then what the runs start from is made.
    prepare.check_folder(folder)
    needed = []
    for _, config, _ in runs:
        check_held_out(config)
        needed += prepare.check(config, train.ALGORITHMS)
    for config in needed:
        if not prepare.is_finished(config) and train.run(config, again, again) == 130:
            return 130
    results = []
    # Ctrl-C reaches the run itself, which saves and ends with 130.
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        for variant, config, command in (bar := tqdm(runs, desc="runs", unit="run")):
            bar.set_postfix_str(f"{variant}, seed {config.seed}")
            result = run_one(variant, config, command)
            if result is None:
                print(f"\nstopped; go on with: {again}")
                return 130
            results.append(result)
            bar.write(report.result_line(result))
    finally:
        signal.signal(signal.SIGINT, handler)
    path = os.path.join(folder, "compare.json")
    checkpoint.write_text(path, json.dumps(results, indent=2) + "\n")
    picture = report.plot_comparison(folder, results)
    print(f"\n{report.comparison(results)}\n\nfiles: {path}, {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(one_line(lambda: main(sys.argv[1:])))
