"""Asking, stopping, changing and finding again: what a user does all day, in a real browser."""

import re
from pathlib import Path

import httpx
import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Locator, expect

from tests.support.waiting import until
from tests.ui.chat_page import PHONE, ChatPage
from tests.ui.conftest import EXAMPLES, OpenPage
from tests.ui.live import FakeServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STORY = "Tell me a long story about a sheep and a dragon."


@pytest.mark.base_llm
def test_every_modality_at_once_and_its_report(chat: ChatPage) -> None:
    names = ["sheep.jpg", "snare-drum.flac", "dragon.mp4", "near.depth.png", "box.normal.png"]
    chat.attach(*(EXAMPLES / name for name in names))
    kinds = [chip.get_attribute("data-kind") for chip in chat.chips.all()]
    assert sorted(kinds, key=str) == ["audio", "depth", "image", "image", "video"]
    expect(chat.page.get_by_label("Estimate the depth of sheep.jpg")).to_be_visible()
    # Nothing in an 8-bit file tells a normal map from a picture: the user does.
    chat.page.get_by_label("Show box.normal.png as").select_option("as normal map")
    expect(chat.page.locator(".chip[data-kind=normal]")).to_be_visible()
    expect(chat.page.locator(".meter")).to_contain_text("tokens + up to")

    chat.ask("What do you see and hear?")
    assert chat.text(1)
    report = chat.answer(1).locator("details.report")
    report.locator("summary").click()
    assert "5 media" in report.locator("summary").inner_text()
    taken = {kind: report.locator(f".taken[data-kind={kind}]") for kind in (*kinds, "normal")}
    for kind, part in taken.items():
        expect(part.locator("img").first).to_be_visible()
        assert "tokens" in part.inner_text(), kind
    assert taken["video"].locator("figcaption", has_text=" s").count() == 8
    assert "nearest 0.83 m" in taken["depth"].inner_text()
    assert taken["audio"].locator("img").count() == 2  # waveform and mel picture
    shown = chat.turns.nth(0).locator(".card")
    assert shown.count() == 5
    shown.filter(has_text="snare-drum.flac").locator(".card-open").click()
    player = chat.page.locator("dialog.viewer audio")
    expect(player).to_be_visible()
    chat.page.wait_for_function("() => document.querySelector('dialog.viewer audio').duration > 2")


def test_the_page_shows_what_an_answer_waits_for(chat: ChatPage, server: FakeServer) -> None:
    chat.attach(EXAMPLES / "sheep.jpg")
    server.allow(0)
    chat.ask("slowly")
    waiting = chat.turns.nth(0).locator(".waiting")
    expect(waiting).to_have_text("reading the conversation: 512 of 4,100")
    server.allow()
    assert chat.text(1) == "[image sheep.jpg] slowly"
    expect(waiting).to_have_count(0)
    server.allow(0)
    chat.press("Which medium made this answer?")
    note = chat.answer(1).locator(".why .note").first
    expect(note).to_have_text("leaving out each part in turn: 512 of 4,100")
    server.allow()
    expect(chat.answer(1).locator(".why .words")).to_have_text("fake")


@pytest.mark.base_llm
def test_examples_and_a_follow_up_that_needs_no_file(chat: ChatPage) -> None:
    first = chat.page.locator(".example").first  # a photograph, and its author is named
    expect(first).to_contain_text("CC0")
    first.click()
    assert "cat" in chat.text(1).lower()
    chat.press("Which medium made this answer?")
    why = chat.answer(1).locator(".why")
    expect(why.locator(".words")).to_have_text(chat.text(1).removesuffix("(not sure)").strip())
    expect(why.locator(".words mark", has_text="cat")).to_have_attribute(
        "title", re.compile("rests on")
    )
    assert why.locator(".heat .cell").count() == 16
    expect(why.locator(".rest h2")).to_contain_text("100 %")
    chat.press("New chat")
    chat.press("What colour is it?")
    assert "red" in chat.text(1).lower()
    chat.ask("What is in this clip?")
    assert chat.text(2)
    assert chat.turns.nth(1).locator(".card").count() == 0
    expect(chat.answer(2).locator(".usage")).to_contain_text("80 of media")
    expect(chat.conversations.first).to_have_text("What colour is it?")


