"""
GRPO's choices of advantages and of tokens: what is refused, and that the class hands on what the
pure functions say, settled once for the whole batch. (The formulas: identities/test_maxrl.py,
test_several_rewards.py, test_covariance.py.)
"""

import pytest
import torch

import data
from grpo import GRPOConfig, group_advantages, restrained_tokens
from harness.errors import InputError
from harness.log import Log
from tiny import (check_invariance, loss_and_gradient, make_grpo, make_ppo, minibatches, move, same,
                  sample)

GDPO = dict(multi_objective_aggregation="normalize_then_sum")
CLIP = dict(covariance="clip", cov_share=0.2, cov_low=0.01)
KL = dict(covariance="kl", cov_share=0.2, num_iterations=2)
TWO = dict(reward="verifier,brevity")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    (dict(scale_rewards="mean", reward="brevity"), "--scale_rewards mean needs rewards of at lea"),
    (dict(scale_rewards="mean", reward="verifier,model"), "at least 0: verifier, format or"),
    (dict(scale_rewards="mean", reward="verifier,format", reward_weights="1, -1"), "at least 0"),
    (dict(scale_rewards="mean", num_generations=1), "nothing to compare"),
    (dict(**GDPO), "normalize_then_sum needs two rewards or more, and --scale_rewards group"),
    (dict(**GDPO, **TWO, scale_rewards="none"), "and --scale_rewards group"),
    (dict(**GDPO, **TWO, scale_rewards="batch"), "and --scale_rewards group"),
    (dict(**GDPO, **TWO, advantage="reinforce"), "--advantage reinforce needs --scale_rewards"),
    (dict(multi_objective_aggregation="gdpo"), "choose from sum_then_normalize, normalize_"),
    (dict(advantage_sign="negative", advantage="reinforce", scale_rewards="none"), "below 0; use"),
    (dict(advantage_sign="plus"), "choose from both, positive, negative"),
    (dict(covariance="kl"), "acts from a batch's second update on: raise --num_minibatches"),
    (dict(covariance="clip", importance_sampling_level="sequence"), "drops tokens: use"),
    (dict(covariance="cov"), "choose from none, clip, kl"),
    (dict(covariance="clip", cov_low=5.0), "--cov_low must be below --cov_high"),
    (dict(cov_share=0.0), "--cov_share 0.0: a number above 0"),
    (dict(cov_share=1.1), "--cov_share 1.1: a number of at most 1"),
    (dict(cov_kl_coef=-1.0), "--cov_kl_coef -1.0: a number of at least 0"),
])
def test_contradictions_are_refused(settings, message):
    """Each in one line that names the flag."""
    with pytest.raises(InputError, match=message) as refused:
        GRPOConfig(**settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", [
    dict(scale_rewards="mean", reward="verifier,format", reward_weights="1,1e-2"),
    dict(scale_rewards="mean", advantage="reinforce", num_generations=1),
    dict(scale_rewards="mean", advantage="rloo"), dict(**GDPO, **TWO, advantage="rloo"),
    dict(advantage_sign="negative", advantage="reinforce", scale_rewards="none", reward="model"),
    dict(advantage_sign="negative", advantage="reinforce", scale_rewards="none",
         reward_weights="-1"),
    dict(covariance="kl", num_minibatches=2), dict(covariance="kl", num_iterations=2),
    dict(covariance="kl", num_iterations=2, importance_sampling_level="sequence")])
