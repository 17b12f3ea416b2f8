"""
What the SFT, DFT, DPO and RM classes do around their losses: which examples they draw, what they
collect and when they renew it, which settings they refuse, in which precision they compute.

Each test changes one cause and looks for its effect. The losses themselves are in the files
test_imitation.py, test_dpo.py and test_ppo.py.
"""

import copy
import json
import math

import pytest
import torch

import data
import rm
import sft
import train
from conftest import TASK, run
from dft import DFT, DFTConfig, imitation_weights
from dft import token_weights as dft_token_weights
from dpo import DPO, DPOConfig
from model import InputError
from rm import RM, RMConfig
from sft import SFT, SFTConfig, round_of
from test_grpo import DEMONSTRATIONS, PROBLEMS, Letters, coin, move, tiny_model

DFT_LOSSES = ["dft", "dft_sequence", "power", "chord", "iw_sft", "psft", "asft", "gem"]
PAIR_LOSSES = ["sigmoid", "robust", "hinge", "ipo", "cpo", "simpo", "orpo"]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (
    ("7+5=", "2", "3"), ("1-2*3=", "1-2=9;9*3=7", "7"), ("4+4-1=", "7", "4+4=9;9-1=8"))]
SELF = {SFT: dict(source="self"), DFT: dict(source="self")}   # DPO and RM sample without that
SINGLES = [{"prompt": p, "completion": c, "label": label} for p, c, label in (
    ("7+5=", "2", True), ("1-2*3=", "1-2=9;9*3=7", False), ("9*9=", "8", True))]


