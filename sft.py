"""
Supervised fine-tuning: imitate demonstrations. The same file without the prompt mask is pre-training.

    Who sampled the text?        somebody else: demonstrations (for pre-training, a corpus)
    What weight has each token?  1
    What anchors the policy?     nothing

Maximum likelihood on the completion, a token mean over the whole batch (survey 2603.13985, section 2 and eq. 1):

    L(theta) = - 1/N sum_i sum_t  log pi(y_t | x, y_<t),      N = number of completion tokens in the batch

Its gradient is an on-policy policy gradient with the reward 1[y = y*] / pi(y|x) (survey, section 4.1): sparse, and the
larger the less likely the demonstration. What is trained is a matter of where the prompt ends: with `completion_only`
the loss sees the answer alone; without, the whole text counts as completion, which is how a base model is made.

Worked example. Two completions of 1 and 3 tokens whose log-probabilities are [-2] and [-1, -1, -4]: the loss is
(2 + 1 + 1 + 4) / 4 = 2. The mean of the two means, (2 + 2) / 2, happens to be 2 as well; with [-6] in place of [-2] the
token mean is 3 and the mean of means 4, and a batch split in two must still say 3. So the weights 1/N are fixed for the
whole batch before it is split, and micro-batches add up.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

import data
from model import InputError


@dataclass
class SFTConfig:
    completion_only: Annotated[bool, "train on completions only; false: on every token, which is pre-training"] = True
    num_demonstrations: Annotated[int, "size of the finite set of demonstrations (100 to 10000)"] = 400
    num_documents: Annotated[int, "size of the pre-training corpus, read in order; 0: max_steps x batch_size"] = 0

    def __post_init__(self):
        if self.num_demonstrations < 1:
            raise InputError(f"--num_demonstrations {self.num_demonstrations}: at least 1 is needed")
        if self.num_documents < 0:
            raise InputError(f"--num_documents {self.num_documents}: a number of at least 0 is needed")


# -- pure functions ---------------------------------------------------------------------------------------------------


def token_loss(logprobs):
    """The negative log-likelihood of each token. logprobs (B, T) -> losses (B, T)"""
    return -logprobs


def token_weights(completion_mask):
    """1/N on each of the N completion tokens of the batch, 0 elsewhere. completion_mask (B, T) -> weights (B, T)"""
    mask = completion_mask.float()
    return mask / mask.sum().clamp(min=1)


# -- the class that the loop drives -----------------------------------------------------------------------------------


class SFT:
    Config = SFTConfig
    samples = False              # trains on given text
    micro_batch_size = 0         # set by the loop: rows per forward pass, 0: all
    defaults = dict(learning_rate=1e-3, max_steps=100, batch_size=32, lr_scheduler_type="linear", warmup_steps=10,
                    weight_decay=0.01, logging_steps=10, eval_steps=10, save_steps=50)

    def __init__(self, config, model, ref_model, tokenizer, task):
        self.config, self.model, self.tokenizer, self.task = config, model, tokenizer, task

    def examples(self, seed):
        """What the loop draws batches from: demonstrations, or documents where every token is trained."""
        if self.config.completion_only:
            return data.demonstrations(self.task, self.config.num_demonstrations, seed)
        return data.documents(self.task, self.config.num_documents, seed)

    def collect(self, examples, generator):
        """A batch to train on, and what is worth logging about it. Imitation samples nothing."""
        batch = data.collate(examples, self.tokenizer, self.model.device)
        return batch, {}

    def minibatches(self, batch):
        """The updates to make on a batch: just one. Its weights are fixed here, before it is split to fit memory."""
        return [{**batch, "weights": token_weights(batch["completion_mask"])}]

    def loss(self, batch):
        """The summed loss of the batch's rows, and {name: (sum, count)} for the log."""
        mask = batch["completion_mask"]                                                        # (B, T)
        logits = self.model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], mask,
                                              batch["prompt_index"])                           # (B, T, V)
        all_logprobs = torch.log_softmax(logits, dim=-1)                                       # (B, T, V)
        logprobs = all_logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)  # (B, T)
        loss = (token_loss(logprobs) * batch["weights"]).sum()

        with torch.no_grad():
            n = mask.sum()
            right = (logits.argmax(-1) == batch["completion_ids"]) & mask
            metrics = {"nll": (-(logprobs * mask).sum(), n), "mean_token_accuracy": (right.sum(), n)}
        return loss, metrics
