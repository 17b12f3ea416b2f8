"""
One loop for every algorithm: sample a batch, say what each token is worth, descend.

    python train.py --algo grpo            train a base model if there is none, then apply GRPO
    python train.py --algo sft             fine-tune the same base on demonstrations
    python train.py --algo grpo --help     every flag, with its default and typical range
    python train.py --algo grpo --resume   go on where a run stopped
    python train.py --algo dft --inspect   one batch, token by token
    torchrun --nproc_per_node 2 train.py --algo grpo   the same run on two GPUs

An algorithm is an nn.Module that holds all its networks, so that its state_dict is the checkpoint:

    Config                                 a dataclass: the shared settings and the algorithm's own
    rows_together                          how many rows of a batch may not be separated (2: pairs)
    legend                                 what the columns of its log mean
    __init__(config, model, tokenizer, task)   model: the start; makes self.optimizer and ref_model
    examples()                             what batches are drawn from: a list of dicts
    sample(examples, generator, step, log) who sampled the text? -> batch, a dict of tensors
    minibatches(batch, log)                what is each token worth? -> the updates to make on it
    loss(minibatch, log)                   the equation -> a scalar that adds up over micro-batches

A run leaves in its folder (out/<task>-<algo>-<seed>, or --out_dir): config.json, every setting;
metrics.jsonl, one JSON object a line; ckpt.pt; at the end summary.json and, with matplotlib,
curve.png.
"""

import math
import os
import shlex
import sys

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")   # before torch: large memory pages on Linux

import torch

import data
from dft import DFT
from distill import Distill
from dpo import DPO
from grpo import GRPO
from harness import flags, memory, prepare, ranks, report, tokens
from harness.errors import one_line
from harness.run import Run
from hybrid import Hybrid
from model import GPTConfig
from ppo import PPO
from rft import RFT
from rm import RM
from sft import SFT, Pretrain

ALGORITHMS = {"pretrain": Pretrain, "sft": SFT, "dft": DFT, "rft": RFT, "dpo": DPO, "rm": RM,
              "ppo": PPO, "grpo": GRPO, "hybrid": Hybrid, "distill": Distill}


def train(algo, run):
    """The loop. `run` knows when to stop; evaluating, printing and saving are its business too."""
    config, log, examples = algo.config, run.log, algo.examples()
    generator = torch.Generator(config.device)
    for step in run.steps():
        for group in algo.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        generator.manual_seed(1_000_003 * config.seed + step)   # a step does not depend on the past
        chosen = data.batch_indices(len(examples), config, step)
        with log.clock("sampling_seconds"), data.autocast(config):
            # Who sampled the text?
            batch = algo.sample([examples[i] for i in chosen], generator, step, log)
            # What weight has each token, and what anchors the policy?
            minibatches = algo.minibatches(batch, log)
        for minibatch in minibatches:
            with log.clock("updating_seconds"):
                update(algo, minibatch, run)
        run.end_of_step()


def update(algo, minibatch, run):
    """One step of the optimizer, in micro-batches whose losses and gradients add up."""
    config, log, loss = algo.config, run.log, 0.0
    algo.optimizer.zero_grad()
    for micro in data.own_micro_batches(minibatch, config, algo.rows_together):
        with data.autocast(config):
            micro_loss = algo.loss(micro, log)
        micro_loss.backward()
        loss = loss + micro_loss.detach()
    trained = [p for p in algo.parameters() if p.requires_grad]
    loss = ranks.sum_gradients(trained, loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
    run.check_finite(loss, grad_norm)
    algo.optimizer.step()
    log.mean("loss", loss)
    log.mean("grad_norm", grad_norm)
    log.sum("updates", 1)
    log.sum("trained_tokens", int(minibatch["completion_mask"].sum()))


def learning_rate(config, step):
    """Linear warm-up, then constant or falling to a tenth of the peak. The course is that of the
    run, or of a round where training restarts (RFT)."""
    first, end = config.schedule(step)
    step, steps = step - first, end - first
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    fall = {"constant": 0.0, "linear": done, "cosine": 0.5 - 0.5 * math.cos(math.pi * done)}
    return config.learning_rate * (1 - 0.9 * fall[config.lr_scheduler_type])


# -- from the command line to the loop ------------------------------------------------------------


def run(config, once_more, go_on):
    """Train what config describes, and first what it starts from. -> exit code: 0, or 130 after
    Ctrl-C. once_more, go_on: the commands to give after one, before and after the run has begun."""
    kind = prepare.SHARED.get(config.algo)
    first = prepare.check(config, ALGORITHMS)
    if config.resume and prepare.is_finished(config):
        print(f"{config.out_dir} is finished: {config.max_steps} steps; delete the folder to make "
              "it again")
        return 0
    for needed in first:
        finished = prepare.is_finished(needed)
        otherwise = prepare.made_otherwise(needed) if finished else ""
        print(report.needed_line(needed, prepare.SHARED[needed.algo], finished, otherwise),
              flush=True)
        if not finished and run(needed, once_more, once_more) == 130:
            return 130
    algo, saved, pretrain_seconds = prepare.build(config, ALGORITHMS)
    if config.inspect:
        print(tokens.inspect(algo, ALGORITHMS))
        return 0
    if saved is None and not kind:
        prepare.keep_earlier_run(config.out_dir)
    print(report.opening(algo, saved["step"] if saved else 0), flush=True)
    with prepare.claimed(config.out_dir), Run(algo, go_on, saved, pretrain_seconds) as this:
        train(algo, this)
    summary = this.finish()
    if summary is None:
        return 130
    if ranks.RANK > 0:
        return 0
    if kind:
        print(report.shared_line(kind, summary, config.out_dir), flush=True)
    if not kind or go_on != once_more:   # asked for, not made on the way
        print(report.finish(algo, summary))
    return 0


def main(argv, algo=None):
    """`python train.py --algo grpo ...`, and `python grpo.py ...`, which is the same."""
    argv = flags.underscores([*(["--algo", algo] if algo else []), *argv])
    config = flags.parse(argv, ALGORITHMS, GPTConfig, __doc__)
    once_more = f"python train.py {shlex.join(argv)}"
    try:
        with ranks.together(config.device):
            return run(config, once_more, once_more + ("" if config.resume else " --resume"))
    except RuntimeError as error:
        raise memory.explained(error, config) from None


def start(algo=None):
    ranks.leave(one_line(lambda: main(sys.argv[1:], algo)))


if __name__ == "__main__":
    start()
