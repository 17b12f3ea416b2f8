"""
Settings: fields of a dataclass that are also flags of the command line.

A field is declared once, with its default, its help text and its bounds:

    beta: float = flag(0.1, "strength of the anchor (0.05 to 0.5)", above=0)

`Settings` holds what all algorithms share. An algorithm's Config inherits from it, adds fields of
its own, and changes a shared default by plain assignment (`max_steps: int = 60`).
"""

import argparse
import dataclasses
import difflib
import functools
import math
import re
import typing
from dataclasses import dataclass
from typing import Literal

import torch

from harness.errors import InputError

BOUNDS = {"above": ("above", lambda value, bound: value > bound),
          "at_least": ("of at least", lambda value, bound: value >= bound),
          "below": ("below", lambda value, bound: value < bound),
          "at_most": ("of at most", lambda value, bound: value <= bound)}


def flag(default, help, watching=False, **bounds):
    """A dataclass field that is also a flag; a default of None means "not given".

    bounds: above, at_least, below, at_most. watching: the setting changes how a run is watched, not
    what it computes, so it may differ between a run and its resumption.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, watching=watching, **bounds))


@functools.cache
def declarations(config_class):
    """{name: (class that declared the flag, its type, its metadata)}, in order of declaration."""
    found = {}
    for cls in reversed(config_class.__mro__):
        fields = vars(cls).get("__dataclass_fields__", {})
        for name, kind in vars(cls).get("__annotations__", {}).items():
            if fields[name].metadata:
                found.setdefault(name, (cls, kind, fields[name].metadata))
    return found


def check_choice(config_class, name, value):
    """Raise ValueError for a string that is no choice of the flag of that name."""
    _, kind, _ = declarations(config_class)[name]
    if value not in typing.get_args(kind):
        raise ValueError(f"{name} {value!r}: choose from {', '.join(typing.get_args(kind))}")


def check_bounds(config):
    """Raise InputError for the first setting that is no choice, not finite or out of bounds."""
    for name, (_, kind, metadata) in declarations(type(config)).items():
        value, choices = getattr(config, name), typing.get_args(kind)
        if value is None:
            continue
        if choices and value not in choices:
            raise InputError(f"--{name} {value}: choose from {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value}: a finite number is needed")
        for bound, (words, holds) in BOUNDS.items():
            if bound in metadata and not holds(value, metadata[bound]):
                raise InputError(f"--{name} {value}: a number {words} {metadata[bound]} is needed")


# -- what all algorithms share --------------------------------------------------------------------


@dataclass
class Start:
    """what to start from"""
    init_from: str = flag(None, "start from this checkpoint, a folder or a file; or from the "
                                "folder of a published model; none: the task's base model, made "
                                "first if missing")
    base_seed: int = flag(0, "seed of the base model, apart from --seed", at_least=0,
                         below=2**40)
    pretraining: Literal["short", "long"] = flag("short", "of the base model; long: 2,000 steps in "
                                                 "place of 1,080, as in experiments/")
    reward_model: str = flag(None, "of --reward model: folder or file of --algo rm; none: the "
                                   "task's, made first if missing")
    resume: bool = flag(False, "go on where the run in the output folder stopped", watching=True)
    inspect: Literal["one", "all"] = flag(None, "show a batch token by token, with the weight of "
                                          "each gradient, and stop; all: every algorithm's", True)
    html: str = flag(None, "of --inspect all: write it to this file as well, a page for a browser",
                     True)


@dataclass
class Data:
    """task and data"""
    task: Literal["chain", "facts", "countdown"] = flag("chain", "the built-in task")
    min_terms: int = flag(3, "chain: fewest terms in a problem (2 to 4)", at_least=2)
    max_terms: int = flag(4, "chain: most terms in a problem (3 to 6)", at_least=2)
    worked_share: float = flag(0.3, "chain's corpus: share of everyday text that shows its steps "
                                    "(0.005: a rare habit)", at_least=0, at_most=1)
    other_skills: bool = flag(False, "chain's corpus: reversing and facts as well, watched while "
                                     "something else is taught")
    data: str = flag(None, "a .jsonl file: text; prompt and completion, answer, or chosen and "
                           "rejected")
    eval_data: str = flag(None, "held-out lines; none: one in ten of --data")
    max_new_tokens: int = flag(0, "longest completion, in tokens; 0: the task's own", at_least=0)
    tokenizer: str = flag("byte", "byte, which needs no download; gpt2; or a folder with a "
                                  "tokenizer.json (--init_from a published model brings its own)")
    template: Literal["auto", "chatml", "llama3", "plain"] = flag(
        "auto", "of a published model's prompts: its chat turns, or plain text; auto: what it is "
                "made for")
    system_prompt: str = flag(None, "what is said before a published model's prompts; none: what "
                                    "its own template says")


@dataclass
class Loop:
    """the loop"""
    seed: int = flag(0, "of everything random in the run", at_least=0, below=2**40)
    max_steps: int = flag(100, "batches to sample and train on", at_least=1)
    max_minutes: float = flag(0.0, "stop after so many minutes; 0: no limit", True, at_least=0)
    batch_size: int = flag(32, "examples per step: prompts where answers are sampled, else texts "
                               "(8 to 256)", at_least=1)
    micro_batch_size: int = flag(0, "completions per forward pass, to save memory; changes no "
                                    "result; 0: all at once", at_least=0)
    logging_steps: int = flag(10, "steps between lines", True, at_least=1)
    eval_steps: int = flag(10, "steps between evaluations; those at which a line is due", True,
                           at_least=1)
    save_steps: int = flag(50, "steps between checkpoints", True, at_least=1)
    eval_problems: int = flag(256, "held-out problems to judge by (128 to 1024)", True, at_least=1)
    out_dir: str = flag(None, "the run's folder; none: out/<task>-<algo>-<seed>", True)


@dataclass
class Optimizer:
    """optimizer (AdamW)"""
    learning_rate: float = flag(1e-3, "peak learning rate (1e-4 to 6e-3 at this size)", above=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = flag(
        "linear", "after the warm-up: stay, or fall to a tenth")
    warmup_steps: int = flag(10, "steps from 0 to the peak", at_least=0)
    weight_decay: float = flag(0.0, "on matrices (0 to 0.1)", at_least=0)
    adam_beta2: float = flag(0.95, "memory of the second moment (0.95 to 0.999)",
                             at_least=0, below=1)
    max_grad_norm: float = flag(1.0, "longer gradients are shortened to this norm; 0: never",
                                at_least=0)


@dataclass
class Machine:
    """machine"""
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "of matrix products; auto: bfloat16 on cuda, else float32")
    compile: bool = flag(False, "compile the training forward pass (worth it on a GPU)")


@dataclass
class Settings(Machine, Optimizer, Loop, Data, Start):
    """What every algorithm's Config inherits. `algo` and `shape` are filled in by `parse`."""
    algo: str = ""
    shape: dict = dataclasses.field(default_factory=dict)   # of a new base: flags that were given
    shuffle: bool = True

    def __post_init__(self):
        check_bounds(self)
        if self.html is not None and self.inspect != "all":
            raise InputError("--html is the page of --inspect all: give that as well")

    def schedule(self, step):
        """The steps [first, end) over which the learning rate runs its course: here the run."""
        return 0, self.max_steps


