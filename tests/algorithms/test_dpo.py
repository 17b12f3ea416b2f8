"""
The DPO class on a tiny model: its loss is that of the papers, its gradient that of its loss, and no
bookkeeping (padding, micro-batches) changes either.
"""

import math

import pytest
import torch

from dpo import REFERENCE_FREE, kto_loss, preference_loss
from harness.log import Log
from tiny import (loss_and_gradient, move, padded, same, same_results, same_weights, slope, texts,
                  update, weights_of)
from tiny_dpo import (PAIR_LOSSES, PAIRS, direct_logps, each_loss, make_dpo, minibatch_of, named,
                      sample)

WITH_AVERAGES = [*[dict(loss_type=loss_type) for loss_type in PAIR_LOSSES],
                 dict(loss_type="ipo", ipo_average=True)]


def test_logps_sum_the_tokens_of_the_answer_and_its_end(float64):
    """Against one unpadded forward pass for each answer: a sum over completion tokens, <end>
    included, prompt and padding excluded. (Means for sums: eric-mitchell/direct-preference-
    optimization issue 40.)"""
    algo = make_dpo(PAIRS)
    for minibatch in (minibatch_of(algo, PAIRS), minibatch_of(make_dpo())):
        direct, lengths = direct_logps(algo.model, minibatch)
        assert same(algo.logps(algo.model, minibatch), direct) and len(set(lengths.tolist())) > 2
    _, lengths = direct_logps(algo.model, minibatch_of(algo, PAIRS))
    assert lengths.tolist() == [len(c) + 1 for _, c in texts(minibatch_of(algo, PAIRS))]


@each_loss
def test_the_loss_is_that_of_the_papers(float64, settings):
    """Through the class: the mean over pairs (kto: over answers) of the pure function with the
    configured settings, at log-probabilities from unpadded passes of policy and reference;
    rpo_alpha adds the chosen answers' mean nll."""
    algo = make_dpo(**settings)
    minibatch = minibatch_of(algo)
    logps, lengths = direct_logps(algo.model, minibatch)
    ref, _ = direct_logps(algo.ref_model, minibatch)
    config = {name: value for name, value in settings.items() if name != "rpo_alpha"}
    if settings["loss_type"] == "kto":
        del config["loss_type"]
        label = torch.tensor([True, False] * 3)
        expected = kto_loss(logps, ref, label, minibatch["z0"][0], **config).mean()
    else:
        columns = [x[i::2] for x in (logps, ref, lengths) for i in (0, 1)]
        losses = preference_loss(*columns, **config)
        expected = (losses - settings.get("rpo_alpha", 0) * (logps / lengths)[0::2]).mean()
    loss, grad, _ = loss_and_gradient(algo, minibatch)
    assert same(loss, expected) and grad.abs().max() > 1e-4


@each_loss
def test_model_gradients_by_finite_differences(float64, settings):
    """Of the class's loss in the weights of the transformer: along random directions, and for
    single weights."""
    algo = make_dpo(**settings)
    minibatch = minibatch_of(algo)
    _, grad, _ = loss_and_gradient(algo, minibatch)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(len(grad), generator=generator) for _ in range(2)]
    directions += [torch.nn.functional.one_hot(grad.abs().argmax(), len(grad)).to(grad.dtype)]
    for direction in directions:
        found = slope(algo, algo.model, minibatch, direction)
        assert found == pytest.approx(float(grad @ direction), rel=1e-5, abs=1e-7)
        assert abs(found) > 1e-6


@each_loss
def test_micro_batches_and_padding_change_nothing(float64, settings):
    """Loss, gradient and metrics are those of the batch for micro-batches of any size, even and
    odd, and with wider padding; the reference (and z0) scored in micro-batches is the same. The
    policy is not the reference, and has moved."""
    algo = make_dpo(**settings)
    batch = sample(algo)
    move(algo.model)
    [minibatch] = algo.minibatches(batch, Log())
    whole = loss_and_gradient(algo, minibatch)
    for size in (1, 2, 3, 4, 5):
        algo.config.micro_batch_size = size
        [again] = algo.minibatches(batch, Log())
        found = loss_and_gradient(algo, again, size)
        assert same_results(found, whole), f"micro-batches of {size}"
    assert same_results(loss_and_gradient(algo, padded(minibatch)), whole), "wider padding"