def test_their_neighbours_are_taken(settings):
    """What differs from a refused setting by one choice."""
    config = GRPOConfig(**settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


# -- advantages -----------------------------------------------------------------------------------


def test_each_reward_reaches_its_advantage_under_its_name():
    """Three rewards with weights 2, .5 and -1: the class normalises what the batch holds of each,
    adds and divides, by hand; the sum of the rewards plays no part. PPO's batch, and GRPO's where
    nothing is normalised apart, hold them too and do not use them."""
    settings = dict(reward="format,brevity,verifier", reward_weights="2,0.5,-1", beta=0.1)
    algo = make_grpo(None, **settings, **GDPO)
    batch = sample(algo)
    [part] = algo.minibatches({**batch, "rewards": torch.full((16,), 99.0)}, Log())
    total = sum(w * group_advantages(batch[f"rewards/{name}"].view(4, 4))
                for w, name in ((2, "format"), (0.5, "brevity"), (-1, "verifier")))
    assert same(part["advantages"].view(4, 4), total / (total.std() + 1e-4), 1e-5)
    assert len(total.unique()) > 4
    for other in (make_grpo(None, **settings), make_ppo(None, reward="format,verifier")):
        batch = sample(other)
        without = {name: x for name, x in batch.items() if not name.startswith("rewards/")}
        assert len(without) < len(batch)
        for one, two in zip(other.minibatches({**batch}, Log()),
                            other.minibatches(without, Log()), strict=True):
            assert torch.equal(one["advantages"], two["advantages"])


def test_rows_that_only_their_sum_calls_equal_are_trained():
    """Rewards r and 1 - r/2 with weights 1 and 2: every sum is 2, every group flat. Normalised by
    themselves they do not cancel, and their rows are not left out."""
    def made(aggregation):
        algo = make_grpo(None, reward="verifier,format", reward_weights="1,2",
                         multi_objective_aggregation=aggregation)
        batch = sample(algo)
        reward = torch.tensor([1.0, 0.0, 0.0, 0.0] * 4)
        batch.update({"rewards": torch.full((16,), 2.0), "rewards/verifier": reward,
                      "rewards/format": 1 - reward / 2})
        [part] = algo.minibatches(batch, Log())
        return part["advantages"]
    assert len(made("normalize_then_sum")) == 16 and (made("normalize_then_sum") != 0).all()
    assert made("sum_then_normalize").tolist() == [0]                # one row stays


def test_one_sign_alone_leaves_the_other_rows_out_and_counts_them():
    """The rows that are left have advantages of that sign, and the weights that they have among
    all, so that the gradients of the two halves add up to the whole, off-policy too."""
    found = {}
    for sign in ("both", "positive", "negative"):
        algo = make_grpo(advantage_sign=sign, num_iterations=2)
        part = minibatches(algo)[0]
        move(algo.model)
        found[sign] = part, loss_and_gradient(algo, part)
    signs = {sign: part["advantages"].sign().unique().tolist() for sign, (part, _) in found.items()}
    assert signs == {"both": [-1, 1], "positive": [1], "negative": [-1]}
    (_, plus, _), (_, minus, _), (_, whole, _) = (found[s][1] for s in
                                                  ("positive", "negative", "both"))
    assert same(plus + minus, whole, 1e-6) and whole.abs().max() > 1e-3
    assert min(plus.abs().max(), minus.abs().max()) > 1e-3


def test_mean_normaliser_in_the_class():
    """A group without a right answer has no rows; the others have 1 / mean - 1 and -1."""
    algo = make_grpo(scale_rewards="mean", beta=0.1)
    batch = sample(algo)
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    [part] = algo.minibatches({**batch, "rewards": rewards.flatten()}, Log())
    expected = [[3, -1, -1, -1], [0] * 4, [0] * 4, [1, 1, -1, -1]]
    assert same(part["advantages"].view(4, 4), torch.tensor(expected).float(), 1e-6)


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [CLIP, KL])
@pytest.mark.usefixtures("float64")
def test_the_choice_is_settled_for_the_whole_batch(settings):
    """However the batch is scored and cut, the same tokens are restrained: those that the pure
    function chooses from the whole batch, groups of equal rewards and all."""
    def chosen(**more):
        algo = make_grpo(**{**settings, **more}, beta=0.1)           # beta: no row is left out
        parts = minibatches(algo)[:more.get("num_minibatches", 1)]
        width = algo.task.max_new_tokens
        return torch.cat([torch.nn.functional.pad(
            p["restrained"], (0, width - p["restrained"].shape[1])) for p in parts])
    algo = make_grpo(**settings, beta=0.1)
    batch = sample(algo)
    batch["advantages"] = group_advantages(batch["rewards"].view(4, 4).double()).flatten()
    whole = restrained_tokens(algo.logprobs(algo.model, batch)[0].detach(), batch, algo.config)
    mask = batch["completion_mask"]
    share = int(0.2 * mask.sum())
    assert 0 < whole.sum() <= share + 2 and not (whole & ~mask).any()
    whole = torch.nn.functional.pad(whole, (0, algo.task.max_new_tokens - whole.shape[1]))
    for more in ({}, dict(micro_batch_size=3), dict(num_minibatches=2), dict(num_minibatches=4)):
        assert torch.equal(chosen(**more), whole)


