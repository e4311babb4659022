"""Network addresses: where ranks on several hosts meet, and over which interface they talk."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Mapping

SIOCGIFADDR = 0x8915  # the request "address of an interface", of Linux


def routable_address() -> str:
    """An address of this host that other hosts can reach: that of its name, else of its way out, else any.

    :raises RuntimeError: it has none but the loopback.
    """
    for find in (lambda: socket.gethostbyname(socket.gethostname()), lambda: _source_address("10.255.255.255")):
        with contextlib.suppress(OSError):
            address = find()
            if not address.startswith("127."):
                return address
    others = [address for address in _interface_addresses().values() if not address.startswith("127.")]
    if not others:
        raise RuntimeError("the ranks are on several hosts, and this one has no network address: set MASTER_ADDR")
    return others[0]


def _source_address(destination: str) -> str:
    """This host's address when it talks to `destination`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((destination, 1))  # sends nothing; asks the kernel which address it would send from
        return probe.getsockname()[0]


def interface_towards(address: str) -> str | None:
    """The network interface that leads to `address`; None where it cannot be told."""
    try:
        source = _source_address(address)
    except OSError:
        return None
    return next((name for name, own in _interface_addresses().items() if own == source), None)


def _interface_addresses() -> dict[str, str]:
    """The IPv4 address of every network interface that has one; empty where it cannot be told (not Linux)."""
    try:
        import fcntl
    except ImportError:
        return {}
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                # A struct ifreq: the address lies behind name (16 bytes), family (2) and port (2).
                addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def slurm_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks of an srun meet: on its first host, at a port of its own for every step of every job."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"]
    number = 17 * int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
    address = environment.get("MASTER_ADDR") or _first_slurm_host(hosts)
    return address, int(environment.get("MASTER_PORT", 20000 + number % 20000))


def _first_slurm_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: "node[03-05,07],gpu1" -> "node03"."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^\[,]*)", nodelist)
    name, numbers, rest = match.groups()
    return name + (re.split(r"[,-]", numbers)[0] if numbers else "") + rest
