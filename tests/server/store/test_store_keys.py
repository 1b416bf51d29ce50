"""Keys: found by their secret alone, gone at once when revoked."""

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from mico_chat.errors import RequestError
from mico_server.errors import NotFoundError
from mico_server.settings import ServerSettings
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from tests.server.conftest import BOTH, Run
from tests.server.door.test_auth import bearer
from tests.server.support.running import error_of, new_key, running
from tests.support.fakes import FakeAssistant

pytestmark = pytest.mark.anyio


@BOTH
async def test_a_key_is_found_by_its_secret_until_it_is_revoked(keys: KeyStore) -> None:
    assert not await keys.any()
    secret, key = await keys.create("bob", rate_limit="60/minute")
    assert re.fullmatch(r"mico-[A-Za-z0-9_-]{43}", secret)
    assert re.fullmatch(r"key-[0-9a-f]{24}", key.id)
    assert (key.name, key.tenant, key.rate_limit) == ("bob", key.id, "60/minute")
    assert await keys.find(secret) == key
    assert await keys.any()

    revoked = await keys.revoke(key.id)
    assert revoked.revoked_at is not None
    assert revoked.revoked_at >= key.created_at
    assert await keys.find(secret) is None
    assert not await keys.any(), "a revoked key is not in force"
    assert await keys.revoke(key.id) == revoked, "again: when it was first"


async def test_keys_share_a_tenant_only_where_it_is_named(keys: KeyStore) -> None:
    one = (await keys.create("one"))[1]
    two = (await keys.create("two", tenant="team"))[1]
    three = (await keys.create("three", tenant="team"))[1]
    assert one.tenant != two.tenant == three.tenant == "team"
    assert await keys.list() == (one, two, three)


async def test_secrets_are_not_in_the_database(keys: KeyStore, database: Database) -> None:
    secret, key = await keys.create("bob")
    async with database.reading() as connection:
        (row,) = await connection.execute(text("SELECT * FROM keys"))
    assert key.id in row
    assert not any(secret[5:] in str(value) for value in row)


async def test_no_other_secret_finds_a_key(keys: KeyStore) -> None:
    mine, _ = await keys.create("bob")
    for secret in ("", "mico-", "mico-" + "A" * 43, "mico-' OR 1=1 --", "\0", "\ud800"):
        assert await keys.find(secret) is None
    assert await keys.find(mine + "A") is None
    assert await keys.find(mine.swapcase()) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 101}, "name.*101"),
        ({"name": "half \ud83d"}, "name"),
        ({"name": "bob", "tenant": "a\0"}, "tenant"),
        ({"name": "bob", "rate_limit": "often"}, "rate_limit.*'often'.*60/minute"),
        ({"name": "bob", "rate_limit": "0/minute"}, "rate_limit.*above 0"),
        ({"name": "bob", "rate_limit": "1/second;5/minute"}, "rate_limit.*one limit"),
        ({"name": "bob", "scopes": ()}, "scopes.*chat, metrics, admin"),
        ({"name": "bob", "scopes": ("chat", "all")}, "scopes.*'all'.*chat, metrics, admin"),
    ],
)
async def test_a_key_that_makes_no_sense(
    keys: KeyStore, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        await keys.create(**arguments)
    assert not await keys.any()


@pytest.mark.parametrize("id_", ["key-0", "key-" + "0" * 24, "", "\0", "\ud800", "x" * 9999])
async def test_revoking_what_is_not_there(keys: KeyStore, id_: str) -> None:
    with pytest.raises(NotFoundError, match="no key"):
        await keys.revoke(id_)


def test_create_list_revoke(keys_command: Run) -> None:
    flags = "--tenant team --rate-limit 60/minute --scope metrics --scope chat"
    out, err = keys_command("create", "bob", *flags.split())
    assert re.fullmatch(r"mico-[A-Za-z0-9_-]{43}\n", out), "the secret alone, for KEY=$(...)"
    (id_,) = re.findall(r"key-[0-9a-f]{24}", err)
    secret = out.strip()
    assert secret not in err

    out, _ = keys_command("list")
    assert re.search(rf"(?m)^{id_} +bob +team +chat,metrics +60/minute +20.* -$", out)
    assert secret not in out

    _, err = keys_command("revoke", id_)
    assert re.search(r"No key is in force now. .*loopback.*--require-keys", err)
    assert not re.search(r"(?m) -$", keys_command("list")[0])


@pytest.mark.parametrize(
    "arguments",
    ["revoke key-1", "create bob --rate-limit often", "list --database-url mysql://u:s3cret@h/x"],
)
def test_errors_are_one_line(keys_command: Run, arguments: str) -> None:
    out, err = keys_command(*arguments.split(), status=2)
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err)
    assert "s3cret" not in err


@pytest.mark.parametrize(
    "settings", [{"require_keys": True}, {"host": "0.0.0.0"}], ids=["loopback", "elsewhere"]
)
def test_without_any_key_it_stays_closed_where_keys_are_required(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with running(FakeAssistant, ServerSettings(data_dir=tmp_path, **settings)) as client:
        assert client.get("/v1/conversations").status_code == 401
        admin = bearer(new_key(tmp_path, "root", scopes=["admin"]))
        (key,) = client.get("/v1/keys", headers=admin).json()["data"]
        client.delete(f"/v1/keys/{key['id']}", headers=admin)
        assert client.get("/v1/conversations").status_code == 401
        assert client.get("/v1/conversations", headers=admin).status_code == 401


def test_keys_are_made_listed_and_revoked_by_an_admin_alone(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path)
    with running(FakeAssistant, settings) as client:
        assert client.get("/v1/keys").status_code == 403, "not without a key, even on loopback"
        admin = bearer(new_key(tmp_path, "root", scopes=["admin"]))
        assert client.get("/v1/conversations", headers=admin).status_code == 403
        asked = {"name": "bob", "rate_limit": "60/minute"}
        made = client.post("/v1/keys", json=asked, headers=admin)
        assert made.status_code == 201
        key = made.json()
        secret = key.pop("secret")
        assert (key["name"], key["scopes"], key["tenant"]) == ("bob", ["chat"], key["id"])
        bob = bearer(secret)
        assert client.get("/v1/conversations", headers=bob).status_code == 200
        for method, path in (("GET", ""), ("POST", ""), ("DELETE", f"/{key['id']}")):
            refused = client.request(method, f"/v1/keys{path}", headers=bob)
            assert error_of(refused)["code"] == "insufficient_scope"
        listed = client.get("/v1/keys", headers=admin)
        assert [one["name"] for one in listed.json()["data"]] == ["root", "bob"]
        assert secret not in listed.text
        gone = client.delete(f"/v1/keys/{key['id']}", headers=admin)
        assert gone.json()["revoked_at"] is not None
        assert client.get("/v1/conversations", headers=bob).status_code == 401
        assert client.delete("/v1/keys/key-0", headers=admin).status_code == 404
        for body in ({}, {"name": "a", "scopes": ["all"]}, {"name": "a", "user": "b"}):
            refused = client.post("/v1/keys", json=body, headers=admin)
            assert (refused.status_code, error_of(refused)["code"]) == (400, "request_error")
