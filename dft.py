"""
DFT: dynamic fine-tuning. Imitate demonstrations, each token weighted by the model's own belief.

    Who sampled the text?        demonstrations
    What weight has each token?  its own probability, detached: sg(pi(y_t | ..))
    What anchors the policy?     nothing; with asft a KL, with psft a clip to a recent policy

    L(theta) = - 1/N sum_i sum_t sg(w_it) log pi(y_it | x_i, y_i,<t)      w_it = pi(y_it | ..)

One line differs from SFT (2508.05629, eq. 9). Why this weight? SFT's gradient is a policy gradient
with the reward 1[y = y*] / pi(y|x) (2508.05629, eq. 5-6; survey 2603.13985, section 4.1): the less
likely a demonstration, the harder the push, without bound. The weight cancels the 1/pi. What is
left, - grad pi, is a policy gradient with the plain reward 1[y = y*] at every token.

When does DFT stall? A token that the model believes impossible has weight 0 and is never learned.
From random weights every p is about 1/V; a fact that pre-training never showed stays unlearned. The
loss, - p log p, is small all the same. So the plain nll is logged beside the loss, with the mean
weight and the share of tokens whose weight is nearly 0: a loss of .1 at a nll of 5 and a share of
.9 has not converged, it has given up. DFT sharpens what is there. To teach something new, use SFT.

    --loss_type    weight of a token with probability p              source
    dft            p                                                 2508.05629, eq. 9
    dft_sequence   pi(y|x), the product over the answer              the same, eq. 8
    power          p^alpha: the gradient of (1 - p^alpha) / alpha    2510.00526; 0: SFT, 1: DFT
    chord          p (1 - p): neither the known nor the hopeless     2508.11408, phi
    prift          pi_ref(y_t), of the start model: it stands still  2606.09396, its "prob"
    iw_sft         (pi / pi_ref)^iw_temperature, clipped             2507.12856
    psft           pi / pi_old, clipped as in PPO with advantage 1   2508.17784
    asft           dft, plus anchor_coef KL(pi_ref || pi)            2509.23753
    gem            pulled up only against what the model prefers     2408.16673

DFT's weight chases itself: what has become likelier weighs more, so that in the end one token takes
all. PriFT's is DFT's at the start and does not move. With fixed weights a loss is SFT on reweighted
data, and rests where pi is proportional to pi_ref x data, token by token: what both believe.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
from harness.flags import Demonstrations, flag


@dataclass
class DFTConfig(Demonstrations):
    """dft: imitate demonstrations, token by token as the model believes them"""
    loss_type: Literal["dft", "dft_sequence", "power", "chord", "prift", "iw_sft", "psft", "asft",
                       "gem"] = flag("dft", "how a token is weighted; the table above")
    alpha: float = flag(0.5, "power: 0 is SFT, 1 is DFT (0 to 3)", at_least=0)
    iw_temperature: float = flag(1.0, "iw_sft: exponent of the importance weight (0 to 1)",
                                 at_least=0)
    iw_max: float = flag(16.0, "iw_sft: largest importance weight", above=0)
    epsilon_high: float = flag(0.28, "psft: clip range above 1 (0.1 to 0.5)", at_least=0)
    sync_steps: int = flag(8, "psft: updates between renewals of pi_old (2 to 32)", at_least=1)
    anchor_coef: float = flag(0.05, "asft: coefficient of KL(pi_ref || pi) (0.01 to 0.5)",
                              at_least=0)
    gem_temperature: float = flag(0.7, "gem: temperature of the model's preference (0.5 to 1)",
                                  above=0)
    weight_decay: float = 0.01


# -- pure functions -------------------------------------------------------------------------------


def token_logprobs(logits, ids):
    """Log-probabilities of the tokens at hand (B, t), and of every token (B, t, V), from logits
    (B, t, V) and ids (B, t): a few columns of the batch (see model.completion_scores).

    Worked example: logits log [.5, .3, .2] and the token 1 give log .3 and log [.5, .3, .2].
    """
    all_logprobs = torch.log_softmax(logits, dim=-1)                            # (B, t, V)
    ids = ids.unsqueeze(-1)                                                     # (B, t, 1)
    return all_logprobs.gather(-1, ids).squeeze(-1), all_logprobs


def imitation_weights(logprobs, completion_mask, loss_type="dft", alpha=0.5, ref_logprobs=None,
                      iw_temperature=1.0, iw_max=16.0):
    """The weight of each token, detached. logprobs, mask, ref_logprobs (B, T) -> (B, T)

    Worked example, a token of probability .25: dft .25; power with alpha .5: .5; chord .1875. The
    loss of dft is then .25 x 1.386 = .347 where that of SFT is 1.386; the gradient on the token's
    logit is -.25 x .75 in place of -.75. Raises ValueError for a loss_type without such a weight.
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
    if loss_type == "prift":    # a belief that training does not change
        return ref_logprobs.exp()
    if loss_type == "iw_sft":   # answers that the policy has moved towards count more
        log_ratio = ((logprobs - ref_logprobs) * completion_mask).sum(-1, keepdim=True)
        return (iw_temperature * log_ratio).exp().clamp(max=iw_max).expand_as(p)
    raise ValueError(f"loss_type {loss_type!r}: choose from dft, dft_sequence, power, chord, "
                     "prift, iw_sft, asft (psft and gem have losses of their own)")


def psft_loss(logprobs, old_logprobs, epsilon_high=0.28):
    """PPO's clipped loss with advantage 1: a token gains until its probability is 1 + epsilon_high
    times what it was. (B, T), (B, T) -> losses (B, T)

    Worked example: ratio 1.1 gives -1.1 and a gradient; ratio 1.5 gives -1.28 and none; ratio .5
    gives -.5 and a gradient: the minimum never protects a token that has fallen, so PPO's lower
    clip would never act here. (2508.17784, eq. 6)
    """
    ratio = (logprobs - old_logprobs).exp()
    return -ratio.clamp(max=1 + epsilon_high)


