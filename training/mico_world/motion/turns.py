"""What is said and asked about a clip: captions, and questions about ways, the camera and names."""

from collections.abc import Sequence

from mico_training.data.language.english import (
    Rng,
    agreement,
    article,
    listed,
    pick,
    sentence,
    shuffled,
)
from mico_training.data.sources.written import Split, Turn
from mico_world import language as en
from mico_world.motion.paths import REVERSED, STEP, WAYS, Track
from mico_world.pictures.pictures import name_turn
from mico_world.things.catalogue import Catalogue

VIDEO = "video.mp4"
_MOVING_ASKED = 0.53  # the share of moving things at which "Does it move?" has as many yes as no


def ways_to_say(way: str) -> tuple[str, ...]:
    return en.phrases().words[f"moves {way}"]


def _clause(rng: Rng, track: Track, subject: str) -> str:
    s = agreement(track.thing.name)["s"]
    if track.way == "still":
        return f"{subject} stand{s} still"
    if track.way == "nearer":
        return f"{subject} come{s} nearer"
    return f"{subject} move{s} {pick(rng, ways_to_say(track.way)[:2])}"


def _everything(way: str) -> str:
    opposite = REVERSED[way] if way in STEP else way
    return f"{'comes' if way == 'nearer' else 'moves'} {ways_to_say(opposite)[0]}"


def captions(rng: Rng, tracks: Sequence[Track], camera: str) -> tuple[str, ...]:
    moves = f"the camera {en.word(rng, f'camera {camera}')}"
    if not tracks:
        seen = _everything(camera)
        return sentence(f"{moves}, so everything {seen}"), sentence(f"everything {seen}")
    after = "" if camera == "still" else f", while {moves}"
    named = [f"{t.colour} {t.thing.name}" if t.colour else t.thing.name for t in tracks]
    clauses = [_clause(rng, t, article(n)) for t, n in zip(tracks, named, strict=True)]
    other = (
        clauses[::-1]
        if len(tracks) > 1
        else [_clause(rng, tracks[0], article(tracks[0].thing.name))]
    )
    return tuple(sentence(listed(said) + after) for said in (clauses, other))


def _ask(
    rng: Rng,
    sort: str,
    skill: str,
    accept: Sequence[str],
    choices: Sequence[str] = (),
    **facts: str,
) -> Turn:
    texts = en.say(rng, sort, **facts)
    return Turn(*texts, skill, (VIDEO,), tuple(choices), tuple(accept))


def _way_turns(rng: Rng, track: Track, camera: str, *, alone: bool) -> list[Turn]:
    """Which way does the dog move? Left or right?"""
    way, name = track.way, track.thing.name
    facts = {"a": name, **agreement(name), "clause": _clause(rng, track, f"the {name}")}
    only = " of the only thing" if alone and rng.random() < 0.4 else ""
    accept = en.accepted(f"moves {way}")
    question = en.ask(rng, f"way{only}", **facts)
    if way == "still":
        sort = "no way" if camera == "still" else "no way but the camera's"
        return [Turn(question, en.answer(rng, sort, **facts), "motion", (VIDEO,), WAYS, accept)]
    reply = en.answer(rng, "way", way=ways_to_say(way)[0], **facts)
    turns = [Turn(question, reply, "motion", (VIDEO,), WAYS, accept)]
    ways = shuffled(rng, way, REVERSED[way])
    variant = int(rng.integers(2))
    facts["one"], facts["two"] = (ways_to_say(w)[variant] for w in ways)
    facts["way"] = facts["one"] if ways[0] == way else facts["two"]
    facts["move"] = "come" if facts["one"].startswith(("nearer", "towards")) else "move"
    question = en.ask(rng, f"one way or the other{only}", **facts)
    reply = en.answer(rng, "one way or the other", **facts)
    return [*turns, Turn(question, reply, "motion", (VIDEO,), ways, accept)]


