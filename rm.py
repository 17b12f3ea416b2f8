"""RM: the reward model of RLHF. A transformer with one number for a head, trained to tell the
better of two answers.

    Who sampled the text?        the start model; the task's verifier says which of two is better
    What weight has each token?  none: an answer is judged as a whole, at its last real token
    What anchors the policy?     there is no policy yet; PPO, GRPO and online DPO bring their own

    L(phi) = - mean over pairs of log sigma( r(chosen) - r(rejected) )      2203.02155, eq. 1

This is the Bradley-Terry model: the better of two answers wins with probability sigma of the
difference of their rewards.

Only differences are trained, so the zero of r means nothing; center_rewards_coefficient pulls it to
0. A policy that is trained against r finds the answers that r overrates. So `true_reward` is logged
beside `reward`: where the two part, the policy is learning the reward model's mistakes
(2210.10760).
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
from harness.errors import InputError
from harness.flags import Sampling, flag
from tasks import Rewards


@dataclass
class RMConfig(Sampling):
    """rm: tell the better of two answers"""
    center_rewards_coefficient: float = flag(0.01, "pulls r(chosen) + r(rejected) to 0 (0 to 0.1)",
                                             at_least=0)
    num_generations: int = 8
    batch_size: int = 64
    weight_decay: float = 0.01
    eval_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        if "model" in self.reward.split(","):
            raise InputError("--reward model: a reward model cannot be its own judge")
        if self.num_generations < 2:
            raise InputError(f"--num_generations {self.num_generations}: a pair needs at least 2 "
                             "answers")
        # It is shared by runs of any seed, unless it has a folder of its own.
        if self.seed not in (0, self.base_seed) and not self.out_dir:
            raise InputError(f"--seed {self.seed}: the seed of a reward model is --base_seed; give "
                             "--out_dir to one with a seed of its own")
        self.seed = self.seed or self.base_seed

    def columns(self):
        """What a line of --data must have: preferences, or what the verifier needs to make some."""
        return [("prompt", "chosen", "rejected"), *super().columns()]


# -- pure functions -------------------------------------------------------------------------------


def reward_loss(chosen_rewards, rejected_rewards, center_rewards_coefficient=0.0):
    """The loss of each pair. (N,), (N,) -> (N,). Worked example: rewards 1 and 0 give -log sigma(1)
    = .313; equal ones log 2."""
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2


def answer_rewards(model, batch):
    """r of each answer (B,): the scalar head after the last real token, <end>. Padding is never
    looked at."""
    rewards = model.completion_logits(*data.inputs(batch), read_last=True).squeeze(-1)  # (B, T + 1)
    lengths = batch["completion_mask"].sum(-1, keepdim=True)                    # (B, 1)
    return rewards.gather(1, lengths).squeeze(1)


class Judge:
    """A reward model as a reward function like any other: judge(prompts, completions, /, **columns)
    -> list of floats. It reads texts, each with an <end>, also where the policy ran out of
    tokens."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, prompts, completions, /, **columns):
        examples = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions)]
        batch = data.collate(examples, self.tokenizer, self.model.device)
        lengths = batch["prompt_mask"].sum(-1, keepdim=True)                    # (B, 1)
        room = self.model.config.block_size - lengths
        # What does not fit is not read: broken UTF-8 takes three bytes for one that was written.
        position = torch.arange(batch["completion_mask"].shape[1], device=self.model.device)
        batch["completion_mask"] &= position < room
        return answer_rewards(self.model, batch).tolist()


# -- the class that the loop drives ---------------------------------------------------------------


class RM(nn.Module):
    Config = RMConfig
    rows_together = 2   # chosen and rejected follow each other
    legend = ("The loss starts at log 2 = .693: a coin. accuracy: share of pairs in which the "
              "chosen answer gets the higher reward.")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model.with_scalar_head()
        self.from_file = task.holds("chosen", "rejected")
        if not self.from_file:
            self.sampler = copy.deepcopy(model).requires_grad_(False)
            self.rewards = Rewards(task, config.reward, config.reward_weights)
        self.optimizer = self.model.configure_optimizer(config)

    def examples(self):
        """What batches are drawn from: problems, or the file's preferences."""
        return self.task.problems("train", self.config.num_prompts, self.config.seed)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The start model (or a file)."""
        if self.from_file:
            return data.collate_pairs(examples, self.tokenizer, log, self.model.device)
        batch = data.rollout(self.sampler, self, examples, generator, log)
        uniforms = torch.rand(len(examples), self.config.num_generations, generator=generator,
                              device=self.model.device)
        return {**batch, "uniforms": uniforms.flatten()}                        # (B,)

    def minibatches(self, batch, log):
        """What is each token worth? Nothing alone: rows chosen, rejected, chosen, ... are
        judged as wholes. One update a batch, a mean over its pairs; none where there is no pair."""
        if not self.from_file:
            rewards, uniforms = (batch[name].view(-1, self.config.num_generations)
                                 for name in ("rewards", "uniforms"))           # (P, G)
            rows = data.choose_pairs(rewards, uniforms)
            log.share("skipped_pairs", len(rewards) - len(rows) / 2, len(rewards))
            batch = data.take_rows(batch, rows)
        n = len(batch["prompt_index"])
        like = dict(device=self.model.device, dtype=self.model.dtype)
        return [{**batch, "weights": torch.full((n,), 2 / n, **like)}] if n else []

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the pairs at hand."""
        rewards = answer_rewards(self.model, batch)                             # (B,)
        chosen, rejected = rewards[0::2], rewards[1::2]                         # (B / 2,)
        losses = reward_loss(chosen, rejected, self.config.center_rewards_coefficient)
        log.mean("accuracy", chosen > rejected)
        log.mean("margin", chosen - rejected)
        log.mean("mean_reward", rewards)
        return (losses * batch["weights"][0::2]).sum()


if __name__ == "__main__":   # python rm.py is python train.py --algo rm
    import train
    train.start("rm")
