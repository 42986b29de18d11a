"""Modules read as matrices: one registry, one rule per layer type.

Index letters: ``i`` sample (M of them), ``t`` position (sequence element or output pixel), ``o`` row of the
matrix (m outputs), ``n`` column (n inputs), ``g`` group, ``c`` input channel, ``k`` kernel tap.

For a layer whose output is linear in its weight, the loss gradient of sample i with respect to the weight
matrix is ``G_i = sum_t delta_it x_it^T`` with x the layer's input patches and delta the gradient of the output.
A rule gives ``p_i = G_i v`` and ``q_i = G_i^T u`` without forming ``G_i`` ("ghost" contractions, theory 2.4).
Inputs and output gradients are contracted in their own precision (at least single), and handed on in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lipdyn_torch.distributed import full
from lipdyn_torch.noise import OnRows, check_factor_size

__all__ = ["Block", "EmbeddingRule", "LayerRule", "LinearRule", "find_rule", "register_rule", "unsupported_reason"]

#: What a contraction gives: p, q, and what bends the matrix; tensors, but p may be `OnRows`.
Sums: TypeAlias = tuple[Any, ...]

# Where per-sample gradients must exist at all, never more than this many numbers at a time.
CHUNK_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Block:
    """One matrix of a module: a part (a module may have several, each with its own row) and a group of it."""

    part: str = ""
    group: int = 0


class LayerRule:
    """What the monitor must know about a layer type; subclass it, and override `per_sample` at least.

    All tensors given to a rule are detached; M is the number of samples. ``x`` is what `inputs` returned.

    Examples
    --------
    A layer of one's own, its weight transposed, taught by the one line that says what a sample's gradient is:

    >>> import torch
    >>> class Transposed(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.randn(4, 3))
    ...
    ...     def forward(self, x):
    ...         return x @ self.weight
    >>> class TransposedRule(LayerRule):
    ...     def per_sample(self, module, x, delta, block):
    ...         yield torch.einsum("in,io->ino", x.double(), delta.double())
    >>> register_rule(Transposed, TransposedRule())
    >>> from lipdyn_torch import LipschitzMonitor
    >>> model = Transposed()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with LipschitzMonitor(model, optimizer) as monitor:
    ...     model(torch.randn(8, 4)).square().sum().backward()
    ...     optimizer.step()
    >>> monitor.history.rows[0]["status"]
    'ok'
    """

    #: How the report calls a layer read by this rule: "monitored" or "fallback".
    label = "monitored"
    #: The parameter that is the matrix.
    parameter = "weight"
    #: Whether the matrix depends on the sizes of inputs, as `meet` notes them, and on parameters alone beside.
    sized = False
    #: Why the matrix is not known yet; empty when it is.
    unknown = ""

    def unsupported(self, module: nn.Module) -> str | None:
        """Why this very module cannot be read, or None if it can."""
        return None

    def parts(self, module: Any) -> tuple[str, ...]:
        """Names of the module's matrices; each has a row ``<module>.<part>``, or ``<module>`` for part ""."""
        return ("",)

    def parameters(self, module: Any, part: str) -> tuple[str, ...]:
        """Names of the parameters the matrix is made of, relative to the module."""
        return (self.parameter,)

    def covers(self, module: Any) -> tuple[nn.Module, ...]:
        """Submodules whose parameters are read through this module, not by themselves."""
        return ()

    def matrices(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes (gradients, say) as matrices (g, m, n); linear in the tensors."""
        return tensors[0].reshape(1, tensors[0].shape[0], -1)

    def matrix(self, module: Any, part: str, tensors: Sequence[Tensor], group: int) -> Tensor:
        """One of `matrices`, (m, n)."""
        return self.matrices(module, part, tensors)[group]

    def chart(self, module: Any, group: int) -> Tensor | None:
        """E (J, n) where `matrix` is X E for a real matrix X (m, J) that is the parameter; None where it is X."""
        return None

    def coordinates(self, module: Any, part: str, tensors: Sequence[Tensor], group: int) -> Tensor:
        """That X (m, J); what squares, elementwise factors and `per_sample` are of."""
        return self.matrix(module, part, tensors, group)

    def effective(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """The parameters as matrices (g, m, n)."""
        return self.matrices(module, part, tensors)

    def meet(self, x: Any) -> bool:
        """Take note of an input before the matrix is read; True if the matrix is another one for it."""
        return False

    def noted(self) -> list[float]:
        """What `meet` has noted, as numbers; of several notes the largest of each together are one."""
        return []

    def recall(self, noted: Sequence[float]) -> bool:
        """Put such numbers in place of what was noted; True if the matrix is then another one."""
        return False

    def second_order(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor | None:
        """What a step of the parameters does to the matrices beyond `matrices`; None where that is all."""
        return None

    def inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What must be kept of a call until the gradient of its output is known; None if it cannot be read."""
        x = args[0] if args else kwargs.get("input")
        return x.detach() if isinstance(x, Tensor) else None

    def output(self, module: Any, output: Any) -> Tensor | None:
        """The tensor in the module's output whose gradient is ``delta``."""
        return output if isinstance(output, Tensor) else None

    def samples(self, module: Any, delta: Tensor) -> int:
        """M: the first axis, unless the output is a single vector."""
        return delta.shape[0] if delta.ndim > 1 else 1

    def per_sample(self, module: Any, x: Any, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """``G_i`` (chunk, m, n), in chunks of samples, in order."""
        raise NotImplementedError(f"{type(self).__name__}.per_sample")

    def contract(
        self,
        module: Any,
        x: Any,
        delta: Tensor,
        u: Tensor,
        v: Tensor,
        block: Block,
        weights: Sequence[Tensor] | None = None,
    ) -> Sums:
        """``p_i = G_i v`` (M, m) and ``q_i = G_i^T u`` (M, n).

        ``weights`` are elementwise factors of the parameters' shapes (Adam's ``1/(sqrt(vhat) + eps)``): with them,
        ``W o G_i`` takes the place of ``G_i``. A rule whose matrix is not linear in its parameters returns two
        more tensors (M, r), ``a`` and ``b``: a step ``h`` bends the matrix by ``h^2 B`` with ``u^T B v = a . b``.
        """
        W = self.weights(module, block, weights)
        p, q = [u.new_zeros(0, len(u))], [v.new_zeros(0, len(v))]
        for G in self.per_sample(module, x, delta, block):
            G = G if W is None else W * G
            p.append((G @ v.to(G.dtype)).double())
            q.append((G.mT @ u.to(G.dtype)).double())
        return torch.cat(p), torch.cat(q)

    def sum_of_squares(self, module: Any, x: Any, delta: Tensor, block: Block) -> Tensor | None:
        """``sum_i G_i o G_i`` (m, n), or None where the matrix is not the parameter itself."""
        return sum_of_squares(self.per_sample(module, x, delta, block))

    def weights(self, module: Any, block: Block, weights: Sequence[Tensor] | None) -> Tensor | None:
        """The elementwise factors as one matrix (m, n)."""
        return None if weights is None else self.matrix(module, block.part, weights, block.group)


def sum_of_squares(per_sample: Iterator[Tensor]) -> Tensor:
    """``sum_i G_i o G_i`` in float64, from chunks of per-sample gradients."""
    sums = map(_squares, per_sample)
    return sum(sums, start=next(sums))


def _squares(G: Tensor) -> Tensor:
    """``sum_i G_i o G_i`` of one chunk; where squares leave the range of its precision they are made in float64."""
    total = G.square().sum(0).double()
    return total if 1e-20 < float(total.amax()) < math.inf else G.double().square().sum(0)


class LinearRule(LayerRule):
    """``nn.Linear`` on vectors (M, n) or on sequences (M, ..., n), the sample being the whole sequence.

    A plain vector (n,) is a batch of one. The first axis is always taken as the sample axis.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> x, delta = torch.ones(1, 3), torch.tensor([[1.0, 2.0]])
    >>> u, v = torch.eye(2, dtype=torch.float64)[1], torch.eye(3, dtype=torch.float64)[0]
    >>> p, q = LinearRule().contract(layer, x, delta, u, v, Block())  # G = delta x^T
    >>> p.tolist(), q.tolist()
    ([[1.0, 2.0]], [[2.0, 2.0, 2.0]])
    """

    def operands(self, module: Any, x: Any, delta: Tensor, part: str) -> tuple[Tensor, Tensor]:
        """Input and output gradient of the matrix, samples first."""
        return x, delta

    def contract(
        self,
        module: Any,
        x: Any,
        delta: Tensor,
        u: Tensor,
        v: Tensor,
        block: Block,
        weights: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """``p_i = sum_t delta_it (x_it . v)``, ``q_i = sum_t x_it (delta_it . u)``; theory 2.4 with weights."""
        x, delta = map(self.positions, together(*self.operands(module, x, delta, block.part)))
        return ghost(x, delta, u, v, self.weights(module, block, weights))

    def sum_of_squares(self, module: Any, x: Any, delta: Tensor, block: Block) -> Tensor:
        """``(delta o delta)^T (x o x)`` for vectors; per-sample gradients in chunks for sequences."""
        a, d = (self.positions(tensor.double()) for tensor in self.operands(module, x, delta, block.part))
        if a.shape[1] == 1:  # one position: the square of an outer product is the outer product of squares
            return d[:, 0].square().T @ a[:, 0].square()
        return sum_of_squares(self.per_sample(module, x, delta, block))

    def per_sample(self, module: Any, x: Any, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """``G_i = sum_t delta_it x_it^T``."""
        x, delta = map(self.positions, together(*self.operands(module, x, delta, block.part)))
        for chunk in chunks(len(x), delta.shape[-1] * x.shape[-1]):
            yield delta[chunk].mT @ x[chunk]

    @staticmethod
    def positions(a: Tensor) -> Tensor:
        """(n,), (M, n) or (M, ..., n) to (M, T, n)."""
        return a.reshape(1, 1, -1) if a.ndim == 1 else a.reshape(a.shape[0], math.prod(a.shape[1:-1]), a.shape[-1])


def ghost(x: Tensor, delta: Tensor, u: Tensor, v: Tensor, W: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``p_i = (W o G_i) v``, ``q_i = (W o G_i)^T u`` for ``G_i = sum_t delta_it x_it^T``, never formed (theory 2.4).

    ``x`` is (M, T, n) and ``delta`` (M, T, m); the products are made in their precision, the results are float64.
    """
    u, v = u.to(delta.dtype), v.to(x.dtype)
    if W is None and x.shape[1] == 1:
        p, q = delta[:, 0] * (x[:, 0] @ v)[:, None], x[:, 0] * (delta[:, 0] @ u)[:, None]
        return p.double(), q.double()
    if W is None:
        p, q = (x @ v)[:, None] @ delta, (delta @ u)[:, None] @ x
        return p[:, 0].double(), q[:, 0].double()
    x, delta, u, v, W = x.double(), delta.double(), u.double(), v.double(), W.double()
    parts = [(u.new_zeros(0, len(u)), v.new_zeros(0, len(v)))]
    for chunk in chunks(len(x), x.shape[1] * (x.shape[2] + delta.shape[2])):
        parts.append(
            (
                (delta[chunk] * ((x[chunk] * v) @ W.T)).sum(1),
                (x[chunk] * ((delta[chunk] * u) @ W)).sum(1),
            )
        )
    p, q = (torch.cat(part) for part in zip(*parts, strict=True))
    return p, q


def working(a: Tensor) -> Tensor:
    """In the precision of its contractions: its own, but at least single."""
    return a if a.dtype in (torch.float32, torch.float64) else a.float()


def together(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the better precision of the two, and at least single."""
    x, delta = working(x), working(delta)
    dtype = torch.promote_types(x.dtype, delta.dtype)
    return x.to(dtype), delta.to(dtype)


def whole(parameter: Tensor) -> Tensor:
    """The parameter, dense and of all processes, without graph."""
    parameter = full(parameter.detach())
    return parameter.to_dense() if parameter.is_sparse else parameter


def value(parameter: Tensor) -> Tensor:
    """A copy of the whole parameter in its own precision."""
    return whole(parameter).clone()


class EmbeddingRule(LayerRule):
    """``nn.Embedding``: the table (entries, features); a sample is everything along the first axis of the indices."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Options that change the table in the forward pass, or mix samples."""
        if getattr(module, "max_norm", None) is not None:
            return "embedding with max_norm: the forward pass changes the table"
        if getattr(module, "scale_grad_by_freq", False):
            return "embedding with scale_grad_by_freq: gradients of samples depend on each other"
        return None

    def contract(
        self,
        module: nn.Embedding,
        x: Any,
        delta: Tensor,
        u: Tensor,
        v: Tensor,
        block: Block,
        weights: Sequence[Tensor] | None = None,
    ) -> Sums:
        """``p_i`` collects ``delta_it . v`` at the entries read, ``q_i = sum_t u[x_it] delta_it``."""
        index, delta = self._read(module, x, delta)
        W = self.weights(module, block, weights)
        if W is not None:
            delta = delta * W[index]
        rows, places = index.unique(return_inverse=True)
        check_factor_size((len(index), len(rows)))
        p = delta.new_zeros(len(index), len(rows)).scatter_add_(1, places, delta @ v)
        return OnRows(p, rows, module.num_embeddings), torch.einsum("it,itn->in", u[index], delta)

    def sum_of_squares(self, module: nn.Embedding, x: Any, delta: Tensor, block: Block) -> Tensor:
        """Each sample's sums in the entries it reads, squared there."""
        index, delta = self._read(module, x, delta)
        sample = torch.arange(len(index), device=index.device)[:, None]
        keys, places = (sample * module.num_embeddings + index).unique(return_inverse=True)
        sums = delta.new_zeros(len(keys), delta.shape[-1]).index_add_(0, places.flatten(), delta.flatten(0, 1))
        squares = delta.new_zeros(module.num_embeddings, delta.shape[-1])
        return squares.index_add_(0, keys % module.num_embeddings, sums.square())

    def samples(self, module: nn.Module, delta: Tensor) -> int:
        """The first axis of the indices; a plain sequence of indices is as many samples."""
        return delta.shape[0] if delta.ndim > 1 else 1

    def per_sample(self, module: nn.Embedding, x: Any, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """``G_i``: row ``x_it`` holds the sum of the ``delta_it``."""
        index, delta = self._read(module, x, delta)
        for chunk in chunks(len(index), module.weight.numel()):
            G = delta.new_zeros(len(index[chunk]), *module.weight.shape)
            where = index[chunk][..., None].expand_as(delta[chunk])
            yield G.scatter_add_(1, where, delta[chunk])

    @staticmethod
    def _read(module: nn.Embedding, x: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (M, T) and gradients (M, T, n) in float64; the padding entry learns nothing."""
        index = x.reshape(x.shape[0], math.prod(x.shape[1:])) if x.ndim else x.reshape(1, 1)
        delta = delta.to(torch.float64).reshape(*index.shape, delta.shape[-1])
        if module.padding_idx is not None:
            delta = delta * (index != module.padding_idx)[..., None]
        return index, delta


class EmbeddingBagRule(EmbeddingRule):
    """``nn.EmbeddingBag`` of mode "sum" or "mean": a sample is a bag.

    Examples
    --------
    >>> import torch
    >>> bag = torch.nn.EmbeddingBag(5, 2, mode="sum")
    >>> index, share = EmbeddingBagRule().inputs(bag, (torch.tensor([4, 0, 1]), torch.tensor([0, 1])), {})
    >>> index.tolist(), share.tolist()
    ([[4, 4], [0, 1]], [[1.0, 0.0], [1.0, 1.0]])
    """

    def unsupported(self, module: nn.Module) -> str | None:
        """As of an embedding; and which entries a maximum is taken of cannot be seen."""
        if module.mode == "max":
            return "EmbeddingBag of mode 'max': the entries it takes are not seen"
        return super().unsupported(module)

    def inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Indices (M, T), bag by bag and filled up, and the share (M, T) each has in its bag's output."""
        names = ("input", "offsets", "per_sample_weights")
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        index: Any
        weights: Any
        index, offsets, weights = (None if given.get(name) is None else given[name].detach() for name in names)
        if index is None:
            return None
        valid = torch.ones_like(index, dtype=torch.bool)
        if offsets is not None:  # one bag after the other
            ends = torch.cat([offsets[1:], offsets.new_tensor([] if module.include_last_offset else [len(index)])])
            begins = offsets[: len(ends)]
            longest = max(1, int((ends - begins).max())) if len(ends) else 1
            places = begins[:, None] + torch.arange(longest, device=index.device)
            valid = places < ends[:, None]
            places = places.where(valid, torch.zeros_like(places))
            if not len(index):  # there is nothing to take
                index, weights = (None if x is None else x.new_zeros(1) for x in (index, weights))
            index, weights = index[places], None if weights is None else weights[places]
        if module.padding_idx is not None:
            valid = valid & (index != module.padding_idx)
        share = valid.double() if weights is None else valid * weights.double()
        return index, share / valid.sum(1, keepdim=True).clamp_min(1) if module.mode == "mean" else share

    @staticmethod
    def _read(module: nn.Embedding, x: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Each bag's gradient goes to its entries by their shares."""
        index, share = x
        return index, delta.double()[:, None] * share[..., None]


def chunks(samples: int, numbers_per_sample: int) -> Iterator[slice]:
    """Slices of the sample axis that hold at most about ``CHUNK_NUMBERS`` numbers each."""
    width = max(1, CHUNK_NUMBERS // max(1, numbers_per_sample))
    return (slice(start, start + width) for start in range(0, samples, width))


_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LinearRule(),
    nn.Embedding: EmbeddingRule(),
    nn.EmbeddingBag: EmbeddingBagRule(),
}


def register_rule(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Teach the monitor a layer type; subclasses of ``module_type`` follow it unless they have their own rule.

    Examples
    --------
    >>> import torch
    >>> class MyLinear(torch.nn.Module):
    ...     pass
    >>> register_rule(MyLinear, LinearRule())
    >>> type(find_rule(MyLinear())).__name__
    'LinearRule'
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"expected a class of modules, such as torch.nn.Linear, got {module_type!r}")
    if not isinstance(rule, LayerRule):
        raise TypeError(f"expected an instance of LayerRule, such as LinearRule(), got {rule!r}")
    _RULES[module_type] = rule


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule of the module's type, or of the nearest base class that has one."""
    return next((_RULES[base] for base in type(module).__mro__ if base in _RULES), None)


def unsupported_reason(module: nn.Module, rule: LayerRule | None = None) -> str | None:
    """Why a module that owns parameters cannot be read, or None if it can.

    Examples
    --------
    >>> import torch
    >>> unsupported_reason(torch.nn.Linear(3, 2)) is None
    True
    >>> unsupported_reason(torch.nn.BatchNorm2d(4))
    'no rule for BatchNorm2d'
    """
    rule = rule or find_rule(module)
    if rule is None:
        return f"no rule for {type(module).__name__}"
    reason = rule.unsupported(module)
    if reason is not None:
        return reason
    read = {path for part in rule.parts(module) for path in rule.parameters(module, part)}
    if type(module) not in _RULES and rule is find_rule(module):  # a subclass may use more than its base does
        others = ((name, p) for name, p in module.named_parameters(recurse=False) if name not in read)
        known = ((name, p) for name, p in others if not isinstance(p, nn.parameter.UninitializedParameter))
        own = [name for name, p in known if sum(size > 1 for size in p.shape) > 1]
        if own:
            return f"has matrices that {type(rule).__name__} does not read ({', '.join(own)}): register a rule for it"
    for part in rule.parts(module):
        for path in rule.parameters(module, part):
            owner, _, name = path.rpartition(".")
            parameter = module.get_submodule(owner)._parameters.get(name)
            if parameter is None:
                return "its weight is computed from other parameters (a parametrisation)"
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                return "its weight has no shape yet; run one forward pass first"
            if parameter.is_meta:
                return "its weight is on the meta device; load it, or give it storage, first"
            if not parameter.is_floating_point():
                return f"its weight is not real floating-point but {str(parameter.dtype).removeprefix('torch.')}"
            if parameter.numel() == 0:
                return f"its weight is empty, of shape {tuple(parameter.shape)}"
    return None
