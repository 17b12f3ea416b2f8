"""
The assignments: which bodies are cut, what else would give them away, which tests are required and
what each is worth. A requirement holds if its test passes with all its parameters; the visible ones
of an assignment add up to 80 points, the hidden ones to 20. MORE are those that cut nothing: one is
a report, the other has bodies that stand nowhere in the project.
"""

from dataclasses import dataclass

from harness.errors import InputError


@dataclass(frozen=True)
class Requirement:
    points: int
    body: str      # what the test is mostly about, for the table
    test: str      # path::name, below tests/ or, if it is hidden, below assignments/hidden/


@dataclass(frozen=True)
class Assignment:
    number: int
    title: str
    bodies: tuple         # `file.function`: yours to write
    also: tuple           # cut as well, since they hold the same lines
    known: tuple          # lines of the bodies that may stand elsewhere: no answers
    requirements: tuple
    hidden: tuple
    tests_in: str = "tests"   # where the required tests are
    files_in: str = ""        # a folder whose files join the project's in the copy

    def all(self):
        return self.requirements + self.hidden

    def tests(self):
        """Their paths from the project's folder."""
        return [*(f"{self.tests_in}/{r.test}" for r in self.requirements),
                *(f"assignments/hidden/{r.test}" for r in self.hidden)]

    def files(self):
        """{file: the names of its bodies}"""
        files = {}
        for name in self.bodies:
            file, function = name.split(".", 1)
            files.setdefault(f"{file}.py", []).append(function)
        return files


def requirements(text):
    """Below the path of each test file: points, body and test, a line each."""
    found, path = [], None
    for words in map(str.split, text.strip().splitlines()):
        if len(words) == 1:
            path = words[0]
        else:
            found.append(Requirement(int(words[0]), words[1], f"{path}::{words[2]}"))
    return tuple(found)


