"""
Supervised fine-tuning: imitate. The same file without the prompt mask is pre-training; with its own samples for
demonstrations it is rejection sampling and self-training.

    Who sampled the text?        demonstrations; a corpus (pre-training); or the policy of a round ago (--source self)
    What weight has each token?  1; with --source self 1 if the answer was right and 0 if not, or exp(advantage / beta)
    What anchors the policy?     nothing; with --source self the sampler: what it never writes is never learnt

Maximum likelihood on the completion, a token mean over the whole batch (survey 2603.13985, section 2 and eq. 1):

    L(theta) = - sum_i sum_t  w_i log pi(y_t | x, y_<t)  /  sum_i sum_t w_i

Its gradient is an on-policy policy gradient with the reward 1[y = y*] / pi(y|x) (survey, section 4.1): sparse, and the
larger the less likely the demonstration. What is trained is a matter of where the prompt ends: with `completion_only`
the loss sees the answer alone; without, the whole text counts as completion, which is how a base model is made.

Worked example. Two completions of 1 and 3 tokens whose log-probabilities are [-2] and [-1, -1, -4]: the loss is
(2 + 1 + 1 + 4) / 4 = 2. The mean of the two means, (2 + 2) / 2, happens to be 2 as well; with [-6] in place of [-2] the
token mean is 3 and the mean of means 4, and a batch split in two must still say 3. So the weights 1/N are fixed for the
whole batch before it is split, and micro-batches add up.

Learning from itself (--source self): sample answers, keep the good ones, imitate them, repeat. The gradient on what was
kept is that of log(success rate), which is REINFORCE without its negative half. Which flags make which published method:

    RFT (2308.01825)               the default: one round, so that the start policy samples throughout
    expert iteration (1705.08439)  --rounds 5, each round sampled from the policy that the last one made
    RAFT (2304.06767)              --rounds 100 --keep best: a fresh sampler every step, the best of each group
    STaR (2203.14465), ReST-EM (2312.06585)   --rounds 5 --restart: each round starts over from the base
                                   (STaR's hints, the right answer shown for what was never solved, are not here)
    ReST (2308.08998)              --rounds 5 --threshold_start .2 with a graded reward: the bar rises
    AWR (1910.00177), RWR          --weighting awr: nobody is dropped, everybody weighs exp(advantage / awr_beta)
"""

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

import data
from model import InputError, check


@dataclass
class SFTConfig:
    completion_only: Annotated[bool, "train on completions only; false: on prompts too"] = True
    num_demonstrations: Annotated[int, "size of the finite set of demonstrations (100 to 10000)"] = 400
    num_documents: Annotated[int, "pretrain: size of the corpus; 0: max_steps x batch_size"] = 0
    source: Annotated[Literal["demos", "self"], "demonstrations, or the policy's own answers that were rewarded"] = "demos"
    num_generations: Annotated[int, "self: answers per prompt (4 to 64)"] = 16
    num_prompts: Annotated[int, "self: size of the finite set of training problems (500 to 100000)"] = 4000
    temperature: Annotated[float, "self: of sampling (0.7 to 1.2)"] = 1.0
    reward: Annotated[str, "self: reward functions, comma-separated: verifier, model, majority, format, brevity"] = "verifier"
    reward_weights: Annotated[str, "self: their weights, comma-separated; empty: 1 each"] = ""
    rounds: Annotated[int, "self: how often the sampler becomes the current policy (1 to max_steps)"] = 1
    restart: Annotated[bool, "self: every round starts over: model, optimizer, schedule"] = False
    keep: Annotated[Literal["threshold", "best"], "self: answers whose reward reaches it, or the best of each group"] = "threshold"
    threshold: Annotated[float, "self: the reward that an answer must reach (in the last round)"] = 1.0
    threshold_start: Annotated[float, "self: the same in the first round; it rises linearly; none: as in the last"] = None
    weighting: Annotated[Literal["none", "awr"], "self: awr weighs every answer by exp(advantage / awr_beta)"] = "none"
    awr_beta: Annotated[float, "self: temperature of those weights; the smaller, the greedier (0.1 to 1)"] = 0.3

    def __post_init__(self):
        check(self, at_least_1="num_demonstrations num_generations num_prompts rounds", at_least_0="num_documents",
              above_0="temperature awr_beta")
        if self.source == "self" and not self.completion_only:
            raise InputError("--completion_only false trains on prompts too, which --source self does not write")
        if self.num_documents and self.completion_only:
            raise InputError("--num_documents is the size of a corpus, all of which is trained on: "
                             "for --algo pretrain, or with --completion_only false")
        if self.threshold_start is not None and self.reward in ("verifier", "majority", "format"):
            raise InputError("--threshold_start: a bar can only rise under a graded reward (add brevity or model); "
                             f"--reward {self.reward} knows right and wrong alone")
        if self.threshold_start is not None and (self.keep == "best" or self.weighting == "awr"):
            raise InputError("--threshold_start is for --keep threshold: the best of a group, and awr, ask for no threshold")


