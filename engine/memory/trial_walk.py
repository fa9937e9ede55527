"""Walk through what training one adapter allocates on a CUDA card, in order. No torch."""

from __future__ import annotations

import math
from dataclasses import replace

from engine.config.matmul import Matmul
from engine.config.targets import EXPERTS
from engine.config.trial import TrainConfig
from engine.memory.layer_memory import Pass
from engine.memory.layer_walk import AttentionName, attention_name
from engine.memory.library_walk import LibraryWalk
from engine.memory.live_bytes import BOUNDARY, HostStack, LiveBytes, PlacedBytes
from engine.memory.mixer_walk import MIXERS
from engine.memory.repeated_layers import EachLayer, RepeatedLayers
from engine.memory.tensor_sizes import Sizes
from engine.shape.compute_limits import LOSS_CHUNK_BYTES, STATE_PIECE, STATE_PIECES, documents_of, evaluation_row_tokens
from engine.shape.layer_plan import (
    adapted_outside,
    base_bytes,
    cached_bytes,
    element_bytes,
    evaluation_width,
    is_fused,
    is_on_host,
    num_trained,
    plan_layers,
    scale_bytes,
)
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy

# torch gives cuBLAS a workspace for each stream and calling thread: the caller's and autograd's.
# Each is 32 MiB on Hopper and 8.1 MiB on other cards, where this is 48 MiB too much. There are two:
# the measured peaks (H100) match 64 MiB, not 32.
MATMUL_WORKSPACES = 2 * 32 * 2**20
# Copies in fp32 of a weight while its start is found: of PiSSA the dequantised one and a cast, of LoftQ the
# original too (engine/adapter/made_start.py).
START_COPIES = {"default": 0, "pissa": 2, "loftq": 3}
# A pass before recording and recordings have a stream each, and a process keeps their workspaces.
STREAMS = 3