ASSIGNMENTS = (
    Assignment(
        1, "Masks and SFT",
        bodies=("sft.token_losses", "sft.token_weights", "sft.token_logprobs", "data.collate"),
        # Every algorithm file spells out its gather and its mean over tokens.
        also=("dft.token_weights", "ppo.token_weights", "grpo.token_weights", "rft.token_weights",
              "hybrid.token_weights", "distill.token_weights", "rft.token_losses",
              "hybrid.imitation_loss", "dft.token_logprobs", "rft.token_logprobs",
              "dpo.token_logprobs", "ppo.token_logprobs", "grpo.token_logprobs",
              "hybrid.token_logprobs", "distill.token_logprobs"),
        known=("for e in examples]",),   # it says nothing
        requirements=requirements("""
        identities/test_policy_gradient.py
           5 token_losses      test_gradient_of_cross_entropy_is_softmax_minus_onehot
           5 token_losses      test_sft_loss_is_kl_from_the_data_plus_their_entropy
           5 token_losses      test_sft_gradient_is_a_policy_gradient
          10 token_weights     test_sft_token_mean_worked_example
        algorithms/test_sft.py
           5 token_weights     test_token_weights_keep_the_precision_of_the_mask
        algorithms/test_batches.py
          10 collate           test_the_worked_example_of_the_docstring
           5 collate           test_collate_pads_prompts_on_the_left_and_completions_on_the_right
          10 collate           test_a_real_token_may_equal_the_pad_id
        algorithms/test_sft.py
          10 token_logprobs    test_sft_loss_is_the_token_mean_of_the_completions_and_their_ends
           5 token_logprobs    test_sft_trains_end_but_nothing_after_it
          10 token_logprobs    test_sft_is_invariant_to_micro_batches_padding_and_order
        """),
        hidden=requirements("""
        test_1.py
           3 token_losses      test_losses_elsewhere
           5 token_weights     test_weights_elsewhere
           6 collate           test_batches_elsewhere
           6 token_logprobs    test_logprobs_elsewhere
        """)),
    Assignment(
        2, "The transformer and sampling",
        bodies=("model.rotate", "model.causal_mask", "model.CausalSelfAttention.forward",
                "model.sample", "model.GPT.generate"),
        also=(),
        known=("raise InputError(",),
        requirements=requirements("""
        algorithms/test_attention_by_hand.py
           6 rotate            test_a_quarter_turn_worked_by_hand
           2 rotate            test_a_turn_keeps_lengths_and_depends_on_distance
           2 rotate            test_only_distances_matter
           5 causal_mask       test_the_mask_worked_by_hand
           4 causal_mask       test_the_mask_of_the_last_columns
           4 causal_mask       test_every_query_sees_itself_even_on_padding
           5 forward           test_attention_worked_by_hand
           4 forward           test_query_heads_share_the_keys_of_their_group
           6 forward           test_a_buffer_is_filled_as_the_whole_is_read
        algorithms/test_attention.py
           5 forward           test_every_path_gives_the_same_logits_and_gradients
           4 forward           test_padding_changes_nothing
           2 forward           test_a_token_changes_what_follows_it_and_nothing_before
        algorithms/test_sampling.py
           9 sample            test_draws_follow_the_distribution
           3 sample            test_each_row_is_cut_by_its_own_order
           2 sample            test_the_likeliest_token_is_certain_at_temperature_0
           2 sample            test_a_generator_goes_on_where_it_was
           4 generate          test_sampled_logprobs_are_those_of_the_full_forward
           3 generate          test_greedy_is_the_argmax_of_a_full_forward_at_every_step
           4 generate          test_eos_is_kept_and_ends_the_row
           1 generate          test_eos_as_the_last_allowed_token_is_not_truncation
           2 generate          test_row_b_answers_prompt_b_over_num_generations
           1 generate          test_too_long_for_the_context_is_an_input_error
        """),
        hidden=requirements("""
        test_2.py
           3 rotate            test_rotations_elsewhere
           4 causal_mask       test_masks_elsewhere
           5 forward           test_attention_elsewhere
           4 sample            test_draws_elsewhere
           4 generate          test_samples_elsewhere
        """)),
    Assignment(
        3, "DFT and its family",
        bodies=("dft.imitation_weights", "dft.psft_loss", "dft.anchor_loss", "dft.gem_loss"),
        also=("hybrid.imitation_loss", "rft.RFT.loss", "distill.kl"),
        known=("ratio = (logprobs - old_logprobs).exp()",),   # any ratio; of PPO as well
        requirements=requirements("""
        identities/test_dft_math.py
           5 imitation_weights test_weights_worked_example
           5 imitation_weights test_weights_are_detached
           5 imitation_weights test_dft_gradient_is_that_of_the_probabilities
           5 imitation_weights test_dft_sequence_gradient_is_a_policy_gradient_with_a_plain_reward
           5 imitation_weights test_weights_of_whole_answers_worked_example
           5 imitation_weights test_the_power_family
           5 imitation_weights test_chord_learns_neither_the_known_nor_the_hopeless
           5 imitation_weights test_iw_sft_starts_as_sft_and_is_an_exact_policy_gradient_later
        identities/test_prift.py
           5 imitation_weights test_prift_is_sft_on_reweighted_data
        identities/test_dft_math.py
           5 imitation_weights test_sft_rests_at_the_data_and_dft_drifts_to_the_mode
           5 imitation_weights test_imitation_weights_name_their_choices
           5 psft_loss         test_psft_worked_example
           5 psft_loss         test_psft_starts_as_sft_and_stops_above_the_clip
           5 anchor_loss       test_asft_adds_the_anchor_and_nothing_else
           5 gem_loss          test_gem_gradient_and_fixed_point
           5 gem_loss          test_anchor_and_gem_worked_example
        """),
        hidden=requirements("""
        test_3.py
           8 imitation_weights test_weights_elsewhere
           4 psft_loss         test_psft_elsewhere
           4 anchor_loss       test_anchor_elsewhere
           4 gem_loss          test_gem_elsewhere
        """)),
    Assignment(
        4, "Preferences",
        bodies=("dpo.preference_loss", "dpo.implicit_rewards", "dpo.kto_loss", "dpo.answer_logps",
                "data.choose_pairs"),
        also=("rm.reward_loss",),
        known=(),
        requirements=requirements("""
        identities/test_preferences_by_hand.py
               5 preference_loss   test_preference_loss_worked_example
              10 preference_loss   test_preference_losses_worked_by_hand
               3 preference_loss   test_preference_loss_treats_each_pair_by_itself
               2 preference_loss   test_an_unknown_loss_type_names_the_choices
        identities/test_dpo_optimum.py
               5 preference_loss   test_dpo_gradient_vanishes_at_the_tilted_reference
               5 preference_loss   test_dpo_gradient_closed_form
               5 preference_loss   test_the_first_online_step_of_dpo_is_a_policy_gradient
        identities/test_preference_losses.py
               5 preference_loss   test_ipo_optimum
               3 preference_loss   test_robust_loss_is_unbiased_under_flipped_labels
               2 preference_loss   test_simpo_compares_means_and_dpo_sums
               2 preference_loss   test_reference_free_losses_never_read_the_reference
               3 preference_loss   test_orpo_gradient_closed_form
        identities/test_preferences_by_hand.py
               6 implicit_rewards  test_implicit_rewards_worked_by_hand
               4 implicit_rewards  test_the_loss_is_a_function_of_the_margin_of_its_rewards
        identities/test_kto.py
               4 kto_loss          test_kto_loss_worked_by_hand
               4 kto_loss          test_kto_gradient_closed_form
        algorithms/test_dpo.py
               6 answer_logps      test_logps_sum_the_tokens_of_the_answer_and_its_end
        identities/test_choose_pairs.py
               6 choose_pairs      test_choose_pairs_worked_example
        """),
        hidden=requirements("""
        test_4.py
               8 preference_loss   test_losses_elsewhere
               3 implicit_rewards  test_implicit_rewards_elsewhere
               3 kto_loss          test_kto_elsewhere
               3 answer_logps      test_logps_elsewhere
               3 choose_pairs      test_pairs_elsewhere
        """)),
    Assignment(
        5, "RLHF",
        bodies=("rm.reward_loss", "rm.answer_rewards", "ppo.token_rewards", "ppo.gae", "ppo.whiten",
                "ppo.policy_loss", "ppo.value_loss"),
        also=("grpo.policy_loss", "hybrid.policy_loss"),
        known=(),
        requirements=requirements("""
        identities/test_reward_model.py
               4 reward_loss       test_reward_loss_worked_examples
               3 reward_loss       test_centring_is_the_square_of_the_sum
               3 reward_loss       test_reward_loss_gradient_by_finite_differences
        algorithms/test_rm.py
               8 answer_rewards    test_answers_are_read_at_their_last_real_token
        identities/test_kl_in_the_reward.py
               5 token_rewards     test_token_rewards_worked_example
               5 token_rewards     test_token_rewards_telescope
               6 token_rewards     test_kl_in_the_reward_has_the_gradient_of_the_kl
        identities/test_gae.py
               6 gae               test_gae_worked_examples
               4 gae               test_gae_at_both_ends
               5 gae               test_padding_never_matters_to_credit
        identities/test_kl_in_the_reward.py
               5 gae               test_with_the_exact_critic_the_gradient_is_unbiased_for_every_lam
               4 gae               test_with_a_wrong_critic_only_lam_1_is_unbiased
        identities/test_ppo_math.py
               6 policy_loss       test_policy_clip_worked_values_and_dead_zones
        identities/test_kl_in_the_reward.py
               3 policy_loss       test_the_policy_clip_is_pessimistic
        identities/test_ppo_math.py
               6 value_loss        test_value_clip_worked_values_and_dead_zones
               4 whiten            test_whiten
               3 whiten            test_whiten_by_the_tokens_of_a_larger_batch
        """),
        hidden=requirements("""
        test_5.py
               2 reward_loss       test_reward_loss_elsewhere
               2 answer_rewards    test_answer_rewards_elsewhere
               4 token_rewards     test_token_rewards_elsewhere
               6 gae               test_gae_elsewhere
               3 policy_loss       test_policy_loss_elsewhere
               2 value_loss        test_value_loss_elsewhere
               1 whiten            test_whiten_elsewhere
        """)),
    Assignment(
        6, "GRPO",
        bodies=("grpo.group_advantages", "grpo.token_weights", "grpo.policy_loss", "grpo.k3"),
        also=("ppo.policy_loss", "hybrid.group_advantages", "hybrid.policy_loss"),
        known=("mask = 1.0 * completion_mask", "return mask / mask.sum().clamp(min=1)",   # as SFT
               "mask = completion_mask.to(logprobs.dtype)"),
        requirements=requirements("""
        identities/test_group_baselines.py
           6 group_advantages  test_advantages_worked_example
           6 group_advantages  test_group_baselines_in_expectation
           4 group_advantages  test_dividing_by_the_group_std_reweights_prompts
           5 group_advantages  test_groups_do_not_see_each_other_but_a_batch_deviation_does
           5 group_advantages  test_a_group_of_equal_rewards_gets_exactly_zero
        identities/test_maxrl.py
           4 group_advantages  test_dividing_by_the_mean_worked_example
        identities/test_aggregation.py
           5 token_weights     test_token_weights_worked_example
           5 token_weights     test_only_the_length_normaliser_turns_the_gradient
        identities/test_clip.py
           6 policy_loss       test_ppo_clip_worked_values_and_dead_zones
           3 policy_loss       test_the_clip_is_pessimistic
           3 policy_loss       test_the_upper_clip_has_its_own_epsilon
           6 policy_loss       test_cispo_clips_the_weight_and_keeps_the_gradient
           6 policy_loss       test_gspo_ratio_is_the_geometric_mean
           3 policy_loss       test_gspo_of_an_answer_that_is_left_out_is_finite
        identities/test_policy_gradient.py
           3 policy_loss       test_policy_loss_at_the_sampling_policy_is_the_policy_gradient
        identities/test_k3.py
           4 k3                test_k3_is_a_nonnegative_unbiased_estimate
           4 k3                test_k3_as_a_loss_has_the_gradient_of_the_forward_kl
           2 k3                test_k3_times_the_ratio_has_the_gradient_of_the_kl
        """),
        hidden=requirements("""
        test_6.py
           8 group_advantages  test_advantages_elsewhere
           4 token_weights     test_weights_elsewhere
           6 policy_loss       test_policy_loss_elsewhere
           2 k3                test_k3_elsewhere
        """)),
)

