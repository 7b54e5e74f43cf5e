"""A process that is killed, and called again."""

import json
import pathlib
import signal
import subprocess
import time


def kill_twice(command: list[str], manifest: pathlib.Path, count: str, end: int) -> None:
    """Run a command that saves checkpoints, and kill it at once after each of the first two that show progress before the end."""

    def reached() -> int:
        return json.loads(manifest.read_text())["progress"][count] if manifest.exists() else 0

    saved, kills = 0, 0
    for _ in range(2):
        process = subprocess.Popen(command)
        while process.poll() is None:
            now = reached()
            if now > saved:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                saved = now
            time.sleep(0.003)
    assert kills == 2
    assert 0 < reached() < end
