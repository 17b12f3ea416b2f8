"""
PPO: proximal policy optimisation with a critic. The algorithm of RLHF.

    Who sampled the text?        the policy, a moment ago
    What weight has each token?  its own advantage: how much better things went than the critic
                                 expected before it
    What anchors the policy?     the clip, to the policy that sampled; a KL inside the reward

    L(theta) = - 1/N sum_i sum_t min( r_it A_it, clip(r_it, 1 - epsilon, 1 + epsilon) A_it )
    L(phi)   = 1/N sum_i sum_t 1/2 max( (V_it - R_it)^2,
                                        (clip(V_it, V_old +- epsilon_value) - R_it)^2 )

    r_it     = pi(y_it | ..) / pi_old(y_it | ..)          the ratio (1707.06347, eq. 7)
    reward_t = - kl_coef log pi_old(y_t)/pi_ref(y_t), and the score on the last token (2203.02155)
    delta_t  = reward_t + gamma V(s_t+1) - V(s_t)
    A_t      = sum over s >= t of (gamma lam)^(s-t) delta_s; R_t = A_t + V(s_t)   GAE (1506.02438)

What is minimised is L(theta) + vf_coef L(phi), each by a network of its own. A step is a token; a
state is the prompt and the tokens so far. The critic V has one number for a head. It starts from
the reward model if there is one, as in RLHF, and otherwise from the base. Where GRPO compares an
answer with its group, PPO compares each token with what the critic expected: credit goes to the
token at which things turned. That costs a second network, and the critic has to learn first.

"Why is the KL in the reward?" As a loss, the sampled log-ratio has an expected gradient of zero
(E[grad log pi] = 0). In the reward it has the gradient of the KL itself. What is logged as
objective/kl is a sample of the KL and may be negative on a batch.

"How far may a batch move the policy?" Before each pass after the first, the policy is read once
more on the whole batch, and the passes end if 1/2 (log pi/pi_old)^2, averaged over the tokens,
exceeds target_kl. This is the k2 estimate of KL(pi_old || pi) (joschu.net/blog/kl-approx.html),
logged as policy/approxkl. The reading costs about a tenth of a step.

An answer that ran out of tokens has no <end>, and what it would have been worth is unknown:

    (default)                           it ends there: its score, less missing_eos_penalty
    --bootstrap_truncated_completions   it goes on unseen: no score, and the critic's V after the
                                        last token stands for the rest
    --mask_truncated_completions        it is left out of both losses
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

import data
from harness.errors import InputError
from harness.flags import Sampling, flag
from tasks import Rewards


@dataclass
class PPOConfig(Sampling):
    """ppo: compare a token with what the critic expected"""
    kl_coef: float = flag(0.05, "coefficient of the KL, in the reward (0 to 0.2)", at_least=0)
    gamma: float = flag(1.0, "discount per token (1: none)", at_least=0, at_most=1)
    lam: float = flag(0.95, "GAE: 1 trusts rewards, 0 the critic (0.9 to 1)", at_least=0, at_most=1)
    epsilon: float = flag(0.2, "clip range of the ratio (0.1 to 0.3; TRL: cliprange)", at_least=0)
    epsilon_value: float = flag(0.2, "how far a value may move from V_old; 0: anywhere", at_least=0)
    vf_coef: float = flag(0.5, "weight of the critic's loss; matters little", at_least=0)
    num_iterations: int = flag(2, "passes over each batch (1 to 4)", at_least=1)
    num_minibatches: int = flag(1, "updates per pass (1 to 8)", at_least=1)
    target_kl: float = flag(0.1, "no pass beyond this KL to pi_old (.01 to .1); 0: any", at_least=0)
    whiten_advantages: bool = flag(True, "advantages of the batch's tokens to mean 0, variance 1")
    missing_eos_penalty: float = flag(0.0, "taken off where <end> is missing (0 to 1)", at_least=0)
    bootstrap_truncated_completions: bool = flag(False, "see above")
    mask_truncated_completions: bool = flag(False, "leave answers that ran out of tokens out of "
                                                   "the loss")
    max_steps: int = 60
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 5
    logging_steps: int = 5
    eval_steps: int = 5
    save_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        if sum((self.bootstrap_truncated_completions, self.mask_truncated_completions,
                self.missing_eos_penalty > 0)) > 1:
            raise InputError("--missing_eos_penalty, --bootstrap_truncated_completions and "
                             "--mask_truncated_completions exclude each other")
        if "majority" in self.reward.split(","):
            raise InputError("--reward majority compares the answers of a group: use grpo, dpo or "
                             "rft")
        rows = self.batch_size * self.num_generations
        if self.num_minibatches > rows:
            raise InputError(f"--num_minibatches {self.num_minibatches}: the {rows} answers of a "
                             "batch do not make so many parts")


# -- pure functions -------------------------------------------------------------------------------


def token_logprobs(logits, ids, temperature=1.0):
    """Log-probabilities of the tokens at hand (B, t), and of every token (B, t, V), at the sampling
    temperature, from logits (B, t, V) and ids (B, t): a few columns of the batch (see
    model.completion_scores).

    Worked example: logits log [.8, .2] and the token 1 give log .2 and log [.8, .2]; at the
    temperature .5, which squares the odds, log 1/17 and log [16/17, 1/17].
    """
    if temperature != 1:
        logits = logits / temperature
    all_logprobs = torch.log_softmax(logits, dim=-1)                            # (B, t, V)
    ids = ids.unsqueeze(-1)                                                     # (B, t, 1)
    return all_logprobs.gather(-1, ids).squeeze(-1), all_logprobs


def token_rewards(scores, logprobs, ref_logprobs, completion_mask, kl_coef):
    """The reward of each token: the KL's price on every one, the score on the last real one.

    scores (B,), logprobs, ref_logprobs, mask (B, T) -> rewards (B, T), 0 on padding. Summed over an
    answer they are score - kl_coef log pi(y)/pi_ref(y). Worked example, kl_coef .1, log-ratios
    [.5, -.5, 1], score 1, the third token padding: [-.05, 1.05, 0].
    """
    mask = completion_mask.to(logprobs.dtype)
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = (mask.sum(-1).long() - 1).clamp(min=0)[:, None]                      # (B, 1)
    return rewards.scatter_add(1, last, (scores.to(rewards.dtype) * mask.any(-1))[:, None])


def gae(rewards, values, completion_mask, last_values, gamma=1.0, lam=0.95):
    """Generalised advantage estimates and returns (1506.02438, eq. 16), from the last token back.

    rewards, values, mask (B, T); values[t] is V(s_t), before token t. last_values (B,): what is to
    come after the last real token, 0 where the answer ended. -> advantages, returns = advantages +
    values (B, T), both 0 on padding.

    Worked example, gamma lam = 1, rewards [0, 1], values [.4, .7]: deltas [.3, .3], advantages
    [.6, .3], returns [1, 1].
    """
    mask = completion_mask.to(rewards.dtype)
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(last_values)
    next_values = last_values                                                   # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t] = later
        next_values = torch.where(completion_mask[:, t].bool(), values[:, t], last_values)
    return advantages, (advantages + values) * mask


def whiten(x, completion_mask, tokens=None):
    """x (B, T) to mean 0 and variance 1 over the real tokens, 0 on padding. tokens (N,): take mean
    and variance from these instead, those of a larger batch of which x is a part."""
    tokens = x[completion_mask.bool()] if tokens is None else tokens
    return (x - tokens.mean()) * completion_mask / (tokens.var(correction=0) + 1e-8).sqrt()


def policy_loss(logprobs, old_logprobs, advantages, epsilon=0.2):
    """The clipped loss of each token, its ratio, and whether the clip cut its gradient off. Three
    times (B, T), from three times (B, T). (1707.06347, eq. 7)

    Worked example, epsilon .2: ratio 1.5 with advantage +1 gives -1.2 and no gradient: enough has
    been done. Ratio 1.5 with advantage -1 gives +1.5 and a gradient: the clip never protects a
    mistake.
    """
    log_ratio = logprobs - old_logprobs                                         # (B, T)
    ratio = log_ratio.exp()                                                     # (B, T)
    A = advantages                                                              # (B, T)
    losses = torch.maximum(-A * ratio, -A * ratio.clamp(1 - epsilon, 1 + epsilon))
    clipped = ((ratio > 1 + epsilon) & (A > 0)) | ((ratio < 1 - epsilon) & (A < 0))
    return losses, ratio, clipped


def value_loss(values, old_values, returns, epsilon_value=0.2):
    """Half the squared error of each value: the larger of its own and of the value's that is kept
    near the old one. All (B, T)

    Worked example, old value 0, return 1, epsilon_value .2: a value of .1 costs .405; .5 costs .32,
    what .2 would, and has no gradient: it has moved far enough for one batch.
    """
    losses = (values - returns) ** 2
    if epsilon_value > 0:
        near = old_values + (values - old_values).clamp(-epsilon_value, epsilon_value)
        losses = torch.maximum(losses, (near - returns) ** 2)
    return 0.5 * losses


def token_weights(completion_mask):
    """1/N on each of the batch's N completion tokens, 0 elsewhere. (B, T) -> (B, T)"""
    mask = 1.0 * completion_mask   # a mask of numbers keeps its precision
    return mask / mask.sum().clamp(min=1)


