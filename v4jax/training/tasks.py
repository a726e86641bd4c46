"""Generated text that asks for what stood far above: a long range that sparse attention can fail.

    recall    C1, E7, A4, A4, C1, E7, C1, A4, E7, ...            associative recall
    needles   filler, C1, filler, E7, filler, E7, C1,            needles in a haystack, by key

A document mentions some keys (capital letters) with a value (digits) each and then asks for them:
`C1, ` again, whose value can only be known from where it stood before. What changes with the number
of keys, which is drawn for each document, is how far above that is.

recall: rounds of all keys, each in an order of its own, until the document is full. Nearly every
record is a question, so that much is to be learnt from little text; the distance goes from one
record (few keys: the window's part) to two rounds (many).
needles: mentions anywhere in filler, questions at the end, each key once, with `gap` bytes of
filler at least before the first. Filler is the same few words in a fixed order, begun anywhere.

A document and the BOS before it fill a row of `length` tokens of the bytes tokenizer exactly: rows
of that length, and the windows of the evaluation, hold a document each. Mentions stand at whole
multiples of their size from its start, which for keys and values of one byte is CSA's ratio.

A document is a function of its name, on every machine and version: `random.Random(str).random()` is
promised to stay as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from typing import NamedTuple

PREFIX = "task:"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FILLER = "the grass is green. the sky is blue. the sun is yellow. here we go. there and back. "
_RECORD = re.compile(r"(?<![A-Z0-9])([A-Z]+)([0-9]+), ")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is generated.

    kind: "recall" or "needles". documents: how many. length: tokens of a document and its BOS, each
    a byte. keys: at most so many in a document, from 1 on. letters: that keys are made of, from A
    on. key_bytes, value_bytes: of a key and a value. gap: of needles, see above.

    Construction raises ValueError of one line where these cannot be.
    """

    kind: str
    documents: int = 8192
    length: int = 256
    keys: int = 16
    letters: int = 16
    key_bytes: int = 1
    value_bytes: int = 1
    gap: int = 32

    def __post_init__(self):
        if self.kind not in ("recall", "needles"):
            raise ValueError(f"data: no task {self.kind!r}, allowed: recall, needles")
        for field in dataclasses.fields(self)[1:]:
            least = 0 if field.name == "gap" else 1
            if getattr(self, field.name) < least:
                self._refuse(field.name, f"an integer >= {least}")
        if self.letters > len(_LETTERS):
            self._refuse("letters", f"<= {len(_LETTERS)}")
        if self.keys > self.letters**self.key_bytes:
            self._refuse("keys", "<= letters ** key_bytes")
        needed = 1 + 2 * self.keys * self.record_bytes + (self.gap if self.kind == "needles" else 0)
        if self.length < needed:
            self._refuse("length", f">= {needed} with so many keys")

    def _refuse(self, name: str, allowed: str):
        raise ValueError(
            f"data: {PREFIX}{self.kind}: {name}: got {getattr(self, name)}, allowed: {allowed}"
        )

    @property
    def record_bytes(self) -> int:
        """Bytes of a mention, or of a question with its answer."""
        return self.key_bytes + self.value_bytes + 2

    @property
    def spec(self) -> str:
        """What `parse` makes this task of."""
        return f"{PREFIX}{self.kind}:documents={self.documents},{self.alike}"

    @functools.cached_property
    def alike(self) -> str:
        """The settings but for the number of documents."""
        names = (field.name for field in dataclasses.fields(self)[2:])
        return ",".join(f"{name}={getattr(self, name)}" for name in names)


def parse(spec: str) -> Task:
    """The task of "task:recall" or "task:needles:keys=4,length=1024"; the fields are those of Task.

    Raises ValueError with one line on anything else.
    """
    kind, _, settings = spec.removeprefix(PREFIX).partition(":")
    allowed = [field.name for field in dataclasses.fields(Task)[1:]]
    fields = {}
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if name not in allowed or not value.isdecimal():
            raise ValueError(f"data: {spec}: {setting!r} is not FIELD=INTEGER of {allowed}")
        fields[name] = int(value)
    return Task(kind, **fields)


def documents(task: Task) -> tuple[tuple[str, str], ...]:
    """(name, text) of every document."""
    names = (f"{task.kind}/{number:06d}" for number in range(task.documents))
    return tuple((name, text(task, name)) for name in names)


def text(task: Task, name: str) -> str:
    """The document of that name, `task.length` - 1 bytes; how many others there are is nothing."""
    rng = random.Random(f"{task.kind},{task.alike} {name}")
    count = 1 + _below(rng, task.keys)
    letters = _LETTERS[: task.letters]
    records = [
        f"{_in_base(key, letters, task.key_bytes)}"
        f"{_below(rng, 10**task.value_bytes):0{task.value_bytes}d}, "
        for key in _distinct(rng, task.letters**task.key_bytes, count)
    ]
    filler = _Filler(_below(rng, len(_FILLER)))
    if task.kind == "recall":
        made = "".join(records)
        while len(made) + task.record_bytes < task.length:
            made += "".join(records[i] for i in _shuffled(rng, count))
        made = made[: (task.length - 1) // task.record_bytes * task.record_bytes]
        return made + filler.take(task.length - 1 - len(made))
    return _haystack(task, rng, records, filler)


def _haystack(task: Task, rng: random.Random, records: list[str], filler: _Filler) -> str:
    questions = "".join(records[i] for i in _shuffled(rng, len(records)))
    free = task.length - 1 - 2 * len(questions) - task.gap
    size = task.record_bytes
    places = sorted(size * _below(rng, free // size + 1) for _ in records)
    made, start = "", 0
    for place, record in zip(places, records, strict=True):
        made += filler.take(place - start) + record
        start = place
    return made + filler.take(free - start + task.gap) + questions


class _Filler:
    """The endless filler, from a place on."""

    def __init__(self, place: int):
        self._place = place

    def take(self, count: int) -> str:
        """The next so many bytes."""
        start = self._place
        self._place += count
        whole = _FILLER * (self._place // len(_FILLER) + 1)
        return whole[start : self._place]


def _below(rng: random.Random, n: int) -> int:
    return int(rng.random() * n)


def _shuffled(rng: random.Random, n: int) -> list[int]:
    return sorted(range(n), key=lambda _: rng.random())


def _distinct(rng: random.Random, n: int, count: int) -> list[int]:
    """`count` different integers below n, in random order."""
    found: dict[int, None] = {}
    while len(found) < count:
        found.setdefault(_below(rng, n))
    return list(found)


def _in_base(number: int, digits: str, count: int) -> str:
    text = ""
    for _ in range(count):
        number, digit = divmod(number, len(digits))
        text = digits[digit] + text
    return text


class Answer(NamedTuple):
    """A value that is asked for. start, end: its bytes in the document. distance: bytes from where
    it stood last to it."""

    start: int
    end: int
    distance: int


def answers(document: str) -> list[Answer]:
    """The answers of a text, by the text alone: what repeats an earlier `KEYvalue, `."""
    last: dict[str, int] = {}
    found = []
    for match in _RECORD.finditer(document):
        start, end = match.span(2)
        if match[1] in last:
            found.append(Answer(start, end, start - last[match[1]]))
        last[match[1]] = start
    return found