@dataclass
class Demonstrations(Settings):
    """demonstrations"""
    num_demonstrations: int = flag(400, "size of the finite set of demonstrations (100 to 10000)",
                                   at_least=1)
    style: Literal["own", "letters", "swapped", "totals", "bare", "mixed"] = flag(
        "own", "chain: how they are written: as in the textbook, or foreign; mixed: each in own, "
               "letters or swapped")
    wrong_share: float = flag(0.0, "chain: share of them with a wrong step (0 to 0.6)", at_least=0,
                              at_most=1)

    def columns(self):
        """What a line of --data must have, one or another set of columns."""
        return [("prompt", "completion"), ("text",)]


@dataclass
class Sampling(Settings):
    """sampled answers and their rewards"""
    num_generations: int = flag(16, "answers per prompt, the group (4 to 64)", at_least=1)
    num_prompts: int = flag(4000, "size of the finite set of training problems (500 to 100000)",
                            at_least=1)
    temperature: float = flag(1.0, "of sampling (grpo, ppo, hybrid, distill: and of scoring; "
                                   "0.7 to 1.2)", above=0)
    reward: str = flag("verifier", "reward functions, comma-separated: verifier, model, majority, "
                                   "format, brevity; dpo: confidence; wrong ones: leaky, flipped, "
                                   "random")
    reward_weights: str = flag("", "their weights, comma-separated; empty: 1 each")
    flip_probability: float = flag(0.2, "reward flipped: how often the verifier errs (0 to 0.5)",
                                   at_least=0, at_most=1)

    def columns(self):
        """What a line of --data must have, one or another set of columns."""
        judged = {"verifier", "flipped", "leaky"} & set(self.reward.split(","))
        return [("prompt", "answer") if judged else ("prompt",)]