def test_a_person_has_the_same_chats_in_every_browser_and_the_terminal(
    open_page: OpenPage, server: FakeServer
) -> None:
    first = open_page(home=True)
    first.attach(EXAMPLES / "sheep.jpg")
    first.ask("Where is my sheep?")
    answer = first.text(1)
    other = open_page(home=True)  # without cookies or storage
    other.conversations.first.click()
    assert other.text(1) == answer
    other.ask("And its dog?")
    assert other.text(2)
    expect(first.turns).to_have_count(2)
    server.allow(1)
    first.ask("Tell me more")
    expect(other.turns.nth(2).locator(".text")).to_have_text("[image")  # it grows in both
    server.allow()
    assert other.text(3) == first.text(3) == "[image sheep.jpg] Tell me more"
    asked, home = f"{server.url}/v1/conversations", {"x-mico-home": "1"}  # as /history asks
    found = httpx.get(asked, headers=home, trust_env=False).json()["data"]
    assert found[0]["title"] == "Where is my sheep?"
    stranger = open_page()
    expect(stranger.page.locator(".side-note")).to_have_text("Your conversations appear here.")
    expect(stranger.conversations).to_have_count(0)


def test_an_answer_grows_and_stops(chat: ChatPage, server: FakeServer) -> None:
    server.allow(1)
    chat.ask(STORY)
    for words, text in ((1, "[]"), (2, "[] Tell"), (5, "[] Tell me a long")):
        server.allow(words)
        expect(chat.growing).to_have_text(text)
    chat.page.keyboard.press("Escape")
    chat.expect_stopped()
    server.allow()
    expect(chat.conversations).to_have_count(1)
    for _ in range(2):  # the server keeps the words that came before the stop
        assert chat.text(1) == "[] Tell me a long"
        chat.page.reload()


def test_thoughts_are_folded_above_the_answer(chat: ChatPage, server: FakeServer) -> None:
    server.allow()
    chat.ask("ponder")
    assert chat.text(1) == "[] ponder"
    thoughts = chat.answer(1).locator("details.thoughts")
    expect(thoughts.locator("p")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator("p")).to_have_text("Hm.")


def test_a_turn_is_kept_answered_again_edited_and_deleted(chat: ChatPage) -> None:
    chat.attach(EXAMPLES / "sheep-and-diamond.jpg")
    chat.ask("What is to the right of the sheep?")
    first = chat.text(1)
    chat.answer(1).get_by_role("button", name="Answer again").click()
    assert chat.text(1) == first  # of a stand-in, so the same
    expect(chat.answer(1)).to_contain_text("drawn at random (temperature 0.7)")
    expect(chat.versions).to_have_text("2/2")
    assert chat.turns.count() == 1
    chat.edit("Name the days of the week.").press("Enter")
    expect(chat.turns.nth(0).locator(".said")).to_have_text("Name the days of the week.")
    second = chat.text(1)
    assert second != first
    expect(chat.versions).to_have_text("3/3")
    chat.press("Former version")
    expect(chat.versions).to_have_text("2/3")
    assert chat.text(1) == first
    chat.press("Later version")
    expect(chat.versions).to_have_text("3/3")
    assert chat.text(1) == second
    chat.attach(EXAMPLES / "near.depth.png")
    chat.message.fill("not sent yet")
    chat.page.reload()
    assert chat.text(1) == second
    expect(chat.turns).to_have_count(1)
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible()
    expect(chat.message).to_have_value("not sent yet")
    expect(chat.chips).to_have_count(1)
    chat.message.press("Enter")
    chat.answer(2)
    chat.turns.nth(1).get_by_role("button", name="Delete from here").click()
    chat.confirm("Delete")
    expect(chat.turns).to_have_count(1)
    chat.page.reload()
    chat.answer(1)
    expect(chat.turns).to_have_count(1)


