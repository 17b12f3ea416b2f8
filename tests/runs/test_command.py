"""
From the words of a command to what is run: flags, the device, the names of folders, what has to be
made first. Nothing is trained here.
"""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

import train
from harness import checkpoint, flags, prepare, report
from harness.errors import InputError
from model import GPTConfig


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(text):
    return flags.parse(text.split(), train.ALGORITHMS, GPTConfig)


def checked(text):
    """The settings once files and folder are settled as well."""
    config = parse(text)
    prepare.check(config, train.ALGORITHMS)
    return config


# -- words ----------------------------------------------------------------------------------------


def test_dashes_and_underscores():
    """In a flag's name a dash is an underscore; its value, and a word of one dash, are left
    alone."""
    words = ["--a-b", "--a-b=c-d=e-f", "-1e-3", "a-b", "--x", "---"]
    assert flags.underscores(words) == ["--a_b", "--a_b=c-d=e-f", "-1e-3", "a-b", "--x", "--_"]


def test_dashes_are_accepted():
    """--learning-rate is --learning_rate, with a space or = before the value; a value's own dashes
    are left alone."""
    config = parse("--learning-rate 0.5 --max-steps=7 --out-dir=a-b")
    assert (config.learning_rate, config.max_steps, config.out_dir) == (0.5, 7, "a-b")


def test_which_algorithm():
    """The last --algo counts, in either way of writing it; no other word is read, nor abbreviated;
    GRPO is the default."""
    assert flags.which("--algo=sft --beta 1 --algo ppo --seed=2".split()) == "ppo"
    assert flags.which(["--al=ppo", "--help"]) == flags.which([]) == "grpo"


@pytest.mark.parametrize("text, value", [
    ("", False), ("--resume", True), ("--resume true", True), ("--resume=TRUE", True),
    ("--resume false", False), ("--resume=False", False)])
def test_booleans(text, value):
    """A switch stands alone, or with true or false; its default is false here."""
    assert parse(text).resume is value


def test_inspect_stands_alone_or_with_all():
    """--inspect is one batch of the algorithm, --inspect all every algorithm's."""
    assert [parse(text).inspect for text in ("", "--inspect", "--inspect all")] == [
        None, "one", "all"]
    with pytest.raises(InputError, match="invalid choice: 'some'"):
        parse("--inspect some")


def test_only_flags_of_the_shape_that_were_given_count():
    """{flag: value} of those that the command names, with the right types; the others stay with the
    config's defaults."""
    assert parse("").shape == {}
    shape = parse("--n-embd=8 --qk_norm false --rope_theta 10 --tie_embeddings").shape
    assert shape == {"n_embd": 8, "qk_norm": False, "rope_theta": 10.0, "tie_embeddings": True}
    assert type(shape["rope_theta"]) is float
    assert parse("--out_dir n_layer").shape == {}


def test_an_algorithm_gets_its_own_flags():
    """Each algorithm has a Config of its own, whose defaults go before the shared ones."""
    config = parse("--algo ppo --kl_coef 0.5 --max_steps 7")
    assert type(config) is train.PPO.Config and config.kl_coef == 0.5
    assert (config.max_steps, config.warmup_steps, config.batch_size) == (7, 5, 32)
    machine = dict(device=config.device, dtype=config.dtype, algo="ppo")
    assert config == train.PPO.Config(kl_coef=0.5, max_steps=7, **machine)
    for algo, Algorithm in train.ALGORITHMS.items():
        assert parse(f"--algo {algo}") == Algorithm.Config(**{**machine, "algo": algo})


def test_pretraining_reads_a_corpus():
    """Every token is trained, and there are as many documents as the run reads, unless a number is
    given. It has no other flag of sft.py's."""
    config = parse("--algo pretrain --max_steps 6 --batch_size 5")
    assert config.num_documents == 30 and config.completion_only is False
    assert parse("--algo pretrain --num_documents 7").num_documents == 7
    assert parse("--algo sft").completion_only
    for flag in ("--num_demonstrations 3", "--completion_only true"):
        with pytest.raises(InputError, match="is unknown"):
            parse(f"--algo pretrain {flag}")