def _camera_turns(rng: Rng, way: str, *, all_still: bool) -> list[Turn]:
    """Is the camera moving? Which way? Two cameras in five move: "yes" and "no" are as likely."""
    facts = {"camera": en.word(rng, f"camera {way}"), "yes": "no" if way == "still" else "yes"}
    turns = []
    if way != "still" or rng.random() < 0.65:
        turns = [_ask(rng, "camera moves", "camera", (facts["yes"],), ("yes", "no"), **facts)]
    if way == "still":
        return turns
    accept = en.accepted(f"camera {way}")
    turns.append(_ask(rng, "camera's way", "camera", accept, WAYS, **facts))
    ways = shuffled(rng, way, REVERSED[way])
    one, two = (en.phrases().words[f"camera {w}"][0].replace("s ", " ", 1) for w in ways)
    facts |= {"one": one, "two": two}
    turns.append(_ask(rng, "camera one way or the other", "camera", accept, ways, **facts))
    seen = REVERSED[way] if way in STEP else way
    facts |= {"way": ways_to_say(seen)[0], "everything": _everything(way)}
    accept = en.accepted(f"moves {seen}")
    if all_still:
        turns.append(_ask(rng, "everything's way", "motion", accept, WAYS, **facts))
    return turns


def turns_of(
    rng: Rng, split: Split, things: Catalogue, tracks: Sequence[Track], camera: str
) -> list[Turn]:
    moving = [t for t in tracks if t.way != "still"]
    turns = _camera_turns(rng, camera, all_still=not moving)
    names = [t.thing.name for t in tracks]
    for track in [tracks[int(i)] for i in rng.permutation(len(tracks))[:2]]:
        turns += _way_turns(rng, track, camera, alone=len(tracks) == 1 and camera == "still")
    if tracks:
        asked = pick(rng, tracks)
        name = asked.thing.name
        if asked.way == "still" or rng.random() < _MOVING_ASKED:
            yes = "no" if asked.way == "still" else "yes"
            facts = {"a": name, "yes": yes, "clause": _clause(rng, asked, f"the {name}")}
            facts |= agreement(name)
            turns.append(_ask(rng, "moves", "moves", (yes,), ("yes", "no"), **facts))
    if len(moving) == 1 and len(tracks) > 1:
        (mover,) = moving
        other = pick(rng, [t for t in tracks if t is not mover])
        two = shuffled(rng, mover.thing.name, other.thing.name)
        facts = {"a": two[0], "b": two[1], "name": mover.thing.name}
        facts["clause"] = _clause(rng, mover, f"the {mover.thing.name}")
        turns.append(_ask(rng, "which moves", "motion_name", mover.thing.accept, two, **facts))
    if len(moving) < 3:
        movers = listed([f"the {t.thing.name}" for t in moving])
        still = "nothing" if camera == "still" else "only the camera"
        accept = _accepted(moving) or still.split()[-1:]
        s = agreement(moving[0].thing.name)["s"] if len(moving) == 1 else "" if moving else "s"
        turns.append(_ask(rng, "what moves", "motion_name", accept, one=movers or still, s=s))
    absent = things.distinct(rng, split, 1, unlike=[t.thing for t in tracks])[0].name
    there = bool(tracks) and rng.random() < 0.5
    named = pick(rng, names) if there else absent
    facts = {"one": article(named), "yes": "yes" if there else "no", **agreement(named)}
    facts["found"] = f"I {'see' if there else 'do not see'} {facts['one']}"
    yes_no = ("yes", "no")
    turns.append(_ask(rng, "present in a clip", "present", (facts["yes"],), yes_no, **facts))
    if len(tracks) == 1:
        turns.append(name_turn(rng, tracks[0].thing, VIDEO, "name in a clip"))
    elif tracks:
        everything = listed([article(name) for name in names])
        turns.append(_ask(rng, "name in a clip", "name", _accepted(tracks), one=everything))
    said = captions(rng, tracks, camera)[0]
    accept = _accepted(tracks) or en.accepted(f"camera {camera}")
    question = en.ask(rng, "describe a clip")
    return [*turns, Turn(question, said, "describe", (VIDEO,), accept=tuple(accept))]


def _accepted(tracks: Sequence[Track]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(w for t in tracks for w in t.thing.accept))
