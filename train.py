"""
The one loop: collect, then for each minibatch loss, backward, clip, step; evaluate, log, save. Every algorithm of this
project is driven from here, and nothing here knows an algorithm's mathematics.

    python train.py --algo grpo                     make a base model if there is none, then train it with GRPO
    python train.py --algo sft                      fine-tune the same base on demonstrations
    python train.py --algo pretrain                 make the base model, and nothing else
    python train.py --algo grpo --help              every flag, with its default and typical range
    python train.py --algo grpo --resume            go on where a run stopped
    python train.py --algo sft,dft,dpo,dpo:sync_steps=inf,ppo,grpo --seeds 3      compare them, from the same base
    python train.py --init_from out/chain-grpo-0 --sample "7+5*3="        ask a model
    python train.py --init_from out/chain-grpo-0 --eval_only              judge a model
    python train.py --algo dft --inspect            one batch, token by token; --inspect all: under every algorithm

A run leaves in its folder (out/<task>-<algo>-<seed>, or --out_dir): config.json, every setting; metrics.jsonl, one JSON
object a line; ckpt.pt, a dict whose "model" is the state dict; at the end summary.json and, with matplotlib, curve.png.
"""

import argparse
import copy
import dataclasses
import difflib
import hashlib
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")   # before torch: large memory pages, a tenth off a step on Linux CPUs

import numpy
import torch
from tqdm import tqdm

import data
import report
import rm
from dft import DFT
from dpo import DPO
from grpo import GRPO
from model import GPT, GPTConfig, InputError, check
from ppo import PPO
from sft import SFT

PRETRAIN = dict(learning_rate=6e-3, max_steps=2000, batch_size=64, lr_scheduler_type="linear", warmup_steps=50,
                weight_decay=0.1, logging_steps=100, eval_steps=500, save_steps=500)
ALGORITHMS = {"pretrain": SFT, "sft": SFT, "dft": DFT, "dpo": DPO, "rm": rm.RM, "ppo": PPO, "grpo": GRPO}
SHARED = {"pretrain": "Base model", "rm": "Reward model"}   # made on the way by whoever needs them, in a folder named for their settings
# Settings that change how a run is watched, not what it computes: they may differ between a run and its resumption.
WATCHING = {"resume", "eval_only", "sample", "inspect", "max_minutes", "save_steps", "logging_steps", "eval_steps", "eval_problems",
            "out_dir", "top_k", "top_p"}

# -- flags ------------------------------------------------------------------------------------------------------------
# Shared flags, group by group; an algorithm's `defaults` come before those here, and its own Config adds its own flags.


@dataclass
class What:
    """what to run"""
    algo: Annotated[Literal["pretrain", "sft", "dft", "dpo", "rm", "ppo", "grpo"],
                    "the algorithm; a list, as in sft,dpo:sync_steps=inf,grpo, compares them"] = "grpo"
    seeds: Annotated[int, "of a comparison: how many seeds each runs with, from --seed on"] = 1
    init_from: Annotated[str, "start from this checkpoint, a folder or a file; none: the task's base model"] = None
    base_seed: Annotated[int, "seed of the base model, apart from --seed"] = 0
    reward_model: Annotated[str, "of --reward model: a folder or file of --algo rm; none: the task's, made first if need be"] = None
    resume: Annotated[bool, "go on where the run in the output folder stopped"] = False
    eval_only: Annotated[bool, "judge the model and stop"] = False
    sample: Annotated[str, "answer this prompt and stop"] = None
    inspect: Annotated[str, "show a batch token by token, with the weight of each gradient, and stop; all: every algorithm's"] = None


@dataclass
class Task:
    """task and data"""
    task: Annotated[Literal["chain", "countdown"], "the built-in task"] = "chain"
    min_terms: Annotated[int, "chain: fewest terms in a problem (2 to 4)"] = 3
    max_terms: Annotated[int, "chain: most terms in a problem (3 to 6)"] = 4
    data: Annotated[str, "a .jsonl file: text; prompt and completion, answer, or chosen and rejected"] = None
    eval_data: Annotated[str, "held-out lines; none: one in ten of --data"] = None
    max_new_tokens: Annotated[int, "longest completion, in tokens; 0: the task's own"] = 0
    tokenizer: Annotated[str, "byte (needs no download) or gpt2"] = "byte"
    top_k: Annotated[int, "with --sample or --eval_only: the k likeliest tokens; 0: all"] = 0
    top_p: Annotated[float, "likewise: the likeliest tokens that make up this mass"] = 1.0


@dataclass
class Loop:
    """the loop"""
    seed: Annotated[int, "of everything random in the run"] = 0
    max_steps: Annotated[int, "batches to collect and train on"] = 100
    max_minutes: Annotated[float, "stop after so many minutes; 0: no limit"] = 0.0
    batch_size: Annotated[int, "examples per step: prompts where answers are sampled, else texts (8 to 256)"] = 32
    micro_batch_size: Annotated[int, "completions per forward pass, to save memory; changes no result; 0: all at once"] = 0
    logging_steps: Annotated[int, "steps between lines"] = 10
    eval_steps: Annotated[int, "steps between evaluations; those at which a line is due"] = 10
    save_steps: Annotated[int, "steps between checkpoints"] = 50
    eval_problems: Annotated[int, "held-out problems to judge by (128 to 1024)"] = 256
    out_dir: Annotated[str, "the run's folder; none: out/<task>-<algo>-<seed>"] = None


