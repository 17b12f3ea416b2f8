"""
The SFT and GRPO classes on a real but tiny model: what is trained, what is not, and that no bookkeeping (padding,
order, micro-batches, rows left out) changes a result. The same sum in two orders is compared in float64, to 1e-10.
"""

import copy
import json
import math
import statistics
import zlib
from types import SimpleNamespace

import pytest
import torch

import data
import train
from grpo import GRPO, GRPOConfig, group_advantages, k3, policy_loss, token_weights
from model import GPT, GPTConfig, InputError
from sft import SFT, SFTConfig

LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "cispo"]
LEVELS = ["token", "sequence"]
SEED = 2   # of the samples: the first group is flat, the other three are not
PROBLEMS = [{"prompt": p, "answer": data.Chain.solve(p)["answer"]} for p in ("7+5=", "1-2*3=", "9*9=", "4+4-1=")]
DEMONSTRATIONS = [{"prompt": p, "completion": c} for p, c in (
    ("7+5=", "2"), ("1-2*3=", "1-2=9;9*3=7"), ("9*9=", "9*9=1"), ("4+4-1=", "7"), ("0+1=", "0+1=1"))]
DOCUMENTS = [{"prompt": "", "completion": e["prompt"] + e["completion"]} for e in DEMONSTRATIONS]


class Letters:
    """A tokenizer of 18 tokens, so that an untrained model ends about half of its answers by itself."""
    letters, eos_id, pad_id, vocab_size = "0123456789+-*>=;", 16, 17, 18

    def encode(self, text):
        return [self.letters.index(c) for c in text]

    def decode(self, ids):
        ids = list(ids)
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        return "".join(self.letters[i] for i in ids if i < 16)


def coin(prompts, completions, **columns):
    """A reward of 0 or 1 that looks random and depends on prompt and answer; the first problem is always right."""
    return [float(p == "7+5=" or zlib.crc32((p + c).encode()) % 2) for p, c in zip(prompts, completions)]


@pytest.fixture
def float64(monkeypatch):
    """Everything in double precision, also where the sources ask for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=18, block_size=32, n_layer=2, n_head=2, n_embd=16, n_hidden=16))


def make_sft():
    return SFT(SFTConfig(), tiny_model(), None, Letters(), data.Chain(2, 3))


def make_grpo(reward_function=coin, **flags):
    """GRPO with groups of 4 and the given reward; None: the rewards that the flags name."""
    config = GRPOConfig(**{"num_generations": 4, **flags})
    algo = GRPO(config, tiny_model(), tiny_model(seed=1), Letters(), data.Chain(2, 3))
    if reward_function is not None:
        algo.rewards.functions = {"coin": reward_function}
    return algo


def collect(algo, problems=PROBLEMS):
    return algo.collect(problems, torch.Generator().manual_seed(SEED))


def move(model, size=0.1, seed=5):
    """Change the weights as an update would, but at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator)


def loss_and_gradient(algo, batch, micro_batch_size=0):
    """Summed over micro-batches as train.update does: the loss, one long gradient, the metrics."""
    algo.model.zero_grad()
    total, metrics = 0.0, {}
    for micro in data.split(batch, micro_batch_size):
        loss, micro_metrics = algo.loss(micro)
        loss.backward()
        total = total + loss.detach()
        train.add(metrics, micro_metrics)
    return total, torch.cat([p.grad.flatten() for p in algo.model.parameters()]), metrics


def same(a, b, tolerance=1e-10):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=tolerance)


def same_results(a, b):
    return same(a[0], b[0]) and same(a[1], b[1]) and a[2].keys() == b[2].keys() \
        and all(a[2][name] == pytest.approx(b[2][name], abs=1e-9) for name in a[2])


def training_args(**flags):
    defaults = dict(device="cpu", dtype="float32", micro_batch_size=0, max_grad_norm=1.0)
    return SimpleNamespace(**{**defaults, **flags})


def padded(batch, left=3, right=2):
    """The batch with more padding, left of the prompts and right of the completions, full of misleading values."""
    values = {"prompt_ids": 5, "prompt_mask": False, "completion_ids": 5, "completion_mask": False, "weights": 0,
              "old_logprobs": -50, "ref_logprobs": -50}
    widened = {name: torch.nn.functional.pad(batch[name], (left, 0) if name.startswith("prompt") else (0, right),
                                             value=value) for name, value in values.items() if name in batch}
    return {**batch, **widened}


