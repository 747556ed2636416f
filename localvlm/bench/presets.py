"""Pairs of published shapes: a guide and a model of random weights, and the picture that they are asked about.

Sizes are those of the ``config.json`` of each model on the Hugging Face hub, by the name given beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from localvlm.bench.shapes import Llm, Quant, VlmShape
from localvlm.bench.towers import Tower

__all__ = ["PRESETS", "Preset", "tiny"]


@dataclass(frozen=True)
class Preset:
    """``size``: (width, height) of the picture."""

    name: str
    guide: VlmShape
    model: VlmShape
    size: tuple[int, int]
    summary: str

    def quantized(self, quant: Quant) -> Preset:
        """With another model file."""
        return replace(self, model=replace(self.model, quant=quant))


VICUNA_7B = Llm("llama", 32, 4096, 32, 32, 11_008, 32_000)
"""lmsys/vicuna-7b-v1.5, the LLM of llava-hf/llava-1.5-7b-hf (whose vocabulary is padded)."""
LLAMA_028B = Llm("llama", 24, 896, 14, 2, 3072, 32_000)
"""No published model: 0.28B, as deep and wide as Qwen2.5-0.5B, with LLaVA's vocabulary."""
CLIP_L = Tower("clip", 24, 1024, 16, 4096, 336, 14)
"""openai/clip-vit-large-patch14-336."""
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""llava-hf/llava-v1.6-vicuna-7b-hf."""
CLIP_L_TILES = replace(CLIP_L, pinpoints=PINPOINTS)

QWEN25_05B = Llm("qwen2", 24, 896, 14, 2, 4864, 151_674, 32_768, 1e6, tokens="qwen2")
"""llm_config of OpenGVLab/InternVL3-1B; its output is not tied."""
QWEN25_7B = Llm("qwen2", 28, 3584, 28, 4, 18_944, 151_674, 32_768, 1e6, tokens="qwen2")
"""llm_config of OpenGVLab/InternVL3-8B."""
INTERNVIT_300M = Tower("internvit", 24, 1024, 16, 4096, 448, 14, merge=2)
"""vision_config of both; at most 12 tiles and the whole picture."""

SMOLLM2_135M = Llm("llama", 30, 576, 9, 3, 1536, 49_280, 8192, 1e5, tokens="smollm")
"""text_config of HuggingFaceTB/SmolVLM2-256M-Video-Instruct; its 256,484,928 parameters are those of an output that is
not tied.
"""
SMOLLM2_17B = Llm("llama", 24, 2048, 32, 32, 8192, 49_280, 8192, 1.3e5, tokens="smollm")
"""text_config of HuggingFaceTB/SmolVLM2-2.2B-Instruct."""
SIGLIP_B = Tower("siglip", 12, 768, 12, 3072, 512, 16, merge=4, edge=4)
SIGLIP_SO400M = Tower("siglip", 27, 1152, 16, 4304, 384, 14, merge=3, edge=4)

QWEN25VL_3B = Llm("qwen2vl", 36, 2048, 16, 2, 11_008, 151_936, 128_000, 1e6, tied=True, tokens="qwen2")
"""Qwen/Qwen2.5-VL-3B-Instruct."""
QWEN25VL_7B = Llm("qwen2vl", 28, 3584, 28, 4, 18_944, 152_064, 128_000, 1e6, tokens="qwen2")
"""Qwen/Qwen2.5-VL-7B-Instruct, whose vocabulary has 128 more places than the 3B's: drafts are not shared."""
QWEN25_VIT = Tower("qwen2.5", 32, 1280, 16, 3420, 560, 14, merge=2, full_every=8)
"""vision_config of both; blocks 7, 15, 23 and 31 attend to the whole picture."""

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "llava15",
            VlmShape("llava-0.28b", LLAMA_028B, CLIP_L, "Q8_0"),
            VlmShape("llava-7b", VICUNA_7B, CLIP_L, "Q4_0"),
            (336, 336),
            "LLaVA-1.5: 0.28B -> 7B, 576 image tokens",
        ),
        Preset(
            "next",
            VlmShape("llava-0.28b", LLAMA_028B, CLIP_L_TILES, "Q8_0"),
            VlmShape("llava-7b", VICUNA_7B, CLIP_L_TILES, "Q4_0"),
            (672, 672),
            "LLaVA-NeXT: 0.28B -> 7B, 5 tiles of 576 image tokens",
        ),
        Preset(
            "internvl3",
            VlmShape("internvl3-1b", QWEN25_05B, INTERNVIT_300M, "Q8_0"),
            VlmShape("internvl3-8b", QWEN25_7B, INTERNVIT_300M, "Q4_K_M"),
            (1792, 1344),
            "InternVL3: 1B -> 8B, 13 tiles of 256 image tokens",
        ),
        Preset(
            "smolvlm2",
            VlmShape("smolvlm2-256m", SMOLLM2_135M, SIGLIP_B, "Q8_0"),
            VlmShape("smolvlm2-2.2b", SMOLLM2_17B, SIGLIP_SO400M, "Q4_K_M"),
            (1024, 768),
            "SmolVLM2: 256M -> 2.2B, 13 tiles of 64 -> 81 image tokens",
        ),
        Preset(
            "qwen25vl",
            VlmShape("qwen2.5vl-3b", QWEN25VL_3B, QWEN25_VIT, "Q8_0"),
            VlmShape("qwen2.5vl-7b", QWEN25VL_7B, QWEN25_VIT, "Q4_K_M"),
            (896, 896),
            "Qwen2.5-VL: 3B -> 7B, 1024 image tokens",
        ),
    )
}


def tiny(preset: Preset) -> Preset:
    """The same kinds, tiles and quantizations in a few layers of a few columns: to try a measurement out."""
    across = 8 if preset.model.tower.kind == "clip" else 2

    def less(vlm: VlmShape, layers: int) -> VlmShape:
        t, kv_heads = vlm.tower, 2 if vlm.llm.kv_heads < vlm.llm.heads else 4
        llm = replace(vlm.llm, layers=layers, width=128, heads=4, kv_heads=kv_heads, ffn=256, vocab=512, context=8192)
        image = across * t.patch * t.merge
        points = tuple((h * image // t.image, w * image // t.image) for h, w in t.pinpoints)
        small = replace(t, layers=3, width=64, heads=2, ffn=128, image=image, pinpoints=points)
        return replace(vlm, name=f"tiny-{vlm.name}", llm=llm, tower=replace(small, full_every=t.full_every and 3))

    guide, model = less(preset.guide, 2), less(preset.model, 4)
    of = preset.size[0] // 4 if preset.name == "qwen25vl" else preset.model.tower.image  # one tile, of any size
    width, height = (n * model.tower.image // of for n in preset.size)
    return replace(preset, guide=guide, model=model, size=(width, height))
