"""
A few columns of logits at a time (model.completion_scores): chunks of any size give the loss, the
gradient and the figures of one chunk, for every algorithm, and nothing as large as the logits of a
whole batch ever exists.
"""

import dataclasses
import functools
import inspect
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dft
import distill
import dpo
import grpo
import hybrid
import model
import ppo
import rft
import sft
import tiny
import two_ranks
from harness import evaluate, tokens
from harness.log import Log
from tiny_hybrid import RECIPES, hard, make_hybrid

V, MANY = tiny.Letters.vocab_size, 97   # no other dimension of a tiny model is 97
VARIANTS = {
    **{name: two_ranks.VARIANTS[name] for name in two_ranks.VARIANTS
       if name not in ("rm", "sft of one", "dpo of one pair", "grpo of one", "grpo random")},
    **{f"dft {kind}": (lambda kind=kind: tiny.make(dft.DFT, loss_type=kind), tiny.DEMONSTRATIONS)
       for kind in ("prift", "iw_sft")},
    "rft awr": (lambda: tiny.make(rft.RFT, tiny.coin, num_generations=4, weighting="awr"),
                tiny.PROBLEMS),
    "ppo cold": (lambda: tiny.make_ppo(temperature=0.7), tiny.PROBLEMS),
    "grpo entropy": (lambda: tiny.make_grpo(entropy_coef=0.1, temperature=0.7), tiny.PROBLEMS),
    "grpo covariance kl": (lambda: tiny.make_grpo(covariance="kl", num_iterations=2),
                           tiny.PROBLEMS),
    "hybrid cold": (lambda: make_hybrid(hard, temperature=0.5, **RECIPES["srft"]),
                    two_ranks.EXAMPLES[:4]),
    **{f"distill {kind}": (lambda kind=kind: tiny.make(
        distill.Distill, divergence=kind, temperature=1.5), tiny.PROBLEMS)
       for kind in ("reverse", "forward", "sampled")}}


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    """Distillation learns from another tiny model."""
    monkeypatch.setattr(distill, "load_teacher",
                        lambda *_: tiny.tiny_model(3).requires_grad_(False))
    monkeypatch.setattr(two_ranks, "VARIANTS", VARIANTS)


@pytest.fixture
def in_chunks(monkeypatch):
    """in_chunks(f, size) -> f() with at most `size` logits at a time, and how many chunks the
    backward pass reads again."""
    def in_chunks(f, size):
        calls = []

        def counted(*args, **options):
            calls.append(args)
            return whole(*args, **options)
        with monkeypatch.context() as patch:
            whole = model.checkpoint
            patch.setattr(model, "checkpoint", counted)
            patch.setattr(model, "CHUNK", size)
            return f(), len(calls)
    return in_chunks


# -- the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_of_any_size_make_the_same_updates(name, in_chunks, float64):
    """One column at a time, or a few: gradients, weights and figures of a whole step, scoring
    included, are those of one chunk to 1e-12."""
    make, examples = VARIANTS[name]
    for seed in range(9):   # until a batch teaches something
        batch = tiny.sample(make(), examples, seed=seed)
        step = functools.partial(two_ranks.steps, name, batch)
        whole, none = in_chunks(step, 2 ** 26)
        if max(g.abs().max() for g in whole["gradients"]) > 1e-3:
            break
    assert none == 0 and max(g.abs().max() for g in whole["gradients"]) > 1e-3
    for size, least in ((1, 3 * len(whole["gradients"])), (20 * V, 0)):
        found, chunks = in_chunks(step, size)
        assert chunks > least, "there was one chunk"
        for a, b in zip([*whole["gradients"], whole["weights"]],
                        [*found["gradients"], found["weights"]]):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
        for figure, value in found["log"].items():
            if not figure.startswith("tokens_per_second"):
                assert value == pytest.approx(whole["log"][figure], abs=1e-11), figure


class Largest(TorchDispatchMode):
    """The largest number of logits, or of numbers like them, that any operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        found = f(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if torch.is_tensor(x) and is_like_logits(x):
                bytes = x.untyped_storage().nbytes()   # what is expanded takes no more
                self.size = max(self.size, bytes // x.element_size())
        return found


def is_like_logits(x):
    """(B, t, V) or (B t, V), and not the head's weights (C, V)."""
    return x.dim() > 1 and x.shape[-1] == MANY and x.shape != (16, MANY)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_of_a_batch_never_exist_at_a_time(name, in_chunks, monkeypatch):
    """In a loss and its backward pass no operation returns more than a chunk of logits, and the
    graph keeps none. (In one chunk, both hold all of them.)"""
    shape = dataclasses.replace(tiny.tiny_model().config, vocab_size=MANY)
    monkeypatch.setattr(tiny, "tiny_model", lambda seed=0: model.GPT(shape))
    make, examples = VARIANTS[name]
    torch.manual_seed(0)
    algo = make()
    minibatch = max(algo.minibatches(tiny.sample(algo, examples), Log()),
                    key=lambda m: m["completion_ids"].numel())
    B, T = minibatch["completion_ids"].shape

    def pass_through():
        kept = []

        def pack(x):
            if is_like_logits(x):
                kept.append(x.numel())
            return x
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = algo.loss(minibatch, Log())
            loss.backward()
        return largest.size, kept
    (size, kept), _ = in_chunks(pass_through, 2 ** 26)
    assert size == B * T * MANY in kept
    (size, kept), chunks = in_chunks(pass_through, 2 * B * MANY)
    assert size <= max(2 * B, 16) * MANY and kept == [] and chunks == math.ceil(T / 2) > 2


