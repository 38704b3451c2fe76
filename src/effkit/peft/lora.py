"""LoRA: a product of two thin matrices beside each frozen weight.

    y = W x + s B A drop(x)      s = alpha / r, or alpha / sqrt(r) (rank-stabilised)      Hu et al., arXiv 2106.09685

A [R, K] starts as noise and B [M, R] as zero, so that the model starts as it was. Trained are R (K + M) numbers a layer
instead of K M; gradients, moments and files shrink accordingly. A forward pass costs R (1 / K + 1 / M) more operations,
0.8 % at rank 16 of 4096 x 4096. What is kept for the backward pass is x, once, and A x: see `lora_linear`.

Rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732) keeps the size of updates as ranks grow. LoRA-FA (Zhang et
al., arXiv 2308.03303) freezes A as well: x need not be kept. QLoRA (arXiv 2305.14314) is LoRA on layers in four bits:
apply NF4Config first.

When not to use it: where the task needs more than a low-rank change (continued pretraining on much text), and where all
weights fit: full fine-tuning is then the reference. The learning rate is about ten times that of full fine-tuning.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.peft.adapter import Adapted, Adapter, AdapterConfig, linear_shape, parameter_dtype
from effkit.peft.low_rank import LORA_LINEAR
from effkit.peft.matching import check_expression, first_match
from effkit.quant.nf4_linear import as_autocast

INITS = ("default", "gaussian", "random")


class Scaled(Adapter):
    """An adapter that is multiplied by a number, and by its gate: `gain`, float32 [], is the product of both."""

    gain: Tensor

    def __init__(self, scale: float, device: torch.device | str | None = None) -> None:
        super().__init__(device)
        self.scale = scale
        self.register_buffer("gain", torch.full((), float(scale), device=device, dtype=torch.float32), persistent=False)

    def refresh(self) -> None:
        self.gain = self.gate * self.scale


class LoRA(Scaled):
    """The factors of one linear layer: y + scale B A drop(x).

    in_features       K
    out_features      M
    rank              R
    scale             what the product is multiplied by, alpha / rank
    dropout           share of the inputs left out while training, before A; the layer itself sees all
    update_bias       whether B has a bias [M], which is scaled as well
    train_a           False for LoRA-FA: A stays as it is, and x is not kept for the backward pass
    init              "default": A uniform within 1 / sqrt(K), B zero; "gaussian": A normal with deviation 1 / R, B
                      zero; "random": both uniform, which changes the layer (for tests)
    generator         what the values are drawn from

    lora_A [R, K] and lora_B [M, R] are the parameters.
    """

    lora_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        update_bias: bool = False,
        train_a: bool = True,
        init: str = "default",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(scale, device)
        self.dropout, self.frozen = dropout, () if train_a else ("lora_A",)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype), requires_grad=train_a)
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if update_bias else None
        self.register_parameter("lora_bias", bias)
        self.reset_parameters(init, generator)

    @torch.no_grad()
    def reset_parameters(self, init: str = "default", generator: torch.Generator | None = None) -> None:
        """Starts again: B = 0 unless init is "random"."""
        if self.lora_A.is_meta:
            return
        rank, inputs = self.lora_A.shape
        if init == "gaussian":
            _draw(self.lora_A, lambda a: a.normal_(std=1 / max(1, rank), generator=generator))
        else:
            _draw(self.lora_A, lambda a: a.uniform_(-1, 1, generator=generator).div_(math.sqrt(max(1, inputs))))
        self.lora_B.zero_()
        if init == "random":
            _draw(self.lora_B, lambda b: b.uniform_(-1, 1, generator=generator).div_(math.sqrt(max(1, rank))))

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        weight, bias = (layer.dense_form() or (None, None)) if y is None else (None, None)
        base = y if y is not None or weight is not None else layer.base(x)
        # Called without the checks of lora_linear, which take longer than a small layer: the factors were made to fit.
        y = LORA_LINEAR.run(
            None,
            x=as_autocast(x),
            a=self.lora_A,
            b=self.lora_B,
            scale=self.gain,
            weight=weight,
            bias=bias,
            base=base,
            seed=new_seed(x) if dropout else None,
            dropout=dropout,
        )
        return y if self.lora_bias is None else y + (self.gain * self.lora_bias).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b, scale = (part.to(weight.dtype) for part in self.factors())
        if self.lora_bias is not None:
            update = scale * self.lora_bias.to(weight.dtype)
            bias = update if bias is None else bias + update
        return weight + scale * (b @ a), bias

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_B, self.gain

    def plain_factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        drops = self.dropout > 0 and self.training
        plain = type(self) is LoRA and not drops and self.lora_bias is None and self.bias is None
        return self.factors() if plain else None

    def extra_repr(self) -> str:
        rank, inputs = self.lora_A.shape
        return f"{inputs}, {self.lora_B.shape[0]}, rank={rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoRAEmbedding(Scaled):
    """The factors of an embedding: y + scale B A[:, id].

    lora_embedding_A [R, V] starts as zero, lora_embedding_B [C, R] as normal values: names and start are peft's. There
    is no dropout. The arguments are those of `LoRA`; init "random" draws A as well.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: int,
        scale: float = 1.0,
        init: str = "default",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(scale, device)
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, num_embeddings, device=device, dtype=dtype))
        self.lora_embedding_B = nn.Parameter(torch.empty(embedding_dim, rank, device=device, dtype=dtype))
        if not self.lora_embedding_B.is_meta:
            with torch.no_grad():
                _draw(self.lora_embedding_B, lambda b: b.normal_(generator=generator))
                if init == "random":
                    _draw(self.lora_embedding_A, lambda a: a.normal_(generator=generator))

    def forward(self, layer: Adapted, x: Tensor, y: Tensor | None) -> Tensor:
        base: Any = layer
        y = base.base(x) if y is None else y
        # The layer's own options, as peft does; a model that multiplies its embeddings multiplies these, too.
        rows = F.embedding(
            x, self.lora_embedding_A.T, base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq
        )
        update = self.gain * F.linear(rows, self.lora_embedding_B)
        if getattr(base, "embed_scale", None) is not None:
            update = update * base.embed_scale
        return y + update.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b, scale = self.lora_embedding_A, self.lora_embedding_B, self.gain
        return weight + scale.to(weight.dtype) * (b.to(weight.dtype) @ a.to(weight.dtype)).T, bias

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        raise TypeError("LoRA of an embedding has no factors of a linear layer")

    def extra_repr(self) -> str:
        rank, count = self.lora_embedding_A.shape
        return f"{count}, {self.lora_embedding_B.shape[0]}, rank={rank}, scale={self.scale:g}"


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA in a model's linear layers and embeddings: `effkit.apply(model, LoRAConfig(rank=8, alpha=16))`.

    rank             R, the inner width of the product; 0 is allowed and changes nothing
    alpha            the product is multiplied by alpha / rank; None is alpha = rank
    dropout          share of a layer's inputs left out before A while training
    rank_stabilized  multiply by alpha / sqrt(rank) instead
    rank_pattern     {regular expression for the end of a layer's name: its rank}; the first that fits counts
    alpha_pattern    the same for alpha
    train_a          False is LoRA-FA: B alone is trained
    update_bias      B has a bias, too (peft's lora_bias)
    init             "default", "gaussian" or "random": see `LoRA`
    seed             of the values that A starts with; each layer draws its own

    The other fields are those of `AdapterConfig`.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    train_a: bool = True
    update_bias: bool = False
    init: str = "default"
    seed: int = 0
    linear_adapter: ClassVar[type[LoRA]] = LoRA

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self).__name__
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{kind}: {name} is {getattr(self, name)!r}, expected a mapping from names to numbers")
        for name, value in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if type(value) is not int or value < 0:
                raise ValueError(f"{kind}: {name} is {value!r}, expected an integer of at least 0")
        alphas: list[tuple[str, Any]] = [
            ("alpha", self.alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]
        for name, value in alphas[self.alpha is None :]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{kind}: {name} is {value!r}, expected a finite number")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            check_expression(kind, "a key of rank_pattern or alpha_pattern", key)
        if isinstance(self.dropout, str) or not 0 <= self.dropout < 1:
            raise ValueError(f"{kind}: dropout is {self.dropout!r}, expected 0 <= dropout < 1")
        if type(self.seed) is not int:
            raise TypeError(f"{kind}: seed is {self.seed!r}, expected an integer")
        for name in ("rank_stabilized", "train_a", "update_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{kind}: {name} is {getattr(self, name)!r}, choices: True, False")
        if self.init not in INITS:
            raise ValueError(f"{kind}: init is {self.init!r}, choices: {', '.join(map(repr, INITS))}")

    def rank_of(self, path: str) -> int:
        """The rank of the layer with this name."""
        return first_match(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the layer with this name."""
        return first_match(self.alpha_pattern, path, self.rank_of(path) if self.alpha is None else self.alpha)

    def scale_of(self, path: str) -> float:
        """What the product of the layer with this name is multiplied by."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilized else rank) if rank else 0.0

    def adapter(self, path: str, layer: nn.Module, shared: Any) -> Adapter:
        embedding = isinstance(layer, nn.Embedding)
        sizes = (layer.num_embeddings, layer.embedding_dim) if embedding else linear_shape(self, path, layer)
        common: dict[str, Any] = dict(
            rank=self.rank_of(path),
            scale=self.scale_of(path),
            init=self.init,
            generator=generator_of(self.seed, path),
            device=layer.weight.device,
            dtype=parameter_dtype(self, layer),
        )
        if embedding and self.update_bias:
            raise ValueError(f"{type(self).__name__}: update_bias is True, but {path} is an embedding")
        if embedding:
            return LoRAEmbedding(*sizes, **common)
        return self.linear_adapter(
            *sizes,
            dropout=self.dropout,
            update_bias=self.update_bias,
            train_a=self.train_a,
            **common,
        )


def new_seed(x: Tensor) -> Tensor:
    """A seed for one pass, from torch's generator as nn.Dropout draws its mask: checkpointing repeats it."""
    return torch.randint(2**31 - 1, (), device=x.device, dtype=torch.int32)


def generator_of(seed: int, path: str) -> torch.Generator:
    """A generator for the layer with this name: its values do not depend on which other layers there are."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{path}".encode()))  # 32 bits are all that it takes


def _draw(parameter: Tensor, fill: Any) -> None:
    """Fills a parameter with values drawn on the CPU in float32: the same on every device and in every dtype."""
    parameter.copy_(fill(torch.empty(parameter.shape, device="cpu", dtype=torch.float32)))
