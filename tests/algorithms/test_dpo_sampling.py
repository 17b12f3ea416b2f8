"""
Which answers DPO trains on: pairs of the policy's own answers, a file's pairs, a file's single
answers; and which settings are refused.
"""

import math

import pytest
import torch

import data
from dpo import DPOConfig
from harness.errors import InputError
from harness.log import Log
from tiny import PROBLEMS, coin, minibatches, texts
from tiny_dpo import DRAW, PAIRS, SINGLES, make_dpo, minibatch_of, sample


def skipped(**settings):
    """The share of groups without a pair."""
    log = Log()
    minibatches(make_dpo(**settings), seed=DRAW, log=log)
    return log.line()["skipped_pairs"]


@pytest.mark.parametrize("pair_selection", ["random", "best_worst"])
def test_pairs_of_the_policys_own_answers(pair_selection):
    """Rows come chosen, rejected, chosen, ... of one prompt each, the chosen one rewarded more,
    both as sampled; the first problem, always right, has no contrast and is counted as skipped
    (2506.21495, section 2)."""
    algo, log = make_dpo(pair_selection=pair_selection), Log()
    minibatch = minibatch_of(algo, log=log)
    pairs = texts(minibatch)
    assert len(pairs) == 6 and "7+5=" not in dict(pairs)
    assert minibatch["label"].tolist() == [True, False] * 3
    assert [coin([p], [c])[0] for p, c in pairs] == [1, 0] * 3 == minibatch["rewards"].tolist()
    prompts = [e["prompt"] for e in PROBLEMS[1:]]
    assert [p for p, _ in pairs[0::2]] == [p for p, _ in pairs[1::2]] == prompts
    batch = data.collate([{"prompt": e["prompt"]} for e in PROBLEMS], algo.tokenizer)
    samples = algo.model.generate(batch["prompt_ids"], batch["prompt_mask"],
                                  algo.task.max_new_tokens, 16, 17, 4,
                                  generator=torch.Generator().manual_seed(DRAW))
    sampled = {(PROBLEMS[b // 4]["prompt"], algo.tokenizer.decode(ids))
               for b, ids in enumerate(samples.completion_ids.tolist())}
    assert set(pairs) <= sampled
    assert log.totals["sampled_tokens"] == samples.completion_mask.sum()
    assert log.line()["skipped_pairs"] == 1 / 4


def test_the_uniforms_differ_from_step_to_step():
    """Another generator, another draw of the answers and of the pair."""
    algo, log = make_dpo(), Log()
    drawn = []
    for seed in (1, 1, 2):
        batch = algo.sample(PROBLEMS, torch.Generator().manual_seed(seed), 0, log)
        [minibatch] = algo.minibatches(batch, log)
        drawn.append((texts(minibatch), batch["uniforms"].tolist()))
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[2][0] and drawn[0][1] != drawn[2][1]


def test_settings_reach_the_sampling():
    """A temperature near 0 makes the answers of a group alike, so that no pair is left;
    --num_generations is how many there are; rso with a small beta accepts right answers alone, as
    its help says, and leaves no pair either."""
    assert skipped(temperature=1e-4) == 1
    assert len(sample(make_dpo(num_generations=6))["rewards"]) == 24
    assert skipped(pair_sampling="rso", rso_beta=1e-3) == 1
    assert skipped(pair_sampling="rso", rso_beta=1e3) == 1 / 4


def test_groups_without_contrast_are_skipped():
    """Where no group has a contrast there is no update at all."""
    algo, log = make_dpo(), Log()
    always_right = PROBLEMS[:1] * 3
    assert list(algo.minibatches(sample(algo, always_right, log), log)) == []
    assert log.line()["skipped_pairs"] == 1


def test_preference_pairs_of_a_file():
    """Rows chosen, rejected, ... as the file has them, each with its <end>; a pair of equal
    answers, which would cost log 2 forever and teach nothing, is counted and skipped (rlhf-book
    issue 503)."""
    algo, log = make_dpo(PAIRS), Log()
    batch = data.collate_pairs(PAIRS, algo.tokenizer, log)
    different = [e for e in PAIRS if e["prompt"] != "9*9="]
    expected = [(e["prompt"], e[name]) for e in different for name in ("chosen", "rejected")]
    assert texts(batch) == expected and batch["label"].tolist() == [True, False] * 4
    assert log.line()["skipped_pairs"] == 1 / 5
    ends = batch["completion_ids"][torch.arange(8), batch["completion_mask"].sum(-1) - 1]
    assert (ends == algo.tokenizer.eos_id).all()
    minibatch = minibatch_of(algo, PAIRS, log)
    assert texts(minibatch) == expected and minibatch["label"].tolist() == [True, False] * 4
    assert log.line() == {"skipped_pairs": 1 / 5}   # nothing is sampled
    assert minibatches(algo, PAIRS[2:3] * 2, log=log) == [] and log.line() == {"skipped_pairs": 1}


def test_single_answers_of_a_file():
    """For kto the file's answers come one by one with their labels; nothing is sampled and nothing
    skipped."""
    algo, log = make_dpo(SINGLES, loss_type="kto"), Log()
    minibatch = minibatch_of(algo, SINGLES, log)
    assert texts(minibatch) == [(e["prompt"], e["completion"]) for e in SINGLES]
    assert log.line() == {} and log.totals == {} and algo.rows_together == 1
    assert minibatch["label"].tolist() == [e["label"] for e in SINGLES]


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_pairs_are_never_separated(loss_type):
    """Micro-batches of 1, 2 and 3 rows all hold one pair, of 4 and 5 two: chosen and rejected of
    the same prompt."""
    algo = make_dpo(loss_type=loss_type)
    minibatch = minibatch_of(algo)
    for size, sizes in ((1, [2, 2, 2]), (2, [2, 2, 2]), (3, [2, 2, 2]), (4, [4, 2]), (5, [4, 2]),
                        (6, [6]), (99, [6])):
        parts = data.split(minibatch, size, algo.rows_together)
        assert [len(part["label"]) for part in parts] == sizes
        for part in parts:
            pairs = texts(part)
            assert part["label"].tolist() == [True, False] * (len(pairs) // 2)
            assert [p for p, _ in pairs[0::2]] == [p for p, _ in pairs[1::2]]
        assert sum(float(part["weights"][0::2].sum()) for part in parts) == pytest.approx(1)


# -- settings that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize("settings, reason", [
    (dict(sync_steps="0"), "--sync_steps 0: a whole number of updates, or inf"),
    (dict(sync_steps="-1"), "--sync_steps -1: "), (dict(sync_steps="1.5"), "--sync_steps 1.5: "),
    (dict(sync_steps="often"), "--sync_steps often: "), (dict(sync_steps=""), "--sync_steps : "),
    (dict(num_generations=0), "--num_generations 0: "),
    (dict(num_generations=1), "--num_generations 1: a pair needs at least 2 answers"),
    (dict(num_prompts=0), "--num_prompts 0: "),
    (dict(beta=0.0), "--beta 0.0: a number above 0"),
    (dict(beta=-1.0), "--beta -1.0: a number above 0"),
    (dict(temperature=0.0), "--temperature 0.0: "), (dict(rso_beta=0.0), "--rso_beta 0.0: "),
    (dict(simpo_gamma=-0.1), "--simpo_gamma -0.1: "),
    (dict(rpo_alpha=-1.0), "--rpo_alpha -1.0: "),
    (dict(desirable_weight=-1.0), "--desirable_weight -1.0: "),
    (dict(undesirable_weight=-1.0), "--undesirable_weight -1.0: "),
    (dict(label_smoothing=0.5), "--label_smoothing 0.5: a number below 0.5"),
    (dict(label_smoothing=-0.1), "--label_smoothing -0.1: "),
    (dict(label_smoothing=0.1, loss_type="hinge"),
     "--label_smoothing is for --loss_type sigmoid and robust"),
    (dict(rpo_alpha=1.0, loss_type="kto"), "--rpo_alpha is for pairs; --loss_type kto has none"),
    (dict(rpo_alpha=1.0, loss_type="cpo"), "--loss_type cpo has the chosen answer's nll already"),
    (dict(rpo_alpha=1.0, loss_type="orpo"), "--loss_type orpo has the chosen answer's nll already"),
])
def test_impossible_settings_are_refused(settings, reason):
    """One line that names the flag, its value and what would do."""
    with pytest.raises(InputError) as error:
        DPOConfig(**settings)
    assert str(error.value).startswith("--") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_on_the_edge_are_accepted():
    """What is just inside the range passes."""
    for sync_steps, steps in (("inf", math.inf), ("12", 12), ("1", 1)):
        assert float(DPOConfig(sync_steps=sync_steps).sync_steps) == steps
    for settings in (dict(label_smoothing=0.49), dict(label_smoothing=0.49, loss_type="robust"),
                     dict(simpo_gamma=0.0), dict(rpo_alpha=1.0, loss_type="simpo"),
                     dict(desirable_weight=0.0, undesirable_weight=0.0, loss_type="kto"),
                     dict(num_generations=2)):
        DPOConfig(**settings)
