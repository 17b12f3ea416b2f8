"""
Assignments for a course, cut from the project's own files and graded by its own tests.

    python -m assignments make 6 --out FOLDER       a student's copy, with the bodies missing
    python -m assignments grade 6 FOLDER FOLDER     points, a table, a results.json for each

table.py      the assignments: what is cut, what is required, what it is worth
make.py       a student's copy
check.py      what a student runs in it; bodies and signatures taken apart
walk.py       assignment 0, in which nothing is cut; answers.py is what a student runs in it
grade.py      many folders: processes, table, results.json
judge.py      one folder: the tests, in a process that never runs the student's code
worker.py     the student's code, in a process of its own that knows no test
wire.py       what the two say to each other
handouts/     what a student is given; instructor/ and hidden/ are never copied
"""
