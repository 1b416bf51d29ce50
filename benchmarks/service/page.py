"""How soon the page shows, takes text and takes photographs, in Chromium.

Chrome's own emulation slows the connection to 50 kB/s with 300 ms before each answer, as 3G has
it. Each visit is that of a new browser, whose cache is empty.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from playwright.sync_api import Page, sync_playwright

from benchmarks.harness import Ratio, Report, medians
from benchmarks.media import photograph
from benchmarks.processes import two_free_ports

SLOW = {"latency": 300, "downloadThroughput": 50_000, "uploadThroughput": 50_000, "offline": False}
SIZE = (2000, 1500)
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
GOALS = {"first paint": 4.0, "takes text": 8.0, "photographs attached": 3.0}
"""The figures in seconds, and the most that each is to be."""


def measure(repeats: int = 5, photographs: int = 20) -> Report:
    """Open the page again and again, and attach new photographs on loopback."""
    runs: dict[str, list[float]] = {name: [] for name in (*GOALS, "kB")}
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for run in range(repeats + 1):  # the first is not counted: the server warms up
            slow = browser.new_page()
            found = opened(slow, url)
            with TemporaryDirectory() as folder:
                files = [Path(folder) / f"{n}.jpg" for n in range(photographs)]
                for n, file in enumerate(files):
                    file.write_bytes(photograph(SIZE, seed=run * photographs + n))
                size = sum(file.stat().st_size for file in files) / len(files)
                found["photographs attached"] = attached(browser.new_page(), url, files)
            for name, value in found.items():
                runs[name] += [value] if run else []
            for context in browser.contexts:
                context.close()
        browser.close()
    figures = medians(runs)
    ratios = [Ratio.bound(name, figures[name], "s", most) for name, most in GOALS.items()]
    rows = [[one.measure, f"{one.value:.2f}", one.wanted] for one in ratios]
    about = {"photographs": photographs, "megabytes": f"{size / 1e6:.1f}", "repeats": repeats}
    return Report({"rows": rows, "kilobytes": f"{figures['kB']:.0f}", **about}, ratios)


def opened(page: Page, url: str) -> dict[str, float]:
    """The seconds of one visit over a slow connection, and the kB of its files."""
    network, came = page.context.new_cdp_session(page), list[float]()
    network.send("Network.enable")
    network.send("Network.emulateNetworkConditions", SLOW)
    network.on("Network.loadingFinished", lambda event: came.append(event["encodedDataLength"]))
    start = time.perf_counter()
    page.goto(url, wait_until="commit", timeout=0)
    box = page.get_by_label("Message", exact=True)
    while not page.locator("button.send[type=submit]").is_enabled():  # its script knows the text
        box.fill("What is it?")
    seconds = time.perf_counter() - start
    page.wait_for_function(PAINT)
    page.wait_for_load_state("load")
    return {
        "first paint": page.evaluate(PAINT) / 1000,
        "takes text": seconds,
        "kB": sum(came) / 1e3,
    }


def attached(page: Page, url: str, files: list[Path]) -> float:
    """Seconds until files of the disk are attached: bytes that Playwright hands over itself would
    take it longer than all else."""
    page.goto(url)
    page.locator(".example img").first.wait_for(timeout=0)
    start = time.perf_counter()
    page.locator(".composer input[type=file]").set_input_files(files)
    page.locator(".composer .chip[data-kind]").nth(len(files) - 1).wait_for(timeout=0)
    return time.perf_counter() - start


@contextmanager
def served() -> Iterator[str]:
    """The URL of a page, which ``mico-chat ui`` serves with the mini."""
    ports = two_free_ports()
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mico_chat.cli", "ui", "--data-dir", folder]
        command += "--log-level warning --port {} --api-port {}".format(*ports).split()
        log = Path(folder) / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ})
        try:
            with httpx.Client(timeout=60, trust_env=False) as client:
                ready = False
                while not ready:
                    if process.poll() is not None:
                        raise RuntimeError(f"{' '.join(command)}: {log.read_text()}")
                    with suppress(httpx.TransportError):
                        ready = client.get(f"http://127.0.0.1:{ports[1]}/health/ready").is_success
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{ports[0]}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
