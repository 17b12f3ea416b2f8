"""
How fast is it, and how fast could it be? Times three things and says what share of the machine's
matrix rate each reaches.

    python tests/benchmark.py                          2 layers x 64, as in the main job
    python tests/benchmark.py --layers 4 --width 128
    python tests/benchmark.py --layers 12 --width 768 --batch_size 16 --seq_len 512 \\
                              --device cuda --dtype bfloat16

    pre-training   one step of sft.py on --batch_size random texts of --seq_len tokens
    sampling       generate: 32 prompts x 16 samples x 12 new tokens
    GRPO step      the same samples, a coin-like reward that gives every group a gradient, one
                   update

The matrix rate is that of a large square product, measured here and now; model FLOPs are counted as
in GPT.flops_per_token (a third of it for sampling), prompts once each. Small models cannot reach
the rate: their products are too small. Medians of --repeats; machines are noisy, so compare two
figures of one call, not of two.
"""

import argparse
import pathlib
import sys
import time
from types import SimpleNamespace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train  # noqa: I001  before torch: it asks for large memory pages
import torch

import data
import tasks
from grpo import GRPO
from harness.log import Log
from model import GPT, GPTConfig
from sft import SFT


def parity(prompts, completions, **columns):
    """A coin-like reward: whether the characters add up to an odd number. Different within every
    group."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def median_seconds(f, repeats, device):
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]   # the first two warm up


def read_flags():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 2), ("width", 64), ("prompts", 32), ("num_generations", 16),
                          ("max_new_tokens", 12), ("batch_size", 64), ("seq_len", 32),
                          ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main():
    args = read_flags()
    device, dtype = args.device, getattr(torch, args.dtype)
    machine = dict(device=device, dtype=args.dtype, learning_rate=3e-4, weight_decay=0.0)
    run = SimpleNamespace(log=Log(), check_finite=lambda *values: None)

    torch.manual_seed(0)
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    rate = 2 * n**3 / median_seconds(lambda: a @ a, args.repeats, device)
    print(f"matrix rate {rate / 1e9:,.0f} GFLOP/s ({n} x {n}, {args.dtype}, "
          f"{torch.get_num_threads()} threads)")

    heads = args.width // (32 if args.width <= 128 else 64)
    model = GPT(GPTConfig(n_layer=args.layers, n_embd=args.width, n_head=heads, qk_norm=False,
                          n_hidden=int(args.width * 8 / 3 / 32) * 32,
                          block_size=max(128, args.seq_len + 1))).to(device)
    model.skip_padding = device == "cpu"
    tokenizer, task = data.Tokenizer(), tasks.Countdown(args.max_new_tokens)
    sft = SFT(SFT.Config(completion_only=False, **machine), model, tokenizer, task)
    grpo = GRPO(GRPO.Config(num_generations=args.num_generations, **machine), model, tokenizer,
                task)
    grpo.rewards.functions = {"parity": parity}
    if args.compile:
        model.completion_hidden = torch.compile(model.completion_hidden, dynamic=True)
    print(f"{args.layers} layers x {args.width}: {model.num_parameters():,} parameters")

    def report(name, seconds, tokens, flops):
        print(f"{name:<14}{seconds * 1e3:9.1f} ms{tokens / seconds:14,.0f} tokens/s"
              f"{flops / seconds / rate:9.1%} of the matrix rate")

    texts = ["".join(chr(97 + int(i)) for i in torch.randint(26, (args.seq_len - 1,)))
             for _ in range(args.batch_size)]
    examples = [{"prompt": "", "completion": text} for text in texts]

    def pretrain_step():
        for minibatch in sft.minibatches(sft.sample(examples, None, 0, run.log), run.log):
            train.update(sft, minibatch, run)
    tokens = args.batch_size * args.seq_len
    report("pre-training", median_seconds(pretrain_step, args.repeats, device), tokens,
           tokens * model.flops_per_token(args.seq_len))

    problems = task.problems("train", args.prompts, 0)
    prompts = data.collate([{"prompt": p["prompt"]} for p in problems], tokenizer, device)
    generator = torch.Generator(device).manual_seed(0)

    def sample():
        with data.autocast(grpo.config):
            return model.generate(prompts["prompt_ids"], prompts["prompt_mask"],
                                  args.max_new_tokens, tokenizer.eos_id, tokenizer.pad_id,
                                  args.num_generations, generator=generator)

    def grpo_step():
        log = run.log = Log()
        with data.autocast(grpo.config):
            minibatches = grpo.minibatches(grpo.sample(problems, generator, 0, log), log)
        for minibatch in minibatches:
            train.update(grpo, minibatch, run)
        assert log.line()["frac_reward_zero_std"] == 0, \
            "a group without a gradient: nothing may be won by skipping"
    sampled = int(sample().completion_mask.sum())
    length = prompts["prompt_ids"].shape[1] + args.max_new_tokens
    flops = (sampled + prompts["prompt_ids"].numel()) * model.flops_per_token(length)
    report("sampling", median_seconds(sample, args.repeats, device), sampled, flops / 3)
    report("GRPO step", median_seconds(grpo_step, args.repeats, device), sampled, flops * 4 / 3)


if __name__ == "__main__":
    main()
