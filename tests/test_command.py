"""
From the words of a command to what is run: flags, the device, the names of folders, the commands
for what has to be made first, checkpoints, settings. Nothing is trained here.
"""

import dataclasses
import errno
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

import data
import train
from model import GPT, GPTConfig, InputError


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(text):
    return train.parse_args(text.split())


# -- words -----------------------------------------------------------------------------------------


def test_dashes_and_underscores():
    """In a flag's name a dash is an underscore; its value, and a word of one dash, are left
    alone."""
    words = ["--a-b", "--a-b=c-d=e-f", "-1e-3", "a-b", "--x", "---"]
    assert train.underscores(words) == ["--a_b", "--a_b=c-d=e-f", "-1e-3", "a-b", "--x", "--_"]


def test_what_a_comparison_reads():
    """--algo, --seeds, --seed and --out_dir, in either way of writing them; all else is handed
    on."""
    asked, rest = train.which("--algo=a,b --beta 1 --seeds 3 --seed=2 --out_dir=x/".split())
    assert vars(asked) == {"algo": "a,b", "seeds": 3, "seed": 2, "out_dir": "x"}
    assert rest == ["--beta", "1"]
    asked, rest = train.which(["--see=1", "--out=x", "--al=ppo", "--help"])      # not abbreviated
    assert vars(asked) == {"algo": "grpo", "seeds": None, "seed": 0, "out_dir": None}
    assert rest == ["--see=1", "--out=x", "--al=ppo", "--help"]
    for words in (["--seeds", "two"], ["--seed=x"]):
        with pytest.raises(InputError, match="invalid int value"):
            train.which(words)


@pytest.mark.parametrize("text, value", [
    ("", False), ("--resume", True), ("--resume true", True), ("--resume=TRUE", True),
    ("--resume false", False), ("--resume=False", False)])
def test_booleans(text, value):
    """A switch stands alone, or with true or false; its default is false here."""
    assert parse(text)[0].resume is value


def test_inspect_stands_alone_or_with_all():
    """--inspect is one batch of the algorithm, --inspect all everybody's."""
    assert [parse(text)[0].inspect for text in ("", "--inspect", "--inspect all")] == [
        None, "one", "all"]
    with pytest.raises(InputError, match="invalid choice: 'some'"):
        parse("--inspect some")


def test_only_flags_of_the_shape_that_were_given_count():
    """{flag: value} of those that the command names, with the right types; the others stay with the
    config's defaults."""
    assert parse("")[2] == {}
    shape = parse("--n-embd=8 --qk_norm false --rope_theta 10 --tie_embeddings")[2]
    assert shape == {"n_embd": 8, "qk_norm": False, "rope_theta": 10.0, "tie_embeddings": True}
    assert type(shape["rope_theta"]) is float
    assert parse("--out_dir n_layer")[2] == {} and parse("--sample n_head=3")[2] == {}


def test_an_algorithm_gets_its_own_flags():
    """The config holds what the command says, and each algorithm's defaults go before the
    shared."""
    args, config, _ = parse("--algo ppo --kl_coef 0.5 --max_steps 7")
    assert type(config) is train.PPO.Config and config.kl_coef == args.kl_coef == 0.5
    assert (args.max_steps, args.warmup_steps, args.batch_size) == (7, 5, 32)
    assert config == train.PPO.Config(kl_coef=0.5)
    for algo, algorithm in train.ALGORITHMS.items():
        args, _, _ = parse(f"--algo {algo}")
        defaults = train.PRETRAIN if algo == "pretrain" else algorithm.defaults
        assert {name: getattr(args, name) for name in defaults} == defaults


def test_pretraining_reads_a_corpus():
    """Every token is trained, and there are as many documents as the run reads, unless a number is
    given. It has no other flag of sft.py's."""
    args, config, _ = parse("--algo pretrain --max_steps 6 --batch_size 5")
    assert config.num_documents == 30 and config.completion_only is args.completion_only is False
    assert parse("--algo pretrain --num_documents 7")[1].num_documents == 7
    assert parse("--algo sft")[1].completion_only and parse("--algo sft")[1].num_documents == 0
    for flag in ("--source self", "--num_demonstrations 3", "--completion_only true"):
        with pytest.raises(InputError, match="is unknown"):
            parse(f"--algo pretrain {flag}")


