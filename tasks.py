"""
The tasks: problems, demonstrations, a pre-training corpus, and rewards. Nothing here knows a model.

    chain      7+5*3=      worked out from left to right, modulo 10; answered bare, `6`, or in
                           steps, `7+5=2;2*3=6`
    countdown  3,5,7>26=   reach the target with each number once: `3*7+5`; many right answers
    a file     my.jsonl    one JSON object a line: see harness/files.py

Problems are split by a hash of their text. So pre-training, demonstrations and RL, with any seed,
never see a problem of the test split, not even as a step of a longer one. A third split, `ood`,
holds a kind of problem that the corpus contains and that post-training never sees.
"""

import functools
import itertools
import math
import random
import re
import zlib
from collections import Counter
from fractions import Fraction

import torch

from harness.errors import InputError


def is_test(problem):
    """Whether a problem belongs to the test split: one in ten, by a hash of its text that no seed
    can change."""
    return zlib.crc32(problem.encode(errors="surrogatepass")) % 10 == 0


class Task:
    """What the built-in tasks share. A task of your own defines problem, demonstration, corpus,
    reward, final_answer and chance, and names the columns that its reward takes."""
    name, columns = "", ()
    verifies = True        # there is a reward function that tells right from wrong
    shows_steps = False    # an answer can be worked out in steps: then there is is_worked

    def __init__(self, max_new_tokens, judge=None):
        """max_new_tokens: the longest answer. judge: a learned reward function (see rm.py)."""
        self.max_new_tokens, self.judge = max_new_tokens, judge

    def problems(self, split, size, seed):
        """RL and evaluation examples: prompts with the columns that the reward takes. `test` and
        `ood` are the same whatever the seed, so that every run is judged by the same problems."""
        rng = random.Random(f"{self.name} {split} {seed if split == 'train' else ''}")
        return [self.problem(rng, split) for _ in range(size)]

    def demonstrations(self, size, seed):
        """SFT examples: prompts, each with a good completion."""
        rng = random.Random(f"{self.name} demonstrations {seed}")
        return [self.demonstration(rng) for _ in range(size)]

    def documents(self, size, seed):
        """Pre-training examples: whole texts. The prompt is empty, so every token is trained."""
        return [{"prompt": "", "completion": text} for text in self.corpus(size, seed)]

    def holds(self, *columns):
        """Whether the training examples come with these columns; preferences are found in files."""
        return False

    @staticmethod
    def final_part(completion):
        """The end of a completion that says the answer; what is before it leads there."""
        return completion


