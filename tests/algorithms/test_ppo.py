"""The PPO class on a tiny model: its loss, the gradients of policy and critic, its settings."""

import pytest
import torch

import data
import ppo
import rm
from harness.errors import InputError
from harness.log import Log
from ppo import PPOConfig
from tiny import (loss_and_gradient, move, padded, read_alone, rows, same, same_results,
                  same_weights, slope, tiny_model, update, weights_of)
from tiny_ppo import TRUNCATION, first_pass, gradients, make_ppo, off_policy


@pytest.mark.parametrize("truncation", ["terminal", "mask"])
def test_ppo_is_invariant_to_micro_batches_padding_and_order(float64, truncation):
    """Loss, gradients of policy and critic, and metrics are those of the batch, however it is cut,
    padded or ordered."""
    algo, minibatch = off_policy(**TRUNCATION[truncation])
    whole = loss_and_gradient(algo, minibatch)
    assert all(g.abs().max() > 1e-3 for g in gradients(algo, minibatch).values())
    assert 0 < whole[2]["clip_ratio"] < 1
    for size in (1, 2, 3, 5):
        found = loss_and_gradient(algo, minibatch, size)
        assert same_results(found, whole), f"micro-batches of {size}"
    assert same_results(loss_and_gradient(algo, padded(minibatch)), whole), "wider padding"
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    other = data.take_rows(minibatch, order)
    assert same_results(loss_and_gradient(algo, other), whole), "another order"


def test_ppo_settings_reach_the_loss(float64):
    """Off the sampling policy, the loss is policy_loss + vf_coef value_loss with the configured
    clips, a mean over tokens, at the sampling temperature; the metrics are what their names say."""
    algo, minibatch = off_policy(epsilon=0.1, epsilon_value=0.05, vf_coef=0.7, temperature=0.7)
    loss, _, found = loss_and_gradient(algo, minibatch)
    n, by_hand, ratios, moved = int(minibatch["completion_mask"].sum()), {}, [], []
    for b, (prompt, completion, _) in enumerate(rows(minibatch)):
        T = len(completion)
        A, old, old_values, returns = (minibatch[name][b, :T] for name in (
            "advantages", "old_logprobs", "old_values", "returns"))
        logp = (read_alone(algo.model, prompt, completion)[:T] / 0.7).log_softmax(-1)
        V = read_alone(algo.critic, prompt, completion)[:T, 0]
        losses, ratio, _ = ppo.policy_loss(logp[range(T), completion], old, A, 0.1)
        row = {"loss/policy": losses, "loss/value": ppo.value_loss(V, old_values, returns, 0.05),
               "values": V, "clip_ratio": ((ratio - 1) * A.sign() > 0.1).double(),
               "entropy": -(logp.exp() * logp).sum(-1)}
        by_hand = {name: by_hand.get(name, 0) + float(x.sum()) / n for name, x in row.items()}
        ratios.append(float(ratio.max()))
        moved.append(float((V - old_values).abs().min()))
    assert min(moved) < 0.05 < max(moved)   # some values are clipped
    assert found == pytest.approx({**by_hand, "max_ratio": max(ratios)})
    assert same(loss, by_hand["loss/policy"] + 0.7 * by_hand["loss/value"])


@pytest.mark.parametrize("name", ["model", "critic"])
def test_the_ppo_gradient_by_finite_differences(float64, name):
    """The derivative of the whole loss along random directions, through the network, in policy and
    in critic."""
    algo, minibatch = off_policy()
    network, gradient = getattr(algo, name), gradients(algo, minibatch)[name]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(len(gradient), generator=generator)
        expected = float(gradient @ direction)
        assert slope(algo, network, minibatch, direction) == pytest.approx(expected, abs=1e-7)
        assert abs(expected) > 1e-4


def test_policy_and_critic_share_no_gradient(float64):
    """Two networks: the policy's gradient is the same whatever the value loss, the critic's
    whatever the advantages; with a weight of 0 or advantages of 0 there is none at all."""
    def found(vf_coef=0.5, **changed):
        algo, minibatch = off_policy(vf_coef=vf_coef)
        return gradients(algo, {**minibatch, **changed})
    advantages = off_policy()[1]["advantages"]
    both, no_values = found(), found(vf_coef=0.0)
    no_advantages = found(advantages=0 * advantages)
    assert torch.equal(both["model"], no_values["model"]) and (no_values["critic"] == 0).all()
    assert torch.equal(both["critic"], no_advantages["critic"])
    assert (no_advantages["model"] == 0).all()
    assert both["model"].abs().max() > 1e-3 and both["critic"].abs().max() > 1e-3