def same_weights(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def texts_of(batch):
    """[(prompt, completion)] of a batch's rows, read through the masks."""
    def read(name):
        rows = zip(batch[f"{name}_ids"], batch[f"{name}_mask"])
        return ["".join(Letters.letters[i] for i in ids[mask] if i < 16) for ids, mask in rows]
    prompts = read("prompt")
    return [(prompts[i], c) for i, c in zip(batch["prompt_index"].tolist(), read("completion"))]


def file_task(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.JsonLines(path, path, 8)


# -- rounds of self-training ----------------------------------------------------------------------


def test_rounds_worked_example():
    """10 steps in 4 rounds begin at 0, 3, 5 and 8: step 6 is of round 2, which ends before 8
    (docstring of round_of)."""
    assert [round_of(step, 4, 10) for step in range(10)] == [
        (0, 0, 3), (0, 0, 3), (0, 0, 3), (1, 3, 5), (1, 3, 5), (2, 5, 8), (2, 5, 8), (2, 5, 8),
        (3, 8, 10), (3, 8, 10)]


def test_rounds_share_the_steps():
    """Every step belongs to one round, rounds follow each other without a gap and differ in length
    by at most a step; there are as many as asked for, but at most one a step."""
    for max_steps in range(1, 14):
        for rounds in range(1, 16):
            found = [round_of(step, rounds, max_steps) for step in range(max_steps)]
            each = sorted(set(found))
            assert [r for r, _, _ in each] == list(range(min(rounds, max_steps)))
            assert [first for _, first, _ in each] == [0, *(end for _, _, end in each[:-1])]
            assert each[-1][2] == max_steps
            assert all(a <= step < b for step, (_, a, b) in enumerate(found))
            lengths = [end - first for _, first, end in each]
            assert max(lengths) - min(lengths) <= 1


# -- choices that do not exist --------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["psft", "gem", "DFT", "sft", ""])
def test_imitation_weights_name_their_choices(loss_type):
    """psft and gem, which have losses of their own, are no silent iw_sft, nor is a misspelling."""
    lp, mask = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=f"'{loss_type}' is none of dft, dft_sequence, power, "):
        imitation_weights(lp, mask, loss_type, ref_logprobs=lp)


def test_kept_names_its_choices():
    """--keep worst is not --keep threshold."""
    with pytest.raises(ValueError, match="^keep 'worst' is none of threshold, best$"):
        sft.kept(torch.zeros(1, 2), "worst")


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_weights", [sft.token_weights, dft_token_weights])
def test_token_weights_keep_the_precision_of_the_mask(token_weights):
    """Of a bool mask float32, of a float64 mask float64: thirds that are right to 16 digits."""
    mask = torch.tensor([[True, True, True]])
    assert token_weights(mask).dtype == torch.float32
    found = token_weights(mask.double())
    assert found.dtype == torch.float64 and (found == 1 / 3).all()


def test_a_rounding_error_below_the_threshold_is_forgiven():
    """A weighted sum of rewards may miss it by 1e-6, and by no more; DFT's class likewise."""
    rewards = 1 - torch.tensor([[0.0, 0.9e-6, 1.5e-6, 1e-3]], dtype=torch.float64)
    assert sft.kept(rewards).tolist() == [[1, 1, 0, 0]]
    for missing, kept in ((0.8e-6, 16), (1.5e-6, 0)):
        algo = make(DFT)
        algo.rewards.functions = {"near": lambda p, c, missing=missing, **columns:
                                  [1 - missing] * len(p)}
        assert algo.collect(PROBLEMS, generator(), 1)[1]["kept"] == (kept, 16)


@pytest.mark.parametrize("token_weights", [sft.token_weights, dft_token_weights])
def test_token_weights_of_one_token_and_of_none(token_weights):
    """One token has the whole weight; where there is none, every weight is 0 and not 0/0."""
    assert token_weights(torch.tensor([[True, False]])).tolist() == [[1, 0]]
    assert token_weights(torch.tensor([[False, False]])).tolist() == [[0, 0]]


def test_what_is_kept_has_the_precision_of_the_rewards():
    """0 and 1 in float64 where the rewards are, under both rules."""
    for dtype in (torch.float32, torch.float64):
        rewards = torch.tensor([[1.0, 0.0]], dtype=dtype)
        assert sft.kept(rewards).dtype == sft.kept(rewards, "best").dtype == dtype


def pair_batch():
    batch, _ = data.preference_pairs(PAIRS, Letters())
    return {**batch, "label": torch.arange(6) % 2 == 0}


def row_weights_batch():
    """Demonstrations as if sampled, with graded weights."""
    batch = data.collate(DEMONSTRATIONS, Letters())
    return {**batch, "row_weights": torch.tensor([0.25, 0.0, 0.75, 0.5, 1.0])}


def demonstration_batch():
    return data.collate(DEMONSTRATIONS, Letters())


COMPUTED = [(SFT, {}, demonstration_batch), (SFT, {}, row_weights_batch),
            *[(DFT, dict(loss_type=name), demonstration_batch) for name in DFT_LOSSES],
            *[(DPO, dict(loss_type=name), pair_batch) for name in PAIR_LOSSES + ["kto"]],
            (DPO, dict(loss_type="ipo", ipo_average=True, rpo_alpha=0.3), pair_batch)]


@pytest.mark.parametrize("Algorithm, flags, make_batch", COMPUTED)
def test_a_double_model_computes_in_float64(monkeypatch, Algorithm, flags, make_batch):
    """Loss and gradient of a model.double() are those of the same weights where every tensor is
    float64, to 14 digits: a single step in float32 would leave 7. The loss says so in its dtype."""
    models = [tiny_model(seed).double() for seed in (0, 1)]

    def loss_and_gradient():
        model, ref_model = copy.deepcopy(models)
        algo = Algorithm(Algorithm.Config(**flags), model, ref_model, Letters(), data.Chain(2, 3))
        algo.old_model = copy.deepcopy(ref_model)   # of psft
        [minibatch] = algo.minibatches(make_batch())
        loss, _ = algo.loss(minibatch)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
    loss, gradient = loss_and_gradient()
    assert loss.dtype == gradient.dtype == torch.float64
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        exact, exact_gradient = loss_and_gradient()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-13) and loss != 0
    assert (gradient - exact_gradient).abs().max() < 1e-13 < gradient.abs().max()


def test_a_double_reward_model_computes_in_float64():
    """By hand from answers read alone: the loss is float64 and right to 14 digits."""
    algo = RM(RMConfig(), tiny_model().double(), tiny_model().double(), Letters(), data.Chain(2, 3))
    move(algo.model, 0.3)
    [minibatch] = algo.minibatches(pair_batch())
    loss, _ = algo.loss(minibatch)
    rewards = []
    for p, c in texts_of(minibatch):
        ids = torch.tensor([[16, *Letters().encode(p + c), 16]])
        rewards.append(algo.model(ids)[0, -1, 0].item())
    pairs = list(zip(rewards[0::2], rewards[1::2]))
    by_hand = [math.log1p(math.exp(b - a)) + 0.01 * (a + b) ** 2 for a, b in pairs]
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(sum(by_hand) / 3, rel=1e-13)


