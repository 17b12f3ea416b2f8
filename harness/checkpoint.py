"""
Checkpoints: written whole or not at all, read with care.

ckpt.pt is a dict. "model" is the policy's state dict and "model_config" its shape, which is all
that `--init_from` and `sample.py` need; the rest ("algorithm": every network, "optimizer", "log",
...) is for --resume, which goes on bit for bit.
"""

import dataclasses
import json
import os

import torch

from harness import hub, ranks
from harness.errors import InputError
from harness.flags import declarations
from model import GPT, GPTConfig

RESUMED = ("algorithm", "optimizer", "step", "log", "before", "settings")


def write(path, save, flag="--out_dir"):
    """Write a file under another name, then rename it: a reader finds the old file or the new one,
    never half of one. save(path) does the writing; of several ranks the first one's does. flag:
    what named the place."""
    if ranks.RANK > 0:
        return
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save(path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:   # torch reports a full disk as a RuntimeError
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        kept = "; the earlier file is untouched" if os.path.exists(path) else ""
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise InputError(f"cannot write {path}: {reason}{kept}; free some space or choose another "
                         f"{flag}") from None


def write_text(path, text, flag="--out_dir"):
    def save(tmp):
        with open(tmp, "w") as file:
            file.write(text)
    write(path, save, flag)


def read_json(path):
    with open(path) as file:
        return json.load(file)


def read(path):
    """The dict in a checkpoint file, or in the ckpt.pt of a folder; of a published model the same,
    its weights still to be read (harness/hub.py). Raises InputError for any other file."""
    if hub.is_published(path):
        return hub.read(path)
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no checkpoint there") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except Exception as error:   # the bytes of another kind of file can raise anything at all
        raise InputError(f"{path}: not a checkpoint of this project, or a truncated one "
                         f"({type(error).__name__})") from None
    if not isinstance(found, dict) or not {"model", "model_config"} <= set(found):
        raise InputError(f"{path}: a PyTorch file, but not a checkpoint of this project "
                         "(no 'model' and 'model_config')")
    return found


def build_model(found, device="cpu"):
    """The model in a checkpoint. device "meta": its shape alone. Raises InputError where its
    weights do not fit or are not finite."""
    if callable(found["model"]):
        model = hub.build(found["model_config"], found["model"], device)
        return check_finite(model)
    try:
        model = GPT(GPTConfig(**found["model_config"]))
        model.load_state_dict(found["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"the checkpoint's weights do not fit its own shape: {reason}") from None
    return check_finite(model).to(device)


def check_finite(model):
    """The model. Raises InputError where a weight is nan or infinite."""
    if not all(p.is_meta or p.isfinite().all() for p in model.parameters()):
        raise InputError("the checkpoint's weights are not all finite: it was saved after training "
                         "had blown up")
    return model


def settings(algo):
    """Every setting of a run, as plain values."""
    return {**dataclasses.asdict(algo.config),
            "model_config": dataclasses.asdict(algo.model.config)}


def save(run):
    """Write the run's ckpt.pt."""
    algo = run.algo
    on_cpu = {name: value.cpu() for name, value in algo.state_dict().items()}
    model = {name.removeprefix("model."): value for name, value in on_cpu.items()
             if name.startswith("model.")}
    content = {"model": model, "model_config": dataclasses.asdict(algo.model.config),
               "tokenizer": algo.config.tokenizer, "algorithm": on_cpu,
               "optimizer": algo.optimizer.state_dict(), "step": run.step, "before": run.before,
               "log": vars(run.log), "settings": settings(algo)}
    write(run.path("ckpt.pt"), lambda tmp: torch.save(content, tmp))


def restore(run, found):
    """Put a run back to where its checkpoint was written."""
    try:
        run.algo.load_state_dict(found["algorithm"])
        run.algo.optimizer.load_state_dict(found["optimizer"])
        run.step, run.before = found["step"], found["before"]
        vars(run.log).update(found["log"])
        if ranks.RANK > 0:   # what the ranks had logged between two lines is rank 0's
            run.log.means, run.log.maxima = {}, {}
    except (RuntimeError, TypeError, ValueError, KeyError):
        raise InputError(f"{run.path('ckpt.pt')} holds other networks or another optimizer than "
                         "this run needs, and cannot be resumed") from None


def check_same_settings(config, found, path):
    """A run goes on with the settings with which it began, or not at all."""
    missing = sorted(set(RESUMED) - set(found))
    if missing:
        raise InputError(f"{path} holds a model but no {missing[0]}, and cannot be resumed; use "
                         f"--init_from {path}")
    saved, flags = found["settings"], declarations(type(config))
    names = [name for name, (_, _, metadata) in flags.items() if not metadata["watching"]]
    pairs = {name: (saved[name], getattr(config, name)) for name in ["algo", *names]
             if name in saved}   # an earlier version may not have had it
    pairs |= {name: (found["model_config"][name], value) for name, value in config.shape.items()}
    for name, (was, now) in pairs.items():
        if was != now:
            raise InputError(f"{path} was made with --{name} {was}, this command says {now}: give "
                             "the same flags to resume, or another --out_dir to start anew")
