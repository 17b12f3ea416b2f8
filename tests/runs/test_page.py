"""--inspect all --html FILE: the page says what the table says, escapes what a model wrote, loads
nothing, and a file that cannot be written is refused in one line before anything is trained."""

import errno
import html.parser
import os
import re

import pytest

import tasks
import train
from conftest import TASK, run
from harness import checkpoint, page, prepare, tokens
from runs_helpers import complaint


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Reader(html.parser.HTMLParser):
    """What stands on a page: [[prompt, label, {column: [(token, number, class, depth)]}]]."""

    def __init__(self, text):
        super().__init__()
        self.answers, self.tags, self.inside, self.style = [], set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside.append(tag)
        attributes = dict(attributes)
        if tag == "article":
            self.answers.append(["", "", {}])
        if tag == "li":
            depth = float(attributes["style"].removeprefix("--depth: "))
            self.style, self.token = (attributes["class"], depth), ""
            self.said = attributes["aria-label"].split("\n")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:   # <meta> has no end
            pass

    def handle_data(self, data):
        path = " ".join(self.inside[-2:])
        if path == "article h2":
            self.answers[-1][0] = data.strip()
        elif path == "h2 small":
            self.answers[-1][1] = data
        elif path == "section h3":
            self.column = self.answers[-1][2].setdefault(data, [])
        elif path == "li b":
            self.token += data
        elif path == "li small":
            self.column.append((self.token, data, *self.style))
            assert (self.said[0], self.said[-1].split()[-1]) == (self.token, data)


def tables(text):
    """The same of the text: a token a line, the rest are numbers."""
    found = []
    for block in text.split("\n\n")[1:-1]:   # before them a heading, after them the file's name
        title, heading, *lines = block.splitlines()
        columns = {name: [] for name in heading.split()[1:]}
        for line in lines:
            token, *numbers = line.split()
            for name, number in zip(columns, numbers, strict=True):
                columns[name].append((token, number))
        found.append([*title.split("  "), columns])
    return found


def shown(text):
    """The answers on a page without their colours, to compare with the table's."""
    return [[prompt, label, {name: [chip[:2] for chip in chips] for name, chips in columns.items()}]
            for prompt, label, columns in Reader(text).answers]


INSPECT = ("--algo", "sft", "--inspect", "all", *TASK)


@pytest.fixture
def either(monkeypatch):
    """Every other answer is right, so that an untrained model has a pair."""
    monkeypatch.setattr(tasks.Chain, "reward", staticmethod(
        lambda prompts, completions, **_: [float(len(c) % 2) for c in completions]))
    monkeypatch.setattr(tokens, "token_text",   # those of an untrained model may be spaces
                        lambda tokenizer, t: f"<{t}>&\"'é")


def test_the_figures_are_those_of_the_table(tiny_base, either, capsys, monkeypatch):
    """Prompts, labels, columns, tokens and numbers, one by one; nothing else is written. A page
    with one number changed is told from it."""
    assert run(*INSPECT, "--init_from", tiny_base, "--html", "page.html") == 0
    out = capsys.readouterr().out
    found, expected = open("page.html").read(), tables(out)
    assert shown(found) == expected and os.listdir(".") == ["page.html"]
    assert out.endswith("\n\npage: page.html\n") and len(expected) == 2
    assert [answer[1] for answer in expected] == ["chosen", "rejected"]
    assert list(expected[0][2]) == ["prob", *tokens.SIDE_BY_SIDE]
    numbers = [number for *_, columns in expected for chips in columns.values()
               for _, number in chips]
    assert len(set(numbers)) > 20 and any(float(number) < 0 for number in numbers)
    chip = page.chip
    for broken in (lambda token, number, *rest: chip(token, number.replace("-", "+"), *rest),
                   lambda token, number, *rest: chip(token, number[:-1] + "7", *rest)):
        monkeypatch.setattr(page, "chip", broken)
        with pytest.raises(AssertionError):
            run(*INSPECT, "--init_from", tiny_base, "--html", "page.html")
            assert shown(open("page.html").read()) == expected


def made_up(*weights, token="7", name="sft"):
    return page.document([{"prompt": "1=", "label": "chosen", "tokens": [
        (token, 0.25, {name: w}) for w in weights]}], {name: "imitate"})


