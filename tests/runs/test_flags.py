"""
No flag is dead. Each flag of each algorithm, as the parser lists them, is changed from its default,
with the company that it needs to act, and the run must then come out different: in its weights, or
where the table below says so in what is logged, saved or said. Flags that must not change a run
stand in the table with the reason, and it is checked that they do not. A new flag without an entry
fails. At the end the same for sample.py.

The runs are as short as can be: three steps of a model of 16 dimensions whose base was trained for
two, judged by two problems. Their verifier is a checksum, which tells any two answers apart.
"""

import contextlib
import hashlib
import io
import os
import zlib

import pytest
import tiktoken
import torch

import sample
import tasks
import train
from harness import files, flags, report
from harness.errors import InputError
from model import GPTConfig
from rm import RMConfig
from runs_helpers import checkpoint, metrics, shorter, write_jsonl
from sft import PretrainConfig

RUN = ("--n_embd=16 --n_layer=1 --n_head=2 --min_terms=2 --max_terms=2 --max_new_tokens=6 "
       "--batch_size=4 --max_steps=3 --warmup_steps=1 --logging_steps=1 --eval_steps=3 "
       "--eval_problems=2 --device=cpu")
SAMPLES = " --num_generations=4 --num_prompts=40"       # of the algorithms that sample answers

# What becomes different; where nothing else is said, the weights.
LINES, SAID, SAVES, REFUSED, COMPILED = "lines", "said", "saves", "refused", "compiled"


class Same(str):
    """Why a flag must change nothing."""


BASE = "--init_from={folder}/other-base"     # where a flag must change more than the base
FAST = "--learning_rate=0.1"                 # where the policy has to be off the reference
CLIP = "--covariance=clip --cov_low=0.01"    # the covariances of an untrained model are small