def test_one_update_moves_policy_and_critic_and_not_the_reference():
    """train.update drives both networks with one optimizer; what is frozen stays."""
    algo = make_ppo(learning_rate=1e-2)
    networks = dict(algo.named_children())
    before = {name: weights_of(network) for name, network in networks.items()}
    update(algo, *first_pass(algo))
    moved = {name: not same_weights(before[name], network.state_dict())
             for name, network in networks.items()}
    assert moved == {"model": True, "critic": True, "ref_model": False}


def test_the_critic_starts_from_the_base_or_from_the_reward_model():
    """Without a reward model V is 0 at first, from the base's trunk; with one, V after the last
    token is its reward. The critic is trained, and the reward model, which goes on judging, is
    not."""
    algo = make_ppo(zero_critic=True)
    [part] = first_pass(algo)
    assert (algo.values(part) == 0).all()
    assert all(torch.equal(tensor, algo.model.state_dict()[name])
               for name, tensor in algo.critic.state_dict().items() if name != "lm_head.weight")
    reward_model = tiny_model(seed=3).with_scalar_head()
    move(reward_model)
    reward_model.requires_grad_(False)   # as prepare.build hands it over
    judge = rm.Judge(reward_model, algo.tokenizer)
    task = type(algo.task)(2, 3, judge=judge)
    algo = make_ppo(zero_critic=True, task=task, learning_rate=1e-2)
    before = weights_of(reward_model)
    [part] = first_pass(algo)
    lengths = part["completion_mask"].sum(-1)
    V = algo.values(part).detach()[range(len(lengths)), lengths]
    assert same(V, rm.answer_rewards(reward_model, part), 1e-5) and V.abs().min() > 0.01
    update(algo, part)
    assert same_weights(before, reward_model.state_dict())
    assert not same_weights(before, algo.critic.state_dict())


EXCLUDE = "exclude each other"


@pytest.mark.parametrize("settings, message", [
    *[({name: 0}, f"--{name} 0: ") for name in
      ("num_generations", "num_iterations", "num_minibatches", "num_prompts")],
    *[({name: -0.1}, f"--{name} -0.1: ") for name in
      ("kl_coef", "epsilon", "epsilon_value", "vf_coef", "target_kl", "missing_eos_penalty")],
    (dict(gamma=1.01), "--gamma 1.01: "), (dict(gamma=-0.1), "--gamma -0.1: "),
    (dict(lam=1.01), "--lam 1.01: "), (dict(lam=-0.1), "--lam -0.1: "),
    (dict(**TRUNCATION["mask"], missing_eos_penalty=0.5), EXCLUDE),
    (dict(**TRUNCATION["bootstrap"], missing_eos_penalty=0.5), EXCLUDE),
    (dict(**TRUNCATION["bootstrap"], **TRUNCATION["mask"]), EXCLUDE),
    (dict(reward="majority"), "compares the answers of a group"),
    (dict(reward="verifier,majority"), "of a group"),
    (dict(temperature=0.0), "--temperature 0.0: a number above 0"),
])
def test_wrong_ppo_settings_are_refused(settings, message):
    """Each is an InputError that says what is wrong; the settings at the edge are taken."""
    with pytest.raises(InputError, match=message):
        PPOConfig(**settings)
    PPOConfig(num_generations=1, kl_coef=0, epsilon=0, epsilon_value=0, target_kl=0, gamma=0, lam=1,
              vf_coef=0)


def test_ppo_counts_as_clipped_what_lost_its_gradient():
    """At pi_old, in a band of no width, every ratio is exactly 1 and none is clipped; far from it,
    tokens without an advantage, which have no gradient to lose, are not counted either."""
    def clipped_tokens(minibatch):
        log = Log()
        algo.loss(minibatch, log)
        return log.line()["clip_ratio"] * minibatch["completion_mask"].sum().item()
    algo = make_ppo(epsilon=0.0)
    [minibatch] = first_pass(algo)
    assert clipped_tokens(minibatch) == 0
    move(algo.model)
    assert clipped_tokens(minibatch) > 10
    assert clipped_tokens({**minibatch, "advantages": 0 * minibatch["advantages"]}) == 0
