"""Modules whose weights are used inside their own forward pass, which hooks cannot see into: they are run again.

Attention is run on the whole batch, as it is known what it does with its weights. Of other modules gradients of single
samples are made by `torch.func`, in chunks.

There the module is run again, in float64, on each sample of the input it was given, and the gradient of its output is
pulled back to its parameters. That costs the module's own forward and backward pass once more, and never holds
more than a chunk of per-sample gradients. A copy without hooks, buffers or storage of its own is run, so nothing
of the training sees it. Modules that draw random numbers cannot be run again; their rows say so.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lipdyn_torch.layers import Block, LayerRule, LinearRule, chunks, register_rule, working

__all__ = ["AttentionRule", "FallbackRule"]

#: `unsupported_reason` says the same of layers that have a rule.
PARAMETRISED = "its weight is computed from other parameters (a parametrisation)"
_NO_FALLBACK = (nn.RNNBase, nn.RNNCellBase)


class FallbackRule(LayerRule):
    """Any module of its own with parameters of two axes: each is a matrix, read through the module's forward pass.

    The sample axis is the first of every tensor, in tuples and dicts too, that is as long as the output's first axis.
    """

    label = "fallback"

    def unsupported(self, module: nn.Module) -> str | None:
        """Only modules without trained submodules, and with a matrix, are run again."""
        if isinstance(module, _NO_FALLBACK):
            return f"recurrent layer {type(module).__name__}: no rule"
        if isinstance(module, nn.ParameterList | nn.ParameterDict):
            return f"{type(module).__name__} has no forward pass: register a rule for the module that uses it"
        if hasattr(module, "parametrizations") or isinstance(module, ParametrizationList):
            return PARAMETRISED
        if any(True for child in module.children() for _ in child.parameters()):
            return f"{type(module).__name__} owns parameters beside submodules: register a rule for it"
        if not self.parts(module):
            return f"no matrix among the parameters of {type(module).__name__}"
        return None

    def parts(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the parameters with two axes."""
        return tuple(name for name, p in module.named_parameters(recurse=False) if p.ndim == 2)

    def parameters(self, module: nn.Module, part: str) -> tuple[str, ...]:
        """The parameter of that name."""
        return (part,)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All arguments, without their graph, and the buffers and the mode the module had."""
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        given, named = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return given, named, buffers, module.training

    def per_sample(self, module: nn.Module, x: Any, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """``G_i`` by pulling the output gradient back through the module, one sample at a time."""
        args, kwargs, buffers, training = x
        (name,) = self.parameters(module, block.part)
        twin = twin_of(module).train(training)
        fixed = {key: _floats(value) for key, value in module.named_parameters()}
        delta = _floats(delta)
        leaves, structure = tree_flatten((args, kwargs))
        values = list(map(_floats, leaves))
        axes = [0 if isinstance(a, Tensor) and a.ndim > 0 and len(a) == len(delta) else None for a in values]

        def pulled_back(weight: Tensor, d: Tensor, *sample: Any) -> Tensor:
            whole = [value if axis is None else value[None] for value, axis in zip(sample, axes, strict=True)]
            given, named = tree_unflatten(whole, structure)

            def run(weight: Tensor) -> Tensor:
                state = {**fixed, name: weight} | {key: _floats(b).clone() for key, b in buffers.items()}
                out = self.output(module, torch.func.functional_call(twin, state, given, named))
                assert out is not None
                return out

            return torch.func.vjp(run, weight)[1](d[None])[0]

        weight = fixed[name]
        mapped = torch.func.vmap(pulled_back, (None, 0, *axes))
        for chunk in chunks(len(delta), weight.numel() + delta[0].numel()):
            part = [value if axis is None else value[chunk] for value, axis in zip(values, axes, strict=True)]
            # the other kernels have no rule for vmap, and torch warns of each function that is slow under it
            with _no_draws(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                G = mapped(weight, delta[chunk], *part)
            yield torch.stack([self.matrices(module, block.part, (g,))[block.group] for g in G])


def twin_of(module: nn.Module) -> nn.Module:
    """A copy as the module is now, without hooks, and without storage: parameters and buffers are handed to it."""
    memo: dict[int, Any] = {id(b): b.detach().to("meta") for b in module.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, hooks).clear()
        if getattr(part, "sparse", False):  # gradients of single samples are dense
            part.sparse = False  # type: ignore[assignment]
    return twin


class AttentionRule(LinearRule):
    """``nn.MultiheadAttention``: the projections of queries, keys and values, and the output projection.

    The module uses its weights inside one function call that hooks cannot see into. With identities in their place it
    is run again on what is projected already: that gives the gradients of these, and each projection is then a linear
    layer on sequences.
    """

    def unsupported(self, module: nn.Module) -> str | None:
        """Readable as torch has it; with dropout in training the rows say why noise terms are missing."""
        if type(module).forward is not nn.MultiheadAttention.forward:
            return f"{type(module).__name__} has a forward pass of its own: register a rule for it"
        return None

    def parts(self, module: Any) -> tuple[str, ...]:
        """Four matrices."""
        return (*_PROJECTED, "out_proj")

    def parameters(self, module: Any, part: str) -> tuple[str, ...]:
        """``in_proj_weight`` for the first three, unless they are kept apart."""
        if part == "out_proj":
            return ("out_proj.weight",)
        return ("in_proj_weight" if module._qkv_same_embed_dim else f"{part}_proj_weight",)

    def covers(self, module: Any) -> tuple[nn.Module, ...]:
        """The output projection, whose own forward pass is never called."""
        return (module.out_proj,)

    def matrices(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """The rows of ``in_proj_weight`` that belong to the part."""
        tensor = tensors[0]
        if part != "out_proj" and module._qkv_same_embed_dim:
            tensor = tensor.chunk(3)["qkv".index(part)]
        return tensor[None]

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All arguments by name, the mode the module had, and room for what the projections see."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        return tree_map_only(Tensor, Tensor.detach, given), module.training, {}

    def output(self, module: Any, output: Any) -> Tensor | None:
        """The attended values; a loss on the attention weights is not seen, and noticed."""
        return output[0]

    def samples(self, module: Any, delta: Tensor) -> int:
        """M, or 1 without a batch axis."""
        return delta.shape[0 if module.batch_first else 1] if delta.ndim == 3 else 1

    def operands(self, module: Any, x: Any, delta: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """Input and output gradient of a projection, samples first; found for all four at once."""
        given, training, seen = x
        if not seen:
            if training and module.dropout > 0:
                raise NotImplementedError("attention with dropout cannot be run again")
            if delta.ndim == 2:
                raise NotImplementedError("attention without a batch axis")
            first = 0 if module.batch_first else 1
            for name, pair in self._run(module, given, delta).items():
                seen[name] = tuple(tensor.movedim(first, 0) for tensor in pair)
        found: tuple[Tensor, Tensor] = seen[part]
        return found

    @staticmethod
    def _run(module: Any, given: dict[str, Any], delta: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The same with the module's own order of axes."""
        dtype = torch.promote_types(working(given["query"]).dtype, working(delta).dtype)

        cast = partial(_floats, dtype=dtype)
        own = {name: cast(parameter) for name, parameter in module.named_parameters()}
        eye = torch.eye(module.embed_dim, dtype=dtype, device=delta.device)
        if module._qkv_same_embed_dim:
            matrices, state = own["in_proj_weight"].chunk(3), {"in_proj_weight": eye.repeat(3, 1)}
        else:
            names = [f"{part}_proj_weight" for part in _PROJECTED]
            matrices, state = tuple(own[name] for name in names), dict.fromkeys(names, eye)
        biases: Sequence[Tensor | None] = (None,) * 3
        if "in_proj_bias" in own:
            biases = own["in_proj_bias"].chunk(3)
        zeros = {name: torch.zeros_like(own[name]) for name in ("in_proj_bias", "out_proj.bias") if name in own}
        state = {**own, **state, **zeros, "out_proj.weight": eye}
        arguments = {name: cast(value) for name, value in given.items()}
        inputs = [arguments.pop(name) for name in _ARGUMENTS[:3]]
        projected = [nn.functional.linear(*three) for three in zip(inputs, matrices, biases, strict=True)]
        twin = twin_of(module).train()  # the way that evaluation takes has no gradients
        twin.dropout = 0.0  # type: ignore[assignment]

        def attended(*projected: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(twin, state, projected, arguments)[0]
            return out

        context, pulled_back, *_ = torch.func.vjp(attended, *projected)
        delta = cast(delta)
        gradients = (*pulled_back(delta @ own["out_proj.weight"]), delta)
        return dict(zip((*_PROJECTED, "out_proj"), zip((*inputs, context), gradients, strict=True), strict=True))


_PROJECTED = ("q", "k", "v")
_ARGUMENTS = (
    *("query", "key", "value", "key_padding_mask", "need_weights"),
    *("attn_mask", "average_attn_weights", "is_causal"),
)


@contextlib.contextmanager
def _no_draws() -> Iterator[None]:
    """Python's and NumPy's random numbers are left as they are, and whoever draws some is refused (as torch does)."""
    with host_random_kept() as drawn:
        yield
    if drawn:
        raise NotImplementedError("a module that draws random numbers cannot be run again")


@contextlib.contextmanager
def host_random_kept() -> Iterator[list[bool]]:
    """Python's and NumPy's global random numbers are put back; what is given then holds True if any were drawn."""
    python, numpy, drawn = random.getstate(), np.random.get_state(), list[bool]()  # noqa: NPY002 (the user's own)
    try:
        yield drawn
    finally:
        now = np.random.get_state()  # noqa: NPY002
        if python != random.getstate() or not all(map(np.array_equal, numpy, now)):
            drawn.append(True)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _floats(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Floating-point tensors in that precision; anything else as it is."""
    return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


register_rule(nn.MultiheadAttention, AttentionRule())
