"""Have a server load a LoRA adapter while it runs, as vLLM and SGLang can."""

from __future__ import annotations

import re
from typing import Any

import openai

from silkie.endpoint.client import Endpoint
from silkie.endpoint.errors import MOST_OF_MESSAGE, clipped
from silkie.endpoint.event_loop import run_to_end

__all__ = ["AdapterNotLoaded", "load_adapter"]

HOW = (
    "vLLM needs `--enable-lora --max-lora-rank RANK` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, SGLang `--enable-lora`;"
    " both must see the adapter's directory"
)

_ALREADY = re.compile(r"already (been )?(loaded|exist)", re.IGNORECASE)  # "memory already allocated" is another matter


class AdapterNotLoaded(RuntimeError):
    """A server did not load an adapter; the message says why and what it needs."""


def load_adapter(
    base_url: str, name: str, path: str, *, key_variable: str | None = None, timeout: float = 300.0
) -> bool:
    """Has a server answer for the adapter in `path` under the model name `name`; False where it does already.

    A name stands for one adapter: an adapter that the server has under it is taken for this one.

    Args:
        base_url: of the OpenAI-compatible interface, such as http://localhost:8000/v1.
        path: the adapter's directory, as the server sees it.
        key_variable: environment variable with the key; default as for every endpoint.
        timeout: seconds for the server to load it.

    Raises:
        AdapterNotLoaded: the server cannot be reached, cannot load adapters, or refuses this one.
        ValueError: `base_url` is none, or `key_variable` is not set.
    """
    return run_to_end(_load(Endpoint(base_url, name, timeout=timeout, key_variable=key_variable), name, path))


def _names(listed: Any, address: str) -> set[Any]:
    """The models of an answer to /models."""
    models = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(models, list):
        raise AdapterNotLoaded(f"{address} is no OpenAI-compatible interface: its /models lists no models")
    return {model.get("id") for model in models if isinstance(model, dict)}


async def _load(endpoint: Endpoint, name: str, path: str) -> bool:
    client, request = endpoint._client, {"lora_name": name, "lora_path": path}
    address = str(client.base_url).rstrip("/")
    try:
        if name in _names(await client.get("/models", cast_to=object), address):
            return False
        try:
            await client.post("/load_lora_adapter", body=request, cast_to=str)
        except openai.NotFoundError:
            if not address.endswith("/v1"):
                raise
            await client.post(f"{address.removesuffix('/v1')}/load_lora_adapter", body=request, cast_to=str)  # SGLang
    except openai.APIStatusError as error:
        text = endpoint.redact(" ".join(error.response.text.split()))
        if _ALREADY.search(text):
            return False
        why = "knows no /load_lora_adapter" if error.status_code == 404 else f"does not load {path} as {name}"
        raise AdapterNotLoaded(
            f"{address} {why}: {error.status_code} {clipped(text, MOST_OF_MESSAGE)}. {HOW}"
        ) from error
    except openai.APIConnectionError as error:
        raise AdapterNotLoaded(
            f"{address} cannot be reached: {endpoint.redact(str(error.__cause__ or error))}"
        ) from error
    finally:
        await endpoint.close()
    return True
