"""
The Distill class on tiny models: whose text, whose distributions, what is trained and what is not,
and which teachers are refused. Its mathematics is in identities/test_distill_math.py.
"""

import dataclasses

import pytest
import torch

import data
from distill import Distill, DistillConfig
from harness.errors import InputError
from harness.log import Log
from harness.tokens import gradient_weights
from model import GPT
from tiny import (PROBLEMS, SEED, Letters, check_invariance, file_task, loss_and_gradient, make,
                  minibatches, read, read_alone, rows, same, same_weights, sample, tiny_model,
                  update, weights_of)

DIVERGENCES = ["reverse", "forward", "sampled"]


def save(model, path, **more):
    content = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    torch.save({**content, **more}, path)
    return str(path)


@pytest.fixture
def make_distill(tmp_path):
    """Distillation on problems, four answers each, from a teacher of other weights than both the
    student and its reference."""
    def make_distill(teacher=None, task=None, **settings):
        path = save(teacher or tiny_model(3), tmp_path / "teacher.pt")
        return make(Distill, task=task, teacher=path, **settings)
    return make_distill


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes, divergence", [
    ("student", "reverse"), ("student", "forward"), ("student", "sampled"), ("teacher", "forward"),
    ("teacher", "reverse")])
def test_the_loss_against_one_pass_per_answer(float64, make_distill, prefixes, divergence):
    """Student and teacher read each answer alone and unpadded, at the sampling temperature; the
    divergences of all its tokens, <end> included, are averaged over the batch."""
    algo = make_distill(prefixes=prefixes, divergence=divergence, temperature=1.5).double()
    [minibatch] = minibatches(algo)
    values, kls, entropies = [], [], []
    for prompt, completion, _ in rows(minibatch):
        p, q = (read_alone(model, prompt, completion)[:-1].div(1.5).log_softmax(-1)
                for model in (algo.model, algo.teacher))                        # (n, V)
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        entropies += (-p.exp() * p).sum(-1).tolist()
        drawn = [(p[t, token], q[t, token]) for t, token in enumerate(completion)]
        values += {"reverse": (p.exp() * (p - q)).sum(-1), "forward": (q.exp() * (q - p)).sum(-1),
                   "sampled": torch.tensor([(b - a) * -a for a, b in drawn])}[divergence].tolist()
    loss, _, line = loss_and_gradient(algo, minibatch)
    assert len(values) == minibatch["completion_mask"].sum() > 40
    assert same(loss, sum(values) / len(values), 1e-9)
    assert line["teacher_kl"] == pytest.approx(sum(kls) / len(kls))
    assert line["entropy"] == pytest.approx(sum(entropies) / len(entropies))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_bookkeeping_changes_a_result(float64, make_distill, divergence):
    """Micro-batches, padding and order: the same loss, gradient and log. Everything is float64 in a
    float64 model."""
    algo = make_distill(divergence=divergence).double()
    [minibatch] = minibatches(algo)
    loss, _, _ = check_invariance(algo, minibatch)
    assert loss.dtype == minibatch["weights"].dtype == torch.float64
    assert abs(minibatch["weights"].sum() - 1) < 1e-14


