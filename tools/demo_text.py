"""The prompt of tools/demo: the log book of a lighthouse, as long as it is asked for."""

import random
from collections.abc import Iterator
from datetime import date, timedelta

TITLE = (
    "The Log of the Skerry Light\n\n"
    "Kept by Thomas Arkwright, principal keeper, from the first of March 1874. The tower stands "
    "on the outer reef, two miles from the harbour. Its lamp burns colza oil before a lens of "
    "eleven panels, and is seen for eighteen miles in clear weather. Two assistants, Mr Hale and "
    "young Peter Munro, share the watches with me.\n\n"
)
WINDS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
FORCES = ["light", "moderate", "fresh", "strong", "rising to a gale after dark", "falling by noon"]
SKIES = [
    "clear, the mainland seen to the last farm",
    "thick with fog until ten",
    "rain in squalls, and a rainbow over the harbour",
    "grey and dry",
    "snow on the far hills",
    "a heavy swell on the reef, spray as high as the gallery",
]
RIGS = ["brig", "schooner", "barque", "collier", "steamer", "ketch", "full-rigged ship"]
NAMES = ["Alma", "Good Intent", "Caroline", "Sea Lark", "Providence", "Margaret", "Albion", "Thule"]
PORTS = ["Whitby", "Leith", "Bergen", "Hull", "Dundee", "Rotterdam", "Riga", "Aberdeen"]
CARGOES = ["coal", "herring in barrels", "Baltic timber", "slate", "oats", "iron rails", "flax"]
WORK = [
    "Trimmed the wicks and cleaned the lens, panel by panel, with spirit of wine.",
    "Wound the clockwork every four hours; the lens turned once in six minutes as it should.",
    "Painted the gallery rail, which the salt had eaten since the autumn.",
    "Mr Hale mended the boat, two planks having started on the landing stones.",
    "Measured the oil: the lamp takes a little under two pints an hour.",
    "Peter read aloud from the almanac, that the moon will be full on Thursday.",
    "The relief boat brought bread, lamp oil, letters, and a newspaper nine days old.",
    "Set the barometer by that of the harbour master; ours stood a tenth too high.",
    "A flock of fieldfares struck the lantern in the night; forty lay on the rocks at dawn.",
    "Rang the fog bell, one stroke in the half minute, from midnight until it cleared.",
    "Two seals on the eastern ledge, and a third that watched us from the water.",
    "Caught six codling off the landing at slack water, and had them for supper.",
]


def entry(day: date, chance: random.Random) -> str:
    """One day of the log."""
    barometer = f"{chance.randint(288, 306) / 10:.1f}"
    first, second = chance.sample(NAMES, 2)
    home, bound = chance.sample(PORTS, 2)
    lit = f"{5 + day.month % 5}.{chance.randint(0, 59):02d}"
    done = " ".join(chance.sample(WORK, 2))
    return (
        f"{day.day} {day:%B} {day.year}. Wind {chance.choice(WINDS)}, {chance.choice(FORCES)}; "
        f"{chance.choice(SKIES)}. Barometer {barometer} inches. Passed, the "
        f"{chance.choice(RIGS)} {first} of {home}, with {chance.choice(CARGOES)} for {bound}, and "
        f"the {chance.choice(RIGS)} {second}, in ballast. {done} Lamp lit at {lit} in the evening, "
        f"and it burned clear until morning.\n\n"
    )


def log_book() -> Iterator[str]:
    """The title, then a day after another without end: the same ones every time."""
    yield TITLE
    chance = random.Random(1874)
    day = date(1874, 3, 1)
    while True:
        yield entry(day, chance)
        day += timedelta(days=1)
