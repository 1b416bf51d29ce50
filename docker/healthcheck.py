"""Ask the program in this container whether it answers: exit status 0, or 1 and one line.

    healthcheck [PORT [PATH]]

By default the server's port and /health/ready, which is 200 once its model is loaded. Standard
library alone and no proxy: it runs every few seconds, and asks its own container.
"""

import http.client
import os
import sys

TIMEOUT_S = 4.0


def check(port: int, path: str) -> str | None:
    """What is wrong, None for an answer of 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return None if response.status == 200 else f"{path} answers {response.status}"
    except (OSError, http.client.HTTPException) as error:
        return f"port {port}: {error or type(error).__name__}"
    finally:
        connection.close()


def main(arguments: list[str]) -> int:
    """The exit status for a port and a path, each with its default."""
    port, path = [*arguments, *("", "")[len(arguments) :]]
    fault = check(int(port or os.environ.get("MICO_SERVER_PORT", "8000")), path or "/health/ready")
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
    return int(fault is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
