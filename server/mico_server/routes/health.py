"""Whether the service lives and answers, which model it has, and its figures for Prometheus."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from mico_chat.wire import AnswerDefaults, Live, ModelInfo, ModelList, Ready
from mico_server.errors import NotFoundError, error_responses
from mico_server.service import CurrentService, Service

router = APIRouter()

_STARTED = int(time.time())


@router.get("/health/live", responses=error_responses(503))
async def live(service: CurrentService) -> Live:
    """Whether the process answers, and needs no new start to do so."""
    service.host.check_alive()
    return Live()


@router.get("/health/ready", responses=error_responses(503))
async def ready(service: CurrentService) -> Ready:
    """Whether the model is loaded."""
    return Ready(model=service.host.assistant.name)


def _info(service: Service) -> ModelInfo:
    assistant = service.host.assistant
    return ModelInfo(
        id=assistant.name,
        created=_STARTED,
        context_length=assistant.engine.max_position,
        embeddings=assistant.similarity is not None,
        system_prompt=assistant.system_prompt,
        defaults=AnswerDefaults.model_validate(assistant.defaults),
    )


@router.get("/v1/models")
async def models(service: CurrentService) -> ModelList:
    """The served model."""
    return ModelList(data=[_info(service)])


@router.get("/v1/models/{model:path}", responses=error_responses(404))
async def model(model: str, service: CurrentService) -> ModelInfo:
    """One model."""
    info = _info(service)
    if model != info.id:
        raise NotFoundError(f"no model {model!r} here; this server has {info.id!r}")
    return info


@router.get("/metrics", response_class=Response)
async def metrics(service: CurrentService) -> Response:
    """Counts and times in Prometheus's text format."""
    return service.metrics.response()
