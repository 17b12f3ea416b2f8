"""
The text: tokenizer, tasks, files and batches. Nothing here knows an algorithm, and nothing is downloaded.

A task is prompts, a reward, demonstrations, a pre-training corpus and splits:

    chain      7+5*3=      worked out from left to right, modulo 10; answered bare, `6`, or in steps, `7+5=2;2*3=6`
    countdown  3,5,7>26=   reach the target with each number once: `3*7+5`; many right answers

Problems are split by a hash of the problem itself, so that whatever draws them, pre-training, demonstrations or RL, and
with whatever seed, no problem of the test split is ever seen, not even as a step of a longer one.
A third split, `ood`, holds a kind of problem that the pre-training corpus contains and that
post-training never sees.

One example, worked through (byte tokenizer; <end> is 256, <pad> is 257):

    example              {"prompt": "7+5=", "completion": "2"}          and  {"prompt": "1-2*3=", "completion": "7"}
    prompt_ids           [[257, 257, 256, 55, 43, 53, 61],              every prompt starts with <end>, the mark between
                          [256, 49, 45, 50, 42, 51, 61]]                documents, and is padded on the left
    prompt_mask          [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    completion_ids       [[50, 256], [55, 256]]                         every completion ends with <end>
    completion_mask      [[1, 1], [1, 1]]                               what is trained: the answer and its <end>

Prompt and completion are encoded apart, so the boundary between them is always a boundary between tokens.
"""

import functools
import itertools
import json
import math
import random
import re
import zlib
from collections import Counter
from fractions import Fraction

import tiktoken
import torch

from model import InputError

# -- tokenizer ------------------------------------------------------------------------------------------------------


class Tokenizer:
    """A tiktoken.Encoding with two special tokens: <end> before and after every document, <pad> for padding."""

    def __init__(self, name="byte"):
        """`byte`: one token a byte, built here, any UTF-8 text. `gpt2`: tiktoken's own, downloaded on first use.
        Raises InputError when gpt2 cannot be downloaded or the name is neither."""
        if name == "byte":
            self.encoding = tiktoken.Encoding(
                "byte", pat_str=r"(?s:.)", mergeable_ranks={bytes([b]): b for b in range(256)},
                special_tokens={"<end>": 256, "<pad>": 257})
            self.eos_id, self.pad_id, self.vocab_size = 256, 257, 258
        elif name == "gpt2":
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:   # requests' own errors, none of which tiktoken documents
                raise InputError("the gpt2 tokenizer is not on this machine and could not be downloaded "
                                 f"({type(error).__name__}): go online once, or use --tokenizer byte") from None
            self.eos_id = self.encoding.eot_token
            self.pad_id, self.vocab_size = 50257, 50304   # padding beside the 50,257 tokens; a round number of rows
        else:
            raise InputError(f"--tokenizer {name} is unknown: use byte or gpt2")

    def encode(self, text):
        """Token ids of the text alone; "<end>" written in a text is six ordinary characters, never the token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Text of the ids up to the first <end>, special tokens left out; broken UTF-8 becomes U+FFFD."""
        ids = list(ids)
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.encoding.decode([i for i in ids if i < self.encoding.n_vocab and i != self.pad_id], errors="replace")


# -- tasks ----------------------------------------------------------------------------------------------------------


def is_test(problem):
    """Whether a problem belongs to the test split: one in ten, by a hash of its text that no seed can change."""
    return zlib.crc32(problem.encode(errors="surrogatepass")) % 10 == 0


