"""No trial trains on a damaged cache: any flipped byte or truncated file is named, and made again."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.torch import save

from engine.data.views import load_data
from engine.model.inspect import load_tokenizer
from engine.model.load import load_base
from engine.sources.identity import identify_model
from engine.system.checksums import CHECKSUMS
from tests.support.trials import CPU, build

FLIPS = 1  # of each file at a place of the seed's choice, besides its first and last byte


def tokens(config) -> str:
    views = load_data(config.data, load_tokenizer(config.model))
    samples = [view[i] for view in views for i in range(len(view))]
    content = [np.concatenate([getattr(one, name) for one in samples]).tobytes() for name in ("input_ids", "is_target")]
    return hashlib.sha256(b"".join(content)).hexdigest() + "".join(view.digest() for view in views)


def packed_base(config) -> str:
    model = load_base(config.model, CPU).model
    return hashlib.sha256(save({name: tensor.clone() for name, tensor in model.state_dict().items()})).hexdigest()


def weights_digest(config) -> str:
    return identify_model(config.model)["weights"]


def damages(content: bytes) -> list[bytes]:
    """Return the content with one bit flipped in several places, and cut at several lengths."""
    places = {0, len(content) - 1, *random.choices(range(len(content)), k=FLIPS)}
    flipped = [content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :] for at in sorted(places)]
    return [*flipped, b"", content[:-1]]


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("prefix", "read"),
    [("tokens-", tokens), ("weights-", weights_digest), pytest.param("nf4-", packed_base, marks=pytest.mark.faults)],
)
def test_what_is_read_from_a_damaged_cache_is_what_was_there(
    tiny_config, tmp_path, monkeypatch, capsys, prefix: str, read: Callable[..., str]
):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path))
    random.seed(0)
    config = build(tiny_config)
    whole = read(config)
    (folder,) = tmp_path.glob(f"{prefix}*")
    kept = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    assert len(kept) > 1 and read(config) == whole and "WARNING" not in capsys.readouterr().err
    for file, content in kept.items():
        for damaged in damages(content):
            file.write_bytes(damaged)
            assert read(config) == whole, (file.name, len(damaged))
            said = capsys.readouterr().err
            if not (file.name == CHECKSUMS and same_json(damaged, content)):  # a line end less changes nothing
                assert said.count("is damaged") == 1 and str(folder) in said
            assert {one.name for one in folder.iterdir()} == {one.name for one in kept}
