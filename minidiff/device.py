"""Which device, in which precision, and how much memory there is."""

import os
from pathlib import Path
from typing import TypeVar

import torch

UNTOLD = 8 * 2**30
"""Bytes of memory where the system does not say how many it has, as Windows does not."""
ALLOWED = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may use."""


def default_device() -> torch.device:
    """A GPU if there is one that torch can use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_device(name: torch.device | str | None) -> torch.device:
    """The device of that name, None for the CPU.

    Raises:
        ValueError: there is none such here.
    """
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's three ways to say so
        raise ValueError(f"no device {str(name)!r} here: use {str(default_device())!r}") from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


T = TypeVar("T")


def bytes_on_device(images: T, device: torch.device) -> T:
    """The images on a GPU if they take less than half of its free memory, else where they are: to bring each
    batch there takes longer than a small network needs for it.

    Args:
        images: (N, ...), usually uint8; what is no tensor, but stands for one, stays as it is.
        device: where the network is.
    """
    if not isinstance(images, torch.Tensor) or device.type != "cuda":
        return images
    if 2 * images.nbytes < torch.cuda.mem_get_info(device)[0]:
        return images.to(device)  # type: ignore[return-value]
    return images


def memory() -> int:
    """Bytes of memory: what the machine has, or less where its container is allowed less."""
    found = []
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ALLOWED:
        try:
            found.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # not in a container, or "max"
            continue
    return min(found, default=UNTOLD)


def check_memory(what: str, count: int, each: int) -> None:
    """Whether so many things fit into the memory: the system may promise more, and end the process later.

    Args:
        what: what they are called in the message.
        count: how many there will be.
        each: bytes of one.

    Raises:
        ValueError: all memory there is does not hold them.
    """
    if count * each > (there := memory()):
        raise ValueError(
            f"{count:,} {what} take {count * each / 1e9:,.0f} GB, more than the memory there is: use at most "
            f"{there // each:,}"
        )


def processes_here() -> int:
    """How many processes of a run share this machine, as ``torchrun`` tells each; 1 if nobody does."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdecimal() else 1