class Chain(Task):
    """Arithmetic from left to right, modulo 10: `7+5*3=` is (7+5)*3 = 2*3 = 6.

    The answer can be given at once, `6`, or worked out, `7+5=2;2*3=6`; the reward looks at the last
    number alone. A small transformer cannot do three steps in its head: bare answers are right
    about one time in five. Every one of the steps is easy. The corpus is a textbook, in which
    everything is worked out, followed by everyday text, in which most answers are bare.
    Pre-training on the two in this order gives a base model that can work things out and seldom
    does: what reinforcement learning is good at changing.

    `ood` problems contain `>`, the larger of two digits: `7+5>3=`. One document in fourteen has it,
    post-training none. They show whether the new habit carries over to them, or whether training
    overwrites what was known of them.
    """
    name, columns, shows_steps = "chain", ("answer",), True
    operators, ood_operator = "+-*", ">"

    def __init__(self, min_terms=3, max_terms=4, max_new_tokens=0, judge=None):
        if not 2 <= min_terms <= max_terms:
            raise InputError(f"min_terms {min_terms} and max_terms {max_terms}: 2 <= min_terms <= "
                             "max_terms is needed")
        self.min_terms, self.max_terms = min_terms, max_terms
        # The longest worked answer, its <end>, and a little room.
        super().__init__(max_new_tokens or 6 * (max_terms - 1) + 4, judge)

    def problem(self, rng, split):
        """One random problem of the split as {"prompt", "answer", "steps"}."""
        while True:
            length = rng.randint(self.min_terms, self.max_terms)
            terms = [str(rng.randrange(10)) for _ in range(length)]
            symbols = self.operators + (self.ood_operator if split.startswith("ood") else "")
            prompt = terms[0] + "".join(rng.choice(symbols) + term for term in terms[1:]) + "="
            is_ood, held_out = self.ood_operator in prompt, self.is_held_out(prompt)
            if is_ood == split.startswith("ood") and held_out == (split in ("test", "ood")):
                return {"prompt": prompt, **self.solve(prompt)}

    def is_held_out(self, prompt):
        """Whether a problem is a test problem or has one for a step: where there are problems of
        two terms as well, the step `2*3=6` of a longer one gives the problem `2*3=` away."""
        steps = self.solve(prompt)["steps"].split(";") if self.min_terms == 2 else []
        return is_test(prompt) or any(is_test(step[:-1]) for step in steps)   # without the result

    @staticmethod
    def solve(prompt):
        """`7+5*3=` -> {"answer": "6", "steps": "7+5=2;2*3=6"}."""
        total, steps = int(prompt[0]), []
        for symbol, digit in zip(prompt[1:-1:2], map(int, prompt[2:-1:2])):
            results = {"+": total + digit, "-": total - digit, "*": total * digit,
                       ">": max(total, digit)}
            result = results[symbol] % 10
            steps.append(f"{total}{symbol}{digit}={result}")
            total = result
        return {"answer": str(total), "steps": ";".join(steps)}

    def demonstration(self, rng):
        problem = self.problem(rng, "train")
        return {"prompt": problem["prompt"], "completion": problem["steps"],
                "answer": problem["answer"]}

    def corpus(self, size, seed):
        """`size` documents to be read in this order: three fifths textbook, then everyday text
        (30 % worked)."""
        rng = random.Random(f"chain corpus {seed}")
        documents = []
        for i in range(size):
            problem = self.problem(rng, "ood-train" if rng.random() < 0.07 else "train")
            worked = i < 0.6 * size or rng.random() < 0.3
            documents.append(problem["prompt"] + problem["steps" if worked else "answer"])
        return documents

    @staticmethod
    def reward(prompts, completions, /, answer, **columns):
        """1.0 where the completion's last `;` and `=` are followed by the answer and nothing else.
        -> list of floats"""
        return [float(Chain.final_answer(c) == a) for c, a in zip(completions, answer)]

    @staticmethod
    def final_answer(completion):
        return re.split("[;=]", completion)[-1] or None

    @staticmethod
    def final_part(completion):
        return re.split("[;=]", completion)[-1]

    @staticmethod
    def is_worked(prompt, completion):
        return "=" in completion

    def chance(self, k):
        """pass@k of guessing one of the ten digits: .10, .34, .81 for k = 1, 4, 16."""
        return 1 - 0.9 ** k


class Countdown(Task):
    """Reach a target with three digits, each used once: `3,5,7>26=` is answered by `3*7+5`,
    `5+7*3`.

    Many answers are right, and any is rewarded. An answer is parsed by `value` below; nothing is
    ever handed to eval. `ood` problems have targets above 40, which the corpus contains and
    post-training never sees.

    There are few problems: 1,215 distinct ones in the training split and 114 in the test split; out
    of distribution 206 for the corpus and 20 in the `ood` split. By default RL draws 4,000 training
    problems, 1,070 of them distinct at seed 0, and a run is judged by 256, of them 87 distinct.
    """
    name, columns = "countdown", ("numbers", "target")

    def __init__(self, max_new_tokens=0, judge=None):
        super().__init__(max_new_tokens or 12, judge)

    def problem(self, rng, split):
        """One random problem of the split as {"prompt", "numbers", "target", "solution"}."""
        while True:
            numbers = sorted(rng.randint(1, 9) for _ in range(3))
            solution = self.random_expression(rng, numbers)
            target = value(solution)
            if target is None or target.denominator != 1 or not 1 <= target <= 99:
                continue
            prompt = ",".join(map(str, numbers)) + f">{target}="
            is_ood, held_out = target > 40, is_test(prompt)
            if is_ood == split.startswith("ood") and held_out == (split in ("test", "ood")):
                return {"prompt": prompt, "numbers": numbers, "target": int(target),
                        "solution": solution}

    @staticmethod
    def random_expression(rng, numbers):
        a, b, c = rng.sample(numbers, 3)
        return f"{a}{rng.choice('+-*/')}{b}{rng.choice('+-*/')}{c}"

    def demonstration(self, rng):
        problem = self.problem(rng, "train")
        return {**problem, "completion": problem["solution"]}

    def corpus(self, size, seed):
        rng = random.Random(f"countdown corpus {seed}")
        problems = (self.problem(rng, "ood-train" if rng.random() < 0.25 else "train")
                    for _ in range(size))
        return [p["prompt"] + p["solution"] for p in problems]

    @staticmethod
    def reward(prompts, completions, /, numbers, target, **columns):
        """1.0 where the completion uses exactly the given numbers and its value is the target.
        -> list of floats"""
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
        for problem in self.problems("test", size, seed=0):
            p = self.values(tuple(problem["numbers"]))[problem["target"]] / 96
            total += 1 - (1 - p) ** k
        return total / size


