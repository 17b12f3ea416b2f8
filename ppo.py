"""
PPO: proximal policy optimisation with a critic, the algorithm of RLHF.

    Who sampled the text?        the policy itself, a moment ago
    What weight has each token?  its own advantage: how much better things went from there on than the critic expected
    What anchors the policy?     the clip, to the policy that sampled; and a KL to the start model inside the reward

    L(theta) = - 1/N sum_i sum_t min( r_it A_it, clip(r_it, 1 - cliprange, 1 + cliprange) A_it )        (1707.06347, eq. 7)
    L(phi)   =   1/N sum_i sum_t 1/2 max( (V_it - R_it)^2, (clip(V_it, V_old +- cliprange_value) - R_it)^2 )
    what is minimised is L(theta) + vf_coef L(phi), each by a network of its own

    reward_t = - kl_coef (log pi_old(y_t) - log pi_ref(y_t)), and the answer's score on its last token     (2203.02155, eq. 2)
    delta_t  = reward_t + gamma V(s_t+1) - V(s_t)
    A_t      = sum over s >= t of (gamma lam)^(s-t) delta_s           GAE (1506.02438, eq. 16);   R_t = A_t + V(s_t)

A step is a token, a state the prompt and the tokens so far. The critic V is a network of its own with one number for a
head; it starts from the reward model if there is one, as in RLHF, and otherwise from the base. Where GRPO compares
an answer with its siblings, PPO compares each token with what the critic expected before it: credit goes to the token
at which things turned. That costs a second network, and the critic has to learn first.

"Why is the KL in the reward?" As a loss, the sampled log-ratio has an expected gradient of zero (E[grad log pi] = 0); in
the reward it has the gradient of the KL itself. The estimate logged as objective/kl may be negative on a batch; it is
not the KL but a sample of it.

"How far may a batch move the policy?" Before each pass after the first, the policy reads the whole
batch once more, without gradient. If 1/2 (log pi/pi_old)^2, averaged over all tokens, exceeds
target_kl, that pass is not made. It is the k2 estimate of KL(pi_old || pi)
(joschu.net/blog/kl-approx.html), policy/approxkl in the log and `moved` on the console. Before the
first pass it is 0. The reading costs some 7 % of a step.

An answer that ran out of tokens has no <end>: nobody knows what it would have been worth. --truncation decides:

    terminal   it ends there: the score of what was written, less missing_eos_penalty, and nothing after it
    bootstrap  it goes on unseen: no score, and the critic's V after the last token stands for the rest (a policy that
               never ends an answer thus never sees a score)
    mask       it is left out of both losses
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

import data
from model import InputError, check


@dataclass
class PPOConfig:
    num_generations: Annotated[int, "answers per prompt; PPO needs no group, so 1 will do (1 to 16)"] = 16
    temperature: Annotated[float, "of sampling and, equally, of scoring (0.7 to 1.2)"] = 1.0
    reward: Annotated[str, "reward functions, comma-separated: verifier, model, format, brevity"] = "verifier"
    reward_weights: Annotated[str, "their weights, comma-separated; empty: 1 each"] = ""
    kl_coef: Annotated[float, "coefficient of the KL to the start model, in the reward (0 to 0.2)"] = 0.05
    gamma: Annotated[float, "discount per token (1: none)"] = 1.0
    lam: Annotated[float, "GAE: 1 trusts the outcome, 0 the critic (0.9 to 1)"] = 0.95
    cliprange: Annotated[float, "clip range of the ratio (0.1 to 0.3)"] = 0.2
    cliprange_value: Annotated[float, "how far a value may move from the old one; 0: anywhere (0.2)"] = 0.2
    vf_coef: Annotated[float, "weight of the critic's loss; of little consequence, the networks being apart"] = 0.5
    num_ppo_epochs: Annotated[int, "passes over each batch (1 to 4)"] = 2
    num_mini_batches: Annotated[int, "updates per pass (1 to 8)"] = 1
    target_kl: Annotated[float, "a KL beyond which no pass begins (0.01 to 0.1); 0: no limit"] = 0.1
    whiten_advantages: Annotated[bool, "advantages of the batch's tokens to mean 0 and variance 1"] = True
    truncation: Annotated[Literal["terminal", "bootstrap", "mask"], "what an answer without <end> is worth; see above"] = "terminal"
    missing_eos_penalty: Annotated[float, "terminal: taken off the score of an answer without <end> (0 to 1)"] = 0.0
    num_prompts: Annotated[int, "size of the finite set of training problems (500 to 100000)"] = 4000

    def __post_init__(self):
        check(self, at_least_1="num_generations num_ppo_epochs num_mini_batches num_prompts", above_0="temperature",
              at_least_0="kl_coef cliprange cliprange_value vf_coef target_kl missing_eos_penalty")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} {getattr(self, name)}: a number from 0 to 1 is needed")
        if self.missing_eos_penalty and self.truncation != "terminal":
            raise InputError("--missing_eos_penalty is taken off a score, and only --truncation terminal scores a cut-off answer")
        if "majority" in self.reward.split(","):
            raise InputError("--reward majority compares the answers of a group: use grpo, dpo or sft --source self")

    def check_rows(self, rows):
        """Raise InputError where a batch of so many answers is too small for its parts."""
        if self.num_mini_batches > rows:
            raise InputError(f"--num_mini_batches {self.num_mini_batches}: the {rows} answers of a "
                             "batch (--batch_size x --num_generations) do not make so many parts")


# -- pure functions ---------------------------------------------------------------------------------------------------


def token_rewards(scores, logprobs, ref_logprobs, completion_mask, kl_coef):
    """The reward of each token: the KL's price on every one, the score on the last real one, never on padding.

    scores (B,), logprobs, ref_logprobs, mask (B, T) -> rewards (B, T). Summed over an answer they telescope to
    score - kl_coef log pi(y)/pi_ref(y). Worked example, kl_coef .1, log-ratios [.5, -.5, 1], score 1, the third
    token padding: [-.05, 1.05, 0].
    """
    mask = completion_mask.to(logprobs.dtype)
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = (mask.sum(-1).long() - 1).clamp(min=0)[:, None]                                # (B, 1)
    return rewards.scatter_add(1, last, (scores.to(rewards.dtype) * mask.any(-1))[:, None])


def gae(rewards, values, completion_mask, last_values, gamma=1.0, lam=0.95):
    """Generalised advantage estimates and returns (1506.02438, eq. 16). rewards, values, mask (B, T), last_values (B,)

    values[t] is V(s_t), before token t; last_values what is to come after the last real token: 0 where the answer ended,
    the critic's guess where it was cut off. -> advantages, returns = advantages + values (B, T), both 0 on padding.

    The sum over the future is a product with the matrix of (gamma lam)^(s-t), s >= t. Worked example, gamma lam = 1,
    rewards [0, 1], values [.4, .7]: deltas [.3, .3], advantages [.6, .3], returns [1, 1].
    """
    T, mask = rewards.shape[1], completion_mask.to(rewards.dtype)
    next_mask = F.pad(mask, (0, 1))[:, 1:]                                                # 0 at the last real token
    next_values = F.pad(values, (0, 1))[:, 1:] * next_mask + last_values[:, None] * (mask - next_mask)
    deltas = (rewards + gamma * next_values - values) * mask                              # (B, T)
    distance = torch.arange(T, device=rewards.device)[:, None] - torch.arange(T, device=rewards.device)   # s - t
    discounts = (gamma * lam) ** distance.clamp(min=0).to(rewards.dtype) * (distance >= 0)                # (T, T), [s, t]
    advantages = (deltas @ discounts) * mask
    return advantages, (advantages + values) * mask


def whiten(x, completion_mask):
    """x (B, T) to mean 0 and variance 1 over the real tokens; 0 on padding."""
    mask = completion_mask.to(x.dtype)
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum()
    return (x - mean) * mask / (variance + 1e-8).sqrt()


def policy_loss(logprobs, old_logprobs, advantages, cliprange=0.2):
    """The clipped loss of each token and its ratio, all (B, T). (1707.06347, eq. 7)

    Worked example, cliprange .2: ratio 1.5 with advantage +1 gives -1.2 and no gradient: enough has been done. Ratio 1.5
    with advantage -1 gives +1.5 and a gradient: the clip never shields a mistake.
    """
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)), ratio


def value_loss(values, old_values, returns, cliprange_value=0.2):
    """Half the squared error of each value, the worse of the value itself and of it kept near the old one. All (B, T)

    Worked example, old value 0, return 1, cliprange_value .2: a value of .1 costs .405; .5 costs .32, what .2 would,
    and has no gradient: it has moved far enough for one batch.
    """
    losses = (values - returns) ** 2
    if cliprange_value > 0:
        near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        losses = torch.maximum(losses, (near - returns) ** 2)
    return 0.5 * losses


def token_weights(completion_mask):
    """1/N on each of the N completion tokens of the batch, 0 elsewhere.

    completion_mask (B, T) -> weights (B, T); of bools in float32, of numbers in their precision.
    """
    mask = 1.0 * completion_mask
    return mask / mask.sum().clamp(min=1)


# -- the class that the loop drives -----------------------------------------------------------------------------------


class PPO:
    Config = PPOConfig
    micro_batch_size = 0         # set by the loop: rows per forward pass, 0: all
    rows_together = 1            # each row's loss stands alone once its advantages are known
    defaults = dict(learning_rate=1e-3, max_steps=60, batch_size=32, lr_scheduler_type="constant", warmup_steps=5,
                    weight_decay=0.0, logging_steps=5, eval_steps=5, save_steps=20)
    legend = ("entropy: of the next token   ratio: largest pi/pi_old: exactly 1 in the first pass over a batch, and moving in those "
              "after\nvalue loss: the critic's, which has to fall before advantages mean anything")

    def __init__(self, config, model, ref_model, tokenizer, task):
        self.config, self.model, self.ref_model, self.tokenizer, self.task = config, model, ref_model, tokenizer, task
        self.rewards = data.Rewards(task, config.reward, config.reward_weights)
        self.critic = (getattr(task, "reward_model", None) or model).with_scalar_head()
        self.networks, self.frozen = {"model": model, "critic": self.critic}, {"ref_model": ref_model}   # trained; kept
        if config.target_kl > 0 and config.num_ppo_epochs > 1:
            self.legend += ("\nmoved: KL(pi_old || pi) per token, measured before a further pass; "
                            "beyond target_kl it is not made")

    @staticmethod
    def columns(config):
        """What a line of --data must have."""
        return [("prompt", "answer") if "verifier" in config.reward.split(",") else ("prompt",)]

    def examples(self, seed):
        """What the loop draws batches from: problems. Nobody shows how to solve them."""
        return data.problems(self.task, "train", self.config.num_prompts, seed)

    def collect(self, examples, generator, step=0):
        """Sample answers, score them, and turn scores, KL and values into one advantage and one return a token."""
        config = self.config
        batch, metrics = data.rollout(self.model, self.tokenizer, self.task, self.rewards, examples, config.num_generations,
                                      config.temperature, generator)
        order = torch.randperm(len(batch["rewards"]), generator=generator, device=self.model.device)
        batch = data.take_rows(batch, order)   # so that a part of the batch is a random part
        scores, truncated = batch.pop("rewards"), batch.pop("truncated")             # (B,), (B,)
        scores, mask = scores.to(self.model.dtype), batch["completion_mask"]         # (B,), (B, T)
        if config.truncation == "mask":   # before anything is scored, for training will read the masked batch
            batch["completion_mask"] = mask = mask & ~truncated[:, None]
        values, old_logprobs, ref_logprobs = self.rescore(batch)                          # (B, T + 1), (B, T), (B, T)
        last_values = torch.zeros_like(scores)
        if config.truncation == "terminal":
            scores = torch.where(truncated, scores - config.missing_eos_penalty, scores)
        if config.truncation == "bootstrap":   # every column of a row that was cut off is real
            scores, last_values = scores * ~truncated, values[:, -1] * truncated
        rewards = token_rewards(scores, old_logprobs, ref_logprobs, mask, config.kl_coef)
        advantages, returns = gae(rewards, values[:, :-1], mask, last_values, config.gamma, config.lam)
        kl = ((old_logprobs - ref_logprobs) * mask).sum(-1)                               # (B,) k1, summed per answer
        metrics["objective/kl"] = (kl.sum(), mask.any(-1).sum())
        if config.whiten_advantages and mask.any():
            advantages = whiten(advantages, mask)
        self.metrics = metrics   # minibatches adds to them
        return {**batch, "old_logprobs": old_logprobs, "old_values": values[:, :-1], "advantages": advantages,
                "returns": returns}, metrics

    def parts(self, batch):
        """The rows of each update, one part after the other; their sizes differ by one at most."""
        rows = torch.arange(len(batch["completion_ids"]), device=self.model.device)
        self.config.check_rows(len(rows))
        return rows.tensor_split(self.config.num_mini_batches)   # chunk may make fewer parts

    @torch.no_grad()
    def rescore(self, batch):
        """Values (B, T + 1) and log-probabilities (B, T) under policy and reference, of the parts in which the batch is
        trained, by the very forward passes that training uses: the first ratio is then exactly 1."""
        T = batch["completion_ids"].shape[1]
        scored = []
        self.autocast = torch.is_autocast_enabled(self.model.device.type)   # `moved` reads likewise
        for rows in self.parts(batch):
            for micro in data.split(data.take_rows(batch, rows), self.micro_batch_size):
                ref_logprobs, _ = self.logprobs(self.ref_model, micro)
                scored.append((self.values(micro), self.logprobs(self.model, micro)[0], ref_logprobs))
        return [torch.cat([F.pad(x, (0, width - x.shape[1])) for x in xs]) for width, xs in zip((T + 1, T, T), zip(*scored))]

    def minibatches(self, batch):
        """The updates to make on a batch: num_ppo_epochs passes over num_mini_batches parts, given
        out one by one, so that no pass begins once the policy has moved by target_kl. How far it
        had moved joins the metrics that collect returned, which the loop sums up afterwards."""
        parts = []
        for rows in self.parts(batch):
            part = data.take_rows(batch, rows)
            mask = part["completion_mask"].to(self.model.dtype)
            parts.append({**part, "weights": token_weights(mask)})
        for epoch in range(self.config.num_ppo_epochs):
            if epoch > 0 and self.config.target_kl > 0:
                moved, tokens = self.metrics["policy/approxkl"] = self.moved(parts)
                if moved > self.config.target_kl * tokens:
                    break
            yield from parts

    @torch.no_grad()
    def moved(self, parts):
        """The k2 estimate of KL(pi_old || pi), summed over the parts' tokens, and their number.
        Read as pi_old was: in the micro-batches and in the precision of training."""
        total, tokens = 0.0, 0
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            for part in parts:
                for micro in data.split(part, self.micro_batch_size):
                    logprobs, mask = self.logprobs(self.model, micro)[0], micro["completion_mask"]
                    log_ratio = logprobs - micro["old_logprobs"]                     # (B, T)
                    total += float((0.5 * log_ratio ** 2 * mask).sum())
                    tokens += int(mask.sum())
        return total, tokens

    def values(self, batch):
        """V before each token and after the last (B, T + 1)."""
        return self.critic.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"],
                                             batch["completion_mask"], batch["prompt_index"], read_last=True).squeeze(-1)

    def logprobs(self, model, batch):
        """Log-probabilities of the sampled tokens (B, T), and of every token (B, T, V), at the sampling temperature."""
        logits = model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"],
                                         batch["completion_mask"], batch["prompt_index"])      # (B, T, V)
        if self.config.temperature != 1:
            logits = logits / self.config.temperature
        all_logprobs = torch.log_softmax(logits, dim=-1)                                       # (B, T, V)
        logprobs = all_logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)  # (B, T)
        return logprobs, all_logprobs

    def loss(self, batch):
        """The summed loss of the batch's rows, and {name: (sum, count)} for the log."""
        config, mask = self.config, batch["completion_mask"]                                   # (B, T)
        logprobs, all_logprobs = self.logprobs(self.model, batch)
        values = self.values(batch)[:, :-1]                                                    # (B, T)
        policy_losses, ratio = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], config.cliprange)
        value_losses = value_loss(values, batch["old_values"], batch["returns"], config.cliprange_value)
        loss = ((policy_losses + config.vf_coef * value_losses) * batch["weights"]).sum()

        with torch.no_grad():
            n = mask.sum()
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)                             # (B, T)
            A, c = batch["advantages"], config.cliprange
            clipped = (((ratio > 1 + c) & (A > 0)) | ((ratio < 1 - c) & (A < 0))) & mask       # where the clip cut the gradient off
            metrics = {"loss/value": ((value_losses * mask).sum(), n), "loss/policy": ((policy_losses * mask).sum(), n),
                       "entropy": ((entropy * mask).sum(), n), "clip_ratio": (clipped.sum(), n),
                       "max_ratio": (ratio * mask).max(), "values": ((values * mask).sum(), n)}
        return loss, metrics
