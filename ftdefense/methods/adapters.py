"""Which parameters train: all of them, or low-rank factors beside frozen kernels."""

from collections.abc import Callable
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ftdefense.core import draws
from ftdefense.core import errors
from ftdefense.core import tree
from ftdefense.core import types

ATTENTION = ("q", "k", "v")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
# Of a stage's first key: methods draw what they remember from branches 1 and 2.
_BRANCH = 0x10A


def choices() -> dict[str, Any]:
    """Adapters by the name that `--set attack.adapter=NAME` takes."""
    return {"full": Full(), "lora": LoRA(), "factored": Factored()}


@struct.dataclass
class Full:
    """Every parameter trains."""

    choices = staticmethod(choices)

    def init(self, base: types.Params, rng: types.Rng) -> types.Params:
        """A copy of `base`: the state is donated, the lineage must outlive it."""
        del rng
        return jax.tree.map(jnp.copy, base)

    def bind(self, model: types.Model, base: types.Params) -> Callable[..., Any]:
        """The model as a function of what trains."""
        del base
        return model

    def bind_readout(
        self, model: types.Model, base: types.Params
    ) -> Callable[..., Any]:
        """The last norm and the head as a function of what trains."""
        del base
        return model.readout

    def merge(self, params: types.Params, base: types.Params) -> types.Params:
        """Full parameters."""
        del base
        return params

    def scale(self) -> float:
        """LoRA's factor on A B; not a number here."""
        return float("nan")


@struct.dataclass
class LoRA:
    """Low-rank factors: `x W + alpha / rank (x A) B`, A Kaiming-uniform, B zero.

    Source: Hu et al. 2021, arXiv:2106.09685; initialisation as in peft. Neither
    `W + A B` nor the gradient of W is formed while training. The scale of rsLoRA
    (Kalajdzievski 2023, arXiv:2312.03732) is alpha / sqrt(rank).
    """

    choices = staticmethod(choices)

    alpha: float = 32.0  # Numerator of the scale alpha / rank.
    dropout: float | None = None  # Rate on the input of A while training; None: off.
    rank: int = struct.field(pytree_node=False, default=16)
    targets: tuple[str, ...] = struct.field(pytree_node=False, default=PROJECTIONS)
    rank_stabilised: bool = struct.field(pytree_node=False, default=False)
    # Blocks that have factors; (): all, and kernels outside of blocks as well.
    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def init(self, base: types.Params, rng: types.Rng) -> types.Params:
        """Factors {a [N, in, R], b [N, R, out]} at the paths of the target kernels.

        With `layers` there are as many as these in the place of N.

        Raises:
          UserError: if no kernel has a name in `targets`, or there is no such layer.
        """
        kernels = _kernels(base)
        if self.layers:
            kernels = {p: self._layers_of(k) for p, k in kernels.items() if k.ndim == 3}
        chosen = _targeted(kernels, self.targets)
        factors: dict[str, Any] = {}
        rng = jax.random.fold_in(rng, _BRANCH)
        for i, (path, kernel) in enumerate(sorted(chosen.items())):
            *stacked, width_in, width_out = kernel.shape
            bound = 1 / math.sqrt(width_in)
            a = draws.uniform(
                jax.random.fold_in(rng, i),
                (*stacked, width_in, self.rank),
                kernel.dtype,
                -bound,
                bound,
            )
            b = jnp.zeros((*stacked, self.rank, width_out), kernel.dtype)
            _set(factors, path, {"a": a, "b": b})
        return factors

    def bind(self, model: types.Model, base: types.Params) -> Callable[..., Any]:
        """The model as a function of the factors; `base` is frozen."""

        def bound(params, tokens, *, rng=None, **hooks):
            lora = self._for_model(params, base)
            if self.dropout is None:
                return model(base, tokens, lora=lora, **hooks)
            return model(
                base, tokens, lora=lora, rng=rng, dropout=self.dropout, **hooks
            )

        return bound

    def bind_readout(
        self, model: types.Model, base: types.Params
    ) -> Callable[..., Any]:
        """The last norm and the head as a function of the factors."""

        def bound(params, hidden_BxLxD):
            lora = self._for_model(params, base)
            return model.readout(base, hidden_BxLxD, lora=lora)

        return bound

    def merge(self, params: types.Params, base: types.Params) -> types.Params:
        """`W + alpha / rank A B` at the adapted kernels; for release and export."""

        def added(base: Any, factors: Any) -> Any:
            if "a" in factors and "kernel" in base:
                product = jnp.matmul(
                    factors["a"].astype(jnp.float32),
                    factors["b"].astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST,
                )
                kernel = tree.add_scale(base["kernel"], self.scale(), product)
                return {**base, "kernel": kernel}
            return {
                **base,
                **{name: added(base[name], sub) for name, sub in factors.items()},
            }

        return added(base, self._all_layers(params, base))

    def scale(self) -> Any:
        """alpha / rank, or rsLoRA's alpha / sqrt(rank)."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def _for_model(self, params: types.Params, base: types.Params) -> types.Params:
        # The scale is folded into A, so the model needs to know of none.
        lora = _map_a(lambda a: a * self.scale(), params)
        return self._all_layers(lora, base)

    def _layers_of(self, kernel_NxIxO: jax.Array) -> jax.Array:
        count = kernel_NxIxO.shape[0]
        wrong = [i for i in self.layers if not 0 <= i < count]
        if wrong or len(set(self.layers)) < len(self.layers):
            raise errors.UserError(
                f"adapter.layers {self.layers}: name each of layers 0 to {count - 1} "
                "at most once."
            )
        return kernel_NxIxO[jnp.asarray(self.layers)]

    def _all_layers(self, params: types.Params, base: types.Params) -> types.Params:
        """Factors with N layers, zero where there were none."""
        if not self.layers:
            return params
        counts = {path: kernel.shape[0] for path, kernel in _kernels(base).items()}

        def spread(path, factor):
            count = counts[tree.path_names(path)[:-1]]
            zeros = jnp.zeros((count, *factor.shape[1:]), factor.dtype)
            return zeros.at[jnp.asarray(self.layers)].set(factor)

        return jax.tree_util.tree_map_with_path(spread, params)


def all_blocks(adapter: Any, method: str) -> None:
    """Refuses factors in some blocks only, for a method that counts blocks by factors.

    Raises:
      UserError: if the adapter has them.
    """
    if getattr(adapter, "layers", ()):
        raise errors.UserError(
            f"{method} chooses blocks itself: leave out adapter.layers={adapter.layers}."
        )


class Merged:
    """What adapters share that hand the model merged weights in every step.

    They say `init` and `merge`; the rest of `base` is frozen.
    """

    choices = staticmethod(choices)

    def bind(self, model: types.Model, base: types.Params) -> Callable[..., Any]:
        """The model as a function of what trains."""

        def bound(params, tokens, **hooks):
            return model(self.merge(params, base), tokens, **hooks)

        return bound

    def bind_readout(
        self, model: types.Model, base: types.Params
    ) -> Callable[..., Any]:
        """The last norm and the head as a function of what trains."""

        def bound(params, hidden_BxLxD):
            return model.readout(self.merge(params, base), hidden_BxLxD)

        return bound

    def scale(self) -> float:
        """LoRA's factor on A B; not a number here."""
        return float("nan")


