"""Write the random model as a pre-quantised Hugging Face folder.

    python -m engine.bench.model_folder MODEL FOLDER

Some systems load from a folder only. It holds the weights that the others make in memory, in
bitsandbytes' layout, and a tokenizer of single bytes, which no step uses.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from engine.bench.process import hand_back
from engine.bench.shapes import SHAPES, random_model
from engine.model.device import pick_device, pick_dtype
from engine.quant.bnb import nf4_load_config

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def folder_name(model: str) -> str:
    """Return a name that depends on shape and device, because these decide the random weights."""
    shape = hashlib.sha256(json.dumps(SHAPES[model], sort_keys=True).encode()).hexdigest()[:8]
    return f"{model}-{shape}-{pick_device('auto').type}"


def write_checkpoint(name: str, folder: Path, device: torch.device) -> None:
    """Write the model into `folder`, which appears when it is whole.

    Nothing is flushed to disk, unlike in engine/system/files.py: after a crash, 5 GiB of random
    weights are no loss.
    """
    dtype = pick_dtype("auto", device)
    model, _ = random_model(name, device, dtype, "sdpa")
    model.config.quantization_config = nf4_load_config(double_quantization=True, compute_dtype=dtype)
    model.config.pad_token_id = list(SPECIAL).index("pad_token")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    byte_tokenizer(model.config.max_position_embeddings).save_pretrained(part)
    part.rename(folder)


def byte_tokenizer(longest: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [], unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, padding_side="right", **SPECIAL)


if __name__ == "__main__":
    write_checkpoint(sys.argv[1], Path(sys.argv[2]), pick_device("auto"))
    hand_back({})
