"""Work in processes of its own, a few at a time."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Processes:
    """Runs functions, `jobs` at a time, each in a process of its own: none inherits the memory of another, and none
    outlives the parent."""

    def __init__(self, jobs: int):
        self.context = multiprocessing.get_context("spawn")
        self.threads = ThreadPoolExecutor(jobs)
        self.children: list[Any] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for child in self.children:
            child.terminate()  # a run that is under way goes on from its checkpoint another time
        self.threads.shutdown()

    def start(self, task: Callable, *arguments: Any, report: Callable[[Any], None] | None = None) -> Future:
        """task(*arguments), or with `report` task(*arguments, report), where each call of it is heard here."""
        return self.threads.submit(self._follow, task, arguments, report)

    def _follow(self, task: Callable, arguments: tuple, report: Callable[[Any], None] | None) -> Any:
        ours, theirs = self.context.Pipe(duplex=False)
        child = self.context.Process(target=_child, args=(theirs, task, arguments, report is not None), daemon=True)
        self.children.append(child)
        child.start()
        theirs.close()
        try:
            while True:
                kind, value = ours.recv()
                if kind == "result":
                    return value
                if kind == "error":
                    raise value
                if report is not None:
                    report(value)
        except EOFError:
            child.join()
            # Killed for memory, say: -9. Whatever happened, the same command goes on from here.
            raise ChildProcessError(f"a run ended without a result (exit code {child.exitcode})") from None
        finally:
            child.join()


def _child(pipe: Any, task: Callable, arguments: tuple, reports: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    try:
        extra = (lambda value: pipe.send(("report", value)),) if reports else ()
        pipe.send(("result", task(*arguments, *extra)))
    except (ValueError, OSError, FloatingPointError) as error:  # bad input; anything else is a defect, and shows itself
        pipe.send(("error", error))
