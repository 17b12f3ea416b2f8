"""
What the DPO class does around its loss: which answers it samples and pairs, when sampler and anchor
are renewed, what a file's lines are taken for, and how z0 of kto is measured.
"""

import copy
import math

import pytest
import torch

import data
import tasks
from dpo import DPO, DPOConfig
from harness.log import Log
from rm import RM
from tiny import (PAIRS, PROBLEMS, Letters, coin, file_task, make, move, same_weights, texts,
                  tiny_model)

SINGLES = [{"prompt": p, "completion": c, "label": label} for p, c, label in (
    ("7+5=", "2", True), ("1-2*3=", "1-2=9;9*3=7", False), ("9*9=", "8", True))]


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def make_dpo(**settings):
    """DPO on problems, judged by the coin, in groups of 4; the sampler is no copy."""
    algo = make(DPO, coin, **{"num_generations": 4, **settings})
    move(algo.sampler, 0.2, seed=8)
    return algo


def from_pairs(**settings):
    """DPO that is given its pairs, or its labelled answers, as a batch."""
    algo = make(DPO, **settings)
    algo.from_file = True
    return algo


def pair_batch():
    return data.collate_pairs(PAIRS, Letters(), Log())


# -- networks, examples, columns ------------------------------------------------------------------


@pytest.mark.parametrize("sync_ref", [False, True])
def test_networks_are_trained_or_frozen(sync_ref):
    """The model is trained; the reference, the sampler and, with --sync_ref, the anchor are frozen
    copies of the start, each of its own, and are saved. Without it the anchor is the reference."""
    algo = make(DPO, ref_seed=None, sync_ref=sync_ref)
    networks = {name: getattr(algo, name) for name in ("model", "ref_model", "sampler", "anchor")}
    for name, network in networks.items():
        assert same_weights(tiny_model().state_dict(), network.state_dict())
        assert all(p.requires_grad == (name == "model") for p in network.parameters())
    assert (algo.anchor is algo.ref_model) == (not sync_ref)
    assert len({id(network) for network in networks.values()}) == 3 + sync_ref
    saved = {"model", "ref_model", "sampler"} | ({"moving_ref_model"} if sync_ref else set())
    assert {name.split(".")[0] for name in algo.state_dict()} == saved
    assert algo.rows_together == 2 and make(DPO, loss_type="kto").rows_together == 1


def test_dpo_draws_as_many_problems_as_its_flag_says():
    """Drawn by the seed, from the training split."""
    task = tasks.Chain(2, 3)
    algo = make(DPO, task=task, num_prompts=9, seed=4)
    assert algo.examples() == task.problems("train", 9, 4)
    assert algo.examples() != make(DPO, task=task, num_prompts=9, seed=5).examples()


@pytest.mark.parametrize("settings, columns", [
    (dict(), [("prompt", "chosen", "rejected"), ("prompt", "answer")]),
    (dict(reward="majority"), [("prompt", "chosen", "rejected"), ("prompt",)]),
    (dict(reward="brevity,verifier"), [("prompt", "chosen", "rejected"), ("prompt", "answer")]),
    (dict(loss_type="kto"), [("prompt", "chosen", "rejected"), ("prompt", "completion", "label"),
                             ("prompt", "answer")]),
])
def test_columns_that_a_file_must_have(settings, columns):
    """In the order in which they are tried: what is there decides what a line is taken for."""
    assert DPOConfig(**settings).columns() == columns


def test_rewards_and_their_weights_reach_the_class():
    """--reward and --reward_weights."""
    algo = make(DPO, reward="brevity,verifier", reward_weights="0.5,2")
    assert list(algo.rewards.functions) == ["brevity", "verifier"]
    assert algo.rewards.weights == [0.5, 2]


@pytest.mark.parametrize("loss_type, columns, single, from_file", [
    ("sigmoid", ("prompt", "chosen", "rejected"), False, True),
    ("sigmoid", ("prompt", "chosen", "rejected", "answer", "label"), False, True),
    ("sigmoid", ("prompt", "answer"), False, False),
    ("sigmoid", ("prompt", "answer", "completion", "label"), False, False),
    ("kto", ("prompt", "chosen", "rejected"), False, True),
    ("kto", ("prompt", "completion", "label"), True, True),
    ("kto", ("prompt", "chosen", "rejected", "completion", "label"), False, True),
    ("kto", ("prompt", "answer"), False, False),
])
def test_what_the_lines_of_a_file_are_taken_for(loss_type, columns, single, from_file):
    """Preferences before labelled answers before problems, by the columns of the lines; only
    problems need rewards."""
    row = {"prompt": "7+5=", "chosen": "2", "rejected": "3", "completion": "2", "label": True,
           "answer": "2"}
    task = file_task([{c: row[c] for c in columns}] * 3)
    algo = make(DPO, task=task, loss_type=loss_type)
    assert (algo.single, algo.from_file) == (single, from_file)
    assert hasattr(algo, "rewards") == hasattr(algo, "sampler") == (not from_file)
    assert algo.rows_together == (1 if loss_type == "kto" else 2)
    if from_file:
        batch = algo.sample(task.train, None, 0, Log())
        rows = [("7+5=", "2")] * 3 if single else [("7+5=", "2"), ("7+5=", "3")] * 3
        assert texts(batch) == rows
        assert batch["label"].tolist() == ([True] * 3 if single else [True, False] * 3)
        [minibatch] = algo.minibatches(batch, Log())
        assert texts(minibatch) == rows