# -- the command line -----------------------------------------------------------------------------

# What people may have copied from older pages, and what to type today.
MOVED = {
    "--sample": 'python sample.py FOLDER "7+5*3="',
    "--eval_only": "python sample.py FOLDER",
    "--top_k": "python sample.py FOLDER --top_k 5",
    "--top_p": "python sample.py FOLDER --top_p 0.9",
    "--seeds": "python compare.py sft grpo --seeds 3",
    "--source": "python train.py --algo rft",
    "--num_ppo_epochs": "--num_iterations",
    "--num_mini_batches": "--num_minibatches",
    "--cliprange": "--epsilon",
    "--cliprange_value": "--epsilon_value",
    "--truncation": "--bootstrap_truncated_completions or --mask_truncated_completions",
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def underscores(argv):
    """--learning-rate=1e-3 is --learning_rate=1e-3."""
    words = []
    for word in argv:
        name, *value = word.split("=", 1)
        name = name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name
        words.append("=".join([name, *value]))
    return words


def nearest(word, known):
    """` did you mean ...?` where something known is spelled like the word."""
    near = difflib.get_close_matches(word, known, 1)
    return f": did you mean {near[0]}?" if near else ""


def add_flags(parser, config_class):
    """A flag for every declared field, absent from the result unless it is given. A bool may stand
    without a value: --resume is --resume true."""
    groups = {}
    for name, (cls, kind, metadata) in declarations(config_class).items():
        if cls not in groups:
            groups[cls] = parser.add_argument_group(cls.__doc__.splitlines()[0])
        default = getattr(config_class, name)
        shown = "none" if default is None else str(default).lower() if default != "" else "empty"
        kwargs = dict(type=kind, metavar=getattr(kind, "__name__", ""))
        if typing.get_args(kind):
            kwargs = dict(choices=typing.get_args(kind))
        elif kind is bool:
            kwargs = dict(type=boolean, nargs="?", const=True, metavar="true|false")
        if name == "inspect":   # the one flag that means something with and without a value
            kwargs |= dict(nargs="?", const="one")
        groups[cls].add_argument(f"--{name}", default=argparse.SUPPRESS,
                                 help=f"{metadata['help']} [{shown}]", **kwargs)


def make_parser(algo, algorithms, shape_class, description=""):
    names = ",".join(algorithms)
    parser = Parser(
        prog="train.py", usage=f"python train.py --algo {{{names}}} [flags]", allow_abbrev=False,
        description=description, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=100))
    parser.add_argument("--algo", default="grpo", help="the algorithm")
    add_flags(parser, algorithms[algo].Config)
    add_flags(parser, shape_class)
    return parser


def which(argv):
    """The value of --algo, the last one that is given."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="grpo")
    return parser.parse_known_args(argv)[0].algo


def parse(argv, algorithms, shape_class, description=""):
    """argv -> the Config of the algorithm that it names, with every setting in its place.

    Raises InputError for what is unknown, with the nearest right name, or out of bounds.
    """
    argv = underscores(argv)
    algo = which(argv)
    if "," in algo or ":" in algo:
        raise InputError(f"comparing has moved: python compare.py {algo.replace(',', ' ')}")
    if algo not in algorithms:
        raise InputError(f"--algo {algo} is unknown{nearest(algo, algorithms)}; "
                         f"there are {', '.join(algorithms)}")
    parser = make_parser(algo, algorithms, shape_class, description)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if name in MOVED:
            raise InputError(f"{name} has moved: {MOVED[name]}")
        raise InputError(f"{unknown[0]} is unknown{nearest(name, parser._option_string_actions)}; "
                         "--help lists the flags")
    given = vars(found)
    shape = {name: given.pop(name) for name in declarations(shape_class) if name in given}
    shape_class(**shape)   # refuses what does not fit together
    config = algorithms[algo].Config(**given, shape=shape)
    config.algo = algo
    pick_device(config)
    return config


def pick_device(config):
    """Turn `auto` into a device and a dtype; refuse a device that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if config.device == "auto":
        config.device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", config.device):
        raise InputError(f"--device {config.device} is unknown: use auto, cpu, cuda or mps")
    if not available[config.device.split(":")[0]]:
        raise InputError(f"--device {config.device}: not available here; use --device cpu")
    if config.dtype == "auto":
        config.dtype = "bfloat16" if config.device.startswith("cuda") else "float32"