@dataclass
class Optimizer:
    """optimizer (AdamW)"""
    learning_rate: Annotated[float, "peak learning rate (1e-4 to 6e-3 at this size)"] = 1e-3
    lr_scheduler_type: Annotated[Literal["constant", "linear", "cosine"], "after the warm-up: stay, or fall to a tenth"] = "linear"
    warmup_steps: Annotated[int, "steps from 0 to the peak"] = 10
    weight_decay: Annotated[float, "on matrices (0 to 0.1)"] = 0.0
    adam_beta2: Annotated[float, "memory of the second moment (0.95 to 0.999)"] = 0.95
    max_grad_norm: Annotated[float, "longer gradients are shortened to this norm; 0: never"] = 1.0


@dataclass
class Machine:
    """machine"""
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "of matrix products; auto: bfloat16 on cuda, else float32"] = "auto"
    compile: Annotated[bool, "compile the training forward pass (worth it on a GPU)"] = False


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def number(text):
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return float(text)


def add_fields(group, config_class, defaults={}, suppress=False, only=None):
    """A flag for every annotated field of a config dataclass, or for those in `only`. `suppress`:
    absent from the result unless it was given. A bool may be given without a value: --resume is
    --resume true."""
    for field in dataclasses.fields(config_class):
        hint = typing.get_type_hints(config_class, include_extras=True)[field.name]
        if typing.get_origin(hint) is not Annotated or only and field.name not in only:
            continue
        kind, text = typing.get_args(hint)
        default = defaults.get(field.name, field.default)
        shown = {None: "none", "": "empty"}.get(default, default) if kind is str else str(default).lower()
        if typing.get_origin(kind) is Literal:
            kwargs = dict(choices=typing.get_args(kind))
        elif kind is bool:
            kwargs = dict(type=boolean, nargs="?", const=True, metavar="true|false")
        else:
            kwargs = dict(type=number if kind is float else kind, metavar=kind.__name__)
        if field.name == "inspect":   # the one flag that means something with and without a value
            kwargs = dict(choices=("one", "all"), nargs="?", const="one")
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS if suppress else default, help=f"{text} [{shown}]", **kwargs)


def make_parser(algo):
    algorithm = ALGORITHMS[algo]
    parser = Parser(prog="train.py", usage="python train.py --algo {%s} [flags]" % ",".join(ALGORITHMS), description=__doc__,
                    allow_abbrev=False, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                        prog, max_help_position=34, width=120))
    for flags in (What, Task, Loop, Optimizer, Machine):
        add_fields(parser.add_argument_group(flags.__doc__), flags, PRETRAIN if algo == "pretrain" else algorithm.defaults)
    add_fields(parser.add_argument_group("the model (of a new base; other models bring their own shape)"), GPTConfig, suppress=True)
    group = parser.add_argument_group(f"{algo}, from {algorithm.__module__}.py")
    only = {"num_documents"} if algo == "pretrain" else None    # the one of sft.py about a corpus
    add_fields(group, algorithm.Config, only=only)
    return parser


def underscores(argv):
    """--learning-rate=1e-3 is --learning_rate=1e-3."""
    def flag(word):
        name, *value = word.split("=", 1)
        return "=".join([name[:2] + name[2:].replace("-", "_"), *value]) if word.startswith("--") else word
    return [flag(word) for word in argv]


