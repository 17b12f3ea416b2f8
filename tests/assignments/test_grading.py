"""
What solutions earn: the project's own 100 points, a copy as it was handed out 0, and wrong ones
less by what is wrong with them. The first two go through the grader; the others run in this
process, against the same tests.
"""

import importlib
import inspect
import json
import subprocess
import sys
from typing import NamedTuple

import pytest

from assignments import check, grade, judge, make, table
from conftest import ROOT
from mutants import fresh_modules


class Wrong(NamedTuple):
    body: str
    mistake: str
    right: str
    wrong: str
    score: int     # of 100
    proof: str     # a test that fails


WRONG = {1: [
    Wrong("sft.token_weights", "a mean of means",
          "return mask / mask.sum().clamp(min=1)",
          "return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)",
          75, "test_sft_token_mean_worked_example"),
    Wrong("sft.token_weights", "padding counts in the mean",
          "return mask / mask.sum().clamp(min=1)", "return mask / mask.numel()",
          75, "test_sft_loss_is_the_token_mean_of_the_completions_and_their_ends"),
    Wrong("sft.token_weights", "0/0 where nothing is trained",
          "mask.sum().clamp(min=1)", "mask.sum()", 85, "test_weights_elsewhere"),
    Wrong("sft.token_logprobs", "shifted by one: the model has done so already",
          "return all_logprobs.gather(-1, ids).squeeze(-1), all_logprobs",
          "moved = torch.cat([all_logprobs[:, :1], all_logprobs[:, :-1]], 1)\n"
          "    return moved.gather(-1, ids).squeeze(-1), all_logprobs",
          79, "test_sft_trains_end_but_nothing_after_it"),
    Wrong("sft.token_logprobs", "normalised over positions, not over the vocabulary",
          "torch.log_softmax(logits, dim=-1)", "torch.log_softmax(logits, dim=1)",
          69, "test_sft_is_invariant_to_micro_batches_padding_and_order"),
    Wrong("data.collate", "no EOS: the model never learns to stop",
          'tokenizer.encode(e["completion"]) + [tokenizer.eos_id] for',
          'tokenizer.encode(e["completion"]) for',
          54, "test_the_worked_example_of_the_docstring"),
    Wrong("data.collate", "a mask guessed from token values",
          "[[True] * len(c) + [False] * (width - len(c))\n",
          "[[i != tokenizer.pad_id for i in c] + [False] * (width - len(c))\n",
          84, "test_a_real_token_may_equal_the_pad_id"),
], 2: [
    Wrong("model.rotate", "neighbours are paired, as in GPT-J",
          "x1, x2 = x.chunk(2, dim=-1)", "x1, x2 = x[..., 0::2], x[..., 1::2]",
          81, "test_a_quarter_turn_worked_by_hand"),
    Wrong("model.rotate", "turned the other way",
          "x1 * cos - x2 * sin, x2 * cos + x1 * sin", "x1 * cos + x2 * sin, x2 * cos - x1 * sin",
          86, "test_a_quarter_turn_worked_by_hand"),
    Wrong("model.causal_mask", "padding is looked at",
          "return causal & attention_mask.bool()[:, None, None, :] | itself",
          "return (causal | itself)[None, None]", 63, "test_padding_changes_nothing"),
    Wrong("model.causal_mask", "a query on padding sees nothing", " | itself", "",
          83, "test_every_query_sees_itself_even_on_padding"),
    Wrong("model.causal_mask", "new tokens are counted from the first column",
          "query = key[S - T:, None]", "query = key[:T, None]",
          59, "test_the_mask_of_the_last_columns"),
    Wrong("model.CausalSelfAttention.forward", "heads of keys are tiled, not repeated in pairs",
          "enable_gqa=grouped)", "enable_gqa=False) if not grouped else "
          "F.scaled_dot_product_attention(q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) "
          "for t in (k, v)), attn_mask=mask)",
          91, "test_query_heads_share_the_keys_of_their_group"),
    Wrong("model.CausalSelfAttention.forward", "no gradient reaches the prompt",
          "torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)",
          "torch.cat([past[0].detach(), k], dim=2), torch.cat([past[1].detach(), v], dim=2)",
          90, "test_every_path_gives_the_same_logits_and_gradients"),
    Wrong("model.CausalSelfAttention.forward", "keys are kept in the place of values",
          "past[1][:, :, filled:filled + T] = k, v", "past[1][:, :, filled:filled + T] = k, k",
          78, "test_a_buffer_is_filled_as_the_whole_is_read"),
    Wrong("model.sample", "log-probabilities from before the cut",
          "return token.squeeze(-1), logprobs.gather(",
          "return token.squeeze(-1), (logits / temperature).log_softmax(-1).gather(",
          83, "test_draws_follow_the_distribution"),
    Wrong("model.sample", "top_p leaves out the token that reaches the mass",
          "ordered.exp().cumsum(-1) - ordered.exp()", "ordered.exp().cumsum(-1)",
          83, "test_draws_follow_the_distribution"),
    Wrong("model.sample", "random numbers from elsewhere", "generator=generator, ", "",
          98, "test_a_generator_goes_on_where_it_was"),
    Wrong("model.GPT.generate", "every new token at the same position",
          "            next_position = next_position + 1\n", "",
          89, "test_sampled_logprobs_are_those_of_the_full_forward"),
    Wrong("model.GPT.generate", "the end is cut from the mask",
          "length[rows[ended]], truncated[rows[ended]] = t + 1, False",
          "length[rows[ended]], truncated[rows[ended]] = t, False",
          88, "test_eos_is_kept_and_ends_the_row"),
    Wrong("model.GPT.generate", "an end in the last place is taken for none",
          "T = int(length.max())", "T, truncated = int(length.max()), length == max_new_tokens",
          95, "test_eos_as_the_last_allowed_token_is_not_truncation"),
], 3: [
    Wrong("dft.imitation_weights", "detach forgotten", "    logprobs = logprobs.detach()\n", "",
          57, "test_weights_are_detached"),
    Wrong("dft.imitation_weights", "the sum over an answer counts its padding",
          "(logprobs * completion_mask).sum(-1, keepdim=True).exp()",
          "logprobs.sum(-1, keepdim=True).exp()",
          82, "test_weights_of_whole_answers_worked_example"),
    Wrong("dft.imitation_weights", "PriFT with the weight of the policy in training",
          "return ref_logprobs.exp()", "return p",
          87, "test_prift_is_sft_on_reweighted_data"),
    Wrong("dft.psft_loss", "PPO's lower clip, which here protects nobody",
          "ratio.clamp(max=1 + epsilon_high)", "ratio.clamp(1 - epsilon_high, 1 + epsilon_high)",
          86, "test_psft_worked_example"),
    Wrong("dft.anchor_loss", "the KL the other way round",
          "F.kl_div(all_logprobs, ref_all_logprobs,", "F.kl_div(ref_all_logprobs, all_logprobs,",
          86, "test_asft_adds_the_anchor_and_nothing_else"),
    Wrong("dft.gem_loss", "detach forgotten", "all_logprobs.detach() /", "all_logprobs /",
          91, "test_gem_gradient_and_fixed_point"),
], 4: [
    Wrong("dpo.preference_loss", "the reference is forgotten",
          "margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)",
          "margin = chosen_logps - rejected_logps",
          53, "test_dpo_gradient_vanishes_at_the_tilted_reference"),
    Wrong("dpo.preference_loss", "the sign of label smoothing",
          "            - label_smoothing * F.logsigmoid(-beta * margin)",
          "            + label_smoothing * F.logsigmoid(-beta * margin)",
          79, "test_robust_loss_is_unbiased_under_flipped_labels"),
    Wrong("dpo.preference_loss", "SimPO with sums",
          "return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - simpo_gamma)",
          "return -F.logsigmoid(beta * (chosen_logps - rejected_logps) - simpo_gamma)",
          76, "test_simpo_compares_means_and_dpo_sums"),
    Wrong("dpo.implicit_rewards", "rewards without beta", "return beta * (log", "return (log",
          87, "test_implicit_rewards_worked_by_hand"),
    Wrong("dpo.kto_loss", "good answers are pushed down", "(1 - torch.sigmoid(reward - z0))",
          "(1 - torch.sigmoid(z0 - reward))", 89, "test_kto_gradient_closed_form"),
    Wrong("dpo.answer_logps", "a mean over tokens where the paper has a sum",
          "return (logprobs * completion_mask).sum(-1)",
          "return (logprobs * completion_mask).sum(-1) / completion_mask.sum(-1)",
          91, "test_logps_sum_the_tokens_of_the_answer_and_its_end"),
    Wrong("data.choose_pairs", "pairs of groups without a contrast",
          "contrast = (best > worst)", "contrast = (best >= worst)",
          91, "test_choose_pairs_worked_example"),
], 5: [
    Wrong("rm.reward_loss", "the worse answer is preferred",
          "F.logsigmoid(chosen_rewards - rejected_rewards)",
          "F.logsigmoid(rejected_rewards - chosen_rewards)",
          94, "test_reward_loss_worked_examples"),
    Wrong("rm.answer_rewards", "the last column, which is padding",
          "return rewards.gather(1, lengths).squeeze(1)", "return rewards[:, -1]",
          90, "test_answers_are_read_at_their_last_real_token"),
    Wrong("rm.answer_rewards", "read before the last token: shifted by one",
          "rewards.gather(1, lengths)", "rewards.gather(1, lengths - 1)",
          90, "test_answers_are_read_at_their_last_real_token"),
    Wrong("ppo.token_rewards", "the KL is maximised",
          "rewards = -kl_coef *", "rewards = kl_coef *",
          71, "test_kl_in_the_reward_has_the_gradient_of_the_kl"),
    Wrong("ppo.token_rewards", "the score sits on padding",
          "last = (mask.sum(-1).long() - 1).clamp(min=0)[:, None]",
          "last = torch.full_like(scores, mask.shape[1] - 1).long()[:, None]",
          66, "test_token_rewards_worked_example"),
    Wrong("ppo.gae", "values on padding flow back",
          "later = (delta + gamma * lam * later) * mask[:, t]",
          "later = delta + gamma * lam * later", 76, "test_padding_never_matters_to_credit"),
    Wrong("ppo.gae", "nothing is to come after a truncated answer",
          "next_values = last_values ", "next_values = 0 * last_values ",
          79, "test_gae_worked_examples"),
    Wrong("ppo.policy_loss", "minimum for maximum", "torch.maximum(-A * ratio",
          "torch.minimum(-A * ratio", 88, "test_the_policy_clip_is_pessimistic"),
    Wrong("ppo.value_loss", "minimum for maximum", "torch.maximum(losses", "torch.minimum(losses",
          92, "test_value_clip_worked_values_and_dead_zones"),
], 6: [
    Wrong("grpo.group_advantages", "the batch's mean in place of the group's",
          "centred = rewards - rewards.mean(1, keepdim=True)\n",
          "centred = rewards - rewards.mean()\n",
          73, "test_groups_do_not_see_each_other_but_a_batch_deviation_does"),
    Wrong("grpo.group_advantages", "leave-one-out that leaves none out",
          "centred = G / (G - 1) * (rewards", "centred = (rewards",
          80, "test_group_baselines_in_expectation"),
    Wrong("grpo.group_advantages", "equal rewards leave a rounding error",
          "(rewards.max(1).values == rewards.min(1).values)[:, None]",
          "(rewards.std(1) == 0)[:, None]",
          95, "test_a_group_of_equal_rewards_gets_exactly_zero"),
    Wrong("grpo.token_weights", "dapo as a mean of means",
          "return mask / mask.sum().clamp(min=1)",
          "return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)",
          86, "test_token_weights_worked_example"),
    Wrong("grpo.policy_loss", "minimum for maximum", "torch.maximum(-A * ratio",
          "torch.minimum(-A * ratio", 70, "test_the_clip_is_pessimistic"),
    Wrong("grpo.policy_loss", "CISPO without its detach",
          "ratio.clamp(max=1 + epsilon_high).detach()", "ratio.clamp(max=1 + epsilon_high)",
          85, "test_cispo_clips_the_weight_and_keeps_the_gradient"),
    Wrong("grpo.policy_loss", "old log-probabilities shifted by one",
          "log_ratio = logprobs - old_logprobs  ",
          "log_ratio = logprobs - old_logprobs.roll(1, 1)  ",
          73, "test_policy_loss_elsewhere"),
    Wrong("grpo.k3", "k1 as a loss", "log_ratio.exp() - 1 - log_ratio", "-log_ratio",
          88, "test_k3_as_a_loss_has_the_gradient_of_the_forward_kl"),
]}