def test_two_tabs_lose_nothing_of_each_other(chat: ChatPage) -> None:
    chat.ask("One?")
    chat.answer(1)
    # A tab that nobody looks at learns of nothing.
    unseen = ChatPage(chat.page.context.new_page(), chat.url)
    hide = "Object.defineProperty(document, 'hidden', {get: () => true})"
    unseen.page.add_init_script(hide)
    other = ChatPage(chat.page.context.new_page(), chat.url)
    for tab in (unseen, other):
        tab.page.goto(chat.page.url)
        tab.answer(1)
    for n, question in enumerate(("Two?", "Three?"), 2):
        other.ask(question)
        other.answer(n)
    expect(chat.turns).to_have_count(3)
    expect(unseen.turns).to_have_count(1)
    unseen.answer(1).get_by_role("button", name="Answer again").click()
    unseen.answer(1)
    # The others go on where they are, and show that there is another version.
    for tab in (chat, other):
        expect(tab.versions).to_have_text("1/2")
        expect(tab.turns).to_have_count(3)
    # Deleting names what goes, and takes no more than that.
    chat.turns.nth(0).get_by_role("button", name="Delete from here").click()
    expect(chat.page.locator("dialog.confirm")).to_contain_text("and the 2 turns after it?")
    chat.confirm("Cancel")
    other.press("New chat")
    other.ask("Elsewhere?")
    other.answer(1)
    expect(chat.conversations).to_have_text(["Elsewhere?", "One?"])
    chat.page.reload()
    expect(chat.versions).to_have_text("2/2")
    chat.press("Former version")
    expect(chat.turns).to_have_count(3)
    assert [tab.trouble for tab in (unseen, other)] == [[], []]


def test_media_of_a_question_are_changed_and_bad_files_are_named(
    chat: ChatPage, tmp_path: Path
) -> None:
    bad = [tmp_path / "a.png", tmp_path / "b.bin"]
    bad[0].write_bytes(b"\0 no medium")
    bad[1].write_bytes(bytes(range(256)))
    files = [EXAMPLES / "sheep.jpg", EXAMPLES / "coffee.jpg"]
    picked = chat.page.locator(".composer input[type=file]")
    picked.set_input_files([str(file) for file in (*files, *bad)])
    expect(chat.chips).to_have_count(2)
    for file in bad:
        expect(chat.page.locator(".composer .chips-problem")).to_contain_text(file.name)
    # Nobody takes a colour photograph for a depth map. Where another kind fails, it stays.
    kinds = chat.page.get_by_label("Show sheep.jpg as")
    assert kinds.locator("option").all_inner_texts() == ["as picture", "as normal map"]
    chat.page.route("**/gradio_api/upload", lambda route: route.abort())
    kinds.select_option("normal")
    expect(chat.page.locator(".composer .chips-problem")).to_contain_text("does not answer")
    chat.page.unroute("**/gradio_api/upload")
    expect(chat.chips).to_have_count(2)
    expect(kinds).to_have_value("image")
    many = [tmp_path / f"{n}.jpg" for n in range(33)]
    for file in many:
        file.write_bytes(files[0].read_bytes())
    picked.set_input_files([str(file) for file in many])
    expect(chat.page.locator(".composer .chips-problem")).to_contain_text("32.jpg: not added")
    expect(chat.chips).to_have_count(32)
    chat.page.reload()
    for file in many[:30]:
        chat.press(f"Remove {file.name}")
    expect(chat.chips).to_have_count(2)
    chat.ask("What is it?")
    assert chat.text(1) == "[image sheep.jpg, image coffee.jpg] What is it?"
    places = [chat.page.locator(name).bounding_box() for name in (".log", ".composer")]
    log, form = (0 if place is None else place["y"] for place in places)
    assert 0 < log < form  # messages stand above what is written next
    box = chat.edit("And now?")
    chat.turns.nth(0).get_by_role("button", name="Remove sheep.jpg").click()
    chat.turns.nth(0).locator("input[type=file]").set_input_files(str(EXAMPLES / "near.depth.png"))
    expect(chat.turns.nth(0).locator(".chip[data-kind]")).to_have_count(2)
    box.press("Enter")
    expect(chat.versions).to_have_text("2/2")
    assert "[image coffee.jpg, depth near.depth.png] And now?" in chat.text(1)


def test_an_answer_is_read_aloud(chat: ChatPage) -> None:
    chat.page.evaluate(
        """() => {
            const play = Audio.prototype.play;
            window.heard = [];
            Audio.prototype.play = function () {
                this.addEventListener("ended", () => heard.push(this.duration), { once: true });
                return play.call(this);
            };
        }"""
    )
    chat.ask("Who is the old man by the sea?")
    chat.answer(1)
    chat.press("Read aloud")
    expect(chat.page.get_by_role("button", name="Stop reading")).to_be_visible()
    expect(chat.page.get_by_role("button", name="Read aloud")).to_be_visible()
    (seconds,) = chat.page.evaluate("heard")
    assert 0.8 < seconds < 10
    chat.press("Read aloud")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("button", name="Read aloud")).to_be_visible()
    assert len(chat.page.evaluate("heard")) == 1  # what was stopped did not end by itself
    chat.ask("```\nx = 1\n```")
    chat.answer(2).get_by_role("button", name="Read aloud").click()
    expect(chat.page.get_by_text("Nothing in this answer can be read aloud.")).to_be_visible()


