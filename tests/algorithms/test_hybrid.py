"""
Hybrids on a tiny model: every recipe of the docstring's table is independent of how its batch is
split, padded and ordered; who wrote a token decides how it is scored; what is logged is true.
"""

import pytest
import torch

import data
import tasks
from harness import tokens
from harness.errors import InputError
from harness.log import Log
from sft import SFT
from tiny import (PROBLEMS, Letters, check_invariance, coin, loss_and_gradient, make, minibatches,
                  move, read, same, same_weights, sample, texts, update, weights_of)
from tiny_hybrid import RECIPES, hard, make_hybrid


def wrong(prompts, completions, **columns):
    return [0.0] * len(prompts)


# -- the recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_batches_may_be_split_padded_and_shuffled(float64, recipe):
    """Off the policy that sampled, too: the weights are fixed before the batch is split."""
    algo = make_hybrid(hard, demonstrated=3, **{"num_iterations": 2, **RECIPES[recipe]})
    parts = minibatches(algo)
    move(algo.model, 0.05)
    for part in {id(part): part for part in parts}.values():
        _, _, line = check_invariance(algo, part)
    written = (part["demonstrated"] & (part["weights"] != 0)).any()
    assert written == (recipe not in ("bread", "nft")) and line["entropy"] > 0
    if recipe == "relift":
        assert len(parts) == 3 and part["demonstrated"].any(-1).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [0, 3])
def test_the_first_ratio_is_exactly_one(recipe, size):
    """With two passes the policy is scored once, in the micro-batches of training: not a bit
    differs, nor on the tokens of hints."""
    algo = make_hybrid(hard, demonstrated=3, micro_batch_size=size, temperature=0.7,
                       **{**RECIPES[recipe], "num_iterations": 2})
    part, again = minibatches(algo)[:2]
    assert part is again
    [logprobs] = [data.in_micro_batches(lambda b: algo.logprobs(algo.model, b)[0], part,
                                        algo.config)]
    mask = part["completion_mask"]
    assert torch.equal(logprobs[mask], part["old_logprobs"][mask])
    _, _, line = loss_and_gradient(algo, part, size)
    assert line["max_ratio"] == 1
    move(algo.model)
    assert loss_and_gradient(algo, part, size)[2]["max_ratio"] != 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_changes_the_policy_alone(recipe):
    """The reference stays as it was, and so does what waits, but for ReLIFT."""
    algo = make_hybrid(hard, demonstrated=3, **RECIPES[recipe])
    before = weights_of(algo.model), weights_of(algo.ref_model)
    line = update(algo, *minibatches(algo))
    assert not same_weights(weights_of(algo.model), before[0]) and line["grad_norm"] > 1e-3
    assert same_weights(weights_of(algo.ref_model), before[1]) and not algo.waiting.any()


def test_the_temperature_is_the_policys():
    """Own tokens are scored at the temperature at which they were sampled, demonstrations at 1."""
    algo = make_hybrid(temperature=0.5)
    batch = sample(algo)
    assert batch["demonstrated"].any(-1).tolist() == [False] * 16 + [True] * 2
    logits, ids = read(algo.model, batch), batch["completion_ids"][..., None]
    own, demo = ((logits / t).log_softmax(-1).gather(-1, ids)[..., 0] for t in (0.5, 1))
    found, entropy = algo.logprobs(algo.model, batch)
    mask = batch["completion_mask"]
    assert same(found[:16][mask[:16]], own[:16][mask[:16]], 1e-5)
    assert same(found[16:][mask[16:]], demo[16:][mask[16:]], 1e-5)
    for rows, t in ((slice(16), 0.5), (slice(16, None), 1)):
        p = torch.distributions.Categorical(logits=logits[rows] / t)
        assert same(entropy[rows][mask[rows]], p.entropy()[mask[rows]], 1e-5)
    assert not same(own, demo, 0.1)


# -- samples and demonstrations -------------------------------------------------------------------


def test_rows_are_answers_and_then_demonstrations():
    """The first prompts are those of the step's demonstrations, the others the step's problems;
    demonstrations are whole, with their <end>, and rewarded by the same function."""
    algo = make_hybrid()
    for step in (0, 3):
        batch = sample(algo, step=step)
        which = data.batch_indices(10, algo.config, step, 2)
        shown = [algo.demonstrations[i] for i in which]
        prompts = [e["prompt"] for e in shown + PROBLEMS[2:]]
        found = texts(batch)
        assert [p for p, _ in found] == [p for p in prompts for _ in range(4)] + prompts[:2]
        assert found[16:] == [(e["prompt"], e["completion"]) for e in shown]
        assert (batch["completion_ids"][16:] == Letters.eos_id).any(-1).all()
        assert batch["rewards"].tolist() == coin(*zip(*found))
        assert batch["shown"].tolist() == [-1] * 16 + which
        assert torch.equal(batch["demonstrated"][16:], batch["completion_mask"][16:])
    assert not {e["prompt"] for e in shown} & {p["prompt"] for p in PROBLEMS[2:]}


