"""Programs for ``onnx-dl run``: small, each with something of Python that is easily done otherwise."""

from __future__ import annotations

import compileall
import zipfile
from pathlib import Path
from typing import Final

STATE: Final = """
import os, sys
names = {name: str(value) for name, value in globals().items() if not name.startswith("names")}
print(type(__builtins__), {name: value for name, value in names.items() if "object at" not in value})
print(type(__loader__), sys.modules["__main__"].__dict__ is globals())
print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.warnoptions, sys._xoptions)
print(sorted(sys.modules), sorted(sys.path_importer_cache))
print(sorted(os.environ.items()), [os.environ[name] for name in os.environ if name.startswith("ONNX_DL_RUN")])
print(sys.stdin is None, sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering, __debug__)
print(sorted(os.listdir("/proc/self/fd")))
"""

FILES: Final = {
    "state.py": STATE,
    "state": STATE,
    "folder/state.py": STATE,
    "package/__init__.py": "",
    "package/__main__.py": STATE,
    "package/part.py": "from . import __name__ as n\n" + STATE,
    "bare/__init__.py": "",
    "whole/__main__.py": "import beside\n" + STATE,
    "whole/beside.py": "",
    "raises.py": """
def deep():
    try:
        1 / 0
    except ZeroDivisionError as error:
        try:
            raise KeyError("context")
        except KeyError:
            raise ValueError("cause") from error
deep()
""",
    "group.py": "raise ExceptionGroup('several', [ValueError(1), ExceptionGroup('more', [KeyError(2)])])",
    "syntax.py": "x = 1\ndef f(:\n",
    "binary": "\0\1\2",
    "exits.py": "import sys\nsys.exit({'none': None, 'seven': 7, 'text': 'in words'}[sys.argv[1]])",
    "interrupted.py": "import os, signal\nprint('so far', flush=True)\nos.kill(os.getpid(), signal.SIGINT)\n",
    "excepthook.py": """
import sys, traceback
def hook(kind, error, tb):
    print(kind, error, [frame.name for frame in traceback.extract_tb(tb)], tb.tb_frame.f_back)
sys.excepthook = hook
import threading
threading.excepthook = lambda args: hook(args.exc_type, args.exc_value, args.exc_traceback)
t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()
raise ValueError("mine")
""",
    "frames.py": """
import inspect, sys, traceback
def mine():
    print([info.filename for info in inspect.stack()], sys._getframe(1).f_back)
    traceback.print_stack()
mine()
print(inspect.getsource(mine), inspect.getmodule(mine))
""",
    "outlives.py": """
import sys, threading
main = sys.modules["__main__"]
def later():
    threading.main_thread().join()
    print(sys.modules["__main__"] is main, main.__dict__["kept"], sys.argv)
kept = "kept"
threading.Thread(target=later).start()
""",
    "threads.py": """
import sys, threading
for work in (lambda: sys.exit(5), lambda: 1 / 0):
    t = threading.Thread(target=work, name="worker"); t.start(); t.join()
""",
    "spawns.py": """
import multiprocessing, pickle, sys
class Mine:
    def __init__(self, value): self.value = value
    def __repr__(self): return f"{type(self).__module__}.Mine({self.value})"
def work(mine, answers):
    answers.put((mine, __name__, sys.argv, sys.path))
if __name__ == "__main__":
    print(pickle.loads(pickle.dumps(Mine(1))))
    context = multiprocessing.get_context(sys.argv[1])
    answers = context.SimpleQueue()
    process = context.Process(target=work, args=(Mine(2), answers))
    process.start(); print(answers.get()); process.join(); print(process.exitcode)
""",
    "atexit_order.py": """
import atexit, threading, weakref
class Late:
    def __del__(self): print("del")
late = Late()
atexit.register(print, "first registered")
atexit.register(print, "second registered")
print("end")
""",
    "warns.py": """
import warnings
def f(): warnings.warn("old", DeprecationWarning, stacklevel=2)
f(); f()
print("__warningregistry__" in globals(), warnings.filters)
""",
    "restarts.py": """
import os, sys
print(sys.argv, flush=True)
if len(sys.argv) == 1:
    os.execv(sys.executable, [sys.executable, *sys.argv, "again"])
""",
    "runs_another.py": """
import runpy, sys
print(runpy.run_path("state.py", run_name="other")["__name__"])
print(runpy.run_module("package.part", run_name="x", alter_sys=True)["__name__"], sys.argv)
""",
    "starts.py": """
import subprocess, sys
subprocess.run([sys.executable, "-m", "package", "x"], check=True)
""",
    "asks.py": "print('asked', input('who? '), flush=True)\nbreakpoint()\nprint('after')\n",
    "runs_async.py": """
import asyncio
async def main():
    asyncio.get_running_loop().call_soon(1 .__truediv__, 0)
    await asyncio.sleep(0)
    raise ValueError("in a task")
asyncio.run(main())
""",
    "test_it.py": """
import sys, unittest
class Test(unittest.TestCase):
    def test_good(self): print(sys.modules["__main__"].__package__, __name__)
    def test_bad(self): self.assertEqual(1, 2)
""",
    "documented.py": '"""\n>>> 1 + 1\n3\n"""\n',
    "own/sitecustomize.py": "import sys\nsys._xoptions.update(own=[__name__, __file__, *sys.path])",
    "broken/sitecustomize.py": "raise ValueError('broken')",
    "model.py": """
import pickle, sys
import onnxruntime
print(type(onnxruntime.__loader__), onnxruntime.__spec__.loader is onnxruntime.__loader__)
import numpy as np
from onnxruntime import InferenceSession
class Mine(InferenceSession): pass
session = Mine(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {session.get_inputs()[0].name: np.ones(2, np.float32)}), session.get_providers())
try:
    InferenceSession("nope.onnx", providers=["CPUExecutionProvider"])
except Exception as error:
    print(type(error), error)
print(sys.meta_path[-1], [str(spec) for spec in sys.meta_path if "sitecustomize" in type(spec).__module__])
sys.exit(3)
""",
}


def write(folder: Path) -> None:
    """All of them, and the same as zip files and compiled."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, main in (("model.pyz", "model.py"), ("app.pyz", "whole/__main__.py"), ("bad.pyz", "raises.py")):
        with zipfile.ZipFile(folder / name, "w") as bundle:
            bundle.writestr("__main__.py", FILES[main])
            bundle.writestr("beside.py", "")
    compileall.compile_file(folder / "state.py", quiet=1, legacy=True)
    compileall.compile_file(folder / "raises.py", quiet=1, legacy=True)
