"""Train the rows of some tokens in the embedding and in the head, beside an adapter: `model.train_tokens`.

Rows replace those of the frozen tables, as PEFT's trainable tokens do (TrainableTokensLayer). A
model that ties its head to its embedding has one set of rows, any other has two. They are fp32, and
rounded to the table's dtype at use. Tables never grow: a token that is new to the tokenizer takes a
row that no token has, and starts as the mean of all rows that tokens have.

Shape letters: N trained tokens, V vocabulary, D hidden, T tokens; ... any leading shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.possible import TRAIN_TOKENS
from engine.errors import InputError

NUM_KNOWN = "num_known_tokens"  # attribute of a tokenizer: its tokens before any was added
AVERAGED_ROWS = 4096
SUFFIX = "token_adapter.trainable_tokens_delta"  # PEFT's name of the rows, behind that of their module


class TokenRows(nn.Module):
    """Stand for a frozen table's module, with rows [N, D] of its own while an adapter is attached."""

    def __init__(self, base: nn.Module, ids: Sequence[int], num_known: int) -> None:
        """ids: the tokens. num_known: tokens with a row before any was added; later ones start as the mean of those."""
        super().__init__()
        self.base, self._num_known = base, num_known
        self.register_buffer("ids", torch.tensor(ids, device=self._device()), persistent=False)
        self.rows: nn.Parameter | None = None

    @property
    def weight(self) -> Tensor:
        """Return the frozen table [V, D]: some models read its device or dtype."""
        return self.base.weight

    def begin(self) -> None:
        """Give the tokens rows of their own, as they are in the table."""
        self.rows = nn.Parameter(self.first_rows())

    def first_rows(self) -> Tensor:
        """Return the rows [N, D] with which training starts, in fp32: the table's, and the mean of all for new tokens."""
        table_VD, ids = self.base.weight.detach(), self.ids.to(self.base.weight.device)
        rows_ND = table_VD[ids].float()
        if (is_new_N := ids >= self._num_known).any():
            parts = table_VD[: self._num_known].split(AVERAGED_ROWS)  # a whole table in fp32 is up to 3 GiB
            rows_ND[is_new_N] = sum(part.float().sum(0) for part in parts) / self._num_known
        return rows_ND.to(self.ids.device)

    def end(self) -> None:
        """Take the rows away, which leaves the table as it was."""
        self.rows = None

    def parameters_of(self) -> tuple[nn.Parameter, ...]:
        """Return what is trained."""
        return (self.rows,)

    def _device(self) -> torch.device:
        return self.base.weight.device


class TokenEmbedding(TokenRows):
    """Stand for the embedding."""

    def __init__(self, base: nn.Module, ids: Sequence[int], num_known: int, device: torch.device) -> None:
        """device: of activations; the table itself may lie in host memory."""
        self._where = device
        super().__init__(base, ids, num_known)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows [..., D] of ids [...]."""
        x = self.base(input_ids)
        if self.rows is None:
            return x
        is_own = input_ids.unsqueeze(-1) == self.ids  # [..., N]
        own = is_own.float() @ self.rows.to(self.base.weight.dtype).float()  # exact: one row each; its gradient has no atomics
        scale = getattr(self.base, "embed_scale", None)
        own = own.to(x.dtype)
        own = own if scale is None else own * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(is_own.any(-1, keepdim=True), own, x)

    def _device(self) -> torch.device:
        return self._where


class TokenHead(TokenRows):
    """Stand for the output embedding. tied: the embedding whose rows it shares, None for rows of its own."""

    def __init__(self, base: nn.Module, ids: Sequence[int], num_known: int, tied: TokenEmbedding | None = None) -> None:
        super().__init__(base, ids, num_known)
        self._tied = (tied,)  # in a tuple, so that it is not a child

    @property
    def is_tied(self) -> bool:
        return self._tied[0] is not None

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def own_rows(self) -> tuple[Tensor, nn.Parameter] | None:
        """Return the tokens' ids [N] and their rows [N, D], None while no adapter is attached."""
        rows = self._tied[0].rows if self.is_tied else self.rows
        return None if rows is None else (self.ids, rows)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits [..., V] of h [..., D]."""
        logits, own = self.base(h), self.own_rows
        if own is None:
            return logits
        ids, rows_ND = own
        bias = None if self.bias is None else self.bias[ids]
        return logits.index_copy(-1, ids, F.linear(h, rows_ND.to(h.dtype), bias))


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make each token one of the tokenizer's; those that it knows stay as they are."""
    known = tokenizer.get_vocab()
    setattr(tokenizer, NUM_KNOWN, len(tokenizer))
    new = [token for token in tokens if token not in known]
    if new:
        tokenizer.add_tokens(new)


def check_rows_of(tokenizer: Any, tokens: Sequence[str], num_rows: int) -> list[int]:
    """Return the tokens' ids. num_rows: of the embedding. Raises InputError for a token without a row."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    for token, number in zip(tokens, ids, strict=True):
        if number >= num_rows:
            spare = _spare(tokenizer, tokens)
            way_out = f"name one that it knows, such as {spare!r}" if spare else "name one that it knows"
            allowed = f"has no row: the embedding's {num_rows:,} all belong to tokens, and tables do not grow; {way_out}"
            raise InputError(TRAIN_TOKENS, token, allowed)
    return ids


def _spare(tokenizer: Any, given: Sequence[str]) -> str | None:
    """Return a special token without a role in text or template, a reserved one if there is one."""
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token, *given}
    template = str(tokenizer.chat_template)
    known = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    free = [token for token in known if token not in roles and token not in template]
    reserved = [token for token in free if "reserved" in token or "unused" in token or "extra" in token]
    return next(iter([*reserved, *free]), None)


def install(model: nn.Module, tokenizer: Any, tokens: Sequence[str], device: torch.device) -> None:
    """Put TokenEmbedding and TokenHead in the place of a loaded model's embedding and head, for as long as it lives.

    Raises InputError for a token without a row.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids, num_known = check_rows_of(tokenizer, tokens, table.weight.shape[0]), getattr(tokenizer, NUM_KNOWN)
    embedding = TokenEmbedding(table, ids, num_known, device)
    tied = head.weight.data_ptr() == table.weight.data_ptr()
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(TokenHead(head, ids, num_known, embedding if tied else None))


def begin_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Give the model's trained tokens rows of their own, and return the module's name -> module; none without such tokens."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, TokenRows)}
    found = {name: module for name, module in found.items() if not (isinstance(module, TokenHead) and module.is_tied)}
    for module in found.values():
        module.begin()
    return found


def token_indices(layers: dict[str, Any]) -> dict[str, list[int]]:
    """Return PEFT's `trainable_token_indices` of an adapter: the end of a module's name -> ids. Empty without such tokens."""
    return {n.rpartition(".")[2]: m.ids.tolist() for n, m in layers.items() if isinstance(m, TokenRows)}