def test_every_demonstration_comes_once_an_epoch():
    """Ten demonstrations, two a step: five steps show each once."""
    algo = make_hybrid()
    seen = [i for step in range(5) for i in sample(algo, step=step)["shown"].tolist() if i >= 0]
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("wrong_share", [0.0, 1.0])
def test_a_wrong_demonstration_is_pushed_down(float64, wrong_share):
    """LUFFY asks the verifier about demonstrations too: in a group in which others are right, a
    wrong one has a negative advantage, and its tokens' loss makes it less likely; a right one in a
    group in which others are wrong, the contrary."""
    algo = make_hybrid(None, imitation="luffy", wrong_share=wrong_share, learning_rate=1e-3)
    batch = sample(algo)
    assert batch["rewards"][16:].tolist() == [1 - wrong_share] * 2
    batch["rewards"][:16] = torch.tensor([0.0, 1.0] * 8)
    [part] = algo.minibatches(batch, Log())
    is_demo = part["demonstrated"].any(-1)
    sign = -1 if wrong_share else 1
    assert (part["advantages"][is_demo] * sign > 0.5).all() and is_demo.sum() == 2
    for row in is_demo.nonzero():
        demo, likelihood = data.take_rows(part, row), []
        for _ in range(2):
            logprobs, _ = algo.logprobs(algo.model, demo)
            likelihood.append((logprobs * demo["completion_mask"]).sum().item())
            update(algo, demo)
        assert (likelihood[1] - likelihood[0]) * sign > 0


@pytest.mark.parametrize("settings, found", [
    (dict(mu=0.9, mu_end=0.1, max_steps=8), [0.9, 0.783, 0.5, 0.217, 0.1, 0.1]),
    (dict(mu=0.9, mu_end=0.1, decay_steps=2), [0.9, 0.5, 0.1, 0.1]),
    (dict(mu=0.3), [0.3, 0.3])])
def test_mu_falls_in_half_of_the_run(settings, found):
    """Along half a cosine over decay_steps, or half of the run; without mu_end it stays."""
    algo = make_hybrid(imitation="chord", **settings)
    for step, mu in enumerate(found):
        log = Log()
        minibatches(algo, step=step, log=log)
        assert log.line()["mu"] == pytest.approx(mu, abs=5e-4)


@pytest.mark.parametrize("recipe", ["luffy", "srft", "prefix"])
def test_one_average_over_all_tokens_gives_the_share_that_is_logged(recipe):
    """Where whoever wrote a token its weight is the same, mu is the demonstrators' share of the
    tokens; no imitation has none of it."""
    algo, log = make_hybrid(**RECIPES[recipe]), Log()
    batch = sample(algo)
    algo.minibatches(batch, log)
    share = batch["demonstrated"].sum() / batch["completion_mask"].sum()
    assert log.line()["mu"] == pytest.approx(share.item()) and 0 < share < 1
    minibatches(make_hybrid(imitation="none"), log=log)
    assert log.line()["mu"] == 0


def test_what_is_logged(float64):
    """nll: of the demonstrators' tokens alone; flat: of the own answers' groups; open: share of
    demonstrations that count, and there is none without a gate."""
    algo, log = make_hybrid(hard, demonstrated=3, gate="failed"), Log()
    batch = sample(algo, log=log)
    groups = batch["rewards"][:16].view(4, 4)
    [part] = algo.minibatches(batch, log)
    line = log.line()
    failed = (groups[:3].max(1).values == 0).double().mean().item()
    assert line["open"] == pytest.approx(failed) and 0 < failed < 1
    flat = (groups.max(1).values == groups.min(1).values).double().mean()
    assert line["frac_reward_zero_std"] == flat
    logprobs = algo.logprobs(algo.model, part)[0].detach()
    _, _, line = loss_and_gradient(algo, part)
    assert line["nll"] == pytest.approx(-logprobs[part["demonstrated"]].mean().item())
    plain, log = make_hybrid(), Log()
    minibatches(plain, log=log)
    assert "open" not in log.line()


# -- ReLIFT's buffer ------------------------------------------------------------------------------


