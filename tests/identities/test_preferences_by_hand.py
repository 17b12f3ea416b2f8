"""The losses of pairs and the rewards that they compare, in numbers worked by hand."""

import decimal
import math

import pytest
import torch

from dpo import implicit_rewards, log1mexp, preference_loss
from pairs import BETA, FIRST, PAIR_LOSSES, REF, SECOND, pair_losses
from world import LENGTHS, LOGITS, close, sequence_logprobs

LOG = math.log
ABSURD = (-7, 7)   # the reference of losses that have none


def test_preference_loss_worked_example():
    """The docstring's: beta .1, log pi -4 and -9, log pi_ref -5 and -8: m = 2; sigmoid .598, hinge
    .8, ipo 9."""
    args = [torch.tensor([x], dtype=torch.float64) for x in (-4.0, -9.0, -5.0, -8.0, 2.0, 3.0)]
    for loss_type, loss in (("sigmoid", 0.598), ("hinge", 0.8), ("ipo", 9.0)):
        found = preference_loss(*args, loss_type=loss_type).item()
        assert found == pytest.approx(loss, abs=5e-4)
    args[0], args[1] = args[2], args[3]
    for beta in (0.1, 3.0):
        assert preference_loss(*args, beta=beta).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("settings, logps, ref_logps, lengths, loss", [
    # sigma(log 3) = 3/4
    (dict(loss_type="sigmoid", beta=1.0), (LOG(3), 0), (0, 0), (1, 1), LOG(4 / 3)),
    # m = -log 9, whatever the lengths
    (dict(loss_type="sigmoid", beta=0.5), (0, 0), (0, LOG(1 / 9)), (9, 2), LOG(4)),
    (dict(loss_type="sigmoid", beta=1.0, label_smoothing=0.25), (LOG(3), 0), (0, 0), (1, 1),
     0.75 * LOG(4 / 3) + 0.25 * LOG(4)),
    (dict(loss_type="sigmoid", beta=1.0, label_smoothing=0.1), (0, LOG(3)), (0, 0), (1, 1),
     0.9 * LOG(4) + 0.1 * LOG(4 / 3)),
    # no label is flipped: DPO
    (dict(loss_type="robust", beta=1.0), (LOG(3), 0), (0, 0), (1, 1), LOG(4 / 3)),
    (dict(loss_type="robust", beta=1.0, label_smoothing=0.25), (LOG(3), 0), (0, 0), (1, 1),
     1.5 * LOG(4 / 3) - 0.5 * LOG(4)),
    (dict(loss_type="robust", beta=1.0, label_smoothing=0.4), (0, LOG(3)), (0, 0), (1, 1),
     3 * LOG(4) - 2 * LOG(4 / 3)),
    # m = 1; m = -2; m = 8, where nothing is left to do
    (dict(loss_type="hinge", beta=0.5), (-1, -1), (-2, -1), (1, 1), 0.5),
    (dict(loss_type="hinge", beta=0.5), (-3, -1), (-1, -1), (1, 1), 2.0),
    (dict(loss_type="hinge", beta=0.5), (-1, -9), (-1, -1), (1, 1), 0.0),
    # m = 2 where 1 is asked for; m = -2 where it is 2; means 2/4 + 3/1 = 3.5 and 2/2 - 2/4 = .5
    (dict(loss_type="ipo", beta=0.5), (-1, -4), (-2, -3), (1, 1), 1.0),
    (dict(loss_type="ipo", beta=0.25), (-4, -1), (-3, -2), (5, 1), 16.0),
    (dict(loss_type="ipo", beta=0.5, ipo_average=True), (-1, -4), (-3, -1), (4, 1), 6.25),
    (dict(loss_type="ipo", beta=0.5, ipo_average=True), (-1, -1), (-3, -3), (2, 4), 0.25),
    (dict(loss_type="cpo", beta=1.0), (-1, -1 - LOG(3)), ABSURD, (2, 1), LOG(4 / 3) + 0.5),
    (dict(loss_type="cpo", beta=2.0), (-6, -6), ABSURD, (3, 1), LOG(2) + 2),
    (dict(loss_type="simpo", beta=2.0, simpo_gamma=0.0), (-2, -2 - LOG(3)), ABSURD, (2, 2),
     LOG(4 / 3)),
    # 2 (-1 + 2) - 2 = 0; equal means
    (dict(loss_type="simpo", beta=2.0, simpo_gamma=2.0), (-2, -6), ABSURD, (2, 3), LOG(2)),
    (dict(loss_type="simpo", beta=1.0, simpo_gamma=LOG(3)), (-8, -2), ABSURD, (4, 1), LOG(4)),
    # odds 1 and 1/3; odds 1/3 and 1; equal odds
    (dict(loss_type="orpo", beta=0.5), (-LOG(2), -LOG(4)), ABSURD, (1, 1),
     LOG(2) + 0.5 * LOG(4 / 3)),
    (dict(loss_type="orpo", beta=1.0), (-2 * LOG(4), -3 * LOG(2)), ABSURD, (2, 3),
     LOG(4) + LOG(4)),
    (dict(loss_type="orpo", beta=1.0), (-3 * LOG(2), -LOG(2)), ABSURD, (3, 1), LOG(2) + LOG(2)),
])
def test_preference_losses_worked_by_hand(settings, logps, ref_logps, lengths, loss):
    """At least two values for each loss_type, chosen so that every sigmoid is 1/4, 1/2 or 3/4."""
    args = [torch.tensor([float(x)], dtype=torch.float64) for x in (*logps, *ref_logps, *lengths)]
    assert close(preference_loss(*args, **settings), [loss])


