"""The devices of this machine, as torch sees them."""

import torch

from mico_chat.errors import ConfigError


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch raises either of them
        raise ConfigError(f"no device {device!r} here: {str(error).splitlines()[0]}") from error


def gpu_name(device: str | None) -> str | None:
    """The CUDA device that is asked for, or the machine's first; None without one."""
    if device is not None:
        return device if torch.device(device).type == "cuda" else None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def gpu_memory(device: str | None) -> tuple[int, int] | None:
    """Free bytes and all bytes of the graphics card that would be used; None without one."""
    used = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.cuda.mem_get_info(used) if used.type == "cuda" else None