# -- pure functions ---------------------------------------------------------------------------------------------------


def token_loss(logprobs):
    """The negative log-likelihood of each token. logprobs (B, T) -> losses (B, T)"""
    return -logprobs


def token_weights(completion_mask, row_weights=None):
    """Weights (B, T) that add up to 1: equal on all completion tokens, or as the row_weights (B,) of their answers.

    completion_mask (B, T). Worked example: lengths 1 and 3, no row weights: 1/4 each; row weights 0 and 1: 0 and 1/3.
    """
    weights = completion_mask * 1.0   # a bool becomes float32, float64 stays what it is
    if row_weights is not None:
        weights = weights * row_weights[:, None]
    return weights / weights.sum().clamp(min=1e-20)


def kept(rewards, keep="threshold", threshold=1.0):
    """Which answers are imitated. rewards (P, G) -> (P, G) of 0. and 1.

    `threshold`: those that reach it. `best`: the first of the group's best, whatever it is worth.
    """
    if keep == "best":
        return torch.zeros_like(rewards).scatter(1, rewards.argmax(1, keepdim=True), 1.0)
    if keep == "threshold":
        return (rewards >= threshold - 1e-6).to(rewards.dtype)
    raise ValueError(f"keep {keep!r} is none of threshold, best")


def round_of(step, rounds, max_steps):
    """The round that a step belongs to, that round's first step, and the first step of the next.

    Rounds are of equal length to within a step, and there is at most one a step. Worked example: 10
    steps in 4 rounds begin at 0, 3, 5 and 8, so that step 6 belongs to round 2 and gives (2, 5, 8).
    """
    rounds = min(rounds, max_steps)
    this = step * rounds // max_steps
    first, end = (-(-r * max_steps // rounds) for r in (this, this + 1))   # rounded up
    return this, first, end


def awr_weights(rewards, awr_beta, largest=20.0):
    """exp(A / awr_beta), A = reward minus its group's mean, cut off at `largest` (AWR, 1910.00177, eq. 9 and section 5).
    rewards (P, G) -> weights (P, G). With one prompt it is RWR, whose exp(R / beta) differs by a constant per group."""
    return ((rewards - rewards.mean(1, keepdim=True)) / awr_beta).exp().clamp(max=largest)


# -- the class that the loop drives -----------------------------------------------------------------------------------


class SFT:
    Config = SFTConfig
    micro_batch_size = 0         # set by the loop, as are max_steps and optimizer; rows per forward pass, 0: all
    rows_together = 1            # each row's loss stands alone
    defaults = dict(learning_rate=1e-3, max_steps=100, batch_size=32, lr_scheduler_type="linear", warmup_steps=10,
                    weight_decay=0.01, logging_steps=10, eval_steps=10, save_steps=50)
    legend = ("The loss is the nll, minus the mean log-probability of the tokens that are imitated, in nats (with --weighting "
              "awr\na weighted mean). kept: share of the sampled answers that are.")

    def __init__(self, config, model, ref_model, tokenizer, task):
        self.config, self.model, self.ref_model, self.tokenizer, self.task = config, model, ref_model, tokenizer, task
        self.networks, self.frozen = {"model": model}, {}          # trained; kept as they are
        if ref_model is not None:                                  # pre-training has nothing to refer to
            self.frozen["ref_model"] = ref_model
        if config.source == "self":
            self.rewards = data.Rewards(task, config.reward, config.reward_weights)
            self.sampler = self.frozen["sampler"] = copy.deepcopy(model).requires_grad_(False)

    @staticmethod
    def columns(config):
        """What a line of --data must have."""
        if config.source == "demos":
            return [("prompt", "completion"), ("text",)]
        return [("prompt", "answer") if "verifier" in config.reward.split(",") else ("prompt",)]

    def examples(self, seed):
        """What the loop draws batches from: problems, a corpus of documents, or demonstrations."""
        config = self.config
        if config.source == "self":
            return data.problems(self.task, "train", config.num_prompts, seed)
        if config.num_documents:
            return data.documents(self.task, config.num_documents, seed)
        examples = data.demonstrations(self.task, config.num_demonstrations, seed)
        if config.completion_only:
            return examples
        return [{"prompt": "", "completion": e["prompt"] + e["completion"]} for e in examples]

    def collect(self, examples, generator, step=0):
        """A batch to train on, and what is worth logging about it."""
        config = self.config
        if config.source == "demos":
            return data.collate(examples, self.tokenizer, self.model.device), {}
        this_round, first_step, _ = round_of(step, config.rounds, self.max_steps)
        if step == first_step:   # of the round: the sampler becomes the policy
            self.sampler.load_state_dict(self.model.state_dict())
            if config.restart:
                self.model.load_state_dict(self.ref_model.state_dict())
                self.optimizer.state.clear()
        batch, metrics = data.rollout(self.sampler, self.tokenizer, self.task, self.rewards, examples,
                                      config.num_generations, config.temperature, generator)
        rewards = batch.pop("rewards").view(len(examples), -1)                                 # (P, G)
        threshold = config.threshold
        if config.threshold_start is not None:
            done = this_round / max(min(config.rounds, self.max_steps) - 1, 1)
            threshold = config.threshold_start + (threshold - config.threshold_start) * done
        weights = kept(rewards, config.keep, threshold) if config.weighting == "none" else awr_weights(rewards, config.awr_beta)
        metrics["kept"] = ((weights > 0).sum(), weights.numel())
        return {**batch, "row_weights": weights.flatten()}, metrics

    def minibatches(self, batch):
        """The updates to make on a batch: just one. Its weights are fixed here, before it is split to fit memory."""
        mask = batch["completion_mask"].to(self.model.dtype)                               # (B, T)
        batch = {**batch, "weights": token_weights(mask, batch.get("row_weights"))}
        if "row_weights" in batch:
            rows = (batch["row_weights"] > 0).nonzero().squeeze(-1)
            batch = data.take_rows(batch, rows) if len(rows) else None
        return [batch]

    def loss(self, batch):
        """The summed loss of the batch's rows, and {name: (sum, count)} for the log."""
        mask = batch["completion_mask"]                                                        # (B, T)
        logits = self.model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], mask,
                                              batch["prompt_index"])                           # (B, T, V)
        all_logprobs = torch.log_softmax(logits, dim=-1)                                       # (B, T, V)
        logprobs = all_logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)  # (B, T)
        loss = (token_loss(logprobs) * batch["weights"]).sum()

        with torch.no_grad():
            n = mask.sum()
            right = (logits.argmax(-1) == batch["completion_ids"]) & mask
            metrics = {"nll": (-(logprobs * mask).sum(), n), "mean_token_accuracy": (right.sum(), n)}
        return loss, metrics
