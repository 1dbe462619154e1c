"""What a slow link costs: steps of 1 s of compute over links of 50 ms of delay and 1 Mbit/s.

    sudo python -m benchmarks.links --output benchmarks/results/links-cpu.json

Every process is in a network namespace of its own. All its frames go to this program, which hands
each on after the delay, at the rate of the link: there is no other way from one process to another.
Compute is a sleep, so that a machine of few cores can play many. Linux, as root (namespaces and raw
sockets).
"""

import argparse
import array
import fcntl
import heapq
import json
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ADDRESS = "10.77.0.{}"
STEPS = 12


def work(rank: int, size: int, seconds: float, folder: str) -> None:
    """One process: steps whose two forward passes sleep; the time of each step goes to a file."""
    import torch
    from torch import distributed as dist

    from mezo import MeZO
    from mezo.distributed import processes as distributed

    plain_frames(f"mezo-in{rank}")
    where = f"tcp://{ADDRESS.format(1)}:29500"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512)  # the same everywhere: nothing of it is sent
    optimizer = MeZO(model.named_parameters(), lr=1e-4, seed=0)
    began = time.perf_counter()
    distributed.join(optimizer, model)
    joining = time.perf_counter() - began

    def closure() -> float:
        time.sleep(seconds / 2)
        return float(model.weight.square().mean())

    found = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.step(closure)
        found.append(time.perf_counter() - began)
    Path(folder, f"{rank}.json").write_text(json.dumps({"steps": found, "joining": joining}))
    distributed.leave()


def plain_frames(interface: str) -> None:
    """Frames as a cable would carry them: with checksums, none larger than the link takes."""
    with socket.socket() as control:
        for command in (0x17, 0x1F, 0x24):  # ETHTOOL_STXCSUM, _STSO, _SGSO of linux/ethtool.h
            value = array.array("I", [command, 0])
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL


class Switch:
    """Takes frames from each process's interface and hands them on, late and at a rate."""

    def __init__(self, names: list[str], delay: float, rate: float):
        self.sockets = []
        for name in names:
            one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            one.bind((name, 0))
            self.sockets.append(one)
        self.delay, self.rate = delay, rate
        self.free = [0.0] * len(names)  # when the link of each is next free
        self.bytes = [0] * len(names)
        self._due: list[tuple[float, int, int, bytes]] = []
        self._number = 0

    def run(self, alive) -> None:
        while alive():
            wait = max(0.0, self._due[0][0] - time.perf_counter()) if self._due else 0.05
            ready, _, _ = select.select(self.sockets, [], [], min(wait, 0.05))
            for one in ready:
                frame, (_, _, kind, *_) = one.recvfrom(65536)
                if kind != socket.PACKET_OUTGOING:
                    self._take(self.sockets.index(one), frame)
            while self._due and self._due[0][0] <= time.perf_counter():
                _, _, source, frame = heapq.heappop(self._due)
                for i, one in enumerate(self.sockets):
                    if i != source:  # the interfaces drop what is not for them
                        one.send(frame)

    def _take(self, source: int, frame: bytes) -> None:
        now = time.perf_counter()
        self.free[source] = max(now, self.free[source]) + 8 * len(frame) / self.rate
        self.bytes[source] += len(frame)
        self._number += 1
        due = self.free[source] + self.delay
        heapq.heappush(self._due, (due, self._number, source, frame))


def shell(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def plug(rank: int) -> str:
    """A namespace with one interface; returns the name of its other end."""
    space, inner, outer = f"mezo{rank}", f"mezo-in{rank}", f"mezo-out{rank}"
    shell(f"ip netns add {space}")
    shell(f"ip link add {outer} type veth peer name {inner}")
    shell(f"ip link set {inner} netns {space}")
    shell(f"ip link set {outer} up promisc on")
    within = f"ip netns exec {space}"
    shell(f"{within} ip addr add {ADDRESS.format(rank + 1)}/24 dev {inner}")
    shell(f"{within} ip link set {inner} up")
    shell(f"{within} ip link set lo up")
    return outer


def unplug(size: int) -> None:
    for rank in range(size):
        for command in (f"ip link delete mezo-out{rank}", f"ip netns delete mezo{rank}"):
            subprocess.run(command.split(), capture_output=True, check=False)


def measure(size: int, seconds: float, delay: float, rate: float) -> dict:
    unplug(size)
    with tempfile.TemporaryDirectory() as folder:
        running: list[subprocess.Popen] = []
        try:
            switch = Switch([plug(rank) for rank in range(size)], delay, rate)
            for rank in range(size):
                inside = {"GLOO_SOCKET_IFNAME": f"mezo-in{rank}", "OMP_NUM_THREADS": "1"}
                command = ["ip", "netns", "exec", f"mezo{rank}", sys.executable, __file__]
                command += ["--rank", str(rank), "--size", str(size), "--seconds", str(seconds)]
                environment = os.environ | inside
                running.append(subprocess.Popen([*command, "--folder", folder], env=environment))
            switch.run(lambda: any(process.poll() is None for process in running))
        finally:
            for process in running:
                process.kill()
            unplug(size)
        rows = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    step = statistics.median(max(row["steps"][i] for row in rows) for i in range(1, STEPS))
    return {
        "processes": size,
        "compute_seconds": seconds,
        "delay_ms": delay * 1000,
        "mbit_per_s": rate / 1e6,
        "step_seconds": step,
        "joining_seconds": rows[0]["joining"],
        "bytes_sent_by_rank_0": switch.bytes[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=1.0, help="compute of a step")
    parser.add_argument("--delays", type=float, nargs="+", default=[0.025, 0.05], help="one way, s")
    parser.add_argument("--rate", type=float, default=1e6, help="bit/s of each process")
    parser.add_argument("--output", type=Path)
    for name, kind in (("rank", int), ("size", int), ("folder", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return work(args.rank, args.size, args.seconds, args.folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    from mezo.runs.result import environment

    rows = []
    for size in args.sizes:
        plain = measure(size, args.seconds, 0.0, 1e9)
        for row in (plain, *(measure(size, args.seconds, d, args.rate) for d in args.delays)):
            rows.append(row | {"speed": plain["step_seconds"] / row["step_seconds"]})
            print(json.dumps(rows[-1]), flush=True)
    if args.output:
        args.output.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