def anchor_loss(all_logprobs, ref_all_logprobs):
    """KL(pi_ref || pi) at each position, over all tokens; its gradient on the logits is pi -
    pi_ref. (B, T, V) twice -> (B, T)"""
    return F.kl_div(all_logprobs, ref_all_logprobs, log_target=True, reduction="none").sum(-1)


def gem_loss(all_logprobs, logprobs, gem_temperature=0.7):
    """sum_v q(v) (log pi(v) - log pi(y)) with q = sg softmax(log pi / gem_temperature).
    (B, T, V), (B, T) -> (B, T)

    The gradient on the logits is q - onehot(y): SFT's, but pushing down what a sharper model
    believes, so that the tail is left alone and the entropy is kept. Its fixed point is
    data^gem_temperature, normalised. (2408.16673, linear form)
    """
    q = torch.softmax(all_logprobs.detach() / gem_temperature, dim=-1)
    return (q * all_logprobs).sum(-1) - logprobs


def loss_of_all(all_logprobs, logprobs, config, ref_logits=None):
    """What a loss makes of the whole distribution: asft's KL to that of the ref_logits, gem's loss,
    otherwise 0. (B, t, V), (B, t) -> (B, t)"""
    if config.loss_type == "asft":
        return anchor_loss(all_logprobs, torch.log_softmax(ref_logits, dim=-1))
    if config.loss_type == "gem":
        return gem_loss(all_logprobs, logprobs, config.gem_temperature)
    return torch.zeros_like(logprobs)


def token_weights(completion_mask):
    """1/N on each of the batch's N completion tokens, 0 elsewhere. (B, T) -> (B, T)"""
    mask = 1.0 * completion_mask   # a mask of numbers keeps its precision
    return mask / mask.sum().clamp(min=1)


# -- the class that the loop drives ---------------------------------------------------------------


class DFT(nn.Module):
    Config = DFTConfig
    rows_together = 1   # each row's loss stands alone
    legend = ("A small loss may be a small weight: look at the nll. weight: mean weight of a "
              "token;\nunweighted: share of tokens with a weight below .01.")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.ref_model = copy.deepcopy(model).requires_grad_(False)   # to measure the KL from
        if config.loss_type == "psft":
            self.old_model = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = model.configure_optimizer(config)

    def examples(self):
        """What batches are drawn from: demonstrations."""
        config = self.config
        return self.task.demonstrations(config.num_demonstrations, config.seed, config.style,
                                        config.wrong_share)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The demonstrator."""
        if self.config.loss_type == "psft" and step % self.config.sync_steps == 0:
            self.old_model.load_state_dict(self.model.state_dict())
        return data.collate(examples, self.tokenizer, self.model.device)

    def minibatches(self, batch, log):
        """What is each token worth? 1/N, fixed before the batch is split, times what the loss gives
        it. One update a batch."""
        weights = token_weights(batch["completion_mask"].to(self.model.dtype))
        batch = {**batch, "weights": weights}
        if self.config.loss_type == "psft":
            batch["old_logprobs"] = self.score(self.old_model, batch)
        if self.config.loss_type in ("iw_sft", "prift"):
            batch["ref_logprobs"] = self.score(self.ref_model, batch)
        return [batch]

    def score(self, model, batch):
        """Log-probabilities (B, T) without gradient, in the micro-batches that training will
        use."""
        return data.in_micro_batches(lambda b: self.logprobs(model, b)[0], batch, self.config)

    def logprobs(self, model, batch):
        """Log-probabilities, which tokens are likeliest, asft's KL or gem's loss; all (B, T)."""
        asft = self.config.loss_type == "asft"
        more = [self.ref_model.completion_hidden(*data.inputs(batch))] if asft else []   # (B, T, C)
        def f(logits, ids, *ref_hidden):                                        # a few columns
            logprobs, all_logprobs = token_logprobs(logits, ids)
            of_all = loss_of_all(all_logprobs, logprobs, self.config,
                                 *map(self.ref_model.head, ref_hidden))
            return logprobs, all_logprobs.argmax(-1) == ids, of_all             # (B, t) each
        return model.completion_scores(f, *data.inputs(batch), more=more)

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the rows at hand."""
        config = self.config
        mask = batch["completion_mask"]                                         # (B, T)
        logprobs, likeliest, of_all = self.logprobs(self.model, batch)
        if config.loss_type == "psft":
            losses = psft_loss(logprobs, batch["old_logprobs"], config.epsilon_high)
            weight = (-losses * (losses > -1 - config.epsilon_high)).detach()   # ratio; 0: clipped
        elif config.loss_type == "gem":
            losses, weight = of_all, torch.ones_like(logprobs)
        else:
            weight = imitation_weights(logprobs, mask, config.loss_type, config.alpha,
                                       batch.get("ref_logprobs"), config.iw_temperature,
                                       config.iw_max)
            losses = -weight * logprobs                                         # (B, T)
        if config.loss_type == "asft":
            losses = losses + config.anchor_coef * of_all
            log.mean("kl", of_all, mask)
        log.mean("nll", -logprobs, mask)
        log.mean("mean_weight", weight, mask)
        log.mean("frac_weight_near_zero", weight < 0.01, mask)
        log.mean("mean_token_accuracy", likeliest, mask)
        return (losses * batch["weights"]).sum()


if __name__ == "__main__":   # python dft.py is python train.py --algo dft
    import train
    train.start("dft")
