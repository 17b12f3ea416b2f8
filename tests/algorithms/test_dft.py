"""
The DFT class on a tiny model: the gradient of each loss type down to the weights, what is trained,
that no bookkeeping changes a result, and when the old policy of psft is renewed.
"""

import copy
import math

import pytest
import torch

import dft
import tasks
from dft import DFT, DFTConfig
from harness.errors import InputError
from harness.log import Log
from tiny import (DEMONSTRATIONS, check_invariance, loss_and_gradient, make, make_sft,
                  minibatches, move, read, same, same_results, same_weights, tiny_model, update)

LOSS_TYPES = ["dft", "dft_sequence", "power", "chord", "prift", "iw_sft", "psft", "asft", "gem"]
SETTINGS = {"power": dict(alpha=0.3), "iw_sft": dict(iw_temperature=0.7, iw_max=1.2),
            "psft": dict(epsilon_high=0.1), "asft": dict(anchor_coef=0.4),
            "gem": dict(gem_temperature=0.6)}


@pytest.fixture(scope="module")
def learned():
    """Weights that know three of the five demonstrations and not the others: probabilities from
    .001 to .9."""
    algo = make_sft(learning_rate=1e-2, weight_decay=0.0)
    [minibatch] = minibatches(algo, DEMONSTRATIONS[:3])
    for _ in range(25):
        update(algo, minibatch)
    return algo.model.state_dict()


def make_dft(weights, loss_type, **settings):
    """DFT from those weights; the reference model is a little way off."""
    algo = make(DFT, ref_seed=None, loss_type=loss_type,
                **{**SETTINGS.get(loss_type, {}), **settings})
    algo.model.load_state_dict(weights)
    algo.ref_model.load_state_dict(weights)
    move(algo.ref_model, 0.02, seed=6)
    return algo


def off_policy(weights, loss_type, micro_batch_size=0):
    """A minibatch after a move of the model: importance weights and ratios are not 1."""
    algo = make_dft(weights, loss_type, micro_batch_size=micro_batch_size)
    log = Log()
    batch = algo.sample(DEMONSTRATIONS, None, 0, log)
    if loss_type == "psft":
        [minibatch] = algo.minibatches(batch, log)                   # pi_old: before the move
        move(algo.model, 0.02)
    else:
        move(algo.model, 0.02)
        [minibatch] = algo.minibatches(batch, log)
    assert log.line() == {}                                          # nothing was sampled
    return algo, minibatch


# -- the gradient ---------------------------------------------------------------------------------


def potential(algo, batch):
    """A function whose gradient is what each loss type claims, with nothing in it detached."""
    config, mask = algo.config, batch["completion_mask"]
    logits, ids = read(algo.model, batch), batch["completion_ids"][..., None]
    lp = logits.log_softmax(-1).gather(-1, ids)[..., 0]
    p, answer = lp.exp(), (lp * mask).sum(1)
    if config.loss_type == "dft_sequence":
        return -answer.exp().sum() / mask.sum()
    if config.loss_type == "iw_sft":
        moved = config.iw_temperature * (answer - (batch["ref_logprobs"] * mask).sum(1))
        capped = moved > math.log(config.iw_max)
        assert 0 < capped.sum() < len(capped)                        # both sides are at work
        values = torch.where(capped, -config.iw_max * answer, -moved.exp() / config.iw_temperature)
        return values.sum() / mask.sum()
    if config.loss_type == "power":
        values = -p ** config.alpha / config.alpha
    elif config.loss_type == "chord":
        values = p ** 2 / 2 - p
    elif config.loss_type == "prift":
        values = -batch["ref_logprobs"].exp() * lp
    elif config.loss_type == "gem":                                  # whose q is softmax(z / b)
        b = config.gem_temperature
        values = b * (logits / b).logsumexp(-1) - logits.gather(-1, ids)[..., 0]
    elif config.loss_type == "psft":
        ratio = (lp - batch["old_logprobs"]).exp()
        assert 0 < (ratio > 1 + config.epsilon_high)[mask].sum() < mask.sum()
        assert (ratio[mask] < 1).any()
        values = -ratio.clamp(max=1 + config.epsilon_high)
    else:
        values = -p
    if config.loss_type == "asft":
        ref, now = (torch.distributions.Categorical(logits=z)
                    for z in (read(algo.ref_model, batch), logits))
        values = values + config.anchor_coef * torch.distributions.kl_divergence(ref, now)
    return values[mask].mean()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.usefixtures("float64")
