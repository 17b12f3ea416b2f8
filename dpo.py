"""
DPO and its kin: preference optimisation. Of two answers to a prompt, the better shall gain on the worse.

    Who sampled the text?        a file of preferences; or the policy itself: long ago (offline), a moment ago (online)
    What weight has each token?  +beta sigma(-margin) in the chosen answer, - the same in the rejected one
    What anchors the policy?     the KL to the reference, built into the loss; its strength is beta

    L(theta) = - mean over pairs of log sigma( beta [h(chosen) - h(rejected)] ),    h(y) = log pi(y|x) / pi_ref(y|x)
                                                                                    DPO (2305.18290), eq. 7
beta h is the reward under which pi is the best policy at that distance from pi_ref (up to a constant of the prompt, eq. 5):
so the loss is that of a Bradley-Terry reward model, and "rewards/chosen" below means beta h of the
chosen answers; where a loss compares something else, that (see implicit_rewards).

"Why do the chosen rewards fall?" The loss asks for a margin, nothing else. Chosen and rejected answers are much alike, so
pushing the one down pulls the other along, and both may lose to answers that are in no pair. The margin grows all the
same. Watch rewards/margins and the held-out accuracy; --rpo_alpha 1 adds the chosen answer's own likelihood. Offline
it happens most; online the answers in the pairs are those that the policy gives, so it cannot go on unseen.

Who sampled, exactly: --sync_steps s renews the sampler every s updates. 1 is online, inf offline, between them lies
semi-online (2506.21495). Each setting meets the same prompts, draws as many answers and uses each pair once: s alone differs.

    --loss_type   loss of a pair, m = h(chosen) - h(rejected)                         source
    sigmoid       - log sigma(beta m); --label_smoothing e: cDPO                      2305.18290, eq. 7; ericmitchell.ai/cdpo.pdf
    robust        the same, corrected so that flipped labels cancel on average        2403.00409, eq. 12
    hinge         max(0, 1 - beta m)                                                  SLiC 2305.10425, RSO 2309.06657, eq. 11
    ipo           (m - 1 / (2 beta))^2                                                2310.12036, eq. 17
    kto           1 - sigma(+-(beta h - z0)) of each answer by itself                 2402.01306, eq. 7-8; needs no pairs
    cpo           - log sigma(beta [log pi(chosen) - log pi(rejected)]) + nll(chosen) 2401.08417, eq. 5-6; here nll per token
    simpo         - log sigma(beta [mean log pi(chosen) - mean log pi(rejected)] - gamma)      2405.14734, eq. 6
    orpo          nll(chosen) - beta log sigma(log odds(chosen) - log odds(rejected))          2403.07691, eq. 6-7
    (cpo, simpo and orpo have no reference)
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

import data
from model import InputError, check

REFERENCE_FREE = ("cpo", "simpo", "orpo")


@dataclass
class DPOConfig:
    loss_type: Annotated[Literal["sigmoid", "robust", "hinge", "ipo", "kto", "cpo", "simpo", "orpo"], "the table above"] = "sigmoid"
    beta: Annotated[float, "strength of the anchor (0.05 to 0.5; simpo 2; ipo 0.1 to 1)"] = 0.1
    label_smoothing: Annotated[float, "sigmoid, robust: share of labels thought to be flipped (0 to 0.3)"] = 0.0
    simpo_gamma: Annotated[float, "simpo: margin that the chosen answer must win by (0.5 to 1.5)"] = 0.5
    ipo_average: Annotated[bool, "ipo: mean over the tokens of an answer in place of the sum, as TRL does"] = False
    desirable_weight: Annotated[float, "kto: weight of good answers"] = 1.0
    undesirable_weight: Annotated[float, "kto: weight of bad answers"] = 1.0
    rpo_alpha: Annotated[float, "coefficient of the chosen answer's nll per token (iterative RPO, 2404.19733: 1)"] = 0.0
    sync_steps: Annotated[str, "updates between renewals of the sampler: 1 online, inf offline"] = "1"
    sync_ref: Annotated[bool, "the reference moves along with the sampler (iterative DPO)"] = False
    pair_selection: Annotated[Literal["random", "best_worst"], "of a group: any right one and any wrong one, or the extremes"] = "random"
    pair_sampling: Annotated[Literal["policy", "rso"], "rso: pairs from the estimated optimal policy, by rejection"] = "policy"
    rso_beta: Annotated[float, "rso: its temperature; small values accept right answers alone, and no pair is left"] = 0.5
    num_generations: Annotated[int, "answers per prompt to draw the pair from (2 to 64)"] = 16
    num_prompts: Annotated[int, "size of the finite set of training problems (500 to 100000)"] = 4000
    temperature: Annotated[float, "of sampling (0.7 to 1.2)"] = 1.0
    reward: Annotated[str, "reward functions, comma-separated: verifier, model, majority, format, brevity"] = "verifier"
    reward_weights: Annotated[str, "their weights, comma-separated; empty: 1 each"] = ""

    def __post_init__(self):
        if self.sync_steps != "inf" and (not self.sync_steps.isdecimal() or int(self.sync_steps) < 1):
            raise InputError(f"--sync_steps {self.sync_steps}: a whole number of updates, or inf, is needed")
        self.sync_steps = math.inf if self.sync_steps == "inf" else int(self.sync_steps)
        check(self, at_least_1="num_generations num_prompts", at_least_0="simpo_gamma desirable_weight undesirable_weight rpo_alpha",
              above_0="beta temperature rso_beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"--label_smoothing {self.label_smoothing}: from 0 to below .5, where labels say nothing any more")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise InputError("--label_smoothing is for --loss_type sigmoid and robust")
        if self.rpo_alpha and self.loss_type in ("kto", "cpo", "orpo"):
            raise InputError(f"--rpo_alpha is for pairs; --loss_type {self.loss_type} has "
                             + ("none" if self.loss_type == "kto" else "the chosen answer's nll already"))


# -- pure functions ---------------------------------------------------------------------------------------------------


def preference_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths,
                    loss_type="sigmoid", beta=0.1, label_smoothing=0.0, simpo_gamma=0.5, ipo_average=False):
    """The loss of each pair, from the summed log-probabilities of its answers. All (N,); lengths in tokens -> (N,)

    Worked example, beta .1: log pi -4 and -9, log pi_ref -5 and -8, so h is +1 and -1 and the margin m = 2. sigmoid
    -log sigma(.2) = .598; hinge 1 - .2 = .8; ipo (2 - 5)^2 = 9. At pi = pi_ref m is 0 and sigmoid log 2, whatever beta.
    """
    margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    if loss_type == "sigmoid":    # 2305.18290, eq. 7; with label_smoothing the mean over both orders of the pair (cDPO)
        return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)
    if loss_type == "robust":     # 2403.00409, eq. 12: unbiased when a share label_smoothing of the pairs is flipped
        return (-(1 - label_smoothing) * F.logsigmoid(beta * margin)
                + label_smoothing * F.logsigmoid(-beta * margin)) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":      # 2309.06657, eq. 11
        return F.relu(1 - beta * margin)
    if loss_type == "ipo":        # 2310.12036, eq. 17, on sums; TRL's variant on means over the tokens
        if ipo_average:
            margin = ((chosen_logps - ref_chosen_logps) / chosen_lengths
                      - (rejected_logps - ref_rejected_logps) / rejected_lengths)
        return (margin - 1 / (2 * beta)) ** 2
    chosen_mean, rejected_mean = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    if loss_type == "cpo":        # 2401.08417, eq. 5-6: the reference is uniform, the nll is the anchor
        return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) - chosen_mean
    if loss_type == "simpo":      # 2405.14734, eq. 6
        return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - simpo_gamma)
    if loss_type == "orpo":       # 2403.07691, eq. 6-7: odds = p / (1 - p) of the geometric mean p of an answer's tokens
        log_odds = (chosen_mean - log1mexp(chosen_mean)) - (rejected_mean - log1mexp(rejected_mean))
        return -chosen_mean - beta * F.logsigmoid(log_odds)
    raise ValueError(f"loss_type {loss_type!r} is none of "
                     "sigmoid, robust, hinge, ipo, cpo, simpo, orpo")


def implicit_rewards(logps, ref_logps, lengths, loss_type="sigmoid", beta=0.1, ipo_average=False):
    """The reward of each answer as the loss sees it: what it compares. All (B,); lengths in tokens.

    Worked example, beta .1: log pi -6, log pi_ref -8, 4 tokens. sigmoid .1 x 2 = .2; ipo_average
    .2 / 4 = .05; cpo .1 x -6 = -.6; simpo and orpo -.6 / 4 = -.15. (orpo compares log odds, which
    rise with the mean; to log beta times the mean is TRL's choice.)
    """
    if loss_type in ("sigmoid", "robust", "hinge", "ipo", "kto"):
        rewards = beta * (logps - ref_logps)
        return rewards / lengths if loss_type == "ipo" and ipo_average else rewards
    if loss_type == "cpo":
        return beta * logps
    if loss_type in ("simpo", "orpo"):
        return beta * logps / lengths
    raise ValueError(f"loss_type {loss_type!r} is none of "
                     "sigmoid, robust, hinge, ipo, kto, cpo, simpo, orpo")


def log1mexp(x):
    """log(1 - exp(x)) for x < 0, without cancellation for x near 0. (N,) -> (N,)"""
    return torch.log(-torch.expm1(x.clamp(max=-1e-7)))


def kto_loss(logps, ref_logps, label, z0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """The loss of each answer by itself: good ones shall rise above the average answer z0, bad ones fall below.

    logps, ref_logps (B,), label (B,) True for good, z0 a detached number, beta times the KL to the reference.
    -> losses (B,). Worked example: h = 0 and z0 = 0 gives 1 - sigma(0) = .5, good or bad. (2402.01306, eq. 7-8)
    """
    reward = beta * (logps - ref_logps)
    good = desirable_weight * (1 - torch.sigmoid(reward - z0))
    bad = undesirable_weight * (1 - torch.sigmoid(z0 - reward))
    return torch.where(label.bool(), good, bad)


def rso_accept(rewards, uniforms, rso_beta):
    """Rejection sampling from the optimal policy pi exp(r / rso_beta) / Z, estimated from the group: an answer stays with
    probability exp((r - max of the group) / rso_beta). rewards, uniforms (P, G) -> (P, G) bool. (2309.06657, section 3.2)"""
    return uniforms < ((rewards - rewards.max(1, keepdim=True).values) / rso_beta).exp()


# -- the class that the loop drives -----------------------------------------------------------------------------------


class DPO:
    Config = DPOConfig
    micro_batch_size = 0         # set by the loop: rows per forward pass, 0: all
    defaults = dict(learning_rate=1e-3, max_steps=60, batch_size=32, lr_scheduler_type="constant", warmup_steps=5,
                    weight_decay=0.0, logging_steps=5, eval_steps=5, save_steps=20)
    legend = ("The loss (of sigmoid) starts at log 2 = .693. chosen, rejected: beta log pi/pi_ref\n"
              "of the answers (cpo: beta log pi; simpo, orpo: that per token); margin: their\n"
              "difference. Both may fall while it grows: --rpo_alpha 1 asks for more than that.")

    def __init__(self, config, model, ref_model, tokenizer, task):
        self.config, self.model, self.ref_model, self.tokenizer, self.task = config, model, ref_model, tokenizer, task
        self.rows_together = 1 if config.loss_type == "kto" else 2    # chosen and rejected follow each other
        self.networks, self.frozen = {"model": model}, {"ref_model": ref_model}    # trained; kept as they are
        needed = next((c for c in self.columns(config) if isinstance(task, data.JsonLines) and set(c) <= set(task.train[0])), ())
        self.single, self.from_file = "label" in needed, bool({"label", "chosen"} & set(needed))    # what the file holds
        if not self.from_file:
            if config.num_generations < 2:
                raise InputError(f"--num_generations {config.num_generations}: a pair needs at least 2 answers")
            self.rewards = data.Rewards(task, config.reward, config.reward_weights)
            self.sampler = self.frozen["sampler"] = copy.deepcopy(model).requires_grad_(False)
        if config.sync_ref:   # the base stays under its own name, to be measured against
            self.ref_model = self.frozen["moving_ref_model"] = copy.deepcopy(ref_model)

    @staticmethod
    def columns(config):
        """What a line of --data must have: preferences, or for answers of the policy's own what the reward needs."""
        pairs, single, judged = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label"), ("prompt",)
        judged += ("answer",) if "verifier" in config.reward.split(",") else ()
        return [pairs, single, judged] if config.loss_type == "kto" else [pairs, judged]

    def examples(self, seed):
        """What the loop draws batches from: problems, or the file's preferences."""
        return data.problems(self.task, "train", self.config.num_prompts, seed)

    def collect(self, examples, generator, step=0):
        """Pairs to train on, in rows chosen, rejected, chosen, rejected, ...; for kto single answers with a label."""
        config, device = self.config, self.model.device
        renew = step % config.sync_steps == 0   # with inf at step 0 alone
        if renew and config.sync_ref:
            self.ref_model.load_state_dict(self.model.state_dict())
        if self.single:
            batch = data.collate(examples, self.tokenizer, device)
            return {**batch, "label": torch.tensor([bool(e["label"]) for e in examples], device=device)}, {}
        if self.from_file:
            batch, metrics = data.preference_pairs(examples, self.tokenizer, device)
        else:
            if renew:
                self.sampler.load_state_dict(self.model.state_dict())
            batch, metrics = data.rollout(self.sampler, self.tokenizer, self.task, self.rewards, examples,
                                          config.num_generations, config.temperature, generator)
            rewards = batch["rewards"].view(len(examples), -1)                                 # (P, G)
            uniforms, again = (torch.rand(rewards.shape, generator=generator, device=device) for _ in range(2))
            accepted = rso_accept(rewards, again, config.rso_beta) if config.pair_sampling == "rso" else None
            rows, skipped = data.choose_pairs(rewards, uniforms, config.pair_selection, accepted)
            metrics["skipped_pairs"] = (skipped, len(examples))
            batch = data.take_rows(batch, rows) if len(rows) else None
        if batch is not None:
            batch["label"] = torch.arange(len(batch["completion_ids"]), device=device) % 2 == 0
        return batch, metrics

    def minibatches(self, batch):
        """The updates to make on a batch: just one. What concerns the whole batch is settled before it is split."""
        if batch is None:
            return [None]
        config, n = self.config, len(batch["completion_ids"])
        zeros = torch.zeros(n, device=self.model.device, dtype=self.model.dtype)
        weights = zeros + self.rows_together / n   # a mean over pairs
        batch = {**batch, "weights": weights, "ref_logps": zeros}
        if config.loss_type not in REFERENCE_FREE:
            batch["ref_logps"] = self.rescore(self.ref_model, batch)                           # (B,)
        if config.loss_type == "kto":
            # z0 estimates beta KL(pi || pi_ref) from answers to other prompts: each row gets the prompt of two rows before.
            # An answer that does not fit after that prompt stays with its own.
            own, other = batch["prompt_index"], batch["prompt_index"].roll(2 if n > 2 else 1)
            fits = batch["prompt_mask"].sum(-1)[other] + batch["completion_mask"].sum(-1) <= self.model.config.block_size
            mismatched = {**batch, "prompt_index": torch.where(fits, other, own)}
            kl = self.rescore(self.model, mismatched) - self.rescore(self.ref_model, mismatched)
            batch["z0"] = (config.beta * kl.mean()).clamp(min=0).expand(n)
        return [batch]

    @torch.no_grad()
    def rescore(self, model, batch):
        """A model's log-probabilities (B,) of the batch's answers, in the micro-batches in which it is trained."""
        return torch.cat([self.logps(model, micro)[0] for micro in data.split(batch, self.micro_batch_size, self.rows_together)])

    def logps(self, model, batch):
        """Log-probability of each answer (B,), a sum over its tokens, <end> included; and its length in tokens (B,)."""
        mask = batch["completion_mask"]                                                        # (B, T)
        logits = model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], mask,
                                         batch["prompt_index"])                                # (B, T, V)
        all_logprobs = torch.log_softmax(logits, dim=-1)                                       # (B, T, V)
        logprobs = all_logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)  # (B, T)
        return (logprobs * mask).sum(-1), mask.sum(-1)

    def loss(self, batch):
        """The summed loss of the batch's pairs, and {name: (sum, count)} for the log."""
        config, label = self.config, batch["label"]                                            # (B,)
        logps, lengths = self.logps(self.model, batch)                                         # (B,)
        rewards = implicit_rewards(logps.detach(), batch["ref_logps"], lengths, config.loss_type,
                                   config.beta, config.ipo_average)                      # (B,)
        if config.loss_type == "kto":
            losses = kto_loss(logps, batch["ref_logps"], label, batch["z0"], config.beta,
                              config.desirable_weight, config.undesirable_weight)
            loss = (losses * batch["weights"]).sum()
        else:
            pair = lambda x: (x[0::2], x[1::2])   # noqa: E731  (chosen, rejected)
            losses = preference_loss(*pair(logps), *pair(batch["ref_logps"]), *pair(lengths), config.loss_type, config.beta,
                                     config.label_smoothing, config.simpo_gamma, config.ipo_average)      # (B / 2,)
            losses = losses - config.rpo_alpha * logps[0::2] / lengths[0::2]
            loss = (losses * batch["weights"][0::2]).sum()
        metrics = {}
        for name, rows in (("chosen", label), ("rejected", ~label)):
            metrics[f"rewards/{name}"] = ((rewards * rows).sum(), rows.sum())
            metrics[f"logps/{name}"] = ((logps.detach() * rows).sum(), rows.sum())
        if self.rows_together == 2:
            margins = rewards[0::2] - rewards[1::2]
            metrics["rewards/margins"] = (margins.sum(), len(margins))
            metrics["rewards/accuracies"] = ((margins > 0).sum(), len(margins))
        return loss, metrics
