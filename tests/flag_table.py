"""What every flag is for: the table of runs/test_flags.py."""

# What becomes different; where nothing else is said, the weights.
LINES, SAID, SAVES, REFUSED, COMPILED = "lines", "said", "saves", "refused", "compiled"


class Same(str):
    """Why a flag must change nothing."""


BASE = "--init_from={folder}/other-base"     # where a flag must change more than the base
FAST = "--learning_rate=0.1"                 # where the policy has to be off the reference
OPEN = "--reward=format --gate_threshold=0.9"    # an untrained model shows no steps
CLIP = "--covariance=clip --cov_low=0.01"    # the covariances of an untrained model are small

# {flag: [changed value, what else has to be given, what becomes different]}; None: each of its
# choices; several values: each of them; {folder}: one of this test's own.
SHARED = {
    "init_from": ["{folder}/other-base"],
    "base_seed": ["1"],
    "pretraining": ["long"],
    "reward_model": ["{folder}/other-rm", "--reward=model"],
    "resume": ["true", "", REFUSED],                    # where there is nothing to go on with
    "inspect": [None, "", SAID],
    "html": ["{folder}/page.html", "--inspect=all", SAID],
    "task": [None, BASE],
    "min_terms": ["3", BASE + " --max_terms=3"],
    "max_terms": ["3", BASE],
    "worked_share": ["1"],                              # of the base that is made for it
    "other_skills": ["true"],
    "data": ["{folder}/sums.jsonl"],
    "eval_data": ["{folder}/sums.jsonl", "--data={folder}/sums.jsonl"],
    "max_new_tokens": ["5"],
    "tokenizer": ["gpt2"],
    "template": ["plain", "", REFUSED], "system_prompt": ["x", "", REFUSED],  # of published models
    "seed": ["1"],
    "max_steps": ["4"],
    "max_minutes": ["1e-9"],
    "batch_size": ["3"],
    "micro_batch_size": ["2", "", Same("a batch in parts gives the same weights up to rounding")],
    "logging_steps": ["2", "", LINES],
    "eval_steps": ["1", "", LINES],
    "save_steps": ["1", "", SAVES],
    "eval_problems": ["3", "", LINES],
    "learning_rate": ["1e-2"],
    "lr_scheduler_type": [None, "--max_steps=4"],
    "warmup_steps": ["2"],
    "weight_decay": ["0.5"],
    "adam_beta2": ["0.5"],
    "max_grad_norm": ["0.01"],
    "device": ["cuda:77", "", REFUSED],                 # there is no such thing anywhere
    "dtype": ["bfloat16", BASE],
    "compile": ["true", "", COMPILED],
    "block_size": ["10", "", REFUSED],                  # too short; longer ones only make room
    "n_layer": ["2"], "n_head": ["1"], "n_kv_head": ["1"], "n_embd": ["8"], "head_dim": ["4"],
    "n_hidden": ["16"], "rope_theta": ["10"], "norm_eps": ["0.01"],
    "qkv_bias": ["true"], "qk_norm": ["false"], "tie_embeddings": ["false"],
}
SAMPLING = {"num_generations": ["3"], "num_prompts": ["41"], "temperature": ["0.5"],
            "reward": ["brevity leaky flipped random"], "reward_weights": ["-1"],
            "flip_probability": ["1", "--reward=flipped"],
            "other_skills watched": ["true", BASE, LINES]}
IMITATING = {"num_demonstrations": ["5"], "wrong_share": ["1"],
             "style": [None, BASE + " --min_terms=3 --max_terms=3"],
             "other_skills watched": ["true", BASE, LINES]}
