"""
--reward confidence: the sampler's own judgement of its answers as the reward of DPO
(self-rewarding, 2401.10020, in the small).
"""

import math

import pytest
import torch

import tasks
import tiny
from dpo import DPO
from grpo import GRPO
from harness import files
from harness.errors import InputError
from harness.log import Log
from ppo import PPO
from rft import RFT
from rm import RM
from tiny import Letters, make, move, read_alone, same

PROMPT = "7+5*3="
# The final part is behind the last of `;` and `=`: bare, worked, empty, nothing at all.
ANSWERS = {"6": "6", "7+5=2;2*3=6": "6", "7+5=2;2*3=": "", "2*3=16": "16", "": "", "7;12": "12"}


def make_judge(**settings):
    """DPO that is rewarded by its sampler, which has moved on from policy and reference."""
    algo = make(DPO, **{"num_generations": 4, "reward": "confidence", **settings})
    move(algo.sampler, 0.3)
    return algo


# -- what the final part is -----------------------------------------------------------------------


@pytest.mark.parametrize("answer, final", ANSWERS.items())
def test_the_final_part_of_a_chain(answer, final):
    """What the verifier looks at: behind the last step's `=`, or the bare answer."""
    assert tasks.Chain.final_part(answer) == final == (tasks.Chain.final_answer(answer) or "")


def test_the_final_part_elsewhere():
    """Countdown: the whole expression. A file: from the last number to the end, or the whole."""
    assert tasks.Countdown.final_part("3*7+5") == "3*7+5"
    final = files.JsonLines.final_part
    assert final("so 3 and 1,234.50 in all.") == "1,234.50 in all." and final("it is -7") == "-7"
    assert final("no idea") == "no idea" and final("") == ""


# -- the judgement --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, dict(micro_batch_size=3)], ids=["whole", "in parts"])
def test_confidence_against_one_pass_per_answer(float64, settings):
    """The log-probabilities of the final part's tokens and of <end>, summed, from one unpadded pass
    over prompt, steps and final part: the sampler's, and not the policy's or the reference's."""
    algo = make_judge(**settings).double()
    found = algo.confidence([PROMPT] * len(ANSWERS), list(ANSWERS), answer=["6"] * len(ANSWERS))
    for name, model in (("sampler", algo.sampler), ("model", algo.model)):
        expected = []
        for answer, final in ANSWERS.items():
            prompt = [16] + Letters().encode(PROMPT + answer[:len(answer) - len(final)])
            logits = read_alone(model, prompt, tokens := Letters().encode(final) + [16])[:-1]
            expected.append(sum(logits.log_softmax(-1)[t, token].item()
                                for t, token in enumerate(tokens)))
        assert same(torch.tensor(found), torch.tensor(expected), 1e-9) == (name == "sampler")
    assert max(found) < 0


def test_a_judge_that_can_be_read_off():
    """After any token the judge writes 6 with probability 1/2, <end> with 1/4, the rest evenly: the
    final part 6 and its <end> are worth log 1/8 after any steps, 66 is log 1/16."""
    algo = make_judge()
    p = torch.full((18,), 1 / 64)
    p[6], p[16] = 1 / 2, 1 / 4
    algo.sampler.head = lambda hidden: p.log().expand(*hidden.shape[:2], 18)
    found = algo.confidence([PROMPT] * 4, ["6", "7+5=2;2*3=6", "66", "7+5="])
    assert found == pytest.approx([math.log(1 / 8)] * 2 + [math.log(1 / 16), math.log(1 / 4)])


def test_answers_are_paired_by_the_judgement():
    """The reward of a batch is the sampler's; of each prompt's answers it believes the chosen one
    most. What the verifier says is logged beside it."""
    algo, log = make_judge(), Log()
    [minibatch] = tiny.minibatches(algo, log=log)
    prompts, answers = zip(*tiny.texts(minibatch))
    judged = algo.confidence(prompts, answers)
    assert same(minibatch["rewards"], torch.tensor(judged), 1e-5)
    assert all(a > b for a, b in zip(judged[0::2], judged[1::2])) and len(judged) == 8
    line = log.line()
    assert line["reward"] == line["rewards/confidence/mean"] < 0 <= line["true_reward"] <= 1


def test_what_is_too_long_is_read_from_its_end():
    """An answer that fills the context is judged with its <end>: the prompt's first token makes
    room. What was broken UTF-8 counts one byte for each that was written."""
    algo, prompt = make_judge(), "1+2*3-4="
    worked = "1+2=3;3*3=9;9-4=" + "5;" * 3 + "5"                   # 1 + 8 + 23 + 1 tokens of 32
    [found] = algo.confidence([prompt], [worked])
    before = Letters().encode(prompt + worked[:-1])
    logprobs = read_alone(algo.sampler, before, [5, 16])[:-1].log_softmax(-1)
    expected = (logprobs[0, 5] + logprobs[1, 16]).item()
    assert len(before) == 32 - 2 and found == pytest.approx(expected, abs=1e-5)

    class Bytes(Letters):
        def encode(self, text):
            return [0] * len(text.encode())
    algo.tokenizer = Bytes()
    broken, marks = algo.confidence(["7=", "7="], ["\ufffd" * 22, "?" * 22])
    assert broken == marks


@pytest.mark.parametrize("Algorithm", [GRPO, PPO, RFT, RM])
def test_only_dpo_judges_itself(Algorithm):
    """The others say so in one line, beside other rewards too."""
    for reward in ("confidence", "verifier,confidence"):
        with pytest.raises(InputError, match="^--reward confidence is for --algo dpo"):
            make(Algorithm, reward=reward)
    make(DPO, reward="verifier,confidence", reward_weights="1,0.1")
