"""
Distillation: learn from a teacher, token by token. On-policy: in the student's own words.

    Who sampled the text?        the policy (the student), now; --prefixes teacher: the teacher
    What weight has each token?  the teacher's whole distribution over the next token, everywhere
    What anchors the policy?     nothing: the teacher is the target, and there is no reward

    L(theta) = 1/N sum_i sum_t KL_it        N: the tokens of the batch

    --divergence   KL_it at the prefix (x_i, y_i,<t), pi the student, q the teacher
    reverse        sum_v pi(v) log pi(v)/q(v)    mode seeking: give up what the teacher never writes
    forward        sum_v q(v) log q(v)/pi(v)     mode covering: leave out nothing that it may write
    sampled        reverse, from the one token that was drawn: -A log pi(y_it), A = sg(log q - log
                   pi). A policy gradient whose reward comes with every token.

GKD (2306.13649) takes reverse or forward on the student's text: the teacher says how it would go
on, also after a mistake of the student's. MiniLLM (2306.08543) has the reverse KL of whole answers.
`sampled` is that of Thinking Machines' blog (thinkingmachines.ai/blog/on-policy-distillation,
2025). Forward on the teacher's text is SFT on what the teacher writes, with all its next tokens at
once in place of the one that it drew.

What the gradient leaves out: the prefixes are held fixed, as in GKD. Summed over an answer the
reverse KLs are on average KL(pi || q) of whole answers, but the full gradient has a second term: a
token also decides which prefixes follow, and what they will cost. MiniLLM keeps that term.

What it cannot do: a student is corrected where it goes and nowhere else. What it writes in one
answer of a hundred is corrected as seldom. So a student who hardly ever writes worked steps learns
to begin them before it learns to finish them, and is worse in between (RESULTS.md). reverse weighs
a token by the student's own probability and begins slowly; forward pulls an unlikely token up at
once. --prefixes teacher shows what follows, but not what to do after the student's own mistakes.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import data
from harness import chat, checkpoint
from harness.errors import InputError
from harness.flags import Sampling, check_choice, flag
from tasks import Rewards


@dataclass
class DistillConfig(Sampling):
    """distill: learn from a teacher in your own words"""
    teacher: str = flag(None, "folder or file of the model to learn from: out/chain-grpo-0")
    divergence: Literal["reverse", "forward", "sampled"] = flag("reverse", "the table above")
    prefixes: Literal["student", "teacher"] = flag("student", "whose text the tokens follow")
    num_generations: int = 4   # no group is compared, and each token teaches
    max_steps: int = 60
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 5
    logging_steps: int = 5
    eval_steps: int = 5
    save_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        if self.divergence == "sampled" and self.prefixes == "teacher":
            raise InputError("--divergence sampled needs tokens that the student drew: use "
                             "--prefixes student")

    def columns(self):
        """What a line of --data must have. Where there is an answer too, the reward is logged."""
        return [("prompt",)]


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


def token_losses(logprobs, all_logprobs, teacher_logprobs, teacher_all_logprobs,
                 divergence="reverse"):
    """The divergence at each token. logprobs of the tokens that were drawn (B, T), all_logprobs
    (B, T, V), of the student and of the teacher -> (B, T). Raises ValueError for another
    divergence.

    Worked example: the student has (.5, .5), the teacher (.75, .25). reverse .5 log(2/3) + .5 log 2
    = .144; forward .75 log 1.5 + .25 log .5 = .131. sampled has A = log 1.5 if the first token was
    drawn, log .5 if the second: the first is pulled up, the second pushed down.
    """
    check_choice(DistillConfig, "divergence", divergence)
    if divergence == "sampled":
        return -(teacher_logprobs - logprobs).detach() * logprobs
    if divergence == "forward":
        return kl(teacher_all_logprobs, all_logprobs)
    return kl(all_logprobs, teacher_all_logprobs)


def kl(logp, logq):
    """KL(p || q) of the next token: the expectation is p's. (B, T, V), (B, T, V) -> (B, T)"""
    return (logp.exp() * (logp - logq)).sum(-1)


