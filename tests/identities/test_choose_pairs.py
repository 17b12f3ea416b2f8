"""Which answers make a pair: data.choose_pairs by enumeration, and rejection sampling (RSO)."""

import itertools
import math

import pytest
import torch

import data
from dpo import rso_accept
from world import close


def test_choose_pairs_worked_example():
    """The docstring's: rewards [1, 0, 1, 0] give each of (0, 1), (0, 3), (2, 1), (2, 3) equally
    often, over all orders of the uniforms; [1, 1, 1, 1] give none."""
    uniforms = torch.tensor(list(itertools.permutations([0.0, 0.2, 0.4, 0.9])))   # (24, 4)
    rows = data.choose_pairs(torch.tensor([[1.0, 0, 1, 0]]).expand(24, 4), uniforms)
    pairs = [(c % 4, r % 4) for c, r in rows.view(-1, 2).tolist()]
    assert {p: pairs.count(p) for p in pairs} == {(0, 1): 6, (0, 3): 6, (2, 1): 6, (2, 3): 6}
    assert len(data.choose_pairs(torch.ones(24, 4), uniforms)) == 0


@pytest.mark.parametrize("pair_selection", ["random", "best_worst"])
def test_choose_pairs_exhaustively(pair_selection):
    """All rewards in {0, .5, 1}^3, all sets of accepted answers, all orders of the uniforms: chosen
    is a best accepted answer, rejected a worse one (best_worst: a worst one), each allowed pair
    equally often; groups without one have no row."""
    cases = list(itertools.product(itertools.product([0.0, 0.5, 1.0], repeat=3),
                                   itertools.product([False, True], repeat=3)))
    orders = list(itertools.permutations([0.0, 0.3, 0.6]))
    rewards, accepted, uniforms = (torch.tensor(x) for x in zip(
        *((r, a, o) for r, a in cases for o in orders)))
    rows = data.choose_pairs(rewards, uniforms, pair_selection, accepted)
    chosen, rejected = rows[0::2].tolist(), rows[1::2].tolist()
    groups = [c // 3 for c in chosen]
    assert groups == [r // 3 for r in rejected] == sorted(groups)   # one pair a group, in order
    found = {n: [] for n in range(len(cases))}
    for c, r in zip(chosen, rejected):
        found[c // 3 // len(orders)].append((c % 3, r % 3))
    flat = 0
    for n, (reward, kept) in enumerate(cases):
        alive = [i for i in range(3) if kept[i]]
        top, bottom = (pick((reward[i] for i in alive), default=0) for pick in (max, min))
        pairs = [(i, j) for i in alive for j in alive if reward[j] < reward[i] == top
                 and (pair_selection == "random" or reward[j] == bottom)]
        flat += not pairs
        expected = sorted(pairs * (len(orders) // max(len(pairs), 1)))
        assert sorted(found[n]) == expected, (reward, kept)
    assert len(rewards) - len(rows) // 2 == flat * len(orders) > 0
    everything = torch.ones_like(accepted)
    assert torch.equal(data.choose_pairs(rewards, uniforms, pair_selection),
                       data.choose_pairs(rewards, uniforms, pair_selection, everything))


def test_choose_pairs_draws_uniformly():
    """40,000 groups with rewards [1, 1, 0, .5, 0]: the six pairs of right and wrong come a sixth of
    the time each, chosen and rejected independently; of the extremes four pairs, a quarter of the
    time each."""
    n = 40_000
    uniforms = torch.rand(n, 5, generator=torch.Generator().manual_seed(0))
    rewards = torch.tensor([[1, 1, 0, 0.5, 0]]).expand(n, 5)
    for pair_selection, losers in (("random", (2, 3, 4)), ("best_worst", (2, 4))):
        rows = data.choose_pairs(rewards, uniforms, pair_selection)
        pairs = rows[0::2] % 5 * 5 + rows[1::2] % 5
        counts = torch.bincount(pairs, minlength=25).view(5, 5) / n
        expected = torch.zeros(5, 5)
        for i, j in itertools.product((0, 1), losers):
            expected[i, j] = 1 / (2 * len(losers))
        assert (counts - expected).abs().max() < 0.01, pair_selection   # five standard deviations


def test_rso_accepts_with_the_probability_of_the_tilted_policy():
    """exp((r - max of the group) / beta): a grid of uniforms counts it exactly. The best is always
    kept, a constant added to a group's rewards changes nothing, each group has its own maximum
    (2309.06657, section 3.2)."""
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    uniforms = grid[:, None].expand(-1, 3)
    for rewards, rso_beta in (([1.0, 0.5, 0.0], 0.5), ([5.0, 4.5, 4.0], 0.5),
                              ([1.0, 0.5, 0.0], 2.0), ([-3.0, 1.0, 1.0], 1.0)):
        group = torch.tensor([rewards], dtype=torch.float64).expand(10_000, 3)
        share = rso_accept(group, uniforms, rso_beta).double().mean(0)
        assert close(share, [math.exp((r - max(rewards)) / rso_beta) for r in rewards], 1e-4)
    two_groups = torch.tensor([[1.0, 0.0], [0.0, -1.0]])   # e^-1 = .37 in either
    assert rso_accept(two_groups, torch.full((2, 2), 0.3), 1.0).all()
    assert rso_accept(two_groups, torch.full((2, 2), 0.4), 1.0).tolist() == [[True, False]] * 2


def test_rso_pairs_come_in_the_ratio_of_the_tilted_policy():
    """Of a group with one best answer and 40 each at .5 and 0, equally likely under pi, those at .5
    are rejected exp(.5 / beta) times as often: pi* is sampled without being known. Without
    rejection it is one to one."""
    n, rso_beta = 3000, 0.5
    rewards = torch.tensor([[1.0] + [0.5] * 40 + [0.0] * 40]).expand(n, 81)
    uniforms, again = torch.rand(2, n, 81, generator=torch.Generator().manual_seed(0))
    ratios = []
    for accepted in (rso_accept(rewards, again, rso_beta), None):
        rows = data.choose_pairs(rewards, uniforms, accepted=accepted)
        assert len(rows) == 2 * n and (rows[0::2] % 81 == 0).all()
        rejected = rows[1::2] % 81
        ratios.append(float((rejected <= 40).sum() / (rejected > 40).sum()))
    assert ratios[0] == pytest.approx(math.exp(0.5 / rso_beta), rel=0.1)
    assert ratios[1] == pytest.approx(1, rel=0.1)
