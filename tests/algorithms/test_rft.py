"""
The RFT class on a tiny model: which of the sampled answers are imitated and with what weight, when
the sampler is renewed, when training restarts, and how the bar rises.
"""

import copy
import zlib

import pytest
import torch

import data
import rft
import tasks
from harness.errors import InputError
from harness.log import Log
from rft import RFT, RFTConfig
from tiny import (PROBLEMS, check_invariance, coin, loss_and_gradient, make, minibatches, move,
                  read, same, same_weights, sample, texts, tiny_model, update)


def graded(prompts, completions, **columns):
    """A reward of 0, 1/4, 1/2, 3/4 or 1 that looks random and depends on prompt and answer."""
    return [zlib.crc32((p + c).encode()) % 5 / 4 for p, c in zip(prompts, completions)]


def make_rft(reward_function=coin, **settings):
    """RFT with groups of 4 of its own answers, judged by the given reward, for 6 steps."""
    defaults = dict(num_generations=4, max_steps=6, learning_rate=1e-2, weight_decay=0.0)
    return make(RFT, reward_function, ref_seed=None, **{**defaults, **settings})


def sampled(model, algo, seed=2, temperature=1.0):
    """What a model writes with the same random numbers as tiny.sample: 16 rows, each with its
    prompt."""
    generator = torch.Generator().manual_seed(seed)
    batch = data.rollout(model, algo, PROBLEMS, generator, None, 4, temperature)
    return texts(batch)


def values(rows, reward_function=coin):
    return [reward_function([p], [c])[0] for p, c in rows]


WEIGHTINGS = ["none", "dft"]    # the two that imitate some answers and drop the rest


# -- which answers are imitated -------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_only_rewarded_rows_are_trained(weighting):
    """The minibatch is exactly the answers whose reward reaches the threshold, each with its own
    prompt, in order; they share the whole weight; all of them count in the logged reward (RFT
    2308.01825; DFT 2508.05629, section 4.3)."""
    algo, log = make_rft(weighting=weighting), Log()
    everything = sampled(algo.model, algo)
    [minibatch] = minibatches(algo, log=log)
    good = [row for row, value in zip(everything, values(everything)) if value == 1]
    assert texts(minibatch) == good and 4 < len(good) < 16
    line = log.line()
    assert line["kept"] == len(good) / 16 and line["reward"] == sum(values(everything)) / 16
    n = minibatch["completion_mask"].sum()
    assert same(minibatch["weights"], minibatch["completion_mask"] / n, 1e-7)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("threshold, at_least", [(0.5, 0.5), (0.6, 0.75), (1.0, 1.0), (-1.0, 0.0)])
def test_the_threshold_is_the_configured_one(weighting, threshold, at_least):
    """Rewards of 0, 1/4, ..., 1: what reaches the threshold is kept, the threshold itself included,
    and what misses it by a rounding error, as weighted sums of rewards do, is no worse."""
    def rounded(prompts, completions, **columns):
        return [value - 1e-7 for value in graded(prompts, completions)]
    algo = make_rft(rounded, threshold=threshold, weighting=weighting)
    everything = sampled(algo.model, algo)
    [minibatch] = minibatches(algo)
    good = [row for row, value in zip(everything, values(everything, graded)) if value >= at_least]
    assert texts(minibatch) == good and 0 < len(good)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_where_nothing_is_right_nothing_is_learned(weighting):
    """No answer reaches the threshold: there is no minibatch, and so no update. What was sampled is
    logged all the same."""
    algo, log = make_rft(lambda p, c, **columns: [0.0] * len(p), weighting=weighting), Log()
    assert minibatches(algo, log=log) == []
    line = log.line()
    assert line["kept"] == line["reward"] == 0 and log.totals["sampled_tokens"] > 0


def test_best_keeps_one_answer_of_every_group():
    """--keep best: the first of the best of each group of 4, right or not (RAFT, 2304.06767)."""
    algo, log = make_rft(graded, keep="best"), Log()
    everything = sampled(algo.model, algo)
    groups = [everything[i:i + 4] for i in range(0, 16, 4)]
    [minibatch] = minibatches(algo, log=log)
    best = [group[values(group, graded).index(max(values(group, graded)))] for group in groups]
    assert texts(minibatch) == best and log.line()["kept"] == 4 / 16


