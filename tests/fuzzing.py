"""Damaged inputs for fuzz tests, which require that every input gives a value or a ``UserError``."""

from tracknet.errors import UserError

VALUES = [
    "",
    "~",
    "null",
    "true",
    "off",
    "-1",
    "0",
    "1",
    "2",
    "1e3",
    "1e400",
    ".nan",
    "-.inf",
    "9" * 400,
    "9" * 5000,
    "0x1f",
    "0b1",
    "1_0",
    "1:30",
    "[]",
    "[1]",
    "[1,2]",
    "[[1]]",
    "{}",
    "{a: 1}",
    "[a",
    "{a",
    "}",
    "'",
    '"',
    "'1'",
    "!!bool x",
    "!!int y",
    "!!python/name:os.system ''",
    "!x y",
    "&a [*a]",
    "*b",
    "${seed}",
    "${data.root}",
    "${nope}",
    "${oc.env:HOME}",
    "${oc.coerce:os.path,1}",
    "${${seed}}",
    "$",
    "${",
    "\\\\${seed}",
    "2024-01-01",
    "²",
    "١",
    "\0",
    "\x1b[31m",
    "\udcff",
    "\u2028",
    "ball",
    "game1",
    "- 1",
    "a: b",
    "? x",
    "<<: {a: 1}",
    "%YAML",
    "---",
    "--- 1\n--- 2",
    "# x",
    "|",
    ">",
    "@",
    "`",
    "a" * 3000,
    "[" * 500,
    "{a: " * 300,
    "NaN",
    "Infinity",
    "None",
    "1.0",
    "-0",
    "00010",
]


def damaged(rng, data):
    """Damage bytes in one to four positions: flip a bit, delete, repeat, or insert text with a meaning to parsers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(data)))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 200)] * rng.randint(1, 5)
        elif kind == 3:
            data[at : at + rng.randint(0, 8)] = rng.choice(VALUES).encode("utf-8", "surrogateescape")
        elif data:
            end = data.find(b"\n", at) if rng.random() < 0.5 else at + 12
            data[data.rfind(b":", 0, at) + 1 : end] = b" " + rng.choice(VALUES).encode("utf-8", "surrogateescape")
    return bytes(data)


def replaced(rng, value):
    """Replace a random value of a JSON tree by a value of another type, or remove it."""
    others = [None, True, -1, 2**70, 1.5, "", "x" * 50, [], {}, [1], {"a": 1}, "²"]
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != name}
        return value | {name: replaced(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [replaced(rng, v) if i == at else v for i, v in enumerate(value)]
    return rng.choice(others)


def refused(attempt, source):
    """Return whether an input raises a ``UserError``, and assert that its message is at most a screen long.

    Args:
        attempt: function that processes the input.
        source: the input, shown if the assertion fails.
    """
    try:
        attempt()
    except UserError as error:
        assert 0 < len(str(error)) < 4500, source
        return True
    return False