# -- examples: what the loop draws from -----------------------------------------------------------


def test_sft_trains_on_prompts_too_where_asked():
    """--completion_only false, as TRL's completion_only_loss=False: the same demonstrations, with
    the prompt in the completion, so that each of its tokens is trained."""
    task, config = data.Chain(2, 3), SFTConfig(completion_only=False, num_demonstrations=5)
    algo = SFT(config, tiny_model(), tiny_model(), Letters(), task)
    examples = algo.examples(seed=3)
    demonstrations = [(e["prompt"], e["completion"]) for e in data.demonstrations(task, 5, 3)]
    assert examples == [{"prompt": "", "completion": p + c} for p, c in demonstrations]
    [minibatch] = algo.minibatches(algo.collect(examples, None)[0])
    tokens = sum(len(p + c) + 1 for p, c in demonstrations)
    assert minibatch["completion_mask"].sum() == tokens
    assert (minibatch["weights"][minibatch["completion_mask"]] - 1 / tokens).abs().max() < 1e-8


def test_sft_trains_on_the_prompts_of_a_file(tmp_path):
    """A file's prompt and completion likewise; a text is all completion as it is."""
    for row, text in (({"prompt": "7+5=", "completion": "2"}, "7+5=2"), ({"text": "1+1"}, "1+1")):
        task = file_task(tmp_path, [row])
        algo = SFT(SFTConfig(completion_only=False), tiny_model(), tiny_model(), Letters(), task)
        assert algo.examples(0) == [{"prompt": "", "completion": text}]


def test_a_corpus_is_for_whole_documents():
    """With --num_documents documents of the corpus, as many and of that seed; with completions
    alone a corpus makes no sense, and is refused."""
    task = data.Chain(2, 3)
    config = SFTConfig(completion_only=False, num_documents=7)
    algo = SFT(config, tiny_model(), None, Letters(), task)
    assert [e["completion"] for e in algo.examples(2)] == task.corpus(7, 2)
    with pytest.raises(InputError, match="--num_documents is the size of a corpus"):
        SFTConfig(num_documents=7)


@pytest.mark.parametrize("Algorithm", [SFT, DFT, DPO, RM])
def test_each_algorithm_draws_what_its_flags_ask_for(Algorithm):
    """As many as the flag says, from the training split, drawn by the seed."""
    task = data.Chain(2, 3)
    if Algorithm in (SFT, DFT):
        config = Algorithm.Config(num_demonstrations=5, num_prompts=9)
        algo = Algorithm(config, tiny_model(), tiny_model(), Letters(), task)
        assert algo.examples(4) == data.demonstrations(task, 5, 4)
    config = Algorithm.Config(num_prompts=9, **SELF.get(Algorithm, {}))
    algo = Algorithm(config, tiny_model(), tiny_model(), Letters(), task)
    assert algo.examples(4) == data.problems(task, "train", 9, 4)
    assert algo.examples(4) != algo.examples(5)


@pytest.mark.parametrize("Algorithm, flags, columns", [
    *[(Algorithm, dict(), [("prompt", "completion"), ("text",)]) for Algorithm in (SFT, DFT)],
    *[(Algorithm, dict(source="self"), [("prompt", "answer")]) for Algorithm in (SFT, DFT)],
    *[(Algorithm, dict(source="self", reward="brevity,verifier"), [("prompt", "answer")])
      for Algorithm in (SFT, DFT)],
    *[(Algorithm, dict(source="self", reward="brevity,majority"), [("prompt",)])
      for Algorithm in (SFT, DFT)],
    (DPO, dict(), [("prompt", "chosen", "rejected"), ("prompt", "answer")]),
    (DPO, dict(reward="majority"), [("prompt", "chosen", "rejected"), ("prompt",)]),
    (DPO, dict(reward="brevity,verifier"), [("prompt", "chosen", "rejected"),
                                            ("prompt", "answer")]),
    (DPO, dict(loss_type="kto"), [("prompt", "chosen", "rejected"),
                                  ("prompt", "completion", "label"), ("prompt", "answer")]),
    (RM, dict(), [("prompt", "chosen", "rejected"), ("prompt", "answer")]),
])
def test_columns_that_a_file_must_have(Algorithm, flags, columns):
    """In the order in which they are tried: what is there decides what a line is taken for."""
    assert Algorithm.columns(Algorithm.Config(**flags)) == columns