def which(argv):
    """The flags that a comparison reads itself, and the other words of argv."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="grpo")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out_dir", type=os.path.normpath)
    return parser.parse_known_args(argv)


def parse_args(argv):
    """argv -> (args, algorithm config, {shape flags that were given}). Raises InputError with the nearest right name."""
    argv = underscores(argv)
    algo = which(argv)[0].algo
    if algo not in ALGORITHMS:
        near = difflib.get_close_matches(algo, ALGORITHMS, 1)
        raise InputError(f"--algo {algo} is unknown{f': did you mean {near[0]}?' if near else ''}; there are {', '.join(ALGORITHMS)}")
    parser = make_parser(algo)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise InputError(f"{unknown[0]} is unknown{f': did you mean {near[0]}?' if near else ''}; --help lists the flags")
    given = {a[2:].split("=")[0] for a in argv if a.startswith("--")}
    shape = {f.name: getattr(args, f.name) for f in dataclasses.fields(GPTConfig) if f.name in given}
    names = [f.name for f in dataclasses.fields(ALGORITHMS[algo].Config) if hasattr(args, f.name)]
    own = {name: getattr(args, name) for name in names}
    if algo == "pretrain":
        args.completion_only = own["completion_only"] = False
    config = ALGORITHMS[algo].Config(**own)
    if algo == "pretrain":
        config.num_documents = config.num_documents or args.max_steps * args.batch_size
    if algo in SHARED:
        if "seed" in given and args.seed != args.base_seed:
            raise InputError(f"--algo {algo} makes a {SHARED[algo].lower()}, whose seed is --base_seed")
        args.seed = args.base_seed
    check(args, at_least_1="max_steps batch_size logging_steps eval_steps save_steps eval_problems")
    if algo in ("ppo", "grpo"):
        config.check_rows(args.batch_size * config.num_generations)
    for name in ("max_minutes", "micro_batch_size", "max_new_tokens", "warmup_steps", "weight_decay", "max_grad_norm", "top_k", "seed", "base_seed"):
        if not 0 <= getattr(args, name) < 2**40:
            raise InputError(f"--{name} {getattr(args, name)}: a number from 0 to 2^40 is needed")
    for name, fits in (("learning_rate", args.learning_rate > 0), ("top_p", 0 < args.top_p <= 1),
                       ("adam_beta2", 0 <= args.adam_beta2 < 1)):
        if not fits:
            raise InputError(f"--{name} {getattr(args, name)} is out of range; --help says what is "
                             "usual")
    if algo == "pretrain" and args.init_from and not judging(args):
        raise InputError("--algo pretrain starts from random weights: leave out --init_from")
    if (args.top_k or args.top_p < 1) and not judging(args):
        raise InputError("--top_k and --top_p are for --sample and --eval_only: training scores the whole distribution, "
                         "and what is sampled from a part of it would not be the policy's own")
    if args.inspect and algo in SHARED:
        raise InputError(f"--inspect shows what a policy is taught; --algo {algo} has none")
    if args.eval_data and not args.data:
        raise InputError("--eval_data needs --data")
    args.out_dir = args.out_dir and os.path.normpath(args.out_dir)   # `run/` is `run`
    return args, config, shape


def judging(args):
    """Whether a model is only asked or judged, and nothing trained."""
    return args.eval_only or args.sample is not None


def pick_device(args):
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise InputError(f"--device {args.device} is unknown: use auto, cpu, cuda or mps")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.split(":")[0]):
        raise InputError(f"--device {args.device}: not available here; use --device cpu")
    args.device = device
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.startswith("cuda") else "float32"


# -- checkpoints ------------------------------------------------------------------------------------------------------


def write(path, save):
    """Write a file under another name, then rename: whoever reads `path` finds the old file or the new, never a half."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save(path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:   # torch reports a full disk as a RuntimeError
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        kept = "; the earlier file is untouched" if os.path.exists(path) else ""
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or 'is the disk full?'}{kept}; "
                         "free some space or choose another --out_dir") from None


def write_text(path, text):
    def save(tmp):
        with open(tmp, "w") as file:
            file.write(text)
    write(path, save)


def read_json(path):
    with open(path) as file:
        return json.load(file)


