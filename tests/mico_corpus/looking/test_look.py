"""The page of clips, as a browser gets it: filters, media, hostile texts, and nothing else."""

from __future__ import annotations

import html
import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from mico_chat.errors import ConfigError, DataError
from mico_corpus.looking.look import Look, Server, serve, write_page
from mico_corpus.looking.report import write_report
from mico_training.data.sources.contents import contents
from mico_world.contact_sheet import contact_sheet
from tests.mico_corpus.made import COLOURS, HOSTILE, build, digest, video

CLIPS = 30
SHOW_ALL = """Promise.all([...document.images].map(
    (image) => { image.loading = "eager"; return image.decode(); }))"""
PLAY = "async (v) => { v.muted = true; await v.play(); v.pause(); return v.videoWidth; }"


class Page:
    """A client that sends what it is told, such as paths that browsers would mend."""

    def __init__(self, server: Server) -> None:
        self.port = server.server_address[1]

    def get(
        self, path: str = "/", method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.putrequest(method, path, skip_host=True)
            for name, value in {"Host": f"127.0.0.1:{self.port}", **headers}.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def shown(self, **filters: str | float) -> str:
        status, _, content = self.get("/?" + urlencode(filters))
        assert status == 200
        return content.decode()

    def clips(self, **filters: str | float) -> set[str]:
        return set(re.findall(r"<h2 id=[^>]*>(\w+)</h2>", self.shown(**filters)))

    def address(self, view: str, kind: str, **filters: str | float) -> str:
        """The address of the first medium of a kind on a page."""
        found = re.search(rf'src="(/{view}/\d+/{kind}[^"]*)"', self.shown(**filters))
        assert found, view
        return html.unescape(found[1])


@contextmanager
def site_of(shards: str) -> Iterator[Page]:
    look = Look(shards)
    with look.decoder, Server(look, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Page(server)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = build(tmp_path_factory.mktemp("look"), CLIPS, a_shard=10)
    write_report(output)
    return output


@pytest.fixture(scope="module")
def site(output: Path) -> Iterator[Page]:
    with site_of(str(output)) as page:
        yield page


def ids(*numbers: int) -> set[str]:
    return {digest(f"clip {number}") for number in numbers}


def test_pages_hold_each_kept_clip_once(site: Page) -> None:
    first, second = site.clips(), site.clips(page=2)
    assert (len(first), len(second)) == (24, 6)
    assert first | second == ids(*range(CLIPS))
    assert site.clips(page=99) == second, "a page after the last is the last"
    assert site.clips(page="-1 or more") == first
    text = site.shown()
    assert "30 clips, page 1 of 2" in text
    assert re.search(r'<option value="kept" selected>kept \(30\)', text)
    assert re.search(r'<option value="unsafe">unsafe \(1\)', text)


def test_filters(site: Page) -> None:
    assert site.clips(words="RED square", page=1) == ids(*range(0, CLIPS, 3))
    assert site.clips(words="number 29") == ids(29), "words of the caption that came with a file"
    assert site.clips(words="number 29", annotator="mini") == set()
    assert site.clips(annotator="ocr") == ids(*range(0, CLIPS, 5))
    assert site.clips(annotator="mini", least=0.85) == ids(*range(4, CLIPS, 5))
    assert site.clips(annotator="whisper", least=0.85) == set(), "one statement must fit it all"
    assert site.clips(words="a tone", most=0.55) == set()
    films = ids(*(n for n in range(CLIPS) if n // 3 % 2 == 0))
    assert site.clips(source="films", least="no number") == films
    assert "No clip passes these filters." in site.shown(source="films'; drop table clips")


def test_clips_that_were_left_out_say_why(site: Page) -> None:
    assert site.clips(reason="left out") == ids(CLIPS, CLIPS + 1, CLIPS + 2)
    assert site.clips(reason="unsafe", annotator="nudity", least=0.9) == ids(CLIPS + 2)
    text = site.shown(reason="dark")
    assert "<strong>dark</strong>: mean brightness 0.01" in text
    assert "brightness below clips.darkest" in text
    assert "The source file is not there any more" in text


def test_frames_of_a_clip_that_was_left_out_come_from_its_file(tmp_path: Path) -> None:
    output = build(tmp_path, clips=12)
    file = tmp_path / "videos" / "films 4.mp4"
    file.parent.mkdir()
    file.write_bytes(video("blue", seconds=7.0))
    with site_of(str(output)) as page:
        address = page.address("source", "", reason="dark")
        status, headers, content = page.get(address)
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(content)).width > 300, "four frames in a row"
        file.write_bytes(b"no video")
        assert page.get(page.address("source", "", reason="unsafe"))[0] == 422
        kept = page.address("file", "video").replace("/file/", "/source/")
        assert page.get(kept)[0] == 404, "a clip that is in a shard has its own media"


def test_media_are_those_of_the_shard(site: Page) -> None:
    status, headers, content = site.get(site.address("file", "video"))
    assert (status, headers["Content-Type"], content) == (200, "video/mp4", video("red"))
    for view, kind, form in (
        ("sheet", "video", "JPEG"),
        ("depth", "depth", "PNG"),
        ("file", "normal", "PNG"),
    ):
        status, headers, content = site.get(site.address(view, kind))
        assert (status, headers["Content-Type"]) == (200, f"image/{form.lower()}")
        assert Image.open(io.BytesIO(content)).format == form
    status, headers, content = site.get(site.address("wave", "audio"))
    assert (status, headers["Content-Type"]) == (200, "image/svg+xml")
    heights = [float(h) for h in re.findall(rb"v([\d.]+)", content)]
    assert max(heights) == pytest.approx(48, abs=4), "half of full scale"
    assert heights[0] < 2, "the tone grows loud"
    assert b"stroke-dasharray" not in content
    red = Image.open(io.BytesIO(site.get(site.address("sheet", "video"))[2]))
    near = np.asarray(red)[red.height // 4, : red.width // 4].astype(int)
    assert (np.abs(near - COLOURS["red"]).max(axis=1) < 60).any(), "the square is in a frame"


def test_a_part_of_a_video(site: Page) -> None:
    address, whole = site.address("file", "video"), video("red")
    for asked, first, last in (("100-199", 100, 199), ("500-", 500, len(whole) - 1)):
        status, headers, content = site.get(address, Range=f"bytes={asked}")
        assert (status, content) == (206, whole[first : last + 1])
        assert headers["Content-Range"] == f"bytes {first}-{last}/{len(whole)}"
    assert site.get(address, Range="bytes=-7")[2] == whole[-7:]
    assert site.get(address, Range=f"bytes={len(whole)}-")[0] == 416
    assert site.get(address, Range="bytes=9-3")[0] == 416
    assert site.get(address, Range="pages=1-2")[0] == 200
    status, headers, content = site.get(address, "HEAD")
    assert (status, headers["Content-Length"], content) == (200, str(len(whole)), b"")


def test_markup_in_captions_is_text(site: Page) -> None:
    _, headers, content = site.get("/")
    text = content.decode()
    assert HOSTILE not in text
    assert html.escape(HOSTILE) in text
    assert "<script" not in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    mirrored = site.shown(words='"><script>alert(1)</script>', annotator='"><b>', page="1")
    assert "<script" not in mirrored
    assert "<b>" not in mirrored


@pytest.mark.parametrize(
    "path",
    [
        "/../build/clips.parquet",
        "/build/clips.parquet",
        "/file/0/../../build/recipe.yaml",
        "/file/0/..%2f..%2fbuild%2frecipe.yaml",
        "/file/0/%2fetc%2fpasswd",
        "/file/0/json",
        "/file/99999/video.mp4",
        "/file/-1/video.mp4",
        "/depth/0/nothing.png",
        "/style.css/..",
        "//etc/passwd",
    ],
)
def test_nothing_else_is_served(site: Page, path: str) -> None:
    site.get("/")
    status, headers, content = site.get(path)
    assert (status, headers["Content-Type"]) == (404, "text/plain; charset=utf-8")
    assert b"root:" not in content


def test_a_view_of_another_kind_is_refused_in_words(site: Page) -> None:
    path = site.address("file", "normal").replace("/file/", "/depth/")
    status, _, content = site.get(path)
    assert status == 404
    assert content == b"normal.png is a map of surface normals, which has no view 'depth'\n"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "127.0.0.1.evil.example", ""])
def test_only_names_of_this_machine_are_answered(site: Page, host: str) -> None:
    status, _, content = site.get("/", Host=host.format(site.port))
    assert status == 403
    assert b"article" not in content
    assert site.get("/", Host=f"LocalHost:{site.port}")[0] == 200


def test_the_report_of_the_build(site: Page) -> None:
    assert 'href="/report"' in site.shown()
    status, headers, content = site.get("/report")
    assert status == 200
    assert b"Clips left out" in content
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_some_shards_of_a_build(output: Path) -> None:
    shard = sorted(output.glob("*.tar"))[0]
    with site_of(str(shard)) as page:
        assert len(page.clips()) == 10
        assert page.clips() < ids(*range(CLIPS))


def test_shards_without_tables(tmp_path: Path) -> None:
    """Those of video2dataset, beside one sample that cannot be read."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in (
            ("000.mp4", video("blue")),
            ("000.txt", HOSTILE.encode()),
            ("001.jpg", b"not a picture"),
            ("001.json", b'{"caption": "a cat", "source": "<b>", "annotations": [7, {"text": 3}]}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with site_of(str(tmp_path)) as page:
        text = page.shown()
        assert page.clips() == {"000", "001"}
        assert html.escape(HOSTILE) in text
        assert "&lt;b&gt;" in text
        assert "Annotator" not in text
        assert page.clips(medium="image") == {"001"}
        assert page.get(page.address("file", "mp4"))[2] == video("blue")
        assert page.get(page.address("sheet", "mp4"))[0] == 200
        status, headers, _ = page.get(page.address("file", "jpg"))
        assert (status, headers["Content-Type"]) == (200, "text/plain")


def test_one_page_that_needs_no_server(output: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    assert write_page(str(output), file, 2) == 2
    text = file.read_text()
    assert text.count("<article") == 2
    assert text.count("data:video/mp4;base64,") == 2
    assert 'src="/' not in text
    assert "<script" not in text
    assert "--ground:" in text


@pytest.mark.parametrize("form", ["folder", "jsonl", "csv", "json"])
def test_data_in_any_format_are_looked_at(form: str, tmp_path: Path) -> None:
    for name, text in (("1", "A red <square>."), ("2", "caf\udce9")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text.encode(errors="surrogateescape"))
    path, cause = tmp_path / f"a.{form}", "no such file"
    records = [
        {"image": f"{name}.png", "caption": "A red <square>.", "question": "Who?", "answer": "I"}
        for name in ("1", "gone")
    ]
    if form == "folder":
        path, cause = tmp_path, "is not UTF-8"
    elif form == "csv":
        path.write_text(
            "\n".join(",".join(row) for row in (records[0], *map(dict.values, records)))
        )
    else:
        path.write_text(
            json.dumps(records) if form == "json" else "\n".join(map(json.dumps, records))
        )
    file = tmp_path / "page.html"
    assert write_page(str(path), file, 9) == 2
    text = html.unescape(file.read_text())
    for words in ("A red <square>.", "1 samples, 1 bad", "captions: samples 1, image 1", cause):
        assert words in text
    assert ("Who? → I" in text) == (form != "folder")
    assert text.count("data:image/png;base64,") == 1
    samples = contents(str(path))
    contact_sheet([*map(samples.sample, samples.numbers)], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_what_is_not_there_or_taken(tmp_path: Path, site: Page) -> None:
    with pytest.raises(DataError, match=r"\*.tar: no shard and no build is there"):
        Look(str(tmp_path / "nothing"))
    build(tmp_path, clips=1)
    with pytest.raises(ConfigError, match=rf"port {site.port} of 127.0.0.1 cannot be used"):
        serve(str(tmp_path / "out"), site.port, print)


@pytest.mark.browser
@pytest.mark.slow
def test_in_a_browser(site: Page, request: pytest.FixtureRequest) -> None:
    """By keyboard, at a phone's width, in the dark: nothing overflows, nothing runs, all shows."""
    import shutil

    pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed (Debian's package chromium)")
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import expect, sync_playwright

    trouble: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        size = {"width": 390, "height": 844}
        page = browser.new_context(viewport=size, color_scheme="dark").new_page()  # type: ignore[arg-type]
        page.set_default_timeout(300_000)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.goto(f"http://localhost:{site.port}/?words=number+25")
        expect(page.get_by_role("article")).to_have_count(1)
        image = page.get_by_role("img", name="Depth in colours")
        image.scroll_into_view_if_needed()
        page.evaluate(SHOW_ALL)
        page.get_by_label("Words in captions").fill("square that")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("article")).to_have_count(24)
        page.get_by_role("link", name="Next").press("Enter")
        expect(page.get_by_role("status")).to_contain_text("page 2 of 2")
        assert page.locator("video").first.evaluate(PLAY) > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        found = Axe().run(page).response["violations"]
        assert [one["id"] for one in found] == []
        browser.close()
    assert trouble == []