class Chain:
    """Arithmetic from left to right, modulo 10: `7+5*3=` is (7+5)*3 = 2*3 = 6.

    The right answer can be blurted out, `6`, or worked out, `7+5=2;2*3=6`; the reward looks at the last number alone.
    A small transformer has no hope of doing three steps in its head, so that bare answers are right about one time in
    five, and every one of the steps is easy. The corpus is a textbook, in which everything is worked out, followed by
    everyday text, in which most answers are bare. Pre-training on the two in this order gives a base model that can
    work things out and seldom does: what reinforcement learning is good at changing.

    `ood` problems contain `>`, the larger of two digits: `7+5>3=`. One document in fourteen has it, post-training none.
    They measure whether a way of post-training carries the new habit over to them or overwrites what was known of them.
    """
    name, columns, learned_reward = "chain", ("answer",), None
    operators, ood_operator = "+-*", ">"

    def __init__(self, min_terms=3, max_terms=4):
        if not 2 <= min_terms <= max_terms:
            raise InputError(f"min_terms {min_terms} and max_terms {max_terms}: 2 <= min_terms <= max_terms is needed")
        self.min_terms, self.max_terms = min_terms, max_terms
        self.max_new_tokens = 6 * (max_terms - 1) + 4      # the longest worked answer, its <end>, and a little room

    def problem(self, rng, split):
        """One random problem of the split as {"prompt", "answer", "steps"}."""
        while True:
            terms = [str(rng.randrange(10)) for _ in range(rng.randint(self.min_terms, self.max_terms))]
            symbols = self.operators + (self.ood_operator if split.startswith("ood") else "")
            prompt = terms[0] + "".join(rng.choice(symbols) + term for term in terms[1:]) + "="
            is_ood, held_out = self.ood_operator in prompt, self.is_held_out(prompt)
            if is_ood == split.startswith("ood") and held_out == (split in ("test", "ood")):
                return {"prompt": prompt, **self.solve(prompt)}

    def is_held_out(self, prompt):
        """Whether a problem is a test problem or has one for a step: where there are problems of
        two terms as well, the step `2*3=6` of a longer one gives the problem `2*3=` away."""
        steps = self.solve(prompt)["steps"].split(";") if self.min_terms == 2 else []
        return is_test(prompt) or any(is_test(step[:-1]) for step in steps)    # without the result

    @staticmethod
    def solve(prompt):
        """`7+5*3=` -> {"answer": "6", "steps": "7+5=2;2*3=6"}."""
        total, steps = int(prompt[0]), []
        for symbol, digit in zip(prompt[1:-1:2], map(int, prompt[2:-1:2])):
            result = {"+": total + digit, "-": total - digit, "*": total * digit, ">": max(total, digit)}[symbol] % 10
            steps.append(f"{total}{symbol}{digit}={result}")
            total = result
        return {"answer": str(total), "steps": ";".join(steps)}

    def demonstration(self, rng):
        problem = self.problem(rng, "train")
        return {"prompt": problem["prompt"], "completion": problem["steps"], "answer": problem["answer"]}

    def corpus(self, size, seed):
        """`size` documents to be read in this order: three fifths textbook, then everyday text (30 % worked)."""
        rng = random.Random(f"chain corpus {seed}")
        documents = []
        for i in range(size):
            problem = self.problem(rng, "ood-train" if rng.random() < 0.07 else "train")
            worked = i < 0.6 * size or rng.random() < 0.3
            documents.append(problem["prompt"] + (problem["steps"] if worked else problem["answer"]))
        return documents

    @staticmethod
    def reward(prompts, completions, /, answer, **columns):
        """1.0 where the completion's last `;` and `=` are followed by the answer and nothing else. -> list of floats"""
        return [float(Chain.final_answer(c) == a) for c, a in zip(completions, answer)]

    @staticmethod
    def final_answer(completion):
        return re.split("[;=]", completion)[-1] or None

    @staticmethod
    def is_worked(prompt, completion):
        return "=" in completion

    def chance(self, k):
        """pass@k of guessing one of the ten digits: .10, .34, .81 for k = 1, 4, 16."""
        return 1 - 0.9 ** k


