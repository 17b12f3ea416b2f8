"""What memory holds, part by part: beside what PyTorch keeps; and the advice where there is too
little."""

import re
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import ROOT, run
from harness import evaluate, memory
from harness.errors import InputError
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=300, block_size=256, n_layer=4, n_embd=128, n_head=4, n_kv_head=2,
             n_hidden=512)
QWEN = dict(vocab_size=151936, block_size=512, qkv_bias=True, qk_norm=False, head_dim=0)
SHAPES = {   # as their config.json has them
    "SmolLM2-135M": dict(QWEN, vocab_size=49152, n_layer=30, n_embd=576, n_head=9, n_kv_head=3,
                         n_hidden=1536, qkv_bias=False),
    "Qwen2.5-0.5B": dict(QWEN, n_layer=24, n_embd=896, n_head=14, n_kv_head=2, n_hidden=4864),
    "Qwen2.5-1.5B": dict(QWEN, n_layer=28, n_embd=1536, n_head=12, n_kv_head=2, n_hidden=8960)}


def kept_for_backward(model, bfloat16):
    """The bytes that autograd keeps of 4 rows of 100 + 60 tokens; weights and logits apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)   # else its memory would be used again
        return tensor
    prompt, completion = torch.ones(4, 100).long(), torch.ones(4, 60).long()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model.completion_logits(prompt, prompt == 1, completion, completion == 1)
        logits.log_softmax(-1).sum()
    copies = 2 * (model.num_parameters() - 300 * 128) if bfloat16 else 0
    return sum(seen.values()) - 4 * 4 * 60 * 300 - copies


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_activations_are_what_autograd_keeps(qk_norm, bfloat16):
    """Within a tenth, in both precisions, with norms on q and k and without."""
    config = GPTConfig(**SHAPE, qk_norm=qk_norm)
    kept = kept_for_backward(GPT(config), bfloat16)
    said = memory.parts(config, 4, 100, 60, 4, 2 if bfloat16 else 4)["activations"]
    assert said == pytest.approx(kept, rel=0.1)


def test_parts_by_hand():
    """Weights 4 bytes a parameter, AdamW 8, three tensors of logits, two numbers for each head,
    layer and token of the cache; the cache goes before the backward pass comes."""
    config = GPTConfig(**SHAPE)
    N, found = GPT(config).num_parameters(), memory.parts(config, 4, 100, 60, 32)
    assert (found["weights"], found["reference"], found["gradients"]) == (4 * N, 4 * N, 4 * N)
    assert (found["optimizer"], found["bfloat16 copy"]) == (8 * N, 2 * N)
    assert found["logits"] == 3 * 4 * 4 * 60 * 300
    large = memory.parts(GPTConfig(**dict(SHAPE, vocab_size=150000)), 8, 100, 512, 32)
    assert large["logits"] == 4 * 4 * 2 ** 26   # and not 7 GB
    assert found["cache"] == 2 * 2 * 4 * 2 * 32 * 32 * 160
    assert found["peak"] == 22 * N + max(found["cache"], found["activations"] + found["logits"])
    alone = memory.parts(config, 4, 100, 60, 32, bytes_per_number=4, reference=False)
    assert alone["reference"] == alone["bfloat16 copy"] == 0


@pytest.mark.parametrize("name, count", [("SmolLM2-135M", 134.5e6), ("Qwen2.5-0.5B", 494.0e6),
                                         ("Qwen2.5-1.5B", 1543.7e6)])
def test_shapes_are_the_published_ones(name, count):
    """By their number of parameters."""
    with torch.device("meta"):
        assert GPT(GPTConfig(**SHAPES[name])).num_parameters() == pytest.approx(count, rel=1e-3)


def test_the_table_of_the_document():
    """Every figure of it, in gigabytes, to a tenth."""
    text, found = (ROOT / "PUBLISHED.md").read_text(), 0
    for name, shape in SHAPES.items():
        for rows, *cells in re.findall(rf"\| {name} \| (\d+) \|" + 6 * r" ([\d.]+) \|", text):
            parts = memory.parts(GPTConfig(**shape), int(rows), 200, 300, 64)
            fixed = sum(parts[part] for part in ("weights", "reference", "gradients", "optimizer",
                                                 "bfloat16 copy"))
            expected = [parts["weights"], fixed, parts["activations"], parts["logits"],
                        parts["cache"], parts["peak"]]
            assert [float(cell) for cell in cells] == [round(n / 1e9, 1) for n in expected]
            found += 1
    assert found >= 3


# -- when it runs out -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings, advice", [
    (dict(batch_size=8, num_generations=8, micro_batch_size=0), "--micro_batch_size 16"),
    (dict(batch_size=8, num_generations=8, micro_batch_size=16), "--micro_batch_size 4"),
    (dict(batch_size=32, micro_batch_size=3), "--micro_batch_size 1"),
    (dict(batch_size=8, num_generations=8, micro_batch_size=1), "lower --batch_size"),
])
def test_advice(settings, advice):
    """A quarter of the rows at a time; where there is nothing left to split, something smaller."""
    found = memory.explained(torch.OutOfMemoryError("CUDA out of memory."),
                             SimpleNamespace(**settings))
    assert isinstance(found, InputError) and advice in str(found)


def test_a_run_without_memory_ends_in_one_line(tiny_base, tmp_path, monkeypatch):
    """On a GPU and on a CPU; another error stays what it is."""
    flags = ("--algo", "sft", "--init_from", tiny_base, "--min_terms", 2, "--max_terms", 2,
             "--eval_problems", 2, "--out_dir", tmp_path / "run")
    for error, expected, words in (
            (torch.OutOfMemoryError("CUDA out of memory."), InputError, "--micro_batch_size 8"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
                          "bytes."), InputError, "--micro_batch_size 8"),
            (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
            (NotImplementedError("yours to write"), NotImplementedError, "yours")):
        def fail(*args, error=error):
            raise error
        monkeypatch.setattr(train, "update", fail)
        with pytest.raises(expected, match=words):
            run(*flags)


def test_evaluation_samples_fewer_answers_of_a_large_model():
    """As many as ever of a small one; of 0.5B parameters so many that their cache is half a
    gigabyte."""
    task = SimpleNamespace(max_new_tokens=300)
    small, large = (SimpleNamespace(config=GPTConfig(**shape))
                    for shape in (SHAPE, dict(SHAPES["Qwen2.5-0.5B"], block_size=32768)))
    assert evaluate.at_once(small, task) == evaluate.SAMPLED
    n = evaluate.at_once(large, task)
    cache = memory.parts(large.config, 1, 256, 300, n)["cache"]
    assert 0.45e9 < cache <= 2**29


def test_evaluation_scores_fewer_rows_of_a_large_vocabulary():
    """Unless --micro_batch_size says otherwise: 2^28 logits at a time, a gigabyte."""
    def sizes(vocab_size, rows, T, micro_batch_size=0):
        ones = torch.ones(rows, T).long()
        batch = {"prompt_ids": ones, "prompt_mask": ones == 1, "completion_ids": ones,
                 "completion_mask": ones == 1, "prompt_index": torch.arange(rows)}
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
        config = SimpleNamespace(micro_batch_size=micro_batch_size)
        return [len(part["prompt_ids"]) for part in evaluate.in_parts(batch, model, config)]
    assert sizes(258, 300, 32) == [256, 44]
    assert sizes(151936, 12, 300) == [5, 5, 2] and 5 * 151936 * 300 <= 2**28
    assert sizes(151936, 12, 300, 8) == [8, 4] and sizes(2**20, 2, 300) == [1, 1]