def test_the_seed_of_what_is_shared():
    """A base or reward model has --base_seed for its seed; a --seed that agrees is welcome."""
    for algo in ("pretrain", "rm"):
        assert [parse(f"--algo {algo} {words}").seed for words in (
            "", "--base_seed 4", "--base_seed 4 --seed 4", "--seed=0")] == [0, 4, 4, 0]
        for words in ("--seed 4", "--seed=3 --base_seed 4"):
            with pytest.raises(InputError, match="is --base_seed"):
                parse(f"--algo {algo} {words}")
    for words in ("--algo sft --seed 4", "--algo rm --seed 4 --out_dir x"):   # each its own
        config = parse(f"{words} --base_seed 3")
        assert (config.seed, config.base_seed) == (4, 3)


@pytest.mark.parametrize("words, fits", [
    ("--seed 1099511627775", True), ("--seed 1099511627776", False), ("--warmup_steps 0", True),
    ("--warmup_steps=-1", False), ("--weight_decay 0", True), ("--max_grad_norm 0", True),
    ("--adam_beta2 0", True), ("--adam_beta2 0.999", True), ("--adam_beta2 1", False),
    ("--adam_beta2=-1e-12", False), ("--learning_rate 1e-12", True), ("--learning_rate 0", False),
    ("--max_steps 1 --eval_problems 1 --save_steps 1", True),
    ("--algo pretrain --init_from x", False), ("--eval_data x", False), ("--eval_data=x", False),
    ("--algo rm --inspect", False), ("--algo sft --inspect", True), ("--algo rm", True)])
def test_where_the_limits_are(words, fits):
    """The last value that is taken and the first that is not; what needs other company is
    refused."""
    if fits:
        checked(words)
    else:
        with pytest.raises(InputError):
            checked(words)


def test_the_nearest_names():
    """One name is proposed for a mistyped flag or algorithm, and none where nothing is near."""
    for words, said in (("--algo sfft", "did you mean sft?"), ("--learning_rates 1", "ng_rate?"),
                        ("--num_prompt=1", "did you mean --num_prompts?")):
        with pytest.raises(InputError, match=re.escape(said)):
            parse(words)
    for words in ("--algo qqq", "--qqq"):
        with pytest.raises(InputError) as error:
            parse(words)
        assert "did you mean" not in str(error.value)


def test_a_folder_has_no_slash_at_its_end():
    """`run/` is `run`, so that it can be renamed; nothing given is the run's own folder."""
    assert [checked(f"--out_dir={text}").out_dir for text in ("run/", "a//b/", "a/b", "./x")] == [
        "run", "a/b", "a/b", "x"]
    assert parse("").out_dir is None and checked("--seed 3").out_dir == "out/chain-grpo-3"


def test_the_help_says_what_a_flag_takes(capsys):
    """Kind, range and default of each flag; a switch is true|false, choices stand in braces, no
    text is `none`, an empty one `empty`."""
    with pytest.raises(SystemExit):
        train.main(["--algo", "grpo", "--help"])
    out = capsys.readouterr().out
    for line in (r"--resume \[true\|false\]\s+.*\[false\]", r"--init_from str\s[^[]*\[none\]",
                 r"--reward_weights str\s[^[]*\[empty\]", r"--learning_rate float\s[^[]*\[0.001\]",
                 r"--task \{chain,facts,countdown\}\s[^[]*\[chain\]", r"--inspect \[\{one,all\}\]",
                 r"--qk_norm \[true\|false\]\s[^[]*\[true\]", r"--epsilon float\s[^[]*\[0.2\]",
                 r"--rope_theta float\s[^[]*\[100.0\]"):
        assert re.search(line, out), line
    names = ",".join(train.ALGORITHMS)
    assert out.startswith(f"usage: python train.py --algo {{{names}}} [flags]\n")
    assert "    python train.py --algo grpo            train a base model" in out   # unwrapped
    for title in ("what to start from:", "task and data:", "the loop:", "optimizer (AdamW):",
                  "machine:", "the model (of a new base; other models bring", "grpo: compare"):
        assert title in out
    assert max(map(len, out.split("\n"))) <= 100


