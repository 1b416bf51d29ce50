"""Answers batches in the background, a few requests at a time, behind those of waiting clients.

The oldest batch of each owner of keys runs; their requests come in turn. A fault ends its batch and
no other one. Only while the database is away do batches wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mico_chat.errors import MicoError, RequestError
from mico_chat.fair import FairQueue
from mico_chat.options import request_error
from mico_chat.system import sync
from mico_server.errors import BusyError, NotReadyError, UnavailableError
from mico_server.http.errors import error_body, mico_error_body
from mico_server.http.json_body import MAX_FIELDS, number_of_values, read_json
from mico_server.service import Service
from mico_server.settings import ServerSettings
from mico_server.store.batches import BatchRecord, BatchStatus, BatchStore
from mico_server.store.tables import cleaned

logger = logging.getLogger(__name__)

MOST_REQUESTS = 50_000
"""OpenAI's limit of a batch."""

MOST_ID_CHARACTERS = 512
"""Of a custom_id: all ids of a batch are held in memory."""

_MOST_ERRORS = 100
_POLL_S = 30.0  # another process may have made a batch, or have ended within one
_WAIT_S = 0.2


@dataclass(frozen=True)
class Endpoint:
    """A route that answers the requests of batches: its body, and what answers it."""

    body: type[BaseModel]
    answer: Callable[[Any, Service, str], Awaitable[BaseModel]]


class BatchRunner:
    def __init__(self, service: Service, endpoints: Mapping[str, Endpoint]) -> None:
        self._service = service
        self._store: BatchStore = service.batches
        self._endpoints = endpoints
        self._queue = FairQueue(service.settings.max_batch_requests)
        self._served: set[str] = set()  # owners
        self._turns = asyncio.Lock()  # lets lines begin in the order in which they got a place
        self._lines = 0  # that have begun and not ended

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                self._store.woken.clear()
                try:
                    for owner in await self._store.waiting() - self._served:
                        self._served.add(owner)
                        group.create_task(self._serve(owner))
                except UnavailableError as error:  # the next round tries again
                    logger.warning("batches wait: %s", error)
                except Exception:
                    logger.exception("batches wait for the next round")
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._store.woken.wait()

    async def _serve(self, owner: str) -> None:
        """Answer the batches of an owner, one after the other, the oldest first."""
        elsewhere: list[str] = []  # batches that other replicas answer
        try:
            while (batch := await self._store.next_of(owner, elsewhere)) is not None:
                async with self._store.database.claim(batch.id) as ours:
                    if ours:
                        await self._end(batch)
                    else:
                        elsewhere.append(batch.id)
        except* UnavailableError:  # the store has logged why
            logger.warning("the batches of %s wait for the next round", owner)
        except* Exception:
            logger.exception("the batches of %s wait for the next round", owner)
        else:
            if not elsewhere:  # another batch may have been made in the same moment
                self._store.woken.set()
        finally:
            self._served.discard(owner)

    async def _end(self, batch: BatchRecord) -> None:
        """Bring a batch to its end, whatever happens in it."""
        counts: dict[str, int] = {}
        try:
            await self._answer(batch, counts)
        except* UnavailableError:
            raise
        except* Exception:
            logger.exception("batch %s failed", batch.id)
            message = "the batch broke off; the server's log has the details"
            wrong = {"code": "server_error", "line": None, "param": None, "message": message}
            await self._store.move(batch, "failed", errors=[wrong], counts=counts)

    async def _answer(self, batch: BatchRecord, counts: dict[str, int]) -> None:
        """Answer a batch, and count; what an earlier run has answered is not asked again."""
        source = self._store.path(batch.input_file_id)
        settings = self._service.settings
        total, errors = await asyncio.to_thread(_check, source, batch.endpoint, settings)
        if errors:
            await self._store.move(batch, "failed", errors=errors)
            return
        batch = await self._store.move(batch, "in_progress", counts={"total": total})
        output, failures = [
            await asyncio.to_thread(_Lines, self._store.path(file))
            for file in (batch.output_file_id, batch.error_file_id)
        ]
        answered = output.ids | failures.ids
        counts.update(completed=len(output.ids), failed=len(failures.ids))
        requests = (r for r in _requests(source) if r["custom_id"] not in answered)
        lock = asyncio.Lock()  # for the one iterator

        async def worker() -> None:
            while True:
                async with self._queue.place(batch.tenant):
                    async with lock:
                        status = await self._store.count(batch.id, **counts)
                        request = next(requests, None)
                        if request is None or status != "in_progress":
                            return
                    await self._turn()
                    try:
                        line, well = await self._line(batch, request)
                    finally:
                        self._lines -= 1
                    (output if well else failures).add(line)
                    counts["completed" if well else "failed"] += 1

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(settings.max_batch_requests):
                    group.create_task(worker())
        finally:
            output.close()
            failures.close()
        batch = await self._store.move(batch, "finalizing", counts=counts)
        ended: BatchStatus = "cancelled" if batch.status == "cancelling" else "completed"
        await self._store.move(batch, ended, counts=counts)
        logger.info("batch %s: %s, %s", batch.id, ended, counts)

    async def _turn(self) -> None:
        """Wait until the clients that wait for answers leave room, and take a place.

        A line that has begun may not be among the models' requests yet: half of them is the most.
        """
        most = (self._service.settings.max_requests + 1) // 2
        async with self._turns:
            while self._lines >= most or not self._service.models.has_room:
                await asyncio.sleep(_WAIT_S)
            self._lines += 1

    async def _line(self, batch: BatchRecord, request: Mapping[str, Any]) -> tuple[Any, bool]:
        """A line of the batch's output, or of its errors."""
        endpoint = self._endpoints[batch.endpoint]
        status = 200
        try:
            body = (await self._asked(endpoint, request["body"], batch.tenant)).model_dump(
                mode="json", by_alias=True
            )
        except MicoError as error:
            status, body = error.status, mico_error_body(error)
        except Exception:
            logger.exception("batch %s: a request failed", batch.id)
            message = "the request failed; the server's log has the details"
            status, body = 500, error_body(500, message, "internal_error")
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
        line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": request["custom_id"]}
        return {**line, "response": response, "error": None}, status == 200

    async def _asked(self, endpoint: Endpoint, body: Any, tenant: str) -> BaseModel:
        try:
            read = endpoint.body.model_validate(body)
        except ValidationError as error:
            raise request_error(error.errors()[0]) from error
        if getattr(read, "stream", False):
            raise RequestError.at("stream", "a batch has no streams; leave it out")
        while True:
            try:
                return await endpoint.answer(read, self._service, tenant)
            except (BusyError, NotReadyError, UnavailableError):
                await asyncio.sleep(_WAIT_S)