def test_a_medium_is_pinned_and_every_tab_shows_it(chat: ChatPage) -> None:
    chat.attach(EXAMPLES / "sheep.jpg", EXAMPLES / "coffee.jpg")
    chat.ask("What is it?")
    chat.answer(1)
    tab = ChatPage(chat.page.context.new_page(), chat.url)
    tab.page.goto(chat.page.url)

    def pins(page: ChatPage, **names: str) -> None:
        for name, does in names.items():
            button = page.page.get_by_role("button", name=f"{does} {name}.jpg", exact=True)
            expect(button).to_be_visible()

    pins(tab, sheep="Pin", coffee="Pin")
    chat.page.get_by_role("button", name="Pin coffee.jpg", exact=True).click()
    for page in (chat, tab):
        pins(page, sheep="Pin", coffee="Unpin")
    chat.page.reload()
    chat.edit("What else?").press("Enter")  # a version of the question shows the same media
    expect(chat.versions).to_have_text("2/2")
    chat.answer(1)
    pins(chat, sheep="Pin", coffee="Unpin")
    chat.page.reload()
    pins(chat, sheep="Pin", coffee="Unpin")
    tab.page.get_by_role("button", name="Unpin coffee.jpg").click()
    for page in (tab, chat):
        pins(page, coffee="Pin")
    assert tab.trouble == []


# The first call of this name waits before it is sent, or before its answer is heard, until `go`.
HOLD = """
([name, after]) => {
  const { server } = mico;
  const gate = new Promise((go) => (mico.go = () => new Promise((ok) => setTimeout(ok, 0, go()))));
  Object.assign(mico, { asked: 0, heard: 0, news: 0 });
  mico.on("changed", () => mico.news++);
  mico.server = new Proxy(server, {
    get: (_, called) => async (data) => {
      if (called !== name) return server[called](data);
      const first = ++mico.asked === 1;
      if (first && !after) await gate;
      const found = await server[called](data);
      mico.found = true;
      if (first && after) await gate;
      else mico.heard++;
      return found;
    },
  });
}
"""


@pytest.mark.parametrize("held", ["open", "pin, unsent", "pin, unheard"])
def test_an_answer_of_the_server_that_comes_late_undoes_nothing(chat: ChatPage, held: str) -> None:
    """A tab pins one medium, and another tab the other one, while the network is slow."""
    chat.attach(EXAMPLES / "sheep.jpg", EXAMPLES / "coffee.jpg")
    chat.ask("What is it?")
    chat.answer(1)
    tab = ChatPage(chat.page.context.new_page(), chat.url)
    tab.page.goto(chat.page.url)
    name = held.partition(",")[0]
    chat.page.evaluate(HOLD, [name, held != "pin, unsent"])

    def button(page: ChatPage, name: str) -> Locator:
        return page.page.get_by_role("button", name=name, exact=True)

    if name == "pin":
        button(chat, "Pin coffee.jpg").click()
        chat.page.wait_for_function("mico.asked" if held == "pin, unsent" else "mico.found")
    button(tab, "Pin sheep.jpg").click()
    if name == "open":
        chat.page.wait_for_function("mico.found")
        news = chat.page.evaluate("mico.news")
        button(chat, "Pin coffee.jpg").click()
        chat.page.wait_for_function(
            "news => mico.news > news && mico.heard + 1 === mico.asked", arg=news
        )
    else:
        expect(button(chat, "Unpin sheep.jpg")).to_be_visible()
    chat.page.evaluate("mico.go()")
    for page in (chat, tab):
        for medium in ("sheep", "coffee"):
            expect(button(page, f"Unpin {medium}.jpg")).to_be_visible()
    expect(chat.page.locator(".quiet")).to_have_text(re.compile(r"^Pinned"))
    assert tab.trouble == []