def test_the_teacher_is_read_and_not_trained(make_distill):
    """It takes no gradient, is not the optimizer's and keeps every bit, as the reference does; the
    student moves, towards it."""
    algo = make_distill(learning_rate=1e-2)
    kept = {name: weights_of(getattr(algo, name)) for name in ("teacher", "ref_model", "model")}
    assert same_weights(kept["teacher"], weights_of(tiny_model(3)))
    trained = {name for name, p in algo.named_parameters() if p.requires_grad}
    assert trained == {f"model.{name}" for name, _ in algo.model.named_parameters()}
    inside = {id(p) for group in algo.optimizer.param_groups for p in group["params"]}
    assert not inside & {id(p) for p in algo.teacher.parameters()}
    lines = [update(algo, *minibatches(algo, seed=step)) for step in range(30)]
    assert same_weights(kept["teacher"], weights_of(algo.teacher))
    assert same_weights(kept["ref_model"], weights_of(algo.ref_model))
    assert not same_weights(kept["model"], weights_of(algo.model))
    assert lines[-1]["teacher_kl"] < 0.7 * lines[0]["teacher_kl"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_stays(make_distill, divergence):
    """No loss and no gradient."""
    algo = make_distill(teacher=tiny_model(), divergence=divergence)
    loss, gradient, line = loss_and_gradient(algo, *minibatches(algo))
    assert abs(loss) < 1e-6 and gradient.abs().max() < 1e-6 and line["teacher_kl"] < 1e-6


def test_inspect_scores_as_the_loss_does(make_distill):
    """--inspect shows the log-probabilities at the sampling temperature."""
    algo = make_distill(temperature=0.7)
    [minibatch] = minibatches(algo)
    mask = minibatch["completion_mask"]
    weight, logprobs = gradient_weights(algo, minibatch)
    every = (read(algo.model, minibatch) / 0.7).log_softmax(-1)
    expected = every.gather(-1, minibatch["completion_ids"][..., None])[..., 0]
    assert same(logprobs[mask], expected.detach()[mask], 1e-5)
    assert (weight[mask] > 1e-4).any() and (weight[mask] < -1e-4).any()


# -- whose text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", ["student", "teacher"])
def test_who_writes(make_distill, prefixes):
    """The student as it is now, or the teacher: the very answers that this model samples."""
    algo = make_distill(prefixes=prefixes, temperature=1.2)
    update(algo, *minibatches(algo))                      # the student is not its start any more
    prompts = data.collate([{"prompt": e["prompt"]} for e in PROBLEMS], algo.tokenizer)
    drawn = {}
    for name in ("model", "teacher"):
        drawn[name] = getattr(algo, name).generate(
            prompts["prompt_ids"], prompts["prompt_mask"], algo.task.max_new_tokens,
            Letters.eos_id, Letters.pad_id, 4, 1.2,
            generator=torch.Generator().manual_seed(SEED)).completion_ids
    batch = sample(algo)
    writer = {"student": "model", "teacher": "teacher"}[prefixes]
    assert torch.equal(batch["completion_ids"], drawn[writer])
    assert not same(drawn["model"].sum(), drawn["teacher"].sum())


def test_answers_are_rewarded_in_the_log_alone(make_distill):
    """The reward is logged beside the loss, and another reward trains nothing else."""
    found = {}
    for reward in ("verifier", "brevity"):
        algo, log = make_distill(reward=reward), Log()
        [minibatch] = minibatches(algo, log=log)
        found[reward] = loss_and_gradient(algo, minibatch)[:2], log.line()
    assert torch.equal(found["verifier"][0][1], found["brevity"][0][1])
    assert found["verifier"][1]["reward"] == found["brevity"][1]["true_reward"] >= 0
    assert found["brevity"][1]["reward"] < 0


@pytest.mark.parametrize("answer", [{}, {"answer": "2"}], ids=["prompts alone", "with answers"])
def test_a_file_of_prompts_is_enough(make_distill, answer):
    """Where there is nothing to verify, nothing is said of rewards; lengths are logged as ever."""
    task = file_task([{"prompt": p, **answer} for p in ("7+5=", "1-2*3=")], 8)
    algo, log = make_distill(task=task), Log()
    assert DistillConfig().columns() == [("prompt",)]
    [minibatch] = minibatches(algo, algo.examples(), log=log)
    assert ("reward" in log.line()) == bool(answer) and log.totals["sampled_tokens"] > 0
    assert loss_and_gradient(algo, minibatch)[1].abs().max() > 1e-4


# -- teachers -------------------------------------------------------------------------------------


def test_a_teacher_of_another_shape(tmp_path):
    """It may be wider, deeper and read more than the student."""
    config = dataclasses.replace(tiny_model().config, n_embd=24, n_layer=3, block_size=50)
    algo = make(Distill, teacher=save(GPT(config), tmp_path / "teacher.pt"))
    assert loss_and_gradient(algo, *minibatches(algo))[1].abs().max() > 1e-3


@pytest.mark.parametrize("change, more, said", [
    (dict(vocab_size=19), {}, "has another vocabulary than the student"),
    (dict(), dict(tokenizer="gpt2"), "has another vocabulary than the student"),
    (dict(block_size=31), {}, "reads 31 tokens, the student 32"),
    (dict(scalar_head=True), {}, "is a reward model, which cannot write")])
def test_teachers_that_cannot_teach(tmp_path, change, more, said):
    """Another vocabulary, a shorter memory, a head that is no vocabulary: one line each."""
    config = dataclasses.replace(tiny_model().config, **change)
    path = save(GPT(config), tmp_path / "teacher.pt", **more)
    with pytest.raises(InputError, match=f"--teacher {path} {said}"):
        make(Distill, teacher=path)


def test_no_teacher():
    """Without one, or with one that is not there: how to make one, and where it was looked for."""
    with pytest.raises(InputError, match="--algo grpo, then give --teacher out/chain-grpo-0$"):
        make(Distill)
    with pytest.raises(InputError, match="^nowhere: there is no checkpoint there$"):
        make(Distill, teacher="nowhere")


def test_sampled_tokens_have_to_be_the_students():
    """The estimate is one on the student's draws alone."""
    with pytest.raises(InputError, match="--divergence sampled .* use --prefixes student"):
        DistillConfig(divergence="sampled", prefixes="teacher")
