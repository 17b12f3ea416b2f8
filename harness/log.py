"""What the loop and the algorithms tell about a run, between two lines of its metrics."""

import contextlib
import time

import torch

from harness import ranks


class Log:
    """Means and maxima since the last line, and totals of the whole run.

    Worked example: mean("nll", [1., 2., 9.], mask [1, 1, 0]) and then mean("nll", [6.]) make a line
    in which nll is (1 + 2 + 6) / 3 = 3: every value counts the same, not every call.
    """

    def __init__(self):
        self.means, self.maxima, self.totals = {}, {}, {}
        self.at_last_line = {}                            # the totals as they were then

    def mean(self, name, values, mask=None):
        """Add values (any shape) to a mean; with a mask of that shape only those where it is 1."""
        values = torch.as_tensor(values).detach()
        count = values.numel() if mask is None else mask.sum()
        self.share(name, (values if mask is None else values * mask).sum(), count)

    def share(self, name, part, whole):
        """Add `part` of `whole` cases to a mean."""
        total, n = self.means.get(name, (0.0, 0.0))
        self.means[name] = (total + float(part), n + float(whole))

    def max(self, name, value):
        value = float(torch.as_tensor(value).detach())
        self.maxima[name] = max(self.maxima.get(name, value), value)

    def sum(self, name, value):
        """Add to a total of the whole run: updates, tokens, seconds."""
        self.totals[name] = self.totals.get(name, 0) + value

    @contextlib.contextmanager
    def clock(self, name):
        """Add the seconds spent inside to a total."""
        started = time.time()
        yield
        self.sum(name, time.time() - started)

    def merge(self):
        """Make the means and maxima those of all ranks, on rank 0; the others begin anew."""
        everyone = ranks.everyone((self.means, self.maxima))
        if len(everyone) > 1:
            self.means, self.maxima = {}, {}
            for means, maxima in everyone if ranks.RANK == 0 else []:
                for name, (part, whole) in means.items():
                    self.share(name, part, whole)
                for name, value in maxima.items():
                    self.max(name, value)

    def line(self):
        """{name: value} of this interval; the next one begins."""
        self.merge()
        line = {name: total / max(n, 1) for name, (total, n) in self.means.items()} | self.maxima
        for name, *totals in (("sample", "sampled_tokens", "sampling_seconds"),
                              ("train", "trained_tokens", "updating_seconds")):
            n, seconds = (self.totals.get(total, 0) - self.at_last_line.get(total, 0)
                          for total in totals)
            if n:
                line[f"tokens_per_second/{name}"] = n / max(seconds, 1e-9)
        self.means, self.maxima, self.at_last_line = {}, {}, dict(self.totals)
        return line
