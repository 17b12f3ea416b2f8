"""KTO: the loss of single answers (2402.01306), its gradient in closed form and by hand."""

import math

import pytest
import torch

from dpo import kto_loss
from pairs import BETA, REF, scores
from world import LOGITS, close, gradient, sequence_logprobs

LOG = math.log


def test_kto_gradient_closed_form():
    """-+ lambda beta sigma(a) sigma(-a) grad log pi with a = beta h - z0: largest for answers of
    about average reward, none through z0 (2402.01306, eq. 7-8)."""
    logps, score = sequence_logprobs(LOGITS), scores()
    label, z0 = torch.arange(15) % 2 == 0, torch.tensor(0.3, dtype=torch.float64)
    losses = kto_loss(logps, REF, label, z0, BETA, 1.5, 0.5)
    a = (BETA * (logps - REF) - z0).detach()
    weight = torch.where(label, -1.5, 0.5).double() * BETA * a.sigmoid() * (-a).sigmoid()
    for n in range(15):
        assert close(gradient(losses[n], LOGITS), weight[n] * score[n])


@pytest.mark.parametrize("beta_h, z0, weights, good, bad", [
    (0, 0, (1, 1), 0.5, 0.5),                # the docstring's
    (LOG(3), 0, (1, 1), 0.25, 0.75),
    (-LOG(3), 0, (1, 1), 0.75, 0.25),
    (LOG(3), LOG(3), (1, 1), 0.5, 0.5),      # better than pi_ref, no better than the average answer
    (0, LOG(3), (2, 4), 1.5, 1.0),
])
def test_kto_loss_worked_by_hand(beta_h, z0, weights, good, bad):
    """1 - sigma(beta h - z0) of a good answer, 1 - sigma(z0 - beta h) of a bad one, each with its
    weight (2402.01306, eq. 7-8)."""
    ref_logps = torch.tensor([-5.0, -2.0], dtype=torch.float64)
    label = torch.tensor([True, False])
    losses = kto_loss(ref_logps + beta_h / 0.5, ref_logps, label, torch.tensor(z0), 0.5, *weights)
    assert close(losses, [good, bad], 1e-7)