class Countdown:
    """Reach a target with three digits, each used exactly once: `3,5,7>26=` is answered by `3*7+5` or `5+7*3`.

    Many answers are right, and any is rewarded. A completion is parsed by `value` below; nothing is ever handed to eval.
    `ood` problems have targets above 40, which the corpus contains and post-training never sees.

    There are few problems: 1,215 distinct ones in the training split and 114 in the test split; out
    of distribution 206 for the corpus and 20 in the `ood` split. By default RL draws 4,000 training
    problems, 1,070 of them distinct at seed 0, and a run is judged by 256, of them 87 distinct.
    """
    name, columns, learned_reward = "countdown", ("numbers", "target"), None
    max_new_tokens = 12
    is_worked = None                                       # there are no steps to show

    def problem(self, rng, split):
        """One random problem of the split as {"prompt", "numbers", "target", "solution"}."""
        while True:
            numbers = sorted(rng.randint(1, 9) for _ in range(3))
            solution = self.random_expression(rng, numbers)
            target = value(solution)
            if target is None or target.denominator != 1 or not 1 <= target <= 99:
                continue
            prompt = ",".join(map(str, numbers)) + f">{target}="
            if (target > 40) == split.startswith("ood") and is_test(prompt) == (split in ("test", "ood")):
                return {"prompt": prompt, "numbers": numbers, "target": int(target), "solution": solution}

    @staticmethod
    def random_expression(rng, numbers):
        a, b, c = rng.sample(numbers, 3)
        return f"{a}{rng.choice('+-*/')}{b}{rng.choice('+-*/')}{c}"

    def demonstration(self, rng):
        problem = self.problem(rng, "train")
        return {**problem, "completion": problem["solution"]}

    def corpus(self, size, seed):
        rng = random.Random(f"countdown corpus {seed}")
        problems = (self.problem(rng, "ood-train" if rng.random() < 0.25 else "train") for _ in range(size))
        return [p["prompt"] + p["solution"] for p in problems]

    @staticmethod
    def reward(prompts, completions, /, numbers, target, **columns):
        """1.0 where the completion uses exactly the given numbers and its value is the target. -> list of floats"""
        return [float(value(c) == t and sorted(map(int, re.findall(r"\d+", c))) == sorted(n))
                for c, n, t in zip(completions, numbers, target)]

    @staticmethod
    def final_answer(completion):
        return value(completion)

    @staticmethod
    @functools.cache
    def values(numbers):
        """{value: how many of the 6 x 16 equally likely outcomes of random_expression have it}"""
        outcomes = itertools.product(itertools.permutations(numbers), "+-*/", "+-*/")
        return Counter(value(f"{a}{x}{b}{y}{c}") for (a, b, c), x, y in outcomes)

    def chance(self, k, size=256):
        """pass@k of writing down random expressions of the right numbers, on the first `size` test
        problems: .072, .248, .621 for k = 1, 4, 16. The share of right expressions is counted out,
        because 1 - (1 - p)^k of an estimated p is biased."""
        total = 0.0
        for problem in problems(self, "test", size, seed=0):
            p = self.values(tuple(problem["numbers"]))[problem["target"]] / 96
            total += 1 - (1 - p) ** k
        return total / size


def value(expression):
    """The exact value of an arithmetic expression as a Fraction, or None where it is malformed or divides by zero.

    A recursive-descent parser: sum = product {(+|-) product}, product = atom {(*|/) atom}, atom = number | ( sum ).
    `3*7+5` -> 26, `7/2` -> 7/2, `3*(7` -> None, `1/0` -> None.
    """
    if len(expression) > 100 or not re.fullmatch(r"[\d+\-*/()]+", expression, re.ASCII):
        return None                                        # the length also bounds the depth of the recursion
    tokens = re.findall(r"\d+|[+\-*/()]", expression) + ["end"]

    def total():
        result = product()
        while tokens[0] in "+-":
            result = result + product() if tokens.pop(0) == "+" else result - product()
        return result

    def product():
        result = atom()
        while tokens[0] in "*/":
            result = result * atom() if tokens.pop(0) == "*" else result / atom()
        return result

    def atom():
        token = tokens.pop(0)
        if token == "(":
            result = total()
            if tokens.pop(0) != ")":
                raise SyntaxError
            return result
        if not token.isdigit():
            raise SyntaxError
        return Fraction(int(token))

    try:
        result = total()
        return result if tokens == ["end"] else None
    except (SyntaxError, IndexError, ZeroDivisionError):
        return None


