"""The one exception that a user is meant to see, and how programs end."""

import os
import sys
import time


class InputError(ValueError):
    """A mistake that the user can correct. It is printed as one line; the exit code is 2."""


def wait_for_rank_0():
    """Of several processes (harness/ranks.py) that meet the same mistake, the first one says so,
    and torchrun ends the others."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(3)


def one_line(main):
    """Call main and return its exit code; what goes wrong for the user ends in one line."""
    try:
        return main()
    except InputError as error:
        wait_for_rank_0()
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:    # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NotImplementedError as error:   # of an assignment (assignments/)
        if "yours to write" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:   # a full disk, a folder that may not be read
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
    return 2