# {flag: [changed value, what else has to be given, what becomes different]}; None: each of its
# choices; several values: each of them; {folder}: one of this test's own.
SHARED = {
    "init_from": ["{folder}/other-base"],
    "base_seed": ["1"],
    "reward_model": ["{folder}/other-rm", "--reward=model"],
    "resume": ["true", "", REFUSED],                    # where there is nothing to go on with
    "inspect": [None, "", SAID],
    "task": [None, BASE],
    "min_terms": ["3", BASE + " --max_terms=3"],
    "max_terms": ["3", BASE],
    "worked_share": ["1"],                              # of the base that is made for it
    "other_skills": ["true"],
    "data": ["{folder}/sums.jsonl"],
    "eval_data": ["{folder}/sums.jsonl", "--data={folder}/sums.jsonl"],
    "max_new_tokens": ["5"],
    "tokenizer": ["gpt2"],
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
        "loss_type": [None, "--num_iterations=3 " + FAST],
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
        "teacher": ["{folder}/other-base"],
        "divergence": [None],
        "prefixes": [None]},
    "hybrid": {
        **SAMPLING,
        "num_demonstrations": ["5"],
        "hint": [None],
        "imitation": ["none chord luffy srft"],
        "imitation prefix": ["prefix", "--hint=one"],
        "gate": ["failed buffer", "--buffer_size=2 --reward=brevity"],   # no mean is above 0
        "own_loss": [None],
        "demonstrated": ["3"],
        "mu": ["0.9"],
        "mu_end": ["0.9"],
        "hint_share": ["0.5", "--hint=all"],
        "hint_end": ["0.9", "--hint=all"],
        "decay_steps": ["9", "--hint=all"],
        "rescue_rounds": ["1", "--hint=rescue --reward=leaky"],
        "gate_threshold": ["0.9", "--gate=failed"],
        "buffer_size": ["3", "--gate=buffer --reward=brevity"],
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
    ("rm", "seed"): ["1", "", REFUSED],
    ("pretrain", "task"): ["countdown"],
    ("pretrain", "min_terms"): ["3", "--max_terms=3"],
    ("pretrain", "max_terms"): ["3"],
    ("pretrain", "dtype"): ["bfloat16"],
    ("pretrain", "inspect"): ["one", "", REFUSED],                      # there is no policy
    ("rm", "inspect"): ["one", "", REFUSED],
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


def parser_of(algo):
    return flags.make_parser(algo, train.ALGORITHMS, GPTConfig)


FLAGS = [(algo, name[2:]) for algo in train.ALGORITHMS
         for name in parser_of(algo)._option_string_actions if name.startswith("--")]


def checksum(prompts, completions, /, **columns):
    """0, 1 or 2, as good as at random, the same for the same answer."""
    return [float(zlib.crc32(f"{p}{c}".encode()) % 3) for p, c in zip(prompts, completions)]


class Seen:
    """What became of a run: its networks, its log, what was said and how often it saved."""
    networks = lines = said = saves = compiled = refused = None


def without_clock(line):
    return {k: v for k, v in line.items() if "second" not in k}


@pytest.fixture(scope="module")
def observe(tmp_path_factory):
    """observe(algo, flags) -> Seen, each run once; the folder's name stands for {folder}."""
    folder, seen, spied = tmp_path_factory.mktemp("flags"), {}, {"saves": 0, "compiled": 0}
    ranks = {bytes([i]) if i < 256 else f"<{i}>".encode(): i for i in range(50256)}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"(?s:.)", mergeable_ranks=ranks,   # no download
                                 special_tokens={"<|endoftext|>": 50256})

    def counted(name, function):
        def spy(*args, **kwargs):
            spied[name] += 1
            return function(*args, **kwargs)
        return spy

    def observe(algo, words=""):
        words = words.format(folder=folder)
        if (algo, words) not in seen:
            seen[algo, words] = now = Seen()
            spied.update(saves=0, compiled=0)
            sampling = issubclass(train.ALGORITHMS[algo].Config, flags.Sampling)
            samples = SAMPLES * sampling + " --demonstrated=2" * (algo == "hybrid")
            samples += " --teacher=teacher" * (algo == "distill")
            out = f"run-{len(seen)}"
            command = f"--algo={algo} {RUN}{samples} --out_dir={out} {words}".split()
            try:
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    assert train.main(command) == 0
            except InputError as error:
                now.refused = str(error)
            now.said, now.saves, now.compiled = said.getvalue(), spied["saves"], spied["compiled"]
            if os.path.exists(f"{out}/ckpt.pt"):
                now.networks = checkpoint(out)["algorithm"]
                now.lines = [without_clock(line) for line in metrics(out)]
        return seen[algo, words]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(report, "plot", lambda folder: "no picture")
        for Config in (PretrainConfig, RMConfig):
            short = shorter(Config.__init__, max_steps=2, batch_size=4, warmup_steps=0)
            patch.setattr(Config, "__init__", short)
        for Task in (tasks.Chain, tasks.Countdown, files.JsonLines):
            patch.setattr(Task, "reward", staticmethod(checksum))
        patch.setattr(tasks.Countdown, "chance", lambda self, k: None)      # slow, and only printed
        patch.setattr(tiktoken, "get_encoding", lambda name: encoding)
        patch.setattr(torch, "save", counted("saves", torch.save))
        patch.setattr(torch, "compile", counted("compiled", lambda function, dynamic: function))
        write_jsonl([{"prompt": f"{a}+{b}=", "completion": "1;2", "answer": "2", "chosen": "1;2",
                      "rejected": "3"} for a in range(5) for b in range(5)], "sums.jsonl")
        for algo, seed, out in (("pretrain", 5, "other-base"), ("rm", 5, "other-rm"),
                                ("pretrain", 6, "teacher")):
            observe(algo, f"--base_seed={seed} --out_dir={out}")
        yield observe


def digest(networks):
    """One number for all the weights of a run."""
    code = hashlib.sha256()
    for name, tensor in networks.items():
        code.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return code.hexdigest()


def flat(lines):
    return {f"{line['step']} {k}": v for line in lines for k, v in line.items()}


def entry(algo, flag):
    """-> (changed value, what else is given, what becomes different)"""
    found = EXCEPTIONS.get((algo, flag)) or OWN[algo].get(flag) or SHARED.get(flag)
    assert found, f"--{flag} of {algo} has no entry here: what must it change, and what not?"
    return (*found, *("", "weights")[len(found) - 1:])


@pytest.mark.parametrize("algo, flag", [pair for pair in FLAGS if pair[1] not in ELSEWHERE] + [
    (algo, flag) for algo, own in OWN.items() for flag in own if " " in flag],
    ids=lambda value: value)