# -- the class that the loop drives ---------------------------------------------------------------


class PPO(nn.Module):
    Config = PPOConfig
    rows_together = 1   # each row's loss stands alone
    legend = ("entropy: of the next token   ratio: largest pi/pi_old, exactly 1 in the first pass "
              "over a batch\nvalue loss: the critic's, which has to fall before advantages mean "
              "anything\nmoved: KL(pi_old || pi) before a further pass, not made beyond target_kl")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.critic = (task.judge.model if task.judge else model).with_scalar_head()
        self.ref_model = copy.deepcopy(model).requires_grad_(False)
        self.rewards = Rewards(task, config.reward, config.reward_weights)
        self.optimizer = model.configure_optimizer(config, self.critic)

    def examples(self):
        """What batches are drawn from: problems, without solutions."""
        return self.task.problems("train", self.config.num_prompts, self.config.seed)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The policy, now. Rows are shuffled: a part is a random part."""
        batch = data.rollout(self.model, self, examples, generator, log)
        rows = torch.randperm(len(batch["rewards"]), generator=generator, device=self.model.device)
        return data.take_rows(batch, rows)

    def minibatches(self, batch, log):
        """What is each token worth? What followed it, less what the critic expected. num_iterations
        passes over num_minibatches parts, of nearly equal size."""
        config, dtype, batch = self.config, self.model.dtype, dict(batch)
        if config.mask_truncated_completions:
            batch["completion_mask"] = batch["completion_mask"] & ~batch["truncated"][:, None]
        rows, parts = torch.arange(len(batch["rewards"]), device=self.model.device), []
        for answers in rows.tensor_split(config.num_minibatches):
            part = data.take_rows(batch, answers)
            # pi_old and V_old: scored once, before anything moves, so that the first ratio is 1.
            part["old_logprobs"] = self.score(self.model, part)
            ref_logprobs = self.score(self.ref_model, part)
            values = data.in_micro_batches(self.values, part, config)           # (b, T + 1)
            mask, lengths = part["completion_mask"], part["completion_mask"].sum(-1, keepdim=True)
            scores, truncated = part["rewards"].to(dtype), part["truncated"]    # (b,)
            scores = scores - config.missing_eos_penalty * truncated.to(dtype)
            last_values = torch.zeros_like(scores)                              # (b,) it ended
            if config.bootstrap_truncated_completions:
                scores = scores * ~truncated
                last_values = values.gather(1, lengths).squeeze(1) * truncated
            rewards = token_rewards(scores, part["old_logprobs"], ref_logprobs, mask,
                                    config.kl_coef)                             # (b, T)
            part["old_values"] = values[:, :-1]
            part["advantages"], part["returns"] = gae(rewards, part["old_values"], mask,
                                                      last_values, config.gamma, config.lam)
            part["weights"] = token_weights(mask.to(dtype))
            kl = ((part["old_logprobs"] - ref_logprobs) * mask).sum(-1)         # (b,) k1, summed
            log.mean("objective/kl", kl, mask.any(-1))
            parts.append(part)
        tokens = torch.cat([part["advantages"][part["completion_mask"]] for part in parts])
        if config.whiten_advantages and len(tokens):
            for part in parts:
                part["advantages"] = whiten(part["advantages"], part["completion_mask"], tokens)
        return self.passes(parts, log)

    def passes(self, parts, log):
        """The parts, num_iterations times; no pass begins once the policy has moved too far."""
        for iteration in range(self.config.num_iterations):
            if iteration > 0 and self.config.target_kl > 0:
                log_ratio = torch.cat([(self.score(self.model, part) - part["old_logprobs"])[
                    part["completion_mask"]] for part in parts])                # (N,) all tokens
                moved = 0.5 * log_ratio ** 2
                log.mean("policy/approxkl", moved)
                if len(moved) and moved.mean() > self.config.target_kl:
                    break
            yield from parts

    def score(self, model, batch):
        """Log-probabilities (B, T) without gradient, in the micro-batches that training will
        use."""
        def f(logits, ids):                                                     # a few columns
            return token_logprobs(logits, ids, self.config.temperature)[0]
        return data.in_micro_batches(lambda b: model.completion_scores(f, *data.inputs(b)), batch,
                                     self.config)

    def values(self, batch):
        """V before each token and after the last (B, T + 1)."""
        return self.critic.completion_logits(*data.inputs(batch), read_last=True).squeeze(-1)

    def logprobs(self, model, batch):
        """Log-probabilities of the sampled tokens, and the entropy where each was drawn; both (B,
        T), at the sampling temperature."""
        def f(logits, ids):                                                     # a few columns
            logprobs, all_logprobs = token_logprobs(logits, ids, self.config.temperature)
            with torch.no_grad():
                entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
            return logprobs, entropy                                            # (B, t), (B, t)
        return model.completion_scores(f, *data.inputs(batch))

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the rows at hand."""
        config, mask = self.config, batch["completion_mask"]                    # (B, T)
        logprobs, entropy = self.logprobs(self.model, batch)
        values = self.values(batch)[:, :-1]                                     # (B, T)
        policy_losses, ratio, clipped = policy_loss(logprobs, batch["old_logprobs"],
                                                    batch["advantages"], config.epsilon)
        value_losses = value_loss(values, batch["old_values"], batch["returns"],
                                  config.epsilon_value)
        losses = policy_losses + config.vf_coef * value_losses                  # (B, T)
        log.mean("loss/policy", policy_losses, mask)
        log.mean("loss/value", value_losses, mask)
        log.mean("values", values, mask)
        log.mean("entropy", entropy, mask)
        log.mean("clip_ratio", clipped, mask)
        log.max("max_ratio", (ratio * mask).max())
        return (losses * batch["weights"]).sum()


if __name__ == "__main__":   # python ppo.py is python train.py --algo ppo
    import train
    train.start("ppo")
