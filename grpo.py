"""
GRPO: group relative policy optimisation. Reinforcement learning from verifiable rewards.

    Who sampled the text?        the policy, a moment ago: num_generations answers to each prompt
    What weight has each token?  its answer's advantage: how much better it is than its group
    What anchors the policy?     the clip, to the policy that sampled; with beta > 0 a KL as well

    L(theta) = - sum_i sum_t c_it [ min( r_it A_i, clip(r_it, 1 - epsilon, 1 + epsilon_high) A_i )
                                    - beta k3_it ]

    r_it = pi(y_it | ..) / pi_old(y_it | ..)              the ratio to the policy that sampled
    A_i  = (R_i - mean_group R) / (std_group R + eps)     2402.03300, eq. 3 and section 4.1.2
    k3   = pi_ref/pi - 1 - log pi_ref/pi                  an estimate of KL(pi || pi_ref)
    c_it = the aggregation: 1/(B |y_i|) for grpo, one over the tokens of the batch for dapo,
           1/(B L) for dr_grpo

"Why is my loss 0?" The first ratio is 1, so the loss is minus the mean advantage, and the
advantages of a group add up to zero: the loss of loss_type grpo is exactly 0. The default, dapo,
averages over tokens: its loss is below 0 while the better answers are the longer ones, and above 0
otherwise. Either way the value says nothing about progress. The gradient, - sum c A grad log pi,
trains, and it is not zero. Watch the reward.

"Why is the ratio always 1?" With num_iterations 1 and num_minibatches 1 each batch is used for one
update, made at the very policy that sampled it: pi = pi_old, the ratio is exactly 1 and the clip
never acts. The ratio is in the formula because its gradient is the policy gradient:
d r/d theta = r d log pi/d theta. Raise either number to see it move.

Which flags make which published method (defaults otherwise):

    GRPO (2402.03300)      --loss_type grpo, in the paper with --beta 0.04
    DAPO (2503.14476)      --loss_type dapo --epsilon_high 0.28   (flat groups are not refilled)
    Dr. GRPO (2503.20783)  --loss_type dr_grpo --scale_rewards none
    GSPO (2507.18071)      --importance_sampling_level sequence --loss_type grpo --epsilon 3e-4
                           --epsilon_high 4e-4
    CISPO (2506.13585)     --loss_type cispo --epsilon_high 4   (in TRL 5: there it is 1 + ours)
    RLOO (2402.14740)      --advantage rloo --scale_rewards none --loss_type dr_grpo
    ReMax (2310.10505)     --advantage remax --scale_rewards none --loss_type dr_grpo
    REINFORCE              --advantage reinforce --scale_rewards none --loss_type dr_grpo
    MaxRL (2602.02710)     --scale_rewards mean --loss_type dr_grpo
    GDPO (2601.05242)      --multi_objective_aggregation normalize_then_sum, with several --reward
    PSR, NSR (2506.01347)  --advantage_sign positive or negative   (there without a baseline, and
                           with rewards of +1 and -1)
    Clip-Cov (2505.22617)  --covariance clip --num_minibatches 8 --epsilon 1
    KL-Cov (2505.22617)    --covariance kl --num_minibatches 8 --epsilon 1

The survey (2603.13985, section 3.2) names GRPO, ReMax, RLOO, Clip-Cov and KL-Cov; MaxRL, GDPO, PSR
and NSR have not been seen in it.

With dr_grpo the losses of RLOO, ReMax, REINFORCE and MaxRL carry a factor that their papers lack:
the sum over an answer's tokens is divided by the constant L = max_new_tokens. Adam does not care;
max_grad_norm acts on gradients that are L times as large.

"Why does --covariance kl change nothing?" Its KL to pi_old is 0, and flat, as long as the policy is
pi_old. It acts from the second update of a batch on, so one update a batch is refused.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import data
from harness.errors import InputError
from harness.flags import Sampling, check_choice, flag
from tasks import Rewards


@dataclass
class GRPOConfig(Sampling):
    """grpo: compare an answer with its group"""
    advantage: Literal["group", "rloo", "remax", "reinforce"] = flag(
        "group", "baseline: the group's mean, the others' mean, the greedy answer's reward, none")
    scale_rewards: Literal["group", "batch", "mean", "none"] = flag(
        "group", "divide advantages by whose standard deviation; mean: by the group's mean (MaxRL)")
    std_correction: int = flag(1, "1: of a sample (as TRL), 0: population", at_least=0, at_most=1)
    advantage_eps: float = flag(1e-4, "added to the standard deviation", at_least=0)
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = flag(
        "sum_then_normalize", "several rewards: normalise their sum, or each by itself (GDPO)")
    advantage_sign: Literal["both", "positive", "negative"] = flag(
        "both", "train on all advantages, or on those of one sign alone")
    loss_type: Literal["grpo", "dr_grpo", "dapo", "cispo"] = flag(
        "dapo", "how token losses are averaged (and clipped)")
    importance_sampling_level: Literal["token", "sequence"] = flag(
        "token", "ratio of each token, or of the answer (GSPO)")
    epsilon: float = flag(0.2, "clip range below 1 (0.1 to 0.3)", at_least=0)
    epsilon_high: float = flag(None, "clip range above 1; none: as epsilon (0.2 to 0.4; cispo: 4)",
                               at_least=0)
    num_iterations: int = flag(1, "passes over each batch, mu in the paper (1 to 4)", at_least=1)
    num_minibatches: int = flag(1, "updates per pass (1 to 8)", at_least=1)
    beta: float = flag(0.0, "coefficient of the KL to the start model (0 to 0.1)", at_least=0)
    use_bias_correction_kl: bool = flag(False, "k3 times the ratio, which has the KL's gradient")
    entropy_coef: float = flag(0.0, "coefficient of the entropy bonus (0 to 0.01)")
    covariance: Literal["none", "clip", "kl"] = flag(
        "none", "tokens of large covariance: drop their gradient, or tie them to pi_old")
    cov_share: float = flag(0.01, "share of tokens so treated (2e-4 to 0.1)", above=0, at_most=1)
    cov_low: float = flag(1.0, "clip: smallest covariance of such a token")
    cov_high: float = flag(5.0, "clip: largest covariance of such a token")
    cov_kl_coef: float = flag(1.0, "kl: coefficient of KL(pi_old || pi)", at_least=0)
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
        unit, names = self.scale_rewards, self.reward.split(",")
        # Whether a reward may be below 0. (1e-2 is a weight above 0.)
        signed = {"brevity", "model"} & {*names} or "-" in self.reward_weights.replace("e-", "")
        for wrong, message in (
            (self.num_generations == 1 and (unit == "group" or self.advantage in ("group", "rloo")),
             "--num_generations 1 leaves a group nothing to compare with: raise it, or use "
             "--advantage reinforce (or remax) with --scale_rewards none (or batch)"),
            # Without the group's mean, equal rewards would be divided by a deviation of 0.
            (self.advantage in ("remax", "reinforce") and unit == "group",
             f"--advantage {self.advantage} needs --scale_rewards none or batch (or mean)"),
            (self.advantage == "remax" and "majority" in names,
             "--advantage remax makes one answer its own --reward majority: use group or rloo"),
            (unit == "mean" and signed,
             "--scale_rewards mean needs rewards of at least 0: verifier, format or majority"),
            (self.multi_objective_aggregation == "normalize_then_sum"
             and (len(names) == 1 or unit != "group"),
             "--multi_objective_aggregation normalize_then_sum needs two rewards or more, and "
             "--scale_rewards group, by which each is normalised"),
            (self.advantage_sign == "negative" and self.advantage == "reinforce" and not signed,
             "--advantage_sign negative: no such reward is below 0; use --advantage group"),
            (self.covariance == "kl" and self.num_iterations * self.num_minibatches == 1,
             "--covariance kl acts from a batch's second update on: raise --num_minibatches"),
            (self.covariance == "clip" and self.importance_sampling_level == "sequence",
             "--covariance clip drops tokens: use --importance_sampling_level token"),
            (self.cov_low >= self.cov_high, "--cov_low must be below --cov_high"),
            (self.num_minibatches > self.batch_size,
             f"--num_minibatches {self.num_minibatches}: a batch of --batch_size "
             f"{self.batch_size} groups does not make so many parts"),
        ):
            if wrong:
                raise InputError(message)


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


def group_advantages(rewards, advantage="group", scale_rewards="group", std_correction=1,
                     advantage_eps=1e-4, greedy_rewards=None):
    """How much better each answer is than its group. rewards (P, G), greedy_rewards (P,) -> (P, G)

    Worked example, rewards [1, 0, 0, 0]: mean 1/4; minus the mean [.75, -.25, -.25, -.25]; sample
    standard deviation .5; advantages [1.5, -.5, -.5, -.5]. RLOO compares with the mean of the other
    three: [1, -1/3, -1/3, -1/3], which is 4/3 of the above before the division. Divided by the
    mean, as MaxRL does: [3, -1, -1, -1].

    MaxRL (2602.02710): with rewards 0 and 1, p the chance of a 1 and K answers, the expected
    gradient of (R - mean) / mean is the sum over k < K of 1/k grad pass@k, which goes to that of
    log p as K grows: between the policy gradient (K = 2) and imitation of the right answers. With
    advantage reinforce, R / mean, the sum is over k <= K. A group whose mean is 0, or below, is
    left at 0: dividing by a negative mean would reinforce the worse answers.

    For group and rloo, a group whose rewards are all equal teaches nothing and gets exactly 0. It
    is recognised by max = min: the mean of equal floats need not be that float, and a residue of
    1e-9 over a deviation of 1e-9 would be a full-sized advantage. Equal rewards are never divided
    by their deviation. Raises ValueError for an unknown choice.
    """
    check_choice(GRPOConfig, "advantage", advantage)
    check_choice(GRPOConfig, "scale_rewards", scale_rewards)
    G = rewards.shape[1]
    flat = (rewards.max(1).values == rewards.min(1).values)[:, None]            # (P, 1)
    if advantage == "group":
        centred = rewards - rewards.mean(1, keepdim=True)
    elif advantage == "rloo":   # R_i - mean of the others (2402.14740, eq. 8)
        centred = G / (G - 1) * (rewards - rewards.mean(1, keepdim=True))
    elif advantage == "remax":  # 2310.10505, eq. 4
        centred = rewards - greedy_rewards[:, None]
    else:                       # REINFORCE without a baseline
        centred = rewards
    if scale_rewards == "group":
        std = rewards.std(1, correction=std_correction, keepdim=True)           # (P, 1)
        centred = torch.where(flat, centred, centred / (std + advantage_eps))
    elif scale_rewards == "batch" and rewards.max() > rewards.min():
        centred = centred / (rewards.std(correction=std_correction) + advantage_eps)
    elif scale_rewards == "mean":
        mean = rewards.mean(1, keepdim=True)                                    # (P, 1)
        centred = centred / torch.where(mean > 0, mean, torch.inf)
    return centred.masked_fill(flat, 0) if advantage in ("group", "rloo") else centred


def batch_advantages(batch, config, names, weights, dtype):
    """The advantages (B,) of a batch: of its "rewards", or with normalize_then_sum of each of its
    "rewards/<name>" (B,), added by their weights and divided by the deviation of the batch (GDPO,
    2601.05242, eq. 4-6). Of these the ones of advantage_sign; the others become 0.

    Worked example, two groups of two answers. In the first the better one earns 1 of one reward, in
    the second 1 of both. The sums are [1, 0] and [2, 0]; normalised, both are [.71, -.71]: the
    difference is lost. Each reward normalised by itself and added: [.71, -.71] and [1.41, -1.41];
    over the deviation of these four, 1.29: [.55, -.55] and [1.10, -1.10].

    Eq. 6 takes the batch's mean off as well. It is 0, for each group adds up to 0; its rounding
    error would give every flat group an advantage.

    The gradients of positive and of negative advantages alone (2506.01347) add up to that of both.
    The positive ones imitate the better answers, as RFT does. The negative ones take from the worse
    answers, and the softmax gives it to all others in proportion. In expectation the two point the
    same way; with rewards 0 and 1 the first weighs a prompt by how often it fails, the second by
    how often it succeeds.
    """
    several, total = config.multi_objective_aggregation == "normalize_then_sum", 0
    each = zip([f"/{name}" for name in names], weights) if several else [("", 1)]
    for name, weight in each:
        rewards = batch["rewards" + name].view(-1, config.num_generations).to(dtype)   # (P, G)
        total = total + weight * group_advantages(
            rewards, config.advantage, config.scale_rewards, config.std_correction,
            config.advantage_eps, batch.get("prompt_greedy_rewards"))
    if several and total.any():
        total = total / (total.std(correction=config.std_correction) + config.advantage_eps)
    signs = {"both": total, "positive": total.clamp(min=0), "negative": total.clamp(max=0)}
    return signs[config.advantage_sign].flatten()


def token_covariances(logprobs, advantages, completion_mask):
    """(log pi(y_t) - mean) (A - mean) of each token, the means over the tokens of the batch
    (2505.22617). logprobs, mask (B, T); advantages (B,) -> (B, T), 0 on padding

    To first order a step of size eta lowers the entropy by eta times the mean of these: likely
    tokens that are praised and unlikely ones that are blamed make it fall. Worked example,
    probabilities .8 and .2, advantages 1 and -1: log-probabilities .69 above and below their mean,
    both covariances .69. With the advantages exchanged both are -.69, and the entropy grows.
    """
    A, mask = advantages[:, None].expand_as(logprobs), completion_mask          # (B, T)
    return ((logprobs - logprobs[mask].mean()) * (A - A[mask].mean())).masked_fill(~mask, 0)


def restrained_tokens(logprobs, batch, config):
    """Which tokens Clip-Cov or KL-Cov treat: cov_share of the batch's, but at least one, if there
    is one that may be. logprobs (B, T); the batch with its advantages -> (B, T) bool. (2505.22617)

    clip: at random, by the batch's random numbers "uniforms" (B, T), among those whose covariance
    lies between cov_low and cov_high. kl: those with the largest covariance, if it is above 0, and
    any that equal the last of them.

    They are chosen once a batch, at the policy that sampled; the authors' code chooses anew at each
    update, among its tokens. The paper's shares, 2e-4 and 2e-3, are of batches a thousand times as
    large: a batch here has a few thousand tokens, of which 2e-4 is one or none.
    """
    mask, number = batch["completion_mask"], int(config.cov_share * batch["completion_mask"].sum())
    covariances = token_covariances(logprobs, batch["advantages"], mask)        # (B, T)
    may_be, rank = mask & (covariances > 0), covariances
    if config.covariance == "clip":
        rank = batch["uniforms"]
        may_be = mask & (covariances > config.cov_low) & (covariances < config.cov_high)
    rank = rank.masked_fill(~may_be, -torch.inf)
    return may_be & (rank >= rank.flatten().topk(max(number, 1)).values[-1])


def restrain(losses, logprobs, old_logprobs, restrained, config):
    """The losses with the restrained tokens' dropped (clip), or with cov_kl_coef KL(pi_old || pi)
    added to them (kl). losses, logprobs, old_logprobs, restrained (B, T) -> (B, T)

    The KL is estimated on the tokens that pi_old wrote, by k3 the other way round: ratio - 1 - log
    ratio, whose expected value and gradient are the KL's own; both are 0 at pi = pi_old. (The
    authors' code takes |log ratio| in its place, and has no clip where it does.)
    """
    if config.covariance == "clip":
        return losses.masked_fill(restrained, 0)
    return losses + config.cov_kl_coef * (k3(old_logprobs, logprobs) * restrained)


def policy_loss(logprobs, old_logprobs, advantages, completion_mask, epsilon=0.2, epsilon_high=None,
                loss_type="grpo", importance_sampling_level="token"):
    """The clipped loss of each token, its ratio, and whether the clip cut its gradient off.

    logprobs, old_logprobs, mask (B, T); advantages (B,) -> three times (B, T). epsilon_high None:
    the same as epsilon. Raises ValueError for an unknown choice.

    Worked example, epsilon .2: ratio 1.5 with advantage +1 gives -1.2 and no gradient: enough has
    been done. Ratio 1.5 with advantage -1 gives +1.5 and a gradient: the clip never protects a
    mistake. (PPO, 1707.06347, eq. 7)
    """
    check_choice(GRPOConfig, "loss_type", loss_type)
    check_choice(GRPOConfig, "importance_sampling_level", importance_sampling_level)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = logprobs - old_logprobs                                         # (B, T)
    if importance_sampling_level == "sequence":
        # GSPO (2507.18071, eq. 7): the geometric mean of the token ratios. The 1/|y| keeps it near
        # 1 on long answers; so it is no exact importance weight, which would be the product.
        mask = completion_mask.to(logprobs.dtype)
        length = mask.sum(-1, keepdim=True).clamp(min=1)                        # (B, 1)
        log_ratio = ((log_ratio * mask).sum(-1, keepdim=True) / length).expand_as(logprobs)
    ratio = log_ratio.exp()                                                     # (B, T)
    A = advantages[:, None]                                                     # (B, 1)
    if loss_type == "cispo":
        # 2506.13585, eq. 4: the clipped ratio is only a weight, detached; every token keeps its
        # gradient.
        losses = -ratio.clamp(max=1 + epsilon_high).detach() * A * logprobs
        return losses, ratio, (ratio > 1 + epsilon_high) & completion_mask.bool()
    losses = torch.maximum(-A * ratio, -A * ratio.clamp(1 - epsilon, 1 + epsilon_high))
    clipped = ((ratio > 1 + epsilon_high) & (A > 0)) | ((ratio < 1 - epsilon) & (A < 0))
    return losses, ratio, clipped & completion_mask.bool()


def k3(logprobs, ref_logprobs, old_logprobs=None):
    """Schulman's estimate of KL(pi || pi_ref) at each token: never negative, and unbiased as a
    value (joschu.net/blog/kl-approx.html). (B, T) -> (B, T)

    As a loss it is not what its name says. Its expected gradient on the policy's own samples is
    that of the forward KL(pi_ref || pi), state by state: E_pi[grad k3] = E_pi[(1 - pi_ref/pi) grad
    log pi] = - sum_y pi_ref grad log pi. GRPO has used it since DeepSeekMath (2402.03300, eq. 4);
    near pi_ref the two agree.

    With old_logprobs it is k3 times the token's ratio pi/pi_old, differentiated as well
    (DeepSeek-V3.2, 2512.02556, eq. 7; TRL's use_bias_correction_kl, its default today). Given the
    tokens before, E_old[ratio k3] = KL(pi || pi_ref): value and gradient are the KL's own,
    on-policy and off.
    """
    log_ratio = ref_logprobs - logprobs
    estimate = log_ratio.exp() - 1 - log_ratio
    return estimate if old_logprobs is None else (logprobs - old_logprobs).exp() * estimate


def token_weights(completion_mask, loss_type="grpo", max_completion_length=None):
    """The weight c_it of each token in the loss, (B, T), fixed for the batch before it is split.

    grpo         1 / (B |y_i|)   every answer counts the same, a token of a long one less
    dapo, cispo  1 / sum |y_i|   every token of the batch counts the same (2503.14476, eq. 8)
    dr_grpo      1 / (B L)       a constant, L = max_completion_length: no length bias at all
                                 (2503.20783, section 3)

    Raises ValueError for an unknown choice.
    """
    check_choice(GRPOConfig, "loss_type", loss_type)
    mask = 1.0 * completion_mask   # a mask of numbers keeps its precision
    if loss_type == "grpo":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)
    if loss_type == "dr_grpo":
        return mask / (len(mask) * max_completion_length)
    return mask / mask.sum().clamp(min=1)


def rows_with_gradient(batch):
    """The rows (indices) of a batch that have a gradient: those with a token and an advantage.

    The others have been counted in the weights and may be left out, which saves time and changes
    nothing. One row stays where all are 0: an update without a gradient is still a step of Adam, on
    its momentum.
    """
    keep = (batch["advantages"] != 0) & batch["completion_mask"].any(-1)
    keep[0] |= ~keep.any()
    return keep.nonzero().squeeze(-1)


# -- the class that the loop drives ---------------------------------------------------------------


class GRPO(nn.Module):
    Config = GRPOConfig
    rows_together = 1   # each row's loss stands alone
    legend = ("entropy: of the next token, over the rows trained on   ratio: largest pi/pi_old, "
              "exactly 1 where a batch is used once\nflat: share of groups whose rewards are all "
              "equal, which teach nothing\nThe loss is no measure of progress: at ratio 1 it is "
              "minus the mean advantage.")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.ref_model = copy.deepcopy(model).requires_grad_(False)
        self.rewards = Rewards(task, config.reward, config.reward_weights)
        self.optimizer = model.configure_optimizer(config)

    def examples(self):
        """What batches are drawn from: problems, without solutions."""
        return self.task.problems("train", self.config.num_prompts, self.config.seed)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The policy, now: a group of answers to every prompt."""
        batch = data.rollout(self.model, self, examples, generator, log)
        if self.config.advantage == "remax":
            greedy = data.rollout(self.model, self, examples, generator, None, 1, temperature=0)
            log.sum("sampled_tokens", int(greedy["completion_mask"].sum()))
            batch["prompt_greedy_rewards"] = greedy["rewards"]                  # (P,)
        if self.config.covariance == "clip":   # random numbers that pick among the tokens
            batch["uniforms"] = torch.rand(batch["completion_ids"].shape, generator=generator,
                                           device=self.model.device)            # (B, T)
        return batch

    def minibatches(self, batch, log):
        """What is each token worth? What its answer is worth beside its group. num_iterations
        passes over num_minibatches parts, of nearly equal size."""
        config, dtype, batch = self.config, self.model.dtype, dict(batch)
        rewards = batch["rewards"].view(-1, config.num_generations).to(dtype)   # (P, G)
        batch["advantages"] = batch_advantages(batch, config, self.rewards.functions,
                                               self.rewards.weights, dtype)     # (B,)
        log.mean("frac_reward_zero_std", rewards.max(1).values == rewards.min(1).values)
        if config.num_generations > 1:
            log.mean("reward_std", rewards.std(1))
        if config.mask_truncated_completions:
            batch["completion_mask"] = batch["completion_mask"] & ~batch["truncated"][:, None]
        if config.covariance != "none":   # settled for the whole batch, at the policy that sampled
            batch["restrained"] = restrained_tokens(self.score(self.model, batch), batch, config)
        rows, parts = torch.arange(len(batch["rewards"]), device=self.model.device), []
        for groups in rows.view_as(rewards).tensor_split(config.num_minibatches):
            part = data.take_rows(batch, groups.flatten())
            part["weights"] = token_weights(part["completion_mask"].to(dtype), config.loss_type,
                                            self.task.max_new_tokens)           # (b, T)
            if config.beta == config.entropy_coef == 0 and config.covariance != "kl":
                part = data.take_rows(part, rows_with_gradient(part))
            if config.num_iterations * config.num_minibatches > 1:
                # pi_old: scored once, before anything moves, by the forward pass of training, so
                # that the first ratio is exactly 1. (The sampler's differ in the last bits.)
                part["old_logprobs"] = self.score(self.model, part)
            if config.beta > 0:
                part["ref_logprobs"] = self.score(self.ref_model, part)
            parts.append(part)
        return parts * config.num_iterations

    def score(self, model, batch):
        """Log-probabilities (B, T) without gradient, in the micro-batches that training will
        use."""
        def f(logits, ids):                                                     # a few columns
            return token_logprobs(logits, ids, self.config.temperature)[0]
        return data.in_micro_batches(lambda b: model.completion_scores(f, *data.inputs(b)), batch,
                                     self.config)

    def logprobs(self, model, batch):
        """Log-probabilities of the sampled tokens, and the entropy where each was drawn; both (B,
        T), at the sampling temperature."""
        def f(logits, ids):                                                     # a few columns
            logprobs, all_logprobs = token_logprobs(logits, ids, self.config.temperature)
            with torch.set_grad_enabled(self.config.entropy_coef != 0):
                entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
            return logprobs, entropy                                            # (B, t), (B, t)
        return model.completion_scores(f, *data.inputs(batch))

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the rows at hand."""
        config, mask = self.config, batch["completion_mask"]                    # (B, T)
        logprobs, entropy = self.logprobs(self.model, batch)
        old_logprobs = batch.get("old_logprobs", logprobs.detach())   # used once: pi_old is pi
        losses, ratio, clipped = policy_loss(logprobs, old_logprobs, batch["advantages"], mask,
                                             config.epsilon, config.epsilon_high, config.loss_type,
                                             config.importance_sampling_level)
        if config.covariance != "none":
            losses = restrain(losses, logprobs, old_logprobs, batch["restrained"], config)
            log.mean("frac_restrained", batch["restrained"], mask)
        losses = losses - config.entropy_coef * entropy
        if config.beta > 0:
            corrected = old_logprobs if config.use_bias_correction_kl else None
            kl = k3(logprobs, batch["ref_logprobs"], corrected)                 # (B, T)
            losses = losses + config.beta * kl
            log.mean("kl", kl, mask)
        log.mean("entropy", entropy, mask)
        log.mean("clip_ratio", clipped, mask)
        log.max("max_ratio", (ratio * mask).max())
        return (losses * batch["weights"]).sum()


if __name__ == "__main__":   # python grpo.py is python train.py --algo grpo
    import train
    train.start("grpo")
