"""The index of what turns say: FTS5 in SQLite, a tsvector with a GIN index in PostgreSQL.

Both index each run of three characters of ``turns.text_folded``: so a part of a word is found, also
in scripts without spaces. The index says which turns may have a text, and their text decides.

The database itself derives the index, by triggers or a generated column, whoever changes a turn.
The metadata of :mod:`mico_server.store.tables` lack it: all its names have ``search`` in them.
"""

from typing import Any

import sqlalchemy as sa

from mico_server.store.tables import turns

RUN = 3  # characters; FTS5's trigrams

MOST_RUNS = 32  # of a text; more of them narrow the search no further

# Rows keep a number of their own, because VACUUM may change SQLite's.
_DELETED = (
    "INSERT INTO turns_search(turns_search, rowid, text_folded) "
    "VALUES ('delete', old.search_id, old.text_folded);"
)
_INSERTED = (
    "INSERT INTO turns_search(rowid, text_folded) "
    "SELECT search_id, text_folded FROM turns WHERE rowid = new.rowid;"
)
_NUMBERED = (
    "UPDATE turns SET search_id = (SELECT coalesce(max(search_id), 0) + 1 FROM turns) "
    "WHERE rowid = new.rowid;"
)
_SQLITE = (
    "ALTER TABLE turns ADD COLUMN search_id INTEGER",
    "UPDATE turns SET search_id = rowid",
    "CREATE UNIQUE INDEX ix_turns_search_id ON turns (search_id)",
    "CREATE VIRTUAL TABLE turns_search USING fts5(text_folded, content='turns', "
    "content_rowid='search_id', tokenize='trigram', detail='none')",
    "INSERT INTO turns_search(turns_search) VALUES ('rebuild')",
    f"CREATE TRIGGER turns_search_insert AFTER INSERT ON turns BEGIN {_NUMBERED} {_INSERTED} END",
    f"CREATE TRIGGER turns_search_delete AFTER DELETE ON turns BEGIN {_DELETED} END",
    "CREATE TRIGGER turns_search_update AFTER UPDATE OF text_folded ON turns "
    f"BEGIN {_DELETED} {_INSERTED} END",
)

# A tsvector has at most 1 MiB of lexemes: so each run becomes one of 65536 numbers.
_POSTGRES = (
    """CREATE FUNCTION turns_search(words text) RETURNS tsvector
    LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
        SELECT coalesce(array_to_tsvector(array_agg(DISTINCT
            to_hex((ascii(a) * 961 + ascii(b) * 31 + ascii(c)) % 65536))), '')
        FROM (
            SELECT one AS a, lead(one) OVER runs AS b, lead(one, 2) OVER runs AS c
            FROM unnest(string_to_array(words, NULL)) WITH ORDINALITY AS _(one, place)
            WINDOW runs AS (ORDER BY place)
        ) AS _
        WHERE c IS NOT NULL
    $$""",
    "ALTER TABLE turns ADD COLUMN search tsvector "
    "GENERATED ALWAYS AS (turns_search(text_folded)) STORED",
    "CREATE INDEX ix_turns_search ON turns USING gin (search)",
)


def create_index(connection: sa.Connection) -> None:
    """Index the turns that there are, and from now on all that come."""
    for statement in _SQLITE if connection.dialect.name == "sqlite" else _POSTGRES:
        connection.exec_driver_sql(statement)


@sa.event.listens_for(turns, "after_create")
def _created(table: sa.Table, connection: sa.Connection, **_: Any) -> None:
    create_index(connection)


def may_say(text: str, *, sqlite: bool) -> sa.TextClause | None:
    """The turns that may have a folded text in them; None: it is too short for the index."""
    part = text[: MOST_RUNS + RUN - 1]
    runs = {part[at : at + RUN] for at in range(len(part) - RUN + 1)}
    if not runs:
        return None
    if sqlite:
        part = " ".join('"{}"'.format(run.replace('"', '""')) for run in sorted(runs))
        found = "turns.search_id IN (SELECT rowid FROM turns_search WHERE turns_search MATCH :part)"
    else:
        lexemes = "array_to_string(tsvector_to_array(turns_search(:part)), ' & ')"
        found = f"turns.search @@ CAST({lexemes} AS tsquery)"
    return sa.text(found).bindparams(sa.bindparam("part", part, unique=True))