class TrialWalk(LibraryWalk):
    """A walk through load, start, one micro-batch, one optimizer step and one evaluation row, in turn."""

    def __init__(
        self, config: TrainConfig, shape: ModelShape, attention: AttentionName, live: LiveBytes | None = None
    ) -> None:
        self.config, self.shape, self.live = config, shape, live or LiveBytes()
        self._walks = EachLayer if isinstance(live, PlacedBytes) else RepeatedLayers
        self.host_stack = HostStack(self.live)
        self.layer_sizes: list[Sizes] = []
        self.table_bytes = self.state_bytes = 0
        self.plans, self.element = plan_layers(config, shape), element_bytes(config)
        self.attention, self.is_eager = attention, attention_name(shape, self.element, attention) == "eager"
        self.is_fused = is_fused(config, shape)
        self.is_estimate = self.is_eager or self.element != 2 or shape.has_mixers
        self.library = None if self.is_fused or self.is_estimate else shape.library
        self.is_rough = self.is_estimate or (not self.is_fused and self.library is None)

    def load(self) -> None:
        """Load the base model from its 16-bit weights; then hold all that stays during training."""
        live, plans = self.live, self.plans
        live.enter("load")
        streams = STREAMS if self.config.train.cuda_graphs is True else 1
        live.hold("workspaces", streams * MATMUL_WORKSPACES, "matmul workspaces")
        for name, size in base_bytes(self.config, self.shape).items():
            live.hold(name, size, name)
        table = self.element * self.shape.vocab_size * self.shape.hidden_size
        live.hold("head", table, "head")
        with live.holding(0 if self.shape.tied_embeddings else table, "input embedding"):
            live.briefly(self._largest_weight())
        if not self.shape.tied_embeddings:
            self._place("input embedding", table)
        per_layer = self.element * self.shape.input_table
        live.briefly(per_layer, "input embedding")  # it is loaded to the device before it moves
        if per_layer:
            self._place("input embedding of layers", per_layer)
        number = num_trained(self.config, self.shape, plans)
        if copies := START_COPIES[self.config.lora.start]:
            live.enter("start")
            with live.holding(2 * 4 * number, "adapter"):  # the adapter, and the factors of all layers
                live.briefly(copies * 4 * self._largest_weight() // self.element)
        live.enter("at rest")
        live.hold("weight cache", cached_bytes(self.config, self.shape, plans), "weight cache")
        scaled = [one for one in self.shape.each if one.matmul_in(self.config.matmul) is not Matmul.BF16]
        live.hold("INT8 scales", sum(map(scale_bytes, scaled)), "base weights")
        copied = number - sum(plan.adapter.get(EXPERTS, 0) for plan in plans)  # experts copy theirs at each use
        live.hold("adapter", (4 + 4) * number + self.element * copied, "adapter")  # parameter, gradient, copy for the matmuls
        live.hold("frozen half", 2 * number if self.config.lora.halves > 1 else 0, "adapter")  # what weight decay must not change
        live.hold("average", 0 if self.config.optim.ema_horizon is None else 4 * number, "running average")
        num_states, blocks = self.config.optim.num_states, math.ceil(number / 256)
        states = num_states * (number + 4 * blocks if self.config.optim.has_8bit_states else 4 * number)
        if self.config.train.offload_optimizer is True and self.config.optim.has_8bit_states:
            self.state_bytes = num_states * number  # on the host; a few pieces are on the device, and all scales
            states = num_states * (4 * blocks + STATE_PIECES * min(STATE_PIECE, number))
        live.hold("optimizer", states, "optimizer")

    def _place(self, name: str, size: int) -> None:
        """Put an input embedding where engine/vocabulary/host_embedding.py does."""
        if is_on_host(self.config, size):
            self.table_bytes += size
        else:
            self.live.hold(name, size, "input embedding")

    def train(self) -> None:
        """Walk forward pass, loss and backward pass of one micro-batch."""
        tokens = self.config.train.micro_batch_size * self.config.bin_tokens
        sizes = self._begin("forward", tokens, self.config.data.max_seq_length)
        live, last = self.live, self.shape.num_layers
        if self.is_fused:
            passes, walks = [self._pass(i, self.config.lora.lora_dropout > 0.0) for i in range(last)], self._walks(live)
            for layer in passes:
                walks.forward(layer, trains=layer.plan.trained)
                if not walks.has_input(0) and "inputs" not in live.alive:  # the decoder holds on to them
                    live.hold("inputs", sizes.x, BOUNDARY)
            live.drop("inputs")
            self.host_stack.flush()
        elif self.library is not None:
            self._forward_measured(tokens)
        else:
            self._forward_unfused(sizes)
        self._loss(sizes, tokens, trains=True)
        live.hold("dy", sizes.x)
        live.drop("dh", f"{last}.x")
        if self.is_fused:
            self._backward(passes, walks)
        elif self.library is not None:
            self._backward_measured(tokens)
        else:
            self._backward_unfused(sizes)
        if self._trains_inputs():  # the gradient of all layers' inputs, through mean, norm and projection
            live.briefly(3 * sizes.inputs)
        live.drop("dy", "dinputs", "batch", "layer inputs")

    def step_optimizer(self) -> None:
        """Walk the optimizer step.

        torch's AdamW makes one temporary of the parameters' size, Muon up to four; bitsandbytes' make none.
        """
        self.live.enter("optimizer step")
        number = num_trained(self.config, self.shape, self.plans)
        self.live.briefly({"adamw": 4, "muon": 16}.get(self.config.optim.name, 0) * number)

    def beside_recordings(self) -> int:
        """Return the bytes that come on top of the peak because recordings keep theirs to themselves.

        Recordings use a pool of their own, so the optimizer step finds no room in it. A plan without
        them may follow an earlier trial's, or record its evaluation: their streams' workspaces stay.
        """
        if self.config.train.cuda_graphs is True:
            return self.live.peaks["optimizer step"] - self.live.peaks["at rest"]
        return (STREAMS - 1) * MATMUL_WORKSPACES if self.is_fused else 0

    def evaluate(self) -> None:
        """Walk one row without gradients, of an evaluation or the reference; each layer leaves only its output."""
        length = self.config.longest_evaluated
        tokens = evaluation_row_tokens(length, evaluation_width(self.config, self.shape))
        sizes = self._begin("evaluation", tokens, length)
        last = self.shape.num_layers - 1
        self.live.rename("0.x", f"{last}.x")
        self.live.hold("inputs", sizes.x if last else 0, BOUNDARY)
        self.live.hold("silent", 4 * num_trained(self.config, self.shape, self.plans) if self._is_silenced() else 0, "adapter")
        stores = [size.k for i, size in enumerate(self.layer_sizes) if self.shape.each[i].source == i != last]
        self.live.hold("shared keys", 2 * sum(stores), BOUNDARY)
        others = [size.mixer.alone for size in self.layer_sizes if size.mixer is not None]
        self.live.briefly(max(others, default=0) + 2 * sizes.x + self._largest_weight() * bool(others), MIXERS)
        if self.is_fused:  # the last layer has the fewest cached weights, and the widest MLP if layers differ
            evaluated = self._pass(last, dropout=False)
            replace(evaluated, plan=replace(evaluated.plan, matmul=Matmul.BF16)).forward(trains=False)
        elif self.library is not None:
            self.live.briefly(self.library.alone * tokens + self._largest_weight())
        else:
            rows = 0 if self.shape.experts is None else self._moved_rows(sizes)
            rows += sizes.gate_up + sizes.f + 6 * sizes.x
            self.live.briefly(rows + self._largest_weight() + 12 * self._eager_scores(sizes))
        self.live.drop("inputs", "shared keys", f"keys of {last}")
        self.live.hold("target losses", 4 * tokens, "loss")
        self._loss(sizes, tokens, trains=False)
        self.live.drop("target losses", "silent", f"{last}.x", f"{last + 1}.x", "batch", "layer inputs")

    def _is_silenced(self) -> bool:
        """Return True if the base is evaluated beside the adapter, whose values are kept meanwhile (engine/adapter/flat.py)."""
        config = self.config
        is_reference = config.learns_pairs and config.preference.needs_reference and config.lora.start != "default"
        return is_reference or any(limit.above_base is not None for limit in config.data.eval_limits.values())

    def _begin(self, phase: str, tokens: int, sample_tokens: int) -> Sizes:
        """Enter a phase with a batch on the device.

        The batch is at most five int64 tensors, cos and sin of each kind of layer, and the embedded
        tokens.
        """
        layer, shape = self.shape.layer, self.shape
        heads = {one.head_dim for one in shape.layers} or {shape.head_dim}
        tables = sum(heads) if len(heads) > 1 else layer.rotary_tables * max(heads)
        rotary = 2 * (4 if layer.rotary_fp32 else self.element) * tokens * tables
        packed = self.config.model.quantization == "nf4"
        is_padded = self.is_fused and not shape.has_unrecordable_mixers
        is_padded = is_padded and ((phase == "evaluation" and shape.has_mixers) or self.config.train.cuda_graphs is True)
        how = (tokens, sample_tokens, self.element, packed, documents_of(tokens) if is_padded else 0)
        known = {one: Sizes.of(one, *how) for one in set(shape.each)}
        self.layer_sizes = [known[one] for one in shape.each]
        sizes = self.layer_sizes[-1]
        self.live.enter(phase)
        self.live.hold("batch", 40 * tokens + rotary, "batch and rotary")
        self.live.hold("0.x", sizes.x, BOUNDARY)
        if sizes.inputs:  # rows of the table, projection, their sum and its mean
            keeps = self._trains_inputs() and phase == "forward"
            self.live.briefly((5 if keeps else 4) * sizes.inputs)
            self.live.hold("layer inputs", (2 if keeps else 1) * sizes.inputs, "per-layer inputs")
        return sizes

    def _trains_inputs(self) -> bool:
        return bool(adapted_outside(self.config, self.shape))

    def _pass(self, i: int, dropout: bool) -> Pass:
        of_layer = i, self.plans[i], self.shape.each[i], self.layer_sizes[i]
        kernel = attention_name(self.shape.each[i], self.element, self.attention)
        return Pass(*of_layer, kernel, dropout, self.live, self.host_stack)

    def _loss(self, sizes: Sizes, tokens: int, trains: bool) -> None:
        """Walk through engine/vocabulary/loss.py, with every token a target.

        If it trains, it ends with `dh`, the gradient of the normalised hidden states.
        """
        live, shape = self.live, self.shape
        rows = min(tokens, max(1, LOSS_CHUNK_BYTES // (self.element * shape.vocab_size)))
        gathered, logits = self.element * rows * shape.hidden_size, self.element * rows * shape.vocab_size
        if trains:
            live.enter("loss")
        live.hold("h", sizes.x, "loss")
        if trains:
            live.hold("grad", sizes.x, "loss")
        live.briefly(gathered + logits + (gathered if trains else 0), "loss")
        live.drop("h")
        if trains:
            live.hold("dh", sizes.x, "loss")
            live.drop("grad")

    def _backward(self, passes: list[Pass], walks: RepeatedLayers | EachLayer) -> None:
        """Walk from the last layer to the first that has a backward pass."""
        for layer in reversed(passes):
            if not layer.plan.trained:
                break
            kind = "kept" if layer.plan.policy in (Policy.KEEP, Policy.HOST) else "recomputed"
            self.live.enter(f"backward, {kind} layers")
            walks.backward(layer)