def test_a_flag_changes_what_it_is_for(observe, algo, flag):
    """Changed from its default it changes the run in the way that its entry names, every choice of
    it in a way of its own; a flag that must change nothing changes nothing."""
    value, company, effect = entry(algo, flag)
    flag = flag.split()[0]
    values = value.split() if value else parser_of(algo)._option_string_actions[f"--{flag}"].choices
    seen = [observe(algo, company)] + [observe(algo, f"{company} --{flag}={v}") for v in values]
    if effect == REFUSED:
        assert seen[0].refused is None and seen[1].refused
        return
    assert [s.refused for s in seen] == [None] * len(seen)
    if isinstance(effect, Same):
        before, after = seen
        assert flat(after.lines) == pytest.approx(flat(before.lines), rel=1e-3, abs=1e-4)
        assert before.networks.keys() == after.networks.keys()
        assert all(torch.allclose(before.networks[name], after.networks[name], atol=1e-4)
                   for name in before.networks)
    elif effect == "weights":
        if value is None:       # one of the choices is the default, or the one in the company
            seen = seen[1:]
        assert len({digest(s.networks) for s in seen}) == len(seen)
    else:
        assert len({repr(getattr(s, effect)) for s in seen}) == len(seen)
        if effect == SAID:      # and nothing is trained
            assert all(s.networks is None for s in seen[1:])
        else:                   # watching a run does not change it
            assert len({digest(s.networks) for s in seen}) == 1


def test_the_table_lists_nothing_else():
    """Every entry is of a flag that exists, and every algorithm's own flags are its own."""
    names = {flag for _, flag in FLAGS}
    assert set(SHARED) | set(ELSEWHERE) <= names
    for algo, own in OWN.items():
        assert {(algo, flag.split()[0]) for flag in own} <= set(FLAGS)
        assert not set(own) & set(SHARED)
    assert set(EXCEPTIONS) <= set(FLAGS) and set(OWN) == set(train.ALGORITHMS)


def test_the_algorithms_differ(observe):
    """--algo itself: no two algorithms make the same of the same base."""
    made = {digest(observe(algo).networks) for algo in train.ALGORITHMS}
    assert len(made) == len(train.ALGORITHMS)


# -- sample.py ------------------------------------------------------------------------------------

PROMPT = "1+1="
ASKING = {   # the same, of what is printed: [changed value, what else has to be given, or Same]
    "task": ["facts"], "min_terms": ["3", "--max_terms=3"], "max_terms": ["4"],
    "other_skills": ["true"],
    "data": ["sums.jsonl"], "eval_data": ["two.jsonl", "--data=sums.jsonl"],
    "max_new_tokens": ["3"], "temperature": ["0.2", PROMPT], "top_k": ["1", PROMPT],
    "top_p": ["0.1", PROMPT], "num_generations": ["3", PROMPT], "seed": ["1", PROMPT],
    "eval_problems": ["7", "--temperature=3"],
    "tokenizer": ["gpt2", "", REFUSED], "device": ["cuda:77", "", REFUSED],
    "dtype": ["bfloat16", "--eval_problems=100"],
    "micro_batch_size": ["1", "", Same("it only saves memory")],
    "worked_share": ["1", "", Same("it is of a corpus, and none is read")],
    "compile": ["true", "", Same("it is the training pass that is compiled")],
}


@pytest.mark.parametrize("flag", [name for name in flags.declarations(sample.SampleConfig)])
def test_a_flag_of_sample_changes_what_it_prints(observe, flag):
    """The same for asking a model and judging it."""
    assert flag in ASKING, f"--{flag} of sample.py has no entry here"
    value, company, effect = (*ASKING[flag], *("", SAID)[len(ASKING[flag]) - 1:])
    write_jsonl([{"prompt": "1+2=", "completion": "3", "answer": "3", "chosen": "3",
                  "rejected": "4"}] * 2, "two.jsonl")
    said = []
    for more in ([], [f"--{flag}={value}"]):
        words = ["other-base", "--eval_problems=40", *company.split(), *more]
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert sample.main(words) == 0
            said.append(out.getvalue())
        except InputError:
            said.append(REFUSED)
    assert said[0] != REFUSED and (said[1] == REFUSED) == (effect == REFUSED)
    assert (said[0] == said[1]) == isinstance(effect, Same)