def test_the_seed_of_what_is_shared():
    """A base or reward model has --base_seed for its seed; a --seed that agrees is welcome."""
    for algo in ("pretrain", "rm"):
        assert [parse(f"--algo {algo} {flags}")[0].seed for flags in (
            "", "--base_seed 4", "--base_seed 4 --seed 4", "--seed=0")] == [0, 4, 4, 0]
        for flags in ("--seed 4", "--seed=0 --base_seed 4"):
            with pytest.raises(InputError, match="whose seed is --base_seed"):
                parse(f"--algo {algo} {flags}")
    args, _, _ = parse("--algo sft --seed 4 --base_seed 3")
    assert (args.seed, args.base_seed) == (4, 3)


@pytest.mark.parametrize("flags, fits", [
    ("--seed 1099511627775", True), ("--seed 1099511627776", False), ("--warmup_steps 0", True),
    ("--warmup_steps=-1", False), ("--weight_decay 0", True), ("--max_grad_norm 0", True),
    ("--adam_beta2 0", True), ("--adam_beta2 0.999", True), ("--adam_beta2 1", False),
    ("--adam_beta2=-1e-12", False), ("--learning_rate 1e-12", True), ("--learning_rate 0", False),
    ("--eval_only --top_p 1", True), ("--eval_only --top_p 1.0000001", False),
    ("--eval_only --top_p 1e-9", True), ("--eval_only --top_p 0", False), ("--top_p 1", True),
    ("--top_p 0.99", False), ("--top_k 1", False), ("--sample x --top_k 1", True),
    ("--sample x --top_p 0.5", True), ("--max_steps 1 --eval_problems 1 --save_steps 1", True),
    ("--algo pretrain --init_from x", False), ("--algo pretrain --init_from x --eval_only", True),
    ("--algo pretrain --init_from x --sample y", True), ("--eval_data x", False),
    ("--eval_data x --data y", True), ("--data y", True), ("--algo rm --inspect", False),
    ("--algo sft --inspect", True), ("--algo rm", True)])
def test_where_the_limits_are(flags, fits):
    """The last value that is taken and the first that is not; what needs other company is
    refused."""
    if fits:
        parse(flags)
    else:
        with pytest.raises(InputError):
            parse(flags)


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
    """`run/` is `run`, so that it can be renamed; nothing given is nothing."""
    assert [parse(f"--out_dir={text}")[0].out_dir for text in ("run/", "a//b/", "a/b", "./x")] == [
        "run", "a/b", "a/b", "x"]
    assert parse("")[0].out_dir is None


