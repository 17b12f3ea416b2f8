"""Rewards, rollouts, pairs and devices: what the algorithms get from data.py and tasks.py, worked
by hand with a sampler whose answers are known."""

import json
from types import SimpleNamespace

import pytest
import torch

import data
from data import Tokenizer
from harness.errors import InputError
from harness.files import JsonLines
from harness.log import Log
from llama import EOS, PAD, PROMPTS, make_model, pad
from model import Samples
from tasks import Chain, Countdown, Rewards, majority

TOKENIZER = Tokenizer("byte")
EXAMPLES = [{"prompt": "7+5=", "answer": "2"}, {"prompt": "1-2*3=", "answer": "7"}]
TEXTS = ["2", "7+5=2", "7", "99"]          # two answers to each: right, right; right, cut off


class Scripted:
    """A sampler that writes TEXTS, the last one without its <end>, and keeps what it was asked."""
    device = torch.device("cpu")

    def generate(self, prompt_ids, prompt_mask, max_new_tokens, eos_id, pad_id, num_generations,
                 temperature, generator):
        self.asked = SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})
        written = [TOKENIZER.encode(text) + [256] for text in TEXTS]
        written[3] = written[3][:-1]
        lengths = torch.tensor([len(ids) for ids in written])
        ids = torch.tensor([ids + [257] * (6 - len(ids)) for ids in written])
        return Samples(ids, torch.arange(6) < lengths[:, None], torch.tensor([False] * 3 + [True]),
                       torch.zeros(4, 6))


def make_algo(names="verifier", weights="", num_generations=2, temperature=1.0):
    """As much of an algorithm as a rollout asks for."""
    task = Chain()
    config = SimpleNamespace(num_generations=num_generations, temperature=temperature)
    return SimpleNamespace(config=config, tokenizer=TOKENIZER, task=task,
                           rewards=Rewards(task, names, weights))


# -- rewards ---------------------------------------------------------------------------------------


def rewards_of(task, names, weights=""):
    rows = [e for e in EXAMPLES for _ in range(2)]
    total, each = Rewards(task, names, weights)(rows, TEXTS)
    return total.tolist(), {name: reward.tolist() for name, reward in each.items()}


def test_the_total_weighs_each_reward():
    """2 x verifier - .5 x format, and each reward as it is; without weights each counts once."""
    total, each = rewards_of(Chain(), "verifier,format", "2,-0.5")
    assert each == {"verifier": [1, 1, 1, 0], "format": [0, 1, 0, 0]}
    assert total == [2, 1.5, 2, 0]
    assert rewards_of(Chain(), "format,verifier")[0] == [1, 2, 1, 0]


def test_the_true_reward_stands_beside_those_that_are_trained():
    """What the verifier says is there unless it is trained on, and never part of the total."""
    total, each = rewards_of(Chain(), "format")
    assert each == {"format": [0, 1, 0, 0], "true_reward": [1, 1, 1, 0]} and total == each["format"]
    assert set(rewards_of(Chain(), "verifier")[1]) == {"verifier"}
    example = {"prompt": "3,5,7>26=", "numbers": [3, 5, 7], "target": 26}
    _, each = Rewards(Countdown(), "brevity")([example] * 2, ["3*7+5", "26"])
    assert each["true_reward"].tolist() == [1, 0]


def test_a_file_without_answers_has_no_true_reward(tmp_path):
    """Of a file's prompts alone nothing is known to be true; with answers it is."""
    path = tmp_path / "lines.jsonl"
    for names in (["prompt"], ["prompt", "answer"]):
        path.write_text("".join(json.dumps({n: e[n] for n in names}) + "\n" for e in EXAMPLES))
        task = JsonLines(path, path, 8)
        _, each = Rewards(task, "brevity")(task.train, ["2", "8"])
        assert ("true_reward" in each) == ("answer" in names)
    assert each["true_reward"].tolist() == [1, 0]


@pytest.mark.parametrize("weights, reason", [
    ("1", "has 1 numbers, --reward 2 names"), ("1,2,3", "has 3 numbers, --reward 2 names"),
    ("1,x", "1,x: numbers separated by commas"), ("1,nan", "numbers separated"),
    ("inf,1", "numbers separated"), ("1,,2", "numbers separated")])