def test_random_numbers_are_drawn_after_the_answers_and_repeat():
    """clip samples the answers that none samples, and a step that is made again the same
    tokens."""
    plain, once, again = (sample(make_grpo(**settings)) for settings in ({}, CLIP, CLIP))
    assert all(torch.equal(plain[name], once[name]) for name in plain)
    assert set(once) - set(plain) == {"uniforms"}
    assert torch.equal(once["uniforms"], again["uniforms"])
    assert not torch.equal(once["uniforms"], sample(make_grpo(**CLIP), seed=7)["uniforms"])


@pytest.mark.parametrize("settings", [CLIP, KL])
@pytest.mark.usefixtures("float64")
def test_the_loss_is_invariant_to_micro_batches_padding_and_order(settings):
    """Also off-policy."""
    algo = make_grpo(**{**settings, "num_iterations": 2})
    part = minibatches(algo)[0]
    move(algo.model)
    _, _, logged = check_invariance(algo, part)
    mask = part["completion_mask"]
    assert logged["frac_restrained"] == pytest.approx(
        float((part["restrained"] & mask).sum() / mask.sum())) and logged["frac_restrained"] > 0


@pytest.mark.usefixtures("float64")
def test_clip_drops_the_policy_loss_of_its_tokens_and_nothing_else():
    """It is the loss whose tokens weigh nothing; with beta the KL still holds them."""
    for beta in (0.0, 0.5):
        algo = make_grpo(**CLIP, beta=beta)
        [part] = minibatches(algo)
        loss, found, _ = loss_and_gradient(algo, part)
        weightless = {**part, "weights": part["weights"] * ~part["restrained"]}
        without = loss_and_gradient(algo, weightless)
        assert (same(loss, without[0]) and same(found, without[1])) == (beta == 0)
        full = loss_and_gradient(algo, {**part, "restrained": part["restrained"] & False})
        assert not same(found, full[1], 1e-3)


@pytest.mark.usefixtures("float64")
def test_kl_acts_from_the_second_update_on():
    """At pi_old its penalty has no gradient and the first update is that of none; once the policy
    has moved it has. Rows whose advantage is 0 stay: their tokens may be restrained."""
    found = {}
    for name, settings in (("none", dict(num_iterations=2)), ("kl", KL)):
        algo = make_grpo(**settings)
        part, again = minibatches(algo)
        first = loss_and_gradient(algo, part)[1]
        move(algo.model)
        found[name] = len(part["advantages"]), first, loss_and_gradient(algo, again)[1]
    assert found["kl"][0] == 16 > found["none"][0]
    assert same(found["kl"][1], found["none"][1])
    assert not same(found["kl"][2], found["none"][2], 1e-3)


def test_truncated_answers_that_are_left_out_are_in_no_covariance():
    """mask_truncated_completions: the tokens chosen are those of the batch without them."""
    algo = make_grpo(**KL, mask_truncated_completions=True)
    batch = sample(algo)
    part = algo.minibatches({**batch}, Log())[0]
    assert batch["truncated"].any() and part["restrained"].any()
    assert not part["restrained"][batch["truncated"]].any()
    kept = data.take_rows(batch, (~batch["truncated"]).nonzero().squeeze(-1))
    advantages = group_advantages(batch["rewards"].view(4, 4)).flatten()[~batch["truncated"]]
    logprobs, _ = algo.logprobs(algo.model, kept)
    expected = restrained_tokens(logprobs.detach(), {**kept, "advantages": advantages}, algo.config)
    width = expected.shape[1]
    assert torch.equal(part["restrained"][~batch["truncated"], :width], expected)
