"""What workers say to whoever started the run: lines to print, and numbers that are answered.

Both go through small actors on the driver's node. One that dies is started again by Ray: lines that it
held are lost, the run is not.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Tell = Callable[[dict[str, Any]], bool]  # a row of validation.jsonl -> stop here?
ASK_AGAIN = 30.0  # seconds after which a worker that waits for an answer asks once more
SAY_AGAIN = 30.0  # seconds between two lines that say what is waited for
CLOSE_SECONDS = 5.0  # that the end of a run waits for the last lines
HEARD = "\0"  # sent by a worker that has begun


def _line() -> Queue:
    """Return a queue that lives as long as this node does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return Queue(actor_options=options)


class Outbox:
    """A worker's end: what is written here the driver prints."""

    def __init__(self, lines: Queue, answers: Queue | None = None) -> None:
        self.lines, self.answers = lines, answers

    def begin(self) -> None:
        """Say that this worker runs."""
        self.write(HEARD)

    def write(self, text: str) -> None:
        """Send the text; training goes on without waiting for it to be printed."""
        self.lines.actor.put_nowait.remote(text)  # type: ignore[attr-defined]

    def tell(self, numbers: dict[str, Any]) -> bool:
        """Send numbers, which have a `step`, on the same way and wait for the answer: whether to stop."""
        assert self.answers is not None
        while True:
            self.lines.actor.put_nowait.remote(numbers)  # type: ignore[attr-defined]
            with suppress(Empty):  # lost with an actor that died: ask again
                while True:
                    step, stop = self.answers.get(timeout=ASK_AGAIN)
                    if step == numbers["step"]:  # else meant for a worker that died before it could hear it
                        return stop

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        """A live line would not survive the way."""
        return False


class Printer:
    """The driver's end: prints the workers' lines as they come, free of the prefixes of Ray's own log.

    tell: takes the numbers that come on the same way. waits_for: said while no worker has begun.
    """

    def __init__(self, tell: Tell | None = None, waits_for: str = "the workers") -> None:
        self.lines, self.tell, self.waits_for = _line(), tell, waits_for
        self.answers = _line() if tell else None
        self.told: dict[int, bool] = {}
        self.started = time.monotonic()
        self.heard = self.closing = False
        self.thread = threading.Thread(target=self._print, daemon=True)
        self.thread.start()

    def _print(self) -> None:
        while True:
            try:
                sent = self.lines.get(timeout=SAY_AGAIN)
            except (Empty, queue.Empty):
                self._say_waiting()
                continue
            except RayError:  # Ray itself is gone: the run ends too, and says so
                return
            if sent is None:
                return
            self.heard = True
            if isinstance(sent, str):
                if sent != HEARD:
                    print(sent, end="", file=sys.stderr, flush=True)
            else:
                self._answer(sent)

    def _say_waiting(self) -> None:
        if not self.heard:
            seconds = time.monotonic() - self.started
            print(f"waiting for {self.waits_for} to start ({seconds:.0f} s)", file=sys.stderr, flush=True)

    def _answer(self, numbers: dict[str, Any]) -> None:
        """Answer numbers; those that came before are answered as they were."""
        assert self.tell is not None
        assert self.answers is not None
        step = numbers["step"]
        stop = False
        try:
            stop = self.told[step] if step in self.told else self.tell(numbers)
        finally:
            self.told[step] = stop
            with suppress(RayError):
                self.answers.put((step, stop))

    def close(self) -> None:
        """Print what is left and stop; where Ray is gone, at once."""
        with suppress(RayError):
            self.lines.actor.put_nowait.remote(None)  # type: ignore[attr-defined]
        self.thread.join(CLOSE_SECONDS)
        for line in (self.lines, self.answers):
            if line is not None:  # an empty queue is false
                with suppress(RayError):
                    line.shutdown(force=True)
