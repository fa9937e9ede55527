"""Keep the input embedding in pinned host memory, where the GPU reads the rows it needs over PCIe.

This frees 1 GiB of an 8B model's device memory. A table that is tied to the head stays, because the
head needs it on the device. The table is frozen, so nothing is written back.
"""

from __future__ import annotations

from torch import Tensor, nn

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.kernels import ops
from engine.planning.compute_limits import HOST_EMBEDDING_MIN_BYTES


class HostEmbedding(nn.Module):
    """Replace an nn.Embedding.

    The table is not a parameter, because a model's device is read from its parameters.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight.detach().cpu().pin_memory()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows [..., D] of ids [...], on the device of the ids."""
        return ops.gather_rows(self.weight, input_ids.reshape(-1)).view(*input_ids.shape, -1)


def place_embedding(model: nn.Module, config: ModelConfig) -> bool:
    """Move the input embedding to host memory if `config.embeddings` asks for it.

    Returns True if it was moved. Raises InputError for `host` if the embedding is tied to the head
    or of another class than nn.Embedding.
    """
    embedding = model.get_input_embeddings()
    if config.embeddings == "device" or not embedding.weight.is_cuda:
        return False
    head = model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    obstacle = "tied to the head" if tied else f"a {type(embedding).__name__}" if type(embedding) is not nn.Embedding else None
    if obstacle is None and (config.embeddings == "host" or embedding.weight.nbytes >= HOST_EMBEDDING_MIN_BYTES):
        model.set_input_embeddings(HostEmbedding(embedding))
        return True
    if config.embeddings == "host":
        raise InputError("model.embeddings", "host", f"the input embedding is {obstacle}; allowed here: auto, device")
    return False
