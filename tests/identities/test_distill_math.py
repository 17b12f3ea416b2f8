"""
Distillation: whose divergence the tokens' KLs add up to, whose gradient they have, and what that
gradient leaves out. The student is world.LOGITS, the teacher another table.
"""

import math

import pytest
import torch

import distill
import sft
import tasks
from distill import Distill, DistillConfig, token_losses
from harness.log import Log
from world import (LENGTH, LOGITS, MASK, PI, STATE, close, expected, gradient, sequence_logprobs,
                   table, tabular, token_logprobs, visits, whole_world)

TEACHER = table(2).detach()
LOG_Q = sequence_logprobs(TEACHER)                        # (15,) of whole answers
Q = LOG_Q.exp()
LOGP, LOGQ = LOGITS.log_softmax(-1), TEACHER.log_softmax(-1)                      # (7, 3)


def losses_of(divergence, student=LOGITS, teacher=TEACHER):
    """Of the 15 sequences' tokens, (15, 3)."""
    return token_losses(token_logprobs(student), student.log_softmax(-1)[STATE],
                        token_logprobs(teacher), teacher.log_softmax(-1)[STATE], divergence)


def state_kl(logp, logq):
    """KL(p || q) after each prefix, (7, 1)."""
    return (logp.exp() * (logp - logq)).sum(-1, keepdim=True)


def loss_of_the_class(monkeypatch, probabilities, **settings):
    """Distill.loss on the whole world, its rows weighted by their probabilities."""
    monkeypatch.setattr(distill, "load_teacher", lambda config, model: tabular(TEACHER))
    algo = Distill(DistillConfig(**settings), tabular(LOGITS), None, tasks.Chain(2, 2))
    weights = MASK * probabilities.detach()[:, None]
    log = Log()
    return algo.loss({**whole_world(), "weights": weights}, log), log.line()


def test_token_losses_worked_example():
    """The docstring's: students of (.5, .5) and teachers of (.75, .25)."""
    all_logprobs, teacher = (torch.tensor([p, p]).log()[None] for p in ([.5, .5], [.75, .25]))
    drawn, teacher_drawn = all_logprobs[:, 0], teacher[:, 0]   # first the one token, then the other
    found = {name: token_losses(drawn, all_logprobs, teacher_drawn, teacher, name)[0].tolist()
             for name in ("reverse", "forward", "sampled")}
    assert found["reverse"] == pytest.approx([.5 * math.log(2 / 3) + .5 * math.log(2)] * 2)
    assert found["forward"] == pytest.approx([.75 * math.log(1.5) + .25 * math.log(.5)] * 2)
    assert found["sampled"] == pytest.approx([math.log(1.5) * math.log(2),
                                              math.log(.5) * math.log(2)])
    assert round(found["reverse"][0], 3) == .144 and round(found["forward"][0], 3) == .131
    with pytest.raises(ValueError, match="divergence 'sideways': choose from reverse, forward"):
        token_losses(drawn, all_logprobs, teacher_drawn, teacher, "sideways")


def test_the_kls_of_the_tokens_add_up_to_the_kl_of_the_answers():
    """The chain rule: summed over an answer's tokens, the reverse KLs are on average over the
    student's answers KL(pi || q) of whole answers; the forward ones over the teacher's KL(q ||
    pi)."""
    log_pi = sequence_logprobs(LOGITS)
    assert close(expected(losses_of("reverse"), PI), (PI * (log_pi - LOG_Q)).sum())
    assert close(expected(losses_of("forward"), Q), (Q * (LOG_Q - log_pi)).sum())
    assert not close(expected(losses_of("reverse"), Q), (PI * (log_pi - LOG_Q)).sum(), 0.01)


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_the_gradient_is_that_of_the_kl_at_each_prefix(monkeypatch, divergence):
    """On the student's text the loss of the class is sum_s d(s) KL(s) in value and in gradient,
    with the visits d(s) of the student held fixed (GKD, 2306.13649)."""
    kl = state_kl(LOGP, LOGQ) if divergence == "reverse" else state_kl(LOGQ, LOGP)
    closed_form = (visits(PI) * kl).sum()
    found, line = loss_of_the_class(monkeypatch, PI, divergence=divergence)
    assert close(found, closed_form)
    assert close(gradient(found, LOGITS), gradient(closed_form, LOGITS))
    real = MASK.sum()                     # and what is logged is the mean over the tokens at hand
    reverse = (state_kl(LOGP, LOGQ)[STATE, 0] * MASK).sum() / real
    entropy = (-(LOGP.exp() * LOGP).sum(-1)[STATE] * MASK).sum() / real
    assert line["teacher_kl"] == pytest.approx(reverse.item())
    assert line["entropy"] == pytest.approx(entropy.item())