def test_colours_by_hand():
    """The largest weight of a column is deepest, a quarter of it half as deep; blue is up, orange
    down, what rounds to 0 neither; a column of zeros is no division by 0. Probability is its own
    depth, four fifths of it."""
    [[_, _, columns]] = Reader(made_up(-8.0, 2.0, 0.0004, 0.0)).answers
    assert columns["sft"] == [("7", "-8.000", "down", 1.0), ("7", "+2.000", "up", 0.5),
                              ("7", "+0.000", "still", 0.01), ("7", "+0.000", "still", 0.0)]
    assert set(columns["prob"]) == {("7", "0.250", "known", 0.2)}
    [[_, _, columns]] = Reader(made_up(0.0)).answers
    assert columns["sft"] == [("7", "+0.000", "still", 0.0)]
    two = [{"prompt": "1=", "label": label, "tokens": [("7", 0.5, {"sft": w})]}
           for label, w in (("chosen", 1.0), ("rejected", -4.0))]
    found = Reader(page.document(two, {"sft": ""})).answers   # one scale for all answers
    assert [columns["sft"][0][3] for *_, columns in found] == [0.5, 1.0]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</b><img src=x>", "&lt;", "\"'>",
                                  "é日\ufffd", "\ud800"])
def test_what_a_model_wrote_is_text(text):
    """It is shown as it stands and never read as HTML; the file is ASCII."""
    answers = [{"prompt": text, "label": "chosen", "tokens": [(text, 0.5, {"sft": 1.0})]}]
    found = page.document(answers, {"sft": text})
    assert found.isascii() and Reader(found).tags == Reader(made_up(1.0)).tags
    [[prompt, _, columns]] = Reader(found).answers
    text = text.replace("\ud800", "\ufffd")   # half of a character, which no page can hold
    assert prompt == text and columns["sft"][0][0] == text


def test_nothing_is_loaded():
    """No script, no link, no address: what a page without a network would lack."""
    found = made_up(1.0)
    assert not Reader(found).tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not re.search(r"https?:|//|@import|url\(|src=|href=", found)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--html page.html", "--html is the page of --inspect all: give that as well"),
    ("--inspect --html page.html", "--html is the page of --inspect all: give that as well"),
    ("--inspect all --html=", "--html (empty): the name of a file is needed"),
    ("--inspect all --html .", "--html .: the name of a file is needed"),
    ("--inspect all --html mine.txt", "--html mine.txt is there already and is no page of"),
    ("--inspect all --html mine.txt/page.html", "cannot write mine.txt: Not a directory; choose "
                                                "another --html"),
    ("--inspect all --html mine.txt/below/page.html", "cannot write mine.txt/below: Not a dir"),
    ("--inspect all --html nowhere", "--html nowhere: No such file or directory; choose another"),
])
def test_a_page_that_cannot_be_written(monkeypatch, flags, expected):
    """It is said first: no minute of pre-training, no folder, just one line."""
    with open("mine.txt", "w") as file:
        file.write("<!doctype html>\n<title>my own</title>\n")
    os.symlink("gone", "nowhere")
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("something was trained"))
    assert complaint(run, *flags.split()).startswith(expected)
    assert sorted(os.listdir(".")) == ["mine.txt", "nowhere"]


def test_a_page_from_before_is_replaced():
    """Whole, and by its first lines known as one; the folder of a new one is made."""
    for path in ("page.html", "new/folder/page.html"):
        for weight in (1.0, 2.0):
            page.check(path)
            prepare.check_folder(os.path.dirname(path) or ".", "--html")
            page.write(path, made_up(weight))
            assert shown(open(path).read()) == shown(made_up(weight))
    assert sorted(os.listdir(".")) == ["new", "page.html"]


def test_a_full_disk(tiny_base, either, monkeypatch):
    """One line, and the page from before is as it was."""
    page.write("page.html", made_up(1.0))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint.os, "replace", full)
    assert complaint(run, *INSPECT, "--init_from", tiny_base, "--html", "page.html") == (
        "cannot write page.html: No space left on device; the earlier file is untouched; free some "
        "space or choose another --html")
    assert os.listdir(".") == ["page.html"] and open("page.html").read() == made_up(1.0)
