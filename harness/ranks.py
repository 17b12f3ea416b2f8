"""
Several processes, one run: data parallelism by torch.distributed.

    torchrun --nproc_per_node 2 train.py --algo grpo

Each process, called a rank, holds every network. Three things are divided among the ranks:

    writing    each answers its share of the prompts, and all gather the answers (data.rollout)
    scoring    each scores its share of the rows, and all gather the scores (data.in_micro_batches)
    training   each differentiates the loss of its share of the rows, and the gradients are summed
               (train.update)

All else every rank computes alike, from the same whole batch. So each normaliser is that of all
ranks together, without a line of code: the number of tokens, whitening, KTO's z0, the statistics of
a group. A mean of the ranks' own means would be another loss wherever the ranks hold different
numbers of tokens. Worked example: answers of 1 and 3 tokens with losses [6] and [1, 1, 4], a rank
each. Their mean is 12 / 4 = 3; the mean of the two means is (6 + 2) / 2 = 4.

Rank 0 prints and writes. Without torchrun there is one rank, and nothing here does anything.
"""

import contextlib
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from harness.errors import InputError

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def together(device):
    """The context in which a run's ranks can talk to each other."""
    if SIZE == 1:
        yield
        return
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, lost)   # what torchrun sends to all where one has ended
    if device == "cuda":   # which from here on means this rank's own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with talking():
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1))
    yield


def leave(code):
    """End the process with this exit code; one of several ranks at once, for the threads of a
    process group may abort an interpreter that takes its time ("terminate called without an active
    exception")."""
    if SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def talking():
    """Around each exchange. Raises InputError where another rank has ended."""
    try:
        yield
    except RuntimeError:   # of gloo; those of nccl are RuntimeErrors as well
        lost()


def lost(*signal_and_frame):
    raise InputError(f"one of the {SIZE} ranks has ended, and with it the run; with --resume it "
                     "goes on from the last checkpoint, also with fewer ranks") from None


# -- a share each ---------------------------------------------------------------------------------


def share(n, rows_together=1):
    """Which of n rows are this rank's: a slice, the shares being as equal as can be. rows_together:
    how many rows that follow each other may not be separated.

    Worked example: 5 prompts and 2 ranks make slices 0:3 and 3:5.
    """
    units = n // rows_together
    first, end = (rows_together * ((units * rank + SIZE - 1) // SIZE)
                  for rank in (RANK, RANK + 1))
    return slice(first, end)


def own_generator(generator):
    """Random numbers for what a rank samples by itself. The generator given goes on alike on all
    ranks."""
    if SIZE == 1:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed + RANK)


# -- and all together -----------------------------------------------------------------------------


def everyone(value):
    """The values of all ranks, in a list."""
    if SIZE == 1:
        return [value]
    values = [None] * SIZE
    with talking():
        dist.all_gather_object(values, value)
    return values


def either(*flags):
    """Which of the flags are set on any rank: all ranks stop at the same step."""
    return [any(column) for column in zip(*everyone(flags))]


def wait():
    """Until all ranks are here: what rank 0 has written is there to be read."""
    everyone(None)


def gather(rows, fills):
    """The rows of all ranks in one dict of tensors. rows: {name: (b,) or (b, T)}, where b and T are
    the rank's own, and b may be 0; fills: {name: what pads a row to the longest T}, 0 where it says
    nothing. -> {name: (B,) or (B, T)}"""
    if SIZE == 1:
        return rows
    parts = everyone({name: tensor.cpu() for name, tensor in rows.items()})
    joined = {}
    for name, own in rows.items():
        tensors = [part[name] for part in parts if len(part[name])]
        if tensors[0].dim() == 2:
            width = max(t.shape[1] for t in tensors)
            tensors = [F.pad(t, (0, width - t.shape[1]), value=fills.get(name, 0))
                       for t in tensors]
        joined[name] = torch.cat(tensors).to(own.device)
    return joined


def sum_gradients(parameters, loss):
    """Add up the gradients and the losses of all ranks, in place. A rank without a row has neither
    and adds 0. -> the loss of the whole batch"""
    if SIZE == 1:
        return loss
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([torch.as_tensor(loss, device=parameters[0].device).reshape(1).float(),
                      *(p.grad.flatten() for p in parameters)])                # (1 + N,)
    with talking():
        dist.all_reduce(flat)
    for p, summed in zip(parameters, flat[1:].split([p.numel() for p in parameters])):
        p.grad.copy_(summed.view_as(p))
    return flat[0]
