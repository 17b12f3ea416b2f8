"""
Wrong checkpoints: files of another kind, truncated ones, weights that do not fit, runs that cannot
be resumed. One line names the file or the reason; nothing is run, written or lost.
"""

import os

import pytest
import torch

import sample
import train
from conftest import SHAPE, TASK, run
from harness import checkpoint as checkpoints
from harness.errors import InputError
from runs_helpers import complaint, summary

FAST = (*TASK, "--max_steps", 2, "--batch_size", 4)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_sample(*words):
    return sample.main([str(word) for word in words])


USES = {"judge": lambda path: complaint(run_sample, path, *TASK),
        "ask": lambda path: complaint(run_sample, path, "1+1=", *TASK),
        "start": lambda path: complaint(run, "--algo", "sft", "--init_from", path, *FAST)}


# -- files of another kind ------------------------------------------------------------------------


def nan(content):
    content["model"]["norm.weight"][0] = float("nan")


UNFIT = "do not fit its own shape"
FOREIGN = {
    "a list": (lambda c: [1, 2, 3], "not a checkpoint of this project"),
    "a plain state dict": (lambda c: c["model"], "no 'model' and 'model_config'"),
    "a whole module": (lambda c: torch.nn.Linear(2, 2), "not a checkpoint of this project"),
    "no shape": (lambda c: c.pop("model_config") and None, "no 'model' and 'model_config'"),
    "another shape": (lambda c: c["model_config"].update(n_embd=32), UNFIT),
    "a layer too many": (lambda c: c["model_config"].update(n_layer=2), UNFIT),
    "an unknown setting": (lambda c: c["model_config"].update(n_experts=8), UNFIT),
    "a shape of words": (lambda c: c.update(model_config={"n_embd": "wide"}), UNFIT),
    "a shape that is a list": (lambda c: c.update(model_config=[1, 2]), UNFIT),
    "weights that are a list": (lambda c: c.update(model=[1, 2]), UNFIT),
    "weights that are words": (lambda c: c["model"].update({"norm.weight": "heavy"}), UNFIT),
    "weights that are not numbers": (nan, "finite"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_checkpoints(tiny_base, case, use):
    """A PyTorch file that is not one of ours, or does not hold what it says, is refused for every
    use."""
    change, expected = FOREIGN[case]
    content = torch.load(tiny_base / "ckpt.pt", weights_only=True)
    torch.save(change(content) or content, "bad.pt")
    assert expected in USES[use]("bad.pt")
    assert os.listdir(".") == ["bad.pt"]


def test_another_tokenizer(tiny_base, monkeypatch):
    """A model that was trained on other tokens is not started from, nor asked."""
    content = torch.load(tiny_base / "ckpt.pt", weights_only=True)
    torch.save({**content, "tokenizer": "gpt2"}, "bad.pt")
    assert "was trained with --tokenizer gpt2" in USES["start"]("bad.pt")

    class Words:
        vocab_size = 50304
    monkeypatch.setattr(sample.data, "Tokenizer", lambda name: Words())
    for prompt in ((), ("1+1=",)):
        said = complaint(run_sample, tiny_base, *prompt, "--tokenizer", "gpt2")
        assert "258" in said and "50304" in said and "--tokenizer" in said


@pytest.mark.parametrize("content", [
    b"", b"}", b"PK", b"PK\x03\x04" + bytes(100), b"Lorem ipsum dolor sit amet\n" * 50,
    bytes(range(256)) * 9, b"\x80\x02", b"\x80\x02J1", bytes(4096), b"{\"model\": 1}"],
    ids=lambda content: f"{content[:8]} ({len(content)})")
@pytest.mark.parametrize("use", USES)
def test_files_that_are_no_checkpoints(content, use):
    """Empty, text or binary files are refused by name."""
    with open("bad.pt", "wb") as file:
        file.write(content)
    said = USES[use]("bad.pt")
    assert "bad.pt: not a checkpoint of this project, or a truncated one" in said


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy format"])
def test_truncated_checkpoints(tiny_base, zipped):
    """A checkpoint cut off anywhere is refused."""
    torch.save(torch.load(tiny_base / "ckpt.pt", weights_only=True), "whole.pt",
               _use_new_zipfile_serialization=zipped)
    with open("whole.pt", "rb") as file:
        whole = file.read()
    ends = [*range(1, 60), *range(60, len(whole), len(whole) // 60), len(whole) - 1]
    for length in ends:
        with open("bad.pt", "wb") as file:
            file.write(whole[:length])
        message = "bad.pt: not a checkpoint of this project, or a truncated one"
        with pytest.raises(InputError, match=message):
            checkpoints.read("bad.pt")


@pytest.mark.parametrize("use", USES)
def test_checkpoints_that_are_not_there(use):
    """A path that leads nowhere, a folder without a ckpt.pt, and a ckpt.pt that is a folder."""
    os.makedirs("empty")
    os.makedirs("strange/ckpt.pt")
    inside = os.path.join("empty", "ckpt.pt")
    assert USES[use]("nowhere") == "nowhere: there is no checkpoint there"
    assert USES[use]("empty") == f"{inside}: there is no checkpoint there"
    assert "strange" in USES[use]("strange")
    assert sorted(os.listdir(".")) == ["empty", "strange"]


def test_a_shape_that_is_not_the_checkpoints(tiny_base):
    """A shape flag that contradicts the checkpoint is refused; one that agrees is welcome."""
    said = complaint(run, "--init_from", tiny_base, "--n_embd", 32, "--n_head", 2)
    assert "has n_embd 16, not 32: leave the flag out" in said
    assert run("--algo", "sft", "--init_from", tiny_base, *FAST, *SHAPE) == 0


@pytest.mark.parametrize("use", USES)
def test_a_checkpoint_cannot_run_code(use):
    """A pickle that would write a file when loaded is refused, and the file is not written."""
    class Evil:
        def __reduce__(self):
            return open, ("written", "w")
    torch.save({"model": Evil(), "model_config": {}}, "bad.pt")
    assert "bad.pt: not a checkpoint of this project" in USES[use]("bad.pt")
    assert not os.path.exists("written")


# -- resuming -------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny_base):
    """The flags of an SFT run of 9 steps that stopped after the first, in the folder `run`."""
    flags = ("--algo", "sft", "--init_from", tiny_base, *TASK, "--max_steps", 9, "--batch_size", 4,
             "--out_dir", "run")
    assert run(*flags, "--max_minutes", 1e-6) == 0
    return flags


def files():
    """What is in the run's folder, byte by byte."""
    found = {}
    for name in os.listdir("run"):
        with open(f"run/{name}", "rb") as file:
            found[name] = file.read()
    return found


def change_checkpoint(change):
    content = torch.load("run/ckpt.pt", weights_only=True)
    torch.save(change(content) or content, "run/ckpt.pt")


def test_resume_with_nothing_there(stopped):
    """--resume where no run was says so, makes nothing, and does not fall back on starting anew."""
    for algo in ("sft", "grpo", "pretrain"):
        said = complaint(run, "--algo", algo, *FAST, *SHAPE, "--resume", "--out_dir", "nowhere")
        assert said == f"{os.path.join('nowhere', 'ckpt.pt')}: there is no checkpoint there"
    assert not os.path.exists("nowhere")


@pytest.mark.parametrize("change, named", [
    (("--learning_rate", 0.5), "--learning_rate 0.001"), (("--batch_size", 5), "--batch_size 4"),
    (("--seed", 1), "--seed 0"), (("--max_terms", 3), "--max_terms 2"),
    (("--num_demonstrations", 7), "--num_demonstrations 400"),
    (("--max_steps", 10), "--max_steps 9"), (("--algo", "grpo"), "--algo sft"),
    (("--algo", "dft"), "--algo sft"), (("--n_embd", 32), "--n_embd 16")])
def test_resume_with_other_settings(stopped, change, named):
    """A run is resumed with the settings with which it was begun; the one that differs is named,
    and nothing is touched."""
    before = files()
    assert named in complaint(run, *stopped, *change, "--resume")
    assert files() == before


def test_resume_a_bare_model(stopped):
    """A checkpoint with a model and no optimizer cannot be resumed, and the complaint says what it
    is good for."""
    change_checkpoint(lambda c: {name: c[name] for name in ("model", "model_config")})
    assert "use --init_from run" in complaint(run, *stopped, "--resume")


@pytest.mark.parametrize("lost", ["algorithm", "optimizer", "step", "log", "before", "settings"])
def test_resume_with_something_missing(stopped, lost):
    """A checkpoint that lacks anything that resuming needs is refused."""
    change_checkpoint(lambda c: c.pop(lost) and None)
    said = complaint(run, *stopped, "--resume")
    assert f"no {lost}, and cannot be resumed" in said


@pytest.mark.parametrize("case", FOREIGN)
def test_resume_a_foreign_checkpoint(stopped, case):
    """What cannot be started from cannot be resumed either."""
    change, expected = FOREIGN[case]
    change_checkpoint(change)
    before = files()
    assert expected in complaint(run, *stopped, "--resume")
    assert files() == before


@pytest.mark.parametrize("change", [
    lambda c: c["algorithm"].popitem() and None,
    lambda c: c["algorithm"].update({"ref_model.norm.weight": torch.zeros(3)}),
    lambda c: c.update(algorithm=[1, 2]), lambda c: c.update(optimizer={}),
    lambda c: c["optimizer"]["param_groups"].pop() and None,
    lambda c: c.update(log=None)],
    ids=["a weight missing", "a weight of another shape", "networks that are a list",
         "an empty optimizer", "an optimizer of fewer parameters", "no log"])
def test_resume_what_does_not_fit_the_algorithm(stopped, change):
    """Networks and optimizer that are not those of this run: one line, and nothing is touched."""
    change_checkpoint(change)
    before = files()
    said = complaint(run, *stopped, "--resume")
    assert "run/ckpt.pt" in said and "cannot be resumed" in said
    assert files() == before


def test_resume_a_run_that_only_lacks_its_summary(tiny_base, monkeypatch):
    """A run that was killed between its last checkpoint and its summary makes no further step: the
    weights stay, and the summary says what it would have said."""
    flags = ("--algo", "sft", "--init_from", tiny_base, *FAST, "--out_dir", "run")
    assert run(*flags) == 0
    end = summary("run")
    os.remove("run/summary.json")
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", lambda *args: pytest.fail("a step was made"))
        assert run(*flags, "--resume") == 0
    again = summary("run")
    assert again["steps"] == 2 and "eval/pass@16" in end["after"]
    assert all(again[name] == end[name] for name in ("before", "after", "updates", "steps",
                                                     "trained_tokens"))