WHERE = "<where>"    # the name of a column that no file has: where a row was read, `my.jsonl, line 3`
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text):
    """The last number written in a text, or None: `so 1,234.50 in all.` -> Fraction(2469, 2), `#### 42` -> 42."""
    found = NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found and len(found[-1]) < 1000 else None


class JsonLines:
    """A file of one JSON object a line, with the field's columns: `text`; or `prompt` and, as the algorithm asks,
    `completion`, `chosen` and `rejected`, `label`, `answer`; further columns reach the reward function by name.

    Where `eval_path` is not given, one line in ten is held out by the hash of its prompt.
    """
    is_worked = learned_reward = None

    def __init__(self, path, eval_path=None, max_new_tokens=32):
        self.name = self.name_of(path)
        self.path, self.max_new_tokens = path, max_new_tokens
        rows = read_jsonl(path)
        held_out = [is_test(str(row.get("prompt", row.get("text")))) for row in rows]
        self.train = rows if eval_path else [row for row, test in zip(rows, held_out) if not test]
        self.test = read_jsonl(eval_path) if eval_path else [row for row, test in zip(rows, held_out) if test]
        if not self.train:
            raise InputError(f"{path}: no line is left to train on once one in ten is held out; give --eval_data as well")
        common = set.intersection(*(set(row) for row in rows + self.test))
        self.columns = tuple(sorted(common - {"prompt", "completion", "text", WHERE}))

    @staticmethod
    def name_of(path):
        """The name of a file's runs: `my/gsm8k train.jsonl` -> `gsm8k-train`."""
        return re.sub(r"\W+", "-", re.split(r"[/\\]", str(path))[-1].removesuffix(".jsonl")) or "data"

    def require(self, *columns, rows=None, room=None, tokenizer=None, block_size=None):
        """Raise InputError, naming file, line and reason, for the first line (of `rows`, if given)
        that lacks one of the columns or whose tokens, with `room` more to be sampled and the two
        <end>s around them, exceed block_size."""
        for row in self.train + self.test if rows is None else rows:
            where = row[WHERE]
            missing = [c for c in columns if c not in row]
            if missing:
                raise InputError(f"{where}: no column {missing[0]!r}, which this algorithm needs "
                                 f"(the line has {', '.join(sorted(set(row) - {WHERE})) or 'none'})")
            if any(not isinstance(row[c], str) for c in columns if c != "label"):
                raise InputError(f"{where}: column {next(c for c in columns if not isinstance(row[c], str))!r} is not text")
            if "label" in columns and row["label"] not in (True, False):
                raise InputError(f"{where}: column 'label' is neither true nor false")
            if tokenizer is not None:
                tokens = {c: len(tokenizer.encode(row[c])) for c in columns if c not in ("label", "answer")}
                longest = max((n for c, n in tokens.items() if c != "prompt"), default=0)      # of chosen and rejected
                used = tokens.get("prompt", 0) + longest + (room if room is not None else 1) + 1
                if used > block_size:
                    raise InputError(f"{where}: {used} tokens do not fit --block_size {block_size}"
                                     + (f" ({room} of them for --max_new_tokens)" if room is not None else ""))

    @staticmethod
    def reward(prompts, completions, /, answer, **columns):
        """1.0 where the completion's last number equals the answer's last number, as in GSM8K. -> list of floats"""
        return [float(last_number(c) is not None and last_number(c) == last_number(str(a)))
                for c, a in zip(completions, answer)]

    @staticmethod
    def final_answer(completion):
        return last_number(completion)

    def chance(self, k):
        return None                             # what guessing earns on a user's file is unknown