def test_what_changes_elsewhere_while_a_question_is_edited_shows_afterwards(chat: ChatPage) -> None:
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask("What is it?")
    chat.answer(1)
    tab = ChatPage(chat.page.context.new_page(), chat.url)
    tab.page.goto(chat.page.url)
    box = chat.edit("And now?")
    news = chat.page.evaluate("mico.news = 0, mico.on('changed', () => mico.news++), mico.news")
    tab.press("Pin sheep.jpg")
    chat.page.wait_for_function("news => mico.news > news", arg=news)
    expect(box).to_have_value("And now?")
    box.press("Escape")
    expect(chat.page.get_by_role("button", name="Unpin sheep.jpg")).to_be_visible()
    assert tab.trouble == []


def two_chats(chat: ChatPage) -> tuple[ChatPage, str]:
    """A tab shows the chat "Two?", another one "One?", whose id is given too."""
    for question in ("One?", "Two?"):
        chat.press("New chat")
        chat.ask(question)
        chat.answer(1)
    tab = ChatPage(chat.page.context.new_page(), chat.url)
    tab.page.goto(chat.page.url)
    tab.conversations.filter(has_text="One?").click()
    expect(tab.page.locator(".said")).to_have_text("One?")
    return tab, tab.page.evaluate("mico.chat.id")


def test_a_chat_that_is_deleted_while_a_tab_opens_it_is_not_shown(chat: ChatPage) -> None:
    tab, one = two_chats(chat)
    chat.page.evaluate(HOLD, ["open", True])
    chat.conversations.filter(has_text="One?").click()
    chat.page.wait_for_function("mico.found")
    tab.page.evaluate("id => mico.call('delete', { id })", one)
    chat.page.wait_for_function("mico.news && mico.heard + 1 === mico.asked")
    chat.page.evaluate("mico.go()")
    expect(chat.banner).to_contain_text("deleted")
    for page in (chat, tab):
        expect(page.turns).to_have_count(0)
    assert tab.trouble == []


def test_a_change_that_a_tab_cannot_read_at_once_is_shown_later(chat: ChatPage) -> None:
    tab, one = two_chats(chat)
    tab.page.evaluate(
        """() => {
            const { server } = mico;
            const away = async () => ((mico.server = server), null);
            const get = (_, name) => (name === "open" ? away : server[name]);
            mico.server = new Proxy(server, { get });
        }"""
    )
    chat.page.evaluate("id => mico.call('delete', { id })", one)
    expect(tab.turns).to_have_count(0)
    assert tab.trouble == []


def test_a_tab_learns_of_changes_after_a_step_back_to_a_deleted_chat(chat: ChatPage) -> None:
    tab, one = two_chats(chat)
    tab.page.evaluate("id => mico.call('delete', { id })", one)
    expect(chat.conversations).to_have_count(1)
    chat.page.go_back()
    expect(chat.banner).to_contain_text("deleted")
    tab.conversations.filter(has_text="Two?").click()
    expect(tab.page.locator(".said")).to_have_text("Two?")
    tab.ask("And then?")
    expect(chat.page.locator(".said")).to_have_text(["Two?", "And then?"])
    assert tab.trouble == []


