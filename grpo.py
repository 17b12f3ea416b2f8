"""
GRPO: group relative policy optimisation, reinforcement learning from verifiable rewards without a critic.

    Who sampled the text?        the policy itself, num_generations answers to each prompt, a moment ago
    What weight has each token?  its answer's advantage: how much better than its siblings, in standard deviations
    What anchors the policy?     the clip, to the policy that sampled; with beta > 0 a KL to the starting model as well

    L(theta) = - sum_i sum_t c_it [ min( r_it A_i, clip(r_it, 1 - epsilon, 1 + epsilon_high) A_i ) - beta k3_it ]

    r_it = pi(y_it | ..) / pi_old(y_it | ..)          the ratio to the policy that sampled
    A_i  = (R_i - mean_group R) / (std_group R + advantage_eps)          DeepSeekMath (2402.03300), eq. 3 and section 4.1.2
    k3   = pi_ref/pi - 1 - log pi_ref/pi              an estimate of KL(pi || pi_ref) (joschu.net/blog/kl-approx.html)
    c_it = the aggregation: 1/(B |y_i|) for grpo, one over the tokens of the batch for dapo, 1/(B L) for dr_grpo

"Why is my loss 0?" The first ratio is 1, so the loss is minus the mean advantage, and the advantages of a group add up to
zero: 0 by construction with loss_type grpo. The default, dapo, averages over tokens, so that its loss is below 0 while the
better answers are the longer ones, and above 0 otherwise. Either way the value says nothing about progress. The gradient,
- sum c A grad log pi, is what trains, and it is not zero. Watch the reward.

"Why is the ratio always 1?" With num_iterations 1 and num_minibatches 1 each batch is used for one update, made at the
very policy that sampled it: pi = pi_old, the ratio is exactly 1 and the clip never acts. The ratio is still in the
formula because its gradient is the policy gradient: d r/d theta = r d log pi/d theta. Raise either to see it move.

Which flags make which published method (defaults otherwise; none of these is more than a line below):

    GRPO (2402.03300)      --loss_type grpo, in the paper with --beta 0.04
    DAPO (2503.14476)      --loss_type dapo --epsilon_high 0.28   (its refilling of flat groups is not here)
    Dr. GRPO (2503.20783)  --loss_type dr_grpo --scale_rewards none   (the loss_type alone is the aggregation only)
    GSPO (2507.18071)      --importance_sampling_level sequence --loss_type grpo --epsilon 3e-4 --epsilon_high 4e-4
    CISPO (2506.13585)     --loss_type cispo --epsilon_high 4
    RLOO (2402.14740)      --advantage rloo --scale_rewards none --loss_type dr_grpo
    ReMax (2310.10505)     --advantage remax --scale_rewards none --loss_type dr_grpo
    REINFORCE              --advantage reinforce --scale_rewards none --loss_type dr_grpo

The last three carry a factor that their papers lack: dr_grpo divides the sum over an answer's
tokens by the constant L = max_new_tokens, so that loss and gradient are 1/L times the published
ones. Adam does not care, and KL and entropy bonus, which have the same factor, keep their
proportion; max_grad_norm acts L times later. In TRL CISPO's ratio is clipped at epsilon_high
itself: their epsilon_high is 1 + ours (5 there is 4 here).
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
import torch.nn.functional as F

import data
from model import InputError, check


@dataclass
class GRPOConfig:
    num_generations: Annotated[int, "answers per prompt, the group (4 to 64)"] = 16
    temperature: Annotated[float, "of sampling and, equally, of scoring (0.7 to 1.2)"] = 1.0
    reward: Annotated[str, "reward functions, comma-separated: verifier, model, majority, format, brevity"] = "verifier"
    reward_weights: Annotated[str, "their weights, comma-separated; empty: 1 each"] = ""
    advantage: Annotated[Literal["group", "rloo", "remax", "reinforce"],
                         "baseline: the group's mean, the others' mean, the greedy answer's reward, none"] = "group"
    scale_rewards: Annotated[Literal["group", "batch", "none"], "divide advantages by whose standard deviation"] = "group"
    std_correction: Annotated[int, "1: sample standard deviation (as TRL), 0: population"] = 1
    advantage_eps: Annotated[float, "added to the standard deviation"] = 1e-4
    loss_type: Annotated[Literal["grpo", "dr_grpo", "dapo", "cispo"], "how token losses are averaged (and clipped)"] = "dapo"
    importance_sampling_level: Annotated[Literal["token", "sequence"], "ratio of each token, or of the answer (GSPO)"] = "token"
    epsilon: Annotated[float, "clip range below 1 (0.1 to 0.3)"] = 0.2
    epsilon_high: Annotated[float, "clip range above 1 (0.2 to 0.4; cispo 4); none: epsilon"] = None
    num_iterations: Annotated[int, "passes over each batch of samples, mu in the paper (1 to 4)"] = 1
    num_minibatches: Annotated[int, "updates per pass (1 to 8)"] = 1
    beta: Annotated[float, "coefficient of the KL to the starting model (0 to 0.1)"] = 0.0
    use_bias_correction_kl: Annotated[bool, "KL: k3 times the ratio, see k3"] = False
    entropy_coef: Annotated[float, "coefficient of the entropy bonus (0 to 0.01)"] = 0.0
    mask_truncated_completions: Annotated[bool, "leave answers that ran out of tokens out of the loss"] = False
    num_prompts: Annotated[int, "size of the finite set of training problems (500 to 100000)"] = 4000

    def __post_init__(self):
        check(self, at_least_1="num_generations num_iterations num_minibatches num_prompts",
              at_least_0="epsilon beta advantage_eps", above_0="temperature")
        if self.epsilon_high is not None:
            check(self, at_least_0="epsilon_high")
        if self.std_correction not in (0, 1):
            raise InputError(f"--std_correction {self.std_correction}: 1 (sample) or 0 (population) is needed")
        if self.num_generations == 1 and (self.advantage in ("group", "rloo") or self.scale_rewards == "group"):
            raise InputError("--num_generations 1 leaves a group nothing to compare with: raise it, or use "
                             "--advantage reinforce (or remax) with --scale_rewards none (or batch)")
        if self.advantage in ("remax", "reinforce") and self.scale_rewards == "group":
            raise InputError(f"--advantage {self.advantage} needs --scale_rewards none or batch: "
                             "without the group's mean, a group of equal rewards has something to "
                             "teach and no deviation to be divided by")
        if self.advantage == "remax" and "majority" in self.reward.split(","):
            raise InputError("--advantage remax judges one greedy answer alone, which always is "
                             "its own --reward majority: use --advantage group or rloo")

    def check_rows(self, rows):
        """Raise InputError where a batch of so many answers has too few groups for its parts."""
        groups = rows // self.num_generations
        if self.num_minibatches > groups:
            raise InputError(f"--num_minibatches {self.num_minibatches}: the {groups} groups of a "
                             "batch (--batch_size) do not make so many parts")


# -- pure functions ---------------------------------------------------------------------------------------------------


def check_choice(name, value):
    """Raise ValueError for a string that is not among the choices of the flag of that name."""
    choices = get_args(get_args(GRPOConfig.__annotations__[name])[0])
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(choices)}")


def group_advantages(rewards, advantage="group", scale_rewards="group", std_correction=1, advantage_eps=1e-4,
                     greedy_rewards=None):
    """How much better each answer is than its group. rewards (P, G), greedy_rewards (P,) -> advantages (P, G)

    Worked example, rewards [1, 0, 0, 0]: mean 1/4; minus the mean [.75, -.25, -.25, -.25]; sample standard deviation
    .5; advantages [1.5, -.5, -.5, -.5]. RLOO compares with the other three: [1, -1/3, -1/3, -1/3], 4/3 of the above.

    For group and rloo, a group whose rewards are all equal teaches nothing and gets exactly 0. It is recognised by
    max = min: the mean of equal floats need not be that float, and a residue of 1e-9 over a deviation of 1e-9 would be a
    full-sized advantage. For the same reason nothing is divided where all rewards are equal.
    """
    check_choice("advantage", advantage)
    check_choice("scale_rewards", scale_rewards)
    G = rewards.shape[1]
    flat = (rewards.max(1).values == rewards.min(1).values)[:, None]      # (P, 1)
    if advantage == "group":
        centred = rewards - rewards.mean(1, keepdim=True)
    elif advantage == "rloo":   # R_i - mean of the others (2402.14740, eq. 8)
        centred = G / (G - 1) * (rewards - rewards.mean(1, keepdim=True))
    elif advantage == "remax":  # 2310.10505, eq. 4
        centred = rewards - greedy_rewards[:, None]
    else:                       # REINFORCE without a baseline
        centred = rewards
    if scale_rewards == "group":
        std = rewards.std(1, correction=std_correction, keepdim=True)                     # (P, 1)
        centred = torch.where(flat, centred, centred / (std + advantage_eps))
    elif scale_rewards == "batch" and rewards.max() > rewards.min():
        centred = centred / (rewards.std(correction=std_correction) + advantage_eps)
    return centred.masked_fill(flat, 0) if advantage in ("group", "rloo") else centred


def policy_loss(logprobs, old_logprobs, advantages, completion_mask, epsilon=0.2, epsilon_high=None,
                loss_type="grpo", importance_sampling_level="token"):
    """The loss of each token, before aggregation. logprobs, old_logprobs, mask (B, T); advantages (B,)

    Returns losses (B, T), ratios (B, T) and where the clip cut the gradient off, (B, T) bool.
    epsilon_high None: the same as epsilon.

    Worked example, epsilon .2: ratio 1.5 with advantage +1 gives -1.2 and no gradient: enough has been done. Ratio 1.5
    with advantage -1 gives +1.5 and a gradient: the clip never shields a mistake. (PPO, 1707.06347, eq. 7)
    """
    check_choice("loss_type", loss_type)
    check_choice("importance_sampling_level", importance_sampling_level)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = logprobs - old_logprobs                                                   # (B, T)
    if importance_sampling_level == "sequence":
        # GSPO (2507.18071, eq. 7): the geometric mean of the token ratios. The 1/|y| keeps it near 1 on long answers;
        # it also means that this is no exact importance weight, which would be the product.
        length = completion_mask.sum(-1, keepdim=True).clamp(min=1)                  # (B, 1)
        log_ratio = (log_ratio * completion_mask).sum(-1, keepdim=True) / length
        log_ratio = log_ratio.expand_as(logprobs)
    ratio = log_ratio.exp()                                                               # (B, T)
    A = advantages[:, None]                                                               # (B, 1)
    if loss_type == "cispo":
        # 2506.13585, eq. 4: the clipped ratio is only a weight, detached; every token keeps its gradient.
        losses = -ratio.clamp(max=1 + epsilon_high).detach() * A * logprobs
        return losses, ratio, (ratio > 1 + epsilon_high) & completion_mask.bool()
    losses = torch.maximum(-A * ratio, -A * ratio.clamp(1 - epsilon, 1 + epsilon_high))
    clipped = ((ratio > 1 + epsilon_high) & (A > 0)) | ((ratio < 1 - epsilon) & (A < 0))
    return losses, ratio, clipped & completion_mask.bool()


def k3(logprobs, ref_logprobs, old_logprobs=None):
    """Schulman's estimate of KL(pi || pi_ref) at each token: never negative, unbiased as a value. (B, T) -> (B, T)

    As a loss it is not what its name says. Differentiated through log pi on the policy's own samples, its expected
    gradient is that of the forward KL(pi_ref || pi), state by state: E_pi[grad k3] = E_pi[(1 - pi_ref/pi) grad log pi]
    = - sum_y pi_ref grad log pi. GRPO has used it since DeepSeekMath (2402.03300, eq. 4); near pi_ref the two agree.

    The fix, with old_logprobs: k3 times the token's ratio pi/pi_old, which is differentiated too
    (DeepSeek-V3.2, 2512.02556, eq. 7; TRL's default since 1.10 as use_bias_correction_kl). Given
    the tokens before, sampled by pi_old, E_old[ratio k3] = E_pi[k3] = KL(pi || pi_ref): value and
    gradient are the KL's, on-policy and off.
    """
    log_ratio = ref_logprobs - logprobs
    estimate = log_ratio.exp() - 1 - log_ratio
    return estimate if old_logprobs is None else (logprobs - old_logprobs).exp() * estimate


def token_weights(completion_mask, loss_type="grpo", max_completion_length=None):
    """The weight c_it of each token in the loss, (B, T), fixed for the whole batch before it is split.

    grpo         1 / (B |y_i|)   every answer counts the same, so a token of a long wrong answer is pushed less
    dapo, cispo  1 / sum |y_i|   every token of the batch counts the same (2503.14476, eq. 8)
    dr_grpo      1 / (B L)       a constant, L = max_completion_length: no length bias at all (2503.20783, section 3)

    A mask of bools gives float32, a mask of numbers weights of its own precision.
    """
    check_choice("loss_type", loss_type)
    mask = 1.0 * completion_mask
    if loss_type == "grpo":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)
    if loss_type == "dr_grpo":
        return mask / (len(mask) * max_completion_length)
    return mask / mask.sum().clamp(min=1)


# -- the class that the loop drives -----------------------------------------------------------------------------------


class GRPO:
    Config = GRPOConfig
    micro_batch_size = 0         # set by the loop: rows per forward pass, 0: all
    rows_together = 1            # each row's loss stands alone once its advantage is known
    defaults = dict(learning_rate=1e-3, max_steps=60, batch_size=32, lr_scheduler_type="constant", warmup_steps=5,
                    weight_decay=0.0, logging_steps=5, eval_steps=5, save_steps=20)
    legend = ("entropy: of the next token, over the rows trained on   ratio: largest pi/pi_old   flat: share of groups whose rewards\n"
              "are all equal, which teach nothing\n"
              "The loss is no measure of progress: at ratio 1 it is minus the mean advantage, 0 but for the weights of the tokens.")

    def __init__(self, config, model, ref_model, tokenizer, task):
        self.config, self.model, self.ref_model, self.tokenizer, self.task = config, model, ref_model, tokenizer, task
        self.networks, self.frozen = {"model": model}, {"ref_model": ref_model}    # trained; kept as they are
        self.rewards = data.Rewards(task, config.reward, config.reward_weights)
        if config.num_iterations * config.num_minibatches == 1:
            self.legend += "\nThe ratio is exactly 1 because each batch is used for one update (--num_iterations 2 makes it move)."

    @staticmethod
    def columns(config):
        """What a line of --data must have."""
        return [("prompt", "answer") if "verifier" in config.reward.split(",") else ("prompt",)]

    def examples(self, seed):
        """What the loop draws batches from: problems. Nobody shows how to solve them."""
        return data.problems(self.task, "train", self.config.num_prompts, seed)

    def collect(self, examples, generator, step=0):
        """Sample a group of answers to every prompt, reward them, and turn rewards into advantages."""
        config, G = self.config, self.config.num_generations
        batch, metrics = data.rollout(self.model, self.tokenizer, self.task, self.rewards, examples, G, config.temperature, generator)
        rewards, greedy_rewards = batch.pop("rewards").view(-1, G), None                  # (P, G)
        rewards = rewards.to(self.model.dtype)
        if config.advantage == "remax":
            greedy, more = data.rollout(self.model, self.tokenizer, self.task, self.rewards, examples, 1, temperature=0)
            greedy_rewards = greedy["rewards"]                                            # (P,)
            metrics["sampled_tokens"] = metrics["sampled_tokens"] + more["sampled_tokens"]
        advantages = group_advantages(rewards, config.advantage, config.scale_rewards, config.std_correction,
                                      config.advantage_eps, greedy_rewards)
        flat = rewards.max(1).values == rewards.min(1).values                             # (P,)
        metrics["frac_reward_zero_std"] = (flat.sum(), len(flat))
        if G > 1:
            metrics["reward_std"] = (rewards.std(1).sum(), len(rewards))
        truncated = batch.pop("truncated")
        if config.mask_truncated_completions:
            batch["completion_mask"] = batch["completion_mask"] & ~truncated[:, None]
        return {**batch, "advantages": advantages.flatten()}, metrics

    def minibatches(self, batch):
        """The updates to make on a batch: num_iterations passes over num_minibatches parts, whole
        groups together, as evenly as they go. A part is None where no row has a gradient."""
        config, G, parts = self.config, self.config.num_generations, []
        groups = torch.arange(len(batch["prompt_index"]), device=self.model.device).view(-1, G)
        config.check_rows(groups.numel())
        for rows in groups.tensor_split(config.num_minibatches):   # chunk may make fewer parts
            part = data.take_rows(batch, rows.flatten())
            mask = part["completion_mask"].to(self.model.dtype)
            part["weights"] = token_weights(mask, config.loss_type, self.task.max_new_tokens)
            if config.beta == 0 and config.entropy_coef == 0:
                # A row whose advantage is 0 has no gradient. It has been counted in the weights and is now left out,
                # which changes nothing but the time. (The logged entropy then covers the rows that are left.)
                keep = (part["advantages"] != 0) & part["completion_mask"].any(-1)
                part = data.take_rows(part, keep.nonzero().squeeze(-1)) if keep.any() else None
            parts.append(part)
        for part in filter(None, parts):
            if len(parts) * config.num_iterations > 1:
                # pi_old: scored once, before anything moves, by the very forward pass that training will use, so that
                # the first ratio is exactly 1. (The sampler's own log-probabilities differ in the last bits.)
                part["old_logprobs"] = self.rescore(self.model, part)
            if config.beta > 0:
                part["ref_logprobs"] = self.rescore(self.ref_model, part)
        return parts * config.num_iterations

    @torch.no_grad()
    def rescore(self, model, part):
        """Log-probabilities (B, T) of a part's tokens, in the same micro-batches in which it will be trained."""
        width = part["completion_ids"].shape[1]
        scored = [self.logprobs(model, micro)[0] for micro in data.split(part, self.micro_batch_size)]
        return torch.cat([F.pad(lp, (0, width - lp.shape[1])) for lp in scored])

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
        old_logprobs = batch.get("old_logprobs", logprobs.detach())   # a batch used once was sampled by this very policy
        losses, ratio, clipped = policy_loss(logprobs, old_logprobs, batch["advantages"], mask, config.epsilon,
                                             config.epsilon_high, config.loss_type, config.importance_sampling_level)
        with torch.set_grad_enabled(config.entropy_coef != 0):
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)                             # (B, T)
        losses = losses - config.entropy_coef * entropy
        n = mask.sum()
        metrics = {"entropy": ((entropy.detach() * mask).sum(), n), "clip_ratio": (clipped.sum(), n),
                   "max_ratio": (ratio.detach() * mask).max()}
        if config.beta > 0:
            correction = old_logprobs if config.use_bias_correction_kl else None
            kl = k3(logprobs, batch["ref_logprobs"], correction)                     # (B, T)
            losses = losses + config.beta * kl
            metrics["kl"] = ((kl.detach() * mask).sum(), n)
        return (losses * batch["weights"]).sum(), metrics
