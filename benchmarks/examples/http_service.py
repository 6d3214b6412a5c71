"""A saved executable behind HTTP, on Starlette:

    pip install starlette uvicorn
    EXECUTABLE=lenet5.loom uvicorn --app-dir benchmarks/examples --factory http_service:service
    curl --data-binary @digit.png localhost:8000/classify

Images come as files and are handed over in [0, 1]: put your own model's normalisation into
`pixels`.
"""

from __future__ import annotations

import io
import os
from typing import Any

import convloom
import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

MOST_BYTES = 1 << 24
"""Of a request's body."""


def pixels(data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """The image in a file's bytes: (1, C, H, W) in [0, 1]."""
    channels, height, width = shape
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("L" if channels == 1 else "RGB").resize((width, height))
    values = np.asarray(image, np.float32).reshape(1, height, width, channels) / 255
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())


def service(path: str = "", device: str | None = None) -> Starlette:
    """The service of a file, by default that of $EXECUTABLE, on what the file was made for."""
    exe = convloom.load(path or os.environ["EXECUTABLE"], device)
    port = exe.inputs[0]

    def answer(data: bytes) -> dict[str, Any]:
        x = pixels(data, port.spec.shape[1:]).to(exe.place, port.spec.dtype)
        shares = exe(x)[0].float().softmax(0)
        return {"class": int(shares.argmax()), "probability": float(shares.max())}

    async def classify(request: Request) -> JSONResponse:
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > MOST_BYTES:
                return JSONResponse({"error": f"more than {MOST_BYTES} bytes"}, 413)
        try:
            # In a thread: other requests are accepted meanwhile.
            return JSONResponse(await run_in_threadpool(answer, data))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return JSONResponse({"error": f"expected an image: {error}"}, 400)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"sha256": exe.artifact.sha256, "device": exe.device})

    return Starlette(
        routes=[Route("/classify", classify, methods=["POST"]), Route("/health", health)]
    )
