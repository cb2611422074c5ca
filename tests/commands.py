"""quantkit and programs around it, each as a process of its own, as a user starts them."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = "from quantkit.cli import main; main()"
# A process that has imported what takes seconds and asks no variable of a test's, starts no thread, and forks for every
# program: that finds torch loaded, and all else as in a process that was started for it. It ends without taking apart
# what was loaded, which takes longer than most programs, but not before its threads and what it has registered for its
# end: that is called last which was registered first.
SERVER = """
import atexit, gc, json, os, sys
import torch._dynamo, torch.distributed.tensor

gc.freeze()
while line := sys.stdin.readline():
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["variables"])
for number, path in enumerate([os.devnull, asked["out"], asked["error"]]):
    opened = os.open(path, os.O_WRONLY if number else os.O_RDONLY)
    os.dup2(opened, number)
    os.close(opened)
sys.stdin = open(0)
sys.argv = ["-c", *asked["arguments"]]

code = 1

def end():
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)

atexit.register(end)
try:
    exec(asked["program"], {"__name__": "__main__"})
    code = 0
except SystemExit as reason:
    code = reason.code if isinstance(reason.code, int) else int(reason.code is not None)
    raise
"""


def run(program: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """The text of a Python program with its arguments, in a process that is started for it.

    Args:
        cwd: where it runs; this checkout's package is the one it imports.
        variables: of its environment, beside those of the tests' own.
    """
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=_variables(variables))


def forked(program: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """As `run`, without the seconds that torch takes to load."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder) / "out", Path(folder) / "error"
        asked = {"program": program, "arguments": arguments, "cwd": str(cwd), "variables": _variables(variables)}
        for path in (out, error):
            path.touch()
        server = _server()
        assert server.stdin, "it has a pipe"
        assert server.stdout, "it has a pipe"
        server.stdin.write(json.dumps(asked | {"out": str(out), "error": str(error)}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(["-c", *arguments], code, out.read_text(), error.read_text())


quantkit = partial(forked, COMMAND)  # the real command


def _variables(further: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | further


@cache
def _server() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=_variables({}))
    atexit.register(server.kill)
    return server
