"""
Hybrids: demonstrations and the policy's own answers in one loss. SFT and RL at the same time.

    Who sampled the text?        both: demonstrators and the policy, also within one answer (hints)
    What weight has each token?  own tokens their answer's advantage, a demonstrator's --imitation
    What anchors the policy?     the clip, for own tokens; the demonstrations

    L(theta) = - (1 - mu) / N_own  sum_own  min( r_it A_i, clip(r_it, 1 -+ epsilon) A_i )
               -      mu  / N_demo sum_demo w_it log pi(y_it | ..)

RL learns from what the policy samples: a habit that it never samples is never rewarded. SFT learns
from what it is shown: a few texts are memorised. A hybrid wants both (survey 2603.13985, sections
4.2 and 4.4). It has to beat SFT followed by RL, which needs no file of its own:

    python compare.py "sft:num_demonstrations=64>grpo" hybrid:num_demonstrations=64

Three choices make the methods. `--hint`: where own answers begin, at the prompt or after a part of
a demonstration. `--imitation`: what a demonstrator's token weighs. `--gate`: when demonstrations
count at all. `--demonstrated` says how many of a batch's prompts come with a demonstration.

    method      source       flags (num_demonstrations, mu: to taste)            seen in the survey?
    plain sum                the default: --imitation sft --mu 0.5
    CHORD-mu    2508.11408   --imitation sft --mu 0.9 --mu_end 0.05                              yes
    CHORD-phi   the same     --imitation chord --mu 0.1                                          yes
    LUFFY       2504.14945   --imitation luffy                                                   yes
    SRFT        2506.19767   --imitation srft --own_loss srft                                    yes
    UFT         2505.16984   --hint all --imitation sft --mu 0.1                                 yes
    Prefix-RFT  2507.01679   --hint one --imitation prefix                                       yes
    BREAD       2506.17211   --hint rescue --imitation none                                      yes
    HPT         2509.04419   --imitation sft --gate failed                                       yes
    SuperRL     2506.01096   the same: a gate at 0 right answers                                  no
    ReLIFT      2506.07527   --imitation sft --gate buffer                                       yes
    NFT         2505.18116   --own_loss nft --imitation none --num_iterations 2                  yes

`--mu` is read with --imitation sft and chord where there is no gate. A gate gives either sum its
whole weight; luffy, srft and prefix take one mean over all tokens, whoever wrote them.

Differences from the papers. Advantages and averages over tokens are those of grpo.py's defaults
everywhere. ReLIFT is without its entropy term, UFT without its KL, and its hints end at tokens, not
at sentences. BREAD samples whole groups while it searches, and one right answer in a group is
enough. NFT weighs prompts as GRPO does.

Left out: AMFT (2508.06944), whose mu follows a gradient through a validation set, and BRIDGE
(2509.06948), which solves two nested problems. SRL (2510.25992) rewards steps that resemble the
demonstration's: a reward, not a loss.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import data
from harness.errors import InputError
from harness.flags import Demonstrations, Sampling, check_choice, flag
from tasks import Rewards


@dataclass
class HybridConfig(Demonstrations, Sampling):
    """hybrid: demonstrations and own answers in one loss"""
    hint: Literal["none", "all", "one", "rescue"] = flag(
        "none", "answers of a group that begin as the demonstration does; rescue: where none is "
                "right")
    imitation: Literal["none", "sft", "chord", "luffy", "srft", "prefix"] = flag(
        "sft", "what a demonstrator's token weighs; the table above")
    gate: Literal["none", "failed", "buffer"] = flag(
        "none", "when demonstrations count: always, where the group failed, or by themselves once "
                "buffer_size groups have")
    own_loss: Literal["grpo", "nft", "srft"] = flag("grpo", "loss of the own answers' tokens")
    demonstrated: int = flag(0, "prompts of a batch that come with a demonstration; 0: half",
                             at_least=0)
    mu: float = flag(0.5, "sft, chord without a gate: share of the demonstrations in the loss, or "
                          "weight of the hints", at_least=0, at_most=1)
    mu_end: float = flag(None, "the same in the end, by a cosine; none: mu", at_least=0, at_most=1)
    hint_share: float = flag(0.9, "share of the demonstration that is given as a hint, at first",
                             at_least=0, at_most=1)
    hint_end: float = flag(0.0, "the same in the end, by a cosine", at_least=0, at_most=1)
    decay_steps: int = flag(0, "steps from first to last mu and hint; 0: half the run", at_least=0)
    rescue_rounds: int = flag(3, "rescue: lengths of the hint that are tried (1 to 5)", at_least=1)
    gate_threshold: float = flag(0.0, "a group has failed whose mean reward is not above this (0 "
                                      "to 0.5)", at_least=0, below=1)
    buffer_size: int = flag(16, "buffer: demonstrations that make an update (8 to 64)", at_least=1)
    shaping: float = flag(0.1, "luffy: the probability at which a token learns most", above=0)
    top_entropy: float = flag(0.2, "prefix: share of the hint's tokens, those of the largest "
                                   "entropy, that are trained", above=0, at_most=1)
    num_iterations: int = flag(1, "passes over each batch (1 to 4)", at_least=1)
    epsilon: float = flag(0.2, "clip range below 1 (0.1 to 0.3)", at_least=0)
    epsilon_high: float = flag(None, "clip range above 1; none: as epsilon", at_least=0)
    max_steps: int = 60
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 5
    logging_steps: int = 5
    eval_steps: int = 5
    save_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        names = self.reward.split(",")
        self.demonstrated = self.demonstrated or max(self.batch_size // 2, 1)
        if self.num_generations < 2:
            raise InputError("--num_generations 1 leaves a group nothing to compare with: raise it")
        if self.demonstrated > self.batch_size:
            raise InputError(f"--demonstrated {self.demonstrated}: a batch has --batch_size "
                             f"{self.batch_size} prompts; lower the one or raise the other")
        if self.gate != "none" and (self.hint != "none" or self.imitation not in ("sft", "chord")):
            raise InputError(f"--gate {self.gate} decides about whole demonstrations: use it with "
                             "--hint none and --imitation sft or chord")
        if self.gate != "none" and ({"brevity", "model"} & {*names} or self.reward_weights):
            raise InputError(f"--gate {self.gate} compares mean rewards of 0 to 1 with its "
                             "threshold: leave out brevity, model and --reward_weights")
        if self.own_loss != "grpo" or self.hint == "rescue":   # they ask whether one is right
            if len(names) > 1 or names[0] in ("model", "brevity") or self.reward_weights:
                raise InputError(f"--own_loss {self.own_loss} with --hint {self.hint} needs "
                                 "rewards of 0 and 1: give one --reward, not model or brevity, "
                                 "and no --reward_weights")
        if self.own_loss == "nft" and self.imitation in ("luffy", "srft"):
            raise InputError(f"--own_loss nft learns from the group's own answers: --imitation "
                             f"{self.imitation} puts a demonstration among them; use sft or none")
        if self.imitation == "prefix" and self.hint == "none":
            raise InputError("--imitation prefix is for hints: use it with --hint one or all")
        if self.imitation in ("luffy", "srft") and "majority" in names:
            raise InputError(f"--imitation {self.imitation} rewards one demonstration by itself, "
                             "which is always its own --reward majority: use another reward")

    def columns(self):
        """What a line of --data must have: demonstrations, and what the reward needs."""
        [(_, *judged)] = super(Demonstrations, self).columns()
        return [("prompt", "completion", *judged)]


# -- pure functions -------------------------------------------------------------------------------


def token_logprobs(logits, ids, demonstrated, temperature=1.0):
    """Log-probabilities of the tokens at hand (B, t), and of every token (B, t, V), from logits
    (B, t, V) and ids (B, t): a few columns of the batch (see model.completion_scores). Own tokens
    are scored at the sampling temperature, demonstrated ones (B, t) at 1.

    Worked example: logits log [.8, .2], the token 1, temperature .5, which squares the odds: log
    1/17 and log [16/17, 1/17]; where it is demonstrated log .2 and log [.8, .2].
    """
    if temperature != 1:
        logits = torch.where(demonstrated.unsqueeze(-1), logits, logits / temperature)
    all_logprobs = torch.log_softmax(logits, dim=-1)                            # (B, t, V)
    ids = ids.unsqueeze(-1)                                                     # (B, t, 1)
    return all_logprobs.gather(-1, ids).squeeze(-1), all_logprobs


def decay(step, first, last, steps):
    """From first to last over `steps` steps, along half a cosine, then last.

    Worked example, from .9 to .1 in 4 steps: .9 .783 .5 .217 .1 .1
    """
    done = min(step / steps, 1.0)
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def group_advantages(rewards, eps=1e-4):
    """(R - mean) / (std + eps) of each group, 0 where all are equal (2402.03300, section 4.1.2).
    rewards (P, G) -> (P, G)

    Worked example, LUFFY: four wrong answers and a right demonstration, [0, 0, 0, 0, 1]: the mean
    is .2, the deviation .447, the advantages -.447 and 1.79. Without it all five would be 0.
    """
    flat = (rewards.max(1).values == rewards.min(1).values)[:, None]            # (P, 1)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + eps)).masked_fill(flat, 0)


def joint_advantages(groups, shown, join=True):
    """The advantages of own answers and demonstrations. groups (P, G), shown (n,): the rewards of
    demonstrations for the first n prompts -> (P G + n,). join: each enters its group; else 0."""
    alone, n = group_advantages(groups), len(shown)
    if not (join and n):
        return torch.cat([alone.flatten(), torch.zeros_like(shown)])
    together = group_advantages(torch.cat([groups[:n], shown[:, None]], 1))     # (n, G + 1)
    return torch.cat([together[:, :-1].flatten(), alone[n:].flatten(), together[:, -1]])


def gate_rows(failed, P, G):
    """Which rows count under --gate failed: own answers unless their group failed, demonstrations
    if it did. failed (n,) of the first n of P groups of G -> (P G + n,)

    Worked example, three groups of two, the first two demonstrated and [True, False]: own
    [0, 0, 1, 1, 1, 1], demonstrations [1, 0].
    """
    undemonstrated = failed.new_ones((P - len(failed)) * G)
    return torch.cat([~failed.repeat_interleave(G), undemonstrated, failed])


def policy_loss(logprobs, old_logprobs, advantages, epsilon=0.2, epsilon_high=None):
    """PPO's clipped loss of each token and its ratio (1707.06347, eq. 7). logprobs (B, T),
    advantages (B, 1) -> (B, T) twice"""
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    ratio = (logprobs - old_logprobs).exp()                                     # (B, T)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def nft_loss(logprobs, old_logprobs, right, success, eps=0.1):
    """Negative-aware fine-tuning (2505.18116): right answers are imitated by the policy, wrong ones
    by what is left of pi_old without it. logprobs (B, T), right and success, the group's share s of
    right answers, (B, 1) -> (B, T)

    pi_old is a mixture, s pi_right + (1 - s) pi_wrong. Where pi stands for pi_right and R is pi /
    pi_old, pi_wrong / pi_old is (1 - s R) / (1 - s): its logarithm rises as R falls. The factor
    sqrt((1 - s) / s) makes the gradient at R = 1 that of GRPO with the population's deviation:
    +sqrt((1 - s) / s) if right, -sqrt(s / (1 - s)) if wrong.

    Worked example, one right of four: R = 1 gives a loss of 0; the gradients on the log-probability
    are -1.73 if right and +.577 if wrong. Where s R comes near 1 or above, the value is cut at eps
    and the gradient is not: the likelier a wrong token has become, the harder it is pushed down.
    """
    ratio, success = (logprobs - old_logprobs).exp(), success.clamp(eps / 10, 1 - eps / 10)
    wrong_ratio = (1 - success * ratio) / (1 - success)                         # (B, T)
    wrong_ratio = wrong_ratio.detach().clamp(min=eps) + (wrong_ratio - wrong_ratio.detach())
    losses = -torch.where(right, logprobs - old_logprobs, wrong_ratio.log())
    return ((1 - success) / success).sqrt() * losses


def srft_loss(logprobs, entropy, right):
    """-.1 sg(exp H) log pi if right, log pi if wrong (2506.19767); sg: held fixed. logprobs,
    entropy (B, T), right (B, 1) -> (B, T)"""
    return torch.where(right, -0.1 * entropy.detach().exp() * logprobs, logprobs)


def imitation_loss(logprobs, entropy, advantages, imitation="sft", shaping=0.1):
    """The loss of a demonstrator's token of probability p. logprobs, entropy (B, T), advantages
    (B, 1) -> (B, T). sg: held fixed, without gradient. Raises ValueError for an unknown imitation.

    imitation   loss                             weight of log pi        at p = .01, .5, .99
    sft         - log pi                         1                         1     1     1
    chord       - sg(p (1 - p)) log pi           p (1 - p)                 .010  .250  .010
    luffy       - A p / (p + shaping)            A shaping p / (p + shaping)^2
                                                                           .083  .139  .083 A
    srft        - sg(.5 exp(-H)) log pi - A p    .5 exp(-H) + A p

    luffy's ratio is p itself, since pi_old of the demonstrator is taken to be 1. Its weight would
    be A p, next to nothing on the unlikely tokens, from which there is most to learn; that of p /
    (p + shaping) is largest at p = shaping.
    """
    check_choice(HybridConfig, "imitation", imitation)
    p = logprobs.exp()
    if imitation == "chord":
        return -(p * (1 - p)).detach() * logprobs
    if imitation == "luffy":
        return -advantages * p / (p + shaping)
    if imitation == "srft":
        return -0.5 * (-entropy.detach()).exp() * logprobs - advantages * p
    return -logprobs


def top_share(values, mask, share):
    """The largest `share` of each row's values under the mask, rounded up. (B, T) -> (B, T) bool

    Worked example: [.1, .7, .3, .9] under [1, 1, 1, 0] at .5: of three values two, [0, 1, 1, 0].
    """
    rank = values.masked_fill(~mask, -math.inf).argsort(-1, descending=True).argsort(-1)
    return mask & (rank < (mask.sum(-1, keepdim=True) * share).ceil())


def token_weights(own, demonstrated, own_share=1.0, demo_share=1.0):
    """A mean over own tokens and one over demonstrated tokens, with these shares. Both (B, T) of
    True and False, each token at most one -> (B, T)

    Worked example, shares .9 and .1: three own tokens weigh .3 each, two demonstrated ones .05.
    """
    own_mean = own / own.sum().clamp(min=1)
    demo_mean = demonstrated / demonstrated.sum().clamp(min=1)
    return own_share * own_mean + demo_share * demo_mean


# -- the class that the loop drives ---------------------------------------------------------------


class Hybrid(nn.Module):
    Config = HybridConfig
    rows_together = 1   # each row's loss stands alone
    legend = ("nll: of the demonstrators' tokens, 0 where none is trained on   mu: their share in "
              "the loss\nopen: share of demonstrations that count   flat: share of groups whose "
              "own rewards are all equal\nreward: of all own answers, also of those after hints")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.ref_model = copy.deepcopy(model).requires_grad_(False)   # to measure the KL from
        self.rewards = Rewards(task, config.reward, config.reward_weights)
        self.demonstrations = task.demonstrations(config.num_demonstrations, config.seed,
                                                  config.style, config.wrong_share)
        number = len(self.demonstrations)
        if config.gate == "buffer" and config.buffer_size > number:
            raise InputError(f"--buffer_size {config.buffer_size}: there are only {number} "
                             "demonstrations, so that it is never full; lower it")
        # Which of them wait in ReLIFT's buffer: a part of the checkpoint.
        self.register_buffer("waiting", torch.zeros(number, dtype=torch.bool, device=model.device))
        self.optimizer = model.configure_optimizer(config)

    def examples(self):
        """What batches are drawn from: problems. `sample` puts demonstrated ones among them."""
        return self.task.problems("train", self.config.num_prompts, self.config.seed)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The policy, after hints or without, and the demonstrator. The first
        prompts are the demonstrated ones. Rows: own answers in groups, then demonstrations."""
        config, G, device = self.config, self.config.num_generations, self.model.device
        n, steps = config.demonstrated, config.decay_steps or max(config.max_steps // 2, 1)
        which = data.batch_indices(len(self.demonstrations), config, step, n)
        shown = [self.demonstrations[i] for i in which]
        begun = examples = shown + examples[n:]                                 # P of them
        if config.hint in ("all", "one"):
            low = decay(step, config.hint_share, config.hint_end, steps)
            begun = self.hinted(shown, low, generator) + examples[n:]
        if config.hint == "one":     # every answer is sampled by itself, the first after a hint
            each = [e for first, rest in zip(begun, examples) for e in [first] + [rest] * (G - 1)]
            batch = data.rollout(self.model, self, each, generator, log, num_generations=1)
            batch |= {"prompt_index": batch["prompt_index"] // G,
                      **{name: batch[name][::G] for name in ("prompt_ids", "prompt_mask")}}
        else:
            batch = data.rollout(self.model, self, begun, generator, log)
        batch.setdefault("demonstrated", torch.zeros_like(batch["completion_mask"]))
        if config.hint == "rescue":
            batch = self.rescue(batch, shown, generator, log)
        batch["shown"] = torch.full_like(batch["prompt_index"], -1)             # (B,) own answers
        if config.hint == "none" and config.imitation != "none":
            demos = data.collate(shown, self.tokenizer, device)
            rewards, _ = self.rewards(shown, [e["completion"] for e in shown], generator)
            demos |= {"rewards": rewards.to(device), "demonstrated": demos["completion_mask"],
                      "shown": torch.tensor(which, device=device)}
            batch = data.concatenate(batch, demos, self.tokenizer.pad_id)
        mu = decay(step, config.mu, config.mu if config.mu_end is None else config.mu_end, steps)
        return {**batch, "mu": torch.full_like(batch["rewards"], mu)}           # (B,)

    def hinted(self, shown, low, generator):
        """The demonstrated examples, each with the tokens of its hint: binomial in number with the
        probability `low` (UFT), or a share between `low` and hint_share (Prefix-RFT)."""
        found = []
        for example in shown:
            ids = self.tokenizer.encode(example["completion"])[:self.task.max_new_tokens - 1]
            first, *others = torch.rand(len(ids) + 1, generator=generator,
                                        device=generator.device).tolist()
            length = sum(u < low for u in others)
            if self.config.hint == "one":
                length = round((low + (self.config.hint_share - low) * first) * len(ids))
            found.append({**example, "hint_ids": ids[:length]})
        return found

    def rescue(self, batch, shown, generator, log):
        """BREAD: groups without a right answer are sampled again, after the shortest hint with
        which one is right. Its length is found by halving, each time with a whole group."""
        G = self.config.num_generations
        rows = torch.arange(len(batch["rewards"])).view(-1, G)                  # (P, G)
        best = batch["rewards"].view(-1, G)[:len(shown)].max(1).values
        bounds = {i: (0.0, 1.0) for i in (best < 0.5).nonzero().flatten().tolist()}
        for _ in range(self.config.rescue_rounds if bounds else 0):
            hinted = []
            for i, (low, high) in bounds.items():
                ids = self.tokenizer.encode(shown[i]["completion"])[:self.task.max_new_tokens - 1]
                hinted.append({**shown[i], "hint_ids": ids[:round((low + high) / 2 * len(ids))]})
            again = data.rollout(self.model, self, hinted, generator, log)
            new_rows = torch.arange(len(again["rewards"])).view(-1, G) + len(batch["rewards"])
            right = again["rewards"].view(-1, G).max(1).values > 0.5
            batch = data.concatenate(batch, again, self.tokenizer.pad_id)
            for (i, (low, high)), its_rows, found in zip(list(bounds.items()), new_rows, right):
                middle = (low + high) / 2
                bounds[i] = (low, middle) if found else (middle, high)
                rows[i] = its_rows if found else rows[i]
        return data.take_rows(batch, rows.flatten().to(self.model.device))

    def minibatches(self, batch, log):
        """What is each token worth? What concerns the whole batch is settled before it is split:
        the advantages, the averages over tokens, and the gate."""
        config, G, dtype = self.config, self.config.num_generations, self.model.dtype
        rewards, is_own = batch["rewards"].to(dtype), batch["shown"] < 0        # (B,)
        groups, shown = rewards[is_own].view(-1, G), rewards[~is_own]           # (P, G), (n,)
        failed = groups[:len(shown)].mean(1) <= config.gate_threshold           # (n,)
        join = config.imitation in ("luffy", "srft")
        advantages = joint_advantages(groups, shown, join)                      # (B,)
        success = torch.cat([groups.mean(1).repeat_interleave(G), shown])       # (B,)
        log.mean("frac_reward_zero_std", groups.max(1).values == groups.min(1).values)

        demo = batch["demonstrated"]                                            # (B, T)
        own = teaches = batch["completion_mask"] & ~demo
        if config.own_loss != "srft":   # without a contrast an own answer teaches nothing
            teaches = own & (advantages != 0)[:, None]
        trained = demo
        if config.imitation == "prefix":
            entropy = data.in_micro_batches(
                lambda b: self.logprobs(self.model, b)[1], batch, config)       # (B, T)
            trained = top_share(entropy, demo, config.top_entropy)
        own, demo = own.to(dtype), demo.to(dtype)   # a mask of numbers keeps its precision
        mu, total = batch["mu"][0].to(dtype), own.sum() + demo.sum()
        shares = 1 - mu, mu
        if config.imitation == "none":
            shares = 1.0, 0.0
        elif config.imitation in ("luffy", "srft", "prefix"):   # one mean over all tokens
            shares = own.sum() / total, demo.sum() / total
        elif config.hint != "none":     # UFT adds its hints' tokens
            shares = 1.0, mu
        elif config.gate != "none":     # a gate says which demonstrations count, and those wholly
            shares = 1.0, 1.0
        log.mean("mu", shares[1])
        weights = token_weights(own, demo, *shares) * (teaches | trained)       # (B, T)
        if config.gate == "failed":     # the demonstration counts in place of the own answers
            weights = weights * gate_rows(failed, len(groups), G)[:, None]
        elif config.gate == "buffer":   # it waits
            weights = weights * is_own[:, None]
            self.waiting[batch["shown"][~is_own][failed]] = True
        if config.gate != "none":
            log.mean("open", failed)

        # Rows without a gradient are left out; one stays where none has any, as in grpo.py.
        keep = (weights != 0).any(-1)
        keep[0] |= ~keep.any()
        part = data.take_rows({**batch, "advantages": advantages, "success": success,
                               "weights": weights}, keep.nonzero().squeeze(-1))
        if config.num_iterations > 1:   # pi_old: scored once, before anything moves
            part["old_logprobs"] = self.score(self.model, part)
        parts = [part] * config.num_iterations
        if int(self.waiting.sum()) >= config.buffer_size:
            parts.append(self.waiting_batch())
        return parts

    def waiting_batch(self):
        """ReLIFT's other update: the demonstrations that have waited, imitated. Then none waits."""
        shown = [self.demonstrations[i] for i in self.waiting.nonzero().flatten().tolist()]
        self.waiting.zero_()
        batch = data.collate(shown, self.tokenizer, self.model.device)
        mask = batch["completion_mask"].to(self.model.dtype)                    # (B, T)
        zeros = mask.new_zeros(len(shown))                                      # (B,)
        return {**batch, "demonstrated": batch["completion_mask"], "rewards": zeros,
                "weights": token_weights(0 * mask, mask), "advantages": zeros, "success": zeros}

    def score(self, model, batch):
        """Log-probabilities (B, T) without gradient, in the micro-batches of training."""
        def f(logits, ids, demonstrated):                                       # a few columns
            return token_logprobs(logits, ids, demonstrated, self.config.temperature)[0]
        return data.in_micro_batches(lambda b: model.completion_scores(
            f, *data.inputs(b), more=[b["demonstrated"]]), batch, self.config)

    def logprobs(self, model, batch):
        """Log-probabilities of the written tokens, and the entropy where each was drawn; both (B,
        T), of own tokens at the sampling temperature."""
        def f(logits, ids, demonstrated):                                       # a few columns
            logprobs, all_logprobs = token_logprobs(logits, ids, demonstrated,
                                                    self.config.temperature)
            with torch.no_grad():
                entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
            return logprobs, entropy                                            # (B, t), (B, t)
        return model.completion_scores(f, *data.inputs(batch), more=[batch["demonstrated"]])

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the rows at hand."""
        config, mask, demo = self.config, batch["completion_mask"], batch["demonstrated"]  # (B, T)
        logprobs, entropy = self.logprobs(self.model, batch)
        old_logprobs = batch.get("old_logprobs", logprobs.detach())   # used once: pi_old is pi
        advantages, success = batch["advantages"][:, None], batch["success"][:, None]   # (B, 1)
        right = batch["rewards"][:, None] > 0.5                                 # (B, 1)
        losses, ratio = policy_loss(logprobs, old_logprobs, advantages, config.epsilon,
                                    config.epsilon_high)                        # (B, T)
        imitated = losses               # prefix: a hint's tokens are taken for the policy's own
        if config.imitation not in ("none", "prefix"):
            imitated = imitation_loss(logprobs, entropy, advantages, config.imitation,
                                      config.shaping)
        if config.own_loss == "nft":
            losses = nft_loss(logprobs, old_logprobs, right, success)
        elif config.own_loss == "srft":
            losses = srft_loss(logprobs, entropy, right)
        log.mean("nll", -logprobs, demo)
        log.mean("entropy", entropy, mask)
        log.max("max_ratio", (ratio * (mask & ~demo)).max())
        return (torch.where(demo, imitated, losses) * batch["weights"]).sum()


if __name__ == "__main__":   # python hybrid.py is python train.py --algo hybrid
    import train
    train.start("hybrid")