# -- networks: what is trained, what is kept, what is saved ---------------------------------------


@pytest.mark.parametrize("Algorithm, flags, frozen", [
    (SFT, dict(), {"ref_model"}), (SFT, dict(source="self"), {"ref_model", "sampler"}),
    (DFT, dict(), {"ref_model"}), (DFT, dict(source="self"), {"ref_model", "sampler"}),
    (DFT, dict(loss_type="psft"), {"ref_model", "old_model"}),
    (DFT, dict(loss_type="psft", source="self"), {"ref_model", "old_model", "sampler"}),
    (DPO, dict(), {"ref_model", "sampler"}),
    (DPO, dict(sync_ref=True), {"ref_model", "sampler", "moving_ref_model"}),
])
def test_networks_are_trained_or_frozen(Algorithm, flags, frozen):
    """The model is trained; the reference, and copies that lag behind, are kept, and so saved under
    those names: each a network of its own, equal to the model or the reference at first, and
    without gradients."""
    model, ref_model = tiny_model(), tiny_model(1).requires_grad_(False)
    algo = Algorithm(Algorithm.Config(**flags), model, ref_model, Letters(), data.Chain(2, 3))
    assert algo.networks == {"model": model} and set(algo.frozen) == frozen and algo.model is model
    assert algo.frozen["ref_model"] is ref_model and algo.rows_together == 1 + (Algorithm is DPO)
    assert algo.ref_model is algo.frozen.get("moving_ref_model", ref_model)
    for name in frozen - {"ref_model"}:
        start = ref_model if name == "moving_ref_model" else model
        attribute = {"moving_ref_model": "ref_model"}.get(name, name)
        assert getattr(algo, attribute) is algo.frozen[name] is not start
        assert same_weights(start.state_dict(), algo.frozen[name].state_dict())
        assert not any(p.requires_grad for p in algo.frozen[name].parameters())


def test_pretraining_has_no_reference():
    """Without a reference model there is none among the frozen networks, which are all saved."""
    assert SFT(SFTConfig(), tiny_model(), None, Letters(), data.Chain(2, 3)).frozen == {}


def test_a_reward_model_is_trained_beside_the_sampler():
    """What is trained is a copy of the model with one number for a head, 0 at first; the start
    model samples, and is kept."""
    model, ref_model = tiny_model(), tiny_model(1)
    algo = RM(RMConfig(), model, ref_model, Letters(), data.Chain(2, 3))
    assert algo.networks == {"model": algo.model} and algo.model.config.scalar_head
    assert algo.frozen == {"sampler": ref_model} and algo.sampler is ref_model
    trunk = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert same_weights(trunk, algo.model.state_dict()) and (algo.model.lm_head.weight == 0).all()
    assert algo.rows_together == 2


# -- collecting -----------------------------------------------------------------------------------


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def rollout(algo, model, temperature, num_generations=4, seed=3):
    """What data.rollout gives with these settings and lots."""
    return data.rollout(model, algo.tokenizer, algo.task, algo.rewards, PROBLEMS, num_generations,
                        temperature, generator(seed))[0]


def make(Algorithm, **flags):
    """Any of the four on problems, judged by the coin, in groups of 4; the sampler is no copy."""
    config = Algorithm.Config(**{"num_generations": 4, **SELF.get(Algorithm, {}), **flags})
    algo = Algorithm(config, tiny_model(), tiny_model(1), Letters(), data.Chain(2, 3))
    algo.rewards.functions = {"coin": coin}
    algo.max_steps, algo.optimizer = 6, algo.model.configure_optimizer(1e-2, 0.0)
    move(algo.sampler, 0.2, seed=8)
    return algo