def helped(algo, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--algo", algo, "--help"])
    return capsys.readouterr().out


def test_the_help_says_what_a_flag_takes(capsys):
    """Kind, range and default of each flag; a switch is true|false, choices stand in braces, no
    text is `none`, an empty one `empty`."""
    out = helped("grpo", capsys)
    for line in (r"--resume \[true\|false\]\s+.*\[false\]", r"--init_from str\s[^[]*\[none\]",
                 r"--reward_weights str\s[^[]*\[empty\]", r"--learning_rate float\s[^[]*\[0.001\]",
                 r"--seeds int\s[^[]*\[1\]", r"--task \{chain,countdown\}\s[^[]*\[chain\]",
                 r"--qk_norm \[true\|false\]\s[^[]*\[true\]", r"--epsilon float\s[^[]*\[0.2\]",
                 r"--inspect \[\{one,all\}\]\s[^[]*\[none\]",
                 r"--rope_theta float\s[^[]*\[100.0\]"):
        assert re.search(line, out), line
    names = ",".join(train.ALGORITHMS)
    assert out.startswith(f"usage: python train.py --algo {{{names}}} [flags]\n")
    assert "    python train.py --algo grpo                     make a base" in out     # unwrapped
    assert re.search(r"^  --n_head int {20,}\S", out, re.M)
    for title in ("what to run:", "task and data:", "the loop:", "optimizer (AdamW):", "machine:",
                  "the model (of a new base; other models bring", "grpo, from grpo.py:"):
        assert title in out
    assert max(map(len, out.split("\n"))) <= 120


# -- the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, mps, flags, picked", [
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
def test_the_device(monkeypatch, cuda, mps, flags, picked):
    """auto takes a GPU where there is one, and bfloat16 with CUDA alone; what is asked for is taken
    or refused, never replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    args, _, _ = parse(flags)
    if picked is None:
        with pytest.raises(InputError, match=f"{args.device}(: not available| is unknown)"):
            train.pick_device(args)
    else:
        train.pick_device(args)
        assert (args.device, args.dtype) == picked


# -- what is made on the way -----------------------------------------------------------------------


def test_the_command_of_a_base():
    """A base gets what decides what it learns, and where: task, seed, shape, machine. Nothing that
    is the run's own: no data, no length of answers, no start."""
    args, _, shape = parse(
        "--task countdown --base_seed 3 --device cpu --dtype bfloat16 --n_embd 8 --eval_problems 5 "
        "--max_new_tokens 9 --init_from x --data y --seed 8")
    words = train.shared_command(args, shape, "pretrain")
    assert words == (
        "--algo pretrain --task countdown --tokenizer byte --base_seed 3 --min_terms 3 "
        "--max_terms 4 --device cpu --dtype bfloat16 --eval_problems 5 --n_embd 8").split()
    base, _, its_shape = train.parse_args(words)
    assert base.seed == 3 and its_shape == {"n_embd": 8} and base.data is None


def test_the_command_of_a_reward_model():
    """It starts from the run's start, and reads the run's data, with answers of the run's
    length."""
    args, _, shape = parse("--algo ppo --init_from x --data y --eval_data z --max_new_tokens 9")
    words = train.shared_command(args, shape, "rm")
    assert words[:2] == ["--algo", "rm"]
    assert words[-8:] == "--init_from x --data y --eval_data z --max_new_tokens 9".split()
    args, _, shape = parse("--algo ppo --qk_norm false")
    assert train.shared_command(args, shape, "rm") == (
        "--algo rm --task chain --tokenizer byte --base_seed 0 --min_terms 3 --max_terms 4 "
        "--device auto --dtype auto --eval_problems 256 --qk_norm False").split()


def folder(text):
    args, _, shape = parse(text)
    return train.shared_dir(args, shape)


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
    others = [folder(f"--algo pretrain {flags}") for flags in (
        "--n_embd 8", "--n_layer 3", "--learning_rate 1e-4", "--min_terms 2", "--num_documents 9")]
    assert all(re.fullmatch(plain + "-[0-9a-f]{6}", name) for name in others)
    assert len(set(others)) == len(others)
    assert folder("--n_embd 8 --n_layer 3 --algo pretrain") == folder(
        "--algo=pretrain --n-layer 3 --n-embd 8")
    assert re.fullmatch("out/my-sums-rm-0-[0-9a-f]{6}", folder("--algo rm --data a/my.sums.jsonl"))


def test_what_is_there_is_not_made_again(monkeypatch, capsys):
    """ensure: a finished base is named with the seconds that it took; else it is made, by the
    command that Ctrl-C names, and where that came it is None."""
    args, _, shape = parse("--algo grpo")
    summary = {"steps": 2000, "seconds": 41.6}
    calls = []

    def run(command, again):
        calls.append((command, again))
        os.makedirs("out/chain-pretrain-0")
        with open("out/chain-pretrain-0/summary.json", "w") as file:
            json.dump(summary, file)
        return 0
    monkeypatch.setattr(train, "run", lambda command, again: 130)
    assert train.ensure("pretrain", args, shape, "again") is None
    assert train.ensure("rm", args, shape, "again") is None
    assert capsys.readouterr().out == (
        "No base model in out/chain-pretrain-0 yet: pre-training one first (once; every algorithm "
        "starts from it).\nNo reward model in out/chain-rm-0 yet: training one first (once).\n")
    monkeypatch.setattr(train, "run", run)
    assert train.ensure("pretrain", args, shape, "again") == ("out/chain-pretrain-0", summary)
    assert calls == [(train.shared_command(args, shape, "pretrain"), "again")]
    capsys.readouterr()
    assert train.ensure("pretrain", args, shape, "again") == ("out/chain-pretrain-0", summary)
    assert capsys.readouterr().out == "Base model: out/chain-pretrain-0 (made earlier in 42 s)\n"
    assert len(calls) == 1


def test_finished():
    """A run is finished once it has summed up all its steps; out of time, or not there, it is
    not."""
    os.makedirs("run")
    args = SimpleNamespace(out_dir="run", max_steps=5)
    assert not train.is_finished(args)
    for steps, finished in ((4, False), (5, True), (6, True)):
        train.write_text("run/summary.json", json.dumps({"steps": steps}))
        assert train.is_finished(args) == finished


def test_an_earlier_run_moves_to_the_first_free_name(capsys):
    """run, run.1 and run.3 are there: run becomes run.2. A folder that holds no run stays."""
    for name in ("run", "run.1", "run.3", "notes"):
        train.write_text(f"{name}/{'text' if name == 'notes' else 'config.json'}", name)
    train.keep_earlier_run("run")
    train.keep_earlier_run("notes")
    train.keep_earlier_run("nothing")
    assert sorted(os.listdir(".")) == ["notes", "run.1", "run.2", "run.3"]
    with open("run.2/config.json") as file:
        assert file.read() == "run"
    assert capsys.readouterr().out == (
        "run held an earlier run, which is now run.2 (--resume would have gone on with it)\n")
    train.write_text("run.2.x/config.json", "x")
    train.keep_earlier_run("run.2.x")
    assert os.path.exists("run.2.x.1")


# -- files -----------------------------------------------------------------------------------------


def test_write_leaves_the_old_file_or_the_new():
    """Folders are made, and no .tmp is left. Where writing fails half-way the earlier file stays as
    it was, which the message says; where there was none, it does not."""
    train.write_text("a/b/file", "old")
    train.write_text("plain", "here")
    train.write_text("a/b/file", "new")

    def fails(tmp):
        with open(tmp, "w") as file:
            file.write("half")
        raise error
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, said in ((full, full.strerror), (RuntimeError("zip"), "is the disk full?")):
        for path, kept in (("a/b/file", "; the earlier file is untouched"), ("a/new/file", "")):
            with pytest.raises(InputError) as raised:
                train.write(path, fails)
            assert str(raised.value) == (f"cannot write {path}: {said}{kept}; free some space or "
                                         "choose another --out_dir")
    with pytest.raises(InputError, match="cannot write plain/x: File exists; free"):
        train.write("plain/x", fails)
    with open("a/b/file") as file:
        assert file.read() == "new"
    assert (os.listdir("a/b"), os.listdir("a/new")) == (["file"], [])
    assert sorted(os.listdir(".")) == ["a", "plain"]


SHAPE = dict(vocab_size=258, n_embd=4, n_head=1, n_layer=1, block_size=40)


def save(path, **more):
    model = GPT(GPTConfig(**{**SHAPE, **more}))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    config = dataclasses.asdict(model.config)
    torch.save({"model": model.state_dict(), "model_config": config}, path)
    return model


def test_a_checkpoint_is_read_and_built(monkeypatch):
    """A folder stands for its ckpt.pt. The weights are those that were saved, on the device asked
    for, read as plain tensors on the CPU; padding is skipped on a CPU alone."""
    model = save("run/ckpt.pt")
    load, asked = torch.load, []

    def spy(path, **kwargs):
        asked.append(kwargs)
        return load(path, **kwargs)
    monkeypatch.setattr(torch, "load", spy)
    for path in ("run", "run/ckpt.pt"):
        built = train.build_model(SimpleNamespace(device="cpu"), train.read_checkpoint(path))
        assert built.config == model.config and built.skip_padding is True
        assert all(torch.equal(a, b) for a, b in zip(built.parameters(), model.parameters()))
    assert asked == [{"map_location": "cpu", "weights_only": True}] * 2
    elsewhere = train.build_model(SimpleNamespace(device="meta"), train.read_checkpoint("run"))
    assert elsewhere.device.type == "meta" and elsewhere.skip_padding is False


def test_one_weight_that_is_no_number_is_enough():
    """A single nan among the weights, and the checkpoint is refused."""
    save("ckpt.pt")
    content = torch.load("ckpt.pt", weights_only=True)
    content["model"]["layers.0.mlp.up_proj.weight"][3, 1] = float("nan")
    with pytest.raises(InputError, match="not all finite"):
        train.build_model(SimpleNamespace(device="cpu"), content)


def test_what_a_run_can_start_from():
    """A policy of the shape and with the tokenizer that were asked for; shape flags that agree are
    welcome, derived sizes count. A base is not measured by the flags: it was made by them."""
    save("policy/ckpt.pt", n_kv_head=1)
    save("scorer/ckpt.pt", scalar_head=True)
    args = SimpleNamespace(device="cpu", init_from="policy", tokenizer="byte")
    good = dict(n_embd=4, n_head=1, n_layer=1)
    assert train.start_model(args, good, "policy").config.n_embd == 4
    with pytest.raises(InputError, match="^policy has n_layer 1, not 2: leave the flag out$"):
        train.start_model(args, {**good, "n_layer": 2}, "policy")
    with pytest.raises(InputError, match="^scorer is a reward model, which cannot write; give it"):
        train.start_model(args, {}, "scorer")
    base = SimpleNamespace(device="cpu", init_from=None, tokenizer="byte")
    assert train.start_model(base, {"n_layer": 2}, "policy").config.n_layer == 1
    content = torch.load("policy/ckpt.pt", weights_only=True)
    torch.save({**content, "tokenizer": "gpt2"}, "policy/ckpt.pt")
    with pytest.raises(InputError, match="^policy was trained with --tokenizer gpt2$"):
        train.start_model(args, {}, "policy")


def test_what_can_judge():
    """A reward model for this tokenizer becomes the task's learned reward, and is not trained
    further."""
    save("policy/ckpt.pt")
    save("scorer/ckpt.pt", scalar_head=True)
    save("other/ckpt.pt", scalar_head=True, vocab_size=300)
    args, tokenizer, task = SimpleNamespace(device="cpu"), data.Tokenizer(), data.Chain(2, 2)
    for path in ("policy", "other"):
        with pytest.raises(InputError, match=f"^{path} is no reward model for this tokenizer"):
            train.give_reward_model(task, args, path, tokenizer)
    assert task.learned_reward is None
    train.give_reward_model(task, args, "scorer", tokenizer)
    assert not any(p.requires_grad for p in task.reward_model.parameters())
    answers = ["1+1=2;2", "7"]
    assert task.learned_reward(["1+1="] * 2, answers) == train.rm.scorer(
        task.reward_model, tokenizer)(["1+1="] * 2, answers)


# -- settings --------------------------------------------------------------------------------------

KEPT = ("networks", "optimizer", "step", "counts", "before", "seconds", "pretrain_seconds",
        "totals", "tally", "random_states")


def begun(flags):
    """A checkpoint as a run with these flags leaves it, as far as settings go."""
    args, _, shape = parse(flags)
    config = GPTConfig(**{"vocab_size": 258, **shape})
    config = dataclasses.asdict(config)
    return {**dict.fromkeys(KEPT), "settings": vars(args), "model_config": config}


@pytest.mark.parametrize("changed, named", [
    ("", None), ("--learning_rate 0.1", "learning_rate 0.001, this command says 0.1"),
    ("--seed 1", "seed 0, this command says 1"),
    ("--num_generations 3", "num_generations 16, this command says 3"),
    ("--eval_problems 3 --logging_steps 2 --save_steps 9 --out_dir x --max_minutes 2", None),
    ("--n_layer 2", None), ("--n_layer 3", "n_layer 2, this command says 3"),
    ("--n_kv_head 4", None), ("--n_kv_head 2", "n_kv_head 4, this command says 2")])
def test_a_run_goes_on_with_its_own_settings(changed, named):
    """Whatever changes the outcome must be the same, the shape too where it is given; how a run is
    watched may change."""
    args, _, shape = parse(changed)
    checkpoint = begun("")
    if named is None:
        train.check_same_settings(args, shape, checkpoint, "x")
    else:
        with pytest.raises(InputError, match=f"^x was made with --{named}"):
            train.check_same_settings(args, shape, checkpoint, "x")


def test_settings_that_an_earlier_version_did_not_have():
    """A flag that the checkpoint does not know is no reason to refuse it."""
    args, _, shape = parse("")
    args.invented = 1
    train.check_same_settings(args, shape, begun(""), "x")


@pytest.mark.parametrize("lost", [*KEPT, "settings"])
def test_nothing_that_resuming_needs_may_be_missing(lost):
    """The complaint names what is not there, and what the file is good for."""
    args, _, shape = parse("")
    checkpoint = begun("")
    del checkpoint[lost]
    with pytest.raises(InputError, match=f"^x holds a model but no {lost}, and cannot be resumed"):
        train.check_same_settings(args, shape, checkpoint, "x")


# -- how a command ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("outcome, code, said", [
    (0, 0, ""), (130, 130, ""), (InputError("no luck"), 2, "error: no luck\n"),
    (KeyboardInterrupt(), 130, "\nstopped\n"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: Permission denied\n"),
    (OSError(errno.ENOSPC, "No space left"), 2, "error: output: No space left\n")])
def test_how_a_command_ends(monkeypatch, capsys, outcome, code, said):
    """The exit code, and one line on stderr where something went wrong."""
    def run(argv):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
    monkeypatch.setattr(train, "run", run)
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == code
    assert capsys.readouterr() == ("", said)
