"""
Does the report have its parts, and do the figures of its tables follow from the runs?

    python check.py                           report.md, with the JSON files beside it
    python check.py examples/a/report.md      another one

A table may have any columns. A row is compared with the runs if its first cell is an arm as
compare.py writes it, in backticks, or two with a minus between them; the cells after it are then
the figure (accuracy, ood, KL, ... as compare.py's table calls them), how many seeds, the mean, and
the 95 % interval as `low to high`, or `-`. The runs are those of compare.json, or of the JSON file
that the text before the table names last. That the conclusion is right nobody checks here.
"""

import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "experiments")]
VERDICTS = ("holds here", "holds with a condition: ", "does not hold here",
            "cannot be told at this scale")
PARTS = ("Claim", "Source", "Rule", "World and budget", "Rates", "Commands", "Results", "Verdict",
         "What failed", "What this does not show")


def sections(text):
    """{heading: its text}, without what stands in <!-- comments -->."""
    parts = re.split(r"^## (.*)$", re.sub(r"<!--.*?-->", "", text, flags=re.S), flags=re.M)
    return {heading.strip(): body.strip() for heading, body in zip(parts[1::2], parts[2::2])}


def rows(text):
    """The rows of tables that name arms: (file of the runs, [cells])."""
    file, found = "compare.json", []
    for line in re.sub(r"<!--.*?-->", "", text, flags=re.S).splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("| ").split("|")]
            if cells[0].startswith("`"):
                found.append((file, [cell.replace("\0", "|") for cell in cells]))
        else:
            file = (re.findall(r"`([\w-]+\.json)`", line) or [file])[-1]
    return found


def effect(words, figure, runs):
    """What a row's first two cells stand for -> {"mean", "low", "high", "n"}. Raises ValueError."""
    import common
    arms, values, seeds = re.findall(r"`([^`]+)`", words), [], []
    for arm in arms:
        own = sorted((run for run in runs if run["variant"] == arm), key=lambda run: run["seed"])
        if not own:
            raise ValueError(f"there is no run of {arm}")
        figures = common.figures_of(own)
        if figure not in figures:
            raise ValueError(f"there is no figure {figure!r}: {', '.join(figures)}")
        values.append(figures[figure])
        seeds.append([run["seed"] for run in own])
    if re.sub("`[^`]+`", "", words).strip() not in ("", "-", "minus") or len(arms) > 2:
        raise ValueError(f"one arm, or two with a minus between them: {words}")
    if len(arms) == 2 and seeds[0] != seeds[1]:
        raise ValueError(f"the arms have other seeds: {seeds[0]} and {seeds[1]}")
    return common.interval(values[0]) if len(arms) == 1 else common.difference(*values)


def agrees(cell, value):
    """Whether a figure as it is written, `.814`, `-.015` or `186,296`, is that number, rounded."""
    try:
        written = float(cell.replace(",", ""))
    except ValueError:
        return False
    digits = len(cell.partition(".")[2])
    return abs(written - value) <= 0.5 * 10 ** -digits + 1e-9


def row_is_wrong(cells, runs):
    """Why a row does not follow from the runs; None if it does."""
    if len(cells) < 5:
        return "five cells are needed: arm, figure, seeds, mean, interval"
    try:
        found = effect(cells[0], cells[1], runs)
    except ValueError as error:
        return str(error)
    except (KeyError, TypeError):
        return "the file is none of compare.py's"
    if cells[2] != str(found["n"]):
        return f"{cells[2]} seeds in the report, {found['n']} in the runs"
    if not agrees(cells[3], found["mean"]):
        return f"mean {cells[3]} in the report, {found['mean']:.4f} from the runs"
    if cells[4] == "-":
        return None
    if found["low"] is None:
        return f"interval {cells[4]} in the report: over one seed there is none"
    low, _, high = cells[4].partition(" to ")
    if not (agrees(low, found["low"]) and agrees(high, found["high"])):
        return (f"interval {cells[4]} in the report, {found['low']:.4f} to {found['high']:.4f} "
                "from the runs")


def check_report(path):
    """[(what is asked, None if it is there, else what is wrong)] of a report and the JSON files
    beside it."""
    text, runs = path.read_text(), {}
    for file in sorted(path.parent.glob("*.json")):
        runs[file.name] = json.loads(file.read_text())
    parts, table = sections(text), rows(text)
    found = [(part, None if len(parts.get(part, "").split()) >= 3 else "missing or empty")
             for part in PARTS]
    rule, verdict = parts.get("Rule", ""), parts.get("Verdict", "")
    named = [words for words in VERDICTS if words.strip(": ") in " ".join(rule.split())]
    found.append(("the rule has a margin and an outcome that speaks against the claim", None if
                  re.search(r"\d*\.\d+", rule) and {VERDICTS[2], VERDICTS[3]} & set(named) else
                  f"a number, and for the other outcomes {VERDICTS[2]!r} or {VERDICTS[3]!r}"))
    found.append(("the verdict is one of four", None if verdict.lower().startswith(VERDICTS) else
                  f"begin with one of: {', '.join(map(str.strip, VERDICTS))}"))
    found.append(("commands that repeat the runs", None if
                  re.search(r'python compare\.py ["\w]', parts.get("Commands", "")) else
                  "python compare.py with its arms is needed"))
    wrong = [(cells, row_is_wrong(cells, runs[file]) if file in runs else f"there is no {file}")
             for file, cells in table]
    found += [(f"{cells[0]} {cells[1] if len(cells) > 1 else ''}", why) for cells, why in wrong]
    right = [cells for cells, why in wrong if why is None]
    found.append(("a difference of two arms with its interval, over three seeds or more", None if
                  any(cells[0].count("`") == 4 and cells[4] != "-" and int(cells[2]) >= 3
                      for cells in right) else "no row of a table shows one"))
    return found


def main(words):
    path = pathlib.Path(words[0] if words else HERE / "report.md")
    try:
        found = check_report(path)
    except (OSError, json.JSONDecodeError) as error:
        print(f"error: {getattr(error, 'filename', None) or path}: {error}", file=sys.stderr)
        return 2
    for what, why in found:
        print(f"{'--' if why else 'ok'}  {what}" + (f"\n      > {why}" if why else ""))
    held = sum(why is None for _, why in found)
    print(f"\n{held} of {len(found)}. The points are given by hand: RUBRIC.md.")
    return 0 if held == len(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
