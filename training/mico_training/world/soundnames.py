"""The everyday sounds that the data engine knows: plain names and how people speak of them.

A class is the word that people would say ("dog", "piano", "rain"), not the finest label that a
source offers: the church, reed and rock organ are one "organ". ``also`` holds the other words
that are right as well; they widen what counts as a right answer, find the pictures that belong
to a sound, and keep confusable names out of the wrong choices. Very short sounds and sounds
with a single known maker stay in the list; their clips are for training only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["animal", "instrument", "vehicle", "person", "nature", "object"]


@dataclass(frozen=True)
class SoundName:
    """A class of sounds.

    ``phrase`` answers "What do you hear?", ``sentence`` captions a clip; both hold ``name``.
    ``steady`` sounds (rain, an engine) are extended by looping, the others by repetition with
    gaps.
    """

    name: str
    kind: Kind
    phrase: str
    sentence: str
    also: tuple[str, ...] = ()
    steady: bool = False

    @property
    def accept(self) -> tuple[str, ...]:
        """The words one of which a right answer contains."""
        return (self.name, *self.also)


_ANIMALS = """
bear | growling | growls |
bee | buzzing | buzzes | bumblebee, wasp, hornet, insect, fly
bird | singing | sings | blackbird, lark, robin, sparrow, nightingale, parrot, canary, bluebird
camel | grunting | grunts | dromedary
cat | meowing | meows | kitten
chicken | clucking | clucks | hen
cow | mooing | moos | bull, cattle, ox
cricket | chirping | chirps | grasshopper, insect
crow | cawing | caws | raven
cuckoo | calling | calls | bird
deer | calling | calls | doe, stag, caribou, reindeer
dog | barking | barks | puppy
dolphin | clicking | clicks |
donkey | braying | brays | mule
duck | quacking | quacks | drake, mallard
elephant | trumpeting | trumpets |
fox | barking | barks |
frog | croaking | croaks | toad
goat | bleating | bleats |
goose | honking | honks | gander
horse | neighing | neighs | pony
lion | roaring | roars |
monkey | screaming | screams | chimpanzee, chimp, ape, gorilla
mosquito | buzzing | buzzes | insect, fly, bee
mouse | squeaking | squeaks |
owl | hooting | hoots |
penguin | calling | calls |
pig | grunting | grunts | hog, boar
rooster | crowing | crows | cock, cockerel
sea lion | barking | barks | seal
seagull | crying | cries | gull
sheep | bleating | bleats | lamb
tiger | growling | growls |
turkey | gobbling | gobbles |
whale | calling | calls | orca
wolf | howling | howls |
"""

_INSTRUMENTS = """
accordion | bandoneon
bagpipes | bagpipe
banjo |
bass guitar | bass, electric bass
bassoon |
bongos | bongo, conga, drum, drums
brass band | brass, trumpets, trumpet
cello |
choir | voices, singing, singers, voice
clarinet |
cowbell | agogo
cymbal | cymbals, hi-hat, gong
double bass | contrabass, bass
drum | drums, drum kit, tom-tom
electric guitar | guitar
electric piano | piano, keyboard
flute | piccolo, pan flute
french horn | horn
glockenspiel | celesta, bells
guitar | acoustic guitar, ukulele, mandolin
harmonica |
harp |
harpsichord |
maracas | maraca, shaker, rattle
marimba | xylophone
music box |
oboe | english horn
orchestra | strings, violins, string orchestra
organ | church organ
piano | grand piano
recorder | flute
saxophone | sax
sitar |
snare drum | drum, snare, drums
steel drum | steelpan, steel drums
synthesizer | synth, keyboard
tambourine |
timpani | kettledrum, drum, drums
triangle |
trombone |
trumpet | bugle, cornet
tuba |
vibraphone | xylophone, bells
viola | violin
violin | fiddle
wood block | claves, castanets, woodblock
xylophone | marimba
"""

_OTHERS = """
airplane | vehicle | ~an airplane flying | ~an airplane flies past | plane, jet, aeroplane, aircraft
alarm clock | object | an alarm clock ringing | an alarm clock rings | alarm, clock
applause | person | ~applause | ~people give applause | clapping, cheering, crowd, audience
beep | object | a beep | a device gives a beep | beeping, tone
bell | object | a bell ringing | a bell rings | church bell, bells, gong, tubular bells, chime
bubbles | nature | ~bubbles in water | ~bubbles rise in water | bubble, bubbling, water
camera | object | a camera clicking | a camera takes a picture | shutter
car | vehicle | ~a car driving | ~a car drives by | engine, automobile, race car
car horn | vehicle | a car horn honking | a car horn honks | horn, honk
cash register | object | a cash register ringing | a cash register rings | till
chainsaw | object | ~a chainsaw running | ~a chainsaw cuts wood | saw, motor
clapping | person | hands clapping | somebody is clapping | clap, hands, applause
clock | object | ~a clock ticking | ~a clock ticks | tick, ticking, metronome, watch
coin | object | a coin dropping | a coin drops | coins, money
crash | object | a crash | something falls with a crash | collision, breaking
door | object | a door closing | a door is opened and closed | knock, slam
explosion | object | an explosion | there is an explosion | blast, bomb, boom
fire | nature | ~a fire crackling | ~a fire crackles | campfire, flames
fireworks | object | fireworks going off | fireworks go off | firework, explosion
footsteps | person | footsteps | somebody walks with loud footsteps | steps, walking
gunshot | object | a gunshot | a gunshot rings out | gun, shot, gunfire
hammer | object | a hammer hitting something | a hammer hits metal | hammering, mallet
heartbeat | person | ~a heartbeat | ~a heartbeat is heard | heart
helicopter | vehicle | ~a helicopter flying | ~a helicopter flies by | chopper
jackhammer | object | ~a jackhammer at work | ~a jackhammer breaks a road | drill
laser | object | a laser gun | a laser gun shoots | game, zap
laughter | person | laughter | somebody bursts into laughter | laughing, laugh, laughs
notification | object | a notification chime | a notification sounds | chime, alert, message
rain | nature | ~rain falling | ~rain falls | raining
saw | object | a saw cutting wood | a saw cuts wood | sawing
scissors | object | scissors cutting | scissors cut paper | shears
scream | person | a scream | somebody gives a scream | screaming, shout, cry
sea waves | nature | ~sea waves | ~sea waves roll in | sea, waves, ocean, surf, beach
ship | vehicle | a ship sounding its horn | a ship sounds its horn | boat, horn, ferry, foghorn
siren | vehicle | ~a siren | ~a siren wails | fire truck, fire engine, ambulance, police car
speech | person | ~speech | ~there is speech | voice, speaking, talking, talk, person, man, woman
static | object | ~static noise | ~a radio gives static | noise, hiss, white noise
telephone | object | a telephone ringing | a telephone rings | phone, ring, mobile phone
thunder | nature | ~thunder | ~thunder rolls | thunderstorm, lightning, storm, lightning bolt
toilet | object | a toilet flushing | a toilet is flushed | flush
train | vehicle | a train passing | a train passes | locomotive, steam train, railway
truck | vehicle | ~a truck driving | ~a truck drives off | bus, lorry, engine
typing | object | typing on a keyboard | somebody is typing | keyboard, keys, typewriter
vacuum cleaner | object | ~a vacuum cleaner | ~a vacuum cleaner runs | vacuum, hoover
video game | object | a video game | a video game plays a sound | game, arcade, computer game
washing machine | object | ~a washing machine running | ~a washing machine runs | washer
water | nature | ~water flowing | ~water flows | stream, river, splash, splashing
whistle | object | a whistle blowing | somebody blows a whistle | whistling
wind | nature | ~wind blowing | ~the wind blows | storm
wind chimes | object | wind chimes ringing | wind chimes ring | chimes, bells, bell
"""

_PLURAL = frozenset({"bagpipes", "bongos", "maracas"})


def article(noun: str) -> str:
    """``"owl"`` -> ``"an owl"``; plural and uncountable names stay bare."""
    if noun in _PLURAL or noun in _NO_ARTICLE:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_NO_ARTICLE = {
    *("applause", "bubbles", "clapping", "fireworks", "footsteps", "laughter", "rain"),
    *("scissors", "sea waves", "speech", "static", "thunder", "typing", "water", "wind"),
    "wind chimes",
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@cache
def sound_names() -> dict[str, SoundName]:
    """All classes by name, in sorted order."""
    found: list[SoundName] = []
    for line in _ANIMALS.strip().splitlines():
        name, doing, does, also = (part.strip() for part in line.split("|"))
        phrase, sentence = f"{article(name)} {doing}", f"{article(name)} {does}"
        steady = doing == "buzzing"
        found.append(SoundName(name, "animal", phrase, sentence, _words(also), steady))
    for line in _INSTRUMENTS.strip().splitlines():
        name, also = (part.strip() for part in line.split("|"))
        verb = "play" if name in _PLURAL else "plays"
        subject = article(name)
        found.append(
            SoundName(name, "instrument", f"{subject} playing", f"{subject} {verb}", _words(also))
        )
    for line in _OTHERS.strip().splitlines():
        name, kind, phrase, sentence, also = (part.strip() for part in line.split("|"))
        steady = phrase.startswith("~")
        found.append(
            SoundName(
                name,
                _kind(kind),
                phrase.lstrip("~"),
                sentence.lstrip("~"),
                _words(also),
                steady,
            )
        )
    return {sound.name: sound for sound in sorted(found, key=lambda sound: sound.name)}


def _kind(word: str) -> Kind:
    kinds: dict[str, Kind] = {
        "vehicle": "vehicle",
        "person": "person",
        "nature": "nature",
        "object": "object",
    }
    return kinds[word]


def class_names() -> list[str]:
    """The names of all classes, sorted: the sound vocabulary of the encoder."""
    return list(sound_names())


def confusable(one: str, other: str) -> bool:
    """Whether a clip of ``one`` could rightly be called ``other`` as well (or is the same)."""
    names = sound_names()
    return bool(set(names[one].accept) & set(names[other].accept))
