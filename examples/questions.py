"""Writes a csv file of questions by the kind of answer that they ask for: six classes, as in TREC's coarse ones.

    python examples/questions.py questions.csv

ABBR an abbreviation, DESC a description, ENTY a thing, HUM a person, LOC a place, NUM a number. Made from patterns,
whose words of asking overlap between the classes ("What …", "Which …", "Name …"), so that the first word is not enough.
"""

import csv
import random
import sys

WORDS = """
short: NASA, NATO, HTML, DNA, UNESCO, AIDS, GPS, RAM, IBM, BBC, PhD, OPEC, FBI, WWF, SCUBA, LASER, ISBN, UFO, HDTV, PIN
long: compact disc, frequently asked questions, light bulb, personal computer, world trade organization, square foot
idea: photosynthesis, inflation, jazz, a black hole, the greenhouse effect, democracy, an eclipse, gravity, a monsoon
event: the French Revolution, the moon landing, World War II, the Olympic Games, the Titanic disaster, the Gold Rush
group: animal, sport, colour, language, instrument, metal, food, disease, currency, plant
doing: climb trees, win the championship, use in the temple, find in the desert, speak at court
work: Hamlet, the Mona Lisa, the telephone, Star Wars, the theory of relativity, Moby Dick, penicillin
role: president, queen, inventor, actor, author, astronaut, explorer, coach, composer
made: wrote, painted, invented, directed, discovered, composed, founded, designed
place: France, Brazil, Egypt, Japan, Texas, Norway, Kenya, Peru, Canada, Scotland
site: city, country, river, mountain, island, state, continent, lake, capital, desert
thing: the Eiffel Tower, the Nile, Mount Everest, the Great Wall, the Amazon, the Golden Gate Bridge
unit: miles, people, years, dollars, languages, islands, calories, points, bones, players
size: tall, long, old, far away, deep, fast, heavy, hot, expensive
"""
PATTERNS = """
ABBR: What does {short} stand for ?, What is the full form of {short} ?, What is the abbreviation of {long} ?
ABBR: Name the words behind the letters {short} ., How is {long} abbreviated ?, Which acronym means {long} ?
DESC: What is {idea} ?, How does {idea} work ?, Why did {event} happen ?, What caused {event} ?, Describe {event} .
DESC: What is the meaning of {idea} ?, What are the effects of {idea} on {place} ?, What was {event} like in {place} ?
ENTY: What {group} do they {doing} ?, Which {group} is most popular in {place} ?, Name a {group} from {place} .
ENTY: What kind of {group} would you {doing} ?, What {group} is {work} named after ?
HUM: Who {made} {work} ?, Which {role} {made} {work} ?, Name the {role} of {place} ., Whose idea was {work} ?
HUM: Who was the first {role} of {place} ?, What {role} came from {place} ?
LOC: Where is {thing} ?, What {site} is {thing} in ?, Which {site} is the largest in {place} ?
LOC: Name the {site} where {event} took place ., Where did {event} begin ?, What is the capital of {place} ?
NUM: How many {unit} are there in {place} ?, How {size} is {thing} ?, When did {event} happen ?
NUM: What year was {work} finished ?, What is the population of {place} ?, Which date did {event} begin on ?
"""


def lists(text: str) -> dict[str, list[str]]:
    """The items behind each name, of all lines with this name."""
    found: dict[str, list[str]] = {}
    for line in text.strip().splitlines():
        name, _, items = line.partition(": ")
        found.setdefault(name, []).extend(items.split(", "))
    return found


def questions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different (question, label) pairs in random order; at most as many as the patterns allow."""
    rng, words, patterns = random.Random(seed), lists(WORDS), lists(PATTERNS)
    found: dict[str, str] = {}
    for i in range(20 * count):
        label = list(patterns)[i % len(patterns)]
        text = rng.choice(patterns[label]).format(**{name: rng.choice(choices) for name, choices in words.items()})
        found.setdefault(text, label)
        if len(found) == count:
            break
    rows = list(found.items())
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    with open(sys.argv[1], "w", newline="", encoding="utf-8") as file:  # noqa: PTH123
        csv.writer(file).writerows([("text", "label"), *questions(1500)])