@each_loss
def test_the_reference_has_no_gradient(settings):
    """Reference log-probabilities are numbers: training leaves the reference, the sampler and their
    gradients alone, and reference-free losses do not even read it."""
    algo = make_dpo(**settings, learning_rate=1e-2)
    networks = dict(algo.named_children())
    assert networks.keys() == {"model", "ref_model", "sampler"}   # the anchor is ref_model
    minibatch = minibatch_of(algo)
    before = {name: weights_of(network) for name, network in networks.items()}
    assert not any(value.requires_grad for value in minibatch.values())
    update(algo, minibatch)
    for name, network in networks.items():
        assert same_weights(before[name], network.state_dict()) == (name != "model"), name
        trained = {p.requires_grad and p.grad is not None for p in network.parameters()}
        assert trained == {name == "model"}
    assert (minibatch["ref_logps"] == 0).all() == (settings["loss_type"] in REFERENCE_FREE)


@pytest.mark.parametrize("settings", [*WITH_AVERAGES, dict(loss_type="kto")], ids=named)
def test_metrics_are_what_their_names_say(float64, settings):
    """rewards/* are what the loss compares, for most beta log pi / pi_ref of the answers, logps/*
    their log pi, margins the difference within a pair, accuracies the share of pairs in the right
    order: means over the three pairs, all from unpadded passes."""
    algo = make_dpo(beta=0.3, **settings)
    minibatch = minibatch_of(algo)
    _, _, found = loss_and_gradient(algo, minibatch)
    logps, lengths = direct_logps(algo.model, minibatch)
    ref, loss_type = direct_logps(algo.ref_model, minibatch)[0], settings["loss_type"]
    rewards = 0.3 * (logps if loss_type in ("cpo", "simpo", "orpo") else logps - ref)
    if loss_type in ("simpo", "orpo") or "ipo_average" in settings:
        rewards = rewards / lengths
    expected = {"rewards/chosen": rewards[0::2], "rewards/rejected": rewards[1::2],
                "logps/chosen": logps[0::2], "logps/rejected": logps[1::2]}
    if loss_type != "kto":
        margins = rewards[0::2] - rewards[1::2]
        expected |= {"rewards/margins": margins, "rewards/accuracies": (margins > 0).double()}
    assert all(len(values) == 3 for values in expected.values())
    assert found == pytest.approx({name: float(values.mean())
                                   for name, values in expected.items()}, abs=1e-9)


def test_an_untrained_policy_costs_log_2():
    """Where policy and reference are one model, the class's loss is log 2 and every reward 0 (kto:
    1/2)."""
    for loss_type, start in (("sigmoid", math.log(2)), ("kto", 0.5), ("hinge", 1.0), ("ipo", 25.0)):
        algo = make_dpo(loss_type=loss_type, ref_seed=None)
        loss, _, found = loss_and_gradient(algo, minibatch_of(algo))
        assert float(loss) == pytest.approx(start, abs=1e-4)
        assert found["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_a_step_widens_the_margin(float64):
    """A small step down any of the losses moves chosen above rejected (kto: good up and bad down)
    in that batch."""
    for loss_type in PAIR_LOSSES + ["kto"]:
        algo = make_dpo(loss_type=loss_type)
        minibatch = minibatch_of(algo)
        before = algo.logps(algo.model, minibatch).detach()
        loss, grad, _ = loss_and_gradient(algo, minibatch)
        start = torch.nn.utils.parameters_to_vector(algo.model.parameters()).detach()
        torch.nn.utils.vector_to_parameters(start - 1e-4 * grad / grad.norm(),
                                            algo.model.parameters())
        gain = algo.logps(algo.model, minibatch).detach() - before
        assert gain[0::2].sum() > gain[1::2].sum(), loss_type
        assert algo.loss(minibatch, Log()) < loss, loss_type
