"""KTO on the tiny model: the average answer z0, and answers that come one by one."""

import pytest
import torch

import data
from harness.log import Log
from tiny import loss_and_gradient, same
from tiny_dpo import SINGLES, direct_logps, make_dpo, minibatch_of, sample


def test_kto_takes_z0_from_the_whole_batch(float64):
    """z0 = max(0, beta mean of log pi / pi_ref over answers to other rows' prompts), one number for
    the batch, whatever the micro-batches, without a gradient (2402.01306, section 4.1). Below 0 it
    is 0."""
    algo = make_dpo(SINGLES, loss_type="kto", beta=0.3)
    batch, n = sample(algo, SINGLES), len(SINGLES)
    others = {**batch, "prompt_index": torch.tensor([(b - 2) % n for b in range(n)])}
    kl = direct_logps(algo.model, others)[0] - direct_logps(algo.ref_model, others)[0]
    kl = float(kl.mean())
    z0 = max(0.0, 0.3 * kl)
    for size in (0, 1, 2, 3):
        algo.config.micro_batch_size = size
        [minibatch] = algo.minibatches(batch, Log())
        assert minibatch["z0"].shape == (n,) and not minibatch["z0"].requires_grad
        assert same(minibatch["z0"], torch.tensor(z0).expand(n))
    swapped = make_dpo(SINGLES, loss_type="kto", beta=0.3)   # the other sign
    swapped.model, swapped.ref_model = swapped.ref_model, swapped.model
    other = swapped.minibatches(batch, Log())[0]["z0"]
    assert same(other, torch.tensor(max(0.0, -0.3 * kl)).expand(n))
    assert sorted([z0 > 0.01, float(other[0]) > 0.01]) == [False, True]


def test_kto_of_the_policys_own_answers_reads_other_prompts():
    """With chosen and rejected in turn, two rows before is always another prompt; with a single
    pair there is none."""
    algo = make_dpo(loss_type="kto")
    seen, score = [], algo.score
    algo.score = lambda model, batch: seen.append(batch["prompt_index"]) or score(model, batch)
    minibatch = minibatch_of(algo)
    assert torch.equal(seen[0], minibatch["prompt_index"]) and len(seen) == 3
    assert (seen[1] != minibatch["prompt_index"]).all() and torch.equal(seen[1], seen[2])
    one = data.take_rows(minibatch, torch.tensor([0, 1]))
    assert algo.kto_z0(one).isfinite()


def test_kto_with_lines_that_fit_alone_but_not_with_another_prompt():
    """A long prompt with a short answer and a short prompt with a long one fit in 32 positions;
    that z0 reads the answers after each other's prompts must not stop the run."""
    lines = [{"prompt": "1" * n, "completion": "2" * (29 - n), "label": n > 9}
             for n in (20, 19, 3, 4)]
    algo = make_dpo(lines, loss_type="kto")
    assert minibatch_of(algo, lines)["z0"].isfinite().all()


def test_metrics_of_single_answers_go_by_their_labels(float64):
    """Three good answers and two bad ones: means over three and over two, wherever they stand, and
    also where micro-batches hold different numbers of them."""
    algo = make_dpo(SINGLES, loss_type="kto", beta=0.3)
    minibatch = minibatch_of(algo, SINGLES)
    logps = direct_logps(algo.model, minibatch)[0]
    good = torch.tensor([e["label"] for e in SINGLES])
    assert good.sum() == 3
    for size in (0, 2):
        found = loss_and_gradient(algo, minibatch, size)[2]
        assert found["logps/chosen"] == pytest.approx(float(logps[good].sum()) / 3)
        assert found["logps/rejected"] == pytest.approx(float(logps[~good].sum()) / 2)