def read(model, batch):
    """The model's logits for a batch."""
    return model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"],
                                   batch["completion_mask"], batch["prompt_index"])


# -- SFT: what is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [DEMONSTRATIONS, DOCUMENTS], ids=["demonstrations", "documents"])
def test_sft_loss_is_the_token_mean_of_the_completions_and_their_ends(float64, examples):
    """Against one unpadded forward pass per example: minus the mean log-probability, over the whole batch, of
    completion tokens and <end>. In pre-training the whole text is the completion (survey 2603.13985, eq. 1)."""
    algo = make_sft()
    batch, _ = algo.collect(examples, None)
    [minibatch] = algo.minibatches(batch)
    loss, _, metrics = loss_and_gradient(algo, minibatch)
    logprobs, right = [], 0
    for e in examples:
        prompt = [16] + algo.tokenizer.encode(e["prompt"])
        completion = algo.tokenizer.encode(e["completion"]) + [16]
        logits = algo.model(torch.tensor([prompt + completion]))[0]
        for t, token in enumerate(completion, start=len(prompt)):
            logprobs.append(logits[t - 1].log_softmax(-1)[token].item())
            right += int(logits[t - 1].argmax()) == token
    assert same(loss, -statistics.mean(logprobs))
    assert metrics["nll"] == pytest.approx((-sum(logprobs), len(logprobs)))
    assert metrics["mean_token_accuracy"] == (right, len(logprobs))


def test_sft_trains_end_but_nothing_after_it():
    """The loss has a gradient in the logits of every completion token, <end> included, and none on padding.
    An excluded <end> is how models never learn to stop."""
    algo = make_sft()
    original, kept = algo.model.completion_logits, []

    def completion_logits(*args):
        kept.append(original(*args))
        kept[-1].retain_grad()
        return kept[-1]

    algo.model.completion_logits = completion_logits
    [minibatch] = algo.minibatches(algo.collect(DEMONSTRATIONS, None)[0])
    loss_and_gradient(algo, minibatch)
    trained = kept[0].grad.abs().sum(-1) > 0                                              # (B, T)
    lengths = [len(e["completion"]) + 1 for e in DEMONSTRATIONS]
    assert trained.tolist() == [[t < n for t in range(max(lengths))] for n in lengths]
    ends = torch.tensor(lengths) - 1
    assert (minibatch["completion_ids"][torch.arange(5), ends] == algo.tokenizer.eos_id).all()


