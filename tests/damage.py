"""Files damaged at random, and what their readers say of them."""

import contextlib
import json
import random


def damaged(raw, draw):
    """A file's bytes with one to four changes: flipped bits, other bytes, cut, lost or added parts, absurd sizes."""
    raw = bytearray(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        size = len(raw)
        if not size:
            return draw.randbytes(draw.randrange(50))
        at = draw.randrange(size if draw.random() < 0.5 else min(size, 200))  # headers as often as all else
        match draw.choice(["flip", "flip", "byte", "cut", "head", "drop", "insert", "zero", "size", "swap"]):
            case "flip":
                raw[at] ^= 1 << draw.randrange(8)
            case "byte":
                raw[at] = draw.randrange(256)
            case "cut":
                del raw[at:]
            case "head":
                del raw[:at]
            case "drop":
                del raw[at : at + draw.randrange(1, 64)]
            case "insert":
                raw[at:at] = draw.randbytes(draw.randrange(1, 16))
            case "zero":
                end = min(at + draw.randrange(1, 512), size)
                raw[at:end] = bytes(end - at)
            case "size":
                raw[at : at + 4] = draw.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\0\1"])
            case "swap":
                other = draw.randrange(size)
                raw[at], raw[other] = raw[other], raw[at]
    return bytes(raw)


_ODD = (None, True, 0, -1, 2.5, 1e308, 10**30, "", "x", "<b>", "\u202e", [], {}, [[]], [None], [0.5] * 9, {"a": 1})


def odd(rows, draw):
    """Rows with one to three changes that leave them JSON: other values at any depth, entries or rows lost or twice."""
    rows = json.loads(json.dumps(rows))
    for _ in range(draw.choice([1, 1, 2, 3])):
        row = draw.choice(rows)
        match draw.choice(["value", "value", "inside", "drop", "row", "twice", "order"]):
            case "value":
                row[draw.choice(list(row))] = draw.choice(_ODD)
            case "inside":
                if nested := [value for value in row.values() if isinstance(value, list | dict) and value]:
                    value = draw.choice(nested)
                    value[draw.choice(list(value) if isinstance(value, dict) else range(len(value)))] = draw.choice(
                        _ODD
                    )
            case "drop":
                del row[draw.choice(list(row))]
            case "row":
                rows.remove(row)
            case "twice":
                rows.append(dict(row))
            case "order":
                draw.shuffle(rows)
        if not (rows and all(rows)):
            return rows
    return rows


ABSURD = (1e308, -(10**18), 10**400, 1e99, 1e-308)


def absurd(rows, at):
    """The rows again and again, each time with one number of those `at` these places in them absurd, at any depth."""
    for number in at:
        for path in _numbers(rows[number], ()):
            for value in ABSURD:
                changed = list(rows)
                changed[number] = inside = json.loads(json.dumps(rows[number]))
                for key in path[:-1]:
                    inside = inside[key]
                inside[path[-1]] = value
                yield changed


def _numbers(value, path):
    """The paths of the numbers in a row; of a list, of the first one alone."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path
    nested = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in nested:
        yield from _numbers(inner, (*path, key))


@contextlib.contextmanager
def restored(folder):
    """Yields the content of a folder's files by path, and makes the folder what it was when the block ends."""
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    try:
        yield before
    finally:
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path not in before:
                path.unlink()
        for path, raw in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)


def read_damaged(folder, read, cases, seed, check=lambda read: None):
    """Reads a folder again and again, each time with one of its files damaged.

    Args:
      folder: of the files.
      read: reads them.
      cases: the `fuzz.Cases` to count them in.
      seed: of the damage.
      check: asserts what must hold of what was read.
    """
    draw = random.Random(seed)
    for number in range(cases.tries):
        with restored(folder) as before:
            path = draw.choice(list(before))
            path.write_bytes(damaged(before[path], draw))
            with cases.case(f"damage {number} of seed {seed!r}, in {path.name}"):
                check(read())