def test_awr_drops_no_answer():
    """--weighting awr: the rows weigh exp(advantage in their own group / awr_beta), and each of
    their tokens as much, over the sum (AWR, 1910.00177); the minibatch has all 16."""
    algo, log = make_rft(graded, weighting="awr", awr_beta=0.5), Log()
    everything = sampled(algo.model, algo)
    rewards = torch.tensor(values(everything, graded)).view(4, 4)
    by_hand = ((rewards - rewards.mean(1, keepdim=True)) / 0.5).exp().flatten()
    [minibatch] = minibatches(algo, log=log)
    assert texts(minibatch) == everything and log.line()["kept"] == 1
    tokens = by_hand[:, None] * minibatch["completion_mask"]
    assert same(minibatch["weights"], tokens / tokens.sum(), 1e-6) and len(by_hand.unique()) > 4


def test_kept_counts_the_answers_that_are_imitated():
    """A share of all that were sampled: with awr all, with best one of a group."""
    for settings, share in ((dict(), None), (dict(weighting="dft"), None),
                            (dict(keep="best"), 4 / 16), (dict(weighting="awr"), 1)):
        algo, log = make_rft(**settings), Log()
        batch = sample(algo, log=log)
        right = sum(values(texts(batch))) / 16
        list(algo.minibatches(batch, log))
        assert log.line()["kept"] == (right if share is None else share) and 0.25 < right < 1


@pytest.mark.parametrize("settings", [dict(), dict(keep="best"), dict(weighting="awr"),
                                      dict(weighting="dft")])
@pytest.mark.usefixtures("float64")
def test_self_training_is_invariant_to_micro_batches_padding_and_order(settings):
    """The loss is the weighted mean of the nll, with dft times each token's probability, whichever
    rows were left out and however the rest is split."""
    algo = make_rft(graded, **settings)
    batch = sample(algo)
    [minibatch] = algo.minibatches(batch, Log())
    loss, gradient, _ = check_invariance(algo, minibatch)
    rewards = torch.tensor(values(texts(batch), graded)).view(4, 4)
    rows = (rewards == 1).double()
    if "keep" in settings:
        rows = torch.eye(4)[rewards.argmax(1)]
    if settings == dict(weighting="awr"):
        rows = ((rewards - rewards.mean(1, keepdim=True)) / 0.3).exp()
    weights = rows.flatten()[:, None] * batch["completion_mask"]                # (16, T)
    weights = weights / weights.sum()
    whole = loss_and_gradient(algo, {**batch, "weights": weights})
    assert same(loss, whole[0]) and same(gradient, whole[1])
    ids = batch["completion_ids"][..., None]
    lps = read(algo.model, batch).log_softmax(-1).gather(-1, ids)[..., 0]
    p = lps.exp() if settings == dict(weighting="dft") else 1
    assert same(loss, -(weights * p * lps).sum())


# -- rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rounds, starts", [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]),
                                            (6, [0, 1, 2, 3, 4, 5])])
def test_the_sampler_is_the_policy_at_the_start_of_the_round(weighting, rounds, starts):
    """It becomes the current policy when a round starts, stays that while the policy moves on, and
    is what writes the answers: one round is RFT, a round every step RAFT (2304.06767)."""
    algo = make_rft(rounds=rounds, weighting=weighting)
    for step in range(6):
        move(algo.model, 0.1, seed=step)
        before = copy.deepcopy(algo.sampler.state_dict())
        batch = sample(algo, step=step)
        renewed = algo.sampler.state_dict()
        assert same_weights(renewed, algo.model.state_dict()) == (step in starts)
        assert same_weights(renewed, before) == (step not in starts)
        written = sampled(algo.sampler, algo)
        assert texts(batch) == written
        [minibatch] = algo.minibatches(batch, Log())
        assert texts(minibatch) == [row for row in written if values([row]) == [1]]
    if len(starts) < 6:
        assert sampled(algo.model, algo) != written


@pytest.mark.parametrize("rounds", [4, 5, 7, 10, 25])
def test_there_are_as_many_rounds_as_asked_for(rounds):
    """Whether or not rounds divides max_steps: the sampler is renewed `rounds` times (at most once
    a step), at intervals that differ by at most a step."""
    algo, starts = make_rft(max_steps=10, rounds=rounds), []
    for step in range(10):
        move(algo.model, 0.01, seed=step)
        sample(algo, step=step)
        if same_weights(algo.sampler.state_dict(), algo.model.state_dict()):
            starts.append(step)
    gaps = [b - a for a, b in zip(starts, starts[1:] + [10])]
    assert len(starts) == min(rounds, 10) and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("restart", [True, False])