def test_pretraining_examples_train_every_token_of_the_text():
    """completion_only False: the algorithm draws whole documents with an empty prompt; True: the prompt is apart."""
    task, tokenizer = data.Chain(2, 3), Letters()
    for completion_only in (True, False):
        config = SFTConfig(completion_only, num_documents=0 if completion_only else 20)
        algo = SFT(config, tiny_model(), None, tokenizer, task)
        examples = algo.examples(seed=0)[:20]
        batch, _ = algo.collect(examples, None)
        trained = [tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
        if completion_only:
            prompts = [tokenizer.decode(row[mask][1:].tolist())
                       for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"])]
            assert trained == [task.solve(prompt)["steps"] for prompt in prompts]
        else:
            assert trained == task.corpus(20, 0) and batch["prompt_ids"].tolist() == [[tokenizer.eos_id]] * 20


# -- neither micro-batches, nor padding, nor order change a result ----------------------------------------------------


def off_policy_minibatch(**flags):
    """A GRPO minibatch in which every term of the loss is at work: ratios are not 1 and some tokens are clipped, there
    is a KL to a different model and an entropy bonus."""
    algo = make_grpo(num_iterations=2, beta=0.3, entropy_coef=0.2, **flags)
    batch, _ = collect(algo)
    minibatch = algo.minibatches(batch)[0]
    move(algo.model)
    return algo, minibatch


def check_invariance(algo, minibatch):
    whole = loss_and_gradient(algo, minibatch)
    assert whole[1].abs().max() > 1e-3
    for size in (1, 2, 3, 5):
        assert same_results(loss_and_gradient(algo, minibatch, size), whole), f"micro-batches of {size}"
    assert same_results(loss_and_gradient(algo, padded(minibatch)), whole), "wider padding"
    rows = torch.randperm(len(minibatch["prompt_index"]))
    assert same_results(loss_and_gradient(algo, data.take_rows(minibatch, rows)), whole), "another order"
    return whole


def test_sft_is_invariant_to_micro_batches_padding_and_order(float64):
    """Loss, gradient and metrics are those of the batch. (Means of micro-batch means, or micro-batches that get lost,
    have spoilt published baselines: 2604.23747.)"""
    algo = make_sft()
    [minibatch] = algo.minibatches(algo.collect(DEMONSTRATIONS, None)[0])
    check_invariance(algo, minibatch)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_is_invariant_to_micro_batches_padding_and_order(float64, loss_type, level):
    """The same for every aggregation and both kinds of ratio, with clip, KL and entropy bonus at work."""
    algo, minibatch = off_policy_minibatch(loss_type=loss_type, importance_sampling_level=level)
    _, _, metrics = check_invariance(algo, minibatch)
    assert 0 < metrics["clip_ratio"][0] < metrics["clip_ratio"][1] and metrics["kl"][0] > 0


def test_update_adds_up_micro_batches(float64):
    """train.update in micro-batches of 3 reports loss and gradient norm of the whole batch, and counts its tokens."""
    algo, minibatch = off_policy_minibatch()
    loss, grad, _ = loss_and_gradient(algo, minibatch)
    totals, optimizer = {}, algo.model.configure_optimizer(1e-3, 0.0)
    tokens = train.update(training_args(micro_batch_size=3), algo, optimizer, minibatch, totals)
    assert totals["loss"][0] == pytest.approx(float(loss), abs=1e-10)
    assert totals["grad_norm"][0] == pytest.approx(float(grad.norm()), abs=1e-10)
    assert tokens == int(minibatch["completion_mask"].sum())


# -- GRPO: collecting -------------------------------------------------------------------------------------------------


def test_every_row_has_its_own_prompt_reward_and_advantage():
    """Row b answers problem b // G: reward and advantage are recomputed from the decoded row, group by group."""
    algo, G = make_grpo(), 4
    batch, metrics = collect(algo)
    rewards, tokenizer = [], algo.tokenizer
    for b in range(16):
        problem = PROBLEMS[b // G]["prompt"]
        row = batch["prompt_index"][b]
        assert tokenizer.decode(batch["prompt_ids"][row][batch["prompt_mask"][row]][1:].tolist()) == problem
        text = tokenizer.decode(batch["completion_ids"][b][batch["completion_mask"][b]].tolist())
        rewards += coin([problem], [text])
    groups = [rewards[i:i + G] for i in range(0, 16, G)]
    by_hand = [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-4) for g in groups for r in g]
    assert same(batch["advantages"], by_hand, 1e-5)
    assert len({tuple(g) for g in groups}) >= 3                                           # the groups do differ
    flat = sum(len(set(g)) == 1 for g in groups)
    lengths = batch["completion_mask"].sum(-1)
    assert metrics["reward"] == (sum(rewards), 16) == metrics["rewards/coin/mean"]
    assert metrics["frac_reward_zero_std"] == (flat, 4) and flat >= 1
    assert float(metrics["reward_std"][0]) == pytest.approx(sum(map(statistics.stdev, groups)))
    assert metrics["completions/mean_length"] == (lengths.sum(), 16) and metrics["sampled_tokens"] == lengths.sum()
    ended = (batch["completion_ids"] == 16).any(-1)
    assert metrics["completions/clipped_ratio"] == (16 - ended.sum(), 16) and 0 < ended.sum() < 16


def test_the_verifier_gets_the_answer_of_the_row():
    """The task's own reward, not a stand-in: 1 where the text ends in the answer of that row's problem."""
    algo = make_grpo(None)                                                      # 7+5=2, 1-2*3=7, 9*9=1, 4+4-1=7
    total, each = algo.rewards([p for p in PROBLEMS for _ in range(2)], list("23751277"))
    assert total.tolist() == each["verifier"].tolist() == [1, 0, 1, 0, 1, 0, 1, 1]


def test_remax_compares_with_the_greedy_answer():
    """A = R - R(greedy answer to the same prompt) (2310.10505, eq. 4); the greedy tokens count as sampled."""
    def evenness(prompts, completions, **columns):
        return [float(len(p) * len(c)) for p, c in zip(prompts, completions)]
    algo = make_grpo(evenness, advantage="remax", scale_rewards="none")
    batch, metrics = collect(algo)
    tokens = int(batch["completion_mask"].sum())
    for i, problem in enumerate(PROBLEMS):
        b = data.collate([{"prompt": problem["prompt"]}], algo.tokenizer)
        greedy = algo.model.generate(b["prompt_ids"], b["prompt_mask"], algo.task.max_new_tokens, 16, 17, temperature=0)
        tokens += int(greedy.completion_mask.sum())
        baseline = len(problem["prompt"]) * len(algo.tokenizer.decode(greedy.completion_ids[0].tolist()))
        for row in range(4 * i, 4 * i + 4):
            length = len(algo.tokenizer.decode(batch["completion_ids"][row][batch["completion_mask"][row]].tolist()))
            assert batch["advantages"][row] == len(problem["prompt"]) * length - baseline
    assert metrics["sampled_tokens"] == tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_training_scores_what_sampling_drew(temperature):
    """The log-probabilities that the sampler recorded are those of the training forward pass, temperature included."""
    algo = make_grpo(temperature=temperature)
    batch, _ = collect(algo)
    samples = algo.model.generate(batch["prompt_ids"], batch["prompt_mask"], algo.task.max_new_tokens, 16, 17, 4,
                                  temperature, generator=torch.Generator().manual_seed(SEED))
    assert torch.equal(samples.completion_ids, batch["completion_ids"])                   # the same draw again
    logprobs, _ = algo.logprobs(algo.model, batch)
    assert same(logprobs * batch["completion_mask"], samples.logprobs, 1e-4)
    ids = batch["completion_ids"][..., None]
    assert same(logprobs, (read(algo.model, batch) / temperature).log_softmax(-1).gather(-1, ids)[..., 0], 1e-5)


# -- GRPO: several updates on one batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("flags", [dict(num_iterations=2), dict(num_minibatches=2), dict(num_iterations=3, beta=0.1)])
def test_the_first_ratio_is_exactly_one(flags, micro_batch_size):
    """pi_old is scored before anything moves, by the very forward pass that trains: the first ratio is 1 bit for bit;
    after an update it is not; and pi_old stays the same in later passes (DeepSeekMath 2402.03300, algorithm 1)."""
    algo = make_grpo(**flags)
    algo.micro_batch_size = micro_batch_size
    batch, _ = collect(algo)
    optimizer = algo.model.configure_optimizer(1e-2, 0.0)
    before, passes, old = [p.detach().clone() for p in algo.model.parameters()], [], []
    for minibatch in algo.minibatches(batch):
        old.append(minibatch["old_logprobs"].clone())
        if not passes:
            for micro in data.split(minibatch, micro_batch_size):
                logprobs, mask = algo.logprobs(algo.model, micro)[0].detach(), micro["completion_mask"]
                assert torch.equal(logprobs[mask], micro["old_logprobs"][mask])
        metrics = {}
        train.update(training_args(micro_batch_size=micro_batch_size), algo, optimizer, minibatch, metrics)
        passes.append(metrics["max_ratio"])
    assert passes[0] == 1.0 and all(ratio > 1.0 for ratio in passes[1:])
    parts = algo.config.num_minibatches
    assert len(passes) == parts * algo.config.num_iterations
    assert all(torch.equal(a, b) for a, b in zip(old, old[parts:]))
    assert any(not torch.equal(a, b) for a, b in zip(before, algo.model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_exactly_one_in_the_loop(tmp_path, dtype):
    """The same through train.train, which must score pi_old in the precision that it trains in. At a learning rate too
    small to change a weight, the ratio of the second pass is 1 as well, so the largest ratio of the step is 1."""
    flags = dict(dtype=dtype, device="cpu", num_iterations=2, num_generations=4, batch_size=4, max_steps=1,
                 logging_steps=1, eval_problems=4, learning_rate=1e-30, reward="brevity", out_dir=tmp_path)
    args, config, _ = train.parse_args([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    model = tiny_model()
    task = data.Chain(2, 3)
    train.train(args, GRPO(config, model, copy.deepcopy(model), Letters(), task), task, "")
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["max_ratio"] == 1.0 and line["grad_norm"] > 0


def test_a_batch_used_once_needs_no_second_scoring(float64):
    """With one update per batch the ratio is 1 by construction, and the gradient is that of a rescored batch."""
    algo = make_grpo()
    batch, _ = collect(algo)
    [minibatch] = algo.minibatches(batch)
    once = loss_and_gradient(algo, minibatch)
    assert "old_logprobs" not in minibatch and once[2]["max_ratio"] == 1
    rescored = loss_and_gradient(algo, {**minibatch, "old_logprobs": algo.rescore(algo.model, minibatch)})
    assert same_results(once, rescored) and once[1].abs().max() > 1e-3


def test_minibatches_keep_groups_together():
    """num_minibatches 2 of 4 groups: the first takes prompts 0 and 1, the second 2 and 3, each row once; the weights of
    each add up to 1 by themselves, since each is an update of its own."""
    algo = make_grpo(num_minibatches=2, beta=0.1)                                         # beta: no row is left out
    batch, _ = collect(algo)
    parts = list(algo.minibatches(batch))
    assert [len(part["advantages"]) for part in parts] == [8, 8]
    assert torch.equal(torch.cat([part["advantages"] for part in parts]), batch["advantages"])
    for part, prompts in zip(parts, (slice(0, 2), slice(2, 4))):
        real = [row[mask].tolist() for row, mask in zip(part["prompt_ids"], part["prompt_mask"])]
        assert real == [r[m].tolist() for r, m in zip(batch["prompt_ids"][prompts], batch["prompt_mask"][prompts])]
        assert part["prompt_index"].tolist() == [0] * 4 + [1] * 4
        assert float(part["weights"].sum()) == pytest.approx(1)


# -- GRPO: the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_first_loss_is_minus_the_averaged_advantage(float64, loss_type):
    """At ratio 1 each token's loss is -A (cispo: -A log pi), so the loss is a sum of lengths and advantages that can be
    written down; "why is my loss 0?" (docstring of grpo.py)."""
    algo = make_grpo(lambda prompts, completions, **columns: [len(c) - 3.0 for c in completions], loss_type=loss_type,
                     advantage="reinforce", scale_rewards="none")
    batch, _ = collect(algo)
    [minibatch] = algo.minibatches(batch)
    A, lengths = batch["advantages"], batch["completion_mask"].sum(-1).double()
    logprobs = (algo.logprobs(algo.model, batch)[0].detach() * batch["completion_mask"]).sum(-1)
    by_hand = {"grpo": -A.mean(), "dr_grpo": -(A * lengths).sum() / (16 * algo.task.max_new_tokens),
               "dapo": -(A * lengths).sum() / lengths.sum(), "cispo": -(A * logprobs).sum() / lengths.sum()}
    assert A.unique().numel() > 3 and same(loss_and_gradient(algo, minibatch)[0], by_hand[loss_type])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_settings_reach_the_loss(float64, loss_type, level):
    """Off the sampling policy, the class's loss is policy_loss with the configured clip, ratio and aggregation."""
    algo = make_grpo(loss_type=loss_type, importance_sampling_level=level, epsilon=0.1, epsilon_high=0.4,
                     num_iterations=2)
    minibatch = algo.minibatches(collect(algo)[0])[0]
    move(algo.model)
    logprobs, mask = algo.logprobs(algo.model, minibatch)[0], minibatch["completion_mask"]
    losses, ratio, clipped = policy_loss(logprobs, minibatch["old_logprobs"], minibatch["advantages"], mask, 0.1, 0.4,
                                         loss_type, level)
    loss, _, metrics = loss_and_gradient(algo, minibatch)
    assert same(loss, (losses * minibatch["weights"]).sum())
    assert metrics["max_ratio"] == pytest.approx(ratio[mask].max().item()) != 1
    assert metrics["clip_ratio"][0] == clipped.sum() > 0


@pytest.mark.parametrize("flags", [
    dict(), dict(advantage="rloo"), dict(scale_rewards="batch"), dict(scale_rewards="none"), dict(std_correction=0),
    dict(advantage="reinforce", scale_rewards="none"), dict(advantage_eps=0.5)])
def test_settings_reach_the_advantages(flags):
    """The batch's advantages are group_advantages of its rewards with the configured baseline and scale."""
    algo = make_grpo(**flags)
    batch, _ = collect(algo)
    texts = [algo.tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    rewards = torch.tensor(coin([p["prompt"] for p in PROBLEMS for _ in range(4)], texts)).view(4, 4)
    assert same(batch["advantages"].view(4, 4), group_advantages(rewards, **flags), 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_advantage_are_left_out_and_nothing_changes(float64, loss_type, level):
    """A row whose advantage is 0 has no gradient: the minibatch lacks it, loss and gradient are the whole batch's."""
    algo = make_grpo(loss_type=loss_type, importance_sampling_level=level, num_iterations=2)
    batch, _ = collect(algo)
    minibatch = algo.minibatches(batch)[0]
    kept = int((batch["advantages"] != 0).sum())
    assert len(minibatch["advantages"]) == kept and 0 < kept <= 12
    everything = {**batch, "weights": token_weights(batch["completion_mask"], loss_type, algo.task.max_new_tokens),
                  "old_logprobs": algo.rescore(algo.model, batch)}
    move(algo.model)
    a, b = loss_and_gradient(algo, minibatch), loss_and_gradient(algo, everything)
    assert same(a[0], b[0]) and same(a[1], b[1]) and a[1].abs().max() > 1e-3


@pytest.mark.parametrize("flags", [dict(beta=0.1), dict(entropy_coef=0.1)])
def test_nothing_is_left_out_where_every_row_has_a_gradient(flags):
    """KL and entropy act on rows without advantage too."""
    algo = make_grpo(**flags)
    [minibatch] = algo.minibatches(collect(algo)[0])
    assert len(minibatch["advantages"]) == 16 and (minibatch["advantages"] == 0).any()


def test_a_batch_without_any_advantage_changes_nothing():
    """All groups flat: there is no minibatch, and the update leaves the weights as they are."""
    algo = make_grpo(lambda p, c, **_: [0.1] * len(p))
    batch, metrics = collect(algo)
    assert (batch["advantages"] == 0).all() and metrics["frac_reward_zero_std"] == (4, 4)
    parts = list(algo.minibatches(batch))
    before = copy.deepcopy(algo.model.state_dict())
    optimizer = algo.model.configure_optimizer(1e-2, 0.0)
    assert parts == [None] and train.update(training_args(), algo, optimizer, parts[0], {}) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in algo.model.state_dict().items())


def test_truncated_answers_can_be_left_out():
    """mask_truncated_completions: answers that ran out of tokens lose loss and weight, and the rest share the whole
    weight (DAPO, 2503.14476, section 3.4). Their rewards still count in the group."""
    algo, plain = make_grpo(mask_truncated_completions=True), make_grpo()
    batch, _ = collect(algo)
    whole, _ = collect(plain)
    truncated = ~(whole["completion_ids"] == 16).any(-1)
    assert 0 < truncated.sum() < 16 and torch.equal(batch["advantages"], whole["advantages"])
    assert not batch["completion_mask"][truncated].any()
    assert torch.equal(batch["completion_mask"][~truncated], whole["completion_mask"][~truncated])
    [minibatch] = algo.minibatches(batch)
    useful = ~truncated & (batch["advantages"] != 0)
    assert len(minibatch["advantages"]) == useful.sum()
    by_hand = batch["completion_mask"].sum(-1)[useful] / batch["completion_mask"].sum()   # dapo: every token the same
    assert same(minibatch["weights"].sum(-1), by_hand, 1e-6)


def test_kl_at_the_reference_is_zero_and_has_no_gradient(float64):
    """k3 and its derivative vanish where policy and reference agree; elsewhere the logged KL is the token mean of k3,
    and beta scales it into the loss. The reference is never trained."""
    algo = make_grpo(beta=0.5)
    batch, _ = collect(algo)
    [minibatch] = algo.minibatches(batch)                                                 # the reference differs
    reference = algo.rescore(algo.ref_model, minibatch)
    mask, logprobs = minibatch["completion_mask"], algo.logprobs(algo.model, minibatch)[0].detach()
    loss, grad, metrics = loss_and_gradient(algo, minibatch)
    kl = k3(logprobs, reference)[mask]
    assert metrics["kl"] == pytest.approx((kl.sum().item(), len(kl))) and kl.mean() > 0.01
    without = loss_and_gradient(make_grpo(beta=0.0), minibatch)                           # the same model and samples
    assert same(loss, without[0] + 0.5 * kl.mean()) and not same(grad, without[1], 1e-3)
    assert all(p.grad is None for p in algo.ref_model.parameters())

    algo.ref_model = copy.deepcopy(algo.model)
    [minibatch] = algo.minibatches(batch)
    loss, grad, metrics = loss_and_gradient(algo, minibatch)
    assert metrics["kl"][0] == 0 and same(loss, without[0]) and same(grad, without[1])


def test_entropy_is_logged_and_its_bonus_raises_it(float64):
    """The metric is -sum p log p over the vocabulary, token by token, at the sampling temperature. With no advantage, a
    step down the loss is a step up in entropy."""
    algo = make_grpo(lambda p, c, **_: [1.0] * len(p), entropy_coef=0.1, temperature=0.7)
    move(algo.model, 0.3)                                                                 # away from uniform
    [minibatch] = algo.minibatches(collect(algo)[0])
    loss, grad, metrics = loss_and_gradient(algo, minibatch)
    mask = minibatch["completion_mask"]
    entropy = torch.distributions.Categorical(logits=read(algo.model, minibatch)[mask] / 0.7).entropy()
    assert metrics["entropy"] == pytest.approx((entropy.sum().item(), len(entropy)))
    assert same(loss, -0.1 * entropy.mean())
    with torch.no_grad():
        for p in algo.model.parameters():
            p -= 0.1 * p.grad
    after = loss_and_gradient(algo, minibatch)[2]["entropy"]
    assert after[0] > metrics["entropy"][0] + 1e-3


# -- GRPO: several rewards, and wrong settings ------------------------------------------------------------------------


def test_rewards_are_weighted_and_logged_by_name():
    """The total is the weighted sum of the reward functions; each is logged under its own name, unweighted."""
    algo = make_grpo(None, reward="format,brevity,verifier", reward_weights="2,0.5,-1", scale_rewards="none")
    batch, metrics = collect(algo)
    texts = [algo.tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    answers = [PROBLEMS[b // 4]["answer"] for b in range(16)]
    format_, brevity = [float("=" in t) for t in texts], [-len(t) / algo.task.max_new_tokens for t in texts]
    verifier = data.Chain.reward(None, texts, answers)
    totals = [2 * f + 0.5 * b - v for f, b, v in zip(format_, brevity, verifier)]
    for name, values in (("rewards/format/mean", format_), ("rewards/brevity/mean", brevity),
                         ("rewards/verifier/mean", verifier), ("reward", totals)):
        assert float(metrics[name][0]) == pytest.approx(sum(values), abs=1e-5) and metrics[name][1] == 16, name
    centred = [total - statistics.mean(totals[b // 4 * 4:b // 4 * 4 + 4]) for b, total in enumerate(totals)]
    assert same(batch["advantages"], centred, 1e-5) and sum(format_) > 0


@pytest.mark.parametrize("flags, message", [
    (dict(reward="verifier,brevity", reward_weights="1"), "1 numbers"),
    (dict(reward_weights="1,2"), "2 numbers"),
    (dict(reward_weights="one"), "numbers separated by commas"),
    (dict(reward="verifier,charm"), "charm is unknown"),
    (dict(num_generations=1), "nothing to compare"),
    (dict(num_generations=1, advantage="rloo", scale_rewards="none"), "nothing to compare"),
    (dict(num_generations=1, advantage="reinforce"), "nothing to compare"),
    (dict(num_generations=0), "at least 1"),
    (dict(num_iterations=0), "at least 1"),
    (dict(num_minibatches=0), "at least 1"),
    (dict(temperature=0.0), "above 0"),
])
def test_wrong_settings_are_refused(flags, message):
    """Each is an InputError that says what is wrong, before anything is sampled."""
    with pytest.raises(InputError, match=message):
        make_grpo(**flags)


def test_epsilon_high_follows_epsilon():
    """Left out, it is the same as epsilon, for the flag and for the function; 0 is a number like
    any other: then no ratio above 1 has a gradient."""
    assert GRPOConfig(epsilon=0.1).epsilon_high is None
    minibatch = off_policy_minibatch()[1]
    found = {}
    for epsilon_high in (None, 0.1, 0.3, 0.0):
        algo = make_grpo(epsilon=0.1, epsilon_high=epsilon_high)
        move(algo.model)
        found[epsilon_high] = algo.loss(minibatch)[0].item()
    assert found[None] == found[0.1] and len(set(found.values())) == 3
    logprobs, old = torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2)          # ratios 1.65 and .61
    for epsilon_high, gain in ((None, 1.1), (0.1, 1.1), (0.3, 1.3), (0.0, 1.0)):
        losses, _, clipped = policy_loss(logprobs, old, torch.ones(1), old == 0, 0.1, epsilon_high)
        assert same(losses, [[-gain, -math.exp(-0.5)]], 1e-6)
        assert clipped.tolist() == [[True, False]]
    assert GRPOConfig(num_generations=1, advantage="reinforce", scale_rewards="none").num_generations == 1