def test_weights_that_do_not_fit_are_refused(weights, reason):
    """As many finite numbers as rewards, or one line that says what is wrong."""
    with pytest.raises(InputError, match=f"--reward_weights.*{reason}"):
        Rewards(Chain(), "verifier,brevity", weights)


def test_the_majority_by_hand():
    """Of 6, 6, 4 the 6; of 1, 2 the first; an answer that cannot be read has no vote, and where
    none can be read none is right. Each prompt by itself."""
    task = SimpleNamespace(final_answer=lambda text: text or None)
    prompts, texts = list("aaabbcccdd"), ["6", "6", "4", "1", "2", "", "", "3", "", ""]
    assert majority(task, prompts, texts) == [1, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    assert majority(task, list("aaaa"), ["9", "5", "5", "7"]) == [0, 1, 1, 0]


# -- rollouts --------------------------------------------------------------------------------------


def test_a_rollout_worked_by_hand():
    """Two answers to each of two prompts: what the sampler is asked, the batch's rows, their
    rewards and the sums for the log, all of them known."""
    model, generator, log = Scripted(), torch.Generator(), Log()
    algo = make_algo("brevity,format", "0,1", temperature=0.7)
    batch = data.rollout(model, algo, EXAMPLES, generator, log)
    asked = model.asked
    assert asked.prompt_ids.tolist() == [[257, 257, 256, *b"7+5="], [256, *b"1-2*3="]]
    assert asked.prompt_mask.int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    assert (asked.max_new_tokens, asked.eos_id, asked.pad_id) == (22, 256, 257)
    assert (asked.num_generations, asked.temperature) == (2, 0.7) and asked.generator is generator
    assert torch.equal(batch["prompt_ids"], asked.prompt_ids)
    assert torch.equal(batch["prompt_mask"], asked.prompt_mask)
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1]
    rows = zip(batch["completion_ids"], batch["completion_mask"])
    assert [TOKENIZER.decode(ids[mask].tolist()) for ids, mask in rows] == TEXTS
    assert batch["completion_mask"].sum(-1).tolist() == [2, 6, 2, 2]
    assert batch["rewards"].tolist() == [0, 1, 0, 0]
    assert batch["rewards/format"].tolist() == [0, 1, 0, 0]            # and each by itself
    assert batch["rewards/brevity"].tolist() == pytest.approx([-1 / 22, -5 / 22, -1 / 22, -2 / 22])
    assert batch["truncated"].tolist() == [False, False, False, True]
    assert log.totals == {"sampled_tokens": 12}
    assert log.means == {
        "reward": (1, 4), "completions/mean_length": (12, 4), "completions/clipped_ratio": (1, 4),
        "rewards/brevity/mean": (pytest.approx(-9 / 22), 4), "rewards/format/mean": (1, 4),
        "true_reward": (3, 4)}


def test_a_rollout_asks_for_what_the_config_says():
    """Unless told otherwise, be it a temperature of 0; and without a log it keeps none."""
    model, algo = Scripted(), make_algo(num_generations=1, temperature=0.6)
    four = [{"prompt": "7+5=", "answer": "2"}] * 4
    batch = data.rollout(model, algo, four, None, None)
    assert (model.asked.num_generations, model.asked.temperature) == (1, 0.6)
    assert model.asked.generator is None
    assert batch["prompt_index"].tolist() == [0, 1, 2, 3]
    batch = data.rollout(model, algo, four[:2], None, None, 2, temperature=0)
    assert (model.asked.num_generations, model.asked.temperature) == (2, 0)
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1]


# -- pairs -----------------------------------------------------------------------------------------


def test_a_pair_of_each_group_by_hand():
    """The best answer with the largest uniform against the worse one with the largest uniform;
    best_worst: against the worst. The second group has no contrast; what is not accepted takes no
    part."""
    rewards = torch.tensor([[1, 0, .5, 1, 0], [1, 1, 1, 1, 1], [0, 0, .5, 0, 0]])
    uniforms = torch.tensor([[.1, .2, .9, .3, .8], [.5, .4, .3, .2, .1], [.9, .2, 0, .3, .4]])
    assert data.choose_pairs(rewards, uniforms).tolist() == [3, 2, 12, 10]
    assert data.choose_pairs(rewards, uniforms, "best_worst").tolist() == [3, 4, 12, 10]
    accepted = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 1]]).bool()
    assert data.choose_pairs(rewards, uniforms, accepted=accepted).tolist() == [0, 1]
    right = rewards[:1] == 1
    assert data.choose_pairs(rewards[:1], uniforms[:1], accepted=right).tolist() == []
    zeros = torch.zeros(3, 5)                              # uniforms of 0 are like any other
    assert data.choose_pairs(rewards, zeros).tolist() == [0, 1, 12, 10]