@struct.dataclass
class Factored(Merged):
    """Target kernels as products of two: `x (A B)`, A one and B the kernel at first.

    Both train at full rank: the function is the same, the path through the weights is
    not. The product is formed in every step: for small models. Source: the layer
    injection of specs/artifacts.md 4 (k = 2), without a nonlinearity between the two
    (DESIGN).
    """

    targets: tuple[str, ...] = struct.field(pytree_node=False, default=PROJECTIONS)

    def init(self, base: types.Params, rng: types.Rng) -> types.Params:
        """Factors {a [N, in, in], b [N, in, out]} at the paths of the target kernels.

        Raises:
          UserError: if no kernel has a name in `targets`.
        """
        del rng
        factors: dict[str, Any] = {}
        for path, kernel in _targeted(_kernels(base), self.targets).items():
            *stacked, width_in, _ = kernel.shape
            one = jnp.broadcast_to(
                jnp.eye(width_in, dtype=kernel.dtype), (*stacked, width_in, width_in)
            )
            _set(factors, path, {"a": jnp.array(one), "b": jnp.copy(kernel)})
        return factors

    def merge(self, params: types.Params, base: types.Params) -> types.Params:
        """`A B` in the place of the kernels."""

        def multiplied(base: Any, factors: Any) -> Any:
            if "a" in factors and "kernel" in base:
                kernel = jnp.matmul(
                    factors["a"], factors["b"], precision=jax.lax.Precision.HIGHEST
                )
                return {**base, "kernel": kernel.astype(base["kernel"].dtype)}
            below = {name: multiplied(base[name], f) for name, f in factors.items()}
            return {**base, **below}

        return multiplied(base, params)


def _targeted(
    kernels: dict[tuple[str, ...], jax.Array], targets: tuple[str, ...]
) -> dict[tuple[str, ...], jax.Array]:
    chosen = {path: k for path, k in kernels.items() if path[-1] in targets}
    if not chosen:
        raise errors.UserError(
            f"adapter.targets {targets} match no kernel; set it to some of "
            f"{sorted({path[-1] for path in kernels})}."
        )
    return chosen


def _kernels(params: types.Params) -> dict[tuple[str, ...], jax.Array]:
    """Kernels by the path of the module that holds them."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {tree.path_names(path): leaf for path, leaf in leaves}
    return {
        path[:-1]: leaf
        for path, leaf in named.items()
        if path[-1] == "kernel" and len(path) > 1
    }


def _set(nested: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        nested = nested.setdefault(name, {})
    nested[path[-1]] = value


def _map_a(fn: Callable[[jax.Array], jax.Array], factors: types.Params) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(leaf) if tree.path_names(path)[-1] == "a" else leaf,
        factors,
    )