def test_preference_loss_treats_each_pair_by_itself():
    """Three pairs in one call are three calls."""
    generator = torch.Generator().manual_seed(0)
    columns = [-torch.rand(3, generator=generator, dtype=torch.float64) * 5 for _ in range(4)]
    columns += [torch.tensor(x, dtype=torch.float64) for x in ([1, 2, 3], [3, 1, 2])]
    for loss_type in PAIR_LOSSES:
        together = preference_loss(*columns, loss_type=loss_type)
        alone = [preference_loss(*(c[n:n + 1] for c in columns), loss_type=loss_type).item()
                 for n in range(3)]
        assert together.shape == (3,) and close(together, alone)


@pytest.mark.parametrize("function, arguments, choices", [
    (preference_loss, 6, r"sigmoid, robust, hinge, ipo, cpo, simpo, orpo \(kto .*\)"),
    (implicit_rewards, 3, "sigmoid, robust, hinge, ipo, kto, cpo, simpo, orpo")])
@pytest.mark.parametrize("loss_type", ["nll", "Sigmoid", ""])
def test_an_unknown_loss_type_names_the_choices(function, arguments, choices, loss_type):
    """Not a silent default, and no bare word: the error says which losses there are."""
    with pytest.raises(ValueError, match=f"^loss_type '{loss_type}': choose from {choices}$"):
        function(*[torch.ones(2)] * arguments, loss_type=loss_type)


# Chosen: log pi -6, log pi_ref -8, 4 tokens. Rejected: log pi -3, log pi_ref -4, 1 token. beta .1.
# Summed log-ratios 2 and 1, means 1/2 and 1: sums and means disagree on which is better. log pi: -6
# and -3, per token -1.5 and -3: they disagree again.
@pytest.mark.parametrize("settings, chosen, rejected", [
    *[(dict(loss_type=name), 0.2, 0.1) for name in ("sigmoid", "robust", "hinge", "ipo", "kto")],
    (dict(loss_type="ipo", ipo_average=True), 0.05, 0.1),
    (dict(loss_type="sigmoid", ipo_average=True), 0.2, 0.1),   # a flag of ipo alone
    (dict(loss_type="cpo"), -0.6, -0.3),
    (dict(loss_type="simpo"), -0.15, -0.3),
    (dict(loss_type="orpo"), -0.15, -0.3),
])
def test_implicit_rewards_worked_by_hand(settings, chosen, rejected):
    """What each loss compares: beta times the log-ratio, for averaged ipo per token; for losses
    without a reference beta log pi, for simpo and orpo per token. beta is a factor."""
    args = [torch.tensor(x, dtype=torch.float64) for x in ([-6.0, -3.0], [-8.0, -4.0], [4.0, 1.0])]
    assert close(implicit_rewards(*args, **settings), [chosen, rejected])
    assert close(implicit_rewards(*args, **settings, beta=0.2), [2 * chosen, 2 * rejected])


@pytest.mark.parametrize("settings", [
    *[dict(loss_type=loss_type) for loss_type in PAIR_LOSSES],
    dict(loss_type="ipo", ipo_average=True)], ids=lambda x: "-".join(map(str, x.values())))
def test_the_loss_is_a_function_of_the_margin_of_its_rewards(settings):
    """Of all 225 pairs: the loss (of cpo and orpo the part that compares) is a function of the
    difference of the implicit rewards: the logged margin is the optimised one. (orpo: in sign.)"""
    logps = sequence_logprobs(LOGITS).detach()
    rewards = implicit_rewards(logps, REF, LENGTHS, **settings, beta=BETA)
    margin = rewards[FIRST] - rewards[SECOND]
    losses = pair_losses(logps, **settings, beta=BETA)
    if settings["loss_type"] in ("cpo", "orpo"):
        losses = losses + (logps / LENGTHS)[FIRST]   # without the chosen answer's nll
    closed = {"sigmoid": lambda m: -m.sigmoid().log(), "robust": lambda m: -m.sigmoid().log(),
              "cpo": lambda m: -m.sigmoid().log(), "simpo": lambda m: -(m - 0.5).sigmoid().log(),
              "hinge": lambda m: (1 - m).clamp(min=0),
              "ipo": lambda m: (m / BETA - 1 / (2 * BETA)) ** 2}
    if settings["loss_type"] == "orpo":   # a tie costs beta log 2
        assert torch.equal(losses < BETA * math.log(2) - 1e-9, margin > 1e-9)
        assert (margin > 1e-9).sum() > 50
    else:
        assert close(losses, closed[settings["loss_type"]](margin))


def test_log1mexp_against_fifty_digits():
    """log(1 - e^x) at x from -1e-6 to -40, against decimal arithmetic of 50 digits; naive float64
    loses half of them."""
    decimal.getcontext().prec = 50
    xs = [-1e-6, -1e-5, -1e-3, -0.1, -0.5, -LOG(2), -1.0, -3.0, -10.0, -40.0]
    exact = [float((1 - decimal.Decimal(x).exp()).ln()) for x in xs]
    found = log1mexp(torch.tensor(xs, dtype=torch.float64))
    assert close(found, exact, 1e-14) and close(found[5], -LOG(2), 1e-14)
    assert abs(math.log(1 - math.exp(-1e-6)) - exact[0]) > 1e-12
