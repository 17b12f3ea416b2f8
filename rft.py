"""
RFT: rejection-sampling fine-tuning. Imitate your own right answers: self-training.

    Who sampled the text?        the policy of a round ago
    What weight has each token?  1 if the answer was good, else 0; awr: exp(advantage / awr_beta)
    What anchors the policy?     the sampler: it can only learn from answers it samples

    L(theta) = - sum_i w_i sum_t log pi(y_it | x_i, y_i,<t)  /  sum_i w_i |y_i|      y_i ~ pi_round

Sample answers, keep the good ones, imitate them, repeat. The expected gradient on what is kept is
that of the success rate (up to its size): REINFORCE without its negative half. Which flags make
which published method:

    RFT (2308.01825)               the default: one round, sampled from the start model throughout
    expert iteration (1705.08439)  --rounds 5: each round sampled from what the last one made
    RAFT (2304.06767)              --rounds 100 --keep best: a fresh sampler every step, the best
                                   answer of each group
    STaR (2203.14465), ReST-EM (2312.06585)   --rounds 5 --restart: each round trains the start
                                   model anew (STaR's hints are left out)
    ReST (2308.08998)              --rounds 5 --threshold_start .2, a graded reward: the bar rises
    AWR (1910.00177), RWR          --weighting awr: keeps all answers, weighted by exp(advantage /
                                   awr_beta)
    DFT on its own answers         --weighting dft: those that are kept, each token times sg(pi)
                                   (2508.05629, section 4.3)
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import data
from harness.errors import InputError
from harness.flags import Sampling, flag
from tasks import Rewards


@dataclass
class RFTConfig(Sampling):
    """rft: imitate your own right answers"""
    rounds: int = flag(1, "how often the sampler becomes the current policy (1 to max_steps)",
                       at_least=1)
    restart: bool = flag(False, "every round trains the start model anew")
    keep: Literal["threshold", "best"] = flag("threshold", "answers whose reward reaches it, or "
                                              "the best of each group")
    threshold: float = flag(1.0, "reward that an answer must reach (in the last round)")
    threshold_start: float = flag(None, "the same in the first round; it rises linearly; none: as "
                                        "in the last")
    weighting: Literal["none", "awr", "dft"] = flag("none", "of the answers; see above")
    awr_beta: float = flag(0.3, "awr: its temperature; the smaller, the greedier (0.1 to 1)",
                           above=0)
    weight_decay: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if self.threshold_start is not None and self.reward in ("verifier", "majority", "format"):
            raise InputError("--threshold_start: the bar can only rise under a graded reward (add "
                             f"brevity or model); --reward {self.reward} is 0 or 1")
        if self.threshold_start is not None and (self.keep == "best" or self.weighting == "awr"):
            raise InputError("--threshold_start is for --keep threshold: the best of a group, and "
                             "awr, use no threshold")

    def schedule(self, step):
        """The steps [first, end) of the learning rate's course: with --restart the round's."""
        if not self.restart:
            return super().schedule(step)
        rounds = min(self.rounds, self.max_steps)
        this = round_of(step, rounds, self.max_steps)
        return tuple(-(-k * self.max_steps // rounds) for k in (this, this + 1))   # rounded up


# -- pure functions -------------------------------------------------------------------------------


def round_of(step, rounds, max_steps):
    """Which round a step belongs to; rounds have equal length, to within a step.

    Worked example, 3 rounds in 8 steps: 0 0 0 1 1 1 2 2.
    """
    return step * rounds // max_steps


def kept(rewards, keep="threshold", threshold=1.0):
    """Which answers are imitated. rewards (P, G) -> (P, G) of 0. and 1. threshold: a number, or one
    for each answer.

    `threshold`: those that reach it. `best`: the first of the group's best, even if it is wrong.
    Raises ValueError for another `keep`.
    """
    if keep == "best":
        return torch.zeros_like(rewards).scatter(1, rewards.argmax(1, keepdim=True), 1.0)
    if keep == "threshold":
        return (rewards >= threshold - 1e-6).to(rewards.dtype)
    raise ValueError(f"keep {keep!r}: choose threshold or best")


def awr_weights(rewards, awr_beta, largest=20.0):
    """exp(A / awr_beta), A the reward minus its group's mean, cut off at `largest` (AWR,
    1910.00177, eq. 9 and section 5). rewards (P, G) -> weights (P, G). With one prompt it is RWR,
    whose exp(R / beta) differs by a constant per group."""
    return ((rewards - rewards.mean(1, keepdim=True)) / awr_beta).exp().clamp(max=largest)


def token_logprobs(logits, ids):
    """Log-probabilities of the tokens at hand (B, t), and of every token (B, t, V), from logits
    (B, t, V) and ids (B, t): a few columns of the batch (see model.completion_scores).

    Worked example: logits log [.5, .3, .2] and the token 1 give log .3 and log [.5, .3, .2].
    """
    all_logprobs = torch.log_softmax(logits, dim=-1)                            # (B, t, V)
    ids = ids.unsqueeze(-1)                                                     # (B, t, 1)
    return all_logprobs.gather(-1, ids).squeeze(-1), all_logprobs


def token_losses(logprobs):
    """The negative log-likelihood of each token. (B, T) -> (B, T)"""
    return -logprobs


def token_weights(completion_mask, row_weights):
    """Weights (B, T) that add up to 1, as the row_weights (B,) of their answers.

    Worked example: answers of 1 and 3 tokens, row weights 0 and 1: 0 and 1/3 each.
    """
    weights = completion_mask * row_weights[:, None]
    return weights / weights.sum().clamp(min=1e-20)


# -- the class that the loop drives ---------------------------------------------------------------


class RFT(nn.Module):
    Config = RFTConfig
    rows_together = 1   # each row's loss stands alone
    legend = ("The loss is the nll of the tokens that are imitated, in nats (with awr and dft a "
              "weighted one).\nkept: share of the sampled answers that are imitated.")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.ref_model = copy.deepcopy(model).requires_grad_(False)   # where restart goes back to
        self.sampler = copy.deepcopy(model).requires_grad_(False)     # the policy of a round ago
        self.rewards = Rewards(task, config.reward, config.reward_weights)
        self.optimizer = model.configure_optimizer(config)

    def examples(self):
        """What batches are drawn from: problems, without solutions."""
        return self.task.problems("train", self.config.num_prompts, self.config.seed)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The policy as it was when the round began."""
        config, rounds = self.config, min(self.config.rounds, self.config.max_steps)
        this_round = round_of(step, rounds, config.max_steps)
        if this_round > round_of(step - 1, rounds, config.max_steps):   # a new one
            self.sampler.load_state_dict(self.model.state_dict())
            if config.restart and step > 0:
                self.model.load_state_dict(self.ref_model.state_dict())
                self.optimizer.state.clear()
        bar = config.threshold
        if config.threshold_start is not None:   # it rises from round to round
            rise = (config.threshold - config.threshold_start) / max(rounds - 1, 1)
            bar = config.threshold_start + rise * this_round
        batch = data.rollout(self.sampler, self, examples, generator, log)
        return {**batch, "bar": torch.full_like(batch["rewards"], bar)}         # (B,)

    def minibatches(self, batch, log):
        """What is each token worth? As much as its answer. One update a batch, none if nothing is
        kept; the weights are fixed before the batch is split."""
        config = self.config
        rewards, bar = (batch[name].view(-1, config.num_generations).to(self.model.dtype)
                        for name in ("rewards", "bar"))                         # (P, G)
        row_weights = kept(rewards, config.keep, bar).flatten()                 # (B,)
        if config.weighting == "awr":
            row_weights = awr_weights(rewards, config.awr_beta).flatten()
        log.mean("kept", row_weights > 0)
        batch = {**batch, "weights": token_weights(batch["completion_mask"], row_weights)}
        rows = row_weights.nonzero().squeeze(-1)
        return [data.take_rows(batch, rows)] if len(rows) else []

    def logprobs(self, model, batch):
        """Log-probabilities of the completions' tokens, and which are likeliest; both (B, T)."""
        def f(logits, ids):                                                     # a few columns
            logprobs, all_logprobs = token_logprobs(logits, ids)
            return logprobs, all_logprobs.argmax(-1) == ids                     # (B, t), (B, t)
        return model.completion_scores(f, *data.inputs(batch))

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the rows at hand."""
        mask = batch["completion_mask"]                                         # (B, T)
        logprobs, likeliest = self.logprobs(self.model, batch)
        losses = token_losses(logprobs)                                         # (B, T)
        if self.config.weighting == "dft":
            losses = losses * logprobs.detach().exp()                           # sg(pi): see dft.py
        log.mean("nll", -logprobs, mask)
        log.mean("mean_token_accuracy", likeliest, mask)
        return (losses * batch["weights"]).sum()


if __name__ == "__main__":   # python rft.py is python train.py --algo rft
    import train
    train.start("rft")