class _Lines:
    """A file of JSON lines that are added one by one; an earlier run may have begun it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ids: set[str] = set()
        if path.is_file():
            whole = path.with_suffix(".whole")
            with path.open("rb") as file, whole.open("wb") as kept:
                for line in file:
                    if (id_ := _answered(line)) is not None:
                        self.ids.add(id_)
                        kept.write(line)
            sync(whole)
            os.replace(whole, path)
        self._file: Any = None

    def add(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self._path.open("ab")
        self._file.write(cleaned(json.dumps(line, ensure_ascii=False)).encode() + b"\n")
        self._file.flush()
        self.ids.add(line["custom_id"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _answered(line: bytes) -> str | None:
    """The custom_id of a line that was written; None if a crash left it damaged."""
    try:
        return str(json.loads(line)["custom_id"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):  # no JSON, or of another form
        return None


def _requests(source: Path) -> Iterator[dict[str, Any]]:
    with source.open("rb") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _check(
    source: Path, endpoint: str, settings: ServerSettings
) -> tuple[int, list[dict[str, Any]]]:
    """The number of requests in a file, and what is wrong with its lines."""
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()

    def wrong(number: int | None, param: str | None, message: str) -> None:
        if len(errors) < _MOST_ERRORS:
            about = {"code": "invalid_request", "line": number, "param": param}
            errors.append({**about, "message": message})

    if not source.is_file():
        wrong(None, "input_file_id", "the input file is no longer on the server's disk")
        return 0, errors
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if len(line) > settings.max_json_bytes:
                limit = f"over the limit of {settings.max_json_bytes} (MICO_SERVER_MAX_JSON_BYTES)"
                wrong(number, None, f"{len(line)} bytes, {limit}")
                continue
            if (values := number_of_values(line)) > (most := settings.max_json_values):
                limit = f"over the limit of {most} (MICO_SERVER_MAX_JSON_VALUES)"
                wrong(number, None, f"{values} values, {limit}")
                continue
            try:
                request = read_json(line)
            except RequestError as error:
                said = "this line is not JSON" if error.param is None else str(error)
                wrong(number, error.param, said)
                continue
            id_ = request.get("custom_id") if isinstance(request, dict) else None
            if not isinstance(request, dict):
                wrong(number, None, "expected an object with custom_id, method, url and body")
            elif not isinstance(id_, str) or not id_:
                wrong(number, "custom_id", "expected a text")
            elif len(id_) > MOST_ID_CHARACTERS:
                wrong(number, "custom_id", f"{len(id_)} characters, over {MOST_ID_CHARACTERS}")
            elif id_ in seen:
                wrong(number, "custom_id", f"{id_[:80]!r} is there twice")
            elif request.get("method") != "POST":
                wrong(number, "method", "expected POST")
            elif request.get("url") != endpoint:
                wrong(number, "url", f"expected {endpoint}, the batch's endpoint")
            elif not isinstance(request.get("body"), dict):
                wrong(number, "body", "expected an object")
            elif len(request["body"]) > MAX_FIELDS:
                wrong(number, "body", f"{len(request['body'])} fields, over {MAX_FIELDS}")
            else:
                seen.add(id_)
    if not seen and not errors:
        wrong(None, None, "the input file has no requests")
    if len(seen) > MOST_REQUESTS:
        wrong(None, None, f"{len(seen)} requests, but a batch has at most {MOST_REQUESTS}")
    return len(seen), errors
