"""A PostgreSQL server of the tests' own, from Debian's packages, that ends with them."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote


def binaries() -> Path | None:
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(versions, key=lambda path: int(path.parent.parent.name), default=None)
    return None if newest is None else newest.parent


class Postgres:
    """A cluster in a temporary folder, on a port of the loopback interface, synced as usual."""

    user, password = "mico", "s3cret/@x"

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="mico-postgres-"))
        self._as_other: list[str] = []
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            other = pwd.getpwnam("postgres")
            os.chown(self._folder, other.pw_uid, other.pw_gid)
            self._as_other = ["setpriv", f"--reuid={other.pw_uid}", f"--regid={other.pw_gid}"]
            self._as_other.append("--clear-groups")
        secret = self._folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)  # its folder is closed
        options = ["--auth=scram-sha-256", f"--username={self.user}", f"--pwfile={secret}"]
        self._run("initdb", *options, "--encoding=UTF8", "--locale=C", "--no-sync")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._databases = 0
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k '' -c max_connections=200"
        log = self._folder / "log"
        self._run("pg_ctl", "-w", "--timeout=900", f"--options={options}", f"--log={log}", "start")

    def crash(self) -> None:
        """End it as a power cut does: nothing is written that was not before."""
        self._run("pg_ctl", "--mode=immediate", "-w", "stop")

    def close(self) -> None:
        self.crash()
        shutil.rmtree(self._folder)

    @property
    def url(self) -> str:
        secret = quote(self.password, safe="")
        return f"postgresql://{self.user}:{secret}@127.0.0.1:{self.port}/postgres"

    def new_database(self) -> str:
        """The URL of an empty schema, which is as good, and has not a thousand files to sync."""
        import asyncio

        import asyncpg

        self._databases += 1
        name = f"test{self._databases}"

        async def create() -> None:
            connection = await asyncpg.connect(self.url)
            await connection.execute(f"CREATE SCHEMA {name}")
            await connection.close()

        asyncio.run(create())
        return f"{self.url}?search_path={name}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_other, str(self._binaries / program)]
        command += ["--pgdata", str(self._folder / "data"), *arguments]
        # Files, not pipes: the server would hold a pipe open.
        with (self._folder / "out").open("w+") as out:
            done = subprocess.run(command, cwd="/", stdout=out, stderr=out, env={"LC_ALL": "C"})
            out.seek(0)
            assert done.returncode == 0, out.read()