def run_here(assignment, texts):
    """The reasons of all tests of an assignment, in this process, where some files have these
    texts."""
    with fresh_modules(texts):
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        return check.run([ROOT / test for test in assignment.tests()])


def with_wrong_line(wrong):
    """The text of the file with the wrong line in the named body."""
    file, name = wrong.body.split(".", 1)
    text = (ROOT / f"{file}.py").read_text()
    first, last = check.body_lines(text, check.find(text, name))
    lines = text.splitlines(keepends=True)
    body = "".join(lines[first - 1:last])
    assert body.count(wrong.right) == 1, wrong
    lines[first - 1:last] = [body.replace(wrong.right, wrong.wrong)]
    return "".join(lines)


def code_of(namespace, name):
    """A function of a module's namespace: what it runs can be exchanged."""
    first, *path = name.split(".")
    found = namespace[first]
    for part in path:
        found = getattr(found, part)
    return inspect.unwrap(found)


@pytest.mark.parametrize("number", WRONG)
def test_wrong_solutions_lose_what_they_should(number):
    """Each the points of what rests on its wrong line, in the visible tests and in the hidden ones,
    and no others; and the reasons are short. (The tests are imported once: what changes is the code
    of one function.)"""
    assignment, scores, failed = table.assignment(number), {}, {}
    with fresh_modules({}):
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        for wrong in WRONG[number]:
            file, name = wrong.body.split(".", 1)
            function = code_of(vars(importlib.import_module(file)), name)
            namespace = {"__name__": file}
            exec(compile(with_wrong_line(wrong), f"{file}.py", "exec"), namespace)
            right, function.__code__ = function.__code__, code_of(namespace, name).__code__
            why = check.run([ROOT / test for test in assignment.tests()])
            function.__code__ = right
            scores[wrong] = grade.results(assignment, why)["score"]
            failed[wrong] = [test.split("::")[1] for test, reason in why.items() if reason]
            assert all(len(r) < 400 and "\n" not in r for r in why.values() if r), wrong
    assert scores == {wrong: wrong.score for wrong in WRONG[number]}
    assert all(wrong.proof in failed[wrong] for wrong in failed)


