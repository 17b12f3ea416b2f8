"""
DFT: dynamic fine-tuning, imitation that listens to the model. One line differs from SFT: each token's loss is multiplied
by the probability that the model gives it. The rest of this file is what else that line can be.

    Who sampled the text?        demonstrations; with --source self the policy of a round ago, where it was right
    What weight has each token?  its own probability, detached: sg(pi(y_t | ..))
    What anchors the policy?     nothing; with asft a KL from the start model, with psft a clip to a recent policy

    L(theta) = - 1/N sum_i sum_t  sg(w_it) log pi(y_it | x, y_<t)              DFT (2508.05629), eq. 9: w = pi(y_t | ..)

Why that weight? SFT's gradient is a policy gradient whose reward is 1[y = y*] / pi(y|x) (2508.05629, eq. 5-6; survey
2603.13985, section 4.1): the less likely a demonstration, the harder the push, without bound. The weight cancels the
1/pi. What is left, - grad pi, is a policy gradient with the plain reward 1[y = y*] at every token.

When does DFT stall? The weight is the model's own belief: a token that it thinks impossible is never learnt. From random
weights every p is 1/V and every weight nearly 0; a habit that pre-training never showed (an EOS that never came, a fact
nobody knows) stays unlearnt while the loss, - p log p, is small from the start. So the plain nll is logged beside every
weighted loss, with the mean weight and the share of tokens whose weight is nearly 0: a loss of .1 at a nll of 5 and a
share of .9 has not converged, it has given up. DFT sharpens what is there; to teach something new, use SFT.

    --loss_type    weight of a token with probability p              source
    dft            p                                                 2508.05629, eq. 9
    dft_sequence   pi(y|x), the product over the answer              the same, eq. 8: the mode of whole sequences
    power          p^alpha, the gradient of (1 - p^alpha) / alpha    2510.00526; alpha 0 is SFT, 1 is DFT
    chord          p (1 - p): neither the known nor the hopeless     2508.11408, phi; there beside GRPO, here alone
    iw_sft         (pi / pi_ref)^iw_temperature, clipped             2507.12856: importance weights of the answer
    psft           pi / pi_old, clipped as in PPO with advantage 1   2508.17784; pi_old is renewed every sync_steps
    asft           dft, + anchor_coef KL(pi_ref || pi)               2509.23753: DFT drifts, the anchor holds it
    gem            pulled up only against what the model prefers     2408.16673: sum_v q(v) (log pi(v) - log pi(y))

The anchor of asft is KL(pi_ref || pi), as in its authors' code (github.com/zhuchichi56/ASFT). The
first version of their paper states the other direction, KL(pi || pi_ref) (eq. 6, "reverse KL");
the published version is reported to state that of the code.

On the policy's own verified answers (--source self) DFT is the paper's offline RL (section 4.3).
"""

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

import data
from model import check
from sft import round_of


@dataclass
class DFTConfig:
    loss_type: Annotated[Literal["dft", "dft_sequence", "power", "chord", "iw_sft", "psft", "asft", "gem"],
                         "how a token is weighed; the table above"] = "dft"
    alpha: Annotated[float, "power: 0 is SFT, 1 is DFT (0 to 3)"] = 0.5
    iw_temperature: Annotated[float, "iw_sft: exponent of the importance weight (0 to 1)"] = 1.0
    iw_max: Annotated[float, "iw_sft: largest importance weight"] = 16.0
    epsilon: Annotated[float, "psft: clip range below 1, which never acts where the advantage is 1"] = 0.2
    epsilon_high: Annotated[float, "psft: clip range above 1 (0.1 to 0.5)"] = 0.28
    sync_steps: Annotated[int, "psft: updates between renewals of pi_old (2 to 32)"] = 8
    anchor_coef: Annotated[float, "asft: coefficient of KL(pi_ref || pi) (0.01 to 0.5)"] = 0.05
    gem_temperature: Annotated[float, "gem: temperature of q, the model's preference (0.5 to 1)"] = 0.7
    source: Annotated[Literal["demos", "self"], "demonstrations, or the policy's own answers that were rewarded"] = "demos"
    num_demonstrations: Annotated[int, "size of the finite set of demonstrations (100 to 10000)"] = 400
    num_generations: Annotated[int, "self: answers per prompt (4 to 64)"] = 16
    num_prompts: Annotated[int, "self: size of the finite set of training problems (500 to 100000)"] = 4000
    temperature: Annotated[float, "self: of sampling (0.7 to 1.2)"] = 1.0
    reward: Annotated[str, "self: reward functions, comma-separated: verifier, model, majority, format, brevity"] = "verifier"
    reward_weights: Annotated[str, "self: their weights, comma-separated; empty: 1 each"] = ""
    rounds: Annotated[int, "self: how often the sampler becomes the current policy (1 to max_steps)"] = 1
    threshold: Annotated[float, "self: the reward that an answer must reach"] = 1.0

    def __post_init__(self):
        check(self, at_least_1="sync_steps num_demonstrations num_generations num_prompts rounds",
              at_least_0="alpha epsilon epsilon_high anchor_coef iw_temperature", above_0="temperature gem_temperature iw_max")


