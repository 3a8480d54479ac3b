"""SSH end to end, against a real sshd on this computer."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_devices import FEED, QUICK, order, temporary, tried, until  # noqa: F401 - fixtures

from edgepress.compress.errors import DeviceError
from edgepress.targets.devices import Job, find_device
from edgepress.targets.measure import Measurement, Plan

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin")
pytestmark = pytest.mark.skipif(SSHD is None, reason="there is no sshd on this computer")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().split()[:2]


@pytest.fixture
def board(tmp_path, temporary, monkeypatch):  # noqa: F811
    """An sshd with keys of its own, and an ssh configuration that knows it. Yields (port, folder with the files)."""
    host, _ = key(tmp_path / "host"), key(tmp_path / "login")
    port = free_port()
    (tmp_path / "authorized").write_text((tmp_path / "login.pub").read_text())
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/authorized\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile {tmp_path}/pid\n"
        f'SetEnv "PYTHONPATH={os.environ["PYTHONPATH"]}" "TMPDIR={temporary}"\n'
    )
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {' '.join(host)}\n")
    (tmp_path / "ssh_config").write_text(
        f"Host *\n  IdentityFile {tmp_path}/login\n  IdentitiesOnly yes\n  UserKnownHostsFile {tmp_path}/known\n"
        "  GlobalKnownHostsFile /dev/null\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.PIPE)
    monkeypatch.setenv("EDGEPRESS_SSH", f"ssh -F {tmp_path}/ssh_config")
    try:
        until(lambda: listens(port))
        yield port, tmp_path
    finally:
        server.terminate()
        server.communicate()
    until(lambda: not any(temporary.iterdir()))


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def device(port, python=sys.executable):
    return find_device(f"ssh://127.0.0.1:{port}?python={python}")


class Wire:
    """A connection to the board that is slow, and can be cut."""

    def __init__(self, port, delay_s=0.0):
        self.delay_s, self.target = delay_s, port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.ends, self.threads = [], []
        self._start(self._serve)

    def _start(self, work, *arguments):
        self.threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self.threads[-1].start()

    def _serve(self):
        with contextlib.suppress(OSError):
            near, _ = self.listener.accept()
            far = socket.create_connection(("127.0.0.1", self.target))
            self.ends = [near, far]
            self._start(self._pump, near, far)
            self._start(self._pump, far, near)

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                time.sleep(self.delay_s)
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)

    def cut(self):
        for end in (self.listener, *self.ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.cut()
        for thread in self.threads:
            thread.join(5)
        for end in (self.listener, *self.ends):
            end.close()


@contextlib.contextmanager
def wired(port, folder, delay_s=0.0):
    wire = Wire(port, delay_s)
    known = folder / "known"
    known.write_text(known.read_text() + known.read_text().replace(str(port), str(wire.port)))
    try:
        yield wire
    finally:
        wire.close()


def test_a_board_must_be_probed_measured_and_predict(board, order):  # noqa: F811
    port, _ = board
    place = device(port)
    found = place.environment()
    assert found["device"] == f"ssh://127.0.0.1:{port}"
    assert found["cores"] >= 1
    [measured] = tried([order("double")], place)
    assert isinstance(measured, Measurement)
    assert measured.device == f"ssh://127.0.0.1:{port}"
    assert measured.p50_ns > 0
    far = place.open(order("double"), 1, "tflite-runtime")
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    np.testing.assert_array_equal(far.predict(x), 2 * x)
    place.close()


def test_a_slow_connection_must_not_enter_the_latency(board, order):  # noqa: F811
    port, folder = board
    with wired(port, folder, delay_s=0.02) as wire:
        place = device(wire.port)
        asked = time.perf_counter()
        place._link.ask("unlock")
        assert time.perf_counter() - asked > 0.02
        [measured] = tried([order("wait", seconds=0.002)], place)
        assert 2e6 <= measured.p50_ns < 2e7
        place.close()


def test_a_connection_that_is_cut_must_be_one_sentence_and_leave_nothing(board, order):  # noqa: F811
    port, folder = board
    with wired(port, folder) as wire:
        place = device(wire.port)
        place.environment()
        threading.Timer(1.0, wire.cut).start()
        with pytest.raises(DeviceError, match=rf"The connection to ssh://127.0.0.1:{wire.port} was lost|cannot be reached"):
            tried([order("wait", seconds=0.01)], place, Plan(rounds=1000, budget_s=60))
        place.close()


@pytest.mark.parametrize("fault", ["port", "key", "unknown", "changed", "python", "old"])
def test_what_is_wrong_with_a_board_must_be_said_in_one_sentence(board, fault, tmp_path):
    port, folder = board
    place, match = device(port), ""
    if fault == "port":
        port = free_port()
        place, match = device(port), rf"ssh://127.0.0.1:{port} cannot be reached: .*refused"
    elif fault == "key":
        (folder / "authorized").write_text("")
        match = "refuses the login: no key of yours"
    elif fault == "unknown":
        (folder / "known").write_text("")
        match = "is not known here: connect once with ssh"
    elif fault == "changed":
        (folder / "known").write_text(f"[127.0.0.1]:{port} {' '.join(key(tmp_path / 'other'))}\n")
        match = "has changed since the last connection"
    elif fault == "python":
        place, match = device(port, "/no/such/python"), "There is no /no/such/python on ssh"
    elif fault == "old":
        old = tmp_path / "old python"
        old.write_text("#!/bin/sh\necho 'SyntaxError: invalid syntax' >&2; exit 1\n")
        old.chmod(0o755)
        place, match = device(port, str(old).replace(" ", "%20")), "cannot run the agent: SyntaxError"
    with pytest.raises(DeviceError, match=match):
        place.environment()
    place.close()


def test_a_runtime_that_the_board_lacks_must_be_named(board, order):  # noqa: F811
    port, _ = board
    place = device(port)
    found = place.check(Job(order("double"), [FEED], "tensorflow"))
    assert f"tensorflow is not installed on ssh://127.0.0.1:{port}: python3 -m pip install tensorflow" in str(found.error)
    place.close()


def test_a_board_whose_agent_is_killed_must_be_swept_the_next_time(board, order, temporary):  # noqa: F811
    port, _ = board
    place = device(port)
    with pytest.raises(DeviceError, match="was lost"):
        tried([order("kill-agent", after=4)], place, QUICK)
    place.close()
    again = device(port)
    again.environment()
    again.close()
    until(lambda: not any(temporary.iterdir()))
