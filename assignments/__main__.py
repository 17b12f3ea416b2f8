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
    make.add_argument("--out", type=pathlib.Path, help="a new folder")
    make.add_argument("--students", type=pathlib.Path, metavar="FILE",
                      help="7: a name a line; each gets a folder in --out")
    make.add_argument("--key", action="store_true", help="7: print what is planted, for yourself")
    grade = commands.add_parser("grade", help="points for students' folders", allow_abbrev=False)
    grade.add_argument("number", metavar="N", help="which assignment (what a folder says of "
                       "itself is not believed)")
    grade.add_argument("folders", nargs="+", type=pathlib.Path, metavar="FOLDER")
    grade.add_argument("--out", type=pathlib.Path, default=pathlib.Path("grades"),
                       help="where FOLDER/results.json are written (default: grades)")
    for command in (make, grade):
        command.add_argument("--salt", default="", help="a secret: the seed of the hidden tests; "
                             "7: with the student's name it decides which bugs are planted")
        command.add_argument("--student", metavar="NAME", help="7: whose bugs (grade: the folder's "
                             "name, if no other is given)")
        command.add_argument("--level", type=int, default=2, choices=(1, 2, 3), help="7: 1 the "
                             "curve, 2 file and consequence, 3 the consequence alone [2]")
    grade.add_argument("--jobs", type=int, default=1, help="how many folders at a time")
    grade.add_argument("--seconds", type=float, default=20, help="for one call of a body")
    return parser.parse_args(words)


def main(words):
    asked = parse(words)
    if asked.command == "make" and not asked.out and not asked.key:
        raise InputError("the following arguments are required: --out")
    if asked.command == "grade" and (asked.jobs < 1 or asked.seconds <= 0):
        raise InputError("--jobs and --seconds: numbers above 0")
    if asked.number in ("7", "bugs"):
        from assignments import bugs
        return (bugs.make_command if asked.command == "make" else bugs.grade_command)(asked)
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
    from assignments.grade import grade
    grade(assignment, asked.folders, asked.out, asked.salt, asked.seconds, asked.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(one_line(lambda: main(sys.argv[1:])))
