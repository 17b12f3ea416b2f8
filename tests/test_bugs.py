"""
The gallery of bugs: what people really got wrong in code like this, put back in one line at a time, each caught.

Every row names a file, what happens to those who get it wrong, the line as it is and as people write it, the test that
dies of it, and where it happened (owner/repository#number is an issue or pull request on GitHub; a number like 2604.23747
an arXiv paper; others are the equation that the wrong line violates). The mutation is applied in memory, the named test
is run against it, and has to fail. A line that is no longer in the source fails loudly, so that the gallery cannot rot.

    python -m pytest tests/test_bugs.py -v
"""

import contextlib
import importlib.abc
import importlib.util
import io
import sys
from typing import NamedTuple

import pytest

from conftest import ROOT

MODULES = {path.stem for path in ROOT.glob("*.py")} | {"conftest"}


class Bug(NamedTuple):
    file: str
    consequence: str
    right: str
    wrong: str
    killer: str
    source: str


BUGS = [
    Bug("model.py", "logits and tokens are off by one: every token is scored by the distribution of the one before it",
        "return self(input_ids, attention_mask, positions=slice(Tp - 1, None))",
        "return self(input_ids, attention_mask, positions=slice(Tp - 2, -1))",
        "test_model.py::test_a_single_completion_token_is_predicted_at_the_end_of_the_prompt",
        "wyf3/llm_related#33, lucidrains/PaLM-rlhf-pytorch#31"),
    Bug("model.py", "padding is attended to: answers depend on who else is in the batch",
        "mask = causal & attention_mask.bool()[:, None, None, :] | itself ",
        "mask = (causal | itself)[None, None] ",
        "test_model.py::test_padding_changes_nothing", "huggingface/trl#2708, CarperAI/trlx#509"),
    Bug("model.py", "while sampling every new token has the same position: samples do not come from the policy that is scored",
        "            next_position = next_position + 1\n",
        "",
        "test_model.py::test_sampled_logprobs_are_those_of_the_full_forward", "OpenRLHF/OpenRLHF#217, huggingface/transformers#18388"),
    Bug("model.py", "the EOS that was sampled is cut from the mask: the policy never learns to stop",
        "length[rows[ended]], truncated[rows[ended]] = t + 1, False",
        "length[rows[ended]], truncated[rows[ended]] = t, False",
        "test_model.py::test_eos_is_kept_and_ends_the_row", "karpathy/nanochat#810, huggingface/trl#1623"),
    Bug("model.py", "the log-probabilities returned are not those of the truncated distribution that was sampled from",
        "logprobs = torch.log_softmax(logprobs.masked_fill(logprobs < kth, -math.inf), dim=-1)",
        "logprobs = logprobs.masked_fill(logprobs < kth, -math.inf)",
        "test_model.py::test_draws_follow_the_distribution", "huggingface/trl#4159"),
    Bug("model.py", "samples come from no distribution anybody asked for, and training goes on regardless",
        "cumulative = logprobs.exp().cumsum(-1) ",
        "cumulative = logprobs.cumsum(-1).exp() ",
        "test_model.py::test_draws_follow_the_distribution", "NVIDIA/NeMo-Aligner#68: a first ratio that is not 1"),
    Bug("data.py", "demonstrations without EOS: the fine-tuned model rambles on",
        'completions = [tokenizer.encode(e["completion"]) + [tokenizer.eos_id] for e in examples]',
        'completions = [tokenizer.encode(e["completion"]) for e in examples]',
        "test_data.py::test_the_worked_example_of_the_docstring", "huggingface/trl#3091, huggingface/alignment-handbook#127"),
    Bug("data.py", "the mask is guessed from token values: a real token that equals the pad id is dropped",
        "[[True] * len(c) + [False] * (width - len(c)) for c in completions]",
        "[[i != tokenizer.pad_id for i in c] + [False] * (width - len(c)) for c in completions]",
        "test_data.py::test_a_real_token_may_equal_the_pad_id", "huggingface/trl#4970"),
    Bug("data.py", "padding is trained on, and counts in every mean",
        "[[True] * len(c) + [False] * (width - len(c)) for c in completions]",
        "[[True] * width for c in completions]",
        "test_grpo.py::test_sft_trains_end_but_nothing_after_it",
        "open-jarvis/OpenJarvis#521, 0xallam/Direct-Preference-Optimization#4, "
        "Goekdeniz-Guelmez/mlx-lm-lora#88"),
    Bug("data.py", "tile where interleave was meant: answers are scored under other prompts",
        "prompt_index = torch.arange(len(examples), device=model.device).repeat_interleave(num_generations)",
        "prompt_index = torch.arange(len(examples), device=model.device).repeat(num_generations)",
        "test_grpo.py::test_every_row_has_its_own_prompt_reward_and_advantage", "XU-YIJIE/grpo-flat#2"),
    Bug("data.py", "pairs of equal answers: a loss of log 2 for ever, and no gradient",
        'different = [e for e in examples if e["chosen"] != e["rejected"]]',
        "different = list(examples)",
        "test_dpo.py::test_preference_pairs_of_a_file", "natolambert/rlhf-book#503"),
    Bug("data.py", "groups whose answers are all alike give pairs in which nothing is better",
        "contrast = (best > worst).squeeze(1) ",
        "contrast = (best >= worst).squeeze(1) ",
        "test_dpo.py::test_choose_pairs_worked_example", "natolambert/rlhf-book#503"),
    Bug("data.py", "trained against a learned reward with nothing true logged beside it: over-optimisation goes unseen",
        '        if "verifier" not in each and',
        "        if False and",
        "test_ppo.py::test_true_reward_is_shown_where_the_verifier_is_not_trained_on", "2210.10760"),
    Bug("train.py", "only the last micro-batch's gradient survives: the bug behind many published SFT baselines",
        "        micro_loss.backward()\n",
        "        optimizer.zero_grad()\n        micro_loss.backward()\n",
        "test_grpo.py::test_update_adds_up_micro_batches", "2604.23747; allenai/open-instruct#1161"),
    Bug("train.py", "the logged loss is that of the last micro-batch alone",
        "loss, tokens = loss + micro_loss.detach(), tokens",
        "loss, tokens = micro_loss.detach(), tokens",
        "test_grpo.py::test_update_adds_up_micro_batches", "karpathy/nanochat#52"),
    Bug("train.py", "a resumed run starts with an optimizer that remembers nothing",
        '        optimizer.load_state_dict(checkpoint["optimizer"])\n',
        "",
        "test_train.py::test_resume_after_ctrl_c[sft]", "karpathy/nanochat and jingyaogong/minimind, read in their sources"),
    Bug("sft.py", "a mean of means: short answers weigh more, and a batch split in two says something else",
        "return weights / weights.sum().clamp(min=1e-20)",
        "return weights / weights.sum(-1, keepdim=True).clamp(min=1e-20) / len(weights)",
        "test_identities.py::test_sft_token_mean_worked_example", "huggingface/trl#3021, PrimeIntellect-ai/prime-rl#583, 2604.23747"),
    Bug("sft.py", "rejection sampling that rejects nothing: the policy imitates its own mistakes",
        "return (rewards >= threshold - 1e-6).to(rewards.dtype)",
        "return torch.ones_like(rewards)",
        "test_imitation.py::test_rejection_sampling_is_reinforce_without_its_negative_half", "the definition of 2308.01825"),
    Bug("sft.py", "every round samples from the start model: expert iteration that never iterates",
        "            self.sampler.load_state_dict(self.model.state_dict())\n",
        "            pass\n",
        "test_imitation.py::test_the_sampler_is_the_policy_at_the_start_of_the_round", "the definition of 1705.08439"),
    Bug("dft.py", "without the stop-gradient -p log p pushes unlikely tokens (p < 1/e) down",
        "    logprobs = logprobs.detach()\n",
        "",
        "test_imitation.py::test_the_class_pulls_up_even_what_is_unlikely",
        "modelscope/twinkle#291"),
    Bug("dft.py", "the weight of a sequence counts its padding",
        "return (logprobs * completion_mask).sum(-1, keepdim=True).exp().expand_as(p)",
        "return logprobs.sum(-1, keepdim=True).exp().expand_as(p)",
        "test_imitation.py::test_weights_of_whole_answers_worked_example", "2508.05629, eq. 8"),
    Bug("dft.py", "the clip also shields tokens that have fallen: they are never pulled up again",
        "return -torch.minimum(ratio, ratio.clamp(1 - epsilon, 1 + epsilon_high))",
        "return -ratio.clamp(1 - epsilon, 1 + epsilon_high)",
        "test_imitation.py::test_psft_starts_as_sft_and_stops_above_the_clip", "2508.17784, eq. 6"),
    Bug("dft.py", "the anchor's KL is turned round (F.kl_div takes the second distribution's expectation)",
        'return F.kl_div(all_logprobs, ref_all_logprobs, log_target=True, reduction="none").sum(-1)',
        'return F.kl_div(ref_all_logprobs, all_logprobs, log_target=True, reduction="none").sum(-1)',
        "test_imitation.py::test_asft_adds_the_anchor_and_nothing_else",
        "modelscope/twinkle#112, pytorch/pytorch#57459"),
    Bug("dpo.py", "a mean where the paper has a sum: another loss, with a length bias of its own",
        "return (logprobs * mask).sum(-1), mask.sum(-1)",
        "return (logprobs * mask).sum(-1) / mask.sum(-1), mask.sum(-1)",
        "test_dpo.py::test_logps_sum_the_tokens_of_the_answer_and_its_end", "eric-mitchell/direct-preference-optimization#40"),
    Bug("dpo.py", "the reference is forgotten, and with it the anchor",
        "margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)",
        "margin = chosen_logps - rejected_logps",
        "test_dpo.py::test_dpo_gradient_vanishes_at_the_tilted_reference",
        "eric-mitchell/direct-preference-optimization#38"),
    Bug("dpo.py", "good answers are pushed down",
        "good = desirable_weight * (1 - torch.sigmoid(reward - z0))",
        "good = desirable_weight * (1 - torch.sigmoid(z0 - reward))",
        "test_dpo.py::test_kto_gradient_closed_form", "2402.01306, eq. 8"),
    Bug("dpo.py", "the rewards that are logged lack beta",
        "rewards = beta * (logps - ref_logps)",
        "rewards = logps - ref_logps",
        "test_dpo.py::test_metrics_are_what_their_names_say", "2305.18290, section 5.1"),
    Bug("rm.py", "the reward model is read at the last column, which is padding for all but the longest answer",
        'lengths = batch["completion_mask"].sum(-1, keepdim=True)',
        'lengths = torch.full_like(batch["completion_ids"][:, :1], batch["completion_ids"].shape[1])',
        "test_ppo.py::test_answers_are_read_at_their_last_real_token",
        "vwxyzjn/lm-human-preference-details#6, huggingface/trl#7318"),
    Bug("rm.py", "a reward model that prefers the worse answer",
        "losses = -F.logsigmoid(chosen_rewards - rejected_rewards)",
        "losses = -F.logsigmoid(rejected_rewards - chosen_rewards)",
        "test_ppo.py::test_the_reward_model_recovers_the_rewards_behind_the_labels", "2203.02155, eq. 1"),
    Bug("ppo.py", "the score sits on padding, and whoever stops early never sees it",
        "last = (mask.sum(-1).long() - 1).clamp(min=0)[:, None]",
        "last = torch.full_like(scores, mask.shape[1] - 1).long()[:, None]",
        "test_ppo.py::test_token_rewards_worked_example", "huggingface/trl#3750, huggingface/trl#1893"),
    Bug("ppo.py", "the KL is maximised",
        "rewards = -kl_coef * (logprobs - ref_logprobs) * mask",
        "rewards = kl_coef * (logprobs - ref_logprobs) * mask",
        "test_ppo.py::test_kl_in_the_reward_has_the_gradient_of_the_kl", "Unakar/Logic-RL#58, mll-lab-nu/RAGEN#58"),
    Bug("ppo.py", "an answer that was cut off is worth nothing from there on, though nobody saw its end",
        "scores, last_values = scores * ~truncated, values[:, -1] * truncated",
        "scores = scores * ~truncated",
        "test_ppo.py::test_credit_is_that_of_each_answer_read_alone", "huggingface/trl#1536, vwxyzjn/cleanrl#198"),
    Bug("ppo.py", "returns computed from whitened advantages: the critic learns another scale",
        '                "returns": returns}, metrics',
        '                "returns": advantages + values[:, :-1]}, metrics',
        "test_ppo.py::test_whitening_comes_last_and_covers_the_whole_batch",
        "luchris429/model-free-opponent-shaping#1"),
    Bug("ppo.py", "whitening over padding",
        "    mean = (x * mask).sum() / mask.sum()\n",
        "    mean = x.mean()\n",
        "test_ppo.py::test_whiten", "NovaSky-AI/SkyRL#1305"),
    Bug("ppo.py", "values predicted on padding flow back into the advantages",
        "deltas = (rewards + gamma * next_values - values) * mask ",
        "deltas = rewards + gamma * next_values - values ",
        "test_ppo.py::test_gae_is_the_recursion", "radixark/miles#1827, natolambert/rlhf-book#216"),
    Bug("ppo.py", "eleven updates of sixteen answers are asked for and eight are made, in silence",
        "return rows.tensor_split(self.config.num_mini_batches)",
        "return rows.chunk(self.config.num_mini_batches)",
        "test_rl_classes.py::test_ppo_makes_as_many_updates_as_asked", "pytorch/pytorch#9382"),
    Bug("ppo.py", "the KL is measured as a pass begins and obeyed when it is over: a pass too late",
        "                    break\n            yield from parts\n",
        "                    return (yield from parts)\n            yield from parts\n",
        "test_ppo.py::test_target_kl_ends_the_passes", "kashif/firedup#3"),
    Bug("ppo.py", "a clipped value loss that is optimistic: far-off values are free",
        "losses = torch.maximum(losses, (near - returns) ** 2)",
        "losses = torch.minimum(losses, (near - returns) ** 2)",
        "test_ppo.py::test_value_clip_worked_values_and_dead_zones", "2403.17031"),
    Bug("grpo.py", "the baseline is the batch's and not the group's: easy prompts are rewarded, hard ones punished",
        "centred = rewards - rewards.mean(1, keepdim=True)\n",
        "centred = rewards - rewards.mean()\n",
        "test_identities.py::test_groups_do_not_see_each_other_but_a_batch_deviation_does", "XU-YIJIE/grpo-flat#2"),
    Bug("grpo.py", "equal rewards leave a residue of rounding, which the division blows up",
        "flat = (rewards.max(1).values == rewards.min(1).values)[:, None] ",
        "flat = (rewards.std(1) == 0)[:, None] ",
        "test_identities.py::test_a_group_of_equal_rewards_gets_exactly_zero", "NVIDIA-NeMo/RL#4161"),
    Bug("grpo.py", "equal rewards, with no baseline, are divided by eps: advantages of 10,000",
        '    elif scale_rewards == "batch" and rewards.max() > rewards.min():\n',
        '    elif scale_rewards == "batch":\n',
        "test_rl_classes.py::test_equal_rewards_have_no_deviation_to_be_divided_by",
        "NVIDIA-NeMo/RL#4161"),
    Bug("grpo.py", "five updates of six groups are asked for and three are made, in silence",
        "for rows in groups.tensor_split(config.num_minibatches):",
        "for rows in groups.chunk(config.num_minibatches):",
        "test_rl_classes.py::test_grpo_makes_as_many_updates_as_asked", "pytorch/pytorch#9382"),
    Bug("grpo.py", "leave-one-out that leaves nobody out: the gradient shrinks by (K - 1) / K",
        "centred = G / (G - 1) * (rewards - rewards.mean(1, keepdim=True))",
        "centred = rewards - rewards.mean(1, keepdim=True)",
        "test_identities.py::test_group_baselines_in_expectation", "2402.14740, eq. 8"),
    Bug("grpo.py", "min and max swapped with the sign: an optimistic bound, which stops correcting mistakes",
        "losses = torch.maximum(-A * ratio, -A * ratio.clamp(1 - epsilon, 1 + epsilon_high))",
        "losses = torch.minimum(-A * ratio, -A * ratio.clamp(1 - epsilon, 1 + epsilon_high))",
        "test_identities.py::test_the_clip_is_pessimistic", "1707.06347, eq. 7"),
    Bug("grpo.py", "clip-higher is accepted and ignored",
        "ratio.clamp(1 - epsilon, 1 + epsilon_high))\n    clipped",
        "ratio.clamp(1 - epsilon, 1 + epsilon))\n    clipped",
        "test_identities.py::test_the_upper_clip_has_its_own_epsilon", "2503.14476, eq. 10"),
    Bug("grpo.py", "CISPO's weight is differentiated",
        "losses = -ratio.clamp(max=1 + epsilon_high).detach() * A * logprobs",
        "losses = -ratio.clamp(max=1 + epsilon_high) * A * logprobs",
        "test_identities.py::test_cispo_clips_the_weight_and_keeps_the_gradient", "2506.13585, eq. 4"),
    Bug("grpo.py", "a sequence ratio where token ratios were meant",
        '    if importance_sampling_level == "sequence":\n',
        "    if True:\n",
        "test_identities.py::test_the_clip_is_pessimistic", "walkinglabs/hands-on-modern-rl#75"),
    Bug("grpo.py", "the KL estimator is upside down",
        "log_ratio = ref_logprobs - logprobs",
        "log_ratio = logprobs - ref_logprobs",
        "test_identities.py::test_k3_is_a_nonnegative_unbiased_estimate",
        "walkinglabs/hands-on-modern-rl#27"),
    Bug("grpo.py", "the KL is maximised",
        "losses = losses + config.beta * kl",
        "losses = losses - config.beta * kl",
        "test_grpo.py::test_kl_at_the_reference_is_zero_and_has_no_gradient", "Unakar/Logic-RL#58, qiancheng0/ToolRL#52"),
    Bug("grpo.py", "a KL without a gradient anchors nothing",
        'kl = k3(logprobs, batch["ref_logprobs"], correction)',
        'kl = k3(logprobs.detach(), batch["ref_logprobs"])',
        "test_grpo.py::test_kl_at_the_reference_is_zero_and_has_no_gradient", "X-GenGroup/Flow-Factory#122"),
    Bug("grpo.py", "k1 as a loss: its expected gradient is 0",
        "    estimate = log_ratio.exp() - 1 - log_ratio\n",
        "    estimate = -log_ratio\n",
        "test_grpo.py::test_kl_at_the_reference_is_zero_and_has_no_gradient", "NVIDIA-NeMo/RL#2506, verl-project/verl#2953"),
    Bug("grpo.py", "the ratio is 1 for ever, and the clip never acts",
        'old_logprobs = batch.get("old_logprobs", logprobs.detach())',
        "old_logprobs = logprobs.detach()",
        "test_grpo.py::test_the_first_ratio_is_exactly_one", "meta-pytorch/torchforge#571"),
    Bug("grpo.py", "a ratio of a number with itself: exactly no gradient",
        'old_logprobs = batch.get("old_logprobs", logprobs.detach())',
        'old_logprobs = batch.get("old_logprobs", logprobs)',
        "test_grpo.py::test_a_batch_used_once_needs_no_second_scoring", "Goekdeniz-Guelmez/mlx-lm-lora#55"),
    Bug("grpo.py", "scored at another temperature than sampled",
        "            logits = logits / self.config.temperature\n",
        "            pass\n",
        "test_grpo.py::test_training_scores_what_sampling_drew", "huggingface/trl#3029, NVIDIA-NeMo/RL#935"),
    Bug("grpo.py", "the divisor depends on the padding, that is on the longest answer in the batch",
        "return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)",
        "return mask / mask.shape[1] / len(mask)",
        "test_identities.py::test_token_weights_worked_example", "huggingface/trl#3138"),
    Bug("grpo.py", "Dr. GRPO without its constant: the length bias that it was written against",
        "return mask / (len(mask) * max_completion_length)",
        "return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)",
        "test_identities.py::test_token_weights_worked_example", "sail-sg/understand-r1-zero#25"),
    Bug("grpo.py", "answers that ran out of tokens are trained as if they had ended there",
        '            batch["completion_mask"] = batch["completion_mask"] & ~truncated[:, None]\n',
        "            pass\n",
        "test_grpo.py::test_truncated_answers_can_be_left_out", "2503.14476, section 3.4"),
    Bug("report.py", "pass@k by plugging in the success rate: biased downwards",
        "return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)",
        "return sum(1 - (1 - c / n) ** k for c in right) / len(right)",
        "test_identities.py::test_pass_at_k_is_unbiased", "2107.03374, section 2.1"),
]


class Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one of the project's modules from a changed text."""

    def __init__(self, path, text):
        self.path, self.text = path, text

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.path.stem else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.text, str(self.path), "exec"), module.__dict__)


def outcome(path, text, *tests):
    """Run tests in this process against fresh modules, one of them from the text. -> pytest's exit code"""
    kept = {name: module for name, module in sys.modules.items() if name in MODULES or name.startswith("test_")}
    for name in kept:
        del sys.modules[name]
    mutant = Mutant(path, text)
    sys.meta_path.insert(0, mutant)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return pytest.main(["-q", "-x", "-p", "no:cacheprovider", *(f"{ROOT}/tests/{test}" for test in tests)])
    finally:
        sys.meta_path.remove(mutant)
        for name in [name for name in sys.modules if name in MODULES or name.startswith("test_")]:
            del sys.modules[name]
        sys.modules.update(kept)


def title(bug):
    return f"{bug.file}: {bug.consequence}"


@pytest.mark.parametrize("bug", BUGS, ids=title)
def test_bug(bug):
    """The line is in the source, once; with the wrong line in its place the named test fails (exit code 1: not an error)."""
    path = ROOT / bug.file
    source = path.read_text()
    assert source.count(bug.right) == 1, f"{bug.file} no longer has this line once: {bug.right!r}"
    assert outcome(path, source.replace(bug.right, bug.wrong), bug.killer) == 1, f"{bug.killer} does not notice"


def test_the_killers_are_innocent():
    """The same tests pass, in the same way of running them, where nothing is wrong: it is the bug that they die of."""
    path = ROOT / "model.py"
    assert outcome(path, path.read_text(), *sorted({bug.killer for bug in BUGS})) == 0


def test_every_file_of_an_algorithm_is_in_the_gallery():
    """Model, data, loop and every algorithm have at least one row, and there are thirty at the least."""
    assert {bug.file for bug in BUGS} >= {"model.py", "data.py", "train.py", "sft.py", "dft.py", "dpo.py", "ppo.py",
                                          "rm.py", "grpo.py"} and len(BUGS) >= 30
