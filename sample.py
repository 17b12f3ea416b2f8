"""
Ask a model, or judge it.

    python sample.py out/chain-grpo-0 "7+5*3="            its greedy answer, then sampled ones
    python sample.py out/chain-grpo-0                     judge it on held-out problems
    python sample.py out/chain-grpo-0 --data other.jsonl  on those of a file
    python sample.py out/chain-grpo-0 --temperature 0.7 --top_p 0.9
    python sample.py out/chain-grpo-0 --export FOLDER     write it as transformers reads it

Task and tokenizer are those of the run that left the checkpoint, unless flags say otherwise.
"""

import argparse
import os
import sys
from dataclasses import dataclass

import torch

import data
from harness import chat, checkpoint, evaluate, export, flags, prepare, report
from harness.errors import InputError, one_line
from harness.flags import flag


@dataclass
class SampleConfig(flags.Machine, flags.Data):
    """sampling"""
    temperature: float = flag(1.0, "of the sampled answers", above=0)
    top_k: int = flag(0, "sample among the k likeliest tokens; 0: all", at_least=0)
    top_p: float = flag(1.0, "sample among the likeliest tokens that make up this mass",
                        above=0, at_most=1)
    num_generations: int = flag(4, "sampled answers to a prompt", at_least=1)
    eval_problems: int = flag(256, "held-out problems to judge by", at_least=1)
    seed: int = flag(0, "of the answers to a prompt", at_least=0, below=2**40)
    micro_batch_size: int = flag(0, "answers per forward pass; 0: as many as is sensible",
                                 at_least=0)
    export: str = flag(None, "write the model into this new folder, as config.json and "
                             "model.safetensors (--dtype), with a published model's tokenizer")
    algo: str = "sample"     # nothing is trained
    inspect: str | None = None

    def columns(self):
        """Any file will do: it is judged by what it has."""
        return [()]


def parse(argv):
    """argv -> the checkpoint, the prompt (None: judge) and the settings."""
    parser = flags.Parser(prog="sample.py", description=__doc__, allow_abbrev=False,
                          usage="python sample.py FOLDER [PROMPT] [flags]",
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a run's folder, or a checkpoint file")
    parser.add_argument("prompt", nargs="?", help="what to answer; none: judge the model")
    flags.add_flags(parser, SampleConfig)
    given = vars(parser.parse_intermixed_args(flags.underscores(argv)))
    found = checkpoint.read(given.pop("folder"))
    prompt, settings = given.pop("prompt"), found.get("settings", {})
    of_the_run = {name: settings[name] for name in flags.declarations(flags.Data)
                  if settings.get(name) is not None}
    if "tokenizer" in found:
        of_the_run["tokenizer"] = found["tokenizer"]
    config = SampleConfig(**{**of_the_run, **given})
    flags.check_bounds(config)
    flags.pick_device(config)
    return found, prompt, config


def main(argv):
    found, prompt, config = parse(argv)
    model = checkpoint.build_model(found, config.device)
    tokenizer = chat.tokenizer_of(config)
    if model.config.scalar_head:
        raise InputError("this is a reward model, which cannot write")
    if model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(f"--tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens, the "
                         f"model {model.config.vocab_size}")
    if config.export:
        source = config.tokenizer if os.path.isdir(config.tokenizer) else None
        export.export(model, source, config.export, getattr(torch, config.dtype))
        print(f"wrote {config.export}: config.json, model.safetensors ({config.dtype}), "
              f"{'and the tokenizer of' if source else 'without the tokenizer'} {config.tokenizer}")
        return 0
    task = prepare.make_task(config, model.config.block_size)
    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    if prompt is None:
        if getattr(task, "understood", ""):
            print(f"{config.data}: {task.understood}")
        found = evaluate.judge_answers(model, None, tokenizer, task, config, full=True, **sampling)
        print(report.table([("now", found)], task))
        return 0
    batch = data.collate([{"prompt": prompt}], tokenizer, config.device)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    ways = (("greedy ", 1, dict(temperature=0)), ("sampled", config.num_generations, sampling))
    for way, n, how in ways:
        samples = model.generate(batch["prompt_ids"], batch["prompt_mask"], task.max_new_tokens,
                                 tokenizer.eos_id, tokenizer.pad_id, n, generator=generator, **how)
        for ids, truncated in zip(samples.completion_ids.tolist(), samples.truncated.tolist()):
            print(f"{way}  {prompt}{tokenizer.decode(ids)}{' ...' if truncated else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(one_line(lambda: main(sys.argv[1:])))
