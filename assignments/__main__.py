"""python -m assignments make ..., python -m assignments grade ...: see the README's section."""

import argparse
import pathlib
import sys

from assignments import table
from harness.errors import InputError, one_line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; python -m assignments --help")


def parse(words):
    parser = Parser(prog="python -m assignments", description=table.overview(),
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make | grade")
    make = commands.add_parser("make", help="a student's copy", allow_abbrev=False)
    make.add_argument("number", metavar="N", help="which assignment")
    make.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    grade = commands.add_parser("grade", help="points for students' folders", allow_abbrev=False)
    grade.add_argument("number", metavar="N", help="which assignment (what a folder says of "
                       "itself is not believed)")
    grade.add_argument("folders", nargs="+", type=pathlib.Path, metavar="FOLDER")
    grade.add_argument("--out", type=pathlib.Path, default=pathlib.Path("grades"),
                       help="where FOLDER/results.json are written (default: grades)")
    grade.add_argument("--salt", default="", help="a secret: the seed of the hidden tests")
    grade.add_argument("--jobs", type=int, default=1, help="how many folders at a time")
    grade.add_argument("--seconds", type=float, default=20, help="for one call of a body")
    return parser.parse_args(words)


def main(words):
    asked = parse(words)
    assignment = table.assignment(asked.number)
    if asked.command == "make":
        from assignments.make import make
        make(assignment, asked.out)
        print(f"Assignment {assignment.number}, {assignment.title}: {asked.out}; there, "
              "`python check.py`")
        return 0
    if assignment.number == 0:
        from assignments import walk
        walk.grade_all(asked.folders, asked.out)
        return 0
    if not assignment.bodies:
        raise InputError(f"assignment {assignment.number} is graded by hand, with the rubric in "
                         "assignments/reports/rubric.md; `python check.py` in a folder looks for "
                         "the report's parts and compares its tables with the runs")
    if asked.jobs < 1 or asked.seconds <= 0:
        raise InputError("--jobs and --seconds: numbers above 0")
    from assignments.grade import grade
    grade(assignment, asked.folders, asked.out, asked.salt, asked.seconds, asked.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(one_line(lambda: main(sys.argv[1:])))