@pytest.mark.parametrize("number", WRONG)
def test_what_is_left_out_elsewhere_is_not_needed(number):
    """With the bodies written, all tests hold beside the stubs of the other files."""
    assignment = table.assignment(number)
    files = make.code(assignment)
    why = run_here(assignment, {f: files[f] for f in files if f not in assignment.files()})
    assert not any(why.values())


@pytest.mark.parametrize("number", WRONG)
def test_a_copy_as_it_was_handed_out_earns_nothing(number):
    """Not one test holds, visible or hidden, without the bodies; and each says which is missing."""
    assignment = table.assignment(number)
    why = run_here(assignment, make.code(assignment))
    assert all(reason and "yours to write" in reason for reason in why.values())


# The judge of all assignments at a time: every body is called in the other process.
ALL_TOGETHER = """
from assignments import judge, table
parts = [sum((getattr(one, part) for one in table.ASSIGNMENTS), ()) for part in
         ("bodies", "requirements", "hidden")]
table.ASSIGNMENTS = (table.Assignment(0, "all", parts[0], (), (), *parts[1:]),)
judge.main()
"""


def test_the_project_itself_earns_everything(tmp_path, capsys, monkeypatch):
    """Through the judge, from the project's own folder; then a table, and a results.json as
    Gradescope reads it."""
    asked = json.dumps({"number": 0, "folder": str(ROOT), "salt": "salt", "seconds": 60})
    done = subprocess.run([sys.executable, "-c", ALL_TOGETHER], cwd=ROOT, input=asked,
                          capture_output=True, text=True, timeout=600)
    why = json.loads(done.stdout)
    assert {test: reason for test, reason in why.items() if reason} == {}
    for assignment in table.ASSIGNMENTS:
        assert grade.results(assignment, why)["score"] == 100
    why = dict.fromkeys(test.rsplit("/", 1)[-1] for test in table.assignment(6).tests())
    monkeypatch.setattr(grade, "ask", lambda *asked: why)
    grade.grade(table.assignment(6), [ROOT], tmp_path / "6")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines[0] == ["folder", "points", "group_advantages", "token_weights", "policy_loss",
                        "k3"]
    assert lines[1] == [ROOT.name, "100", "38/38", "14/14", "36/36", "12/12"]
    written = json.loads((tmp_path / "6" / ROOT.name / "results.json").read_text())
    assert written["score"] == 100 and len(written["tests"]) == 22
    assert written["tests"][0] == {
        "name": "group_advantages: One group with rewards [1, 0, 0, 0], worked by hand.",
        "max_score": 6, "score": 6, "output": "", "visibility": "visible"}
    assert [t["visibility"] for t in written["tests"]].count("after_published") == 4


