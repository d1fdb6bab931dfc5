"""FLOPs and bytes of an SD3 transformer and of its VAE's decoder, by formula from their configs.

A product of ``[rows, n_in]`` and ``[n_in, n_out]`` is ``2 rows n_in n_out`` FLOPs, attention over L
tokens of width d is ``4 L^2 d``; norms, activations and other element-wise work are not counted.
The bytes are those of the operands and results of these products, each moved once: what a machine
with fused element-wise operations could do with.  Both are lower bounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Width of the sinusoidal timestep features (diffusers' CombinedTimestepTextProjEmbeddings).
TIME_FEATURES = 256


@dataclass(frozen=True)
class Cost:
    """``flops`` and ``elements`` (read and written) of a sample; ``weights`` read once a call."""

    flops: float = 0.0
    elements: float = 0.0
    weights: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.elements + other.elements,
            self.weights + other.weights,
        )

    def bytes(self, batch: int, weight_size: int, element_size: int) -> float:
        """Of a call of ``batch`` samples, with the sizes of a weight and of an activation."""
        return batch * self.elements * element_size + self.weights * weight_size


@dataclass(frozen=True)
class Linear:
    """``[rows, n_in] -> [rows, n_out]``.

    ``adapted``: it carries a LoRA.  ``needs_grad``: its input depends on trained weights, so the
    backward pass goes through it.
    """

    rows: int
    n_in: int
    n_out: int
    adapted: bool = False
    needs_grad: bool = False

    def forward(self, rank: int) -> Cost:
        """With the LoRA beside it if ``rank`` is not 0."""
        cost = _product(self.rows, self.n_in, self.n_out)
        if self.adapted and rank:
            cost += _product(self.rows, self.n_in, rank) + _product(self.rows, rank, self.n_out)
        return cost

    def backward(self, rank: int) -> Cost:
        """Through frozen weights the gradient of the input alone; of a LoRA also its weights'."""
        cost = _product(self.rows, self.n_in, self.n_out) if self.needs_grad else Cost()
        if self.adapted:
            down, up = _product(self.rows, self.n_in, rank), _product(self.rows, rank, self.n_out)
            # The weights of both, the input of the second; of the first where it is asked for.
            cost += down + up + up
            if self.needs_grad:
                cost += down
        return cost


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention of ``tokens`` over themselves, ``width`` over all heads."""

    tokens: int
    width: int
    needs_grad: bool = False

    def forward(self, rank: int) -> Cost:
        """Two products of L x L x width."""
        del rank
        return Cost(4 * self.tokens**2 * self.width, 4 * self.tokens * self.width)

    def backward(self, rank: int) -> Cost:
        """Four products; recomputing the scores, as fused kernels do, is not counted."""
        del rank
        if not self.needs_grad:
            return Cost()
        return Cost(8 * self.tokens**2 * self.width, 8 * self.tokens * self.width)


def _product(rows: int, n_in: int, n_out: int) -> Cost:
    return Cost(2 * rows * n_in * n_out, rows * (n_in + n_out), n_in * n_out)


def _layers(config: Mapping[str, Any], side: int, text: int) -> Iterator[Linear | Attention]:
    """Every product of a forward at latents ``side`` x ``side`` with ``text`` prompt tokens."""
    patch, channels = config["patch_size"], config["in_channels"]
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    image = (side // patch) ** 2
    yield Linear(image, channels * patch**2, dim)
    yield Linear(1, TIME_FEATURES, dim)
    yield Linear(1, config["pooled_projection_dim"], dim)
    yield from [Linear(1, dim, dim)] * 2
    yield Linear(text, config["joint_attention_dim"], config["caption_projection_dim"])
    for block in range(config["num_layers"]):
        last = block == config["num_layers"] - 1
        dual = block in config["dual_attention_layers"]
        # Nothing before the first block's attention is trained.
        deep = block > 0
        # Modulations of image and text, from the timestep and the pooled prompt.
        yield Linear(1, dim, (9 if dual else 6) * dim)
        yield Linear(1, dim, (2 if last else 6) * dim)
        yield from [Linear(image, dim, dim, adapted=True, needs_grad=deep)] * 3
        yield from [Linear(text, dim, dim, adapted=True, needs_grad=deep)] * 3
        yield Attention(image + text, dim, needs_grad=True)
        yield Linear(image, dim, dim, adapted=True, needs_grad=True)
        if dual:
            yield from [Linear(image, dim, dim, needs_grad=deep)] * 4
            yield Attention(image, dim, needs_grad=deep)
        yield from _feed_forward(image, dim)
        if not last:  # the last block ends with the image
            yield Linear(text, dim, dim, adapted=True, needs_grad=True)
            yield from _feed_forward(text, dim)
    yield Linear(1, dim, 2 * dim)
    yield Linear(image, dim, patch**2 * config["out_channels"], needs_grad=True)


def _feed_forward(rows: int, dim: int) -> list[Linear]:
    return [
        Linear(rows, dim, 4 * dim, needs_grad=True),
        Linear(rows, 4 * dim, dim, needs_grad=True),
    ]


def forward_cost(config: Mapping[str, Any], side: int, text: int, rank: int = 0) -> Cost:
    """Of one sample; ``rank``: of LoRAs that are computed beside their layers, 0 if merged or
    off.

    ``config``: of an SD3Transformer2DModel.  ``side``: of the latents.  ``text``: prompt tokens.
    """
    return sum((layer.forward(rank) for layer in _layers(config, side, text)), Cost())


def backward_cost(config: Mapping[str, Any], side: int, text: int, rank: int) -> Cost:
    """Of one sample, after a forward with trained LoRAs of ``rank``: gradients of their weights,
    and of activations from the first of them on.
    """
    return sum((layer.backward(rank) for layer in _layers(config, side, text)), Cost())


def _conv(side: int, n_in: int, n_out: int, kernel: int = 3) -> Cost:
    weights = kernel**2 * n_in * n_out
    return Cost(2 * side**2 * weights, side**2 * (n_in + n_out), weights)


def _resnet(side: int, n_in: int, n_out: int) -> Cost:
    cost = _conv(side, n_in, n_out) + _conv(side, n_out, n_out)
    return cost if n_in == n_out else cost + _conv(side, n_in, n_out, kernel=1)


def decode_cost(config: Mapping[str, Any], side: int) -> Cost:
    """Of decoding one latent ``side`` x ``side``; ``config``: of an AutoencoderKL."""
    latent = config["latent_channels"]
    widths = list(reversed(config["block_out_channels"]))
    wide = widths[0]
    cost = _conv(side, latent, wide) + _resnet(side, wide, wide) + _resnet(side, wide, wide)
    if config["use_post_quant_conv"]:
        cost += _conv(side, latent, latent, kernel=1)
    if config["mid_block_add_attention"]:
        cost += Attention(side**2, wide).forward(0)
        for _ in range(4):
            cost += _product(side**2, wide, wide)
    before = wide
    for number, width in enumerate(widths):
        for _ in range(config["layers_per_block"] + 1):
            cost += _resnet(side, before, width)
            before = width
        if number < len(widths) - 1:
            side *= 2
            cost += _conv(side, width, width)
    return cost + _conv(side, before, config["out_channels"])
