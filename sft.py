"""
SFT: supervised fine-tuning. Imitate demonstrations, token by token.

    Who sampled the text?        demonstrations (pre-training: a corpus)
    What weight has each token?  1 on the completion, 0 on the prompt (pre-training: 1 on all)
    What anchors the policy?     nothing

    L(theta) = - 1/N sum_i sum_t log pi(y_it | x_i, y_i,<t)

N is the number of completion tokens in the batch: a mean over tokens, not a mean of the answers'
means (survey 2603.13985, section 2, eq. 1). The gradient is an on-policy policy gradient with the
reward 1[y = y*] / pi(y|x) (survey, section 4.1): the less likely a demonstration, the harder the
push. Pre-training is the same loss on whole texts; `Pretrain` below differs in its examples alone.

Worked example. Two completions of 1 and 3 tokens with log-probabilities [-6] and [-1, -1, -4]: the
loss is (6 + 1 + 1 + 4) / 4 = 3. The mean of the two means would be (6 + 2) / 2 = 4, and a batch
that is split in two to save memory would say yet another thing. So the weights 1/N are fixed for
the whole batch before it is split, and micro-batches add up.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

import data
from harness.errors import InputError
from harness.flags import Demonstrations, Settings, flag


@dataclass
class SFTConfig(Demonstrations):
    """sft: imitate demonstrations"""
    completion_only: bool = flag(True, "train on completions only; false: on prompts too")
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


def token_losses(logprobs):
    """The negative log-likelihood of each token. (B, T) -> (B, T)"""
    return -logprobs


def token_weights(completion_mask):
    """1/N on each of the batch's N completion tokens, 0 elsewhere. (B, T) -> (B, T)"""
    mask = 1.0 * completion_mask   # a mask of numbers keeps its precision
    return mask / mask.sum().clamp(min=1)


# -- the class that the loop drives ---------------------------------------------------------------


class SFT(nn.Module):
    Config = SFTConfig
    rows_together = 1   # each row's loss stands alone
    legend = "The loss is the nll: minus the mean log-probability of a token, in nats."

    def __init__(self, config, model, tokenizer, task):
        super().__init__()
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model = model
        self.ref_model = copy.deepcopy(model).requires_grad_(False)   # to measure the KL from
        self.optimizer = model.configure_optimizer(config)

    def examples(self):
        """What batches are drawn from: demonstrations."""
        config = self.config
        return self.task.demonstrations(config.num_demonstrations, config.seed, config.style,
                                        config.wrong_share)

    def sample(self, examples, generator, step, log):
        """Who sampled the text? The demonstrator."""
        if not self.config.completion_only:   # then the whole text counts as completion
            examples = [{"prompt": "", "completion": e["prompt"] + e["completion"]}
                        for e in examples]
        return data.collate(examples, self.tokenizer, self.model.device)

    def minibatches(self, batch, log):
        """What is each token worth? 1/N, fixed before the batch is split. One update a batch."""
        weights = token_weights(batch["completion_mask"].to(self.model.dtype))
        return [{**batch, "weights": weights}]

    def logprobs(self, model, batch):
        """Log-probabilities of the completions' tokens, and which are likeliest; both (B, T)."""
        def f(logits, ids):                                                     # a few columns
            logprobs, all_logprobs = token_logprobs(logits, ids)
            return logprobs, all_logprobs.argmax(-1) == ids                     # (B, t), (B, t)
        return model.completion_scores(f, *data.inputs(batch))

    def loss(self, batch, log):
        """The loss at the head of this file, summed over the rows at hand."""
        mask = batch["completion_mask"]                                         # (B, T)
        logprobs, likeliest = self.logprobs(self.model, batch)
        losses = token_losses(logprobs)                                         # (B, T)
        log.mean("nll", -logprobs, mask)
        log.mean("mean_token_accuracy", likeliest, mask)
        return (losses * batch["weights"]).sum()


# -- pre-training: the same loss on whole texts ---------------------------------------------------


@dataclass
class PretrainConfig(Settings):
    """pretrain: make a base model from random weights"""
    num_documents: int = flag(0, "size of the corpus, read in order; 0: max_steps x batch_size",
                              at_least=0)
    completion_only: bool = False   # no flag here: every token is trained
    learning_rate: float = 5e-3
    adam_beta2: float = 0.98
    max_steps: int = 1080
    batch_size: int = 64
    warmup_steps: int = 100
    weight_decay: float = 0.1
    logging_steps: int = 100
    eval_steps: int = 500
    save_steps: int = 500

    def __post_init__(self):
        super().__post_init__()
        if self.init_from:
            raise InputError("--algo pretrain starts from random weights: leave out --init_from")
        if self.seed not in (0, self.base_seed):
            raise InputError(f"--seed {self.seed}: the seed of a base model is --base_seed")
        self.seed = self.base_seed   # it is shared by runs of any seed
        self.shuffle = False         # a corpus is read in order
        self.num_documents = self.num_documents or self.max_steps * self.batch_size

    columns = Demonstrations.columns


class Pretrain(SFT):
    Config = PretrainConfig

    def __init__(self, config, model, tokenizer, task):
        super().__init__(config, model, tokenizer, task)
        self.ref_model = None        # a KL to random weights means nothing

    def examples(self):
        """What batches are drawn from: documents, with an empty prompt."""
        return self.task.documents(self.config.num_documents, self.config.seed)


if __name__ == "__main__":   # python sft.py is python train.py --algo sft
    import train
    train.start("sft")
