"""The processes that execute notebooks: started ahead of time, and ended with all that they started."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

__all__ = ["MARK", "Workers", "end_marked", "start"]

MARK = "SAMLIB_NOTEBOOK"  # in the environment of a kernel and all that it starts: the notebook being executed


class Workers:
    """Processes that have imported papermill and wait for a notebook, so that the next one need not."""

    def __init__(self) -> None:
        self._ready: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def take(self) -> subprocess.Popen[bytes]:
        """A process, and start its successor."""
        try:
            process = self._ready.pop()
        except IndexError:
            process = start()
        if not self._closed:
            self._ready.append(start())
        return process if process.poll() is None else start()

    def close(self) -> None:
        """End those that still wait."""
        self._closed = True
        while self._ready:
            process = self._ready.pop()
            process.kill()
            process.communicate()


def start() -> subprocess.Popen[bytes]:
    """A process that waits for a notebook."""
    # In a session of its own: Ctrl-C is for this process, which then ends the other. A notebook's text is UTF-8 on
    # every machine, so its cells' files are, too.
    command, env = [sys.executable, "-m", "samlib.sweeps"], {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=env)


def end_marked(mark: str) -> None:
    """End all processes with a mark: a kernel and what it started, also if the kernel itself is dead already; and what
    these started in turn, or has their session, with an environment of its own.

    Process groups would not do: who starts a server or a launcher of its own often gives it a group of its own.
    """
    import psutil

    mine = os.getsid(0) if hasattr(os, "getsid") else None

    def session(process: Any) -> int | None:
        with suppress(OSError, AttributeError):
            return os.getsid(process.pid)
        return None

    def mark_of(process: Any) -> str | None:
        try:
            return process.environ().get(MARK)
        except (psutil.Error, OSError):  # of another user, or gone
            return None

    for _ in range(20):  # what is being ended may just have started another
        every = [process for process in psutil.process_iter() if process.pid != os.getpid()]
        found = {process for process in every if mark_of(process) == mark}
        if not found:
            return
        sessions = {session(process) for process in found} - {mine, None}
        found |= {process for process in every if session(process) in sessions}
        for process in list(found):
            with suppress(psutil.Error):
                found |= set(process.children(recursive=True))
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)
