"""
The gallery of bugs: mistakes that were really made in code like this, each a line of this project
as it is (`right`) and as it was written elsewhere (`wrong`).

Every row names a file, what the mistake does, the two lines, the test that fails with the wrong
one, and where it happened: owner/repository#number is an issue or pull request on GitHub, a number
like 2604.23747 an arXiv paper; others are the equation that the wrong line violates.
algorithms/test_bugs.py puts every mistake back and runs its test. Here are those of model, data,
tasks and harness; those of the algorithms are in gallery_losses.py.
"""

from typing import NamedTuple


class Bug(NamedTuple):
    file: str
    consequence: str
    right: str
    wrong: str
    killer: str
    source: str


BUGS = [
    Bug("model.py", "logits and tokens are off by one: a token is scored by the distribution of "
        "the one before it",
        "return hidden[:, Tp - 1:] ",
        "return hidden[:, Tp - 2:-1] ",
        "algorithms/test_attention.py::"
        "test_a_single_completion_token_is_predicted_at_the_end_of_the_prompt",
        "wyf3/llm_related#33, lucidrains/PaLM-rlhf-pytorch#31"),
    Bug("model.py", "the logits are read in chunks, and the graph keeps each until the backward "
        "pass: no memory is saved",
        "            if torch.is_grad_enabled():\n",
        "            if False:\n",
        "algorithms/test_chunks.py::test_the_logits_of_a_batch_never_exist_at_a_time[sft]",
        "NVIDIA-NeMo/RL#4222, NVIDIA-NeMo/labs-molt#121"),
    Bug("model.py", "padding is attended to: an answer depends on the others in its batch",
        "return causal & attention_mask.bool()[:, None, None, :] | itself ",
        "return (causal | itself)[None, None] ",
        "algorithms/test_attention.py::test_padding_changes_nothing",
        "huggingface/trl#2708, CarperAI/trlx#509"),
    Bug("model.py", "while sampling, every new token has the same position: samples do not come "
        "from the policy that is scored",
        "            next_position = next_position + 1\n",
        "",
        "algorithms/test_sampling.py::test_sampled_logprobs_are_those_of_the_full_forward",
        "OpenRLHF/OpenRLHF#217, huggingface/transformers#18388"),
    Bug("model.py", "the EOS that was sampled is cut from the mask: the policy never learns to "
        "stop",
        "length[rows[ended]], truncated[rows[ended]] = t + 1, False",
        "length[rows[ended]], truncated[rows[ended]] = t, False",
        "algorithms/test_sampling.py::test_eos_is_kept_and_ends_the_row",
        "karpathy/nanochat#810, huggingface/trl#1623"),
    Bug("model.py", "the log-probabilities returned are not those of the truncated distribution "
        "that was sampled from",
        "logprobs = torch.log_softmax(logprobs.masked_fill(logprobs < kth, -math.inf), dim=-1)",
        "logprobs = logprobs.masked_fill(logprobs < kth, -math.inf)",
        "algorithms/test_sampling.py::test_draws_follow_the_distribution",
        "huggingface/trl#4159"),
    Bug("model.py", "samples come from a distribution that was not asked for, and training goes on",
        "cumulative = logprobs.exp().cumsum(-1) ",
        "cumulative = logprobs.cumsum(-1).exp() ",
        "algorithms/test_sampling.py::test_draws_follow_the_distribution",
        "NVIDIA/NeMo-Aligner#68: a first ratio that is not 1"),
    Bug("data.py", "demonstrations without EOS: the fine-tuned model does not stop",
        'completions = [tokenizer.encode(e["completion"]) + [tokenizer.eos_id] for e in examples]',
        'completions = [tokenizer.encode(e["completion"]) for e in examples]',
        "algorithms/test_batches.py::test_the_worked_example_of_the_docstring",
        "huggingface/trl#3091, huggingface/alignment-handbook#127"),
    Bug("data.py", "the mask is guessed from token values: a real token that equals the pad id is "
        "dropped",
        "[[True] * len(c) + [False] * (width - len(c))\n",
        "[[i != tokenizer.pad_id for i in c] + [False] * (width - len(c))\n",
        "algorithms/test_batches.py::test_a_real_token_may_equal_the_pad_id",
        "huggingface/trl#4970"),
    Bug("data.py", "padding is trained on, and counts in every mean",
        "[[True] * len(c) + [False] * (width - len(c))\n",
        "[[True] * width\n",
        "algorithms/test_sft.py::test_sft_trains_end_but_nothing_after_it",
        "open-jarvis/OpenJarvis#521, 0xallam/Direct-Preference-Optimization#4, "
        "Goekdeniz-Guelmez/mlx-lm-lora#88"),
    Bug("data.py", "tile where interleave was meant: answers are scored under other prompts",
        "torch.arange(len(examples), device=model.device).repeat_interleave(G)",
        "torch.arange(len(examples), device=model.device).repeat(G)",
        "algorithms/test_grpo.py::test_every_row_has_its_own_prompt_reward_and_advantage",
        "XU-YIJIE/grpo-flat#2"),
    Bug("data.py", "pairs of equal answers: the loss stays at log 2, and there is no gradient",
        'pairs = [e for e in examples if e["chosen"] != e["rejected"]]',
        "pairs = list(examples)",
        "algorithms/test_dpo_sampling.py::test_preference_pairs_of_a_file",
        "natolambert/rlhf-book#503"),
    Bug("data.py", "groups whose answers are all alike give pairs in which nothing is better",
        "contrast = (best > worst).squeeze(1) ",
        "contrast = (best >= worst).squeeze(1) ",
        "identities/test_choose_pairs.py::test_choose_pairs_worked_example",
        "natolambert/rlhf-book#503"),
    Bug("tasks.py", "trained against a learned reward with nothing true logged beside it: "
        "over-optimisation goes unseen",
        '        if "verifier" not in each and',
        "        if False and",
        "algorithms/test_learned_reward.py::"
        "test_true_reward_is_shown_where_the_verifier_is_not_trained_on", "2210.10760"),
    Bug("tasks.py", "what is random in a reward comes from the global state: a resumed run is "
        "another run",
        "return torch.rand(n, generator=self.generator, device=self.generator.device).tolist()",
        "return torch.rand(n).tolist()",
        "algorithms/test_wrong_rewards.py::test_the_generator_of_the_step_decides",
        "huggingface/transformers#11323, huggingface/transformers#11504"),
    Bug("tasks.py", "one coin for all answers: a random reward that leaves a group nothing to "
        "compare, and looks as if it taught nothing",
        "[float(u < 0.5) for u in uniforms(len(c))]",
        "[float(uniforms(1)[0] < 0.5)] * len(c)",
        "algorithms/test_wrong_rewards.py::test_a_coin", "2506.10947: a coin for each answer"),
    Bug("tasks.py", "the truth that is logged is what is trained on: that random rewards taught "
        "nothing, or something, goes unseen",
        'each["true_reward"] = torch.tensor(self.task.reward(prompts, completions, **columns))',
        'each["true_reward"] = total',
        "algorithms/test_wrong_rewards.py::test_the_truth_is_logged_beside", "2506.10947"),
    Bug("tasks.py", "an answer is right if it holds the right number somewhere: listing all digits "
        "is rewarded",
        "return [float(Chain.final_answer(c) == a) for c, a in zip(completions, answer)]",
        "return [float(a in c) for c, a in zip(completions, answer)]",
        "algorithms/test_chain.py::test_chain_reward",
        "pytorch/rl#3542, which takes such a reward out"),
    Bug("tasks.py", "a skill is judged by what the corpus has shown: memory is taken for skill",
        'if is_test(f"r{digits}=") == test:',
        "if True:",
        "algorithms/test_worlds.py::"
        "test_the_corpus_reverses_no_test_problem_and_tells_fifty_facts",
        "hendrycks/ethics#14, bazingagin/npc_gzip#13"),
    Bug("tasks.py", "prompts are kept apart and steps are not: what follows a wrong step solves a "
        "test problem",
        "            while self.solve(prompt, slip=slip)[\"answer\"] == answer \\\n"
        "                    or self.gives_away(prompt, slip):\n",
        "            while self.solve(prompt, slip=slip)[\"answer\"] == answer:\n",
        "algorithms/test_worlds.py::"
        "test_no_demonstration_of_any_style_solves_a_held_out_problem",
        "2311.04850: a test problem in other words passes every search for its text"),
    Bug("harness/evaluate.py", "forgetting measured by the task that is taught: none is ever seen",
        "untaught = held_out(task, skill, config.eval_problems)",
        'untaught = held_out(task, "test", config.eval_problems)',
        "algorithms/test_evaluation.py::test_what_is_kept_by_hand",
        "2509.04259, which measures it on other tasks"),
    Bug("train.py", "only the last micro-batch's gradient is kept: the bug behind many published "
        "SFT baselines",
        "        micro_loss.backward()\n",
        "        algo.optimizer.zero_grad()\n        micro_loss.backward()\n",
        "algorithms/test_update.py::test_update_adds_up_micro_batches",
        "2604.23747; allenai/open-instruct#1161"),
    Bug("train.py", "the logged loss is that of the last micro-batch alone",
        "loss = loss + micro_loss.detach()",
        "loss = micro_loss.detach()",
        "algorithms/test_update.py::test_update_adds_up_micro_batches", "karpathy/nanochat#52"),
    Bug("harness/checkpoint.py", "a resumed run starts with an optimizer that remembers nothing",
        'run.algo.optimizer.load_state_dict(found["optimizer"])',
        "pass",
        "runs/test_resume.py::test_resume_after_ctrl_c[sft]",
        "karpathy/nanochat and jingyaogong/minimind, read in their sources"),
    Bug("harness/evaluate.py", "pass@k computed from the success rate: biased downwards",
        "return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)",
        "return sum(1 - (1 - c / n) ** k for c in right) / len(right)",
        "identities/test_group_baselines.py::test_pass_at_k_is_unbiased",
        "2107.03374, section 2.1"),
    Bug("harness/arms.py", "the second stage of a chain starts from the base: SFT-then-RL is RL "
        "alone",
        '            command += ["--init_from", config.init_from]\n',
        "",
        "runs/test_chains.py::test_the_plan_of_a_chain",
        "psunlpgroup/Summ-N#7"),
    Bug("compare.py", "the KL is measured from where training last began: every stage, or every "
        "resumption, may drift anew",
        "for path in (last.out_dir, start_of(first)))",
        "for path in (last.out_dir, last.init_from))",
        "runs/test_chains.py::test_the_kl_where_both_stages_move",
        "NVIDIA-NeMo/RL#2955, NVIDIA-NeMo/RL#3722"),
    Bug("model.py", "rope_scaling of a Llama 3.1 is read and never applied: right in short texts, "
        "gibberish in long ones",
        "    if config.rope_scaling:\n",
        "    if not config:\n",
        "algorithms/test_hub.py::test_llama_3_stretches_long_wavelengths_alone",
        "unslothai/unsloth#6197"),
    Bug("harness/chat.py", "a chat's text, which begins with <|begin_of_text|>, is given to a "
        "tokenizer that puts one before it: there are two",
        "return self.begin + [i for role",
        "return self.begin + self.begin + [i for role",
        "algorithms/test_chat.py::test_llama_3_written_out",
        "OpenRLHF/OpenRLHF#393, huggingface/open-r1#462"),
]
