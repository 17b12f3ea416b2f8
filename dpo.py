"""
DPO and its kin: preference optimisation. Raise the better of two answers relative to the worse.

    Who sampled the text?        a file, or the policy: long ago (offline), a while ago, or now
    What weight has each token?  +beta sigma(-beta m) if chosen, - if rejected: most in pairs that
                                 the policy ranks wrong; m is the margin h(chosen) - h(rejected)
    What anchors the policy?     the reference, inside the loss: beta is the strength of its KL

    L(theta) = - mean over pairs of log sigma( beta [h(chosen) - h(rejected)] )
    h(y)     = log pi(y|x) / pi_ref(y|x)                              2305.18290, eq. 7

beta h is the reward under which pi is the best policy at that distance from pi_ref, up to a
constant of the prompt (eq. 5). So the loss is that of a Bradley-Terry reward model, and
"rewards/chosen" below is beta h of the chosen answers; where a loss compares something else, that
(implicit_rewards).

"Why do the chosen rewards fall?" The loss asks for a margin and nothing else. Chosen and rejected
answers are much alike, so pushing one down pulls the other along, and both may lose to answers that
are in no pair. The margin still grows. --rpo_alpha 1 adds the chosen answer's nll against
it.

Who sampled is the flag --sync_steps: how many updates pass between two renewals of the sampler. 1
is online, inf is offline, and anything between is semi-online (2506.21495). Each setting meets the
same prompts, draws as many answers and makes as many updates.

Self-rewarding (2401.10020) in the small: --sync_steps 10 --sync_ref --reward confidence. The policy
as it samples also judges: an answer is worth the log-probability of its final part after the steps
that lead there. (The paper lets the model write a verdict; --reward majority asks whether its
answers agree.) No label is needed. It begins well: the policy is surest of an answer that it has
worked out, so more are worked out and right. Then it is hacked: being sure of the last number does
not take steps that are right, or that belong to the problem, and the accuracy falls to chance while
the policy believes itself. Watch `true` part from `reward`; with majority it falters and recovers.

    --loss_type   loss of a pair, h and m as above                      source
    sigmoid       - log sigma(beta m)                                   DPO 2305.18290, eq. 7
    robust        the same, corrected for flipped labels                2403.00409, eq. 12
    hinge         max(0, 1 - beta m)                                    2309.06657, eq. 11
    ipo           (m - 1 / (2 beta))^2                                  2310.12036, eq. 17
    kto           1 - sigma(+-(beta h - z0)) of each answer alone       2402.01306, eq. 7-8
    cpo           - log sigma(beta [log pi(c) - log pi(r)]) + nll(c)    2401.08417, eq. 5-6
    simpo         - log sigma(beta [mean log pi(c) - mean log pi(r)] - gamma)   2405.14734, eq. 6
    orpo          nll(c) - beta log sigma(log odds(c) - log odds(r))    2403.07691, eq. 6-7

cpo, simpo and orpo have no reference. kto needs no pairs.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
from harness.errors import InputError
from harness.flags import Sampling, check_choice, flag
from tasks import Rewards

REFERENCE_FREE = ("cpo", "simpo", "orpo")


@dataclass
class DPOConfig(Sampling):
    """dpo: raise the better of two answers relative to the worse"""
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "kto", "cpo", "simpo", "orpo"] = flag(
        "sigmoid", "the table above")
    beta: float = flag(0.1, "strength of the anchor (0.05 to 0.5; simpo 2; ipo 0.1 to 1)", above=0)
    label_smoothing: float = flag(0.0, "sigmoid, robust: share of labels thought to be flipped "
                                       "(0 to 0.3)", at_least=0, below=0.5)
    simpo_gamma: float = flag(0.5, "simpo: margin by which the chosen answer must win (0.5 to 1.5)",
                              at_least=0)
    ipo_average: bool = flag(False, "ipo: mean over an answer's tokens, not the sum (as TRL)")
    desirable_weight: float = flag(1.0, "kto: weight of good answers", at_least=0)
    undesirable_weight: float = flag(1.0, "kto: weight of bad answers", at_least=0)
    rpo_alpha: float = flag(0.0, "coefficient of the chosen answer's nll per token (iterative RPO, "
                                 "2404.19733: 1)", at_least=0)
    sync_steps: str = flag("1", "updates between renewals of the sampler: 1 online, inf offline")
    sync_ref: bool = flag(False, "the reference moves along with the sampler (iterative DPO)")
    pair_selection: Literal["random", "best_worst"] = flag(
        "random", "of a group: any right and any wrong answer, or the extremes")
    pair_sampling: Literal["policy", "rso"] = flag(
        "policy", "rso: pairs from the estimated optimal policy, by rejection")
    rso_beta: float = flag(0.5, "rso: its temperature; a small one accepts right answers alone, "
                                "and no pair is left", above=0)
    max_steps: int = 60
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 5
    logging_steps: int = 5
    eval_steps: int = 5
    save_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        whole = self.sync_steps.isdecimal() and int(self.sync_steps) >= 1
        if self.sync_steps != "inf" and not whole:
            raise InputError(f"--sync_steps {self.sync_steps}: a whole number of updates, or inf, "
                             "is needed")
        if self.num_generations < 2:
            raise InputError(f"--num_generations {self.num_generations}: a pair needs at least 2 "
                             "answers")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise InputError("--label_smoothing is for --loss_type sigmoid and robust")
        if self.rpo_alpha and self.loss_type in ("kto", "cpo", "orpo"):
            has = "none" if self.loss_type == "kto" else "the chosen answer's nll already"
            raise InputError(f"--rpo_alpha is for pairs; --loss_type {self.loss_type} has {has}")

    def columns(self):
        """What a line of --data must have: preferences, or what the reward needs."""
        pairs, single = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label")
        return [pairs, *([single] if self.loss_type == "kto" else []), *super().columns()]


# -- pure functions -------------------------------------------------------------------------------


def token_logprobs(logits, ids):
    """Log-probabilities of the tokens at hand (B, t), and of every token (B, t, V), from logits
    (B, t, V) and ids (B, t): a few columns of the batch (see model.completion_scores).

    Worked example: logits log [.5, .3, .2] and the token 1 give log .3 and log [.5, .3, .2].
    """
    all_logprobs = torch.log_softmax(logits, dim=-1)                            # (B, t, V)
    ids = ids.unsqueeze(-1)                                                     # (B, t, 1)
    return all_logprobs.gather(-1, ids).squeeze(-1), all_logprobs


def answer_logps(logprobs, completion_mask):
    """The log-probability of each answer: a sum over its tokens, <end> included. (B, T) twice ->
    (B,). Worked example: [-1, -2, -9], the third token padding, gives -3."""
    return (logprobs * completion_mask).sum(-1)


def preference_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
                    chosen_lengths, rejected_lengths, loss_type="sigmoid", beta=0.1,
                    label_smoothing=0.0, simpo_gamma=0.5, ipo_average=False):
    """The loss of each pair, from the summed log-probabilities of its answers. All (N,); lengths in
    tokens -> (N,). Raises ValueError for an unknown loss_type.

    Worked example, beta .1: log pi -4 and -9, log pi_ref -5 and -8, so h is +1 and -1 and the
    margin m = 2. sigmoid -log sigma(.2) = .598; hinge 1 - .2 = .8; ipo (2 - 5)^2 = 9. At pi =
    pi_ref m is 0 and sigmoid gives log 2 for every beta.
    """
    margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    if loss_type == "sigmoid":    # with label_smoothing the mean over both orders of a pair (cDPO)
        return -(1 - label_smoothing) * F.logsigmoid(beta * margin) \
            - label_smoothing * F.logsigmoid(-beta * margin)
    if loss_type == "robust":     # unbiased when a share label_smoothing of the pairs is flipped
        return (-(1 - label_smoothing) * F.logsigmoid(beta * margin)
                + label_smoothing * F.logsigmoid(-beta * margin)) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":
        return F.relu(1 - beta * margin)
    if loss_type == "ipo":        # on sums, as in the paper; TRL's variant on means over the tokens
        if ipo_average:
            margin = ((chosen_logps - ref_chosen_logps) / chosen_lengths
                      - (rejected_logps - ref_rejected_logps) / rejected_lengths)
        return (margin - 1 / (2 * beta)) ** 2
    chosen_mean, rejected_mean = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    if loss_type == "cpo":        # the reference is uniform, the nll is the anchor
        return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) - chosen_mean
    if loss_type == "simpo":
        return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - simpo_gamma)
    if loss_type == "orpo":       # odds = p / (1 - p) of the geometric mean p of an answer's tokens
        log_odds = (chosen_mean - log1mexp(chosen_mean)) \
            - (rejected_mean - log1mexp(rejected_mean))
        return -chosen_mean - beta * F.logsigmoid(log_odds)
    raise ValueError(f"loss_type {loss_type!r}: choose from sigmoid, robust, hinge, ipo, cpo, "
                     "simpo, orpo (kto is no loss of pairs)")


def implicit_rewards(logps, ref_logps, lengths, loss_type="sigmoid", beta=0.1, ipo_average=False):
    """The reward of each answer as the loss sees it: what it compares. All (B,); lengths in tokens.

    Worked example, beta .1: log pi -6, log pi_ref -8, 4 tokens. sigmoid .1 x 2 = .2; ipo_average
    .2 / 4 = .05; cpo .1 x -6 = -.6; simpo and orpo -.6 / 4 = -.15. (orpo compares log odds, which
    rise with the mean; to log beta times the mean is TRL's choice.)
    """
    check_choice(DPOConfig, "loss_type", loss_type)
    log_ratios = logps if loss_type in REFERENCE_FREE else logps - ref_logps
    averaged = loss_type in ("simpo", "orpo") or loss_type == "ipo" and ipo_average
    return beta * (log_ratios / lengths if averaged else log_ratios)


def log1mexp(x):
    """log(1 - exp(x)) for x < 0, without cancellation for x near 0. (N,) -> (N,)"""
    return torch.log(-torch.expm1(x.clamp(max=-1e-7)))


def kto_loss(logps, ref_logps, label, z0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """The loss of each answer alone: good ones rise above the average answer z0, bad ones
    fall below it. (2402.01306, eq. 7-8)

    logps, ref_logps (B,), label (B,) True for good, z0 a detached number, beta times the KL to the
    reference. -> losses (B,). Worked example: h = 0 and z0 = 0 gives 1 - sigma(0) = .5, good or
    bad.
    """
    reward = beta * (logps - ref_logps)
    good = desirable_weight * (1 - torch.sigmoid(reward - z0))
    bad = undesirable_weight * (1 - torch.sigmoid(z0 - reward))
    return torch.where(label.bool(), good, bad)


def rso_accept(rewards, uniforms, rso_beta):
    """Rejection sampling from the optimal policy pi exp(r / rso_beta) / Z, estimated from the
    group: an answer stays with probability exp((r - max of the group) / rso_beta). rewards,
    uniforms (P, G) -> (P, G) bool. (2309.06657, section 3.2)"""
    return uniforms < ((rewards - rewards.max(1, keepdim=True).values) / rso_beta).exp()


# -- the class that the loop drives ---------------------------------------------------------------


class DPO(nn.Module):
    Config = DPOConfig
    legend = ("The loss (of sigmoid) starts at log 2 = .693. chosen, rejected: beta log pi/pi_ref "
              "of the answers (cpo: beta log\npi; simpo, orpo: that per token); margin: their "
              "difference. Both may fall while it grows: --rpo_alpha 1 asks for more.")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.ref_model = copy.deepcopy(model).requires_grad_(False)
        if config.sync_ref:   # this one moves; ref_model stays the start, to measure the KL from
            self.moving_ref_model = copy.deepcopy(self.ref_model)
        self.rows_together = 1 if config.loss_type == "kto" else 2   # chosen, rejected, chosen, ...
        pairs, labels = task.holds("chosen", "rejected"), task.holds("completion", "label")
        self.single = config.loss_type == "kto" and labels and not pairs   # the order of columns()
        self.from_file = self.single or pairs
        if not self.from_file:
            self.sampler = copy.deepcopy(self.ref_model)
            self.rewards = Rewards(task, config.reward, config.reward_weights, self.confidence)
        self.optimizer = model.configure_optimizer(config)

    @property
    def anchor(self):
        """The reference of the loss."""
        return self.moving_ref_model if self.config.sync_ref else self.ref_model

    def examples(self):
        """What batches are drawn from: problems, or the file's preferences."""
        return self.task.problems("train", self.config.num_prompts, self.config.seed)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? Someone else (a file), or the policy as it was sync_steps ago."""
        config, device = self.config, self.model.device
        renew = step % float(config.sync_steps) == 0   # with inf at step 0 alone
        if renew and config.sync_ref:
            self.anchor.load_state_dict(self.model.state_dict())
        if self.single:
            batch = data.collate(examples, self.tokenizer, device)
            label = torch.tensor([bool(e["label"]) for e in examples], device=device)
            return {**batch, "label": label}                                    # (B,)
        if self.from_file:
            return data.collate_pairs(examples, self.tokenizer, log, device)
        if renew:
            self.sampler.load_state_dict(self.model.state_dict())
        batch = data.rollout(self.sampler, self, examples, generator, log)
        for name in ("uniforms", "accept_uniforms"):   # random numbers that pick among candidates
            uniforms = torch.rand(len(examples), config.num_generations, generator=generator,
                                  device=device)
            batch[name] = uniforms.flatten()                                    # (B,)
        return batch

    def confidence(self, prompts, completions, /, **columns):
        """--reward confidence, a reward function like any other: what log-probability the sampler
        gives to the final part of each answer and its <end>, after the prompt and all that leads
        there. A sum over tokens: the log-probability of one event. -> list of floats <= 0

        Worked example, chain: `7+5=2;2*3=6` earns log p(6) + log p(<end>) after `7+5*3=7+5=2;2*3=`,
        the bare `6` the same after `7+5*3=`.
        """
        # Broken UTF-8 was decoded to U+FFFD, which takes three bytes for one that was written.
        completions = [c.replace("\ufffd", "?") for c in completions]
        finals = [self.task.final_part(c) for c in completions]
        batch = data.collate([{"prompt": p + c[:len(c) - len(final)], "completion": final}
                              for p, c, final in zip(prompts, completions, finals)],
                             self.tokenizer, self.model.device)
        room = self.model.config.block_size - batch["completion_ids"].shape[1]
        for name in ("prompt_ids", "prompt_mask"):   # of what does not fit the start is not read
            batch[name] = batch[name][:, -max(room, 1):]
        return self.score(self.sampler, batch).tolist()

    def minibatches(self, batch, log):
        """What is each token worth? First: which answers make pairs. What concerns the whole batch
        is settled before it is split. One update a batch, none where there is no pair."""
        config = self.config
        if not self.from_file:
            batch = self.pairs(batch, log)
        n = len(batch["prompt_index"])
        if n == 0:
            return []
        like = dict(device=self.model.device, dtype=self.model.dtype)
        batch = {**batch, "weights": torch.full((n,), self.rows_together / n, **like)}
        batch["ref_logps"] = torch.zeros(n, **like)
        if config.loss_type not in REFERENCE_FREE:
            batch["ref_logps"] = self.score(self.anchor, batch)                 # (B,)
        if config.loss_type == "kto":
            batch["z0"] = self.kto_z0(batch).expand(n)                          # (B,)
        return [batch]

    def pairs(self, batch, log):
        """The sampled answers that make a pair, in rows chosen, rejected, chosen, rejected, ..."""
        config = self.config
        group = lambda name: batch[name].view(-1, config.num_generations)   # noqa: E731  (P, G)
        rewards, accepted = group("rewards"), None
        if config.pair_sampling == "rso":
            accepted = rso_accept(rewards, group("accept_uniforms"), config.rso_beta)
        rows = data.choose_pairs(rewards, group("uniforms"), config.pair_selection, accepted)
        log.share("skipped_pairs", len(rewards) - len(rows) / 2, len(rewards))
        batch = data.take_rows(batch, rows)
        batch["label"] = torch.arange(len(rows), device=rows.device) % 2 == 0   # (B,)
        return batch

    def kto_z0(self, batch):
        """beta KL(pi || pi_ref), estimated from answers to other prompts: each row gets the prompt
        of two rows before. An answer that does not fit after that prompt stays with its own."""
        own = batch["prompt_index"]                                             # (B,)
        other = own.roll(2 if len(own) > 2 else 1)
        lengths = batch["prompt_mask"].sum(-1)[other] + batch["completion_mask"].sum(-1)
        fits = lengths <= self.model.config.block_size
        mismatched = {**batch, "prompt_index": torch.where(fits, other, own)}
        kl = self.score(self.model, mismatched) - self.score(self.anchor, mismatched)
        return (self.config.beta * kl.mean()).clamp(min=0)

    def score(self, model, batch):
        """Log-probabilities (B,) of the answers without gradient, in the micro-batches that
        training will use."""
        return data.in_micro_batches(lambda micro: self.logps(model, micro), batch, self.config,
                                     self.rows_together)

    def logps(self, model, batch):
        """Log-probability of each answer (B,)."""
        def f(logits, ids):                                                     # a few columns
            return token_logprobs(logits, ids)[0]                               # (B, t)
        logprobs = model.completion_scores(f, *data.inputs(batch))              # (B, T)
        return answer_logps(logprobs, batch["completion_mask"])

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the pairs at hand."""
        config, label, ref_logps = self.config, batch["label"], batch["ref_logps"]   # (B,)
        logps, lengths = self.logps(self.model, batch), batch["completion_mask"].sum(-1)
        rewards = implicit_rewards(logps.detach(), ref_logps, lengths, config.loss_type,
                                   config.beta, config.ipo_average)             # (B,)
        for name, rows in (("chosen", label), ("rejected", ~label)):
            log.mean(f"rewards/{name}", rewards, rows)
            log.mean(f"logps/{name}", logps, rows)
        if config.loss_type == "kto":
            losses = kto_loss(logps, ref_logps, label, batch["z0"], config.beta,
                              config.desirable_weight, config.undesirable_weight)
            return (losses * batch["weights"]).sum()
        margins = rewards[0::2] - rewards[1::2]                                 # (B / 2,)
        log.mean("rewards/margins", margins)
        log.mean("rewards/accuracies", margins > 0)
        losses = preference_loss(
            logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2], lengths[0::2],
            lengths[1::2], config.loss_type, config.beta, config.label_smoothing,
            config.simpo_gamma, config.ipo_average)                             # (B / 2,)
        losses = losses - config.rpo_alpha * logps[0::2] / lengths[0::2]
        return (losses * batch["weights"][0::2]).sum()


if __name__ == "__main__":   # python dpo.py is python train.py --algo dpo
    import train
    train.start("dpo")