@pytest.mark.parametrize("prompts", [3, 6])
def test_what_f_is_given(prompts, in_chunks):
    """The logits, the tokens and whatever is added, of the same columns; one result or several;
    with gradients and without; one completion a prompt, or two."""
    net, T = tiny.tiny_model(), 7
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randint(16, (prompts, 4), generator=draw), torch.ones(prompts, 4).bool(),
              torch.randint(16, (6, T), generator=draw), torch.ones(6, T).bool(),
              torch.arange(6) * prompts // 6]
    logits, vectors = net.completion_logits(*inputs), torch.rand(6, T, 5, generator=draw)
    widths = []

    def several(z, ids, more):
        widths.append(z.shape[1])
        return z.gather(-1, ids[..., None])[..., 0], z.argmax(-1) == ids, more.sum(-1)
    expected = several(logits, inputs[2], vectors)
    for grad, chunks in ((True, 3), (False, 0)):
        widths.clear()
        with torch.set_grad_enabled(grad):
            found, again = in_chunks(
                lambda: net.completion_scores(several, *inputs, more=[vectors]), 6 * V * 3)
            [one], _ = in_chunks(lambda: [net.completion_scores(
                lambda z, ids: z.gather(-1, ids[..., None])[..., 0], *inputs)], 5)
        assert widths == [3, 3, 1] and again == chunks
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected))
        assert torch.allclose(one, expected[0], atol=1e-6) and one.requires_grad == grad


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo entropy", "distill reverse"])
def test_bfloat16(name, in_chunks):
    """Under autocast the second pass is made in the precision of the first: up to rounding, the
    gradient is that of one chunk."""
    make, examples = VARIANTS[name]
    algo = make()
    algo.config.dtype = "bfloat16"
    minibatch = tiny.minibatches(algo, examples)[0]

    def gradient():
        with data.autocast(algo.config):
            return tiny.loss_and_gradient(algo, minibatch)[1]
    (whole, _), (found, chunks) = in_chunks(gradient, 2 ** 26), in_chunks(gradient, 1)
    assert chunks > 1 and (found - whole).norm() < 0.02 * whole.norm()


# -- evaluation, and --inspect --------------------------------------------------------------------


def test_evaluation_in_chunks(in_chunks):
    """The KL of answers, and the loss of held-out lines."""
    algo = tiny.make_grpo(eval_problems=2)
    batch = tiny.sample(algo)
    rows = [{"prompt": e["prompt"], "completion": e["completion"]} for e in tiny.DEMONSTRATIONS]

    def figures():
        with torch.no_grad():
            kl = evaluate.answer_kl(algo.model, algo.ref_model, batch)
            loss = evaluate.held_out_loss(algo.model, algo.tokenizer, rows, algo.config)
        return torch.cat([kl, torch.tensor([loss["eval/loss"]])])
    whole, found = (in_chunks(figures, size)[0] for size in (2 ** 26, 1))
    assert whole.min() > 0.1 and torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo", "dpo", "hybrid srft", "distill reverse"])
def test_inspect_in_chunks(name, in_chunks):
    """--inspect puts the chunks together again."""
    make, examples = {**VARIANTS, "grpo": VARIANTS["grpo grpo"]}[name]
    algo = make()
    minibatch = tiny.minibatches(algo, examples)[0]
    whole, found = (in_chunks(lambda: tokens.gradient_weights(algo, minibatch), size)[0]
                    for size in (2 ** 26, 2 * len(minibatch["completion_ids"]) * V))
    assert whole[0].abs().max() > 1e-3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, found))


# -- the lines of the algorithm files -------------------------------------------------------------


def test_the_gather_is_the_same_in_every_file():
    """Line by line, but for the temperature of those that sample."""
    for files in ((sft, rft, dft, dpo), (ppo, grpo, distill)):
        assert len({inspect.getsource(file.token_logprobs) for file in files}) == 1


def test_token_logprobs_worked_examples():
    """Those of the docstrings, by hand."""
    logits, ids = torch.tensor([[[.5, .3, .2]]]).log() + 3, torch.tensor([[1]])
    logprob, everything = sft.token_logprobs(logits, ids)
    assert logprob.exp().item() == pytest.approx(.3)
    assert everything[0, 0].exp().tolist() == pytest.approx([.5, .3, .2])
    logits = torch.tensor([[[.8, .2]]]).log() - 1
    for temperature, p in ((1.0, [.8, .2]), (0.5, [16 / 17, 1 / 17])):
        own = grpo.token_logprobs(logits, ids, temperature)
        mixed = [hybrid.token_logprobs(logits, ids, torch.tensor([[demo]]), temperature)
                 for demo in (False, True)]
        for (logprob, everything), q in zip([own, *mixed], [p, p, [.8, .2]]):
            assert everything[0, 0].exp().tolist() == pytest.approx(q)
            assert logprob.exp().item() == pytest.approx(q[1])


def test_answer_logps_worked_example():
    """-1 and -2 are the answer's, -9 is on padding."""
    logprobs, mask = torch.tensor([[-1.0, -2, -9]]), torch.tensor([[True, True, False]])
    assert dpo.answer_logps(logprobs, mask).tolist() == [-3]
