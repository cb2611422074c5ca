"""A real Slurm of one node on the loopback interface, all of its files in one folder; needs root."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
START_SECONDS = 60
CONFIG = """
ClusterName=quantkit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/slurmd
StateSaveLocation={folder}/slurmctld
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
KillWait=1
MinJobAge=600
EnforcePartLimits=ALL
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{more}
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=60 State=UP
PartitionName=grant Nodes={host} AllowAccounts=ours State=UP
PartitionName=grace Nodes={host} GraceTime=60 State=UP
PartitionName=cancel Nodes={host} GraceTime=60 PreemptMode=CANCEL State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""
WITH_USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"
"""What a cluster has set where a job is preempted with the signal that it asked for."""


def missing() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if os.geteuid():
        return "needs root to start Slurm's daemons"
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else ""


@contextmanager
def running_slurm(folder: Path, more: str = "") -> Iterator[Path]:
    """Slurm's configuration file, with more lines in it, for SLURM_CONF while its daemons run; stopped afterwards."""
    host = socket.gethostname().split(".")[0]
    for name in ("slurmd", "slurmctld"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)  # munge trusts no socket below a folder that others write or cannot enter
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, controller=free_port(), node=free_port(), more=more))
    commands = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/munge.log",
        ],
        ["slurmctld", "-D", "-f", str(config)],
        ["slurmd", "-D", "-f", str(config)],
    ]
    environment = os.environ | {"SLURM_CONF": str(config)}
    started = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as out:
                started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(1)
        _wait_until_idle(environment, folder)
        yield config
    finally:
        _end_jobs(environment)
        for process in reversed(started):
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                child.kill()
            process.kill()
            process.wait()


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        seen = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
        if set(seen.stdout.split()) == {"idle"}:
            return
        time.sleep(1)
    logs = "\n".join(path.read_text(errors="replace")[-800:] for path in [*folder.glob("*.log"), *folder.glob("*.out")])
    raise RuntimeError(f"Slurm did not start: {seen.stdout}{seen.stderr}\n{logs}")


def _end_jobs(environment: dict[str, str]) -> None:
    """Leave no job behind: its processes are no children of the daemons, and would outlive them."""
    subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment)
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if not subprocess.run(["squeue", "-h"], env=environment, capture_output=True).stdout:
            return
        time.sleep(0.5)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
