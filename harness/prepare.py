"""
Before the loop: check everything that flags and files can tell, find the folder, the task and the
weights, and say what has to be trained first (a base model, a reward model).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

import torch

import rm
import tasks
from harness import chat, checkpoint, files, page, ranks
from harness.errors import InputError
from harness.flags import Demonstrations, Sampling, declarations
from model import GPT, GPTConfig

# Models that several runs start from. They are trained on demand, each in a folder of its own.
SHARED = {"pretrain": "Base model", "rm": "Reward model"}
MACHINE = ("device", "dtype", "compile", "micro_batch_size")   # where, not what
# --pretraining long: what experiments/ and the tables of assets/results start from.
LONG = {"max_steps": 2000, "learning_rate": 6e-3, "adam_beta2": 0.95, "warmup_steps": 50}
LONG_FLAGS = " ".join(f"--{name} {value}" for name, value in LONG.items())


# -- folders --------------------------------------------------------------------------------------


def task_name(config):
    return files.file_name(config.data) if config.data else config.task


def identity(config):
    """The settings that decide what a run computes."""
    names = [name for name, (_, _, metadata) in declarations(type(config)).items()
             if not metadata["watching"] and name not in MACHINE]
    return {name: getattr(config, name) for name in names} | config.shape


def default_folder(config):
    """out/<task>-<algo>-<seed>. A base or reward model whose settings are not the default ones gets
    a suffix made of those, so that several can stand side by side."""
    folder = f"out/{task_name(config)}-{config.algo}-{config.seed}"
    if config.algo not in SHARED:
        return folder
    default = type(config)(task=config.task, base_seed=config.base_seed)
    usual, unset = identity(default), object()
    mine = {name: value for name, value in identity(config).items()
            if usual.get(name, unset) != value}
    if not mine:
        return folder
    return f"{folder}-{hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:6]}"


def is_finished(config):
    """Whether the run in the folder made its last step. --max_minutes may have ended it earlier."""
    path = os.path.join(config.out_dir, "summary.json")
    return os.path.exists(path) and checkpoint.read_json(path)["steps"] >= config.max_steps


def made_otherwise(config):
    """What a finished run's own config.json has otherwise, as "max_steps 1300, warmup_steps 50"; ""
    where nothing is. An earlier version of this code may have had other defaults."""
    path = os.path.join(config.out_dir, "config.json")
    made = checkpoint.read_json(path) if os.path.exists(path) else {}
    return ", ".join(f"{name} {made[name]}" for name, value in identity(config).items()
                     if name in made and made[name] != value)


@contextlib.contextmanager
def claimed(folder):
    """Keep a run's folder from other processes. Raises InputError where one of them has it. The
    system itself ends the claim of a process that dies; Windows has none of this kind."""
    if ranks.RANK > 0 or fcntl is None:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing {folder}: wait until it has ended") from None
        except OSError:   # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def keep_earlier_run(folder):
    """A run never overwrites another: what is in its folder moves to a free name beside it."""
    if ranks.RANK == 0 and os.path.exists(os.path.join(folder, "config.json")):
        n = next(n for n in range(1, 10**6) if not os.path.exists(f"{folder}.{n}"))
        with claimed(folder):
            os.rename(folder, f"{folder}.{n}")
        print(f"{folder} held an earlier run, which is now {folder}.{n} "
              "(--resume would have gone on with it)")


def check_folder(folder, flag="--out_dir"):
    """Raise InputError where a run could not write into a folder, which need not exist yet. flag:
    what named it."""
    there = folder
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        tempfile.TemporaryFile(dir=there or ".").close()
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another "
                         f"{flag}") from None


# -- what a run starts from -----------------------------------------------------------------------


def shared_config(config, algo, algorithms):
    """The Config of the base model (or the reward model) that this run needs."""
    names = ["task", "tokenizer", "template", "system_prompt", "base_seed", "min_terms",
             "max_terms", "worked_share", "other_skills", "device", "dtype", "eval_problems"]
    if algo == "rm":
        names += ["pretraining", "init_from", "data", "eval_data", "max_new_tokens"]
    settings = {name: getattr(config, name) for name in names}
    if algo == "pretrain" and config.pretraining == "long":
        settings |= LONG
    shared = algorithms[algo].Config(**settings, algo=algo, shape=config.shape)
    if algo == "pretrain" and config.task == "facts":
        shared.task = "chain"
    shared.out_dir = default_folder(shared)
    return shared


def needs_reward_model(config):
    return isinstance(config, Sampling) and "model" in config.reward.split(",")


def check(config, algorithms):
    """Check all that flags and files can tell, before anything is trained; settle the folder.

    Returns the Configs of the models that have to be trained first. Raises InputError.
    """
    config.out_dir = os.path.normpath(config.out_dir or default_folder(config))
    if config.inspect and config.algo in SHARED:
        raise InputError(f"--inspect shows what a policy is taught; --algo {config.algo} has none")
    if config.algo == "pretrain" and config.pretraining == "long":
        raise InputError("--pretraining is of the base models that other algorithms start from; "
                         f"here: {LONG_FLAGS}")
    if config.algo == "pretrain" and config.task == "facts" and not config.data:
        raise InputError("--task facts starts from the base model of chain: give --task chain")
    check_folder(config.out_dir)
    if config.html is not None:
        page.check(config.html)
        check_folder(os.path.dirname(config.html) or ".", "--html")
    path, first = os.path.join(config.out_dir, "ckpt.pt"), []
    # A base model or a reward model that was interrupted always goes on.
    config.resume = config.resume or config.algo in SHARED and os.path.exists(path)
    if config.resume:
        saved = checkpoint.read(path)
        for name in ("init_from", "reward_model", "teacher"):
            kept = saved.get("settings", {}).get(name)
            if hasattr(config, name):   # only distill has a teacher
                setattr(config, name, getattr(config, name) or kept)
        chat.adopt_tokenizer(config, saved)
        shape = checkpoint.build_model(saved).config   # refuses weights that are none
        checkpoint.check_same_settings(config, saved, path)
    elif config.init_from:
        shape = start_model(config, "meta").config
    else:
        shape = GPTConfig(**{"vocab_size": chat.tokenizer_of(config).vocab_size, **config.shape})
        if config.algo != "pretrain":
            first.append(shared_config(config, "pretrain", algorithms))
    if needs_reward_model(config) and config.reward_model:
        reward_model(config, config.reward_model, chat.tokenizer_of(config))
    elif needs_reward_model(config) and not config.resume:
        first.append(shared_config(config, "rm", algorithms))
        check(first[-1], algorithms)
    tokenizer = chat.tokenizer_of(config)
    if config.algo != "pretrain" and not getattr(config, "completion_only", True) \
            and getattr(tokenizer, "template", "plain") != "plain":
        raise InputError("--completion_only false trains on texts without turns: give --template "
                         "plain as well")
    # What is wrong with the other settings shows when the algorithm is set up, which costs
    # nothing with a model as small as can be.
    task = make_task(config, shape.block_size)
    small = GPT(GPTConfig(shape.vocab_size, shape.block_size, n_layer=1, n_head=1, n_embd=2))
    algorithms[config.algo](config, small, tokenizer, task)
    return first


def start_model(config, device):
    """The model of --init_from. Raises InputError where a run cannot start from it."""
    start, found = config.init_from, checkpoint.read(config.init_from)
    model = checkpoint.build_model(found, device)
    chat.adopt_tokenizer(config, found)
    if model.config.scalar_head:
        raise InputError(f"{start} is a reward model, which cannot write; give it as "
                         "--reward_model")
    asked = GPTConfig(**{"vocab_size": model.config.vocab_size, **config.shape})
    for name, value in config.shape.items():
        if getattr(model.config, name) != getattr(asked, name):
            raise InputError(f"{start} has {name} {getattr(model.config, name)}, not {value}: "
                             "leave the flag out")
    if not chat.same_tokenizer(config, found):
        raise InputError(f"{start} was trained with --tokenizer {found['tokenizer']}")
    return model


def reward_model(config, path, tokenizer):
    """The learned reward function in a checkpoint. Raises InputError where it is none."""
    model = checkpoint.build_model(checkpoint.read(path), config.device).requires_grad_(False)
    if not model.config.scalar_head or model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(f"{path} is no reward model for this tokenizer: make one with --algo rm")
    return rm.Judge(model, tokenizer)


# -- the task -------------------------------------------------------------------------------------


def make_task(config, block_size, judge=None):
    """The task that the flags name. Raises InputError where a file lacks a column that is needed,
    or where what is to be read does not fit the context. judge: the learned reward function."""
    tokenizer = chat.tokenizer_of(config)
    settings = (config.max_new_tokens, judge, getattr(config, "flip_probability", 0.0))
    if config.eval_data and not config.data:
        raise InputError("--eval_data needs --data")
    style, wrong_share = getattr(config, "style", "own"), getattr(config, "wrong_share", 0)
    if (style != "own" or wrong_share) and (config.data or config.task != "chain"):
        raise InputError("--style and --wrong_share are for --task chain")
    if style in ("swapped", "mixed") and config.min_terms == 2:   # 7+5 swapped is 5+7: a test?
        raise InputError(f"--style {style} solves other problems of two terms, which may be held "
                         "out: give --min_terms 3")
    if config.task == "countdown" and (config.worked_share != 0.3 or config.other_skills):
        raise InputError("--worked_share and --other_skills are for --task chain and facts")
    if config.data:
        task = files.JsonLines(config.data, config.eval_data, *settings)
        check_lines(config, task, tokenizer, block_size)
        return task
    if config.task == "countdown":
        longest = task = tasks.Countdown(*settings)
    else:
        Chosen = tasks.Facts if config.task == "facts" else tasks.Chain
        world = (*settings, config.worked_share, config.other_skills)
        task = Chosen(config.min_terms, config.max_terms, *world)
        longest = Chosen(config.max_terms, config.max_terms, *world)
    shown = config.columns()[0][:2] == ("prompt", "completion")   # the answer is read as well
    kept = [problem for skill in task.kept for problem in longest.problems(skill, 50, 0)]
    for example in longest.demonstrations(50, 0, style) + kept:
        prompt = len(tokenizer.encode_prompt(example["prompt"]))
        answer = 1 + len(tokenizer.encode(example.get("completion", ""))) if shown else 0
        answer = max(answer, task.max_new_tokens)
        if getattr(config, "hint", "none") != "none":   # and what goes on from a hint
            answer += task.max_new_tokens
        if prompt + answer > block_size:
            raise InputError(f"a prompt of {prompt} tokens and {answer} for its answer do not fit "
                             f"block_size {block_size}: lower --max_new_tokens or raise "
                             "--block_size")
    return task


def check_lines(config, task, tokenizer, block_size):
    """Raise InputError for the first line of a file that cannot be trained on, or judged by."""
    choices = [("prompt", "answer")] if config.inspect == "all" else config.columns()
    columns = next((c for c in choices if task.holds(*c)), choices[0])
    hints = getattr(config, "hint", "none") != "none"   # what goes on from them needs room
    sampled = hints or not {"text", "completion", "chosen"} & set(columns)   # as answers do
    room = task.max_new_tokens if sampled else None
    if columns:   # sample.py reads no training examples
        task.require(columns, tokenizer, block_size, room)
    if isinstance(config, Sampling) and isinstance(config, Demonstrations):
        task.require(("prompt",), tokenizer, block_size, task.max_new_tokens)
    if config.algo != "rm" and task.test:   # as evaluate.py will read them
        room, columns = task.max_new_tokens, ("prompt",)
        if not task.verifies:
            choices = [("prompt", "completion"), ("prompt", "chosen"), ("text",), ()]
            columns = next(c for c in choices if set(c[-1:]) <= set(task.test[0]))
            room = None
        task.require(columns, tokenizer, block_size, room, task.test)


# -- the algorithm --------------------------------------------------------------------------------


def build(config, algorithms):
    """The algorithm, ready to train; the checkpoint to resume (None: a new run); and the seconds
    that pre-training took (0: the start is not a base model of ours)."""
    tokenizer, saved, pretrain_seconds = chat.tokenizer_of(config), None, 0.0
    if config.resume:
        saved = checkpoint.read(os.path.join(config.out_dir, "ckpt.pt"))
        shape = GPTConfig(**saved["model_config"])
        model = GPT(dataclasses.replace(shape, scalar_head=False))   # weights follow in restore()
    elif config.algo == "pretrain":
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(**{"vocab_size": tokenizer.vocab_size, **config.shape}))
    elif config.init_from:
        model = start_model(config, config.device)
    else:
        base = shared_config(config, "pretrain", algorithms).out_dir
        model = checkpoint.build_model(checkpoint.read(base))
        summary = checkpoint.read_json(os.path.join(base, "summary.json"))
        pretrain_seconds = summary["seconds"]
    judge = None
    if needs_reward_model(config):
        made = config.reward_model or shared_config(config, "rm", algorithms).out_dir
        judge = reward_model(config, made, tokenizer)
    task = make_task(config, model.config.block_size, judge)
    algo = algorithms[config.algo](config, model.to(config.device), tokenizer, task)
    if config.compile:
        algo.model.completion_hidden = torch.compile(algo.model.completion_hidden, dynamic=True)
    return algo, saved, pretrain_seconds
