"""PPO on the tiny model, with a reward that can be seen from an answer."""

import itertools

import torch

import tiny
from harness.log import Log
from ppo import PPO

TRUNCATION = {"terminal": {}, "bootstrap": dict(bootstrap_truncated_completions=True),
              "mask": dict(mask_truncated_completions=True)}


def make_ppo(zero_critic=False, task=None, **settings):
    """PPO with 4 answers per prompt and the reward `letters`. zero_critic: the critic says 0
    everywhere, as at the start; otherwise something else everywhere."""
    algo = tiny.make(PPO, tiny.letters, task, **{"num_generations": 4, **settings})
    if not zero_critic:
        tiny.move(algo.critic, seed=7)
    return algo


def first_pass(algo, batch=None, log=None):
    """The parts of a batch, before anything is trained on."""
    log = Log() if log is None else log
    batch = tiny.sample(algo, log=log) if batch is None else batch
    return list(itertools.islice(algo.minibatches(batch, log), algo.config.num_minibatches))


def off_policy(**settings):
    """A minibatch whose ratios are not 1 and whose values have moved, some of both beyond their
    clips."""
    algo = make_ppo(**settings)
    [minibatch] = first_pass(algo)
    tiny.move(algo.model)
    tiny.move(algo.critic)
    return algo, minibatch


def gradients(algo, minibatch):
    """{network: its gradient as one long tensor}"""
    tiny.loss_and_gradient(algo, minibatch)
    return {name: torch.cat([p.grad.flatten() for p in network.parameters()])
            for name, network in (("model", algo.model), ("critic", algo.critic))}