def test_demonstrations_of_failed_groups_wait_for_an_update_of_their_own(float64):
    """Two groups fail a step: with a buffer of three the second step makes one more update, whose
    loss and gradient are exactly SFT's on the four that wait; then none waits. What waits is in the
    state of the run."""
    algo = make_hybrid(wrong, gate="buffer", buffer_size=3)
    first = minibatches(algo, step=0)
    which = [data.batch_indices(10, algo.config, step, 2) for step in (0, 1)]
    assert len(first) == 1 and algo.waiting.nonzero().flatten().tolist() == sorted(which[0])
    assert torch.equal(algo.state_dict()["waiting"], algo.waiting)
    assert not loss_and_gradient(algo, first[0])[1].any()                # all groups are flat
    own, update_of_them = minibatches(algo, step=1)
    assert not algo.waiting.any()
    shown = [algo.demonstrations[i] for i in sorted(sum(which, []))]
    sft = make(SFT)
    [part] = sft.minibatches(sft.sample(shown, None, 0, Log()), Log())
    found, expected = loss_and_gradient(algo, update_of_them), loss_and_gradient(sft, part)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2]["nll"] == expected[2]["nll"]
    assert len(minibatches(algo, step=2)) == 1                           # it fills up again


def test_a_demonstration_waits_once():
    """The same problem failed twice: it is one of those that wait, not two."""
    algo = make_hybrid(wrong, gate="buffer", buffer_size=3)
    assert [len(minibatches(algo, step=0)) for _ in range(3)] == [1, 1, 1]
    assert algo.waiting.sum() == 2


def test_a_buffer_that_is_never_full_is_refused():
    """More than there are demonstrations, of a task or of a file."""
    with pytest.raises(InputError, match="--buffer_size 11: there are only 10 demonstrations"):
        make_hybrid(gate="buffer", buffer_size=11)
    make_hybrid(gate="buffer", buffer_size=10)


# -- the inspector --------------------------------------------------------------------------------


def inspected(recipe, reward=hard, **settings):
    """The blocks of --inspect, each a list of the cells of its tokens of the answer."""
    algo = make_hybrid(reward, **{"demonstrated": 3, **RECIPES[recipe], **settings})
    algo.examples = lambda: PROBLEMS
    text = tokens.inspect_one(algo, torch.Generator().manual_seed(2))
    head, *blocks = text.split("\n\n")
    rows = [[line.split() for line in block.splitlines()[1:]] for block in blocks]
    return head, [[cells for cells in block if cells[1] in ("yes", "demo")] for block in rows]


@pytest.mark.parametrize("recipe", ["plain", "chord", "luffy", "srft", "hpt"])
def test_two_answers_and_two_demonstrations_are_shown(recipe):
    """Own rows have `yes`, demonstrations `demo`, from the first token to <end>."""
    head, blocks = inspected(recipe)
    assert head.splitlines()[-1] == "demo: a demonstrator wrote the token"
    written = [{cells[1] for cells in block} for block in blocks]
    n = min(2, written.count({"demo"})) if recipe == "hpt" else 2
    assert written == [{"yes"}] * (4 - n) + [{"demo"}] * n and n
    assert all(block[-1][0] == "<end>" for block in blocks[4 - n:])
    if recipe == "plain":    # imitation pushes up all that was shown
        assert all(float(cells[-1]) > 0 for block in blocks[2:] for cells in block)


@pytest.mark.parametrize("recipe", ["uft", "prefix"])
def test_hints_are_shown_as_the_demonstrators(recipe):
    """A row that begins with a hint: `demo`, then `yes`."""
    _, blocks = inspected(recipe, coin, demonstrated=2)
    mixed = [[cells[1] for cells in block] for block in blocks if block[0][1] == "demo"]
    assert len(mixed) == 2 and any("yes" in written for written in mixed)
    assert all(written == sorted(written) for written in mixed)          # demo comes before yes


def test_a_hybrid_is_inspected_at_its_temperatures():
    """The log-probabilities shown are those of the loss: own tokens at the temperature, the
    demonstrators' at 1; the weight is that of the closed form, (1 - p) / T times the token's."""
    algo = make_hybrid(temperature=0.5)
    [part] = minibatches(algo)
    weight, logprobs = tokens.gradient_weights(algo, part)
    mask, demo = part["completion_mask"], part["demonstrated"]
    assert same(logprobs[mask], algo.logprobs(algo.model, part)[0][mask], 1e-5)
    A = torch.where(demo, 1.0, part["advantages"][:, None] / 0.5)
    assert same(weight[mask], (A * (1 - logprobs.exp()) * part["weights"])[mask], 1e-5)


def test_where_nothing_is_taught_the_inspector_says_so():
    """No contrast and no demonstration: nothing to show. With demonstrations there is, although no
    answer has an advantage."""
    with pytest.raises(InputError, match="judged alike"):
        inspected("bread", wrong)
    assert {cells[1] for block in inspected("plain", wrong)[1] for cells in block} == {"demo"}


def test_other_tasks_are_demonstrated_too():
    """Countdown, whose reward looks at other columns, and the facts."""
    for task in (tasks.Countdown(), tasks.Facts(2, 3)):
        algo = make_hybrid(None, max_steps=1)
        algo.task, algo.rewards = task, tasks.Rewards(task, "verifier")
        shown = task.demonstrations(5, 0)
        total, _ = algo.rewards(shown, [e["completion"] for e in shown])
        assert total.tolist() == [1] * 5