def read_jsonl(path):
    """The objects of a .jsonl file, each with its place under the name WHERE. Raises InputError naming file, line and reason."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:   # ValueError: not JSON, or a number of thousands of digits
            reason = getattr(error, "msg", "nested too deeply, or a number too long")
            raise InputError(f"{path}, line {number}: not JSON ({reason})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object is needed, this is a {type(row).__name__}")
        rows.append({**row, WHERE: f"{path}, line {number}"})
    if not rows:
        raise InputError(f"{path}: the file is empty; it needs one JSON object a line")
    return rows


# -- examples: what an algorithm trains on, a list of dicts -----------------------------------------------------------


def documents(task, size, seed):
    """Pre-training examples: whole texts. The prompt is empty, so every token of the text is trained."""
    if isinstance(task, JsonLines):
        texts = [row["text"] if "text" in row else row["prompt"] + row["completion"] for row in task.train]
    else:
        texts = task.corpus(size, seed)
    return [{"prompt": "", "completion": text} for text in texts]


def demonstrations(task, size, seed):
    """SFT examples: prompts, each with a good completion. A file's own lines, or `size` of the task's, fixed by the seed."""
    if isinstance(task, JsonLines):
        return [row if "completion" in row else {"prompt": "", "completion": row["text"]} for row in task.train]
    rng = random.Random(f"{task.name} demonstrations {seed}")
    return [task.demonstration(rng) for _ in range(size)]


def problems(task, split, size, seed):
    """RL and evaluation examples: prompts with the columns that the reward function takes. `test` and `ood` are the
    same whatever the seed, so that every run is judged by the same problems."""
    if isinstance(task, JsonLines):
        rows = {"train": task.train, "test": task.test, "ood": []}[split]
        return rows if split == "train" else rows[:size]
    rng = random.Random(f"{task.name} {split} {seed if split == 'train' else ''}")
    return [task.problem(rng, split) for _ in range(size)]


def batch_indices(size, batch_size, step, seed, shuffle=True):
    """Which examples step number `step` (from 0) takes: every example once an epoch, in an order drawn anew each epoch.

    A pure function of its arguments: a run that resumes at a step needs no other record of its position in the data.
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, size)
        if not indices or i == 0:
            order = list(range(size))
            if shuffle:
                random.Random(f"order {seed} {epoch}").shuffle(order)
        indices.append(order[i])
    return indices


# -- rewards ----------------------------------------------------------------------------------------------------------


def brevity(prompts, completions, max_new_tokens):
    """Minus the share of the allowed length that was used, in characters: 0 for nothing, -1 for all of it."""
    return [-len(c) / max_new_tokens for c in completions]


def majority(task, prompts, completions):
    """1.0 where the final answer is the commonest one among the batch's answers to the same prompt: no label is needed
    (self-consistency, 2203.11171; as a reward, TTRL, 2504.16084). `6 6 4` -> [1, 1, 0]; of equally common ones, the first."""
    votes = {}
    for prompt, completion in zip(prompts, completions):
        votes.setdefault(prompt, []).append(task.final_answer(completion))
    votes = {prompt: [a for a in answers if a is not None] for prompt, answers in votes.items()}   # None: no answer
    winners = {prompt: max(answers, key=answers.count) for prompt, answers in votes.items() if answers}
    return [float(p in winners and task.final_answer(c) == winners[p]) for p, c in zip(prompts, completions)]


def reward_functions(task, names):
    """{name: function} for a comma-separated list: `verifier` (the task's own), `model` (learned,
    see rm.py), `majority`, `format` (shows its steps), `brevity`. Each has the signature
    reward(prompts, completions, /, **columns) -> list[float]; because of the slash a file's column
    may have any name, even `prompts`."""
    known = {"verifier": task.reward, "majority": lambda p, c, /, **columns: majority(task, p, c),
             "brevity": lambda p, c, /, **columns: brevity(p, c, task.max_new_tokens)}
    if task.is_worked:
        known["format"] = lambda p, c, /, **columns: [float(x) for x in map(task.is_worked, p, c)]
    if task.learned_reward:
        known["model"] = task.learned_reward
    for name in names.split(","):
        if name not in known:
            raise InputError(f"--reward {name} is unknown for {task.name}: use one or more of {', '.join(known)}")
    return {name: known[name] for name in names.split(",")}