# -- the device -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, mps, words, picked", [
    (False, False, "", ("cpu", "float32")), (True, False, "", ("cuda", "bfloat16")),
    (False, True, "", ("mps", "float32")), (True, True, "", ("cuda", "bfloat16")),
    (True, True, "--device cpu", ("cpu", "float32")),
    (True, True, "--device mps", ("mps", "float32")),
    (True, False, "--device cuda:1", ("cuda:1", "bfloat16")),
    (True, False, "--dtype float32", ("cuda", "float32")),
    (False, False, "--dtype bfloat16", ("cpu", "bfloat16")),
    (False, False, "--device cuda", None), (False, True, "--device cuda:0", None),
    (True, False, "--device mps", None), (True, True, "--device cuda:", None),
    (True, True, "--device tpu", None), (True, True, "--device xcpu", None)])
def test_the_device(monkeypatch, cuda, mps, words, picked):
    """auto takes a GPU where there is one, and bfloat16 with CUDA alone; what is asked for is taken
    or refused, never replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if picked is None:
        device = words.split()[1]
        with pytest.raises(InputError, match=f"{device}(: not available| is unknown)"):
            parse(words)
    else:
        config = parse(words)
        assert (config.device, config.dtype) == picked


# -- what is made on the way ----------------------------------------------------------------------


def shared(text, kind):
    return prepare.shared_config(parse(text), kind, train.ALGORITHMS)


def test_the_settings_of_a_base():
    """A base gets what decides what it learns, and where: task, seed, shape, machine. Nothing that
    is the run's own: no data, no length of answers, no start. All else is the default."""
    base = shared("--task countdown --base_seed 3 --device cpu --dtype bfloat16 --n_embd 8 "
                  "--eval_problems 5 --max_new_tokens 9 --init_from x --data y --seed 8 "
                  "--learning_rate 0.5 --max_steps 3 --temperature 2 --compile", "pretrain")
    asked = parse("--algo pretrain --task countdown --base_seed 3 --device cpu --dtype bfloat16 "
                  "--eval_problems 5 --n_embd 8")
    asked.out_dir = base.out_dir
    assert base == asked and base.seed == 3 and base.data is None


def test_the_settings_of_a_reward_model():
    """It starts from the run's start, and reads the run's data, with answers of the run's
    length."""
    words = "--init_from x --data y --eval_data z --max_new_tokens 9 --qk_norm false"
    model = shared(f"--algo ppo --seed 4 --kl_coef 1 --temperature 2 {words}", "rm")
    asked = parse(f"--algo rm {words}")
    asked.out_dir = model.out_dir
    assert model == asked and model.seed == 0 and model.shape == {"qk_norm": False}


def folder(text):
    return prepare.default_folder(parse(text))


def test_the_folder_of_a_base():
    """The default base has a plain name, other settings one with six characters more, each its own;
    how a run is watched, and on what machine, is no setting."""
    plain = "out/chain-pretrain-0"
    assert folder("--algo pretrain") == plain
    assert folder("--algo pretrain --base_seed 2") == "out/chain-pretrain-2"
    assert folder("--algo rm --task countdown") == "out/countdown-rm-0"
    for watched in ("eval_problems 3", "logging_steps 7", "device cpu", "dtype bfloat16", "compile",
                    "micro_batch_size 2", "out_dir x", "save_steps 2", "max_minutes 3"):
        assert folder(f"--algo pretrain --{watched}") == plain
    others = [folder(f"--algo pretrain {words}") for words in (
        "--n_embd 8", "--n_layer 3", "--learning_rate 1e-4", "--min_terms 2", "--num_documents 9")]
    assert all(re.fullmatch(plain + "-[0-9a-f]{6}", name) for name in others)
    assert len(set(others)) == len(others)
    assert folder("--n_embd 8 --n_layer 3 --algo pretrain") == folder(
        "--algo=pretrain --n-layer 3 --n-embd 8")
    assert re.fullmatch("out/my-sums-rm-0-[0-9a-f]{6}", folder("--algo rm --data a/my.sums.jsonl"))


