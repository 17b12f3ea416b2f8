"""
What memory holds when a model is trained, part by part, and what to do when it runs out.
"""

import torch

from harness.errors import InputError
from model import CHUNK, GPT


def parts(shape, rows, prompt, completion, sampled, bytes_per_number=2, reference=True):
    """{part: bytes} of a step of GRPO. shape: a GPTConfig. rows: of a forward pass with gradient,
    --micro_batch_size; prompt, completion: their tokens; sampled: answers that are written
    together, batch_size x num_generations. bytes_per_number: of matrix products, 2 for bfloat16.

    Weights, gradients and AdamW's two moments are float32: 16 bytes a parameter, and 4 for the
    reference model; bfloat16 keeps a copy of the weights besides. Activations are what the backward
    pass needs of each layer: for each token about 5 n_embd in float32 (the norms; with qk_norm two
    sets of heads more) and, in the precision of the products, 2 n_embd, 4 n_hidden and the heads;
    and the mask of each row. Of logits there are three tensors at the peak: the log-probabilities,
    their gradient and that of the logits; or, where they are read in chunks
    (model.completion_scores), these and the logits of one chunk. `cache` holds the keys and values
    of what is being written (for a moment up to twice as much, when finished rows leave it). What
    is sampled and what is trained on are not there at the same time.
    """
    with torch.device("meta"):
        N = GPT(shape).num_parameters()
    V, C, b = shape.vocab_size, shape.n_embd, bytes_per_number
    heads, kv = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    T = prompt + completion
    token = 4 * (5 * C + 2 * shape.qk_norm * (heads + kv))
    token += b * (2 * C + 4 * shape.n_hidden + 2 * heads + 2 * kv)
    activations = shape.n_layer * rows * (T * token + T * T * b)
    found = {"weights": 4 * N, "reference": 4 * N * reference, "gradients": 4 * N,
             "optimizer": 8 * N, "bfloat16 copy": 2 * N * (b == 2),
             "activations": activations,
             "logits": 4 * min(3 * rows * completion * V, 4 * CHUNK),
             "cache": 2 * b * shape.n_layer * kv * sampled * T}
    found["peak"] = sum(found.values()) - min(found["cache"],
                                              found["activations"] + found["logits"])
    return found


def explained(error, config):
    """What ended a run: an InputError with advice where it was a lack of memory, else the error."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return error
    rows = config.batch_size * getattr(config, "num_generations", 1)
    now = config.micro_batch_size or rows
    if now > 2:
        return InputError(f"out of memory: give --micro_batch_size {max(now // 4, 1)}, the rows of "
                          f"a forward pass ({now} here; it changes no result). If it was in "
                          "sampling: a smaller --batch_size")
    return InputError(f"out of memory with {now} rows at a time: lower --batch_size (answers are "
                      "sampled together) or --max_new_tokens, or take a smaller model")
