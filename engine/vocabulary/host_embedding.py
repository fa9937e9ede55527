"""Keep input embeddings in pinned host memory, where the GPU reads the rows it needs over PCIe.

This frees 1 GiB of an 8B model's device memory. A table that is tied to the head stays, because the
head needs it on the device. Gemma 4's small models have a second table, of one vector a token for
each layer (5.3 GiB in E4B). The tables are frozen, so nothing is written back.
"""

from __future__ import annotations

from torch import Tensor, nn

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.kernels import ops
from engine.shape.compute_limits import HOST_EMBEDDING_MIN_BYTES

PER_LAYER = "embed_tokens_per_layer"
"""The decoder's table of one vector a token for each layer."""


class HostEmbedding(nn.Module):
    """Replace an nn.Embedding, or one of transformers' that multiplies its rows by `embed_scale`.

    The table is not a parameter, because a model's device is read from its parameters.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight.detach().cpu().pin_memory()
        self.register_buffer("embed_scale", getattr(embedding, "embed_scale", None), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows [..., D] of ids [...], on the device of the ids."""
        rows = ops.gather_rows(self.weight, input_ids.reshape(-1)).view(*input_ids.shape, -1)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


def place_embeddings(model: nn.Module, config: ModelConfig) -> list[str]:
    """Move input embeddings to host memory if `config.embeddings` asks for it; return their names.

    Raises InputError for `host` if no table can move, because the input embedding is tied to the
    head or of a class that is not known.
    """
    embedding = model.get_input_embeddings()
    if config.embeddings == "device" or not embedding.weight.is_cuda:
        return []
    moved, decoder = [], model.get_decoder()
    per_layer = getattr(decoder, PER_LAYER, None)
    if per_layer is not None and _is_wanted(per_layer, config):
        setattr(decoder, PER_LAYER, HostEmbedding(per_layer))
        moved.append(PER_LAYER)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    obstacle = "tied to the head" if tied else f"a {type(embedding).__name__}" if type(embedding) is not nn.Embedding else None
    if obstacle is None and _is_wanted(embedding, config):
        model.set_input_embeddings(HostEmbedding(embedding))
        moved.append("embed_tokens")
    if config.embeddings == "host" and not moved:
        raise InputError("model.embeddings", "host", f"the input embedding is {obstacle}; allowed here: auto, device")
    return moved


def pinned_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's tables in host memory."""
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, HostEmbedding))


def _is_wanted(embedding: nn.Module, config: ModelConfig) -> bool:
    return config.embeddings == "host" or embedding.weight.nbytes >= HOST_EMBEDDING_MIN_BYTES
