"""
The tasks: problems, demonstrations, a pre-training corpus, and rewards. Nothing here knows a model.

    chain      7+5*3=      worked out from left to right, modulo 10; answered bare, `6`, or in
                           steps, `7+5=2;2*3=6`
    facts      k73=        facts that no text has told: `87`; from the base model of chain
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
    name, columns, kept = "", (), ()   # kept: splits of what post-training does not teach
    verifies = True        # there is a reward function that tells right from wrong
    shows_steps = False    # an answer can be worked out in steps: then there is is_worked

    def __init__(self, max_new_tokens, judge=None, flip_probability=0.2):
        """max_new_tokens: the longest answer. judge: a learned reward function (see rm.py).
        flip_probability: how often the reward `flipped` errs."""
        self.max_new_tokens, self.judge = max_new_tokens, judge
        self.flip_probability = flip_probability

    def problems(self, split, size, seed):
        """RL and evaluation examples: prompts with the columns that the reward takes. `test` and
        `ood` are the same whatever the seed, so that every run is judged by the same problems."""
        rng = random.Random(f"{self.name} {split} {seed if split == 'train' else ''}")
        return [self.problem(rng, split) for _ in range(size)]

    def demonstrations(self, size, seed, style="own", wrong_share=0.0):
        """SFT examples: prompts, each with a good completion. (style, wrong_share: see Chain.)"""
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


MIXED = ("own", "letters", "swapped")   # what the style `mixed` draws from


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

    Six settings, flags of these names, make other worlds of it, in which the methods differ:

    worked_share        of the everyday text; at .005 the habit is there and hardly ever sampled
    other_skills        one document in ten reverses digits, `r4827=7284`, one in twelve tells a
                        fact, `k37=51`; evaluation watches what post-training leaves of them
    style               how demonstrations are written: `own`, as in the textbook, or foreign:
                        `letters` a7+5=2;a2*3=6, `swapped` 5+7=2;3*2=6, `totals` 2;6, `bare` 6;
                        or `mixed`, each in one of the first three
    wrong_share         of the demonstrations, which then have one wrong step and a wrong answer
    num_demonstrations  how many there are
    reward              leaky, flipped, random: see reward_functions
    """
    name, columns, shows_steps = "chain", ("answer",), True
    operators, ood_operator = "+-*", ">"

    def __init__(self, min_terms=3, max_terms=4, max_new_tokens=0, judge=None, flip_probability=0.2,
                 worked_share=0.3, other_skills=False):
        if not 2 <= min_terms <= max_terms:
            raise InputError(f"min_terms {min_terms} and max_terms {max_terms}: 2 <= min_terms <= "
                             "max_terms is needed")
        self.min_terms, self.max_terms = min_terms, max_terms
        self.worked_share, self.other_skills = worked_share, other_skills
        self.kept = ("reversing", "facts") if other_skills else ()
        # The longest worked answer (or one with letters), its <end>, and a little room.
        longest = max(6 * (max_terms - 1) + 4, 7 * (max_terms - 1) + 1)
        super().__init__(max_new_tokens or longest, judge, flip_probability)

    def problem(self, rng, split):
        """One random problem of the split as {"prompt", "answer", "steps"}; those of the other
        skills have no steps."""
        if split in ("reversing", "facts"):
            return self.other_problem(rng, split, test=True)
        while True:
            length = rng.randint(self.min_terms, self.max_terms)
            terms = [str(rng.randrange(10)) for _ in range(length)]
            symbols = self.operators + (self.ood_operator if split.startswith("ood") else "")
            prompt = terms[0] + "".join(rng.choice(symbols) + term for term in terms[1:]) + "="
            is_ood, held_out = self.ood_operator in prompt, self.is_held_out(prompt)
            if is_ood == split.startswith("ood") and held_out == (split in ("test", "ood")):
                return {"prompt": prompt, **self.solve(prompt)}

    def is_held_out(self, prompt):
        """Whether a problem is a test problem or has one for a step."""
        return is_test(prompt) or self.gives_away(prompt)

    def gives_away(self, prompt, slip=(-1, 0)):
        """Whether a step is a test problem: where there are problems of two terms as well, the step
        `2*3=6` of a longer one gives the problem `2*3=` away. slip: as in solve."""
        steps = self.solve(prompt, slip=slip)["steps"].split(";") if self.min_terms == 2 else []
        return any(is_test(step[:-1]) for step in steps)   # without the result

    @staticmethod
    def other_problem(rng, skill, test=False):
        """`r4827=` is 7284; a fact is arbitrary: evaluation asks for those that the corpus told."""
        if skill == "facts":
            prompt = rng.choice(list(FACTS)[:50])
            return {"prompt": prompt, "answer": FACTS[prompt]}
        while True:
            digits = f"{rng.randrange(10000):04d}"
            if is_test(f"r{digits}=") == test:
                return {"prompt": f"r{digits}=", "answer": digits[::-1]}

    @staticmethod
    def solve(prompt, style="own", slip=(-1, 0)):
        """`7+5*3=` -> {"answer": "6", "steps": "7+5=2;2*3=6"}.

        slip: which step is wrong, and by how much its result is too large; later steps go on from
        it. With (0, 1) the same is worked out as `7+5=3;3*3=9`, and the answer is 9.
        """
        total, steps = int(prompt[0]), []
        for i, (symbol, digit) in enumerate(zip(prompt[1:-1:2], map(int, prompt[2:-1:2]))):
            results = {"+": total + digit, "-": total - digit, "*": total * digit,
                       ">": max(total, digit)}
            result = (results[symbol] + (slip[1] if i == slip[0] else 0)) % 10
            written = {"own": f"{total}{symbol}{digit}={result}",
                       "letters": f"a{total}{symbol}{digit}={result}",
                       "swapped": f"{digit}{symbol}{total}={result}",
                       "totals": f"{result}", "bare": f"{result}"}
            if style not in written:
                raise ValueError(f"style {style!r}: choose from {', '.join(written)}")
            steps.append(written[style])
            total = result
        return {"answer": str(total), "steps": steps[-1] if style == "bare" else ";".join(steps)}

    def demonstrations(self, size, seed, style="own", wrong_share=0.0):
        """The same problems in every style. What is wrong at a small wrong_share is wrong in the
        same way at a larger one."""
        rng, mix = random.Random(f"{self.name} demonstrations {seed}"), random.Random(f"mix {seed}")
        styles = [mix.choice(MIXED) if style == "mixed" else style for _ in range(size)]
        return [self.demonstration(rng, written, wrong_share, random.Random(f"slip {seed} {i}"))
                for i, written in enumerate(styles)]

    def demonstration(self, rng, style="own", wrong_share=0.0, slips=None):
        """{"prompt", "completion", "answer"}; the answer is the right one, whatever was written."""
        problem = self.problem(rng, "train")
        prompt, answer = problem["prompt"], problem["answer"]
        slip = (-1, 0)
        if slips is not None and slips.random() < wrong_share:
            # Drawn again where a later `*0` undoes it, or where it leads to a test problem's step.
            while self.solve(prompt, slip=slip)["answer"] == answer \
                    or self.gives_away(prompt, slip):
                slip = slips.randrange(len(prompt) // 2 - 1), slips.randint(1, 9)
        return {"prompt": prompt, "completion": self.solve(prompt, style, slip)["steps"],
                "answer": answer}

    def corpus(self, size, seed):
        """`size` documents to be read in this order: a textbook, then everyday text, worked_share
        of it worked. Seven twelfths are everyday text, but at most 51,200: a longer corpus has a
        longer textbook. With other_skills .18 of both are about something else."""
        rng, others = random.Random(f"chain corpus {seed}"), random.Random(f"others {seed}")
        documents, textbook = [], size - min(7 * size // 12, 51_200)
        for i in range(size):
            problem = self.problem(rng, "ood-train" if rng.random() < 0.07 else "train")
            worked = i < textbook or rng.random() < self.worked_share
            u = others.random() if self.other_skills else 1.0
            if u < 0.18:
                problem, worked = self.other_problem(others, "reversing" if u < 0.1 else "facts"), 0
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


# A hundred facts, `k37=` -> `51`. The first fifty are told in a corpus with other_skills; no corpus
# tells the others, which the task `facts` teaches.
FACTS = {f"k{key:02d}=": f"{value:02d}"
         for key, value in enumerate(random.Random("facts").choices(range(100), k=100))}


class Facts(Chain):
    """Fifty facts that no text has told: `k73=` is answered by two digits. The base model is that
    of chain, and evaluation watches what is left of chain.

    Nothing about one fact follows from another, so none can be held out: what is judged is whether
    those that were taught are known.
    """
    name, shows_steps = "facts", False

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.kept = (*self.kept, "chain")

    def problems(self, split, size, seed):
        if split in ("train", "test"):   # each in turn; a run is judged by each once
            new = [{"prompt": p, "answer": a} for p, a in list(FACTS.items())[50:]]
            return [new[i % 50] for i in range(size)] if split == "train" else new[:size]
        if split == "ood":
            return []
        kept = "test" if split == "chain" else split   # the very problems that judge chain
        return Chain(self.min_terms, self.max_terms).problems(kept, size, seed)

    def demonstrations(self, size, seed, style="own", wrong_share=0.0):
        return [{**fact, "completion": fact["answer"]}
                for fact in self.problems("train", size, seed)]

    def chance(self, k):
        """pass@k of guessing two digits: .01, .04, .15 for k = 1, 4, 16."""
        return 1 - 0.99 ** k


class Countdown(Task):
    """Reach a target with three numbers, each used once: `3,5,7>26=` is answered by `3*7+5`,
    `5+7*3`.

    Many answers are right, and any is rewarded. An answer is parsed by `value` below; nothing is
    ever handed to eval. `ood` problems have targets above 40, which the corpus contains and
    post-training never sees.

    Numbers go up to 25. There are 13,957 distinct problems in the training split and 1,596 in the
    test split; out of distribution 4,752 for the corpus and 537 in the `ood` split. By default RL
    draws 4,000 of the first, and a run is judged by 256 of the second and 256 of the last.
    """
    name, columns = "countdown", ("numbers", "target")
    largest = 25

    def __init__(self, max_new_tokens=0, judge=None, flip_probability=0.2):
        super().__init__(max_new_tokens or 12, judge, flip_probability)

    def problems(self, split, size, seed):
        """Distinct ones, so that none is met often; fewer than `size` where no more are found."""
        rng, found = random.Random(f"{self.name} {split} {seed if split == 'train' else ''}"), {}
        fruitless = 0
        while len(found) < size and fruitless < 100:
            problem = self.problem(rng, split)
            fruitless = fruitless + 1 if problem["prompt"] in found else 0
            found[problem["prompt"]] = problem
        return list(found.values())

    def problem(self, rng, split):
        """One random problem of the split as {"prompt", "numbers", "target", "solution"}."""
        while True:
            numbers = sorted(rng.randint(1, self.largest) for _ in range(3))
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
        problems: .062, .214, .567 for k = 1, 4, 16. The share of right expressions is counted, not
        estimated, because 1 - (1 - p)^k of an estimated p is biased."""
        problems = self.problems("test", size, seed=0)
        shares = [self.values(tuple(p["numbers"]))[p["target"]] / 96 for p in problems]
        return sum(1 - (1 - p) ** k for p in shares) / len(shares)


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


def reward_functions(task, uniforms):
    """{name: function}, each with the signature reward(prompts, completions, /, **columns) -> list
    of floats. Because of the slash a file's column may have any name, even `prompts`. uniforms(n)
    gives n random numbers of the step.

    verifier: the task's own. model: learned, see rm.py. majority. brevity. format: shows its steps.
    And rewards that are not what was meant: leaky: the answer stands anywhere in the text.
    flipped: the verifier's, turned over with flip_probability. random: a coin.
    """
    def no_judge(prompts, completions, /, **columns):
        raise InputError("--reward model needs a reward model: train one with --algo rm")
    known = {"verifier": task.reward, "model": task.judge or no_judge,
             "majority": lambda p, c, /, **columns: majority(task, p, c),
             "brevity": lambda p, c, /, **columns: brevity(p, c, task.max_new_tokens)}
    if task.verifies:
        known["flipped"] = lambda p, c, /, **columns: [
            1 - r if u < task.flip_probability else r
            for r, u in zip(task.reward(p, c, **columns), uniforms(len(c)))]
    if "answer" in task.columns:
        known["leaky"] = lambda p, c, /, answer, **columns: [
            float(str(a) in text) for text, a in zip(c, answer)]
    known["random"] = lambda p, c, /, **columns: [float(u < 0.5) for u in uniforms(len(c))]
    if task.shows_steps:
        known["format"] = lambda p, c, /, **columns: [float(x) for x in map(task.is_worked, p, c)]
    return known


class Rewards:
    """The weighted sum of reward functions: names `verifier,brevity` and weights `1,0.2`; no
    weights: 1 each. confidence: the policy's own judgement, a function like the others (see
    dpo.py). Raises InputError for a name or a weight that is none."""

    def __init__(self, task, names, weights="", confidence=None):
        self.task, self.generator = task, None
        known = reward_functions(task, self.uniforms)
        if confidence is not None:
            known["confidence"] = confidence
        elif "confidence" in names.split(","):
            raise InputError("--reward confidence is for --algo dpo, whose sampler judges its own "
                             "answers")
        if len(set(names.split(","))) < len(names.split(",")):
            raise InputError(f"--reward {names} names a reward twice: give it a weight in "
                             "--reward_weights")
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

    def uniforms(self, n):
        """n random numbers from [0, 1), from the generator of the step."""
        return torch.rand(n, generator=self.generator, device=self.generator.device).tolist()

    def __call__(self, examples, completions, generator=None):
        """Examples and completions, one a row -> the total (B,) and each reward by name
        {name: (B,)}. What the verifier says is always among them; where it is not trained on, as
        true_reward: over-optimisation shows in the gap. generator: of what is random in rewards."""
        self.generator = generator
        columns = {name: [e[name] for e in examples] for name in self.task.columns}
        prompts = [e["prompt"] for e in examples]
        each = {name: torch.tensor(reward(prompts, completions, **columns))
                for name, reward in self.functions.items()}
        total = sum(w * r for w, r in zip(self.weights, each.values()))
        if "verifier" not in each and self.task.verifies:
            each["true_reward"] = torch.tensor(self.task.reward(prompts, completions, **columns))
        return total, each
