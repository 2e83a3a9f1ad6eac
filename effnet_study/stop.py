"""How training is asked to stop: by a signal, a deadline, or a file. The next call continues the run."""

import os
import signal
import threading
import time


class Interrupted(KeyboardInterrupt):
    """Training stopped on request, between two steps and with a checkpoint. The same call continues it."""

    def _render_traceback_(self) -> list[str]:  # IPython shows this instead of a traceback
        return [f"{str(self).strip()}. Run the cell again to go on."]


class ProcessKilled(RuntimeError):
    """The machine ended a training process, for example because memory ran out. The same call continues the run."""


class Stop:
    """A context in which SIGTERM and SIGINT only set `reason`. A second SIGINT, some seconds later, interrupts at once.

    deadline: Unix time before which training is to stop (default: $EFFNET_DEADLINE). Training also stops as soon as
    the file $EFFNET_STOP exists. A study sets both variables for its processes.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline or float(os.environ.get("EFFNET_DEADLINE", "inf"))
        self.file = os.environ.get("EFFNET_STOP")
        self.reason, self.last, self.interrupted = None, None, None

    def __enter__(self) -> "Stop":
        in_main = threading.current_thread() is threading.main_thread()  # only there signals can be handled
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT) if in_main}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            self.interrupted = self.interrupted or now
            if now - self.interrupted > 2:  # a launcher may repeat a signal at once
                raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def due(self, to_save: float = 1.0) -> bool:
        """Tell whether to stop now. Call it between steps. to_save: seconds that a checkpoint takes."""
        now = time.time()
        step, self.last = now - (self.last or now), now
        if now + 2 * (step + to_save) > self.deadline:
            self.reason = self.reason or "the end of its time"
        if self.file is not None and os.path.exists(self.file):
            self.reason = self.reason or "its study"
        return self.reason is not None
