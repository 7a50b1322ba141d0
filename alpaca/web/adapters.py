"""Adapters loaded and unloaded over /v1, with vLLM's addresses and keys.

Only where the operator names a folder (ALPACA_ADAPTER_FOLDER), and only what is in it: a path, or a
link in an adapter's folder, that leads outside is refused.
"""

import asyncio
from pathlib import Path

from starlette.responses import PlainTextResponse, Response

from alpaca.web.bodies import LoadAdapterBody, UnloadAdapterBody
from alpaca.web.errors import ApiError
from alpaca.web.served import Served, translated

VARIABLE = "ALPACA_ADAPTER_FOLDER"


async def load(served: Served, allowed: Path | None, body: LoadAdapterBody) -> Response:
    """POST /v1/load_lora_adapter."""
    folder = inside(permitted(allowed), body.lora_path)
    try:
        await asyncio.to_thread(served.engine.load_adapter, body.lora_name, folder, served.codec)
    except Exception as error:
        raise translated(error) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


def unload(served: Served, allowed: Path | None, body: UnloadAdapterBody) -> Response:
    """POST /v1/unload_lora_adapter."""
    permitted(allowed)
    if body.lora_name not in [one.name for one in served.engine.adapters.loaded]:
        raise ApiError(404, f"No adapter {body.lora_name[:200]!r} is loaded.", param="lora_name")
    try:
        served.engine.unload_adapter(body.lora_name)
    except Exception as error:
        raise translated(error) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def permitted(allowed: Path | None) -> Path:
    """The operator's folder; ApiError 403 if there is none."""
    if allowed is None:
        raise ApiError(
            403,
            "Adapters cannot be changed over HTTP here: the operator has to name a folder that "
            f"may hold them ({VARIABLE}).",
        )
    return allowed


def inside(allowed: Path, named: str) -> Path:
    """An adapter's folder, absolute; ApiError 403 for what is not in the operator's folder."""
    root = allowed.resolve()
    try:
        folder = (root / named).resolve()
        files = list(folder.iterdir()) if root in folder.parents and folder.is_dir() else []
        outside = [path for path in [folder, *files] if root not in path.resolve().parents]
    except (ValueError, OSError, RuntimeError):  # a null byte, a name too long, links in a circle
        raise ApiError(400, "lora_path is no path.", param="lora_path") from None
    if outside:
        raise ApiError(
            403,
            f"lora_path {named[:200]!r} is not in the folder for adapters ({VARIABLE}), or leads "
            "out of it.",
            param="lora_path",
        )
    return folder