# -- who sampled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, num_generations", [(1.0, 4), (0.6, 4), (1.0, 6)])
def test_the_sampler_writes_the_answers(temperature, num_generations):
    """Between two renewals the sampler, not the policy: num_generations answers to each prompt, at
    that temperature, with the random numbers of the step's generator."""
    algo, log = make_dpo(temperature=temperature, num_generations=num_generations,
                         sync_steps="2"), Log()
    batch = algo.sample(PROBLEMS, generator(), 1, log)

    def written(model):
        return texts(data.rollout(model, algo, PROBLEMS, generator(), None))
    assert texts(batch) == written(algo.sampler) != written(algo.model)
    assert len(batch["rewards"]) == 4 * num_generations
    right = sum(coin(*zip(*texts(batch))))
    assert log.line()["reward"] == pytest.approx(right / (4 * num_generations))
    [minibatch] = algo.minibatches(batch, log)
    assert set(texts(minibatch)) <= set(texts(batch))
    assert len(minibatch["prompt_index"]) >= 4


@pytest.mark.parametrize("sync_ref", [False, True])
@pytest.mark.parametrize("sync_steps, renewals", [("1", [0, 1, 2, 3, 4]), ("2", [0, 2, 4]),
                                                  ("3", [0, 3]), ("inf", [0])])
@pytest.mark.parametrize("from_file", [False, True])
def test_dpo_renews_sampler_and_reference(sync_steps, renewals, sync_ref, from_file):
    """At steps 0, s, 2s, ... the sampler becomes the policy, and with --sync_ref so does the
    anchor, also where a file brings the pairs; in between, and otherwise, both stay. The start
    model stays what it was."""
    task = file_task(PAIRS) if from_file else tasks.Chain(2, 3)
    algo = make(DPO, task=task, num_generations=4, sync_steps=sync_steps, sync_ref=sync_ref)
    examples = PAIRS if from_file else PROBLEMS
    lagging = {"ref_model": False, "anchor": sync_ref} | ({} if from_file else {"sampler": True})
    for step in range(5):
        move(algo.model, 0.1, seed=step)
        policy = copy.deepcopy(algo.model.state_dict())
        before = {name: copy.deepcopy(getattr(algo, name).state_dict()) for name in lagging}
        algo.sample(examples, generator(), step, Log())
        for name, moves in lagging.items():
            due = policy if moves and step in renewals else before[name]
            assert same_weights(due, getattr(algo, name).state_dict()), (name, step)
        assert same_weights(policy, algo.model.state_dict())


# -- pairs ----------------------------------------------------------------------------------------


def test_rso_accepts_and_chooses_by_different_random_numbers(monkeypatch):
    """--pair_sampling rso with graded rewards 1, .5 and 0 and temperature 2: those of .5 and 0 are
    accepted with p = e^-.25 and q = e^-.5, apart from each other, and of two accepted either is
    rejected half of the time. So .5 is rejected in p (1 - q) + p q / 2 = .543 of the groups and 0
    in .370. Were the numbers of acceptance used again to choose, it would be .595 and .318."""
    n, algo = 20_000, make_dpo(pair_sampling="rso", rso_beta=2.0, num_generations=3)
    answers = {"prompt_ids": torch.full((n, 1), 16),
               "prompt_mask": torch.ones(n, 1, dtype=torch.bool),
               "completion_ids": torch.arange(3 * n)[:, None] % 3,
               "completion_mask": torch.ones(3 * n, 1, dtype=torch.bool),
               "prompt_index": torch.arange(n).repeat_interleave(3),
               "rewards": torch.tensor([1.0, 0.5, 0.0]).repeat(n)}
    monkeypatch.setattr(data, "rollout", lambda *args: dict(answers))
    log = Log()
    pairs = algo.pairs(algo.sample([None] * n, generator(), 0, log), log)
    chosen, rejected = pairs["completion_ids"][0::2, 0], pairs["completion_ids"][1::2, 0]
    p, q = math.exp(-0.25), math.exp(-0.5)
    shares = [(rejected == row).sum().item() / n for row in (1, 2)]
    assert (chosen == 0).all()
    assert shares == pytest.approx([p * (1 - q / 2), q * (1 - p / 2)], abs=0.015)
    assert log.line()["skipped_pairs"] == pytest.approx((1 - p) * (1 - q), abs=0.015)


