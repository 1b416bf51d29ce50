"""Run the migrations on the connection of :func:`mico_server.store.database.migrate`."""

from alembic import context

from mico_server.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
)
with context.begin_transaction():
    context.run_migrations()
