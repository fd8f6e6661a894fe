"""Runs a command in a forked process that may do no harm, and judges what it said."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  # when it is imported it looks for fonts, with a program of the system
import torch

from tinyfusion_core.cli import main

CPU_SECONDS, WAITING_SECONDS, MEMORY = 20, 5.0, 6 << 30
"""Limits of a case: of processor time, of waiting for nothing, and of the address space that it may take in bytes."""
CANARY = "tinyfusion_canary"
"""A word in texts of a case that would do something if anything executed them."""
TRACEBACK = 70
SHOWWARNING = warnings.showwarning


@dataclass(frozen=True)
class Case:
    """A command on damaged input.

    Attributes:
        argv: the arguments of `tinyfusion`.
        folder: a folder of its own, in which it runs.
        told: a refusal must hold one of these words.
        what: what was damaged, for people.
        owned: what the command may change; all else in the folder must stay as it is.
        encoding: of what it prints.
    """

    argv: Sequence[str]
    folder: Path
    told: Sequence[str]
    what: str
    owned: Sequence[Path] = ()
    encoding: str = "utf-8"


@dataclass
class Outcome:
    """What a case has done: exit code (negative: the signal that killed it), its output, and how it broke the rule."""

    code: int
    text: str
    seconds: float
    faults: list[str] = field(default_factory=list)


def run(case: Case) -> Outcome:
    """Run a case and judge it."""
    before = _state(case)
    with tempfile.TemporaryFile() as said:
        reader, writer = os.pipe()
        gc.freeze()  # or the collector of the child would copy all that is here
        child = os.fork()
        if child == 0:
            os.close(reader)
            _obey(case, said.fileno(), writer)
        gc.unfreeze()
        os.close(writer)
        waited = _wait(child, reader)
        with os.fdopen(reader, "rb") as file:
            told = file.read()
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        text = said.read().decode(errors="replace")
    outcome = Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime)
    outcome.faults = json.loads(told or b"[]")
    if waited:
        outcome.faults.append(f"waits for ever ({waited})")
    _judge(case, outcome)
    outcome.faults += [f"changed {name}, which is not its own" for name in _differences(before, _state(case))]
    return outcome


def warm_up(folder: Path, argv: Sequence[str], code: int = 0) -> None:
    """Run a command here, so that cases find imported what it imports."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = main(argv)
    assert found == code, said.getvalue()


def _judge(case: Case, outcome: Outcome) -> None:
    faults = outcome.faults
    last = [line for line in outcome.text.splitlines() if line.strip()][-1:]
    if "Traceback (most recent call last)" in outcome.text or outcome.code == TRACEBACK:
        faults.append(f"a traceback: {' '.join(last)[:300]}")
    elif outcome.code not in (0, 2):
        faults.append(f"exit code {outcome.code}: {' '.join(last)[:300]}")
    elif outcome.code == 2 and "error: " not in outcome.text:
        faults.append("exit code 2 without a message")
    elif outcome.code == 2 and not any(word in outcome.text for word in case.told):
        faults.append(f"names none of {', '.join(map(repr, case.told))}: {' '.join(last)[:300]}")
    if outcome.seconds > CPU_SECONDS:
        faults.append(f"{outcome.seconds:.0f} s of CPU")


def _wait(child: int, reader: int) -> str:
    """Wait for the end of a process; one that does nothing any more is killed. Returns where it stood."""
    idle, seen = time.monotonic(), -1
    while not select.select([reader], [], [], 0.5)[0]:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        if (used := int(fields[11]) + int(fields[12])) != seen or fields[0] != "S":
            idle, seen = time.monotonic(), used
        if time.monotonic() - idle > WAITING_SECONDS:
            os.kill(child, signal.SIGKILL)
            return f"state {fields[0]} after {seen / os.sysconf('SC_CLK_TCK'):.1f} s of CPU"
    return ""


def _obey(case: Case, said: int, writer: int) -> None:
    """Run the command in this process, which ends with it."""
    code, faults = TRACEBACK, list[str]()
    try:
        _confine(case, said)
        sys.addaudithook(_guard(case, faults))
        code = main(list(case.argv))
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except ValueError as e:
                faults.append(f"cannot be printed: {e}")
        os.write(writer, json.dumps(faults[:5]).encode())
        os._exit(code)


def _confine(case: Case, said: int) -> None:
    os.setpgid(0, 0)
    gc.disable()  # it lives for a moment
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = open(1, "w", encoding=case.encoding, closefd=False)  # noqa: SIM115  # as long as it lives
    sys.stderr = open(2, "w", encoding=case.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(case.folder)
    (case.folder / ".tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(case.folder / ".tmp")
    os.environ.update(TMPDIR=tempfile.tempdir, XDG_CACHE_HOME=f"{case.folder}/.tmp/cache", COLUMNS="100")
    sys.dont_write_bytecode = True
    warnings.resetwarnings()
    warnings.showwarning = SHOWWARNING
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS + 1, CPU_SECONDS + 2))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # After a fork torch makes its pool of threads anew, and aborts ("Invalid thread pool!") if two threads, this one
    # and one of autograd's, are the first to ask for it at the same time.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "os.fork", "os.forkpty",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.rmtree": (0,),
}  # fmt: skip
"""Audit events that change files, and which of their arguments are the files."""


def _guard(case: Case, faults: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """The audit hook of a case: it writes down what is not allowed, and stops it."""
    allowed = [os.path.realpath(path) for path in (*case.owned, case.folder / ".tmp")]

    def check(path: Any, directory: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        at = f"/proc/self/fd/{directory}"
        start = str(Path(at).readlink()) if isinstance(directory, int) and directory >= 0 else "."
        name = os.path.join(start, os.fsdecode(path))  # noqa: PTH118
        parent, last = os.path.split(os.path.abspath(name))  # noqa: PTH100
        real = os.path.join(os.path.realpath(parent), last)  # noqa: PTH118
        if real != os.devnull and not any(real == a or real.startswith(f"{a}/") for a in allowed):
            stop(f"changes {real}")

    def stop(what: str) -> None:
        faults.append(what)
        raise PermissionError(f"not allowed here: {what}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            check(args[0] if isinstance(args[0], int) else os.path.realpath(os.fsdecode(args[0])), None)
        elif event in CHANGES:
            directories = [arg for arg in args if isinstance(arg, int)] if event in ("os.remove", "os.rmdir") else []
            for place in CHANGES[event]:
                check(args[place], directories[-1] if directories else None)
        elif event in FORBIDDEN:
            stop(f"{event} {args!r}"[:200])
        elif event in ("compile", "import") and any(isinstance(a, (str, bytes)) and CANARY in str(a) for a in args):
            stop(f"{event} of a text of the input")

    return hook


def _state(case: Case) -> dict[str, tuple[Any, ...]]:
    """Every file of the folder that is not the command's own, with what would change if it were written to."""
    owned, found = {str(path) for path in (*case.owned, case.folder / ".tmp")}, dict[str, tuple[Any, ...]]()
    for place, folders, files in os.walk(case.folder):
        folders[:] = [name for name in folders if f"{place}/{name}" not in owned]
        for name in (*folders, *files):
            if (path := f"{place}/{name}") not in owned:
                status = os.lstat(path)
                when = 0 if name in folders else status.st_mtime_ns
                found[path] = (status.st_ino, status.st_mode, when)
    return found


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))[:3]