MORE = (
    Assignment(0, "A first walk", (), (), (), (), ()),
    Assignment(7, "Five bugs, planted", (), (), (), (), ()),   # bugs.py makes and grades it
    Assignment(8, "SFT or RL?", (), (), (), (), ()),
    Assignment(
        9, "Three one-liners",
        bodies=("mine.entropy_weights", "mine.divergence_loss", "mine.overlong_rewards"),
        also=(), known=(), tests_in="assignments/extensions", files_in="assignments/extensions",
        requirements=requirements("""
        test_mine.py
           4 entropy_weights  test_entropy_weights_worked_example
           4 divergence_loss  test_divergence_loss_worked_example
           2 overlong_rewards test_overlong_rewards_worked_example
        """),
        hidden=requirements("""
        test_9.py
           8 entropy_weights  test_entropy_weights_elsewhere
           8 entropy_weights  test_entropy_weights_have_ends
           4 entropy_weights  test_entropy_weights_of_two_choices_at_once
           8 entropy_weights  test_entropy_weights_are_constants
           4 entropy_weights  test_entropy_weights_keep_precision_and_ignore_padding
           8 divergence_loss  test_divergence_losses_elsewhere
          10 divergence_loss  test_divergence_gradients_elsewhere
           8 divergence_loss  test_divergence_is_no_ratio
           6 divergence_loss  test_divergence_lets_tokens_come_back
           4 divergence_loss  test_divergence_tells_what_it_dropped
          10 overlong_rewards test_overlong_rewards_elsewhere
           6 overlong_rewards test_overlong_rewards_have_ends
           6 overlong_rewards test_overlong_rewards_count_real_tokens
        """)),
)


def assignment(number):
    """By its number. Raises InputError for another."""
    for one in ASSIGNMENTS + MORE:
        if str(one.number) == str(number):
            return one
    known = ", ".join(sorted(str(one.number) for one in ASSIGNMENTS + MORE))
    raise InputError(f"there is no assignment {number}: choose from {known}")


def overview():
    uncut = {0: "eight questions about a run", 7: "other bugs for each student",
             8: "a report, graded by hand"}
    lines = (f"  {one.number}  {one.title}: {', '.join(one.bodies) or uncut[one.number]}"
             for one in sorted(ASSIGNMENTS + MORE, key=lambda one: one.number))
    return "Assignments cut from the project's files, graded by its tests.\n\n" + "\n".join(lines)