# -- pure functions ---------------------------------------------------------------------------------------------------


def imitation_weights(logprobs, completion_mask, loss_type="dft", alpha=0.5, ref_logprobs=None, iw_temperature=1.0, iw_max=16.0):
    """The weight of each token, detached. logprobs, mask, ref_logprobs (B, T) -> (B, T)

    Worked example, a token of probability .25: dft .25; power with alpha .5: .5; chord .1875. The loss of dft is then
    .25 x 1.386 = .347 where that of SFT is 1.386; the gradient on the token's logit is -.25 x .75 in place of -.75.
    """
    logprobs = logprobs.detach()
    p = logprobs.exp()
    if loss_type in ("dft", "asft"):
        return p
    if loss_type == "dft_sequence":
        return (logprobs * completion_mask).sum(-1, keepdim=True).exp().expand_as(p)
    if loss_type == "power":
        return (alpha * logprobs).exp()
    if loss_type == "chord":
        return p * (1 - p)
    if loss_type == "iw_sft":   # what the policy has moved towards since it was pi_ref counts more
        log_ratio = ((logprobs - ref_logprobs) * completion_mask).sum(-1, keepdim=True)
        return (iw_temperature * log_ratio).exp().clamp(max=iw_max).expand_as(p)
    raise ValueError(f"loss_type {loss_type!r} is none of dft, dft_sequence, power, chord, iw_sft, "
                     "asft (psft and gem have losses of their own)")


def psft_loss(logprobs, old_logprobs, epsilon=0.2, epsilon_high=0.28):
    """PPO's clipped loss with advantage 1: a token gains until its probability is 1 + epsilon_high times what it was.

    (B, T), (B, T) -> losses (B, T). Worked example: ratio 1.1 gives -1.1 and a gradient, ratio 1.5 gives -1.28 and none;
    ratio .5 gives -.5 and a gradient: the minimum never protects a token that has fallen. (2508.17784, eq. 6)
    """
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - epsilon, 1 + epsilon_high))


def anchor_loss(all_logprobs, ref_all_logprobs):
    """KL(pi_ref || pi) at each position, over all tokens; gradient on the logits: pi - pi_ref.

    (B, T, V) twice -> (B, T). Worked example: pi_ref = [.5, .5] and pi = [.25, .75] give
    .5 log 4/3 = .144; the other direction, see the top of this file, gives .131.
    """
    return F.kl_div(all_logprobs, ref_all_logprobs, log_target=True, reduction="none").sum(-1)


def gem_loss(logits, logprobs, gem_temperature=0.7):
    """sum_v q(v) (log pi(v) - log pi(y)) with q = sg softmax(logits / gem_temperature). (B, T, V), (B, T) -> (B, T)

    The gradient on the logits is q - onehot(y): SFT's, but pushing down what a sharper model believes, so that the tail
    is left alone and the entropy kept. Its fixed point is data^gem_temperature, normalised. (2408.16673, linear form)
    """
    q = torch.softmax(logits.detach() / gem_temperature, dim=-1)
    return (q * torch.log_softmax(logits, dim=-1)).sum(-1) - logprobs


def token_weights(completion_mask):
    """1/N on each of the N completion tokens of the batch, 0 elsewhere. completion_mask (B, T) -> weights (B, T)"""
    mask = completion_mask * 1.0   # a bool becomes float32, float64 stays what it is
    return mask / mask.sum().clamp(min=1)


# -- the class that the loop drives -----------------------------------------------------------------------------------


