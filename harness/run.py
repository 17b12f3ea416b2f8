"""
A run: its folder, its log, its clock, and Ctrl-C.

The loop in train.py asks for `steps()`, tells the log what it sees, and calls `end_of_step()`,
which evaluates, prints and saves what is due. The folder then holds config.json (every setting),
metrics.jsonl (one JSON object a line), ckpt.pt, and at the end summary.json and curve.png.
"""

import json
import os
import signal
import time

import torch

from harness import checkpoint, evaluate, ranks, report
from harness.errors import InputError
from harness.log import Log


def evaluated(line):
    """What a line of metrics.jsonl says of an evaluation."""
    return {name: value for name, value in line.items() if name.startswith("eval/")}


class Run:
    """One run of one algorithm, new or resumed from a checkpoint. Used as a context: inside it the
    first Ctrl-C ends the run after the step, and the second at once."""

    def __init__(self, algo, again, saved=None, pretrain_seconds=0.0):
        """again: the command that goes on after an interruption. saved: a checkpoint to resume."""
        self.algo, self.config, self.log, self.again = algo, algo.config, Log(), again
        self.step, self.saved_at, self.over = 0, None, False
        self.asked, self.interrupted = False, False   # Ctrl-C here; and what all ranks agree on
        self.log.totals = {"updates": 0, "sampled_tokens": 0, "trained_tokens": 0, "seconds": 0.0,
                           "sampling_seconds": 0.0, "updating_seconds": 0.0, "eval_seconds": 0.0,
                           "pretrain_seconds": pretrain_seconds}   # of the base model
        self.started = time.time()
        if saved is None:
            settings = checkpoint.settings(algo)
            checkpoint.write_text(self.path("config.json"), json.dumps(settings, indent=2) + "\n")
            # Of random weights one answer to a problem says enough; sixteen took over a second.
            self.before = self.evaluate(full=self.config.algo != "pretrain")
            lines = [{"step": 0, **self.log.totals, **self.before}]
        else:
            checkpoint.restore(self, saved)
            self.saved_at = self.step
            self.started -= self.log.totals["seconds"]
            lines = report.read_metrics(self.path("metrics.jsonl"))
            lines = [line for line in lines if line["step"] <= self.step]   # the rest comes again
        self.after = evaluated(lines[-1] if lines else {})   # of a run that only lacks its summary
        text = "".join(json.dumps(line) + "\n" for line in lines)
        checkpoint.write_text(self.path("metrics.jsonl"), text)
        self.over = self.step >= self.config.max_steps   # killed before its summary was written
        self.resumed_at, self.loop_started = self.step, time.time()
        self.console = report.Console(self.config, self.step)

    def path(self, name):
        return os.path.join(self.config.out_dir, name)

    # -- what the loop calls --------------------------------------------------------------------

    def steps(self):
        """The numbers of the steps to make, until max_steps, max_minutes or Ctrl-C."""
        while not self.over and self.step < self.config.max_steps:
            yield self.step

    def check_finite(self, *values):
        """Raise InputError where a loss, a gradient or a weight is nan or infinite."""
        if all(bool(torch.isfinite(value).all()) for value in values):
            return
        good = "the one that the run started from"
        if self.saved_at is not None:
            good = f"{self.path('ckpt.pt')} (step {self.saved_at})"
        raise InputError(
            f"the loss or its gradient is not finite at step {self.step + 1}; the last good "
            f"checkpoint is {good}: go on from it with a lower --learning_rate")

    def end_of_step(self):
        """Count the step, then evaluate, print and save what is due."""
        config, log = self.config, self.log
        log.totals["seconds"] = time.time() - self.started
        self.interrupted, late = ranks.either(self.asked, self.out_of_time())
        last = self.step + 1 == config.max_steps or late
        self.over = last or self.interrupted
        save_due = (self.step + 1) % config.save_steps == 0 or self.over
        if save_due:   # never save, or end with, what has blown up
            self.check_finite(*self.algo.parameters())
        self.step += 1
        line = {}
        if self.step % config.logging_steps == 0 or last:
            rate = self.algo.optimizer.param_groups[0]["lr"]
            line = {"step": self.step, **log.totals, "learning_rate": rate, **log.line()}
            if self.step % config.eval_steps == 0 or last:
                line |= self.evaluate(full=last)
            self.after = evaluated(line)
            if ranks.RANK == 0:
                with open(self.path("metrics.jsonl"), "a") as file:
                    file.write(json.dumps(line) + "\n")
        self.console.show(line, self.seconds_left())
        if save_due:
            log.merge()
            checkpoint.save(self)
            self.saved_at = self.step

    # -- clock, Ctrl-C, evaluation, end ---------------------------------------------------------

    def out_of_time(self):
        minutes = self.config.max_minutes
        return bool(minutes) and time.time() - self.started > 60 * minutes

    def seconds_left(self):
        done = self.step - self.resumed_at
        return (time.time() - self.loop_started) / done * (self.config.max_steps - self.step)

    def evaluate(self, full):
        """{"eval/...": number} of the model as it is."""
        with self.log.clock("eval_seconds"):
            return evaluate.evaluate(self.algo, full)

    def __enter__(self):
        self.previous_handler = signal.signal(signal.SIGINT, self.on_interrupt)
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.previous_handler)
        self.console.close()

    def on_interrupt(self, *signal_and_frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step (Ctrl-C again: at once, losing what was not saved)",
              flush=True)

    def finish(self):
        """Write summary.json -> the summary, or None where Ctrl-C stopped the run short."""
        config = self.config
        if self.interrupted and self.step < config.max_steps:
            print(f"saved {self.path('ckpt.pt')} at step {self.step} of {config.max_steps}; "
                  f"go on with: {self.again}")
            return None
        self.log.totals["seconds"] = time.time() - self.started
        totals = self.log.totals
        summary = {"algo": config.algo, "task": self.algo.task.name, "seed": config.seed,
                   "steps": self.step, **totals,
                   "train_seconds": totals["seconds"] - totals["eval_seconds"],
                   "peak_memory_mb": report.peak_memory_mb(), "before": self.before,
                   "after": self.after}
        text = json.dumps(summary, indent=2) + "\n"
        checkpoint.write_text(self.path("summary.json"), text)
        ranks.wait()
        return summary
