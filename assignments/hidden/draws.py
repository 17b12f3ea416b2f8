"""Random numbers for the hidden tests, from the salt that the grader was given."""

import os
import random
import zlib

import torch

SALT = os.environ.get("ASSIGNMENT_SALT", "")


def rng(name):
    return random.Random(f"{SALT} {name}")


def normal(name, *shape, dtype=torch.float64):
    """Standard normal numbers of this shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{SALT} {name}".encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def logprobs(name, *shape):
    """Log-probabilities between about -6 and 0, with a gradient."""
    return (-3 * normal(name, *shape).abs()).requires_grad_()


def mask(name, B, T):
    """Completions of 1 to T tokens, one of them of T."""
    draw = rng(name)
    lengths = [draw.randint(1, T) for _ in range(B - 1)] + [T]
    draw.shuffle(lengths)
    return torch.tensor([[t < n for t in range(T)] for n in lengths]), lengths


SHAPES = [(1, 1), (2, 5), (7, 3)]