def test_what_the_full_gradient_has_besides():
    """The gradient of KL(pi || q) of whole answers is that of the class plus a score-function term:
    each token's log-probability times the KLs that come after it. Only with it does a token answer
    for the prefixes to which it leads (MiniLLM, 2306.08543)."""
    full = gradient((PI * (sequence_logprobs(LOGITS) - LOG_Q)).sum(), LOGITS)
    kls = losses_of("reverse") * MASK                                   # (15, 3)
    fixed = gradient(expected(kls, PI), LOGITS)
    later = torch.stack([kls[:, t + 1:].sum(1) for t in range(LENGTH)], 1).detach()
    score = gradient(expected(token_logprobs(LOGITS) * later, PI), LOGITS)
    assert close(full, fixed + score)
    assert score[0].abs().max() > 0.01        # the first token decides how things go on
    last = [i for i in range(7) if i not in (0, 1, 2)]                  # prefixes of two tokens
    assert close(score[last], 0) and close(full[last], fixed[last])


def test_sampled_is_the_reverse_kl_on_average():
    """From the token that was drawn alone, with A = log q - log pi as its advantage, the expected
    gradient is that of the reverse KL at each prefix with the visits held fixed: grad sum_v pi log
    pi/q = E[grad log pi (log pi/q + 1)], and E[grad log pi] = 0. Of each answer alone it is not."""
    found = gradient(expected(losses_of("sampled"), PI), LOGITS)
    assert close(found, gradient(expected(losses_of("reverse"), PI), LOGITS))
    alone = [gradient((losses_of(name)[0] * MASK[0]).sum(), LOGITS)
             for name in ("sampled", "reverse")]
    assert not close(*alone, 0.01)


def test_forward_on_the_teachers_text_is_sft(monkeypatch):
    """On the teacher's text the forward KL has the expected gradient of SFT on that text; the two
    losses differ by the teacher's entropy, which no student can change. Reverse has another."""
    sft_loss = expected(sft.token_losses(token_logprobs(LOGITS)), Q)
    found, _ = loss_of_the_class(monkeypatch, Q, divergence="forward", prefixes="teacher")
    assert close(gradient(found, LOGITS), gradient(sft_loss, LOGITS))
    assert close(sft_loss - found, -(Q * LOG_Q).sum())
    other, _ = loss_of_the_class(monkeypatch, Q, divergence="reverse", prefixes="teacher")
    assert not close(gradient(other, LOGITS), gradient(sft_loss, LOGITS), 0.01)


@pytest.mark.parametrize("divergence", ["reverse", "forward", "sampled"])
def test_nothing_is_left_to_learn_at_the_teacher(divergence):
    """At pi = q every token's loss is 0 and has no gradient; elsewhere the KLs are above 0."""
    student = TEACHER.clone().requires_grad_()
    losses = losses_of(divergence, student=student)
    assert close(losses, 0) and close(gradient(expected(losses, Q), student), 0)
    if divergence != "sampled":
        assert (losses_of(divergence)[MASK] > 0).all()


def test_reverse_hardly_hears_of_what_the_student_never_writes():
    """A token of probability 1e-6 that the teacher wants in nine cases of ten: the gradient in its
    logit is p (log p/q - KL) of the reverse KL, next to nothing, and p - q of the forward one."""
    z = torch.tensor([[0.0, math.log(1e-6)]], dtype=torch.float64).requires_grad_()
    p, q = z.softmax(-1)[0, 1].item(), torch.tensor([[.1, .9]], dtype=torch.float64)
    found = {}
    for divergence in ("reverse", "forward"):
        loss = token_losses(None, z.log_softmax(-1), None, q.log(), divergence).sum()
        found[divergence] = gradient(loss, z)[0, 1].item()
    reverse = (1 - p) * math.log((1 - p) / .1) + p * math.log(p / .9)
    assert found["reverse"] == pytest.approx(p * (math.log(p / .9) - reverse))
    assert found["forward"] == pytest.approx(p - .9)
    assert -2e-5 < found["reverse"] < 0


def test_both_models_are_read_at_the_sampling_temperature(monkeypatch):
    """With --temperature 2 the divergence is between the two distributions that are sampled from,
    and 0 only where the logits agree."""
    hot = losses_of("reverse", LOGITS / 2, TEACHER / 2)
    found, _ = loss_of_the_class(monkeypatch, PI, temperature=2.0)
    assert close(found, expected(hot, PI)) and not close(found, expected(losses_of("reverse"), PI))


def test_reverse_seeks_a_mode_and_forward_covers_them():
    """A student with one bump that it can only shift, a teacher with two, at -4 and 4, the right
    one a little larger: the best shift under the reverse KL is on the larger bump, under the
    forward KL between the two, where the teacher writes next to nothing."""
    x, shifts = torch.arange(-8.0, 9.0), torch.arange(-8.0, 9.0)
    bump = lambda centre: -(x - centre) ** 2 / 2                                # noqa: E731
    teacher = torch.logaddexp(bump(-4) + math.log(.45), bump(4) + math.log(.55)).log_softmax(-1)
    students = torch.stack([bump(shift) for shift in shifts]).log_softmax(-1)   # (17, 17)
    best = {}
    for divergence in ("reverse", "forward"):
        losses = token_losses(None, students[None], None, teacher.expand(1, 17, 17), divergence)
        best[divergence] = shifts[losses[0].argmin()].item()
    assert best == {"reverse": 4, "forward": 0} and teacher[8] < math.log(1e-3)
