"""Which device, and in which precision."""

import torch


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


def bytes_on_device(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The images on a GPU if they take less than half of its free memory, else where they are: to bring each
    batch there takes longer than a small network needs for it.

    Args:
        images: (N, ...), usually uint8.
        device: where the network is.
    """
    if device.type == "cuda" and 2 * images.nbytes < torch.cuda.mem_get_info(device)[0]:
        return images.to(device)
    return images