@pytest.mark.parametrize("Algorithm", [SFT, DFT, DPO, RM])
@pytest.mark.parametrize("temperature, num_generations", [(1.0, 4), (0.6, 4), (1.0, 6)])
def test_the_sampler_writes_the_answers(Algorithm, temperature, num_generations):
    """Between two renewals the sampler, not the policy: num_generations answers to each prompt, at
    that temperature, with the lots of the step's generator."""
    flags = dict(temperature=temperature, num_generations=num_generations)
    algo = make(Algorithm, **flags, **({"sync_steps": "2"} if Algorithm is DPO else {}))
    batch, metrics = algo.collect(PROBLEMS, generator(), step=1)
    written = texts_of(rollout(algo, algo.sampler, temperature, num_generations))
    if Algorithm is SFT:
        assert texts_of(batch) == written
    elif Algorithm is DFT:
        assert texts_of(batch) == [row for row in written if coin(*[[x] for x in row]) == [1]]
    else:
        assert set(texts_of(batch)) <= set(written) and len(batch["prompt_index"]) >= 4
    assert metrics["reward"][1] == 4 * num_generations
    assert metrics["reward"][0] == sum(coin(*zip(*written)))
    if Algorithm is not RM:   # whose model is no policy
        assert texts_of(rollout(algo, algo.model, temperature, num_generations)) != written


@pytest.mark.parametrize("Algorithm", [SFT, DFT, DPO])
def test_without_a_step_it_is_the_first(Algorithm):
    """collect(examples, generator) is step 0, with which a round begins: the sampler is renewed."""
    algo = make(Algorithm)
    assert not same_weights(algo.model.state_dict(), algo.sampler.state_dict())
    algo.collect(PROBLEMS, generator())
    assert same_weights(algo.model.state_dict(), algo.sampler.state_dict())


def test_kept_counts_the_answers_that_are_imitated():
    """A share of all that were sampled; awr gives each a weight, best one of a group."""
    for flags, kept in ((dict(), None), (dict(keep="best"), 4), (dict(weighting="awr"), 16)):
        algo = make(SFT, **flags)
        batch, metrics = algo.collect(PROBLEMS, generator(), 1)
        right = sum(coin(*zip(*texts_of(batch))))
        assert metrics["kept"] == (right if kept is None else kept, 16) and 4 < right < 16
        assert "rewards" not in batch and batch["row_weights"].shape == (16,)
    _, metrics = make(DFT).collect(PROBLEMS, generator(), 1)
    assert metrics["kept"] == (right, 16)


def test_the_best_of_each_group():
    """Groups of 3 answers to 4 prompts: one of each group of 3 is kept, not one of each 4."""
    batch, metrics = make(SFT, keep="best", num_generations=3).collect(PROBLEMS, generator(), 1)
    assert (batch["row_weights"].view(4, 3).sum(1) == 1).all() and metrics["kept"] == (4, 12)


def test_a_round_a_step_restarts_every_step():
    """With as many rounds as steps the policy is the start model again at every step, and the
    optimizer remembers nothing; the sampler is what had been trained."""
    algo = make(SFT, rounds=6, restart=True)
    for step in range(3):
        move(algo.model, 0.1, seed=step)
        trained = copy.deepcopy(algo.model.state_dict())
        algo.optimizer.state["something"] = "remembered"
        algo.collect(PROBLEMS, generator(), step)
        assert same_weights(algo.ref_model.state_dict(), algo.model.state_dict())
        assert same_weights(trained, algo.sampler.state_dict()) and not algo.optimizer.state


@pytest.mark.parametrize("sync_ref", [False, True])
@pytest.mark.parametrize("sync_steps, renewals", [("1", [0, 1, 2, 3, 4]), ("2", [0, 2, 4]),
                                                  ("3", [0, 3]), ("inf", [0])])
@pytest.mark.parametrize("from_file", [False, True])
def test_dpo_renews_sampler_and_reference(tmp_path, sync_steps, renewals, sync_ref, from_file):
    """At steps 0, s, 2s, ... the sampler becomes the policy, and with --sync_ref so does the
    reference, also where a file brings the pairs; in between, and otherwise, both stay."""
    config = DPOConfig(num_generations=4, sync_steps=sync_steps, sync_ref=sync_ref)
    task = file_task(tmp_path, PAIRS) if from_file else data.Chain(2, 3)
    algo = DPO(config, tiny_model(), tiny_model(1), Letters(), task)
    examples = PAIRS if from_file else PROBLEMS
    lagging = {"ref_model": sync_ref} if from_file else {"sampler": True, "ref_model": sync_ref}
    for step in range(5):
        move(algo.model, 0.1, seed=step)
        policy = copy.deepcopy(algo.model.state_dict())
        before = {name: copy.deepcopy(getattr(algo, name).state_dict()) for name in lagging}
        algo.collect(examples, generator(), step)
        for name, moves in lagging.items():
            due = policy if moves and step in renewals else before[name]
            assert same_weights(due, getattr(algo, name).state_dict()), (name, step)
        assert same_weights(policy, algo.model.state_dict())


