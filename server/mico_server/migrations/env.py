"""Run the migrations on the connection that :func:`mico_server.database.migrate` hands over."""

from __future__ import annotations

from alembic import context

from mico_server.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
)
with context.begin_transaction():
    context.run_migrations()
