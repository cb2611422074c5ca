"""Whole processes measured from outside: seconds, peak memory, bytes written to disk."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DISK_BLOCK_BYTES = 512  # in which the kernel counts writes

# A process starts with the peak of the one that started it, and a bench that holds torch has a large one. So this small
# interpreter stands between the two, and what it says of its child is the child's own. The child's input stays open: an
# engine's runner takes an end of it for the end of its parent.
WATCH = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
_, status, usage = os.wait4(process.pid, 0)
cpu_s = usage.ru_utime + usage.ru_stime
facts = [os.waitstatus_to_exitcode(status), cpu_s, usage.ru_maxrss, usage.ru_oublock]
print(json.dumps(facts), file=sys.stderr)
"""


def measured(command: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Run a command in a folder of its own; `wall_s`, `cpu_s`, `peak_gb` and `written_bytes` of it (Linux).

    `written_bytes` is 0 where what is written is not on a disk.

    Args:
        command: program and arguments.
        variables: its whole environment.

    Raises:
        SystemExit: the command failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        started = time.perf_counter()
        watch = [sys.executable, "-I", "-S", "-c", WATCH, *command]
        done = subprocess.run(
            watch, env=variables, cwd=folder, stdout=log, stderr=subprocess.PIPE, check=True, text=True
        )
        wall_s = time.perf_counter() - started
        *said, facts = done.stderr.splitlines()
        status, cpu_s, peak_kib, blocks = json.loads(facts)
        if status:
            log.seek(0)
            sys.exit(f"{command} failed:\n" + "\n".join([log.read()[-3000:], *said[-30:]]))
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_gb": peak_kib * 1024 / 1e9,
        "written_bytes": blocks * DISK_BLOCK_BYTES,
    }