def token_weights(completion_mask):
    """1/N on each of the batch's N completion tokens, 0 elsewhere. (B, T) -> (B, T)"""
    mask = 1.0 * completion_mask   # a mask of numbers keeps its precision
    return mask / mask.sum().clamp(min=1)


def load_teacher(config, model):
    """The policy in the checkpoint of --teacher, frozen. Raises InputError where there is none from
    which `model` could learn."""
    path = config.teacher
    if not path:
        raise InputError("--algo distill needs a --teacher: make one with python train.py --algo "
                         "grpo, then give --teacher out/chain-grpo-0")
    found = checkpoint.read(path)
    teacher = checkpoint.build_model(found, config.device).requires_grad_(False)
    if teacher.config.scalar_head:
        raise InputError(f"--teacher {path} is a reward model, which cannot write: give a policy")
    if not chat.same_tokenizer(config, found) \
            or teacher.config.vocab_size != model.config.vocab_size:
        raise InputError(f"--teacher {path} has another vocabulary than the student: both need "
                         f"--tokenizer {config.tokenizer}")
    if teacher.config.block_size < model.config.block_size:
        raise InputError(f"--teacher {path} reads {teacher.config.block_size} tokens, the student "
                         f"{model.config.block_size}: give a teacher with as long a block_size")
    return teacher


# -- the class that the loop drives ---------------------------------------------------------------


class Distill(nn.Module):
    Config = DistillConfig
    rows_together = 1   # each row's loss stands alone
    legend = ("The loss is the divergence per token, in nats (of sampled: no measure of progress)."
              "\nto teacher: KL(student || teacher) per token of this text   entropy: of the "
              "student's next token")

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.ref_model = copy.deepcopy(model).requires_grad_(False)   # to measure the KL from
        self.teacher = load_teacher(config, model)
        # What answers are worth is logged and never trained on. Without a verifier: nothing.
        self.rewards = Rewards(task, config.reward, config.reward_weights)
        if "verifier" in self.rewards.functions and not task.verifies:
            self.rewards = lambda examples, texts, generator: (torch.zeros(len(texts)), {})
        self.optimizer = model.configure_optimizer(config)

    def examples(self):
        """What batches are drawn from: problems, without solutions."""
        return self.task.problems("train", self.config.num_prompts, self.config.seed)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The student, now (or the teacher)."""
        writer = self.model if self.config.prefixes == "student" else self.teacher
        return data.rollout(writer, self, examples, generator, log)

    def minibatches(self, batch, log):
        """What is each token worth? 1/N, fixed before the batch is split. One update a batch."""
        weights = token_weights(batch["completion_mask"].to(self.model.dtype))
        return [{**batch, "weights": weights}]

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the rows at hand."""
        config, mask = self.config, batch["completion_mask"]                    # (B, T)

        def f(logits, ids, teacher_hidden):                                     # a few columns
            logprobs, all_logprobs = token_logprobs(logits, ids, config.temperature)
            teacher_logprobs, teacher_all_logprobs = token_logprobs(
                self.teacher.head(teacher_hidden), ids, config.temperature)
            losses = token_losses(logprobs, all_logprobs, teacher_logprobs, teacher_all_logprobs,
                                  config.divergence)                            # (B, t)
            with torch.no_grad():
                teacher_kl = kl(all_logprobs, teacher_all_logprobs)             # (B, t)
                entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)          # (B, t)
            return losses, teacher_kl, entropy

        teacher_hidden = self.teacher.completion_hidden(*data.inputs(batch))    # (B, T, C)
        losses, teacher_kl, entropy = self.model.completion_scores(
            f, *data.inputs(batch), more=[teacher_hidden])                      # (B, T) each
        log.mean("teacher_kl", teacher_kl, mask)
        log.mean("entropy", entropy, mask)
        return (losses * batch["weights"]).sum()


if __name__ == "__main__":   # python distill.py is python train.py --algo distill
    import train
    train.start("distill")
