"""FLOPs and memory traffic of an SD3 transformer and its VAE decoder, estimated from their configs.

A product of ``[rows, n_in]`` and ``[n_in, n_out]`` counts ``2 rows n_in n_out`` FLOPs, attention
over L tokens of width d ``4 L^2 d``.  Norms, activations and other element-wise operations are not
counted.  The traffic is that of the operands and results of these products, each moved once, as if
all element-wise operations were fused.  Both are lower bounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Width of the sinusoidal timestep features (diffusers' CombinedTimestepTextProjEmbeddings).
TIME_FEATURES = 256


@dataclass(frozen=True)
class Cost:
    """``flops`` and ``elements`` (read and written) per sample, ``weights`` read once per call."""

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
        """Bytes moved by a call on ``batch`` samples; sizes are bytes per weight and activation."""
        return batch * self.elements * element_size + self.weights * weight_size


@dataclass(frozen=True)
class Linear:
    """``[rows, n_in] -> [rows, n_out]``.

    ``adapted``: it has a LoRA.  ``needs_grad``: its input depends on trained weights, so the
    gradient of the input is needed.
    """

    rows: int
    n_in: int
    n_out: int
    adapted: bool = False
    needs_grad: bool = False

    def forward(self, rank: int) -> Cost:
        """Includes an unmerged LoRA if ``rank`` is not 0."""
        cost = _product(self.rows, self.n_in, self.n_out)
        if self.adapted and rank:
            cost += _product(self.rows, self.n_in, rank) + _product(self.rows, rank, self.n_out)
        return cost

    def backward(self, rank: int) -> Cost:
        """Gradients of the input and of the LoRA's weights; the layer's own weights are frozen."""
        cost = _product(self.rows, self.n_in, self.n_out) if self.needs_grad else Cost()
        if self.adapted:
            down, up = _product(self.rows, self.n_in, rank), _product(self.rows, rank, self.n_out)
            # Weights of both, input of the second, and input of the first if needed.
            cost += down + up + up
            if self.needs_grad:
                cost += down
        return cost


@dataclass(frozen=True)
class Attention:
    """Self-attention over ``tokens``; ``width``: of all heads together."""

    tokens: int
    width: int
    needs_grad: bool = False

    def forward(self, rank: int) -> Cost:
        """Two products of L x L x width."""
        del rank
        return Cost(4 * self.tokens**2 * self.width, 4 * self.tokens * self.width)

    def backward(self, rank: int) -> Cost:
        """Four products; the recomputation of scores in fused kernels is not counted."""
        del rank
        if not self.needs_grad:
            return Cost()
        return Cost(8 * self.tokens**2 * self.width, 8 * self.tokens * self.width)


def _product(rows: int, n_in: int, n_out: int) -> Cost:
    return Cost(2 * rows * n_in * n_out, rows * (n_in + n_out), n_in * n_out)


def _layers(config: Mapping[str, Any], side: int, text: int) -> Iterator[Linear | Attention]:
    """All products of a forward at latents ``side`` x ``side`` with ``text`` prompt tokens."""
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
        # No weights are trained before the attention of the first block.
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
        if not last:  # the last block drops the text stream
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
    """Cost per sample of a forward of an SD3Transformer2DModel with ``config``.

    ``side``: of the latents.  ``text``: number of prompt tokens.  ``rank``: of unmerged LoRAs, 0 if
    merged or disabled.
    """
    return sum((layer.forward(rank) for layer in _layers(config, side, text)), Cost())


def backward_cost(config: Mapping[str, Any], side: int, text: int, rank: int) -> Cost:
    """Cost per sample of the backward of ``forward_cost``: gradients of the LoRAs' weights, and of
    the activations after the first LoRA.
    """
    return sum((layer.backward(rank) for layer in _layers(config, side, text)), Cost())


def _conv(side: int, n_in: int, n_out: int, kernel: int = 3) -> Cost:
    weights = kernel**2 * n_in * n_out
    return Cost(2 * side**2 * weights, side**2 * (n_in + n_out), weights)


def _resnet(side: int, n_in: int, n_out: int) -> Cost:
    cost = _conv(side, n_in, n_out) + _conv(side, n_out, n_out)
    return cost if n_in == n_out else cost + _conv(side, n_in, n_out, kernel=1)


def decode_cost(config: Mapping[str, Any], side: int) -> Cost:
    """Cost of decoding a latent ``side`` x ``side`` by an AutoencoderKL with ``config``."""
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
