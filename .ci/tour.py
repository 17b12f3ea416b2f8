"""Run tour.ipynb from top to bottom in a fresh kernel, into out/tour.ipynb. The first error ends
it, with exit code 1; so does a missing picture, or more than four minutes of two cores."""

import os
import resource
import sys
import time

import nbformat
from nbclient import NotebookClient

SECONDS, CORES, PICTURES = 240, 2, 6   # pictures: of pixels; the page of section 3 is HTML

started = time.time()
notebook = nbformat.read("tour.ipynb", as_version=4)
NotebookClient(notebook, kernel_name="python3", timeout=1200).execute()
os.makedirs("out", exist_ok=True)
nbformat.write(notebook, "out/tour.ipynb")
wall, used = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
pictures = sum("image/png" in output.get("data", {}) for output in outputs)
processor = used.ru_utime + used.ru_stime
print(f"tour.ipynb: {wall:.0f} s, {processor:.0f} s of processor time, {pictures} pictures")
if pictures != PICTURES or processor > SECONDS * CORES:
    sys.exit(f"tour.ipynb: {PICTURES} pictures and at most {SECONDS * CORES} s of processor time "
             "are expected")