class Rewards:
    """The weighted sum of reward functions: names `verifier,brevity` and weights `1,0.2`; no weights: 1 each."""

    def __init__(self, task, names, weights=""):
        self.task, self.functions = task, reward_functions(task, names)
        weights = weights or ",".join("1" for _ in self.functions)
        try:
            self.weights = [float(w) for w in weights.split(",")]
        except ValueError:
            self.weights = [math.nan]
        if not all(map(math.isfinite, self.weights)):
            raise InputError(f"--reward_weights {weights}: numbers separated by commas are needed")
        if len(self.weights) != len(self.functions):
            raise InputError(f"--reward_weights has {len(self.weights)} numbers, --reward {len(self.functions)} names")

    def __call__(self, examples, completions):
        """Examples and completions, one a row -> the total (B,) and each reward by name {name: (B,)}. What the verifier
        says is always among them; where it is not trained on, as true_reward: over-optimisation shows in the gap."""
        columns = {name: [e[name] for e in examples] for name in self.task.columns}
        prompts = [e["prompt"] for e in examples]
        each = {name: torch.tensor(f(prompts, completions, **columns)) for name, f in self.functions.items()}
        total = sum(w * r for w, r in zip(self.weights, each.values()))
        if "verifier" not in each and not (isinstance(self.task, JsonLines) and "answer" not in columns):
            each["true_reward"] = torch.tensor(self.task.reward(prompts, completions, **columns))
        return total, each


# -- answers of a policy's own ----------------------------------------------------------------------------------------


def rollout(model, tokenizer, task, rewards, examples, num_generations=1, temperature=1.0, generator=None):
    """Sample num_generations answers to every example's prompt and judge them by `rewards`, a Rewards.

    Returns a batch as collate makes it, its B rows in groups, example by example, with two more fields, rewards (B,) and
    truncated (B,), and {name: (sum, count)} for the log.
    """
    prompts = collate([{"prompt": e["prompt"]} for e in examples], tokenizer, model.device)
    samples = model.generate(prompts["prompt_ids"], prompts["prompt_mask"], task.max_new_tokens, tokenizer.eos_id,
                             tokenizer.pad_id, num_generations, temperature, generator=generator)
    texts = [tokenizer.decode(ids) for ids in samples.completion_ids.tolist()]
    total, each = rewards([e for e in examples for _ in range(num_generations)], texts)
    lengths = samples.completion_mask.sum(-1)                                             # (B,)
    metrics = {"reward": (total.sum(), len(total)), "completions/mean_length": (lengths.sum(), len(lengths)),
               "completions/clipped_ratio": (samples.truncated.sum(), len(lengths)), "sampled_tokens": lengths.sum()}
    for name, reward in each.items():
        metrics[name if name == "true_reward" else f"rewards/{name}/mean"] = (reward.sum(), len(reward))
    prompt_index = torch.arange(len(examples), device=model.device).repeat_interleave(num_generations)
    return {**prompts, "completion_ids": samples.completion_ids, "completion_mask": samples.completion_mask,
            "prompt_index": prompt_index, "rewards": total.to(model.device), "truncated": samples.truncated}, metrics


def choose_pairs(rewards, uniforms, pair_selection="random", accepted=None):
    """One preference pair of each group. rewards, uniforms (P, G) -> rows (2 N,) chosen, rejected, chosen, ... and how many
    groups have no contrast and so no pair.

    random: any of the best-rewarded against any that is worth less (right against wrong). best_worst: the extremes.
    `uniforms` are the lots; `accepted` (P, G) restricts the choice. Worked example: rewards [1, 0, 1, 0] give random one
    of the rows (0, 1), (0, 3), (2, 1), (2, 3); [1, 1, 1, 1] give none.
    """
    accepted = torch.ones_like(rewards, dtype=torch.bool) if accepted is None else accepted
    best = rewards.masked_fill(~accepted, -math.inf).max(1, keepdim=True).values
    worst = rewards.masked_fill(~accepted, math.inf).min(1, keepdim=True).values
    losers = (rewards == worst) if pair_selection == "best_worst" else (rewards < best)
    chosen = uniforms.masked_fill(~(accepted & (rewards == best)), -1).argmax(1)          # (P,)
    rejected = uniforms.masked_fill(~(accepted & losers), -1).argmax(1)
    contrast = (best > worst).squeeze(1)                                                  # (P,)
    first = torch.arange(0, rewards.numel(), rewards.shape[1], device=rewards.device)     # first row of each group
    return torch.stack([first + chosen, first + rejected], dim=1)[contrast].flatten(), int((~contrast).sum())


