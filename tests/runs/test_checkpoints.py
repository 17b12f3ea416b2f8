"""Checkpoints: files that are written whole or not at all, what a run can start from, what can
judge, and the settings with which a run goes on."""

import dataclasses
import errno
import os
from types import SimpleNamespace

import pytest
import torch

import data
import sample
import tasks
import train
from harness import checkpoint, flags, prepare
from harness.errors import InputError
from harness.flags import flag
from model import GPT, GPTConfig
from rm import Judge


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(text):
    return flags.parse(text.split(), train.ALGORITHMS, GPTConfig)


def test_write_leaves_the_old_file_or_the_new():
    """Folders are made, and no .tmp is left. Where writing fails half-way the earlier file stays as
    it was, which the message says; where there was none, it does not."""
    checkpoint.write_text("a/b/file", "old")
    checkpoint.write_text("plain", "here")
    checkpoint.write_text("a/b/file", "new")

    def failing(error):
        def save(tmp):
            with open(tmp, "w") as file:
                file.write("half")
            raise error
        return save
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, said in ((full, full.strerror), (RuntimeError("zip"), "is the disk full?")):
        for path, kept in (("a/b/file", "; the earlier file is untouched"), ("a/new/file", "")):
            with pytest.raises(InputError) as raised:
                checkpoint.write(path, failing(error))
            assert str(raised.value) == (f"cannot write {path}: {said}{kept}; free some space or "
                                         "choose another --out_dir")
    with pytest.raises(InputError, match="cannot write plain/x: File exists; free"):
        checkpoint.write("plain/x", failing(full))
    with open("a/b/file") as file:
        assert file.read() == "new"
    assert (os.listdir("a/b"), os.listdir("a/new")) == (["file"], [])
    assert sorted(os.listdir(".")) == ["a", "plain"]


SHAPE = dict(vocab_size=258, n_embd=4, n_head=1, n_layer=1, block_size=40)


def save(path, **more):
    model = GPT(GPTConfig(**{**SHAPE, **more}))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    shape = dataclasses.asdict(model.config)
    torch.save({"model": model.state_dict(), "model_config": shape}, path)
    return model


def test_a_checkpoint_is_read_and_built(monkeypatch):
    """A folder stands for its ckpt.pt. The weights are those that were saved, on the device asked
    for, read as plain tensors on the CPU."""
    model = save("run/ckpt.pt")
    load, asked = torch.load, []

    def spy(path, **kwargs):
        asked.append(kwargs)
        return load(path, **kwargs)
    monkeypatch.setattr(torch, "load", spy)
    for path in ("run", "run/ckpt.pt"):
        built = checkpoint.build_model(checkpoint.read(path))
        assert built.config == model.config and built.device.type == "cpu"
        assert all(torch.equal(a, b) for a, b in zip(built.parameters(), model.parameters()))
    assert asked == [{"map_location": "cpu", "weights_only": True}] * 2
    assert checkpoint.build_model(checkpoint.read("run"), "meta").device.type == "meta"


def test_one_weight_that_is_no_number_is_enough():
    """A single nan among the weights, and the checkpoint is refused."""
    save("ckpt.pt")
    content = torch.load("ckpt.pt", weights_only=True)
    content["model"]["layers.0.mlp.up_proj.weight"][3, 1] = float("nan")
    with pytest.raises(InputError, match="not all finite"):
        checkpoint.build_model(content)


def test_what_a_run_can_start_from():
    """A policy of the shape and with the tokenizer that were asked for; shape flags that agree are
    welcome, derived sizes count."""
    save("policy/ckpt.pt", n_kv_head=1)
    save("scorer/ckpt.pt", scalar_head=True)

    def start(path="policy", **shape):
        config = SimpleNamespace(device="cpu", init_from=path, tokenizer="byte", shape=shape)
        return prepare.start_model(config, config.device)
    assert start(n_embd=4, n_head=1, n_layer=1).config.n_embd == 4
    assert start(n_embd=4, n_head=1, n_layer=1, head_dim=4, n_hidden=32).config.n_layer == 1
    with pytest.raises(InputError, match="^policy has n_layer 1, not 2: leave the flag out$"):
        start(n_embd=4, n_head=1, n_layer=2)
    with pytest.raises(InputError, match="^scorer is a reward model, which cannot write; give it"):
        start("scorer")
    content = torch.load("policy/ckpt.pt", weights_only=True)
    torch.save({**content, "tokenizer": "gpt2"}, "policy/ckpt.pt")
    with pytest.raises(InputError, match="^policy was trained with --tokenizer gpt2$"):
        start()