def test_rso_accepts_and_chooses_by_different_lots(monkeypatch):
    """--pair_sampling rso with graded rewards 1, .5 and 0 and temperature 2: those of .5 and 0 are
    accepted with p = e^-.25 and q = e^-.5, apart from each other, and of two accepted either is
    rejected half of the time. So .5 is rejected in p (1 - q) + p q / 2 = .543 of the groups and 0
    in .370. Were the lots of acceptance used again to choose, it would be .595 and .318."""
    n, algo = 20_000, make(DPO, pair_sampling="rso", rso_beta=2.0)
    batch = {"prompt_ids": torch.full((n, 1), 16),
             "prompt_mask": torch.ones(n, 1, dtype=torch.bool),
             "completion_ids": torch.arange(3 * n)[:, None] % 3,
             "completion_mask": torch.ones(3 * n, 1, dtype=torch.bool),
             "prompt_index": torch.arange(n).repeat_interleave(3),
             "rewards": torch.tensor([1.0, 0.5, 0.0]).repeat(n)}
    monkeypatch.setattr(data, "rollout", lambda *args: (dict(batch), {}))
    pairs, metrics = algo.collect([None] * n, generator())
    chosen, rejected = pairs["completion_ids"][0::2, 0], pairs["completion_ids"][1::2, 0]
    p, q = math.exp(-0.25), math.exp(-0.5)
    shares = [(rejected == row).sum().item() / n for row in (1, 2)]
    assert (chosen == 0).all()
    assert shares == pytest.approx([p * (1 - q / 2), q * (1 - p / 2)], abs=0.015)
    assert metrics["skipped_pairs"][0] / n == pytest.approx((1 - p) * (1 - q), abs=0.015)


@pytest.mark.parametrize("Algorithm", [DPO, RM])
def test_pairs_are_drawn_by_the_lots_of_the_step(Algorithm):
    """Whatever the state of the global generator: the generator alone decides. Another seed,
    another choice among the same answers."""
    algo, found = make(Algorithm), []
    answers = rollout(algo, algo.sampler, 1.0)
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(len(found))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "rollout", lambda *args: (dict(answers), {}))
            found.append(texts_of(algo.collect(PROBLEMS, generator(seed), 1)[0]))
    assert found[0] == found[1] and len(set(map(str, found))) > 2


def test_kto_reads_each_answer_after_another_prompt(tmp_path):
    """z0 is measured on answers after other rows' prompts: of single answers that of two rows
    before, with two rows the other's; pairs share a prompt, so that of the pair before."""
    algo = DPO(DPOConfig(loss_type="kto"), tiny_model(), tiny_model(1), Letters(),
               file_task(tmp_path, SINGLES))
    seen, rescore = [], algo.rescore


    def spy(model, batch):
        seen.append((model, texts_of(batch)))
        return rescore(model, batch)
    algo.rescore = spy
    prompts, answers = zip(*((e["prompt"], e["completion"]) for e in SINGLES))
    for n, others in ((3, [1, 2, 0]), (2, [1, 0]), (1, [0])):
        seen.clear()
        algo.minibatches(algo.collect(SINGLES[:n], None)[0])
        other = [(prompts[i], answer) for i, answer in zip(others, answers)]
        own = list(zip(prompts, answers))[:n]
        assert seen == [(algo.ref_model, own), (algo.model, other), (algo.ref_model, other)]
    seen.clear()
    algo.minibatches(pair_batch())
    before = {pair["prompt"]: PAIRS[i - 1]["prompt"] for i, pair in enumerate(PAIRS)}
    assert seen[2][1] == seen[1][1] == [(before[p], c) for p, c in seen[0][1]]


