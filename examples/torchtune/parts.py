"""Components of the recipe that torchtune does not provide: the bundled model's tokenizer, and rows as a dataset."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.data import Dataset
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer


def tokenizer(folder: str) -> HuggingFaceBaseTokenizer:
    """Return the tokenizer saved in ``folder``, with its padding token."""
    config = Path(folder) / "tokenizer_config.json"
    made = HuggingFaceBaseTokenizer(str(Path(folder) / "tokenizer.json"), tokenizer_config_json_path=str(config))
    made.pad_id = made.tokenizer.token_to_id(json.loads(config.read_text(encoding="utf-8"))["pad_token"])
    return made


class Rows(Dataset):
    """Rows of a jsonl file with "prompt" and "target"; only the target and the end-of-text token have labels."""

    def __init__(self, tokenizer: HuggingFaceBaseTokenizer, path: str, max_rows: int | None = None) -> None:
        with open(path, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines][:max_rows]
        self.examples = []
        for row in rows:
            prompt = tokenizer.encode(row["prompt"], add_bos=False, add_eos=False)
            target = tokenizer.encode(row["target"], add_bos=False, add_eos=True)
            self.examples.append({"tokens": prompt + target, "labels": [-100] * len(prompt) + target})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return dict(self.examples[index])
