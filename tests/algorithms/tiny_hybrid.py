"""Tiny hybrids: the recipes of hybrid.py's docstring on the tiny model."""

import zlib

from hybrid import Hybrid
from tasks import Chain
from tiny import coin, make

RECIPES = {
    "plain": {},
    "chord": dict(imitation="chord", mu=0.9, mu_end=0.05),
    "luffy": dict(imitation="luffy"),
    "srft": dict(imitation="srft", own_loss="srft"),
    "uft": dict(hint="all", mu=0.1),
    "prefix": dict(hint="one", imitation="prefix"),
    "bread": dict(hint="rescue", imitation="none"),
    "hpt": dict(gate="failed"),
    "relift": dict(gate="buffer", buffer_size=1),
    "nft": dict(own_loss="nft", imitation="none", num_iterations=2)}


def make_hybrid(reward_function=coin, **settings):
    """Two of four prompts are demonstrated, answered four times each."""
    return make(Hybrid, reward_function, Chain(2, 3, 12), **{
        "num_generations": 4, "demonstrated": 2, "batch_size": 4, "num_demonstrations": 10,
        **settings})


def hard(prompts, completions, **columns):
    """A reward of 0 for one prompt in three, whatever is answered; else one that looks random."""
    return [float(zlib.crc32(p.encode()) % 3 and zlib.crc32((p + c).encode()) % 2)
            for p, c in zip(prompts, completions)]
