"""
The SFT and Pretrain classes on a tiny model: what is trained, what is not, which examples are
drawn, and that no bookkeeping (padding, order, micro-batches) changes a result.
"""

import statistics

import pytest
import torch

import sft
import tasks
from harness import flags
from harness.errors import InputError
from harness.log import Log
from model import GPTConfig
from sft import SFT, Pretrain, PretrainConfig, SFTConfig
from tiny import (DEMONSTRATIONS, DOCUMENTS, Letters, check_invariance, file_task,
                  loss_and_gradient, make, make_sft, minibatches, same, same_weights, texts,
                  tiny_model, update)

# -- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [DEMONSTRATIONS, DOCUMENTS],
                         ids=["demonstrations", "documents"])
def test_sft_loss_is_the_token_mean_of_the_completions_and_their_ends(float64, examples):
    """Against one unpadded forward pass per example: minus the mean log-probability, over the whole
    batch, of completion tokens and <end>. In pre-training the whole text is the completion (survey
    2603.13985, eq. 1)."""
    algo = make_sft()
    [minibatch] = minibatches(algo, examples)
    loss, _, logged = loss_and_gradient(algo, minibatch)
    logprobs, right = [], 0
    for e in examples:
        prompt = [16] + algo.tokenizer.encode(e["prompt"])
        completion = algo.tokenizer.encode(e["completion"]) + [16]
        logits = algo.model(torch.tensor([prompt + completion]))[0]
        for t, token in enumerate(completion, start=len(prompt)):
            logprobs.append(logits[t - 1].log_softmax(-1)[token].item())
            right += int(logits[t - 1].argmax()) == token
    assert same(loss, -statistics.mean(logprobs))
    assert logged["nll"] == pytest.approx(-statistics.mean(logprobs))
    assert logged["mean_token_accuracy"] == pytest.approx(right / len(logprobs), abs=1e-12)


def test_sft_trains_end_but_nothing_after_it():
    """The loss has a gradient in the logits of every completion token, <end> included, and none on
    padding. A model whose <end> is left out never learns to stop."""
    algo = make_sft()
    original, seen = algo.model.head, []

    def head(hidden):
        seen.append(original(hidden))
        seen[-1].retain_grad()
        return seen[-1]

    algo.model.head = head
    [minibatch] = minibatches(algo, DEMONSTRATIONS)
    loss_and_gradient(algo, minibatch)
    trained = seen[0].grad.abs().sum(-1) > 0                                    # (B, T)
    lengths = [len(e["completion"]) + 1 for e in DEMONSTRATIONS]
    assert trained.tolist() == [[t < n for t in range(max(lengths))] for n in lengths]
    ends = torch.tensor(lengths) - 1
    found = minibatch["completion_ids"][torch.arange(5), ends]
    assert (found == algo.tokenizer.eos_id).all()


def test_sft_is_invariant_to_micro_batches_padding_and_order(float64):
    """Loss, gradient and what is logged are those of the batch. (Means of micro-batch means, or
    micro-batches that get lost, have spoilt published baselines: 2604.23747.)"""
    algo = make_sft()
    [minibatch] = minibatches(algo, DEMONSTRATIONS)
    check_invariance(algo, minibatch)


def test_token_weights_keep_the_precision_of_the_mask():
    """Of a bool mask float32, of a float64 mask float64: thirds that are right to 16 digits."""
    mask = torch.tensor([[True, True, True]])
    assert sft.token_weights(mask).dtype == torch.float32
    found = sft.token_weights(mask.double())
    assert found.dtype == torch.float64 and (found == 1 / 3).all()


def test_only_the_model_is_trained():
    """The reference is a frozen copy of the start, and an update leaves it there. Both are in the
    state dict, which is the checkpoint."""
    algo = make_sft(ref_seed=None)
    networks = dict(algo.named_children())
    assert set(networks) == {"model", "ref_model"} and algo.rows_together == 1
    assert not any(p.requires_grad for p in algo.ref_model.parameters())
    start = tiny_model().state_dict()
    assert same_weights(start, algo.ref_model.state_dict())
    assert algo.ref_model is not algo.model
    [minibatch] = minibatches(algo, DEMONSTRATIONS)
    update(algo, minibatch)
    assert same_weights(start, algo.ref_model.state_dict())
    assert not same_weights(start, algo.model.state_dict())
    names = {f"{network}.{name}" for network in networks for name in start}
    assert set(algo.state_dict()) == names


# -- examples: what the loop draws from -----------------------------------------------------------