def test_pairs_are_drawn_by_the_generator_of_the_step(monkeypatch):
    """Whatever the state of the global generator: the step's generator alone decides. Another seed,
    another choice among the same answers."""
    algo, found = make_dpo(), []
    answers = data.rollout(algo.sampler, algo, PROBLEMS, generator(), None)
    monkeypatch.setattr(data, "rollout", lambda *args: dict(answers))
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(len(found))
        batch = algo.sample(PROBLEMS, generator(seed), 1, Log())
        found.append(texts(algo.minibatches(batch, Log())[0]))
    assert found[0] == found[1] and len(set(map(str, found))) > 2


# -- kto: z0 --------------------------------------------------------------------------------------


def spy_on_score(algo):
    """A list that collects what algo.score is asked: (model, batch)."""
    seen, score = [], algo.score

    def spy(model, batch):
        seen.append((model, batch))
        return score(model, batch)
    algo.score = spy
    return seen


def test_kto_reads_each_answer_after_another_prompt():
    """z0 is measured on answers after other rows' prompts: of single answers that of two rows
    before, with two rows the other's; pairs share a prompt, so that of the pair before."""
    algo = make(DPO, task=file_task(SINGLES), loss_type="kto")
    seen = spy_on_score(algo)
    prompts, answers = zip(*((e["prompt"], e["completion"]) for e in SINGLES))
    for n, others in ((3, [1, 2, 0]), (2, [1, 0]), (1, [0])):
        seen.clear()
        algo.minibatches(algo.sample(SINGLES[:n], None, 0, Log()), Log())
        other = [(prompts[i], answer) for i, answer in zip(others, answers)]
        own = list(zip(prompts, answers))[:n]
        assert [(model, texts(batch)) for model, batch in seen] == [
            (algo.ref_model, own), (algo.model, other), (algo.ref_model, other)]
    seen.clear()
    algo.minibatches(pair_batch(), Log())
    before = {pair["prompt"]: PAIRS[i - 1]["prompt"] for i, pair in enumerate(PAIRS)}
    own, first, second = (texts(batch) for _, batch in seen)
    assert first == second == [(before[p], c) for p, c in own]


def test_kto_keeps_the_own_prompt_where_another_does_not_fit():
    """block_size 32: an answer of 24 tokens and its <end> after a prompt of 7 fits exactly, after
    one of 8 it does not, and is read after its own."""
    algo = from_pairs(loss_type="kto")
    assert algo.model.config.block_size == 32
    seen = spy_on_score(algo)
    for extra, read_after in ((0, [1, 0]), (1, [0, 0])):
        rows = [{"prompt": "1", "completion": "2" * 24},
                {"prompt": "1" * (6 + extra), "completion": "2"}]    # and the <end> before it
        batch = {**data.collate(rows, Letters()), "label": torch.tensor([True, False])}
        seen.clear()
        algo.minibatches(batch, Log())
        assert [batch["prompt_index"].tolist() for _, batch in seen[1:]] == [read_after] * 2


def test_z0_is_beta_times_the_mean_and_never_below_0():
    """By hand from log-probabilities of 3 and 1 against 0.5 and 0.5: beta (2.5 + .5) / 2; the other
    way round 0. Every row gets it."""
    for policy, reference, z0 in (([3.0, 1.0], [0.5, 0.5], 0.2 * 1.5),
                                  ([0.5, 0.5], [3.0, 1.0], 0.0)):
        algo = from_pairs(loss_type="kto", beta=0.2)
        logps = {algo.model: torch.tensor(policy), algo.ref_model: torch.tensor(reference)}
        algo.score = lambda model, batch, logps=logps: logps[model]
        batch = data.collate(SINGLES[:2], Letters())
        batch["label"] = torch.tensor([True, False])
        [minibatch] = algo.minibatches(batch, Log())
        assert minibatch["z0"].tolist() == pytest.approx([z0] * 2)


def test_a_tie_is_no_right_order():
    """Where policy and reference are one model, and where a reward model's head is 0, every margin
    is exactly 0: no pair counts as ranked right, none as wrong by a margin."""
    judge = make(RM)
    judge.from_file = True
    for algo, names in ((from_pairs(ref_seed=None), ("rewards/accuracies", "rewards/margins")),
                        (judge, ("accuracy", "margin"))):
        log = Log()
        [minibatch] = algo.minibatches(pair_batch(), log)
        algo.loss(minibatch, log)
        assert [log.means[name] for name in names] == [(0, 3), (0, 3)]
