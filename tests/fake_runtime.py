"""A TFLite interpreter for tests of what can go wrong: its files say what it shall do.

A file's bytes are JSON after the four bytes and the identifier of a TFLite file: {"do": "crash"}, and so on.
"""

MODULE = """
import json, os, signal, sys, time
import numpy as np

class Interpreter:
    def __init__(self, model_path, num_threads=1, **_):
        self.order = json.loads(open(model_path, "rb").read()[8:])
        self.runs = 0
        if self.order["do"] == "refuse":
            raise ValueError("this file is not for us")
        if self.order["do"] == "clock-back":
            interleave = sys.modules["edgepress_agent.turns"].interleave
            clock, begin = interleave.__defaults__
            self.back = [0]
            interleave.__defaults__ = (lambda: clock() - self.back[0], begin)

    def allocate_tensors(self):
        pass

    def get_input_details(self):
        return [{"index": 0, "shape": np.array([1, 4])}]

    def get_output_details(self):
        return [{"index": 1, "shape": np.array([1, 4])}]

    def set_tensor(self, index, value):
        self.value = value

    def invoke(self):
        self.runs += 1
        do, after = self.order["do"], self.order.get("after", 0)
        if do == "double" or self.runs <= after:
            return
        if do == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if do == "clock-back":
            self.back[0] += 10**10
        if do == "hang":
            time.sleep(600)
        if do == "starve":
            self.value = bytearray(1 << 50)
        if do == "wait":
            time.sleep(self.order["seconds"])
        if do == "kill-agent":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        if do == "lie":
            raise ValueError("bad" + chr(27) + "[2J news")

    def get_tensor(self, index):
        return self.value * 2
"""


def install(folder):
    """Write the module where a path can find it."""
    package = folder / "tflite_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0'\n")
    (package / "interpreter.py").write_text(MODULE)
    return folder