OWN = {
    "pretrain": {"num_documents": ["5"], "task facts": ["facts", "", REFUSED]},   # it is chain's
    "sft": {**IMITATING, "completion_only": ["false"]},
    "dft": {
        **IMITATING,
        "loss_type": [None],
        "alpha": ["2", "--loss_type=power"],
        "iw_temperature": ["0.5", "--loss_type=iw_sft " + FAST],
        "iw_max": ["1", "--loss_type=iw_sft " + FAST],
        "epsilon_high": ["0", "--loss_type=psft " + FAST],
        "sync_steps": ["1", "--loss_type=psft " + FAST],
        "anchor_coef": ["5", "--loss_type=asft"],
        "gem_temperature": ["1", "--loss_type=gem"]},
    "rft": {
        **{name: [value, "--keep=best " + " ".join(more[:1]), *more[1:]]
           for name, [value, *more] in SAMPLING.items()},
        "rounds": ["3", "--keep=best"],
        "restart": ["true", "--keep=best --rounds=3"],
        "keep": [None],
        "threshold": ["2"],
        "threshold_start": ["-1", "--reward=verifier,brevity --rounds=3"],
        "weighting": [None],
        "awr_beta": ["1", "--weighting=awr"]},
    "dpo": {
        **SAMPLING,
        "reward": ["brevity confidence"],
        "loss_type": ["hinge ipo kto cpo simpo orpo"],
        "loss_type robust": ["robust", "--label_smoothing=0.2"],      # else it is sigmoid
        "beta": ["1"],
        "label_smoothing": ["0.2"],
        "simpo_gamma": ["1", "--loss_type=simpo"],
        "ipo_average": ["true", "--loss_type=ipo"],
        "desirable_weight": ["2", "--loss_type=kto"],
        "undesirable_weight": ["2", "--loss_type=kto"],
        "rpo_alpha": ["1"],
        "sync_steps": ["inf", FAST],
        "sync_ref": ["true"],
        "pair_selection": [None],
        "pair_sampling": [None],
        "rso_beta": ["5", "--pair_sampling=rso"]},
    "rm": {
        **SAMPLING,
        "other_skills watched": ["true", BASE, Same("it is judged by pairs, and not by answers")],
        "center_rewards_coefficient": ["1"]},
    "ppo": {
        **SAMPLING,
        "kl_coef": ["1", FAST],
        "gamma": ["0.5"],
        "lam": ["0.5"],
        "epsilon": ["0.01", "--target_kl=0 " + FAST],     # so that there is a second pass
        "epsilon_value": ["0.01", "--target_kl=0 " + FAST],
        "vf_coef": ["2"],
        "num_iterations": ["3"],
        "num_minibatches": ["2"],
        "target_kl": ["1e-9", "--num_iterations=4"],
        "whiten_advantages": ["false"],
        "bootstrap_truncated_completions": ["true", "--max_new_tokens=40"],   # some answers end
        "mask_truncated_completions": ["true", "--max_new_tokens=40"],
        "missing_eos_penalty": ["1", "--whiten_advantages=false"]},
    "grpo": {
        **SAMPLING,
        "advantage": [None, "--scale_rewards=none"],
        "scale_rewards": [None],
        "std_correction": ["0"],
        "advantage_eps": ["1"],
        "multi_objective_aggregation": [None, "--reward=verifier,brevity"],
        "advantage_sign": [None],
        "loss_type": [None, "--num_iterations=3 --max_new_tokens=40 " + FAST],   # several lengths
        "importance_sampling_level": [None, "--num_iterations=2 " + FAST],
        "epsilon": ["0.01", f"--num_iterations=2 --epsilon_high=0.2 {FAST}"],
        "epsilon_high": ["0.01", "--num_iterations=2 " + FAST],
        "num_iterations": ["2"],
        "num_minibatches": ["2"],
        "beta": ["1", FAST],
        "use_bias_correction_kl": ["true", "--beta=1 " + FAST],
        "entropy_coef": ["1"],
        "covariance": [None, "--num_iterations=2 --cov_low=0.01 " + FAST],
        "cov_share": ["0.5", CLIP],
        "cov_low": ["0.5", CLIP + " --cov_share=1"],
        "cov_high": ["0.5", CLIP + " --cov_share=1"],
        "cov_kl_coef": ["9", "--covariance=kl --num_iterations=2 --cov_share=0.5 " + FAST],
        "mask_truncated_completions": ["true", "--max_new_tokens=40"]},
    "distill": {
        **SAMPLING,
        "flip_probability": ["1", "--reward=flipped", LINES],   # rewards are only logged
        "teacher": ["{folder}/other-base"],
        "divergence": [None],
        "prefixes": [None]},
    "hybrid": {
        **SAMPLING,
        **IMITATING,
        "hint": [None],
        "imitation": ["none chord luffy srft"],
        "imitation prefix": ["prefix", "--hint=one"],
        "gate": ["failed buffer", "--buffer_size=2 " + OPEN],
        "own_loss": [None],
        "demonstrated": ["3"],
        "mu": ["0.9"],
        "mu_end": ["0.9"],
        "hint_share": ["0.5", "--hint=all"],
        "hint_end": ["0.9", "--hint=all"],
        "decay_steps": ["9", "--hint=all"],
        "rescue_rounds": ["1", "--hint=rescue --reward=leaky"],
        "gate_threshold": ["0.9", "--gate=failed"],
        "buffer_size": ["3", "--gate=buffer " + OPEN],
        "shaping": ["1", "--imitation=luffy"],
        "top_entropy": ["1", "--hint=one --imitation=prefix"],
        "num_iterations": ["2"],
        "epsilon": ["0.01", f"--num_iterations=2 --epsilon_high=0.2 {FAST}"],
        "epsilon_high": ["0.01", "--num_iterations=2 " + FAST]},
}
# Where an algorithm differs from the others in a shared flag.
IMITATES = Same("it imitates a text that is given, and rewards nothing")
EXCEPTIONS = {
    ("pretrain", "init_from"): ["{folder}/other-base", "", REFUSED],    # it starts from noise
    ("pretrain", "seed"): ["1", "", REFUSED],                           # it is --base_seed
    ("pretrain", "pretraining"): ["long", "", REFUSED],                 # it is --max_steps
    ("pretrain", "task"): ["countdown"],
    ("pretrain", "min_terms"): ["3", "--max_terms=3"],
    ("pretrain", "max_terms"): ["3"],
    ("pretrain", "dtype"): ["bfloat16"],
    ("pretrain", "inspect"): ["one", "", REFUSED],                      # there is no policy
    ("rm", "inspect"): ["one", "", REFUSED],
    ("pretrain", "html"): ["{folder}/page.html", "", REFUSED],
    ("rm", "html"): ["{folder}/page.html", "", REFUSED],
    ("pretrain", "reward_model"): ["{folder}/other-rm", "", IMITATES],
    ("sft", "reward_model"): ["{folder}/other-rm", "", IMITATES],
    ("dft", "reward_model"): ["{folder}/other-rm", "", IMITATES],
    ("rm", "reward_model"): ["{folder}/other-rm", "", Same("it is trained to be one")],
    ("distill", "reward_model"): ["{folder}/other-rm", "--reward=model", LINES],
    ("distill", "reward"): ["brevity", "", LINES],          # it is watched, and trains nothing
    ("distill", "reward_weights"): ["-1", "", LINES],
    ("distill", "tokenizer"): ["gpt2", "", REFUSED],        # the teacher's is another
    ("rft", "reward_model"): ["{folder}/other-rm", "--keep=best --reward=model"],
    ("pretrain", "max_new_tokens"): ["5", "", LINES],                   # of the evaluation alone
    ("sft", "max_new_tokens"): ["5", "", LINES],
    ("dft", "max_new_tokens"): ["5", "", LINES],
}
ELSEWHERE = {
    "help": "test_folders.py::test_help",
    "algo": "test_the_algorithms_differ",
    "out_dir": "every test: it is where the runs are looked for",
}
