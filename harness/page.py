"""
The page of --inspect all --html FILE: the same answers under every algorithm, an algorithm a
column, each token coloured by its weight. One file that loads nothing, for a wall, a phone, paper.

Colour is never alone: every number stands beside its token, and what is pushed down has a dashed
border and stripes. The depth of a colour is the square root of the weight's share of the largest
in its column, so that small weights can still be seen.
"""

import html
import math
import os

from harness.checkpoint import write_text
from harness.errors import InputError

HEAD = "<!doctype html>\n<title>Token by token</title>\n"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #111; --quiet: #555; --line: #bbb;
        --up: 90 165 240; --down: 245 150 70; --known: 150 150 150; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --text: #f2f2f2; --quiet: #aab; --line: #4a4f58;
          --up: 25 100 185; --down: 185 80 15; --known: 105 110 120; } }
* { box-sizing: border-box; }
html { font-size: max(16px, 1.1vw); }
body { margin: 0; padding: .6rem .6rem 5rem; background: var(--page); color: var(--text);
       font: 1rem/1.35 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font: 700 1.4rem ui-monospace, monospace; margin: .9rem 0 .3rem; overflow-wrap: anywhere; }
h2 small { font: 400 1rem system-ui, sans-serif; color: var(--quiet); }
h3 { font-size: 1.1rem; margin: .8rem 0 0; }
p { margin: .4rem 0; }
section p { font-size: .8rem; line-height: 1.2; color: var(--quiet); margin: 0 0 .4rem; }
ol { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem; }
li, i { position: relative; border: 2px solid var(--line); border-radius: .35rem;
        padding: .1rem .2rem; text-align: center; font-style: normal; white-space: nowrap;
        max-width: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
i { padding: .1rem .5rem; display: inline-block; line-height: 1.2; }
.up { background: rgb(var(--up) / var(--depth)); border-color: rgb(var(--up)); }
.down { border-style: dashed; border-color: rgb(var(--down)); background:
  repeating-linear-gradient(135deg, transparent 0 5px, rgb(var(--down) / var(--depth)) 5px 7px),
  rgb(var(--down) / calc(var(--depth) * .6)); }
.known { background: rgb(var(--known) / var(--depth)); }
b { display: block; font: 700 1.1rem/1.4 ui-monospace, monospace; white-space: pre;
    overflow: hidden; text-overflow: ellipsis; }
li small { display: block; font-size: .7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
li:focus { outline: 3px solid var(--text); z-index: 1; }
li:hover::after, li:focus::after {
  content: attr(aria-label); position: fixed; z-index: 2; inset: auto 0 0; padding: .5rem .8rem;
  background: var(--text); color: var(--page); font-size: 1.1rem; text-align: left;
  white-space: pre-line; pointer-events: none; }
@media (min-width: 48rem), print {
  body { padding: 1rem 1.5rem 5rem; }
  h3 { margin: 0; }
  .columns { display: grid; gap: 0 .4rem;
             grid-template-columns: repeat(var(--number), minmax(0, 1fr)); }
  section { display: grid; grid-template-rows: subgrid; grid-row: span 3; }
  ol { flex-direction: column; flex-wrap: nowrap; gap: .15rem; min-width: 0; }
  li { display: flex; justify-content: space-between; align-items: baseline; gap: .25rem;
       padding: 0 .3rem; }
  li b { font-size: 1.05rem; }
  li small { font-size: .78rem; }
  li:hover::after, li:focus::after { position: absolute; inset: 100% auto auto 0;
    min-width: max-content; border-radius: .35rem; }
  section:last-child li::after { inset: 100% 0 auto auto !important; } }
@media (min-width: 100rem) {
  main { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; align-items: start; } }
@media print { body { padding: 0; } li { break-inside: avoid; } }
"""


def check(path):
    """Raise InputError where the file that is asked for is something else than a page from
    before."""
    if not path or os.path.isdir(path):
        raise InputError(f"--html {path or '(empty)'}: the name of a file is needed")
    if os.path.lexists(path):
        try:
            with open(path, errors="replace") as file:
                ours = os.path.isfile(path) and file.read(len(HEAD)) == HEAD
        except OSError as error:
            raise InputError(f"--html {path}: {error.strerror}; choose another file") from None
        if not ours:
            raise InputError(f"--html {path} is there already and is no page of --inspect: choose "
                             "another file")


def write(path, text):
    """Whole or not at all. Raises InputError where it cannot be written."""
    write_text(path, text, "--html")


def chip(token, number, kind, depth, said):
    """A token with its number. said: what is shown of it when it is touched."""
    return (f'<li tabindex="0" class="{kind}" style="--depth: {depth:.2f}" '
            f'aria-label="{html.escape(said)}"><b>{html.escape(token)}</b>'
            f'<small>{number}</small></li>\n')


def column(title, about, chips):
    return (f"<section>\n<h3>{html.escape(title)}</h3>\n<p>{html.escape(about)}</p>\n"
            f"<ol>\n{''.join(chips)}</ol>\n</section>\n")


def depth_of(weight, largest):
    """How deep the colour of a weight is, 0 to 1. Worked example: a quarter of the largest: .5."""
    return math.sqrt(abs(weight) / largest) if largest else 0.0


def document(answers, about):
    """answers: what harness/tokens.py finds side by side; about: {algorithm: what it does}. -> the
    page, in ASCII whatever the model wrote."""
    rows = [row for answer in answers for _, _, row in answer["tokens"]]
    largest = {name: max(abs(row[name]) for row in rows) for name in about}
    parts = []
    for answer in answers:
        chips = [chip(token, f"{p:.3f}", "known", 0.8 * p, f"{token}\nprobability {p:.3f}")
                 for token, p, _ in answer["tokens"]]
        columns = [column("prob", "of the token, before the update", chips)]
        for name in about:
            chips = []
            for token, p, row in answer["tokens"]:
                number, still = f"{row[name]:+.3f}", abs(row[name]) < 5e-4
                kind = "still" if still else "up" if row[name] > 0 else "down"
                chips.append(chip(token, number, kind, depth_of(row[name], largest[name]),
                                  f"{token}\nprobability {p:.3f}\n{name} {number}"))
            columns.append(column(name, about[name], chips))
        parts.append(f'<article>\n<h2>{html.escape(answer["prompt"])} '
                     f'<small>{answer["label"]}</small></h2>\n<div class="columns" '
                     f'style="--number: {len(columns)}">\n{"".join(columns)}</div>\n</article>\n')
    text = (f'{HEAD}<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n'
            "<h1>Token by token</h1>\n<p>The weight of each token's gradient, -dL/d(logit of the "
            "token), in thousandths; the same answers under every algorithm.</p>\n"
            '<p><i class="up" style="--depth: .7">pushed up</i> '
            '<i class="down" style="--depth: .7">pushed down</i> '
            '<i class="still">hardly moved</i> The deeper the colour, the larger the weight beside '
            "the largest of its column.</p>\n"
            f"<main>\n{''.join(parts)}</main>\n")
    return text.encode("ascii", "xmlcharrefreplace").decode()
