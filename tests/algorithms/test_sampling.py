"""Sampling: what is drawn, when it ends, and that scoring finds the sampler's probabilities."""

import math

import pytest
import torch

from harness.errors import InputError
from llama import CLOSE, EOS, PAD, PROMPTS, make_model, pad
from model import sample


# -- sampling against scoring ---------------------------------------------------------------------


def truncate(probabilities, top_k, top_p):
    """The distribution that top_k and then top_p leave of one row, one token after the other,
    likeliest first."""
    kept, left = [], [0.0] * len(probabilities)
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:top_k or None]
    mass = sum(probabilities[i] for i in order)
    for i in order:
        if kept and sum(probabilities[j] for j in kept) / mass >= top_p:
            break
        kept.append(i)
    for i in kept:
        left[i] = probabilities[i] / sum(probabilities[j] for j in kept)
    return left


def rescored(temperature, top_k=0, top_p=1.0):
    """8 samples to each prompt, row by row and token by token: the token, the log-probability that
    came with it, and the logits that scoring finds for it."""
    model, G = make_model(n_kv_head=2, qkv_bias=True), 8
    ids, mask = pad(PROMPTS, "left")
    generator = torch.Generator().manual_seed(1)
    s = model.generate(ids, mask, 16, EOS, PAD, G, temperature, top_k, top_p, generator)
    assert len(set(s.completion_mask.sum(-1).tolist())) >= 4  # rows do end at different times
    owner = torch.arange(len(PROMPTS) * G) // G
    logits = model.completion_logits(ids, mask, s.completion_ids, s.completion_mask, owner)
    return s.completion_ids[s.completion_mask], s.logprobs[s.completion_mask], logits[
        s.completion_mask]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_the_full_forward(temperature):
    """At every position of every row, the sampler's log-probability is the one that re-scoring
    finds, to 1e-4."""
    tokens, logprobs, logits = rescored(temperature)
    expected = (logits / temperature).log_softmax(-1)[torch.arange(len(tokens)), tokens]
    torch.testing.assert_close(logprobs, expected, **CLOSE)


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.3, 3, 1.0), (0.8, 0, 0.7), (1.2, 4, 0.8)])
def test_sampled_logprobs_are_those_of_the_truncated_distribution(temperature, top_k, top_p):
    """The same with top_k and top_p: the distribution that is re-scored is cut as the sampler's."""
    for token, found, row in zip(*rescored(temperature, top_k, top_p)):
        left = truncate((row / temperature).softmax(-1).tolist(), top_k, top_p)
        assert left[token] > 0
        assert math.log(left[token]) == pytest.approx(found.item(), abs=1e-4)


def test_greedy_is_the_argmax_of_a_full_forward_at_every_step():
    """Temperature 0 writes what one gets by re-reading everything for each token and taking the
    likeliest."""
    model, limit = make_model(eos_bias=1.0), 10
    s = model.generate(*pad(PROMPTS, "left"), limit, EOS, PAD, temperature=0)
    lengths = set()
    for b, prompt in enumerate(PROMPTS):
        written = []
        while len(written) < limit and EOS not in written:
            written.append(int(model(torch.tensor([prompt + written]))[0, -1].argmax()))
        assert s.completion_ids[b, s.completion_mask[b]].tolist() == written
        lengths.add(len(written))
    assert len(lengths) > 1  # the prompts are answered differently
    assert s.logprobs.eq(0).all()  # a certain choice has probability 1


@pytest.mark.parametrize("eos_bias", [2.0, 0.0, -100.0])
def test_eos_is_kept_and_ends_the_row(eos_bias):
    """A row is real tokens up to its EOS or to max_new_tokens, then padding; `truncated` tells the
    two apart."""
    limit = 12
    generator = torch.Generator().manual_seed(0)
    model, prompts = make_model(eos_bias), pad(PROMPTS, "left")
    s = model.generate(*prompts, limit, EOS, PAD, 6, generator=generator)
    ends = []
    for ids, mask, truncated, logprobs in zip(*(field.tolist() for field in s)):
        n = ids.index(EOS) + 1 if EOS in ids else limit
        assert mask == [True] * n + [False] * (len(ids) - n)
        assert ids[n:] == [PAD] * (len(ids) - n) and logprobs[n:] == [0.0] * (len(ids) - n)
        assert all(lp < 0 for lp in logprobs[:n])
        assert truncated == (EOS not in ids)
        ends.append(n)
    # as wide as the longest and no wider
    assert len(ends) == 18 and s.completion_ids.shape[1] == max(ends)
    expected = {2.0: 0, 0.0: pytest.approx(0.3, abs=0.25), -100.0: 1}
    assert s.truncated.float().mean() == expected[eos_bias]


def test_eos_as_the_last_allowed_token_is_not_truncation():
    """An answer whose EOS is the very last token that fits is complete."""
    s = make_model(eos_bias=100.0).generate(*pad(PROMPTS, "left"), 1, EOS, PAD)
    assert s.completion_ids.tolist() == [[EOS]] * 3 and not s.truncated.any()