def test_preference_pairs_by_hand():
    """Chosen, rejected, chosen, ... with the prompt of their line; equal answers are counted and
    left out; where there is nothing else the batch is empty."""
    pairs = [{"prompt": p, "chosen": c, "rejected": r}
             for p, c, r in (("a", "1", "22"), ("b", "x", "x"), ("cc", "", "4"))]
    log = Log()
    batch = data.collate_pairs(pairs, TOKENIZER, log)
    assert batch["prompt_ids"].tolist() == [[257, 256, 97]] * 2 + [[256, 99, 99]] * 2
    assert batch["completion_ids"].tolist() == [[49, 256, 257], [50, 50, 256],
                                                [256, 257, 257], [52, 256, 257]]
    assert batch["label"].tolist() == [True, False, True, False]
    assert log.means == {"skipped_pairs": (1, 3)}
    log = Log()
    batch = data.collate_pairs(pairs[1:2], TOKENIZER, log)
    assert {len(tensor) for tensor in batch.values()} == {0}
    assert log.means == {"skipped_pairs": (1, 1)}


# -- devices and types -----------------------------------------------------------------------------


def test_tensors_are_made_where_the_data_is():
    """With torch's default device set to one that holds no numbers, `meta`, any tensor made without
    naming a device would be there, and of no use: nothing in data.py or model.py makes one."""
    model, (ids, mask) = make_model(), pad(PROMPTS, "left")
    completions = pad([[3, 6], [1, 2], [4, 6], [1, 6], [2, 6], [5, 6]], "right")
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    batch = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": completions[0],
             "completion_mask": completions[1], "prompt_index": owner}
    rewards, uniforms = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[.5, .5]] * 3)
    config = SimpleNamespace(device="cpu", dtype="float32", micro_batch_size=2)
    with torch.device("meta"):
        samples = model.generate(ids, mask, 4, EOS, PAD, 2)
        logits = [model.completion_logits(ids, mask, *completions, owner), model(ids),
                  model.completion_logits(ids, mask, *(c[::2] for c in completions))]
        rows = data.choose_pairs(rewards, uniforms)
        parts = data.split(batch, 2)
        lengths = data.in_micro_batches(lambda b: b["completion_mask"].sum(-1), batch, config)
    made = [*samples, *logits, rows, lengths, *(t for part in parts for t in part.values())]
    assert {t.device.type for t in made} == {"cpu"} and len(parts) == 3


def test_batches_are_made_on_the_device_that_is_asked_for():
    """collate, preference pairs and rollouts put all their tensors on the given device."""
    pairs = [{"prompt": "a", "chosen": "1", "rejected": "2", "completion": "3"}]
    there = data.collate_pairs(pairs, TOKENIZER, Log(), "meta")
    for batch, device, fields in ((data.collate(pairs, TOKENIZER, "meta"), "meta", 5),
                                  (there, "meta", 6), (data.collate(pairs, TOKENIZER), "cpu", 5)):
        assert len(batch) == fields and {t.device.type for t in batch.values()} == {device}
    model = Scripted()
    model.device = torch.device("meta")
    batch = data.rollout(model, make_algo(), EXAMPLES, None, Log())
    for name in ("prompt_ids", "prompt_mask", "prompt_index", "rewards"):
        assert batch[name].device.type == "meta", name


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_decides_what_matrix_products_are_made_in(device, dtype):
    """--dtype bfloat16 makes products in bfloat16, float32 leaves them alone; the number of a
    device is no part of its kind."""
    linear, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with data.autocast(SimpleNamespace(device=device, dtype=dtype)):
        assert linear(x).dtype == getattr(torch, dtype)
    assert linear(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*CUDA")               # it may not be there
def test_on_a_gpu_autocast_is_bfloat16_too():
    """Torch's own choice there would be float16, whose gradients need scaling."""
    config = SimpleNamespace(device="cuda", dtype="bfloat16")
    assert data.autocast(config).fast_dtype == torch.bfloat16
