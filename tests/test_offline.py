import os
import subprocess
import sys

RECORD = """
import socket, sys, threading
record = sys.argv[1]

def refuse(name):
    def call(*args, **kwargs):
        with open(record, "a") as file:
            file.write(f"{name} {args[1:] or args}\\n")
        raise OSError("no network in this test")
    return call

socket.socket.connect = refuse("connect")
socket.socket.connect_ex = refuse("connect_ex")
socket.socket.sendto = refuse("sendto")
socket.getaddrinfo = refuse("getaddrinfo")
socket.gethostbyname = refuse("gethostbyname")
"""

EXPORT = """
import torch
from edgepress.compress.network import trace
from edgepress.targets.export import export
from edgepress.targets.runtimes import open_runtime
from edgepress.targets.verify import verify

network = trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(1, 4))
for name in ("net.onnx", "net.tflite"):
    for precision in ("fp32", "int8"):
        artifact = export(network, f"{sys.argv[2]}/{name}", precision, [torch.randn(8, 4)])
        assert verify(artifact, network).ok
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join(5)
"""

LOOKUP = """
import urllib.request
try:
    urllib.request.urlopen("http://example.invalid/", timeout=1)
except OSError:
    pass
"""


def run(code, tmp_path, **environment):
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    # variables by which telemetry guesses that it runs in somebody's CI would hide what a user's machine does
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    kept.update(HOME=str(home), **environment)
    record = tmp_path / "record"
    record.write_text("")
    command = [sys.executable, "-c", RECORD + code, str(record), str(tmp_path)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return record.read_text(), done, home


def test_export_must_attempt_no_connection_and_say_nothing(tmp_path):
    record, done, home = run(EXPORT, tmp_path)
    assert record == ""
    assert done.stdout == ""
    assert done.stderr == ""
    assert not [path for path in home.rglob("*") if "telemetry" in str(path).lower()]


def test_the_record_must_show_an_attempt(tmp_path):
    record, _, _ = run(LOOKUP, tmp_path)
    assert "getaddrinfo" in record
