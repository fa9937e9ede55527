"""Make requests with their answers: JSON out of a sentence, dates, units, tables, SQL, sorting.

Every row is drawn from a seeded generator, so a seed always gives the same rows. Names are built
from syllables. Each answer follows from its request; what has to be learnt is the form, the copying
and a little arithmetic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

Row = dict[str, Any]
NUM_TRAIN, NUM_EVAL = 7000, 400
ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kl", "st", "tr")
VOWELS, ENDS = ("a", "e", "i", "o", "u", "ai", "ea", "ou"), ("n", "r", "s", "l", "nd", "rk", "m", "t", "", "", "", "")
ITEMS = (
    "lamp", "desk", "kettle", "bicycle", "notebook", "camera", "blanket", "ladder", "drill", "mirror", "tent", "pump", "shelf",
    "radio", "hammer", "basket", "carpet", "helmet", "filter", "printer", "stool", "router", "fan", "tray", "cable",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "grey", "yellow", "brown", "orange", "purple")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = (
    ("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("hours", "minutes", 60), ("minutes", "seconds", 60),
    ("days", "hours", 24), ("weeks", "days", 7), ("litres", "ml", 1000), ("feet", "inches", 12), ("dozen", "pieces", 12),
)  # fmt: skip
COLUMNS = {
    "orders": (("item", "text"), ("colour", "text"), ("amount", "number"), ("price", "number"), ("city", "text")),
    "staff": (("name", "text"), ("city", "text"), ("age", "number"), ("salary", "number")),
    "trips": (("driver", "text"), ("start", "text"), ("goal", "text"), ("distance", "number"), ("hours", "number")),
    "rooms": (("floor", "number"), ("seats", "number"), ("colour", "text"), ("building", "text")),
}


def request_rows() -> tuple[list[Row], list[Row]]:
    """Return (train, eval) rows of chats; no request of the evaluation occurs in training."""
    train = _rows(random.Random(1), NUM_TRAIN, set())
    return train, _rows(random.Random(2), NUM_EVAL, {row["messages"][0]["content"] for row in train})


def _rows(draw: random.Random, count: int, seen: set[str]) -> list[Row]:
    rows = []
    while len(rows) < count:
        request, answer = draw.choice(KINDS)(draw)
        if request not in seen:
            seen.add(request)
            rows.append({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]})
    return rows


def word(draw: random.Random) -> str:
    """Return a made word of two or three syllables."""
    return "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(draw.randint(1, 2))) + draw.choice(ENDS)


def _name(draw: random.Random) -> str:
    return word(draw).capitalize()


def _order(draw: random.Random) -> tuple[str, str]:
    """An order in a sentence becomes JSON."""
    customer, city, item, colour = f"{_name(draw)} {_name(draw)}", _name(draw), draw.choice(ITEMS), draw.choice(COLOURS)
    amount, price = draw.randint(1, 60), draw.randint(100, 99999) / 100
    found = {"customer": customer, "city": city, "item": item, "colour": colour, "amount": amount, "price": price}
    text = draw.choice((
        f"{customer} from {city} ordered {amount} {colour} {item}s at {price:.2f} each.",
        f"Please send {amount} {item}s ({colour}) to {customer}, {city}. The price is {price:.2f} a piece.",
        f"Hello, this is {customer} in {city}. I would like {amount} {colour} {item}s, {price:.2f} apiece as agreed.",
        f"Note of the call: {amount} x {item}, {colour}, unit price {price:.2f}, for {customer} ({city}).",
    ))  # fmt: skip
    if draw.random() < 0.3:
        found["total"] = round(amount * price, 2)
        return f"Extract the order as JSON, with its total.\n{text}", json.dumps(found)
    keys = list(found)
    draw.shuffle(keys)
    keys = keys[: draw.randint(2, len(keys))]
    return f"Extract {', '.join(keys)} as JSON.\n{text}", json.dumps({key: found[key] for key in keys})


def _meeting(draw: random.Random) -> tuple[str, str]:
    """A meeting in a sentence becomes JSON with an ISO date."""
    day, hour, minute = _date(draw), draw.randint(7, 19), draw.choice((0, 15, 30, 45))
    people, place = [_name(draw) for _ in range(draw.randint(2, 4))], _name(draw)
    length = draw.choice((15, 30, 45, 60, 90))
    text = (
        f"{people[0]} meets {' and '.join(people[1:])} on {_written(draw, day)} at {hour}:{minute:02d} "
        f"in {place} for {length} minutes."
    )
    end = hour * 60 + minute + length
    found = {"date": day.isoformat(), "start": f"{hour:02d}:{minute:02d}", "end": f"{end // 60:02d}:{end % 60:02d}"}
    return f"Write this meeting as JSON.\n{text}", json.dumps({**found, "place": place, "people": people})


def _calendar(draw: random.Random) -> tuple[str, str]:
    """A date is written otherwise, or moved by days."""
    day = _date(draw)
    if draw.random() < 0.5:
        return f"Write this date as YYYY-MM-DD: {_written(draw, day)}", day.isoformat()
    if draw.random() < 0.5:
        known = day - timedelta(3)
        return f"Which weekday is {day.isoformat()}, if {known.isoformat()} is a {_weekday(known)}?", _weekday(day)
    moved = draw.randint(2, 40)
    return f"Which date is {moved} days after {_written(draw, day)}?", (day + timedelta(moved)).isoformat()


def _conversion(draw: random.Random) -> tuple[str, str]:
    """An amount is converted, with the working."""
    large, small, factor = draw.choice(UNITS)
    amount = draw.randint(2, 400)
    given = amount * factor
    if draw.random() < 0.5:
        return f"Convert {amount} {large} to {small}.", f"{amount} {large} = {amount} * {factor} {small} = {given} {small}"
    return f"Convert {given} {small} to {large}.", f"{given} {small} = {given} / {factor} {large} = {amount} {large}"


def _table(draw: random.Random) -> tuple[str, str]:
    """A question about a small table is answered with a sentence."""
    people = list(dict.fromkeys(_name(draw) for _ in range(draw.randint(3, 6))))
    ages, cities = [draw.randint(18, 80) for _ in people], [_name(draw) for _ in people]
    lines = ["| name | age | city |", "|---|---|---|"]
    lines += [f"| {name} | {age} | {city} |" for name, age, city in zip(people, ages, cities)]
    pick = draw.randrange(len(people))
    oldest = ages.index(max(ages))
    question, answer = draw.choice((
        (f"Where does {people[pick]} live?", f"{people[pick]} lives in {cities[pick]}."),
        (f"How old is {people[pick]}?", f"{people[pick]} is {ages[pick]} years old."),
        ("Who is the oldest?", f"{people[oldest]} is the oldest, at {ages[oldest]}."),
        (f"Who lives in {cities[pick]}?", f"{people[pick]} lives in {cities[pick]}."),
        ("Write the table as CSV.", "\n".join(f"{n},{a},{c}" for n, a, c in zip(people, ages, cities))),
    ))  # fmt: skip
    return "\n".join([*lines, question]), answer


def _sql(draw: random.Random) -> tuple[str, str]:
    """A question about a table of known columns becomes SQL."""
    table = draw.choice(tuple(COLUMNS))
    texts = [name for name, kind in COLUMNS[table] if kind == "text"]
    numbers = [name for name, kind in COLUMNS[table] if kind == "number"]
    text, number, value, limit = draw.choice(texts), draw.choice(numbers), _name(draw), draw.randint(2, 500)
    question, query = draw.choice((
        (f"the {number} of all {table} whose {text} is {value}", f"SELECT {number} FROM {table} WHERE {text} = '{value}';"),
        (f"how many {table} have a {number} above {limit}", f"SELECT COUNT(*) FROM {table} WHERE {number} > {limit};"),
        (f"the average {number} of {table} for each {text}", f"SELECT {text}, AVG({number}) FROM {table} GROUP BY {text};"),
        (
            f"the {limit} {table} with the largest {number}, largest first",
            f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {limit};",
        ),
        (
            f"the {text} of {table} with a {number} of at most {limit}, each once",
            f"SELECT DISTINCT {text} FROM {table} WHERE {number} <= {limit};",
        ),
        (
            f"the sum of {number} of {table} whose {text} is not {value}",
            f"SELECT SUM({number}) FROM {table} WHERE {text} <> '{value}';",
        ),
    ))  # fmt: skip
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS[table])
    return f"Table {table}({columns}). Write SQL for: {question}", query


def _sorting(draw: random.Random) -> tuple[str, str]:
    """Words are sorted, filtered or turned round."""
    words = [word(draw) for _ in range(draw.randint(3, 8))]
    letter = draw.choice(words)[0]
    task, answer = draw.choice((
        ("Sort these words by the alphabet", sorted(words)),
        ("Write these words in reverse order", words[::-1]),
        (f"Which of these words begin with {letter}?", [w for w in words if w.startswith(letter)]),
        ("Write these words in capitals", [w.upper() for w in words]),
    ))  # fmt: skip
    return f"{task}: {', '.join(words)}", ", ".join(answer)


KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _order, _order, _meeting, _calendar, _conversion, _table, _sql, _sorting,
)  # fmt: skip


def _date(draw: random.Random) -> date:
    return date(1990, 1, 1) + timedelta(draw.randrange(365 * 45))


def _weekday(day: date) -> str:
    return DAYS[day.weekday()]


def _written(draw: random.Random, day: date) -> str:
    month = MONTHS[day.month - 1]
    forms = (f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}", f"{day.day}.{day.month}.{day.year}")
    return draw.choice((*forms, f"{_weekday(day)}, {day.day} {month[:3]} {day.year}"))