def test_restart_trains_the_start_model_anew_in_every_round(restart):
    """STaR and ReST-EM: when a round starts, what was trained becomes the sampler, the policy is
    the start model again, and the optimizer has no memory; in between, and without restart, both go
    on (2203.14465; 2312.06585)."""
    algo = make_rft(rounds=3, restart=restart)
    start = copy.deepcopy(algo.ref_model.state_dict())
    for step in range(6):
        trained, remembered = copy.deepcopy(algo.model.state_dict()), len(algo.optimizer.state)
        batch = sample(algo, step=step)
        starts_anew = restart and step in (2, 4)
        assert same_weights(start if starts_anew else trained, algo.model.state_dict())
        assert len(algo.optimizer.state) == (0 if starts_anew else remembered)
        assert (remembered > 0) == (step > 0)
        if step in (0, 2, 4):
            assert same_weights(trained, algo.sampler.state_dict())
        [minibatch] = algo.minibatches(batch, Log())
        update(algo, minibatch)
        assert not same_weights(start, algo.model.state_dict())
    assert same_weights(start, algo.ref_model.state_dict())


@pytest.mark.parametrize("settings, bars", [
    (dict(rounds=3, threshold_start=0.2), [0.25, 0.25, 0.75, 0.75, 1, 1]),      # .2, .6 and 1
    (dict(rounds=2, threshold_start=0.0, threshold=0.5), [0, 0, 0, 0.5, 0.5, 0.5]),
    (dict(rounds=3, threshold=0.75), [0.75] * 6),
    (dict(rounds=1, threshold_start=0.5), [0.5] * 6),
])
def test_the_bar_rises_from_round_to_round(settings, bars):
    """Linearly, from threshold_start in the first round to threshold in the last, and not within a
    round (ReST, 2308.08998, section 3); without a start it is the same throughout. Rewards are
    multiples of 1/4."""
    algo = make_rft(graded, reward="brevity", **settings)
    for step, bar in enumerate(bars):
        [minibatch] = minibatches(algo, step=step, seed=step)
        written = sampled(algo.sampler, algo, seed=step)
        good = [row for row in written if values([row], graded)[0] >= bar]
        assert texts(minibatch) == good
        assert 0 < len(good) < 16 or bar == 0


@pytest.mark.parametrize("rounds", [4, 7, 25])
def test_the_bar_reaches_its_full_height(rounds):
    """In the last step the answers are held to `threshold`, whether or not rounds divides
    max_steps."""
    algo = make_rft(graded, reward="brevity", max_steps=10, rounds=rounds, threshold_start=0.0)
    [minibatch] = minibatches(algo, step=9)
    written = sampled(algo.sampler, algo)
    assert texts(minibatch) == [row for row in written if values([row], graded) == [1]]


# -- sampling, networks, examples -----------------------------------------------------------------


@pytest.mark.parametrize("temperature, num_generations", [(1.0, 4), (0.6, 4), (1.0, 6)])
def test_the_sampler_writes_the_answers(temperature, num_generations):
    """Between two renewals the sampler, not the policy: num_generations answers to each prompt, at
    that temperature, with the random numbers of the step's generator."""
    algo, log = make_rft(temperature=temperature, num_generations=num_generations), Log()
    move(algo.sampler, 0.2, seed=8)
    batch = sample(algo, step=1, log=log)

    def written(model):
        generator = torch.Generator().manual_seed(2)
        return texts(data.rollout(model, algo, PROBLEMS, generator, None))
    assert texts(batch) == written(algo.sampler) != written(algo.model)
    assert len(batch["rewards"]) == 4 * num_generations
    assert log.line()["reward"] == pytest.approx(sum(values(texts(batch)))
                                                 / (4 * num_generations))


def test_sampling_has_the_configured_temperature():
    """At temperature .5 the answers are those of a rollout at .5, and not those at 1."""
    algo = make_rft(lambda p, c, **columns: [1.0] * len(p), temperature=0.5)
    found = texts(minibatches(algo)[0])
    assert found == sampled(algo.model, algo, temperature=0.5) != sampled(algo.model, algo)


def test_networks_are_trained_or_frozen():
    """The model is trained; the start and the sampler are frozen copies of it, saved with it."""
    algo = make_rft()
    networks = dict(algo.named_children())
    assert set(networks) == {"model", "ref_model", "sampler"} and algo.rows_together == 1
    for name, network in networks.items():
        assert same_weights(tiny_model().state_dict(), network.state_dict())
        assert all(p.requires_grad == (name == "model") for p in network.parameters())
    assert len({id(network) for network in networks.values()}) == 3
    assert {name.split(".")[0] for name in algo.state_dict()} == set(networks)


def test_rft_draws_as_many_problems_as_its_flag_says():
    """Drawn by the seed, from the training split: problems, not demonstrations."""
    task = tasks.Chain(2, 3)
    algo = make(RFT, task=task, num_prompts=7, seed=3)
    assert algo.examples() == task.problems("train", 7, 3)
    assert algo.examples() != make(RFT, task=task, num_prompts=7, seed=4).examples()


