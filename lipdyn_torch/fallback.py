"""Modules whose weights are used inside their own forward pass: per-sample gradients by `torch.func`, in chunks.

The module is run again, in float64, on each sample of the input it was given, and the gradient of its output is
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
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lipdyn_torch.layers import Block, LayerRule, chunks, register_rule

__all__ = ["AttentionRule", "FallbackRule"]

#: `unsupported_reason` says the same of layers that have a rule.
PARAMETRISED = "its weight is computed from other parameters (a parametrisation)"
#: Modules whose last output was not one tensor.
unread_outputs: WeakSet[nn.Module] = WeakSet()
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

    def output(self, module: nn.Module, output: Any) -> Tensor | None:
        """The output, if it is one tensor; of several only a rule of the user's own knows which to take."""
        found = super().output(module, output)
        (unread_outputs.add if found is None else unread_outputs.discard)(module)
        return found

    def per_sample(self, module: nn.Module, x: Any, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """``G_i`` by pulling the output gradient back through the module, one sample at a time."""
        args, kwargs, buffers, training = x
        (name,) = self.parameters(module, block.part)
        twin, axis = self._twin(module).train(training), self.sample_axis(module)
        fixed = {key: _double(value) for key, value in module.named_parameters()}
        delta = _double(delta).movedim(axis, 0)
        keys: list[str | None] = []  # of tensors that are arguments by themselves
        for key, argument in (*((None, value) for value in args), *kwargs.items()):
            keys += [key if isinstance(argument, Tensor) else None] * len(tree_leaves(argument))
        leaves, structure = tree_flatten((args, kwargs))
        values = list(map(_double, leaves))
        axes = [self.argument_axis(module, key, value, len(delta)) for key, value in zip(keys, values, strict=True)]

        def pulled_back(weight: Tensor, d: Tensor, *sample: Any) -> Tensor:
            whole = [
                value if a is None else self.one_sample(value, a, key)
                for value, a, key in zip(sample, axes, keys, strict=True)
            ]
            given, named = tree_unflatten(whole, structure)

            def run(weight: Tensor) -> Tensor:
                state = {**fixed, name: weight} | {key: _double(b).clone() for key, b in buffers.items()}
                out = self.output(module, torch.func.functional_call(twin, state, given, named))
                assert out is not None
                return out

            return torch.func.vjp(run, weight)[1](d.unsqueeze(axis))[0]

        weight = fixed[name]
        mapped = torch.func.vmap(pulled_back, (None, 0, *(None if a is None else 0 for a in axes)))
        for chunk in chunks(len(delta), weight.numel() + delta[0].numel()):
            part = [v if a is None else v.movedim(a, 0)[chunk] for v, a in zip(values, axes, strict=True)]
            # the other kernels have no rule for vmap, and torch warns of each function that is slow under it
            with _no_draws(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                G = mapped(weight, delta[chunk], *part)
            yield torch.stack([self.matrices(module, block.part, (g,))[block.group] for g in G])

    def sample_axis(self, module: Any) -> int:
        """Where samples are counted in the module's input and output."""
        return 0

    def argument_axis(self, module: Any, key: str | None, value: Any, samples: int) -> int | None:
        """Where samples are counted in an argument; None if all samples share it."""
        axis = self.sample_axis(module)
        counted = isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == samples
        return axis if counted else None

    def one_sample(self, value: Tensor, axis: int, key: str | None) -> Tensor:
        """An argument with the sample axis put back."""
        return value.unsqueeze(axis)

    @staticmethod
    def _twin(module: nn.Module) -> nn.Module:
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


class AttentionRule(FallbackRule):
    """``nn.MultiheadAttention``: the projections of queries, keys and values, and the output projection.

    The module uses its weights inside one function call that hooks cannot see into, so it is run again.
    """

    def unsupported(self, module: nn.Module) -> str | None:
        """Always readable; with dropout in training the rows say why noise terms are missing."""
        return None

    def parts(self, module: Any) -> tuple[str, ...]:
        """Four matrices."""
        return ("q", "k", "v", "out_proj")

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

    def output(self, module: Any, output: Any) -> Tensor | None:
        """The attended values; a loss on the attention weights is not seen, and noticed."""
        return output[0]

    def samples(self, module: Any, delta: Tensor) -> int:
        """M, or 1 without a batch axis."""
        return delta.shape[self.sample_axis(module)] if delta.ndim == 3 else 1

    def per_sample(self, module: Any, x: Any, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """As for any module; a single sequence gets its batch axis first."""
        args, kwargs, buffers, training = x
        if training and module.dropout > 0:
            raise NotImplementedError("attention with dropout cannot be run again")
        if delta.ndim == 2:
            raise NotImplementedError("attention without a batch axis")
        for position, name in enumerate(_ATTENTION_ARGUMENTS[: len(args)]):
            kwargs = {**kwargs, name: args[position]}
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.ndim == 3:
            kwargs["attn_mask"] = mask.reshape(-1, module.num_heads, *mask.shape[1:])
        return super().per_sample(module, ((), kwargs, buffers, training), delta, block)

    def sample_axis(self, module: Any) -> int:
        """First or second, as the module has it."""
        return 0 if module.batch_first else 1

    def argument_axis(self, module: Any, key: str | None, value: Any, samples: int) -> int | None:
        """Masks have their own axes."""
        if key in ("query", "key", "value"):
            return self.sample_axis(module)
        if not isinstance(value, Tensor) or key not in ("key_padding_mask", "attn_mask"):
            return None
        return 0 if key == "key_padding_mask" or value.ndim == 4 else None

    def one_sample(self, value: Tensor, axis: int, key: str | None) -> Tensor:
        """A mask of all heads is one sample's already."""
        return value if key == "attn_mask" else value.unsqueeze(axis)


_ATTENTION_ARGUMENTS = (
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


def _double(value: Any) -> Any:
    """Floating-point tensors in float64; anything else as it is."""
    return value.detach().to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value


register_rule(nn.MultiheadAttention, AttentionRule())
