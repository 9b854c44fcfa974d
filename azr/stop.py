"""Signals as an orderly stop: Ctrl-C, SIGTERM (a spot notice), SIGHUP (a closed terminal) and SIGUSR1 (save now).

    with StopRequest() as stop:
        try:
            compute()                           # StopNow comes up anywhere in here, in the main thread
            with stop.shield(): record()        # but not in here: what must not be left half done
        except StopNow:
            with stop.shield(): save()

A handler runs between two bytecodes, so a stop waits for the matrix product (on a GPU: the micro-batch) in progress and
for nothing else. Standard library only; can be lifted out.

Left out: a handler while Python itself still starts (nothing can be lost then), Windows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

DUPLICATE_SECONDS = 0.1  # a launcher that forwards Ctrl-C delivers it twice: one request
AGAIN_SECONDS = 0.05  # until a stop that Python has dropped is raised again


class StopNow(BaseException):
    """A stop was requested: drop the step in progress, save the snapshot taken at its start, exit 0.

    Not an Exception, so that code which catches those (a retry after out-of-memory) lets it through.
    """


class StopRequest:
    """SIGINT, SIGTERM, SIGHUP as `StopNow` in the main thread; a second one ends the process at once (exit code 130).

    Inside `shield()` the request waits for the end of the block. Under nohup SIGHUP stays ignored; it never counts as
    the second request, since terminals and shells send several. SIGUSR1 sets `save_requested`; who has saved sets it
    back.
    """

    def __init__(self, duplicate_seconds: float = DUPLICATE_SECONDS) -> None:
        self.duplicate_seconds = duplicate_seconds
        self.requested: str | None = None  # name of the signal
        self.save_requested = False
        self._shields, self._deferred, self._when, self._old = 0, False, 0.0, {}

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._old = {number: signal.signal(number, self._on_stop) for number in numbers}
        self._old[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        self._old[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_again)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable

    def _on_save(self, number: int, frame: object) -> None:
        self.save_requested = True

    def _on_stop(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self.requested is not None:
            if number == signal.SIGHUP or time.monotonic() - self._when < self.duplicate_seconds:
                return
            if self.requested != "SIGHUP":
                self._tell(f"{name}: second request, quitting at once without saving")
                os._exit(130)
            self.requested, self._when = name, time.monotonic()  # a session that is closed: SIGHUP, then SIGTERM
            return
        self.requested, self._when = name, time.monotonic()
        self._tell(f"{name}: stopping; a second one quits at once")
        self._deferred = bool(self._shields)
        self.check()

    def _leave_terminal(self) -> None:
        """Sends what is still printed nowhere if the terminal is gone: each line would end in an error."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    def _on_unraisable(self, what) -> None:
        # Python drops what is raised while a finalizer or a callback runs: once more, when it is over.
        if issubclass(what.exc_type, StopNow):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        else:
            self._unraisable(what)

    def _on_again(self, number: int, frame: object) -> None:
        self._deferred = bool(self._shields)
        self.check()

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{text}\n".encode())  # not print: the handler may have interrupted one

    def check(self) -> None:
        """Raises StopNow if a stop was requested, unless shielded."""
        if self.requested and not self._shields:
            raise StopNow(self.requested)

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Holds a request back until the block ends, also when it ends by an exception. Shields nest.

        For what must not be left half done. Keep it short: a spot instance is gone 30 s after its SIGTERM.
        """
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
            if self._deferred and not self._shields:
                self._deferred = False
                raise StopNow(self.requested)
