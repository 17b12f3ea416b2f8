"""
The reward model of RLHF: a transformer with one number for a head, trained to tell the better of two answers.

    Who sampled the text?        the start model; somebody, here the task's own verifier, said which of two was better
    What weight has each token?  none: an answer is judged as a whole, at its last real token
    What anchors the policy?     there is no policy yet; PPO, GRPO and online DPO bring theirs

    L(phi) = - mean over pairs of log sigma( r(chosen) - r(rejected) )        Bradley-Terry (2203.02155, eq. 1)

Only differences are ever trained, so the zero of r means nothing; center_rewards_coefficient pulls it to 0. A policy that
is trained against r finds the answers that r overrates: while it does, `true_reward` is logged beside `reward`, and where the
two part, the policy has begun to learn the reward model's mistakes (2210.10760).

(Self-rewarding, 2401.10020, in which the model judges its own answers, needs a model that can judge. It would plug in
where `scorer` is handed to the task: any function
reward(prompts, completions, /, **columns) -> list[float] will do.)
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

import data
from model import InputError, check


@dataclass
class RMConfig:
    center_rewards_coefficient: Annotated[float, "pulls r(chosen) + r(rejected) to 0 (0 to 0.1)"] = 0.01
    num_generations: Annotated[int, "answers per prompt to draw the pair from (2 to 64)"] = 8
    num_prompts: Annotated[int, "size of the finite set of prompts that are judged (200 to 100000)"] = 4000
    temperature: Annotated[float, "of sampling (0.7 to 1.2)"] = 1.0
    reward: Annotated[str, "who judges: reward functions, comma-separated: verifier, format, brevity"] = "verifier"
    reward_weights: Annotated[str, "their weights, comma-separated; empty: 1 each"] = ""

    def __post_init__(self):
        if "model" in self.reward.split(","):
            raise InputError("--reward model: a reward model cannot be its own judge")
        if self.num_generations < 2:
            raise InputError(f"--num_generations {self.num_generations}: a pair needs at least 2 answers")
        check(self, at_least_1="num_prompts", at_least_0="center_rewards_coefficient", above_0="temperature")


# -- pure functions ---------------------------------------------------------------------------------------------------


def reward_loss(chosen_rewards, rejected_rewards, center_rewards_coefficient=0.0):
    """The loss of each pair. (N,), (N,) -> (N,). Worked example: rewards 1 and 0 give -log sigma(1) = .313; equal ones log 2."""
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2


def answer_rewards(model, batch):
    """r of each answer (B,): the scalar head after the last real token, <end>; what padding holds is never looked at."""
    rewards = model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"],
                                      batch["completion_mask"], batch["prompt_index"], read_last=True).squeeze(-1)   # (B, T + 1)
    lengths = batch["completion_mask"].sum(-1, keepdim=True)                                   # (B, 1)
    return rewards.gather(1, lengths).squeeze(1)


def scorer(model, tokenizer):
    """A reward model as a reward function like any other:
    reward(prompts, completions, /, **columns) -> list[float].

    It reads texts, each with an <end>, also where the policy ran out of tokens before it wrote one.
    """
    @torch.no_grad()
    def reward(prompts, completions, /, **columns):
        examples = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions)]
        batch = data.collate(examples, tokenizer, model.device)
        room = model.config.block_size - batch["prompt_mask"].sum(-1, keepdim=True)            # (B, 1)
        # What does not fit is not read: broken UTF-8 takes three bytes where the policy wrote one.
        batch["completion_mask"] &= torch.arange(batch["completion_mask"].shape[1], device=model.device) < room
        return answer_rewards(model, batch).tolist()
    return reward


# -- the class that the loop drives -----------------------------------------------------------------------------------


class RM:
    Config = RMConfig
    micro_batch_size = 0         # set by the loop: rows per forward pass, 0: all
    rows_together = 2            # chosen and rejected follow each other
    defaults = dict(learning_rate=1e-3, max_steps=100, batch_size=64, lr_scheduler_type="linear", warmup_steps=10,
                    weight_decay=0.01, logging_steps=10, eval_steps=20, save_steps=50)
    legend = "The loss starts at log 2 = .693: a coin. accuracy: share of pairs in which the chosen answer gets the higher reward."

    def __init__(self, config, model, ref_model, tokenizer, task):
        self.config, self.sampler, self.tokenizer, self.task = config, ref_model, tokenizer, task
        self.model = model.with_scalar_head()
        self.networks, self.frozen = {"model": self.model}, {"sampler": ref_model}    # trained; kept as they are
        self.from_file = isinstance(task, data.JsonLines) and "chosen" in task.train[0]
        self.held_out_pairs = None   # made by the first evaluation
        self.rewards = None if self.from_file else data.Rewards(task, config.reward, config.reward_weights)

    @staticmethod
    def columns(config):
        """What a line of --data must have: preferences, or what the verifier needs to make some."""
        return [("prompt", "chosen", "rejected"), ("prompt", "answer")]

    def examples(self, seed):
        """What the loop draws batches from: problems, or the file's preferences."""
        return data.problems(self.task, "train", self.config.num_prompts, seed)

    def collect(self, examples, generator, step=0):
        """Pairs to train on, in rows chosen, rejected, chosen, rejected, ..., or None if there is no contrast."""
        if self.from_file:
            return data.preference_pairs(examples, self.tokenizer, self.model.device)
        batch, metrics = data.rollout(self.sampler, self.tokenizer, self.task, self.rewards, examples,
                                      self.config.num_generations, self.config.temperature, generator)
        uniforms = torch.rand(len(examples), self.config.num_generations, generator=generator, device=self.model.device)
        rows, skipped = data.choose_pairs(batch["rewards"].view(len(examples), -1), uniforms)
        metrics["skipped_pairs"] = (skipped, len(examples))
        return data.take_rows(batch, rows) if len(rows) else None, metrics

    def minibatches(self, batch):
        """The updates to make on a batch: just one, a mean over its pairs."""
        if batch is None:
            return [None]
        n = len(batch["completion_ids"])
        weights = torch.full((n,), 2 / n, device=self.model.device, dtype=self.model.dtype)
        return [{**batch, "weights": weights}]

    def loss(self, batch):
        """The summed loss of the batch's pairs, and {name: (sum, count)} for the log."""
        rewards = answer_rewards(self.model, batch)                                            # (B,)
        losses = reward_loss(rewards[0::2], rewards[1::2], self.config.center_rewards_coefficient)
        margins = (rewards[0::2] - rewards[1::2]).detach()                                     # (B / 2,)
        metrics = {"accuracy": ((margins > 0).sum(), len(margins)), "margin": (margins.sum(), len(margins)),
                   "mean_reward": (rewards.detach().sum(), len(rewards))}
        return (losses * batch["weights"][0::2]).sum(), metrics

    @torch.no_grad()
    def evaluate(self, args):
        """Judge the reward model on held-out prompts -> {"eval/pair_accuracy", "eval/pairs"}; the same pairs every time."""
        with data.autocast(args):
            if self.held_out_pairs is None:   # the sampler never changes: neither would they
                problems = data.problems(self.task, "test", args.eval_problems, args.seed)
                generator = torch.Generator(args.device).manual_seed(1)
                size = max(1024 // self.config.num_generations, 1)   # sampled at a time
                parts = [self.collect(problems[i:i + size], generator)[0]
                         for i in range(0, len(problems), size)]
                self.held_out_pairs = [part for part in parts if part is not None]
            if not self.held_out_pairs:
                return {}
            rewards = torch.cat([answer_rewards(self.model, part) for part in self.held_out_pairs])
        return {"eval/pair_accuracy": (rewards[0::2] > rewards[1::2]).float().mean().item(), "eval/pairs": len(rewards) // 2}