# -- what is taken from a folder ------------------------------------------------------------------

PRISTINE = '''import os


def double(x):
    """Twice x."""
    raise NotImplementedError("m.double: yours to write")


def other():
    return 1
'''


def test_the_named_bodies_alone_are_taken():
    """By syntax tree, where there are two the last: neither other functions nor the module's code,
    nor signature, decorators and docstring of the student's function."""
    theirs = '''import evil
print("10 of 10 points")


@evil.decorator
def double(y, x=evil.x):
    """Another text."""
    import math
    return math.prod([2, x])   # mine


def other():
    return evil.x
'''
    text, wrong = judge.graft(PRISTINE, "def double(x): return 0\n" + theirs, ["double"])
    assert wrong == {} and text == PRISTINE.replace(
        "    raise NotImplementedError(\"m.double: yours to write\")\n",
        "    import math\n    return math.prod([2, x])\n").replace("\n\n\n", "\n\n").rstrip("\n")


@pytest.mark.parametrize("theirs, message", [
    ("x = 1\n", "m.double: there is no such function"),
    ("class double:\n    pass\n", "there is no such function"),
    ("async def double(x):\n    return x\n", "there is no such function"),
    ("def double(x:\n", "line 1: '(' was never closed"),
    ("def double(x):\n    nonlocal y\n    return y\n", "no binding for nonlocal"),
    ("def double(x):\n    return " + "(" * 300 + "x" + ")" * 300 + "\n", "too many nested"),
    ("def double(x):\n    return x\0\n", "null bytes")])
def test_what_cannot_be_taken_is_said(theirs, message):
    """The body stays missing, with the reason; nothing else is lost."""
    text, wrong = judge.graft(PRISTINE, theirs, ["double"])
    assert message in f"m.{wrong['double']}" and "yours to write" in text


def test_only_plain_files_of_the_folder_are_read(tmp_path):
    """No link, which might lead to the grader's own files, no folder, nothing very large."""
    (tmp_path / "link.py").symlink_to(ROOT / "sft.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "large.py").write_text("#" * (1 << 20) + "\n")
    for file in ("link.py", "folder.py", "large.py", "none.py"):
        with pytest.raises(ValueError):
            judge.read(tmp_path, file)
    (tmp_path / "plain.py").write_text("x = 1\n")
    assert judge.read(tmp_path, "plain.py") == "x = 1\n"
