"""
What a comparison consists of: arms, each of one run of train.py or of a chain of them (compare.py
says how they are written).
"""

import copy
import itertools
import re
from typing import NamedTuple

from harness import flags, prepare
from harness.errors import InputError
from model import GPTConfig


class Stage(NamedTuple):
    """One run of train.py."""
    name: str         # the chain up to here
    config: object
    command: list
    trial: object     # the Config with the chain's own start, which can be checked at once


class Arm(NamedTuple):
    """What gets one row of compare.json."""
    word: str         # as it was typed
    variant: str      # the same with one value for every flag
    seed: int
    stages: list


def values(word):
    """The variants of a word: `grpo:beta=0|1` -> [`grpo:beta=0`, `grpo:beta=1`]."""
    choices = []
    for piece in re.split("([:>])", word):
        flag, equals, options = piece.partition("=")
        choices.append([flag + equals + option for option in options.split("|")])
    return ["".join(choice) for choice in itertools.product(*choices)]


def stages(variant, common, seed, algorithms):
    """The stages of an arm, each in the folder of the chain up to there and starting from the one
    before. Raises InputError where one cannot be run.

    Worked example: `sft:max_steps=9>grpo`, seed 0, makes out/chain-sft-max_steps-9-0, which is also
    the folder of the arm `sft:max_steps=9`, and then out/chain-sft-max_steps-9+grpo-0.
    """
    found, words = [], variant.split(">")
    for i, (name, *own) in enumerate(word.split(":") for word in words):
        if not name:
            raise InputError(f"{variant!r}: an algorithm is missing; a chain is sft>grpo")
        if name in prepare.SHARED:
            raise InputError(f"{name} makes what the others start from: it cannot be compared with "
                             "them")
        own = flags.underscores([f"--{flag}" for flag in own])
        command = flags.underscores(["--algo", name, *common, *own, "--seed", str(seed)])
        config = flags.parse(command, algorithms, GPTConfig)      # the last flag wins
        mine = {flag.split("=")[0] for flag in own}
        if mine & {"--algo", "--seed"} or config.algo != name or config.out_dir or config.resume \
                or config.inspect:
            raise InputError("a comparison chooses folders, goes on by itself and gives all "
                             "variants the same seeds: leave out --algo, --resume and --inspect, "
                             "and a variant's own algo, seed and out_dir")
        label = "+".join(re.sub("[^a-zA-Z0-9_.]+", "-", word) for word in words[:i + 1])
        config.out_dir = f"out/{prepare.task_name(config)}-{label}-{seed}"
        command += ["--out_dir", config.out_dir]
        trial = copy.copy(config)
        if found:
            if "--init_from" in mine:
                raise InputError(f"{variant}: a later stage starts from what the one before it "
                                 "made: leave out its init_from")
            first, config.init_from = found[0].config, found[-1].config.out_dir
            command += ["--init_from", config.init_from]
            trial.init_from, trial.shape = first.init_from, {**first.shape, **config.shape}
            if prepare.needs_reward_model(config) and not config.reward_model:
                shared = prepare.shared_config(trial, "rm", algorithms)
                config.reward_model = shared.out_dir
                command += ["--reward_model", config.reward_model]
        found.append(Stage(">".join(words[:i + 1]), config, command, trial))
    return found


# -- before anything is trained -------------------------------------------------------------------


def check_held_out(config):
    """Raise InputError where a file holds out nothing to compare by."""
    if not config.data:
        return
    test = prepare.make_task(config, 10**9).test
    judged = {"answer", "completion", "chosen", "text"}
    if not test or not all(judged & set(line) for line in test):
        raise InputError(f"{config.data}: no held-out lines with an answer, a completion or a text "
                         "to compare by; give some as --eval_data")


def base_folder(config, algorithms):
    """The folder of the base model that a run starts from, unless --init_from names another."""
    return prepare.shared_config(config, "pretrain", algorithms).out_dir


def judged_by(config):
    """What decides how a run is judged: two runs for which it differs have curves that do not
    join."""
    task = prepare.make_task(config, 10**9)
    problems = [task.problems(split, config.eval_problems, seed=0) for split in ("test", "ood")]
    return problems, task.verifies, task.max_new_tokens


def check(arms, algorithms):
    """Check every stage, the later ones as if they started where the first does -> the Configs of
    what has to be made first. Raises InputError."""
    needed = []
    for arm in arms:
        first = arm.stages[0].config
        for stage in arm.stages:
            if base_folder(stage.trial, algorithms) != base_folder(first, algorithms):
                raise InputError(f"{stage.name}: all stages have the same task, tokenizer, "
                                 "base_seed, pretraining and model shape: give them as common "
                                 "flags")
            check_held_out(stage.config)
            needed += prepare.check(stage.trial, algorithms)
            if stage.config is not first and judged_by(stage.config) != judged_by(first):
                raise InputError(f"{stage.name}: its stages are judged by different problems: give "
                                 "--task, --eval_data, --eval_problems and --max_new_tokens as "
                                 "common flags")
    return needed
