"""Sizes of one expert layer of published models. Only sizes: weights in a benchmark are random."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One expert layer.

    Attributes:
        name: the model's.
        num_experts: E, routed experts.
        top_k: experts of each token.
        hidden: H.
        intermediate: I of one expert.
        activation: "silu", or "gpt_oss": interleaved gate and up, clamped.
        bias: whether both projections have one.
        source: the config the sizes were read from.
    """

    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    bias: bool = False
    source: str = ""

    @property
    def weights(self) -> int:
        """Weights of all experts."""
        return 3 * self.num_experts * self.hidden * self.intermediate

    def reduced(self) -> Shape:
        """A small layer of the same kind: at most 8 experts, 512 hidden and 512 intermediate."""
        return replace(
            self,
            name=f"{self.name} (reduced)",
            num_experts=min(8, self.num_experts),
            top_k=min(2, self.top_k),
            hidden=min(512, self.hidden),
            intermediate=min(512, self.intermediate),
        )


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("Mixtral-8x7B", 8, 2, 4096, 14336, source="mistralai/Mixtral-8x7B-v0.1"),
        Shape("Mixtral-8x22B", 8, 2, 6144, 16384, source="mistralai/Mixtral-8x22B-v0.1"),
        Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, source="Qwen/Qwen3-30B-A3B"),
        Shape("OLMoE-1B-7B", 64, 8, 2048, 1024, source="allenai/OLMoE-1B-7B-0924"),
        Shape("DeepSeek-V2-Lite", 64, 6, 2048, 1408, source="deepseek-ai/DeepSeek-V2-Lite"),
        Shape("GLM-4.5-Air", 128, 8, 4096, 1408, source="zai-org/GLM-4.5-Air"),
        Shape("gpt-oss-20b", 32, 4, 2880, 2880, activation="gpt_oss", bias=True, source="openai/gpt-oss-20b"),
    )
}
"""By name; `source` is the repository whose config.json holds the sizes."""