def test_gradients_by_finite_differences(learned, loss_type):
    """The gradient of the class, down to the weights of the model, is the slope of the function
    that each loss type claims to descend: -sum p, -pi(y), (1 - p^alpha) / alpha, ..., averaged over
    the tokens of the batch."""
    algo, minibatch = off_policy(learned, loss_type)
    _, found, _ = loss_and_gradient(algo, minibatch)
    parameters, h = list(algo.model.parameters()), 1e-6
    here = torch.nn.utils.parameters_to_vector(parameters).detach()
    directions = torch.randn(3, len(here), generator=torch.Generator().manual_seed(0))
    for direction in (found, *directions):
        direction = direction / direction.norm()
        sides = []
        with torch.no_grad():
            for step in (h, -h):
                torch.nn.utils.vector_to_parameters(here + step * direction, parameters)
                sides.append(potential(algo, minibatch))
        slope = float(sides[0] - sides[1]) / (2 * h)
        assert float(found @ direction) == pytest.approx(slope, abs=1e-7)
    assert found.norm() > 1e-3


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.usefixtures("float64")
def test_dft_is_invariant_to_micro_batches_padding_and_order(learned, loss_type):
    """Loss, gradient and what is logged are those of the batch, however it is split and padded
    (misleading values on padding included); pi_old and pi_ref are the same when scored in
    micro-batches."""
    algo, minibatch = off_policy(learned, loss_type)
    whole = check_invariance(algo, minibatch)
    algo, minibatch = off_policy(learned, loss_type, micro_batch_size=2)
    assert same_results(loss_and_gradient(algo, minibatch, 2), whole)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dft_trains_end_and_nothing_after_or_before(learned, loss_type):
    """Each of the N tokens of the completions weighs 1/N, <end> included, padding nothing; the
    gradient reaches just their logits, and the prompt's tokens are no targets at all."""
    algo = make_dft(learned, loss_type)
    [minibatch] = minibatches(algo, DEMONSTRATIONS)
    lengths = [len(e["completion"]) + 1 for e in DEMONSTRATIONS]
    real = torch.tensor([[t < n for t in range(max(lengths))] for n in lengths])
    assert same(minibatch["weights"], real / sum(lengths), 1e-7)
    original, seen = algo.model.head, []

    def head(hidden):
        seen.append(original(hidden))
        seen[-1].retain_grad()
        return seen[-1]

    algo.model.head = head
    loss_and_gradient(algo, minibatch)
    assert torch.equal(seen[0].grad.abs().sum(-1) > 0, real)
    ends = minibatch["completion_ids"][torch.arange(5), torch.tensor(lengths) - 1]
    assert (ends == algo.tokenizer.eos_id).all()


# -- the loss and what is logged ------------------------------------------------------------------


def answer_logprobs(model, tokenizer, example):
    """The log-probabilities of all tokens where the example's completion is written, (T, V), and
    its tokens, unpadded."""
    prompt = [tokenizer.eos_id] + tokenizer.encode(example["prompt"])
    completion = tokenizer.encode(example["completion"]) + [tokenizer.eos_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1]
    return logits.log_softmax(-1), completion


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.usefixtures("float64")
def test_loss_and_metrics_against_a_direct_computation(learned, loss_type):
    """Token by token, from one unpadded pass per example: the loss is the mean of weight x nll
    (psft: of the clipped ratio; asft: and the KL; gem: of its own), and beside it the plain nll,
    the mean weight, the share of weights below .01."""
    algo, minibatch = off_policy(learned, loss_type)
    config, old_model = algo.config, tiny_model()
    old_model.load_state_dict(learned)
    losses, nlls, weights, kls, right = [], [], [], [], 0
    for example in DEMONSTRATIONS:
        rows, tokens = answer_logprobs(algo.model, algo.tokenizer, example)
        refs, _ = answer_logprobs(algo.ref_model, algo.tokenizer, example)
        olds, _ = answer_logprobs(old_model, algo.tokenizer, example)
        lps = [row[token].item() for row, token in zip(rows, tokens)]
        ref_lps = [ref[token].item() for ref, token in zip(refs, tokens)]
        iw = math.exp(config.iw_temperature * (sum(lps) - sum(ref_lps)))
        for row, ref, old, token, lp in zip(rows, refs, olds, tokens, lps):
            p, ratio = math.exp(lp), math.exp(lp - old[token].item())
            weight = {"dft": p, "asft": p, "dft_sequence": math.exp(sum(lps)),
                      "power": p ** config.alpha, "chord": p * (1 - p),
                      "prift": math.exp(ref[token].item()), "iw_sft": min(iw, config.iw_max),
                      "psft": ratio * (ratio < 1 + config.epsilon_high), "gem": 1}[loss_type]
            loss, kl = -weight * lp, (ref.exp() * (ref - row)).sum().item()
            if loss_type == "psft":
                loss = -min(ratio, 1 + config.epsilon_high)
            if loss_type == "asft":
                loss += config.anchor_coef * kl
            if loss_type == "gem":
                q = (row / config.gem_temperature).softmax(-1)
                loss = (q * row).sum().item() - lp
            losses, nlls = losses + [loss], nlls + [-lp]
            weights, kls = weights + [weight], kls + [kl]
            right += int(row.argmax()) == token
    loss, _, logged = loss_and_gradient(algo, minibatch)
    n = len(losses)
    assert float(loss) == pytest.approx(sum(losses) / n, abs=1e-9)
    assert logged["nll"] == pytest.approx(sum(nlls) / n)
    assert logged["mean_token_accuracy"] == pytest.approx(right / n, abs=1e-12)
    assert logged["mean_weight"] == pytest.approx(sum(weights) / n)
    unweighted = sum(weight < 0.01 for weight in weights)
    assert logged["frac_weight_near_zero"] == pytest.approx(unweighted / n, abs=1e-12)
    assert ("kl" in logged) == (loss_type == "asft")
    if loss_type == "asft":
        assert logged["kl"] == pytest.approx(sum(kls) / n) and sum(kls) > 0.01
    if loss_type in ("dft", "asft", "chord", "psft"):
        assert 0 < unweighted < n


