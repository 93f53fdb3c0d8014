"""Tasks and texts as token ids. They are tokenised once for all processes."""

from __future__ import annotations

import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import tasks
from benchmarks.quality.tasks import Example
from benchmarks.real.specs import Spec, complete, tasks_of


class Store:
    """Encoded tasks and texts of the folder ``data``. A ``cache`` folder shares them with other processes."""

    def __init__(self, data: str | Path, tokenizer: Any, cache: str | Path | None = None) -> None:
        self.data, self.tokenizer = Path(data), tokenizer
        self.cache = None if cache is None else Path(cache)
        self._known: dict[str, Any] = {}

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._known:
            file = None if self.cache is None else self.cache / f"{name}.pickle"
            if file is not None and file.exists():
                self._known[name] = pickle.loads(file.read_bytes())
            else:
                self._known[name] = make()
                if file is not None:
                    part = file.with_suffix(".part")
                    part.write_bytes(pickle.dumps(self._known[name], protocol=5))
                    part.replace(file)
        return self._known[name]

    def encoded(self, task: str, split: str, max_length: int) -> list[Example]:
        """Return every row of ``task/split.jsonl``, encoded."""

        def make() -> list[Example]:
            return tasks.encode(tasks.load_rows(self.data, task, split), self.tokenizer, max_length)

        return self._once(f"{task}-{split}-{max_length}", make)

    def text(self, source: Spec) -> list[Example]:
        """Return the first ``pieces`` pieces of ``length`` tokens of ``task/split.txt``; every token has a label."""
        length, pieces = source["length"], source["pieces"]

        def make() -> list[Example]:
            content = (self.data / source["task"] / f"{source['split']}.txt").read_text(encoding="utf-8")
            # A token rarely has more than 16 bytes, so that the whole text need not be tokenised.
            return tasks.encode_text(content[: 16 * pieces * length], self.tokenizer, length)[:pieces]

        found = self._once("-".join(str(source[k]) for k in ("task", "split", "pieces", "length")), make)
        if len(found) < pieces:
            raise ValueError(f"{source}: got {len(found)} pieces of {length} tokens, expected {pieces}")
        return found

    def split(self, spec: Spec, task: str) -> tuple[list[Example], list[Example]]:
        """Return training rows and held-out rows. The seed draws ``rows`` of the training rows."""
        train, held = tasks.validation_split(self.encoded(task, "train", spec["max_length"]), spec["held"])
        if not train:
            raise ValueError(f"held: got {spec['held']}, which leaves no training row of {task}; reduce it")
        if spec["rows"] is not None:
            generator = torch.Generator().manual_seed(2000 + spec["seed"])
            train = [train[i] for i in torch.randperm(len(train), generator=generator).tolist()[: spec["rows"]]]
        return train, held

    def test(self, spec: Spec, task: str) -> list[Example]:
        """Return at most ``evaluate`` test rows, the same for every run."""
        examples = self.encoded(task, "test", spec["max_length"])
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
        return [examples[i] for i in order[: spec["evaluate"]]]

    def warm(self, spec: Spec) -> None:
        """Encode all tasks and texts of a run, so that its process finds them in the cache."""
        spec = complete(spec)
        for task in tasks_of(spec):
            self.encoded(task, "train", spec["max_length"])
        scored = [name.partition(":")[2] for name in spec["score"] if ":" in name]
        for task in [*tasks_of(spec), *spec["domains"], *scored]:
            self.encoded(task, "test", spec["max_length"])
        for source in (spec["text"], spec["retain"]):
            if isinstance(source, dict):
                self.text(source)


def pieces(examples: list[Example], device: torch.device) -> Tensor:
    """Return the token ids of a text, shape ``(pieces, length)``."""
    return torch.tensor([e.ids for e in examples], device=device)


@lru_cache(maxsize=2)
def load(folder: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Return a base model and its tokenizer. Every run trains a copy of the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    return model.requires_grad_(True), AutoTokenizer.from_pretrained(folder)
