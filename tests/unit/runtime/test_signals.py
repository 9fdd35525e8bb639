"""A run that is told to stop, or whose terminal is closed, saves and leaves by itself."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from leap_dist.runtime.reporting import STDERR, complain
from leap_dist.runtime.signals import STOPPING, Interrupt

# A loop with a bar, a log and a library's prints; what it "saves" is a file. It tells by a line that it has begun.
LOOP = """
import sys, time
from pathlib import Path
from tqdm import tqdm
from leap_dist.runtime.reporting import STDERR, forget_lost_output
from leap_dist.runtime.signals import Interrupt
with Interrupt() as interrupt, tqdm(file=STDERR, mininterval=0) as bar:
    STDERR.write("begun\\n")
    STDERR.flush()
    for _ in range(1000):
        bar.update()
        time.sleep(0.01)
        if interrupt.requested:
            break
    for _ in range(50):
        print("a library's print", flush=True)
    time.sleep(0.3)
    Path(sys.argv[1]).write_text("saved" if interrupt.requested else "to the end")
    interrupt.over()
STDERR.write("stopped\\n")
forget_lost_output()
"""


def begun(descriptor: int) -> None:
    seen = b""
    while b"begun" not in seen:
        assert wait([descriptor], 60), "nothing for a minute"
        seen += os.read(descriptor, 1 << 16)


@pytest.mark.parametrize("sent", STOPPING)
def test_a_signal_is_noted_and_the_next_one_too(sent: int) -> None:
    before = signal.getsignal(sent)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        for _ in range(2):
            os.kill(os.getpid(), sent)
        assert interrupt.requested
    assert signal.getsignal(sent) is before
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2} == set(STOPPING)


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_lets_the_run_save(tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    saved = tmp_path / "saved"
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", LOOP, str(saved)])
    begun(terminal)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert saved.read_text() == "saved"


@pytest.mark.parametrize("told", [True, False])
def test_a_reader_that_has_left_stops_nothing(told: bool, tmp_path: Path) -> None:
    """`2>&1 | tee log`, whose tee is gone: the run saves where it is told to stop, else it goes on."""
    saved = tmp_path / "saved"
    loop = LOOP if told else LOOP.replace("range(1000)", "range(50)")
    run = subprocess.Popen([sys.executable, "-c", loop, saved], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    begun(run.stdout.fileno())
    run.stdout.close()
    if told:
        run.send_signal(signal.SIGHUP)
    assert run.wait() == 0
    assert saved.read_text() == ("saved" if told else "to the end")


def test_lines_that_nobody_can_read_raise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    complain("nobody reads this")
    assert STDERR.write("nor this") == len("nor this")
