"""The process in which papermill executes one notebook. notebook.py starts it by its path, with two arguments: those of
papermill.execute_notebook as JSON, and the process number of the starter.

It must not end before its kernel, and must not outlive its starter. So prctl and the signal handlers come first, and
slow imports, such as papermill or the package effnet_study, come later or not at all.
"""

import ctypes
import json
import os
import signal
import sys


def main(arguments: str, starter: int) -> None:
    """Execute the notebook and exit: 0, 1 after an error, or one of the statuses that notebook.py reads."""
    # PR_SET_PDEATHSIG: the kernel kills this process when its starter ends. Linux only.
    getattr(ctypes.CDLL(None), "prctl", lambda *_: None)(1, signal.SIGKILL)
    if os.getppid() != starter:  # it ended before the call
        sys.exit(os.EX_SOFTWARE)
    # Slurm's warning (SIGUSR2) goes to every process of a job but is meant for submitit's; the kernel inherits this
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # SIGTERM and SIGINT are meant for training: this process waits for the kernel, which stops
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    import nbclient
    import papermill

    statuses = {"Interrupted": os.EX_TEMPFAIL, "ProcessKilled": os.EX_SOFTWARE, "RunLocked": os.EX_UNAVAILABLE}
    try:
        papermill.execute_notebook(**json.loads(arguments), stdout_file=sys.stdout, stderr_file=sys.stderr)
    except papermill.PapermillExecutionError as error:
        clear = error.ename in ("Interrupted", "RunLocked")
        print(error.evalue if clear else f"{error.ename}: {error.evalue}", file=sys.stderr)
        sys.exit(statuses.get(error.ename, 1))
    except nbclient.exceptions.DeadKernelError:
        sys.exit(os.EX_SOFTWARE)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