def value(expression):
    """The exact value of an arithmetic expression as a Fraction, or None where it is malformed or
    divides by zero.

    A recursive-descent parser: sum = product {(+|-) product}, product = atom {(*|/) atom},
    atom = number | ( sum ). `3*7+5` -> 26, `7/2` -> 7/2, `3*(7` -> None, `1/0` -> None.
    """
    if len(expression) > 100 or not re.fullmatch(r"[\d+\-*/()]+", expression, re.ASCII):
        return None                                        # the length also bounds the recursion
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


# -- rewards --------------------------------------------------------------------------------------


def brevity(prompts, completions, max_new_tokens):
    """Minus the share of the allowed length that was used, in characters: 0 for nothing, -1 for all
    of it."""
    return [-len(c) / max_new_tokens for c in completions]


def majority(task, prompts, completions):
    """1.0 where the final answer is the commonest one among the batch's answers to the same prompt:
    no label is needed (self-consistency, 2203.11171; as a reward, TTRL, 2504.16084). `6 6 4` ->
    [1, 1, 0]; of equally common ones, the first."""
    votes = {}
    for prompt, completion in zip(prompts, completions):
        answer = task.final_answer(completion)
        votes.setdefault(prompt, []).extend([] if answer is None else [answer])
    winners = {prompt: max(answers, key=answers.count) for prompt, answers in votes.items()
               if answers}
    return [float(p in winners and task.final_answer(c) == winners[p])
            for p, c in zip(prompts, completions)]


def reward_functions(task):
    """{name: function}, each with the signature reward(prompts, completions, /, **columns) -> list
    of floats. Because of the slash a file's column may have any name, even `prompts`.

    verifier: the task's own. model: learned, see rm.py. majority. brevity. format: shows its steps.
    """
    def no_judge(prompts, completions, /, **columns):
        raise InputError("--reward model needs a reward model: train one with --algo rm")
    known = {"verifier": task.reward, "model": task.judge or no_judge,
             "majority": lambda p, c, /, **columns: majority(task, p, c),
             "brevity": lambda p, c, /, **columns: brevity(p, c, task.max_new_tokens)}
    if task.shows_steps:
        known["format"] = lambda p, c, /, **columns: [float(x) for x in map(task.is_worked, p, c)]
    return known


class Rewards:
    """The weighted sum of reward functions: names `verifier,brevity` and weights `1,0.2`; no
    weights: 1 each. confidence: the policy's own judgement, a function like the others (see
    dpo.py). Raises InputError for a name or a weight that is none."""

    def __init__(self, task, names, weights="", confidence=None):
        self.task, known = task, reward_functions(task)
        if confidence is not None:
            known["confidence"] = confidence
        elif "confidence" in names.split(","):
            raise InputError("--reward confidence is for --algo dpo, whose sampler judges its own "
                             "answers")
        for name in names.split(","):
            if name not in known:
                raise InputError(f"--reward {name} is unknown for {task.name}: use one or more of "
                                 f"{', '.join(known)}")
        self.functions = {name: known[name] for name in names.split(",")}
        weights = weights or ",".join("1" for _ in self.functions)
        try:
            self.weights = [float(w) for w in weights.split(",")]
        except ValueError:
            self.weights = [math.nan]
        if not all(map(math.isfinite, self.weights)):
            raise InputError(f"--reward_weights {weights}: numbers separated by commas are needed")
        if len(self.weights) != len(self.functions):
            raise InputError(f"--reward_weights has {len(self.weights)} numbers, --reward "
                             f"{len(self.functions)} names")

    def __call__(self, examples, completions):
        """Examples and completions, one a row -> the total (B,) and each reward by name
        {name: (B,)}. What the verifier says is always among them; where it is not trained on, as
        true_reward: over-optimisation shows in the gap."""
        columns = {name: [e[name] for e in examples] for name in self.task.columns}
        prompts = [e["prompt"] for e in examples]
        each = {name: torch.tensor(reward(prompts, completions, **columns))
                for name, reward in self.functions.items()}
        total = sum(w * r for w, r in zip(self.weights, each.values()))
        if "verifier" not in each and self.task.verifies:
            each["true_reward"] = torch.tensor(self.task.reward(prompts, completions, **columns))
        return total, each