def test_what_can_judge():
    """A reward model for this tokenizer becomes the task's learned reward, and is not trained
    further."""
    save("policy/ckpt.pt")
    scorer = save("scorer/ckpt.pt", scalar_head=True)
    save("other/ckpt.pt", scalar_head=True, vocab_size=300)
    config, tokenizer = SimpleNamespace(device="cpu"), data.Tokenizer()
    for path in ("policy", "other"):
        with pytest.raises(InputError, match=f"^{path} is no reward model for this tokenizer"):
            prepare.reward_model(config, path, tokenizer)
    judge = prepare.reward_model(config, "scorer", tokenizer)
    assert not any(p.requires_grad for p in judge.model.parameters())
    answers = ["1+1=2;2", "7"]
    prompts = ["1+1="] * 2
    learned = tasks.Rewards(tasks.Chain(2, 2, judge=judge), "model")
    examples = [{"prompt": p, "answer": "2"} for p in prompts]
    total, _ = learned(examples, answers)
    assert total.tolist() == Judge(scorer, tokenizer)(prompts, answers)
    assert len(set(total.tolist())) == 2


@pytest.mark.parametrize("words, fits", [
    ("--top_p 1", True), ("--top_p 1.0000001", False), ("--top_p 1e-9", True), ("--top_p 0", False),
    ("--top_k 0", True), ("--top_k=-1", False), ("--temperature 1e-9", True),
    ("--temperature 0", False), ("--num_generations 1", True), ("--num_generations 0", False)])
def test_where_the_limits_of_sampling_are(words, fits):
    """The last value that sample.py takes and the first that it does not."""
    save("policy/ckpt.pt")
    if fits:
        sample.parse(["policy", *words.split()])
    else:
        with pytest.raises(InputError, match=words[2:].split("=")[0].split()[0]):
            sample.parse(["policy", *words.split()])


@pytest.mark.parametrize("words", ["policy 1+1= --seed 3", "policy --seed 3 1+1=",
                                   "--seed 3 policy 1+1=", "--seed=3 policy --top_k 2 1+1="])
def test_a_prompt_may_stand_anywhere(words):
    """Before the flags, after them, or between them."""
    save("policy/ckpt.pt")
    _, prompt, config = sample.parse(words.split())
    assert (prompt, config.seed) == ("1+1=", 3)


def test_a_prompt_in_another_tokenizer_is_refused():
    """A checkpoint that does not say its tokenizer is known by the size of its vocabulary."""
    save("policy/ckpt.pt", vocab_size=300)
    with pytest.raises(InputError, match="--tokenizer byte has 258 tokens, the model 300"):
        sample.main(["policy", "1+1="])


# -- settings -------------------------------------------------------------------------------------

KEPT = ("algorithm", "optimizer", "step", "log", "before")


def begun(words):
    """A checkpoint as a run with these flags leaves it, as far as settings go."""
    config = parse(words)
    shape = GPTConfig(**{"vocab_size": 258, **config.shape})
    return {**dict.fromkeys(KEPT), "settings": dataclasses.asdict(config),
            "model_config": dataclasses.asdict(shape)}


def test_the_list_of_what_is_kept_is_complete():
    """What the cases below leave out one by one is all that resuming reads."""
    assert set(checkpoint.RESUMED) == {*KEPT, "settings"}


@pytest.mark.parametrize("changed, named", [
    ("", None), ("--learning_rate 0.1", "learning_rate 0.001, this command says 0.1"),
    ("--seed 1", "seed 0, this command says 1"),
    ("--num_generations 3", "num_generations 16, this command says 3"),
    ("--algo ppo", "algo grpo, this command says ppo"),
    ("--eval_problems 3 --logging_steps 2 --save_steps 9 --out_dir x --max_minutes 2", None),
    ("--n_layer 2", None), ("--n_layer 3", "n_layer 2, this command says 3"),
    ("--n_kv_head 4", None), ("--n_kv_head 2", "n_kv_head 4, this command says 2")])
def test_a_run_goes_on_with_its_own_settings(changed, named):
    """Whatever changes the outcome must be the same, the shape too where it is given; how a run is
    watched may change."""
    config, found = parse(changed), begun("")
    if named is None:
        checkpoint.check_same_settings(config, found, "x")
    else:
        with pytest.raises(InputError, match=f"^x was made with --{named}"):
            checkpoint.check_same_settings(config, found, "x")


@pytest.mark.parametrize("lost", [*KEPT, "settings"])
def test_nothing_that_resuming_needs_may_be_missing(lost):
    """The complaint names what is not there, and what the file is good for."""
    found = begun("")
    del found[lost]
    with pytest.raises(InputError, match=f"^x holds a model but no {lost}, and cannot be resumed"):
        checkpoint.check_same_settings(parse(""), found, "x")


def test_settings_that_an_earlier_version_did_not_have():
    """A flag that the checkpoint does not know is no reason to refuse it."""
    @dataclasses.dataclass
    class Later(train.GRPO.Config):
        """a later version"""
        invented: int = flag(1, "new")
    config = Later(**dataclasses.asdict(parse("")))
    checkpoint.check_same_settings(config, begun(""), "x")