def test_kto_keeps_the_own_prompt_where_another_does_not_fit():
    """block_size 32: an answer of 24 tokens and its <end> after a prompt of 7 fits exactly, after
    one of 8 it does not, and is read after its own."""
    algo = make(DPO, loss_type="kto")
    assert algo.model.config.block_size == 32
    seen, rescore = [], algo.rescore

    def spy(model, batch):
        seen.append(batch["prompt_index"].tolist())
        return rescore(model, batch)
    algo.rescore = spy
    for extra, read_after in ((0, [1, 0]), (1, [0, 0])):
        rows = [{"prompt": "1", "completion": "2" * 24},
                {"prompt": "1" * (6 + extra), "completion": "2"}]   # and the <end> before it
        batch = {**data.collate(rows, Letters()), "label": torch.tensor([True, False])}
        seen.clear()
        algo.minibatches(batch)
        assert seen[1:] == [read_after] * 2


def test_z0_is_beta_times_the_mean_and_never_below_0():
    """By hand from log-probabilities of 3 and 1 against 0.5 and 0.5: beta (2.5 + .5) / 2; the other
    way round 0. Every row gets it."""
    for first, second, z0 in ((3.0, 0.5, 0.2 * 1.5), (0.5, 3.0, 0.0)):
        algo = make(DPO, loss_type="kto", beta=0.2)
        logps = {algo.model: torch.tensor([first, (first + 1) / 4 if first > 1 else 0.5]),
                 algo.ref_model: torch.tensor([second, 0.5])}
        algo.rescore = lambda model, batch: logps[model]
        batch = data.collate(SINGLES[:2], Letters())
        [minibatch] = algo.minibatches({**batch, "label": torch.tensor([True, False])})
        assert minibatch["z0"].tolist() == pytest.approx([z0] * 2)


def test_a_tie_is_no_right_order():
    """Where policy and reference are one model, and where a reward model's head is 0, every margin
    is exactly 0: no pair counts as ranked right, none as wrong by a margin."""
    algo = make(DPO)
    algo.ref_model.load_state_dict(algo.model.state_dict())
    metrics = algo.loss(algo.minibatches(pair_batch())[0])[1]
    assert metrics["rewards/accuracies"] == (0, 3) and metrics["rewards/margins"] == (0, 3)
    metrics = make(RM).loss(make(RM).minibatches(pair_batch())[0])[1]
    assert metrics["accuracy"] == (0, 3) and metrics["margin"] == (0, 3)


# -- what a file holds ----------------------------------------------------------------------------


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
def test_what_the_lines_of_a_file_are_taken_for(tmp_path, loss_type, columns, single, from_file):
    """Preferences before labelled answers before problems, by the columns of the lines; only
    problems need a sampler and rewards."""
    row = {"prompt": "7+5=", "chosen": "2", "rejected": "3", "completion": "2", "label": True,
           "answer": "2"}
    task = file_task(tmp_path, [{c: row[c] for c in columns}] * 3)
    algo = DPO(DPOConfig(loss_type=loss_type), tiny_model(), tiny_model(1), Letters(), task)
    assert (algo.single, algo.from_file) == (single, from_file)
    assert hasattr(algo, "rewards") == hasattr(algo, "sampler") == (not from_file)
    assert ("sampler" in algo.frozen) == (not from_file)
    assert algo.rows_together == (1 if loss_type == "kto" else 2)
    if from_file:
        batch, _ = algo.collect(task.train, None)
        rows = [("7+5=", "2")] * 3 if single else [("7+5=", "2"), ("7+5=", "3")] * 3
        assert texts_of(batch) == rows
        assert batch["label"].tolist() == ([True] * 3 if single else [True, False] * 3)


def test_a_reward_model_reads_preferences_or_makes_them(tmp_path):
    """A file with chosen and rejected brings the pairs; one of problems, and the built-in task, are
    answered and judged."""
    config, models = RMConfig(), (tiny_model(), tiny_model(1))
    pairs = RM(config, *models, Letters(), file_task(tmp_path, PAIRS))
    assert pairs.from_file and pairs.rewards is None
    assert texts_of(pairs.collect(PAIRS[:1], None)[0]) == [("7+5=", "2"), ("7+5=", "3")]
    sums = file_task(tmp_path, [{"prompt": "1+1=", "answer": "2"}])
    problems = RM(config, *models, Letters(), sums)
    chain = RM(config, *models, Letters(), data.Chain(2, 3))
    for algo in (problems, chain):
        assert not algo.from_file and list(algo.rewards.functions) == ["verifier"]