def test_the_long_base_is_what_its_message_says():
    """--pretraining long asks for the base of the command that --algo pretrain names when it
    refuses the flag, and a reward model goes with it. The short base has neither."""
    words = "--max_steps 2000 --learning_rate 0.006 --adam_beta2 0.95 --warmup_steps 50"
    with pytest.raises(InputError, match=f"here: {words}$"):
        checked("--algo pretrain --pretraining long")
    long, short = (shared(f"--algo grpo --pretraining {kind}", "pretrain")
                   for kind in ("long", "short"))
    assert long.out_dir == folder(f"--algo pretrain {words}")
    assert short.out_dir == folder("--algo pretrain") != long.out_dir
    assert (long.max_steps, long.learning_rate, long.num_documents) == (2000, 6e-3, 128_000)
    assert (long.adam_beta2, long.warmup_steps) == (0.95, 50)
    judge = shared("--algo ppo --pretraining long", "rm")
    assert prepare.shared_config(judge, "pretrain", train.ALGORITHMS) == long
    assert judge.out_dir != shared("--algo ppo", "rm").out_dir


def test_a_run_finds_the_base_that_a_command_makes():
    """What --algo pretrain makes with the same task, shape and seed is what a run looks for."""
    for words in ("", "--n_embd 8 --base_seed 3", "--task countdown", "--min_terms 2"):
        assert shared(f"--algo grpo {words}", "pretrain").out_dir == folder(
            f"--algo pretrain {words}")
        assert shared(f"--algo ppo {words}", "rm").out_dir == folder(f"--algo rm {words}")


def test_what_is_needed_first_is_named(capsys):
    """A finished base is named with the seconds that it took; one that is not there is announced,
    and so is a reward model."""
    base, scorer = shared("--algo grpo", "pretrain"), shared("--algo grpo", "rm")
    lines = [report.needed_line(config, prepare.SHARED[config.algo], prepare.is_finished(config))
             for config in (base, scorer)]
    assert lines == [
        "No base model in out/chain-pretrain-0 yet: pre-training one first (once; every algorithm "
        "starts from it).", "No reward model in out/chain-rm-0 yet: training one first (once)."]
    checkpoint.write_text("out/chain-pretrain-0/summary.json",
                          json.dumps({"steps": 2000, "seconds": 41.6}))
    assert prepare.is_finished(base)
    assert report.needed_line(base, "Base model", True) == (
        "Base model: out/chain-pretrain-0 (made earlier in 42 s)")


def test_what_is_needed_is_made_in_order(monkeypatch, capsys):
    """A run with a learned reward needs the base, then the reward model; Ctrl-C in either ends it
    with 130, and the command that is given then is the run's own."""
    config, made = checked("--algo ppo --reward model,verifier"), []
    monkeypatch.setattr(prepare, "build", lambda config, algorithms: 1 / 0)   # nothing is built
    run = train.run

    def stopped_in(algo):
        def stopped(needed, once_more, go_on):
            made.append((needed.algo, once_more, go_on))
            return 130 if needed.algo == algo else 0
        return stopped
    for stop, seen in (("pretrain", ["pretrain"]), ("rm", ["pretrain", "rm"])):
        made.clear()
        monkeypatch.setattr(train, "run", stopped_in(stop))
        assert run(config, "again", "again --resume") == 130
        assert made == [(algo, "again", "again") for algo in seen]


def test_finished():
    """A run is finished once it has summed up all its steps; out of time, or not there, it is
    not."""
    config = SimpleNamespace(out_dir="run", max_steps=5)
    assert not prepare.is_finished(config)
    for steps, finished in ((4, False), (5, True), (6, True)):
        checkpoint.write_text("run/summary.json", json.dumps({"steps": steps}))
        assert prepare.is_finished(config) == finished


def test_an_earlier_run_moves_to_the_first_free_name(capsys):
    """run, run.1 and run.3 are there: run becomes run.2. A folder that holds no run stays."""
    for name in ("run", "run.1", "run.3", "notes"):
        file = "text" if name == "notes" else "config.json"
        checkpoint.write_text(f"{name}/{file}", name)
    for name in ("run", "notes", "nothing"):
        prepare.keep_earlier_run(name)
    assert sorted(os.listdir(".")) == ["notes", "run.1", "run.2", "run.3"]
    with open("run.2/config.json") as file:
        assert file.read() == "run"
    assert capsys.readouterr().out == (
        "run held an earlier run, which is now run.2 (--resume would have gone on with it)\n")
    checkpoint.write_text("run.2.x/config.json", "x")
    prepare.keep_earlier_run("run.2.x")
    assert os.path.exists("run.2.x.1")
