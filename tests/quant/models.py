"""Models that are composed at random, each in a plain and in a lifted form with the same weights."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

CHANNELS, COPIES = 12, 2


class Conv(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        layer = {
            "conv": nn.Conv(CHANNELS, (3, 3), use_bias=False),
            "pointwise": nn.Conv(CHANNELS, (1, 1)),
            "depthwise": nn.Conv(CHANNELS, (3, 3), feature_group_count=CHANNELS),
            "grouped": nn.Conv(CHANNELS, (3, 3), feature_group_count=2, kernel_dilation=2),
            "local": nn.ConvLocal(CHANNELS, (3, 3), padding="SAME"),
            "transposed": nn.ConvTranspose(CHANNELS, (3, 3)),
            "turned": nn.ConvTranspose(CHANNELS, (3, 3), transpose_kernel=True),
        }[self.kind]
        return layer(x)


class Product(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "dense":
            return nn.Dense(CHANNELS)(x)
        if self.kind == "heads":
            return nn.DenseGeneral(CHANNELS, axis=(-2, -1))(nn.DenseGeneral((3, 8))(x))
        if self.kind == "einsum":
            return nn.Einsum((CHANNELS, CHANNELS), "...d,de->...e")(x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=CHANNELS)(tokens).reshape(x.shape)


class Excitation(nn.Module):
    """Squeeze-and-excitation: layers on a single pixel."""

    @nn.compact
    def __call__(self, x):
        gate = nn.relu(nn.Conv(CHANNELS, (1, 1))(x.mean((1, 2), keepdims=True)))
        return x * nn.sigmoid(nn.Conv(CHANNELS, (1, 1))(gate))


class Block(nn.Module):
    """A norm, a layer, an activation, around which is a shortcut."""

    part: str
    norm: str = "batch"

    @nn.compact
    def __call__(self, x):
        y = nn.BatchNorm(use_running_average=True)(x) if self.norm == "batch" else nn.LayerNorm()(x)
        kind, _, detail = self.part.partition(" ")
        y = {"conv": Conv, "product": Product, "excitation": lambda _: Excitation()}[kind](detail)(y)
        return x + nn.relu(y)


class Step(Block):
    """A block as ``nn.scan`` calls it."""

    @nn.compact
    def __call__(self, x, _=None):
        return super().__call__(x), None


@dataclasses.dataclass(frozen=True)
class Part:
    """A block, how it is lifted, and how often it is called."""

    block: str
    norm: str
    lift: str


class Composed(nn.Module):
    """A stem, the parts, and a head; ``is_lifted`` says in which of the two forms."""

    parts: tuple[Part, ...]
    is_lifted: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(CHANNELS, (3, 3), name="stem")(x)
        for i, part in enumerate(self.parts):
            x = getattr(self, part.lift)(x, part, f"part{i}")
        return nn.Dense(7, name="head")(x.reshape(x.shape[0], -1))

    def none(self, x, part, name):
        return Block(part.block, part.norm, name=name)(x)

    def shared(self, x, part, name):
        block = (nn.remat(Block) if self.is_lifted else Block)(part.block, part.norm, name=name)
        return block(block(x))

    def jit(self, x, part, name):
        return (nn.jit(Block) if self.is_lifted else Block)(part.block, part.norm, name=name)(x)

    def remat(self, x, part, name):
        return (nn.remat(Block) if self.is_lifted else Block)(part.block, part.norm, name=name)(x)

    def scan(self, x, part, name):
        if not self.is_lifted:
            for i in range(COPIES):
                x = Block(part.block, part.norm, name=f"{name}_{i}")(x)
            return x
        axes = {"params": 0, "batch_stats": 0}
        scanned = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=COPIES)
        return scanned(part.block, part.norm, name=name)(x, None)[0]

    def vmap(self, x, part, name):
        if not self.is_lifted:
            return sum(Block(part.block, part.norm, name=f"{name}_{i}")(x) for i in range(COPIES))
        axes = {"params": 1, "batch_stats": 0}
        mapped = nn.vmap(
            Block, variable_axes=axes, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=COPIES
        )
        y = mapped(part.block, part.norm, name=name)(x)
        return sum(y[i] for i in range(COPIES))


def plain_variables(parts, x, seed):
    """Random variables of the plain form; layers that are stacked in the other differ in scale."""
    shapes = jax.eval_shape(Composed(parts, False).init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/var"):
            return rng.uniform(0.5, 2, leaf.shape).astype(leaf.dtype)
        size = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        size *= 3 if "_1/" in name else 1
        return (size * rng.standard_normal(leaf.shape) + name.endswith("/scale")).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def lifted_variables(parts, variables):
    """The same of the lifted form."""
    lifted = {collection: dict(tree) for collection, tree in variables.items()}
    for i, part in enumerate(parts):
        for collection, tree in lifted.items():
            if part.lift in ("scan", "vmap") and f"part{i}_0" in tree:
                axis = 1 if part.lift == "vmap" and collection == "params" else 0
                copies = [tree.pop(f"part{i}_{copy}") for copy in range(COPIES)]
                tree[f"part{i}"] = jax.tree.map(lambda *x, axis=axis: np.stack(x, axis), *copies)
    return jax.tree.map(jnp.asarray, lifted)