# -- the anchor and the old policy ----------------------------------------------------------------


def test_asft_without_its_anchor_is_dft(learned):
    """anchor_coef 0: loss and gradient are DFT's bit for bit. With an anchor that equals the model,
    its KL is 0 and so is its pull; and the reference is never trained."""
    def results(algo):
        return loss_and_gradient(algo, minibatches(algo, DEMONSTRATIONS)[0])
    plain = results(make_dft(learned, "dft"))
    loose = results(make_dft(learned, "asft", anchor_coef=0.0))
    assert torch.equal(plain[0], loose[0]) and torch.equal(plain[1], loose[1])
    assert loose[2]["kl"] > 0
    held = make_dft(learned, "asft", anchor_coef=5.0)
    far = results(held)
    held.ref_model.load_state_dict(held.model.state_dict())
    near = results(held)
    assert near[2]["kl"] == pytest.approx(0, abs=1e-6)
    assert same(near[1], plain[1], 1e-5) and not same(far[1], plain[1], 1e-2)
    assert all(p.grad is None for p in held.ref_model.parameters())


@pytest.mark.parametrize("sync_steps", [1, 3])
@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_psft_renews_its_old_policy_every_sync_steps(learned, sync_steps, micro_batch_size):
    """pi_old is the policy of steps 0, sync_steps, 2 sync_steps, ... and stays what it was in
    between. Just renewed, every ratio is exactly 1, for it is scored by the very forward pass that
    trains."""
    algo = make_dft(learned, "psft", sync_steps=sync_steps, micro_batch_size=micro_batch_size)
    for step in range(7):
        move(algo.model, 0.02, seed=step)
        before = copy.deepcopy(algo.old_model.state_dict())
        [minibatch] = minibatches(algo, DEMONSTRATIONS, step)
        due = algo.model.state_dict() if step % sync_steps == 0 else before
        assert same_weights(due, algo.old_model.state_dict())
        _, _, logged = loss_and_gradient(algo, minibatch, micro_batch_size)
        assert (logged["mean_weight"] == 1) == (step % sync_steps == 0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_networks_are_trained_or_frozen(loss_type):
    """The model is trained. The reference, and with psft the old policy, are frozen copies of the
    start and are saved with it; another loss type has no old policy."""
    algo = make(DFT, ref_seed=None, loss_type=loss_type)
    networks = dict(algo.named_children())
    old = {"old_model"} if loss_type == "psft" else set()
    assert set(networks) == {"model", "ref_model"} | old and algo.rows_together == 1
    for name, network in networks.items():
        assert same_weights(tiny_model().state_dict(), network.state_dict())
        assert all(p.requires_grad == (name == "model") for p in network.parameters())
        assert name == "model" or network is not algo.model
    names = {name.split(".")[0] for name in algo.state_dict()}
    assert names == set(networks)


# -- examples and settings ------------------------------------------------------------------------


def test_dft_draws_as_many_demonstrations_as_its_flag_says():
    """Drawn by the seed, from the training split; of a file it wants what SFT wants."""
    task = tasks.Chain(2, 3)
    algo = make(DFT, task=task, num_demonstrations=5, seed=4)
    assert algo.examples() == task.demonstrations(5, 4)
    other = make(DFT, task=task, num_demonstrations=5, seed=5)
    assert algo.examples() != other.examples()
    assert DFTConfig().columns() == [("prompt", "completion"), ("text",)]


def test_token_weights_keep_the_precision_of_the_mask():
    """Of a bool mask float32, of a float64 mask float64: thirds that are right to 16 digits."""
    mask = torch.tensor([[True, True, True]])
    assert dft.token_weights(mask).dtype == torch.float32
    found = dft.token_weights(mask.double())
    assert found.dtype == torch.float64 and (found == 1 / 3).all()


@pytest.mark.parametrize("settings, message", [
    *[({name: 0}, f"--{name} 0: a number of at least 1") for name in
      ("num_demonstrations", "sync_steps")],
    *[({name: -0.1}, f"--{name} -0.1: a number of at least 0")
      for name in ("alpha", "epsilon_high", "anchor_coef", "iw_temperature")],
    *[({name: 0.0}, f"--{name} 0.0: a number above 0") for name in ("gem_temperature", "iw_max")],
])
def test_wrong_settings_are_refused(settings, message):
    """Each is an InputError that says what is wrong, before anything is trained."""
    with pytest.raises(InputError, match=message):
        DFTConfig(**settings)


def test_settings_at_the_edge_are_accepted():
    """0 where 0 means something, 1 where 1 is the least."""
    DFTConfig(alpha=0.0, epsilon_high=0.0, anchor_coef=0.0, iw_temperature=0.0, sync_steps=1,
              num_demonstrations=1)
