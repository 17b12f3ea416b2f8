"""
Do my answers have the right form, and is everything there that is to be handed in?

    python check.py        a line for each question: whether answers.txt says something of that form

Whether an answer is right is said by the grading alone. The exit code is 0 if nothing is missing.
"""

import pathlib
import re
import sys

FILES = ("run/config.json", "run/metrics.jsonl", "inspect.txt", "compare/compare.json")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
ALGORITHMS = "sft, dft, dpo, ppo, grpo"
NAMES = rf"none|(?:(?:{ALGORITHMS.replace(', ', '|')})(?: +|(?= *;|$)))+"
# Of each question: what is asked, in a few words, the form, and how that form is read.
QUESTIONS = {
    1: ("held-out accuracy, sampled, before and after", "two numbers", f"({NUMBER}) +({NUMBER})"),
    2: ("the step at which `worked` is .90 or more for the first time", "a whole number", r"(\d+)"),
    3: ("groups of a step that teach something, in the last line", "a number", f"({NUMBER})"),
    4: ("accuracy out of distribution of sft and of dft", "two numbers", f"({NUMBER}) +({NUMBER})"),
    5: ("tokens that SFT trains on in the batch", "a number", f"({NUMBER})"),
    6: ("DFT's weight over SFT's, of the least likely token", "a number", f"({NUMBER})"),
    7: ("who pushes the first token down, of the chosen answer; of the rejected one",
        f"names out of {ALGORITHMS}, or none; the same", f"({NAMES}) *; *({NAMES})"),
    8: ("the greedy answer to your own problem", "what follows the problem", r"([0-9+*=;-]+)"),
}


def form():
    """answers.txt as it is handed out."""
    lines = ["# Write behind the colons. The questions are in README.md; python check.py looks at",
             "# the form of the answers.", "", "seed: "]
    for number, (asked, what, _) in QUESTIONS.items():
        lines += ["", f"# {asked}: {what}", f"{number}: "]
    return "\n".join(lines) + "\n"


def read(text):
    """answers.txt -> {"seed": the seed, number: a tuple of what is said}; None where there is no
    answer of the right form."""
    said = {}
    for line in text.replace(",", " ").splitlines():
        name, colon, words = line.partition(":")
        if colon and not line.startswith("#"):
            said[name.strip()] = words.strip()[:200]
    seed = re.fullmatch(r"\d{1,2}", said.get("seed", ""))
    answers = {"seed": int(seed[0]) if seed else None}
    for number, (_, _, pattern) in QUESTIONS.items():
        found = re.fullmatch(pattern, said.get(str(number), ""))
        answers[number] = found.groups() if found else None
    return answers


def main(folder):
    try:
        answers = read((folder / "answers.txt").read_text())
    except (OSError, UnicodeDecodeError):
        print("error: answers.txt cannot be read", file=sys.stderr)
        return 2
    print("Assignment 0: A first walk\n")
    ok = answers["seed"] is not None
    print(f"{'ok' if ok else '--'} seed  {answers['seed'] if ok else 'one or two digits'}")
    for number, (asked, what, _) in QUESTIONS.items():
        said = answers[number]
        words = ("; " if number == 7 else " ").join(map(str.strip, said)) if said else asked
        print(f"{'ok' if said else '--'} {number}     {words}")
        if not said:
            print(f"         > {what}")
        ok &= said is not None
    for file in FILES:
        there = (folder / file).is_file()
        print(f"{'ok' if there else '--'}       {file}{'' if there else ' is not there yet'}")
        ok &= there
    print("\nEverything has its form." if ok else "\nSomething is missing.")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(__file__).resolve().parent))