def read_checkpoint(path):
    """The dict in a checkpoint file, or in the ckpt.pt of a folder. Raises InputError for whatever is not one."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no checkpoint there") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except Exception as error:   # the bytes of some other file can make the unpickler raise anything at all
        raise InputError(f"{path}: not a checkpoint of this project, or a truncated one ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_config"} <= set(checkpoint):
        raise InputError(f"{path}: a PyTorch file, but not a checkpoint of this project (no 'model' and 'model_config')")
    return checkpoint


def build_model(args, checkpoint):
    try:
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint's weights do not fit its own shape: {str(error).splitlines()[-1].strip()}") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError("the checkpoint's weights are not all finite: it was saved after training had blown up")
    model.skip_padding = args.device == "cpu"
    return model.to(args.device)


def random_states():
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, *rest = numpy.random.get_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states):
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


# -- the loop ---------------------------------------------------------------------------------------------------------


def learning_rate(args, step):
    """Linear warm-up, then constant or falling to a tenth of the peak at max_steps. With --restart
    both start over with each round, as the weights do; rounds are cut as in sft.py."""
    steps = args.max_steps
    if getattr(args, "restart", False) and args.source == "self":
        rounds = min(args.rounds, steps)
        this_round = step * rounds // steps
        first, end = (math.ceil(r * steps / rounds) for r in (this_round, this_round + 1))
        step, steps = step - first, end - first
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / (steps - args.warmup_steps)
    fall = {"constant": 0.0, "linear": done, "cosine": 0.5 - 0.5 * math.cos(math.pi * done)}[args.lr_scheduler_type]
    return args.learning_rate * (1 - 0.9 * fall)


def update(args, algo, optimizer, minibatch, totals):
    """One optimizer step on a minibatch, in micro-batches whose losses and gradients add up. -> tokens trained"""
    optimizer.zero_grad()
    loss, tokens = torch.zeros((), device=args.device), 0
    for micro in data.split(minibatch, args.micro_batch_size, algo.rows_together) if minibatch is not None else []:
        with data.autocast(args):
            micro_loss, metrics = algo.loss(micro)
        micro_loss.backward()
        loss, tokens = loss + micro_loss.detach(), tokens + int(micro["completion_mask"].sum())
        add(totals, metrics)
    parameters = [p for network in algo.networks.values() for p in network.parameters()]
    for p in parameters:   # no row had a gradient: Adam still coasts on its momentum
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    if not torch.isfinite(loss) or not torch.isfinite(grad_norm):
        raise FloatingPointError
    optimizer.step()
    add(totals, {"loss": (loss, 1), "grad_norm": (grad_norm, 1)})
    return tokens


def add(totals, metrics):
    """Sum {name: (sum, count)} into totals; a plain number is a total (or, if its name starts with max, a maximum)."""
    for name, value in metrics.items():
        if isinstance(value, tuple):
            old = totals.get(name, (0, 0))
            totals[name] = (old[0] + float(value[0]), old[1] + float(value[1]))
        else:
            totals[name] = max(totals.get(name, 0.0), float(value)) if name.startswith("max") else totals.get(name, 0) + int(value)


def train(args, algo, task, again, checkpoint=None, pretrain_seconds=0.0):
    """Drive an algorithm in the folder args.out_dir, from `checkpoint` if there is one. Returns the summary, or None if
    Ctrl-C stopped the run, in which case the command `again` goes on. Raises InputError where the loss is not finite."""
    model, ref_model = algo.networks["model"], algo.frozen.get("ref_model")
    others = [network for network in algo.networks.values() if network is not model]
    optimizer = model.configure_optimizer(args.learning_rate, args.weight_decay, (0.9, args.adam_beta2), others=others)
    algo.micro_batch_size, algo.max_steps, algo.optimizer = args.micro_batch_size, args.max_steps, optimizer
    if args.compile:
        model.completion_logits = torch.compile(model.completion_logits, dynamic=True)
    path, metrics_path = (os.path.join(args.out_dir, name) for name in ("ckpt.pt", "metrics.jsonl"))
    settings = {**vars(args), "model_config": dataclasses.asdict(model.config)}
    step, seconds, counts = 0, 0.0, {"updates": 0, "sampled_tokens": 0, "trained_tokens": 0}
    totals, tally = {}, dict(collect=0.0, train=0.0, sampled=0, trained=0)   # since the last line
    started = time.time()

    def evaluate(full):
        clock = time.time()
        if hasattr(algo, "evaluate"):   # a reward model is judged in its own way
            found = algo.evaluate(args)
        else:
            found = report.evaluate(args, model, ref_model, algo.tokenizer, task, full)
        counts["eval_seconds"] = counts.get("eval_seconds", 0.0) + time.time() - clock
        return found

    if checkpoint is None:
        write_text(os.path.join(args.out_dir, "config.json"), json.dumps(settings, indent=2) + "\n")
        torch.manual_seed(args.seed)
        before = evaluate(full=True)
        seconds = time.time() - started
        lines = [{"step": 0, "seconds": seconds, **counts, **before}]
    else:
        for name, network in {**algo.networks, **algo.frozen}.items():
            network.load_state_dict(checkpoint["networks"][name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        set_random_states(checkpoint["random_states"])
        step, counts, before, seconds = (checkpoint[k] for k in ("step", "counts", "before", "seconds"))
        totals, tally = checkpoint["totals"], checkpoint["tally"]
        pretrain_seconds = checkpoint["pretrain_seconds"]
        lines = [line for line in report.read_metrics(metrics_path) if line["step"] <= step]   # the rest happens again
    started = time.time() - seconds
    write_text(metrics_path, "".join(json.dumps(line) + "\n" for line in lines))

    def save():
        networks = {name: {k: v.cpu() for k, v in n.state_dict().items()} for name, n in {**algo.networks, **algo.frozen}.items()}
        content = {"model": networks["model"], "model_config": dataclasses.asdict(model.config), "tokenizer": args.tokenizer,
                   "networks": networks, "optimizer": optimizer.state_dict(), "step": step, "counts": counts, "before": before,
                   "seconds": time.time() - started, "pretrain_seconds": pretrain_seconds,
                   "totals": totals, "tally": tally, "random_states": random_states(),
                   "settings": settings}
        write(path, lambda tmp: torch.save(content, tmp))

    interrupted = []
    def on_interrupt(signum, frame):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(signum)
        print("\nstopping after this step (Ctrl-C again: at once, losing what was not saved)", flush=True)
    previous_handler = signal.signal(signal.SIGINT, on_interrupt)

    examples = algo.examples(args.seed)
    generator = torch.Generator(args.device)
    bar = tqdm(total=args.max_steps, initial=step, desc=args.algo, unit="step", disable=args.algo != "pretrain", mininterval=1)
    console, loop_started = report.Console(), time.time()
    saved_at, start_step = step if checkpoint else None, step
    try:
        while step < args.max_steps and not interrupted:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            shuffle = args.algo != "pretrain"   # a corpus is read in order
            batch_examples = [examples[i] for i in data.batch_indices(len(examples), args.batch_size, step, args.seed, shuffle)]
            generator.manual_seed(1_000_003 * args.seed + step)   # so that a step is the same whatever came before it
            trained, clock = 0, time.time()
            with data.autocast(args):
                batch, metrics = algo.collect(batch_examples, generator, step)
                minibatches = algo.minibatches(batch)
            sampled = int(metrics.pop("sampled_tokens", 0))
            tally["collect"] += time.time() - clock
            clock = time.time()
            try:
                for minibatch in minibatches:
                    trained += update(args, algo, optimizer, minibatch, totals)
                    counts["updates"] += 1     # a step of the optimizer, with or without a gradient
                if step + 1 == args.max_steps or (step + 1) % args.save_steps == 0:   # never save, or end with, what has blown up
                    if not all(p.isfinite().all() for n in algo.networks.values() for p in n.parameters()):
                        raise FloatingPointError
            except FloatingPointError:
                raise InputError(f"the loss or its gradient is not finite at step {step + 1}; the last good checkpoint is "
                                 f"{path + f' (step {saved_at})' if saved_at is not None else 'the one that the run started from'}: "
                                 "go on from it with a lower --learning_rate") from None
            tally["train"] += time.time() - clock
            add(totals, metrics)   # after the passes, which may have added to them
            step += 1
            for name, n in (("sampled", sampled), ("trained", trained)):
                tally[name] += n
                counts[f"{name}_tokens"] += n
            bar.update()
            out_of_time = args.max_minutes and time.time() - started > 60 * args.max_minutes
            last = step == args.max_steps or out_of_time
            if step % args.logging_steps == 0 or last:
                line = {"step": step, "seconds": time.time() - started, **counts, "learning_rate": learning_rate(args, step - 1),
                        "tokens_per_second/train": tally["trained"] / max(tally["train"], 1e-9)}
                if tally["sampled"]:
                    line["tokens_per_second/sample"] = tally["sampled"] / max(tally["collect"], 1e-9)
                line |= {name: v[0] / max(v[1], 1) if isinstance(v, tuple) else v for name, v in totals.items()}
                if step % args.eval_steps == 0 or last:
                    line |= evaluate(full=last)
                lines.append(line)
                with open(metrics_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
                left = (time.time() - loop_started) / (step - start_step) * (args.max_steps - step)
                if bar.disable:
                    console.print(line, left)
                else:
                    bar.set_postfix({k: f"{line[k]:.3f}" for k in ("loss", "eval/accuracy") if k in line})
                totals, tally = {}, dict.fromkeys(tally, 0)
            if step % args.save_steps == 0 or last or interrupted:
                save()
                saved_at = step
            if out_of_time:
                break
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous_handler)
    if interrupted and step < args.max_steps:
        print(f"saved {path} at step {step} of {args.max_steps}; go on with: {again}")
        return None
    after = {k: v for k, v in lines[-1].items() if k.startswith("eval/")}
    seconds = time.time() - started
    summary = {"algo": args.algo, "task": task.name, "seed": args.seed, "steps": step,
               "seconds": seconds, "train_seconds": seconds - counts["eval_seconds"],
               "pretrain_seconds": pretrain_seconds, **counts,
               "peak_memory_mb": report.peak_memory_mb(), "before": before, "after": after}
    write_text(os.path.join(args.out_dir, "summary.json"), json.dumps(summary, indent=2) + "\n")
    return summary


# -- from the command line to the loop ----------------------------------------------------------------------------------


def make_task(args, config, tokenizer, block_size):
    """The task that the flags name. Raises InputError where a file lacks a column that is needed,
    or where what is to be read does not fit the context."""
    if args.data:
        task = data.JsonLines(args.data, args.eval_data, args.max_new_tokens or 32)
        check_lines(args, config, task, tokenizer, block_size)
    else:
        task = data.Chain(args.min_terms, args.max_terms) if args.task == "chain" else data.Countdown()
        task.max_new_tokens = args.max_new_tokens or task.max_new_tokens
    for example in longest_examples(args, config, task):
        prompt = 1 + len(tokenizer.encode(example["prompt"]))
        answer = 1 + len(tokenizer.encode(example.get("completion", "")))
        answer = max(answer, task.max_new_tokens)
        if prompt + answer > block_size:
            raise InputError(f"a prompt of {prompt} tokens and {answer} for its answer do not fit "
                             f"block_size {block_size}: shorten the prompt, lower --max_new_tokens "
                             "or raise --block_size")
    return task


def check_lines(args, config, task, tokenizer, block_size):
    """Raise InputError for the first line of a file that cannot be trained on, or judged by."""
    algorithm, size = ALGORITHMS[args.algo], dict(tokenizer=tokenizer, block_size=block_size)
    if not judging(args):
        choices = [("prompt", "answer")] if args.inspect == "all" else algorithm.columns(config)
        columns = next((c for c in choices if set(c) <= set(task.train[0])), choices[0])
        sampled = not {"text", "completion", "chosen"} & set(columns)          # answers need room
        task.require(*columns, room=task.max_new_tokens if sampled else None, **size)
    if args.sample is None and not hasattr(algorithm, "evaluate") and task.test:
        sampled, columns = "answer" in task.columns, ("prompt",)         # as in report.evaluate
        if not sampled:
            choices = [("prompt", "completion"), ("prompt", "chosen"), ("text",), ()]
            columns = next(c for c in choices if set(c[-1:]) <= set(task.test[0]))
        room = task.max_new_tokens if sampled else None
        task.require(*columns, rows=task.test, room=room, **size)


def longest_examples(args, config, task):
    """The longest of what a model reads that comes from no file: the prompt to answer, or problems
    of most terms, with their solutions where demonstrations are trained on."""
    if args.sample is not None:
        return [{"prompt": args.sample}]
    if args.data:
        return []
    task = data.Chain(args.max_terms, args.max_terms) if args.task == "chain" else task
    shown = ALGORITHMS[args.algo].columns(config)[0] == ("prompt", "completion")
    examples = [task.demonstration(random.Random(i)) for i in range(50)]
    return [e if shown else {"prompt": e["prompt"]} for e in examples]


def learned(config):
    """Whether a reward model is among the rewards."""
    return "model" in getattr(config, "reward", "").split(",")


def task_name(args):
    return data.JsonLines.name_of(args.data) if args.data else args.task


def shared_command(args, shape, algo):
    """The flags that make the base model (or the reward model) which these args ask for."""
    flags = ["--algo", algo]
    for name in ("task", "tokenizer", "base_seed", "min_terms", "max_terms", "device", "dtype", "eval_problems"):
        flags += [f"--{name}", str(getattr(args, name))]
    for name in ("init_from", "data", "eval_data", "max_new_tokens") if algo != "pretrain" else ():
        flags += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    return flags + [word for name, value in shape.items() for word in (f"--{name}", str(value))]


def shared_dir(args, shape):
    """out/<task>-pretrain-<base_seed> for the default base; other settings get a name of their own beside it."""
    ignored = WATCHING | {"device", "dtype", "compile", "micro_batch_size"}
    def settings(a, s):
        return {k: v for k, v in vars(a).items() if k not in ignored} | s
    default, _, _ = parse_args(["--algo", args.algo, "--task", args.task, "--base_seed", str(args.base_seed)])
    mine, suffix = settings(args, shape), ""
    if mine != settings(default, {}):
        suffix = "-" + hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:6]
    return f"out/{task_name(args)}-{args.algo}-{args.base_seed}{suffix}"


def ensure(algo, args, shape, again):
    """The folder of the base model (or the reward model) and its summary. It is made first if need be; None if Ctrl-C
    stopped that."""
    command = shared_command(args, shape, algo)
    its_args, _, its_shape = parse_args(command)
    its_args.out_dir = shared_dir(its_args, its_shape)
    if is_finished(its_args):
        summary = read_json(os.path.join(its_args.out_dir, "summary.json"))
        print(f"{SHARED[algo]}: {its_args.out_dir} (made earlier in {summary['seconds']:.0f} s)", flush=True)
    else:
        how = "pre-training one first (once; every algorithm starts from it)" if algo == "pretrain" else "training one first (once)"
        print(f"No {SHARED[algo].lower()} in {its_args.out_dir} yet: {how}.", flush=True)
        if run(command, again) == 130:
            return None
        summary = read_json(os.path.join(its_args.out_dir, "summary.json"))
    return its_args.out_dir, summary


def is_finished(args):
    """Whether the run in args.out_dir got to its last step and summed up. --max_minutes may have ended it earlier."""
    path = os.path.join(args.out_dir, "summary.json")
    return os.path.exists(path) and read_json(path)["steps"] >= args.max_steps


def check_folder(path):
    """Raise InputError where a run could not write into the folder `path`, which need not exist."""
    there = path
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        tempfile.TemporaryFile(dir=there or ".").close()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another "
                         "--out_dir") from None


def start_model(args, shape, path):
    """The model of a checkpoint that a run starts from. Raises InputError where it cannot."""
    checkpoint = read_checkpoint(path)
    model = build_model(args, checkpoint)
    asked = GPTConfig(**{"vocab_size": 258, **shape})
    for name, value in shape.items():
        if args.init_from and getattr(model.config, name) != getattr(asked, name):
            raise InputError(f"{path} has {name} {getattr(model.config, name)}, not {value}: "
                             "leave the flag out")
    if model.config.scalar_head:
        raise InputError(f"{path} is a reward model, which cannot write; give it as --reward_model")
    if checkpoint.get("tokenizer", args.tokenizer) != args.tokenizer:
        raise InputError(f"{path} was trained with --tokenizer {checkpoint['tokenizer']}")
    return model


def give_reward_model(task, args, path, tokenizer):
    """Let the task score answers by the reward model in `path`. Raises InputError if it is none."""
    model = build_model(args, read_checkpoint(path)).requires_grad_(False)
    if not model.config.scalar_head or model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(f"{path} is no reward model for this tokenizer: make one with --algo rm")
    task.reward_model, task.learned_reward = model, rm.scorer(model, tokenizer)


def prepare(args, config, shape, tokenizer):
    """The model of --init_from (None: it will be the base) and the task. Raises InputError for all
    that flags and files show to be wrong, before anything is trained: the algorithm is set up once,
    on a model as small as can be."""
    model = start_model(args, shape, args.init_from) if args.init_from else None
    start = model.config if model else GPTConfig(**{"vocab_size": tokenizer.vocab_size, **shape})
    task = make_task(args, config, tokenizer, start.block_size)
    if judging(args):
        return model, task
    check_folder(args.out_dir)
    if learned(config) and args.reward_model:
        give_reward_model(task, args, args.reward_model, tokenizer)
    elif learned(config):
        its_args, its_config, its_shape = parse_args(shared_command(args, shape, "rm"))
        its_args.out_dir = shared_dir(its_args, its_shape)
        prepare(its_args, its_config, its_shape, tokenizer)
        task.learned_reward = task.reward                 # until there is a reward model
    small = GPT(GPTConfig(start.vocab_size, start.block_size, n_layer=1, n_head=1, n_embd=2))
    ALGORITHMS[args.algo](config, small, small, tokenizer, task)
    return model, task


def check_same_settings(args, shape, checkpoint, path):
    """A run goes on with the settings with which it began, or not at all."""
    missing = {"networks", "optimizer", "step", "counts", "before", "seconds", "pretrain_seconds",
               "totals", "tally", "random_states", "settings"} - set(checkpoint)
    if missing:
        raise InputError(f"{path} holds a model but no {sorted(missing)[0]}, and cannot be resumed; use --init_from {path}")
    saved = {**checkpoint["settings"], **{name: checkpoint["model_config"][name] for name in shape}}
    asked = dataclasses.asdict(GPTConfig(**{"vocab_size": checkpoint["model_config"]["vocab_size"], **shape}))
    for name, value in {**vars(args), **{name: asked[name] for name in shape}}.items():
        if name not in WATCHING and name in saved and saved[name] != value:
            raise InputError(f"{path} was made with --{name} {saved[name]}, this command says {value}: "
                             "give the same flags to resume, or another --out_dir to start anew")


def keep_earlier_run(out_dir):
    """A run never overwrites another: what is in its folder moves to the first free name beside it."""
    if os.path.exists(os.path.join(out_dir, "config.json")):
        n = next(n for n in range(1, 10**6) if not os.path.exists(f"{out_dir}.{n}"))
        os.rename(out_dir, f"{out_dir}.{n}")
        print(f"{out_dir} held an earlier run, which is now {out_dir}.{n} (--resume would have gone on with it)")


def plan(asked, common):
    """The runs of a comparison, {folder: (variant, args, shape, command)}, variant by variant and
    seed by seed. Raises InputError where one cannot be run or has nothing to be compared by."""
    runs = {}
    for variant in asked.algo.split(","):
        name, *flags = variant.split(":")
        if name in SHARED:
            raise InputError(f"--algo {name} makes what the others start from and cannot be "
                             "compared with them")
        own = {flag.split("=")[0].replace("-", "_") for flag in flags}
        for seed in range(asked.seed, asked.seed + asked.seeds):
            command = ["--algo", name, *common, *(f"--{flag}" for flag in flags)]   # the last wins
            command += ["--seed", str(seed)]
            args, config, shape = parse_args(command)
            if (judging(args) or args.resume or args.inspect
                    or own & {"algo", "seed", "seeds", "out_dir"}):
                raise InputError("a comparison goes on by itself and gives all variants the same "
                                 "seeds, from --seed on, --seeds of them: leave out --resume, "
                                 "--eval_only, --sample, --inspect, and a variant's own seed")
            pick_device(args)
            folder = re.sub("[^a-zA-Z0-9_.]+", "-", variant)
            args.out_dir = f"out/{task_name(args)}-{folder}-{seed}"
            if args.out_dir in runs:
                raise InputError(f"{runs[args.out_dir][0]} and {variant} are, or look like, the "
                                 "same")
            runs[args.out_dir] = variant, args, shape, [*command, "--out_dir", args.out_dir]
        _, task = prepare(args, config, shape, data.Tokenizer(args.tokenizer))
        judged = {"answer", "completion", "chosen", "text"}
        if args.data and not (task.test and all(judged & set(line) for line in task.test)):
            raise InputError(f"{args.data}: no held-out lines with an answer, a completion or a "
                             "text to compare by; give some as --eval_data")
    return runs


def compare(argv):
    """--algo a,b:flag=value,c --seeds N: run each N times from the same base and put the results
    into one table. What is finished already is reused, what was interrupted goes on. Returns the
    exit code."""
    asked, common = which(argv)
    asked.seeds = 1 if asked.seeds is None else asked.seeds
    check(asked, at_least_1="seeds")
    runs, results, again = plan(asked, common), [], f"python train.py {shlex.join(argv)}"
    folder = asked.out_dir or f"out/{task_name(next(iter(runs.values()))[1])}-compare"
    check_folder(folder)
    bases = {tuple(shared_command(args, shape, "pretrain")): (args, shape)
             for _, args, shape, _ in runs.values() if args.init_from is None}
    for args, shape in bases.values():
        if ensure("pretrain", args, shape, again) is None:
            return 130
    handler = signal.signal(signal.SIGINT, lambda *_: None)   # Ctrl-C reaches the run itself, which saves and ends with 130
    try:
        for variant, args, shape, command in (bar := tqdm(runs.values(), desc="runs", unit="run")):
            path, same = os.path.join(args.out_dir, "ckpt.pt"), False
            if os.path.exists(path):
                try:
                    check_same_settings(args, shape, read_checkpoint(path), path)
                    same = read_json(os.path.join(args.out_dir, "config.json"))["eval_problems"] == args.eval_problems
                except InputError:
                    pass
            if not (same and is_finished(args)):
                bar.set_postfix_str(f"{variant}, seed {args.seed}")
                done = subprocess.run([sys.executable, __file__, *command, *(["--resume"] if same else [])],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode == 130:
                    print(f"\nstopped; go on with: {again}")
                    return 130
                if done.returncode:
                    raise InputError(f"{variant}, seed {args.seed}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
            results.append({"variant": variant, "folder": args.out_dir, **read_json(os.path.join(args.out_dir, "summary.json"))})
            bar.write(report.result_line(results[-1]))
    finally:
        signal.signal(signal.SIGINT, handler)
    write_text(os.path.join(folder, "compare.json"), json.dumps(results, indent=2) + "\n")
    print("\n" + report.comparison(results) + f"\n\nfiles: {folder}/compare.json, {report.plot_comparison(folder, results)}")
    return 0


def run(argv, again=None):
    """Parse the command line and do what it says. Returns the exit code. `again` is the command to give after an
    interruption; None: this one, with --resume once the run has begun."""
    argv = underscores(argv)
    asked, _ = which(argv)
    if asked.seeds is not None or {",", ":"} & set(asked.algo):
        return compare(argv)
    args, config, shape = parse_args(argv)
    pick_device(args)
    algorithm = ALGORITHMS[args.algo]
    shared = args.algo in SHARED and not judging(args)
    args.out_dir = args.out_dir or (shared_dir(args, shape) if shared else f"out/{task_name(args)}-{args.algo}-{args.seed}")
    path, outermost = os.path.join(args.out_dir, "ckpt.pt"), again is None
    once_more = again or f"python train.py {shlex.join(argv)}"
    again = again or once_more + ("" if args.resume else " --resume")
    tokenizer = data.Tokenizer(args.tokenizer)
    if shared and is_finished(args):
        print(f"{args.out_dir} already holds this {SHARED[args.algo].lower()}; delete the folder to make it again")
        return 0

    # Which weights to start from.
    checkpoint, pretrain_seconds = None, 0.0
    if args.resume or shared and os.path.exists(path):
        checkpoint = read_checkpoint(path)
        for name in ("init_from", "reward_model"):
            setattr(args, name, getattr(args, name) or checkpoint.get("settings", {}).get(name))
        check_same_settings(args, shape, checkpoint, path)
        model = build_model(args, checkpoint)
        if model.config.scalar_head:   # of a reward model; the loop fills in the weights of both it and its sampler
            model = GPT(dataclasses.replace(model.config, scalar_head=False)).to(args.device)
            model.skip_padding = args.device == "cpu"
        if is_finished(args):
            print(f"{args.out_dir} is finished: {checkpoint['step']} of {args.max_steps} steps")
            return 0
        task = make_task(args, config, tokenizer, model.config.block_size)
        print(f"Resuming {args.out_dir} at step {checkpoint['step']} of {args.max_steps}", flush=True)
    else:
        model, task = prepare(args, config, shape, tokenizer)
        if args.algo == "pretrain" and not judging(args):
            torch.manual_seed(args.seed)
            model = GPT(GPTConfig(**{"vocab_size": tokenizer.vocab_size, **shape})).to(args.device)
            model.skip_padding = args.device == "cpu"
        elif model is None:
            base = ensure("pretrain", args, shape, once_more)
            if base is None:
                return 130
            model, pretrain_seconds = start_model(args, shape, base[0]), base[1]["seconds"]
    if learned(config) and not judging(args) and not hasattr(task, "reward_model"):
        made = (args.reward_model, None) if args.reward_model else ensure("rm", args, shape, once_more)
        if made is None:
            return 130
        give_reward_model(task, args, made[0], tokenizer)
    if args.sample is not None:
        report.sample_and_print(args, model, tokenizer, task)
        return 0
    if args.eval_only:
        print(report.table([("now", report.evaluate(args, model, None, tokenizer, task, full=True))], task))
        return 0

    ref_model = None if args.algo == "pretrain" else copy.deepcopy(model).requires_grad_(False)
    algo = algorithm(config, model, ref_model, tokenizer, task)
    if args.inspect:
        print(inspect(args, algo, ref_model))
        return 0
    if checkpoint is None and not shared:
        keep_earlier_run(args.out_dir)
    if args.algo != "pretrain":
        print(report.opening(args, algo, task), flush=True)
    summary = train(args, algo, task, again, checkpoint, pretrain_seconds)
    if summary is None:
        return 130
    if shared:
        print(report.shared_line(SHARED[args.algo], summary, args.out_dir), flush=True)
    if outermost:
        report.finish(args, summary, algo)
    return 0


def inspect(args, algo, ref_model):
    """--inspect: what a step would do to each token of its batch."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    if args.inspect == "one":
        examples = algo.examples(args.seed)
        examples = [examples[i] for i in data.batch_indices(len(examples), args.batch_size, 0, args.seed)]
        return report.inspect(args, algo, examples, generator)
    own = {"sft": dict(source="self"), "dft": dict(source="self")}   # on the same answers: those that were right
    algos = {name: ALGORITHMS[name](ALGORITHMS[name].Config(**own.get(name, {})), copy.deepcopy(algo.model), ref_model,
                                    algo.tokenizer, algo.task) for name in ("sft", "dft", "dpo", "ppo", "grpo")}
    return report.inspect_all(args, algos, algos["grpo"].examples(args.seed)[:8], generator)


def main():
    try:
        code = run(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:    # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:   # a full disk, a folder that may not be read
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