def test_back_leads_to_the_former_chat_and_each_tab_keeps_what_is_written(chat: ChatPage) -> None:
    for question in ("One?", "Two?"):
        chat.press("New chat")
        chat.ask(question)
        chat.answer(1)
    said = chat.page.locator(".said")
    chat.page.go_back()
    expect(said).to_have_text("One?")
    chat.page.go_forward()
    expect(said).to_have_text("Two?")
    # A draft and a question that is being changed belong to their tab, and outlive a reload.
    chat.message.fill("not sent yet")
    other = ChatPage(chat.page.context.new_page(), chat.url)
    other.page.goto(chat.page.url)
    expect(other.page.locator(".said")).to_have_text("Two?")
    expect(other.message).to_have_value("")
    other.message.fill("nor this")
    chat.edit("Two and a half?")
    for tab, draft in ((chat, "not sent yet"), (other, "nor this")):
        tab.page.reload()
        expect(tab.message).to_have_value(draft)
    box = chat.page.get_by_label("Edit the question").last
    expect(box).to_have_value("Two and a half?")
    box.press("Escape")
    chat.page.reload()
    expect(said).to_have_text("Two?")
    expect(chat.page.locator(".editing")).to_have_count(0)
    # What the answer cost is folded; the button of Settings is in sight.
    cost = chat.answer(1).get_by_label("What the answer cost")
    expect(chat.answer(1).locator(".usage")).to_be_hidden()
    cost.click()
    expect(chat.answer(1).locator(".usage")).to_be_visible()
    chat.press("Settings")
    expect(chat.page.get_by_role("button", name="Done")).to_be_in_viewport()
    chat.press("Done")
    # Files are pasted wherever the focus is.
    chat.page.evaluate("document.activeElement.blur()")
    chat.page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array([1, 2])], "noise.bin"));
            document.body.dispatchEvent(
                new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }"""
    )
    expect(chat.page.locator(".composer .chips-problem")).to_contain_text("noise.bin")
    assert other.trouble == []


def test_conversations_are_found_renamed_exported_and_deleted(chat: ChatPage) -> None:
    for question in ("Who are you?", "What is a harp?"):
        chat.press("New chat")
        chat.ask(question)
        chat.answer(1)
    expect(chat.conversations).to_have_text(["What is a harp?", "Who are you?"])
    chat.page.get_by_label("Search conversations").fill("harp")
    expect(chat.conversations).to_have_text(["What is a harp?"])
    chat.page.get_by_label("Search conversations").fill("")
    expect(chat.conversations).to_have_count(2)

    chat.choose("Who are you?", "Rename")
    chat.page.get_by_label("New title").fill("About <b>you</b>")
    chat.page.get_by_label("New title").press("Enter")
    expect(chat.conversations.nth(1)).to_have_text("About <b>you</b>")
    for form, ending, part in (
        ("Markdown", "md", "# About <b>you</b>\n\n## Question\n\nWho are you?"),
        ("JSON", "json", '"message": "Who are you?"'),
    ):
        with chat.page.expect_download() as saved:
            chat.choose("About <b>you</b>", f"Export as {form}")
        assert saved.value.suggested_filename == f"About-b-you-b.{ending}"
        assert part in Path(saved.value.path()).read_text()

    chat.choose("What is a harp?", "Delete")
    chat.confirm("Delete")
    expect(chat.conversations).to_have_text(["About <b>you</b>"])
    expect(chat.turns).to_have_count(0)  # it was the one on show
    chat.conversations.first.click()
    said = chat.text(1)
    # All chats go into a file, and come back from it, in any browser.
    with chat.page.expect_download() as saved:
        chat.page.get_by_label("All chats").click()
        chat.press("Export all chats")
    chat.choose("About <b>you</b>", "Delete")
    chat.confirm("Delete")
    expect(chat.conversations).to_have_count(0)
    chat.page.locator("input.imported").set_input_files(str(saved.value.path()))
    expect(chat.conversations).to_have_text(["About <b>you</b>"])
    assert chat.text(1) == said


def test_chats_are_pinned_and_archived_in_all_tabs(chat: ChatPage) -> None:
    for question in ("Who are you?", "What is a harp?", "Why?"):
        chat.press("New chat")
        chat.ask(question)
        chat.answer(1)
    other = ChatPage(chat.page.context.new_page(), chat.url)
    other.page.goto(chat.url)
    expect(other.conversations).to_have_count(3)
    chat.choose("Who are you?", "Pin")
    pinned = ["Who are you?", "Why?", "What is a harp?"]
    for tab in (chat, other):
        expect(tab.conversations).to_have_text(pinned)
        expect(tab.page.get_by_role("list", name="Pinned").get_by_role("listitem")).to_have_count(1)
    other.choose("What is a harp?", "Archive")
    for tab in (other, chat):
        expect(tab.conversations).to_have_text(pinned[:2])
    # A search finds it, and says where it is.
    chat.page.get_by_label("Search conversations").fill("harp")
    expect(chat.conversations).to_have_text(["What is a harp? (archived)"])
    chat.page.get_by_label("All chats").click()
    chat.page.get_by_role("button", name="Archive", exact=True).click()
    expect(chat.conversations).to_have_text(["What is a harp?"])
    chat.conversations.first.click()
    expect(chat.page.get_by_role("heading", name="What is a harp?")).to_be_visible()
    chat.choose("What is a harp?", "Bring back")
    expect(chat.page.locator(".side-note")).to_have_text("Archived chats appear here.")
    chat.page.locator(".in-archive").get_by_role("button").click()
    for tab in (chat, other):
        expect(tab.conversations).to_have_text(pinned)
    chat.choose("Who are you?", "Unpin")
    expect(other.conversations).to_have_text([*pinned[1:], pinned[0]])
    assert other.trouble == []


def test_a_system_prompt_is_set_shown_and_changed_elsewhere(
    chat: ChatPage, server: FakeServer
) -> None:
    def write(tab: ChatPage, text: str) -> None:
        tab.press("System prompt of this chat")
        box = tab.page.get_by_role("textbox", name="System prompt of this chat")
        box.fill(text)
        tab.press("Save")
        expect(box).to_be_hidden()

    def shown(tab: ChatPage) -> Locator:
        return tab.page.locator(".prompt summary")

    expect(shown(chat)).to_be_hidden()
    write(chat, "Be brief.\nRhyme.")
    expect(shown(chat)).to_have_text("System prompt: Be brief.")
    chat.ask("Why?")
    chat.answer(1)
    other = ChatPage(chat.page.context.new_page(), chat.url)
    other.page.goto(chat.page.url)
    expect(shown(other)).to_have_text("System prompt: Be brief.")
    shown(other).click()
    expect(other.page.locator(".prompt p")).to_have_text("Be brief.\nRhyme.")
    # It is changed while the first tab answers.
    server.allow(1)
    chat.ask("Tell me more")
    expect(chat.turns.nth(1).locator(".text")).to_have_text("[]")
    write(other, "Sing.")
    server.allow()
    chat.answer(2)
    for tab in (chat, other):
        expect(shown(tab)).to_have_text("System prompt: Sing.")
    write(chat, "")
    for tab in (chat, other):
        expect(shown(tab)).to_be_hidden()
    assert other.trouble == []


def test_a_reload_during_the_first_answer(chat: ChatPage, server: FakeServer) -> None:
    server.allow(3)
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask(STORY)
    expect(chat.growing).to_have_text("[image sheep.jpg] Tell")
    chat.page.reload()
    # The conversation is open, and the answer goes on to be written.
    expect(chat.turns.nth(0).locator(".said")).to_have_text(STORY)
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible()
    expect(chat.growing).to_have_text("[image sheep.jpg] Tell")
    server.allow(5)
    expect(chat.growing).to_have_text("[image sheep.jpg] Tell me a")
    chat.page.reload()
    chat.press("Stop")
    chat.expect_stopped()
    chat.page.reload()
    assert chat.text(1) == "[image sheep.jpg] Tell me a"
    expect(chat.turns).to_have_count(1)


def test_an_answer_goes_on_in_another_conversation(chat: ChatPage, server: FakeServer) -> None:
    server.allow(1)
    for n, question in enumerate((STORY, "And of a camel."), 1):
        chat.press("New chat")
        expect(chat.turns).to_have_count(0)
        chat.ask(question)
        expect(chat.growing).to_have_text("[]")
        expect(chat.conversations).to_have_count(n)
    for question in (STORY, "And of a camel."):
        chat.conversations.filter(has_text=question).click()
        expect(chat.turns.nth(0).locator(".said")).to_have_text(question)
        server.allow()
        assert chat.text(1) == f"[] {question}"
        expect(chat.turns).to_have_count(1)
    expect(chat.page.get_by_text("Stopped.")).to_have_count(0)


def test_a_question_edited_while_it_is_answered(chat: ChatPage, server: FakeServer) -> None:
    server.allow(2)
    chat.ask(STORY)
    expect(chat.growing).to_have_text("[] Tell")
    # The edited text stays when the answer ends meanwhile.
    box = chat.edit("Invent a dragon.")
    chat.press("Stop")
    chat.expect_stopped()
    expect(box).to_have_value("Invent a dragon.")
    box.press("Enter")
    said = chat.turns.nth(0).locator(".said")
    expect(said).to_have_text("Invent a dragon.")
    # Sending an edited question stops its answer in progress.
    expect(chat.growing).to_have_text("[] Invent")
    chat.edit("Who are you?").press("Enter")
    expect(said).to_have_text("Who are you?")
    # The message box keeps a question that cannot be sent yet, and says so.
    expect(chat.growing).to_have_text("[] Who")
    chat.ask("And next?")
    expect(chat.page.locator(".meter")).to_contain_text("Not sent yet")
    chat.press("Stop")
    chat.answer(1)
    chat.page.reload()
    expect(said).to_have_text("Who are you?")
    expect(chat.message).to_have_value("And next?")
    expect(chat.turns).to_have_count(1)


def test_two_browsers_do_not_see_each_other(open_page: OpenPage) -> None:
    mine, theirs = open_page(), open_page()
    mine.ask("What is my secret?")
    theirs.ask("Hello!")
    mine.answer(1)
    theirs.answer(1)
    expect(mine.conversations).to_have_text(["What is my secret?"])
    expect(theirs.conversations).to_have_text(["Hello!"])
    theirs.page.goto("about:blank")  # so that the address is not a step within the page
    theirs.page.goto(mine.page.url)
    expect(theirs.banner).to_contain_text("conv-")
    expect(theirs.turns).to_have_count(0)


def test_the_server_goes_away_and_comes_back(open_page: OpenPage, server: FakeServer) -> None:
    chat, first = open_page(), open_page()
    for page in (chat, first):
        page.attach(EXAMPLES / "sheep.jpg")
    chat.ask("What is it?")
    before = chat.text(1)
    server.kill()
    try:
        chat.ask("And its colour?")
        expect(chat.banner).to_contain_text("no server answers at")
        expect(chat.problem(2)).to_contain_text("no server answers at")
        expect(chat.problem(2)).to_contain_text("Nothing is lost")
        chat.page.reload()
        expect(chat.page.locator(".said", has_text="And its colour?")).to_be_visible()
        # A new chat puts a first question back where it was written.
        first.ask("What is it?")
        expect(first.problem(1)).to_contain_text("no server answers")
        first.press("New chat")
        expect(first.message).to_have_value("What is it?")
        expect(first.chips).to_have_count(1)
        first.message.press("Enter")
        expect(first.problem(1)).to_contain_text("no server answers")
        first.open_anew()
        expect(first.page.locator(".said")).to_have_text("What is it?")
    finally:
        server.start()
    for page, n in ((chat, 2), (first, 1)):
        expect(page.banner).to_be_hidden()
        expect(page.turns).to_have_count(n)
        page.answer(n).get_by_role("button", name="Ask again").click()
        expect(page.answer(n).locator(".text")).not_to_be_empty()
        page.page.reload()
        assert page.text(n)
        expect(page.turns).to_have_count(n)
    assert chat.text(1) == before


def test_a_server_that_is_killed_in_the_first_answer(chat: ChatPage, server: FakeServer) -> None:
    server.allow(3)
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask(STORY)
    expect(chat.growing).to_have_text("[image sheep.jpg] Tell")
    until(lambda: server.kept() == "[image sheep.jpg] Tell")
    server.kill()
    try:
        expect(chat.problem(1)).to_contain_text("broke off")
        assert "peer" not in chat.problem(1).inner_text()
        # Another chat has begun meanwhile, which the server knows nothing of.
        chat.open_anew()
        expect(chat.page.locator(".said")).to_have_text(STORY)
    finally:
        server.start()
    expect(chat.banner).to_be_hidden()
    expect(chat.conversations).to_have_text([STORY])
    expect(chat.answer(1).locator(".note")).to_contain_text("the answer broke off here")
    assert chat.text(1) == "[image sheep.jpg] Tell"
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible()
    chat.answer(1).get_by_role("button", name="Answer again").click()
    expect(chat.growing).to_have_text("[image sheep.jpg] Tell")
    chat.press("Stop")
    chat.answer(1)
    chat.page.reload()
    chat.answer(1)
    expect(chat.turns).to_have_count(1)
    expect(chat.conversations).to_have_count(1)


def test_a_question_stopped_before_the_first_word(open_page: OpenPage, server: FakeServer) -> None:
    server.allow(0)
    chat = open_page(**PHONE)
    chat.attach(EXAMPLES / "sheep.jpg")
    chat.ask(STORY)
    chat.press("Stop")
    chat.expect_stopped("Stopped before the first word.")
    expect(chat.conversations).to_have_count(0)
    chat.page.reload()
    expect(chat.answer(1).locator(".note")).to_have_text("This question has no answer yet.")
    expect(chat.turns.nth(0).locator(".card img")).to_be_visible()
    server.allow()
    chat.answer(1).get_by_role("button", name="Ask again").click()
    assert chat.text(1) == f"[image sheep.jpg] {STORY}"
    expect(chat.turns).to_have_count(1)