def test_row_b_answers_prompt_b_over_num_generations():
    """The rows of a prompt stand together, in the order of the prompts."""
    model = make_model(eos_bias=-100.0)
    alone, together = ([model.generate(*pad(prompts, "left"), 8, EOS, PAD, G, temperature=0)
                        .completion_ids.tolist() for prompts in batches]
                       for batches, G in (([[p] for p in PROMPTS], 1), ([PROMPTS], 3)))
    alone, together = [ids for [ids] in alone], together[0]
    assert alone[0] != alone[1] != alone[2] != alone[0]
    assert together == [alone[b // 3] for b in range(9)]


def test_the_generator_decides_the_samples():
    """The same seed draws the same completions, another seed draws others."""
    model, prompts = make_model(), pad(PROMPTS, "left")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    a, b, c = (model.generate(*prompts, 8, EOS, PAD, 4, generator=g).completion_ids.tolist()
               for g in generators)
    assert a == b != c


def test_too_long_for_the_context_is_an_input_error():
    """A prompt and its completion may fill block_size exactly; one token more is refused, sampling
    or scoring."""
    model = make_model(block_size=10, eos_bias=-100.0)
    ids, mask = pad([[6, 1, 2, 3]], "left")
    s = model.generate(ids, mask, 6, EOS, PAD)
    assert s.completion_ids.shape == (1, 6)
    assert model.completion_logits(ids, mask, *s[:2]).shape == (1, 6, 8)
    with pytest.raises(InputError, match="block_size 10"):
        model.generate(ids, mask, 7, EOS, PAD)
    with pytest.raises(InputError, match="block_size 10"):
        model.completion_logits(ids, mask, *pad([[1] * 7], "right"))


# -- sample ---------------------------------------------------------------------------------------


def draw(probabilities, n=20000, **kwargs):
    """n draws from one row of probabilities: their frequencies, and the log-probability that came
    with each token."""
    logits = torch.tensor(probabilities).log().expand(n, -1)
    token, logprob = sample(logits, generator=torch.Generator().manual_seed(0), **kwargs)
    frequency = torch.bincount(token, minlength=len(probabilities)) / n
    return frequency, dict(zip(token.tolist(), logprob.tolist()))


@pytest.mark.parametrize("probabilities, kwargs, expected", [
    ([.5, .3, .15, .05], dict(), [.5, .3, .15, .05]),
    # square roots, normalised
    ([.64, .16, .16, .04], dict(temperature=2.0), [8 / 18, 4 / 18, 4 / 18, 2 / 18]),
    ([.5, .3, .2], dict(top_k=2), [.625, .375, 0]),
    ([.2, .5, .3], dict(top_k=1), [0, 1, 0]),
    ([.2, .3, .5], dict(top_k=9), [.2, .3, .5]),  # more than there are: all of them
    ([.2, .3, .5], dict(top_p=.6), [0, .375, .625]),                  # .5 alone does not reach .6
    ([.2, .3, .5], dict(top_p=.4), [0, 0, 1]),
    ([.2, .3, .5], dict(top_p=0.0), [0, 0, 1]),                       # the likeliest always stays
    # of 4/9, 3/9, 2/9 two already reach .75
    ([.1, .2, .3, .4], dict(top_k=3, top_p=.75), [0, 0, 3 / 7, 4 / 7]),
])
def test_draws_follow_the_distribution(probabilities, kwargs, expected):
    """20,000 draws come as often as they should, to 0.02, and bring the logarithm of just that
    probability."""
    frequency, logprob = draw(probabilities, **kwargs)
    assert frequency.tolist() == pytest.approx(expected, abs=0.02)
    # what has probability 0 never comes
    assert set(logprob) == {i for i, p in enumerate(expected) if p > 0}
    for i, lp in logprob.items():
        assert lp == pytest.approx(math.log(expected[i]), abs=1e-5)


def test_each_row_is_cut_by_its_own_order():
    """top_k and top_p look at every row by itself."""
    logits = torch.tensor([[.7, .2, .1], [.1, .2, .7], [.2, .7, .1]]).log().repeat(300, 1)
    for kwargs in (dict(top_k=1), dict(top_p=.5), dict(temperature=0)):
        assert sample(logits, **kwargs)[0].view(300, 3).unique(dim=0).tolist() == [[0, 2, 1]]


def test_the_likeliest_token_is_certain_at_temperature_0():
    """Every row's likeliest token, whatever top_k and top_p say, with the log-probability 0."""
    logits = torch.tensor([[.2, .5, .3], [.6, .3, .1]]).log()
    for kwargs in (dict(), dict(top_k=2), dict(top_p=.5)):
        token, logprob = sample(logits, temperature=0, **kwargs)
        assert token.tolist() == [1, 0] and logprob.tolist() == [0, 0]


def test_a_generator_goes_on_where_it_was():
    """The same seed draws the same tokens, and two draws after one another are not alike; nothing
    else decides them."""
    logits = torch.zeros(50, 7)
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = []
    for generator in (one, one, two, two):
        torch.rand(len(drawn))   # other random numbers in between
        drawn.append(sample(logits, generator=generator)[0].tolist())
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]


# the ends of torch.rand's range
@pytest.mark.parametrize("u, expected", [(0.0, 1), (1 - 2 ** -24, 3)])
def test_no_uniform_draw_picks_an_impossible_token(monkeypatch, u, expected):
    """Even at the ends of the uniform range a token of probability 0 is not drawn, nor one beyond
    the vocabulary."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, u))
    token, logprob = sample(torch.tensor([[0, .3, .3, .4, 0, 0]]).log())
    assert token.item() == expected and logprob.item() > -2
    assert sample(torch.zeros(1, 50000))[0].item() < 50000
