"""What the machine is, and how time and memory are measured on it."""

import json
import os
import platform
import subprocess
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import xent_ext
from xent_ext import memory


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where PyTorch sees one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe() -> dict:
    """The facts that a timing means nothing without."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _nvidia_smi("driver_version"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "xent_ext": xent_ext.__version__,
    }


def clocks() -> dict:
    """Clock rates as they are found, in MHz: none is set, as a user sets none."""
    return {"cpu": _cpu_mhz(), "gpu": _nvidia_smi("clocks.sm,clocks.mem"), "gpu limits": _nvidia_smi("clocks.max.sm")}


def one_line(machine: dict) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "triton", "xent_ext"))
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    gpu = f"{machine['gpu']}, driver {machine['driver']}" if machine["gpu"] else "none"
    return f"{cpu}; GPU: {gpu}; {machine['os']}; {versions}"


class Clock:
    """Marks points in time on a device: CUDA events on a GPU, the wall clock elsewhere and, if asked for, there too.

    Events are read only after `wait`, so that timing never stalls the queue of launches.
    """

    def __init__(self, device: torch.device, on_host=False):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.by_events = self.on_gpu and not on_host

    def mark(self):
        if not self.by_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, start, end) -> float:
        return start.elapsed_time(end) if self.by_events else 1e3 * (end - start)


MEMORY_METHOD = {
    "cuda": "torch.cuda.max_memory_allocated, less what was allocated before",
    "cpu": "highest running total of the allocations and frees that torch.profiler saw",
}


def peak_memory(work, device: torch.device):
    """Call `work`; return its result and the most bytes held at one time beyond those held before.

    What xent_ext has kept of earlier calls is let go before, so that it is counted when it is made anew.
    """
    memory.forget()
    memory._buffers = threading.local()
    return (_peak_on_gpu if device.type == "cuda" else _peak_on_cpu)(work, device)


def _peak_on_gpu(work, device):
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(work, device):
    # The process's resident size would also count pages that the C allocator keeps, and miss those it reuses.
    result, events = traced(work, profile_memory=True)
    changes = [event for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return result, peak


def traced(work, **options):
    """Call `work`; return its result and the events that torch.profiler saw on the CPU, which has more with options."""
    with profile(activities=[ProfilerActivity.CPU], **options) as recorded:
        result = work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        return result, json.loads(trace.read_text())["traceEvents"]


def last_cache_bytes(device: torch.device) -> int:
    """Size of the cache before memory; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=32 << 20)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated without taking them from other processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    return next(iter(_cpuinfo("model name")), platform.processor() or platform.machine())


def _cpu_mhz() -> list[float]:
    return [float(value) for value in _cpuinfo("cpu MHz")]


def _cpuinfo(key: str) -> list[str]:
    """The values of a key, one for each processor; none where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _nvidia_smi(query: str) -> str | None:
    """What NVIDIA's tool answers for the first GPU, or None where there is no such tool or GPU."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