def preference_pairs(examples, tokenizer, device="cpu"):
    """A file's preferences as a batch in rows chosen, rejected, chosen, ...; pairs of equal answers are counted and skipped."""
    different = [e for e in examples if e["chosen"] != e["rejected"]]
    rows = [{"prompt": e["prompt"], "completion": e[name]} for e in different for name in ("chosen", "rejected")]
    metrics = {"skipped_pairs": (len(examples) - len(different), len(examples))}
    return collate(rows, tokenizer, device) if rows else None, metrics


# -- batches: dicts of tensors ----------------------------------------------------------------------------------------


def collate(examples, tokenizer, device="cpu"):
    """Examples -> {prompt_ids, prompt_mask (P, Tp)} and, where they have completions, {completion_ids, completion_mask
    (B, T), prompt_index (B,)} with B = P. The docstring of this file works one through."""
    prompts = [[tokenizer.eos_id] + tokenizer.encode(e["prompt"]) for e in examples]
    width = max(map(len, prompts))
    batch = {"prompt_ids": [[tokenizer.pad_id] * (width - len(p)) + p for p in prompts],
             "prompt_mask": [[False] * (width - len(p)) + [True] * len(p) for p in prompts]}
    if "completion" in examples[0]:
        completions = [tokenizer.encode(e["completion"]) + [tokenizer.eos_id] for e in examples]
        width = max(map(len, completions))
        batch["completion_ids"] = [c + [tokenizer.pad_id] * (width - len(c)) for c in completions]
        batch["completion_mask"] = [[True] * len(c) + [False] * (width - len(c)) for c in completions]
        batch["prompt_index"] = list(range(len(examples)))
    return {name: torch.tensor(rows, device=device) for name, rows in batch.items()}


def take_rows(batch, rows):
    """The given rows (indices of completions) of a batch, with just the prompts that they answer, and no column that
    would be padding throughout. prompt_ids and prompt_mask have a row a prompt; every other tensor a row a completion."""
    used, prompt_index = batch["prompt_index"][rows].unique(return_inverse=True)
    taken = {name: tensor[used if name.startswith("prompt_") else rows] for name, tensor in batch.items()
             if name != "prompt_index"}
    first = int(taken["prompt_mask"].int().argmax(-1).min())                  # leftmost real column of the prompts
    longest = max(int(taken["completion_mask"].sum(-1).max()), 1)
    width = batch["completion_mask"].shape[1]
    for name, tensor in taken.items():
        if name.startswith("prompt_"):
            taken[name] = tensor[:, first:]
        elif tensor.dim() == 2 and tensor.shape[1] == width:
            taken[name] = tensor[:, :longest]
    return {**taken, "prompt_index": prompt_index}


def split(batch, size, rows_together=1):
    """The batch in micro-batches of at most `size` rows; 0: the batch as it is. rows_together: how many rows that follow
    each other may not be parted (2 for preference pairs)."""
    rows = torch.arange(len(batch["prompt_index"]), device=batch["prompt_index"].device)
    size = size and max(size // rows_together, 1) * rows_together
    return [take_rows(batch, part) for part in rows.split(size)] if 0 < size < len(rows) else [batch]


def autocast(args):
    """The context in which forward passes run: matrix products in args.dtype; log-probabilities and losses stay float32."""
    return torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
