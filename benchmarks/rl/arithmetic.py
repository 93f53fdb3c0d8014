"""The task: one sum out of GSM8K's calculator annotations, with a reward that a program checks.

GSM8K's solutions hold annotations such as ``<<48/2=24>>``. A prompt is three solved sums and one open sum:

    17 + 25 = 42
    60 - 24 = 36
    12 * 15 = 180
    48 / 2 =

The model answers on the same line. The reward is 1 if the first number of the answer is right, else 0.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

SHOTS = "17 + 25 = 42\n60 - 24 = 36\n12 * 15 = 180\n"
ANNOTATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d{1,4})>>")  # whole numbers; an answer has at most four digits
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Sum:
    """One prompt and its right answer."""

    prompt: str
    answer: int


def first_number(text: str) -> float | None:
    """Return the first number of a text; None where it has none. Commas between digits are read over."""
    found = NUMBER.search(text)
    return None if found is None else float(found.group().replace(",", ""))


def reward(completion: str, answer: int) -> float:
    """Return 1 if the first number of the completion is the answer, else 0."""
    return float(first_number(completion) == answer)


def sums_in(solution: str) -> list[tuple[str, Sum]]:
    """Return the sums of a GSM8K solution, each with a key that ``a + b`` and ``b + a`` share."""
    found = []
    for left, sign, right, answer in ANNOTATION.findall(solution):
        low, high = sorted([left, right]) if sign in "+*" else (left, right)
        found.append((f"{low}{sign}{high}", Sum(f"{SHOTS}{left} {sign} {right} = ", int(answer))))
    return found


def split(data: str | Path, held: int, rows: int | None = None, seed: int = 0) -> tuple[list[Sum], list[Sum]]:
    """Return training sums and ``held`` test sums of ``data/gsm8k/train.jsonl``; no sum is in both.

    Args:
        data: folder of tasks.
        held: number of test sums, the same for every run.
        rows: number of training sums, drawn by ``seed``; None: all.

    Raises:
        ValueError: where the file has fewer sums than are asked for.
    """
    known: dict[str, Sum] = {}
    with open(Path(data) / "gsm8k" / "train.jsonl", encoding="utf-8") as lines:
        for line in lines:
            for key, found in sums_in(json.loads(line)["target"]):
                known.setdefault(key, found)
    order = sorted(known)
    random.Random(0).shuffle(order)
    test, train = ([known[key] for key in part] for part in (order[:held], order[held:]))
    if len(train) < (rows or 1):
        raise ValueError(f"rows: got {rows} and {held} held out, expected at most the {len(order)} sums of {data}")
    return (train if rows is None else random.Random(seed).sample(train, rows)), test
