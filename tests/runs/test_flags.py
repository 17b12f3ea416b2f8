"""
No flag is dead. Each flag of each algorithm, as the parser lists them, is changed from its default,
with the company that it needs to act, and the run must then come out different: in its weights, or
where the table (flag_table.py) says so in what is logged, saved or said. Flags that must not change
a run stand in the table with the reason, and it is checked that they do not. A new flag without an
entry fails. At the end the same for sample.py.

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
from flag_table import (ELSEWHERE, EXCEPTIONS, OWN, REFUSED, SAID, SHARED, Same)
from harness import files, flags, prepare, report
from harness.errors import InputError
from model import GPTConfig
from rm import RMConfig
from runs_helpers import checkpoint, metrics, shorter, write_jsonl
from sft import PretrainConfig

RUN = ("--n_embd=16 --n_layer=1 --n_head=2 --min_terms=2 --max_terms=2 --max_new_tokens=6 "
       "--batch_size=4 --max_steps=3 --warmup_steps=1 --logging_steps=1 --eval_steps=3 "
       "--eval_problems=2 --device=cpu")
SAMPLES = " --num_generations=4 --num_prompts=40"       # of the algorithms that sample answers


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
            samples = SAMPLES * sampling + " --teacher=teacher" * (algo == "distill")
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
        patch.setattr(prepare, "LONG", {"max_steps": 4})
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
    "tokenizer": ["gpt2", "", REFUSED], "export": ["other-base", "", REFUSED],   # it is full
    "template": ["plain", "", REFUSED], "system_prompt": ["x", "", REFUSED],
    "device": ["cuda:77", "", REFUSED],
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