class DFT:
    Config = DFTConfig
    micro_batch_size = 0         # set by the loop, as is max_steps; rows per forward pass, 0: all
    rows_together = 1            # each row's loss stands alone
    defaults = dict(learning_rate=1e-3, max_steps=100, batch_size=32, lr_scheduler_type="linear", warmup_steps=10,
                    weight_decay=0.01, logging_steps=10, eval_steps=10, save_steps=50)
    legend = ("A small loss may be a small weight: look at the nll. weight: mean weight of a token; "
              "unweighed: share of tokens with a weight below .01.")

    def __init__(self, config, model, ref_model, tokenizer, task):
        self.config, self.model, self.ref_model, self.tokenizer, self.task = config, model, ref_model, tokenizer, task
        self.networks, self.frozen = {"model": model}, {"ref_model": ref_model}    # trained; kept as they are
        if config.source == "self":
            self.rewards = data.Rewards(task, config.reward, config.reward_weights)
            self.sampler = self.frozen["sampler"] = copy.deepcopy(model).requires_grad_(False)
        if config.loss_type == "psft":
            self.old_model = self.frozen["old_model"] = copy.deepcopy(model).requires_grad_(False)

    @staticmethod
    def columns(config):
        """What a line of --data must have."""
        if config.source == "demos":
            return [("prompt", "completion"), ("text",)]
        return [("prompt", "answer") if "verifier" in config.reward.split(",") else ("prompt",)]

    def examples(self, seed):
        """What the loop draws batches from: demonstrations, or problems."""
        if self.config.source == "self":
            return data.problems(self.task, "train", self.config.num_prompts, seed)
        return data.demonstrations(self.task, self.config.num_demonstrations, seed)

    def collect(self, examples, generator, step=0):
        """A batch to train on, and what is worth logging about it."""
        config = self.config
        if config.loss_type == "psft" and step % config.sync_steps == 0:
            self.old_model.load_state_dict(self.model.state_dict())
        if config.source == "demos":
            return data.collate(examples, self.tokenizer, self.model.device), {}
        _, first_step, _ = round_of(step, config.rounds, self.max_steps)
        if step == first_step:   # of the round
            self.sampler.load_state_dict(self.model.state_dict())
        batch, metrics = data.rollout(self.sampler, self.tokenizer, self.task, self.rewards, examples,
                                      config.num_generations, config.temperature, generator)
        keep = batch["rewards"] >= config.threshold - 1e-6                                     # (B,)
        metrics["kept"] = (keep.sum(), len(keep))
        return data.take_rows(batch, keep.nonzero().squeeze(-1)) if keep.any() else None, metrics

    def minibatches(self, batch):
        """The updates to make on a batch: just one. Its weights 1/N are fixed here, before it is split to fit memory."""
        if batch is None:
            return [None]
        batch = {**batch, "weights": token_weights(batch["completion_mask"].to(self.model.dtype))}
        if self.config.loss_type == "psft":
            batch["old_logprobs"] = self.rescore(self.old_model, batch)
        if self.config.loss_type == "iw_sft":
            batch["ref_logprobs"] = self.rescore(self.ref_model, batch)
        return [batch]

    @torch.no_grad()
    def rescore(self, model, batch):
        """Another model's log-probabilities (B, T) of the batch's tokens, in the micro-batches in which it is trained."""
        width = batch["completion_ids"].shape[1]
        scored = [self.logprobs(model, micro)[0] for micro in data.split(batch, self.micro_batch_size)]
        return torch.cat([F.pad(lp, (0, width - lp.shape[1])) for lp in scored])

    def logprobs(self, model, batch):
        """Log-probabilities of the tokens (B, T), those of every token (B, T, V), and the logits (B, T, V)."""
        logits = model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"],
                                         batch["completion_mask"], batch["prompt_index"])      # (B, T, V)
        all_logprobs = torch.log_softmax(logits, dim=-1)                                       # (B, T, V)
        logprobs = all_logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)  # (B, T)
        return logprobs, all_logprobs, logits

    def loss(self, batch):
        """The summed loss of the batch's rows, and {name: (sum, count)} for the log."""
        config, mask = self.config, batch["completion_mask"]                                   # (B, T)
        logprobs, all_logprobs, logits = self.logprobs(self.model, batch)
        weight = torch.ones_like(logprobs)
        if config.loss_type == "psft":
            losses = psft_loss(logprobs, batch["old_logprobs"], config.epsilon, config.epsilon_high)
            weight = (-losses * (losses > -1 - config.epsilon_high)).detach()                  # the ratio, 0 where clipped
        elif config.loss_type == "gem":
            losses = gem_loss(logits, logprobs, config.gem_temperature)
        else:
            weight = imitation_weights(logprobs, mask, config.loss_type, config.alpha, batch.get("ref_logprobs"),
                                       config.iw_temperature, config.iw_max)
            losses = -weight * logprobs
        n = mask.sum()
        metrics = {"nll": (-(logprobs.detach() * mask).sum(), n), "mean_weight": ((weight * mask).sum(), n),
                   "frac_weight_near_zero": (((weight < 0.01) & mask).sum(), n)}
        if config.loss_type == "asft":
            with torch.no_grad():
                _, ref_all_logprobs, _ = self.logprobs(self.ref_model, batch)
            kl = anchor_loss(all_logprobs, ref_all_logprobs)
            losses = losses + config.anchor_coef * kl
            metrics["kl"] = ((kl.detach() * mask).sum(), n)
        right = (logits.argmax(-1) == batch["completion_ids"]) & mask
        metrics["mean_token_accuracy"] = (right.sum(), n)
        return (losses * batch["weights"]).sum(), metrics
