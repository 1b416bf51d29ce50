"""The formats of questions and answers: one file each, and one line in the table."""

from typing import Any

from mico_server.answering import Dialect
from mico_server.dialects.completions import COMPLETIONS
from mico_server.dialects.messages import MESSAGES
from mico_server.dialects.prompts import PROMPTS
from mico_server.dialects.responses import RESPONSES

DIALECTS: tuple[Dialect[Any], ...] = (COMPLETIONS, PROMPTS, RESPONSES, MESSAGES)
"""Those that keep nothing: each is a route, and what batches may ask. /v1/chat is beside them: its
body is a form, and it keeps its conversations."""