@pytest.mark.parametrize("reward, columns", [
    ("verifier", ("prompt", "answer")), ("brevity,verifier", ("prompt", "answer")),
    ("brevity,majority", ("prompt",)), ("majority,brevity", ("prompt",)),
])
def test_a_majority_needs_no_answers_in_the_file(reward, columns):
    """Only the verifier asks for an `answer` column; a majority vote asks for prompts alone."""
    assert RFTConfig(reward=reward).columns() == [columns]


def test_rewards_and_their_weights_reach_the_class():
    """--reward and --reward_weights."""
    algo = make(RFT, reward="brevity,verifier", reward_weights="0.5,2")
    assert list(algo.rewards.functions) == ["brevity", "verifier"]
    assert algo.rewards.weights == [0.5, 2]


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    *[({name: 0}, f"--{name} 0: a number of at least 1")
      for name in ("num_generations", "num_prompts", "rounds")],
    *[({name: 0.0}, f"--{name} 0.0: a number above 0") for name in ("temperature", "awr_beta")],
    (dict(threshold_start=0.2), "graded reward"),
    (dict(threshold_start=0.0, reward="format"), "graded reward"),
    (dict(threshold_start=0.0, reward="majority"), "graded reward"),
    (dict(threshold_start=0.0, reward="brevity", keep="best"), "--keep threshold"),
    (dict(threshold_start=0.0, reward="brevity", weighting="awr"), "--keep threshold"),
])
def test_wrong_settings_are_refused(settings, message):
    """Each is an InputError that says what is wrong, before anything is sampled."""
    with pytest.raises(InputError, match=message):
        RFTConfig(**settings)


def test_settings_at_the_edge_are_accepted():
    """1 where 1 is the least, a rising bar under a graded reward."""
    RFTConfig(threshold_start=0.0, reward="verifier,brevity", rounds=1, num_generations=1,
              num_prompts=1)
    RFTConfig(threshold_start=-1.0, reward="model")


def test_token_weights_keep_the_precision_of_the_row_weights():
    """Of float32 row weights float32, of float64 ones float64: thirds that are right to 16
    digits."""
    mask = torch.tensor([[True, True, True]])
    assert rft.token_weights(mask, torch.ones(1)).dtype == torch.float32
    found = rft.token_weights(mask, torch.ones(1).double())
    assert found.dtype == torch.float64 and (found == 1 / 3).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_rounding_error_below_the_threshold_is_forgiven(weighting):
    """A weighted sum of rewards may miss it by 1e-6, and by no more; so in the class."""
    rewards = 1 - torch.tensor([[0.0, 0.9e-6, 1.5e-6, 1e-3]], dtype=torch.float64)
    assert rft.kept(rewards).tolist() == [[1, 1, 0, 0]]
    for missing, share in ((0.8e-6, 1), (1.5e-6, 0)):
        def near(prompts, completions, missing=missing, **columns):
            return [1 - missing] * len(prompts)
        log = Log()
        found = minibatches(make_rft(near, weighting=weighting), log=log)
        assert log.line()["kept"] == len(found) == share


def test_the_best_of_each_group():
    """Groups of 3 answers to 4 prompts: one of each group of 3 is kept, not one of each 4."""
    algo, log = make_rft(keep="best", num_generations=3), Log()
    [minibatch] = minibatches(algo, log=log)
    assert minibatch["prompt_index"].tolist() == [0, 1, 2, 3] and log.line()["kept"] == 4 / 12


def test_a_round_a_step_restarts_every_step():
    """With as many rounds as steps the policy is the start model again at every step, and the
    optimizer remembers nothing; the sampler is what had been trained."""
    algo = make_rft(rounds=6, restart=True)
    sample(algo, step=0)
    for step in range(1, 4):
        move(algo.model, 0.1, seed=step)
        trained = copy.deepcopy(algo.model.state_dict())
        algo.optimizer.state["something"] = "remembered"
        sample(algo, step=step)
        assert same_weights(algo.ref_model.state_dict(), algo.model.state_dict())
        assert same_weights(trained, algo.sampler.state_dict()) and not algo.optimizer.state


def test_other_rules_than_a_threshold_need_no_start_of_it():
    """--keep best and --weighting awr are accepted as they are; a start with either is refused, and
    with the reward that is graded accepted."""
    for flags in (dict(keep="best"), dict(weighting="awr")):
        RFTConfig(reward="brevity", **flags)
        with pytest.raises(InputError, match="--threshold_start is for --keep threshold"):
            RFTConfig(reward="brevity", threshold_start=0.0, **flags)
    RFTConfig(reward="brevity", threshold_start=0.0)
