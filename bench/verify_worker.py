"""The processes in which the cases of `python -m bench verify` are examined, and what becomes of them."""

import json
import math
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from .verify_cases import CPU, GPU, INTERPRETER, SANITIZED

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    GPU: {},
    INTERPRETER: {"TRITON_INTERPRET": "1", "XENT_EXT_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""},
    CPU: {},
    # Every tensor then has memory of its own, whose end the sanitizer knows.
    SANITIZED: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
}
# What would have the cases run otherwise than they say. Launch numbers of XENT_EXT_TUNING are those to be verified.
IGNORED = ("TRITON_INTERPRET", "XENT_EXT_BACKEND", "XENT_EXT_CHECK", "XENT_EXT_SCHEDULE")
CORES, MOST_PROCESSES = 2, 4  # so many cores for each of at most so many processes
POLL = 1.0  # seconds between two looks at processes that say nothing
PATIENCE = 180  # seconds for a case: a process that says nothing for so long hangs
TAIL = 4000  # characters of what a process wrote before it stopped


def finding(name: str, where: str, status: str, *problems: str) -> dict:
    """What is found of a case that was not examined to its end."""
    return {"name": name, "where": where, "status": status, "plan": "", "ratios": {}, "problems": [*problems],
            "warnings": [], "seconds": 0.0}  # fmt: skip


def findings(where: str, names: list[str], until=math.inf, prefix=(), patience=PATIENCE):
    """What is found of each case, as it is found, by several processes at once where there are cores for them.

    Most of the time goes to compiling. Where a process ends in a case, another goes on with the next.
    """
    count = max(min((os.cpu_count() or 1) // CORES, MOST_PROCESSES, len(names)), 1)
    workers = [Worker(where, names[first::count], until, prefix, patience) for first in range(count)]
    try:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                worker.start(selector)
            while selector.get_map():
                for key, _ in selector.select(POLL):
                    yield from key.data.read(selector)
                for worker in workers:
                    worker.look()
    finally:
        for worker in workers:
            worker.kill()


class Worker:
    """A process that prints a line of JSON for each of its cases, and others in its place while there are any left."""

    def __init__(self, where: str, names: list[str], until: float, prefix, patience: float):
        self.where, self.left, self.until, self.prefix, self.patience = where, list(names), until, prefix, patience
        self.process, self.was_silent = None, False

    def start(self, selector):
        inherited = {name: value for name, value in os.environ.items() if name not in IGNORED}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.text, self.heard, self.count = "", time.monotonic(), 0
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "bench.verify_right", self.where, *self.left],
            cwd=ROOT,
            env=inherited | ENVIRONMENT[self.where],
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        selector.register(self.process.stdout, selectors.EVENT_READ, self)

    def read(self, selector):
        """What was found meanwhile."""
        written = os.read(self.process.stdout.fileno(), 1 << 16)
        if not written:
            yield from self.ended(selector)
            return
        *lines, self.text = (self.text + written.decode()).split("\n")
        for line in lines:
            if line.startswith('{"name"'):
                found = json.loads(line)
                self.heard, self.count = time.monotonic(), self.count + 1
                self.left.remove(found["name"])
                yield found

    def ended(self, selector):
        """Whatever the process was at when it ended is wrong, but if its time was up; others are left for the next."""
        selector.unregister(self.process.stdout)
        self.process.stdout.close()
        status, is_late = self.wait(), time.monotonic() >= self.until
        if self.left and not is_late and (status or not self.count):
            yield finding(self.left.pop(0), self.where, "wrong", f"{self.ending(status)}\n{tail(self.errors)}")
        self.errors.close()
        if self.left and not is_late:
            self.start(selector)
        elif self.left:
            yield from [finding(name, self.where, "left out", "its time was up") for name in self.left]

    def wait(self) -> int:
        try:
            return self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.wait()

    def ending(self, status: int) -> str:
        return f"no result after {self.patience} seconds" if self.was_silent else f"its process ended with {status}"

    def look(self):
        """End the process if it hangs, or if its time is up."""
        now = time.monotonic()
        self.was_silent = now > self.heard + self.patience
        if self.was_silent or now >= self.until:
            self.kill()

    def kill(self):
        if self.process is not None:
            self.process.kill()


def tail(errors) -> str:
    errors.seek(0)
    return errors.read()[-TAIL:]


# Under NVIDIA's compute-sanitizer

SANITIZER = "compute-sanitizer"
SANITIZED_PATIENCE = 1800


def sanitized(names: list[str], folder: Path) -> dict:
    """What it finds in all of the cases together; its own logs are left in the folder."""
    tool = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if tool is None:
        return finding(SANITIZER, SANITIZED, "left out", "it is neither on the PATH nor in /usr/local/cuda/bin")
    prefix = [tool, "--tool", "memcheck", "--log-file", str(folder.absolute() / f"{SANITIZER}-%p.log")]
    found = findings(SANITIZED, names, prefix=prefix, patience=SANITIZED_PATIENCE)
    wrong = [each for each in tqdm(found, "Sanitized", len(names)) if each["status"] == "wrong"]
    problems = [f"{each['name']}: {problem}" for each in wrong for problem in each["problems"]]
    logs = [path.read_text() for path in folder.glob(f"{SANITIZER}-*.log")]
    problems += [log[-TAIL:] for log in logs if re.search(r"ERROR SUMMARY: [1-9]", log)]
    return finding(SANITIZER, SANITIZED, "wrong" if problems else "right", *problems)
