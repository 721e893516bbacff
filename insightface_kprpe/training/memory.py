"""How much memory a network needs to train: a step is run on tensors that have a shape but no contents."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors created in its ``with`` block.

    Views share the bytes of their base. Memory that an operator allocates and frees internally is not counted.

    Attributes:
        now: bytes alive.
        peak: largest number of bytes so far; may be set to start over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._note((args, kwargs), made_here=False)  # a view of an older tensor is not new
        out = func(*args, **(kwargs or {}))
        self._note(out, made_here=True)
        return out

    def _note(self, values: Any, made_here: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self._alive:
                self._watch(value.untyped_storage(), value.untyped_storage().nbytes() if made_here else 0)

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class NetworkNeeds(NamedTuple):
    """Memory of one forward and backward pass of a network, besides its weights.

    Attributes:
        activations: bytes kept from the forward pass for the backward pass; under autocast also copies of weights.
        forward: largest number of bytes at one time in the forward pass.
        backward: the same in the backward pass, including the remaining activations and all gradients.
    """

    activations: int
    forward: int
    backward: int


def network_needs(build: Callable[[], nn.Module], batch_size: int, dtype: torch.dtype | None) -> NetworkNeeds:
    """Run one training step of a network on fake tensors, with attention as GPUs' fused kernels do it.

    Args:
        build: makes a network ``(images, keypoints) -> embeddings`` for crops of 112 pixels.
        batch_size: images.
        dtype: of autocast; None: none.
    """
    with _fake(build) as net, _attention(_FusedAttention.apply):
        images, keypoints = torch.empty(batch_size, 3, 112, 112), torch.empty(batch_size, 5, 2)
        net.train()
        with LiveBytes() as live, torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            embeddings = _embed(net, images, keypoints)
        activations, forward = live.now, live.peak
        with live:
            live.peak = live.now
            torch.autograd.backward(embeddings, torch.ones_like(embeddings))
        return NetworkNeeds(activations, forward, live.peak)


def forward_flops(build: Callable[[], nn.Module]) -> int:
    """Floating point operations of a network for one image; a multiply-add counts as two."""
    with _fake(build) as net, _attention(_plain_attention), FlopCounterMode(display=False) as counter, torch.no_grad():
        _embed(net.eval(), torch.empty(1, 3, 112, 112), torch.empty(1, 5, 2))
    return counter.get_total_flops()


@contextlib.contextmanager
def _fake(build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """The network with fake weights on the CPU, whose autocast GPUs share; on "meta" there is none."""
    with torch.device("meta"):
        net = build()
    with FakeTensorMode(allow_non_fake_inputs=True):  # buckets of relative positions are made of real numbers
        yield net.to_empty(device="cpu")


def _embed(net: nn.Module, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
    return net(images, net.find_keypoints(images) if net.finds_keypoints else keypoints)


@contextlib.contextmanager
def _attention(function: Callable) -> Iterator[None]:
    """Another ``scaled_dot_product_attention``; a function mode would not reach what checkpointing recomputes."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, **_: function(q, k, v, attn_mask)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return (q @ k.mT).softmax(-1) @ v


class _FusedAttention(torch.autograd.Function):
    """Allocates what flash and memory-efficient attention do: never the weights of all pairs of patches."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out, log_sum = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias, out, log_sum)
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, _, _ = ctx.saved_tensors
        return tuple(
            torch.empty_like(value) if needed else None
            for value, needed in zip(inputs, ctx.needs_input_grad, strict=True)
        )