def test_sft_draws_as_many_demonstrations_as_its_flag_says():
    """Drawn by the seed, from the training split."""
    task = tasks.Chain(2, 3)
    algo = make(SFT, task=task, num_demonstrations=5, seed=4)
    assert algo.examples() == task.demonstrations(5, 4)
    other = make(SFT, task=task, num_demonstrations=5, seed=5)
    assert algo.examples() != other.examples()


def test_pretraining_examples_train_every_token_of_the_text():
    """In SFT the prompt is apart and the completion alone is trained; in pre-training the whole
    document is, with an empty prompt."""
    task, tokenizer = tasks.Chain(2, 3), Letters()
    for Algorithm, settings in ((SFT, dict()), (Pretrain, dict(num_documents=20))):
        algo = make(Algorithm, task=task, ref_seed=None, **settings)
        examples = algo.examples()[:20]
        batch = algo.sample(examples, None, 0, Log())
        trained = [tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
        if Algorithm is SFT:
            prompts = [prompt for prompt, _ in texts(batch)]
            assert prompts == [e["prompt"] for e in task.demonstrations(20, 0)]
            assert trained == [task.solve(prompt)["steps"] for prompt in prompts]
        else:
            assert trained == task.corpus(20, 0)
            assert batch["prompt_ids"].tolist() == [[tokenizer.eos_id]] * 20


def test_sft_trains_on_prompts_too_where_asked():
    """--completion_only false, as TRL's completion_only_loss=False: the same demonstrations, with
    the prompt in the completion, so that each of its tokens is trained."""
    task = tasks.Chain(2, 3)
    algo = make(SFT, task=task, completion_only=False, num_demonstrations=5, seed=3)
    demonstrations = task.demonstrations(5, 3)
    assert algo.examples() == demonstrations
    [minibatch] = minibatches(algo, algo.examples())
    whole = [e["prompt"] + e["completion"] for e in demonstrations]
    assert texts(minibatch) == [("", text) for text in whole]
    tokens = sum(len(text) + 1 for text in whole)
    assert minibatch["completion_mask"].sum() == tokens
    assert same(minibatch["weights"][minibatch["completion_mask"]], 1 / tokens, 1e-8)


def test_sft_trains_on_the_prompts_of_a_file():
    """A file's prompt and completion in the same way; a text is all completion as it is, in SFT and
    in pre-training."""
    for row, text in (({"prompt": "7+5=", "completion": "2"}, "7+5=2"), ({"text": "1+1"}, "1+1")):
        task = file_task([row])
        for Algorithm, settings in ((SFT, dict(completion_only=False)), (Pretrain, dict())):
            algo = make(Algorithm, task=task, ref_seed=None, **settings)
            batch = algo.sample(algo.examples(), None, 0, Log())
            assert texts(batch) == [("", text)]


def test_a_corpus_is_for_whole_documents():
    """Pre-training reads --num_documents documents of the corpus, as many as its steps take where
    none is given, in order, drawn by base_seed. SFT has no such flag."""
    task = tasks.Chain(2, 3)
    algo = make(Pretrain, task=task, ref_seed=None, num_documents=7, base_seed=2)
    assert [e["completion"] for e in algo.examples()] == task.corpus(7, 2)
    config = PretrainConfig(max_steps=3, batch_size=5)
    assert config.num_documents == 15 and not config.shuffle and config.seed == 0
    with pytest.raises(InputError, match="--num_documents is unknown"):
        flags.parse(["--algo", "sft", "--num_documents", "7"], {"sft": SFT}, GPTConfig)


def test_pretraining_has_no_reference():
    """A KL to random weights means nothing: there is no such network, in memory or on disk."""
    algo = make(Pretrain, ref_seed=None)
    assert algo.ref_model is None
    assert all(name.startswith("model.") for name in algo.state_dict())


def test_columns_that_a_file_must_have():
    """In the order in which they are tried: what is there decides what a line is taken for."""
    for config in (SFTConfig(), SFTConfig(completion_only=False), PretrainConfig()):
        assert config.columns() == [("prompt", "completion"), ("text",)]


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("Config, settings, message", [
    (SFTConfig, dict(num_demonstrations=0), "--num_demonstrations 0: a number of at least 1"),
    (PretrainConfig, dict(num_documents=-1), "--num_documents -1: a number of at least 0"),
])
def test_wrong_settings_are_refused(Config, settings, message):
    """Each is an InputError that says what is wrong, before anything is trained."""
    with pytest.raises(InputError, match=message):
        Config(**settings)
