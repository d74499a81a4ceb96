"""Two real processes, as a launcher starts them: for what Lightning's strategies do between them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_both(script, *arguments, timeout=300):
    """Run ``python SCRIPT ARGUMENTS... RANK`` as ranks 0 and 1 of one run, and give what they printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    processes = []
    for rank in range(2):
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        processes.append(
            subprocess.Popen(
                [sys.executable, script, *arguments, str(rank)],
                env=os.environ | place | {"PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said