# -- settings -------------------------------------------------------------------------------------


def test_rewards_and_their_weights_reach_the_classes():
    """--reward and --reward_weights, of every class that judges answers."""
    for Algorithm in (SFT, DFT, DPO, RM):
        flags = dict(reward="brevity,verifier", reward_weights="0.5,2", **SELF.get(Algorithm, {}))
        algo = Algorithm(Algorithm.Config(**flags), tiny_model(), tiny_model(), Letters(),
                         data.Chain(2, 3))
        assert list(algo.rewards.functions) == ["brevity", "verifier"]
        assert algo.rewards.weights == [0.5, 2]


def test_other_rules_than_a_threshold_need_no_start_of_it():
    """--keep best and --weighting awr are accepted as they are; a start with either is refused, and
    with the reward that is graded accepted."""
    for flags in (dict(keep="best"), dict(weighting="awr")):
        SFTConfig(source="self", reward="brevity", **flags)
        with pytest.raises(InputError, match="--threshold_start is for --keep threshold"):
            SFTConfig(source="self", reward="brevity", threshold_start=0.0, **flags)
    SFTConfig(source="self", reward="brevity", threshold_start=0.0)


@pytest.mark.parametrize("flags, reason", [
    (dict(reward="model"), "--reward model: a reward model cannot be its own judge"),
    (dict(reward="verifier,model"), "--reward model: a reward model cannot be its own judge"),
    (dict(num_generations=1), "--num_generations 1: a pair needs at least 2 answers"),
    (dict(num_prompts=0), "--num_prompts 0: at least 1"),
    (dict(center_rewards_coefficient=-0.1), "--center_rewards_coefficient -0.1: a number of at"),
    (dict(temperature=0.0), "--temperature 0.0: a number above 0"),
])
def test_impossible_settings_of_a_reward_model_are_refused(flags, reason):
    """In one line that names the flag."""
    with pytest.raises(InputError, match=reason):
        RMConfig(**flags)


def test_settings_of_a_reward_model_at_the_edge_are_accepted():
    """Two answers, one prompt, no centring."""
    RMConfig(num_generations=2, num_prompts=1, center_rewards_coefficient=0.0, temperature=0.01)


def test_centring_is_the_square_of_the_sum():
    """Rewards 2 and 1 at coefficient .1: .1 x 3^2 on top of -log sigma(1); -2 and -1 likewise."""
    two, one = torch.tensor([2.0, -1.0]).double(), torch.tensor([1.0, -2.0]).double()
    extra = rm.reward_loss(two, one, 0.1) - rm.reward_loss(two, one)
    assert extra.tolist() == pytest.approx([0.9, 0.9])


def test_the_scorer_cuts_what_does_not_fit():
    """block_size 32 and a prompt of 1 + 4 tokens leave room for 27: of an answer of 45 the reward
    is that of its first 27 tokens; one of 26 and its <end> is read whole."""
    torch.manual_seed(0)
    model = tiny_model().with_scalar_head()
    move(model, 0.3)
    judge = rm.scorer(model, Letters())
    prompt = [16, *Letters().encode("7+5=")]
    for text, read in (("123456789" * 5, ("123456789" * 3)), ("12345678" * 3 + "98", None)):
        ids = prompt + (Letters().encode(read) if read else [*Letters().encode(text), 16])
        assert len(ids) == 32
        with torch.no_grad():
            alone = model(torch.tensor([ids]))[0, -1, 0].item()
        assert judge(["7+5="], [text]) == [pytest.approx(alone, abs=1e-5)]


def test_a_run_on_prompts_and_completions(tiny_base, tmp_path, monkeypatch):
    """From the command line: it ends well, and has trained every token of its 8 demonstrations."""
    monkeypatch.chdir(tmp_path)
    for flag, whole in (("true", False), ("false", True)):
        assert run("--algo", "sft", "--completion_only", flag, *TASK, "--max_steps", 2,
                   "--num_demonstrations", 8, "--batch_size", 4, "--init_from", tiny_base,
                   "--out_dir", flag) == 0
        trained = train.read_json(f"{flag}/summary.json")["trained_tokens"]
        examples = data.demonstrations(data.Chain(2, 2), 8, 0)
        assert trained == sum(len(e["completion"]) + 1 + whole * len(e["prompt"]) for e in examples)
