"""POST /v1/estimate: the cost of a request to /v1/chat or /v1/chat/completions."""

from fastapi import APIRouter, Request

from mico_chat.wire import Estimate
from mico_server import answering
from mico_server.dialects import chat
from mico_server.dialects.completions import COMPLETIONS
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import is_json, json_object, schema_of, validated
from mico_server.service import CurrentClient

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/estimate",
    responses=error_responses(400, 404, 409, 410, 413, 422, 504),
    openapi_extra=chat.chat_body(schema_of(COMPLETIONS.body)),
)
async def estimate(request: Request, client: CurrentClient) -> Estimate:
    """Tokens that a request would take, and whether it fits the model's context.

    Takes a request of /v1/chat or of /v1/chat/completions and decodes its media, but neither
    encodes nor answers.
    """
    client.service.models.check(client.tenant)
    given = await json_object(request) if is_json(request) else None
    if given is None or "message" in given:
        read = chat.reading(request, given)
    else:
        read = COMPLETIONS.reading(validated(COMPLETIONS.body, given), client)
    return await answering.estimate(client, read)
